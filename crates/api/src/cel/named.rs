//! Formats with names, as `format.dns1123Label()` (<https://kubernetes.io/docs/reference/using-api/cel/#kubernetes-format-library>).

use crate::{custom::format, names};

/// Names of formats, and the longest pattern that upstream estimates for each, in characters.
const FORMATS: [(&str, u64); 13] = [
    ("dns1123Label", 30),
    ("dns1123Subdomain", 60),
    ("dns1035Label", 30),
    ("qualifiedName", 60),
    ("dns1123LabelPrefix", 30),
    ("dns1123SubdomainPrefix", 60),
    ("dns1035LabelPrefix", 30),
    ("labelValue", 40),
    ("uri", 1103),
    ("uuid", 70),
    ("byte", 84),
    ("date", 71),
    ("datetime", 71),
];

/// The format of a name, if there is one.
pub(super) fn find(name: &str) -> Option<&'static str> {
    FORMATS.iter().map(|(known, _)| *known).find(|known| *known == name)
}

/// What asking whether a text of this size has a format costs, in units.
pub(super) fn cost(format: &str, size: u64) -> u64 {
    let pattern = FORMATS.iter().find(|(known, _)| *known == format).map_or(0, |(_, pattern)| *pattern);
    size.saturating_add(1).div_ceil(10).saturating_mul(pattern.div_ceil(4))
}

/// Why a text does not have a format.
///
/// # Errors
/// Upstream's texts.
pub(super) fn validate(format: &str, text: &str) -> Result<(), String> {
    // Something is put behind it, so it may end in a hyphen.
    let masked = || match text.strip_suffix('-').map(|start| (start.is_empty(), start.char_indices().next_back())) {
        Some((false, Some((last, _)))) => format!("{}a", &text[..last]),
        _ => text.to_owned(),
    };
    let known = |format: &str, why: &str| if format::is_valid(format, text) { Ok(()) } else { Err(why.to_owned()) };
    match format {
        "dns1123Label" => names::dns_label(text),
        "dns1123Subdomain" => names::dns_subdomain(text),
        "dns1035Label" => names::dns_1035_label(text),
        "dns1123LabelPrefix" => names::dns_label(&masked()),
        "dns1123SubdomainPrefix" => names::dns_subdomain(&masked()),
        "dns1035LabelPrefix" => names::dns_1035_label(&masked()),
        "qualifiedName" => names::qualified_name(text),
        "labelValue" => names::label_value(text),
        "uri" if text.starts_with('/') => Ok(()),
        "uri" => known("uri", "invalid URI for request"),
        "uuid" => known("uuid", "does not match the UUID format"),
        "byte" => known("byte", "invalid base64"),
        "date" => known("date", "invalid date"),
        "datetime" => known("datetime", "invalid datetime"),
        _ => Err(format!("there is no format {format:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_texts_have_a_format() {
        let check = |format: &str, good: &[&str], bad: &[&str]| {
            assert_eq!(find(format), Some(format));
            for text in good {
                assert_eq!(validate(format, text), Ok(()), "{format} {text}");
            }
            for text in bad {
                assert!(validate(format, text).is_err(), "{format} {text}");
            }
        };
        check("dns1123Label", &["a-b"], &["a.b", "a-", "A"]);
        check("dns1123Subdomain", &["a.b"], &["a.b-", "a..b"]);
        check("dns1035Label", &["a1"], &["1a"]);
        check("dns1123LabelPrefix", &["a-", "a"], &["-", "a_b-"]);
        check("dns1123SubdomainPrefix", &["a.b-"], &["a_b-"]);
        check("dns1035LabelPrefix", &["a-"], &["1b-"]);
        check("qualifiedName", &["a.b/c"], &["a/b/c"]);
        check("labelValue", &["", "a_b"], &["-"]);
        check("uri", &["https://example.org/x", "/x"], &["x"]);
        check("uuid", &["123e4567-e89b-12d3-a456-426614174000"], &["123"]);
        check("byte", &["aGVsbG8="], &["aGVsbG8"]);
        check("date", &["2021-01-01"], &["2021-13-01"]);
        check("datetime", &["2021-01-01T00:00:00Z"], &["2021-01-01"]);
        assert_eq!(find("nonsense"), None);
    }

    #[test]
    fn what_it_costs() {
        assert_eq!(cost("dns1123Label", 9), 8);
        assert_eq!(cost("uri", 20), 3 * 276);
    }
}
