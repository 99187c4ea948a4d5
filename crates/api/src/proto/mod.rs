//! Protobuf (<https://kubernetes.io/docs/reference/using-api/api-concepts/#protobuf-encoding>), which client-go and
//! controller-runtime speak for built-in kinds.
//!
//! One decoder and one encoder ([`encode`]) serve all types: the schema says what a field holds, `schema/proto.txt` which
//! number it has (a fact a field: `1:name`, `2*pointer`, `3^io.k8s…EmbeddedType`).

pub mod encode;

use std::{
    collections::{BTreeMap, HashMap},
    sync::LazyLock,
};

use base64::Engine as _;
use serde_json::{Map, Number, Value};

use crate::schema::{Schemas, Shape, TypeId, check};

/// What precedes every message.
pub const MAGIC: &[u8] = b"k8s\0";
/// Messages nest no deeper than this.
const DEPTH: usize = 64;

/// A body that is not a message of the expected type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtoError {
    /// It does not start with the magic bytes.
    #[error("provided data does not appear to be a protobuf message, expected prefix 6b 38 73 00")]
    Magic,
    /// It ends in the middle of a field, or a field is malformed.
    #[error("proto: {0} is malformed")]
    Malformed(String),
    /// No field numbers are known for the type.
    #[error("{0} has no protobuf encoding here: send it as application/json")]
    UnknownType(String),
}

enum Field<'a> {
    /// A value of the object.
    Named { name: &'a str, pointer: bool },
    /// An embedded struct, whose fields are the object's own in JSON.
    Embedded(&'a str),
}

/// The fields of messages by their numbers.
type Table = HashMap<&'static str, BTreeMap<u32, Field<'static>>>;

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let mut table = HashMap::new();
    for line in include_str!("../schema/proto.txt").lines() {
        let mut words = line.split(' ');
        let Some(ty) = words.next() else { continue };
        let field = |word: &'static str| {
            let at = word.find([':', '*', '^'])?;
            let (number, rest) = (word[..at].parse().ok()?, &word[at + 1..]);
            let field = match &word[at..=at] {
                "^" => Field::Embedded(rest),
                kind => Field::Named { name: rest, pointer: kind == "*" },
            };
            Some((number, field))
        };
        table.insert(ty, words.filter_map(field).collect());
    }
    table
});

/// Where a field of an object stands in its message.
struct Place {
    /// Its number, in the innermost message.
    number: u32,
    /// The embedded messages in which it is, from the outermost on.
    inside: Vec<u32>,
}

/// The fields of objects by the names of their messages and their own.
static PLACES: LazyLock<HashMap<&'static str, HashMap<&'static str, Place>>> = LazyLock::new(|| {
    fn add(places: &mut HashMap<&'static str, Place>, message: &str, inside: &[u32]) {
        for (number, field) in TABLE.get(message).into_iter().flatten() {
            match field {
                Field::Named { name, .. } => {
                    places.insert(name, Place { number: *number, inside: inside.into() });
                }
                Field::Embedded(embedded) => add(places, embedded, &[inside, &[*number]].concat()),
            }
        }
    }
    let of = |message: &&'static str| {
        let mut places = HashMap::new();
        add(&mut places, message, &[]);
        (*message, places)
    };
    TABLE.keys().map(of).collect()
});

/// The full name of the JSON schemas of custom resources.
const SCHEMA: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";

/// Parts of a JSON schema that are a schema or something else: in JSON they stand as they are, here in a field each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Union {
    /// A schema (1), or several (2).
    Array,
    /// A truth value (1), or a schema (2).
    Flag,
    /// A schema (1), or names (2).
    Names,
}

impl Union {
    fn of(name: &str) -> Option<Union> {
        match name {
            "JSONSchemaPropsOrArray" => Some(Union::Array),
            "JSONSchemaPropsOrBool" => Some(Union::Flag),
            "JSONSchemaPropsOrStringArray" => Some(Union::Names),
            _ => None,
        }
    }
}

/// Decodes a body into a value of type `ty`, with the `apiVersion` and `kind` it carries.
pub fn decode(schemas: &Schemas, ty: TypeId, body: &[u8]) -> Result<Value, ProtoError> {
    let body = body.strip_prefix(MAGIC).ok_or(ProtoError::Magic)?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), None);
    for field in Reader(body) {
        match field? {
            (1, Wire::Bytes(meta)) => {
                for field in Reader(meta) {
                    match field? {
                        (1, Wire::Bytes(text)) => api_version = utf8("apiVersion", text)?,
                        (2, Wire::Bytes(text)) => kind = utf8("kind", text)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = Some(bytes),
            _ => {}
        }
    }
    let mut object = Map::new();
    let name = &*schemas.get(ty).name;
    message(schemas, ty, name, raw.unwrap_or_default(), &mut object, 0)?;
    if !api_version.is_empty() {
        object.insert("apiVersion".into(), api_version.into());
    }
    if !kind.is_empty() {
        object.insert("kind".into(), kind.into());
    }
    Ok(Value::Object(object))
}

/// A value on the wire.
enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
}

/// The fields of a message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u32, Wire<'a>)> {
        let tag = self.varint()?;
        let wire = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => Wire::Fixed64(u64::from_le_bytes(self.take(8)?.try_into().ok()?)),
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => Wire::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((u32::try_from(tag >> 3).ok()?, wire))
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<(u32, Wire<'a>), ProtoError>;
    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field().ok_or_else(|| ProtoError::Malformed("a field".into()));
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

fn utf8(what: &str, bytes: &[u8]) -> Result<String, ProtoError> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| ProtoError::Malformed(format!("{what} (invalid UTF-8)")))
}

/// Reads the fields of the message `name` into an object of type `ty`.
fn message(
    schemas: &Schemas,
    ty: TypeId,
    name: &str,
    bytes: &[u8],
    into: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtoError> {
    if depth > DEPTH {
        return Err(ProtoError::Malformed(format!("{name} (nested too deeply)")));
    }
    let fields = TABLE.get(name).ok_or_else(|| ProtoError::UnknownType(name.to_owned()))?;
    for field in Reader(bytes) {
        let (number, wire) = field?;
        match fields.get(&number) {
            // Newer clients may send what is not known here.
            None => {}
            Some(Field::Embedded(embedded)) => match wire {
                Wire::Bytes(bytes) => message(schemas, ty, embedded, bytes, into, depth + 1)?,
                _ => return Err(ProtoError::Malformed(format!("{name}.{embedded}"))),
            },
            Some(Field::Named { name: key, pointer }) => {
                let Shape::Object(known) = &schemas.get(ty).shape else { continue };
                let Some(known) = known.get(*key) else { continue };
                value(schemas, known.ty, key, *pointer, wire, into, depth)?;
            }
        }
    }
    Ok(())
}

fn value(
    schemas: &Schemas,
    ty: TypeId,
    key: &str,
    pointer: bool,
    wire: Wire<'_>,
    into: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtoError> {
    match (&schemas.get(ty).shape, wire) {
        (Shape::Array(item), wire) => {
            let item = single(schemas, *item, key, wire, depth)?;
            match into.entry(key).or_insert_with(|| Value::Array(Vec::new())) {
                Value::Array(items) => items.push(item),
                other => *other = item,
            }
        }
        (Shape::Map(item), Wire::Bytes(entry)) => {
            let (mut name, mut content) = (String::new(), None);
            for field in Reader(entry) {
                match field? {
                    (1, Wire::Bytes(bytes)) => name = utf8(key, bytes)?,
                    (2, wire) => {
                        // A list as the value of a map is wrapped in a message of its own.
                        let mut holder = Map::new();
                        match (&schemas.get(*item).shape, wire) {
                            (Shape::Array(_), Wire::Bytes(bytes)) => {
                                for field in Reader(bytes) {
                                    if let (1, wire) = field? {
                                        value(schemas, *item, "items", true, wire, &mut holder, depth + 1)?;
                                    }
                                }
                                content = holder.remove("items").or_else(|| Some(Value::Array(Vec::new())));
                            }
                            (_, wire) => content = Some(single(schemas, *item, key, wire, depth)?),
                        }
                    }
                    _ => {}
                }
            }
            let content = content.unwrap_or_else(|| Value::String(String::new()));
            match into.entry(key).or_insert_with(|| Value::Object(Map::new())) {
                Value::Object(map) => {
                    map.insert(name, content);
                }
                other => *other = content,
            }
        }
        (_, wire) => {
            let value = single(schemas, ty, key, wire, depth)?;
            // What is no pointer is always sent; its zero means that it was left out.
            let zero = match &value {
                Value::Null => true,
                Value::String(text) => text.is_empty(),
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::Bool(flag) => !flag,
                Value::Object(object) => object.is_empty(),
                Value::Array(_) => false,
            };
            if !value.is_null() && (pointer || !zero) {
                into.insert(key.to_owned(), value);
            }
        }
    }
    Ok(())
}

fn single(schemas: &Schemas, ty: TypeId, key: &str, wire: Wire<'_>, depth: usize) -> Result<Value, ProtoError> {
    let ty_ref = schemas.get(ty);
    let malformed = || ProtoError::Malformed(key.to_owned());
    Ok(match (&ty_ref.shape, wire) {
        (Shape::String, Wire::Bytes(bytes)) => utf8(key, bytes)?.into(),
        (Shape::Bytes, Wire::Bytes(bytes)) => base64::engine::general_purpose::STANDARD.encode(bytes).into(),
        (Shape::Int32 | Shape::Int64, Wire::Varint(n)) => (n as i64).into(),
        (Shape::Boolean, Wire::Varint(n)) => (n != 0).into(),
        (Shape::Number, Wire::Fixed64(bits)) => {
            Number::from_f64(f64::from_bits(bits)).map_or(Value::Null, Value::Number)
        }
        (Shape::Number, Wire::Fixed32(bits)) => {
            Number::from_f64(f32::from_bits(bits).into()).map_or(Value::Null, Value::Number)
        }
        (Shape::Time, Wire::Bytes(bytes)) => {
            let (mut seconds, mut nanos) = (0i64, 0i32);
            for field in Reader(bytes) {
                match field? {
                    (1, Wire::Varint(n)) => seconds = n as i64,
                    (2, Wire::Varint(n)) => nanos = n as i32,
                    _ => {}
                }
            }
            // An empty message is a time that is not set.
            if bytes.is_empty() {
                return Ok(Value::Null);
            }
            let at = jiff::Timestamp::new(seconds, nanos).map_err(|_| malformed())?;
            check::time(at, ty_ref.short_name()).ok_or_else(malformed)?.into()
        }
        (Shape::Quantity, Wire::Bytes(bytes)) => {
            let mut text = String::new();
            for field in Reader(bytes) {
                if let (1, Wire::Bytes(bytes)) = field? {
                    text = utf8(key, bytes)?;
                }
            }
            text.into()
        }
        (Shape::IntOrString, Wire::Bytes(bytes)) => {
            let (mut is_text, mut number, mut text) = (false, 0i64, String::new());
            for field in Reader(bytes) {
                match field? {
                    (1, Wire::Varint(n)) => is_text = n == 1,
                    (2, Wire::Varint(n)) => number = n as i64,
                    (3, Wire::Bytes(bytes)) => text = utf8(key, bytes)?,
                    _ => {}
                }
            }
            if is_text { text.into() } else { number.into() }
        }
        (Shape::Any, Wire::Bytes(bytes)) if let Some(union) = Union::of(ty_ref.short_name()) => {
            let props = || schemas.by_name(SCHEMA).ok_or_else(malformed);
            let (mut one, mut many, mut flag) = (None, Vec::new(), None);
            for field in Reader(bytes) {
                match (union, field?) {
                    (Union::Flag, (1, Wire::Varint(n))) => flag = Some(n != 0),
                    (Union::Flag, (2, wire)) | (Union::Array | Union::Names, (1, wire)) => {
                        one = Some(single(schemas, props()?, key, wire, depth + 1)?);
                    }
                    (Union::Array, (2, wire)) => many.push(single(schemas, props()?, key, wire, depth + 1)?),
                    (Union::Names, (2, Wire::Bytes(text))) => many.push(utf8(key, text)?.into()),
                    _ => {}
                }
            }
            match (union, one) {
                (_, Some(schema)) => schema,
                (Union::Flag, None) => flag.unwrap_or_default().into(),
                (_, None) => many.into(),
            }
        }
        (Shape::Any, Wire::Bytes(bytes)) => {
            // A raw extension holds JSON.
            let mut raw: &[u8] = b"";
            for field in Reader(bytes) {
                if let (1, Wire::Bytes(bytes)) = field? {
                    raw = bytes;
                }
            }
            if raw.is_empty() { Value::Null } else { serde_json::from_slice(raw).map_err(|_| malformed())? }
        }
        (Shape::Object(_), Wire::Bytes(bytes)) => {
            let mut object = Map::new();
            message(schemas, ty, &ty_ref.name, bytes, &mut object, depth + 1)?;
            Value::Object(object)
        }
        _ => return Err(malformed()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resources;

    fn bytes(number: u32, content: &[u8]) -> Vec<u8> {
        // Tests use fields below 16 and contents below 128 bytes.
        let mut out = vec![(number << 3 | 2) as u8, content.len() as u8];
        out.extend_from_slice(content);
        out
    }

    fn varint(number: u32, value: u8) -> Vec<u8> {
        vec![(number << 3) as u8, value]
    }

    fn check(ty: &str, raw: Vec<u8>) -> Result<Value, ProtoError> {
        let schemas = Schemas::new(resources::all().iter().map(|row| row.schema));
        let ty = schemas.by_name(ty).unwrap();
        let meta = [bytes(1, b"v1"), bytes(2, b"Kind")].concat();
        let body = [MAGIC.to_vec(), bytes(1, &meta), bytes(2, &raw)].concat();
        decode(&schemas, ty, &body)
    }

    #[test]
    fn config_map() {
        let meta = [bytes(1, b"a"), bytes(8, b""), bytes(5, b"")].concat();
        let raw = [bytes(1, &meta), bytes(2, &[bytes(1, b"k"), bytes(2, b"v")].concat()), varint(4, 0)].concat();
        let found = check("io.k8s.api.core.v1.ConfigMap", raw).unwrap();
        assert_eq!(
            found,
            json!({"apiVersion": "v1", "kind": "Kind", "metadata": {"name": "a"}, "data": {"k": "v"}, "immutable": false})
        );
    }

    #[test]
    fn embedded_structs_are_flat_and_zeros_of_pointers_stay() {
        // Deployment.spec.template.spec.volumes[0] = {name, emptyDir: {}}, replicas: 0, minReadySeconds: 0
        let volume = [bytes(1, b"v"), bytes(2, &bytes(2, b""))].concat();
        let template = bytes(2, &bytes(1, &volume));
        let spec = [varint(1, 0), bytes(3, &template), varint(5, 0)].concat();
        let found = check("io.k8s.api.apps.v1.Deployment", bytes(2, &spec)).unwrap();
        assert_eq!(
            found["spec"],
            json!({"replicas": 0, "template": {"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}}})
        );
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        assert!(matches!(check("io.k8s.api.core.v1.ConfigMap", vec![0x0a, 0x20, 1]), Err(ProtoError::Malformed(_))));
        let schemas = Schemas::new(resources::all().iter().map(|row| row.schema));
        let ty = schemas.by_name("io.k8s.api.core.v1.Pod").unwrap();
        assert_eq!(decode(&schemas, ty, b"{}"), Err(ProtoError::Magic));
    }

    proptest::proptest! {
        #[test]
        fn nothing_makes_it_panic(raw in proptest::collection::vec(proptest::num::u8::ANY, 0..120)) {
            let _ = check("io.k8s.api.core.v1.Pod", raw);
        }
    }
}
