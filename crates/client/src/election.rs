//! Leading: the shell around [`seawall_quorum::election`].

use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use http::{HeaderName, HeaderValue};
use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{
    Api, Client,
    api::{DeleteParams, GetParams, PostParams, Preconditions},
};
use seawall_quorum::{
    election::{Effect, Elector, Event, Record, Term},
    timing::Timing,
};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

/// The header that carries a leader's term; the server's `TERM_HEADER`.
const TERM_HEADER: HeaderName = HeaderName::from_static("seawall-term");
/// How long a Lease lasts, in milliseconds; the field of the API has whole seconds.
const DURATION: &str = "seawall.dev/lease-duration";
/// Where the Leases of components are, as upstream's.
const NAMESPACE: &str = "kube-system";
/// How long a deposed leader's work has to end by itself before it is aborted. Its writes are refused all the same.
const WIND_DOWN: Duration = Duration::from_millis(500);

/// What is led, and by whom.
#[derive(Clone)]
pub struct Election {
    /// The name of the Lease, e.g. `kube-scheduler`.
    pub lease: String,
    /// This candidate, and no other process or earlier life of it.
    pub identity: String,
    /// The times.
    pub timing: Timing,
    /// Whether the machine of a candidate is dead, by the word of its neighbours.
    pub gone: Option<Gone>,
}

/// Says of an identity whether its machine is dead.
pub type Gone = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// Takes part in an election until `stop`, and does `run` whenever and as long as this candidate leads. `run` gets a
/// client whose writes are refused once the term is over.
///
/// # Errors
/// If `run` ended or failed while leading. The Lease is let go of then, so that another candidate can do better.
pub async fn lead<F, Fut>(client: Client, election: Election, stop: CancellationToken, run: F) -> anyhow::Result<()>
where
    F: Fn(Client, CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let start = Instant::now();
    let lease =
        LeaseOf { api: Api::namespaced(client.clone(), NAMESPACE), election: election.clone(), held: Arc::default() };
    let mut elector = Elector::new(election.identity.clone(), election.timing);
    let mut tick = tokio::time::interval(elector.poll());
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut under_way: Option<BoxFuture<'static, Event>> = None;
    let mut work: Option<Work> = None;
    let mut outcome: anyhow::Result<()> = Ok(());
    let mut resigning = false;
    loop {
        let event = tokio::select! {
            // What is under way comes first: its answer is older news than a tick.
            biased;
            event = async { match &mut under_way { Some(f) => f.await, None => std::future::pending().await } } => {
                under_way = None;
                event
            }
            ended = async { match &mut work { Some(w) => (&mut w.task).await, None => std::future::pending().await } } => {
                work = None;
                outcome = Err(match ended {
                    Ok(Ok(())) => anyhow::anyhow!("ended by itself"),
                    Ok(Err(error)) => error,
                    Err(error) => anyhow::anyhow!("{error}"),
                });
                resigning = true;
                continue;
            }
            () = stop.cancelled(), if !resigning => {
                resigning = true;
                continue;
            }
            _ = tick.tick() => match under_way.is_none() {
                // A renewal that is under way is waited for, but not longer than the Lease lasts.
                true if resigning => Event::Resign,
                true => lease.seen().await,
                false => Event::Tick,
            },
        };
        let resigned = event == Event::Resign;
        let gone = match (&event, &election.gone) {
            (Event::Seen(Some(record)), Some(gone)) if gone(&record.holder) => Some(Event::Gone(record.holder.clone())),
            _ => None,
        };
        let now = start.elapsed();
        let mut effects = elector.step(now, event);
        if let Some(gone) = gone.filter(|_| effects.is_empty()) {
            effects = elector.step(now, gone);
        }
        for effect in effects {
            match effect {
                Effect::Lead(term) => {
                    tracing::info!(lease = election.lease, %term, "leads");
                    let name = &election.lease;
                    let value = HeaderValue::try_from(format!("{NAMESPACE}/{name}/{term}"))?;
                    let token = CancellationToken::new();
                    let future = run(crate::with_header(client.clone(), TERM_HEADER, value), token.clone());
                    work = Some(Work { term, token, task: tokio::spawn(future) });
                }
                Effect::Follow => {
                    if let Some(work) = work.take() {
                        tracing::warn!(lease = election.lease, term = %work.term, "leads no more");
                        work.end();
                    }
                }
                effect => {
                    let patience = elector.patience(&effect);
                    under_way = Some(lease.perform(effect, patience));
                }
            }
        }
        if resigned {
            if let Some(release) = under_way.take() {
                release.await;
            }
            return outcome;
        }
    }
}

/// What is done while leading.
struct Work {
    term: Term,
    token: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Work {
    /// Asks it to end, and sees to it that it does.
    fn end(self) {
        self.token.cancel();
        tokio::spawn(async move {
            let mut task = self.task;
            if tokio::time::timeout(WIND_DOWN, &mut task).await.is_err() {
                task.abort();
            }
        });
    }
}

#[derive(Clone)]
struct LeaseOf {
    api: Api<Lease>,
    election: Election,
    /// Since when we hold it, and how often the holder had changed then.
    held: Arc<Mutex<(Option<MicroTime>, u32)>>,
}

impl LeaseOf {
    /// The Lease as the server that is asked has it at hand.
    async fn seen(&self) -> Event {
        match self.api.get_with(&self.election.lease, &GetParams::any()).await {
            Ok(lease) => record(&lease).map_or(Event::Tick, |r| Event::Seen(Some(r))),
            Err(error) if code(&error) == Some(404) => Event::Seen(None),
            Err(_) => Event::Tick,
        }
    }

    fn perform(&self, effect: Effect, patience: Duration) -> BoxFuture<'static, Event> {
        let this = self.clone();
        let work = async move {
            let done = this.try_perform(effect).await;
            match done {
                Ok(event) => event,
                // Not as it was thought to be, or someone else was faster.
                Err(error) if matches!(code(&error), Some(404 | 409 | 412)) => Event::Refused,
                Err(error) => {
                    tracing::debug!(%error, lease = this.election.lease, "the election waits");
                    Event::Failed
                }
            }
        };
        async move { tokio::time::timeout(patience, work).await.unwrap_or(Event::Failed) }.boxed()
    }

    async fn try_perform(&self, effect: Effect) -> kube::Result<Event> {
        let name = &self.election.lease;
        match effect {
            Effect::Read => match self.api.get(name).await {
                Ok(lease) => Ok(record(&lease).map_or(Event::Failed, |r| Event::Read(Some(r)))),
                Err(error) if code(&error) == Some(404) => Ok(Event::Read(None)),
                Err(error) => Err(error),
            },
            Effect::Create { transitions, duration } => {
                let lease = self.lease(&self.election.identity, None, transitions, duration);
                let created = self.api.create(&PostParams::default(), &lease).await?;
                let acquired = lease.spec.and_then(|spec| spec.acquire_time);
                *self.held.lock().unwrap_or_else(PoisonError::into_inner) = (acquired, transitions);
                Ok(record(&created).map_or(Event::Failed, |r| Event::Created { version: r.version }))
            }
            Effect::Renew { version, duration } => {
                let written = self.write(version, &self.election.identity, duration).await?;
                Ok(written.map_or(Event::Failed, |version| Event::Renewed { version }))
            }
            Effect::Release { version } => {
                self.write(version, "", Duration::ZERO).await?;
                Ok(Event::Tick)
            }
            Effect::Delete { version } => {
                let at = Preconditions { resource_version: Some(version.to_string()), uid: None };
                let params = DeleteParams { preconditions: Some(at), ..DeleteParams::default() };
                self.api.delete(name, &params).await?;
                Ok(Event::Deleted)
            }
            Effect::Lead(_) | Effect::Follow => Ok(Event::Tick),
        }
    }

    /// Writes the Lease anew: what does not change while we lead is known since we created it.
    async fn write(&self, version: u64, holder: &str, duration: Duration) -> kube::Result<Option<u64>> {
        let (acquired, transitions) = self.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut lease = self.lease(holder, Some(version), transitions, duration);
        if let Some(spec) = &mut lease.spec
            && acquired.is_some()
        {
            spec.acquire_time = acquired;
        }
        let written = self.api.replace(&self.election.lease, &PostParams::default(), &lease).await?;
        Ok(record(&written).map(|r| r.version))
    }

    fn lease(&self, holder: &str, version: Option<u64>, transitions: u32, duration: Duration) -> Lease {
        let now = MicroTime(Timestamp::now());
        let exactly = [(DURATION.to_owned(), duration.as_millis().to_string())].into();
        // Whole seconds, at least one: what others than us believe.
        let duration = duration.as_secs_f64().ceil().max(1.0);
        Lease {
            metadata: ObjectMeta {
                name: Some(self.election.lease.clone()),
                namespace: Some(NAMESPACE.into()),
                resource_version: version.map(|v| v.to_string()),
                annotations: Some(exactly),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.to_owned()),
                lease_duration_seconds: Some(duration as i32),
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                lease_transitions: Some(transitions.cast_signed()),
                ..LeaseSpec::default()
            }),
        }
    }
}

fn record(lease: &Lease) -> Option<Record> {
    let spec = lease.spec.as_ref();
    Some(Record {
        holder: spec.and_then(|s| s.holder_identity.clone()).unwrap_or_default(),
        version: lease.metadata.resource_version.as_ref()?.parse().ok()?,
        transitions: spec.and_then(|s| s.lease_transitions).unwrap_or(0).max(0).cast_unsigned(),
        duration: lease
            .metadata
            .annotations
            .as_ref()
            .and_then(|a| a.get(DURATION)?.parse().ok().map(Duration::from_millis))
            .or_else(|| spec.and_then(|s| s.lease_duration_seconds?.try_into().ok().map(Duration::from_secs)))
            .unwrap_or_default(),
    })
}

fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}
