//! CustomResourceDefinition
//! (<https://kubernetes.io/docs/reference/kubernetes-api/extend-resources/custom-resource-definition-v1/>).

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use super::{default, drop_status, items, with_status};
use crate::{
    custom::{
        condition,
        jsonpath::JsonPath,
        names::{APPROVED, is_protected, storage_version},
        structural,
    },
    field::{Errors, Path},
    names::{dns_1035_label, dns_subdomain},
    row::{Row, Validation, col, row as base},
};

pub(super) fn row() -> Row {
    Row {
        short_names: &["crd", "crds"],
        categories: &["api-extensions"],
        defaults,
        validate,
        prepare_create: |object| {
            drop_status(object);
            let storage = storage_version(object).to_owned();
            object["status"] = json!({"conditions": [], "acceptedNames": {"plural": "", "kind": ""},
                "storedVersions": [storage]});
        },
        prepare_update: |new, _| {
            let storage = storage_version(new).to_owned();
            if !items(&new["status"], "storedVersions").any(|v| *v == storage) {
                match new["status"]["storedVersions"].as_array_mut() {
                    Some(stored) => stored.push(storage.into()),
                    None => new["status"]["storedVersions"] = json!([storage]),
                }
            }
        },
        columns: const { &[col("Created At", "date")] },
        // Upstream shows the time itself.
        cells: |object, _| vec![object["metadata"]["creationTimestamp"].clone()],
        ..with_status(base::<CustomResourceDefinition>())
    }
}

fn defaults(object: &mut Value) {
    if let Some(names) = object.pointer_mut("/spec/names")
        && let Some(kind) = names["kind"].as_str().filter(|k| !k.is_empty()).map(str::to_owned)
    {
        for (key, value) in [("singular", kind.to_lowercase()), ("listKind", format!("{kind}List"))] {
            if names[key].as_str().unwrap_or_default().is_empty() {
                names[key] = value.into();
            }
        }
    }
    if let Some(spec) = object.get_mut("spec") {
        default(spec, "conversion", json!({"strategy": "None"}));
    }
    if let Some(service) = object.pointer_mut("/spec/conversion/webhook/clientConfig/service") {
        default(service, "port", 443);
    }
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_default()
}

fn validate(validation: &Validation<'_>, errors: &mut Errors) {
    let (new, old) = (validation.new, validation.old);
    let spec = &new["spec"];
    let path = Path::Root.at("spec");
    let wanted = format!("{}.{}", text(&spec["names"], "plural"), text(spec, "group"));
    if text(&new["metadata"], "name") != wanted {
        let meta = Path::Root.at("metadata");
        errors.invalid(meta.at("name"), text(&new["metadata"], "name"), "must be spec.names.plural+\".\"+spec.group");
    }
    stored_versions(new, errors);
    if validation.subresource == "status" || old.is_some_and(|old| old["spec"] == *spec) {
        return;
    }
    group(new, old, path, errors);
    match text(spec, "scope") {
        "" => errors.required(path.at("scope"), ""),
        "Cluster" | "Namespaced" => {}
        other => errors.not_supported(path.at("scope"), other, &["Cluster", "Namespaced"]),
    }
    names(&spec["names"], path.at("names"), errors);
    conversion(&spec["conversion"], path.at("conversion"), errors);
    if spec["preserveUnknownFields"] == true {
        let why =
            "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead";
        errors.invalid(path.at("preserveUnknownFields"), true, why);
    }
    versions(spec, old.map(|old| &old["spec"]), path, errors);
    if let Some(old) = old {
        let (old_spec, old_names, new_names) = (&old["spec"], &old["spec"]["names"], &spec["names"]);
        let names = path.at("names");
        errors.immutable(path.at("group"), &old_spec["group"], &spec["group"]);
        errors.immutable(names.at("plural"), &old_names["plural"], &new_names["plural"]);
        if condition(old, "Established") {
            errors.immutable(path.at("scope"), &old_spec["scope"], &spec["scope"]);
            errors.immutable(names.at("kind"), &old_names["kind"], &new_names["kind"]);
        }
    }
}

fn stored_versions(new: &Value, errors: &mut Errors) {
    let status = Path::Root.at("status");
    let path = status.at("storedVersions");
    let stored: Vec<&str> = items(&new["status"], "storedVersions").filter_map(Value::as_str).collect();
    if stored.is_empty() {
        errors.invalid(path, json!([]), "must have at least one stored version");
    }
    for (index, version) in stored.iter().enumerate() {
        if !items(&new["spec"], "versions").any(|v| text(v, "name") == *version) {
            errors.invalid(path.index(index), *version, "missing from spec.versions; it must remain in spec.versions until all objects are migrated to a storage version in spec.versions and v is removed from status.storedVersions".replace("and v is", &format!("and {version} is")));
        }
    }
    let storage = storage_version(new);
    if !stored.is_empty() && !storage.is_empty() && !stored.contains(&storage) {
        errors.invalid(path, json!(stored), format!("must have the storage version {storage}"));
    }
}

fn group(new: &Value, old: Option<&Value>, path: Path<'_>, errors: &mut Errors) {
    let group = text(&new["spec"], "group");
    match group {
        "" => errors.required(path.at("group"), ""),
        group => match dns_subdomain(group) {
            Err(why) => errors.invalid(path.at("group"), group, why),
            Ok(()) if !group.contains('.') => {
                errors.invalid(path.at("group"), group, "should be a domain with at least one dot");
            }
            Ok(()) => {}
        },
    }
    if old.is_none() && is_protected(group) {
        let meta = Path::Root.at("metadata");
        let annotations = meta.at("annotations");
        let value = text(&new["metadata"]["annotations"], APPROVED);
        let see = "see https://github.com/kubernetes/enhancements/pull/1111";
        if value.is_empty() {
            let why = format!("protected groups must have approval annotation {APPROVED:?}, {see}");
            errors.required(annotations.key(APPROVED), &why);
        } else if !["http://", "https://", "unapproved"].iter().any(|start| value.starts_with(start)) {
            let why = format!(
                "protected groups must have approval annotation {APPROVED:?} with either a URL or a reason starting with \"unapproved\", {see}"
            );
            errors.invalid(annotations.key(APPROVED), value, why);
        }
    }
}

fn names(names: &Value, path: Path<'_>, errors: &mut Errors) {
    for key in ["plural", "singular", "kind", "listKind"] {
        let name = text(names, key);
        let cased = matches!(key, "kind" | "listKind");
        match (name, dns_1035_label(&if cased { name.to_lowercase() } else { name.to_owned() })) {
            ("", _) => errors.required(path.at(key), ""),
            (_, Err(why)) if cased => {
                errors.invalid(path.at(key), name, format!("may have mixed case, but should otherwise match: {why}"))
            }
            (_, Err(why)) => errors.invalid(path.at(key), name, why),
            _ => {}
        }
    }
    if !text(names, "kind").is_empty() && names["kind"] == names["listKind"] {
        errors.invalid(path.at("listKind"), text(names, "listKind"), "kind and listKind may not be the same");
    }
    for key in ["shortNames", "categories"] {
        let list = path.at(key);
        for (index, name) in items(names, key).enumerate() {
            if let Err(why) = dns_1035_label(name.as_str().unwrap_or_default()) {
                errors.invalid(list.index(index), name.clone(), why);
            }
        }
    }
}

fn conversion(conversion: &Value, path: Path<'_>, errors: &mut Errors) {
    match text(conversion, "strategy") {
        "" => errors.required(path.at("strategy"), ""),
        "None" if conversion["webhook"].is_object() => {
            errors.forbidden(path.at("webhook"), "should not be set when strategy is not set to Webhook");
        }
        "None" => {}
        "Webhook" => {
            let path = path.at("webhook");
            let webhook = &conversion["webhook"];
            let config = path.at("clientConfig");
            let (url, service) = (&webhook["clientConfig"]["url"], &webhook["clientConfig"]["service"]);
            match (url.as_str(), service.is_object()) {
                (None, false) | (Some(_), true) => {
                    errors.required(config, "exactly one of url or service is required");
                }
                (Some(url), false) => match url.strip_prefix("https://") {
                    None => errors.invalid(config.at("url"), url, "'https' is the only allowed URL scheme"),
                    Some(rest) if rest.is_empty() || rest.starts_with('/') => {
                        errors.invalid(config.at("url"), url, "host must be specified");
                    }
                    Some(rest) if rest.contains(['?', '#', '@']) => {
                        let why = "user information, query parameters and fragments are not permitted in the URL";
                        errors.invalid(config.at("url"), url, why);
                    }
                    Some(_) => {}
                },
                (None, true) => {
                    let at = config.at("service");
                    for key in ["name", "namespace"] {
                        if text(service, key).is_empty() {
                            errors.required(at.at(key), &format!("service {key} is required"));
                        }
                    }
                }
            }
            let versions = path.at("conversionReviewVersions");
            let accepted: Vec<&str> = items(webhook, "conversionReviewVersions").filter_map(Value::as_str).collect();
            if accepted.is_empty() {
                errors.required(versions, "");
            } else if !accepted.contains(&"v1") {
                errors.invalid(versions, json!(accepted), "must include at least one of v1");
            }
        }
        other => errors.not_supported(path.at("strategy"), other, &["None", "Webhook"]),
    }
}

fn versions(spec: &Value, old: Option<&Value>, path: Path<'_>, errors: &mut Errors) {
    let path = path.at("versions");
    let all: Vec<&Value> = items(spec, "versions").collect();
    let names: Vec<&str> = all.iter().map(|v| text(v, "name")).collect();
    if (1..names.len()).any(|at| names[..at].contains(&names[at])) {
        errors.invalid(path, json!(names), "must contain unique version names");
    }
    if all.iter().filter(|v| v["storage"] == true).count() != 1 {
        errors.invalid(path, json!(names), "must have exactly one version marked as storage version");
    }
    for (index, version) in all.iter().enumerate() {
        let path = path.index(index);
        if let Err(why) = dns_1035_label(text(version, "name")) {
            errors.invalid(path.at("name"), text(version, "name"), why);
        }
        if version["deprecationWarning"].is_string() && version["deprecated"] != true {
            let why = "can only be set for deprecated versions";
            errors.invalid(path.at("deprecationWarning"), text(version, "deprecationWarning"), why);
        }
        let schema = path.at("schema");
        match &version["schema"]["openAPIV3Schema"] {
            Value::Null => errors.required(schema.at("openAPIV3Schema"), "schemas are required"),
            found => {
                let before = old.and_then(|old| items(old, "versions").find(|v| v["name"] == version["name"]));
                let stored = before.is_some_and(|before| before["schema"]["openAPIV3Schema"] == *found);
                structural::check(found, stored, schema.at("openAPIV3Schema"), errors);
            }
        }
        subresources(&version["subresources"], path.at("subresources"), errors);
        columns(version, path, errors);
        selectable(version, path, errors);
    }
}

fn json_path(value: &str, under: &[&str], path: Path<'_>, errors: &mut Errors) {
    if value.is_empty() {
        return errors.required(path, "");
    }
    match JsonPath::parse(value).ok().as_ref().and_then(JsonPath::fields) {
        None => errors.invalid(path, value, "must be a simple json path without array notation"),
        Some(fields) if fields.len() < 2 || !under.contains(&fields[0]) => {
            let list: Vec<String> = under.iter().map(|u| format!(".{u}")).collect();
            errors.invalid(path, value, format!("should be a json path under {}", list.join(" or ")));
        }
        Some(_) => {}
    }
}

fn subresources(subresources: &Value, path: Path<'_>, errors: &mut Errors) {
    let scale = &subresources["scale"];
    if scale.is_object() {
        let path = path.at("scale");
        json_path(text(scale, "specReplicasPath"), &["spec"], path.at("specReplicasPath"), errors);
        json_path(text(scale, "statusReplicasPath"), &["status"], path.at("statusReplicasPath"), errors);
        if let Some(selector) = scale["labelSelectorPath"].as_str().filter(|s| !s.is_empty()) {
            json_path(selector, &["spec", "status"], path.at("labelSelectorPath"), errors);
        }
    }
}

fn columns(version: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.at("additionalPrinterColumns");
    for (index, column) in items(version, "additionalPrinterColumns").enumerate() {
        let path = list.index(index);
        const TYPES: [&str; 5] = ["boolean", "date", "integer", "number", "string"];
        const FORMATS: [&str; 7] = ["byte", "date", "date-time", "double", "float", "int32", "int64"];
        if text(column, "name").is_empty() {
            errors.required(path.at("name"), "");
        }
        match text(column, "type") {
            "" => errors.required(path.at("type"), &format!("must be one of {}", TYPES.join(","))),
            ty if !TYPES.contains(&ty) => {
                errors.invalid(path.at("type"), ty, format!("must be one of {}", TYPES.join(",")));
            }
            _ => {}
        }
        let format = text(column, "format");
        if !format.is_empty() && format != "password" && !FORMATS.contains(&format) {
            errors.invalid(path.at("format"), format, format!("must be one of {}", FORMATS.join(",")));
        }
        match text(column, "jsonPath") {
            "" => errors.required(path.at("jsonPath"), ""),
            found => {
                if let Err(why) = JsonPath::parse(found) {
                    errors.invalid(path.at("jsonPath"), found, why);
                }
            }
        }
    }
}

/// At most this many fields of a version can be selected by (KEP-4358).
const SELECTABLE: usize = 8;

fn selectable(version: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.at("selectableFields");
    let all: Vec<&str> = items(version, "selectableFields").map(|f| text(f, "jsonPath")).collect();
    if all.len() > SELECTABLE {
        errors.too_many(list, all.len() as u64, SELECTABLE as u64);
    }
    for (index, found) in all.iter().enumerate() {
        let path = list.index(index);
        let at = path.at("jsonPath");
        let fields = match JsonPath::parse(found).ok().as_ref().and_then(JsonPath::fields) {
            _ if found.is_empty() => {
                errors.required(at, "");
                continue;
            }
            None => {
                errors.invalid(at, *found, "must be a simple path of fields");
                continue;
            }
            Some(fields) => fields.into_iter().map(str::to_owned).collect::<Vec<_>>(),
        };
        if fields.first().is_some_and(|first| first == "metadata") {
            errors.invalid(at, *found, "must not point to fields in metadata");
            continue;
        }
        if all[..index].contains(found) {
            errors.duplicate(at, *found);
        }
        let mut schema = &version["schema"]["openAPIV3Schema"];
        for field in &fields {
            schema = &schema["properties"][field];
        }
        match text(schema, "type") {
            "string" | "boolean" | "integer" => {}
            "" if schema.is_null() => {
                errors.invalid(at, *found, format!("does not refer to a valid field: invalid path {found:?}"))
            }
            _ => errors.invalid(at, *found, "must point to a field of type string, boolean or integer"),
        }
    }
}
