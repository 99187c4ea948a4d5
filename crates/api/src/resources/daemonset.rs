//! DaemonSet.

use k8s_openapi::api::apps::v1::DaemonSet;
use serde_json::{Value, json};

use super::{default, deployment::count_or_percent, drop_status, meta, template};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Row, Subresource, Validation, col, row as base, wide},
};

pub(super) fn row() -> Row {
    Row {
        short_names: &["ds"],
        categories: &["all"],
        subresources: &[Subresource::Status],
        columns: const {
            &[
                col("Desired", "integer"),
                col("Current", "integer"),
                col("Ready", "integer"),
                col("Up-to-date", "integer"),
                col("Available", "integer"),
                col("Node Selector", "string"),
                col("Age", "date"),
                wide("Containers", "string"),
                wide("Images", "string"),
                wide("Selector", "string"),
            ]
        },
        cells: |o, now| {
            let (names, images) = cell::containers(&o["spec"]["template"]["spec"]);
            let status = &o["status"];
            vec![
                cell::int(&status["desiredNumberScheduled"]),
                cell::int(&status["currentNumberScheduled"]),
                cell::int(&status["numberReady"]),
                cell::int(&status["updatedNumberScheduled"]),
                cell::int(&status["numberAvailable"]),
                cell::labels(&o["spec"]["template"]["spec"]["nodeSelector"]),
                cell::age(o, now),
                names,
                images,
                cell::selector(&o["spec"]["selector"]),
            ]
        },
        defaults,
        validate,
        prepare_create: drop_status,
        generation: true,
        ..base::<DaemonSet>()
    }
}

fn defaults(object: &mut Value) {
    let Some(spec) = object.get_mut("spec") else { return };
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "updateStrategy", json!({}));
    default(&mut spec["updateStrategy"], "type", "RollingUpdate");
    if spec["updateStrategy"]["type"] == "RollingUpdate" {
        default(&mut spec["updateStrategy"], "rollingUpdate", json!({}));
        let rolling = &mut spec["updateStrategy"]["rollingUpdate"];
        default(rolling, "maxUnavailable", 1);
        default(rolling, "maxSurge", 0);
    }
    if let Some(template) = spec.get_mut("template") {
        template::defaults(template);
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    meta::non_negative(spec, "minReadySeconds", path, errors);
    template::selects(spec, path, errors);
    template::validate(spec, path, &["Always"], errors);
    let at = path.at("updateStrategy");
    meta::one_of(&spec["updateStrategy"], "type", &["RollingUpdate", "OnDelete"], at, errors);
    let rolling = &spec["updateStrategy"]["rollingUpdate"];
    count_or_percent(rolling, "maxUnavailable", at.at("rollingUpdate"), errors);
    count_or_percent(rolling, "maxSurge", at.at("rollingUpdate"), errors);
    if let Some(old) = v.old {
        errors.immutable(path.at("selector"), &old["spec"]["selector"], &spec["selector"]);
    }
}
