//! ControllerRevision: a past template of a DaemonSet or StatefulSet.

use k8s_openapi::api::apps::v1::ControllerRevision;

use super::{items, meta};
use crate::{
    cell,
    field::Path,
    row::{Row, col, row as base},
};

pub(super) fn row() -> Row {
    Row {
        columns: const { &[col("Controller", "string"), col("Revision", "integer"), col("Age", "date")] },
        cells: |o, now| {
            let owner = items(&o["metadata"], "ownerReferences").find(|r| r["controller"] == true);
            let owner = owner.map(|r| {
                let group = r["apiVersion"]
                    .as_str()
                    .and_then(|v| v.split_once('/'))
                    .map_or(String::new(), |(g, _)| format!(".{g}"));
                format!(
                    "{}{group}/{}",
                    r["kind"].as_str().unwrap_or_default().to_lowercase(),
                    r["name"].as_str().unwrap_or_default()
                )
            });
            vec![owner.unwrap_or_else(|| "<none>".into()).into(), cell::int(&o["revision"]), cell::age(o, now)]
        },
        validate: |v, errors| {
            if v.new["data"].is_null() {
                errors.required(Path::Root.at("data"), "data is mandatory");
            }
            meta::non_negative(v.new, "revision", Path::Root, errors);
            if let Some(old) = v.old {
                errors.immutable(Path::Root.at("data"), &old["data"], &v.new["data"]);
            }
        },
        ..base::<ControllerRevision>()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_update},
        *,
    };

    #[test]
    fn a_revision_keeps_its_data() {
        check(&row(), json!({"data": {"a": 1}, "revision": 1}), &[]);
        check(
            &row(),
            json!({"revision": -1}),
            &[
                "data: Required value: data is mandatory",
                "revision: Invalid value: -1: must be greater than or equal to 0",
            ],
        );
        let revision = |a: i64, n: i64| json!({"data": {"a": a}, "revision": n});
        check_update(&row(), revision(1, 1), revision(1, 2), &[]);
        check_update(&row(), revision(1, 1), revision(2, 1), &["data: Invalid value: {\"a\":2}: field is immutable"]);
    }
}
