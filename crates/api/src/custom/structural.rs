//! What a schema in a CustomResourceDefinition must be
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema>).

use regex::Regex;
use serde_json::{Value, json};

use super::{
    costs::{self, Costs, Times},
    prune,
    rules::Compiled,
    schema::{Kind, Node},
    validate,
};
use crate::{
    cel::{Sizes, Type},
    field::{Errors, Path},
};

/// Where in the schema we are.
#[derive(Clone, Copy)]
struct Within {
    level: Level,
    depth: usize,
    /// How often what is described here can be in an object.
    times: Times,
}

#[derive(Clone, Copy, PartialEq)]
enum Level {
    Root,
    Item,
    Field,
}

impl Within {
    fn below(self, schema: &Value, level: Level) -> Within {
        Within { level, depth: self.depth + 1, times: costs::below(schema, self.times) }
    }
}

/// Fields that a schema may have.
const KNOWN: &[&str] = &[
    "additionalProperties",
    "allOf",
    "anyOf",
    "default",
    "description",
    "enum",
    "example",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "externalDocs",
    "format",
    "items",
    "maximum",
    "maxItems",
    "maxLength",
    "maxProperties",
    "minimum",
    "minItems",
    "minLength",
    "minProperties",
    "multipleOf",
    "not",
    "nullable",
    "oneOf",
    "pattern",
    "properties",
    "required",
    "title",
    "type",
    "x-kubernetes-embedded-resource",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-map-type",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
    "uniqueItems",
];
/// Fields that JSON Schema has and a definition may not use.
const UNSUPPORTED: &[&str] = &[
    "$ref",
    "$schema",
    "id",
    "definitions",
    "dependencies",
    "patternProperties",
    "additionalItems",
    "deprecated",
    "discriminator",
    "readOnly",
    "writeOnly",
    "xml",
];
/// The deepest nesting of a schema: one that is parsed has a limit of its own.
const DEPTH: usize = 120;

/// Checks a schema, or one that is `stored` as it is. `path` leads to `openAPIV3Schema`.
pub fn check(schema: &Value, stored: bool, path: Path<'_>, errors: &mut Errors) {
    let before = errors.0.len();
    let mut costs = Costs::new(stored);
    invariants(schema, Within { level: Level::Root, depth: 0, times: Some(1) }, path, &mut costs, errors);
    costs.judge(path, errors);
    if errors.0.len() > before {
        return;
    }
    complete(schema, schema, path, errors);
    defaults(schema, path, true, errors);
}

fn of<'v>(schema: &'v Value, key: &str) -> &'v str {
    schema[key].as_str().unwrap_or_default()
}

fn flag(schema: &Value, key: &str) -> bool {
    schema[key] == true
}

fn list<'v>(schema: &'v Value, key: &str) -> impl Iterator<Item = (usize, &'v Value)> {
    schema[key].as_array().into_iter().flatten().enumerate()
}

fn map<'v>(schema: &'v Value, key: &str) -> impl Iterator<Item = (&'v String, &'v Value)> {
    schema[key].as_object().into_iter().flatten()
}

fn is_int_or_string(any_of: &Value) -> bool {
    *any_of == json!([{"type": "integer"}, {"type": "string"}])
}

fn invariants(schema: &Value, within: Within, path: Path<'_>, costs: &mut Costs, errors: &mut Errors) {
    let Within { level, depth, .. } = within;
    if depth > DEPTH {
        return errors.invalid(path, "", format!("must not be nested deeper than {DEPTH} levels"));
    }
    if !schema.is_object() {
        return errors.invalid(path, schema.clone(), "must be a schema");
    }
    common(schema, path, errors);
    let kind = of(schema, "type");
    let (preserve, embedded, int_or_string) = (
        flag(schema, "x-kubernetes-preserve-unknown-fields"),
        flag(schema, "x-kubernetes-embedded-resource"),
        flag(schema, "x-kubernetes-int-or-string"),
    );
    if schema.get("x-kubernetes-preserve-unknown-fields").is_some_and(|v| *v == false) {
        errors.invalid(path.at("x-kubernetes-preserve-unknown-fields"), false, "must be true or undefined");
    }
    if kind == "array" && schema["items"].is_null() {
        errors.required(path.at("items"), "must be specified");
    }
    if schema["items"].is_array() {
        errors.forbidden(path.at("items"), "items must be a schema object and not an array");
    } else if !schema["items"].is_null() {
        invariants(&schema["items"], within.below(schema, Level::Item), path.at("items"), costs, errors);
    }
    for (key, child) in map(schema, "properties") {
        let list = path.at("properties");
        let at = list.key(key);
        if level == Level::Root && key == "metadata" {
            root_metadata(child, at, errors);
            continue;
        }
        invariants(child, within.below(schema, Level::Field), at, costs, errors);
    }
    if !schema["additionalProperties"].is_null() {
        let at = path.at("additionalProperties");
        if level == Level::Root {
            errors.forbidden(at, "must not be used at the root");
        }
        if schema["additionalProperties"] == false {
            errors.forbidden(at, "additionalProperties cannot be set to false");
        }
        if schema["additionalProperties"] != true && map(schema, "properties").next().is_some() {
            errors.forbidden(at, "additionalProperties and properties are mutual exclusive");
        }
        if embedded {
            errors.forbidden(at, "must not be used if x-kubernetes-embedded-resource is set");
        }
        if schema["additionalProperties"].is_object() {
            invariants(&schema["additionalProperties"], within.below(schema, Level::Field), at, costs, errors);
        }
    }
    if int_or_string && preserve {
        let at = path.at("x-kubernetes-preserve-unknown-fields");
        errors.invalid(at, true, "must be false if x-kubernetes-int-or-string is true");
    }
    if int_or_string && embedded {
        let at = path.at("x-kubernetes-embedded-resource");
        errors.invalid(at, true, "must be false if x-kubernetes-int-or-string is true");
    }
    if embedded && kind != "object" {
        let why = "must be object if x-kubernetes-embedded-resource is true";
        match kind {
            "" => errors.required(path.at("type"), why),
            kind => errors.invalid(path.at("type"), kind, why),
        }
    } else if kind.is_empty() && !int_or_string && !preserve {
        let why = match level {
            Level::Root => "must not be empty at the root",
            Level::Item => "must not be empty for specified array items",
            Level::Field => "must not be empty for specified object fields",
        };
        errors.required(path.at("type"), why);
    } else if level == Level::Root && !kind.is_empty() && kind != "object" {
        errors.invalid(path.at("type"), kind, "must be object at the root");
    }
    if embedded && !preserve && map(schema, "properties").next().is_none() {
        errors.required(
            path.at("properties"),
            "must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields",
        );
    }
    if level == Level::Root || embedded {
        let properties = path.at("properties");
        for (key, want) in [("kind", "string"), ("apiVersion", "string"), ("metadata", "object")] {
            let child = &schema["properties"][key];
            if child.is_object() && of(child, "type") != want {
                let at = properties.key(key);
                errors.invalid(at.at("type"), of(child, "type"), format!("must be {want}"));
            }
        }
    }
    if flag(schema, "nullable") && level == Level::Root {
        errors.forbidden(path.at("nullable"), "nullable cannot be true at the root");
    }
    lists(schema, path, errors);
    // The one pattern in which types may stand in a junctor.
    let skip = is_int_or_string(&schema["anyOf"]);
    let skip_first = is_int_or_string(&schema["allOf"][0]["anyOf"]);
    junctors(schema, (skip, skip_first), path, depth, errors);
    rules(schema, within, path, costs, errors);
}

fn root_metadata(schema: &Value, path: Path<'_>, errors: &mut Errors) {
    if of(schema, "type") != "object" {
        errors.invalid(path.at("type"), of(schema, "type"), "must be object");
    }
    let only =
        |allowed: &[&str], of: &Value| of.as_object().into_iter().flatten().all(|(k, _)| allowed.contains(&&**k));
    if !only(&["type", "properties", "description"], schema) || !only(&["name", "generateName"], &schema["properties"])
    {
        let why = "must not specify anything other than name and generateName, but metadata is implicitly specified";
        errors.forbidden(path, why);
    }
}

/// What holds at every place, in junctors as well.
fn common(schema: &Value, path: Path<'_>, errors: &mut Errors) {
    for (key, value) in schema.as_object().into_iter().flatten() {
        if UNSUPPORTED.contains(&&**key) {
            errors.forbidden(path.at(key), format!("{} is not supported", key.trim_start_matches('$')));
        } else if !KNOWN.contains(&&**key) {
            errors.forbidden(path.at(key), "is no field of a schema");
        }
        if key == "type" && value.as_str().is_none_or(|text| Kind::parse(text).is_none()) {
            let known = ["array", "boolean", "integer", "number", "object", "string"];
            errors.not_supported(path.at("type"), value.clone(), &known);
        }
    }
    if flag(schema, "uniqueItems") {
        let why = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
        errors.forbidden(path.at("uniqueItems"), why);
    }
    let pattern = of(schema, "pattern");
    if !pattern.is_empty()
        && let Err(error) = Regex::new(pattern)
    {
        let why = format!("must be a valid regular expression, but isn't: {error}");
        errors.invalid(path.at("pattern"), pattern, why);
    }
}

fn lists(schema: &Value, path: Path<'_>, errors: &mut Errors) {
    let kind = of(schema, "type");
    let keys: Vec<&str> = list(schema, "x-kubernetes-list-map-keys").filter_map(|(_, key)| key.as_str()).collect();
    let at = path.at("x-kubernetes-list-type");
    match schema["x-kubernetes-list-type"].as_str() {
        None => {}
        Some(found @ ("atomic" | "set" | "map")) if kind != "array" => {
            let _ = found;
            errors.invalid(path.at("type"), kind, "must be array if x-kubernetes-list-type is specified");
        }
        Some("atomic") => {}
        Some("set") => {
            let items = &schema["items"];
            if flag(items, "nullable") {
                let items = path.at("items");
                errors.forbidden(items.at("nullable"), "cannot be nullable when x-kubernetes-list-type is set");
            }
            let inner = path.at("items");
            match of(items, "type") {
                "object" if of(items, "x-kubernetes-map-type") != "atomic" => errors.invalid(
                    inner.at("x-kubernetes-map-type"),
                    items["x-kubernetes-map-type"].clone(),
                    "must be atomic as item of a list with x-kubernetes-list-type=set",
                ),
                "array" if !matches!(of(items, "x-kubernetes-list-type"), "" | "atomic") => errors.invalid(
                    inner.at("x-kubernetes-list-type"),
                    items["x-kubernetes-list-type"].clone(),
                    "must be atomic as item of a list with x-kubernetes-list-type=set",
                ),
                _ => {}
            }
        }
        Some("map") => {
            let inner = path.at("items");
            if of(&schema["items"], "type") != "object" {
                let why = "must be object if parent array's x-kubernetes-list-type is map";
                errors.invalid(inner.at("type"), of(&schema["items"], "type"), why);
            }
            if keys.is_empty() {
                let why = "must not be empty if x-kubernetes-list-type is map";
                errors.required(path.at("x-kubernetes-list-map-keys"), why);
            }
            let names = path.at("x-kubernetes-list-map-keys");
            for (index, key) in keys.iter().enumerate() {
                let property = &schema["items"]["properties"][*key];
                if property.is_null() {
                    errors.invalid(names.index(index), *key, "entries must all be names of item properties");
                    continue;
                }
                let inner = inner.at("properties");
                let property_at = inner.key(key);
                if matches!(of(property, "type"), "array" | "object") {
                    let why = "must be a scalar type if parent array's x-kubernetes-list-type is map";
                    errors.invalid(property_at.at("type"), of(property, "type"), why);
                }
                if flag(property, "nullable") {
                    let why = "cannot be nullable as a key of a list with x-kubernetes-list-type=map";
                    errors.forbidden(property_at.at("nullable"), why);
                }
                if keys[..index].contains(key) {
                    errors.duplicate(names.index(index), *key);
                }
                let required = list(&schema["items"], "required").any(|(_, name)| name == *key);
                if property.get("default").is_none() && !required {
                    let why = "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property";
                    errors.required(property_at.at("default"), why);
                }
            }
        }
        Some(other) => errors.not_supported(at, other, &["atomic", "map", "set"]),
    }
    if !keys.is_empty() && of(schema, "x-kubernetes-list-type") != "map" {
        match of(schema, "x-kubernetes-list-type") {
            "" => errors.required(at, "must be map if x-kubernetes-list-map-keys is non-empty"),
            other => errors.invalid(at, other, "must be map if x-kubernetes-list-map-keys is non-empty"),
        }
    }
    match schema["x-kubernetes-map-type"].as_str() {
        None => {}
        Some("atomic" | "granular") if kind != "object" => {
            errors.invalid(path.at("type"), kind, "must be object if x-kubernetes-map-type is specified");
        }
        Some("atomic" | "granular") => {}
        Some(other) => errors.not_supported(path.at("x-kubernetes-map-type"), other, &["atomic", "granular"]),
    }
}

fn junctors(schema: &Value, (skip, skip_first): (bool, bool), path: Path<'_>, depth: usize, errors: &mut Errors) {
    for key in ["anyOf", "allOf", "oneOf"] {
        if key == "anyOf" && skip {
            continue;
        }
        let all = path.at(key);
        for (index, child) in list(schema, key) {
            nested(child, key == "allOf" && index == 0 && skip_first, all.index(index), depth + 1, errors);
        }
    }
    if !schema["not"].is_null() {
        nested(&schema["not"], false, path.at("not"), depth + 1, errors);
    }
}

/// What stands in a junctor may only restrict values, not describe them.
fn nested(schema: &Value, skip: bool, path: Path<'_>, depth: usize, errors: &mut Errors) {
    if depth > DEPTH {
        return errors.invalid(path, "", format!("must not be nested deeper than {DEPTH} levels"));
    }
    if !schema.is_object() {
        return errors.invalid(path, schema.clone(), "must be a schema");
    }
    common(schema, path, errors);
    junctors(schema, (skip, false), path, depth, errors);
    if !schema["items"].is_null() {
        nested(&schema["items"], false, path.at("items"), depth + 1, errors);
    }
    let properties = path.at("properties");
    for (key, child) in map(schema, "properties") {
        if key == "metadata" {
            errors.forbidden(properties.key(key), "must not be specified in a nested context");
        }
        nested(child, false, properties.key(key), depth + 1, errors);
    }
    for (key, why) in [
        ("type", "must be empty to be structural"),
        ("additionalProperties", "must be undefined to be structural"),
        ("default", "must be undefined to be structural"),
        ("title", "must be empty to be structural"),
        ("description", "must be empty to be structural"),
        ("nullable", "must be false to be structural"),
        ("externalDocs", "must be undefined to be structural"),
        ("x-kubernetes-preserve-unknown-fields", "must be false to be structural"),
        ("x-kubernetes-embedded-resource", "must be false to be structural"),
        ("x-kubernetes-int-or-string", "must be false to be structural"),
        ("x-kubernetes-list-map-keys", "must be empty to be structural"),
        ("x-kubernetes-list-type", "must be undefined to be structural"),
        ("x-kubernetes-map-type", "must be undefined to be structural"),
        ("x-kubernetes-validations", "must be empty to be structural"),
    ] {
        let value = &schema[key];
        if !value.is_null() && *value != false && *value != "" {
            errors.forbidden(path.at(key), why);
        }
    }
}

/// Every field and every item that a junctor speaks of is also described outside of junctors.
fn complete(schema: &Value, outer: &Value, path: Path<'_>, errors: &mut Errors) {
    for key in ["anyOf", "allOf", "oneOf"] {
        let all = path.at(key);
        for (index, child) in list(schema, key) {
            described(child, outer, all.index(index), path, errors);
        }
    }
    if !schema["not"].is_null() {
        described(&schema["not"], outer, path.at("not"), path, errors);
    }
    let properties = path.at("properties");
    for (key, child) in map(schema, "properties") {
        complete(child, child, properties.key(key), errors);
    }
    for key in ["items", "additionalProperties"] {
        if schema[key].is_object() {
            complete(&schema[key], &schema[key], path.at(key), errors);
        }
    }
}

fn described(schema: &Value, outer: &Value, path: Path<'_>, outer_path: Path<'_>, errors: &mut Errors) {
    let properties = path.at("properties");
    let outer_properties = outer_path.at("properties");
    for (key, child) in map(schema, "properties") {
        match &outer["properties"][&**key] {
            Value::Null => {
                errors.required(outer_properties.key(key), &format!("because it is defined in {}", properties.key(key)))
            }
            found => described(child, found, properties.key(key), outer_properties.key(key), errors),
        }
    }
    if !schema["items"].is_null() {
        match &outer["items"] {
            Value::Null => {
                errors.required(outer_path.at("items"), &format!("because it is defined in {}", path.at("items")))
            }
            found => described(&schema["items"], found, path.at("items"), outer_path.at("items"), errors),
        }
    }
    for key in ["anyOf", "allOf", "oneOf"] {
        let all = path.at(key);
        for (index, child) in list(schema, key) {
            described(child, outer, all.index(index), outer_path, errors);
        }
    }
    if !schema["not"].is_null() {
        described(&schema["not"], outer, path.at("not"), outer_path, errors);
    }
}

/// Defaults must be what their own schema allows, and nothing that would be pruned.
fn defaults(schema: &Value, path: Path<'_>, root: bool, errors: &mut Errors) {
    if let Some(default) = schema.get("default").filter(|v| !v.is_null()) {
        let at = path.at("default");
        if root {
            errors.forbidden(at, "must not be set at the root");
        }
        let node = Node::below(schema);
        let mut found = Errors::default();
        validate::value(&node, at, default, None, &mut found);
        if found.is_empty() && default.is_object() {
            let mut pruned = default.clone();
            if !prune::prune(&node, &mut pruned).is_empty() {
                found.invalid(at, default.clone(), "must not have unknown fields");
            }
        }
        errors.0.extend(found.0);
    }
    let properties = path.at("properties");
    for (key, child) in map(schema, "properties") {
        defaults(child, properties.key(key), false, errors);
    }
    for key in ["items", "additionalProperties"] {
        if schema[key].is_object() {
            defaults(&schema[key], path.at(key), false, errors);
        }
    }
}

/// What rules say has to fit the values that the schema describes.
fn rules(schema: &Value, within: Within, path: Path<'_>, costs: &mut Costs, errors: &mut Errors) {
    let all = path.at("x-kubernetes-validations");
    if schema["x-kubernetes-validations"].is_null() {
        return;
    }
    let root = within.level == Level::Root || schema["x-kubernetes-embedded-resource"] == true;
    let subject = Type::of_schema(schema, root).unwrap_or(Type::Dyn);
    let sizes = Sizes::of_schema(schema, root).unwrap_or_default();
    let times = within.times.unwrap_or_else(|| sizes.most_in_request());
    for (index, rule) in list(schema, "x-kubernetes-validations") {
        let at = all.index(index);
        let (compiled, rule_cost, message_cost) = Compiled::estimate(rule, &subject, &sizes);
        costs.add("estimated rule cost", rule_cost.saturating_mul(times), at.at("rule"), errors);
        if compiled.rule.is_ok() {
            costs.add("estimated messageExpression cost", message_cost, at.at("messageExpression"), errors);
        }
        match compiled.rule {
            _ if of(rule, "rule").trim().is_empty() => errors.required(at.at("rule"), "rule is not specified"),
            Err(error) => errors.invalid(at.at("rule"), of(rule, "rule"), error),
            Ok(program) if program.is_never(&Type::Bool) => {
                errors.invalid(at.at("rule"), of(rule, "rule"), "cel expression must evaluate to a bool");
            }
            Ok(_) if rule["optionalOldSelf"].is_boolean() && !compiled.transition => {
                let why = "may not be set unless rule uses the variable oldSelf";
                errors.invalid(at.at("optionalOldSelf"), rule["optionalOldSelf"].clone(), why);
            }
            Ok(_) => {}
        }
        match compiled.message {
            Some(Err(error)) => errors.invalid(at.at("messageExpression"), of(rule, "messageExpression"), error),
            Some(Ok(program)) if program.is_never(&Type::String) => {
                let why = "messageExpression must evaluate to a string";
                errors.invalid(at.at("messageExpression"), of(rule, "messageExpression"), why);
            }
            _ => {}
        }
        if of(rule, "message").contains('\n') {
            errors.invalid(at.at("message"), of(rule, "message"), "message must not contain line breaks");
        }
        if rule["message"].is_string() && of(rule, "message").trim().is_empty() {
            errors.invalid(at.at("message"), of(rule, "message"), "message must be non-empty if specified");
        }
        const REASONS: [&str; 4] =
            ["FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired", "FieldValueDuplicate"];
        if let Some(reason) = rule["reason"].as_str().filter(|reason| !REASONS.contains(reason)) {
            errors.not_supported(at.at("reason"), reason, &REASONS);
        }
    }
}
