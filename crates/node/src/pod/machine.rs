//! The pod state machine: `plan(pod, observed, facts, now)` says what to do next. It is asked again after everything
//! that happens, so it must give the same answer to the same question: what is under way is in [`Facts::busy`].
//!
//! <https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/>

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Probe};

use super::{
    Class,
    backoff::Backoffs,
    container_hash, containers, ephemeral_as_container, init_class,
    observed::{ContainerObs, Observed, State},
    resize::{self, Need},
};

/// A thing of which one is under way at a time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// Directories, cgroup and volumes are being made.
    Prepare,
    /// The sandbox is being made or stopped.
    Sandbox,
    /// The container of this name is being started or stopped.
    Container(String),
    /// Cgroups are told new limits.
    Resize,
    /// This container or sandbox (by id) is being removed.
    Remove(String),
    /// Volumes and cgroup are being taken away.
    Teardown,
    /// The pod is being deleted from the API.
    Finalize,
}

/// Why a container is not running, as its status shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// `ErrImagePull`, `CreateContainerConfigError`, ...
    pub reason: String,
    /// For a human.
    pub message: String,
}

/// What probes and hooks have found out about one container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// postStart has ended (or there is none).
    pub post_start: bool,
    /// The startup probe's verdict: `Some(false)` is final.
    pub startup: Option<bool>,
    /// The readiness probe's verdict.
    pub ready: Option<bool>,
    /// The liveness probe's verdict.
    pub live: Option<bool>,
    /// postStart failed, which kills the container.
    pub hook_failed: bool,
}

/// What the agent itself knows about a pod, beside the API's and the runtime's word.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The pod is no longer in the API.
    pub gone: bool,
    /// When the agent accepted the pod.
    pub start_time: Option<Timestamp>,
    /// When the agent began to stop it.
    pub stop_began: Option<Timestamp>,
    /// The pod failed as a whole: reason and message (admission, deadline, eviction).
    pub rejected: Option<(String, String)>,
    /// Directories and volumes are there.
    pub prepared: bool,
    /// Volumes and cgroup have been taken away for good.
    pub torn_down: bool,
    /// The pod has been deleted from the API by us.
    pub finalized: bool,
    /// What the node needs before it starts containers (services listed, network ready) is there.
    pub node_ready: bool,
    /// The pod must not run twice, and others may run it now: nothing of it is started.
    pub held: bool,
    /// The node has not said yet whether it takes the pod: nothing of it is started.
    pub waits: bool,
    /// The machine goes down: the pod is not ready whatever it says, and nothing of it is started.
    pub leaving: bool,
    /// It ends because of that: from when on, and within which time at most.
    pub leave_within: Option<(Timestamp, Duration)>,
    /// Under way.
    pub busy: BTreeSet<Op>,
    /// Kills under way, by container id, with the time at which they turn to SIGKILL.
    pub killing: HashMap<String, Timestamp>,
    /// Failed, and not to be tried again before this time.
    pub retry: BTreeMap<Op, Timestamp>,
    /// By container name.
    pub waiting: BTreeMap<String, Waiting>,
    /// Restarts, by container name.
    pub backoffs: Backoffs,
    /// By container id.
    pub health: HashMap<String, Health>,
    /// Containers (by id) that are stopped to be started anew, whatever their restart policy says.
    pub anew: BTreeSet<String>,
    /// What its containers have of what they were given.
    pub resize: resize::Facts,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Make directories and cgroup, mount volumes.
    Prepare,
    /// Stop the previous sandbox, if any, and make a new one.
    CreateSandbox {
        /// The sandbox it replaces.
        previous: Option<String>,
        /// Counts up.
        attempt: u32,
    },
    /// Pull the image, make the container, start it.
    Start {
        /// Its name in the pod.
        name: String,
        /// Restarts so far.
        restart_count: u32,
        /// When its predecessor failed, if this is a restart.
        restart_of: Option<Timestamp>,
    },
    /// Run preStop, then stop it.
    Kill {
        /// Its name in the pod.
        name: String,
        /// Its id.
        id: String,
        /// The time for preStop and SIGTERM together.
        grace: Duration,
        /// The event's text after `Stopping container x` or instead of it.
        message: String,
        /// It is started anew, whatever its restart policy says.
        anew: bool,
    },
    /// A kill is under way that now has less time.
    Hasten {
        /// The container's id.
        id: String,
        /// From now.
        grace: Duration,
    },
    /// Give the pod and its containers the limits that they should have ([`resize::plan`]).
    Resize,
    /// Take the sandbox's processes and network away.
    StopSandbox {
        /// Its id.
        id: String,
    },
    /// Forget a container.
    RemoveContainer {
        /// Its id.
        id: String,
    },
    /// Forget a sandbox.
    RemoveSandbox {
        /// Its id.
        id: String,
    },
    /// The pod fails as a whole.
    Fail {
        /// CamelCase.
        reason: &'static str,
        /// For a human.
        message: String,
    },
    /// Unmount volumes, remove cgroup and directories.
    Teardown,
    /// Write the last status and delete the pod from the API.
    Finalize,
    /// Nothing is left of the pod; its worker ends.
    Exit,
}

/// What to do now, and when to ask again if nothing happens before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// To be begun now, all at once.
    pub actions: Vec<Action>,
    /// The next instant at which the answer changes by itself.
    pub wake: Option<Timestamp>,
}

impl Plan {
    fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |w| w.min(at)));
    }
}

/// How a pod ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every container exited with 0.
    Succeeded,
    /// One did not, or the pod was refused.
    Failed,
}

/// The pod's restart policy.
pub fn restart_policy(spec: &PodSpec) -> &str {
    spec.restart_policy.as_deref().unwrap_or("Always")
}

/// Whether a container that exited with `code` is started again.
pub fn should_restart(spec: &PodSpec, class: Class, container: &Container, code: i32) -> bool {
    if class == Class::Ephemeral {
        return false;
    }
    // KEP-5307: a container's own rules and policy come before the pod's.
    for rule in container.restart_policy_rules.iter().flatten() {
        if let Some(codes) = &rule.exit_codes {
            let listed = codes.values.iter().flatten().any(|c| *c == code);
            if (codes.operator == "In") == listed && rule.action.starts_with("Restart") {
                return true;
            }
        }
    }
    match (container.restart_policy.as_deref().unwrap_or(restart_policy(spec)), class) {
        ("Never", _) => false,
        ("OnFailure", _) | (_, Class::Init) => code != 0,
        _ => true,
    }
}

/// The exit code of a container that is over, from the runtime, or from the API if the runtime has forgotten it.
fn exit_code(pod: &Pod, observed: &Observed, name: &str) -> Option<i32> {
    if let Some(container) = observed.newest(name) {
        return (container.state == State::Exited).then_some(container.exit_code);
    }
    let status = pod.status.as_ref()?;
    let all = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
    let found = all.into_iter().find(|c| c.name == name)?;
    Some(found.state.as_ref()?.terminated.as_ref()?.exit_code)
}

/// How the pod's containers ended, if no more of them will run.
pub fn outcome(pod: &Pod, observed: &Observed, facts: &Facts) -> Option<Outcome> {
    if facts.rejected.is_some() {
        return Some(Outcome::Failed);
    }
    match pod.status.as_ref().and_then(|s| s.phase.as_deref()) {
        Some("Succeeded") => return Some(Outcome::Succeeded),
        Some("Failed") => return Some(Outcome::Failed),
        _ => {}
    }
    let spec = pod.spec.as_ref()?;
    for c in containers(spec).filter(|c| c.class == Class::Init) {
        if let Some(code) = exit_code(pod, observed, &c.spec.name)
            && code != 0
            && !should_restart(spec, c.class, c.spec, code)
        {
            return Some(Outcome::Failed);
        }
    }
    let mut outcome = Outcome::Succeeded;
    for container in &spec.containers {
        let code = exit_code(pod, observed, &container.name)?;
        if observed.newest(&container.name).is_some_and(|c| facts.anew.contains(&c.id)) {
            return None;
        }
        if should_restart(spec, Class::Main, container, code) {
            return None;
        }
        if code != 0 {
            outcome = Outcome::Failed;
        }
    }
    Some(outcome)
}

/// Whether a running container counts as started: its postStart hook and startup probe are through.
pub fn started(container: &Container, observed: &ContainerObs, facts: &Facts) -> bool {
    let health = facts.health.get(&observed.id).copied().unwrap_or_default();
    observed.state == State::Running
        && health.post_start
        && (container.startup_probe.is_none() || health.startup == Some(true))
}

/// Whether the pod was deleted and ends for that. While the machine goes down, deleted pods too wait for their turn, unless
/// they had begun before: those that are evicted early must not end before those that should end first.
pub fn is_ending(pod: &Pod, facts: &Facts) -> bool {
    let waits = facts.leaving && facts.leave_within.is_none() && facts.stop_began.is_none();
    facts.gone || pod.metadata.deletion_timestamp.is_some() && !waits
}

/// When the pod's grace period ends, given when it began.
fn stop_deadline(pod: &Pod, facts: &Facts, now: Timestamp) -> Timestamp {
    let spec_grace = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds).unwrap_or(30);
    let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(spec_grace);
    // As upstream: even a forced deletion gives the runtime a second.
    let least = Duration::from_secs(1);
    let own = facts.stop_began.unwrap_or(now) + Duration::from_secs(grace.max(0).unsigned_abs()).max(least);
    match facts.leave_within {
        Some((from, limit)) => own.min(from + limit.max(least)),
        None => own,
    }
}

fn left(deadline: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(deadline.duration_since(now)).unwrap_or_default().max(Duration::from_secs(1))
}

/// Decides.
pub fn plan(pod: &Pod, observed: &Observed, facts: &Facts, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let Some(spec) = &pod.spec else { return plan };
    if is_ending(pod, facts) || outcome(pod, observed, facts).is_some() {
        stop(pod, spec, observed, facts, now, &mut plan);
        return plan;
    }
    if let (Some(seconds), Some(start)) = (spec.active_deadline_seconds, facts.start_time) {
        let deadline = start + Duration::from_secs(seconds.max(0).unsigned_abs());
        if now >= deadline {
            let message = "Pod was active on the node longer than the specified deadline".to_owned();
            plan.actions.push(Action::Fail { reason: "DeadlineExceeded", message });
            return plan;
        }
        plan.wake_at(deadline);
    }
    if !facts.node_ready || facts.held || facts.leaving || facts.waits {
        return plan;
    }
    if !facts.prepared {
        begin(facts, Op::Prepare, Action::Prepare, now, &mut plan);
    }
    let Some(sandbox) = observed.sandbox().filter(|s| s.ready) else {
        new_sandbox(observed, facts, now, &mut plan);
        return plan;
    };
    // Sandboxes before the last one only hold old logs.
    for old in observed.sandboxes.iter().skip(1).filter(|s| s.id != sandbox.id && !s.ready).skip(1) {
        begin(facts, Op::Remove(old.id.clone()), Action::RemoveSandbox { id: old.id.clone() }, now, &mut plan);
    }
    run(spec, observed, facts, now, &mut plan);
    resize(pod, spec, observed, facts, now, &mut plan);
    collect(observed, facts, now, &mut plan);
    plan
}

/// Cgroups follow what the pod has been given, once those containers are stopped that want to be started with it.
fn resize(pod: &Pod, spec: &PodSpec, observed: &Observed, facts: &Facts, now: Timestamp, plan: &mut Plan) {
    let needs = |wanted| resize::needs(spec, observed, &facts.resize).any(|(_, _, need)| need == wanted);
    if facts.prepared && !needs(Need::Restart) && resize::is_under_way(pod, observed, &facts.resize) {
        begin(facts, Op::Resize, Action::Resize, now, plan);
    }
    if !resize::has_room(pod, &facts.resize) {
        plan.actions.retain(|action| !matches!(action, Action::Start { .. }));
    }
}

/// Begins an operation unless it is under way or has to wait.
fn begin(facts: &Facts, op: Op, action: Action, now: Timestamp, plan: &mut Plan) {
    if facts.busy.contains(&op) {
        return;
    }
    match facts.retry.get(&op) {
        Some(at) if *at > now => plan.wake_at(*at),
        _ => plan.actions.push(action),
    }
}

fn new_sandbox(observed: &Observed, facts: &Facts, now: Timestamp, plan: &mut Plan) {
    let mut alive = false;
    for c in observed.alive() {
        alive = true;
        let message = "Pod sandbox changed, it will be killed and re-created.".to_owned();
        kill(c, Duration::from_secs(2), message, false, facts, now, plan);
    }
    if alive || !facts.prepared {
        return;
    }
    let previous = observed.sandbox();
    let action = Action::CreateSandbox {
        previous: previous.map(|s| s.id.clone()),
        attempt: previous.map_or(0, |s| s.attempt + 1),
    };
    begin(facts, Op::Sandbox, action, now, plan);
}

fn kill(
    c: &ContainerObs,
    grace: Duration,
    message: String,
    anew: bool,
    facts: &Facts,
    now: Timestamp,
    plan: &mut Plan,
) {
    if let Some(deadline) = facts.killing.get(&c.id) {
        // The second leaves room for rounding, so that the same deadline does not hasten itself.
        if *deadline > now + grace + Duration::from_secs(1) {
            plan.actions.push(Action::Hasten { id: c.id.clone(), grace });
        }
        return;
    }
    let action = Action::Kill { name: c.name.clone(), id: c.id.clone(), grace, message, anew };
    begin(facts, Op::Container(c.name.clone()), action, now, plan);
}

/// Everything stops: the containers, then sidecars in reverse order, then the sandbox, then what was prepared.
fn stop(pod: &Pod, spec: &PodSpec, observed: &Observed, facts: &Facts, now: Timestamp, plan: &mut Plan) {
    let grace = left(stop_deadline(pod, facts, now), now);
    let sidecars: Vec<&str> =
        containers(spec).filter(|c| c.class == Class::Sidecar).map(|c| c.spec.name.as_str()).collect();
    let (side, rest): (Vec<_>, Vec<_>) = observed.alive().partition(|c| sidecars.contains(&c.name.as_str()));
    for c in &rest {
        kill(c, grace, String::new(), false, facts, now, plan);
    }
    // A container that is being started appears among the living in a moment: wait for it.
    let starting = facts.busy.iter().any(|op| matches!(op, Op::Container(_) | Op::Sandbox | Op::Prepare));
    if rest.is_empty() {
        let last = sidecars.iter().rev().find_map(|name| side.iter().find(|c| c.name == **name));
        if let Some(c) = last {
            kill(c, grace, String::new(), false, facts, now, plan);
        }
    }
    if !rest.is_empty() || !side.is_empty() || starting {
        return;
    }
    if let Some(sandbox) = observed.sandboxes.iter().find(|s| s.ready) {
        begin(facts, Op::Sandbox, Action::StopSandbox { id: sandbox.id.clone() }, now, plan);
        return;
    }
    if !facts.torn_down {
        begin(facts, Op::Teardown, Action::Teardown, now, plan);
        return;
    }
    if facts.gone {
        for sandbox in &observed.sandboxes {
            let op = Op::Remove(sandbox.id.clone());
            begin(facts, op, Action::RemoveSandbox { id: sandbox.id.clone() }, now, plan);
        }
        if observed.sandboxes.is_empty() && facts.busy.is_empty() {
            plan.actions.push(Action::Exit);
        }
    } else if pod.metadata.deletion_timestamp.is_some() && !facts.finalized {
        begin(facts, Op::Finalize, Action::Finalize, now, plan);
    }
}

fn run(spec: &PodSpec, observed: &Observed, facts: &Facts, now: Timestamp, plan: &mut Plan) {
    let initialized = spec.containers.iter().any(|c| observed.active(&c.name).is_some());
    let init = spec.init_containers.as_deref().unwrap_or_default();
    for (index, container) in init.iter().enumerate() {
        let class = init_class(container);
        let active = observed.active(&container.name);
        let passed = match class {
            Class::Sidecar => {
                one(spec, class, container, observed, facts, now, plan);
                active.is_some_and(|c| started(container, c, facts))
            }
            _ if initialized => true,
            _ => {
                let done = active.is_some_and(|c| c.state == State::Exited && c.exit_code == 0);
                let overtaken = init[index + 1..].iter().any(|later| observed.active(&later.name).is_some());
                if !done && !overtaken {
                    one(spec, class, container, observed, facts, now, plan);
                }
                done || overtaken
            }
        };
        if !passed && !initialized {
            return;
        }
    }
    for container in &spec.containers {
        one(spec, Class::Main, container, observed, facts, now, plan);
    }
    for ephemeral in spec.ephemeral_containers.iter().flatten() {
        one(spec, Class::Ephemeral, &ephemeral_as_container(ephemeral), observed, facts, now, plan);
    }
}

/// Moves one container forward.
fn one(
    spec: &PodSpec,
    class: Class,
    container: &Container,
    observed: &Observed,
    facts: &Facts,
    now: Timestamp,
    plan: &mut Plan,
) {
    let name = container.name.as_str();
    let previous = observed.newest(name);
    let start = |restart_of: Option<Timestamp>, plan: &mut Plan| {
        if facts.prepared {
            let restart_count = previous.map_or(0, |c| c.restart_count + 1);
            let action = Action::Start { name: name.to_owned(), restart_count, restart_of };
            begin(facts, Op::Container(name.to_owned()), action, now, plan);
        }
    };
    let Some(current) = observed.active(name) else {
        return start(None, plan);
    };
    match current.state {
        State::Created => start(None, plan),
        State::Unknown => {
            kill(
                current,
                Duration::from_secs(2),
                format!("Container {name} is in unknown state, try killing it before restart"),
                false,
                facts,
                now,
                plan,
            );
        }
        State::Running if class == Class::Ephemeral => {}
        State::Running => {
            let health = facts.health.get(&current.id).copied().unwrap_or_default();
            let grace = |probe: Option<&Probe>| {
                let own =
                    probe.and_then(|p| p.termination_grace_period_seconds).or(spec.termination_grace_period_seconds);
                Duration::from_secs(own.unwrap_or(30).max(1).unsigned_abs())
            };
            let changed = !current.hash.is_empty() && current.hash != container_hash(container);
            let actuated = facts.resize.actuated.get(&current.id);
            let resized = actuated.is_some_and(|actuated| resize::need(container, actuated) == Need::Restart);
            let why = if changed {
                Some((format!("Container {name} definition changed, will be restarted"), grace(None)))
            } else if resized {
                Some((format!("Container {name} resize requires restart"), grace(None)))
            } else if health.hook_failed {
                Some((format!("FailedPostStartHook: container {name} will be restarted"), grace(None)))
            } else if health.startup == Some(false) {
                Some((
                    format!("Container {name} failed startup probe, will be restarted"),
                    grace(container.startup_probe.as_ref()),
                ))
            } else if health.live == Some(false) {
                Some((
                    format!("Container {name} failed liveness probe, will be restarted"),
                    grace(container.liveness_probe.as_ref()),
                ))
            } else {
                None
            };
            if let Some((message, grace)) = why {
                kill(current, grace, message, changed || resized, facts, now, plan);
            }
        }
        State::Exited if facts.anew.contains(&current.id) => start(None, plan),
        State::Exited if should_restart(spec, class, container, current.exit_code) => {
            let failed = current.finished.unwrap_or(current.created);
            match facts.backoffs.until(name, failed) {
                Some(until) if until > now => plan.wake_at(until),
                _ => start(Some(failed), plan),
            }
        }
        State::Exited => {}
    }
}

/// Forgets dead containers, but for the newest two of each name: the one that counts and the one before, for its logs.
fn collect(observed: &Observed, facts: &Facts, now: Timestamp, plan: &mut Plan) {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for c in &observed.containers {
        let count = seen.entry(&c.name).or_default();
        *count += 1;
        if *count > 2 && matches!(c.state, State::Exited | State::Created) {
            begin(facts, Op::Remove(c.id.clone()), Action::RemoveContainer { id: c.id.clone() }, now, plan);
        }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
