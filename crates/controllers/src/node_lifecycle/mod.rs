//! Node lifecycle: whether nodes are well, by their Leases, their status and the word of other machines; what follows
//! for their conditions, taints and pods (<https://kubernetes.io/docs/concepts/architecture/nodes/>, KEP-589).
//!
//! [`lifecycle`] decides. The pods themselves are deleted by [`crate::taint_eviction`], which sees the taints.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{Namespace, Node, Pod},
};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use parking_lot::Mutex;
use seawall_quorum::timing::Timing;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue, Recorder,
        events::Severity,
        is_not_found,
        objects::{created, is_finished, is_ready, name, namespace, uid},
    },
};

pub mod evidence;
pub mod lifecycle;
pub mod taints;
pub mod zones;

use lifecycle::{CONDITIONS, Lifecycle, NodePlan, Why};
use taints::condition;

/// Where the Leases of nodes are.
pub const LEASES: &str = "kube-node-lease";
/// Nodes, and pods of one node, that are written at the same time.
const AT_ONCE: usize = 16;

/// The times and limits of upstream's flags.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// `--node-monitor-period`.
    pub monitor: Duration,
    /// `--node-monitor-grace-period`.
    pub grace: Duration,
    /// `--node-startup-grace-period`.
    pub startup_grace: Duration,
    /// `--node-eviction-rate`: how many nodes of a zone are emptied per second.
    pub rate: f64,
    /// `--secondary-node-eviction-rate`: how many, when much of a large zone is gone.
    pub secondary_rate: f64,
    /// `--unhealthy-zone-threshold`: which share of a zone is much.
    pub unhealthy_share: f64,
    /// `--large-cluster-size-threshold`: which number of nodes is not large yet.
    pub large_zone: usize,
    /// `--fence-wait`: how long a node's Lease must have been silent before what must not run twice is made anew
    /// elsewhere. Zero: never.
    pub fence_wait: Duration,
}

impl Settings {
    /// These times, and upstream's limits.
    pub fn of(timing: &Timing) -> Settings {
        Settings {
            monitor: timing.node_monitor,
            grace: timing.node_grace,
            startup_grace: timing.node_startup_grace,
            rate: 0.1,
            secondary_rate: 0.01,
            unhealthy_share: 0.55,
            large_zone: 50,
            fence_wait: timing.fence_wait,
        }
    }
}

/// There is one key: all nodes are looked at together.
fn key() -> Key {
    Key::new("", "nodes")
}

pub(crate) struct NodeLifecycle {
    context: Arc<Context>,
    recorder: Recorder,
    lifecycle: Arc<Mutex<Lifecycle>>,
}

/// What makes it worth while to look before the next period: not a heartbeat.
fn matters(old: &Node, new: &Node) -> bool {
    let conditions = |node: &Node| -> Vec<Option<String>> {
        ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable"]
            .map(|type_| condition(node, type_).map(|c| c.status.clone()))
            .into()
    };
    old.spec != new.spec || conditions(old) != conditions(new)
}

impl NodeLifecycle {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        queue.add(key());
        let lifecycle = Arc::new(Mutex::new(Lifecycle::new(context.config.node_lifecycle, Instant::now())));
        let (q, state) = (queue.clone(), lifecycle.clone());
        let recorder = context.recorder.as_source("node-controller");
        let events = recorder.clone();
        context.caches.nodes.on_change(move |old, new| {
            match (old, new) {
                (_, Some(node)) => state.lock().node(node, Instant::now()),
                (Some(node), None) => state.lock().gone(name(&**node)),
                (None, None) => {}
            }
            if let (Some(node), None) | (None, Some(node)) = (old, new) {
                let (reason, what) = match new {
                    Some(_) => ("RegisteredNode", "Registered Node {} in Controller"),
                    None => ("RemovingNode", "Removing Node {} from Controller"),
                };
                let what = what.replace("{}", name(&**node));
                let message = format!("Node {} event: {what}", name(&**node));
                events.record(&**node, Severity::Normal, reason, message);
            }
            if let (Some(old), Some(new)) = (old, new)
                && !matters(old, new)
            {
                return;
            }
            q.add(key());
        });
        let state = lifecycle.clone();
        context.caches.leases.on_change(move |_, new| {
            if let Some(lease) = new {
                state.lock().lease(lease, Instant::now());
            }
        });
        (Arc::new(NodeLifecycle { context, recorder, lifecycle }), queue)
    }

    /// Whether the store answers: only then does anybody's silence count.
    async fn store_answers(&self) -> bool {
        let patience = self.context.config.node_lifecycle.monitor.max(Duration::from_secs(1));
        let api: Api<Namespace> = Api::all(self.context.client.clone());
        // With no resource version it is the newest state that is asked for.
        matches!(timeout(patience, api.get_metadata_opt(LEASES)).await, Ok(Ok(_)))
    }

    /// Whether a node's Lease is really as old as it looks from here.
    async fn is_silent(&self, node: &str) -> anyhow::Result<bool> {
        let lease = self.context.api::<Lease>(LEASES).get_opt(node).await?;
        Ok(lease.is_none_or(|lease| !self.lifecycle.lock().lease(&lease, Instant::now())))
    }

    async fn carry_out(&self, plan: &NodePlan) -> anyhow::Result<()> {
        let cache = &self.context.caches.nodes;
        let Some(mut node) = cache.get(&Key::new("", &plan.name)) else { return Ok(()) };
        let api: Api<Node> = Api::all(self.context.client.clone());
        if let Some(why) = plan.unknown {
            if why == Why::Silence && !self.is_silent(&plan.name).await? {
                return Ok(());
            }
            tracing::warn!(node = plan.name, ?why, "a node is not heard of");
            let patch = Patch::Strategic(unknown(&node, Timestamp::now()));
            let patched = api.patch_status(&plan.name, &PatchParams::default(), &patch).await?;
            let message = format!("Node {} status is now: NodeNotReady", plan.name);
            self.recorder.record(&*node, Severity::Normal, "NodeNotReady", message);
            cache.note(patched.clone());
            node = Arc::new(patched);
        }
        let taint = async {
            if let Some(taints) = taints::wanted(&node, plan.leave, Timestamp::now()) {
                let version = &node.metadata.resource_version;
                let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}});
                cache.note(api.patch(&plan.name, &PatchParams::default(), &Patch::Merge(patch)).await?);
            }
            anyhow::Ok(())
        };
        let pods = async {
            if plan.pods {
                self.mark_pods(&plan.name).await?;
                self.lifecycle.lock().pods_marked(&plan.name);
            }
            anyhow::Ok(())
        };
        let (taint, pods) = tokio::join!(taint, pods);
        taint.and(pods)
    }

    /// The pods of a node are no longer ready, so that nobody is sent there. Its kubelet, if it lives, says otherwise.
    async fn mark_pods(&self, node: &str) -> anyhow::Result<()> {
        let cache = &self.context.caches.pods;
        let pods = cache.all();
        let concerned = pods.iter().filter(|pod| {
            let on = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
            on == Some(node) && is_ready(pod) && !is_finished(pod)
        });
        let marks = concerned.map(|pod| async move {
            let patch = json!({"metadata": {"uid": uid(&**pod)}, "status": {"conditions": [{
                "type": "Ready", "status": "False", "reason": "NodeNotReady", "message": "Node is not ready",
                "lastTransitionTime": Timestamp::now().to_string(),
            }]}});
            let api = self.context.api::<Pod>(namespace(&**pod));
            match api.patch_status(name(&**pod), &PatchParams::default(), &Patch::Strategic(patch)).await {
                Ok(patched) => {
                    cache.note(patched);
                    self.recorder.record(&**pod, Severity::Warning, "NodeNotReady", "Node is not ready");
                    Ok(())
                }
                Err(error) if is_not_found(&error) => Ok(()),
                Err(kube::Error::Api(status)) if status.is_conflict() => Ok(()),
                Err(error) => Err(error),
            }
        });
        let marks: Vec<_> = marks.collect();
        let results: Vec<kube::Result<()>> = stream::iter(marks).buffer_unordered(AT_ONCE).collect().await;
        results.into_iter().collect::<kube::Result<()>>()?;
        Ok(())
    }
}

/// The patch with which a node's conditions become unknown, if it is still as it was seen. The words are upstream's.
fn unknown(node: &Node, now: Timestamp) -> Value {
    let conditions: Vec<Value> = CONDITIONS
        .iter()
        .filter_map(|type_| match condition(node, type_) {
            Some(found) if found.status == "Unknown" => None,
            Some(_) => Some(json!({
                "type": type_, "status": "Unknown", "reason": "NodeStatusUnknown",
                "message": "Kubelet stopped posting node status.", "lastTransitionTime": now.to_string(),
            })),
            None => Some(json!({
                "type": type_, "status": "Unknown", "reason": "NodeStatusNeverUpdated",
                "message": "Kubelet never posted node status.", "lastTransitionTime": now.to_string(),
                "lastHeartbeatTime": created(node).to_string(),
            })),
        })
        .collect();
    json!({"metadata": {"resourceVersion": node.metadata.resource_version}, "status": {"conditions": conditions}})
}

#[async_trait]
impl Controller for NodeLifecycle {
    fn name(&self) -> &'static str {
        "nodelifecycle"
    }

    async fn ready(&self) {
        self.context.caches.nodes.synced().await;
        self.context.caches.leases.synced().await;
        self.context.caches.pods.synced().await;
        // What was there before we looked has been silent for no longer than we have been looking.
        self.lifecycle.lock().answered(Instant::now());
    }

    async fn reconcile(&self, _: &Key) -> anyhow::Result<Option<Duration>> {
        let period = self.context.config.node_lifecycle.monitor;
        let must_ask = self.lifecycle.lock().must_ask(Instant::now());
        if must_ask {
            if !self.store_answers().await {
                tracing::debug!("the store does not answer: nobody's silence counts");
                return Ok(Some(period));
            }
            self.lifecycle.lock().answered(Instant::now());
        }
        let evidence = self.context.config.evidence.as_ref().map(|evidence| evidence.borrow().clone());
        let nodes = self.context.caches.nodes.all();
        let plans = {
            let mut lifecycle = self.lifecycle.lock();
            let now = Instant::now();
            if let Some(evidence) = evidence {
                lifecycle.evidence(&evidence, now);
            }
            lifecycle.plan(&nodes, now)
        };
        let acts = |plan: &NodePlan, node: &Node| {
            plan.unknown.is_some() || plan.pods || taints::wanted(node, plan.leave, Timestamp::UNIX_EPOCH).is_some()
        };
        // A plan has the nodes in the order in which it was given them.
        let due = plans.iter().zip(&nodes).filter(|(plan, node)| acts(plan, node)).map(|(plan, _)| plan);
        let work: Vec<_> = due.map(|plan| async move { (plan, self.carry_out(plan).await) }).collect();
        let mut failed = false;
        for (plan, result) in stream::iter(work).buffer_unordered(AT_ONCE).collect::<Vec<_>>().await {
            if let Err(error) = result {
                failed = true;
                tracing::debug!(
                    node = plan.name,
                    error = format!("{error:#}"),
                    "a node was not dealt with, will try again"
                );
            }
        }
        Ok(Some(if failed { period.min(RETRY) } else { period }))
    }
}

/// What failed is tried again after this long: mostly somebody else has changed the node meanwhile.
const RETRY: Duration = Duration::from_millis(100);

/// Looks at once when other machines have something to say.
pub(crate) async fn follow(context: Arc<Context>, queue: Arc<Queue>, shutdown: CancellationToken) {
    let Some(mut evidence) = context.config.evidence.clone() else { return };
    while let Some(Ok(())) = shutdown.run_until_cancelled(evidence.changed()).await {
        queue.add(key());
    }
}
