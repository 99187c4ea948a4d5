//! Event: stored in the core's form, also served as `events.k8s.io/v1`.

use k8s_openapi::api::{core, events};
use serde_json::{Value, json};

use super::default;
use crate::{
    cell,
    field::{Errors, Path, same},
    names,
    row::{Alias, Conversion, Row, Validation, col, name_of, row as base, schema_of, wide},
};

/// How long reason, action and reporter may be, in bytes, and how long a message of a newer event.
const MAX_WORD: usize = 128;
const MAX_NOTE: usize = 1024;

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
        validate: strict,
        conversion: Conversion {
            type_name: name_of::<events::v1::Event>(),
            schema: schema_of::<events::v1::Event>,
            to_stored: |o| rename(o, RENAMED.iter().copied()),
            from_stored: |o| rename(o, RENAMED.iter().map(|(a, b)| (*b, *a))),
        },
    };
    Row {
        short_names: &["ev"],
        name: names::path_segment,
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
        validate,
        ..base::<core::v1::Event>()
    }
}

fn text<'v>(object: &'v Value, key: &str) -> &'v str {
    object[key].as_str().unwrap_or_default()
}

/// What every event must be. Those with an `eventTime` are of the newer kind, which says who saw what and did what.
fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let (event, root) = (v.new, Path::Root);
    let newer = event["eventTime"].is_string();
    let (namespace, involved) = (text(&event["metadata"], "namespace"), text(&event["involvedObject"], "namespace"));
    // Events of objects of the cluster live in `default`.
    let agrees = match (newer, involved.is_empty()) {
        (false, true) => namespace == "default",
        (false, false) => involved == namespace,
        (true, true) => ["default", "kube-system"].contains(&namespace),
        (true, false) => true,
    };
    if !agrees {
        errors.invalid(root.at("involvedObject").at("namespace"), involved, "does not match event.namespace");
    }
    if !newer {
        return;
    }
    let controller = root.at("reportingController");
    let reporting = text(event, "reportingComponent");
    if reporting.is_empty() {
        errors.required(controller, "");
    }
    errors.expect(controller, reporting, names::qualified_name);
    for key in ["reportingInstance", "action", "reason"] {
        if text(event, key).is_empty() {
            errors.required(root.at(key), "");
        }
    }
    for (key, most) in
        [("reportingInstance", MAX_WORD), ("action", MAX_WORD), ("reason", MAX_WORD), ("message", MAX_NOTE)]
    {
        if text(event, key).len() > most {
            errors.invalid(root.at(key), "", format!("can have at most {most} characters"));
        }
    }
}

/// What an event must be besides if it is written as `events.k8s.io/v1`. Fields are called as in the core.
fn strict(v: &Validation<'_>, errors: &mut Errors) {
    let (event, root) = (v.new, Path::Root);
    let Some(old) = v.old else {
        let name = text(&event["metadata"], "name");
        if !name.is_empty() {
            errors.expect(root.at("metadata").at("name"), name, names::dns_subdomain);
        }
        series(event, errors);
        if !event["eventTime"].is_string() {
            errors.required(root.at("eventTime"), "");
        }
        let ty = text(event, "type");
        if !["Normal", "Warning"].contains(&ty) {
            errors.invalid(root.at("type"), "", format!("has invalid value: {ty}"));
        }
        for key in ["firstTimestamp", "lastTimestamp"] {
            if event[key].is_string() {
                errors.invalid(root.at(key), "", "needs to be unset");
            }
        }
        if event["count"].as_i64().unwrap_or_default() != 0 {
            errors.invalid(root.at("count"), "", "needs to be unset");
        }
        let source = &event["source"];
        if !text(source, "component").is_empty() || !text(source, "host").is_empty() {
            errors.invalid(root.at("source"), "", "needs to be unset");
        }
        return;
    };
    if !same(&old["series"], &event["series"]) {
        series(event, errors);
    }
    for key in [
        "involvedObject",
        "reason",
        "message",
        "source",
        "firstTimestamp",
        "lastTimestamp",
        "count",
        "type",
        "eventTime",
        "action",
        "related",
    ] {
        errors.immutable(root.at(key), &old[key], &event[key]);
    }
    errors.immutable(root.at("reportingController"), &old["reportingComponent"], &event["reportingComponent"]);
    errors.immutable(root.at("reportingInstance"), &old["reportingInstance"], &event["reportingInstance"]);
}

fn series(event: &Value, errors: &mut Errors) {
    let series = &event["series"];
    if !series.is_object() {
        return;
    }
    let path = Path::Root.at("series");
    if series["count"].as_i64().unwrap_or_default() < 2 {
        errors.invalid(path.at("count"), "", "should be at least 2");
    }
    if !series["lastObservedTime"].is_string() {
        errors.required(path.at("lastObservedTime"), "");
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{check, check_update, with},
        *,
    };

    fn newer() -> Value {
        json!({"metadata": {"name": "e", "namespace": "shop"}, "involvedObject": {"namespace": "shop"},
            "eventTime": "2026-01-01T00:00:00.000000Z", "reportingComponent": "example.com/c", "reportingInstance": "c-1",
            "action": "Binding", "reason": "Scheduled", "message": "m", "type": "Normal"})
    }

    #[test]
    fn namespaces() {
        let of = |namespace: &str, involved: &str| json!({"metadata": {"namespace": namespace}, "involvedObject": {"namespace": involved}});
        let why = |involved: &str| {
            format!("involvedObject.namespace: Invalid value: {involved:?}: does not match event.namespace")
        };
        check(&row(), of("shop", "shop"), &[]);
        check(&row(), of("default", ""), &[]);
        check(&row(), of("shop", "other"), &[&why("other")]);
        check(&row(), of("shop", ""), &[&why("")]);
        check_update(&row(), of("shop", "shop"), of("shop", "other"), &[&why("other")]);
        let elsewhere = |involved: &str| with(&newer(), "/involvedObject/namespace", involved.into());
        check(&row(), elsewhere("other"), &[]);
        check(&row(), elsewhere(""), &[&why("")]);
    }

    #[test]
    fn newer_events_say_who_did_what() {
        check(&row(), newer(), &[]);
        for (key, value, expect) in [
            ("action", "", "action: Required value"),
            ("reason", "", "reason: Required value"),
            (
                "reportingInstance",
                &*"x".repeat(129),
                "reportingInstance: Invalid value: \"\": can have at most 128 characters",
            ),
            ("message", &*"x".repeat(1025), "message: Invalid value: \"\": can have at most 1024 characters"),
        ] {
            check(&row(), with(&newer(), &format!("/{key}"), value.into()), &[expect]);
        }
        let empty = names::qualified_name("").unwrap_err();
        check(
            &row(),
            with(&newer(), "/reportingComponent", "".into()),
            &["reportingController: Required value", &format!("reportingController: Invalid value: \"\": {empty}")],
        );
        // Older ones need not.
        check(&row(), with(&with(&newer(), "/eventTime", Value::Null), "/action", Value::Null), &[]);
    }

    #[test]
    fn events_of_the_newer_group() {
        let found = |new: &Value, old: Option<&Value>| {
            let mut errors = Errors::default();
            (row().aliases[0].validate)(&Validation { new, old, subresource: "" }, &mut errors);
            errors.0.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(found(&newer(), None).is_empty());
        let mut older = newer();
        for (key, value) in [
            ("eventTime", Value::Null),
            ("type", json!("Other")),
            ("count", json!(1)),
            ("source", json!({"host": "n"})),
            ("lastTimestamp", json!("2026-01-01T00:00:00Z")),
            ("series", json!({"count": 1})),
        ] {
            older[key] = value;
        }
        assert_eq!(
            found(&older, None),
            [
                "series.count: Invalid value: \"\": should be at least 2",
                "series.lastObservedTime: Required value",
                "eventTime: Required value",
                "type: Invalid value: \"\": has invalid value: Other",
                "lastTimestamp: Invalid value: \"\": needs to be unset",
                "count: Invalid value: \"\": needs to be unset",
                "source: Invalid value: \"\": needs to be unset",
            ]
        );
        let again = with(&newer(), "/series", json!({"count": 2, "lastObservedTime": "2026-01-01T00:00:00.000000Z"}));
        assert!(found(&again, Some(&newer())).is_empty());
        assert_eq!(
            found(&with(&newer(), "/message", "other".into()), Some(&newer())),
            ["message: Invalid value: \"other\": field is immutable",]
        );
    }
}
