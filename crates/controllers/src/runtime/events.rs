//! Events (`core/v1`): what a controller did, for `kubectl describe`. Repetitions are counted, not stored again.

use std::{collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, Client, Resource,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::is_not_found;

/// Waiting events; more are dropped, since nobody may wait for an event to be written.
const WAITING: usize = 1024;
/// Remembered events, to count repetitions (client-go remembers 4096).
const REMEMBERED: usize = 4096;
/// An event that happens again after this long is a new one (client-go: 10 minutes).
const REPETITION: Duration = Duration::from_secs(600);

/// Whether an event tells of something wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// All is well.
    Normal,
    /// Somebody should look.
    Warning,
}

#[derive(Debug)]
struct Note {
    about: ObjectReference,
    severity: Severity,
    reason: String,
    message: String,
    source: String,
    at: Timestamp,
}

/// Writes events in the background.
#[derive(Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Note>,
    source: Arc<str>,
}

impl Recorder {
    /// A recorder that speaks as `source`, and the task that writes what it records.
    pub fn new(client: Client, source: &str, shutdown: CancellationToken) -> (Recorder, impl Future<Output = ()>) {
        let (queue, notes) = mpsc::channel(WAITING);
        (Recorder { queue, source: source.into() }, write_all(client, notes, shutdown))
    }

    /// The same recorder, speaking as `source`.
    pub fn as_source(&self, source: &str) -> Recorder {
        Recorder { queue: self.queue.clone(), source: source.into() }
    }

    /// Records what happened to `object`.
    pub fn record<K>(&self, object: &K, severity: Severity, reason: &str, message: impl Into<String>)
    where
        K: Resource<DynamicType = ()>,
    {
        let meta = object.meta();
        self.record_about(
            ObjectReference {
                api_version: Some(K::api_version(&()).into_owned()),
                kind: Some(K::kind(&()).into_owned()),
                namespace: meta.namespace.clone(),
                name: meta.name.clone(),
                uid: meta.uid.clone(),
                resource_version: meta.resource_version.clone(),
                field_path: None,
            },
            severity,
            reason,
            message,
        );
    }

    /// Records what happened to what `about` refers to.
    pub fn record_about(&self, about: ObjectReference, severity: Severity, reason: &str, message: impl Into<String>) {
        let note = Note {
            about,
            severity,
            reason: reason.to_owned(),
            message: message.into(),
            source: self.source.to_string(),
            at: Timestamp::now(),
        };
        if let Err(error) = self.queue.try_send(note) {
            tracing::debug!(%error, "an event was dropped");
        }
    }
}

/// What makes two events the same.
type Identity = (Option<String>, Option<String>, Severity, String, String, String);

struct Remembered {
    namespace: String,
    name: String,
    count: i32,
    last: Timestamp,
}

async fn write_all(client: Client, mut notes: mpsc::Receiver<Note>, shutdown: CancellationToken) {
    let mut remembered: HashMap<Identity, Remembered> = HashMap::new();
    while let Some(Some(note)) = shutdown.run_until_cancelled(notes.recv()).await {
        let id = (
            note.about.uid.clone(),
            note.about.name.clone(),
            note.severity,
            note.reason.clone(),
            note.message.clone(),
            note.source.clone(),
        );
        if remembered.len() >= REMEMBERED {
            remembered.retain(|_, event| !is_old(event.last, note.at));
            if remembered.len() >= REMEMBERED {
                remembered.clear();
            }
        }
        // Events are worth one attempt; a server that is away is told of more important things when it is back.
        if let Err(error) = write(&client, note, id, &mut remembered).await {
            tracing::debug!(%error, "an event could not be written");
        }
    }
}

fn is_old(last: Timestamp, now: Timestamp) -> bool {
    now.duration_since(last) > jiff::SignedDuration::try_from(REPETITION).unwrap_or_default()
}

async fn write(
    client: &Client,
    note: Note,
    id: Identity,
    remembered: &mut HashMap<Identity, Remembered>,
) -> kube::Result<()> {
    if let Some(event) = remembered.get_mut(&id)
        && !is_old(event.last, note.at)
    {
        let api: Api<Event> = Api::namespaced(client.clone(), &event.namespace);
        event.count += 1;
        event.last = note.at;
        let patch = json!({"count": event.count, "lastTimestamp": Time(note.at)});
        match api.patch(&event.name, &PatchParams::default(), &Patch::Merge(patch)).await {
            // It has expired: begin again.
            Err(error) if is_not_found(&error) => {}
            other => return other.map(drop),
        }
    }
    // Events about what has no namespace live in `default`, as upstream.
    let namespace = note.about.namespace.clone().unwrap_or_else(|| "default".into());
    let name = format!("{}.{:016x}", note.about.name.as_deref().unwrap_or("unknown"), note.at.as_nanosecond() as u64);
    let event = Event {
        metadata: ObjectMeta { name: Some(name.clone()), namespace: Some(namespace.clone()), ..Default::default() },
        involved_object: note.about,
        type_: Some(match note.severity {
            Severity::Normal => "Normal".into(),
            Severity::Warning => "Warning".into(),
        }),
        reason: Some(note.reason),
        message: Some(note.message.chars().take(1024).collect()),
        source: Some(EventSource { component: Some(note.source.clone()), host: None }),
        reporting_component: Some(note.source),
        first_timestamp: Some(Time(note.at)),
        last_timestamp: Some(Time(note.at)),
        count: Some(1),
        ..Default::default()
    };
    Api::<Event>::namespaced(client.clone(), &namespace).create(&PostParams::default(), &event).await?;
    remembered.insert(id, Remembered { namespace, name, count: 1, last: note.at });
    Ok(())
}
