//! Clients that read, write and watch while a fault is made, and write down what they saw.
//!
//! A client runs on the host or in the network of a machine ([`site`]); its requests have a limit, and it goes on
//! whatever happens, as real clients do. What it must not do is judge: that is for [`crate::check`].

mod client;
mod leader;
pub mod observer;
mod probe;
mod reader;
pub mod service;
mod site;
mod watcher;
mod workload;
mod writer;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use http::Method;
use serde_json::Value;
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

pub use self::{client::Client, site::Site};
use crate::{
    connection::Target,
    history::{At, Class, History, Led, Request, Seen},
};

/// The namespace of everything that a drill makes.
pub const NAMESPACE: &str = "seawall-drill";
/// How long a client waits between two requests.
const PACE: Duration = Duration::from_millis(20);
/// How long a client by a node's balancer waits for an answer: long enough to see what the balancer does not mend.
pub const PATIENT: Duration = Duration::from_secs(10);
/// How long one from outside waits before it asks the next server.
pub const IMPATIENT: Duration = Duration::from_secs(1);

/// What clients write down what they saw in.
#[derive(Clone)]
pub struct Recorder {
    epoch: Instant,
    history: Arc<Mutex<History>>,
}

impl Default for Recorder {
    fn default() -> Recorder {
        Recorder { epoch: Instant::now(), history: Arc::default() }
    }
}

impl Recorder {
    /// How long since the recording began.
    pub fn now(&self) -> At {
        self.epoch.elapsed()
    }

    /// The history so far.
    pub fn history(&self) -> MutexGuard<'_, History> {
        // Entries are whole whenever the lock is free.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down what became of a request, now.
    pub fn request(&self, client: &Arc<str>, class: Class, start: At, error: Option<String>) {
        let end = self.now();
        self.history().requests.push(Request { client: client.clone(), class, start, end, error });
    }
}

/// Who asks, and by which way.
#[derive(Clone)]
pub struct Way {
    /// Its name in reports.
    pub name: Arc<str>,
    /// Where its sockets are.
    pub site: Arc<Site>,
    /// The servers that it asks, one after the other.
    pub targets: Vec<Target>,
    /// How long it waits for an answer.
    pub patience: Duration,
}

impl Way {
    fn client(&self) -> Client {
        Client::new(self.targets.clone(), self.patience)
    }
}

/// Clients at work.
pub struct Traffic {
    recorder: Recorder,
    /// Those that change something.
    busy: CancellationToken,
    /// Those that only look.
    watching: CancellationToken,
    writers: Vec<JoinHandle<()>>,
    watchers: Vec<JoinHandle<()>>,
    leaders: Vec<leader::Candidate>,
}

/// Places to ask from, by name.
pub type Sites = Vec<(Arc<str>, Arc<Site>)>;

/// What [`Traffic::start`] needs.
pub struct Plan {
    /// The ways by which the API is asked; each gets a writer, readers and a watcher.
    pub ways: Vec<Way>,
    /// Each server alone: candidates of an election are there.
    pub servers: Vec<(String, Target)>,
    /// Where the workload is asked from, and at which address it serves.
    pub workload: (Sites, std::net::SocketAddr),
}

impl Traffic {
    /// Starts all clients. The namespace must be there.
    pub async fn start(recorder: Recorder, plan: &Plan) -> anyhow::Result<Traffic> {
        let (busy, watching) = (CancellationToken::new(), CancellationToken::new());
        let mut traffic =
            Traffic { recorder: recorder.clone(), busy, watching, writers: vec![], watchers: vec![], leaders: vec![] };
        let mut keys = Vec::new();
        for (number, way) in plan.ways.iter().enumerate() {
            let key: Arc<str> = format!("w-{number}").into();
            writer::create(way, &recorder, &key).await.with_context(|| format!("{}: create {key}", way.name))?;
            keys.push(key);
        }
        // Watchers begin where everything is there that will be written.
        for way in &plan.ways {
            let watch = watcher::begin(way, &recorder).await.with_context(|| format!("{}: list", way.name))?;
            let task = watcher::run(way.clone(), recorder.clone(), watch, traffic.watching.clone());
            traffic.watchers.push(way.site.spawn(task));
        }
        let first = plan.ways.first().context("no way to the API was given")?;
        let leases = leader::watch_leases(first.clone(), recorder.clone(), traffic.watching.clone());
        traffic.watchers.push(first.site.spawn(leases));
        for (way, key) in plan.ways.iter().zip(&keys) {
            traffic.writers.push(way.site.spawn(writer::run(
                way.clone(),
                recorder.clone(),
                key.clone(),
                traffic.busy.clone(),
            )));
            let prefix: Arc<str> = format!("c{key}").into();
            let creating = writer::creator(way.clone(), recorder.clone(), prefix, traffic.busy.clone());
            traffic.writers.push(way.site.spawn(creating));
            for kind in [reader::Kind::Kept, reader::Kind::Anew, reader::Kind::Cached] {
                let task = reader::run(way.clone(), recorder.clone(), keys.clone(), kind, traffic.busy.clone());
                traffic.writers.push(way.site.spawn(task));
            }
        }
        let (sites, address) = &plan.workload;
        for (name, site) in sites {
            let task = workload::run(name.clone(), recorder.clone(), *address, traffic.busy.clone());
            traffic.writers.push(site.spawn(task));
        }
        traffic.writers.extend(probe::start(first, &recorder, &traffic.busy));
        for (name, target) in &plan.servers {
            traffic.leaders.push(leader::Candidate::start(name, target, &traffic.busy)?);
        }
        Ok(traffic)
    }

    /// Ends all clients: first those that write, then, when they have seen everything, those that watch. What is there in
    /// the end is read by `way`, whose sockets are the host's.
    pub async fn stop(self, way: &Way) -> anyhow::Result<()> {
        const CATCH_UP: Duration = Duration::from_secs(20);
        self.busy.cancel();
        for task in self.writers {
            task.await.context("a client panicked")?;
        }
        for leader in self.leaders {
            leader.ended().await;
        }
        last(way, &self.recorder).await.context("read what is there in the end")?;
        let last = self.recorder.history().last_revision;
        let deadline = Instant::now() + CATCH_UP;
        while self.recorder.history().watches.iter().any(|w| w.until < last) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.watching.cancel();
        for task in self.watchers {
            task.await.context("a watcher panicked")?;
        }
        Ok(())
    }
}

/// The path of the values.
fn maps() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/configmaps")
}

/// Those of the writers.
const WRITTEN: &str = "labelSelector=drill%3Dwritten";
/// Those of the leaders.
const LED: &str = "labelSelector=drill%3Dled";

/// Writes down what is there. For a way whose sockets are the host's.
async fn last(way: &Way, recorder: &Recorder) -> anyhow::Result<()> {
    let mut client = way.client();
    let body = client.insist(&format!("{}?{WRITTEN}", maps())).await?;
    let list: Value = serde_json::from_slice(&body)?;
    let led = client.insist(&format!("{}?{LED}", maps())).await?;
    let led: Value = serde_json::from_slice(&led)?;
    let mut history = recorder.history();
    for item in list["items"].as_array().into_iter().flatten() {
        if let (Some(name), Some(seen)) = (item["metadata"]["name"].as_str(), seen(item)) {
            history.last_revision = history.last_revision.max(seen.revision);
            history.last.insert(name.into(), seen);
        }
    }
    // The term is the revision at which the Lease was created; a watch has seen it.
    for item in led["items"].as_array().into_iter().flatten() {
        let data = &item["data"];
        let created = history.leases.iter().filter(|l| data["uid"] == *l.uid).map(|l| l.revision).min();
        if let (Some(leader), Some(term), Some(revision)) = (data["leader"].as_str(), created, revision(item)) {
            history.led.push(Led { leader: leader.into(), term, revision });
        }
    }
    Ok(())
}

fn revision(object: &Value) -> Option<u64> {
    object["metadata"]["resourceVersion"].as_str()?.parse().ok()
}

/// The value in an object of a writer.
fn seen(object: &Value) -> Option<Seen> {
    Some(Seen { value: object["data"]["value"].as_str()?.parse().ok()?, revision: revision(object)? })
}

/// Makes the namespace; one that an earlier drill left goes first. For a way whose sockets are the host's.
pub async fn prepare(way: &Way) -> anyhow::Result<()> {
    let mut client = way.client();
    let body = Bytes::from(format!(
        r#"{{"apiVersion":"v1","kind":"Namespace","metadata":{{"name":"{NAMESPACE}","labels":{{"seawall.dev/drill":"true"}}}}}}"#
    ));
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let (status, answer) = client.send(Method::POST, "/api/v1/namespaces", body.clone()).await?;
        if status.is_success() {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < deadline, "create the namespace {NAMESPACE}: {}", client::message(&answer));
        // What an earlier drill left goes first.
        let path = format!("/api/v1/namespaces/{NAMESPACE}");
        let _ = client.send(Method::DELETE, &path, Bytes::new()).await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Takes the namespace away. For a way whose sockets are the host's.
pub async fn clear(way: &Way) -> anyhow::Result<()> {
    let path = format!("/api/v1/namespaces/{NAMESPACE}");
    way.client().send(Method::DELETE, &path, Bytes::new()).await?;
    Ok(())
}
