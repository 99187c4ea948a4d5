//! What counts of policies, pods and namespaces, read once when an object arrives.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::{
    api::{
        core::v1::{Namespace, Pod},
        networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort},
    },
    apimachinery::pkg::{apis::meta::v1, util::intstr::IntOrString},
};
use kube::ResourceExt;
use seawall_api::selector::LabelSelector;

/// The labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Namespace and name.
pub type Key = (String, String);

/// Which labels are meant. Remembers its text, by which equal selectors are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    /// As JSON, for comparison.
    pub text: String,
    /// `None` matches nothing: an operator that nobody knows must not open anything.
    parsed: Option<LabelSelector>,
}

impl Selector {
    /// Of what an object says.
    pub fn of(selector: &v1::LabelSelector) -> Selector {
        // Nothing at all would mean everybody.
        let value = serde_json::to_value(selector).ok();
        Selector {
            text: value.as_ref().map(ToString::to_string).unwrap_or_default(),
            parsed: value.as_ref().and_then(LabelSelector::from_value),
        }
    }

    /// Whether it selects these labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.parsed.as_ref().is_some_and(|s| s.matches(|key| labels.get(key).map(String::as_str)))
    }
}

/// A protocol that policies know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// `TCP`, which is meant where none is named.
    Tcp,
    /// `UDP`.
    Udp,
    /// `SCTP`.
    Sctp,
}

impl Protocol {
    fn of(name: Option<&str>) -> Option<Protocol> {
        match name.unwrap_or("TCP") {
            "TCP" => Some(Protocol::Tcp),
            "UDP" => Some(Protocol::Udp),
            "SCTP" => Some(Protocol::Sctp),
            _ => None,
        }
    }

    /// How nftables calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }
}

/// Ports that a rule allows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ports {
    /// All.
    All(Protocol),
    /// From the first to the last.
    Range(Protocol, u16, u16),
    /// Whatever number the pod that is spoken to gives this name.
    Named(Protocol, String),
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Whoever has such an address.
    Block {
        /// The range.
        net: IpNet,
        /// What is not meant of it.
        except: Vec<IpNet>,
    },
    /// Pods.
    Pods {
        /// In these namespaces; without, in that of the policy.
        namespaces: Option<Selector>,
        /// With these labels; without, all.
        pods: Option<Selector>,
    },
}

/// One rule: all of the peers, at all of the ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// `None` is everybody. Nobody is an empty list.
    pub peers: Option<Vec<Peer>>,
    /// `None` is everything. Nothing is an empty list.
    pub ports: Option<Vec<Ports>>,
}

/// A NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Which pods of its namespace it is about.
    pub pods: Selector,
    /// What may come in; `None` if it is not about that.
    pub ingress: Option<Vec<Rule>>,
    /// What may go out; `None` if it is not about that.
    pub egress: Option<Vec<Rule>>,
}

/// A pod on the pods' network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Its uid.
    pub uid: String,
    /// The node that it is on.
    pub node: String,
    /// Its labels.
    pub labels: Labels,
    /// Its addresses: none before it has any, none after it has ended, and none of its own on the node's network.
    pub ips: Vec<IpAddr>,
    /// Whether it has ended.
    pub over: bool,
    /// Its ports that have names.
    pub ports: Vec<(String, Protocol, u16)>,
}

/// A rule of either direction, as it is written: peers and ports.
type Written = (Option<Vec<NetworkPolicyPeer>>, Option<Vec<NetworkPolicyPort>>);

/// A key and what counts of a policy. What is malformed is left out and told: it allows nothing.
pub fn policy(object: NetworkPolicy) -> (Key, Policy) {
    let key = (object.namespace().unwrap_or_default(), object.name_any());
    let spec = object.spec.unwrap_or_default();
    let mut faults = Vec::new();
    let mut rules = |list: Vec<Written>| -> Vec<Rule> {
        let read = |(peers, ports): Written| Rule {
            peers: peers
                .filter(|p| !p.is_empty())
                .map(|list| list.iter().filter_map(|p| peer(p).map_err(|e| faults.push(e)).ok()).collect()),
            ports: ports
                .filter(|p| !p.is_empty())
                .map(|list| list.iter().filter_map(|p| port(p).map_err(|e| faults.push(e)).ok()).collect()),
        };
        list.into_iter().map(read).collect()
    };
    let named = spec.policy_types.unwrap_or_default();
    // <https://kubernetes.io/docs/concepts/services-networking/network-policies/#networkpolicy-resource>
    let about = |direction: &str, otherwise: bool| match named.is_empty() {
        true => otherwise,
        false => named.iter().any(|t| t == direction),
    };
    let (is_ingress, is_egress) = (about("Ingress", true), about("Egress", spec.egress.is_some()));
    let ingress = spec.ingress.unwrap_or_default().into_iter().map(|r| (r.from, r.ports)).collect();
    let egress = spec.egress.unwrap_or_default().into_iter().map(|r| (r.to, r.ports)).collect();
    let policy = Policy {
        pods: Selector::of(&spec.pod_selector.unwrap_or_default()),
        ingress: is_ingress.then(|| rules(ingress)),
        egress: is_egress.then(|| rules(egress)),
    };
    for fault in faults {
        tracing::warn!(namespace = key.0, policy = key.1, "a part of a NetworkPolicy allows nothing: {fault}");
    }
    (key, policy)
}

fn peer(peer: &NetworkPolicyPeer) -> Result<Peer, String> {
    let net = |text: &str| text.parse::<IpNet>().map(|n| n.trunc()).map_err(|e| format!("the range {text:?}: {e}"));
    if let Some(block) = &peer.ip_block {
        let except = block.except.iter().flatten().map(|text| net(text)).collect::<Result<_, _>>()?;
        return Ok(Peer::Block { net: net(&block.cidr)?, except });
    }
    if peer.namespace_selector.is_none() && peer.pod_selector.is_none() {
        return Err("a peer that names nobody".into());
    }
    Ok(Peer::Pods {
        namespaces: peer.namespace_selector.as_ref().map(Selector::of),
        pods: peer.pod_selector.as_ref().map(Selector::of),
    })
}

fn port(port: &NetworkPolicyPort) -> Result<Ports, String> {
    let protocol = Protocol::of(port.protocol.as_deref())
        .ok_or_else(|| format!("the protocol {:?} is none of TCP, UDP and SCTP", port.protocol))?;
    let number = |n: i32| u16::try_from(n).map_err(|_| format!("the port {n} is none"));
    match &port.port {
        None => Ok(Ports::All(protocol)),
        Some(IntOrString::String(name)) => Ok(Ports::Named(protocol, name.clone())),
        Some(IntOrString::Int(first)) => {
            let (first, last) = (number(*first)?, number(port.end_port.unwrap_or(*first))?);
            match first <= last {
                true => Ok(Ports::Range(protocol, first, last)),
                false => Err(format!("the ports from {first} to {last} are none")),
            }
        }
    }
}

/// A key and what counts of a pod.
pub fn pod(object: &Pod) -> (Key, PodFacts) {
    let key = (object.namespace().unwrap_or_default(), object.name_any());
    let spec = object.spec.as_ref();
    let status = object.status.as_ref();
    let over = status.and_then(|s| s.phase.as_deref()).is_some_and(|p| p == "Succeeded" || p == "Failed");
    // Pods on the node's network are part of the node: selectors do not mean them, as in most implementations.
    let counts = !over && spec.is_none_or(|s| s.host_network != Some(true));
    let listed = status.iter().flat_map(|s| s.pod_ips.iter().flatten()).map(|ip| ip.ip.as_str());
    let first = status.and_then(|s| s.pod_ip.as_deref());
    let mut ips: Vec<IpAddr> = listed.chain(first).filter_map(|ip| ip.parse().ok()).collect();
    ips.sort();
    ips.dedup();
    let containers = spec.into_iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
    let ports = containers.flat_map(|c| c.ports.iter().flatten()).filter_map(|port| {
        let number = u16::try_from(port.container_port).ok()?;
        Some((port.name.clone()?, Protocol::of(port.protocol.as_deref())?, number))
    });
    let facts = PodFacts {
        uid: object.uid().unwrap_or_default(),
        node: spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        labels: object.labels().clone(),
        ips: if counts { ips } else { Vec::new() },
        over,
        ports: ports.collect(),
    };
    (key, facts)
}

/// The name and the labels of a namespace.
pub fn namespace(object: &Namespace) -> (String, Labels) {
    (object.name_any(), object.labels().clone())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(spec: Value) -> Policy {
        policy(serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec})).unwrap()).1
    }

    #[test]
    fn what_a_policy_is_about() {
        let check = |spec: Value, ingress: bool, egress: bool| {
            let policy = read(spec.clone());
            assert_eq!((policy.ingress.is_some(), policy.egress.is_some()), (ingress, egress), "{spec}");
        };
        check(json!({"podSelector": {}}), true, false);
        check(json!({"podSelector": {}, "egress": [{}]}), true, true);
        check(json!({"podSelector": {}, "policyTypes": ["Egress"]}), false, true);
        check(json!({"podSelector": {}, "policyTypes": ["Ingress"], "egress": [{}]}), true, false);
        check(json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}), true, true);
    }

    /// Nobody must not become everybody.
    #[test]
    fn what_is_malformed_allows_nothing() {
        let check = |rule: Value, expect: &[Rule]| {
            let policy = read(json!({"podSelector": {}, "ingress": [rule.clone()]}));
            assert_eq!(policy.ingress.as_deref(), Some(expect), "{rule}");
        };
        let everybody = || Rule { peers: None, ports: None };
        check(json!({}), &[everybody()]);
        check(json!({"from": [], "ports": []}), &[everybody()]);
        let nobody = || Rule { peers: Some(Vec::new()), ports: None };
        check(json!({"from": [{}]}), &[nobody()]);
        check(json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}), &[nobody()]);
        check(json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["x"]}}]}), &[nobody()]);
        let nothing = || Rule { peers: None, ports: Some(Vec::new()) };
        check(json!({"ports": [{"protocol": "GRE", "port": 1}]}), &[nothing()]);
        check(json!({"ports": [{"port": 70000}]}), &[nothing()]);
        check(json!({"ports": [{"port": 20, "endPort": 10}]}), &[nothing()]);
        let range = Ports::Range(Protocol::Udp, 10, 20);
        let some = Rule { peers: None, ports: Some(vec![range, Ports::All(Protocol::Tcp)]) };
        check(json!({"ports": [{"port": 10, "endPort": 20, "protocol": "UDP"}, {}]}), &[some]);
    }

    #[test]
    fn selectors() {
        let labels: Labels = [("app".to_owned(), "db".to_owned())].into();
        let check = |selector: Value, expect: bool| {
            let selector = Selector::of(&serde_json::from_value(selector).unwrap());
            assert_eq!(selector.matches(&labels), expect, "{}", selector.text);
        };
        check(json!({}), true);
        check(json!({"matchLabels": {"app": "db"}}), true);
        check(json!({"matchLabels": {"app": "web"}}), false);
        check(json!({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["x"]}]}), true);
        check(json!({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}), false);
        check(json!({"matchExpressions": [{"key": "app", "operator": "Unheard"}]}), false);
    }

    #[test]
    fn which_pods_have_addresses() {
        let check = |spec: Value, status: Value, ips: &[&str]| {
            let object =
                json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec, "status": status});
            let facts = pod(&serde_json::from_value(object.clone()).unwrap()).1;
            let expect: Vec<IpAddr> = ips.iter().map(|ip| ip.parse().unwrap()).collect();
            assert_eq!(facts.ips, expect, "{object}");
        };
        let spec = json!({"containers": []});
        check(spec.clone(), json!({}), &[]);
        check(spec.clone(), json!({"podIP": "10.1.0.2"}), &["10.1.0.2"]);
        let both = json!({"podIP": "10.1.0.2", "podIPs": [{"ip": "10.1.0.2"}, {"ip": "fd00::2"}]});
        check(spec.clone(), both.clone(), &["10.1.0.2", "fd00::2"]);
        check(spec, json!({"podIP": "10.1.0.2", "phase": "Succeeded"}), &[]);
        check(json!({"containers": [], "hostNetwork": true}), both, &[]);
    }
}
