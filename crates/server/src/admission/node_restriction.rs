//! NodeRestriction: a node writes only what is its own
//! (<https://kubernetes.io/docs/reference/access-authn-authz/admission-controllers/#noderestriction>).
//!
//! The words are upstream's, where upstream has any.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{
    Context, Server,
    auth::node::{LEASES, identity},
    error::{ApiError, Result},
    write::Operation,
};

const MIRROR: &str = "kubernetes.io/config.mirror";

/// Labels under `kubernetes.io` and `k8s.io` that a node may give itself
/// (<https://kubernetes.io/docs/reference/labels-annotations-taints/>).
const LABELS: [&str; 11] = [
    "kubernetes.io/hostname",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
    "beta.kubernetes.io/instance-type",
    "node.kubernetes.io/instance-type",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
];

impl Server {
    /// Checks a create or an update of a node.
    pub(super) fn restrict_node(
        &self,
        context: &Context<'_>,
        operation: Operation,
        new: &Value,
        old: Option<&Value>,
    ) -> Result<()> {
        let Some(node) = identity(&context.user) else { return Ok(()) };
        let row = &context.row;
        let name = new["metadata"]["name"].as_str().unwrap_or_default();
        let uid_of_node = || {
            let found = self.lookup(&self.cache.snapshot(), "", "nodes", "", node)?;
            found.value()["metadata"]["uid"].as_str().map(str::to_owned)
        };
        let sub = context.path.subresource.as_deref().unwrap_or_default();
        check(node, &context.user.username, (row.group, row.plural, sub), operation, new, old, uid_of_node)
            .map_err(|why| ApiError::forbidden(row, name, why))
    }

    /// Checks a deletion or an eviction by a node.
    pub(crate) fn restrict_node_deletion(&self, context: &Context<'_>, object: &Value) -> Result<()> {
        let Some(node) = identity(&context.user) else { return Ok(()) };
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let evicting = context.path.subresource.as_deref() == Some("eviction");
        check_deletion(node, (context.row.group, context.row.plural), evicting, object)
            .map_err(|why| ApiError::forbidden(&context.row, name, why))
    }

    /// Checks a request of a node for a token. `pod` is the one that it is to be bound to.
    pub(crate) fn restrict_node_token(
        &self,
        context: &Context<'_>,
        request: &Value,
        pod: Option<&Value>,
    ) -> Result<()> {
        let Some(node) = identity(&context.user) else { return Ok(()) };
        let name = context.name()?;
        check_token(node, request, pod).map_err(|why| ApiError::forbidden(&context.row, name, why))
    }
}

type Resource<'a> = (&'a str, &'a str, &'a str);

fn check(
    node: &str,
    user: &str,
    resource: Resource<'_>,
    operation: Operation,
    new: &Value,
    old: Option<&Value>,
    uid_of_node: impl Fn() -> Option<String>,
) -> Result<(), String> {
    if node.is_empty() {
        return Err(format!("could not determine node from user {user:?}"));
    }
    let name = new["metadata"]["name"].as_str().unwrap_or_default();
    match (resource, operation) {
        (("", "pods", ""), Operation::Create) => check_mirror(node, new, uid_of_node),
        (("", "pods", ""), Operation::Update) => {
            Err(format!("unexpected operation \"UPDATE\", node {node:?} can only create and delete mirror pods"))
        }
        (("", "pods", "status"), _) => check_status(node, new, old.unwrap_or(&Value::Null)),
        (("", "pods", other), _) => {
            Err(format!("unexpected pod subresource {other:?}, only 'status' and 'eviction' are allowed"))
        }
        (("", "nodes", _), _) => check_node(node, new, old),
        (("", "persistentvolumeclaims", _), _) => Err("may only update PVC status".into()),
        (("coordination.k8s.io", "leases", _), _) => {
            let namespace = new["metadata"]["namespace"].as_str().unwrap_or_default();
            if namespace != LEASES {
                return Err(format!("can only access leases in the {LEASES:?} system namespace"));
            }
            own(node, name, "node lease")
        }
        (("storage.k8s.io", "csinodes", _), _) => own(node, name, "CSINode"),
        _ => Ok(()),
    }
}

fn own(node: &str, name: &str, what: &str) -> Result<(), String> {
    if name != node {
        return Err(format!("can only access {what} with the same name as the requesting node"));
    }
    Ok(())
}

/// A node creates pods only to show those that it runs by itself, and they refer to nothing.
fn check_mirror(node: &str, pod: &Value, uid_of_node: impl Fn() -> Option<String>) -> Result<(), String> {
    let meta = &pod["metadata"];
    if meta["annotations"][MIRROR].is_null() {
        return Err(format!("pod does not have {MIRROR:?} annotation, node {node:?} can only create mirror pods"));
    }
    if pod["spec"]["nodeName"] != node {
        return Err(format!("node {node:?} can only create pods with spec.nodeName set to itself"));
    }
    let owners = meta["ownerReferences"].as_array().map(Vec::as_slice).unwrap_or_default();
    let owner = match owners {
        [] => return Err(format!("node {node:?} can only create pods with an owner reference set to itself")),
        [owner] => owner,
        _ => return Err(format!("node {node:?} can only create pods with a single owner reference set to itself")),
    };
    if owner["apiVersion"] != "v1" || owner["kind"] != "Node" || owner["name"] != node {
        return Err(format!("node {node:?} can only create pods with an owner reference set to itself"));
    }
    if owner["controller"] != true {
        return Err(format!("node {node:?} can only create pods with a controller owner reference set to itself"));
    }
    if owner["blockOwnerDeletion"] == true {
        return Err(format!("node {node:?} must not set blockOwnerDeletion on an owner reference"));
    }
    let claimed = owner["uid"].as_str().unwrap_or_default();
    match uid_of_node() {
        None => return Err(format!("node {node:?} not found")),
        Some(uid) if uid != claimed => {
            return Err(format!("node {node} UID mismatch: expected {claimed} got {uid}"));
        }
        Some(_) => {}
    }
    let refers = |what: &str| Err(format!("node {node:?} can not create pods that reference {what}"));
    let spec = &pod["spec"];
    if !spec["serviceAccountName"].as_str().unwrap_or_default().is_empty() {
        return refers("a service account");
    }
    let mut keys = BTreeSet::new();
    collect_keys(spec, &mut keys);
    let has = |names: &[&str]| names.iter().any(|name| keys.contains(name));
    if has(&["secret", "secretRef", "secretKeyRef", "secretName", "imagePullSecrets", "nodePublishSecretRef"]) {
        return refers("secrets");
    }
    if has(&["configMap", "configMapRef", "configMapKeyRef"]) {
        return refers("configmaps");
    }
    if has(&["clusterTrustBundle"]) {
        return refers("clustertrustbundles");
    }
    if has(&["persistentVolumeClaim", "ephemeral"]) {
        return refers("persistentvolumeclaims");
    }
    Ok(())
}

/// All keys of a value. Labels and the like in a pod's spec (node selectors) can only make this stricter.
fn collect_keys<'a>(value: &'a Value, keys: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter().filter(|(_, v)| !v.is_null()) {
                keys.insert(key);
                collect_keys(value, keys);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| collect_keys(value, keys)),
        _ => {}
    }
}

fn check_status(node: &str, new: &Value, old: &Value) -> Result<(), String> {
    if old["spec"]["nodeName"] != node {
        return Err(format!("node {node:?} can only update pod status for pods with spec.nodeName set to itself"));
    }
    if !same(&new["metadata"]["labels"], &old["metadata"]["labels"]) {
        return Err(format!("node {node:?} cannot update labels through pod status"));
    }
    if !same(&new["status"]["resourceClaimStatuses"], &old["status"]["resourceClaimStatuses"]) {
        return Err(format!("node {node:?} cannot update resource claim statues"));
    }
    Ok(())
}

/// Whether two values are equal, if nothing and emptiness are.
fn same(a: &Value, b: &Value) -> bool {
    let empty = |v: &Value| {
        v.is_null() || v.as_object().is_some_and(|o| o.is_empty()) || v.as_array().is_some_and(Vec::is_empty)
    };
    a == b || (empty(a) && empty(b))
}

fn check_node(node: &str, new: &Value, old: Option<&Value>) -> Result<(), String> {
    let name = new["metadata"]["name"].as_str().unwrap_or_default();
    if name != node {
        return Err(format!("node {node:?} is not allowed to modify node {name:?}"));
    }
    if !new["spec"]["configSource"].is_null()
        && new["spec"]["configSource"] != old.unwrap_or(&Value::Null)["spec"]["configSource"]
    {
        return Err(format!("node {node:?} is not allowed to update configSource to a new non-nil configSource"));
    }
    let forbidden = forbidden_labels(&new["metadata"]["labels"], old.map(|o| &o["metadata"]["labels"]));
    match old {
        None if !forbidden.is_empty() => {
            Err(format!("node {node:?} is not allowed to set the following labels: {}", forbidden.join(", ")))
        }
        Some(old) if !same(&new["spec"]["taints"], &old["spec"]["taints"]) => {
            Err(format!("node {node:?} is not allowed to modify taints"))
        }
        Some(_) if !forbidden.is_empty() => Err(format!("is not allowed to modify labels: {}", forbidden.join(", "))),
        _ => Ok(()),
    }
}

/// The labels that change and that a node must not change, by which it could draw workloads to itself.
fn forbidden_labels<'a>(new: &'a Value, old: Option<&'a Value>) -> Vec<&'a str> {
    let old = old.unwrap_or(&Value::Null);
    let keys = |value: &'a Value| value.as_object().into_iter().flatten().map(|(key, _)| key.as_str());
    let changed: BTreeSet<&str> = keys(new).chain(keys(old)).filter(|key| new[*key] != old[*key]).collect();
    changed.into_iter().filter(|key| is_forbidden(key)).collect()
}

fn is_forbidden(label: &str) -> bool {
    let Some((domain, _)) = label.split_once('/') else { return false };
    let is = |of: &str| domain == of || domain.strip_suffix(of).is_some_and(|rest| rest.ends_with('.'));
    if is("node-restriction.kubernetes.io") {
        return true;
    }
    let kubernetes = is("kubernetes.io") || is("k8s.io");
    let allowed = LABELS.contains(&label) || is("kubelet.kubernetes.io") || is("node.kubernetes.io");
    kubernetes && !allowed
}

fn check_deletion(node: &str, resource: (&str, &str), evicting: bool, object: &Value) -> Result<(), String> {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    match resource {
        ("", "pods") if object["spec"]["nodeName"] != node => Err(match evicting {
            true => format!("node {node} can only evict pods with spec.nodeName set to itself"),
            false => format!("node {node:?} can only delete pods with spec.nodeName set to itself"),
        }),
        ("", "nodes") => Err(format!("node {node:?} is not allowed to delete node {name:?}")),
        ("coordination.k8s.io", "leases") => own(node, name, "node lease"),
        ("storage.k8s.io", "csinodes") => own(node, name, "CSINode"),
        _ => Ok(()),
    }
}

fn check_token(node: &str, request: &Value, pod: Option<&Value>) -> Result<(), String> {
    let reference = &request["spec"]["boundObjectRef"];
    let version = reference["apiVersion"].as_str().unwrap_or_default();
    let unbound = reference["kind"] != "Pod" || reference["name"].as_str().unwrap_or_default().is_empty();
    if unbound || version != "v1" {
        return Err("node requested token not bound to a pod".into());
    }
    if reference["uid"].as_str().unwrap_or_default().is_empty() {
        return Err("node requested token with a pod binding without a uid".into());
    }
    // One that is not there is refused for that.
    if pod.is_some_and(|pod| pod["spec"]["nodeName"] != node) {
        return Err("node requested token bound to a pod scheduled on a different node".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_that_a_node_may_give_itself() {
        for (label, forbidden) in [
            ("app", false),
            ("example.com/zone", false),
            ("kubernetes.io/hostname", false),
            ("topology.kubernetes.io/zone", false),
            ("node.kubernetes.io/anything", false),
            ("kubelet.kubernetes.io/anything", false),
            ("x.node.kubernetes.io/anything", false),
            ("kubernetes.io/anything", true),
            ("k8s.io/anything", true),
            ("foo.k8s.io/anything", true),
            ("node-role.kubernetes.io/control-plane", true),
            ("node-restriction.kubernetes.io/pci", true),
            ("x.node-restriction.kubernetes.io/pci", true),
            ("notkubernetes.io/anything", false),
        ] {
            assert_eq!(is_forbidden(label), forbidden, "{label}");
        }
    }

    #[test]
    fn a_node_and_its_object() {
        let node = |labels: Value, taints: Value| json!({"metadata": {"name": "a", "labels": labels}, "spec": {"taints": taints}});
        let check = |new: Value, old: Option<Value>, expect: Result<(), &str>| {
            let operation = if old.is_some() { Operation::Update } else { Operation::Create };
            let found = check("a", "system:node:a", ("", "nodes", ""), operation, &new, old.as_ref(), || None);
            assert_eq!(found, expect.map_err(str::to_owned), "{new} {old:?}");
        };
        let role = json!({"node-role.kubernetes.io/x": "", "kubernetes.io/os": "linux"});
        check(node(json!({"kubernetes.io/os": "linux"}), json!([{"key": "t"}])), None, Ok(()));
        check(
            node(role.clone(), json!(null)),
            None,
            Err("node \"a\" is not allowed to set the following labels: node-role.kubernetes.io/x"),
        );
        let plain = node(json!(null), json!([]));
        check(node(json!({}), json!(null)), Some(plain.clone()), Ok(()));
        check(
            node(role.clone(), json!(null)),
            Some(plain.clone()),
            Err("is not allowed to modify labels: node-role.kubernetes.io/x"),
        );
        check(
            plain.clone(),
            Some(node(role.clone(), json!(null))),
            Err("is not allowed to modify labels: node-role.kubernetes.io/x"),
        );
        check(node(role.clone(), json!(null)), Some(node(role, json!(null))), Ok(()));
        check(
            node(json!(null), json!([{"key": "t"}])),
            Some(plain.clone()),
            Err("node \"a\" is not allowed to modify taints"),
        );
        check(json!({"metadata": {"name": "b"}}), Some(plain), Err("node \"a\" is not allowed to modify node \"b\""));
        let nobody = super::check("", "system:node:", ("", "nodes", ""), Operation::Create, &json!({}), None, || None);
        assert_eq!(nobody, Err("could not determine node from user \"system:node:\"".into()));
    }

    #[test]
    fn pods_of_nodes() {
        let owner = json!({"apiVersion": "v1", "kind": "Node", "name": "a", "uid": "u", "controller": true});
        let mirror = json!({"metadata": {"name": "p", "annotations": {MIRROR: "x"}, "ownerReferences": [owner]},
            "spec": {"nodeName": "a", "containers": [{"name": "c"}]}});
        let check = |pointer: &str, value: Value, expect: Result<(), &str>| {
            let mut pod = mirror.clone();
            if !pointer.is_empty() {
                let (parent, key) = pointer.rsplit_once('/').unwrap();
                pod.pointer_mut(parent).unwrap()[key] = value;
            }
            let found = check("a", "", ("", "pods", ""), Operation::Create, &pod, None, || Some("u".to_owned()));
            assert_eq!(found, expect.map_err(str::to_owned), "{pod}");
        };
        check("", Value::Null, Ok(()));
        check(
            "/metadata/annotations",
            json!({}),
            Err("pod does not have \"kubernetes.io/config.mirror\" annotation, node \"a\" can only create mirror pods"),
        );
        check("/spec/nodeName", "b".into(), Err("node \"a\" can only create pods with spec.nodeName set to itself"));
        let other = Err("node \"a\" can only create pods with an owner reference set to itself");
        check("/metadata/ownerReferences", json!([]), other);
        let mut of_other = owner.clone();
        of_other["name"] = "b".into();
        check("/metadata/ownerReferences", json!([of_other]), other);
        check(
            "/metadata/ownerReferences",
            json!([owner, owner]),
            Err("node \"a\" can only create pods with a single owner reference set to itself"),
        );
        let mut of_other = owner.clone();
        of_other["controller"] = false.into();
        let expect = "node \"a\" can only create pods with a controller owner reference set to itself";
        check("/metadata/ownerReferences", json!([of_other]), Err(expect));
        let mut of_other = owner.clone();
        of_other["blockOwnerDeletion"] = true.into();
        let expect = "node \"a\" must not set blockOwnerDeletion on an owner reference";
        check("/metadata/ownerReferences", json!([of_other]), Err(expect));
        let mut of_other = owner.clone();
        of_other["uid"] = "other".into();
        check("/metadata/ownerReferences", json!([of_other]), Err("node a UID mismatch: expected other got u"));
        let refers = |what: &str| format!("node \"a\" can not create pods that reference {what}");
        check("/spec/serviceAccountName", "default".into(), Err(&refers("a service account")));
        for (volume, what) in [
            (json!({"secret": {"secretName": "s"}}), "secrets"),
            (json!({"projected": {"sources": [{"secret": {"name": "s"}}]}}), "secrets"),
            (json!({"configMap": {"name": "c"}}), "configmaps"),
            (json!({"projected": {"sources": [{"clusterTrustBundle": {"path": "p"}}]}}), "clustertrustbundles"),
            (json!({"persistentVolumeClaim": {"claimName": "c"}}), "persistentvolumeclaims"),
        ] {
            check("/spec/volumes", json!([volume]), Err(&refers(what)));
        }
        let env = json!([{"env": [{"valueFrom": {"secretKeyRef": {"name": "s"}}}]}]);
        check("/spec/containers", env, Err(&refers("secrets")));
    }

    #[test]
    fn status_deletion_and_tokens() {
        let pod = |node: &str, labels: Value| json!({"metadata": {"name": "p", "labels": labels}, "spec": {"nodeName": node}, "status": {}});
        let status = |new: Value, old: Value| {
            check("a", "", ("", "pods", "status"), Operation::Update, &new, Some(&old), || None)
        };
        assert_eq!(status(pod("a", json!({})), pod("a", Value::Null)), Ok(()));
        let expect = "node \"a\" can only update pod status for pods with spec.nodeName set to itself";
        assert_eq!(status(pod("b", json!({})), pod("b", json!({}))), Err(expect.into()));
        let expect = "node \"a\" cannot update labels through pod status";
        assert_eq!(status(pod("a", json!({"x": "y"})), pod("a", json!({}))), Err(expect.into()));
        let update = check("a", "", ("", "pods", ""), Operation::Update, &pod("a", json!({})), None, || None);
        let expect = "unexpected operation \"UPDATE\", node \"a\" can only create and delete mirror pods";
        assert_eq!(update, Err(expect.into()));

        let deletion = |evicting: bool, node: &str| check_deletion("a", ("", "pods"), evicting, &pod(node, json!({})));
        assert_eq!(deletion(false, "a"), Ok(()));
        assert_eq!(deletion(true, "a"), Ok(()));
        let expect = "node \"a\" can only delete pods with spec.nodeName set to itself";
        assert_eq!(deletion(false, "b"), Err(expect.into()));
        let expect = "node a can only evict pods with spec.nodeName set to itself";
        assert_eq!(deletion(true, "b"), Err(expect.into()));

        let request = |reference: Value| json!({"spec": {"boundObjectRef": reference}});
        let bound = json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"});
        let token =
            |reference: &Value, node: &str| check_token("a", &request(reference.clone()), Some(&pod(node, json!({}))));
        assert_eq!(token(&bound, "a"), Ok(()));
        let expect = "node requested token bound to a pod scheduled on a different node";
        assert_eq!(token(&bound, "b"), Err(expect.into()));
        let expect = "node requested token not bound to a pod";
        assert_eq!(token(&Value::Null, "a"), Err(expect.into()));
        assert_eq!(
            token(&json!({"apiVersion": "v1", "kind": "Secret", "name": "p", "uid": "u"}), "a"),
            Err(expect.into())
        );
        let expect = "node requested token with a pod binding without a uid";
        assert_eq!(token(&json!({"apiVersion": "v1", "kind": "Pod", "name": "p"}), "a"), Err(expect.into()));
    }

    #[test]
    fn leases_of_nodes() {
        let lease = |namespace: &str, name: &str| {
            let lease = json!({"metadata": {"name": name, "namespace": namespace}});
            check("a", "", ("coordination.k8s.io", "leases", ""), Operation::Create, &lease, None, || None)
        };
        assert_eq!(lease(LEASES, "a"), Ok(()));
        let expect = "can only access node lease with the same name as the requesting node";
        assert_eq!(lease(LEASES, "b"), Err(expect.into()));
        let expect = "can only access leases in the \"kube-node-lease\" system namespace";
        assert_eq!(lease("default", "a"), Err(expect.into()));
    }
}
