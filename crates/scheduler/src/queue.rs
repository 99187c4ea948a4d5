//! Which pod is next: by priority, then by age; those that failed wait, those that fit nowhere wait for a change.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use crate::pod::PodInfo;

const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

/// Where a pod stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// It can be tried now.
    Active,
    /// It can be tried from then on.
    Backoff(Instant),
    /// It fits nowhere; tried again at the latest then, or when something changes.
    Parked(Instant),
    /// It has been taken out to be tried.
    Taken,
}

struct Waiting {
    pod: Arc<PodInfo>,
    place: Place,
    attempts: u32,
    number: u64,
}

/// The queue.
pub struct Queue {
    waiting: HashMap<String, Waiting>,
    /// Those that can be tried: largest priority, then first come.
    active: BTreeSet<(std::cmp::Reverse<i32>, u64, String)>,
    /// Those that wait for a time.
    timed: BTreeSet<(Instant, String)>,
    /// Of those, the ones that a change would do as well.
    parked: BTreeSet<String>,
    retry: Duration,
    number: u64,
    /// Something changed while a pod was being tried: what was decided may be out of date.
    changed: bool,
}

impl Queue {
    /// An empty queue.
    pub fn new(retry: Duration) -> Queue {
        Queue {
            waiting: HashMap::new(),
            active: BTreeSet::new(),
            timed: BTreeSet::new(),
            parked: BTreeSet::new(),
            retry,
            number: 0,
            changed: false,
        }
    }

    /// Adds a pod, or takes note of a change of one that waits.
    pub fn push(&mut self, pod: Arc<PodInfo>, _now: Instant) {
        if let Some(waiting) = self.waiting.get_mut(&pod.uid) {
            let before = std::mem::replace(&mut waiting.pod, pod.clone());
            let relevant = before.labels != pod.labels
                || before.tolerations != pod.tolerations
                || before.gated != pod.gated
                || (before.nominated.is_some() && pod.nominated.is_none());
            let parked = matches!(waiting.place, Place::Parked(_));
            if before.priority != pod.priority && waiting.place == Place::Active {
                self.active.remove(&(std::cmp::Reverse(before.priority), waiting.number, pod.uid.clone()));
                self.set(&pod.uid, Place::Active);
            } else if relevant && parked {
                self.set(&pod.uid, Place::Active);
            }
            return;
        }
        self.number += 1;
        let uid = pod.uid.clone();
        self.waiting.insert(uid.clone(), Waiting { pod, place: Place::Taken, attempts: 0, number: self.number });
        self.set(&uid, Place::Active);
    }

    /// Moves a pod to another place.
    fn set(&mut self, uid: &str, place: Place) {
        let Some(waiting) = self.waiting.get_mut(uid) else { return };
        match std::mem::replace(&mut waiting.place, place) {
            Place::Active => {
                self.active.remove(&(std::cmp::Reverse(waiting.pod.priority), waiting.number, uid.to_owned()));
            }
            Place::Backoff(at) | Place::Parked(at) => {
                self.timed.remove(&(at, uid.to_owned()));
                self.parked.remove(uid);
            }
            Place::Taken => {}
        }
        match place {
            Place::Active => {
                self.active.insert((std::cmp::Reverse(waiting.pod.priority), waiting.number, uid.to_owned()));
            }
            Place::Backoff(at) => {
                self.timed.insert((at, uid.to_owned()));
            }
            Place::Parked(at) => {
                self.timed.insert((at, uid.to_owned()));
                self.parked.insert(uid.to_owned());
            }
            Place::Taken => {}
        }
    }

    /// A pod that waits, as it was last seen.
    pub fn get(&self, uid: &str) -> Option<&Arc<PodInfo>> {
        self.waiting.get(uid).map(|w| &w.pod)
    }

    /// Forgets a pod.
    pub fn remove(&mut self, uid: &str) {
        self.set(uid, Place::Taken);
        self.waiting.remove(uid);
    }

    /// Everything that waits.
    pub fn uids(&self) -> Vec<String> {
        self.waiting.keys().cloned().collect()
    }

    fn wake(&mut self, now: Instant) {
        while let Some((_, uid)) = self.timed.first().filter(|(at, _)| *at <= now).cloned() {
            self.set(&uid, Place::Active);
        }
    }

    /// Whether a pod can be tried now.
    pub fn has_ready(&mut self, now: Instant) -> bool {
        self.wake(now);
        !self.active.is_empty()
    }

    /// When the next pod can be tried; `None` if none waits.
    pub fn next_wake(&self, now: Instant) -> Option<Instant> {
        if !self.active.is_empty() {
            return Some(now);
        }
        self.timed.first().map(|(at, _)| *at)
    }

    /// Takes the next pod.
    pub fn pop(&mut self, now: Instant) -> Option<Arc<PodInfo>> {
        self.wake(now);
        let (_, _, uid) = self.active.first().cloned()?;
        self.changed = false;
        self.set(&uid, Place::Taken);
        let waiting = self.waiting.get_mut(&uid)?;
        waiting.attempts += 1;
        Some(waiting.pod.clone())
    }

    fn backoff(&self, uid: &str) -> Duration {
        let attempts = self.waiting.get(uid).map_or(1, |w| w.attempts);
        (FIRST_BACKOFF * 2u32.saturating_pow(attempts.saturating_sub(1).min(8))).min(LONGEST_BACKOFF)
    }

    /// A pod that fits nowhere waits for a change.
    pub fn park(&mut self, pod: Arc<PodInfo>, now: Instant) {
        let place = match self.changed {
            true => Place::Backoff(now + self.backoff(&pod.uid)),
            false => Place::Parked(now + self.retry),
        };
        self.set(&pod.uid, place);
    }

    /// A pod that waits is tried again after its back-off.
    pub fn retry_waiting(&mut self, uid: &str, now: Instant) {
        let place = Place::Backoff(now + self.backoff(uid));
        if self.parked.contains(uid) {
            self.set(uid, place);
        }
    }

    /// A pod whose binding failed is tried again after a while.
    pub fn retry(&mut self, pod: Arc<PodInfo>, now: Instant) {
        let place = Place::Backoff(now + self.backoff(&pod.uid));
        let uid = pod.uid.clone();
        if !self.waiting.contains_key(&uid) {
            self.number += 1;
            self.waiting.insert(uid.clone(), Waiting { pod, place: Place::Taken, attempts: 1, number: self.number });
        }
        self.set(&uid, place);
    }

    /// A node or a pod came, went or changed: what fitted nowhere may fit now. A pod that has just failed waits out its
    /// back-off first.
    pub fn something_changed(&mut self, now: Instant) {
        self.changed = true;
        for uid in std::mem::take(&mut self.parked) {
            let first = self.waiting.get(&uid).is_some_and(|w| w.attempts <= 1);
            // The usual case is the first: a node that has just joined is used at once.
            let place = if first { Place::Active } else { Place::Backoff(now + self.backoff(&uid)) };
            self.set(&uid, place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, priority: i32) -> Arc<PodInfo> {
        Arc::new(PodInfo { uid: uid.into(), priority, ..Default::default() })
    }

    fn next(queue: &mut Queue, now: Instant) -> Option<String> {
        queue.pop(now).map(|p| p.uid.clone())
    }

    #[tokio::test(start_paused = true)]
    async fn priority_then_age() {
        let (mut queue, now) = (Queue::new(Duration::from_secs(300)), Instant::now());
        for (uid, priority) in [("a", 0), ("b", 10), ("c", 0)] {
            queue.push(pod(uid, priority), now);
        }
        assert_eq!(
            [next(&mut queue, now), next(&mut queue, now), next(&mut queue, now), next(&mut queue, now)],
            [Some("b".into()), Some("a".into()), Some("c".into()), None]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_fits_nowhere_waits_for_a_change() {
        let (mut queue, now) = (Queue::new(Duration::from_secs(300)), Instant::now());
        queue.push(pod("a", 0), now);
        let taken = queue.pop(now).unwrap();
        queue.park(taken, now);
        assert!(!queue.has_ready(now + Duration::from_secs(299)));
        queue.something_changed(now);
        assert_eq!(next(&mut queue, now), Some("a".into()));
        // The second time it waits out its back-off, even if much changes.
        queue.park(pod("a", 0), now);
        queue.something_changed(now);
        assert!(!queue.has_ready(now));
        assert!(queue.has_ready(now + Duration::from_secs(2)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_during_the_decision_is_not_lost() {
        let (mut queue, now) = (Queue::new(Duration::from_secs(300)), Instant::now());
        queue.push(pod("a", 0), now);
        let taken = queue.pop(now).unwrap();
        queue.something_changed(now);
        queue.park(taken, now);
        assert!(queue.has_ready(now + Duration::from_secs(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_gone_is_forgotten() {
        let (mut queue, now) = (Queue::new(Duration::from_secs(300)), Instant::now());
        queue.push(pod("a", 0), now);
        queue.remove("a");
        assert_eq!(next(&mut queue, now), None);
        assert_eq!(queue.next_wake(now), None);
    }
}
