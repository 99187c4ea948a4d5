//! PersistentVolumeClaim (<https://kubernetes.io/docs/concepts/storage/persistent-volumes/#persistentvolumeclaims>).

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use serde_json::{Value, json};

use super::{STATUS, default, meta, storage};
use crate::{
    cell,
    field::{Errors, Path, same},
    names,
    quantity::Quantity,
    row::{Row, Validation, col, row as base, wide},
};

/// What named the class of a claim before there was a field.
const CLASS: &str = "volume.beta.kubernetes.io/storage-class";

/// Fills in what a claim, or a template of one, leaves out.
pub(super) fn defaults(object: &mut Value) {
    if let Some(spec) = object.get_mut("spec") {
        default(spec, "volumeMode", "Filesystem");
    }
    default(object, "status", json!({}));
    default(&mut object["status"], "phase", "Pending");
}

pub(super) fn row() -> Row {
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
                storage::modes(&status["accessModes"]).into(),
                cell::plain(&spec["storageClassName"]),
                spec["volumeAttributesClassName"].as_str().unwrap_or("<unset>").into(),
                cell::age(o, now),
                cell::plain(&spec["volumeMode"]),
            ]
        },
        defaults: |o| {
            defaults(o);
            name_sources(o);
        },
        validate,
        prepare_create: |o| o["status"] = json!({"phase": "Pending"}),
        ..base::<PersistentVolumeClaim>()
    }
}

/// What a claim is filled from stands under an old and a new name.
fn name_sources(object: &mut Value) {
    let Some(spec) = object.get_mut("spec") else { return };
    let apart = spec["dataSourceRef"]["namespace"].as_str().is_some_and(|namespace| !namespace.is_empty());
    match (spec["dataSource"].is_object(), spec["dataSourceRef"].is_object()) {
        (true, false) => spec["dataSourceRef"] = spec["dataSource"].clone(),
        (false, true) if !apart => spec["dataSource"] = spec["dataSourceRef"].clone(),
        _ => {}
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        let at = Path::Root.at("status");
        let at = at.at("capacity");
        for (name, amount) in v.new["status"]["capacity"].as_object().into_iter().flatten() {
            if meta::quantity(amount).is_some_and(|amount| amount.is_negative()) {
                errors.invalid(at.key(name), amount.clone(), "must be greater than or equal to 0");
            }
        }
        return;
    }
    let spec = &v.new["spec"];
    let old = v.old.map(|old| &old["spec"]);
    let path = Path::Root.at("spec");
    storage::access_modes(spec, "at least 1 access mode is required", path, errors);
    meta::selector_after(&spec["selector"], old.map(|old| &old["selector"]), path.at("selector"), errors);
    let wanted = &spec["resources"]["requests"]["storage"];
    let at = path.at("resources");
    match wanted {
        Value::Null => errors.required(at.key("storage"), ""),
        wanted => storage::positive(wanted, at.key("storage"), errors),
    }
    for key in ["storageClassName", "volumeAttributesClassName"] {
        if let Some(class) = spec[key].as_str().filter(|class| !class.is_empty()) {
            errors.expect(path.at(key), class, names::dns_subdomain);
        }
    }
    meta::one_of(spec, "volumeMode", &["Block", "Filesystem"], path, errors);
    sources(spec, old, path, errors);
    if let Some(old) = v.old {
        change(v.new, old, errors);
    }
}

fn sources(spec: &Value, old: Option<&Value>, path: Path<'_>, errors: &mut Errors) {
    let group = |object: &Value| object["apiGroup"].as_str().unwrap_or_default().to_owned();
    // Groups that were there before are not looked at again.
    let known =
        old.is_some_and(|old| !group(&old["dataSource"]).is_empty() || !group(&old["dataSourceRef"]).is_empty());
    for key in ["dataSource", "dataSourceRef"] {
        let source = &spec[key];
        if !source.is_object() {
            continue;
        }
        let at = path.at(key);
        for part in ["name", "kind"] {
            if source[part].as_str().unwrap_or_default().is_empty() {
                errors.required(at.at(part), "");
            }
        }
        let group = group(source);
        if group.is_empty() && source["kind"] != "PersistentVolumeClaim" {
            let why = "must be 'PersistentVolumeClaim' when referencing the default apiGroup";
            errors.invalid(at, source["kind"].as_str().unwrap_or_default(), why);
        }
        if !group.is_empty() && !known {
            errors.expect(at.at("apiGroup"), &group, names::dns_subdomain);
        }
        if let Some(namespace) = source["namespace"].as_str().filter(|namespace| !namespace.is_empty()) {
            errors.expect(at.at("namespace"), namespace, names::dns_label);
        }
    }
    let (one, other) = (&spec["dataSource"], &spec["dataSourceRef"]);
    if !one.is_object() || !other.is_object() {
        return;
    }
    if other["namespace"].as_str().is_some_and(|namespace| !namespace.is_empty()) {
        errors.invalid(path, "spec.dataSource", "may not be specified when dataSourceRef.namespace is specified");
    } else if ["apiGroup", "kind", "name"].iter().any(|key| one[*key] != other[*key]) {
        errors.invalid(path, "spec.dataSource", "must match dataSourceRef");
    }
}

/// Bound by the binder, grown by the user; nothing else changes.
fn change(new: &Value, old: &Value, errors: &mut Errors) {
    let path = Path::Root.at("spec");
    let mut was = old.clone();
    name_sources(&mut was);
    let (mut is, mut was) = (new["spec"].clone(), was["spec"].take());
    if was["volumeName"].as_str().unwrap_or_default().is_empty() {
        was["volumeName"] = is["volumeName"].clone();
    }
    let annotated = |object: &Value| object["metadata"]["annotations"][CLASS].as_str().map(str::to_owned);
    let (before, class) = (annotated(old), is["storageClassName"].as_str());
    // The class may be named once, and be the one that the annotation named.
    let named =
        was["storageClassName"].is_null() && class.is_some() && before.as_deref().is_none_or(|b| Some(b) == class);
    if named {
        is["storageClassName"] = Value::Null;
    }
    let moved = named && before.is_some() && annotated(new).is_none();
    if annotated(new) != before && !moved {
        let at = Path::Root.at("metadata");
        let value = annotated(new).unwrap_or_default();
        errors.invalid(at.at("annotations").at(CLASS), value, "field is immutable");
    }
    if new["status"]["phase"] == "Bound" && is["resources"]["requests"].is_object() {
        is["resources"]["requests"]["storage"] = was["resources"]["requests"]["storage"].clone();
    }
    let attributes = "volumeAttributesClassName";
    is[attributes] = was[attributes].clone();
    if !same(&is, &was) {
        errors.forbidden(
            path,
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims",
        );
    }
    let size = |object: &Value| meta::quantity(&object["spec"]["resources"]["requests"]["storage"]);
    let has = meta::quantity(&old["status"]["capacity"]["storage"]).unwrap_or(Quantity::new(0));
    if let (Some(wants), Some(wanted)) = (size(new), size(old))
        && wants < wanted
        && wants <= has
    {
        let at = path.at("resources");
        errors.forbidden(at.at("requests").at("storage"), "field can not be less than status.capacity");
    }
    errors.immutable(Path::Root.at("volumeMode"), &old["spec"]["volumeMode"], &new["spec"]["volumeMode"]);
    if old["spec"][attributes].is_string() {
        match new["spec"][attributes].as_str() {
            None => errors.forbidden(path.at(attributes), "update from non-nil value to nil is forbidden"),
            Some("") => {
                errors.forbidden(path.at(attributes), "update from non-nil value to an empty string is forbidden")
            }
            Some(_) => {}
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
        json!({"metadata": {"annotations": {}}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}}})
    }

    #[test]
    fn what_a_claim_must_be() {
        for (pointer, value, expect) in [
            ("/spec/storageClassName", json!(""), &[][..]),
            ("/spec/accessModes", json!([]), &["spec.accessModes: Required value: at least 1 access mode is required"]),
            (
                "/spec/accessModes",
                json!(["ReadWriteMany", "ReadWriteOncePod"]),
                &["spec.accessModes: Forbidden: may not use ReadWriteOncePod with other access modes"],
            ),
            ("/spec/resources", json!({}), &["spec.resources[storage]: Required value"]),
            (
                "/spec/resources/requests/storage",
                json!("-1"),
                &["spec.resources[storage]: Invalid value: \"-1\": must be greater than zero"],
            ),
            (
                "/spec/volumeMode",
                json!("Tape"),
                &["spec.volumeMode: Unsupported value: \"Tape\": supported values: \"Block\", \"Filesystem\""],
            ),
            (
                "/spec/dataSource",
                json!({"kind": "VolumeSnapshot", "name": "s", "apiGroup": "snapshot.storage.k8s.io"}),
                &[],
            ),
            (
                "/spec/dataSourceRef",
                json!({"kind": "VolumeSnapshot", "name": "s", "namespace": "n"}),
                &[
                    "spec.dataSourceRef: Invalid value: \"VolumeSnapshot\": must be 'PersistentVolumeClaim' when referencing the default apiGroup",
                ],
            ),
        ] {
            check(&row(), with(&good(), pointer, value), expect);
        }
        let two = |name: &str| json!({"kind": "PersistentVolumeClaim", "name": name});
        let differ = with(&with(&good(), "/spec/dataSource", two("a")), "/spec/dataSourceRef", two("b"));
        check(&row(), differ, &["spec: Invalid value: \"spec.dataSource\": must match dataSourceRef"]);
        let mut one = with(&good(), "/spec/dataSource", two("a"));
        (row().defaults)(&mut one);
        assert_eq!(one["spec"]["dataSourceRef"], two("a"));
    }

    #[test]
    fn what_may_change() {
        let fixed = "spec: Forbidden: spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        let bound = with(
            &with(&good(), "/spec/volumeName", "v".into()),
            "/status",
            json!({"phase": "Bound", "capacity": {"storage": "1Gi"}}),
        );
        let sized = |size: &str| with(&bound, "/spec/resources/requests/storage", size.into());
        for (old, new, expect) in [
            (good(), with(&good(), "/spec/volumeName", "v".into()), &[][..]),
            (good(), with(&good(), "/spec/storageClassName", "c".into()), &[]),
            (good(), with(&good(), "/spec/resources/requests/storage", "2048Mi".into()), &[]),
            (good(), with(&good(), "/spec/resources/requests/storage", "3Gi".into()), &[fixed]),
            (bound.clone(), sized("3Gi"), &[]),
            (sized("3Gi"), sized("2Gi"), &[]),
            (
                bound.clone(),
                sized("1Gi"),
                &["spec.resources.requests.storage: Forbidden: field can not be less than status.capacity"],
            ),
            (bound.clone(), with(&bound, "/spec/volumeName", "w".into()), &[fixed]),
            (bound.clone(), with(&bound, "/spec/accessModes", json!(["ReadOnlyMany"])), &[fixed]),
            (bound.clone(), with(&bound, "/spec/volumeAttributesClassName", "fast".into()), &[]),
            (
                with(&bound, "/spec/volumeAttributesClassName", "fast".into()),
                bound.clone(),
                &["spec.volumeAttributesClassName: Forbidden: update from non-nil value to nil is forbidden"],
            ),
            (
                good(),
                with(&good(), "/spec/volumeMode", "Block".into()),
                &[fixed, "volumeMode: Invalid value: \"Block\": field is immutable"],
            ),
        ] {
            check_update(&row(), old, new, expect);
        }
    }
}
