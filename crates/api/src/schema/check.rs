//! Decoding: JSON that a client sent becomes a value of a known type, or an error that names the field.

use std::fmt;

use jiff::Timestamp;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{Schemas, Shape, TypeId};
use crate::quantity::Quantity;

/// What was wrong with a value's type. Phrased like Go's `encoding/json`, which is what users search for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// A JSON value of the wrong kind.
    #[error("json: cannot unmarshal {found} into Go struct field {place} of type {expected}")]
    Mismatch {
        /// The kind of value that was found.
        found: &'static str,
        /// `Struct.path.to.field`.
        place: String,
        /// The Go type that was expected.
        expected: String,
    },
    /// A quantity that cannot be parsed.
    #[error(
        "unable to parse quantity {value:?} in {place}: quantities must match the regular expression \
         '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
    )]
    Quantity {
        /// The path of the field.
        place: String,
        /// What was found.
        value: String,
    },
    /// A time that is not RFC 3339.
    #[error("parsing time {value:?} in {place}: cannot parse as RFC 3339, e.g. \"2006-01-02T15:04:05Z\"")]
    Time {
        /// The path of the field.
        place: String,
        /// What was found.
        value: String,
    },
    /// Bytes that are not base64.
    #[error("illegal base64 data in {place}")]
    Base64 {
        /// The path of the field.
        place: String,
    },
}

/// Brings `value` into the form that is stored: unknown fields and nulls leave it, quantities and times become
/// canonical.
/// Returns the paths of the unknown fields, in order.
pub fn conform(schemas: &Schemas, ty: TypeId, value: &mut Value) -> Result<Vec<String>, TypeError> {
    let mut checker = Checker { schemas, path: Vec::new(), owner: schemas.get(ty).short_name(), unknown: Vec::new() };
    checker.visit(ty, value)?;
    Ok(checker.unknown)
}

struct Checker<'a> {
    schemas: &'a Schemas,
    path: Vec<Step>,
    owner: &'a str,
    unknown: Vec<String>,
}

enum Step {
    Field(Box<str>),
    Key(Box<str>),
    Index(usize),
}

impl<'a> Checker<'a> {
    fn visit(&mut self, ty: TypeId, value: &mut Value) -> Result<(), TypeError> {
        let schemas = self.schemas;
        let ty = schemas.get(ty);
        match (&ty.shape, &mut *value) {
            (Shape::Any | Shape::Free, _) | (Shape::String, Value::String(_)) | (Shape::Boolean, Value::Bool(_)) => {
                Ok(())
            }
            (Shape::Object(fields), Value::Object(object)) => {
                let owner = self.owner;
                if !ty.name.is_empty() {
                    self.owner = ty.short_name();
                }
                object.retain(|key, value| {
                    let known = fields.contains_key(key.as_str());
                    if !known {
                        self.path.push(Step::Field(key.as_str().into()));
                        complain(&mut self.unknown, || place(&self.path));
                        self.path.pop();
                    }
                    known && !value.is_null()
                });
                for (key, value) in object.iter_mut() {
                    if let Some(field) = fields.get(key.as_str()) {
                        self.path.push(Step::Field(key.as_str().into()));
                        self.visit(field.ty, value)?;
                        self.path.pop();
                    }
                }
                self.owner = owner;
                Ok(())
            }
            (Shape::Map(item), Value::Object(object)) => {
                for (key, value) in object.iter_mut() {
                    self.path.push(Step::Key(key.as_str().into()));
                    match (value.is_null(), &schemas.get(*item).shape) {
                        (true, Shape::String | Shape::Bytes) => *value = Value::String(String::new()),
                        (true, _) => {}
                        (false, _) => self.visit(*item, value)?,
                    }
                    self.path.pop();
                }
                object.retain(|_, value| !value.is_null());
                Ok(())
            }
            (Shape::Array(item), Value::Array(items)) => {
                for (index, value) in items.iter_mut().enumerate() {
                    self.path.push(Step::Index(index));
                    self.visit(*item, value)?;
                    self.path.pop();
                }
                Ok(())
            }
            (Shape::Bytes, Value::String(text)) => {
                use base64::Engine as _;
                // Line breaks are allowed, as Go's decoder skips them.
                if text.contains(['\n', '\r']) {
                    text.retain(|c| c != '\n' && c != '\r');
                }
                match base64::engine::general_purpose::STANDARD.decode(text.as_bytes()) {
                    Ok(_) => Ok(()),
                    Err(_) => Err(TypeError::Base64 { place: self.place() }),
                }
            }
            (Shape::Time, Value::String(text)) => match text.parse().ok().and_then(|at| time(at, ty.short_name())) {
                Some(canonical) => {
                    *text = canonical;
                    Ok(())
                }
                None => Err(TypeError::Time { place: self.place(), value: text.clone() }),
            },
            (Shape::Int32, Value::Number(number)) => match integer(number) {
                Some(n) if i32::try_from(n).is_ok() => {
                    *value = n.into();
                    Ok(())
                }
                _ => Err(self.mismatch("number", &ty.shape, ty.short_name())),
            },
            (Shape::Int64, Value::Number(number)) => match integer(number) {
                Some(n) => {
                    *value = n.into();
                    Ok(())
                }
                None => Err(self.mismatch("number", &ty.shape, ty.short_name())),
            },
            (Shape::Number, Value::Number(_)) => Ok(()),
            (Shape::IntOrString, Value::String(_) | Value::Number(_)) => Ok(()),
            (Shape::Quantity, Value::String(_) | Value::Number(_)) => {
                let text = match &*value {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                };
                match text.parse::<Quantity>() {
                    Ok(quantity) => {
                        *value = Value::String(quantity.to_string());
                        Ok(())
                    }
                    Err(_) => Err(TypeError::Quantity { place: self.place(), value: text }),
                }
            }
            (shape, found) => {
                let found = match found {
                    Value::Null => "null",
                    Value::Bool(_) => "bool",
                    Value::Number(_) => "number",
                    Value::String(_) => "string",
                    Value::Array(_) => "array",
                    Value::Object(_) => "object",
                };
                Err(self.mismatch(found, shape, ty.short_name()))
            }
        }
    }

    fn mismatch(&self, found: &'static str, shape: &Shape, name: &str) -> TypeError {
        let place: Vec<&str> = self
            .path
            .iter()
            .filter_map(|step| match step {
                Step::Field(name) | Step::Key(name) => Some(&**name),
                Step::Index(_) => None,
            })
            .collect();
        TypeError::Mismatch {
            found,
            place: format!("{}.{}", self.owner, place.join(".")),
            expected: self.go_type(shape, name),
        }
    }

    fn go_type(&self, shape: &Shape, name: &str) -> String {
        let of = |ty: &TypeId| {
            let ty = self.schemas.get(*ty);
            self.go_type(&ty.shape, ty.short_name())
        };
        match shape {
            Shape::Object(_) => format!("v1.{name}"),
            Shape::Map(item) => format!("map[string]{}", of(item)),
            Shape::Array(item) => format!("[]{}", of(item)),
            Shape::String => "string".into(),
            Shape::Bytes => "[]uint8".into(),
            Shape::Time => "v1.Time".into(),
            Shape::Int32 => "int32".into(),
            Shape::Int64 => "int64".into(),
            Shape::Number => "float64".into(),
            Shape::Boolean => "bool".into(),
            Shape::IntOrString => "intstr.IntOrString".into(),
            Shape::Quantity => "resource.Quantity".into(),
            Shape::Any | Shape::Free => "interface {}".into(),
        }
    }

    fn place(&self) -> String {
        place(&self.path)
    }
}

fn place(path: &[Step]) -> String {
    let mut out = String::new();
    for step in path {
        match step {
            Step::Field(name) | Step::Key(name) => {
                if !out.is_empty() {
                    out.push('.');
                }
                out.push_str(name);
            }
            Step::Index(index) => out.push_str(&format!("[{index}]")),
        }
    }
    out
}

/// Keeps a path of which something is to be said. A hostile object has more of them than anyone reads, and longer ones.
pub(crate) fn complain(list: &mut Vec<String>, path: impl FnOnce() -> String) {
    const MOST: usize = 100;
    const LONGEST: usize = 1000;
    if list.len() < MOST {
        let mut path = path();
        path.truncate(path.floor_char_boundary(LONGEST));
        list.push(path);
    }
}

/// The first second of the year 0.
const YEAR_ZERO: i64 = -62_167_219_200;

/// A time as upstream writes it, whatever the client wrote: in UTC, to the second or, if its type is `MicroTime`, to the
/// microsecond. Nothing if its year has no four digits: clients could not read it.
pub fn time(at: Timestamp, type_name: &str) -> Option<String> {
    let form = if type_name == "MicroTime" { "%Y-%m-%dT%H:%M:%S%.6fZ" } else { "%Y-%m-%dT%H:%M:%SZ" };
    (at.as_second() >= YEAR_ZERO).then(|| at.strftime(form).to_string())
}

/// An integer, also one that was written as `3.0`.
fn integer(number: &Number) -> Option<i64> {
    number.as_i64().or_else(|| {
        let float = number.as_f64()?;
        (float.fract() == 0.0 && float.abs() < 9e15).then_some(float as i64)
    })
}

/// The deepest nesting that is accepted; serde_json's own limit is the same.
const DEPTH: usize = 128;

/// Parses JSON and reports the paths of keys that an object has twice (the last one wins, as in Go).
pub fn parse(bytes: &[u8]) -> Result<(Value, Vec<String>), serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let read = read(&mut deserializer, usize::MAX)?;
    deserializer.end()?;
    Ok(read)
}

/// Reads a document of any form, as [`parse`] does. Its values and the bytes of its texts may be no more than `most` together:
/// where a document can refer to parts of itself, as in YAML, little makes much.
pub fn read<'de, D: Deserializer<'de>>(deserializer: D, most: usize) -> Result<(Value, Vec<String>), D::Error> {
    let mut reading = Reading { path: Vec::new(), duplicates: Vec::new(), left: most };
    let value = Node(&mut reading).deserialize(deserializer)?;
    Ok((value, reading.duplicates))
}

/// How far a document has been read.
struct Reading {
    path: Vec<Step>,
    duplicates: Vec<String>,
    left: usize,
}

impl Reading {
    fn pay<E: Error>(&mut self, amount: usize) -> Result<(), E> {
        let left = self.left.checked_sub(amount);
        self.left = left.ok_or_else(|| E::custom("the document refers to too much of itself"))?;
        Ok(())
    }

    fn go_down<E: Error>(&self) -> Result<(), E> {
        if self.path.len() > DEPTH { Err(E::custom("exceeded max depth")) } else { Ok(()) }
    }
}

struct Node<'a>(&'a mut Reading);

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.0.pay::<D::Error>(1)?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }
    fn visit_str<E: Error>(self, v: &str) -> Result<Value, E> {
        self.0.pay::<E>(v.len())?;
        Ok(Value::String(v.to_owned()))
    }
    fn visit_string<E: Error>(self, v: String) -> Result<Value, E> {
        self.0.pay::<E>(v.len())?;
        Ok(Value::String(v))
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        self.0.go_down::<A::Error>()?;
        let mut items = Vec::new();
        loop {
            self.0.path.push(Step::Index(items.len()));
            let item = seq.next_element_seed(Node(&mut *self.0))?;
            self.0.path.pop();
            match item {
                Some(item) => items.push(item),
                None => return Ok(Value::Array(items)),
            }
        }
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        self.0.go_down::<A::Error>()?;
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            self.0.pay::<A::Error>(key.len())?;
            self.0.path.push(Step::Key(key.as_str().into()));
            if object.contains_key(&key) {
                let Reading { path, duplicates, .. } = &mut *self.0;
                complain(duplicates, || place(path));
            }
            let value = map.next_value_seed(Node(&mut *self.0))?;
            self.0.path.pop();
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}
