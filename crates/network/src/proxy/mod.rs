//! The service proxy (<https://kubernetes.io/docs/reference/networking/virtual-ips/>).
//!
//! Services, EndpointSlices, Nodes and what is thought of the machines become one table of nftables. What it should hold
//! is decided by [`plan::plan`]; what has to change by [`rules::Ruleset::script`]; the kernel takes a script as one
//! transaction. Verdicts act on what was known last, with or without the API; what was known last is kept on disk.

pub mod conntrack;
pub mod dead;
pub mod elements;
pub mod ending;
pub mod endpoints;
pub mod family;
pub mod faults;
pub mod health_checks;
mod kernel;
pub mod metrics;
pub mod netlink;
pub mod plan;
pub mod rouse;
pub mod rules;
pub mod stale;
pub mod state;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use tokio::{
    net::UnixListener,
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

pub use kernel::{intact, nft, remove};
use metrics::Metrics;
use plan::plan;
use rules::Ruleset;
use seawall_client::watch::Backoff;
pub use state::State;

use crate::{
    relay::{self, table::Table},
    verdict::{self, Verdict},
};
use dead::{Dead, Target};
use endpoints::View;
use family::Family;
use health_checks::{Check, HealthChecks};
use state::{Fed, Kept};

/// How the proxy of a node works.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// The name of this node: its endpoints are the local ones.
    pub node_name: String,
    /// The addresses of this node.
    pub node_ips: Vec<IpAddr>,
    /// The addresses of pods: what comes from elsewhere to a cluster address is masqueraded. Of a family without any the
    /// nodes' ranges count.
    pub cluster_cidrs: Vec<IpNet>,
    /// How long changes are collected before they are applied. Verdicts are not.
    pub debounce: Duration,
    /// How often the kernel's table is compared with ours; less often where that is much work.
    pub verify: Duration,
    /// The words that start `nft`: another network namespace can be put in front.
    pub nft: Vec<String>,
    /// The relay, if there is one on this node.
    pub relay: Option<relay::ForProxy>,
    /// What of it the rules depend on, while it listens. The proxy sets it.
    pub relays: Option<Relays>,
    /// Where what is known is kept, if it is.
    pub file: Option<PathBuf>,
    /// How long the API has to answer after a start before what was kept is acted on, if no verdict presses.
    pub patience: Duration,
    /// How long after a start the gossip may take to say something about a machine that was dead before.
    pub relearn: Duration,
    /// Where it counts.
    pub metrics: Metrics,
}

impl Default for ProxyConfig {
    fn default() -> ProxyConfig {
        ProxyConfig {
            node_name: String::new(),
            node_ips: Vec::new(),
            cluster_cidrs: Vec::new(),
            debounce: Duration::from_millis(5),
            verify: Duration::from_secs(5),
            nft: vec!["nft".into()],
            relay: None,
            relays: None,
            file: None,
            patience: Duration::from_secs(1),
            relearn: Duration::from_secs(5),
            metrics: Metrics::default(),
        }
    }
}

/// A relay that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relays {
    /// Where.
    pub listens: relay::Listens,
    /// Whether Services are relayed that do not say.
    pub default: bool,
}

impl ProxyConfig {
    /// What is to be relayed.
    pub fn relayed(&self, view: &View<'_>) -> Option<Table> {
        self.relays.map(|relays| Table::of(view, relays.default, self.pods(view), &self.node_ips))
    }

    /// The addresses of all pods, of both families. None lies in another.
    pub fn pods(&self, view: &View<'_>) -> Vec<IpNet> {
        let of = |family: Family| move |net: &&IpNet| Family::of(net.addr()) == family;
        let mut all = Vec::new();
        for family in Family::ALL {
            let given = self.cluster_cidrs.iter().filter(of(family)).map(IpNet::trunc);
            all.extend(given);
            if !all.iter().any(|net| of(family)(&net)) {
                all.extend(view.state.nodes.values().flat_map(|m| m.pods.iter().filter(of(family))));
            }
        }
        dead::outermost(all)
    }
}

/// The table is one, so a network namespace has one proxy: whoever listens on this name, which the kernel gives back
/// when its holder dies. Anything that connects learns who that is.
async fn claim() -> anyhow::Result<UnixListener> {
    use std::os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener as Listener, UnixStream as Stream},
    };
    let name = SocketAddr::from_abstract_name("seawall/service-proxy").context("the name of the proxy's claim")?;
    let listener = match Listener::bind_addr(&name) {
        Ok(listener) => listener,
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            let holder = Stream::connect_addr(&name).and_then(|stream| {
                stream.set_nonblocking(true)?;
                tokio::net::UnixStream::from_std(stream)?.peer_cred()
            });
            let pid = holder.ok().and_then(|c| c.pid()).unwrap_or_default();
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line: String = String::from_utf8_lossy(&line).replace('\0', " ").chars().take(80).collect();
            bail!(
                "the service proxy of this machine is in use by process {pid} ({}): stop it, or run this one with \
                 --disable agent,proxy",
                line.trim()
            );
        }
        Err(error) => return Err(error).context("claim to be the service proxy of this machine"),
    };
    listener.set_nonblocking(true)?;
    Ok(UnixListener::from_std(listener)?)
}

/// Runs the proxy until `shutdown`. What it has set up stays in the kernel, so that a restart is not felt.
///
/// # Errors
/// If another proxy runs, `nft` is missing, or the kernel refuses the table.
pub fn run(
    client: Client,
    config: ProxyConfig,
    verdicts: verdict::Receiver,
    shutdown: CancellationToken,
) -> futures::future::BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(client, config, verdicts, shutdown))
}

async fn work(
    client: Client,
    config: ProxyConfig,
    verdicts: verdict::Receiver,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let claim = claim().await?;
    macro_rules! watched {
        ($kind:ty) => {
            watcher(Api::<$kind>::all(client.clone()), watcher::Config::default()).backoff(Backoff::default()).boxed()
        };
    }
    let (mut services, mut slices, mut nodes) = (watched!(Service), watched!(EndpointSlice), watched!(Node));
    let (mut of_services, mut of_slices, mut of_nodes) = (Fed::default(), Fed::default(), Fed::default());
    let mut heard = verdicts;
    let mut deaf = false;
    let mut listens = config.relay.as_ref().map(|relay| relay.listens.clone());
    let mut proxy = Proxy::start(config, &mut heard);
    loop {
        let (due, look, keep) = (proxy.due.filter(|_| proxy.known), proxy.look(), proxy.keep_at());
        tokio::select! {
            () = shutdown.cancelled() => break,
            // Who asks has learned it by connecting.
            _ = claim.accept() => {}
            changed = heard.changed(), if !deaf => {
                // Whoever told is gone: what was said last holds.
                deaf = changed.is_err();
                proxy.hear(&mut heard);
            }
            () = changes(&mut listens) => proxy.listen(),
            event = services.try_next() => if let Some(event) = next("services", event)?
                && of_services.take(&mut proxy.state.services, event, state::service)
            {
                proxy.changed();
            },
            event = slices.try_next() => if let Some(event) = next("endpoint slices", event)?
                && of_slices.take(&mut proxy.state.slices, event, state::slice)
            {
                proxy.changed();
            },
            event = nodes.try_next() => if let Some(event) = next("nodes", event)?
                && of_nodes.take(&mut proxy.state.nodes, event, state::machine)
            {
                proxy.changed();
            },
            () = at(due) => proxy.apply().await?,
            () = at(look) => proxy.check(),
            Some(look) = finished(&mut proxy.checking) => proxy.checked(look),
            () = at(keep) => proxy.keep(),
            Some(()) = finished(&mut proxy.keeping) => {}
            Some(_) = proxy.tasks.join_next() => {}
        }
        // Half of the picture would take services away.
        if !proxy.complete && of_services.listed && of_slices.listed && of_nodes.listed {
            (proxy.known, proxy.complete) = (true, true);
            proxy.changed();
        }
    }
    proxy.stop().await;
    Ok(())
}

/// What a watch brought. One that breaks is set up again.
fn next<E>(what: &str, event: Result<Option<E>, watcher::Error>) -> anyhow::Result<Option<E>> {
    match event {
        Ok(None) => bail!("the watch of {what} ended"),
        Ok(event) => Ok(event),
        Err(error) => {
            tracing::warn!(%error, "the watch of {what} broke and is set up again");
            Ok(None)
        }
    }
}

/// Returns when the relay began to listen, or ended.
async fn changes(listens: &mut Option<watch::Receiver<Option<relay::Listens>>>) {
    let Some(told) = listens else { return std::future::pending().await };
    if told.changed().await.is_err() {
        *listens = None;
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// The end of a task that may be there. Of one that panicked nothing is learned.
async fn finished<T: Default>(task: &mut Option<JoinHandle<T>>) -> Option<T> {
    let done = task.as_mut()?.await;
    *task = None;
    Some(done.unwrap_or_default())
}

/// A proxy that runs.
struct Proxy {
    config: ProxyConfig,
    state: State,
    /// Whether enough is known to act on: full lists, or what was kept.
    known: bool,
    /// Whether there were full lists.
    complete: bool,
    verdicts: verdict::Verdicts,
    /// Who was dead before the start.
    remembered: BTreeSet<String>,
    relearn_until: Instant,
    /// What the kernel holds.
    applied: Option<Ruleset>,
    /// How often something was applied: a look at the kernel's table counts only if nothing was meanwhile.
    generation: u64,
    due: Option<Instant>,
    failures: u32,
    /// The next look at the kernel's table, and one that is going on: since when, and with which generation.
    next_look: Instant,
    checking: Option<JoinHandle<Look>>,
    began: (Instant, u64),
    /// The number of the kernel's rules when ours were last found as they should be.
    intact: Option<u32>,
    /// What is out of reach, for the tasks that look after flows.
    dead: watch::Sender<Arc<BTreeSet<Target>>>,
    tasks: JoinSet<()>,
    /// What load balancers ask for, and what they are told.
    checks: BTreeMap<u16, Check>,
    health: HealthChecks,
    /// Whether the copy on disk is old, when the next may be written, and one that is being written.
    keep_due: bool,
    next_keep: Instant,
    keeping: Option<JoinHandle<()>>,
}

/// What a look at the kernel's table showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// It is as it should be, while the kernel's rules have this number ([`crate::nft::generation`]).
    Intact(Option<u32>),
    Changed,
}

impl Default for Look {
    fn default() -> Look {
        Look::Intact(None)
    }
}

impl Proxy {
    fn start(config: ProxyConfig, heard: &mut verdict::Receiver) -> Proxy {
        let kept = config.file.as_deref().and_then(|file| match state::read(file) {
            Ok(kept) => kept,
            Err(error) => {
                tracing::warn!("what the service proxy knew before is lost: {error:#}");
                None
            }
        });
        let now = Instant::now();
        let known = kept.is_some();
        let Kept { state, dead } = kept.unwrap_or_default();
        let mut proxy = Proxy {
            state,
            known,
            complete: false,
            verdicts: Default::default(),
            remembered: dead,
            relearn_until: now + config.relearn,
            applied: None,
            generation: 0,
            due: known.then(|| now + config.patience),
            failures: 0,
            next_look: now + config.verify,
            checking: None,
            began: (now, 0),
            intact: None,
            dead: watch::channel(Default::default()).0,
            tasks: JoinSet::new(),
            checks: BTreeMap::new(),
            health: HealthChecks::default(),
            keep_due: false,
            next_keep: now,
            keeping: None,
            config,
        };
        proxy.hear(heard);
        proxy.listen();
        proxy
    }

    /// Connections are handed to the relay while it listens.
    fn listen(&mut self) {
        let Some(relay) = &self.config.relay else { return };
        let listens = *relay.listens.borrow();
        self.config.relays = listens.map(|listens| Relays { listens, default: relay.default });
        if self.applied.is_some() {
            self.due = Some(Instant::now());
        }
    }

    /// Takes in what is thought of the machines. What is bad is acted on at once.
    fn hear(&mut self, heard: &mut verdict::Receiver) {
        let now = Instant::now();
        let said = heard.borrow_and_update().clone();
        let grave = |v: &verdict::Verdicts| -> BTreeMap<String, Verdict> {
            v.iter().filter(|(_, v)| **v != Verdict::Alive).map(|(n, v)| (n.clone(), *v)).collect()
        };
        // Who was named once is not remembered from before any more.
        let before = self.remembered.len();
        self.remembered.retain(|name| !said.contains_key(name));
        let learned = self.remembered.len() < before;
        let (bad, was) = (grave(&said), grave(&self.verdicts));
        if bad != was || learned {
            tracing::info!(?bad, "what is thought of the machines");
            self.due = Some(now);
            self.keep_due = true;
        }
        self.verdicts = said;
    }

    fn changed(&mut self) {
        self.keep_due = true;
        // After a start the kernel still holds what was right then: no use in going back to what was kept, or half way.
        if self.complete || self.applied.is_some() {
            let soon = Instant::now() + self.config.debounce;
            self.due = Some(self.due.map_or(soon, |due| due.min(soon)));
        }
    }

    async fn apply(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        self.due = None;
        let relearning = !self.remembered.is_empty() && began < self.relearn_until;
        let verdicts = state::settled(&self.verdicts, &self.remembered, relearning);
        if relearning {
            // What is remembered ends by itself.
            self.due = Some(self.relearn_until);
        } else {
            self.remembered.clear();
        }
        let view = View::new(&self.state, &self.config.node_name, &verdicts);
        let dead = Dead::of(&view, &self.config.node_ips);
        self.checks = health_checks::of(&view);
        // Before the first connection comes.
        if let (Some(relay), Some(table)) = (&self.config.relay, self.config.relayed(&view)) {
            relay.tables.send_replace(Arc::new(table));
        }
        self.bury(&dead);
        let wanted = plan(&self.state, &self.config, &verdicts);
        if self.applied.as_ref() != Some(&wanted) {
            let planned = began.elapsed();
            let script = wanted.script(self.applied.as_ref());
            self.generation += 1;
            if let Err(error) = nft(&self.config, &script).await {
                // Somebody may have changed our table: next time it is made anew as a whole.
                self.failures += 1;
                self.config.metrics.failed();
                self.health.tell(&self.checks, false);
                tracing::error!(failures = self.failures, "the rules were not applied: {error:#}");
                if self.failures > 5 {
                    return Err(error);
                }
                self.applied = None;
                self.due = Some(Instant::now() + Duration::from_millis(200) * self.failures);
                return Ok(());
            }
            self.failures = 0;
            self.config.metrics.applied(began.elapsed());
            tracing::debug!(?planned, took = ?began.elapsed(), bytes = script.len(), "rules were applied");
            let stale = stale::stale(self.applied.as_ref(), &wanted);
            if !stale.is_empty() {
                self.tasks.spawn(ending::forget(stale));
            }
            self.applied = Some(wanted);
        }
        self.ended(&dead.targets);
        self.health.tell(&self.checks, true);
        self.config.metrics.known(dead.targets.len(), self.state.services.len(), self.state.slices.len());
        Ok(())
    }

    /// What is dead goes first: it does not take `nft`, nor a plan of everything else. A connection to it is refused from
    /// then on, until the other rules pick no dead endpoints any more.
    fn bury(&mut self, dead: &Dead) {
        let Some(applied) = &mut self.applied else { return };
        let fresh: Vec<&Target> = dead.targets.iter().filter(|t| !applied.sets.contains(&t.element())).collect();
        if fresh.is_empty() {
            return;
        }
        let began = Instant::now();
        self.generation += 1;
        match elements::add(&fresh) {
            Ok(()) => {
                applied.sets.extend(fresh.iter().map(|t| t.element()));
                self.config.metrics.buried(fresh.len());
                tracing::debug!(took = ?began.elapsed(), ?fresh, "what is dead is out of reach");
            }
            // The rules are written all the same, and bring it along.
            Err(error) => tracing::warn!("what is dead is not out of reach yet: {error}"),
        }
    }

    /// Looks after the flows to what is dead since now.
    fn ended(&mut self, targets: &BTreeSet<Target>) {
        let before = self.dead.borrow().clone();
        if *before == *targets {
            return;
        }
        self.dead.send_replace(Arc::new(targets.clone()));
        self.keep_due = true;
        let fresh: BTreeSet<Target> = targets.difference(&before).copied().collect();
        if !fresh.is_empty() {
            self.tasks.spawn(ending::end(fresh, self.dead.subscribe()));
        }
    }

    fn look(&self) -> Option<Instant> {
        let idle = self.applied.is_some() && self.due.is_none() && self.checking.is_none();
        idle.then_some(self.next_look)
    }

    /// Compares the kernel's table with ours, while other things go on.
    fn check(&mut self) {
        let Some(rules) = self.applied.clone() else { return };
        // A port that was taken may be free now.
        self.health.tell(&self.checks, true);
        let config = self.config.clone();
        self.began = (Instant::now(), self.generation);
        let number = crate::nft::generation(&config.nft);
        if number.is_some() && number == self.intact {
            return self.checked(Look::Intact(number));
        }
        self.checking = Some(tokio::spawn(async move {
            if intact(&config, &rules).await { Look::Intact(number) } else { Look::Changed }
        }));
    }

    fn checked(&mut self, look: Look) {
        let (began, generation) = self.began;
        if let Look::Intact(number) = look {
            self.intact = number;
        }
        if look == Look::Changed && generation == self.generation {
            tracing::warn!("somebody changed our table of nftables: it is made anew");
            self.config.metrics.repaired();
            self.applied = None;
            self.due = Some(Instant::now());
        }
        // A hundredth of the time at most.
        self.next_look = Instant::now() + self.config.verify.max(began.elapsed() * 100);
    }

    fn keep_at(&self) -> Option<Instant> {
        let due = self.keep_due && self.known && self.config.file.is_some() && self.keeping.is_none();
        due.then_some(self.next_keep)
    }

    /// Writes the copy on disk, beside other work.
    fn keep(&mut self) {
        self.keep_due = false;
        self.next_keep = Instant::now() + KEEP;
        let Some(file) = self.config.file.clone() else { return };
        let dead = self.verdicts.iter().filter(|(_, v)| **v == Verdict::Dead).map(|(name, _)| name.clone());
        let dead = dead.chain(self.remembered.iter().cloned()).collect();
        let kept = Kept { state: self.state.clone(), dead };
        self.keeping = Some(tokio::task::spawn_blocking(move || {
            if let Err(error) = state::write(&file, &kept) {
                tracing::warn!("what the service proxy knows is not kept: {error:#}");
            }
        }));
    }

    async fn stop(mut self) {
        // The rules stay, and the relay goes with this process.
        if let Some(applied) = self.applied.as_ref().filter(|_| self.config.relays.take().is_some()) {
            let verdicts = state::settled(&self.verdicts, &self.remembered, true);
            let script = plan(&self.state, &self.config, &verdicts).script(Some(applied));
            if let Err(error) = nft(&self.config, &script).await {
                tracing::warn!("connections are still handed to the relay: {error:#}");
            }
        }
        self.tasks.shutdown().await;
        while finished(&mut self.keeping).await.is_some() || self.keep_at().is_some() {
            if self.keeping.is_none() && self.keep_due {
                self.keep();
            }
        }
    }
}

/// How often the copy on disk is written at most.
const KEEP: Duration = Duration::from_secs(1);
