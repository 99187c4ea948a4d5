//! Endpoint slices under crashes, lost answers and stale caches.

use std::collections::BTreeSet;

use rand::{Rng, rngs::StdRng};
use serde_json::{Value, json};

use super::{EndpointSlices, mirroring::Mirroring};
use crate::simulation::{Simulation, World, by_seed};

fn service(selector: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "n"}, "spec": {
        "selector": selector, "type": "ClusterIP", "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00:1::9"],
        "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack", "sessionAffinity": "None",
        "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}]}})
}

fn pod() -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "p-", "namespace": "n", "labels": {"app": "a"}},
        "spec": {"containers": [{"name": "c", "image": "i"}]}})
}

/// All addresses in slices, each as often as it is there.
fn sliced(world: &World) -> Vec<String> {
    let endpoints = world.of("endpointslices").flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
    let mut all: Vec<_> = endpoints.map(|e| e["addresses"][0].as_str().unwrap().to_owned()).collect();
    all.sort();
    all
}

#[test]
fn every_pod_is_in_one_slice_of_each_family() {
    let chance = |world: &mut World, rng: &mut StdRng| match rng.random_range(0..4) {
        0 | 1 => drop(world.put_new(pod())),
        2 => {
            let pods = world.all("pods");
            if let Some(pod) = pods.get(rng.random_range(0..pods.len().max(1))) {
                let app = if rng.random() { "a" } else { "b" };
                let name = pod["metadata"]["name"].as_str().unwrap();
                world.edit("pods", name, |pod| pod["metadata"]["labels"]["app"] = app.into());
            }
        }
        _ => world.somebody_deletes_a_pod(rng),
    };
    let is_right = |world: &World| {
        let pods = world.of("pods").filter(|pod| pod["metadata"]["labels"]["app"] == "a");
        let ips = pods.flat_map(|pod| pod["status"]["podIPs"].as_array().into_iter().flatten());
        let mut wanted: Vec<_> = ips.map(|ip| ip["ip"].as_str().unwrap().to_owned()).collect();
        wanted.sort();
        sliced(world) == wanted
    };
    by_seed(60, async |seed| {
        let mut simulation = Simulation::new(seed, EndpointSlices::start);
        simulation.create(service(json!({"app": "a"})));
        simulation.random(150, chance, |_| {}).await;
        simulation.settle(|_, _| {}, is_right).await;
    });
}

#[test]
fn what_is_written_by_hand_is_mirrored() {
    let addresses = |rng: &mut StdRng| -> Value {
        let some: BTreeSet<u8> = (0..rng.random_range(1..4)).map(|_| rng.random_range(1..9)).collect();
        some.into_iter()
            .map(|n| json!({"ip": if n % 2 == 0 { format!("10.2.0.{n}") } else { format!("fd02::{n}") }}))
            .collect()
    };
    let chance = move |world: &mut World, rng: &mut StdRng| {
        let addresses = addresses(rng);
        world.edit("endpoints", "s", |endpoints| endpoints["subsets"][0]["addresses"] = addresses);
    };
    let is_right = |world: &World| {
        let list =
            world.get("endpoints", "s").unwrap()["subsets"][0]["addresses"].as_array().cloned().unwrap_or_default();
        let mut wanted: Vec<_> = list.iter().map(|a| a["ip"].as_str().unwrap().to_owned()).collect();
        wanted.sort();
        sliced(world) == wanted
    };
    by_seed(60, async |seed| {
        let mut simulation = Simulation::new(seed, Mirroring::start);
        simulation.create(service(Value::Null));
        simulation.create(json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "s", "namespace": "n"},
            "subsets": [{"addresses": [{"ip": "10.2.0.1"}], "ports": [{"port": 80, "protocol": "TCP"}]}]}));
        simulation.random(120, chance, |_| {}).await;
        simulation.settle(|_, _| {}, is_right).await;
    });
}
