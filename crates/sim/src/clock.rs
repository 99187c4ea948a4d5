//! Virtual time: what happens, in order.

use std::{cmp::Reverse, collections::BinaryHeap, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng};

struct Planned<E> {
    at: Duration,
    /// What was planned first happens first.
    order: u64,
    what: E,
}

impl<E> PartialEq for Planned<E> {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl<E> Eq for Planned<E> {}

impl<E> PartialOrd for Planned<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Planned<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// A clock, and what is going to happen.
pub struct Clock<E> {
    now: Duration,
    queue: BinaryHeap<Reverse<Planned<E>>>,
    order: u64,
    /// The only source of chance.
    pub random: StdRng,
}

impl<E> Clock<E> {
    /// At zero, with nothing planned.
    pub fn new(seed: u64) -> Clock<E> {
        Clock { now: Duration::ZERO, queue: BinaryHeap::new(), order: 0, random: StdRng::seed_from_u64(seed) }
    }

    /// The time.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Plans something for later.
    pub fn after(&mut self, delay: Duration, what: E) {
        self.at(self.now + delay, what);
    }

    /// Plans something for an instant, which is not in the past.
    pub fn at(&mut self, at: Duration, what: E) {
        self.order += 1;
        self.queue.push(Reverse(Planned { at: at.max(self.now), order: self.order, what }));
    }

    /// The next thing, unless it is after `end`. Time is then what it was planned for.
    pub fn next(&mut self, end: Duration) -> Option<E> {
        if self.queue.peek()?.0.at > end {
            return None;
        }
        let Reverse(next) = self.queue.pop()?;
        self.now = next.at;
        Some(next.what)
    }

    /// A time between two, in milliseconds.
    pub fn between(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_micros(self.random.random_range(low * 1000..=high * 1000))
    }

    /// Whether something that happens this often in a hundred times happens.
    pub fn percent(&mut self, chance: u32) -> bool {
        self.random.random_range(0..100) < chance
    }
}
