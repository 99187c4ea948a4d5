//! Selectors by label and field: what is read can be written and read again, and an opposite chooses the others.
#![no_main]

use libfuzzer_sys::fuzz_target;
use seawall_api::selector::{LabelSelector, Requirement, parse_fields};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(selector) = LabelSelector::parse(text) {
        let written: Vec<String> = selector.0.iter().map(write).collect();
        assert_eq!(LabelSelector::parse(&written.join(",")).as_ref(), Ok(&selector), "{written:?}");
        for requirement in &selector.0 {
            let Some(opposite) = opposite(requirement) else { continue };
            let (one, other) = (LabelSelector(vec![requirement.clone()]), LabelSelector(vec![opposite]));
            for label in [None, Some(""), Some("a"), Some("7")] {
                assert_ne!(one.matches(|_| label), other.matches(|_| label), "{one:?} of {label:?}");
            }
        }
    }
    // What has these in a name or a value cannot be written so that they are told apart.
    let plain = |text: &str| !text.contains(['=', '!']);
    if let Ok(fields) = parse_fields(text)
        && fields.iter().all(|f| plain(&f.field) && plain(&f.value))
    {
        let write = |f: &seawall_api::selector::FieldRequirement| {
            format!("{}{}{}", f.field, if f.equal { "==" } else { "!=" }, f.value)
        };
        let written: Vec<String> = fields.iter().map(write).collect();
        assert_eq!(parse_fields(&written.join(",")), Ok(fields), "{written:?}");
    }
});

fn write(requirement: &Requirement) -> String {
    match requirement {
        Requirement::In(key, values) => format!("{key} in ({})", values.join(",")),
        Requirement::NotIn(key, values) => format!("{key} notin ({})", values.join(",")),
        Requirement::Exists(key) => key.clone(),
        Requirement::DoesNotExist(key) => format!("!{key}"),
        Requirement::Gt(key, number) => format!("{key}>{number}"),
        Requirement::Lt(key, number) => format!("{key}<{number}"),
    }
}

fn opposite(requirement: &Requirement) -> Option<Requirement> {
    Some(match requirement {
        Requirement::In(key, values) => Requirement::NotIn(key.clone(), values.clone()),
        Requirement::NotIn(key, values) => Requirement::In(key.clone(), values.clone()),
        Requirement::Exists(key) => Requirement::DoesNotExist(key.clone()),
        Requirement::DoesNotExist(key) => Requirement::Exists(key.clone()),
        Requirement::Gt(..) | Requirement::Lt(..) => return None,
    })
}
