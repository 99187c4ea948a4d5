//! The body of an answer that is audited: it holds the trail until it has been sent, and what is to be written down of it
//! is copied on the way.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{header, response::Parts};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use serde_json::Value;

use super::Trail;
use crate::encode::{Body, BodyError};

/// How many bytes of an answer are written down at most. Upstream's marker of what was left out is
/// `audit.k8s.io/truncated`.
const MOST: usize = 16 << 20;
/// How large an answer is looked at for whether it is a Status.
const STATUS: u64 = 64 << 10;

/// What is copied, and how it is to be read.
pub(super) struct Taken {
    bytes: Vec<u8>,
    media: String,
    whole: bool,
}

impl Taken {
    /// `None` if nothing of the answer is written down.
    pub fn of(trail: &Trail, parts: &Parts) -> Option<Taken> {
        let media = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let media = media.split(';').next().unwrap_or_default().to_owned();
        // What is no resource has no object, and what goes on and on is none.
        if trail.long_running || trail.refused.is_some() || trail.known.lock().object.is_none() {
            return None;
        }
        let whole = trail.wants_answer();
        // What a deletion answers may say more than its code.
        let status = matches!(&*trail.verb, "delete" | "deletecollection");
        (whole || status).then(|| Taken { bytes: Vec::new(), media, whole })
    }

    fn read(&self) -> Option<Value> {
        match &*self.media {
            "application/json" => serde_json::from_slice(&self.bytes).ok(),
            "application/yaml" => serde_yaml_ng::from_slice(&self.bytes).ok(),
            _ => None,
        }
    }
}

struct Tap {
    inner: Body,
    trail: Arc<Trail>,
    taken: Option<Taken>,
}

/// A body that keeps the trail until its end.
pub(super) fn body(inner: Body, trail: Arc<Trail>, taken: Option<Taken>) -> Body {
    let small = inner.size_hint().upper().is_some_and(|size| size <= STATUS);
    let taken = taken.filter(|taken| taken.whole || small);
    Tap { inner, trail, taken }.boxed_unsync()
}

impl http_body::Body for Tap {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
            && let Some(taken) = &mut self.taken
        {
            match taken.bytes.len() + data.len() <= MOST {
                true => taken.bytes.extend_from_slice(data),
                false => {
                    self.taken = None;
                    self.trail.annotate("audit.k8s.io/truncated", "true".to_owned());
                }
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let Some(taken) = self.taken.take() else { return };
        let Some(object) = taken.read() else { return };
        let mut known = self.trail.known.lock();
        if object["kind"] == "Status"
            && let Some(status) = &mut known.status
        {
            for field in ["status", "message", "reason", "details"] {
                if !object[field].is_null() {
                    status[field] = object[field].clone();
                }
            }
        }
        if taken.whole {
            known.response = Some(self.trail.trimmed(object));
        }
    }
}
