//! What is taken out of an object and filled into it, by its schema, before it is checked.

use serde_json::{Map, Value};

use super::schema::{Additional, Node};
use crate::schema::check::complain;

/// Takes out what the schema does not know
/// (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#field-pruning>).
/// Returns the paths, in order. `apiVersion`, `kind` and `metadata` of the object itself are not looked at.
pub fn prune(root: &Node, object: &mut Value) -> Vec<String> {
    let mut gone = Vec::new();
    fields(root, object, &mut String::new(), true, &mut gone);
    gone
}

fn values(node: &Node, value: &mut Value, path: &mut String, gone: &mut Vec<String>) {
    match value {
        Value::Object(_) => fields(node, value, path, node.embedded, gone),
        Value::Array(list) => {
            if let Some(items) = &node.items {
                for (index, item) in list.iter_mut().enumerate() {
                    let end = path.len();
                    path.push_str(&format!("[{index}]"));
                    values(items, item, path, gone);
                    path.truncate(end);
                }
            }
        }
        _ => {}
    }
}

fn fields(node: &Node, value: &mut Value, path: &mut String, resource: bool, gone: &mut Vec<String>) {
    let Value::Object(map) = value else { return };
    map.retain(|key, value| {
        if resource && matches!(key.as_str(), "apiVersion" | "kind" | "metadata") {
            return true;
        }
        let end = path.len();
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(key);
        let known = match node.child(key) {
            Some(child) => {
                values(child, value, path, gone);
                true
            }
            None => node.preserve || matches!(node.additional, Additional::Allowed(true)),
        };
        if !known {
            complain(gone, || path.clone());
        }
        path.truncate(end);
        known
    });
}

/// Takes out nulls where the schema has none
/// (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#defaulting-and-nullable>).
pub fn drop_nulls(node: &Node, value: &mut Value) {
    match value {
        Value::Object(map) => map.retain(|key, value| match node.child(key) {
            Some(child) if value.is_null() => child.nullable,
            Some(child) => {
                drop_nulls(child, value);
                true
            }
            None => true,
        }),
        Value::Array(list) => {
            if let Some(items) = &node.items {
                list.iter_mut().for_each(|item| drop_nulls(items, item));
            }
        }
        _ => {}
    }
}

/// Fills in defaults
/// (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#defaulting>).
pub fn default(node: &Node, value: &mut Value) {
    let missing = |node: &Node, value: &Value| value.is_null() && !node.nullable;
    match value {
        Value::Object(map) => {
            for (key, child) in &node.properties {
                if let Some(default) = &child.default
                    && map.get(&**key).is_none_or(|value| missing(child, value))
                {
                    map.insert(key.to_string(), default.clone());
                }
            }
            for (key, value) in map.iter_mut() {
                let Some(child) = node.child(key) else { continue };
                if missing(child, value)
                    && let Some(default) = &child.default
                {
                    *value = default.clone();
                }
                default_below(child, value);
            }
        }
        Value::Array(list) => {
            if let Some(items) = &node.items {
                for item in list {
                    if missing(items, item)
                        && let Some(default) = &items.default
                    {
                        *item = default.clone();
                    }
                    default_below(items, item);
                }
            }
        }
        _ => {}
    }
}

fn default_below(node: &Node, value: &mut Value) {
    if matches!(value, Value::Object(_) | Value::Array(_)) {
        default(node, value);
    }
}

/// Calls `visit` for the metadata of every object that is embedded in another.
pub fn embedded(node: &Node, value: &mut Value, visit: &mut impl FnMut(&mut Map<String, Value>)) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if node.embedded && key == "metadata" {
                    if let Value::Object(meta) = value {
                        visit(meta);
                    }
                } else if let Some(child) = node.child(key) {
                    embedded(child, value, visit);
                }
            }
        }
        Value::Array(list) => {
            if let Some(items) = &node.items {
                list.iter_mut().for_each(|item| embedded(items, item, visit));
            }
        }
        _ => {}
    }
}
