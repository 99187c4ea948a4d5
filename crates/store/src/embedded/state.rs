//! What the store knows: the current entries, and the events since the last compaction. No disk, no clock.

use std::{
    collections::VecDeque,
    ops::Bound::{Excluded, Included, Unbounded},
    sync::Arc,
};

use imbl::OrdMap;

use crate::{Entry, Error, Event, Listing, Progress, Result, Revision};

/// Current entries by key.
pub(super) type Map = OrdMap<Arc<str>, Entry>;

/// The revision of a store to which nothing has been written. It is 1, as in etcd: Kubernetes gives
/// `resourceVersion=0` a meaning of its own, so no list may carry it.
pub(super) const EMPTY: u64 = 1;

/// A map is kept for every so many events, so that an older revision is found by applying at most that many. Each costs
/// what has changed since the one before, which soon is the whole map.
const CHECKPOINT_EVERY: u64 = 4096;

/// About how many bytes an event occupies besides its key and what it took the place of: itself, and its share of the maps
/// that are kept.
const OVERHEAD: usize = 400;

/// A step of a watch looks at no more events than this, so that it holds the lock only briefly.
const STEP: usize = 2048;

/// The entries now, and enough of the past to list and watch from `oldest`.
pub(super) struct State {
    map: Map,
    revision: u64,
    /// Nothing older can be read. 0 as long as all history is there.
    oldest: u64,
    /// `history[i]` is the event of revision `base + 1 + i`.
    base: u64,
    history: VecDeque<Past>,
    history_bytes: usize,
    history_limit: usize,
    /// Maps as they were at some revisions, ascending. The first is at `base`.
    checkpoints: VecDeque<(u64, Map)>,
}

/// An event of the history.
struct Past {
    event: Event,
    /// About how many bytes are in memory because of it.
    weight: usize,
}

impl State {
    pub(super) fn new(history_limit: usize) -> State {
        State::from_snapshot(Map::new(), EMPTY, 0, history_limit)
    }

    /// The state as it was at `revision`, with no history before it.
    pub(super) fn from_snapshot(map: Map, revision: u64, oldest: u64, history_limit: usize) -> State {
        State {
            checkpoints: VecDeque::from([(revision, map.clone())]),
            map,
            revision,
            oldest,
            base: revision,
            history: VecDeque::new(),
            history_bytes: 0,
            history_limit,
        }
    }

    pub(super) fn history_limit(&self) -> usize {
        self.history_limit
    }

    pub(super) fn map(&self) -> Map {
        self.map.clone()
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn oldest(&self) -> u64 {
        self.oldest
    }

    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.map.get(key)
    }

    /// Takes the events of a batch, in order and each with what [`apply`] said, and the map that they lead to.
    pub(super) fn publish(&mut self, events: Vec<(Event, usize)>, map: Map) {
        for (event, replaced) in events {
            self.remember(event, replaced);
        }
        self.map = map;
        self.checkpoint();
    }

    /// Takes one event, as when the log is read.
    pub(super) fn replay(&mut self, event: Event) {
        let replaced = apply(&mut self.map, &event);
        self.remember(event, replaced);
        self.checkpoint();
    }

    fn remember(&mut self, event: Event, replaced: usize) {
        assert_eq!(event.revision().0, self.revision + 1, "every write takes the next revision");
        self.revision += 1;
        let weight = OVERHEAD + event.key().len() + replaced;
        self.history_bytes += weight;
        self.history.push_back(Past { event, weight });
    }

    fn checkpoint(&mut self) {
        if self.checkpoints.back().is_none_or(|(at, _)| self.revision >= at + CHECKPOINT_EVERY) {
            self.checkpoints.push_back((self.revision, self.map.clone()));
        }
        if self.history_bytes > self.history_limit {
            // A quarter at a time: cutting costs the rebuilding of a map.
            let (mut bytes, mut at) = (self.history_bytes, self.base);
            for past in &self.history {
                if bytes <= self.history_limit / 4 * 3 {
                    break;
                }
                bytes -= past.weight;
                at += 1;
            }
            self.compact(at);
        }
    }

    /// Forgets everything before `at`.
    pub(super) fn compact(&mut self, at: u64) {
        if at <= self.oldest || at > self.revision {
            return;
        }
        self.oldest = at;
        if at <= self.base {
            return;
        }
        let map = self.view_unchecked(at).into_map();
        while self.checkpoints.front().is_some_and(|(revision, _)| *revision <= at) {
            self.checkpoints.pop_front();
        }
        self.checkpoints.push_front((at, map));
        for past in self.history.drain(..(at - self.base) as usize) {
            self.history_bytes -= past.weight;
        }
        self.base = at;
    }

    /// What is needed to read at `at` (or now), to be evaluated without holding a lock.
    pub(super) fn view(&self, at: Option<Revision>) -> Result<View> {
        let at = at.map_or(self.revision, |at| at.0);
        if at > self.revision {
            return Err(Error::Future { requested: Revision(at), newest: Revision(self.revision) });
        }
        if at < self.oldest {
            return Err(Error::Compacted { requested: Revision(at), oldest: Revision(self.oldest) });
        }
        Ok(self.view_unchecked(at))
    }

    fn view_unchecked(&self, at: u64) -> View {
        if at == self.revision {
            return View { map: self.map.clone(), replay: Vec::new(), revision: at };
        }
        let next = self.checkpoints.partition_point(|(revision, _)| *revision <= at);
        match next.checked_sub(1).and_then(|index| self.checkpoints.get(index)) {
            Some((revision, map)) => {
                let skip = (revision - self.base) as usize;
                let replay =
                    self.history.range(skip..(at - self.base) as usize).map(|past| past.event.clone()).collect();
                View { map: map.clone(), replay, revision: at }
            }
            // Before the first checkpoint, and not compacted: the empty store that everything began with.
            None => View { map: Map::new(), replay: Vec::new(), revision: at },
        }
    }

    /// Whether a watch may begin after `after`, and the cursor with which it does.
    pub(super) fn check_watch(&self, after: Revision) -> Result<u64> {
        if after.0 > self.revision {
            return Err(Error::Future { requested: after, newest: Revision(self.revision) });
        }
        if after.0 < self.oldest {
            return Err(Error::Compacted { requested: after, oldest: Revision(self.oldest) });
        }
        Ok(after.0.max(self.base))
    }

    /// The next events after `cursor` under `prefix`, and how far they reach.
    pub(super) fn read_after(&self, cursor: u64, prefix: &str) -> Result<Progress> {
        if cursor < self.base {
            return Err(Error::Lagged { at: Revision(cursor) });
        }
        let from = (cursor - self.base) as usize;
        let to = self.history.len().min(from + STEP);
        let events = self.history.range(from..to).map(|past| &past.event);
        let events = events.filter(|event| event.key().starts_with(prefix)).cloned().collect();
        Ok(Progress { events, revision: Revision(self.base + to as u64) })
    }
}

/// A map, and the events that lead from it to the revision asked for.
pub(super) struct View {
    map: Map,
    replay: Vec<Event>,
    revision: u64,
}

impl View {
    pub(super) fn into_map(mut self) -> Map {
        for event in &self.replay {
            apply(&mut self.map, event);
        }
        self.map
    }

    pub(super) fn list(self, prefix: &str, after: Option<&str>, limit: usize) -> Listing {
        let revision = Revision(self.revision);
        let map = self.into_map();
        let start = match after {
            Some(after) if after >= prefix => Excluded(after),
            _ => Included(prefix),
        };
        let limit = if limit == 0 { usize::MAX } else { limit };
        let mut found =
            map.range::<_, str>((start, Unbounded)).map(|(_, entry)| entry).take_while(|e| e.key.starts_with(prefix));
        let entries = found.by_ref().take(limit).cloned().collect();
        let more = found.next().is_some();
        Listing { entries, revision, more }
    }
}

/// What an event does to the current entries. Returns how many bytes it took the place of, which only history needs now.
pub(super) fn apply(map: &mut Map, event: &Event) -> usize {
    let old = match event {
        Event::Put(entry) => map.insert(entry.key.clone(), entry.clone()),
        Event::Delete { key, .. } => map.remove(key.as_ref()),
    };
    old.map_or(0, |old| old.value.len())
}
