//! One task per pod: it asks the state machine what to do, begins that, and tells the API what came of it.
//!
//! Everything that takes time runs beside it in [`Worker::ops`]; the worker itself never waits for one thing only.

mod hold;
mod leave;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use parking_lot::RwLock;
use seawall_quorum::fence::Epoch;
use tokio::{
    sync::{Mutex, Notify, mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use self::hold::Fencing;
use crate::{
    Agent,
    container::{self, Failure, Start},
    events::Kind,
    hooks, operations,
    pod::{
        self, Class,
        machine::{self, Action, Facts, Health, Op, Waiting},
        observed::{Observed, State},
        status::{self, NodeFacts},
    },
    probe, sandbox, shutdown,
    volume::{self, Made, Volumes},
};

/// What the API says about the pod.
#[derive(Clone, Debug)]
pub struct Input {
    /// Its last known form.
    pub pod: Arc<Pod>,
    /// It is no longer there.
    pub gone: bool,
}

/// What others may see of a worker: the pod and the status that it computed last.
pub type View = Arc<RwLock<(Arc<Pod>, PodStatus)>>;

enum Done {
    Prepared(Result<Made, volume::Error>),
    Refreshed(Result<Made, volume::Error>),
    Sandbox(Result<(), String>),
    Started(String, Result<String, Failure>),
    Hook(String, String, Result<(), String>),
    Stopped(String, Result<(), String>),
    Removed(Result<(), String>),
    TornDown(Result<(), String>),
    Finalized(Result<(), kube::Error>),
    Written(Box<Result<Pod, kube::Error>>),
    Permit(Epoch, Box<Result<Pod, kube::Error>>),
    Claims(Result<bool, kube::Error>),
}

/// See the module.
pub struct Worker {
    agent: Arc<Agent>,
    uid: String,
    pod: Arc<Pod>,
    observed: Arc<Observed>,
    facts: Facts,
    input: watch::Receiver<Input>,
    runtime: watch::Receiver<Arc<Observed>>,
    node_ready: watch::Receiver<bool>,
    view: View,
    ops: JoinSet<(Option<Op>, Done)>,
    probers: JoinSet<()>,
    probing: HashMap<(String, probe::Kind), AbortHandle>,
    reports: (mpsc::Sender<probe::Report>, mpsc::Receiver<probe::Report>),
    changed: Arc<Notify>,
    volumes: Arc<Mutex<Volumes>>,
    paths: HashMap<String, PathBuf>,
    renew: Option<Timestamp>,
    refreshing: bool,
    deadlines: HashMap<String, watch::Sender<Instant>>,
    /// What a container's waiting reason turns into, and when: `ErrImagePull` becomes `ImagePullBackOff`.
    later: BTreeMap<String, (Timestamp, Waiting)>,
    started_here: HashSet<String>,
    backoff_noted: HashSet<String>,
    mount_failures: u32,
    writing: bool,
    write_after: Option<Timestamp>,
    stopping: CancellationToken,
    fence: Fencing,
    leaving: shutdown::Changes,
}

/// A resource version as a number. It is opaque to clients in general; ours is a revision, which only grows.
fn revision(pod: &Pod) -> Option<u64> {
    pod.metadata.resource_version.as_deref()?.parse().ok()
}

impl Worker {
    /// For one pod.
    pub fn new(agent: Arc<Agent>, input: watch::Receiver<Input>, view: View) -> Self {
        let pod = Arc::clone(&input.borrow().pod);
        let uid = pod::uid(&pod).to_owned();
        let runtime = agent.pleg.subscribe(&uid);
        let observed = Arc::clone(&runtime.borrow());
        let directory = volume::pod_directory(&agent.config.data_dir, &uid);
        Self {
            volumes: Arc::new(Mutex::new(Volumes::new(agent.client.clone(), directory))),
            node_ready: agent.ready.subscribe(),
            facts: Facts::default(),
            view,
            ops: JoinSet::new(),
            probers: JoinSet::new(),
            probing: HashMap::new(),
            reports: mpsc::channel(64),
            changed: Arc::new(Notify::new()),
            paths: HashMap::new(),
            renew: None,
            refreshing: false,
            deadlines: HashMap::new(),
            later: BTreeMap::new(),
            started_here: HashSet::new(),
            backoff_noted: HashSet::new(),
            mount_failures: 0,
            writing: false,
            write_after: None,
            stopping: CancellationToken::new(),
            fence: Fencing::new(&agent.fence),
            leaving: agent.config.shutdown.changes(),
            agent,
            uid,
            pod,
            observed,
            input,
            runtime,
        }
    }

    /// Runs until nothing is left of the pod, or until shutdown, which leaves it as it is.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let now = Timestamp::now();
        let start = self.pod.status.as_ref().and_then(|s| s.start_time.clone());
        self.facts.start_time = Some(start.map_or(now, |t| t.0));
        self.facts.gone = self.input.borrow().gone;
        loop {
            let now = Timestamp::now();
            self.facts.node_ready = *self.node_ready.borrow_and_update()
                || self.pod.spec.as_ref().is_some_and(|s| s.host_network == Some(true)) && self.agent.services.synced();
            self.obey(now);
            self.observe(now);
            self.hold(now);
            let plan = machine::plan(&self.pod, &self.observed, &self.facts, now);
            let mut wake = plan.wake;
            for action in plan.actions {
                tracing::debug!(pod = pod::name(&self.pod), ?action, "acts");
                if action == Action::Exit {
                    return self.leave().await;
                }
                self.begin(action, now);
            }
            self.sync_probers(now);
            self.publish(now);
            self.report();
            self.refresh_volumes(now, false);
            let times = [
                wake.take(),
                self.renew,
                self.later.values().map(|(at, _)| *at).min(),
                self.write_after,
                self.fence.after,
            ];
            let next = times.into_iter().flatten().min();
            let sleep = next.map_or(Duration::from_secs(3600), |at| {
                Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default()
            });
            tokio::select! {
                () = shutdown.cancelled() => return,
                Ok(()) = self.input.changed() => self.take_input(),
                Ok(()) = self.runtime.changed() => {}
                Ok(()) = self.node_ready.changed() => {}
                Ok(()) = self.fence.changes.changed() => {}
                () = self.leaving.changed() => {}
                Some(done) = self.ops.join_next() => match done {
                    Ok((op, done)) => self.finish(op, done, Timestamp::now()),
                    // A panic of an operation is a bug, but not a reason to leave the pod alone.
                    Err(error) => {
                        tracing::error!(pod = pod::name(&self.pod), "an operation panicked: {error}");
                        self.facts.busy.clear();
                        self.facts.killing.clear();
                        (self.writing, self.refreshing) = (false, false);
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                },
                Some(report) = self.reports.1.recv() => self.take_report(report),
                () = self.changed.notified() => {
                    self.facts.retry.remove(&Op::Prepare);
                    let waiting = self.facts.waiting.iter().filter(|(_, w)| w.reason == "CreateContainerConfigError");
                    let names: Vec<String> = waiting.map(|(name, _)| name.clone()).collect();
                    for name in names {
                        self.facts.retry.remove(&Op::Container(name));
                    }
                    self.refresh_volumes(Timestamp::now(), true);
                }
                () = tokio::time::sleep(sleep.max(Duration::from_millis(1))) => {}
            }
        }
    }

    fn take_input(&mut self) {
        let input = self.input.borrow_and_update().clone();
        self.facts.gone |= input.gone;
        // A watch may still deliver what is older than the answer to our own write.
        let stale = revision(&input.pod).zip(revision(&self.pod)).is_some_and(|(new, old)| new < old);
        if !stale {
            self.take_pod(input.pod);
        }
    }

    fn take_pod(&mut self, pod: Arc<Pod>) {
        let meta = |p: &Pod| (p.metadata.labels.clone(), p.metadata.annotations.clone());
        let downward = meta(&pod) != meta(&self.pod);
        self.pod = pod;
        if downward {
            self.refresh_volumes(Timestamp::now(), true);
        }
    }

    /// Takes over what the runtime says, and what follows from it without the state machine.
    fn observe(&mut self, now: Timestamp) {
        self.observed = Arc::clone(&self.runtime.borrow_and_update());
        let ending = machine::is_ending(&self.pod, &self.facts)
            || machine::outcome(&self.pod, &self.observed, &self.facts).is_some();
        if ending && self.facts.stop_began.is_none() {
            self.facts.stop_began = Some(now);
            self.stopping.cancel();
        }
        let due: Vec<String> = self.later.iter().filter(|(_, (at, _))| *at <= now).map(|(n, _)| n.clone()).collect();
        for name in due {
            if let Some((_, waiting)) = self.later.remove(&name)
                && !ending
            {
                let events = &self.agent.events;
                events.container(&self.pod, &name, Kind::Normal, "BackOff", waiting.message.clone());
                events.container(&self.pod, &name, Kind::Warning, "Failed", format!("Error: {}", waiting.reason));
                self.facts.waiting.insert(name, waiting);
            }
        }
        let observed = Arc::clone(&self.observed);
        self.backoff_noted.retain(|id| observed.containers.iter().any(|c| c.id == *id));
        self.started_here.retain(|id| observed.containers.iter().any(|c| c.id == *id));
        self.facts.health.retain(|id, _| observed.containers.iter().any(|c| c.id == *id));
        let Some(spec) = self.pod.spec.clone() else { return };
        for c in observed.containers.iter() {
            let busy = self.facts.busy.contains(&Op::Container(c.name.clone()));
            if c.state == State::Running && !busy && !self.facts.health.contains_key(&c.id) {
                // It ran before we did: what the API says of this very container still holds.
                let status = self.pod.status.as_ref();
                let statuses = status
                    .into_iter()
                    .flat_map(|s| s.container_statuses.iter().chain(&s.init_container_statuses).flatten());
                let id = format!("containerd://{}", c.id);
                let known = statuses.into_iter().find(|s| s.container_id.as_deref() == Some(&id));
                let health = Health {
                    post_start: true,
                    startup: known.and_then(|s| s.started).filter(|s| *s),
                    ready: known.map(|s| s.ready).filter(|r| *r),
                    ..Default::default()
                };
                self.facts.health.insert(c.id.clone(), health);
            }
            let newest = observed.newest(&c.name).is_some_and(|n| n.id == c.id);
            if c.state == State::Exited && newest && !ending && !self.backoff_noted.contains(&c.id) {
                let class_of = pod::find_container(&spec, &c.name);
                let restarts =
                    class_of.is_some_and(|(class, found)| machine::should_restart(&spec, class, &found, c.exit_code));
                let failed = c.finished.unwrap_or(c.created);
                if restarts && self.facts.backoffs.until(&c.name, failed).is_some_and(|until| until > now) {
                    let message =
                        format!("Back-off restarting failed container {} in pod {}", c.name, pod::full_name(&self.pod));
                    self.agent.events.container(&self.pod, &c.name, Kind::Warning, "BackOff", message);
                    self.backoff_noted.insert(c.id.clone());
                }
            }
        }
    }

    fn spawn(&mut self, op: Option<Op>, work: impl Future<Output = Done> + Send + 'static) {
        if let Some(op) = &op {
            self.facts.busy.insert(op.clone());
        }
        let (pleg, uid) = (Arc::clone(&self.agent.pleg), self.uid.clone());
        self.ops.spawn(async move {
            let done = work.await;
            // What we have just done shows at once, not at the next relist.
            if op.is_some()
                && let Err(status) = pleg.relist(Some(&uid)).await
            {
                tracing::debug!("relist after an action: {}", status.message());
            }
            (op, done)
        });
    }

    fn begin(&mut self, action: Action, now: Timestamp) {
        let agent = Arc::clone(&self.agent);
        let (pod, uid) = (Arc::clone(&self.pod), self.uid.clone());
        match action {
            Action::Prepare => {
                self.agent.watches.subscribe(&self.uid, &self.changed, &volume::watched(&self.pod));
                let volumes = Arc::clone(&self.volumes);
                let ips = self.observed.sandbox().map(|s| s.ips.clone()).unwrap_or_default();
                self.spawn(Some(Op::Prepare), async move {
                    Done::Prepared(operations::prepare(&agent, &pod, &ips, &volumes).await)
                });
            }
            Action::CreateSandbox { previous, attempt } => {
                if previous.is_some() {
                    let message = "Pod sandbox changed, it will be killed and re-created.";
                    agent.events.pod(&pod, Kind::Normal, "SandboxChanged", message);
                }
                self.spawn(Some(Op::Sandbox), async move {
                    Done::Sandbox(operations::create_sandbox(&agent, &pod, previous, attempt).await)
                });
            }
            Action::Start { name, restart_count, restart_of } => {
                if let Some(failed) = restart_of {
                    self.facts.backoffs.next(&name, failed, now);
                }
                let remembered = self.pod.status.as_ref().and_then(|s| {
                    let all = s.container_statuses.iter().chain(&s.init_container_statuses).flatten();
                    all.into_iter()
                        .find(|c| c.name == name && c.container_id.is_some())
                        .map(|c| c.restart_count as u32 + 1)
                });
                let known = self.observed.newest(&name).is_some();
                let restart_count = if known { restart_count } else { remembered.unwrap_or(restart_count) };
                let start = Start {
                    agent,
                    pod,
                    observed: Arc::clone(&self.observed),
                    volumes: self.paths.clone(),
                    name: name.clone(),
                    restart_count,
                };
                let cancel = self.stopping.clone();
                self.spawn(Some(Op::Container(name.clone())), async move {
                    let result = Box::pin(start.run(&cancel)).await;
                    Done::Started(name, result)
                });
            }
            Action::Kill { name, id, grace, message } => {
                let text = if message.is_empty() { format!("Stopping container {name}") } else { message };
                agent.events.container(&pod, &name, Kind::Normal, "Killing", text);
                let (sender, deadline) = watch::channel(Instant::now() + grace);
                self.deadlines.insert(id.clone(), sender);
                self.facts.killing.insert(id.clone(), now + grace);
                let hook = self.pre_stop(&name, &id);
                self.spawn(Some(Op::Container(name)), async move {
                    let result = container::stop(&agent, &id, hook, deadline).await;
                    Done::Stopped(id, result.map_err(|s| s.message().to_owned()))
                });
            }
            Action::Hasten { id, grace } => {
                self.facts.killing.insert(id.clone(), now + grace);
                if let Some(deadline) = self.deadlines.get(&id) {
                    deadline.send_replace(Instant::now() + grace);
                }
            }
            Action::StopSandbox { id } => self.spawn(Some(Op::Sandbox), async move {
                Done::Removed(agent.cri.stop_sandbox(&id).await.map_err(|s| s.message().to_owned()))
            }),
            Action::RemoveSandbox { id } => self.spawn(Some(Op::Remove(id.clone())), async move {
                Done::Removed(agent.cri.remove_sandbox(&id).await.map_err(|s| s.message().to_owned()))
            }),
            Action::RemoveContainer { id } => self.spawn(Some(Op::Remove(id.clone())), async move {
                Done::Removed(agent.cri.remove_container(&id).await.map_err(|s| s.message().to_owned()))
            }),
            Action::Fail { reason, message } => {
                agent.events.pod(&pod, Kind::Normal, reason, message.clone());
                self.facts.rejected = Some((reason.to_owned(), message));
                self.facts.stop_began.get_or_insert(now);
                self.stopping.cancel();
                self.changed.notify_one();
            }
            Action::Teardown => {
                self.spawn(Some(Op::Teardown), async move { Done::TornDown(operations::teardown(&agent, &uid).await) })
            }
            Action::Finalize => {
                let last = status::status(&self.pod, &self.observed, &self.facts, &self.node_facts(), now);
                let patch = status::patch(&self.uid, self.pod.status.as_ref(), &last);
                self.spawn(Some(Op::Finalize), async move {
                    Done::Finalized(operations::finalize(&agent, &pod, patch).await)
                });
            }
            Action::Exit => {}
        }
    }

    fn pre_stop(
        &self,
        name: &str,
        id: &str,
    ) -> Option<(crate::handler::Target, k8s_openapi::api::core::v1::LifecycleHandler)> {
        let spec = self.pod.spec.as_ref()?;
        let (class, container) = pod::find_container(spec, name)?;
        let hook = container.lifecycle.as_ref()?.pre_stop.clone().filter(|_| class != Class::Ephemeral)?;
        Some((container::target(&self.agent, &container, id, &self.observed, spec), hook))
    }

    fn finish(&mut self, op: Option<Op>, done: Done, now: Timestamp) {
        if let Some(op) = &op {
            self.facts.busy.remove(op);
            self.facts.retry.remove(op);
        }
        self.observed = Arc::clone(&self.runtime.borrow_and_update());
        let retry = |facts: &mut Facts, seconds: u64| {
            if let Some(op) = op {
                facts.retry.insert(op, now + Duration::from_secs(seconds));
            }
        };
        let (events, pod) = (&self.agent.events, Arc::clone(&self.pod));
        match done {
            Done::Prepared(Ok(made)) => {
                self.facts.prepared = true;
                self.mount_failures = 0;
                (self.paths, self.renew) = (made.paths, made.renew);
            }
            Done::Prepared(Err(error)) => {
                tracing::info!(pod = pod::name(&pod), "{error}");
                events.pod(&pod, Kind::Warning, "FailedMount", error.to_string());
                self.mount_failures += 1;
                retry(&mut self.facts, (1 << self.mount_failures.min(7)) - 1);
            }
            Done::Refreshed(result) => {
                self.refreshing = false;
                match result {
                    Ok(made) => self.renew = made.renew,
                    Err(error) => {
                        events.pod(&pod, Kind::Warning, "FailedMount", error.to_string());
                        self.renew = Some(now + Duration::from_secs(30));
                    }
                }
            }
            Done::Sandbox(Ok(())) => {}
            Done::Sandbox(Err(message)) => {
                events.pod(
                    &pod,
                    Kind::Warning,
                    "FailedCreatePodSandBox",
                    format!("Failed to create pod sandbox: {message}"),
                );
                retry(&mut self.facts, 2);
            }
            Done::Started(name, Ok(id)) => self.started(&name, id),
            Done::Started(name, Err(why)) => {
                tracing::info!(
                    pod = pod::name(&pod),
                    name,
                    reason = why.reason,
                    message = why.message,
                    "a container did not start"
                );
                if why.reason == "ErrImagePull" {
                    let key = format!("image/{name}");
                    self.facts.backoffs.next(&key, now, now);
                    let wait = self.facts.backoffs.wait(&key).as_secs();
                    retry(&mut self.facts, wait);
                    let image = pod
                        .spec
                        .as_ref()
                        .and_then(|s| pod::find_container(s, &name))
                        .and_then(|(_, c)| c.image)
                        .unwrap_or_default();
                    let message = format!("Back-off pulling image {image:?}: ErrImagePull: {}", why.message);
                    let next = Waiting { reason: "ImagePullBackOff".into(), message };
                    self.later.insert(name.clone(), (now + Duration::from_secs(2), next));
                } else {
                    retry(&mut self.facts, 10);
                }
                self.facts.waiting.insert(name, why);
            }
            Done::Hook(name, id, result) => {
                if let Err(message) = result {
                    events.container(
                        &pod,
                        &name,
                        Kind::Warning,
                        "FailedPostStartHook",
                        format!("PostStartHook failed: {message}"),
                    );
                    self.facts.health.entry(id).or_default().hook_failed = true;
                } else if let Some(health) = self.facts.health.get_mut(&id) {
                    health.post_start = true;
                }
            }
            Done::Stopped(id, result) => {
                self.deadlines.remove(&id);
                self.facts.killing.remove(&id);
                if let Err(message) = result {
                    tracing::warn!(pod = pod::name(&pod), id, message, "cannot stop a container");
                    retry(&mut self.facts, 1);
                }
            }
            Done::Removed(Ok(())) => {}
            Done::Removed(Err(message)) => {
                tracing::warn!(pod = pod::name(&pod), message, "cannot stop or remove in the runtime");
                retry(&mut self.facts, 1);
            }
            Done::TornDown(Ok(())) => self.facts.torn_down = true,
            Done::TornDown(Err(message)) => {
                tracing::warn!(pod = pod::name(&pod), message, "cannot take the pod's volumes away");
                retry(&mut self.facts, 1);
            }
            Done::Finalized(Ok(())) => self.facts.finalized = true,
            Done::Finalized(Err(error)) => {
                tracing::warn!(pod = pod::name(&pod), "cannot delete the pod from the API: {error}");
                retry(&mut self.facts, 1);
            }
            Done::Claims(result) => self.took_claims(result, now),
            Done::Permit(epoch, result) => self.took_permit(epoch, *result, now),
            Done::Written(result) => {
                self.writing = false;
                match *result {
                    Ok(written) => {
                        let newer = revision(&written).zip(revision(&self.pod)).is_none_or(|(new, old)| new >= old);
                        if newer && pod::uid(&written) == self.uid {
                            self.take_pod(Arc::new(written));
                        }
                    }
                    // It is gone or another one by now; the watch will say so.
                    Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {
                        self.write_after = Some(now + Duration::from_secs(2));
                    }
                    Err(error) => {
                        tracing::debug!(pod = pod::name(&pod), "cannot write the status: {error}");
                        self.write_after = Some(now + Duration::from_secs(1));
                    }
                }
            }
        }
    }

    fn started(&mut self, name: &str, id: String) {
        self.facts.waiting.remove(name);
        self.later.remove(name);
        self.facts.backoffs.forget(&format!("image/{name}"));
        self.started_here.insert(id.clone());
        let Some(spec) = &self.pod.spec else { return };
        let hook =
            pod::find_container(spec, name).and_then(|(_, c)| Some((c.lifecycle.as_ref()?.post_start.clone()?, c)));
        self.facts.health.insert(id.clone(), Health { post_start: hook.is_none(), ..Default::default() });
        if let Some((hook, container)) = hook {
            let target = container::target(&self.agent, &container, &id, &self.observed, spec);
            let name = name.to_owned();
            self.spawn(None, async move {
                let result = hooks::run(&target, &hook, Duration::from_secs(3600)).await;
                Done::Hook(name, id, result.map_err(|e| format!("{e:#}")))
            });
        }
    }

    fn take_report(&mut self, report: probe::Report) {
        match report {
            probe::Report::Failure { name, kind, message } => {
                let text = format!("{} probe failed: {message}", kind.title());
                self.agent.events.container(&self.pod, &name, Kind::Warning, "Unhealthy", text);
            }
            probe::Report::Verdict { container, kind, healthy } => {
                let health = self.facts.health.entry(container).or_default();
                match kind {
                    probe::Kind::Startup => health.startup = Some(healthy),
                    probe::Kind::Readiness => health.ready = Some(healthy),
                    probe::Kind::Liveness => health.live = Some(healthy),
                }
            }
        }
    }

    /// Starts the probers that should run and stops the others.
    fn sync_probers(&mut self, now: Timestamp) {
        let Some(spec) = self.pod.spec.clone() else { return };
        let stopping = self.facts.stop_began.is_some();
        let mut wanted = HashSet::new();
        for c in self.observed.containers.iter().filter(|c| c.state == State::Running) {
            let Some((class, container)) = pod::find_container(&spec, &c.name) else { continue };
            let Some(health) = self.facts.health.get(&c.id).copied() else { continue };
            if !matches!(class, Class::Main | Class::Sidecar) || self.facts.killing.contains_key(&c.id) {
                continue;
            }
            let up = machine::started(&container, c, &self.facts);
            let adopted = !self.started_here.contains(&c.id);
            for (kind, probe, active, verdict) in [
                (probe::Kind::Startup, &container.startup_probe, health.startup.is_none() && !stopping, None),
                (probe::Kind::Readiness, &container.readiness_probe, up, health.ready),
                (probe::Kind::Liveness, &container.liveness_probe, up && !stopping, adopted.then_some(true)),
            ] {
                let Some(probe) = probe.clone().filter(|_| active) else { continue };
                let key = (c.id.clone(), kind);
                if !self.probing.contains_key(&key) {
                    let target = container::target(&self.agent, &container, &c.id, &self.observed, &spec);
                    let age = c
                        .started
                        .map_or(Duration::ZERO, |s| Duration::try_from(now.duration_since(s)).unwrap_or_default());
                    let run = probe::run(c.name.clone(), kind, probe, target, age, verdict, self.reports.0.clone());
                    self.probing.insert(key.clone(), self.probers.spawn(run));
                }
                wanted.insert(key);
            }
        }
        self.probing.retain(|key, handle| {
            let keep = wanted.contains(key);
            if !keep {
                handle.abort();
            }
            keep
        });
        while self.probers.try_join_next().is_some() {}
    }

    fn node_facts(&self) -> NodeFacts {
        NodeFacts { host_ips: vec![self.agent.config.node_ip.to_string()] }
    }

    /// Writes the status if the API's copy differs; one write at a time.
    fn publish(&mut self, now: Timestamp) {
        let status = status::status(&self.pod, &self.observed, &self.facts, &self.node_facts(), now);
        let patch = status::patch(&self.uid, self.pod.status.as_ref(), &status);
        *self.view.write() = (Arc::clone(&self.pod), status);
        let held = self.write_after.is_some_and(|at| at > now);
        if !held {
            self.write_after = None;
        }
        let Some(patch) = patch else { return };
        if self.writing || held || self.facts.gone || self.facts.finalized || self.facts.busy.contains(&Op::Finalize) {
            return;
        }
        self.writing = true;
        let api: Api<Pod> = Api::namespaced(self.agent.client.clone(), pod::namespace(&self.pod));
        let name = pod::name(&self.pod).to_owned();
        self.spawn(None, async move {
            let result = api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(patch)).await;
            Done::Written(Box::new(result))
        });
    }

    /// Brings volumes up to date: when told, and when a token is due.
    fn refresh_volumes(&mut self, now: Timestamp, told: bool) {
        let due = told || self.renew.is_some_and(|at| at <= now);
        if !due || !self.facts.prepared || self.refreshing || self.facts.stop_began.is_some() {
            return;
        }
        self.refreshing = true;
        self.renew = None;
        let (agent, pod, volumes) = (Arc::clone(&self.agent), Arc::clone(&self.pod), Arc::clone(&self.volumes));
        let ips = self.observed.sandbox().map(|s| s.ips.clone()).unwrap_or_default();
        self.spawn(None, async move { Done::Refreshed(operations::make_volumes(&agent, &pod, &ips, &volumes).await) });
    }

    /// The pod is gone: so are its logs and our traces of it.
    async fn leave(self) {
        self.agent.fence.forget(&self.uid);
        self.agent.config.shutdown.report(&self.uid, true, true);
        self.agent.watches.subscribe(&self.uid, &self.changed, &Default::default());
        self.agent.pleg.unsubscribe(&self.uid);
        let logs =
            sandbox::log_directory(&self.agent.config, pod::namespace(&self.pod), pod::name(&self.pod), &self.uid);
        let _ = tokio::fs::remove_dir_all(logs).await;
    }
}
