//! What pods and nodes are given when they are created: a service account and its token, a priority, tolerations
//! (<https://kubernetes.io/docs/reference/access-authn-authz/admission-controllers/>).

use serde_json::{Value, json};

use crate::{
    Context, Server, Tolerations,
    error::{ApiError, Result},
};

/// Where a pod finds its service account's token.
const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

impl Server {
    /// Gives a pod its service account, and a volume with a token that the node agent keeps fresh.
    pub(super) async fn service_account(&self, context: &Context<'_>, pod: &mut Value) -> Result<()> {
        // Pods that mirror a node's own have none.
        if !pod["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_null() {
            return Ok(());
        }
        let spec = &mut pod["spec"];
        if !spec.is_object() {
            return Ok(());
        }
        let name = match spec["serviceAccountName"].as_str() {
            Some(name) if !name.is_empty() => name.to_owned(),
            _ => "default".to_owned(),
        };
        spec["serviceAccountName"] = name.as_str().into();
        spec["serviceAccount"] = name.as_str().into();
        let namespace = context.namespace();
        let Some(account) = self.find("", "serviceaccounts", namespace, &name).await? else {
            let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let why = format!("error looking up service account {namespace}/{name}: serviceaccount {name:?} not found");
            return Err(ApiError::forbidden(&context.row, pod_name, why));
        };
        let account = account.value();
        if spec["imagePullSecrets"].as_array().is_none_or(|s| s.is_empty()) && !account["imagePullSecrets"].is_null() {
            spec["imagePullSecrets"] = account["imagePullSecrets"].clone();
        }
        let wanted =
            spec["automountServiceAccountToken"].as_bool().or(account["automountServiceAccountToken"].as_bool());
        if wanted == Some(false) {
            return Ok(());
        }
        let mounted =
            |c: &Value| c["volumeMounts"].as_array().into_iter().flatten().any(|m| m["mountPath"] == TOKEN_PATH);
        let lists = ["initContainers", "containers"];
        let all_have = lists.iter().flat_map(|l| spec[*l].as_array().into_iter().flatten()).all(mounted);
        if all_have {
            return Ok(());
        }
        let volume = format!("kube-api-access-{}", &uuid::Uuid::new_v4().simple().to_string()[..5]);
        for list in lists {
            for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                if !mounted(container) && container.is_object() {
                    let mount = json!({"name": volume, "readOnly": true, "mountPath": TOKEN_PATH});
                    push(container, "volumeMounts", mount);
                }
            }
        }
        let projected = json!({"name": volume, "projected": {"defaultMode": 0o644, "sources": [
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
        ]}});
        push(spec, "volumes", projected);
        Ok(())
    }

    /// What the pods of a namespace tolerate, unless they say otherwise themselves. Upstream's PodTolerationRestriction has
    /// the annotation too; there it can only add to what pods tolerate by default, here it comes first.
    pub(super) async fn namespace_tolerations(&self, context: &Context<'_>, pod: &mut Value) -> Result<()> {
        let Some(namespace) = self.find("", "namespaces", "", context.namespace()).await? else { return Ok(()) };
        let namespace = namespace.value();
        let Some(text) = namespace["metadata"]["annotations"][NAMESPACE_TOLERATIONS].as_str() else { return Ok(()) };
        let Ok(Value::Array(tolerations)) = serde_json::from_str(text) else {
            let why = format!(
                "the annotation {NAMESPACE_TOLERATIONS} of namespace {} is {text:?}, which is no JSON list of tolerations: \
                 correct it, or remove it",
                context.namespace()
            );
            return Err(ApiError::forbidden(&context.row, pod["metadata"]["name"].as_str().unwrap_or_default(), why));
        };
        let spec = &mut pod["spec"];
        if !spec.is_object() {
            return Ok(());
        }
        for toleration in tolerations {
            let same = |t: &Value| t["key"] == toleration["key"] && t["effect"] == toleration["effect"];
            if !spec["tolerations"].as_array().into_iter().flatten().any(same) {
                push(spec, "tolerations", toleration);
            }
        }
        Ok(())
    }

    /// Turns the name of a priority class into a number.
    pub(super) fn priority(&self, context: &Context<'_>, pod: &mut Value) -> Result<()> {
        let snapshot = self.cache.snapshot();
        let spec = &mut pod["spec"];
        if !spec.is_object() {
            return Ok(());
        }
        let class = match spec["priorityClassName"].as_str().filter(|n| !n.is_empty()) {
            Some(name) => {
                let found = self.lookup(&snapshot, "scheduling.k8s.io", "priorityclasses", "", name);
                let Some(class) = found else {
                    let name = name.to_owned();
                    let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default();
                    return Err(ApiError::forbidden(
                        &context.row,
                        pod_name,
                        format!("no PriorityClass with name {name} was found"),
                    ));
                };
                Some(class.value())
            }
            None => {
                let (id, row) = match self.registry.by_name("scheduling.k8s.io", "priorityclasses") {
                    Some(found) => found,
                    None => return Ok(()),
                };
                let prefix = row.prefix();
                let mut classes = snapshot.range(id, &prefix, None).map(|o| o.value());
                classes.find(|c| c["globalDefault"] == true)
            }
        };
        match class {
            Some(class) => {
                spec["priorityClassName"] = class["metadata"]["name"].clone();
                spec["priority"] = class["value"].clone();
                if spec["preemptionPolicy"].is_null() {
                    spec["preemptionPolicy"] = class["preemptionPolicy"].clone();
                }
            }
            None => {
                spec["priority"] = 0.into();
                if spec["preemptionPolicy"].is_null() {
                    spec["preemptionPolicy"] = "PreemptLowerPriority".into();
                }
            }
        }
        Ok(())
    }
}

pub(super) fn push(object: &mut Value, key: &str, item: Value) {
    match object.get_mut(key).and_then(Value::as_array_mut) {
        Some(list) => list.push(item),
        None => object[key] = json!([item]),
    }
}

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
/// What the pods of a namespace tolerate, if they do not say: a JSON list of tolerations.
const NAMESPACE_TOLERATIONS: &str = "scheduler.alpha.kubernetes.io/defaultTolerations";

/// Whether a toleration speaks of a taint with this key, and of being sent away.
fn covers(toleration: &Value, key: &str) -> bool {
    let any_key = toleration["key"].as_str().unwrap_or_default().is_empty() && toleration["operator"] == "Exists";
    let effect = toleration["effect"].as_str().unwrap_or_default();
    (any_key || toleration["key"] == key) && (effect.is_empty() || effect == "NoExecute")
}

/// A pod stays a while on a node that is not ready or cannot be reached, unless it says otherwise
/// (<https://kubernetes.io/docs/reference/access-authn-authz/admission-controllers/#defaulttolerationseconds>).
pub(super) fn default_tolerations(pod: &mut Value, defaults: Tolerations) {
    let spec = &mut pod["spec"];
    if !spec.is_object() {
        return;
    }
    for (key, seconds) in [(NOT_READY, defaults.not_ready), (UNREACHABLE, defaults.unreachable)] {
        if !spec["tolerations"].as_array().into_iter().flatten().any(|t| covers(t, key)) {
            let toleration =
                json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds});
            push(spec, "tolerations", toleration);
        }
    }
}

/// Nothing is put on a node before it has said that it is ready (upstream's TaintNodesByCondition).
pub(super) fn taint_new_node(node: &mut Value) {
    let taint = json!({"key": NOT_READY, "effect": "NoSchedule"});
    let spec = &mut node["spec"];
    if spec.is_null() {
        *spec = json!({});
    }
    let has = |t: &Value| t["key"] == taint["key"] && t["effect"] == taint["effect"];
    if spec.is_object() && !spec["taints"].as_array().into_iter().flatten().any(has) {
        push(spec, "taints", taint);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_pods_stay() {
        let check = |tolerations: Value, expect: &[(&str, i64)]| {
            let mut pod = json!({"spec": {"tolerations": tolerations}});
            default_tolerations(&mut pod, Tolerations { not_ready: 5, unreachable: 7 });
            let all = pod["spec"]["tolerations"].as_array().cloned().unwrap_or_default();
            let added = &all[tolerations.as_array().map_or(0, Vec::len)..];
            let found: Vec<_> =
                added.iter().map(|t| (t["key"].as_str().unwrap(), t["tolerationSeconds"].as_i64().unwrap())).collect();
            assert_eq!(found, expect, "{tolerations}");
        };
        check(json!(null), &[(NOT_READY, 5), (UNREACHABLE, 7)]);
        check(json!([{"operator": "Exists"}]), &[]);
        check(json!([{"key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute"}]), &[(NOT_READY, 5)]);
        check(json!([{"key": NOT_READY, "operator": "Exists"}]), &[(UNREACHABLE, 7)]);
        check(
            json!([{"key": NOT_READY, "operator": "Exists", "effect": "NoSchedule"}]),
            &[(NOT_READY, 5), (UNREACHABLE, 7)],
        );
    }

    #[test]
    fn a_new_node_is_tainted_once() {
        let mut node = json!({"metadata": {"name": "n"}});
        taint_new_node(&mut node);
        let tainted = node.clone();
        taint_new_node(&mut node);
        assert_eq!(node, tainted);
        assert_eq!(node["spec"]["taints"], json!([{"key": NOT_READY, "effect": "NoSchedule"}]));
    }
}
