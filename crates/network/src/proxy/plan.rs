//! From Services, EndpointSlices and what is thought of the machines to rules. Pure.

use std::{collections::BTreeMap, net::Ipv4Addr};

use k8s_openapi::api::{
    core::v1::{Service, ServicePort},
    discovery::v1::EndpointSlice,
};

use super::{
    ProxyConfig,
    dead::Dead,
    endpoints::{self, Endpoint, Endpoints, Scope, View},
    rules::Ruleset,
    stale::{Kind, Reach},
    state::State,
};
use crate::{relay::kernel::MARK, verdict::Verdict};

/// The rules for everything in `state`.
pub fn plan(state: &State, config: &ProxyConfig, verdicts: &BTreeMap<String, Verdict>) -> Ruleset {
    let mut rules = Ruleset::default();
    let view = View::new(state, &config.node_name, verdicts);
    for (namespace, name, service, slices) in view.services() {
        for port in service.spec.iter().flat_map(|s| s.ports.iter().flatten()) {
            plan_port(&mut rules, &format!("{namespace}/{name}"), service, port, &slices, config, &view);
        }
    }
    rules.sets.extend(Dead::of(&view, &config.node_ips).elements());
    if let (Some(table), Some(relays)) = (config.relayed(&view), config.relays) {
        let elements = table.elements();
        // Who relays nothing needs nothing of the kernel for it.
        if !elements.is_empty() {
            rules.sets.extend(elements);
            hand_over(&mut rules, relays.port);
        }
    }
    rules
}

/// Hands connections to the relay. Should it be gone, `tproxy` does not match, and the other rules serve.
fn hand_over(rules: &mut Ruleset, port: u16) {
    let tcp = "meta nfproto ipv4 meta l4proto tcp";
    let mark = format!("meta mark set meta mark | {MARK:#x} accept");
    let own = "fib daddr type local ip daddr != 127.0.0.0/8";
    rules.base_chain(
        "relay_prerouting",
        "type filter hook prerouting priority mangle; policy accept;",
        vec![
            // What belongs to one of the relay's connections.
            format!("{tcp} socket transparent 1 {mark}"),
            format!("ip daddr . tcp dport @relayed tproxy ip to 127.0.0.1:{port} {mark}"),
            format!("{own} tcp dport @relayed_ports tproxy ip to 127.0.0.1:{port} {mark}"),
        ],
    );
    rules.base_chain(
        "relay_output",
        // Before the chain that picks an endpoint: the first translation counts.
        "type nat hook output priority -110; policy accept;",
        vec![
            format!("ip daddr . tcp dport @relayed redirect to :{port}"),
            format!("{own} tcp dport @relayed_ports redirect to :{port}"),
        ],
    );
}

fn plan_port(
    rules: &mut Ruleset,
    name: &str,
    service: &Service,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    config: &ProxyConfig,
    view: &View<'_>,
) {
    let Some(cluster_ip) = endpoints::cluster_ip(service) else { return };
    let protocol = port.protocol.as_deref().unwrap_or("TCP").to_lowercase();
    let known = Endpoints::of(port, slices, view);
    let (internal, outer) = endpoints::policies(service);
    let all = known.takers(Scope::Cluster, view);
    let local = known.takers(Scope::Local, view);
    let inside = if internal == Scope::Local { &local } else { &all };
    let outside_local = outer == Scope::Local;
    let id = format!("{name}:{}/{protocol}", port.port);
    let balance = Balance { id: &id, protocol: &protocol, affinity: endpoints::affinity(service) };
    let keep = |rules: &mut Ruleset, address: Option<Ipv4Addr>, port: u16, takers: &[&Endpoint]| {
        let of = |kind| move |e: &Endpoint| Reach { kind, address, port, endpoint: e.address.ip() };
        match &*protocol {
            // Flows of datagrams stay where they are while somebody answers there.
            "udp" if !takers.is_empty() => rules.reach.extend(known.keepers().map(of(Kind::Datagrams))),
            "tcp" => rules.reach.extend(takers.iter().copied().map(of(Kind::Opening))),
            _ => {}
        }
    };

    let number = port.port as u16;
    let address = |ip: Ipv4Addr| format!("{ip} . {protocol} . {number}");
    keep(rules, Some(cluster_ip), number, inside);
    if inside.is_empty() {
        rules.elements.insert(("dead_services", address(cluster_ip)), "goto refuse".into());
    } else {
        let chain = balance.chain(rules, "svc", inside, |rules| {
            // What comes from outside the pods' network has to come back this way.
            rules.push(format!("ip daddr {cluster_ip} ip saddr != {} jump mark_masquerade", config.cluster_cidr));
        });
        rules.elements.insert(("services", address(cluster_ip)), format!("goto {chain}"));
    }

    let external = endpoints::external(service);
    let node_port = port.node_port.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
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
    // Pods and processes of this node may use all of them, whatever the policy.
    let outside: Vec<&Endpoint> = all.iter().chain(usable).copied().collect();
    let outside = &outside[..];
    for ip in external {
        keep(rules, Some(ip), number, outside);
        match &verdict {
            Some(verdict) => rules.elements.insert(("services", address(ip)), verdict.clone()),
            None => rules.elements.insert(("dead_services", address(ip)), "goto refuse".into()),
        };
    }
    if let Some(node_port) = node_port {
        keep(rules, None, node_port, outside);
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
    /// A chain that picks one of `endpoints`, after the rules that `before` adds. A client that belongs to an endpoint
    /// which is not among them moves on.
    fn chain(
        &self,
        rules: &mut Ruleset,
        kind: &str,
        endpoints: &[&Endpoint],
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
        let name = format!("ep_{}", hash(&format!("{}>{}", self.id, e.address)));
        let mut body = vec![format!("ip saddr {} jump mark_masquerade", e.address.ip())];
        if let Some(seconds) = self.affinity {
            let set = format!("aff_{name}");
            body.push(format!("update @{set} {{ ip saddr timeout {seconds}s }}"));
            rules.affinities.insert(set, seconds);
        }
        body.push(format!("meta l4proto {} dnat ip to {}", self.protocol, e.address));
        rules.chains.insert(name.clone(), body);
        name
    }
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
    use crate::proxy::state;

    fn state(service: Value, endpoints: Value) -> State {
        let mut state = State::default();
        let service: Service =
            serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "n"}, "spec": service})).unwrap();
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "s-1", "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
        }))
        .unwrap();
        state.services.extend([state::service(service)]);
        state.slices.extend([state::slice(slice)]);
        state
    }

    fn config() -> ProxyConfig {
        ProxyConfig { node_name: "here".into(), cluster_cidr: "10.244.0.0/16".parse().unwrap(), ..Default::default() }
    }

    /// Nothing is thought of anybody.
    fn calm(state: &State, config: &ProxyConfig) -> Ruleset {
        plan(state, config, &BTreeMap::new())
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
            let rules = calm(&state(port.clone(), endpoints), &config());
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
                calm(&state(service, json!([endpoint("10.244.0.2", true, false)])), &config()),
                Ruleset::default()
            );
        }
    }

    #[test]
    fn a_local_policy_uses_only_this_nodes_endpoints() {
        let service = json!({"type": "NodePort", "clusterIP": "10.96.0.9", "externalTrafficPolicy": "Local", "ports": [{"port": 80, "nodePort": 30080}]});
        let rules = calm(&state(service.clone(), json!([endpoint("10.244.0.2", true, false)])), &config());
        let chain = rules.chains.iter().find(|(n, _)| n.starts_with("ext_")).unwrap().1;
        assert_eq!(chain.last().unwrap(), "drop");
        let mut here = endpoint("10.244.0.2", true, false);
        here["nodeName"] = "here".into();
        let rules = calm(&state(service, json!([here])), &config());
        let chain = rules.chains.iter().find(|(n, _)| n.starts_with("ext_")).unwrap().1;
        assert!(chain.last().unwrap().starts_with("goto loc_"));
        assert!(!chain.iter().any(|r| r == "jump mark_masquerade"), "the client's address is kept");
    }

    #[test]
    fn a_change_touches_only_what_changed() {
        let port = json!({"clusterIP": "10.96.0.9", "ports": [{"port": 80}]});
        let one = calm(&state(port.clone(), json!([endpoint("10.244.0.2", true, false)])), &config());
        let two = calm(
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
}
