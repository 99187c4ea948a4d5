//! The spec of pods: defaults and validation shared by Pod and everything with a template.
//!
//! Defaults follow <https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/>.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{default, items, items_mut, meta};
use crate::{
    field::{Errors, Path},
    names,
    quantity::Quantity,
};

/// What the path of a node's own volume may be.
pub(super) const HOST_PATHS: [&str; 8] =
    ["", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"];

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
            container_defaults(container, host_network);
        }
    }
    for volume in items_mut(spec, "volumes") {
        volume_defaults(volume);
    }
    for constraint in items_mut(spec, "topologySpreadConstraints") {
        default(constraint, "nodeAffinityPolicy", "Honor");
        default(constraint, "nodeTaintsPolicy", "Ignore");
    }
}

fn container_defaults(container: &mut Value, host_network: bool) {
    let latest = container["image"].as_str().is_some_and(|image| {
        let name = image.rsplit('/').next().unwrap_or_default();
        !image.contains('@') && name.split_once(':').is_none_or(|(_, tag)| tag == "latest")
    });
    default(container, "imagePullPolicy", if latest { "Always" } else { "IfNotPresent" });
    default(container, "terminationMessagePath", "/dev/termination-log");
    default(container, "terminationMessagePolicy", "File");
    default(container, "resources", json!({}));
    // A limit without a request requests as much.
    if let Some(limits) = container["resources"]["limits"].as_object().cloned() {
        default(&mut container["resources"], "requests", json!({}));
        for (key, limit) in limits {
            default(&mut container["resources"]["requests"], &key, limit);
        }
    }
    for port in items_mut(container, "ports") {
        default(port, "protocol", "TCP");
        if host_network {
            let number = port["containerPort"].clone();
            default(port, "hostPort", number);
        }
    }
    for env in items_mut(container, "env") {
        if let Some(field) = env.get_mut("valueFrom").and_then(|v| v.get_mut("fieldRef")) {
            default(field, "apiVersion", "v1");
        }
        if let Some(field) = env.get_mut("valueFrom").and_then(|v| v.get_mut("resourceFieldRef")) {
            default(field, "divisor", "0");
        }
    }
    for key in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(key) {
            default(probe, "timeoutSeconds", 1);
            default(probe, "periodSeconds", 10);
            default(probe, "successThreshold", 1);
            default(probe, "failureThreshold", 3);
            handler_defaults(probe);
            if let Some(grpc) = probe.get_mut("grpc") {
                default(grpc, "service", "");
            }
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(hook) = container.get_mut("lifecycle").and_then(|l| l.get_mut(hook)) {
            handler_defaults(hook);
        }
    }
}

fn handler_defaults(handler: &mut Value) {
    if let Some(http) = handler.get_mut("httpGet") {
        default(http, "path", "/");
        default(http, "scheme", "HTTP");
    }
}

fn volume_defaults(volume: &mut Value) {
    const MODE: i64 = 0o644;
    let has_source = volume.as_object().is_some_and(|v| v.len() > 1);
    if !has_source {
        default(volume, "emptyDir", json!({}));
    }
    for key in ["configMap", "secret", "downwardAPI", "projected"] {
        if let Some(source) = volume.get_mut(key) {
            default(source, "defaultMode", MODE);
        }
    }
    if let Some(source) = volume.get_mut("hostPath") {
        default(source, "type", "");
    }
    if let Some(api) = volume.get_mut("downwardAPI") {
        for item in items_mut(api, "items") {
            if let Some(field) = item.get_mut("fieldRef") {
                default(field, "apiVersion", "v1");
            }
        }
    }
    if let Some(projected) = volume.get_mut("projected") {
        for source in items_mut(projected, "sources") {
            if let Some(token) = source.get_mut("serviceAccountToken") {
                default(token, "expirationSeconds", 3600);
            }
            if let Some(api) = source.get_mut("downwardAPI") {
                for item in items_mut(api, "items") {
                    if let Some(field) = item.get_mut("fieldRef") {
                        default(field, "apiVersion", "v1");
                    }
                }
            }
        }
    }
    if let Some(source) =
        volume.get_mut("ephemeral").and_then(|e| e.get_mut("volumeClaimTemplate")).and_then(|t| t.get_mut("spec"))
    {
        default(source, "volumeMode", "Filesystem");
    }
}

/// Says everything that is wrong with the spec of a pod.
pub fn validate(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    meta::one_of(spec, "restartPolicy", &["Always", "OnFailure", "Never"], path, errors);
    meta::one_of(spec, "dnsPolicy", &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"], path, errors);
    if spec["dnsPolicy"] == "None" && items(&spec["dnsConfig"], "nameservers").next().is_none() {
        let at = path.at("dnsConfig");
        errors.required(at.at("nameservers"), "must provide at least one DNS nameserver when `dnsPolicy` is None");
    }
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
    let volumes = volumes(spec, path, errors);
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
            container(c, list, &volumes, at, errors);
            if list != "initContainers" {
                let at = at.at("ports");
                for (index, port) in items(c, "ports").enumerate() {
                    let Some(number) = port["hostPort"].as_i64() else { continue };
                    let host = (port["protocol"].as_str(), port["hostIP"].as_str().unwrap_or_default(), number);
                    if !host_ports.insert(host) {
                        let at = at.index(index);
                        errors.duplicate(at.at("hostPort"), format!("{}/{}/{number}", host.0.unwrap_or("TCP"), host.1));
                    }
                }
            }
        }
    }
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
    if spec["hostNetwork"] == true && spec["hostUsers"] == false {
        errors.forbidden(path.at("hostUsers"), "when `hostNetwork` is true");
    }
}

fn volumes<'a>(spec: &'a Value, path: Path<'_>, errors: &mut Errors) -> HashSet<&'a str> {
    let mut seen = HashSet::new();
    let list = path.at("volumes");
    for (index, volume) in items(spec, "volumes").enumerate() {
        let at = list.index(index);
        let name = volume["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.required(at.at("name"), "");
        } else if let Err(detail) = names::dns_label(name) {
            errors.invalid(at.at("name"), name, detail);
        } else if !seen.insert(name) {
            errors.duplicate(at.at("name"), name);
        }
        let sources: Vec<&String> =
            volume.as_object().into_iter().flatten().map(|(k, _)| k).filter(|k| *k != "name").collect();
        if sources.is_empty() {
            errors.required(at, "must specify a volume type");
        }
        for extra in sources.iter().skip(1) {
            errors.forbidden(at.at(extra), "may not specify more than 1 volume type");
        }
        let needs = |source: &str, key: &str, errors: &mut Errors| {
            if volume[source].is_object() && volume[source][key].as_str().unwrap_or_default().is_empty() {
                let at = at.at(source);
                errors.required(at.at(key), "");
            }
        };
        needs("hostPath", "path", errors);
        needs("configMap", "name", errors);
        needs("secret", "secretName", errors);
        needs("persistentVolumeClaim", "claimName", errors);
        if let Some(text) = volume["hostPath"]["path"].as_str().filter(|p| p.split('/').any(|part| part == "..")) {
            let at = at.at("hostPath");
            errors.invalid(at.at("path"), text, "must not contain '..'");
        }
        meta::one_of(&volume["hostPath"], "type", &HOST_PATHS, at.at("hostPath"), errors);
        if let Some(size) = volume["emptyDir"]["sizeLimit"].as_str().and_then(|s| s.parse::<Quantity>().ok())
            && size.is_negative()
        {
            let at = at.at("emptyDir");
            errors.forbidden(at.at("sizeLimit"), "SizeLimit field must be a valid resource quantity");
        }
    }
    seen
}

fn container(c: &Value, list: &str, volumes: &HashSet<&str>, path: Path<'_>, errors: &mut Errors) {
    match c["name"].as_str().unwrap_or_default() {
        "" => errors.required(path.at("name"), ""),
        name => {
            if let Err(detail) = names::dns_label(name) {
                errors.invalid(path.at("name"), name, detail);
            }
        }
    }
    match c["image"].as_str() {
        None | Some("") => errors.required(path.at("image"), ""),
        Some(image) if image.trim() != image => {
            errors.invalid(path.at("image"), image, "must not have leading or trailing whitespace");
        }
        _ => {}
    }
    meta::one_of(c, "imagePullPolicy", &["Always", "IfNotPresent", "Never"], path, errors);
    meta::one_of(c, "terminationMessagePolicy", &["File", "FallbackToLogsOnError"], path, errors);
    let ports = path.at("ports");
    let mut port_names = HashSet::new();
    for (index, port) in items(c, "ports").enumerate() {
        let at = ports.index(index);
        match port["containerPort"].as_i64() {
            None | Some(0) => errors.required(at.at("containerPort"), ""),
            Some(n) => meta::port_number(n, at.at("containerPort"), errors),
        }
        if let Some(n) = port["hostPort"].as_i64().filter(|n| *n != 0) {
            meta::port_number(n, at.at("hostPort"), errors);
        }
        meta::one_of(port, "protocol", &["TCP", "UDP", "SCTP"], at, errors);
        if let Some(name) = port["name"].as_str().filter(|n| !n.is_empty()) {
            if let Err(detail) = names::port_name(name) {
                errors.invalid(at.at("name"), name, detail);
            } else if !port_names.insert(name) {
                errors.duplicate(at.at("name"), name);
            }
        }
    }
    let env = path.at("env");
    for (index, variable) in items(c, "env").enumerate() {
        let at = env.index(index);
        match variable["name"].as_str().unwrap_or_default() {
            "" => errors.required(at.at("name"), ""),
            name => {
                if let Err(detail) = names::env_name(name) {
                    errors.invalid(at.at("name"), name, detail);
                }
            }
        }
        let from = &variable["valueFrom"];
        if from.is_object() {
            let at = at.at("valueFrom");
            if variable["value"].as_str().is_some_and(|v| !v.is_empty()) {
                errors.invalid(at, "", "may not be specified when `value` is not empty");
            }
            match from.as_object().map_or(0, |f| f.len()) {
                0 => errors.invalid(at, "", "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`"),
                1 => {}
                _ => errors.invalid(at, "", "may not have more than one field specified at a time"),
            }
        }
    }
    let mounts = path.at("volumeMounts");
    let mut mount_paths = HashSet::new();
    for (index, mount) in items(c, "volumeMounts").enumerate() {
        let at = mounts.index(index);
        let name = mount["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.required(at.at("name"), "");
        } else if !volumes.contains(name) {
            errors.not_found(at.at("name"), name);
        }
        match mount["mountPath"].as_str().unwrap_or_default() {
            "" => errors.required(at.at("mountPath"), ""),
            text if !mount_paths.insert(text) => errors.invalid(at.at("mountPath"), text, "must be unique"),
            _ => {}
        }
        for key in ["subPath", "subPathExpr"] {
            if let Some(text) = mount[key].as_str() {
                if text.starts_with('/') {
                    errors.invalid(at.at(key), text, "must be a relative path");
                } else if text.split('/').any(|part| part == "..") {
                    errors.invalid(at.at(key), text, "must not contain '..'");
                }
            }
        }
    }
    resources(&c["resources"], path.at("resources"), errors);
    for key in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let probe = &c[key];
        if !probe.is_object() {
            continue;
        }
        let at = path.at(key);
        if list == "initContainers" && c["restartPolicy"] != "Always" {
            errors.forbidden(at, "may not be set for init containers without restartPolicy=Always");
            continue;
        }
        handler(probe, &["exec", "httpGet", "tcpSocket", "grpc"], at, errors);
        for key in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
            meta::non_negative(probe, key, at, errors);
        }
        if key != "readinessProbe" && probe["successThreshold"].as_i64().is_some_and(|n| n != 1) {
            errors.invalid(at.at("successThreshold"), probe["successThreshold"].clone(), "must be 1");
        }
    }
    for key in ["postStart", "preStop"] {
        let hook = &c["lifecycle"][key];
        if hook.is_object() {
            let at = path.at("lifecycle");
            handler(hook, &["exec", "httpGet", "tcpSocket", "sleep"], at.at(key), errors);
        }
    }
    if list == "initContainers"
        && let Some(policy) = c["restartPolicy"].as_str().filter(|p| *p != "Always")
    {
        errors.not_supported(path.at("restartPolicy"), policy, &["Always"]);
    }
    if c["securityContext"]["privileged"] == true && c["securityContext"]["allowPrivilegeEscalation"] == false {
        errors.invalid(
            path.at("securityContext"),
            c["securityContext"].clone(),
            "cannot set `allowPrivilegeEscalation` to false and `privileged` to true",
        );
    }
}

fn handler(handler: &Value, known: &[&str], path: Path<'_>, errors: &mut Errors) {
    let set: Vec<&&str> = known.iter().filter(|k| handler[**k].is_object()).collect();
    match set.len() {
        0 => errors.required(path, "must specify a handler type"),
        1 => {}
        _ => errors.forbidden(path.at(set[1]), "may not specify more than 1 handler type"),
    }
    if handler["exec"].is_object() && items(&handler["exec"], "command").next().is_none() {
        let at = path.at("exec");
        errors.required(at.at("command"), "");
    }
    for kind in ["httpGet", "tcpSocket", "grpc"] {
        let Some(port) = handler[kind].as_object().map(|h| h.get("port").cloned().unwrap_or_default()) else {
            continue;
        };
        let at = path.at(kind);
        match &port {
            Value::Number(n) => meta::port_number(n.as_i64().unwrap_or_default(), at.at("port"), errors),
            Value::String(name) if kind != "grpc" => {
                if let Err(detail) = names::port_name(name) {
                    errors.invalid(at.at("port"), name.as_str(), detail);
                }
            }
            _ => errors.invalid(at.at("port"), 0, "must be between 1 and 65535, inclusive"),
        }
    }
    meta::one_of(&handler["httpGet"], "scheme", &["HTTP", "HTTPS"], path.at("httpGet"), errors);
}

/// Validates a map of resources that containers have.
pub(super) fn amounts(object: &Value, key: &str, path: Path<'_>, errors: &mut Errors) {
    const STANDARD: [&str; 4] = ["cpu", "memory", "ephemeral-storage", "storage"];
    let at = path.at(key);
    for (name, value) in object[key].as_object().into_iter().flatten() {
        let at = at.key(name);
        if meta::quantity(value).is_some_and(|amount| amount.is_negative()) {
            errors.invalid(at, value.clone(), "must be greater than or equal to 0");
        }
        if !name.contains('/') && !STANDARD.contains(&name.as_str()) && !name.starts_with("hugepages-") {
            errors.invalid(at, name.as_str(), "must be a standard resource type or fully qualified");
        }
    }
}

fn resources(resources: &Value, path: Path<'_>, errors: &mut Errors) {
    for kind in ["limits", "requests"] {
        amounts(resources, kind, path, errors);
    }
    let at = path.at("requests");
    for (name, value) in resources["requests"].as_object().into_iter().flatten() {
        if let (Some(request), Some(limit)) = (meta::quantity(value), meta::quantity(&resources["limits"][name]))
            && request > limit
        {
            errors.invalid(at, value.clone(), format!("must be less than or equal to {name} limit of {limit}"));
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
        let at = node.at(REQUIRED);
        if items(required, "nodeSelectorTerms").next().is_none() {
            errors.required(at.at("nodeSelectorTerms"), "must have at least one node selector term");
        }
        let list = at.at("nodeSelectorTerms");
        for (index, term) in items(required, "nodeSelectorTerms").enumerate() {
            node_selector_term(term, list.index(index), errors);
        }
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
        if let Err(detail) = names::qualified_name(expression["key"].as_str().unwrap_or_default()) {
            errors.invalid(at.at("key"), expression["key"].clone(), detail);
        }
    }
}
