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
    /// Its addresses for pods, if it has none.
    pub cidr: Option<IpNet>,
    /// There are no addresses left.
    pub exhausted: bool,
}

/// Decides. `taken` are the addresses of the other nodes.
pub fn plan(node: &Node, taken: &[IpNet], config: &Config) -> Plan {
    let mut plan = Plan::default();
    let cidr = node.spec.as_ref().and_then(|spec| spec.pod_cidr.as_deref());
    if cidr.unwrap_or_default().is_empty() {
        plan.cidr = free(taken, config);
        plan.exhausted = plan.cidr.is_none();
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
        if let Some(cidr) = plan.cidr {
            let spec = json!({"podCIDR": cidr.to_string(), "podCIDRs": [cidr.to_string()]});
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

    fn node(spec: Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": spec})).unwrap()
    }

    #[test]
    fn addresses_are_given_once() {
        let config = Config { cluster_cidr: "10.244.0.0/23".parse().unwrap(), ..Default::default() };
        let check = |taken: &[&str], expect: Option<&str>| {
            let taken: Vec<IpNet> = taken.iter().map(|t| t.parse().unwrap()).collect();
            let plan = plan(&node(json!({})), &taken, &config);
            assert_eq!(plan.cidr.map(|c| c.to_string()).as_deref(), expect);
            assert_eq!(plan.exhausted, expect.is_none());
        };
        check(&[], Some("10.244.0.0/24"));
        check(&["10.244.0.0/24"], Some("10.244.1.0/24"));
        check(&["10.244.0.128/25"], Some("10.244.1.0/24"));
        check(&["10.244.0.0/24", "10.244.1.0/24"], None);
        assert_eq!(plan(&node(json!({"podCIDR": "10.9.0.0/24"})), &[], &config), Plan::default());
    }
}
