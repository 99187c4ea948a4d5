//! StatefulSet.

use k8s_openapi::api::apps::v1::StatefulSet;
use serde_json::{Value, json};

use super::{
    claim, default,
    deployment::{at_most_all, count_or_percent, is_none},
    drop_status, items_mut, meta, template,
};
use crate::{
    cell,
    field::{Errors, Path, same},
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
    for template in items_mut(spec, "volumeClaimTemplates") {
        claim::defaults(template);
        default(template, "apiVersion", "v1");
        default(template, "kind", "PersistentVolumeClaim");
    }
    if let Some(template) = spec.get_mut("template") {
        template::defaults(template);
    }
}

fn update_strategy(strategy: &Value, path: Path<'_>, errors: &mut Errors) {
    let rolling = &strategy["rollingUpdate"];
    let at = path.at("rollingUpdate");
    match strategy["type"].as_str().unwrap_or_default() {
        "" => errors.required(path, ""),
        "RollingUpdate" => {
            meta::non_negative(rolling, "partition", at, errors);
            count_or_percent(rolling, "maxUnavailable", at, errors);
            if is_none(&rolling["maxUnavailable"]) {
                errors.invalid(at.at("maxUnavailable"), rolling["maxUnavailable"].clone(), "cannot be 0");
            }
            at_most_all(rolling, "maxUnavailable", at, errors);
        }
        "OnDelete" if rolling.is_object() => {
            errors.invalid(at, rolling.clone(), "only allowed for updateStrategy 'RollingUpdate'");
        }
        "OnDelete" => {}
        _ => errors.invalid(path, strategy.clone(), "must be 'RollingUpdate' or 'OnDelete'"),
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return;
    }
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    for key in ["replicas", "minReadySeconds", "revisionHistoryLimit"] {
        meta::non_negative(spec, key, path, errors);
    }
    match spec["podManagementPolicy"].as_str().unwrap_or_default() {
        "" => errors.required(path.at("podManagementPolicy"), ""),
        "OrderedReady" | "Parallel" => {}
        other => errors.invalid(path.at("podManagementPolicy"), other, "must be 'OrderedReady' or 'Parallel'"),
    }
    update_strategy(&spec["updateStrategy"], path.at("updateStrategy"), errors);
    let retention = &spec["persistentVolumeClaimRetentionPolicy"];
    for key in ["whenDeleted", "whenScaled"] {
        meta::one_of(retention, key, &["Delete", "Retain"], path.at("persistentVolumeClaimRetentionPolicy"), errors);
    }
    meta::non_negative(&spec["ordinals"], "start", path.at("ordinals"), errors);
    template::selects(spec, "statefulset", path, errors);
    template::validate(spec, path, errors);
    template::runs_for_ever(spec, "StatefulSet", path, errors);
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
        if !same(&rest(spec), &rest(&old["spec"])) {
            errors.forbidden(path, "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{check, check_update, with},
        *,
    };

    fn good() -> Value {
        json!({"spec": {"serviceName": "s", "selector": {"matchLabels": {"a": "b"}},
            "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}})
    }

    #[test]
    fn what_a_stateful_set_must_be() {
        for (key, value, expect) in [
            ("podManagementPolicy", json!("Parallel"), &[][..]),
            (
                "podManagementPolicy",
                json!("Some"),
                &["spec.podManagementPolicy: Invalid value: \"Some\": must be 'OrderedReady' or 'Parallel'"],
            ),
            ("updateStrategy", json!({"type": "OnDelete"}), &[]),
            (
                "updateStrategy",
                json!({"type": "Some"}),
                &["spec.updateStrategy: Invalid value: {\"type\":\"Some\"}: must be 'RollingUpdate' or 'OnDelete'"],
            ),
            (
                "updateStrategy",
                json!({"type": "OnDelete", "rollingUpdate": {"partition": 1}}),
                &[
                    "spec.updateStrategy.rollingUpdate: Invalid value: {\"partition\":1}: only allowed for updateStrategy 'RollingUpdate'",
                ],
            ),
            (
                "updateStrategy",
                json!({"rollingUpdate": {"partition": -1, "maxUnavailable": 0}}),
                &[
                    "spec.updateStrategy.rollingUpdate.partition: Invalid value: -1: must be greater than or equal to 0",
                    "spec.updateStrategy.rollingUpdate.maxUnavailable: Invalid value: 0: cannot be 0",
                ],
            ),
            (
                "persistentVolumeClaimRetentionPolicy",
                json!({"whenScaled": "Keep"}),
                &[
                    "spec.persistentVolumeClaimRetentionPolicy.whenScaled: Unsupported value: \"Keep\": supported values: \"Delete\", \"Retain\"",
                ],
            ),
            (
                "ordinals",
                json!({"start": -1}),
                &["spec.ordinals.start: Invalid value: -1: must be greater than or equal to 0"],
            ),
            ("selector", json!({}), &["spec.selector: Invalid value: {}: empty selector is invalid for statefulset"]),
        ] {
            check(&row(), with(&good(), &format!("/spec/{key}"), value), expect);
        }
    }

    #[test]
    fn what_may_change() {
        for (key, value) in [("replicas", json!(3)), ("ordinals", json!({"start": 1})), ("minReadySeconds", json!(2))] {
            check_update(&row(), good(), with(&good(), &format!("/spec/{key}"), value), &[]);
        }
        let why = "spec: Forbidden: updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";
        for (key, value) in [("serviceName", json!("t")), ("podManagementPolicy", json!("Parallel"))] {
            check_update(&row(), good(), with(&good(), &format!("/spec/{key}"), value), &[why]);
        }
    }
}
