//! Event: stored in the core's form, also served as `events.k8s.io/v1`.

use k8s_openapi::api::{core, events};
use serde_json::{Value, json};

use super::default;
use crate::{
    cell,
    field::Path,
    row::{Alias, Conversion, Row, col, name_of, row as base, schema_of, wide},
};

/// Fields by their name in `events.k8s.io/v1` and in the core.
const RENAMED: &[(&str, &str)] = &[
    ("note", "message"),
    ("regarding", "involvedObject"),
    ("reportingController", "reportingComponent"),
    ("deprecatedCount", "count"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedSource", "source"),
];

fn rename(object: &mut Value, pairs: impl Iterator<Item = (&'static str, &'static str)>) {
    let Some(object) = object.as_object_mut() else { return };
    for (from, to) in pairs {
        if let Some(value) = object.remove(from) {
            object.insert(to.to_owned(), value);
        }
    }
}

pub(super) fn row() -> Row {
    let events = Alias {
        group: "events.k8s.io",
        version: "v1",
        conversion: Conversion {
            type_name: name_of::<events::v1::Event>(),
            schema: schema_of::<events::v1::Event>,
            to_stored: |o| rename(o, RENAMED.iter().copied()),
            from_stored: |o| rename(o, RENAMED.iter().map(|(a, b)| (*b, *a))),
        },
    };
    Row {
        short_names: &["ev"],
        aliases: Box::leak(Box::new([events])),
        columns: const {
            &[
                col("Last Seen", "string"),
                col("Type", "string"),
                col("Reason", "string"),
                col("Object", "string"),
                wide("Subobject", "string"),
                wide("Source", "string"),
                col("Message", "string"),
                wide("First Seen", "string"),
                wide("Count", "string"),
                wide("Name", "string"),
            ]
        },
        cells: |o, now| {
            let first = [&o["firstTimestamp"], &o["eventTime"]].into_iter().find(|t| t.is_string());
            let series = &o["series"]["lastObservedTime"];
            let last = [series, &o["lastTimestamp"]].into_iter().find(|t| t.is_string()).or(first);
            let object = &o["involvedObject"];
            let word = |v: &Value| v.as_str().unwrap_or_default().to_owned();
            let component = [&o["source"]["component"], &o["reportingComponent"]].into_iter().find(|c| c.is_string());
            let source = [component.map(word).unwrap_or_default(), word(&o["source"]["host"])];
            let source: Vec<String> = source.into_iter().filter(|s| !s.is_empty()).collect();
            let count = o["series"]["count"].as_i64().or(o["count"].as_i64()).unwrap_or(1);
            vec![
                cell::since(last.unwrap_or(&Value::Null), now),
                cell::plain(&o["type"]),
                cell::plain(&o["reason"]),
                format!("{}/{}", word(&object["kind"]).to_lowercase(), word(&object["name"])).into(),
                cell::plain(&object["fieldPath"]),
                source.join(", ").into(),
                word(&o["message"]).trim().into(),
                cell::since(first.unwrap_or(&Value::Null), now),
                count.to_string().into(),
                o["metadata"]["name"].clone(),
            ]
        },
        selectable: &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        defaults: |o| {
            if o["involvedObject"].is_null() {
                default(o, "involvedObject", json!({}));
            }
        },
        validate: |v, errors| {
            let object = &v.new["involvedObject"];
            let namespace = v.new["metadata"]["namespace"].as_str().unwrap_or_default();
            // Events of cluster-scoped objects live in `default`.
            let involved = object["namespace"].as_str().unwrap_or_default();
            if v.old.is_none() && involved != namespace && !(involved.is_empty() && namespace == "default") {
                let path = Path::Root.at("involvedObject");
                errors.invalid(path.at("namespace"), involved, "does not match event.namespace");
            }
        },
        ..base::<core::v1::Event>()
    }
}
