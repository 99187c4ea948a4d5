//! One task per pod: it asks the state machine what to do, begins that, and tells the API what came of it.
//!
//! Everything that takes time runs beside it in [`Worker::ops`]; the worker itself never waits for one thing only.

mod admit;
mod begin;
mod finish;
mod hold;
mod leave;
mod probing;
mod resize;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, PodStatus, ResourceRequirements};
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

use self::{admit::Admission, hold::Fencing, resize::Resizing};
use crate::{
    Agent,
    admission::Kept,
    container::Failure,
    events::Kind,
    node_loop, operations,
    pod::{
        self,
        machine::{self, Action, Facts, Health, Op, Waiting},
        observed::{Observed, State},
        qos::Limits,
        status::{self, NodeFacts},
    },
    probe, sandbox, shutdown,
    topology::Refusal,
    volume::{self, Made, Volumes},
};

/// What the API says about the pod.
#[derive(Clone, Debug)]
pub struct Input {
    /// Its last known form.
    pub pod: Arc<Pod>,
    /// It is no longer there.
    pub gone: bool,
    /// The pod that shows it in the API, of one that stands in a file.
    pub mirror: Option<Arc<Pod>>,
    /// It stands in a file: the API only shows it.
    pub is_static: bool,
}

/// What others may see of a worker: the pod and the status that it computed last.
pub type View = Arc<RwLock<(Arc<Pod>, PodStatus)>>;

enum Done {
    Prepared(Result<Made, volume::Error>, Limits),
    Refreshed(Result<Made, volume::Error>),
    Sandbox(Result<(), String>),
    Started(String, Result<String, Failure>, ResourceRequirements),
    Resized(Result<BTreeMap<String, ResourceRequirements>, String>, Option<Limits>),
    Node(Box<Result<Option<Node>, kube::Error>>),
    Given(Box<Kept>, Result<(), Refusal>),
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
    /// As the API has it.
    pod: Arc<Pod>,
    /// With the resources that it has been given.
    given: Arc<Pod>,
    is_static: bool,
    mirror: Option<Arc<Pod>>,
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
    evictions: watch::Receiver<u64>,
    admission: Admission,
    resizing: Resizing,
}

/// A resource version as a number. It is opaque to clients in general; ours is a revision, which only grows.
fn revision(pod: &Pod) -> Option<u64> {
    pod.metadata.resource_version.as_deref()?.parse().ok()
}

impl Worker {
    /// For one pod.
    pub fn new(agent: Arc<Agent>, input: watch::Receiver<Input>, view: View) -> Self {
        let Input { pod, mirror, is_static, .. } = input.borrow().clone();
        let uid = pod::uid(&pod).to_owned();
        let runtime = agent.pleg.subscribe(&uid);
        let observed = Arc::clone(&runtime.borrow());
        let directory = volume::pod_directory(&agent.config.data_dir, &uid);
        let mut worker = Self {
            volumes: Arc::new(Mutex::new(Volumes::new(agent.client.clone(), directory))),
            node_ready: agent.ready.subscribe(),
            facts: Facts { waits: true, ..Default::default() },
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
            evictions: agent.evictions.changes(),
            admission: Admission::new(&agent),
            resizing: Resizing::new(&agent, &uid),
            agent,
            uid,
            given: Arc::clone(&pod),
            pod,
            is_static,
            mirror,
            observed,
            input,
            runtime,
        };
        worker.resume();
        worker
    }

    /// Runs until nothing is left of the pod, or until shutdown, which leaves it as it is.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let now = Timestamp::now();
        let start = self.pod.status.as_ref().and_then(|s| s.start_time.clone());
        self.facts.start_time = Some(start.map_or(now, |t| t.0));
        self.facts.gone = self.input.borrow().gone;
        loop {
            let now = Timestamp::now();
            let ready = *self.node_ready.borrow_and_update();
            self.facts.node_ready = ready || self.may_start_early();
            self.obey(now);
            self.go_if_evicted(now);
            self.observe(now);
            self.be_admitted(now);
            self.be_resized();
            self.hold(now);
            let plan = machine::plan(&self.given, &self.observed, &self.facts, now);
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
            self.keep();
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
                Ok(()) = self.fence.changes.changed(), if self.fence.concerns => {}
                () = self.leaving.changed() => {}
                Ok(()) = self.evictions.changed() => {}
                () = self.admission.changed(), if self.facts.waits => {}
                Ok(()) = self.resizing.freed.changed(), if self.facts.resize.pending.is_some() => {}
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

    /// Whether it may start on a node that is not ready: on the node's own network it needs none, and what stands in a file
    /// does not wait for the API, which may be what it serves.
    fn may_start_early(&self) -> bool {
        let on_host = self.pod.spec.as_ref().is_some_and(|s| s.host_network == Some(true));
        match self.is_static {
            true => on_host || node_loop::has_network(&self.agent),
            false => on_host && self.agent.services.synced(),
        }
    }

    fn take_input(&mut self) {
        let input = self.input.borrow_and_update().clone();
        self.facts.gone |= input.gone;
        self.mirror = input.mirror;
        if self.is_static {
            return;
        }
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
        self.fit_to_given();
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
        self.facts.anew.retain(|id| observed.containers.iter().any(|c| c.id == *id));
        self.facts.resize.actuated.retain(|id, _| observed.containers.iter().any(|c| c.id == *id));
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
            if c.state == State::Running && !busy && !self.facts.resize.actuated.contains_key(&c.id) {
                // It was made before we could write down with what: with what it was given, then.
                let made = self.given.spec.as_ref().and_then(|s| pod::find_container(s, &c.name));
                let resources = made.and_then(|(_, made)| made.resources).unwrap_or_default();
                self.facts.resize.actuated.insert(c.id.clone(), resources);
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

    fn node_facts(&self) -> NodeFacts {
        NodeFacts { host_ips: self.agent.config.node_ips.iter().map(ToString::to_string).collect() }
    }

    /// Writes the status if the API's copy differs; one write at a time.
    fn publish(&mut self, now: Timestamp) {
        let status = status::status(&self.given, &self.observed, &self.facts, &self.node_facts(), now);
        let shown = if self.is_static { self.mirror.as_ref() } else { Some(&self.pod) };
        let patch = shown.and_then(|shown| status::patch(pod::uid(shown), shown.status.as_ref(), &status));
        if self.is_static && self.pod.status.as_ref() != Some(&status) {
            // There is no other memory of it: the mirror may be deleted at any time.
            Arc::make_mut(&mut self.pod).status = Some(status.clone());
            self.fit_to_given();
        }
        if matches!(status.phase.as_deref(), Some("Failed" | "Succeeded")) {
            self.agent.ledger.release(&self.uid);
            if self.observed.alive().next().is_none() && !self.admission.is_given {
                self.agent.release_for_good(&self.uid);
            }
        }
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
        let (agent, pod, volumes) = (Arc::clone(&self.agent), Arc::clone(&self.given), Arc::clone(&self.volumes));
        let ips = self.observed.sandbox().map(|s| s.ips.clone()).unwrap_or_default();
        self.spawn(None, async move { Done::Refreshed(operations::make_volumes(&agent, &pod, &ips, &volumes).await) });
    }

    /// The pod is gone: so are its logs and our traces of it.
    async fn leave(self) {
        self.agent.fence.forget(&self.uid);
        self.agent.evictions.forget(&self.uid);
        self.agent.ledger.release(&self.uid);
        self.agent.release_for_good(&self.uid);
        if let Some(gate) = &self.agent.config.gate {
            (gate.left)(&self.uid);
        }
        self.agent.config.shutdown.report(&self.uid, true, true);
        self.agent.watches.subscribe(&self.uid, &self.changed, &Default::default());
        self.agent.pleg.unsubscribe(&self.uid);
        let logs =
            sandbox::log_directory(&self.agent.config, pod::namespace(&self.pod), pod::name(&self.pod), &self.uid);
        let _ = tokio::fs::remove_dir_all(logs).await;
    }
}
