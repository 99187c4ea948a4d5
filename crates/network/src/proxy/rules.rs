//! A table of nftables as a value, and the script that turns one into another.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use super::{family::Family, stale::Reach};

/// Our table.
pub const TABLE: &str = "inet seawall";

/// By address, protocol and port: where new connections to Services go.
pub const SERVICES: [&str; 2] = ["services4", "services6"];
/// The same by protocol and port of any node.
pub const NODE_PORTS: [&str; 2] = ["nodeports4", "nodeports6"];
/// Services that refuse.
pub const DEAD_SERVICES: [&str; 2] = ["dead_services4", "dead_services6"];
/// Node ports that refuse.
pub const DEAD_NODE_PORTS: [&str; 2] = ["dead_nodeports4", "dead_nodeports6"];
/// All pods, on whatever node.
pub const PODS: [&str; 2] = ["pods4", "pods6"];
/// Pods of dead machines.
pub const DEAD_PODS: [&str; 2] = ["dead_pods4", "dead_pods6"];
/// Ports of dead machines.
pub const DEAD_PORTS: [&str; 2] = ["dead_ports4", "dead_ports6"];
/// By address and port: what the relay takes.
pub const RELAYED: [&str; 2] = ["relayed4", "relayed6"];
/// The same by port of any node.
pub const RELAYED_PORTS: [&str; 2] = ["relayed_ports4", "relayed_ports6"];

/// The maps from addresses and ports to chains: name and key type.
pub const MAPS: [(&str, &str); 8] = [
    (SERVICES[0], "ipv4_addr . inet_proto . inet_service : verdict"),
    (SERVICES[1], "ipv6_addr . inet_proto . inet_service : verdict"),
    (NODE_PORTS[0], "inet_proto . inet_service : verdict"),
    (NODE_PORTS[1], "inet_proto . inet_service : verdict"),
    (DEAD_SERVICES[0], "ipv4_addr . inet_proto . inet_service : verdict"),
    (DEAD_SERVICES[1], "ipv6_addr . inet_proto . inet_service : verdict"),
    (DEAD_NODE_PORTS[0], "inet_proto . inet_service : verdict"),
    (DEAD_NODE_PORTS[1], "inet_proto . inet_service : verdict"),
];

/// The sets of addresses and ports: name and type.
pub const SETS: [(&str, &str); 10] = [
    (PODS[0], "type ipv4_addr; flags interval;"),
    (PODS[1], "type ipv6_addr; flags interval;"),
    (DEAD_PODS[0], "type ipv4_addr; flags interval;"),
    (DEAD_PODS[1], "type ipv6_addr; flags interval;"),
    (DEAD_PORTS[0], "type ipv4_addr . inet_service;"),
    (DEAD_PORTS[1], "type ipv6_addr . inet_service;"),
    (RELAYED[0], "type ipv4_addr . inet_service;"),
    (RELAYED[1], "type ipv6_addr . inet_service;"),
    (RELAYED_PORTS[0], "type inet_service;"),
    (RELAYED_PORTS[1], "type inet_service;"),
];

/// What does not depend on any Service; [`base`] writes it. A line with `$` is meant for each family. The mark 0x4000 says that the source address is to be replaced;
/// [`super::rouse::MARK`] that a packet is to pass as it is; [`crate::relay::kernel::MARK`] that the relay has it.
///
/// What is open to a dead machine is reset in the way of whoever sends next, be it a pod (forward) or a process of this
/// machine (output). Another table that lets established flows pass does not change that: every hook has its say.
const BASE: &str = "\
chain raw_output {
    type filter hook output priority raw; policy accept;
    meta mark 0x53570001 notrack
}
chain reset_dead {
    $ip daddr @dead_pods$n reject with tcp reset
    $ip daddr . tcp dport @dead_ports$n reject with tcp reset
}
chain mark_masquerade {
    meta mark set meta mark | 0x4000
}
chain refuse {
    meta l4proto tcp reject with tcp reset
    reject with icmpx port-unreachable
}
chain dispatch {
    meta mark & 0x2000 != 0 return
    $ip daddr . meta l4proto . th dport vmap @services$n
    $own meta l4proto . th dport vmap @nodeports$n
}
chain refuse_dead {
    $ip daddr . meta l4proto . th dport vmap @dead_services$n
    $own meta l4proto . th dport vmap @dead_nodeports$n
}
chain nat_prerouting {
    type nat hook prerouting priority dstnat; policy accept;
    jump dispatch
}
chain nat_output {
    type nat hook output priority -100; policy accept;
    jump dispatch
}
chain nat_postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    meta mark & 0x4000 == 0 return
    meta mark set meta mark ^ 0x4000
    masquerade fully-random
}
chain filter_input {
    type filter hook input priority filter; policy accept;
    ct state new jump refuse_dead
}
chain filter_forward {
    type filter hook forward priority filter; policy accept;
    meta l4proto tcp jump reset_dead
    ct state new jump refuse_dead
}
chain filter_output {
    type filter hook output priority filter; policy accept;
    meta l4proto tcp jump reset_dead
    ct state new jump refuse_dead
}
";

/// What does not depend on any Service, for both families.
fn base() -> String {
    let mut out = String::new();
    for line in BASE.lines() {
        for family in Family::ALL.iter().take(if line.contains('$') { 2 } else { 1 }) {
            let line = line.replace("$ip", family.ip()).replace("$own", family.own()).replace("$n", family.suffix());
            out.push_str(&line);
            out.push('\n');
        }
    }
    out
}

/// A set of the clients of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// Of their addresses.
    pub family: Family,
    /// How long an address stays, in seconds.
    pub seconds: u32,
}

/// What the table holds besides the base.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Chains by name, with their rules.
    pub chains: BTreeMap<String, Vec<String>>,
    /// Where the kernel starts those that it starts itself.
    pub hooks: BTreeMap<String, &'static str>,
    /// Elements of maps: map and key, with the verdict.
    pub elements: BTreeMap<(&'static str, String), String>,
    /// Elements of sets: set and element.
    pub sets: BTreeSet<(&'static str, String)>,
    /// Sets of client addresses by name.
    pub affinities: BTreeMap<String, Affinity>,
    /// Where flows may be that have no end of their own, or have yet to begin.
    pub reach: BTreeSet<Reach>,
}

/// How much there is of a table: chains with how many rules each has, maps and sets with how many elements. Enough to tell
/// that somebody took something away (or put something in), without comparing how the kernel words it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outline {
    chains: BTreeMap<String, usize>,
    maps: BTreeMap<String, usize>,
    /// Without a number where the kernel adds elements itself.
    sets: BTreeMap<String, Option<usize>>,
}

impl Outline {
    /// Of what `nft -j list table` says.
    ///
    /// # Errors
    /// If that is not understood.
    pub fn listed(json: &[u8]) -> Result<Outline, serde_json::Error> {
        #[derive(serde::Deserialize)]
        struct Listing {
            nftables: Vec<serde_json::Value>,
        }
        let mut outline = Outline::default();
        let listing: Listing = serde_json::from_slice(json)?;
        for object in &listing.nftables {
            let name = |kind: &str, field: &str| object[kind][field].as_str().map(str::to_owned);
            if let Some(chain) = name("chain", "name") {
                outline.chains.entry(chain).or_default();
            } else if let Some(chain) = name("rule", "chain") {
                *outline.chains.entry(chain).or_default() += 1;
            } else if let Some(map) = name("map", "name") {
                outline.maps.insert(map, object["map"]["elem"].as_array().map_or(0, Vec::len));
            } else if let Some(set) = name("set", "name") {
                let fixed = SETS.iter().any(|(name, _)| *name == set);
                let count = fixed.then(|| object["set"]["elem"].as_array().map_or(0, Vec::len));
                outline.sets.insert(set, count);
            }
        }
        Ok(outline)
    }
}

impl Ruleset {
    /// Adds a chain that the kernel starts itself.
    pub fn base_chain(&mut self, name: &str, hook: &'static str, rules: Vec<String>) {
        self.hooks.insert(name.to_owned(), hook);
        self.chains.insert(name.to_owned(), rules);
    }

    /// What the kernel holds if it holds this.
    pub fn outline(&self) -> Outline {
        let mut outline = Outline::default();
        let mut chain = String::new();
        for line in base().lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("chain ") {
                chain = name.trim_end_matches(" {").to_owned();
                outline.chains.insert(chain.clone(), 0);
            } else if line != "}" && !line.starts_with("type ") {
                *outline.chains.entry(chain.clone()).or_default() += 1;
            }
        }
        outline.chains.extend(self.chains.iter().map(|(name, rules)| (name.clone(), rules.len())));
        outline.maps.extend(MAPS.iter().map(|(map, _)| ((*map).to_owned(), 0)));
        for (map, _) in self.elements.keys() {
            *outline.maps.entry((*map).to_owned()).or_default() += 1;
        }
        outline.sets.extend(self.affinities.keys().map(|set| (set.clone(), None)));
        for (set, _) in SETS {
            outline.sets.insert(set.to_owned(), Some(self.sets.iter().filter(|(s, _)| *s == set).count()));
        }
        outline
    }

    /// The script that brings the kernel from `old` to this, as one transaction. Without `old` the table is made anew,
    /// whatever the kernel holds; the old one serves until the moment of the change.
    pub fn script(&self, old: Option<&Ruleset>) -> String {
        let mut out = String::new();
        let empty = Ruleset::default();
        let old = match old {
            Some(old) => old,
            None => {
                let _ = writeln!(out, "add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{");
                for (map, ty) in MAPS {
                    let _ = writeln!(out, "map {map} {{ type {ty}; }}");
                }
                for (set, ty) in SETS {
                    let _ = writeln!(out, "set {set} {{ {ty} }}");
                }
                let _ = writeln!(out, "{}}}", base());
                &empty
            }
        };
        // Sets, then chains, then rules, then elements: each refers only to what stands before.
        for (set, affinity) in &self.affinities {
            if old.affinities.get(set) != Some(affinity) {
                let Affinity { family, seconds } = affinity;
                let ty = family.address_type();
                let _ =
                    writeln!(out, "add set {TABLE} {set} {{ type {ty}; flags dynamic,timeout; timeout {seconds}s; }}");
            }
        }
        for chain in self.chains.keys().filter(|c| !old.chains.contains_key(*c)) {
            let _ = match self.hooks.get(chain) {
                Some(hook) => writeln!(out, "add chain {TABLE} {chain} {{ {hook} }}"),
                None => writeln!(out, "add chain {TABLE} {chain}"),
            };
        }
        for (chain, rules) in self.chains.iter().filter(|(chain, rules)| old.chains.get(*chain) != Some(rules)) {
            if old.chains.contains_key(chain) {
                let _ = writeln!(out, "flush chain {TABLE} {chain}");
            }
            for rule in rules {
                let _ = writeln!(out, "add rule {TABLE} {chain} {rule}");
            }
        }
        for ((map, key), verdict) in &old.elements {
            if self.elements.get(&(*map, key.clone())) != Some(verdict) {
                let _ = writeln!(out, "delete element {TABLE} {map} {{ {key} }}");
            }
        }
        for ((map, key), verdict) in &self.elements {
            if old.elements.get(&(*map, key.clone())) != Some(verdict) {
                let _ = writeln!(out, "add element {TABLE} {map} {{ {key} : {verdict} }}");
            }
        }
        for (set, key) in old.sets.difference(&self.sets) {
            let _ = writeln!(out, "delete element {TABLE} {set} {{ {key} }}");
        }
        for (set, key) in self.sets.difference(&old.sets) {
            let _ = writeln!(out, "add element {TABLE} {set} {{ {key} }}");
        }
        let gone: Vec<&String> = old.chains.keys().filter(|c| !self.chains.contains_key(*c)).collect();
        for chain in &gone {
            let _ = writeln!(out, "flush chain {TABLE} {chain}");
        }
        for chain in &gone {
            let _ = writeln!(out, "delete chain {TABLE} {chain}");
        }
        for set in old.affinities.keys().filter(|s| !self.affinities.contains_key(*s)) {
            let _ = writeln!(out, "delete set {TABLE} {set}");
        }
        out
    }
}
