use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::policy::facts;

/// A cluster of two nodes: `shop` has `web` (10.1.0.2) and `db` (10.1.0.3) here and `db-2` (10.2.0.3) elsewhere, `ops` has
/// `cron` (10.1.0.4) here.
fn cluster(policies: &[Value]) -> State {
    let mut state = State::default();
    let mut pod = |ns: &str, name: &str, node: &str, ips: &[&str], ports: Value| {
        let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        let object = json!({
            "metadata": {"namespace": ns, "name": name, "uid": name, "labels": {"app": name.trim_end_matches("-2")}},
            "spec": {"nodeName": node, "containers": [{"name": "c", "ports": ports}]}, "status": {"podIPs": ips},
        });
        state.pods.extend([facts::pod(&serde_json::from_value(object).unwrap())]);
    };
    pod("shop", "web", "here", &["10.1.0.2", "fd00::2"], json!([{"name": "http", "containerPort": 8080}]));
    pod("shop", "db", "here", &["10.1.0.3"], json!([{"name": "sql", "containerPort": 5432}]));
    pod("shop", "db-2", "there", &["10.2.0.3"], json!([{"name": "sql", "containerPort": 5433}]));
    pod("ops", "cron", "here", &["10.1.0.4"], json!([{"name": "http", "containerPort": 53, "protocol": "UDP"}]));
    for name in ["shop", "ops"] {
        state.namespaces.insert(name.into(), [("name".to_owned(), name.to_owned())].into());
    }
    for (n, spec) in policies.iter().enumerate() {
        let object = json!({"metadata": {"namespace": "shop", "name": format!("p{n}")}, "spec": spec});
        state.policies.extend([facts::policy(serde_json::from_value(object).unwrap())]);
    }
    state
}

/// What holds for each address, with what is jumped to and the elements of sets written out.
fn shown(rules: &Ruleset) -> Vec<String> {
    let expand = |line: &str| -> String {
        let word = |word: &str| match word.strip_prefix('@') {
            Some(set) => {
                let all: Vec<&str> = rules.elements.iter().filter(|(s, _)| s == set).map(|(_, e)| e.as_str()).collect();
                format!("[{}]", all.join(", "))
            }
            None => word.to_owned(),
        };
        line.split(' ').map(word).collect::<Vec<_>>().join(" ")
    };
    let of = |chain: &String| -> String {
        let flat = rules.chains[chain].iter().flat_map(|line| match line.strip_prefix("jump ") {
            Some(inner) => rules.chains[inner].clone(),
            None => vec![line.clone()],
        });
        // Of the other family there is little to see.
        let lines: Vec<String> = flat.map(|line| expand(&line)).filter(|line| !line.contains("[]")).collect();
        lines.join("; ")
    };
    rules.verdicts.iter().map(|((map, ip), chain)| format!("{ip} {}: {}", &map[..map.len() - 1], of(chain))).collect()
}

#[track_caller]
fn check(policies: &[Value], expect: &[&str]) {
    assert_eq!(shown(&plan(&cluster(policies), "here")), expect);
}

#[test]
fn default_deny() {
    check(&[], &[]);
    check(
        &[json!({"podSelector": {}})],
        &["10.1.0.2 ingress: drop", "10.1.0.3 ingress: drop", "fd00::2 ingress: drop"],
    );
    check(
        &[json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"]})],
        &["10.1.0.3 egress: drop"],
    );
    // Nobody of another node, nor of another namespace.
    check(&[json!({"podSelector": {"matchLabels": {"app": "cron"}}})], &[]);
}

#[test]
fn peers() {
    let db = |from: Value, expect: &str| {
        let policy = json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{"from": [from]}]});
        check(&[policy], &[&format!("10.1.0.3 ingress: {expect}")]);
    };
    // Pods of its own namespace, of some namespaces, some pods of some namespaces.
    db(json!({"podSelector": {}}), "ip saddr [10.1.0.2, 10.1.0.3, 10.2.0.3] accept; ip6 saddr [fd00::2] accept; drop");
    db(json!({"podSelector": {"matchLabels": {"app": "db"}}}), "ip saddr [10.1.0.3, 10.2.0.3] accept; drop");
    db(json!({"namespaceSelector": {"matchLabels": {"name": "ops"}}}), "ip saddr [10.1.0.4] accept; drop");
    db(
        json!({"namespaceSelector": {}, "podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["cron", "db"]}]}}),
        "ip saddr [10.1.0.3, 10.1.0.4, 10.2.0.3] accept; drop",
    );
    // Addresses.
    db(json!({"ipBlock": {"cidr": "0.0.0.0/0"}}), "meta nfproto ipv4 accept; drop");
    db(json!({"ipBlock": {"cidr": "fd01::/64"}}), "ip6 saddr fd01::/64 accept; drop");
    db(
        json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16", "10.1.2.0/24", "10.4.0.0/16"]}}),
        "ip saddr 10.0.0.0/8 ip saddr != { 10.1.0.0/16, 10.4.0.0/16 } accept; drop",
    );
    db(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/9", "10.128.0.0/9"]}}), "drop");
    // Nobody is not everybody.
    db(json!({}), "drop");
}

#[test]
fn ports() {
    let web = |ports: Value, expect: &str| {
        let policy = json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"], "egress": [{"ports": ports}]});
        check(&[policy], &[&format!("10.1.0.3 egress: {expect}")]);
    };
    web(
        json!([{"port": 80}, {"port": 443}, {"protocol": "UDP", "port": 53}]),
        "tcp dport { 80, 443 } accept; udp dport { 53 } accept; drop",
    );
    web(json!([{"port": 80, "endPort": 90}, {"port": 85}, {"port": 91}]), "tcp dport { 80-91 } accept; drop");
    web(json!([{"protocol": "SCTP"}]), "meta l4proto sctp accept; drop");
    web(json!([{"port": 80}, {"protocol": "TCP"}]), "meta l4proto tcp accept; drop");
    // The number is that of whoever is spoken to, on whatever node.
    web(
        json!([{"port": "sql"}]),
        "ip daddr . meta l4proto . th dport [10.1.0.3 . tcp . 5432, 10.2.0.3 . tcp . 5433] accept; drop",
    );
    web(
        json!([{"port": "http", "protocol": "UDP"}]),
        "ip daddr . meta l4proto . th dport [10.1.0.4 . udp . 53] accept; drop",
    );
    web(json!([{"port": "unheard"}]), "drop");
    web(json!([]), "accept; drop");
}

#[test]
fn peers_times_ports_and_policies_add_up() {
    let first = json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{
        "from": [{"podSelector": {"matchLabels": {"app": "web"}}}, {"ipBlock": {"cidr": "192.0.2.0/24"}}],
        "ports": [{"port": 5432}, {"port": "sql"}],
    }]});
    let second = json!({"podSelector": {}, "ingress": [{"ports": [{"port": 9100}]}]});
    let named = "ip daddr . meta l4proto . th dport [10.1.0.3 . tcp . 5432, 10.2.0.3 . tcp . 5433] accept";
    let db = format!(
        "10.1.0.3 ingress: ip saddr [10.1.0.2] tcp dport {{ 5432 }} accept; ip saddr [10.1.0.2] {named}; \
         ip6 saddr [fd00::2] tcp dport {{ 5432 }} accept; ip saddr 192.0.2.0/24 tcp dport {{ 5432 }} accept; \
         ip saddr 192.0.2.0/24 {named}; tcp dport {{ 9100 }} accept; drop"
    );
    check(
        &[first, second],
        &["10.1.0.2 ingress: tcp dport { 9100 } accept; drop", &db, "fd00::2 ingress: tcp dport { 9100 } accept; drop"],
    );
}

/// A pod that comes is an element that comes, wherever it is meant.
#[test]
fn what_changes_is_small() {
    let policy = json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{"from": [{"podSelector": {}}]}]});
    let mut state = cluster(&[policy]);
    let before = plan(&state, "here");
    assert_eq!(before.script(Some(&before)), "");
    let pod = PodFacts { node: "there".into(), ips: vec!["10.2.0.9".parse().unwrap()], ..PodFacts::default() };
    state.pods.insert(("shop".into(), "new".into()), pod);
    let script = plan(&state, "here").script(Some(&before));
    assert_eq!(script.lines().count(), 1, "{script}");
    assert!(
        script.starts_with("add element inet seawall_policy pods4_") && script.contains("{ 10.2.0.9 }"),
        "{script}"
    );
    // One of this node that a policy is about.
    let pod = PodFacts {
        node: "here".into(),
        labels: [("app".to_owned(), "db".to_owned())].into(),
        ips: vec!["10.1.0.9".parse().unwrap()],
        ..PodFacts::default()
    };
    state.pods.insert(("shop".into(), "new".into()), pod);
    let script = plan(&state, "here").script(Some(&before));
    assert_eq!(script.lines().filter(|line| line.starts_with("add element")).count(), 3, "{script}");
    assert_eq!(script.lines().count(), 3, "{script}");
}

/// Names that differ in where one part ends and the next begins.
#[test]
fn names_do_not_run_together() {
    assert_ne!(hash(&["ab", "c"]), hash(&["a", "bc"]));
    assert_ne!(hash(&["one", ""]), hash(&["one"]));
}

proptest! {
    #[test]
    fn ranges_of_ports_stay_apart(ranges: Vec<(u16, u16)>, port: u16) {
        let ranges: Vec<(u16, u16)> = ranges.into_iter().map(|(a, b)| (a.min(b), a.max(b))).collect();
        let holds = |ranges: &[(u16, u16)]| ranges.iter().any(|(first, last)| (*first..=*last).contains(&port));
        let merged = merged(ranges.clone());
        prop_assert_eq!(holds(&ranges), holds(&merged));
        prop_assert!(merged.windows(2).all(|w| u32::from(w[0].1) + 1 < u32::from(w[1].0)));
    }
}
