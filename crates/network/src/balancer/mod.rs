//! The balancer of a node: agents and servers reach the API at an address of their own machine, whichever servers live.
//!
//! It works on layer 4 and never sees what it carries: TLS ends at the server. It asks each server's `/readyz` over TLS
//! of its own ([`probe`]), and [`choice`] decides. When a server dies, all connections to it are reset at once: an HTTP/2
//! client would otherwise wait for answers on a connection that leads nowhere
//! (<https://github.com/kubernetes/client-go/issues/374>). The servers come from a file, from the configuration, and from
//! the `kubernetes` Service, which is followed through the balancer itself.

pub mod choice;
#[cfg(test)]
mod choice_tests;
mod forward;
mod list;
mod pace;
mod probe;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use futures::TryStreamExt;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use parking_lot::Mutex;
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use choice::{Answer, Choice, Effect, Event, Health, Settings};
use list::Kept;

/// How it is run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Servers to begin with, beside those on disk.
    pub initial: Vec<SocketAddr>,
    /// The server of this machine.
    pub local: Option<SocketAddr>,
    /// Where the last good list is kept; nowhere if it is empty.
    pub file: PathBuf,
    /// The cluster's authorities, in PEM, as they are now and later.
    pub ca_pem: watch::Receiver<String>,
    /// A name that every server's certificate has.
    pub server_name: String,
    /// This node's name, by which nodes share the servers [default: the host's].
    pub node_name: String,
    /// How often each server is asked.
    pub probe_interval: Duration,
    /// How long it has to answer, if it usually answers quickly.
    pub probe_timeout: Duration,
    /// How many questions in a row it may leave unanswered.
    pub misses: u32,
    /// How long a connection to a server may take before the next one is tried.
    pub connect_timeout: Duration,
    /// How long a server that was dead or unready has to be ready before it is preferred to others again.
    pub settle: Duration,
    /// After this long without an acknowledgement from its peer a connection ends, whatever the probes say.
    pub user_timeout: Duration,
    /// How many connections are carried at once.
    pub max_connections: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 6444)),
            initial: Vec::new(),
            local: None,
            file: PathBuf::new(),
            ca_pem: watch::channel(String::new()).1,
            server_name: "kubernetes".into(),
            node_name: String::new(),
            probe_interval: Duration::from_millis(100),
            probe_timeout: Duration::from_millis(200),
            misses: 2,
            connect_timeout: Duration::from_millis(200),
            settle: Duration::from_secs(1),
            user_timeout: Duration::from_secs(60),
            max_connections: 4096,
        }
    }
}

/// What happened so far.
#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    open: AtomicU64,
    full: AtomicU64,
    nowhere: AtomicU64,
    failed_connects: AtomicU64,
    panics: AtomicU64,
    closed_dead: AtomicU64,
    probes: AtomicU64,
    lists_ignored: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// What happened so far, and how things stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Connections that clients made.
    pub accepted: u64,
    /// Those that are open.
    pub open: u64,
    /// Those that were closed because there were too many.
    pub full: u64,
    /// Those that were closed because no server took them.
    pub nowhere: u64,
    /// Attempts to connect to a server that failed; the next one was tried.
    pub failed_connects: u64,
    /// Connections that went to a server that was not ready, since none was.
    pub panics: u64,
    /// Connections that were reset because their server died.
    pub closed_dead: u64,
    /// Questions to servers.
    pub probes: u64,
    /// Lists that were not believed.
    pub lists_ignored: u64,
    /// The servers in the order in which a new connection tries them.
    pub servers: Vec<ServerMetrics>,
}

/// One server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerMetrics {
    /// Its address.
    pub address: SocketAddr,
    /// How it is.
    pub health: Health,
    /// Whether it is on the last list.
    pub listed: bool,
    /// Open connections.
    pub open: u64,
    /// Connections so far.
    pub connections: u64,
}

#[derive(Default)]
struct Carried {
    open: u64,
    connections: u64,
    /// Cancelled when the server dies.
    alive: CancellationToken,
}

struct Shared {
    config: Config,
    own: SocketAddr,
    start: Instant,
    choice: Mutex<Choice>,
    carried: Mutex<HashMap<SocketAddr, Carried>>,
    counters: Counters,
    /// Who is to be asked, and what is to be on disk.
    known: watch::Sender<Kept>,
    prober: probe::Prober,
}

/// A balancer that listens. Cheap to clone.
#[derive(Clone)]
pub struct Balancer {
    shared: Arc<Shared>,
    listener: Arc<TcpListener>,
}

impl Balancer {
    /// Listens, and learns the servers from the file and the configuration. Connections wait until [`Balancer::run`].
    ///
    /// # Errors
    /// If the address is in use, or the authorities cannot be read.
    pub async fn bind(mut config: Config) -> anyhow::Result<Balancer> {
        if config.node_name.is_empty() {
            config.node_name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        }
        let prober = probe::Prober::new(&config)?;
        let listener = TcpListener::bind(config.listen).await.with_context(|| {
            format!("the balancer cannot listen on {}: does another one run on this machine?", config.listen)
        })?;
        let own = listener.local_addr()?;
        let settings = Settings {
            node: config.node_name.clone(),
            local: config.local,
            misses: config.misses.max(1),
            settle: config.settle,
            interval: config.probe_interval,
        };
        let shared = Arc::new(Shared {
            own,
            start: Instant::now(),
            choice: Mutex::new(Choice::new(settings)),
            carried: Mutex::default(),
            counters: Counters::default(),
            known: watch::channel(Kept::default()).0,
            prober,
            config,
        });
        let balancer = Balancer { shared, listener: Arc::new(listener) };
        balancer.begin();
        Ok(balancer)
    }

    fn begin(&self) {
        let config = &self.shared.config;
        let mut kept = Kept::default();
        if !config.file.as_os_str().is_empty() {
            match list::read(&config.file) {
                Ok(found) => kept = found.unwrap_or_default(),
                Err(error) => {
                    tracing::warn!("the list of servers in {} is of no use: {error:#}", config.file.display());
                }
            }
        }
        // Those of earlier lists come first: whoever is on a later one is listed again.
        let mut servers = [&kept.servers[..], &config.initial].concat();
        servers.extend(config.local);
        for list in [kept.former, servers] {
            if !list.is_empty() {
                self.set_servers(&list);
            }
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.shared.own
    }

    /// Takes a new list of servers. One that cannot be right is ignored. Connections to a server that is no longer listed
    /// go on until they end by themselves.
    pub fn set_servers(&self, list: &[SocketAddr]) {
        let shared = &self.shared;
        match list::examine(list, shared.own) {
            Ok((mut good, bad)) => {
                if !bad.is_empty() {
                    tracing::warn!(?bad, "addresses that cannot be servers' are left out of the list");
                }
                // This machine's own server is one, whatever the API says while it starts.
                good.extend(shared.config.local.filter(|local| !good.contains(local)));
                shared.step(Event::Listed(good));
                let choice = shared.choice.lock();
                let (servers, former): (Vec<_>, Vec<_>) = choice.servers().partition(|(.., listed)| *listed);
                let addresses = |list: Vec<(SocketAddr, Health, bool)>| list.into_iter().map(|(a, ..)| a).collect();
                let kept = Kept { servers: addresses(servers), former: addresses(former) };
                drop(choice);
                shared.known.send_if_modified(|known| {
                    let changed = *known != kept;
                    if changed {
                        tracing::info!(servers = ?kept.servers, "the balancer's servers");
                        *known = kept;
                    }
                    changed
                });
            }
            Err(reason) => {
                Counters::add(&shared.counters.lists_ignored);
                tracing::warn!("a list of servers is ignored: {reason}");
            }
        }
    }

    /// Replaces the authorities that servers are checked against.
    ///
    /// # Errors
    /// If they cannot be read; the old ones stay.
    pub fn set_authorities(&self, ca_pem: &str) -> anyhow::Result<()> {
        self.shared.prober.set_authorities(ca_pem)
    }

    /// Figures.
    pub fn metrics(&self) -> Metrics {
        let shared = &self.shared;
        let (choice, carried) = (shared.choice.lock(), shared.carried.lock());
        let known: BTreeMap<_, _> = choice.servers().map(|(a, health, listed)| (a, (health, listed))).collect();
        let servers = choice.order(shared.now()).into_iter().filter_map(|address| {
            let (health, listed) = *known.get(&address)?;
            let (open, connections) = carried.get(&address).map_or((0, 0), |c| (c.open, c.connections));
            Some(ServerMetrics { address, health, listed, open, connections })
        });
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &shared.counters;
        Metrics {
            accepted: get(&c.accepted),
            open: get(&c.open),
            full: get(&c.full),
            nowhere: get(&c.nowhere),
            failed_connects: get(&c.failed_connects),
            panics: get(&c.panics),
            closed_dead: get(&c.closed_dead),
            probes: get(&c.probes),
            lists_ignored: get(&c.lists_ignored),
            servers: servers.collect(),
        }
    }

    /// Carries connections, asks servers and keeps the list on disk, until `stop`.
    ///
    /// # Errors
    /// If a part of it fails for good.
    pub async fn run(&self, stop: CancellationToken) -> anyhow::Result<()> {
        let stop = stop.child_token();
        let _guard = stop.clone().drop_guard();
        let mut parts: JoinSet<()> = JoinSet::new();
        parts.spawn(forward::accept(Arc::clone(&self.shared), Arc::clone(&self.listener), stop.clone()));
        parts.spawn(probe::run(Arc::clone(&self.shared), stop.clone()));
        parts.spawn(keep(Arc::clone(&self.shared), stop.clone()));
        parts.spawn(trust(Arc::clone(&self.shared), stop.clone()));
        let ended = parts.join_next().await;
        let stopped = stop.is_cancelled();
        stop.cancel();
        while parts.join_next().await.is_some() {}
        match ended {
            _ if stopped => Ok(()),
            Some(Err(panic)) => Err(panic).context("a part of the balancer failed"),
            _ => anyhow::bail!("a part of the balancer ended"),
        }
    }

    /// Follows the `kubernetes` Service with a client that comes through this balancer, until `stop`.
    ///
    /// # Errors
    /// If the watch ends for good.
    pub async fn follow(&self, client: Client, stop: CancellationToken) -> anyhow::Result<()> {
        // https://kubernetes.io/docs/reference/labels-annotations-taints/#kubernetesioservice-name
        let config = watcher::Config::default().labels("kubernetes.io/service-name=kubernetes");
        let api: Api<EndpointSlice> = Api::namespaced(client, "default");
        let mut events = Box::pin(watcher(api, config).backoff(seawall_client::watch::Backoff::default()));
        let (mut slices, mut listing) = (BTreeMap::new(), BTreeMap::new());
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                event = events.try_next() => event,
            };
            match event {
                Ok(Some(watcher::Event::Init)) => {
                    listing.clear();
                    continue;
                }
                Ok(Some(watcher::Event::InitApply(slice))) => {
                    listing.insert(slice.name_any(), slice);
                    continue;
                }
                Ok(Some(watcher::Event::InitDone)) => slices = std::mem::take(&mut listing),
                Ok(Some(watcher::Event::Apply(slice))) => drop(slices.insert(slice.name_any(), slice)),
                Ok(Some(watcher::Event::Delete(slice))) => drop(slices.remove(&slice.name_any())),
                Ok(None) => anyhow::bail!("the watch of the servers' endpoints ended"),
                Err(error) => {
                    tracing::debug!("the watch of the servers' endpoints: {error}");
                    continue;
                }
            }
            self.set_servers(&list::of_slices(slices.values()));
        }
    }
}

/// Runs a balancer that follows the cluster's servers.
///
/// # Errors
/// If it cannot listen, or a part of it fails for good.
pub fn run(
    config: Config,
    client: Client,
    stop: CancellationToken,
) -> futures::future::BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(config, client, stop))
}

async fn work(config: Config, client: Client, stop: CancellationToken) -> anyhow::Result<()> {
    let balancer = Balancer::bind(config).await?;
    let stop = stop.child_token();
    let _guard = stop.clone().drop_guard();
    tokio::select! {
        result = balancer.run(stop.clone()) => result,
        result = Box::pin(balancer.follow(client, stop.clone())) => result,
    }
}

impl Shared {
    fn now(&self) -> choice::Instant {
        self.start.elapsed()
    }

    /// Takes an event, and does what follows from it.
    fn step(&self, event: Event) {
        let effects = self.choice.lock().step(self.now(), event);
        for effect in effects {
            match effect {
                Effect::Turned { server, from, to } => tracing::info!(%server, ?from, ?to, "a server turned"),
                Effect::Close(server) => {
                    let mut carried = self.carried.lock();
                    if let Some(carried) = carried.get_mut(&server) {
                        std::mem::take(&mut carried.alive).cancel();
                    }
                }
            }
        }
    }

    fn answered(&self, server: SocketAddr, asked: choice::Instant, answer: Answer) {
        self.step(Event::Answered { server, asked, answer });
    }
}

/// Follows the authorities.
async fn trust(shared: Arc<Shared>, stop: CancellationToken) {
    let mut authorities = shared.config.ca_pem.clone();
    while let Some(Ok(())) = stop.run_until_cancelled(authorities.changed()).await {
        let bundle = authorities.borrow_and_update().clone();
        if let Err(error) = shared.prober.set_authorities(&bundle) {
            tracing::error!("the balancer keeps its authorities: {error:#}");
        }
    }
    // Whoever knew of others is gone: these stay.
    stop.cancelled().await;
}

/// Keeps the list on disk.
async fn keep(shared: Arc<Shared>, stop: CancellationToken) {
    let mut known = shared.known.subscribe();
    let file = &shared.config.file;
    let mut written = None;
    loop {
        let kept = known.borrow_and_update().clone();
        if !file.as_os_str().is_empty() && !kept.servers.is_empty() && written.as_ref() != Some(&kept) {
            let (path, copy) = (file.clone(), kept.clone());
            match tokio::task::spawn_blocking(move || list::write(&path, &copy)).await {
                Ok(Ok(())) => written = Some(kept),
                Ok(Err(error)) => {
                    tracing::warn!("the list of servers was not written to {}: {error}", file.display());
                    // A full disk may have room again.
                    tokio::select! {
                        () = sleep(Duration::from_secs(10)) => continue,
                        () = stop.cancelled() => return,
                    }
                }
                Err(_) => return,
            }
        }
        tokio::select! {
            changed = known.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}
