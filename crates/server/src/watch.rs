//! WATCH (<https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes>).

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{Response, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use rand::Rng;
use seawall_api::{Row, Scope};
use seawall_store::Revision;
use tokio::time::Instant;

use crate::{
    Context, Server,
    cache::{Change, EventType, Subscription, by_node},
    encode::{Body, BodyError, Encoder, Form, Include},
    error::{ApiError, Result},
    object::Object,
    read::{Selection, resource_version},
    registry::Served,
};

/// How often a watcher that asked for bookmarks gets one.
const BOOKMARK: Duration = Duration::from_secs(30);
/// How many events are encoded at a time.
const BATCH: usize = 256;
/// A piece of the body holds about this many bytes.
const PIECE: usize = 64 << 10;

/// One watch.
struct Watcher {
    row: Arc<Row>,
    served: Served,
    form: Form,
    include: Include,
    selection: Selection,
    /// Only objects whose key starts with this.
    prefix: String,
    subscription: Subscription,
    initial: VecDeque<Arc<Object>>,
    /// Say when the initial objects have all been sent.
    initial_end: bool,
    bookmarks: bool,
    next_bookmark: Instant,
    until: Instant,
    /// The first event of a table names the columns.
    first: bool,
    over: bool,
    /// Tells when there are other resources than before.
    table: tokio::sync::watch::Receiver<u64>,
    server: Arc<Server>,
}

impl Server {
    /// WATCH of a resource, or of one object.
    pub(crate) async fn watch(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let query = &context.query;
        let row = context.row.clone();
        let id = context.served.id;
        let selection = Selection::parse(&row, query, context.path.name.as_deref())?;
        let requested = resource_version(query)?;
        let initial_events = query.flag("sendInitialEvents");
        let bookmarks = query.flag("allowWatchBookmarks");
        match (query.text("resourceVersionMatch"), query.get("sendInitialEvents")) {
            (None, None) | (Some("NotOlderThan"), Some(_)) => {}
            (None, Some(_)) => {
                return Err(ApiError::bad_request(
                    "resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
                ));
            }
            (Some(_), None) => {
                return Err(ApiError::bad_request(
                    "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
                ));
            }
            (Some(other), Some(_)) => {
                return Err(ApiError::bad_request(format!(
                    "resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan, found {other:?}"
                )));
            }
        }
        let prefix = match (context.path.namespace.as_deref(), row.scope) {
            (Some(namespace), Scope::Namespaced) => format!("{}{namespace}/", row.prefix()),
            _ => row.prefix(),
        };
        // Without a version, or with "0", a watch starts with what exists.
        let with_initial = initial_events || matches!(requested, None | Some(Revision(0)));
        let snapshot = match requested {
            Some(revision) => self.cache.at_least(revision).await?,
            None => self.consistent().await?,
        };
        let (initial, after) = if with_initial && query.get("sendInitialEvents") != Some("false") {
            let picked = |o: &&Arc<Object>| selection.picks(&row, o);
            let objects = match snapshot.by_node(id).zip(selection.equal(by_node::FIELD)) {
                Some((pods, node)) => pods.on(node, &prefix, None).filter(picked).cloned().collect(),
                None => snapshot.range(id, &prefix, None).filter(picked).cloned().collect(),
            };
            (objects, snapshot.revision)
        } else {
            let after = requested.filter(|r| r.0 > 0).unwrap_or(snapshot.revision);
            let oldest = self.cache.oldest(id);
            if after < oldest {
                // Clients expect this as the first event of a watch that began well.
                let error = ApiError::expired(format!("too old resource version: {after} ({oldest})"));
                let encoder = context.encoder()?;
                let only = futures::stream::iter([Ok(Frame::data(encoder.error(&error)))]);
                return Ok(stream(only, encoder.stream_type()));
            }
            (VecDeque::new(), after)
        };
        let timeout = match query.number::<u64>("timeoutSeconds")? {
            Some(seconds) if seconds > 0 => Duration::from_secs(seconds.min(86_400)),
            // Spread, so that watchers do not all come back at the same time.
            _ => Duration::from_secs(rand::rng().random_range(1800..3600)),
        };
        let initial = match initial.is_empty() {
            true => initial,
            false => self.in_version(&row, initial.into()).await?.into(),
        };
        let now = Instant::now();
        let watcher = Watcher {
            subscription: self.cache.subscribe(id, after),
            served: context.served.clone(),
            form: context.form,
            include: Include::parse(query.get("includeObject"))?,
            row,
            selection,
            prefix,
            initial,
            initial_end: initial_events && bookmarks,
            bookmarks,
            next_bookmark: now + BOOKMARK,
            until: now + timeout,
            first: true,
            over: false,
            table: self.registry.changes(),
            server: self.clone(),
        };
        let kind = watcher.encoder().stream_type();
        let pieces = futures::stream::unfold(watcher, |mut watcher| async move {
            let piece = watcher.next().await?;
            Some((Ok::<_, BodyError>(Frame::data(piece)), watcher))
        });
        Ok(stream(pieces, kind))
    }
}

fn stream(
    pieces: impl futures::Stream<Item = Result<Frame<Bytes>, BodyError>> + Send + 'static,
    kind: header::HeaderValue,
) -> Response<Body> {
    let mut response = Response::new(StreamBody::new(pieces).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

impl Watcher {
    /// The next piece of the body; `None` at its end.
    async fn next(&mut self) -> Option<Bytes> {
        if self.over {
            return None;
        }
        if !self.initial.is_empty() || self.initial_end {
            return Some(self.initial_piece());
        }
        loop {
            // A watch of a resource whose definition has gone or changed ends when everything up to then has been sent;
            // who asks again is told what there is now. Looked at before the log, so that nothing is left in it.
            let current = self.row.custom.is_none() || self.is_current();
            let changes = match self.subscription.take(BATCH) {
                Ok(changes) => changes,
                Err(_) if !current => return None,
                Err(error) => {
                    self.over = true;
                    return Some(self.encoder().error(&error));
                }
            };
            let mut out = BytesMut::new();
            let mut single = None;
            for change in &changes {
                let Some(ty) = self.event_type(change) else { continue };
                let mut first = self.first;
                let event = match change.object(ty).filter(|object| self.server.is_foreign(&self.row, object)) {
                    None => self.encoder().change(ty, change, &mut first),
                    Some(object) => match self.server.one_in_version(&self.row, object.clone()).await {
                        Ok(object) => self.encoder().event(ty, &object, change.revision, &mut first),
                        Err(error) => {
                            self.over = true;
                            self.encoder().error(&error)
                        }
                    },
                };
                self.first = first;
                // One event, the usual case, is passed on without copying.
                match single.take() {
                    None if out.is_empty() => single = Some(event),
                    None => out.extend_from_slice(&event),
                    Some(before) => {
                        out.extend_from_slice(&before);
                        out.extend_from_slice(&event);
                    }
                }
            }
            if let Some(event) = single {
                return Some(event);
            }
            if !out.is_empty() {
                return Some(out.freeze());
            }
            if !changes.is_empty() {
                continue;
            }
            if !current {
                return None;
            }
            let stop = self.server.stop.clone();
            tokio::select! {
                () = self.subscription.changed() => {}
                // The sender lives as long as the server, which `self` keeps alive.
                _ = self.table.changed(), if self.row.custom.is_some() => {}
                () = tokio::time::sleep_until(self.next_bookmark), if self.bookmarks => {
                    self.next_bookmark = Instant::now() + BOOKMARK;
                    return Some(self.encoder().bookmark(self.subscription.revision(), false));
                }
                () = tokio::time::sleep_until(self.until) => return None,
                () = stop.cancelled() => return None,
            }
        }
    }

    fn is_current(&self) -> bool {
        let table = self.server.registry.custom();
        let now = table.version(self.row.group, self.row.version, self.row.plural);
        now.is_some_and(|row| Arc::ptr_eq(row, &self.row))
    }

    fn initial_piece(&mut self) -> Bytes {
        let mut out = BytesMut::with_capacity(PIECE);
        while let Some(object) = self.initial.pop_front() {
            let mut first = self.first;
            out.extend_from_slice(&self.encoder().event(EventType::Added, &object, object.revision, &mut first));
            self.first = first;
            if out.len() >= PIECE {
                return out.freeze();
            }
        }
        if std::mem::take(&mut self.initial_end) {
            out.extend_from_slice(&self.encoder().bookmark(self.subscription.revision(), true));
        }
        out.freeze()
    }

    /// What a change is to this watcher: an object that enters its selection is added, one that leaves is deleted.
    fn event_type(&self, change: &Change) -> Option<EventType> {
        let seen = |object: &Option<Arc<Object>>| {
            object.as_ref().is_some_and(|o| o.key.starts_with(&self.prefix) && self.selection.picks(&self.row, o))
        };
        match (seen(&change.old), seen(&change.new)) {
            (false, true) => Some(EventType::Added),
            (true, true) => Some(EventType::Modified),
            (true, false) => Some(EventType::Deleted),
            (false, false) => None,
        }
    }

    fn encoder(&self) -> Encoder<'_> {
        Encoder {
            row: &self.row,
            served: &self.served,
            schemas: &self.server.registry.schemas,
            form: self.form,
            include: self.include,
            now: jiff::Timestamp::now(),
        }
    }
}
