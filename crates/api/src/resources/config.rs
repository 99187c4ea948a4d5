//! ConfigMap, Secret, ServiceAccount.

use base64::Engine as _;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, ServiceAccount};
use serde_json::{Value, json};

use super::{default, items_mut};
use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Subresource, Validation, col, row as base},
};

/// The largest ConfigMap or Secret, in bytes of data.
const MAX_SIZE: usize = 1024 * 1024;

/// Of these a Secret for basic authentication has one or both.
const BASIC_AUTH: [&str; 2] = ["username", "password"];

pub(super) fn config_map() -> Row {
    Row {
        short_names: &["cm"],
        columns: const { &[col("Data", "integer"), col("Age", "date")] },
        cells: |o, now| {
            let entries = |key: &str| o[key].as_object().map_or(0, |m| m.len());
            vec![(entries("data") + entries("binaryData")).into(), cell::age(o, now)]
        },
        validate: |v, errors| {
            let total = keys(v.new, &["data", "binaryData"], errors);
            if total > MAX_SIZE {
                // Upstream's path has one element without a name, which is how its clients know this error.
                errors.too_long(Path::Root.at("[]"), MAX_SIZE);
            }
            for key in v.new["binaryData"].as_object().into_iter().flatten().map(|(k, _)| k) {
                if v.new["data"].get(key).is_some() {
                    let path = Path::Root.at("data");
                    errors.invalid(path.key(key), key.as_str(), "duplicate of key present in binaryData");
                }
            }
            immutable(v, &["data", "binaryData"], errors);
        },
        ..base::<ConfigMap>()
    }
}

fn keys(object: &Value, fields: &[&str], errors: &mut Errors) -> usize {
    let mut total = 0;
    for field in fields {
        for (key, value) in object[*field].as_object().into_iter().flatten() {
            total += value.as_str().map_or(0, str::len);
            if let Err(detail) = names::config_key(key) {
                let path = Path::Root.at(field);
                errors.invalid(path.key(key), key.as_str(), detail);
            }
        }
    }
    total
}

fn immutable(v: &Validation<'_>, fields: &[&str], errors: &mut Errors) {
    let Some(old) = v.old.filter(|old| old["immutable"] == true) else { return };
    if v.new["immutable"] != true {
        errors.forbidden(Path::Root.at("immutable"), "field is immutable when `immutable` is set");
    }
    for field in fields {
        if old[*field] != v.new[*field] {
            errors.forbidden(Path::Root.at(field), "field is immutable when `immutable` is set");
        }
    }
}

/// Why an entry of a Secret is no JSON. What is no base64 is refused with its type.
fn not_json(entry: &Value) -> Option<String> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(entry.as_str()?).ok()?;
    if bytes.is_empty() {
        return Some("unexpected end of JSON input".into());
    }
    serde_json::from_slice::<Value>(&bytes).err().map(|error| error.to_string())
}

pub(super) fn secret() -> Row {
    Row {
        columns: const { &[col("Type", "string"), col("Data", "integer"), col("Age", "date")] },
        cells: |o, now| vec![cell::plain(&o["type"]), cell::count(&o["data"]), cell::age(o, now)],
        selectable: &["type"],
        defaults: |o| {
            default(o, "type", "Opaque");
            // `stringData` is write-only: it ends up in `data`.
            let Some(Value::Object(strings)) = o.as_object_mut().and_then(|o| o.remove("stringData")) else { return };
            default(o, "data", json!({}));
            for (key, value) in strings {
                let encoded = base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or_default());
                o["data"][key] = encoded.into();
            }
        },
        validate: |v, errors| {
            if keys(v.new, &["data"], errors) > MAX_SIZE * 4 / 3 {
                errors.too_long(Path::Root.at("data"), MAX_SIZE);
            }
            let data = Path::Root.at("data");
            let needs: &[&str] = match v.new["type"].as_str().unwrap_or_default() {
                "kubernetes.io/tls" => &["tls.crt", "tls.key"],
                "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
                "kubernetes.io/dockercfg" => &[".dockercfg"],
                "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
                _ => &[],
            };
            for key in needs.iter().filter(|key| v.new["data"].get(**key).is_none()) {
                errors.required(data.key(key), "");
            }
            if v.new["type"] == "kubernetes.io/basic-auth"
                && BASIC_AUTH.iter().all(|key| v.new["data"].get(*key).is_none())
            {
                BASIC_AUTH.iter().for_each(|key| errors.required(data.key(key), ""));
            }
            for key in needs.iter().filter(|key| key.starts_with(".docker")) {
                if let Some(why) = v.new["data"].get(*key).and_then(not_json) {
                    errors.invalid(data.key(key), "<secret contents redacted>", why);
                }
            }
            if v.new["type"] == "kubernetes.io/service-account-token"
                && v.new["metadata"]["annotations"]["kubernetes.io/service-account.name"]
                    .as_str()
                    .unwrap_or_default()
                    .is_empty()
            {
                let path = Path::Root.at("metadata");
                let path = path.at("annotations");
                errors.required(path.key("kubernetes.io/service-account.name"), "");
            }
            if let Some(old) = v.old {
                errors.immutable(Path::Root.at("type"), &old["type"], &v.new["type"]);
            }
            immutable(v, &["data"], errors);
        },
        ..base::<Secret>()
    }
}

pub(super) fn service_account() -> Row {
    Row {
        short_names: &["sa"],
        subresources: &[Subresource::Token],
        columns: const { &[col("Secrets", "integer"), col("Age", "date")] },
        cells: |o, now| vec![cell::count(&o["secrets"]), cell::age(o, now)],
        prepare_create: names_of_secrets,
        prepare_update: |new, _| names_of_secrets(new),
        ..base::<ServiceAccount>()
    }
}

/// Of the secrets of an account only the names are kept.
fn names_of_secrets(account: &mut Value) {
    for secret in items_mut(account, "secrets") {
        *secret = match secret["name"].as_str() {
            Some(name) => json!({"name": name}),
            None => json!({}),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{check, check_update},
        *,
    };

    #[test]
    fn config_maps() {
        check(&config_map(), json!({"data": {"a.b_c": "x"}, "binaryData": {"d": "AA=="}}), &[]);
        let why = names::config_key("a b").unwrap_err();
        check(&config_map(), json!({"data": {"a b": ""}}), &[&*format!("data[a b]: Invalid value: \"a b\": {why}")]);
        let both = json!({"data": {"a": ""}, "binaryData": {"a": "AA=="}});
        check(&config_map(), both, &["data[a]: Invalid value: \"a\": duplicate of key present in binaryData"]);
        let large = json!({"data": {"a": "x".repeat(MAX_SIZE + 1)}});
        check(&config_map(), large, &["[]: Too long: may not be more than 1048576 bytes"]);
    }

    #[test]
    fn secrets_of_accounts() {
        let mut account = json!({"secrets": [{"name": "a", "namespace": "other", "kind": "Secret"}]});
        (service_account().prepare_create)(&mut account);
        assert_eq!(account, json!({"secrets": [{"name": "a"}]}));
    }

    #[test]
    fn what_is_immutable_stays() {
        let of = |value: &str, immutable: bool| json!({"data": {"a": value}, "immutable": immutable});
        let why = "field is immutable when `immutable` is set";
        for row in [config_map(), secret()] {
            check_update(&row, of("YQ==", false), of("Yg==", true), &[]);
            check_update(&row, of("YQ==", true), of("Yg==", true), &[&*format!("data: Forbidden: {why}")]);
            check_update(&row, of("YQ==", true), of("YQ==", false), &[&*format!("immutable: Forbidden: {why}")]);
        }
        let of = |ty: &str| json!({"type": ty});
        check_update(&secret(), of("a"), of("b"), &["type: Invalid value: \"b\": field is immutable"]);
    }

    #[test]
    fn what_types_of_secrets_need() {
        let of = |ty: &str, data: Value| json!({"type": ty, "data": data});
        for (secret_of, expect) in [
            (of("Opaque", json!({})), &[][..]),
            (of("kubernetes.io/tls", json!({"tls.crt": "", "tls.key": ""})), &[]),
            (of("kubernetes.io/tls", json!({"tls.crt": ""})), &["data[tls.key]: Required value"]),
            (of("kubernetes.io/basic-auth", json!({"password": ""})), &[]),
            (
                of("kubernetes.io/basic-auth", json!({})),
                &["data[username]: Required value", "data[password]: Required value"],
            ),
            (of("kubernetes.io/ssh-auth", json!({})), &["data[ssh-privatekey]: Required value"]),
            (of("kubernetes.io/dockerconfigjson", json!({".dockerconfigjson": "e30="})), &[]),
            (
                of("kubernetes.io/dockerconfigjson", json!({".dockerconfigjson": ""})),
                &[
                    "data[.dockerconfigjson]: Invalid value: \"<secret contents redacted>\": unexpected end of JSON input",
                ],
            ),
            (
                of("kubernetes.io/service-account-token", json!({})),
                &["metadata.annotations[kubernetes.io/service-account.name]: Required value"],
            ),
        ] {
            check(&secret(), secret_of, expect);
        }
    }
}
