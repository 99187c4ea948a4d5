//! The one thread that writes: decide, append, sync, publish, acknowledge.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Shared,
    log::{Log, Record},
    state::{self, Map},
};
use crate::{Entry, Error, Event, Expect, Fence, Result, Revision};

/// A batch takes no more requests than this, so that the first does not wait long for the last.
const BATCH_REQUESTS: usize = 1024;
/// Nor more bytes than about this.
const BATCH_BYTES: usize = 4 << 20;

/// What a write does to its key.
pub(super) enum Change {
    Put(Bytes),
    Delete,
}

/// What callers ask of the writer.
pub(super) enum Request {
    Write {
        key: Arc<str>,
        change: Change,
        expect: Expect,
        fence: Option<Fence>,
        reply: oneshot::Sender<Result<Revision>>,
    },
    Compact {
        at: Revision,
        reply: oneshot::Sender<Result<()>>,
    },
}

/// An answer that is ready but may only be given once the batch is on disk: even a refusal tells of writes before it.
enum Answer {
    Write(oneshot::Sender<Result<Revision>>, Result<Revision>),
    Compact(oneshot::Sender<Result<()>>, Result<()>),
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    log: Log,
    /// The entries as of the last published batch.
    map: Map,
    newest: watch::Sender<u64>,
    /// Set when a sync failed: what is on disk is then unknown, and nothing may be acknowledged until a restart has
    /// read it again.
    broken: Option<String>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, log: Log, map: Map, newest: watch::Sender<u64>) -> Writer {
        Writer { shared, log, map, newest, broken: None }
    }

    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        let mut batch = Vec::new();
        while let Some(request) = queue.blocking_recv() {
            let mut bytes = request.bytes();
            batch.push(request);
            while batch.len() < BATCH_REQUESTS && bytes < BATCH_BYTES {
                let Ok(request) = queue.try_recv() else { break };
                bytes += request.bytes();
                batch.push(request);
            }
            self.commit(&mut batch);
        }
    }

    fn commit(&mut self, batch: &mut Vec<Request>) {
        let before = self.shared.state.read().revision();
        let mut map = self.map.clone();
        let (mut events, mut records, mut answers) = (Vec::new(), Vec::new(), Vec::new());
        let mut compact_to = None;
        for request in batch.drain(..) {
            match request {
                Request::Write { key, change, expect, fence, reply } => {
                    let newest = before + events.len() as u64;
                    let result = match decide(&map, newest, key, change, expect, fence.as_ref()) {
                        Ok(Some(event)) => {
                            let revision = event.revision();
                            let replaced = state::apply(&mut map, &event);
                            records.push(Record::Event(event.clone()));
                            events.push((event, replaced));
                            Ok(revision)
                        }
                        Ok(None) => Ok(Revision(newest)),
                        Err(error) => Err(error),
                    };
                    answers.push(Answer::Write(reply, result));
                }
                Request::Compact { at, reply } => {
                    records.push(Record::Compact(at.0));
                    compact_to = compact_to.max(Some(at.0));
                    answers.push(Answer::Compact(reply, Ok(())));
                }
            }
        }
        if !records.is_empty()
            && let Err(reason) = self.append(before, &records)
        {
            for answer in answers {
                answer.refuse(&reason);
            }
            return;
        }
        if !events.is_empty() || compact_to.is_some() {
            let newest = before + events.len() as u64;
            let mut state = self.shared.state.write();
            state.publish(events, map.clone());
            if let Some(at) = compact_to {
                state.compact(at);
            }
            drop(state);
            self.map = map;
            self.newest.send_replace(newest);
        }
        for answer in answers {
            answer.give();
        }
    }

    fn append(&mut self, before: u64, records: &[Record]) -> Result<(), String> {
        if let Some(reason) = &self.broken {
            return Err(reason.clone());
        }
        if let Err(failure) = self.log.append(before, records) {
            let reason = failure.to_string();
            tracing::error!(error = %reason, fatal = failure.is_fatal(), "a batch could not be written");
            if failure.is_fatal() {
                self.broken = Some(format!("{reason}; restart the server"));
            }
            return Err(reason);
        }
        match self.log.roll() {
            Ok(Some(sealed)) => self.shared.sealed.lock().push(sealed),
            Ok(None) => {}
            // The current file goes on being used.
            Err(error) => tracing::warn!(%error, "a new log file could not be begun"),
        }
        Ok(())
    }
}

impl Request {
    fn bytes(&self) -> usize {
        match self {
            Request::Write { key, change: Change::Put(value), .. } => key.len() + value.len(),
            Request::Write { key, change: Change::Delete, .. } => key.len(),
            Request::Compact { .. } => 0,
        }
    }
}

impl Answer {
    // A caller that has gone away no longer wants its answer.
    fn give(self) {
        match self {
            Answer::Write(reply, result) => drop(reply.send(result)),
            Answer::Compact(reply, result) => drop(reply.send(result)),
        }
    }

    fn refuse(self, reason: &str) {
        let error = Error::Unavailable { reason: reason.to_owned(), source: None };
        match self {
            Answer::Write(reply, _) => drop(reply.send(Err(error))),
            Answer::Compact(reply, _) => drop(reply.send(Err(error))),
        }
    }
}

/// What a write leads to: an event, nothing (a deletion of what is not there), or a refusal.
fn decide(
    map: &Map,
    newest: u64,
    key: Arc<str>,
    change: Change,
    expect: Expect,
    fence: Option<&Fence>,
) -> Result<Option<Event>> {
    if let Some(fence) = fence
        && map.get(fence.key.as_ref()).map(|lock| lock.created) != Some(fence.created)
    {
        return Err(Error::Fenced { key: fence.key.clone() });
    }
    let current = map.get(key.as_ref());
    let actual = current.map(|entry| entry.revision);
    let as_expected = match expect {
        Expect::Any => true,
        Expect::Absent => actual.is_none(),
        Expect::At(revision) => actual == Some(revision),
    };
    if !as_expected {
        return Err(Error::Conflict { key, expected: expect, actual });
    }
    let revision = Revision(newest + 1);
    match (change, current) {
        (Change::Put(value), _) => {
            let created = current.map_or(revision, |entry| entry.created);
            Ok(Some(Event::Put(Entry { key, value, revision, created })))
        }
        (Change::Delete, Some(_)) => Ok(Some(Event::Delete { key, revision })),
        (Change::Delete, None) if expect == Expect::Any => Ok(None),
        // "Expected absent" and absent: there is nothing that could be deleted.
        (Change::Delete, None) => Err(Error::Conflict { key, expected: expect, actual }),
    }
}
