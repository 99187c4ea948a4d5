//! Topology spread (<https://kubernetes.io/docs/concepts/scheduling-eviction/topology-spread-constraints/>).

use std::collections::HashMap;

use crate::{
    affinity::{node_matches, untolerated},
    pod::{PodInfo, Spread},
    snapshot::{NodeFacts, Snapshot},
};

/// How many matching pods there are at each place, for each constraint of a pod.
pub struct Counts<'a> {
    constraints: Vec<(&'a Spread, HashMap<&'a str, i64>)>,
}

/// Why a node breaks a constraint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uneven {
    /// The node has no such label.
    MissingLabel,
    /// There would be too many.
    Skew,
}

impl<'a> Counts<'a> {
    /// Counts for the constraints that are required, or for those that are not.
    pub fn of(pod: &'a PodInfo, snapshot: &'a Snapshot, required: bool) -> Counts<'a> {
        let chosen: Vec<&Spread> = pod.spread.iter().filter(|s| s.required == required).collect();
        let count = |spread: &&'a Spread| {
            let mut places: HashMap<&str, i64> = HashMap::new();
            for node in snapshot.known() {
                let eligible = chosen.iter().all(|s| node.facts.labels.contains_key(&s.topology_key))
                    && (!spread.honor_affinity || node_matches(pod, &node.facts))
                    && (!spread.honor_taints || untolerated(pod, &node.facts, &["NoSchedule", "NoExecute"]).is_none());
                let Some(place) = node.facts.labels.get(&spread.topology_key).filter(|_| eligible) else { continue };
                let here = node.pods.values().filter(|other| {
                    other.namespace == pod.namespace
                        && !other.deleting
                        && spread.selector.matches(|k| other.labels.get(k).map(String::as_str))
                });
                *places.entry(place).or_default() += here.count() as i64;
            }
            (*spread, places)
        };
        Counts { constraints: chosen.iter().map(count).collect() }
    }

    /// Whether the pod can be at a node.
    pub fn check(&self, pod: &PodInfo, node: &NodeFacts) -> Result<(), Uneven> {
        for (spread, places) in &self.constraints {
            let Some(place) = node.labels.get(&spread.topology_key) else { return Err(Uneven::MissingLabel) };
            let least = match (places.len() as i64) < spread.min_domains {
                true => 0,
                false => places.values().min().copied().unwrap_or_default(),
            };
            let counts_itself = spread.selector.matches(|k| pod.labels.get(k).map(String::as_str));
            let here = places.get(place.as_str()).copied().unwrap_or_default() + i64::from(counts_itself);
            if here - least > spread.max_skew {
                return Err(Uneven::Skew);
            }
        }
        Ok(())
    }

    /// How crowded a node's places are; less is better.
    pub fn crowd(&self, node: &NodeFacts) -> i64 {
        let at = |(spread, places): &(&Spread, HashMap<&str, i64>)| {
            let place = node.labels.get(&spread.topology_key);
            // Many places make each pod count for less, as upstream weighs them.
            let weight = ((places.len() + 2) as f64).ln();
            place.and_then(|p| places.get(p.as_str())).map_or(0, |n| (*n as f64 * weight * 100.0) as i64)
        };
        self.constraints.iter().map(at).sum()
    }

    /// Whether there is nothing to count.
    pub fn is_empty(&self) -> bool {
        self.constraints.is_empty()
    }
}
