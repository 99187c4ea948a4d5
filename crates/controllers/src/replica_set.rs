//! ReplicaSet: keeps as many pods as asked for.

use std::{cmp::Ordering, collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::{
    api::{
        apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus},
        core::v1::{Pod, PodTemplateSpec},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time},
};
use kube::api::DeleteParams;

use crate::{
    context::{Context, delay, sooner},
    runtime::{
        Controller, Key, Queue,
        events::Severity,
        follow_owned, namespace_is_terminating,
        objects::{
            Claim, adopt_patch, annotation, claim, controller_of, controller_reference, created, is_active,
            is_available, is_deleting, is_finished, is_ready, name, namespace, phase, ready_since, release_patch,
            selects_everything, uid,
        },
    },
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

/// A failure to create or delete pods, as the status tells it.
#[derive(Clone, Debug)]
pub struct Failure {
    /// `FailedCreate` or `FailedDelete`.
    pub reason: &'static str,
    /// What the API server said.
    pub message: String,
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

/// A pod made from a template for an owner.
pub(crate) fn pod_from_template(template: &PodTemplateSpec, generate_name: String, owner: OwnerReference) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(generate_name),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![owner]),
            ..Default::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

pub(crate) struct ReplicaSets {
    context: Arc<Context>,
}

impl ReplicaSets {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let caches = &context.caches;
        follow_owned(
            &caches.pods,
            &caches.replica_sets,
            "ReplicaSet",
            |set: &ReplicaSet| Some(&set.spec.selector),
            &queue,
        );
        let q = queue.clone();
        caches.replica_sets.on_change(move |old, new| {
            if let Some(set) = new.or(old) {
                q.add(Key::of(&**set));
            }
        });
        (Arc::new(ReplicaSets { context }), queue)
    }

    /// The pods that are the set's, after adopting and releasing.
    async fn claim(&self, set: &ReplicaSet) -> anyhow::Result<Vec<Arc<Pod>>> {
        let spec = &set.spec;
        let cache = &self.context.caches.pods;
        let mut candidates = cache.controlled_by(uid(set));
        candidates.extend(cache.orphans(namespace(set)));
        let mut pods = Vec::new();
        let mut confirmed = false;
        for pod in candidates {
            match claim(&*pod, uid(set), is_deleting(set), &spec.selector) {
                Claim::Keep => pods.push(pod),
                Claim::Ignore => {}
                Claim::Release => {
                    self.context.patch(cache, &*pod, release_patch(&*pod, uid(set))).await?;
                }
                // What has ended is not worth adopting.
                Claim::Adopt if !is_active(&pod) => {}
                Claim::Adopt => {
                    if !confirmed {
                        self.confirm(set).await?;
                        confirmed = true;
                    }
                    pods.push(Arc::new(self.context.patch(cache, &*pod, adopt_patch(&*pod, set)).await?));
                }
            }
        }
        Ok(pods)
    }

    /// Asks the API server itself whether the set is still there: one that is being deleted must adopt nothing.
    async fn confirm(&self, set: &ReplicaSet) -> anyhow::Result<()> {
        let fresh = self.context.api::<ReplicaSet>(namespace(set)).get(name(set)).await?;
        anyhow::ensure!(uid(&fresh) == uid(set) && !is_deleting(&fresh), "the replica set is being deleted");
        Ok(())
    }

    fn neighbours(&self, set: &ReplicaSet) -> HashMap<String, usize> {
        let caches = &self.context.caches;
        let siblings = match controller_of(set) {
            Some(owner) => caches.replica_sets.controlled_by(&owner.uid).iter().map(|s| uid(&**s).to_owned()).collect(),
            None => vec![uid(set).to_owned()],
        };
        let mut count = HashMap::new();
        for pod in siblings.iter().flat_map(|uid| caches.pods.controlled_by(uid)).filter(|pod| is_active(pod)) {
            if let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) {
                *count.entry(node).or_default() += 1;
            }
        }
        count
    }

    async fn scale(&self, set: &ReplicaSet, pods: &[Arc<Pod>], now: Timestamp) -> Result<(), Failure> {
        let spec = &set.spec;
        match plan(spec.replicas.unwrap_or(1), pods, &self.neighbours(set), now) {
            Scale::Create(count) => {
                let template = spec.template.clone().unwrap_or_default();
                let pod = pod_from_template(&template, format!("{}-", name(set)), controller_reference(set));
                create_pods(&self.context, set, &pod, count).await
            }
            Scale::Delete(names) => {
                let chosen = pods.iter().filter(|pod| names.iter().any(|n| n == name(&***pod)));
                let results = join_all(chosen.map(|pod| delete_pod(&self.context, set, pod))).await;
                results.into_iter().collect()
            }
        }
    }
}

/// Creates `count` copies of a pod: one, then two, then four and so on, so that a mistake in the template is met once
/// and not a hundred times (upstream's `slowStartBatch`).
pub(crate) async fn create_pods<O>(context: &Context, owner: &O, pod: &Pod, count: usize) -> Result<(), Failure>
where
    O: kube::Resource<DynamicType = ()>,
{
    let (mut left, mut batch) = (count, 1);
    while left > 0 {
        let now = batch.min(left);
        let creations = (0..now).map(|_| create_pod(context, owner, pod));
        for result in join_all(creations).await {
            if !result? {
                return Ok(());
            }
        }
        left -= now;
        batch *= 2;
    }
    Ok(())
}

/// Creates one pod and tells of it. False when there is no point in creating more.
pub(crate) async fn create_pod<O>(context: &Context, owner: &O, pod: &Pod) -> Result<bool, Failure>
where
    O: kube::Resource<DynamicType = ()>,
{
    let recorder = context.recorder.as_source(source_of::<O>());
    match context.create(&context.caches.pods, namespace(owner), pod).await {
        Ok(pod) => {
            recorder.record(owner, Severity::Normal, "SuccessfulCreate", format!("Created pod: {}", name(&pod)));
            Ok(true)
        }
        Err(error) if namespace_is_terminating(&error) => Ok(false),
        Err(error) => {
            let message = plain(&error);
            recorder.record(owner, Severity::Warning, "FailedCreate", format!("Error creating: {message}"));
            Err(Failure { reason: "FailedCreate", message })
        }
    }
}

/// Deletes one pod and tells of it.
pub(crate) async fn delete_pod<O>(context: &Context, owner: &O, pod: &Pod) -> Result<(), Failure>
where
    O: kube::Resource<DynamicType = ()>,
{
    let recorder = context.recorder.as_source(source_of::<O>());
    match context.delete(&context.caches.pods, pod, DeleteParams::default()).await {
        Ok(()) => {
            recorder.record(owner, Severity::Normal, "SuccessfulDelete", format!("Deleted pod: {}", name(pod)));
            Ok(())
        }
        Err(error) => {
            let message = plain(&error);
            recorder.record(owner, Severity::Warning, "FailedDelete", format!("Error deleting: {message}"));
            Err(Failure { reason: "FailedDelete", message })
        }
    }
}

/// The name under which upstream's controller of a kind records events.
fn source_of<O: kube::Resource<DynamicType = ()>>() -> &'static str {
    match O::kind(&()).as_ref() {
        "ReplicaSet" => "replicaset-controller",
        "Job" => "job-controller",
        "StatefulSet" => "statefulset-controller",
        "DaemonSet" => "daemonset-controller",
        _ => "seawall",
    }
}

/// What the API server said, without the wrapping.
pub(crate) fn plain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

#[async_trait]
impl Controller for ReplicaSets {
    fn name(&self) -> &'static str {
        "replicaset"
    }

    async fn ready(&self) {
        self.context.caches.replica_sets.synced().await;
        self.context.caches.pods.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let cache = &self.context.caches.replica_sets;
        let Some(set) = cache.get(key) else { return Ok(None) };
        if selects_everything(&set.spec.selector) {
            return Ok(None);
        }
        let pods = self.claim(&set).await?;
        let terminating = pods.iter().filter(|pod| is_deleting(&***pod) && !is_finished(pod)).count();
        let active: Vec<_> = pods.into_iter().filter(|pod| is_active(pod)).collect();
        let scaled = match is_deleting(&*set) {
            true => Ok(()),
            false => self.scale(&set, &active, Timestamp::now()).await,
        };
        // The status tells of what was seen before scaling, as upstream's does; the next pass follows at once.
        let (status, again) = status(&set, &active, terminating, scaled.as_ref().err(), Timestamp::now());
        if set.status.as_ref() != Some(&status) {
            let mut updated = (*set).clone();
            updated.status = Some(status);
            self.context.replace_status(cache, &updated).await?;
        }
        scaled.map_err(|failure| anyhow::anyhow!("{}: {}", failure.reason, failure.message))?;
        Ok(again)
    }
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
