//! The history of a StatefulSet or DaemonSet: a ControllerRevision for each template
//! (<https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#update-revision>,
//! <https://kubernetes.io/docs/tasks/manage-daemon/rollback-daemon-set/>).

use std::{collections::BTreeSet, sync::Arc};

use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{ControllerRevision, DaemonSet, StatefulSet},
        core::v1::PodTemplateSpec,
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        runtime::RawExtension,
    },
};
use kube::Resource;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{
    context::Context,
    runtime::{
        Informer, Object, namespace_is_terminating,
        objects::{
            adopt_patch, controller_of, controller_reference, is_deleting, name, namespace, selects, template_hash, uid,
        },
    },
};

/// The longest name that leaves room for a hash.
const LONGEST: usize = 223;
/// Revisions that are kept beside those in use, if nobody says how many.
const KEPT: usize = 10;

/// What has a history.
pub trait Historic: Object + Serialize + DeserializeOwned + Resource<Scope = NamespaceResourceScope> {
    /// The label in which a revision says its hash.
    const HASH: &'static str;

    /// The template that pods are made from.
    fn template(&self) -> &PodTemplateSpec;
    /// Which revisions are its own.
    fn selector(&self) -> &LabelSelector;
    /// How many revisions are kept beside those in use.
    fn limit(&self) -> Option<i32>;
    /// How often the name for a revision was taken already.
    fn collisions(&self) -> i32;
    /// Notes that it was taken once more.
    fn collided(&mut self);
}

impl Historic for StatefulSet {
    const HASH: &'static str = "controller.kubernetes.io/hash";

    fn template(&self) -> &PodTemplateSpec {
        &self.spec.template
    }
    fn selector(&self) -> &LabelSelector {
        &self.spec.selector
    }
    fn limit(&self) -> Option<i32> {
        self.spec.revision_history_limit
    }
    fn collisions(&self) -> i32 {
        self.status.as_ref().and_then(|status| status.collision_count).unwrap_or(0)
    }
    fn collided(&mut self) {
        let next = self.collisions() + 1;
        self.status.get_or_insert_default().collision_count = Some(next);
    }
}

impl Historic for DaemonSet {
    // Here the pods carry the hash alone, under the same label, and there the name of the whole revision.
    const HASH: &'static str = "controller-revision-hash";

    fn template(&self) -> &PodTemplateSpec {
        &self.spec.template
    }
    fn selector(&self) -> &LabelSelector {
        &self.spec.selector
    }
    fn limit(&self) -> Option<i32> {
        self.spec.revision_history_limit
    }
    fn collisions(&self) -> i32 {
        self.status.as_ref().and_then(|status| status.collision_count).unwrap_or(0)
    }
    fn collided(&mut self) {
        let next = self.collisions() + 1;
        self.status.get_or_insert_default().collision_count = Some(next);
    }
}

/// The template as a revision holds it: a patch that replaces the owner's, which is what `kubectl rollout undo` applies.
fn data(template: &PodTemplateSpec) -> Value {
    let mut template = serde_json::to_value(template).unwrap_or_else(|_| json!({}));
    if let Some(map) = template.as_object_mut() {
        map.insert("$patch".into(), "replace".into());
    }
    json!({"spec": {"template": template}})
}

/// The template that a revision holds.
pub(crate) fn template(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let mut template = revision.data.0["spec"]["template"].clone();
    template.as_object_mut()?.remove("$patch");
    serde_json::from_value(template).ok()
}

/// What to do about the revision of the owner's template.
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
pub(crate) fn sort(revisions: &mut [Arc<ControllerRevision>]) {
    revisions.sort_by(|a, b| {
        let created = |r: &ControllerRevision| r.metadata.creation_timestamp.clone();
        number(a).cmp(&number(b)).then_with(|| created(a).cmp(&created(b))).then_with(|| name(&**a).cmp(name(&**b)))
    });
}

/// Decides. The revisions are in order.
pub fn newest<O: Historic>(owner: &O, revisions: &[Arc<ControllerRevision>]) -> Newest {
    let data = data(owner.template());
    let next = revisions.last().map_or(1, |last| number(last) + 1);
    // Of several that hold the same the last one counts.
    let position = revisions.iter().rposition(|revision| revision.data.0 == data);
    match position.map(|at| (&revisions[at], at + 1 == revisions.len())) {
        Some((revision, true)) => Newest::Known(revision.clone()),
        Some((revision, false)) => Newest::Again(revision.clone(), next),
        None => Newest::Make(Box::new(make(owner, data, next))),
    }
}

fn make<O: Historic>(owner: &O, data: Value, number: i64) -> ControllerRevision {
    let hash = template_hash(owner.template(), owner.collisions());
    let mut labels = owner.template().metadata.as_ref().and_then(|m| m.labels.clone()).unwrap_or_default();
    labels.insert(O::HASH.to_owned(), hash.clone());
    let prefix: String = name(owner).chars().take(LONGEST).collect();
    ControllerRevision {
        metadata: ObjectMeta {
            name: Some(format!("{prefix}-{hash}")),
            namespace: Some(namespace(owner).to_owned()),
            labels: Some(labels),
            annotations: owner.meta().annotations.clone(),
            owner_references: Some(vec![controller_reference(owner)]),
            ..ObjectMeta::default()
        },
        data: RawExtension(data),
        revision: Some(number),
    }
}

/// The revisions that history need not keep: the oldest of those that nothing uses, beyond the limit.
pub(crate) fn surplus<O: Historic>(
    owner: &O,
    revisions: &[Arc<ControllerRevision>],
    used: &BTreeSet<String>,
) -> Vec<Arc<ControllerRevision>> {
    let limit = owner.limit().and_then(|limit| usize::try_from(limit).ok()).unwrap_or(KEPT);
    let unused: Vec<_> = revisions.iter().filter(|r| !used.contains(name(&***r))).cloned().collect();
    let surplus = unused.len().saturating_sub(limit);
    unused.into_iter().take(surplus).collect()
}

impl Context {
    /// The owner's history, in order, after adopting what belongs to it.
    pub(crate) async fn revisions<O: Historic>(&self, owner: &O) -> anyhow::Result<Vec<Arc<ControllerRevision>>> {
        let cache = &self.caches.revisions;
        let mut revisions = cache.controlled_by(uid(owner));
        for orphan in cache.orphans(namespace(owner)) {
            let matches = selects(Some(owner.selector()), orphan.metadata.labels.as_ref());
            if matches && !is_deleting(owner) && !is_deleting(&*orphan) {
                self.confirm(owner).await?;
                revisions.push(Arc::new(self.patch(cache, &*orphan, adopt_patch(&*orphan, owner)).await?));
            }
        }
        sort(&mut revisions);
        Ok(revisions)
    }

    /// The revision of the owner's template: found, brought up again, or made. None if its name was taken by another
    /// template's, so that another has to be found, or if the namespace is going away.
    pub(crate) async fn newest_revision<O: Historic>(
        &self,
        owners: &Informer<O>,
        owner: &O,
        revisions: &[Arc<ControllerRevision>],
    ) -> anyhow::Result<Option<Arc<ControllerRevision>>> {
        let cache = &self.caches.revisions;
        match newest(owner, revisions) {
            Newest::Known(revision) => Ok(Some(revision)),
            Newest::Again(revision, number) => {
                Ok(Some(Arc::new(self.patch(cache, &*revision, json!({"revision": number})).await?)))
            }
            Newest::Make(revision) => match self.create(cache, namespace(owner), &*revision).await {
                Ok(made) => Ok(Some(Arc::new(made))),
                Err(kube::Error::Api(answer)) if answer.is_already_exists() => {
                    let there = self.api::<ControllerRevision>(namespace(owner)).get(name(&*revision)).await?;
                    let ours = controller_of(&there).is_some_and(|o| o.uid == uid(owner));
                    if ours && there.data.0 == revision.data.0 {
                        cache.note(there.clone());
                        return Ok(Some(Arc::new(there)));
                    }
                    let mut updated = owner.clone();
                    updated.collided();
                    self.replace_status(owners, &updated).await?;
                    Ok(None)
                }
                Err(error) if namespace_is_terminating(&error) => Ok(None),
                Err(error) => Err(error.into()),
            },
        }
    }
}
