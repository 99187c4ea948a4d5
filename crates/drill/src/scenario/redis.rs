//! `redis-master-power-off`: the machine of a real redis' master loses its power while a client writes.
//!
//! What runs is `examples/redis.yaml`. The client finds the master as client libraries do, by asking a sentinel
//! (<https://redis.io/docs/latest/develop/reference/sentinel-clients/>), and counts a write as done when a replica has it
//! too (`WAIT 1`, <https://redis.io/docs/latest/commands/wait/>).

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use redis::{AsyncConnectionConfig, aio::MultiplexedConnection, cmd};
use serde::Deserialize as _;
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Scenario, image, roles,
    run::{Say, Stage, looked, well},
};
use crate::{
    check::Verdict,
    connection::Target,
    history::Class,
    lab::{Lab, Machine},
    report::{Report, Times},
    traffic::{self, Client, NAMESPACE, PATIENT, Recorder, Site, Way},
};

const EXAMPLE: &str = include_str!("../../../../examples/redis.yaml");
const IMAGE: &str = "seawall.local/redis:v1";
/// Debian's redis-tools has the server under this name.
const SERVER: &str = "/usr/bin/redis-check-rdb";
const CLI: &str = "/usr/bin/redis-cli";
/// How long it may take until three members serve.
const READY: Duration = Duration::from_secs(120);
/// How long a client waits for an answer of redis or a sentinel before it looks for the master anew.
const ANSWER: Duration = Duration::from_millis(500);
/// How long a replica has to say that it has a write, in milliseconds.
const WAIT: u64 = 400;
/// How often it is written.
const PACE: Duration = Duration::from_millis(10);
const BEFORE: Duration = Duration::from_secs(3);
const AFTER: Duration = Duration::from_secs(3);

/// Carries the scenario out and reports.
pub async fn run(lab: &Lab, scenario: &Scenario<'_>, say: Say<'_>) -> anyhow::Result<Report> {
    for (program, package) in [(SERVER, "redis-tools"), (CLI, "redis-tools"), ("/bin/busybox", "busybox-static")] {
        ensure!(Path::new(program).exists(), "{program} is not there: install it with apt-get install {package}");
    }
    well(lab).await.context("before the drill")?;
    let workers = roles::workers(lab);
    ensure!(workers.len() >= 3, "lab {} has {} agents: this drill needs three", lab.name(), workers.len());
    let target = Target::from_kubeconfig(&lab.kubeconfig())?;
    let targets: Vec<Target> = lab.servers().iter().map(|s| target.at(&s.address().to_string(), 6443)).collect();
    let host = Arc::new(Site::new(None)?);
    let patient = Way { name: "outside".into(), site: host, targets: targets.clone(), patience: PATIENT };
    say("preparing redis");
    let programs = [format!("{SERVER}:/usr/bin/redis-server"), format!("{CLI}:{CLI}")];
    let words = ["--busybox", "--program", &programs[0], "--program", &programs[1]];
    image::put(lab, &lab.machines(), IMAGE, &words).await?;
    lab.settle_disk().await?;
    traffic::prepare(&patient).await?;
    let mut client = Client::new(targets.clone(), PATIENT);
    let sentinels = deploy(&mut client).await?;

    // Redis is spoken to where its pods are reached: on a machine that stays.
    let server = lab.servers().into_iter().next().context("the lab has no server")?;
    let site = Arc::new(Site::new(Some(server.network()))?);
    let each = addresses(&mut client, "sentinel", 26_379).await?;
    let seen = site.spawn(async move { settled(&each).await }).await??;
    let (machine, name) = machine_of(&mut client, &workers, seen).await?;
    say(&format!("{name} is the master, on {}", machine.name()));
    let (recorder, busy) = (Recorder::default(), CancellationToken::new());
    let writing = site.spawn(write(recorder.clone(), sentinels, busy.clone()));
    tokio::time::sleep(BEFORE).await;
    let mut stage = Stage::new(lab, targets, recorder.clone(), say);
    stage.choose(machine);
    let done = stage.steps(scenario.steps).await;
    let undone = recorder.now();
    tokio::time::sleep(AFTER).await;
    busy.cancel();
    let acknowledged = writing.await.context("the client panicked")?;
    stage.undo().await;
    done?;
    let end = recorder.now();
    let back = members(&mut client).await;
    let each = addresses(&mut client, "sentinel", 26_379).await?;
    let last = site.spawn(async move { settled(&each).await }).await?;
    let lost = match &last {
        Ok(master) => {
            let master = *master;
            site.spawn(async move { missing(master, &acknowledged).await }).await??
        }
        Err(error) => (vec![format!("nobody is left to ask: {error:#}")], acknowledged.len()),
    };
    let returned = back.and(last.map(drop));
    tokio::task::spawn_blocking(move || drop(site)).await?;
    traffic::clear(&patient).await?;

    let history = std::mem::take(&mut *recorder.history());
    let fault = stage.marks.first().map_or(end, |(at, _)| *at);
    let fresh = history.requests.iter().filter(|r| r.error.is_none()).map(|r| r.end).max().unwrap_or_default();
    let mut verdicts = vec![
        Verdict { name: "no write that a replica had was lost", violations: lost.0, looked_at: lost.1 },
        Verdict {
            name: "the dead member is a replica again",
            violations: returned.err().map(|e| format!("{e:#}")).into_iter().collect(),
            looked_at: 1,
        },
        Verdict {
            name: "it is written in the end",
            violations: if fresh >= undone { vec![] } else { vec![format!("not since {:.3} s", fresh.as_secs_f64())] },
            looked_at: 1,
        },
    ];
    verdicts.push(looked(&verdicts));
    let times = Times { fault, end, marks: stage.marks };
    let mut report = Report::new(scenario.name, &history, &times, &verdicts, &[]);
    report.windows.clear();
    let mut done: Vec<Duration> = history.requests.iter().filter(|r| r.error.is_none()).map(|r| r.end).collect();
    done.sort_unstable();
    let stopped = done.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();
    let target = scenario.targets.iter().find(|(name, _)| *name == STOPPED).map(|(_, limit)| *limit);
    report.window(STOPPED, stopped, target);
    Ok(report)
}

/// The figure of this drill: the longest time between two writes that a replica had.
pub(super) const STOPPED: &str = "writes stop";

/// Applies the example and waits for its pods. Where its sentinels are.
async fn deploy(client: &mut Client) -> anyhow::Result<SocketAddr> {
    let mut sentinels = None;
    for document in serde_yaml_ng::Deserializer::from_str(EXAMPLE) {
        let object = Value::deserialize(document).context("examples/redis.yaml")?;
        let kind = object["kind"].as_str().unwrap_or_default();
        let (api, plural) = match kind {
            "ConfigMap" => ("/api/v1", "configmaps"),
            "Service" => ("/api/v1", "services"),
            "StatefulSet" => ("/apis/apps/v1", "statefulsets"),
            "PodDisruptionBudget" => ("/apis/policy/v1", "poddisruptionbudgets"),
            _ => bail!("examples/redis.yaml has a {kind}, which this drill does not know"),
        };
        let made = client.create(&format!("{api}/namespaces/{NAMESPACE}/{plural}"), &object).await?;
        if made["metadata"]["name"] == "sentinels" {
            let address = made["spec"]["clusterIP"].as_str().unwrap_or_default();
            sentinels = Some(SocketAddr::new(address.parse().context("clusterIP")?, 26_379));
        }
    }
    members(client).await?;
    sentinels.context("examples/redis.yaml has no Service `sentinels`")
}

/// Waits until all pods of redis and its sentinels are ready.
async fn members(client: &mut Client) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY;
    for name in ["redis", "sentinel"] {
        loop {
            let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/statefulsets/{name}");
            let set: Value = serde_json::from_slice(&client.insist(&path).await?)?;
            let ready = set["status"]["readyReplicas"].as_u64().unwrap_or(0);
            if ready >= 3 {
                break;
            }
            ensure!(Instant::now() < deadline, "{ready} of 3 pods of {name} are ready after {} s", READY.as_secs());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(())
}

/// Where each pod of an app is reached.
async fn addresses(client: &mut Client, app: &str, port: u16) -> anyhow::Result<Vec<SocketAddr>> {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods?labelSelector=app%3D{app}");
    let list: Value = serde_json::from_slice(&client.insist(&path).await?)?;
    let ips = list["items"].as_array().into_iter().flatten().filter_map(|pod| pod["status"]["podIP"].as_str());
    ips.map(|ip| Ok(SocketAddr::new(ip.parse().with_context(|| format!("the pod's address {ip}"))?, port))).collect()
}

/// The machine of the pod with this address, and the pod's name.
async fn machine_of(
    client: &mut Client,
    machines: &[Machine],
    address: SocketAddr,
) -> anyhow::Result<(Machine, String)> {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods?labelSelector=app%3Dredis");
    let list: Value = serde_json::from_slice(&client.insist(&path).await?)?;
    let ip = address.ip().to_string();
    let pod = list["items"].as_array().into_iter().flatten().find(|pod| pod["status"]["podIP"] == ip.as_str());
    let pod = pod.with_context(|| format!("no pod has the master's address {ip}"))?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (name, node) = (text(&pod["metadata"]["name"]), text(&pod["spec"]["nodeName"]));
    let machine = machines.iter().find(|m| m.name() == node);
    Ok((machine.with_context(|| format!("{name} runs on {node}, which is no agent"))?.clone(), name))
}

async fn connect(to: SocketAddr) -> redis::RedisResult<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new().set_connection_timeout(Some(ANSWER)).set_response_timeout(Some(ANSWER));
    redis::Client::open(format!("redis://{to}/"))?.get_multiplexed_async_connection_with_config(&config).await
}

/// Whom the sentinels call the master.
async fn master(sentinels: SocketAddr) -> anyhow::Result<SocketAddr> {
    let mut sentinel = connect(sentinels).await.context("connect to a sentinel")?;
    let said: Option<(String, u16)> =
        cmd("SENTINEL").arg("get-master-addr-by-name").arg("main").query_async(&mut sentinel).await?;
    let (ip, port) = said.context("the sentinel knows no master")?;
    Ok(SocketAddr::new(ip.parse().with_context(|| format!("the master's address {ip}"))?, port))
}

/// Waits until there is a master with two replicas, of which all sentinels know, and says where. A sentinel asks for them
/// every ten seconds; one that knows of none makes none the master.
async fn settled(sentinels: &[SocketAddr]) -> anyhow::Result<SocketAddr> {
    let deadline = Instant::now() + READY;
    loop {
        match whole(sentinels).await {
            Ok(master) => return Ok(master),
            Err(error) if Instant::now() > deadline => return Err(error.context("redis did not settle")),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// The master, if everything that should be there is.
async fn whole(sentinels: &[SocketAddr]) -> anyhow::Result<SocketAddr> {
    ensure!(sentinels.len() >= 3, "there are {} sentinels", sentinels.len());
    let mut masters = BTreeSet::new();
    for sentinel in sentinels {
        let mut connection = connect(*sentinel).await.with_context(|| format!("connect to the sentinel {sentinel}"))?;
        let said: HashMap<String, String> =
            cmd("SENTINEL").arg("MASTER").arg("main").query_async(&mut connection).await?;
        let number = |name: &str| said.get(name).and_then(|n| n.parse::<u32>().ok()).unwrap_or(0);
        let (others, replicas) = (number("num-other-sentinels"), number("num-slaves"));
        ensure!(others >= 2 && replicas >= 2, "{sentinel} knows {others} other sentinels and {replicas} replicas");
        masters.insert(master(*sentinel).await?);
    }
    let master = *masters.first().context("no sentinel knows a master")?;
    ensure!(masters.len() == 1, "the sentinels name {masters:?}");
    let said: String = cmd("INFO").arg("replication").query_async(&mut connect(master).await?).await?;
    let online = said.lines().filter(|l| l.starts_with("slave") && l.contains("state=online")).count();
    ensure!(said.contains("role:master") && online >= 2, "{master} has {online} replicas");
    Ok(master)
}

fn key(number: u64) -> String {
    format!("drill:{number}")
}

/// Writes numbers until `busy` is cancelled, and looks for the master anew whenever one does not answer as it should.
/// Those that a replica had, as the master said.
async fn write(recorder: Recorder, sentinels: SocketAddr, busy: CancellationToken) -> BTreeSet<u64> {
    let name: Arc<str> = "redis by its sentinels".into();
    let (mut acknowledged, mut connection, mut number) = (BTreeSet::new(), None, 0);
    while !busy.is_cancelled() {
        number += 1;
        let start = recorder.now();
        let written = async {
            let mut current = match connection.take() {
                Some(current) => current,
                None => connect(master(sentinels).await?).await.context("connect to the master")?,
            };
            let () = cmd("SET").arg(key(number)).arg(number).query_async(&mut current).await.context("SET")?;
            let replicas: u64 = cmd("WAIT").arg(1).arg(WAIT).query_async(&mut current).await.context("WAIT")?;
            ensure!(replicas >= 1, "no replica has it after {WAIT} ms");
            anyhow::Ok(current)
        };
        let error = match written.await {
            Ok(current) => {
                acknowledged.insert(number);
                connection = Some(current);
                None
            }
            Err(error) => Some(format!("{error:#}")),
        };
        recorder.request(&name, Class::Write, start, error);
        tokio::time::sleep(PACE).await;
    }
    acknowledged
}

/// Which of the acknowledged writes are not there, and how many were looked for.
async fn missing(master: SocketAddr, acknowledged: &BTreeSet<u64>) -> anyhow::Result<(Vec<String>, usize)> {
    let mut connection = connect(master).await?;
    let mut lost = Vec::new();
    for number in acknowledged {
        let found: Option<u64> = cmd("GET").arg(key(*number)).query_async(&mut connection).await?;
        if found != Some(*number) {
            lost.push(format!("{} is {found:?} on {master}", key(*number)));
        }
    }
    Ok((lost, acknowledged.len()))
}
