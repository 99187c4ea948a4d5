//! NetworkPolicy on a real cluster: what is closed is closed at once, on either node, and before a pod's first packet.

use std::{net::SocketAddr, time::Duration};

use seawall_drill::lab::Program;
use seawall_tests::{
    cluster::Cluster,
    inside::Inside,
    kubectl::{Kubectl, has},
    pods::{IMAGE, SLEEP},
    within,
};
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(120);

fn pod(name: &str, node: &str, app: &str, command: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  restartPolicy: Never
  tolerations: [{{operator: Exists}}]
  containers:
  - name: c
    image: {IMAGE}
    command: [sh, -c, '{command}']
    ports: [{{name: http, containerPort: 8080}}]
"
    )
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {name}}}
spec: {spec}
"
    )
}

const SERVE: &str = "exec httpd -f -v -p 8080 -h /";

async fn ready(k: &Kubectl, pods: &str) {
    k.run(&format!("wait {pods} --for=condition=Ready --timeout=120s")).await.ok();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policies_hold_on_every_node_and_from_the_first_packet() {
    let cluster = Cluster::up("netpol", 1, 2, Cluster::fast()).await;
    let (s1, a1, a2) = (cluster.machine("s1"), cluster.machine("a1"), cluster.machine("a2"));
    let k = cluster.takes_pods("s1", &[&a1, &a2]).await;
    let pods = [pod("web", "a1", "web", SERVE), pod("near", "a1", "client", SLEEP), pod("far", "a2", "client", SLEEP)];
    k.apply(&pods.concat()).await;
    ready(&k, "pod/web pod/near pod/far").await;
    let ip = k.path("pod/web", "{.status.podIP}").await;
    let web: SocketAddr = format!("{ip}:8080").parse().unwrap();
    let (near, far) = (Inside::of(&a1, "near"), Inside::of(&a2, "far"));
    let both = [&near, &far];

    // A pod of another node is seen with its own address.
    for from in both {
        from.becomes(true, web, Instant::now(), "no policy").await;
    }
    k.args(&["exec", "far", "--", "wget", "-q", "-O", "/dev/null", &format!("http://{web}/etc/hostname")]).await.ok();
    let address = k.path("pod/far", "{.status.podIP}").await;
    within(LONG, "the web server names its client", async || {
        k.run("logs web").await.stdout.contains(&address).then_some(())
    })
    .await;

    // From no policy to default deny: the first of all policies, whose pods are not even known yet.
    let mut slowest = Duration::ZERO;
    k.apply(&policy("deny", "{podSelector: {matchLabels: {app: web}}}")).await;
    let since = Instant::now();
    for from in both {
        slowest = slowest.max(from.becomes(false, web, since, "default deny").await);
    }
    // Its node is let in.
    let mut from_node = a1.command("curl");
    from_node.args(["-sS", "-m", "5", "-o", "/dev/null", &format!("http://{web}/etc/hostname")]);
    assert!(from_node.status().await.unwrap().success(), "a node reaches its pods");

    let allow = "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: http}]}]}";
    k.apply(&policy("allow", allow)).await;
    let since = Instant::now();
    for from in both {
        slowest = slowest.max(from.becomes(true, web, since, "pods with a label").await);
    }
    k.run("label pod far app=other --overwrite").await.ok();
    slowest = slowest.max(far.becomes(false, web, Instant::now(), "the label is another one").await);
    assert!(near.reaches(web).await);
    let other =
        "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: x}}}]}]}";
    k.apply(&policy("allow", other)).await;
    slowest = slowest.max(near.becomes(false, web, Instant::now(), "pods of a namespace with a label").await);
    k.run("label namespace default team=x").await.ok();
    let since = Instant::now();
    for from in both {
        slowest = slowest.max(from.becomes(true, web, since, "the namespace has the label").await);
    }
    // What pods may send, at the other end.
    k.apply(&policy("quiet", "{podSelector: {matchLabels: {app: other}}, policyTypes: [Egress]}")).await;
    slowest = slowest.max(far.becomes(false, web, Instant::now(), "nothing may go out").await);
    k.run("delete networkpolicy quiet").await.ok();
    slowest = slowest.max(far.becomes(true, web, Instant::now(), "it may again").await);
    eprintln!("the slowest change took effect after {slowest:?}");
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");

    first_packets(&k, web).await;

    // Without a control plane the rules stay, whoever starts anew.
    k.apply(&policy("allow", allow)).await;
    far.becomes(false, web, Instant::now(), "pods with a label").await;
    s1.power_off(false).await.unwrap();
    let ended = a1.told().ended;
    a1.kill(Program::Seawall).await.unwrap();
    let again = async || (a1.told().ended > ended && a1.pid_of(Program::Seawall).unwrap().is_some()).then_some(());
    within(LONG, "it is started again", again).await;
    for _ in 0..20 {
        assert!(near.reaches(web).await && !far.reaches(web).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cluster.lab.power_on(&s1).await.unwrap();
    within(LONG, "the server serves again", async || {
        cluster.kubectl("s1").run("get --raw /readyz").await.status.success().then_some(())
    })
    .await;
    let k = cluster.kubectl("s1");
    k.run("delete networkpolicy --all").await.ok();
    far.becomes(true, web, Instant::now(), "no policy is left").await;

    // Somebody takes all rules of a node away. They are missed, and there again as they were.
    k.apply(&policy("allow", allow)).await;
    far.becomes(false, web, Instant::now(), "pods with a label").await;
    for again in 0..2 {
        a1.run("nft", &["flush", "ruleset"], LONG).await.unwrap();
        for table in ["seawall", "seawall_policy", "seawall_masquerade"] {
            let is_there = async || {
                let listed = a1.run("nft", &["list", "table", "inet", table], LONG).await;
                listed.is_ok_and(|rules| rules.contains("chain")).then_some(())
            };
            within(LONG, &format!("{table} is there again ({again})"), is_there).await;
        }
        assert!(near.reaches(web).await && !far.reaches(web).await, "{again}");
    }
}

/// Pods that ask at once, each made together with the policy that keeps it from that.
async fn first_packets(k: &Kubectl, web: SocketAddr) {
    let ask = |to: &str, seconds: u8| {
        let (ip, port) = (web.ip(), web.port());
        format!(
            "if nc -w {seconds} {ip} {port} </dev/null; then echo {to} reached; else echo {to} refused; fi; {SLEEP}"
        )
    };
    let mut all = String::new();
    for n in 0..8 {
        let egress = format!("{{podSelector: {{matchLabels: {{app: shy{n}}}}}, policyTypes: [Egress]}}");
        all += &policy(&format!("shy{n}"), &egress);
        all += &pod(&format!("shy{n}"), if n % 2 == 0 { "a1" } else { "a2" }, &format!("shy{n}"), &ask("web", 1));
    }
    // One that nobody keeps from it shows that the others are kept.
    all += &pod("bold", "a1", "bold", &ask("web", 10));
    k.apply(&all).await;
    for n in 0..8 {
        ready(k, &format!("pod/shy{n}")).await;
        within(LONG, "it has asked", async || {
            k.run(&format!("logs shy{n}")).await.stdout.contains("web").then_some(())
        })
        .await;
        has(k.run(&format!("logs shy{n}")).await.ok(), &["web refused"]);
    }
    within(LONG, "it has asked", async || k.run("logs bold").await.stdout.contains("web reached").then_some(())).await;
}
