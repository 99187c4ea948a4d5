//! `kubectl top`, an autoscaler by real load, and what the agent says of itself.

use seawall_tests::{
    Server,
    kubectl::{Kubectl, has},
    on_a_machine, until,
};
use serde_json::Value;

use super::IMAGE;

/// Two kinds of pods: some that use all they may, and one that sleeps.
fn deployments() -> String {
    let one = |name: &str, command: &str| {
        format!(
            "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: main
        image: {IMAGE}
        command: [sh, -c, '{command}']
        resources: {{requests: {{cpu: 50m}}, limits: {{cpu: 100m, memory: 64Mi}}}}
        volumeMounts: [{{name: scratch, mountPath: /scratch}}]
      volumes: [{{name: scratch, emptyDir: {{}}}}]
---"
        )
    };
    one("busy", "while :; do :; done")
        + &one("calm", "head -c 3000000 /dev/zero >/scratch/file; echo said; exec sleep 1000")
}

/// The CPU in thousandths and the memory in MiB of each line of `kubectl top`, by the first word.
fn read(text: &str, columns: [usize; 3]) -> Vec<(String, i64, i64)> {
    let number = |word: &str| word.trim_end_matches(|c: char| c.is_alphabetic()).parse().unwrap_or(-1);
    text.lines()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (words[columns[0]].to_owned(), number(words[columns[1]]), number(words[columns[2]]))
        })
        .collect()
}

#[test]
fn what_pods_use_is_measured() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "unused").await;
        let k = &server.kubectl;
        k.apply(&deployments()).await;
        for name in ["busy", "calm"] {
            k.run(&format!("rollout status deployment/{name} --timeout=60s")).await.ok();
        }
        top(k).await;
        told_by_the_agent(&server).await;
        k.run("autoscale deployment busy --min=1 --max=3 --cpu=50%").await.ok();
        k.reaches("deployment/busy", "{.spec.replicas}", "3").await;
        let why = "New size: 3; reason: cpu resource utilization (percentage of request) above target";
        let described = until("it says why", async || {
            let said = k.run("describe hpa busy").await.ok();
            said.contains("New size: 3").then_some(said)
        });
        has(described.await, &[why]);
        others_come_first(k).await;
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}

async fn top(k: &Kubectl) {
    let pods = until("pods are measured", async || {
        let output = k.run("top pods --no-headers").await;
        (output.status.success() && output.stdout.lines().count() == 2).then_some(output.stdout)
    })
    .await;
    let pods = read(&pods, [0, 1, 2]);
    let of = |name: &str| pods.iter().find(|(pod, ..)| pod.starts_with(name)).unwrap();
    // Its quota is a tenth of a CPU, and the kernel keeps to it.
    assert!((50..=130).contains(&of("busy").1) && of("calm").1 < 50, "{pods:?}");
    assert!(pods.iter().all(|(_, _, memory)| (0..64).contains(memory)), "{pods:?}");
    let containers = k.run("top pods -l app=busy --containers --no-headers").await.ok();
    let containers = read(&containers, [1, 2, 3]);
    assert_eq!((containers.len(), containers[0].0.as_str()), (1, "main"), "{containers:?}");

    let nodes = read(&k.run("top nodes --no-headers").await.ok(), [0, 1, 3]);
    let (name, cpu, memory) = &nodes[0];
    assert!(nodes.len() == 1 && *cpu > 50 && *memory > 50, "{nodes:?}");
    let raw: Value = serde_json::from_str(&k.run("get --raw /apis/metrics.k8s.io/v1beta1/nodes").await.ok()).unwrap();
    assert_eq!(
        (&raw["kind"], raw["items"][0]["metadata"]["name"].as_str()),
        (&"NodeMetricsList".into(), Some(&**name))
    );
    has(k.run("get nodes.metrics.k8s.io").await.ok(), &["NAME", "CPU", "MEMORY", "WINDOW", name, "10s"]);
    has(k.run("get pods.metrics.k8s.io none").await.fails(), &["podmetrics.metrics.k8s.io \"default/none\" not found"]);
    has(k.run("api-resources --api-group=metrics.k8s.io").await.ok(), &["NodeMetrics", "PodMetrics"]);
    k.run("delete pods.metrics.k8s.io none").await.fails();

    // Who may view a namespace may see what its pods use, and not what others do.
    k.run("create rolebinding viewer --clusterrole=view --user=viewer").await.ok();
    assert_eq!(k.run("top pods --no-headers --as=viewer").await.ok().lines().count(), 2);
    has(k.run("top nodes --as=viewer").await.fails(), &["nodes.metrics.k8s.io is forbidden"]);
}

async fn told_by_the_agent(server: &Server) {
    let agent = server.api().at("192.0.2.10:10250");
    let summary = agent.get("/stats/summary").await.unwrap().json();
    let pods = summary["pods"].as_array().unwrap();
    let calm = pods.iter().find(|p| p["podRef"]["name"].as_str().unwrap().starts_with("calm")).unwrap();
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value} in {calm:#}"));
    let container = &calm["containers"][0];
    assert!(number(&container["memory"]["workingSetBytes"]) > 0);
    assert_eq!(number(&container["memory"]["availableBytes"]) / (1 << 20), 63, "{container:#}");
    assert!(number(&container["logs"]["usedBytes"]) > 0 && number(&container["rootfs"]["inodesUsed"]) > 0);
    let volume = &calm["volume"][0];
    assert_eq!(volume["name"], "scratch");
    assert!((3_000_000..4_000_000).contains(&number(&volume["usedBytes"])));
    assert!(number(&calm["ephemeral-storage"]["usedBytes"]) > 3_000_000);
    assert!(number(&calm["network"]["rxBytes"]) > 0, "it has an interface of its own");
    assert!(number(&calm["process_stats"]["process_count"]) >= 2);
    assert!(number(&summary["node"]["runtime"]["imageFs"]["usedBytes"]) > 1_000_000);

    let resource = agent.get("/metrics/resource").await.unwrap().text();
    let of_busy = "container_cpu_usage_seconds_total{container=\"main\",namespace=\"default\",pod=\"busy-";
    has(&resource, &[of_busy, "node_memory_working_set_bytes ", "resource_scrape_error 0"]);
    let cadvisor = agent.get("/metrics/cadvisor").await.unwrap().text();
    has(&cadvisor, &["container_network_receive_bytes_total{", "machine_memory_bytes "]);
    let throttled = cadvisor.lines().find(|l| {
        l.starts_with("container_cpu_cfs_throttled_periods_total{container=\"main\"") && l.contains("pod=\"busy-")
    });
    let periods: f64 = throttled.unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(periods > 10.0, "{throttled:?}");
}

/// Somebody else's server of metrics is asked instead, whether it answers or not.
async fn others_come_first(k: &Kubectl) {
    k.apply(
        "
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.metrics.k8s.io}
spec:
  group: metrics.k8s.io
  version: v1beta1
  groupPriorityMinimum: 100
  versionPriority: 100
  insecureSkipTLSVerify: true
  service: {namespace: kube-system, name: metrics-server}
",
    )
    .await;
    let refused = until("theirs is asked", async || {
        let output = k.run("get --raw /apis/metrics.k8s.io/v1beta1/nodes").await;
        (!output.status.success()).then_some(output.stderr)
    });
    has(refused.await, &["ervice"]);
    k.run("delete apiservice v1beta1.metrics.k8s.io").await.ok();
    until("ours is back", async || {
        k.run("get --raw /apis/metrics.k8s.io/v1beta1/nodes").await.status.success().then_some(())
    })
    .await;
}
