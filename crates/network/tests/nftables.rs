//! The rules in a real kernel: a client, a node and two pods in network namespaces of their own.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod net;

use std::collections::BTreeMap;

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use net::Net;
use seawall_network::proxy::{
    ProxyConfig, State, dead::Target, elements, intact, nft, plan::plan, rules::Ruleset, state,
};
use serde_json::{Value, json};

fn state(service: Value, endpoints: &[&str]) -> State {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|a| json!({"addresses": [a], "nodeName": "here", "conditions": {"ready": true}}))
        .collect();
    let service: Service =
        serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "n"}, "spec": service})).unwrap();
    let slice: EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": "s-1", "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
    }))
    .unwrap();
    let mut known = State::default();
    known.services.extend([state::service(service)]);
    known.slices.extend([state::slice(slice)]);
    known
}

const BOTH: &[&str] = &["10.244.1.2", "10.244.2.2"];

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
    let service = json!({"type": "NodePort", "clusterIP": "10.96.0.9", "ports": [{"port": 80, "nodePort": 30080}]});
    let rules = apply(&config, &state(service.clone(), BOTH), None).await;
    // From the node, from a pod (also to itself), and from outside through the node's port.
    assert_eq!(net.seen("node", "10.96.0.9", 80), ["pod1", "pod2"]);
    assert_eq!(net.seen("pod1", "10.96.0.9", 80), ["pod1", "pod2"]);
    assert_eq!(net.seen("client", "192.168.77.1", 30080), ["pod1", "pod2"]);
    // An endpoint leaves.
    let rules = apply(&config, &state(service.clone(), &["10.244.2.2"]), Some(&rules)).await;
    assert_eq!(net.seen("node", "10.96.0.9", 80), ["pod2"]);
    assert_eq!(net.seen("client", "192.168.77.1", 30080), ["pod2"]);
    // The proxy restarts: the table is made anew.
    drop(rules);
    let rules = apply(&config, &state(service.clone(), &["10.244.1.2"]), None).await;
    assert_eq!(net.seen("client", "192.168.77.1", 30080), ["pod1"]);
    // None are left: connections are refused at once instead of hanging.
    apply(&config, &state(service, &[]), Some(&rules)).await;
    for (host, address, port) in
        [("node", "10.96.0.9", 80), ("pod1", "10.96.0.9", 80), ("client", "192.168.77.1", 30080)]
    {
        let error = net.ask(host, address, port).unwrap_err();
        assert!(error.contains("(7)"), "{host} {address} was not refused at once: {error}");
    }
}

/// Rules that somebody else takes away are missed.
#[tokio::test]
async fn what_others_do_to_the_table_is_noticed() {
    let net = Net::new();
    let config = net.config();
    let service = json!({"type": "NodePort", "clusterIP": "10.96.0.9", "sessionAffinity": "ClientIP",
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
        "flush map inet seawall services",
        "add rule inet seawall refuse drop",
        "delete element inet seawall nodeports { tcp . 30080 }",
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
    let service = json!({"clusterIP": "10.96.0.9", "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "ports": [{"port": 80}]});
    apply(&config, &state(service, BOTH), None).await;
    let seen = net.seen("node", "10.96.0.9", 80);
    assert!(seen == ["pod1"] || seen == ["pod2"], "{seen:?}");
}

/// Ranges that touch each other, and one that is a single address, come and go, also past `nft`.
#[test]
fn what_is_dead_is_added_and_removed_range_by_range() {
    let net = Net::new();
    let file = std::fs::File::open(format!("/run/netns/{}", net.namespace("node"))).unwrap();
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
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
