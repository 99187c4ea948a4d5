//! What a pod gets for itself comes from one NUMA node, or the pod is refused. The machine is shown two: a directory lies over
//! the kernel's word about nodes.

use std::{fs, sync::Arc};

use seawall_tests::{
    Options, Server,
    kubectl::{Kubectl, has},
    machine::Machine,
    on_a_machine,
};

use super::{
    IMAGE,
    devices::{Plugin, RESOURCE, shows},
};

/// A pod with containers that want so many CPUs and devices each.
fn pod(name: &str, containers: &[(u32, u32)]) -> String {
    let containers = containers.iter().enumerate().map(|(number, (cpus, devices))| {
        let cpus = if *cpus > 0 { format!("cpu: {cpus}, memory: 32Mi, ") } else { String::new() };
        format!(
            "
  - name: c{number}
    image: {IMAGE}
    command: [sleep, '10000']
    resources: {{limits: {{{cpus}{RESOURCE}: {devices}}}}}"
        )
    });
    let containers: String = containers.collect();
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 1
  containers: {containers}
---"
    )
}

/// Makes the machine say that its last CPU is of node 1, and all others of node 0.
async fn with_two_nodes(machine: &Machine, cpus: u32) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let write = |file: &str, text: String| {
        let path = directory.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("online", "0-1\n".to_owned());
    for (node, cpus) in [(0, format!("0-{}\n", cpus - 2)), (1, format!("{}\n", cpus - 1))] {
        write(&format!("node{node}/cpulist"), cpus);
        write(&format!("node{node}/distance"), if node == 0 { "10 20\n" } else { "20 10\n" }.to_owned());
    }
    let mut mount = machine.command("mount");
    mount.arg("--bind").arg(directory.path()).arg("/sys/devices/system/node");
    assert!(mount.status().await.unwrap().success());
    directory
}

async fn ready(k: &Kubectl, pod: &str) {
    k.run(&format!("wait pod/{pod} --for=condition=Ready --timeout=60s")).await.ok();
}

async fn devices_of(k: &Kubectl, pod: &str, container: &str) -> String {
    k.args(&["exec", pod, "-c", container, "--", "sh", "-c", "echo $DEVICES"]).await.ok().trim().to_owned()
}

async fn is_refused(k: &Kubectl, pod: &str) {
    k.reaches(&format!("pod/{pod}"), "{.status.phase}/{.status.reason}", "Failed/TopologyAffinityError").await;
    let said = k.path(&format!("pod/{pod}"), "{.status.message}").await;
    assert_eq!(said, "Pod was rejected: Resources cannot be allocated with Topology locality");
    let events = k.run(&format!("get events --field-selector involvedObject.name={pod}")).await.ok();
    has(events, &["TopologyAffinityError"]);
}

#[test]
fn what_a_pod_gets_comes_from_one_node() {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u32;
    assert!(cpus >= 2, "each node needs a CPU, and this machine has {cpus}");
    on_a_machine(async |machine: Arc<Machine>| {
        let _nodes = with_two_nodes(&machine, cpus).await;
        let args = |scope: &str| {
            let reserved = format!("--system-reserved=cpu={}", cpus - 1);
            let policy = "--topology-manager-policy=single-numa-node".to_owned();
            let scope = format!("--topology-manager-scope={scope}");
            vec![reserved, "--cpu-manager-policy=static".to_owned(), policy, scope]
        };
        let mut server = Server::start(Options { machine: Some(machine), args: args("container") }).await;
        server.node_ready().await;
        server.web_image(IMAGE, "unused").await;
        let k = server.kubectl.clone();
        let plugin = Plugin::start(&server, &["a:1", "b:1", "c:0", "d:0"]);
        shows(&k, 4, 4).await;

        // The only CPU that is given out is of node 1, so the device has to be, too. The plugin would rather give d, and is
        // asked about those that are left.
        k.apply(&pod("near", &[(1, 1)])).await;
        ready(&k, "near").await;
        assert_eq!(devices_of(&k, "near", "c0").await, "b");
        assert_eq!(plugin.calls(), ["allocate b", "start b"]);
        let said = k.run("exec near -- grep Cpus_allowed_list /proc/1/status").await.ok();
        assert_eq!(said.split_whitespace().last(), Some((cpus - 1).to_string().as_str()));

        // There are three devices left, but not on one node. Nothing is kept of who is refused.
        k.apply(&pod("wide", &[(0, 3)])).await;
        is_refused(&k, "wide").await;
        k.apply(&pod("partly", &[(0, 1), (0, 2)])).await;
        is_refused(&k, "partly").await;
        k.apply(&pod("pair", &[(0, 2)])).await;
        ready(&k, "pair").await;
        assert_eq!(devices_of(&k, "pair", "c0").await, "c,d");

        // Another agent, which wants something else, leaves everybody what they have.
        let containers = "{.items[*].status.containerStatuses[*].containerID}";
        let before = k.path("pods", containers).await;
        server.crash().await;
        server.set_args(args("pod"));
        server.launch().await;
        server.node_ready().await;
        shows(&k, 4, 4).await;
        assert_eq!(k.path("pods", containers).await, before);
        assert_eq!(
            (devices_of(&k, "near", "c0").await.as_str(), devices_of(&k, "pair", "c0").await.as_str()),
            ("b", "c,d")
        );

        // What pods had is free when the API knows them no more. (With no grace the API forgets them before they have ended.)
        // Containers could have devices of one node each, but the pod cannot.
        k.run("delete pod near wide partly pair --wait=true").await.ok();
        k.apply(&pod("all", &[(0, 2), (0, 1)])).await;
        is_refused(&k, "all").await;
        k.apply(&pod("together", &[(0, 1), (0, 1)])).await;
        ready(&k, "together").await;
        let mut both = [devices_of(&k, "together", "c0").await, devices_of(&k, "together", "c1").await];
        both.sort();
        assert_eq!(both, ["c", "d"]);

        let elsewhere = server.directory().join("elsewhere").display().to_string();
        let fails = async |flag: &str, value: &str, words: &str| {
            let said = server.seawall(&["server", "--data-dir", &elsewhere, flag, value]).await;
            has(said.fails(), &[words]);
        };
        fails("--topology-manager-policy", "near", "none, best-effort, restricted or single-numa-node").await;
        fails("--topology-manager-scope", "node", "container or pod").await;
        let words = "unknown Topology Manager Policy option: \"align\"";
        fails("--topology-manager-policy-options", "align=true", words).await;
    });
}
