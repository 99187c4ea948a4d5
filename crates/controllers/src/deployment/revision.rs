//! Which replica set is a deployment's newest, and the annotations that carry its history.

use std::sync::Arc;

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, ReplicaSet, ReplicaSetSpec},
        core::v1::PodTemplateSpec,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::runtime::objects::{Labels, annotation, controller_reference, created, name, namespace, template_hash};

pub(super) const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAX: &str = "deployment.kubernetes.io/max-replicas";
const HASH: &str = "pod-template-hash";

/// Annotations of a deployment that are not its replica sets'.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED,
    MAX,
    "deprecated.deployment.rollback.to",
];

fn without_hash(template: &PodTemplateSpec) -> PodTemplateSpec {
    let mut template = template.clone();
    let meta = template.metadata.get_or_insert_default();
    if let Some(labels) = &mut meta.labels {
        labels.remove(HASH);
    }
    // The API server may or may not keep an empty map.
    meta.labels = meta.labels.take().filter(|l| !l.is_empty());
    meta.annotations = meta.annotations.take().filter(|a| !a.is_empty());
    meta.creation_timestamp = None;
    template
}

/// Whether the set was made from the template that the deployment has now.
pub(super) fn same_template(deployment: &Deployment, set: &ReplicaSet) -> bool {
    set.spec.template.as_ref().map(without_hash) == Some(without_hash(&deployment.spec.template))
}

/// The set made from the current template; the oldest, should there be several.
pub(super) fn newest(deployment: &Deployment, sets: &[Arc<ReplicaSet>]) -> Option<Arc<ReplicaSet>> {
    let same = sets.iter().filter(|set| same_template(deployment, set));
    same.min_by(|a, b| created(&***a).cmp(&created(&***b)).then_with(|| name(&***a).cmp(name(&***b)))).cloned()
}

/// The revision of a set; 0 if it has none.
pub(super) fn of(set: &ReplicaSet) -> i64 {
    annotation(set, REVISION).and_then(|revision| revision.parse().ok()).unwrap_or(0)
}

/// How many replicas the deployment wanted, and at most allowed, when the set was last scaled.
pub(super) fn scaled_for(set: &ReplicaSet) -> (Option<i32>, Option<i32>) {
    let number = |key| annotation(set, key).and_then(|n| n.parse().ok());
    (number(DESIRED), number(MAX))
}

/// Notes for what the set is being scaled.
pub(super) fn note_scale(annotations: &mut Labels, desired: i32, max: i32) {
    annotations.insert(DESIRED.into(), desired.to_string());
    annotations.insert(MAX.into(), max.to_string());
}

/// The annotations that the newest set should have: those of the deployment, and its revision. When it was newest
/// before (an undo), its former revision goes into the history.
pub(super) fn annotations(deployment: &Deployment, set: Option<&ReplicaSet>, revision: i64) -> Labels {
    let mut annotations = set.and_then(|set| set.metadata.annotations.clone()).unwrap_or_default();
    for (key, value) in deployment.metadata.annotations.iter().flatten() {
        if !NOT_COPIED.contains(&key.as_str()) {
            annotations.insert(key.clone(), value.clone());
        }
    }
    let old = set.map_or(0, of);
    if old < revision
        && let Some(former) = annotations.insert(REVISION.into(), revision.to_string())
    {
        let history = annotations.entry(REVISION_HISTORY.into()).or_default();
        *history = if history.is_empty() { former } else { format!("{history},{former}") };
    }
    annotations
}

/// A new replica set for the deployment's current template.
pub(super) fn new_set(deployment: &Deployment, replicas: i32, max: i32, revision: i64) -> ReplicaSet {
    let spec = deployment.spec.clone();
    let collisions = deployment.status.as_ref().and_then(|status| status.collision_count).unwrap_or(0);
    let hash = template_hash(&without_hash(&spec.template), collisions);
    let mut template = spec.template;
    let meta = template.metadata.get_or_insert_default();
    meta.labels.get_or_insert_default().insert(HASH.into(), hash.clone());
    let labels = meta.labels.clone();
    let mut selector = spec.selector;
    selector.match_labels.get_or_insert_default().insert(HASH.into(), hash.clone());
    let mut annotations = annotations(deployment, None, revision);
    note_scale(&mut annotations, spec.replicas.unwrap_or(1), max);
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", name(deployment))),
            namespace: Some(namespace(deployment).to_owned()),
            labels,
            annotations: Some(annotations),
            owner_references: Some(vec![controller_reference(deployment)]),
            ..Default::default()
        },
        spec: ReplicaSetSpec {
            replicas: Some(replicas),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        },
        status: None,
    }
}
