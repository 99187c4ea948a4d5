//! Addresses of Services of type LoadBalancer on the local network, where no cloud brings clients to them: one machine has
//! each address and answers for it (ARP, NDP). Who that is follows from [`plan::owners`], on every machine by itself, so
//! that an address moves when the gossip says that its machine is dead, with or without the API.
//!
//! The address is on the machine's interface, so the kernel answers for it. What comes to it by ports that no Service has
//! does not reach the machine's own programs. What is known is kept on disk, for a start without the API. The addresses stay
//! when the process ends: the rules by which the Service is reached stay as well.

pub mod kernel;
pub mod packet;
pub mod plan;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use seawall_client::watch::Backoff;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{nft, proxy::state::Fed, relay::kernel::MARK, verdict};
use kernel::Kernel;
use plan::{Balanced, Candidate, Key, State, owners};

/// The condition of Services whose addresses were given by the cluster's own controller.
pub const CONDITION: &str = "seawall.dev/AddressGiven";
/// The label of machines that answer for no address.
pub const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// Our table.
const TABLE: &str = "inet seawall_announce";
/// When it is said where an address is, after it came here: a frame may be lost, and a switch may be slow.
const SAID: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3)];

/// How it is run.
#[derive(Clone, Debug)]
pub struct Config {
    /// This machine.
    pub node_name: String,
    /// Its address among the others: addresses that are on no network of it go to the same interface.
    pub node_ip: IpAddr,
    /// Where what is known is kept, if it is.
    pub file: Option<PathBuf>,
    /// How long changes are collected before they are acted on. Verdicts are not.
    pub debounce: Duration,
    /// How often it is looked whether the addresses are there, and said where they are.
    pub resync: Duration,
    /// The words that start `nft`.
    pub nft: Vec<String>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            node_name: String::new(),
            node_ip: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
            file: None,
            debounce: Duration::from_millis(20),
            resync: Duration::from_secs(10),
            nft: vec!["nft".into()],
        }
    }
}

/// Answers for addresses until `stop`.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn run(
    client: Client,
    config: Config,
    verdicts: verdict::Receiver,
    stop: CancellationToken,
) -> futures::future::BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(client, config, verdicts, stop))
}

/// Takes all our addresses and rules away.
///
/// # Errors
/// If the kernel refuses.
pub async fn remove() -> anyhow::Result<()> {
    let kernel = Kernel::connect()?;
    for own in kernel.addresses().await?.into_iter().filter(|own| own.ours) {
        kernel.remove(own.net.addr(), own.link).await?;
    }
    nft::apply(&Config::default().nft, &format!("add table {TABLE}\ndelete table {TABLE}\n")).await
}

/// The rules for the addresses that are here: no program of the machine is reached by them, but for the relay.
fn script(ips: &BTreeSet<IpAddr>) -> String {
    let mut out = format!("add table {TABLE}\ndelete table {TABLE}\n");
    if ips.is_empty() {
        return out;
    }
    let mut rules = String::new();
    for (ip, v4) in [("ip", true), ("ip6", false)] {
        let list: Vec<String> = ips.iter().filter(|i| i.is_ipv4() == v4).map(ToString::to_string).collect();
        if !list.is_empty() {
            rules += &format!("        {ip} daddr {{ {} }} meta l4proto tcp reject with tcp reset\n", list.join(", "));
            rules += &format!(
                "        {ip} daddr {{ {} }} meta l4proto {{ udp, sctp }} reject with icmpx port-unreachable\n",
                list.join(", ")
            );
        }
    }
    out += &format!(
        "table {TABLE} {{\n    chain input {{\n        type filter hook input priority filter; policy accept;\n        \
         iif lo accept\n        meta mark & {MARK:#x} != 0 accept\n{rules}    }}\n}}\n"
    );
    out
}

/// What is kept on disk.
#[derive(Default, Serialize, Deserialize)]
struct Kept {
    services: Vec<(Key, Balanced)>,
    slices: Vec<(Key, (String, BTreeSet<String>))>,
    machines: Vec<(Key, Candidate)>,
}

fn read(file: &Path) -> anyhow::Result<Option<State>> {
    match std::fs::read(file) {
        Ok(text) => {
            let kept: Kept = serde_json::from_slice(&text).with_context(|| file.display().to_string())?;
            Ok(Some(State {
                services: kept.services.into_iter().collect(),
                slices: kept.slices.into_iter().collect(),
                machines: kept.machines.into_iter().collect(),
            }))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| file.display().to_string()),
    }
}

fn write(file: &Path, state: &State) -> anyhow::Result<()> {
    let all = |name: &Path| name.display().to_string();
    let kept = Kept {
        services: state.services.clone().into_iter().collect(),
        slices: state.slices.clone().into_iter().collect(),
        machines: state.machines.clone().into_iter().collect(),
    };
    let directory = file.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory).with_context(|| all(directory))?;
    let temporary = file.with_extension("tmp");
    let mut out = std::fs::File::create(&temporary).with_context(|| all(&temporary))?;
    out.write_all(&serde_json::to_vec(&kept)?).and_then(|()| out.sync_all()).with_context(|| all(&temporary))?;
    std::fs::rename(&temporary, file).with_context(|| all(file))
}

type Watch<K> = BoxStream<'static, watcher::Result<watcher::Event<K>>>;

fn watch<K>(client: &Client) -> Watch<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    watcher(Api::<K>::all(client.clone()), watcher::Config::default()).backoff(Backoff::default()).boxed()
}

/// What a watch brought. One that breaks is set up again.
fn heard<E>(what: &str, event: watcher::Result<Option<E>>) -> anyhow::Result<Option<E>> {
    match event {
        Ok(None) => bail!("the watch of {what} ended"),
        Ok(event) => Ok(event),
        Err(error) => {
            tracing::debug!(%error, "the watch of {what} broke and is set up again");
            Ok(None)
        }
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

async fn work(
    client: Client,
    config: Config,
    mut verdicts: verdict::Receiver,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let (mut services, mut slices, mut nodes) =
        (watch::<Service>(&client), watch::<EndpointSlice>(&client), watch::<Node>(&client));
    let (mut of_services, mut of_slices, mut of_nodes) = (Fed::default(), Fed::default(), Fed::default());
    let mut announcer = Announcer::start(config, verdicts.borrow_and_update().clone())?;
    let mut resync = tokio::time::interval(announcer.config.resync);
    let mut deaf = false;
    loop {
        let due = announcer.due.filter(|_| announcer.known);
        let mut changed = false;
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            told = verdicts.changed(), if !deaf => {
                deaf = told.is_err();
                announcer.verdicts = verdicts.borrow_and_update().clone();
                announcer.due = Some(Instant::now());
                announcer.repeat();
            }
            event = services.try_next() => if let Some(event) = heard("services", event)? {
                changed = of_services.take(&mut announcer.state.services, event, plan::service);
            },
            event = slices.try_next() => if let Some(event) = heard("endpoint slices", event)? {
                changed = of_slices.take(&mut announcer.state.slices, event, plan::slice);
            },
            event = nodes.try_next() => if let Some(event) = heard("nodes", event)? {
                changed = of_nodes.take(&mut announcer.state.machines, event, plan::machine);
            },
            _ = resync.tick() => announcer.due = Some(Instant::now()),
            () = at(due) => announcer.apply().await,
            () = at(announcer.say_at()) => announcer.say().await,
        }
        if !announcer.complete && of_services.listed && of_slices.listed && of_nodes.listed {
            (announcer.known, announcer.complete) = (true, true);
            changed = true;
        }
        if changed {
            announcer.due.get_or_insert(Instant::now() + announcer.config.debounce);
            announcer.keep |= announcer.complete;
        }
    }
}

struct Announcer {
    config: Config,
    kernel: Kernel,
    state: State,
    /// Whether enough is known to act on: full lists, or what was kept.
    known: bool,
    complete: bool,
    verdicts: verdict::Verdicts,
    due: Option<Instant>,
    /// Whether the copy on disk is old.
    keep: bool,
    /// The addresses that are here, with their interfaces' names.
    here: BTreeMap<IpAddr, String>,
    /// The rules that were given to the kernel.
    guarded: Option<BTreeSet<IpAddr>>,
    /// When to say next where which addresses are, and how often that was done.
    sayings: BTreeMap<IpAddr, (Instant, usize)>,
}

impl Announcer {
    fn start(config: Config, verdicts: verdict::Verdicts) -> anyhow::Result<Announcer> {
        let kept = config.file.as_deref().and_then(|file| match read(file) {
            Ok(kept) => kept,
            Err(error) => {
                tracing::warn!("what was known of addresses is lost: {error:#}");
                None
            }
        });
        Ok(Announcer {
            kernel: Kernel::connect()?,
            known: kept.is_some(),
            complete: false,
            state: kept.unwrap_or_default(),
            verdicts,
            // The API is given a moment.
            due: Some(Instant::now() + Duration::from_secs(1)),
            keep: false,
            here: BTreeMap::new(),
            guarded: None,
            sayings: BTreeMap::new(),
            config,
        })
    }

    async fn apply(&mut self) {
        self.due = None;
        let began = Instant::now();
        let owners = owners(&self.state, &self.verdicts);
        let wanted: BTreeSet<IpAddr> =
            owners.iter().filter(|(_, owner)| **owner == self.config.node_name).map(|(ip, _)| *ip).collect();
        if let Err(error) = self.bring(&wanted).await {
            tracing::warn!("addresses of load balancers: {error:#}");
            self.due = Some(Instant::now() + Duration::from_secs(1));
        }
        if std::mem::take(&mut self.keep)
            && let Some(file) = self.config.file.clone()
        {
            let state = self.state.clone();
            let written = tokio::task::spawn_blocking(move || write(&file, &state)).await;
            if let Ok(Err(error)) = written {
                tracing::warn!("what is known of addresses is not kept: {error:#}");
            }
        }
        tracing::trace!(took = ?began.elapsed(), ?wanted, "addresses were looked at");
    }

    /// Brings the kernel's addresses to these.
    async fn bring(&mut self, wanted: &BTreeSet<IpAddr>) -> anyhow::Result<()> {
        let present = self.kernel.addresses().await?;
        let ours: BTreeMap<IpAddr, u32> = present
            .iter()
            // Kernels before 5.18 do not remember whose an address is.
            .filter(|own| own.ours || self.here.contains_key(&own.net.addr()))
            .map(|own| (own.net.addr(), own.link))
            .collect();
        // Before an address is here, nothing is reached by it that should not be.
        if self.guarded.as_ref() != Some(wanted) && !(wanted.is_empty() && self.guarded.is_none() && ours.is_empty()) {
            nft::apply(&self.config.nft, &script(wanted)).await?;
            self.guarded = Some(wanted.clone());
        }
        for (ip, link) in ours.iter().filter(|(ip, _)| !wanted.contains(*ip)) {
            self.kernel.remove(*ip, *link).await?;
            self.here.remove(ip);
            self.sayings.remove(ip);
            tracing::info!(%ip, "another machine answers for an address now");
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let links = self.kernel.links().await?;
        for ip in wanted {
            let link = match ours.get(ip) {
                Some(link) => *link,
                None => {
                    let Some(link) = kernel::place(*ip, self.config.node_ip, &present) else {
                        bail!("{ip} is on no network of this machine, and none has {}", self.config.node_ip);
                    };
                    self.kernel.add(*ip, link).await?;
                    link
                }
            };
            let fresh = !ours.contains_key(ip) || !self.here.contains_key(ip);
            self.here.insert(*ip, links.get(&link).cloned().unwrap_or_default());
            if fresh {
                tracing::info!(%ip, "this machine answers for an address");
                self.sayings.insert(*ip, (Instant::now(), 0));
            }
        }
        if self.sayings.values().any(|(_, count)| *count == 0) {
            self.say().await;
        }
        Ok(())
    }

    /// Whoever is back may have answered for our addresses meanwhile.
    fn repeat(&mut self) {
        let soon = Instant::now() + SAID[1];
        for ip in self.here.keys() {
            self.sayings.entry(*ip).or_insert((soon, 1));
        }
    }

    fn say_at(&self) -> Option<Instant> {
        self.sayings.values().map(|(at, _)| *at).min()
    }

    /// Tells the network where addresses are that came here lately.
    async fn say(&mut self) {
        let now = Instant::now();
        let mut by_link: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        self.sayings.retain(|ip, (at, count)| {
            if *at <= now {
                if let Some(link) = self.here.get(ip) {
                    by_link.entry(link.clone()).or_default().push(*ip);
                }
                *count += 1;
                match SAID.get(*count) {
                    Some(pause) => *at = now + *pause,
                    None => return false,
                }
            }
            true
        });
        for (link, ips) in by_link {
            if let Err(error) = packet::send(&link, &ips) {
                tracing::warn!(link, ?ips, "the network is not told where addresses are: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("agent/announce.json");
        assert_eq!(read(&file).unwrap(), None);
        let mut state = State::default();
        let ips = ["192.0.2.7".parse().unwrap()].into();
        state.services.insert(("n".into(), "s".into()), Balanced { ips, local: true });
        state.slices.insert(("n".into(), "s-1".into()), ("s".into(), ["a".to_owned()].into()));
        state.machines.insert((String::new(), "a".into()), Candidate { ready: true, excluded: false });
        write(&file, &state).unwrap();
        assert_eq!(read(&file).unwrap(), Some(state));
        std::fs::write(&file, "{").unwrap();
        assert!(format!("{:#}", read(&file).unwrap_err()).contains("announce.json"));
    }
}
