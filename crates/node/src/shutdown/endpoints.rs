//! Whether Services still lead to pods of this node: what the EndpointSlices say.

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt as _;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt as _, watcher},
};
use seawall_client::watch::Backoff;
use tokio::sync::watch;

/// Whether a slice leads to one of these pods. Who publishes pods that are not ready (`publishNotReadyAddresses`) wants
/// them to be found whatever they say; nobody waits for that.
fn exposes(slice: &EndpointSlice, node: &str, uids: &BTreeSet<String>) -> bool {
    slice.endpoints.iter().flatten().any(|endpoint| {
        let conditions = endpoint.conditions.as_ref();
        // Unknown is to be taken for ready, and not for terminating (KEP-1672).
        let ready = conditions.is_none_or(|c| c.ready.unwrap_or(true) && c.serving.unwrap_or(true));
        let target = endpoint.target_ref.as_ref();
        ready
            && endpoint.node_name.as_deref() == Some(node)
            && target.and_then(|t| t.uid.as_ref()).is_some_and(|uid| uids.contains(uid))
    })
}

/// Follows all slices and says whether one of them leads to one of these pods.
pub(super) async fn follow(client: Client, node: String, uids: BTreeSet<String>, exposed: watch::Sender<Option<bool>>) {
    let api: Api<EndpointSlice> = Api::all(client);
    let mut events = watcher(api, watcher::Config::default()).backoff(Backoff::default()).boxed();
    let mut slices: BTreeMap<String, bool> = BTreeMap::new();
    let mut listed = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Init) => slices.clear(),
            Ok(watcher::Event::InitApply(slice) | watcher::Event::Apply(slice)) => {
                let key = slice.metadata.uid.clone().unwrap_or_default();
                slices.insert(key, exposes(&slice, &node, &uids));
            }
            Ok(watcher::Event::Delete(slice)) => {
                slices.remove(slice.metadata.uid.as_deref().unwrap_or_default());
            }
            Ok(watcher::Event::InitDone) => listed = true,
            Err(error) => tracing::debug!("watch EndpointSlices: {error}"),
        }
        if listed {
            let any = slices.values().any(|exposes| *exposes);
            exposed.send_if_modified(|known| known.replace(any) != Some(any));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_leads_here() {
        let check = |endpoint: serde_json::Value, expect: bool| {
            let slice = json!({"metadata": {"name": "s"}, "addressType": "IPv4", "endpoints": [endpoint], "ports": []});
            let slice: EndpointSlice = serde_json::from_value(slice).unwrap();
            assert_eq!(exposes(&slice, "n", &["u".to_owned()].into()), expect, "{endpoint}");
        };
        let target = json!({"kind": "Pod", "uid": "u"});
        let here = |conditions: serde_json::Value| json!({"addresses": ["10.0.0.1"], "nodeName": "n", "targetRef": target, "conditions": conditions});
        check(here(json!({"ready": true})), true);
        check(here(json!({})), true);
        check(here(json!({"ready": true, "serving": false})), false);
        check(here(json!({"ready": false, "serving": true, "terminating": true})), false);
        check(json!({"addresses": ["10.0.0.1"], "nodeName": "m", "targetRef": target, "conditions": {}}), false);
        check(json!({"addresses": ["10.0.0.1"], "nodeName": "n", "targetRef": {"uid": "v"}, "conditions": {}}), false);
        check(json!({"addresses": ["10.0.0.1"], "nodeName": "n", "conditions": {}}), false);
    }
}
