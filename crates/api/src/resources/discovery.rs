//! EndpointSlice and Endpoints.

use std::collections::HashSet;

use k8s_openapi::api::{core::v1::Endpoints, discovery::v1::EndpointSlice};
use serde_json::Value;

use super::{default, ip, items, items_mut, meta};
use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Validation, col, row as base},
};

const MAX_ENDPOINTS: u64 = 1000;
const MAX_ADDRESSES: u64 = 100;
const MAX_PORTS: u64 = 20_000;
const MAX_HINTS: u64 = 8;
const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];

pub(super) fn endpoint_slice() -> Row {
    Row {
        columns: const {
            &[col("AddressType", "string"), col("Ports", "string"), col("Endpoints", "string"), col("Age", "date")]
        },
        cells: |o, now| {
            let ports = items(o, "ports").map(|p| p["port"].as_i64().map_or("*".to_owned(), |n| n.to_string()));
            let addresses = items(o, "endpoints").flat_map(|e| items(e, "addresses")).filter_map(Value::as_str);
            let list = |all: Vec<String>, none: &str| match all.len() {
                0 => none.to_owned(),
                1..=3 => all.join(","),
                n => format!("{} + {} more...", all[..3].join(","), n - 3),
            };
            vec![
                cell::plain(&o["addressType"]),
                list(ports.collect(), "<unset>").into(),
                list(addresses.map(str::to_owned).collect(), "<unset>").into(),
                cell::age(o, now),
            ]
        },
        defaults: |o| {
            for port in items_mut(o, "ports") {
                default(port, "name", "");
                default(port, "protocol", "TCP");
            }
        },
        validate: validate_slice,
        ..base::<EndpointSlice>()
    }
}

pub(super) fn endpoints() -> Row {
    Row {
        short_names: &["ep"],
        columns: const { &[col("Endpoints", "string"), col("Age", "date")] },
        cells: |o, now| {
            let mut all = Vec::new();
            for subset in items(o, "subsets") {
                for address in items(subset, "addresses").filter_map(|a| a["ip"].as_str()) {
                    if items(subset, "ports").next().is_none() {
                        all.push(address.to_owned());
                    }
                    all.extend(items(subset, "ports").map(|p| format!("{address}:{}", cell::int(&p["port"]))));
                }
            }
            let text = match all.len() {
                0 => "<none>".to_owned(),
                1..=3 => all.join(","),
                n => format!("{} + {} more...", all[..3].join(","), n - 3),
            };
            vec![text.into(), cell::age(o, now)]
        },
        defaults: |o| {
            for subset in items_mut(o, "subsets") {
                for port in items_mut(subset, "ports") {
                    default(port, "protocol", "TCP");
                }
            }
        },
        validate: validate_endpoints,
        ..base::<Endpoints>()
    }
}

/// The API's own endpoints may be on the loopback, where a machine is all there is of a cluster.
fn is_own(object: &Value) -> bool {
    object["metadata"]["namespace"] == "default" && object["metadata"]["name"] == "kubernetes"
}

fn endpoint_address(object: &Value, address: &str, path: Path<'_>, errors: &mut Errors) {
    if !is_own(object) {
        ip::not_special(address, path, errors);
    }
}

fn validate_slice(v: &Validation<'_>, errors: &mut Errors) {
    let slice = v.new;
    let family = slice["addressType"].as_str().unwrap_or_default();
    match family {
        "" => errors.required(Path::Root.at("addressType"), ""),
        _ => meta::one_of(slice, "addressType", &["FQDN", "IPv4", "IPv6"], Path::Root, errors),
    }
    let list = Path::Root.at("endpoints");
    let count = items(slice, "endpoints").count() as u64;
    if count > MAX_ENDPOINTS {
        errors.too_many(list, count, MAX_ENDPOINTS);
    } else {
        for (index, endpoint) in items(slice, "endpoints").enumerate() {
            let before = v.old.map(|old| &old["endpoints"]);
            slice_endpoint(slice, family, endpoint, before, list.index(index), errors);
        }
    }
    slice_ports(slice, errors);
    if let Some(old) = v.old {
        errors.immutable(Path::Root.at("addressType"), &old["addressType"], &slice["addressType"]);
    }
}

fn slice_endpoint(
    slice: &Value,
    family: &str,
    endpoint: &Value,
    before: Option<&Value>,
    path: Path<'_>,
    errors: &mut Errors,
) {
    let at = path.at("addresses");
    let count = items(endpoint, "addresses").count() as u64;
    if count == 0 {
        errors.required(at, "must contain at least 1 address");
    } else if count > MAX_ADDRESSES {
        errors.too_many(at, count, MAX_ADDRESSES);
    }
    // An endpoint that was there before is not looked at again.
    let known = before
        .and_then(Value::as_array)
        .is_some_and(|old| old.iter().any(|old| old["addresses"] == endpoint["addresses"]));
    for (index, address) in items(endpoint, "addresses").filter_map(Value::as_str).enumerate().filter(|_| !known) {
        let at = at.index(index);
        let parsed = ip::sloppy(address);
        match family {
            "IPv4" | "IPv6" => {
                if parsed.is_none_or(|parsed| parsed.is_ipv4() != (family == "IPv4")) {
                    errors.invalid(at, address, format!("must be a valid {family} address"));
                } else {
                    errors.expect(at, address, ip::address);
                }
                endpoint_address(slice, address, at, errors);
            }
            "FQDN" => match address {
                "" => errors.required(at, ""),
                name => errors.expect(at, name, names::fully_qualified),
            },
            _ => {}
        }
    }
    if let Some(node) = endpoint["nodeName"].as_str() {
        errors.expect(path.at("nodeName"), node, names::dns_subdomain);
    }
    if let Some(name) = endpoint["hostname"].as_str() {
        errors.expect(path.at("hostname"), name, names::dns_label);
    }
    for (list, what) in [("forZones", "zone"), ("forNodes", "node")] {
        let at = path.at("hints");
        let at = at.at(list);
        let count = items(&endpoint["hints"], list).count() as u64;
        if count > MAX_HINTS {
            errors.too_many(at, count, MAX_HINTS);
            continue;
        }
        let mut seen = HashSet::new();
        for (index, hint) in items(&endpoint["hints"], list).enumerate() {
            let name = hint["name"].as_str().unwrap_or_default();
            let at = at.index(index);
            if !seen.insert(name) {
                errors.duplicate(at.at("name"), name);
            }
            match what {
                "zone" => errors.expect(at.at("name"), name, names::label_value),
                _ => errors.expect(at.at("name"), name, names::dns_subdomain),
            }
        }
    }
}

fn slice_ports(slice: &Value, errors: &mut Errors) {
    let list = Path::Root.at("ports");
    let count = items(slice, "ports").count() as u64;
    if count > MAX_PORTS {
        errors.too_many(list, count, MAX_PORTS);
        return;
    }
    let mut seen = HashSet::new();
    for (index, port) in items(slice, "ports").enumerate() {
        let at = list.index(index);
        let name = port["name"].as_str().unwrap_or_default();
        if !name.is_empty() {
            errors.expect(at.at("name"), name, names::dns_label);
        }
        if !seen.insert(name) {
            errors.duplicate(at.at("name"), name);
        }
        port_protocol(port, at, errors);
        if let Some(number) = port["port"].as_i64() {
            meta::port_number(number, at.at("port"), errors);
        }
    }
}

fn port_protocol(port: &Value, path: Path<'_>, errors: &mut Errors) {
    match port["protocol"].as_str().unwrap_or_default() {
        "" => errors.required(path.at("protocol"), ""),
        _ => meta::one_of(port, "protocol", &PROTOCOLS, path, errors),
    }
    if let Some(application) = port["appProtocol"].as_str() {
        errors.expect(path.at("appProtocol"), application, names::qualified_name);
    }
}

fn validate_endpoints(v: &Validation<'_>, errors: &mut Errors) {
    // Addresses that were there before are not looked at again.
    let mut known: HashSet<&str> = HashSet::new();
    for subset in v.old.into_iter().flat_map(|old| items(old, "subsets")) {
        let addresses = items(subset, "addresses").chain(items(subset, "notReadyAddresses"));
        known.extend(addresses.filter_map(|address| address["ip"].as_str()));
    }
    let list = Path::Root.at("subsets");
    for (index, subset) in items(v.new, "subsets").enumerate() {
        let path = list.index(index);
        let lists = ["addresses", "notReadyAddresses"];
        if lists.iter().all(|list| items(subset, list).next().is_none()) {
            errors.required(path, "must specify `addresses` or `notReadyAddresses`");
        }
        for list in lists {
            let at = path.at(list);
            for (index, address) in items(subset, list).enumerate() {
                let at = at.index(index);
                let text = address["ip"].as_str().unwrap_or_default();
                if !known.contains(text) {
                    errors.expect(at.at("ip"), text, ip::address);
                }
                if let Some(name) = address["hostname"].as_str().filter(|name| !name.is_empty()) {
                    errors.expect(at.at("hostname"), name, names::dns_label);
                }
                if let Some(node) = address["nodeName"].as_str() {
                    errors.expect(at.at("nodeName"), node, names::dns_subdomain);
                }
                endpoint_address(v.new, text, at.at("ip"), errors);
            }
        }
        let at = path.at("ports");
        let many = items(subset, "ports").count() > 1;
        for (index, port) in items(subset, "ports").enumerate() {
            let at = at.index(index);
            match port["name"].as_str().unwrap_or_default() {
                "" if many => errors.required(at.at("name"), ""),
                "" => {}
                name => errors.expect(at.at("name"), name, names::dns_label),
            }
            meta::port_number(port["port"].as_i64().unwrap_or_default(), at.at("port"), errors);
            port_protocol(port, at, errors);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_update},
        *,
    };

    #[test]
    fn slices() {
        let of = |family: &str, address: &str| json!({"addressType": family, "endpoints": [{"addresses": [address]}]});
        let at = "endpoints[0].addresses[0]";
        for (slice, expect) in [
            (of("IPv4", "10.0.0.1"), &[][..]),
            (of("IPv6", "2001:db8::1"), &[]),
            (of("FQDN", "a.example.com"), &[]),
            (of("", "x"), &["addressType: Required value"]),
            (
                of("IP", "x"),
                &["addressType: Unsupported value: \"IP\": supported values: \"FQDN\", \"IPv4\", \"IPv6\""],
            ),
            (
                of("IPv4", "2001:db8::1"),
                &[&*format!("{at}: Invalid value: \"2001:db8::1\": must be a valid IPv4 address")],
            ),
            (of("IPv4", "010.0.0.1"), &[&*format!("{at}: Invalid value: \"010.0.0.1\": must not have leading 0s")]),
            (
                of("IPv4", "127.0.0.1"),
                &[&*format!(
                    "{at}: Invalid value: \"127.0.0.1\": may not be in the loopback range (127.0.0.0/8, ::1/128)"
                )],
            ),
            (
                of("FQDN", "a"),
                &[&*format!(
                    "{at}: Invalid value: \"a\": should be a domain with at least two segments separated by dots"
                )],
            ),
            (
                json!({"addressType": "IPv4", "endpoints": [{}]}),
                &["endpoints[0].addresses: Required value: must contain at least 1 address"],
            ),
            (
                json!({"addressType": "IPv4", "ports": [{"port": 1}, {"port": 70000, "protocol": "X"}]}),
                &[
                    "ports[1].name: Duplicate value: \"\"",
                    "ports[1].protocol: Unsupported value: \"X\": supported values: \"SCTP\", \"TCP\", \"UDP\"",
                    "ports[1].port: Invalid value: 70000: must be between 1 and 65535, inclusive",
                ],
            ),
            (
                json!({"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"], "hints": {"forZones": [{"name": "a"}, {"name": "a"}]}}]}),
                &["endpoints[0].hints.forZones[1].name: Duplicate value: \"a\""],
            ),
        ] {
            check(&endpoint_slice(), slice, expect);
        }
        let why = "addressType: Invalid value: \"IPv6\": field is immutable";
        check_update(&endpoint_slice(), json!({"addressType": "IPv4"}), json!({"addressType": "IPv6"}), &[why]);
        let old = of("IPv4", "010.0.0.1");
        let mut labelled = old.clone();
        labelled["metadata"] = json!({"labels": {"a": "b"}});
        check_update(&endpoint_slice(), old, labelled, &[]);
        let mut own = of("IPv4", "127.0.0.1");
        own["metadata"] = json!({"namespace": "default", "name": "kubernetes"});
        check(&endpoint_slice(), own, &[]);
    }

    #[test]
    fn old_endpoints() {
        let of = |subset: Value| json!({"subsets": [subset]});
        let at = "subsets[0]";
        for (object, expect) in [
            (of(json!({"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 80}]})), &[][..]),
            (of(json!({})), &[&*format!("{at}: Required value: must specify `addresses` or `notReadyAddresses`")]),
            (
                of(json!({"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 80}, {"port": 0, "name": "b"}]})),
                &[
                    &*format!("{at}.ports[0].name: Required value"),
                    &*format!("{at}.ports[1].port: Invalid value: 0: must be between 1 and 65535, inclusive"),
                ],
            ),
            (
                of(json!({"notReadyAddresses": [{"ip": "169.254.0.1"}]})),
                &[&*format!(
                    "{at}.notReadyAddresses[0].ip: Invalid value: \"169.254.0.1\": may not be in the link-local range (169.254.0.0/16, fe80::/10)"
                )],
            ),
        ] {
            check(&endpoints(), object, expect);
        }
        let old = of(json!({"addresses": [{"ip": "010.0.0.1"}]}));
        check_update(&endpoints(), old.clone(), old, &[]);
    }
}
