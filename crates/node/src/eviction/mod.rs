//! A node that is short of memory, disk or process numbers says so, gives back what nobody needs, and then lets pods go, one
//! after the other.
//!
//! [`state`], [`rank`] and [`images`] decide, purely; here it is measured and done. A pod that has to go learns of it from
//! [`Orders`], which its worker listens to.
//!
//! <https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/>

mod collect;
pub mod images;
pub mod rank;
pub mod state;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::{Node, Pod};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use self::{
    collect::Collector,
    rank::{Candidate, Used},
    state::{Passed, State},
};
use crate::{
    Agent,
    events::Kind,
    pod::{self, observed::State as Running},
    pressure::{self, Pressure, Signal},
    stats::{self, Disks, read},
};

/// What the status of a pod says that had to go.
pub const REASON: &str = "Evicted";
/// How often levels are looked at: reading them costs next to nothing, and memory goes fast.
const PERIOD: Duration = Duration::from_secs(2);
/// How often it is looked whether pods have more on the disk than they may.
const LOCAL_PERIOD: Duration = Duration::from_secs(10);
/// How long the next one waits for a pod that has to go.
const PATIENCE: Duration = Duration::from_secs(30);
/// The least time to end, as upstream's.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Why a pod has to go, and how long it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// For its status.
    pub message: String,
    /// At most so long.
    pub grace: Duration,
}

/// Who has to go, and how the node is.
pub struct Orders {
    orders: Mutex<HashMap<String, Order>>,
    /// Changes with each order.
    count: watch::Sender<u64>,
    pressure: watch::Sender<Pressure>,
}

impl Default for Orders {
    fn default() -> Orders {
        Orders { orders: Mutex::default(), count: watch::channel(0).0, pressure: watch::channel(Pressure::default()).0 }
    }
}

impl Orders {
    /// Told with each order.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.count.subscribe()
    }

    /// The order for a pod.
    pub fn of(&self, uid: &str) -> Option<Order> {
        self.orders.lock().get(uid).cloned()
    }

    /// A pod is gone.
    pub fn forget(&self, uid: &str) {
        self.orders.lock().remove(uid);
    }

    /// The node's conditions, and when they change.
    pub fn pressure(&self) -> watch::Receiver<Pressure> {
        self.pressure.subscribe()
    }

    /// The node's conditions now.
    pub fn current(&self) -> Pressure {
        *self.pressure.borrow()
    }

    fn order(&self, uid: &str, order: Order) {
        self.orders.lock().entry(uid.to_owned()).or_insert(order);
        self.count.send_modify(|count| *count += 1);
    }
}

/// Why a pod that comes to a node under pressure is refused, if it is: under memory pressure that has no requests, else
/// every one (<https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/#node-conditions>).
pub fn refusal(pod: &Pod, pressure: Pressure) -> Option<String> {
    if rank::is_critical(pod) || pressure == Pressure::default() {
        return None;
    }
    let only_memory = !pressure.disk && !pressure.pids;
    let tolerates = || {
        let all = pod.spec.iter().flat_map(|spec| spec.tolerations.iter().flatten());
        let mut fitting = all.filter(|t| {
            t.key.as_deref().is_none_or(|key| key.is_empty() || key == "node.kubernetes.io/memory-pressure")
                && t.effect.as_deref().is_none_or(|effect| effect.is_empty() || effect == "NoSchedule")
        });
        fitting.next().is_some()
    };
    if only_memory && (pod::qos::class(pod) != pod::qos::Qos::BestEffort || tolerates()) {
        return None;
    }
    let mut names = Vec::new();
    for (holds, name) in
        [(pressure.memory, "MemoryPressure"), (pressure.disk, "DiskPressure"), (pressure.pids, "PIDPressure")]
    {
        names.extend(holds.then_some(name));
    }
    Some(format!("The node had condition: [{}]. ", names.join(" ")))
}

/// Measures, says how the node is, and lets pods go, until shutdown.
pub async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    let mut evictor = Evictor {
        state: State::default(),
        collector: Collector::new(Arc::clone(&agent)),
        going: None,
        noted: None,
        local: Instant::now(),
        agent,
    };
    let looped = async {
        loop {
            evictor.look().await;
            tokio::time::sleep(PERIOD).await;
        }
    };
    shutdown.run_until_cancelled(Box::pin(looped)).await;
}

struct Evictor {
    agent: Arc<Agent>,
    state: State,
    collector: Collector,
    /// The pod that has to go, and since when.
    going: Option<(String, Instant)>,
    /// When it was said last that the node is short of something.
    noted: Option<Instant>,
    /// When it is looked next whether pods have more on the disk than they may.
    local: Instant,
}

impl Evictor {
    async fn look(&mut self) {
        let now = Instant::now();
        let levels = pressure::levels(&self.agent.config.data_dir);
        let verdict = self.state.step(&self.agent.config.eviction, &levels, now);
        self.agent
            .evictions
            .pressure
            .send_if_modified(|old| std::mem::replace(old, verdict.pressure) != verdict.pressure);
        self.collector.look(&levels, now).await;
        if now >= self.local {
            self.local = now + LOCAL_PERIOD;
            self.local_limits().await;
        }
        let Some(passed) = verdict.relieve else { return };
        let says = self.noted.is_none_or(|at| now.saturating_duration_since(at) >= LOCAL_PERIOD);
        if says {
            self.noted = Some(now);
            self.note_node(&passed);
        }
        if self.waits(now) {
            return;
        }
        if matches!(passed.signal, Signal::Disk | Signal::Inodes) {
            // What nobody needs goes first, and that may be enough.
            self.collector.free_all(now).await;
            let after = pressure::levels(&self.agent.config.data_dir);
            if after.get(&passed.signal).is_some_and(|level| level.available >= passed.least) {
                return;
            }
        }
        self.evict_one(&passed, now).await;
    }

    fn note_node(&self, passed: &Passed) {
        let name = self.agent.config.node_name.clone();
        let mut node = Node::default();
        // As upstream, so that `kubectl describe node` finds it.
        (node.metadata.uid, node.metadata.name) = (Some(name.clone()), Some(name));
        let text = format!("Attempting to reclaim {}", passed.signal.resource());
        self.agent.events.node(&node, Kind::Warning, "EvictionThresholdMet", text);
    }

    /// Whether a pod that has to go is still there.
    fn waits(&mut self, now: Instant) -> bool {
        let Some((uid, since)) = &self.going else { return false };
        let alive = self.agent.pleg.pods().get(uid).is_some_and(|seen| seen.alive().next().is_some());
        let waits = alive && now.saturating_duration_since(*since) < PATIENCE;
        if !waits {
            self.going = None;
        }
        waits
    }

    /// The pods that run here and may have to go.
    fn candidates(&self) -> Vec<(String, Arc<Pod>)> {
        let observed = self.agent.pleg.pods();
        let pods = self.agent.pods.read();
        let views = pods.iter().map(|(uid, view)| (uid.clone(), Arc::clone(&view.read().0)));
        views
            .filter(|(uid, pod)| {
                let alive = observed.get(uid).is_some_and(|seen| seen.alive().next().is_some());
                alive && !rank::is_critical(pod) && self.agent.evictions.of(uid).is_none()
            })
            .collect()
    }

    async fn evict_one(&mut self, passed: &Passed, now: Instant) {
        let signal = passed.signal;
        let disks = match signal {
            Signal::Disk | Signal::Inodes => stats::count_disks(&self.agent).await,
            Signal::Memory | Signal::Pids => Disks::new(),
        };
        let mut pods: HashMap<String, Arc<Pod>> = self.candidates().into_iter().collect();
        let candidate = |(uid, pod): (&String, &Arc<Pod>)| Candidate {
            uid: uid.clone(),
            priority: pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0),
            used: self.used(uid, pod, signal, &disks),
            requested: rank::requested(pod, signal),
        };
        let mut candidates: Vec<Candidate> = pods.iter().map(candidate).collect();
        rank::rank(signal, &mut candidates);
        let first = candidates.into_iter().next().and_then(|c| Some((pods.remove(&c.uid)?, c.uid)));
        let Some((pod, uid)) = first else {
            if self.noted == Some(now) {
                tracing::warn!(resource = signal.resource(), "the node is short of it, and no pod may be evicted");
            }
            return;
        };
        let used = self.used_by_containers(&uid, &pod, signal, &disks);
        let used: Vec<Used<'_>> = used.iter().map(|(name, used)| Used { name, used: *used }).collect();
        let message = rank::message(&pod, passed, &used);
        let grace = if passed.hard { AT_ONCE } else { self.agent.config.eviction.max_pod_grace.max(AT_ONCE) };
        self.evict(&uid, &pod, message, grace, now);
    }

    fn evict(&mut self, uid: &str, pod: &Pod, message: String, grace: Duration, now: Instant) {
        tracing::warn!(pod = pod::name(pod), namespace = pod::namespace(pod), message, "evicted");
        self.agent.events.pod(pod, Kind::Warning, REASON, message.clone());
        self.agent.evictions.order(uid, Order { message, grace });
        self.going = Some((uid.to_owned(), now));
    }

    /// What a pod uses of what is short, now.
    fn used(&self, uid: &str, pod: &Pod, signal: Signal, disks: &Disks) -> Option<u64> {
        let group = self.agent.cgroups.pod_path(pod::qos::class(pod), uid);
        match signal {
            Signal::Memory => Some(read::usage(&self.agent.cgroups, &group)?.working_set),
            Signal::Pids => read::processes(&self.agent.cgroups, &group),
            Signal::Disk => Some(disks.get(uid)?.sum().bytes),
            Signal::Inodes => Some(disks.get(uid)?.sum().inodes),
        }
    }

    fn used_by_containers(&self, uid: &str, pod: &Pod, signal: Signal, disks: &Disks) -> Vec<(String, u64)> {
        let group = self.agent.cgroups.pod_path(pod::qos::class(pod), uid);
        let observed = self.agent.pleg.pods();
        let Some(seen) = observed.get(uid) else { return Vec::new() };
        let one = |c: &pod::observed::ContainerObs| {
            let used = match signal {
                Signal::Memory => read::usage(&self.agent.cgroups, &format!("{group}/{}", c.id))?.working_set,
                Signal::Pids => return None,
                Signal::Disk | Signal::Inodes => {
                    let own = disks.get(uid)?;
                    let layer = own.layers.get(&c.name).copied().unwrap_or_default();
                    let all = layer + own.logs.get(&c.name).copied().unwrap_or_default();
                    if signal == Signal::Disk { all.bytes } else { all.inodes }
                }
            };
            Some((c.name.clone(), used))
        };
        seen.containers.iter().filter(|c| c.state == Running::Running).filter_map(one).collect()
    }

    /// Lets pods go that have more on the disk than they may.
    async fn local_limits(&mut self) {
        let limited: Vec<(String, Arc<Pod>)> =
            self.candidates().into_iter().filter(|(_, pod)| has_local_limit(pod)).collect();
        if limited.is_empty() {
            return;
        }
        let disks = stats::count_disks(&self.agent).await;
        for (uid, pod) in limited {
            let over = disks.get(&uid).and_then(|disks| rank::over_local_limit(&pod, disks));
            if let Some(message) = over {
                self.evict(&uid, &pod, message, AT_ONCE, Instant::now());
            }
        }
    }
}

/// Whether a pod may have only so much on the disk.
fn has_local_limit(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let in_volume = |v: &k8s_openapi::api::core::v1::Volume| {
        // Those in memory are bounded by the kernel.
        v.empty_dir.as_ref().is_some_and(|e| e.size_limit.is_some() && e.medium.as_deref() != Some("Memory"))
    };
    let in_container = |c: pod::ContainerRef<'_>| {
        let limits = c.spec.resources.as_ref().and_then(|r| r.limits.as_ref());
        limits.is_some_and(|limits| limits.contains_key("ephemeral-storage"))
    };
    spec.volumes.iter().flatten().any(in_volume) || pod::containers(spec).any(in_container)
}

/// The ids of images that containers use, as the runtime names them.
fn used_images(agent: &Agent) -> HashSet<String> {
    let pods = agent.pleg.pods();
    pods.values().flat_map(|seen| seen.containers.iter().map(|c| c.image_id.clone())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn who_is_refused() {
        let check = |spec: serde_json::Value, qos: &str, pressure: Pressure, expect: Option<&str>| {
            let pod: Pod = serde_json::from_value(json!({"spec": spec, "status": {"qosClass": qos}})).unwrap();
            assert_eq!(refusal(&pod, pressure).as_deref(), expect, "{spec}");
        };
        let memory = Pressure { memory: true, ..Default::default() };
        let plain = json!({"containers": []});
        check(plain.clone(), "BestEffort", Pressure::default(), None);
        check(plain.clone(), "BestEffort", memory, Some("The node had condition: [MemoryPressure]. "));
        check(plain.clone(), "Burstable", memory, None);
        let tolerant = json!({"containers": [], "tolerations": [{"key": "node.kubernetes.io/memory-pressure",
            "operator": "Exists", "effect": "NoSchedule"}]});
        check(tolerant.clone(), "BestEffort", memory, None);
        let both = Pressure { memory: true, disk: true, pids: false };
        check(tolerant, "Guaranteed", both, Some("The node had condition: [MemoryPressure DiskPressure]. "));
        check(json!({"containers": [], "priority": 2_000_000_000}), "BestEffort", both, None);
    }

    #[test]
    fn orders_are_heard_and_the_first_one_counts() {
        let orders = Orders::default();
        let heard = orders.changes();
        let order = |message: &str| Order { message: message.into(), grace: AT_ONCE };
        orders.order("u", order("first"));
        orders.order("u", order("second"));
        assert!(heard.has_changed().unwrap());
        assert_eq!(orders.of("u"), Some(order("first")));
        orders.forget("u");
        assert_eq!(orders.of("u"), None);
    }
}
