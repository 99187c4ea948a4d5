//! Who may go on and who waits: seats of priority levels, and fair queues before them. A value without a clock.
//!
//! Every level has seats of its own and may lend some of them; what others have not taken, a level may use beyond its own,
//! but the part that a level does not lend is always its own at once. Within a level, requests of the same flow share a few
//! queues, chosen by shuffle sharding, and the queue whose turn it is in virtual time goes first (KEP-1040).

use std::collections::VecDeque;

/// How long a request is thought to take until it is known, in seconds: an assumption that is too small would let a flow of
/// slow requests start several before their cost is known.
const GUESS: f64 = 1.0;

/// What a level is given.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Seats of its own.
    pub nominal: u32,
    /// Those of them that nobody else gets.
    pub guaranteed: u32,
    /// The most that it may use with what others lend.
    pub most: u32,
    /// Where requests wait; `None` if they are refused at once.
    pub queuing: Option<Queuing>,
}

/// The queues of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queuing {
    /// How many queues there are.
    pub queues: usize,
    /// Among how many of them a flow chooses.
    pub hand: usize,
    /// How many requests may wait in one.
    pub length: usize,
}

/// What becomes of a request that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It goes on; the queue that its cost is charged to.
    Runs(usize),
    /// It waits in this queue.
    Waits(usize),
    /// All its queues are full.
    Full,
    /// The level has no queues.
    Busy,
}

#[derive(Debug, Default)]
struct Queue {
    /// When, in virtual time, its next request is due.
    due: f64,
    waiting: VecDeque<(u64, u32)>,
    running: usize,
}

#[derive(Debug)]
struct Level {
    limits: Limits,
    used: u32,
    waiting: usize,
    /// Virtual time: how much service a queue that always had requests would have had.
    now: f64,
    queues: Vec<Queue>,
    /// The queue that was served last.
    last: usize,
}

impl Level {
    fn new(limits: Limits) -> Level {
        let count = limits.queuing.map_or(1, |q| q.queues.max(1));
        let queues = (0..count).map(|_| Queue::default()).collect();
        Level { limits, used: 0, waiting: 0, now: 0.0, queues, last: 0 }
    }

    /// The queue whose turn it is.
    fn next(&self) -> Option<usize> {
        let count = self.queues.len();
        let after = (1..=count).map(|step| (self.last + step) % count);
        after.filter(|at| !self.queues[*at].waiting.is_empty()).min_by(|a, b| {
            let due = |at: &usize| self.queues[*at].due;
            due(a).total_cmp(&due(b))
        })
    }

    /// A request of this queue begins.
    fn begin(&mut self, at: usize, seats: u32) {
        let queue = &mut self.queues[at];
        // A queue that had nothing to do has saved nothing up.
        if queue.running == 0 && queue.waiting.is_empty() {
            queue.due = queue.due.max(self.now);
        }
        self.now = self.now.max(queue.due);
        queue.due += f64::from(seats) * GUESS;
        queue.running += 1;
        self.used += seats;
        self.last = at;
    }

    /// The shortest of the queues that a flow is dealt.
    fn choose(&self, queuing: Queuing, flow: u64) -> usize {
        let hand = deal(flow, self.queues.len(), queuing.hand);
        let load = |at: &usize| self.queues[*at].waiting.len() + self.queues[*at].running;
        hand.into_iter().min_by_key(load).unwrap_or_default()
    }
}

/// So many different numbers below `queues` for a flow, the same ones every time.
fn deal(mut flow: u64, queues: usize, hand: usize) -> Vec<usize> {
    let mut dealt: Vec<usize> = Vec::with_capacity(hand.min(queues));
    for left in (1..=queues).rev().take(hand) {
        let mut card = (flow % left as u64) as usize;
        flow /= left as u64;
        // The card's place among those that are left.
        let mut before: Vec<usize> = dealt.clone();
        before.sort_unstable();
        for taken in before {
            if taken <= card {
                card += 1;
            }
        }
        dealt.push(card);
    }
    dealt
}

/// The seats and queues of all levels.
#[derive(Debug, Default)]
pub struct Queues {
    levels: Vec<Level>,
    total: u32,
}

impl Queues {
    /// The most seats that a request of a level can have.
    pub fn widest(&self, level: usize) -> u32 {
        self.levels.get(level).map_or(1, |l| l.limits.most.max(1))
    }

    fn fits(&self, at: usize, seats: u32) -> bool {
        let level = &self.levels[at];
        let used = level.used + seats;
        // A request that is wider than its level still gets its turn.
        if level.used > 0 && used > level.limits.most {
            return false;
        }
        let taken = |(other, l): (usize, &Level)| {
            let used = if other == at { used } else { l.used };
            used.max(l.limits.guaranteed)
        };
        level.used == 0
            || used <= level.limits.guaranteed
            || self.levels.iter().enumerate().map(taken).sum::<u32>() <= self.total
    }

    /// A request comes to a level.
    pub fn arrive(&mut self, at: usize, id: u64, flow: u64, seats: u32) -> Arrival {
        let Some(level) = self.levels.get(at) else { return Arrival::Busy };
        let Some(queuing) = level.limits.queuing else {
            if !self.fits(at, seats) {
                return Arrival::Busy;
            }
            self.levels[at].begin(0, seats);
            return Arrival::Runs(0);
        };
        let queue = level.choose(queuing, flow);
        if level.waiting == 0 && self.fits(at, seats) {
            self.levels[at].begin(queue, seats);
            return Arrival::Runs(queue);
        }
        if level.queues[queue].waiting.len() >= queuing.length {
            return Arrival::Full;
        }
        let level = &mut self.levels[at];
        level.waiting += 1;
        let now = level.now;
        let chosen = &mut level.queues[queue];
        if chosen.running == 0 && chosen.waiting.is_empty() {
            chosen.due = chosen.due.max(now);
        }
        chosen.waiting.push_back((id, seats));
        Arrival::Waits(queue)
    }

    /// A request has ended, after so many seconds.
    pub fn finish(&mut self, at: usize, queue: usize, seats: u32, took: f64) {
        let Some(level) = self.levels.get_mut(at) else { return };
        level.used = level.used.saturating_sub(seats);
        if let Some(queue) = level.queues.get_mut(queue) {
            queue.running = queue.running.saturating_sub(1);
            // What it cost in truth.
            queue.due += f64::from(seats) * (took - GUESS);
        }
    }

    /// A request does not wait any longer. False if it does not wait.
    pub fn abandon(&mut self, at: usize, queue: usize, id: u64) -> bool {
        let Some(level) = self.levels.get_mut(at) else { return false };
        let Some(queue) = level.queues.get_mut(queue) else { return false };
        let before = queue.waiting.len();
        queue.waiting.retain(|(waiting, _)| *waiting != id);
        let gone = queue.waiting.len() < before;
        level.waiting -= usize::from(gone);
        gone
    }

    /// The next request that may go on, if there is one: the level that uses least of what is its own comes first.
    pub fn next(&mut self) -> Option<u64> {
        let ready = |(at, level): (usize, &Level)| {
            let queue = level.next()?;
            let (_, seats) = level.queues[queue].waiting.front()?;
            self.fits(at, *seats).then(|| (at, queue, f64::from(level.used) / f64::from(level.limits.nominal.max(1))))
        };
        let (at, queue, _) =
            self.levels.iter().enumerate().filter_map(ready).min_by(|(.., a), (.., b)| a.total_cmp(b))?;
        let level = &mut self.levels[at];
        let (id, seats) = level.queues[queue].waiting.pop_front()?;
        level.waiting -= 1;
        level.begin(queue, seats);
        Some(id)
    }

    /// Seats in use and requests that wait, of a level.
    pub fn load(&self, at: usize) -> (u32, usize) {
        self.levels.get(at).map_or((0, 0), |level| (level.used, level.waiting))
    }

    /// Gives the levels other limits, and adds those that are new; levels keep their places for good. Whoever waits where
    /// nobody may wait any more, or in a queue that is gone, is given back to be let through.
    pub fn set(&mut self, limits: Vec<Limits>, total: u32) -> Vec<u64> {
        let mut freed = Vec::new();
        for (at, limits) in limits.into_iter().enumerate() {
            let Some(level) = self.levels.get_mut(at) else {
                self.levels.push(Level::new(limits));
                continue;
            };
            let count = limits.queuing.map_or(1, |q| q.queues.max(1));
            let keep = if limits.queuing.is_some() { count } else { 0 };
            for queue in keep..level.queues.len() {
                while let Some((id, seats)) = level.queues[queue].waiting.pop_front() {
                    level.waiting -= 1;
                    level.begin(queue, seats);
                    freed.push(id);
                }
            }
            // Those that are gone stay for what runs of them, and are dealt to nobody.
            level.queues.resize_with(count.max(level.queues.len()), Queue::default);
            level.limits = limits;
        }
        let nominal: u32 = self.levels.iter().map(|l| l.limits.nominal).sum();
        self.total = total.max(nominal);
        freed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn limits(nominal: u32, guaranteed: u32, most: u32) -> Limits {
        let queuing = Some(Queuing { queues: 16, hand: 4, length: 50 });
        Limits { nominal, guaranteed, most, queuing }
    }

    fn queues(levels: &[Limits]) -> Queues {
        let mut queues = Queues::default();
        assert!(queues.set(levels.to_vec(), 0).is_empty());
        queues
    }

    #[test]
    fn hands() {
        for flow in [0, 1, 77, u64::MAX, 0x1234_5678_9abc_def0] {
            let hand = deal(flow, 16, 4);
            assert_eq!(hand.iter().collect::<BTreeSet<_>>().len(), 4, "{hand:?}");
            assert!(hand.iter().all(|card| *card < 16));
            assert_eq!(deal(flow, 3, 8).into_iter().collect::<BTreeSet<_>>(), BTreeSet::from([0, 1, 2]));
        }
        assert!(deal(5, 0, 4).is_empty());
    }

    #[test]
    fn seats_are_lent_and_come_back() {
        // 10 of each, of which the first lends 6.
        let mut queues = queues(&[limits(10, 4, 20), limits(10, 10, 20)]);
        for id in 0..16 {
            assert!(matches!(queues.arrive(1, id, id, 1), Arrival::Runs(_)), "{id}");
        }
        assert!(matches!(queues.arrive(1, 16, 16, 1), Arrival::Waits(_)), "all that is lent is used");
        for id in 20..24 {
            assert!(matches!(queues.arrive(0, id, id, 1), Arrival::Runs(_)), "what is not lent is there at once");
        }
        assert!(matches!(queues.arrive(0, 24, 24, 1), Arrival::Waits(_)));
        assert_eq!(queues.next(), None);
        queues.finish(1, 0, 1, 0.1);
        assert_eq!(queues.next(), Some(24), "who uses less of his own comes first");
        queues.finish(1, 0, 1, 0.1);
        queues.finish(0, 0, 1, 0.1);
        assert_eq!(queues.next(), Some(16));
        assert_eq!(queues.next(), None);
    }

    #[test]
    fn a_flow_of_many_requests_does_not_starve_another() {
        let mut queues = queues(&[limits(1, 1, 1)]);
        // As they come out of a hash.
        let [many, few] = [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f];
        let place = match queues.arrive(0, 0, many, 1) {
            Arrival::Runs(queue) => queue,
            other => panic!("{other:?}"),
        };
        let mut places = BTreeMap::from([(0, place)]);
        let mut of_flow: BTreeMap<u64, u64> = BTreeMap::new();
        for id in 1..150 {
            if let Arrival::Waits(queue) = queues.arrive(0, id, many, 1) {
                places.insert(id, queue);
                of_flow.insert(id, 1);
            }
        }
        for id in 200..205 {
            let Arrival::Waits(queue) = queues.arrive(0, id, few, 1) else { panic!("{id}") };
            places.insert(id, queue);
            of_flow.insert(id, 2);
        }
        let mut running = 0;
        let mut order = Vec::new();
        for _ in 0..30 {
            queues.finish(0, places[&running], 1, 0.5);
            running = queues.next().unwrap();
            order.push(of_flow[&running]);
        }
        let others = order.iter().filter(|flow| **flow == 2).count();
        assert_eq!(others, 5, "{order:?}");
    }

    #[test]
    fn slow_requests_pay_for_it() {
        let mut queues =
            queues(&[Limits { queuing: Some(Queuing { queues: 2, hand: 1, length: 500 }), ..limits(1, 1, 1) }]);
        // Flow 0 has queue 0, flow 1 queue 1.
        assert_eq!(queues.arrive(0, 0, 0, 1), Arrival::Runs(0));
        for id in 1..200 {
            assert_eq!(queues.arrive(0, id, id % 2, 1), Arrival::Waits((id % 2) as usize));
        }
        let mut served = [0, 0];
        let mut running = 0_u64;
        for _ in 0..90 {
            let slow = running.is_multiple_of(2);
            queues.finish(0, (running % 2) as usize, 1, if slow { 4.0 } else { 1.0 });
            running = queues.next().unwrap();
            served[(running % 2) as usize] += 1;
        }
        assert!(served[1] >= 3 * served[0], "{served:?}");
    }

    #[test]
    fn full_queues_and_levels_without_queues() {
        let mut queues = queues(&[
            Limits { queuing: Some(Queuing { queues: 1, hand: 1, length: 2 }), ..limits(1, 1, 1) },
            Limits { queuing: None, ..limits(1, 1, 1) },
        ]);
        assert_eq!(queues.arrive(0, 0, 7, 1), Arrival::Runs(0));
        assert_eq!(queues.arrive(0, 1, 7, 1), Arrival::Waits(0));
        assert_eq!(queues.arrive(0, 2, 7, 1), Arrival::Waits(0));
        assert_eq!(queues.arrive(0, 3, 7, 1), Arrival::Full);
        assert!(queues.abandon(0, 0, 1) && !queues.abandon(0, 0, 1));
        assert_eq!(queues.arrive(0, 3, 7, 1), Arrival::Waits(0));
        assert_eq!(queues.arrive(1, 4, 7, 1), Arrival::Runs(0));
        assert_eq!(queues.arrive(1, 5, 7, 1), Arrival::Busy);
        assert_eq!(queues.set(vec![Limits { queuing: None, ..limits(1, 1, 1) }], 0), [2, 3]);
        assert_eq!(queues.load(0), (3, 0));
    }

    proptest! {
        #[test]
        fn whatever_comes_nothing_is_lost_and_no_limit_is_passed(
            steps in prop::collection::vec((0..5_u8, 0..3_usize, 0..8_u64, 1..4_u32), 1..300)
        ) {
            let levels = [limits(3, 1, 5), limits(4, 4, 4), Limits { queuing: None, ..limits(2, 0, 9) }];
            let mut queues = queues(&levels);
            let mut seats: BTreeMap<u64, (usize, usize, u32)> = BTreeMap::new();
            let (mut waiting, mut running) = (BTreeSet::new(), BTreeSet::new());
            for (id, (what, level, flow, width)) in (0_u64..).zip(steps) {
                match what {
                    0..=2 => match queues.arrive(level, id, flow, width.min(queues.widest(level))) {
                        Arrival::Runs(queue) => {
                            seats.insert(id, (level, queue, width.min(queues.widest(level))));
                            running.insert(id);
                        }
                        Arrival::Waits(queue) => {
                            seats.insert(id, (level, queue, width.min(queues.widest(level))));
                            waiting.insert(id);
                        }
                        Arrival::Full | Arrival::Busy => {}
                    },
                    3 => if let Some(ended) = running.pop_first() {
                        let (level, queue, width) = seats[&ended];
                        queues.finish(level, queue, width, 0.3);
                    },
                    _ => if let Some(tired) = waiting.pop_last() {
                        let (level, queue, _) = seats[&tired];
                        prop_assert!(queues.abandon(level, queue, tired));
                    },
                }
                while let Some(next) = queues.next() {
                    prop_assert!(waiting.remove(&next));
                    running.insert(next);
                }
                for (at, limits) in levels.iter().enumerate() {
                    let own = running.iter().map(|id| seats[id]).filter(|(level, ..)| *level == at);
                    let used: u32 = own.map(|(.., width)| width).sum();
                    let waits = waiting.iter().filter(|id| seats[id].0 == at).count();
                    prop_assert_eq!(queues.load(at), (used, waits));
                    prop_assert!(used <= limits.most);
                    prop_assert!(waits == 0 || used > 0, "a level with nothing to do lets nobody wait");
                }
            }
            while let Some(ended) = running.pop_first() {
                let (level, queue, width) = seats[&ended];
                queues.finish(level, queue, width, 0.3);
                while let Some(next) = queues.next() {
                    prop_assert!(waiting.remove(&next));
                    running.insert(next);
                }
            }
            prop_assert!(waiting.is_empty(), "everybody gets their turn");
        }
    }
}
