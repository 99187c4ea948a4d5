//! The policies of a Job: which failures count, and what is enough to succeed
//! (<https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy>, `#success-policy`).

use std::collections::HashSet;

use serde_json::Value;

use super::{default, items, items_mut};
use crate::{
    field::{Errors, Path},
    names,
};

const MAX_RULES: u64 = 20;
const MAX_EXIT_CODES: u64 = 255;
const MAX_CONDITIONS: u64 = 20;
const MAX_INDEXES_TEXT: usize = 64 * 1024;

/// Fills in what was left out.
pub(super) fn defaults(spec: &mut Value) {
    let Some(policy) = spec.get_mut("podFailurePolicy") else { return };
    for rule in items_mut(policy, "rules") {
        for condition in items_mut(rule, "onPodConditions") {
            default(condition, "status", "True");
        }
    }
}

/// Validates the policies in the spec of a Job.
pub(super) fn validate(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let failure = &spec["podFailurePolicy"];
    if failure.is_object() {
        let at = path.at("podFailurePolicy");
        let at = at.at("rules");
        too_many(failure, "rules", MAX_RULES, at, errors);
        for (index, rule) in items(failure, "rules").enumerate() {
            failure_rule(spec, rule, at.index(index), errors);
        }
    }
    let success = &spec["successPolicy"];
    if success.is_object() {
        let at = path.at("successPolicy");
        if spec["completionMode"] == "Indexed" {
            success_policy(spec, success, at.at("rules"), errors);
        } else {
            errors.invalid(at, success.clone(), "requires indexed completion mode");
        }
    }
    if let Some(policy) = spec["podReplacementPolicy"].as_str() {
        let known: &[&str] = if failure.is_object() { &["Failed"] } else { &["Failed", "TerminatingOrFailed"] };
        if !known.contains(&policy) {
            errors.not_supported(path.at("podReplacementPolicy"), policy, known);
        }
    }
}

fn too_many(object: &Value, key: &str, max: u64, path: Path<'_>, errors: &mut Errors) {
    let count = items(object, key).count() as u64;
    if count > max {
        errors.too_many(path, count, max);
    }
}

/// Validates a word that must be set, and says which there are.
fn word(object: &Value, key: &str, known: &[&str], path: Path<'_>, errors: &mut Errors) {
    match object[key].as_str().unwrap_or_default() {
        "" => {
            let list: Vec<String> = known.iter().map(|word| format!("{word:?}")).collect();
            errors.required(path.at(key), &format!("valid values: [{}]", list.join(" ")));
        }
        given if !known.contains(&given) => errors.not_supported(path.at(key), given, known),
        _ => {}
    }
}

fn failure_rule(spec: &Value, rule: &Value, path: Path<'_>, errors: &mut Errors) {
    word(rule, "action", &["Count", "FailIndex", "FailJob", "Ignore"], path, errors);
    if rule["action"] == "FailIndex" && spec["backoffLimitPerIndex"].is_null() {
        errors.invalid(path.at("action"), "FailIndex", "requires the backoffLimitPerIndex to be set");
    }
    let codes = &rule["onExitCodes"];
    if codes.is_object() {
        exit_codes(spec, codes, path.at("onExitCodes"), errors);
    }
    let at = path.at("onPodConditions");
    too_many(rule, "onPodConditions", MAX_CONDITIONS, at, errors);
    for (index, pattern) in items(rule, "onPodConditions").enumerate() {
        let at = at.index(index);
        errors.expect(at.at("type"), pattern["type"].as_str().unwrap_or_default(), names::qualified_name);
        word(pattern, "status", &["False", "True", "Unknown"], at, errors);
    }
    match (codes.is_object(), items(rule, "onPodConditions").next().is_some()) {
        (true, true) => {
            errors.invalid_unshown(path, "specifying both OnExitCodes and OnPodConditions is not supported");
        }
        (false, false) => {
            errors.invalid_unshown(path, "specifying one of OnExitCodes and OnPodConditions is required");
        }
        _ => {}
    }
}

fn exit_codes(spec: &Value, codes: &Value, path: Path<'_>, errors: &mut Errors) {
    word(codes, "operator", &["In", "NotIn"], path, errors);
    let pod = &spec["template"]["spec"];
    if let Some(name) = codes["containerName"].as_str()
        && !items(pod, "containers").chain(items(pod, "initContainers")).any(|c| c["name"] == name)
    {
        let why = "must be one of the container or initContainer names in the pod template";
        errors.invalid(path.at("containerName"), name, why);
    }
    let at = path.at("values");
    let values: Vec<i64> = items(codes, "values").filter_map(Value::as_i64).collect();
    if values.is_empty() {
        errors.invalid(at, Value::Array(Vec::new()), "at least one value is required");
    }
    too_many(codes, "values", MAX_EXIT_CODES, at, errors);
    let mut seen = HashSet::new();
    for (index, value) in values.iter().enumerate() {
        if codes["operator"] == "In" && *value == 0 {
            errors.invalid(at.index(index), 0, "must not be 0 for the In operator");
        }
        if !seen.insert(value) {
            errors.duplicate(at.index(index), *value);
        }
    }
    if !values.is_sorted() {
        errors.invalid(at, values, "must be ordered");
    }
}

fn success_policy(spec: &Value, policy: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(completions) = spec["completions"].as_i64() else { return };
    if items(policy, "rules").next().is_none() {
        errors.required(path, "at least one rules must be specified when the successPolicy is specified");
    }
    too_many(policy, "rules", MAX_RULES, path, errors);
    for (index, rule) in items(policy, "rules").enumerate() {
        let path = path.index(index);
        let (count, indexes) = (rule["succeededCount"].as_i64(), rule["succeededIndexes"].as_str());
        if count.is_none() && indexes.is_none() {
            errors.required(path, "at least one of succeededCount or succeededIndexes must be specified");
        }
        let mut total = None;
        if let Some(text) = indexes {
            let at = path.at("succeededIndexes");
            if text.len() > MAX_INDEXES_TEXT {
                errors.too_long(at, MAX_INDEXES_TEXT);
            }
            match intervals(text, completions) {
                Ok(list) => total = Some(list.iter().map(|(low, high)| high - low + 1).sum()),
                Err(why) => {
                    total = Some(0);
                    errors.invalid(at, text, format!("error parsing succeededIndexes: {why}"));
                }
            }
        }
        let Some(count) = count else { continue };
        let at = path.at("succeededCount");
        if count < 0 {
            errors.invalid(at, count, "must be greater than or equal to 0");
        }
        if count > completions {
            let why = format!("must be less than or equal to {completions} (the number of specified completions)");
            errors.invalid(at, count, why);
        }
        if let Some(total) = total.filter(|total| count > *total) {
            let why = format!(
                "must be less than or equal to {total} (the number of indexes in the specified succeededIndexes field)"
            );
            errors.invalid(at, count, why);
        }
    }
}

/// The intervals of indexes that `1,3-5` names, in order.
pub(super) fn intervals(text: &str, completions: i64) -> Result<Vec<(i64, i64)>, String> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let number = |part: &str| -> Result<i64, String> {
        let n: i64 = part.parse().map_err(|_| format!("cannot convert string to integer for index: {part:?}"))?;
        if n >= completions {
            return Err(format!("too large index: {part:?}"));
        }
        Ok(n)
    };
    let (mut list, mut last) = (Vec::new(), None);
    for interval in text.split(',') {
        let ends: Vec<&str> = interval.split('-').collect();
        let (low, high) = match ends[..] {
            [one] => (number(one)?, number(one)?),
            [low, high] => {
                let (low, high) = (number(low)?, number(high)?);
                if low >= high {
                    return Err(format!("non-increasing order, previous: {low}, current: {high}"));
                }
                (low, high)
            }
            _ => {
                return Err(format!(
                    "the fragment {interval:?} violates the requirement that an index interval can have at most two parts separated by '-'"
                ));
            }
        };
        if let Some(last) = last.filter(|last| *last >= low) {
            return Err(format!("non-increasing order, previous: {last}, current: {low}"));
        }
        list.push((low, high));
        last = Some(high);
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(changes: Value, expect: &[&str]) {
        let mut spec = json!({"completionMode": "Indexed", "completions": 5,
            "template": {"spec": {"containers": [{"name": "main"}]}}});
        for (key, value) in changes.as_object().unwrap() {
            spec[key] = value.clone();
        }
        defaults(&mut spec);
        let mut errors = Errors::default();
        validate(&spec, Path::Root.at("spec"), &mut errors);
        let found: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
        assert_eq!(found, expect, "{spec}");
    }

    #[test]
    fn failures() {
        let rule = |rule: Value| json!({"podFailurePolicy": {"rules": [rule]}});
        let codes = |codes: Value| rule(json!({"action": "FailJob", "onExitCodes": codes}));
        check(rule(json!({"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]})), &[]);
        check(codes(json!({"operator": "In", "values": [1, 42], "containerName": "main"})), &[]);
        check(
            rule(json!({"onPodConditions": [{"type": "A"}]})),
            &[
                "spec.podFailurePolicy.rules[0].action: Required value: valid values: [\"Count\" \"FailIndex\" \"FailJob\" \"Ignore\"]",
            ],
        );
        check(
            rule(json!({"action": "Stop", "onPodConditions": [{"type": "A"}]})),
            &[
                "spec.podFailurePolicy.rules[0].action: Unsupported value: \"Stop\": supported values: \"Count\", \"FailIndex\", \"FailJob\", \"Ignore\"",
            ],
        );
        check(
            rule(json!({"action": "FailIndex", "onPodConditions": [{"type": "A"}]})),
            &[
                "spec.podFailurePolicy.rules[0].action: Invalid value: \"FailIndex\": requires the backoffLimitPerIndex to be set",
            ],
        );
        check(
            rule(json!({"action": "Count"})),
            &[
                "spec.podFailurePolicy.rules[0]: Invalid value: specifying one of OnExitCodes and OnPodConditions is required",
            ],
        );
        let at = "spec.podFailurePolicy.rules[0].onExitCodes";
        check(
            codes(json!({"operator": "In", "values": [0, 2, 1, 1], "containerName": "x"})),
            &[
                &format!(
                    "{at}.containerName: Invalid value: \"x\": must be one of the container or initContainer names in the pod template"
                ),
                &format!("{at}.values[0]: Invalid value: 0: must not be 0 for the In operator"),
                &format!("{at}.values[3]: Duplicate value: 1"),
                &format!("{at}.values: Invalid value: [0,2,1,1]: must be ordered"),
            ],
        );
        check(
            json!({"podFailurePolicy": {"rules": []}, "podReplacementPolicy": "TerminatingOrFailed"}),
            &["spec.podReplacementPolicy: Unsupported value: \"TerminatingOrFailed\": supported values: \"Failed\""],
        );
    }

    #[test]
    fn successes() {
        let rule = |rule: Value| json!({"successPolicy": {"rules": [rule]}});
        check(rule(json!({"succeededIndexes": "0,2-4", "succeededCount": 3})), &[]);
        check(
            json!({"successPolicy": {}}),
            &[
                "spec.successPolicy.rules: Required value: at least one rules must be specified when the successPolicy is specified",
            ],
        );
        check(
            rule(json!({})),
            &[
                "spec.successPolicy.rules[0]: Required value: at least one of succeededCount or succeededIndexes must be specified",
            ],
        );
        check(
            rule(json!({"succeededIndexes": "1,5"})),
            &[
                "spec.successPolicy.rules[0].succeededIndexes: Invalid value: \"1,5\": error parsing succeededIndexes: too large index: \"5\"",
            ],
        );
        check(
            rule(json!({"succeededIndexes": "3,1"})),
            &[
                "spec.successPolicy.rules[0].succeededIndexes: Invalid value: \"3,1\": error parsing succeededIndexes: non-increasing order, previous: 3, current: 1",
            ],
        );
        check(
            rule(json!({"succeededIndexes": "1-2", "succeededCount": 3})),
            &[
                "spec.successPolicy.rules[0].succeededCount: Invalid value: 3: must be less than or equal to 2 (the number of indexes in the specified succeededIndexes field)",
            ],
        );
        check(
            json!({"completionMode": "NonIndexed", "successPolicy": {"rules": []}}),
            &["spec.successPolicy: Invalid value: {\"rules\":[]}: requires indexed completion mode"],
        );
    }
}
