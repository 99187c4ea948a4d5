//! Where the runtime says that something has happened, so that it need not be asked each second.
//!
//! The CRI has a stream of events (KEP-3386) which containerd offers from 1.7 on. containerd's own has been there since 1.0,
//! on the same socket, and tells of every task that starts or ends
//! (<https://github.com/containerd/containerd/blob/main/api/services/events/v1/events.proto>).

use std::{collections::HashMap, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use k8s_cri::v1 as cri;
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};

use crate::cri::Cri;

/// What was heard.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// Of this pod, by its uid. The CRI knows of it already.
    Pod(String),
    /// Of this container or sandbox. The part of containerd that answers the CRI hears of it at the same time as we.
    Container(String),
    /// Nothing that matters.
    Nothing,
}

/// What a runtime offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offer {
    Cri,
    Containerd,
    Nothing,
}

enum Events {
    Cri(Streaming<cri::ContainerEventResponse>),
    Containerd(Streaming<Envelope>),
}

impl Events {
    async fn next(&mut self) -> Result<Option<Heard>, Status> {
        match self {
            Events::Cri(stream) => Ok(stream.message().await?.map(Heard::from_cri)),
            Events::Containerd(stream) => Ok(stream.message().await?.map(Heard::from_containerd)),
        }
    }
}

enum State {
    Closed,
    /// Runtimes begin their answer with the first event, which may be long in coming.
    Asked(BoxFuture<'static, Result<Events, Status>>),
    Open(Box<Events>),
}

/// A stream of events.
pub struct Source {
    runtime: Cri,
    offer: Offer,
    state: State,
}

impl Source {
    /// Of this runtime. It is not open yet.
    pub fn new(runtime: Cri) -> Source {
        Source { runtime, offer: Offer::Cri, state: State::Closed }
    }

    /// Whether events come.
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Open(_))
    }

    /// Asks for events, of the kind that the runtime has, unless it was asked already.
    pub fn open(&mut self) {
        if !matches!(self.state, State::Closed) {
            return;
        }
        let runtime = self.runtime.clone();
        self.state = match self.offer {
            Offer::Cri => State::Asked(async move { runtime.events().await.map(Events::Cri) }.boxed()),
            Offer::Containerd => {
                State::Asked(async move { runtime.containerd_events(filters()).await.map(Events::Containerd) }.boxed())
            }
            Offer::Nothing => return,
        };
    }

    /// Waits for the next event; for ever if it is closed. `None` if it has just been closed: whatever was said until it is
    /// opened again is lost.
    pub async fn next(&mut self) -> Option<Heard> {
        loop {
            let ended = match &mut self.state {
                State::Closed => std::future::pending().await,
                State::Asked(answer) => match answer.await {
                    Ok(events) => {
                        tracing::info!(by = ?self.offer, "the runtime tells what happens");
                        self.state = State::Open(Box::new(events));
                        continue;
                    }
                    Err(status) => Some(status),
                },
                State::Open(events) => match events.next().await {
                    Ok(Some(heard)) => return Some(heard),
                    Ok(None) => None,
                    Err(status) => Some(status),
                },
            };
            self.state = State::Closed;
            match ended {
                Some(status) if status.code() == Code::Unimplemented => {
                    self.offer = if self.offer == Offer::Cri { Offer::Containerd } else { Offer::Nothing };
                    self.open();
                }
                Some(status) => {
                    tracing::warn!("the runtime does not tell what happens: {}", status.message());
                    return None;
                }
                None => return None,
            }
        }
    }
}

/// Tasks of the namespace in which containerd keeps what the CRI made.
fn filters() -> Vec<String> {
    ["/tasks/start", "/tasks/exit", "/tasks/delete"]
        .map(|topic| format!("namespace==\"k8s.io\",topic=={topic:?}"))
        .into()
}

impl Heard {
    fn from_cri(event: cri::ContainerEventResponse) -> Heard {
        let uid = event.pod_sandbox_status.and_then(|status| status.metadata).map(|metadata| metadata.uid);
        match uid {
            Some(uid) if !uid.is_empty() => Heard::Pod(uid),
            _ => Heard::Container(event.container_id),
        }
    }

    fn from_containerd(envelope: Envelope) -> Heard {
        let Some(task) = envelope.event.and_then(|any| Task::read(&envelope.topic, &any.value)) else {
            return Heard::Nothing;
        };
        // What ends with an id of its own is a command that was run in the container, such as a probe.
        if task.process.is_empty() || task.process == task.container {
            Heard::Container(task.container)
        } else {
            Heard::Nothing
        }
    }
}

/// `containerd.services.events.v1.SubscribeRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SubscribeRequest {
    /// Any of which lets an event through.
    #[prost(string, repeated, tag = "1")]
    pub filters: Vec<String>,
}

/// `containerd.types.Envelope`, as far as it is looked at.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Envelope {
    /// What kind of event it is.
    #[prost(string, tag = "3")]
    pub topic: String,
    /// The event.
    #[prost(message, optional, tag = "4")]
    pub event: Option<Any>,
}

/// `google.protobuf.Any`, whose type follows from the topic.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Any {
    /// The message.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// The fields that `TaskStart` and `TaskExit` share, the second of which the first does not have.
#[derive(Clone, PartialEq, prost::Message)]
struct Exit {
    #[prost(string, tag = "1")]
    container: String,
    #[prost(string, tag = "2")]
    process: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Start {
    #[prost(string, tag = "1")]
    container: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Delete {
    #[prost(string, tag = "1")]
    container: String,
    #[prost(string, tag = "5")]
    process: String,
}

/// A process of a container.
struct Task {
    container: String,
    process: String,
}

impl Task {
    fn read(topic: &str, message: &[u8]) -> Option<Task> {
        use prost::Message;
        match topic {
            "/tasks/start" => {
                Start::decode(message).ok().map(|Start { container }| Task { container, process: String::new() })
            }
            "/tasks/exit" => Exit::decode(message).ok().map(|Exit { container, process }| Task { container, process }),
            "/tasks/delete" => {
                Delete::decode(message).ok().map(|Delete { container, process }| Task { container, process })
            }
            _ => None,
        }
    }
}

/// When a pod is looked at after something was heard of it: at once, and a few times more, since the CRI may not know of it
/// yet.
const LOOKS: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(250), Duration::from_secs(1)];

/// Pods that are to be looked at, by uid; `None` is all of them.
#[derive(Default)]
pub struct Due(HashMap<Option<String>, (Instant, usize)>);

impl Due {
    /// Something was heard of it now. It is looked at `looks` times, at most as often as there are [`LOOKS`].
    pub fn heard(&mut self, of: Option<String>, now: Instant, looks: usize) {
        self.0.insert(of, (now, LOOKS.len().saturating_sub(looks)));
    }

    /// When the next one is to be looked at.
    pub fn next(&self) -> Option<Instant> {
        self.0.values().map(|(since, look)| *since + LOOKS[*look]).min()
    }

    /// Takes one for which it is time.
    pub fn take(&mut self, now: Instant) -> Option<Option<String>> {
        let of = self.0.iter().find(|(_, (since, look))| *since + LOOKS[*look] <= now)?.0.clone();
        let (_, look) = self.0.get_mut(&of)?;
        *look += 1;
        if *look == LOOKS.len() {
            self.0.remove(&of);
        }
        Some(of)
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn event(topic: &str, message: &impl Message) -> Heard {
        let event = Some(Any { value: message.encode_to_vec() });
        Heard::from_containerd(Envelope { topic: topic.into(), event })
    }

    #[test]
    fn what_containerd_says_is_of_a_container() {
        let exit = |process: &str| Exit { container: "c".into(), process: process.into() };
        assert_eq!(event("/tasks/exit", &exit("c")), Heard::Container("c".into()));
        assert_eq!(event("/tasks/exit", &exit("probe")), Heard::Nothing);
        assert_eq!(
            event("/tasks/delete", &Delete { container: "c".into(), process: String::new() }),
            Heard::Container("c".into())
        );
        assert_eq!(event("/tasks/delete", &Delete { container: "c".into(), process: "probe".into() }), Heard::Nothing);
        assert_eq!(event("/tasks/start", &Start { container: "c".into() }), Heard::Container("c".into()));
        assert_eq!(event("/tasks/paused", &Start { container: "c".into() }), Heard::Nothing);
        assert_eq!(Heard::from_containerd(Envelope { topic: "/tasks/exit".into(), event: None }), Heard::Nothing);
    }

    #[test]
    fn a_pod_is_looked_at_several_times_after_it_was_heard_of() {
        let (start, mut due) = (Instant::now(), Due::default());
        let at = |ms: u64| start + Duration::from_millis(ms);
        due.heard(Some("a".into()), start, LOOKS.len());
        assert_eq!(due.take(start), Some(Some("a".into())));
        assert_eq!((due.take(start), due.next()), (None, Some(at(50))));
        assert_eq!(due.take(at(60)), Some(Some("a".into())));
        // Heard of again: from the beginning.
        due.heard(Some("a".into()), at(100), LOOKS.len());
        due.heard(None, at(100), 1);
        assert_eq!(due.take(at(100)), Some(Some("a".into())));
        assert_eq!(due.take(at(150)), Some(Some("a".into())));
        assert_eq!(due.take(at(350)), Some(Some("a".into())));
        assert_eq!((due.take(at(350)), due.next()), (None, Some(at(1100))));
        assert!(due.take(at(1100)).is_some() && due.take(at(1100)).is_some());
        assert_eq!((due.take(at(9000)), due.next()), (None, None));
    }
}
