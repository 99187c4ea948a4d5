//! The status of a ResourceClaim: what it got, who uses it, and what drivers say of its devices.

use std::collections::HashSet;

use serde_json::Value;

use super::{
    super::{csi, ip, items, items_mut, meta, pod_spec},
    parts::{
        MAX_CONFIGS, MAX_REQUESTS, binding_conditions, configuration, declared_driver, declared_pool, each, pool,
        raw_object, skipped_operations, text, unique,
    },
    request::Requests,
    taint::{toleration_defaults, tolerations},
};
use crate::{
    field::{Errors, Path, same},
    names,
    row::Validation,
};

const MAX_CONSUMERS: usize = 256;
const MAX_CONDITIONS: usize = 8;
const MAX_DATA: usize = 10 * 1024;
const MAX_ADDRESSES: usize = 16;
const MAX_INTERFACE: usize = 256;
const MAX_HARDWARE_ADDRESS: usize = 128;

/// A device, and which share of it if several claims share it: driver, pool, device, share.
type Share<'v> = [&'v str; 4];

fn share(of: &Value) -> Share<'_> {
    ["driver", "pool", "device", "shareID"].map(|key| text(of, key))
}

fn results(claim: &Value) -> impl Iterator<Item = &Value> {
    items(&claim["status"]["allocation"]["devices"], "results")
}

pub(super) fn defaults(claim: &mut Value) {
    let devices = claim.pointer_mut("/status/allocation/devices");
    devices.into_iter().flat_map(|devices| items_mut(devices, "results")).for_each(toleration_defaults);
}

/// What drivers said of a device goes with it.
pub(super) fn prepare(new: &mut Value, old: &Value) {
    let device = |of: &Value| ["driver", "pool", "device"].map(|key| text(of, key).to_owned());
    let kept: HashSet<_> = results(new).map(device).collect();
    let gone: HashSet<_> = results(old).map(device).filter(|device| !kept.contains(device)).collect();
    if let Some(Value::Array(devices)) = new.pointer_mut("/status/devices") {
        devices.retain(|of| !gone.contains(&device(of)));
    }
}

pub(super) fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let Some(old) = v.old else { return };
    let (status, path) = (&v.new["status"], Path::Root.at("status"));
    consumers(v.new, &old["status"], path, errors);
    let allocated: HashSet<Share<'_>> = results(v.new).map(share).collect();
    each(status, "devices", usize::MAX, path, errors, |device, path, errors| {
        reported(device, &allocated, path, errors);
    });
    unique(status, "devices", usize::MAX, path, errors, |device| (share(device), device.clone()));
    let (allocation, at) = (&status["allocation"], path.at("allocation"));
    match (old["status"]["allocation"].is_object(), allocation.is_object()) {
        (true, true) if !same(&old["status"]["allocation"], allocation) => {
            errors.invalid(at, Value::Null, "field cannot be modified once set");
        }
        (false, true) => allocated_devices(v.new, allocation, at, errors),
        _ => {}
    }
}

/// Validates who may use the devices.
fn consumers(claim: &Value, old: &Value, path: Path<'_>, errors: &mut Errors) {
    const KEY: &str = "reservedFor";
    let status = &claim["status"];
    each(status, KEY, MAX_CONSUMERS, path, errors, |consumer, path, errors| {
        for key in ["resource", "name", "uid"] {
            if text(consumer, key).is_empty() {
                errors.required(path.at(key), "");
            }
        }
    });
    unique(status, KEY, MAX_CONSUMERS, path, errors, |consumer| (text(consumer, "uid"), consumer.clone()));
    if items(status, KEY).next().is_none() {
        return;
    }
    if !status["allocation"].is_object() {
        return errors.forbidden(path.at(KEY), "may not be specified when `allocated` is not set");
    }
    let is_new = |consumer: &Value| !items(old, KEY).any(|other| same(other, consumer));
    if claim["metadata"]["deletionTimestamp"].is_string() && items(status, KEY).any(is_new) {
        let why = "new entries may not be added while `deallocationRequested` or `deletionTimestamp` are set";
        errors.forbidden(path.at(KEY), why);
    }
}

fn share_id(of: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(id) = of["shareID"].as_str() else { return };
    let good = id.len() == 36
        && id.bytes().enumerate().all(|(at, c)| match at {
            8 | 13 | 18 | 23 => c == b'-',
            _ => c.is_ascii_digit() || (b'a'..=b'f').contains(&c),
        });
    if !good {
        errors.invalid(path.at("shareID"), id, "must be a lowercase UUID in 8-4-4-4-12 format");
    }
}

/// Validates what a driver says of a device.
fn reported(device: &Value, allocated: &HashSet<Share<'_>>, path: Path<'_>, errors: &mut Errors) {
    csi::driver_name(text(device, "driver"), path.at("driver"), errors);
    pool(text(device, "pool"), path.at("pool"), errors);
    errors.expect(path.at("device"), text(device, "device"), names::dns_label);
    share_id(device, path, errors);
    let id = share(device);
    if !allocated.contains(&id) {
        let shown: Vec<&str> = id.into_iter().filter(|part| !part.is_empty()).collect();
        errors.invalid(path, shown.join("/"), "must be an allocated device in the claim");
    }
    meta::conditions(device, MAX_CONDITIONS, path, errors);
    if !device["data"].is_null() {
        raw_object(&device["data"], MAX_DATA, path.at("data"), errors);
    }
    let (network, at) = (&device["networkData"], path.at("networkData"));
    for (key, most) in [("interfaceName", MAX_INTERFACE), ("hardwareAddress", MAX_HARDWARE_ADDRESS)] {
        if text(network, key).len() > most {
            errors.too_long(at.at(key), most);
        }
    }
    each(network, "ips", MAX_ADDRESSES, at, errors, |address, path, errors| {
        errors.expect(path, address.as_str().unwrap_or_default(), ip::interface_address);
    });
    unique(network, "ips", MAX_ADDRESSES, at, errors, |address| (address.as_str(), address.clone()));
}

/// Validates what a claim got.
fn allocated_devices(claim: &Value, allocation: &Value, path: Path<'_>, errors: &mut Errors) {
    let known = Requests::of(&claim["spec"]["devices"]);
    let (devices, at) = (&allocation["devices"], path.at("devices"));
    each(devices, "results", MAX_REQUESTS, at, errors, |result, path, errors| {
        known.refer(text(result, "request"), path.at("request"), errors);
        declared_driver(text(result, "driver"), path.at("driver"), errors);
        declared_pool(text(result, "pool"), path.at("pool"), errors);
        errors.expect(path.at("device"), text(result, "device"), names::dns_label);
        binding_conditions(result, path, errors);
        tolerations(result, path, errors);
        share_id(result, path, errors);
        skipped_operations(result, path, errors);
    });
    // Of the class, and of the claim.
    each(devices, "config", 2 * MAX_CONFIGS, at, errors, |config, path, errors| {
        match text(config, "source") {
            "" => errors.required(path.at("source"), ""),
            "FromClaim" | "FromClass" => {}
            other => errors.not_supported(path.at("source"), other, &["FromClaim", "FromClass"]),
        }
        known.refer_all(config, path, errors);
        configuration(config, false, path, errors);
    });
    if allocation["nodeSelector"].is_object() {
        pod_spec::node_selector(&allocation["nodeSelector"], path.at("nodeSelector"), errors);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::{
            super::testing::{check_status, with},
            claim::claim,
        },
        *,
    };

    fn pending() -> Value {
        json!({"metadata": {}, "spec": {"devices": {"requests": [{"name": "gpu", "exactly": {"deviceClassName": "c"}}]}}, "status": {}})
    }

    fn allocated() -> Value {
        let result = json!({"request": "gpu", "driver": "gpu.example.com", "pool": "node-1/a", "device": "gpu-0"});
        let term = json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]});
        let config = json!({"source": "FromClass", "requests": [], "opaque": {"driver": "a.b", "parameters": {}}});
        with(
            &pending(),
            "/status/allocation",
            json!({"devices": {"results": [result], "config": [config]},
            "nodeSelector": {"nodeSelectorTerms": [term]}}),
        )
    }

    fn used() -> Value {
        let pod = json!({"resource": "pods", "name": "p", "uid": "u"});
        with(&allocated(), "/status/reservedFor", json!([pod]))
    }

    #[test]
    fn allocations() {
        check_status(&claim(), pending(), allocated(), &[]);
        let unknown =
            "must be the name of a request in the claim or the name of a request and a subrequest separated by '/'";
        let caseless = names::dns_subdomain_caseless("_").unwrap_err();
        let subdomain = names::dns_subdomain("_").unwrap_err();
        for (pointer, value, expect) in [
            ("devices/results/0/request", json!("nic"), format!("devices.results[0].request: Invalid value: \"nic\": {unknown}")),
            ("devices/results/0/driver", json!("_"), format!("devices.results[0].driver: Invalid value: \"_\": {caseless}")),
            ("devices/results/0/driver", json!(""), "devices.results[0].driver: Required value".into()),
            ("devices/results/0/pool", json!("a/_"), format!("devices.results[0].pool: Invalid value: \"_\": segment 1: {subdomain}")),
            ("devices/results/0/pool", json!("/a"), "devices.results[0].pool: Invalid value: \"/a\": segment 0: must not be empty".into()),
            (
                "devices/results/0/shareID",
                json!("A"),
                "devices.results[0].shareID: Invalid value: \"A\": must be a lowercase UUID in 8-4-4-4-12 format".into(),
            ),
            (
                "devices/results/0/bindingConditions",
                json!(["ready"]),
                "devices.results[0].bindingFailureConditions: Invalid value: null: bindingFailureConditions are required to use bindingConditions".into(),
            ),
            (
                "devices/results/0/skipNodeOperations",
                json!(["NodePrepareResources"]),
                "devices.results[0].skipNodeOperations: Invalid value: [\"NodePrepareResources\"]: NodePrepareResources cannot be skipped unless NodeUnprepareResources is also skipped".into(),
            ),
            (
                "devices/config/0/source",
                json!("Mine"),
                "devices.config[0].source: Unsupported value: \"Mine\": supported values: \"FromClaim\", \"FromClass\"".into(),
            ),
            (
                "nodeSelector/nodeSelectorTerms",
                json!([]),
                "nodeSelector.nodeSelectorTerms: Required value: must have at least one node selector term".into(),
            ),
        ] {
            let expect = format!("status.allocation.{expect}");
            check_status(&claim(), pending(), with(&allocated(), &format!("/status/allocation/{pointer}"), value), &[&expect]);
        }
        let moved = with(&allocated(), "/status/allocation/devices/results/0/device", "gpu-1".into());
        check_status(
            &claim(),
            allocated(),
            moved,
            &["status.allocation: Invalid value: null: field cannot be modified once set"],
        );
        check_status(&claim(), allocated(), pending(), &[]);
    }

    #[test]
    fn consumers_of_claims() {
        check_status(&claim(), pending(), used(), &[]);
        check_status(
            &claim(),
            used(),
            with(&used(), "/status/allocation", Value::Null),
            &["status.reservedFor: Forbidden: may not be specified when `allocated` is not set"],
        );
        check_status(
            &claim(),
            used(),
            with(&used(), "/status/reservedFor/0/uid", "".into()),
            &["status.reservedFor[0].uid: Required value"],
        );
        let deleted = |claim: Value| with(&claim, "/metadata/deletionTimestamp", "2026-01-01T00:00:00Z".into());
        check_status(&claim(), deleted(used()), deleted(used()), &[]);
        check_status(
            &claim(),
            deleted(allocated()),
            deleted(used()),
            &[
                "status.reservedFor: Forbidden: new entries may not be added while `deallocationRequested` or `deletionTimestamp` are set",
            ],
        );
        let twice = with(
            &used(),
            "/status/reservedFor",
            json!([used()["status"]["reservedFor"][0], used()["status"]["reservedFor"][0]]),
        );
        let expect = format!("status.reservedFor[1]: Duplicate value: {}", used()["status"]["reservedFor"][0]);
        check_status(&claim(), used(), twice, &[&expect]);
    }

    #[test]
    fn what_drivers_say() {
        let of = |device: Value| with(&allocated(), "/status/devices", json!([device]));
        let device = json!({"driver": "gpu.example.com", "pool": "node-1/a", "device": "gpu-0",
            "data": {"a": 1}, "networkData": {"interfaceName": "net1", "ips": ["10.9.8.7/24", "2001:db8::1/64"]}});
        check_status(&claim(), allocated(), of(device.clone()), &[]);
        for (pointer, value, expect) in [
            (
                "/device",
                json!("gpu-1"),
                ": Invalid value: \"gpu.example.com/node-1/a/gpu-1\": must be an allocated device in the claim",
            ),
            ("/data", json!("text"), ".data: Invalid value: \"<value omitted>\": must be a valid JSON object"),
            (
                "/networkData/ips/0",
                json!("10.9.8.7"),
                ".networkData.ips[0]: Invalid value: \"10.9.8.7\": must be a valid address in CIDR form, (e.g. 10.9.8.7/24 or 2001:db8::1/64)",
            ),
            (
                "/networkData/ips/0",
                json!("2001:DB8::1/64"),
                ".networkData.ips[0]: Invalid value: \"2001:DB8::1/64\": must be in canonical form (\"2001:db8::1/64\")",
            ),
            ("/networkData/ips/0", json!("2001:db8::1/64"), ".networkData.ips[1]: Duplicate value: \"2001:db8::1/64\""),
            (
                "/networkData/interfaceName",
                json!("x".repeat(257)),
                ".networkData.interfaceName: Too long: may not be more than 256 bytes",
            ),
        ] {
            check_status(
                &claim(),
                allocated(),
                of(with(&device, pointer, value)),
                &[&format!("status.devices[0]{expect}")],
            );
        }
        // What was said of devices that were given back is forgotten.
        let mut freed = with(&of(device.clone()), "/status/allocation", Value::Null);
        (claim().prepare_status)(&mut freed, &of(device));
        assert_eq!(freed["status"]["devices"], json!([]));
    }
}
