//! Which nodes are well, decided purely: signs of life, evidence and time go in, what to do about nodes comes out.
//!
//! When a node was last heard of is remembered by our own clock: what it writes into its objects is only compared with
//! what was there before. Whoever leads anew begins to count anew, so a change of leaders makes nobody unreachable.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{
    api::{coordination::v1::Lease, core::v1::Node},
    apimachinery::pkg::apis::meta::v1::{MicroTime, Time},
};
use tokio::time::Instant;

use super::{
    Settings,
    evidence::Evidence,
    taints::{Leave, NO_EXECUTE, NOT_READY, UNREACHABLE, condition, is_tainted},
    zones::{Zones, is_excluded, zone_of},
};
use crate::runtime::objects::{name, uid};

/// The conditions that become unknown with a node.
pub const CONDITIONS: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// Why a node is held to be unreachable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It has been silent for too long. Whether that is so, the API server itself has to be asked.
    Silence,
    /// Other machines say so.
    Evidence,
}

/// What to do about one node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodePlan {
    /// Its name.
    pub name: String,
    /// Its conditions become unknown.
    pub unknown: Option<Why>,
    /// Whether its pods have to leave.
    pub leave: Leave,
    /// Its pods are no longer ready.
    pub pods: bool,
}

/// What is remembered of a node.
#[derive(Debug)]
struct Watched {
    uid: String,
    /// When it last gave a sign of life, or was first seen.
    heard: Instant,
    /// The same, later by the time in which nobody could have been heard.
    silent: Instant,
    renewed: Option<MicroTime>,
    heartbeat: Option<Time>,
    /// Since when others hold it to be dead.
    dead: Option<Instant>,
    /// What it was when it was last looked at.
    ready: Option<bool>,
    /// Its pods have yet to be marked.
    pods: bool,
    /// Its turn to be emptied has come.
    turn: bool,
}

impl Watched {
    fn new(node: &Node, now: Instant) -> Watched {
        Watched {
            uid: uid(node).to_owned(),
            heard: now,
            silent: now,
            renewed: None,
            heartbeat: heartbeat(node).cloned(),
            dead: None,
            ready: None,
            pods: false,
            turn: false,
        }
    }

    fn alive(&mut self, now: Instant) {
        (self.heard, self.silent) = (now, now);
    }
}

fn heartbeat(node: &Node) -> Option<&Time> {
    condition(node, "Ready")?.last_heartbeat_time.as_ref()
}

/// See the module.
pub struct Lifecycle {
    settings: Settings,
    nodes: BTreeMap<String, Watched>,
    zones: Zones,
    /// When the store last answered.
    answered: Instant,
}

impl Lifecycle {
    /// Knows nobody yet.
    pub fn new(settings: Settings, now: Instant) -> Lifecycle {
        Lifecycle { settings, nodes: BTreeMap::new(), zones: Zones::default(), answered: now }
    }

    /// A node is there, or was changed.
    pub fn node(&mut self, node: &Node, now: Instant) {
        let watched = self.nodes.entry(name(node).to_owned()).or_insert_with(|| Watched::new(node, now));
        if watched.uid != uid(node) {
            *watched = Watched::new(node, now);
        }
        let beat = heartbeat(node);
        if beat != watched.heartbeat.as_ref() {
            watched.heartbeat = beat.cloned();
            watched.alive(now);
        }
    }

    /// A node is no more.
    pub fn gone(&mut self, name: &str) {
        self.nodes.remove(name);
    }

    /// A Lease is there, or was changed. Returns whether that was a sign of life.
    pub fn lease(&mut self, lease: &Lease, now: Instant) -> bool {
        let Some(renewed) = lease.spec.as_ref().and_then(|spec| spec.renew_time.clone()) else { return false };
        match self.nodes.get_mut(name(lease)) {
            Some(watched) if watched.renewed.as_ref() != Some(&renewed) => {
                watched.renewed = Some(renewed);
                watched.alive(now);
                true
            }
            _ => false,
        }
    }

    /// What other machines say of all nodes.
    pub fn evidence(&mut self, all: &BTreeMap<String, Evidence>, now: Instant) {
        for (name, watched) in &mut self.nodes {
            match all.get(name).is_some_and(Evidence::is_conclusive) {
                true => drop(watched.dead.get_or_insert(now)),
                false => watched.dead = None,
            }
        }
    }

    /// Whether the store should be asked before anybody's silence counts.
    pub fn must_ask(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.answered) >= self.settings.monitor
    }

    /// The store has answered. If it had not for a while, or we did not run, nobody's silence meanwhile counts.
    pub fn answered(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(self.answered);
        if gap > self.settings.monitor * 2 + SLACK {
            let lost = gap - self.settings.monitor;
            for watched in self.nodes.values_mut() {
                watched.silent = (watched.silent + lost).min(now);
            }
        }
        self.answered = now;
    }

    /// The pods of a node have been marked as not ready.
    pub fn pods_marked(&mut self, name: &str) {
        if let Some(watched) = self.nodes.get_mut(name) {
            watched.pods = false;
        }
    }

    /// Decides about all nodes.
    pub fn plan(&mut self, nodes: &[Arc<Node>], now: Instant) -> Vec<NodePlan> {
        let names: BTreeSet<&str> = nodes.iter().map(|node| name(&**node)).collect();
        self.nodes.retain(|name, _| names.contains(name.as_str()));
        let mut counts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        let mut plans = Vec::with_capacity(nodes.len());
        for node in nodes {
            self.node(node, now);
            let Some(watched) = self.nodes.get_mut(name(&**node)) else { continue };
            let silent = unreachable(node, watched, &self.settings, now);
            let known = CONDITIONS.iter().any(|type_| condition(node, type_).is_none_or(|c| c.status != "Unknown"));
            let ready = match condition(node, "Ready") {
                _ if silent.is_some() => Some("Unknown"),
                found => found.map(|c| c.status.as_str()),
            };
            let is_ready = ready == Some("True");
            // At first sight too: who led before us may not have come to it.
            if !is_ready && watched.ready != Some(false) && ready.is_some() {
                watched.pods = true;
            }
            if is_ready {
                (watched.pods, watched.turn) = (false, false);
            }
            watched.ready = Some(is_ready);
            let (well, not) = counts.entry(zone_of(node)).or_default();
            if !is_excluded(node) {
                *(if is_ready { well } else { not }) += 1;
            }
            let leave = match ready {
                Some("True") | None => Leave::Not,
                Some("Unknown") => Leave::Unreachable,
                Some(_) => Leave::NotReady,
            };
            plans.push(NodePlan {
                name: name(&**node).to_owned(),
                unknown: silent.filter(|_| known),
                leave,
                pods: watched.pods,
            });
        }
        self.zones.update(&counts, &self.settings, now);
        for (plan, node) in plans.iter_mut().zip(nodes) {
            plan.leave = self.turn(node, plan.leave, now);
        }
        plans
    }

    /// Whether it is this node's turn to be emptied.
    fn turn(&mut self, node: &Node, leave: Leave, now: Instant) -> Leave {
        if leave == Leave::Not || self.zones.all_gone() {
            return Leave::Not;
        }
        let Some(watched) = self.nodes.get_mut(name(node)) else { return Leave::Later };
        // One that is being emptied already goes on being so, whatever it is called.
        let begun = [NOT_READY, UNREACHABLE].iter().any(|key| is_tainted(node, key, NO_EXECUTE));
        watched.turn = watched.turn || begun || self.zones.take(&zone_of(node), now);
        if watched.turn { leave } else { Leave::Later }
    }
}

/// A look may be so much late without anything being wrong.
const SLACK: Duration = Duration::from_millis(500);

fn unreachable(node: &Node, watched: &Watched, settings: &Settings, now: Instant) -> Option<Why> {
    // Evidence is refuted by a later sign of life.
    if watched.dead.is_some_and(|since| since >= watched.heard) {
        return Some(Why::Evidence);
    }
    let grace = match condition(node, "Ready") {
        Some(_) => settings.grace,
        None => settings.startup_grace,
    };
    (now.saturating_duration_since(watched.silent) > grace).then_some(Why::Silence)
}

#[cfg(test)]
#[path = "lifecycle_tests.rs"]
mod tests;
