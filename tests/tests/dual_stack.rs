//! A cluster of both families, whose nodes are on two networks: nodes, pods, Services, DNS and policies have both.

use std::{net::SocketAddr, process::Command, time::Duration};

use seawall_drill::lab::Cluster as Settings;
use seawall_tests::{
    cluster::{Cluster, Lan},
    inside::Inside,
    kubectl::{Kubectl, has},
    pods::{BIG, SERVE, SLEEP, at, gets, pod, url},
    within,
};
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(120);

fn service(name: &str, spec: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{app: web}}, ports: [{{name: http, port: 80, targetPort: 8080}}], {spec}}}
"
    )
}

fn settings() -> Option<Settings> {
    let ranges = ["--cluster-cidr=10.244.0.0/16,fd00:10:244::/48", "--service-cidr=10.96.0.0/16,fd00:10:96::/112"];
    Some(Settings { server_args: ranges.map(str::to_owned).into(), ..Cluster::with_dns()? })
}

/// The values at a path.
async fn all(k: &Kubectl, what: &str, path: &str) -> Vec<String> {
    k.path(what, &format!("{{{path}}}")).await.split_whitespace().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_has_addresses_of_both_families() {
    let lan = Lan { networks: 2, dual_stack: true };
    let cluster = Cluster::up_on(lan, "dual", 1, 2, settings()).await;
    let (s1, a1, a2) = (cluster.machine("s1"), cluster.machine("a1"), cluster.machine("a2"));
    let k = cluster.takes_pods("s1", &[&s1, &a1, &a2]).await;

    // Nodes.
    let addresses = all(&k, "node/a1", ".status.addresses[?(@.type==\"InternalIP\")].address").await;
    assert_eq!(addresses.join(","), a1.addresses());
    let cidrs = all(&k, "node/a1", ".spec.podCIDRs[*]").await;
    assert!(cidrs.len() == 2 && cidrs[0].starts_with("10.244.") && cidrs[1].ends_with("::/64"), "{cidrs:?}");
    assert_eq!(k.path("node/a1", "{.spec.podCIDR}").await, cidrs[0]);
    has(k.run("get servicecidr kubernetes").await.ok(), &["10.96.0.0/16,fd00:10:96::/112"]);
    assert_eq!(all(&k, "service/kubernetes", ".spec.clusterIPs[*]").await, ["10.96.0.1"]);

    // Who comes by either address knows whom it speaks with: the agent, and the server.
    for (machine, port) in [(&a1, 10250), (&s1, 10250), (&s1, 6443)] {
        for ip in machine.addresses().split(',') {
            let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
            let url = format!("https://{host}:{port}/healthz");
            let trusted = s1.on_disk("/var/lib/seawall/tls/ca.crt").display().to_string();
            let known = ["-gsS", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", &trusted, &url];
            within(LONG, &format!("{url} has a certificate"), async || {
                let output = Command::new("curl").args(known).output().unwrap();
                eprintln!("{url}: {}", String::from_utf8_lossy(&output.stderr));
                output.status.success().then_some(())
            })
            .await;
        }
    }

    // Pods.
    let pods = [pod("web", "a2", SERVE), pod("near", "a2", SLEEP), pod("far", "a1", SLEEP), pod("same", "s1", SLEEP)];
    let services = [
        service("plain", ""),
        service("both", "type: NodePort, ipFamilyPolicy: PreferDualStack"),
        service("six", "ipFamilies: [IPv6]"),
        service("turned", "ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6, IPv4]"),
        service("headless", "clusterIP: None, ipFamilyPolicy: RequireDualStack"),
    ];
    k.apply(&(pods.concat() + &services.concat())).await;
    k.run("wait pod/web pod/near pod/far pod/same --for=condition=Ready --timeout=120s").await.ok();
    let web = all(&k, "pod/web", ".status.podIPs[*].ip").await;
    assert!(web.len() == 2 && web[0].starts_with("10.244.") && web[1].starts_with("fd00:10:244:"), "{web:?}");
    assert_eq!(all(&k, "pod/web", ".status.hostIPs[*].ip").await.join(","), a2.addresses());
    let seen = k.args(&["exec", "web", "--", "sh", "-c", "echo $IPS $HOSTS"]).await.ok();
    assert_eq!(seen.trim(), format!("{} {}", web.join(","), a2.addresses()));

    // By each address of the pod and of its Services, from this network and the other.
    let far = Inside::of(&a1, "far");
    let near = Inside::of(&a2, "near");
    let same = Inside::of(&s1, "same");
    let mut targets: Vec<(String, String)> = web.iter().map(|ip| (ip.clone(), "8080".to_owned())).collect();
    for (name, families) in [("plain", "4"), ("both", "46"), ("six", "6"), ("turned", "64")] {
        let ips = all(&k, &format!("service/{name}"), ".spec.clusterIPs[*]").await;
        let of: String = ips.iter().map(|ip| if ip.contains(':') { '6' } else { '4' }).collect();
        assert_eq!(of, families, "{name} {ips:?}");
        targets.extend(ips.into_iter().map(|ip| (ip, "80".to_owned())));
    }
    for (ip, port) in &targets {
        for from in [&far, &near, &same] {
            from.becomes(true, at(ip, port), Instant::now(), "both families").await;
        }
        assert_eq!(gets(&k, "far", &url(ip, port, "big")).await, BIG, "{ip}");
    }
    // The pod's own address is seen in both.
    let log = k.run("logs web").await.ok();
    for ip in all(&k, "pod/far", ".status.podIPs[*].ip").await {
        assert!(log.contains(&ip), "{ip} asked: {log}");
    }
    let types =
        k.run("get endpointslices -l kubernetes.io/service-name=both -o jsonpath={.items[*].addressType}").await.ok();
    let mut types: Vec<&str> = types.split_whitespace().collect();
    types.sort_unstable();
    assert_eq!(types, ["IPv4", "IPv6"]);

    // Node ports, by the addresses of a node that does not run the pod.
    let port = k.path("service/both", "{.spec.ports[0].nodePort}").await;
    for ip in a1.addresses().split(',') {
        let url = url(ip, &port, "name");
        let output = Command::new("curl").args(["-gsS", "-m", "10", &url]).output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "web\n",
            "{url}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    // Names.
    let look = async |kind: &str, name: &str| {
        let words = ["exec", "far", "--", "nslookup", &format!("-type={kind}"), name];
        let answer = k.args(&words).await;
        answer.stdout + &answer.stderr
    };
    let both = all(&k, "service/both", ".spec.clusterIPs[*]").await;
    within(LONG, "names have both", async || {
        let (a, aaaa) =
            (look("a", "both.default.svc.cluster.local").await, look("aaaa", "both.default.svc.cluster.local").await);
        (a.contains(&both[0]) && aaaa.contains(&both[1])).then_some(())
    })
    .await;
    has(look("aaaa", "headless.default.svc.cluster.local").await, &[&web[1]]);
    has(look("a", "headless.default.svc.cluster.local").await, &[&web[0]]);
    for ip in &both {
        has(k.args(&["exec", "far", "--", "nslookup", ip]).await.stdout, &["both.default.svc.cluster.local"]);
    }

    // Policies.
    let policy = |from: &str| {
        format!(
            "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: closed}}
spec: {{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{from: {from}}}]}}
"
        )
    };
    let web: Vec<SocketAddr> = web.iter().map(|ip| at(ip, "8080")).collect();
    let check = async |from: &str, four: bool, six: bool| {
        k.apply(&policy(from)).await;
        far.becomes(four, web[0], Instant::now(), from).await;
        far.becomes(six, web[1], Instant::now(), from).await;
    };
    check("[{podSelector: {matchLabels: {app: near}}}]", false, false).await;
    check("[{podSelector: {matchLabels: {app: far}}}]", true, true).await;
    check("[{ipBlock: {cidr: \"fd00:10:244::/48\"}}]", false, true).await;
    check("[{ipBlock: {cidr: 10.244.0.0/16}}]", true, false).await;
    k.run("delete networkpolicy closed").await.ok();

    // A second address is given back.
    k.run("patch service both -p {\"spec\":{\"ipFamilyPolicy\":\"SingleStack\"}}").await.ok();
    assert_eq!(all(&k, "service/both", ".spec.clusterIPs[*]").await, [both[0].clone()]);
    far.becomes(false, at(&both[1], "80"), Instant::now(), "its second address is gone").await;
    assert!(far.reaches(at(&both[0], "80")).await);
}
