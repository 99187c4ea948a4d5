//! The scheduler and the nodes of the simulation: pods are bound, start, become ready, end and go.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};

use super::world::{Id, World, is_ended, is_over, text};

impl World {
    /// One random pod goes a step further.
    pub fn some_pod_goes_on(&mut self, rng: &mut StdRng) {
        if let Some(id) = self.ids("pods").choose(rng).cloned() {
            self.pod_goes_on(&id, rng);
        }
    }

    /// All pods go a step further.
    pub fn all_pods_go_on(&mut self, rng: &mut StdRng) {
        for id in self.ids("pods") {
            self.pod_goes_on(&id, rng);
        }
    }

    /// Somebody deletes a random pod, as users do.
    pub fn somebody_deletes_a_pod(&mut self, rng: &mut StdRng) {
        if let Some(id) = self.ids("pods").choose(rng).cloned() {
            // It may be on its way out already.
            let _ = self.delete(&id, &json!({}));
        }
    }

    fn pod_goes_on(&mut self, id: &Id, rng: &mut StdRng) {
        let Some(pod) = self.find(id).cloned() else { return };
        let now = self.now.to_string();
        let runs_for_ever = pod["spec"]["restartPolicy"] == "Always";
        let next = if pod["metadata"]["deletionTimestamp"].is_string() {
            let mut pod = pod;
            // What is told to end may have been through with its work a moment before.
            if !is_ended(&pod) {
                let succeeded = !runs_for_ever && rng.random_ratio(1, 4);
                end(&mut pod, if succeeded { 0 } else { 143 }, &now);
            }
            pod["metadata"]["deletionGracePeriodSeconds"] = 0.into();
            pod
        } else if pod["spec"]["nodeName"].is_null() {
            let Some(node) = self.node_for(&pod, rng) else { return };
            changed(pod, |pod| pod["spec"]["nodeName"] = node.into())
        } else if pod["status"]["phase"] == "Pending" {
            // No two pods have the same number.
            let number: u32 = text(&pod, "uid").trim_start_matches("uid-").parse().unwrap_or(0);
            let (v4, v6) = (format!("10.1.{}.{}", number / 250, number % 250 + 1), format!("fd00::{number}"));
            changed(pod, |pod| {
                pod["status"] = json!({"phase": "Running", "startTime": now, "podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}],
                    "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}]});
            })
        } else if pod["status"]["phase"] == "Running" && !runs_for_ever {
            changed(pod, |pod| end(pod, if rng.random_ratio(2, 3) { 0 } else { 1 }, &now))
        } else {
            return;
        };
        if is_over(&next) {
            self.remove(id);
        } else {
            self.edit(id.0, &id.2, |pod| *pod = next);
        }
    }

    /// The node that a pod's affinity names, or any.
    fn node_for(&self, pod: &Value, rng: &mut StdRng) -> Option<String> {
        let term = "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms/0";
        let nodes: Vec<String> =
            self.of("nodes").filter_map(|node| node["metadata"]["name"].as_str().map(str::to_owned)).collect();
        match pod.pointer(&format!("{term}/matchFields/0/values/0")).and_then(Value::as_str) {
            Some(name) => nodes.into_iter().find(|node| node == name),
            None => Some(nodes.choose(rng).cloned().unwrap_or_else(|| "node".into())),
        }
    }
}

fn changed(mut pod: Value, change: impl FnOnce(&mut Value)) -> Value {
    change(&mut pod);
    pod
}

/// Ends all containers with this code.
pub(super) fn end(pod: &mut Value, code: i32, now: &str) {
    let ended: Vec<Value> = pod["spec"]["containers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|container| {
            json!({"name": container["name"], "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": code, "finishedAt": now}}})
        })
        .collect();
    let phase = if code == 0 { "Succeeded" } else { "Failed" };
    pod["status"] = json!({"phase": phase, "containerStatuses": ended});
}
