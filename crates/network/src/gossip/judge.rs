//! When suspicion becomes a verdict: how many say so, for how long, and whether we are the ones to say it.
//!
//! The patience shrinks as witnesses come forward, and who hears little or misses much holds its tongue: both are
//! Lifeguard's ideas (Dadgar, Phillips, Currey: "Lifeguard: Local Health Awareness for More Accurate Failure
//! Detection", 2018, <https://arxiv.org/abs/1707.00788>).

use std::{collections::BTreeSet, time::Duration};

use foca::Incarnation;
use seawall_quorum::timing::Timing;

use super::id::{Id, Key};

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
}

impl Times {
    /// Those of a profile.
    pub fn of(timing: &Timing) -> Times {
        Times {
            probe_interval: timing.gossip_probe_interval,
            probe_timeout: timing.gossip_probe_timeout,
            suspicion: timing.gossip_suspicion,
            spread: timing.gossip_interval,
        }
    }

    /// How long one that only a single member suspects has.
    pub fn alone(&self) -> Duration {
        self.suspicion * 3
    }

    /// We are to act every [`Times::spread`]. A pause longer than this means that we were not given the time to.
    pub fn gap(&self) -> Duration {
        (self.spread * 3).max(self.probe_interval)
    }

    /// How long "its machine answers, its process does not" holds. Kernels say so about once a second to each who asks.
    pub fn absence(&self) -> Duration {
        (self.probe_interval * 6).max(Duration::from_secs(3))
    }
}

/// This many witnesses are enough in a cluster of any size.
const WITNESSES: usize = 3;

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
    /// From how many others we have heard since the suspicion began, counted up to two.
    pub heard: usize,
    /// Whether our own probes fail one after the other, whomever we ask.
    pub doubt: bool,
}

/// What follows from a suspicion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Nothing yet; look again then.
    Open(Duration),
    /// It is better avoided; look again then.
    Suspect(Duration),
    /// It is dead.
    Dead,
}

/// Judges one member that is under suspicion.
pub fn judge(now: Duration, record: &Record, view: View, times: &Times) -> Judgement {
    let start = record.since.max(record.from);
    let healthy = view.members.saturating_sub(view.suspected).max(1);
    let needed = healthy.min(WITNESSES);
    let accusers = record.accusers.len();
    let dead = start + patience(accusers, needed, times);
    let suspect = match needed > 1 && accusers >= needed.min(2) {
        // One that lives objects within a round trip.
        true => start + times.probe_interval,
        false => start + times.suspicion,
    };
    if now >= dead && !holds_back(healthy, view) {
        return Judgement::Dead;
    }
    let again = |at: Duration| if at > now { at } else { now + times.probe_interval };
    match now >= suspect {
        true => Judgement::Suspect(again(dead)),
        false => Judgement::Open(again(suspect.min(dead))),
    }
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
        Times { probe_interval: ms(100), probe_timeout: ms(40), suspicion: ms(400), spread: ms(50) };
    const GOOD: View = View { members: 5, suspected: 1, heard: 2, doubt: false };

    fn record(since: u64, accusers: u64) -> Record {
        Record {
            id: Id { key: Key(9), born: 1 },
            incarnation: 0,
            since: ms(since),
            from: ms(0),
            accusers: (0..accusers).map(Key).collect(),
            state: State::Suspected,
        }
    }

    #[test]
    fn patience_is_shorter_with_more_witnesses() {
        // The instant of death and of being avoided, counted from the suspicion.
        let check = |accusers: u64, view: View, suspect: u64, dead: u64| {
            let record = record(1000, accusers);
            let at = |n: u64| judge(ms(1000 + n), &record, view, &TIMES);
            assert!(matches!(at(suspect - 1), Judgement::Open(_)), "{accusers} {view:?}");
            if suspect < dead {
                assert!(matches!(at(suspect), Judgement::Suspect(_)), "{accusers} {view:?}");
                assert!(matches!(at(dead - 1), Judgement::Suspect(_)), "{accusers} {view:?}");
            }
            assert_eq!(at(dead), Judgement::Dead, "{accusers} {view:?}");
        };
        check(3, GOOD, 100, 400);
        check(4, GOOD, 100, 400);
        check(2, GOOD, 100, 696);
        check(1, GOOD, 400, 1200);
        check(0, GOOD, 400, 1200);
        // Two of three: both have to say so for the short time.
        check(2, View { members: 3, ..GOOD }, 100, 400);
        check(1, View { members: 3, ..GOOD }, 400, 1200);
        // Where there is no other witness, only time can tell.
        check(1, View { members: 2, heard: 0, ..GOOD }, 400, 1200);
        check(3, View { members: 5000, ..GOOD }, 100, 400);
    }

    #[test]
    fn who_may_be_cut_off_declares_nobody_dead() {
        let check = |view: View, dead: bool| {
            let judged = judge(ms(100_000), &record(0, 3), view, &TIMES);
            match dead {
                true => assert_eq!(judged, Judgement::Dead, "{view:?}"),
                false => assert_eq!(judged, Judgement::Suspect(ms(100_100)), "{view:?}"),
            }
        };
        check(GOOD, true);
        check(View { suspected: 2, ..GOOD }, true);
        check(View { suspected: 3, ..GOOD }, false);
        check(View { heard: 1, ..GOOD }, false);
        check(View { doubt: true, ..GOOD }, false);
        check(View { members: 4, suspected: 2, heard: 1, ..GOOD }, true);
        check(View { members: 3, suspected: 2, heard: 0, ..GOOD }, false);
    }

    #[test]
    fn who_was_away_begins_to_count_when_it_is_back() {
        let mut record = record(0, 3);
        record.from = ms(5000);
        assert_eq!(judge(ms(5000), &record, GOOD, &TIMES), Judgement::Open(ms(5100)));
        assert_eq!(judge(ms(5100), &record, GOOD, &TIMES), Judgement::Suspect(ms(5400)));
        assert_eq!(judge(ms(5400), &record, GOOD, &TIMES), Judgement::Dead);
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
