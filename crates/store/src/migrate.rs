//! From a server that stands alone to etcd, without a revision that goes backwards.
//!
//! Every object is copied with a write of its own, so that each has its own revision again. Etcd counts from 1, so an offset
//! is kept in etcd that all of its clients add: the newest revision that the source ever gave. What clients hold from before
//! is older than anything that etcd has, and they are told so as after any compaction; whatever they then read is
//! newer than what they had.
//!
//! While it lasts, a marker in etcd keeps servers from using what is half there. Its creation is the fence of every
//! write, so a migration that is repeated stops the one before it. It goes away in the same transaction that sets the offset.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use tokio::time::Instant;

use crate::{
    Entry, Error, Expect, Fence, ListOptions, Revision, Store,
    etcd::{Etcd, MIGRATION_KEY, OFFSET_KEY},
};

/// What is copied.
const PREFIX: &str = "/registry/";
/// How many writes are under way at once; etcd groups their syncs.
const WRITES: usize = 64;

/// What a migration did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// How many keys were copied and compared.
    pub keys: usize,
    /// How many bytes their values have.
    pub bytes: u64,
    /// The newest revision of the source, which is now etcd's offset.
    pub source: Revision,
    /// The newest revision after the migration.
    pub newest: Revision,
    /// How long it took.
    pub took: Duration,
}

/// Why a migration did not happen.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// There is something in etcd already.
    #[error(
        "this etcd is not empty: it has the key {key}; migrate into a new one, or remove what is there (`etcdctl del --prefix {prefix}`)"
    )]
    NotEmpty {
        /// One of the keys.
        key: Arc<str>,
        /// Where they are.
        prefix: &'static str,
    },
    /// The source was written to.
    #[error(
        "the source went from revision {before} to {after} while it was copied; stop the server that uses it, and repeat the migration"
    )]
    SourceChanged {
        /// At the start.
        before: Revision,
        /// At the end.
        after: Revision,
    },
    /// Another migration has begun meanwhile.
    #[error("another migration into this etcd has taken over; let it finish")]
    TakenOver,
    /// What is in etcd is not what was copied.
    #[error("{key} is not in etcd as it was copied; something else writes to it; stop that, and repeat the migration")]
    Differs {
        /// The first key that differs.
        key: Arc<str>,
    },
    /// The source could not be read.
    #[error("the source cannot be read")]
    Source(#[source] Error),
    /// A key could not be written.
    #[error(
        "{key} ({bytes} bytes) cannot be written to etcd; when that is mended, repeat the migration: it starts over"
    )]
    Write {
        /// Which one.
        key: Arc<str>,
        /// The size of its value.
        bytes: usize,
        /// What etcd said.
        #[source]
        source: Error,
    },
    /// Something else could not be done in etcd.
    #[error("the migration stopped, etcd could not be used; repeat it: it starts over")]
    Target(#[from] Error),
}

/// Copies everything under `/registry/` to an etcd that has nothing there. Nothing may write to the source meanwhile.
///
/// # Errors
/// Then no server can use what is in etcd, and the migration can be repeated (connect with `migrating`): it starts over.
pub async fn migrate(from: &dyn Store, to: &Etcd) -> Result<Report, MigrateError> {
    let begun = Instant::now();
    let source = from.revision().await.map_err(MigrateError::Source)?;
    let entries = from.list(PREFIX, ListOptions::default()).await.map_err(MigrateError::Source)?.entries;
    let fence = begin(to, source).await?;

    stream::iter(&entries).map(|entry| copy(to, entry, &fence)).buffer_unordered(WRITES).try_collect::<()>().await?;

    let bytes = verify(&entries, to).await?;
    let after = from.revision().await.map_err(MigrateError::Source)?;
    if after != source {
        return Err(MigrateError::SourceChanged { before: source, after });
    }
    let newest = to.finish_migration(source, &fence).await.map_err(of_fence)?;
    // The history is that of the copying, which concerns nobody.
    if let Err(error) = to.compact(newest).await {
        tracing::warn!(%error, "the history of the migration stays until the next compaction");
    }
    Ok(Report { keys: entries.len(), bytes, source, newest, took: begun.elapsed() })
}

/// Sets the marker, and removes what an interrupted migration has left.
async fn begin(to: &Etcd, source: Revision) -> Result<Fence, MigrateError> {
    let first = |prefix| to.list(prefix, ListOptions { limit: 1, ..ListOptions::default() });
    let (marker, _) = to.get(MIGRATION_KEY).await?;
    match &marker {
        None => {
            for prefix in [PREFIX, OFFSET_KEY] {
                if let Some(entry) = first(prefix).await?.entries.first() {
                    return Err(MigrateError::NotEmpty { key: entry.key.clone(), prefix });
                }
            }
        }
        // Made anew below, so that whoever set it can no longer write.
        Some(marker) => match to.delete(MIGRATION_KEY, Expect::At(marker.revision), None).await {
            Err(Error::Conflict { .. }) => return Err(MigrateError::TakenOver),
            other => drop(other?),
        },
    }
    let text = Bytes::from(format!("copying from revision {source}"));
    let created = match to.put(MIGRATION_KEY, text, Expect::Absent, None).await {
        Err(Error::Conflict { .. }) => return Err(MigrateError::TakenOver),
        other => other?,
    };
    let fence = Fence { key: MIGRATION_KEY.into(), created };
    loop {
        let left = to.list(PREFIX, ListOptions { limit: 1000, ..ListOptions::default() }).await?;
        if left.entries.is_empty() {
            return Ok(fence);
        }
        if marker.is_none() {
            return Err(MigrateError::NotEmpty { key: left.entries[0].key.clone(), prefix: PREFIX });
        }
        stream::iter(&left.entries)
            .map(|entry| to.delete(&entry.key, Expect::Any, Some(&fence)))
            .buffer_unordered(WRITES)
            .map_ok(|_| ())
            .try_collect::<()>()
            .await
            .map_err(of_fence)?;
    }
}

async fn copy(to: &Etcd, entry: &Entry, fence: &Fence) -> Result<(), MigrateError> {
    match to.put(&entry.key, entry.value.clone(), Expect::Absent, Some(fence)).await {
        Ok(_) => Ok(()),
        Err(Error::Fenced { .. }) => Err(MigrateError::TakenOver),
        Err(source) => Err(MigrateError::Write { key: entry.key.clone(), bytes: entry.value.len(), source }),
    }
}

fn of_fence(error: Error) -> MigrateError {
    match error {
        Error::Fenced { .. } => MigrateError::TakenOver,
        error => MigrateError::Target(error),
    }
}

/// Compares everything, byte by byte. Returns how many bytes there are.
async fn verify(entries: &[Entry], to: &Etcd) -> Result<u64, MigrateError> {
    let copied = to.list(PREFIX, ListOptions::default()).await?.entries;
    let mut bytes = 0;
    for index in 0..entries.len().max(copied.len()) {
        match (entries.get(index), copied.get(index)) {
            (Some(old), Some(new)) if old.key == new.key && old.value == new.value => bytes += old.value.len() as u64,
            (Some(entry), _) | (None, Some(entry)) => return Err(MigrateError::Differs { key: entry.key.clone() }),
            (None, None) => {}
        }
    }
    Ok(bytes)
}
