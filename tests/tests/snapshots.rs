//! Snapshots of a lone server: saved while it runs, restored while it does not, taken by the clock; what is said of them; and who
//! balances in front of servers.

use std::{path::Path, process::Stdio, time::Duration};

use seawall_tests::{
    Options, Server,
    kubectl::{self, Output, has},
    seawall, until, within,
};
use serde_json::Value;
use tokio::process::{Child, Command};

const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: i}]}
"#;

/// `seawall snapshot …` on a server's directories.
async fn snapshot(server: &Server, words: &str) -> Output {
    let mut command = Command::new(seawall());
    command.args(["--log", "error", "snapshot"]).args(words.split_whitespace());
    command.arg("--data-dir").arg(server.directory().join("data"));
    kubectl::run(command, &format!("seawall snapshot {words}"), "").await
}

async fn check(server: &Server, args: &[&str]) -> Vec<(String, String)> {
    let mut command = Command::new(seawall());
    command.args(["check", "--json", "--kubeconfig"]).arg(&server.kubectl.kubeconfig).args(args);
    let done = command.output().await.unwrap();
    let found: Value = serde_json::from_slice(&done.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&done.stderr)));
    let text = |finding: &Value, field: &str| finding[field].as_str().unwrap().to_owned();
    found.as_array().unwrap().iter().map(|f| (text(f, "rule"), text(f, "why") + " -> " + &text(f, "mend"))).collect()
}

/// What is found about snapshots.
async fn rules(server: &Server) -> Vec<String> {
    let found = check(server, &[]).await.into_iter().map(|(rule, _)| rule);
    found.filter(|rule| rule.starts_with("snapshots")).collect()
}

/// What the server says of its snapshots in the ConfigMap.
async fn report(server: &Server) -> Option<Value> {
    let map = server.kubectl.run("get configmap seawall-snapshots -n kube-system -o json").await;
    let map: Value = serde_json::from_str(&map.stdout).ok()?;
    let (_, text) = map["data"].as_object()?.iter().next()?;
    serde_json::from_str(text.as_str()?).ok()
}

/// The names of the snapshots that there are, the newest first.
async fn names(server: &Server) -> Vec<String> {
    let list: Value = serde_json::from_str(&snapshot(server, "ls --json").await.ok()).unwrap();
    list.as_array().unwrap().iter().map(|kept| kept["name"].as_str().unwrap().to_owned()).collect()
}

async fn newest(server: &Server) -> u64 {
    let list: Value =
        serde_json::from_str(&server.kubectl.run("get --raw /api/v1/configmaps?limit=1").await.ok()).unwrap();
    list["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
}

fn without_scheduler(more: &[&str]) -> Options {
    let args = ["--disable=scheduler,gossip"].iter().chain(more).map(|arg| (*arg).to_owned()).collect();
    Options { machine: None, args }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_comes_back() {
    let mut server = Server::start(without_scheduler(&[])).await;
    let k = server.kubectl.clone();
    k.reaches("serviceaccount/default", "{.metadata.name}", "default").await;
    k.run("create configmap kept --from-literal=n=1").await.ok();
    k.run("create configmap changed --from-literal=n=1").await.ok();
    k.run("create configmap deleted --from-literal=n=1").await.ok();
    k.apply(WEB).await;
    k.reaches("deployment/web", "{.status.replicas}", "1").await;
    let (uid, version) = (
        k.path("configmap/kept", "{.metadata.uid}").await,
        k.path("configmap/kept", "{.metadata.resourceVersion}").await,
    );
    assert_eq!(rules(&server).await, ["snapshots"], "there is none");

    // The server writes it, and reads it back.
    has(snapshot(&server, "save").await.ok(), &["on-demand-", "objects at revision", "read back whole"]);
    let name = names(&server).await.pop().unwrap();
    let file = server.directory().join(format!("data/snapshots/{name}.snap"));
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(rules(&server).await, Vec::<String>::new());
    let metrics = k.run("get --raw /metrics").await.ok();
    has(metrics, &["seawall_snapshots 1\n", "seawall_snapshot_failures_total 0\n", "seawall_snapshot_last_size_bytes"]);
    has(snapshot(&server, "ls").await.ok(), &["SERVER", "VERIFIED", &name]);

    // Life goes on, and goes wrong.
    let seen = newest(&server).await;
    k.run("patch configmap changed -p {\"data\":{\"n\":\"2\"}}").await.ok();
    k.run("delete configmap deleted").await.ok();
    k.run("delete deployment web").await.ok();
    k.run("create configmap later --from-literal=n=1").await.ok();
    let lost = newest(&server).await;
    has(snapshot(&server, &format!("restore {name} --force")).await.fails(), &["another server is using this store"]);
    server.stop().await;
    has(
        snapshot(&server, &format!("restore {name}")).await.fails(),
        &["it has objects", "with --force", "before-restore-"],
    );
    has(snapshot(&server, "ls").await.ok(), &[&name]);
    has(snapshot(&server, "restore nothing").await.fails(), &["no file nothing", "seawall snapshot ls"]);
    let restored = snapshot(&server, &format!("restore {name} --force")).await.ok();
    has(
        &restored,
        &["are in place as they were at", "every resourceVersion from now on is larger than", "before-restore-"],
    );

    server.launch().await;
    assert_eq!(k.path("configmap/changed", "{.data.n}").await, "1");
    assert_eq!(k.path("configmap/deleted", "{.data.n}").await, "1");
    assert_eq!(k.path("configmap/kept", "{.metadata.uid}").await, uid);
    assert_eq!(k.path("configmap/kept", "{.metadata.resourceVersion}").await, version, "it was not written since");
    has(k.run("get configmap later").await.fails(), &["not found"]);
    // Nobody is led on by what they knew, be it of before the snapshot or of what is lost.
    let now = newest(&server).await;
    assert!(now > lost + 900_000_000, "{now} {lost}");
    for old in [seen, lost, lost + 1000] {
        let path = format!("/api/v1/namespaces/default/configmaps?watch=1&resourceVersion={old}&timeoutSeconds=5");
        let watch = server.api().get(&path).await.unwrap();
        has(watch.text(), &["\"code\":410", "Expired"]);
    }
    let path = format!("/api/v1/namespaces/default/configmaps?watch=1&resourceVersion={now}&timeoutSeconds=1");
    assert!(!server.api().get(&path).await.unwrap().text().contains("410"));
    // Who would change what he no longer knows is refused.
    k.run(&format!("get --raw /api/v1/namespaces/default/configmaps/changed?resourceVersion={version}")).await.ok();
    let stale = format!(r#"{{"metadata":{{"resourceVersion":"{lost}"}},"data":{{"n":"9"}}}}"#);
    has(k.args(&["patch", "configmap", "changed", "-p", &stale]).await.fails(), &["has been modified"]);
    // Controllers go on where they were.
    k.run("scale deployment/web --replicas=3").await.ok();
    k.reaches("deployment/web", "{.status.replicas}", "3").await;
    until("what was restored is said", async || {
        let report = report(&server).await?;
        (report["restored"]["name"] == name).then_some(())
    })
    .await;
    assert_eq!(rules(&server).await, Vec::<String>::new());

    // Once more the same: revisions still do not go back.
    server.stop().await;
    snapshot(&server, &format!("restore {name} --force")).await.ok();
    server.launch().await;
    assert!(newest(&server).await > now + 900_000_000);
    // On another machine, with nothing but the file. Its own keys are new, the objects are those.
    let other = tempfile::tempdir().unwrap();
    let mut command = Command::new(seawall());
    command.args(["--log", "error", "snapshot", "restore"]).arg(&file).arg("--data-dir").arg(other.path().join("data"));
    kubectl::run(command, "restore elsewhere", "").await.ok();
    let elsewhere = Server::start_in(other, without_scheduler(&[])).await;
    assert_eq!(elsewhere.kubectl.path("configmap/deleted", "{.data.n}").await, "1");
    elsewhere.kubectl.run("create configmap new --from-literal=n=1").await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_said() {
    let mut server = Server::start(without_scheduler(&["--disable-snapshots"])).await;
    server.kubectl.reaches("namespace/default", "{.metadata.name}", "default").await;
    for name in ["a", "a", "b"] {
        snapshot(&server, &format!("save --name {name}")).await.ok();
    }
    let all = names(&server).await;
    assert_eq!(all.len(), 3, "{all:?}");
    has(snapshot(&server, "save --name a/b").await.fails(), &["the name \"a/b\"", "use up to"]);
    has(snapshot(&server, "delete nothing").await.fails(), &["there is no snapshot \"nothing\"", "snapshot ls"]);
    has(snapshot(&server, "delete ../admin.kubeconfig").await.fails(), &["use up to"]);
    has(snapshot(&server, "prune --name a --snapshot-retention 1").await.ok(), &["a-", "is deleted"]);
    assert_eq!(names(&server).await.len(), 2);
    // Nobody but administrators.
    let denied = server.kubectl.run("get --raw /seawall/v1/snapshots --as somebody").await.fails();
    has(denied, &["forbidden"]);
    has(server.kubectl.run("get --raw /seawall/v1/snapshots/x").await.fails(), &["NotFound"]);
    let all_but = server.kubectl.pipe("create --raw /seawall/v1/snapshots/prune -f -", r#"{"retention": "few"}"#).await;
    has(all_but.fails(), &["retention \"few\"", "say how many to keep"]);

    server.stop().await;
    has(snapshot(&server, "save").await.fails(), &["does not answer", "does it run?"]);
    let name = all.iter().find(|name| name.starts_with('b')).unwrap();
    has(snapshot(&server, &format!("verify {name}")).await.ok(), &["is whole", "SHA-256"]);
    let file = server.directory().join(format!("data/snapshots/{name}.snap"));
    let whole = std::fs::read(&file).unwrap();
    let broken = server.directory().join("broken");
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 0x10;
    for (bytes, words) in [
        (&whole[..whole.len() - 1], "was not written or copied to the end"),
        (&changed[..], "it is damaged"),
        (b"text", "this is not a snapshot of Seawall"),
    ] {
        std::fs::write(&broken, bytes).unwrap();
        let path = broken.display().to_string();
        has(snapshot(&server, &format!("verify {path}")).await.fails(), &[words, &path]);
        has(snapshot(&server, &format!("restore --force {path}")).await.fails(), &[words, &path]);
    }
    // Nothing was touched by what could not be restored.
    let left = |dir: &Path| std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    let data = left(&server.directory().join("data"));
    assert!(data.iter().all(|name| !name.to_string_lossy().contains("restor")), "{data:?}");
    let huge = format!("restore --force {name} --bump-revision {}", u64::MAX);
    has(snapshot(&server, &huge).await.fails(), &["--bump-revision", "no revision is so large"]);
    let note = server.directory().join("data/snapshots/restored.json");
    std::fs::write(&note, "{").unwrap();
    let unknown = snapshot(&server, &format!("restore --force {name}")).await;
    has(unknown.fails(), &["restored.json", "cannot be read", "--bump-revision"]);
    std::fs::remove_file(note).unwrap();
    // A damaged one among those of the server is shown as such, and does not keep it from starting.
    std::fs::write(&file, "text").unwrap();
    server.launch().await;
    until("it is shown", async || snapshot(&server, "ls").await.ok().contains("not a snapshot").then_some(())).await;
    let mut bad = Command::new(seawall());
    bad.args(["server", "--snapshot-schedule-cron", "every day", "--data-dir"]).arg(server.directory().join("other"));
    bad.args(["--disable", "agent,proxy,dns,gossip"]);
    has(kubectl::run(bad, "a bad schedule", "").await.fails(), &["--snapshot-schedule-cron \"every day\"", "0 */12"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clock_takes_them_and_a_failure_stops_nothing() {
    let options = without_scheduler(&["--snapshot-schedule-cron=@every 4s", "--snapshot-retention=2"]);
    let server = Server::start(options).await;
    let first = until("the first is there", async || {
        let report = report(&server).await?;
        let first = report["snapshots"].as_array()?.last()?;
        first["verified"].is_string().then(|| first["name"].as_str().map(str::to_owned)).flatten()
    })
    .await;
    assert!(first.starts_with("seawall-snapshot-"), "{first}");
    let kept = until("the first is pruned, two are left", async || {
        let names: Vec<String> = names(&server).await;
        (names.len() == 2 && !names.contains(&first)).then_some(names)
    })
    .await;
    assert!(kept[0] > kept[1], "the newest first: {kept:?}");
    assert_eq!(rules(&server).await, Vec::<String>::new());

    // The directory is no longer one.
    let (directory, away) = (server.directory().join("data/snapshots"), server.directory().join("away"));
    std::fs::rename(&directory, &away).unwrap();
    std::fs::write(&directory, "").unwrap();
    let failed = until("the failure is said", async || {
        let report = report(&server).await?;
        report["error"]["message"].as_str().filter(|said| said.contains("no snapshot was taken")).map(str::to_owned)
    })
    .await;
    has(&failed, &["--snapshot-dir"]);
    assert!(server.logged("no snapshot was taken"));
    let metrics = server.kubectl.run("get --raw /metrics").await.ok();
    assert!(!metrics.contains("seawall_snapshot_failures_total 0\n"), "{metrics}");
    assert!(rules(&server).await.contains(&"snapshots".to_owned()));
    has(snapshot(&server, "save").await.fails(), &["the server says", "--snapshot-dir"]);
    server.kubectl.run("create configmap alive").await.ok();

    // It is one again.
    std::fs::remove_file(&directory).unwrap();
    std::fs::rename(&away, &directory).unwrap();
    until("it goes on", async || {
        let report = report(&server).await?;
        (report["error"].is_null() && report["snapshots"][0]["name"].as_str()? > &*kept[0]).then_some(())
    })
    .await;
}

/// HAProxy in front of a server, as a balancer that says its name when it asks whether the server is well.
struct Haproxy {
    _process: Child,
    _directory: tempfile::TempDir,
    port: u16,
}

impl Haproxy {
    fn start(name: Option<&str>, server: &Server) -> Haproxy {
        let (port, directory) = (seawall_tests::server::free_port(), tempfile::tempdir().unwrap());
        // The server says of itself an address at which it does not listen.
        let address = server.url().replace("https://", "");
        let mut command = std::process::Command::new(seawall());
        command.args(["entry", "haproxy", "--server", &address, "--bind", &format!("127.0.0.1:{port}")]);
        let config = command.args(name.map(|name| ["--name", name]).iter().flatten()).output().unwrap();
        let config = String::from_utf8(config.stdout).unwrap();
        let file = kubectl::file(directory.path(), "haproxy.cfg", &config);
        let process = Command::new("haproxy")
            .args(["-db", "-L", "lb2", "-f", &file])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("haproxy is installed (Debian: apt-get install haproxy)");
        Haproxy { _process: process, _directory: directory, port }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_balancer_alone_is_found() {
    let server = Server::start(without_scheduler(&[])).await;
    let found = async || check(&server, &[]).await.into_iter().find(|(rule, _)| rule == "entry-balancers");
    assert_eq!(found().await, None, "nobody is in front of it");
    let one = Haproxy::start(Some("lb1"), &server);
    let (_, said) = until("one is seen", async || found().await).await;
    has(&said, &["The balancer lb1 is the only one", "keepalived"]);
    // It balances as well.
    let through = server.api().at(&format!("127.0.0.1:{}", one.port));
    within(Duration::from_secs(30), "requests pass", async || {
        through.get("/readyz").await.ok().filter(|answer| answer.status == 200).map(|_| ())
    })
    .await;
    // The second one's name is that of its machine.
    let _two = Haproxy::start(None, &server);
    until("both are seen", async || found().await.is_none().then_some(())).await;
    has(
        server.kubectl.run("get --raw /metrics").await.ok(),
        &[
            "seawall_entry_balancer_last_seen_timestamp_seconds{balancer=\"lb1\",address=\"127.0.0.1\"}",
            "seawall_entry_balancer_last_seen_timestamp_seconds{balancer=\"lb2\",address=\"127.0.0.1\"}",
        ],
    );
}
