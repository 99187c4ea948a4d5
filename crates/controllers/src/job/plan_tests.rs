use std::{collections::BTreeSet, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use serde_json::{Value, json};

use super::{
    new_pod,
    plan::{FINALIZER, INDEX, Plan, condition, format_indexes, parse_indexes, plan},
};

fn now() -> Timestamp {
    "2026-01-01T01:00:00Z".parse().unwrap()
}

fn job(spec: Value, status: Value) -> Job {
    let mut full = json!({"parallelism": 2, "completions": 3, "backoffLimit": 1, "template": {"spec": {"containers": [{"name": "c"}]}}});
    json_patch(&mut full, spec);
    let mut started = json!({"startTime": "2026-01-01T00:59:00Z"});
    json_patch(&mut started, status);
    serde_json::from_value(json!({"metadata": {"name": "j", "uid": "j"}, "spec": full, "status": started})).unwrap()
}

fn json_patch(to: &mut Value, from: Value) {
    for (key, value) in from.as_object().unwrap() {
        to[key] = value.clone();
    }
}

/// `what` is a uid, a phase's first letter (`r`, `s`, `f`), marks (`-` deleting, `!` counted), and an index at the end.
fn pod(what: &str) -> Arc<Pod> {
    let (id, rest) = what.split_once(' ').unwrap();
    let phase = match rest.as_bytes()[0] {
        b'r' => "Running",
        b's' => "Succeeded",
        _ => "Failed",
    };
    let mut meta = json!({"name": id, "uid": id, "annotations": {}, "creationTimestamp": "2026-01-01T00:00:00Z"});
    if !rest.contains('!') {
        meta["finalizers"] = json!([FINALIZER]);
    }
    if rest.contains('-') {
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    }
    let digits: String = rest.chars().filter(char::is_ascii_digit).collect();
    if !digits.is_empty() {
        meta["annotations"][INDEX] = digits.into();
    }
    Arc::new(serde_json::from_value(json!({"metadata": meta, "status": {"phase": phase}})).unwrap())
}

fn planned(spec: Value, status: Value, pods: &[&str]) -> Plan {
    let pods: Vec<_> = pods.iter().map(|what| pod(what)).collect();
    plan(&job(spec, status), &pods, now())
}

#[test]
fn as_many_pods_as_are_wanted() {
    let check = |spec: Value, pods: &[&str], create: usize, discard: &[&str]| {
        let made = planned(spec.clone(), json!({}), pods);
        assert_eq!(
            (made.create.len(), made.discard),
            (create, discard.iter().map(|s| s.to_string()).collect()),
            "{spec} {pods:?}"
        );
    };
    check(json!({}), &[], 2, &[]);
    check(json!({}), &["a r"], 1, &[]);
    check(json!({}), &["a r", "b s"], 1, &[]);
    check(json!({}), &["a s", "b s"], 1, &[]);
    check(json!({}), &["a r", "b s", "c s"], 0, &[]);
    check(json!({"parallelism": 1}), &["a r", "b r"], 0, &["b"]);
    check(json!({"completions": null}), &["a r", "b s"], 0, &[]);
    check(json!({"suspend": true}), &["a r"], 0, &["a"]);
    check(json!({}), &["a r", "b r-"], 1, &[]);
    check(json!({"podReplacementPolicy": "Failed"}), &["a r", "b r-"], 0, &[]);
}

#[test]
fn nothing_is_counted_twice_or_lost() {
    let made = planned(json!({}), json!({}), &["a s", "b f"]);
    let uncounted = made.status.uncounted_terminated_pods.clone().unwrap();
    assert_eq!((uncounted.succeeded, uncounted.failed), (Some(vec!["a".into()]), Some(vec!["b".into()])));
    assert_eq!((made.status.succeeded, made.status.failed), (None, None));
    assert_eq!(made.release, ["a", "b"]);

    let status = json!({"uncountedTerminatedPods": {"succeeded": ["a", "gone"], "failed": ["b"]}});
    let made = planned(json!({}), status.clone(), &["a s", "b f"]);
    assert_eq!(made.status.succeeded, Some(1), "only what is gone is counted");
    assert_eq!(made.release, ["a", "b"], "it was not released yet");
    let made = planned(json!({}), status, &["a s!", "b f!"]);
    assert_eq!((made.status.succeeded, made.status.failed), (Some(2), Some(1)));
    assert!(made.status.uncounted_terminated_pods.unwrap().succeeded.is_none());
    assert!(made.release.is_empty());
}

#[test]
fn how_it_ends() {
    let check = |spec: Value, status: Value, pods: &[&str], expect: &[(&str, &str)]| {
        let made = planned(spec.clone(), status, pods);
        let conditions: Vec<_> =
            made.status.conditions.iter().flatten().map(|c| (c.type_.as_str(), c.reason.as_deref().unwrap())).collect();
        assert_eq!(conditions, expect, "{spec} {pods:?}");
        made
    };
    let reached = ("SuccessCriteriaMet", "CompletionsReached");
    check(json!({}), json!({"succeeded": 2}), &["a r"], &[]);
    check(json!({}), json!({"succeeded": 2}), &["a s"], &[reached]);
    let made = check(json!({}), json!({"succeeded": 3}), &[], &[reached, ("Complete", "CompletionsReached")]);
    assert!(made.status.completion_time.is_some());
    check(json!({"completions": null}), json!({}), &["a s", "b r"], &[]);
    check(json!({"completions": null}), json!({}), &["a s"], &[reached]);
    check(json!({}), json!({"failed": 1}), &["a r"], &[]);
    let limit = ("FailureTarget", "BackoffLimitExceeded");
    let made = check(json!({}), json!({"failed": 1}), &["a r", "b f"], &[limit]);
    assert_eq!(made.delete, ["a"]);
    check(json!({}), json!({"failed": 2}), &["a r-!"], &[limit]);
    check(json!({}), json!({"failed": 2}), &[], &[limit, ("Failed", "BackoffLimitExceeded")]);
    let late = ("FailureTarget", "DeadlineExceeded");
    check(json!({"activeDeadlineSeconds": 60}), json!({}), &["a r"], &[late]);
    let made = check(json!({"activeDeadlineSeconds": 70}), json!({}), &["a r", "b r"], &[]);
    assert_eq!(made.again, Some(Duration::from_secs(10)));
    check(json!({"suspend": true}), json!({}), &[], &[("Suspended", "JobSuspended")]);
    let finished =
        json!({"conditions": [{"type": "Complete", "status": "True", "lastTransitionTime": "2026-01-01T00:59:50Z"}]});
    let made = planned(json!({"ttlSecondsAfterFinished": 15}), finished.clone(), &["a s"]);
    assert_eq!((made.expired, made.again, made.release), (false, Some(Duration::from_secs(5)), vec!["a".into()]));
    assert!(planned(json!({"ttlSecondsAfterFinished": 10}), finished.clone(), &[]).expired);
    assert!(!planned(json!({}), finished.clone(), &[]).expired);
    assert!(condition(&planned(json!({}), finished, &[]).status, "Complete").is_some());
}

#[test]
fn failures_slow_it_down() {
    let check = |seconds_ago: &[i64], success: Option<i64>, expect: Option<u64>| {
        let at = |phase: &str, ago: i64| {
            let mut pod = Pod::clone(&pod(&format!("{phase}{ago} {}!", &phase[..1])));
            let finished = (now() - jiff::SignedDuration::from_secs(ago)).to_string();
            let state = json!({"terminated": {"exitCode": 1, "finishedAt": finished}});
            let status =
                json!([{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state}]);
            pod.status.as_mut().unwrap().container_statuses = serde_json::from_value(status).unwrap();
            Arc::new(pod)
        };
        let pods: Vec<_> = seconds_ago.iter().map(|ago| at("f", *ago)).chain(success.map(|ago| at("s", ago))).collect();
        let made = plan(&job(json!({"backoffLimit": 100}), json!({})), &pods, now());
        assert_eq!(made.again, expect.map(Duration::from_secs), "{seconds_ago:?}");
        assert_eq!(made.create.is_empty(), expect.is_some());
    };
    check(&[], None, None);
    check(&[4], None, Some(6));
    check(&[11], None, None);
    check(&[30, 4], None, Some(16));
    check(&[1, 2, 3, 4, 5, 6, 7, 8, 9], None, Some(359));
    check(&[30, 4], Some(10), Some(6));
    check(&[30, 4], Some(2), None);
}

#[test]
fn indexes() {
    let check = |text: &str, set: &[i32]| {
        let set: BTreeSet<i32> = set.iter().copied().collect();
        assert_eq!(parse_indexes(text, 100), set);
        assert_eq!(format_indexes(&set), text);
    };
    check("", &[]);
    check("0", &[0]);
    check("0,1,3-5,9", &[0, 1, 3, 4, 5, 9]);
    assert_eq!(parse_indexes("0-2000000000", 2).len(), 2, "no more than there are");

    let spec = json!({"completionMode": "Indexed", "parallelism": 3, "completions": 4});
    let made = planned(spec.clone(), json!({"completedIndexes": "0"}), &["a s1", "b r2", "c r2", "d r9"]);
    assert_eq!(made.status.completed_indexes.as_deref(), Some("0,1"));
    assert_eq!((made.status.succeeded, made.release, made.create), (Some(2), vec!["a".into()], vec![Some(3)]));
    assert_eq!(made.discard, ["c", "d"]);

    let pod = new_pod(&job(spec, json!({})), Some(3));
    assert_eq!(pod.metadata.generate_name.as_deref(), Some("j-3-"));
    let spec = pod.spec.unwrap();
    assert_eq!(spec.hostname.as_deref(), Some("j-3"));
    assert_eq!(spec.containers[0].env.as_ref().unwrap()[0].name, "JOB_COMPLETION_INDEX");
}
