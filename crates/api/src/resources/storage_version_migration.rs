//! StorageVersionMigration.

use k8s_openapi::api::storagemigration::v1::StorageVersionMigration;
use serde_json::Value;

use super::{items, meta, with_status};
use crate::{
    field::{Errors, Path},
    row::{Row, Validation, row as base},
};

pub(super) fn row() -> Row {
    Row { validate, ..with_status(base::<StorageVersionMigration>()) }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return status(v, errors);
    }
    let text = |object: &Value, key: &str| object["spec"]["resource"][key].as_str().unwrap_or_default().to_owned();
    if text(v.new, "resource").is_empty() {
        let path = Path::Root.at("spec");
        let path = path.at("resource");
        errors.required(path.at("resource"), "resource is required");
    }
    // Upstream's errors name these fields without what they are in.
    for key in ["group", "resource"] {
        let now = text(v.new, key);
        if v.old.is_some_and(|old| text(old, key) != now) {
            errors.invalid(Path::Root.at(key), now, "field is immutable");
        }
    }
}

fn status(v: &Validation<'_>, errors: &mut Errors) {
    let (status, path) = (&v.new["status"], Path::Root.at("status"));
    let nothing = Value::Null;
    let old = v.old.map_or(&nothing, |old| &old["status"]);
    let version = |status: &Value| status["resourceVersion"].as_str().unwrap_or_default().to_owned();
    let (now, at) = (version(status), path.at("resourceVersion"));
    match now.parse::<i64>() {
        _ if now.is_empty() => {}
        Ok(number) if number < 0 => errors.invalid(at, number, "must be greater than or equal to 0"),
        Ok(_) => {}
        Err(_) => {
            let why =
                format!("failed to parse resource version {now:?}: strconv.ParseInt: parsing {now:?}: invalid syntax");
            errors.invalid(at, now.as_str(), why);
        }
    }
    meta::conditions(status, usize::MAX, path, errors);
    if !version(old).is_empty() && version(old) != now {
        errors.invalid(at, now, "resourceVersion cannot be updated");
    }
    let holds =
        |status: &Value, ty: &str| items(status, "conditions").any(|c| c["type"] == ty && c["status"] == "True");
    let is = |ty: &str| holds(status, ty);
    for (wrong, why) in [
        (is("Succeeded") && is("Failed"), "Both success and failed conditions cannot be true at the same time"),
        (is("Succeeded") && is("Running"), "Running condition cannot be true when success condition is true"),
        (is("Failed") && is("Running"), "Running condition cannot be true when failed condition is true"),
        (holds(old, "Succeeded") && !is("Succeeded"), "Success condition cannot be set to false once it is true"),
        (holds(old, "Failed") && !is("Failed"), "Failed condition cannot be set to false once it is true"),
    ] {
        if wrong {
            errors.invalid(path.at("conditions"), status["conditions"].clone(), why);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_status, check_update},
        *,
    };

    fn of(group: &str, resource: &str) -> Value {
        json!({"spec": {"resource": {"group": group, "resource": resource}}})
    }

    #[test]
    fn migrations() {
        check(&row(), of("", "secrets"), &[]);
        check(&row(), of("", ""), &["spec.resource.resource: Required value: resource is required"]);
        check_update(&row(), of("", "secrets"), of("", "secrets"), &[]);
        check_update(
            &row(),
            of("", "secrets"),
            of("a", "pods"),
            &[
                "group: Invalid value: \"a\": field is immutable",
                "resource: Invalid value: \"pods\": field is immutable",
            ],
        );
    }

    #[test]
    fn the_state_of_migrations() {
        let condition = |ty: &str| json!({"type": ty, "status": "True", "reason": "R", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let of = |version: &str, types: &[&str]| {
            let conditions: Vec<Value> = types.iter().map(|ty| condition(ty)).collect();
            json!({"status": {"resourceVersion": version, "conditions": conditions}})
        };
        check_status(&row(), of("", &[]), of("5", &["Running"]), &[]);
        check_status(&row(), of("5", &["Running"]), of("5", &["Succeeded"]), &[]);
        check_status(
            &row(),
            of("", &[]),
            of("x", &[]),
            &[
                "status.resourceVersion: Invalid value: \"x\": failed to parse resource version \"x\": strconv.ParseInt: parsing \"x\": invalid syntax",
            ],
        );
        check_status(
            &row(),
            of("5", &[]),
            of("6", &[]),
            &["status.resourceVersion: Invalid value: \"6\": resourceVersion cannot be updated"],
        );
        let shown = json!([condition("Running"), condition("Succeeded")]);
        check_status(
            &row(),
            of("", &[]),
            of("", &["Running", "Succeeded"]),
            &[&format!(
                "status.conditions: Invalid value: {shown}: Running condition cannot be true when success condition is true"
            )],
        );
        check_status(
            &row(),
            of("", &["Failed"]),
            of("", &[]),
            &["status.conditions: Invalid value: []: Failed condition cannot be set to false once it is true"],
        );
    }
}
