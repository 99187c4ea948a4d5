//! APIService (<https://kubernetes.io/docs/concepts/extend-kubernetes/api-extension/apiserver-aggregation/>).

use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use serde_json::Value;

use super::{default, items, with_status};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Row, col, row as base},
};

/// The service of an APIService, for people.
fn service(spec: &Value) -> String {
    let service = &spec["service"];
    match (service["namespace"].as_str(), service["name"].as_str()) {
        (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
        _ => "Local".to_owned(),
    }
}

fn priority(spec: &Value, field: &str, most: i64, path: Path<'_>, errors: &mut Errors) {
    let number = spec[field].as_i64().unwrap_or_default();
    if number <= 0 || number > most {
        errors.invalid(path.at(field), number, format!("must be positive and less than {most}"));
    }
}

pub(super) fn row() -> Row {
    Row {
        categories: &["api-extensions"],
        // The core group has none: `v1.`.
        name: |_| Ok(()),
        columns: const { &[col("Service", "string"), col("Available", "string"), col("Age", "date")] },
        cells: |o, now| {
            let available = items(&o["status"], "conditions").find(|c| c["type"] == "Available");
            let text = |key: &str| available.and_then(|c| c[key].as_str()).unwrap_or("Unknown");
            let said = match text("status") {
                "True" => "True".to_owned(),
                status => format!("{status} ({})", text("reason")),
            };
            vec![service(&o["spec"]).into(), said.into(), cell::age(o, now)]
        },
        defaults: |o| {
            if let Some(service) = o.get_mut("spec").and_then(|spec| spec.get_mut("service")) {
                default(service, "port", 443);
            }
        },
        validate: |v, errors| {
            let (spec, path) = (&v.new["spec"], Path::Root.at("spec"));
            let text = |key: &str| spec[key].as_str().unwrap_or_default();
            let name = v.new["metadata"]["name"].as_str().unwrap_or_default();
            let wanted = format!("{}.{}", text("version"), text("group"));
            if name != wanted {
                let why = format!("must be `spec.version+\".\"+spec.group`: {wanted:?}");
                errors.invalid(Path::Root.at("metadata").at("name"), name, why);
            }
            if text("version").is_empty() {
                errors.required(path.at("version"), "");
            }
            priority(spec, "groupPriorityMinimum", 20_000, path, errors);
            priority(spec, "versionPriority", 1_000, path, errors);
            let insecure = spec["insecureSkipTLSVerify"] == true;
            let bundle = spec["caBundle"].as_str().is_some_and(|bundle| !bundle.is_empty());
            let at = path.at("insecureSkipTLSVerify");
            if spec["service"].is_null() {
                if bundle {
                    errors.invalid(path.at("caBundle"), "<bytes>", "local APIServices may not have a caBundle");
                }
                if insecure {
                    errors.invalid(at, true, "local APIServices may not have insecureSkipTLSVerify");
                }
                return;
            }
            if bundle && insecure {
                errors.invalid(at, true, "may not be true if caBundle is present");
            }
            let path = path.at("service");
            for field in ["namespace", "name"] {
                if spec["service"][field].as_str().is_none_or(str::is_empty) {
                    errors.required(path.at(field), "");
                }
            }
            if let Some(port) = spec["service"]["port"].as_i64().filter(|port| !(1..=65_535).contains(port)) {
                errors.invalid(path.at("port"), port, "port is not valid: must be between 1 and 65535, inclusive");
            }
        },
        ..with_status(base::<APIService>())
    }
}
