//! What a node may do: what it needs for the pods that are bound to it, and no more
//! (<https://kubernetes.io/docs/reference/access-authn-authz/node/>).
//!
//! Upstream keeps a graph of who refers to what. Here the question is put to the snapshot when it is asked: the pods of
//! one namespace on one node are few, and only those whose text holds the name are read.
//!
//! What a write may contain is not known here; that is checked by the NodeRestriction admission.

use std::sync::Arc;

use serde_json::Value;

use super::{
    NODES, UserInfo,
    authorize::{Attributes, Knowledge},
    rbac::{Index, Rbac},
};
use crate::{
    cache::{Cache, Snapshot},
    object::Object,
    registry::Registry,
};

/// Where the leases of nodes are.
pub const LEASES: &str = "kube-node-lease";

/// The Secret with the keys of the machines' gossip, of which every node is a member: its namespace and its name.
pub const GOSSIP: (&str, &str) = ("kube-system", "seawall-gossip");

/// The ConfigMap that says whom the cluster's DNS asks for other names; every node has a part of it.
pub const DNS: (&str, &str) = ("kube-system", "seawall-dns");

/// The name of the node that a user is: `None` if the user is none, an empty name if it is one without a name.
pub fn identity(user: &UserInfo) -> Option<&str> {
    user.username.strip_prefix("system:node:").filter(|_| user.is_in(NODES))
}

/// What pods refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A pod itself.
    Pod,
    /// A Secret.
    Secret,
    /// A ConfigMap.
    ConfigMap,
    /// A PersistentVolumeClaim.
    Claim,
    /// A PersistentVolume.
    Volume,
    /// A ServiceAccount.
    Account,
    /// A VolumeAttachment.
    Attachment,
}

/// Whether a node has to do with an object.
pub trait Relations: Send + Sync {
    /// Whether a pod that is bound to `node` refers to this object.
    fn relate(&self, node: &str, kind: Kind, namespace: &str, name: &str) -> bool;
}

/// Decides. The reasons are upstream's.
pub fn authorize(node: &str, a: &Attributes<'_>, relations: &dyn Relations) -> Result<(), String> {
    let related = |kind: Kind| {
        if a.name.is_empty() {
            return Err("No Object name found".to_owned());
        }
        match relations.relate(node, kind, a.namespace, a.name) {
            true => Ok(()),
            false => Err(format!("no relationship found between node '{node}' and this object")),
        }
    };
    let only_get = |kind: Kind| match (a.verb, a.subresource) {
        ("get", "") => related(kind),
        ("get", _) => Err("cannot get subresource".into()),
        _ => Err("can only get individual resources of this type".into()),
    };
    let read = matches!(a.verb, "get" | "list" | "watch");
    let allow = |yes: bool| if yes { Ok(()) } else { Err(String::new()) };
    match (a.group, a.resource) {
        ("", "secrets") if (a.namespace, a.name) == GOSSIP => readable(a),
        ("", "secrets") => readable(a).and_then(|()| related(Kind::Secret)),
        ("", "configmaps") if (a.namespace, a.name) == DNS => readable(a),
        ("", "configmaps") => readable(a).and_then(|()| related(Kind::ConfigMap)),
        ("", "persistentvolumeclaims") => only_get(Kind::Claim),
        ("", "persistentvolumes") => only_get(Kind::Volume),
        ("storage.k8s.io", "volumeattachments") => only_get(Kind::Attachment),
        ("", "serviceaccounts") => match (a.verb, a.name, a.subresource) {
            ("create", name, "token") if !name.is_empty() => related(Kind::Account),
            ("create", name, _) if !name.is_empty() => {
                Err("can only create token subresource of serviceaccount".into())
            }
            _ => Err("can only create tokens for individual service accounts".into()),
        },
        ("coordination.k8s.io", "leases") => lease(node, a),
        ("storage.k8s.io", "csinodes") => own(node, a, "CSINode"),
        ("", "pods") => match (a.subresource, a.verb) {
            ("", "get") => related(Kind::Pod),
            // All of them, since a policy of a pod here may mean any pod by its labels, and enforcing policies is the business
            // of this same identity. (Where a network plugin does it, its account has this right on every node.)
            ("", "list" | "watch") => Ok(()),
            // Which ones is for admission to see.
            ("", "create" | "delete") | ("status", "update" | "patch") | ("eviction", "create") => Ok(()),
            _ => Err(String::new()),
        },
        ("", "nodes") => match (a.subresource, a.verb) {
            // All of them, since routes to them and the balancing of Services are the business of this same identity.
            ("", "get" | "list" | "watch") => Ok(()),
            ("", "create" | "update" | "patch") | ("status", "update" | "patch") => Ok(()),
            _ => Err(String::new()),
        },
        ("", "services" | "endpoints" | "namespaces")
        | ("discovery.k8s.io", "endpointslices")
        | ("networking.k8s.io", "networkpolicies")
        | ("node.k8s.io", "runtimeclasses")
        | ("storage.k8s.io", "csidrivers") => allow(read && a.subresource.is_empty()),
        ("", "events") | ("events.k8s.io", "events") => allow(matches!(a.verb, "create" | "update" | "patch")),
        ("certificates.k8s.io", "certificatesigningrequests") => {
            allow((read || a.verb == "create") && a.subresource.is_empty())
        }
        ("authentication.k8s.io", "tokenreviews")
        | ("authorization.k8s.io", "subjectaccessreviews" | "localsubjectaccessreviews") => allow(a.verb == "create"),
        _ => Err(String::new()),
    }
}

/// Whether one object of a namespace is read.
fn readable(a: &Attributes<'_>) -> Result<(), String> {
    if !matches!(a.verb, "get" | "list" | "watch") {
        return Err("can only read resources of this type".into());
    }
    if !a.subresource.is_empty() {
        return Err("cannot read subresource".into());
    }
    if a.namespace.is_empty() {
        return Err("can only read namespaced object of this type".into());
    }
    Ok(())
}

fn lease(node: &str, a: &Attributes<'_>) -> Result<(), String> {
    if !matches!(a.verb, "get" | "create" | "update" | "patch" | "delete") {
        return Err("can only get, create, update, patch, or delete a node lease".into());
    }
    if a.namespace != LEASES {
        return Err(format!("can only access leases in the {LEASES:?} system namespace"));
    }
    // Under which name one is created is for admission to see.
    if a.verb != "create" && a.name != node {
        return Err("can only access node lease with the same name as the requesting node".into());
    }
    Ok(())
}

fn own(node: &str, a: &Attributes<'_>, kind: &str) -> Result<(), String> {
    if !matches!(a.verb, "get" | "create" | "update" | "patch" | "delete") {
        return Err(format!("can only get, create, update, patch, or delete a {kind}"));
    }
    if !a.subresource.is_empty() {
        return Err(format!("cannot authorize {kind} subresources"));
    }
    if a.verb != "create" && a.name != node {
        return Err(format!("can only access {kind} with the same name as the requesting node"));
    }
    Ok(())
}

/// The relations in the newest snapshot.
pub struct Known {
    /// Where the resources are found.
    pub registry: Arc<Registry>,
    /// What there is.
    pub cache: Arc<Cache>,
    /// Who has which role.
    pub rbac: Arc<Rbac>,
}

impl Knowledge for Known {
    fn rbac(&self) -> Arc<Index> {
        self.rbac.index(&self.registry, &self.cache.snapshot())
    }
}

impl Relations for Known {
    fn relate(&self, node: &str, kind: Kind, namespace: &str, name: &str) -> bool {
        let snapshot = self.cache.snapshot();
        let find = |group: &str, plural: &str, namespace: &str, name: &str| -> Option<Value> {
            let (id, row) = self.registry.by_name(group, plural)?;
            snapshot.get(id, &row.key(namespace, name)).map(|o| o.value())
        };
        match kind {
            Kind::Pod => self.pod(&snapshot, namespace, name).is_some_and(|(_, on)| on == node),
            Kind::Account | Kind::ConfigMap | Kind::Claim => self.used(&snapshot, node, kind, namespace, name),
            Kind::Secret => {
                self.used(&snapshot, node, kind, namespace, name)
                    || self.used_by_volume(&snapshot, node, namespace, name)
            }
            Kind::Volume => {
                find("", "persistentvolumes", "", name).is_some_and(|volume| self.claimed(&snapshot, node, &volume))
            }
            Kind::Attachment => find("storage.k8s.io", "volumeattachments", "", name)
                .is_some_and(|attachment| attachment["spec"]["nodeName"] == node),
        }
    }
}

impl Known {
    /// A pod, and its node.
    fn pod(&self, snapshot: &Snapshot, namespace: &str, name: &str) -> Option<(Arc<Object>, String)> {
        let (id, row) = self.registry.by_name("", "pods")?;
        let pod = snapshot.get(id, &row.key(namespace, name))?;
        Some((pod.clone(), pod.field(row, "spec.nodeName").to_owned()))
    }

    /// Whether a pod of this namespace on this node refers to an object.
    fn used(&self, snapshot: &Snapshot, node: &str, kind: Kind, namespace: &str, name: &str) -> bool {
        let Some((id, row)) = self.registry.by_name("", "pods") else { return false };
        let prefix = format!("{}{namespace}/", row.prefix());
        let mut pods = snapshot.range(id, &prefix, None).filter(|pod| pod.field(row, "spec.nodeName") == node);
        // A claim of an ephemeral volume is named after pod and volume.
        pods.any(|pod| (kind == Kind::Claim || mentions(pod, name)) && refers(&pod.value(), kind, name))
    }

    /// Whether a volume that a pod on this node has claimed needs a Secret of this namespace to be mounted.
    fn used_by_volume(&self, snapshot: &Snapshot, node: &str, namespace: &str, name: &str) -> bool {
        let Some((id, row)) = self.registry.by_name("", "persistentvolumes") else { return false };
        let prefix = row.prefix();
        let mut volumes = snapshot.range(id, &prefix, None).filter(|volume| mentions(volume, name));
        volumes.any(|volume| {
            let volume = volume.value();
            needs_secret(&volume, namespace, name) && self.claimed(snapshot, node, &volume)
        })
    }

    fn claimed(&self, snapshot: &Snapshot, node: &str, volume: &Value) -> bool {
        let claim = &volume["spec"]["claimRef"];
        if let (Some(namespace), Some(name)) = (claim["namespace"].as_str(), claim["name"].as_str()) {
            return self.used(snapshot, node, Kind::Claim, namespace, name);
        }
        // Nobody binds volumes yet: one that nobody has claimed belongs to the claims that name it.
        let name = volume["metadata"]["name"].as_str().unwrap_or_default();
        let Some((id, row)) = self.registry.by_name("", "persistentvolumeclaims") else { return false };
        let prefix = row.prefix();
        let mut claims = snapshot.range(id, &prefix, None).filter(|claim| mentions(claim, name));
        claims.any(|claim| {
            claim.value()["spec"]["volumeName"] == name
                && self.used(snapshot, node, Kind::Claim, claim.namespace(row), claim.name())
        })
    }
}

/// Whether the text of an object holds a name. Names are written as they are, without escapes.
fn mentions(object: &Object, name: &str) -> bool {
    let needle = name.as_bytes();
    !needle.is_empty() && object.bytes.windows(needle.len()).any(|w| w == needle)
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

/// Whether a pod refers to an object of its namespace.
pub fn refers(pod: &Value, kind: Kind, name: &str) -> bool {
    // One that mirrors a node's own pod gives the node no rights.
    if !pod["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_null() {
        return false;
    }
    let spec = &pod["spec"];
    let is = |value: &Value| value == name;
    let volumes = || list(spec, "volumes");
    let projected = || volumes().flat_map(|v| list(&v["projected"], "sources"));
    match kind {
        Kind::Account => is(&spec["serviceAccountName"]),
        Kind::Claim => {
            let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default();
            volumes().any(|v| {
                let ephemeral = v["ephemeral"].is_object()
                    && name == format!("{pod_name}-{}", v["name"].as_str().unwrap_or_default());
                is(&v["persistentVolumeClaim"]["claimName"]) || ephemeral
            })
        }
        Kind::ConfigMap => {
            volumes().any(|v| is(&v["configMap"]["name"]))
                || projected().any(|s| is(&s["configMap"]["name"]))
                || environment(spec, "configMapRef", "configMapKeyRef", name)
        }
        Kind::Secret => {
            list(spec, "imagePullSecrets").any(|s| is(&s["name"]))
                || volumes().any(|v| is(&v["secret"]["secretName"]) || volume_secret(v, name))
                || projected().any(|s| is(&s["secret"]["name"]))
                || environment(spec, "secretRef", "secretKeyRef", name)
        }
        Kind::Pod | Kind::Volume | Kind::Attachment => false,
    }
}

fn environment(spec: &Value, whole: &str, key: &str, name: &str) -> bool {
    let lists = ["initContainers", "containers", "ephemeralContainers"];
    lists.iter().flat_map(|l| list(spec, l)).any(|container| {
        list(container, "envFrom").any(|e| e[whole]["name"] == name)
            || list(container, "env").any(|e| e["valueFrom"][key]["name"] == name)
    })
}

/// The Secrets with which older kinds of volumes are mounted.
fn volume_secret(volume: &Value, name: &str) -> bool {
    let sources = ["cephfs", "flexVolume", "iscsi", "rbd", "scaleIO", "storageos"];
    sources.iter().any(|s| volume[*s]["secretRef"]["name"] == name)
        || volume["csi"]["nodePublishSecretRef"]["name"] == name
        || volume["azureFile"]["secretName"] == name
}

/// Whether a PersistentVolume needs a Secret on the node.
fn needs_secret(volume: &Value, namespace: &str, name: &str) -> bool {
    let spec = &volume["spec"];
    // Where no namespace is said, it is that of the claim.
    let is = |reference: &Value| {
        let found = reference["namespace"].as_str().or(spec["claimRef"]["namespace"].as_str());
        reference["name"] == name && found == Some(namespace)
    };
    let sources = ["cephfs", "flexVolume", "iscsi", "rbd", "scaleIO", "storageos"];
    let csi = ["nodePublishSecretRef", "nodeStageSecretRef", "nodeExpandSecretRef"];
    let azure = &spec["azureFile"];
    sources.iter().any(|s| is(&spec[*s]["secretRef"]))
        || csi.iter().any(|key| is(&spec["csi"][*key]))
        || azure["secretName"] == name
            && azure["secretNamespace"].as_str().or(spec["claimRef"]["namespace"].as_str()) == Some(namespace)
}

#[cfg(test)]
mod tests {
    use seawall_api::selector::parse_fields;
    use serde_json::json;

    use super::*;

    /// Node `a` has to do with everything that is named `mine`.
    struct Mine;

    impl Relations for Mine {
        fn relate(&self, node: &str, _: Kind, _: &str, name: &str) -> bool {
            (node, name) == ("a", "mine")
        }
    }

    #[test]
    fn what_a_node_may_ask_for() {
        let check = |request: &str, expect: Result<(), &str>| {
            // verb group/resource/subresource namespace name selector
            let words: Vec<&str> = request.split(' ').map(|w| if w == "-" { "" } else { w }).collect();
            let mut resource = words[1].split('/');
            let fields = parse_fields(words.get(4).copied().unwrap_or_default()).unwrap();
            let attributes = Attributes {
                verb: words[0],
                group: resource.next().unwrap(),
                resource: resource.next().unwrap(),
                subresource: resource.next().unwrap_or_default(),
                namespace: words[2],
                name: words[3],
                fields: &fields,
                path: "",
            };
            assert_eq!(authorize("a", &attributes, &Mine), expect.map_err(str::to_owned), "{request}");
        };
        let unrelated = Err("no relationship found between node 'a' and this object");
        for kind in ["secrets", "configmaps"] {
            check(&format!("get /{kind} ns mine"), Ok(()));
            check(&format!("watch /{kind} ns mine"), Ok(()));
            check(&format!("list /{kind} ns mine"), Ok(()));
            check(&format!("get /{kind} ns other"), unrelated);
            check(&format!("list /{kind} ns -"), Err("No Object name found"));
            check(&format!("list /{kind} - mine"), Err("can only read namespaced object of this type"));
            check(&format!("update /{kind} ns mine"), Err("can only read resources of this type"));
            check(&format!("get /{kind}/status ns mine"), Err("cannot read subresource"));
        }
        check("get /persistentvolumeclaims ns mine", Ok(()));
        check("get /persistentvolumeclaims ns other", unrelated);
        check("list /persistentvolumeclaims ns mine", Err("can only get individual resources of this type"));
        check("get /persistentvolumes - mine", Ok(()));
        check("get /persistentvolumes/status - mine", Err("cannot get subresource"));
        check("get storage.k8s.io/volumeattachments - other", unrelated);
        check("create /serviceaccounts/token ns mine", Ok(()));
        check("create /serviceaccounts/token ns other", unrelated);
        check("create /serviceaccounts ns -", Err("can only create tokens for individual service accounts"));
        check("create /serviceaccounts/x ns mine", Err("can only create token subresource of serviceaccount"));
        check("get /serviceaccounts ns mine", Err("can only create tokens for individual service accounts"));
        check("update coordination.k8s.io/leases kube-node-lease a", Ok(()));
        check("create coordination.k8s.io/leases kube-node-lease -", Ok(()));
        check(
            "update coordination.k8s.io/leases kube-node-lease b",
            Err("can only access node lease with the same name as the requesting node"),
        );
        check(
            "get coordination.k8s.io/leases kube-system a",
            Err("can only access leases in the \"kube-node-lease\" system namespace"),
        );
        check(
            "list coordination.k8s.io/leases kube-node-lease -",
            Err("can only get, create, update, patch, or delete a node lease"),
        );
        check("get storage.k8s.io/csinodes - a", Ok(()));
        check(
            "get storage.k8s.io/csinodes - b",
            Err("can only access CSINode with the same name as the requesting node"),
        );
        check("get /pods ns mine", Ok(()));
        check("get /pods ns other", unrelated);
        check("list /pods - - spec.nodeName=a", Ok(()));
        check("watch /pods - - spec.nodeName=a,status.phase!=Failed", Ok(()));
        check("list /pods - -", Ok(()));
        check("watch /pods - -", Ok(()));
        check("watch networking.k8s.io/networkpolicies - -", Ok(()));
        check("update networking.k8s.io/networkpolicies ns x", Err(""));
        check("patch /pods/status ns other", Ok(()));
        check("create /pods/eviction ns other", Ok(()));
        check("delete /pods ns other", Ok(()));
        for denied in [
            "get /pods/exec ns mine",
            "create /pods/binding ns mine",
            "update /pods ns mine",
            "deletecollection /pods ns -",
        ] {
            check(denied, Err(""));
        }
        check("list /nodes - -", Ok(()));
        check("patch /nodes/status - b", Ok(()));
        check("delete /nodes - a", Err(""));
        check("watch /services - -", Ok(()));
        check("watch discovery.k8s.io/endpointslices - -", Ok(()));
        check("create /events ns -", Ok(()));
        check("delete /events ns x", Err(""));
        check("create certificates.k8s.io/certificatesigningrequests - -", Ok(()));
        check("watch certificates.k8s.io/certificatesigningrequests - x", Ok(()));
        check("update certificates.k8s.io/certificatesigningrequests/approval - x", Err(""));
        check("create authentication.k8s.io/tokenreviews - -", Ok(()));
        check("get /namespaces - ns", Ok(()));
        check("update /namespaces - ns", Err(""));
        check("list apps/deployments ns -", Err(""));
    }

    #[test]
    fn who_is_a_node() {
        assert_eq!(identity(&UserInfo::new("system:node:a", &[NODES])), Some("a"));
        assert_eq!(identity(&UserInfo::new("system:node:", &[NODES])), Some(""));
        assert_eq!(identity(&UserInfo::new("system:node:a", &[])), None);
        assert_eq!(identity(&UserInfo::new("a", &[NODES])), None);
    }

    #[test]
    fn what_a_pod_refers_to() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {
            "serviceAccountName": "sa",
            "imagePullSecrets": [{"name": "pull"}],
            "volumes": [
                {"name": "v1", "secret": {"secretName": "s1"}},
                {"name": "v2", "configMap": {"name": "c1"}},
                {"name": "v3", "projected": {"sources": [{"secret": {"name": "s2"}}, {"configMap": {"name": "c2"}}]}},
                {"name": "v4", "persistentVolumeClaim": {"claimName": "pvc"}},
                {"name": "v5", "ephemeral": {"volumeClaimTemplate": {}}},
                {"name": "v6", "csi": {"nodePublishSecretRef": {"name": "s5"}}},
                {"name": "v7", "azureFile": {"secretName": "s6"}},
            ],
            "initContainers": [{"envFrom": [{"secretRef": {"name": "s3"}}, {"configMapRef": {"name": "c3"}}]}],
            "containers": [{"env": [
                {"valueFrom": {"secretKeyRef": {"name": "s4"}}}, {"valueFrom": {"configMapKeyRef": {"name": "c4"}}}]}],
        }});
        let check = |kind: Kind, names: &[&str]| {
            for name in
                ["sa", "pull", "s1", "s2", "s3", "s4", "s5", "s6", "c1", "c2", "c3", "c4", "pvc", "p-v5", "p", "v1"]
            {
                assert_eq!(refers(&pod, kind, name), names.contains(&name), "{kind:?} {name}");
            }
        };
        check(Kind::Secret, &["pull", "s1", "s2", "s3", "s4", "s5", "s6"]);
        check(Kind::ConfigMap, &["c1", "c2", "c3", "c4"]);
        check(Kind::Claim, &["pvc", "p-v5"]);
        check(Kind::Account, &["sa"]);
        let mut mirror = pod.clone();
        mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "x"});
        assert!(!refers(&mirror, Kind::Secret, "s1"));
    }
}
