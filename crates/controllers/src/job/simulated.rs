//! Jobs under crashes, lost answers and stale caches: what has been done is counted, once.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, rngs::StdRng};
use serde_json::{Value, json};

use super::{
    Jobs,
    indexes::parse_indexes,
    plan::{FINALIZER, INDEX},
};
use crate::simulation::{Simulation, World, by_seed};

fn job(more: Value) -> Value {
    let mut spec = json!({"completions": 6, "parallelism": 3, "backoffLimit": 1000,
        "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}});
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j", "namespace": "n"}, "spec": spec})
}

/// Somebody deletes a pod, the Job is suspended or resumed, or wants more or fewer at a time.
fn chance(world: &mut World, rng: &mut StdRng) {
    match rng.random_range(0..6) {
        0 => {
            let suspend = rng.random_ratio(1, 3);
            world.edit("jobs", "j", |job| job["spec"]["suspend"] = suspend.into());
        }
        1 => {
            let parallelism = rng.random_range(0..5);
            world.edit("jobs", "j", |job| job["spec"]["parallelism"] = parallelism.into());
        }
        2 => world.somebody_deletes_a_pod(rng),
        _ => world.some_pod_goes_on(rng),
    }
}

fn counted(world: &World) -> (usize, usize) {
    let status = &world.get("jobs", "j").unwrap()["status"];
    let listed = |key: &str| status["uncountedTerminatedPods"][key].as_array().map_or(0, Vec::len);
    let number = |key: &str| status[key].as_u64().unwrap_or(0) as usize;
    (number("succeeded") + listed("succeeded"), number("failed") + listed("failed"))
}

/// The pods that had succeeded when they were let go of, over the whole of history. One that is not wanted any more is let go of
/// before it ends, and what it comes to then does not count. By their uids, with their indexes.
fn released(world: &World) -> BTreeMap<&str, i32> {
    let tracked =
        |pod: &Value| pod["metadata"]["finalizers"].as_array().is_some_and(|f| f.iter().any(|f| f == FINALIZER));
    let pods = world.log.iter().filter(|change| change.resource == "pods").map(|change| &change.object);
    let (mut seen, mut succeeded) = (BTreeSet::new(), BTreeMap::new());
    for pod in pods.filter(|pod| !tracked(pod)) {
        let uid = pod["metadata"]["uid"].as_str().unwrap();
        if seen.insert(uid) && pod["status"]["phase"] == "Succeeded" {
            let index = pod["metadata"]["annotations"][INDEX].as_str().and_then(|index| index.parse().ok());
            succeeded.insert(uid, index.unwrap_or(0));
        }
    }
    succeeded
}

/// Whatever has been let go of has been written down; nothing is written down that was not; and no more than was asked for is
/// counted.
fn check(world: &World, indexed: bool) {
    let (succeeded, _) = counted(world);
    let released = released(world);
    let done = released.len();
    let all =
        world.log.iter().filter(|change| change.resource == "pods" && change.object["status"]["phase"] == "Succeeded");
    let all: BTreeSet<&str> = all.filter_map(|change| change.object["metadata"]["uid"].as_str()).collect();
    if indexed {
        let text = world.get("jobs", "j").unwrap()["status"]["completedIndexes"].as_str().unwrap_or_default();
        let completed = parse_indexes(text, i32::MAX);
        let missing = released.values().find(|index| !completed.contains(index));
        assert_eq!(missing, None, "its pod was let go of, and {text:?} are completed");
    } else {
        assert!(succeeded >= done, "{done} were let go of, {succeeded} are counted");
    }
    assert!(succeeded <= all.len(), "{} have succeeded, {succeeded} are counted", all.len());
}

fn is_over(world: &World) -> bool {
    let status = &world.get("jobs", "j").unwrap()["status"];
    let ended = status["conditions"].as_array().is_some_and(|list| {
        list.iter().any(|c| (c["type"] == "Complete" || c["type"] == "Failed") && c["status"] == "True")
    });
    let held = world.of("pods").any(|pod| pod["metadata"]["finalizers"].is_array());
    let waits = status["uncountedTerminatedPods"].as_object().is_some_and(|lists| !lists.is_empty());
    ended && !held && !waits
}

async fn run(seed: u64, spec: Value) -> Value {
    let indexed = spec["completionMode"] == "Indexed";
    let mut simulation = Simulation::new(seed, Jobs::start);
    simulation.create(job(spec));
    simulation.random(200, chance, |world| check(world, indexed)).await;
    simulation.world.lock().edit("jobs", "j", |job| {
        job["spec"]["suspend"] = false.into();
        job["spec"]["parallelism"] = 3.into();
    });
    simulation.settle(|_, _| {}, is_over).await;
    let world = simulation.world.lock();
    check(&world, indexed);
    if !indexed {
        assert_eq!(counted(&world).0, released(&world).len(), "all that was done is counted, and nothing else");
    }
    world.get("jobs", "j").unwrap()["status"].clone()
}

#[test]
fn completions_are_neither_lost_nor_counted_twice() {
    by_seed(80, async |seed| {
        let status = run(seed, json!({})).await;
        assert!(status["completionTime"].is_string(), "{status}");
        assert!(status["succeeded"].as_u64() >= Some(6), "{status}");
    });
}

#[test]
fn every_index_is_done_once() {
    by_seed(80, async |seed| {
        let status = run(seed, json!({"completionMode": "Indexed"})).await;
        assert_eq!((&status["completedIndexes"], &status["succeeded"]), (&json!("0-5"), &json!(6)));
    });
}

#[test]
fn an_index_fails_after_as_many_tries_as_it_has() {
    by_seed(80, async |seed| {
        let status = run(
            seed,
            json!({"completionMode": "Indexed", "backoffLimitPerIndex": 1,
            "podReplacementPolicy": "Failed"}),
        )
        .await;
        let read = |key: &str| parse_indexes(status[key].as_str().unwrap_or_default(), 6);
        let (completed, failed) = (read("completedIndexes"), read("failedIndexes"));
        assert_eq!(completed.len() + failed.len(), 6, "{status}");
        assert!(completed.is_disjoint(&failed), "{status}");
        let failures = status["failed"].as_u64().unwrap_or(0);
        assert!(failures >= 2 * failed.len() as u64, "each that failed has been tried twice: {status}");
    });
}

/// The pod of this name as it was over time.
fn history<'a>(world: &'a World, name: &str) -> Vec<&'a Value> {
    let changes =
        world.log.iter().filter(|change| change.resource == "pods" && change.object["metadata"]["name"] == name);
    changes.map(|change| &change.object).collect()
}

#[test]
fn pods_are_taken_in_and_let_go_of() {
    by_seed(20, async |seed| {
        let mut simulation = Simulation::new(seed, Jobs::start);
        simulation.create(job(json!({"completions": 3})));
        let (labels, uid) = {
            let world = simulation.world.lock();
            let job = world.get("jobs", "j").unwrap();
            (job["spec"]["selector"]["matchLabels"].clone(), job["metadata"]["uid"].clone())
        };
        simulation.create(json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "stray", "namespace": "n", "labels": labels},
            "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}));
        simulation.random(30, |_, _| {}, |world| check(world, false)).await;
        // One that runs is made another's.
        let lost = simulation.world.lock().of("pods").find(|pod| pod["metadata"]["name"] != "stray").cloned();
        let lost = lost.map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned()).unwrap_or_default();
        simulation.world.lock().edit("pods", &lost, |pod| pod["metadata"]["labels"] = json!({"mine": "now"}));
        simulation.settle(|_, _| {}, is_over).await;
        let world = simulation.world.lock();
        let owned = |pod: &&Value| pod["metadata"]["ownerReferences"][0]["uid"] == uid;
        let stray = history(&world, "stray");
        let held = |pod: &&Value| pod["metadata"]["finalizers"][0] == FINALIZER;
        assert!(
            stray.iter().any(owned) && stray.iter().filter(|pod| owned(pod)).take(1).all(held),
            "it is counted from then on"
        );
        if let Some(left) = world.get("pods", &lost).filter(|pod| pod["metadata"]["labels"]["mine"] == "now") {
            assert!(!owned(&left) && !held(&left), "nothing holds what is not the Job's: {left}");
        }
    });
}

#[test]
fn it_goes_when_its_time_is_over() {
    by_seed(20, async |seed| {
        let mut simulation = Simulation::new(seed, Jobs::start);
        simulation.create(job(json!({"ttlSecondsAfterFinished": 60})));
        simulation.random(60, |_, _| {}, |_| {}).await;
        let gone = |world: &World| world.get("jobs", "j").is_none() && world.of("pods").next().is_none();
        simulation.settle(|_, _| {}, gone).await;
        let world = simulation.world.lock();
        let last = world.log.iter().rfind(|change| change.resource == "jobs").unwrap();
        assert!(last.object["status"]["completionTime"].is_string(), "it went after it had ended: {}", last.object);
    });
}
