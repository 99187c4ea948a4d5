//! ResourceQuota and LimitRange (<https://kubernetes.io/docs/concepts/policy/resource-quotas/>,
//! <https://kubernetes.io/docs/concepts/policy/limit-range/>).

use k8s_openapi::api::core::v1::{LimitRange, ResourceQuota};
use serde_json::Value;

use super::{items, items_mut, with_status};
use crate::{
    field::{Errors, Path},
    limit_range::complete,
    quantity::Quantity,
    quota::amounts,
    row::{Row, Validation, col, row as base},
};

const SCOPES: [&str; 7] = [
    "BestEffort",
    "CrossNamespacePodAffinity",
    "NotBestEffort",
    "NotTerminating",
    "PriorityClass",
    "Terminating",
    "VolumeAttributesClass",
];

pub(super) fn limit_range() -> Row {
    Row {
        short_names: &["limits"],
        columns: const { &[col("Created At", "date")] },
        cells: |o, _| vec![o["metadata"]["creationTimestamp"].clone()],
        defaults: |o| {
            if let Some(spec) = o.get_mut("spec") {
                items_mut(spec, "limits").for_each(complete);
            }
        },
        validate: validate_range,
        ..base::<LimitRange>()
    }
}

pub(super) fn resource_quota() -> Row {
    Row {
        short_names: &["quota"],
        columns: const { &[col("Request", "string"), col("Limit", "string"), col("Age", "date")] },
        cells: |o, now| {
            // What limits have is shown apart from the rest.
            let side = |limits: bool| -> String {
                let hard = o["status"]["hard"].as_object().into_iter().flatten();
                let shown = hard.filter(|(name, _)| name.starts_with("limits.") == limits).map(|(name, hard)| {
                    let used = o["status"]["used"][name].as_str().unwrap_or("0");
                    format!("{name}: {used}/{}", hard.as_str().unwrap_or_default())
                });
                shown.collect::<Vec<_>>().join(", ")
            };
            vec![side(false).into(), side(true).into(), crate::cell::age(o, now)]
        },
        validate: validate_quota,
        ..with_status(base::<ResourceQuota>())
    }
}

fn quantities(value: &Value, key: &str, path: Path<'_>, errors: &mut Errors) {
    let path = path.at(key);
    for (name, amount) in value[key].as_object().into_iter().flatten() {
        let text = amount.as_str().map_or_else(|| amount.to_string(), str::to_owned);
        match text.parse::<Quantity>() {
            Err(error) => errors.invalid(path.key(name), amount.clone(), error),
            Ok(parsed) if parsed.is_negative() => {
                errors.invalid(path.key(name), amount.clone(), "must be greater than or equal to 0");
            }
            Ok(_) => {}
        }
    }
}

fn validate_range(v: &Validation<'_>, errors: &mut Errors) {
    let (root, spec) = (Path::Root, &v.new["spec"]);
    let spec_path = root.at("spec");
    let path = spec_path.at("limits");
    let mut known: Vec<&str> = Vec::new();
    for (index, item) in items(spec, "limits").enumerate() {
        let path = path.index(index);
        let ty = item["type"].as_str().unwrap_or_default();
        if ty.is_empty() {
            errors.required(path.at("type"), "");
        }
        if known.contains(&ty) {
            errors.duplicate(path.at("type"), ty);
        }
        known.push(ty);
        for key in ["max", "min", "default", "defaultRequest", "maxLimitRequestRatio"] {
            quantities(item, key, path, errors);
        }
        if ty == "Pod" {
            for key in ["default", "defaultRequest"] {
                if item[key].as_object().is_some_and(|map| !map.is_empty()) {
                    errors.forbidden(path.at(key), "may not be specified when `type` is 'Pod'");
                }
            }
        }
        let of = |key: &str| amounts(&item[key]);
        let (max, min, default, request) = (of("max"), of("min"), of("default"), of("defaultRequest"));
        for (name, least) in &min {
            if let Some(most) = max.get(name).filter(|most| *most < least) {
                let at = path.at("min");
                errors.invalid(
                    at.key(name),
                    least.to_string(),
                    format!("min value {least} is greater than max value {most}"),
                );
            }
            for (key, given) in [("default", &default), ("defaultRequest", &request)] {
                if let Some(given) = given.get(name).filter(|given| *given < least) {
                    let (at, what) = (path.at(key), if key == "default" { "default" } else { "default request" });
                    let why = format!("min value {least} is greater than {what} value {given}");
                    errors.invalid(at.key(name), given.to_string(), why);
                }
            }
        }
        for (name, most) in &max {
            for (key, given) in [("default", &default), ("defaultRequest", &request)] {
                if let Some(given) = given.get(name).filter(|given| *given > most) {
                    let (at, what) = (path.at(key), if key == "default" { "default" } else { "default request" });
                    let why = format!("{what} value {given} is greater than max value {most}");
                    errors.invalid(at.key(name), given.to_string(), why);
                }
            }
        }
        for (name, request) in &request {
            if let Some(limit) = default.get(name).filter(|limit| *limit < request) {
                let at = path.at("defaultRequest");
                let why = format!("default request value {request} is greater than default limit value {limit}");
                errors.invalid(at.key(name), request.to_string(), why);
            }
        }
    }
}

fn validate_quota(v: &Validation<'_>, errors: &mut Errors) {
    let (root, spec) = (Path::Root, &v.new["spec"]);
    let path = root.at("spec");
    quantities(spec, "hard", path, errors);
    let at = path.at("scopes");
    for (index, scope) in items(spec, "scopes").filter_map(Value::as_str).enumerate() {
        if !SCOPES.contains(&scope) {
            errors.invalid(at.index(index), scope, "unsupported scope");
        }
    }
    let selector = path.at("scopeSelector");
    let at = selector.at("matchExpressions");
    for (index, expression) in items(&spec["scopeSelector"], "matchExpressions").enumerate() {
        let path = at.index(index);
        let scope = expression["scopeName"].as_str().unwrap_or_default();
        let operator = expression["operator"].as_str().unwrap_or_default();
        let values = items(expression, "values").count();
        if !SCOPES.contains(&scope) {
            errors.invalid(path.at("scopeName"), scope, "unsupported scope");
        }
        match operator {
            "In" | "NotIn" if values == 0 => {
                errors.required(
                    path.at("values"),
                    "must be at least one value when `operator` is 'In' or 'NotIn' for scope selector",
                );
            }
            "Exists" | "DoesNotExist" if values > 0 => {
                errors.invalid(
                    path.at("values"),
                    values,
                    "must be no value when `operator` is 'Exists' or 'DoesNotExist' for scope selector",
                );
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.invalid(path.at("operator"), other, "not a valid selector operator"),
        }
        if scope != "PriorityClass" && scope != "VolumeAttributesClass" && operator != "Exists" {
            errors.invalid(path.at("operator"), operator, "must be 'Exist' when scope is any of ResourceQuotaScopeTerminating, ResourceQuotaScopeNotTerminating, ResourceQuotaScopeBestEffort, ResourceQuotaScopeNotBestEffort or ResourceQuotaScopeCrossNamespacePodAffinity");
        }
    }
    if let Some(old) = v.old {
        let scopes = |object: &Value| object["spec"]["scopes"].as_array().cloned().unwrap_or_default();
        if scopes(old) != scopes(v.new) {
            errors.invalid(path.at("scopes"), Value::from(scopes(v.new)), "field is immutable");
        }
    }
}
