//! ReplicaSet and ReplicationController.

use k8s_openapi::api::{apps::v1::ReplicaSet, core::v1::ReplicationController};
use serde_json::Value;

use super::{default, drop_status, meta, template};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Cells, Column, Row, Subresource, Validation, col, row as base, wide},
};

const COLUMNS: &[Column] = &[
    col("Desired", "integer"),
    col("Current", "integer"),
    col("Ready", "integer"),
    col("Age", "date"),
    wide("Containers", "string"),
    wide("Images", "string"),
    wide("Selector", "string"),
];

fn cells(o: &Value, now: jiff::Timestamp, selector: Value) -> Vec<Value> {
    let (names, images) = cell::containers(&o["spec"]["template"]["spec"]);
    let status = &o["status"];
    vec![
        cell::int(&o["spec"]["replicas"]),
        cell::int(&status["replicas"]),
        cell::int(&status["readyReplicas"]),
        cell::age(o, now),
        names,
        images,
        selector,
    ]
}

pub(super) fn row() -> Row {
    Row {
        short_names: &["rs"],
        categories: &["all"],
        subresources: &[Subresource::Status, Subresource::Scale],
        columns: COLUMNS,
        cells: (|o, now| cells(o, now, cell::selector(&o["spec"]["selector"]))) as Cells,
        selectable: &["status.replicas"],
        defaults: |o| {
            let Some(spec) = o.get_mut("spec") else { return };
            default(spec, "replicas", 1);
            if let Some(template) = spec.get_mut("template") {
                template::defaults(template);
            }
        },
        validate,
        prepare_create: drop_status,
        generation: true,
        ..base::<ReplicaSet>()
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return status(&v.new["status"], errors);
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    meta::non_negative(spec, "replicas", path, errors);
    meta::non_negative(spec, "minReadySeconds", path, errors);
    template::selects(spec, "deployment", path, errors);
    template::validate(spec, path, errors);
    template::runs_for_ever(spec, "ReplicaSet", path, errors);
    if let Some(old) = v.old {
        errors.immutable(path.at("selector"), &old["spec"]["selector"], &spec["selector"]);
    }
}

fn status(status: &Value, errors: &mut Errors) {
    let path = Path::Root.at("status");
    let replicas = status["replicas"].as_i64().unwrap_or_default();
    let parts = ["fullyLabeledReplicas", "readyReplicas", "availableReplicas"];
    for key in parts.into_iter().chain(["replicas", "observedGeneration"]) {
        meta::non_negative(status, key, path, errors);
    }
    for key in parts {
        if let Some(part) = status[key].as_i64().filter(|part| *part > replicas) {
            errors.invalid(path.at(key), part, "cannot be greater than status.replicas");
        }
    }
}

fn validate_controller(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return status(&v.new["status"], errors);
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    meta::non_negative(spec, "minReadySeconds", path, errors);
    meta::non_negative(spec, "replicas", path, errors);
    let selector = spec["selector"].as_object().filter(|selector| !selector.is_empty());
    if selector.is_none() {
        errors.required(path.at("selector"), "");
    }
    if !spec["template"].is_object() {
        errors.required(path.at("template"), "");
        return;
    }
    let labels = &spec["template"]["metadata"]["labels"];
    if selector.is_some_and(|selector| selector.iter().any(|(key, value)| &labels[key] != value)) {
        let at = path.at("template");
        let why = "`selector` does not match template `labels`";
        errors.invalid(at.at("metadata").at("labels"), labels.clone(), why);
    }
    template::validate(spec, path, errors);
    template::runs_for_ever(spec, "ReplicationController", path, errors);
}

pub(super) fn replication_controller() -> Row {
    Row {
        short_names: &["rc"],
        categories: &["all"],
        subresources: &[Subresource::Status, Subresource::Scale],
        columns: COLUMNS,
        cells: |o, now| cells(o, now, cell::labels(&o["spec"]["selector"])),
        defaults: |o| {
            let labels = o["spec"]["template"]["metadata"]["labels"].clone();
            let Some(spec) = o.get_mut("spec") else { return };
            default(spec, "replicas", 1);
            if labels.is_object() {
                default(spec, "selector", labels);
            }
            if let Some(template) = spec.get_mut("template") {
                template::defaults(template);
            }
        },
        validate: validate_controller,
        prepare_create: drop_status,
        generation: true,
        ..base::<ReplicationController>()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_status, with},
        *,
    };

    #[test]
    fn what_a_replication_controller_must_be() {
        let good = json!({"spec": {"template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        for (pointer, value, expect) in [
            ("/spec/replicas", json!(2), &[][..]),
            ("/spec/replicas", json!(-1), &["spec.replicas: Invalid value: -1: must be greater than or equal to 0"]),
            ("/spec/selector", json!({}), &["spec.selector: Required value"]),
            (
                "/spec/selector",
                json!({"a": "c"}),
                &[
                    "spec.template.metadata.labels: Invalid value: {\"a\":\"b\"}: `selector` does not match template `labels`",
                ],
            ),
            ("/spec/template", json!(null), &["spec.selector: Required value", "spec.template: Required value"]),
            (
                "/spec/template/spec/restartPolicy",
                json!("OnFailure"),
                &["spec.template.spec.restartPolicy: Unsupported value: \"OnFailure\": supported values: \"Always\""],
            ),
        ] {
            check(&replication_controller(), with(&good, pointer, value), expect);
        }
    }

    #[test]
    fn a_status_adds_up() {
        for row in [row(), replication_controller()] {
            let status = |ready: i64| json!({"status": {"replicas": 1, "readyReplicas": ready}});
            check_status(&row, status(0), status(1), &[]);
            let why = "status.readyReplicas: Invalid value: 2: cannot be greater than status.replicas";
            check_status(&row, status(0), status(2), &[why]);
        }
    }
}
