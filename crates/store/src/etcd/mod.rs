//! Real etcd, three or five of which keep what one machine could lose.
//!
//! Each operation is one request to one member, the local one if it is well ([`endpoint`] chooses, [`pool`] carries out). A
//! try that fails goes on with another member until the operation's budget is spent. A write whose fate is unknown is
//! looked into before it is repeated ([`write`]). Watches move from member to member without losing or repeating an
//! event ([`watch`]).
//!
//! # Revisions
//!
//! A [`Revision`] is etcd's own plus an offset, kept in the key [`OFFSET_KEY`] and 0 if that is absent. It is set by a
//! [migration](crate::migrate), so that what had large revisions elsewhere does not get smaller ones here. Everything
//! that goes in or comes out passes through [`Offset`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use rand::Rng;

use crate::{Entry, Error, Expect, Fence, ListOptions, Listing, Result, Revision, Store, Watch};

pub mod admin;
mod endpoint;
mod link;
mod pool;
mod proto;
mod watch;
mod write;

pub use link::{ConfigError, Tls};

use link::Patience;
use pool::{Limits, Pool, Trouble, unavailable};
use proto::{CompactionRequest, Compare, DeleteRangeRequest, KeyValue, Op, PutRequest, RangeRequest, TxnRequest};

/// Where the offset of revisions is kept, as a decimal number.
pub const OFFSET_KEY: &str = "/seawall/revision-offset";

/// Says that a migration into this etcd was begun and not finished.
pub const MIGRATION_KEY: &str = "/seawall/migration";

/// Keys that end with this are the backend's own and are shown to nobody: see the module `watch`.
const SENTINEL: &str = "seawall.dev/sentinel";

/// A page of a list is to have about so many bytes.
const PAGE_BYTES: usize = 8 << 20;
/// How many keys the first page of a list has; their sizes are not known yet.
const FIRST_PAGE: i64 = 500;
/// How many keys a page has at most.
const LARGEST_PAGE: i64 = 10_000;

/// A member of etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// E.g. `https://10.0.0.1:2379`.
    pub url: String,
    /// Whether it runs on this machine: then it is preferred.
    pub local: bool,
}

/// How etcd is reached.
#[derive(Clone, Debug)]
pub struct Options {
    /// The members.
    pub endpoints: Vec<Endpoint>,
    /// For `https`: mutual TLS.
    pub tls: Option<Tls>,
    /// How long one operation may take with all its tries. It has to be longer than an election.
    pub budget: Duration,
    /// How long one try may take. It has to be longer than any write takes on a healthy member.
    pub attempt: Duration,
    /// How long a member may take to say that it is alive before it is left.
    pub probe: Duration,
    /// How long an idle connection with requests on it may be silent before it is pinged, and then until it is closed. etcd closes
    /// connections that ping more often than its `--grpc-keepalive-min-time` (5 s) allows; a member of ours allows this.
    pub keepalive: Duration,
    /// Connect even though a migration into this etcd was not finished: only for finishing it.
    pub migrating: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            endpoints: Vec::new(),
            tls: None,
            budget: Duration::from_secs(3),
            attempt: Duration::from_secs(1),
            probe: Duration::from_millis(500),
            keepalive: Duration::from_secs(1),
            migrating: false,
        }
    }
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Error {
        unavailable(error.to_string())
    }
}

/// How far our revisions are ahead of etcd's.
#[derive(Debug, Default)]
struct Offset(AtomicU64);

impl Offset {
    fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Ours for etcd's.
    fn ours(&self, etcd: i64) -> Revision {
        Revision(self.get() + u64::try_from(etcd).unwrap_or(0))
    }

    /// etcd's for ours; 0 or less for what was before etcd.
    fn etcds(&self, ours: Revision) -> i64 {
        let ours = i64::try_from(ours.0).unwrap_or(i64::MAX);
        ours - i64::try_from(self.get()).unwrap_or(0)
    }

    /// A revision for a comparison that holds only for a write that etcd made then. 0 would mean "does not exist" to etcd.
    fn exactly(&self, ours: Revision) -> i64 {
        match self.etcds(ours) {
            revision if revision > 0 => revision,
            _ => -1,
        }
    }
}

/// A store in etcd.
pub struct Etcd {
    shared: Arc<Shared>,
}

fn open_pool(options: &Options) -> Result<Arc<Pool>, ConfigError> {
    let tls = options.tls.as_ref().map(Tls::config).transpose()?;
    let patience = Patience { connect: options.attempt.min(Duration::from_millis(500)), keepalive: options.keepalive };
    let limits = Limits { budget: options.budget, attempt: options.attempt, probe: options.probe, patience };
    let seed = rand::rng().random_range(0..1000);
    let pool = Pool::new(limits, endpoint::Timing::default(), tls, seed);
    pool.set_endpoints(&options.endpoints)?;
    Ok(pool)
}

/// What the store and its watches share.
struct Shared {
    pool: Arc<Pool>,
    offset: Offset,
    /// The last write of the offset; it does not change while anyone is connected.
    offset_written: AtomicU64,
    /// The newest revision (etcd's) that somebody has been told of and may wait for a watch to reach.
    wanted: tokio::sync::watch::Sender<i64>,
    writes: write::Writes,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.shared.pool.stop.cancel();
    }
}

impl Etcd {
    /// Connects, and reads the offset of revisions.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if no member answers within the budget, or if the options cannot be used.
    pub async fn connect(options: Options) -> Result<Etcd> {
        let pool = open_pool(&options)?;
        // From here on, dropping it ends the tasks that it starts.
        let etcd = Etcd {
            shared: Arc::new(Shared {
                pool,
                offset: Offset::default(),
                offset_written: AtomicU64::new(0),
                wanted: tokio::sync::watch::Sender::new(0),
                writes: write::Writes::new(),
            }),
        };
        etcd.read_offset().await?;
        if !options.migrating && etcd.shared.read(MIGRATION_KEY, false).await?.0.is_some() {
            return Err(unavailable(format!(
                "a migration into this etcd was begun and not finished ({MIGRATION_KEY} is there); repeat `seawall migrate` \
                 or `seawall snapshot restore`, which start over, before any server uses it"
            )));
        }
        Ok(etcd)
    }

    /// Replaces the members, as they come and go. Those that stay keep their connections.
    ///
    /// # Errors
    /// If one is not a URL; then nothing changes.
    pub fn set_endpoints(&self, endpoints: Vec<Endpoint>) -> Result<()> {
        Ok(self.shared.pool.set_endpoints(&endpoints)?)
    }

    /// Uses other certificates for all connections from now on.
    ///
    /// # Errors
    /// If they cannot be used; then nothing changes.
    pub fn set_tls(&self, tls: &Tls) -> Result<()> {
        self.shared.pool.set_tls(Some(tls.config()?));
        Ok(())
    }

    /// The administration of this etcd, over the same connections.
    pub fn admin(&self) -> admin::Admin {
        admin::Admin::new(self.shared.pool.clone())
    }

    /// Sets the offset of revisions and takes the marker of the migration away, at once. Returns the newest revision, with
    /// the offset.
    pub(crate) async fn finish_migration(&self, offset: Revision, fence: &Fence) -> Result<Revision> {
        let key = |key: &'static str| Bytes::from_static(key.as_bytes());
        let put = PutRequest { key: key(OFFSET_KEY), value: offset.to_string().into(), lease: 0 };
        let delete = DeleteRangeRequest { key: key(MIGRATION_KEY), range_end: Bytes::new() };
        let created = self.shared.offset.exactly(fence.created);
        let request = TxnRequest {
            compare: vec![Compare::created(key(MIGRATION_KEY), created), Compare::modified(key(OFFSET_KEY), 0)],
            success: vec![Op::Put(put).into(), Op::Delete(delete).into()],
            failure: Vec::new(),
        };
        let done = self.shared.pool.ask(request).await?.succeeded;
        // If it did not succeed, it may have, by a try whose answer was lost.
        let marker = self.shared.read(MIGRATION_KEY, true).await?.0;
        self.read_offset().await?;
        if !done && (marker.is_some() || self.shared.offset.get() != offset.0) {
            return Err(Error::Fenced { key: fence.key.clone() });
        }
        self.revision().await
    }

    async fn read_offset(&self) -> Result<()> {
        let (found, _) = self.shared.read(OFFSET_KEY, false).await?;
        let Some(found) = found else { return Ok(()) };
        let text = String::from_utf8_lossy(&found.value);
        let offset = text.trim().parse().map_err(|_| {
            unavailable(format!("the key {OFFSET_KEY} in etcd is {text:?} and not a number; restore it from a backup"))
        })?;
        self.shared.offset.0.store(offset, Ordering::Release);
        self.shared.offset_written.store(found.mod_revision.unsigned_abs(), Ordering::Release);
        Ok(())
    }

    /// The oldest revision that can still be read, in etcd's counting.
    async fn oldest(&self) -> Result<i64> {
        watch::oldest(&self.shared.pool).await
    }

    async fn compacted(&self, requested: Revision) -> Error {
        match self.oldest().await {
            Ok(oldest) => Error::Compacted { requested, oldest: self.shared.offset.ours(oldest) },
            Err(error) => error,
        }
    }

    /// What a refusal of a read at `requested` means.
    async fn refused(&self, said: String, requested: Revision) -> Error {
        if said.contains("has been compacted") {
            self.compacted(requested).await
        } else if said.contains("future revision") {
            match self.revision().await {
                Ok(newest) => Error::Future { requested, newest },
                Err(error) => error,
            }
        } else {
            refusal(said)
        }
    }

    async fn list_at(&self, prefix: &str, options: &ListOptions) -> Result<Listing> {
        let offset = &self.shared.offset;
        let mut at = match options.at {
            Some(revision) if offset.etcds(revision) <= 0 => return Err(self.compacted(revision).await),
            Some(revision) => Some(offset.etcds(revision)),
            None => None,
        };
        let mut start: Bytes = match &options.after {
            Some(after) if &**after >= prefix => after_key(after),
            _ => range_start(prefix),
        };
        let end = range_end(prefix);
        // One more than asked for tells whether there are more.
        let wanted = if options.limit == 0 { usize::MAX } else { options.limit.saturating_add(1) };
        let mut entries: Vec<Entry> = Vec::new();
        let mut page = FIRST_PAGE;
        loop {
            let limit = page.min(i64::try_from(wanted - entries.len()).unwrap_or(i64::MAX));
            let request = RangeRequest {
                key: start.clone(),
                range_end: end.clone(),
                limit,
                revision: at.unwrap_or(0),
                ..Default::default()
            };
            let answer = match self.shared.pool.ask(request).await {
                Ok(answer) => answer,
                Err(Trouble::Refused(said)) => {
                    let requested = options.at.unwrap_or_else(|| offset.ours(at.unwrap_or(0)));
                    return Err(self.refused(said, requested).await);
                }
                Err(trouble) => return Err(trouble.into()),
            };
            // The pages that follow are of the same instant.
            let revision = *at.get_or_insert_with(|| answer.header.map_or(0, |h| h.revision));
            let (more, count) = (answer.more, answer.kvs.len());
            let bytes: usize = answer.kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum();
            if let Some(last) = answer.kvs.last() {
                start = after_bytes(&last.key);
            }
            entries.extend(answer.kvs.into_iter().filter_map(|kv| offset.entry(kv)));
            if !more || count == 0 || entries.len() >= wanted {
                let more = entries.len() >= wanted;
                if options.limit != 0 {
                    entries.truncate(options.limit);
                }
                return Ok(Listing { entries, revision: offset.ours(revision), more });
            }
            let average = (bytes / count).max(1);
            page = i64::try_from(PAGE_BYTES / average).unwrap_or(LARGEST_PAGE).clamp(1, LARGEST_PAGE);
        }
    }
}

impl Offset {
    /// What etcd has under a key; nothing if it is not for others to see.
    fn entry(&self, kv: KeyValue) -> Option<Entry> {
        let key = key_of(kv.key)?;
        let (revision, created) = (self.ours(kv.mod_revision), self.ours(kv.create_revision));
        Some(Entry { key, value: Bytes::from(kv.value), revision, created })
    }
}

/// A key as text. Nothing if it is the backend's own, or is not text and so nobody's of ours.
fn key_of(key: Vec<u8>) -> Option<Arc<str>> {
    match String::from_utf8(key) {
        Ok(key) if key.ends_with(SENTINEL) || key.starts_with(write::DOORS) => None,
        Ok(key) => Some(key.into()),
        Err(error) => {
            tracing::warn!(key = %String::from_utf8_lossy(error.as_bytes()), "a key in etcd is not UTF-8; it is ignored");
            None
        }
    }
}

impl Shared {
    /// Reads one key, linearizably. The revision is etcd's.
    async fn read(&self, key: &str, keys_only: bool) -> Result<(Option<KeyValue>, i64)> {
        let key = Bytes::copy_from_slice(key.as_bytes());
        let answer = self.pool.ask(RangeRequest { key, keys_only, ..Default::default() }).await?;
        Ok((answer.kvs.into_iter().next(), answer.header.map_or(0, |h| h.revision)))
    }

    /// The newest revision, etcd's. The offset is read along with it: who changes it under a connected client would make
    /// revisions go back.
    async fn newest(&self) -> Result<i64> {
        let (found, newest) = self.read(OFFSET_KEY, true).await?;
        let written = found.map_or(0, |kv| kv.mod_revision.unsigned_abs());
        if written != self.offset_written.load(Ordering::Acquire) {
            return Err(unavailable(format!(
                "{OFFSET_KEY} in etcd was changed while this server was connected, so it counts revisions wrongly; restart it"
            )));
        }
        Ok(newest)
    }
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Error {
        match trouble {
            Trouble::Over(error) => error,
            Trouble::Refused(said) => refusal(said),
            Trouble::Again { .. } => unavailable("etcd could not do it".into()),
        }
    }
}

/// A refusal in etcd's words, with the way out where there is one.
fn refusal(said: String) -> Error {
    let way_out = if said.contains("database space exceeded") {
        ": its database has reached --quota-backend-bytes; compact, defragment, and disarm the alarm NOSPACE"
    } else if said.contains("too large") || said.contains("larger than max") {
        ": the value exceeds etcd's --max-request-bytes (1.5 MiB by default)"
    } else if said.contains("permission denied") || said.contains("user name") || said.contains("auth token") {
        ": etcd's own authentication is on; the name in our certificate needs a role that may do this"
    } else {
        ""
    };
    unavailable(format!("etcd refuses: {said}{way_out}"))
}

/// The first key under a prefix. etcd does not take an empty key.
fn range_start(prefix: &str) -> Bytes {
    match prefix {
        "" => Bytes::from_static(&[0]),
        prefix => Bytes::copy_from_slice(prefix.as_bytes()),
    }
}

/// The first key after all those with a prefix. The last byte of UTF-8 is never 255, so it can be counted up.
fn range_end(prefix: &str) -> Bytes {
    let mut end = prefix.as_bytes().to_vec();
    match end.last_mut() {
        Some(last) => *last += 1,
        // To etcd this is "everything".
        None => end.push(0),
    }
    end.into()
}

fn after_key(key: &str) -> Bytes {
    after_bytes(key.as_bytes())
}

fn after_bytes(key: &[u8]) -> Bytes {
    [key, &[0]].concat().into()
}

#[async_trait]
impl Store for Etcd {
    async fn get(&self, key: &str) -> Result<(Option<Entry>, Revision)> {
        let (found, revision) = self.shared.read(key, false).await?;
        let offset = &self.shared.offset;
        Ok((found.and_then(|kv| offset.entry(kv)), offset.ours(revision)))
    }

    async fn list(&self, prefix: &str, options: ListOptions) -> Result<Listing> {
        let mut again = 2;
        loop {
            match self.list_at(prefix, &options).await {
                // The history was compacted while pages of a list of the present were read: the present has moved on.
                Err(Error::Compacted { .. }) if options.at.is_none() && again > 0 => again -= 1,
                done => return done,
            }
        }
    }

    async fn put(&self, key: &str, value: Bytes, expect: Expect, fence: Option<&Fence>) -> Result<Revision> {
        write::write(&self.shared, key, Some(value), expect, fence).await
    }

    async fn delete(&self, key: &str, expect: Expect, fence: Option<&Fence>) -> Result<Revision> {
        write::write(&self.shared, key, None, expect, fence).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch> {
        watch::start(&self.shared, prefix, after).await
    }

    async fn revision(&self) -> Result<Revision> {
        let newest = self.shared.newest().await?;
        self.shared.wanted.send_if_modified(|wanted| {
            let more = newest > *wanted;
            *wanted = newest.max(*wanted);
            more
        });
        Ok(self.shared.offset.ours(newest))
    }

    async fn compact(&self, at: Revision) -> Result<()> {
        let offset = &self.shared.offset;
        let revision = offset.etcds(at);
        if revision <= 0 {
            return Ok(());
        }
        match self.shared.pool.ask(CompactionRequest { revision }).await {
            Ok(_) => Ok(()),
            // Compacted that far already, perhaps by the try whose answer was lost.
            Err(Trouble::Refused(said)) if said.contains("has been compacted") => Ok(()),
            Err(Trouble::Refused(said)) => Err(self.refused(said, at).await),
            Err(trouble) => Err(trouble.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_are_offset_both_ways() {
        let offset = Offset(AtomicU64::new(1000));
        assert_eq!(offset.ours(5), Revision(1005));
        for (ours, etcds, exactly) in [(1005, 5, 5), (1000, 0, -1), (7, -993, -1), (0, -1000, -1)] {
            assert_eq!((offset.etcds(Revision(ours)), offset.exactly(Revision(ours))), (etcds, exactly), "{ours}");
        }
        let none = Offset::default();
        assert_eq!((none.exactly(Revision(0)), none.exactly(Revision(1))), (-1, 1), "0 means absent to etcd");
        assert!(none.etcds(Revision(u64::MAX)) > 0);
    }

    #[test]
    fn ranges_of_a_prefix() {
        let range = |prefix| (range_start(prefix), range_end(prefix));
        assert_eq!(range("/p/"), (Bytes::from("/p/"), Bytes::from("/p0")));
        assert_eq!(range(""), (Bytes::from_static(&[0]), Bytes::from_static(&[0])));
        let (start, end) = range("/\u{10ffff}");
        assert!(start < end);
    }

    #[test]
    fn own_keys_are_not_shown() {
        assert_eq!(key_of(b"/registry/seawall.dev/sentinel".to_vec()), None);
        assert_eq!(key_of(b"/seawall/doors/0123".to_vec()), None);
        assert_eq!(key_of(vec![255]), None);
        assert_eq!(key_of(b"/registry/pods/a/b".to_vec()).as_deref(), Some("/registry/pods/a/b"));
    }
}
