//! Metadata that every object has.

use serde_json::Value;

use super::items;
use crate::{
    field::{Errors, Path},
    names,
    quantity::Quantity,
    row::{Row, Scope},
};

/// The total size of all annotations, in bytes.
const ANNOTATIONS_MAX: usize = 256 * 1024;

/// Validates `metadata` of a new or changed object.
pub fn validate_metadata(row: &Row, new: &Value, old: Option<&Value>, errors: &mut Errors) {
    let meta = &new["metadata"];
    let path = Path::Root.at("metadata");
    match (meta["name"].as_str(), meta["generateName"].as_str()) {
        (None | Some(""), None | Some("")) => errors.required(path.at("name"), "name or generateName is required"),
        (None | Some(""), _) => {}
        (Some(name), _) => {
            if let Err(detail) = (row.name)(name) {
                errors.invalid(path.at("name"), name, detail);
            }
        }
    }
    if let Some(prefix) = meta["generateName"].as_str().filter(|p| !p.is_empty()) {
        // A prefix may end in a dash, which the generated suffix follows.
        if let Err(detail) = (row.name)(&format!("{}x", &prefix[..prefix.len().min(58)])) {
            errors.invalid(path.at("generateName"), prefix, detail);
        }
    }
    match (row.scope, meta["namespace"].as_str()) {
        (Scope::Namespaced, None | Some("")) => errors.required(path.at("namespace"), ""),
        (Scope::Namespaced, Some(namespace)) => {
            if let Err(detail) = names::dns_label(namespace) {
                errors.invalid(path.at("namespace"), namespace, detail);
            }
        }
        (Scope::Cluster, Some(namespace)) if !namespace.is_empty() => {
            errors.forbidden(path.at("namespace"), "not allowed on this type");
        }
        _ => {}
    }
    labels(meta, path, errors);
    annotations(meta, path, errors);
    let mut controllers = 0;
    for (index, owner) in items(meta, "ownerReferences").enumerate() {
        let list = path.at("ownerReferences");
        let path = list.index(index);
        for key in ["apiVersion", "kind", "name", "uid"] {
            if owner[key].as_str().unwrap_or_default().is_empty() {
                errors.invalid(path.at(key), "", format!("{key} must not be empty"));
            }
        }
        controllers += usize::from(owner["controller"] == true);
    }
    if controllers > 1 {
        errors.invalid(
            path.at("ownerReferences"),
            meta["ownerReferences"].clone(),
            "Only one reference can have Controller set to true",
        );
    }
    for (index, finalizer) in items(meta, "finalizers").enumerate() {
        let name = finalizer.as_str().unwrap_or_default();
        let list = path.at("finalizers");
        if let Err(detail) = names::qualified_name(name) {
            errors.invalid(list, name, detail);
        } else if !name.contains('/') && !["foregroundDeletion", "orphan", "kubernetes"].contains(&name) {
            errors.invalid(
                list.index(index),
                name,
                "name is neither a standard finalizer name nor is it fully qualified",
            );
        }
    }
    if let Some(old) = old.map(|old| &old["metadata"]) {
        for key in ["name", "namespace", "uid", "creationTimestamp"] {
            errors.immutable(path.at(key), &old[key], &meta[key]);
        }
        if old["deletionTimestamp"].is_string() {
            let kept: Vec<&Value> = items(old, "finalizers").collect();
            let added: Vec<&str> =
                items(meta, "finalizers").filter(|f| !kept.contains(f)).filter_map(Value::as_str).collect();
            if !added.is_empty() {
                let list: Vec<String> = added.iter().map(|f| format!("{f:?}")).collect();
                errors.forbidden(path.at("finalizers"), format!("no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}", list.join(", ")));
            }
        }
    }
}

/// Validates `labels` of an object or a template.
pub fn labels(meta: &Value, path: Path<'_>, errors: &mut Errors) {
    label_map(&meta["labels"], path.at("labels"), errors);
}

/// Validates `annotations` of an object or a template.
pub fn annotations(meta: &Value, path: Path<'_>, errors: &mut Errors) {
    let path = path.at("annotations");
    let mut total = 0;
    for (key, value) in meta["annotations"].as_object().into_iter().flatten() {
        total += key.len() + value.as_str().map_or(0, str::len);
        if let Err(detail) = names::qualified_name(&key.to_lowercase()) {
            errors.invalid(path, key.as_str(), detail);
        }
    }
    if total > ANNOTATIONS_MAX {
        errors.too_long(path, ANNOTATIONS_MAX);
    }
}

/// Validates a map of labels, such as a selector.
pub fn label_map(labels: &Value, path: Path<'_>, errors: &mut Errors) {
    for (key, value) in labels.as_object().into_iter().flatten() {
        if let Err(detail) = names::qualified_name(key) {
            errors.invalid(path, key.as_str(), detail);
        }
        let value = value.as_str().unwrap_or_default();
        if let Err(detail) = names::label_value(value) {
            errors.invalid(path, value, detail);
        }
    }
}

/// Validates a `metav1.LabelSelector` that may have been written when values were not looked at: once it is wrong, it
/// may stay so.
pub fn selector_after(new: &Value, old: Option<&Value>, path: Path<'_>, errors: &mut Errors) {
    let mut before = Errors::default();
    if let Some(old) = old {
        selector(old, Path::Root, &mut before);
    }
    if before.is_empty() {
        selector(new, path, errors);
    }
}

/// Validates a `metav1.LabelSelector`.
pub fn selector(selector: &Value, path: Path<'_>, errors: &mut Errors) {
    label_map(&selector["matchLabels"], path.at("matchLabels"), errors);
    for (index, expression) in items(selector, "matchExpressions").enumerate() {
        let list = path.at("matchExpressions");
        let path = list.index(index);
        let values = items(expression, "values").count();
        match expression["operator"].as_str().unwrap_or_default() {
            "In" | "NotIn" if values == 0 => {
                errors.required(path.at("values"), "must be specified when `operator` is 'In' or 'NotIn'");
            }
            "Exists" | "DoesNotExist" if values > 0 => {
                errors
                    .forbidden(path.at("values"), "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.invalid(path.at("operator"), other, "not a valid selector operator"),
        }
        if let Err(detail) = names::qualified_name(expression["key"].as_str().unwrap_or_default()) {
            errors.invalid(path.at("key"), expression["key"].clone(), detail);
        }
        for (index, value) in items(expression, "values").enumerate() {
            errors.expect(path.at("values").index(index), value.as_str().unwrap_or_default(), names::label_value);
        }
    }
}

/// Validates `conditions`, of which there may be so many.
pub fn conditions(status: &Value, most: usize, path: Path<'_>, errors: &mut Errors) {
    const MAX_REASON: usize = 1024;
    const MAX_MESSAGE: usize = 32 * 1024;
    let list = path.at("conditions");
    let count = items(status, "conditions").count();
    if count > most {
        errors.too_many(list, count as u64, most as u64);
    }
    let mut seen: Vec<&str> = Vec::new();
    for (index, condition) in items(status, "conditions").enumerate().take(most) {
        let path = list.index(index);
        let text = |key: &str| condition[key].as_str().unwrap_or_default();
        let ty = text("type");
        if seen.contains(&ty) {
            errors.duplicate(path, ty);
        }
        seen.push(ty);
        match ty {
            "" => errors.required(path.at("type"), "is required"),
            ty => errors.expect(path.at("type"), ty, names::qualified_name),
        }
        match text("status") {
            "" => errors.required(path.at("status"), ""),
            "True" | "False" | "Unknown" => {}
            other => errors.not_supported(path.at("status"), other, &["False", "True", "Unknown"]),
        }
        if let Some(generation) = condition["observedGeneration"].as_i64().filter(|n| *n < 0) {
            let why = "must be greater than or equal to zero";
            errors.invalid(path.at("observedGeneration"), generation, why);
        }
        if text("lastTransitionTime").is_empty() {
            errors.required(path.at("lastTransitionTime"), "");
        }
        errors.expect_some(path.at("reason"), &condition["reason"], names::condition_reason);
        if text("reason").len() > MAX_REASON {
            errors.too_long(path.at("reason"), MAX_REASON);
        }
        if text("message").len() > MAX_MESSAGE {
            errors.too_long(path.at("message"), MAX_MESSAGE);
        }
    }
}

/// Validates a number that must not be negative.
pub fn non_negative(object: &Value, key: &str, path: Path<'_>, errors: &mut Errors) {
    if let Some(n) = object[key].as_i64()
        && n < 0
    {
        errors.invalid(path.at(key), n, "must be greater than or equal to 0");
    }
}

/// Validates a number of a port.
pub fn port_number(n: i64, path: Path<'_>, errors: &mut Errors) {
    if !(1..=65535).contains(&n) {
        errors.invalid(path, n, "must be between 1 and 65535, inclusive");
    }
}

/// Reads a quantity, which may also have been written as a number.
pub fn quantity(value: &Value) -> Option<Quantity> {
    match value {
        Value::String(text) => text.parse().ok(),
        Value::Number(number) => number.to_string().parse().ok(),
        _ => None,
    }
}

/// Validates a reference to something that has a kind and a name.
pub fn reference(object: &Value, path: Path<'_>, errors: &mut Errors) {
    for key in ["kind", "name"] {
        errors.expect_some(path.at(key), &object[key], names::path_segment);
    }
}

/// Validates that a string is one of those known, if it is set.
pub fn one_of(object: &Value, key: &str, known: &[&str], path: Path<'_>, errors: &mut Errors) {
    if let Some(text) = object[key].as_str()
        && !known.contains(&text)
    {
        errors.not_supported(path.at(key), text, known);
    }
}
