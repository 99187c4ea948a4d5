//! Autoscalers under crashes, lost answers and stale caches.

use rand::{Rng, rngs::StdRng};
use serde_json::{Value, json};

use super::Autoscalers;
use crate::simulation::{Simulation, World, by_seed};

const MOST: i64 = 10;
/// What a pod is to use, in thousandths of a CPU.
const TARGET: i64 = 500;

fn target() -> Value {
    json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": "r", "namespace": "n"}, "spec": {
        "replicas": 2, "selector": {"matchLabels": {"app": "a"}},
        "template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}})
}

fn autoscaler() -> Value {
    json!({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "h", "namespace": "n"}, "spec": {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r"}, "minReplicas": 1, "maxReplicas": MOST,
        "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}}]}})
}

fn replicas(world: &World) -> i64 {
    world.get("replicasets", "r").unwrap()["spec"]["replicas"].as_i64().unwrap()
}

/// Somebody else sees to it that there are as many pods as wanted.
fn pods_follow(world: &mut World) {
    let there = world.all("pods");
    for _ in there.len() as i64..replicas(world) {
        world.put_new(json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"generateName": "p-", "namespace": "n", "labels": {"app": "a"}},
            "spec": {"containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "1"}}}]}}));
    }
    for pod in there.iter().skip(replicas(world) as usize) {
        world.remove(&("pods", "n".into(), pod["metadata"]["name"].as_str().unwrap().to_owned()));
    }
}

fn chance(world: &mut World, rng: &mut StdRng) {
    match rng.random_range(0..3) {
        0 => world.load = rng.random_range(0..MOST * 1000),
        _ => pods_follow(world),
    }
}

/// Never more or fewer than may be.
fn check(world: &World) {
    assert!((1..=MOST).contains(&replicas(world)), "{} replicas", replicas(world));
}

/// As many as the load needs, give or take a tenth, and the status says so.
fn is_right(world: &World, load: i64) -> bool {
    let status = &world.get("horizontalpodautoscalers", "h").unwrap()["status"];
    let needed = load as f64 / TARGET as f64;
    let lowest = (needed / 1.1).ceil().clamp(1.0, MOST as f64) as i64;
    let highest = (needed / 0.9).ceil().clamp(1.0, MOST as f64) as i64;
    let (now, stable) = (replicas(world), |key: &str| status[key].as_i64());
    (lowest..=highest).contains(&now)
        && stable("currentReplicas") == Some(now)
        && stable("desiredReplicas") == Some(now)
        && world.of("pods").count() as i64 == now
}

#[test]
fn there_are_as_many_as_the_load_needs() {
    by_seed(60, async |seed| {
        let mut simulation = Simulation::new(seed, Autoscalers::start);
        simulation.create(target());
        simulation.create(autoscaler());
        simulation.random(150, chance, check).await;
        for load in [8200, 900, 3300] {
            simulation.world.lock().load = load;
            simulation.settle(|world, _| pods_follow(world), |world| is_right(world, load)).await;
            check(&simulation.world.lock());
        }
    });
}
