//! Nodes that are lost in different ways, and a stateful pod on each: it is made anew elsewhere by itself, and never is there
//! more than one of it. Each instance writes who it is, and when, into a directory that all machines share.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use seawall_drill::lab::{Machine, Program, Way};
use seawall_tests::{cluster::Cluster, kubectl::Kubectl, within};

const IMAGE: &str = "example.test/busybox:v1";
/// By then it runs elsewhere: the profile's `fence-wait` is 18 s, the rest is for a busy machine.
const ELSEWHERE: Duration = Duration::from_secs(60);

fn writer(shared: &Path) -> String {
    let script = "id=$(cat /proc/sys/kernel/random/uuid); while :; do echo \"$id $(cut -d' ' -f1 /proc/uptime)\" \
                  >> /shared/$HOSTNAME; sleep 0.05; done";
    format!(
        "
apiVersion: apps/v1
kind: StatefulSet
metadata: {{name: db}}
spec:
  serviceName: db
  selector: {{matchLabels: {{app: db}}}}
  template:
    metadata: {{labels: {{app: db}}}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: writer
        image: {IMAGE}
        command: [sh, -c, {}]
        volumeMounts: [{{name: shared, mountPath: /shared}}]
      volumes: [{{name: shared, hostPath: {{path: {}}}}}]
",
        serde_json::json!(script),
        shared.display()
    )
}

/// The instances in the order in which they began: the first and last sign of each, in seconds of the host's clock, which
/// is that of all machines.
fn instances(file: &Path) -> Vec<(f64, f64)> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let mut found: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for (id, at) in text.lines().filter_map(|line| line.split_once(' ')) {
        let Ok(at) = at.parse::<f64>() else { continue };
        let (first, last) = found.entry(id).or_insert((at, at));
        (*first, *last) = (first.min(at), last.max(at));
    }
    let mut all: Vec<_> = found.into_values().collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    all
}

/// How long a pod may go on when its machine thaws, in seconds: its processes wake up together with the watchdog, which is
/// what software on the machine cannot rule out (`crates/node/src/fence.rs`). The drills allow the same.
const WAKES: f64 = 0.1;

/// `thawed` is the instance whose machine was frozen.
#[track_caller]
fn never_two(file: &Path, thawed: usize) {
    let all = instances(file);
    println!("{all:?}");
    for (index, pair) in all.windows(2).enumerate() {
        let grace = if index == thawed { WAKES } else { 0.0 };
        assert!(pair[0].1 < pair[1].0 + grace, "two at a time: {:?} and {:?}", pair[0], pair[1]);
    }
}

async fn node_of(kubectl: &Kubectl) -> String {
    within(ELSEWHERE, "the pod runs", async || {
        kubectl.run("wait pod/db-0 --for=condition=Ready --timeout=1s").await.status.success().then_some(())
    })
    .await;
    kubectl.path("pod/db-0", "{.spec.nodeName}").await
}

/// Waits until the pod writes on another machine.
async fn elsewhere(file: &Path, before: usize) {
    within(ELSEWHERE, "it runs elsewhere", async || (instances(file).len() > before).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stateful_pod_moves_by_itself_and_never_runs_twice() {
    let cluster = Cluster::up("fencing", 1, 3, Cluster::fast()).await;
    let kubectl = cluster.kubectl("s1");
    let shared = tempfile::Builder::new().prefix("seawall-shared-").tempdir_in("/opt").unwrap();
    let file = shared.path().join("db-0");
    let archive = shared.path().join("image.tar");
    let mut build = tokio::process::Command::new(seawall_tests::seawall());
    build.args(["--log", "warn", "image", "build", "--busybox", "-t", IMAGE, "--output"]).arg(&archive);
    assert!(build.args(["--", "sh"]).status().await.unwrap().success());
    for agent in ["a1", "a2", "a3"] {
        cluster.machine(agent).import(&archive).await.unwrap();
    }
    kubectl.apply(&writer(shared.path())).await;

    // The power goes.
    let lost = node_of(&kubectl).await;
    cluster.machine(&lost).power_off(false).await.unwrap();
    elsewhere(&file, 1).await;
    cluster.lab.power_on(&cluster.machine(&lost)).await.unwrap();

    // The cable is cut, while the machine goes on.
    let lost = node_of(&kubectl).await;
    cluster.lab.partition(std::slice::from_ref(&lost), &[], Way::Both).await.unwrap();
    elsewhere(&file, 2).await;
    cluster.lab.heal(&[]).await.unwrap();
    kubectl.run(&format!("wait node/{lost} --for=condition=Ready --timeout=60s")).await.ok();

    // The machine hangs, and goes on when nobody expects it any more.
    let lost = node_of(&kubectl).await;
    cluster.machine(&lost).freeze().await.unwrap();
    elsewhere(&file, 3).await;
    cluster.machine(&lost).thaw().await.unwrap();
    kubectl.run(&format!("wait node/{lost} --for=condition=Ready --timeout=60s")).await.ok();

    // The agent hangs, while its containers go on.
    let lost = node_of(&kubectl).await;
    let agent = Pid::from_raw(agent_of(&cluster.machine(&lost)));
    kill(agent, Signal::SIGSTOP).unwrap();
    elsewhere(&file, 4).await;
    kill(agent, Signal::SIGCONT).unwrap();
    kubectl.run(&format!("wait node/{lost} --for=condition=Ready --timeout=60s")).await.ok();
    node_of(&kubectl).await;

    never_two(&file, 2);
    assert_eq!(instances(&file).len(), 5, "one for each loss");
}

fn agent_of(machine: &Machine) -> i32 {
    machine.pid_of(Program::Seawall).unwrap().expect("its agent runs")
}
