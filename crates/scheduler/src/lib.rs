//! Filters and scores over a snapshot of nodes and pods, and the loop that binds
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/scheduling-framework/>).
//!
//! [`decide::decide`] is pure: a snapshot and a pod give a node, or the reasons why there is none. [`queue::Queue`]
//! says which pod is next; [`preempt::plan`] says who has to go where a pod fits nowhere. [`run`] feeds them from watches and carries out what they decide.

pub mod affinity;
pub mod decide;
#[cfg(test)]
mod placement;
pub mod pod;
pub mod preempt;
pub mod queue;
mod report;
pub mod score;
pub mod snapshot;
pub mod spread;
mod state;
pub mod topology;
mod watch;

use std::{sync::Arc, time::Duration};

use anyhow::bail;
use futures::StreamExt;
use kube::Client;
use rand::{SeedableRng, rngs::StdRng};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use decide::Search;
use pod::PodInfo;
use queue::Queue;
use report::Reporter;
use state::{Outcome, Scheduler};

/// How the scheduler works.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// Pods that name this scheduler are scheduled.
    pub name: String,
    /// How many bindings are under way at a time.
    pub bindings: usize,
    /// The part of the nodes that would do that is enough to compare, in percent; 0 leaves it to their number
    /// (upstream's `percentageOfNodesToScore`).
    pub percentage_of_nodes_to_score: usize,
    /// Pods that fit nowhere are tried again after this long, even if nothing seems to have changed.
    pub retry_unschedulable: Duration,
}

impl Default for SchedulerConfig {
    fn default() -> SchedulerConfig {
        SchedulerConfig {
            name: "default-scheduler".into(),
            bindings: 64,
            percentage_of_nodes_to_score: 0,
            retry_unschedulable: Duration::from_secs(300),
        }
    }
}

/// How many pods are decided on before watches are looked at again.
const BURST: usize = 64;

/// How something that was decided went.
enum Done {
    Bound { pod: Arc<PodInfo>, node: String, result: Result<(), kube::Error> },
    Preempted { pod: Arc<PodInfo>, victims: Vec<Arc<PodInfo>>, result: anyhow::Result<()> },
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
    let mut changes = watch::all(&client);
    let reporter = Reporter::new(client.clone(), config.name.clone());
    let (done, mut results) = mpsc::channel::<Done>(config.bindings);
    let slots = Arc::new(Semaphore::new(config.bindings));
    let mut tasks = JoinSet::new();
    let search = Search::new(StdRng::from_os_rng(), config.percentage_of_nodes_to_score);
    let mut scheduler = Scheduler::new(config.name.clone(), Queue::new(config.retry_unschedulable), search);
    loop {
        let now = Instant::now();
        let wake = scheduler.queue.next_wake(now);
        let work = scheduler.is_synced() && scheduler.queue.has_ready(now) && slots.available_permits() > 0;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            change = changes.next() => match change {
                Some(Ok(change)) => scheduler.on_change(change, now),
                Some(Err(error)) => tracing::warn!(%error, "a watch broke and is set up again"),
                None => bail!("all watches ended"),
            },
            Some(done) = results.recv() => take_in(&mut scheduler, done, &reporter, now),
            // Ends of tasks are only collected; what they found out came through the channel.
            Some(_) = tasks.join_next() => {}
            () = sleep_until(wake), if wake.is_some() && !work => {}
            () = std::future::ready(()), if work => {
                for _ in 0..BURST {
                    let Ok(slot) = slots.clone().try_acquire_owned() else { break };
                    let Some(pod) = scheduler.queue.pop(now) else { break };
                    let (client, done) = (client.clone(), done.clone());
                    match scheduler.schedule(&pod) {
                        Outcome::Bind(node) => {
                            tasks.spawn(async move {
                                let _slot = slot;
                                let result = report::bind(&client, &pod, &node).await;
                                // The receiver lives as long as the loop that spawned this.
                                let _ = done.send(Done::Bound { pod, node, result }).await;
                            });
                        }
                        Outcome::Preempt(diagnosis, preemption) => {
                            scheduler.queue.park(pod.clone(), now);
                            let reporter = reporter.clone();
                            tasks.spawn(async move {
                                let _slot = slot;
                                let result = reporter.preempt(&pod, &diagnosis, &preemption).await;
                                let victims = preemption.victims;
                                // As above.
                                let _ = done.send(Done::Preempted { pod, victims, result }).await;
                            });
                        }
                        Outcome::Wait { diagnosis, withdrawn } => {
                            reporter.unschedulable(&pod, &diagnosis, withdrawn);
                            scheduler.queue.park(pod, now);
                        }
                    }
                }
            }
        }
    }
}

fn take_in(scheduler: &mut Scheduler, done: Done, reporter: &Reporter, now: Instant) {
    match done {
        Done::Bound { pod, node, result: Ok(()) } => reporter.scheduled(&pod, &node),
        Done::Bound { pod, node, result: Err(error) } => {
            // The pod is gone, or somebody else has bound it: its watch event says which.
            let settled = matches!(&error, kube::Error::Api(status) if status.code == 404 || status.code == 409);
            if !settled {
                tracing::warn!(pod = %pod.key(), node, %error, "a pod was not bound");
            }
            scheduler.on_unbound(pod, settled, now);
        }
        Done::Preempted { pod, victims, result } => {
            if let Err(error) = &result {
                tracing::warn!(pod = %pod.key(), error = format!("{error:#}"), "no room was made for a pod");
            }
            scheduler.on_preempted(&pod, &victims, result.is_ok(), now);
        }
    }
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
