//! ResourceSlice: devices that a driver offers. What a device may say is in `device.rs`.

use k8s_openapi::api::resource::v1::ResourceSlice;
use serde_json::Value;

use super::{
    super::{csi, items, pod_spec},
    device::{self, counters},
    parts::{each, fully_qualified, listed, pool, skipped_operations, text, unique},
};
use crate::{
    field::{Errors, Path},
    names,
    row::{Row, Validation, row as base},
};

const MAX_DEVICES: usize = 128;
/// The same if any has taints, takes from counters or has lists as attributes.
const MAX_ADVANCED: usize = 64;
const MAX_COUNTER_SETS: usize = 8;
const NOT_TRUE: &str = "must be either unset or set to true";

pub(super) fn row() -> Row {
    Row {
        selectable: &["spec.nodeName", "spec.driver", "spec.pool.name"],
        validate,
        generation: true,
        ..base::<ResourceSlice>()
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let (spec, path) = (&v.new["spec"], Path::Root.at("spec"));
    let old = v.old.map(|old| &old["spec"]);
    let driver = text(spec, "driver");
    csi::driver_name(driver, path.at("driver"), errors);
    let (of, at) = (&spec["pool"], path.at("pool"));
    pool(text(of, "name"), at.at("name"), errors);
    if let Some(count) = of["resourceSliceCount"].as_i64().or(Some(0)).filter(|count| *count <= 0) {
        errors.invalid(at.at("resourceSliceCount"), count, "must be greater than zero");
    }
    if let Some(generation) = of["generation"].as_i64().filter(|generation| *generation < 0) {
        errors.invalid(at.at("generation"), generation, "must be greater than or equal to zero");
    }
    if let Some(old) = old {
        errors.immutable(at.at("name"), &old["pool"]["name"], &of["name"]);
        for key in ["driver", "nodeName"] {
            errors.immutable(path.at(key), &old[key], &spec[key]);
        }
    }
    nodes(spec, path, errors);
    if spec["sharedCounters"].is_array() && spec["devices"].is_array() {
        errors.invalid(path, "", "only one of `sharedCounters` or `devices` is allowed");
    }
    devices(spec, old, path, errors);
    each(spec, "sharedCounters", MAX_COUNTER_SETS, path, errors, |set, path, errors| {
        errors.expect_some(path.at("name"), &set["name"], names::dns_label);
        counters(set, path, errors);
    });
    unique(spec, "sharedCounters", MAX_COUNTER_SETS, path, errors, |set| (text(set, "name"), set.clone()));
    if let Some(name) = spec["partitionTypeAttribute"].as_str() {
        partitions(spec, name, driver, path, errors);
    }
    skipped_operations(spec, path, errors);
}

/// Validates from where the devices can be reached: one node, some, all, or as each of them says.
fn nodes(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut set = Vec::new();
    match spec["nodeName"].as_str() {
        Some("") => {
            errors.invalid(path.at("nodeName"), "", "must be either unset or set to a non-empty string");
        }
        Some(name) => {
            set.push("nodeName");
            errors.expect(path.at("nodeName"), name, names::dns_subdomain);
        }
        None => {}
    }
    let (selector, at) = (&spec["nodeSelector"], path.at("nodeSelector"));
    if selector.is_object() {
        set.push("nodeSelector");
        pod_spec::node_selector(selector, at, errors);
        if items(selector, "nodeSelectorTerms").count() != 1 {
            let terms = selector["nodeSelectorTerms"].clone();
            errors.invalid(at.at("nodeSelectorTerms"), terms, "must have exactly one node selector term");
        }
    }
    for key in ["allNodes", "perDeviceNodeSelection"] {
        match spec[key].as_bool() {
            Some(true) => set.push(key),
            Some(false) => errors.invalid(path.at(key), false, NOT_TRUE),
            None => {}
        }
    }
    let one = "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required";
    match set.len() {
        0 => errors.required(path, one),
        1 => {}
        _ => errors.invalid(path, listed(&set), format!("{one}, but multiple fields are set")),
    }
}

fn devices(spec: &Value, old: Option<&Value>, path: Path<'_>, errors: &mut Errors) {
    const LISTS: [&str; 4] = ["bools", "ints", "strings", "versions"];
    let advanced = |device: &Value| {
        let mut attributes = device["attributes"].as_object().into_iter().flatten();
        let has = |key: &str| items(device, key).next().is_some();
        has("taints")
            || has("consumesCounters")
            || attributes.any(|(_, attribute)| LISTS.iter().any(|key| attribute[*key].is_array()))
    };
    let most = if items(spec, "devices").any(advanced) { MAX_ADVANCED } else { MAX_DEVICES };
    each(spec, "devices", most, path, errors, |one, path, errors| {
        let old = old.and_then(|old| items(old, "devices").find(|old| old["name"] == one["name"]));
        device::validate(one, old, spec["perDeviceNodeSelection"] == true, path, errors);
    });
    unique(spec, "devices", most, path, errors, |device| (text(device, "name"), device["name"].clone()));
}

/// Validates that what takes from counters says into what kind of part the hardware is divided.
fn partitions(spec: &Value, name: &str, driver: &str, path: Path<'_>, errors: &mut Errors) {
    let at = path.at("partitionTypeAttribute");
    let takes = |device: &Value| items(device, "consumesCounters").next().is_some();
    if !items(spec, "devices").any(takes) {
        let why = "may only be set on a slice which declares devices that consume counters";
        errors.invalid(at, name, why);
    }
    let before = errors.0.len();
    fully_qualified(name, at, errors);
    if errors.0.len() > before {
        return;
    }
    // In the driver's own domain an attribute may go without it.
    let bare = name.strip_prefix(driver).and_then(|rest| rest.strip_prefix('/'));
    let list = path.at("devices");
    for (index, device) in items(spec, "devices").enumerate().filter(|(_, device)| takes(device)) {
        let of = &device["attributes"];
        let at = list.index(index);
        let at = at.at("attributes");
        match of.get(name).or_else(|| of.get(bare?)) {
            None => {
                let why =
                    "device consumes counters and `partitionTypeAttribute` names this attribute, so it must be set";
                errors.required(at.key(name), why);
            }
            Some(attribute) if !attribute["string"].is_string() => {
                let why = "must be a string value because `partitionTypeAttribute` names this attribute";
                errors.invalid(at.key(name), attribute.clone(), why);
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::super::testing::{check, check_update, with},
        *,
    };

    fn slice() -> Value {
        json!({"spec": {"driver": "gpu.example.com", "nodeName": "n",
            "pool": {"name": "n/gpus", "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": "gpu-0", "attributes": {"model": {"string": "x"}}}]}})
    }

    #[test]
    fn slices() {
        check(&row(), slice(), &[]);
        let one = "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required";
        let term = json!({"matchExpressions": [{"key": "a", "operator": "Exists"}]});
        let many: Vec<Value> =
            (0..65).map(|n| json!({"name": format!("d{n}"), "attributes": {"a": {"ints": [n]}}})).collect();
        for (pointer, value, expect) in [
            (
                "driver",
                json!(""),
                vec![
                    "spec.driver: Required value".to_owned(),
                    format!("spec.driver: Invalid value: \"\": {}", names::dns_subdomain("").unwrap_err()),
                ],
            ),
            ("pool/name", json!(""), vec!["spec.pool.name: Required value".into()]),
            (
                "pool/resourceSliceCount",
                json!(0),
                vec!["spec.pool.resourceSliceCount: Invalid value: 0: must be greater than zero".into()],
            ),
            (
                "pool/generation",
                json!(-1),
                vec!["spec.pool.generation: Invalid value: -1: must be greater than or equal to zero".into()],
            ),
            ("nodeName", Value::Null, vec![format!("spec: Required value: {one}")]),
            (
                "allNodes",
                json!(true),
                vec![format!(
                    "spec: Invalid value: \"{{`nodeName`, `allNodes`}}\": {one}, but multiple fields are set"
                )],
            ),
            (
                "allNodes",
                json!(false),
                vec!["spec.allNodes: Invalid value: false: must be either unset or set to true".into()],
            ),
            (
                "sharedCounters",
                json!([{"name": "a", "counters": {"b": {"value": "1"}}}]),
                vec!["spec: Invalid value: \"\": only one of `sharedCounters` or `devices` is allowed".into()],
            ),
            ("devices", json!(many), vec!["spec.devices: Too many: 65: must have at most 64 items".into()]),
            ("devices", json!([{"name": "a"}, {"name": "a"}]), vec!["spec.devices[1]: Duplicate value: \"a\"".into()]),
        ] {
            let expect: Vec<&str> = expect.iter().map(String::as_str).collect();
            check(&row(), with(&slice(), &format!("/spec/{pointer}"), value), &expect);
        }
        let selected = with(
            &with(&slice(), "/spec/nodeName", Value::Null),
            "/spec/nodeSelector",
            json!({"nodeSelectorTerms": [term, term]}),
        );
        let expect = format!(
            "spec.nodeSelector.nodeSelectorTerms: Invalid value: {}: must have exactly one node selector term",
            json!([term, term])
        );
        check(&row(), selected, &[&expect]);
    }

    #[test]
    fn what_may_change() {
        let more = with(&slice(), "/spec/pool/generation", json!(2));
        check_update(&row(), slice(), more, &[]);
        for (pointer, expect) in [
            ("driver", "spec.driver: Invalid value: \"other\": field is immutable"),
            ("nodeName", "spec.nodeName: Invalid value: \"other\": field is immutable"),
            ("pool/name", "spec.pool.name: Invalid value: \"other\": field is immutable"),
        ] {
            check_update(&row(), slice(), with(&slice(), &format!("/spec/{pointer}"), "other".into()), &[expect]);
        }
    }

    #[test]
    fn shared_counters() {
        let of = |sets: Value| with(&with(&slice(), "/spec/devices", Value::Null), "/spec/sharedCounters", sets);
        check(&row(), of(json!([{"name": "a", "counters": {"memory": {"value": "80Gi"}}}])), &[]);
        check(
            &row(),
            of(json!([{"name": "", "counters": {}}])),
            &["spec.sharedCounters[0].name: Required value", "spec.sharedCounters[0].counters: Required value"],
        );
        let label = names::dns_label("A").unwrap_err();
        check(
            &row(),
            of(json!([{"name": "a", "counters": {"A": {"value": "1"}}}])),
            &[&format!("spec.sharedCounters[0].counters: Invalid value: \"A\": {label}")],
        );
    }

    #[test]
    fn kinds_of_parts() {
        let part = |attributes: Value| {
            let device = json!({"name": "a", "attributes": attributes,
                "consumesCounters": [{"counterSet": "s", "counters": {"memory": {"value": "1"}}}]});
            let slice = with(&slice(), "/spec/devices", json!([device, {"name": "b"}]));
            with(&slice, "/spec/partitionTypeAttribute", "gpu.example.com/profile".into())
        };
        check(&row(), part(json!({"profile": {"string": "Half"}})), &[]);
        check(&row(), part(json!({"gpu.example.com/profile": {"string": "Half"}})), &[]);
        let at = "spec.devices[0].attributes[gpu.example.com/profile]";
        check(
            &row(),
            part(json!({})),
            &[&format!(
                "{at}: Required value: device consumes counters and `partitionTypeAttribute` names this attribute, so it must be set"
            )],
        );
        check(
            &row(),
            part(json!({"profile": {"int": 2}})),
            &[&format!(
                "{at}: Invalid value: {{\"int\":2}}: must be a string value because `partitionTypeAttribute` names this attribute"
            )],
        );
    }
}
