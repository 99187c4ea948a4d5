//! The controllers: each is one file with a pure plan; applying a plan is shared.

use std::sync::Arc;

use ipnet::IpNet;
use kube::Client;
use seawall_api::ranges::{NodeMasks, Ranges};
use seawall_quorum::timing::{Profile, Timing};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

pub mod autoscaler;
pub mod bootstrap_token;
pub mod certificates;
mod claims;
mod context;
pub mod cron_job;
pub mod daemon_set;
pub mod deployment;
pub mod disruption;
pub mod endpoint_slice;
pub mod endpoints;
pub mod ephemeral_volume;
pub mod fencing;
pub mod garbage;
pub mod history;
pub mod job;
pub mod legacy_token;
pub mod load_balancer;
pub mod namespace;
pub mod namespaced;
pub mod node;
pub mod node_lifecycle;
pub mod pod_gc;
pub mod policy_status;
pub mod replica_set;
pub mod resource_quota;
pub mod role_aggregation;
pub mod runtime;
#[cfg(test)]
mod simulation;
pub mod stateful_set;
pub mod storage_protection;
pub mod taint_eviction;

pub use context::{Caches, Clock, Context};
use runtime::{Controller, Queue, Recorder, spawn_workers};

/// What the cluster's operator chooses.
#[derive(Clone, Debug)]
pub struct Config {
    /// Pods get their addresses from here.
    pub cluster_cidr: Ranges,
    /// The size of each node's part of them.
    pub node_masks: NodeMasks,
    /// Services get their addresses from here; nodes never do.
    pub service_cidr: Option<Ranges>,
    /// Workers of each controller, where upstream has a flag for it (`--concurrent-*-syncs`).
    pub concurrent: usize,
    /// The cluster's authorities, for `kube-root-ca.crt` in every namespace. Empty: none is published.
    pub root_ca: watch::Receiver<String>,
    /// Finished pods that are kept before the oldest are deleted (`--terminated-pod-gc-threshold`).
    pub terminated_pods: usize,
    /// Who signs certificates. Without one they are approved and wait for somebody else to sign them.
    pub authority: Option<Arc<certificates::Authority>>,
    /// The longest life of a certificate (`--cluster-signing-duration`).
    pub certificate_duration: std::time::Duration,
    /// How long a token in a Secret may lie unused (`--legacy-service-account-token-clean-up-period`).
    pub legacy_token_period: jiff::SignedDuration,
    /// When nodes are not well, and what then.
    pub node_lifecycle: node_lifecycle::Settings,
    /// What machines say of one another, if somebody listens.
    pub evidence: Option<watch::Receiver<node_lifecycle::evidence::AllEvidence>>,
    /// The addresses that Services of type LoadBalancer are given.
    pub load_balancer_pool: load_balancer::pool::Pool,
    /// Controllers that are not run, by name.
    pub disabled: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            cluster_cidr: IpNet::V4(ipnet::Ipv4Net::new_assert([10, 244, 0, 0].into(), 16)).into(),
            node_masks: NodeMasks::default(),
            service_cidr: None,
            concurrent: 5,
            root_ca: watch::channel(String::new()).1,
            terminated_pods: 12_500,
            authority: None,
            certificate_duration: std::time::Duration::from_secs(365 * 86_400),
            legacy_token_period: jiff::SignedDuration::from_hours(365 * 24),
            node_lifecycle: node_lifecycle::Settings::of(&Timing::of(Profile::default())),
            evidence: None,
            load_balancer_pool: Default::default(),
            disabled: Vec::new(),
        }
    }
}

/// Makes a controller and the queue that it has subscribed to the caches.
type Make = fn(Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>);

/// All controllers that work on keys of one kind.
const CONTROLLERS: &[(&str, Make)] = &[
    ("deployment", deployment::Deployments::start),
    ("replicaset", replica_set::ReplicaSets::start),
    ("replicationcontroller", replica_set::ReplicationControllers::start),
    ("endpointslice", endpoint_slice::EndpointSlices::start),
    ("endpointslicemirroring", endpoint_slice::mirroring::Mirroring::start),
    ("endpoints", endpoints::EndpointsController::start),
    ("node", node::Nodes::start),
    ("nodelifecycle", node_lifecycle::NodeLifecycle::start),
    ("tainteviction", taint_eviction::TaintEviction::start),
    ("fencing", fencing::Fencing::start),
    ("statefulset", stateful_set::StatefulSets::start),
    ("daemonset", daemon_set::DaemonSets::start),
    ("job", job::Jobs::start),
    ("cronjob", cron_job::CronJobs::start),
    ("horizontalpodautoscaler", autoscaler::Autoscalers::start),
    ("ephemeralvolume", ephemeral_volume::EphemeralVolumes::start),
    ("podgc", pod_gc::PodGc::start),
    ("namespace", namespace::Namespaces::start),
    ("namespaced", namespaced::Namespaced::start),
    ("disruption", disruption::Budgets::start),
    ("certificates", certificates::Certificates::start),
    ("bootstraptoken", bootstrap_token::Tokens::start),
    ("legacytoken", legacy_token::LegacyTokens::start),
    ("storageprotection", storage_protection::Protection::start),
    ("resourcequota", resource_quota::Quotas::start),
    ("loadbalancer", load_balancer::LoadBalancers::start),
    ("clusterroleaggregation", role_aggregation::Aggregation::start),
    ("validatingadmissionpolicystatus", policy_status::Policies::start),
];

/// Runs the controllers until `shutdown`.
pub fn run(
    client: Client,
    config: Config,
    shutdown: CancellationToken,
) -> futures::future::BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(client, config, shutdown))
}

async fn work(client: Client, config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let mut tasks = JoinSet::new();
    let (recorder, writing) = Recorder::new(client.clone(), "seawall", shutdown.clone());
    tasks.spawn(writing);
    let context = Arc::new(Context {
        client,
        config,
        recorder,
        caches: Caches::default(),
        clock: Arc::new(jiff::Timestamp::now),
    });
    for (name, make) in CONTROLLERS {
        if context.config.disabled.iter().any(|disabled| disabled == name) {
            tracing::info!(controller = name, "is disabled");
            continue;
        }
        let (controller, queue) = make(context.clone());
        if *name == "namespaced" {
            tasks.spawn(namespaced::follow(context.clone(), queue.clone(), shutdown.clone()));
        }
        if *name == "nodelifecycle" {
            tasks.spawn(node_lifecycle::follow(context.clone(), queue.clone(), shutdown.clone()));
        }
        spawn_workers(&mut tasks, controller, queue, context.config.concurrent.max(1), &shutdown);
    }
    if !context.config.disabled.iter().any(|disabled| disabled == "garbage") {
        garbage::start(&mut tasks, &context, &shutdown);
    }
    context.caches.start(&mut tasks, &context.client, &shutdown);
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended
            && !error.is_cancelled()
        {
            // Workers catch panics themselves; this is a watch or the recorder, without which others would go blind.
            anyhow::bail!("a part of the controllers ended: {error}");
        }
    }
    Ok(())
}
