//! CronJobs under crashes, lost answers and stale caches.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};

use super::CronJobs;
use crate::simulation::{Simulation, World, by_seed};

fn cron(policy: &str) -> Value {
    json!({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "c", "namespace": "n"}, "spec": {
        "schedule": "* * * * *", "concurrencyPolicy": policy, "successfulJobsHistoryLimit": 2, "failedJobsHistoryLimit": 1,
        "jobTemplate": {"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}}}})
}

fn is_over(job: &Value) -> bool {
    job["status"]["conditions"].is_array()
}

/// Some Job ends, or is deleted by somebody.
fn chance(world: &mut World, rng: &mut StdRng) {
    let jobs: Vec<Value> = world.of("jobs").filter(|job| !is_over(job)).cloned().collect();
    let Some(job) = jobs.choose(rng) else { return };
    let name = job["metadata"]["name"].as_str().unwrap().to_owned();
    if rng.random_ratio(1, 5) {
        return world.remove(&("jobs", "n".into(), name));
    }
    let (end, now) = (if rng.random_ratio(2, 3) { "Complete" } else { "Failed" }, world.now.to_string());
    world.edit("jobs", &name, |job| {
        job["status"] =
            json!({"startTime": now, "conditions": [{"type": end, "status": "True", "lastTransitionTime": now}]});
        if end == "Complete" {
            job["status"]["completionTime"] = now.into();
        }
    });
}

/// No time has two Jobs, over the whole of history, and under `Forbid` and `Replace` no two that the status knows run at once.
fn check(world: &World, policy: &str) {
    let mut made: Vec<(&Value, &Value)> = Vec::new();
    for change in world.log.iter().filter(|change| change.resource == "jobs") {
        let meta = &change.object["metadata"];
        let time = &meta["annotations"]["batch.kubernetes.io/cronjob-scheduled-timestamp"];
        match made.iter().find(|(known, _)| *known == time) {
            None => made.push((time, &meta["uid"])),
            // Somebody may have deleted it before it was noted that it had been made.
            Some((_, uid)) if *uid != &meta["uid"] => {
                assert!(world.log.iter().any(|c| c.gone && &&c.object["metadata"]["uid"] == uid), "two for {time}");
            }
            Some(_) => {}
        }
    }
    if policy != "Allow" {
        let active = world.get("cronjobs", "c").unwrap()["status"]["active"].as_array().map_or(0, Vec::len);
        assert!(active <= 1, "{active} at once");
    }
}

fn is_right(world: &World) -> bool {
    let cron = world.get("cronjobs", "c").unwrap();
    let over = |end: &str| world.of("jobs").filter(|job| job["status"]["conditions"][0]["type"] == end).count();
    let running: Vec<&Value> =
        world.of("jobs").filter(|job| !is_over(job)).map(|job| &job["metadata"]["uid"]).collect();
    let active: Vec<&Value> = cron["status"]["active"].as_array().into_iter().flatten().map(|r| &r["uid"]).collect();
    over("Complete") <= 2 && over("Failed") <= 1 && active.iter().all(|uid| running.contains(uid))
}

#[test]
fn every_time_has_one_job() {
    by_seed(60, async |seed| {
        for policy in ["Allow", "Forbid", "Replace"] {
            let mut simulation = Simulation::new(seed, CronJobs::start);
            simulation.create(cron(policy));
            simulation.random(200, chance, |world| check(world, policy)).await;
            // In the end all Jobs end, and no new ones come.
            simulation.world.lock().edit("cronjobs", "c", |cron| cron["spec"]["suspend"] = true.into());
            simulation.settle(chance, is_right).await;
            let last = simulation.world.lock().get("cronjobs", "c").unwrap()["status"]["lastScheduleTime"].clone();
            assert!(last.is_string(), "{policy}: none was ever made");
        }
    });
}
