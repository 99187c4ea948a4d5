//! Answers: which encoding a client asked for, and objects, lists, tables and events in it.

mod protobuf;
mod table;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use jiff::Timestamp;
use seawall_api::{Row, schema::Schemas};
use seawall_store::Revision;
use serde_json::{Value, json};
use std::sync::Arc;

use crate::{
    cache::{Change, EventType, event_line},
    error::{ApiError, Result},
    object::Object,
    registry::Served,
};

/// An error of a body that is being sent.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// The body of an answer.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;

/// A body that is there as a whole.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A piece of a large list holds about this many bytes.
const SLICE: usize = 128 << 10;
/// Room for a piece, with its last object.
const SLICE_ROOM: usize = SLICE + (8 << 10);

/// The shape that a client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The object itself.
    Full,
    /// A table (<https://kubernetes.io/docs/reference/using-api/api-concepts/#receiving-resources-as-tables>).
    Table,
    /// The metadata alone.
    Metadata,
}

/// How the shape is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Media {
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// Protobuf, for objects, lists and events of built-in kinds; everything else is answered in JSON.
    Protobuf,
}

/// How to answer.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// The shape.
    pub shape: Shape,
    /// How it is written down.
    pub media: Media,
}

/// Reads the `Accept` header. The first entry that can be served wins; protobuf can be if `protobuf` says so.
pub fn negotiate(headers: &HeaderMap, protobuf: bool) -> Result<Form> {
    let json = Form { shape: Shape::Full, media: Media::Json };
    let Some(accept) = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).filter(|v| !v.trim().is_empty())
    else {
        return Ok(json);
    };
    for entry in accept.split(',') {
        let mut parts = entry.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default();
        let (mut shape, mut version) = (None, None);
        for (key, value) in parts.filter_map(|p| p.split_once('=')) {
            match key {
                "as" => shape = Some(value),
                "v" => version = Some(value),
                _ => {}
            }
        }
        let media = match media {
            "application/json" | "*/*" | "application/*" => Media::Json,
            "application/yaml" | "application/x-yaml" => Media::Yaml,
            protobuf::MEDIA if protobuf => Media::Protobuf,
            _ => continue,
        };
        let shape = match (shape, version) {
            (None, _) => Shape::Full,
            // Upstream has no tables in protobuf either.
            (Some("Table"), Some("v1")) if media != Media::Protobuf => Shape::Table,
            (Some("PartialObjectMetadata" | "PartialObjectMetadataList"), Some("v1")) => Shape::Metadata,
            _ => continue,
        };
        return Ok(Form { shape, media });
    }
    Err(ApiError::not_acceptable(accept))
}

/// An answer with a value in JSON, or in YAML.
pub fn value(status: StatusCode, value: &Value, media: Media) -> Response<Body> {
    let (kind, body) = match (media == Media::Yaml).then(|| serde_yaml_ng::to_string(value)) {
        Some(Ok(text)) => ("application/yaml", text.into_bytes()),
        _ => {
            let mut text = value.to_string().into_bytes();
            text.push(b'\n');
            ("application/json", text)
        }
    };
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

/// An answer in a kind of JSON that has a name of its own.
pub fn json_as(kind: &'static str, body: &Value) -> Response<Body> {
    let mut response = value(StatusCode::OK, body, Media::Json);
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

/// An answer with bytes of JSON.
pub fn json_bytes(status: StatusCode, bytes: Bytes) -> Response<Body> {
    let mut response = Response::new(full(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

/// Objects of one resource in one version, in the form a client asked for.
pub struct Encoder<'a> {
    /// The resource.
    pub row: &'a Row,
    /// The version.
    pub served: &'a Served,
    /// The types of built-in kinds.
    pub schemas: &'a Schemas,
    /// The form.
    pub form: Form,
    /// Whether a table carries the metadata of objects (`includeObject`).
    pub include: Include,
    /// For ages.
    pub now: Timestamp,
}

/// What the rows of a table carry besides the cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Include {
    /// Nothing.
    Nothing,
    /// The metadata; the default.
    Metadata,
    /// The object.
    Object,
}

impl Include {
    /// Reads the parameter `includeObject`.
    pub fn parse(text: Option<&str>) -> Result<Include> {
        match text {
            None | Some("" | "Metadata") => Ok(Include::Metadata),
            Some("None") => Ok(Include::Nothing),
            Some("Object") => Ok(Include::Object),
            Some(other) => Err(ApiError::bad_request(format!(
                "includeObject: Unsupported value: {other:?}: supported values: \"Metadata\", \"None\", \"Object\""
            ))),
        }
    }
}

impl Encoder<'_> {
    /// A stored value in the version that was asked for.
    pub fn convert(&self, mut object: Value) -> Value {
        if let Some(alias) = &self.served.alias {
            (alias.conversion.from_stored)(&mut object);
            object["apiVersion"] = self.served.api_version().into();
        }
        object
    }

    /// One object.
    pub fn object(&self, object: &Object, status: StatusCode) -> Response<Body> {
        if self.form.media == Media::Protobuf {
            return self.protobuf_object(object, status);
        }
        if self.form.shape == Shape::Full && self.form.media == Media::Json && self.served.alias.is_none() {
            let mut out = BytesMut::with_capacity(object.bytes.len() + 40);
            object.write(object.revision, &mut out);
            return json_bytes(status, out.freeze());
        }
        self.value(object.value(), status)
    }

    /// One object that is not stored as it stands.
    pub fn value(&self, object: Value, status: StatusCode) -> Response<Body> {
        if self.form.media == Media::Protobuf {
            return protobuf::answer(status, self.protobuf_value(object).into());
        }
        let shaped = match self.form.shape {
            Shape::Full => self.convert(object),
            Shape::Metadata => metadata(&object),
            Shape::Table => {
                let version = object["metadata"]["resourceVersion"].clone();
                let row = self.table_row(object);
                self.table(vec![row], json!({"resourceVersion": version}), true)
            }
        };
        value(status, &shaped, self.form.media)
    }

    /// A list. Large ones are streamed from the cache's bytes in slices.
    pub async fn list(&self, objects: Vec<Arc<Object>>, meta: Value) -> Response<Body> {
        if self.form.media == Media::Protobuf {
            return self.protobuf_list(objects, &meta).await;
        }
        match self.form.shape {
            Shape::Full if self.form.media == Media::Json && self.served.alias.is_none() => self.stream(objects, &meta),
            Shape::Full => {
                let items: Vec<Value> = objects.iter().map(|o| self.convert(o.value())).collect();
                let list = json!({"kind": self.row.list_kind(), "apiVersion": self.served.api_version(), "metadata": meta, "items": items});
                value(StatusCode::OK, &list, self.form.media)
            }
            Shape::Metadata => {
                let items: Vec<Value> = objects.iter().map(|o| metadata(&o.value())).collect();
                let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": meta, "items": items});
                value(StatusCode::OK, &list, self.form.media)
            }
            Shape::Table if self.is_cut() => self.stream_table(objects, meta),
            Shape::Table => {
                let rows = objects.iter().map(|o| self.table_row(o.value())).collect();
                value(StatusCode::OK, &self.table(rows, meta, true), self.form.media)
            }
        }
    }

    fn stream(&self, objects: Vec<Arc<Object>>, meta: &Value) -> Response<Body> {
        let total: usize = objects.iter().map(|o| o.bytes.len() + 40).sum();
        let mut out = BytesMut::with_capacity(SLICE_ROOM.min(total + 512));
        let kind = self.row.list_kind();
        // Lists of custom resources, unlike others, say of each item what it is.
        let custom = self.row.custom.is_some();
        let put = move |object: &Object, out: &mut BytesMut| match custom {
            true => object.write(object.revision, out),
            false => object.write_item(out),
        };
        out.put_slice(
            format!(
                "{{\"kind\":\"{kind}\",\"apiVersion\":\"{}\",\"metadata\":{meta},\"items\":[",
                self.served.api_version()
            )
            .as_bytes(),
        );
        if total < SLICE {
            for (index, object) in objects.iter().enumerate() {
                if index > 0 {
                    out.put_u8(b',');
                }
                put(object, &mut out);
            }
            out.put_slice(b"]}\n");
            return json_bytes(StatusCode::OK, out.freeze());
        }
        pieces(out, objects, put, "]}\n".to_owned())
    }

    /// A change as a line of a watch.
    pub fn change(&self, ty: EventType, change: &Change, first: &mut bool) -> Bytes {
        if self.form.media == Media::Protobuf {
            return self.protobuf_change(ty, change);
        }
        if self.form.shape == Shape::Full && self.served.alias.is_none() {
            return change.json(ty);
        }
        match change.object(ty) {
            Some(object) => self.event(ty, object, change.revision, first),
            None => Bytes::new(),
        }
    }

    /// An object as a line of a watch.
    pub fn event(&self, ty: EventType, object: &Object, revision: Revision, first: &mut bool) -> Bytes {
        if self.form.media == Media::Protobuf {
            return self.protobuf_event(ty, object, revision);
        }
        if self.form.shape == Shape::Full && self.served.alias.is_none() {
            return event_line(ty, object, revision);
        }
        if self.form.shape == Shape::Table && self.is_cut() {
            // Only the first event of a watch names the columns.
            return self.table_event(ty, object, revision, std::mem::take(first));
        }
        let value = object.value_at(revision);
        let shaped = match self.form.shape {
            Shape::Full => self.convert(value),
            Shape::Metadata => metadata(&value),
            Shape::Table => {
                let row = self.table_row(value);
                // As above.
                let with_columns = std::mem::take(first);
                self.table(vec![row], json!({"resourceVersion": revision.to_string()}), with_columns)
            }
        };
        line(&json!({"type": ty.name(), "object": shaped}))
    }

    /// A bookmark: everything up to `revision` has been sent.
    pub fn bookmark(&self, revision: Revision, initial_end: bool) -> Bytes {
        let mut meta = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if initial_end {
            meta["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        if self.form.media == Media::Protobuf {
            return self.protobuf_frame("BOOKMARK", json!({"metadata": meta}));
        }
        let object = match self.form.shape {
            Shape::Full => json!({"kind": self.row.kind, "apiVersion": self.served.api_version(), "metadata": meta}),
            Shape::Metadata => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta})
            }
            Shape::Table => {
                let row = json!({"cells": [], "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta}});
                self.table(vec![row], json!({"resourceVersion": revision.to_string()}), false)
            }
        };
        line(&json!({"type": "BOOKMARK", "object": object}))
    }

    /// An error that ends a watch.
    pub fn error(&self, error: &ApiError) -> Bytes {
        match self.form.media {
            Media::Protobuf => self.protobuf_error(error),
            _ => line(&json!({"type": "ERROR", "object": error.status()})),
        }
    }

    /// What the body of a watch is.
    pub fn stream_type(&self) -> header::HeaderValue {
        header::HeaderValue::from_static(match self.form.media {
            Media::Protobuf => protobuf::STREAM,
            _ => "application/json",
        })
    }
}

fn metadata(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
}

/// A body that begins with `out`, goes on with objects, between them commas, and ends with `end`. It is made a piece at a
/// time: the next when the connection has taken the one before.
fn pieces(
    out: BytesMut,
    objects: Vec<Arc<Object>>,
    put: impl Fn(&Object, &mut BytesMut) + Clone + Send + 'static,
    end: String,
) -> Response<Body> {
    let first = Some((out, objects.into_iter(), ""));
    let slices = futures::stream::unfold(first, move |rest| {
        let (put, end) = (put.clone(), end.clone());
        async move {
            let (mut out, mut objects, mut comma) = rest?;
            while out.len() < SLICE {
                let Some(object) = objects.next() else {
                    out.put_slice(end.as_bytes());
                    return Some((Ok::<_, BodyError>(Frame::data(out.freeze())), None));
                };
                out.put_slice(comma.as_bytes());
                comma = ",";
                put(&object, &mut out);
            }
            let rest = (BytesMut::with_capacity(SLICE_ROOM), objects, comma);
            Some((Ok(Frame::data(out.freeze())), Some(rest)))
        }
    });
    let mut response = Response::new(StreamBody::new(slices).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

/// A value as a line.
pub fn line(value: &Value) -> Bytes {
    let mut text = value.to_string().into_bytes();
    text.push(b'\n');
    text.into()
}
