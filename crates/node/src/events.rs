//! Events: written in the background, repeats counted instead of written anew, and bounded: a full queue or a noisy
//! object loses events, never memory.

use std::{borrow::Cow, collections::HashMap};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, Node, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Why, in a word.
pub type Reason = Cow<'static, str>;

/// Whether an event is a complaint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Just so you know.
    Normal,
    /// Something is wrong.
    Warning,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Kind::Normal => "Normal",
            Kind::Warning => "Warning",
        }
    }
}

#[derive(Clone, Debug)]
struct Note {
    about: ObjectReference,
    kind: Kind,
    reason: Reason,
    message: String,
    at: Timestamp,
}

/// Where events go. Cheap to clone.
#[derive(Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Note>,
}

impl Recorder {
    /// A recorder, and the task that writes for it.
    pub fn new(client: Client, node: String) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, notes) = mpsc::channel(1000);
        (Self { queue }, write(client, node, notes))
    }

    /// An event about a pod.
    pub fn pod(&self, pod: &Pod, kind: Kind, reason: impl Into<Reason>, message: impl Into<String>) {
        self.send(pod_reference(pod, None), kind, reason.into(), message.into());
    }

    /// An event about a container of a pod.
    pub fn container(&self, pod: &Pod, name: &str, kind: Kind, reason: impl Into<Reason>, message: impl Into<String>) {
        self.send(pod_reference(pod, Some(name)), kind, reason.into(), message.into());
    }

    /// An event about a node.
    pub fn node(&self, node: &Node, kind: Kind, reason: impl Into<Reason>, message: impl Into<String>) {
        let name = node.metadata.name.clone();
        let about = ObjectReference {
            kind: Some("Node".into()),
            api_version: Some("v1".into()),
            uid: node.metadata.uid.clone(),
            name,
            ..Default::default()
        };
        self.send(about, kind, reason.into(), message.into());
    }

    fn send(&self, about: ObjectReference, kind: Kind, reason: Reason, mut message: String) {
        if message.len() > 1024 {
            let cut = (0..=1020).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
            message.truncate(cut);
            message.push_str("...");
        }
        // A full queue means that the API has been away for long: what happened then is in the log.
        if let Err(lost) = self.queue.try_send(Note { about, kind, reason, message, at: Timestamp::now() }) {
            tracing::debug!("an event was dropped: {lost}");
        }
    }
}

fn pod_reference(pod: &Pod, container: Option<&str>) -> ObjectReference {
    let list = container.and_then(|name| {
        let spec = pod.spec.as_ref()?;
        let init = spec.init_containers.iter().flatten().any(|c| c.name == name);
        let ephemeral = spec.ephemeral_containers.iter().flatten().any(|c| c.name == name);
        Some(if init {
            "initContainers"
        } else if ephemeral {
            "ephemeralContainers"
        } else {
            "containers"
        })
    });
    ObjectReference {
        kind: Some("Pod".into()),
        api_version: Some("v1".into()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path: container.zip(list).map(|(name, list)| format!("spec.{list}{{{name}}}")),
    }
}

/// What was written: counted up by repeats.
struct Written {
    name: String,
    count: i32,
    last: Timestamp,
}

/// An object may write this many events at once, and then one in [`REFILL`] (upstream's spam filter).
const BURST: f64 = 25.0;
const REFILL_SECONDS: f64 = 300.0;
const REMEMBERED: usize = 4096;

#[derive(Default)]
struct Correlator {
    written: HashMap<(String, String, Reason, String), Written>,
    budget: HashMap<String, (f64, Timestamp)>,
}

enum Verdict {
    Drop,
    Create,
    Count(String, i32),
}

impl Correlator {
    fn judge(&mut self, note: &Note) -> Verdict {
        let uid = note.about.uid.clone().unwrap_or_default();
        let (tokens, since) = self.budget.get(&uid).copied().unwrap_or((BURST, note.at));
        let tokens = (tokens + note.at.duration_since(since).as_secs_f64().max(0.0) / REFILL_SECONDS).min(BURST);
        if tokens < 1.0 {
            return Verdict::Drop;
        }
        self.budget.insert(uid, (tokens - 1.0, note.at));
        match self.written.get_mut(&Self::key(note)) {
            // Events live for an hour in the API; a count on one that has gone would be lost.
            Some(w) if note.at.duration_since(w.last).as_secs() < 3000 => {
                w.count += 1;
                w.last = note.at;
                Verdict::Count(w.name.clone(), w.count)
            }
            _ => Verdict::Create,
        }
    }

    fn key(note: &Note) -> (String, String, Reason, String) {
        let about = &note.about;
        (
            about.uid.clone().unwrap_or_default(),
            about.field_path.clone().unwrap_or_default(),
            note.reason.clone(),
            note.message.clone(),
        )
    }

    fn created(&mut self, note: &Note, name: String) {
        if self.written.len() >= REMEMBERED {
            let mut times: Vec<Timestamp> = self.written.values().map(|w| w.last).collect();
            times.sort_unstable();
            let median = times[times.len() / 2];
            self.written.retain(|_, w| w.last > median);
            let uids: std::collections::HashSet<String> = self.written.keys().map(|k| k.0.clone()).collect();
            self.budget.retain(|uid, _| uids.contains(uid));
        }
        self.written.insert(Self::key(note), Written { name, count: 1, last: note.at });
    }
}

async fn write(client: Client, node: String, mut notes: mpsc::Receiver<Note>) {
    let mut correlator = Correlator::default();
    while let Some(note) = notes.recv().await {
        let namespace = note.about.namespace.clone().unwrap_or_else(|| "default".into());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        if let Verdict::Count(name, count) = match correlator.judge(&note) {
            Verdict::Drop => continue,
            other => other,
        } {
            let patch = serde_json::json!({"count": count, "lastTimestamp": Time(note.at)});
            match api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                Ok(_) => continue,
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => {
                    tracing::debug!("cannot count an event: {error}");
                    continue;
                }
            }
        }
        let name = format!("{}.{:x}", note.about.name.as_deref().unwrap_or_default(), note.at.as_nanosecond());
        let event = Event {
            metadata: ObjectMeta { name: Some(name.clone()), namespace: Some(namespace), ..Default::default() },
            involved_object: note.about.clone(),
            reason: Some(note.reason.to_string()),
            message: Some(note.message.clone()),
            type_: Some(note.kind.as_str().to_owned()),
            first_timestamp: Some(Time(note.at)),
            last_timestamp: Some(Time(note.at)),
            count: Some(1),
            source: Some(EventSource { component: Some("kubelet".into()), host: Some(node.clone()) }),
            reporting_component: Some("kubelet".into()),
            reporting_instance: Some(node.clone()),
            ..Default::default()
        };
        match api.create(&PostParams::default(), &event).await {
            Ok(_) => correlator.created(&note, name),
            Err(error) => tracing::debug!(reason = %note.reason, "cannot write an event: {error}"),
        }
    }
}

/// Runs the writer until shutdown.
pub async fn run(writer: impl Future<Output = ()> + Send, shutdown: CancellationToken) {
    shutdown.run_until_cancelled(writer).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_counted_and_noise_is_dropped() {
        let mut c = Correlator::default();
        let note = |s: i64, message: &str| Note {
            about: ObjectReference { uid: Some("u".into()), ..Default::default() },
            kind: Kind::Normal,
            reason: "R".into(),
            message: message.into(),
            at: Timestamp::from_second(s).unwrap(),
        };
        assert!(matches!(c.judge(&note(0, "a")), Verdict::Create));
        c.created(&note(0, "a"), "n".into());
        assert!(matches!(c.judge(&note(1, "a")), Verdict::Count(n, 2) if n == "n"));
        for _ in 0..23 {
            assert!(!matches!(c.judge(&note(2, "b")), Verdict::Drop));
        }
        assert!(matches!(c.judge(&note(2, "b")), Verdict::Drop));
        assert!(!matches!(c.judge(&note(400, "b")), Verdict::Drop));
    }
}
