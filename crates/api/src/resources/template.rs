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
        validate: |v, errors| validate(v.new, Path::Root, errors),
        ..row::<PodTemplate>()
    }
}

pub(super) fn defaults(template: &mut Value) {
    if let Some(spec) = template.get_mut("spec") {
        pod_spec::defaults(spec);
    }
}

/// Validates a template.
pub(super) fn validate(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let template = &spec["template"];
    let path = path.at("template");
    if !template["spec"].is_object() {
        errors.required(path.at("spec"), "");
        return;
    }
    meta::labels(&template["metadata"], path.at("metadata"), errors);
    meta::annotations(&template["metadata"], path, errors);
    let at = path.at("spec");
    pod_spec::validate(&template["spec"], at, errors);
    if super::items(&template["spec"], "ephemeralContainers").next().is_some() {
        errors.forbidden(at.at("ephemeralContainers"), "ephemeral containers not allowed in pod template");
    }
}

/// Validates that the pods of a template run for ever, as those of `kind` do.
pub(super) fn runs_for_ever(spec: &Value, kind: &str, path: Path<'_>, errors: &mut Errors) {
    let pod = &spec["template"]["spec"];
    let at = path.at("template");
    let at = at.at("spec");
    if !pod.is_object() {
        return;
    }
    let policy = pod["restartPolicy"].as_str().unwrap_or_default();
    if policy != "Always" {
        errors.not_supported(at.at("restartPolicy"), policy, &["Always"]);
    }
    if !pod["activeDeadlineSeconds"].is_null() {
        let why = format!("activeDeadlineSeconds in {kind} is not Supported");
        errors.forbidden(at.at("activeDeadlineSeconds"), why);
    }
}

/// Validates `spec.selector`, which must be set, and that it selects the template's pods. `kind` is as upstream says it.
pub(super) fn selects(spec: &Value, kind: &str, path: Path<'_>, errors: &mut Errors) {
    let selector = &spec["selector"];
    if !selector.is_object() {
        errors.required(path.at("selector"), "");
        return;
    }
    meta::selector(selector, path.at("selector"), errors);
    if LabelSelector::from_value(selector).is_some_and(|selector| selector.is_empty()) {
        errors.invalid(path.at("selector"), selector.clone(), format!("empty selector is invalid for {kind}"));
    }
    matches(spec, path, errors);
}

/// Validates that `spec.selector` selects the template's pods.
pub(super) fn matches(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let labels = &spec["template"]["metadata"]["labels"];
    if LabelSelector::from_value(&spec["selector"]).is_some_and(|selector| !selector.matches_labels(labels)) {
        let at = path.at("template");
        let why = "`selector` does not match template `labels`";
        errors.invalid(at.at("metadata").at("labels"), labels.clone(), why);
    }
}
