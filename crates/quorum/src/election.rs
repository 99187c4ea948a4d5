//! Who leads.
//!
//! A leader holds a Lease in the API (<https://kubernetes.io/docs/concepts/architecture/leases/#leader-election>), as
//! with upstream's client library, and with one difference: a new leader does not take the Lease over, it deletes it and
//! creates it anew. The revision of that creation is the leader's [`Term`]. It stays the same while the Lease is
//! renewed, and it is what the store compares when a write is made as leader: once the Lease has been deleted, no write
//! of the old term can succeed, however late it arrives and however long its writer was asleep.
//!
//! Since acting twice is impossible, deposing a leader early costs little. It takes place when the Lease has not changed
//! for its whole duration, *and* the store has answered for the last part of it (the grace): when nobody could write,
//! silence proves nothing.
//!
//! Where a leader's neighbours say that its machine is dead ([`Event::Gone`]), its Lease's silence counts much sooner: as
//! soon as it has missed a renewal.
//!
//! The Lease says itself how long it lasts, and a leader to whom the store is slow makes it last longer: where machines
//! are starved, nobody is deposed for being as slow as everyone else.
//!
//! [`Elector`] decides and knows neither clock nor network: it is told the time and what happened, and says what to do.

use std::{collections::VecDeque, fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::timing::{POLLS_PER_RETRY, Timing};

/// A leader's number: the revision at which its Lease was created. A later leader has a larger one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Term(pub u64);

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A point of monotonic time: how long since some instant that the caller chose.
pub type Instant = Duration;

/// What a Lease says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who holds it; empty when the last holder let go of it.
    pub holder: String,
    /// The object's resourceVersion.
    pub version: u64,
    /// How often the holder has changed.
    pub transitions: u32,
    /// How long it lasts, by its holder's word.
    pub duration: Duration,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed.
    Tick,
    /// The Lease as this server's cache has it, possibly old.
    Seen(Option<Record>),
    /// The machine of the Lease's holder is dead, as its neighbours say. Told again as long as they say so.
    Gone(String),
    /// The answer to [`Effect::Read`]: the Lease as the store has it.
    Read(Option<Record>),
    /// [`Effect::Create`] succeeded with this revision.
    Created {
        /// The revision of the creation.
        version: u64,
    },
    /// [`Effect::Renew`] succeeded with this revision.
    Renewed {
        /// The revision of the write.
        version: u64,
    },
    /// [`Effect::Delete`] succeeded.
    Deleted,
    /// The write was refused: the Lease is not as it was thought to be.
    Refused,
    /// The store did not answer, or what became of the write is not known.
    Failed,
    /// This candidate is to lead no more, and not again.
    Resign,
}

/// What to do. At most one of the effects that talk to the store is under way at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Read the Lease from the store, not from a cache.
    Read,
    /// Create the Lease in our name, if there is none.
    Create {
        /// The number of transitions to write.
        transitions: u32,
        /// How long it is to last.
        duration: Duration,
    },
    /// Write the Lease's time anew, if it is still at this version.
    Renew {
        /// The version expected.
        version: u64,
        /// How long it is to last from then on.
        duration: Duration,
    },
    /// Delete the Lease, if it is still at this version.
    Delete {
        /// The version expected.
        version: u64,
    },
    /// Empty the Lease's holder, if it is still at this version: another may take over at once.
    Release {
        /// The version expected.
        version: u64,
    },
    /// Act as leader in this term.
    Lead(Term),
    /// Stop acting as leader.
    Follow,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// Someone else leads, or nobody.
    Following(Following),
    /// The Lease of a leader that is gone is being deleted.
    Deposing,
    /// Our Lease is being created, to last this long.
    Creating(Duration),
    /// We lead.
    Leading(Leading),
    /// We have let go.
    Resigned,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Leading {
    term: Term,
    version: u64,
    /// When the last renewal that succeeded was asked for.
    renewed: Instant,
    /// When the one that is under way was.
    sent: Option<Instant>,
    /// When to renew next.
    next: Instant,
    /// What became of a renewal is not known: the Lease may be at a later version than ours.
    unsure: bool,
    /// How long the Lease lasts, as the last renewal that succeeded said.
    told: Duration,
    /// As the one that is under way says.
    telling: Duration,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Following {
    /// The Lease as last seen, and since when it has not changed.
    seen: Option<(Record, Instant)>,
    /// Since when the store has answered and the Lease was the same.
    confirmed: Option<Instant>,
    /// The holder's machine is dead, by the word of others.
    gone: bool,
    /// A read is under way.
    reading: bool,
    /// Do nothing before this.
    rest: Instant,
}

/// One candidate.
#[derive(Clone, Debug)]
pub struct Elector {
    identity: String,
    timing: Timing,
    state: State,
    /// The transitions that the next Lease of ours will count.
    transitions: u32,
    pace: Pace,
}

/// How fast the store answers us.
#[derive(Clone, Debug, Default)]
struct Pace {
    /// When the request that is under way was made.
    asked: Option<Instant>,
    /// How long the last ones took.
    last: VecDeque<Duration>,
}

/// How many answers the pace is judged by.
const SAMPLES: usize = 8;
/// With fewer it is not.
const FEWEST: usize = 4;
/// A Lease lasts at least so many times as long as an answer of the store takes.
const ANSWERS: u32 = 5;
/// It lasts at most so many times as long as configured.
const LONGEST: u32 = 15;

impl Pace {
    fn asks(&mut self, now: Instant) {
        self.asked = Some(now);
    }

    /// There was an answer, or none in time: that a store is gone does not make it slow.
    fn answered(&mut self, now: Instant, failed: bool) {
        if let Some(asked) = self.asked.take()
            && !failed
        {
            self.last.push_back(now.saturating_sub(asked));
            if self.last.len() > SAMPLES {
                self.last.pop_front();
            }
        }
    }

    /// How long an answer takes on a bad day. The slowest one is left out: etcd may have elected a leader just then.
    fn slow(&self) -> Duration {
        let mut sorted: Vec<Duration> = self.last.iter().copied().collect();
        sorted.sort();
        match sorted.len() {
            // Too few to know.
            0..FEWEST => Duration::ZERO,
            n => sorted[n - 2],
        }
    }

    /// The times for this pace: longer, in the proportions that were configured.
    fn stretch(&self, timing: &Timing) -> Timing {
        let wanted = (self.slow() * ANSWERS).clamp(timing.lease_duration, timing.lease_duration * LONGEST);
        scaled(timing, wanted)
    }
}

/// The times of a Lease that lasts this long.
fn scaled(timing: &Timing, duration: Duration) -> Timing {
    let factor =
        (duration.as_secs_f64() / timing.lease_duration.as_secs_f64().max(0.001)).clamp(1.0, f64::from(LONGEST));
    Timing {
        lease_duration: timing.lease_duration.mul_f64(factor),
        renew_deadline: timing.renew_deadline.mul_f64(factor),
        grace: timing.grace.mul_f64(factor),
        ..*timing
    }
}

impl Elector {
    /// A candidate. The identity must be of this process alone, e.g. the machine's name and a random part.
    pub fn new(identity: impl Into<String>, timing: Timing) -> Elector {
        Elector {
            identity: identity.into(),
            timing,
            state: State::Following(Following::default()),
            transitions: 0,
            pace: Pace::default(),
        }
    }

    /// The term in which this candidate leads.
    pub fn term(&self) -> Option<Term> {
        match self.state {
            State::Leading(Leading { term, .. }) => Some(term),
            _ => None,
        }
    }

    /// How often [`Event::Tick`] and [`Event::Seen`] are wanted.
    pub fn poll(&self) -> Duration {
        self.timing.retry_period / POLLS_PER_RETRY
    }

    /// How long an effect that talks to the store may take before it counts as [`Event::Failed`]. A renewal whose answer
    /// is lost has to leave time for another one.
    pub fn patience(&self, effect: &Effect) -> Duration {
        let deadline = self.timing.renew_deadline;
        match effect {
            Effect::Renew { .. } => (self.pace.slow() * 3).clamp(deadline / 3, deadline),
            // Nothing is lost while these are waited for, and how long they take is learned from them.
            _ => deadline.max(self.pace.slow() * 3),
        }
    }

    /// How long a Lease of ours lasts at present.
    pub fn duration(&self) -> Duration {
        self.pace.stretch(&self.timing).lease_duration
    }

    /// Takes a step.
    pub fn step(&mut self, now: Instant, event: Event) -> Vec<Effect> {
        if event == Event::Resign {
            return self.resign();
        }
        if !matches!(event, Event::Tick | Event::Seen(_) | Event::Gone(_)) {
            self.pace.answered(now, event == Event::Failed);
        }
        let effects = self.decide(now, event);
        if effects.iter().any(|e| !matches!(e, Effect::Lead(_) | Effect::Follow)) {
            self.pace.asks(now);
        }
        effects
    }

    fn decide(&mut self, now: Instant, event: Event) -> Vec<Effect> {
        let duration = self.duration();
        if let Event::Seen(Some(record)) | Event::Read(Some(record)) = &event {
            self.transitions = self.transitions.max(record.transitions + 1);
        }
        match &mut self.state {
            State::Following(following) => match follow(following, &self.identity, &self.timing, now, event) {
                Some(Next::Read) => vec![Effect::Read],
                Some(Next::Depose(version)) => {
                    self.state = State::Deposing;
                    vec![Effect::Delete { version }]
                }
                Some(Next::Create) => self.create(),
                None => Vec::new(),
            },
            State::Deposing => match event {
                Event::Deleted => self.create(),
                Event::Refused | Event::Failed => self.rest(now),
                _ => Vec::new(),
            },
            State::Creating(told) => match event {
                Event::Created { version } => {
                    let term = Term(version);
                    let next = now + self.timing.retry_period;
                    let told = *told;
                    let leading =
                        Leading { term, version, renewed: now, sent: None, next, unsure: false, told, telling: told };
                    self.state = State::Leading(leading);
                    vec![Effect::Lead(term)]
                }
                // If the creation did succeed we shall find a Lease of our own, and depose ourselves.
                Event::Refused | Event::Failed => self.rest(now),
                _ => Vec::new(),
            },
            State::Leading(leading) => match lead(leading, &self.identity, &self.timing, duration, now, event) {
                Ok(effect) => effect.into_iter().collect(),
                Err(Deposed) => {
                    let _ = self.rest(now);
                    vec![Effect::Follow]
                }
            },
            State::Resigned => Vec::new(),
        }
    }

    fn create(&mut self) -> Vec<Effect> {
        let duration = self.duration();
        self.state = State::Creating(duration);
        vec![Effect::Create { transitions: self.transitions, duration }]
    }

    fn rest(&mut self, now: Instant) -> Vec<Effect> {
        let rest = now + self.timing.retry_period / POLLS_PER_RETRY;
        self.state = State::Following(Following { rest, ..Following::default() });
        Vec::new()
    }

    fn resign(&mut self) -> Vec<Effect> {
        let before = std::mem::replace(&mut self.state, State::Resigned);
        match before {
            // A renewal that is under way changes the version: then the Lease ends by itself.
            State::Leading(Leading { version, .. }) => vec![Effect::Follow, Effect::Release { version }],
            _ => Vec::new(),
        }
    }
}

struct Deposed;

fn lead(
    leading: &mut Leading,
    identity: &str,
    timing: &Timing,
    duration: Duration,
    now: Instant,
    event: Event,
) -> Result<Option<Effect>, Deposed> {
    match event {
        Event::Renewed { version } => {
            leading.version = version;
            leading.unsure = false;
            // It counts from when it was asked for: others may have seen it then.
            leading.renewed = leading.sent.take().unwrap_or(now);
            leading.told = leading.telling;
            leading.next = leading.renewed + timing.retry_period;
        }
        Event::Refused if leading.unsure => return Ok(Some(Effect::Read)),
        Event::Refused => return Err(Deposed),
        Event::Read(Some(record)) if record.holder == identity => {
            leading.version = record.version;
            leading.unsure = false;
            leading.sent = None;
            leading.next = now;
        }
        Event::Read(_) => return Err(Deposed),
        Event::Failed => {
            leading.unsure = true;
            leading.sent = None;
            leading.next = now + timing.retry_period / POLLS_PER_RETRY;
        }
        _ => {}
    }
    // What others were told when it was last renewed is what they wait for.
    let told = scaled(timing, leading.told);
    if now >= leading.renewed + told.renew_deadline {
        return Err(Deposed);
    }
    if leading.sent.is_none() && now >= leading.next {
        (leading.sent, leading.telling) = (Some(now), duration);
        return Ok(Some(Effect::Renew { version: leading.version, duration }));
    }
    Ok(None)
}

enum Next {
    Read,
    Depose(u64),
    Create,
}

fn follow(following: &mut Following, identity: &str, timing: &Timing, now: Instant, event: Event) -> Option<Next> {
    match event {
        Event::Seen(Some(record)) => following.notice(record, now),
        // It was deleted: someone is taking over, or nobody does.
        Event::Seen(None) => following.seen = None,
        Event::Gone(holder) => {
            let held = following.seen.as_ref().is_some_and(|(record, _)| record.holder == holder);
            if held && !following.gone {
                (following.gone, following.rest) = (true, Duration::ZERO);
            }
        }
        Event::Read(None) => {
            following.reading = false;
            return Some(Next::Create);
        }
        Event::Read(Some(record)) => {
            following.reading = false;
            let free = record.holder.is_empty() || record.holder == identity;
            let version = record.version;
            following.notice(record, now);
            let confirmed = *following.confirmed.get_or_insert(now);
            let since = following.seen.as_ref().map_or(now, |(_, since)| *since);
            let times = following.times(timing);
            // Not before this can the silence count.
            let over = match following.gone {
                true => since + missed(&times),
                false => (since + times.lease_duration).max(confirmed + times.grace),
            };
            if free || now >= over {
                return Some(Next::Depose(version));
            }
            following.rest = over;
            return None;
        }
        Event::Failed | Event::Refused => {
            following.reading = false;
            // The store does not answer: what was confirmed before says nothing.
            following.confirmed = None;
            following.rest = now + timing.retry_period / POLLS_PER_RETRY;
        }
        _ => {}
    }
    if following.reading || now < following.rest {
        return None;
    }
    let ask = match &following.seen {
        None => true,
        Some((record, _)) if record.holder.is_empty() || record.holder == identity => true,
        // The first read starts the grace, so that it ends together with the duration.
        Some((_, since)) => {
            let times = following.times(timing);
            match following.gone {
                true => now >= *since + missed(&times),
                false => now + times.grace >= *since + times.lease_duration,
            }
        }
    };
    following.reading = ask;
    ask.then_some(Next::Read)
}

impl Following {
    /// The times that the holder of the Lease goes by.
    fn times(&self, timing: &Timing) -> Timing {
        self.seen.as_ref().map_or(*timing, |(record, _)| scaled(timing, record.duration))
    }

    fn notice(&mut self, record: Record, now: Instant) {
        // A cache may be behind what was read from the store.
        let news = self.seen.as_ref().is_none_or(|(seen, _)| record.version > seen.version);
        if news {
            self.seen = Some((record, now));
            self.confirmed = None;
            self.gone = false;
            self.rest = Duration::ZERO;
        }
    }
}

/// After this long without a change, a leader has missed a renewal: for its neighbours' word, that is enough.
fn missed(times: &Timing) -> Duration {
    times.lease_duration * 3 / 8
}

#[cfg(test)]
#[path = "election_tests.rs"]
mod tests;
