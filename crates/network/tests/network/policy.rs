//! Policies in a real kernel: a client, a node and two pods in network namespaces of their own.

use std::net::UdpSocket;

use seawall_network::{
    nft,
    policy::{
        facts,
        plan::{State, plan},
        rules::{Ruleset, TABLE},
    },
};
use serde_json::{Value, json};

use crate::net::{Net, answer, echoes};

/// `pod1` and `pod2` of the namespace `n` on this node, and some policies.
fn state(policies: &[Value]) -> State {
    let mut state = State::default();
    for (n, ips) in [("1", ["10.244.1.2", "fd00:1::2"]), ("2", ["10.244.2.2", "fd00:2::2"])] {
        let object = json!({
            "metadata": {"namespace": "n", "name": format!("pod{n}"), "uid": n, "labels": {"pod": n}},
            "spec": {"nodeName": "here", "containers": [
                {"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}]},
            "status": {"podIPs": ips.map(|ip| json!({"ip": ip}))},
        });
        state.pods.extend([facts::pod(&serde_json::from_value(object).unwrap())]);
    }
    state.namespaces.insert("n".into(), Default::default());
    for (n, spec) in policies.iter().enumerate() {
        let object = json!({"metadata": {"namespace": "n", "name": format!("p{n}")}, "spec": spec});
        state.policies.extend([facts::policy(serde_json::from_value(object).unwrap())]);
    }
    state
}

struct Kernel {
    words: Vec<String>,
    applied: Option<Ruleset>,
}

impl Kernel {
    async fn apply(&mut self, policies: &[Value]) {
        let rules = plan(&state(policies), "here");
        nft::apply(&self.words, &rules.script(self.applied.as_ref())).await.unwrap();
        assert!(nft::is_intact(&self.words, TABLE, &rules.outline()).await, "{policies:?}");
        self.applied = Some(rules);
    }
}

const TARGETS: [&str; 2] = ["10.244.2.2:8080", "[fd00:2::2]:8080"];

/// Who reaches the second pod, by either family; the two always agree.
#[track_caller]
fn reaches(net: &Net, from: &[&str], policies: &str) {
    for target in TARGETS {
        let limit = std::time::Duration::from_millis(400);
        let found: Vec<&str> = ["client", "node", "pod1", "pod2"]
            .into_iter()
            .filter(|host| net.connect_within(limit, host, target).is_ok())
            .collect();
        assert_eq!(found, from, "{target}: {policies}");
    }
}

#[tokio::test]
async fn what_policies_let_pass() {
    let net = Net::new();
    net.echo("pod1");
    net.echo("pod2");
    let mut kernel = Kernel { words: net.config().nft, applied: None };
    let two = |rules: Value| {
        let mut policy = json!({"podSelector": {"matchLabels": {"pod": "2"}}});
        policy.as_object_mut().unwrap().extend(rules.as_object().unwrap().clone());
        policy
    };
    let one = |rules: Value| {
        let mut policy = two(rules);
        policy["podSelector"]["matchLabels"]["pod"] = "1".into();
        policy
    };
    let from_1 = json!([{"podSelector": {"matchLabels": {"pod": "1"}}}]);
    let cases: Vec<(Vec<Value>, &[&str])> = vec![
        (vec![], &["client", "node", "pod1", "pod2"]),
        // A pod cannot be kept from itself, nor from its node.
        (vec![two(json!({}))], &["node", "pod2"]),
        (vec![two(json!({"ingress": [{"from": from_1}]}))], &["node", "pod1", "pod2"]),
        (vec![two(json!({"ingress": [{"from": from_1, "ports": [{"port": 8080}]}]}))], &["node", "pod1", "pod2"]),
        (vec![two(json!({"ingress": [{"from": from_1, "ports": [{"port": 8081}]}]}))], &["node", "pod2"]),
        (
            vec![two(json!({"ingress": [{"from": from_1, "ports": [{"port": 8000, "endPort": 9000}]}]}))],
            &["node", "pod1", "pod2"],
        ),
        (vec![two(json!({"ingress": [{"from": from_1, "ports": [{"port": "web"}]}]}))], &["node", "pod1", "pod2"]),
        (
            vec![two(json!({"ingress": [{"from": from_1, "ports": [{"port": "web", "protocol": "UDP"}]}]}))],
            &["node", "pod2"],
        ),
        (
            vec![two(
                json!({"ingress": [{"from": [{"ipBlock": {"cidr": "192.168.77.0/24"}}, {"ipBlock": {"cidr": "fd00::/64"}}]}]}),
            )],
            &["client", "node", "pod2"],
        ),
        (
            vec![two(json!({"ingress": [{"from": [
                {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.244.1.0/24"]}}, {"ipBlock": {"cidr": "::/0", "except": ["fd00:1::/64"]}}]}]}))],
            &["client", "node", "pod2"],
        ),
        // Both ends have to agree.
        (vec![one(json!({"policyTypes": ["Egress"]}))], &["client", "node", "pod2"]),
        (
            vec![one(
                json!({"policyTypes": ["Egress"], "egress": [{"to": [{"podSelector": {}}], "ports": [{"port": "web"}]}]}),
            )],
            &["client", "node", "pod1", "pod2"],
        ),
        (vec![one(json!({"policyTypes": ["Egress"], "egress": [{}]})), two(json!({}))], &["node", "pod2"]),
        (vec![two(json!({})), two(json!({"ingress": [{"from": from_1}]}))], &["node", "pod1", "pod2"]),
        // What pod2 may not send, it may answer.
        (vec![two(json!({"policyTypes": ["Egress"]}))], &["client", "node", "pod1", "pod2"]),
    ];
    for (policies, from) in &cases {
        kernel.apply(policies).await;
        reaches(&net, from, &json!(policies).to_string());
    }
    // From any to any: what an earlier one left behind would show.
    for (policies, from) in cases.iter().rev().step_by(3) {
        kernel.apply(policies).await;
        reaches(&net, from, &json!(policies).to_string());
    }
    // The same anew, as after a restart.
    let (policies, from) = &cases[1];
    kernel.applied = None;
    kernel.apply(policies).await;
    reaches(&net, from, "after a restart");
}

#[tokio::test]
async fn datagrams_and_open_connections() {
    let net = Net::new();
    net.echo("pod2");
    let mut kernel = Kernel { words: net.config().nft, applied: None };
    let closed = json!({"podSelector": {"matchLabels": {"pod": "2"}}});
    let udp = json!({"podSelector": {}, "ingress": [{"ports": [{"port": 8080, "protocol": "UDP"}]}]});
    kernel.apply(&[]).await;
    let mut open: Vec<_> = TARGETS.iter().map(|target| net.connect("client", target).unwrap().1).collect();
    kernel.apply(std::slice::from_ref(&closed)).await;
    for stream in &mut open {
        assert!(echoes(stream), "what is open stays open");
    }
    let asks = |host: &str, target: &str| -> bool {
        let socket: UdpSocket = net.udp(host, target);
        (0..5).any(|_| answer(&socket).is_some())
    };
    for target in TARGETS {
        assert!(!asks("pod1", target));
    }
    kernel.apply(&[closed.clone(), udp]).await;
    for target in TARGETS {
        assert!(asks("pod1", target));
        assert!(net.connect_within(std::time::Duration::from_millis(400), "pod1", target).is_err(), "{target}");
    }
    // Somebody takes the table away.
    let words: Vec<&str> = ["nft", "flush", "chain", "inet", "seawall_policy", "check_ingress"].to_vec();
    assert!(net.command("node", &words).status().unwrap().success());
    let rules = kernel.applied.as_ref().unwrap();
    assert!(!nft::is_intact(&kernel.words, TABLE, &rules.outline()).await);
}

/// Thousands of pods, and what it costs when one comes.
#[tokio::test]
async fn one_more_of_thousands() {
    let net = Net::new();
    let words = net.config().nft;
    let policy = json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": "web"}]}]});
    let mut known = state(&[policy]);
    for n in 0..5000u32 {
        let ip = std::net::Ipv4Addr::from(0x0a01_0000 + n);
        let object = json!({
            "metadata": {"namespace": "n", "name": format!("more{n}"), "uid": n.to_string()},
            "spec": {"nodeName": "there", "containers": [
                {"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}]},
            "status": {"podIP": ip.to_string()},
        });
        known.pods.extend([facts::pod(&serde_json::from_value(object).unwrap())]);
    }
    let began = tokio::time::Instant::now();
    let all = plan(&known, "here");
    let planned = began.elapsed();
    nft::apply(&words, &all.script(None)).await.unwrap();
    let whole = began.elapsed();
    known.pods.remove(&("n".to_owned(), "more7".to_owned()));
    let began = tokio::time::Instant::now();
    let less = plan(&known, "here");
    let script = less.script(Some(&all));
    assert_eq!(script.lines().count(), 2, "{script}");
    nft::apply(&words, &script).await.unwrap();
    eprintln!("5000 pods: planned in {planned:?}, all in the kernel {whole:?}, one less {:?}", began.elapsed());
    assert!(nft::is_intact(&words, TABLE, &less.outline()).await);
}
