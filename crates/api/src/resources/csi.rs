//! CSIDriver, CSINode, CSIStorageCapacity, VolumeAttachment.

use std::collections::HashSet;

use k8s_openapi::api::storage::v1::{CSIDriver, CSINode, CSIStorageCapacity, VolumeAttachment};
use serde_json::{Value, json};

use super::{STATUS, default, items, meta, storage};
use crate::{
    cell,
    field::{Errors, Path, same},
    names,
    row::{Row, Validation, col, row as base},
};

/// The longest name that a driver gives a node.
const MAX_NODE_ID: usize = 256;
const MAX_METADATA: usize = 256 * (1 << 10);
const MAX_MESSAGE: usize = 1024;

pub(super) fn driver() -> Row {
    Row {
        defaults: |o| {
            default(o, "spec", json!({}));
            let spec = &mut o["spec"];
            default(spec, "attachRequired", true);
            for key in ["podInfoOnMount", "storageCapacity", "requiresRepublish", "seLinuxMount"] {
                default(spec, key, false);
            }
            default(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
            if items(spec, "volumeLifecycleModes").next().is_none() {
                spec["volumeLifecycleModes"] = json!(["Persistent"]);
            }
        },
        validate: validate_driver,
        generation: true,
        ..base::<CSIDriver>()
    }
}

fn validate_driver(v: &Validation<'_>, errors: &mut Errors) {
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    // Upstream calls the field `attachedRequired` in its errors.
    for (key, shown) in [
        ("attachRequired", "attachedRequired"),
        ("podInfoOnMount", "podInfoOnMount"),
        ("storageCapacity", "storageCapacity"),
        ("seLinuxMount", "seLinuxMount"),
    ] {
        if spec[key].is_null() {
            errors.required(path.at(shown), "");
        }
    }
    meta::one_of(spec, "fsGroupPolicy", &["File", "None", "ReadWriteOnceWithFSType"], path, errors);
    token_requests(spec, path.at("tokenRequests"), errors);
    for mode in items(spec, "volumeLifecycleModes").filter_map(Value::as_str) {
        if !["Persistent", "Ephemeral"].contains(&mode) {
            errors.unsupported(path.at("volumeLifecycleModes"), mode, &["Persistent", "Ephemeral"]);
        }
    }
    if let Some(period) = spec["nodeAllocatableUpdatePeriodSeconds"].as_i64().filter(|period| *period < 10) {
        let why = "must be greater than or equal to 10 seconds";
        errors.invalid(path.at("nodeAllocatableUpdatePeriodSeconds"), period, why);
    }
    if let Some(old) = v.old.map(|old| &old["spec"]) {
        errors.immutable(path.at("attachedRequired"), &old["attachRequired"], &spec["attachRequired"]);
        let key = "volumeLifecycleModes";
        errors.immutable(path.at(key), &old[key], &spec[key]);
    }
}

fn token_requests(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (index, request) in items(spec, "tokenRequests").enumerate() {
        let at = path.index(index);
        let audience = request["audience"].as_str().unwrap_or_default();
        if !seen.insert(audience) {
            errors.duplicate(at.at("audience"), audience);
            continue;
        }
        let at = at.at("expirationSeconds");
        match request["expirationSeconds"].as_i64() {
            Some(n) if n < 600 => errors.invalid(at, n, "may not specify a duration less than 10 minutes"),
            Some(n) if n > 1 << 32 => errors.invalid(at, n, "may not specify a duration larger than 2^32 seconds"),
            _ => {}
        }
    }
}

pub(super) fn node() -> Row {
    Row { validate: validate_node, ..base::<CSINode>() }
}

fn validate_node(v: &Validation<'_>, errors: &mut Errors) {
    let path = Path::Root.at("spec");
    let path = path.at("drivers");
    let mut seen = HashSet::new();
    for (index, driver) in items(&v.new["spec"], "drivers").enumerate() {
        let at = path.index(index);
        let name = driver["name"].as_str().unwrap_or_default();
        driver_name(name, at.at("name"), errors);
        let id = driver["nodeID"].as_str().unwrap_or_default();
        if id.is_empty() {
            errors.required(at.at("nodeID"), "");
        }
        if id.len() > MAX_NODE_ID {
            errors.invalid(at.at("nodeID"), id, format!("must be {MAX_NODE_ID} characters or less"));
        }
        meta::non_negative(&driver["allocatable"], "count", at.at("allocatable"), errors);
        if !seen.insert(name) {
            errors.duplicate(at.at("name"), name);
        }
        let mut keys = HashSet::new();
        for key in items(driver, "topologyKeys").filter_map(Value::as_str) {
            if key.is_empty() {
                errors.required(at, "");
            }
            if !keys.insert(key) {
                errors.duplicate(at, key);
            }
            errors.expect(at, key, names::qualified_name);
        }
    }
    // How much a driver can take may change, and nothing else of it.
    let without_count = |driver: &Value| {
        let mut driver = driver.clone();
        driver["allocatable"] = Value::Null;
        driver
    };
    for old in v.old.into_iter().flat_map(|old| items(&old["spec"], "drivers")) {
        for new in items(&v.new["spec"], "drivers").filter(|new| new["name"] == old["name"]) {
            if !same(&without_count(old), &without_count(new)) {
                errors.invalid(path, new.clone(), "field is immutable");
            }
        }
    }
}

/// Validates the name of a driver: a subdomain of at most 63 characters, perhaps with large letters.
pub(super) fn driver_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        errors.required(path, "");
    }
    if name.len() > 63 {
        errors.too_long(path, 63);
    }
    errors.expect(path, name, |name| names::dns_subdomain(&name.to_lowercase()));
}

pub(super) fn capacity() -> Row {
    Row {
        columns: const { &[col("StorageClassName", "string"), col("Capacity", "string")] },
        cells: |o, _| vec![cell::plain(&o["storageClassName"]), cell::plain(&o["capacity"])],
        validate: |v, errors| {
            let (new, root) = (v.new, Path::Root);
            if let Some(old) = v.old {
                for key in ["nodeTopology", "storageClassName"] {
                    errors.immutable(root.at(key), &old[key], &new[key]);
                }
                return;
            }
            meta::selector(&new["nodeTopology"], root.at("nodeTopology"), errors);
            let class = new["storageClassName"].as_str().unwrap_or_default();
            errors.expect(root.at("storageClassName"), class, names::dns_subdomain);
            if meta::quantity(&new["capacity"]).is_some_and(|amount| amount.is_negative()) {
                errors.invalid(root.at("capacity"), new["capacity"].clone(), "must be greater than or equal to 0");
            }
        },
        ..base::<CSIStorageCapacity>()
    }
}

pub(super) fn attachment() -> Row {
    Row {
        subresources: STATUS,
        columns: const {
            &[
                col("Attacher", "string"),
                col("PV", "string"),
                col("Node", "string"),
                col("Attached", "boolean"),
                col("Age", "date"),
            ]
        },
        cells: |o, now| {
            let spec = &o["spec"];
            vec![
                cell::plain(&spec["attacher"]),
                cell::plain(&spec["source"]["persistentVolumeName"]),
                cell::plain(&spec["nodeName"]),
                o["status"]["attached"].as_bool().unwrap_or(false).into(),
                cell::age(o, now),
            ]
        },
        defaults: |o| {
            let inline = o.pointer_mut("/spec/source/inlineVolumeSpec");
            if let Some(spec) = inline {
                storage::volume_defaults(spec);
            }
        },
        prepare_create: |o| o["status"] = json!({"attached": false}),
        validate: validate_attachment,
        ..base::<VolumeAttachment>()
    }
}

fn validate_attachment(v: &Validation<'_>, errors: &mut Errors) {
    attachment_status(&v.new["status"], errors);
    if v.subresource == "status" {
        return;
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    let attacher = spec["attacher"].as_str().unwrap_or_default();
    driver_name(attacher, path.at("attacher"), errors);
    let source = &spec["source"];
    let at = path.at("source");
    match (source["persistentVolumeName"].as_str(), source["inlineVolumeSpec"].is_object()) {
        (None, false) => {
            errors.required(at, "must specify exactly one of inlineVolumeSpec and persistentVolumeName");
        }
        (Some(_), true) => {
            errors.forbidden(at, "must specify exactly one of inlineVolumeSpec and persistentVolumeName");
        }
        (Some(""), false) => {
            errors.required(at.at("persistentVolumeName"), "must specify non empty persistentVolumeName");
        }
        (Some(name), false) => errors.expect(at.at("persistentVolumeName"), name, names::dns_subdomain),
        (None, true) => storage::volume_spec(&source["inlineVolumeSpec"], true, at.at("inlineVolumeSpec"), errors),
    }
    errors.expect(path.at("nodeName"), spec["nodeName"].as_str().unwrap_or_default(), names::dns_subdomain);
    if let Some(old) = v.old {
        errors.immutable(path, &old["spec"], spec);
    }
}

fn attachment_status(status: &Value, errors: &mut Errors) {
    let path = Path::Root.at("status");
    let metadata = status["attachmentMetadata"].as_object().into_iter().flatten();
    let size: usize = metadata.map(|(key, value)| key.len() + value.as_str().map_or(0, str::len)).sum();
    if size > MAX_METADATA {
        errors.too_long(path.at("attachmentMetadata"), MAX_METADATA);
    }
    for key in ["attachError", "detachError"] {
        let at = path.at(key);
        if status[key]["message"].as_str().is_some_and(|message| message.len() > MAX_MESSAGE) {
            errors.too_long(at.at("message"), MAX_METADATA);
        }
        if let Some(code) = status[key]["errorCode"].as_i64().filter(|code| *code < 0) {
            errors.invalid(at.at("errorCode"), code, "must be between 0 and 2147483647, inclusive");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{check, check_status, check_update},
        *,
    };

    #[test]
    fn drivers() {
        for (spec, expect) in [
            (json!({"fsGroupPolicy": "File", "tokenRequests": [{"audience": "a"}, {"audience": "b"}]}), &[][..]),
            (
                json!({"fsGroupPolicy": "Some"}),
                &[
                    "spec.fsGroupPolicy: Unsupported value: \"Some\": supported values: \"File\", \"None\", \"ReadWriteOnceWithFSType\"",
                ],
            ),
            (
                json!({"tokenRequests": [{"audience": "a", "expirationSeconds": 1}, {"audience": "a"}]}),
                &[
                    "spec.tokenRequests[0].expirationSeconds: Invalid value: 1: may not specify a duration less than 10 minutes",
                    "spec.tokenRequests[1].audience: Duplicate value: \"a\"",
                ],
            ),
            (
                json!({"volumeLifecycleModes": ["Often"]}),
                &[
                    "spec.volumeLifecycleModes: Unsupported value: \"Often\": supported values: \"Persistent\", \"Ephemeral\"",
                ],
            ),
            (
                json!({"nodeAllocatableUpdatePeriodSeconds": 9}),
                &[
                    "spec.nodeAllocatableUpdatePeriodSeconds: Invalid value: 9: must be greater than or equal to 10 seconds",
                ],
            ),
        ] {
            check(&driver(), json!({"spec": spec}), expect);
        }
        check_update(
            &driver(),
            json!({"spec": {}}),
            json!({"spec": {"attachRequired": false, "podInfoOnMount": true}}),
            &["spec.attachedRequired: Invalid value: false: field is immutable"],
        );
    }

    #[test]
    fn nodes() {
        let of = |drivers: Value| json!({"spec": {"drivers": drivers}});
        let one = |id: &str, count: i64| json!([{"name": "d", "nodeID": id, "allocatable": {"count": count}, "topologyKeys": ["zone"]}]);
        check(&node(), of(one("n", 3)), &[]);
        check(
            &node(),
            of(json!([{"name": "d", "nodeID": "", "allocatable": {"count": -1}}, {"name": "d", "nodeID": "n"}])),
            &[
                "spec.drivers[0].nodeID: Required value",
                "spec.drivers[0].allocatable.count: Invalid value: -1: must be greater than or equal to 0",
                "spec.drivers[1].name: Duplicate value: \"d\"",
            ],
        );
        check_update(&node(), of(one("n", 3)), of(one("n", 4)), &[]);
        let why = r#"spec.drivers: Invalid value: {"allocatable":{"count":3},"name":"d","nodeID":"m","topologyKeys":["zone"]}: field is immutable"#;
        check_update(&node(), of(one("n", 3)), of(one("m", 3)), &[why]);
    }

    #[test]
    fn capacities() {
        let of = |class: &str, amount: &str| json!({"storageClassName": class, "capacity": amount});
        check(&capacity(), of("c", "1Gi"), &[]);
        check(&capacity(), of("c", "-1"), &["capacity: Invalid value: \"-1\": must be greater than or equal to 0"]);
        check_update(&capacity(), of("c", "1Gi"), of("c", "2Gi"), &[]);
        check_update(
            &capacity(),
            of("c", "1Gi"),
            of("d", "1Gi"),
            &["storageClassName: Invalid value: \"d\": field is immutable"],
        );
    }

    #[test]
    fn attachments() {
        let of = |source: Value| json!({"spec": {"attacher": "d", "nodeName": "n", "source": source}});
        check(&attachment(), of(json!({"persistentVolumeName": "v"})), &[]);
        let exactly = "must specify exactly one of inlineVolumeSpec and persistentVolumeName";
        check(&attachment(), of(json!({})), &[&*format!("spec.source: Required value: {exactly}")]);
        check(
            &attachment(),
            of(json!({"persistentVolumeName": "v", "inlineVolumeSpec": {}})),
            &[&*format!("spec.source: Forbidden: {exactly}")],
        );
        check_update(
            &attachment(),
            of(json!({"persistentVolumeName": "v"})),
            of(json!({"persistentVolumeName": "w"})),
            &[
                r#"spec: Invalid value: {"attacher":"d","nodeName":"n","source":{"persistentVolumeName":"w"}}: field is immutable"#,
            ],
        );
        let failed = |code: i64| json!({"status": {"attachError": {"errorCode": code}}});
        check_status(&attachment(), failed(0), failed(3), &[]);
        check_status(
            &attachment(),
            failed(0),
            failed(-3),
            &["status.attachError.errorCode: Invalid value: -3: must be between 0 and 2147483647, inclusive"],
        );
    }
}
