use serde_json::{Value, json};

use super::*;
use crate::pod::observed::SandboxObs;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn pod(spec: Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "d", "uid": "u"}, "spec": spec})).unwrap()
}

fn deleted(mut pod: Pod, grace: i64) -> Pod {
    pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(grace)));
    pod.metadata.deletion_grace_period_seconds = Some(grace);
    pod
}

fn facts() -> Facts {
    Facts { node_ready: true, prepared: true, start_time: Some(at(0)), ..Default::default() }
}

fn sandbox(id: &str, ready: bool, attempt: u32) -> SandboxObs {
    SandboxObs { id: id.into(), ready, attempt, created: at(0), ips: vec!["10.0.0.2".into()] }
}

fn container(name: &str, state: State, exit_code: i32) -> ContainerObs {
    ContainerObs {
        id: format!("{name}-0"),
        name: name.into(),
        sandbox: "s".into(),
        state,
        restart_count: 0,
        hash: String::new(),
        created: at(0),
        started: Some(at(0)),
        finished: (state == State::Exited).then(|| at(1)),
        exit_code,
        reason: String::new(),
        message: String::new(),
        image: String::new(),
        image_id: String::new(),
        log_path: String::new(),
        grace: None,
    }
}

fn observed(containers: Vec<ContainerObs>) -> Observed {
    Observed { sandboxes: vec![sandbox("s", true, 0)], containers, ..Default::default() }
}

fn start(name: &str, restart_count: u32, restart_of: Option<i64>) -> Action {
    Action::Start { name: name.into(), restart_count, restart_of: restart_of.map(at) }
}

#[track_caller]
fn check(pod: &Pod, observed: &Observed, facts: &Facts, now: i64, expect: &[Action]) -> Plan {
    let plan = plan(pod, observed, facts, at(now));
    assert_eq!(plan.actions, expect);
    plan
}

#[test]
fn a_new_pod_is_prepared_then_gets_a_sandbox_then_its_containers() {
    let pod = pod(json!({"containers": [{"name": "a"}, {"name": "b"}]}));
    let mut f = Facts { node_ready: true, ..Default::default() };
    let none = Observed::default();
    check(&pod, &none, &f, 0, &[Action::Prepare]);
    f.busy.insert(Op::Prepare);
    check(&pod, &none, &f, 0, &[]);
    let f = facts();
    check(&pod, &none, &f, 0, &[Action::CreateSandbox { previous: None, attempt: 0 }]);
    check(&pod, &observed(vec![]), &f, 0, &[start("a", 0, None), start("b", 0, None)]);
    check(&pod, &observed(vec![container("a", State::Running, 0)]), &f, 0, &[start("b", 0, None)]);
}

#[test]
fn nothing_runs_before_the_node_is_ready() {
    check(&pod(json!({"containers": [{"name": "a"}]})), &Observed::default(), &Facts::default(), 0, &[]);
}

#[test]
fn init_containers_run_in_order_and_sidecars_stay() {
    let pod = pod(json!({"initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}, {"name": "j"}],
        "containers": [{"name": "a"}]}));
    let mut f = facts();
    check(&pod, &observed(vec![]), &f, 0, &[start("i", 0, None)]);
    let i = container("i", State::Exited, 0);
    check(&pod, &observed(vec![container("i", State::Running, 0)]), &f, 0, &[]);
    check(&pod, &observed(vec![i.clone()]), &f, 0, &[start("s", 0, None)]);
    // The sidecar runs but has not started in the sense of its hook and probe.
    let s = container("s", State::Running, 0);
    check(&pod, &observed(vec![s.clone(), i.clone()]), &f, 0, &[]);
    f.health.insert("s-0".into(), Health { post_start: true, ..Default::default() });
    check(&pod, &observed(vec![s.clone(), i.clone()]), &f, 0, &[start("j", 0, None)]);
    let j = container("j", State::Exited, 0);
    check(&pod, &observed(vec![j.clone(), s, i.clone()]), &f, 0, &[start("a", 0, None)]);
    // A sidecar that dies later is restarted without holding the others up.
    let dead = container("s", State::Exited, 3);
    let a = container("a", State::Running, 0);
    check(&pod, &observed(vec![a, j, dead, i]), &f, 2, &[start("s", 1, Some(1))]);
}

#[test]
fn restart_policies() {
    for (policy, code, restarts) in
        [("Always", 0, true), ("Always", 1, true), ("OnFailure", 0, false), ("OnFailure", 1, true), ("Never", 1, false)]
    {
        let pod = pod(json!({"restartPolicy": policy, "containers": [{"name": "a"}, {"name": "b"}]}));
        let o = observed(vec![container("a", State::Exited, code), container("b", State::Running, 0)]);
        let expect = if restarts { vec![start("a", 1, Some(1))] } else { vec![] };
        check(&pod, &o, &facts(), 2, &expect);
    }
}

#[test]
fn container_restart_rules_come_first() {
    let spec = json!({"restartPolicy": "Never", "containers": [{"name": "a", "restartPolicy": "Never",
        "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]}]});
    let pod = pod(spec);
    check(&pod, &observed(vec![container("a", State::Exited, 42)]), &facts(), 2, &[start("a", 1, Some(1))]);
    assert_eq!(outcome(&pod, &observed(vec![container("a", State::Exited, 1)]), &facts()), Some(Outcome::Failed));
}

#[test]
fn a_crash_loop_waits() {
    let pod = pod(json!({"containers": [{"name": "a"}]}));
    let mut f = facts();
    f.backoffs.next("a", at(0), at(0));
    let o = observed(vec![container("a", State::Exited, 1)]);
    assert_eq!(check(&pod, &o, &f, 2, &[]).wake, Some(at(11)));
    check(&pod, &o, &f, 11, &[start("a", 1, Some(1))]);
}

#[test]
fn failed_probes_and_changed_images_kill() {
    let pod = pod(json!({"terminationGracePeriodSeconds": 7, "containers": [{"name": "a", "image": "x:2",
        "livenessProbe": {"terminationGracePeriodSeconds": 3}, "startupProbe": {}}]}));
    let o = observed(vec![container("a", State::Running, 0)]);
    let kill = |grace, message: &str| Action::Kill {
        name: "a".into(),
        id: "a-0".into(),
        grace: Duration::from_secs(grace),
        message: message.into(),
        anew: message.contains("definition changed"),
    };
    let mut f = facts();
    f.health.insert("a-0".into(), Health { live: Some(false), ..Default::default() });
    check(&pod, &o, &f, 0, &[kill(3, "Container a failed liveness probe, will be restarted")]);
    f.health.insert("a-0".into(), Health { startup: Some(false), ..Default::default() });
    check(&pod, &o, &f, 0, &[kill(7, "Container a failed startup probe, will be restarted")]);
    f.health.clear();
    let mut o = o;
    o.containers[0].hash = "other".into();
    check(&pod, &o, &f, 0, &[kill(7, "Container a definition changed, will be restarted")]);
}

#[test]
fn a_dead_sandbox_is_replaced() {
    let pod = pod(json!({"containers": [{"name": "a"}]}));
    let mut o = observed(vec![container("a", State::Exited, 255)]);
    o.sandboxes[0].ready = false;
    check(&pod, &o, &facts(), 2, &[Action::CreateSandbox { previous: Some("s".into()), attempt: 1 }]);
    o.sandboxes.insert(0, sandbox("t", true, 1));
    // In the new sandbox there is no container yet; the count goes on.
    check(&pod, &o, &facts(), 2, &[start("a", 1, None)]);
}

#[test]
fn deletion_stops_sidecars_last_and_cleans_up() {
    let pod = pod(
        json!({"initContainers": [{"name": "s", "restartPolicy": "Always"}, {"name": "t", "restartPolicy": "Always"}],
        "containers": [{"name": "a"}]}),
    );
    let pod = deleted(pod, 30);
    let mut f = Facts { stop_began: Some(at(0)), ..facts() };
    let all = |a, t, s| observed(vec![container("a", a, 0), container("t", t, 0), container("s", s, 0)]);
    let kill = |name: &str, grace| Action::Kill {
        name: name.into(),
        id: format!("{name}-0"),
        grace: Duration::from_secs(grace),
        message: String::new(),
        anew: false,
    };
    use State::{Exited, Running};
    check(&pod, &all(Running, Running, Running), &f, 0, &[kill("a", 30)]);
    check(&pod, &all(Exited, Running, Running), &f, 10, &[kill("t", 20)]);
    check(&pod, &all(Exited, Exited, Running), &f, 40, &[kill("s", 1)]);
    let mut o = all(Exited, Exited, Exited);
    check(&pod, &o, &f, 40, &[Action::StopSandbox { id: "s".into() }]);
    o.sandboxes[0].ready = false;
    check(&pod, &o, &f, 40, &[Action::Teardown]);
    f.torn_down = true;
    check(&pod, &o, &f, 40, &[Action::Finalize]);
    f.finalized = true;
    check(&pod, &o, &f, 40, &[]);
    f.gone = true;
    check(&pod, &o, &f, 40, &[Action::RemoveSandbox { id: "s".into() }]);
    check(&pod, &Observed::default(), &f, 40, &[Action::Exit]);
}

#[test]
fn a_shorter_grace_hastens_a_kill() {
    let pod = deleted(pod(json!({"containers": [{"name": "a"}]})), 1);
    let mut f = Facts { stop_began: Some(at(0)), ..facts() };
    f.busy.insert(Op::Container("a".into()));
    f.killing.insert("a-0".into(), at(30));
    let o = observed(vec![container("a", State::Running, 0)]);
    check(&pod, &o, &f, 0, &[Action::Hasten { id: "a-0".into(), grace: Duration::from_secs(1) }]);
    f.killing.insert("a-0".into(), at(1));
    check(&pod, &o, &f, 0, &[]);
}

#[test]
fn completion_stops_the_sandbox_and_keeps_the_logs() {
    let pod = pod(json!({"restartPolicy": "Never", "containers": [{"name": "a"}]}));
    let mut o = observed(vec![container("a", State::Exited, 0)]);
    let mut f = facts();
    assert_eq!(outcome(&pod, &o, &f), Some(Outcome::Succeeded));
    check(&pod, &o, &f, 2, &[Action::StopSandbox { id: "s".into() }]);
    o.sandboxes[0].ready = false;
    f.torn_down = true;
    check(&pod, &o, &f, 2, &[]);
}

#[test]
fn the_deadline_fails_the_pod() {
    let pod = pod(json!({"activeDeadlineSeconds": 10, "containers": [{"name": "a"}]}));
    let o = observed(vec![container("a", State::Running, 0)]);
    assert_eq!(check(&pod, &o, &facts(), 5, &[]).wake, Some(at(10)));
    let plan = plan(&pod, &o, &facts(), at(10));
    assert!(matches!(plan.actions[..], [Action::Fail { reason: "DeadlineExceeded", .. }]));
}

#[test]
fn a_finished_pod_does_not_run_again_when_the_runtime_forgot_it() {
    let mut pod = pod(json!({"restartPolicy": "Never", "containers": [{"name": "a"}]}));
    pod.status = serde_json::from_value(json!({"containerStatuses": [{"name": "a", "ready": false, "restartCount": 0,
        "image": "", "imageID": "", "state": {"terminated": {"exitCode": 3}}}]}))
    .unwrap();
    assert_eq!(outcome(&pod, &Observed::default(), &facts()), Some(Outcome::Failed));
}

#[test]
fn old_containers_are_collected() {
    let pod = pod(json!({"containers": [{"name": "a"}]}));
    let mut list = vec![container("a", State::Running, 0)];
    for n in 1..4 {
        list.push(ContainerObs { id: format!("old-{n}"), ..container("a", State::Exited, 1) });
    }
    let gone = |id: &str| Action::RemoveContainer { id: id.into() };
    check(&pod, &observed(list), &facts(), 2, &[gone("old-2"), gone("old-3")]);
}

mod invariants {
    use proptest::prelude::*;

    use super::*;

    fn any_state() -> impl Strategy<Value = State> {
        prop_oneof![Just(State::Created), Just(State::Running), Just(State::Exited), Just(State::Unknown)]
    }

    proptest! {
        /// A pod that is being deleted never starts anything, and never loses its sandbox under a living container.
        #[test]
        fn a_deleted_pod_only_stops(states in proptest::collection::vec((any_state(), 0..3), 0..4), ready: bool, torn_down: bool, gone: bool) {
            let names = ["a", "b", "c", "d"];
            let pod = deleted(pod(json!({"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [
                {"name": "c", "restartPolicy": "Always"}, {"name": "d"}]})), 30);
            let list: Vec<_> = states.iter().zip(names).map(|((s, code), n)| container(n, *s, *code)).collect();
            let living = list.iter().any(|c| matches!(c.state, State::Running | State::Unknown));
            let mut o = observed(list);
            o.sandboxes[0].ready = ready;
            let f = Facts { torn_down, gone, stop_began: Some(at(0)), ..facts() };
            for action in plan(&pod, &o, &f, at(1)).actions {
                let starts = matches!(action, Action::Start { .. } | Action::CreateSandbox { .. } | Action::Prepare);
                prop_assert!(!starts, "{action:?}");
                let cleans = matches!(action, Action::StopSandbox { .. } | Action::Teardown | Action::Finalize
                    | Action::RemoveSandbox { .. } | Action::Exit);
                prop_assert!(!(living && cleans), "{action:?}");
            }
        }
    }
}

#[test]
fn a_pod_that_leaves_waits_for_its_turn() {
    let alive = pod(json!({"terminationGracePeriodSeconds": 60, "containers": [{"name": "a"}]}));
    let evicted = deleted(alive.clone(), 60);
    let o = observed(vec![container("a", State::Running, 0)]);
    let kill = |grace| Action::Kill {
        name: "a".into(),
        id: "a-0".into(),
        grace: Duration::from_secs(grace),
        message: String::new(),
        anew: false,
    };
    let waits = Facts { leaving: true, ..facts() };
    check(&alive, &o, &waits, 5, &[]);
    check(&evicted, &o, &waits, 5, &[]);
    // What ended by itself meanwhile is not started again.
    check(&alive, &observed(vec![container("a", State::Exited, 1)]), &waits, 5, &[]);
    let began = Facts { stop_began: Some(at(3)), ..waits.clone() };
    check(&evicted, &o, &began, 5, &[kill(58)]);
    let gone = Facts { gone: true, stop_began: Some(at(5)), ..waits.clone() };
    check(&evicted, &o, &gone, 5, &[kill(60)]);
    let turn = |limit| Facts {
        leave_within: Some((at(5), Duration::from_secs(limit))),
        rejected: Some(("Terminated".into(), String::new())),
        stop_began: Some(at(5)),
        ..waits.clone()
    };
    check(&alive, &o, &turn(20), 5, &[kill(20)]);
    check(&evicted, &o, &turn(20), 5, &[kill(20)]);
    check(&alive, &o, &turn(600), 5, &[kill(60)]);
    check(&alive, &o, &turn(0), 5, &[kill(1)]);
    // It had begun to end before, with more time than there is now.
    let mut under_way = Facts { stop_began: Some(at(0)), ..turn(20) };
    under_way.busy.insert(Op::Container("a".into()));
    under_way.killing.insert("a-0".into(), at(60));
    check(&evicted, &o, &under_way, 5, &[Action::Hasten { id: "a-0".into(), grace: Duration::from_secs(20) }]);
}

fn running(name: &str) -> Observed {
    observed(vec![container(name, State::Running, 0)])
}

/// With what the container of [`running`] has.
fn resized(cpu: &str, of_pod: &Pod) -> Facts {
    let mut facts = facts();
    facts.health.insert("a-0".into(), Health { post_start: true, ..Default::default() });
    let has = serde_json::from_value(json!({"requests": {"cpu": cpu}})).unwrap();
    facts.resize.actuated.insert("a-0".into(), has);
    facts.resize.cgroup = Some(crate::pod::qos::pod_limits(of_pod));
    facts
}

#[test]
fn resources_that_change() {
    let spec = |cpu: &str, policy: &str, restarts: &str| {
        pod(json!({"restartPolicy": restarts, "containers": [{"name": "a", "resources": {"requests": {"cpu": cpu}},
            "resizePolicy": [{"resourceName": "cpu", "restartPolicy": policy}]}]}))
    };
    let small = spec("1", "NotRequired", "Always");
    check(&small, &running("a"), &resized("1000m", &small), 2, &[]);
    // The container follows, or only the pod's cgroup.
    let large = spec("2", "NotRequired", "Always");
    check(&large, &running("a"), &resized("1", &small), 2, &[Action::Resize]);
    check(&large, &running("a"), &resized("2", &small), 2, &[Action::Resize]);
    // While it is being told, it is not told again.
    let mut busy = resized("1", &small);
    busy.busy.insert(Op::Resize);
    check(&large, &running("a"), &busy, 2, &[]);
    // One that wants a new container is stopped first, then its cgroup grows, then it is started, whatever its policy.
    let large = spec("2", "RestartContainer", "OnFailure");
    let kill = Action::Kill {
        name: "a".into(),
        id: "a-0".into(),
        grace: Duration::from_secs(30),
        message: "Container a resize requires restart".into(),
        anew: true,
    };
    check(&large, &running("a"), &resized("1", &small), 2, &[kill]);
    let stopped = observed(vec![container("a", State::Exited, 0)]);
    let mut facts = resized("1", &small);
    facts.anew.insert("a-0".into());
    assert_eq!(outcome(&large, &stopped, &facts), None);
    check(&large, &stopped, &facts, 2, &[Action::Resize]);
    facts.resize.cgroup = Some(crate::pod::qos::pod_limits(&large));
    check(&large, &stopped, &facts, 2, &[start("a", 1, None)]);
    // Otherwise it has ended.
    facts.anew.clear();
    assert_eq!(outcome(&large, &stopped, &facts), Some(Outcome::Succeeded));
}

#[test]
fn a_pod_waits_until_the_node_takes_it() {
    let pod = pod(json!({"containers": [{"name": "a"}]}));
    let mut facts = Facts { waits: true, prepared: false, ..facts() };
    check(&pod, &Observed::default(), &facts, 2, &[]);
    facts.waits = false;
    check(&pod, &Observed::default(), &facts, 2, &[Action::Prepare]);
}
