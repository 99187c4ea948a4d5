//! Resources of a pod as a whole (<https://kubernetes.io/docs/concepts/configuration/manage-resources-containers/#pod-level-resource-specification>,
//! KEP-2837).

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{default, items, meta};
use crate::{
    field::{Errors, Path},
    quantity::Quantity,
};

type Amounts = BTreeMap<String, Quantity>;

const HUGE: &str = "hugepages-";

/// Whether a pod can say of itself how much it needs of this.
fn is_supported(name: &str) -> bool {
    ["cpu", "memory"].contains(&name) || name.starts_with(HUGE)
}

fn amounts(object: &Value, part: &str) -> Amounts {
    let of = object["resources"][part].as_object().into_iter().flatten();
    of.filter_map(|(name, amount)| Some((name.clone(), meta::quantity(amount)?))).collect()
}

fn add(to: &mut Amounts, other: &Amounts) {
    for (name, amount) in other {
        let sum = to.get(name).map_or(*amount, |known| *known + *amount);
        to.insert(name.clone(), sum);
    }
}

fn larger(to: &mut Amounts, other: &Amounts) {
    for (name, amount) in other {
        if to.get(name).is_none_or(|known| known < amount) {
            to.insert(name.clone(), *amount);
        }
    }
}

/// What the containers need together: those that run at once with their sidecars, or one that runs before them.
fn together(spec: &Value, part: &str) -> Amounts {
    let (mut running, mut sidecars, mut before) = (Amounts::new(), Amounts::new(), Amounts::new());
    items(spec, "containers").for_each(|container| add(&mut running, &amounts(container, part)));
    for container in items(spec, "initContainers") {
        let mut now = sidecars.clone();
        add(&mut now, &amounts(container, part));
        if container["restartPolicy"] == "Always" {
            sidecars = now.clone();
        }
        larger(&mut before, &now);
    }
    add(&mut running, &sidecars);
    larger(&mut running, &before);
    running
}

/// Of what a pod limits, and of what its containers ask for, it asks for as much itself.
pub(super) fn defaults(spec: &mut Value) {
    if spec["resources"]["limits"].as_object().is_none_or(serde_json::Map::is_empty) {
        return;
    }
    let mut wanted: Vec<(String, Value)> = together(spec, "requests")
        .into_iter()
        .filter(|(name, _)| is_supported(name))
        .map(|(name, amount)| (name, amount.to_string().into()))
        .collect();
    let limits = spec["resources"]["limits"].as_object().into_iter().flatten();
    wanted.extend(limits.filter(|(name, _)| is_supported(name)).map(|(name, limit)| (name.clone(), limit.clone())));
    default(&mut spec["resources"], "requests", json!({}));
    for (name, amount) in wanted {
        default(&mut spec["resources"]["requests"], &name, amount);
    }
}

/// Validates `resources` of a pod.
pub(super) fn validate(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let (own, path) = (&spec["resources"], path.at("resources"));
    if !own.is_object() {
        return;
    }
    if spec["os"]["name"] == "windows" {
        return errors.forbidden(path, "may not be set for a windows pod");
    }
    let list = path.at("claims");
    for (index, _) in items(own, "claims").enumerate() {
        errors.forbidden(list.index(index), "claims may not be set for Resources at pod-level");
    }
    let (requests, limits) = (amounts(spec, "requests"), amounts(spec, "limits"));
    for (part, of) in [("limits", &limits), ("requests", &requests)] {
        let at = path.at(part);
        for (name, amount) in of {
            let at = at.key(name);
            if !is_supported(name) {
                errors.not_supported(at, name.as_str(), &["cpu", HUGE, "memory"]);
            }
            if amount.is_negative() {
                errors.invalid(at, amount.to_string(), "must be greater than or equal to 0");
            }
        }
    }
    let at = path.at("requests");
    for (name, request) in &requests {
        match limits.get(name) {
            Some(limit) if name.starts_with(HUGE) && request != limit => {
                errors.invalid(at, request.to_string(), format!("must be equal to {name} limit of {limit}"));
            }
            Some(limit) if request > limit => {
                errors.invalid(
                    at,
                    request.to_string(),
                    format!("must be less than or equal to {name} limit of {limit}"),
                );
            }
            None if name.starts_with(HUGE) => {
                errors.required(path.at("limits"), "Limit must be set for non overcommitable resources");
            }
            _ => {}
        }
    }
    let any = |test: &dyn Fn(&str) -> bool| requests.keys().chain(limits.keys()).any(|name| test(name));
    if any(&|name| name.starts_with(HUGE)) && !any(&|name| ["cpu", "memory"].contains(&name)) {
        errors.forbidden(path, "HugePages require cpu or memory");
    }
    of_containers(spec, &requests, &limits, path, errors);
}

/// Validates that containers do not want more than the pod.
fn of_containers(spec: &Value, requests: &Amounts, limits: &Amounts, path: Path<'_>, errors: &mut Errors) {
    for (part, of) in [("requests", requests), ("limits", limits)] {
        let at = path.at(part);
        for (name, sum) in together(spec, part) {
            let counts = part == "requests" || name.starts_with(HUGE);
            if let Some(own) = of.get(&name).filter(|own| counts && sum > **own) {
                let why = format!("must be greater than or equal to aggregate container {part} of {sum}");
                errors.invalid(at.key(&name), own.to_string(), why);
            }
        }
    }
    // Upstream writes these paths as if containers were within the resources.
    let list = path.at("containers");
    for (index, container) in items(spec, "containers").enumerate() {
        let at = list.index(index);
        for (name, limit) in amounts(container, "limits") {
            if let Some(most) = limits.get(&name).filter(|most| limit > **most) {
                let at = at.key(&name);
                let why = format!("must be less than or equal to pod limits of {most}");
                errors.invalid(at.at("limits"), limit.to_string(), why);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(own: Value, containers: &[Value]) -> Value {
        let containers: Vec<Value> = containers.iter().map(|resources| json!({"resources": resources})).collect();
        json!({"resources": own, "containers": containers})
    }

    fn check(spec: Value, expect: &[&str]) {
        let mut errors = Errors::default();
        validate(&spec, Path::Root.at("spec"), &mut errors);
        assert_eq!(errors.0.iter().map(ToString::to_string).collect::<Vec<_>>(), expect, "{spec:#}");
    }

    #[test]
    fn pods_have_enough_for_their_containers() {
        let one = json!({"requests": {"cpu": "1"}, "limits": {"cpu": "2"}});
        check(pod(json!({"requests": {"cpu": "2"}, "limits": {"cpu": "2"}}), &[one.clone(), one.clone()]), &[]);
        check(
            pod(json!({"requests": {"cpu": "1500m"}, "limits": {"cpu": "1500m"}}), &[one.clone(), one.clone()]),
            &[
                "spec.resources.requests[cpu]: Invalid value: \"1500m\": must be greater than or equal to aggregate container requests of 2",
                "spec.resources.containers[0][cpu].limits: Invalid value: \"2\": must be less than or equal to pod limits of 1500m",
                "spec.resources.containers[1][cpu].limits: Invalid value: \"2\": must be less than or equal to pod limits of 1500m",
            ],
        );
        let mut with_init = pod(json!({"requests": {"cpu": "2"}}), &[one]);
        with_init["initContainers"] = json!([{"resources": {"requests": {"cpu": "3"}}}]);
        check(
            with_init,
            &[
                "spec.resources.requests[cpu]: Invalid value: \"2\": must be greater than or equal to aggregate container requests of 3",
            ],
        );
    }

    #[test]
    fn what_a_pod_can_say() {
        for (own, expect) in [
            (
                json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}),
                "spec.resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
            ),
            (
                json!({"requests": {"ephemeral-storage": "1Gi"}}),
                "spec.resources.requests[ephemeral-storage]: Unsupported value: \"ephemeral-storage\": supported values: \"cpu\", \"hugepages-\", \"memory\"",
            ),
            (
                json!({"limits": {"cpu": "-1"}}),
                "spec.resources.limits[cpu]: Invalid value: \"-1\": must be greater than or equal to 0",
            ),
            (
                json!({"claims": [{"name": "a"}]}),
                "spec.resources.claims[0]: Forbidden: claims may not be set for Resources at pod-level",
            ),
            (json!({"limits": {"hugepages-2Mi": "2Mi"}}), "spec.resources: Forbidden: HugePages require cpu or memory"),
            (
                json!({"requests": {"hugepages-2Mi": "2Mi", "cpu": "1"}}),
                "spec.resources.limits: Required value: Limit must be set for non overcommitable resources",
            ),
        ] {
            check(pod(own, &[]), &[expect]);
        }
        let mut windows = pod(json!({"limits": {"cpu": "1"}}), &[]);
        windows["os"] = json!({"name": "windows"});
        check(windows, &["spec.resources: Forbidden: may not be set for a windows pod"]);
    }

    #[test]
    fn what_a_pod_asks_for_itself() {
        let one = json!({"requests": {"cpu": "500m", "ephemeral-storage": "1Gi"}});
        for (own, expect) in [
            (json!({"limits": {"cpu": "2", "memory": "1Gi"}}), json!({"cpu": "1", "memory": "1Gi"})),
            (json!({"limits": {"cpu": "2"}, "requests": {"cpu": "1500m"}}), json!({"cpu": "1500m"})),
            (json!({"requests": {"memory": "1Gi"}}), json!({"memory": "1Gi"})),
        ] {
            let mut spec = pod(own, &[one.clone(), one.clone()]);
            defaults(&mut spec);
            assert_eq!(spec["resources"]["requests"], expect);
        }
    }
}
