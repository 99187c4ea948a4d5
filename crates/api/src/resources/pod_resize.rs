//! What of a pod's resources may be changed while it runs, and how its containers take it
//! (<https://kubernetes.io/docs/tasks/configure-pod-container/resize-container-resources/>, KEP-1287).

use std::collections::HashSet;

use serde_json::Value;

use super::{items, items_mut, pod::qos_class, pod_spec};
use crate::{
    field::{Errors, Path},
    quota::{Amounts, amounts},
};

/// What can be changed in place.
const RESIZABLE: [&str; 2] = ["cpu", "memory"];
const LISTS: [&str; 2] = ["containers", "initContainers"];

/// Validates the `resizePolicy` of a container.
pub(super) fn policy(container: &Value, pod_restarts: Option<&str>, path: Path<'_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (index, policy) in items(container, "resizePolicy").enumerate() {
        let name = policy["resourceName"].as_str().unwrap_or_default();
        if !seen.insert(name) {
            errors.duplicate(path.index(index), name);
        }
        match name {
            "" => errors.required(path, ""),
            name if RESIZABLE.contains(&name) => {}
            name => errors.not_supported(path, name, &RESIZABLE),
        }
        let restart = policy["restartPolicy"].as_str().unwrap_or_default();
        match restart {
            "NotRequired" | "RestartContainer" => {}
            "" => errors.required(path, ""),
            other => errors.not_supported(path, other, &["NotRequired", "RestartContainer"]),
        }
        if pod_restarts == Some("Never") && restart != "NotRequired" {
            errors.invalid(path, restart, "must be 'NotRequired' when `restartPolicy` is 'Never'");
        }
    }
}

/// Leaves of a request to `/resize` only what it can change: the resources of containers. One that adds, takes away or
/// renames containers is left for validation to refuse.
pub fn merge(new: &mut Value, old: &Value) {
    let names = |object: &Value, list: &str| -> Vec<Value> {
        items(&object["spec"], list).map(|container| container["name"].clone()).collect()
    };
    let alike = LISTS.iter().all(|list| names(new, list) == names(old, list));
    let asked = std::mem::replace(&mut new["spec"], old["spec"].clone());
    for list in LISTS {
        if !alike {
            new["spec"][list] = asked[list].clone();
            continue;
        }
        for (container, wanted) in items_mut(&mut new["spec"], list).zip(items(&asked, list)) {
            container["resources"] = wanted["resources"].clone();
        }
    }
    let spec = new["spec"].take();
    *new = old.clone();
    new["spec"] = spec;
}

/// Validates what a resize makes of a pod.
pub(super) fn validate(new: &Value, old: &Value, errors: &mut Errors) {
    let path = Path::Root.at("spec");
    let (spec, before) = (&new["spec"], &old["spec"]);
    pod_spec::validate(spec, path, errors);
    if before["resources"].is_object() {
        return errors.forbidden(Path::Root, "pods with pod-level resources cannot be resized");
    }
    if old["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_string() {
        return errors.forbidden(Path::Root, "static pods cannot be resized");
    }
    if before["os"]["name"] == "windows" {
        return errors.forbidden(Path::Root, "windows pods cannot be resized");
    }
    let class = old["status"]["qosClass"].as_str().unwrap_or_else(|| qos_class(before));
    if qos_class(spec) != class {
        errors.invalid(path, class, "Pod QOS Class may not change as a result of resizing");
    }
    let running = items(&old["status"], "containerStatuses").find(|status| status["state"]["running"].is_object());
    if running.is_some_and(|status| !status["resources"].is_object()) {
        errors.forbidden(path, "Pod running on node without support for resize");
    }
    if !same_order(spec, before, path, errors) {
        return;
    }
    for list in LISTS {
        let at = path.at(list);
        for (index, (container, was)) in items(spec, list).zip(items(before, list)).enumerate() {
            let (now, was) = (&container["resources"], &was["resources"]);
            if list == "initContainers" && container["restartPolicy"] != "Always" {
                if parts(now) != parts(was) {
                    errors.forbidden(path, "resources for non-sidecar init containers are immutable");
                }
                continue;
            }
            let at = at.index(index);
            let at = at.at("resources");
            for (part, what) in [("requests", "resource requests"), ("limits", "resource limits")] {
                let now = amounts(&now[part]);
                if amounts(&was[part]).keys().any(|name| !now.contains_key(name)) {
                    errors.forbidden(at.at(part), format!("{what} cannot be removed"));
                }
            }
            if others(now) != others(was) || now["claims"] != was["claims"] {
                errors.forbidden(path, "only cpu and memory resources are mutable");
            }
        }
    }
}

fn same_order(spec: &Value, before: &Value, path: Path<'_>, errors: &mut Errors) -> bool {
    let count = errors.0.len();
    for list in LISTS {
        let at = path.at(list);
        if items(spec, list).count() != items(before, list).count() {
            errors.forbidden(at, format!("{list} may not be added or removed on resize"));
            continue;
        }
        for (index, (now, was)) in items(spec, list).zip(items(before, list)).enumerate() {
            if now["name"] != was["name"] {
                let at = at.index(index);
                errors.forbidden(at.at("name"), format!("{list} may not be renamed or reordered on resize"));
            }
        }
    }
    errors.0.len() == count
}

fn parts(resources: &Value) -> [Amounts; 2] {
    ["requests", "limits"].map(|part| amounts(&resources[part]))
}

/// What cannot be changed in place.
fn others(resources: &Value) -> [Amounts; 2] {
    let mut parts = parts(resources);
    parts.iter_mut().for_each(|part| part.retain(|name, _| !RESIZABLE.contains(&name.as_str())));
    parts
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(containers: Value) -> Value {
        let mut spec = json!({"containers": containers, "initContainers": [
            {"name": "once", "image": "i", "resources": {"requests": {"cpu": "1"}}},
            {"name": "beside", "image": "i", "restartPolicy": "Always", "resources": {"requests": {"cpu": "1"}}}]});
        pod_spec::defaults(&mut spec);
        json!({"metadata": {"name": "p"}, "spec": spec, "status": {"qosClass": qos_class(&spec)}})
    }

    fn container(resources: Value) -> Value {
        json!({"name": "a", "image": "i", "resources": resources})
    }

    #[test]
    fn what_a_resize_may_change() {
        let old = pod(json!([container(json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "2"}}))]));
        let check = |change: &dyn Fn(&mut Value), expect: &[&str]| {
            let mut new = old.clone();
            change(&mut new["spec"]);
            merge(&mut new, &old);
            let mut errors = Errors::default();
            validate(&new, &old, &mut errors);
            let found: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
            assert_eq!(found, expect, "{new:#}");
        };
        let of = |spec: &mut Value, list: &str, index: usize, resources: Value| {
            spec[list][index]["resources"] = resources;
        };
        check(
            &|spec| {
                of(spec, "containers", 0, json!({"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"cpu": "1"}}))
            },
            &[],
        );
        // What is no business of a resize is left as it was.
        check(&|spec| spec["containers"][0]["image"] = "j".into(), &[]);
        check(&|spec| of(spec, "initContainers", 1, json!({"requests": {"cpu": "2"}})), &[]);
        check(
            &|spec| of(spec, "initContainers", 0, json!({"requests": {"cpu": "2"}})),
            &["spec: Forbidden: resources for non-sidecar init containers are immutable"],
        );
        check(
            &|spec| of(spec, "containers", 0, json!({"requests": {"cpu": "1", "memory": "1Gi"}})),
            &["spec.containers[0].resources.limits: Forbidden: resource limits cannot be removed"],
        );
        check(
            &|spec| of(spec, "containers", 0, json!({"requests": {"cpu": "1"}, "limits": {"cpu": "2"}})),
            &["spec.containers[0].resources.requests: Forbidden: resource requests cannot be removed"],
        );
        let more = json!({"requests": {"cpu": "1", "memory": "1Gi", "a/b": "1"}, "limits": {"cpu": "2", "a/b": "1"}});
        check(
            &|spec| of(spec, "containers", 0, more.clone()),
            &["spec: Forbidden: only cpu and memory resources are mutable"],
        );
        check(
            &|spec| {
                of(spec, "containers", 0, json!({"requests": {"cpu": "3", "memory": "1Gi"}, "limits": {"cpu": "2"}}))
            },
            &[
                "spec.containers[0].resources.requests: Invalid value: \"3\": must be less than or equal to cpu limit of 2",
            ],
        );
        check(
            &|spec| spec["containers"].as_array_mut().unwrap().push(json!({"name": "b", "image": "i"})),
            &["spec.containers: Forbidden: containers may not be added or removed on resize"],
        );
        check(
            &|spec| spec["containers"][0]["name"] = "b".into(),
            &["spec.containers[0].name: Forbidden: containers may not be renamed or reordered on resize"],
        );
    }

    #[test]
    fn which_pods_may_not_be_resized() {
        let check = |old: Value, resources: Value, expect: &str| {
            let mut new = old.clone();
            new["spec"]["containers"][0]["resources"] = resources;
            let mut errors = Errors::default();
            validate(&new, &old, &mut errors);
            let found: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
            assert_eq!(found, [expect], "{old:#}");
        };
        let wanted = json!({"requests": {"cpu": "2"}});
        let mut guaranteed = json!({"containers": [container(json!({"limits": {"cpu": "1", "memory": "1Gi"}}))]});
        pod_spec::defaults(&mut guaranteed);
        let guaranteed = json!({"metadata": {}, "spec": guaranteed, "status": {"qosClass": "Guaranteed"}});
        check(
            guaranteed,
            json!({"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}),
            "spec: Invalid value: \"Guaranteed\": Pod QOS Class may not change as a result of resizing",
        );
        let plain = pod(json!([container(json!({"requests": {"cpu": "1"}}))]));
        let mut running = plain.clone();
        running["status"]["containerStatuses"] = json!([{"name": "a", "state": {"running": {}}}]);
        check(running, wanted.clone(), "spec: Forbidden: Pod running on node without support for resize");
        let mut mirror = plain.clone();
        mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "1"});
        check(mirror, wanted.clone(), ": Forbidden: static pods cannot be resized");
        let mut whole = plain;
        whole["spec"]["resources"] = json!({"requests": {"cpu": "3"}});
        check(whole, wanted, ": Forbidden: pods with pod-level resources cannot be resized");
    }

    #[test]
    fn policies() {
        let check = |policies: Value, restarts: &str, expect: &[&str]| {
            let mut errors = Errors::default();
            policy(&json!({"resizePolicy": policies}), Some(restarts), Path::Root.at("resizePolicy"), &mut errors);
            let found: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
            assert_eq!(found, expect, "{policies}");
        };
        let one = |name: &str, restart: &str| json!({"resourceName": name, "restartPolicy": restart});
        check(json!([one("cpu", "NotRequired"), one("memory", "RestartContainer")]), "Always", &[]);
        check(
            json!([one("cpu", "NotRequired"), one("cpu", "NotRequired")]),
            "Always",
            &["resizePolicy[1]: Duplicate value: \"cpu\""],
        );
        check(
            json!([one("disk", "Maybe")]),
            "Always",
            &[
                "resizePolicy: Unsupported value: \"disk\": supported values: \"cpu\", \"memory\"",
                "resizePolicy: Unsupported value: \"Maybe\": supported values: \"NotRequired\", \"RestartContainer\"",
            ],
        );
        check(json!([one("cpu", "")]), "Always", &["resizePolicy: Required value"]);
        check(
            json!([one("memory", "RestartContainer")]),
            "Never",
            &[
                "resizePolicy: Invalid value: \"RestartContainer\": must be 'NotRequired' when `restartPolicy` is 'Never'",
            ],
        );
    }
}
