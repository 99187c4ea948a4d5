//! EndpointSlice and Endpoints.

use k8s_openapi::api::{core::v1::Endpoints, discovery::v1::EndpointSlice};
use serde_json::Value;

use super::{default, items, items_mut, meta};
use crate::{
    cell,
    field::Path,
    row::{Row, col, row as base},
};

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
        validate: |v, errors| {
            let o = v.new;
            if o["addressType"].as_str().unwrap_or_default().is_empty() {
                errors.required(Path::Root.at("addressType"), "");
            }
            meta::one_of(o, "addressType", &["IPv4", "IPv6", "FQDN"], Path::Root, errors);
            if items(o, "endpoints").count() > 1000 {
                errors.invalid(
                    Path::Root.at("endpoints"),
                    items(o, "endpoints").count(),
                    "must have at most 1000 items",
                );
            }
            let list = Path::Root.at("endpoints");
            for (index, endpoint) in items(o, "endpoints").enumerate() {
                let path = list.index(index);
                if items(endpoint, "addresses").next().is_none() {
                    errors.required(path.at("addresses"), "must contain at least 1 address");
                }
                for address in items(endpoint, "addresses").filter_map(Value::as_str) {
                    let valid = match o["addressType"].as_str() {
                        Some("IPv4") => address.parse::<std::net::Ipv4Addr>().is_ok(),
                        Some("IPv6") => address.parse::<std::net::Ipv6Addr>().is_ok(),
                        _ => true,
                    };
                    if !valid {
                        let at = path.at("addresses");
                        errors.invalid(at.index(0), address, "must be a valid IP address of the slice's addressType");
                    }
                }
            }
            if let Some(old) = v.old {
                errors.immutable(Path::Root.at("addressType"), &old["addressType"], &o["addressType"]);
            }
        },
        generation: false,
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
        ..base::<Endpoints>()
    }
}
