//! The cluster's certificate authority is replaced while everything runs.

use std::{
    fs,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use seawall_tests::{
    cluster::{Cluster, on, works},
    kubectl::{Kubectl, has},
    within,
};
use tokio::task::JoinHandle;

const LONG: Duration = Duration::from_secs(120);

/// Requests one after the other, each on a connection of its own; gives how many there were, and those that failed.
struct Traffic(JoinHandle<(usize, Vec<String>)>, Arc<AtomicBool>);

impl Traffic {
    /// `command` makes kubectl with all that comes before its words.
    fn start(name: &str, command: impl Fn() -> tokio::process::Command + Send + 'static) -> Traffic {
        let (stop, name) = (Arc::new(AtomicBool::new(false)), name.to_owned());
        let until = stop.clone();
        let task = tokio::spawn(async move {
            let (mut count, mut failed) = (0, Vec::new());
            while !until.load(Ordering::Relaxed) {
                count += 1;
                let mut command = command();
                match count % 2 {
                    0 => command.args(["get", "nodes"]),
                    _ => command.args(["create", "configmap", &format!("{name}-{count}")]),
                };
                let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await.unwrap();
                if !output.status.success() {
                    failed.push(format!("request {count}: {}", String::from_utf8_lossy(&output.stderr)));
                }
            }
            (count, failed)
        });
        Traffic(task, stop)
    }

    async fn end(self) -> usize {
        self.1.store(true, Ordering::Relaxed);
        let (count, failed) = self.0.await.unwrap();
        assert!(failed.is_empty(), "{} of {count} requests failed: {failed:#?}", failed.len());
        count
    }
}

/// The authorities that a kubeconfig trusts.
fn trusted(kubeconfig: &str) -> String {
    let config: serde_json::Value = serde_yaml_ng::from_str(kubeconfig).unwrap();
    let data = config["clusters"][0]["cluster"]["certificate-authority-data"].as_str().unwrap();
    String::from_utf8(STANDARD.decode(data).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_takes_over_from_another() {
    let cluster = Cluster::up("rotation", 3, 1, Cluster::fast()).await;
    let (s1, s2, a1) = (cluster.machine("s1"), cluster.machine("s2"), cluster.machine("a1"));
    let old = cluster.kubeconfig("s1");
    let kubectl = cluster.kubectl("s1");
    let old_token = works(&s1, "--log error token create").await.trim().to_owned();

    // A machine that is away keeps it from beginning.
    a1.power_off(false).await.unwrap();
    // A node counts as heard of for 25 seconds after the last renewal of its Lease.
    tokio::time::sleep(Duration::from_secs(26)).await;
    let (success, text) = on(&s1, "--log error certs rotate-ca").await;
    assert!(!success);
    has(&text, &["a1 (its node does not renew its Lease)", "--even-without a1"]);
    let (success, text) = on(&s1, "--log error certs rotate-ca --even-without a9").await;
    assert!(!success);
    has(&text, &["there is no such server or node", "a1, s1, s2, s3"]);
    kubectl.run("get secret seawall-ca -n kube-system").await.fails();
    a1.power_on().await.unwrap();
    kubectl.run("wait --for=condition=Ready node/a1 --timeout=90s").await.ok();

    // A pod that looks at whom it is to trust.
    let image = "image build --busybox -t example.test/idle:v1 --socket /run/seawall/containerd/containerd.sock -- sleep 1000000";
    works(&a1, &format!("--log error {image}")).await;
    kubectl.run("run idle --image=example.test/idle:v1").await.ok();
    kubectl.run("wait --for=condition=Ready pod/idle --timeout=90s").await.ok();

    // Through the balancer of a node with the kubeconfig of the moment, and past it with the one from before.
    let (machine, current) = (a1.clone(), s1.on_disk("/var/lib/seawall/admin.kubeconfig"));
    // A machine need not see what its host has, such as a /tmp in which this was built.
    let inside = "/var/lib/seawall/kubectl";
    fs::copy(Kubectl::program(), machine.on_disk(inside)).unwrap();
    let balanced = Traffic::start("balanced", move || {
        // The machine does not see the disk of another one.
        let seen = "/var/lib/seawall/seen.kubeconfig";
        fs::copy(&current, machine.on_disk(seen)).unwrap();
        let mut command = machine.command(inside);
        command.args(["--cache-dir", "/var/lib/seawall/seen", "--kubeconfig", seen]);
        command.args(["--server", "https://127.0.0.1:6444", "--tls-server-name", "kubernetes"]);
        command
    });
    let before = cluster.kubectl_with("s2", &old, "before.kubeconfig");
    let with_old = Traffic::start("old", move || before.command());

    let text = works(&s1, "--log error certs rotate-ca --until trust").await;
    has(&text, &["trust: everybody learns", "done by all 4 machines", "again to go on"]);
    let both = trusted(&cluster.kubeconfig("s3"));
    assert_eq!(both.matches("BEGIN").count(), 2);
    assert!(both.starts_with(&trusted(&old)), "the one that signs stands first");
    assert_eq!(kubectl.path("configmap/kube-root-ca.crt", "{.data.ca\\.crt}").await.trim(), both.trim());

    // It goes on where it was, on another server.
    let text = works(&s2, "--log error certs rotate-ca --until sign").await;
    has(&text, &["a rotation that was begun earlier goes on", "sign: the new authority signs"]);
    let out = with_old.end().await;
    // Tokens for the old authority still let machines in; those from now on are for the new one.
    let url = format!("https://{}:6443", s2.address());
    let alone = "--data-dir /tmp/x --run-dir /tmp/y --disable agent,proxy,balancer,routes --node-name x";
    let (_, text) = on(&a1, &format!("server {alone} --join {url} --token {old_token}")).await;
    has(&text, &["seawall token create --role server"]);
    let new_token = works(&cluster.machine("s3"), "--log error token create").await.trim().to_owned();
    assert_ne!(old_token.rsplit('.').next(), new_token.rsplit('.').next());

    let text = works(&s1, "--log error certs rotate-ca").await;
    has(&text, &["drop: the old authority is trusted no more", "has a new certificate authority"]);
    let through = balanced.end().await;
    eprintln!("{through} requests through the balancer, {out} with the old kubeconfig, none failed");
    assert!(through > 20 && out > 20);

    // The pod has it, and the way to it leads over certificates of the new authority on both sides.
    let new = trusted(&cluster.kubeconfig("s1"));
    for server in ["s1", "s3"] {
        let kubectl = cluster.kubectl(server);
        within(LONG, "the pod has the new authority alone", async || {
            let inside = "exec idle -- cat /var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
            (kubectl.run(inside).await.ok().trim() == new.trim()).then_some(())
        })
        .await;
    }

    // The old kubeconfig is of no use, even if it is told whom to trust; the new one is.
    let said = cluster.kubectl_with("s1", &old, "old.kubeconfig").run("get nodes").await.fails();
    has(&said, &["certificate signed by unknown authority"]);
    let mut config: serde_json::Value = serde_yaml_ng::from_str(&old).unwrap();
    config["clusters"][0]["cluster"]["certificate-authority-data"] = STANDARD.encode(&new).into();
    let told = serde_yaml_ng::to_string(&config).unwrap();
    let said = cluster.kubectl_with("s1", &told, "told.kubeconfig").run("get nodes").await.fails();
    // The server hangs up; whether its alert is read before that, and by which part of the client, is a matter of luck.
    let hung_up = [
        "remote error: tls: ",
        "broken pipe",
        "connection reset",
        "EOF",
        "http2: client conn could not be established",
    ];
    assert!(hung_up.iter().any(|part| said.contains(part)), "{said}");
    assert_eq!((new.matches("BEGIN").count(), both.contains(new.trim())), (1, true));
    for server in ["s1", "s2", "s3"] {
        cluster.kubectl(server).run("get nodes").await.ok();
        let machine = cluster.machine(server);
        let on_disk = fs::read_to_string(machine.on_disk("/var/lib/seawall/tls/ca.crt")).unwrap();
        assert_eq!(on_disk.trim(), new.trim());
    }
    let (_, text) = on(&a1, &format!("server {alone} --join {url} --token {old_token}")).await;
    has(&text, &["is not a server of the cluster that the token is for", "rotate-ca"]);

    // Everybody starts again with what is on the disk.
    a1.power_off(false).await.unwrap();
    s2.power_off(false).await.unwrap();
    let mut service = a1.service();
    let at = service.args.iter().position(|word| word == "--join").unwrap();
    service.args.drain(at..at + 4);
    a1.set_service(&service).unwrap();
    let kubectl = cluster.kubectl("s1");
    a1.power_on().await.unwrap();
    s2.power_on().await.unwrap();
    cluster.lab.well(LONG).await.unwrap();
    for (name, machine) in [("a1", &a1), ("s2", &s2)] {
        let log = fs::read_to_string(machine.log()).unwrap();
        assert!(!log.contains("panicked"), "{name} panicked");
    }

    // And once more, in one go.
    within(LONG, "s2 serves", async || cluster.kubectl("s2").run("get nodes").await.status.success().then_some(()))
        .await;
    let text = works(&s2, "--log error certs rotate-ca").await;
    has(&text, &["trust:", "sign:", "drop:", "has a new certificate authority"]);
    let newest = trusted(&cluster.kubeconfig("s3"));
    assert!(newest != new && newest.matches("BEGIN").count() == 1);
    kubectl.run("get nodes").await.fails();
    cluster.kubectl("s3").run("get nodes").await.ok();
}
