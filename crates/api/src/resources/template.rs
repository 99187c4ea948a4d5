//! Pod templates: what Deployments, Jobs and the others carry.

use k8s_openapi::api::core::v1::PodTemplate;
use serde_json::Value;

use super::{meta, pod_spec};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Row, col, row},
    selector::LabelSelector,
};

pub(super) fn pod_template() -> Row {
    Row {
        columns: const { &[col("Containers", "string"), col("Images", "string"), col("Pod Labels", "string")] },
        cells: |o, _| {
            let (names, images) = cell::containers(&o["template"]["spec"]);
            vec![names, images, cell::labels(&o["template"]["metadata"]["labels"])]
        },
        defaults: |o| {
            if let Some(template) = o.get_mut("template") {
                defaults(template);
            }
        },
        ..row::<PodTemplate>()
    }
}

pub(super) fn defaults(template: &mut Value) {
    if let Some(spec) = template.get_mut("spec") {
        pod_spec::defaults(spec);
    }
}

/// Validates a template and that the selector of its owner picks it.
pub(super) fn validate(spec: &Value, path: Path<'_>, restart: &[&str], errors: &mut Errors) {
    let template = &spec["template"];
    let path = path.at("template");
    if !template["spec"].is_object() {
        errors.required(path.at("spec"), "");
        return;
    }
    meta::labels(&template["metadata"], path.at("metadata"), errors);
    pod_spec::validate(&template["spec"], path.at("spec"), errors);
    let policy = template["spec"]["restartPolicy"].as_str().unwrap_or_default();
    if !restart.contains(&policy) {
        let at = path.at("spec");
        errors.not_supported(at.at("restartPolicy"), policy, restart);
    }
}

/// Validates `spec.selector` against `spec.template.metadata.labels`.
pub(super) fn selects(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let selector = &spec["selector"];
    if !selector.is_object() {
        errors.required(path.at("selector"), "");
        return;
    }
    meta::selector(selector, path.at("selector"), errors);
    match LabelSelector::from_value(selector) {
        Some(s) if s.is_empty() => {
            errors.invalid(path.at("selector"), selector.clone(), "empty selector is invalid for deployment")
        }
        Some(s) if !s.matches_labels(&spec["template"]["metadata"]["labels"]) => {
            let at = path.at("template");
            let at = at.at("metadata");
            errors.invalid(
                at.at("labels"),
                spec["template"]["metadata"]["labels"].clone(),
                "`selector` does not match template `labels`",
            );
        }
        _ => {}
    }
}
