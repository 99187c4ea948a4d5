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

/// A Service that is to have one family only gives up its second address and family, unless it says otherwise.
pub(super) fn release_second(new: &mut Value, old: &Value) {
    let was_dual =
        ["PreferDualStack", "RequireDualStack"].iter().any(|policy| old["spec"]["ipFamilyPolicy"] == *policy);
    if !was_dual || new["spec"]["ipFamilyPolicy"] != "SingleStack" {
        return;
    }
    for key in ["clusterIPs", "ipFamilies"] {
        if same(&old["spec"][key], &new["spec"][key])
            && let Some(list) = new["spec"][key].as_array_mut()
        {
            list.truncate(1);
        }
    }
}

/// Gives a new or changed Service the policy and the families that it lacks, of those that the cluster has (`has`, the
/// default first), or says why it cannot have what it asks for.
pub fn settle_families(service: &mut Value, old: Option<&Value>, has: &[&str], errors: &mut Errors) {
    let spec = &mut service["spec"];
    if spec["type"] == "ExternalName" {
        return;
    }
    let keys = ["clusterIPs", "ipFamilies", "ipFamilyPolicy", "type"];
    // What was stored before stays usable, and gains or loses nothing because the cluster has.
    let unchanged = old.is_some_and(|old| keys.iter().all(|key| same(&old["spec"][*key], &spec[*key])));
    if unchanged && !spec["ipFamilyPolicy"].is_null() {
        return;
    }
    // Somebody else writes its endpoints, which may be of any family.
    let alone = is_headless(spec) && same(&spec["selector"], &Value::Null);
    if spec["ipFamilyPolicy"].is_null() {
        let kept = old.map(|old| old["spec"]["ipFamilyPolicy"].clone()).filter(|policy| !policy.is_null());
        spec["ipFamilyPolicy"] = kept.unwrap_or_else(|| if alone { "RequireDualStack" } else { "SingleStack" }.into());
    }
    let single = spec["ipFamilyPolicy"] == "SingleStack";
    let path = Path::Root.at("spec");
    let ips: Vec<String> = texts(spec, "clusterIPs").into_iter().map(str::to_owned).collect();
    let mut families: Vec<String> = texts(spec, "ipFamilies").into_iter().map(str::to_owned).collect();
    for (what, count) in [("cluster IPs", ips.len()), ("IP families", families.len())] {
        if single && count == 2 {
            let why = format!("must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified");
            errors.invalid(path.at("ipFamilyPolicy"), "SingleStack", why);
        }
    }
    for (index, ip) in ips.iter().enumerate().skip(families.len()) {
        let Some(family) = ip::sloppy(ip).map(family) else { continue };
        if has.contains(&family) {
            families.push(family.to_owned());
        } else {
            let why = format!("{family} is not configured on this cluster");
            errors.invalid(path.at("clusterIPs").index(index), ips.clone(), why);
        }
    }
    if !alone && spec["ipFamilyPolicy"] == "RequireDualStack" && has.len() < 2 {
        let why = "this cluster is not configured for dual-stack services";
        errors.invalid(path.at("ipFamilyPolicy"), "RequireDualStack", why);
    }
    for (index, family) in families.iter().enumerate().filter(|(_, family)| !alone && !has.contains(&family.as_str())) {
        errors.invalid(path.at("ipFamilies").index(index), family.as_str(), "not configured on this cluster");
    }
    if !errors.is_empty() {
        return;
    }
    if families.is_empty() {
        families.extend(has.first().map(|family| (*family).to_owned()));
    }
    if !single && families.len() == 1 && (alone || has.len() == 2) {
        families.extend(FAMILIES.into_iter().find(|family| *family != families[0]).map(str::to_owned));
    }
    spec["ipFamilies"] = families.into();
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

    /// What a Service is given by a cluster with these families, or what is said against it.
    fn settled(has: &[&str], spec: Value, old: Option<Value>) -> Result<(String, Vec<String>), Vec<String>> {
        let mut errors = Errors::default();
        let (mut service, old) = (json!({"spec": spec}), old.map(|spec| json!({"spec": spec})));
        settle_families(&mut service, old.as_ref(), has, &mut errors);
        let spec = &service["spec"];
        let families = texts(spec, "ipFamilies").into_iter().map(str::to_owned).collect();
        let policy = spec["ipFamilyPolicy"].as_str().unwrap_or_default().to_owned();
        if errors.is_empty() { Ok((policy, families)) } else { Err(say(&errors)) }
    }

    const ONE: &[&str] = &["IPv4"];
    const BOTH: &[&str] = &["IPv6", "IPv4"];

    #[track_caller]
    fn gets(has: &[&str], spec: Value, old: Option<Value>, policy: &str, families: &[&str]) {
        let said = settled(has, spec.clone(), old).unwrap_or_else(|errors| panic!("{spec}: {errors:?}"));
        assert_eq!(
            (said.0.as_str(), said.1.iter().map(String::as_str).collect::<Vec<_>>().as_slice()),
            (policy, families)
        );
    }

    #[track_caller]
    fn refused(has: &[&str], spec: Value, old: Option<Value>, expect: &[&str]) {
        assert_eq!(settled(has, spec.clone(), old).unwrap_err(), expect, "{spec}");
    }

    fn with(mut spec: Value, families: &[&str], policy: &str) -> Value {
        if !families.is_empty() {
            spec["ipFamilies"] = json!(families);
        }
        if !policy.is_empty() {
            spec["ipFamilyPolicy"] = policy.into();
        }
        spec
    }

    #[test]
    fn what_a_cluster_of_one_family_has() {
        let two = of(&["10.0.0.1", "fd00::1"]);
        gets(ONE, of(&["10.0.0.1"]), None, "SingleStack", &["IPv4"]);
        gets(ONE, json!({}), None, "SingleStack", &["IPv4"]);
        gets(ONE, with(json!({}), &[], "PreferDualStack"), None, "PreferDualStack", &["IPv4"]);
        let why =
            r#"spec.clusterIPs[1]: Invalid value: ["10.0.0.1","fd00::1"]: IPv6 is not configured on this cluster"#;
        refused(ONE, with(two.clone(), &[], "PreferDualStack"), None, &[why]);
        refused(ONE, with(two.clone(), &[], "PreferDualStack"), Some(of(&["10.0.0.1"])), &[why]);
        let before = with(two, &["IPv4", "IPv6"], "RequireDualStack");
        gets(ONE, before.clone(), Some(before), "RequireDualStack", &["IPv4", "IPv6"]);
        let why = r#"spec.ipFamilies[0]: Invalid value: "IPv6": not configured on this cluster"#;
        refused(ONE, with(json!({}), &["IPv6"], ""), None, &[why]);
        let why = r#"spec.ipFamilyPolicy: Invalid value: "RequireDualStack": this cluster is not configured for dual-stack services"#;
        refused(ONE, with(json!({}), &[], "RequireDualStack"), None, &[why]);
        // Whose endpoints somebody else writes has both, whatever the cluster has.
        gets(ONE, of(&["None"]), None, "RequireDualStack", &["IPv4", "IPv6"]);
        gets(ONE, with(of(&["None"]), &["IPv6"], "SingleStack"), None, "SingleStack", &["IPv6"]);
    }

    #[test]
    fn what_a_cluster_of_both_families_has() {
        gets(BOTH, json!({}), None, "SingleStack", &["IPv6"]);
        gets(BOTH, of(&["10.0.0.1"]), None, "SingleStack", &["IPv4"]);
        gets(BOTH, with(json!({}), &["IPv4"], ""), None, "SingleStack", &["IPv4"]);
        gets(BOTH, with(json!({}), &[], "PreferDualStack"), None, "PreferDualStack", &["IPv6", "IPv4"]);
        gets(BOTH, with(json!({}), &["IPv4"], "RequireDualStack"), None, "RequireDualStack", &["IPv4", "IPv6"]);
        gets(
            BOTH,
            with(of(&["10.0.0.1", "fd00::1"]), &[], "PreferDualStack"),
            None,
            "PreferDualStack",
            &["IPv4", "IPv6"],
        );
        let headless = json!({"clusterIP": "None", "clusterIPs": ["None"], "selector": {"app": "web"}});
        gets(BOTH, headless.clone(), None, "SingleStack", &["IPv6"]);
        gets(BOTH, with(headless, &[], "PreferDualStack"), None, "PreferDualStack", &["IPv6", "IPv4"]);
        let why = "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be 'RequireDualStack' or 'PreferDualStack' when multiple";
        refused(BOTH, of(&["10.0.0.1", "fd00::1"]), None, &[&format!("{why} cluster IPs are specified")]);
        refused(BOTH, with(json!({}), &["IPv4", "IPv6"], ""), None, &[&format!("{why} IP families are specified")]);
        // What was stored when the cluster had one family gains none by itself, only when it is asked for.
        let prefers = with(of(&["10.0.0.1"]), &["IPv4"], "PreferDualStack");
        gets(BOTH, prefers.clone(), Some(prefers.clone()), "PreferDualStack", &["IPv4"]);
        gets(
            BOTH,
            with(prefers.clone(), &[], "RequireDualStack"),
            Some(prefers.clone()),
            "RequireDualStack",
            &["IPv4", "IPv6"],
        );
        // A client that leaves out what it does not know keeps it.
        gets(BOTH, of(&["10.0.0.1"]), Some(prefers), "PreferDualStack", &["IPv4", "IPv6"]);
    }

    #[test]
    fn the_second_is_given_back() {
        let old = json!({"spec": with(of(&["10.0.0.1", "fd00::1"]), &["IPv4", "IPv6"], "RequireDualStack")});
        let mut new = old.clone();
        new["spec"]["ipFamilyPolicy"] = "SingleStack".into();
        release_second(&mut new, &old);
        assert_eq!(new["spec"]["clusterIPs"], json!(["10.0.0.1"]));
        assert_eq!(new["spec"]["ipFamilies"], json!(["IPv4"]));
        let mut same = old.clone();
        release_second(&mut same, &old);
        assert_eq!(same, old);
    }
}
