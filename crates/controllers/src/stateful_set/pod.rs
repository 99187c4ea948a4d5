//! The pods of a StatefulSet: their names, labels, volumes and claims
//! (<https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#pod-identity>).

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{
    api::{
        apps::v1::StatefulSet,
        core::v1::{PersistentVolumeClaim, PersistentVolumeClaimVolumeSource, Pod, PodTemplateSpec, Volume},
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};

use crate::{
    replica_set::pod_from_template,
    runtime::objects::{Labels, controller_reference, is_deleting, is_ready, name, namespace, phase, uid},
};

/// Which revision a pod was made from.
pub(super) const REVISION: &str = "controller-revision-hash";
const POD_NAME: &str = "statefulset.kubernetes.io/pod-name";
const POD_INDEX: &str = "apps.kubernetes.io/pod-index";

/// The number of the first replica.
pub(super) fn start(set: &StatefulSet) -> i64 {
    set.spec.ordinals.as_ref().and_then(|o| o.start).unwrap_or(0).into()
}

/// How many replicas are wanted.
pub(super) fn wanted(set: &StatefulSet) -> i64 {
    i64::from(set.spec.replicas.unwrap_or(1)).max(0)
}

/// Whether a number is one that the set wants.
pub(super) fn in_range(set: &StatefulSet, ordinal: i64) -> bool {
    (start(set)..start(set) + wanted(set)).contains(&ordinal)
}

/// The number in a pod's name, if it is one of this set's.
pub(super) fn ordinal(set: &StatefulSet, pod: &Pod) -> Option<i64> {
    let (parent, number) = name(pod).rsplit_once('-')?;
    // Only the way in which we would write it: `web-01` is not one of ours.
    let parsed: u32 = number.parse().ok()?;
    (parent == name(set) && parsed.to_string() == number).then(|| parsed.into())
}

/// The revision of a pod, or nothing.
pub(super) fn revision_of(pod: &Pod) -> &str {
    pod.metadata.labels.as_ref().and_then(|labels| labels.get(REVISION)).map(String::as_str).unwrap_or_default()
}

pub(super) fn is_running_and_ready(pod: &Pod) -> bool {
    phase(pod) == "Running" && is_ready(pod)
}

pub(super) fn is_healthy(pod: &Pod) -> bool {
    is_running_and_ready(pod) && !is_deleting(pod)
}

/// The labels that tell who a pod is.
pub(super) fn identity(pod_name: &str, ordinal: i64) -> Labels {
    BTreeMap::from([(POD_NAME.to_owned(), pod_name.to_owned()), (POD_INDEX.to_owned(), ordinal.to_string())])
}

/// The claim of a template for the pod with this number.
pub(super) fn claim_name(set: &StatefulSet, template: &PersistentVolumeClaim, ordinal: i64) -> String {
    format!("{}-{}-{ordinal}", name(template), name(set))
}

/// The claims that a pod with this number has.
pub(super) fn claims(set: &StatefulSet, ordinal: i64) -> Vec<PersistentVolumeClaim> {
    let templates = set.spec.volume_claim_templates.iter().flatten();
    let make = |template: &PersistentVolumeClaim| {
        let mut claim = template.clone();
        claim.metadata.name = Some(claim_name(set, template, ordinal));
        claim.metadata.namespace = Some(namespace(set).to_owned());
        let selected = set.spec.selector.match_labels.clone().unwrap_or_default();
        claim.metadata.labels.get_or_insert_default().extend(selected);
        claim.status = None;
        claim
    };
    templates.map(make).collect()
}

/// A new pod from this template.
pub(super) fn make(set: &StatefulSet, template: &PodTemplateSpec, revision: &str, ordinal: i64) -> Pod {
    let mut pod = pod_from_template(template, String::new(), controller_reference(set));
    let pod_name = format!("{}-{ordinal}", name(set));
    pod.metadata.generate_name = None;
    pod.metadata.name = Some(pod_name.clone());
    pod.metadata.namespace = Some(namespace(set).to_owned());
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.extend(identity(&pod_name, ordinal));
    labels.insert(REVISION.to_owned(), revision.to_owned());
    let spec = pod.spec.get_or_insert_default();
    spec.hostname = Some(pod_name);
    spec.subdomain = set.spec.service_name.clone().filter(|name| !name.is_empty());
    let templates = set.spec.volume_claim_templates.as_deref().unwrap_or_default();
    if !templates.is_empty() {
        let claimed = |template: &PersistentVolumeClaim| Volume {
            name: name(template).to_owned(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim_name(set, template, ordinal),
                read_only: None,
            }),
            ..Volume::default()
        };
        // A claim takes the place of a volume of the same name in the template.
        let others = spec.volumes.take().unwrap_or_default();
        let others = others.into_iter().filter(|v| !templates.iter().any(|t| name(t) == v.name));
        spec.volumes = Some(templates.iter().map(claimed).chain(others).collect());
    }
    pod
}

/// Who should own a claim so that it goes when its retention policy says so (KEP-1847): its owners, if they have to be
/// changed. `pod` is the pod that has the number now.
pub(super) fn retained(
    set: &StatefulSet,
    claim: &PersistentVolumeClaim,
    ordinal: i64,
    pod: Option<&Arc<Pod>>,
) -> Option<Vec<OwnerReference>> {
    let policy = set.spec.persistent_volume_claim_retention_policy.clone().unwrap_or_default();
    let deletes = |when: Option<String>| when.as_deref() == Some("Delete");
    let (deleted, scaled) = (deletes(policy.when_deleted), deletes(policy.when_scaled));
    let surplus = !in_range(set, ordinal);
    let by_pod = scaled && surplus;
    let by_set = deleted && !by_pod;
    let old = claim.metadata.owner_references.clone().unwrap_or_default();
    let is_set = |owner: &OwnerReference| owner.kind == "StatefulSet" && owner.name == name(set);
    let is_pod = |owner: &OwnerReference| owner.kind == "Pod" && owner.name == format!("{}-{ordinal}", name(set));
    let mut new: Vec<OwnerReference> = old.iter().filter(|o| !is_set(o) && !is_pod(o)).cloned().collect();
    let owner = |api: &str, kind: &str, name: &str, uid: &str| OwnerReference {
        api_version: api.into(),
        kind: kind.into(),
        name: name.into(),
        uid: uid.into(),
        ..OwnerReference::default()
    };
    if by_set {
        new.push(owner("apps/v1", "StatefulSet", name(set), uid(set)));
    }
    match pod {
        Some(pod) if by_pod => new.push(owner("v1", "Pod", name(&**pod), uid(&**pod))),
        _ => {}
    }
    let key = |owner: &OwnerReference| owner.uid.clone();
    let same = old.len() == new.len() && new.iter().all(|n| old.iter().any(|o| key(o) == key(n)));
    (!same).then_some(new)
}

/// Whether a claim is going with a pod that had the number before: a new pod must not use it.
pub(super) fn is_stale(set: &StatefulSet, claim: &PersistentVolumeClaim, ordinal: i64, pod: Option<&Arc<Pod>>) -> bool {
    let pod_name = format!("{}-{ordinal}", name(set));
    let mut owners = claim.metadata.owner_references.iter().flatten();
    let other = |o: &OwnerReference| pod.is_none_or(|pod| uid(&**pod) != o.uid);
    is_deleting(claim) || owners.any(|o| o.kind == "Pod" && o.name == pod_name && other(o))
}
