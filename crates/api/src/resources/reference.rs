//! What a pod takes from elsewhere: its own fields, amounts of its containers, keys of ConfigMaps and Secrets; into its
//! environment and into files.
//!
//! <https://kubernetes.io/docs/concepts/workloads/pods/downward-api/>

use serde_json::Value;

use super::items;
use crate::{
    field::{Errors, Path},
    names,
};

/// Fields of a pod that the API can name at all.
const FIELDS: [&str; 16] = [
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.serviceAccountName",
    "spec.schedulerName",
    "spec.hostNetwork",
    "status.phase",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
    "status.nominatedNodeName",
];
/// Those that may be in a variable.
pub(super) const OF_VARIABLES: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
/// Those that may be in a file.
pub(super) const OF_FILES: [&str; 5] =
    ["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
const AMOUNTS: [&str; 6] = [
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];
/// A file's mode has so many bits.
const MOST_MODE: i64 = 0o777;

/// Validates a reference to a field of the pod.
pub(super) fn field(reference: &Value, known: &[&str], path: Path<'_>, errors: &mut Errors) {
    if reference["apiVersion"].as_str().unwrap_or_default().is_empty() {
        return errors.required(path.at("apiVersion"), "");
    }
    let text = reference["fieldPath"].as_str().unwrap_or_default();
    let at = path.at("fieldPath");
    if text.is_empty() {
        return errors.required(at, "");
    }
    if let Some((field, key)) = text.strip_suffix("']").and_then(|text| text.split_once("['")) {
        match field {
            "metadata.annotations" => errors.expect(at, &key.to_lowercase(), names::qualified_name),
            "metadata.labels" => errors.expect(at, key, names::qualified_name),
            _ => errors.invalid(at, text, "does not support subscript"),
        }
    } else if !FIELDS.contains(&text) {
        errors.invalid(at, text, format!("error converting fieldPath: field label not supported: {text}"));
    } else if !known.contains(&text) {
        errors.not_supported(at, text, known);
    }
}

/// Validates a reference to an amount of a container. In a volume it has to say of which.
pub(super) fn amount(reference: &Value, in_volume: bool, path: Path<'_>, errors: &mut Errors) {
    let name = reference["resource"].as_str().unwrap_or_default();
    let huge = name.starts_with("limits.hugepages-") || name.starts_with("requests.hugepages-");
    if in_volume && reference["containerName"].as_str().unwrap_or_default().is_empty() {
        errors.required(path.at("containerName"), "");
    } else if name.is_empty() {
        errors.required(path.at("resource"), "");
    } else if !AMOUNTS.contains(&name) && !huge {
        errors.not_supported(path.at("resource"), name, &AMOUNTS);
    }
    let zero = super::meta::quantity(&reference["divisor"]).is_none_or(|divisor| divisor.milli_value() == 0);
    let Some(divisor) = reference["divisor"].as_str().filter(|_| !zero) else { return };
    const OF_BYTES: [&str; 13] = ["1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"];
    let of_bytes = |what: &str| {
        let list = OF_BYTES.join(", ");
        (!OF_BYTES.contains(&divisor))
            .then(|| format!("only divisor's values {list} are supported with the {what} resource"))
    };
    let wrong = match name.split_once('.').map_or("", |(_, name)| name) {
        "cpu" => (!["1", "1m"].contains(&divisor))
            .then(|| "only divisor's values 1m and 1 are supported with the cpu resource".to_owned()),
        "memory" => of_bytes("memory"),
        "ephemeral-storage" => of_bytes("local ephemeral storage"),
        _ if huge => of_bytes("hugepages"),
        _ => None,
    };
    if let Some(detail) = wrong {
        errors.invalid(path.at("divisor"), name, detail);
    }
}

/// Validates a reference to a key of a ConfigMap or a Secret.
pub(super) fn key(reference: &Value, path: Path<'_>, errors: &mut Errors) {
    errors.expect(path.at("name"), reference["name"].as_str().unwrap_or_default(), names::dns_subdomain);
    errors.expect_some(path.at("key"), &reference["key"], names::config_key);
}

/// Validates which keys become which files.
pub(super) fn files(source: &Value, path: Path<'_>, errors: &mut Errors) {
    mode(&source["defaultMode"], path.at("defaultMode"), errors);
    let list = path.at("items");
    for (index, item) in items(source, "items").enumerate() {
        let at = list.index(index);
        if item["key"].as_str().unwrap_or_default().is_empty() {
            errors.required(at.at("key"), "");
        }
        file(item, at, errors);
    }
}

/// Validates files of the downward API.
pub(super) fn downward(source: &Value, path: Path<'_>, errors: &mut Errors) {
    mode(&source["defaultMode"], path.at("defaultMode"), errors);
    let list = path.at("items");
    for (index, item) in items(source, "items").enumerate() {
        let at = list.index(index);
        file(item, at, errors);
        match (item["fieldRef"].is_object(), item["resourceFieldRef"].is_object()) {
            (true, true) => {
                let detail = "fieldRef and resourceFieldRef can not be specified simultaneously";
                errors.invalid(at, "resource", detail);
            }
            (true, false) => field(&item["fieldRef"], &OF_FILES, at.at("fieldRef"), errors),
            (false, true) => amount(&item["resourceFieldRef"], true, at.at("resourceFieldRef"), errors),
            (false, false) => errors.required(at, "one of fieldRef and resourceFieldRef is required"),
        }
    }
}

fn file(item: &Value, path: Path<'_>, errors: &mut Errors) {
    file_path(&item["path"], path.at("path"), errors);
    mode(&item["mode"], path.at("mode"), errors);
}

/// Validates the path of a file in a volume.
pub(super) fn file_path(value: &Value, path: Path<'_>, errors: &mut Errors) {
    match value.as_str().unwrap_or_default() {
        "" => errors.required(path, ""),
        text => {
            descending_path(text, path, errors);
            // Names that begin so belong to whoever writes the volume.
            if text.starts_with("..") && !text.split('/').any(|part| part == "..") {
                errors.invalid(path, text, "must not start with '..'");
            }
        }
    }
}

/// Validates a path that leads down from somewhere.
pub(super) fn descending_path(text: &str, path: Path<'_>, errors: &mut Errors) {
    if text.starts_with('/') {
        errors.invalid(path, text, "must be a relative path");
    }
    if text.split('/').any(|part| part == "..") {
        errors.invalid(path, text, "must not contain '..'");
    }
}

/// Validates the mode of files.
pub(super) fn mode(value: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(bits) = value.as_i64().filter(|bits| !(0..=MOST_MODE).contains(bits)) {
        errors.invalid(path, bits, "must be a number between 0 and 0777 (octal), both inclusive");
    }
}
