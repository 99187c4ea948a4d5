//! `seawall bench`: what an API server can do, measured from outside.
//!
//! It drives any Kubernetes API server that a kubeconfig leads to. Given the pids of the server's processes it also
//! says what a unit of work costs in CPU time, and what they hold in memory.

mod api;
pub(crate) mod dns;
mod policy;
mod scheduler;

use std::{collections::HashMap, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::time::Instant;

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
    Api(api::Args),
    /// DNS: how many names a second a server finds.
    Dns(dns::Args),
    /// How long pods take from their creation to Ready.
    Pods(Pods),
    /// How long a NetworkPolicy takes to hold. To be run on another machine than the pod's.
    Policy(policy::Args),
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
struct Pods {
    #[command(flatten)]
    common: Common,
    /// An image that is on the nodes and keeps running.
    #[arg(long)]
    image: String,
    /// How many pods.
    #[arg(long, default_value_t = 10)]
    count: usize,
    /// How many of them at a time.
    #[arg(long, default_value_t = 1)]
    at_once: usize,
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
        Command::Api(args) => api::run(args).await,
        Command::Dns(args) => dns::run(args).await,
        Command::Pods(args) => pods(args).await,
        Command::Policy(args) => policy::run(args).await,
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

async fn pods(args: Pods) -> anyhow::Result<()> {
    let target = Target::from_kubeconfig(&args.common.kubeconfig)?;
    let ns = &args.common.namespace;
    let at_once = args.at_once.max(1);
    let mut connection = namespace(&target, ns).await?;
    let mut report = Report::new(args.common.json);
    let path = format!("/api/v1/namespaces/{ns}/pods");
    let before = usage(&args.common.pid)?;
    let mut took = Samples::default();
    for first in (0..args.count).step_by(at_once) {
        let names: Vec<String> = (first..args.count.min(first + at_once)).map(|n| format!("start-{n}")).collect();
        took.0.extend(start_pods(&target, &path, &args.image, &names).await?);
        connection.expect(Method::DELETE, &path, Bytes::new()).await?;
        emptied(&mut connection, &path).await?;
    }
    let what = format!("pod, {at_once} at once, create to Ready");
    for (name, part) in [("p50", 0.5), ("p99", 0.99), ("worst", 1.0)] {
        report.add(format!("{what}, {name}"), took.quantile(part), "ms");
    }
    if !args.common.pid.is_empty() {
        let cpu = usage(&args.common.pid)?.cpu - before.cpu;
        report.add(format!("{what} and gone, CPU each"), cpu * 1e3 / args.count as f64, "ms");
    }
    report.finish();
    Ok(())
}

/// Creates pods all at the same time, and returns how long each took from its creation to Ready.
async fn start_pods(target: &Target, path: &str, image: &str, names: &[String]) -> anyhow::Result<Vec<Duration>> {
    let mut watcher = target.connect().await?;
    let watch = format!("{path}?watch=true&timeoutSeconds=300");
    let mut body = watcher.start(Method::GET, &watch, Bytes::new()).await?.into_body();
    let mut creating = tokio::task::JoinSet::new();
    for name in names {
        let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": image, "imagePullPolicy": "IfNotPresent"}]}});
        let (target, path, name) = (target.clone(), path.to_owned(), name.clone());
        creating.spawn(async move {
            let mut connection = target.connect().await?;
            let started = Instant::now();
            connection.expect(Method::POST, &path, object.to_string()).await?;
            anyhow::Ok((name, started))
        });
    }
    let mut ready: HashMap<String, Instant> = HashMap::new();
    let watching = async {
        let mut rest = Vec::new();
        while ready.len() < names.len() {
            let frame = body.frame().await.context("the watch ended before all pods were ready")?;
            let Ok(data) = frame?.into_data() else { continue };
            rest.extend_from_slice(&data);
            while let Some(end) = rest.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                let event: Value = serde_json::from_slice(&line)?;
                let mut conditions = event["object"]["status"]["conditions"].as_array().into_iter().flatten();
                if conditions.any(|c| c["type"] == "Ready" && c["status"] == "True")
                    && let Some(name) = event["object"]["metadata"]["name"].as_str()
                {
                    ready.entry(name.to_owned()).or_insert_with(Instant::now);
                }
            }
        }
        anyhow::Ok(())
    };
    let watched = tokio::time::timeout(Duration::from_secs(300), watching).await;
    watched.with_context(|| format!("not all of {} pods were ready within 300 s", names.len()))??;
    let mut took = Vec::new();
    while let Some(created) = creating.join_next().await {
        let (name, started) = created??;
        took.extend(ready.get(&name).map(|at| at.duration_since(started)));
    }
    Ok(took)
}

/// Waits until nothing is left there.
async fn emptied(connection: &mut Connection, path: &str) -> anyhow::Result<()> {
    let empty = async {
        loop {
            let list: Value = serde_json::from_slice(&connection.fetch(path, "application/json").await?)?;
            if list["items"].as_array().is_none_or(Vec::is_empty) {
                return anyhow::Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), empty).await.context("pods do not go within 120 s")?
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
