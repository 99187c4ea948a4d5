//! Containers: defaults and validation, shared by all that have some.
//!
//! <https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#Container>

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{default, items, items_mut, meta, pod_resize, reference, security_context, volume::Volumes};
use crate::{
    field::{Errors, Path},
    names,
};

/// Fills in what was left out.
pub(super) fn defaults(container: &mut Value, host_network: bool) {
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

/// What containers share with the pod that they are part of.
pub(super) struct Pod<'a> {
    /// Its volumes.
    pub volumes: Volumes<'a>,
    /// Whether its users are those of the machine.
    pub host_users: bool,
    /// How long it has to end.
    pub grace: Option<i64>,
    /// Its restart policy.
    pub restarts: Option<&'a str>,
}

/// Validates a container of one of the lists.
pub(super) fn validate(c: &Value, list: &str, pod: &Pod<'_>, path: Path<'_>, errors: &mut Errors) {
    errors.expect_some(path.at("name"), &c["name"], names::dns_label);
    match c["image"].as_str() {
        None | Some("") => errors.required(path.at("image"), ""),
        Some(image) if image.trim() != image => {
            errors.invalid(path.at("image"), image, "must not have leading or trailing whitespace");
        }
        _ => {}
    }
    meta::one_of(c, "imagePullPolicy", &["Always", "IfNotPresent", "Never"], path, errors);
    meta::one_of(c, "terminationMessagePolicy", &["File", "FallbackToLogsOnError"], path, errors);
    ports(c, path.at("ports"), errors);
    environment(c, path.at("env"), errors);
    environment_from(c, path.at("envFrom"), errors);
    mounts(c, &pod.volumes, path.at("volumeMounts"), errors);
    devices(c, &pod.volumes, path.at("volumeDevices"), errors);
    resources(&c["resources"], path.at("resources"), errors);
    if list != "ephemeralContainers" {
        pod_resize::policy(c, pod.restarts, path.at("resizePolicy"), errors);
    }
    security_context::of_container(&c["securityContext"], pod.host_users, path.at("securityContext"), errors);
    match list {
        "ephemeralContainers" => ephemeral(c, path, errors),
        "initContainers" if c["restartPolicy"] != "Always" => {
            if let Some(policy) = c["restartPolicy"].as_str() {
                errors.not_supported(path.at("restartPolicy"), policy, &["Always"]);
            }
            if items(c, "resizePolicy").next().is_some() {
                errors.invalid(
                    path.at("resizePolicy"),
                    c["resizePolicy"].clone(),
                    "must not be set for init containers",
                );
            }
            for key in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
                if c[key].is_object() {
                    errors.forbidden(path.at(key), "may not be set for init containers without restartPolicy=Always");
                }
            }
        }
        _ => {
            for key in ["livenessProbe", "readinessProbe", "startupProbe"] {
                probe(&c[key], key, path.at(key), errors);
            }
            hooks(&c["lifecycle"], pod.grace, path.at("lifecycle"), errors);
        }
    }
}

/// A container that is looked in with (`kubectl debug`) has nothing of what makes a service.
fn ephemeral(c: &Value, path: Path<'_>, errors: &mut Errors) {
    const FORBIDDEN: &str = "cannot be set for an Ephemeral Container";
    let unset = |value: &Value| match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    for key in [
        "ports",
        "resources",
        "resizePolicy",
        "restartPolicy",
        "livenessProbe",
        "readinessProbe",
        "startupProbe",
        "lifecycle",
    ] {
        if !unset(&c[key]) {
            errors.forbidden(path.at(key), FORBIDDEN);
        }
    }
    let list = path.at("volumeMounts");
    for (index, mount) in items(c, "volumeMounts").enumerate() {
        let at = list.index(index);
        for key in ["subPath", "subPathExpr"] {
            if mount[key].as_str().is_some_and(|text| !text.is_empty()) {
                errors.forbidden(at.at(key), FORBIDDEN);
            }
        }
    }
}

fn ports(c: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut port_names = HashSet::new();
    for (index, port) in items(c, "ports").enumerate() {
        let at = path.index(index);
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
}

fn environment(c: &Value, path: Path<'_>, errors: &mut Errors) {
    for (index, variable) in items(c, "env").enumerate() {
        let at = path.index(index);
        errors.expect_some(at.at("name"), &variable["name"], names::env_name);
        let from = &variable["valueFrom"];
        let Some(sources) = from.as_object() else { continue };
        let at = at.at("valueFrom");
        if variable["value"].as_str().is_some_and(|v| !v.is_empty()) {
            errors.invalid(at, "", "may not be specified when `value` is not empty");
        }
        for (kind, source) in sources {
            let at = at.at(kind);
            match kind.as_str() {
                "fieldRef" => reference::field(source, &reference::OF_VARIABLES, at, errors),
                "resourceFieldRef" => reference::amount(source, false, at, errors),
                "configMapKeyRef" | "secretKeyRef" => reference::key(source, at, errors),
                _ => {}
            }
        }
        match sources.len() {
            0 => errors.invalid(at, "", "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`"),
            1 => {}
            _ => errors.invalid(at, "", "may not have more than one field specified at a time"),
        }
    }
}

fn environment_from(c: &Value, path: Path<'_>, errors: &mut Errors) {
    for (index, from) in items(c, "envFrom").enumerate() {
        let at = path.index(index);
        if let Some(prefix) = from["prefix"].as_str().filter(|prefix| !prefix.is_empty()) {
            errors.expect(at.at("prefix"), prefix, names::env_name);
        }
        let sources: Vec<&str> =
            ["configMapRef", "secretRef"].into_iter().filter(|key| from[*key].is_object()).collect();
        for key in &sources {
            let at = at.at(key);
            errors.expect_some(at.at("name"), &from[*key]["name"], names::dns_subdomain);
        }
        match sources.len() {
            0 => errors.invalid(at, "", "must specify one of: `configMapRef` or `secretRef`"),
            1 => {}
            _ => errors.invalid(at, "", "may not have more than one field specified at a time"),
        }
    }
}

fn mounts(c: &Value, volumes: &Volumes<'_>, path: Path<'_>, errors: &mut Errors) {
    let mut mount_paths = HashSet::new();
    for (index, mount) in items(c, "volumeMounts").enumerate() {
        let at = path.index(index);
        let name = mount["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.required(at.at("name"), "");
        } else if !volumes.contains_key(name) {
            errors.not_found(at.at("name"), name);
        }
        match mount["mountPath"].as_str().unwrap_or_default() {
            "" => errors.required(at.at("mountPath"), ""),
            text if !mount_paths.insert(text) => errors.invalid(at.at("mountPath"), text, "must be unique"),
            _ => {}
        }
        if !name.is_empty() && items(c, "volumeDevices").any(|device| device["name"] == name) {
            errors.invalid(at.at("name"), name, "must not already exist in volumeDevices");
        }
        for key in ["subPath", "subPathExpr"] {
            let Some(text) = mount[key].as_str().filter(|text| !text.is_empty()) else { continue };
            reference::descending_path(text, at.at(key), errors);
            if volumes.get(name).is_some_and(|volume| volume["image"].is_object()) {
                errors.invalid(at.at(key), text, "not allowed in image volume sources");
            }
        }
        let is_set = |key: &str| mount[key].as_str().is_some_and(|text| !text.is_empty());
        if is_set("subPath") && is_set("subPathExpr") {
            let detail = "subPathExpr and subPath are mutually exclusive";
            errors.invalid(at.at("subPathExpr"), mount["subPathExpr"].clone(), detail);
        }
        // Upstream leaves the index out in what follows.
        meta::one_of(mount, "mountPropagation", &["Bidirectional", "HostToContainer", "None"], path, errors);
        if mount["mountPropagation"] == "Bidirectional" && c["securityContext"]["privileged"] != true {
            let detail = "Bidirectional mount propagation is available only to privileged containers";
            errors.forbidden(path.at("mountPropagation"), detail);
        }
        recursive_read_only(mount, path.at("recursiveReadOnly"), errors);
    }
}

fn recursive_read_only(mount: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(wanted) = mount["recursiveReadOnly"].as_str() else { return };
    match wanted {
        "Disabled" => {}
        "Enabled" | "IfPossible" => {
            if mount["readOnly"] != true {
                errors.forbidden(path, "may only be specified when readOnly is true");
            }
            if mount["mountPropagation"].as_str().is_some_and(|propagation| propagation != "None") {
                errors.forbidden(path, "may only be specified when mountPropagation is None or not specified");
            }
        }
        _ => errors.not_supported(path, wanted, &["Disabled", "Enabled", "IfPossible"]),
    }
}

fn devices(c: &Value, volumes: &Volumes<'_>, path: Path<'_>, errors: &mut Errors) {
    let (mut seen_names, mut seen_paths) = (HashSet::new(), HashSet::new());
    for (index, device) in items(c, "volumeDevices").enumerate() {
        let at = path.index(index);
        let name = device["name"].as_str().unwrap_or_default();
        match volumes.get(name) {
            _ if name.is_empty() => errors.required(at.at("name"), ""),
            None => errors.not_found(at.at("name"), name),
            Some(volume) if !volume["persistentVolumeClaim"].is_object() && !volume["ephemeral"].is_object() => {
                let detail = "can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode";
                errors.invalid(at.at("name"), name, detail);
            }
            Some(_) if !seen_names.insert(name) => errors.invalid(at.at("name"), name, "must be unique"),
            Some(_) => {}
        }
        match device["devicePath"].as_str().unwrap_or_default() {
            "" => errors.required(at.at("devicePath"), ""),
            text if text.split('/').any(|part| part == "..") => {
                errors.invalid(at.at("devicePath"), text, "can not contain backsteps ('..')");
            }
            text if !seen_paths.insert(text) => errors.invalid(at.at("devicePath"), text, "must be unique"),
            text if items(c, "volumeMounts").any(|mount| mount["mountPath"] == text) => {
                errors.invalid(at.at("devicePath"), text, "must not already exist as a path in volumeMounts");
            }
            _ => {}
        }
    }
}

fn probe(probe: &Value, kind: &str, path: Path<'_>, errors: &mut Errors) {
    if !probe.is_object() {
        return;
    }
    handler(probe, &["exec", "httpGet", "tcpSocket", "grpc"], path, errors);
    for key in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        meta::non_negative(probe, key, path, errors);
    }
    let grace = path.at("terminationGracePeriodSeconds");
    if let Some(seconds) = probe["terminationGracePeriodSeconds"].as_i64() {
        if seconds <= 0 {
            errors.invalid(grace, seconds, "must be greater than 0");
        }
        if kind == "readinessProbe" {
            errors.invalid(grace, seconds, "must not be set for readinessProbes");
        }
    }
    if kind != "readinessProbe" && probe["successThreshold"].as_i64().is_some_and(|n| n != 1) {
        errors.invalid(path.at("successThreshold"), probe["successThreshold"].clone(), "must be 1");
    }
}

fn hooks(lifecycle: &Value, grace: Option<i64>, path: Path<'_>, errors: &mut Errors) {
    for key in ["postStart", "preStop"] {
        let hook = &lifecycle[key];
        if !hook.is_object() {
            continue;
        }
        let at = path.at(key);
        handler(hook, &["exec", "httpGet", "tcpSocket", "sleep"], at, errors);
        if let (Some(seconds), Some(grace)) = (hook["sleep"]["seconds"].as_i64(), grace)
            && !(0..=grace).contains(&seconds)
        {
            let detail = format!("must be non-negative and less than terminationGracePeriodSeconds ({grace})");
            errors.invalid(at.at("sleep"), seconds, detail);
        }
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
    let at = path.at("httpGet");
    meta::one_of(&handler["httpGet"], "scheme", &["HTTP", "HTTPS"], at, errors);
    for header in items(&handler["httpGet"], "httpHeaders") {
        errors.expect(at.at("httpHeaders"), header["name"].as_str().unwrap_or_default(), names::http_header);
    }
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
        let Some(request) = meta::quantity(value) else { continue };
        match meta::quantity(&resources["limits"][name]) {
            Some(limit) if request != limit && !may_be_overcommitted(name) => {
                errors.invalid(at, value.clone(), format!("must be equal to {name} limit of {limit}"));
            }
            Some(limit) if request > limit => {
                errors.invalid(at, value.clone(), format!("must be less than or equal to {name} limit of {limit}"));
            }
            None if !may_be_overcommitted(name) => {
                errors.required(path.at("limits"), "Limit must be set for non overcommitable resources");
            }
            _ => {}
        }
    }
    let named = |test: fn(&str) -> bool| {
        let both = ["limits", "requests"].map(|kind| resources[kind].as_object());
        both.into_iter().flatten().flatten().any(|(name, _)| test(name))
    };
    if named(|name| name.starts_with("hugepages-")) && !named(|name| ["cpu", "memory"].contains(&name)) {
        errors.forbidden(path, "HugePages require cpu or memory");
    }
}

/// Whether a container may be promised more than it is sure to get.
fn may_be_overcommitted(name: &str) -> bool {
    (!name.contains('/') || name.contains("kubernetes.io/")) && !name.starts_with("hugepages-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(list: &str, container: Value, expect: &[&str]) {
        let pvc = json!({"name": "claim", "persistentVolumeClaim": {"claimName": "c"}});
        let (empty, image) = (json!({"name": "empty", "emptyDir": {}}), json!({"name": "image", "image": {}}));
        let pod = Pod {
            volumes: [("empty", &empty), ("claim", &pvc), ("image", &image)].into_iter().collect(),
            host_users: true,
            grace: Some(30),
            restarts: Some("Always"),
        };
        let mut c = json!({"name": "c", "image": "i"});
        c.as_object_mut().unwrap().extend(container.as_object().unwrap().clone());
        defaults(&mut c, false);
        let mut errors = Errors::default();
        validate(&c, list, &pod, Path::Root.at("c"), &mut errors);
        let found: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
        assert_eq!(found, expect, "{c:#}");
    }

    #[test]
    fn what_is_not_shared_is_given_in_full() {
        let check = |resources: Value, expect: &[&str]| check("containers", json!({"resources": resources}), expect);
        check(json!({"limits": {"hugepages-2Mi": "2Mi", "cpu": "1"}}), &[]);
        check(json!({"limits": {"example.com/card": "1"}}), &[]);
        check(
            json!({"limits": {"hugepages-2Mi": "2Mi"}}),
            &["c.resources: Forbidden: HugePages require cpu or memory"],
        );
        check(
            json!({"limits": {"example.com/card": "2"}, "requests": {"example.com/card": "1"}}),
            &["c.resources.requests: Invalid value: \"1\": must be equal to example.com/card limit of 2"],
        );
        check(
            json!({"requests": {"hugepages-2Mi": "2Mi", "memory": "1Gi"}}),
            &["c.resources.limits: Required value: Limit must be set for non overcommitable resources"],
        );
    }

    #[test]
    fn variables() {
        let check = |from: Value, expect: &[&str]| {
            check("containers", json!({"env": [{"name": "A", "valueFrom": from}]}), expect);
        };
        check(json!({"fieldRef": {"fieldPath": "status.podIP"}}), &[]);
        check(json!({"fieldRef": {"fieldPath": "metadata.labels['a/b']"}}), &[]);
        let at = "c.env[0].valueFrom";
        check(
            json!({"fieldRef": {"fieldPath": "metadata.color"}}),
            &[&format!(
                "{at}.fieldRef.fieldPath: Invalid value: \"metadata.color\": error converting fieldPath: field label not supported: metadata.color"
            )],
        );
        check(
            json!({"fieldRef": {"fieldPath": "metadata.labels"}}),
            &[&format!(
                "{at}.fieldRef.fieldPath: Unsupported value: \"metadata.labels\": supported values: \"metadata.name\", \"metadata.namespace\", \"metadata.uid\", \"spec.nodeName\", \"spec.serviceAccountName\", \"status.hostIP\", \"status.hostIPs\", \"status.podIP\", \"status.podIPs\""
            )],
        );
        check(
            json!({"fieldRef": {"fieldPath": "metadata.name['x']"}}),
            &[&format!("{at}.fieldRef.fieldPath: Invalid value: \"metadata.name['x']\": does not support subscript")],
        );
        check(json!({"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}), &[]);
        check(
            json!({"resourceFieldRef": {"resource": "limits.cpu", "divisor": "3"}}),
            &[&format!(
                "{at}.resourceFieldRef.divisor: Invalid value: \"limits.cpu\": only divisor's values 1m and 1 are supported with the cpu resource"
            )],
        );
        check(
            json!({"configMapKeyRef": {"name": "a", "key": "b/c"}}),
            &[&format!("{at}.configMapKeyRef.key: Invalid value: \"b/c\": {}", names::config_key("b/c").unwrap_err())],
        );
        check(json!({"secretKeyRef": {"name": "a"}}), &[&format!("{at}.secretKeyRef.key: Required value")]);
        tests::check(
            "containers",
            json!({"envFrom": [{"prefix": "A="}, {"secretRef": {}, "configMapRef": {"name": "b"}}]}),
            &[
                &format!("c.envFrom[0].prefix: Invalid value: \"A=\": {}", names::env_name("A=").unwrap_err()),
                "c.envFrom[0]: Invalid value: \"\": must specify one of: `configMapRef` or `secretRef`",
                "c.envFrom[1].secretRef.name: Required value",
                "c.envFrom[1]: Invalid value: \"\": may not have more than one field specified at a time",
            ],
        );
    }

    #[test]
    fn mounts_and_devices() {
        let check = |mount: Value, expect: &[&str]| check("containers", json!({"volumeMounts": [mount]}), expect);
        check(json!({"name": "empty", "mountPath": "/a", "readOnly": true, "recursiveReadOnly": "Enabled"}), &[]);
        check(json!({"name": "none", "mountPath": "/a"}), &["c.volumeMounts[0].name: Not found: \"none\""]);
        check(
            json!({"name": "image", "mountPath": "/a", "subPath": "../b"}),
            &[
                "c.volumeMounts[0].subPath: Invalid value: \"../b\": must not contain '..'",
                "c.volumeMounts[0].subPath: Invalid value: \"../b\": not allowed in image volume sources",
            ],
        );
        check(
            json!({"name": "empty", "mountPath": "/a", "mountPropagation": "Bidirectional"}),
            &[
                "c.volumeMounts.mountPropagation: Forbidden: Bidirectional mount propagation is available only to privileged containers",
            ],
        );
        check(
            json!({"name": "empty", "mountPath": "/a", "recursiveReadOnly": "Enabled"}),
            &["c.volumeMounts.recursiveReadOnly: Forbidden: may only be specified when readOnly is true"],
        );
        tests::check(
            "containers",
            json!({"volumeDevices": [{"name": "empty", "devicePath": "/dev/x"}, {"name": "claim", "devicePath": "/a/../b"}, {"name": "claim", "devicePath": "/c"}]}),
            &[
                "c.volumeDevices[0].name: Invalid value: \"empty\": can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode",
                "c.volumeDevices[1].devicePath: Invalid value: \"/a/../b\": can not contain backsteps ('..')",
                "c.volumeDevices[2].name: Invalid value: \"claim\": must be unique",
            ],
        );
    }

    #[test]
    fn probes_and_hooks() {
        let exec = json!({"exec": {"command": ["true"]}, "terminationGracePeriodSeconds": 5});
        check("containers", json!({"livenessProbe": exec}), &[]);
        check(
            "containers",
            json!({"readinessProbe": exec}),
            &["c.readinessProbe.terminationGracePeriodSeconds: Invalid value: 5: must not be set for readinessProbes"],
        );
        let header = names::http_header("a b").unwrap_err();
        check(
            "containers",
            json!({"startupProbe": {"httpGet": {"port": 80, "httpHeaders": [{"name": "a b", "value": "c"}]}}}),
            &[&format!("c.startupProbe.httpGet.httpHeaders: Invalid value: \"a b\": {header}")],
        );
        check(
            "containers",
            json!({"lifecycle": {"preStop": {"sleep": {"seconds": 31}}}}),
            &[
                "c.lifecycle.preStop.sleep: Invalid value: 31: must be non-negative and less than terminationGracePeriodSeconds (30)",
            ],
        );
        check(
            "initContainers",
            json!({"livenessProbe": exec, "lifecycle": {}}),
            &[
                "c.lifecycle: Forbidden: may not be set for init containers without restartPolicy=Always",
                "c.livenessProbe: Forbidden: may not be set for init containers without restartPolicy=Always",
            ],
        );
        check("initContainers", json!({"livenessProbe": exec, "restartPolicy": "Always"}), &[]);
    }

    #[test]
    fn containers_to_look_in_with() {
        let check = |c: Value, expect: &[&str]| check("ephemeralContainers", c, expect);
        check(json!({"stdin": true, "tty": true, "volumeMounts": [{"name": "empty", "mountPath": "/a"}]}), &[]);
        check(
            json!({"ports": [{"containerPort": 1}], "volumeMounts": [{"name": "empty", "mountPath": "/a", "subPath": "b"}]}),
            &[
                "c.ports: Forbidden: cannot be set for an Ephemeral Container",
                "c.volumeMounts[0].subPath: Forbidden: cannot be set for an Ephemeral Container",
            ],
        );
    }
}
