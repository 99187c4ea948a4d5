use std::{collections::BTreeSet, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use serde_json::{Value, json};

use super::{
    indexes::{format_indexes, parse_indexes},
    new_pod,
    plan::{FAILURES, FINALIZER, IGNORED, INDEX, Plan, condition, plan},
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

    // One that was being deleted was listed as failed, and has succeeded before it was let go of.
    let status = json!({"uncountedTerminatedPods": {"failed": ["a", "b"]}});
    let uncounted = planned(json!({}), status, &["a s", "b f"]).status.uncounted_terminated_pods.unwrap();
    assert_eq!((uncounted.succeeded, uncounted.failed), (Some(vec!["a".into()]), Some(vec!["b".into()])));
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
    assert_eq!((made.status.succeeded, made.release, made.create), (Some(2), vec!["a".into()], vec![]));
    assert_eq!(made.discard, ["c", "d"], "what is too much goes first");
    let made = planned(spec.clone(), json!({"completedIndexes": "0"}), &["a s1", "b r2"]);
    assert_eq!((made.create, made.discard), (vec![Some(3)], vec![]));

    let pod = new_pod(&job(spec, json!({})), Some(3), None);
    assert!(!pod.metadata.annotations.as_ref().unwrap().contains_key(FAILURES));
    assert_eq!(pod.metadata.generate_name.as_deref(), Some("j-3-"));
    let spec = pod.spec.unwrap();
    assert_eq!(spec.hostname.as_deref(), Some("j-3"));
    assert_eq!(spec.containers[0].env.as_ref().unwrap()[0].name, "JOB_COMPLETION_INDEX");
}

/// A pod that failed some seconds ago with an exit code, for an index that has failed so often before.
fn failed(id: &str, index: i32, failures: (i32, i32), code: i32, ago: i64) -> Arc<Pod> {
    let mut pod = Pod::clone(&pod(&format!("{id} f{index}")));
    let annotations = pod.metadata.annotations.as_mut().unwrap();
    annotations.insert(FAILURES.into(), failures.0.to_string());
    annotations.insert(IGNORED.into(), failures.1.to_string());
    let finished = (now() - jiff::SignedDuration::from_secs(ago)).to_string();
    let state = json!({"terminated": {"exitCode": code, "finishedAt": finished}});
    let status = json!([{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state}]);
    pod.status.as_mut().unwrap().container_statuses = serde_json::from_value(status).unwrap();
    Arc::new(pod)
}

fn per_index(more: Value) -> Value {
    let mut spec = json!({"completionMode": "Indexed", "completions": 3, "parallelism": 3, "backoffLimitPerIndex": 1,
        "backoffLimit": i32::MAX});
    json_patch(&mut spec, more);
    spec
}

#[test]
fn every_index_has_its_own_limit() {
    let plan_with = |spec: Value, status: Value, pods: &[Arc<Pod>]| plan(&job(spec, status), pods, now());
    // The first failure is held until the next pod knows of it, and that one waits for a while.
    let first = failed("a", 0, (0, 0), 1, 4);
    let made = plan_with(per_index(json!({})), json!({}), &[first, pod("b r1"), pod("c r2")]);
    assert_eq!((made.release, made.create, made.again), (vec![], vec![], Some(Duration::from_secs(6))));
    assert_eq!((made.status.failed, made.status.failed_indexes.as_deref()), (None, Some("")));
    let first = failed("a", 0, (0, 0), 1, 10);
    let made = plan_with(per_index(json!({})), json!({}), &[first.clone(), pod("b r1"), pod("c r2")]);
    assert_eq!((made.release, made.create), (vec![], vec![Some(0)]));
    assert_eq!(made.failures[&0], (1, 0));
    // Its successor is there: it is counted.
    let second = Arc::new(new_pod(&job(per_index(json!({})), json!({})), Some(0), Some((1, 0))));
    assert_eq!(second.metadata.annotations.as_ref().unwrap()[FAILURES], "1");
    let made = plan_with(per_index(json!({})), json!({}), &[first.clone(), pod("d r0"), pod("b r1"), pod("c r2")]);
    assert_eq!(made.release, ["a"]);
    // The second failure is the last for this index, and the others go on.
    let second = failed("d", 0, (1, 0), 1, 1);
    let made = plan_with(per_index(json!({})), json!({}), &[second.clone(), pod("b r1"), pod("c r2")]);
    assert_eq!(made.status.failed_indexes.as_deref(), Some("0"));
    assert_eq!((made.release, made.create, made.delete), (vec!["d".into()], vec![], vec![]));
    let done = json!({"failedIndexes": "0", "failed": 2});
    let made = plan_with(per_index(json!({})), done.clone(), &[pod("b s1"), pod("c r2")]);
    assert!(made.create.is_empty() && made.status.conditions.is_none());
    let made = plan_with(per_index(json!({})), done.clone(), &[pod("b s1"), pod("c s2")]);
    let cause = condition(&made.status, "FailureTarget").unwrap();
    assert_eq!(cause.reason.as_deref(), Some("FailedIndexes"));
    // So many may fail.
    let made = plan_with(per_index(json!({"maxFailedIndexes": 0})), json!({}), &[second, pod("b r1"), pod("c r2")]);
    let cause = condition(&made.status, "FailureTarget").unwrap();
    assert_eq!(cause.reason.as_deref(), Some("MaxFailedIndexesExceeded"));
    assert_eq!(made.delete, ["b", "c"]);
    // What succeeded in the end has not failed.
    let made = plan_with(per_index(json!({})), json!({}), &[failed("a", 0, (1, 0), 1, 1), pod("d s0")]);
    assert_eq!(
        (made.status.failed_indexes.as_deref(), made.status.completed_indexes.as_deref()),
        (Some(""), Some("0"))
    );
}

#[test]
fn failures_by_policy() {
    let rules = json!({"podFailurePolicy": {"rules": [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42]}},
        {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [7]}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [9]}},
    ]}});
    let with = |code: i32| {
        let pods = [failed("a", 0, (0, 0), code, 20), pod("b r1"), pod("c r2")];
        plan(&job(per_index(rules.clone()), json!({})), &pods, now())
    };
    let cause = condition(&with(42).status, "FailureTarget").unwrap().clone();
    assert_eq!(cause.reason.as_deref(), Some("PodFailurePolicy"));
    assert!(cause.message.unwrap().ends_with("failed with exit code 42 matching FailJob rule at index 0"));
    assert_eq!(with(42).delete, ["b", "c"]);
    assert_eq!(with(7).status.failed_indexes.as_deref(), Some("0"));
    assert_eq!((with(9).create, with(9).failures[&0]), (vec![Some(0)], (0, 1)));
    assert_eq!((with(1).create, with(1).failures[&0]), (vec![Some(0)], (1, 0)));

    // Without indexes: what is ignored is let go of and not counted.
    let policy = rules["podFailurePolicy"].clone();
    let check = |code: i32, listed: bool| {
        let pods = [failed("a", 0, (0, 0), code, 20)];
        let made = plan(&job(json!({"podFailurePolicy": policy}), json!({})), &pods, now());
        let found = made.status.uncounted_terminated_pods.unwrap().failed;
        assert_eq!((found.is_some(), made.release), (listed, vec!["a".into()]), "{code}");
    };
    check(9, false);
    check(1, true);
    // With a policy a pod's end is waited for, since nobody knows yet what it will be.
    let made = planned(json!({"podFailurePolicy": policy}), json!({}), &["a r-", "b r"]);
    assert_eq!((made.release, made.create), (vec![], vec![]));
}

#[test]
fn enough_is_enough() {
    let spec = json!({"completionMode": "Indexed", "completions": 5, "parallelism": 5,
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]}});
    let made = planned(spec.clone(), json!({}), &["a r0", "b s1"]);
    assert!(condition(&made.status, "SuccessCriteriaMet").is_none());
    let made = planned(spec.clone(), json!({}), &["a s0", "b r1"]);
    let cause = condition(&made.status, "SuccessCriteriaMet").unwrap();
    assert_eq!(
        (cause.reason.as_deref(), cause.message.as_deref()),
        (Some("SuccessPolicy"), Some("Matched rules at index 0"))
    );
    assert_eq!((made.delete, made.create), (vec!["b".into()], vec![]));
    let mut status = serde_json::to_value(&made.status).unwrap();
    status["completedIndexes"] = "0".into();
    let made = planned(spec, status, &[]);
    assert_eq!(condition(&made.status, "Complete").unwrap().reason.as_deref(), Some("SuccessPolicy"));
}

#[test]
fn an_indexed_job_can_shrink_and_grow() {
    let spec = |n: i32| json!({"completionMode": "Indexed", "completions": n, "parallelism": n});
    let status = || json!({"completedIndexes": "0,3", "succeeded": 2});
    let made = planned(spec(2), status(), &["a r1", "b r2"]);
    assert_eq!((made.discard, made.status.completed_indexes.as_deref()), (vec!["b".into()], Some("0")));
    let made = planned(spec(6), status(), &["a r1", "b r2"]);
    assert_eq!(made.create, [Some(4), Some(5)]);
}

#[test]
fn no_more_than_so_many_wait_to_be_counted() {
    let pods: Vec<_> = (0..700).map(|n| pod(&format!("p{n} s"))).collect();
    let made = plan(&job(json!({"completions": 1000}), json!({})), &pods, now());
    assert_eq!((made.release.len(), made.again), (500, Some(Duration::ZERO)));
    assert_eq!(made.status.uncounted_terminated_pods.unwrap().succeeded.unwrap().len(), 500);
}
