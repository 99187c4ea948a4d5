//! Work for the components that act on one server only: a Deployment without replicas, which the controllers have to
//! look at, and a pod that fits nowhere, which the scheduler has to say. Neither costs a node anything.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http::Method;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{
    NAMESPACE, Recorder, Way, revision,
    watcher::{End, Told, follow},
};
use crate::history::{At, Probe};

/// How often work is given.
const EVERY: Duration = Duration::from_millis(200);
/// Work that nobody does is not piled up beyond this.
const MOST: usize = 200;

/// A kind of work.
struct Kind {
    who: &'static str,
    path: &'static str,
    object: fn(&str) -> Value,
    done: fn(&Value) -> bool,
}

const KINDS: [Kind; 2] = [
    Kind {
        who: "controllers",
        path: "/apis/apps/v1/namespaces/seawall-drill/deployments",
        object: |name| {
            let labels = json!({"drill": name});
            json!({"apiVersion": "apps/v1", "kind": "Deployment",
                "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"drill": "probe"}},
                "spec": {"replicas": 0, "selector": {"matchLabels": labels}, "template": {
                    "metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "none"}]}}}})
        },
        done: |object| object["status"]["observedGeneration"].as_u64() >= Some(1),
    },
    Kind {
        who: "scheduler",
        path: "/api/v1/namespaces/seawall-drill/pods",
        object: |name| {
            json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"drill": "probe"}},
                "spec": {"containers": [{"name": "c", "image": "none", "resources": {"requests": {"cpu": "100000"}}}]}})
        },
        done: |object| {
            let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
            conditions.any(|c| c["type"] == "PodScheduled")
        },
    },
];

type Given = Arc<Mutex<BTreeMap<String, At>>>;

/// Gives work and notes when it is done, until `stop`.
pub fn start(way: &Way, recorder: &Recorder, stop: &CancellationToken) -> Vec<JoinHandle<()>> {
    let tasks = KINDS.iter().flat_map(|kind| {
        let given = Given::default();
        let giving = give(kind, way.clone(), recorder.clone(), given.clone(), stop.clone());
        let noting = note(kind, way.clone(), recorder.clone(), given, stop.clone());
        [way.site.spawn(giving), way.site.spawn(noting)]
    });
    tasks.collect()
}

async fn give(kind: &'static Kind, way: Way, recorder: Recorder, given: Given, stop: CancellationToken) {
    let mut client = way.client();
    let mut number = 0;
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    while !stop.is_cancelled() {
        tick.tick().await;
        if given.lock().len() >= MOST {
            continue;
        }
        number += 1;
        let name = format!("p-{number}");
        let start = recorder.now();
        given.lock().insert(name.clone(), start);
        let body = Bytes::from((kind.object)(&name).to_string());
        let answer = client.send(Method::POST, kind.path, body).await;
        if !answer.is_ok_and(|(status, _)| status.is_success()) {
            // Whether it is there or not, nobody waits for it.
            given.lock().remove(&name);
        }
    }
}

async fn note(kind: &'static Kind, way: Way, recorder: Recorder, given: Given, stop: CancellationToken) {
    let (mut client, mut cleaner) = (way.client(), way.client());
    let path = format!("{}?labelSelector=drill%3Dprobe", kind.path);
    let mut from = None;
    let mut finished: Vec<String> = Vec::new();
    while !stop.is_cancelled() {
        let Some(at) = from else {
            let listed = tokio::select! {
                listed = client.insist(&path) => listed,
                () = stop.cancelled() => return,
            };
            from = listed.ok().and_then(|body| revision(&serde_json::from_slice(&body).ok()?));
            continue;
        };
        let mut last = at;
        let (done, enough) = (&mut finished, CancellationToken::new());
        let told = |what: Told<'_>, revision: u64| {
            last = last.max(revision);
            let Told::Change(_, object) = what else { return };
            let Some(name) = object["metadata"]["name"].as_str().filter(|_| (kind.done)(object)) else { return };
            let start = given.lock().remove(name);
            if let Some(start) = start {
                let end = recorder.now();
                recorder.history().probes.push(Probe { who: kind.who, start, end });
                done.push(name.to_owned());
                if done.len() >= 10 {
                    enough.cancel();
                }
            }
        };
        let end = tokio::select! {
            end = follow(&mut client, &path, at, way.patience, told) => end,
            () = enough.cancelled() => End::Broken,
            () = stop.cancelled() => return,
        };
        client.hang_up();
        from = if matches!(end, End::Gone(_)) { None } else { Some(last) };
        for name in finished.drain(..) {
            // Those that stay go with the namespace.
            let path = format!("{}/{name}?gracePeriodSeconds=0", kind.path);
            let _ = cleaner.send(Method::DELETE, &path, Bytes::new()).await;
        }
    }
}
