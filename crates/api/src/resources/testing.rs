//! How the tests of resources ask: an object, and what is wrong with it in the words a client reads.

use serde_json::Value;

use crate::{
    field::Errors,
    row::{Row, Validation},
};

fn found(row: &Row, new: &Value, old: Option<&Value>, subresource: &str) -> Vec<String> {
    let mut errors = Errors::default();
    (row.validate)(&Validation { new, old, subresource }, &mut errors);
    errors.0.iter().map(ToString::to_string).collect()
}

/// What is wrong with a new object, after defaults.
pub(super) fn check(row: &Row, mut object: Value, expect: &[&str]) {
    (row.defaults)(&mut object);
    assert_eq!(found(row, &object, None, ""), expect, "{object:#}");
}

/// What is wrong with an update.
pub(super) fn check_update(row: &Row, mut old: Value, mut new: Value, expect: &[&str]) {
    (row.defaults)(&mut old);
    (row.defaults)(&mut new);
    assert_eq!(found(row, &new, Some(&old), ""), expect, "{old:#} {new:#}");
}

/// What is wrong with an update of the status.
pub(super) fn check_status(row: &Row, old: Value, new: Value, expect: &[&str]) {
    assert_eq!(found(row, &new, Some(&old), "status"), expect, "{old:#} {new:#}");
}

/// The object with another value at a JSON pointer; null takes the field away.
pub(super) fn with(base: &Value, pointer: &str, value: Value) -> Value {
    let mut out = base.clone();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match out.pointer_mut(parent).unwrap() {
        Value::Array(list) => list[key.parse::<usize>().unwrap()] = value,
        parent if value.is_null() => drop(parent.as_object_mut().unwrap().remove(key)),
        parent => parent[key] = value,
    }
    out
}
