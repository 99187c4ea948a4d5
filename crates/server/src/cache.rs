//! The snapshot cache.
//!
//! One watch on the whole registry feeds one writer, which keeps an immutable ordered map per resource and a bounded
//! log of its latest changes. Reads take a snapshot and never wait for a writer; watchers follow the log by revision,
//! so that one that does not read costs nothing: it falls off the log's end and is told to list again.

pub mod by_node;
mod log;

pub use log::{Change, EventType, Interest, Subscription, event_line};

use std::{
    ops::Bound,
    sync::{Arc, LazyLock},
    time::Duration,
};

use arc_swap::ArcSwap;
use by_node::ByNode;
use futures::StreamExt;
use imbl::OrdMap;
use log::{Log, Touched};
use parking_lot::Mutex;
use seawall_api::Row;
use seawall_store::{Entry, Event, ListOptions, Revision, Store};
use serde_json::Value;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{ApiError, Result, future},
    object::Object,
    registry::{Changed, Registry, ResourceId},
};

/// All keys of objects start with this.
pub const PREFIX: &str = "/registry/";

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
    by_node: ByNode,
    pods: Option<ResourceId>,
}

impl Snapshot {
    fn new(registry: &Registry, revision: Revision, maps: Vec<Objects>) -> Snapshot {
        let pods = registry.by_name("", "pods");
        let index = pods.and_then(|(id, row)| Some(ByNode::new(row, maps.get(id.0)?)));
        Snapshot { revision, maps, by_node: index.unwrap_or_default(), pods: pods.map(|(id, _)| id) }
    }

    /// Pods by their nodes, if this resource is that of pods.
    pub fn by_node(&self, id: ResourceId) -> Option<&ByNode> {
        (self.pods == Some(id)).then_some(&self.by_node)
    }

    /// The objects of a resource; none if this state is older than the resource.
    pub fn of(&self, id: ResourceId) -> &Objects {
        static NOTHING: LazyLock<Objects> = LazyLock::new(OrdMap::new);
        self.maps.get(id.0).unwrap_or(&NOTHING)
    }

    /// One object.
    pub fn get(&self, id: ResourceId, key: &str) -> Option<&Arc<Object>> {
        self.of(id).get(key)
    }

    /// The objects whose key starts with `prefix` and comes after `after`, in order.
    pub fn range<'a>(
        &'a self,
        id: ResourceId,
        prefix: &str,
        after: Option<&str>,
    ) -> impl Iterator<Item = &'a Arc<Object>> + use<'a> {
        range(self.of(id), prefix, after)
    }
}

/// The objects of a map whose key starts with `prefix`, which ends with a slash, and comes after `after`, in order.
pub fn range<'a>(
    map: &'a Objects,
    prefix: &str,
    after: Option<&str>,
) -> impl Iterator<Item = &'a Arc<Object>> + use<'a> {
    // The character after the slash: to tell where it ends, no object needs to be looked at.
    let end = prefix.strip_suffix('/').map(|start| format!("{start}0"));
    // Clients say where to go on: not before the beginning.
    let start = after.filter(|after| after.starts_with(prefix)).map_or(Bound::Included(prefix), Bound::Excluded);
    let end = end.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
    map.range::<_, str>((start, end)).map(|(_, object)| object)
}

/// The cache.
pub struct Cache {
    registry: Arc<Registry>,
    /// The number of CustomResourceDefinitions.
    definitions: Option<ResourceId>,
    snapshot: ArcSwap<Snapshot>,
    /// One a resource; more are added when there are more, none goes.
    logs: ArcSwap<Vec<Arc<Log>>>,
    /// What no resource claims: objects of a definition that is not there yet, or not any more. The writer's alone.
    strays: Mutex<OrdMap<Arc<str>, Entry>>,
    revision: watch::Sender<Revision>,
}

impl Cache {
    /// Reads everything from the store and keeps following it until `stop`.
    pub async fn start(registry: Arc<Registry>, store: Arc<dyn Store>, stop: CancellationToken) -> Result<Arc<Cache>> {
        let newest = store.revision().await.map_err(ApiError::store)?;
        let definitions = registry.by_name("apiextensions.k8s.io", "customresourcedefinitions").map(|(id, _)| id);
        let (revision, Loaded { maps, strays }) = load_history(&registry, &*store, newest).await?;
        let first = Snapshot::new(&registry, revision, maps);
        let cache = Arc::new(Cache {
            logs: ArcSwap::from_pointee((0..registry.len()).map(|_| Arc::new(Log::new(revision))).collect()),
            registry,
            definitions,
            snapshot: ArcSwap::from_pointee(first),
            strays: Mutex::new(strays),
            revision: watch::Sender::new(revision),
        });
        let writer = cache.clone();
        tokio::spawn(async move {
            let (follow, aging) = (writer.follow(store), writer.age());
            tokio::select! { () = follow => {}, () = aging => {}, () = stop.cancelled() => {} }
            writer.wake_all();
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

    /// Follows a resource from a revision on, woken by what `interest` says.
    pub fn subscribe(self: &Arc<Self>, id: ResourceId, after: Revision, interest: Interest) -> Subscription {
        Subscription::new(self.clone(), self.log_of(id), after, interest)
    }

    fn log_of(&self, id: ResourceId) -> Arc<Log> {
        if let Some(log) = self.logs.load().get(id.0) {
            return log.clone();
        }
        // Somebody knows of a new resource before the writer has come to make place for it.
        self.more_logs(id.0 + 1, self.snapshot.load().revision);
        self.logs.load()[id.0].clone()
    }

    fn more_logs(&self, count: usize, revision: Revision) {
        self.logs.rcu(|logs| {
            let mut logs = Vec::clone(logs);
            let count = count.max(logs.len());
            logs.resize_with(count, || Arc::new(Log::new(revision)));
            logs
        });
    }

    async fn age(&self) {
        loop {
            tokio::time::sleep(log::FRESH / 5).await;
            self.lose_old();
        }
    }

    /// Drops changes that are too old for anybody to go on from there, so that memory does not stay what it was in a burst.
    fn lose_old(&self) {
        let (now, pods) = (Instant::now(), self.snapshot.load().pods);
        for (number, log) in self.logs.load().iter().enumerate() {
            let row = pods.filter(|pods| pods.0 == number).and_then(|pods| self.registry.row(pods));
            log.lose_old(now, row.as_deref());
        }
    }

    /// The oldest revision from which a watch of this resource is complete.
    pub fn oldest(&self, id: ResourceId) -> Revision {
        self.log_of(id).oldest()
    }

    /// Wakes all who follow anything: the server stops.
    fn wake_all(&self) {
        self.logs.load().iter().for_each(|log| log.wake_all());
    }

    async fn follow(&self, store: Arc<dyn Store>) {
        loop {
            if let Err(error) = self.follow_once(&*store).await {
                tracing::warn!(%error, "the watch on the store broke");
                // Usually it goes on where it broke. Only if that is forgotten, what was missed is found by a fresh list.
                if matches!(error, seawall_store::Error::Compacted { .. } | seawall_store::Error::Future { .. }) {
                    match load(&self.registry, &*store).await {
                        Ok((revision, loaded)) => self.catch_up(revision, loaded),
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
        let mut touched = Touched::default();
        for event in events {
            let found = self.registry.by_key(event.key()).and_then(|id| Some((id, self.registry.row(id)?)));
            let Some((id, row)) = found else {
                self.stray(event);
                continue;
            };
            let revision = event.revision();
            let map = &mut next.maps[id.0];
            let (old, new) = match event {
                Event::Put(entry) => match Object::read(&row, &entry) {
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
            if next.pods == Some(id) {
                next.by_node.change(&row, old.as_ref(), new.as_ref());
            }
            if Some(id) == self.definitions {
                // Before the events of its objects.
                self.define(new.as_deref().or(old.as_deref()), new.is_some(), &mut next, revision, &mut touched);
            }
            let by_node = (next.pods == Some(id)).then_some(&*row);
            self.log_of(id).add(Change::new(revision, old, new), by_node, &mut touched);
        }
        self.publish(next, revision, touched);
    }

    /// Keeps what belongs to nobody: names of groups have a dot, which tells custom resources from other keys.
    fn stray(&self, event: Event) {
        match event {
            Event::Put(entry) if may_be_custom(&entry.key) => {
                self.strays.lock().insert(entry.key.clone(), entry);
            }
            Event::Put(_) => {}
            Event::Delete { key, .. } => {
                self.strays.lock().remove(&*key);
            }
        }
    }

    /// Changes the table of resources as a definition says.
    fn define(
        &self,
        definition: Option<&Object>,
        there: bool,
        next: &mut Snapshot,
        revision: Revision,
        touched: &mut Touched,
    ) {
        let Some(definition) = definition else { return };
        let value = there.then(|| definition.value());
        for change in self.registry.define([(definition.name(), value.as_ref())]) {
            match change {
                Changed::Nothing => {}
                Changed::Gone(id) => {
                    let mut strays = self.strays.lock();
                    for (key, object) in std::mem::take(&mut next.maps[id.0]) {
                        strays.insert(key, object.entry());
                    }
                }
                Changed::New(id) | Changed::Row(id) => {
                    let Some(row) = self.registry.row(id) else { continue };
                    self.grow(next, revision);
                    // Selectable fields and defaults may be others now.
                    let map = std::mem::take(&mut next.maps[id.0]);
                    let mut entries: Vec<Entry> = map.values().map(|object| object.entry()).collect();
                    entries.extend(take_strays(&mut self.strays.lock(), &row.prefix()));
                    next.maps[id.0] = entries.iter().filter_map(|entry| read(&row, entry)).collect();
                    if change == Changed::New(id) {
                        // Whoever knows of it from before it went and came back lists it again.
                        self.log_of(id).forget(revision, touched);
                    }
                }
            }
        }
    }

    /// Makes place for resources that have been added.
    fn grow(&self, next: &mut Snapshot, revision: Revision) {
        let count = self.registry.len();
        next.maps.resize_with(count.max(next.maps.len()), OrdMap::new);
        if self.logs.load().len() < count {
            self.more_logs(count, revision);
        }
    }

    fn publish(&self, mut next: Snapshot, revision: Revision, touched: Touched) {
        next.revision = next.revision.max(revision);
        let revision = next.revision;
        // The log is complete before the snapshot shows: who lists and then watches misses nothing.
        self.snapshot.store(Arc::new(next));
        self.revision.send_replace(revision);
        touched.wake();
    }

    /// Brings the cache to a freshly listed state after the watch broke. The order of what happened in between is
    /// lost, so watchers that are behind are told to list again.
    fn catch_up(&self, revision: Revision, loaded: Loaded) {
        if revision <= self.snapshot.load().revision {
            return;
        }
        let mut next = Snapshot::new(&self.registry, revision, loaded.maps);
        *self.strays.lock() = loaded.strays;
        self.grow(&mut next, revision);
        let mut touched = Touched::default();
        self.logs.load().iter().for_each(|log| log.forget(revision, &mut touched));
        self.publish(next, revision, touched);
    }
}

fn may_be_custom(key: &str) -> bool {
    key.strip_prefix(PREFIX).and_then(|rest| rest.split('/').next()).is_some_and(|group| group.contains('.'))
}

fn take_strays(strays: &mut OrdMap<Arc<str>, Entry>, prefix: &str) -> Vec<Entry> {
    let start: Bound<Arc<str>> = Bound::Included(prefix.into());
    let own: Vec<Entry> = strays
        .range((start, Bound::Unbounded))
        .take_while(|(key, _)| key.starts_with(prefix))
        .map(|(_, entry)| entry.clone())
        .collect();
    for entry in &own {
        strays.remove(&entry.key);
    }
    own
}

fn read(row: &Row, entry: &Entry) -> Option<(Arc<str>, Arc<Object>)> {
    match Object::read(row, entry) {
        Ok(object) => Some((object.key.clone(), Arc::new(object))),
        Err(error) => {
            tracing::error!(%error, "ignored");
            None
        }
    }
}

/// What a list of the store holds.
struct Loaded {
    maps: Vec<Objects>,
    strays: OrdMap<Arc<str>, Entry>,
}

/// The state some time ago, so that the watch from there fills the logs.
async fn load_history(registry: &Registry, store: &dyn Store, newest: Revision) -> Result<(Revision, Loaded)> {
    let mut at = Revision(newest.0.saturating_sub(HISTORY).max(1).min(newest.0));
    // Once more with the oldest revision that there is.
    for _ in 0..2 {
        match store.list(PREFIX, ListOptions { at: Some(at), ..Default::default() }).await {
            Ok(_) if at.0 == 0 => break,
            Ok(listing) => return Ok((at, loaded(registry, &listing.entries))),
            Err(seawall_store::Error::Compacted { oldest, .. }) if oldest > at => at = oldest,
            Err(error) => {
                tracing::debug!(%error, "the history is not read");
                break;
            }
        }
    }
    load(registry, store).await
}

async fn load(registry: &Registry, store: &dyn Store) -> Result<(Revision, Loaded)> {
    let listing = store.list(PREFIX, ListOptions::default()).await.map_err(ApiError::store)?;
    Ok((listing.revision, loaded(registry, &listing.entries)))
}

fn loaded(registry: &Registry, entries: &[Entry]) -> Loaded {
    // Definitions first, since they say what the other keys are.
    let mut values: Vec<(String, Option<Value>)> = Vec::new();
    if let Some((_, row)) = registry.by_name("apiextensions.k8s.io", "customresourcedefinitions") {
        let prefix = row.prefix();
        let own = entries.iter().filter_map(|e| Some((e.key.strip_prefix(&*prefix)?, e)));
        values.extend(own.map(|(name, e)| (name.to_owned(), serde_json::from_slice(&e.value).ok())));
    }
    for (_, row) in registry.all_rows() {
        if let Some(version) = &row.custom
            && !values.iter().any(|(name, _)| **name == *version.definition.name)
        {
            values.push((version.definition.name.to_string(), None));
        }
    }
    registry.define(values.iter().map(|(name, value)| (&**name, value.as_ref())));
    let mut loaded = Loaded { maps: (0..registry.len()).map(|_| OrdMap::new()).collect(), strays: OrdMap::new() };
    for entry in entries {
        match registry.by_key(&entry.key).and_then(|id| Some((id, registry.row(id)?))) {
            Some((id, row)) => loaded.maps[id.0].extend(read(&row, entry)),
            None if may_be_custom(&entry.key) => {
                loaded.strays.insert(entry.key.clone(), entry.clone());
            }
            None => {}
        }
    }
    loaded
}
