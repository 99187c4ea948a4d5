//! When the node is short of something, and when pods have to go for it. Pure; as upstream's eviction manager decides
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/>).

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use crate::pressure::{Grace, Least, Level, Levels, Pressure, Reclaim, Signal, Thresholds};

/// What was said about evictions.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Passed for a moment, pods go at once.
    pub hard: Thresholds,
    /// Passed for the grace period, pods go in their own time.
    pub soft: Thresholds,
    /// For how long a soft threshold has to be passed.
    pub grace: Grace,
    /// The longest that a pod has to end when a soft threshold was passed.
    pub max_pod_grace: Duration,
    /// How much more has to be had.
    pub reclaim: Reclaim,
    /// How long a condition stays after its cause.
    pub transition: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            hard: Thresholds::default(),
            soft: Thresholds(BTreeMap::new()),
            grace: Grace::default(),
            max_pod_grace: Duration::ZERO,
            reclaim: Reclaim::default(),
            transition: Duration::from_secs(300),
        }
    }
}

/// Settings that contradict one another.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("--eviction-soft {0}: for how long it has to hold is missing: add --eviction-soft-grace-period {0}=TIME")]
pub struct NoGrace(pub &'static str);

impl Settings {
    /// # Errors
    /// If a soft threshold has no grace period, as upstream.
    pub fn check(&self) -> Result<(), NoGrace> {
        match self.soft.0.keys().find(|signal| !self.grace.0.contains_key(signal)) {
            Some(signal) => Err(NoGrace(signal.name())),
            None => Ok(()),
        }
    }
}

/// A threshold that is passed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Passed {
    /// Of what.
    pub signal: Signal,
    /// Whether pods go at once.
    pub hard: bool,
    /// How little may be left, in bytes or as a count.
    pub least: u64,
    /// How much is.
    pub level: Level,
}

/// What follows from one look.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdict {
    /// The node's conditions.
    pub pressure: Pressure,
    /// For what a pod has to go.
    pub relieve: Option<Passed>,
}

/// What is remembered from one look to the next.
#[derive(Debug, Default)]
pub struct State {
    /// Thresholds that are passed, with the moment at which they were first.
    since: BTreeMap<(Signal, bool), Instant>,
    /// When each was passed last.
    last: BTreeMap<Signal, Instant>,
}

impl State {
    /// Looks at levels.
    pub fn step(&mut self, settings: &Settings, levels: &Levels, now: Instant) -> Verdict {
        let mut passed = Vec::new();
        for (hard, thresholds) in [(true, &settings.hard), (false, &settings.soft)] {
            for (signal, least) in &thresholds.0 {
                let key = (*signal, hard);
                let Some(level) = levels.get(signal) else { continue };
                let least = least.of(level.capacity);
                // Once passed it takes more, so that it is not passed again in a moment.
                let more = settings.reclaim.0.get(signal).map_or(0, |more: &Least| more.of(level.capacity));
                let bar = if self.since.contains_key(&key) { least.saturating_add(more) } else { least };
                if level.available < bar {
                    self.since.entry(key).or_insert(now);
                    self.last.insert(*signal, now);
                    passed.push(Passed { signal: *signal, hard, least, level: *level });
                } else {
                    self.since.remove(&key);
                }
            }
        }
        let holds = |signal: Signal| {
            self.last
                .get(&signal)
                .is_some_and(|last| *last == now || now.saturating_duration_since(*last) < settings.transition)
        };
        let pressure = Pressure {
            memory: holds(Signal::Memory),
            disk: holds(Signal::Disk) || holds(Signal::Inodes),
            pids: holds(Signal::Pids),
        };
        let is_due = |passed: &&Passed| {
            let grace = if passed.hard { None } else { settings.grace.0.get(&passed.signal) };
            let since = self.since.get(&(passed.signal, passed.hard)).copied().unwrap_or(now);
            now.saturating_duration_since(since) >= grace.copied().unwrap_or_default()
        };
        // Memory first, and what is hard before what is soft.
        let relieve = passed.iter().filter(is_due).min_by_key(|passed| (passed.signal, !passed.hard)).copied();
        Verdict { pressure, relieve }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            hard: "memory.available<100,nodefs.available<10%".parse().unwrap(),
            soft: "memory.available<200".parse().unwrap(),
            grace: "memory.available=30s".parse().unwrap(),
            reclaim: "memory.available=50".parse().unwrap(),
            transition: Duration::from_secs(60),
            ..Default::default()
        }
    }

    /// Looks at what is left of memory and disk, each of 1000, at these seconds; for each what is said to be short and what
    /// pods go for.
    async fn check(looks: &[(u64, u64, u64, &str)]) {
        let (mut state, start) = (State::default(), Instant::now());
        for (seconds, memory, disk, expect) in looks {
            let level = |available: u64| Level { available, capacity: 1000 };
            let levels = Levels::from([(Signal::Memory, level(*memory)), (Signal::Disk, level(*disk))]);
            let verdict = state.step(&settings(), &levels, start + Duration::from_secs(*seconds));
            let mut said = String::new();
            for (holds, letter) in [(verdict.pressure.memory, 'm'), (verdict.pressure.disk, 'd')] {
                said.extend(holds.then_some(letter));
            }
            if let Some(passed) = verdict.relieve {
                let kind = if passed.hard { "hard" } else { "soft" };
                said.push_str(&format!(" {} {kind}", passed.signal.name()));
            }
            assert_eq!(said, *expect, "at {seconds} s: memory {memory}, disk {disk}");
        }
    }

    #[tokio::test]
    async fn hard_thresholds() {
        check(&[
            (0, 500, 500, ""),
            (10, 99, 500, "m memory.available hard"),
            // With a minimum to reclaim it is not enough to be just over it.
            (20, 120, 500, "m memory.available hard"),
            (30, 150, 500, "m"),
            (49, 120, 500, "m memory.available soft"),
            (50, 500, 99, "md nodefs.available hard"),
            (55, 99, 99, "md memory.available hard"),
            (60, 500, 100, "md"),
            // The condition stays for the transition period.
            (114, 500, 100, "md"),
            (116, 500, 500, ""),
        ])
        .await;
    }

    #[tokio::test]
    async fn soft_thresholds() {
        check(&[
            (0, 150, 500, "m"),
            (29, 150, 500, "m"),
            // It was not short for a moment: the time begins anew.
            (29, 250, 500, "m"),
            (30, 150, 500, "m"),
            (59, 150, 500, "m"),
            (60, 150, 500, "m memory.available soft"),
            (61, 50, 500, "m memory.available hard"),
        ])
        .await;
    }

    #[test]
    fn settings_belong_together() {
        assert_eq!(settings().check(), Ok(()));
        let without = Settings { grace: Grace::default(), ..settings() };
        assert_eq!(without.check(), Err(NoGrace("memory.available")));
    }
}
