//! DaemonSets under crashes, lost answers and stale caches.

use k8s_openapi::api::apps::v1::DaemonSet;
use rand::{Rng, rngs::StdRng};
use serde_json::{Value, json};

use super::DaemonSets;
use crate::{
    history::{Newest, newest},
    simulation::{Simulation, World, by_seed},
};

fn node(number: u32) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{number}"), "labels": {"kind": "worker"}},
        "spec": {}})
}

fn set(strategy: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "d", "namespace": "n"}, "spec": {
        "selector": {"matchLabels": {"app": "d"}}, "updateStrategy": strategy, "revisionHistoryLimit": 2,
        "template": {"metadata": {"labels": {"app": "d"}},
            "spec": {"nodeSelector": {"kind": "worker"}, "containers": [{"name": "c", "image": "v0"}]}}}})
}

/// Nodes come, go and change; the template changes; pods fail and are deleted.
fn chance(world: &mut World, rng: &mut StdRng) {
    let nodes = world.all("nodes");
    match rng.random_range(0..8) {
        0 => {
            let number = rng.random_range(0..6);
            if world.get("nodes", &format!("node-{number}")).is_none() {
                world.put_new(node(number));
            }
        }
        1 => {
            let name = format!("node-{}", rng.random_range(0..6));
            world.remove(&("nodes", String::new(), name));
        }
        2 => {
            let kind = if rng.random() { "worker" } else { "other" };
            world.edit("nodes", &format!("node-{}", rng.random_range(0..6)), |n| {
                n["metadata"]["labels"]["kind"] = kind.into()
            });
        }
        3 => {
            let taints = if rng.random() { json!([{"key": "k", "effect": "NoSchedule"}]) } else { json!([]) };
            world.edit("nodes", &format!("node-{}", rng.random_range(0..6)), |n| n["spec"]["taints"] = taints);
        }
        4 if !nodes.is_empty() => {
            let image = format!("v{}", rng.random_range(0..3));
            world.edit("daemonsets", "d", |d| d["spec"]["template"]["spec"]["containers"][0]["image"] = image.into());
        }
        _ => {
            let pods = world.all("pods");
            if let Some(pod) = pods.get(rng.random_range(0..pods.len().max(1))) {
                let name = pod["metadata"]["name"].as_str().unwrap().to_owned();
                match rng.random::<bool>() {
                    true => world.edit("pods", &name, |p| p["status"] = json!({"phase": "Failed"})),
                    false => world.remove(&("pods", "n".into(), name)),
                }
            }
        }
    }
}

/// One pod of the current template, ready, on every node that wants one, and no other; and the status says so.
fn is_right(world: &World) -> bool {
    let set = world.get("daemonsets", "d").unwrap();
    let image = &set["spec"]["template"]["spec"]["containers"][0]["image"];
    let wants = |node: &Value| {
        node["metadata"]["labels"]["kind"] == "worker" && node["spec"]["taints"].as_array().is_none_or(Vec::is_empty)
    };
    let mut wanted: Vec<&str> =
        world.of("nodes").filter(|n| wants(n)).map(|n| n["metadata"]["name"].as_str().unwrap()).collect();
    // Where a taint has come since, pods stay.
    let tainted = |pod: &&Value| {
        let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        world.get("nodes", node).is_some_and(|n| n["metadata"]["labels"]["kind"] == "worker" && !wants(n))
    };
    let mut placed: Vec<&str> = world
        .of("pods")
        .filter(|pod| {
            !tainted(pod) && world.get("nodes", pod["spec"]["nodeName"].as_str().unwrap_or_default()).is_some()
        })
        .map(|pod| pod["spec"]["nodeName"].as_str().unwrap_or_default())
        .collect();
    wanted.sort_unstable();
    placed.sort_unstable();
    let current = |pod: &Value| &pod["spec"]["containers"][0]["image"] == image && pod["status"]["phase"] == "Running";
    let on_nodes = |pod: &&Value| world.get("nodes", pod["spec"]["nodeName"].as_str().unwrap_or_default()).is_some();
    let status = &set["status"];
    let number = |key: &str| status[key].as_u64().unwrap_or(0) as usize;
    wanted == placed
        && world.of("pods").filter(|pod| on_nodes(pod) && !tainted(pod)).all(current)
        && number("desiredNumberScheduled") == wanted.len()
        && number("numberAvailable") == wanted.len()
        && number("updatedNumberScheduled") == wanted.len()
        && status["observedGeneration"] == set["metadata"]["generation"]
}

async fn run(seed: u64, strategy: Value) {
    let mut simulation = Simulation::new(seed, DaemonSets::start);
    for number in 0..4 {
        simulation.create(node(number));
    }
    simulation.create(set(strategy));
    simulation.random(150, chance, |_| {}).await;
    simulation.settle(|_, _| {}, is_right).await;
    let revisions = simulation.world.lock().of("controllerrevisions").count();
    assert!(revisions <= 3, "{revisions} revisions: the current one and two more are kept");
}

#[test]
fn every_node_has_its_pod_in_the_end() {
    by_seed(60, async |seed| {
        run(seed, json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}})).await;
        run(seed, json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": "50%"}})).await;
    });
}

#[test]
fn a_name_that_is_taken_is_not_used() {
    by_seed(20, async |seed| {
        let mut simulation = Simulation::new(seed, DaemonSets::start);
        simulation.create(node(0));
        simulation.create(set(json!({"type": "RollingUpdate"})));
        // Somebody else has what would be the name of the first revision.
        let set: DaemonSet =
            serde_json::from_value(simulation.world.lock().get("daemonsets", "d").unwrap().clone()).unwrap();
        let Newest::Make(first) = newest(&set, &[]) else { panic!("there is no revision yet") };
        simulation.create(json!({"apiVersion": "apps/v1", "kind": "ControllerRevision",
            "metadata": {"name": first.metadata.name, "namespace": "n"}, "data": {"other": 1}, "revision": 1}));
        simulation.random(40, |_, _| {}, |_| {}).await;
        simulation.settle(|_, _| {}, is_right).await;
        let world = simulation.world.lock();
        assert_eq!(world.get("daemonsets", "d").unwrap()["status"]["collisionCount"], 1);
        assert_eq!(world.of("controllerrevisions").count(), 2);
    });
}
