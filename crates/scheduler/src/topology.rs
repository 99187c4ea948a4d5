//! Places: nodes with the same value of a label are one. Looked up once for all nodes, then only counted.

use std::{collections::HashMap, sync::Arc};

use crate::snapshot::NodeInfo;

const NOWHERE: u32 = u32::MAX;

/// The places that a label makes of the nodes.
#[derive(Debug)]
pub struct Topology {
    /// The label.
    pub key: String,
    /// How many places there are.
    pub places: usize,
    /// The place of each node, by its slot.
    of: Vec<u32>,
}

impl Topology {
    /// Looks the label up at every node.
    pub fn new(key: &str, slots: &[NodeInfo]) -> Topology {
        let mut numbers: HashMap<&str, u32> = HashMap::new();
        let mut of = vec![NOWHERE; slots.len()];
        for node in slots.iter().filter(|n| n.known) {
            if let Some(value) = node.facts.labels.get(key) {
                let next = numbers.len() as u32;
                of[node.slot] = *numbers.entry(value).or_insert(next);
            }
        }
        Topology { key: key.to_owned(), places: numbers.len(), of }
    }

    /// The place of a node; `None` if it has no such label.
    pub fn at(&self, slot: usize) -> Option<usize> {
        self.of.get(slot).copied().filter(|place| *place != NOWHERE).map(|place| place as usize)
    }
}

/// A number for each place.
#[derive(Clone, Debug)]
pub struct Tally {
    /// The places.
    pub topology: Arc<Topology>,
    /// The numbers, by place.
    pub counts: Vec<i64>,
    nonzero: usize,
}

impl Tally {
    /// Zero everywhere.
    pub fn new(topology: Arc<Topology>) -> Tally {
        Tally { counts: vec![0; topology.places], topology, nonzero: 0 }
    }

    /// Adds at the place of a node.
    pub fn add(&mut self, slot: usize, amount: i64) {
        let Some(place) = self.topology.at(slot) else { return };
        let count = &mut self.counts[place];
        self.nonzero -= usize::from(*count != 0);
        *count += amount;
        self.nonzero += usize::from(*count != 0);
    }

    /// The number at the place of a node.
    pub fn at(&self, slot: usize) -> i64 {
        self.topology.at(slot).map_or(0, |place| self.counts[place])
    }

    /// Whether it is zero everywhere.
    pub fn is_zero(&self) -> bool {
        self.nonzero == 0
    }
}
