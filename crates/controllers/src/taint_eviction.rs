//! Taint eviction: pods leave nodes with a NoExecute taint that they do not tolerate, or no longer
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/>).
//!
//! How long a pod has been on a tainted node is counted by our own clock from when we saw it, as upstream does: whoever
//! leads anew counts anew. How fast nodes are emptied is limited where they are tainted ([`crate::node_lifecycle`]).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Pod, Taint, Toleration};
use kube::api::DeleteParams;
use parking_lot::Mutex;
use seawall_api::node_selector::tolerates;
use tokio::time::Instant;

use crate::{
    context::Context,
    node_lifecycle::taints::{NO_EXECUTE, taints},
    runtime::{
        Controller, Key, Queue, Recorder,
        events::Severity,
        objects::{is_deleting, uid},
    },
};

/// How long a pod may stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stay {
    /// For as long as it wants.
    Forever,
    /// For so long from when the first of these taints was seen.
    For(Duration),
}

/// How long a pod with these tolerations may stay under these taints.
pub fn stay(tolerations: &[Toleration], taints: &[Taint]) -> Stay {
    let mut least = Stay::Forever;
    for taint in taints.iter().filter(|t| t.effect == NO_EXECUTE) {
        let mut covering = tolerations.iter().filter(|t| tolerates(t, taint)).peekable();
        if covering.peek().is_none() {
            return Stay::For(Duration::ZERO);
        }
        // Of all that cover any of them, the shortest counts.
        for seconds in covering.filter_map(|t| t.toleration_seconds) {
            let limit = Duration::from_secs(seconds.max(0).unsigned_abs());
            least = match least {
                Stay::Forever => Stay::For(limit),
                Stay::For(other) => Stay::For(other.min(limit)),
            };
        }
    }
    least
}

/// Since when pods have been on tainted nodes.
#[derive(Debug, Default)]
pub struct Timers(BTreeMap<Key, (String, Instant)>);

/// What to do about a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Leave,
    /// Nothing any more: it was counted, and need not go.
    Cancel,
    /// It has so much time left.
    Wait(Duration),
    /// It has to go.
    Evict,
}

impl Timers {
    /// Decides about one pod on a node with these taints.
    pub fn decide(&mut self, key: &Key, pod: &Pod, taints: &[Taint], now: Instant) -> Decision {
        let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
        let limit = match stay(tolerations, taints) {
            _ if is_deleting(pod) => {
                self.0.remove(key);
                return Decision::Leave;
            }
            Stay::Forever => {
                let counted = self.0.remove(key).is_some_and(|(counted, _)| counted == uid(pod));
                return if counted { Decision::Cancel } else { Decision::Leave };
            }
            Stay::For(limit) => limit,
        };
        let (counted, since) = self.0.entry(key.clone()).or_insert_with(|| (uid(pod).to_owned(), now));
        if counted != uid(pod) {
            (*counted, *since) = (uid(pod).to_owned(), now);
        }
        match (*since + limit).saturating_duration_since(now) {
            Duration::ZERO => Decision::Evict,
            left => Decision::Wait(left),
        }
    }

    /// The pod is no more.
    pub fn forget(&mut self, key: &Key) {
        self.0.remove(key);
    }
}

pub(crate) struct TaintEviction {
    context: Arc<Context>,
    recorder: Recorder,
    timers: Mutex<Timers>,
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

impl TaintEviction {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.pods.on_change(move |old, new| {
            // Which node, which tolerations, and whether it is going: nothing else matters.
            let matters = |pod: &Pod| {
                let spec = pod.spec.as_ref();
                let tolerations = spec.and_then(|spec| spec.tolerations.clone());
                (uid(pod).to_owned(), node_of(pod).map(str::to_owned), tolerations, is_deleting(pod))
            };
            let changed = old.map(|pod| matters(pod)) != new.map(|pod| matters(pod));
            if let (true, Some(pod)) = (changed, new.or(old)) {
                q.add(Key::of(&**pod));
            }
        });
        let (q, pods) = (queue.clone(), context.caches.pods.clone());
        context.caches.nodes.on_change(move |old, new| {
            let no_execute = |node: &k8s_openapi::api::core::v1::Node| -> Vec<(String, Option<String>)> {
                let found = taints(node).iter().filter(|t| t.effect == NO_EXECUTE);
                found.map(|t| (t.key.clone(), t.value.clone())).collect()
            };
            let before = old.map(|node| no_execute(node)).unwrap_or_default();
            let after = new.map(|node| no_execute(node)).unwrap_or_default();
            let Some(node) = new.filter(|_| before != after) else { return };
            for pod in pods.all().iter().filter(|pod| node_of(pod) == node.metadata.name.as_deref()) {
                q.add(Key::of(&**pod));
            }
        });
        let recorder = context.recorder.as_source("taint-eviction-controller");
        (Arc::new(TaintEviction { context, recorder, timers: Mutex::default() }), queue)
    }
}

#[async_trait]
impl Controller for TaintEviction {
    fn name(&self) -> &'static str {
        "tainteviction"
    }

    async fn ready(&self) {
        self.context.caches.pods.synced().await;
        self.context.caches.nodes.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        let found = caches.pods.get(key);
        let found = found.and_then(|pod| Some((caches.nodes.get(&Key::new("", node_of(&pod)?))?, pod)));
        let Some((node, pod)) = found else {
            self.timers.lock().forget(key);
            return Ok(None);
        };
        let decision = self.timers.lock().decide(key, &pod, taints(&node), Instant::now());
        match decision {
            Decision::Leave => Ok(None),
            Decision::Wait(left) => Ok(Some(left)),
            Decision::Cancel => {
                let message = format!("Cancelling deletion of Pod {key}");
                self.recorder.record(&*pod, Severity::Normal, "TaintManagerEviction", message);
                Ok(None)
            }
            Decision::Evict => {
                let message = format!("Marking for deletion Pod {key}");
                self.recorder.record(&*pod, Severity::Normal, "TaintManagerEviction", message);
                let why = ("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint");
                self.context.disrupt(&pod, false, Some(why)).await?;
                self.context.delete(&caches.pods, &*pod, DeleteParams::default()).await?;
                self.timers.lock().forget(key);
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn taint(text: &str) -> Taint {
        let (key, effect) = text.split_once(':').unwrap();
        let (key, value) = key.split_once('=').unwrap_or((key, ""));
        Taint {
            key: key.into(),
            value: (!value.is_empty()).then(|| value.into()),
            effect: effect.into(),
            time_added: None,
        }
    }

    fn pod(id: &str, tolerations: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"namespace": "ns", "name": "p", "uid": id}, "spec": {"containers": [], "tolerations": tolerations},
        }))
        .unwrap()
    }

    #[test]
    fn how_long_a_pod_may_stay() {
        let check = |tolerations: Value, taints: &[&str], expect: Option<u64>| {
            let tolerations: Vec<Toleration> = serde_json::from_value(tolerations).unwrap();
            let taints: Vec<Taint> = taints.iter().map(|t| taint(t)).collect();
            let expect = expect.map_or(Stay::Forever, |s| Stay::For(Duration::from_secs(s)));
            assert_eq!(stay(&tolerations, &taints), expect, "{tolerations:?} {taints:?}");
        };
        let exists = |key: &str, seconds: Option<i64>| json!({"key": key, "operator": "Exists", "effect": NO_EXECUTE, "tolerationSeconds": seconds});
        check(json!([]), &[], None);
        check(json!([]), &["a:NoSchedule"], None);
        check(json!([]), &["a:NoExecute"], Some(0));
        check(json!([exists("a", None)]), &["a:NoExecute"], None);
        check(json!([exists("a", Some(5))]), &["a:NoExecute"], Some(5));
        check(json!([exists("a", Some(-5))]), &["a:NoExecute"], Some(0));
        check(json!([exists("a", Some(5)), exists("a", Some(3))]), &["a:NoExecute"], Some(3));
        check(json!([exists("a", Some(5)), exists("b", Some(3))]), &["a:NoExecute"], Some(5));
        check(json!([exists("a", Some(5)), exists("b", Some(3))]), &["a:NoExecute", "b:NoExecute"], Some(3));
        check(json!([exists("a", Some(5))]), &["a:NoExecute", "b:NoExecute"], Some(0));
        check(json!([{"operator": "Exists"}]), &["a:NoExecute", "b=1:NoExecute"], None);
        check(json!([{"key": "b", "value": "1"}]), &["b=1:NoExecute"], None);
        check(json!([{"key": "b", "operator": "Equal", "value": "2"}]), &["b=1:NoExecute"], Some(0));
        check(json!([{"key": "b", "value": "1", "effect": "NoSchedule"}]), &["b=1:NoExecute"], Some(0));
    }

    #[tokio::test(start_paused = true)]
    async fn counts_from_the_first_taint_and_forgets_when_none_is_left() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let wait = |seconds| Decision::Wait(Duration::from_secs(seconds));
        let key = Key::new("ns", "p");
        let five = json!([{"operator": "Exists", "effect": NO_EXECUTE, "tolerationSeconds": 5}]);
        let one = pod("1", five.clone());
        let (a, b) = ([taint("a:NoExecute")], [taint("b:NoExecute")]);
        let mut timers = Timers::default();
        assert_eq!(timers.decide(&key, &one, &[], at(0)), Decision::Leave);
        assert_eq!(timers.decide(&key, &one, &a, at(1)), wait(5));
        assert_eq!(timers.decide(&key, &one, &b, at(4)), wait(2), "another name for the same trouble");
        assert_eq!(timers.decide(&key, &one, &[], at(5)), Decision::Cancel);
        assert_eq!(timers.decide(&key, &one, &a, at(9)), wait(5), "it begins anew");
        assert_eq!(timers.decide(&key, &pod("2", five), &a, at(12)), wait(5), "another pod of that name");
        assert_eq!(timers.decide(&key, &pod("2", json!([])), &a, at(13)), Decision::Evict);
        let mut going = pod("2", json!([]));
        going.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH));
        assert_eq!(timers.decide(&key, &going, &a, at(14)), Decision::Leave);
    }
}
