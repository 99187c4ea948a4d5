//! The history of a StatefulSet: a ControllerRevision for each template
//! (<https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#update-revision>).

use std::{collections::BTreeSet, sync::Arc};

use k8s_openapi::{
    api::{
        apps::v1::{ControllerRevision, StatefulSet},
        core::v1::PodTemplateSpec,
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, runtime::RawExtension},
};
use serde_json::{Value, json};

use crate::runtime::objects::{controller_reference, name, namespace, template_hash};

const HASH: &str = "controller.kubernetes.io/hash";
/// The longest name that leaves room for a hash.
const LONGEST: usize = 223;

/// The template as a revision holds it: a patch that replaces the set's, which is what `kubectl rollout undo` applies.
fn data(template: &PodTemplateSpec) -> Value {
    let mut template = serde_json::to_value(template).unwrap_or_else(|_| json!({}));
    if let Some(map) = template.as_object_mut() {
        map.insert("$patch".into(), "replace".into());
    }
    json!({"spec": {"template": template}})
}

/// The template that a revision holds.
pub(super) fn template(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let mut template = revision.data.0["spec"]["template"].clone();
    template.as_object_mut()?.remove("$patch");
    serde_json::from_value(template).ok()
}

/// What to do about the revision of the set's template.
#[derive(Clone, Debug, PartialEq)]
pub enum Newest {
    /// It is there, and the newest.
    Known(Arc<ControllerRevision>),
    /// It is there from before: it becomes the newest again, with this number.
    Again(Arc<ControllerRevision>, i64),
    /// It is made.
    Make(Box<ControllerRevision>),
}

fn number(revision: &ControllerRevision) -> i64 {
    revision.revision.unwrap_or(0)
}

/// In order of their numbers.
pub(super) fn sort(revisions: &mut [Arc<ControllerRevision>]) {
    revisions.sort_by(|a, b| {
        let created = |r: &ControllerRevision| r.metadata.creation_timestamp.clone();
        number(a).cmp(&number(b)).then_with(|| created(a).cmp(&created(b))).then_with(|| name(&**a).cmp(name(&**b)))
    });
}

/// Decides. The revisions are in order.
pub fn newest(set: &StatefulSet, revisions: &[Arc<ControllerRevision>]) -> Newest {
    let data = data(&set.spec.template);
    let next = revisions.last().map_or(1, |last| number(last) + 1);
    // Of several that hold the same the last one counts.
    let position = revisions.iter().rposition(|revision| revision.data.0 == data);
    match position.map(|at| (&revisions[at], at + 1 == revisions.len())) {
        Some((revision, true)) => Newest::Known(revision.clone()),
        Some((revision, false)) => Newest::Again(revision.clone(), next),
        None => Newest::Make(Box::new(make(set, data, next))),
    }
}

fn make(set: &StatefulSet, data: Value, number: i64) -> ControllerRevision {
    let collisions = set.status.as_ref().and_then(|status| status.collision_count).unwrap_or(0);
    let hash = template_hash(&set.spec.template, collisions);
    let mut labels = set.spec.template.metadata.as_ref().and_then(|m| m.labels.clone()).unwrap_or_default();
    labels.insert(HASH.to_owned(), hash.clone());
    let prefix: String = name(set).chars().take(LONGEST).collect();
    ControllerRevision {
        metadata: ObjectMeta {
            name: Some(format!("{prefix}-{hash}")),
            namespace: Some(namespace(set).to_owned()),
            labels: Some(labels),
            annotations: set.metadata.annotations.clone(),
            owner_references: Some(vec![controller_reference(set)]),
            ..ObjectMeta::default()
        },
        data: RawExtension(data),
        revision: Some(number),
    }
}

/// The revisions that history need not keep: the oldest of those that nothing uses, beyond the limit.
pub(super) fn surplus(
    set: &StatefulSet,
    revisions: &[Arc<ControllerRevision>],
    used: &BTreeSet<String>,
) -> Vec<Arc<ControllerRevision>> {
    let limit = set.spec.revision_history_limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(10);
    let unused: Vec<_> = revisions.iter().filter(|revision| !used.contains(name(&***revision))).cloned().collect();
    let surplus = unused.len().saturating_sub(limit);
    unused.into_iter().take(surplus).collect()
}
