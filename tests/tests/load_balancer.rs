//! A Service of type LoadBalancer on machines without a cloud: it has an address, a client outside reaches it, and goes on
//! when the machine that answers for it loses its power.

use std::{net::Ipv6Addr, time::Duration};

use seawall_drill::lab::Service;
use seawall_tests::{
    Options, Server,
    cluster::{Cluster, Lan},
    kubectl::has,
    pods::{at, url},
    traffic, within,
};
use serde_json::{Value, json};
use tokio::{process::Command, time::Instant};

const LONG: Duration = Duration::from_secs(120);

const WEB: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: web}}}
      containers:
      - name: web
        image: example.test/web:v1
        command: [sh, -c, 'mkdir /named; hostname >/named/index.html; exec httpd -f -p 8080 -h /named']
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
";

const ADDRESS: &str = "{.status.loadBalancer.ingress[0].ip}";
const ADDRESSES: &str = "{.status.loadBalancer.ingress[*].ip}";

/// The next address with the last 16 bits 0x240, where the lab has no machine.
fn of_pool(ip: &str) -> String {
    let mut segments = ip.parse::<Ipv6Addr>().unwrap().segments();
    segments[7] = 0x240;
    Ipv6Addr::from(segments).to_string()
}

/// What a machine says of the health of a Service: whether it has endpoints, and how many.
async fn health(ip: &str, port: &str) -> Option<(String, Value)> {
    let url = url(ip, port, "healthz");
    let output = Command::new("curl").args(["-gsS", "-m", "5", "-w", "\n%{http_code}", &url]).output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n')?;
    Some((status.to_owned(), serde_json::from_str(body).ok()?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_outlives_the_machine_that_answers_for_it() {
    let lan = Lan { dual_stack: true, ..Lan::default() };
    let ranges = ["--cluster-cidr=10.244.0.0/16,fd00:10:244::/48", "--service-cidr=10.96.0.0/16,fd00:10:96::/112"];
    let mut settings = Cluster::fast().unwrap();
    settings.server_args.extend(ranges.map(str::to_owned));
    let cluster = Cluster::up_on(lan, "lb", 1, 3, Some(settings)).await;
    let s1 = cluster.machine("s1");
    // Which network the lab has is known only now.
    let [a, b, c, _] = s1.address().octets();
    let (first, six) = (format!("{a}.{b}.{c}.240"), of_pool(s1.addresses().split(',').nth(1).unwrap()));
    let pool = format!("--load-balancer-pool={a}.{b}.{c}.240/30,{six}/126");
    let service = s1.service();
    s1.set_running(false).await.unwrap();
    s1.set_service(&Service { args: [&service.args[..], &[pool]].concat(), ..service }).unwrap();
    s1.set_running(true).await.unwrap();
    within(LONG, "the server serves again", async || {
        cluster.kubectl("s1").run("get --raw /readyz").await.status.success().then_some(())
    })
    .await;
    let agents = ["a1", "a2", "a3"].map(|name| cluster.machine(name));
    let k = cluster.takes_pods("s1", &agents.each_ref()).await;
    k.apply(WEB).await;
    k.run("rollout status deployment/web --timeout=120s").await.ok();
    k.reaches("service/web", ADDRESSES, &format!("{first} {six}")).await;
    let (address, of_six) = (at(&first, "80"), at(&six, "80"));
    // The host is on the machines' network, and none of them.
    within(LONG, "the address answers", async || traffic::get(address).await.ok()).await;
    within(LONG, "that of IPv6 answers", async || traffic::get(of_six).await.ok()).await;
    has(k.run("get service web").await.ok(), &[&first]);

    // Who answers?
    let owner = async || {
        let mut found = Vec::new();
        for machine in agents.iter().chain([&s1]) {
            let shown = machine.command("ip").args(["-o", "addr", "show"]).output().await;
            if shown.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains(&format!("{}/32", first))) {
                found.push(machine.name().to_owned());
            }
        }
        found
    };
    // Only where there is an endpoint, where the client's address counts: not on the server.
    k.args(&["patch", "service", "web", "-p", r#"{"spec": {"externalTrafficPolicy": "Local"}}"#]).await.ok();
    let dies = within(LONG, "one machine with a pod answers", async || match &owner().await[..] {
        [one] if one != "s1" => Some(one.clone()),
        _ => None,
    })
    .await;
    within(LONG, "the address answers", async || traffic::get(address).await.ok()).await;

    // Load balancers of others would ask which machines those are.
    let port = k.path("service/web", "{.spec.healthCheckNodePort}").await;
    for (machine, status, local) in [(&agents[0], "200", 1), (&agents[2], "200", 1), (&s1, "503", 0)] {
        let told = json!({"service": {"namespace": "default", "name": "web"}, "localEndpoints": local,
            "serviceProxyHealthy": true});
        for ip in machine.addresses().split(',') {
            within(LONG, &format!("{ip}:{port} says {status}"), async || {
                (health(ip, &port).await? == (status.to_owned(), told.clone())).then_some(())
            })
            .await;
        }
    }

    // The control plane goes first, then the machine that answers.
    s1.power_off(false).await.unwrap();
    for _ in 0..5 {
        traffic::get(address).await.unwrap();
    }
    let since = Instant::now();
    cluster.machine(&dies).power_off(false).await.unwrap();
    within(Duration::from_secs(20), "another one answers", async || {
        let asked = tokio::time::timeout(Duration::from_millis(300), traffic::get(address)).await;
        asked.ok()?.ok()
    })
    .await;
    eprintln!("without a control plane, {dies} lost its power: its address answered again after {:?}", since.elapsed());
    assert!(since.elapsed() < Duration::from_secs(10));
    let mut failed = 0;
    for _ in 0..50 {
        failed += usize::from(traffic::get(address).await.is_err());
    }
    assert_eq!(failed, 0, "it goes on");
    within(LONG, "so does that of IPv6", async || {
        tokio::time::timeout(Duration::from_millis(300), traffic::get(of_six)).await.ok()?.ok()
    })
    .await;
}

/// Without a pool nothing is given, as upstream; the check says what to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_is_given_and_taken() {
    let service = |name: &str, more: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{type: LoadBalancer, ports: [{{port: 80}}]{more}}}\n"
        )
    };
    let server = Server::start(Options::default()).await;
    let k = &server.kubectl;
    k.apply(&service("web", "")).await;
    has(k.run("get service web").await.ok(), &["<pending>"]);
    drop(server);

    let args = vec!["--load-balancer-pool".into(), "192.0.2.16-192.0.2.17,192.0.2.40".into()];
    let server = Server::start(Options { args, ..Options::default() }).await;
    let k = &server.kubectl;
    let all = [
        service("one", ""),
        service("asks", ", loadBalancerIP: 192.0.2.40"),
        service("other", ", loadBalancerClass: example.test/other"),
        service("wrong", ", loadBalancerIP: 203.0.113.1"),
    ];
    k.apply(&all.concat()).await;
    k.reaches("service/one", ADDRESS, "192.0.2.16").await;
    k.reaches("service/asks", ADDRESS, "192.0.2.40").await;
    within(LONG, "it is told why", async || {
        let events = k.run("get events --field-selector involvedObject.name=wrong").await.stdout;
        events.contains("203.0.113.1 is not in --load-balancer-pool").then_some(())
    })
    .await;
    k.apply(&(service("two", "") + &service("three", ""))).await;
    within(LONG, "one of them waits", async || {
        let events = k.run("get events --field-selector reason=NoAddress").await.stdout;
        events.contains("has no free address of IPv4").then_some(())
    })
    .await;
    // What becomes free is given to whoever waits.
    let waits = if k.path("service/two", ADDRESS).await.is_empty() { "two" } else { "three" };
    k.args(&["patch", "service", "one", "-p", r#"{"spec": {"type": "ClusterIP"}}"#]).await.ok();
    k.reaches(&format!("service/{waits}"), ADDRESS, "192.0.2.16").await;
    k.reaches("service/one", ADDRESS, "").await;
    assert_eq!(k.path("service/other", ADDRESS).await, "");
    assert_eq!(k.path("service/wrong", ADDRESS).await, "");
}
