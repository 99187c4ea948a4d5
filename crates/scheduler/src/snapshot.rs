//! Nodes, the pods on them, and what else a decision looks at. It is kept up change by change; what a decision asks of
//! all pods is counted by class of pods that are alike, so that its cost does not grow with their number.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use k8s_openapi::api::{
    core::v1::{Node, Taint},
    policy::v1::PodDisruptionBudget,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector as Selector;
use kube::ResourceExt;
use parking_lot::RwLock;
use seawall_api::{quantity::Quantity, selector::LabelSelector};

use crate::{
    pod::{PodInfo, Resources},
    topology::Topology,
};

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
    /// Where it is kept.
    pub slot: usize,
    /// The node.
    pub facts: Arc<NodeFacts>,
    /// Whether the node itself is known; pods may be bound to a node that is not (yet, or any more).
    pub known: bool,
    /// The pods by uid.
    pub pods: HashMap<String, Arc<PodInfo>>,
    /// What they ask for together.
    pub requested: Resources,
    /// What they are taken to need.
    pub assumed: Resources,
}

impl NodeInfo {
    /// Puts a pod there.
    pub fn add(&mut self, pod: Arc<PodInfo>) {
        self.requested.add(&pod.requests);
        self.assumed.add(&pod.assumed);
        self.pods.insert(pod.uid.clone(), pod);
    }

    /// Takes a pod away.
    pub fn remove(&mut self, uid: &str) -> Option<Arc<PodInfo>> {
        let pod = self.pods.remove(uid)?;
        self.requested.sub(&pod.requests);
        self.assumed.sub(&pod.assumed);
        Some(pod)
    }
}

/// How many pods of a class are on a node.
#[derive(Clone, Copy, Debug, Default)]
pub struct Here {
    /// All of them.
    pub all: i64,
    /// Those that are not being deleted.
    pub living: i64,
}

/// Pods that are alike for other pods.
#[derive(Clone, Debug)]
pub struct Class {
    /// One of them.
    pub example: Arc<PodInfo>,
    /// How many there are on each node, by its slot.
    pub on: BTreeMap<usize, Here>,
}

/// How many of a group of pods may be disrupted
/// (<https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-budgets>).
#[derive(Clone, Debug, Default)]
pub struct Budget {
    /// The group; `None` is none.
    pub selector: Option<LabelSelector>,
    /// How many more.
    pub allowed: i64,
    /// Names of pods that have been counted already.
    pub disrupted: BTreeSet<String>,
}

impl Budget {
    /// Reads a budget.
    pub fn new(budget: &PodDisruptionBudget) -> Budget {
        let status = budget.status.as_ref();
        let selector = budget.spec.as_ref().and_then(|s| s.selector.as_ref());
        Budget {
            selector: selector.map(|s| crate::pod::selector(Some(s))),
            allowed: status.and_then(|s| s.disruptions_allowed).unwrap_or_default().into(),
            disrupted: status
                .and_then(|s| s.disrupted_pods.as_ref())
                .map(|pods| pods.keys().cloned().collect())
                .unwrap_or_default(),
        }
    }
}

/// A name in a namespace.
pub type Named = (String, String);

/// What is worked out of the nodes when it is first asked for, and forgotten when they change.
#[derive(Debug, Default)]
struct Derived {
    order: Option<Arc<[usize]>>,
    topologies: HashMap<String, Arc<Topology>>,
}

/// Everything a decision looks at.
#[derive(Debug, Default)]
pub struct Snapshot {
    slots: Vec<NodeInfo>,
    vacant: Vec<usize>,
    index: HashMap<String, usize>,
    derived: RwLock<Derived>,
    /// Labels of namespaces.
    pub namespaces: HashMap<String, BTreeMap<String, String>>,
    /// Claims, and whether they are bound.
    pub claims: HashMap<Named, bool>,
    /// Budgets.
    pub budgets: BTreeMap<Named, Budget>,
    /// What selects pods, by namespace, then by kind and name: Services and controllers.
    pub selectors: HashMap<String, HashMap<Named, LabelSelector>>,
    places: HashMap<String, usize>,
    classes: HashMap<String, HashMap<Arc<str>, Class>>,
    sociable: HashSet<(String, Arc<str>)>,
    images: HashMap<String, i64>,
    /// How many pods there are of each priority.
    priorities: BTreeMap<i32, usize>,
    nominations: HashMap<String, (String, Arc<PodInfo>)>,
    nominated: HashMap<String, Vec<Arc<PodInfo>>>,
}

impl Snapshot {
    /// The nodes that exist.
    pub fn known(&self) -> impl Iterator<Item = &NodeInfo> {
        self.slots.iter().filter(|n| n.known)
    }

    /// Slots are below this.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// A node by its slot.
    pub fn at(&self, slot: usize) -> &NodeInfo {
        &self.slots[slot]
    }

    /// A node by its name, if it exists.
    pub fn node(&self, name: &str) -> Option<&NodeInfo> {
        self.index.get(name).map(|slot| &self.slots[*slot]).filter(|n| n.known)
    }

    /// The slots of the nodes that exist, one of each zone in turn, so that any stretch of them is spread over zones.
    pub fn order(&self) -> Arc<[usize]> {
        if let Some(order) = &self.derived.read().order {
            return order.clone();
        }
        let mut zones: BTreeMap<(&str, &str), Vec<(&str, usize)>> = BTreeMap::new();
        for node in self.known() {
            let label = |key: &str| node.facts.labels.get(key).map_or("", String::as_str);
            let zone = (label("topology.kubernetes.io/region"), label("topology.kubernetes.io/zone"));
            zones.entry(zone).or_default().push((&node.facts.name, node.slot));
        }
        let mut turns: Vec<(usize, usize, usize)> = Vec::new();
        for (zone, mut nodes) in zones.into_values().enumerate() {
            nodes.sort_unstable();
            turns.extend(nodes.into_iter().enumerate().map(|(turn, (_, slot))| (turn, zone, slot)));
        }
        turns.sort_unstable();
        let order: Arc<[usize]> = turns.into_iter().map(|(_, _, slot)| slot).collect();
        self.derived.write().order = Some(order.clone());
        order
    }

    /// The places that a label makes.
    pub fn topology(&self, key: &str) -> Arc<Topology> {
        if let Some(topology) = self.derived.read().topologies.get(key) {
            return topology.clone();
        }
        let topology = Arc::new(Topology::new(key, &self.slots));
        self.derived.write().topologies.insert(key.to_owned(), topology.clone());
        topology
    }

    /// The classes of pods in these namespaces, or in all.
    pub fn classes<'a>(&'a self, namespaces: Option<&'a [String]>) -> Box<dyn Iterator<Item = &'a Class> + 'a> {
        match namespaces {
            Some(names) => Box::new(names.iter().filter_map(|n| self.classes.get(n)).flat_map(HashMap::values)),
            None => Box::new(self.classes.values().flat_map(HashMap::values)),
        }
    }

    /// The classes of pods that have a say in which pods are near them.
    pub fn sociable(&self) -> impl Iterator<Item = &Class> {
        self.sociable.iter().filter_map(|(namespace, class)| self.classes.get(namespace)?.get(class))
    }

    /// On how many nodes an image is.
    pub fn nodes_with_image(&self, image: &str) -> i64 {
        self.images.get(image).copied().unwrap_or_default()
    }

    fn slot(&mut self, name: &str) -> usize {
        if let Some(slot) = self.index.get(name) {
            return *slot;
        }
        let slot = self.vacant.pop().unwrap_or(self.slots.len());
        let info = NodeInfo { slot, ..Default::default() };
        match self.slots.get_mut(slot) {
            Some(vacant) => *vacant = info,
            None => self.slots.push(info),
        }
        self.index.insert(name.to_owned(), slot);
        slot
    }

    fn vacate(&mut self, name: &str) {
        if let Some(slot) = self.index.remove(name) {
            self.slots[slot] = NodeInfo { slot, ..Default::default() };
            self.vacant.push(slot);
        }
    }

    /// Puts a pod on a node. Says whether that is new.
    pub fn place(&mut self, pod: Arc<PodInfo>, node: &str) -> bool {
        let slot = self.slot(node);
        let same = self.places.get(&pod.uid) == Some(&slot);
        // The slot must not become vacant in between.
        self.take(&pod.uid);
        self.unnominate(&pod.uid);
        let classes = self.classes.entry(pod.namespace.clone()).or_default();
        let class = classes.entry(pod.class.clone()).or_insert_with(|| {
            if pod.is_sociable() {
                self.sociable.insert((pod.namespace.clone(), pod.class.clone()));
            }
            Class { example: pod.clone(), on: BTreeMap::new() }
        });
        let here = class.on.entry(slot).or_default();
        here.all += 1;
        here.living += i64::from(!pod.deleting);
        *self.priorities.entry(pod.priority).or_default() += 1;
        self.places.insert(pod.uid.clone(), slot);
        self.slots[slot].add(pod);
        !same
    }

    /// Puts another version of a pod where it is.
    pub fn replace(&mut self, pod: Arc<PodInfo>, slot: usize) {
        if let Some(name) = self.name_of(slot) {
            self.place(pod, &name);
        }
    }

    fn name_of(&self, slot: usize) -> Option<String> {
        match self.slots.get(slot).filter(|n| n.known) {
            Some(node) => Some(node.facts.name.clone()),
            // Few nodes are spoken of and not there.
            None => self.index.iter().find(|(_, s)| **s == slot).map(|(name, _)| name.clone()),
        }
    }

    /// Takes a pod away. Says whether it was there.
    pub fn remove(&mut self, uid: &str) -> bool {
        self.unnominate(uid);
        let Some(slot) = self.take(uid) else { return false };
        if self.slots[slot].pods.is_empty() && !self.slots[slot].known {
            self.name_of(slot).iter().for_each(|name| self.vacate(name));
        }
        true
    }

    fn take(&mut self, uid: &str) -> Option<usize> {
        let slot = self.places.remove(uid)?;
        let pod = self.slots[slot].remove(uid)?;
        if let Some(count) = self.priorities.get_mut(&pod.priority) {
            *count -= 1;
            if *count == 0 {
                self.priorities.remove(&pod.priority);
            }
        }
        let classes = self.classes.get_mut(&pod.namespace)?;
        let class = classes.get_mut(&pod.class)?;
        if let Some(here) = class.on.get_mut(&slot) {
            here.all -= 1;
            here.living -= i64::from(!pod.deleting);
            if here.all == 0 {
                class.on.remove(&slot);
            }
        }
        if class.on.is_empty() {
            classes.remove(&pod.class);
            if classes.is_empty() {
                self.classes.remove(&pod.namespace);
            }
            if pod.is_sociable() {
                self.sociable.remove(&(pod.namespace.clone(), pod.class.clone()));
            }
        }
        Some(slot)
    }

    /// Whether a pod is on some node.
    pub fn contains(&self, uid: &str) -> bool {
        self.places.contains_key(uid)
    }

    /// A pod on some node.
    pub fn pod(&self, uid: &str) -> Option<(&Arc<PodInfo>, &NodeInfo)> {
        let node = &self.slots[*self.places.get(uid)?];
        Some((node.pods.get(uid)?, node))
    }

    /// The least important pod's priority.
    pub fn lowest_priority(&self) -> Option<i32> {
        self.priorities.keys().next().copied()
    }

    /// All pods on nodes.
    pub fn uids(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    /// Room on a node is being made for a pod: less important ones do not take it.
    pub fn nominate(&mut self, pod: Arc<PodInfo>, node: &str) {
        self.unnominate(&pod.uid);
        self.nominations.insert(pod.uid.clone(), (node.to_owned(), pod.clone()));
        self.nominated.entry(node.to_owned()).or_default().push(pod);
    }

    /// A pod has no claim to room on a node any more. Says whether it had.
    pub fn unnominate(&mut self, uid: &str) -> bool {
        let Some((node, _)) = self.nominations.remove(uid) else { return false };
        if let Some(pods) = self.nominated.get_mut(&node) {
            pods.retain(|p| p.uid != uid);
            if pods.is_empty() {
                self.nominated.remove(&node);
            }
        }
        true
    }

    /// The node where room is being made for a pod.
    pub fn nomination(&self, uid: &str) -> Option<&str> {
        self.nominations.get(uid).map(|(node, _)| node.as_str())
    }

    /// The pods for which room is being made on a node.
    pub fn nominated(&self, node: &str) -> &[Arc<PodInfo>] {
        self.nominated.get(node).map_or(&[], Vec::as_slice)
    }

    /// A Service or a controller selects pods like this, or does not any more.
    pub fn set_selector(&mut self, namespace: &str, kind: &str, name: &str, selector: Option<&Selector>) {
        let all = self.selectors.entry(namespace.to_owned()).or_default();
        let key = (kind.to_owned(), name.to_owned());
        match selector {
            Some(typed) => all.insert(key, crate::pod::selector(Some(typed))),
            None => all.remove(&key),
        };
    }

    /// What a pod that says nothing of it is spread with: the Services and the controller that select it, together. No
    /// selector if there are none.
    pub fn company_selector(&self, pod: &PodInfo) -> LabelSelector {
        let mut all = LabelSelector::default();
        for ((kind, name), selector) in self.selectors.get(&pod.namespace).into_iter().flatten() {
            let meant = match kind.as_str() {
                "Service" => pod.is_picked(selector),
                _ => pod.owner.as_ref().is_some_and(|(k, n)| k == kind && n == name),
            };
            if meant {
                all.0.extend(selector.0.iter().cloned());
            }
        }
        all
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
        let slot = self.slot(&facts.name);
        let info = &mut self.slots[slot];
        if info.known && *info.facts == facts {
            return false;
        }
        if !info.known || info.facts.labels != facts.labels {
            *self.derived.get_mut() = Derived::default();
        }
        info.known = true;
        let before = std::mem::replace(&mut info.facts, Arc::new(facts));
        let after = info.facts.clone();
        self.count_images(&before, &after);
        true
    }

    fn count_images(&mut self, before: &NodeFacts, after: &NodeFacts) {
        for image in after.images.keys().filter(|i| !before.images.contains_key(*i)) {
            *self.images.entry(image.clone()).or_default() += 1;
        }
        for image in before.images.keys().filter(|i| !after.images.contains_key(*i)) {
            if let Some(count) = self.images.get_mut(image) {
                *count -= 1;
                if *count == 0 {
                    self.images.remove(image);
                }
            }
        }
    }

    /// Takes a node away; its pods stay counted until they are deleted.
    pub fn remove_node(&mut self, name: &str) -> bool {
        let Some(slot) = self.index.get(name).copied() else { return false };
        let info = &mut self.slots[slot];
        if !info.known {
            return false;
        }
        info.known = false;
        let (before, empty) = (std::mem::take(&mut info.facts), info.pods.is_empty());
        *self.derived.get_mut() = Derived::default();
        self.count_images(&before, &NodeFacts::default());
        if empty {
            self.vacate(name);
        }
        true
    }
}
