//! From a file to a pod.

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Toleration};
use seawall_api::{
    field::Errors,
    resources,
    row::{Row, Validation},
};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{HASH, SEEN, SOURCE};

/// Why a file is no pod that can be run here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Malformed {
    /// It is neither YAML nor JSON.
    #[error("cannot be read as YAML: {0}")]
    Text(String),
    /// It is something else.
    #[error("holds {0}, and a Pod of v1 is needed: one in each file")]
    Kind(String),
    /// A field is wrong.
    #[error("{0}")]
    Invalid(String),
    /// It needs the API, which a pod from a file may have to do without.
    #[error("static pods may not reference {0}: use hostPath volumes and plain values instead")]
    Reference(&'static str),
}

/// Keys of a pod's spec that lead to other objects, and what these are.
const REFERENCES: [(&str, &str); 16] = [
    ("serviceAccountName", "a service account"),
    ("serviceAccount", "a service account"),
    ("serviceAccountToken", "a service account"),
    ("secret", "secrets"),
    ("secretRef", "secrets"),
    ("secretKeyRef", "secrets"),
    ("secretName", "secrets"),
    ("imagePullSecrets", "secrets"),
    ("nodePublishSecretRef", "secrets"),
    ("configMap", "configmaps"),
    ("configMapRef", "configmaps"),
    ("configMapKeyRef", "configmaps"),
    ("clusterTrustBundle", "clustertrustbundles"),
    ("persistentVolumeClaim", "persistentvolumeclaims"),
    ("ephemeral", "persistentvolumeclaims"),
    ("resourceClaims", "resourceclaims"),
];

/// The keys of a value and of those in it, but for what has no content.
fn keys<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter().filter(|(_, v)| !v.is_null() && v.as_str() != Some("")) {
                found.insert(key);
                // Labels to select nodes by are the user's words.
                if key != "nodeSelector" {
                    keys(value, found);
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| keys(value, found)),
        _ => {}
    }
}

/// The priorities that are known without the API.
fn priority(class: Option<&str>) -> i32 {
    match class {
        Some("system-node-critical") => 2_000_001_000,
        Some("system-cluster-critical") => 2_000_000_000,
        _ => 0,
    }
}

fn row() -> Option<Row> {
    resources::all().into_iter().find(|row| row.group.is_empty() && row.plural == "pods")
}

/// Reads a pod from the content of `file`, as the node of this name runs it: with defaults, a name that ends with the
/// node's, and a uid that changes with the content.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str, file: &str, node: &str, seen: Timestamp) -> Result<Pod, Malformed> {
    let mut value: Value = serde_yaml_ng::from_str(text).map_err(|error| Malformed::Text(error.to_string()))?;
    if value["kind"] != "Pod" || value["apiVersion"] != "v1" {
        let what = format!("apiVersion {}, kind {}", value["apiVersion"], value["kind"]);
        return Err(Malformed::Kind(what));
    }
    let mut found = BTreeSet::new();
    keys(&value["spec"], &mut found);
    if let Some((_, what)) = REFERENCES.iter().find(|(key, _)| found.contains(key)) {
        return Err(Malformed::Reference(what));
    }
    let digest = Sha256::digest(format!("host:{node}\0file:{file}\0{value}"));
    let hash: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();

    let name = value["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    if name.is_empty() {
        return Err(Malformed::Invalid("metadata.name: Required value: name is required".into()));
    }
    if value["metadata"]["namespace"].as_str().is_none_or(str::is_empty) {
        value["metadata"]["namespace"] = "default".into();
    }
    value["metadata"]["name"] = format!("{name}-{}", node.to_lowercase()).into();
    // Types first: what has the wrong ones has no defaults.
    let invalid = |error: serde_json::Error| Malformed::Invalid(error.to_string());
    serde_json::from_value::<Pod>(value.clone()).map_err(invalid)?;
    if let Some(row) = row() {
        (row.defaults)(&mut value);
        let mut errors = Errors::default();
        row.check(&Validation { new: &value, old: None, subresource: "" }, &mut errors);
        if !errors.is_empty() {
            return Err(Malformed::Invalid(errors.to_string()));
        }
    }
    let mut pod: Pod = serde_json::from_value(value).map_err(invalid)?;
    pod.metadata.uid = Some(hash.clone());
    pod.metadata.owner_references = None;
    pod.metadata.finalizers = None;
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.remove(super::MIRROR);
    annotations.insert(HASH.into(), hash);
    annotations.insert(SOURCE.into(), "file".into());
    annotations.insert(SEEN.into(), seen.to_string());
    if let Some(spec) = &mut pod.spec {
        spec.node_name = Some(node.to_owned());
        spec.priority = Some(priority(spec.priority_class_name.as_deref()));
        // It stays whatever is wrong with the node: nobody else runs it.
        let everything =
            Toleration { operator: Some("Exists".into()), effect: Some("NoExecute".into()), ..Default::default() };
        let tolerations = spec.tolerations.get_or_insert_default();
        if !tolerations.contains(&everything) {
            tolerations.push(everything);
        }
    }
    pod.status = Some(Default::default());
    Ok(pod)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod;

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: etcd, namespace: kube-system}
spec:
  hostNetwork: true
  priorityClassName: system-node-critical
  containers: [{name: etcd, image: 'etcd:1'}]
";

    fn read(text: &str) -> Result<Pod, Malformed> {
        parse(text, "/manifests/etcd.yaml", "Node-1", Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn what_a_file_becomes() {
        let pod = read(POD).unwrap();
        assert_eq!((pod::namespace(&pod), pod::name(&pod)), ("kube-system", "etcd-node-1"));
        let annotations = pod.metadata.annotations.clone().unwrap();
        assert_eq!((annotations[HASH].as_str(), annotations[SOURCE].as_str()), (pod::uid(&pod), "file"));
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!((spec.node_name.as_deref(), spec.priority), (Some("Node-1"), Some(2_000_001_000)));
        assert_eq!(spec.restart_policy.as_deref(), Some("Always"), "it has defaults");
        assert!(spec.tolerations.iter().flatten().any(|t| t.effect.as_deref() == Some("NoExecute") && t.key.is_none()));
        // The same content is the same pod, whenever it is read; another is another.
        let again = parse(POD, "/manifests/etcd.yaml", "Node-1", Timestamp::from_second(5).unwrap()).unwrap();
        assert_eq!(pod::uid(&again), pod::uid(&pod));
        assert_ne!(pod::uid(&read(&POD.replace("etcd:1", "etcd:2")).unwrap()), pod::uid(&pod));
        assert_ne!(pod::uid(&parse(POD, "/other", "Node-1", Timestamp::UNIX_EPOCH).unwrap()), pod::uid(&pod));
        // In JSON too, and in the namespace default.
        let json = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}"#;
        assert_eq!(pod::namespace(&read(json).unwrap()), "default");
    }

    #[test]
    fn what_is_refused() {
        let with = |more: &str| read(&format!("{POD}{more}")).unwrap_err().to_string();
        for (more, expect) in [
            ("  serviceAccountName: robot\n", "static pods may not reference a service account"),
            ("  imagePullSecrets: [{name: s}]\n", "static pods may not reference secrets"),
            ("  volumes: [{name: v, configMap: {name: c}}]\n", "static pods may not reference configmaps"),
            (
                "  volumes: [{name: v, persistentVolumeClaim: {claimName: c}}]\n",
                "static pods may not reference persistentvolumeclaims",
            ),
            ("  restartPolicy: Sometimes\n", "spec.restartPolicy: Unsupported value: \"Sometimes\""),
        ] {
            let said = with(more);
            assert!(said.contains(expect), "{said}");
        }
        let refuses = |text: &str, expect: &str| {
            let said = read(text).unwrap_err().to_string();
            assert!(said.contains(expect), "{text}: {said}");
        };
        refuses("a: [", "cannot be read as YAML");
        refuses("{apiVersion: v1, kind: Service}", "holds apiVersion \"v1\", kind \"Service\"");
        refuses("", "a Pod of v1 is needed");
        refuses("{apiVersion: v1, kind: Pod, spec: {containers: []}}", "metadata.name: Required value");
        refuses(&POD.replace("hostNetwork: true", "hostNetwork: maybe"), "invalid type");
        refuses(&POD.replace("name: etcd, image: 'etcd:1'", "name: Etcd, image: x"), "spec.containers[0].name");
        // A label that is called like a reference is none.
        assert!(read(&format!("{POD}  nodeSelector: {{secret: 'yes'}}\n")).is_ok());
    }
}
