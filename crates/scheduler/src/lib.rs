//! Filters and scores over a snapshot of nodes and pods, and the loop that binds
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/scheduling-framework/>).
//!
//! [`decide::decide`] is pure: a snapshot and a pod give a node, or the reasons why there is none. [`queue::Queue`]
//! says which pod is next. [`run`] feeds them from watches and carries out what they decide.

pub mod affinity;
pub mod decide;
pub mod pod;
pub mod queue;
mod report;
pub mod score;
pub mod snapshot;
pub mod spread;

use std::{collections::HashSet, hash::Hash, mem, sync::Arc, time::Duration};

use anyhow::bail;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Node, PersistentVolumeClaim, Pod};
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use rand::{SeedableRng, rngs::StdRng};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use decide::{Diagnosis, decide};
use pod::PodInfo;
use queue::Queue;
use report::Reporter;
use snapshot::Snapshot;

/// How the scheduler works.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// Pods that name this scheduler are scheduled.
    pub name: String,
    /// How many bindings are under way at a time.
    pub bindings: usize,
    /// Pods that fit nowhere are tried again after this long, even if nothing seems to have changed.
    pub retry_unschedulable: Duration,
}

impl Default for SchedulerConfig {
    fn default() -> SchedulerConfig {
        SchedulerConfig {
            name: "default-scheduler".into(),
            bindings: 64,
            retry_unschedulable: Duration::from_secs(300),
        }
    }
}

/// How many pods are decided on before watches are looked at again.
const BURST: usize = 64;

/// How a binding went.
struct Bound {
    pod: Arc<PodInfo>,
    node: String,
    result: Result<(), kube::Error>,
}

/// Schedules pods until `shutdown`.
///
/// # Errors
/// If a watch ends for good.
pub fn run(
    client: Client,
    config: SchedulerConfig,
    shutdown: CancellationToken,
) -> futures::future::BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(client, config, shutdown))
}

async fn work(client: Client, config: SchedulerConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    let watch = watcher::Config::default();
    let mut pods = watcher(Api::<Pod>::all(client.clone()), watch.clone()).default_backoff().boxed();
    let mut nodes = watcher(Api::<Node>::all(client.clone()), watch.clone()).default_backoff().boxed();
    let mut namespaces = watcher(Api::<Namespace>::all(client.clone()), watch.clone()).default_backoff().boxed();
    let mut claims = watcher(Api::<PersistentVolumeClaim>::all(client.clone()), watch).default_backoff().boxed();
    let reporter = Reporter::new(client.clone(), config.name.clone());
    let (done, mut bound) = mpsc::channel::<Bound>(config.bindings);
    let slots = Arc::new(Semaphore::new(config.bindings));
    let mut tasks = JoinSet::new();
    let mut scheduler = Scheduler {
        snapshot: Snapshot::default(),
        queue: Queue::new(config.retry_unschedulable),
        name: config.name.clone(),
        random: StdRng::from_os_rng(),
        relisted: Relisted::default(),
        synced: [false; 4],
    };
    loop {
        let now = Instant::now();
        let wake = scheduler.queue.next_wake(now);
        let work = scheduler.is_synced() && scheduler.queue.has_ready(now) && slots.available_permits() > 0;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            event = pods.try_next() => match event {
                Ok(Some(event)) => scheduler.on_pod(event, now),
                Ok(None) => bail!("the watch of pods ended"),
                Err(error) => tracing::warn!(%error, "the watch of pods broke and is set up again"),
            },
            event = nodes.try_next() => match event {
                Ok(Some(event)) => scheduler.on_node(event, now),
                Ok(None) => bail!("the watch of nodes ended"),
                Err(error) => tracing::warn!(%error, "the watch of nodes broke and is set up again"),
            },
            event = namespaces.try_next() => match event {
                Ok(Some(event)) => scheduler.on_namespace(event),
                Ok(None) => bail!("the watch of namespaces ended"),
                Err(error) => tracing::warn!(%error, "the watch of namespaces broke and is set up again"),
            },
            event = claims.try_next() => match event {
                Ok(Some(event)) => scheduler.on_claim(event, now),
                Ok(None) => bail!("the watch of claims ended"),
                Err(error) => tracing::warn!(%error, "the watch of claims broke and is set up again"),
            },
            Some(bound) = bound.recv() => scheduler.on_bound(bound, &reporter, now),
            // Ends of tasks are only collected; what they found out came through the channel.
            Some(_) = tasks.join_next() => {}
            () = sleep_until(wake), if wake.is_some() && !work => {}
            () = std::future::ready(()), if work => {
                for _ in 0..BURST {
                    let Ok(slot) = slots.clone().try_acquire_owned() else { break };
                    let Some(pod) = scheduler.queue.pop(now) else { break };
                    match scheduler.schedule(&pod) {
                        Ok(node) => {
                            let (client, done) = (client.clone(), done.clone());
                            tasks.spawn(async move {
                                let _slot = slot;
                                let result = report::bind(&client, &pod, &node).await;
                                // The receiver lives as long as the loop that spawned this.
                                let _ = done.send(Bound { pod, node, result }).await;
                            });
                        }
                        Err(diagnosis) => {
                            reporter.unschedulable(&pod, &diagnosis);
                            scheduler.queue.park(pod, now);
                        }
                    }
                }
            }
        }
    }
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What each watch has listed since its last full list began. A list that follows a broken watch says by silence what
/// has been deleted meanwhile. Each watch has its own: they are set up again independently of each other.
#[derive(Default)]
struct Relisted {
    pods: HashSet<String>,
    nodes: HashSet<String>,
    namespaces: HashSet<String>,
    claims: HashSet<(String, String)>,
}

/// Those of `known` that a complete list did not name.
fn missing<T: Hash + Eq>(known: impl IntoIterator<Item = T>, listed: &mut HashSet<T>) -> Vec<T> {
    let listed = mem::take(listed);
    known.into_iter().filter(|one| !listed.contains(one)).collect()
}

/// What the loop keeps.
struct Scheduler {
    snapshot: Snapshot,
    queue: Queue,
    name: String,
    random: StdRng,
    relisted: Relisted,
    /// Pods, nodes, namespaces, claims have been listed.
    synced: [bool; 4],
}

impl Scheduler {
    fn is_synced(&self) -> bool {
        self.synced.iter().all(|s| *s)
    }

    fn schedule(&mut self, pod: &Arc<PodInfo>) -> Result<String, Diagnosis> {
        let node = decide(&self.snapshot, pod, &mut self.random)?;
        // Counted as there until the watch says so, or the binding fails.
        self.snapshot.place(pod.clone(), &node);
        Ok(node)
    }

    fn on_pod(&mut self, event: watcher::Event<Pod>, now: Instant) {
        match event {
            watcher::Event::Init => self.relisted.pods.clear(),
            watcher::Event::InitApply(pod) => {
                self.relisted.pods.insert(pod.uid().unwrap_or_default());
                self.apply(&pod, now);
            }
            watcher::Event::InitDone => {
                self.synced[0] = true;
                let known = self.snapshot.uids().into_iter().chain(self.queue.uids());
                for uid in missing(known, &mut self.relisted.pods) {
                    self.forget(&uid, now);
                }
            }
            watcher::Event::Apply(pod) => self.apply(&pod, now),
            watcher::Event::Delete(pod) => self.forget(&pod.uid().unwrap_or_default(), now),
        }
    }

    fn apply(&mut self, pod: &Pod, now: Instant) {
        let info = Arc::new(PodInfo::new(pod));
        if info.ended {
            self.forget(&info.uid, now);
        } else if let Some(node) = info.node.clone() {
            self.queue.remove(&info.uid);
            if self.snapshot.place(info, &node) {
                // Somebody may have waited for company.
                self.queue.something_changed(now);
            }
        } else if info.scheduler == self.name && !info.deleting && !info.gated {
            if !self.snapshot.contains(&info.uid) {
                self.queue.push(info, now);
            }
        } else {
            self.queue.remove(&info.uid);
        }
    }

    fn forget(&mut self, uid: &str, now: Instant) {
        self.queue.remove(uid);
        if self.snapshot.remove(uid) {
            self.queue.something_changed(now);
        }
    }

    fn on_node(&mut self, event: watcher::Event<Node>, now: Instant) {
        let changed = match event {
            watcher::Event::Init => {
                self.relisted.nodes.clear();
                false
            }
            watcher::Event::InitApply(node) => {
                self.relisted.nodes.insert(node.name_any());
                self.snapshot.set_node(&node)
            }
            watcher::Event::Apply(node) => self.snapshot.set_node(&node),
            watcher::Event::InitDone => {
                self.synced[1] = true;
                let known: Vec<String> = self.snapshot.known().map(|n| n.facts.name.clone()).collect();
                for name in missing(known, &mut self.relisted.nodes) {
                    self.snapshot.remove_node(&name);
                }
                true
            }
            watcher::Event::Delete(node) => self.snapshot.remove_node(&node.name_any()),
        };
        if changed {
            self.queue.something_changed(now);
        }
    }

    fn on_namespace(&mut self, event: watcher::Event<Namespace>) {
        match event {
            watcher::Event::Init => self.relisted.namespaces.clear(),
            watcher::Event::InitDone => {
                self.synced[2] = true;
                let known: Vec<String> = self.snapshot.namespaces.keys().cloned().collect();
                for name in missing(known, &mut self.relisted.namespaces) {
                    self.snapshot.namespaces.remove(&name);
                }
            }
            watcher::Event::InitApply(n) => {
                self.relisted.namespaces.insert(n.name_any());
                self.snapshot.namespaces.insert(n.name_any(), n.metadata.labels.unwrap_or_default());
            }
            watcher::Event::Apply(n) => {
                self.snapshot.namespaces.insert(n.name_any(), n.metadata.labels.unwrap_or_default());
            }
            watcher::Event::Delete(n) => {
                self.snapshot.namespaces.remove(&n.name_any());
            }
        }
    }

    fn on_claim(&mut self, event: watcher::Event<PersistentVolumeClaim>, now: Instant) {
        let key = |c: &PersistentVolumeClaim| (c.namespace().unwrap_or_default(), c.name_any());
        match event {
            watcher::Event::Init => self.relisted.claims.clear(),
            watcher::Event::InitDone => {
                self.synced[3] = true;
                let known: Vec<_> = self.snapshot.claims.keys().cloned().collect();
                for key in missing(known, &mut self.relisted.claims) {
                    self.snapshot.claims.remove(&key);
                }
            }
            watcher::Event::InitApply(c) => {
                self.relisted.claims.insert(key(&c));
                self.on_claim(watcher::Event::Apply(c), now);
            }
            watcher::Event::Apply(c) => {
                let bound = c.spec.as_ref().is_some_and(|s| s.volume_name.as_ref().is_some_and(|v| !v.is_empty()));
                self.snapshot.claims.insert(key(&c), bound);
                self.queue.something_changed(now);
            }
            watcher::Event::Delete(c) => {
                self.snapshot.claims.remove(&key(&c));
            }
        }
    }

    fn on_bound(&mut self, bound: Bound, reporter: &Reporter, now: Instant) {
        match bound.result {
            Ok(()) => reporter.scheduled(&bound.pod, &bound.node),
            Err(error) => {
                self.snapshot.remove(&bound.pod.uid);
                // The pod is gone, or somebody else has bound it: its watch event says which.
                let settled = matches!(&error, kube::Error::Api(status) if status.code == 404 || status.code == 409);
                if !settled {
                    tracing::warn!(pod = %bound.pod.key(), node = bound.node, %error, "a pod was not bound");
                    self.queue.retry(bound.pod, now);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scheduler() -> Scheduler {
        Scheduler {
            snapshot: Snapshot::default(),
            queue: Queue::new(Duration::from_secs(300)),
            name: "default-scheduler".into(),
            random: StdRng::seed_from_u64(1),
            relisted: Relisted::default(),
            synced: [false; 4],
        }
    }

    fn node(name: &str) -> Node {
        serde_json::from_value(json!({"metadata": {"name": name}, "status": {"allocatable": {"pods": "10"}}})).unwrap()
    }

    fn pod(name: &str, on: Option<&str>) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "n", "uid": name},
            "spec": {"schedulerName": "default-scheduler", "nodeName": on, "containers": [{"name": "c"}]},
        }))
        .unwrap()
    }

    fn names(scheduler: &Scheduler) -> Vec<String> {
        scheduler.snapshot.known().map(|n| n.facts.name.clone()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn watches_that_list_at_the_same_time_do_not_disturb_each_other() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        scheduler.on_pod(watcher::Event::Init, now);
        scheduler.on_pod(watcher::Event::InitApply(pod("waiting", None)), now);
        scheduler.on_pod(watcher::Event::InitApply(pod("running", Some("a"))), now);
        scheduler.on_node(watcher::Event::Init, now);
        scheduler.on_node(watcher::Event::InitApply(node("a")), now);
        scheduler.on_pod(watcher::Event::InitDone, now);
        scheduler.on_node(watcher::Event::InitDone, now);
        assert_eq!(scheduler.queue.uids(), ["waiting"]);
        assert!(scheduler.snapshot.contains("running"));
        assert_eq!(names(&scheduler), ["a"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_went_while_the_watch_was_broken_is_forgotten() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        for nodes in [["a", "b"], ["b", "c"]] {
            scheduler.on_node(watcher::Event::Init, now);
            for name in nodes {
                scheduler.on_node(watcher::Event::InitApply(node(name)), now);
            }
            scheduler.on_node(watcher::Event::InitDone, now);
        }
        assert_eq!(names(&scheduler), ["b", "c"]);
        for pods in [["x", "y"], ["y", "z"]] {
            scheduler.on_pod(watcher::Event::Init, now);
            for name in pods {
                scheduler.on_pod(watcher::Event::InitApply(pod(name, Some("b"))), now);
            }
            scheduler.on_pod(watcher::Event::InitDone, now);
        }
        let mut uids = scheduler.snapshot.uids();
        uids.sort();
        assert_eq!(uids, ["y", "z"]);
    }
}
