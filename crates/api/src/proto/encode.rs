//! Answers in protobuf.
//!
//! What is not set is not written: a reader in Go takes it for the zero value that it would have been sent as.

use base64::Engine as _;
use serde_json::{Map, Value};

use super::{Field, MAGIC, SCHEMA, TABLE, Union};
use crate::schema::{Schemas, Shape, TypeId};

/// Whether messages of this type can be written.
pub fn is_known(schemas: &Schemas, ty: TypeId) -> bool {
    TABLE.contains_key(&*schemas.get(ty).name)
}

/// An object of type `ty` as a message, without the envelope. What does not fit its type is left out.
pub fn message(schemas: &Schemas, ty: TypeId, object: &Value) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    if let Value::Object(object) = object {
        fields(schemas, ty, &schemas.get(ty).name, object, &mut out);
    }
    out
}

/// A message in its envelope: the magic bytes, what it is, and the message (upstream's `runtime.Unknown`).
pub fn envelope(api_version: &str, kind: &str, message: &[u8]) -> Vec<u8> {
    let mut out = head(api_version, kind);
    bytes(2, message, &mut out);
    tail(&mut out);
    out
}

/// The beginning of an envelope, up to its message.
fn head(api_version: &str, kind: &str) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    nested(1, &mut out, |out| {
        bytes(1, api_version.as_bytes(), out);
        bytes(2, kind.as_bytes(), out);
    });
    out
}

/// Neither compressed nor of another type.
fn tail(out: &mut Vec<u8>) {
    bytes(3, b"", out);
    bytes(4, b"", out);
}

/// The beginning of a list whose items are written as [`item`]s, and what follows them. `items` is the length of all items
/// together, in bytes, as [`item_length`] gives it.
pub fn list(api_version: &str, kind: &str, meta: &Value, items: usize) -> (Vec<u8>, Vec<u8>) {
    let mut first = Vec::new();
    nested(1, &mut first, |out| {
        for (field, key) in [(2, "resourceVersion"), (3, "continue")] {
            if let Some(text) = meta[key].as_str() {
                bytes(field, text.as_bytes(), out);
            }
        }
        if let Some(left) = meta["remainingItemCount"].as_u64() {
            number(4, left, out);
        }
    });
    let mut out = head(api_version, kind);
    tag(2, 2, &mut out);
    varint((first.len() + items) as u64, &mut out);
    out.extend(first);
    let mut end = Vec::new();
    tail(&mut end);
    (out, end)
}

/// The beginning of an item of a list, whose message of `length` bytes follows.
pub fn item(length: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(6);
    tag(2, 2, &mut out);
    varint(length as u64, &mut out);
    out
}

/// How long an item is that holds a message of `length` bytes.
pub fn item_length(length: usize) -> usize {
    item(length).len() + length
}

/// An event of a watch, with the length before it; `object` is in its envelope.
pub fn event(ty: &str, object: &[u8]) -> Vec<u8> {
    let mut event = Vec::with_capacity(object.len() + 32);
    bytes(1, ty.as_bytes(), &mut event);
    nested(2, &mut event, |out| bytes(1, object, out));
    let mut out = Vec::with_capacity(event.len() + 4);
    out.extend((event.len() as u32).to_be_bytes());
    out.extend(event);
    out
}

/// A field that holds a message.
pub fn field(number: u32, message: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len() + 6);
    bytes(number, message, &mut out);
    out
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn tag(number: u32, wire: u8, out: &mut Vec<u8>) {
    varint(u64::from(number) << 3 | u64::from(wire), out);
}

fn number(field: u32, value: u64, out: &mut Vec<u8>) {
    tag(field, 0, out);
    varint(value, out);
}

fn bytes(field: u32, content: &[u8], out: &mut Vec<u8>) {
    tag(field, 2, out);
    varint(content.len() as u64, out);
    out.extend_from_slice(content);
}

fn nested(field: u32, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    write(&mut inner);
    bytes(field, &inner, out);
}

/// The fields of the message `name`, from an object of type `ty`.
fn fields(schemas: &Schemas, ty: TypeId, name: &str, object: &Map<String, Value>, out: &mut Vec<u8>) {
    let (Some(known), Shape::Object(shapes)) = (TABLE.get(name), &schemas.get(ty).shape) else { return };
    for (number, field) in known {
        match field {
            Field::Embedded(embedded) => {
                let mut inner = Vec::new();
                fields(schemas, ty, embedded, object, &mut inner);
                if !inner.is_empty() {
                    bytes(*number, &inner, out);
                }
            }
            Field::Named { name, .. } => {
                if let (Some(value), Some(shape)) = (object.get(*name), shapes.get(*name)) {
                    field_of(schemas, shape.ty, *number, value, out);
                }
            }
        }
    }
}

fn field_of(schemas: &Schemas, ty: TypeId, field: u32, value: &Value, out: &mut Vec<u8>) {
    match (&schemas.get(ty).shape, value) {
        (_, Value::Null) => {}
        (Shape::Array(item), Value::Array(items)) => {
            items.iter().for_each(|value| single(schemas, *item, field, value, out));
        }
        (Shape::Map(item), Value::Object(entries)) => {
            for (key, value) in entries {
                nested(field, out, |out| {
                    bytes(1, key.as_bytes(), out);
                    match &schemas.get(*item).shape {
                        // A list as the value of a map is wrapped in a message of its own.
                        Shape::Array(_) => nested(2, out, |out| field_of(schemas, *item, 1, value, out)),
                        _ => single(schemas, *item, 2, value, out),
                    }
                });
            }
        }
        _ => single(schemas, ty, field, value, out),
    }
}

fn single(schemas: &Schemas, ty: TypeId, field: u32, value: &Value, out: &mut Vec<u8>) {
    let ty_ref = schemas.get(ty);
    match (&ty_ref.shape, value) {
        (Shape::String, Value::String(text)) => bytes(field, text.as_bytes(), out),
        (Shape::Bytes, Value::String(text)) => {
            if let Ok(decoded) = base64::engine::general_purpose::STANDARD.decode(text) {
                bytes(field, &decoded, out);
            }
        }
        (Shape::Int32 | Shape::Int64, Value::Number(n)) => {
            if let Some(n) = n.as_i64() {
                number(field, n as u64, out);
            }
        }
        (Shape::Boolean, Value::Bool(flag)) => number(field, u64::from(*flag), out),
        (Shape::Number, Value::Number(n)) => {
            if let Some(n) = n.as_f64() {
                tag(field, 1, out);
                out.extend(n.to_bits().to_le_bytes());
            }
        }
        (Shape::Time, Value::String(text)) => {
            if let Ok(time) = text.parse::<jiff::Timestamp>() {
                nested(field, out, |out| {
                    number(1, time.as_second() as u64, out);
                    number(2, time.subsec_nanosecond() as u64, out);
                });
            }
        }
        (Shape::Quantity, Value::String(text)) => nested(field, out, |out| bytes(1, text.as_bytes(), out)),
        (Shape::Quantity, Value::Number(n)) => nested(field, out, |out| bytes(1, n.to_string().as_bytes(), out)),
        (Shape::IntOrString, Value::Number(n)) => nested(field, out, |out| {
            number(1, 0, out);
            number(2, n.as_i64().unwrap_or_default() as u64, out);
        }),
        (Shape::IntOrString, Value::String(text)) => nested(field, out, |out| {
            number(1, 1, out);
            bytes(3, text.as_bytes(), out);
        }),
        (Shape::Any, value) => match (Union::of(ty_ref.short_name()), schemas.by_name(SCHEMA)) {
            (Some(union), Some(schema)) => nested(field, out, |out| match (union, value) {
                (Union::Flag, Value::Bool(flag)) => number(1, u64::from(*flag), out),
                (Union::Flag, schema_value) => {
                    number(1, 1, out);
                    single(schemas, schema, 2, schema_value, out);
                }
                (Union::Array, Value::Array(all)) => {
                    all.iter().for_each(|one| single(schemas, schema, 2, one, out));
                }
                (Union::Names, Value::Array(all)) => {
                    all.iter().filter_map(Value::as_str).for_each(|name| bytes(2, name.as_bytes(), out));
                }
                (_, schema_value) => single(schemas, schema, 1, schema_value, out),
            }),
            // A raw extension holds JSON.
            _ => nested(field, out, |out| bytes(1, value.to_string().as_bytes(), out)),
        },
        (Shape::Object(_), Value::Object(object)) => {
            nested(field, out, |out| fields(schemas, ty, &ty_ref.name, object, out));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::decode, *};
    use crate::resources;

    fn schemas() -> Schemas {
        Schemas::new(resources::all().iter().map(|row| row.schema))
    }

    /// What is written is read back as it was.
    #[track_caller]
    fn check(schemas: &Schemas, ty: &str, object: Value) {
        let ty = schemas.by_name(ty).unwrap();
        let (version, kind) = (object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
        let body = envelope(version, kind, &message(schemas, ty, &object));
        assert_eq!(decode(schemas, ty, &body).unwrap(), object);
    }

    #[test]
    fn objects_survive_the_way_there_and_back() {
        let schemas = schemas();
        check(
            &schemas,
            "io.k8s.api.core.v1.Pod",
            json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": "p", "namespace": "n", "creationTimestamp": "2026-01-02T03:04:05Z", "generation": 3,
                    "labels": {"a": "b", "": "c"}, "managedFields": [{"manager": "m", "fieldsV1": {"f:spec": {}}}]},
                "spec": {"containers": [{"name": "c", "image": "i", "command": ["x", ""],
                        "resources": {"limits": {"cpu": "100m"}},
                        "livenessProbe": {"httpGet": {"port": 80, "path": "/"}},
                        "readinessProbe": {"httpGet": {"port": "web"}, "periodSeconds": 5}}],
                    "terminationGracePeriodSeconds": 0, "hostNetwork": true,
                    "volumes": [{"name": "v", "emptyDir": {}}, {"name": "s", "secret": {"secretName": "t"}}]},
                "status": {"phase": "Running"}}),
        );
        check(
            &schemas,
            "io.k8s.api.core.v1.Secret",
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"k": "AAEC/w=="}}),
        );
        check(
            &schemas,
            "io.k8s.api.coordination.v1.Lease",
            json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"},
                "spec": {"renewTime": "2026-01-02T03:04:05.678901Z", "leaseDurationSeconds": 40}}),
        );
        check(
            &schemas,
            "io.k8s.api.certificates.v1.CertificateSigningRequest",
            json!({"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": {"name": "c"},
                "spec": {"request": "AAEC", "extra": {"scopes": ["a", "b"]}, "signerName": "s", "usages": ["x"]}}),
        );
        check(
            &schemas,
            "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition",
            json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "c"},
                "spec": {"group": "g", "versions": [{"name": "v1", "schema": {"openAPIV3Schema": {"type": "object",
                    "properties": {"a": {"type": "number", "minimum": 1.5, "default": {"x": [1]}},
                        "l": {"type": "array", "items": {"type": "string"}},
                        "m": {"type": "object", "additionalProperties": {"type": "string"}},
                        "n": {"type": "object", "additionalProperties": false}}}}}]}}),
        );
    }

    /// Fields of every built-in kind have a number here, or would be lost to clients that speak protobuf.
    #[test]
    fn every_field_of_every_kind_has_a_number() {
        let schemas = schemas();
        let mut missing = Vec::new();
        let mut seen = std::collections::HashSet::new();
        let mut todo: Vec<TypeId> = resources::all().iter().filter_map(|row| row.ty(&schemas)).collect();
        while let Some(ty) = todo.pop() {
            if !seen.insert(ty) {
                continue;
            }
            let named = schemas.get(ty);
            match &named.shape {
                Shape::Array(item) | Shape::Map(item) => todo.push(*item),
                Shape::Object(fields) => {
                    todo.extend(fields.values().map(|f| f.ty));
                    let mut numbered = Vec::new();
                    let mut messages = vec![&*named.name];
                    while let Some(message) = messages.pop() {
                        for field in TABLE.get(message).into_iter().flatten() {
                            match field.1 {
                                Field::Named { name, .. } => numbered.push(*name),
                                Field::Embedded(embedded) => messages.push(*embedded),
                            }
                        }
                    }
                    let unknown = fields.keys().filter(|key| !numbered.contains(&&***key));
                    // What an object is stands in the envelope.
                    let unknown = unknown.filter(|key| !matches!(&***key, "apiVersion" | "kind"));
                    missing.extend(unknown.map(|key| format!("{}.{key}", named.name)));
                }
                _ => {}
            }
        }
        missing.sort();
        // New in 1.37, and their numbers are not known here. Nothing of Seawall sets them.
        let unknown = [
            "io.k8s.api.core.v1.NodeSystemInfo.runningInUserNamespace",
            "io.k8s.api.resource.v1.DeviceCounterConsumption.compatibilityGroups",
            "io.k8s.api.resource.v1.DeviceDerivedAttribute.expression",
            "io.k8s.api.resource.v1.DeviceDerivedAttribute.name",
            "io.k8s.api.resource.v1.DeviceSubRequest.derivedAttributes",
            "io.k8s.api.resource.v1.ExactDeviceRequest.derivedAttributes",
        ];
        assert_eq!(missing, unknown);
    }

    #[test]
    fn lists_and_events() {
        let schemas = schemas();
        let ty = schemas.by_name("io.k8s.api.core.v1.ConfigMap").unwrap();
        let raw: Vec<Vec<u8>> = ["a", "b"]
            .map(|name| message(&schemas, ty, &json!({"metadata": {"name": name}, "data": {"k": "v"}})))
            .into();
        let length = raw.iter().map(|r| item_length(r.len())).sum();
        let (mut body, end) = list("v1", "ConfigMapList", &json!({"resourceVersion": "7"}), length);
        for raw in &raw {
            body.extend(item(raw.len()));
            body.extend(raw);
        }
        body.extend(end);
        // The version is field 2 of the list's metadata.
        let mut expect = MAGIC.to_vec();
        expect.extend(b"\x0a\x13\x0a\x02v1\x12\x0dConfigMapList");
        let items: Vec<u8> = raw.iter().flat_map(|r| [&[0x12, r.len() as u8][..], r].concat()).collect();
        let content = [&b"\x0a\x03\x12\x017"[..], &items].concat();
        expect.extend([&[0x12, content.len() as u8][..], &content].concat());
        expect.extend(b"\x1a\x00\x22\x00");
        assert_eq!(body, expect);
        assert_eq!(event("ADDED", b"xyz"), b"\0\0\0\x0e\x0a\x05ADDED\x12\x05\x0a\x03xyz");
    }
}
