//! Where a pod may be by the labels of nodes, by taints, and by the company of other pods.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::Taint;
use seawall_api::node_selector::{term_matches, tolerates};

use crate::{
    pod::{PodInfo, PodTerm},
    snapshot::{NodeFacts, Snapshot},
    topology::Tally,
};

/// The first taint with one of `effects` that the pod does not tolerate.
pub fn untolerated<'a>(pod: &PodInfo, node: &'a NodeFacts, effects: &[&str]) -> Option<&'a Taint> {
    node.taints
        .iter()
        .find(|t| effects.contains(&t.effect.as_str()) && !pod.tolerations.iter().any(|tol| tolerates(tol, t)))
}

/// Whether a node matches a pod's selector and required affinity.
pub fn node_matches(pod: &PodInfo, node: &NodeFacts) -> bool {
    let selected = pod.node_selector.iter().all(|(key, value)| node.labels.get(key) == Some(value));
    // Terms are alternatives; no terms match nothing.
    selected
        && pod
            .node_terms
            .as_ref()
            .is_none_or(|terms| terms.iter().any(|term| term_matches(term, &node.name, &node.labels)))
}

impl PodTerm {
    /// Whether a pod is of the company that is meant.
    pub fn picks(&self, other: &PodInfo, namespaces: &HashMap<String, BTreeMap<String, String>>) -> bool {
        let named = self.namespaces.contains(&other.namespace);
        let selected = || {
            let labels = namespaces.get(&other.namespace);
            self.namespace_selector.as_ref().is_some_and(|s| {
                s.is_empty() || labels.is_some_and(|l| s.matches(|key| l.get(key).map(String::as_str)))
            })
        };
        (named || selected()) && other.is_picked(&self.selector)
    }

    /// The namespaces it looks into; `None` if that takes their labels to say.
    fn within(&self) -> Option<&[String]> {
        self.namespace_selector.is_none().then_some(&self.namespaces)
    }
}

/// The company of all pods, counted once for a decision
/// (<https://kubernetes.io/docs/concepts/scheduling-eviction/assign-pod-node/#inter-pod-affinity-and-anti-affinity>).
/// Pods that are being deleted count until they are gone, as upstream has it.
#[derive(Clone)]
pub struct Company {
    /// For each required term of the pod, the places where all of them are met.
    wanted: Vec<Tally>,
    /// For each term that the pod cannot stand, the places where it would be.
    avoided: Vec<Tally>,
    /// By label, the places where a pod is that cannot stand this one.
    hostile: Vec<Tally>,
    /// The pod is of the company that it wants itself.
    own: bool,
}

/// Why the company at a node is not right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unsocial {
    /// What the pod needs is not there.
    Affinity,
    /// What the pod cannot stand is there.
    AntiAffinity,
    /// Somebody there cannot stand the pod.
    Existing,
}

/// The tally for a label, made when there is none.
fn tally<'a>(tallies: &'a mut Vec<Tally>, key: &str, snapshot: &Snapshot) -> &'a mut Tally {
    let at = tallies.iter().position(|t| t.topology.key == key).unwrap_or_else(|| {
        tallies.push(Tally::new(snapshot.topology(key)));
        tallies.len() - 1
    });
    &mut tallies[at]
}

impl Company {
    /// Counts.
    pub fn of(pod: &PodInfo, snapshot: &Snapshot) -> Company {
        let make = |terms: &[PodTerm]| -> Vec<Tally> {
            terms.iter().map(|t| Tally::new(snapshot.topology(&t.topology_key))).collect()
        };
        let mut company = Company {
            wanted: make(&pod.affinity),
            avoided: make(&pod.anti_affinity),
            hostile: Vec::new(),
            own: pod.affinity.iter().all(|t| t.picks(pod, &snapshot.namespaces)),
        };
        if let Some(first) = pod.affinity.first() {
            for class in snapshot.classes(first.within()) {
                if company.wants(pod, &class.example, snapshot) {
                    for tally in &mut company.wanted {
                        class.on.iter().for_each(|(slot, here)| tally.add(*slot, here.all));
                    }
                }
            }
        }
        for (term, tally) in pod.anti_affinity.iter().zip(&mut company.avoided) {
            for class in snapshot.classes(term.within()).filter(|c| term.picks(&c.example, &snapshot.namespaces)) {
                class.on.iter().for_each(|(slot, here)| tally.add(*slot, here.all));
            }
        }
        for class in snapshot.sociable() {
            for term in class.example.anti_affinity.iter().filter(|t| t.picks(pod, &snapshot.namespaces)) {
                let tally = tally(&mut company.hostile, &term.topology_key, snapshot);
                class.on.iter().for_each(|(slot, here)| tally.add(*slot, here.all));
            }
        }
        company
    }

    /// All of the terms have to pick a pod for it to count.
    fn wants(&self, pod: &PodInfo, other: &PodInfo, snapshot: &Snapshot) -> bool {
        pod.affinity.iter().all(|t| t.picks(other, &snapshot.namespaces))
    }

    /// Supposes that another pod came to a node (1) or left it (-1).
    pub fn adjust(&mut self, pod: &PodInfo, other: &PodInfo, slot: usize, by: i64, snapshot: &Snapshot) {
        if !pod.affinity.is_empty() && self.wants(pod, other, snapshot) {
            self.wanted.iter_mut().for_each(|t| t.add(slot, by));
        }
        for (term, tally) in pod.anti_affinity.iter().zip(&mut self.avoided) {
            if term.picks(other, &snapshot.namespaces) {
                tally.add(slot, by);
            }
        }
        for term in other.anti_affinity.iter().filter(|t| t.picks(pod, &snapshot.namespaces)) {
            tally(&mut self.hostile, &term.topology_key, snapshot).add(slot, by);
        }
    }

    /// Whether the pod can be at a node.
    pub fn check(&self, slot: usize) -> Result<(), Unsocial> {
        if self.wanted.iter().any(|t| t.topology.at(slot).is_none()) {
            return Err(Unsocial::Affinity);
        }
        // The first of a group that wants its own company may start it.
        let first = || self.own && self.wanted.iter().all(Tally::is_zero);
        if !self.wanted.iter().all(|t| t.at(slot) > 0) && !first() {
            return Err(Unsocial::Affinity);
        }
        if self.avoided.iter().any(|t| t.at(slot) > 0) {
            return Err(Unsocial::AntiAffinity);
        }
        if self.hostile.iter().any(|t| t.at(slot) > 0) {
            return Err(Unsocial::Existing);
        }
        Ok(())
    }
}

/// What the preferences of a pod, and of those that are there, add up to at each place.
pub struct Liking(Vec<Tally>);

/// What it counts that a pod that is there requires the new one's company (upstream's `hardPodAffinityWeight`).
const REQUIRED: i64 = 1;

impl Liking {
    /// Adds up.
    pub fn of(pod: &PodInfo, snapshot: &Snapshot) -> Liking {
        let mut tallies = Vec::new();
        for (weight, term) in &pod.preferred {
            for class in snapshot.classes(term.within()).filter(|c| term.picks(&c.example, &snapshot.namespaces)) {
                let tally = tally(&mut tallies, &term.topology_key, snapshot);
                class.on.iter().for_each(|(slot, here)| tally.add(*slot, weight * here.all));
            }
        }
        for class in snapshot.sociable() {
            let other = &class.example;
            let required = other.affinity.iter().map(|t| (REQUIRED, t));
            for (weight, term) in other.preferred.iter().map(|(w, t)| (*w, t)).chain(required) {
                if term.picks(pod, &snapshot.namespaces) {
                    let tally = tally(&mut tallies, &term.topology_key, snapshot);
                    class.on.iter().for_each(|(slot, here)| tally.add(*slot, weight * here.all));
                }
            }
        }
        Liking(tallies)
    }

    /// Whether there is anything to compare.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The sum at a node.
    pub fn at(&self, slot: usize) -> i64 {
        self.0.iter().map(|t| t.at(slot)).sum()
    }
}
