//! Checks an object against the schema of its version, in upstream's words
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#validation>).
//!
//! An update that leaves a value as it is is not refused for it
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#validation-ratcheting>,
//! KEP-4008): errors below a place whose value is what it was are dropped.

use std::collections::HashSet;

use serde_json::{Number, Value};

use super::{
    format,
    schema::{Additional, Bound, Kind, Node, Rule},
};
use crate::{
    field::{Errors, Path},
    schema::ListType,
};

/// Evaluates the rules of a place.
///
/// The seam for CEL: the walk calls it for every value whose place has rules, from the outside in, with the value and
/// what stood there before the update. What is invalid by its schema is not asked about, as upstream has it.
pub trait Rules: Sync {
    /// Adds to `errors` what the rules say of `new`. `path` leads to it; `old` is there only for an update of a value
    /// that can be told to be the same one.
    fn check(&self, rules: &[Rule], node: &Node, path: Path<'_>, new: &Value, old: Option<&Value>, errors: &mut Errors);
}

/// No rule is evaluated.
pub struct NoRules;

impl Rules for NoRules {
    fn check(&self, _: &[Rule], _: &Node, _: Path<'_>, _: &Value, _: Option<&Value>, _: &mut Errors) {}
}

/// Checks an object; `old` is what it was before an update.
pub fn validate(root: &Node, new: &Value, old: Option<&Value>, rules: &dyn Rules, errors: &mut Errors) {
    let before = errors.0.len();
    value(root, Path::Root, new, old, errors);
    lists(root, new, old, errors);
    // Rules may rely on what the schema promises.
    if errors.0.len() == before && root.has_rules() {
        evaluate(root, Path::Root, new, old, rules, errors);
    }
}

/// Checks a value by itself: a default, say.
pub fn value(node: &Node, path: Path<'_>, new: &Value, old: Option<&Value>, errors: &mut Errors) {
    if old == Some(new) {
        return;
    }
    if new.is_null() && node.nullable {
        return;
    }
    if !is_of_kind(node, new) {
        let expected = if node.int_or_string { "integer,string" } else { node.kind.name() };
        let found = kind_name(new);
        errors.type_invalid(path, found, format!("{path} in body must be of type {expected}: {found:?}"));
        return;
    }
    scalars(node, path, new, errors);
    match new {
        Value::Object(map) => {
            let count = map.len() as u64;
            if let Some(least) = node.size.0.filter(|least| count < *least) {
                errors.invalid(path, count, format!("{path} in body should have at least {least} properties"));
            }
            if let Some(most) = node.size.1.filter(|most| count > *most) {
                errors.too_many(path, count, most);
            }
            for key in &node.required {
                if !map.contains_key(&**key) {
                    errors.required(path.at(key), "");
                }
            }
            if node.embedded {
                for key in ["apiVersion", "kind"] {
                    if map.get(key).and_then(Value::as_str).unwrap_or_default().is_empty() {
                        errors.required(path.at(key), "must not be empty");
                    }
                }
            }
            for (key, item) in map {
                if let Some(child) = node.child(key) {
                    value(child, path.at(key), item, old.and_then(|old| old.get(key)), errors);
                }
            }
        }
        Value::Array(list) => {
            let count = list.len() as u64;
            if let Some(least) = node.count.0.filter(|least| count < *least) {
                errors.invalid(path, count, format!("{path} in body should have at least {least} items"));
            }
            if let Some(most) = node.count.1.filter(|most| count > *most) {
                errors.too_many(path, count, most);
            }
            if node.unique && duplicate(list).is_some() {
                errors.invalid(path, "", format!("{path} in body shouldn't contain duplicates"));
            }
            if let Some(items) = &node.items {
                for (index, item) in list.iter().enumerate() {
                    value(items, path.index(index), item, counterpart(node, item, old), errors);
                }
            }
        }
        _ => {}
    }
    junctors(node, path, new, errors);
}

/// The item of the old list that this one is a new state of: only lists of type map can tell.
fn counterpart<'v>(node: &Node, item: &Value, old: Option<&'v Value>) -> Option<&'v Value> {
    if node.list != ListType::Map {
        return None;
    }
    old?.as_array()?.iter().find(|old| node.keys.iter().all(|key| old.get(&**key) == item.get(&**key)))
}

fn is_of_kind(node: &Node, value: &Value) -> bool {
    if node.int_or_string {
        return value.is_string() || is_integer(value);
    }
    match node.kind {
        Kind::Any => true,
        Kind::Object => value.is_object(),
        Kind::Array => value.is_array(),
        Kind::String => value.is_string(),
        Kind::Integer => is_integer(value),
        Kind::Number => value.is_number(),
        Kind::Boolean => value.is_boolean(),
    }
}

fn is_integer(value: &Value) -> bool {
    match value {
        Value::Number(number) => {
            number.is_i64() || number.is_u64() || number.as_f64().is_some_and(|f| f.fract() == 0.0)
        }
        _ => false,
    }
}

fn kind_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) if is_integer(value) => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// A number as Go prints it: without a point when it is whole.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 {
        return Value::from(value as i64);
    }
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

fn scalars(node: &Node, path: Path<'_>, new: &Value, errors: &mut Errors) {
    if !node.one_of_values.is_empty() && !node.one_of_values.iter().any(|known| same(known, new)) {
        let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
        let known: Vec<String> = node.one_of_values.iter().map(text).collect();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        errors.not_supported(path, new.clone(), &known);
    }
    match new {
        Value::String(text) => {
            let count = text.chars().count() as u64;
            if let Some(least) = node.length.0.filter(|least| count < *least) {
                errors.invalid(path, &**text, format!("{path} in body should be at least {least} chars long"));
            }
            if let Some(most) = node.length.1.filter(|most| count > *most) {
                errors.too_long(path, most as usize);
            }
            if let Some((pattern, Some(regex))) = &node.pattern
                && !regex.is_match(text)
            {
                errors.invalid(path, &**text, format!("{path} in body should match '{pattern}'"));
            }
            if !node.format.is_empty() && !node.int_or_string && !format::is_valid(&node.format, text) {
                let why = format!("{path} in body must be of type {}: {text:?}", node.format);
                errors.invalid(path, &**text, why);
            }
        }
        Value::Number(found) => {
            let found = found.as_f64().unwrap_or_default();
            let mut say = |bad: bool, words: &str, bound: f64| {
                if bad {
                    errors.invalid(path, new.clone(), format!("{path} in body should be {words} {}", number(bound)));
                }
            };
            if let Some(Bound { value, exclusive }) = node.maximum {
                match exclusive {
                    true => say(found >= value, "less than", value),
                    false => say(found > value, "less than or equal to", value),
                }
            }
            if let Some(Bound { value, exclusive }) = node.minimum {
                match exclusive {
                    true => say(found <= value, "greater than", value),
                    false => say(found < value, "greater than or equal to", value),
                }
            }
            if let Some(factor) = node.multiple_of {
                let times = found / factor;
                say((times - times.round()).abs() > 1e-9, "a multiple of", factor);
            }
        }
        _ => {}
    }
}

/// Whether two values are the same, numbers by what they mean.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

fn junctors(node: &Node, path: Path<'_>, new: &Value, errors: &mut Errors) {
    let judge = |node: &Node| {
        let mut found = Errors::default();
        value(node, path, new, None, &mut found);
        found
    };
    // These complaints have no field of their own upstream.
    let name = path.to_string();
    let fewest = |all: Vec<Errors>| all.into_iter().min_by_key(|errors| errors.0.len()).unwrap_or_default();
    if !node.any_of.is_empty() {
        let all: Vec<Errors> = node.any_of.iter().map(judge).collect();
        if all.iter().all(|errors| !errors.is_empty()) {
            errors.whole(format!("{name:?} must validate at least one schema (anyOf)"));
            errors.0.extend(fewest(all).0);
        }
    }
    if !node.one_of.is_empty() {
        let all: Vec<Errors> = node.one_of.iter().map(judge).collect();
        match all.iter().filter(|errors| errors.is_empty()).count() {
            1 => {}
            0 => {
                errors.whole(format!("{name:?} must validate one and only one schema (oneOf). Found none valid"));
                errors.0.extend(fewest(all).0);
            }
            many => errors.whole(format!(
                "{name:?} must validate one and only one schema (oneOf). Found {many} valid alternatives"
            )),
        }
    }
    if !node.all_of.is_empty() {
        let all: Vec<Errors> = node.all_of.iter().map(judge).collect();
        let good = all.iter().filter(|errors| errors.is_empty()).count();
        for bad in all {
            errors.0.extend(bad.0);
        }
        if good < node.all_of.len() {
            let none = if good == 0 { ". None validated" } else { "" };
            errors.whole(format!("{name:?} must validate all the schemas (allOf){none}"));
        }
    }
    if let Some(not) = &node.not
        && judge(not).is_empty()
    {
        errors.whole(format!("{name:?} must not validate the schema (not)"));
    }
}

/// The place of an item that stands there before as well.
fn duplicate(list: &[Value]) -> Option<usize> {
    let mut seen = HashSet::with_capacity(list.len());
    list.iter().position(|item| !seen.insert(item.to_string()))
}

/// Refuses lists that are said to be sets or maps and have duplicates, unless they had them before.
fn lists(root: &Node, new: &Value, old: Option<&Value>, errors: &mut Errors) {
    let mut found = Errors::default();
    list_types(root, Path::Root, new, &mut found);
    if found.is_empty() {
        return;
    }
    let had = old.is_some_and(|old| {
        let mut before = Errors::default();
        list_types(root, Path::Root, old, &mut before);
        !before.is_empty()
    });
    if !had {
        errors.0.extend(found.0);
    }
}

fn list_types(node: &Node, path: Path<'_>, value: &Value, errors: &mut Errors) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if let Some(child) = node.child(key) {
                    list_types(child, path.at(key), value, errors);
                }
            }
        }
        Value::Array(list) => {
            let identity = |item: &Value| -> Value {
                match node.list {
                    ListType::Map => node
                        .keys
                        .iter()
                        .filter_map(|key| Some((key.to_string(), item.get(&**key)?.clone())))
                        .collect::<serde_json::Map<_, _>>()
                        .into(),
                    _ => item.clone(),
                }
            };
            if node.list != ListType::Atomic {
                let mut seen = HashSet::with_capacity(list.len());
                for (index, item) in list.iter().enumerate() {
                    let identity = identity(item);
                    if !seen.insert(identity.to_string()) {
                        errors.duplicate(path.index(index), identity);
                    }
                }
            }
            if let Some(items) = &node.items {
                for (index, item) in list.iter().enumerate() {
                    list_types(items, path.index(index), item, errors);
                }
            }
        }
        _ => {}
    }
}

fn evaluate(node: &Node, path: Path<'_>, new: &Value, old: Option<&Value>, rules: &dyn Rules, errors: &mut Errors) {
    if !node.rules.is_empty() && !new.is_null() {
        rules.check(&node.rules, node, path, new, old, errors);
    }
    match new {
        Value::Object(map) => {
            for (key, value) in map {
                let old = old.and_then(|old| old.get(key));
                match (node.properties.get(&**key), &node.additional) {
                    (Some(child), _) => evaluate(child, path.at(key), value, old, rules, errors),
                    (None, Additional::Schema(child)) => evaluate(child, path.key(key), value, old, rules, errors),
                    _ => {}
                }
            }
        }
        Value::Array(list) => {
            if let Some(items) = &node.items {
                for (index, item) in list.iter().enumerate() {
                    evaluate(items, path.index(index), item, counterpart(node, item, old), rules, errors);
                }
            }
        }
        _ => {}
    }
}
