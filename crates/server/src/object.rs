//! Stored objects as bytes.
//!
//! An object is encoded once, when it is written, with `apiVersion`, `kind` and `metadata` first. What the store's
//! revision adds (`resourceVersion`) is spliced in behind the opening brace of `metadata`, and items of a list start at
//! `metadata`, since lists of built-in kinds leave the first two out.

mod texts;

use std::{borrow::Cow, sync::Arc};

use arc_swap::ArcSwapOption;
use bytes::{BufMut, Bytes, BytesMut};
use seawall_api::{
    Row,
    selector::{FieldRequirement, LabelSelector},
};
use seawall_store::{Entry, Revision};
use serde_json::Value;
use texts::Texts;

use crate::lean;

/// An object as the cache holds it.
#[derive(Debug)]
pub struct Object {
    /// The key in the store.
    pub key: Arc<str>,
    /// The JSON without `resourceVersion`.
    pub bytes: Bytes,
    /// What the store holds, where that differs: a custom resource may have got defaults since the object was written.
    stored: Option<Box<Bytes>>,
    /// The revision of the last write.
    pub revision: Revision,
    /// Where `"metadata"` starts.
    meta: u32,
    /// Just behind the opening brace of the metadata.
    head: u32,
    /// Just behind the closing one.
    tail: u32,
    /// Fields in the order of the row's selectable ones, and labels.
    texts: Texts,
    /// The object in protobuf with its resource version, for a while after somebody has listed it so.
    message: ArcSwapOption<Bytes>,
}

/// Bytes in the store that are not an object: they were written by something else.
#[derive(Debug, thiserror::Error)]
#[error("the value of {key} is not an object of this server: {reason}")]
pub struct Malformed {
    key: Arc<str>,
    reason: String,
}

/// Encodes an object for the store.
pub fn encode(object: &Value) -> Bytes {
    let mut out = Vec::with_capacity(4096);
    let write = |out: &mut Vec<u8>, value: &Value| {
        // Writing JSON into memory cannot fail: keys are strings and there is no I/O.
        serde_json::to_writer(out, value).expect("JSON is written into memory");
    };
    out.push(b'{');
    let mut first = true;
    let mut field = |out: &mut Vec<u8>, key: &str, value: &Value| {
        if !first {
            out.push(b',');
        }
        first = false;
        write(out, &Value::from(key));
        out.push(b':');
        write(out, value);
    };
    const LEADING: [&str; 3] = ["apiVersion", "kind", "metadata"];
    for key in LEADING {
        field(&mut out, key, &object[key]);
    }
    for (key, value) in object.as_object().into_iter().flatten() {
        if !LEADING.contains(&key.as_str()) {
            field(&mut out, key, value);
        }
    }
    out.push(b'}');
    // Not the buffer itself: it has room to spare, and the object may live for long.
    Bytes::copy_from_slice(&out)
}

impl Object {
    /// Reads what the store holds.
    pub fn read(row: &Row, entry: &Entry) -> Result<Object, Malformed> {
        let malformed = |reason: String| Malformed { key: entry.key.clone(), reason };
        let mut bytes = entry.value.clone();
        let custom = row.custom.as_ref().filter(|version| version.has_defaults());
        let value = match custom {
            Some(custom) => {
                let mut value: Value = serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?;
                if value["apiVersion"] == row.api_version() {
                    // https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#defaulting
                    let before = value.clone();
                    custom.default(&mut value);
                    if value != before {
                        bytes = encode(&value);
                    }
                }
                value
            }
            // Nothing else of it is needed, and this is done for every write.
            None => {
                let paths: Vec<&str> = row.selectable.iter().copied().chain(["metadata.labels"]).collect();
                lean::read(&bytes, &paths).map_err(|e| malformed(e.to_string()))?
            }
        };
        let mark = b"\"metadata\":{";
        // The two fields before hold no quotes or braces, so the first match is the metadata.
        let window = &bytes[..bytes.len().min(512)];
        let meta = window.windows(mark.len()).position(|w| w == mark).ok_or_else(|| malformed("no metadata".into()))?;
        let head = meta + mark.len();
        let fields: Vec<_> = row.selectable.iter().map(|path| field_text(row, &value, path)).collect();
        let labels = value["metadata"]["labels"].as_object().into_iter().flatten();
        let labels = labels.flat_map(|(key, value)| [key, value.as_str().unwrap_or_default()]);
        Ok(Object {
            key: entry.key.clone(),
            stored: (bytes != entry.value).then(|| Box::new(entry.value.clone())),
            revision: entry.revision,
            meta: meta as u32,
            head: head as u32,
            tail: lean::end_of_object(&bytes, head) as u32,
            bytes,
            texts: Texts::new(fields.iter().map(|text| &**text), labels),
            message: ArcSwapOption::empty(),
        })
    }

    /// The bytes in the store.
    pub fn stored(&self) -> &Bytes {
        self.stored.as_deref().unwrap_or(&self.bytes)
    }

    /// As the store has it.
    pub fn entry(&self) -> Entry {
        Entry { key: self.key.clone(), value: self.stored().clone(), revision: self.revision, created: self.revision }
    }

    /// The same object in another form.
    pub fn with(&self, row: &Row, value: &Value) -> Result<Object, Malformed> {
        let entry = Entry { value: encode(value), ..self.entry() };
        Ok(Object { stored: Some(Box::new(self.stored().clone())), ..Object::read(row, &entry)? })
    }

    /// `apiVersion`, which stands first.
    pub fn api_version(&self) -> &str {
        const START: &[u8] = b"{\"apiVersion\":\"";
        let rest = self.bytes.strip_prefix(START).unwrap_or_default();
        let end = rest.iter().position(|b| *b == b'"').unwrap_or_default();
        std::str::from_utf8(&rest[..end]).unwrap_or_default()
    }

    /// The last part of the key.
    pub fn name(&self) -> &str {
        self.key.rsplit('/').next().unwrap_or_default()
    }

    /// The namespace; empty for a cluster-scoped object.
    pub fn namespace(&self, row: &Row) -> &str {
        match row.scope {
            seawall_api::Scope::Namespaced => self.key.rsplit('/').nth(1).unwrap_or_default(),
            seawall_api::Scope::Cluster => "",
        }
    }

    /// Appends the object with its resource version.
    pub fn write(&self, revision: Revision, out: &mut BytesMut) {
        let head = self.head as usize;
        out.put_slice(&self.bytes[..head]);
        put_version(revision, out);
        out.put_slice(&self.bytes[head..]);
    }

    /// Appends the object as an item of a list: without `apiVersion` and `kind`.
    pub fn write_item(&self, out: &mut BytesMut) {
        let (meta, head) = (self.meta as usize, self.head as usize);
        out.put_slice(b"{");
        out.put_slice(&self.bytes[meta..head]);
        put_version(self.revision, out);
        out.put_slice(&self.bytes[head..]);
    }

    /// Appends the metadata with the resource version.
    pub fn write_metadata(&self, revision: Revision, out: &mut BytesMut) {
        out.put_slice(b"{");
        put_version(revision, out);
        out.put_slice(&self.bytes[self.head as usize..self.tail as usize]);
    }

    /// What cells of a row look at.
    pub fn lean(&self, row: &Row) -> Value {
        // `read` has parsed these bytes before.
        lean::read(&self.bytes, row.seen).unwrap_or_default()
    }

    /// The object in protobuf, if somebody has just kept that.
    pub fn message(&self) -> Option<Bytes> {
        self.message.load().as_deref().cloned()
    }

    /// Keeps the object in protobuf, which all have to make in the same way, or forgets it.
    pub fn keep_message(&self, message: Option<Bytes>) {
        self.message.store(message.map(Arc::new));
    }

    /// The object with its resource version, parsed.
    pub fn value(&self) -> Value {
        self.value_at(self.revision)
    }

    /// The object as of another revision: that of its deletion.
    pub fn value_at(&self, revision: Revision) -> Value {
        // `read` has parsed these bytes before.
        let mut value: Value = serde_json::from_slice(&self.bytes).unwrap_or_default();
        value["metadata"]["resourceVersion"] = revision.to_string().into();
        value
    }

    /// Whether selectors pick it.
    pub fn selected(&self, row: &Row, labels: &LabelSelector, fields: &[FieldRequirement]) -> bool {
        let label = |key: &str| {
            let mut labels = self.texts.labels();
            while let (Some(found), Some(value)) = (labels.next(), labels.next()) {
                if found == key.as_bytes() {
                    return Some(text(value));
                }
            }
            None
        };
        labels.matches(label)
            && fields.iter().all(|requirement| {
                let found = match requirement.field.as_str() {
                    "metadata.name" => self.name(),
                    "metadata.namespace" => self.namespace(row),
                    path => self.field(row, path),
                };
                (found == requirement.value) == requirement.equal
            })
    }

    /// A selectable field by its path.
    pub fn field(&self, row: &Row, path: &str) -> &str {
        let at = row.selectable.iter().position(|field| *field == path);
        at.and_then(|at| self.texts.fields().nth(at)).map_or("", text)
    }
}

/// These were texts when they were put in.
fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}

fn put_version(revision: Revision, out: &mut BytesMut) {
    use std::fmt::Write as _;
    // Writing into memory cannot fail.
    let _ = write!(out, "\"resourceVersion\":\"{revision}\",");
}

/// The text of a field as a field selector compares it.
fn field_text<'a>(row: &Row, value: &'a Value, path: &str) -> Cow<'a, str> {
    let mut at = value;
    for part in path.split('.') {
        at = &at[part];
    }
    match at {
        Value::String(text) => text.as_str().into(),
        // Fields that Go's types have no absence for.
        Value::Null if row.custom.is_some() => "".into(),
        Value::Null => match path {
            "spec.unschedulable" | "spec.hostNetwork" => "false".into(),
            "status.replicas" | "status.successful" => "0".into(),
            _ => "".into(),
        },
        // `source` of an event stands for its component.
        Value::Object(object) => object.get("component").and_then(Value::as_str).unwrap_or_default().into(),
        other => other.to_string().into(),
    }
}
