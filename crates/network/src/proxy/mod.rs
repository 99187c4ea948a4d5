//! The service proxy (<https://kubernetes.io/docs/reference/networking/virtual-ips/>).
//!
//! Services and EndpointSlices become one table of nftables. What it should hold is decided by [`plan::plan`]; what has
//! to change by [`rules::Ruleset::script`]; the kernel takes a script as one transaction.

pub mod plan;
pub mod rules;

use std::{collections::BTreeMap, net::IpAddr, process::Stdio, time::Duration};

use anyhow::{Context as _, bail};
use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use tokio::{io::AsyncWriteExt, net::UnixListener, process::Command, time::Instant};
use tokio_util::sync::CancellationToken;

use plan::{Stale, plan, stale};
use rules::Ruleset;
use seawall_client::watch::Backoff;

/// How the proxy of a node works.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// The name of this node: its endpoints are the local ones.
    pub node_name: String,
    /// The addresses of this node.
    pub node_ips: Vec<IpAddr>,
    /// The addresses of pods: what comes from elsewhere to a cluster address is masqueraded.
    pub cluster_cidr: IpNet,
    /// How long changes are collected before they are applied.
    pub debounce: Duration,
    /// How often the kernel's table is compared with ours; less often where that is much work.
    pub verify: Duration,
    /// The words that start `nft`, and those that start `conntrack`: another network namespace can be put in front.
    pub nft: Vec<String>,
    /// See `nft`.
    pub conntrack: Vec<String>,
}

impl Default for ProxyConfig {
    fn default() -> ProxyConfig {
        ProxyConfig {
            node_name: String::new(),
            node_ips: Vec::new(),
            cluster_cidr: IpNet::from(IpAddr::from([10, 244, 0, 0])),
            debounce: Duration::from_millis(5),
            verify: Duration::from_secs(5),
            nft: vec!["nft".into()],
            conntrack: vec!["conntrack".into()],
        }
    }
}

/// What is known of the cluster.
#[derive(Default)]
pub struct State {
    /// By namespace and name.
    pub services: BTreeMap<(String, String), Service>,
    /// By namespace and name.
    pub slices: BTreeMap<(String, String), EndpointSlice>,
}

fn key(object: &impl ResourceExt) -> (String, String) {
    (object.namespace().unwrap_or_default(), object.name_any())
}

/// One kind of object, as a watch brings it: objects seen since the last full list began, and those known.
struct Fed<K> {
    fresh: Option<BTreeMap<(String, String), K>>,
}

impl<K: ResourceExt> Fed<K> {
    /// Takes an event into `known`. Says whether `known` changed.
    fn take(&mut self, known: &mut BTreeMap<(String, String), K>, event: watcher::Event<K>) -> bool {
        match event {
            watcher::Event::Init => self.fresh = Some(BTreeMap::new()),
            watcher::Event::InitApply(object) => {
                if let Some(fresh) = &mut self.fresh {
                    fresh.insert(key(&object), object);
                }
            }
            watcher::Event::InitDone => {
                if let Some(fresh) = self.fresh.take() {
                    *known = fresh;
                }
                return true;
            }
            watcher::Event::Apply(object) => {
                known.insert(key(&object), object);
                return true;
            }
            watcher::Event::Delete(object) => {
                known.remove(&key(&object));
                return true;
            }
        }
        false
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
    shutdown: CancellationToken,
) -> futures::future::BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(client, config, shutdown))
}

async fn work(client: Client, config: ProxyConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    let claim = claim().await?;
    let mut services =
        watcher(Api::<Service>::all(client.clone()), watcher::Config::default()).backoff(Backoff::default()).boxed();
    let mut slices =
        watcher(Api::<EndpointSlice>::all(client), watcher::Config::default()).backoff(Backoff::default()).boxed();
    let (mut of_services, mut of_slices) = (Fed { fresh: None }, Fed { fresh: None });
    let mut state = State::default();
    let mut synced = (false, false);
    let mut applied: Option<Ruleset> = None;
    let mut due: Option<Instant> = None;
    let mut failures = 0u32;
    let mut look = Instant::now() + config.verify;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            // Who asks has learned it by connecting.
            _ = claim.accept() => {}
            event = services.try_next() => match event {
                Ok(Some(event)) => {
                    synced.0 |= matches!(event, watcher::Event::InitDone);
                    if of_services.take(&mut state.services, event) {
                        due.get_or_insert(Instant::now() + config.debounce);
                    }
                }
                Ok(None) => bail!("the watch of services ended"),
                Err(error) => tracing::warn!(%error, "the watch of services broke and is set up again"),
            },
            event = slices.try_next() => match event {
                Ok(Some(event)) => {
                    synced.1 |= matches!(event, watcher::Event::InitDone);
                    if of_slices.take(&mut state.slices, event) {
                        due.get_or_insert(Instant::now() + config.debounce);
                    }
                }
                Ok(None) => bail!("the watch of endpoint slices ended"),
                Err(error) => tracing::warn!(%error, "the watch of endpoint slices broke and is set up again"),
            },
            () = tokio::time::sleep_until(look), if applied.is_some() && due.is_none() => {
                let began = Instant::now();
                if let Some(rules) = &applied && !intact(&config, rules).await {
                    tracing::warn!("somebody changed our table of nftables: it is made anew");
                    applied = None;
                    due = Some(Instant::now());
                }
                // A hundredth of the time at most.
                look = Instant::now() + config.verify.max(began.elapsed() * 100);
            }
            // Half of the picture would take services away.
            () = at(due), if synced == (true, true) => {
                due = None;
                let wanted = plan(&state, &config);
                if applied.as_ref() == Some(&wanted) {
                    continue;
                }
                let script = wanted.script(applied.as_ref());
                match nft(&config, &script).await {
                    Ok(()) => {
                        failures = 0;
                        forget(&config, stale(applied.as_ref(), &wanted));
                        applied = Some(wanted);
                    }
                    Err(error) => {
                        // Somebody may have changed our table: next time it is made anew as a whole.
                        failures += 1;
                        tracing::error!(failures, "the rules were not applied: {error:#}");
                        if failures > 5 {
                            return Err(error);
                        }
                        applied = None;
                        due = Some(Instant::now() + Duration::from_millis(200) * failures);
                    }
                }
            }
        }
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Whether the kernel still holds the rules. Where that cannot be told, it is believed.
pub async fn intact(config: &ProxyConfig, rules: &Ruleset) -> bool {
    let [program, words @ ..] = &config.nft[..] else { return true };
    let mut command = Command::new(program);
    command.args(words).args(["-j", "list", "table"]).args(rules::TABLE.split(' ')).stdin(Stdio::null());
    match command.kill_on_drop(true).output().await {
        Ok(output) if output.status.success() => match rules::Outline::listed(&output.stdout) {
            Ok(outline) => outline == rules.outline(),
            Err(error) => {
                tracing::debug!("what nft lists is not understood: {error}");
                true
            }
        },
        Ok(output) => !String::from_utf8_lossy(&output.stderr).contains("No such file or directory"),
        Err(_) => true,
    }
}

/// Gives a script to the kernel, whole or not at all.
///
/// # Errors
/// With what `nft` said.
pub async fn nft(config: &ProxyConfig, script: &str) -> anyhow::Result<()> {
    let [program, words @ ..] = &config.nft[..] else { bail!("no command for nft is configured") };
    let mut child = Command::new(program)
        .args(words)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{program} cannot be run: is nftables installed?"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).await.context("writing to nft")?;
    }
    let output = child.wait_with_output().await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("nft: {}", said.lines().take(6).collect::<Vec<_>>().join("; "));
    }
    Ok(())
}

/// Makes the kernel forget datagram flows to endpoints that are gone; a flow of datagrams has no end of its own.
fn forget(config: &ProxyConfig, stale: Vec<Stale>) {
    let command = config.conntrack.clone();
    if stale.is_empty() || command.is_empty() {
        return;
    }
    tokio::spawn(async move {
        for flow in stale {
            let run =
                Command::new(&command[0]).args(&command[1..]).args(flow.arguments()).stdin(Stdio::null()).output();
            match run.await {
                // It also fails when there was nothing to delete.
                Ok(output) => tracing::debug!(?flow, status = %output.status, "forgot flows"),
                Err(error) => {
                    tracing::warn!(%error, "conntrack cannot be run: is it installed? Datagrams may go on to dead endpoints")
                }
            }
        }
    });
}

/// Takes everything of the proxy out of the kernel.
///
/// # Errors
/// With what `nft` said.
pub async fn remove() -> anyhow::Result<()> {
    let table = rules::TABLE;
    nft(&ProxyConfig::default(), &format!("add table {table}\ndelete table {table}\n")).await
}
