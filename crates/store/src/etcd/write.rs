//! Conditional writes, and what becomes of those whose answer is lost.
//!
//! A write is one transaction: it compares the key's last revision, the fence's creation, and our *door*, and writes if all
//! are as they should be; else it reads all three, to say why not.
//!
//! # When the answer is lost
//!
//! A member that stops answering may have carried the write out, or may do so later: a frozen process that thaws after half
//! a minute still has the request in its socket. Simply repeating it could report a conflict with our own write, or
//! let a create that was taken back by a delete come true a second time. So first the door is closed: a key of this client
//! is written, which every write of ours compares, so that whatever is still under way can no longer happen. Then
//! what there is tells what happened ([`fate`]), and only a write that did not happen is repeated.
//!
//! Our write is recognised by its value at the place where it must be: the version directly after the one expected.
//! Somebody else may have written the very same bytes there; then both are told that they did, and the object is
//! what both wanted. What is told of an unconditional write is weaker, as is what it asks: it may happen twice.
//! The door's key belongs to a lease, so that etcd removes it when this client has been quiet for an hour.

use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;
use rand::Rng;

use super::{
    Offset, Shared,
    pool::{Pool, Trouble, Turn},
    proto::{
        Compare, DeleteRangeRequest, Done, KeyValue, LeaseGrantRequest, Op, PutRequest, RangeRequest, RequestOp,
        TxnRequest, TxnResponse,
    },
    refusal,
};
use crate::{Error, Expect, Fence, Result, Revision};

/// The doors of all clients.
pub(super) const DOORS: &str = "/seawall/doors/";
/// Seconds until etcd forgets a door that is not used. Longer than any request could lie in a socket.
const DOOR_TTL: i64 = 3600;
/// How many versions of a key are looked through for one of ours.
const LOOK_BACK: usize = 64;

/// What the writes of one client share.
pub(super) struct Writes {
    door: Bytes,
    /// The revision at which the door was last closed; 0 if it never was and so does not exist.
    closed: AtomicI64,
    closing: tokio::sync::Mutex<()>,
}

impl Writes {
    pub(super) fn new() -> Writes {
        let door = format!("{DOORS}{:032x}", rand::rng().random::<u128>());
        Writes { door: door.into(), closed: AtomicI64::new(0), closing: tokio::sync::Mutex::new(()) }
    }

    fn closed(&self) -> i64 {
        self.closed.load(Ordering::Acquire)
    }

    /// Makes sure that no write which compares the door with `used` happens from now on.
    async fn close(&self, pool: &Pool, turn: &mut Turn, used: i64) -> Result<()> {
        let waited = tokio::time::timeout_at(turn.deadline(), self.closing.lock()).await;
        let Ok(_guard) = waited else { return Err(turn.over()) };
        if self.closed() != used {
            return Ok(());
        }
        let lease = pool.ask_in(turn, LeaseGrantRequest { ttl: DOOR_TTL }).await?.id;
        let put = Op::Put(PutRequest { key: self.door.clone(), value: Bytes::new(), lease });
        let request = TxnRequest { success: vec![put.into()], ..Default::default() };
        // If a try of this whose answer was lost comes true later, the next write is refused and learns of it.
        let answer = pool.ask_in(turn, request).await?;
        self.closed.store(answer.header.map_or(0, |h| h.revision), Ordering::Release);
        Ok(())
    }
}

/// A write, in etcd's terms.
struct Write<'a> {
    name: &'a str,
    key: Bytes,
    /// `None` deletes.
    value: Option<Bytes>,
    expect: Expect,
    /// What the last revision of the key has to be; -1 is never, `None` is any.
    modified: Option<i64>,
    fence: Option<(&'a Fence, Bytes, i64)>,
}

/// Puts, or deletes if there is no value.
pub(super) async fn write(
    shared: &Shared,
    name: &str,
    value: Option<Bytes>,
    expect: Expect,
    fence: Option<&Fence>,
) -> Result<Revision> {
    let offset = &shared.offset;
    let write = Write {
        name,
        key: Bytes::copy_from_slice(name.as_bytes()),
        modified: match expect {
            Expect::Any => None,
            // What does not exist cannot be deleted.
            Expect::Absent if value.is_none() => Some(-1),
            Expect::Absent => Some(0),
            Expect::At(revision) => Some(offset.exactly(revision)),
        },
        value,
        expect,
        fence: fence.map(|f| (f, Bytes::copy_from_slice(f.key.as_bytes()), offset.exactly(f.created))),
    };
    let (pool, writes) = (&shared.pool, &shared.writes);
    let mut turn = pool.turn();
    // Ours will be newer than whatever has been seen until now.
    let before = pool.seen();
    loop {
        let closed = writes.closed();
        match pool.attempt(&mut turn, write.request(&writes.door, closed)).await {
            Ok(answer) => {
                let newest = answer.header.map_or(0, |h| h.revision);
                if answer.succeeded {
                    return Ok(offset.ours(newest));
                }
                match write.refused(answer, offset) {
                    Refusal::Error(error) => return Err(error),
                    // The door is gone: its lease ended. Without it, what was under way long ago could come true.
                    Refusal::Door(0) => writes.close(pool, &mut turn, closed).await?,
                    // It was closed, by another write of ours or by a try of that whose answer was lost.
                    Refusal::Door(revision) => {
                        writes.closed.fetch_max(revision, Ordering::AcqRel);
                    }
                }
                if turn.is_over() {
                    return Err(turn.over());
                }
            }
            Err(Trouble::Again { ambiguous: false }) => {}
            Err(Trouble::Again { ambiguous: true }) => {
                writes.close(pool, &mut turn, closed).await?;
                if let Fate::Done(revision) = write.look(pool, &mut turn, before).await? {
                    tracing::debug!(key = name, revision, "a write whose answer was lost had been carried out");
                    return Ok(offset.ours(revision));
                }
            }
            Err(trouble) => return Err(trouble.into()),
        }
    }
}

/// Why a transaction did not write.
enum Refusal {
    Error(Error),
    /// Only because the door was closed at this revision.
    Door(i64),
}

impl Write<'_> {
    fn request(&self, door: &Bytes, closed: i64) -> TxnRequest {
        let look = |key: &Bytes| Op::Range(RangeRequest { key: key.clone(), keys_only: true, ..Default::default() });
        let mut compare = vec![Compare::modified(door.clone(), closed)];
        let mut failure: Vec<RequestOp> = vec![look(door).into(), look(&self.key).into()];
        if let Some(modified) = self.modified {
            compare.push(Compare::modified(self.key.clone(), modified));
        }
        if let Some((_, key, created)) = &self.fence {
            compare.push(Compare::created(key.clone(), *created));
            failure.push(look(key).into());
        }
        let key = self.key.clone();
        let op = match &self.value {
            Some(value) => Op::Put(PutRequest { key, value: value.clone(), lease: 0 }),
            None => Op::Delete(DeleteRangeRequest { key, range_end: Bytes::new() }),
        };
        TxnRequest { compare, success: vec![op.into()], failure }
    }

    fn refused(&self, answer: TxnResponse, offset: &Offset) -> Refusal {
        let mut found = answer.responses.into_iter().map(|op| match op.response {
            Some(Done::Range(range)) => range.kvs.into_iter().next(),
            _ => None,
        });
        let (door, key, lock) = (found.next().flatten(), found.next().flatten(), found.next().flatten());
        if let Some((fence, _, created)) = &self.fence
            && lock.map(|kv| kv.create_revision) != Some(*created)
        {
            return Refusal::Error(Error::Fenced { key: fence.key.clone() });
        }
        let actual = key.map(|kv| kv.mod_revision);
        if self.modified.is_some_and(|expected| actual.unwrap_or(0) != expected) {
            let actual = actual.map(|revision| offset.ours(revision));
            return Refusal::Error(Error::Conflict { key: self.name.into(), expected: self.expect, actual });
        }
        Refusal::Door(door.map_or(0, |kv| kv.mod_revision))
    }

    /// Finds out whether this write has happened. The door has been closed, so what is found stays true.
    async fn look(&self, pool: &Pool, turn: &mut Turn, before: i64) -> Result<Fate> {
        let (current, newest) = version(pool, turn, &self.key, 0).await?;
        let mut ours = current.clone();
        match (&self.value, self.modified) {
            // Created by us, and perhaps changed since.
            (Some(_), Some(0)) => {
                if let Some(kv) = &current
                    && kv.mod_revision > kv.create_revision
                    && kv.create_revision > before
                {
                    ours = version(pool, turn, &self.key, kv.create_revision).await?.0;
                }
            }
            // Changed by us directly after the version expected, and perhaps changed since.
            (Some(_), Some(expected)) => {
                for _ in 0..LOOK_BACK {
                    let Some(kv) = ours.as_ref().filter(|kv| kv.mod_revision > expected + 1) else { break };
                    let (older, _) = version(pool, turn, &self.key, kv.mod_revision - 1).await?;
                    if older.as_ref().is_none_or(|older| older.mod_revision <= expected) {
                        break;
                    }
                    ours = older;
                }
            }
            _ => {}
        }
        Ok(fate(self.value.as_deref(), self.modified, before, current.as_ref(), ours.as_ref(), newest))
    }
}

/// A key at a revision of etcd's (0: now), and the revision of now. What has been compacted is as if it was not there.
async fn version(pool: &Pool, turn: &mut Turn, key: &Bytes, revision: i64) -> Result<(Option<KeyValue>, i64)> {
    match pool.ask_in(turn, RangeRequest { key: key.clone(), revision, ..Default::default() }).await {
        Ok(answer) => Ok((answer.kvs.into_iter().next(), answer.header.map_or(0, |h| h.revision))),
        Err(Trouble::Refused(said)) if said.contains("has been compacted") => Ok((None, 0)),
        Err(Trouble::Refused(said)) => Err(refusal(said)),
        Err(trouble) => Err(trouble.into()),
    }
}

/// Whether a write whose answer was lost has happened.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// It did, at this revision (for a deletion: not after it).
    Done(i64),
    /// It did not, and will not any more; or repeating it does no harm.
    NotDone,
}

/// What happened to a write, given what is there now (`current`) and at the place where our version would be (`ours`).
fn fate(
    value: Option<&[u8]>,
    expected: Option<i64>,
    before: i64,
    current: Option<&KeyValue>,
    ours: Option<&KeyValue>,
    newest: i64,
) -> Fate {
    let written = |kv: &&KeyValue| Some(kv.value.as_slice()) == value;
    let done = |kv: Option<&KeyValue>| kv.map_or(Fate::NotDone, |kv| Fate::Done(kv.mod_revision));
    match (value, expected) {
        // Any: the last writer won, and that may be us.
        (Some(_), None) => done(ours.filter(written).filter(|kv| kv.mod_revision > before)),
        (Some(_), Some(0)) => {
            done(ours.filter(written).filter(|kv| kv.mod_revision == kv.create_revision && kv.mod_revision > before))
        }
        (Some(_), Some(expected)) => {
            // If it was deleted and created anew in between, this is another object.
            done(ours.filter(written).filter(|kv| kv.mod_revision > expected && kv.create_revision <= expected))
        }
        (None, None | Some(i64::MIN..=0)) => Fate::NotDone,
        // What was to be deleted is there, or was changed instead.
        (None, Some(expected)) => match current {
            Some(kv) if kv.create_revision <= expected => Fate::NotDone,
            _ => Fate::Done(newest),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv(create: i64, modified: i64, value: &str) -> KeyValue {
        KeyValue { key: b"/k".to_vec(), create_revision: create, mod_revision: modified, value: value.into() }
    }

    #[test]
    fn the_fate_of_a_write() {
        const BEFORE: i64 = 10;
        let (put, delete) = (Some("mine"), None);
        let (any, absent, at7) = (None, Some(0), Some(7));
        let not = Fate::NotDone;
        for (what, value, expected, current, ours, fate_is) in [
            ("nothing there", put, any, None, None, not),
            ("ours", put, any, Some(kv(3, 12, "mine")), None, Fate::Done(12)),
            ("the same bytes, but from before", put, any, Some(kv(3, 9, "mine")), None, Fate::NotDone),
            ("somebody else's, maybe over ours", put, any, Some(kv(3, 12, "other")), None, Fate::NotDone),
            ("not created", put, absent, None, None, Fate::NotDone),
            ("created by us", put, absent, Some(kv(12, 12, "mine")), None, Fate::Done(12)),
            ("created by another", put, absent, Some(kv(12, 12, "other")), None, Fate::NotDone),
            ("there before", put, absent, Some(kv(9, 9, "mine")), None, Fate::NotDone),
            ("ours, then changed", put, absent, Some(kv(12, 15, "other")), Some(kv(12, 12, "mine")), Fate::Done(12)),
            (
                "another's, then made the same",
                put,
                absent,
                Some(kv(12, 15, "mine")),
                Some(kv(12, 12, "x")),
                Fate::NotDone,
            ),
            ("not changed", put, at7, Some(kv(3, 7, "old")), None, Fate::NotDone),
            ("not changed, and the same bytes", put, at7, Some(kv(3, 7, "mine")), None, Fate::NotDone),
            ("changed by us", put, at7, Some(kv(3, 12, "mine")), None, Fate::Done(12)),
            ("changed by another", put, at7, Some(kv(3, 12, "other")), None, Fate::NotDone),
            ("ours, then changed", put, at7, Some(kv(3, 15, "other")), Some(kv(3, 12, "mine")), Fate::Done(12)),
            ("another's, then made the same", put, at7, Some(kv(3, 15, "mine")), Some(kv(3, 12, "x")), Fate::NotDone),
            ("deleted", put, at7, None, None, Fate::NotDone),
            ("deleted and created anew", put, at7, Some(kv(12, 12, "mine")), None, Fate::NotDone),
            ("still there", delete, at7, Some(kv(3, 7, "x")), None, Fate::NotDone),
            ("gone", delete, at7, None, None, Fate::Done(20)),
            ("gone, and a new one is there", delete, at7, Some(kv(12, 12, "x")), None, Fate::Done(20)),
            ("changed instead", delete, at7, Some(kv(3, 12, "x")), None, Fate::NotDone),
            ("deleting anything again does no harm", delete, any, None, None, Fate::NotDone),
        ] {
            let ours = ours.or_else(|| current.clone());
            let value = value.map(str::as_bytes);
            let found = fate(value, expected, BEFORE, current.as_ref(), ours.as_ref(), 20);
            assert_eq!(found, fate_is, "{what}: {value:?} at {expected:?}");
        }
    }
}
