//! Pod garbage collection: pods whose node is gone, terminated pods beyond the threshold, pods that are being deleted but
//! were never bound (<https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-garbage-collection>), and pods
//! that are being deleted on a node of which somebody says that it is off for good (KEP-2268).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, api::DeleteParams};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    context::{Context, sooner},
    node_lifecycle::taints::{NO_EXECUTE, NO_SCHEDULE, OUT_OF_SERVICE, condition, is_tainted},
    runtime::{
        Controller, Key, Queue,
        objects::{created, is_deleting, is_finished, name, namespace, uid},
    },
};

/// How often everything is looked at.
const PERIOD: Duration = Duration::from_secs(20);
/// Many changes are looked at together.
const GATHER: Duration = Duration::from_millis(200);
/// A node must have been missing for so long: it may only be registering again.
const QUARANTINE: Duration = Duration::from_secs(40);
/// Pods collected at the same time.
const AT_ONCE: usize = 8;

/// Why a pod is collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Too many have ended, and this is among those that were made first.
    Terminated,
    /// Its node is no more.
    Orphaned,
    /// It is being deleted and no kubelet will ever finish that.
    Unscheduled,
    /// It is being deleted, and its node is out of service.
    OutOfService,
}

/// What to do about all pods.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// The uids of the pods to collect.
    pub collect: Vec<(String, Why)>,
    /// Nodes that pods are bound to and that are missing, and since when.
    pub missing: BTreeMap<String, Instant>,
    /// When the next quarantine ends.
    pub again: Option<Duration>,
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

/// Decides. Of each node is known whether it is out of service. `missing` is what the last plan said; `threshold` is how many terminated pods may stay, 0 for all.
pub fn plan(
    pods: &[Arc<Pod>],
    nodes: &BTreeMap<String, bool>,
    missing: &BTreeMap<String, Instant>,
    threshold: usize,
    now: Instant,
) -> Plan {
    let mut plan = Plan::default();
    let mut ended: Vec<&Arc<Pod>> = pods.iter().filter(|pod| is_finished(pod) && !is_deleting(&***pod)).collect();
    if threshold > 0 && ended.len() > threshold {
        ended.sort_by_key(|pod| (created(&***pod), name(&***pod).to_owned()));
        let surplus = ended.len() - threshold;
        plan.collect.extend(ended.iter().take(surplus).map(|pod| (uid(&***pod).to_owned(), Why::Terminated)));
    }
    for pod in pods {
        match node_of(pod) {
            None if is_deleting(&**pod) => plan.collect.push((uid(&**pod).to_owned(), Why::Unscheduled)),
            Some(node) if nodes.get(node) == Some(&true) && is_deleting(&**pod) => {
                plan.collect.retain(|(collected, _)| collected != uid(&**pod));
                plan.collect.push((uid(&**pod).to_owned(), Why::OutOfService));
            }
            Some(node) if !nodes.contains_key(node) => {
                let since = *missing.get(node).unwrap_or(&now);
                plan.missing.insert(node.to_owned(), since);
                match (since + QUARANTINE).saturating_duration_since(now) {
                    Duration::ZERO => {
                        plan.collect.retain(|(collected, _)| collected != uid(&**pod));
                        plan.collect.push((uid(&**pod).to_owned(), Why::Orphaned));
                    }
                    left => plan.again = sooner(plan.again, Some(left)),
                }
            }
            _ => {}
        }
    }
    plan
}

/// Whether a node is off for good: somebody says so, and it says nothing else.
fn is_off(node: &Node) -> bool {
    let said = [NO_EXECUTE, NO_SCHEDULE].iter().any(|effect| is_tainted(node, OUT_OF_SERVICE, effect));
    said && condition(node, "Ready").is_none_or(|ready| ready.status != "True")
}

pub(crate) struct PodGc {
    context: Arc<Context>,
    missing: Mutex<BTreeMap<String, Instant>>,
}

impl PodGc {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        // There is one key: all pods are looked at together.
        let key = Key::new("", "pods");
        queue.add(key.clone());
        let (q, k) = (queue.clone(), key.clone());
        context.caches.nodes.on_change(move |old, new| {
            let off = |node: Option<&Arc<Node>>| node.is_some_and(|node| is_off(node));
            if new.is_none() || off(new) && !off(old) {
                q.add(k.clone());
            }
        });
        let (q, nodes) = (queue.clone(), context.caches.nodes.clone());
        context.caches.pods.on_change(move |_, new| {
            let ends_here = |pod: &Arc<Pod>| {
                let node = node_of(pod).map(|node| nodes.get(&Key::new("", node)));
                is_deleting(&**pod) && node.is_none_or(|node| node.is_some_and(|node| is_off(&node)))
            };
            if new.is_some_and(ends_here) {
                q.add_after(key.clone(), GATHER);
            }
        });
        (Arc::new(PodGc { context, missing: Mutex::default() }), queue)
    }

    /// Fails a pod if it has not ended, since nobody else will report on it, and removes it at once.
    async fn collect(&self, pod: &Arc<Pod>, why: Why) -> kube::Result<()> {
        let cache = &self.context.caches.pods;
        if !is_finished(pod) {
            // Upstream's words (KEP-3329).
            let gone = ("DeletionByPodGC", "PodGC: node no longer exists");
            self.context.disrupt(pod, true, (why == Why::Orphaned).then_some(gone)).await?;
        }
        tracing::info!(namespace = namespace(&**pod), pod = name(&**pod), ?why, "a pod is collected");
        self.context.delete(cache, &**pod, DeleteParams::default().grace_period(0)).await
    }
}

#[async_trait]
impl Controller for PodGc {
    fn name(&self) -> &'static str {
        "podgc"
    }

    async fn ready(&self) {
        self.context.caches.pods.synced().await;
        self.context.caches.nodes.synced().await;
    }

    async fn reconcile(&self, _: &Key) -> anyhow::Result<Option<Duration>> {
        let pods = self.context.caches.pods.all();
        let nodes = self.context.caches.nodes.all();
        let nodes = nodes.iter().map(|node| (name(&**node).to_owned(), is_off(node))).collect();
        let plan = {
            let mut missing = self.missing.lock();
            let plan = plan(&pods, &nodes, &missing, self.context.config.terminated_pods, Instant::now());
            missing.clone_from(&plan.missing);
            plan
        };
        // The cache may be behind: whether a node is really gone, the API server says.
        let mut absent: BTreeMap<&str, bool> = BTreeMap::new();
        let mut collect = Vec::new();
        for (id, why) in &plan.collect {
            let Some(pod) = pods.iter().find(|pod| uid(&***pod) == id) else { continue };
            if let (Why::Orphaned, Some(node)) = (why, node_of(pod)) {
                if !absent.contains_key(node) {
                    let api: Api<Node> = Api::all(self.context.client.clone());
                    absent.insert(node, api.get_opt(node).await?.is_none());
                }
                if absent.get(node) != Some(&true) {
                    continue;
                }
            }
            collect.push(self.collect(pod, *why));
        }
        // One that fails must not hold up the others.
        let results: Vec<_> = stream::iter(collect).buffer_unordered(AT_ONCE).collect().await;
        for error in results.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "a pod could not be collected, will try again");
        }
        Ok(Some(plan.again.unwrap_or(PERIOD).min(PERIOD)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(id: &str, node: &str, phase: &str, deleting: bool, day: u8) -> Arc<Pod> {
        let mut meta = json!({"name": id, "uid": id, "creationTimestamp": format!("2026-01-{day:02}T00:00:00Z")});
        if deleting {
            meta["deletionTimestamp"] = "2026-02-01T00:00:00Z".into();
        }
        let node = if node.is_empty() { Value::Null } else { node.into() };
        let pod = json!({"metadata": meta, "spec": {"nodeName": node, "containers": []}, "status": {"phase": phase}});
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn decides() {
        let now = Instant::now() + Duration::from_secs(1000);
        let check = |pods: &[Arc<Pod>], absent: u64, threshold: usize, expect: &[(&str, Why)], why: &str| {
            let missing = BTreeMap::from([("gone".to_owned(), now - Duration::from_secs(absent))]);
            let nodes = BTreeMap::from([("n".to_owned(), false), ("off".to_owned(), true)]);
            let made = plan(pods, &nodes, &missing, threshold, now);
            let collected: Vec<(&str, Why)> = made.collect.iter().map(|(id, why)| (id.as_str(), *why)).collect();
            assert_eq!(collected, expect, "{why}");
            made
        };
        check(&[pod("a", "n", "Running", false, 1)], 0, 1, &[], "all is well");
        check(&[pod("a", "n", "Running", true, 1)], 0, 1, &[], "its kubelet does that");
        check(&[pod("a", "", "Pending", false, 1)], 0, 1, &[], "it will be scheduled");
        check(&[pod("a", "", "Pending", true, 1)], 0, 1, &[("a", Why::Unscheduled)], "nobody else will");
        check(&[pod("a", "off", "Running", false, 1)], 0, 1, &[], "it may yet be evicted");
        check(&[pod("a", "off", "Running", true, 1)], 0, 1, &[("a", Why::OutOfService)], "somebody said so");
        let orphan = [pod("a", "gone", "Running", false, 1), pod("b", "gone", "Running", true, 1)];
        let waiting = check(&orphan, 30, 1, &[], "in quarantine");
        assert_eq!(waiting.again, Some(Duration::from_secs(10)));
        check(&orphan, 40, 1, &[("a", Why::Orphaned), ("b", Why::Orphaned)], "after it");
        let fresh = check(&[pod("a", "new", "Running", false, 1)], 1000, 1, &[], "another node's time does not count");
        assert_eq!(fresh.missing, BTreeMap::from([("new".to_owned(), now)]), "and what is back is forgotten");
        let ended = [
            pod("young", "n", "Failed", false, 3),
            pod("old", "n", "Succeeded", false, 1),
            pod("middle", "n", "Succeeded", false, 2),
            pod("going", "n", "Succeeded", true, 1),
        ];
        check(&ended, 0, 1, &[("old", Why::Terminated), ("middle", Why::Terminated)], "the oldest go");
        check(&ended, 0, 3, &[], "as many as may stay");
        check(&ended, 0, 0, &[], "no limit");
        let both = [pod("a", "gone", "Failed", false, 1), pod("b", "n", "Failed", false, 2)];
        check(&both, 50, 1, &[("a", Why::Orphaned)], "once is enough");
    }
}
