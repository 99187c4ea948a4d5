//! PriorityClass (<https://kubernetes.io/docs/concepts/scheduling-eviction/pod-priority-preemption/#priorityclass>).

use k8s_openapi::api::scheduling::v1::PriorityClass;
use serde_json::Value;

use super::{default, meta};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Row, Validation, col, row as base},
};

/// The highest value that users may give.
const HIGHEST: i64 = 1_000_000_000;

/// The classes that every cluster has, and their values.
const SYSTEM: [(&str, i64); 2] = [("system-node-critical", 2_000_001_000), ("system-cluster-critical", 2_000_000_000)];

pub(super) fn row() -> Row {
    Row {
        short_names: &["pc"],
        columns: const {
            &[
                col("Value", "integer"),
                col("Global-Default", "boolean"),
                col("Age", "date"),
                col("PreemptionPolicy", "string"),
            ]
        },
        defaults: |o| default(o, "preemptionPolicy", "PreemptLowerPriority"),
        cells: |o, now| {
            vec![
                cell::int(&o["value"]),
                o["globalDefault"].as_bool().unwrap_or(false).into(),
                cell::age(o, now),
                cell::text(&o["preemptionPolicy"]),
            ]
        },
        validate,
        ..base::<PriorityClass>()
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let value = |class: &Value| class["value"].as_i64().unwrap_or_default();
    if let Some(old) = v.old {
        if value(old) != value(v.new) {
            errors.forbidden(Path::Root.at("value"), "may not be changed in an update.");
        }
        let key = "preemptionPolicy";
        errors.immutable(Path::Root.at(key), &old[key], &v.new[key]);
        return;
    }
    let name = v.new["metadata"]["name"].as_str().unwrap_or_default();
    if name.starts_with("system-") {
        if let Err(why) = known_system(name, value(v.new), v.new["globalDefault"] == true) {
            let why =
                format!("priority class names with 'system-' prefix are reserved for system use only. error: {why}");
            errors.forbidden(Path::Root.at("metadata").at("name"), why);
        }
    } else if value(v.new) > HIGHEST {
        let why = format!("maximum allowed value of a user defined priority is {HIGHEST}");
        errors.forbidden(Path::Root.at("value"), why);
    }
    meta::one_of(v.new, "preemptionPolicy", &["PreemptLowerPriority", "Never"], Path::Root, errors);
}

fn known_system(name: &str, value: i64, global: bool) -> Result<(), String> {
    match SYSTEM.iter().find(|(known, _)| *known == name) {
        None => Err(format!("{name} is not a known system priority class")),
        Some((_, known)) if *known != value => Err(format!("value of {name} PriorityClass must be {known}")),
        Some(_) if global => Err(format!("globalDefault of {name} PriorityClass must be false")),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_update},
        *,
    };

    fn class(name: &str, value: i64) -> Value {
        json!({"metadata": {"name": name}, "value": value})
    }

    #[test]
    fn what_a_class_must_be() {
        check(&row(), class("high", HIGHEST), &[]);
        check(&row(), class("system-node-critical", 2_000_001_000), &[]);
        check(
            &row(),
            class("high", HIGHEST + 1),
            &["value: Forbidden: maximum allowed value of a user defined priority is 1000000000"],
        );
        let reserved = "metadata.name: Forbidden: priority class names with 'system-' prefix are reserved for system use only. error: ";
        check(
            &row(),
            class("system-mine", 1),
            &[&*format!("{reserved}system-mine is not a known system priority class")],
        );
        check(
            &row(),
            class("system-node-critical", 1),
            &[&*format!("{reserved}value of system-node-critical PriorityClass must be 2000001000")],
        );
        check(
            &row(),
            json!({"metadata": {"name": "a"}, "preemptionPolicy": "Some"}),
            &["preemptionPolicy: Unsupported value: \"Some\": supported values: \"Never\", \"PreemptLowerPriority\""],
        );
    }

    #[test]
    fn what_may_change() {
        let mut described = class("a", 1);
        described["description"] = "d".into();
        check_update(&row(), class("a", 1), described, &[]);
        check_update(&row(), class("a", 1), class("a", 2), &["value: Forbidden: may not be changed in an update."]);
        let mut never = class("a", 1);
        never["preemptionPolicy"] = "Never".into();
        check_update(&row(), class("a", 1), never, &["preemptionPolicy: Invalid value: \"Never\": field is immutable"]);
    }
}
