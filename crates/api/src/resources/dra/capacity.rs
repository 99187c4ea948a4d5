//! How much of a device's capacity a request may take, if several may share it (KEP-5075).

use std::collections::HashSet;

use serde_json::Value;

use super::super::{items, meta};
use crate::{
    field::{Errors, Path},
    quantity::Quantity,
};

const MAX_VALUES: usize = 10;

/// Validates a capacity. Only one of a device that is `shared` says what may be asked for.
pub(super) fn validate(capacity: &Value, shared: bool, path: Path<'_>, errors: &mut Errors) {
    let (policy, at) = (&capacity["requestPolicy"], path.at("requestPolicy"));
    if !policy.is_object() {
        return;
    }
    if !shared {
        return errors.forbidden(at, "allowMultipleAllocations must be true");
    }
    let whole = meta::quantity(&capacity["value"]).unwrap_or(Quantity::new(0));
    let default = meta::quantity(&policy["default"]);
    let has_values = items(policy, "validValues").next().is_some();
    let range = &policy["validRange"];
    match (has_values, range.is_object(), default) {
        (true, true, _) => {
            let why = r#"exactly one policy can be specified, cannot specify "validValues" and "validRange" at the same time"#;
            errors.forbidden(at, why);
        }
        (true, _, None) => errors.required(at.at("default"), "required when validValues is defined"),
        (_, true, None) => errors.required(at.at("default"), "required when validRange is defined"),
        (true, _, Some(default)) => values(policy, default, whole, at, errors),
        (_, true, Some(default)) => range_of(range, default, whole, at.at("validRange"), errors),
        _ => {}
    }
}

fn values(policy: &Value, default: Quantity, whole: Quantity, path: Path<'_>, errors: &mut Errors) {
    let path = path.at("validValues");
    let values: Vec<Quantity> = items(policy, "validValues").filter_map(meta::quantity).collect();
    for (index, pair) in values.windows(2).enumerate().filter(|(_, pair)| pair[0] > pair[1]) {
        errors.invalid(path.index(index + 1), pair[1].to_string(), "values must be sorted in ascending order");
    }
    if values.len() > MAX_VALUES {
        errors.too_many(path, values.len() as u64, MAX_VALUES as u64);
    } else {
        for (index, value) in values.iter().enumerate().filter(|(_, value)| **value > whole) {
            let why = format!("option is larger than capacity value: {whole}");
            errors.invalid(path.index(index), value.to_string(), why);
        }
        let mut seen = HashSet::new();
        for (index, value) in values.iter().enumerate() {
            if !seen.insert(value.value()) {
                errors.duplicate(path.index(index), value.value().to_string());
            }
        }
    }
    if values.len() > MAX_VALUES || !values.contains(&default) {
        errors.invalid(path, default.to_string(), "default value is not valid according to the requestPolicy");
    }
}

fn range_of(range: &Value, default: Quantity, whole: Quantity, path: Path<'_>, errors: &mut Errors) {
    let [min, max, step] = ["min", "max", "step"].map(|key| meta::quantity(&range[key]));
    let Some(min) = min else { return errors.required(path.at("min"), "required when validRange is defined") };
    let mut wrong = |key: &str, value: Quantity, why: String| errors.invalid(path.at(key), value.to_string(), why);
    if min > whole {
        wrong("min", min, format!("min is larger than capacity value: {whole}"));
    }
    if default < min {
        wrong("default", default, format!("default is less than min: {min}"));
    }
    if let Some(max) = max {
        if min > max {
            wrong("max", min, format!("min is larger than max: {max}"));
        }
        if max > whole {
            wrong("max", max, format!("max is larger than capacity value: {whole}"));
        }
        if default > max {
            wrong("default", default, format!("default is more than max: {max}"));
        }
    }
    let Some(step) = step else { return };
    if step <= Quantity::new(0) {
        return wrong("step", step, "must be greater than zero".into());
    }
    if min + step > whole {
        wrong("step", step, format!("one step {} is larger than capacity value: {whole}", min + step));
    }
    let mut safe = true;
    for (key, value) in [("default", Some(default)), ("min", Some(min)), ("max", max), ("step", Some(step))] {
        let Some(value) = value else { continue };
        if value.is_negative() {
            wrong(key, value, "must be greater than or equal to 0".into());
            safe = false;
        }
    }
    for value in [Some(default), max].into_iter().flatten().filter(|_| safe) {
        if (value.value() - min.value()) % step.value() != 0 {
            wrong("step", value, format!("value is not a multiple of a given step ({step}) from ({min})"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn policies() {
        for (policy, expect) in [
            (json!({"default": "1Gi"}), &[][..]),
            (json!({"default": "1Gi", "validValues": ["1Gi", "2Gi"]}), &[]),
            (json!({"default": "1Gi", "validRange": {"min": "1Gi", "max": "4Gi", "step": "1Gi"}}), &[]),
            (
                json!({"validValues": ["1Gi"]}),
                &["c.requestPolicy.default: Required value: required when validValues is defined"],
            ),
            (
                json!({"validRange": {"min": "1Gi"}}),
                &["c.requestPolicy.default: Required value: required when validRange is defined"],
            ),
            (
                json!({"default": "1Gi", "validValues": ["1Gi"], "validRange": {"min": "1Gi"}}),
                &[
                    "c.requestPolicy: Forbidden: exactly one policy can be specified, cannot specify \"validValues\" and \"validRange\" at the same time",
                ],
            ),
            (
                json!({"default": "3Gi", "validValues": ["2Gi", "1Gi", "1Gi", "16Gi"]}),
                &[
                    "c.requestPolicy.validValues[1]: Invalid value: \"1Gi\": values must be sorted in ascending order",
                    "c.requestPolicy.validValues[3]: Invalid value: \"16Gi\": option is larger than capacity value: 8Gi",
                    "c.requestPolicy.validValues[2]: Duplicate value: \"1073741824\"",
                    "c.requestPolicy.validValues: Invalid value: \"3Gi\": default value is not valid according to the requestPolicy",
                ],
            ),
            (
                json!({"default": "1Gi", "validRange": {}}),
                &["c.requestPolicy.validRange.min: Required value: required when validRange is defined"],
            ),
            (
                json!({"default": "1Gi", "validRange": {"min": "2Gi", "max": "16Gi"}}),
                &[
                    "c.requestPolicy.validRange.default: Invalid value: \"1Gi\": default is less than min: 2Gi",
                    "c.requestPolicy.validRange.max: Invalid value: \"16Gi\": max is larger than capacity value: 8Gi",
                ],
            ),
            (
                json!({"default": "3Gi", "validRange": {"min": "1Gi", "max": "5Gi", "step": "3Gi"}}),
                &[
                    "c.requestPolicy.validRange.step: Invalid value: \"3Gi\": value is not a multiple of a given step (3Gi) from (1Gi)",
                    "c.requestPolicy.validRange.step: Invalid value: \"5Gi\": value is not a multiple of a given step (3Gi) from (1Gi)",
                ],
            ),
            (
                json!({"default": "1Gi", "validRange": {"min": "1Gi", "step": "0"}}),
                &["c.requestPolicy.validRange.step: Invalid value: \"0\": must be greater than zero"],
            ),
            (
                json!({"default": "-1", "validRange": {"min": "-1", "step": "1"}}),
                &[
                    "c.requestPolicy.validRange.default: Invalid value: \"-1\": must be greater than or equal to 0",
                    "c.requestPolicy.validRange.min: Invalid value: \"-1\": must be greater than or equal to 0",
                ],
            ),
        ] {
            let mut errors = Errors::default();
            validate(&json!({"value": "8Gi", "requestPolicy": policy}), true, Path::Root.at("c"), &mut errors);
            assert_eq!(errors.0.iter().map(ToString::to_string).collect::<Vec<_>>(), expect, "{policy:#}");
        }
    }
}
