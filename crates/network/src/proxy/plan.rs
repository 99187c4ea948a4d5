//! From Services and EndpointSlices to rules. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::{
    core::v1::{Service, ServicePort},
    discovery::v1::EndpointSlice,
};

use super::{ProxyConfig, State, rules::Ruleset};

/// An endpoint that can be used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Endpoint {
    address: String,
    port: u16,
    local: bool,
}

/// How well an endpoint is, as its slice says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Ready,
    /// Ending, but still answering: used when nothing else is left (KEP-1669).
    Serving,
    Unusable,
}

/// The rules for everything in `state`.
pub fn plan(state: &State, config: &ProxyConfig) -> Ruleset {
    let mut rules = Ruleset::default();
    let mut slices: BTreeMap<(&str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
    for ((namespace, _), slice) in &state.slices {
        let service = slice.metadata.labels.as_ref().and_then(|l| l.get("kubernetes.io/service-name"));
        if let Some(service) = service.filter(|_| slice.address_type == "IPv4") {
            slices.entry((namespace, service)).or_default().push(slice);
        }
    }
    for ((namespace, name), service) in &state.services {
        let slices = slices.get(&(namespace.as_str(), name.as_str())).map(Vec::as_slice).unwrap_or_default();
        for port in service.spec.iter().flat_map(|s| s.ports.iter().flatten()) {
            plan_port(&mut rules, &format!("{namespace}/{name}"), service, port, slices, config);
        }
    }
    rules
}

fn plan_port(
    rules: &mut Ruleset,
    name: &str,
    service: &Service,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    config: &ProxyConfig,
) {
    let Some(spec) = &service.spec else { return };
    let protocol = port.protocol.as_deref().unwrap_or("TCP").to_lowercase();
    let cluster_ip = spec.cluster_ip.as_deref().filter(|ip| ip.parse::<std::net::Ipv4Addr>().is_ok());
    let Some(cluster_ip) = cluster_ip.filter(|_| spec.type_.as_deref() != Some("ExternalName")) else { return };
    let all = endpoints(port, slices, &config.node_name);
    let local: Vec<Endpoint> = all.iter().filter(|e| e.local).cloned().collect();
    let inside = if spec.internal_traffic_policy.as_deref() == Some("Local") { &local } else { &all };
    let outside_local = spec.external_traffic_policy.as_deref() == Some("Local");
    let id = format!("{name}:{}/{protocol}", port.port);
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
        config.and_then(|c| c.timeout_seconds).unwrap_or(10_800).max(1) as u32
    });
    let balance = Balance { id: &id, protocol: &protocol, affinity };

    let address = |ip: &str| format!("{ip} . {protocol} . {}", port.port);
    if inside.is_empty() {
        rules.elements.insert(("dead_services", address(cluster_ip)), "goto refuse".into());
    } else {
        let chain = balance.chain(rules, "svc", inside, |rules| {
            // What comes from outside the pods' network has to come back this way.
            rules.push(format!("ip daddr {cluster_ip} ip saddr != {} jump mark_masquerade", config.cluster_cidr));
        });
        rules.elements.insert(("services", address(cluster_ip)), format!("goto {chain}"));
        if protocol == "udp" {
            rules.datagrams.extend(inside.iter().map(|e| (cluster_ip.to_owned(), port.port as u16, e.address.clone())));
        }
    }

    let status = service.status.as_ref().and_then(|s| s.load_balancer.as_ref()).and_then(|l| l.ingress.as_ref());
    let balancers = status.into_iter().flatten().filter_map(|i| i.ip.as_deref());
    let external: Vec<&str> = spec
        .external_ips
        .iter()
        .flatten()
        .map(String::as_str)
        .chain(balancers)
        .filter(|ip| ip.parse::<std::net::Ipv4Addr>().is_ok())
        .collect();
    let node_port = port.node_port.filter(|n| *n > 0);
    if external.is_empty() && node_port.is_none() {
        return;
    }
    let usable = if outside_local { &local } else { &all };
    let verdict = if usable.is_empty() && all.is_empty() {
        None
    } else {
        let chain = format!("ext_{}", hash(&id));
        let mut body = Vec::new();
        if outside_local {
            // The client's address is kept, so only endpoints on this node can answer; pods may use all of them.
            if !all.is_empty() {
                let inner = balance.chain(rules, "all", &all, |_| {});
                body.push(format!("ip saddr {} goto {inner}", config.cluster_cidr));
                body.push("fib saddr type local jump mark_masquerade".into());
                body.push(format!("fib saddr type local goto {inner}"));
            }
            match local.is_empty() {
                true => body.push("drop".into()),
                false => {
                    let inner = balance.chain(rules, "loc", &local, |_| {});
                    body.push(format!("goto {inner}"));
                }
            }
        } else {
            let inner = balance.chain(rules, "all", &all, |_| {});
            body.push("jump mark_masquerade".into());
            body.push(format!("goto {inner}"));
        }
        rules.chains.insert(chain.clone(), body);
        Some(format!("goto {chain}"))
    };
    for ip in external {
        match &verdict {
            Some(verdict) => rules.elements.insert(("services", address(ip)), verdict.clone()),
            None => rules.elements.insert(("dead_services", address(ip)), "goto refuse".into()),
        };
    }
    if let Some(node_port) = node_port {
        let key = format!("{protocol} . {node_port}");
        match verdict {
            Some(verdict) => rules.elements.insert(("nodeports", key), verdict),
            None => rules.elements.insert(("dead_nodeports", key), "goto refuse".into()),
        };
    }
}

/// How the endpoints of a port are chosen from.
struct Balance<'a> {
    id: &'a str,
    protocol: &'a str,
    affinity: Option<u32>,
}

impl Balance<'_> {
    /// A chain that picks one of `endpoints`, after the rules that `before` adds.
    fn chain(
        &self,
        rules: &mut Ruleset,
        kind: &str,
        endpoints: &[Endpoint],
        before: impl Fn(&mut Vec<String>),
    ) -> String {
        let name = format!("{kind}_{}", hash(self.id));
        let mut body = Vec::new();
        before(&mut body);
        let targets: Vec<String> = endpoints.iter().map(|e| self.endpoint(rules, e)).collect();
        if self.affinity.is_some() {
            body.extend(targets.iter().map(|t| format!("ip saddr @aff_{t} goto {t}")));
        }
        match &targets[..] {
            [only] => body.push(format!("goto {only}")),
            many => {
                let map: Vec<String> = many.iter().enumerate().map(|(i, t)| format!("{i} : goto {t}")).collect();
                body.push(format!("numgen random mod {} vmap {{ {} }}", many.len(), map.join(", ")));
            }
        }
        rules.chains.insert(name.clone(), body);
        name
    }

    fn endpoint(&self, rules: &mut Ruleset, e: &Endpoint) -> String {
        let name = format!("ep_{}", hash(&format!("{}>{}:{}", self.id, e.address, e.port)));
        let mut body = vec![format!("ip saddr {} jump mark_masquerade", e.address)];
        if let Some(seconds) = self.affinity {
            let set = format!("aff_{name}");
            body.push(format!("update @{set} {{ ip saddr timeout {seconds}s }}"));
            rules.affinities.insert(set, seconds);
        }
        body.push(format!("meta l4proto {} dnat ip to {}:{}", self.protocol, e.address, e.port));
        rules.chains.insert(name.clone(), body);
        name
    }
}

/// The endpoints of a service's port that take new connections, in a stable order.
fn endpoints(port: &ServicePort, slices: &[&EndpointSlice], node: &str) -> Vec<Endpoint> {
    let mut found: BTreeMap<(String, u16), (Condition, bool)> = BTreeMap::new();
    for slice in slices {
        let wanted = port.name.as_deref().unwrap_or_default();
        let same = |p: &&k8s_openapi::api::discovery::v1::EndpointPort| {
            p.name.as_deref().unwrap_or_default() == wanted
                && p.protocol.as_deref().unwrap_or("TCP") == port.protocol.as_deref().unwrap_or("TCP")
        };
        let Some(number) = slice.ports.iter().flatten().find(same).and_then(|p| p.port) else { continue };
        let Ok(number) = u16::try_from(number) else { continue };
        for endpoint in slice.endpoints.iter().flatten() {
            let conditions = endpoint.conditions.as_ref();
            let is = |value: Option<bool>, unset: bool| value.unwrap_or(unset);
            let ready = is(conditions.and_then(|c| c.ready), true);
            let serving = is(conditions.and_then(|c| c.serving), ready);
            let terminating = is(conditions.and_then(|c| c.terminating), false);
            let condition = match (ready, serving && terminating) {
                (true, _) => Condition::Ready,
                (false, true) => Condition::Serving,
                (false, false) => Condition::Unusable,
            };
            let local = endpoint.node_name.as_deref() == Some(node);
            // Only the first address of an endpoint counts; that is what the slice's consumers agreed on.
            let address = endpoint.addresses.first().filter(|a| a.parse::<std::net::Ipv4Addr>().is_ok());
            if let Some(address) = address {
                let entry = found.entry((address.clone(), number)).or_insert((condition, local));
                // While an endpoint moves from one slice to another it may stand in both.
                if condition == Condition::Ready {
                    *entry = (condition, local);
                }
            }
        }
    }
    let pick = |wanted: Condition| -> Vec<Endpoint> {
        let all = found.iter().filter(|(_, (condition, _))| *condition == wanted);
        all.map(|((address, port), (_, local))| Endpoint { address: address.clone(), port: *port, local: *local })
            .collect()
    };
    let ready = pick(Condition::Ready);
    if ready.is_empty() { pick(Condition::Serving) } else { ready }
}

/// Flows of datagrams that have lost their endpoint, or that were refused before there was one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stale {
    /// The endpoint is gone.
    Endpoint {
        /// The service's address.
        service: String,
        /// The endpoint's address.
        endpoint: String,
    },
    /// The service had no endpoint before.
    Service {
        /// The service's address.
        service: String,
        /// Its port.
        port: u16,
    },
}

impl Stale {
    /// The arguments for `conntrack`.
    pub fn arguments(&self) -> Vec<String> {
        let words: Vec<String> = match self {
            Stale::Endpoint { service, endpoint } => {
                vec!["--orig-dst".into(), service.clone(), "--dst-nat".into(), endpoint.clone()]
            }
            Stale::Service { service, port } => {
                vec!["--orig-dst".into(), service.clone(), "--dport".into(), port.to_string()]
            }
        };
        ["-D", "-p", "udp"].into_iter().map(str::to_owned).chain(words).collect()
    }
}

/// The flows that a change from `old` to `new` leaves behind.
pub fn stale(old: Option<&Ruleset>, new: &Ruleset) -> Vec<Stale> {
    let Some(old) = old else { return Vec::new() };
    let mut out = BTreeSet::new();
    for (service, _, endpoint) in old.datagrams.difference(&new.datagrams) {
        out.insert(Stale::Endpoint { service: service.clone(), endpoint: endpoint.clone() });
    }
    let served = |rules: &Ruleset| -> BTreeSet<(String, u16)> {
        rules.datagrams.iter().map(|(s, p, _)| (s.clone(), *p)).collect()
    };
    for (service, port) in served(new).difference(&served(old)) {
        out.insert(Stale::Service { service: service.clone(), port: *port });
    }
    out.into_iter().collect()
}

/// A short name for nftables, which allows no dashes or slashes: FNV-1a of 64 bits.
fn hash(text: &str) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn state(service: Value, endpoints: Value) -> State {
        let mut state = State::default();
        let service: Service =
            serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "n"}, "spec": service})).unwrap();
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "s-1", "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
        }))
        .unwrap();
        state.services.insert(("n".into(), "s".into()), service);
        state.slices.insert(("n".into(), "s-1".into()), slice);
        state
    }

    fn config() -> ProxyConfig {
        ProxyConfig { node_name: "here".into(), cluster_cidr: "10.244.0.0/16".parse().unwrap(), ..Default::default() }
    }

    fn targets(rules: &Ruleset) -> Vec<String> {
        let all = rules.chains.iter().filter(|(name, _)| name.starts_with("ep_"));
        let mut all: Vec<String> = all.filter_map(|(_, r)| r.last()?.rsplit(' ').next().map(str::to_owned)).collect();
        all.sort();
        all
    }

    fn endpoint(address: &str, ready: bool, terminating: bool) -> Value {
        json!({"addresses": [address], "nodeName": "there", "conditions": {"ready": ready, "serving": ready || terminating, "terminating": terminating}})
    }

    #[test]
    fn only_ready_endpoints_take_connections() {
        let port = json!({"clusterIP": "10.96.0.9", "ports": [{"port": 80}]});
        let check = |endpoints: Value, expect: &[&str]| {
            let rules = plan(&state(port.clone(), endpoints), &config());
            assert_eq!(targets(&rules), expect);
            let map = if expect.is_empty() { "dead_services" } else { "services" };
            assert!(rules.elements.contains_key(&(map, "10.96.0.9 . tcp . 80".to_owned())), "{rules:?}");
            assert_eq!(rules.elements.len(), 1);
        };
        check(json!([endpoint("10.244.0.2", true, false), endpoint("10.244.0.3", false, false)]), &["10.244.0.2:8080"]);
        check(json!([endpoint("10.244.0.2", true, false), endpoint("10.244.0.3", false, true)]), &["10.244.0.2:8080"]);
        check(json!([endpoint("10.244.0.3", false, true), endpoint("10.244.0.4", false, false)]), &["10.244.0.3:8080"]);
        check(json!([]), &[]);
    }

    #[test]
    fn headless_and_external_services_have_no_rules() {
        for service in [
            json!({"clusterIP": "None", "ports": [{"port": 80}]}),
            json!({"type": "ExternalName", "externalName": "x"}),
        ] {
            assert_eq!(
                plan(&state(service, json!([endpoint("10.244.0.2", true, false)])), &config()),
                Ruleset::default()
            );
        }
    }

    #[test]
    fn a_local_policy_uses_only_this_nodes_endpoints() {
        let service = json!({"type": "NodePort", "clusterIP": "10.96.0.9", "externalTrafficPolicy": "Local", "ports": [{"port": 80, "nodePort": 30080}]});
        let rules = plan(&state(service.clone(), json!([endpoint("10.244.0.2", true, false)])), &config());
        let chain = rules.chains.iter().find(|(n, _)| n.starts_with("ext_")).unwrap().1;
        assert_eq!(chain.last().unwrap(), "drop");
        let mut here = endpoint("10.244.0.2", true, false);
        here["nodeName"] = "here".into();
        let rules = plan(&state(service, json!([here])), &config());
        let chain = rules.chains.iter().find(|(n, _)| n.starts_with("ext_")).unwrap().1;
        assert!(chain.last().unwrap().starts_with("goto loc_"));
        assert!(!chain.iter().any(|r| r == "jump mark_masquerade"), "the client's address is kept");
    }

    #[test]
    fn a_change_touches_only_what_changed() {
        let port = json!({"clusterIP": "10.96.0.9", "ports": [{"port": 80}]});
        let one = plan(&state(port.clone(), json!([endpoint("10.244.0.2", true, false)])), &config());
        let two = plan(
            &state(port, json!([endpoint("10.244.0.2", true, false), endpoint("10.244.0.3", true, false)])),
            &config(),
        );
        let script = two.script(Some(&one));
        assert!(!script.contains("delete table") && !script.contains("element"), "{script}");
        assert_eq!(script.matches("add chain").count(), 1);
        assert_eq!(script.matches("flush chain").count(), 1);
        assert_eq!(one.script(Some(&one)), "");
        let back = one.script(Some(&two));
        assert!(back.contains("delete chain"), "{back}");
    }

    #[test]
    fn datagram_flows_to_endpoints_that_left_are_forgotten() {
        let mut old = Ruleset::default();
        old.datagrams.insert(("10.96.0.10".into(), 53, "10.244.0.2".into()));
        let mut new = Ruleset::default();
        new.datagrams.insert(("10.96.0.10".into(), 53, "10.244.0.3".into()));
        assert_eq!(
            stale(Some(&old), &new),
            [Stale::Endpoint { service: "10.96.0.10".into(), endpoint: "10.244.0.2".into() }]
        );
        assert_eq!(stale(Some(&Ruleset::default()), &new), [Stale::Service { service: "10.96.0.10".into(), port: 53 }]);
    }
}
