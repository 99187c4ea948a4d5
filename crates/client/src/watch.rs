//! Watches that are set up again.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use kube::runtime::utils::Backoff as Strategy;

/// The first pause.
const FIRST: Duration = Duration::from_millis(50);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(2);

/// How long a watch that broke waits before it is set up again: hardly at all the first time, since another server is
/// there, and never so long that a cluster that is back is missed. kube-rs waits 0.8 to 30 s, as client-go does.
/// To be used as `watcher(api, config).backoff(Backoff::default())`.
#[derive(Clone, Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { next: FIRST }
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.next;
        self.next = (pause * 2).min(LONGEST);
        // Half of it by chance: a thousand watches that broke together do not come back together.
        let chance = (RandomState::new().hash_one(0) % 1024) as f64 / 1024.0;
        Some(pause.mul_f64(0.5 + 0.5 * chance))
    }
}

impl Strategy for Backoff {
    fn reset(&mut self) {
        *self = Backoff::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_limit() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = backoff.by_ref().take(20).collect();
        assert!(pauses[0] >= FIRST / 2 && pauses[0] <= FIRST, "{pauses:?}");
        assert!(pauses.iter().all(|p| *p <= LONGEST) && pauses[19] >= LONGEST / 2, "{pauses:?}");
        backoff.reset();
        assert!(backoff.next().is_some_and(|p| p <= FIRST));
    }
}
