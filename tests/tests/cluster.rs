//! Several servers: joining, what a wrong token says, members that are lost and replaced, names of an entry, and the way
//! from one server to three.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use seawall_drill::lab::{Machine, Service};
use seawall_tests::{
    cluster::{Cluster, fails, works},
    kubectl::{Kubectl, has},
    on_a_machine,
    server::{Options as ServerOptions, Server},
    within,
};

const LONG: Duration = Duration::from_secs(90);

/// The names that a server's certificate has at the moment.
fn names_of(server: &Machine) -> String {
    let script = format!(
        "openssl s_client -connect {}:6443 </dev/null 2>/dev/null | openssl x509 -noout -ext subjectAltName",
        server.address()
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn voters(list: &str) -> usize {
    list.lines().filter(|line| line.contains(" voter ")).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_join_are_lost_and_replaced() {
    let cluster = Cluster::up("members", 3, 1, Cluster::fast()).await;
    let (s1, s2, s3, a1) = (cluster.machine("s1"), cluster.machine("s2"), cluster.machine("s3"), cluster.machine("a1"));
    let kubectl = cluster.kubectl("s1");
    assert_eq!(voters(&works(&s2, "--log error member list").await), 3);

    // Who cannot join is told why. These never come as far as touching anything.
    let url = format!("https://{}:6443", s1.address());
    let alone = "--data-dir /tmp/x --run-dir /tmp/y --disable agent,proxy,balancer,routes --node-name x";
    fails(&a1, &format!("server {alone} --join {url} --token nonsense"), &["--token: this is no token of"]).await;
    fails(&a1, &format!("server {alone} --join {url}"), &["--token"]).await;
    let token = works(&s1, "--log error token create --role server").await.trim().to_owned();
    let foreign = format!("{}.{}", token.rsplit_once('.').unwrap().0, "0".repeat(64));
    let told = ["is not a server of the cluster that the token is for", "Nothing was sent to it"];
    fails(&a1, &format!("server {alone} --join {url} --token {foreign}"), &told).await;
    let for_agents = works(&s1, "--log error token create").await.trim().to_owned();
    let told = ["this machine did not join", "seawall token create --role server"];
    fails(&a1, &format!("server {alone} --join {url} --token {for_agents}"), &told).await;
    works(&s1, &format!("--log error token delete {}", &token[..6])).await;
    fails(&a1, &format!("server {alone} --join {url} --token {token}"), &["must not be older than its --ttl"]).await;
    fails(&s1, "--log error token create --ttl 5", &["--ttl", "is no time"]).await;
    let listed = works(&s1, "--log error token list").await;
    has(&listed, &["system:bootstrappers:seawall:agent", &for_agents[..6]]);
    assert!(!listed.contains(&for_agents[7..23]), "the secret is shown: {listed}");
    fails(&s1, "--log error token delete nosuch", &["there is no token nosuch"]).await;

    // Names of an entry are added while everything runs.
    assert!(!names_of(&s3).contains("entry.example"));
    works(&s2, "--log error certs add-name entry.example 192.0.2.200").await;
    for server in [&s1, &s2, &s3] {
        let what = format!("the certificate of {} has the entry's names", server.name());
        within(LONG, &what, async || {
            let names = names_of(server);
            (names.contains("DNS:entry.example") && names.contains("IP Address:192.0.2.200")).then_some(())
        })
        .await;
    }
    fails(&s2, "--log error certs add-name not/a/name", &["not/a/name"]).await;
    has(works(&s1, "certs list").await, &["tls/apiserver.crt", "by itself", "tls/ca.crt"]);
    has(works(&s1, "--log error certs renew").await, &["tls/apiserver.crt"]);
    let all = works(&s2, "--log error kubeconfig").await;
    has(&all, &["name: s2", "name: s1", "name: s3", "--context"]);
    has(works(&s2, "--log error kubeconfig --server https://192.0.2.200:6443").await, &["https://192.0.2.200:6443"]);

    // A machine that is lost, with its disk. What would cost the majority is refused.
    kubectl.run("create configmap before --from-literal=a=b").await.ok();
    s3.power_off(true).await.unwrap();
    fails(
        &s1,
        "--log error member remove s1",
        &["removing s1 would leave 2 voting members, of which 1 works, and 2 are needed"],
    )
    .await;
    fails(&s1, "--log error member remove s9", &["there is no member s9; the members are:"]).await;
    has(works(&s1, "--log error member list").await, &["gone"]);
    // A new machine of the same name takes its place.
    cluster.lab.power_on(&s3).await.unwrap();
    within(LONG, "the new s3 votes", async || {
        (voters(&works(&s1, "--log error member list").await) == 3).then_some(())
    })
    .await;
    let kubectl3 = within(LONG, "the new s3 serves", async || {
        let own = cluster.machine("s3").on_disk("/var/lib/seawall/admin.kubeconfig");
        if !own.exists() {
            return None;
        }
        let kubectl = cluster.kubectl("s3");
        kubectl.run("get --raw /readyz").await.status.success().then_some(kubectl)
    })
    .await;
    assert_eq!(kubectl3.path("configmap/before", "{.data.a}").await, "b");
    let addresses = "{.endpoints[*].addresses[0]}";
    within(LONG, "three servers stand behind the kubernetes Service", async || {
        let said = kubectl3.path("endpointslice/kubernetes", addresses).await;
        (said.split_whitespace().count() == 3).then_some(())
    })
    .await;

    // One leaves for good: two are left, which is warned about. What is written meanwhile is sent to it in vain, and is
    // more than its connections hold.
    s3.power_off(false).await.unwrap();
    let much = format!("--from-literal=a={}", "x".repeat(100_000));
    for i in 0..8 {
        kubectl.args(&["create", "configmap", &format!("much-{i}"), &much]).await.ok();
    }
    // Writes go on while it is removed: etcd's leader does not wait for the one that is gone.
    let writes = tokio::spawn({
        let kubectl = kubectl.clone();
        async move {
            let mut longest = Duration::ZERO;
            for i in 0.. {
                let started = tokio::time::Instant::now();
                let written = kubectl.run(&format!("create configmap during-{i} --request-timeout=30s")).await;
                longest = longest.max(started.elapsed());
                if !written.status.success() || kubectl.run("get configmap removed").await.status.success() {
                    written.ok();
                    break;
                }
            }
            longest
        }
    });
    has(works(&s1, "--log error member replace s3").await, &["s3 is no member any more", "--node-name s3 --token"]);
    kubectl.run("create configmap removed").await.ok();
    let longest = writes.await.unwrap();
    assert!(longest < Duration::from_secs(4), "a write waited {longest:?} for the removal of a member");
    assert_eq!(voters(&works(&s1, "--log error member list").await), 2);
    // It must not start again with what it has.
    s3.power_on().await.unwrap();
    within(LONG, "s3 says that it was removed", async || {
        let log = fs::read_to_string(s3.log()).unwrap_or_default();
        log.contains("has been removed from its cluster").then_some(())
    })
    .await;
    kubectl.run("create configmap after --from-literal=a=b").await.ok();
}

/// The service of a machine that is no part of a cluster yet.
fn alone(machine: &Machine) -> Service {
    let words = format!("server --node-name {} --node-ip {} --disable agent,proxy", machine.name(), machine.address());
    Service { args: words.split(' ').map(str::to_owned).collect(), env: Default::default(), run: true }
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_server_becomes_one_of_two() {
    let cluster = Cluster::up("grow", 2, 0, None).await;
    let (s1, s2) = (cluster.machine("s1"), cluster.machine("s2"));
    s1.set_service(&alone(&s1)).unwrap();
    let kubectl = serving(&cluster, &s1).await;
    for i in 0..20 {
        kubectl.run(&format!("create configmap m{i} --from-literal=n={i}")).await.ok();
    }
    kubectl.run("delete configmap m7").await.ok();
    let list = kubectl.run("get --raw /api/v1/configmaps").await.ok();
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let newest: u64 = list["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    let uid = kubectl.path("configmap/m3", "{.metadata.uid}").await;
    // Nobody else can join yet, and it cannot be migrated while it runs.
    let token = works(&s1, "--log error token create --role server").await.trim().to_owned();
    let url = format!("https://{}:6443", s1.address());
    let there = "--data-dir /tmp/x --run-dir /tmp/y --disable agent,proxy,balancer,routes --node-name x";
    fails(&s2, &format!("server {there} --join {url} --token {token}"), &["seawall migrate --to etcd"]).await;
    let migrate = format!("--log error migrate --to etcd --node-name s1 --node-ip {}", s1.address());
    fails(&s1, &migrate, &["another server is using this store"]).await;
    fails(&s2, "--log error migrate --to etcd", &["no server has kept objects there"]).await;

    s1.set_running(false).await.unwrap();
    has(works(&s1, &migrate).await, &["objects", "are in etcd", "others join with seawall server --join"]);
    fails(&s1, &migrate, &["is one of a cluster with etcd already"]).await;
    s1.set_running(true).await.unwrap();
    let kubectl = serving(&cluster, &s1).await;
    let list = kubectl.json("configmaps").await;
    let items = list["items"].as_array().unwrap();
    let own: Vec<_> = items.iter().filter(|m| m["metadata"]["name"].as_str().unwrap().starts_with('m')).collect();
    assert_eq!(own.len(), 19);
    for item in &own {
        let version: u64 = item["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
        assert!(version > newest, "{version} is not after {newest}");
    }
    assert_eq!(kubectl.path("configmap/m3", "{.metadata.uid}").await, uid);
    // What a client knew before is told to be old, never answered with something older.
    let path = format!("/api/v1/configmaps?watch=1&resourceVersion={newest}&timeoutSeconds=1");
    let old = kubectl.args(&["get", "--raw", &path]).await;
    has(format!("{old:?}"), &["too old resource version"]);

    let mut service = alone(&s2);
    service.args.extend(["--join".into(), url, "--token".into(), token]);
    s2.set_service(&service).unwrap();
    let kubectl2 = serving(&cluster, &s2).await;
    assert_eq!(kubectl2.path("configmap/m3", "{.metadata.uid}").await, uid);
    assert_eq!(voters(&works(&s2, "--log error member list").await), 2);
}

/// An etcd of one member, without a certificate, as others may run one.
fn etcd(directory: &Path) -> std::process::Child {
    let client = "http://127.0.0.1:2379";
    let peer = "http://127.0.0.1:2380";
    Command::new("etcd")
        .args(["--name", "one", "--log-level", "error", "--data-dir"])
        .arg(directory)
        .args(["--listen-client-urls", client, "--advertise-client-urls", client])
        .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster"])
        .arg(format!("one={peer}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("etcd starts")
}

#[test]
fn an_etcd_elsewhere_keeps_the_objects() {
    on_a_machine(async |machine| {
        let directory = tempfile::tempdir().unwrap();
        // In this machine's network, since the test is.
        let mut etcd = etcd(directory.path());
        let external = "--etcd-servers=http://127.0.0.1:2379 --disable=agent,proxy,balancer,routes";
        let args = external.split(' ').map(str::to_owned).collect();
        let mut server = Server::start(ServerOptions { machine: Some(machine.clone()), args }).await;
        server.kubectl.run("create configmap kept --from-literal=a=b").await.ok();
        server.crash().await;
        server.launch().await;
        assert_eq!(server.kubectl.path("configmap/kept", "{.data.a}").await, "b");
        // Without it, what needs no majority is still answered, and the rest is refused in words.
        etcd.kill().unwrap();
        etcd.wait().unwrap();
        let near =
            server.kubectl.run("get --raw /api/v1/namespaces/default/configmaps/kept?resourceVersion=0").await.ok();
        has(near, &["\"a\":\"b\""]);
        let told = server.kubectl.run("create configmap lost --from-literal=a=b --request-timeout=20s").await.fails();
        has(told, &["the store is unavailable", "127.0.0.1:2379"]);
        let ready = server.kubectl.run("get --raw /readyz?verbose").await.fails();
        has(ready, &["[-]store failed"]);
        // It comes back, and so does everything else.
        let mut etcd = self::etcd(directory.path());
        within(LONG, "the store is there again", async || {
            server.kubectl.run("create configmap again").await.status.success().then_some(())
        })
        .await;
        assert_eq!(server.kubectl.path("configmap/kept", "{.data.a}").await, "b");
        etcd.kill().unwrap();
        etcd.wait().unwrap();
    });
}
