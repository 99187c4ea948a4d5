//! When suspicion becomes a verdict: how many say so, for how long, and whether we are the ones to say it.
//!
//! The patience shrinks as witnesses come forward, and who hears little or misses much holds its tongue: both are
//! Lifeguard's ideas (Dadgar, Phillips, Currey: "Lifeguard: Local Health Awareness for More Accurate Failure
//! Detection", 2018, <https://arxiv.org/abs/1707.00788>).

use std::{collections::BTreeSet, time::Duration};

use foca::Incarnation;
use seawall_quorum::timing::Timing;

use super::id::{Id, Key};
use crate::verdict::Verdict;

/// The times of the gossip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// How often a member is probed by each other one.
    pub probe_interval: Duration,
    /// How long a probed member has before others are asked to probe it too.
    pub probe_timeout: Duration,
    /// How long a member that several suspect has for an objection.
    pub suspicion: Duration,
    /// How often news is passed on.
    pub spread: Duration,
    /// How long one has whose kernel answers although it does not. A process that is starved is back before that; one
    /// that hangs is not.
    pub hung: Duration,
}

impl Times {
    /// Those of a profile.
    pub fn of(timing: &Timing) -> Times {
        Times {
            probe_interval: timing.gossip_probe_interval,
            probe_timeout: timing.gossip_probe_timeout,
            suspicion: timing.gossip_suspicion,
            spread: timing.gossip_interval,
            hung: timing.gossip_hung,
        }
    }

    /// How long one has where there is nobody else to ask.
    pub fn alone(&self) -> Duration {
        self.suspicion * 3
    }

    /// We are to act every [`Times::spread`]. A pause longer than this means that we were not given the time to.
    pub fn gap(&self) -> Duration {
        (self.spread * 3).max(self.probe_interval)
    }

    /// That a kernel answers is told again after this.
    pub fn retell(&self) -> Duration {
        self.suspicion * 3 / 2
    }

    /// Who has not heard of a kernel for this long asks it itself: the answer comes before [`Times::alone`] is over.
    pub fn unheard(&self) -> Duration {
        self.suspicion * 2
    }

    /// Who was heard no longer ago than this was heard of late.
    pub fn late(&self) -> Duration {
        self.probe_interval * 4
    }

    /// How long "its machine answers, its process does not" holds. Kernels say so about once a second to each who asks.
    pub fn absence(&self) -> Duration {
        (self.probe_interval * 6).max(Duration::from_secs(3))
    }
}

/// This many witnesses are enough in a cluster of any size.
const WITNESSES: usize = 3;
/// When so many have said of somebody that it does not answer, one more says nothing new.
pub const ACCUSERS: usize = WITNESSES;
/// So often we tell somebody ourselves that it is under suspicion before we bury a machine whose kernel answers.
pub const REMINDED: u32 = 2;
/// So often we ask somebody's kernel ourselves, in vain, before we bury it: packets get lost.
pub const ASKED: u32 = 3;

/// A member that is under suspicion, dead, or has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which life of it.
    pub id: Id,
    /// Which of its incarnations.
    pub incarnation: Incarnation,
    /// Since when.
    pub since: Duration,
    /// Our own patience begins no earlier than this: we were not listening before.
    pub from: Duration,
    /// When we last had reason to hold our tongue: patience for its death begins anew then.
    pub held: Duration,
    /// When its kernel last answered.
    pub pulse: Option<Duration>,
    /// When we last said that it does not answer us.
    pub testified: Option<Duration>,
    /// How often we have asked its kernel since it last answered, and when we last did.
    pub asked: (u32, Duration),
    /// How often we have told it ourselves that it is under suspicion, after it had been for long, and when we last did.
    pub reminded: (u32, Duration),
    /// Who found out by itself.
    pub accusers: BTreeSet<Key>,
    /// What it has come to.
    pub state: State,
}

/// What has become of a suspicion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing yet.
    Suspected,
    /// It is dead.
    Dead,
    /// Its process has left; nothing is known of its machine.
    Left,
}

/// What else there is to consider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The members that are not dead, with us.
    pub members: usize,
    /// Those of them that are under suspicion.
    pub suspected: usize,
    /// From how many others we have heard of late, counted up to two.
    pub heard: usize,
    /// Whether our own probes fail one after the other, whomever we ask.
    pub doubt: bool,
}

/// What follows from a suspicion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// What it has come to.
    pub verdict: Verdict,
    /// Whether we have reason to hold our tongue, and patience begins anew.
    pub held: bool,
    /// When to look again.
    pub again: Duration,
}

/// Judges one member that is under suspicion.
pub fn judge(now: Duration, record: &Record, view: View, times: &Times) -> Judgement {
    let start = record.since.max(record.from);
    let healthy = view.members.saturating_sub(view.suspected).max(1);
    let needed = healthy.min(WITNESSES);
    let accusers = record.accusers.len();
    // One alone may be wrong about its own cable. Where there are several, two have to say so.
    let confirmed = accusers >= needed.min(2);
    let suspect = match needed > 1 && confirmed && record.pulse.is_none() {
        // One that lives objects within a round trip.
        true => start + times.probe_interval,
        false => start + times.suspicion,
    };
    let held = holds_back(healthy, view);
    let mut dead = start.max(record.held) + patience(accusers, needed, times);
    if let Some(pulse) = record.pulse {
        dead = dead.max((pulse + times.alone()).min(start + times.hung));
    }
    // One whose kernel answers is not looked at as often: there may be many of them for long.
    let soon = now + if record.pulse.is_some() { times.suspicion / 2 } else { times.probe_interval };
    if needed > 1 && !confirmed || held {
        let verdict = if now >= suspect { Verdict::Suspect } else { Verdict::Alive };
        return Judgement { verdict, held, again: soon };
    }
    let (verdict, again) = match () {
        () if now >= dead => (Verdict::Dead, soon),
        () if now >= suspect => (Verdict::Suspect, dead),
        () => (Verdict::Alive, suspect.min(dead)),
    };
    Judgement { verdict, held, again: again.min(soon) }
}

/// From [`Times::alone`] for one accuser down to [`Times::suspicion`] for as many as are needed, by the logarithm: the
/// second says more than the third.
fn patience(accusers: usize, needed: usize, times: &Times) -> Duration {
    if needed < 2 {
        return times.alone();
    }
    let share = ((accusers.max(1) as f64).ln() / (needed as f64).ln()).min(1.0);
    times.alone() - (times.alone() - times.suspicion).mul_f64(share)
}

/// Whether it may be us who are cut off, and not the others who are dead.
fn holds_back(healthy: usize, view: View) -> bool {
    let minority = view.suspected * 2 > view.members;
    let deaf = view.heard < (healthy - 1).min(2);
    minority || deaf || view.doubt
}

/// How well we are ourselves.
#[derive(Clone, Debug, Default)]
pub struct Health {
    score: u32,
    /// Whom we asked in vain since somebody last answered.
    failures: BTreeSet<Key>,
    quiet: Duration,
}

/// The worst score.
const WORST: u32 = 7;
/// Who has asked this many different members in vain, and nobody with success, doubts itself.
const DOUBT: usize = 3;

impl Health {
    /// Somebody has answered our probe.
    pub fn answered(&mut self) {
        self.failures.clear();
        self.score = self.score.saturating_sub(1);
    }

    /// Somebody has not.
    pub fn failed(&mut self, who: Key) {
        // One is its own fault, a second one may be ours.
        if self.failures.insert(who) && self.failures.len() > 1 {
            self.worse(1);
        }
    }

    /// We were suspected, and live: we are slow.
    pub fn accused(&mut self) {
        self.worse(1);
    }

    /// We were not given the time to act, and say nothing against others until then.
    pub fn late(&mut self, until: Duration) {
        self.worse(2);
        self.failures.clear();
        self.quiet = self.quiet.max(until);
    }

    /// How many times as long as usual we wait for others.
    pub fn stretch(&self) -> u32 {
        1 + self.score
    }

    /// Whether our own failures count.
    pub fn quiet(&self, now: Duration) -> bool {
        now < self.quiet
    }

    /// Whether it is rather us.
    pub fn doubts(&self) -> bool {
        self.failures.len() >= DOUBT
    }

    fn worse(&mut self, by: u32) {
        self.score = (self.score + by).min(WORST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    const TIMES: Times =
        Times { probe_interval: ms(100), probe_timeout: ms(40), suspicion: ms(400), spread: ms(50), hung: ms(2000) };
    const GOOD: View = View { members: 5, suspected: 1, heard: 2, doubt: false };

    fn record(since: u64, accusers: u64) -> Record {
        Record {
            id: Id { key: Key(9), born: 1 },
            incarnation: 0,
            since: ms(since),
            from: ms(0),
            held: ms(0),
            pulse: None,
            testified: None,
            asked: (0, ms(0)),
            reminded: (0, ms(0)),
            accusers: (0..accusers).map(Key).collect(),
            state: State::Suspected,
        }
    }

    #[test]
    fn patience_is_shorter_with_more_witnesses() {
        // The instants of being avoided and of death, counted from the suspicion.
        let check = |accusers: u64, view: View, suspect: u64, dead: Option<u64>| {
            let record = record(1000, accusers);
            let at = |n: u64| judge(ms(1000 + n), &record, view, &TIMES).verdict;
            assert_eq!(at(suspect - 1), Verdict::Alive, "{accusers} {view:?}");
            assert_eq!(at(suspect), Verdict::Suspect, "{accusers} {view:?}");
            assert_eq!(at(dead.unwrap_or(1 << 40) - 1), Verdict::Suspect, "{accusers} {view:?}");
            if let Some(dead) = dead {
                assert_eq!(at(dead), Verdict::Dead, "{accusers} {view:?}");
            }
        };
        check(3, GOOD, 100, Some(400));
        check(4, GOOD, 100, Some(400));
        check(2, GOOD, 100, Some(696));
        check(1, GOOD, 400, None);
        check(0, GOOD, 400, None);
        // Two of three: both have to say so.
        check(2, View { members: 3, ..GOOD }, 100, Some(400));
        check(1, View { members: 3, ..GOOD }, 400, None);
        // Where there is no other witness, only time can tell.
        check(1, View { members: 2, heard: 0, ..GOOD }, 400, Some(1200));
        check(3, View { members: 5000, ..GOOD }, 100, Some(400));
    }

    #[test]
    fn who_has_a_pulse_is_given_time() {
        let mut record = record(1000, 4);
        let check = |record: &Record, at: u64, verdict: Verdict| {
            assert_eq!(judge(ms(1000 + at), record, GOOD, &TIMES).verdict, verdict, "at {at}");
        };
        record.pulse = Some(ms(990));
        check(&record, 399, Verdict::Alive);
        check(&record, 400, Verdict::Suspect);
        // Its power was cut after that.
        check(&record, 1189, Verdict::Suspect);
        check(&record, 1190, Verdict::Dead);
        record.pulse = Some(ms(2900));
        check(&record, 1999, Verdict::Suspect);
        // It hangs.
        check(&record, 2000, Verdict::Dead);
    }

    #[test]
    fn who_may_be_cut_off_declares_nobody_dead() {
        let check = |view: View, held: bool| {
            let judged = judge(ms(100_000), &record(0, 3), view, &TIMES);
            let verdict = if held { Verdict::Suspect } else { Verdict::Dead };
            assert_eq!((judged.verdict, judged.held), (verdict, held), "{view:?}");
        };
        check(GOOD, false);
        check(View { suspected: 2, ..GOOD }, false);
        check(View { suspected: 3, ..GOOD }, true);
        check(View { heard: 1, ..GOOD }, true);
        check(View { doubt: true, ..GOOD }, true);
        check(View { members: 4, suspected: 2, heard: 1, ..GOOD }, false);
        check(View { members: 3, suspected: 2, heard: 0, ..GOOD }, true);
    }

    #[test]
    fn who_had_doubts_or_was_away_begins_to_count_when_that_is_over() {
        let mut record = record(0, 3);
        let check = |record: &Record, at: u64, verdict: Verdict| {
            assert_eq!(judge(ms(at), record, GOOD, &TIMES).verdict, verdict, "at {at}");
        };
        record.held = ms(5000);
        check(&record, 5399, Verdict::Suspect);
        check(&record, 5400, Verdict::Dead);
        record.from = ms(6000);
        check(&record, 6099, Verdict::Alive);
        check(&record, 6399, Verdict::Suspect);
        check(&record, 6400, Verdict::Dead);
    }

    #[test]
    fn health() {
        let mut health = Health::default();
        health.failed(Key(1));
        health.failed(Key(1));
        assert_eq!((health.stretch(), health.doubts()), (1, false));
        health.failed(Key(2));
        health.failed(Key(3));
        assert_eq!((health.stretch(), health.doubts()), (3, true));
        health.answered();
        assert_eq!((health.stretch(), health.doubts()), (2, false));
        health.late(ms(700));
        assert!(health.quiet(ms(699)) && !health.quiet(ms(700)));
        for _ in 0..20 {
            health.accused();
        }
        assert_eq!(health.stretch(), 1 + WORST);
    }
}
