//! Mirror pods: how a pod from a file shows in the API. What is to be done about them is decided here, purely.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::core::v1::{Node, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams, Preconditions},
};

use super::{MIRROR, hash};
use crate::pod;

/// A mirror, as the API has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// Its uid.
    pub uid: String,
    /// Of which version of the file it is.
    pub hash: String,
    /// Somebody has deleted it.
    pub deleted: bool,
}

impl Mirror {
    /// Of a pod, if it is one.
    pub fn of(pod: &Pod) -> Option<Mirror> {
        Some(Mirror {
            uid: pod::uid(pod).to_owned(),
            hash: pod.metadata.annotations.as_ref()?.get(MIRROR)?.clone(),
            deleted: pod.metadata.deletion_timestamp.is_some(),
        })
    }
}

/// What to do about a mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make it.
    Create,
    /// Take this one away: it is deleted, of another version, or of a pod that is no more.
    Delete(String),
}

/// What to do about each, by namespace and name. `files` are the versions that files have; `living` are those whose pod is
/// here, maybe in an earlier version.
pub fn steps(
    files: &BTreeMap<String, String>,
    mirrors: &BTreeMap<String, Mirror>,
    living: &BTreeSet<String>,
) -> Vec<(String, Step)> {
    let old = mirrors.iter().filter(|(name, mirror)| match files.get(*name) {
        Some(hash) => mirror.deleted || mirror.hash != *hash,
        // While it ends, it can be seen ending.
        None => mirror.deleted || !living.contains(*name),
    });
    let new = files.keys().filter(|name| !mirrors.contains_key(*name));
    old.map(|(name, mirror)| (name.clone(), Step::Delete(mirror.uid.clone())))
        .chain(new.map(|name| (name.clone(), Step::Create)))
        .collect()
}

/// The mirror of a pod, as it is made.
pub fn object(pod: &Pod, node: &str, node_uid: &str) -> Pod {
    let owner = OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: node.to_owned(),
        uid: node_uid.to_owned(),
        controller: Some(true),
        ..Default::default()
    };
    let mut annotations = pod.metadata.annotations.clone().unwrap_or_default();
    annotations.insert(MIRROR.into(), hash(pod).to_owned());
    let mut spec = pod.spec.clone();
    if let Some(spec) = &mut spec {
        // The API works it out from the class, and knows all of them.
        spec.priority = None;
    }
    Pod {
        metadata: ObjectMeta {
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            labels: pod.metadata.labels.clone(),
            annotations: Some(annotations),
            owner_references: Some(vec![owner]),
            ..Default::default()
        },
        spec,
        status: None,
    }
}

/// Makes the mirror of a pod.
pub async fn create(client: Client, pod: &Pod, node: &str) -> kube::Result<()> {
    let found = Api::<Node>::all(client.clone()).get(node).await?;
    let uid = found.metadata.uid.unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(client, pod::namespace(pod));
    api.create(&PostParams::default(), &object(pod, node, &uid)).await.map(drop)
}

/// Takes the mirror with this uid away, at once: nothing depends on it.
pub async fn delete(client: Client, namespace: &str, name: &str, uid: String) -> kube::Result<()> {
    let api: Api<Pod> = Api::namespaced(client, namespace);
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid: Some(uid), resource_version: None }),
        ..Default::default()
    };
    match api.delete(name, &params).await {
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_becomes_of_mirrors() {
        let check = |files: &[(&str, &str)], mirrors: &[(&str, &str, bool)], living: &[&str], expect: &[&str]| {
            let files = files.iter().map(|(name, hash)| ((*name).to_owned(), (*hash).to_owned())).collect();
            let mirror = |hash: &str, deleted| Mirror { uid: format!("u{hash}"), hash: hash.to_owned(), deleted };
            let mirrors = mirrors.iter().map(|(name, hash, deleted)| ((*name).to_owned(), mirror(hash, *deleted)));
            let living = living.iter().map(|name| (*name).to_owned()).collect();
            let found = steps(&files, &mirrors.collect(), &living);
            let found: Vec<String> = found
                .into_iter()
                .map(|(name, step)| match step {
                    Step::Create => format!("create {name}"),
                    Step::Delete(uid) => format!("delete {name} {uid}"),
                })
                .collect();
            assert_eq!(found, expect);
        };
        check(&[("a", "1")], &[], &["a"], &["create a"]);
        check(&[("a", "1")], &[("a", "1", false)], &["a"], &[]);
        // Deleted: it goes, and is made again.
        check(&[("a", "1")], &[("a", "1", true)], &["a"], &["delete a u1"]);
        // The file changed.
        check(&[("a", "2")], &[("a", "1", false)], &["a"], &["delete a u1"]);
        // The file is gone: the mirror goes after the pod.
        check(&[], &[("a", "1", false)], &["a"], &[]);
        check(&[], &[("a", "1", false)], &[], &["delete a u1"]);
        check(&[("b", "1")], &[("a", "1", false)], &["b"], &["delete a u1", "create b"]);
    }

    #[test]
    fn a_mirror() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p-n", "namespace": "s", "uid": "h",
            "labels": {"a": "b"}, "annotations": {"kubernetes.io/config.hash": "h"}},
            "spec": {"containers": [], "priority": 5}, "status": {"phase": "Running"}}))
        .unwrap();
        let mirror = serde_json::to_value(object(&pod, "n", "nu")).unwrap();
        assert_eq!(
            mirror["metadata"],
            json!({"name": "p-n", "namespace": "s", "labels": {"a": "b"},
                "annotations": {"kubernetes.io/config.hash": "h", "kubernetes.io/config.mirror": "h"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "nu", "controller": true}]})
        );
        assert!(mirror["spec"]["priority"].is_null() && mirror["status"].is_null());
        let of = Mirror::of(&object(&pod, "n", "nu")).unwrap();
        assert_eq!((of.hash.as_str(), of.deleted), ("h", false));
        assert_eq!(Mirror::of(&pod), None);
    }
}
