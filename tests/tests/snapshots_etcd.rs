//! Snapshots of servers on etcd: of one that others run, and of several servers that run their own.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use seawall_drill::lab::{Machine, Service};
use seawall_tests::{
    Options, Server,
    cluster::{Cluster, fails, works},
    kubectl::{Kubectl, has},
    on_a_machine, within,
};

const LONG: Duration = Duration::from_secs(90);

/// The newest resourceVersion.
async fn newest(kubectl: &Kubectl) -> u64 {
    let list = kubectl.run("get --raw /api/v1/configmaps?limit=1").await.ok();
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    list["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
}

/// Objects are as they were, and what clients knew since is over.
async fn is_as_it_was(kubectl: &Kubectl, lost: u64) {
    assert_eq!(kubectl.path("configmap/changed", "{.data.n}").await, "1");
    assert_eq!(kubectl.path("configmap/deleted", "{.data.n}").await, "1");
    has(kubectl.run("get configmap later").await.fails(), &["not found"]);
    assert!(newest(kubectl).await > lost);
    let path = format!("/api/v1/configmaps?watch=1&resourceVersion={lost}&timeoutSeconds=2");
    let old = kubectl.args(&["get", "--raw", &path]).await;
    has(format!("{old:?}"), &["too old resource version"]);
    kubectl.run("create configmap new").await.ok();
}

async fn fill(kubectl: &Kubectl) {
    kubectl.run("create configmap changed --from-literal=n=1").await.ok();
    kubectl.run("create configmap deleted --from-literal=n=1").await.ok();
}

async fn go_wrong(kubectl: &Kubectl) -> u64 {
    kubectl.run("patch configmap changed -p {\"data\":{\"n\":\"2\"}}").await.ok();
    kubectl.run("delete configmap deleted").await.ok();
    kubectl.run("create configmap later").await.ok();
    newest(kubectl).await
}

/// An etcd of one member in this test's network.
struct Etcd(std::process::Child);

impl Etcd {
    fn start(directory: &Path) -> Etcd {
        let (client, peer) = ("http://127.0.0.1:2379", "http://127.0.0.1:2380");
        let child = Command::new("etcd")
            .args(["--name", "one", "--log-level", "error", "--data-dir"])
            .arg(directory)
            .args(["--listen-client-urls", client, "--advertise-client-urls", client])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster"])
            .arg(format!("one={peer}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed (Debian: apt-get install etcd-server)");
        Etcd(child)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_etcd_elsewhere_is_restored() {
    on_a_machine(async |machine| {
        let (directory, fresh) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let etcd = Etcd::start(directory.path());
        let external = "--etcd-servers=http://127.0.0.1:2379 --disable=agent,proxy,balancer,routes";
        let args = external.split(' ').map(str::to_owned).collect();
        let mut server = Server::start(Options { machine: Some(machine.clone()), args }).await;
        let data = server.directory().join("data").display().to_string();
        fill(&server.kubectl).await;
        server.seawall(&["--log", "error", "snapshot", "save", "--name", "x", "--data-dir", &data]).await.ok();
        let lost = go_wrong(&server.kubectl).await;
        let kept: Vec<_> = fs::read_dir(server.directory().join("data/snapshots")).unwrap().collect();
        let file = kept
            .into_iter()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.extension().is_some_and(|e| e == "snap"));
        let file = file.unwrap().display().to_string();
        let restore = |more: &'static [&'static str]| {
            [&["--log", "error", "snapshot", "restore", &file, "--data-dir", &data][..], more].concat()
        };
        has(server.seawall(&restore(&["--force"])).await.fails(), &["something writes to this etcd"]);
        server.stop().await;
        has(server.seawall(&restore(&[])).await.fails(), &["has objects", "with --force"]);
        let told = server.seawall(&restore(&["--force"])).await.ok();
        has(&told, &["are in place", "What was there before is kept in", "before-restore-"]);
        server.launch().await;
        is_as_it_was(&server.kubectl, lost).await;
        let once = newest(&server.kubectl).await;
        // What was there before can be had again, and nothing counts backwards on the way.
        server.stop().await;
        let before = told.lines().find_map(|line| line.strip_prefix("What was there before is kept in ")).unwrap();
        let before = before.trim_end_matches('.');
        let back = ["--log", "error", "snapshot", "restore", before, "--force", "--data-dir", &data];
        server.seawall(&back).await.ok();
        server.launch().await;
        assert_eq!(server.kubectl.path("configmap/changed", "{.data.n}").await, "2");
        server.kubectl.run("get configmap later").await.ok();
        assert!(newest(&server.kubectl).await > once);

        // Into an etcd in which there is nothing, by a machine that has nothing.
        server.stop().await;
        drop(etcd);
        let _etcd = Etcd::start(&fresh.path().join("etcd"));
        let other = fresh.path().join("data").display().to_string();
        let there = ["--etcd-servers", "http://127.0.0.1:2379", "--data-dir", &other];
        let empty = [&["--log", "error", "snapshot", "restore", &file][..], &there[..]].concat();
        within(LONG, "the new etcd serves", async || server.seawall(&empty).await.status.success().then_some(())).await;
        // A server with its own files finds the objects there.
        server.launch().await;
        is_as_it_was(&server.kubectl, lost).await;
    });
}

/// The service of a machine that is no part of a cluster yet.
fn service(machine: &Machine, more: &[&str]) -> Service {
    let words = format!(
        "server --node-name {} --node-ip {} --disable agent,proxy --disable-snapshots",
        machine.name(),
        machine.address()
    );
    let args = words.split(' ').chain(more.iter().copied()).map(str::to_owned).collect();
    Service { args, env: Default::default(), run: true }
}

async fn serving(cluster: &Cluster, machine: &Machine) -> Kubectl {
    let own = machine.on_disk("/var/lib/seawall/admin.kubeconfig");
    within(LONG, &format!("{} serves", machine.name()), async || {
        if !Path::new(&own).exists() {
            return None;
        }
        let kubectl = cluster.kubectl(machine.name());
        kubectl.run("get --raw /readyz").await.status.success().then_some(kubectl)
    })
    .await
}

async fn join(cluster: &Cluster, first: &Machine, second: &Machine) -> Kubectl {
    let token = works(first, "--log error token create --role server").await.trim().to_owned();
    let url = format!("https://{}:6443", first.address());
    second.set_service(&service(second, &["--join", &url, "--token", &token])).unwrap();
    serving(cluster, second).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_with_their_own_etcd_begin_anew_with_one() {
    let cluster = Cluster::up("restore", 2, 0, None).await;
    let (s1, s2) = (cluster.machine("s1"), cluster.machine("s2"));
    s1.set_service(&service(&s1, &["--cluster-init"])).unwrap();
    let kubectl = serving(&cluster, &s1).await;
    join(&cluster, &s1, &s2).await;
    fill(&kubectl).await;
    let saved = works(&s1, "--log error snapshot save --name x").await;
    let file = saved.split(':').next().unwrap().to_owned();
    let lost = go_wrong(&kubectl).await;
    let restore = format!("--log error snapshot restore {file}");
    fails(&s1, &format!("{restore} --force"), &["etcd runs on this machine"]).await;
    s1.set_running(false).await.unwrap();
    let still = format!("the server at {} still runs", s2.address());
    fails(&s1, &format!("{restore} --force"), &[&still]).await;
    s2.set_running(false).await.unwrap();
    fails(&s1, &restore, &["has objects", "with --force"]).await;
    has(
        works(&s1, &format!("{restore} --force")).await,
        &["has one member", "--join", "is kept in", "before-restore-"],
    );

    s1.set_running(true).await.unwrap();
    let kubectl = serving(&cluster, &s1).await;
    is_as_it_was(&kubectl, lost).await;
    let once = newest(&kubectl).await;
    s2.run("find", &["/var/lib/seawall", "-mindepth", "1", "-delete"], LONG).await.unwrap();
    let second = join(&cluster, &s1, &s2).await;
    assert_eq!(second.path("configmap/deleted", "{.data.n}").await, "1");
    let voters = works(&s2, "--log error member list").await;
    assert_eq!(voters.lines().filter(|line| line.contains(" voter ")).count(), 2, "{voters}");

    // Once more: etcd does not tell how far it had come, but the last restoration does.
    s1.set_running(false).await.unwrap();
    s2.set_running(false).await.unwrap();
    works(&s1, &format!("{restore} --force")).await;
    s1.set_running(true).await.unwrap();
    let kubectl = serving(&cluster, &s1).await;
    assert!(newest(&kubectl).await > once);
}
