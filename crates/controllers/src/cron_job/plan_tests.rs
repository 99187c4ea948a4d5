use jiff::Timestamp;
use serde_json::{Value, json};

use super::*;

fn at(time: &str) -> Timestamp {
    // On the first of January, if no day is said.
    let day = if time.contains('T') { "" } else { "01T" };
    format!("2026-01-{day}{time}Z").parse().unwrap()
}

fn cron(spec: Value, status: Value) -> CronJob {
    let mut full = json!({"schedule": "*/10 * * * *", "concurrencyPolicy": "Allow",
        "jobTemplate": {"metadata": {"labels": {"a": "1"}, "annotations": {"b": "2"}}, "spec": {"template": {"spec": {"containers": []}}}}});
    for (key, value) in spec.as_object().unwrap() {
        full[key] = value.clone();
    }
    let meta = json!({"name": "c", "namespace": "n", "uid": "c", "creationTimestamp": "2026-01-01T00:00:00Z"});
    serde_json::from_value(json!({"metadata": meta, "spec": full, "status": status})).unwrap()
}

/// A Job that runs, or has ended so at this time.
fn job(name: &str, end: Option<(&str, &str)>) -> Arc<Job> {
    let mut status = json!({"startTime": at("00:10:00").to_string()});
    if let Some((end, when)) = end {
        status["startTime"] = at(when).to_string().into();
        status["conditions"] = json!([{"type": end, "status": "True"}]);
        if end == "Complete" {
            status["completionTime"] = at(when).to_string().into();
        }
    }
    let meta = json!({"name": name, "namespace": "n", "uid": name});
    Arc::new(serde_json::from_value(json!({"metadata": meta, "status": status})).unwrap())
}

fn active(names: &[&str]) -> Value {
    let list: Vec<Value> = names.iter().map(|name| json!({"kind": "Job", "name": name, "uid": name})).collect();
    json!({"active": list, "lastScheduleTime": at("00:10:00").to_string()})
}

fn planned(cron: &CronJob, jobs: &[Arc<Job>], now: &str) -> Plan {
    plan(cron, jobs, &BTreeSet::new(), at(now))
}

fn reasons(plan: &Plan) -> Vec<&str> {
    plan.notes.iter().map(|(_, reason, _)| *reason).collect()
}

#[test]
fn a_job_is_made_when_its_time_comes() {
    let check =
        |spec: Value, last: Option<&str>, now: &str, expect: Option<&str>, again: Option<&str>, notes: &[&str]| {
            let status = last.map_or(json!({}), |last| json!({"lastScheduleTime": at(last).to_string()}));
            let made = planned(&cron(spec.clone(), status), &[], now);
            assert_eq!(made.scheduled, expect.map(at), "{spec} {last:?} {now}");
            assert_eq!(made.create.is_some(), expect.is_some());
            let wait = again.map(|again| {
                Duration::try_from(at(again).duration_since(at(now))).unwrap() + Duration::from_millis(100)
            });
            assert_eq!(made.again, wait, "{spec} {last:?} {now}");
            assert_eq!(reasons(&made), notes, "{spec} {last:?} {now}");
        };
    check(json!({}), None, "00:09:59", None, Some("00:10:00"), &[]);
    check(json!({}), None, "00:10:00", Some("00:10:00"), Some("00:20:00"), &[]);
    check(json!({}), None, "00:19:00", Some("00:10:00"), Some("00:20:00"), &[]);
    check(json!({}), None, "00:25:00", Some("00:20:00"), Some("00:30:00"), &[]);
    check(json!({}), Some("00:10:00"), "00:15:00", None, Some("00:20:00"), &[]);
    check(json!({}), Some("00:10:00"), "03:05:00", Some("03:00:00"), Some("03:10:00"), &[]);
    check(json!({}), Some("00:10:00"), "20:05:00", Some("20:00:00"), Some("20:10:00"), &["TooManyMissedTimes"]);
    check(json!({"suspend": true}), None, "00:10:00", None, None, &[]);
    check(json!({"startingDeadlineSeconds": 60}), None, "00:10:59", Some("00:10:00"), Some("00:20:00"), &[]);
    check(json!({"startingDeadlineSeconds": 60}), None, "00:11:01", None, Some("00:20:00"), &[]);
    check(
        json!({"startingDeadlineSeconds": 600}),
        Some("00:10:00"),
        "20:05:00",
        Some("20:00:00"),
        Some("20:10:00"),
        &[],
    );
    check(json!({"timeZone": "Mars/Base"}), None, "00:10:00", None, None, &["UnknownTimeZone"]);
    check(json!({"schedule": "61 * * * *"}), None, "00:10:00", None, None, &["UnparseableSchedule"]);
    // Two times close together and then none for long: the guess is far beyond the last of them.
    check(
        json!({"schedule": "1,2 1 * * *"}),
        Some("00:30:00"),
        "23:00:00",
        Some("01:02:00"),
        Some("02T01:01:00"),
        &["TooManyMissedTimes"],
    );
}

#[test]
fn names_and_annotations_say_the_time() {
    let made = planned(&cron(json!({}), json!({})), &[], "00:10:03").create.unwrap();
    assert_eq!(name(&*made), format!("c-{}", at("00:10:00").as_second() / 60));
    assert_eq!(made.metadata.labels.as_ref().unwrap()["a"], "1");
    let annotations = made.metadata.annotations.unwrap();
    assert_eq!(annotations["b"], "2");
    assert_eq!(annotations["batch.kubernetes.io/cronjob-scheduled-timestamp"], "2026-01-01T00:10:00Z");
    assert_eq!(
        controller_of(&*planned(&cron(json!({}), json!({})), &[], "00:10:03").create.unwrap()).unwrap().uid,
        "c"
    );
    let local = planned(&cron(json!({"timeZone": "Asia/Kolkata"}), json!({})), &[], "00:10:03").create.unwrap();
    let when = &local.metadata.annotations.as_ref().unwrap()["batch.kubernetes.io/cronjob-scheduled-timestamp"];
    assert_eq!(when, "2026-01-01T05:40:00+05:30");
}

#[test]
fn one_that_still_runs() {
    let check = |policy: &str, created: bool, deleted: &[&str], left: usize, notes: &[&str]| {
        let cron = cron(json!({"concurrencyPolicy": policy}), active(&["old"]));
        let made = planned(&cron, &[job("old", None)], "00:20:00");
        let names: Vec<_> = made.delete.iter().map(|job| name(&**job)).collect();
        assert_eq!(
            (made.create.is_some(), names, reasons(&made)),
            (created, deleted.to_vec(), notes.to_vec()),
            "{policy}"
        );
        assert_eq!(made.status.active.map_or(0, |list| list.len()), left, "{policy}");
    };
    check("Allow", true, &[], 1, &[]);
    check("Forbid", false, &[], 1, &["JobAlreadyActive"]);
    check("Replace", true, &["old"], 0, &[]);
    // What was made for this very time is not made again.
    let name = format!("c-{}", at("00:20:00").as_second() / 60);
    let mut status = active(&[&name]);
    status["lastScheduleTime"] = at("00:10:00").to_string().into();
    assert!(planned(&cron(json!({}), status), &[job(&name, None)], "00:20:00").create.is_none());
}

#[test]
fn what_has_ended_is_noted_and_kept_for_a_while() {
    let jobs = [
        job("s1", Some(("Complete", "00:01:00"))),
        job("s2", Some(("Complete", "00:03:00"))),
        job("s3", Some(("Complete", "00:02:00"))),
        job("f1", Some(("Failed", "00:04:00"))),
        job("f2", Some(("Failed", "00:05:00"))),
        job("stranger", None),
    ];
    let limits = json!({"successfulJobsHistoryLimit": 1, "failedJobsHistoryLimit": 1});
    let made = planned(&cron(limits, active(&["s2", "f2"])), &jobs, "00:12:00");
    let names: Vec<_> = made.delete.iter().map(|job| name(&**job)).collect();
    assert_eq!(names, ["s1", "s3", "f1"]);
    assert_eq!(reasons(&made), ["SawCompletedJob", "SawCompletedJob", "UnexpectedJob"]);
    assert_eq!(made.status.active, None);
    assert_eq!(made.status.last_successful_time.unwrap().0, at("00:03:00"));
    let unlimited = planned(&cron(json!({}), json!({})), &jobs, "00:05:00");
    assert!(unlimited.delete.is_empty());
}

#[test]
fn a_job_that_is_gone_is_asked_for() {
    let cron = cron(json!({}), active(&["a", "b"]));
    let jobs = [job("a", None)];
    let missing: Vec<_> = plan::missing(&cron, &jobs).into_iter().map(|r| r.name.unwrap()).collect();
    assert_eq!(missing, ["b"]);
    let made = plan(&cron, &jobs, &BTreeSet::new(), at("00:12:00"));
    assert_eq!(made.status.active.as_ref().unwrap().len(), 2, "the cache alone is not believed");
    let made = plan(&cron, &jobs, &BTreeSet::from(["b".to_owned()]), at("00:12:00"));
    assert_eq!((made.status.active.as_ref().unwrap().len(), reasons(&made)), (1, vec!["MissingJob"]));
}
