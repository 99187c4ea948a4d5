//! `seawall bench scheduler`: how many pods a second the scheduler decides on, on clusters that are only simulated.
//! What is measured is what its loop does between hearing of a pod and binding it: queue, decision, and counting the
//! pod on its node. The API is left out; `seawall bench pods` has it.

use std::{sync::Arc, time::Duration};

use anyhow::bail;
use k8s_openapi::api::core::v1::{Node, Pod};
use seawall_scheduler::{
    decide::{Search, decide},
    pod::PodInfo,
    preempt,
    queue::Queue,
    snapshot::Snapshot,
};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Report, Samples};

/// Options of `seawall bench scheduler`.
#[derive(clap::Args)]
pub struct Args {
    /// How many nodes there are. May be a list.
    #[arg(long, value_delimiter = ',', default_value = "1000,5000")]
    nodes: Vec<usize>,
    /// How many pods are scheduled on each.
    #[arg(long, default_value_t = 10_000)]
    pods: usize,
    /// What they ask for: `plain`; `spread` (required anti-affinity by node, spread over zones); `preempt` (the
    /// cluster is full of less important ones).
    #[arg(long, value_enum, value_delimiter = ',', default_value = "plain,spread,preempt")]
    kinds: Vec<Kind>,
    /// The part of the nodes that would do that is enough to compare, in percent; 0 leaves it to their number.
    #[arg(long, default_value_t = 0)]
    percentage_of_nodes_to_score: usize,
    /// What chance decides is the same for the same seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Plain,
    Spread,
    Preempt,
}

/// Runs it.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut report = Report::new(args.json);
    for nodes in &args.nodes {
        for kind in &args.kinds {
            let name = format!("{nodes} nodes, {kind:?}").to_lowercase();
            let mut search = Search::seeded(args.seed);
            search.percentage = args.percentage_of_nodes_to_score;
            let mut measured = measure(*nodes, args.pods, *kind, search)?;
            report.add(format!("{name}, pods"), measured.each.0.len() as f64 / measured.all.as_secs_f64(), "/s");
            report.add(format!("{name}, p50"), measured.each.quantile(0.5), "ms");
            report.add(format!("{name}, p99"), measured.each.quantile(0.99), "ms");
            report.add(format!("{name}, worst"), measured.each.quantile(1.0), "ms");
        }
    }
    report.finish();
    Ok(())
}

struct Measured {
    all: Duration,
    each: Samples,
}

/// Replicas of one workload.
const REPLICAS: usize = 100;
const ZONES: usize = 3;
/// Pods of the usual size that a node has room for.
const ROOM: usize = 20;

fn node(number: usize) -> anyhow::Result<Node> {
    let images: Vec<Value> = (0..20)
        .map(|i| json!({"names": [format!("registry.example/app-{i}:v1")], "sizeBytes": 80_000_000 + i}))
        .collect();
    Ok(serde_json::from_value(json!({
        "metadata": {"name": format!("node-{number}"), "labels": {
            "kubernetes.io/hostname": format!("node-{number}"), "kubernetes.io/os": "linux",
            "topology.kubernetes.io/zone": format!("zone-{}", number % ZONES)}},
        "status": {"images": images, "allocatable": {
            "cpu": format!("{}m", ROOM * 100), "memory": format!("{}Mi", ROOM * 128), "pods": "110"}},
    }))?)
}

fn pod(number: usize, kind: Kind, priority: i32) -> anyhow::Result<Arc<PodInfo>> {
    let app = format!("app-{}-{priority}", number / REPLICAS);
    let labels = json!({"app": app, "pod-template-hash": "5d4f8c7b9d"});
    let mut spec = json!({"schedulerName": "default-scheduler", "priority": priority,
        "containers": [{"name": "main", "image": format!("registry.example/app-{}:v1", number / REPLICAS % 20),
            "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}}}]});
    if kind == Kind::Spread {
        let selector = json!({"matchLabels": {"app": app}});
        spec["affinity"] = json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": selector}]}});
        spec["topologySpreadConstraints"] = json!([{"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone",
            "whenUnsatisfiable": "DoNotSchedule", "labelSelector": selector}]);
    }
    let name = format!("{app}-{number}");
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "bench", "uid": name, "labels": labels, "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": app, "uid": app, "controller": true}]},
        "spec": spec,
    }))?;
    Ok(Arc::new(PodInfo::new(&pod)))
}

/// A cluster in which nothing runs yet, or which is full.
fn cluster(nodes: usize, pods: usize, kind: Kind) -> anyhow::Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    for number in 0..nodes {
        snapshot.set_node(&node(number)?);
    }
    for app in (0..pods).step_by(REPLICAS) {
        // As if a ReplicaSet selected them: pods that ask for nothing are spread over nodes and zones all the same.
        let pod = pod(app, kind, 0)?;
        let selector = serde_json::from_value(json!({"matchLabels": {"app": pod.labels["app"]}}))?;
        snapshot.set_selector("bench", "ReplicaSet", &pod.labels["app"], Some(&selector));
    }
    if kind == Kind::Preempt {
        for number in 0..nodes * ROOM {
            snapshot.place(pod(number, kind, -1 - (number % 7) as i32)?, &format!("node-{}", number % nodes));
        }
    }
    Ok(snapshot)
}

fn measure(nodes: usize, pods: usize, kind: Kind, mut search: Search) -> anyhow::Result<Measured> {
    // Where others have to go a tenth says as much.
    let pods = if kind == Kind::Preempt { (pods / 10).min(nodes * ROOM) } else { pods.min(nodes * ROOM) };
    let mut snapshot = cluster(nodes, pods, kind)?;
    let mut queue = Queue::new(Duration::from_secs(300));
    let waiting: Vec<Arc<PodInfo>> = (0..pods).map(|n| pod(n, kind, 0)).collect::<anyhow::Result<_>>()?;
    let (started, mut each) = (Instant::now(), Samples::default());
    for pod in waiting {
        queue.push(pod, started);
    }
    loop {
        let before = Instant::now();
        if !queue.has_ready(before) {
            break;
        }
        let Some(pod) = queue.pop(before) else { break };
        let node = match decide(&snapshot, &pod, &mut search) {
            Ok(node) => node,
            Err(diagnosis) => match preempt::plan(&snapshot, &pod, &diagnosis, each.0.len()) {
                Ok(preemption) => {
                    // They end at once, which spares the wait and nothing of the work.
                    preemption.victims.iter().for_each(|victim| {
                        snapshot.remove(&victim.uid);
                    });
                    preemption.node
                }
                Err(_) => bail!("{} fits nowhere: {diagnosis}", pod.key()),
            },
        };
        queue.remove(&pod.uid);
        snapshot.place(pod, &node);
        each.0.push(before.elapsed());
    }
    Ok(Measured { all: started.elapsed(), each })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pod_of_every_kind_gets_a_node() {
        for kind in [Kind::Plain, Kind::Spread, Kind::Preempt] {
            // More nodes than are looked at for a decision, and a multiple of the zones.
            let measured = measure(150, 600, kind, Search::seeded(1)).unwrap();
            assert_eq!(measured.each.0.len(), if kind == Kind::Preempt { 60 } else { 600 }, "{kind:?}");
        }
    }
}
