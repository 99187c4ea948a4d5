//! PodDisruptionBudget.

use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde_json::Value;

use super::{deployment::count_or_percent, meta, with_status};
use crate::{
    cell,
    field::Path,
    row::{Row, col, row as base},
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
        validate: |v, errors| {
            let spec = &v.new["spec"];
            let path = Path::Root.at("spec");
            if !spec["minAvailable"].is_null() && !spec["maxUnavailable"].is_null() {
                errors.invalid(path, "", "minAvailable and maxUnavailable cannot be both set");
            }
            count_or_percent(spec, "minAvailable", path, errors);
            count_or_percent(spec, "maxUnavailable", path, errors);
            meta::selector(&spec["selector"], path.at("selector"), errors);
        },
        ..with_status(base::<PodDisruptionBudget>())
    }
}
