//! Pods in real containers, from a real API server, looked at with real kubectl.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::Duration;

use common::{Cluster, condition, until};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

fn config_map(name: &str, data: Value) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name}, "data": data})).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_serves_and_kubectl_gets_at_it() {
    let cluster = Cluster::start().await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "default");
    maps.create(&PostParams::default(), &config_map("page", json!({"index.html": "hello\n"}))).await.unwrap();
    let created = tokio::time::Instant::now();
    cluster
        .create("web", json!({
            "terminationGracePeriodSeconds": 5,
            "containers": [{"name": "httpd", "command": ["sh", "-c", "echo started $GREETING; exec httpd -f -v -p 8080 -h /www"],
                "env": [{"name": "WHO", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}, {"name": "GREETING", "value": "hi-$(WHO)"}],
                "ports": [{"name": "http", "containerPort": 8080}],
                "resources": {"requests": {"cpu": "10m"}, "limits": {"memory": "64Mi"}},
                "readinessProbe": {"httpGet": {"path": "/", "port": "http"}},
                "volumeMounts": [{"name": "page", "mountPath": "/www"}, {"name": "token", "mountPath": "/token"}, {"name": "scratch", "mountPath": "/scratch/sub", "subPath": "a/b"}]}],
            "volumes": [{"name": "page", "configMap": {"name": "page"}}, {"name": "scratch", "emptyDir": {"medium": "Memory"}},
                {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
                    {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}]}}],
        }))
        .await;
    let pod = cluster.ready("web").await;
    println!("create to Ready: {:?}", created.elapsed());
    let status = &pod["status"];
    assert_eq!(status["phase"], "Running");
    assert_eq!(status["containerStatuses"][0]["restartCount"], 0);
    assert_eq!(status["containerStatuses"][0]["image"], common::IMAGE);
    assert!(status["containerStatuses"][0]["containerID"].as_str().unwrap().starts_with("containerd://"));
    for kind in ["PodReadyToStartContainers", "Initialized", "ContainersReady", "PodScheduled"] {
        assert_eq!(condition(&pod, kind), "True", "{kind}");
    }

    let kubectl = async |args: &[&str], stdin: Option<&str>| cluster.kubectl(args, stdin).await;
    assert_eq!(
        kubectl(&["exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 7"], None).await,
        (7, "out\n".into(), "err\ncommand terminated with exit code 7\n".into())
    );
    // The end of stdin reaches the process, else cat would never end.
    let big = "line of input\n".repeat(20_000);
    assert_eq!(kubectl(&["exec", "-i", "web", "--", "wc", "-c"], Some(&big)).await.1.trim(), big.len().to_string());
    let token = kubectl(&["exec", "web", "--", "cat", "/token/token", "/token/labels", "/etc/hosts"], None).await.1;
    assert!(token.starts_with("ey") && token.contains("app=\"web\"") && token.contains("\tweb\n"), "{token}");
    let (code, out, err) = kubectl(&["logs", "web"], None).await;
    assert_eq!((code, out.lines().next()), (0, Some("started hi-web")), "{err}");
    assert_eq!(kubectl(&["logs", "web", "--tail=1", "--timestamps"], None).await.1.lines().count(), 1);

    // A file there and back.
    let directory = tempfile::tempdir().unwrap();
    let (there, back) = (directory.path().join("there"), directory.path().join("back"));
    std::fs::write(&there, &big).unwrap();
    let (code, _, err) = kubectl(&["cp", there.to_str().unwrap(), "web:/scratch/sub/file"], None).await;
    assert_eq!(code, 0, "{err}");
    let (code, _, err) = kubectl(&["cp", "web:/scratch/sub/file", back.to_str().unwrap()], None).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(std::fs::read_to_string(&back).unwrap(), big);

    port_forward(&cluster).await;

    // A changed config map reaches the running container.
    let patch = json!({"data": {"index.html": "changed\n"}});
    maps.patch("page", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    until("the volume follows the config map", async || {
        kubectl(&["exec", "web", "--", "cat", "/www/index.html"], None).await.1 == "changed\n"
    })
    .await;

    // The main process dies: a new container takes its place.
    let id = status["containerStatuses"][0]["containerID"].as_str().unwrap().trim_start_matches("containerd://");
    let killed = tokio::process::Command::new("ctr")
        .arg("--address")
        .arg(cluster.config.cri_socket())
        .args(["--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", id])
        .status()
        .await;
    assert!(killed.unwrap().success());
    cluster
        .wait("web", "restarted", |p| {
            p["status"]["containerStatuses"][0]["restartCount"] == 1 && condition(p, "Ready") == "True"
        })
        .await;
    let (code, out, err) = kubectl(&["logs", "web", "--previous"], None).await;
    assert_eq!((code, out.lines().next()), (0, Some("started hi-web")), "{err}");

    let began = tokio::time::Instant::now();
    cluster.pods().delete("web", &DeleteParams::default()).await.unwrap();
    cluster.wait("web", "gone", Value::is_null).await;
    println!("delete to gone: {:?}", began.elapsed());
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    until("its files go", async || !cluster.config.data_dir.join("pods").join(uid).exists()).await;
    let reasons = kubectl(&["get", "events", "-o", "jsonpath={.items[*].reason}"], None).await.1;
    for reason in ["Pulled", "Created", "Started", "Killing"] {
        assert!(reasons.contains(reason), "{reason} is not among {reasons}");
    }
    cluster.end().await;
}

async fn port_forward(cluster: &Cluster) {
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
    let program = std::env::var("KUBECTL").unwrap_or_else(|_| "kubectl".into());
    let mut child = tokio::process::Command::new(program)
        .arg("--kubeconfig")
        .arg(cluster.kubeconfig())
        .args(["port-forward", "pod/web", ":8080"])
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = tokio::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let line = tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await.unwrap().unwrap().unwrap();
    let port: u16 =
        line.split("127.0.0.1:").nth(1).and_then(|r| r.split(' ').next()).and_then(|p| p.parse().ok()).unwrap();
    for _ in 0..3 {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_string(&mut answer)).await;
        read.expect("the forwarded connection ends").unwrap();
        assert!(answer.ends_with("\r\n\r\nhello\n"), "{answer:?}");
    }
    child.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_outlive_the_agent_and_containerd() {
    let mut cluster = Cluster::start().await;
    let probe = json!({"exec": {"command": ["test", "-e", "/tmp/live"]}, "periodSeconds": 1, "failureThreshold": 1});
    cluster
        .create("steady", json!({"terminationGracePeriodSeconds": 1, "containers": [{"name": "c",
            "command": ["sh", "-c", "touch /tmp/live; while :; do sleep 1; done"], "livenessProbe": probe, "readinessProbe": probe}]}))
        .await;
    let before = cluster.ready("steady").await;
    let id = |pod: &Value| pod["status"]["containerStatuses"][0]["containerID"].clone();

    cluster.stop_agent().await;
    let pid: i32 =
        std::fs::read_to_string(cluster.config.containerd().run.join("containerd.pid")).unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    cluster.start_agent();
    until("a new containerd", async || {
        std::fs::read_to_string(cluster.config.containerd().run.join("containerd.pid"))
            .is_ok_and(|p| p.parse() != Ok(pid))
    })
    .await;
    // Two seconds in which a wrong agent would restart it or call it unready: each look must find it as it was.
    for _ in 0..40 {
        let now = cluster.json("steady").await;
        assert_eq!((id(&now), condition(&now, "Ready")), (id(&before), "True"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The new agent's probes work: liveness fails, the container is restarted.
    let (code, _, err) = cluster.kubectl(&["exec", "steady", "--", "rm", "/tmp/live"], None).await;
    assert_eq!(code, 0, "{err}");
    cluster
        .wait("steady", "restarted by liveness", |p| {
            p["status"]["containerStatuses"][0]["restartCount"] == 1 && condition(p, "Ready") == "True"
        })
        .await;
    let messages = cluster.kubectl(&["get", "events", "-o", "jsonpath={.items[*].message}"], None).await.1;
    assert!(messages.contains("Container c failed liveness probe, will be restarted"), "{messages}");

    // A pod that leaves the API while nobody looks is cleaned up afterwards.
    cluster.stop_agent().await;
    let uid = before["metadata"]["uid"].as_str().unwrap().to_owned();
    cluster
        .pods()
        .delete("steady", &DeleteParams { grace_period_seconds: Some(0), ..Default::default() })
        .await
        .unwrap();
    cluster.start_agent();
    let cri = seawall_node::cri::Cri::connect(&cluster.config.cri_socket()).unwrap();
    until("the orphan is removed", async || cri.sandboxes(Some(&uid)).await.is_ok_and(|s| s.is_empty())).await;
    until("its files are removed", async || !cluster.config.data_dir.join("pods").join(&uid).exists()).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn init_containers_sidecars_completion_and_what_is_missing() {
    let cluster = Cluster::start().await;
    let shared = json!([{"name": "v", "mountPath": "/v"}]);
    let script = |text: &str| json!(["sh", "-c", text]);
    cluster
        .create("job", json!({"restartPolicy": "Never",
            "initContainers": [
                {"name": "first", "command": script("echo 1 >> /v/order"), "volumeMounts": shared},
                {"name": "side", "restartPolicy": "Always", "command": script("trap 'echo side-end >> /v/order; exit 0' TERM; echo side >> /v/order; touch /v/up; while :; do sleep 0.1; done"),
                    "volumeMounts": shared, "startupProbe": {"exec": {"command": ["test", "-e", "/v/up"]}, "periodSeconds": 1}},
                {"name": "second", "command": script("echo 2 >> /v/order"), "volumeMounts": shared}],
            "containers": [{"name": "main", "command": script("echo main >> /v/order; cat /v/order; echo done > /dev/termination-log"), "volumeMounts": shared}],
            "volumes": [{"name": "v", "emptyDir": {}}]}))
        .await;
    let done = cluster.wait("job", "Succeeded", |p| p["status"]["phase"] == "Succeeded").await;
    assert_eq!(done["status"]["containerStatuses"][0]["state"]["terminated"]["message"], "done\n");
    assert_eq!(cluster.kubectl(&["logs", "job", "-c", "main"], None).await.1, "1\nside\n2\nmain\n");
    assert!(done["status"]["initContainerStatuses"][1]["state"]["terminated"].is_object());

    // A missing config map holds the container, and its creation lets it go.
    cluster
        .create("held", json!({"containers": [{"name": "c", "command": script("echo $A; sleep 1000"), "env": [
            {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "late", "key": "a"}}}]}], "terminationGracePeriodSeconds": 0}))
        .await;
    let held =
        |p: &Value| p["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CreateContainerConfigError";
    let pod = cluster.wait("held", "CreateContainerConfigError", held).await;
    assert_eq!(pod["status"]["containerStatuses"][0]["state"]["waiting"]["message"], "configmap \"late\" not found");
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "default");
    maps.create(&PostParams::default(), &config_map("late", json!({"a": "came"}))).await.unwrap();
    cluster.ready("held").await;
    until("its log", async || cluster.kubectl(&["logs", "held"], None).await.1 == "came\n").await;

    // A crash loop, and an image that is nowhere.
    cluster.create("crash", json!({"containers": [{"name": "c", "command": script("exit 3")}]})).await;
    let crashed = |p: &Value| p["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff";
    let pod = cluster.wait("crash", "CrashLoopBackOff", crashed).await;
    assert_eq!(pod["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"], 3);
    let never = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "never"}, "spec": {"nodeName": "node-under-test",
        "containers": [{"name": "c", "image": "seawall.test/none:1", "imagePullPolicy": "Never"}]}});
    cluster.pods().create(&PostParams::default(), &serde_json::from_value(never).unwrap()).await.unwrap();
    cluster
        .wait("never", "ErrImageNeverPull", |p| {
            p["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ErrImageNeverPull"
        })
        .await;

    // A process that ignores SIGTERM is killed when the grace period, shortened meanwhile, is over.
    cluster.create("stubborn", json!({"terminationGracePeriodSeconds": 300, "containers": [{"name": "c", "command": script("trap '' TERM; while :; do sleep 1; done")}]})).await;
    cluster.ready("stubborn").await;
    cluster.pods().delete("stubborn", &DeleteParams::default()).await.unwrap();
    cluster.wait("stubborn", "terminating", |p| p["metadata"]["deletionTimestamp"].is_string()).await;
    let shorter = DeleteParams { grace_period_seconds: Some(1), ..Default::default() };
    cluster.pods().delete("stubborn", &shorter).await.unwrap();
    cluster.wait("stubborn", "gone", Value::is_null).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_reach_the_container() {
    let cluster = Cluster::start().await;
    let script = |text: &str| json!(["sh", "-c", text]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    cluster
        .create("zoo", json!({
            "hostname": "beast", "terminationGracePeriodSeconds": 20, "shareProcessNamespace": true,
            "dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.53"], "searches": ["zoo.test"], "options": [{"name": "ndots", "value": "3"}]},
            "hostAliases": [{"ip": "192.0.2.7", "hostnames": ["alias.test"]}],
            "securityContext": {"runAsUser": 1234, "runAsGroup": 2345, "fsGroup": 3456, "supplementalGroups": [4567], "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {"name": "main", "command": script("trap 'echo term; exit 0' TERM; echo up; httpd -p 8080 -h /; while :; do sleep 0.1; done"),
                    "securityContext": {"readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                    "resources": {"limits": {"cpu": "500m", "memory": "48Mi"}},
                    "env": [{"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}}],
                    "ports": [{"containerPort": 8080, "hostPort": port}],
                    "lifecycle": {"postStart": {"exec": {"command": ["sh", "-c", "echo post > /scratch/post"]}},
                        "preStop": {"exec": {"command": ["sh", "-c", "echo pre > /host/pre; sleep 0.3"]}}},
                    "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}, {"name": "host", "mountPath": "/host"}]},
                {"name": "privileged", "command": script("while :; do sleep 1; done"), "securityContext": {"privileged": true, "runAsUser": 0}}],
            "volumes": [{"name": "scratch", "emptyDir": {}},
                {"name": "host", "hostPath": {"path": cluster.config.data_dir.join("shared"), "type": "DirectoryOrCreate"}}]}))
        .await;
    std::fs::create_dir_all(cluster.config.data_dir.join("shared")).unwrap();
    std::os::unix::fs::chown(cluster.config.data_dir.join("shared"), Some(1234), None).unwrap();
    let pod = cluster.ready("zoo").await;
    let run = async |container: &str, text: &str| {
        cluster.kubectl(&["exec", "zoo", "-c", container, "--", "sh", "-c", text], None).await.1
    };
    assert_eq!(
        run("main", "id -u; id -g; id -G; hostname; echo $LIMIT").await,
        "1234\n2345\n2345 3456 4567\nbeast\n48\n"
    );
    assert_eq!(run("main", "cat /etc/resolv.conf").await, "search zoo.test\nnameserver 192.0.2.53\noptions ndots:3\n");
    assert!(run("main", "cat /etc/hosts").await.contains("192.0.2.7\talias.test\n"));
    assert_eq!(
        run("main", "touch /x 2>/dev/null || echo readonly; cat /scratch/post; stat -c %g /scratch").await,
        "readonly\npost\n3456\n"
    );
    let status = run("main", "grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status").await;
    assert_eq!(
        status.split_whitespace().collect::<Vec<_>>(),
        ["CapEff:", "0000000000000000", "NoNewPrivs:", "1", "Seccomp:", "2"]
    );
    assert!(run("privileged", "grep CapEff /proc/self/status").await.trim_end() != "CapEff:\t00000000a80425fb");
    // One process namespace: the sandbox's pause program is its first process, and reaps orphans.
    assert!(run("privileged", "cat /proc/1/cmdline").await.starts_with("/pause"));
    run("privileged", "(sleep 0.1 &) ; exit 0").await;
    until("orphans are reaped", async || !run("privileged", "ps -o stat,comm").await.contains("Z ")).await;

    // The host port leads into the pod.
    let address = pod["status"]["podIP"].as_str().unwrap();
    for target in [format!("{address}:8080"), format!("127.0.0.1:{port}")] {
        let connected = tokio::time::timeout(Duration::from_secs(5), tokio::net::TcpStream::connect(&target)).await;
        assert!(matches!(connected, Ok(Ok(_))), "{target}: {connected:?}");
    }

    // Limits hold in the pod's cgroup too, whatever the version of cgroups.
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let cgroups = seawall_node::cgroup::Cgroups::detect(&cluster.config.cgroup_root);
    assert!(cgroups.pods().iter().any(|(_, u)| u == uid));
    assert_eq!(pod["status"]["qosClass"], "Burstable");

    // preStop, then SIGTERM, within the grace period; followed by a client that reads the log to its end.
    let log = cluster.kubectl(&["logs", "-f", "zoo", "-c", "main"], None);
    let delete = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let began = tokio::time::Instant::now();
        cluster.pods().delete("zoo", &DeleteParams::default()).await.unwrap();
        began
    };
    let ((_, log, _), began) = tokio::join!(log, delete);
    assert_eq!(log, "up\nterm\n");
    cluster.wait("zoo", "gone", Value::is_null).await;
    println!("delete to gone: {:?}", began.elapsed());
    assert_eq!(std::fs::read_to_string(cluster.config.data_dir.join("shared/pre")).unwrap(), "pre\n");
    until("its cgroup goes", async || !cgroups.pods().iter().any(|(_, u)| u == uid)).await;

    // On the host's network: the node's name and address. It is left running, and containerd dead: all of it has to
    // go nevertheless.
    cluster.create("host", json!({"hostNetwork": true, "terminationGracePeriodSeconds": 0, "containers": [{"name": "c", "command": script("sleep 1000")}]})).await;
    let pod = cluster.ready("host").await;
    assert_eq!(pod["status"]["podIP"], "127.0.0.1");
    let config = cluster.config.clone();
    let pid: i32 = std::fs::read_to_string(config.containerd().run.join("containerd.pid")).unwrap().parse().unwrap();
    let mut cluster = cluster;
    cluster.stop_agent().await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    cluster.end().await;
    assert!(!config.data_dir.exists() && !config.run_dir.exists());
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let left = std::process::Command::new("grep").args(["-rlF", uid, "/proc/self/mountinfo"]).output().unwrap();
    assert!(left.stdout.is_empty());
}
