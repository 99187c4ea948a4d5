//! What objects take of a ResourceQuota (<https://kubernetes.io/docs/concepts/policy/resource-quotas/>).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::quantity::Quantity;

/// Amounts by the names that stand in a quota.
pub type Amounts = BTreeMap<String, Quantity>;

/// Kinds that are counted under their plural as well.
const COUNTED: [&str; 7] =
    ["pods", "services", "configmaps", "secrets", "persistentvolumeclaims", "replicationcontrollers", "resourcequotas"];
/// What a pod can be short of without a prefix: these stand for requests.
const BARE: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];
/// A quota of one of these wants every container to say how much it needs.
const REQUIRED: [&str; 6] = ["cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"];

/// Reads a list of resources. What is no quantity does not get past validation.
pub fn amounts(value: &Value) -> Amounts {
    let entries = value.as_object().into_iter().flatten();
    let read = |(name, amount): (&String, &Value)| {
        let amount = match amount {
            Value::String(text) => text.parse().ok()?,
            Value::Number(number) => number.to_string().parse().ok()?,
            _ => return None,
        };
        Some((name.clone(), amount))
    };
    entries.filter_map(read).collect()
}

/// Writes a list of resources.
pub fn write(amounts: &Amounts) -> Value {
    Value::Object(
        amounts.iter().map(|(name, amount)| (name.clone(), Value::from(amount.to_string()))).collect::<Map<_, _>>(),
    )
}

/// `a=1,b=2`, as upstream puts it into messages.
pub fn show(amounts: &Amounts) -> String {
    amounts.iter().map(|(name, amount)| format!("{name}={amount}")).collect::<Vec<_>>().join(",")
}

fn add(to: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        let sum = to.get(name).map_or(*amount, |known| *known + *amount);
        to.insert(name.clone(), sum);
    }
}

/// More of everything. Public for those who add up what a namespace holds.
pub fn sum(mut a: Amounts, b: &Amounts) -> Amounts {
    add(&mut a, b);
    a
}

fn larger(to: &mut Amounts, other: &Amounts) {
    for (name, amount) in other {
        if to.get(name).is_none_or(|known| known < amount) {
            to.insert(name.clone(), *amount);
        }
    }
}

/// What a container takes while its resources are being changed: the most of what it should have, has been given, and has.
/// What the node cannot give does not count (KEP-1287).
fn of_container(pod: &Value, statuses: &str, container: &Value, part: &str) -> Amounts {
    let wanted = amounts(&container["resources"][part]);
    let mut all = pod["status"][statuses].as_array().into_iter().flatten();
    let Some(status) = all.find(|status| status["name"] == container["name"]) else { return wanted };
    let mut most = amounts(&status["resources"][part]);
    if part == "requests" {
        larger(&mut most, &amounts(&status["allocatedResources"]));
    }
    if most.is_empty() || !resize_is_infeasible(pod) {
        larger(&mut most, &wanted);
    }
    most
}

fn resize_is_infeasible(pod: &Value) -> bool {
    let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|c| c["type"] == "PodResizePending" && c["reason"] == "Infeasible")
}

/// What one part of a pod's resources comes to: all containers and sidecars, or one that runs before them, and the overhead.
fn peak(pod: &Value, part: &str) -> Amounts {
    let spec = &pod["spec"];
    let mut running = Amounts::new();
    for container in spec["containers"].as_array().into_iter().flatten() {
        add(&mut running, &of_container(pod, "containerStatuses", container, part));
    }
    let (mut sidecars, mut before) = (Amounts::new(), Amounts::new());
    for container in spec["initContainers"].as_array().into_iter().flatten() {
        let now = sum(sidecars.clone(), &of_container(pod, "initContainerStatuses", container, part));
        if container["restartPolicy"] == "Always" {
            sidecars = now.clone();
        }
        larger(&mut before, &now);
    }
    add(&mut running, &sidecars);
    larger(&mut running, &before);
    // A pod may say for itself what all of its containers need (KEP-2837).
    for (name, amount) in amounts(&spec["resources"][part]) {
        running.insert(name, amount);
    }
    for (name, amount) in amounts(&spec["overhead"]) {
        if part == "requests" || running.contains_key(&name) {
            add(&mut running, &Amounts::from([(name, amount)]));
        }
    }
    running
}

/// Whether a pod takes nothing any more.
fn is_over(pod: &Value) -> bool {
    matches!(pod["status"]["phase"].as_str(), Some("Failed" | "Succeeded"))
}

fn of_pod(pod: &Value, out: &mut Amounts) {
    if is_over(pod) {
        return;
    }
    out.insert("pods".to_owned(), Quantity::new(1));
    for (name, amount) in peak(pod, "requests") {
        if BARE.contains(&name.as_str()) || name.starts_with("hugepages-") {
            out.insert(name.clone(), amount);
        }
        out.insert(format!("requests.{name}"), amount);
    }
    for (name, amount) in peak(pod, "limits") {
        if BARE.contains(&name.as_str()) {
            out.insert(format!("limits.{name}"), amount);
        }
    }
}

fn of_service(service: &Value, out: &mut Amounts) {
    let spec = &service["spec"];
    let ports = spec["ports"].as_array().map_or(0, Vec::len) as i64;
    let (balanced, exposed) = match spec["type"].as_str() {
        Some("LoadBalancer") => (1, if spec["allocateLoadBalancerNodePorts"] == false { 0 } else { ports }),
        Some("NodePort") => (0, ports),
        _ => (0, 0),
    };
    out.insert("services.loadbalancers".to_owned(), Quantity::new(balanced));
    out.insert("services.nodeports".to_owned(), Quantity::new(exposed));
}

fn of_claim(claim: &Value, out: &mut Amounts) {
    let storage = amounts(&claim["spec"]["resources"]["requests"]).get("storage").copied();
    let class = claim["metadata"]["annotations"]["volume.beta.kubernetes.io/storage-class"].as_str();
    let class = class.or(claim["spec"]["storageClassName"].as_str()).filter(|class| !class.is_empty());
    if let Some(class) = class {
        out.insert(format!("{class}.storageclass.storage.k8s.io/persistentvolumeclaims"), Quantity::new(1));
    }
    if let Some(storage) = storage {
        out.insert("requests.storage".to_owned(), storage);
        if let Some(class) = class {
            out.insert(format!("{class}.storageclass.storage.k8s.io/requests.storage"), storage);
        }
    }
}

/// What an object takes.
pub fn usage(group: &str, plural: &str, object: &Value) -> Amounts {
    let qualified = if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") };
    let mut out = Amounts::from([(format!("count/{qualified}"), Quantity::new(1))]);
    if !group.is_empty() {
        return out;
    }
    match plural {
        "pods" => of_pod(object, &mut out),
        _ if COUNTED.contains(&plural) => {
            out.insert(plural.to_owned(), Quantity::new(1));
        }
        _ => {}
    }
    match plural {
        "services" => of_service(object, &mut out),
        "persistentvolumeclaims" => of_claim(object, &mut out),
        _ => {}
    }
    out
}

/// The resource (group and plural) that a name in a quota is about.
pub fn resource_of(name: &str) -> (&str, &str) {
    if let Some(qualified) = name.strip_prefix("count/") {
        return qualified.split_once('.').map_or(("", qualified), |(plural, group)| (group, plural));
    }
    match name {
        "services.loadbalancers" | "services.nodeports" => ("", "services"),
        "requests.storage" => ("", "persistentvolumeclaims"),
        _ if name.contains(".storageclass.storage.k8s.io/") => ("", "persistentvolumeclaims"),
        _ if COUNTED.contains(&name) => ("", COUNTED.iter().find(|known| **known == name).copied().unwrap_or("pods")),
        _ => ("", "pods"),
    }
}

fn is_best_effort(pod: &Value) -> bool {
    let says = |container: &Value| {
        ["requests", "limits"].iter().any(|part| {
            let amounts = amounts(&container["resources"][*part]);
            ["cpu", "memory"].iter().any(|name| amounts.get(*name).is_some_and(|amount| *amount > Quantity::new(0)))
        })
    };
    let lists = ["containers", "initContainers"];
    !says(&pod["spec"]) && !lists.iter().flat_map(|list| pod["spec"][*list].as_array().into_iter().flatten()).any(says)
}

fn has_cross_namespace_affinity(pod: &Value) -> bool {
    let affinity = &pod["spec"]["affinity"];
    ["podAffinity", "podAntiAffinity"].iter().any(|kind| {
        let required =
            affinity[*kind]["requiredDuringSchedulingIgnoredDuringExecution"].as_array().into_iter().flatten();
        let preferred =
            affinity[*kind]["preferredDuringSchedulingIgnoredDuringExecution"].as_array().into_iter().flatten();
        required.chain(preferred.map(|term| &term["podAffinityTerm"])).any(|term| {
            term["namespaces"].as_array().is_some_and(|list| !list.is_empty()) || term["namespaceSelector"].is_object()
        })
    })
}

fn in_scope(pod: &Value, scope: &str, operator: &str, values: &Value) -> bool {
    let ends = pod["spec"]["activeDeadlineSeconds"].as_i64().is_some_and(|seconds| seconds >= 0);
    match scope {
        "Terminating" => ends,
        "NotTerminating" => !ends,
        "BestEffort" => is_best_effort(pod),
        "NotBestEffort" => !is_best_effort(pod),
        "CrossNamespacePodAffinity" => has_cross_namespace_affinity(pod),
        "PriorityClass" => {
            let class = pod["spec"]["priorityClassName"].as_str().filter(|class| !class.is_empty());
            let listed = class.is_some_and(|class| values.as_array().into_iter().flatten().any(|value| value == class));
            match operator {
                "Exists" => class.is_some(),
                "DoesNotExist" => class.is_none(),
                "NotIn" => !listed,
                _ => listed,
            }
        }
        _ => false,
    }
}

/// Whether a quota is about an object: one with scopes is about pods alone.
pub fn is_about(quota: &Value, group: &str, plural: &str, object: &Value) -> bool {
    let spec = &quota["spec"];
    let scopes = spec["scopes"].as_array().into_iter().flatten();
    let scopes = scopes.filter_map(Value::as_str).map(|scope| (scope, "Exists", &Value::Null));
    let selected = spec["scopeSelector"]["matchExpressions"].as_array().into_iter().flatten().map(|e| {
        (e["scopeName"].as_str().unwrap_or_default(), e["operator"].as_str().unwrap_or_default(), &e["values"])
    });
    scopes.chain(selected).all(|(scope, operator, values)| {
        group.is_empty() && plural == "pods" && in_scope(object, scope, operator, values)
    })
}

/// What of a usage a quota limits.
pub fn limited(usage: &Amounts, hard: &Amounts) -> Amounts {
    usage.iter().filter(|(name, _)| hard.contains_key(*name)).map(|(name, amount)| (name.clone(), *amount)).collect()
}

/// What a pod has to say under a quota and does not: `must specify limits.cpu for: c; requests.memory for: c,d`.
pub fn unsaid(hard: &Amounts, pod: &Value) -> Option<String> {
    let mut missing: Vec<String> = Vec::new();
    for name in hard.keys().filter(|name| REQUIRED.contains(&name.as_str())) {
        let (part, resource) = name.split_once('.').unwrap_or(("requests", name));
        if pod["spec"]["resources"][part].get(resource).is_some() {
            continue;
        }
        let lists = ["containers", "initContainers"];
        let mut containers: Vec<&str> = lists
            .iter()
            .flat_map(|list| pod["spec"][*list].as_array().into_iter().flatten())
            .filter(|container| container["resources"][part].get(resource).is_none())
            .filter_map(|container| container["name"].as_str())
            .collect();
        containers.sort_unstable();
        if !containers.is_empty() {
            missing.push(format!("{name} for: {}", containers.join(",")));
        }
    }
    (!missing.is_empty()).then(|| format!("must specify {}", missing.join("; ")))
}

/// What there is more of in `new` than in `old`, and what there is less of.
pub fn difference(new: &Amounts, old: &Amounts) -> (Amounts, Amounts) {
    let (mut more, mut less) = (Amounts::new(), Amounts::new());
    let zero = Quantity::new(0);
    for name in new.keys().chain(old.keys()) {
        let (now, before) = (new.get(name).copied().unwrap_or(zero), old.get(name).copied().unwrap_or(zero));
        if now > before {
            more.insert(name.clone(), now - before);
        } else if before > now {
            less.insert(name.clone(), before - now);
        }
    }
    (more, less)
}

/// Takes from what is used. `Err` says, in upstream's words, why that is too much.
pub fn take(name: &str, hard: &Amounts, used: &Amounts, wanted: &Amounts) -> Result<Amounts, String> {
    let after = sum(used.clone(), wanted);
    let exceeded: Vec<&String> =
        wanted.keys().filter(|key| matches!((after.get(*key), hard.get(*key)), (Some(a), Some(h)) if a > h)).collect();
    if exceeded.is_empty() {
        return Ok(after);
    }
    let only = |amounts: &Amounts| -> Amounts {
        let zero = Quantity::new(0);
        exceeded.iter().map(|key| ((*key).clone(), amounts.get(*key).copied().unwrap_or(zero))).collect()
    };
    Err(format!(
        "exceeded quota: {name}, requested: {}, used: {}, limited: {}",
        show(&only(wanted)),
        show(&only(used)),
        show(&only(hard))
    ))
}

/// Gives back; never below nothing.
pub fn give_back(used: &Amounts, less: &Amounts) -> Amounts {
    let mut out = used.clone();
    for (name, amount) in less {
        if let Some(known) = out.get_mut(name) {
            let rest = *known - *amount;
            *known = if rest.is_negative() { Quantity::new(0) } else { rest };
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(more: Value) -> Value {
        let resources = |cpu: &str| json!({"requests": {"cpu": cpu, "memory": "1Gi"}, "limits": {"cpu": "2"}});
        let mut pod = json!({"spec": {"containers": [{"name": "a", "resources": resources("500m")}, {"name": "b"}],
            "initContainers": [{"name": "i", "resources": resources("2")}]}});
        for (key, value) in more.as_object().into_iter().flatten() {
            pod["spec"][key] = value.clone();
        }
        pod
    }

    #[test]
    fn what_objects_take() {
        let check = |group: &str, plural: &str, object: Value, expect: &str| {
            assert_eq!(show(&usage(group, plural, &object)), expect, "{object}");
        };
        check("apps", "deployments", json!({}), "count/deployments.apps=1");
        check("", "configmaps", json!({}), "configmaps=1,count/configmaps=1");
        check(
            "",
            "pods",
            pod(json!({"overhead": {"memory": "1Gi"}})),
            "count/pods=1,cpu=2,limits.cpu=2,memory=2Gi,pods=1,requests.cpu=2,requests.memory=2Gi",
        );
        check("", "pods", json!({"status": {"phase": "Succeeded"}}), "count/pods=1");
        let resized = |reason: &str| {
            json!({"spec": {"containers": [{"name": "a", "resources": {"requests": {"cpu": "9"}, "limits": {"cpu": "9"}}}]},
                "status": {"conditions": [{"type": "PodResizePending", "reason": reason}], "containerStatuses": [
                    {"name": "a", "allocatedResources": {"cpu": "2"},
                     "resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "3"}}}]}})
        };
        let of =
            |cpu: &str, limit: &str| format!("count/pods=1,cpu={cpu},limits.cpu={limit},pods=1,requests.cpu={cpu}");
        check("", "pods", resized("Deferred"), &of("9", "9"));
        check("", "pods", resized("Infeasible"), &of("2", "3"));
        let service = |ty: &str| json!({"spec": {"type": ty, "ports": [{}, {}]}});
        check(
            "",
            "services",
            service("LoadBalancer"),
            "count/services=1,services=1,services.loadbalancers=1,services.nodeports=2",
        );
        check(
            "",
            "services",
            service("ClusterIP"),
            "count/services=1,services=1,services.loadbalancers=0,services.nodeports=0",
        );
        check(
            "",
            "persistentvolumeclaims",
            json!({"spec": {"storageClassName": "gold", "resources": {"requests": {"storage": "5Gi"}}}}),
            "count/persistentvolumeclaims=1,gold.storageclass.storage.k8s.io/persistentvolumeclaims=1,\
             gold.storageclass.storage.k8s.io/requests.storage=5Gi,persistentvolumeclaims=1,requests.storage=5Gi",
        );
    }

    #[test]
    fn what_names_are_about() {
        for (name, expect) in [
            ("count/deployments.apps", ("apps", "deployments")),
            ("count/configmaps", ("", "configmaps")),
            ("secrets", ("", "secrets")),
            ("services.nodeports", ("", "services")),
            ("gold.storageclass.storage.k8s.io/requests.storage", ("", "persistentvolumeclaims")),
            ("limits.cpu", ("", "pods")),
            ("requests.nvidia.com/gpu", ("", "pods")),
        ] {
            assert_eq!(resource_of(name), expect, "{name}");
        }
    }

    #[test]
    fn scopes() {
        let check = |spec: Value, object: Value, expect: bool| {
            assert_eq!(is_about(&json!({"spec": spec}), "", "pods", &object), expect, "{spec} {object}");
        };
        check(json!({}), pod(json!({})), true);
        check(json!({"scopes": ["BestEffort"]}), pod(json!({})), false);
        check(json!({"scopes": ["NotBestEffort", "NotTerminating"]}), pod(json!({})), true);
        check(json!({"scopes": ["Terminating"]}), pod(json!({"activeDeadlineSeconds": 5})), true);
        let class = |operator: &str, values: Value| json!({"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", "operator": operator, "values": values}]}});
        let high = || pod(json!({"priorityClassName": "high"}));
        check(class("In", json!(["high"])), high(), true);
        check(class("NotIn", json!(["high"])), high(), false);
        check(class("Exists", json!([])), pod(json!({})), false);
        assert!(!is_about(&json!({"spec": {"scopes": ["BestEffort"]}}), "", "configmaps", &json!({})));
    }

    #[test]
    fn taking_and_giving_back() {
        let amounts = |text: &str| -> Amounts {
            text.split(',').filter_map(|p| p.split_once('=')).map(|(k, v)| (k.to_owned(), v.parse().unwrap())).collect()
        };
        let hard = amounts("pods=2,cpu=1");
        assert_eq!(
            take("q", &hard, &amounts("pods=1,cpu=500m"), &amounts("pods=1,cpu=500m")),
            Ok(amounts("pods=2,cpu=1"))
        );
        assert_eq!(
            take("q", &hard, &amounts("pods=2,cpu=500m"), &amounts("pods=1,cpu=501m")),
            Err("exceeded quota: q, requested: cpu=501m,pods=1, used: cpu=500m,pods=2, limited: cpu=1,pods=2"
                .to_owned())
        );
        assert_eq!(give_back(&amounts("pods=1"), &amounts("pods=2,x=1")), amounts("pods=0"));
        assert_eq!(difference(&amounts("a=3,b=1"), &amounts("a=1,b=2")), (amounts("a=2"), amounts("b=1")));
        assert_eq!(
            unsaid(&amounts("limits.memory=1,pods=1,requests.cpu=1"), &pod(json!({}))).unwrap(),
            "must specify limits.memory for: a,b,i; requests.cpu for: b"
        );
        assert_eq!(unsaid(&amounts("pods=1"), &pod(json!({}))), None);
    }
}
