//! Which member of etcd is asked next. Pure: time and what happened come in, what is to be done comes out.
//!
//! The member on the same machine is preferred, since it costs no network and leaves with us. A member that fails is left
//! at once: whatever waits for it is cut off and asks another one. It is tried again by probes, after pauses that grow,
//! and is returned to when it is well. Nothing is ever given up: when all are unwell, all of them are still tried.

use std::time::Duration;

use tokio::time::Instant;

/// The number of an endpoint. A number is never used again for another one.
pub(super) type Id = u32;

/// The times of the choice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// How often the member in use is probed.
    pub probe: Duration,
    /// How often the others are, while they are well.
    pub probe_others: Duration,
    /// The pause before a member that failed is tried again. It doubles with each failure.
    pub pause: Duration,
    /// What that pause grows to.
    pub longest_pause: Duration,
    /// How long a preferred member has to be well before what lasts (a watch) moves back to it, and before its earlier
    /// failures are forgotten.
    pub settled: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            probe: Duration::from_millis(300),
            probe_others: Duration::from_secs(3),
            pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(3),
            settled: Duration::from_secs(5),
        }
    }
}

/// How a member failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It cannot be reached, or its connection broke.
    Gone,
    /// It does not answer a probe. If another member is well, it is not waited for; if not, it may be this machine that is slow.
    Mute,
    /// One request had no answer in time. That may be the member, or an election, so a probe has to tell.
    Slow,
    /// It answers, but cannot serve: it has no leader, or is a learner.
    Unfit,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The member answered a request or a probe.
    Served(Id),
    /// It did not.
    Failed(Id, Fault),
    /// These are the members now, in the order of the configuration; whether each is on this machine.
    Members(Vec<(Id, bool)>),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Break off whatever waits for this member, and its connections.
    Cut(Id),
    /// Ask it now whether it is there.
    Probe(Id),
    /// The order of preference has changed: what lasts may want to move.
    Changed,
}

#[derive(Clone, Debug)]
struct Member {
    id: Id,
    local: bool,
    /// Failures since it was last well for a while.
    failures: u32,
    /// When it last answered.
    served: Option<Instant>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Well {
        since: Instant,
    },
    Unwell {
        until: Instant,
        /// Since when it cannot serve although it answers. During an election that is so for all of them.
        unfit: Option<Instant>,
    },
}

impl Member {
    fn well(&self) -> bool {
        matches!(self.state, State::Well { .. })
    }

    fn unfit(&self) -> Option<Instant> {
        match self.state {
            State::Unwell { unfit, .. } => unfit,
            State::Well { .. } => None,
        }
    }
}

/// All members, and what is known of each.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    timing: Timing,
    /// Spreads clients that have no local member over the others.
    seed: usize,
    members: Vec<Member>,
}

impl Choice {
    pub(super) fn new(timing: Timing, seed: usize) -> Choice {
        Choice { timing, seed, members: Vec::new() }
    }

    /// Takes in what happened.
    pub(super) fn step(&mut self, now: Instant, event: Event) -> Vec<Effect> {
        match event {
            Event::Members(members) => self.replace(now, members),
            Event::Served(id) => {
                let unfit = self.members.iter().filter_map(Member::unfit).max();
                let Some(member) = self.members.iter_mut().find(|m| m.id == id) else { return Vec::new() };
                // News for those who are with a member that cannot serve: this one can.
                let news = unfit.is_some_and(|since| member.served.is_none_or(|served| served <= since));
                member.served = Some(now);
                match member.state {
                    State::Well { since } => {
                        if now.duration_since(since) >= self.timing.settled {
                            member.failures = 0;
                        }
                        if news { vec![Effect::Changed] } else { Vec::new() }
                    }
                    State::Unwell { .. } => {
                        member.state = State::Well { since: now };
                        vec![Effect::Changed]
                    }
                }
            }
            Event::Failed(id, fault) => {
                let others = self.members.iter().any(|m| m.id != id && m.well());
                let Some(member) = self.members.iter_mut().find(|m| m.id == id) else { return Vec::new() };
                let was_well = member.well();
                member.failures = member.failures.saturating_add(1);
                let doubled = self.timing.pause.saturating_mul(1 << (member.failures - 1).min(16));
                let until = now + doubled.min(self.timing.longest_pause);
                // Failures that come at the same time are one: they do not add up to a longer pause.
                match member.state {
                    State::Unwell { until: earlier, .. } if earlier > now => member.failures -= 1,
                    State::Unwell { unfit: Some(since), .. } if fault == Fault::Unfit => {
                        member.state = State::Unwell { until, unfit: Some(since) };
                    }
                    _ => {
                        let unfit = (fault == Fault::Unfit).then_some(now);
                        member.state = State::Unwell { until, unfit };
                    }
                }
                let mut effects = Vec::new();
                match fault {
                    Fault::Gone => effects.push(Effect::Cut(id)),
                    Fault::Mute if others => effects.push(Effect::Cut(id)),
                    Fault::Slow if was_well => effects.push(Effect::Probe(id)),
                    Fault::Mute | Fault::Slow | Fault::Unfit => {}
                }
                if was_well {
                    if fault == Fault::Unfit {
                        effects.extend(self.best(&[]).filter(|best| *best != id).map(Effect::Probe));
                    }
                    effects.push(Effect::Changed);
                }
                effects
            }
        }
    }

    fn replace(&mut self, now: Instant, new: Vec<(Id, bool)>) -> Vec<Effect> {
        let gone = self.members.iter().filter(|old| new.iter().all(|(id, _)| *id != old.id));
        let mut effects: Vec<Effect> = gone.map(|old| Effect::Cut(old.id)).collect();
        let old = std::mem::take(&mut self.members);
        let member = |(id, local)| match old.iter().find(|m| m.id == id) {
            Some(known) => Member { local, ..known.clone() },
            // A member that has not answered yet is believed to be well: the first request finds out.
            None => Member { id, local, failures: 0, served: None, state: State::Well { since: now } },
        };
        self.members = new.into_iter().map(member).collect();
        effects.push(Effect::Changed);
        effects
    }

    /// The member to ask, best first, leaving those in `tried` for last. `None` if there are no members.
    pub(super) fn best(&self, tried: &[Id]) -> Option<Id> {
        let count = self.members.len();
        let rank = |(position, member): (usize, &Member)| {
            let until = match member.state {
                State::Well { .. } => None,
                State::Unwell { until, .. } => Some(until),
            };
            (tried.contains(&member.id), until, !member.local, (position + self.seed) % count)
        };
        self.members.iter().enumerate().min_by_key(|m| rank(*m)).map(|(_, member)| member.id)
    }

    /// Where something that lasts should move that now is with `current`, if it should.
    pub(super) fn better(&self, now: Instant, current: Id) -> Option<Id> {
        let best = self.best(&[])?;
        let (current, best) = (self.find(current), self.find(best)?);
        let State::Well { since } = best.state else { return None };
        match current {
            Some(current) if current.id == best.id => None,
            Some(current) if current.well() => {
                let settled = best.local && !current.local && now.duration_since(since) >= self.timing.settled;
                settled.then_some(best.id)
            }
            // To run around during an election helps nobody: the other one has to have answered since.
            Some(Member { state: State::Unwell { unfit: Some(since), .. }, .. }) => {
                best.served.is_some_and(|served| served > *since).then_some(best.id)
            }
            _ => Some(best.id),
        }
    }

    /// When the member is to be probed again, if its last probe or failure was at `last`.
    pub(super) fn probe_at(&self, id: Id, last: Instant) -> Option<Instant> {
        let member = self.find(id)?;
        Some(match member.state {
            State::Unwell { until, .. } => until,
            State::Well { .. } if self.best(&[]) == Some(id) => last + self.timing.probe,
            State::Well { .. } => last + self.timing.probe_others,
        })
    }

    /// Whether no member is known to be unwell: then it is not known either that asking another one helps.
    pub(super) fn is_well(&self, id: Id) -> bool {
        self.find(id).is_some_and(Member::well)
    }

    fn find(&self, id: Id) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LOCAL: Id = 7;

    fn three(now: Instant) -> Choice {
        let mut choice = Choice::new(Timing::default(), 0);
        choice.step(now, Event::Members(vec![(5, false), (LOCAL, true), (9, false)]));
        choice
    }

    fn start() -> Instant {
        #[allow(clippy::disallowed_methods, reason = "the tests' times are relative to any instant")]
        Instant::from_std(std::time::Instant::now())
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_local_member_first_then_the_others_and_each_once_a_round() {
        let choice = three(start());
        let mut tried = Vec::new();
        for expected in [LOCAL, 5, 9, LOCAL] {
            let next = choice.best(&tried).unwrap();
            assert_eq!(next, expected, "after {tried:?}");
            tried.push(next);
        }
    }

    #[test]
    fn without_a_local_member_clients_spread() {
        let first = |seed| {
            let mut choice = Choice::new(Timing::default(), seed);
            choice.step(start(), Event::Members(vec![(1, false), (2, false), (3, false)]));
            choice.best(&[]).unwrap()
        };
        let mut all = [first(0), first(1), first(2)];
        all.sort();
        assert_eq!(all, [1, 2, 3]);
    }

    #[test]
    fn what_failed_is_left_at_once_and_returned_to() {
        use Effect::{Changed, Cut, Probe};
        let now = start();
        for (fault, expected) in [
            (Fault::Gone, vec![Cut(LOCAL), Changed]),
            (Fault::Mute, vec![Cut(LOCAL), Changed]),
            (Fault::Slow, vec![Probe(LOCAL), Changed]),
        ] {
            let mut choice = three(now);
            assert_eq!(choice.step(now, Event::Failed(LOCAL, fault)), expected, "{fault:?}");
            assert_eq!(choice.best(&[]), Some(5));
            assert_eq!(choice.better(now, LOCAL), Some(5), "a watch leaves, too");
            assert_eq!(choice.step(now + ms(200), Event::Served(LOCAL)), [Changed]);
            assert_eq!(choice.best(&[]), Some(LOCAL), "requests return at once");
            assert_eq!(choice.better(now + ms(300), 5), None, "a watch stays for a while");
            assert_eq!(choice.better(now + ms(5300), 5), Some(LOCAL));
        }
    }

    #[test]
    fn a_watch_leaves_a_member_without_a_leader_only_for_one_that_has_it() {
        use Effect::{Changed, Probe};
        let now = start();
        let mut choice = three(now);
        choice.step(now, Event::Served(5));
        assert_eq!(choice.step(now + ms(1), Event::Failed(LOCAL, Fault::Unfit)), [Probe(5), Changed]);
        assert_eq!(choice.best(&[]), Some(5), "requests try the others");
        assert_eq!(choice.better(now + ms(1), LOCAL), None, "they may not have noticed yet");
        choice.step(now + ms(2), Event::Failed(5, Fault::Unfit));
        choice.step(now + ms(300), Event::Failed(LOCAL, Fault::Unfit));
        assert_eq!(choice.step(now + ms(301), Event::Served(9)), [Changed]);
        assert_eq!(choice.step(now + ms(302), Event::Served(9)), []);
        assert_eq!(choice.better(now + ms(302), LOCAL), Some(9));
        choice.step(now + ms(303), Event::Served(LOCAL));
        assert_eq!(choice.better(now + ms(303), LOCAL), None, "the election is over");
    }

    #[test]
    fn pauses_grow_and_are_forgotten() {
        let mut now = start();
        let mut choice = three(now);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            choice.step(now, Event::Failed(LOCAL, Fault::Gone));
            // Others that were waiting for it fail at the same time.
            choice.step(now, Event::Failed(LOCAL, Fault::Gone));
            let until = choice.probe_at(LOCAL, now).unwrap();
            pauses.push((until - now).as_millis());
            now = until;
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3000, 3000, 3000]);
        choice.step(now, Event::Served(LOCAL));
        choice.step(now + ms(6000), Event::Served(LOCAL));
        choice.step(now + ms(6001), Event::Failed(LOCAL, Fault::Gone));
        assert_eq!(choice.probe_at(LOCAL, now), Some(now + ms(6101)));
    }

    #[test]
    fn when_all_are_unwell_the_one_whose_pause_ends_first_is_asked() {
        let now = start();
        let mut choice = three(now);
        for (id, at) in [(5, 0), (LOCAL, 10), (9, 20)] {
            choice.step(now + ms(at), Event::Failed(id, Fault::Unfit));
        }
        assert_eq!(choice.best(&[]), Some(5));
        assert_eq!(choice.best(&[5]), Some(LOCAL));
        assert_eq!(choice.better(now + ms(30), LOCAL), None, "a watch that nobody could serve better stays");
    }

    #[test]
    fn a_member_that_is_mute_is_waited_for_when_nobody_else_is_there() {
        let now = start();
        let mut choice = three(now);
        choice.step(now, Event::Failed(5, Fault::Gone));
        choice.step(now, Event::Failed(9, Fault::Mute));
        assert_eq!(choice.step(now, Event::Failed(LOCAL, Fault::Mute)), [Effect::Changed]);
        choice.step(now + ms(10), Event::Served(5));
        assert_eq!(choice.step(now + ms(200), Event::Failed(LOCAL, Fault::Mute)), [Effect::Cut(LOCAL)]);
    }

    #[test]
    fn members_come_and_go() {
        let now = start();
        let mut choice = three(now);
        choice.step(now, Event::Failed(5, Fault::Gone));
        let effects = choice.step(now, Event::Members(vec![(5, false), (11, true)]));
        assert_eq!(effects, [Effect::Cut(LOCAL), Effect::Cut(9), Effect::Changed]);
        assert_eq!(choice.best(&[]), Some(11));
        assert!(!choice.is_well(5), "what is known of those that stay is kept");
        assert_eq!(choice.better(now, LOCAL), Some(11), "what is with one that left moves");
        assert_eq!(choice.step(now, Event::Served(LOCAL)), [], "late news of one that left changes nothing");
        assert_eq!(choice.step(now, Event::Failed(9, Fault::Gone)), []);
        choice.step(now, Event::Members(vec![]));
        assert_eq!(choice.best(&[]), None);
    }

    proptest! {
        #[test]
        fn somebody_is_always_asked_and_never_the_unwell_before_the_well(
            events in prop::collection::vec((0..4u32, 0..5u8, 0..2000u64), 0..60), seed in 0..9usize,
        ) {
            let mut now = start();
            let mut choice = Choice::new(Timing::default(), seed);
            choice.step(now, Event::Members((0..4).map(|id| (id, id == 2)).collect()));
            for (id, what, later) in events {
                now += ms(later);
                let effects = match what {
                    0 => choice.step(now, Event::Served(id)),
                    1 => choice.step(now, Event::Failed(id, Fault::Gone)),
                    2 => choice.step(now, Event::Failed(id, Fault::Slow)),
                    3 => choice.step(now, Event::Failed(id, Fault::Mute)),
                    _ => choice.step(now, Event::Failed(id, Fault::Unfit)),
                };
                if what == 1 {
                    prop_assert!(effects.contains(&Effect::Cut(id)));
                }
                let best = choice.best(&[]).unwrap();
                let any_well = (0..4).any(|id| choice.is_well(id));
                prop_assert_eq!(choice.is_well(best), any_well);
                prop_assert!(!choice.is_well(2) || best == 2, "the local one, whenever it is well");
                for id in 0..4 {
                    let at = choice.probe_at(id, now).unwrap();
                    prop_assert!(at <= now + Timing::default().longest_pause, "everyone is probed again");
                }
            }
        }
    }
}
