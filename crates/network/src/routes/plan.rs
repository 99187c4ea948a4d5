//! By which way the pods of other nodes are reached, decided without asking anybody.
//!
//! A node that shares a network with us is its pods' gateway. Others are at the other end of a tunnel, a device that packs
//! what it is given into datagrams from node to node (VXLAN, RFC 7348). Who is at which end has not to be told to anybody:
//! a node's hardware address in the tunnel follows from the address under which it is reached, and the gateway to its pods
//! is the first address of their range, which no pod has.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

use super::{NodeRoutes, Tunnel};

/// How the pods of a node are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Via {
    /// Through the node's own address, on a network of this machine.
    Gateway(IpAddr),
    /// Through the tunnel.
    Tunnel,
}

/// A route of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The pods of a node.
    pub pods: IpNet,
    /// The way to the node.
    pub via: Via,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.via {
            Via::Gateway(ip) => write!(f, "{} via {ip}", self.pods),
            Via::Tunnel => write!(f, "{} by tunnel", self.pods),
        }
    }
}

/// What to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A route that is missing.
    Add(Route),
    /// One of ours that leads elsewhere, put right in one step.
    Replace(Route),
    /// One of ours that is not wanted.
    Remove(Route),
}

/// A hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// That of the node whose end of the tunnel is this address. Of 46 bits: with 5,000 nodes two have the same one with a
    /// probability of one in five million.
    pub fn of(address: IpAddr) -> Mac {
        let digest = Sha256::digest(format!("seawall tunnel {address}"));
        let mut mac = [0; 6];
        mac.copy_from_slice(&digest[..6]);
        // One node's, and given by us and not by a maker of hardware.
        mac[0] = mac[0] & !1 | 2;
        Mac(mac)
    }
}

/// What the tunnel's device has to know of another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    /// The hardware address of a gateway.
    Neighbour(IpAddr, Mac),
    /// Where the node with a hardware address is.
    Forward(Mac, IpAddr),
}

/// This node's end of the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Where it is reached by other nodes.
    pub local: IpAddr,
    /// What this node says itself through the tunnel comes from these, the first addresses of its pods' ranges, so that
    /// answers take the tunnel as well.
    pub addresses: BTreeSet<IpAddr>,
    /// The nodes at other ends.
    pub entries: BTreeSet<Entry>,
    /// Who may send something through it.
    pub nodes: BTreeSet<IpAddr>,
}

/// What should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The ways to all pods of other nodes.
    pub routes: BTreeMap<IpNet, Via>,
    /// This node's end of the tunnel, if anybody is reached by it.
    pub tunnel: Option<End>,
    /// Nodes without a route, and why.
    pub refused: BTreeSet<String>,
}

/// Decides what should be. `own` are this machine's addresses with their networks.
pub fn plan(me: &str, nodes: &[NodeRoutes], own: &[IpNet], mode: Tunnel) -> Wanted {
    let mut others: Vec<&NodeRoutes> = nodes.iter().filter(|n| n.name != me).collect();
    others.sort_by(|a, b| a.name.cmp(&b.name));
    let sight = Sight { me: nodes.iter().find(|n| n.name == me), nodes, own, mode, six: six(nodes) };
    let mut wanted = Wanted::default();
    let mut owners: BTreeMap<IpNet, &str> = BTreeMap::new();
    let mut entries = BTreeSet::new();
    for node in &others {
        for pods in &node.pods {
            let via = match sight.way(node, *pods) {
                Ok(via) => via,
                Err(reason) => {
                    wanted.refused.insert(format!("{}: {reason}", node.name));
                    continue;
                }
            };
            if let Some(other) = owners.get(pods) {
                wanted.refused.insert(format!("{}: its pods {pods} are also those of {other}", node.name));
                continue;
            }
            owners.insert(*pods, &node.name);
            wanted.routes.insert(*pods, via);
            if let (Via::Tunnel, Some(to)) = (via, sight.end(node)) {
                entries.insert(Entry::Neighbour(pods.network(), Mac::of(to)));
                entries.insert(Entry::Forward(Mac::of(to), to));
            }
        }
    }
    if let (false, Some(me)) = (entries.is_empty(), sight.me) {
        wanted.tunnel = sight.end(me).map(|local| End {
            local,
            addresses: me.pods.iter().map(IpNet::network).collect(),
            entries,
            nodes: others.iter().flat_map(|n| &n.addresses).copied().filter(|ip| ip.is_ipv6() == sight.six).collect(),
        });
    }
    wanted
}

/// Whether the tunnel's datagrams are of IPv6: if there is a node that has no IPv4. All nodes come to the same answer.
fn six(nodes: &[NodeRoutes]) -> bool {
    nodes.iter().any(|n| !n.addresses.is_empty() && !n.addresses.iter().any(IpAddr::is_ipv4))
}

/// What is looked at to find a way.
struct Sight<'a> {
    me: Option<&'a NodeRoutes>,
    nodes: &'a [NodeRoutes],
    own: &'a [IpNet],
    mode: Tunnel,
    six: bool,
}

impl Sight<'_> {
    /// The address at which a node's end of the tunnel is.
    fn end(&self, node: &NodeRoutes) -> Option<IpAddr> {
        node.addresses.iter().copied().find(|ip| ip.is_ipv6() == self.six)
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        self.own.iter().any(|n| n.addr() == ip)
    }

    /// How a node's pods are reached.
    fn way(&self, node: &NodeRoutes, pods: IpNet) -> Result<Via, String> {
        let overlap = |a: &IpNet, b: &IpNet| a.contains(&b.network()) || b.contains(&a.network());
        if self.me.iter().flat_map(|me| &me.pods).any(|mine| overlap(mine, &pods)) {
            return Err(format!("its pods {pods} overlap with those of this node"));
        }
        // A range that holds a node would take the node's own traffic away. The gateway of a tunnel is no node.
        let of_nodes = self.nodes.iter().flat_map(|n| n.addresses.iter().copied());
        let all = of_nodes.chain(self.own.iter().map(|n| n.addr()));
        if let Some(inside) = all.into_iter().find(|a| pods.contains(a)) {
            return Err(format!("its pods {pods} would include the address {inside} of a node"));
        }
        if let Some(same) = node.addresses.iter().find(|ip| self.is_own(**ip)) {
            return Err(format!("its address {same} is one of this machine's"));
        }
        if node.addresses.is_empty() {
            return Err(format!("it has no InternalIP for its pods {pods} yet"));
        }
        let near = |ip: &&IpAddr| self.own.iter().any(|n| n.prefix_len() < n.max_prefix_len() && n.contains(*ip));
        let of_family = node.addresses.iter().filter(|ip| ip.is_ipv6() == pods.addr().is_ipv6());
        let gateway = of_family.clone().find(near);
        match (self.mode, gateway) {
            (Tunnel::Auto | Tunnel::Never, Some(ip)) => Ok(Via::Gateway(*ip)),
            (Tunnel::Never, None) => Err(match of_family.clone().next() {
                Some(ip) => format!("its address {ip} is on no network of this machine, and --tunnel is never"),
                None => format!("it has no InternalIP for its pods {pods}, and --tunnel is never"),
            }),
            (Tunnel::Auto | Tunnel::Always, _) => self.tunnel(node),
        }
    }

    /// Whether there can be a tunnel to a node.
    fn tunnel(&self, node: &NodeRoutes) -> Result<Via, String> {
        let family = if self.six { "IPv6" } else { "IPv4" };
        if self.end(node).is_none() {
            return Err(format!(
                "it has no InternalIP of {family}, and some node has no other: a tunnel has one family"
            ));
        }
        match self.me.and_then(|me| self.end(me)) {
            Some(local) if self.is_own(local) => Ok(Via::Tunnel),
            Some(local) => Err(format!(
                "there is no tunnel to it: this node's InternalIP {local} is on none of its interfaces; \
                 give an address that is (--node-ip)"
            )),
            None => Err(format!("there is no tunnel to it: this node has no InternalIP of {family} yet")),
        }
    }
}

/// What leads from the kernel's routes with our protocol to those that should be. Removals come first.
pub fn changes(wanted: &BTreeMap<IpNet, Via>, present: &[Route]) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut seen = BTreeSet::new();
    let mut replaced = Vec::new();
    for route in present {
        match wanted.get(&route.pods) {
            Some(via) if *via == route.via => drop(seen.insert(route.pods)),
            Some(via) => replaced.push((*route, Route { pods: route.pods, via: *via })),
            None => changes.push(Change::Remove(*route)),
        }
    }
    for (old, new) in replaced {
        // Where the right one is there too, or is being put there, the wrong one just goes.
        if seen.insert(new.pods) {
            changes.push(Change::Replace(new));
        } else {
            changes.push(Change::Remove(old));
        }
    }
    let missing = wanted.iter().filter(|(pods, _)| !seen.contains(pods));
    changes.extend(missing.map(|(pods, via)| Change::Add(Route { pods: *pods, via: *via })));
    changes.sort_by_key(|change| !matches!(change, Change::Remove(_)));
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, address: &str, pods: &str) -> NodeRoutes {
        NodeRoutes {
            name: name.into(),
            addresses: address.split_whitespace().map(|a| a.parse().unwrap()).collect(),
            pods: pods.split_whitespace().map(|p| p.parse().unwrap()).collect(),
        }
    }

    fn routes(text: &str) -> Vec<Route> {
        let parse = |line: &str| {
            let line = line.trim();
            match line.split_once(" via ") {
                Some((pods, via)) => Route { pods: pods.parse().unwrap(), via: Via::Gateway(via.parse().unwrap()) },
                None => Route { pods: line.strip_suffix(" by tunnel").unwrap().parse().unwrap(), via: Via::Tunnel },
            }
        };
        text.split(',').filter(|l| !l.trim().is_empty()).map(parse).collect()
    }

    fn wanted(nodes: &[NodeRoutes], mode: Tunnel) -> Wanted {
        let me = node("me", "10.9.0.1 fd00::1", "10.244.0.0/24 fd00:1::/64");
        let own: Vec<IpNet> =
            ["127.0.0.1/8", "10.9.0.1/24", "10.244.0.1/32", "fd00::1/64"].map(|n| n.parse().unwrap()).to_vec();
        plan("me", &[&[me], nodes].concat(), &own, mode)
    }

    #[track_caller]
    fn check_in(mode: Tunnel, nodes: &[NodeRoutes], present: &str, expect: &[(&str, &str)], refused: &[&str]) {
        let wanted = wanted(nodes, mode);
        let said: Vec<(&str, String)> = changes(&wanted.routes, &routes(present))
            .iter()
            .map(|change| match change {
                Change::Add(route) => ("add", route.to_string()),
                Change::Replace(route) => ("replace", route.to_string()),
                Change::Remove(route) => ("remove", route.to_string()),
            })
            .collect();
        assert_eq!(said, expect.iter().map(|(a, b)| (*a, (*b).to_owned())).collect::<Vec<_>>());
        assert_eq!(wanted.refused.len(), refused.len(), "{:?}", wanted.refused);
        for (reason, part) in wanted.refused.iter().zip(refused) {
            assert!(reason.contains(part), "{reason} has no {part:?}");
        }
    }

    #[track_caller]
    fn check(nodes: &[NodeRoutes], present: &str, changes: &[(&str, &str)], refused: &[&str]) {
        check_in(Tunnel::Auto, nodes, present, changes, refused);
    }

    #[test]
    fn plans() {
        let a = || node("a", "10.9.0.2", "10.244.1.0/24");
        let b = || node("b", "10.9.0.3", "10.244.2.0/24");
        let (to_a, to_b) = ("10.244.1.0/24 via 10.9.0.2", "10.244.2.0/24 via 10.9.0.3");
        check(&[a(), b()], "", &[("add", to_a), ("add", to_b)], &[]);
        check(&[a(), b()], to_a, &[("add", to_b)], &[]);
        check(&[a(), b()], &format!("{to_a},{to_b}"), &[], &[]);
        // A node left; another has a new address; its pods' range went to somebody else.
        check(&[b()], &format!("{to_a},{to_b}"), &[("remove", to_a)], &[]);
        let moved = node("a", "10.9.0.7", "10.244.1.0/24");
        check(std::slice::from_ref(&moved), to_a, &[("replace", "10.244.1.0/24 via 10.9.0.7")], &[]);
        let both = format!("{to_a},10.244.1.0/24 via 10.9.0.7");
        check(&[moved], &both, &[("remove", to_a)], &[]);
        // Two families.
        let dual = node("a", "10.9.0.2 fd00::2", "10.244.1.0/24 fd00:2::/64");
        check(&[dual], "", &[("add", to_a), ("add", "fd00:2::/64 via fd00::2")], &[]);
        // What cannot be.
        check(&[node("a", "10.9.0.1", "10.244.1.0/24")], "", &[], &["one of this machine's"]);
        check(&[node("a", "10.244.0.1", "10.244.1.0/24")], "", &[], &["one of this machine's"]);
        check(&[node("a", "", "10.244.1.0/24")], "", &[], &["no InternalIP"]);
        check(&[node("a", "10.9.0.2", "")], "", &[], &[]);
        check(&[node("a", "10.9.0.2", "0.0.0.0/0")], "", &[], &["overlap with those of this node"]);
        check(&[node("a", "10.9.0.2", "10.9.0.0/16")], "", &[], &["would include the address"]);
        check(
            &[a(), node("c", "10.9.0.4", "10.244.1.0/24")],
            "",
            &[("add", to_a)],
            &["c: its pods 10.244.1.0/24 are also those of a"],
        );
    }

    #[test]
    fn who_is_reached_by_the_tunnel() {
        let a = || node("a", "10.9.0.2", "10.244.1.0/24");
        let far = || node("far", "192.0.2.1", "10.244.2.0/24");
        let (to_a, to_far) = ("10.244.1.0/24 via 10.9.0.2", "10.244.2.0/24 by tunnel");
        check(&[a(), far()], "", &[("add", to_a), ("add", to_far)], &[]);
        check_in(Tunnel::Always, &[a(), far()], "", &[("add", "10.244.1.0/24 by tunnel"), ("add", to_far)], &[]);
        let never = "far: its address 192.0.2.1 is on no network of this machine, and --tunnel is never";
        check_in(Tunnel::Never, &[a(), far()], &format!("{to_a},{to_far}"), &[("remove", to_far)], &[never]);
        // It has moved to our network, or away from it.
        check(&[node("far", "10.9.0.8", "10.244.2.0/24")], to_far, &[("replace", "10.244.2.0/24 via 10.9.0.8")], &[]);
        check(&[node("a", "192.0.2.7", "10.244.1.0/24")], to_a, &[("replace", "10.244.1.0/24 by tunnel")], &[]);
        // Pods of a family that nodes do not have among themselves.
        let dual = node("a", "10.9.0.2", "10.244.1.0/24 fd00:2::/64");
        check(std::slice::from_ref(&dual), "", &[("add", to_a), ("add", "fd00:2::/64 by tunnel")], &[]);
        check_in(
            Tunnel::Never,
            &[dual],
            "",
            &[("add", to_a)],
            &["no InternalIP for its pods fd00:2::/64, and --tunnel"],
        );
        // A node of IPv6 alone: the tunnel is of IPv6 for all.
        let six = || node("six", "2001:db8::6", "10.244.6.0/24");
        check(&[six()], "", &[("add", "10.244.6.0/24 by tunnel")], &[]);
        check(&[six(), far()], "", &[("add", "10.244.6.0/24 by tunnel")], &["far: it has no InternalIP of IPv6"]);
    }

    #[test]
    fn the_end_of_the_tunnel() {
        assert_eq!(wanted(&[node("a", "10.9.0.2", "10.244.1.0/24")], Tunnel::Auto).tunnel, None);
        let (near, far) =
            (node("a", "10.9.0.2", "10.244.1.0/24"), node("far", "192.0.2.1", "10.244.2.0/24 fd00:2::/64"));
        let end = wanted(&[near, far], Tunnel::Auto).tunnel.unwrap();
        let (ip, mac) = (|ip: &str| ip.parse::<IpAddr>().unwrap(), Mac::of("192.0.2.1".parse().unwrap()));
        assert_eq!(end.local, ip("10.9.0.1"));
        assert_eq!(end.addresses, BTreeSet::from([ip("10.244.0.0"), ip("fd00:1::")]));
        let neighbours = [Entry::Neighbour(ip("10.244.2.0"), mac), Entry::Neighbour(ip("fd00:2::"), mac)];
        assert_eq!(end.entries, BTreeSet::from([neighbours[0], neighbours[1], Entry::Forward(mac, ip("192.0.2.1"))]));
        assert_eq!(end.nodes, BTreeSet::from([ip("10.9.0.2"), ip("192.0.2.1")]));
        // Without an address that is really here nothing can begin.
        let said =
            plan("me", &[node("me", "198.51.100.9", ""), node("far", "192.0.2.1", "10.244.2.0/24")], &[], Tunnel::Auto);
        assert_eq!(said.tunnel, None);
        assert!(said.refused.iter().any(|r| r.contains("198.51.100.9 is on none of its interfaces")), "{said:?}");
    }

    #[test]
    fn hardware_addresses() {
        let mac = |ip: &str| Mac::of(ip.parse().unwrap()).0;
        assert_eq!(mac("10.9.0.1"), mac("10.9.0.1"));
        assert_ne!(mac("10.9.0.1"), mac("10.9.0.2"));
        for ip in ["10.9.0.1", "10.9.0.2", "fd00::1", "192.0.2.200"] {
            assert_eq!(mac(ip)[0] & 3, 2, "{ip}: of one node, and not of a maker");
        }
    }
}
