//! Ports of pods on their node (`hostPort`, `hostIP`), seen from outside; and who gets a port that is taken.

use std::{net::SocketAddr, time::Duration};

use seawall_tests::{cluster::Cluster, pods::IMAGE, traffic, within};

const LONG: Duration = Duration::from_secs(120);

fn pod(name: &str, port: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: a1}}
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: {IMAGE}
    command: [sh, -c, 'mkdir /named; hostname >/named/index.html; exec httpd -f -p 8080 -h /named']
    ports: [{{containerPort: 8080, {port}}}]
"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_of_the_node_lead_to_pods() {
    let cluster = Cluster::up("hostport", 1, 1, Cluster::fast()).await;
    let a1 = cluster.machine("a1");
    let k = cluster.takes_pods("s1", &[&a1]).await;
    let own = a1.address();
    let pods = [
        pod("any", "hostPort: 8090"),
        pod("own", &format!("hostPort: 8091, hostIP: {own}")),
        pod("loopback", "hostPort: 8092, hostIP: 127.0.0.1"),
        // The same number at another address is another port.
        pod("other", "hostPort: 8091, hostIP: 127.0.0.1"),
    ];
    k.apply(&pods.concat()).await;
    k.run("wait pod/any pod/own pod/loopback pod/other --for=condition=Ready --timeout=120s").await.ok();
    let from_outside = async |port: u16| traffic::get(SocketAddr::new(own.into(), port)).await;
    for (port, name) in [(8090, "any"), (8091, "own")] {
        within(LONG, name, async || (from_outside(port).await.ok()?.trim() == name).then_some(())).await;
    }
    let on_it = async |address: &str| {
        let output = a1.command("curl").args(["-sS", "-m", "5", &format!("http://{address}/")]).output().await.unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    for (address, name) in [("127.0.0.1:8092", "loopback"), ("127.0.0.1:8091", "other"), ("127.0.0.1:8090", "any")] {
        assert_eq!(on_it(address).await, name, "{address}");
    }
    assert!(from_outside(8092).await.is_err(), "the loopback is nobody else's");

    k.apply(&pod("late", "hostPort: 8090")).await;
    let message = "{.status.conditions[?(@.type==\"PodScheduled\")].message}";
    within(LONG, "the port is taken", async || {
        let why = k.path("pod/late", message).await;
        why.contains("didn't have free ports for the requested pod ports").then_some(())
    })
    .await;
    k.run("delete pod any").await.ok();
    k.run("wait pod/late --for=condition=Ready --timeout=120s").await.ok();
    within(LONG, "late", async || (from_outside(8090).await.ok()?.trim() == "late").then_some(())).await;

    // Policies see the client, not the node.
    k.apply(
        "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed}
spec: {podSelector: {matchLabels: {app: late}}}
",
    )
    .await;
    within(LONG, "it is closed", async || {
        let asked = tokio::time::timeout(Duration::from_millis(300), from_outside(8090)).await;
        (!matches!(asked, Ok(Ok(_)))).then_some(())
    })
    .await;
}
