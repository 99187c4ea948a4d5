//! A node that is short of something: who goes, in which order, what is said about it, and what comes back.

use std::fs;

use seawall_tests::{
    Machine, Options, Server,
    kubectl::{Kubectl, has},
    on_a_machine, until,
};
use serde_json::Value;

use super::IMAGE;

/// A pod that does what it is told with a request of its own.
fn pod(name: &str, more: &str, command: &str, container: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  {more}
  terminationGracePeriodSeconds: 30
  tolerations: [{{operator: Exists, effect: NoExecute}}]
  containers:
  - name: main
    image: {IMAGE}
    command: [sh, -c, '{command}']
    {container}
  volumes: [{{name: scratch, emptyDir: {{}}}}]
---"
    )
}

/// Runs a command on the machine.
async fn on(machine: &Machine, words: &[&str]) {
    let output = machine.command(words[0]).args(&words[1..]).output().await.unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

async fn condition(k: &Kubectl, kind: &str, wanted: &str) {
    let path = format!("{{.items[0].status.conditions[?(@.type==\"{kind}\")].status}}");
    k.reaches("nodes", &path, wanted).await;
}

/// When a pod was told to go, to the second.
fn evicted_at(pod: &Value) -> String {
    let conditions = pod["status"]["conditions"].as_array().unwrap();
    let found = conditions.iter().find(|c| c["type"] == "DisruptionTarget").unwrap_or_else(|| panic!("{pod:#}"));
    assert_eq!((found["reason"].as_str(), found["status"].as_str()), (Some("TerminationByKubelet"), Some("True")));
    found["lastTransitionTime"].as_str().unwrap().to_owned()
}

#[test]
fn who_goes_when_memory_is_short() {
    on_a_machine(async |machine| {
        // What the machine says of its memory is ours to say.
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("meminfo");
        let real = fs::read_to_string("/proc/meminfo").unwrap();
        let available = |mib: u64| {
            let line = |l: &str| match l.split_once(':') {
                Some(("MemTotal", _)) => format!("MemTotal: {} kB", 8 << 20),
                Some(("MemAvailable", _)) => format!("MemAvailable: {} kB", mib << 10),
                _ => l.to_owned(),
            };
            fs::write(&file, real.lines().map(line).collect::<Vec<_>>().join("\n") + "\n").unwrap();
        };
        available(4096);
        on(&machine, &["mount", "--bind", file.to_str().unwrap(), "/proc/meminfo"]).await;
        let args = "--eviction-pressure-transition-period=5s --kube-reserved=cpu=100m,memory=256Mi";
        let args = args.split(' ').map(str::to_owned).collect();
        let server = Server::start(Options { machine: Some(machine.clone()), args }).await;
        server.node_ready().await;
        server.web_image(IMAGE, "unused").await;
        let k = &server.kubectl;
        // 100 MiB are the hard threshold.
        let allocatable = k.path("nodes", "{.items[0].status.allocatable.memory}").await;
        assert_eq!(allocatable, format!("{}Mi", 8192 - 256 - 100));

        // A shell that keeps 20 MB in a variable.
        let hold = "x=$(head -c 20000000 /dev/zero | tr \"\\\\0\" x); echo ready; sleep 1000; echo $x >/dev/null";
        let request = |memory: &str| format!("resources: {{requests: {{memory: {memory}}}}}");
        k.apply(&format!(
            "{}{}{}{}",
            pod("modest", "", "sleep 1000", &request("512Mi")),
            pod("greedy", "", hold, &request("1Mi")),
            pod("idle", "", "sleep 1000", ""),
            pod("critical", "priorityClassName: system-node-critical", "sleep 1000", ""),
        ))
        .await;
        for name in ["modest", "greedy", "idle", "critical"] {
            k.run(&format!("wait pod/{name} --for=condition=Ready --timeout=60s")).await.ok();
        }
        until("the greedy one has its memory", async || {
            k.run("logs greedy").await.stdout.contains("ready").then_some(())
        })
        .await;
        available(50);
        condition(k, "MemoryPressure", "True").await;
        k.reaches("nodes", "{.items[0].spec.taints[*].key}", "node.kubernetes.io/memory-pressure").await;
        // One after the other: who uses most beyond a request, and last who keeps to it.
        for name in ["greedy", "idle", "modest"] {
            k.reaches(&format!("pod/{name}"), "{.status.reason}/{.status.phase}", "Evicted/Failed").await;
        }
        let mut evicted = Vec::new();
        for name in ["greedy", "idle", "modest"] {
            let found = k.json(&format!("pod/{name}")).await;
            evicted.push((evicted_at(&found), name));
            let message = found["status"]["message"].as_str().unwrap();
            has(message, &["The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. "]);
            let exceeds = message.contains("Container main was using ");
            assert_eq!(exceeds, name != "modest", "{message}");
        }
        let order: Vec<&str> = evicted.iter().map(|(_, name)| *name).collect();
        evicted.sort();
        assert_eq!(evicted.iter().map(|(_, name)| *name).collect::<Vec<_>>(), order);
        assert_eq!(k.path("pod/critical", "{.status.phase}").await, "Running");
        assert_eq!(k.path("pod/critical", "{.status.containerStatuses[0].restartCount}").await, "0");
        has(k.run("get events").await.ok(), &["Evicted", "EvictionThresholdMet", "Attempting to reclaim memory"]);

        // What comes now is refused at once, if it asks for nothing.
        let node = k.path("nodes", "{.items[0].metadata.name}").await;
        let bound = format!("nodeName: {node}");
        k.apply(&pod("late", &bound, "sleep 1000", "")).await;
        k.reaches("pod/late", "{.status.reason}", "Evicted").await;
        assert_eq!(k.path("pod/late", "{.status.message}").await.trim(), "The node had condition: [MemoryPressure].");

        available(4096);
        condition(k, "MemoryPressure", "False").await;
        k.reaches("nodes", "{.items[0].spec.taints[*].key}", "").await;
        k.apply(&pod("after", &bound, "sleep 1000", "")).await;
        k.run("wait pod/after --for=condition=Ready --timeout=60s").await.ok();
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}

#[test]
fn who_goes_when_the_disk_is_full() {
    on_a_machine(async |machine| {
        // A disk of its own for what belongs to pods.
        let directory = tempfile::Builder::new().prefix("seawall-e2e-").tempdir().unwrap();
        let data = directory.path().join("data/agent");
        fs::create_dir_all(&data).unwrap();
        on(&machine, &["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", data.to_str().unwrap()]).await;
        let args = "--eviction-hard=nodefs.available<100Mi --eviction-pressure-transition-period=5s \
                    --minimum-image-ttl-duration=1s";
        let args = args.split_whitespace().map(str::to_owned).collect();
        let server = Server::start_in(directory, Options { machine: Some(machine.clone()), args }).await;
        server.node_ready().await;
        server.web_image(IMAGE, "unused").await;
        server.web_image("example.test/web:unused", "never run").await;
        let k = &server.kubectl;
        let mounted = "volumeMounts: [{name: scratch, mountPath: /scratch}]";
        let limited = "sizeLimit: 5Mi";
        k.apply(&pod("small", "", "sleep 1000", mounted)).await;
        k.apply(
            &pod("limited", "", "sleep 1000", mounted).replace("emptyDir: {}", &format!("emptyDir: {{{limited}}}")),
        )
        .await;
        k.apply(&pod("done", "restartPolicy: Never", "echo was here", "")).await;
        for name in ["small", "limited"] {
            k.run(&format!("wait pod/{name} --for=condition=Ready --timeout=60s")).await.ok();
        }
        k.reaches("pod/done", "{.status.phase}", "Succeeded").await;
        has(k.run("logs done").await.ok(), &["was here"]);

        // More than its own volume may have.
        k.run("exec limited -- dd if=/dev/zero of=/scratch/file bs=1M count=8").await.ok();
        k.reaches("pod/limited", "{.status.reason}", "Evicted").await;
        let said = k.path("pod/limited", "{.status.message}").await;
        has(&said, &["Usage of EmptyDir volume \"scratch\" exceeds the limit \"5Mi\"."]);
        condition(k, "DiskPressure", "False").await;

        // More than the disk has: first goes what nobody needs, and then who has most.
        let free = |k: &Kubectl| {
            let k = k.clone();
            async move { k.run("exec small -- df -m /scratch").await }
        };
        let text = free(k).await.ok();
        let left: u64 = text.lines().last().unwrap().split_whitespace().nth(3).unwrap().parse().unwrap();
        let fill = left.saturating_sub(60);
        let images = || async {
            let mut ctr = tokio::process::Command::new("ctr");
            ctr.arg("--address").arg(server.containerd()).args(["-n", "k8s.io", "images", "ls", "-q"]);
            String::from_utf8(ctr.output().await.unwrap().stdout).unwrap()
        };
        // An image has to be seen before it can be old: what is not given back the first time is later.
        for round in 0..5 {
            let (name, write) =
                (format!("big-{round}"), format!("dd if=/dev/zero of=/scratch/file bs=1M count={fill}"));
            k.apply(&pod(&name, "", &format!("{write}; sleep 1000"), mounted)).await;
            condition(k, "DiskPressure", "True").await;
            k.reaches(&format!("pod/{name}"), "{.status.reason}", "Evicted").await;
            let said = k.path(&format!("pod/{name}"), "{.status.message}").await;
            has(&said, &["The node was low on resource: ephemeral-storage. Threshold quantity: 100Mi, available: "]);
            condition(k, "DiskPressure", "False").await;
            if !images().await.contains("example.test/web:unused") {
                break;
            }
        }
        assert_eq!(k.path("pod/small", "{.status.phase}").await, "Running");
        let left = images().await;
        has(&left, &[IMAGE, "pause"]);
        assert!(!left.contains("example.test/web:unused"), "{left}");
        // What it said of the one that had ended stays, its container does not.
        assert_eq!(k.path("pod/done", "{.status.containerStatuses[0].state.terminated.exitCode}").await, "0");
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let refuses = |args: &[&str], expect: &str| {
        let output = std::process::Command::new(seawall_tests::seawall()).arg("server").args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(expect), "{args:?}: {said}");
    };
    refuses(&["--eviction-hard=disk<5%"], "\"disk<5%\" is no threshold: write SIGNAL<AMOUNT");
    refuses(&["--eviction-soft=memory.available<1Gi"], "add --eviction-soft-grace-period memory.available=TIME");
    refuses(&["--eviction-soft-grace-period=memory.available=soon"], "is no grace period: write SIGNAL=TIME");
    refuses(&["--eviction-minimum-reclaim=memory=1"], "is no amount to reclaim");
    refuses(&["--image-gc-high-threshold=50"], "the low one must be less than the high one");
    refuses(&["--kube-reserved=gpu=1"], "\"gpu=1\" is no reservation: write RESOURCE=QUANTITY");
}
