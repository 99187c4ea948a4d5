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

use std::{collections::HashSet, sync::Arc, time::Duration};

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
pub async fn run(client: Client, config: SchedulerConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
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
        relisted: HashSet::new(),
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

/// What the loop keeps.
struct Scheduler {
    snapshot: Snapshot,
    queue: Queue,
    name: String,
    random: StdRng,
    /// Pods seen since the last full list began.
    relisted: HashSet<String>,
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
            watcher::Event::Init => self.relisted.clear(),
            watcher::Event::InitApply(pod) => {
                self.relisted.insert(pod.uid().unwrap_or_default());
                self.apply(&pod, now);
            }
            watcher::Event::InitDone => {
                self.synced[0] = true;
                let relisted = std::mem::take(&mut self.relisted);
                for uid in self.snapshot.uids().into_iter().chain(self.queue.uids()) {
                    if !relisted.contains(&uid) {
                        self.forget(&uid, now);
                    }
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
                self.relisted.clear();
                false
            }
            watcher::Event::InitApply(node) | watcher::Event::Apply(node) => self.snapshot.set_node(&node),
            watcher::Event::InitDone => {
                self.synced[1] = true;
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
            watcher::Event::Init => {}
            watcher::Event::InitDone => self.synced[2] = true,
            watcher::Event::InitApply(n) | watcher::Event::Apply(n) => {
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
            watcher::Event::Init => {}
            watcher::Event::InitDone => self.synced[3] = true,
            watcher::Event::InitApply(c) | watcher::Event::Apply(c) => {
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
