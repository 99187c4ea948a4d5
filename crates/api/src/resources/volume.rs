//! Volumes of pods: defaults and validation.
//!
//! <https://kubernetes.io/docs/reference/kubernetes-api/config-and-storage-resources/volume/>

use std::collections::HashMap;

use serde_json::{Value, json};

use super::{default, items, items_mut, meta, reference};
use crate::{
    field::{Errors, Path},
    names,
    quantity::Quantity,
};

/// What the path of a node's own volume may be.
pub(super) const HOST_PATHS: [&str; 8] =
    ["", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"];

/// Fills in what was left out.
pub(super) fn defaults(volume: &mut Value) {
    const MODE: i64 = 0o644;
    let has_source = volume.as_object().is_some_and(|v| v.len() > 1);
    if !has_source {
        default(volume, "emptyDir", json!({}));
    }
    for key in ["configMap", "secret", "downwardAPI", "projected"] {
        if let Some(source) = volume.get_mut(key) {
            default(source, "defaultMode", MODE);
        }
    }
    if let Some(source) = volume.get_mut("hostPath") {
        default(source, "type", "");
    }
    if let Some(api) = volume.get_mut("downwardAPI") {
        for item in items_mut(api, "items") {
            if let Some(field) = item.get_mut("fieldRef") {
                default(field, "apiVersion", "v1");
            }
        }
    }
    if let Some(projected) = volume.get_mut("projected") {
        for source in items_mut(projected, "sources") {
            if let Some(token) = source.get_mut("serviceAccountToken") {
                default(token, "expirationSeconds", 3600);
            }
            if let Some(api) = source.get_mut("downwardAPI") {
                for item in items_mut(api, "items") {
                    if let Some(field) = item.get_mut("fieldRef") {
                        default(field, "apiVersion", "v1");
                    }
                }
            }
        }
    }
    if let Some(source) =
        volume.get_mut("ephemeral").and_then(|e| e.get_mut("volumeClaimTemplate")).and_then(|t| t.get_mut("spec"))
    {
        default(source, "volumeMode", "Filesystem");
    }
}

/// Volumes of a pod by name.
pub(super) type Volumes<'a> = HashMap<&'a str, &'a Value>;

/// What the rarer kinds cannot do without.
const NEEDED: [(&str, &[&str]); 16] = [
    ("gcePersistentDisk", &["pdName"]),
    ("awsElasticBlockStore", &["volumeID"]),
    ("gitRepo", &["repository"]),
    ("nfs", &["server", "path"]),
    ("iscsi", &["targetPortal", "iqn"]),
    ("glusterfs", &["endpoints", "path"]),
    ("rbd", &["image"]),
    ("cinder", &["volumeID"]),
    ("azureFile", &["secretName", "shareName"]),
    ("vsphereVolume", &["volumePath"]),
    ("quobyte", &["registry", "volume"]),
    ("azureDisk", &["diskName", "diskURI"]),
    ("photonPersistentDisk", &["pdID"]),
    ("portworxVolume", &["volumeID"]),
    ("scaleIO", &["gateway", "system", "volumeName"]),
    ("flexVolume", &["driver"]),
];

/// Validates the volumes of a pod.
pub(super) fn validate<'a>(spec: &'a Value, path: Path<'_>, errors: &mut Errors) -> Volumes<'a> {
    let mut seen = HashMap::new();
    for (index, volume) in items(spec, "volumes").enumerate() {
        let at = path.index(index);
        let name = volume["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.required(at.at("name"), "");
        } else if let Err(detail) = names::dns_label(name) {
            errors.invalid(at.at("name"), name, detail);
        } else if seen.insert(name, volume).is_some() {
            errors.duplicate(at.at("name"), name);
        }
        let sources: Vec<(&String, &Value)> =
            volume.as_object().into_iter().flatten().filter(|(key, _)| *key != "name").collect();
        if sources.is_empty() {
            errors.required(at, "must specify a volume type");
        }
        for (index, (kind, source)) in sources.into_iter().enumerate() {
            match index {
                0 => self::source(kind, source, at.at(kind), errors),
                _ => errors.forbidden(at.at(kind), "may not specify more than 1 volume type"),
            }
        }
    }
    seen
}

fn source(kind: &str, source: &Value, path: Path<'_>, errors: &mut Errors) {
    let needs = |key: &str, errors: &mut Errors| {
        if source[key].as_str().unwrap_or_default().is_empty() {
            errors.required(path.at(key), "");
        }
    };
    match kind {
        "emptyDir" => {
            let size = meta::quantity(&source["sizeLimit"]);
            if size.is_some_and(|size: Quantity| size.is_negative()) {
                errors.forbidden(path.at("sizeLimit"), "SizeLimit field must be a valid resource quantity");
            }
        }
        "hostPath" => {
            needs("path", errors);
            if let Some(text) = source["path"].as_str().filter(|p| p.split('/').any(|part| part == "..")) {
                errors.invalid(path.at("path"), text, "must not contain '..'");
            }
            meta::one_of(source, "type", &HOST_PATHS, path, errors);
        }
        "configMap" => {
            needs("name", errors);
            reference::files(source, path, errors);
        }
        "secret" => {
            needs("secretName", errors);
            reference::files(source, path, errors);
        }
        "downwardAPI" => reference::downward(source, path, errors),
        "projected" => projected(source, path, errors),
        "persistentVolumeClaim" => needs("claimName", errors),
        "ephemeral" => {
            if !source["volumeClaimTemplate"].is_object() {
                errors.required(path.at("volumeClaimTemplate"), "");
            }
        }
        "csi" => errors.expect_some(path.at("driver"), &source["driver"], names::dns_subdomain),
        "image" => meta::one_of(source, "pullPolicy", &["Always", "IfNotPresent", "Never"], path, errors),
        _ => {
            let needed = NEEDED.iter().find(|(name, _)| *name == kind).map_or(&[][..], |(_, keys)| keys);
            for key in needed {
                needs(key, errors);
            }
            if kind == "nfs"
                && let Some(text) = source["path"].as_str().filter(|text| !text.is_empty() && !text.starts_with('/'))
            {
                errors.invalid(path.at("path"), text, "must be an absolute path");
            }
        }
    }
}

/// Several sources in one directory.
fn projected(source: &Value, path: Path<'_>, errors: &mut Errors) {
    /// A token that ends sooner would be renewed all the time.
    const LEAST_SECONDS: i64 = 600;
    const MOST_SECONDS: i64 = 1 << 32;
    reference::mode(&source["defaultMode"], path.at("defaultMode"), errors);
    let list = path.at("sources");
    let mut paths: HashMap<&str, ()> = HashMap::new();
    for (index, part) in items(source, "sources").enumerate() {
        let at = list.index(index);
        for (count, (kind, inner)) in part.as_object().into_iter().flatten().enumerate() {
            if count > 0 {
                errors.forbidden(at.at(kind), "may not specify more than 1 volume type");
                continue;
            }
            let at = at.at(kind);
            match kind.as_str() {
                "secret" | "configMap" => {
                    if inner["name"].as_str().unwrap_or_default().is_empty() {
                        errors.required(at.at("name"), "");
                    }
                    reference::files(inner, at, errors);
                }
                "downwardAPI" => reference::downward(inner, at, errors),
                "serviceAccountToken" => {
                    let seconds = inner["expirationSeconds"].as_i64().unwrap_or(LEAST_SECONDS);
                    let at_seconds = at.at("expirationSeconds");
                    if seconds < LEAST_SECONDS {
                        errors.invalid(at_seconds, seconds, "may not specify a duration less than 10 minutes");
                    } else if seconds > MOST_SECONDS {
                        errors.invalid(at_seconds, seconds, "may not specify a duration larger than 2^32 seconds");
                    }
                    reference::file_path(&inner["path"], at.at("path"), errors);
                }
                "clusterTrustBundle" => {
                    let (name, signer) = (inner["name"].is_string(), inner["signerName"].is_string());
                    match (name, signer) {
                        (true, true) => errors.invalid(at, "", "only one of name and signerName may be used"),
                        (false, false) => errors.required(at, "either name or signerName must be specified"),
                        _ => {}
                    }
                    reference::file_path(&inner["path"], at.at("path"), errors);
                }
                _ => {}
            }
            let own = inner["path"].as_str().into_iter();
            for file in own.chain(items(inner, "items").filter_map(|item| item["path"].as_str())) {
                if !file.is_empty() && paths.insert(file, ()).is_some() {
                    errors.invalid(path, file, "conflicting duplicate paths");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mut volume: Value, expect: &[&str]) {
        volume["name"] = "v".into();
        defaults(&mut volume);
        let mut errors = Errors::default();
        validate(&json!({"volumes": [volume]}), Path::Root.at("volumes"), &mut errors);
        let found: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
        assert_eq!(found, expect, "{volume:#}");
    }

    #[test]
    fn files_of_volumes() {
        check(json!({"configMap": {"name": "a", "items": [{"key": "k", "path": "a/b", "mode": 0o400}]}}), &[]);
        check(
            json!({"secret": {"secretName": "a", "defaultMode": 512, "items": [{"key": "", "path": "/b"}, {"key": "k", "path": "..b"}]}}),
            &[
                "volumes[0].secret.defaultMode: Invalid value: 512: must be a number between 0 and 0777 (octal), both inclusive",
                "volumes[0].secret.items[0].key: Required value",
                "volumes[0].secret.items[0].path: Invalid value: \"/b\": must be a relative path",
                "volumes[0].secret.items[1].path: Invalid value: \"..b\": must not start with '..'",
            ],
        );
        check(json!({"downwardAPI": {"items": [{"path": "l", "fieldRef": {"fieldPath": "metadata.labels"}}]}}), &[]);
        check(
            json!({"downwardAPI": {"items": [{"path": "l"}, {"path": "m", "resourceFieldRef": {"resource": "limits.cpu"}}]}}),
            &[
                "volumes[0].downwardAPI.items[0]: Required value: one of fieldRef and resourceFieldRef is required",
                "volumes[0].downwardAPI.items[1].resourceFieldRef.containerName: Required value",
            ],
        );
    }

    #[test]
    fn sources() {
        check(json!({"emptyDir": {}}), &[]);
        check(
            json!({"configMap": {"name": "a"}, "emptyDir": {}}),
            &["volumes[0].emptyDir: Forbidden: may not specify more than 1 volume type"],
        );
        check(
            json!({"nfs": {"path": "a"}}),
            &[
                "volumes[0].nfs.server: Required value",
                "volumes[0].nfs.path: Invalid value: \"a\": must be an absolute path",
            ],
        );
        check(json!({"iscsi": {"iqn": "q", "lun": 0}}), &["volumes[0].iscsi.targetPortal: Required value"]);
        check(json!({"ephemeral": {}}), &["volumes[0].ephemeral.volumeClaimTemplate: Required value"]);
        let token = |seconds: i64| json!({"serviceAccountToken": {"path": "t", "expirationSeconds": seconds}});
        check(json!({"projected": {"sources": [token(600)]}}), &[]);
        check(
            json!({"projected": {"sources": [token(599), {"secret": {"name": "s", "items": [{"key": "k", "path": "t"}]}}]}}),
            &[
                "volumes[0].projected.sources[0].serviceAccountToken.expirationSeconds: Invalid value: 599: may not specify a duration less than 10 minutes",
                "volumes[0].projected: Invalid value: \"t\": conflicting duplicate paths",
            ],
        );
    }
}
