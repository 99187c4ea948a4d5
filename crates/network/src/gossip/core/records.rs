//! Those of whom something is found out, with the number of those who are under suspicion at hand: every judgement asks
//! for it.

use std::{collections::BTreeMap, time::Duration};

use crate::gossip::{
    id::Key,
    judge::{Record, State},
};

/// The records of members that are suspected, dead or have left.
#[derive(Default)]
pub(super) struct Records {
    all: BTreeMap<Key, Record>,
    suspected: usize,
}

fn suspected(record: &Record) -> usize {
    usize::from(record.state == State::Suspected)
}

impl Records {
    pub(super) fn get(&self, key: Key) -> Option<&Record> {
        self.all.get(&key)
    }

    /// Its state is changed by [`Records::set_state`] alone.
    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut Record> {
        self.all.get_mut(&key)
    }

    pub(super) fn contains(&self, key: Key) -> bool {
        self.all.contains_key(&key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = Key> {
        self.all.keys().copied()
    }

    pub(super) fn insert(&mut self, key: Key, record: Record) {
        self.suspected += suspected(&record);
        let before = self.all.insert(key, record);
        self.suspected -= before.as_ref().map_or(0, suspected);
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<Record> {
        let record = self.all.remove(&key)?;
        self.suspected -= suspected(&record);
        Some(record)
    }

    /// Whether it had another one before.
    pub(super) fn set_state(&mut self, key: Key, state: State) -> bool {
        let Some(record) = self.all.get_mut(&key) else { return false };
        self.suspected -= suspected(record);
        let changed = std::mem::replace(&mut record.state, state) != state;
        self.suspected += suspected(record);
        changed
    }

    /// How many are under suspicion.
    pub(super) fn suspected(&self) -> usize {
        self.suspected
    }

    /// Nobody is judged by what was before that.
    pub(super) fn judged_from(&mut self, from: Duration) {
        for record in self.all.values_mut() {
            record.from = from;
        }
    }

    /// One that is under suspicion and is such a one: the first from `start` on.
    pub(super) fn suspected_from(&mut self, start: Key, such: impl Fn(&Record) -> bool) -> Option<&mut Record> {
        if self.suspected == 0 {
            return None;
        }
        let such = |(_, record): &(&Key, &Record)| record.state == State::Suspected && such(record);
        let found = self.all.range(start..).find(such).or_else(|| self.all.range(..start).find(such));
        let key = found.map(|(key, _)| *key)?;
        self.all.get_mut(&key)
    }

    /// Some of those who are dead: as many, beginning with the first from `start` on.
    pub(super) fn dead(&self, start: Key, but: Key, count: usize) -> impl Iterator<Item = &Record> {
        let all = self.all.range(start..).chain(self.all.range(..start));
        let dead = all.filter(move |(key, record)| record.state == State::Dead && **key != but);
        dead.map(|(_, record)| record).take(count)
    }
}
