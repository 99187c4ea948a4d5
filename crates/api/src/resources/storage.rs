//! PersistentVolume (<https://kubernetes.io/docs/concepts/storage/persistent-volumes/>).

use k8s_openapi::api::core::v1::PersistentVolume;
use serde_json::{Value, json};

use super::{STATUS, default, items, meta, pod_spec, volume};
use crate::{
    cell,
    field::{Errors, Path, same},
    names,
    quantity::Quantity,
    row::{Row, Validation, col, row as base, wide},
};

const MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];

/// Where a volume can come from.
const SOURCES: [&str; 22] = [
    "hostPath",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "glusterfs",
    "flocker",
    "nfs",
    "rbd",
    "quobyte",
    "cephfs",
    "iscsi",
    "cinder",
    "fc",
    "flexVolume",
    "azureFile",
    "vsphereVolume",
    "photonPersistentDisk",
    "portworxVolume",
    "azureDisk",
    "scaleIO",
    "local",
    "storageos",
    "csi",
];

/// `RWO,ROX`: access modes as kubectl abbreviates them.
pub(super) fn modes(value: &Value) -> String {
    let short = |mode: &Value| match mode.as_str() {
        Some("ReadWriteOnce") => "RWO",
        Some("ReadOnlyMany") => "ROX",
        Some("ReadWriteMany") => "RWX",
        Some("ReadWriteOncePod") => "RWOP",
        _ => "",
    };
    value.as_array().into_iter().flatten().map(short).collect::<Vec<_>>().join(",")
}

pub(super) fn row() -> Row {
    Row {
        short_names: &["pv"],
        subresources: STATUS,
        columns: const {
            &[
                col("Capacity", "string"),
                col("Access Modes", "string"),
                col("Reclaim Policy", "string"),
                col("Status", "string"),
                col("Claim", "string"),
                col("StorageClass", "string"),
                col("VolumeAttributesClass", "string"),
                col("Reason", "string"),
                col("Age", "date"),
                wide("VolumeMode", "string"),
            ]
        },
        cells: |o, now| {
            let spec = &o["spec"];
            let claim = match spec["claimRef"]["name"].as_str() {
                Some(name) => format!("{}/{name}", spec["claimRef"]["namespace"].as_str().unwrap_or_default()),
                None => String::new(),
            };
            let phase = if o["metadata"]["deletionTimestamp"].is_string() {
                "Terminating".into()
            } else {
                cell::plain(&o["status"]["phase"])
            };
            vec![
                cell::plain(&spec["capacity"]["storage"]),
                modes(&spec["accessModes"]).into(),
                cell::plain(&spec["persistentVolumeReclaimPolicy"]),
                phase,
                claim.into(),
                cell::plain(&spec["storageClassName"]),
                spec["volumeAttributesClassName"].as_str().unwrap_or("<unset>").into(),
                cell::plain(&o["status"]["reason"]),
                cell::age(o, now),
                cell::plain(&spec["volumeMode"]),
            ]
        },
        defaults: |o| {
            if let Some(spec) = o.get_mut("spec") {
                volume_defaults(spec);
            }
        },
        validate,
        prepare_create: |o| o["status"] = json!({"phase": "Pending"}),
        ..base::<PersistentVolume>()
    }
}

/// Fills in what the spec of a volume leaves out.
pub(super) fn volume_defaults(spec: &mut Value) {
    default(spec, "persistentVolumeReclaimPolicy", "Retain");
    default(spec, "volumeMode", "Filesystem");
    if let Some(path) = spec.get_mut("hostPath") {
        default(path, "type", "");
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return;
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    volume_spec(spec, false, path, errors);
    let Some(old) = v.old.map(|old| &old["spec"]) else { return };
    let source = |spec: &Value| -> Value {
        let mut source = json!({});
        for key in SOURCES {
            source[key] = spec[key].clone();
        }
        source
    };
    let mut was = source(old);
    // A secret for growing may be given later.
    let secret = "controllerExpandSecretRef";
    if was["csi"].is_object() && was["csi"][secret].is_null() && spec["csi"].is_object() {
        was["csi"][secret] = spec["csi"][secret].clone();
    }
    if !same(&was, &source(spec)) {
        let why = "spec.persistentvolumesource is immutable after creation";
        errors.forbidden(path.at("persistentvolumesource"), why);
    }
    errors.immutable(Path::Root.at("volumeMode"), &old["volumeMode"], &spec["volumeMode"]);
    if !old["nodeAffinity"].is_null() {
        errors.immutable(Path::Root.at("nodeAffinity"), &old["nodeAffinity"], &spec["nodeAffinity"]);
    }
    if old["volumeAttributesClassName"].is_string() && spec["volumeAttributesClassName"].is_null() {
        errors.forbidden(path.at("volumeAttributesClassName"), "update from non-nil value to nil is forbidden");
    }
}

/// Validates `accessModes`, of which there must be one.
pub(super) fn access_modes(spec: &Value, missing: &str, path: Path<'_>, errors: &mut Errors) {
    let at = path.at("accessModes");
    let given: Vec<&str> = items(spec, "accessModes").filter_map(Value::as_str).collect();
    if given.is_empty() {
        errors.required(at, missing);
    }
    for mode in given.iter().filter(|mode| !MODES.contains(mode)) {
        errors.not_supported(at, *mode, &MODES);
    }
    let alone = "ReadWriteOncePod";
    if given.contains(&alone) && given.iter().any(|mode| *mode != alone && MODES.contains(mode)) {
        errors.forbidden(at, "may not use ReadWriteOncePod with other access modes");
    }
}

/// Validates the spec of a volume. `inline` is one that a VolumeAttachment carries.
pub(super) fn volume_spec(spec: &Value, inline: bool, path: Path<'_>, errors: &mut Errors) {
    if inline {
        for key in ["claimRef", "capacity", "storageClassName"] {
            if spec[key].as_str().is_none_or(|text| !text.is_empty()) && !same(&spec[key], &Value::Null) {
                errors.forbidden(path.at(key), "may not be specified in the context of inline volumes");
            }
        }
        if !spec["csi"].is_object() {
            errors.required(path.at("csi"), "has to be specified in the context of inline volumes");
        }
    }
    access_modes(spec, "", path, errors);
    if !inline {
        capacity(spec, path.at("capacity"), errors);
        meta::one_of(spec, "persistentVolumeReclaimPolicy", &["Delete", "Recycle", "Retain"], path, errors);
        if let Some(class) = spec["storageClassName"].as_str().filter(|class| !class.is_empty()) {
            errors.expect(path.at("storageClassName"), class, names::dns_subdomain);
        }
        meta::one_of(spec, "volumeMode", &["Block", "Filesystem"], path, errors);
    }
    let affinity = node_affinity(&spec["nodeAffinity"], path.at("nodeAffinity"), errors);
    let mut given = SOURCES.into_iter().filter(|key| !spec[*key].is_null());
    match given.next() {
        None => errors.required(path, "must specify a volume type"),
        Some(first) => source(&spec[first], first, path.at(first), errors),
    }
    for extra in given {
        errors.forbidden(path.at(extra), "may not specify more than 1 volume type");
    }
    if !spec["local"].is_null() && !affinity {
        errors.required(path.at("nodeAffinity"), "Local volume requires node affinity");
    }
    let root = spec["hostPath"]["path"]
        .as_str()
        .is_some_and(|path| path.starts_with('/') && path.trim_matches('/').is_empty());
    if root && spec["persistentVolumeReclaimPolicy"] == "Recycle" {
        errors.forbidden(path.at("persistentVolumeReclaimPolicy"), "may not be 'recycle' for a hostPath mount of '/'");
    }
    if let Some(class) = spec["volumeAttributesClassName"].as_str() {
        let at = path.at("volumeAttributesClassName");
        match class {
            "" => errors.required(at, "an empty string is disallowed"),
            class => errors.expect(at, class, names::dns_subdomain),
        }
        if spec["csi"].is_null() {
            errors.required(path.at("csi"), "has to be specified when using volumeAttributesClassName");
        }
    }
}

fn capacity(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(capacity) = spec["capacity"].as_object().filter(|capacity| !capacity.is_empty()) else {
        errors.required(path, "");
        return;
    };
    if !capacity.contains_key("storage") || capacity.len() > 1 {
        errors.not_supported(path, spec["capacity"].clone(), &["storage"]);
    }
    for (name, amount) in capacity {
        positive(amount, path.key(name), errors);
    }
}

/// Validates an amount of storage.
pub(super) fn positive(amount: &Value, path: Path<'_>, errors: &mut Errors) {
    if meta::quantity(amount).is_some_and(|parsed| parsed <= Quantity::new(0)) {
        errors.invalid(path, amount.clone(), "must be greater than zero");
    }
}

/// Validates where a volume can be reached from; says whether that is told at all.
fn node_affinity(affinity: &Value, path: Path<'_>, errors: &mut Errors) -> bool {
    if !affinity.is_object() {
        return false;
    }
    let required = &affinity["required"];
    let path = path.at("required");
    if !required.is_object() {
        errors.required(path, "must specify required node constraints");
        return true;
    }
    let list = path.at("nodeSelectorTerms");
    if items(required, "nodeSelectorTerms").next().is_none() {
        errors.required(list, "must have at least one node selector term");
    }
    for (index, term) in items(required, "nodeSelectorTerms").enumerate() {
        pod_spec::node_selector_term(term, list.index(index), errors);
    }
    true
}

fn source(source: &Value, kind: &str, path: Path<'_>, errors: &mut Errors) {
    let text = |key: &str| source[key].as_str().unwrap_or_default();
    let needed: &[&str] = match kind {
        "hostPath" | "local" => &["path"],
        "nfs" => &["server", "path"],
        "csi" => &["volumeHandle"],
        "iscsi" => &["targetPortal", "iqn"],
        "rbd" => &["image"],
        "azureFile" => &["secretName", "shareName"],
        "gcePersistentDisk" => &["pdName"],
        "awsElasticBlockStore" | "cinder" => &["volumeID"],
        "flexVolume" => &["driver"],
        "vsphereVolume" => &["volumePath"],
        _ => &[],
    };
    for key in needed.iter().filter(|key| text(key).is_empty()) {
        errors.required(path.at(key), "");
    }
    let at = path.at("path");
    if ["hostPath", "local"].contains(&kind) && text("path").split('/').any(|part| part == "..") {
        errors.invalid(at, text("path"), "must not contain '..'");
    }
    if kind == "nfs" && !text("path").is_empty() && !text("path").starts_with('/') {
        errors.invalid(at, text("path"), "must be an absolute path");
    }
    if kind == "hostPath" {
        meta::one_of(source, "type", &volume::HOST_PATHS, path, errors);
    }
    if kind == "csi" {
        super::csi::driver_name(text("driver"), path.at("driver"), errors);
        for key in [
            "controllerPublishSecretRef",
            "nodePublishSecretRef",
            "nodeStageSecretRef",
            "controllerExpandSecretRef",
            "nodeExpandSecretRef",
        ] {
            if source[key].is_object() {
                for part in ["name", "namespace"] {
                    if source[key][part].as_str().unwrap_or_default().is_empty() {
                        errors.required(path.at(key).at(part), "");
                    }
                }
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
        json!({"spec": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"},
            "csi": {"driver": "d", "volumeHandle": "h"}}})
    }

    #[test]
    fn what_a_volume_must_be() {
        for (pointer, value, expect) in [
            ("/spec/storageClassName", json!("c"), &[][..]),
            ("/spec/accessModes", json!([]), &["spec.accessModes: Required value"]),
            (
                "/spec/accessModes",
                json!(["Write"]),
                &[
                    "spec.accessModes: Unsupported value: \"Write\": supported values: \"ReadOnlyMany\", \"ReadWriteMany\", \"ReadWriteOnce\", \"ReadWriteOncePod\"",
                ],
            ),
            (
                "/spec/accessModes",
                json!(["ReadWriteOnce", "ReadWriteOncePod"]),
                &["spec.accessModes: Forbidden: may not use ReadWriteOncePod with other access modes"],
            ),
            ("/spec/capacity", json!({}), &["spec.capacity: Required value"]),
            (
                "/spec/capacity",
                json!({"cpu": "1"}),
                &["spec.capacity: Unsupported value: {\"cpu\":\"1\"}: supported values: \"storage\""],
            ),
            (
                "/spec/capacity/storage",
                json!("0"),
                &["spec.capacity[storage]: Invalid value: \"0\": must be greater than zero"],
            ),
            (
                "/spec/persistentVolumeReclaimPolicy",
                json!("Keep"),
                &[
                    "spec.persistentVolumeReclaimPolicy: Unsupported value: \"Keep\": supported values: \"Delete\", \"Recycle\", \"Retain\"",
                ],
            ),
            ("/spec/csi", json!(null), &["spec: Required value: must specify a volume type"]),
            ("/spec/csi/volumeHandle", json!(null), &["spec.csi.volumeHandle: Required value"]),
            (
                "/spec/nfs",
                json!({"server": "s", "path": "/p"}),
                &["spec.csi: Forbidden: may not specify more than 1 volume type"],
            ),
            (
                "/spec/nodeAffinity",
                json!({}),
                &["spec.nodeAffinity.required: Required value: must specify required node constraints"],
            ),
            (
                "/spec/volumeMode",
                json!("Tape"),
                &["spec.volumeMode: Unsupported value: \"Tape\": supported values: \"Block\", \"Filesystem\""],
            ),
        ] {
            check(&row(), with(&good(), pointer, value), expect);
        }
        let of =
            |key: &str, source: Value| with(&with(&good(), "/spec/csi", Value::Null), &format!("/spec/{key}"), source);
        check(&row(), of("hostPath", json!({"path": "/a"})), &[]);
        let why = "spec.hostPath.path: Invalid value: \"/a/../b\": must not contain '..'";
        check(&row(), of("hostPath", json!({"path": "/a/../b"})), &[why]);
        check(
            &row(),
            of("nfs", json!({"path": "a"})),
            &["spec.nfs.server: Required value", "spec.nfs.path: Invalid value: \"a\": must be an absolute path"],
        );
        let why = "spec.nodeAffinity: Required value: Local volume requires node affinity";
        check(&row(), of("local", json!({"path": "/a"})), &[why]);
        let root = with(&of("hostPath", json!({"path": "/"})), "/spec/persistentVolumeReclaimPolicy", "Recycle".into());
        let why = "spec.persistentVolumeReclaimPolicy: Forbidden: may not be 'recycle' for a hostPath mount of '/'";
        check(&row(), root, &[why]);
    }

    #[test]
    fn what_may_change() {
        let affinity = |zone: &str| json!({"required": {"nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]}]}});
        for (pointer, value, expect) in [
            ("/spec/claimRef", json!({"name": "c", "namespace": "n"}), &[][..]),
            ("/spec/persistentVolumeReclaimPolicy", json!("Delete"), &[]),
            ("/spec/capacity/storage", json!("2Gi"), &[]),
            ("/spec/csi/controllerExpandSecretRef", json!({"name": "s", "namespace": "n"}), &[]),
            ("/spec/nodeAffinity", affinity("a"), &[]),
            (
                "/spec/csi/volumeHandle",
                json!("other"),
                &["spec.persistentvolumesource: Forbidden: spec.persistentvolumesource is immutable after creation"],
            ),
            ("/spec/volumeMode", json!("Block"), &["volumeMode: Invalid value: \"Block\": field is immutable"]),
        ] {
            check_update(&row(), good(), with(&good(), pointer, value), expect);
        }
        let (old, new) = (affinity("a"), affinity("b"));
        let why = format!("nodeAffinity: Invalid value: {new}: field is immutable");
        check_update(
            &row(),
            with(&good(), "/spec/nodeAffinity", old),
            with(&good(), "/spec/nodeAffinity", new),
            &[&why],
        );
    }
}
