//! Back-off: after each failure twice the wait, up to a maximum, forgotten after a long quiet.

use std::{collections::HashMap, time::Duration};

use jiff::Timestamp;

/// Restarts of a crashing container and pulls of an image wait 10 s first, at most five minutes.
/// <https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#restart-policy>
pub const INITIAL: Duration = Duration::from_secs(10);
/// The longest wait.
pub const MAX: Duration = Duration::from_secs(300);
/// A container that ran this long starts over with the shortest wait.
const RESET_AFTER: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug)]
struct Entry {
    wait: Duration,
    updated: Timestamp,
}

/// The waits of several things, by name.
#[derive(Clone, Debug, Default)]
pub struct Backoffs(HashMap<String, Entry>);

impl Backoffs {
    /// When a thing that failed at `failed` may be tried again: `None` means now, for it has not failed before or not
    /// for long.
    pub fn until(&self, name: &str, failed: Timestamp) -> Option<Timestamp> {
        let entry = self.0.get(name)?;
        (failed.duration_since(entry.updated) <= jiff::SignedDuration::try_from(RESET_AFTER).ok()?)
            .then(|| failed + entry.wait)
    }

    /// The current wait, for messages.
    pub fn wait(&self, name: &str) -> Duration {
        self.0.get(name).map_or(INITIAL, |e| e.wait)
    }

    /// Notes that a thing is tried again now, after a failure at `failed`: the next wait is longer.
    pub fn next(&mut self, name: &str, failed: Timestamp, now: Timestamp) {
        let wait = match (self.until(name, failed), self.0.get(name)) {
            (Some(_), Some(entry)) => (entry.wait * 2).min(MAX),
            _ => INITIAL,
        };
        self.0.insert(name.to_owned(), Entry { wait, updated: now });
    }

    /// Forgets a thing that succeeded.
    pub fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_then_resets() {
        let mut b = Backoffs::default();
        let t = |s: i64| Timestamp::from_second(1000 + s).unwrap();
        assert_eq!(b.until("a", t(0)), None);
        b.next("a", t(0), t(0));
        let mut failed = t(1);
        for wait in [10, 20, 40, 80, 160, 300, 300] {
            let until = b.until("a", failed).unwrap();
            assert_eq!(until, failed + Duration::from_secs(wait));
            b.next("a", failed, until);
            failed = until + Duration::from_secs(1);
        }
        // It ran for eleven minutes: the next restart is immediate again.
        let later = failed + Duration::from_secs(660);
        assert_eq!(b.until("a", later), None);
        b.next("a", later, later);
        assert_eq!(b.wait("a"), INITIAL);
        b.forget("a");
        assert_eq!(b.until("a", later), None);
    }
}
