//! All services, kept up to date, for the variables that describe them.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Service;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use parking_lot::RwLock;
use seawall_client::watch::Backoff;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::env;

type Key = (String, String);

/// The services of the cluster.
#[derive(Default)]
pub struct Services {
    map: RwLock<BTreeMap<Key, Service>>,
    synced: watch::Sender<bool>,
}

fn key(service: &Service) -> Key {
    (service.metadata.namespace.clone().unwrap_or_default(), service.metadata.name.clone().unwrap_or_default())
}

impl Services {
    /// Whether they have been listed once; before that a container would miss variables for good.
    pub fn synced(&self) -> bool {
        *self.synced.borrow()
    }

    /// Says when [`Services::synced`] changes.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// See [`env::service_variables`].
    pub fn variables(&self, namespace: &str, links: bool) -> BTreeMap<String, String> {
        env::service_variables(self.map.read().values(), namespace, links)
    }

    /// Follows the API until shutdown.
    pub async fn run(&self, client: Client, shutdown: CancellationToken) {
        let mut events = watcher(Api::<Service>::all(client), watcher::Config::default())
            .backoff(Backoff::default())
            .into_stream()
            .boxed();
        let mut listed = BTreeMap::new();
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = events.try_next() => event,
            };
            match event {
                Ok(Some(watcher::Event::Init)) => listed.clear(),
                Ok(Some(watcher::Event::InitApply(service))) => drop(listed.insert(key(&service), service)),
                Ok(Some(watcher::Event::InitDone)) => {
                    *self.map.write() = std::mem::take(&mut listed);
                    self.synced.send_replace(true);
                }
                Ok(Some(watcher::Event::Apply(service))) => drop(self.map.write().insert(key(&service), service)),
                Ok(Some(watcher::Event::Delete(service))) => drop(self.map.write().remove(&key(&service))),
                Ok(None) => return,
                Err(error) => tracing::debug!("watch services: {error}"),
            }
        }
    }
}
