//! Keys, bytes and revisions.
//!
//! A [`Store`] maps keys to bytes and numbers every change with a [`Revision`] that the whole store shares. Its
//! semantics are etcd's (<https://etcd.io/docs/v3.5/learning/api_guarantees/>), reduced to what Kubernetes needs, so
//! that the embedded engine and etcd can stand in for one another. What a backend must keep is written down as code
//! in [`contract`].

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

pub mod contract;
pub mod embedded;
pub mod etcd;
pub mod migrate;
pub mod sealed;
pub mod snapshot;

/// The number of a change. Every write of the store gets its own, larger than all before; a crash never takes one back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A stored value, with the revision of the write that made it and of the write that created the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key, e.g. `/registry/pods/default/web-0`.
    pub key: Arc<str>,
    /// The bytes as they were written.
    pub value: Bytes,
    /// The last write of this key (etcd's `mod_revision`).
    pub revision: Revision,
    /// The write that created this key (etcd's `create_revision`).
    pub created: Revision,
}

/// What a write expects of the key it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Anything, present or not.
    Any,
    /// The key does not exist.
    Absent,
    /// The key was last written at exactly this revision.
    At(Revision),
}

/// A leader's right to write: the key of the election still has the value creation that this leader won. A write that
/// carries a fence is refused in the same transaction when the fence no longer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The key of the lock.
    pub key: Arc<str>,
    /// The revision at which the lock was created.
    pub created: Revision,
}

/// A change, as a watch reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key was created or replaced. It was created when `entry.created == entry.revision`.
    Put(Entry),
    /// The key was deleted by the write `revision`.
    Delete {
        /// The deleted key.
        key: Arc<str>,
        /// The revision of the deletion.
        revision: Revision,
    },
}

impl Event {
    /// The revision of the write that this event reports.
    pub fn revision(&self) -> Revision {
        match self {
            Event::Put(entry) => entry.revision,
            Event::Delete { revision, .. } => *revision,
        }
    }

    /// The key that changed.
    pub fn key(&self) -> &Arc<str> {
        match self {
            Event::Put(entry) => &entry.key,
            Event::Delete { key, .. } => key,
        }
    }
}

/// One step of a watch: events in order of revision, and the revision up to which the watcher now knows everything
/// under its prefix. `events` is empty when the step only reports progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Changes under the watched prefix, oldest first, none left out.
    pub events: Vec<Event>,
    /// Every change up to and including this revision has been reported.
    pub revision: Revision,
}

/// Entries under a prefix at one instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// In order of key.
    pub entries: Vec<Entry>,
    /// The revision at which they were read. Never older than what was acknowledged before the call.
    pub revision: Revision,
    /// Whether entries after the last one were left out because of the limit.
    pub more: bool,
}

/// How to list.
#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    /// Read at this revision instead of the newest. [`Error::Compacted`] if it is no longer there.
    pub at: Option<Revision>,
    /// Return at most this many entries; 0 means all.
    pub limit: usize,
    /// Start after this key.
    pub after: Option<Arc<str>>,
}

/// Why an operation of the store did not happen (or, for [`Error::Unavailable`], may not have).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key was not as [`Expect`]ed. Nothing was written.
    #[error("key {key} was expected to be {expected:?} and is at {actual:?}")]
    Conflict {
        /// The key.
        key: Arc<str>,
        /// What the caller expected.
        expected: Expect,
        /// The key's revision, `None` if it does not exist.
        actual: Option<Revision>,
    },
    /// The history before `oldest` has been compacted away.
    #[error("revision {requested} has been compacted, the oldest kept is {oldest}")]
    Compacted {
        /// The revision asked for.
        requested: Revision,
        /// The oldest revision that can still be read or watched from.
        oldest: Revision,
    },
    /// A revision that does not exist yet.
    #[error("revision {requested} is in the future, the newest is {newest}")]
    Future {
        /// The revision asked for.
        requested: Revision,
        /// The newest revision.
        newest: Revision,
    },
    /// The term of the leader that wrote is over. Nothing was written.
    #[error("the fence on {key} does not hold: the writer's term is over")]
    Fenced {
        /// The key of the lock.
        key: Arc<str>,
    },
    /// The watcher was too slow and its backlog was dropped; it has to list and watch again.
    #[error("the watcher fell too far behind and was cut off at revision {at}")]
    Lagged {
        /// The last revision that was delivered.
        at: Revision,
    },
    /// The store cannot be reached, or failed in a way that leaves the write's fate open.
    #[error("the store is unavailable: {reason}")]
    Unavailable {
        /// What happened, for the log.
        reason: String,
        /// The cause.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
}

/// A result of a store operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The steps of a watch. It ends after an error.
pub type Watch = BoxStream<'static, Result<Progress>>;

/// A linearizable map from keys to bytes with one revision counter, history and watches.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Reads one key, linearizably: every write acknowledged before the call is seen. The revision is the store's.
    async fn get(&self, key: &str) -> Result<(Option<Entry>, Revision)>;

    /// Reads all keys that start with `prefix`, in order, at one revision.
    async fn list(&self, prefix: &str, options: ListOptions) -> Result<Listing>;

    /// Writes one key if it is as expected and the fence holds. When it returns, the write is durable.
    async fn put(&self, key: &str, value: Bytes, expect: Expect, fence: Option<&Fence>) -> Result<Revision>;

    /// Deletes one key if it is as expected and the fence holds. Deleting a key that does not exist is a
    /// [`Error::Conflict`] unless [`Expect::Any`] was given, in which case the store's revision is returned unchanged.
    async fn delete(&self, key: &str, expect: Expect, fence: Option<&Fence>) -> Result<Revision>;

    /// Watches all keys under `prefix` for changes after `after` (exclusive). Every change is delivered once, in order
    /// of revision; progress is reported at least when the watch has caught up with the revision current at its
    /// start. [`Error::Compacted`] if that history is gone.
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch>;

    /// The newest revision, linearizably: not older than any write acknowledged before the call.
    async fn revision(&self) -> Result<Revision>;

    /// Forgets history: afterwards nothing older than `at` can be read or watched. Current values stay.
    async fn compact(&self, at: Revision) -> Result<()>;
}
