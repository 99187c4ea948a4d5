//! How many pods a ReplicaSet needs, which go first when there are too many
//! (<https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/>), and its status.

use std::{cmp::Ordering, collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus},
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::pods::Failure;
use crate::{
    context::{delay, sooner},
    runtime::objects::{annotation, created, is_available, is_ready, name, phase, ready_since, uid},
};

/// No more pods than this are created or deleted in one pass (upstream's `BurstReplicas`).
const BURST: usize = 500;

/// What to do about the number of pods.
#[derive(Debug, PartialEq)]
pub enum Scale {
    /// Create so many.
    Create(usize),
    /// Delete these, by name.
    Delete(Vec<String>),
}

/// Decides how many pods to create, or which to delete. `pods` are the active ones; `neighbours` says how many pods of
/// the same Deployment run on a node.
pub fn plan(wanted: i32, pods: &[Arc<Pod>], neighbours: &HashMap<String, usize>, now: Timestamp) -> Scale {
    let wanted = wanted.max(0) as usize;
    if pods.len() <= wanted {
        return Scale::Create((wanted - pods.len()).min(BURST));
    }
    let surplus = (pods.len() - wanted).min(BURST);
    let mut ranked: Vec<&Arc<Pod>> = pods.iter().collect();
    ranked.sort_by(|a, b| rank(a, b, neighbours, now));
    Scale::Delete(ranked.iter().take(surplus).map(|pod| name(&***pod).to_owned()).collect())
}

/// Which of two pods to delete first, by the criteria of
/// <https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/#scaling-down-a-replicaset>.
fn rank(a: &Pod, b: &Pod, neighbours: &HashMap<String, usize>, now: Timestamp) -> Ordering {
    let node = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
    let phase_rank = |pod: &Pod| match phase(pod) {
        "Pending" => 0,
        "Unknown" => 1,
        _ => 2,
    };
    let cost = |pod: &Pod| {
        annotation(pod, "controller.kubernetes.io/pod-deletion-cost").and_then(|c| c.parse::<i32>().ok()).unwrap_or(0)
    };
    let others = |pod: &Pod| neighbours.get(&node(pod)).copied().unwrap_or(0);
    let restarts = |pod: &Pod| {
        let status = pod.status.as_ref();
        let most = |statuses: Option<&Vec<k8s_openapi::api::core::v1::ContainerStatus>>| {
            statuses.into_iter().flatten().map(|s| s.restart_count).max().unwrap_or(0)
        };
        (
            most(status.and_then(|s| s.container_statuses.as_ref())),
            most(status.and_then(|s| s.init_container_statuses.as_ref())),
        )
    };
    // Ages are compared by order of magnitude, so that of pods of about the same age it is not always the newest that
    // goes (KEP-2185).
    let magnitude = |since: Timestamp| {
        let seconds = now.duration_since(since).as_secs().max(0);
        if seconds == 0 { 0 } else { 1 + seconds.ilog2() }
    };
    node(b)
        .is_empty()
        .cmp(&node(a).is_empty())
        .then_with(|| phase_rank(a).cmp(&phase_rank(b)))
        .then_with(|| is_ready(a).cmp(&is_ready(b)))
        .then_with(|| cost(a).cmp(&cost(b)))
        .then_with(|| others(b).cmp(&others(a)))
        .then_with(|| match (ready_since(a), ready_since(b)) {
            (Some(a), Some(b)) => magnitude(a).cmp(&magnitude(b)),
            _ => Ordering::Equal,
        })
        .then_with(|| restarts(b).cmp(&restarts(a)))
        .then_with(|| magnitude(created(a)).cmp(&magnitude(created(b))))
        .then_with(|| uid(a).cmp(uid(b)))
}

/// The status, and when it may change by time alone.
pub fn status(
    set: &ReplicaSet,
    pods: &[Arc<Pod>],
    terminating: usize,
    failure: Option<&Failure>,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Duration>) {
    let spec = &set.spec;
    let template_labels = spec.template.as_ref().and_then(|t| t.metadata.as_ref()?.labels.clone()).unwrap_or_default();
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let (mut labeled, mut ready, mut available, mut again) = (0, 0, 0, None);
    for pod in pods {
        let labels = pod.metadata.labels.as_ref();
        if template_labels.iter().all(|(key, value)| labels.and_then(|l| l.get(key)) == Some(value)) {
            labeled += 1;
        }
        if is_ready(pod) {
            ready += 1;
        }
        match is_available(pod, min_ready, now) {
            Ok(true) => available += 1,
            Ok(false) => {}
            Err(missing) => again = sooner(again, Some(delay(missing))),
        }
    }
    let old = set.status.clone().unwrap_or_default();
    let mut conditions = old.conditions.unwrap_or_default();
    match failure {
        None => conditions.retain(|c| c.type_.as_deref() != Some("ReplicaFailure")),
        Some(_) if conditions.iter().any(|c| c.type_.as_deref() == Some("ReplicaFailure")) => {}
        Some(failure) => conditions.push(ReplicaSetCondition {
            type_: Some("ReplicaFailure".into()),
            status: Some("True".into()),
            reason: Some(failure.reason.into()),
            message: Some(failure.message.clone()),
            last_transition_time: Some(Time(now)),
        }),
    }
    let status = ReplicaSetStatus {
        replicas: pods.len() as i32,
        fully_labeled_replicas: Some(labeled).filter(|n| *n > 0),
        ready_replicas: Some(ready).filter(|n| *n > 0),
        available_replicas: Some(available).filter(|n| *n > 0),
        terminating_replicas: Some(terminating as i32),
        observed_generation: set.metadata.generation,
        conditions: Some(conditions).filter(|c| !c.is_empty()),
    };
    (status, again)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn pod(name: &str, change: impl FnOnce(&mut Value)) -> Arc<Pod> {
        let mut pod = json!({
            "metadata": {"name": name, "uid": name, "creationTimestamp": "2025-12-31T23:00:00Z", "labels": {"a": "1"}, "annotations": {}},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"phase": "Running", "containerStatuses": [{"name": "c", "restartCount": 0, "image": "", "imageID": "", "ready": true}],
                "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2025-12-31T23:10:00Z"}]},
        });
        change(&mut pod);
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn creates_what_is_missing() {
        let none = HashMap::new();
        assert_eq!(plan(3, &[pod("a", |_| {})], &none, now()), Scale::Create(2));
        assert_eq!(plan(0, &[], &none, now()), Scale::Create(0));
        assert_eq!(plan(2000, &[], &none, now()), Scale::Create(BURST));
    }

    #[test]
    fn deletes_the_least_useful_first() {
        let check = |worse: fn(&mut Value), why: &str| {
            for order in [["good", "worse"], ["worse", "good"]] {
                let pods: Vec<_> =
                    order.iter().map(|n| if *n == "worse" { pod(n, worse) } else { pod(n, |_| {}) }).collect();
                let neighbours = HashMap::from([("n1".to_owned(), 1), ("n2".to_owned(), 2)]);
                assert_eq!(plan(1, &pods, &neighbours, now()), Scale::Delete(vec!["worse".into()]), "{why}");
            }
        };
        check(|p| p["spec"]["nodeName"] = Value::Null, "not assigned");
        check(|p| p["status"]["phase"] = "Pending".into(), "pending");
        check(|p| p["status"]["conditions"][0]["status"] = "False".into(), "not ready");
        check(|p| p["metadata"]["annotations"]["controller.kubernetes.io/pod-deletion-cost"] = "-5".into(), "cheap");
        check(|p| p["spec"]["nodeName"] = "n2".into(), "crowded node");
        check(
            |p| p["status"]["conditions"][0]["lastTransitionTime"] = "2025-12-31T23:59:00Z".into(),
            "ready for less long",
        );
        check(|p| p["status"]["containerStatuses"][0]["restartCount"] = 3.into(), "restarts");
        check(|p| p["metadata"]["creationTimestamp"] = "2025-12-31T23:59:00Z".into(), "newer");
    }

    #[test]
    fn counts() {
        let set: ReplicaSet = serde_json::from_value(json!({
            "metadata": {"name": "s", "generation": 4},
            "spec": {"replicas": 3, "minReadySeconds": 60, "selector": {}, "template": {"metadata": {"labels": {"a": "1"}}}},
        }))
        .unwrap();
        let pods = [
            pod("available", |_| {}),
            pod("too young", |p| p["status"]["conditions"][0]["lastTransitionTime"] = "2025-12-31T23:59:20Z".into()),
            pod("not ready", |p| {
                p["status"]["conditions"][0]["status"] = "False".into();
                p["metadata"]["labels"]["a"] = "2".into();
            }),
        ];
        let (counted, again) = status(&set, &pods, 2, None, now());
        let expected = ReplicaSetStatus {
            replicas: 3,
            fully_labeled_replicas: Some(2),
            ready_replicas: Some(2),
            available_replicas: Some(1),
            terminating_replicas: Some(2),
            observed_generation: Some(4),
            conditions: None,
        };
        assert_eq!(counted, expected);
        assert_eq!(again, Some(Duration::from_secs(20)));

        let failure = Failure { reason: "FailedCreate", message: "quota".into() };
        let (failed, _) = status(&set, &pods, 0, Some(&failure), now());
        assert_eq!(failed.conditions.as_ref().unwrap()[0].reason.as_deref(), Some("FailedCreate"));
        let set = ReplicaSet { status: Some(failed), ..set };
        assert_eq!(status(&set, &pods, 0, None, now()).0.conditions, None, "it passes when creation succeeds");
    }
}
