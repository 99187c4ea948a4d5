//! Routes to other nodes' pods: each node reaches the pods of the others through the nodes' own addresses, without a
//! tunnel. That works where the nodes share a network
//! (<https://kubernetes.io/docs/concepts/cluster-administration/networking/#how-to-implement-the-kubernetes-network-model>).
//!
//! [`plan`] is pure: nodes, this machine's addresses and the kernel's routes give changes. Our routes carry a protocol
//! number of their own; nobody else's are touched. They stay when the process ends.

mod kernel;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
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

/// The protocol number of our routes (`ip route show proto 83`); iproute2's list has no other use of it.
pub const PROTOCOL: u8 = 83;

/// How it is run.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node.
    pub node_name: String,
    /// How long changes are collected before they are applied.
    pub debounce: Duration,
    /// How often the kernel's routes are compared with what they should be: a link that went down took its routes along.
    pub resync: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config { node_name: String::new(), debounce: Duration::from_millis(20), resync: Duration::from_secs(10) }
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

/// A route of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The pods of a node.
    pub pods: IpNet,
    /// The node.
    pub via: IpAddr,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} via {}", self.pods, self.via)
    }
}

/// What to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A route that is missing.
    Add(Route),
    /// One of ours that leads elsewhere, put right in one step.
    Replace(Route),
    /// One of ours that is not wanted.
    Remove(Route),
}

/// What to do, and what cannot be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In order: removals first.
    pub changes: Vec<Change>,
    /// Nodes without a route, and why.
    pub refused: BTreeSet<String>,
}

/// Compares what should be with what is. `own` are this machine's addresses with their networks, `present` the routes
/// with our protocol.
pub fn plan(me: &str, nodes: &[NodeRoutes], own: &[IpNet], present: &[Route]) -> Plan {
    let mut plan = Plan::default();
    let mut wanted: BTreeMap<IpNet, (IpAddr, &str)> = BTreeMap::new();
    let mine: Vec<IpNet> = nodes.iter().filter(|n| n.name == me).flat_map(|n| n.pods.iter().copied()).collect();
    let mut others: Vec<&NodeRoutes> = nodes.iter().filter(|n| n.name != me).collect();
    others.sort_by(|a, b| a.name.cmp(&b.name));
    for node in others {
        for pods in &node.pods {
            match route(node, *pods, nodes, own, &mine) {
                Ok(via) => match wanted.get(pods) {
                    Some((_, other)) => {
                        plan.refused.insert(format!("{}: its pods {pods} are also those of {other}", node.name));
                    }
                    None => drop(wanted.insert(*pods, (via, &node.name))),
                },
                Err(reason) => drop(plan.refused.insert(format!("{}: {reason}", node.name))),
            }
        }
    }
    let mut seen = BTreeSet::new();
    let mut replaced = Vec::new();
    for route in present {
        match wanted.get(&route.pods) {
            Some((via, _)) if *via == route.via => drop(seen.insert(route.pods)),
            Some((via, _)) => replaced.push((*route, Route { pods: route.pods, via: *via })),
            None => plan.changes.push(Change::Remove(*route)),
        }
    }
    for (old, new) in replaced {
        // Where the right one is there too, or is being put there, the wrong one just goes.
        if seen.insert(new.pods) {
            plan.changes.push(Change::Replace(new));
        } else {
            plan.changes.push(Change::Remove(old));
        }
    }
    let missing = wanted.iter().filter(|(pods, _)| !seen.contains(pods));
    plan.changes.extend(missing.map(|(pods, (via, _))| Change::Add(Route { pods: *pods, via: *via })));
    plan.changes.sort_by_key(|change| !matches!(change, Change::Remove(_)));
    plan
}

/// Through which address a node's pods are reached.
fn route(
    node: &NodeRoutes,
    pods: IpNet,
    nodes: &[NodeRoutes],
    own: &[IpNet],
    mine: &[IpNet],
) -> Result<IpAddr, String> {
    let overlap = |a: &IpNet, b: &IpNet| a.contains(&b.network()) || b.contains(&a.network());
    if mine.iter().any(|m| overlap(m, &pods)) {
        return Err(format!("its pods {pods} overlap with those of this node"));
    }
    // A range that holds a node would take the node's own traffic away.
    let addresses = nodes.iter().flat_map(|n| n.addresses.iter().copied()).chain(own.iter().map(|n| n.addr()));
    if let Some(inside) = addresses.into_iter().find(|a| pods.contains(a)) {
        return Err(format!("its pods {pods} would include the address {inside} of a node"));
    }
    let family = |ip: &IpAddr| ip.is_ipv4() == pods.addr().is_ipv4();
    let mut reasons = Vec::new();
    for address in node.addresses.iter().filter(|a| family(a)) {
        if own.iter().any(|n| n.addr() == *address) {
            reasons.push(format!("its address {address} is one of this machine's"));
        } else if own.iter().any(|n| n.prefix_len() < n.max_prefix_len() && n.contains(address)) {
            return Ok(*address);
        } else {
            reasons.push(format!("its address {address} is on no network of this machine"));
        }
    }
    if reasons.is_empty() {
        reasons.push(format!("it has no InternalIP for its pods {pods} yet"));
    }
    Err(reasons.join(", "))
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
                match apply(&kernel, &config.node_name, &all).await {
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

/// Brings the kernel's routes to what the nodes ask for, once. Says which nodes have none, and why.
///
/// # Errors
/// If the kernel refuses: all other changes were tried nevertheless.
pub async fn apply(kernel: &Kernel, me: &str, nodes: &[NodeRoutes]) -> anyhow::Result<BTreeSet<String>> {
    let plan = plan(me, nodes, &kernel.addresses().await?, &kernel.routes().await?);
    let mut failed = None;
    for change in plan.changes {
        let result = match change {
            Change::Add(route) => kernel.add(route, false).await.with_context(|| format!("add {route}")),
            Change::Replace(route) => kernel.add(route, true).await.with_context(|| format!("change to {route}")),
            Change::Remove(route) => kernel.remove(route).await.with_context(|| format!("remove {route}")),
        };
        match result {
            Ok(()) => tracing::info!(?change, "a route to a node's pods"),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(plan.refused),
    }
}

/// Takes all our routes away.
///
/// # Errors
/// If the kernel refuses.
pub async fn remove() -> anyhow::Result<()> {
    apply(&Kernel::connect()?, "", &[]).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, address: &str, pods: &str) -> NodeRoutes {
        NodeRoutes {
            name: name.into(),
            addresses: address.split_whitespace().map(|a| a.parse().unwrap()).collect(),
            pods: pods.split_whitespace().map(|p| p.parse().unwrap()).collect(),
        }
    }

    fn routes(text: &str) -> Vec<Route> {
        let parse = |line: &str| {
            let (pods, via) = line.trim().split_once(" via ").unwrap();
            Route { pods: pods.parse().unwrap(), via: via.parse().unwrap() }
        };
        text.split(',').filter(|l| !l.trim().is_empty()).map(parse).collect()
    }

    #[track_caller]
    fn check(nodes: &[NodeRoutes], present: &str, changes: &[(&str, &str)], refused: &[&str]) {
        let me = node("me", "10.9.0.1", "10.244.0.0/24 fd00:1::/64");
        let own: Vec<IpNet> =
            ["127.0.0.1/8", "10.9.0.1/24", "10.244.0.1/32", "fd00::1/64"].map(|n| n.parse().unwrap()).to_vec();
        let plan = plan("me", &[&[me], nodes].concat(), &own, &routes(present));
        let said: Vec<(&str, String)> = plan
            .changes
            .iter()
            .map(|change| match change {
                Change::Add(route) => ("add", route.to_string()),
                Change::Replace(route) => ("replace", route.to_string()),
                Change::Remove(route) => ("remove", route.to_string()),
            })
            .collect();
        assert_eq!(said, changes.iter().map(|(a, b)| (*a, (*b).to_owned())).collect::<Vec<_>>());
        assert_eq!(plan.refused.len(), refused.len(), "{:?}", plan.refused);
        for (reason, part) in plan.refused.iter().zip(refused) {
            assert!(reason.contains(part), "{reason} has no {part:?}");
        }
    }

    #[test]
    fn plans() {
        let a = || node("a", "10.9.0.2", "10.244.1.0/24");
        let b = || node("b", "10.9.0.3", "10.244.2.0/24");
        let (to_a, to_b) = ("10.244.1.0/24 via 10.9.0.2", "10.244.2.0/24 via 10.9.0.3");
        check(&[a(), b()], "", &[("add", to_a), ("add", to_b)], &[]);
        check(&[a(), b()], to_a, &[("add", to_b)], &[]);
        check(&[a(), b()], &format!("{to_a},{to_b}"), &[], &[]);
        // A node left; another has a new address; its pods' range went to somebody else.
        check(&[b()], &format!("{to_a},{to_b}"), &[("remove", to_a)], &[]);
        let moved = node("a", "10.9.0.7", "10.244.1.0/24");
        check(std::slice::from_ref(&moved), to_a, &[("replace", "10.244.1.0/24 via 10.9.0.7")], &[]);
        let both = format!("{to_a},10.244.1.0/24 via 10.9.0.7");
        check(&[moved], &both, &[("remove", to_a)], &[]);
        // Two families.
        let dual = node("a", "10.9.0.2 fd00::2", "10.244.1.0/24 fd00:2::/64");
        check(&[dual], "", &[("add", to_a), ("add", "fd00:2::/64 via fd00::2")], &[]);
        // What cannot be.
        check(
            &[node("a", "192.0.2.1", "10.244.1.0/24")],
            to_a,
            &[("remove", to_a)],
            &["on no network of this machine"],
        );
        check(&[node("a", "10.244.0.1", "10.244.1.0/24")], "", &[], &["one of this machine's"]);
        check(&[node("a", "", "10.244.1.0/24")], "", &[], &["no InternalIP"]);
        check(&[node("a", "10.9.0.2", "")], "", &[], &[]);
        check(&[node("a", "10.9.0.2", "0.0.0.0/0")], "", &[], &["overlap with those of this node"]);
        check(&[node("a", "10.9.0.2", "10.9.0.0/16")], "", &[], &["would include the address"]);
        check(
            &[a(), node("c", "10.9.0.4", "10.244.1.0/24")],
            "",
            &[("add", to_a)],
            &["c: its pods 10.244.1.0/24 are also those of a"],
        );
    }

    #[test]
    fn of_nodes() {
        let object: Node = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "a"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:2::/64", "none"]},
            "status": {"addresses": [{"type": "Hostname", "address": "a"}, {"type": "InternalIP", "address": "10.9.0.2"},
                {"type": "ExternalIP", "address": "198.51.100.1"}]},
        }))
        .unwrap();
        assert_eq!(NodeRoutes::of(&object), node("a", "10.9.0.2", "10.244.1.0/24 fd00:2::/64"));
    }
}
