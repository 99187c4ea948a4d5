//! Node: gives every node its part of the pods' addresses, and keeps pods away from nodes that are not ready.

use std::{net::IpAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Taint};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::sync::Mutex;

use crate::{
    Config,
    context::Context,
    runtime::{Controller, Key, Queue, objects::name},
};

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";

/// What to change about a node.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Its addresses for pods, if it has none.
    pub cidr: Option<IpNet>,
    /// All of its taints, if they change.
    pub taints: Option<Vec<Taint>>,
    /// There are no addresses left.
    pub exhausted: bool,
}

/// Decides. `taken` are the addresses of the other nodes.
pub fn plan(node: &Node, taken: &[IpNet], config: &Config) -> Plan {
    let mut plan = Plan::default();
    let spec = node.spec.clone().unwrap_or_default();
    if spec.pod_cidr.as_deref().unwrap_or_default().is_empty() {
        plan.cidr = free(taken, config);
        plan.exhausted = plan.cidr.is_none();
    }
    let conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let ready = conditions.filter(|c| c.type_ == "Ready").map(|c| c.status.as_str()).next();
    // A node that has not spoken yet is not ready; one that has fallen silent cannot be reached.
    let wanted = match ready {
        Some("True") => None,
        Some("Unknown") => Some(UNREACHABLE),
        _ => Some(NOT_READY),
    };
    let old = spec.taints.unwrap_or_default();
    let ours = |t: &Taint| (t.key == NOT_READY || t.key == UNREACHABLE) && t.effect == "NoSchedule";
    let mut new: Vec<Taint> = old.iter().filter(|t| !ours(t) || Some(t.key.as_str()) == wanted).cloned().collect();
    if let Some(key) = wanted
        && !new.iter().any(|t| ours(t) && t.key == key)
    {
        new.push(Taint { key: key.into(), effect: "NoSchedule".into(), ..Default::default() });
    }
    if new != old {
        plan.taints = Some(new);
    }
    plan
}

fn free(taken: &[IpNet], config: &Config) -> Option<IpNet> {
    let mask = config.node_cidr_mask.max(config.cluster_cidr.prefix_len());
    let overlaps = |a: &IpNet, b: &IpNet| a.contains(&b.network()) || b.contains(&a.network());
    config.cluster_cidr.subnets(mask).ok()?.find(|part| !taken.iter().any(|t| overlaps(t, part)))
}

/// The parts of the pods' addresses that nodes have.
fn cidr_of(node: &Node) -> Option<IpNet> {
    let text = node.spec.as_ref()?.pod_cidr.as_deref()?;
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

pub(crate) struct Nodes {
    context: Arc<Context>,
    /// Addresses are given out one at a time, so that no two nodes get the same.
    giving: Mutex<()>,
}

impl Nodes {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.nodes.on_change(move |_, new| {
            if let Some(node) = new {
                q.add(Key::of(&**node));
            }
        });
        (Arc::new(Nodes { context, giving: Mutex::default() }), queue)
    }
}

#[async_trait]
impl Controller for Nodes {
    fn name(&self) -> &'static str {
        "node"
    }

    async fn ready(&self) {
        self.context.caches.nodes.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let cache = &self.context.caches.nodes;
        let _one = self.giving.lock().await;
        let Some(node) = cache.get(key) else { return Ok(None) };
        let taken: Vec<IpNet> = cache.all().iter().filter_map(|n| cidr_of(n)).collect();
        let plan = plan(&node, &taken, &self.context.config);
        if plan.exhausted {
            let (cidr, mask) = (self.context.config.cluster_cidr, self.context.config.node_cidr_mask);
            tracing::error!(node = name(&*node), "no addresses are left for its pods: {cidr} holds no further /{mask}");
        }
        let mut spec = json!({});
        if let Some(cidr) = plan.cidr {
            spec["podCIDR"] = cidr.to_string().into();
            spec["podCIDRs"] = json!([cidr.to_string()]);
        }
        if let Some(taints) = plan.taints {
            spec["taints"] = json!(taints);
        }
        if spec.as_object().is_some_and(|s| !s.is_empty()) {
            let patch = json!({"metadata": {"resourceVersion": node.metadata.resource_version}, "spec": spec});
            let api: Api<Node> = Api::all(self.context.client.clone());
            let patched = api.patch(&key.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
            cache.note(patched);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn node(spec: Value, ready: Option<&str>) -> Node {
        let conditions: Vec<Value> = ready.iter().map(|r| json!({"type": "Ready", "status": r})).collect();
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": spec, "status": {"conditions": conditions}}))
            .unwrap()
    }

    fn keys(plan: &Plan) -> Option<Vec<&str>> {
        plan.taints.as_ref().map(|t| t.iter().map(|t| t.key.as_str()).collect())
    }

    #[test]
    fn addresses_are_given_once() {
        let config = Config { cluster_cidr: "10.244.0.0/23".parse().unwrap(), ..Default::default() };
        let check = |taken: &[&str], expect: Option<&str>| {
            let taken: Vec<IpNet> = taken.iter().map(|t| t.parse().unwrap()).collect();
            let plan = plan(&node(json!({}), Some("True")), &taken, &config);
            assert_eq!(plan.cidr.map(|c| c.to_string()).as_deref(), expect);
            assert_eq!(plan.exhausted, expect.is_none());
        };
        check(&[], Some("10.244.0.0/24"));
        check(&["10.244.0.0/24"], Some("10.244.1.0/24"));
        check(&["10.244.0.128/25"], Some("10.244.1.0/24"));
        check(&["10.244.0.0/24", "10.244.1.0/24"], None);
        assert_eq!(plan(&node(json!({"podCIDR": "10.9.0.0/24"}), Some("True")), &[], &config), Plan::default());
    }

    #[test]
    fn a_node_that_is_not_ready_is_tainted() {
        let check = |taints: Value, ready: Option<&str>, expect: Option<Vec<&str>>| {
            let node = node(json!({"podCIDR": "10.244.0.0/24", "taints": taints}), ready);
            assert_eq!(keys(&plan(&node, &[], &Config::default())), expect);
        };
        let ours = json!({"key": NOT_READY, "effect": "NoSchedule"});
        let theirs = json!({"key": "gpu", "effect": "NoSchedule"});
        check(json!([theirs]), None, Some(vec!["gpu", NOT_READY]));
        check(json!([theirs, ours]), Some("False"), None);
        check(json!([theirs, ours]), Some("True"), Some(vec!["gpu"]));
        check(json!([ours]), Some("Unknown"), Some(vec![UNREACHABLE]));
        check(json!([theirs]), Some("True"), None);
    }
}
