//! Node: gives every node its part of the pods' addresses. How nodes are is the business of [`crate::node_lifecycle`].

use std::{net::IpAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
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

/// What to change about a node.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Its addresses for pods, a range of each family, if it has none.
    pub cidrs: Vec<IpNet>,
    /// The range in which there is no room left.
    pub exhausted: Option<IpNet>,
}

/// Decides. `taken` are the addresses of the other nodes.
pub fn plan(node: &Node, taken: &[IpNet], config: &Config) -> Plan {
    let mut plan = Plan::default();
    let cidr = node.spec.as_ref().and_then(|spec| spec.pod_cidr.as_deref());
    if !cidr.unwrap_or_default().is_empty() {
        return plan;
    }
    for range in config.cluster_cidr.iter() {
        match free(range, taken, config) {
            Some(part) => plan.cidrs.push(part),
            None => plan.exhausted = Some(range),
        }
    }
    if plan.exhausted.is_some() {
        plan.cidrs.clear();
    }
    plan
}

fn free(range: IpNet, taken: &[IpNet], config: &Config) -> Option<IpNet> {
    let overlaps = |a: &IpNet, b: &IpNet| a.contains(&b.network()) || b.contains(&a.network());
    range.subnets(config.node_masks.of(range)).ok()?.find(|part| !taken.iter().any(|t| overlaps(t, part)))
}

/// The parts of the pods' addresses that a node has.
fn cidrs_of(node: &Node) -> Vec<IpNet> {
    let spec = node.spec.iter();
    let texts = spec.flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
    texts.filter_map(|text| text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))).collect()
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
        let taken: Vec<IpNet> = cache.all().iter().flat_map(|n| cidrs_of(n)).collect();
        let plan = plan(&node, &taken, &self.context.config);
        if let Some(range) = plan.exhausted {
            let mask = self.context.config.node_masks.of(range);
            tracing::error!(
                node = name(&*node),
                "no addresses are left for its pods: {range} holds no further /{mask}"
            );
        }
        if let Some(first) = plan.cidrs.first() {
            let all: Vec<String> = plan.cidrs.iter().map(ToString::to_string).collect();
            let spec = json!({"podCIDR": first.to_string(), "podCIDRs": all});
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
    use seawall_api::ranges::{NodeMasks, Ranges};
    use serde_json::Value;

    use super::*;

    fn node(spec: Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": spec})).unwrap()
    }

    #[test]
    fn addresses_are_given_once() {
        let check = |range: &str, taken: &[&str], expect: &[&str]| {
            let config = Config { cluster_cidr: range.parse().unwrap(), ..Default::default() };
            let taken: Vec<IpNet> = taken.iter().map(|t| t.parse().unwrap()).collect();
            let plan = plan(&node(json!({})), &taken, &config);
            assert_eq!(plan.cidrs.iter().map(ToString::to_string).collect::<Vec<_>>(), expect);
            assert_eq!(plan.exhausted.is_some(), expect.is_empty());
        };
        let one = "10.244.0.0/23";
        check(one, &[], &["10.244.0.0/24"]);
        check(one, &["10.244.0.0/24"], &["10.244.1.0/24"]);
        check(one, &["10.244.0.128/25"], &["10.244.1.0/24"]);
        check(one, &["10.244.0.0/24", "10.244.1.0/24"], &[]);
        let both = "10.244.0.0/23,fd00::/48";
        check(both, &[], &["10.244.0.0/24", "fd00::/64"]);
        check(both, &["10.244.0.0/24", "fd00::/64"], &["10.244.1.0/24", "fd00:0:0:1::/64"]);
        check("fd00::/48,10.244.0.0/23", &[], &["fd00::/64", "10.244.0.0/24"]);
        // Without one family there is none of the other.
        check(both, &["10.244.0.0/23"], &[]);
        check("fd00::/112", &["fd00::/120"], &["fd00::100/120"]);
        let range: Ranges = "10.244.0.0/24".parse().unwrap();
        let [taken, expect] = ["10.244.0.0/26", "10.244.0.64/26"].map(|part| part.parse::<IpNet>().unwrap());
        let node_masks = NodeMasks::of_flags(range, Some(26), None, None).unwrap();
        let config = Config { cluster_cidr: range, node_masks, ..Default::default() };
        assert_eq!(plan(&node(json!({})), &[taken], &config).cidrs, [expect]);
        let config = Config::default();
        assert_eq!(plan(&node(json!({"podCIDR": "10.9.0.0/24"})), &[], &config), Plan::default());
        let both = node(json!({"podCIDR": "10.9.0.0/24", "podCIDRs": ["10.9.0.0/24", "fd00::/64"]}));
        assert!(cidrs_of(&both).contains(&"fd00::/64".parse().unwrap()));
    }
}
