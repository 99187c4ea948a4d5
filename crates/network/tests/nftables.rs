//! The rules in a real kernel: a client, a node and two pods in network namespaces of their own.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::{
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use seawall_network::proxy::{ProxyConfig, State, intact, nft, plan::plan, rules::Ruleset};
use serde_json::{Value, json};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Namespaces `<prefix>-node`, `-client`, `-pod1`, `-pod2`: the node routes between the others.
struct Net {
    prefix: String,
    servers: Vec<Child>,
    pages: tempfile::TempDir,
}

fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().expect("sh runs");
    assert!(
        output.status.success(),
        "{script}: {} (root, iproute2 and nftables are needed)",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Net {
    fn new() -> Net {
        let prefix = format!("swnft{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let net = Net { prefix, servers: Vec::new(), pages: tempfile::tempdir().unwrap() };
        for (host, _) in Self::HOSTS.iter().chain(&[("node", "")]) {
            sh(&format!("ip netns add {0}-{host}; ip -n {0}-{host} link set lo up", net.prefix));
        }
        for (index, (host, address)) in Self::HOSTS.iter().enumerate() {
            let gateway = address.rsplit_once('.').unwrap().0.to_owned() + ".1";
            let p = &net.prefix;
            sh(&format!(
                "ip -n {p}-node link add v{index} type veth peer name eth0 netns {p}-{host}
                 ip -n {p}-node addr add {gateway}/24 dev v{index}; ip -n {p}-node link set v{index} up
                 ip -n {p}-{host} addr add {address}/24 dev eth0; ip -n {p}-{host} link set eth0 up
                 ip -n {p}-{host} route add default via {gateway}
                 ip netns exec {p}-node sysctl -qw net.ipv4.ip_forward=1"
            ));
        }
        // Addresses of Services are routed somewhere on any node that has a default route.
        sh(&format!("ip -n {0}-node route add default via 192.168.77.2", net.prefix));
        net
    }

    const HOSTS: [(&'static str, &'static str); 3] =
        [("client", "192.168.77.2"), ("pod1", "10.244.1.2"), ("pod2", "10.244.2.2")];

    fn config(&self) -> ProxyConfig {
        let nft = ["nsenter".to_owned(), format!("--net=/run/netns/{}-node", self.prefix), "nft".to_owned()];
        ProxyConfig {
            node_name: "here".into(),
            cluster_cidr: "10.244.0.0/16".parse().unwrap(),
            nft: nft.to_vec(),
            ..Default::default()
        }
    }

    fn command(&self, host: &str, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}-{host}", self.prefix)).args(words);
        command
    }

    /// Serves its own name on port 8080.
    fn serve(&mut self, host: &str) {
        let root = self.pages.path().join(host);
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("index.html"), host).unwrap();
        let words = ["busybox", "httpd", "-f", "-p", "8080", "-h", root.to_str().unwrap()];
        let child =
            self.command(host, &words).stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("busybox runs");
        self.servers.push(child);
        let deadline = Instant::now_for_test() + Duration::from_secs(10);
        let address = Self::HOSTS.iter().find(|(h, _)| *h == host).unwrap().1;
        while self.ask("node", address, 8080).is_err() {
            assert!(Instant::now_for_test() < deadline, "{host} does not serve");
        }
    }

    fn ask(&self, host: &str, address: &str, port: u16) -> Result<String, String> {
        let url = format!("http://{address}:{port}/");
        let output = self.command(host, &["curl", "-sS", "-m", "2", &url]).output().expect("curl runs");
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    fn seen(&self, host: &str, address: &str, port: u16) -> Vec<String> {
        let mut all: Vec<String> =
            (0..24).map(|_| self.ask(host, address, port).unwrap_or_else(|e| format!("error {e}"))).collect();
        all.sort();
        all.dedup();
        all
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        for host in ["client", "pod1", "pod2", "node"] {
            let _ = Command::new("ip").args(["netns", "del", &format!("{}-{host}", self.prefix)]).status();
        }
    }
}

/// Tests read the clock to bound a wait.
trait Clock {
    fn now_for_test() -> Instant;
}

impl Clock for Instant {
    #[allow(clippy::disallowed_methods)]
    fn now_for_test() -> Instant {
        Instant::now()
    }
}

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
    let mut state = State::default();
    state.services.insert(("n".into(), "s".into()), service);
    state.slices.insert(("n".into(), "s-1".into()), slice);
    state
}

const BOTH: &[&str] = &["10.244.1.2", "10.244.2.2"];

async fn apply(config: &ProxyConfig, state: &State, old: Option<&Ruleset>) -> Ruleset {
    let rules = plan(state, config);
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
    let mut state = state(service, BOTH);
    let udp = json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53, "protocol": "UDP"}]});
    let udp: Service =
        serde_json::from_value(json!({"metadata": {"name": "u", "namespace": "n"}, "spec": udp})).unwrap();
    state.services.insert(("n".into(), "u".into()), udp);
    let rules = apply(&config, &state, None).await;
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
        apply(&config, &state, None).await;
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
