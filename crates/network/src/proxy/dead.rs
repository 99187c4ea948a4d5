//! What is out of reach because its machine is dead. Pure.
//!
//! Only the gossip's word that a machine is dead counts here. A pod that is ending keeps its connections until it has
//! ended, and a machine that is only suspected may be fine.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use super::{
    conntrack::Flow,
    endpoints::{Endpoints, View},
    family::Family,
    rules::{DEAD_PODS, DEAD_PORTS},
};
use crate::verdict::Verdict;

/// What cannot answer any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Pods: a machine's range, or one that lies outside of it.
    Pods(IpNet),
    /// A port of the machine itself, behind which a Service's endpoint was. The machine's other ports are not the
    /// proxy's business.
    Port(SocketAddr),
}

impl Target {
    /// Whether this flow leads there.
    pub fn is_to(&self, flow: &Flow) -> bool {
        match self {
            Target::Pods(net) => net.contains(&flow.reply.from.ip()),
            Target::Port(address) => flow.protocol == TCP && flow.reply.from == *address,
        }
    }

    /// The family of its addresses.
    pub fn family(&self) -> Family {
        match self {
            Target::Pods(net) => Family::of(net.addr()),
            Target::Port(address) => Family::of(address.ip()),
        }
    }

    /// The set of the table that it is in.
    pub fn set(&self) -> &'static str {
        self.family().pick(match self {
            Target::Pods(_) => DEAD_PODS,
            Target::Port(_) => DEAD_PORTS,
        })
    }

    /// Set and element, as the kernel shows it.
    pub fn element(&self) -> (&'static str, String) {
        let element = match self {
            Target::Pods(net) => range(net),
            Target::Port(address) => format!("{} . {}", address.ip(), address.port()),
        };
        (self.set(), element)
    }

    /// Whether this flow was begun there.
    pub fn is_from(&self, flow: &Flow) -> bool {
        matches!(self, Target::Pods(net) if net.contains(&flow.original.from.ip()))
    }
}

/// A range as the kernel shows it.
pub fn range(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

/// Those that lie in no other one, as a set of the kernel wants them.
pub fn outermost(mut nets: Vec<IpNet>) -> Vec<IpNet> {
    // What holds others stands right before them.
    nets.sort();
    let mut out: Vec<IpNet> = Vec::new();
    for net in nets {
        if !out.last().is_some_and(|last| last.contains(&net)) {
            out.push(net);
        }
    }
    out
}

const TCP: u8 = 6;

/// Everything that is out of reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dead {
    /// No range lies in another.
    pub targets: BTreeSet<Target>,
}

impl Dead {
    /// By the verdicts. `own` are this machine's addresses.
    pub fn of(view: &View<'_>, own: &[IpAddr]) -> Dead {
        let mut nets: Vec<IpNet> = Vec::new();
        let mut ports = BTreeSet::new();
        let (dead, others): (Vec<_>, Vec<_>) =
            view.state.nodes.values().partition(|m| view.verdict(&m.name) == Verdict::Dead);
        if dead.is_empty() {
            return Dead::default();
        }
        // A range that holds anything else would cut off what lives.
        let alone = |net: &IpNet| {
            let holds = |ip: &IpAddr| net.contains(ip);
            let overlaps = |other: &IpNet| net.contains(other) || other.contains(net);
            !own.iter().any(holds)
                && !view.state.nodes.values().any(|m| m.addresses.iter().any(holds))
                && !others.iter().any(|m| m.pods.iter().any(overlaps))
        };
        nets.extend(dead.iter().flat_map(|m| &m.pods).filter(|net| alone(net)));
        for served in view.services() {
            for port in served.ports() {
                let known = Endpoints::of(port, &served.slices, view);
                let tcp = port.protocol.as_deref().unwrap_or("TCP") == "TCP";
                ports.extend(known.dead_hosts().filter(|_| tcp).map(|e| Target::Port(e.address)));
                nets.extend(known.dead_pods().map(|e| IpNet::from(e.address.ip())).filter(|net| alone(net)));
            }
        }
        let mut targets: BTreeSet<Target> = outermost(nets).into_iter().map(Target::Pods).collect();
        targets.append(&mut ports);
        Dead { targets }
    }

    /// Of the sets of the table: set and element.
    pub fn elements(&self) -> impl Iterator<Item = (&'static str, String)> {
        self.targets.iter().map(Target::element)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Value, json};

    use super::*;
    use crate::proxy::state::{self, State};

    fn node(name: &str, address: &str, pods: &[&str]) -> Value {
        json!({"metadata": {"name": name}, "spec": {"podCIDRs": pods},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]}})
    }

    #[track_caller]
    fn check(nodes: &[Value], endpoints: Value, verdicts: &[(&str, Verdict)], expect: &[&str]) {
        let mut known = State::default();
        known.nodes.extend(nodes.iter().map(|n| state::machine(serde_json::from_value(n.clone()).unwrap())));
        let service = json!({"metadata": {"name": "s", "namespace": "n"},
            "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80}]}});
        known.services.extend([state::service(serde_json::from_value(service).unwrap())]);
        // What is of the other family does not count.
        for family in ["IPv4", "IPv6"] {
            let slice = json!({
                "metadata": {"name": family, "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
                "addressType": family, "ports": [{"name": "", "port": 8080}], "endpoints": endpoints});
            known.slices.extend([state::slice(serde_json::from_value(slice).unwrap())]);
        }
        let verdicts: BTreeMap<String, Verdict> = verdicts.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
        let dead = Dead::of(&View::new(&known, "me", &verdicts), &["10.9.0.1".parse().unwrap()]);
        assert_eq!(dead.elements().map(|(set, key)| format!("{set} {key}")).collect::<Vec<_>>(), expect);
    }

    #[test]
    fn what_a_dead_machine_takes_along() {
        let me = || node("me", "10.9.0.1", &["10.244.1.0/24"]);
        let a = || node("a", "10.9.0.2", &["10.244.2.0/24", "fd00:2::/64"]);
        let all = [me(), a()];
        let pods = ["dead_pods4 10.244.2.0/24", "dead_pods6 fd00:2::/64"];
        check(&all, json!([]), &[("a", Verdict::Dead)], &pods);
        check(&all, json!([]), &[("a", Verdict::Suspect)], &[]);
        check(&all, json!([]), &[("a", Verdict::Alive)], &[]);
        check(&all, json!([]), &[], &[]);
        check(&all, json!([]), &[("me", Verdict::Dead), ("unknown", Verdict::Dead)], &[]);
        // A pod in its range, one outside of it, one that is ending, one on the host's network.
        let on = |address: &str| json!({"addresses": [address], "nodeName": "a"});
        let mut ending = on("10.244.2.3");
        ending["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
        let endpoints = json!([on("10.244.2.2"), on("172.20.0.9"), ending, on("10.9.0.2")]);
        let both = [pods[0], "dead_pods4 172.20.0.9", pods[1], "dead_ports4 10.9.0.2 . 8080"];
        check(&all, endpoints.clone(), &[("a", Verdict::Dead)], &both);
        check(&all, endpoints, &[("a", Verdict::Suspect)], &[]);
        // The endpoint names no node, but its address is one's.
        let nameless = json!([{"addresses": ["10.9.0.2"]}, {"addresses": ["10.244.9.9"]}]);
        check(&all, nameless, &[("a", Verdict::Dead)], &[pods[0], pods[1], "dead_ports4 10.9.0.2 . 8080"]);
        // The same in IPv6.
        let b = node("b", "fd00:9::3", &["fd00:3::/64"]);
        let on = |address: &str| json!({"addresses": [address], "nodeName": "b"});
        let endpoints = json!([on("fd00:3::2"), on("fd00:ff::9"), on("fd00:9::3"), on("::ffff:10.244.3.2")]);
        let expect = ["dead_pods6 fd00:3::/64", "dead_pods6 fd00:ff::9", "dead_ports6 fd00:9::3 . 8080"];
        check(&[me(), a(), b], endpoints, &[("b", Verdict::Dead)], &expect);
    }

    #[test]
    fn ranges_in_others_are_left_out() {
        let check = |nets: &[&str], expect: &[&str]| {
            let found = outermost(nets.iter().map(|net| net.parse().unwrap()).collect());
            assert_eq!(found.iter().map(IpNet::to_string).collect::<Vec<_>>(), expect);
        };
        check(&[], &[]);
        check(
            &[
                "10.1.0.0/24",
                "10.0.0.0/24",
                "10.0.0.7/32",
                "10.0.0.0/16",
                "10.0.255.0/24",
                "10.0.0.0/16",
                "fd00:1::/64",
                "fd00::/16",
            ],
            &["10.0.0.0/16", "10.1.0.0/24", "fd00::/16"],
        );
        check(&["::/0", "0.0.0.0/32", "::/128"], &["0.0.0.0/32", "::/0"]);
    }

    #[test]
    fn what_lives_is_never_cut_off() {
        let me = || node("me", "10.9.0.1", &["10.244.1.0/24"]);
        let dead = [("a", Verdict::Dead)];
        // Its range would hold ours, another's, or a machine.
        check(&[me(), node("a", "10.9.0.2", &["10.244.0.0/16"])], json!([]), &dead, &[]);
        check(&[me(), node("a", "10.9.0.2", &["0.0.0.0/0"])], json!([]), &dead, &[]);
        check(&[me(), node("a", "10.9.0.2", &["10.9.0.0/24"])], json!([]), &dead, &[]);
        let b = node("b", "10.9.0.3", &["10.244.2.0/25"]);
        check(&[me(), node("a", "10.9.0.2", &["10.244.2.0/24"]), b], json!([]), &dead, &[]);
        // An endpoint may say that it is there and have an address of a pod here.
        let endpoint = json!([{"addresses": ["10.244.1.7"], "nodeName": "a"}]);
        check(&[me(), node("a", "10.9.0.2", &[])], endpoint, &dead, &[]);
    }
}
