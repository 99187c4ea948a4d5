//! What clients did and saw during a drill, as they saw it: the input of every check.
//!
//! Times are monotonic and of one clock: how long since the recording began. An operation took effect, if at all, at
//! some instant between its start and its end; one whose fate is unknown may take effect at any time after its start.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::Serialize;

/// How long since the recording began.
pub type At = Duration;

/// A revision of the store, as resourceVersions tell it.
pub type Revision = u64;

/// Everything that was recorded.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Every request of every client.
    pub requests: Vec<Request>,
    /// Writes of numbered values.
    pub writes: Vec<Write>,
    /// Reads of them.
    pub reads: Vec<Read>,
    /// Watches of them.
    pub watches: Vec<Watch>,
    /// What was written by those who led.
    pub led: Vec<Led>,
    /// Leases, as a watch saw them.
    pub leases: Vec<LeaseSeen>,
    /// What controllers and the scheduler were given to do.
    pub probes: Vec<Probe>,
    /// Nodes, as a watch saw them.
    pub nodes: Vec<NodeSeen>,
    /// Pods of the drill, as a watch saw them.
    pub pods: Vec<PodSeen>,
    /// When each life of the stateful pod wrote, from the recording's clock.
    pub lives: Vec<Life>,
    /// What is there in the end.
    pub last: BTreeMap<Arc<str>, Seen>,
    /// The revision at which `last` was read.
    pub last_revision: Revision,
}

/// What a client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// A read that must not be stale.
    Read,
    /// A read that may be stale, which needs no quorum.
    Cached,
    /// A write.
    Write,
    /// A service of the workload.
    Workload,
    /// A new connection to a Service.
    Connect,
    /// A line, there and back, on a connection that stays open.
    Open,
    /// A datagram, there and back.
    Datagram,
}

impl Class {
    /// All of them.
    pub const ALL: [Class; 7] =
        [Class::Read, Class::Cached, Class::Write, Class::Workload, Class::Connect, Class::Open, Class::Datagram];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Class::Read => "read",
            Class::Cached => "cached",
            Class::Write => "write",
            Class::Workload => "workload",
            Class::Connect => "new connection",
            Class::Open => "open connection",
            Class::Datagram => "datagram",
        }
    }
}

/// A request and what became of it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Who asked, e.g. `a1 by its balancer`.
    pub client: Arc<str>,
    /// For what.
    pub class: Class,
    /// When it was sent.
    pub start: At,
    /// When it was answered, or given up.
    pub end: At,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// A write of a value to a key. A key has one writer, which numbers its values from 1 and writes them in order, each on
/// the condition that nobody wrote since.
#[derive(Clone, Debug)]
pub struct Write {
    /// The key.
    pub key: Arc<str>,
    /// The value.
    pub value: u64,
    /// When it was sent.
    pub start: At,
    /// When it was answered, or given up.
    pub end: At,
    /// What became of it.
    pub fate: Fate,
}

/// What became of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was acknowledged with this revision.
    Acknowledged(Revision),
    /// It was refused: it has not happened and never will.
    Refused(String),
    /// Nobody knows: the answer did not arrive, or says so.
    Unknown(String),
}

/// A value, and the revision at which it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// The value.
    pub value: u64,
    /// The revision.
    pub revision: Revision,
}

/// An answered read.
#[derive(Clone, Debug)]
pub struct Read {
    /// Who read.
    pub client: Arc<str>,
    /// The key.
    pub key: Arc<str>,
    /// When it was sent.
    pub start: At,
    /// When it was answered.
    pub end: At,
    /// What it saw; nothing if the key was not there.
    pub seen: Option<Seen>,
    /// Whether it was asked for the newest state, rather than for any.
    pub consistent: bool,
}

/// What one watcher saw, however often its connection broke.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// Who watched.
    pub client: Arc<str>,
    /// The revision of the list that it began from.
    pub from: Revision,
    /// The events, in the order in which they arrived.
    pub events: Vec<WatchEvent>,
    /// Everything up to this revision was reported, as far as the watcher was told.
    pub until: Revision,
    /// When and why it had to list again, after which what lay between is unknown to it.
    pub began_again: Vec<(At, String)>,
}

/// An event of a watch.
#[derive(Clone, Debug, PartialEq)]
pub struct WatchEvent {
    /// When it arrived.
    pub at: At,
    /// The key.
    pub key: Arc<str>,
    /// What was written; nothing if the key was deleted.
    pub value: Option<u64>,
    /// The revision of the change.
    pub revision: Revision,
}

/// Work for a component that acts on one server only.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Whose work it is, e.g. `controllers`.
    pub who: &'static str,
    /// When it was given.
    pub start: At,
    /// When it was seen to be done.
    pub end: At,
}

/// A write that was made as leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Led {
    /// Who led.
    pub leader: Arc<str>,
    /// In which term.
    pub term: u64,
    /// The revision of the write.
    pub revision: Revision,
}

/// A Lease, as a watch saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseSeen {
    /// When it was seen.
    pub at: At,
    /// Its name.
    pub lease: Arc<str>,
    /// Who holds it; empty when it was let go of.
    pub holder: Arc<str>,
    /// Which Lease of this name: a new leader deletes the old one and creates another.
    pub uid: Arc<str>,
    /// The revision of this state.
    pub revision: Revision,
}

/// A node, as a watch saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSeen {
    /// When it was seen.
    pub at: At,
    /// Its name.
    pub node: Arc<str>,
    /// Whether its Ready condition was True.
    pub ready: bool,
    /// Whether it was Unknown: what others say of it. Of itself a node says False, for example while it boots.
    pub accused: bool,
}

/// A pod of the drill, as a watch saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSeen {
    /// When it was seen.
    pub at: At,
    /// What it is of: its label `app`.
    pub app: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Which pod of that name.
    pub uid: Arc<str>,
    /// Where it runs; empty before that is decided.
    pub node: Arc<str>,
    /// Whether it was Ready and not being deleted.
    pub ready: bool,
    /// Whether this was its end.
    pub gone: bool,
}

/// A life of a stateful pod, as it wrote of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    /// The pod's name.
    pub name: Arc<str>,
    /// Which pod of that name.
    pub uid: Arc<str>,
    /// Its first sign of life.
    pub first: At,
    /// Its last one.
    pub last: At,
}
