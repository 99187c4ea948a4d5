//! Fencing: pods that must not run twice, on a node that nobody hears of, are made anew elsewhere once that node must have
//! stopped them. Kubernetes leaves this to a human and the `out-of-service` taint (KEP-2268).
//!
//! The promise comes from the node: each renewal of its Lease says within which time after it, by the node's own clock,
//! such pods have stopped if no further renewal succeeds. It is kept by the node itself, whatever hangs there. Here we
//! wait longer than that, by our own clock, from when we saw the Lease change.
//!
//! **Why no pod can run twice.** The pod is read first, then the Lease, newest state, and then the pod is deleted if it is
//! still as it was read. A node that has stopped its pods starts none of them again before it has written to each one,
//! after a renewal that succeeded. If that write came before our deletion, the deletion fails, or we had read the pod
//! after it, and then the Lease that we read after the pod was a renewed one. If it comes after, the pod is gone.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{Node, PersistentVolumeClaim, Pod},
};
use kube::api::{DeleteParams, Preconditions};
use parking_lot::Mutex;
use seawall_quorum::fence::{self, Heard};
use tokio::time::Instant;

use crate::{
    context::{Context, sooner},
    node_lifecycle::{
        LEASES,
        taints::{NO_EXECUTE, UNREACHABLE, condition, is_tainted},
    },
    runtime::{
        Controller, Key, Queue, Recorder,
        events::Severity,
        is_not_found,
        objects::{annotation, controller_of, is_deleting, is_finished, name, namespace, uid},
    },
};

/// An annotation of a node's Lease: within so many milliseconds after this renewal the node has stopped what must not run
/// twice, unless it renews again.
pub const STOPS_WITHIN: &str = "seawall.dev/stops-within-ms";

/// Whether a pod must not run twice: a StatefulSet's, or one with a volume that only one node may write to.
pub fn must_not_run_twice(pod: &Pod, claim: impl Fn(&str) -> Option<Arc<PersistentVolumeClaim>>) -> bool {
    if controller_of(pod).is_some_and(|owner| owner.kind == "StatefulSet") {
        return true;
    }
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let mut claims = volumes.filter_map(|volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(source), _) => Some(source.claim_name.clone()),
        (None, Some(_)) => Some(format!("{}-{}", name(pod), volume.name)),
        (None, None) => None,
    });
    claims.any(|name| {
        let modes = claim(&name).and_then(|claim| claim.spec.as_ref()?.access_modes.clone());
        modes.iter().flatten().any(|mode| mode == "ReadWriteOnce" || mode == "ReadWriteOncePod")
    })
}

/// What to do about one pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing, until something changes.
    Leave,
    /// Nothing yet.
    Wait(Duration),
    /// It goes at once, if its node's Lease is really as old as it looks.
    Force,
}

/// Decides about a pod that must not run twice. `silent` is how long its node's Lease has been as it is, `wait` what the
/// operator chose.
pub fn decide(pod: &Pod, node: &Node, lease: Option<&Lease>, silent: Option<Duration>, wait: Duration) -> Decision {
    let lost = condition(node, "Ready").is_some_and(|ready| ready.status == "Unknown")
        && is_tainted(node, UNREACHABLE, NO_EXECUTE);
    if wait.is_zero() || !is_deleting(pod) || is_finished(pod) || !lost {
        return Decision::Leave;
    }
    // A node that promises nothing, or not soon enough, is not one that stops its pods.
    let promise = lease.and_then(|lease| annotation(lease, STOPS_WITHIN)?.parse().ok()).map(Duration::from_millis);
    let (Some(promise), Some(silent)) = (promise, silent) else { return Decision::Leave };
    match fence::wait(wait, promise).saturating_sub(silent) {
        Duration::ZERO => Decision::Force,
        left => Decision::Wait(left),
    }
}

pub(crate) struct Fencing {
    context: Arc<Context>,
    recorder: Recorder,
    heard: Arc<Mutex<Heard>>,
    /// What its times count from.
    start: Instant,
}

fn node_of(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

fn version(lease: &Lease) -> &str {
    lease.metadata.resource_version.as_deref().unwrap_or_default()
}

impl Fencing {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let (heard, start) = (Arc::new(Mutex::new(Heard::default())), Instant::now());
        let seen = heard.clone();
        context.caches.leases.on_change(move |old, new| match (old, new) {
            (_, Some(lease)) => drop(seen.lock().see(name(&**lease), version(lease), start.elapsed())),
            (Some(lease), None) => seen.lock().forget(name(&**lease)),
            (None, None) => {}
        });
        if !context.config.node_lifecycle.fence_wait.is_zero() {
            let (q, nodes) = (queue.clone(), context.caches.nodes.clone());
            context.caches.pods.on_change(move |_, new| {
                // On a node that is well, its agent sees to the end of its pods.
                let Some(pod) = new.filter(|pod| is_deleting(&***pod)) else { return };
                let key = Key::new("", node_of(pod));
                if nodes.get(&key).is_some_and(|node| is_tainted(&node, UNREACHABLE, NO_EXECUTE)) {
                    q.add(key);
                }
            });
            let q = queue.clone();
            context.caches.nodes.on_change(move |old, new| {
                let lost =
                    |node: Option<&Arc<Node>>| node.is_some_and(|node| is_tainted(node, UNREACHABLE, NO_EXECUTE));
                if let Some(node) = new.filter(|_| lost(new) && !lost(old)) {
                    q.add(Key::of(&**node));
                }
            });
        }
        let recorder = context.recorder.as_source("fencing-controller");
        (Arc::new(Fencing { context, recorder, heard, start }), queue)
    }

    /// Asks for the newest state of a node's Lease, and whether it is the one that has been silent for so long.
    async fn is_silent(&self, node: &str) -> anyhow::Result<bool> {
        let Some(lease) = self.context.api::<Lease>(LEASES).get_opt(node).await? else { return Ok(false) };
        Ok(self.heard.lock().see(node, version(&lease), self.start.elapsed()))
    }

    /// Removes exactly this state of this pod, at once.
    async fn force(&self, pod: &Pod, silent: Duration) -> anyhow::Result<()> {
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: pod.metadata.uid.clone(),
                resource_version: pod.metadata.resource_version.clone(),
            }),
            ..DeleteParams::default()
        };
        let cache = &self.context.caches.pods;
        match self.context.api::<Pod>(namespace(pod)).delete(name(pod), &params).await {
            Ok(_) => cache.note_gone(pod),
            Err(error) if is_not_found(&error) => cache.note_gone(pod),
            Err(error) => return Err(error.into()),
        }
        let node = node_of(pod);
        let message = format!(
            "Removed without the word of node {node}, whose Lease has not been renewed for {silent:.1?}: it has stopped the pod"
        );
        tracing::warn!(
            namespace = namespace(pod),
            pod = name(pod),
            uid = uid(pod),
            node,
            ?silent,
            "a pod is fenced off"
        );
        self.recorder.record(pod, Severity::Warning, "FencedOff", message);
        Ok(())
    }
}

#[async_trait]
impl Controller for Fencing {
    fn name(&self) -> &'static str {
        "fencing"
    }

    async fn ready(&self) {
        let caches = &self.context.caches;
        caches.pods.synced().await;
        caches.nodes.synced().await;
        caches.leases.synced().await;
        caches.claims.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let (caches, wait) = (&self.context.caches, self.context.config.node_lifecycle.fence_wait);
        let Some(node) = caches.nodes.get(key) else { return Ok(None) };
        let lease = caches.leases.get(&Key::new(LEASES, &key.name));
        let silent = self.heard.lock().silent(&key.name, self.start.elapsed());
        let mut again = None;
        let mut force = Vec::new();
        // The pods as they are read here are those that are deleted below.
        for pod in caches.pods.all().into_iter().filter(|pod| node_of(pod) == key.name && is_deleting(&**pod)) {
            match decide(&pod, &node, lease.as_deref(), silent, wait) {
                Decision::Leave => {}
                Decision::Wait(left) => again = sooner(again, Some(left)),
                Decision::Force => {
                    if must_not_run_twice(&pod, |claim| caches.claims.get(&Key::new(namespace(&*pod), claim))) {
                        force.push(pod);
                    }
                }
            }
        }
        if let (false, Some(silent)) = (force.is_empty(), silent) {
            if !self.is_silent(&key.name).await? {
                return Ok(Some(wait));
            }
            for pod in force {
                self.force(&pod, silent).await?;
            }
        }
        Ok(again)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn which_pods_must_not_run_twice() {
        let check = |owner: &str, volume: Value, modes: Option<&[&str]>, expect| {
            let pod: Pod = read(json!({
                "metadata": {"name": "p", "ownerReferences": [
                    {"apiVersion": "v1", "kind": owner, "name": "o", "uid": "u", "controller": true}]},
                "spec": {"containers": [], "volumes": [volume]},
            }));
            let claim = |name: &str| {
                assert!(["data", "p-scratch"].contains(&name), "{name}");
                modes.map(|modes| Arc::new(read(json!({"metadata": {"name": name}, "spec": {"accessModes": modes}}))))
            };
            assert_eq!(must_not_run_twice(&pod, claim), expect, "{owner} {volume} {modes:?}");
        };
        let claim = json!({"name": "v", "persistentVolumeClaim": {"claimName": "data"}});
        let ephemeral = json!({"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}});
        let directory = json!({"name": "v", "emptyDir": {}});
        check("StatefulSet", directory.clone(), None, true);
        check("ReplicaSet", directory, None, false);
        check("ReplicaSet", claim.clone(), Some(&["ReadWriteOnce"]), true);
        check("ReplicaSet", claim.clone(), Some(&["ReadOnlyMany", "ReadWriteOncePod"]), true);
        check("ReplicaSet", claim.clone(), Some(&["ReadWriteMany"]), false);
        check("ReplicaSet", claim, None, false);
        check("ReplicaSet", ephemeral, Some(&["ReadWriteOnce"]), true);
    }

    #[test]
    fn when_a_pod_is_forced_to_go() {
        let ms = Duration::from_millis;
        let check = |deleting: bool, ready: &str, taint: bool, promise: Option<u64>, silent: u64, expect, why: &str| {
            let at = deleting.then_some("2026-01-01T00:00:00Z");
            let pod: Pod = read(json!({"metadata": {"name": "p", "deletionTimestamp": at}}));
            let taints = if taint { json!([{"key": UNREACHABLE, "effect": NO_EXECUTE}]) } else { json!([]) };
            let node: Node = read(json!({
                "metadata": {"name": "n"}, "spec": {"taints": taints},
                "status": {"conditions": [{"type": "Ready", "status": ready}]},
            }));
            let notes = promise.map(|ms| json!({STOPS_WITHIN: ms.to_string()}));
            let lease: Lease = read(json!({"metadata": {"name": "n", "annotations": notes}}));
            assert_eq!(decide(&pod, &node, Some(&lease), Some(ms(silent)), ms(18_000)), expect, "{why}");
            assert_eq!(
                decide(&pod, &node, Some(&lease), Some(ms(silent)), ms(0)),
                Decision::Leave,
                "never, if so chosen"
            );
        };
        let promise = Some(17_000);
        check(true, "Unknown", true, promise, 18_000, Decision::Force, "all that is needed");
        check(true, "Unknown", true, promise, 10_000, Decision::Wait(ms(8000)), "too early");
        check(
            true,
            "Unknown",
            true,
            Some(30_000),
            18_000,
            Decision::Wait(ms(12_600)),
            "a node that takes longer, and drift",
        );
        check(true, "Unknown", true, None, 60_000, Decision::Leave, "a node that promises nothing");
        check(false, "Unknown", true, promise, 60_000, Decision::Leave, "it was not evicted");
        check(true, "False", true, promise, 60_000, Decision::Leave, "its node speaks");
        check(true, "Unknown", false, promise, 60_000, Decision::Leave, "its node need not be emptied");
    }
}
