//! StatefulSet.

use k8s_openapi::api::apps::v1::StatefulSet;
use serde_json::{Value, json};

use super::{default, drop_status, items_mut, meta, storage, template};
use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Subresource, Validation, col, row as base, wide},
};

pub(super) fn row() -> Row {
    Row {
        short_names: &["sts"],
        categories: &["all"],
        subresources: &[Subresource::Status, Subresource::Scale],
        // Pod names carry the set's name and a number.
        name: names::dns_subdomain,
        columns: const {
            &[col("Ready", "string"), col("Age", "date"), wide("Containers", "string"), wide("Images", "string")]
        },
        cells: |o, now| {
            let (names, images) = cell::containers(&o["spec"]["template"]["spec"]);
            let ready = format!("{}/{}", cell::int(&o["status"]["readyReplicas"]), cell::int(&o["spec"]["replicas"]));
            vec![ready.into(), cell::age(o, now), names, images]
        },
        defaults,
        validate,
        prepare_create: drop_status,
        generation: true,
        ..base::<StatefulSet>()
    }
}

fn defaults(object: &mut Value) {
    let Some(spec) = object.get_mut("spec") else { return };
    default(spec, "replicas", 1);
    default(spec, "podManagementPolicy", "OrderedReady");
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "updateStrategy", json!({}));
    default(&mut spec["updateStrategy"], "type", "RollingUpdate");
    if spec["updateStrategy"]["type"] == "RollingUpdate" {
        default(&mut spec["updateStrategy"], "rollingUpdate", json!({}));
        default(&mut spec["updateStrategy"]["rollingUpdate"], "partition", 0);
    }
    default(spec, "persistentVolumeClaimRetentionPolicy", json!({}));
    let retention = &mut spec["persistentVolumeClaimRetentionPolicy"];
    default(retention, "whenDeleted", "Retain");
    default(retention, "whenScaled", "Retain");
    for claim in items_mut(spec, "volumeClaimTemplates") {
        storage::claim_defaults(claim);
        default(claim, "apiVersion", "v1");
        default(claim, "kind", "PersistentVolumeClaim");
    }
    if let Some(template) = spec.get_mut("template") {
        template::defaults(template);
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    meta::non_negative(spec, "replicas", path, errors);
    meta::non_negative(spec, "minReadySeconds", path, errors);
    meta::one_of(spec, "podManagementPolicy", &["OrderedReady", "Parallel"], path, errors);
    meta::one_of(&spec["updateStrategy"], "type", &["RollingUpdate", "OnDelete"], path.at("updateStrategy"), errors);
    template::selects(spec, path, errors);
    template::validate(spec, path, &["Always"], errors);
    if let Some(old) = v.old {
        const MUTABLE: &[&str] = &[
            "replicas",
            "ordinals",
            "template",
            "updateStrategy",
            "revisionHistoryLimit",
            "persistentVolumeClaimRetentionPolicy",
            "minReadySeconds",
        ];
        let rest = |spec: &Value| {
            let mut spec = spec.clone();
            if let Some(spec) = spec.as_object_mut() {
                spec.retain(|key, _| !MUTABLE.contains(&key.as_str()));
            }
            spec
        };
        if rest(spec) != rest(&old["spec"]) {
            errors.forbidden(path, "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden");
        }
    }
}
