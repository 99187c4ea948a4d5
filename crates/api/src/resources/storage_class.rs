//! StorageClass, VolumeAttributesClass.

use k8s_openapi::api::storage::v1::{StorageClass, VolumeAttributesClass};
use serde_json::Value;

use super::{default, items, meta};
use crate::{
    cell,
    field::{Errors, Path, same},
    names,
    row::{Row, Validation, col, row as base},
};

const MAX_PARAMETERS: usize = 512;
const MAX_PARAMETERS_SIZE: usize = 256 * 1024;

pub(super) fn row() -> Row {
    Row {
        short_names: &["sc"],
        columns: const {
            &[
                col("Provisioner", "string"),
                col("ReclaimPolicy", "string"),
                col("VolumeBindingMode", "string"),
                col("AllowVolumeExpansion", "boolean"),
                col("Age", "date"),
            ]
        },
        cells: |o, now| {
            vec![
                cell::plain(&o["provisioner"]),
                cell::plain(&o["reclaimPolicy"]),
                cell::plain(&o["volumeBindingMode"]),
                o["allowVolumeExpansion"].as_bool().unwrap_or(false).into(),
                cell::age(o, now),
            ]
        },
        defaults: |o| {
            default(o, "reclaimPolicy", "Delete");
            default(o, "volumeBindingMode", "Immediate");
        },
        validate,
        ..base::<StorageClass>()
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let class = v.new;
    if let Some(old) = v.old {
        fixed(old, class, &["parameters", "provisioner", "reclaimPolicy"], errors);
        let key = "volumeBindingMode";
        errors.immutable(Path::Root.at(key), &old[key], &class[key]);
        return;
    }
    driver(class, "provisioner", errors);
    parameters(class, errors);
    meta::one_of(class, "reclaimPolicy", &["Delete", "Retain"], Path::Root, errors);
    meta::one_of(class, "volumeBindingMode", &["Immediate", "WaitForFirstConsumer"], Path::Root, errors);
    let list = Path::Root.at("allowedTopologies");
    let topologies: Vec<&Value> = items(class, "allowedTopologies").collect();
    for (index, term) in topologies.iter().enumerate() {
        let at = list.index(index);
        topology(term, at, errors);
        if topologies[..index].iter().any(|other| same(other, term)) {
            errors.duplicate(at.at("matchLabelExpressions"), "");
        }
    }
}

fn topology(term: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.at("matchLabelExpressions");
    let mut seen = Vec::new();
    for (index, expression) in items(term, "matchLabelExpressions").enumerate() {
        let at = list.index(index);
        let key = expression["key"].as_str().unwrap_or_default();
        let values: Vec<&str> = items(expression, "values").filter_map(Value::as_str).collect();
        if values.is_empty() {
            errors.required(at.at("values"), "");
        }
        for (index, value) in values.iter().enumerate() {
            if values[..index].contains(value) {
                errors.duplicate(at.at("values").index(index), *value);
            }
        }
        errors.expect(at.at("key"), key, names::qualified_name);
        if seen.contains(&key) {
            errors.duplicate(at.at("key"), key);
        }
        seen.push(key);
    }
}

/// Says which fields were changed that must not be.
fn fixed(old: &Value, new: &Value, keys: &[&str], errors: &mut Errors) {
    for key in keys {
        if !same(&old[*key], &new[*key]) {
            errors.forbidden(Path::Root.at(key), format!("updates to {key} are forbidden."));
        }
    }
}

/// Validates the name of a driver, whose letters may be large.
fn driver(class: &Value, key: &str, errors: &mut Errors) {
    errors.expect_some(Path::Root.at(key), &class[key], |name| names::qualified_name(&name.to_lowercase()));
}

fn parameters(class: &Value, errors: &mut Errors) {
    let at = Path::Root.at("parameters");
    let Some(parameters) = class["parameters"].as_object() else { return };
    if parameters.len() > MAX_PARAMETERS {
        errors.too_long(at, MAX_PARAMETERS);
        return;
    }
    if parameters.contains_key("") {
        errors.invalid(at, "", "field can not be empty.");
    }
    let size: usize = parameters.iter().map(|(key, value)| key.len() + value.as_str().map_or(0, str::len)).sum();
    if size > MAX_PARAMETERS_SIZE {
        errors.too_long(at, MAX_PARAMETERS_SIZE);
    }
}

pub(super) fn attributes() -> Row {
    Row {
        short_names: &["vac"],
        columns: const { &[col("DriverName", "string"), col("Age", "date")] },
        cells: |o, now| vec![cell::plain(&o["driverName"]), cell::age(o, now)],
        validate: |v, errors| {
            if let Some(old) = v.old {
                fixed(old, v.new, &["driverName", "parameters"], errors);
            }
            driver(v.new, "driverName", errors);
            parameters(v.new, errors);
            if v.new["parameters"].as_object().is_none_or(|parameters| parameters.is_empty()) {
                errors.required(Path::Root.at("parameters"), "must contain at least one key/value pair");
            }
        },
        ..base::<VolumeAttributesClass>()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_update, with},
        *,
    };

    #[test]
    fn what_a_storage_class_must_be() {
        let good = json!({"provisioner": "Example.com/p", "parameters": {"a": "b"}});
        for (key, value, expect) in [
            ("reclaimPolicy", json!("Retain"), &[][..]),
            ("provisioner", json!(null), &["provisioner: Required value"]),
            (
                "provisioner",
                json!("a/b/c"),
                &[&*format!("provisioner: Invalid value: \"a/b/c\": {}", names::qualified_name("a/b/c").unwrap_err())],
            ),
            (
                "reclaimPolicy",
                json!("Recycle"),
                &["reclaimPolicy: Unsupported value: \"Recycle\": supported values: \"Delete\", \"Retain\""],
            ),
            (
                "volumeBindingMode",
                json!("Late"),
                &[
                    "volumeBindingMode: Unsupported value: \"Late\": supported values: \"Immediate\", \"WaitForFirstConsumer\"",
                ],
            ),
            ("parameters", json!({"": "b"}), &["parameters: Invalid value: \"\": field can not be empty."]),
            (
                "parameters",
                json!({"a": "b".repeat(MAX_PARAMETERS_SIZE)}),
                &["parameters: Too long: may not be more than 262144 bytes"],
            ),
            ("allowedTopologies", json!([{"matchLabelExpressions": [{"key": "zone", "values": ["a", "b"]}]}]), &[]),
            (
                "allowedTopologies",
                json!([{"matchLabelExpressions": [{"key": "zone", "values": ["a", "a"]}, {"key": "zone"}]}]),
                &[
                    "allowedTopologies[0].matchLabelExpressions[0].values[1]: Duplicate value: \"a\"",
                    "allowedTopologies[0].matchLabelExpressions[1].values: Required value",
                    "allowedTopologies[0].matchLabelExpressions[1].key: Duplicate value: \"zone\"",
                ],
            ),
        ] {
            check(&row(), with(&good, &format!("/{key}"), value), expect);
        }
        for (key, value, expect) in [
            ("allowVolumeExpansion", json!(true), &[][..]),
            ("parameters", json!({"a": "c"}), &["parameters: Forbidden: updates to parameters are forbidden."]),
            ("provisioner", json!("q"), &["provisioner: Forbidden: updates to provisioner are forbidden."]),
            ("reclaimPolicy", json!("Retain"), &["reclaimPolicy: Forbidden: updates to reclaimPolicy are forbidden."]),
            (
                "volumeBindingMode",
                json!("WaitForFirstConsumer"),
                &["volumeBindingMode: Invalid value: \"WaitForFirstConsumer\": field is immutable"],
            ),
        ] {
            check_update(&row(), good.clone(), with(&good, &format!("/{key}"), value), expect);
        }
    }

    #[test]
    fn what_a_class_of_attributes_must_be() {
        let class = |driver: &str, parameters: Value| json!({"driverName": driver, "parameters": parameters});
        let good = class("d", json!({"iops": "1"}));
        check(&attributes(), good.clone(), &[]);
        check(
            &attributes(),
            class("", json!({})),
            &["driverName: Required value", "parameters: Required value: must contain at least one key/value pair"],
        );
        check_update(
            &attributes(),
            good,
            class("e", json!({"iops": "2"})),
            &[
                "driverName: Forbidden: updates to driverName are forbidden.",
                "parameters: Forbidden: updates to parameters are forbidden.",
            ],
        );
    }
}
