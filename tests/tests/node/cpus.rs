//! CPUs for containers that want them for themselves: nobody else runs there, as long as they are there.

use seawall_node::cpus::set::CpuSet;
use seawall_tests::{
    Options, Server,
    kubectl::{Kubectl, has},
    on_a_machine, until,
};
use serde_json::json;

use super::IMAGE;

/// A pod that requests and may have so much.
fn pod(name: &str, node: &str, resources: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: {IMAGE}
    command: [sleep, '10000']
    resources: {{{resources}}}
---"
    )
}

const WHOLE: &str = "limits: {cpu: 1, memory: 32Mi}";

/// Waits until the first process of a pod runs on these CPUs only.
async fn runs_on(k: &Kubectl, pod: &str, cpus: &str) {
    until(&format!("{pod} runs on {cpus}"), async || {
        let said = k.run(&format!("exec {pod} -- grep Cpus_allowed_list /proc/1/status")).await.stdout;
        (said.split_whitespace().last() == Some(cpus)).then_some(())
    })
    .await;
}

async fn ready(k: &Kubectl, pod: &str) {
    k.run(&format!("wait pod/{pod} --for=condition=Ready --timeout=60s")).await.ok();
}

#[test]
fn whole_cpus_are_for_one_container() {
    let count = std::thread::available_parallelism().map_or(1, usize::from) as u32;
    assert!(count >= 2, "one CPU is given away, and others need one as well: this machine has {count}");
    let all = format!("0-{}", count - 1);
    on_a_machine(async |machine| {
        let args = |policy: &str| {
            let reserved = format!("--system-reserved=cpu={}", count - 1);
            vec![reserved, format!("--cpu-manager-policy={policy}")]
        };
        let mut server = Server::start(Options { machine: Some(machine), args: args("static") }).await;
        server.node_ready().await;
        server.web_image(IMAGE, "unused").await;
        let k = server.kubectl.clone();
        let node = k.path("nodes", "{.items[0].metadata.name}").await;

        k.apply(&pod("shares", "", "requests: {cpu: 100m}")).await;
        ready(&k, "shares").await;
        runs_on(&k, "shares", &all).await;
        k.run("delete pod shares --wait=true").await.ok();

        // One that requests nothing is moved away from it, and one that comes later is not put there.
        k.apply(&pod("before", "", "")).await;
        ready(&k, "before").await;
        runs_on(&k, "before", &all).await;
        k.apply(&pod("own", "", WHOLE)).await;
        ready(&k, "own").await;
        let said = k.run("exec own -- grep Cpus_allowed_list /proc/1/status").await.ok();
        let own: u32 = said.split_whitespace().last().unwrap().parse().expect("one CPU");
        let others: CpuSet = (0..count).filter(|cpu| *cpu != own).collect();
        let others = others.to_string();
        runs_on(&k, "before", &others).await;
        // The only Guaranteed pod: neither it nor its container has a quota, which would only slow it down.
        let groups =
            "cat /sys/fs/cgroup/cpu/kubepods/pod*/cpu.cfs_quota_us /sys/fs/cgroup/cpu/kubepods/pod*/*/cpu.cfs_quota_us";
        let quotas = server.on_machine("sh", &["-c", groups]).await.ok();
        assert!(quotas.lines().count() >= 2 && quotas.lines().all(|quota| quota == "-1"), "{quotas}");
        k.apply(&pod("after", "", "limits: {memory: 32Mi}")).await;
        ready(&k, "after").await;
        runs_on(&k, "after", &others).await;

        // Nobody asked the scheduler, which counts the requests: it is refused here.
        k.apply(&pod("bound", &node, "limits: {cpu: 1, memory: 32Mi}")).await;
        k.reaches("pod/bound", "{.status.phase}/{.status.reason}", "Failed/OutOfcpu").await;
        // It keeps what it has.
        let less = json!({"requests": {"cpu": "500m"}, "limits": {"cpu": "500m"}});
        let patch = json!({"spec": {"containers": [{"name": "main", "resources": less}]}}).to_string();
        k.args(&["patch", "pod", "own", "--subresource", "resize", "--patch", &patch]).await.ok();
        let pending = "{.status.conditions[?(@.type=='PodResizePending')].message}";
        let words = "Resize is infeasible for Guaranteed Pods alongside CPU Manager static policy";
        k.reaches("pod/own", pending, words).await;

        // The next agent knows, and another policy is not taken up under those that are here.
        server.crash().await;
        server.set_args(args("none"));
        server.launch().await;
        until("the other policy is refused", async || {
            server.logged("configured policy \"none\" differs from state checkpoint policy \"static\"").then_some(())
        })
        .await;
        server.crash().await;
        server.set_args(args("static"));
        server.launch().await;
        server.node_ready().await;
        runs_on(&k, "before", &others).await;
        runs_on(&k, "own", &own.to_string()).await;

        // When it has gone, its CPU is everybody's.
        k.run("delete pod own --wait=true").await.ok();
        runs_on(&k, "before", &all).await;
        runs_on(&k, "after", &all).await;
        let elsewhere = server.directory().join("elsewhere").display().to_string();
        let server = server.seawall(&["server", "--data-dir", &elsewhere, "--cpu-manager-policy", "static"]).await;
        has(
            server.fails(),
            &["requires systemreserved.cpu + kubereserved.cpu to be greater than zero", "--system-reserved cpu=1"],
        );
    });
}
