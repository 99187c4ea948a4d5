//! HorizontalPodAutoscaler: stored as v2, also served as v1.

use k8s_openapi::api::autoscaling::{v1, v2};
use serde_json::{Value, json};

use super::{autoscaling_rules, default, drop_status, items};
use crate::{
    cell,
    row::{Alias, Conversion, Row, Subresource, col, name_of, row as base, schema_of},
};

pub(super) fn row() -> Row {
    let v1 = Alias {
        group: "autoscaling",
        version: "v1",
        conversion: Conversion {
            type_name: name_of::<v1::HorizontalPodAutoscaler>(),
            schema: schema_of::<v1::HorizontalPodAutoscaler>,
            to_stored: from_v1,
            from_stored: to_v1,
        },
        validate: crate::row::valid,
    };
    Row {
        short_names: &["hpa"],
        categories: &["all"],
        subresources: &[Subresource::Status],
        // Rows are made once for the life of the process.
        aliases: Box::leak(Box::new([v1])),
        columns: const {
            &[
                col("Reference", "string"),
                col("Targets", "string"),
                col("MinPods", "string"),
                col("MaxPods", "string"),
                col("Replicas", "integer"),
                col("Age", "date"),
            ]
        },
        cells: |o, now| {
            let (spec, status) = (&o["spec"], &o["status"]);
            let target = &spec["scaleTargetRef"];
            let word = |v: &Value| v.as_str().unwrap_or_default().to_owned();
            let targets: Vec<String> = items(spec, "metrics")
                .map(|m| {
                    let name = word(&m["resource"]["name"]);
                    let wanted = match m["resource"]["target"]["averageUtilization"].as_i64() {
                        Some(n) => format!("{n}%"),
                        None => word(&m["resource"]["target"]["averageValue"]),
                    };
                    let current = items(status, "currentMetrics").find(|c| c["resource"]["name"] == name.as_str());
                    let current = current.and_then(|c| c["resource"]["current"]["averageUtilization"].as_i64());
                    format!("{name}: {}/{wanted}", current.map_or("<unknown>".to_owned(), |n| format!("{n}%")))
                })
                .collect();
            let targets = if targets.is_empty() { "<none>".to_owned() } else { targets.join(", ") };
            vec![
                format!("{}/{}", word(&target["kind"]), word(&target["name"])).into(),
                targets.into(),
                cell::int(&spec["minReplicas"]).to_string().into(),
                cell::int(&spec["maxReplicas"]).to_string().into(),
                cell::int(&status["currentReplicas"]),
                cell::age(o, now),
            ]
        },
        defaults: |o| {
            let Some(spec) = o.get_mut("spec") else { return };
            default(spec, "minReplicas", 1);
            if items(spec, "metrics").next().is_none() {
                spec["metrics"] = json!([{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}]);
            }
            autoscaling_rules::defaults(spec);
        },
        validate: autoscaling_rules::validate,
        prepare_create: drop_status,
        generation: true,
        ..base::<v2::HorizontalPodAutoscaler>()
    }
}

fn from_v1(o: &mut Value) {
    let percent = o["spec"].as_object_mut().and_then(|s| s.remove("targetCPUUtilizationPercentage"));
    if let Some(percent) = percent {
        o["spec"]["metrics"] = json!([{"type": "Resource", "resource": {"name": "cpu",
            "target": {"type": "Utilization", "averageUtilization": percent}}}]);
    }
    if let Some(status) = o.get_mut("status").and_then(Value::as_object_mut) {
        status.remove("currentCPUUtilizationPercentage");
    }
}

fn to_v1(o: &mut Value) {
    let cpu = |m: &Value| m["resource"]["name"] == "cpu";
    let percent =
        items(&o["spec"], "metrics").find(|m| cpu(m)).map(|m| m["resource"]["target"]["averageUtilization"].clone());
    let current = items(&o["status"], "currentMetrics")
        .find(|m| cpu(m))
        .map(|m| m["resource"]["current"]["averageUtilization"].clone());
    if let Some(spec) = o["spec"].as_object_mut() {
        spec.remove("metrics");
        spec.remove("behavior");
        if let Some(percent) = percent.filter(Value::is_number) {
            spec.insert("targetCPUUtilizationPercentage".into(), percent);
        }
    }
    if let Some(status) = o.get_mut("status").and_then(Value::as_object_mut) {
        status.remove("currentMetrics");
        status.remove("conditions");
        if let Some(current) = current.filter(Value::is_number) {
            status.insert("currentCPUUtilizationPercentage".into(), current);
        }
    }
}
