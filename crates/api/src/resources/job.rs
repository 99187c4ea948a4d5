//! Job. What its policies must look like is in `job_policy.rs`, its status in `job_status.rs`.

use k8s_openapi::api::batch::v1::Job;
use serde_json::{Value, json};

use super::{default, drop_status, items, items_mut, job_policy, job_status, meta, template};
use crate::{
    cell,
    field::{Errors, Path, same},
    names,
    row::{Row, Subresource, Validation, col, row as base, wide},
    selector::LabelSelector,
};

/// Pods of one indexed Job that may run at once, and indexes of it that may fail.
const MAX_INDEXED: i64 = 100_000;
/// The same with more completions than that and a limit for each index.
const MAX_MANY: i64 = 10_000;
const MAX_MANAGED_BY: usize = 63;
const UID_LABELS: [&str; 2] = ["controller-uid", "batch.kubernetes.io/controller-uid"];
const NAME_LABELS: [&str; 2] = ["job-name", "batch.kubernetes.io/job-name"];

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
    if object["spec"]["manualSelector"] == true || !object["spec"]["template"].is_object() {
        return;
    }
    let (uid, name) = (object["metadata"]["uid"].clone(), object["metadata"]["name"].clone());
    let spec = &mut object["spec"];
    let template = &mut spec["template"];
    default(template, "metadata", json!({}));
    default(&mut template["metadata"], "labels", json!({}));
    let labels = &mut template["metadata"]["labels"];
    // What the client gave stays, and is refused if it is something else.
    for (keys, value) in [(UID_LABELS, &uid), (NAME_LABELS, &name)] {
        keys.iter().for_each(|key| default(labels, key, value.clone()));
    }
    default(spec, "selector", json!({}));
    default(&mut spec["selector"], "matchLabels", json!({}));
    default(&mut spec["selector"]["matchLabels"], UID_LABELS[1], uid);
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
    job_policy::defaults(spec);
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

/// Validates what a Job and the template of a CronJob have in common.
pub(super) fn validate_spec(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    for key in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ] {
        meta::non_negative(spec, key, path, errors);
    }
    if spec["maxFailedIndexes"].is_number() && spec["backoffLimitPerIndex"].is_null() {
        errors.required(path.at("backoffLimitPerIndex"), "when maxFailedIndexes is specified");
    }
    if let Some(manager) = spec["managedBy"].as_str() {
        errors.expect(path.at("managedBy"), manager, names::domain_prefixed_path);
        if manager.len() > MAX_MANAGED_BY {
            errors.too_long(path.at("managedBy"), MAX_MANAGED_BY);
        }
    }
    if let Some(mode) = spec["completionMode"].as_str().filter(|mode| !["NonIndexed", "Indexed"].contains(mode)) {
        errors.unsupported(path.at("completionMode"), mode, &["NonIndexed", "Indexed"]);
    }
    if spec["completionMode"] == "Indexed" {
        indexed(spec, path, errors);
    } else {
        for key in ["backoffLimitPerIndex", "maxFailedIndexes"] {
            if spec[key].is_number() {
                errors.invalid(path.at(key), spec[key].clone(), "requires indexed completion mode");
            }
        }
    }
    job_policy::validate(spec, path, errors);
    template::validate(spec, path, errors);
    let restart = path.at("template");
    let restart = restart.at("spec");
    let restart = restart.at("restartPolicy");
    match spec["template"]["spec"]["restartPolicy"].as_str().unwrap_or_default() {
        "" | "Always" => errors.required(restart, "valid values: \"OnFailure\", \"Never\""),
        policy @ "OnFailure" if spec["podFailurePolicy"].is_object() => {
            errors.invalid(restart, policy, "only \"Never\" is supported when podFailurePolicy is specified");
        }
        "OnFailure" | "Never" => {}
        other => errors.unsupported(restart, other, &["OnFailure", "Never"]),
    }
}

fn indexed(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let number = |key: &str| spec[key].as_i64();
    let completions = number("completions");
    let too_many = |key: &'static str, most: i64| number(key).filter(|n| *n > most).map(|n| (path.at(key), n));
    if completions.is_none() {
        errors.required(path.at("completions"), "when completion mode is Indexed");
    }
    if let Some((at, n)) = too_many("parallelism", MAX_INDEXED) {
        let why = format!("must be less than or equal to {MAX_INDEXED} when completion mode is Indexed");
        errors.invalid(at, n, why);
    }
    if let Some((at, n)) = too_many("maxFailedIndexes", completions.unwrap_or(i64::MAX)) {
        errors.invalid(at, n, "must be less than or equal to completions");
    }
    if let Some((at, n)) = too_many("maxFailedIndexes", MAX_INDEXED) {
        errors.invalid(at, n, format!("must be less than or equal to {MAX_INDEXED}"));
    }
    if completions.is_some_and(|n| n > MAX_INDEXED) && spec["backoffLimitPerIndex"].is_number() {
        if spec["maxFailedIndexes"].is_null() {
            let why = format!("must be specified when completions is above {MAX_INDEXED}");
            errors.required(path.at("maxFailedIndexes"), &why);
        }
        for key in ["parallelism", "maxFailedIndexes"] {
            if let Some((at, n)) = too_many(key, MAX_MANY) {
                let why = format!(
                    "must be less than or equal to {MAX_MANY} when completions are above {MAX_INDEXED} and used with backoff limit per index"
                );
                errors.invalid(at, n, why);
            }
        }
    }
}

/// Validates that the selector is the one that [`prepare_create`] makes, and that the pods have its labels.
fn generated(job: &Value, errors: &mut Errors) {
    let spec = &job["spec"];
    if spec["manualSelector"] == true || !spec["selector"].is_object() {
        return;
    }
    let labels = &spec["template"]["metadata"]["labels"];
    let mut expected = json!({});
    let path = Path::Root.at("spec");
    for (keys, value) in [(UID_LABELS, &job["metadata"]["uid"]), (NAME_LABELS, &job["metadata"]["name"])] {
        let wanted = value.as_str().unwrap_or_default();
        for key in keys {
            expected[key] = value.clone();
            let why = format!("must be '{wanted}'");
            let (template, metadata) = ("template", "metadata");
            match labels.get(key) {
                None => errors.required(path.at(template).at(metadata).at("labels").key(key), &why),
                Some(found) if found != wanted => {
                    errors.invalid(path.at(template).at(metadata).at("labels").key(key), labels.clone(), why);
                }
                Some(_) => {}
            }
        }
    }
    if LabelSelector::from_value(&spec["selector"]).is_some_and(|selector| !selector.matches_labels(&expected)) {
        errors.invalid(path.at("selector"), spec["selector"].clone(), "`selector` not auto-generated");
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return job_status::validate(v, errors);
    }
    let (job, spec) = (v.new, &v.new["spec"]);
    let path = Path::Root.at("spec");
    if v.old.is_none() {
        generated(job, errors);
    }
    validate_spec(spec, path, errors);
    if spec["selector"].is_object() {
        meta::selector_after(&spec["selector"], v.old.map(|o| &o["spec"]["selector"]), path.at("selector"), errors);
    } else {
        errors.required(path.at("selector"), "");
    }
    template::matches(spec, path, errors);
    let Some(old) = v.old.map(|old| &old["spec"]) else {
        // The pods' host names end in their index.
        if let Some(last) = spec["completions"].as_i64().filter(|n| spec["completionMode"] == "Indexed" && *n > 0) {
            let name = job["metadata"]["name"].as_str().unwrap_or_default();
            let host = format!("{name}-{}", last - 1);
            if names::dns_label(&host).is_err() {
                let why = format!("will not able to create pod with invalid DNS label: {host}");
                errors.invalid(Path::Root.at("metadata").at("name"), name, why);
            }
        }
        return;
    };
    if spec["completionMode"] != "Indexed" {
        errors.immutable(path.at("completions"), &old["completions"], &spec["completions"]);
    } else if spec["completions"].is_number()
        && spec["completions"] != old["completions"]
        && spec["completions"] != spec["parallelism"]
    {
        let why = "can only be modified in tandem with spec.parallelism";
        errors.invalid(path.at("completions"), spec["completions"].clone(), why);
    }
    errors.immutable(path.at("selector"), &old["selector"], &spec["selector"]);
    template_change(v, errors);
    for key in ["completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy"] {
        errors.immutable(path.at(key), &old[key], &spec[key]);
    }
}

/// A template stays as it is, but where its pods may go can be said until the Job has started
/// (<https://kubernetes.io/docs/concepts/workloads/controllers/job/#mutable-scheduling-directives>), and so can what they
/// get.
fn template_change(v: &Validation<'_>, errors: &mut Errors) {
    let Some(old) = v.old else { return };
    let new = &v.new["spec"]["template"];
    let mut was = old["spec"]["template"].clone();
    let suspended = old["spec"]["suspend"] == true && v.new["spec"]["suspend"] == true;
    let pods = ["active", "terminating"].iter().any(|key| old["status"][*key].as_i64().unwrap_or_default() > 0);
    if old["spec"]["suspend"] == true && old["status"]["startTime"].is_null() || suspended && !pods {
        for key in ["labels", "annotations"] {
            was["metadata"][key] = new["metadata"][key].clone();
        }
        for key in ["nodeSelector", "tolerations", "schedulingGates"] {
            was["spec"][key] = new["spec"][key].clone();
        }
        was["spec"]["affinity"]["nodeAffinity"] = new["spec"]["affinity"]["nodeAffinity"].clone();
        for list in ["containers", "initContainers"] {
            for (index, container) in items_mut(&mut was["spec"], list).enumerate() {
                container["resources"] = new["spec"][list][index]["resources"].clone();
            }
        }
    }
    if !same(&was, new) {
        errors.invalid(Path::Root.at("spec").at("template"), new.clone(), "field is immutable");
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{check, check_update, with},
        *,
    };

    fn job() -> Value {
        json!({"metadata": {"name": "j", "uid": "u"}, "spec": {"manualSelector": true, "selector": {"matchLabels": {"a": "b"}},
            "template": {"metadata": {"labels": {"a": "b"}},
                "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}})
    }

    fn with_spec(changes: Value) -> Value {
        let mut job = job();
        for (key, value) in changes.as_object().unwrap() {
            job["spec"][key] = value.clone();
        }
        job
    }

    #[test]
    fn what_a_job_must_be() {
        for (changes, expect) in [
            (json!({}), &[][..]),
            (json!({"parallelism": -1}), &["spec.parallelism: Invalid value: -1: must be greater than or equal to 0"]),
            (
                json!({"completionMode": "Some"}),
                &["spec.completionMode: Unsupported value: \"Some\": supported values: \"NonIndexed\", \"Indexed\""],
            ),
            (
                json!({"completionMode": "Indexed", "parallelism": 1}),
                &["spec.completions: Required value: when completion mode is Indexed"],
            ),
            (
                json!({"completionMode": "Indexed", "completions": 3, "backoffLimitPerIndex": 1, "maxFailedIndexes": 2}),
                &[],
            ),
            (
                json!({"completionMode": "Indexed", "completions": 3, "maxFailedIndexes": 4}),
                &[
                    "spec.backoffLimitPerIndex: Required value: when maxFailedIndexes is specified",
                    "spec.maxFailedIndexes: Invalid value: 4: must be less than or equal to completions",
                ],
            ),
            (
                json!({"completionMode": "Indexed", "completions": 200_000, "backoffLimitPerIndex": 1}),
                &["spec.maxFailedIndexes: Required value: must be specified when completions is above 100000"],
            ),
            (
                json!({"completionMode": "Indexed", "completions": 1, "parallelism": 100_001}),
                &[
                    "spec.parallelism: Invalid value: 100001: must be less than or equal to 100000 when completion mode is Indexed",
                ],
            ),
            (
                json!({"backoffLimitPerIndex": 1}),
                &["spec.backoffLimitPerIndex: Invalid value: 1: requires indexed completion mode"],
            ),
            (json!({"managedBy": "example.com/it"}), &[]),
            (
                json!({"managedBy": "it"}),
                &["spec.managedBy: Invalid value: \"it\": must be a domain-prefixed path (such as \"acme.io/foo\")"],
            ),
            (json!({"selector": null}), &["spec.selector: Required value"]),
            (
                json!({"selector": {"matchLabels": {"a": "c"}}}),
                &[
                    "spec.template.metadata.labels: Invalid value: {\"a\":\"b\"}: `selector` does not match template `labels`",
                ],
            ),
        ] {
            check(&row(), with_spec(changes), expect);
        }
        for (policy, expect) in [
            ("OnFailure", &[][..]),
            ("Always", &["spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\""]),
        ] {
            check(&row(), with(&job(), "/spec/template/spec/restartPolicy", policy.into()), expect);
        }
    }

    #[test]
    fn the_selector_is_made() {
        let given = |spec: Value| {
            let mut job = with(&with(&job(), "/spec/manualSelector", Value::Null), "/spec/selector", spec);
            prepare_create(&mut job);
            job
        };
        check(&row(), given(Value::Null), &[]);
        assert_eq!(
            given(Value::Null)["spec"]["selector"],
            json!({"matchLabels": {"batch.kubernetes.io/controller-uid": "u"}})
        );
        check(
            &row(),
            given(json!({"matchLabels": {"a": "b"}})),
            &[
                "spec.selector: Invalid value: {\"matchLabels\":{\"a\":\"b\",\"batch.kubernetes.io/controller-uid\":\"u\"}}: `selector` not auto-generated",
            ],
        );
        let other = with(&given(Value::Null), "/spec/template/metadata/labels/job-name", "x".into());
        let labels = other["spec"]["template"]["metadata"]["labels"].to_string();
        let expect = format!("spec.template.metadata.labels[job-name]: Invalid value: {labels}: must be 'j'");
        check(&row(), other, &[&expect]);
    }

    #[test]
    fn names_leave_room_for_the_index() {
        let name = "n".repeat(62);
        let mut long = with_spec(json!({"completionMode": "Indexed", "completions": 2}));
        long["metadata"]["name"] = name.as_str().into();
        let expect = format!(
            "metadata.name: Invalid value: {name:?}: will not able to create pod with invalid DNS label: {name}-1"
        );
        check(&row(), long, &[&expect]);
    }

    #[test]
    fn what_may_change() {
        let images = with(&job(), "/spec/template/spec/containers/0/image", "k".into());
        for (changes, expect) in [
            (json!({"parallelism": 2, "suspend": true, "activeDeadlineSeconds": 9}), &[][..]),
            (json!({"completions": 2}), &["spec.completions: Invalid value: 2: field is immutable"]),
            (
                json!({"completionMode": "Indexed"}),
                &["spec.completionMode: Invalid value: \"Indexed\": field is immutable"],
            ),
            (json!({"managedBy": "a.b/c"}), &["spec.managedBy: Invalid value: \"a.b/c\": field is immutable"]),
        ] {
            let old = with_spec(json!({"completions": 1}));
            let mut new = old.clone();
            for (key, value) in changes.as_object().unwrap() {
                new["spec"][key] = value.clone();
            }
            check_update(&row(), old, new, expect);
        }
        let mut defaulted = images.clone();
        defaults(&mut defaulted);
        let why = format!("spec.template: Invalid value: {}: field is immutable", defaulted["spec"]["template"]);
        check_update(&row(), job(), images, &[&why]);
        let indexed =
            |n: i64, p: i64| with_spec(json!({"completionMode": "Indexed", "completions": n, "parallelism": p}));
        check_update(&row(), indexed(1, 1), indexed(3, 3), &[]);
        let apart = ["spec.completions: Invalid value: 3: can only be modified in tandem with spec.parallelism"];
        check_update(&row(), indexed(1, 1), indexed(3, 1), &apart);
    }

    #[test]
    fn a_suspended_job_can_be_directed() {
        let pinned = |job: &Value| with(job, "/spec/template/spec/nodeSelector", json!({"a": "b"}));
        let waiting = with_spec(json!({"suspend": true}));
        check_update(&row(), waiting.clone(), pinned(&waiting), &[]);
        let mut started = waiting.clone();
        started["status"] = json!({"startTime": "2026-01-01T00:00:00Z", "active": 1});
        let mut refused = pinned(&waiting);
        defaults(&mut refused);
        let why = format!("spec.template: Invalid value: {}: field is immutable", refused["spec"]["template"]);
        check_update(&row(), started, refused, &[&why]);
    }
}
