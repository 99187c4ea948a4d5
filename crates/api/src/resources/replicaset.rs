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
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    meta::non_negative(spec, "replicas", path, errors);
    meta::non_negative(spec, "minReadySeconds", path, errors);
    template::selects(spec, path, errors);
    template::validate(spec, path, &["Always"], errors);
    if let Some(old) = v.old {
        errors.immutable(path.at("selector"), &old["spec"]["selector"], &spec["selector"]);
    }
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
        validate: |v, errors| {
            let path = Path::Root.at("spec");
            meta::non_negative(&v.new["spec"], "replicas", path, errors);
            if v.new["spec"]["selector"].as_object().is_none_or(|s| s.is_empty()) {
                errors.required(path.at("selector"), "");
            }
            template::validate(&v.new["spec"], path, &["Always"], errors);
        },
        prepare_create: drop_status,
        generation: true,
        ..base::<ReplicationController>()
    }
}
