//! One device of a ResourceSlice: what it is, what it has and takes, and where it can be used.

use std::borrow::Cow;

use serde_json::Value;

use super::{
    super::{items, meta, pod_spec},
    capacity,
    parts::{binding_conditions, each, listed, qualified, text, unique},
    taint::taint,
};
use crate::{
    field::{Errors, Path, same},
    names,
    semver::Version,
};

/// Attributes and capacities together.
const MAX_PROPERTIES: usize = 32;
/// Values of attributes; each item of a list is one.
const MAX_VALUES: usize = 48;
const MAX_TEXT: usize = 64;
const MAX_TAINTS: usize = 16;
const MAX_COUNTERS: usize = 32;
/// From how many sets of counters a device may take.
const MAX_SETS: usize = 2;
/// The longest name of a property, and of a counter, that is shown whole.
const SHOWN_PROPERTY: usize = 96;
const SHOWN_COUNTER: usize = 63;

/// The ways in which an attribute can be given.
const VALUES: [&str; 8] = ["int", "bool", "string", "version", "ints", "bools", "strings", "versions"];

/// A key of a map as it is shown: the middle of a long one is left out.
fn shown(key: &str, most: usize) -> Cow<'_, str> {
    if key.len() <= most {
        return key.into();
    }
    let left = most - 3;
    let (mut head, mut tail) = (left.div_ceil(2), key.len() - left / 2);
    while !key.is_char_boundary(head) {
        head -= 1;
    }
    while !key.is_char_boundary(tail) {
        tail += 1;
    }
    format!("{}...{}", &key[..head], &key[tail..]).into()
}

/// Validates names and values of a map.
fn entries(
    object: &Value,
    key: &str,
    longest: usize,
    path: Path<'_>,
    errors: &mut Errors,
    name: impl Fn(&str, Path<'_>, &mut Errors),
    value: impl Fn(&Value, Path<'_>, &mut Errors),
) {
    let path = path.at(key);
    for (key, of) in object[key].as_object().into_iter().flatten() {
        name(key, path, errors);
        value(of, path.key(&shown(key, longest)), errors);
    }
}

/// Validates `counters`: a map of amounts.
pub(super) fn counters(object: &Value, path: Path<'_>, errors: &mut Errors) {
    const KEY: &str = "counters";
    match object[KEY].as_object().map_or(0, serde_json::Map::len) {
        0 => errors.required(path.at(KEY), ""),
        count if count > MAX_COUNTERS => errors.too_many(path.at(KEY), count as u64, MAX_COUNTERS as u64),
        _ => {
            let name = |name: &str, path: Path<'_>, errors: &mut Errors| errors.expect(path, name, names::dns_label);
            entries(object, KEY, SHOWN_COUNTER, path, errors, name, |_, _, _| {});
        }
    }
}

/// Validates a device. `by_device` says that each device of the slice says itself on which nodes it is.
pub(super) fn validate(device: &Value, old: Option<&Value>, by_device: bool, path: Path<'_>, errors: &mut Errors) {
    let changed = |key: &str| old.is_none_or(|old| !same(&old[key], &device[key]));
    errors.expect(path.at("name"), text(device, "name"), names::dns_label);
    let size = |key: &str| device[key].as_object().map_or(0, serde_json::Map::len);
    let properties = size("attributes") + size("capacity");
    if properties > MAX_PROPERTIES {
        let why = format!("the total number of attributes and capacities must not exceed {MAX_PROPERTIES}");
        errors.invalid(path, properties, why);
    }
    let values = |attribute: &Value| VALUES[4..].iter().map(|key| items(attribute, key).count()).sum::<usize>().max(1);
    let values: usize = device["attributes"].as_object().into_iter().flatten().map(|(_, of)| values(of)).sum();
    if values > MAX_VALUES {
        errors.invalid(path, values, format!("the total number of attribute values must not exceed {MAX_VALUES}"));
    }
    entries(device, "attributes", SHOWN_PROPERTY, path, errors, qualified, attribute);
    if changed("capacity") {
        let shared = device["allowMultipleAllocations"] == true;
        entries(device, "capacity", SHOWN_PROPERTY, path, errors, qualified, |of, path, errors| {
            capacity::validate(of, shared, path, errors);
        });
    }
    if changed("taints") {
        each(device, "taints", MAX_TAINTS, path, errors, |one, path, errors| taint(one, None, path, errors));
    }
    each(device, "consumesCounters", MAX_SETS, path, errors, |taken, path, errors| {
        errors.expect_some(path.at("counterSet"), &taken["counterSet"], names::dns_label);
        counters(taken, path, errors);
    });
    unique(device, "consumesCounters", MAX_SETS, path, errors, |taken| (text(taken, "counterSet"), taken.clone()));
    nodes(device, by_device, path, errors);
    binding_conditions(device, path, errors);
    allocatable(device, path, errors);
}

fn attribute(attribute: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(value) = attribute["string"].as_str() {
        string(value, path.at("string"), errors);
    }
    if let Some(value) = attribute["version"].as_str() {
        version(value, path.at("version"), errors);
    }
    for key in &VALUES[4..] {
        if attribute[*key].as_array().is_some_and(Vec::is_empty) {
            errors.invalid(path.at(key), attribute[*key].clone(), "must not be empty if specified");
        }
    }
    for (key, check) in [("strings", string as fn(&str, Path<'_>, &mut Errors)), ("versions", version)] {
        each(attribute, key, usize::MAX, path, errors, |value, path, errors| {
            check(value.as_str().unwrap_or_default(), path, errors);
        });
    }
    one_of(attribute, &VALUES, path, errors);
}

/// Validates that one of these fields is set.
fn one_of(object: &Value, keys: &[&str], path: Path<'_>, errors: &mut Errors) {
    let set: Vec<&str> = keys.iter().copied().filter(|key| !object[*key].is_null()).collect();
    let all: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
    match set.len() {
        0 => errors.invalid(path, "", format!("must specify one of: {}", all.join(", "))),
        1 => {}
        _ => {
            let why = format!("must specify exactly one of: {}", all.join(", "));
            errors.invalid(path, format!("{{{}}}", set.join(", ")), why);
        }
    }
}

fn string(value: &str, path: Path<'_>, errors: &mut Errors) {
    if value.len() > MAX_TEXT {
        errors.too_long(path, MAX_TEXT);
    }
}

fn version(value: &str, path: Path<'_>, errors: &mut Errors) {
    if value.parse::<Version>().is_err() {
        errors.invalid(path, value, "must be a string compatible with semver.org spec 2.0.0");
    }
    string(value, path, errors);
}

fn nodes(device: &Value, by_device: bool, path: Path<'_>, errors: &mut Errors) {
    const KEYS: [&str; 3] = ["nodeName", "nodeSelector", "allNodes"];
    if !by_device {
        if KEYS.iter().any(|key| !device[*key].is_null()) {
            let why = "`nodeName`, `nodeSelector` and `allNodes` can only be set if `perDeviceNodeSelection` is set to true in the ResourceSlice spec";
            errors.invalid(path, Value::Null, why);
        }
        return;
    }
    let mut set = Vec::new();
    match device["nodeName"].as_str() {
        Some("") => errors.invalid(path.at("nodeName"), "", "must not be empty"),
        Some(name) => {
            set.push(KEYS[0]);
            errors.expect(path.at("nodeName"), name, names::dns_subdomain);
        }
        None => {}
    }
    if device["nodeSelector"].is_object() {
        set.push(KEYS[1]);
        pod_spec::node_selector(&device["nodeSelector"], path.at("nodeSelector"), errors);
    }
    match device["allNodes"].as_bool() {
        Some(true) => set.push(KEYS[2]),
        Some(false) => errors.invalid(path.at("allNodes"), false, "must be either unset or set to true"),
        None => {}
    }
    let why = "exactly one of `nodeName`, `nodeSelector`, or `allNodes` is required when `perDeviceNodeSelection` is set to true in the ResourceSlice spec";
    match set.len() {
        0 => errors.required(path, why),
        1 => {}
        _ => errors.invalid(path, listed(&set), why),
    }
}

/// Validates what of the node's own resources a device stands for or needs besides (KEP-5517).
fn allocatable(device: &Value, path: Path<'_>, errors: &mut Errors) {
    let path = path.at("nodeAllocatableResources");
    for (name, of) in device["nodeAllocatableResources"].as_object().into_iter().flatten() {
        let at = path.key(name);
        let known = ["cpu", "memory", "ephemeral-storage"].contains(&name.as_str()) || name.starts_with("hugepages-");
        if !known {
            errors.invalid(at, name.as_str(), "must be a node allocatable resource name");
        }
        let (mapping, overhead) = (&of["mapping"], &of["overhead"]);
        if !mapping.is_object() && !overhead.is_object() {
            errors.required(at, "at least one of mapping or overhead must be set");
        }
        if mapping.is_object() {
            mapped(mapping, &device["capacity"], at.at("mapping"), errors);
        }
        if overhead.is_object() {
            let at = at.at("overhead");
            if overhead["perPod"].is_null() && overhead["perContainer"].is_null() {
                errors.invalid(at, "", "at least one of perPod or perContainer must be set");
            }
            for key in ["perPod", "perContainer"] {
                if meta::quantity(&overhead[key]).is_some_and(|amount| amount.is_negative()) {
                    errors.invalid(at.at(key), overhead[key].clone(), "must be non-negative");
                }
            }
        }
    }
}

fn mapped(mapping: &Value, capacities: &Value, path: Path<'_>, errors: &mut Errors) {
    const CAPACITY: &str = "capacityMultiplier";
    if let Some(key) = mapping["capacityKey"].as_str() {
        let at = path.at("capacityKey");
        match key {
            "" => errors.invalid(at, "", "capacityKey must not be an empty string"),
            key if capacities.get(key).is_none() => errors.not_found(at, key),
            _ => {}
        }
        if mapping[CAPACITY].is_null() {
            errors.required(path.at(CAPACITY), "capacityMultiplier is required when capacityKey is set");
        }
    } else if !mapping[CAPACITY].is_null() {
        errors.required(path.at("capacityKey"), "capacityKey is required when capacityMultiplier is set");
    }
    let checked = mapping["capacityKey"].is_string().then_some(CAPACITY).into_iter().chain(["deviceMultiplier"]);
    for key in checked {
        if meta::quantity(&mapping[key]).is_some_and(|amount| amount.value() <= 0) {
            errors.invalid(path.at(key), mapping[key].clone(), "must be positive");
        }
    }
    one_of(mapping, &["capacityKey", "deviceMultiplier"], path, errors);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check_in(by_device: bool, device: Value, old: Option<&Value>, expect: &[&str]) {
        let mut errors = Errors::default();
        validate(&device, old, by_device, Path::Root.at("d"), &mut errors);
        assert_eq!(errors.0.iter().map(ToString::to_string).collect::<Vec<_>>(), expect, "{device:#}");
    }

    fn check(device: Value, expect: &[&str]) {
        let mut device = device;
        device["name"] = "gpu-0".into();
        check_in(false, device, None, expect);
    }

    #[test]
    fn attributes() {
        let all = "`int`, `bool`, `string`, `version`, `ints`, `bools`, `strings`, `versions`";
        let identifier = names::c_identifier("a-b").unwrap_err();
        for (attributes, expect) in [
            (json!({"a": {"int": 1}, "b.example.com/c": {"version": "1.2.3-rc.1+x"}, "d": {"bools": [true]}}), vec![]),
            (json!({"a": {}}), vec![format!("d.attributes[a]: Invalid value: \"\": must specify one of: {all}")]),
            (
                json!({"a": {"int": 1, "string": "x"}}),
                vec![format!("d.attributes[a]: Invalid value: \"{{int, string}}\": must specify exactly one of: {all}")],
            ),
            (
                json!({"a": {"version": "1.02.3"}}),
                vec!["d.attributes[a].version: Invalid value: \"1.02.3\": must be a string compatible with semver.org spec 2.0.0".into()],
            ),
            (json!({"a": {"strings": ["x", "y".repeat(65)]}}), vec!["d.attributes[a].strings[1]: Too long: may not be more than 64 bytes".into()]),
            (json!({"a": {"ints": []}}), vec!["d.attributes[a].ints: Invalid value: []: must not be empty if specified".into()]),
            (json!({"a-b": {"int": 1}}), vec![format!("d.attributes: Invalid value: \"a-b\": {identifier}")]),
            (json!({"a/b/c": {"int": 1}}), vec!["d.attributes: Invalid value: \"a/b/c\": must not contain more than one slash".into()]),
            (json!({"/b": {"int": 1}}), vec!["d.attributes: Invalid value: \"\": the domain must not be empty".into()]),
            (
                json!({"a": {"ints": (0..49).collect::<Vec<i32>>()}}),
                vec!["d: Invalid value: 49: the total number of attribute values must not exceed 48".into()],
            ),
        ] {
            let expect: Vec<&str> = expect.iter().map(String::as_str).collect();
            check(json!({"attributes": attributes}), &expect);
        }
        let many: serde_json::Map<String, Value> = (0..32).map(|n| (format!("a{n}"), json!({"int": n}))).collect();
        check(json!({"attributes": many}), &[]);
        check(
            json!({"attributes": many, "capacity": {"c": {"value": "1"}}}),
            &["d: Invalid value: 33: the total number of attributes and capacities must not exceed 32"],
        );
    }

    #[test]
    fn long_keys_are_shortened() {
        let key = format!("{}é{}", "a".repeat(46), "b".repeat(60));
        let expect = format!("{}...{}", "a".repeat(46), "b".repeat(46));
        assert_eq!(shown(&key, SHOWN_PROPERTY), expect);
        assert_eq!(shown("short", SHOWN_COUNTER), "short");
    }

    #[test]
    fn what_was_stored_may_stay() {
        let device = json!({"name": "a", "taints": [{"key": "a", "effect": "Later"}],
            "capacity": {"c": {"value": "1", "requestPolicy": {}}}});
        let errors = [
            "d.capacity[c].requestPolicy: Forbidden: allowMultipleAllocations must be true",
            "d.taints[0].effect: Unsupported value: \"Later\": supported values: \"NoExecute\", \"NoSchedule\", \"None\"",
        ];
        check_in(false, device.clone(), None, &errors);
        check_in(false, device.clone(), Some(&device), &[]);
    }

    #[test]
    fn where_a_device_is() {
        let one = "exactly one of `nodeName`, `nodeSelector`, or `allNodes` is required when `perDeviceNodeSelection` is set to true in the ResourceSlice spec";
        check_in(true, json!({"name": "a", "allNodes": true}), None, &[]);
        check_in(true, json!({"name": "a"}), None, &[&format!("d: Required value: {one}")]);
        let both = format!("d: Invalid value: \"{{`nodeName`, `allNodes`}}\": {one}");
        check_in(true, json!({"name": "a", "nodeName": "n", "allNodes": true}), None, &[&both]);
        check(
            json!({"nodeName": "n"}),
            &[
                "d: Invalid value: null: `nodeName`, `nodeSelector` and `allNodes` can only be set if `perDeviceNodeSelection` is set to true in the ResourceSlice spec",
            ],
        );
    }

    #[test]
    fn counters_and_conditions() {
        let taken = |set: &str| json!({"counterSet": set, "counters": {"memory": {"value": "1Gi"}}});
        check(json!({"consumesCounters": [taken("a"), taken("b")]}), &[]);
        let twice = format!("d.consumesCounters[1]: Duplicate value: {}", taken("a"));
        check(json!({"consumesCounters": [taken("a"), taken("a")]}), &[&twice]);
        check(
            json!({"consumesCounters": [taken("a"), taken("b"), taken("c")]}),
            &["d.consumesCounters: Too many: 3: must have at most 2 items"],
        );
        check(
            json!({"bindingConditions": ["a", "a"], "bindingFailureConditions": ["a"]}),
            &[
                "d.bindingConditions[1]: Duplicate value: \"a\"",
                "d.bindingFailureConditions[0]: Invalid value: \"a\": bindingFailureConditions must not overlap with bindingConditions",
            ],
        );
        check(
            json!({"bindingFailureConditions": ["a"]}),
            &[
                "d.bindingConditions: Invalid value: null: bindingConditions are required to use bindingFailureConditions",
            ],
        );
    }

    #[test]
    fn resources_of_the_node() {
        let of =
            |resources: Value| json!({"capacity": {"cores": {"value": "8"}}, "nodeAllocatableResources": resources});
        check(
            of(
                json!({"cpu": {"mapping": {"capacityKey": "cores", "capacityMultiplier": "2"}}, "memory": {"overhead": {"perPod": "1Gi"}}}),
            ),
            &[],
        );
        for (resources, expect) in [
            (
                json!({"cpu": {}}),
                "d.nodeAllocatableResources[cpu]: Required value: at least one of mapping or overhead must be set",
            ),
            (
                json!({"example.com/a": {"overhead": {"perPod": "1"}}}),
                "d.nodeAllocatableResources[example.com/a]: Invalid value: \"example.com/a\": must be a node allocatable resource name",
            ),
            (
                json!({"cpu": {"mapping": {"capacityKey": "x", "capacityMultiplier": "1"}}}),
                "d.nodeAllocatableResources[cpu].mapping.capacityKey: Not found: \"x\"",
            ),
            (
                json!({"cpu": {"mapping": {"capacityKey": "cores"}}}),
                "d.nodeAllocatableResources[cpu].mapping.capacityMultiplier: Required value: capacityMultiplier is required when capacityKey is set",
            ),
            (
                json!({"cpu": {"mapping": {"deviceMultiplier": "0"}}}),
                "d.nodeAllocatableResources[cpu].mapping.deviceMultiplier: Invalid value: \"0\": must be positive",
            ),
            (
                json!({"cpu": {"mapping": {}}}),
                "d.nodeAllocatableResources[cpu].mapping: Invalid value: \"\": must specify one of: `capacityKey`, `deviceMultiplier`",
            ),
            (
                json!({"cpu": {"overhead": {"perContainer": "-1"}}}),
                "d.nodeAllocatableResources[cpu].overhead.perContainer: Invalid value: \"-1\": must be non-negative",
            ),
        ] {
            check(of(resources), &[expect]);
        }
    }
}
