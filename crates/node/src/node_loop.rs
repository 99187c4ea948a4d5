//! The Node object and its lease, kept alive.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::{coordination::v1::Lease, core::v1::Node},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use tokio::time::{Instant, MissedTickBehavior, sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    Agent, cni,
    events::Kind,
    node_status::{self, Machine, NotReady, Pressure},
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
        loop {
            let api: Api<Node> = Api::all(agent.client.clone());
            if !network_configured(&node, &agent) {
                match api.get_opt(&agent.config.node_name).await {
                    Ok(Some(fresh)) => node = fresh,
                    Ok(None) => node = register(&agent, &machine).await,
                    Err(error) => tracing::debug!("get our node: {error}"),
                }
                configure_network(&node, &agent);
            }
            let why = not_ready(&agent).await;
            let ready = why.is_none() && agent.services.synced();
            agent.ready.send_if_modified(|r| std::mem::replace(r, ready) != ready);
            if images.1.is_empty() || images.0.elapsed() > Duration::from_secs(60) {
                images = (Instant::now(), list_images(&agent).await);
            }
            let pressure = Pressure::measure(&agent.config.data_dir);
            let status =
                node_status::status(&node, &agent.config, &machine, pressure, &why, &images.1, Timestamp::now());
            let changed = node.status.as_ref().is_none_or(|old| node_status::differs(old, &status));
            if changed || written.elapsed() >= HEARTBEAT {
                let patch = serde_json::json!({"status": status});
                match api.patch_status(&agent.config.node_name, &PatchParams::default(), &Patch::Strategic(patch)).await
                {
                    Ok(fresh) => {
                        node = fresh;
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
            // The pod range may change hands only while there is none; after that the node is looked at rarely.
            sleep(if ready { LOOK } else { LOOK_SOON }).await;
        }
    };
    shutdown.run_until_cancelled(Box::pin(looped)).await;
}

fn network_configured(node: &Node, agent: &Agent) -> bool {
    let has_range = node.spec.as_ref().is_some_and(|s| s.pod_cidr.as_ref().is_some_and(|c| !c.is_empty()));
    agent.config.cni_conf_dir.is_some()
        || has_range && agent.config.containerd().cni_conf.join("10-seawall.conflist").exists()
}

fn configure_network(node: &Node, agent: &Agent) {
    let Some(spec) = &node.spec else { return };
    let texts = spec.pod_cidrs.clone().filter(|c| !c.is_empty()).or_else(|| spec.pod_cidr.clone().map(|c| vec![c]));
    let ranges: Vec<ipnet::IpNet> = texts.into_iter().flatten().filter_map(|t| t.parse().ok()).collect();
    if ranges.is_empty() || agent.config.cni_conf_dir.is_some() {
        return;
    }
    let state = agent.config.run_dir.join("cni/state");
    if let Err(error) = cni::write(&agent.config.containerd().cni_conf, &ranges, &state) {
        tracing::error!("cannot write the CNI configuration: {error}");
    }
}

/// Creates the node, or takes over the one that is there: with our labels, and everyone else's.
async fn register(agent: &Agent, machine: &Machine) -> Node {
    let api: Api<Node> = Api::all(agent.client.clone());
    loop {
        let pressure = Pressure::measure(&agent.config.data_dir);
        let result = match api.get_opt(&agent.config.node_name).await {
            Ok(Some(node)) => match node_status::label_patch(&node, &agent.config) {
                Some(patch) => api.patch(&agent.config.node_name, &PatchParams::default(), &Patch::Merge(&patch)).await,
                None => Ok(node),
            },
            Ok(None) => {
                let why = not_ready(agent).await;
                let node = node_status::registration(&agent.config, machine, pressure, &why, Timestamp::now());
                api.create(&PostParams::default(), &node).await
            }
            Err(error) => Err(error),
        };
        match result {
            Ok(node) => {
                configure_network(&node, agent);
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

/// Renews the node's lease every 10 s; sooner again after a failure.
/// <https://kubernetes.io/docs/concepts/architecture/leases/#node-heart-beats>
pub async fn renew_lease(agent: Arc<Agent>, shutdown: CancellationToken) {
    let api: Api<Lease> = Api::namespaced(agent.client.clone(), "kube-node-lease");
    let nodes: Api<Node> = Api::all(agent.client.clone());
    let name = agent.config.node_name.clone();
    let looped = async {
        let mut tick =
            tokio::time::interval(Duration::from_secs(u64::from(node_status::LEASE_SECONDS.unsigned_abs()) / 4));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            loop {
                let now = Timestamp::now();
                let patch = serde_json::json!({"spec": {"renewTime": MicroTime(now), "holderIdentity": name}});
                let result = match api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                    Err(kube::Error::Api(status)) if status.code == 404 => match nodes.get_opt(&name).await {
                        Ok(Some(node)) => {
                            let uid = node.metadata.uid.unwrap_or_default();
                            api.create(&PostParams::default(), &node_status::lease(&agent.config, &uid, now))
                                .await
                                .map(drop)
                        }
                        // Registered in a moment.
                        Ok(None) => {
                            sleep(Duration::from_millis(200)).await;
                            continue;
                        }
                        Err(error) => Err(error),
                    },
                    other => other.map(drop),
                };
                match result {
                    Ok(()) => break,
                    Err(error) => {
                        tracing::warn!("cannot renew the node's lease: {error}");
                        sleep(Duration::from_secs(1)).await;
                    }
                }
            }
        }
    };
    shutdown.run_until_cancelled(looped).await;
}
