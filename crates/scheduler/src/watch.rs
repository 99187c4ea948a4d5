//! What the scheduler watches, as one stream.

use std::{collections::HashSet, mem};

use futures::{Stream, StreamExt, TryStreamExt, stream::BoxStream};
use k8s_openapi::api::{
    apps::v1::{ReplicaSet, StatefulSet},
    core::v1::{Namespace, Node, PersistentVolumeClaim, Pod, ReplicationController, Service},
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{WatchStreamExt, watcher, watcher::Event},
};
use seawall_api::selector::{LabelSelector, Requirement};
use serde::de::DeserializeOwned;

/// Something changed.
#[allow(clippy::large_enum_variant, reason = "it lives for one turn of the loop")]
pub enum Change {
    Pod(Event<Pod>),
    Node(Event<Node>),
    Namespace(Event<Namespace>),
    Claim(Event<PersistentVolumeClaim>),
    Budget(Event<PodDisruptionBudget>),
    /// Of this kind.
    Selecting(&'static str, Event<Selecting>),
}

/// An object that selects pods, and how.
pub struct Selecting {
    pub namespace: String,
    pub name: String,
    pub selector: LabelSelector,
}

/// Every kind that is watched.
pub const KINDS: [&str; 9] =
    ["Pod", "Node", "Namespace", "Claim", "Budget", "Service", "ReplicationController", "ReplicaSet", "StatefulSet"];

/// Watches everything. An error says that a watch broke; it is set up again by itself.
pub fn all(client: &Client) -> impl Stream<Item = watcher::Result<Change>> + use<> {
    let selecting = |kind: &'static str| move |event| Change::Selecting(kind, event);
    futures::stream::select_all([
        of(client).map_ok(Change::Pod).boxed(),
        of(client).map_ok(Change::Node).boxed(),
        of(client).map_ok(Change::Namespace).boxed(),
        of(client).map_ok(Change::Claim).boxed(),
        of(client).map_ok(Change::Budget).boxed(),
        of::<Service>(client)
            .map_ok(|e| reduce(e, |s| equal(s.spec.as_ref().and_then(|s| s.selector.as_ref()))))
            .map_ok(selecting("Service"))
            .boxed(),
        of::<ReplicationController>(client)
            .map_ok(|e| reduce(e, |c| equal(c.spec.as_ref().and_then(|s| s.selector.as_ref()))))
            .map_ok(selecting("ReplicationController"))
            .boxed(),
        of::<ReplicaSet>(client)
            .map_ok(|e| reduce(e, |set| crate::pod::selector(Some(&set.spec.selector))))
            .map_ok(selecting("ReplicaSet"))
            .boxed(),
        of::<StatefulSet>(client)
            .map_ok(|e| reduce(e, |set| crate::pod::selector(Some(&set.spec.selector))))
            .map_ok(selecting("StatefulSet"))
            .boxed(),
    ])
}

fn of<K>(client: &Client) -> BoxStream<'static, watcher::Result<Event<K>>>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    let events = watcher(Api::<K>::all(client.clone()), watcher::Config::default()).default_backoff();
    // Nobody looks at it, and in memory it is far larger than everything else.
    events.modify(|object| object.meta_mut().managed_fields = None).boxed()
}

fn equal(labels: Option<&std::collections::BTreeMap<String, String>>) -> LabelSelector {
    let labels = labels.into_iter().flatten();
    LabelSelector(labels.map(|(key, value)| Requirement::In(key.clone(), vec![value.clone()])).collect())
}

/// Keeps of an object only how it selects.
fn reduce<K: ResourceExt>(event: Event<K>, selector: impl Fn(&K) -> LabelSelector) -> Event<Selecting> {
    let of = |object: K| Selecting {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        selector: selector(&object),
    };
    match event {
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
        Event::InitApply(object) => Event::InitApply(of(object)),
        Event::Apply(object) => Event::Apply(of(object)),
        Event::Delete(object) => Event::Delete(of(object)),
    }
}

/// What a watch has listed since its last full list began. A list that follows a broken watch says by silence what has
/// been deleted meanwhile. Each watch has its own: they are set up again independently of each other.
#[derive(Default)]
pub struct Listing<Key> {
    listed: HashSet<Key>,
    /// Everything has been listed once.
    pub complete: bool,
}

/// What an event comes to.
pub enum Step<Key, T> {
    /// The object is like this.
    Set(T),
    /// The object is gone.
    Gone(T),
    /// These are all there are.
    Only(HashSet<Key>),
    /// A list begins.
    Nothing,
}

impl<Key: Eq + std::hash::Hash> Listing<Key> {
    /// Takes note of an event.
    pub fn step<T>(&mut self, event: Event<T>, key: impl Fn(&T) -> Key) -> Step<Key, T> {
        match event {
            Event::Init => {
                self.listed.clear();
                Step::Nothing
            }
            Event::InitApply(object) => {
                self.listed.insert(key(&object));
                Step::Set(object)
            }
            Event::InitDone => {
                self.complete = true;
                Step::Only(mem::take(&mut self.listed))
            }
            Event::Apply(object) => Step::Set(object),
            Event::Delete(object) => Step::Gone(object),
        }
    }
}
