//! The members of etcd and the connections to them: carries out what [`endpoint`](super::endpoint) decides.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_rustls::rustls::ClientConfig;
use tokio_util::sync::CancellationToken;

use super::{
    Endpoint, OFFSET_KEY,
    endpoint::{Choice, Effect, Event, Fault, Id, Timing},
    link::{Address, ConfigError, Failure, Kind, Link, Patience},
    proto::{HasHeader, RangeRequest, Rpc, StatusRequest},
};
use crate::Error;

/// How long all members that were tried are left in peace before the next round.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(10), Duration::from_millis(20), Duration::from_millis(40), Duration::from_millis(60)];

/// A request that has no answer after so much time makes its member be probed, again and again.
const HANGING: Duration = Duration::from_millis(100);

/// How long a request that was made to follow an old leader may still take once there is a new one.
const OVERTAKEN: Duration = Duration::from_millis(100);

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// One operation, with all its tries.
    pub budget: Duration,
    /// One try with one member.
    pub attempt: Duration,
    /// The answer to a probe.
    pub probe: Duration,
    pub patience: Patience,
}

/// A member, and the connection to it.
pub(super) struct Member {
    pub(super) id: Id,
    pub(super) url: String,
    local: bool,
    address: Address,
    link: Mutex<Link>,
    /// Wakes its prober.
    probe: Notify,
    /// The newest term in which it has had a leader; 0 if none is known yet.
    term: watch::Sender<u64>,
    gone: CancellationToken,
}

impl Member {
    pub(super) fn link(&self) -> Link {
        self.link.lock().clone()
    }

    /// Done when a request that was made now has lost its leader: etcd lets it wait for an answer that never comes.
    async fn overtaken(&self) {
        let mut term = self.term.subscribe();
        let made = *term.borrow();
        if made == 0 {
            return std::future::pending().await;
        }
        loop {
            if tokio::time::timeout(HANGING, term.wait_for(|term| *term > made)).await.is_ok() {
                return tokio::time::sleep(OVERTAKEN).await;
            }
            self.probe.notify_one();
        }
    }
}

/// All members.
pub(super) struct Pool {
    choice: Mutex<Choice>,
    members: RwLock<Members>,
    tls: RwLock<Option<Arc<ClientConfig>>>,
    /// Counts changes of the order of preference.
    changed: watch::Sender<u64>,
    /// The newest revision (etcd's) that any member has told of.
    seen: AtomicI64,
    pub(super) limits: Limits,
    pub(super) stop: CancellationToken,
}

#[derive(Default)]
struct Members {
    all: Vec<Arc<Member>>,
    next: Id,
}

/// One operation: what has been tried, and until when it may be.
pub(super) struct Turn {
    deadline: Instant,
    budget: Duration,
    /// The members that failed in this round.
    tried: Vec<Id>,
    rounds: usize,
    said: Vec<(String, String)>,
}

/// Why an attempt has no answer.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Another attempt may succeed. `ambiguous` if this one may have been carried out.
    Again { ambiguous: bool },
    /// etcd refuses, in these words.
    Refused(String),
    /// The budget is spent.
    Over(Error),
}

impl Pool {
    pub(super) fn new(limits: Limits, timing: Timing, tls: Option<Arc<ClientConfig>>, seed: usize) -> Arc<Pool> {
        Arc::new(Pool {
            choice: Mutex::new(Choice::new(timing, seed)),
            members: RwLock::default(),
            tls: RwLock::new(tls),
            changed: watch::Sender::new(0),
            seen: AtomicI64::new(0),
            limits,
            stop: CancellationToken::new(),
        })
    }

    /// Replaces the members. Those that stay keep their connections, and what is known of them.
    pub(super) fn set_endpoints(self: &Arc<Self>, endpoints: &[Endpoint]) -> Result<(), ConfigError> {
        let parsed: Vec<(Address, &Endpoint)> =
            endpoints.iter().map(|e| Ok((Address::parse(&e.url)?, e))).collect::<Result<_, ConfigError>>()?;
        let mut members = self.members.write();
        let (mut new, mut added): (Vec<Arc<Member>>, Vec<Arc<Member>>) = Default::default();
        for (address, endpoint) in parsed {
            if new.iter().any(|member| member.address == address) {
                continue;
            }
            let known = members.all.iter().find(|m| m.address == address && m.local == endpoint.local);
            let member = known.cloned().unwrap_or_else(|| {
                members.next += 1;
                let link = Link::new(&address, self.tls.read().clone(), self.limits.patience);
                let (id, url, local) = (members.next, endpoint.url.clone(), endpoint.local);
                let gone = self.stop.child_token();
                let (link, probe, term) = (Mutex::new(link), Notify::new(), watch::Sender::new(0));
                let member = Arc::new(Member { id, url, local, address, link, probe, term, gone });
                added.push(member.clone());
                member
            });
            new.push(member);
        }
        let order = new.iter().map(|m| (m.id, m.local)).collect();
        let old = std::mem::replace(&mut members.all, new);
        // In one step with the members, so that nobody is told of one that is not there.
        let effects = self.choice.lock().step(Instant::now(), Event::Members(order));
        let left: Vec<_> = old.into_iter().filter(|old| members.all.iter().all(|new| new.id != old.id)).collect();
        drop(members);
        for member in left {
            member.gone.cancel();
            member.link().sever("it is no longer one of the endpoints");
        }
        self.carry_out(effects, "");
        for member in added {
            tokio::spawn(self.clone().keep_probing(member));
        }
        Ok(())
    }

    /// Uses other certificates from now on: every connection is made anew, one after another as they are next used.
    pub(super) fn set_tls(&self, tls: Option<Arc<ClientConfig>>) {
        *self.tls.write() = tls;
        for member in &self.members.read().all {
            // What is under way ends on the old connection, which closes when nothing uses it any more.
            *member.link.lock() = Link::new(&member.address, self.tls.read().clone(), self.limits.patience);
        }
        self.changed.send_modify(|count| *count += 1);
    }

    /// A connection to a member that need not be one of these.
    pub(super) fn link_to(&self, url: &str, patience: Patience) -> Result<Link, ConfigError> {
        Ok(Link::new(&Address::parse(url)?, self.tls.read().clone(), patience))
    }

    pub(super) fn seen(&self) -> i64 {
        self.seen.load(Ordering::Acquire)
    }

    /// Told whenever the order of preference changes.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The best member now.
    pub(super) fn best(&self, tried: &[Id]) -> Option<Arc<Member>> {
        let members = self.members.read();
        let id = self.choice.lock().best(tried)?;
        members.all.iter().find(|m| m.id == id).cloned()
    }

    /// Whether something that lasts should leave this member.
    pub(super) fn should_leave(&self, id: Id) -> bool {
        self.choice.lock().better(Instant::now(), id).is_some()
    }

    pub(super) fn turn(&self) -> Turn {
        self.turn_within(self.limits.budget)
    }

    pub(super) fn turn_within(&self, budget: Duration) -> Turn {
        Turn { deadline: Instant::now() + budget, budget, tried: Vec::new(), rounds: 0, said: Vec::new() }
    }

    /// Asks until there is an answer or the budget is spent. Only for what may be done twice.
    pub(super) async fn ask<R: Rpc>(&self, request: R) -> Result<R::Answer, Trouble> {
        self.ask_in(&mut self.turn(), request).await
    }

    pub(super) async fn ask_in<R: Rpc>(&self, turn: &mut Turn, request: R) -> Result<R::Answer, Trouble> {
        loop {
            match self.attempt(turn, request.clone()).await {
                Err(Trouble::Again { .. }) => {}
                done => return done,
            }
        }
    }

    /// Asks one member, once.
    pub(super) async fn attempt<R: Rpc>(&self, turn: &mut Turn, request: R) -> Result<R::Answer, Trouble> {
        let Some(mut member) = self.best(&turn.tried) else {
            return Err(Trouble::Over(unavailable("no endpoints of etcd are known".into())));
        };
        if turn.tried.contains(&member.id) {
            let pause = PAUSES[turn.rounds.min(PAUSES.len() - 1)];
            turn.rounds += 1;
            turn.tried.clear();
            let until = (Instant::now() + pause).min(turn.deadline);
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                () = self.stop.cancelled() => {}
            }
            member = self.best(&[]).unwrap_or(member);
        }
        if self.stop.is_cancelled() {
            return Err(Trouble::Over(unavailable("the store has been closed".into())));
        }
        let left = turn.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Trouble::Over(turn.over()));
        }
        let link = member.link();
        match self.call(&member, &link, request, left.min(self.limits.attempt)).await {
            Ok(answer) => {
                // What the operation needs next, it is best placed to do.
                turn.tried.retain(|id| *id != member.id);
                Ok(answer)
            }
            Err(Failure { kind: Kind::Final, said }) => Err(Trouble::Refused(said)),
            Err(failure) => {
                tracing::debug!(member = member.url, said = failure.said, "an attempt failed");
                if failure.kind != Kind::Overtaken {
                    turn.tried.push(member.id);
                }
                turn.note(&member.url, failure.said);
                Err(Trouble::Again { ambiguous: failure.kind.is_ambiguous() })
            }
        }
    }

    /// One call to one member, whose outcome counts for the choice.
    async fn call<R: Rpc>(
        &self,
        member: &Member,
        link: &Link,
        request: R,
        limit: Duration,
    ) -> Result<R::Answer, Failure> {
        let outcome = tokio::select! {
            biased;
            answer = tokio::time::timeout(limit, link.call(request, limit)) => match answer {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(status)) => Err(Failure::of(&status)),
                Err(_) => Err(Failure::silent(limit)),
            },
            () = link.cut.cancelled() => Err(link.severed()),
            () = member.overtaken() => {
                Err(Failure { kind: Kind::Overtaken, said: "no answer from the leader before the present one".into() })
            }
        };
        match &outcome {
            Ok(answer) => {
                self.seen.fetch_max(answer.header().revision, Ordering::AcqRel);
                self.step(Event::Served(member.id), "");
            }
            Err(failure) => self.failed(member.id, link, failure),
        }
        outcome
    }

    /// Takes note that something failed on this connection.
    pub(super) fn failed(&self, id: Id, link: &Link, failure: &Failure) {
        // What fails because a connection was cut says nothing about the next one.
        if link.cut.is_cancelled() {
            return;
        }
        let fault = match failure.kind {
            Kind::Unreachable | Kind::Broken => Fault::Gone,
            Kind::Silent => Fault::Slow,
            Kind::Unfit | Kind::Unsure => Fault::Unfit,
            Kind::Overtaken | Kind::Final => return,
        };
        self.step(Event::Failed(id, fault), &failure.said);
    }

    /// Takes in an event and carries out what it leads to. `why` is what a member said when it failed.
    fn step(&self, event: Event, why: &str) {
        tracing::trace!(?event, why);
        let effects = self.choice.lock().step(Instant::now(), event);
        self.carry_out(effects, why);
    }

    fn carry_out(&self, effects: Vec<Effect>, why: &str) {
        for effect in effects {
            let members = self.members.read();
            let find = |id| members.all.iter().find(|m| m.id == id);
            match effect {
                Effect::Cut(id) => {
                    if let Some(member) = find(id) {
                        let fresh = Link::new(&member.address, self.tls.read().clone(), self.limits.patience);
                        let old = std::mem::replace(&mut *member.link.lock(), fresh);
                        old.sever(why);
                    }
                }
                Effect::Probe(id) => {
                    if let Some(member) = find(id) {
                        member.probe.notify_one();
                    }
                }
                Effect::Changed => self.changed.send_modify(|count| *count += 1),
            }
        }
    }

    /// Asks a member again and again how it is: often the one in use, seldom the others, and after a pause one that failed.
    async fn keep_probing(self: Arc<Self>, member: Arc<Member>) {
        let mut changed = self.changes();
        let mut last: Option<Instant> = None;
        let mut was_well = true;
        loop {
            if let Some(last) = last {
                let Some(at) = self.choice.lock().probe_at(member.id, last) else { return };
                tokio::select! {
                    () = member.gone.cancelled() => return,
                    () = tokio::time::sleep_until(at) => {}
                    () = member.probe.notified() => {}
                    _ = changed.changed() => continue,
                }
            }
            self.probe(&member).await;
            last = Some(Instant::now());
            let is_well = self.choice.lock().is_well(member.id);
            if is_well != was_well {
                was_well = is_well;
                match is_well {
                    true => tracing::info!(member = member.url, "this member of etcd is well again"),
                    false => tracing::warn!(member = member.url, "this member of etcd is left alone until it is well"),
                }
            }
        }
    }

    async fn probe(&self, member: &Member) {
        let link = member.link();
        let limit = self.limits.probe;
        let answer = tokio::time::timeout(limit, link.call(StatusRequest {}, limit)).await;
        if link.cut.is_cancelled() {
            return;
        }
        let (fault, said) = match answer {
            Ok(Ok(status)) if status.is_learner => (Fault::Unfit, "it is a learner".to_owned()),
            Ok(Ok(status)) if status.leader == 0 => (Fault::Unfit, "no leader".to_owned()),
            Ok(Ok(status)) => {
                let term = status.raft_term;
                member.term.send_if_modified(|known| std::mem::replace(known, term.max(*known)) < term);
                match self.serves(member, &link).await {
                    Ok(()) => return self.step(Event::Served(member.id), ""),
                    Err(fault) => fault,
                }
            }
            Err(_) => (Fault::Mute, "it stopped answering".to_owned()),
            Ok(Err(status)) => {
                let Failure { kind, said } = Failure::of(&status);
                match kind {
                    Kind::Unreachable | Kind::Broken => (Fault::Gone, said),
                    Kind::Silent => (Fault::Mute, "it stopped answering".to_owned()),
                    Kind::Unfit | Kind::Unsure | Kind::Overtaken => (Fault::Unfit, said),
                    // It answers; that it may not tell us how it is does not matter.
                    Kind::Final => return self.step(Event::Served(member.id), ""),
                }
            }
        };
        self.step(Event::Failed(member.id, fault), &said);
    }

    /// Whether a member that let requests wait serves again. That it knows a leader is not enough: one that is far behind the
    /// others, as after its machine stood still, knows it and keeps everybody waiting until it has caught up.
    async fn serves(&self, member: &Member, link: &Link) -> Result<(), (Fault, String)> {
        if self.choice.lock().is_well(member.id) {
            return Ok(());
        }
        let limit = self.limits.probe;
        let newest =
            RangeRequest { key: Bytes::from_static(OFFSET_KEY.as_bytes()), keys_only: true, ..Default::default() };
        match tokio::time::timeout(limit, link.call(newest, limit)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) if Failure::of(&status).kind == Kind::Final => Ok(()),
            _ if link.cut.is_cancelled() => Ok(()),
            _ => Err((Fault::Unfit, "it is behind the others".to_owned())),
        }
    }
}

impl Turn {
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.deadline
    }

    fn note(&mut self, url: &str, said: String) {
        match self.said.iter_mut().find(|(known, _)| known == url) {
            Some((_, last)) => *last = said,
            None => self.said.push((url.to_owned(), said)),
        }
    }

    /// The error of an operation whose budget is spent: who said what.
    pub(super) fn over(&self) -> Error {
        let mut reason = format!("etcd did not do it within {:.1} s", self.budget.as_secs_f32());
        for (index, (url, said)) in self.said.iter().enumerate() {
            reason += if index == 0 { ": " } else { "; " };
            reason += &format!("{url}: {said}");
        }
        if self.said.iter().any(|(_, said)| said.contains("no leader") || said.contains("proposal dropped")) {
            reason += " (more than half of the members have to be up and to reach each other)";
        }
        unavailable(reason)
    }
}

pub(super) fn unavailable(reason: String) -> Error {
    Error::Unavailable { reason, source: None }
}
