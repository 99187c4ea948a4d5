//! A work queue: each key at most once in it, and with at most one worker; failures come back later and later.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::Key;

/// Upstream's rate limiter begins here too (client-go, `DefaultTypedControllerRateLimiter`); its largest delay is 1000 s,
/// which nobody wants to wait for, so ours is a minute.
const FIRST_DELAY: Duration = Duration::from_millis(5);
const LAST_DELAY: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Inner {
    ready: VecDeque<Key>,
    /// In `ready`, or to be put there when its worker is done.
    dirty: HashSet<Key>,
    processing: HashSet<Key>,
    delayed: BTreeMap<(Instant, u64), Key>,
    delayed_at: HashMap<Key, (Instant, u64)>,
    failures: HashMap<Key, u32>,
    sequence: u64,
}

/// The keys that a controller has to look at.
#[derive(Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    wake: Notify,
}

impl Queue {
    /// An empty queue.
    pub fn new() -> Queue {
        Queue::default()
    }

    /// Asks for a look at `key`.
    pub fn add(&self, key: Key) {
        if self.inner.lock().add(key) {
            self.wake.notify_one();
        }
    }

    /// Asks for a look at `key` in a while. An earlier appointment stands.
    pub fn add_after(&self, key: Key, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        self.inner.lock().add_at(key, Instant::now() + delay);
        self.wake.notify_one();
    }

    /// Asks for another look after a failure, and returns how many there have been.
    pub fn retry(&self, key: Key) -> u32 {
        let failures = {
            let mut inner = self.inner.lock();
            let failures = inner.failures.entry(key.clone()).or_default();
            *failures = failures.saturating_add(1);
            *failures
        };
        self.add_after(key, FIRST_DELAY.saturating_mul(1 << (failures - 1).min(16)).min(LAST_DELAY));
        failures
    }

    /// The key's last look was a success.
    pub fn forget(&self, key: &Key) {
        self.inner.lock().failures.remove(key);
    }

    /// The next key to look at. Call [`Queue::done`] afterwards.
    pub async fn next(&self) -> Key {
        loop {
            let woken = self.wake.notified();
            let wait = {
                let mut inner = self.inner.lock();
                inner.take_due(Instant::now());
                if let Some(key) = inner.ready.pop_front() {
                    inner.dirty.remove(&key);
                    inner.processing.insert(key.clone());
                    // One notification may stand for several keys.
                    if !inner.ready.is_empty() {
                        self.wake.notify_one();
                    }
                    return key;
                }
                inner.delayed.first_key_value().map(|((at, _), _)| *at)
            };
            match wait {
                Some(at) => {
                    let _ = tokio::time::timeout_at(at, woken).await;
                }
                None => woken.await,
            }
        }
    }

    /// The look at `key` is over.
    pub fn done(&self, key: &Key) {
        let mut inner = self.inner.lock();
        inner.processing.remove(key);
        if inner.dirty.contains(key) {
            inner.ready.push_back(key.clone());
            drop(inner);
            self.wake.notify_one();
        }
    }

    /// How many keys wait.
    pub fn len(&self) -> usize {
        self.inner.lock().ready.len()
    }

    /// Whether no key waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Inner {
    fn add(&mut self, key: Key) -> bool {
        if !self.dirty.insert(key.clone()) || self.processing.contains(&key) {
            return false;
        }
        self.ready.push_back(key);
        true
    }

    fn add_at(&mut self, key: Key, at: Instant) {
        if let Some(old) = self.delayed_at.get(&key).copied() {
            if old.0 <= at {
                return;
            }
            self.delayed.remove(&old);
        }
        self.sequence += 1;
        let slot = (at, self.sequence);
        self.delayed_at.insert(key.clone(), slot);
        self.delayed.insert(slot, key);
    }

    fn take_due(&mut self, now: Instant) {
        while let Some(entry) = self.delayed.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let key = entry.remove();
            self.delayed_at.remove(&key);
            self.add(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new("", name)
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_is_queued_once_and_worked_on_by_one() {
        let queue = Queue::new();
        queue.add(key("a"));
        queue.add(key("a"));
        queue.add(key("b"));
        assert_eq!(queue.next().await, key("a"));
        queue.add(key("a"));
        assert_eq!(queue.next().await, key("b"));
        assert!(tokio::time::timeout(Duration::from_secs(1), queue.next()).await.is_err(), "a is being worked on");
        queue.done(&key("a"));
        assert_eq!(queue.next().await, key("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_come_back_later_and_later() {
        let queue = Queue::new();
        let mut delays = Vec::new();
        for _ in 0..20 {
            let start = Instant::now();
            queue.retry(key("a"));
            let next = queue.next().await;
            queue.done(&next);
            delays.push(start.elapsed());
        }
        assert_eq!(delays[0], FIRST_DELAY);
        assert_eq!(delays[3], FIRST_DELAY * 8);
        assert_eq!(delays[19], LAST_DELAY);
        queue.forget(&key("a"));
        assert_eq!(queue.retry(key("a")), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_earliest_appointment_counts() {
        let queue = Queue::new();
        let start = Instant::now();
        queue.add_after(key("a"), Duration::from_secs(10));
        queue.add_after(key("a"), Duration::from_secs(2));
        queue.add_after(key("a"), Duration::from_secs(5));
        assert_eq!(queue.next().await, key("a"));
        assert_eq!(start.elapsed(), Duration::from_secs(2));
        queue.done(&key("a"));
        assert!(tokio::time::timeout(Duration::from_secs(60), queue.next()).await.is_err());
    }
}
