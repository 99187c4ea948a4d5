//! DaemonSet.

use k8s_openapi::api::apps::v1::DaemonSet;
use serde_json::{Value, json};

use super::{
    default,
    deployment::{at_most_all, count_or_percent, is_none},
    drop_status, meta, template,
};
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
    if v.subresource == "status" {
        return status(v, errors);
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    template::selects(spec, "daemonset", path, errors);
    template::validate(spec, path, errors);
    template::runs_for_ever(spec, "DaemonSet", path, errors);
    meta::non_negative(spec, "minReadySeconds", path, errors);
    meta::non_negative(spec, "revisionHistoryLimit", path, errors);
    let (strategy, at) = (&spec["updateStrategy"], path.at("updateStrategy"));
    match strategy["type"].as_str().unwrap_or_default() {
        "OnDelete" => {}
        "RollingUpdate" => rolling_update(&strategy["rollingUpdate"], at.at("rollingUpdate"), errors),
        _ => errors.unsupported(at, strategy.clone(), &["RollingUpdate", "OnDelete"]),
    }
    if let Some(old) = v.old {
        errors.immutable(path.at("selector"), &old["spec"]["selector"], &spec["selector"]);
    }
}

fn rolling_update(rolling: &Value, path: Path<'_>, errors: &mut Errors) {
    for key in ["maxUnavailable", "maxSurge"] {
        count_or_percent(rolling, key, path, errors);
    }
    for key in ["maxUnavailable", "maxSurge"] {
        at_most_all(rolling, key, path, errors);
    }
    // Either an old pod goes before its successor comes, or the other way round.
    match (is_none(&rolling["maxUnavailable"]), is_none(&rolling["maxSurge"])) {
        (false, false) => {
            let why = "may not be set when maxUnavailable is non-zero";
            errors.invalid(path.at("maxSurge"), rolling["maxSurge"].clone(), why);
        }
        (true, true) => errors.required(path.at("maxUnavailable"), "cannot be 0 when maxSurge is 0"),
        _ => {}
    }
}

fn status(v: &Validation<'_>, errors: &mut Errors) {
    let status = &v.new["status"];
    let path = Path::Root.at("status");
    for key in [
        "currentNumberScheduled",
        "numberMisscheduled",
        "desiredNumberScheduled",
        "numberReady",
        "observedGeneration",
        "updatedNumberScheduled",
        "numberAvailable",
        "numberUnavailable",
        "collisionCount",
    ] {
        meta::non_negative(status, key, path, errors);
    }
    let collisions = |object: &Value| object["status"]["collisionCount"].as_i64().unwrap_or_default();
    if v.old.is_some_and(|old| collisions(old) > collisions(v.new)) {
        errors.invalid(path.at("collisionCount"), collisions(v.new), "cannot be decremented");
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{check, check_status, check_update, with},
        *,
    };

    fn good() -> Value {
        json!({"spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "image": "i"}]}}}})
    }

    #[test]
    fn what_a_daemon_set_must_be() {
        let at = "spec.updateStrategy.rollingUpdate";
        for (pointer, value, expect) in [
            ("/spec/minReadySeconds", json!(3), &[][..]),
            (
                "/spec/revisionHistoryLimit",
                json!(-1),
                &["spec.revisionHistoryLimit: Invalid value: -1: must be greater than or equal to 0"],
            ),
            (
                "/spec/selector",
                json!({}),
                &["spec.selector: Invalid value: {}: empty selector is invalid for daemonset"],
            ),
            (
                "/spec/template/spec/restartPolicy",
                json!("Never"),
                &["spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\""],
            ),
            (
                "/spec/template/spec/activeDeadlineSeconds",
                json!(5),
                &[
                    "spec.template.spec.activeDeadlineSeconds: Forbidden: activeDeadlineSeconds in DaemonSet is not Supported",
                ],
            ),
            ("/spec/updateStrategy", json!({"type": "OnDelete"}), &[]),
            (
                "/spec/updateStrategy",
                json!({"type": "Some"}),
                &[
                    "spec.updateStrategy: Unsupported value: {\"type\":\"Some\"}: supported values: \"RollingUpdate\", \"OnDelete\"",
                ],
            ),
            ("/spec/updateStrategy", json!({"rollingUpdate": {"maxUnavailable": 0, "maxSurge": "10%"}}), &[]),
            (
                "/spec/updateStrategy",
                json!({"rollingUpdate": {"maxUnavailable": 0}}),
                &[&*format!("{at}.maxUnavailable: Required value: cannot be 0 when maxSurge is 0")],
            ),
            (
                "/spec/updateStrategy",
                json!({"rollingUpdate": {"maxSurge": 1}}),
                &[&*format!("{at}.maxSurge: Invalid value: 1: may not be set when maxUnavailable is non-zero")],
            ),
            (
                "/spec/updateStrategy",
                json!({"rollingUpdate": {"maxUnavailable": "200%"}}),
                &[&*format!("{at}.maxUnavailable: Invalid value: \"200%\": must not be greater than 100%")],
            ),
        ] {
            check(&row(), with(&good(), pointer, value), expect);
        }
    }

    #[test]
    fn what_may_change() {
        check_update(&row(), good(), with(&good(), "/spec/template/spec/containers/0/image", "k".into()), &[]);
        let mut other = good();
        other["spec"]["selector"] = json!({"matchLabels": {"x": "y"}});
        other["spec"]["template"]["metadata"]["labels"]["x"] = "y".into();
        let why = r#"spec.selector: Invalid value: {"matchLabels":{"x":"y"}}: field is immutable"#;
        check_update(&row(), good(), other, &[why]);
        let status = |n: i64| json!({"status": {"numberReady": 0, "collisionCount": n}});
        check_status(&row(), status(1), status(2), &[]);
        check_status(&row(), status(2), status(1), &["status.collisionCount: Invalid value: 1: cannot be decremented"]);
    }
}
