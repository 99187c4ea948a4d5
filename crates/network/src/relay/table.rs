//! Which Services the relay serves, and by which endpoints. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;

use crate::{
    proxy::{
        endpoints::{self, Endpoint, Endpoints, Scope, View},
        family::Family,
        rules::{RELAYED, RELAYED_PORTS},
    },
    verdict::Verdict,
};

/// Asks for the relay, or for none (`"true"`, `"false"`), whatever the node's default is.
pub const ANNOTATION: &str = "seawall.dev/relay";
/// Asks for the client's address in front of each connection (`"v2"`).
pub const PROXY_PROTOCOL: &str = "seawall.dev/relay-proxy-protocol";

/// An endpoint, for the relay.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// Where it answers.
    pub address: SocketAddr,
    /// Its machine, if that is known.
    pub node: Option<String>,
    /// Whether that is this one.
    pub local: bool,
}

/// Endpoints in the order in which they are to be tried: those of the first tier that is not used up, in any order.
pub type Tiers = Vec<Vec<Backend>>;

/// How connections to a port of a Service are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// Namespace, name and port.
    pub service: String,
    /// All endpoints.
    pub cluster: Tiers,
    /// Those on this node.
    pub local: Tiers,
    /// How long a client stays with an endpoint.
    pub affinity: Option<Duration>,
    /// Whether each connection begins with a header of the PROXY protocol.
    pub proxy_protocol: bool,
}

/// By which of its addresses a Service was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Door {
    /// The cluster's own, with `internalTrafficPolicy`.
    Internal(Scope),
    /// One from outside, or a node's port, with `externalTrafficPolicy`.
    External(Scope),
}

/// All that the relay serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// By the Service's address and port.
    pub addresses: BTreeMap<SocketAddr, (Door, Arc<Route>)>,
    /// By a node's port, in a family.
    pub ports: BTreeMap<(Family, u16), (Door, Arc<Route>)>,
    /// The addresses of all pods.
    pub pods: Vec<IpNet>,
    /// Those of this node's pods.
    pub own_pods: Vec<IpNet>,
    /// This node's own addresses.
    pub own: Vec<IpAddr>,
}

/// Whether a Service is the relay's.
pub fn wanted(service: &Service, default: bool) -> bool {
    match annotation(service, ANNOTATION) {
        Some("true") => true,
        Some("false") => false,
        _ => default,
    }
}

fn annotation<'a>(service: &'a Service, name: &str) -> Option<&'a str> {
    service.metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

impl Table {
    /// What is to be relayed. `default` is for Services that do not say.
    pub fn of(view: &View<'_>, default: bool, pods: Vec<IpNet>, own: &[IpAddr]) -> Table {
        let me = view.state.machine(view.me);
        let own_pods = me.map(|m| m.pods.clone()).unwrap_or_default();
        // One of each family, at least where the Node says so.
        let own = own.iter().chain(me.iter().flat_map(|m| &m.addresses)).copied().collect();
        let mut table = Table { pods, own_pods, own, ..Table::default() };
        for served in view.services() {
            let service = served.service;
            let Some(cluster_ip) = served.cluster_ip.filter(|_| wanted(service, default)) else { continue };
            let (internal, external) = endpoints::policies(service);
            let proxy_protocol = annotation(service, PROXY_PROTOCOL) == Some("v2");
            let affinity = endpoints::affinity(service).map(|s| Duration::from_secs(s.into()));
            let tcp = |p: &&k8s_openapi::api::core::v1::ServicePort| p.protocol.as_deref().unwrap_or("TCP") == "TCP";
            for port in served.ports().filter(tcp) {
                let Ok(number) = u16::try_from(port.port) else { continue };
                let known = Endpoints::of(port, &served.slices, view);
                let route = Arc::new(Route {
                    service: format!("{}/{}:{number}", served.namespace, served.name),
                    cluster: tiers(&known, Scope::Cluster, view),
                    local: tiers(&known, Scope::Local, view),
                    affinity,
                    proxy_protocol,
                });
                // Where nobody is there the kernel refuses, or drops, as the policy says: faster than we could.
                let serves = |scope: Scope| !route.tiers(scope).is_empty();
                if serves(internal) {
                    let door = (Door::Internal(internal), route.clone());
                    table.addresses.insert(SocketAddr::new(cluster_ip, number), door);
                }
                if !serves(external) {
                    continue;
                }
                let door = (Door::External(external), route.clone());
                // Where not everybody may come in, the rules serve: they drop before there is a connection.
                for ip in served.external().into_iter().filter(|ip| served.admitted(*ip).is_none()) {
                    table.addresses.insert(SocketAddr::new(ip, number), door.clone());
                }
                if let Some(node_port) = port.node_port.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0) {
                    table.ports.insert((served.family, node_port), door.clone());
                }
            }
        }
        table
    }

    /// Who serves a connection to this address.
    pub fn find(&self, to: SocketAddr) -> Option<&(Door, Arc<Route>)> {
        self.addresses.get(&to).or_else(|| self.ports.get(&(Family::of(to.ip()), to.port())))
    }

    /// Of the sets of nftables: set and element.
    pub fn elements(&self) -> BTreeSet<(&'static str, String)> {
        let addresses =
            self.addresses.keys().map(|a| (Family::of(a.ip()).pick(RELAYED), format!("{} . {}", a.ip(), a.port())));
        addresses.chain(self.ports.keys().map(|(f, port)| (f.pick(RELAYED_PORTS), port.to_string()))).collect()
    }
}

impl Route {
    /// The endpoints in a scope.
    pub fn tiers(&self, scope: Scope) -> &Tiers {
        if scope == Scope::Local { &self.local } else { &self.cluster }
    }
}

/// Those that take new connections first, then whoever else may answer: ones far away or suspected, ones that are ending.
fn tiers(known: &Endpoints, scope: Scope, view: &View<'_>) -> Tiers {
    let backend = |e: &Endpoint| Backend { address: e.address, node: e.node.clone(), local: e.local };
    let takers = known.takers(scope, view);
    let others: Vec<&Endpoint> = known
        .keepers()
        .filter(|e| scope == Scope::Cluster || e.local)
        .filter(|e| !takers.iter().any(|t| t.address == e.address))
        .collect();
    let of = |verdict: Verdict| others.iter().filter(|e| e.verdict == verdict).map(|e| backend(e)).collect::<Vec<_>>();
    let all = [takers.iter().map(|e| backend(e)).collect(), of(Verdict::Alive), of(Verdict::Suspect)];
    all.into_iter().filter(|tier: &Vec<Backend>| !tier.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Value, json};

    use super::*;
    use crate::proxy::state::{self, State};

    fn table(annotations: Value, spec: Value, endpoints: &[(&str, &str)], verdicts: &[(&str, Verdict)]) -> Table {
        let mut known = State::default();
        let service = json!({"metadata": {"name": "s", "namespace": "n", "annotations": annotations}, "spec": spec});
        known.services.extend([state::service(serde_json::from_value(service).unwrap())]);
        let endpoints: Vec<_> = endpoints.iter().map(|(a, node)| json!({"addresses": [a], "nodeName": node})).collect();
        let slice = json!({
            "metadata": {"name": "s-1", "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080}], "endpoints": endpoints});
        known.slices.extend([state::slice(serde_json::from_value(slice).unwrap())]);
        let verdicts: BTreeMap<String, Verdict> = verdicts.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
        Table::of(&View::new(&known, "me", &verdicts), false, vec!["10.244.0.0/16".parse().unwrap()], &[])
    }

    fn elements(table: &Table) -> Vec<String> {
        table.elements().into_iter().map(|(set, element)| format!("{set} {element}")).collect()
    }

    #[test]
    fn what_is_relayed() {
        let yes = json!({ANNOTATION: "true"});
        let spec = json!({"type": "NodePort", "clusterIP": "10.96.0.9", "externalIPs": ["192.0.2.7"],
            "ports": [{"port": 80, "nodePort": 30080}]});
        let one = &[("10.244.1.2", "a")][..];
        let check = |annotations: &Value, spec: &Value, endpoints: &[(&str, &str)], expect: &[&str]| {
            assert_eq!(elements(&table(annotations.clone(), spec.clone(), endpoints, &[])), expect);
        };
        let all = ["relayed4 10.96.0.9 . 80", "relayed4 192.0.2.7 . 80", "relayed_ports4 30080"];
        check(&yes, &spec, one, &all);
        check(&json!({}), &spec, one, &[]);
        check(&json!({ANNOTATION: "false"}), &spec, one, &[]);
        check(&yes, &spec, &[], &[]);
        let mut local = spec.clone();
        local["externalTrafficPolicy"] = "Local".into();
        check(&yes, &local, one, &all[..1]);
        check(&yes, &local, &[("10.244.0.2", "me")], &all);
        local["internalTrafficPolicy"] = "Local".into();
        check(&yes, &local, one, &[]);
        let udp = json!({"clusterIP": "10.96.0.9", "ports": [{"port": 80, "protocol": "UDP"}]});
        check(&yes, &udp, one, &[]);
        check(&yes, &json!({"clusterIP": "None", "ports": [{"port": 80}]}), one, &[]);
    }

    #[test]
    fn who_is_tried_first() {
        let spec = json!({"clusterIP": "10.96.0.9", "ports": [{"port": 80}]});
        let endpoints = [("10.244.1.2", "a"), ("10.244.2.2", "b"), ("10.244.3.2", "c"), ("10.244.0.2", "me")];
        let check = |verdicts: &[(&str, Verdict)], expect: &[&[&str]]| {
            let table = table(json!({ANNOTATION: "true"}), spec.clone(), &endpoints, verdicts);
            let (_, route) = table.find("10.96.0.9:80".parse().unwrap()).unwrap();
            let nodes = |tiers: &Tiers| -> Vec<Vec<String>> {
                tiers.iter().map(|t| t.iter().map(|b| b.node.clone().unwrap()).collect()).collect()
            };
            assert_eq!(nodes(&route.cluster), expect);
            assert_eq!(nodes(&route.local), [["me"]]);
        };
        // In the order of their addresses.
        check(&[], &[&["me", "a", "b", "c"]]);
        check(&[("a", Verdict::Suspect)], &[&["me", "b", "c"], &["a"]]);
        check(&[("a", Verdict::Dead)], &[&["me", "b", "c"]]);
        check(&[("a", Verdict::Dead), ("b", Verdict::Suspect)], &[&["me", "c"], &["b"]]);
    }
}
