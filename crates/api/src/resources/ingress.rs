//! Ingress (<https://kubernetes.io/docs/concepts/services-networking/ingress/>).

use k8s_openapi::api::networking::v1::Ingress;
use serde_json::Value;

use super::{ip, items, meta, with_status};
use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Validation, col, row as base},
};

/// What named the class before there was a field.
const CLASS: &str = "kubernetes.io/ingress.class";

pub(super) fn row() -> Row {
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
        validate,
        ..with_status(base::<Ingress>())
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return status(v, errors);
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    let first = items(spec, "rules").next();
    if first.is_none() && spec["defaultBackend"].is_null() {
        errors.invalid(path, Value::Array(Vec::new()), "either `defaultBackend` or `rules` must be specified");
    }
    if spec["defaultBackend"].is_object() {
        backend(&spec["defaultBackend"], path.at("defaultBackend"), errors);
    }
    // Once a rule for a wildcard was wrong, such rules are not looked at.
    let wrong = |rule: &Value| {
        let mut found = Errors::default();
        paths(rule, Path::Root, &mut found);
        is_wildcard(rule) && !found.is_empty()
    };
    let lenient = v.old.is_some_and(|old| items(&old["spec"], "rules").any(wrong));
    let list = path.at("rules");
    for (index, rule) in items(spec, "rules").enumerate() {
        let at = list.index(index);
        if let Some(name) = rule["host"].as_str().filter(|name| !name.is_empty()) {
            if ip::sloppy(name).is_some() {
                errors.invalid(at.at("host"), name, "must be a DNS name, not an IP address");
            }
            errors.expect(at.at("host"), name, host);
        }
        if !(lenient && is_wildcard(rule)) {
            paths(rule, at, errors);
        }
    }
    tls(v, path.at("tls"), errors);
    let class = spec["ingressClassName"].as_str();
    if let Some(class) = class {
        errors.expect(path.at("ingressClassName"), class, names::dns_subdomain);
    }
    let annotated = v.new["metadata"]["annotations"][CLASS].as_str();
    if let (None, Some(annotated), Some(class)) = (v.old, annotated, class)
        && annotated != class
    {
        let at = Path::Root.at("annotations");
        errors.invalid(at.at(CLASS), annotated, "must match `ingressClassName` when both are specified");
    }
}

fn is_wildcard(rule: &Value) -> bool {
    rule["host"].as_str().is_some_and(|host| host.contains('*'))
}

fn host(name: &str) -> Result<(), String> {
    if name.contains('*') { names::wildcard_subdomain(name) } else { names::dns_subdomain(name) }
}

fn tls(v: &Validation<'_>, path: Path<'_>, errors: &mut Errors) {
    let bad = |tls: &Value| {
        let name = tls["secretName"].as_str().unwrap_or_default();
        if name.is_empty() { Ok(()) } else { names::dns_subdomain(name) }
    };
    let lenient = v.old.is_some_and(|old| items(&old["spec"], "tls").any(|tls| bad(tls).is_err()));
    for (index, tls) in items(&v.new["spec"], "tls").enumerate() {
        let at = path.index(index);
        let hosts = at.at("hosts");
        for (index, name) in items(tls, "hosts").enumerate() {
            errors.expect(hosts.index(index), name.as_str().unwrap_or_default(), host);
        }
        if let Err(why) = bad(tls)
            && !lenient
        {
            errors.invalid(at.at("secretName"), tls["secretName"].clone(), why);
        }
    }
}

fn paths(rule: &Value, path: Path<'_>, errors: &mut Errors) {
    let http = &rule["http"];
    if !http.is_object() {
        return;
    }
    let at = path.at("http");
    let list = at.at("paths");
    if items(http, "paths").next().is_none() {
        errors.required(list, "");
    }
    for (index, path) in items(http, "paths").enumerate() {
        let at = list.index(index);
        let text = path["path"].as_str().unwrap_or_default();
        let absolute = text.starts_with('/');
        match path["pathType"].as_str() {
            None => {
                errors.required(at.at("pathType"), "pathType must be specified");
                continue;
            }
            Some("Exact" | "Prefix") => {
                if !absolute {
                    errors.invalid(at.at("path"), text, "must be an absolute path");
                }
                for sequence in ["//", "/./", "/../", "%2f", "%2F"].iter().filter(|part| text.contains(**part)) {
                    errors.invalid(at.at("path"), text, format!("must not contain '{sequence}'"));
                }
                for suffix in ["/..", "/."].iter().filter(|part| text.ends_with(**part)) {
                    errors.invalid(at.at("path"), text, format!("cannot end with '{suffix}'"));
                }
            }
            Some("ImplementationSpecific") => {
                if !text.is_empty() && !absolute {
                    errors.invalid(at.at("path"), text, "must be an absolute path");
                }
            }
            Some(other) => {
                errors.not_supported(at.at("pathType"), other, &["Exact", "ImplementationSpecific", "Prefix"]);
            }
        }
        backend(&path["backend"], at.at("backend"), errors);
    }
}

fn backend(backend: &Value, path: Path<'_>, errors: &mut Errors) {
    let (resource, service) = (&backend["resource"], &backend["service"]);
    match (resource.is_object(), service.is_object()) {
        (true, true) => errors.invalid(path, "", "cannot set both resource and service backends"),
        (true, false) => {
            let at = path.at("resource");
            if let Some(group) = resource["apiGroup"].as_str() {
                errors.expect(at.at("apiGroup"), group, names::dns_subdomain);
            }
            meta::reference(resource, at, errors);
        }
        (false, true) => {
            let at = path.at("service");
            errors.expect_some(at.at("name"), &service["name"], names::dns_label);
            let port = &service["port"];
            let name = port["name"].as_str().unwrap_or_default();
            let number = port["number"].as_i64().unwrap_or_default();
            match (name, number) {
                ("", 0) => errors.required(path, "port name or number is required"),
                ("", number) => meta::port_number(number, at.at("port").at("number"), errors),
                (name, 0) => errors.expect(at.at("port").at("name"), name, names::port_name),
                _ => errors.invalid(path, "", "cannot set both port name & port number"),
            }
        }
        (false, false) => errors.invalid(path, "", "resource or service backend is required"),
    }
}

fn status(v: &Validation<'_>, errors: &mut Errors) {
    let balancer =
        |object: &'_ Value| -> Vec<Value> { items(&object["status"]["loadBalancer"], "ingress").cloned().collect() };
    let known = v.old.map(balancer).unwrap_or_default();
    let path = Path::Root.at("status");
    let path = path.at("loadBalancer");
    let list = path.at("ingress");
    for (index, entry) in balancer(v.new).iter().enumerate() {
        let at = list.index(index);
        if let Some(ip) = entry["ip"].as_str().filter(|ip| !ip.is_empty())
            && !known.iter().any(|old| old["ip"] == ip)
        {
            errors.expect(at.at("ip"), ip, ip::address);
        }
        if let Some(name) = entry["hostname"].as_str().filter(|name| !name.is_empty()) {
            errors.expect(at.at("hostname"), name, names::dns_subdomain);
            if ip::sloppy(name).is_some() {
                errors.invalid(at.at("hostname"), name, "must be a DNS name, not an IP address");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_status, check_update, with},
        *,
    };

    fn good() -> Value {
        json!({"metadata": {"annotations": {}}, "spec": {"rules": [{"host": "a.example.com", "http": {"paths": [
            {"path": "/", "pathType": "Prefix", "backend": {"service": {"name": "s", "port": {"number": 80}}}}]}}]}})
    }

    #[test]
    fn what_an_ingress_must_be() {
        let rule = "spec.rules[0]";
        let path = "spec.rules[0].http.paths[0]";
        for (pointer, value, expect) in [
            ("/spec/ingressClassName", json!("c"), &[][..]),
            (
                "/spec/rules",
                json!([]),
                &["spec: Invalid value: []: either `defaultBackend` or `rules` must be specified"],
            ),
            ("/spec/rules/0/host", json!("*.example.com"), &[]),
            (
                "/spec/rules/0/host",
                json!("a.*"),
                &[&*format!("{rule}.host: Invalid value: \"a.*\": {}", names::wildcard_subdomain("a.*").unwrap_err())],
            ),
            (
                "/spec/rules/0/host",
                json!("10.0.0.1"),
                &[&*format!("{rule}.host: Invalid value: \"10.0.0.1\": must be a DNS name, not an IP address")],
            ),
            ("/spec/rules/0/http/paths", json!([]), &[&*format!("{rule}.http.paths: Required value")]),
            (
                "/spec/rules/0/http/paths/0/pathType",
                json!(null),
                &[&*format!("{path}.pathType: Required value: pathType must be specified")],
            ),
            (
                "/spec/rules/0/http/paths/0/pathType",
                json!("Regex"),
                &[&*format!(
                    "{path}.pathType: Unsupported value: \"Regex\": supported values: \"Exact\", \"ImplementationSpecific\", \"Prefix\""
                )],
            ),
            (
                "/spec/rules/0/http/paths/0/path",
                json!("a"),
                &[&*format!("{path}.path: Invalid value: \"a\": must be an absolute path")],
            ),
            (
                "/spec/rules/0/http/paths/0/path",
                json!("/a//b/.."),
                &[
                    &*format!("{path}.path: Invalid value: \"/a//b/..\": must not contain '//'"),
                    &*format!("{path}.path: Invalid value: \"/a//b/..\": cannot end with '/..'"),
                ],
            ),
            (
                "/spec/rules/0/http/paths/0/backend",
                json!({}),
                &[&*format!("{path}.backend: Invalid value: \"\": resource or service backend is required")],
            ),
            (
                "/spec/rules/0/http/paths/0/backend/service/port",
                json!({}),
                &[&*format!("{path}.backend: Required value: port name or number is required")],
            ),
            (
                "/spec/rules/0/http/paths/0/backend/service/port",
                json!({"name": "http", "number": 80}),
                &[&*format!("{path}.backend: Invalid value: \"\": cannot set both port name & port number")],
            ),
            (
                "/spec/rules/0/http/paths/0/backend/resource",
                json!({"kind": "K", "name": "n"}),
                &[&*format!("{path}.backend: Invalid value: \"\": cannot set both resource and service backends")],
            ),
            (
                "/spec/tls",
                json!([{"hosts": ["*.a.b", "A"], "secretName": "s"}]),
                &[&*format!("spec.tls[0].hosts[1]: Invalid value: \"A\": {}", names::dns_subdomain("A").unwrap_err())],
            ),
        ] {
            check(&row(), with(&good(), pointer, value), expect);
        }
        let both =
            with(&with(&good(), "/metadata/annotations", json!({CLASS: "a"})), "/spec/ingressClassName", "b".into());
        let why = "annotations.kubernetes.io/ingress.class: Invalid value: \"a\": must match `ingressClassName` when both are specified";
        check(&row(), both.clone(), &[why]);
        check_update(&row(), both.clone(), both, &[]);
    }

    #[test]
    fn what_was_allowed_stays() {
        let secret = with(&good(), "/spec/tls", json!([{"secretName": "A"}]));
        let why = format!("spec.tls[0].secretName: Invalid value: \"A\": {}", names::dns_subdomain("A").unwrap_err());
        check_update(&row(), good(), secret.clone(), &[&why]);
        check_update(&row(), secret.clone(), with(&secret, "/spec/ingressClassName", "c".into()), &[]);
        let wildcard =
            with(&with(&good(), "/spec/rules/0/host", "*.a.b".into()), "/spec/rules/0/http/paths/0/path", "x".into());
        check_update(&row(), wildcard.clone(), with(&wildcard, "/spec/ingressClassName", "c".into()), &[]);
    }

    #[test]
    fn a_status_has_addresses() {
        let of = |ip: &str| json!({"status": {"loadBalancer": {"ingress": [{"ip": ip}]}}});
        check_status(&row(), of(""), of("10.0.0.1"), &[]);
        let why = "status.loadBalancer.ingress[0].ip: Invalid value: \"010.0.0.1\": must not have leading 0s";
        check_status(&row(), of(""), of("010.0.0.1"), &[why]);
        check_status(&row(), of("010.0.0.1"), of("010.0.0.1"), &[]);
    }
}
