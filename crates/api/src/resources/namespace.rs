//! Namespace.

use k8s_openapi::api::core::v1::Namespace;
use serde_json::json;

use super::default;
use crate::{
    cell, names,
    row::{Row, Subresource, col, row as base},
};

pub(super) fn row() -> Row {
    Row {
        short_names: &["ns"],
        subresources: &[Subresource::Status, Subresource::Finalize],
        name: names::dns_label,
        columns: const { &[col("Status", "string"), col("Age", "date")] },
        cells: |o, now| vec![cell::plain(&o["status"]["phase"]), cell::age(o, now)],
        selectable: &["status.phase"],
        defaults: |o| {
            // So that a selector can name a namespace (KEP-2161).
            let name = o["metadata"]["name"].clone();
            if name.is_string() {
                default(&mut o["metadata"], "labels", json!({}));
                o["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
            }
        },
        prepare_create: |o| {
            default(o, "spec", json!({}));
            o["spec"]["finalizers"] = json!(["kubernetes"]);
            o["status"] = json!({"phase": "Active"});
        },
        prepare_update: |new, old| {
            // Only `/finalize` changes them.
            new["spec"]["finalizers"] = old["spec"]["finalizers"].clone();
        },
        ..base::<Namespace>()
    }
}
