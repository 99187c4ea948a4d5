//! The important ones get room: pods that fit nowhere, on a real node that is full.

use seawall_tests::{
    Options, Server,
    kubectl::{Kubectl, has},
    on_a_machine, until,
    workload::IMAGE,
};

const CLASSES: &str = "
apiVersion: scheduling.k8s.io/v1
kind: PriorityClass
metadata: {name: urgent}
value: 1000
---
apiVersion: scheduling.k8s.io/v1
kind: PriorityClass
metadata: {name: patient}
value: 2000
preemptionPolicy: Never
";

/// A pod that asks for so much of the CPU; its class may be empty.
fn pod(name: &str, labels: &str, class: &str, millicores: i64) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{{labels}}}}}
spec:
  priorityClassName: '{class}'
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: {IMAGE}
    resources: {{requests: {{cpu: {millicores}m}}}}
"
    )
}

/// What the node has to give, in thousandths of a CPU.
async fn allocatable(k: &Kubectl) -> i64 {
    let text = k.path("nodes", "{.items[0].status.allocatable.cpu}").await;
    match text.strip_suffix('m') {
        Some(milli) => milli.parse().unwrap(),
        None => text.parse::<i64>().unwrap() * 1000,
    }
}

#[test]
fn who_matters_more_gets_room() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "here").await;
        let k = &server.kubectl;
        k.apply(CLASSES).await;
        let third = allocatable(k).await * 3 / 10;
        // Three that leave no room for a fourth. A budget protects one of them.
        for (name, labels) in [("guarded", "app: guarded"), ("common", "app: common"), ("other", "app: common")] {
            k.apply(&pod(name, labels, "", third)).await;
        }
        k.run("create pdb guarded --selector=app=guarded --min-available=1").await.ok();
        k.run("wait pods --all --for=condition=Ready --timeout=60s").await.ok();
        k.reaches("pdb/guarded", "{.status.currentHealthy}", "1").await;
        let guarded = k.path("pod/guarded", "{.metadata.uid}").await;

        // Who may not push anybody out waits, whatever it is worth.
        k.apply(&pod("waiting", "app: waiting", "patient", third)).await;
        k.reaches("pod/waiting", "{.status.conditions[?(@.type=='PodScheduled')].reason}", "Unschedulable").await;
        let why = k.path("pod/waiting", "{.status.conditions[?(@.type=='PodScheduled')].message}").await;
        has(why, &["0/1 nodes are available", "Insufficient cpu", "not eligible due to preemptionPolicy=Never"]);
        k.run("delete pod/waiting").await.ok();

        let mut ending = k.follow(
            "get pods -l app=common --watch --output-watch-events -o json --field-selector=status.phase=Running",
        );
        k.apply(&pod("urgent", "app: urgent", "urgent", third)).await;
        // The victim's last words are in its status: who looks on knows that nobody meant this pod in particular.
        ending.line("PreemptionByScheduler").await;
        ending.stop().await;
        k.run("wait pod/urgent --for=condition=Ready --timeout=60s").await.ok();
        let left = until("one of the common ones is gone", async || {
            let names = k.run("get pods -l app=common -o name").await.ok();
            (names.lines().count() == 1).then_some(names)
        })
        .await;
        has(left, &["pod/"]);
        assert_eq!(k.path("pod/guarded", "{.metadata.uid}").await, guarded, "the budget was not heeded");
        let node = k.path("nodes", "{.items[0].metadata.name}").await;
        assert_eq!(k.path("pod/urgent", "{.spec.nodeName}").await, node);
        let events = k.run("get events --field-selector=reason=Preempted -o jsonpath={.items[*].message}").await.ok();
        has(events, &["Preempted by pod", &node]);

        // Where nothing else helps, a budget gives way, as upstream: it is kept where that is possible.
        k.apply(&pod("second", "app: urgent", "urgent", third)).await;
        k.run("wait pod/second --for=condition=Ready --timeout=60s").await.ok();
        assert_eq!(k.path("pod/guarded", "{.metadata.uid}").await, guarded, "there was another one");
        k.apply(&pod("third", "app: urgent", "urgent", third)).await;
        k.run("wait pod/third --for=condition=Ready --timeout=60s").await.ok();
        assert_eq!(k.path("pod/guarded", "{.metadata.uid}").await, "", "nobody else could go");

        // Among equals nobody has to go.
        k.apply(&pod("fourth", "app: urgent", "urgent", third)).await;
        k.reaches("pod/fourth", "{.status.conditions[?(@.type=='PodScheduled')].reason}", "Unschedulable").await;
        let why = k.path("pod/fourth", "{.status.conditions[?(@.type=='PodScheduled')].message}").await;
        has(why, &["Insufficient cpu", "No preemption victims found for incoming pod"]);
        let running = k.run("get pods -l app=urgent --field-selector=status.phase=Running -o name").await.ok();
        assert_eq!(running.lines().count(), 3, "{running}");
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}

#[test]
fn a_node_that_is_short_of_disk_takes_no_pods() {
    on_a_machine(async |machine| {
        // More than any disk has left.
        let args = vec!["--eviction-hard=nodefs.available<100%".to_owned()];
        let mut server = Server::start(Options { machine: Some(machine.clone()), args }).await;
        server.node_ready().await;
        server.web_image(IMAGE, "here").await;
        let k = server.kubectl.clone();
        let pressure = "{.items[0].status.conditions[?(@.type==\"DiskPressure\")].status}";
        k.reaches("nodes", pressure, "True").await;
        k.reaches("nodes", "{.items[0].spec.taints[*].key}", "node.kubernetes.io/disk-pressure").await;
        k.apply(&pod("waits", "app: waits", "", 1)).await;
        let why = "{.status.conditions[?(@.type==\"PodScheduled\")].message}";
        until("the pod says why it waits", async || {
            k.path("pod/waits", why).await.contains("node.kubernetes.io/disk-pressure").then_some(())
        })
        .await;
        // Another threshold, and room for it.
        server.crash().await;
        server.set_args(vec!["--eviction-hard=nodefs.available<1".to_owned()]);
        server.launch().await;
        k.reaches("nodes", pressure, "False").await;
        k.reaches("pod/waits", "{.status.phase}", "Running").await;
        let said = server.seawall(&["server", "--eviction-hard=disk<5%"]).await.fails();
        has(said, &["--eviction-hard", "\"disk<5%\" is no threshold: write SIGNAL<AMOUNT"]);
    });
}
