//! Tables, as `kubectl get` shows them
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/#receiving-resources-as-tables>).
//!
//! A row carries an object's metadata as it stands in the object's bytes, and only what cells look at is read.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use http::Response;
use jiff::Timestamp;
use seawall_api::Row;
use seawall_store::Revision;
use serde_json::{Value, json};

use super::{Body, Encoder, Include, Media, SLICE_ROOM, metadata, pieces};
use crate::{cache::EventType, object::Object};

/// Cuts rows out of objects' bytes.
#[derive(Clone)]
struct Cutter {
    row: Row,
    /// The first cell is the name.
    named: bool,
    /// Whether rows carry metadata.
    metadata: bool,
    now: Timestamp,
}

impl Cutter {
    /// Appends a row.
    fn put(&self, object: &Object, revision: Revision, out: &mut BytesMut) {
        let mut cells: Vec<Value> = self.named.then(|| object.name().into()).into_iter().collect();
        cells.extend(self.row.row_cells(&object.lean(&self.row), self.now));
        out.put_slice(b"{\"cells\":");
        out.put_slice(Value::from(cells).to_string().as_bytes());
        if self.metadata {
            out.put_slice(
                b",\"object\":{\"apiVersion\":\"meta.k8s.io/v1\",\"kind\":\"PartialObjectMetadata\",\"metadata\":",
            );
            object.write_metadata(revision, out);
            out.put_slice(b"}}");
        } else {
            out.put_slice(b",\"object\":null}");
        }
    }
}

impl Encoder<'_> {
    /// Whether rows of a table can be cut from an object's bytes.
    pub(super) fn is_cut(&self) -> bool {
        let plain = self.form.media == Media::Json && self.served.alias.is_none();
        plain && matches!(self.include, Include::Nothing | Include::Metadata)
    }

    fn cutter(&self) -> Cutter {
        let metadata = self.include == Include::Metadata;
        Cutter { row: self.row.clone(), named: self.named_first(), metadata, now: self.now }
    }

    /// A table of what the cache holds, a piece at a time.
    pub(super) fn stream_table(&self, objects: Vec<Arc<Object>>, meta: Value) -> Response<Body> {
        let (before, after) = around_rows(&self.table(Vec::new(), meta, true));
        let mut out = BytesMut::with_capacity(SLICE_ROOM);
        out.put_slice(before.as_bytes());
        let cutter = self.cutter();
        let put = move |object: &Object, out: &mut BytesMut| cutter.put(object, object.revision, out);
        pieces(out, objects, put, after + "\n")
    }

    /// A change as a table of one row.
    pub(super) fn table_event(&self, ty: EventType, object: &Object, revision: Revision, with_columns: bool) -> Bytes {
        let table = self.table(Vec::new(), json!({"resourceVersion": revision.to_string()}), with_columns);
        let (before, after) = around_rows(&json!({"type": ty.name(), "object": table}));
        let mut out = BytesMut::with_capacity(before.len() + object.bytes.len());
        out.put_slice(before.as_bytes());
        self.cutter().put(object, revision, &mut out);
        out.put_slice(after.as_bytes());
        out.put_slice(b"\n");
        out.freeze()
    }

    pub(super) fn table(&self, rows: Vec<Value>, mut meta: Value, with_columns: bool) -> Value {
        if let Some(meta) = meta.as_object_mut() {
            meta.retain(|_, v| !v.is_null());
        }
        let columns = if with_columns { self.columns() } else { Value::Null };
        json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": meta, "columnDefinitions": columns, "rows": rows})
    }

    fn columns(&self) -> Value {
        let name = self.named_first().then(|| {
            json!({"name": "Name", "type": "string", "format": "name", "priority": 0, "description": "The name, unique within a namespace."})
        });
        if let Some(version) = &self.row.custom {
            let own = version.columns.iter().map(|c| {
                let (ty, format) = if c.ty == "date" { ("string", "") } else { (&*c.ty, &*c.format) };
                let description = match &*c.description {
                    "" => format!("Custom resource definition column (in JSONPath format): {}", c.source),
                    text => text.to_owned(),
                };
                json!({"name": c.name, "type": ty, "format": format, "priority": c.priority, "description": description})
            });
            return name.into_iter().chain(own).collect();
        }
        let rest = self.row.columns.iter().map(|c| {
            // An age is computed here, so that it is a text and not a date.
            let ty = if c.ty == "date" { "string" } else { c.ty };
            json!({"name": c.name, "type": ty, "format": "", "priority": c.priority, "description": c.name})
        });
        name.into_iter().chain(rest).collect()
    }

    /// Whether a table starts with the name; a row may place it elsewhere, as events do.
    fn named_first(&self) -> bool {
        !self.row.columns.iter().any(|c| c.name == "Name")
    }

    pub(super) fn table_row(&self, object: Value) -> Value {
        let mut cells: Vec<Value> =
            self.named_first().then(|| object["metadata"]["name"].clone()).into_iter().collect();
        cells.extend(self.row.row_cells(&object, self.now));
        let carried = match self.include {
            Include::Nothing => Value::Null,
            Include::Metadata => metadata(&object),
            Include::Object => self.convert(object),
        };
        json!({"cells": cells, "object": carried})
    }
}

/// What stands before and behind the rows of a table that has none yet.
fn around_rows(table: &Value) -> (String, String) {
    const MARK: &str = "\"rows\":[";
    let mut before = table.to_string();
    // The quotes of what was written into a text have something before them.
    let after = before.find(MARK).map(|at| before.split_off(at + MARK.len())).unwrap_or_default();
    (before, after)
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::select};
    use seawall_api::resources;

    use super::*;
    use crate::lean;

    /// One of these values, or none at all.
    fn field(name: &'static str, values: Vec<Value>) -> impl Strategy<Value = (String, Value)> {
        prop_oneof![Just(Value::Null), select(values)].prop_map(move |value| (name.to_owned(), value))
    }

    fn object(fields: Vec<impl Strategy<Value = (String, Value)>>) -> impl Strategy<Value = Value> {
        fields.prop_map(|fields| Value::Object(fields.into_iter().filter(|(_, value)| !value.is_null()).collect()))
    }

    fn statuses(name: &'static str) -> impl Strategy<Value = Value> {
        let ended = json!({"exitCode": 3, "finishedAt": "2026-01-01T00:00:00Z", "signal": 0});
        let states = vec![
            json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}),
            json!({"waiting": {"reason": "CrashLoopBackOff", "message": "m"}}),
            json!({"waiting": {"reason": "PodInitializing"}}),
            json!({"terminated": ended}),
            json!({"terminated": {"exitCode": 0, "reason": "Completed"}}),
            json!({"terminated": {"exitCode": 137, "signal": 9}}),
        ];
        let one = object(vec![
            field("name", vec![name.into()]),
            field("ready", vec![true.into(), false.into()]),
            field("started", vec![true.into()]),
            field("restartCount", vec![0.into(), 2.into()]),
            field("state", states.clone()),
            field("lastState", states),
        ]);
        prop::collection::vec(one, 0..3).prop_map(Value::from)
    }

    fn pod() -> impl Strategy<Value = Value> {
        let condition = object(vec![
            field("type", ["PodScheduled", "Initialized", "Ready", "a/b"].map(Value::from).to_vec()),
            field("status", vec!["True".into(), "False".into()]),
            field("reason", vec!["SchedulingGated".into(), "Other".into()]),
        ]);
        let status = object(vec![
            field("phase", ["Pending", "Running", "Succeeded", "Failed"].map(Value::from).to_vec()),
            field("reason", vec!["NodeLost".into(), "Evicted".into()]),
            field("podIP", vec!["10.0.0.7".into()]),
            field("nominatedNodeName", vec!["other".into()]),
        ]);
        let spec = object(vec![
            field("nodeName", vec!["n".into()]),
            field("readinessGates", vec![json!([{"conditionType": "a/b"}])]),
            field(
                "containers",
                vec![json!([{"name": "c", "image": "i", "env": []}]), json!([{"name": "c"}, {"name": "d"}])],
            ),
            field(
                "initContainers",
                vec![
                    json!([{"name": "i", "image": "i"}]),
                    json!([{"name": "i", "restartPolicy": "Always"}, {"name": "j"}]),
                ],
            ),
        ]);
        let metadata = object(vec![
            field("creationTimestamp", vec!["2026-01-01T00:00:00Z".into()]),
            field("deletionTimestamp", vec!["2026-01-01T00:01:00Z".into()]),
            field("managedFields", vec![json!([{"manager": "m", "fieldsV1": {"f:status": {}}}])]),
        ]);
        let conditions = prop::collection::vec(condition, 0..4);
        (metadata, spec, status, conditions, statuses("c"), statuses("i")).prop_map(
            |(metadata, spec, mut status, conditions, containers, init)| {
                status["conditions"] = conditions.into();
                status["containerStatuses"] = containers;
                status["initContainerStatuses"] = init;
                json!({"metadata": metadata, "spec": spec, "status": status})
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Cells that look at something that is not read would be wrong without anyone noticing.
        #[test]
        fn the_cells_of_pods_look_at_nothing_else(pod in pod()) {
            let row = resources::all().into_iter().find(|row| row.is_core("pods")).unwrap();
            let now = "2026-01-01T01:00:00Z".parse().unwrap();
            let lean = lean::read(pod.to_string().as_bytes(), row.seen).unwrap();
            prop_assert_eq!(row.row_cells(&lean, now), row.row_cells(&pod, now));
        }
    }

    #[test]
    fn rows_have_their_place() {
        let table = json!({"columnDefinitions": [{"description": "\"rows\":[ is no place"}], "rows": []});
        let (before, after) = around_rows(&table);
        assert_eq!(format!("{before}{after}"), table.to_string());
        assert!(before.ends_with("],\"rows\":[") && after == "]}", "{before} {after}");
    }
}
