//! Topology spread (<https://kubernetes.io/docs/concepts/scheduling-eviction/topology-spread-constraints/>).

use std::{collections::HashSet, sync::Arc};

use crate::{
    affinity::{node_matches, untolerated},
    pod::{PodInfo, Spread},
    snapshot::{NodeInfo, Snapshot},
    topology::{Tally, Topology},
};

/// The label of a node's name: each node is a place of its own.
const HOSTNAME: &str = "kubernetes.io/hostname";
/// The label of a node's zone.
const ZONE: &str = "topology.kubernetes.io/zone";

/// How many matching pods there are at each place, for each constraint of a pod.
#[derive(Clone)]
pub struct Counts {
    constraints: Vec<Constraint>,
    /// A node that lacks one of the labels is left out of all of the counts.
    complete: bool,
}

#[derive(Clone)]
struct Constraint {
    spread: Spread,
    tally: Tally,
    /// The pod itself is one of those that are counted.
    own: bool,
    /// The nodes that count, by slot.
    counts: Arc<[bool]>,
    /// The places that have a node that counts.
    places: Arc<[bool]>,
    domains: i64,
    least: i64,
}

/// Why a node breaks a constraint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uneven {
    /// The node has no such label.
    MissingLabel,
    /// There would be too many.
    Skew,
}

impl Constraint {
    fn new(pod: &PodInfo, snapshot: &Snapshot, spread: &Spread, needed: &[Arc<Topology>]) -> Constraint {
        let topology = snapshot.topology(&spread.topology_key);
        let choosy = spread.honor_affinity && (!pod.node_selector.is_empty() || pod.node_terms.is_some());
        let (mut counts, mut places) = (vec![false; snapshot.slots()], vec![false; topology.places]);
        for slot in snapshot.order().iter().copied() {
            let Some(place) = topology.at(slot) else { continue };
            let facts = &snapshot.at(slot).facts;
            let eligible = needed.iter().all(|t| t.at(slot).is_some())
                && (!choosy || node_matches(pod, facts))
                && (!spread.honor_taints || untolerated(pod, facts, &["NoSchedule", "NoExecute"]).is_none());
            counts[slot] = eligible;
            places[place] |= eligible;
        }
        let own = pod.is_picked(&spread.selector);
        let domains = places.iter().filter(|p| **p).count() as i64;
        let tally = Tally::new(topology);
        let (counts, places) = (counts.into(), places.into());
        let mut new = Constraint { spread: spread.clone(), tally, own, counts, places, domains, least: 0 };
        // An empty selector counts nothing, as upstream has it.
        if !spread.selector.is_empty() {
            let namespace = std::slice::from_ref(&pod.namespace);
            for class in snapshot.classes(Some(namespace)).filter(|c| c.example.is_picked(&spread.selector)) {
                for (slot, here) in &class.on {
                    if here.living > 0 && new.is_counted(*slot) {
                        new.tally.add(*slot, here.living);
                    }
                }
            }
        }
        new.find_least();
        new
    }

    fn is_counted(&self, slot: usize) -> bool {
        self.counts.get(slot).copied().unwrap_or(false)
    }

    fn find_least(&mut self) {
        let counts = self.tally.counts.iter().zip(self.places.iter()).filter(|(_, counts)| **counts);
        // As if there were an empty place as long as there are too few of them.
        let fewer = self.domains < self.spread.min_domains;
        self.least = if fewer { 0 } else { counts.map(|(n, _)| *n).min().unwrap_or_default() };
    }
}

impl Counts {
    /// Counts for the constraints that a node must keep.
    pub fn required(pod: &PodInfo, snapshot: &Snapshot) -> Counts {
        let chosen: Vec<&Spread> = pod.spread.iter().filter(|s| s.required).collect();
        Counts::of(pod, snapshot, &chosen, true)
    }

    /// Counts for those that a node should keep. A pod without any is spread over nodes and zones with others of its
    /// Services and its controller (upstream's default constraints).
    pub fn wished(pod: &PodInfo, snapshot: &Snapshot) -> Counts {
        if pod.spread.is_empty() {
            let selector = snapshot.company_selector(pod);
            if selector.is_empty() {
                return Counts { constraints: Vec::new(), complete: false };
            }
            let default = |key: &str, max_skew| Spread {
                max_skew,
                topology_key: key.into(),
                selector: selector.clone(),
                required: false,
                min_domains: 1,
                honor_affinity: true,
                honor_taints: false,
            };
            let (nodes, zones) = (default(HOSTNAME, 3), default(ZONE, 5));
            return Counts::of(pod, snapshot, &[&nodes, &zones], false);
        }
        let chosen: Vec<&Spread> = pod.spread.iter().filter(|s| !s.required).collect();
        Counts::of(pod, snapshot, &chosen, true)
    }

    fn of(pod: &PodInfo, snapshot: &Snapshot, chosen: &[&Spread], complete: bool) -> Counts {
        let all: Vec<Arc<Topology>> = chosen.iter().map(|s| snapshot.topology(&s.topology_key)).collect();
        let needed = if complete { all.as_slice() } else { &[] };
        Counts { constraints: chosen.iter().map(|s| Constraint::new(pod, snapshot, s, needed)).collect(), complete }
    }

    /// Supposes that another pod came to a node (1) or left it (-1).
    pub fn adjust(&mut self, pod: &PodInfo, other: &PodInfo, slot: usize, by: i64) {
        for constraint in &mut self.constraints {
            let selector = &constraint.spread.selector;
            let meant = other.namespace == pod.namespace
                && !other.deleting
                && !selector.is_empty()
                && other.is_picked(selector);
            if meant && constraint.is_counted(slot) {
                constraint.tally.add(slot, by);
                constraint.find_least();
            }
        }
    }

    /// Whether the pod can be at a node.
    pub fn check(&self, slot: usize) -> Result<(), Uneven> {
        for constraint in &self.constraints {
            if constraint.tally.topology.at(slot).is_none() {
                return Err(Uneven::MissingLabel);
            }
            let here = constraint.tally.at(slot) + i64::from(constraint.own);
            if here - constraint.least > constraint.spread.max_skew {
                return Err(Uneven::Skew);
            }
        }
        Ok(())
    }

    /// How good each of `nodes` is, from 0 to 100; `None` if there is nothing to count.
    pub fn scores(&self, nodes: &[&NodeInfo]) -> Option<Vec<i64>> {
        if self.constraints.is_empty() {
            return None;
        }
        let lacking =
            |slot: usize| self.complete && self.constraints.iter().any(|c| c.tally.topology.at(slot).is_none());
        let places = |constraint: &Constraint| {
            let at = |n: &&NodeInfo| constraint.tally.topology.at(n.slot).filter(|_| !lacking(n.slot));
            nodes.iter().filter_map(at).collect::<HashSet<_>>().len()
        };
        // A pod among many places counts for less: the logarithm keeps constraints comparable.
        let weights: Vec<f64> = self.constraints.iter().map(|c| ((places(c) + 2) as f64).ln()).collect();
        let raw = |node: &&NodeInfo| {
            let of = |(c, weight): (&Constraint, &f64)| match c.tally.topology.at(node.slot) {
                Some(place) => c.tally.counts[place] as f64 * weight + (c.spread.max_skew - 1) as f64,
                None => 0.0,
            };
            let sum: f64 = self.constraints.iter().zip(&weights).map(of).sum();
            (!lacking(node.slot)).then_some(sum.round() as i64)
        };
        let raw: Vec<Option<i64>> = nodes.iter().map(raw).collect();
        let (least, most) = (raw.iter().flatten().min().copied()?, raw.iter().flatten().max().copied()?);
        let scaled = |score: Option<i64>| match score {
            None => 0,
            Some(_) if most == 0 => 100,
            Some(score) => 100 * (most + least - score) / most,
        };
        Some(raw.into_iter().map(scaled).collect())
    }
}
