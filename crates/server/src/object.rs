//! Stored objects as bytes.
//!
//! An object is encoded once, when it is written, with `apiVersion`, `kind` and `metadata` first. What the store's
//! revision adds (`resourceVersion`) is spliced in behind the opening brace of `metadata`, and items of a list start at
//! `metadata`, since lists of built-in kinds leave the first two out.

use std::sync::{Arc, OnceLock};

use bytes::{BufMut, Bytes, BytesMut};
use seawall_api::{
    Row,
    selector::{FieldRequirement, LabelSelector},
};
use seawall_store::{Entry, Revision};
use serde::Deserialize;
use serde_json::Value;

/// An object as the cache holds it.
#[derive(Debug)]
pub struct Object {
    /// The key in the store.
    pub key: Arc<str>,
    /// The JSON without `resourceVersion`.
    pub bytes: Bytes,
    /// What the store holds. It differs where a custom resource has got defaults since the object was written.
    stored: Bytes,
    /// The revision of the last write.
    pub revision: Revision,
    /// Where `"metadata"` starts.
    meta: u32,
    /// Just behind the opening brace of the metadata.
    head: u32,
    labels: Box<[(Box<str>, Box<str>)]>,
    /// In the order of the row's selectable fields.
    fields: Box<[Box<str>]>,
    /// The object in protobuf with its resource version, once somebody has asked for that.
    message: OnceLock<Bytes>,
}

/// Bytes in the store that are not an object: they were written by something else.
#[derive(Debug, thiserror::Error)]
#[error("the value of {key} is not an object of this server: {reason}")]
pub struct Malformed {
    key: Arc<str>,
    reason: String,
}

#[derive(Deserialize)]
struct Partial {
    metadata: PartialMeta,
}

#[derive(Deserialize)]
struct PartialMeta {
    #[serde(default)]
    labels: std::collections::BTreeMap<Box<str>, Box<str>>,
}

/// Encodes an object for the store.
pub fn encode(object: &Value) -> Bytes {
    let mut out = BytesMut::with_capacity(1024).writer();
    let write = |out: &mut bytes::buf::Writer<BytesMut>, value: &Value| {
        // Writing JSON into memory cannot fail: keys are strings and there is no I/O.
        serde_json::to_writer(out, value).expect("JSON is written into memory");
    };
    out.get_mut().put_slice(b"{");
    let mut first = true;
    let mut field = |out: &mut bytes::buf::Writer<BytesMut>, key: &str, value: &Value| {
        if !first {
            out.get_mut().put_slice(b",");
        }
        first = false;
        write(out, &Value::from(key));
        out.get_mut().put_slice(b":");
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
    out.get_mut().put_slice(b"}");
    out.into_inner().freeze()
}

impl Object {
    /// Reads what the store holds.
    pub fn read(row: &Row, entry: &Entry) -> Result<Object, Malformed> {
        let malformed = |reason: String| Malformed { key: entry.key.clone(), reason };
        let mut bytes = entry.value.clone();
        let custom = row.custom.as_ref().filter(|version| version.has_defaults());
        let (labels, fields) = if row.selectable.is_empty() && custom.is_none() {
            let partial: Partial = serde_json::from_slice(&entry.value).map_err(|e| malformed(e.to_string()))?;
            (partial.metadata.labels.into_iter().collect(), Box::default())
        } else {
            let mut value: Value = serde_json::from_slice(&entry.value).map_err(|e| malformed(e.to_string()))?;
            if let Some(custom) = custom
                && value["apiVersion"] == row.api_version()
            {
                // https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#defaulting
                let before = value.clone();
                custom.default(&mut value);
                if value != before {
                    bytes = encode(&value);
                }
            }
            let labels = value["metadata"]["labels"].as_object().into_iter().flatten();
            let labels = labels.map(|(k, v)| (k.as_str().into(), v.as_str().unwrap_or_default().into())).collect();
            (labels, row.selectable.iter().map(|path| field_text(row, &value, path)).collect())
        };
        let mark = b"\"metadata\":{";
        // The two fields before hold no quotes or braces, so the first match is the metadata.
        let window = &bytes[..bytes.len().min(512)];
        let meta = window.windows(mark.len()).position(|w| w == mark).ok_or_else(|| malformed("no metadata".into()))?;
        Ok(Object {
            key: entry.key.clone(),
            bytes,
            stored: entry.value.clone(),
            revision: entry.revision,
            meta: meta as u32,
            head: (meta + mark.len()) as u32,
            labels,
            fields,
            message: OnceLock::new(),
        })
    }

    /// The bytes in the store.
    pub fn stored(&self) -> &Bytes {
        &self.stored
    }

    /// As the store has it.
    pub fn entry(&self) -> Entry {
        Entry { key: self.key.clone(), value: self.stored.clone(), revision: self.revision, created: self.revision }
    }

    /// The same object in another form.
    pub fn with(&self, row: &Row, value: &Value) -> Result<Object, Malformed> {
        let entry = Entry { value: encode(value), ..self.entry() };
        Ok(Object { stored: self.stored.clone(), ..Object::read(row, &entry)? })
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

    /// The object in protobuf, made by whoever needs it first. All have to make the same.
    pub fn message(&self, make: impl FnOnce() -> Bytes) -> Bytes {
        self.message.get_or_init(make).clone()
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
            let at = self.labels.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
            Some(&*self.labels[at].1)
        };
        labels.matches(label)
            && fields.iter().all(|requirement| {
                let found = match requirement.field.as_str() {
                    "metadata.name" => self.name(),
                    "metadata.namespace" => self.namespace(row),
                    path => match row.selectable.iter().position(|f| *f == path) {
                        Some(index) => &*self.fields[index],
                        None => "",
                    },
                };
                (found == requirement.value) == requirement.equal
            })
    }

    /// A selectable field by its path.
    pub fn field(&self, row: &Row, path: &str) -> &str {
        row.selectable.iter().position(|f| *f == path).map_or("", |index| &*self.fields[index])
    }
}

fn put_version(revision: Revision, out: &mut BytesMut) {
    use std::fmt::Write as _;
    // Writing into memory cannot fail.
    let _ = write!(out, "\"resourceVersion\":\"{revision}\",");
}

/// The text of a field as a field selector compares it.
fn field_text(row: &Row, value: &Value, path: &str) -> Box<str> {
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
