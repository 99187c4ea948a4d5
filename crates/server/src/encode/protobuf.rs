//! Objects, lists and events of built-in kinds in protobuf, which client-go asks for by default
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/#protobuf-encoding>).
//!
//! Messages are made from the JSON that is there. Those of a list are kept for a while: when a server is new, everybody lists
//! everything at once.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use seawall_api::{proto::encode as proto, schema::TypeId};
use seawall_store::Revision;
use serde_json::{Value, json};

use super::{Body, BodyError, Encoder, SLICE, SLICE_ROOM, Shape, full};
use crate::{
    cache::{Change, EventType},
    error::ApiError,
    object::Object,
};

/// The media type.
pub const MEDIA: &str = "application/vnd.kubernetes.protobuf";
/// The media type of a watch.
pub const STREAM: &str = "application/vnd.kubernetes.protobuf;stream=watch";

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
const STATUS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Status";
/// How long what was made for a list is kept for others.
const KEPT: Duration = Duration::from_secs(10);
/// After how many messages of a list others get a turn.
const TURN: usize = 64;

/// The group and version of metadata alone.
const META_VERSION: &str = "meta.k8s.io/v1";

/// An answer with a message in its envelope.
pub fn answer(status: StatusCode, body: Bytes) -> Response<Body> {
    of_kind(status, full(body))
}

fn of_kind(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(MEDIA));
    response
}

fn forget_in_time(kept: Vec<Arc<Object>>) {
    if !kept.is_empty() {
        tokio::spawn(async move {
            tokio::time::sleep(KEPT).await;
            kept.iter().for_each(|object| object.keep_message(None));
        });
    }
}

impl Encoder<'_> {
    fn ty(&self) -> TypeId {
        self.served.ty
    }

    /// What a message is: its version and kind.
    fn what(&self, list: bool) -> (String, String) {
        match (self.form.shape, list) {
            (Shape::Metadata, false) => (META_VERSION.into(), "PartialObjectMetadata".into()),
            (Shape::Metadata, true) => (META_VERSION.into(), "PartialObjectMetadataList".into()),
            (_, false) => (self.served.api_version(), self.row.kind.to_string()),
            (_, true) => (self.served.api_version(), self.row.list_kind().to_string()),
        }
    }

    /// The message of a stored value, in the version and shape that were asked for.
    fn message(&self, object: Value) -> Bytes {
        match self.form.shape {
            Shape::Metadata => {
                let ty = self.schemas.by_name(META);
                let meta = ty.map(|ty| proto::message(self.schemas, ty, &object["metadata"])).unwrap_or_default();
                proto::field(1, &meta).into()
            }
            _ => proto::message(self.schemas, self.ty(), &self.convert(object)).into(),
        }
    }

    /// Whether it can be kept for whoever asks next.
    fn is_shared(&self) -> bool {
        self.form.shape == Shape::Full && self.served.alias.is_none()
    }

    fn message_of(&self, object: &Object) -> Bytes {
        match self.is_shared() {
            true => object.message().unwrap_or_else(|| self.made_of(object)),
            false => self.message(object.value()),
        }
    }

    /// The message of an object as it is stored, from its JSON.
    fn made_of(&self, object: &Object) -> Bytes {
        let mut json = BytesMut::with_capacity(object.bytes.len() + 40);
        object.write(object.revision, &mut json);
        let message = proto::message_of_json(self.schemas, self.ty(), &json);
        // It was read when it came from the store.
        message
            .inspect_err(|error| tracing::error!(%error, key = %object.key, "no protobuf"))
            .unwrap_or_default()
            .into()
    }

    /// The messages of all these. Whoever lists them next finds what was made for this list.
    async fn messages(&self, objects: &[Arc<Object>]) -> Vec<Bytes> {
        let mut messages = Vec::with_capacity(objects.len());
        let mut kept = Vec::new();
        for (number, object) in objects.iter().enumerate() {
            if number % TURN == TURN - 1 {
                tokio::task::yield_now().await;
            }
            if !self.is_shared() {
                messages.push(self.message(object.value()));
                continue;
            }
            messages.push(match object.message() {
                Some(message) => message,
                None => {
                    // Not the buffer itself: it has room to spare.
                    let message = Bytes::copy_from_slice(&self.made_of(object));
                    object.keep_message(Some(message.clone()));
                    kept.push(object.clone());
                    if kept.len() == TURN {
                        // Soon, since whoever asked may go away meanwhile.
                        forget_in_time(std::mem::take(&mut kept));
                    }
                    message
                }
            });
        }
        forget_in_time(kept);
        messages
    }

    /// A value in its envelope.
    pub(super) fn protobuf_value(&self, object: Value) -> Vec<u8> {
        let (version, kind) = self.what(false);
        proto::envelope(&version, &kind, &self.message(object))
    }

    pub(super) fn protobuf_object(&self, object: &Object, status: StatusCode) -> Response<Body> {
        let (version, kind) = self.what(false);
        answer(status, proto::envelope(&version, &kind, &self.message_of(object)).into())
    }

    pub(super) async fn protobuf_list(&self, objects: Vec<Arc<Object>>, meta: &Value) -> Response<Body> {
        let items = self.messages(&objects).await;
        let length = items.iter().map(|item| proto::item_length(item.len())).sum();
        let (version, kind) = self.what(true);
        let (head, tail) = proto::list(&version, &kind, meta, length);
        // Bounded: the next slice is made when the connection has taken the one before.
        let slices =
            futures::stream::unfold((head, items.into_iter(), Some(tail)), |(head, mut items, tail)| async move {
                let mut tail = tail?;
                let mut out = BytesMut::with_capacity(SLICE_ROOM);
                out.extend_from_slice(&head);
                for item in items.by_ref() {
                    out.extend_from_slice(&proto::item(item.len()));
                    out.extend_from_slice(&item);
                    if out.len() >= SLICE {
                        return Some((Ok::<_, BodyError>(Frame::data(out.freeze())), (Vec::new(), items, Some(tail))));
                    }
                }
                out.extend(tail.drain(..));
                Some((Ok(Frame::data(out.freeze())), (Vec::new(), items, None)))
            });
        of_kind(StatusCode::OK, StreamBody::new(slices).boxed_unsync())
    }

    pub(super) fn protobuf_change(&self, ty: EventType, change: &Change) -> Bytes {
        let make = || match change.object(ty) {
            Some(object) => self.protobuf_event(ty, object, change.revision),
            None => Bytes::new(),
        };
        if self.is_shared() { change.message(ty, make) } else { make() }
    }

    pub(super) fn protobuf_event(&self, ty: EventType, object: &Object, revision: Revision) -> Bytes {
        if revision != object.revision {
            return self.protobuf_frame(ty.name(), object.value_at(revision));
        }
        let (version, kind) = self.what(false);
        proto::event(ty.name(), &proto::envelope(&version, &kind, &self.message_of(object))).into()
    }

    /// An event with a value.
    pub(super) fn protobuf_frame(&self, ty: &str, object: Value) -> Bytes {
        proto::event(ty, &self.protobuf_value(object)).into()
    }

    pub(super) fn protobuf_error(&self, error: &ApiError) -> Bytes {
        let status = match self.schemas.by_name(STATUS) {
            Some(ty) => proto::message(self.schemas, ty, &json!(error.status())),
            None => Vec::new(),
        };
        proto::event("ERROR", &proto::envelope("v1", "Status", &status)).into()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use seawall_store::Entry;

    use super::{
        super::{Form, Include, Media},
        *,
    };
    use crate::registry::Registry;

    #[tokio::test(start_paused = true)]
    async fn what_was_made_for_a_list_is_kept_for_a_while() {
        let registry = Registry::new().unwrap();
        let served = registry.find("", "v1", "configmaps").unwrap();
        let encoder = Encoder {
            row: &served.row,
            served: &served,
            schemas: &registry.schemas,
            form: Form { shape: Shape::Full, media: Media::Protobuf },
            include: Include::Metadata,
            now: jiff::Timestamp::UNIX_EPOCH,
        };
        // Others get their turn twice while the list is made.
        let objects: Vec<Arc<Object>> = (0..TURN * 2 + 3)
            .map(|number| {
                let object =
                    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("m{number}")}});
                let (key, value) = (format!("/registry/configmaps/a/m{number}").into(), crate::object::encode(&object));
                let entry = Entry { key, value, revision: Revision(7), created: Revision(7) };
                Arc::new(Object::read(&served.row, &entry).unwrap())
            })
            .collect();
        let list = async || {
            let list = encoder.list(objects.clone(), json!({})).await;
            list.into_body().collect().await.unwrap().to_bytes()
        };
        let kept = || objects.iter().filter(|object| object.message().is_some()).count();
        let first = list().await;
        assert_eq!(kept(), objects.len());
        tokio::time::sleep(KEPT / 2).await;
        assert_eq!(list().await, first);
        assert_eq!(kept(), objects.len());
        tokio::time::sleep(KEPT / 2 + Duration::from_millis(10)).await;
        assert_eq!(kept(), 0);
        assert_eq!(list().await, first);
        // An event is for its watchers: nothing stays of it.
        let alone = Object::read(&served.row, &objects[0].entry()).unwrap();
        assert!(!encoder.protobuf_event(EventType::Added, &alone, alone.revision).is_empty());
        assert!(alone.message().is_none());
    }
}
