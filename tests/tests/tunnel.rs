//! Nodes on two networks, with a router between them that knows nothing of pods: pods reach each other nevertheless.

use std::{
    net::{SocketAddr, UdpSocket},
    process::Command,
    time::Duration,
};

use seawall_drill::lab::Cluster as Settings;
use seawall_tests::{
    cluster::{Cluster, Lan},
    inside::Inside,
    kubectl::has,
    pods::{BIG, SERVE, SLEEP, at, gets, pod, says},
    within,
};
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(120);

fn service(name: &str, relay: bool) -> String {
    format!(
        "
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, annotations: {{seawall.dev/relay: \"{relay}\"}}}}
spec: {{type: NodePort, selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}]}}
"
    )
}

/// No router of others knows pods' addresses, and many networks drop what has them: so does this lab's, at the router
/// between its networks (`input`) or from machine to machine of one (`forward`).
fn drops_pods(lab: &str, hook: &str) {
    let mut router = Command::new("nsenter");
    router.args([&format!("--net=/run/netns/seawall-lab.{lab}.lan"), "nft"]).arg(format!(
        "add table bridge strict; add chain bridge strict in {{ type filter hook {hook} priority 0; }}; \
         add rule bridge strict in ip saddr 10.244.0.0/16 drop; add rule bridge strict in ip daddr 10.244.0.0/16 drop"
    ));
    assert!(router.status().unwrap().success());
}

/// Packets of the whole size of a pod's interface, which the sender's kernel marks as not to be cut up on their way:
/// they arrive as soon as it was told that the way is narrower.
fn large_datagrams(from: &Inside, to: &Inside, ip: &str) {
    let address: SocketAddr = format!("{ip}:9000").parse().unwrap();
    let server = to.on(move || UdpSocket::bind(address).unwrap());
    server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let client = from.on(move || UdpSocket::bind("0.0.0.0:0").unwrap());
    let lost = (0..10).take_while(|_| {
        client.send_to(&[7; 1472], address).unwrap();
        server.recv(&mut [0; 2000]).ok() != Some(1472)
    });
    let lost = lost.count();
    assert!((1..4).contains(&lost), "{lost} were lost: the first is too large, and that is said");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_two_networks_reach_each_other() {
    let lan = Lan { networks: 2, ..Lan::default() };
    let cluster = Cluster::up_on(lan, "tunnel", 1, 2, Cluster::fast()).await;
    let (a1, a2) = (cluster.machine("a1"), cluster.machine("a2"));
    drops_pods("tunnel", "input");
    let k = cluster.takes_pods("s1", &[&a1, &a2]).await;
    let all = [pod("web", "a2", SERVE), pod("near", "a2", SLEEP), pod("far", "a1", SLEEP)].concat();
    k.apply(&(all + &service("plain", false) + &service("relayed", true))).await;
    k.run("wait pod/web pod/near pod/far --for=condition=Ready --timeout=120s").await.ok();
    let ip = k.path("pod/web", "{.status.podIP}").await;
    let web: SocketAddr = format!("{ip}:8080").parse().unwrap();
    let far = Inside::of(&a1, "far");
    far.becomes(true, web, Instant::now(), "by the tunnel").await;

    // Large bodies by each way, from both sides of the tunnel.
    let mut urls = vec![format!("http://{web}/big")];
    for name in ["plain", "relayed"] {
        let ip = k.path(&format!("service/{name}"), "{.spec.clusterIP}").await;
        far.becomes(true, format!("{ip}:80").parse().unwrap(), Instant::now(), name).await;
        urls.push(format!("http://{ip}/big"));
    }
    for url in &urls {
        for client in ["far", "near"] {
            assert_eq!(gets(&k, client, url).await, BIG, "{client} {url}");
        }
    }
    large_datagrams(&far, &Inside::of(&a2, "web"), &ip);
    // The pod is seen with its own address; a node port of the other node leads there, too.
    let address = k.path("pod/far", "{.status.podIP}").await;
    has(k.run("logs web").await.ok(), &[&address]);
    let port = k.path("service/plain", "{.spec.ports[0].nodePort}").await;
    let big = format!("http://{}:{port}/big", a1.address());
    let output =
        Command::new("curl").args(["-sS", "-m", "10", "-o", "/dev/null", "-w", "%{size_download}", &big]).output();
    assert_eq!(String::from_utf8_lossy(&output.unwrap().stdout), BIG.to_string(), "{big}");
    // A node itself, whose answers take the tunnel as well.
    assert_eq!(says(&a1, &format!("curl -sS -m 10 http://{web}/name")).await, "web\n");

    // Pods have the size of the node's network, the tunnel has less.
    assert_eq!(k.args(&["exec", "far", "--", "cat", "/sys/class/net/eth0/mtu"]).await.ok().trim(), "1500");
    has(says(&a1, "ip link show seawall.vxlan").await, &["mtu 1450"]);
    // Whoever is on our network is reached without it.
    let s1 = cluster.machine("s1").address();
    has(says(&a1, "ip route show proto 83").await, &[&format!("via {s1} dev eth0"), "dev seawall.vxlan onlink"]);

    // Policies see the pods' own addresses.
    let policy = |from: &str| {
        format!(
            "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: closed}}
spec: {{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{from: [{{podSelector: {{matchLabels: {{app: {from}}}}}}}]}}]}}
"
        )
    };
    k.apply(&policy("near")).await;
    far.becomes(false, web, Instant::now(), "only near may").await;
    k.apply(&policy("far")).await;
    far.becomes(true, web, Instant::now(), "far may").await;
    k.run("delete networkpolicy closed").await.ok();

    // The node's power is cut, and it comes back.
    a2.power_off(false).await.unwrap();
    far.becomes(false, web, Instant::now(), "its node is off").await;
    cluster.lab.power_on(&a2).await.unwrap();
    cluster.lab.well(LONG).await.unwrap();
    within(LONG, "the pod is reached at its address of now", async || {
        let ip = k.path("pod/web", "{.status.podIP}").await;
        far.reaches(format!("{ip}:8080").parse().ok()?).await.then_some(())
    })
    .await;

    // It leaves for good: so does what was made for it.
    a2.power_off(false).await.unwrap();
    k.run("delete node a2 --timeout=30s").await.ok();
    within(LONG, "no tunnel is left", async || {
        says(&a1, "ip link show seawall.vxlan").await.contains("does not exist").then_some(())
    })
    .await;
    assert!(!says(&a1, "nft list tables").await.contains("seawall_tunnel"));
    assert!(!says(&a1, "ip route show proto 83").await.contains("vxlan"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_of_one_network_have_a_tunnel_if_they_are_told_to() {
    let args = vec!["--disable=dns".to_owned(), "--tunnel=always".to_owned()];
    let settings = Settings { server_args: args.clone(), agent_args: args, ..Cluster::fast().unwrap() };
    let cluster = Cluster::up("always", 1, 1, Some(settings)).await;
    let (s1, a1) = (cluster.machine("s1"), cluster.machine("a1"));
    drops_pods("always", "forward");
    let k = cluster.takes_pods("s1", &[&s1, &a1]).await;
    k.apply(&([pod("web", "a1", SERVE), pod("far", "s1", SLEEP)].concat() + &service("plain", false))).await;
    k.run("wait pod/web pod/far --for=condition=Ready --timeout=120s").await.ok();
    let ip = k.path("pod/web", "{.status.podIP}").await;
    let (far, web) = (Inside::of(&s1, "far"), Inside::of(&a1, "web"));
    far.becomes(true, at(&ip, "8080"), Instant::now(), "by the tunnel").await;
    let service = k.path("service/plain", "{.spec.clusterIP}").await;
    far.becomes(true, at(&service, "80"), Instant::now(), "by the Service").await;
    for url in [format!("http://{ip}:8080/big"), format!("http://{service}/big")] {
        assert_eq!(gets(&k, "far", &url).await, BIG, "{url}");
    }
    large_datagrams(&far, &web, &ip);
    // It is seen with its own address, and a node itself is answered.
    has(k.run("logs web").await.ok(), &[&k.path("pod/far", "{.status.podIP}").await]);
    assert_eq!(says(&s1, &format!("curl -sS -m 10 http://{ip}:8080/name")).await, "web\n");

    // There is no other way, and it is narrower than the pods' own interfaces.
    let routes = says(&s1, "ip route show proto 83").await;
    has(&routes, &["dev seawall.vxlan onlink"]);
    assert!(!routes.contains("eth0"), "{routes}");
    has(says(&s1, "ip link show seawall.vxlan").await, &["mtu 1450"]);
    assert_eq!(k.args(&["exec", "far", "--", "cat", "/sys/class/net/eth0/mtu"]).await.ok().trim(), "1500");
}
