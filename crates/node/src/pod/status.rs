//! A pod's status, as upstream's kubelet writes it, and the patch that brings the API's copy up to date.
//!
//! <https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-phase>

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
        ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use serde_json::{Map, Value, json};

use super::{
    Class, containers, ephemeral_as_container, full_name,
    machine::{Facts, Outcome, outcome, should_restart, started},
    observed::{ContainerObs, Observed, State},
    resize,
};
use crate::shutdown;

/// What the status says about the node.
#[derive(Clone, Debug, Default)]
pub struct NodeFacts {
    /// The node's addresses.
    pub host_ips: Vec<String>,
}

/// Computes the whole status.
pub fn status(pod: &Pod, observed: &Observed, facts: &Facts, node: &NodeFacts, now: Timestamp) -> PodStatus {
    let old = pod.status.clone().unwrap_or_default();
    let Some(spec) = &pod.spec else { return old };
    let of = |class: Class, container: &Container, list: &Option<Vec<ContainerStatus>>| {
        let previous = list.iter().flatten().find(|s| s.name == container.name);
        container_status(pod, spec, class, container, previous, observed, facts, now)
    };
    let init: Vec<_> = containers(spec)
        .filter(|c| matches!(c.class, Class::Init | Class::Sidecar))
        .map(|c| of(c.class, c.spec, &old.init_container_statuses))
        .collect();
    let main: Vec<_> = spec.containers.iter().map(|c| of(Class::Main, c, &old.container_statuses)).collect();
    let ephemeral: Vec<_> = spec
        .ephemeral_containers
        .iter()
        .flatten()
        .map(|c| of(Class::Ephemeral, &ephemeral_as_container(c), &old.ephemeral_container_statuses))
        .collect();

    let stopped =
        observed.alive().next().is_none() && !facts.busy.iter().any(|o| matches!(o, super::machine::Op::Container(_)));
    let ended = outcome(pod, observed, facts).filter(|_| stopped);
    let deleted = pod.metadata.deletion_timestamp.is_some() && stopped && facts.torn_down;
    let all_zero = init.iter().chain(&main).all(|s| {
        let state = s.state.as_ref();
        state.and_then(|s| s.terminated.as_ref()).is_some_and(|t| t.exit_code == 0)
    });
    let phase = match ended {
        Some(Outcome::Succeeded) => "Succeeded",
        Some(Outcome::Failed) => "Failed",
        // The last word on a deleted pod is always a final phase (KEP-3329), so that nobody waits for it.
        None if deleted => {
            if all_zero {
                "Succeeded"
            } else {
                "Failed"
            }
        }
        None => running_phase(spec, &init, &main),
    };
    let (reason, message) = match &facts.rejected {
        Some((reason, message)) => (Some(reason.clone()), Some(message.clone())),
        None => (old.reason.clone(), old.message.clone()),
    };

    let sandbox = observed.sandbox();
    let host_network = spec.host_network.unwrap_or(false);
    let ips: Vec<String> = if host_network {
        if sandbox.is_some() || old.pod_ip.is_some() { node.host_ips.clone() } else { Vec::new() }
    } else {
        match sandbox {
            Some(s) if !s.ips.is_empty() => s.ips.clone(),
            // The address stays on record while a pod ends; a new sandbox overwrites it.
            _ => old.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect(),
        }
    };
    let mut status = PodStatus {
        phase: Some(phase.to_owned()),
        reason,
        message,
        host_ip: node.host_ips.first().cloned(),
        host_ips: Some(node.host_ips.iter().map(|ip| HostIP { ip: ip.clone() }).collect()),
        pod_ip: ips.first().cloned(),
        pod_ips: Some(ips.iter().map(|ip| PodIP { ip: ip.clone() }).collect()).filter(|v: &Vec<_>| !v.is_empty()),
        start_time: old.start_time.clone().or_else(|| facts.start_time.map(Time)),
        init_container_statuses: Some(init).filter(|v| !v.is_empty()),
        container_statuses: Some(main),
        ephemeral_container_statuses: Some(ephemeral).filter(|v| !v.is_empty()),
        observed_generation: pod.metadata.generation,
        ..old
    };
    status.conditions = Some(conditions(pod, spec, &status, observed, facts, now));
    status
}

fn running_phase(spec: &PodSpec, init: &[ContainerStatus], main: &[ContainerStatus]) -> &'static str {
    let state = |s: &ContainerStatus| s.state.clone().unwrap_or_default();
    let ever_ran = |s: &ContainerStatus| {
        let state = state(s);
        state.running.is_some()
            || state.terminated.is_some()
            || s.last_state.as_ref().is_some_and(|l| l.terminated.is_some())
    };
    let initialized = init.iter().zip(spec.init_containers.iter().flatten()).all(|(s, c)| match super::init_class(c) {
        Class::Sidecar => s.started == Some(true),
        _ => state(s).terminated.is_some_and(|t| t.exit_code == 0),
    });
    // Once a main container has run, init containers no longer hold the phase back.
    if !initialized && !main.iter().any(ever_ran) || !main.iter().all(ever_ran) { "Pending" } else { "Running" }
}

#[allow(clippy::too_many_arguments)]
fn container_status(
    pod: &Pod,
    spec: &PodSpec,
    class: Class,
    container: &Container,
    old: Option<&ContainerStatus>,
    observed: &Observed,
    facts: &Facts,
    now: Timestamp,
) -> ContainerStatus {
    let name = &container.name;
    let mut of_name = observed.containers.iter().filter(|c| c.name == *name && c.state != State::Created);
    let newest = of_name.next();
    let before = of_name.find(|c| c.state == State::Exited);
    let waiting = facts
        .waiting
        .get(name)
        .map(|w| ContainerStateWaiting { reason: Some(w.reason.clone()), message: some(&w.message) });
    let mut last = before.map(|c| terminated(c, old));
    let mut status = ContainerStatus {
        name: name.clone(),
        image: container.image.clone().unwrap_or_default(),
        ..Default::default()
    };
    let ending = outcome(pod, observed, facts).is_some() || pod.metadata.deletion_timestamp.is_some() || facts.gone;
    let mut state = ContainerState::default();
    match newest {
        Some(c) => {
            status.container_id = Some(format!("containerd://{}", c.id));
            status.image =
                if c.image.is_empty() || c.image.starts_with("sha256:") { status.image } else { c.image.clone() };
            status.image_id = c.image_id.clone();
            status.restart_count = c.restart_count as i32;
            match c.state {
                State::Running | State::Unknown => {
                    state.running = Some(ContainerStateRunning { started_at: c.started.map(Time) });
                    let up = started(container, c, facts);
                    status.started = Some(up);
                    let ready = facts.health.get(&c.id).and_then(|h| h.ready);
                    status.ready =
                        up && (container.readiness_probe.is_none() || ready == Some(true)) && class != Class::Init;
                }
                _ => {
                    status.started = Some(false);
                    status.ready = class == Class::Init && c.exit_code == 0;
                    let restarts = !ending && should_restart(spec, class, container, c.exit_code);
                    let failed = c.finished.unwrap_or(c.created);
                    let held = facts.backoffs.until(name, failed).filter(|until| restarts && *until > now);
                    let crash = held.map(|_| ContainerStateWaiting {
                        reason: Some("CrashLoopBackOff".to_owned()),
                        message: Some(format!(
                            "back-off {} restarting failed container={name} pod={}",
                            go_duration(facts.backoffs.wait(name)),
                            full_name(pod)
                        )),
                    });
                    match waiting.filter(|_| restarts).or(crash) {
                        Some(w) => {
                            state.waiting = Some(w);
                            last = Some(terminated(c, old));
                        }
                        None => state.terminated = Some(terminated(c, old)),
                    }
                }
            }
        }
        None => {
            status.started = Some(false);
            status.restart_count = old.map_or(0, |o| o.restart_count);
            let was_over = old.and_then(|o| o.state.as_ref()).and_then(|s| s.terminated.clone());
            let was_running = old.and_then(|o| o.state.as_ref()).is_some_and(|s| s.running.is_some());
            if let Some(over) = was_over.filter(|_| ending || class == Class::Init) {
                status.ready = class == Class::Init && over.exit_code == 0;
                status.container_id = old.and_then(|o| o.container_id.clone());
                status.image_id = old.map(|o| o.image_id.clone()).unwrap_or_default();
                state.terminated = Some(over);
            } else if was_running && ending {
                state.terminated = Some(ContainerStateTerminated {
                    exit_code: 137,
                    reason: Some("ContainerStatusUnknown".to_owned()),
                    message: Some("The container could not be located when the pod was terminated".to_owned()),
                    ..Default::default()
                });
            } else {
                let has_init = spec.init_containers.as_ref().is_some_and(|i| !i.is_empty());
                let reason = if has_init { "PodInitializing" } else { "ContainerCreating" };
                state.waiting =
                    Some(waiting.unwrap_or(ContainerStateWaiting { reason: Some(reason.to_owned()), message: None }));
            }
        }
    }
    status.last_state = match last {
        Some(t) => Some(ContainerState { terminated: Some(t), ..Default::default() }),
        // The runtime has forgotten it; the API has not.
        None => old
            .and_then(|o| o.last_state.clone())
            .filter(|l| l.terminated.is_some())
            .or(Some(ContainerState::default())),
    };
    status.state = Some(state);
    if class == Class::Main || class == Class::Sidecar {
        // What a container has that runs; what it would get, of one that does not.
        let has = newest.filter(|c| c.state == State::Running).and_then(|c| facts.resize.actuated.get(&c.id));
        status.resources = has.cloned().or_else(|| container.resources.clone());
        status.allocated_resources = container.resources.as_ref().and_then(|r| r.requests.clone());
    }
    status
}

fn terminated(c: &ContainerObs, old: Option<&ContainerStatus>) -> ContainerStateTerminated {
    let id = format!("containerd://{}", c.id);
    // The file with its last words goes with the pod's volumes; the API keeps what it has been told.
    let told = old.into_iter().flat_map(|o| [&o.state, &o.last_state]).flatten().filter_map(|s| s.terminated.as_ref());
    let told = told.into_iter().find(|t| t.container_id.as_deref() == Some(&id)).and_then(|t| t.message.clone());
    ContainerStateTerminated {
        container_id: Some(id),
        exit_code: c.exit_code,
        reason: some(&c.reason).or_else(|| Some(if c.exit_code == 0 { "Completed" } else { "Error" }.to_owned())),
        message: some(&c.message).or(told),
        started_at: c.started.map(Time),
        finished_at: c.finished.map(Time),
        signal: None,
    }
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// A duration as Go prints it: `10s`, `2m40s`, `5m0s`.
pub fn go_duration(duration: std::time::Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}

struct Verdict {
    kind: &'static str,
    holds: bool,
    reason: Option<String>,
    message: Option<String>,
}

fn verdict(kind: &'static str, reason_if_not: Option<(&str, String)>) -> Verdict {
    Verdict {
        kind,
        holds: reason_if_not.is_none(),
        reason: reason_if_not.as_ref().map(|(r, _)| (*r).to_owned()),
        message: reason_if_not.map(|(_, m)| m).filter(|m| !m.is_empty()),
    }
}

/// The agent's conditions, beside those that others have put on the pod.
fn conditions(
    pod: &Pod,
    spec: &PodSpec,
    status: &PodStatus,
    observed: &Observed,
    facts: &Facts,
    now: Timestamp,
) -> Vec<PodCondition> {
    let old = pod.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
    let phase = status.phase.as_deref();
    let ended = match phase {
        Some("Succeeded") => Some(("PodCompleted", String::new())),
        Some("Failed") => Some(("PodFailed", String::new())),
        _ => None,
    };
    let sandbox_ready =
        observed.sandbox().is_some_and(|s| s.ready && (spec.host_network == Some(true) || !s.ips.is_empty()));

    let incomplete: Vec<&str> = status
        .init_container_statuses
        .iter()
        .flatten()
        .zip(spec.init_containers.iter().flatten())
        .filter(|(s, c)| match super::init_class(c) {
            Class::Sidecar => s.started != Some(true),
            _ => !s.ready,
        })
        .map(|(s, _)| s.name.as_str())
        .collect();
    let main_ran = spec.containers.iter().any(|c| observed.newest(&c.name).is_some());
    let initialized = if phase == Some("Succeeded") || incomplete.is_empty() || main_ran {
        verdict("Initialized", None)
    } else {
        verdict(
            "Initialized",
            Some((
                "ContainersNotInitialized",
                format!("containers with incomplete status: [{}]", incomplete.join(" ")),
            )),
        )
    };

    let sidecars: Vec<&str> =
        containers(spec).filter(|c| c.class == Class::Sidecar).map(|c| c.spec.name.as_str()).collect();
    let unready: Vec<&str> = status
        .init_container_statuses
        .iter()
        .flatten()
        .filter(|s| sidecars.contains(&s.name.as_str()))
        .chain(status.container_statuses.iter().flatten())
        .filter(|s| !s.ready)
        .map(|s| s.name.as_str())
        .collect();
    let leaving = || facts.leaving.then(|| ("NodeShutdown", shutdown::NODE_MESSAGE.to_owned()));
    let containers_why = ended.clone().or_else(leaving).or_else(|| {
        (!unready.is_empty())
            .then(|| ("ContainersNotReady", format!("containers with unready status: [{}]", unready.join(" "))))
    });
    let gates: Vec<String> = spec
        .readiness_gates
        .iter()
        .flatten()
        .filter_map(|gate| match old.iter().find(|c| c.type_ == gate.condition_type) {
            None => {
                Some(format!("corresponding condition of pod readiness gate {:?} does not exist.", gate.condition_type))
            }
            Some(c) if c.status != "True" => Some(format!(
                "the status of pod readiness gate {:?} is not \"True\", but {}",
                gate.condition_type, c.status
            )),
            Some(_) => None,
        })
        .collect();
    let ready_why =
        containers_why.clone().or_else(|| (!gates.is_empty()).then(|| ("ReadinessGatesNotReady", gates.join(", "))));

    let mut result = Vec::new();
    let verdicts = [
        verdict("PodReadyToStartContainers", (!sandbox_ready).then(|| ("", String::new()))),
        initialized,
        verdict("Ready", ready_why),
        verdict("ContainersReady", containers_why),
        verdict("PodScheduled", None),
    ];
    for v in verdicts {
        let value = if v.holds { "True" } else { "False" };
        let before = old.iter().find(|c| c.type_ == v.kind);
        let since = before.filter(|c| c.status == value).and_then(|c| c.last_transition_time.clone());
        result.push(PodCondition {
            type_: v.kind.to_owned(),
            status: value.to_owned(),
            reason: v.reason.filter(|r| !r.is_empty()),
            message: v.message,
            last_transition_time: since.or(Some(Time(now))),
            observed_generation: pod.metadata.generation,
            last_probe_time: None,
        });
    }
    if facts.leave_within.is_some() {
        let before = old.iter().find(|c| is_disruption(c));
        result.push(PodCondition {
            type_: DISRUPTION.to_owned(),
            status: "True".to_owned(),
            reason: Some(DISRUPTED.to_owned()),
            message: Some(facts.rejected.as_ref().map_or(shutdown::MESSAGE, |(_, text)| text.as_str()).to_owned()),
            last_transition_time: before.and_then(|c| c.last_transition_time.clone()).or(Some(Time(now))),
            observed_generation: pod.metadata.generation,
            last_probe_time: None,
        });
    }
    for (kind, reason, message) in resizing(pod, observed, facts) {
        let before = old.iter().find(|c| c.type_ == kind);
        result.push(PodCondition {
            type_: kind.to_owned(),
            status: "True".to_owned(),
            reason: some(reason),
            message: message.filter(|m| !m.is_empty()),
            last_transition_time: before.and_then(|c| c.last_transition_time.clone()).or(Some(Time(now))),
            observed_generation: facts.resize.generation.filter(|_| kind == RESIZES).or(pod.metadata.generation),
            last_probe_time: None,
        });
    }
    let ours: Vec<String> = result.iter().map(|c| c.type_.clone()).collect();
    let over = |c: &PodCondition| ours.contains(&c.type_) || TRANSIENT.contains(&c.type_.as_str());
    result.extend(old.into_iter().filter(|c| !over(c)));
    result
}

/// How it stands with a change of the pod's resources (KEP-1287): type, reason and message of conditions.
fn resizing(pod: &Pod, observed: &Observed, facts: &Facts) -> Vec<(&'static str, &'static str, Option<String>)> {
    let mut found = Vec::new();
    if let Some((reason, message)) = &facts.resize.pending {
        found.push((WAITS, *reason, Some(message.clone())));
    }
    if resize::is_under_way(pod, observed, &facts.resize) {
        let error = facts.resize.error.clone();
        found.push((RESIZES, if error.is_some() { "Error" } else { "" }, error));
    }
    found
}

/// A resize that has to wait, and one that is being carried out.
const WAITS: &str = "PodResizePending";
const RESIZES: &str = "PodResizeInProgress";
/// Conditions that go when they no longer hold.
const TRANSIENT: [&str; 2] = [WAITS, RESIZES];

/// Why a pod that was well ended (<https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions>),
/// and what the agent gives as the reason.
const DISRUPTION: &str = "DisruptionTarget";
const DISRUPTED: &str = "TerminationByKubelet";

fn is_disruption(condition: &PodCondition) -> bool {
    condition.type_ == DISRUPTION && condition.reason.as_deref() == Some(DISRUPTED)
}

/// The conditions that the agent writes.
const OWN_CONDITIONS: [&str; 7] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled", WAITS, RESIZES];

/// The fields of the status that the agent writes; the rest is others'.
const OWN_FIELDS: [&str; 13] = [
    "phase",
    "reason",
    "message",
    "hostIP",
    "hostIPs",
    "podIP",
    "podIPs",
    "startTime",
    "initContainerStatuses",
    "containerStatuses",
    "ephemeralContainerStatuses",
    "observedGeneration",
    "conditions",
];

/// A strategic merge patch from `old` to `new`, `None` if the API's copy is up to date. It carries the pod's uid, so
/// that a later pod of the same name is never given this one's status.
pub fn patch(uid: &str, old: Option<&PodStatus>, new: &PodStatus) -> Option<Value> {
    let old = old.and_then(|o| serde_json::to_value(o).ok()).unwrap_or_else(|| json!({}));
    let new = serde_json::to_value(new).ok()?;
    let mut patch = Map::new();
    for field in OWN_FIELDS {
        let (before, after) = (old.get(field), new.get(field));
        if before == after {
            continue;
        }
        let value = match (field, after) {
            (_, None) => Value::Null,
            ("conditions", Some(Value::Array(conditions))) => {
                let had: Vec<&Value> = before.and_then(Value::as_array).into_iter().flatten().collect();
                let mut changed: Vec<Value> = conditions
                    .iter()
                    .filter(|c| is_own(c) && !had.contains(c))
                    .map(|c| cleared(c, had.iter().find(|h| h["type"] == c["type"]).copied()))
                    .collect();
                let gone = |kind: &&str| {
                    let among = |list: &[&Value]| list.iter().any(|c| c["type"] == **kind);
                    among(&had) && !among(&conditions.iter().collect::<Vec<_>>())
                };
                changed.extend(
                    TRANSIENT.iter().filter(|kind| gone(kind)).map(|kind| json!({"$patch": "delete", "type": kind})),
                );
                if changed.is_empty() {
                    continue;
                }
                Value::Array(changed)
            }
            // Merged by address: without the directive the old address would stay beside the new one.
            ("podIPs" | "hostIPs", Some(Value::Array(ips))) if before.is_some() => {
                let mut list = vec![json!({"$patch": "replace"})];
                list.extend(ips.iter().cloned());
                Value::Array(list)
            }
            (_, Some(value)) => value.clone(),
        };
        patch.insert(field.to_owned(), value);
    }
    (!patch.is_empty()).then(|| json!({"metadata": {"uid": uid}, "status": patch}))
}

fn is_own(condition: &Value) -> bool {
    let kind = condition["type"].as_str().unwrap_or_default();
    OWN_CONDITIONS.contains(&kind) || kind == DISRUPTION && condition["reason"] == DISRUPTED
}

/// A condition that merges over its old self: what it no longer has becomes null.
fn cleared(new: &Value, old: Option<&Value>) -> Value {
    let mut result = new.clone();
    if let (Some(map), Some(old)) = (result.as_object_mut(), old.and_then(Value::as_object)) {
        for key in old.keys() {
            map.entry(key.clone()).or_insert(Value::Null);
        }
    }
    result
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
