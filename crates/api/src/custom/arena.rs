//! A schema as shapes, by which server-side apply walks
//! (<https://kubernetes.io/docs/reference/using-api/server-side-apply/#merge-strategy>).

use std::collections::HashMap;

use serde_json::Value;

use super::schema::{Additional, Kind, Node};
use crate::schema::{Field, ListType, MapType, Schemas, Shape, TypeId};

/// The name of the type of metadata.
pub const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";

/// Adds the type of a version to `schemas`, under `name`.
pub fn add(schemas: &mut Schemas, name: &str, root: &Node) -> TypeId {
    let mut fields = fields(schemas, root);
    let text = schemas.add("", false, Shape::String);
    fields.insert("apiVersion".into(), field(text, &Node::default()));
    fields.insert("kind".into(), field(text, &Node::default()));
    if let Some(meta) = schemas.by_name(META) {
        fields.insert("metadata".into(), field(meta, &Node::default()));
    }
    schemas.add(name, false, Shape::Object(fields))
}

fn fields(schemas: &mut Schemas, node: &Node) -> HashMap<Box<str>, Field> {
    let mut fields = HashMap::new();
    for (name, child) in &node.properties {
        let ty = ty(schemas, child);
        fields.insert(name.clone(), field(ty, child));
    }
    fields
}

fn field(ty: TypeId, node: &Node) -> Field {
    let default = |key: &str| {
        let default = node.items.as_ref()?.properties.get(key)?.default.clone()?;
        Some((key.into(), default))
    };
    Field {
        ty,
        list: node.list,
        keys: if node.list == ListType::Map { node.keys.clone() } else { Vec::new() },
        key_defaults: if node.list == ListType::Map {
            node.keys.iter().filter_map(|key| default(key)).collect()
        } else {
            vec![]
        },
        map: node.atomic.then_some(MapType::Atomic),
        merge: false,
        retain_keys: false,
        merge_key: None,
    }
}

fn ty(schemas: &mut Schemas, node: &Node) -> TypeId {
    let shape = match (node.kind, &node.additional) {
        _ if node.int_or_string => Shape::IntOrString,
        (Kind::Object, Additional::Schema(child)) => {
            let child = ty(schemas, child);
            Shape::Map(child)
        }
        (Kind::Object, _) if !node.properties.is_empty() => Shape::Object(fields(schemas, node)),
        // What nobody described is told apart key by key all the same.
        (Kind::Object | Kind::Any, _) => Shape::Free,
        (Kind::Array, _) => match &node.items {
            Some(items) => {
                let items = ty(schemas, items);
                Shape::Array(items)
            }
            None => Shape::Any,
        },
        (Kind::String, _) => Shape::String,
        (Kind::Integer, _) => Shape::Int64,
        (Kind::Number, _) => Shape::Number,
        (Kind::Boolean, _) => Shape::Boolean,
    };
    schemas.add("", node.atomic, shape)
}

/// The name of the type of a version, as upstream's OpenAPI documents have it: the group backwards, version, kind.
pub fn type_name(group: &str, version: &str, kind: &str) -> String {
    let mut parts: Vec<&str> = group.split('.').rev().collect();
    parts.extend([version, kind]);
    parts.join(".")
}

/// The schema of a version as it stands in an OpenAPI document; references start with `prefix`.
pub fn openapi(schema: &Value, prefix: &str) -> Value {
    let mut out = schema.clone();
    if !out.is_object() {
        out = serde_json::json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    }
    if prefix == super::PREFIX_2 {
        for_version_2(&mut out);
    }
    let described = |of: &str| -> Value {
        match of {
            "apiVersion" => "APIVersion defines the versioned schema of this representation of an object. Servers should convert recognized schemas to the latest internal value, and may reject unrecognized values. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#resources".into(),
            _ => "Kind is a string value representing the REST resource this object represents. Servers may infer this from the endpoint the client submits requests to. Cannot be updated. In CamelCase. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#types-kinds".into(),
        }
    };
    for key in ["apiVersion", "kind"] {
        out["properties"][key] = serde_json::json!({"type": "string", "description": described(key)});
    }
    out["properties"]["metadata"] = serde_json::json!({"allOf": [{"$ref": format!("{prefix}{META}")}],
        "description": "Standard object's metadata. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#metadata"});
    if prefix == super::PREFIX_2 {
        out["properties"]["metadata"] = serde_json::json!({"$ref": format!("{prefix}{META}"),
            "description": "Standard object's metadata."});
    }
    out
}

/// Version 2 knows less: what it has no word for goes
/// (<https://kubernetes.io/docs/concepts/overview/kubernetes-api/#openapi-v2>).
fn for_version_2(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    let nullable = map.remove("nullable") == Some(Value::Bool(true));
    let free = map.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
    let int_or_string = map.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true));
    for key in ["oneOf", "anyOf", "not", "default", "allOf", "x-kubernetes-validations"] {
        map.remove(key);
    }
    if nullable || int_or_string {
        map.remove("type");
    }
    if nullable || free {
        for key in ["type", "properties", "items", "additionalProperties", "required"] {
            map.remove(key);
        }
    }
    for value in map.get_mut("properties").and_then(Value::as_object_mut).into_iter().flatten() {
        for_version_2(value.1);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(value) = map.get_mut(key) {
            for_version_2(value);
        }
    }
}
