//! Service. Its addresses and their families are in `service_ips.rs`.

use std::collections::HashSet;

use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use super::{default, ip, items, items_mut, meta, service_ips};
use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Subresource, Validation, col, row as base, wide},
};

/// The port of the node agent, which no load balancer should lead to.
const AGENT_PORT: i64 = 10_250;
const BALANCED_ONLY: &str = "may only be used when `type` is 'LoadBalancer'";

pub(super) fn row() -> Row {
    Row {
        short_names: &["svc"],
        categories: &["all"],
        subresources: &[Subresource::Proxy("ServiceProxyOptions"), Subresource::Status],
        name: names::dns_label,
        columns: const {
            &[
                col("Type", "string"),
                col("Cluster-IP", "string"),
                col("External-IP", "string"),
                col("Port(s)", "string"),
                col("Age", "date"),
                wide("Selector", "string"),
            ]
        },
        cells: |o, now| {
            let spec = &o["spec"];
            let kind = spec["type"].as_str().unwrap_or("ClusterIP");
            let ports: Vec<String> = items(spec, "ports")
                .map(|p| {
                    let protocol = p["protocol"].as_str().unwrap_or("TCP");
                    match p["nodePort"].as_i64().filter(|n| *n > 0) {
                        Some(node) => format!("{}:{node}/{protocol}", cell::int(&p["port"])),
                        None => format!("{}/{protocol}", cell::int(&p["port"])),
                    }
                })
                .collect();
            let ports = if ports.is_empty() { "<none>".to_owned() } else { ports.join(",") };
            vec![
                kind.into(),
                cell::text(&spec["clusterIP"]),
                external(o, kind).into(),
                ports.into(),
                cell::age(o, now),
                cell::labels(&spec["selector"]),
            ]
        },
        selectable: &["spec.clusterIP", "spec.type"],
        defaults,
        validate,
        prepare_create: |o| o["status"] = json!({"loadBalancer": {}}),
        prepare_update: |new, old| {
            // A client that leaves the address out keeps the one it has.
            let external = |o: &Value| o["spec"]["type"] == "ExternalName";
            if new["spec"]["clusterIP"].as_str().unwrap_or_default().is_empty() && !external(new) && !external(old) {
                for key in ["clusterIP", "clusterIPs"] {
                    new["spec"][key] = old["spec"][key].clone();
                }
            }
            service_ips::release_second(new, old);
            drop_dependents(new, old);
        },
        ..base::<Service>()
    }
}

fn external(o: &Value, kind: &str) -> String {
    let spec = &o["spec"];
    let mut all: Vec<&str> = items(spec, "externalIPs").filter_map(Value::as_str).collect();
    match kind {
        "ExternalName" => return spec["externalName"].as_str().unwrap_or_default().to_owned(),
        "LoadBalancer" => {
            let ingress = items(&o["status"]["loadBalancer"], "ingress");
            all.extend(ingress.filter_map(|i| i["ip"].as_str().or(i["hostname"].as_str())));
            if all.is_empty() {
                return "<pending>".to_owned();
            }
        }
        _ => {}
    }
    if all.is_empty() { "<none>".to_owned() } else { all.join(",") }
}

fn defaults(o: &mut Value) {
    default(o, "spec", json!({}));
    let spec = &mut o["spec"];
    default(spec, "sessionAffinity", "None");
    if spec["sessionAffinity"] == "ClientIP" {
        default(spec, "sessionAffinityConfig", json!({}));
        default(&mut spec["sessionAffinityConfig"], "clientIP", json!({}));
        default(&mut spec["sessionAffinityConfig"]["clientIP"], "timeoutSeconds", 10_800);
    } else if spec["sessionAffinity"] == "None"
        && let Some(spec) = spec.as_object_mut()
    {
        spec.remove("sessionAffinityConfig");
    }
    default(spec, "type", "ClusterIP");
    for port in items_mut(spec, "ports") {
        default(port, "protocol", "TCP");
        if port["targetPort"].is_null() || port["targetPort"] == 0 || port["targetPort"] == "" {
            port["targetPort"] = port["port"].clone();
        }
    }
    let kind = spec["type"].as_str().unwrap_or_default().to_owned();
    if kind == "NodePort" || kind == "LoadBalancer" {
        default(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind != "ExternalName" {
        default(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        default(spec, "allocateLoadBalancerNodePorts", true);
    }
    // `clusterIP` is the first of `clusterIPs`.
    match (spec["clusterIP"].as_str().filter(|s| !s.is_empty()), spec["clusterIPs"][0].as_str()) {
        (Some(ip), None) => spec["clusterIPs"] = json!([ip]),
        (None, Some(ip)) => spec["clusterIP"] = ip.into(),
        _ => {}
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return;
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    let kinds = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    meta::one_of(spec, "type", &kinds, path, errors);
    meta::one_of(spec, "sessionAffinity", &["ClientIP", "None"], path, errors);
    meta::one_of(spec, "externalTrafficPolicy", &["Cluster", "Local"], path, errors);
    meta::one_of(spec, "internalTrafficPolicy", &["Cluster", "Local"], path, errors);
    meta::label_map(&spec["selector"], path.at("selector"), errors);
    let kind = spec["type"].as_str().unwrap_or_default();
    let headless = spec["clusterIP"] == "None";
    if kind == "ExternalName" {
        match spec["externalName"].as_str().unwrap_or_default() {
            "" => errors.required(path.at("externalName"), ""),
            name => {
                if let Err(detail) = names::dns_subdomain(name.trim_end_matches('.')) {
                    errors.invalid(path.at("externalName"), name, detail);
                }
            }
        }
    } else if items(spec, "ports").next().is_none() && !headless {
        errors.required(path.at("ports"), "");
    }
    if headless && (kind == "NodePort" || kind == "LoadBalancer") {
        errors.invalid(path.at("clusterIPs").index(0), "None", format!("may not be set to 'None' for {kind} services"));
    }
    service_ips::validate(spec, v.old.map(|old| &old["spec"]), path, errors);
    ports(spec, path, errors);
    if let Some(timeout) = spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].as_i64()
        && !(1..=86_400).contains(&timeout)
    {
        let at = path.at("sessionAffinityConfig");
        let at = at.at("clientIP");
        errors.invalid(at.at("timeoutSeconds"), timeout, "must be greater than 0 and less than 86400");
    }
    outside(v, path, errors);
    let traffic = ["PreferClose", "PreferSameNode", "PreferSameZone"];
    meta::one_of(spec, "trafficDistribution", &traffic, path, errors);
}

/// Validates how a Service is reached from outside the cluster.
fn outside(v: &Validation<'_>, path: Path<'_>, errors: &mut Errors) {
    let (spec, old) = (&v.new["spec"], v.old.map(|old| &old["spec"]));
    let balanced = spec["type"] == "LoadBalancer";
    // Addresses and ranges that were there before are not looked at again.
    let known = |key: &str, text: &str| old.is_some_and(|old| items(old, key).any(|old| old == text));
    let list = path.at("externalIPs");
    for (index, address) in items(spec, "externalIPs").filter_map(Value::as_str).enumerate() {
        if !known("externalIPs", address) {
            errors.expect(list.index(index), address, ip::address);
        }
        ip::not_special(address, list.index(index), errors);
    }
    let list = path.at("loadBalancerSourceRanges");
    if !balanced && items(spec, "loadBalancerSourceRanges").next().is_some() {
        errors.forbidden(list, BALANCED_ONLY);
    }
    for (index, range) in items(spec, "loadBalancerSourceRanges").filter_map(Value::as_str).enumerate() {
        if !known("loadBalancerSourceRanges", range) {
            errors.expect(list.index(index), range.trim(), ip::range);
        }
    }
    for key in ["loadBalancerClass", "allocateLoadBalancerNodePorts"] {
        if !balanced && !spec[key].is_null() {
            errors.forbidden(path.at(key), BALANCED_ONLY);
        }
    }
    let at = path.at("loadBalancerClass");
    if let Some(class) = spec["loadBalancerClass"].as_str().filter(|_| balanced) {
        errors.expect(at, class, names::qualified_name);
    }
    if balanced
        && old.is_some_and(|old| old["type"] == "LoadBalancer" && old["loadBalancerClass"] != spec["loadBalancerClass"])
    {
        errors.invalid(at, spec["loadBalancerClass"].clone(), "may not change once set");
    }
    health_check(spec, old, path, errors);
    let reached = balanced || spec["type"] == "NodePort" || items(spec, "externalIPs").next().is_some();
    if !reached && let Some(policy) = spec["externalTrafficPolicy"].as_str() {
        let why = "may only be set for externally-accessible services";
        errors.invalid(path.at("externalTrafficPolicy"), policy, why);
    }
}

/// Whether balancers outside the cluster have to ask nodes if they have an endpoint: a port of the nodes is for that
/// (<https://kubernetes.io/docs/tasks/access-application-cluster/create-external-load-balancer/#preserving-the-client-source-ip>).
pub fn needs_health_check(spec: &Value) -> bool {
    spec["type"] == "LoadBalancer" && spec["externalTrafficPolicy"] == "Local"
}

fn health_check(spec: &Value, old: Option<&Value>, path: Path<'_>, errors: &mut Errors) {
    let at = path.at("healthCheckNodePort");
    let Some(port) = spec["healthCheckNodePort"].as_i64().filter(|port| *port != 0) else { return };
    if !needs_health_check(spec) {
        let why = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        return errors.invalid(at, port, why);
    }
    meta::port_number(port, at, errors);
    let before = old.filter(|old| needs_health_check(old)).and_then(|old| old["healthCheckNodePort"].as_i64());
    if before.is_some_and(|before| before != 0 && before != port) {
        let why = "cannot change healthCheckNodePort on loadBalancer service with externaltraffic=Local during update";
        errors.invalid(at, port, why);
    }
}

/// What only the old type of a Service has goes with it, unless the client changed it.
fn drop_dependents(new: &mut Value, old: &Value) {
    let exposed = |service: &Value| service["spec"]["type"] == "NodePort" || service["spec"]["type"] == "LoadBalancer";
    if needs_health_check(&old["spec"])
        && !needs_health_check(&new["spec"])
        && new["spec"]["healthCheckNodePort"] == old["spec"]["healthCheckNodePort"]
        && let Some(spec) = new["spec"].as_object_mut()
    {
        spec.remove("healthCheckNodePort");
    }
    if new["spec"]["type"] == old["spec"]["type"] {
        return;
    }
    let mut gone: Vec<&str> = Vec::new();
    if new["spec"]["type"] == "ExternalName" {
        gone.extend(["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"]);
    }
    if old["spec"]["type"] == "LoadBalancer" {
        gone.extend(["allocateLoadBalancerNodePorts", "loadBalancerClass"]);
    }
    let hidden = exposed(old) && !exposed(new);
    if hidden && items(&new["spec"], "externalIPs").next().is_none() {
        gone.push("externalTrafficPolicy");
    }
    let Some(spec) = new["spec"].as_object_mut() else { return };
    for key in gone {
        if spec.get(key) == old["spec"].get(key) {
            spec.remove(key);
        }
    }
    let numbers = |ports: Option<&Value>| -> Vec<Value> {
        ports.and_then(Value::as_array).into_iter().flatten().map(|port| port["nodePort"].clone()).collect()
    };
    if hidden && numbers(spec.get("ports")) == numbers(old["spec"].get("ports")) {
        for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(port) = port.as_object_mut() {
                port.remove("nodePort");
            }
        }
    }
}

fn ports(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.at("ports");
    let many = items(spec, "ports").count() > 1;
    let (mut names_seen, mut numbers, mut node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (index, port) in items(spec, "ports").enumerate() {
        let at = list.index(index);
        let name = port["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            if many {
                errors.required(at.at("name"), "");
            }
        } else if let Err(detail) = names::dns_label(name) {
            errors.invalid(at.at("name"), name, detail);
        } else if !names_seen.insert(name) {
            errors.duplicate(at.at("name"), name);
        }
        let number = port["port"].as_i64().unwrap_or_default();
        if !(1..=65535).contains(&number) {
            errors.invalid(at.at("port"), number, "must be between 1 and 65535, inclusive");
        }
        if !numbers.insert((port["protocol"].as_str(), number)) {
            errors.duplicate(at, json!({"port": number, "protocol": port["protocol"]}));
        }
        meta::one_of(port, "protocol", &["SCTP", "TCP", "UDP"], at, errors);
        match &port["targetPort"] {
            Value::Number(n) if !(1..=65535).contains(&n.as_i64().unwrap_or_default()) => {
                errors.invalid(
                    at.at("targetPort"),
                    port["targetPort"].clone(),
                    "must be between 1 and 65535, inclusive",
                );
            }
            Value::String(name) => {
                if let Err(detail) = names::port_name(name) {
                    errors.invalid(at.at("targetPort"), name.as_str(), detail);
                }
            }
            _ => {}
        }
        if number == AGENT_PORT && spec["type"] == "LoadBalancer" {
            let why = format!("may not expose port {AGENT_PORT} externally since it is used by kubelet");
            errors.invalid(at.at("port"), number, why);
        }
        if let Some(application) = port["appProtocol"].as_str() {
            errors.expect(at.at("appProtocol"), application, names::qualified_name);
        }
        if let Some(node) = port["nodePort"].as_i64().filter(|n| *n != 0) {
            if !matches!(spec["type"].as_str(), Some("NodePort" | "LoadBalancer")) {
                errors.forbidden(at.at("nodePort"), "may not be used when `type` is 'ClusterIP'");
            }
            if !node_ports.insert((port["protocol"].as_str(), node)) {
                errors.duplicate(at.at("nodePort"), node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{check, check_update, with},
        *,
    };

    fn good() -> Value {
        json!({"spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}})
    }

    #[test]
    fn what_a_service_must_be() {
        for (pointer, value, expect) in [
            ("/spec/loadBalancerClass", json!("a.b/c"), &[][..]),
            ("/spec/ports", json!([]), &["spec.ports: Required value"]),
            (
                "/spec/ports/0/port",
                json!(10_250),
                &[
                    "spec.ports[0].port: Invalid value: 10250: may not expose port 10250 externally since it is used by kubelet",
                ],
            ),
            (
                "/spec/type",
                json!("Some"),
                &[
                    "spec.type: Unsupported value: \"Some\": supported values: \"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
                ],
            ),
            (
                "/spec/externalIPs",
                json!(["127.0.0.1", "010.0.0.1"]),
                &[
                    "spec.externalIPs[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range (127.0.0.0/8, ::1/128)",
                    "spec.externalIPs[1]: Invalid value: \"010.0.0.1\": must not have leading 0s",
                ],
            ),
            (
                "/spec/loadBalancerSourceRanges",
                json!(["10.0.0.0/8", "10.0.0.1"]),
                &[
                    "spec.loadBalancerSourceRanges[1]: Invalid value: \"10.0.0.1\": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
                ],
            ),
            (
                "/spec/trafficDistribution",
                json!("PreferFar"),
                &[
                    "spec.trafficDistribution: Unsupported value: \"PreferFar\": supported values: \"PreferClose\", \"PreferSameNode\", \"PreferSameZone\"",
                ],
            ),
        ] {
            check(&row(), with(&good(), pointer, value), expect);
        }
        let inside = |key: &str, value: Value| {
            with(&with(&good(), "/spec/type", "ClusterIP".into()), &format!("/spec/{key}"), value)
        };
        for (key, value) in [
            ("loadBalancerClass", json!("c")),
            ("allocateLoadBalancerNodePorts", json!(true)),
            ("loadBalancerSourceRanges", json!(["10.0.0.0/8"])),
        ] {
            let why = format!("spec.{key}: Forbidden: may only be used when `type` is 'LoadBalancer'");
            check(&row(), inside(key, value), &[&why]);
        }
        let why =
            "spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for externally-accessible services";
        check(&row(), inside("externalTrafficPolicy", "Local".into()), &[why]);
        check(&row(), inside("sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 0}})), &[]);
    }

    #[test]
    fn what_may_change() {
        let why = "spec.loadBalancerClass: Invalid value: \"b\": may not change once set";
        let of = |class: &str| with(&good(), "/spec/loadBalancerClass", class.into());
        check_update(&row(), of("a"), of("b"), &[why]);
        check_update(&row(), of("a"), of("a"), &[]);
    }

    #[test]
    fn ports_for_health_checks() {
        let local = with(&good(), "/spec/externalTrafficPolicy", "Local".into());
        let of = |service: &Value, port: i64| with(service, "/spec/healthCheckNodePort", port.into());
        check(&row(), of(&local, 30_000), &[]);
        check(
            &row(),
            of(&local, 70_000),
            &["spec.healthCheckNodePort: Invalid value: 70000: must be between 1 and 65535, inclusive"],
        );
        check(
            &row(),
            of(&good(), 30_000),
            &[
                "spec.healthCheckNodePort: Invalid value: 30000: may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'",
            ],
        );
        check_update(
            &row(),
            of(&local, 30_000),
            of(&local, 30_001),
            &[
                "spec.healthCheckNodePort: Invalid value: 30001: cannot change healthCheckNodePort on loadBalancer service with externaltraffic=Local during update",
            ],
        );
        let mut turned = with(&of(&local, 30_000), "/spec/externalTrafficPolicy", "Cluster".into());
        (row().prepare_update)(&mut turned, &of(&local, 30_000));
        assert!(turned["spec"]["healthCheckNodePort"].is_null(), "{turned}");
    }

    #[test]
    fn what_goes_with_the_type() {
        let mut old = good();
        defaults(&mut old);
        old["spec"]["clusterIP"] = "10.0.0.1".into();
        old["spec"]["clusterIPs"] = json!(["10.0.0.1"]);
        old["spec"]["ports"][0]["nodePort"] = 30_000.into();
        let turned = |ty: &str| {
            let mut new = with(&old, "/spec/type", ty.into());
            new["spec"]["externalName"] = "a.b".into();
            (row().prepare_update)(&mut new, &old);
            check_update(&row(), old.clone(), new.clone(), &[]);
            new["spec"].clone()
        };
        let inside = turned("ClusterIP");
        for key in ["externalTrafficPolicy", "allocateLoadBalancerNodePorts"] {
            assert!(inside[key].is_null(), "{inside}");
        }
        assert!(inside["ports"][0]["nodePort"].is_null(), "{inside}");
        assert_eq!(inside["clusterIP"], "10.0.0.1");
        assert_eq!(turned("NodePort")["ports"][0]["nodePort"], 30_000);
        assert!(turned("ExternalName")["clusterIPs"].is_null());
    }
}
