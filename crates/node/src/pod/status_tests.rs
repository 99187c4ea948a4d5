use serde_json::json;

use super::*;
use crate::pod::{machine::Health, observed::SandboxObs};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn pod(spec: Value) -> Pod {
    serde_json::from_value(
        json!({"metadata": {"name": "p", "namespace": "d", "uid": "u", "generation": 3}, "spec": spec}),
    )
    .unwrap()
}

fn container(name: &str, id: &str, state: State, exit_code: i32) -> ContainerObs {
    ContainerObs {
        id: id.into(),
        name: name.into(),
        sandbox: "s".into(),
        state,
        restart_count: 1,
        hash: String::new(),
        created: at(0),
        started: Some(at(0)),
        finished: (state == State::Exited).then(|| at(1)),
        exit_code,
        reason: String::new(),
        message: String::new(),
        image: "x:1".into(),
        image_id: "sha256:1".into(),
        log_path: String::new(),
        grace: None,
    }
}

fn observed(containers: Vec<ContainerObs>) -> Observed {
    let sandbox = SandboxObs { id: "s".into(), ready: true, attempt: 0, created: at(0), ips: vec!["10.0.0.2".into()] };
    Observed { sandboxes: vec![sandbox], containers, ..Default::default() }
}

fn healthy(ids: &[&str]) -> Facts {
    let mut facts = Facts { start_time: Some(at(0)), ..Default::default() };
    for id in ids {
        facts.health.insert((*id).into(), Health { post_start: true, ..Default::default() });
    }
    facts
}

fn node() -> NodeFacts {
    NodeFacts { host_ips: vec!["192.168.0.1".into()] }
}

fn condition(status: &PodStatus, kind: &str) -> (String, Option<String>, Option<String>) {
    let c = status.conditions.iter().flatten().find(|c| c.type_ == kind).unwrap();
    (c.status.clone(), c.reason.clone(), c.message.clone())
}

#[test]
fn pending_then_running_then_ready() {
    let pod = pod(json!({"containers": [{"name": "a", "readinessProbe": {}}, {"name": "b"}]}));
    let s = status(&pod, &Observed::default(), &healthy(&[]), &node(), at(5));
    assert_eq!(s.phase.as_deref(), Some("Pending"));
    assert_eq!(condition(&s, "PodReadyToStartContainers").0, "False");
    assert_eq!(condition(&s, "Initialized").0, "True");
    let message = Some("containers with unready status: [a b]".to_owned());
    assert_eq!(condition(&s, "Ready"), ("False".into(), Some("ContainersNotReady".into()), message));
    let waiting = s.container_statuses.unwrap()[0].state.clone().unwrap().waiting.unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("ContainerCreating"));

    let o = observed(vec![container("a", "1", State::Running, 0), container("b", "2", State::Running, 0)]);
    let mut f = healthy(&["1", "2"]);
    let s = status(&pod, &o, &f, &node(), at(5));
    assert_eq!((s.phase.as_deref(), s.pod_ip.as_deref()), (Some("Running"), Some("10.0.0.2")));
    assert_eq!(condition(&s, "ContainersReady").2.as_deref(), Some("containers with unready status: [a]"));
    f.health.get_mut("1").unwrap().ready = Some(true);
    let s = status(&pod, &o, &f, &node(), at(6));
    assert_eq!(condition(&s, "Ready").0, "True");
    let c = &s.container_statuses.unwrap()[0];
    assert_eq!(
        (c.ready, c.started, c.restart_count, c.container_id.as_deref()),
        (true, Some(true), 1, Some("containerd://1"))
    );
}

#[test]
fn crash_loop_shows_the_last_exit() {
    let pod = pod(json!({"containers": [{"name": "a"}]}));
    let mut f = healthy(&[]);
    f.backoffs.next("a", at(0), at(0));
    let s = status(&pod, &observed(vec![container("a", "1", State::Exited, 2)]), &f, &node(), at(3));
    assert_eq!(s.phase.as_deref(), Some("Running"));
    let c = &s.container_statuses.unwrap()[0];
    let waiting = c.state.clone().unwrap().waiting.unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("CrashLoopBackOff"));
    assert_eq!(waiting.message.as_deref(), Some("back-off 10s restarting failed container=a pod=p_d(u)"));
    assert_eq!(c.last_state.clone().unwrap().terminated.unwrap().exit_code, 2);
}

#[test]
fn endings() {
    for (policy, code, phase, reason) in [
        ("Never", 0, "Succeeded", "PodCompleted"),
        ("Never", 1, "Failed", "PodFailed"),
        ("OnFailure", 0, "Succeeded", "PodCompleted"),
    ] {
        let pod = pod(json!({"restartPolicy": policy, "containers": [{"name": "a"}]}));
        let s = status(&pod, &observed(vec![container("a", "1", State::Exited, code)]), &healthy(&[]), &node(), at(3));
        assert_eq!(s.phase.as_deref(), Some(phase));
        assert_eq!(condition(&s, "Ready").1.as_deref(), Some(reason));
    }
}

#[test]
fn init_containers_hold_the_phase() {
    let pod = pod(json!({"initContainers": [{"name": "i"}], "containers": [{"name": "a"}]}));
    let s = status(&pod, &observed(vec![container("i", "1", State::Running, 0)]), &healthy(&["1"]), &node(), at(3));
    assert_eq!(s.phase.as_deref(), Some("Pending"));
    assert_eq!(condition(&s, "Initialized").2.as_deref(), Some("containers with incomplete status: [i]"));
    let main = s.container_statuses.unwrap()[0].state.clone().unwrap().waiting.unwrap();
    assert_eq!(main.reason.as_deref(), Some("PodInitializing"));
}

#[test]
fn readiness_gates() {
    let mut pod = pod(json!({"readinessGates": [{"conditionType": "x/y"}], "containers": [{"name": "a"}]}));
    let o = observed(vec![container("a", "1", State::Running, 0)]);
    let s = status(&pod, &o, &healthy(&["1"]), &node(), at(3));
    assert_eq!(condition(&s, "ContainersReady").0, "True");
    assert_eq!(condition(&s, "Ready").1.as_deref(), Some("ReadinessGatesNotReady"));
    pod.status = serde_json::from_value(json!({"conditions": [{"type": "x/y", "status": "True"}]})).unwrap();
    let s = status(&pod, &o, &healthy(&["1"]), &node(), at(3));
    assert_eq!(condition(&s, "Ready").0, "True");
    assert_eq!(condition(&s, "x/y").0, "True");
}

#[test]
fn patches_only_what_changed() {
    let mut pod = pod(json!({"containers": [{"name": "a"}]}));
    let o = observed(vec![container("a", "1", State::Running, 0)]);
    let first = status(&pod, &o, &healthy(&[]), &node(), at(3));
    assert!(patch("u", None, &first).is_some());
    pod.status = Some(serde_json::from_value(serde_json::to_value(&first).unwrap()).unwrap());
    let again = status(&pod, &o, &healthy(&[]), &node(), at(9));
    assert_eq!(patch("u", pod.status.as_ref(), &again), None);
    let ready = status(&pod, &o, &healthy(&["1"]), &node(), at(9));
    let patch = patch("u", pod.status.as_ref(), &ready).unwrap();
    assert_eq!(patch["metadata"]["uid"], "u");
    let types: Vec<_> = patch["status"]["conditions"].as_array().unwrap().iter().map(|c| c["type"].clone()).collect();
    assert_eq!(types, ["Ready", "ContainersReady"]);
    // What no longer holds is taken away.
    assert!(patch["status"]["conditions"][0]["reason"].is_null());
    assert!(patch["status"].get("podIP").is_none());
}

#[test]
fn go_durations() {
    for (seconds, text) in [(10, "10s"), (160, "2m40s"), (300, "5m0s")] {
        assert_eq!(go_duration(std::time::Duration::from_secs(seconds)), text);
    }
}

#[test]
fn last_words_are_kept() {
    let mut pod = pod(json!({"restartPolicy": "Never", "containers": [{"name": "a"}]}));
    let said = ContainerObs { message: "why".into(), ..container("a", "1", State::Exited, 1) };
    pod.status = Some(status(&pod, &observed(vec![said]), &healthy(&[]), &node(), at(3)));
    let later = status(&pod, &observed(vec![container("a", "1", State::Exited, 1)]), &healthy(&[]), &node(), at(9));
    assert_eq!(patch("u", pod.status.as_ref(), &later), None);
}

#[test]
fn the_machine_goes_down() {
    let pod = pod(json!({"containers": [{"name": "a"}]}));
    let running = observed(vec![container("a", "1", State::Running, 0)]);
    let mut f = Facts { leaving: true, ..healthy(&["1"]) };
    let s = status(&pod, &running, &f, &node(), at(5));
    let why = ("False".to_owned(), Some("NodeShutdown".to_owned()), Some("node is shutting down".to_owned()));
    assert_eq!((condition(&s, "Ready"), condition(&s, "ContainersReady")), (why.clone(), why));
    assert_eq!(s.phase.as_deref(), Some("Running"));
    assert!(s.conditions.iter().flatten().all(|c| c.type_ != "DisruptionTarget"));

    let mut known = pod.clone();
    known.status = Some(s);
    // Somebody else has said so already.
    let other = json!({"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"});
    known.status.as_mut().unwrap().conditions.as_mut().unwrap().push(serde_json::from_value(other).unwrap());
    f.leave_within = Some((at(6), std::time::Duration::from_secs(5)));
    f.rejected = Some(("Terminated".into(), shutdown::MESSAGE.into()));
    let s = status(&known, &running, &f, &node(), at(6));
    assert_eq!((s.phase.as_deref(), s.reason.as_deref()), (Some("Running"), Some("Terminated")));
    let expect = ("True".to_owned(), Some("TerminationByKubelet".to_owned()), Some(shutdown::MESSAGE.to_owned()));
    assert_eq!(condition(&s, "DisruptionTarget"), expect);
    assert_eq!(s.conditions.iter().flatten().filter(|c| c.type_ == "DisruptionTarget").count(), 1);
    let patch = patch("u", known.status.as_ref(), &s).unwrap();
    let written: Vec<&str> =
        patch["status"]["conditions"].as_array().unwrap().iter().filter_map(|c| c["type"].as_str()).collect();
    assert_eq!(written, ["DisruptionTarget"]);
    let s = status(&known, &observed(vec![container("a", "1", State::Exited, 0)]), &f, &node(), at(7));
    assert_eq!((s.phase.as_deref(), s.message.as_deref()), (Some("Failed"), Some(shutdown::MESSAGE)));
    assert_eq!(condition(&s, "Ready").1.as_deref(), Some("PodFailed"));
}

#[test]
fn a_pod_that_is_resized_says_how_far_it_is() {
    let resources = |cpu: &str| serde_json::from_value(json!({"requests": {"cpu": cpu}})).unwrap();
    let mut pod = pod(json!({"containers": [{"name": "a", "resources": {"requests": {"cpu": "2"}}}]}));
    let o = observed(vec![container("a", "1", State::Running, 0)]);
    let mut facts = healthy(&["1"]);
    let has = |s: &PodStatus, kind: &str| s.conditions.iter().flatten().any(|c| c.type_ == kind);
    let shown = |s: &PodStatus| {
        let container = s.container_statuses.as_ref().unwrap()[0].clone();
        (container.resources, container.allocated_resources.unwrap()["cpu"].0.clone())
    };
    facts.resize.actuated.insert("1".into(), resources("1"));
    let s = status(&pod, &o, &facts, &node(), at(3));
    assert_eq!(condition(&s, RESIZES), ("True".into(), None, None));
    assert_eq!(shown(&s), (Some(resources("1")), "2".into()));
    facts.resize.error = Some("in use".into());
    facts.resize.pending = Some(("Deferred", "full".into()));
    let s = status(&pod, &o, &facts, &node(), at(3));
    assert_eq!(condition(&s, RESIZES), ("True".into(), Some("Error".into()), Some("in use".into())));
    assert_eq!(condition(&s, WAITS), ("True".into(), Some("Deferred".into()), Some("full".into())));
    // When it is over, both are taken away.
    pod.status = Some(s);
    (facts.resize.error, facts.resize.pending) = (None, None);
    facts.resize.actuated.insert("1".into(), resources("2"));
    let s = status(&pod, &o, &facts, &node(), at(4));
    assert!(!has(&s, RESIZES) && !has(&s, WAITS));
    assert_eq!(shown(&s), (Some(resources("2")), "2".into()));
    let patch = patch("u", pod.status.as_ref(), &s).unwrap();
    let gone = |kind: &str| json!({"$patch": "delete", "type": kind});
    assert_eq!(patch["status"]["conditions"], json!([gone(WAITS), gone(RESIZES)]));
}
