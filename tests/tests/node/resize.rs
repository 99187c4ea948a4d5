//! Resources of pods that change while they run: cgroups follow, containers live on, and what cannot be is said.

use std::fs;

use seawall_tests::{
    Options, Server,
    kubectl::{Kubectl, has},
    on_a_machine, until,
};
use serde_json::{Value, json};

use super::IMAGE;

fn pod(name: &str, requests: &str, limits: &str, more: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: {IMAGE}
    command: [sleep, '10000']
    resources: {{requests: {{{requests}}}, limits: {{{limits}}}}}
    {more}
---"
    )
}

/// Asks for other resources of a pod's only container.
async fn resize(k: &Kubectl, name: &str, resources: Value) -> seawall_tests::kubectl::Output {
    let patch = json!({"spec": {"containers": [{"name": "main", "resources": resources}]}}).to_string();
    k.args(&["patch", "pod", name, "--subresource", "resize", "--patch", &patch]).await
}

/// The id of the container, and how often it was started anew.
async fn container(k: &Kubectl, name: &str) -> (String, String) {
    let status = k
        .path(
            &format!("pod/{name}"),
            "{.status.containerStatuses[0].containerID},{.status.containerStatuses[0].restartCount}",
        )
        .await;
    let (id, restarts) = status.split_once(',').unwrap();
    (id.trim_start_matches("containerd://").to_owned(), restarts.to_owned())
}

/// Waits until the cgroups of a pod and of its container have a CPU quota (in thousandths) and so many MiB of memory.
async fn cgroups_have(server: &Server, name: &str, cpu: i64, mib: i64) {
    let k = &server.kubectl;
    let uid = k.path(&format!("pod/{name}"), "{.metadata.uid}").await;
    let (id, _) = container(k, name).await;
    let below = format!("kubepods/burstable/pod{uid}");
    for group in [below.clone(), format!("{below}/{id}")] {
        let files = ["cpu/{}/cpu.cfs_quota_us", "memory/{}/memory.limit_in_bytes"]
            .map(|file| format!("/sys/fs/cgroup/{}", file.replace("{}", &group)));
        let wanted = format!("{}\n{}\n", cpu * 100, mib << 20);
        until(&format!("{group} has {cpu}m and {mib} MiB"), async || {
            let read = server.on_machine("cat", &[&files[0], &files[1]]).await;
            (read.stdout == wanted).then_some(())
        })
        .await;
    }
}

fn of_condition(kind: &str, field: &str) -> String {
    format!("{{.status.conditions[?(@.type==\"{kind}\")].{field}}}")
}

#[test]
fn resources_change_in_place() {
    on_a_machine(async |machine| {
        let mut server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "unused").await;
        let k = server.kubectl.clone();
        k.apply(&pod("one", "cpu: 100m, memory: 64Mi", "cpu: 500m, memory: 128Mi", "")).await;
        k.run("wait pod/one --for=condition=Ready --timeout=60s").await.ok();
        let before = container(&k, "one").await;
        cgroups_have(&server, "one", 500, 128).await;

        let has_cpu = "{.status.containerStatuses[0].resources.limits.cpu}";
        resize(&k, "one", json!({"requests": {"cpu": "200m"}, "limits": {"cpu": "1", "memory": "256Mi"}})).await.ok();
        k.reaches("pod/one", has_cpu, "1").await;
        cgroups_have(&server, "one", 1000, 256).await;
        k.reaches("pod/one", "{.status.containerStatuses[0].allocatedResources.cpu}", "200m").await;
        // And back, memory included.
        resize(&k, "one", json!({"limits": {"cpu": "300m", "memory": "96Mi"}})).await.ok();
        cgroups_have(&server, "one", 300, 96).await;
        k.reaches("pod/one", &of_condition("PodResizeInProgress", "status"), "").await;
        assert_eq!(container(&k, "one").await, before);
        let told = until("it is told", async || {
            let told = k.run("describe pod one").await.ok();
            (told.contains("ResizeCompleted") && told.contains("ResizeStarted")).then_some(told)
        });
        has(told.await, &["Pod resize completed: {", "\"generation\":2"]);

        what_cannot_be(&server).await;
        // What was not given is not given because the agent starts anew.
        server.crash().await;
        server.launch().await;
        server.node_ready().await;
        let infeasible = of_condition("PodResizePending", "reason");
        k.reaches("pod/one", &infeasible, "Infeasible").await;
        cgroups_have(&server, "one", 300, 96).await;
        assert_eq!(container(&k, "one").await, before);
        resize(&k, "one", json!({"requests": {"cpu": "200m"}, "limits": {"cpu": "300m"}})).await.ok();
        k.reaches("pod/one", &infeasible, "").await;

        waits_for_room(&server).await;
        starts_anew(&server).await;
        is_in_use(&server).await;
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}

async fn what_cannot_be(server: &Server) {
    let k = &server.kubectl;
    resize(k, "one", json!({"requests": {"cpu": "100"}, "limits": {"cpu": "100"}})).await.ok();
    k.reaches("pod/one", &of_condition("PodResizePending", "reason"), "Infeasible").await;
    let message = k.path("pod/one", &of_condition("PodResizePending", "message")).await;
    has(&message, &["Node didn't have enough capacity: cpu, requested: 100000, capacity: "]);
    cgroups_have(server, "one", 300, 96).await;
    assert_eq!(k.path("pod/one", "{.status.containerStatuses[0].allocatedResources.cpu}").await, "200m");
    for (resources, why) in [
        (json!({"requests": {"cpu": "100", "memory": "96Mi"}}), "Pod QOS Class may not change as a result of resizing"),
        (json!({"limits": {"cpu": null}}), "resource limits cannot be removed"),
        (json!({"requests": {"memory": null}, "limits": {"memory": null}}), "resource requests cannot be removed"),
    ] {
        has(resize(k, "one", resources).await.fails(), &[why]);
    }
    let patch = "{\"spec\":{\"containers\":[{\"name\":\"main\",\"resources\":{\"limits\":{\"cpu\":\"2\"}}}]}}";
    has(
        k.args(&["patch", "pod", "one", "--patch", patch]).await.fails(),
        &["pod updates may not change fields other than"],
    );

    // Quotas and ranges hold for it too.
    k.run("create namespace small").await.ok();
    k.run("-n small create quota few --hard=requests.cpu=300m,requests.memory=1Gi").await.ok();
    let range = "{apiVersion: v1, kind: LimitRange, metadata: {name: r, namespace: small},\n\
                 spec: {limits: [{type: Container, max: {memory: 128Mi}}]}}";
    k.apply(range).await;
    k.pipe("-n small apply -f -", &pod("one", "cpu: 100m, memory: 64Mi", "cpu: 1, memory: 64Mi", "")).await.ok();
    let patch =
        |resources: Value| json!({"spec": {"containers": [{"name": "main", "resources": resources}]}}).to_string();
    let ask = async |resources: Value| {
        let words = ["-n", "small", "patch", "pod", "one", "--subresource", "resize", "--patch", &patch(resources)];
        k.args(&words).await
    };
    has(
        ask(json!({"requests": {"cpu": "400m"}})).await.fails(),
        &["exceeded quota: few, requested: requests.cpu=300m, used: requests.cpu=100m, limited: requests.cpu=300m"],
    );
    has(
        ask(json!({"limits": {"memory": "256Mi"}})).await.fails(),
        &["maximum memory usage per Container is 128Mi, but limit is 256Mi"],
    );
    ask(json!({"requests": {"cpu": "300m"}})).await.ok();
    k.reaches("-n small quota/few", "{.status.used.requests\\.cpu}", "300m").await;
    k.run("delete namespace small").await.ok();
}

/// A pod gets more when another one is gone.
async fn waits_for_room(server: &Server) {
    let k = &server.kubectl;
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap().matches("processor\t").count() as i64;
    let most = cpus * 1000 - 500;
    k.apply(&pod("other", &format!("cpu: {most}m"), "", "")).await;
    k.run("wait pod/other --for=condition=Ready --timeout=60s").await.ok();
    resize(k, "one", json!({"requests": {"cpu": "600m"}, "limits": {"cpu": "600m"}})).await.ok();
    k.reaches("pod/one", &of_condition("PodResizePending", "reason"), "Deferred").await;
    let message = k.path("pod/one", &of_condition("PodResizePending", "message")).await;
    has(&message, &[&format!("Node didn't have enough resource: cpu, requested: 600, used: {most}, capacity: ")]);
    k.run("delete pod other").await.ok();
    k.reaches("pod/one", "{.status.containerStatuses[0].allocatedResources.cpu}", "600m").await;
    cgroups_have(server, "one", 600, 96).await;
    k.reaches("pod/one", &of_condition("PodResizePending", "reason"), "").await;
}

/// A container whose policy says so gets a new life with other resources, even one that would not have one else.
async fn starts_anew(server: &Server) {
    let k = &server.kubectl;
    let policy = "resizePolicy: [{resourceName: memory, restartPolicy: RestartContainer}]";
    let yaml = pod("two", "cpu: 100m, memory: 64Mi", "cpu: 500m, memory: 128Mi", policy);
    k.apply(&yaml.replace("spec:", "spec:\n  restartPolicy: OnFailure")).await;
    k.run("wait pod/two --for=condition=Ready --timeout=60s").await.ok();
    let (before, _) = container(k, "two").await;
    resize(k, "two", json!({"limits": {"cpu": "400m"}})).await.ok();
    cgroups_have(server, "two", 400, 128).await;
    assert_eq!(container(k, "two").await, (before.clone(), "0".to_owned()));
    resize(k, "two", json!({"limits": {"memory": "256Mi"}})).await.ok();
    k.reaches("pod/two", "{.status.containerStatuses[0].restartCount}", "1").await;
    k.run("wait pod/two --for=condition=Ready --timeout=60s").await.ok();
    cgroups_have(server, "two", 400, 256).await;
    assert_ne!(container(k, "two").await.0, before);
}

/// Memory that is in use is not taken away; the pod says so until it is asked for something else.
async fn is_in_use(server: &Server) {
    let k = &server.kubectl;
    // Nobody reads what it has read.
    let hold = "[sh, -c, 'dd if=/dev/zero bs=50000000 count=1 | sleep 10000']";
    let yaml = pod("three", "cpu: 100m, memory: 16Mi", "cpu: 500m, memory: 512Mi", "");
    k.apply(&yaml.replace("[sleep, '10000']", hold)).await;
    k.run("wait pod/three --for=condition=Ready --timeout=60s").await.ok();
    let uid = k.path("pod/three", "{.metadata.uid}").await;
    let usage = format!("/sys/fs/cgroup/memory/kubepods/burstable/pod{uid}/memory.usage_in_bytes");
    until("it holds memory", async || {
        let used: i64 = server.on_machine("cat", &[&usage]).await.stdout.trim().parse().ok()?;
        (used > 45_000_000).then_some(())
    })
    .await;
    resize(k, "three", json!({"limits": {"memory": "32Mi"}})).await.ok();
    k.reaches("pod/three", &of_condition("PodResizeInProgress", "reason"), "Error").await;
    let message = k.path("pod/three", &of_condition("PodResizeInProgress", "message")).await;
    has(&message, &["attempting to set container memory limit (33554432) below current usage ("]);
    cgroups_have(server, "three", 500, 512).await;
    resize(k, "three", json!({"limits": {"memory": "512Mi"}})).await.ok();
    k.reaches("pod/three", &of_condition("PodResizeInProgress", "status"), "").await;
    assert_eq!(container(k, "three").await.1, "0");
}

#[test]
fn what_does_not_fit_is_refused() {
    on_a_machine(async |machine| {
        let args = ["--max-pods=4", "--node-label=place=here"].map(str::to_owned).to_vec();
        let server = Server::start(Options { machine: Some(machine.clone()), args }).await;
        server.node_ready().await;
        server.web_image(IMAGE, "unused").await;
        let k = &server.kubectl;
        let node = k.path("nodes", "{.items[0].metadata.name}").await;
        // Bound by hand, so that no scheduler looks at it.
        let bound = |name: &str, requests: &str, more: &str| {
            pod(name, requests, "", "").replace("spec:", &format!("spec:\n  nodeName: {node}\n  {more}"))
        };
        let refused = async |yaml: String, name: &str, reason: &str, message: &str| {
            k.apply(&yaml).await;
            k.reaches(&format!("pod/{name}"), "{.status.phase},{.status.reason}", &format!("Failed,{reason}")).await;
            has(k.path(&format!("pod/{name}"), "{.status.message}").await, &["Pod was rejected: ", message]);
            k.run(&format!("delete pod {name}")).await.ok();
        };
        refused(bound("big", "cpu: 100", ""), "big", "OutOfcpu", "enough resource: cpu, requested: 100000, used: 0,")
            .await;
        refused(bound("fat", "memory: 1000Gi", ""), "fat", "OutOfmemory", "enough resource: memory, requested: ").await;
        refused(
            bound("lost", "cpu: 1m", "nodeSelector: {place: elsewhere}"),
            "lost",
            "NodeAffinity",
            "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector",
        )
        .await;
        k.apply(&bound("found", "cpu: 1m", "nodeSelector: {place: here}")).await;
        k.run("wait pod/found --for=condition=Ready --timeout=60s").await.ok();
        // A label that is there a moment before the pod counts.
        k.run(&format!("label node {node} colour=blue")).await.ok();
        k.apply(&bound("blue", "cpu: 1m", "nodeSelector: {colour: blue}")).await;
        k.run("wait pod/blue --for=condition=Ready --timeout=60s").await.ok();

        // The DNS of the cluster, or whatever else is there, counts as well.
        let others = k.run("get pods -A --no-headers").await.ok().lines().count();
        for index in others..4 {
            k.apply(&bound(&format!("filler-{index}"), "cpu: 1m", "")).await;
            k.run(&format!("wait pod/filler-{index} --for=condition=Ready --timeout=60s")).await.ok();
        }
        refused(bound("late", "cpu: 1m", ""), "late", "OutOfpods", "pods, requested: 1, used: 4, capacity: 4").await;
        k.run("delete pod blue --now").await.ok();
        k.run(&format!("taint node {node} away=now:NoExecute")).await.ok();
        until("those that do not put up with it are gone", async || {
            let left = k.run("get pods --no-headers").await;
            left.stdout.trim().is_empty().then_some(())
        })
        .await;
        // It is refused; that it is evicted as well, like all others, takes it away in a moment.
        k.apply(&bound("stranger", "cpu: 1m", "")).await;
        let why = "Predicate TaintToleration failed: node(s) had untolerated taint(s)";
        until("it is refused", async || k.run("get events").await.ok().contains(why).then_some(())).await;
        let told = k.run("get events").await.ok();
        has(told, &["OutOfcpu", "OutOfpods", "TaintToleration"]);
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}
