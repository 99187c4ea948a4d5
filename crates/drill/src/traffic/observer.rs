//! Who looks at nodes and pods while a drill goes on, and writes down when they turned.

use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::{
    NAMESPACE, Recorder, Way, revision,
    watcher::{End, Told, follow},
};
use crate::history::{NodeSeen, PodSeen};

/// Watches nodes, until `stop`.
pub async fn nodes(way: Way, recorder: Recorder, stop: CancellationToken) {
    observe(way, "/api/v1/nodes", stop, |_, object| {
        let Some(node) = object["metadata"]["name"].as_str() else { return };
        let ready = condition(object, "Ready");
        let (ready, accused) = (ready == Some("True"), ready == Some("Unknown"));
        let seen = NodeSeen { at: recorder.now(), node: node.into(), ready, accused };
        recorder.history().nodes.push(seen);
    })
    .await;
}

/// Watches the pods of the drill, until `stop`.
pub async fn pods(way: Way, recorder: Recorder, stop: CancellationToken) {
    observe(way, &format!("/api/v1/namespaces/{NAMESPACE}/pods"), stop, |kind, object| {
        let text = |value: &Value| -> std::sync::Arc<str> { value.as_str().unwrap_or_default().into() };
        let meta = &object["metadata"];
        let seen = PodSeen {
            at: recorder.now(),
            app: text(&meta["labels"]["app"]),
            name: text(&meta["name"]),
            uid: text(&meta["uid"]),
            node: text(&object["spec"]["nodeName"]),
            ready: kind != "DELETED" && meta["deletionTimestamp"].is_null() && is(object, "Ready"),
            gone: kind == "DELETED",
        };
        recorder.history().pods.push(seen);
    })
    .await;
}

fn is(object: &Value, ty: &str) -> bool {
    condition(object, ty) == Some("True")
}

/// The status of a condition.
fn condition<'a>(object: &'a Value, ty: &str) -> Option<&'a str> {
    let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.find(|c| c["type"] == ty)?["status"].as_str()
}

async fn observe(way: Way, path: &str, stop: CancellationToken, mut see: impl FnMut(&str, &Value)) {
    let mut client = way.client();
    let mut from = None;
    while !stop.is_cancelled() {
        let Some(at) = from else {
            let listed = tokio::select! {
                listed = client.insist(path) => listed,
                () = stop.cancelled() => return,
            };
            let Some(list) = listed.ok().and_then(|body| serde_json::from_slice::<Value>(&body).ok()) else { continue };
            for item in list["items"].as_array().into_iter().flatten() {
                see("ADDED", item);
            }
            from = revision(&list);
            continue;
        };
        let mut last = at;
        let told = |what: Told<'_>, revision: u64| {
            last = last.max(revision);
            if let Told::Change(kind, object) = what {
                see(kind, object);
            }
        };
        let end = tokio::select! {
            end = follow(&mut client, path, at, way.patience, told) => end,
            () = stop.cancelled() => return,
        };
        from = if matches!(end, End::Gone(_)) { None } else { Some(last) };
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
