//! StatefulSets under crashes, lost answers and stale caches.

use rand::{Rng, rngs::StdRng};
use serde_json::{Value, json};

use super::StatefulSets;
use crate::simulation::{Simulation, World, by_seed};

fn set(policy: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "w", "namespace": "n"}, "spec": {
        "replicas": 3, "serviceName": "w", "podManagementPolicy": policy, "selector": {"matchLabels": {"app": "w"}},
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}}}}],
        "template": {"metadata": {"labels": {"app": "w"}}, "spec": {"containers": [{"name": "c", "image": "v0"}]}}}})
}

/// Another template, another number, a pod that fails or that somebody deletes.
fn chance(world: &mut World, rng: &mut StdRng) {
    match rng.random_range(0..5) {
        0 => {
            let image = format!("v{}", rng.random_range(0..3));
            world.edit("statefulsets", "w", |w| w["spec"]["template"]["spec"]["containers"][0]["image"] = image.into());
        }
        1 => {
            let replicas = rng.random_range(0..5);
            world.edit("statefulsets", "w", |w| w["spec"]["replicas"] = replicas.into());
        }
        2 => {
            let name = format!("w-{}", rng.random_range(0..5));
            world.edit("pods", &name, |pod| pod["status"]["phase"] = "Failed".into());
        }
        _ => world.somebody_deletes_a_pod(rng),
    }
}

/// The numbers from nothing up, each once, of the current template, with their claims; and the status says so.
fn is_right(world: &World) -> bool {
    let set = world.get("statefulsets", "w").unwrap();
    let (wanted, image) =
        (set["spec"]["replicas"].as_u64().unwrap(), &set["spec"]["template"]["spec"]["containers"][0]["image"]);
    let mut names: Vec<&str> = world.of("pods").map(|pod| pod["metadata"]["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    let status = &set["status"];
    names == (0..wanted).map(|number| format!("w-{number}")).collect::<Vec<_>>()
        && world
            .of("pods")
            .all(|pod| &pod["spec"]["containers"][0]["image"] == image && pod["status"]["phase"] == "Running")
        && (0..wanted).all(|number| world.get("persistentvolumeclaims", &format!("data-w-{number}")).is_some())
        && status["readyReplicas"].as_u64().unwrap_or(0) == wanted
        && status["currentRevision"] == status["updateRevision"]
        && status["observedGeneration"] == set["metadata"]["generation"]
}

#[test]
fn every_number_has_its_pod_in_the_end() {
    by_seed(60, async |seed| {
        for policy in ["OrderedReady", "Parallel"] {
            let mut simulation = Simulation::new(seed, StatefulSets::start);
            simulation.create(set(policy));
            simulation.random(150, chance, |_| {}).await;
            simulation.settle(|_, _| {}, is_right).await;
        }
    });
}
