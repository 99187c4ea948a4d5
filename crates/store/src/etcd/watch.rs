//! Watches that survive the member they are on.
//!
//! A watch is a task that follows one member's stream and hands steps over a bounded queue. It leaves a member that dies, falls
//! silent, has no leader or stays behind, and goes on with the next one at the revision it has passed: no event is lost or
//! repeated. A stream that is asked for from revision `r` and delivers from `r` on (what we have is dropped) is refused by
//! etcd exactly if something after `r` has been compacted; from `r + 1` it would not be when `r + 1` was a deletion.
//!
//! # How far a watch has come
//!
//! Events tell, as etcd delivers them in order. When the newest writes are outside of the watched prefix there are none, and
//! etcd's progress notifications may overtake events before 3.4.25 and 3.5.8
//! (<https://github.com/etcd-io/etcd/issues/15220>), so they are only used as a sign of life. Instead, when
//! somebody was told of a revision that the watch has not passed and nothing comes for a few milliseconds, the watch
//! writes to a sentinel key inside its prefix: its event is newer than whatever was asked for. That key is shown to nobody.

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;

use super::{
    Offset, SENTINEL, Shared, key_of,
    link::{Failure, Kind, Link},
    pool::{Member, Pool, unavailable},
    proto::{
        Op, PutRequest, TxnRequest, WatchAsk, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
    },
    range_end, range_start, refusal,
};
use crate::{Error, Event, Progress, Result, Revision, Watch};

/// Steps that wait for the watcher to take them. Behind these, etcd itself holds events back.
const QUEUE: usize = 16;
/// How long nothing may come before the sentinel is written.
const QUIET: Duration = Duration::from_millis(5);
/// The same on a stream that begins in the past, until something came: etcd looks at those every 100 ms.
const QUIET_AT_FIRST: Duration = Duration::from_millis(120);
/// How long the sentinel's event may take before the member counts as behind.
const BEHIND: Duration = Duration::from_secs(1);
/// After so much silence a sign of life is asked for.
const BEAT: Duration = Duration::from_millis(500);
/// After so much silence the member is probed.
const DOUBT: Duration = Duration::from_millis(1000);
/// After so much silence the stream is given up, whatever the probe says.
const SILENCE: Duration = Duration::from_secs(4);
/// The pause between tries while no member serves.
const RETRY: Duration = Duration::from_millis(50);

/// Begins a watch.
pub(super) async fn start(shared: &Arc<Shared>, prefix: &str, after: Revision) -> Result<Watch> {
    let newest = shared.newest().await?;
    let offset = &shared.offset;
    if after > offset.ours(newest) {
        return Err(Error::Future { requested: after, newest: offset.ours(newest) });
    }
    if offset.get() > 0 && offset.etcds(after) <= 0 {
        let oldest = offset.ours(oldest(&shared.pool).await?);
        return Err(Error::Compacted { requested: after, oldest });
    }
    let passed = offset.etcds(after);
    let (out, steps) = mpsc::channel(QUEUE);
    let task = Task {
        shared: shared.clone(),
        prefix: prefix.to_owned(),
        requested: after,
        fresh: passed == newest,
        target: newest,
        joiner: Joiner { passed, held: Vec::new() },
        reported: false,
        sentinels: JoinSet::new(),
        out,
    };
    let task = AbortOnDropHandle::new(tokio::spawn(task.run()));
    let mut steps = ReceiverStream::new(steps);
    Ok(futures::stream::poll_fn(move |context| {
        let _owned = &task;
        steps.poll_next_unpin(context)
    })
    .boxed())
}

struct Task {
    shared: Arc<Shared>,
    prefix: String,
    requested: Revision,
    /// Nothing has been written since the revision that the watch begins after.
    fresh: bool,
    /// The revision (etcd's) that is to be passed.
    target: i64,
    joiner: Joiner,
    /// Whether a step has been handed over.
    reported: bool,
    /// At most one: the write to the sentinel.
    sentinels: JoinSet<()>,
    out: mpsc::Sender<Result<Progress>>,
}

/// Why a stream is no longer followed.
enum End {
    /// Nobody listens.
    Closed,
    /// The watch is over.
    Error(Error),
    /// Another member may serve.
    Move,
}

impl Task {
    async fn run(mut self) {
        let stop = self.shared.pool.stop.clone();
        let out = self.out.clone();
        let error = {
            let mut work = pin!(self.follow_all());
            tokio::select! {
                () = stop.cancelled() => unavailable("the store has been closed".into()),
                () = out.closed() => return,
                end = &mut work => match end {
                    Some(error) => error,
                    None => return,
                },
            }
        };
        // If nobody listens any more, nobody needs to know.
        let _ = out.send(Err(error)).await;
    }

    async fn follow_all(&mut self) -> Option<Error> {
        // The member that did not serve last time is asked again only when no other does.
        let mut avoided = Vec::new();
        loop {
            let Some(member) = self.shared.pool.best(&avoided) else {
                tokio::time::sleep(RETRY).await;
                continue;
            };
            let again = avoided.contains(&member.id);
            let since = Instant::now();
            match Box::pin(self.follow(&member)).await {
                End::Closed => return None,
                End::Error(error) => return Some(error),
                End::Move => {}
            }
            self.joiner.held.clear();
            self.fresh = false;
            tracing::debug!(member = member.url, prefix = self.prefix, "a watch moves on");
            if again || since.elapsed() > SILENCE {
                avoided.clear();
            }
            avoided.push(member.id);
            if again {
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// Follows one member's stream for as long as that is good.
    async fn follow(&mut self, member: &Member) -> End {
        let shared = self.shared.clone();
        let pool = &shared.pool;
        let (ask, requests) = mpsc::channel(4);
        let (link, mut changes, mut wanted) = (member.link(), pool.changes(), shared.wanted.subscribe());
        let passed = self.joiner.passed;
        let create = WatchCreateRequest {
            key: range_start(&self.prefix),
            range_end: range_end(&self.prefix),
            start_revision: if self.fresh { passed + 1 } else { passed.max(1) },
            fragment: true,
        };
        if ask.try_send(WatchRequest { ask: Some(WatchAsk::Create(create)) }).is_err() {
            return End::Move;
        }
        let opened = tokio::select! {
            opened = tokio::time::timeout(pool.limits.attempt, link.watch(requests)) => opened,
            () = link.cut.cancelled() => return End::Move,
        };
        let mut stream = match opened {
            Ok(Ok(stream)) => stream,
            Ok(Err(status)) => return self.failed(member, &link, Failure::of(&status)),
            Err(_) => return self.failed(member, &link, Failure::silent(pool.limits.attempt)),
        };
        let mut heard = Instant::now();
        let mut quiet = if self.fresh { QUIET } else { QUIET_AT_FIRST };
        // Since when nothing has moved although something is to come.
        let mut still: Option<Instant> = None;
        let (mut asked, mut doubted, mut written) = (false, false, false);
        loop {
            self.target = self.target.max(*wanted.borrow_and_update());
            if self.target <= self.joiner.passed {
                (still, written) = (None, false);
            } else if still.is_none() {
                still = Some(Instant::now());
            }
            let silence = match (asked, doubted) {
                (false, _) => BEAT,
                (true, false) => DOUBT,
                (true, true) => SILENCE,
            };
            let wake = still.map(|still| still + if written { BEHIND } else { quiet });
            let wake = wake.map_or(heard + silence, |wake| wake.min(heard + silence));
            tokio::select! {
                biased;
                message = stream.message() => {
                    (asked, doubted) = (false, false);
                    let response = match message {
                        Ok(Some(response)) => response,
                        Ok(None) => return End::Move,
                        Err(status) => return self.failed(member, &link, Failure::of(&status)),
                    };
                    if !response.events.is_empty() {
                        (still, quiet) = (None, QUIET);
                    }
                    if let Some(end) = self.take(response).await {
                        return end;
                    }
                    // While the watcher was not ready, nobody listened to the member.
                    heard = Instant::now();
                }
                () = link.cut.cancelled() => return End::Move,
                _ = changes.changed() => {
                    if pool.should_leave(member.id) {
                        return End::Move;
                    }
                }
                _ = wanted.changed() => {}
                Some(_) = self.sentinels.join_next() => {}
                () = tokio::time::sleep_until(wake) => {
                    let now = Instant::now();
                    if let Some(since) = still {
                        if written && now >= since + BEHIND {
                            if self.sentinels.is_empty() {
                                // The write is done and does not show here.
                                let said = "it is behind the others".to_owned();
                                return self.failed(member, &link, Failure { kind: Kind::Unfit, said });
                            }
                            still = Some(now);
                        } else if !written && now >= since + quiet {
                            written = true;
                            self.write_sentinel();
                        }
                    }
                    if now >= heard + SILENCE {
                        return self.failed(member, &link, Failure::silent(SILENCE));
                    } else if now >= heard + DOUBT && !doubted {
                        doubted = true;
                        pool.failed(member.id, &link, &Failure::silent(DOUBT));
                    } else if now >= heard + BEAT && !asked {
                        asked = true;
                        // If the queue is full, enough has been asked.
                        let _ = ask.try_send(WatchRequest { ask: Some(WatchAsk::Progress(WatchProgressRequest {})) });
                    }
                }
            }
            // A lasting place is better with the preferred member, once that has been well for a while.
            if pool.should_leave(member.id) {
                return End::Move;
            }
        }
    }

    fn failed(&self, member: &Member, link: &Link, failure: Failure) -> End {
        if failure.kind == Kind::Final {
            return End::Error(refusal(failure.said));
        }
        tracing::debug!(member = member.url, said = failure.said, "the stream of a watch failed");
        self.shared.pool.failed(member.id, link, &failure);
        End::Move
    }

    async fn take(&mut self, response: WatchResponse) -> Option<End> {
        let offset = &self.shared.offset;
        if response.canceled {
            let WatchResponse { compact_revision, cancel_reason, .. } = response;
            return Some(if compact_revision > 0 && self.reported {
                End::Error(Error::Lagged { at: offset.ours(self.joiner.passed) })
            } else if compact_revision > 0 {
                End::Error(Error::Compacted { requested: self.requested, oldest: offset.ours(compact_revision) })
            } else if cancel_reason.contains("permission denied") {
                End::Error(refusal(cancel_reason))
            } else {
                tracing::debug!(cancel_reason, "etcd cancelled a watch");
                End::Move
            });
        }
        let step = if response.created && self.fresh && !self.reported {
            Some((Vec::new(), self.joiner.passed))
        } else {
            self.joiner.take(response, offset)
        };
        let (events, revision) = step?;
        self.reported = true;
        match self.out.send(Ok(Progress { events, revision: offset.ours(revision) })).await {
            Ok(()) => None,
            Err(_) => Some(End::Closed),
        }
    }

    fn write_sentinel(&mut self) {
        if !self.sentinels.is_empty() {
            return;
        }
        let shared = self.shared.clone();
        let key = Bytes::from(format!("{}{SENTINEL}", self.prefix));
        self.sentinels.spawn(async move {
            let put = Op::Put(PutRequest { key, value: Bytes::new(), lease: 0 });
            let request = TxnRequest { success: vec![put.into()], ..Default::default() };
            if let Err(trouble) = shared.pool.ask(request).await {
                tracing::debug!(?trouble, "the sentinel of a watch could not be written");
            }
        });
    }
}

/// Puts what comes in pieces together: all events of a revision are in one step.
struct Joiner {
    /// Every change up to here (in etcd's counting) has been handed over.
    passed: i64,
    /// The last revision's events so far, while more of them may follow.
    held: Vec<(i64, Option<Event>)>,
}

impl Joiner {
    /// What can be handed over now, if anything, and how far it reaches.
    fn take(&mut self, response: WatchResponse, offset: &Offset) -> Option<(Vec<Event>, i64)> {
        let mut all = std::mem::take(&mut self.held);
        let kvs = response.events.into_iter().filter_map(|event| Some((event.ty, event.kv?)));
        all.extend(kvs.filter(|(_, kv)| kv.mod_revision > self.passed).map(|(ty, kv)| {
            let revision = kv.mod_revision;
            let event = match ty {
                0 => offset.entry(kv).map(Event::Put),
                _ => key_of(kv.key).map(|key| Event::Delete { key, revision: offset.ours(revision) }),
            };
            (revision, event)
        }));
        let last = all.last()?.0;
        if response.fragment {
            let complete = all.partition_point(|(revision, _)| *revision < last);
            self.held = all.split_off(complete);
        }
        let revision = all.last()?.0;
        self.passed = revision;
        Some((all.into_iter().filter_map(|(_, event)| event).collect(), revision))
    }
}

/// The oldest revision (etcd's) that is kept: a watch from the beginning is refused with it.
pub(super) async fn oldest(pool: &Pool) -> Result<i64> {
    let mut tried = Vec::new();
    let mut said = "no endpoints of etcd are known".to_owned();
    for _ in 0..3 {
        let Some(member) = pool.best(&tried) else { break };
        tried.push(member.id);
        match tokio::time::timeout(pool.limits.attempt, oldest_of(&member.link())).await {
            Ok(Ok(oldest)) => return Ok(oldest),
            Ok(Err(status)) => said = format!("{}: {}", member.url, Failure::of(&status).said),
            Err(_) => said = format!("{}: no answer in time", member.url),
        }
    }
    Err(unavailable(said))
}

async fn oldest_of(link: &Link) -> Result<i64, tonic::Status> {
    /// etcd looks at watches that begin in the past every 100 ms.
    const PATIENCE: Duration = Duration::from_millis(400);
    let (ask, requests) = mpsc::channel(1);
    let create = WatchCreateRequest { key: Bytes::from_static(&[0]), start_revision: 1, ..Default::default() };
    if ask.try_send(WatchRequest { ask: Some(WatchAsk::Create(create)) }).is_err() {
        return Err(tonic::Status::internal("the queue is full"));
    }
    let mut stream = link.watch(requests).await?;
    let until = Instant::now() + PATIENCE;
    loop {
        match tokio::time::timeout_at(until, stream.message()).await {
            Ok(Ok(Some(response))) if response.compact_revision > 0 => return Ok(response.compact_revision),
            Ok(Ok(Some(_))) => {}
            // Nothing has been compacted.
            Err(_) => return Ok(1),
            Ok(Ok(None)) => return Err(tonic::Status::unavailable("the stream ended")),
            Ok(Err(status)) => return Err(status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::proto::{KeyValue, WatchEvent};

    fn response(events: &[(i64, &str)], fragment: bool) -> WatchResponse {
        let event = |(revision, key): &(i64, &str)| {
            let (ty, key) = match key.strip_prefix('-') {
                Some(key) => (1, key),
                None => (0, *key),
            };
            let kv = KeyValue { key: key.into(), mod_revision: *revision, create_revision: 1, value: Vec::new() };
            WatchEvent { ty, kv: Some(kv) }
        };
        WatchResponse { events: events.iter().map(event).collect(), fragment, ..Default::default() }
    }

    #[test]
    fn pieces_are_joined() {
        let offset = Offset(100.into());
        let mut joiner = Joiner { passed: 5, held: Vec::new() };
        let mut take = |events: &[(i64, &str)], fragment| {
            let step = joiner.take(response(events, fragment), &offset);
            step.map(|(events, revision)| {
                let events: Vec<_> = events.iter().map(|e| (e.revision().0, e.key().to_string())).collect();
                (events, revision)
            })
        };
        let step = |events: &[(u64, &str)], revision| {
            Some((events.iter().map(|(r, k)| (*r, (*k).to_owned())).collect::<Vec<_>>(), revision))
        };
        assert_eq!(take(&[], false), None, "progress says nothing");
        assert_eq!(take(&[(4, "/a"), (5, "/b")], false), None, "what is known already");
        assert_eq!(take(&[(5, "/b"), (6, "/a"), (7, "-/b")], false), step(&[(106, "/a"), (107, "/b")], 7));
        assert_eq!(take(&[(8, "/a"), (9, "/a"), (9, "/b")], true), step(&[(108, "/a")], 8), "9 may go on");
        assert_eq!(take(&[(9, "/c")], true), None);
        assert_eq!(
            take(&[(9, "/d"), (10, "/a")], true),
            step(&[(109, "/a"), (109, "/b"), (109, "/c"), (109, "/d")], 9)
        );
        assert_eq!(take(&[(10, "/b")], false), step(&[(110, "/a"), (110, "/b")], 10));
        assert_eq!(take(&[(11, "/registry/seawall.dev/sentinel")], false), step(&[], 11), "a revision, and no event");
    }
}
