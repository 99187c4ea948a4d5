//! The rules in a real kernel: a client, a node and two pods in network namespaces of their own.

use std::collections::BTreeMap;

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use seawall_network::{
    nft::generation,
    proxy::{ProxyConfig, State, dead::Target, elements, intact, nft, plan::plan, rules::Ruleset, state},
};
use serde_json::{Value, json};

use crate::net::Net;

/// The Service `s` with a slice of each family.
fn state(service: Value, endpoints: &[&str]) -> State {
    let service: Service =
        serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "n"}, "spec": service})).unwrap();
    let mut known = State::default();
    known.services.extend([state::service(service)]);
    for (family, mark) in [("IPv4", '.'), ("IPv6", ':')] {
        let endpoints: Vec<Value> = endpoints
            .iter()
            .filter(|a| a.contains(mark))
            .map(|a| json!({"addresses": [a], "nodeName": "here", "conditions": {"ready": true}}))
            .collect();
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": format!("s-{family}"), "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": family, "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
        }))
        .unwrap();
        known.slices.extend([state::slice(slice)]);
    }
    known
}

const BOTH: &[&str] = &["10.244.1.2", "10.244.2.2", "fd00:1::2", "fd00:2::2"];
const POD1: &[&str] = &["10.244.1.2", "fd00:1::2"];
const POD2: &[&str] = &["10.244.2.2", "fd00:2::2"];

/// The addresses of the Service.
const OWN: [&str; 2] = ["10.96.0.9", "fd00:96::9"];
/// The Service, the node, and one more address, as they are written beside a port.
const SERVICE: [&str; 2] = ["10.96.0.9", "[fd00:96::9]"];
const NODE: [&str; 2] = ["192.168.77.1", "[fd00::1]"];
const EXTERNAL: [&str; 2] = ["192.0.2.7", "[2001:db8::7]"];

async fn apply(config: &ProxyConfig, state: &State, old: Option<&Ruleset>) -> Ruleset {
    let rules = plan(state, config, &BTreeMap::new());
    nft(config, &rules.script(old)).await.unwrap();
    rules
}

#[tokio::test]
async fn a_service_is_reached_from_everywhere_and_follows_its_endpoints() {
    let mut net = Net::new();
    net.serve("pod1");
    net.serve("pod2");
    let config = net.config();
    let service = json!({"type": "NodePort", "clusterIP": OWN[0], "clusterIPs": OWN,
        "externalIPs": ["192.0.2.7", "2001:db8::7"], "ports": [{"port": 80, "nodePort": 30080}]});
    let rules = apply(&config, &state(service.clone(), BOTH), None).await;
    // From the node, from a pod (also to itself), and from outside through the node's port and one more address.
    let all = |family: usize| {
        [
            ("node", SERVICE[family], 80),
            ("pod1", SERVICE[family], 80),
            ("client", SERVICE[family], 80),
            ("node", NODE[family], 30080),
            ("pod1", NODE[family], 30080),
            ("client", NODE[family], 30080),
            ("client", EXTERNAL[family], 80),
        ]
    };
    let check = |families: &[usize], expect: &[&str]| {
        for (host, address, port) in families.iter().flat_map(|family| all(*family)) {
            assert_eq!(net.seen(host, address, port), expect, "from {host} to {address}");
        }
    };
    let refused = |families: &[usize]| {
        for (host, address, port) in families.iter().flat_map(|family| all(*family)) {
            let error = net.ask(host, address, port).unwrap_err();
            assert!(error.contains("(7)"), "{host} {address} was not refused at once: {error}");
        }
    };
    check(&[0, 1], &["pod1", "pod2"]);
    assert!(intact(&config, &rules).await);
    // An endpoint leaves.
    let rules = apply(&config, &state(service.clone(), POD2), Some(&rules)).await;
    check(&[0, 1], &["pod2"]);
    // The proxy restarts: the table is made anew.
    drop(rules);
    let rules = apply(&config, &state(service.clone(), POD1), None).await;
    check(&[0, 1], &["pod1"]);
    // A family loses its last endpoint: connections are refused at once instead of hanging. The other one does not care.
    let rules = apply(&config, &state(service.clone(), &POD1[..1]), Some(&rules)).await;
    check(&[0], &["pod1"]);
    refused(&[1]);
    let rules = apply(&config, &state(service.clone(), &POD1[1..]), Some(&rules)).await;
    check(&[1], &["pod1"]);
    refused(&[0]);
    let rules = apply(&config, &state(service.clone(), &[]), Some(&rules)).await;
    refused(&[0, 1]);
    // One of the two alone.
    let mut six = service;
    (six["clusterIP"], six["clusterIPs"]) = (OWN[1].into(), json!([OWN[1]]));
    let rules = apply(&config, &state(six.clone(), BOTH), Some(&rules)).await;
    check(&[1], &["pod1", "pod2"]);
    assert!(net.ask("client", NODE[0], 30080).unwrap_err().contains("(7)"), "the other family has no such port");
    // Datagrams are refused in words as well.
    six["ports"][0]["protocol"] = "UDP".into();
    let rules = apply(&config, &state(six, &[]), Some(&rules)).await;
    assert!(intact(&config, &rules).await);
    for (host, to) in [("pod1", "[fd00:96::9]:80"), ("client", "[fd00::1]:30080")] {
        let socket = net.udp(host, to);
        socket.send(b"?").unwrap();
        let error = socket.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "from {host} to {to}");
    }
}

#[tokio::test]
async fn endpoints_see_the_client_where_answers_come_back_this_way() {
    let net = Net::new();
    let heard = [net.listen("pod1"), net.listen("pod2")];
    let config = net.config();
    let mut service = json!({"type": "NodePort", "clusterIP": OWN[0], "clusterIPs": OWN,
        "ports": [{"port": 80, "nodePort": 30080}]});
    let check = |to_pod: usize, host: &str, to: [&str; 2], port: u16, expect: [&str; 2]| {
        for family in 0..2 {
            drop(net.connect(host, &format!("{}:{port}", to[family])).unwrap());
            let (from, _) = heard[to_pod].recv_timeout(std::time::Duration::from_secs(10)).unwrap();
            assert_eq!(from.to_string(), expect[family], "from {host} to {}", to[family]);
        }
    };
    let rules = apply(&config, &state(service.clone(), POD2), None).await;
    check(1, "pod1", SERVICE, 80, ["10.244.1.2", "fd00:1::2"]);
    check(1, "client", SERVICE, 80, ["10.244.2.1", "fd00:2::1"]);
    check(1, "node", SERVICE, 80, ["10.244.2.1", "fd00:2::1"]);
    check(1, "client", NODE, 30080, ["10.244.2.1", "fd00:2::1"]);
    let rules = apply(&config, &state(service.clone(), POD1), Some(&rules)).await;
    check(0, "pod1", SERVICE, 80, ["10.244.1.1", "fd00:1::1"]);
    service["externalTrafficPolicy"] = "Local".into();
    apply(&config, &state(service, POD1), Some(&rules)).await;
    check(0, "client", NODE, 30080, ["192.168.77.2", "fd00::2"]);
    check(0, "pod2", NODE, 30080, ["10.244.2.2", "fd00:2::2"]);
}

/// Pods' ranges come and go with the nodes, where nobody says what they are.
#[tokio::test]
async fn the_pods_of_a_family_are_those_of_the_nodes() {
    let net = Net::new();
    let heard = net.listen("pod2");
    let config = ProxyConfig { cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()], ..net.config() };
    let service = json!({"clusterIP": OWN[1], "ports": [{"port": 80}]});
    let mut rules = None;
    for (ranges, expect) in [
        (&["fd00:2::/64"][..], "fd00:2::1"),
        (&["fd00:2::/64", "fd00:1::/64"], "fd00:1::2"),
        (&["fd00:2::/64", "fd00:1::/64", "fd00:1:0:1::/64"], "fd00:1::2"),
        (&["fd00::/16"], "fd00:1::2"),
        (&["fd00:2::/64"], "fd00:2::1"),
    ] {
        let mut known = state(service.clone(), POD2);
        known.nodes.extend(ranges.iter().enumerate().map(|(n, range)| {
            let node = json!({"metadata": {"name": format!("n{n}")}, "spec": {"podCIDRs": [range]}});
            state::machine(serde_json::from_value(node).unwrap())
        }));
        rules = Some(apply(&config, &known, rules.as_ref()).await);
        assert!(intact(&config, rules.as_ref().unwrap()).await, "{ranges:?}");
        drop(net.connect("pod1", "[fd00:96::9]:80").unwrap());
        let (from, _) = heard.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        assert_eq!(from.to_string(), expect, "{ranges:?}");
    }
}

/// Rules that somebody else takes away are missed.
#[tokio::test]
async fn what_others_do_to_the_table_is_noticed() {
    let net = Net::new();
    let config = net.config();
    let service = json!({"type": "NodePort", "clusterIPs": OWN, "sessionAffinity": "ClientIP",
        "ports": [{"port": 80, "nodePort": 30080}]});
    let mut known = state(service, BOTH);
    let udp = json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53, "protocol": "UDP"}]});
    let udp: Service =
        serde_json::from_value(json!({"metadata": {"name": "u", "namespace": "n"}, "spec": udp})).unwrap();
    known.services.extend([state::service(udp)]);
    let rules = apply(&config, &known, None).await;
    assert!(intact(&config, &rules).await, "nothing happened yet");
    let nft = |words: &str| {
        let words: Vec<&str> = ["nft"].into_iter().chain(words.split_whitespace()).collect();
        assert!(net.command("node", &words).status().unwrap().success(), "{words:?}");
    };
    for damage in [
        "flush ruleset",
        "delete table inet seawall",
        "flush chain inet seawall dispatch",
        "flush map inet seawall services4",
        "flush map inet seawall services6",
        "add rule inet seawall refuse drop",
        "delete element inet seawall nodeports4 { tcp . 30080 }",
        "delete element inet seawall nodeports6 { tcp . 30080 }",
        "flush set inet seawall pods6",
    ] {
        nft(damage);
        assert!(!intact(&config, &rules).await, "{damage} was not noticed");
        apply(&config, &known, None).await;
        assert!(intact(&config, &rules).await, "after {damage}");
    }
    // Another table is nobody's business.
    nft("add table inet other");
    assert!(intact(&config, &rules).await);
}

#[tokio::test]
async fn a_client_stays_with_its_endpoint() {
    let mut net = Net::new();
    net.serve("pod1");
    net.serve("pod2");
    let config = net.config();
    let service = json!({"clusterIPs": OWN, "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "ports": [{"port": 80}]});
    apply(&config, &state(service, BOTH), None).await;
    for service in SERVICE {
        let seen = net.seen("node", service, 80);
        assert!(seen == ["pod1"] || seen == ["pod2"], "{service} {seen:?}");
    }
}

/// Has the calling thread, and what it starts, live on the node from now on.
fn move_to_node(net: &Net) {
    let file = std::fs::File::open(format!("/run/netns/{}", net.namespace("node"))).unwrap();
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
}

/// While the kernel's rules have the same number they are the same, so every change has to make it another one.
#[test]
fn every_change_is_another_number() {
    let net = Net::new();
    move_to_node(&net);
    let config = ProxyConfig::default();
    let number = || generation(&config.nft).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let service = json!({"clusterIPs": OWN, "ports": [{"port": 80}]});
        let first = number();
        let rules = apply(&config, &state(service, BOTH), None).await;
        let mut last = number();
        assert_ne!(last, first);
        assert!(intact(&config, &rules).await);
        assert_eq!(number(), last, "a look is no change");
        for change in [
            "flush map inet seawall services4",
            "add rule inet seawall refuse drop",
            "flush chain inet seawall dispatch",
            "add table inet other",
            "delete table inet seawall",
            "flush ruleset",
        ] {
            nft(&config, change).await.unwrap();
            let now = number();
            assert_ne!(now, last, "{change}");
            last = now;
        }
        nft(&config, &Ruleset::default().script(None)).await.unwrap();
        last = number();
        elements::add(&[&Target::Pods("10.244.2.0/24".parse().unwrap())]).unwrap();
        assert_ne!(number(), last, "past nft");
    });
}

/// Ranges that touch each other, and one that is a single address, come and go, also past `nft`.
#[test]
fn what_is_dead_is_added_and_removed_range_by_range() {
    let net = Net::new();
    move_to_node(&net);
    let config = ProxyConfig::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let empty = Ruleset::default();
        nft(&config, &empty.script(None)).await.unwrap();
        let targets: Vec<Target> =
            ["10.244.2.0/24", "10.244.3.0/24", "10.244.1.255/32", "172.20.0.9/32", "fd00:2::/64"]
                .iter()
                .map(|net| Target::Pods(net.parse().unwrap()))
                .chain(["10.9.0.2:8080", "[fd00::1]:8080"].iter().map(|port| Target::Port(port.parse().unwrap())))
                .collect();
        let of = |some: &[&Target]| Ruleset { sets: some.iter().map(|t| t.element()).collect(), ..Default::default() };
        for skip in &targets {
            // By netlink, all but one; that one by nft.
            let first: Vec<&Target> = targets.iter().filter(|t| *t != skip).collect();
            elements::add(&first).unwrap();
            let some = of(&first);
            assert!(intact(&config, &some).await, "without {skip:?}");
            let all = of(&targets.iter().collect::<Vec<_>>());
            nft(&config, &all.script(Some(&some))).await.unwrap();
            assert!(intact(&config, &all).await, "with {skip:?}");
            // Twice is once.
            elements::add(&first).unwrap();
            assert!(intact(&config, &all).await);
            let listed = std::process::Command::new("nft").args(["list", "table", "inet", "seawall"]).output().unwrap();
            let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
            for target in &targets {
                assert!(listed.contains(&target.element().1), "{target:?} in {listed}");
            }
            nft(&config, &some.script(Some(&all))).await.unwrap();
            assert!(intact(&config, &some).await);
            nft(&config, &empty.script(Some(&some))).await.unwrap();
            assert!(intact(&config, &empty).await);
        }
        // All or nothing, and told.
        nft(&config, "delete table inet seawall").await.unwrap();
        assert!(elements::add(&targets.iter().collect::<Vec<_>>()).is_err());
    });
}
