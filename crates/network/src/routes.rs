//! Routes to other nodes' pods
//! (<https://kubernetes.io/docs/concepts/cluster-administration/networking/#how-to-implement-the-kubernetes-network-model>):
//! through the nodes' own addresses where they share a network with this one, else by a tunnel.
//!
//! [`plan`] is pure: nodes and this machine's addresses give what should be. Our routes carry a protocol number of their
//! own; nobody else's are touched. They stay when the process ends, as does the tunnel.

mod kernel;
mod plan;
mod tunnel;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use anyhow::{Context as _, bail};
use futures::TryStreamExt;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use seawall_client::watch::Backoff;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use kernel::Kernel;
pub use plan::{Change, End, Entry, Mac, Route, Via, Wanted, changes, plan};
pub use tunnel::{DEVICE, PORT};

/// The protocol number of our routes (`ip route show proto 83`); iproute2's list has no other use of it.
pub const PROTOCOL: u8 = 83;

/// When other nodes' pods are reached by a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tunnel {
    /// Where a node is on no network of this machine.
    #[default]
    Auto,
    /// Never: nodes that are on no network of this machine are not reached.
    Never,
    /// Always, also on one network: some let nothing pass that has pods' addresses.
    Always,
}

/// How it is run.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node.
    pub node_name: String,
    /// When there is a tunnel.
    pub tunnel: Tunnel,
    /// The UDP port of the tunnel, the same on all nodes.
    pub tunnel_port: u16,
    /// The command that runs nft.
    pub nft: Vec<String>,
    /// How long changes are collected before they are applied.
    pub debounce: Duration,
    /// How often the kernel's routes are compared with what they should be: a link that went down took its routes along.
    pub resync: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            node_name: String::new(),
            tunnel: Tunnel::Auto,
            tunnel_port: PORT,
            nft: vec!["nft".into()],
            debounce: Duration::from_millis(20),
            resync: Duration::from_secs(10),
        }
    }
}

/// What counts of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeRoutes {
    /// Its name.
    pub name: String,
    /// Where it is reached: its `InternalIP`s.
    pub addresses: Vec<IpAddr>,
    /// Its pods' addresses.
    pub pods: Vec<IpNet>,
}

impl NodeRoutes {
    /// Of a Node object.
    pub fn of(node: &Node) -> NodeRoutes {
        let addresses = node.status.iter().flat_map(|s| s.addresses.iter().flatten());
        let internal = addresses.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok());
        let mut pods: Vec<IpNet> = Vec::new();
        if let Some(spec) = &node.spec {
            let texts = spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr);
            pods.extend(texts.filter_map(|t| t.parse::<IpNet>().ok()).map(|p| p.trunc()));
            pods.sort();
            pods.dedup();
        }
        NodeRoutes { name: node.name_any(), addresses: internal.collect(), pods }
    }
}

/// Keeps the routes until `stop`.
///
/// # Errors
/// If the kernel cannot be asked, or the watch of nodes ends for good.
pub fn run(
    client: Client,
    config: Config,
    stop: CancellationToken,
) -> futures::future::BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(client, config, stop))
}

async fn work(client: Client, config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    let kernel = Kernel::connect()?;
    let mut events =
        Box::pin(watcher(Api::<Node>::all(client), watcher::Config::default()).backoff(Backoff::default()));
    let (mut nodes, mut listing) = (BTreeMap::new(), BTreeMap::new());
    let mut synced = false;
    let mut due: Option<Instant> = None;
    let mut resync = tokio::time::interval(config.resync);
    let mut refused = BTreeSet::new();
    loop {
        let mut changed = false;
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            event = events.try_next() => match event {
                Ok(Some(watcher::Event::Init)) => listing.clear(),
                Ok(Some(watcher::Event::InitApply(node))) => {
                    listing.insert(node.name_any(), NodeRoutes::of(&node));
                }
                Ok(Some(watcher::Event::InitDone)) => {
                    changed = !synced || nodes != listing;
                    synced = true;
                    nodes = std::mem::take(&mut listing);
                }
                Ok(Some(watcher::Event::Apply(node))) => {
                    // A node's status is written often, and what counts here changes seldom.
                    let new = NodeRoutes::of(&node);
                    changed = nodes.get(&new.name) != Some(&new);
                    nodes.insert(new.name.clone(), new);
                }
                Ok(Some(watcher::Event::Delete(node))) => changed = nodes.remove(&node.name_any()).is_some(),
                Ok(None) => bail!("the watch of nodes ended"),
                Err(error) => tracing::debug!("the watch of nodes: {error}"),
            },
            _ = resync.tick() => changed = true,
            // Without a complete list, routes would be taken away that are in use.
            () = at(due), if synced => {
                due = None;
                let all: Vec<NodeRoutes> = nodes.values().cloned().collect();
                match apply(&kernel, &config, &all).await {
                    Ok(now) => {
                        for reason in now.difference(&refused) {
                            tracing::warn!("no route to a node's pods: {reason}");
                        }
                        refused = now;
                    }
                    Err(error) => {
                        tracing::warn!("routes to other nodes' pods: {error:#}");
                        due = Some(Instant::now() + Duration::from_secs(1));
                    }
                }
            }
        }
        if changed {
            due.get_or_insert(Instant::now() + config.debounce);
        }
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Brings the kernel to what the nodes ask for, once. Says which nodes have no route, and why.
///
/// # Errors
/// If the kernel refuses: all other changes were tried nevertheless.
pub async fn apply(kernel: &Kernel, config: &Config, nodes: &[NodeRoutes]) -> anyhow::Result<BTreeSet<String>> {
    let wanted = plan(&config.node_name, nodes, &kernel.addresses().await?, config.tunnel);
    // What is there before its routes are; it goes after them.
    let mut tunnel = match &wanted.tunnel {
        Some(end) => tunnel::ensure(kernel, config, end).await.context("the tunnel to nodes of other networks"),
        None => Ok(()),
    };
    let device = kernel.link(DEVICE).await?.map(|link| link.index);
    let mut failed = None;
    for change in changes(&wanted.routes, &kernel.routes(device).await?) {
        let result = match change {
            Change::Add(Route { via: Via::Tunnel, .. }) | Change::Replace(Route { via: Via::Tunnel, .. })
                if tunnel.is_err() =>
            {
                continue;
            }
            Change::Add(route) => kernel.add(route, device, false).await.with_context(|| format!("add {route}")),
            Change::Replace(route) => {
                kernel.add(route, device, true).await.with_context(|| format!("change to {route}"))
            }
            Change::Remove(route) => kernel.remove(route, device).await.with_context(|| format!("remove {route}")),
        };
        match result {
            Ok(()) => tracing::info!(?change, "a route to a node's pods"),
            Err(error) => failed = Some(error),
        }
    }
    if wanted.tunnel.is_none() {
        tunnel = tunnel::remove(kernel, config).await;
    }
    tunnel?;
    match failed {
        Some(error) => Err(error),
        None => Ok(wanted.refused),
    }
}

/// Takes all our routes away, and the tunnel.
///
/// # Errors
/// If the kernel refuses.
pub async fn remove() -> anyhow::Result<()> {
    apply(&Kernel::connect()?, &Config::default(), &[]).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_nodes() {
        let object: Node = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "a"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:2::/64", "none"]},
            "status": {"addresses": [{"type": "Hostname", "address": "a"}, {"type": "InternalIP", "address": "10.9.0.2"},
                {"type": "ExternalIP", "address": "198.51.100.1"}]},
        }))
        .unwrap();
        let expect = NodeRoutes {
            name: "a".into(),
            addresses: vec!["10.9.0.2".parse().unwrap()],
            pods: ["10.244.1.0/24", "fd00:2::/64"].map(|p| p.parse().unwrap()).to_vec(),
        };
        assert_eq!(NodeRoutes::of(&object), expect);
    }
}
