//! PodDisruptionBudget.

use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde_json::Value;

use super::{
    deployment::{at_most_all, count_or_percent},
    meta, with_status,
};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Row, Validation, col, row as base},
};

pub(super) fn row() -> Row {
    Row {
        short_names: &["pdb"],
        columns: const {
            &[
                col("Min Available", "string"),
                col("Max Unavailable", "string"),
                col("Allowed Disruptions", "integer"),
                col("Age", "date"),
            ]
        },
        cells: |o, now| {
            let amount = |v: &Value| match v {
                Value::String(s) => Value::from(s.as_str()),
                Value::Number(n) => Value::from(n.to_string()),
                _ => Value::from("N/A"),
            };
            vec![
                amount(&o["spec"]["minAvailable"]),
                amount(&o["spec"]["maxUnavailable"]),
                cell::int(&o["status"]["disruptionsAllowed"]),
                cell::age(o, now),
            ]
        },
        validate,
        ..with_status(base::<PodDisruptionBudget>())
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return status(&v.new["status"], errors);
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    if !spec["minAvailable"].is_null() && !spec["maxUnavailable"].is_null() {
        errors.invalid(path, spec.clone(), "minAvailable and maxUnavailable cannot be both set");
    }
    for key in ["minAvailable", "maxUnavailable"] {
        count_or_percent(spec, key, path, errors);
        at_most_all(spec, key, path, errors);
    }
    meta::selector_after(&spec["selector"], v.old.map(|old| &old["spec"]["selector"]), path.at("selector"), errors);
    meta::one_of(spec, "unhealthyPodEvictionPolicy", &["AlwaysAllow", "IfHealthyBudget"], path, errors);
}

fn status(status: &Value, errors: &mut Errors) {
    for key in ["disruptionsAllowed", "currentHealthy", "desiredHealthy", "expectedPods"] {
        meta::non_negative(status, key, Path::Root.at("status"), errors);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_status, check_update},
        *,
    };

    #[test]
    fn what_a_budget_must_be() {
        for (spec, expect) in [
            (json!({"minAvailable": "50%", "selector": {"matchLabels": {"a": "b"}}}), &[][..]),
            (
                json!({"minAvailable": 1, "maxUnavailable": 1}),
                &[
                    r#"spec: Invalid value: {"maxUnavailable":1,"minAvailable":1}: minAvailable and maxUnavailable cannot be both set"#,
                ],
            ),
            (
                json!({"maxUnavailable": "101%"}),
                &[r#"spec.maxUnavailable: Invalid value: "101%": must not be greater than 100%"#],
            ),
            (
                json!({"minAvailable": -1}),
                &["spec.minAvailable: Invalid value: -1: must be greater than or equal to 0"],
            ),
            (
                json!({"unhealthyPodEvictionPolicy": "Never"}),
                &[
                    r#"spec.unhealthyPodEvictionPolicy: Unsupported value: "Never": supported values: "AlwaysAllow", "IfHealthyBudget""#,
                ],
            ),
        ] {
            check(&row(), json!({"spec": spec}), expect);
        }
        let status = |n: i64| json!({"status": {"disruptionsAllowed": n}});
        check_status(&row(), status(0), status(1), &[]);
        let why = "status.disruptionsAllowed: Invalid value: -1: must be greater than or equal to 0";
        check_status(&row(), status(0), status(-1), &[why]);
    }

    #[test]
    fn a_wrong_selector_may_stay() {
        let wrong = json!({"spec": {"minAvailable": 1, "selector": {"matchLabels": {"a": "-"}}}});
        let mut changed = wrong.clone();
        changed["spec"]["minAvailable"] = 2.into();
        check_update(&row(), wrong.clone(), changed, &[]);
        let mut errors = Errors::default();
        validate(&Validation { new: &wrong, old: None, subresource: "" }, &mut errors);
        assert_eq!(errors.0.len(), 1, "{errors}");
    }
}
