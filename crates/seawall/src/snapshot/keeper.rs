//! The snapshots of a running server: by the clock, or as it is asked. What it has is said in the ConfigMap
//! `kube-system/seawall-snapshots`, a key for each server.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use http::{Method, StatusCode};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use seawall_controllers::cron_job::Calendar;
use seawall_server::paths::{Ask, Refusal};
use seawall_store::{
    Store,
    snapshot::{About, save},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::directory::{self, Directory, Kept, Restored};
use crate::VERSION;

/// Where a server is asked about its snapshots.
pub const PATH: &str = "/seawall/v1/snapshots";
/// Where all servers say what they have.
pub const NAMESPACE: &str = "kube-system";
/// The name of the ConfigMap.
pub const CONFIG_MAP: &str = "seawall-snapshots";
/// What names begin with that the clock has made.
pub const SCHEDULED: &str = "seawall-snapshot";
/// What names begin with that somebody has asked for.
pub const ON_DEMAND: &str = "on-demand";

/// How often the clock and the directory are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// How long after a failure it is tried again, if the schedule does not come round before.
const AGAIN: SignedDuration = SignedDuration::from_mins(5);
/// How many rounds of a schedule are looked at to find its longest pause.
const ROUNDS: usize = 16;
/// How many snapshots are named in the ConfigMap at most.
const NAMED: usize = 100;

/// Options of a server.
#[derive(clap::Args, Clone)]
pub struct SnapshotOptions {
    /// Take no snapshots by the clock.
    #[arg(long)]
    disable_snapshots: bool,
    /// When a snapshot of all objects is taken, as a CronJob's schedule.
    #[arg(long, value_name = "CRON", default_value = "0 */12 * * *")]
    snapshot_schedule_cron: String,
    /// How many of those that the clock has made are kept; 0 keeps all.
    #[arg(long, value_name = "NUMBER", default_value_t = 5)]
    snapshot_retention: u32,
    /// Where they are kept [default: snapshots in the data directory].
    #[arg(long, value_name = "DIRECTORY")]
    snapshot_dir: Option<PathBuf>,
}

impl SnapshotOptions {
    /// What was said.
    ///
    /// # Errors
    /// If the schedule is none.
    pub fn resolve(&self, default_dir: PathBuf) -> anyhow::Result<Settings> {
        let text = &self.snapshot_schedule_cron;
        let calendar = Calendar::read(text, TimeZone::system()).map_err(|why| {
            anyhow::anyhow!("--snapshot-schedule-cron {text:?}: {why}; write for example \"0 */12 * * *\"")
        })?;
        Ok(Settings {
            directory: Directory::new(self.snapshot_dir.clone().unwrap_or(default_dir)),
            schedule: (!self.disable_snapshots).then(|| (text.clone(), calendar)),
            retention: self.snapshot_retention,
        })
    }
}

/// Where and when.
#[derive(Clone, Debug)]
pub struct Settings {
    directory: Directory,
    schedule: Option<(String, Calendar)>,
    retention: u32,
}

/// What a server says of its snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Where they are on its disk.
    pub directory: PathBuf,
    /// When the clock makes one; nothing if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// The longest time between two of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub period_seconds: Option<i64>,
    /// The newest first.
    #[serde(default)]
    pub snapshots: Vec<Kept>,
    /// What was last restored here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<Restored>,
    /// Why the last one was not made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// When.
    pub time: Timestamp,
    /// What.
    pub message: String,
}

/// What is counted, and shown without a look at the disk.
#[derive(Default)]
struct State {
    failures: u64,
    error: Option<Failure>,
    /// What of the directory cannot be read.
    unread: Option<Failure>,
    took: Duration,
    /// As they were last seen.
    kept: Vec<Kept>,
    published: Option<String>,
}

/// Looks after the snapshots of a server.
pub struct Keeper {
    store: Arc<dyn Store>,
    settings: Settings,
    server: String,
    /// The uid of the cluster, once it is known.
    cluster: Box<dyn Fn() -> Option<String> + Send + Sync>,
    clock: Box<dyn Fn() -> Timestamp + Send + Sync>,
    client: OnceLock<Client>,
    /// One at a time.
    working: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

impl Keeper {
    /// Of this store, whose values are copied as they are.
    pub fn new(
        store: Arc<dyn Store>,
        settings: Settings,
        server: &str,
        cluster: impl Fn() -> Option<String> + Send + Sync + 'static,
        clock: impl Fn() -> Timestamp + Send + Sync + 'static,
    ) -> Keeper {
        Keeper {
            store,
            settings,
            server: server.to_owned(),
            cluster: Box::new(cluster),
            clock: Box::new(clock),
            client: OnceLock::new(),
            working: tokio::sync::Mutex::default(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes snapshots by the clock, and says what there is, until `stop`.
    ///
    /// # Errors
    /// Never: what goes wrong is said, and tried again.
    pub async fn run(self: Arc<Self>, client: Client, stop: CancellationToken) -> anyhow::Result<()> {
        // The same one after a restart of this component.
        let _ = self.client.set(client);
        {
            let _working = self.working.lock().await;
            self.settings.directory.sweep();
        }
        let calendar = self.settings.schedule.as_ref().map(|(_, calendar)| calendar);
        let newest = self.settings.directory.list().unwrap_or_default();
        let mut due = calendar.and_then(|calendar| first(calendar, newest.first(), (self.clock)()));
        loop {
            if let Err(error) = self.publish().await {
                tracing::debug!("what there is of snapshots was not said: {error:#}");
            }
            let left = due.map(|due| due.duration_since((self.clock)()));
            let pause = left.map_or(LOOK, |left| Duration::try_from(left).unwrap_or_default().min(LOOK));
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return Ok(());
            }
            let now = (self.clock)();
            if let (Some(calendar), Some(_)) = (calendar, due.filter(|due| *due <= now)) {
                let Some(done) = stop.run_until_cancelled(self.scheduled()).await else { return Ok(()) };
                let next = calendar.next((self.clock)());
                let again = now.checked_add(AGAIN).ok();
                due = match done {
                    true => next,
                    false => next.into_iter().chain(again).min(),
                };
            }
        }
    }

    async fn scheduled(&self) -> bool {
        match self.save(SCHEDULED).await {
            Ok(kept) => {
                tracing::info!(name = kept.name, revision = kept.revision, size = kept.size, "a snapshot was taken");
                let pruned = self.settings.directory.prune(SCHEDULED, &self.server, self.settings.retention);
                match pruned {
                    Ok(names) if names.is_empty() => {}
                    Ok(names) => tracing::info!(?names, "snapshots that are no longer kept were deleted"),
                    Err(error) => self.failed("old snapshots were not deleted", &error),
                }
                true
            }
            Err(_) => false,
        }
    }

    fn failed(&self, what: &str, error: &anyhow::Error) {
        tracing::error!("{what}: {error:#}");
        let failure = Failure { time: (self.clock)(), message: format!("{what}: {error:#}") };
        let mut state = self.state();
        state.failures += 1;
        state.error = Some(failure);
    }

    /// Takes a snapshot, and reads it back.
    ///
    /// # Errors
    /// If it is not there afterwards, or cannot be read. It has been said in the log.
    pub async fn save(&self, prefix: &str) -> anyhow::Result<Kept> {
        let result = async {
            let _working = self.working.lock().await;
            let begun = Instant::now();
            let kept = self.save_locked(prefix).await?;
            self.state().took = begun.elapsed();
            Ok(kept)
        };
        let result: anyhow::Result<Kept> = result.await;
        match &result {
            Ok(_) => self.state().error = None,
            Err(error) => self.failed("no snapshot was taken", error),
        }
        result
    }

    async fn save_locked(&self, prefix: &str) -> anyhow::Result<Kept> {
        let directory = &self.settings.directory;
        directory.make()?;
        let now = (self.clock)();
        let base = format!("{prefix}-{}-{}", self.server, now.as_second());
        let again = (2..).map(|number| format!("{base}-{number}"));
        let name = std::iter::once(base.clone()).chain(again).find(|name| !directory.file(name).exists());
        let name = name.context("there is no name left")?;
        directory::check_name(&name)?;
        let about = About { cluster: (self.cluster)(), time: now.as_second(), writer: VERSION.to_owned() };
        save(&*self.store, &directory.file(&name), &about).await?;
        self.verify_locked(&name).await?;
        directory.one(&name)
    }

    async fn verify_locked(&self, name: &str) -> anyhow::Result<()> {
        let (file, scratch) = (self.settings.directory.file(name), self.settings.directory.scratch());
        let info = tokio::task::spawn_blocking(move || directory::verify(&file, &scratch)).await??;
        self.settings.directory.note_verified(name, &info, (self.clock)())
    }

    /// What there is.
    pub fn report(&self) -> Report {
        let now = (self.clock)();
        let (list, restored) = (self.settings.directory.list(), self.settings.directory.restored());
        let unread = list.as_ref().err().or(restored.as_ref().err()).map(|error| format!("{error:#}"));
        let mut snapshots = list.unwrap_or_default();
        let error = {
            let mut state = self.state();
            state.kept.clone_from(&snapshots);
            // Said once, with the time since when it is so.
            if state.unread.as_ref().map(|failure| &failure.message) != unread.as_ref() {
                state.unread = unread.map(|message| Failure { time: now, message });
            }
            state.error.clone().or_else(|| state.unread.clone())
        };
        snapshots.truncate(NAMED);
        let schedule = self.settings.schedule.as_ref();
        Report {
            directory: self.settings.directory.path().to_owned(),
            schedule: schedule.map(|(text, _)| text.clone()),
            period_seconds: schedule.and_then(|(_, calendar)| period(calendar, now)).map(|period| period.as_secs()),
            snapshots,
            restored: restored.unwrap_or_default(),
            error,
        }
    }

    /// Says it in the ConfigMap, if it is something else than before.
    async fn publish(&self) -> anyhow::Result<()> {
        let Some(client) = self.client.get() else { return Ok(()) };
        let text = serde_json::to_string(&self.report())?;
        if self.state().published.as_ref() == Some(&text) {
            return Ok(());
        }
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": CONFIG_MAP, "namespace": NAMESPACE},
            "data": {&self.server: &text},
        });
        // A manager for each server, so that each keeps its own key.
        let how = PatchParams::apply(&format!("seawall-snapshots-{}", self.server)).force();
        let maps = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE);
        maps.patch(CONFIG_MAP, &how, &Patch::Apply(&object)).await?;
        self.state().published = Some(text);
        Ok(())
    }

    /// Answers the administrator.
    ///
    /// # Errors
    /// What went wrong, for who asked.
    pub async fn answer(&self, ask: &Ask) -> Result<Value, Refusal> {
        let name = ask.path.strip_prefix(PATH).unwrap_or_default().trim_start_matches('/');
        let body: Value = match ask.body.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&ask.body)
                .map_err(|error| bad(&anyhow::anyhow!("the request cannot be read: {error}")))?,
        };
        let prefix = body["name"].as_str().unwrap_or(ON_DEMAND);
        let answer = match (&ask.method, name) {
            (&Method::GET, "") => Ok(json!({})),
            (&Method::POST, "") => {
                directory::check_name(prefix).map_err(|error| bad(&error))?;
                self.save(prefix).await.map(|kept| json!({"snapshot": kept})).map_err(|error| internal(&error))
            }
            (&Method::POST, "prune") => {
                let keep = match &body["retention"] {
                    Value::Null => self.settings.retention,
                    value => serde_json::from_value(value.clone())
                        .map_err(|error| bad(&anyhow::anyhow!("retention {value}: {error}; say how many to keep")))?,
                };
                let _working = self.working.lock().await;
                let pruned = self.settings.directory.prune(prefix, &self.server, keep);
                pruned.map(|names| json!({"deleted": names})).map_err(|error| internal(&error))
            }
            (&Method::DELETE, name) if !name.is_empty() => {
                self.settings
                    .directory
                    .one(name)
                    .map_err(|error| Refusal(StatusCode::NOT_FOUND, "NotFound", format!("{error:#}")))?;
                let _working = self.working.lock().await;
                let deleted = self.settings.directory.delete(name);
                deleted.map(|kept| json!({"snapshot": kept})).map_err(|error| internal(&error))
            }
            _ => Err(Refusal(StatusCode::NOT_FOUND, "NotFound", format!("there is nothing at {}", ask.path))),
        };
        if let Err(error) = self.publish().await {
            tracing::warn!("what there is of snapshots was not said: {error:#}");
        }
        let mut answer = answer?;
        answer["report"] = serde_json::to_value(self.report()).map_err(|error| internal(&error.into()))?;
        Ok(answer)
    }

    /// What is counted, as Prometheus reads it.
    pub fn render(&self) -> String {
        let state = self.state();
        let good = || state.kept.iter().filter(|kept| kept.fault.is_none());
        let newest = good().next();
        let verified = good().filter_map(|kept| kept.verified).max();
        let seconds = |time: Option<Timestamp>| time.map_or(0, |time| time.as_second());
        let one = |name: &str, kind: &str, help: &str, value: &dyn std::fmt::Display| {
            format!(
                "# HELP seawall_snapshot{name} {help}\n# TYPE seawall_snapshot{name} {kind}\nseawall_snapshot{name} {value}\n"
            )
        };
        let gauge = "gauge";
        [
            one("s", gauge, "Snapshots that this server has.", &good().count()),
            one("_failures_total", "counter", "Snapshots that were to be taken, and were not.", &state.failures),
            one(
                "_last_timestamp_seconds",
                gauge,
                "When the newest was written.",
                &seconds(newest.map(|kept| kept.time)),
            ),
            one("_last_verified_timestamp_seconds", gauge, "When one was last read back whole.", &seconds(verified)),
            one("_last_size_bytes", gauge, "How large the newest is.", &newest.map_or(0, |kept| kept.size)),
            one("_last_duration_seconds", gauge, "How long the last one took.", &state.took.as_secs_f64()),
        ]
        .concat()
    }
}

fn bad(error: &anyhow::Error) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, "BadRequest", format!("{error:#}"))
}

/// Who may ask is the administrator, who is to know what went wrong.
fn internal(error: &anyhow::Error) -> Refusal {
    Refusal(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", format!("{error:#}"))
}

/// When the first one is due: at once if the schedule came round while nobody was there, since the newest that there is.
fn first(calendar: &Calendar, newest: Option<&Kept>, now: Timestamp) -> Option<Timestamp> {
    let missed = newest.and_then(|newest| calendar.next(newest.time)).filter(|missed| *missed <= now);
    missed.map(|_| now).or_else(|| calendar.next(now))
}

/// The longest time between two rounds of a schedule, of those that come next.
fn period(calendar: &Calendar, now: Timestamp) -> Option<SignedDuration> {
    let times: Vec<Timestamp> =
        std::iter::successors(calendar.next(now), |at| calendar.next(*at)).take(ROUNDS).collect();
    times.windows(2).map(|pair| pair[1].duration_since(pair[0])).max()
}
