//! One watch per kind, one cache that all controllers read, and their own writes visible in it at once.
//!
//! Upstream's controllers keep "expectations" so that a cache which has not caught up with their own writes does not
//! make them create or delete twice. Here the answers of the API server to our writes go into the cache right away
//! ([`Informer::note`]), and what the watch reports later is compared by resource version (KEP-5504 makes them
//! comparable). A controller thus always reads its own writes, and stale caches cannot arise from them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Debug,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, pin_mut};
use kube::{
    Api, Resource, ResourceExt,
    runtime::watcher::{self, Event},
};
use parking_lot::RwLock;
use serde::de::DeserializeOwned;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Key, objects::controller_of};

/// What can be watched.
pub trait Object: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static {}
impl<K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static> Object for K {}

/// Called with the object before and after a change. Runs on the watch's task: it may only put keys into queues.
type Handler<K> = Box<dyn Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync>;

/// A write of ours that the watch never confirms is dropped after this long, as upstream's expectations expire.
const UNCONFIRMED: Duration = Duration::from_secs(300);
/// After an error of the watch: the first wait, and the longest. Short, since a server that restarts is back in a second.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

struct Inner<K> {
    objects: BTreeMap<Key, Arc<K>>,
    /// Keys by the uid of the owner that controls them; what nobody controls is under the empty uid.
    controlled: HashMap<String, BTreeSet<Key>>,
    /// Created by us and not yet seen by the watch: the resource version, and when.
    unconfirmed: HashMap<Key, (u64, Instant)>,
    /// Deleted by us, by uid, and the deletion not yet seen by the watch.
    gone: HashMap<String, Instant>,
    /// The largest resource version that the watch has reported.
    seen: u64,
}

/// The cache of one kind.
pub struct Informer<K> {
    inner: RwLock<Inner<K>>,
    handlers: RwLock<Vec<Handler<K>>>,
    synced: watch::Sender<bool>,
}

impl<K: Object> Default for Informer<K> {
    fn default() -> Self {
        Informer {
            inner: RwLock::new(Inner {
                objects: BTreeMap::new(),
                controlled: HashMap::new(),
                unconfirmed: HashMap::new(),
                gone: HashMap::new(),
                seen: 0,
            }),
            handlers: RwLock::new(Vec::new()),
            synced: watch::Sender::new(false),
        }
    }
}

type Change<K> = (Option<Arc<K>>, Option<Arc<K>>);

impl<K: Object> Informer<K> {
    /// The object at `key`.
    pub fn get(&self, key: &Key) -> Option<Arc<K>> {
        self.inner.read().objects.get(key).cloned()
    }

    /// All objects, in order of their keys.
    pub fn all(&self) -> Vec<Arc<K>> {
        self.inner.read().objects.values().cloned().collect()
    }

    /// All objects of a namespace.
    pub fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let inner = self.inner.read();
        let from = Key::new(namespace, "");
        inner.objects.range(from..).take_while(|(k, _)| k.namespace == namespace).map(|(_, o)| o.clone()).collect()
    }

    /// The objects whose controller has this uid.
    pub fn controlled_by(&self, uid: &str) -> Vec<Arc<K>> {
        let inner = self.inner.read();
        let keys = inner.controlled.get(uid).into_iter().flatten();
        keys.filter_map(|key| inner.objects.get(key).cloned()).collect()
    }

    /// The objects of a namespace that nobody controls.
    pub fn orphans(&self, namespace: &str) -> Vec<Arc<K>> {
        let inner = self.inner.read();
        let Some(keys) = inner.controlled.get("") else { return Vec::new() };
        let keys = keys.range(Key::new(namespace, "")..).take_while(|key| key.namespace == namespace);
        keys.filter_map(|key| inner.objects.get(key).cloned()).collect()
    }

    /// Calls `handler` with every change from now on.
    pub fn on_change(&self, handler: impl Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync + 'static) {
        self.handlers.write().push(Box::new(handler));
    }

    /// Returns when the first listing is complete.
    pub async fn synced(&self) {
        // The sender is ours, so it cannot be gone.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
    }

    /// Takes in the API server's answer to a write of ours.
    pub fn note(&self, object: K) {
        let change = self.inner.write().note(object, Instant::now());
        self.tell(change);
    }

    /// Takes in that the API server has removed an object at our request.
    pub fn note_gone(&self, object: &K) {
        let change = self.inner.write().note_gone(object, Instant::now());
        self.tell(change);
    }

    fn tell(&self, changes: impl IntoIterator<Item = Change<K>>) {
        for (old, new) in changes {
            for handler in self.handlers.read().iter() {
                handler(old.as_ref(), new.as_ref());
            }
        }
    }

    /// Watches until `shutdown`.
    pub async fn run(self: Arc<Self>, api: Api<K>, config: watcher::Config, shutdown: CancellationToken) {
        let stream = watcher::watcher(api, config);
        pin_mut!(stream);
        let mut wait = FIRST_WAIT;
        let mut listed = Vec::new();
        while let Some(Some(event)) = shutdown.run_until_cancelled(stream.next()).await {
            match event {
                Ok(event) => {
                    wait = FIRST_WAIT;
                    self.handle(event, &mut listed);
                }
                Err(error) => {
                    tracing::debug!(kind = %K::kind(&()), error = %error, "the watch was interrupted and goes on");
                    if shutdown.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                        return;
                    }
                    wait = (wait * 2).min(LONGEST_WAIT);
                }
            }
        }
    }

    pub(crate) fn handle(&self, event: Event<K>, listed: &mut Vec<K>) {
        let now = Instant::now();
        match event {
            Event::Init => listed.clear(),
            Event::InitApply(object) => listed.push(object),
            Event::InitDone => {
                let changes = self.inner.write().replace(std::mem::take(listed));
                self.tell(changes);
                self.synced.send_replace(true);
            }
            Event::Apply(object) => {
                let changes = self.inner.write().observe(object, now);
                self.tell(changes);
            }
            Event::Delete(object) => {
                let changes = self.inner.write().observe_gone(&object, now);
                self.tell(changes);
            }
        }
    }
}

/// The resource version as a number; 0 when it is not one, which then never wins a comparison.
fn version<K: Resource>(object: &K) -> u64 {
    object.meta().resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(0)
}

fn controller_uid<K: Resource>(object: &K) -> &str {
    controller_of(object).map_or("", |owner| owner.uid.as_str())
}

impl<K: Object> Inner<K> {
    fn insert(&mut self, mut object: K) -> Change<K> {
        // Nobody looks at it, and in memory it is far larger than everything else. An update without it leaves it as it is.
        object.meta_mut().managed_fields = None;
        let (key, new) = (Key::of(&object), Arc::new(object));
        let old = self.objects.insert(key.clone(), new.clone());
        let (before, after) = (old.as_deref().map(controller_uid), controller_uid(&*new));
        if before != Some(after) {
            if let Some(uid) = before {
                self.release(uid, &key);
            }
            self.controlled.entry(after.to_owned()).or_default().insert(key);
        }
        (old, Some(new))
    }

    fn remove(&mut self, key: &Key) -> Option<Change<K>> {
        let old = self.objects.remove(key)?;
        self.unconfirmed.remove(key);
        self.release(controller_uid(&*old), key);
        Some((Some(old), None))
    }

    fn release(&mut self, uid: &str, key: &Key) {
        if let Some(keys) = self.controlled.get_mut(uid) {
            keys.remove(key);
            if keys.is_empty() {
                self.controlled.remove(uid);
            }
        }
    }

    fn note(&mut self, object: K, now: Instant) -> Option<Change<K>> {
        let (key, new) = (Key::of(&object), version(&object));
        match self.objects.get(&key) {
            Some(current) if version(&**current) >= new => None,
            Some(_) => Some(self.insert(object)),
            // The watch has already passed this version: the object has come and gone.
            None if self.seen >= new => None,
            None => {
                self.unconfirmed.insert(key, (new, now));
                Some(self.insert(object))
            }
        }
    }

    fn note_gone(&mut self, object: &K, now: Instant) -> Option<Change<K>> {
        let key = Key::of(object);
        if self.objects.get(&key).and_then(|o| o.uid()) != object.uid() {
            return None;
        }
        self.gone.insert(object.uid().unwrap_or_default(), now);
        self.remove(&key)
    }

    fn observe(&mut self, object: K, now: Instant) -> Vec<Change<K>> {
        let (key, new) = (Key::of(&object), version(&object));
        self.unconfirmed.remove(&key);
        let mut changes = self.advance(new, now);
        let stale = self.objects.get(&key).is_some_and(|current| new != 0 && version(&**current) >= new);
        if !stale && !object.uid().is_some_and(|uid| self.gone.contains_key(&uid)) {
            changes.push(self.insert(object));
        }
        changes
    }

    fn observe_gone(&mut self, object: &K, now: Instant) -> Vec<Change<K>> {
        let key = Key::of(object);
        self.gone.remove(&object.uid().unwrap_or_default());
        let mut changes = self.advance(version(object), now);
        // A successor of the same name may have been noted already.
        if self.objects.get(&key).and_then(|o| o.uid()) == object.uid() {
            changes.extend(self.remove(&key));
        }
        changes
    }

    /// The watch has reached `version`: what we created before it and the watch has not reported does not exist.
    fn advance(&mut self, version: u64, now: Instant) -> Vec<Change<K>> {
        self.seen = self.seen.max(version);
        if self.unconfirmed.is_empty() && self.gone.is_empty() {
            return Vec::new();
        }
        let seen = self.seen;
        self.gone.retain(|_, since| now.duration_since(*since) < UNCONFIRMED);
        let lost: Vec<Key> = self
            .unconfirmed
            .iter()
            .filter(|(_, (at, since))| *at < seen || now.duration_since(*since) > UNCONFIRMED)
            .map(|(key, _)| key.clone())
            .collect();
        lost.iter().filter_map(|key| self.remove(key)).collect()
    }

    fn replace(&mut self, listed: Vec<K>) -> Vec<Change<K>> {
        let newest = listed.iter().map(version).max().unwrap_or(0);
        self.seen = self.seen.max(newest);
        let keys: BTreeSet<Key> = listed.iter().map(Key::of).collect();
        let uids: BTreeSet<String> = listed.iter().filter_map(|o| o.uid()).collect();
        self.gone.retain(|uid, _| uids.contains(uid));
        let kept: BTreeSet<Key> =
            self.unconfirmed.iter().filter(|(_, (at, _))| *at > newest).map(|(key, _)| key.clone()).collect();
        let missing: Vec<Key> =
            self.objects.keys().filter(|key| !keys.contains(key) && !kept.contains(key)).cloned().collect();
        let mut changes: Vec<_> = missing.iter().filter_map(|key| self.remove(key)).collect();
        for object in listed {
            let key = Key::of(&object);
            self.unconfirmed.remove(&key);
            let current = self.objects.get(&key);
            let stale = current.is_some_and(|o| o.uid() == object.uid() && version(&**o) >= version(&object));
            if !stale && !object.uid().is_some_and(|uid| self.gone.contains_key(&uid)) {
                changes.push(self.insert(object));
            }
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    use super::*;

    fn object(name: &str, uid: &str, version: u64) -> ConfigMap {
        serde_json::from_value(json!({"metadata": {
            "namespace": "ns", "name": name, "uid": uid, "resourceVersion": version.to_string(),
            "ownerReferences": [{"apiVersion": "v1", "kind": "X", "name": "x", "uid": "owner", "controller": true}],
        }}))
        .unwrap()
    }

    fn names(informer: &Informer<ConfigMap>) -> Vec<String> {
        let all: Vec<_> = informer.all().iter().map(|o| o.name_any()).collect();
        let controlled: Vec<_> = informer.controlled_by("owner").iter().map(|o| o.name_any()).collect();
        assert_eq!(all, controlled, "the index agrees with the objects");
        all
    }

    fn watch(informer: &Informer<ConfigMap>, event: Event<ConfigMap>) {
        informer.handle(event, &mut Vec::new());
    }

    fn list(informer: &Informer<ConfigMap>, objects: Vec<ConfigMap>) {
        let mut listed = Vec::new();
        informer.handle(Event::Init, &mut listed);
        for object in objects {
            informer.handle(Event::InitApply(object), &mut listed);
        }
        informer.handle(Event::InitDone, &mut listed);
    }

    #[tokio::test]
    async fn own_writes_are_visible_and_old_news_is_not() {
        let informer = Informer::default();
        list(&informer, vec![object("a", "1", 10)]);
        informer.note(object("b", "2", 12));
        assert_eq!(names(&informer), ["a", "b"]);
        watch(&informer, Event::Apply(object("a", "1", 11)));
        assert_eq!(names(&informer), ["a", "b"], "11 is before 12");
        watch(&informer, Event::Apply(object("b", "2", 12)));
        watch(&informer, Event::Apply(object("a", "1", 13)));
        assert_eq!(names(&informer), ["a", "b"], "b was confirmed");
        informer.note(object("a", "1", 9));
        assert_eq!(version(&*informer.get(&Key::new("ns", "a")).unwrap()), 13);
    }

    #[tokio::test]
    async fn what_came_and_went_does_not_stay() {
        let informer = Informer::default();
        list(&informer, vec![]);
        // The watch is faster than the answer to the write.
        watch(&informer, Event::Apply(object("a", "1", 10)));
        watch(&informer, Event::Delete(object("a", "1", 11)));
        informer.note(object("a", "1", 10));
        assert!(names(&informer).is_empty());
        // The watch never reports it, and goes past it.
        informer.note(object("b", "2", 12));
        watch(&informer, Event::Apply(object("c", "3", 13)));
        assert_eq!(names(&informer), ["c"]);
    }

    #[tokio::test]
    async fn own_deletions_are_visible_until_the_watch_reports_them() {
        let informer = Informer::default();
        list(&informer, vec![object("a", "1", 10)]);
        informer.note_gone(&object("a", "1", 10));
        watch(&informer, Event::Apply(object("a", "1", 11)));
        assert!(names(&informer).is_empty(), "an older change does not bring it back");
        informer.note(object("a", "2", 14));
        watch(&informer, Event::Delete(object("a", "1", 13)));
        assert_eq!(names(&informer), ["a"], "its successor stays");
    }

    #[tokio::test]
    async fn a_new_listing_replaces_all_but_what_is_newer() {
        let informer = Informer::default();
        list(&informer, vec![object("a", "1", 10), object("b", "2", 11)]);
        informer.note(object("c", "3", 20));
        let deleted = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let seen = deleted.clone();
        informer.on_change(move |old, new| {
            if new.is_none() {
                seen.lock().extend(old.map(|o| o.name_any()));
            }
        });
        list(&informer, vec![object("b", "2", 15)]);
        assert_eq!(names(&informer), ["b", "c"]);
        assert_eq!(*deleted.lock(), ["a"]);
        list(&informer, vec![object("b", "2", 25)]);
        assert_eq!(names(&informer), ["b"]);
    }
}
