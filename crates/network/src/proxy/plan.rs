//! From Services, EndpointSlices and what is thought of the machines to rules. Pure.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::ServicePort;

use super::{
    ProxyConfig,
    dead::{self, Dead},
    endpoints::{self, Endpoint, Endpoints, Scope, Served, View},
    family::Family,
    rules::{Affinity, DEAD_NODE_PORTS, DEAD_SERVICES, NODE_PORTS, PODS, RELAYED, RELAYED_PORTS, Ruleset, SERVICES},
    stale::{Front, Kind, Reach},
    state::State,
};
use crate::{
    relay::{Listens, kernel::MARK},
    verdict::Verdict,
};

/// The rules for everything in `state`.
pub fn plan(state: &State, config: &ProxyConfig, verdicts: &BTreeMap<String, Verdict>) -> Ruleset {
    let mut rules = Ruleset::default();
    let view = View::new(state, &config.node_name, verdicts);
    for served in view.services() {
        let Some(cluster_ip) = served.cluster_ip else { continue };
        for port in served.ports() {
            // The API knows no others.
            if let Ok(number) = u16::try_from(port.port) {
                plan_port(&mut rules, &served, cluster_ip, port, number, &view);
            }
        }
    }
    let pods = config.pods(&view);
    rules.sets.extend(pods.iter().map(|net| (Family::of(net.addr()).pick(PODS), dead::range(net))));
    rules.sets.extend(Dead::of(&view, &config.node_ips).elements());
    if let (Some(table), Some(relays)) = (config.relayed(&view), config.relays) {
        let elements = table.elements();
        // Who relays nothing needs nothing of the kernel for it.
        if !elements.is_empty() {
            rules.sets.extend(elements);
            hand_over(&mut rules, relays.listens);
        }
    }
    rules
}

/// Hands connections to the relay. Should it be gone, `tproxy` does not match, and the other rules serve.
fn hand_over(rules: &mut Ruleset, listens: Listens) {
    let mark = format!("meta mark set meta mark | {MARK:#x} accept");
    let (mut comes, mut goes) = (Vec::new(), Vec::new());
    for family in listens.families() {
        let (ip, own, to, port) = (family.ip(), family.own(), listens.on(family), listens.port);
        let (relayed, ports) = (family.pick(RELAYED), family.pick(RELAYED_PORTS));
        let protocol = family.pick(["ipv4", "ipv6"]);
        // What belongs to one of the relay's connections. A client that begins anew from a port that it used just now is a
        // matter for `tproxy`, which knows what to do with a socket that only waits for what may still be on its way.
        let begun = format!("meta nfproto {protocol} meta l4proto tcp tcp flags & (syn | ack) != syn");
        comes.push(format!("{begun} socket transparent 1 {mark}"));
        comes.push(format!("{ip} daddr . tcp dport @{relayed} tproxy {ip} to {to} {mark}"));
        comes.push(format!("{own} tcp dport @{ports} tproxy {ip} to {to} {mark}"));
        goes.push(format!("{ip} daddr . tcp dport @{relayed} redirect to :{port}"));
        goes.push(format!("{own} tcp dport @{ports} redirect to :{port}"));
    }
    rules.base_chain("relay_prerouting", "type filter hook prerouting priority mangle; policy accept;", comes);
    // Before the chain that picks an endpoint: the first translation counts.
    rules.base_chain("relay_output", "type nat hook output priority -110; policy accept;", goes);
}

fn plan_port(
    rules: &mut Ruleset,
    served: &Served<'_>,
    cluster_ip: IpAddr,
    port: &ServicePort,
    number: u16,
    view: &View<'_>,
) {
    let family = served.family;
    let (ip_word, pods) = (family.ip(), family.pick(PODS));
    let protocol = port.protocol.as_deref().unwrap_or("TCP").to_lowercase();
    let known = Endpoints::of(port, &served.slices, view);
    let (internal, outer) = endpoints::policies(served.service);
    let all = known.takers(Scope::Cluster, view);
    let local = known.takers(Scope::Local, view);
    let inside = if internal == Scope::Local { &local } else { &all };
    let outside_local = outer == Scope::Local;
    let id = format!("{}/{}:{number}/{protocol}/{}", served.namespace, served.name, family.name());
    let balance = Balance { id: &id, family, protocol: &protocol, affinity: endpoints::affinity(served.service) };
    let keep = |rules: &mut Ruleset, front: Front, port: u16, takers: &[&Endpoint]| {
        let of = |kind| move |e: &Endpoint| Reach { kind, front, port, endpoint: e.address.ip() };
        match &*protocol {
            // Flows of datagrams stay where they are while somebody answers there.
            "udp" if !takers.is_empty() => rules.reach.extend(known.keepers().map(of(Kind::Datagrams))),
            "tcp" => rules.reach.extend(takers.iter().copied().map(of(Kind::Opening))),
            _ => {}
        }
    };

    let address = |ip: IpAddr| format!("{ip} . {protocol} . {number}");
    keep(rules, Front::Address(cluster_ip), number, inside);
    if inside.is_empty() {
        rules.elements.insert((family.pick(DEAD_SERVICES), address(cluster_ip)), "goto refuse".into());
    } else {
        let chain = balance.chain(rules, "svc", inside, |rules| {
            // What comes from outside the pods' network has to come back this way.
            rules.push(format!("{ip_word} daddr {cluster_ip} {ip_word} saddr != @{pods} jump mark_masquerade"));
        });
        rules.elements.insert((family.pick(SERVICES), address(cluster_ip)), format!("goto {chain}"));
    }

    let external = served.external();
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
                body.push(format!("{ip_word} saddr @{pods} goto {inner}"));
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
        keep(rules, Front::Address(ip), number, outside);
        match &verdict {
            Some(verdict) => {
                let verdict = match served.admitted(ip) {
                    Some(ranges) => format!("goto {}", guard(rules, &id, family, &ranges, verdict)),
                    None => verdict.clone(),
                };
                rules.elements.insert((family.pick(SERVICES), address(ip)), verdict)
            }
            None => rules.elements.insert((family.pick(DEAD_SERVICES), address(ip)), "goto refuse".into()),
        };
    }
    if let Some(node_port) = node_port {
        keep(rules, Front::Node(family), node_port, outside);
        let key = format!("{protocol} . {node_port}");
        match verdict {
            Some(verdict) => rules.elements.insert((family.pick(NODE_PORTS), key), verdict),
            None => rules.elements.insert((family.pick(DEAD_NODE_PORTS), key), "goto refuse".into()),
        };
    }
}

/// The chain that drops what comes from elsewhere than these ranges.
fn guard(rules: &mut Ruleset, id: &str, family: Family, ranges: &[IpNet], verdict: &str) -> String {
    let chain = format!("guard_{}", hash(id));
    let ip = family.ip();
    let mut body = Vec::new();
    let ranges = IpNet::aggregate(&ranges.to_vec());
    if !ranges.iter().any(|range| range.prefix_len() == 0) {
        let list: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        body.push(match list.is_empty() {
            true => "drop".to_owned(),
            false => format!("{ip} saddr != {{ {} }} drop", list.join(", ")),
        });
    }
    body.push(verdict.to_owned());
    rules.chains.insert(chain.clone(), body);
    chain
}

/// How the endpoints of a port are chosen from.
struct Balance<'a> {
    id: &'a str,
    family: Family,
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
            let ip = self.family.ip();
            body.extend(targets.iter().map(|t| format!("{ip} saddr @aff_{t} goto {t}")));
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
        let ip = self.family.ip();
        let mut body = vec![format!("{ip} saddr {} jump mark_masquerade", e.address.ip())];
        if let Some(seconds) = self.affinity {
            let set = format!("aff_{name}");
            body.push(format!("update @{set} {{ {ip} saddr timeout {seconds}s }}"));
            rules.affinities.insert(set, Affinity { family: self.family, seconds });
        }
        body.push(format!("meta l4proto {} dnat {ip} to {}", self.protocol, e.address));
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
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::proxy::state;

    fn state(service: Value, endpoints: Value) -> State {
        in_families(service, &[("IPv4", endpoints)])
    }

    /// With one slice for each of these.
    fn in_families(service: Value, slices: &[(&str, Value)]) -> State {
        let mut state = State::default();
        let service = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": service,
            "status": {"loadBalancer": {"ingress": service["ingress"]}}});
        state.services.extend([state::service(serde_json::from_value(service).unwrap())]);
        for (number, (family, endpoints)) in slices.iter().enumerate() {
            let slice = json!({
                "metadata": {"name": format!("s-{number}"), "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
                "addressType": family, "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
            });
            state.slices.extend([state::slice(serde_json::from_value(slice).unwrap())]);
        }
        state
    }

    fn config() -> ProxyConfig {
        let cluster_cidrs = vec!["10.244.0.0/16".parse().unwrap()];
        ProxyConfig { node_name: "here".into(), cluster_cidrs, ..Default::default() }
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
            let map = if expect.is_empty() { "dead_services4" } else { "services4" };
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
                calm(&State::default(), &config())
            );
        }
    }

    #[test]
    fn who_comes_to_a_load_balancer() {
        let check = |ranges: &[&str], external: &[&str], expect: Option<&[&str]>| {
            let service = json!({"type": "LoadBalancer", "clusterIP": "10.96.0.9", "loadBalancerSourceRanges": ranges,
                "externalIPs": external, "ports": [{"port": 80, "nodePort": 30080}], "ingress": [{"ip": "192.0.2.8"}]});
            let rules = calm(&state(service, json!([endpoint("10.244.0.2", true, false)])), &config());
            let of = |map: &'static str, key: &str| rules.elements[&(map, key.to_owned())].replace("goto ", "");
            // All other ways in stay as they are.
            let open = of("nodeports4", "tcp . 30080");
            assert!(!of("services4", "10.96.0.9 . tcp . 80").starts_with("guard_"));
            let chain = of("services4", "192.0.2.8 . tcp . 80");
            let Some(expect) = expect else { return assert_eq!(chain, open) };
            let body: Vec<String> = expect.iter().map(|rule| rule.replace("OPEN", &open)).collect();
            assert_eq!(rules.chains[&chain], body, "{ranges:?}");
        };
        check(&[], &[], None);
        check(&["198.51.100.0/24"], &[], Some(&["ip saddr != { 198.51.100.0/24 } drop", "goto OPEN"]));
        let two = ["198.51.100.0/25", " 198.51.100.128/25", "fd00::/64"];
        check(&two, &[], Some(&["ip saddr != { 198.51.100.0/24 } drop", "goto OPEN"]));
        check(&["0.0.0.0/0"], &[], Some(&["goto OPEN"]));
        check(&["fd00::/64"], &[], Some(&["drop", "goto OPEN"]));
        check(&["nonsense"], &[], Some(&["drop", "goto OPEN"]));
        check(&["198.51.100.0/24"], &["192.0.2.8"], None);
    }

    #[test]
    fn each_family_has_its_own_endpoints() {
        let four = ("IPv4", json!([endpoint("10.244.0.2", true, false)]));
        let six = ("IPv6", json!([endpoint("fd00::2", true, false)]));
        let check = |own: &[&str], slices: &[(&str, Value)], elements: &[&str], endpoints: &[&str]| {
            let service = json!({"type": "LoadBalancer", "clusterIP": own[0], "clusterIPs": own,
                "externalIPs": ["192.0.2.7", "2001:db8::7", "nonsense"], "ports": [{"port": 80, "nodePort": 30080}],
                "ingress": [{"ip": "2001:db8::8"}, {"ip": "192.0.2.8", "ipMode": "Proxy"}]});
            let rules = calm(&in_families(service, slices), &config());
            let found: Vec<String> = rules.elements.keys().map(|(map, key)| format!("{map} {key}")).collect();
            assert_eq!(found, elements, "{own:?}");
            assert_eq!(targets(&rules), endpoints, "{own:?}");
        };
        let (one, other) = ("10.96.0.9", "fd00:96::9");
        let of_four = ["nodeports4 tcp . 30080", "services4 10.96.0.9 . tcp . 80", "services4 192.0.2.7 . tcp . 80"];
        let of_six = [
            "nodeports6 tcp . 30080",
            "services6 2001:db8::7 . tcp . 80",
            "services6 2001:db8::8 . tcp . 80",
            "services6 fd00:96::9 . tcp . 80",
        ];
        let mut of_both = [&of_four[..], &of_six].concat();
        of_both.sort_unstable();
        let both = [four.clone(), six.clone()];
        check(&[one], &both, &of_four, &["10.244.0.2:8080"]);
        check(&[other], &both, &of_six, &["[fd00::2]:8080"]);
        check(&[one, other], &both, &of_both, &["10.244.0.2:8080", "[fd00::2]:8080"]);
        check(&[other, one], &both, &of_both, &["10.244.0.2:8080", "[fd00::2]:8080"]);
        // One of the families has no endpoints.
        let dead: Vec<String> = of_six.iter().map(|element| format!("dead_{element}")).collect();
        let mut elements: Vec<&str> = of_four.into_iter().chain(dead.iter().map(String::as_str)).collect();
        elements.sort_unstable();
        check(&[one, other], &both[..1], &elements, &["10.244.0.2:8080"]);
        // What is in the wrong slice, or no address at all, is nobody's endpoint.
        let mixed = |family| {
            let all = ["10.244.0.2", "fd00::2", "::ffff:10.244.0.3", "nonsense"];
            (family, json!(all.map(|address| endpoint(address, true, false))))
        };
        let all = [mixed("IPv4"), mixed("IPv6"), mixed("FQDN"), mixed("")];
        check(&[one, other], &all, &of_both, &["10.244.0.2:8080", "[fd00::2]:8080"]);
        check(&[one, other, "nonsense", ""], &both, &of_both, &["10.244.0.2:8080", "[fd00::2]:8080"]);
    }

    proptest! {
        #[test]
        fn nonsense_is_no_panic(ip: String, own: Vec<String>, external: Vec<String>, family: String, port: i32) {
            let service = json!({"clusterIP": ip, "clusterIPs": own, "externalIPs": external,
                "ports": [{"port": port, "nodePort": port}]});
            for family in ["IPv4", "IPv6", &family] {
                let endpoints = own.iter().chain(&external).map(|a| endpoint(a, true, false)).collect::<Vec<_>>();
                let rules = calm(&in_families(service.clone(), &[(family, json!(endpoints))]), &config());
                prop_assert_eq!(rules.script(Some(&rules)), "");
            }
        }
    }

    #[test]
    fn rules_speak_of_one_family_only() {
        let service = json!({"type": "NodePort", "clusterIP": "fd00:96::9", "sessionAffinity": "ClientIP",
            "externalTrafficPolicy": "Local", "ports": [{"port": 80, "nodePort": 30080}]});
        let mut here = endpoint("fd00::2", true, false);
        here["nodeName"] = "here".into();
        let rules = calm(&in_families(service, &[("IPv6", json!([here]))]), &config());
        let all: Vec<&String> = rules.chains.values().flatten().collect();
        assert!(all.len() > 5 && all.iter().all(|rule| !rule.contains("ip ") && !rule.contains("@pods4")), "{all:?}");
        assert!(rules.affinities.values().all(|a| a.family == Family::V6) && rules.affinities.len() == 1);
    }

    #[test]
    fn whose_pods_there_are() {
        let check = |given: &[&str], nodes: &[&str], expect: &[&str]| {
            let mut state = State::default();
            let node = json!({"metadata": {"name": "a"}, "spec": {"podCIDRs": nodes}});
            state.nodes.extend([state::machine(serde_json::from_value(node).unwrap())]);
            let cluster_cidrs = given.iter().map(|net| net.parse().unwrap()).collect();
            let rules = calm(&state, &ProxyConfig { cluster_cidrs, ..config() });
            assert_eq!(rules.sets.iter().map(|(set, net)| format!("{set} {net}")).collect::<Vec<_>>(), expect);
        };
        check(&["10.244.0.0/16"], &["10.244.1.0/24"], &["pods4 10.244.0.0/16"]);
        check(&["10.244.0.0/16"], &["10.9.0.0/24", "fd00:1::/64"], &["pods4 10.244.0.0/16", "pods6 fd00:1::/64"]);
        check(&["10.244.0.0/16", "fd00::/48"], &["fd00:1::/64"], &["pods4 10.244.0.0/16", "pods6 fd00::/48"]);
        check(&[], &["10.9.0.0/24", "10.9.0.0/16", "fd00:1::7/128"], &["pods4 10.9.0.0/16", "pods6 fd00:1::7"]);
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
