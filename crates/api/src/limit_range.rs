//! What a LimitRange gives to pods and asks of them (<https://kubernetes.io/docs/concepts/policy/limit-range/>).

use serde_json::{Value, json};

use crate::{
    quantity::Quantity,
    quota::{Amounts, amounts},
};

/// Where is noted what a pod was given.
const NOTE: &str = "kubernetes.io/limit-ranger";

fn limits(range: &Value) -> impl Iterator<Item = &Value> {
    range["spec"]["limits"].as_array().into_iter().flatten()
}

/// Completes the item of a range: a container that says nothing gets what it may have at most, and asks for as much
/// as it gets, or for the least.
pub fn complete(item: &mut Value) {
    if item["type"] != "Container" {
        return;
    }
    for (from, to) in [("max", "default"), ("default", "defaultRequest"), ("min", "defaultRequest")] {
        let Some(given) = item[from].as_object().cloned() else { continue };
        if !item[to].is_object() {
            item[to] = json!({});
        }
        for (name, amount) in given {
            if item[to].get(&name).is_none() {
                item[to][&name] = amount;
            }
        }
    }
}

/// Gives the containers of a pod what they do not say themselves.
pub fn fill(range: &Value, pod: &mut Value) {
    let mut notes = Vec::new();
    for item in limits(range).filter(|item| item["type"] == "Container") {
        for (list, what) in [("containers", "container"), ("initContainers", "init container")] {
            for container in pod["spec"].get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                let name = container["name"].as_str().unwrap_or_default().to_owned();
                for (from, to, word) in [("defaultRequest", "requests", "request"), ("default", "limits", "limit")] {
                    let mut given: Vec<String> = Vec::new();
                    for (resource, amount) in item[from].as_object().into_iter().flatten() {
                        if container["resources"][to].get(resource).is_none() {
                            if !container["resources"].is_object() {
                                container["resources"] = json!({});
                            }
                            if !container["resources"][to].is_object() {
                                container["resources"][to] = json!({});
                            }
                            container["resources"][to][resource] = amount.clone();
                            given.push(resource.clone());
                        }
                    }
                    if !given.is_empty() {
                        given.sort();
                        notes.push(format!("{} {word} for {what} {name}", given.join(", ")));
                    }
                }
            }
        }
    }
    if !notes.is_empty() {
        if !pod["metadata"]["annotations"].is_object() {
            pod["metadata"]["annotations"] = json!({});
        }
        pod["metadata"]["annotations"][NOTE] = format!("LimitRanger plugin set: {}", notes.join("; ")).into();
    }
}

/// What is wrong with amounts, in upstream's words.
fn check(item: &Value, requests: &Amounts, limits: &Amounts, wrong: &mut Vec<String>) {
    let ty = item["type"].as_str().unwrap_or_default();
    for (name, least) in amounts(&item["min"]) {
        let what = format!("minimum {name} usage per {ty} is {least}");
        match (requests.get(&name), limits.get(&name)) {
            (None, _) => wrong.push(format!("{what}.  No request is specified")),
            (Some(request), _) if *request < least => wrong.push(format!("{what}, but request is {request}")),
            (_, Some(limit)) if *limit < least => wrong.push(format!("{what}, but limit is {limit}")),
            _ => {}
        }
    }
    for (name, most) in amounts(&item["max"]) {
        let what = format!("maximum {name} usage per {ty} is {most}");
        match (limits.get(&name), requests.get(&name)) {
            (None, _) => wrong.push(format!("{what}.  No limit is specified")),
            (Some(limit), _) if *limit > most => wrong.push(format!("{what}, but limit is {limit}")),
            (_, Some(request)) if *request > most => wrong.push(format!("{what}, but request is {request}")),
            _ => {}
        }
    }
    for (name, most) in amounts(&item["maxLimitRequestRatio"]) {
        let what = format!("{name} max limit to request ratio per {ty} is {most}");
        let zero = Quantity::new(0);
        match (requests.get(&name).filter(|r| **r != zero), limits.get(&name).filter(|l| **l != zero)) {
            (None, _) => wrong.push(format!("{what}, but no request is specified or request is 0")),
            (_, None) => wrong.push(format!("{what}, but no limit is specified or limit is 0")),
            (Some(request), Some(limit)) => {
                let ratio = limit.as_f64() / request.as_f64();
                if ratio > most.as_f64() {
                    wrong.push(format!("{what}, but provided ratio is {ratio:.6}"));
                }
            }
        }
    }
}

/// What all containers have together; a resource that one of them does not name is not summed.
fn total(pod: &Value, part: &str) -> Amounts {
    let containers: Vec<Amounts> = pod["spec"]["containers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|container| amounts(&container["resources"][part]))
        .collect();
    let mut out = Amounts::new();
    let Some(first) = containers.first() else { return out };
    for name in first.keys() {
        let each: Vec<Quantity> = containers.iter().filter_map(|c| c.get(name).copied()).collect();
        if each.len() == containers.len() {
            let sum = each.into_iter().reduce(|a, b| a + b).unwrap_or(Quantity::new(0));
            out.insert(name.clone(), sum);
        }
    }
    // What the pod says of itself counts before what its containers add up to.
    out.extend(amounts(&pod["spec"]["resources"][part]));
    out
}

/// Everything that is wrong with a pod.
pub fn check_pod(range: &Value, pod: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    for item in limits(range) {
        match item["type"].as_str() {
            Some("Container") => {
                for list in ["containers", "initContainers"] {
                    for container in pod["spec"][list].as_array().into_iter().flatten() {
                        let resources = &container["resources"];
                        check(item, &amounts(&resources["requests"]), &amounts(&resources["limits"]), &mut wrong);
                    }
                }
            }
            Some("Pod") => check(item, &total(pod, "requests"), &total(pod, "limits"), &mut wrong),
            _ => {}
        }
    }
    wrong
}

/// Everything that is wrong with a claim: only what it asks for counts.
pub fn check_claim(range: &Value, claim: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    let requests = amounts(&claim["spec"]["resources"]["requests"]);
    for item in limits(range).filter(|item| item["type"] == "PersistentVolumeClaim") {
        for (name, least) in amounts(&item["min"]) {
            let what = format!("minimum {name} usage per PersistentVolumeClaim is {least}");
            match requests.get(&name) {
                None => wrong.push(format!("{what}.  No request is specified")),
                Some(request) if *request < least => wrong.push(format!("{what}, but request is {request}")),
                _ => {}
            }
        }
        for (name, most) in amounts(&item["max"]) {
            let what = format!("maximum {name} usage per PersistentVolumeClaim is {most}");
            match requests.get(&name) {
                None => wrong.push(format!("{what}.  No request is specified")),
                Some(request) if *request > most => wrong.push(format!("{what}, but request is {request}")),
                _ => {}
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(mut item: Value) -> Value {
        complete(&mut item);
        json!({"spec": {"limits": [item]}})
    }

    fn pod(resources: Value) -> Value {
        json!({"metadata": {}, "spec": {"containers": [{"name": "c", "resources": resources}]}})
    }

    #[test]
    fn what_is_filled_in() {
        let range = range(
            json!({"type": "Container", "max": {"cpu": "1"}, "min": {"memory": "1Mi"}, "default": {"memory": "2Mi"}}),
        );
        let mut filled = pod(json!({"limits": {"memory": "3Mi"}}));
        fill(&range, &mut filled);
        let resources = &filled["spec"]["containers"][0]["resources"];
        assert_eq!(
            *resources,
            json!({"limits": {"memory": "3Mi", "cpu": "1"}, "requests": {"cpu": "1", "memory": "2Mi"}})
        );
        assert_eq!(
            filled["metadata"]["annotations"][NOTE],
            "LimitRanger plugin set: cpu, memory request for container c; cpu limit for container c"
        );
        let again = filled.clone();
        fill(&range, &mut filled);
        assert_eq!(filled, again);
    }

    #[test]
    fn what_is_wrong() {
        let check = |item: Value, resources: Value, expect: &[&str]| {
            let range = json!({"spec": {"limits": [item]}});
            assert_eq!(check_pod(&range, &pod(resources.clone())), expect, "{range} {resources}");
        };
        let max = json!({"type": "Container", "max": {"memory": "1Gi"}});
        check(max.clone(), json!({"limits": {"memory": "1Gi"}}), &[]);
        check(
            max.clone(),
            json!({"limits": {"memory": "2Gi"}}),
            &["maximum memory usage per Container is 1Gi, but limit is 2Gi"],
        );
        check(max, json!({}), &["maximum memory usage per Container is 1Gi.  No limit is specified"]);
        let min = json!({"type": "Pod", "min": {"cpu": "100m"}});
        check(
            min.clone(),
            json!({"requests": {"cpu": "50m"}}),
            &["minimum cpu usage per Pod is 100m, but request is 50m"],
        );
        check(min, json!({}), &["minimum cpu usage per Pod is 100m.  No request is specified"]);
        let ratio = json!({"type": "Container", "maxLimitRequestRatio": {"cpu": "2"}});
        check(ratio.clone(), json!({"requests": {"cpu": "1"}, "limits": {"cpu": "2"}}), &[]);
        check(
            ratio.clone(),
            json!({"requests": {"cpu": "1"}, "limits": {"cpu": "3"}}),
            &["cpu max limit to request ratio per Container is 2, but provided ratio is 3.000000"],
        );
        check(
            ratio,
            json!({"limits": {"cpu": "3"}}),
            &["cpu max limit to request ratio per Container is 2, but no request is specified or request is 0"],
        );
        let claim = |size: &str| json!({"spec": {"resources": {"requests": {"storage": size}}}});
        let range = json!({"spec": {"limits": [{"type": "PersistentVolumeClaim", "max": {"storage": "5Gi"}, "min": {"storage": "1Gi"}}]}});
        assert!(check_claim(&range, &claim("2Gi")).is_empty());
        assert_eq!(
            check_claim(&range, &claim("9Gi")),
            ["maximum storage usage per PersistentVolumeClaim is 5Gi, but request is 9Gi"]
        );
    }
}
