//! OpenAPI definitions of the types, as kubectl and the generated clients read them.

use std::collections::BTreeMap;

use schemars::{SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value};

use super::Facts;

const DEFINITIONS: &str = "/$defs";

pub(super) fn generate(roots: impl IntoIterator<Item = fn(&mut SchemaGenerator)>) -> BTreeMap<String, Value> {
    let mut generator = SchemaSettings::draft07().with(|s| s.definitions_path = DEFINITIONS.into()).into_generator();
    for root in roots {
        root(&mut generator);
    }
    generator.take_definitions(false).into_iter().collect()
}

/// The name of the type that `schema` refers to, directly or (to carry a description) by `allOf`.
pub(super) fn reference(schema: &Value) -> Option<&str> {
    fn name(v: &Value) -> Option<&str> {
        v.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next())
    }
    name(schema).or_else(|| schema.get("allOf").and_then(Value::as_array).and_then(|all| all.first()).and_then(name))
}

/// All definitions for an OpenAPI document, their references starting with `prefix` (`#/components/schemas/` in
/// version 3, `#/definitions/` in version 2), with upstream's extensions for lists and patches.
pub fn definitions(roots: impl IntoIterator<Item = fn(&mut SchemaGenerator)>, prefix: &str) -> BTreeMap<String, Value> {
    let facts = Facts::parse(include_str!("facts.txt"));
    let mut all = generate(roots);
    for (name, schema) in &mut all {
        rewrite(schema, prefix);
        let Some(object) = schema.as_object_mut() else { continue };
        facts.extensions(name, ".", object);
        if let Some(properties) = object.get_mut("properties").and_then(Value::as_object_mut) {
            for (field, value) in properties {
                if let Some(value) = value.as_object_mut() {
                    facts.extensions(name, field, value);
                }
            }
        }
    }
    all
}

fn rewrite(schema: &mut Value, prefix: &str) {
    match schema {
        Value::Object(object) => {
            if let Some(Value::String(target)) = object.get_mut("$ref") {
                let name = target.rsplit('/').next().unwrap_or_default().to_owned();
                *target = format!("{prefix}{name}");
                if object.len() > 1 {
                    // OpenAPI 3.0 ignores what stands beside a `$ref`; upstream wraps it to keep the description.
                    let reference = object.remove("$ref").unwrap_or_default();
                    let mut wrapped = Map::new();
                    wrapped.insert("$ref".into(), reference);
                    object.insert("allOf".into(), Value::Array(vec![Value::Object(wrapped)]));
                }
            }
            object.values_mut().for_each(|v| rewrite(v, prefix));
        }
        Value::Array(items) => items.iter_mut().for_each(|v| rewrite(v, prefix)),
        _ => {}
    }
}
