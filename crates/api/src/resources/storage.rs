//! PersistentVolume, PersistentVolumeClaim, StorageClass.

use k8s_openapi::api::{
    core::v1::{PersistentVolume, PersistentVolumeClaim},
    storage::v1::StorageClass,
};
use serde_json::{Value, json};

use super::{STATUS, default, items};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Row, Validation, col, row as base, wide},
};

/// `RWO,ROX`: access modes as kubectl abbreviates them.
fn modes(value: &Value) -> String {
    let short = |mode: &Value| match mode.as_str() {
        Some("ReadWriteOnce") => "RWO",
        Some("ReadOnlyMany") => "ROX",
        Some("ReadWriteMany") => "RWX",
        Some("ReadWriteOncePod") => "RWOP",
        _ => "",
    };
    value.as_array().into_iter().flatten().map(short).collect::<Vec<_>>().join(",")
}

pub(super) fn volume() -> Row {
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
            let Some(spec) = o.get_mut("spec") else { return };
            default(spec, "persistentVolumeReclaimPolicy", "Retain");
            default(spec, "volumeMode", "Filesystem");
        },
        validate: |v, errors| {
            let path = Path::Root.at("spec");
            if v.new["spec"]["capacity"]["storage"].is_null() {
                errors.required(path.at("capacity"), "");
            }
            if items(&v.new["spec"], "accessModes").next().is_none() {
                errors.required(path.at("accessModes"), "");
            }
        },
        prepare_create: |o| o["status"] = json!({"phase": "Pending"}),
        ..base::<PersistentVolume>()
    }
}

pub(super) fn claim_defaults(object: &mut Value) {
    if let Some(spec) = object.get_mut("spec") {
        default(spec, "volumeMode", "Filesystem");
    }
    default(object, "status", json!({}));
    default(&mut object["status"], "phase", "Pending");
}

pub(super) fn claim() -> Row {
    Row {
        short_names: &["pvc"],
        subresources: STATUS,
        columns: const {
            &[
                col("Status", "string"),
                col("Volume", "string"),
                col("Capacity", "string"),
                col("Access Modes", "string"),
                col("StorageClass", "string"),
                col("VolumeAttributesClass", "string"),
                col("Age", "date"),
                wide("VolumeMode", "string"),
            ]
        },
        cells: |o, now| {
            let (spec, status) = (&o["spec"], &o["status"]);
            let phase = if o["metadata"]["deletionTimestamp"].is_string() {
                "Terminating".into()
            } else {
                cell::plain(&status["phase"])
            };
            vec![
                phase,
                cell::plain(&spec["volumeName"]),
                cell::plain(&status["capacity"]["storage"]),
                modes(&status["accessModes"]).into(),
                cell::plain(&spec["storageClassName"]),
                spec["volumeAttributesClassName"].as_str().unwrap_or("<unset>").into(),
                cell::age(o, now),
                cell::plain(&spec["volumeMode"]),
            ]
        },
        defaults: claim_defaults,
        validate: validate_claim,
        prepare_create: |o| o["status"] = json!({"phase": "Pending"}),
        ..base::<PersistentVolumeClaim>()
    }
}

fn validate_claim(v: &Validation<'_>, errors: &mut Errors) {
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    if items(spec, "accessModes").next().is_none() {
        errors.required(path.at("accessModes"), "at least 1 access mode is required");
    }
    if spec["resources"]["requests"]["storage"].is_null() {
        let path = path.at("resources");
        errors.required(path.key("storage"), "");
    }
    if let Some(old) = v.old {
        // Bound by the binder, grown by the user; nothing else changes.
        let fixed = |spec: &Value| {
            let mut spec = spec.clone();
            if let Some(spec) = spec.as_object_mut() {
                spec.remove("resources");
                spec.remove("volumeAttributesClassName");
            }
            spec
        };
        let (mut was, is) = (fixed(&old["spec"]), fixed(spec));
        if was["volumeName"].is_null() {
            was["volumeName"] = is["volumeName"].clone();
        }
        let mut is = is;
        if is["volumeName"].is_null() {
            is["volumeName"] = Value::Null;
        }
        if was != is {
            errors.forbidden(path, "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims");
        }
    }
}

pub(super) fn class() -> Row {
    Row {
        short_names: &["sc"],
        columns: const {
            &[
                col("Provisioner", "string"),
                col("ReclaimPolicy", "string"),
                col("VolumeBindingMode", "string"),
                col("AllowVolumeExpansion", "boolean"),
                col("Age", "date"),
            ]
        },
        cells: |o, now| {
            vec![
                cell::plain(&o["provisioner"]),
                cell::plain(&o["reclaimPolicy"]),
                cell::plain(&o["volumeBindingMode"]),
                o["allowVolumeExpansion"].as_bool().unwrap_or(false).into(),
                cell::age(o, now),
            ]
        },
        defaults: |o| {
            default(o, "reclaimPolicy", "Delete");
            default(o, "volumeBindingMode", "Immediate");
        },
        validate: |v, errors| {
            if v.new["provisioner"].as_str().unwrap_or_default().is_empty() {
                errors.required(Path::Root.at("provisioner"), "");
            }
            if let Some(old) = v.old {
                for key in ["provisioner", "parameters", "reclaimPolicy", "volumeBindingMode"] {
                    if old[key] != v.new[key] {
                        errors.forbidden(Path::Root.at(key), format!("updates to {key} are forbidden."));
                    }
                }
            }
        },
        ..base::<StorageClass>()
    }
}
