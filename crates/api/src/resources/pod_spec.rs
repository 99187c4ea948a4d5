//! The spec of pods: defaults and validation shared by Pod and everything with a template.
//!
//! Defaults follow <https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/>.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{
    container, default, ip, items, items_mut, meta, pod_claims, pod_resources, security_context, volume,
    windows_options,
};
use crate::{
    field::{Errors, Path},
    names,
};

/// Fills in what was left out.
pub fn defaults(spec: &mut Value) {
    default(spec, "restartPolicy", "Always");
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "schedulerName", "default-scheduler");
    default(spec, "terminationGracePeriodSeconds", 30);
    default(spec, "securityContext", json!({}));
    default(spec, "enableServiceLinks", true);
    // The old name of the field is kept in step with the new one.
    match (spec["serviceAccountName"].as_str(), spec["serviceAccount"].as_str()) {
        (Some(name), _) if !name.is_empty() => spec["serviceAccount"] = name.into(),
        (_, Some(name)) if !name.is_empty() => spec["serviceAccountName"] = name.into(),
        _ => {}
    }
    let host_network = spec["hostNetwork"] == true;
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for container in items_mut(spec, list) {
            container::defaults(container, host_network);
        }
    }
    for volume in items_mut(spec, "volumes") {
        volume::defaults(volume);
    }
    for constraint in items_mut(spec, "topologySpreadConstraints") {
        default(constraint, "nodeAffinityPolicy", "Honor");
        default(constraint, "nodeTaintsPolicy", "Ignore");
    }
}

/// Says everything that is wrong with the spec of a pod.
pub fn validate(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    meta::one_of(spec, "restartPolicy", &["Always", "OnFailure", "Never"], path, errors);
    meta::one_of(spec, "dnsPolicy", &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"], path, errors);
    meta::non_negative(spec, "terminationGracePeriodSeconds", path, errors);
    if let Some(deadline) = spec["activeDeadlineSeconds"].as_i64().filter(|d| *d < 1) {
        errors.invalid(path.at("activeDeadlineSeconds"), deadline, "must be between 1 and 2147483647, inclusive");
    }
    meta::label_map(&spec["nodeSelector"], path.at("nodeSelector"), errors);
    for key in ["serviceAccountName", "nodeName", "priorityClassName"] {
        if let Some(name) = spec[key].as_str().filter(|s| !s.is_empty())
            && let Err(detail) = names::dns_subdomain(name)
        {
            errors.invalid(path.at(key), name, detail);
        }
    }
    for key in ["hostname", "subdomain"] {
        if let Some(name) = spec[key].as_str().filter(|s| !s.is_empty())
            && let Err(detail) = names::dns_label(name)
        {
            errors.invalid(path.at(key), name, detail);
        }
    }
    dns_config(spec, path.at("dnsConfig"), errors);
    host_aliases(spec, path.at("hostAliases"), errors);
    gates(spec, path, errors);
    security_context::of_pod(spec, path, errors);
    windows_options::host_process(spec, path, errors);
    security_context::operating_system(spec, path, errors);
    meta::one_of(spec, "preemptionPolicy", &["Never", "PreemptLowerPriority"], path, errors);
    if let Some(class) = spec["runtimeClassName"].as_str() {
        errors.expect(path.at("runtimeClassName"), class, names::dns_subdomain);
    }
    container::amounts(spec, "overhead", path, errors);
    pod_claims::validate(spec, path, errors);
    pod_resources::validate(spec, path, errors);
    containers(spec, path, errors);
    tolerations(spec, path, errors);
    affinity(&spec["affinity"], path.at("affinity"), errors);
    let at = path.at("topologySpreadConstraints");
    for (index, constraint) in items(spec, "topologySpreadConstraints").enumerate() {
        let at = at.index(index);
        if constraint["maxSkew"].as_i64().unwrap_or_default() < 1 {
            errors.invalid(at.at("maxSkew"), constraint["maxSkew"].clone(), "must be greater than zero");
        }
        if constraint["topologyKey"].as_str().unwrap_or_default().is_empty() {
            errors.required(at.at("topologyKey"), "can not be empty");
        }
        let known = ["DoNotSchedule", "ScheduleAnyway"];
        match constraint["whenUnsatisfiable"].as_str() {
            Some(text) if known.contains(&text) => {}
            other => errors.not_supported(at.at("whenUnsatisfiable"), other.unwrap_or_default(), &known),
        }
        meta::selector(&constraint["labelSelector"], at.at("labelSelector"), errors);
    }
}

fn containers(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let pod = container::Pod {
        volumes: volume::validate(spec, path.at("volumes"), errors),
        host_users: spec["hostUsers"] != false,
        grace: spec["terminationGracePeriodSeconds"].as_i64(),
        restarts: spec["restartPolicy"].as_str(),
    };
    let mut names_seen = HashSet::new();
    if items(spec, "containers").next().is_none() {
        errors.required(path.at("containers"), "");
    }
    let mut host_ports = HashSet::new();
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        let at = path.at(list);
        for (index, c) in items(spec, list).enumerate() {
            let at = at.index(index);
            let name = c["name"].as_str().unwrap_or_default();
            if !name.is_empty() && !names_seen.insert(name) {
                errors.duplicate(at.at("name"), name);
            }
            container::validate(c, list, &pod, at, errors);
            pod_claims::of_container(&c["resources"], spec, at.at("resources"), errors);
            if list != "initContainers" {
                used_ports(c, &mut host_ports, at.at("ports"), errors);
            }
            let target = c["targetContainerName"].as_str().unwrap_or_default();
            let known = || ["containers", "initContainers"].iter().flat_map(|list| items(spec, list));
            if !target.is_empty() && !known().any(|c| c["name"] == target) {
                errors.not_found(at.at("targetContainerName"), target);
            }
        }
    }
}

/// A port of the machine is used by one container.
fn used_ports<'a>(
    c: &'a Value,
    used: &mut HashSet<(Option<&'a str>, &'a str, i64)>,
    path: Path<'_>,
    errors: &mut Errors,
) {
    for (index, port) in items(c, "ports").enumerate() {
        let Some(number) = port["hostPort"].as_i64().filter(|number| *number != 0) else { continue };
        let host = (port["protocol"].as_str(), port["hostIP"].as_str().unwrap_or_default(), number);
        if !used.insert(host) {
            let at = path.index(index);
            errors.duplicate(at.at("hostPort"), format!("{}/{}/{number}", host.0.unwrap_or("TCP"), host.1));
        }
    }
}

/// Validates how a pod looks names up (<https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/>).
fn dns_config(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    const MOST_SERVERS: usize = 3;
    const MOST_SEARCHES: usize = 32;
    const LONGEST_SEARCHES: usize = 2048;
    let config = &spec["dnsConfig"];
    if spec["dnsPolicy"] == "None" {
        if !config.is_object() {
            return errors.required(path, "must provide `dnsConfig` when `dnsPolicy` is None");
        }
        if items(config, "nameservers").next().is_none() {
            let detail = "must provide at least one DNS nameserver when `dnsPolicy` is None";
            return errors.required(path.at("nameservers"), detail);
        }
    }
    let at = path.at("nameservers");
    if items(config, "nameservers").count() > MOST_SERVERS {
        let detail = format!("must not have more than {MOST_SERVERS} nameservers");
        errors.invalid(at, config["nameservers"].clone(), detail);
    }
    for (index, server) in items(config, "nameservers").enumerate() {
        errors.expect(at.index(index), server.as_str().unwrap_or_default(), ip::canonical);
    }
    let at = path.at("searches");
    let searches: Vec<&str> = items(config, "searches").filter_map(Value::as_str).collect();
    if searches.len() > MOST_SEARCHES {
        let detail = format!("must not have more than {MOST_SEARCHES} search paths");
        errors.invalid(at, config["searches"].clone(), detail);
    }
    if searches.join(" ").len() > LONGEST_SEARCHES {
        let detail =
            format!("must not have more than {LONGEST_SEARCHES} characters (including spaces) in the search list");
        errors.invalid(at, config["searches"].clone(), detail);
    }
    for (index, search) in searches.into_iter().enumerate().filter(|(_, search)| *search != ".") {
        errors.expect(at.index(index), search.strip_suffix('.').unwrap_or(search), names::dns_subdomain_underscore);
    }
    let at = path.at("options");
    for (index, option) in items(config, "options").enumerate() {
        if option["name"].as_str().unwrap_or_default().is_empty() {
            errors.required(at.index(index), "must not be empty");
        }
    }
}

fn host_aliases(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    for (index, alias) in items(spec, "hostAliases").enumerate() {
        let at = path.index(index);
        errors.expect(at.at("ip"), alias["ip"].as_str().unwrap_or_default(), ip::address);
        let list = at.at("hostnames");
        for (index, name) in items(alias, "hostnames").enumerate() {
            errors.expect(list.index(index), name.as_str().unwrap_or_default(), names::dns_subdomain);
        }
    }
}

/// Validates what a pod waits for before it is scheduled, and before it is ready.
fn gates(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.at("readinessGates");
    for (index, gate) in items(spec, "readinessGates").enumerate() {
        let at = list.index(index);
        let condition = gate["conditionType"].as_str().unwrap_or_default();
        errors.expect(at.at("conditionType"), condition, names::qualified_name);
    }
    let list = path.at("schedulingGates");
    let mut seen = HashSet::new();
    for (index, gate) in items(spec, "schedulingGates").enumerate() {
        let name = gate["name"].as_str().unwrap_or_default();
        errors.expect(list.index(index), name, names::qualified_name);
        if !seen.insert(name) {
            errors.duplicate(list.index(index), name);
        }
    }
}

/// Validates `tolerations` of a pod, or of a class of pods.
pub(super) fn tolerations(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.at("tolerations");
    for (index, toleration) in items(spec, "tolerations").enumerate() {
        let at = list.index(index);
        let key = toleration["key"].as_str().unwrap_or_default();
        let operator = toleration["operator"].as_str().unwrap_or("Equal");
        if !key.is_empty() {
            if let Err(detail) = names::qualified_name(key) {
                errors.invalid(at.at("key"), key, detail);
            }
        } else if operator != "Exists" {
            errors.invalid(
                at.at("operator"),
                operator,
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            );
        }
        meta::one_of(toleration, "operator", &["Equal", "Exists"], at, errors);
        if operator == "Exists" && toleration["value"].as_str().is_some_and(|v| !v.is_empty()) {
            errors.invalid(
                at.at("operator"),
                toleration["value"].clone(),
                "value must be empty when `operator` is 'Exists'",
            );
        }
        if !toleration["effect"].as_str().unwrap_or_default().is_empty() {
            meta::one_of(toleration, "effect", &["NoSchedule", "PreferNoSchedule", "NoExecute"], at, errors);
        }
        if toleration["tolerationSeconds"].is_number() && toleration["effect"] != "NoExecute" {
            errors.invalid(
                at.at("effect"),
                toleration["effect"].clone(),
                "effect must be 'NoExecute' when `tolerationSeconds` is set",
            );
        }
    }
}

fn affinity(affinity: &Value, path: Path<'_>, errors: &mut Errors) {
    const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
    const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";
    let node = path.at("nodeAffinity");
    let required = &affinity["nodeAffinity"][REQUIRED];
    if required.is_object() {
        node_selector(required, node.at(REQUIRED), errors);
    }
    for (index, term) in items(&affinity["nodeAffinity"], PREFERRED).enumerate() {
        let at = node.at(PREFERRED);
        weight(term, at.index(index), errors);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let at = path.at(kind);
        let term = |term: &Value, at: Path<'_>, errors: &mut Errors| {
            if term["topologyKey"].as_str().unwrap_or_default().is_empty() {
                errors.required(at.at("topologyKey"), "can not be empty");
            }
            meta::selector(&term["labelSelector"], at.at("labelSelector"), errors);
        };
        let list = at.at(REQUIRED);
        for (index, item) in items(&affinity[kind], REQUIRED).enumerate() {
            term(item, list.index(index), errors);
        }
        let list = at.at(PREFERRED);
        for (index, item) in items(&affinity[kind], PREFERRED).enumerate() {
            let at = list.index(index);
            weight(item, at, errors);
            term(&item["podAffinityTerm"], at.at("podAffinityTerm"), errors);
        }
    }
}

fn weight(term: &Value, path: Path<'_>, errors: &mut Errors) {
    if !(1..=100).contains(&term["weight"].as_i64().unwrap_or_default()) {
        errors.invalid(path.at("weight"), term["weight"].clone(), "must be in the range 1-100");
    }
}

/// Validates a selector of nodes.
pub(super) fn node_selector(selector: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.at("nodeSelectorTerms");
    if items(selector, "nodeSelectorTerms").next().is_none() {
        errors.required(list, "must have at least one node selector term");
    }
    for (index, term) in items(selector, "nodeSelectorTerms").enumerate() {
        node_selector_term(term, list.index(index), errors);
    }
}

/// Validates one of the terms of which a node must fulfil one.
pub(super) fn node_selector_term(term: &Value, path: Path<'_>, errors: &mut Errors) {
    let known = ["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"];
    let list = path.at("matchExpressions");
    for (index, expression) in items(term, "matchExpressions").enumerate() {
        let at = list.index(index);
        let operator = expression["operator"].as_str().unwrap_or_default();
        let values = items(expression, "values").count();
        match operator {
            "In" | "NotIn" if values == 0 => {
                errors.required(at.at("values"), "must be specified when `operator` is 'In' or 'NotIn'")
            }
            "Exists" | "DoesNotExist" if values > 0 => {
                errors.forbidden(at.at("values"), "may not be specified when `operator` is 'Exists' or 'DoesNotExist'")
            }
            "Gt" | "Lt" if values != 1 => {
                errors.required(at.at("values"), "must be specified single value when `operator` is 'Lt' or 'Gt'")
            }
            _ if known.contains(&operator) => {}
            _ => errors.invalid(at.at("operator"), operator, "not a valid selector operator"),
        }
        errors.expect(at.at("key"), expression["key"].as_str().unwrap_or_default(), names::qualified_name);
    }
    let list = path.at("matchFields");
    for (index, field) in items(term, "matchFields").enumerate() {
        let at = list.index(index);
        match field["operator"].as_str().unwrap_or_default() {
            "In" | "NotIn" if items(field, "values").count() != 1 => {
                let detail = "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
                errors.required(at.at("values"), detail);
            }
            "In" | "NotIn" => {}
            operator => errors.invalid(at.at("operator"), operator, "not a valid selector operator"),
        }
        if field["key"] != "metadata.name" {
            errors.invalid(at.at("key"), field["key"].clone(), "not a valid field selector key");
        }
    }
}
