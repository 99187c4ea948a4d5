//! DaemonSet: one pod on every node that wants one.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::future::join_all;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Node, Pod},
};
use kube::api::DeleteParams;
use parking_lot::Mutex;

use crate::{
    context::Context,
    replica_set::{create_each, delete_pod},
    runtime::{
        Controller, Key, Queue, Recorder,
        events::Severity,
        follow_owned,
        objects::{controller_of, is_deleting, name, namespace, selects, selects_everything, uid},
    },
};

mod node;
mod plan;

pub use node::{Fit, fit};
pub use plan::{Backoff, Input, Plan, Why, plan};

pub(crate) struct DaemonSets {
    context: Arc<Context>,
    recorder: Recorder,
    /// By the uid of the set and its generation: a change of the set is a new try.
    failures: Mutex<HashMap<(String, i64), Backoff>>,
}

impl DaemonSets {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let caches = &context.caches;
        let q = queue.clone();
        caches.daemon_sets.on_change(move |old, new| {
            if let Some(set) = new.or(old) {
                q.add(Key::of(&**set));
            }
        });
        follow_owned(
            &caches.pods,
            &caches.daemon_sets,
            "DaemonSet",
            |set, pod| selects(Some(&set.spec.selector), pod.metadata.labels.as_ref()),
            &queue,
        );
        let (q, sets) = (queue.clone(), caches.daemon_sets.clone());
        caches.nodes.on_change(move |old, new| {
            // What decides about pods; a node's heartbeat does not.
            let place = |node: Option<&Arc<Node>>| {
                node.map(|node| (node.metadata.labels.clone(), node.spec.as_ref().and_then(|s| s.taints.clone())))
            };
            if place(old) != place(new) {
                sets.all().iter().for_each(|set| q.add(Key::of(&**set)));
            }
        });
        let q = queue.clone();
        caches.revisions.on_change(move |old, new| {
            let Some(gone) = old.filter(|_| new.is_none()) else { return };
            let owner = controller_of(&**gone).filter(|owner| owner.kind == "DaemonSet");
            if let Some(owner) = owner {
                q.add(Key::new(namespace(&**gone), &owner.name));
            }
        });
        let recorder = context.recorder.as_source("daemonset-controller");
        (Arc::new(DaemonSets { context, recorder, failures: Mutex::default() }), queue)
    }

    /// Plans with what is remembered of failures.
    fn plan(&self, input: &Input<'_>) -> Plan {
        let key = (uid(input.set).to_owned(), input.set.metadata.generation.unwrap_or(0));
        let mut failures = self.failures.lock();
        failures.retain(|(of, generation), _| *of != key.0 || *generation == key.1);
        plan(input, failures.entry(key).or_default())
    }

    fn tell(&self, set: &DaemonSet, pod: &Pod, why: Why) {
        let (pod, node) =
            (format!("{}/{}", namespace(pod), name(pod)), node::target(pod).unwrap_or_default().to_owned());
        let (severity, reason, message) = match why {
            Why::Failed => (Severity::Warning, "FailedDaemonPod", "Found failed daemon pod"),
            Why::Ended => (Severity::Normal, "SucceededDaemonPod", "Found succeeded daemon pod"),
            Why::Surplus | Why::Outdated => return,
        };
        let end = if why == Why::Failed { "will try to kill it" } else { "will try to delete it" };
        self.recorder.record(set, severity, reason, format!("{message} {pod} on node {node}, {end}"));
    }

    /// Does what was planned.
    async fn apply(&self, set: &DaemonSet, hash: &str, plan: &Plan) -> anyhow::Result<()> {
        let pods: Vec<Pod> = plan.create.iter().map(|node| node::make(set, hash, node)).collect();
        let created = create_each(&self.context, set, &pods).await;
        let deletions = plan.delete.iter().map(|(pod, why)| {
            self.tell(set, pod, *why);
            delete_pod(&self.context, set, pod)
        });
        let deleted: Result<(), _> = join_all(deletions).await.into_iter().collect();
        created.and(deleted).map_err(Into::into)
    }
}

#[async_trait]
impl Controller for DaemonSets {
    fn name(&self) -> &'static str {
        "daemonset"
    }

    async fn ready(&self) {
        let caches = &self.context.caches;
        caches.daemon_sets.synced().await;
        caches.pods.synced().await;
        caches.nodes.synced().await;
        caches.revisions.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        let Some(set) = caches.daemon_sets.get(key) else {
            let there = caches.daemon_sets.all();
            self.failures.lock().retain(|(of, _), _| there.iter().any(|set| uid(&**set) == of));
            return Ok(None);
        };
        if is_deleting(&*set) {
            return Ok(None);
        }
        if selects_everything(&set.spec.selector) {
            let message = "This daemon set is selecting all pods. A non-empty selector is required.";
            self.recorder.record(&*set, Severity::Warning, "SelectingAll", message);
            return Ok(None);
        }
        let pods = self.context.claim_pods(&*set, &set.spec.selector, |_| true, |_, _, _| {}).await?;
        let revisions = self.context.revisions(&*set).await?;
        let current = self.context.newest_revision(&caches.daemon_sets, &*set, &revisions).await?;
        let Some(current) = current else { return Ok(None) };
        let (nodes, now) = (caches.nodes.all(), self.context.now());
        let plan = self.plan(&Input { set: &set, nodes: &nodes, pods: &pods, current: &current, now });
        let applied = self.apply(&set, plan::hash_of(&current), &plan).await;
        // The status tells of what was seen before; the next pass follows at once.
        if set.status.as_ref() != Some(&plan.status) {
            let mut updated = (*set).clone();
            updated.status = Some(plan.status.clone());
            self.context.replace_status(&caches.daemon_sets, &updated).await?;
        }
        applied?;
        for old in plan::surplus(&set, &revisions, &current, &pods) {
            self.context.delete(&caches.revisions, &*old, DeleteParams::default()).await?;
        }
        Ok(plan.again)
    }
}

#[cfg(test)]
mod simulated;
#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
