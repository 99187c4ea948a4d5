//! Deployment.

use k8s_openapi::api::apps::v1::Deployment;
use serde_json::{Value, json};

use super::{default, drop_status, meta, template};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Row, Subresource, Validation, col, row as base, wide},
};

pub(super) fn row() -> Row {
    Row {
        short_names: &["deploy"],
        categories: &["all"],
        subresources: &[Subresource::Status, Subresource::Scale],
        columns: const {
            &[
                col("Ready", "string"),
                col("Up-to-date", "string"),
                col("Available", "string"),
                col("Age", "date"),
                wide("Containers", "string"),
                wide("Images", "string"),
                wide("Selector", "string"),
            ]
        },
        cells: |o, now| {
            let (spec, status) = (&o["spec"], &o["status"]);
            let (names, images) = cell::containers(&spec["template"]["spec"]);
            let ready = format!("{}/{}", cell::int(&status["readyReplicas"]), cell::int(&spec["replicas"]));
            vec![
                ready.into(),
                cell::int(&status["updatedReplicas"]),
                cell::int(&status["availableReplicas"]),
                cell::age(o, now),
                names,
                images,
                cell::selector(&spec["selector"]),
            ]
        },
        defaults,
        validate,
        prepare_create: drop_status,
        generation: true,
        ..base::<Deployment>()
    }
}

fn defaults(object: &mut Value) {
    let Some(spec) = object.get_mut("spec") else { return };
    default(spec, "replicas", 1);
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "progressDeadlineSeconds", 600);
    default(spec, "strategy", json!({}));
    default(&mut spec["strategy"], "type", "RollingUpdate");
    if spec["strategy"]["type"] == "RollingUpdate" {
        default(&mut spec["strategy"], "rollingUpdate", json!({}));
        let rolling = &mut spec["strategy"]["rollingUpdate"];
        default(rolling, "maxUnavailable", "25%");
        default(rolling, "maxSurge", "25%");
    }
    if let Some(template) = spec.get_mut("template") {
        template::defaults(template);
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return;
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    for key in ["replicas", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"] {
        meta::non_negative(spec, key, path, errors);
    }
    if let (Some(deadline), Some(ready)) = (spec["progressDeadlineSeconds"].as_i64(), spec["minReadySeconds"].as_i64())
        && deadline <= ready
    {
        errors.invalid(path.at("progressDeadlineSeconds"), deadline, "must be greater than minReadySeconds");
    }
    template::selects(spec, "deployment", path, errors);
    template::validate(spec, path, errors);
    template::runs_for_ever(spec, "ReplicaSet", path, errors);
    let strategy = &spec["strategy"];
    let at = path.at("strategy");
    meta::one_of(strategy, "type", &["Recreate", "RollingUpdate"], at, errors);
    let rolling = &strategy["rollingUpdate"];
    if strategy["type"] == "Recreate" && rolling.is_object() {
        errors.forbidden(at.at("rollingUpdate"), "may not be specified when strategy `type` is 'Recreate'");
    }
    if rolling.is_object() {
        let at = at.at("rollingUpdate");
        count_or_percent(rolling, "maxUnavailable", at, errors);
        count_or_percent(rolling, "maxSurge", at, errors);
        if is_none(&rolling["maxUnavailable"]) && is_none(&rolling["maxSurge"]) {
            errors.invalid(
                at.at("maxUnavailable"),
                rolling["maxUnavailable"].clone(),
                "may not be 0 when `maxSurge` is 0",
            );
        }
        at_most_all(rolling, "maxUnavailable", at, errors);
    }
    if let Some(old) = v.old {
        errors.immutable(path.at("selector"), &old["spec"]["selector"], &spec["selector"]);
    }
}

/// Validates a count or a percentage.
pub(super) fn count_or_percent(object: &Value, key: &str, path: Path<'_>, errors: &mut Errors) {
    match &object[key] {
        Value::Number(n) if n.as_i64().is_some_and(|n| n < 0) => {
            errors.invalid(path.at(key), object[key].clone(), "must be greater than or equal to 0");
        }
        Value::String(s)
            if s.strip_suffix('%').is_none_or(|n| n.is_empty() || !n.bytes().all(|c| c.is_ascii_digit())) =>
        {
            errors.invalid(path.at(key), s.as_str(), "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')");
        }
        _ => {}
    }
}

/// Whether a count or a percentage is nothing.
pub(super) fn is_none(value: &Value) -> bool {
    value.as_i64() == Some(0) || value.as_str().is_some_and(|s| s.strip_suffix('%').unwrap_or(s).parse() == Ok(0))
}

/// Validates that a percentage is not of more than there is.
pub(super) fn at_most_all(object: &Value, key: &str, path: Path<'_>, errors: &mut Errors) {
    let percent = object[key].as_str().and_then(|s| s.strip_suffix('%')).and_then(|s| s.parse::<u64>().ok());
    if percent.is_some_and(|percent| percent > 100) {
        errors.invalid(path.at(key), object[key].clone(), "must not be greater than 100%");
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{check, check_update, with},
        *,
    };

    fn good() -> Value {
        json!({"spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "image": "i"}]}}}})
    }

    #[test]
    fn what_a_deployment_must_be() {
        for (pointer, value, expect) in [
            ("/spec/replicas", json!(0), &[][..]),
            ("/spec/replicas", json!(-1), &["spec.replicas: Invalid value: -1: must be greater than or equal to 0"]),
            ("/spec/selector", json!(null), &["spec.selector: Required value"]),
            (
                "/spec/selector",
                json!({}),
                &["spec.selector: Invalid value: {}: empty selector is invalid for deployment"],
            ),
            (
                "/spec/selector/matchLabels/a",
                json!("c"),
                &[
                    "spec.template.metadata.labels: Invalid value: {\"a\":\"b\"}: `selector` does not match template `labels`",
                ],
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
                    "spec.template.spec.activeDeadlineSeconds: Forbidden: activeDeadlineSeconds in ReplicaSet is not Supported",
                ],
            ),
            ("/spec/strategy", json!({"rollingUpdate": {"maxUnavailable": "100%", "maxSurge": 0}}), &[]),
            (
                "/spec/strategy",
                json!({"rollingUpdate": {"maxUnavailable": "0%", "maxSurge": 0}}),
                &[
                    "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: \"0%\": may not be 0 when `maxSurge` is 0",
                ],
            ),
            (
                "/spec/strategy",
                json!({"rollingUpdate": {"maxUnavailable": "101%"}}),
                &["spec.strategy.rollingUpdate.maxUnavailable: Invalid value: \"101%\": must not be greater than 100%"],
            ),
        ] {
            check(&row(), with(&good(), pointer, value), expect);
        }
    }

    #[test]
    fn the_selector_stays() {
        let mut other = good();
        other["spec"]["selector"]["matchLabels"]["x"] = "y".into();
        other["spec"]["template"]["metadata"]["labels"]["x"] = "y".into();
        let why = r#"spec.selector: Invalid value: {"matchLabels":{"a":"b","x":"y"}}: field is immutable"#;
        check_update(&row(), good(), other, &[why]);
        check_update(&row(), good(), with(&good(), "/spec/replicas", 3.into()), &[]);
    }
}
