//! What a HorizontalPodAutoscaler must look like, and how fast it scales if it does not say
//! (<https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/#default-behavior>).

use serde_json::{Value, json};

use super::{default, items, meta};
use crate::{
    field::{Errors, Path},
    names,
    row::Validation,
};

const MAX_PERIOD: i64 = 1800;
const MAX_WINDOW: i64 = 3600;

/// The sources of a metric: the type, its field.
const SOURCES: [(&str, &str); 5] = [
    ("Object", "object"),
    ("External", "external"),
    ("Pods", "pods"),
    ("Resource", "resource"),
    ("ContainerResource", "containerResource"),
];

/// Fills in what a behaviour leaves out. Where there is none at all, the controller knows what to do.
pub(super) fn defaults(spec: &mut Value) {
    if !spec["behavior"].is_object() {
        return;
    }
    let policy = |ty: &str, value: i64| json!({"type": ty, "value": value, "periodSeconds": 15});
    for (key, window, policies) in [
        ("scaleUp", Some(0), json!([policy("Pods", 4), policy("Percent", 100)])),
        ("scaleDown", None, json!([policy("Percent", 100)])),
    ] {
        default(&mut spec["behavior"], key, json!({}));
        let rules = &mut spec["behavior"][key];
        default(rules, "selectPolicy", "Max");
        default(rules, "policies", policies);
        if let Some(window) = window {
            default(rules, "stabilizationWindowSeconds", window);
        }
    }
}

/// Says everything that is wrong with an autoscaler.
pub(super) fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        for key in ["currentReplicas", "desiredReplicas"] {
            meta::non_negative(&v.new["status"], key, Path::Root.at("status"), errors);
        }
        return;
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    let (min, max) = (spec["minReplicas"].as_i64(), spec["maxReplicas"].as_i64().unwrap_or_default());
    // Scaling to nothing is off, but one that did it already may go on.
    let least = i64::from(v.old.is_none_or(|old| old["spec"]["minReplicas"].as_i64() != Some(0)));
    if let Some(min) = min.filter(|min| *min < least) {
        errors.invalid(path.at("minReplicas"), min, format!("must be greater than or equal to {least}"));
    }
    if max < 1 {
        errors.invalid(path.at("maxReplicas"), max, "must be greater than 0");
    }
    if min.is_some_and(|min| max < min) {
        errors.invalid(path.at("maxReplicas"), max, "must be greater than or equal to `minReplicas`");
    }
    meta::reference(&spec["scaleTargetRef"], path.at("scaleTargetRef"), errors);
    let at = path.at("metrics");
    for (index, source) in items(spec, "metrics").enumerate() {
        metric(source, at.index(index), errors);
    }
    let outside = |source: &Value| source["type"] == "Object" || source["type"] == "External";
    if min == Some(0) && !items(spec, "metrics").any(outside) {
        errors.forbidden(at, "must specify at least one Object or External metric to support scaling to zero replicas");
    }
    for key in ["scaleUp", "scaleDown"] {
        if spec["behavior"][key].is_object() {
            rules(&spec["behavior"][key], path.at("behavior").at(key), errors);
        }
    }
}

fn rules(rules: &Value, path: Path<'_>, errors: &mut Errors) {
    let at = path.at("stabilizationWindowSeconds");
    match rules["stabilizationWindowSeconds"].as_i64() {
        Some(n) if n < 0 => errors.invalid(at, n, "must be greater than or equal to zero"),
        Some(n) if n > MAX_WINDOW => errors.invalid(at, n, format!("must be less than or equal to {MAX_WINDOW}")),
        _ => {}
    }
    meta::one_of(rules, "selectPolicy", &["Disabled", "Max", "Min"], path, errors);
    if meta::quantity(&rules["tolerance"]).is_some_and(|tolerance| tolerance.is_negative()) {
        errors.invalid(path.at("tolerance"), rules["tolerance"].clone(), "must be greater or equal to zero");
    }
    let list = path.at("policies");
    if items(rules, "policies").next().is_none() {
        errors.required(list, "must specify at least one Policy");
    }
    for (index, policy) in items(rules, "policies").enumerate() {
        let at = list.index(index);
        let ty = policy["type"].as_str().unwrap_or_default();
        if !["Percent", "Pods"].contains(&ty) {
            errors.not_supported(at.at("type"), ty, &["Percent", "Pods"]);
        }
        for key in ["value", "periodSeconds"] {
            let n = policy[key].as_i64().unwrap_or_default();
            if n <= 0 {
                errors.invalid(at.at(key), n, "must be greater than zero");
            }
            if key == "periodSeconds" && n > MAX_PERIOD {
                errors.invalid(at.at(key), n, format!("must be less than or equal to {MAX_PERIOD}"));
            }
        }
    }
}

fn metric(metric: &Value, path: Path<'_>, errors: &mut Errors) {
    let known = SOURCES.map(|(ty, _)| ty);
    let ty = metric["type"].as_str().unwrap_or_default();
    if ty.is_empty() {
        errors.required(path.at("type"), "must specify a metric source type");
    }
    if !known.contains(&ty) {
        errors.not_supported(path.at("type"), ty, &known);
    }
    let present: Vec<&str> = SOURCES.iter().map(|(_, key)| *key).filter(|key| metric[*key].is_object()).collect();
    if let Some(first) = present.first() {
        source(&metric[*first], first, path.at(first), errors);
    }
    let expected = SOURCES.iter().find(|(known, _)| *known == ty).map(|(_, key)| *key);
    if let Some(key) = expected.filter(|key| !present.contains(key)) {
        errors.required(path.at(key), "must populate information for the given metric source");
    }
    if present.len() != 1 {
        for key in present.iter().filter(|key| Some(**key) != expected) {
            errors.forbidden(path.at(key), "must populate the given metric source only");
        }
    }
}

fn source(source: &Value, key: &str, path: Path<'_>, errors: &mut Errors) {
    let target = &source["target"];
    let at = path.at("target");
    let has = |key: &str| !target[key].is_null();
    match key {
        "resource" | "containerResource" => {
            if source["name"].as_str().unwrap_or_default().is_empty() {
                errors.required(path.at("name"), "must specify a resource name");
            }
            if key == "containerResource" {
                match source["container"].as_str().unwrap_or_default() {
                    "" => errors.required(path.at("container"), "must specify a container"),
                    name => errors.expect(path.at("container"), name, names::dns_label),
                }
            }
            metric_target(target, at, errors);
            if !has("averageUtilization") && !has("averageValue") {
                let why = "must set either a target raw value or a target utilization";
                errors.required(at.at("averageUtilization"), why);
            }
            if has("averageUtilization") && has("averageValue") {
                let why = "may not set both a target raw value and a target utilization";
                errors.forbidden(at.at("averageValue"), why);
            }
        }
        _ => {
            if key == "object" {
                meta::reference(&source["describedObject"], path.at("describedObject"), errors);
            }
            match source["metric"]["name"].as_str().unwrap_or_default() {
                "" => errors.required(path.at("metric").at("name"), "must specify a metric name"),
                name => errors.expect(path.at("metric").at("name"), name, names::path_segment),
            }
            metric_target(target, at, errors);
            let missing = match key {
                "pods" => (!has("averageValue")).then_some("must specify a positive target averageValue"),
                _ if has("value") || has("averageValue") => None,
                "object" => Some("must set either a target value or averageValue"),
                _ => Some("must set either a target value for metric or a per-pod target"),
            };
            if let Some(why) = missing {
                errors.required(at.at("averageValue"), why);
            }
            if key == "external" && has("value") && has("averageValue") {
                errors.forbidden(at.at("value"), "may not set both a target value for metric and a per-pod target");
            }
        }
    }
}

fn metric_target(target: &Value, path: Path<'_>, errors: &mut Errors) {
    let ty = target["type"].as_str().unwrap_or_default();
    if ty.is_empty() {
        errors.required(path.at("type"), "must specify a metric target type");
    }
    if !["Utilization", "Value", "AverageValue"].contains(&ty) {
        errors.invalid(path.at("type"), ty, "must be either Utilization, Value, or AverageValue");
    }
    for key in ["value", "averageValue"] {
        if meta::quantity(&target[key]).is_some_and(|amount| amount <= crate::quantity::Quantity::new(0)) {
            errors.invalid(path.at(key), target[key].clone(), "must be positive");
        }
    }
    if let Some(percent) = target["averageUtilization"].as_i64().filter(|percent| *percent < 1) {
        errors.invalid(path.at("averageUtilization"), percent, "must be greater than 0");
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            autoscaling::row,
            testing::{check, check_status, check_update, with},
        },
        *,
    };

    fn good() -> Value {
        json!({"spec": {"maxReplicas": 5, "scaleTargetRef": {"kind": "Deployment", "name": "d", "apiVersion": "apps/v1"}}})
    }

    #[test]
    fn how_many() {
        for (key, value, expect) in [
            ("minReplicas", json!(5), &[][..]),
            (
                "minReplicas",
                json!(6),
                &["spec.maxReplicas: Invalid value: 5: must be greater than or equal to `minReplicas`"],
            ),
            (
                "minReplicas",
                json!(0),
                &[
                    "spec.minReplicas: Invalid value: 0: must be greater than or equal to 1",
                    "spec.metrics: Forbidden: must specify at least one Object or External metric to support scaling to zero replicas",
                ],
            ),
            (
                "maxReplicas",
                json!(0),
                &[
                    "spec.maxReplicas: Invalid value: 0: must be greater than 0",
                    "spec.maxReplicas: Invalid value: 0: must be greater than or equal to `minReplicas`",
                ],
            ),
            (
                "scaleTargetRef",
                json!({"kind": "a/b"}),
                &[
                    "spec.scaleTargetRef.kind: Invalid value: \"a/b\": may not contain '/'",
                    "spec.scaleTargetRef.name: Required value",
                ],
            ),
        ] {
            check(&row(), with(&good(), &format!("/spec/{key}"), value), expect);
        }
        let external = json!([{"type": "External", "external": {"metric": {"name": "q"}, "target": {"type": "Value", "value": "1"}}}]);
        let none = with(&with(&good(), "/spec/metrics", external), "/spec/minReplicas", 0.into());
        check_update(&row(), none.clone(), with(&none, "/spec/maxReplicas", 9.into()), &[]);
        let status = |n: i64| json!({"status": {"desiredReplicas": n}});
        check_status(&row(), status(0), status(1), &[]);
        let why = "status.desiredReplicas: Invalid value: -1: must be greater than or equal to 0";
        check_status(&row(), status(0), status(-1), &[why]);
    }

    #[test]
    fn metrics() {
        let cpu = |target: Value| json!({"type": "Resource", "resource": {"name": "cpu", "target": target}});
        let good_target = json!({"type": "Utilization", "averageUtilization": 50});
        for (metric, expect) in [
            (cpu(good_target.clone()), &[][..]),
            (
                cpu(json!({"type": "Utilization", "averageUtilization": 0})),
                &["spec.metrics[0].resource.target.averageUtilization: Invalid value: 0: must be greater than 0"],
            ),
            (
                cpu(json!({"type": "Value"})),
                &[
                    "spec.metrics[0].resource.target.averageUtilization: Required value: must set either a target raw value or a target utilization",
                ],
            ),
            (
                cpu(json!({"type": "Most", "averageValue": "0"})),
                &[
                    "spec.metrics[0].resource.target.type: Invalid value: \"Most\": must be either Utilization, Value, or AverageValue",
                    "spec.metrics[0].resource.target.averageValue: Invalid value: \"0\": must be positive",
                ],
            ),
            (
                json!({"type": "Some"}),
                &[
                    "spec.metrics[0].type: Unsupported value: \"Some\": supported values: \"ContainerResource\", \"External\", \"Object\", \"Pods\", \"Resource\"",
                ],
            ),
            (
                json!({"type": "Pods", "resource": {"name": "cpu", "target": good_target}}),
                &["spec.metrics[0].pods: Required value: must populate information for the given metric source"],
            ),
            (
                json!({"type": "Pods", "pods": {"target": {"type": "AverageValue"}}}),
                &[
                    "spec.metrics[0].pods.metric.name: Required value: must specify a metric name",
                    "spec.metrics[0].pods.target.averageValue: Required value: must specify a positive target averageValue",
                ],
            ),
            (
                json!({"type": "Object", "object": {"describedObject": {"kind": "Service", "name": "s"}, "metric": {"name": "m"}, "target": {"type": "Value", "value": "10"}}}),
                &[],
            ),
            (
                json!({"type": "ContainerResource", "containerResource": {"name": "cpu", "container": "A", "target": {"type": "Utilization", "averageUtilization": 1}}}),
                &[&*format!(
                    "spec.metrics[0].containerResource.container: Invalid value: \"A\": {}",
                    names::dns_label("A").unwrap_err()
                )],
            ),
        ] {
            check(&row(), with(&good(), "/spec/metrics", json!([metric])), expect);
        }
    }

    #[test]
    fn behaviour() {
        for (behavior, expect) in [
            (json!({}), &[][..]),
            (
                json!({"scaleDown": {"stabilizationWindowSeconds": 60, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}}),
                &[],
            ),
            (
                json!({"scaleUp": {"stabilizationWindowSeconds": 3601, "selectPolicy": "All", "policies": []}}),
                &[
                    "spec.behavior.scaleUp.stabilizationWindowSeconds: Invalid value: 3601: must be less than or equal to 3600",
                    "spec.behavior.scaleUp.selectPolicy: Unsupported value: \"All\": supported values: \"Disabled\", \"Max\", \"Min\"",
                    "spec.behavior.scaleUp.policies: Required value: must specify at least one Policy",
                ],
            ),
            (
                json!({"scaleUp": {"policies": [{"type": "X", "value": 0, "periodSeconds": 1801}]}}),
                &[
                    "spec.behavior.scaleUp.policies[0].type: Unsupported value: \"X\": supported values: \"Percent\", \"Pods\"",
                    "spec.behavior.scaleUp.policies[0].value: Invalid value: 0: must be greater than zero",
                    "spec.behavior.scaleUp.policies[0].periodSeconds: Invalid value: 1801: must be less than or equal to 1800",
                ],
            ),
        ] {
            check(&row(), with(&good(), "/spec/behavior", behavior), expect);
        }
        let mut object = with(&good(), "/spec/behavior", json!({"scaleDown": {"selectPolicy": "Disabled"}}));
        (row().defaults)(&mut object);
        assert_eq!(
            object["spec"]["behavior"],
            json!({"scaleUp": {"stabilizationWindowSeconds": 0, "selectPolicy": "Max", "policies": [
                {"type": "Pods", "value": 4, "periodSeconds": 15}, {"type": "Percent", "value": 100, "periodSeconds": 15}]},
                "scaleDown": {"selectPolicy": "Disabled", "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}]}})
        );
    }
}
