//! Which endpoints of a Service's port take new connections. Pure.
//!
//! What the API says of an endpoint (its conditions, its hints) and what the gossip says of its machine come together
//! here, for the rules as for the relay.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use k8s_openapi::api::{
    core::v1::{Service, ServicePort},
    discovery::v1::{Endpoint as Listed, EndpointPort, EndpointSlice},
};

use super::{family::Family, state::State};
use crate::verdict::Verdict;

/// What is known, who we are, and what is thought of the machines.
pub struct View<'a> {
    /// The cluster.
    pub state: &'a State,
    /// The name of this node.
    pub me: &'a str,
    verdicts: &'a BTreeMap<String, Verdict>,
    /// Machines by their own addresses: endpoints on the host's network need not name their node.
    hosts: BTreeMap<IpAddr, &'a str>,
    zone: Option<&'a str>,
}

impl<'a> View<'a> {
    /// Puts it together.
    pub fn new(state: &'a State, me: &'a str, verdicts: &'a BTreeMap<String, Verdict>) -> View<'a> {
        let of = |m: &'a super::state::Machine| m.addresses.iter().map(|a| (*a, m.name.as_str()));
        let hosts = state.nodes.values().flat_map(|m| of(m)).collect();
        let zone = state.machine(me).and_then(|m| m.zone.as_deref());
        View { state, me, verdicts, hosts, zone }
    }

    /// What is thought of a machine. Nobody suspects himself.
    pub fn verdict(&self, node: &str) -> Verdict {
        if node == self.me { Verdict::Alive } else { self.verdicts.get(node).copied().unwrap_or(Verdict::Alive) }
    }

    /// Whose own address this is.
    pub fn host(&self, address: IpAddr) -> Option<&'a str> {
        self.hosts.get(&address).copied()
    }

    /// The addresses of a slice's endpoints on this node that are ready.
    pub fn ready_here(&self, slice: &EndpointSlice) -> Vec<IpAddr> {
        let Some(family) = Family::named(&slice.address_type) else { return Vec::new() };
        let ready = |listed: &&Listed| listed.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
        let all = slice.endpoints.iter().flatten().filter(ready);
        all.filter_map(|listed| endpoint(listed, family, 0, self)).filter(|e| e.local).map(|e| e.address.ip()).collect()
    }

    /// Every Service, once for each family in which it has an address or slices.
    pub fn services(&self) -> impl Iterator<Item = Served<'a>> {
        let mut slices: BTreeMap<(Family, &str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
        for ((namespace, _), slice) in &self.state.slices {
            let service = slice.metadata.labels.as_ref().and_then(|l| l.get("kubernetes.io/service-name"));
            if let (Some(service), Some(family)) = (service, Family::named(&slice.address_type)) {
                slices.entry((family, namespace, service)).or_default().push(slice);
            }
        }
        let both = self.state.services.iter().flat_map(|entry| Family::ALL.map(|family| (family, entry)));
        both.filter_map(move |(family, ((namespace, name), service))| {
            let slices = slices.remove(&(family, namespace.as_str(), name.as_str())).unwrap_or_default();
            let cluster_ip = cluster_ip(service, family);
            let there = cluster_ip.is_some() || !slices.is_empty();
            there.then_some(Served { namespace, name, service, family, cluster_ip, slices })
        })
    }
}

/// A Service in one family of addresses.
#[derive(Clone, Debug)]
pub struct Served<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// All of it.
    pub service: &'a Service,
    /// The family.
    pub family: Family,
    /// Its own address, if it has one that is balanced.
    pub cluster_ip: Option<IpAddr>,
    /// Its slices.
    pub slices: Vec<&'a EndpointSlice>,
}

impl<'a> Served<'a> {
    /// Its ports.
    pub fn ports(&self) -> impl Iterator<Item = &'a ServicePort> + use<'a> {
        self.service.spec.iter().flat_map(|s| s.ports.iter().flatten())
    }

    /// Its addresses outside the cluster's own: external ones, and those of a load balancer.
    pub fn external(&self) -> BTreeSet<IpAddr> {
        let given = self.service.spec.iter().flat_map(|s| s.external_ips.iter().flatten()).map(String::as_str);
        let status = self.service.status.as_ref().and_then(|s| s.load_balancer.as_ref());
        let balancers = status.and_then(|l| l.ingress.as_ref()).into_iter().flatten();
        // `Proxy` says that the load balancer does not want to be gone around (KEP-1860).
        let balancers = balancers.filter(|i| i.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip.as_deref());
        given.chain(balancers).filter_map(|ip| self.family.parse(ip)).collect()
    }

    /// Who may come to the addresses of a load balancer (`spec.loadBalancerSourceRanges`), of this family; `None` is
    /// everybody. An address that is an external one as well is open.
    pub fn admitted(&self, ip: IpAddr) -> Option<Vec<IpNet>> {
        let spec = self.service.spec.as_ref()?;
        let ranges = spec.load_balancer_source_ranges.as_ref().filter(|ranges| !ranges.is_empty())?;
        if spec.external_ips.iter().flatten().any(|external| self.family.parse(external) == Some(ip)) {
            return None;
        }
        // What cannot be read admits nobody.
        let nets = ranges.iter().filter_map(|text| text.trim().parse::<IpNet>().ok()).map(|net| net.trunc());
        Some(nets.filter(|net| Family::of(net.addr()) == self.family).collect())
    }
}

/// An endpoint that answers, as its slice says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// Where it answers.
    pub address: SocketAddr,
    /// On which machine, if that is known.
    pub node: Option<String>,
    /// Whether that is this one.
    pub local: bool,
    /// What is thought of its machine.
    pub verdict: Verdict,
    /// Whether its address is the machine's own.
    pub host: bool,
    zones: Vec<String>,
    nodes: Vec<String>,
}

/// The endpoints of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Ready ones.
    ready: Vec<Endpoint>,
    /// Ending, but still answering.
    serving: Vec<Endpoint>,
}

/// From where a connection may be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Anywhere.
    Cluster,
    /// On this node only.
    Local,
}

impl Endpoints {
    /// Those of a port, as its slices have them.
    pub fn of(port: &ServicePort, slices: &[&EndpointSlice], view: &View<'_>) -> Endpoints {
        let mut ready: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
        let mut serving = BTreeMap::new();
        let wanted = port.name.as_deref().unwrap_or_default();
        let same = |p: &&EndpointPort| {
            p.name.as_deref().unwrap_or_default() == wanted
                && p.protocol.as_deref().unwrap_or("TCP") == port.protocol.as_deref().unwrap_or("TCP")
        };
        for slice in slices {
            let Some(family) = Family::named(&slice.address_type) else { continue };
            let Some(number) = slice.ports.iter().flatten().find(same).and_then(|p| p.port) else { continue };
            let Ok(number) = u16::try_from(number) else { continue };
            for listed in slice.endpoints.iter().flatten() {
                let Some(endpoint) = endpoint(listed, family, number, view) else { continue };
                let conditions = listed.conditions.as_ref();
                let is_ready = conditions.and_then(|c| c.ready).unwrap_or(true);
                let is_serving = conditions.and_then(|c| c.serving).unwrap_or(is_ready);
                let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
                if is_ready {
                    ready.insert(endpoint.address, endpoint);
                } else if is_serving && terminating {
                    serving.insert(endpoint.address, endpoint);
                }
            }
        }
        // While an endpoint moves from one slice to another it may stand in both.
        serving.retain(|address, _| !ready.contains_key(address));
        Endpoints { ready: ready.into_values().collect(), serving: serving.into_values().collect() }
    }

    /// Those that take new connections, in a stable order. Endpoints that are ending are used when nothing else is left,
    /// anywhere or on this node (KEP-1669).
    pub fn takers(&self, scope: Scope, view: &View<'_>) -> Vec<&Endpoint> {
        for tier in [&self.ready, &self.serving] {
            let all: Vec<&Endpoint> = tier.iter().filter(|e| scope == Scope::Cluster || e.local).collect();
            let usable = settle(&all);
            if !usable.is_empty() {
                return if scope == Scope::Cluster { near(&all, usable, view) } else { usable };
            }
        }
        Vec::new()
    }

    /// Where flows of datagrams may stay: wherever somebody still answers.
    pub fn keepers(&self) -> impl Iterator<Item = &Endpoint> {
        self.ready.iter().chain(&self.serving).filter(|e| e.verdict != Verdict::Dead)
    }

    /// Those on machines' own addresses that are dead.
    pub fn dead_hosts(&self) -> impl Iterator<Item = &Endpoint> {
        self.ready.iter().chain(&self.serving).filter(|e| e.verdict == Verdict::Dead && e.host)
    }

    /// Those in pods that are dead.
    pub fn dead_pods(&self) -> impl Iterator<Item = &Endpoint> {
        self.ready.iter().chain(&self.serving).filter(|e| e.verdict == Verdict::Dead && !e.host)
    }
}

/// What the verdicts leave of a port's endpoints.
///
/// A dead one is never used: a connection there would hang, and one that is refused can be made again elsewhere. A
/// suspected one is not used while others are there, but when more than half of the endpoints are in doubt (suspected, or
/// dead while the API still lists them) it is likelier that we see badly: then the suspected ones stay in use, so that a
/// mistake does not put everything on the few that are left.
fn settle<'a>(all: &[&'a Endpoint]) -> Vec<&'a Endpoint> {
    let of = |verdict: Verdict| all.iter().filter(|e| e.verdict == verdict).count();
    let doubted = of(Verdict::Suspect) + of(Verdict::Dead);
    let panic = doubted * 2 > all.len();
    all.iter()
        .copied()
        .filter(|e| match e.verdict {
            Verdict::Alive => true,
            Verdict::Suspect => panic,
            Verdict::Dead => false,
        })
        .collect()
}

/// Those of `usable` that are meant for this node or its zone (`trafficDistribution`; the EndpointSlice controller writes
/// hints, and they count if every endpoint has some:
/// <https://kubernetes.io/docs/reference/networking/virtual-ips/#traffic-distribution>). If the verdicts leave none of
/// them, any will do.
fn near<'a>(all: &[&'a Endpoint], usable: Vec<&'a Endpoint>, view: &View<'_>) -> Vec<&'a Endpoint> {
    let pick = |meant: &dyn Fn(&Endpoint) -> bool| -> Option<Vec<&'a Endpoint>> {
        let found: Vec<_> = usable.iter().copied().filter(|e| meant(e)).collect();
        Some(found).filter(|f| !f.is_empty())
    };
    if all.iter().all(|e| !e.nodes.is_empty())
        && let Some(found) = pick(&|e| e.nodes.iter().any(|n| n == view.me))
    {
        return found;
    }
    if let Some(zone) = view.zone.filter(|_| all.iter().all(|e| !e.zones.is_empty()))
        && let Some(found) = pick(&|e| e.zones.iter().any(|z| z == zone))
    {
        return found;
    }
    usable
}

fn endpoint(listed: &Listed, family: Family, port: u16, view: &View<'_>) -> Option<Endpoint> {
    // Only the first address of an endpoint counts; that is what the slice's consumers agreed on.
    let address = family.parse(listed.addresses.first()?)?;
    let of_address = view.host(address);
    let node = listed.node_name.as_deref().or(of_address);
    let hints = listed.hints.as_ref();
    Some(Endpoint {
        address: SocketAddr::new(address, port),
        local: node == Some(view.me),
        verdict: node.map_or(Verdict::Alive, |n| view.verdict(n)),
        node: node.map(str::to_owned),
        host: of_address.is_some(),
        zones: hints.iter().flat_map(|h| h.for_zones.iter().flatten()).map(|z| z.name.clone()).collect(),
        nodes: hints.iter().flat_map(|h| h.for_nodes.iter().flatten()).map(|n| n.name.clone()).collect(),
    })
}

/// A Service's own address in a family. `clusterIP` repeats the first of `clusterIPs`.
fn cluster_ip(service: &Service, family: Family) -> Option<IpAddr> {
    let spec = service.spec.as_ref().filter(|s| s.type_.as_deref() != Some("ExternalName"))?;
    spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip).find_map(|ip| family.parse(ip))
}

/// For how many seconds a client stays with its endpoint, if it does.
pub fn affinity(service: &Service) -> Option<u32> {
    let spec = service.spec.as_ref().filter(|s| s.session_affinity.as_deref() == Some("ClientIP"))?;
    let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
    Some(config.and_then(|c| c.timeout_seconds).unwrap_or(10_800).max(1) as u32)
}

/// Whether only this node's endpoints serve what comes from pods and nodes, and what comes from outside.
pub fn policies(service: &Service) -> (Scope, Scope) {
    let scope = |policy: Option<&str>| if policy == Some("Local") { Scope::Local } else { Scope::Cluster };
    let spec = service.spec.as_ref();
    (
        scope(spec.and_then(|s| s.internal_traffic_policy.as_deref())),
        scope(spec.and_then(|s| s.external_traffic_policy.as_deref())),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::proxy::state;

    /// Endpoints in words: `a` ready, `a!` ending but serving, `a-` not ready, each on the node of its name; `a@z` for a
    /// zone, `a>n` for a node. Verdicts: `a?` suspected, `a+` dead.
    fn takers(endpoints: &str, verdicts: &str, scope: Scope) -> String {
        let listed: Vec<Value> = endpoints
            .split_whitespace()
            .map(|word| {
                let name = &word[..1];
                let (ready, serving, ending) = (!word.contains(['!', '-']), !word.contains('-'), word.contains('!'));
                let after = |c: char| word.split_once(c).map(|(_, rest)| json!([{"name": rest}]));
                json!({"addresses": [format!("10.244.0.{}", name.as_bytes()[0])], "nodeName": name,
                    "conditions": {"ready": ready, "serving": serving, "terminating": ending},
                    "hints": {"forZones": after('@'), "forNodes": after('>')}})
            })
            .collect();
        let slice = json!({"metadata": {"name": "s"}, "addressType": "IPv4", "ports": [{"name": "", "port": 80}],
            "endpoints": listed});
        let slice: EndpointSlice = serde_json::from_value(slice).unwrap();
        let verdicts: BTreeMap<String, Verdict> = verdicts
            .split_whitespace()
            .map(|w| (w[..1].to_owned(), if w.ends_with('?') { Verdict::Suspect } else { Verdict::Dead }))
            .collect();
        let mut known = State::default();
        let me = json!({"metadata": {"name": "m", "labels": {"topology.kubernetes.io/zone": "here"}}});
        known.nodes.extend([state::machine(serde_json::from_value(me).unwrap())]);
        let view = View::new(&known, "m", &verdicts);
        let port = ServicePort { port: 80, ..Default::default() };
        let all = Endpoints::of(&port, &[&slice], &view);
        all.takers(scope, &view).iter().map(|e| e.node.clone().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn who_takes_new_connections() {
        let check = |endpoints: &str, verdicts: &str, expect: &str| {
            assert_eq!(takers(endpoints, verdicts, Scope::Cluster), expect, "{endpoints} with {verdicts:?}");
        };
        check("a b", "", "a b");
        check("a b- c!", "", "a");
        check("b- c!", "", "c");
        check("b-", "", "");
        // In doubt: others first.
        check("a b", "a?", "b");
        check("a b c d", "a? b?", "c d");
        // More than half in doubt: the suspected ones stay.
        check("a b c", "a? b?", "a b c");
        check("a b", "a? b?", "a b");
        check("a", "a?", "a");
        check("a b c", "a+ b?", "b c");
        check("a b", "a+ b?", "b");
        // The dead never.
        check("a b c", "a+", "b c");
        check("a b c", "a+ b+", "c");
        check("a b", "a+ b+", "");
        check("a", "a+", "");
        // What is ending answers better than the dead.
        check("a b!", "a+", "b");
        check("a b!", "a?", "a");
        // This node's own opinion of itself is none.
        check("m a", "m+ a?", "m");
    }

    #[test]
    fn local_ones() {
        let check = |endpoints: &str, verdicts: &str, expect: &str| {
            assert_eq!(takers(endpoints, verdicts, Scope::Local), expect, "{endpoints} with {verdicts:?}");
        };
        check("a m", "", "m");
        check("a b", "", "");
        // Ending here is better than nothing here, whatever there is elsewhere (KEP-1669).
        check("a m!", "", "m");
        check("a m-", "", "");
        check("a m", "m+", "m");
    }

    #[test]
    fn near_ones_if_there_are_any() {
        let check = |endpoints: &str, verdicts: &str, expect: &str| {
            assert_eq!(takers(endpoints, verdicts, Scope::Cluster), expect, "{endpoints} with {verdicts:?}");
        };
        check("a@here b@there", "", "a");
        check("a@here b", "", "a b");
        check("a@there b@there", "", "a b");
        check("a@here b@there", "a?", "b");
        check("a@here b@there", "a+", "b");
        check("a@here c@here b@there", "a?", "c");
        check("a>m b>x", "", "a");
        check("a>x b>y", "", "a b");
    }
}
