//! NetworkPolicy, IngressClass, IPAddress, ServiceCIDR.

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{IPAddress, IngressClass, NetworkPolicy, ServiceCIDR};
use serde_json::Value;

use super::{default, ip, items, items_mut, meta, with_status};
use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Validation, col, row as base},
};

const MAX_CONTROLLER: usize = 250;

pub(super) fn policy() -> Row {
    Row {
        short_names: &["netpol"],
        columns: const { &[col("Pod-Selector", "string"), col("Age", "date")] },
        cells: |o, now| vec![cell::selector(&o["spec"]["podSelector"]), cell::age(o, now)],
        defaults: policy_defaults,
        validate: validate_policy,
        generation: true,
        ..base::<NetworkPolicy>()
    }
}

/// Without types, a policy is about what comes in, and about what goes out if it says something of that.
fn policy_defaults(o: &mut Value) {
    let Some(spec) = o.get_mut("spec") else { return };
    for list in ["ingress", "egress"] {
        for rule in items_mut(spec, list) {
            for port in items_mut(rule, "ports") {
                default(port, "protocol", "TCP");
            }
        }
    }
    if items(spec, "policyTypes").next().is_none() {
        let mut types = vec!["Ingress"];
        if items(spec, "egress").next().is_some() {
            types.push("Egress");
        }
        spec["policyTypes"] = types.into();
    }
}

/// The rules of a direction, and what its peers are called.
const DIRECTIONS: [(&str, &str); 2] = [("ingress", "from"), ("egress", "to")];

fn validate_policy(v: &Validation<'_>, errors: &mut Errors) {
    let (spec, old) = (&v.new["spec"], v.old.map(|old| &old["spec"]));
    let path = Path::Root.at("spec");
    meta::selector_after(&spec["podSelector"], old.map(|old| &old["podSelector"]), path.at("podSelector"), errors);
    // Ranges that were there before may be as they were allowed to be then.
    let mut known: Vec<&str> = Vec::new();
    for (list, peers) in DIRECTIONS {
        for block in old.into_iter().flat_map(|old| items(old, list)).flat_map(|rule| items(rule, peers)) {
            known.extend(block["ipBlock"]["cidr"].as_str());
            known.extend(items(&block["ipBlock"], "except").filter_map(Value::as_str));
        }
    }
    for (list, peers) in DIRECTIONS {
        let at = path.at(list);
        for (index, rule) in items(spec, list).enumerate() {
            let at = at.index(index);
            let ports = at.at("ports");
            for (index, port) in items(rule, "ports").enumerate() {
                policy_port(port, ports.index(index), errors);
            }
            let at = at.at(peers);
            for (index, peer) in items(rule, peers).enumerate() {
                policy_peer(peer, &known, at.index(index), errors);
            }
        }
    }
    let at = path.at("policyTypes");
    let types: Vec<&str> = items(spec, "policyTypes").filter_map(Value::as_str).collect();
    if types.len() > 2 {
        errors.invalid(at, types, "may not specify more than two policyTypes");
        return;
    }
    for (index, ty) in types.into_iter().enumerate() {
        if !["Ingress", "Egress"].contains(&ty) {
            errors.unsupported(at.index(index), ty, &["Ingress", "Egress"]);
        }
    }
}

fn policy_port(port: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(protocol) = port["protocol"].as_str().filter(|p| !["TCP", "UDP", "SCTP"].contains(p)) {
        errors.unsupported(path.at("protocol"), protocol, &["TCP", "UDP", "SCTP"]);
    }
    let (at, end) = (path.at("endPort"), port["endPort"].as_i64());
    match &port["port"] {
        Value::Number(number) => {
            let number = number.as_i64().unwrap_or_default();
            meta::port_number(number, path.at("port"), errors);
            if let Some(end) = end {
                if end < number {
                    errors.invalid(at, end, "must be greater than or equal to `port`");
                }
                meta::port_number(end, at, errors);
            }
        }
        Value::String(name) => {
            if let Some(end) = end {
                errors.invalid(at, end, "may not be specified when `port` is non-numeric");
            }
            errors.expect(path.at("port"), name, names::port_name);
        }
        _ => {
            if let Some(end) = end {
                errors.invalid(at, end, "may not be specified when `port` is not specified");
            }
        }
    }
}

fn policy_peer(peer: &Value, known: &[&str], path: Path<'_>, errors: &mut Errors) {
    let mut peers = 0;
    for key in ["podSelector", "namespaceSelector"] {
        if peer[key].is_object() {
            peers += 1;
            meta::selector(&peer[key], path.at(key), errors);
        }
    }
    let block = &peer["ipBlock"];
    if block.is_object() {
        peers += 1;
        ip_block(block, known, path.at("ipBlock"), errors);
    }
    if peers == 0 {
        errors.required(path, "must specify a peer");
    } else if peers > 1 && block.is_object() {
        errors.forbidden(path, "may not specify both ipBlock and another peer");
    }
}

fn ip_block(block: &Value, known: &[&str], path: Path<'_>, errors: &mut Errors) {
    let cidr = block["cidr"].as_str().unwrap_or_default();
    if cidr.is_empty() {
        errors.required(path.at("cidr"), "");
        return;
    }
    let range = |text: &str| if known.contains(&text) { Ok(()) } else { ip::range(text) };
    errors.expect(path.at("cidr"), cidr, range);
    let Some(outer) = ip::sloppy_range(cidr) else { return };
    let list = path.at("except");
    for (index, text) in items(block, "except").enumerate() {
        let (at, text) = (list.index(index), text.as_str().unwrap_or_default());
        errors.expect(at, text, range);
        let inside = |inner: IpNet| outer.contains(&inner) && inner.prefix_len() > outer.prefix_len();
        if ip::sloppy_range(text).is_some_and(|inner| !inside(inner)) {
            errors.invalid(at, text, "must be a strict subset of `cidr`");
        }
    }
}

pub(super) fn class() -> Row {
    Row {
        columns: const { &[col("Controller", "string"), col("Parameters", "string"), col("Age", "date")] },
        cells: |o, now| {
            let spec = &o["spec"];
            vec![cell::plain(&spec["controller"]), cell::text(&spec["parameters"]["name"]), cell::age(o, now)]
        },
        defaults: |o| {
            if let Some(parameters) = o.get_mut("spec").and_then(|spec| spec.get_mut("parameters")) {
                default(parameters, "scope", "Cluster");
            }
        },
        validate: validate_class,
        generation: true,
        ..base::<IngressClass>()
    }
}

fn validate_class(v: &Validation<'_>, errors: &mut Errors) {
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    let at = path.at("controller");
    if let Some(old) = v.old {
        errors.immutable(at, &old["spec"]["controller"], &spec["controller"]);
    }
    errors.expect_some(at, &spec["controller"], names::domain_prefixed_path);
    if spec["controller"].as_str().is_some_and(|controller| controller.len() > MAX_CONTROLLER) {
        errors.too_long(at, MAX_CONTROLLER);
    }
    let parameters = &spec["parameters"];
    if !parameters.is_object() {
        return;
    }
    let path = path.at("parameters");
    if let Some(group) = parameters["apiGroup"].as_str() {
        errors.expect(path.at("apiGroup"), group, names::dns_subdomain);
    }
    meta::reference(parameters, path, errors);
    let (at, namespace) = (path.at("namespace"), parameters["namespace"].as_str());
    match (parameters["scope"].as_str(), namespace) {
        (None, _) => errors.required(path.at("scope"), ""),
        (Some("Namespace"), None) => errors.required(at, "`parameters.scope` is set to 'Namespace'"),
        (Some("Namespace"), Some(namespace)) => errors.expect(at, namespace, names::dns_label),
        (Some("Cluster"), Some(_)) => errors.forbidden(at, "`parameters.scope` is set to 'Cluster'"),
        (Some("Cluster"), None) => {}
        (Some(other), _) => errors.not_supported(path.at("scope"), other, &["Cluster", "Namespace"]),
    }
}

pub(super) fn address() -> Row {
    Row {
        short_names: &["ip"],
        name: ip::canonical,
        columns: const { &[col("ParentRef", "string")] },
        cells: |o, _| {
            let parent = &o["spec"]["parentRef"];
            let part = |k: &str| parent[k].as_str().unwrap_or_default().to_owned();
            vec![format!("{}/{}/{}", part("resource"), part("namespace"), part("name")).into()]
        },
        validate: validate_address,
        ..base::<IPAddress>()
    }
}

fn validate_address(v: &Validation<'_>, errors: &mut Errors) {
    let parent = &v.new["spec"]["parentRef"];
    let path = Path::Root.at("spec");
    let path = path.at("parentRef");
    if let Some(old) = v.old {
        errors.immutable(path, &old["spec"]["parentRef"], parent);
        return;
    }
    if !parent.is_object() {
        errors.required(path, "");
        return;
    }
    let text = |key: &str| parent[key].as_str().filter(|text| !text.is_empty());
    if let Some(group) = text("group") {
        errors.expect(path.at("group"), group, names::dns_subdomain);
    }
    for key in ["resource", "name"] {
        errors.expect_some(path.at(key), &parent[key], names::path_segment);
    }
    if let Some(namespace) = text("namespace") {
        errors.expect(path.at("namespace"), namespace, names::path_segment);
    }
}

pub(super) fn cidr() -> Row {
    Row {
        columns: const { &[col("CIDRs", "string"), col("Age", "date")] },
        cells: |o, now| {
            let cidrs: Vec<&str> = items(&o["spec"], "cidrs").filter_map(Value::as_str).collect();
            vec![cidrs.join(",").into(), cell::age(o, now)]
        },
        validate: validate_cidr,
        ..with_status(base::<ServiceCIDR>())
    }
}

fn validate_cidr(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return;
    }
    let texts = |object: &'_ Value| -> Vec<String> {
        items(&object["spec"], "cidrs").map(|cidr| cidr.as_str().unwrap_or_default().to_owned()).collect()
    };
    let (new, old) = (texts(v.new), v.old.map(texts));
    let path = Path::Root.at("spec");
    let path = path.at("cidrs");
    if let Some(old) = old {
        // A second family may be added, and nothing else.
        if new.len() != old.len() && (old.len(), new.len()) != (1, 2) {
            errors.invalid(path, new, "field is immutable");
            return;
        }
        for (index, (new, old)) in new.iter().zip(&old).enumerate() {
            errors.immutable(path.index(index), &Value::from(old.as_str()), &Value::from(new.as_str()));
        }
        if new.len() == old.len() {
            return;
        }
    }
    if new.is_empty() {
        errors.required(path, "at least one CIDR required");
        return;
    }
    if new.len() > 2 {
        errors.invalid(path, v.new["spec"].clone(), "may only hold up to 2 values");
        return;
    }
    for (index, text) in new.iter().enumerate() {
        errors.expect(path.index(index), text, ip::canonical_range);
    }
    let families: Vec<bool> =
        new.iter().filter_map(|text| ip::sloppy_range(text)).map(|net| net.addr().is_ipv4()).collect();
    if let [first, second] = families[..]
        && first == second
    {
        let why = "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64";
        errors.invalid(path, new, why);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_update, with},
        *,
    };

    #[test]
    fn policies() {
        let rule = |rule: Value| json!({"spec": {"podSelector": {}, "ingress": [rule]}});
        let block = |block: Value| rule(json!({"from": [{"ipBlock": block}]}));
        let at = "spec.ingress[0]";
        for (object, expect) in [
            (
                rule(
                    json!({"ports": [{"port": 80, "endPort": 90}], "from": [{"podSelector": {}, "namespaceSelector": {}}]}),
                ),
                &[][..],
            ),
            (
                rule(json!({"ports": [{"port": 0}]})),
                &[&*format!("{at}.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive")],
            ),
            (
                rule(json!({"ports": [{"port": 80, "endPort": 79}]})),
                &[&*format!("{at}.ports[0].endPort: Invalid value: 79: must be greater than or equal to `port`")],
            ),
            (
                rule(json!({"ports": [{"port": "web", "endPort": 79, "protocol": "X"}]})),
                &[
                    &*format!(
                        "{at}.ports[0].protocol: Unsupported value: \"X\": supported values: \"TCP\", \"UDP\", \"SCTP\""
                    ),
                    &*format!(
                        "{at}.ports[0].endPort: Invalid value: 79: may not be specified when `port` is non-numeric"
                    ),
                ],
            ),
            (rule(json!({"from": [{}]})), &[&*format!("{at}.from[0]: Required value: must specify a peer")]),
            (
                rule(json!({"from": [{"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}]})),
                &[&*format!("{at}.from[0]: Forbidden: may not specify both ipBlock and another peer")],
            ),
            (block(json!({"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]})), &[]),
            (block(json!({})), &[&*format!("{at}.from[0].ipBlock.cidr: Required value")]),
            (
                block(json!({"cidr": "10.0.0.1/8"})),
                &[&*format!(
                    "{at}.from[0].ipBlock.cidr: Invalid value: \"10.0.0.1/8\": must not have bits set beyond the prefix length"
                )],
            ),
            (
                block(json!({"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]})),
                &[&*format!(
                    "{at}.from[0].ipBlock.except[0]: Invalid value: \"10.0.0.0/8\": must be a strict subset of `cidr`"
                )],
            ),
            (
                json!({"spec": {"podSelector": {"matchLabels": {"a": "-"}}, "policyTypes": ["Both"]}}),
                &[
                    &*format!(
                        "spec.podSelector.matchLabels: Invalid value: \"-\": {}",
                        names::label_value("-").unwrap_err()
                    ),
                    "spec.policyTypes[0]: Unsupported value: \"Both\": supported values: \"Ingress\", \"Egress\"",
                ],
            ),
        ] {
            check(&policy(), object, expect);
        }
        let mut out = json!({"spec": {"podSelector": {}, "egress": [{"ports": [{"port": 1}]}]}});
        policy_defaults(&mut out);
        assert_eq!(out["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
        assert_eq!(out["spec"]["egress"][0]["ports"][0]["protocol"], "TCP");
    }

    #[test]
    fn old_ranges_may_stay() {
        let with_range =
            |cidr: &str| json!({"spec": {"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": cidr}}]}]}});
        let old = with_range("010.0.0.0/8");
        let mut moved = old.clone();
        moved["spec"]["ingress"] = json!([{"from": [{"ipBlock": {"cidr": "010.0.0.0/8"}}]}]);
        check_update(&policy(), old, moved, &[]);
        let why = "spec.egress[0].to[0].ipBlock.cidr: Invalid value: \"010.0.0.0/8\": must not have leading 0s";
        check_update(&policy(), with_range("10.0.0.0/8"), with_range("010.0.0.0/8"), &[why]);
    }

    #[test]
    fn classes() {
        let good = json!({"spec": {"controller": "a.b/c", "parameters": {"kind": "K", "name": "n"}}});
        for (pointer, value, expect) in [
            ("/spec/controller", json!("x.y/z/w"), &[][..]),
            ("/spec/controller", json!(null), &["spec.controller: Required value"]),
            (
                "/spec/controller",
                json!("c"),
                &["spec.controller: Invalid value: \"c\": must be a domain-prefixed path (such as \"acme.io/foo\")"],
            ),
            (
                "/spec/controller",
                json!(format!("a.b/{}", "c".repeat(250))),
                &["spec.controller: Too long: may not be more than 250 bytes"],
            ),
            ("/spec/parameters/kind", json!(null), &["spec.parameters.kind: Required value"]),
            (
                "/spec/parameters/scope",
                json!("All"),
                &["spec.parameters.scope: Unsupported value: \"All\": supported values: \"Cluster\", \"Namespace\""],
            ),
            (
                "/spec/parameters/scope",
                json!("Namespace"),
                &["spec.parameters.namespace: Required value: `parameters.scope` is set to 'Namespace'"],
            ),
            (
                "/spec/parameters/namespace",
                json!("n"),
                &["spec.parameters.namespace: Forbidden: `parameters.scope` is set to 'Cluster'"],
            ),
        ] {
            check(&class(), with(&good, pointer, value), expect);
        }
        let why = "spec.controller: Invalid value: \"a.b/d\": field is immutable";
        check_update(&class(), good.clone(), with(&good, "/spec/controller", "a.b/d".into()), &[why]);
        check_update(&class(), good.clone(), with(&good, "/spec/parameters/name", "m".into()), &[]);
    }

    #[test]
    fn addresses() {
        assert!((address().name)("10.0.0.1").is_ok());
        assert!((address().name)("010.0.0.1").is_err());
        let of = |name: &str| json!({"spec": {"parentRef": {"resource": "services", "namespace": "n", "name": name}}});
        check(&address(), of("s"), &[]);
        check(&address(), json!({"spec": {}}), &["spec.parentRef: Required value"]);
        check(
            &address(),
            json!({"spec": {"parentRef": {"name": "a/b"}}}),
            &[
                "spec.parentRef.resource: Required value",
                "spec.parentRef.name: Invalid value: \"a/b\": may not contain '/'",
            ],
        );
        let why =
            r#"spec.parentRef: Invalid value: {"name":"t","namespace":"n","resource":"services"}: field is immutable"#;
        check_update(&address(), of("s"), of("t"), &[why]);
    }

    #[test]
    fn ranges() {
        let of = |cidrs: &[&str]| json!({"spec": {"cidrs": cidrs}});
        check(&cidr(), of(&["10.0.0.0/24", "2001:db8::/64"]), &[]);
        check(&cidr(), of(&[]), &["spec.cidrs: Required value: at least one CIDR required"]);
        check(
            &cidr(),
            of(&["10.0.0.1/24"]),
            &["spec.cidrs[0]: Invalid value: \"10.0.0.1/24\": must not have bits set beyond the prefix length"],
        );
        let two = ["10.0.0.0/24", "10.0.1.0/24"];
        let why = r#"spec.cidrs: Invalid value: ["10.0.0.0/24","10.0.1.0/24"]: may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64"#;
        check(&cidr(), of(&two), &[why]);
        check_update(&cidr(), of(&two[..1]), of(&["10.0.0.0/24", "2001:db8::/64"]), &[]);
        check_update(
            &cidr(),
            of(&two[..1]),
            of(&two[1..]),
            &["spec.cidrs[0]: Invalid value: \"10.0.1.0/24\": field is immutable"],
        );
        check_update(
            &cidr(),
            of(&two),
            of(&two[..1]),
            &["spec.cidrs: Invalid value: [\"10.0.0.0/24\"]: field is immutable"],
        );
        // One that was allowed before is not looked at again.
        check_update(&cidr(), of(&two), of(&two), &[]);
    }
}
