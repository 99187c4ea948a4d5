//! Paths of fields, and what is wrong at them, phrased as upstream's `field.Error` is.

use std::fmt;

use serde_json::Value;

use crate::quantity::Quantity;

/// A path such as `spec.containers[0].name`, built without allocation while everything is valid.
#[derive(Clone, Copy)]
pub enum Path<'a> {
    /// The object itself.
    Root,
    /// A field.
    Field(&'a Path<'a>, &'a str),
    /// An item of a list.
    Index(&'a Path<'a>, usize),
    /// A key of a map, in brackets.
    Key(&'a Path<'a>, &'a str),
}

impl<'a> Path<'a> {
    /// The field `name` of what this path leads to.
    pub fn at(&'a self, name: &'a str) -> Path<'a> {
        Path::Field(self, name)
    }
    /// The item `index`.
    pub fn index(&'a self, index: usize) -> Path<'a> {
        Path::Index(self, index)
    }
    /// The map entry `key`.
    pub fn key(&'a self, key: &'a str) -> Path<'a> {
        Path::Key(self, key)
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root => Ok(()),
            Path::Field(Path::Root, name) => f.write_str(name),
            Path::Field(parent, name) => write!(f, "{parent}.{name}"),
            Path::Index(parent, index) => write!(f, "{parent}[{index}]"),
            Path::Key(parent, key) => write!(f, "{parent}[{key}]"),
        }
    }
}

/// The kind of a field's error, with upstream's name of the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The value is malformed or out of range.
    Invalid,
    /// The field must be set.
    Required,
    /// The value is not one of those that are known.
    NotSupported,
    /// The value stands twice where it may stand once.
    Duplicate,
    /// The field may not be set, or not be changed.
    Forbidden,
    /// The value is too long.
    TooLong,
    /// The list has too many items.
    TooMany,
    /// The field refers to something that does not exist.
    NotFound,
    /// The value is of another type than the schema says.
    TypeInvalid,
}

impl Reason {
    /// The `reason` of a cause in a Status.
    pub fn cause(self) -> &'static str {
        match self {
            Reason::Invalid => "FieldValueInvalid",
            Reason::Required => "FieldValueRequired",
            Reason::NotSupported => "FieldValueNotSupported",
            Reason::Duplicate => "FieldValueDuplicate",
            Reason::Forbidden => "FieldValueForbidden",
            Reason::TooLong => "FieldValueTooLong",
            Reason::TooMany => "FieldValueTooMany",
            Reason::NotFound => "FieldValueNotFound",
            Reason::TypeInvalid => "FieldValueTypeInvalid",
        }
    }
}

/// One thing that is wrong with an object.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    /// Its kind.
    pub reason: Reason,
    /// The path of the field.
    pub field: String,
    /// The message without the path, as it stands in a Status' cause.
    pub message: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// Everything that is wrong with an object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Errors(pub Vec<FieldError>);

impl Errors {
    fn push(&mut self, reason: Reason, path: Path<'_>, message: String) {
        // A hostile object can be wrong in more places than anyone reads.
        if self.0.len() < 100 {
            self.0.push(FieldError { reason, field: path.to_string(), message });
        }
    }

    /// `Invalid value: VALUE: DETAIL`.
    pub fn invalid(&mut self, path: Path<'_>, value: impl Into<Value>, detail: impl fmt::Display) {
        self.push(Reason::Invalid, path, format!("Invalid value: {}: {detail}", show(&value.into())));
    }

    /// `Required value: DETAIL`.
    pub fn required(&mut self, path: Path<'_>, detail: &str) {
        let detail = if detail.is_empty() { String::new() } else { format!(": {detail}") };
        self.push(Reason::Required, path, format!("Required value{detail}"));
    }

    /// `Unsupported value: VALUE: supported values: …`.
    pub fn not_supported(&mut self, path: Path<'_>, value: impl Into<Value>, supported: &[&str]) {
        let mut sorted = supported.to_vec();
        sorted.sort_unstable();
        let list: Vec<String> = sorted.iter().map(|s| format!("{s:?}")).collect();
        let message = format!("Unsupported value: {}: supported values: {}", show(&value.into()), list.join(", "));
        self.push(Reason::NotSupported, path, message);
    }

    /// The same for values that upstream lists in an order of its own.
    pub fn unsupported(&mut self, path: Path<'_>, value: impl Into<Value>, supported: &[&str]) {
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let message = format!("Unsupported value: {}: supported values: {}", show(&value.into()), list.join(", "));
        self.push(Reason::NotSupported, path, message);
    }

    /// `Invalid value: DETAIL`, where upstream does not repeat the value.
    pub fn invalid_unshown(&mut self, path: Path<'_>, detail: impl fmt::Display) {
        self.push(Reason::Invalid, path, format!("Invalid value: {detail}"));
    }

    /// `Invalid value: TEXT: …` unless the text keeps a rule, such as one of [`crate::names`].
    pub fn expect(&mut self, path: Path<'_>, text: &str, rule: impl Fn(&str) -> Result<(), String>) {
        if let Err(detail) = rule(text) {
            self.invalid(path, text, detail);
        }
    }

    /// The same for a text that must not be empty.
    pub fn expect_some(&mut self, path: Path<'_>, text: &Value, rule: impl Fn(&str) -> Result<(), String>) {
        match text.as_str().unwrap_or_default() {
            "" => self.required(path, ""),
            text => self.expect(path, text, rule),
        }
    }

    /// `Duplicate value: VALUE`.
    pub fn duplicate(&mut self, path: Path<'_>, value: impl Into<Value>) {
        self.push(Reason::Duplicate, path, format!("Duplicate value: {}", show(&value.into())));
    }

    /// `Forbidden: DETAIL`.
    pub fn forbidden(&mut self, path: Path<'_>, detail: impl fmt::Display) {
        self.push(Reason::Forbidden, path, format!("Forbidden: {detail}"));
    }

    /// `Too long: may not be more than MAX bytes`.
    pub fn too_long(&mut self, path: Path<'_>, max: usize) {
        self.push(Reason::TooLong, path, format!("Too long: may not be more than {max} bytes"));
    }

    /// `Too long: may not be more than MAX characters`.
    pub fn too_many_characters(&mut self, path: Path<'_>, max: usize) {
        self.push(Reason::TooLong, path, format!("Too long: may not be more than {max} characters"));
    }

    /// `Invalid value: VALUE: DETAIL`, of a value whose type is wrong.
    pub fn type_invalid(&mut self, path: Path<'_>, value: impl Into<Value>, detail: impl fmt::Display) {
        self.push(Reason::TypeInvalid, path, format!("Invalid value: {}: {detail}", show(&value.into())));
    }

    /// `Too many: COUNT: must have at most MAX items`.
    pub fn too_many(&mut self, path: Path<'_>, count: u64, max: u64) {
        let unit = if max == 1 { "item" } else { "items" };
        self.push(Reason::TooMany, path, format!("Too many: {count}: must have at most {max} {unit}"));
    }

    /// Something is wrong with an object that upstream blames on no field.
    pub fn whole(&mut self, detail: impl fmt::Display) {
        self.push(Reason::Invalid, Path::Root.at("<nil>"), format!("Invalid value: \"\": {detail}"));
    }

    /// `Not found: VALUE`.
    pub fn not_found(&mut self, path: Path<'_>, value: impl Into<Value>) {
        self.push(Reason::NotFound, path, format!("Not found: {}", show(&value.into())));
    }

    /// The same, with what could have been found.
    pub fn not_found_among(&mut self, path: Path<'_>, value: impl Into<Value>, detail: impl fmt::Display) {
        self.push(Reason::NotFound, path, format!("Not found: {}: {detail}", show(&value.into())));
    }

    /// A field that must not change on update.
    pub fn immutable(&mut self, path: Path<'_>, old: &Value, new: &Value) {
        if !same(old, new) {
            self.push(Reason::Invalid, path, format!("Invalid value: {}: field is immutable", show(new)));
        }
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0[..] {
            [one] => one.fmt(f),
            many => {
                let parts: Vec<String> = many.iter().map(ToString::to_string).collect();
                write!(f, "[{}]", parts.join(", "))
            }
        }
    }
}

/// Whether two values mean the same: what is missing, null and empty lists and maps are one, and so are quantities that
/// are written differently, as in upstream's semantic comparison.
pub fn same(a: &Value, b: &Value) -> bool {
    let empty = |v: &Value| match v {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(Value::is_null),
        _ => false,
    };
    match (a, b) {
        _ if empty(a) && empty(b) => true,
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(x), Value::Object(y)) => {
            x.iter().all(|(key, value)| same(value, &b[key]))
                && y.keys().all(|key| x.contains_key(key) || empty(&y[key]))
        }
        (Value::String(x), Value::String(y)) => {
            x == y || matches!((x.parse::<Quantity>(), y.parse::<Quantity>()), (Ok(x), Ok(y)) if x == y)
        }
        _ => a == b,
    }
}

fn show(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{text:?}"),
        Value::Null => "null".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_means_the_same() {
        for (a, b, expect) in [
            (json!({"a": []}), json!({}), true),
            (json!({"a": null, "b": 1}), json!({"b": 1, "c": {}}), true),
            (json!({"a": {"b": null}}), json!({}), true),
            (json!({"cpu": "1"}), json!({"cpu": "1000m"}), true),
            (json!({"cpu": "1"}), json!({"cpu": "2"}), false),
            (json!({"a": "x"}), json!({"a": ""}), false),
            (json!([1, 2]), json!([2, 1]), false),
            (json!(false), json!(null), false),
        ] {
            assert_eq!(same(&a, &b), expect, "{a} {b}");
            assert_eq!(same(&b, &a), expect, "{b} {a}");
        }
    }
}
