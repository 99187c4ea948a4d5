//! The snapshot cache.
//!
//! One watch on the whole registry feeds one writer, which keeps an immutable ordered map per resource and a bounded
//! log of its latest changes. Reads take a snapshot and never wait for a writer; watchers follow the log by revision,
//! so that one that does not read costs nothing: it falls off the log's end and is told to list again.

use std::{
    collections::VecDeque,
    ops::Bound,
    sync::{Arc, OnceLock},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use imbl::OrdMap;
use parking_lot::RwLock;
use seawall_store::{Entry, Event, ListOptions, Revision, Store};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    error::{ApiError, Result, future},
    object::Object,
    registry::{Registry, ResourceId},
};

/// All keys of objects start with this.
pub const PREFIX: &str = "/registry/";

/// How many changes of a resource are kept for watchers, at most.
const LOG_EVENTS: usize = 8192;
/// How many bytes of objects the log of a resource may keep alive, at most.
const LOG_BYTES: usize = 32 << 20;
/// How long a read waits for a revision that another server has already acknowledged.
const WAIT: Duration = Duration::from_secs(3);
/// How long to wait before a broken watch on the store is set up again.
const RECONNECT: Duration = Duration::from_millis(50);
/// How many changes before its start a server knows of, if the store still has them: clients that watched another
/// server, or this one before a restart, go on without listing again.
const HISTORY: u64 = 5000;

/// The objects of one resource by key.
pub type Objects = OrdMap<Arc<str>, Arc<Object>>;

/// Everything at one revision.
#[derive(Clone)]
pub struct Snapshot {
    /// The revision.
    pub revision: Revision,
    maps: Vec<Objects>,
}

impl Snapshot {
    /// The objects of a resource.
    pub fn of(&self, id: ResourceId) -> &Objects {
        &self.maps[id.0]
    }

    /// One object.
    pub fn get(&self, id: ResourceId, key: &str) -> Option<&Arc<Object>> {
        self.maps[id.0].get(key)
    }

    /// The objects whose key starts with `prefix` and comes after `after`, in order.
    pub fn range<'a>(
        &'a self,
        id: ResourceId,
        prefix: &'a str,
        after: Option<&str>,
    ) -> impl Iterator<Item = &'a Arc<Object>> {
        range(&self.maps[id.0], prefix, after)
    }
}

/// The objects of a map whose key starts with `prefix` and comes after `after`, in order.
pub fn range<'a>(map: &'a Objects, prefix: &'a str, after: Option<&str>) -> impl Iterator<Item = &'a Arc<Object>> {
    let start: Bound<Arc<str>> = match after {
        Some(key) => Bound::Excluded(key.into()),
        None => Bound::Included(prefix.into()),
    };
    map.range((start, Bound::Unbounded)).map(|(_, object)| object).take_while(move |o| o.key.starts_with(prefix))
}

/// A change of an object.
pub struct Change {
    /// The revision of the write.
    pub revision: Revision,
    /// The object before, `None` if it was created.
    pub old: Option<Arc<Object>>,
    /// The object after, `None` if it was deleted.
    pub new: Option<Arc<Object>>,
    /// The encoded event, for each of the three types, made by the first watcher that needs it.
    encoded: [OnceLock<Bytes>; 3],
}

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
    /// The object that an event of this type carries: the last state of what was deleted.
    pub fn object(&self, ty: EventType) -> Option<&Arc<Object>> {
        match ty {
            EventType::Deleted => self.old.as_ref().or(self.new.as_ref()),
            _ => self.new.as_ref(),
        }
    }

    /// The event as a line of JSON. It is encoded once and shared by all watchers.
    pub fn json(&self, ty: EventType) -> Bytes {
        let slot = &self.encoded[ty as usize];
        slot.get_or_init(|| match self.object(ty) {
            Some(object) => event_line(ty, object, self.revision),
            None => Bytes::new(),
        })
        .clone()
    }

    fn size(&self) -> usize {
        self.old.as_ref().map_or(0, |o| o.bytes.len()) + 256
    }
}

/// A watch event as a line of JSON.
pub fn event_line(ty: EventType, object: &Object, revision: Revision) -> Bytes {
    let mut out = BytesMut::with_capacity(object.bytes.len() + 64);
    out.put_slice(b"{\"type\":\"");
    out.put_slice(ty.name().as_bytes());
    out.put_slice(b"\",\"object\":");
    object.write(revision, &mut out);
    out.put_slice(b"}\n");
    out.freeze()
}

struct Log {
    changes: RwLock<Changes>,
    /// Wakes watchers. The value is the revision of the last change.
    wake: watch::Sender<Revision>,
}

struct Changes {
    ring: VecDeque<Arc<Change>>,
    bytes: usize,
    /// Every change after this revision is in the ring.
    complete_after: Revision,
}

/// The cache.
pub struct Cache {
    registry: Arc<Registry>,
    snapshot: ArcSwap<Snapshot>,
    logs: Vec<Log>,
    revision: watch::Sender<Revision>,
}

impl Cache {
    /// Reads everything from the store and keeps following it until `stop`.
    pub async fn start(registry: Arc<Registry>, store: Arc<dyn Store>, stop: CancellationToken) -> Result<Arc<Cache>> {
        let newest = store.revision().await.map_err(ApiError::store)?;
        let (revision, maps) = load_history(&registry, &*store, newest).await?;
        let log = || Log {
            changes: RwLock::new(Changes { ring: VecDeque::new(), bytes: 0, complete_after: revision }),
            wake: watch::Sender::new(revision),
        };
        let cache = Arc::new(Cache {
            logs: (0..registry.len()).map(|_| log()).collect(),
            registry,
            snapshot: ArcSwap::from_pointee(Snapshot { revision, maps }),
            revision: watch::Sender::new(revision),
        });
        let writer = cache.clone();
        tokio::spawn(async move {
            let follow = writer.follow(store);
            tokio::select! { () = follow => {}, () = stop.cancelled() => {} }
        });
        cache.at_least(newest).await?;
        Ok(cache)
    }

    /// The newest state.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// The state at `revision` or later.
    pub async fn at_least(&self, revision: Revision) -> Result<Arc<Snapshot>> {
        let snapshot = self.snapshot.load();
        if snapshot.revision >= revision {
            return Ok(arc_swap::Guard::into_inner(snapshot));
        }
        let mut follow = self.revision.subscribe();
        match tokio::time::timeout(WAIT, follow.wait_for(|r| *r >= revision)).await {
            Ok(Ok(_)) => Ok(self.snapshot.load_full()),
            _ => Err(future(revision.0, self.snapshot.load().revision.0)),
        }
    }

    /// Follows a resource from a revision on.
    pub fn subscribe(self: &Arc<Self>, id: ResourceId, after: Revision) -> Subscription {
        Subscription { cache: self.clone(), id, after, wake: self.logs[id.0].wake.subscribe() }
    }

    /// The oldest revision from which a watch of this resource is complete.
    pub fn oldest(&self, id: ResourceId) -> Revision {
        self.logs[id.0].changes.read().complete_after
    }

    async fn follow(&self, store: Arc<dyn Store>) {
        loop {
            if let Err(error) = self.follow_once(&*store).await {
                tracing::warn!(%error, "the watch on the store broke");
                // Usually it goes on where it broke. Only if that is forgotten, what was missed is found by a fresh list.
                if matches!(error, seawall_store::Error::Compacted { .. } | seawall_store::Error::Future { .. }) {
                    match load(&self.registry, &*store).await {
                        Ok((revision, maps)) => self.catch_up(revision, maps),
                        Err(error) => tracing::warn!(%error, "cannot list the store"),
                    }
                }
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }

    async fn follow_once(&self, store: &dyn Store) -> Result<(), seawall_store::Error> {
        let after = self.snapshot.load().revision;
        let mut steps = store.watch(PREFIX, after).await?;
        while let Some(step) = steps.next().await {
            let progress = step?;
            self.apply(progress.events, progress.revision);
        }
        Ok(())
    }

    fn apply(&self, events: Vec<Event>, revision: Revision) {
        let mut next = Snapshot::clone(&self.snapshot.load());
        let mut touched: Vec<ResourceId> = Vec::new();
        for event in events {
            let Some(id) = self.registry.by_key(event.key()) else { continue };
            let revision = event.revision();
            let map = &mut next.maps[id.0];
            let (old, new) = match event {
                Event::Put(entry) => match Object::read(self.registry.row(id), &entry) {
                    Ok(object) => {
                        let object = Arc::new(object);
                        (map.insert(object.key.clone(), object.clone()), Some(object))
                    }
                    Err(error) => {
                        tracing::error!(%error, "ignored");
                        continue;
                    }
                },
                Event::Delete { key, .. } => match map.remove(&*key) {
                    Some(old) => (Some(old), None),
                    None => continue,
                },
            };
            self.log(id, Change { revision, old, new, encoded: Default::default() });
            if !touched.contains(&id) {
                touched.push(id);
            }
        }
        self.publish(next, revision, touched);
    }

    fn log(&self, id: ResourceId, change: Change) {
        let mut changes = self.logs[id.0].changes.write();
        changes.bytes += change.size();
        changes.ring.push_back(Arc::new(change));
        while changes.ring.len() > LOG_EVENTS || changes.bytes > LOG_BYTES {
            match changes.ring.pop_front() {
                Some(gone) => {
                    changes.bytes -= gone.size();
                    changes.complete_after = gone.revision;
                }
                None => break,
            }
        }
    }

    fn publish(&self, mut next: Snapshot, revision: Revision, touched: Vec<ResourceId>) {
        next.revision = next.revision.max(revision);
        let revision = next.revision;
        // The log is complete before the snapshot shows: who lists and then watches misses nothing.
        self.snapshot.store(Arc::new(next));
        self.revision.send_replace(revision);
        for id in touched {
            self.logs[id.0].wake.send_replace(revision);
        }
    }

    /// Brings the cache to a freshly listed state after the watch broke. The order of what happened in between is
    /// lost, so watchers that are behind are told to list again.
    fn catch_up(&self, revision: Revision, maps: Vec<Objects>) {
        if revision <= self.snapshot.load().revision {
            return;
        }
        let next = Snapshot { revision, maps };
        for log in &self.logs {
            let mut changes = log.changes.write();
            changes.ring.clear();
            changes.bytes = 0;
            changes.complete_after = revision;
        }
        let all = (0..self.logs.len()).map(ResourceId).collect();
        self.publish(next, revision, all);
    }
}

/// The state some time ago, so that the watch from there fills the logs.
async fn load_history(registry: &Registry, store: &dyn Store, newest: Revision) -> Result<(Revision, Vec<Objects>)> {
    let mut at = Revision(newest.0.saturating_sub(HISTORY).max(1).min(newest.0));
    // Once more with the oldest revision that there is.
    for _ in 0..2 {
        match store.list(PREFIX, ListOptions { at: Some(at), ..Default::default() }).await {
            Ok(_) if at.0 == 0 => break,
            Ok(listing) => return Ok((at, maps(registry, &listing.entries))),
            Err(seawall_store::Error::Compacted { oldest, .. }) if oldest > at => at = oldest,
            Err(error) => {
                tracing::debug!(%error, "the history is not read");
                break;
            }
        }
    }
    load(registry, store).await
}

async fn load(registry: &Registry, store: &dyn Store) -> Result<(Revision, Vec<Objects>)> {
    let listing = store.list(PREFIX, ListOptions::default()).await.map_err(ApiError::store)?;
    Ok((listing.revision, maps(registry, &listing.entries)))
}

fn maps(registry: &Registry, entries: &[Entry]) -> Vec<Objects> {
    let mut maps: Vec<Objects> = (0..registry.len()).map(|_| OrdMap::new()).collect();
    for entry in entries {
        let Some(id) = registry.by_key(&entry.key) else { continue };
        match Object::read(registry.row(id), entry) {
            Ok(object) => {
                maps[id.0].insert(object.key.clone(), Arc::new(object));
            }
            Err(error) => tracing::error!(%error, "ignored"),
        }
    }
    maps
}

/// A place in the log of a resource.
pub struct Subscription {
    cache: Arc<Cache>,
    id: ResourceId,
    after: Revision,
    wake: watch::Receiver<Revision>,
}

impl Subscription {
    /// The revision up to which changes have been taken.
    pub fn revision(&self) -> Revision {
        self.after
    }

    /// Takes up to `limit` further changes; none if there are none yet.
    ///
    /// # Errors
    /// [`ApiError::expired`] if the log no longer goes back to where this subscription stands.
    pub fn take(&mut self, limit: usize) -> Result<Vec<Arc<Change>>> {
        // Read before the log: everything up to here is in the log.
        let newest = self.cache.snapshot.load().revision;
        let changes = self.cache.logs[self.id.0].changes.read();
        if self.after < changes.complete_after {
            return Err(ApiError::expired(format!(
                "too old resource version: {} ({})",
                self.after, changes.complete_after
            )));
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
        // The sender lives as long as the cache, which `self` keeps alive.
        let _ = self.wake.changed().await;
    }
}
