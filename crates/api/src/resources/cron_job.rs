//! CronJob (<https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/>).

use k8s_openapi::api::batch::v1::CronJob;
use serde_json::Value;

use super::{default, drop_status, job, meta, template};
use crate::{
    cell,
    cron::{self, Schedule},
    field::{Errors, Path},
    row::{Row, Subresource, Validation, col, row as base, wide},
};

/// The names of its Jobs end in a dash and ten digits, and must be labels.
const MAX_NAME: usize = 52;

pub(super) fn row() -> Row {
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
        validate,
        prepare_create: drop_status,
        generation: true,
        ..base::<CronJob>()
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.subresource == "status" {
        return;
    }
    let spec = &v.new["spec"];
    let old = v.old.map(|old| &old["spec"]);
    let path = Path::Root.at("spec");
    schedule(spec, old, path, errors);
    meta::non_negative(spec, "startingDeadlineSeconds", path, errors);
    if old.is_none_or(|old| old["timeZone"] != spec["timeZone"])
        && let Some(zone) = spec["timeZone"].as_str()
    {
        time_zone(zone, path.at("timeZone"), errors);
    }
    match spec["concurrencyPolicy"].as_str().unwrap_or_default() {
        "" => errors.required(path.at("concurrencyPolicy"), ""),
        _ => meta::one_of(spec, "concurrencyPolicy", &["Allow", "Forbid", "Replace"], path, errors),
    }
    let template = &spec["jobTemplate"]["spec"];
    let at = path.at("jobTemplate");
    let at = at.at("spec");
    job::validate_spec(template, at, errors);
    if !template["selector"].is_null() {
        errors.invalid(at.at("selector"), template["selector"].clone(), "`selector` will be auto-generated");
    }
    if template["manualSelector"] == true {
        errors.unsupported(at.at("manualSelector"), true, &["nil", "false"]);
    }
    for key in ["successfulJobsHistoryLimit", "failedJobsHistoryLimit"] {
        meta::non_negative(spec, key, path, errors);
    }
    let name = v.new["metadata"]["name"].as_str().unwrap_or_default();
    if old.is_none() && name.len() > MAX_NAME {
        let why = format!("must be no more than {MAX_NAME} characters");
        errors.invalid(Path::Root.at("metadata").at("name"), name, why);
    }
}

fn schedule(spec: &Value, old: Option<&Value>, path: Path<'_>, errors: &mut Errors) {
    let at = path.at("schedule");
    let text = spec["schedule"].as_str().unwrap_or_default();
    if text.is_empty() {
        errors.required(at, "");
        return;
    }
    errors.expect(at, text, |text| Schedule::parse(text).map(drop));
    let had_zone = old.is_some_and(|old| old["schedule"].as_str().is_some_and(|old| old.contains("TZ")));
    if text.contains("TZ") && !had_zone {
        errors.invalid(at, text, "cannot use TZ or CRON_TZ in schedule, use timeZone field instead");
    } else if text.contains("TZ") && spec["timeZone"].is_string() {
        errors.invalid(at, text, "cannot use both timeZone field and TZ or CRON_TZ in schedule");
    }
}

fn time_zone(zone: &str, path: Path<'_>, errors: &mut Errors) {
    let known = |c: u8| c.is_ascii_alphanumeric() || b".-_+".contains(&c);
    let part = |part: &str| {
        (1..=14).contains(&part.len())
            && part != "."
            && part != ".."
            && !part.starts_with('-')
            && part.bytes().all(known)
    };
    if zone.is_empty() {
        errors.invalid(path, zone, "timeZone must be nil or non-empty string");
    } else if !zone.split('/').all(part) {
        errors.invalid(path, zone, format!("unknown time zone {zone}"));
    } else if zone.eq_ignore_ascii_case("Local") {
        let why = "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones";
        errors.invalid(path, zone, why);
    } else {
        errors.expect(path, zone, cron::known_zone);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_update, with},
        *,
    };

    fn good() -> Value {
        json!({"metadata": {"name": "c"}, "spec": {"schedule": "*/5 * * * *", "jobTemplate": {"spec": {"template": {
            "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}}}})
    }

    #[test]
    fn what_a_cron_job_must_be() {
        for (key, value, expect) in [
            ("schedule", json!("@daily"), &[][..]),
            ("schedule", json!(null), &["spec.schedule: Required value"]),
            (
                "schedule",
                json!("* * *"),
                &["spec.schedule: Invalid value: \"* * *\": expected exactly 5 fields, found 3: [* * *]"],
            ),
            (
                "schedule",
                json!("CRON_TZ=UTC 0 * * * *"),
                &[
                    "spec.schedule: Invalid value: \"CRON_TZ=UTC 0 * * * *\": cannot use TZ or CRON_TZ in schedule, use timeZone field instead",
                ],
            ),
            ("timeZone", json!("Europe/Zurich"), &[]),
            ("timeZone", json!("Etc/GMT+5"), &[]),
            ("timeZone", json!(""), &["spec.timeZone: Invalid value: \"\": timeZone must be nil or non-empty string"]),
            (
                "timeZone",
                json!("Mars/Base"),
                &["spec.timeZone: Invalid value: \"Mars/Base\": unknown time zone Mars/Base"],
            ),
            ("timeZone", json!("../etc"), &["spec.timeZone: Invalid value: \"../etc\": unknown time zone ../etc"]),
            (
                "timeZone",
                json!("local"),
                &[
                    "spec.timeZone: Invalid value: \"local\": timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones",
                ],
            ),
            (
                "concurrencyPolicy",
                json!("Queue"),
                &[
                    "spec.concurrencyPolicy: Unsupported value: \"Queue\": supported values: \"Allow\", \"Forbid\", \"Replace\"",
                ],
            ),
            (
                "startingDeadlineSeconds",
                json!(-1),
                &["spec.startingDeadlineSeconds: Invalid value: -1: must be greater than or equal to 0"],
            ),
            ("failedJobsHistoryLimit", json!(0), &[]),
            (
                "failedJobsHistoryLimit",
                json!(-1),
                &["spec.failedJobsHistoryLimit: Invalid value: -1: must be greater than or equal to 0"],
            ),
        ] {
            check(&row(), with(&good(), &format!("/spec/{key}"), value), expect);
        }
        check(
            &row(),
            with(&good(), "/spec/jobTemplate/spec/selector", json!({"matchLabels": {"a": "b"}})),
            &[
                "spec.jobTemplate.spec.selector: Invalid value: {\"matchLabels\":{\"a\":\"b\"}}: `selector` will be auto-generated",
            ],
        );
        check(
            &row(),
            with(&good(), "/spec/jobTemplate/spec/backoffLimit", json!(-2)),
            &["spec.jobTemplate.spec.backoffLimit: Invalid value: -2: must be greater than or equal to 0"],
        );
        let name = "n".repeat(53);
        let expect = format!("metadata.name: Invalid value: {name:?}: must be no more than 52 characters");
        check(&row(), with(&good(), "/metadata/name", name.into()), &[&expect]);
    }

    #[test]
    fn what_was_allowed_stays() {
        let zoned = with(&good(), "/spec/schedule", "TZ=UTC 0 * * * *".into());
        check_update(&row(), zoned.clone(), with(&zoned, "/spec/suspend", true.into()), &[]);
        check_update(
            &row(),
            zoned.clone(),
            with(&zoned, "/spec/timeZone", "UTC".into()),
            &[
                "spec.schedule: Invalid value: \"TZ=UTC 0 * * * *\": cannot use both timeZone field and TZ or CRON_TZ in schedule",
            ],
        );
        let gone = with(&good(), "/spec/timeZone", "Mars/Base".into());
        check_update(&row(), gone.clone(), with(&gone, "/spec/suspend", true.into()), &[]);
        check_update(
            &row(),
            good(),
            gone,
            &["spec.timeZone: Invalid value: \"Mars/Base\": unknown time zone Mars/Base"],
        );
        let long = with(&good(), "/metadata/name", "n".repeat(53).into());
        check_update(&row(), long.clone(), long, &[]);
    }
}
