//! The watch that keeps the zone: Services, EndpointSlices, and a ConfigMap that says who else is asked.
//!
//! What was known stays when the API is away.

use std::{collections::HashSet, sync::Arc};

use anyhow::bail;
use arc_swap::ArcSwap;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::{
    core::v1::{ConfigMap, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use seawall_client::watch::Backoff;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    facts::{self, Slice},
    forward::Forwarder,
    metrics::Metrics,
    settings::Settings,
    zone::{Book, Zone},
};

/// Where the ConfigMap is that says who is asked for other names.
pub const NAMESPACE: &str = "kube-system";
/// Its name.
pub const CONFIG_MAP: &str = "seawall-dns";

/// What the watch keeps.
pub struct Kept {
    /// The cluster as it is.
    pub zone: Arc<ArcSwap<Zone>>,
    /// Whether there were full lists, or what was known before was taken.
    pub ready: watch::Sender<bool>,
    /// Who asks others.
    pub forwarder: Forwarder,
    /// Who is asked as far as the ConfigMap does not say, as it changes.
    pub settings: watch::Receiver<Settings>,
    /// Machines whose pods are to be avoided.
    pub avoided: watch::Receiver<Arc<HashSet<String>>>,
    /// What is counted.
    pub metrics: Metrics,
}

/// Objects of a kind that come as a list.
struct Listing<T> {
    fresh: Option<Vec<T>>,
    listed: bool,
}

/// What an event means.
enum Change<T> {
    All(Vec<T>),
    Set(T),
    Gone(T),
    Nothing,
}

impl<T> Listing<T> {
    fn take<K>(&mut self, event: watcher::Event<K>, of: impl Fn(&K) -> T) -> Change<T> {
        match event {
            watcher::Event::Init => {
                self.fresh = Some(Vec::new());
                Change::Nothing
            }
            watcher::Event::InitApply(object) => {
                if let Some(fresh) = &mut self.fresh {
                    fresh.push(of(&object));
                }
                Change::Nothing
            }
            watcher::Event::InitDone => {
                self.listed = true;
                self.fresh.take().map_or(Change::Nothing, Change::All)
            }
            watcher::Event::Apply(object) => Change::Set(of(&object)),
            watcher::Event::Delete(object) => Change::Gone(of(&object)),
        }
    }
}

/// Follows the API until `stop`. `book` may have what was known before.
///
/// # Errors
/// If a watch ends for good.
pub async fn run(client: Client, mut book: Book, mut kept: Kept, stop: CancellationToken) -> anyhow::Result<()> {
    macro_rules! watched {
        ($api:expr, $config:expr) => {
            watcher($api, $config).backoff(Backoff::default()).boxed()
        };
    }
    let everything = watcher::Config::default;
    let mut services = watched!(Api::<Service>::all(client.clone()), everything());
    let mut slices = watched!(Api::<EndpointSlice>::all(client.clone()), everything());
    let one = everything().fields(&format!("metadata.name={CONFIG_MAP}"));
    let mut maps = watched!(Api::<ConfigMap>::namespaced(client, NAMESPACE), one);
    let mut of_services = Listing { fresh: None, listed: false };
    let mut of_slices = Listing { fresh: None, listed: false };
    let mut of_maps = Listing { fresh: None, listed: false };
    let mut map: Option<ConfigMap> = None;
    book.avoid(HashSet::clone(&kept.avoided.borrow_and_update()));
    kept.zone.store(Arc::new(book.zone().clone()));
    kept.forwarder.set(together(&kept.settings.borrow_and_update(), None));
    let (mut deaf, mut fixed) = (false, false);
    loop {
        let changed = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            event = services.try_next() => match next("services", event)? {
                None => false,
                Some(event) => match of_services.take(event, |s: &Service| facts::Service::from(s)) {
                    Change::All(all) => book.replace_services(all),
                    Change::Set(service) => book.set_service(service),
                    Change::Gone(service) => book.remove_service(&(service.namespace, service.name)),
                    Change::Nothing => false,
                },
            },
            event = slices.try_next() => match next("endpoint slices", event)? {
                None => false,
                Some(event) => match of_slices.take(event, |s: &EndpointSlice| Slice::from(s)) {
                    Change::All(all) => book.replace_slices(all),
                    Change::Set(slice) => book.set_slice(slice),
                    Change::Gone(slice) => book.remove_slice(&slice),
                    Change::Nothing => false,
                },
            },
            event = maps.try_next() => {
                if let Some(event) = next("the config map of DNS", event)? {
                    match of_maps.take(event, ConfigMap::clone) {
                        Change::All(all) => map = all.into_iter().next(),
                        Change::Set(new) => map = Some(new),
                        Change::Gone(_) => map = None,
                        Change::Nothing => continue,
                    }
                    kept.forwarder.set(together(&kept.settings.borrow(), map.as_ref()));
                }
                false
            }
            changed = kept.settings.changed(), if !fixed => {
                fixed = changed.is_err();
                kept.forwarder.set(together(&kept.settings.borrow(), map.as_ref()));
                false
            }
            changed = kept.avoided.changed(), if !deaf => {
                deaf = changed.is_err();
                let avoided = HashSet::clone(&kept.avoided.borrow_and_update());
                book.avoid(avoided)
            }
        };
        // Until all is listed, what was known before is likelier to be right than half of what is.
        let complete = of_services.listed && of_slices.listed;
        if complete && (changed || !*kept.ready.borrow()) || changed && *kept.ready.borrow() {
            kept.metrics.known(book.zone().len());
            kept.zone.store(Arc::new(book.zone().clone()));
            kept.ready.send_if_modified(|ready| !std::mem::replace(ready, true));
        }
    }
}

/// What was said at the start, and what the ConfigMap says.
fn together(settings: &Settings, map: Option<&ConfigMap>) -> Settings {
    let Some(data) = map.and_then(|map| map.data.as_ref()) else { return settings.clone() };
    settings.with_config_map(data).unwrap_or_else(|error| {
        tracing::warn!("the config map {NAMESPACE}/{CONFIG_MAP} is not followed: {error:#}");
        settings.clone()
    })
}

/// What a watch brought. One that breaks is set up again.
fn next<E>(what: &str, event: Result<Option<E>, watcher::Error>) -> anyhow::Result<Option<E>> {
    match event {
        Ok(None) => bail!("the watch of {what} ended"),
        Ok(event) => Ok(event),
        Err(error) => {
            tracing::debug!(%error, "the watch of {what} broke and is set up again");
            Ok(None)
        }
    }
}
