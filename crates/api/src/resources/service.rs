//! Service and Ingress.

use std::{collections::HashSet, net::IpAddr};

use k8s_openapi::api::{core::v1::Service, networking::v1::Ingress};
use serde_json::{Value, json};

use super::{default, drop_status, items, items_mut, meta, with_status};
use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Subresource, Validation, col, row as base, wide},
};

/// The cluster addresses of a Service; none for a headless or external one.
pub fn cluster_ips(service: &Value) -> impl Iterator<Item = IpAddr> {
    items(&service["spec"], "clusterIPs").filter_map(|ip| ip.as_str()?.parse().ok())
}

pub(super) fn row() -> Row {
    Row {
        short_names: &["svc"],
        categories: &["all"],
        subresources: &[Subresource::Status],
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
        default(spec, "sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 10_800}}));
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
    if let Some(ip) = spec["clusterIP"].as_str().filter(|ip| !ip.is_empty() && *ip != "None")
        && ip.parse::<IpAddr>().is_err()
    {
        let list = path.at("clusterIPs");
        errors.invalid(list.index(0), ip, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
    }
    ports(spec, path, errors);
    if let Some(timeout) = spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].as_i64()
        && !(1..=86_400).contains(&timeout)
    {
        let at = path.at("sessionAffinityConfig");
        let at = at.at("clientIP");
        errors.invalid(at.at("timeoutSeconds"), timeout, "must be greater than 0 and less than 86400");
    }
    if let Some(old) = v.old {
        let (was, is) = (&old["spec"]["clusterIP"], &spec["clusterIP"]);
        let kept_type = old["spec"]["type"] != "ExternalName" && kind != "ExternalName";
        if kept_type && was.is_string() && was != is {
            let list = path.at("clusterIPs");
            errors.invalid(list.index(0), is.clone(), "may not change once set");
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

pub(super) fn ingress() -> Row {
    Row {
        short_names: &["ing"],
        columns: const {
            &[
                col("Class", "string"),
                col("Hosts", "string"),
                col("Address", "string"),
                col("Ports", "string"),
                col("Age", "date"),
            ]
        },
        cells: |o, now| {
            let hosts: Vec<&str> = items(&o["spec"], "rules").filter_map(|r| r["host"].as_str()).collect();
            let addresses: Vec<&str> = items(&o["status"]["loadBalancer"], "ingress")
                .filter_map(|i| i["ip"].as_str().or(i["hostname"].as_str()))
                .collect();
            vec![
                cell::text(&o["spec"]["ingressClassName"]),
                if hosts.is_empty() { "*".into() } else { hosts.join(",").into() },
                addresses.join(",").into(),
                if items(&o["spec"], "tls").next().is_some() { "80, 443".into() } else { "80".into() },
                cell::age(o, now),
            ]
        },
        prepare_create: drop_status,
        ..with_status(base::<Ingress>())
    }
}
