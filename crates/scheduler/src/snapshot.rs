//! Nodes, the pods on them, and what else a decision looks at.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::ResourceExt;
use seawall_api::quantity::Quantity;

use crate::pod::{PodInfo, Resources};

/// A node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeFacts {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// It is cordoned.
    pub unschedulable: bool,
    /// What pods may use.
    pub allocatable: Resources,
    /// How many pods it takes.
    pub pods: i64,
    /// Images that are there, with their size.
    pub images: BTreeMap<String, i64>,
}

/// A node and its pods.
#[derive(Clone, Debug, Default)]
pub struct NodeInfo {
    /// The node.
    pub facts: NodeFacts,
    /// Whether the node itself is known; pods may be bound to a node that is not (yet, or any more).
    pub known: bool,
    /// The pods by uid.
    pub pods: HashMap<String, Arc<PodInfo>>,
    /// What they ask for together.
    pub requested: Resources,
    /// What they are taken to need.
    pub assumed: Resources,
}

/// Everything a decision looks at.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// By name.
    pub nodes: BTreeMap<String, NodeInfo>,
    /// Labels of namespaces.
    pub namespaces: HashMap<String, BTreeMap<String, String>>,
    /// Claims by namespace and name, and whether they are bound.
    pub claims: HashMap<(String, String), bool>,
    places: HashMap<String, String>,
}

impl Snapshot {
    /// The nodes that exist.
    pub fn known(&self) -> impl Iterator<Item = &NodeInfo> {
        self.nodes.values().filter(|n| n.known)
    }

    /// Puts a pod on a node. Says whether that is new.
    pub fn place(&mut self, pod: Arc<PodInfo>, node: &str) -> bool {
        let same = self.places.get(&pod.uid).is_some_and(|n| n == node);
        self.remove(&pod.uid);
        let info = self.nodes.entry(node.to_owned()).or_default();
        info.requested.add(&pod.requests);
        info.assumed.add(&pod.assumed);
        self.places.insert(pod.uid.clone(), node.to_owned());
        info.pods.insert(pod.uid.clone(), pod);
        !same
    }

    /// Takes a pod away. Says whether it was there.
    pub fn remove(&mut self, uid: &str) -> bool {
        let Some(node) = self.places.remove(uid) else { return false };
        if let Some(info) = self.nodes.get_mut(&node) {
            if let Some(pod) = info.pods.remove(uid) {
                info.requested.sub(&pod.requests);
                info.assumed.sub(&pod.assumed);
            }
            if info.pods.is_empty() && !info.known {
                self.nodes.remove(&node);
            }
        }
        true
    }

    /// Whether a pod is on some node.
    pub fn contains(&self, uid: &str) -> bool {
        self.places.contains_key(uid)
    }

    /// All pods on nodes.
    pub fn uids(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    /// Sets a node. Says whether anything changed that decisions look at.
    pub fn set_node(&mut self, node: &Node) -> bool {
        let status = node.status.as_ref();
        let allocatable = status.and_then(|s| s.allocatable.as_ref().or(s.capacity.as_ref()));
        let pods =
            allocatable.and_then(|a| a.get("pods")).and_then(|q| q.0.parse::<Quantity>().ok()).map_or(0, |q| q.value());
        let spec = node.spec.as_ref();
        let mut images = BTreeMap::new();
        for image in status.iter().flat_map(|s| s.images.iter().flatten()) {
            for name in image.names.iter().flatten() {
                images.insert(name.clone(), image.size_bytes.unwrap_or_default());
            }
        }
        let facts = NodeFacts {
            name: node.name_any(),
            labels: node.labels().clone(),
            taints: spec.and_then(|s| s.taints.clone()).unwrap_or_default(),
            unschedulable: spec.and_then(|s| s.unschedulable).unwrap_or(false),
            allocatable: allocatable.map(Resources::new).unwrap_or_default(),
            pods,
            images,
        };
        let info = self.nodes.entry(facts.name.clone()).or_default();
        let changed = !info.known || info.facts != facts;
        info.known = true;
        info.facts = facts;
        changed
    }

    /// Takes a node away; its pods stay counted until they are deleted.
    pub fn remove_node(&mut self, name: &str) -> bool {
        let Some(info) = self.nodes.get_mut(name) else { return false };
        info.known = false;
        info.facts = NodeFacts::default();
        if info.pods.is_empty() {
            self.nodes.remove(name);
        }
        true
    }
}
