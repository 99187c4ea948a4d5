//! Job and CronJob.

use k8s_openapi::api::batch::v1::{CronJob, Job};
use serde_json::{Value, json};

use super::{default, drop_status, items, meta, template};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Row, Subresource, Validation, col, row as base, wide},
};

pub(super) fn row() -> Row {
    Row {
        categories: &["all"],
        subresources: &[Subresource::Status],
        columns: const {
            &[
                col("Status", "string"),
                col("Completions", "string"),
                col("Duration", "string"),
                col("Age", "date"),
                wide("Containers", "string"),
                wide("Images", "string"),
                wide("Selector", "string"),
            ]
        },
        cells: |o, now| {
            let (spec, status) = (&o["spec"], &o["status"]);
            let (names, images) = cell::containers(&spec["template"]["spec"]);
            let succeeded = cell::int(&status["succeeded"]);
            let completions = match (spec["completions"].as_i64(), spec["parallelism"].as_i64().unwrap_or(1)) {
                (Some(n), _) => format!("{succeeded}/{n}"),
                (None, p) if p > 1 => format!("{succeeded}/1 of {p}"),
                (None, _) => format!("{succeeded}/1"),
            };
            let end = status["completionTime"].as_str().and_then(|t| t.parse().ok()).unwrap_or(now);
            let duration = match status["startTime"].is_string() {
                true => cell::since(&status["startTime"], end),
                false => "".into(),
            };
            let condition = |ty: &str| items(status, "conditions").any(|c| c["type"] == ty && c["status"] == "True");
            let word = if condition("Complete") {
                "Complete"
            } else if condition("Failed") {
                "Failed"
            } else if o["metadata"]["deletionTimestamp"].is_string() {
                "Terminating"
            } else if condition("Suspended") {
                "Suspended"
            } else if condition("FailureTarget") {
                "FailureTarget"
            } else if condition("SuccessCriteriaMet") {
                "SuccessCriteriaMet"
            } else {
                "Running"
            };
            vec![
                word.into(),
                completions.into(),
                duration,
                cell::age(o, now),
                names,
                images,
                cell::selector(&spec["selector"]),
            ]
        },
        selectable: &["status.successful"],
        defaults,
        validate,
        prepare_create,
        generation: true,
        ..base::<Job>()
    }
}

/// Gives the job and its pods the labels that the selector looks for, unless the client chose its own
/// (<https://kubernetes.io/docs/concepts/workloads/controllers/job/#specifying-your-own-pod-selector>).
fn prepare_create(object: &mut Value) {
    drop_status(object);
    if object["spec"]["manualSelector"] == true {
        return;
    }
    let (uid, name) = (object["metadata"]["uid"].clone(), object["metadata"]["name"].clone());
    let spec = &mut object["spec"];
    if spec["selector"].is_object() || !spec["template"].is_object() {
        return;
    }
    let template = &mut spec["template"];
    default(template, "metadata", json!({}));
    default(&mut template["metadata"], "labels", json!({}));
    let labels = &mut template["metadata"]["labels"];
    for (key, value) in [
        ("controller-uid", &uid),
        ("job-name", &name),
        ("batch.kubernetes.io/controller-uid", &uid),
        ("batch.kubernetes.io/job-name", &name),
    ] {
        default(labels, key, value.clone());
    }
    spec["selector"] = json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}});
}

fn spec_defaults(spec: &mut Value) {
    // Without both, a Job runs one pod to completion; with parallelism alone it is a work queue.
    if spec["completions"].is_null() && spec["parallelism"].is_null() {
        default(spec, "completions", 1);
    }
    default(spec, "parallelism", 1);
    default(spec, "backoffLimit", if spec["backoffLimitPerIndex"].is_null() { 6 } else { i32::MAX });
    default(spec, "completionMode", "NonIndexed");
    default(spec, "suspend", false);
    let policy = if spec["podFailurePolicy"].is_object() { "Failed" } else { "TerminatingOrFailed" };
    default(spec, "podReplacementPolicy", policy);
    if let Some(template) = spec.get_mut("template") {
        template::defaults(template);
    }
}

fn defaults(object: &mut Value) {
    let Some(spec) = object.get_mut("spec") else { return };
    spec_defaults(spec);
    let labels = spec["template"]["metadata"]["labels"].clone();
    if labels.is_object() && object["metadata"]["labels"].is_null() {
        object["metadata"]["labels"] = labels;
    }
}

fn validate_spec(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    for key in ["parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"] {
        meta::non_negative(spec, key, path, errors);
    }
    meta::one_of(spec, "completionMode", &["NonIndexed", "Indexed"], path, errors);
    if spec["completionMode"] == "Indexed" && spec["completions"].is_null() {
        errors.required(path.at("completions"), "when completion mode is Indexed");
    }
    template::validate(spec, path, &["OnFailure", "Never"], errors);
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    validate_spec(spec, path, errors);
    if let Some(old) = v.old {
        errors.immutable(path.at("selector"), &old["spec"]["selector"], &spec["selector"]);
        errors.immutable(path.at("completionMode"), &old["spec"]["completionMode"], &spec["completionMode"]);
        let indexed = spec["completionMode"] == "Indexed" && spec["completions"] == spec["parallelism"];
        if !indexed {
            errors.immutable(path.at("completions"), &old["spec"]["completions"], &spec["completions"]);
        }
        let suspended = old["spec"]["suspend"] == true && old["status"]["startTime"].is_null();
        if !suspended {
            errors.immutable(path.at("template"), &old["spec"]["template"], &spec["template"]);
        }
    }
}

pub(super) fn cron_job() -> Row {
    Row {
        short_names: &["cj"],
        categories: &["all"],
        subresources: &[Subresource::Status],
        columns: const {
            &[
                col("Schedule", "string"),
                col("Timezone", "string"),
                col("Suspend", "boolean"),
                col("Active", "integer"),
                col("Last Schedule", "string"),
                col("Age", "date"),
                wide("Containers", "string"),
                wide("Images", "string"),
                wide("Selector", "string"),
            ]
        },
        cells: |o, now| {
            let spec = &o["spec"];
            let (names, images) = cell::containers(&spec["jobTemplate"]["spec"]["template"]["spec"]);
            let last = &o["status"]["lastScheduleTime"];
            vec![
                cell::plain(&spec["schedule"]),
                cell::text(&spec["timeZone"]),
                if spec["suspend"] == true { "True".into() } else { "False".into() },
                cell::count(&o["status"]["active"]),
                if last.is_string() { cell::since(last, now) } else { "<none>".into() },
                cell::age(o, now),
                names,
                images,
                cell::selector(&spec["jobTemplate"]["spec"]["selector"]),
            ]
        },
        defaults: |o| {
            let Some(spec) = o.get_mut("spec") else { return };
            default(spec, "concurrencyPolicy", "Allow");
            default(spec, "suspend", false);
            default(spec, "successfulJobsHistoryLimit", 3);
            default(spec, "failedJobsHistoryLimit", 1);
            if let Some(template) = spec.get_mut("jobTemplate").and_then(|t| t.get_mut("spec")) {
                // A CronJob's template is not completed as a Job is: only its pods are.
                if let Some(template) = template.get_mut("template") {
                    template::defaults(template);
                }
            }
        },
        validate: |v, errors| {
            let spec = &v.new["spec"];
            let path = Path::Root.at("spec");
            let fields = spec["schedule"].as_str().unwrap_or_default();
            if fields.is_empty() {
                errors.required(path.at("schedule"), "");
            } else if !fields.starts_with('@') && fields.split_whitespace().count() != 5 {
                let found = fields.split_whitespace().count();
                errors.invalid(
                    path.at("schedule"),
                    fields,
                    format!("expected exactly 5 fields, found {found}: [{fields}]"),
                );
            }
            meta::one_of(spec, "concurrencyPolicy", &["Allow", "Forbid", "Replace"], path, errors);
            let at = path.at("jobTemplate");
            validate_spec(&spec["jobTemplate"]["spec"], at.at("spec"), errors);
        },
        prepare_create: drop_status,
        generation: true,
        ..base::<CronJob>()
    }
}
