//! What the API can do: creates, lists, gets, watches, applies, renewals of Leases.

use std::time::Duration;

use anyhow::bail;
use bytes::Bytes;
use futures::future::try_join_all;
use http::Method;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::Instant};

use super::{Common, Report, Samples, namespace};
use crate::{
    connection::{Connection, Shared, Target},
    process::{Usage, usage},
};

const JSON: &str = "application/json";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
const TABLE: &str = "application/json;as=Table;g=meta.k8s.io;v=v1";

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// How many Pods there are for lists.
    #[arg(long, default_value_t = 10_000)]
    objects: usize,
    /// How many ConfigMaps there are besides; as many as Pods if it is not said.
    #[arg(long)]
    config_maps: Option<usize>,
    /// With how many clients objects are created.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    clients: Vec<usize>,
    /// For how many seconds each.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How many watchers.
    #[arg(long, value_delimiter = ',', default_value = "200")]
    watchers: Vec<usize>,
    /// How many updates a second they watch.
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// How many nodes renew a Lease every ten seconds.
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
}

fn config_map(name: &str) -> Bytes {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "x".repeat(512)}})
        .to_string()
        .into()
}

/// How many processes have all watchers, if a process has one connection for all of its own.
const PROCESSES: usize = 10;

/// How long a server has nothing to do before its memory is looked at again.
const REST: Duration = Duration::from_secs(100);

/// The node on which one pod in a hundred is. Nobody runs it.
const NODE: &str = "bench-node";

/// A pod of the usual size that nobody schedules.
fn pod(name: &str) -> Bytes {
    let number = name.rsplit('-').next().and_then(|n| n.parse::<usize>().ok());
    let node = number.filter(|number| number % 100 == 0).map(|_| NODE);
    let env: Vec<Value> = (0..8)
        .map(|i| json!({"name": format!("VARIABLE_{i}"), "value": format!("the value of variable {i}")}))
        .collect();
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "bench", "part": name}},
        "spec": {"schedulerName": "nobody", "nodeName": node, "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}], "containers": [{"name": "main", "image": "example.local/none:v1", "env": env,
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

/// Runs the benchmark.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let target = Target::from_kubeconfig(&args.common.kubeconfig)?;
    let pids = &args.common.pid;
    let ns = &args.common.namespace;
    namespace(&target, ns).await?;
    let mut report = Report::new(args.common.json);
    let maps = format!("/api/v1/namespaces/{ns}/configmaps");
    let pods = format!("/api/v1/namespaces/{ns}/pods");
    let memory = async |report: &mut Report, what: &str| -> anyhow::Result<()> {
        if !pids.is_empty() {
            report.add(format!("memory, {what}"), usage(pids)?.rss, "MiB");
            tokio::time::sleep(REST).await;
            report.add(format!("memory, {what}, {} s later", REST.as_secs()), usage(pids)?.rss, "MiB");
        }
        anyhow::Ok(())
    };
    if !pids.is_empty() {
        report.add("memory, before", usage(pids)?.rss, "MiB");
    }
    for clients in &args.clients {
        let (before, started) = (usage(pids)?, Instant::now());
        let until = started + Duration::from_secs_f64(args.seconds);
        let mut took =
            create(&target, &maps, *clients, config_map, &format!("c{clients}"), |_| usize::MAX, Some(until)).await?;
        let (count, seconds) = (took.0.len() as f64, started.elapsed().as_secs_f64());
        report.add(format!("create, {clients} clients"), count / seconds, "/s");
        report.add(format!("create, {clients} clients, p50"), took.quantile(0.5), "ms");
        report.add(format!("create, {clients} clients, p99"), took.quantile(0.99), "ms");
        report.add(format!("create, {clients} clients, p99.9"), took.quantile(0.999), "ms");
        if !pids.is_empty() {
            report.add(
                format!("create, {clients} clients, CPU each"),
                (usage(pids)?.cpu - before.cpu) * 1e3 / count,
                "ms",
            );
        }
    }
    // A server ends connections that have been idle for long, so there is a new one after what takes long.
    let mut connection = target.connect().await?;
    connection.expect(Method::DELETE, &maps, Bytes::new()).await?;
    let share = |clients: usize, objects: usize| {
        move |client: usize| objects / clients + usize::from(client < objects % clients)
    };
    connection = target.connect().await?;
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}).to_string();
    connection.expect(Method::POST, "/api/v1/nodes", node).await?;
    create(&target, &pods, 16, pod, "fill", share(16, args.objects), None).await?;
    memory(&mut report, &format!("{} Pods", args.objects)).await?;
    let config_maps = args.config_maps.unwrap_or(args.objects);
    create(&target, &maps, 16, config_map, "fill", share(16, config_maps), None).await?;
    memory(&mut report, &format!("{} Pods and {config_maps} ConfigMaps", args.objects)).await?;
    connection = target.connect().await?;
    for (what, path, accept, times) in [
        ("list of all pods", pods.clone(), JSON, 10),
        ("list of all pods, protobuf", pods.clone(), PROTOBUF, 10),
        ("list of all pods, protobuf again", pods.clone(), PROTOBUF, 10),
        ("table of 500 pods", format!("{pods}?limit=500"), TABLE, 20),
        ("list of one pod by label", format!("{pods}?labelSelector=part%3Dfill-0-1"), JSON, 20),
        ("list of one pod by name", format!("{pods}?fieldSelector=metadata.name%3Dfill-0-1"), JSON, 100),
        ("list of a node's pods", format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{NODE}"), JSON, 100),
    ] {
        list(&mut connection, &mut report, pids, what, &path, accept, times).await?;
    }
    memory(&mut report, "after lists").await?;
    connection = target.connect().await?;
    get(&target, &mut report, pids, &format!("{pods}/fill-0-1"), 16, args.seconds).await?;
    for watchers in &args.watchers {
        for shared in [0, PROCESSES] {
            watch(&target, &mut connection, &mut report, pids, &maps, *watchers, shared, args.rate).await?;
        }
    }
    apply(&mut connection, &mut report, pids, &maps).await?;
    leases(&target, &mut report, pids, ns, args.nodes, args.seconds).await?;
    connection = target.connect().await?;
    connection.expect(Method::DELETE, &pods, Bytes::new()).await?;
    connection.expect(Method::DELETE, &format!("/api/v1/nodes/{NODE}"), Bytes::new()).await?;
    connection.expect(Method::DELETE, &maps, Bytes::new()).await?;
    memory(&mut report, "after everything was deleted").await?;
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
    accept: &str,
    times: usize,
) -> anyhow::Result<()> {
    let mut took = Samples::default();
    let mut size = 0;
    let before = usage(pids)?;
    for _ in 0..times {
        let started = Instant::now();
        size = connection.fetch(path, accept).await?.len();
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
    report.add(format!("get, {clients} clients, p50"), all.quantile(0.5), "ms");
    report.add(format!("get, {clients} clients, p99"), all.quantile(0.99), "ms");
    report.add(format!("get, {clients} clients, p99.9"), all.quantile(0.999), "ms");
    cpu_each(report, pids, &format!("get, {clients} clients"), before, count)
}

/// Server-side applies of one field, one after another.
async fn apply(connection: &mut Connection, report: &mut Report, pids: &[i32], maps: &str) -> anyhow::Result<()> {
    const TIMES: usize = 300;
    let path = format!("{maps}/applied?fieldManager=bench");
    let (before, started) = (usage(pids)?, Instant::now());
    let mut took = Samples::default();
    for number in 0..TIMES {
        let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "applied"},
            "data": {"fixed": "x", "number": number.to_string()}});
        let started = Instant::now();
        connection.patch(&path, "application/apply-patch+yaml", body.to_string()).await?;
        took.0.push(started.elapsed());
    }
    report.add("apply", TIMES as f64 / started.elapsed().as_secs_f64(), "/s");
    report.add("apply, p99", took.quantile(0.99), "ms");
    cpu_each(report, pids, "apply", before, TIMES as f64)
}

/// What it costs that so many nodes renew their Leases, each every ten seconds: an open loop, for requests are sent when
/// they are due, whether those before were answered or not.
async fn leases(
    target: &Target,
    report: &mut Report,
    pids: &[i32],
    ns: &str,
    nodes: usize,
    seconds: f64,
) -> anyhow::Result<()> {
    const CONNECTIONS: usize = 32;
    let path = format!("/apis/coordination.k8s.io/v1/namespaces/{ns}/leases");
    let every = Duration::from_secs(10).div_f64(nodes.max(1) as f64);
    let most = (seconds.max(10.0) / every.as_secs_f64()) as usize;
    let body = |name: &str, number: usize| {
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name},
            "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "leaseTransitions": number}})
        .to_string()
    };
    let mut first = target.connect().await?;
    for node in 0..nodes {
        first.expect(Method::POST, &path, body(&format!("node-{node}"), 0)).await?;
    }
    let (before, began) = (usage(pids)?, Instant::now());
    let mut tasks = JoinSet::new();
    for connection in 0..CONNECTIONS.min(nodes.max(1)) {
        let (mut own, path) = (target.connect().await?, path.clone());
        tasks.spawn(async move {
            let mut took = Vec::new();
            for number in (connection..most).step_by(CONNECTIONS.min(nodes.max(1))) {
                let due = began + every * number as u32;
                tokio::time::sleep_until(due).await;
                let name = format!("node-{}", number % nodes);
                own.expect(Method::PUT, &format!("{path}/{name}"), body(&name, number)).await?;
                // From when it was due: that it had to wait for others counts.
                took.push(due.elapsed());
            }
            anyhow::Ok(took)
        });
    }
    let mut all = Samples::default();
    while let Some(done) = tasks.join_next().await {
        all.0.extend(done??);
    }
    let (count, lasted) = (all.0.len() as f64, began.elapsed().as_secs_f64());
    report.add(format!("leases of {nodes} nodes"), count / lasted, "/s");
    report.add(format!("leases of {nodes} nodes, p99"), all.quantile(0.99), "ms");
    cpu_each(report, pids, &format!("leases of {nodes} nodes"), before, count)?;
    first.expect(Method::DELETE, &path, Bytes::new()).await?;
    Ok(())
}

/// How long events take to reach many watchers, each with a connection of its own or on so many that they share.
#[expect(clippy::too_many_arguments, reason = "a scenario")]
async fn watch(
    target: &Target,
    connection: &mut Connection,
    report: &mut Report,
    pids: &[i32],
    maps: &str,
    watchers: usize,
    shared: usize,
    rate: u32,
) -> anyhow::Result<()> {
    const UPDATES: usize = 300;
    let name = &format!("watched-{watchers}-{shared}");
    let connections: Vec<Shared> = try_join_all((0..shared).map(|_| target.connect_shared())).await?;
    connection.expect(Method::POST, maps, config_map(name)).await?;
    let epoch = Instant::now();
    let mut tasks = JoinSet::new();
    let ready = std::sync::Arc::new(tokio::sync::Barrier::new(watchers + 1));
    for number in 0..watchers {
        let (target, shared) = (target.clone(), connections.get(number % shared.max(1)).cloned());
        let path = format!("{maps}?watch=true&fieldSelector=metadata.name%3D{name}&timeoutSeconds=60");
        let ready = ready.clone();
        tasks.spawn(async move {
            let response = match shared {
                Some(mut shared) => shared.start(&path).await?,
                None => target.connect().await?.start(Method::GET, &path, Bytes::new()).await?,
            };
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
    let mut tick = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
    for _ in 0..UPDATES {
        tick.tick().await;
        let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"sent": epoch.elapsed().as_micros().to_string()}});
        connection.expect(Method::PUT, &format!("{maps}/{name}"), body.to_string()).await?;
    }
    let mut all = Samples::default();
    while let Some(done) = tasks.join_next().await {
        all.0.extend(done??);
    }
    let on = if shared == 0 { String::new() } else { format!(" on {shared} connections") };
    report.add(format!("watch, {watchers} watchers{on}, {rate}/s, lag p50"), all.quantile(0.5), "ms");
    report.add(format!("watch, {watchers} watchers{on}, {rate}/s, lag p99"), all.quantile(0.99), "ms");
    cpu_each(report, pids, &format!("watch, {watchers} watchers{on}, event"), before, (watchers * UPDATES) as f64)
}
