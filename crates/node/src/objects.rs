//! Changes of the config maps and secrets that this node's pods use: one watch per object, shared, and only while a
//! pod needs it. It only says that something changed; who needs the content gets it.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Debug,
    sync::Arc,
};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{
    Api, Client, Resource,
    runtime::{WatchStreamExt, watcher},
};
use parking_lot::Mutex;
use seawall_client::watch::Backoff;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// What is watched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// Namespace and name of a config map.
    ConfigMap(String, String),
    /// Namespace and name of a secret.
    Secret(String, String),
}

struct Watched {
    subscribers: Arc<Mutex<HashMap<String, Arc<Notify>>>>,
    cancel: CancellationToken,
}

/// The watches of all pods.
pub struct Watches {
    client: Client,
    shutdown: CancellationToken,
    watched: Mutex<HashMap<Key, Watched>>,
}

impl Watches {
    /// None yet.
    pub fn new(client: Client, shutdown: CancellationToken) -> Self {
        Self { client, shutdown, watched: Mutex::default() }
    }

    /// From now on `subscriber` (a pod's uid) is notified of changes of exactly these objects.
    pub fn subscribe(&self, subscriber: &str, notify: &Arc<Notify>, keys: &BTreeSet<Key>) {
        let mut watched = self.watched.lock();
        watched.retain(|key, w| {
            if !keys.contains(key) {
                let mut subscribers = w.subscribers.lock();
                subscribers.remove(subscriber);
                if subscribers.is_empty() {
                    w.cancel.cancel();
                    return false;
                }
            }
            true
        });
        for key in keys {
            let entry = watched.entry(key.clone()).or_insert_with(|| {
                let (subscribers, cancel) = (Arc::default(), self.shutdown.child_token());
                match key.clone() {
                    Key::ConfigMap(ns, name) => {
                        self.spawn::<ConfigMap>(&ns, name, Arc::clone(&subscribers), cancel.clone())
                    }
                    Key::Secret(ns, name) => self.spawn::<Secret>(&ns, name, Arc::clone(&subscribers), cancel.clone()),
                }
                Watched { subscribers, cancel }
            });
            entry.subscribers.lock().insert(subscriber.to_owned(), Arc::clone(notify));
        }
    }

    fn spawn<K>(
        &self,
        namespace: &str,
        name: String,
        subscribers: Arc<Mutex<HashMap<String, Arc<Notify>>>>,
        cancel: CancellationToken,
    ) where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + Debug
            + Send
            + 'static,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        tokio::spawn(cancel.run_until_cancelled_owned(async move {
            let mut events = watcher(api, config).backoff(Backoff::default()).into_stream().boxed();
            loop {
                match events.try_next().await {
                    // The first listing counts too: the object may have come between the subscriber's look and ours.
                    Ok(Some(watcher::Event::Apply(_) | watcher::Event::Delete(_) | watcher::Event::InitDone)) => {
                        subscribers.lock().values().for_each(|n| n.notify_one());
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => return,
                    Err(error) => tracing::debug!(name, "watch: {error}"),
                }
            }
        }));
    }
}
