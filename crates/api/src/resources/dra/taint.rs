//! DeviceTaintRule, and what taints and tolerations of devices look like
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/dynamic-resource-allocation/#device-taints-and-tolerations>).

use k8s_openapi::api::resource::v1::DeviceTaintRule;
use serde_json::Value;

use super::{
    super::{csi, default, items_mut, meta, with_status},
    parts::{pool, text},
};
use crate::{
    field::{Errors, Path},
    names,
    row::{Row, Validation, row as base},
};

const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "None"];
const MAX_CONDITIONS: usize = 8;

pub(super) fn row() -> Row {
    Row { validate, ..with_status(base::<DeviceTaintRule>()) }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return meta::conditions(&v.new["status"], MAX_CONDITIONS, Path::Root.at("status"), errors);
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    let (selector, at) = (&spec["deviceSelector"], path.at("deviceSelector"));
    if let Some(driver) = selector["driver"].as_str() {
        csi::driver_name(driver, at.at("driver"), errors);
    }
    if let Some(name) = selector["pool"].as_str() {
        pool(name, at.at("pool"), errors);
    }
    if let Some(device) = selector["device"].as_str() {
        errors.expect(at.at("device"), device, names::dns_label);
    }
    taint(&spec["taint"], v.old.map(|old| &old["spec"]["taint"]), path.at("taint"), errors);
}

/// Validates a taint. An effect that was there before may be one that is not known.
pub(super) fn taint(taint: &Value, old: Option<&Value>, path: Path<'_>, errors: &mut Errors) {
    errors.expect(path.at("key"), text(taint, "key"), names::qualified_name);
    errors.expect(path.at("value"), text(taint, "value"), names::label_value);
    if old.is_some_and(|old| old["effect"] == taint["effect"]) {
        return;
    }
    match text(taint, "effect") {
        "" => errors.required(path.at("effect"), ""),
        effect if !EFFECTS.contains(&effect) => errors.not_supported(path.at("effect"), effect, &EFFECTS),
        _ => {}
    }
}

/// Fills in what tolerations leave out.
pub(super) fn toleration_defaults(object: &mut Value) {
    for toleration in items_mut(object, "tolerations") {
        default(toleration, "operator", "Equal");
    }
}

/// Validates `tolerations`.
pub(super) fn tolerations(object: &Value, path: Path<'_>, errors: &mut Errors) {
    super::parts::each(object, "tolerations", usize::MAX, path, errors, |toleration, path, errors| {
        let (key, value, effect) = (text(toleration, "key"), text(toleration, "value"), text(toleration, "effect"));
        if !key.is_empty() {
            errors.expect(path.at("key"), key, names::qualified_name);
        }
        match text(toleration, "operator") {
            "Exists" if value.is_empty() => {}
            "Exists" => errors.invalid(path.at("value"), value, "must be empty for operator `Exists`"),
            "Equal" => errors.expect(path.at("value"), value, names::label_value),
            "" => errors.required(path.at("operator"), ""),
            other => errors.not_supported(path.at("operator"), other, &["Equal", "Exists"]),
        }
        if !effect.is_empty() && !EFFECTS.contains(&effect) {
            errors.not_supported(path.at("effect"), effect, &EFFECTS);
        }
    });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::super::testing::{check, check_status, check_update, with},
        *,
    };

    #[test]
    fn rules() {
        let rule = json!({"spec": {"deviceSelector": {"driver": "d.example.com", "pool": "a/b", "device": "gpu-1"},
            "taint": {"key": "example.com/broken", "value": "yes", "effect": "NoExecute"}}});
        check(&row(), rule.clone(), &[]);
        let no_label = names::dns_label("A").unwrap_err();
        for (pointer, value, expect) in [
            ("/spec/taint/effect", json!(""), "spec.taint.effect: Required value"),
            (
                "/spec/taint/effect",
                json!("Never"),
                "spec.taint.effect: Unsupported value: \"Never\": supported values: \"NoExecute\", \"NoSchedule\", \"None\"",
            ),
            (
                "/spec/deviceSelector/device",
                json!("A"),
                &format!("spec.deviceSelector.device: Invalid value: \"A\": {no_label}"),
            ),
            ("/spec/deviceSelector/pool", json!(""), "spec.deviceSelector.pool: Required value"),
            ("/spec/taint/key", json!(""), "spec.taint.key: Invalid value: \"\": name part must be non-empty"),
        ] {
            check(&row(), with(&rule, pointer, value), &[expect]);
        }
        // What a later version wrote stays.
        let unknown = with(&rule, "/spec/taint/effect", json!("Later"));
        check_update(&row(), unknown.clone(), with(&unknown, "/spec/taint/value", json!("no")), &[]);
    }

    #[test]
    fn conditions_of_rules() {
        let of = |conditions: Value| json!({"spec": {}, "status": {"conditions": conditions}});
        let whole = json!({"type": "EvictionInProgress", "status": "True", "reason": "PodsLeft", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z"});
        check_status(&row(), of(json!([])), of(json!([whole])), &[]);
        check_status(
            &row(),
            of(json!([])),
            of(json!([{"type": "A", "status": "Yes", "reason": "1"}])),
            &[
                "status.conditions[0].status: Unsupported value: \"Yes\": supported values: \"False\", \"True\", \"Unknown\"",
                "status.conditions[0].lastTransitionTime: Required value",
                "status.conditions[0].reason: Invalid value: \"1\": a condition reason must start with alphabetic character, optionally followed by a string of alphanumeric characters or '_,:', and must end with an alphanumeric character or '_' (e.g. 'my_name',  or 'MY_NAME',  or 'MyName',  or 'ReasonA,ReasonB',  or 'ReasonA:ReasonB', regex used for validation is '[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?')",
            ],
        );
        check_status(
            &row(),
            of(json!([])),
            of(json!([whole, whole])),
            &["status.conditions[1]: Duplicate value: \"EvictionInProgress\""],
        );
    }
}
