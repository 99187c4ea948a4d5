//! The addresses of a Service and their families
//! (<https://kubernetes.io/docs/concepts/services-networking/dual-stack/#services>).

use std::net::IpAddr;

use serde_json::Value;

use super::{ip, items};
use crate::field::{Errors, Path, same};

const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];
const POLICIES: [&str; 3] = ["PreferDualStack", "RequireDualStack", "SingleStack"];

/// The cluster addresses of a Service; none for a headless or external one.
pub fn cluster_ips(service: &Value) -> impl Iterator<Item = IpAddr> {
    items(&service["spec"], "clusterIPs").filter_map(|ip| ip.as_str()?.parse().ok())
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { FAMILIES[0] } else { FAMILIES[1] }
}

fn texts<'a>(spec: &'a Value, key: &str) -> Vec<&'a str> {
    items(spec, key).map(|text| text.as_str().unwrap_or_default()).collect()
}

fn is_headless(spec: &Value) -> bool {
    texts(spec, "clusterIPs") == ["None"]
}

/// Validates the addresses and families of a Service, whatever the cluster has.
pub(super) fn validate(spec: &Value, old: Option<&Value>, path: Path<'_>, errors: &mut Errors) {
    if spec["type"] == "ExternalName" {
        for key in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            if !same(&spec[key], &Value::Null) {
                errors.forbidden(path.at(key), "may not be set for ExternalName services");
            }
        }
        return;
    }
    let (ips, families) = (texts(spec, "clusterIPs"), texts(spec, "ipFamilies"));
    let at = path.at("clusterIPs");
    let first = spec["clusterIP"].as_str().unwrap_or_default();
    match ips.first() {
        None if !first.is_empty() => errors.required(at, ""),
        Some(_) if first.is_empty() => {
            errors.invalid(at, ips.clone(), "must be empty when `clusterIP` is not specified")
        }
        Some(ip) if *ip != first => errors.invalid(at, ips.clone(), "first value must match `clusterIP`"),
        _ => {}
    }
    let list = path.at("ipFamilies");
    for (index, family) in families.iter().enumerate() {
        if !FAMILIES.contains(family) {
            errors.not_supported(list.index(index), *family, &FAMILIES);
        }
        if families[..index].contains(family) {
            errors.duplicate(list.index(index), *family);
        }
    }
    if let Some(policy) = spec["ipFamilyPolicy"].as_str() {
        if !POLICIES.contains(&policy) {
            errors.not_supported(path.at("ipFamilyPolicy"), policy, &POLICIES);
        }
        for (key, count) in [("clusterIPs", ips.len()), ("ipFamilies", families.len())] {
            if policy == "SingleStack" && count == 2 {
                let why = format!("must be RequireDualStack or PreferDualStack when multiple '{key}' are specified");
                errors.invalid(path.at("ipFamilyPolicy"), policy, why);
            }
        }
    }
    if well_formed(&ips, old, at, errors) {
        of_families(&ips, &families, at, errors);
    }
    if let Some(old) = old.filter(|old| old["type"] != "ExternalName") {
        change(spec, old, path, errors);
    }
}

/// Whether all addresses are some; says which are not.
fn well_formed(ips: &[&str], old: Option<&Value>, path: Path<'_>, errors: &mut Errors) -> bool {
    let before = errors.0.len();
    let known = old.map(|old| texts(old, "clusterIPs")).unwrap_or_default();
    for (index, text) in ips.iter().enumerate() {
        if index == 0 && *text == "None" {
            if ips.len() > 1 {
                errors.invalid(path, ips.to_vec(), "'None' must be the first and only value");
            }
        } else if !known.contains(text) {
            errors.expect(path.index(index), text, ip::address);
        }
    }
    let well = errors.0.len() == before;
    if ips.len() > 2 {
        errors.invalid(path, ips.to_vec(), "may only hold up to 2 values");
    }
    well
}

fn of_families(ips: &[&str], families: &[&str], path: Path<'_>, errors: &mut Errors) {
    let parsed: Vec<IpAddr> = ips.iter().filter_map(|text| ip::sloppy(text)).collect();
    if let [one, other, ..] = parsed[..]
        && one.is_ipv4() == other.is_ipv4()
    {
        errors.invalid(path, ips.to_vec(), "may specify no more than one IP for each IP family");
    }
    for (index, (ip, expected)) in parsed.iter().zip(families).enumerate() {
        if FAMILIES.contains(expected) && family(*ip) != *expected {
            let why = format!("expected an {expected} value as indicated by `ipFamilies[{index}]`");
            errors.invalid(path.index(index), ips[index], why);
        }
    }
}

/// Addresses and families stay, but the second may be added or given back.
fn change(spec: &Value, old: &Value, path: Path<'_>, errors: &mut Errors) {
    let headless = (is_headless(old), is_headless(spec));
    if headless == (true, true) {
        return;
    }
    let single = spec["ipFamilyPolicy"] == "SingleStack";
    let mut keep = |key: &str, word: &str| {
        let (was, is) = (texts(old, key), texts(spec, key));
        let at = path.at(key);
        for (index, (old, new)) in was.iter().zip(&is).enumerate() {
            if old != new {
                errors.invalid(at.index(index), is.clone(), "may not change once set");
            }
        }
        if was.len() > is.len() && is.len() == 1 && !single {
            let why = format!("must be set to 'SingleStack' when releasing the secondary {word}");
            errors.invalid(path.at("ipFamilyPolicy"), spec["ipFamilyPolicy"].clone(), why);
        }
        if key == "clusterIPs" && !was.is_empty() && is.is_empty() {
            errors.invalid(at.index(0), is, "primary clusterIP can not be unset");
        }
    };
    keep("clusterIPs", "clusterIP");
    // A Service that becomes headless, or ceases to be it, may be of other families.
    if headless == (false, false) {
        keep("ipFamilies", "ipFamily");
    }
}

/// Validates that a cluster of one family has what a new or changed Service asks for.
pub fn validate_families(service: &Value, old: Option<&Value>, ipv4: bool, errors: &mut Errors) {
    let spec = &service["spec"];
    let keys = ["clusterIPs", "ipFamilies", "ipFamilyPolicy", "type"];
    // What was stored before stays usable.
    let unchanged = old.is_some_and(|old| keys.iter().all(|key| same(&old["spec"][*key], &spec[*key])));
    let alone = is_headless(spec) && same(&spec["selector"], &Value::Null);
    if spec["type"] == "ExternalName" || unchanged || alone {
        return;
    }
    let has = FAMILIES[usize::from(!ipv4)];
    let path = Path::Root.at("spec");
    let (ips, families) = (texts(spec, "clusterIPs"), texts(spec, "ipFamilies"));
    for (index, ip) in ips.iter().enumerate().skip(families.len()) {
        if let Some(family) = ip::sloppy(ip).map(family).filter(|family| *family != has) {
            let why = format!("{family} is not configured on this cluster");
            errors.invalid(path.at("clusterIPs").index(index), ips.clone(), why);
        }
    }
    for (index, family) in families.iter().enumerate().filter(|(_, family)| **family != has) {
        errors.invalid(path.at("ipFamilies").index(index), *family, "not configured on this cluster");
    }
    if spec["ipFamilyPolicy"] == "RequireDualStack" {
        let why = "this cluster is not configured for dual-stack services";
        errors.invalid(path.at("ipFamilyPolicy"), "RequireDualStack", why);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn say(errors: &Errors) -> Vec<String> {
        errors.0.iter().map(ToString::to_string).collect()
    }

    fn check(spec: Value, old: Option<Value>, expect: &[&str]) {
        let mut errors = Errors::default();
        validate(&spec, old.as_ref(), Path::Root.at("spec"), &mut errors);
        assert_eq!(say(&errors), expect, "{spec} {old:?}");
    }

    fn of(ips: &[&str]) -> Value {
        json!({"type": "ClusterIP", "clusterIP": ips.first(), "clusterIPs": ips})
    }

    #[test]
    fn addresses() {
        check(of(&["10.0.0.1", "fd00::1"]), None, &[]);
        check(of(&["None"]), None, &[]);
        check(json!({}), None, &[]);
        check(json!({"clusterIP": "10.0.0.1"}), None, &["spec.clusterIPs: Required value"]);
        let why = r#"spec.clusterIPs: Invalid value: ["10.0.0.2"]: first value must match `clusterIP`"#;
        check(json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.2"]}), None, &[why]);
        let why = r#"spec.clusterIPs: Invalid value: ["None","10.0.0.1"]: 'None' must be the first and only value"#;
        check(of(&["None", "10.0.0.1"]), None, &[why]);
        let why =
            r#"spec.clusterIPs[1]: Invalid value: "x": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"#;
        check(of(&["10.0.0.1", "x"]), None, &[why]);
        let why = r#"spec.clusterIPs: Invalid value: ["10.0.0.1","10.0.0.2"]: may specify no more than one IP for each IP family"#;
        check(of(&["10.0.0.1", "10.0.0.2"]), None, &[why]);
        let external = json!({"type": "ExternalName", "clusterIPs": ["10.0.0.1"], "ipFamilyPolicy": "SingleStack"});
        check(
            external,
            None,
            &[
                "spec.clusterIPs: Forbidden: may not be set for ExternalName services",
                "spec.ipFamilyPolicy: Forbidden: may not be set for ExternalName services",
            ],
        );
    }

    #[test]
    fn families() {
        let with = |families: &[&str], policy: &str| {
            let mut spec = of(&["10.0.0.1"]);
            spec["ipFamilies"] = json!(families);
            spec["ipFamilyPolicy"] = policy.into();
            spec
        };
        check(with(&["IPv4", "IPv6"], "PreferDualStack"), None, &[]);
        check(
            with(&["IPv6"], "SingleStack"),
            None,
            &[
                r#"spec.clusterIPs[0]: Invalid value: "10.0.0.1": expected an IPv6 value as indicated by `ipFamilies[0]`"#,
            ],
        );
        check(
            with(&["IPv4", "IPv4"], "Both"),
            None,
            &[
                r#"spec.ipFamilies[1]: Duplicate value: "IPv4""#,
                r#"spec.ipFamilyPolicy: Unsupported value: "Both": supported values: "PreferDualStack", "RequireDualStack", "SingleStack""#,
            ],
        );
        check(
            with(&["IPv4", "IPv6"], "SingleStack"),
            None,
            &[
                r#"spec.ipFamilyPolicy: Invalid value: "SingleStack": must be RequireDualStack or PreferDualStack when multiple 'ipFamilies' are specified"#,
            ],
        );
        check(
            with(&["IPv5"], "SingleStack"),
            None,
            &[r#"spec.ipFamilies[0]: Unsupported value: "IPv5": supported values: "IPv4", "IPv6""#],
        );
    }

    #[test]
    fn what_may_change() {
        let (one, two) = (of(&["10.0.0.1"]), of(&["10.0.0.1", "fd00::1"]));
        check(one.clone(), Some(one.clone()), &[]);
        check(two.clone(), Some(one.clone()), &[]);
        let why = r#"spec.clusterIPs[0]: Invalid value: ["10.0.0.2"]: may not change once set"#;
        check(of(&["10.0.0.2"]), Some(one.clone()), &[why]);
        let why = "spec.ipFamilyPolicy: Invalid value: null: must be set to 'SingleStack' when releasing the secondary clusterIP";
        check(one.clone(), Some(two.clone()), &[why]);
        let mut single = one.clone();
        single["ipFamilyPolicy"] = "SingleStack".into();
        check(single, Some(two), &[]);
        let why = "spec.clusterIPs[0]: Invalid value: []: primary clusterIP can not be unset";
        check(json!({}), Some(one), &[why]);
        check(of(&["10.0.0.1"]), Some(json!({"type": "ExternalName"})), &[]);
        // What was taken when leading zeros were may stay.
        check(of(&["010.0.0.1"]), Some(of(&["010.0.0.1"])), &[]);
    }

    #[test]
    fn what_a_cluster_of_one_family_has() {
        let check = |spec: Value, old: Option<Value>, expect: &[&str]| {
            let mut errors = Errors::default();
            let old = old.map(|spec| json!({"spec": spec}));
            validate_families(&json!({"spec": spec}), old.as_ref(), true, &mut errors);
            assert_eq!(say(&errors), expect, "{spec} {old:?}");
        };
        let two = of(&["10.0.0.1", "fd00::1"]);
        check(of(&["10.0.0.1"]), None, &[]);
        check(json!({"ipFamilyPolicy": "PreferDualStack"}), None, &[]);
        let why =
            r#"spec.clusterIPs[1]: Invalid value: ["10.0.0.1","fd00::1"]: IPv6 is not configured on this cluster"#;
        check(two.clone(), None, &[why]);
        check(two.clone(), Some(of(&["10.0.0.1"])), &[why]);
        check(two.clone(), Some(two), &[]);
        check(
            json!({"ipFamilies": ["IPv6"]}),
            None,
            &[r#"spec.ipFamilies[0]: Invalid value: "IPv6": not configured on this cluster"#],
        );
        let why = r#"spec.ipFamilyPolicy: Invalid value: "RequireDualStack": this cluster is not configured for dual-stack services"#;
        check(json!({"ipFamilyPolicy": "RequireDualStack"}), None, &[why]);
        // Whose endpoints somebody else writes may be of both.
        let mut headless = of(&["None"]);
        headless["ipFamilies"] = json!(["IPv4", "IPv6"]);
        headless["ipFamilyPolicy"] = "RequireDualStack".into();
        check(headless, None, &[]);
    }
}
