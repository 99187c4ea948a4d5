//! From policies, namespaces and pods to rules for the pods of one node. Pure.
//!
//! A pod that a policy is about is isolated in that direction: its address leads to a chain that jumps to those of its
//! policies and drops what none of them lets pass. Pods with the same policies share the chain, policies with the same
//! peers share the set of addresses, so that a pod that comes or goes is an element that comes or goes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

use super::{
    facts::{Key, Labels, Peer, PodFacts, Policy, Ports, Protocol, Rule, Selector},
    rules::{EGRESS, INGRESS, ITSELF, Ruleset},
};
use crate::proxy::family::Family;

/// What is known of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The policies.
    pub policies: BTreeMap<Key, Policy>,
    /// The labels of the namespaces.
    pub namespaces: BTreeMap<String, Labels>,
    /// The pods.
    pub pods: BTreeMap<Key, PodFacts>,
}

/// Seen from a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    const ALL: [Direction; 2] = [Direction::Ingress, Direction::Egress];

    fn rules(self, policy: &Policy) -> Option<&Vec<Rule>> {
        match self {
            Direction::Ingress => policy.ingress.as_ref(),
            Direction::Egress => policy.egress.as_ref(),
        }
    }

    /// Maps, what chains are called, and where the peer's address stands.
    const fn words(self) -> ([&'static str; 2], &'static str, &'static str) {
        match self {
            Direction::Ingress => (INGRESS, "in", "saddr"),
            Direction::Egress => (EGRESS, "out", "daddr"),
        }
    }
}

/// A name for something, as short as nftables wants it. Whoever writes policies must not be able to find two things with
/// one name.
fn hash(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(10).map(|byte| format!("{byte:02x}")).collect()
}

/// The rules for the pods of node `me`.
pub fn plan(state: &State, me: &str) -> Ruleset {
    let mut plan = Plan { state, rules: Ruleset::default(), members: BTreeSet::new() };
    for ((namespace, _), pod) in state.pods.iter().filter(|(_, pod)| pod.node == me && !pod.ips.is_empty()) {
        for direction in Direction::ALL {
            let of_namespace = state.policies.range((namespace.clone(), String::new())..);
            let of_namespace = of_namespace.take_while(|((ns, _), _)| ns == namespace);
            let about: Vec<(&Key, &Policy)> = of_namespace
                .filter(|(_, policy)| direction.rules(policy).is_some() && policy.pods.matches(&pod.labels))
                .collect();
            if !about.is_empty() {
                plan.isolate(direction, &about, &pod.ips);
            }
        }
    }
    plan.rules
}

struct Plan<'a> {
    state: &'a State,
    rules: Ruleset,
    /// The sets that were filled, by their names.
    members: BTreeSet<String>,
}

impl Plan<'_> {
    fn isolate(&mut self, direction: Direction, about: &[(&Key, &Policy)], ips: &[IpAddr]) {
        let (maps, prefix, _) = direction.words();
        let names: Vec<&str> = about.iter().flat_map(|((ns, name), _)| [ns.as_str(), name.as_str()]).collect();
        let chain = format!("pods_{prefix}_{}", hash(&names));
        if !self.rules.chains.contains_key(&chain) {
            let mut body = Vec::new();
            for (key, policy) in about {
                let of_policy = format!("{prefix}_{}", hash(&[&key.0, &key.1]));
                if !self.rules.chains.contains_key(&of_policy) {
                    let rules = direction.rules(policy).into_iter().flatten();
                    let mut lines: Vec<String> = Vec::new();
                    for rule in rules {
                        for line in self.lines(direction, &key.0, rule) {
                            if !lines.contains(&line) {
                                lines.push(line);
                            }
                        }
                    }
                    self.rules.chains.insert(of_policy.clone(), lines);
                }
                body.push(format!("jump {of_policy}"));
            }
            body.push("drop".into());
            self.rules.chains.insert(chain.clone(), body);
        }
        for ip in ips {
            let family = Family::of(*ip);
            self.rules.verdicts.insert((family.pick(maps), ip.to_string()), chain.clone());
            self.rules.elements.insert((family.pick(ITSELF).to_owned(), format!("{ip} . {ip}")));
        }
    }

    /// One rule of a policy: peers times ports.
    fn lines(&mut self, direction: Direction, namespace: &str, rule: &Rule) -> Vec<String> {
        let ports = match &rule.ports {
            None => vec![(None, String::new())],
            Some(ports) => self.ports(ports),
        };
        let peers = match &rule.peers {
            None => vec![(None, String::new())],
            Some(peers) => peers.iter().flat_map(|peer| self.peer(direction, namespace, peer)).collect(),
        };
        let mut lines = Vec::new();
        for (family, peer) in &peers {
            for (other, port) in &ports {
                // Of two families there is no packet.
                if family.zip(*other).is_none_or(|(a, b)| a == b) {
                    let words = [peer.as_str(), port.as_str(), "accept"];
                    lines.push(words.into_iter().filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" "));
                }
            }
        }
        lines
    }

    fn peer(&mut self, direction: Direction, namespace: &str, peer: &Peer) -> Vec<(Option<Family>, String)> {
        let (_, _, end) = direction.words();
        match peer {
            Peer::Block { net, except } => block(*net, except, end).into_iter().collect(),
            Peer::Pods { namespaces, pods } => {
                let within = namespaces.as_ref().map_or(["one", namespace], |s| ["some", &s.text]);
                let text = pods.as_ref().map_or("", |s| &s.text);
                let name = hash(&[within[0], within[1], text]);
                self.members_of(&name, namespace, namespaces.as_ref(), pods.as_ref());
                let of = |family: Family| format!("{} {end} @pods{}_{name}", family.ip(), family.suffix());
                Family::ALL.into_iter().map(|family| (Some(family), of(family))).collect()
            }
        }
    }

    /// The sets of the addresses of all pods that are meant.
    fn members_of(&mut self, name: &str, namespace: &str, namespaces: Option<&Selector>, pods: Option<&Selector>) {
        if !self.members.insert(name.to_owned()) {
            return;
        }
        for family in Family::ALL {
            self.rules.sets.insert(format!("pods{}_{name}", family.suffix()), family.address_type());
        }
        let meant: BTreeSet<&str> = match namespaces {
            None => [namespace].into(),
            Some(selector) => {
                let all = self.state.namespaces.iter();
                all.filter(|(_, labels)| selector.matches(labels)).map(|(name, _)| name.as_str()).collect()
            }
        };
        let here = |key: &Key| meant.contains(key.0.as_str());
        let found = self.state.pods.iter().filter(|(key, _)| here(key));
        let found = found.filter(|(_, pod)| pods.is_none_or(|selector| selector.matches(&pod.labels)));
        let ips = found.flat_map(|(_, pod)| &pod.ips);
        let element = |ip: &IpAddr| (format!("pods{}_{name}", Family::of(*ip).suffix()), ip.to_string());
        self.rules.elements.extend(ips.map(element));
    }

    /// What matches some of these ports.
    fn ports(&mut self, ports: &[Ports]) -> Vec<(Option<Family>, String)> {
        let mut numbers: BTreeMap<Protocol, Vec<(u16, u16)>> = BTreeMap::new();
        let mut names = BTreeSet::new();
        for port in ports {
            match port {
                Ports::All(protocol) => numbers.entry(*protocol).or_default().push((0, u16::MAX)),
                Ports::Range(protocol, first, last) => numbers.entry(*protocol).or_default().push((*first, *last)),
                Ports::Named(protocol, name) => drop(names.insert((*protocol, name.as_str()))),
            }
        }
        let mut out = Vec::new();
        for (protocol, ranges) in numbers {
            let protocol = protocol.name();
            let text = match &merged(ranges)[..] {
                [(0, u16::MAX)] => format!("meta l4proto {protocol}"),
                ranges => {
                    let one = |(first, last): &(u16, u16)| match first == last {
                        true => first.to_string(),
                        false => format!("{first}-{last}"),
                    };
                    format!("{protocol} dport {{ {} }}", ranges.iter().map(one).collect::<Vec<_>>().join(", "))
                }
            };
            out.push((None, text));
        }
        for (protocol, name) in names {
            let set = self.named(protocol, name);
            for family in Family::ALL {
                let (ip, suffix) = (family.ip(), family.suffix());
                let text = format!("{ip} daddr . meta l4proto . th dport @named{suffix}_{set}");
                out.push((Some(family), text));
            }
        }
        out
    }

    /// The sets of all pods' ports of a name: in either direction it is the pod that is spoken to whose number counts.
    fn named(&mut self, protocol: Protocol, name: &str) -> String {
        let id = hash(&["port", protocol.name(), name]);
        if !self.members.insert(id.clone()) {
            return id;
        }
        for family in Family::ALL {
            let ty = family.pick(["ipv4_addr . inet_proto . inet_service", "ipv6_addr . inet_proto . inet_service"]);
            self.rules.sets.insert(format!("named{}_{id}", family.suffix()), ty);
        }
        for pod in self.state.pods.values() {
            for (_, _, number) in pod.ports.iter().filter(|(n, p, _)| n == name && *p == protocol) {
                for ip in &pod.ips {
                    let set = format!("named{}_{id}", Family::of(*ip).suffix());
                    self.rules.elements.insert((set, format!("{ip} . {} . {number}", protocol.name())));
                }
            }
        }
        id
    }
}

/// Ranges of ports that neither overlap nor touch, as nftables wants them.
fn merged(mut ranges: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    ranges.sort_unstable();
    let mut out: Vec<(u16, u16)> = Vec::new();
    for (first, last) in ranges {
        match out.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => out.push((first, last)),
        }
    }
    out
}

/// What matches a range of addresses; `None` if nothing is left of it.
fn block(net: IpNet, except: &[IpNet], end: &str) -> Option<(Option<Family>, String)> {
    let family = Family::of(net.addr());
    let ip = family.ip();
    let except: Vec<IpNet> = except.iter().copied().filter(|e| Family::of(e.addr()) == family).collect();
    let except = IpNet::aggregate(&except);
    if except.iter().any(|e| e.contains(&net)) {
        return None;
    }
    let mut words = match net.prefix_len() {
        0 => vec![format!("meta nfproto {}", family.pick(["ipv4", "ipv6"]))],
        _ => vec![format!("{ip} {end} {net}")],
    };
    if !except.is_empty() {
        let list: Vec<String> = except.iter().map(ToString::to_string).collect();
        words.push(format!("{ip} {end} != {{ {} }}", list.join(", ")));
    }
    Some((Some(family), words.join(" ")))
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
