//! `seawall bench`: what an API server can do, measured from outside.
//!
//! It drives any Kubernetes API server that a kubeconfig leads to. Given the pids of the server's processes it also
//! says what a unit of work costs in CPU time, and what they hold in memory.

mod scheduler;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    connection::{Connection, Target},
    process::{Usage, usage},
};

/// Options of `seawall bench`.
#[derive(clap::Args)]
pub struct Args {
    /// What to measure.
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// The API: creates, lists, gets, watches.
    Api(Api),
    /// How long pods take from their creation to Ready.
    Pods(Pods),
    /// How many pods a second the scheduler decides on.
    Scheduler(scheduler::Args),
    /// How long a server takes from its start to ready, and what it holds when idle.
    Start(Start),
}

#[derive(clap::Args)]
struct Common {
    /// The kubeconfig of the server.
    #[arg(long, env = "KUBECONFIG")]
    kubeconfig: PathBuf,
    /// A process of the server, for CPU time and memory. May be repeated.
    #[arg(long)]
    pid: Vec<i32>,
    /// The namespace to work in. It is made if it is not there, and emptied at the end.
    #[arg(long, default_value = "bench")]
    namespace: String,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Api {
    #[command(flatten)]
    common: Common,
    /// How many ConfigMaps and how many Pods there are for lists.
    #[arg(long, default_value_t = 10_000)]
    objects: usize,
    /// With how many clients objects are created.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    clients: Vec<usize>,
    /// For how many seconds each.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How many watchers.
    #[arg(long, default_value_t = 200)]
    watchers: usize,
}

#[derive(clap::Args)]
struct Pods {
    #[command(flatten)]
    common: Common,
    /// An image that is on the nodes and keeps running.
    #[arg(long)]
    image: String,
    /// How many pods, one after another.
    #[arg(long, default_value_t = 10)]
    count: usize,
}

#[derive(clap::Args)]
struct Start {
    /// How often.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// The port to use.
    #[arg(long, default_value_t = 26443)]
    port: u16,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Figures by name, in order.
struct Report {
    rows: Vec<(String, f64, &'static str)>,
    json: bool,
}

impl Report {
    fn new(json: bool) -> Report {
        Report { rows: Vec::new(), json }
    }

    fn add(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        let name = name.into();
        if !self.json {
            println!("{name:<52} {value:>12.3} {unit}");
        }
        self.rows.push((name, value, unit));
    }

    fn finish(self) {
        if self.json {
            let rows: Vec<Value> =
                self.rows.iter().map(|(n, v, u)| json!({"name": n, "value": v, "unit": u})).collect();
            println!("{}", json!(rows));
        }
    }
}

/// Durations, to be summed up.
#[derive(Default)]
struct Samples(Vec<Duration>);

impl Samples {
    /// The value below which this part of the samples lies, in milliseconds.
    fn quantile(&mut self, part: f64) -> f64 {
        self.0.sort_unstable();
        let index = ((self.0.len() as f64 - 1.0) * part).round().max(0.0) as usize;
        self.0.get(index).map_or(0.0, |d| d.as_secs_f64() * 1e3)
    }
}

/// Runs `seawall bench`.
pub fn run(args: Args) -> futures::future::LocalBoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(args))
}

async fn work(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Api(args) => api(args).await,
        Command::Pods(args) => pods(args).await,
        Command::Scheduler(args) => scheduler::run(&args),
        Command::Start(args) => start(args).await,
    }
}

async fn namespace(target: &Target, name: &str) -> anyhow::Result<Connection> {
    let mut connection = target.connect().await?;
    let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}).to_string();
    let (status, text) = connection.send(Method::POST, "/api/v1/namespaces", body).await?;
    if !status.is_success() && status != http::StatusCode::CONFLICT {
        bail!("the namespace {name} was not made: {status}: {}", String::from_utf8_lossy(&text));
    }
    // A pod needs the account that a controller makes.
    let body = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}).to_string();
    connection.send(Method::POST, &format!("/api/v1/namespaces/{name}/serviceaccounts"), body).await?;
    Ok(connection)
}

fn config_map(name: &str) -> Bytes {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "x".repeat(512)}})
        .to_string()
        .into()
}

/// A pod of the usual size that nobody schedules.
fn pod(name: &str) -> Bytes {
    let env: Vec<Value> = (0..8)
        .map(|i| json!({"name": format!("VARIABLE_{i}"), "value": format!("the value of variable {i}")}))
        .collect();
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "bench", "part": name}},
        "spec": {"schedulerName": "nobody", "containers": [{"name": "main", "image": "example.local/none:v1", "env": env,
            "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
            "readinessProbe": {"httpGet": {"path": "/", "port": 80}}}]}})
    .to_string()
    .into()
}

/// Creates objects with many clients until `until` says no. Returns how long each took.
async fn create(
    target: &Target,
    path: &str,
    clients: usize,
    make: fn(&str) -> Bytes,
    prefix: &str,
    share: impl Fn(usize) -> usize,
    until: Option<Instant>,
) -> anyhow::Result<Samples> {
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let mut connection = target.connect().await?;
        let (path, prefix, most) = (path.to_owned(), prefix.to_owned(), share(client));
        tasks.spawn(async move {
            let mut took = Vec::new();
            for number in 0..most {
                if until.is_some_and(|u| Instant::now() >= u) {
                    break;
                }
                let body = make(&format!("{prefix}-{client}-{number}"));
                let started = Instant::now();
                connection.expect(Method::POST, &path, body).await?;
                took.push(started.elapsed());
            }
            anyhow::Ok(took)
        });
    }
    let mut all = Samples::default();
    while let Some(done) = tasks.join_next().await {
        all.0.extend(done??);
    }
    Ok(all)
}

async fn api(args: Api) -> anyhow::Result<()> {
    let target = Target::from_kubeconfig(&args.common.kubeconfig)?;
    let pids = &args.common.pid;
    let ns = &args.common.namespace;
    let mut connection = namespace(&target, ns).await?;
    let mut report = Report::new(args.common.json);
    let maps = format!("/api/v1/namespaces/{ns}/configmaps");
    let pods = format!("/api/v1/namespaces/{ns}/pods");
    let memory = |report: &mut Report, what: &str| -> anyhow::Result<()> {
        if !pids.is_empty() {
            report.add(format!("memory, {what}"), usage(pids)?.rss, "MiB");
        }
        Ok(())
    };
    memory(&mut report, "before")?;
    for clients in &args.clients {
        let (before, started) = (usage(pids)?, Instant::now());
        let until = started + Duration::from_secs_f64(args.seconds);
        let mut took =
            create(&target, &maps, *clients, config_map, &format!("c{clients}"), |_| usize::MAX, Some(until)).await?;
        let (count, seconds) = (took.0.len() as f64, started.elapsed().as_secs_f64());
        report.add(format!("create, {clients} clients"), count / seconds, "/s");
        report.add(format!("create, {clients} clients, p50"), took.quantile(0.5), "ms");
        report.add(format!("create, {clients} clients, p99"), took.quantile(0.99), "ms");
        if !pids.is_empty() {
            report.add(
                format!("create, {clients} clients, CPU each"),
                (usage(pids)?.cpu - before.cpu) * 1e3 / count,
                "ms",
            );
        }
    }
    connection.expect(Method::DELETE, &maps, Bytes::new()).await?;
    let share = |clients: usize, objects: usize| {
        move |client: usize| objects / clients + usize::from(client < objects % clients)
    };
    create(&target, &maps, 16, config_map, "fill", share(16, args.objects), None).await?;
    memory(&mut report, &format!("{} ConfigMaps", args.objects))?;
    create(&target, &pods, 16, pod, "fill", share(16, args.objects), None).await?;
    memory(&mut report, &format!("{0} ConfigMaps and {0} Pods", args.objects))?;
    list(&mut connection, &mut report, pids, "list of all pods", &pods, 10).await?;
    let one = format!("{pods}?labelSelector=part%3Dfill-0-1");
    list(&mut connection, &mut report, pids, "list of one pod by label", &one, 20).await?;
    let by_name = format!("{pods}?fieldSelector=metadata.name%3Dfill-0-1");
    list(&mut connection, &mut report, pids, "list of one pod by name", &by_name, 100).await?;
    get(&target, &mut report, pids, &format!("{pods}/fill-0-1"), 16, args.seconds).await?;
    watch(&target, &mut connection, &mut report, pids, &maps, args.watchers).await?;
    connection.expect(Method::DELETE, &pods, Bytes::new()).await?;
    connection.expect(Method::DELETE, &maps, Bytes::new()).await?;
    memory(&mut report, "after everything was deleted")?;
    report.finish();
    Ok(())
}

fn cpu_each(report: &mut Report, pids: &[i32], name: &str, before: Usage, count: f64) -> anyhow::Result<()> {
    if !pids.is_empty() {
        report.add(format!("{name}, CPU each"), (usage(pids)?.cpu - before.cpu) * 1e3 / count, "ms");
    }
    Ok(())
}

async fn list(
    connection: &mut Connection,
    report: &mut Report,
    pids: &[i32],
    name: &str,
    path: &str,
    times: usize,
) -> anyhow::Result<()> {
    let mut took = Samples::default();
    let mut size = 0;
    let before = usage(pids)?;
    for _ in 0..times {
        let started = Instant::now();
        size = connection.expect(Method::GET, path, Bytes::new()).await?.len();
        took.0.push(started.elapsed());
    }
    report.add(format!("{name}, size"), size as f64 / 1e6, "MB");
    report.add(format!("{name}, p50"), took.quantile(0.5), "ms");
    report.add(format!("{name}, worst"), took.quantile(1.0), "ms");
    cpu_each(report, pids, name, before, times as f64)
}

async fn get(
    target: &Target,
    report: &mut Report,
    pids: &[i32],
    path: &str,
    clients: usize,
    seconds: f64,
) -> anyhow::Result<()> {
    let (before, started) = (usage(pids)?, Instant::now());
    let until = started + Duration::from_secs_f64(seconds);
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let (mut connection, path) = (target.connect().await?, path.to_owned());
        tasks.spawn(async move {
            let mut took = Vec::new();
            while Instant::now() < until {
                let started = Instant::now();
                connection.expect(Method::GET, &path, Bytes::new()).await?;
                took.push(started.elapsed());
            }
            anyhow::Ok(took)
        });
    }
    let mut all = Samples::default();
    while let Some(done) = tasks.join_next().await {
        all.0.extend(done??);
    }
    let count = all.0.len() as f64;
    report.add(format!("get, {clients} clients"), count / started.elapsed().as_secs_f64(), "/s");
    report.add(format!("get, {clients} clients, p99"), all.quantile(0.99), "ms");
    cpu_each(report, pids, &format!("get, {clients} clients"), before, count)
}

/// How long events take to reach many watchers, at 100 updates a second.
async fn watch(
    target: &Target,
    connection: &mut Connection,
    report: &mut Report,
    pids: &[i32],
    maps: &str,
    watchers: usize,
) -> anyhow::Result<()> {
    const UPDATES: usize = 300;
    const EVERY: Duration = Duration::from_millis(10);
    let name = "watched";
    connection.expect(Method::POST, maps, config_map(name)).await?;
    let epoch = Instant::now();
    let mut tasks = JoinSet::new();
    let ready = std::sync::Arc::new(tokio::sync::Barrier::new(watchers + 1));
    for _ in 0..watchers {
        let mut connection = target.connect().await?;
        let path = format!("{maps}?watch=true&fieldSelector=metadata.name%3D{name}&timeoutSeconds=60");
        let ready = ready.clone();
        tasks.spawn(async move {
            let response = connection.start(Method::GET, &path, Bytes::new()).await?;
            ready.wait().await;
            let (mut body, mut took, mut rest) = (response.into_body(), Vec::new(), Vec::new());
            while took.len() < UPDATES {
                let Some(frame) = body.frame().await else { bail!("a watch ended early") };
                let Ok(data) = frame?.into_data() else { continue };
                rest.extend_from_slice(&data);
                while let Some(end) = rest.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = rest.drain(..=end).collect();
                    let event: Value = serde_json::from_slice(&line)?;
                    let sent = event["object"]["data"]["sent"].as_str().and_then(|t| t.parse::<u64>().ok());
                    if let Some(sent) = sent {
                        took.push(epoch.elapsed().saturating_sub(Duration::from_micros(sent)));
                    }
                }
            }
            anyhow::Ok(took)
        });
    }
    ready.wait().await;
    let before = usage(pids)?;
    let mut tick = tokio::time::interval(EVERY);
    for _ in 0..UPDATES {
        tick.tick().await;
        let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"sent": epoch.elapsed().as_micros().to_string()}});
        connection.expect(Method::PUT, &format!("{maps}/{name}"), body.to_string()).await?;
    }
    let mut all = Samples::default();
    while let Some(done) = tasks.join_next().await {
        all.0.extend(done??);
    }
    report.add(format!("watch, {watchers} watchers, 100/s, lag p50"), all.quantile(0.5), "ms");
    report.add(format!("watch, {watchers} watchers, 100/s, lag p99"), all.quantile(0.99), "ms");
    cpu_each(report, pids, &format!("watch, {watchers} watchers, event"), before, (watchers * UPDATES) as f64)
}

async fn pods(args: Pods) -> anyhow::Result<()> {
    let target = Target::from_kubeconfig(&args.common.kubeconfig)?;
    let ns = &args.common.namespace;
    let mut connection = namespace(&target, ns).await?;
    let mut report = Report::new(args.common.json);
    let path = format!("/api/v1/namespaces/{ns}/pods");
    let mut took = Samples::default();
    for number in 0..args.count {
        let name = format!("start-{number}");
        let mut watcher = target.connect().await?;
        let watch = format!("{path}?watch=true&fieldSelector=metadata.name%3D{name}&timeoutSeconds=60");
        let mut body = watcher.start(Method::GET, &watch, Bytes::new()).await?.into_body();
        let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": args.image, "imagePullPolicy": "IfNotPresent"}]}});
        let started = Instant::now();
        connection.expect(Method::POST, &path, object.to_string()).await?;
        let mut rest = Vec::new();
        let ready = async {
            while let Some(frame) = body.frame().await {
                let Ok(data) = frame?.into_data() else { continue };
                rest.extend_from_slice(&data);
                while let Some(end) = rest.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = rest.drain(..=end).collect();
                    let event: Value = serde_json::from_slice(&line)?;
                    let mut conditions = event["object"]["status"]["conditions"].as_array().into_iter().flatten();
                    if conditions.any(|c| c["type"] == "Ready" && c["status"] == "True") {
                        return anyhow::Ok(());
                    }
                }
            }
            bail!("the watch of {name} ended before it was ready")
        };
        tokio::time::timeout(Duration::from_secs(60), ready)
            .await
            .with_context(|| format!("{name} was not ready within 60 s"))??;
        took.0.push(started.elapsed());
    }
    report.add("pod, create to Ready, p50", took.quantile(0.5), "ms");
    report.add("pod, create to Ready, worst", took.quantile(1.0), "ms");
    connection.expect(Method::DELETE, &path, Bytes::new()).await?;
    report.finish();
    Ok(())
}

async fn start(args: Start) -> anyhow::Result<()> {
    let mut report = Report::new(args.json);
    let binary = std::env::current_exe()?;
    let mut took = Samples::default();
    let mut idle = Usage::default();
    for _ in 0..args.runs {
        let dir = std::env::temp_dir().join(format!("seawall-bench-{}", std::process::id()));
        let started = Instant::now();
        let mut child = tokio::process::Command::new(&binary)
            .args(["--log", "warn", "server", "--disable", "agent,proxy", "--port", &args.port.to_string()])
            .arg("--data-dir")
            .arg(&dir)
            .arg("--run-dir")
            .arg(dir.join("run"))
            .kill_on_drop(true)
            .spawn()?;
        let kubeconfig = dir.join("admin.kubeconfig");
        let ready = async {
            loop {
                if let Ok(target) = Target::from_kubeconfig(&kubeconfig)
                    && let Ok(mut connection) = target.connect().await
                    && let Ok((http::StatusCode::OK, _)) = connection.send(Method::GET, "/readyz", Bytes::new()).await
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), ready).await.context("the server was not ready within 30 s")?;
        took.0.push(started.elapsed());
        tokio::time::sleep(Duration::from_secs(2)).await;
        if let Some(pid) = child.id() {
            idle = usage(&[pid as i32])?;
        }
        child.kill().await?;
        std::fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
    }
    report.add("server, start to ready, p50", took.quantile(0.5), "ms");
    report.add("server, start to ready, worst", took.quantile(1.0), "ms");
    report.add("server (API, controllers, scheduler), idle memory", idle.rss, "MiB");
    report.finish();
    Ok(())
}
