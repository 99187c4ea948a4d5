//! The latest changes of a resource, and who follows them.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures::task::AtomicWaker;
use parking_lot::{Mutex, RwLock};
use seawall_api::Row;
use seawall_store::Revision;
use tokio::time::Instant;

use super::{Cache, by_node};
use crate::{
    error::{ApiError, Result},
    object::Object,
};

/// How many changes of a resource are kept for watchers, at most.
const LOG_EVENTS: usize = 8192;
/// How many bytes of objects the log of a resource may keep alive, at most.
const LOG_BYTES: usize = 8 << 20;
/// How long changes are kept for watchers at least, if there is room, and then [`FEW`] of them: bookmarks come more often, so
/// that whoever comes back knows of something newer. As upstream's watch cache, which has its size from that.
pub const FRESH: Duration = Duration::from_secs(75);
/// So many changes are kept however old they are.
const FEW: usize = 100;
/// How many of the latest changes stay encoded for those who follow.
const WARM: usize = 256;

/// A change of an object.
pub struct Change {
    /// The revision of the write.
    pub revision: Revision,
    /// The object before, `None` if it was created.
    pub old: Option<Arc<Object>>,
    /// The object after, `None` if it was deleted.
    pub new: Option<Arc<Object>>,
    /// When it was seen here.
    at: Instant,
    /// The encoded events, made by the first watcher that needs one. Most changes are never asked for.
    encoded: RwLock<Option<Box<Encoded>>>,
    /// Those who follow have passed it by: whoever comes late encodes it for themselves.
    cold: AtomicBool,
}

/// An event for each of the three types; then the same in protobuf.
type Encoded = [Option<Bytes>; 6];

/// The type of a watch event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventType {
    /// The object appeared, to this watcher.
    Added,
    /// It changed.
    Modified,
    /// It went, for this watcher.
    Deleted,
}

impl EventType {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            EventType::Added => "ADDED",
            EventType::Modified => "MODIFIED",
            EventType::Deleted => "DELETED",
        }
    }
}

impl Change {
    pub(super) fn new(revision: Revision, old: Option<Arc<Object>>, new: Option<Arc<Object>>) -> Change {
        Change { revision, old, new, at: Instant::now(), encoded: RwLock::default(), cold: AtomicBool::new(false) }
    }

    /// The object that an event of this type carries: the last state of what was deleted.
    pub fn object(&self, ty: EventType) -> Option<&Arc<Object>> {
        match ty {
            EventType::Deleted => self.old.as_ref().or(self.new.as_ref()),
            _ => self.new.as_ref(),
        }
    }

    /// The event as a line of JSON. It is encoded once and shared by all watchers.
    pub fn json(&self, ty: EventType) -> Bytes {
        self.shared(ty as usize, || match self.object(ty) {
            Some(object) => event_line(ty, object, self.revision),
            None => Bytes::new(),
        })
    }

    /// The event in protobuf, made by the first watcher that needs it.
    pub fn message(&self, ty: EventType, make: impl FnOnce() -> Bytes) -> Bytes {
        self.shared(3 + ty as usize, make)
    }

    fn shared(&self, slot: usize, make: impl FnOnce() -> Bytes) -> Bytes {
        if let Some(bytes) = self.encoded.read().as_ref().and_then(|encoded| encoded[slot].as_ref()) {
            return bytes.clone();
        }
        if self.cold.load(Ordering::Relaxed) {
            return make();
        }
        self.encoded.write().get_or_insert_default()[slot].get_or_insert_with(make).clone()
    }

    /// Forgets what was encoded.
    fn cool(&self) {
        self.cold.store(true, Ordering::Relaxed);
        *self.encoded.write() = None;
    }

    fn size(&self) -> usize {
        self.old.as_ref().map_or(0, |o| o.bytes.len()) + 256
    }
}

/// A watch event as a line of JSON.
pub fn event_line(ty: EventType, object: &Object, revision: Revision) -> Bytes {
    let mut out = BytesMut::with_capacity(object.bytes.len() + 96);
    out.put_slice(b"{\"type\":\"");
    out.put_slice(ty.name().as_bytes());
    out.put_slice(b"\",\"object\":");
    object.write(revision, &mut out);
    out.put_slice(b"}\n");
    out.freeze()
}

/// What a watcher has to hear of. It may hear of more; it is woken for nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Everything.
    Everything,
    /// A namespace, as the start of its keys with the slash at the end; or one object, as its key.
    Key(String),
    /// The pods of a node.
    Node(String),
}

/// One who follows.
#[derive(Default)]
struct Follower {
    woken: AtomicBool,
    waker: AtomicWaker,
}

/// Those who have the same interest.
struct Topic {
    /// The last change which may concern them that is no longer in the log. Changes under the lock of the log.
    lost: AtomicU64,
    /// They are going to be woken when the snapshot shows.
    touched: AtomicBool,
    /// They come and go under the lock of the topics.
    followers: Mutex<Vec<Arc<Follower>>>,
}

impl Topic {
    fn new(lost: Revision) -> Arc<Topic> {
        Arc::new(Topic { lost: lost.0.into(), touched: AtomicBool::new(false), followers: Mutex::default() })
    }

    fn wake(&self) {
        for follower in &*self.followers.lock() {
            follower.woken.store(true, Ordering::Release);
            follower.waker.wake();
        }
    }
}

type ByName = HashMap<Box<str>, Arc<Topic>>;

/// Topics that somebody follows.
#[derive(Default)]
struct Topics {
    /// By key or namespace.
    keys: ByName,
    nodes: ByName,
}

impl Topics {
    /// Where the topic of an interest is kept, and its name there. That of everything is always there.
    fn place<'a>(&mut self, interest: &'a Interest) -> Option<(&mut ByName, &'a str)> {
        match interest {
            Interest::Everything => None,
            Interest::Key(key) => Some((&mut self.keys, key)),
            Interest::Node(node) => Some((&mut self.nodes, node)),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Topic>> {
        self.keys.values().chain(self.nodes.values())
    }

    /// Those whom a change may concern. `by_node` is set for the resource whose objects are found by node.
    fn concerned<'a>(&'a self, change: &'a Change, by_node: Option<&'a Row>) -> impl Iterator<Item = &'a Arc<Topic>> {
        let keys = change.new.as_ref().or(change.old.as_ref()).filter(|_| !self.keys.is_empty()).map(|object| {
            let key = &*object.key;
            [key, &key[..key.rfind('/').map_or(0, |slash| slash + 1)]]
        });
        let nodes = by_node.filter(|_| !self.nodes.is_empty()).into_iter().flat_map(move |row| {
            change.old.iter().chain(&change.new).map(move |object| object.field(row, by_node::FIELD))
        });
        let keys = keys.into_iter().flatten().filter_map(|key| self.keys.get(key));
        keys.chain(nodes.filter_map(|node| self.nodes.get(node)))
    }
}

/// Whom to wake when the snapshot shows.
#[derive(Default)]
pub(super) struct Touched(Vec<Arc<Topic>>);

impl Touched {
    fn add(&mut self, topic: &Arc<Topic>) {
        if !topic.touched.swap(true, Ordering::AcqRel) {
            self.0.push(topic.clone());
        }
    }

    /// Wakes them.
    pub(super) fn wake(self) {
        for topic in self.0 {
            topic.touched.store(false, Ordering::Release);
            topic.wake();
        }
    }
}

/// The log of a resource.
pub(super) struct Log {
    changes: RwLock<Changes>,
    everything: Arc<Topic>,
    topics: Mutex<Topics>,
}

/// Every change after what is lost to everything is in the ring.
struct Changes {
    ring: VecDeque<Arc<Change>>,
    bytes: usize,
}

impl Log {
    pub(super) fn new(revision: Revision) -> Log {
        Log {
            changes: RwLock::new(Changes { ring: VecDeque::new(), bytes: 0 }),
            everything: Topic::new(revision),
            topics: Mutex::default(),
        }
    }

    /// The oldest revision from which the log is complete.
    pub(super) fn oldest(&self) -> Revision {
        Revision(self.everything.lost.load(Ordering::Relaxed))
    }

    /// Takes in a change. `by_node` is set for the resource whose objects are found by node.
    pub(super) fn add(&self, change: Change, by_node: Option<&Row>, touched: &mut Touched) {
        // Held to the end: whoever comes to follow a topic finds a change in the log, or is woken for it.
        let topics = self.topics.lock();
        touched.add(&self.everything);
        topics.concerned(&change, by_node).for_each(|topic| touched.add(topic));
        let mut changes = self.changes.write();
        changes.bytes += change.size();
        changes.ring.push_back(Arc::new(change));
        if let Some(passed) = changes.ring.len().checked_sub(WARM + 1) {
            changes.ring[passed].cool();
        }
        while changes.ring.len() > LOG_EVENTS || changes.bytes > LOG_BYTES {
            self.lose_first(&topics, &mut changes, by_node);
        }
    }

    /// Drops changes that are not [`FRESH`] any more, but for a [`FEW`]. `by_node` as for [`Log::add`].
    pub(super) fn lose_old(&self, now: Instant, by_node: Option<&Row>) {
        let topics = self.topics.lock();
        let mut changes = self.changes.write();
        while changes.ring.len() > FEW && changes.ring.front().is_some_and(|first| now - first.at > FRESH) {
            self.lose_first(&topics, &mut changes, by_node);
        }
        // What was there for a burst is not kept for the next one.
        if changes.ring.capacity() > 4 * changes.ring.len().max(FEW) {
            changes.ring.shrink_to_fit();
        }
    }

    fn lose_first(&self, topics: &Topics, changes: &mut Changes, by_node: Option<&Row>) {
        let Some(gone) = changes.ring.pop_front() else { return };
        changes.bytes -= gone.size();
        for topic in topics.concerned(&gone, by_node).chain([&self.everything]) {
            topic.lost.store(gone.revision.0, Ordering::Relaxed);
        }
    }

    /// Whoever knows of something before this revision lists again.
    pub(super) fn forget(&self, revision: Revision, touched: &mut Touched) {
        let topics = self.topics.lock();
        let mut changes = self.changes.write();
        changes.ring.clear();
        changes.bytes = 0;
        for topic in topics.all().chain([&self.everything]) {
            topic.lost.store(revision.0, Ordering::Relaxed);
            touched.add(topic);
        }
    }

    /// Wakes all: the server stops.
    pub(super) fn wake_all(&self) {
        let topics = self.topics.lock();
        topics.all().chain([&self.everything]).for_each(|topic| topic.wake());
    }

    fn follow(&self, interest: &Interest, follower: &Arc<Follower>) -> Arc<Topic> {
        let mut topics = self.topics.lock();
        let topic = match topics.place(interest) {
            None => &self.everything,
            // What of the past concerned a new topic is not known: as if it had been everything.
            Some((map, name)) => map.entry(name.into()).or_insert_with(|| Topic::new(self.oldest())),
        };
        topic.followers.lock().push(follower.clone());
        topic.clone()
    }

    fn leave(&self, interest: &Interest, topic: &Topic, follower: &Arc<Follower>) {
        let mut topics = self.topics.lock();
        let mut followers = topic.followers.lock();
        if let Some(at) = followers.iter().position(|one| Arc::ptr_eq(one, follower)) {
            followers.swap_remove(at);
        }
        if followers.is_empty()
            && let Some((map, name)) = topics.place(interest)
        {
            map.remove(name);
        }
    }
}

/// A place in the log of a resource.
pub struct Subscription {
    cache: Arc<Cache>,
    log: Arc<Log>,
    after: Revision,
    interest: Interest,
    topic: Arc<Topic>,
    follower: Arc<Follower>,
}

impl Subscription {
    pub(super) fn new(cache: Arc<Cache>, log: Arc<Log>, after: Revision, interest: Interest) -> Subscription {
        let follower = Arc::default();
        let topic = log.follow(&interest, &follower);
        Subscription { cache, log, after, interest, topic, follower }
    }

    /// The revision up to which changes have been taken.
    pub fn revision(&self) -> Revision {
        self.after
    }

    /// Takes up to `limit` further changes; none if there are none yet.
    ///
    /// # Errors
    /// [`ApiError::expired`] if something that may concern this subscription has fallen off the log before it was taken.
    pub fn take(&mut self, limit: usize) -> Result<Vec<Arc<Change>>> {
        // Read before the log: everything up to here is in the log.
        let newest = self.cache.snapshot.load().revision;
        let changes = self.log.changes.read();
        let lost = self.topic.lost.load(Ordering::Relaxed);
        if self.after.0 < lost {
            return Err(ApiError::expired(format!("too old resource version: {} ({lost})", self.after)));
        }
        let start = changes.ring.partition_point(|c| c.revision <= self.after);
        let taken: Vec<Arc<Change>> = changes.ring.range(start..).take(limit).cloned().collect();
        self.after = match taken.last() {
            Some(last) if taken.len() == limit => last.revision,
            Some(last) => last.revision.max(newest),
            None => self.after.max(newest),
        };
        Ok(taken)
    }

    /// Waits for a change.
    pub async fn changed(&mut self) {
        std::future::poll_fn(|context| self.poll_changed(context)).await;
    }

    /// Waits for a change.
    pub fn poll_changed(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let woken = || self.follower.woken.swap(false, Ordering::AcqRel);
        if woken() {
            return Poll::Ready(());
        }
        self.follower.waker.register(context.waker());
        // Who was woken in between.
        if woken() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.log.leave(&self.interest, &self.topic, &self.follower);
    }
}

#[cfg(test)]
mod tests;
