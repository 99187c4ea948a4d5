//! The machine goes down: its pods leave in order, so that nobody who uses them notices.
//!
//! First the Node says that it is not ready, and so do all its pods; no new ones are taken. When no EndpointSlice leads to
//! them any more and proxies have heard of it, they end, lowest priority first ([`plan`], [`sequence`]). A pod that was
//! ended so is finished in the API: whoever replaces it waits for nothing, a StatefulSet neither.
//!
//! What is said to the API is upstream's
//! (<https://kubernetes.io/docs/concepts/cluster-administration/node-shutdown/>); that endpoints are waited for is not.
//!
//! The [`Handle`] outlives the agent: whoever hears that the machine goes down begins, and an agent that was started again
//! meanwhile goes on.

pub mod going_down;
pub mod logind;
pub mod plan;
pub mod sequence;

mod endpoints;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::Pod;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    plan::{Candidate, Graces},
    sequence::{Phase, Seen, Sequence, Times},
};
use crate::{Agent, pod};

/// Upstream's words in the Node's Ready condition.
pub const NODE_MESSAGE: &str = "node is shutting down";
/// The reason of a pod that was ended.
pub const REASON: &str = "Terminated";
/// Its message, and that of its condition.
pub const MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
/// The reason of a pod that came too late.
pub const REFUSED_REASON: &str = "NodeShutdown";
/// Its message.
pub const REFUSED_MESSAGE: &str = "Pod was rejected: Pod was rejected as the node is shutting down.";

/// More than all times together: for what takes time between them.
const SLACK: Duration = Duration::from_secs(5);

/// How a node goes down.
#[derive(Clone, Debug)]
pub struct Config {
    /// How long pods have.
    pub graces: Graces,
    /// The other times.
    pub times: Times,
    /// The D-Bus that logind is at; the system's if nothing is said.
    pub bus: Option<String>,
    /// Where logind's configuration is added to when it lets nobody delay a shutdown for long enough.
    pub logind_conf_dir: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            graces: Graces::default(),
            times: Times { settle: Duration::ZERO, proxies: Duration::ZERO },
            bus: None,
            logind_conf_dir: "/etc/systemd/logind.conf.d".into(),
        }
    }
}

impl Config {
    /// How long it takes at most until the machine may go down.
    pub fn total(&self) -> Duration {
        // Once for endpoints, once for the last words.
        self.graces.total() + self.times.settle * 2 + self.times.proxies
    }
}

/// What a pod is to do while the machine goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// It goes on, unready, until its turn.
    Wait,
    /// It ends, within this time.
    End(Duration),
    /// It came too late.
    Refuse,
}

/// Where it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    /// The machine goes down.
    down: bool,
    /// The pods that are concerned, once that is known: what each is to do.
    orders: Option<BTreeMap<String, Order>>,
    /// Nothing is left to be waited for.
    over: bool,
}

/// What has become of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    stopped: bool,
    told: bool,
}

/// Whether the machine goes down, and how far that is.
pub struct Handle {
    config: Config,
    state: watch::Sender<State>,
    progress: watch::Sender<BTreeMap<String, Progress>>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("config", &self.config).field("state", &*self.state.borrow()).finish()
    }
}

impl Handle {
    /// Of a machine that stays.
    pub fn new(config: Config) -> Arc<Handle> {
        Arc::new(Handle {
            config,
            state: watch::channel(State::default()).0,
            progress: watch::channel(BTreeMap::new()).0,
        })
    }

    /// How it is done.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether pods are left alone whatever happens.
    pub fn is_off(&self) -> bool {
        self.config.graces.is_off()
    }

    /// The machine goes down. Saying so again changes nothing.
    pub fn begin(&self) {
        if self.is_off() {
            return;
        }
        self.state.send_if_modified(|state| !std::mem::replace(&mut state.down, true));
    }

    /// It does not after all. Pods that have ended have ended; the others are as before.
    pub fn cancel(&self) {
        self.state.send_if_modified(|state| std::mem::take(state).down);
        self.progress.send_replace(BTreeMap::new());
    }

    /// Whether the machine goes down.
    pub fn is_down(&self) -> bool {
        self.state.borrow().down
    }

    /// Waits until all pods have ended, or until the time for that is over: then it says no.
    pub async fn over(&self) -> bool {
        let mut state = self.state.subscribe();
        let ended = state.wait_for(|state| state.over || !state.down);
        // The sender is ours: the wait itself cannot fail.
        timeout(self.config.total() + SLACK, ended).await.is_ok_and(|state| state.is_ok())
    }

    /// Waits until the machine stays.
    async fn canceled(&self) {
        // The sender is ours: the wait itself cannot fail.
        let _ = self.state.subscribe().wait_for(|state| !state.down).await;
    }

    /// Tells of every change.
    pub fn changes(&self) -> Changes {
        Changes(self.state.subscribe())
    }

    /// What a pod is to do, if the machine goes down.
    pub(crate) fn order(&self, uid: &str) -> Option<Order> {
        let state = self.state.borrow();
        match &state.orders {
            _ if !state.down => None,
            // Who is concerned is not known yet; nobody begins anything until then.
            None => Some(Order::Wait),
            Some(orders) => Some(orders.get(uid).copied().unwrap_or(Order::Refuse)),
        }
    }

    /// What has become of a pod: whether nothing of it is left here, and whether the API knows.
    pub(crate) fn report(&self, uid: &str, stopped: bool, told: bool) {
        if !self.is_down() {
            return;
        }
        let now = Progress { stopped, told };
        self.progress.send_if_modified(|all| all.insert(uid.to_owned(), now) != Some(now));
    }
}

/// See [`Handle::changes`].
pub struct Changes(watch::Receiver<State>);

impl Changes {
    /// Something has changed.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // The handle is gone: nothing changes any more.
            std::future::pending::<()>().await;
        }
    }
}

struct Looked<'a> {
    exposed: Option<bool>,
    progress: &'a BTreeMap<String, Progress>,
}

impl Seen for Looked<'_> {
    fn exposed(&self) -> Option<bool> {
        self.exposed
    }
    fn runs(&self, uid: &str) -> bool {
        !self.progress.get(uid).is_some_and(|p| p.stopped)
    }
    fn untold(&self, uid: &str) -> bool {
        !self.progress.get(uid).is_some_and(|p| p.told)
    }
}

fn is_finished(pod: &Pod) -> bool {
    matches!(pod.status.as_ref().and_then(|s| s.phase.as_deref()), Some("Failed" | "Succeeded"))
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

fn candidate(pod: &Pod) -> Candidate {
    let spec = pod.spec.as_ref();
    let grace = spec.and_then(|s| s.termination_grace_period_seconds);
    Candidate {
        uid: pod::uid(pod).to_owned(),
        priority: spec.and_then(|s| s.priority).unwrap_or(0),
        grace: grace.map(|seconds| Duration::from_secs(seconds.max(0).unsigned_abs())),
    }
}

/// Leads the pods out, as often as the machine goes down.
pub async fn run(agent: Arc<Agent>, stop: CancellationToken) {
    let looped = async {
        let handle = Arc::clone(&agent.config.shutdown);
        let mut state = handle.state.subscribe();
        loop {
            // The handle lives as long as we do.
            let _ = state.wait_for(|state| state.down && !state.over).await;
            tokio::select! {
                () = lead(&agent, &handle) => {}
                () = handle.canceled() => {
                    tracing::info!("the machine stays after all: pods are ready again");
                }
            }
        }
    };
    stop.run_until_cancelled(Box::pin(looped)).await;
}

async fn lead(agent: &Arc<Agent>, handle: &Handle) {
    let times = handle.config.times;
    // An agent that has just begun has to know its pods first.
    let _ = timeout(times.settle, agent.listed.subscribe().wait_for(|listed| *listed)).await;
    let pods: Vec<Arc<Pod>> = agent.pods.read().values().map(|view| Arc::clone(&view.read().0)).collect();
    let known = handle.state.borrow().orders.clone();
    let concerned: Vec<&Pod> = pods
        .iter()
        .map(Arc::as_ref)
        .filter(|pod| match &known {
            // An agent before this one has said who is concerned, and refused the others.
            Some(orders) => orders.contains_key(pod::uid(pod)),
            None => !is_finished(pod),
        })
        .collect();
    let candidates: Vec<Candidate> = concerned.iter().map(|pod| candidate(pod)).collect();
    let served = concerned.iter().any(|pod| is_ready(pod));
    let groups = plan::plan(&handle.config.graces, &candidates);
    tracing::info!(pods = candidates.len(), "the machine goes down: its pods are unready from now on");
    let mut sequence = Sequence::new(groups, times, served, Instant::now());
    order(handle, &sequence);
    let uids: BTreeSet<String> = candidates.into_iter().map(|c| c.uid).collect();
    let (exposed, mut seen) = watch::channel(None);
    let following = endpoints::follow(agent.client.clone(), agent.config.node_name.clone(), uids, exposed);
    let following = tokio::spawn(following);
    let _ends = AbortOnDrop(following.abort_handle());
    let mut progress = handle.progress.subscribe();
    loop {
        let before = sequence.phase();
        let wake = {
            let progress = progress.borrow_and_update();
            let looked = Looked { exposed: *seen.borrow_and_update(), progress: &progress };
            sequence.step(Instant::now(), &looked)
        };
        if sequence.phase() != before {
            say(sequence.phase(), &sequence);
            order(handle, &sequence);
        }
        let Some(wake) = wake else { break };
        tokio::select! {
            Ok(()) = seen.changed() => {}
            Ok(()) = progress.changed() => {}
            () = tokio::time::sleep_until(wake) => {}
        }
    }
    handle.state.send_modify(|state| state.over = state.down);
}

fn say(phase: Phase, sequence: &Sequence) {
    match phase {
        Phase::Exposed { .. } => {}
        Phase::Unheard { .. } => tracing::info!("no Service leads to this node's pods any more"),
        Phase::Ending { group, .. } => {
            let count = sequence.groups().get(group).map_or(0, |g| g.pods.len());
            tracing::info!(group, pods = count, "pods end");
        }
        Phase::Telling { .. } => tracing::info!("all pods have ended"),
        Phase::Over => tracing::info!("the machine may go down"),
    }
}

/// Says to every pod what it is to do.
fn order(handle: &Handle, sequence: &Sequence) {
    let of = |group: &plan::Group, ends: bool| {
        let order =
            move |(uid, grace): &(String, Duration)| (uid.clone(), if ends { Order::End(*grace) } else { Order::Wait });
        group.pods.iter().map(order).collect::<Vec<_>>()
    };
    let waits = sequence.groups().iter().flat_map(|group| of(group, false));
    let ends = sequence.begun().iter().flat_map(|group| of(group, true));
    let mut orders: BTreeMap<String, Order> = waits.collect();
    orders.extend(ends);
    handle.state.send_if_modified(|state| {
        let changes = state.down && state.orders.as_ref() != Some(&orders);
        if changes {
            state.orders = Some(orders);
        }
        changes
    });
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(seconds: u64) -> Arc<Handle> {
        let times = Times { settle: Duration::from_secs(5), proxies: Duration::from_secs(1) };
        let graces = Graces::new(Duration::from_secs(seconds), Duration::ZERO).unwrap();
        Handle::new(Config { graces, times, ..Config::default() })
    }

    #[tokio::test(start_paused = true)]
    async fn who_hears_of_it() {
        let handle = handle(30);
        assert_eq!(handle.order("a"), None);
        handle.begin();
        assert_eq!(handle.order("a"), Some(Order::Wait), "before anybody knows who is concerned");
        let groups =
            vec![plan::Group { time: Duration::from_secs(30), pods: vec![("a".into(), Duration::from_secs(7))] }];
        let mut sequence = Sequence::new(groups, handle.config.times, true, Instant::now());
        order(&handle, &sequence);
        assert_eq!((handle.order("a"), handle.order("late")), (Some(Order::Wait), Some(Order::Refuse)));
        tokio::time::advance(Duration::from_secs(7)).await;
        sequence.step(Instant::now(), &Looked { exposed: None, progress: &BTreeMap::new() });
        order(&handle, &sequence);
        tokio::time::advance(Duration::from_secs(2)).await;
        sequence.step(Instant::now(), &Looked { exposed: None, progress: &BTreeMap::new() });
        order(&handle, &sequence);
        assert_eq!(handle.order("a"), Some(Order::End(Duration::from_secs(7))));
        handle.cancel();
        assert_eq!((handle.is_down(), handle.order("a")), (false, None));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let handle = handle(30);
        let start = Instant::now();
        handle.begin();
        assert!(!handle.over().await, "no agent runs that could end anything");
        assert_eq!(start.elapsed(), handle.config.total() + SLACK);
        handle.cancel();
        assert!(handle.over().await);
        let off = Handle::new(Config::default());
        off.begin();
        assert!(off.is_off() && !off.is_down() && off.over().await);
    }
}
