//! The Node object and its lease, kept alive.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::{
    api::{coordination::v1::Lease, core::v1::Node},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use seawall_client::watch::Backoff;
use tokio::{
    task::AbortHandle,
    time::{Instant, MissedTickBehavior, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Agent, cni,
    events::Kind,
    fence, masquerade,
    node_status::{self, Machine, NotReady, Seen},
    shutdown,
};

/// How often the status is looked at; it is written when it changed, or every [`HEARTBEAT`].
const LOOK: Duration = Duration::from_secs(10);
/// Between the looks while the node is not ready: what is missing comes soon.
const LOOK_SOON: Duration = Duration::from_millis(200);
/// The status is written this often even when nothing changed.
const HEARTBEAT: Duration = Duration::from_secs(300);

/// Registers the node, gives it a pod network, and keeps its status up to date.
pub async fn run(agent: Arc<Agent>, machine: Machine, shutdown: CancellationToken) {
    let looped = async {
        let mut node = register(&agent, &machine).await;
        agent.events.node(&node, Kind::Normal, "Starting", "Starting kubelet.");
        let mut written = Instant::now();
        let mut images = (Instant::now(), Vec::new());
        let mut was_ready = None;
        // Others say how we are too: a node that was thought to be gone says at once that it is not.
        agent.node.send_replace(Some(Arc::new(node.clone())));
        let mut hears = agent.node.subscribe();
        let following = tokio::spawn(follow(Arc::clone(&agent)));
        let _ends = AbortOnDrop(following.abort_handle());
        let mut leaving = agent.config.shutdown.changes();
        let mut was_down = false;
        let mut pressures = agent.evictions.pressure();
        let mut devices = agent.devices.changes();
        let mut forgets = agent.devices.is_new();
        let mut masqueraded = None;
        loop {
            let down = agent.config.shutdown.is_down();
            if std::mem::replace(&mut was_down, down) != down {
                let what = if down { "shutdown" } else { "cancelled" };
                agent.events.node(&node, Kind::Normal, "NodeShutdown", format!("Shutdown manager detected {what}"));
            }
            let heard = hears.borrow_and_update().clone();
            match heard {
                Some(fresh) if revision(&fresh) > revision(&node) => node = Node::clone(&fresh),
                Some(_) => {}
                None => node = register(&agent, &machine).await,
            }
            let api: Api<Node> = Api::all(agent.client.clone());
            if !network_configured(&node, &agent) {
                match api.get_opt(&agent.config.node_name).await {
                    Ok(Some(fresh)) => node = fresh,
                    Ok(None) => node = register(&agent, &machine).await,
                    Err(error) => tracing::debug!("get our node: {error}"),
                }
                configure_network(&node, &agent).await;
            }
            masquerade(&node, &agent, &mut masqueraded).await;
            let why = not_ready(&agent).await;
            let ready = why.is_none() && agent.services.synced();
            agent.ready.send_if_modified(|r| std::mem::replace(r, ready) != ready);
            if images.1.is_empty() || images.0.elapsed() > Duration::from_secs(60) {
                images = (Instant::now(), list_images(&agent).await);
            }
            devices.mark_unchanged();
            let seen = Seen {
                pressure: *pressures.borrow_and_update(),
                not_ready: why.clone(),
                devices: agent.devices.amounts(),
                forgets,
            };
            let status = node_status::status(&node, &agent.config, &machine, &seen, &images.1, Timestamp::now());
            let changed = node.status.as_ref().is_none_or(|old| node_status::differs(old, &status));
            if changed || written.elapsed() >= HEARTBEAT {
                let patch = node_status::patch(&status);
                match api.patch_status(&agent.config.node_name, &PatchParams::default(), &Patch::Strategic(patch)).await
                {
                    Ok(fresh) => {
                        node = fresh;
                        forgets = false;
                        written = Instant::now();
                        if was_ready != Some(why.is_none()) {
                            was_ready = Some(why.is_none());
                            let (reason, text) = if why.is_none() {
                                ("NodeReady", "NodeReady")
                            } else {
                                ("NodeNotReady", "NodeNotReady")
                            };
                            agent.events.node(
                                &node,
                                Kind::Normal,
                                reason,
                                format!("Node {} status is now: {text}", agent.config.node_name),
                            );
                        }
                    }
                    Err(kube::Error::Api(status)) if status.code == 404 => node = register(&agent, &machine).await,
                    Err(error) => tracing::warn!("cannot write the node's status: {error}"),
                }
            }
            // What is missing comes soon; after that only others change anything.
            let pause = if ready || down { LOOK } else { LOOK_SOON };
            tokio::select! {
                Ok(()) = hears.changed() => {}
                () = leaving.changed() => {}
                Ok(()) = pressures.changed() => {}
                Ok(()) = devices.changed() => {}
                () = sleep(pause) => {}
            }
        }
    };
    shutdown.run_until_cancelled(Box::pin(looped)).await;
}

/// A task that ends with its owner.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A resource version as a number. It is opaque to clients in general; ours is a revision, which only grows.
fn revision(node: &Node) -> Option<u64> {
    node.metadata.resource_version.as_deref()?.parse().ok()
}

/// Whether the configuration of the pods' network is there.
pub fn has_network(agent: &Agent) -> bool {
    agent.config.cni_conf_dir.is_some() || agent.config.containerd().cni_conf.join("10-seawall.conflist").exists()
}

fn network_configured(node: &Node, agent: &Agent) -> bool {
    let has_range = node.spec.as_ref().is_some_and(|s| s.pod_cidr.as_ref().is_some_and(|c| !c.is_empty()));
    agent.config.cni_conf_dir.is_some() || has_range && has_network(agent)
}

/// The addresses of the node's pods.
fn ranges(node: &Node) -> Vec<ipnet::IpNet> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let texts = spec.pod_cidrs.clone().filter(|c| !c.is_empty()).or_else(|| spec.pod_cidr.clone().map(|c| vec![c]));
    texts.into_iter().flatten().filter_map(|t| t.parse().ok()).collect()
}

/// Whoever brings a network of their own says which addresses are replaced. `found` is the number of the firewall's rules when
/// ours were last found there.
async fn masquerade(node: &Node, agent: &Agent, found: &mut Option<u32>) {
    let ranges = ranges(node);
    if ranges.is_empty() || agent.config.cni_conf_dir.is_some() {
        return;
    }
    let number = agent.config.rules_number.and_then(|ask| ask());
    if number.is_some() && number == *found {
        return;
    }
    if masquerade::is_there().await {
        *found = number;
        return;
    }
    if let Err(error) = masquerade::ensure(&ranges, &agent.config.cluster_cidrs).await {
        tracing::error!("pods do not reach the world outside the cluster: {error}");
    }
}

async fn configure_network(node: &Node, agent: &Agent) {
    let ranges = ranges(node);
    if ranges.is_empty() || agent.config.cni_conf_dir.is_some() {
        return;
    }
    if let Err(error) = masquerade::ensure(&ranges, &agent.config.cluster_cidrs).await {
        tracing::error!("pods do not reach the world outside the cluster: {error}");
    }
    let state = agent.config.run_dir.join("cni/state");
    let mtu = agent.config.pod_mtu.or_else(|| cni::uplink_mtu(agent.config.node_ip));
    if let Err(error) = cni::write(&agent.config.containerd().cni_conf, &ranges, mtu, &state) {
        tracing::error!("cannot write the CNI configuration: {error}");
    }
}

/// Creates the node, or takes over the one that is there: with our labels, and everyone else's.
async fn register(agent: &Agent, machine: &Machine) -> Node {
    let api: Api<Node> = Api::all(agent.client.clone());
    loop {
        let result = match api.get_opt(&agent.config.node_name).await {
            Ok(Some(node)) => match node_status::label_patch(&node, &agent.config) {
                Some(patch) => api.patch(&agent.config.node_name, &PatchParams::default(), &Patch::Merge(&patch)).await,
                None => Ok(node),
            },
            Ok(None) => {
                let seen = Seen {
                    pressure: agent.evictions.current(),
                    not_ready: not_ready(agent).await,
                    devices: agent.devices.amounts(),
                    forgets: false,
                };
                let node = node_status::registration(&agent.config, machine, &seen, Timestamp::now());
                api.create(&PostParams::default(), &node).await
            }
            Err(error) => Err(error),
        };
        match result {
            Ok(node) => {
                configure_network(&node, agent).await;
                return node;
            }
            Err(error) => {
                tracing::warn!("cannot register the node: {error}");
                sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

/// The runtime's own conditions, as upstream words them in the Ready condition.
async fn not_ready(agent: &Agent) -> NotReady {
    if agent.config.shutdown.is_down() {
        return Some(shutdown::NODE_MESSAGE.to_owned());
    }
    match agent.cri.status().await {
        Err(status) => Some(format!("container runtime is down: {}", status.message())),
        Ok(conditions) => conditions.iter().find(|c| !c.status).map(|c| match c.r#type.as_str() {
            "NetworkReady" => {
                format!(
                    "container runtime network not ready: NetworkReady=false reason:{} message:{}",
                    c.reason, c.message
                )
            }
            other => format!("container runtime status check may not have completed yet: {other}: {}", c.message),
        }),
    }
}

/// The fifty largest images, as upstream reports them.
async fn list_images(agent: &Agent) -> Vec<(Vec<String>, u64)> {
    let mut images: Vec<_> = match agent.cri.images().await {
        Ok(images) => images
            .into_iter()
            .map(|i| (i.repo_digests.into_iter().chain(i.repo_tags).collect::<Vec<_>>(), i.size))
            .collect(),
        Err(_) => Vec::new(),
    };
    images.retain(|(names, _)| !names.is_empty());
    images.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    images.truncate(50);
    images
}

/// Renews the node's lease; sooner again after a failure. What may run only while it is renewed is told so.
/// <https://kubernetes.io/docs/concepts/architecture/leases/#node-heart-beats>
pub async fn renew_lease(agent: Arc<Agent>, shutdown: CancellationToken) {
    let every = agent.config.lease / 4;
    let looped = async {
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            loop {
                let patience = agent.config.lease_request;
                // What counts is when the request was sent: the node cannot know when it arrived.
                let sent = fence::now();
                let result = tokio::time::timeout(patience, renew_once(&agent)).await;
                let in_time = fence::now().saturating_sub(sent) <= patience;
                let pause = match result {
                    Ok(Ok(true)) if in_time => {
                        agent.fence.renewed(sent);
                        break;
                    }
                    Ok(Ok(true)) | Err(_) => {
                        tracing::warn!("the node's lease could not be renewed within {patience:?}");
                        Duration::ZERO
                    }
                    // Registered in a moment.
                    Ok(Ok(false)) => Duration::from_millis(200),
                    Ok(Err(error)) => {
                        tracing::warn!("cannot renew the node's lease: {error}");
                        (every / 4).min(Duration::from_secs(1))
                    }
                };
                agent.fence.tick();
                sleep(pause).await;
            }
        }
    };
    shutdown.run_until_cancelled(looped).await;
}

/// Renews the lease, or makes it. False if there is no Node yet that it could belong to.
async fn renew_once(agent: &Agent) -> kube::Result<bool> {
    let api: Api<Lease> = Api::namespaced(agent.client.clone(), "kube-node-lease");
    let (name, now) = (&agent.config.node_name, Timestamp::now());
    let patch = serde_json::json!({
        "metadata": {"annotations": {fence::STOPS_WITHIN: agent.fence.promise()}},
        "spec": {
            "renewTime": MicroTime(now), "holderIdentity": name,
            "leaseDurationSeconds": node_status::lease_seconds(&agent.config),
        },
    });
    match api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        other => return other.map(|_| true),
    }
    let nodes: Api<Node> = Api::all(agent.client.clone());
    let Some(node) = nodes.get_opt(name).await? else { return Ok(false) };
    let uid = node.metadata.uid.unwrap_or_default();
    let lease = node_status::lease(&agent.config, &uid, agent.fence.promise(), now);
    api.create(&PostParams::default(), &lease).await.map(|_| true)
}

/// Follows what the API says of our own Node: `None` once it is gone.
async fn follow(agent: Arc<Agent>) {
    let api: Api<Node> = Api::all(agent.client.clone());
    let config = watcher::Config::default().fields(&format!("metadata.name={}", agent.config.node_name));
    let mut events = watcher(api, config).backoff(Backoff::default()).boxed();
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Apply(node) | watcher::Event::InitApply(node)) => {
                agent.node.send_replace(Some(Arc::new(node)));
            }
            Ok(watcher::Event::Delete(_)) => drop(agent.node.send_replace(None)),
            Ok(_) => {}
            Err(error) => tracing::debug!("watch our node: {error}"),
        }
    }
}
