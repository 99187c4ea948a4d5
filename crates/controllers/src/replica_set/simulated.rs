//! ReplicaSets and ReplicationControllers under crashes, lost answers and stale caches.

use rand::{Rng, rngs::StdRng};
use serde_json::{Value, json};

use super::{ReplicaSets, ReplicationControllers};
use crate::simulation::{Simulation, Start, World, by_seed};

const TEMPLATE: &str =
    r#"{"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}"#;

fn owner(kind: &str) -> Value {
    let (version, selector) = match kind {
        "ReplicaSet" => ("apps/v1", json!({"matchLabels": {"app": "a"}})),
        _ => ("v1", json!({"app": "a"})),
    };
    let template: Value = serde_json::from_str(TEMPLATE).unwrap();
    json!({"apiVersion": version, "kind": kind, "metadata": {"name": "r", "namespace": "n"},
        "spec": {"replicas": 3, "selector": selector, "template": template}})
}

/// More or fewer are wanted, somebody deletes or relabels a pod, or brings one along that fits.
fn chance(world: &mut World, rng: &mut StdRng, resource: &str) {
    let pods: Vec<String> = world.of("pods").map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned()).collect();
    match rng.random_range(0..5) {
        0 => {
            let replicas = rng.random_range(0..8);
            world.edit(resource, "r", |owner| owner["spec"]["replicas"] = replicas.into());
        }
        1 if !pods.is_empty() => {
            let app = if rng.random() { "a" } else { "b" };
            world.edit("pods", &pods[rng.random_range(0..pods.len())], |pod| {
                pod["metadata"]["labels"]["app"] = app.into()
            });
        }
        2 => {
            let mut pod: Value = serde_json::from_str(TEMPLATE).unwrap();
            pod["metadata"]["namespace"] = "n".into();
            pod["metadata"]["generateName"] = "stray-".into();
            (pod["apiVersion"], pod["kind"]) = ("v1".into(), "Pod".into());
            world.put_new(pod);
        }
        _ => world.somebody_deletes_a_pod(rng),
    }
}

fn is_right(world: &World, resource: &str) -> bool {
    let owner = world.get(resource, "r").unwrap();
    let controlled = |pod: &Value| pod["metadata"]["ownerReferences"].as_array().is_some_and(|list| !list.is_empty());
    let fits = |pod: &Value| pod["metadata"]["labels"]["app"] == "a";
    let wanted = owner["spec"]["replicas"].as_u64();
    world.of("pods").all(|pod| controlled(pod) == fits(pod))
        && Some(world.of("pods").filter(|pod| fits(pod)).count() as u64) == wanted
        && owner["status"]["replicas"].as_u64() == wanted
        && owner["status"]["readyReplicas"].as_u64().unwrap_or(0) == wanted.unwrap()
        && owner["status"]["observedGeneration"] == owner["metadata"]["generation"]
}

#[test]
fn there_are_as_many_as_asked_for() {
    let check = |kind: &'static str, resource: &'static str, start: Start| {
        by_seed(60, async |seed| {
            let mut simulation = Simulation::new(seed, start);
            simulation.create(owner(kind));
            simulation.random(150, |world, rng| chance(world, rng, resource), |_| {}).await;
            simulation.settle(|_, _| {}, |world| is_right(world, resource)).await;
        });
    };
    check("ReplicaSet", "replicasets", ReplicaSets::start);
    check("ReplicationController", "replicationcontrollers", ReplicationControllers::start);
}
