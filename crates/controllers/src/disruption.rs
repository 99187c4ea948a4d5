//! PodDisruptionBudget: says how many pods may be evicted at the moment
//! (<https://kubernetes.io/docs/concepts/workloads/pods/disruptions/>).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::{
        core::v1::{Pod, ReplicationController},
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus},
    },
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
};

use crate::{
    context::{Context, delay},
    runtime::{
        Controller, Key, Queue,
        objects::{controller_of, is_deleting, is_finished, is_ready, name, namespace, scaled, selects},
    },
};

/// An evicted pod counts as gone for this long, until its deletion is seen.
const DISRUPTED: SignedDuration = SignedDuration::from_mins(2);

/// The new status of a budget over `pods`, of which their owners want `expected`; and when to look again.
pub fn plan(
    budget: &PodDisruptionBudget,
    pods: &[Arc<Pod>],
    expected: i32,
    now: Timestamp,
) -> (PodDisruptionBudgetStatus, Option<Duration>) {
    let spec = budget.spec.clone().unwrap_or_default();
    let old = budget.status.clone().unwrap_or_default();
    let mut again = None;
    let mut disrupted = BTreeMap::new();
    for (pod, at) in old.disrupted_pods.iter().flatten() {
        let left = DISRUPTED - now.duration_since(at.0);
        let there = pods.iter().any(|p| name(&**p) == pod && !is_deleting(&**p));
        if there && left > SignedDuration::ZERO {
            again = crate::context::sooner(again, Some(delay(left)));
            disrupted.insert(pod.clone(), at.clone());
        }
    }
    let healthy =
        pods.iter().filter(|p| is_ready(p) && !is_deleting(&***p) && !disrupted.contains_key(name(&***p))).count()
            as i32;
    let desired = match (&spec.min_available, &spec.max_unavailable) {
        (Some(min), _) => scaled(Some(min), 0, expected, true),
        (None, Some(max)) => (expected - scaled(Some(max), 0, expected, true)).max(0),
        (None, None) => 0,
    };
    let allowed = if expected <= 0 { 0 } else { (healthy - desired).max(0) };
    let (state, reason) = if allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
    let mut conditions = old.conditions.clone().unwrap_or_default();
    let since = conditions
        .iter()
        .find(|c| c.type_ == "DisruptionAllowed" && c.status == state)
        .map(|c| c.last_transition_time.clone());
    conditions.retain(|c| c.type_ != "DisruptionAllowed");
    conditions.push(Condition {
        type_: "DisruptionAllowed".into(),
        status: state.into(),
        reason: reason.into(),
        message: String::new(),
        last_transition_time: since.unwrap_or(Time(now)),
        observed_generation: budget.metadata.generation,
    });
    let status = PodDisruptionBudgetStatus {
        conditions: Some(conditions),
        current_healthy: Some(healthy),
        desired_healthy: Some(desired),
        disrupted_pods: (!disrupted.is_empty()).then_some(disrupted),
        disruptions_allowed: Some(allowed),
        expected_pods: Some(expected),
        observed_generation: budget.metadata.generation,
    };
    (status, again)
}

pub(crate) struct Budgets {
    context: Arc<Context>,
}

impl Budgets {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let caches = &context.caches;
        let q = queue.clone();
        caches.budgets.on_change(move |_, new| {
            if let Some(budget) = new {
                q.add(Key::of(&**budget));
            }
        });
        let (q, budgets) = (queue.clone(), caches.budgets.clone());
        caches.pods.on_change(move |old, new| {
            for pod in old.into_iter().chain(new) {
                for budget in budgets.in_namespace(namespace(&**pod)) {
                    let selector = budget.spec.as_ref().and_then(|s| s.selector.as_ref());
                    if selects(selector, pod.metadata.labels.as_ref()) {
                        q.add(Key::of(&*budget));
                    }
                }
            }
        });
        let (q, budgets) = (queue.clone(), caches.budgets.clone());
        caches.replica_sets.on_change(move |old, new| {
            // How many are wanted may have changed; an update of the status alone changes nothing here.
            let wanted = |set: Option<&Arc<k8s_openapi::api::apps::v1::ReplicaSet>>| set.map(|s| s.spec.replicas);
            if wanted(old) != wanted(new)
                && let Some(set) = new.or(old)
            {
                budgets.in_namespace(namespace(&**set)).iter().for_each(|b| q.add(Key::of(&**b)));
            }
        });
        (Arc::new(Budgets { context }), queue)
    }

    /// How many pods the owners of `pods` want together; pods without one count for themselves.
    fn expected(&self, pods: &[Arc<Pod>]) -> i32 {
        let caches = &self.context.caches;
        let mut owners: BTreeMap<String, i32> = BTreeMap::new();
        let mut alone = 0;
        for pod in pods {
            let Some(owner) = controller_of(&**pod) else {
                alone += 1;
                continue;
            };
            let key = Key::new(namespace(&**pod), &owner.name);
            let wanted = match owner.kind.as_str() {
                "ReplicaSet" => caches.replica_sets.get(&key).map(|s| s.spec.replicas.unwrap_or(1)),
                "ReplicationController" => {
                    let wanted = |c: Arc<ReplicationController>| c.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
                    caches.replication_controllers.get(&key).map(wanted)
                }
                "StatefulSet" => caches.stateful_sets.get(&key).map(|s| s.spec.replicas.unwrap_or(1)),
                _ => None,
            };
            match wanted {
                Some(wanted) => {
                    owners.insert(owner.uid.clone(), wanted);
                }
                None => alone += 1,
            }
        }
        owners.values().sum::<i32>() + alone
    }
}

#[async_trait]
impl Controller for Budgets {
    fn name(&self) -> &'static str {
        "disruption"
    }

    async fn ready(&self) {
        let caches = &self.context.caches;
        caches.budgets.synced().await;
        caches.pods.synced().await;
        caches.replica_sets.synced().await;
        caches.replication_controllers.synced().await;
        caches.stateful_sets.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        let Some(budget) = caches.budgets.get(key) else { return Ok(None) };
        let selector = budget.spec.as_ref().and_then(|s| s.selector.as_ref());
        let mut pods = caches.pods.in_namespace(&key.namespace);
        pods.retain(|p| selects(selector, p.metadata.labels.as_ref()) && !is_finished(p));
        let (status, again) = plan(&budget, &pods, self.expected(&pods), Timestamp::now());
        if budget.status.as_ref() != Some(&status) {
            let mut updated = (*budget).clone();
            updated.status = Some(status);
            self.context.replace_status(&caches.budgets, &updated).await?;
        }
        Ok(again)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pods(ready: usize, unready: usize) -> Vec<Arc<Pod>> {
        let pod = |index: usize| {
            let status = if index < ready { "True" } else { "False" };
            Arc::new(serde_json::from_value(json!({"metadata": {"name": format!("p{index}")}, "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": status}]}})).unwrap())
        };
        (0..ready + unready).map(pod).collect()
    }

    #[test]
    fn how_many_may_go() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let check = |spec: Value, pods: &[Arc<Pod>], expected: i32, expect: (i32, i32)| {
            let budget: PodDisruptionBudget =
                serde_json::from_value(json!({"metadata": {"name": "b"}, "spec": spec})).unwrap();
            let (status, _) = plan(&budget, pods, expected, now);
            assert_eq!(
                (status.desired_healthy, status.disruptions_allowed),
                (Some(expect.0), Some(expect.1)),
                "{spec}"
            );
        };
        check(json!({"minAvailable": 2}), &pods(3, 0), 3, (2, 1));
        check(json!({"minAvailable": 2}), &pods(2, 1), 3, (2, 0));
        check(json!({"minAvailable": "50%"}), &pods(5, 0), 5, (3, 2));
        check(json!({"maxUnavailable": 1}), &pods(3, 0), 3, (2, 1));
        check(json!({"maxUnavailable": 1}), &pods(2, 0), 3, (2, 0));
        check(json!({"maxUnavailable": "30%"}), &pods(4, 0), 4, (2, 2));
        check(json!({"minAvailable": 1}), &[], 0, (1, 0));
    }

    #[test]
    fn an_evicted_pod_counts_as_gone() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let budget = |at: &str| -> PodDisruptionBudget {
            serde_json::from_value(json!({"metadata": {"name": "b"}, "spec": {"minAvailable": 1},
                "status": {"disruptedPods": {"p0": at}, "currentHealthy": 0, "desiredHealthy": 0, "disruptionsAllowed": 0, "expectedPods": 0}})).unwrap()
        };
        let (status, again) = plan(&budget("2025-12-31T23:59:30Z"), &pods(3, 0), 3, now);
        assert_eq!((status.current_healthy, status.disruptions_allowed), (Some(2), Some(1)));
        assert_eq!(again, Some(Duration::from_secs(90)));
        // Its deletion was never seen: it is there to stay.
        let (status, _) = plan(&budget("2025-12-31T23:00:00Z"), &pods(3, 0), 3, now);
        assert_eq!((status.current_healthy, status.disrupted_pods), (Some(3), None));
    }
}
