//! The body of a watch.
//!
//! There may be thousands, all woken by the same change, so it is made to be polled: it waits without a queue, a lock or
//! a task of its own.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::{FutureExt, StreamExt, future::BoxFuture};
use hyper::body::Frame;
use seawall_api::Row;
use tokio::time::{Instant, Sleep};
use tokio_stream::wrappers::WatchStream;

use crate::{
    BodyError, Server,
    cache::{Change, EventType, Subscription},
    encode::{self, Encoder, Include},
    object::Object,
    read::Selection,
    registry::Served,
};

/// How often a watcher that asked for bookmarks gets one.
const BOOKMARK: Duration = Duration::from_secs(30);
/// How many events are encoded at a time.
const BATCH: usize = 256;
/// A piece of the body holds about this many bytes.
const PIECE: usize = 64 << 10;

/// In what form events are sent.
#[derive(Clone)]
pub struct Form {
    /// The resource, in the version that was asked for.
    pub row: Arc<Row>,
    /// The same.
    pub served: Served,
    /// Shape and media.
    pub form: encode::Form,
    /// What rows of a table carry.
    pub include: Include,
    /// Whose watch it is.
    pub server: Arc<Server>,
}

/// When a watch says that it has come to a point.
pub struct Ends {
    /// How long it goes on.
    pub timeout: Duration,
    /// Say now and then how far it has come.
    pub bookmarks: bool,
    /// Say when the initial objects have all been sent.
    pub initial_end: bool,
}

/// Events of which some have to be converted, and whether a table has named its columns; an error is the last event.
type Converting = BoxFuture<'static, (Result<Pieces, Bytes>, bool)>;

/// One watch.
pub struct Watcher {
    form: Form,
    selection: Selection,
    /// Only objects whose key starts with this.
    prefix: String,
    subscription: Subscription,
    initial: VecDeque<Arc<Object>>,
    ends: Ends,
    next_bookmark: Instant,
    /// One is due, and is sent when there is nothing else to be sent.
    bookmark_due: bool,
    until: Instant,
    /// Goes off at the sooner of the two. It is kept, since events come more often than that.
    timer: Pin<Box<Sleep>>,
    /// The first event of a table names the columns.
    first: bool,
    /// There was nothing more in the log.
    waiting: bool,
    over: bool,
    converting: Option<Converting>,
    /// Tells when there are other resources than before: for custom ones.
    table: Option<WatchStream<u64>>,
}

/// Events, one behind the other. One alone, the usual case, is passed on without being copied.
#[derive(Default)]
struct Pieces {
    single: Bytes,
    all: BytesMut,
}

impl Pieces {
    fn push(&mut self, event: Bytes) {
        if self.single.is_empty() && self.all.is_empty() {
            self.single = event;
            return;
        }
        self.all.extend_from_slice(&std::mem::take(&mut self.single));
        self.all.extend_from_slice(&event);
    }

    /// `None` if there are none.
    fn done(self) -> Option<Bytes> {
        let all = if self.all.is_empty() { self.single } else { self.all.freeze() };
        (!all.is_empty()).then_some(all)
    }
}

impl Form {
    /// Encodes it.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder {
            row: &self.row,
            served: &self.served,
            schemas: &self.server.registry.schemas,
            form: self.form,
            include: self.include,
            now: jiff::Timestamp::now(),
        }
    }

    fn is_foreign(&self, ty: EventType, change: &Change) -> bool {
        change.object(ty).is_some_and(|object| self.server.is_foreign(&self.row, object))
    }

    /// The same events, where some are of objects in another version.
    async fn convert(self, events: Vec<(EventType, Arc<Change>)>, mut first: bool) -> (Result<Pieces, Bytes>, bool) {
        let mut pieces = Pieces::default();
        for (ty, change) in events {
            let event = match change.object(ty).filter(|_| self.is_foreign(ty, &change)) {
                None => self.encoder().change(ty, &change, &mut first),
                Some(object) => match self.server.one_in_version(&self.row, object.clone()).await {
                    Ok(object) => self.encoder().event(ty, &object, change.revision, &mut first),
                    Err(error) => {
                        pieces.push(self.encoder().error(&error));
                        return (Err(pieces.done().unwrap_or_default()), first);
                    }
                },
            };
            pieces.push(event);
        }
        (Ok(pieces), first)
    }

    fn is_current(&self) -> bool {
        let table = self.server.registry.custom();
        let now = table.version(self.row.group, self.row.version, self.row.plural);
        now.is_some_and(|row| Arc::ptr_eq(row, &self.row))
    }
}

impl Watcher {
    /// Sends `initial`, then what `subscription` has to say of objects below `prefix` that are selected.
    pub fn new(
        form: Form,
        selection: Selection,
        prefix: String,
        subscription: Subscription,
        initial: VecDeque<Arc<Object>>,
        ends: Ends,
    ) -> Watcher {
        let now = Instant::now();
        let until = now + ends.timeout;
        let table = form.row.custom.is_some().then(|| WatchStream::from_changes(form.server.registry.changes()));
        Watcher {
            form,
            selection,
            prefix,
            subscription,
            initial,
            ends,
            next_bookmark: now + BOOKMARK,
            bookmark_due: false,
            until,
            timer: Box::pin(tokio::time::sleep_until(until)),
            first: true,
            waiting: false,
            over: false,
            converting: None,
            table,
        }
    }

    /// The next piece of the body; `None` at its end.
    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if !self.over && (!self.initial.is_empty() || self.ends.initial_end) {
            return Poll::Ready(Some(self.initial_piece()));
        }
        loop {
            if let Some(converting) = &mut self.converting {
                let (pieces, first) = ready!(converting.poll_unpin(context));
                (self.converting, self.first) = (None, first);
                match pieces.map(Pieces::done) {
                    Ok(None) => {}
                    Ok(some) => return Poll::Ready(some),
                    Err(last) => return self.end(last),
                }
            }
            if self.waiting {
                ready!(self.poll_woken(context));
            }
            if self.over {
                return Poll::Ready(None);
            }
            // A watch of a resource whose definition has gone or changed ends when everything up to then has been sent;
            // who asks again is told what there is now. When the server stops all are woken, as by a change. Both are
            // looked at before the log, so that nothing is left in it.
            let current = self.form.row.custom.is_none() || self.form.is_current();
            let ends = !current || self.form.server.stop.is_cancelled();
            let changes = match self.subscription.take(BATCH) {
                Ok(changes) => changes,
                Err(_) if !current => return Poll::Ready(None),
                Err(error) => {
                    let last = self.form.encoder().error(&error);
                    return self.end(last);
                }
            };
            // Whatever comes now wakes.
            self.waiting = changes.len() < BATCH && !ends;
            if !changes.is_empty() {
                // A bookmark that is due comes behind them.
                self.waiting &= !self.bookmark_due;
                match self.piece(changes) {
                    Some(piece) => return Poll::Ready(Some(piece)),
                    None => continue,
                }
            }
            if ends {
                return Poll::Ready(None);
            }
            // After a look at the log, since nobody is woken for what does not concern them.
            if std::mem::take(&mut self.bookmark_due) {
                let bookmark = self.form.encoder().bookmark(self.subscription.revision(), false);
                return Poll::Ready(Some(bookmark));
            }
        }
    }

    fn end(&mut self, last: Bytes) -> Poll<Option<Bytes>> {
        self.over = true;
        Poll::Ready(Some(last))
    }

    /// Waits for something to look at. At the end of its time a watch is over.
    fn poll_woken(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.subscription.poll_changed(context).is_ready() {
            return Poll::Ready(());
        }
        if let Some(table) = &mut self.table
            && let Poll::Ready(Some(_)) = table.poll_next_unpin(context)
        {
            return Poll::Ready(());
        }
        let due = if self.ends.bookmarks { self.next_bookmark.min(self.until) } else { self.until };
        if self.timer.deadline() != due {
            self.timer.as_mut().reset(due);
        }
        ready!(self.timer.as_mut().poll(context));
        if due == self.until {
            self.over = true;
        }
        self.next_bookmark = Instant::now() + BOOKMARK;
        self.bookmark_due = true;
        Poll::Ready(())
    }

    /// What these changes are to this watcher; `None` if nothing, or if it is not known yet.
    fn piece(&mut self, changes: Vec<Arc<Change>>) -> Option<Bytes> {
        let custom = self.form.row.custom.is_some();
        if custom && changes.iter().any(|c| self.event_type(c).is_some_and(|ty| self.form.is_foreign(ty, c))) {
            let events = changes.into_iter().filter_map(|change| Some((self.event_type(&change)?, change))).collect();
            self.converting = Some(self.form.clone().convert(events, self.first).boxed());
            return None;
        }
        let mut pieces = Pieces::default();
        for change in &changes {
            if let Some(ty) = self.event_type(change) {
                pieces.push(self.form.encoder().change(ty, change, &mut self.first));
            }
        }
        pieces.done()
    }

    fn initial_piece(&mut self) -> Bytes {
        let mut out = BytesMut::with_capacity(PIECE);
        while let Some(object) = self.initial.pop_front() {
            let event = self.form.encoder().event(EventType::Added, &object, object.revision, &mut self.first);
            out.extend_from_slice(&event);
            if out.len() >= PIECE {
                return out.freeze();
            }
        }
        if std::mem::take(&mut self.ends.initial_end) {
            out.extend_from_slice(&self.form.encoder().bookmark(self.subscription.revision(), true));
        }
        out.freeze()
    }

    /// What a change is to this watcher: an object that enters its selection is added, one that leaves is deleted.
    fn event_type(&self, change: &Change) -> Option<EventType> {
        let seen = |object: &Option<Arc<Object>>| {
            object.as_ref().is_some_and(|o| o.key.starts_with(&self.prefix) && self.selection.picks(&self.form.row, o))
        };
        match (seen(&change.old), seen(&change.new)) {
            (false, true) => Some(EventType::Added),
            (true, true) => Some(EventType::Modified),
            (true, false) => Some(EventType::Deleted),
            (false, false) => None,
        }
    }
}

impl http_body::Body for Watcher {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.get_mut().poll_piece(context).map(|piece| Some(Ok(Frame::data(piece?))))
    }
}
