//! Fencing: a node that is cut off stops what must not run twice, before anybody starts it elsewhere.
//!
//! The node's side is [`Fence`]. A node that renews its Lease may run such pods until some time after it *sent* the last
//! renewal that succeeded. When that time is over, an *epoch* ends: everything guarded has to stop, and none of it may run
//! again on the strength of a renewal alone, for others may have acted meanwhile. Each pod needs a *permit* of the new
//! epoch: a write to its object, made after a renewal of this epoch succeeded. The write fails if the object is gone, and
//! makes a deletion fail that was decided on before it.
//!
//! The other side is [`Heard`] and [`wait`]: how long a Lease has been as it is, by the clock of whoever looks, and how long
//! it must have been so before the node's pods have stopped.
//!
//! Neither side compares its clock with the other's. They only have to run about equally fast.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

/// A point of monotonic time: how long since some instant that the caller chose. On a node it has to go on while the
/// machine is suspended.
pub type Instant = Duration;

/// How many epochs a node has had.
pub type Epoch = u64;

/// What happened on the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed.
    Tick,
    /// The Lease was renewed.
    Renewed {
        /// When the request for it was sent, which is what counts.
        sent: Instant,
    },
    /// A pod must not run twice.
    Guard {
        /// Its uid.
        uid: String,
        /// It runs already, as one that might, and goes on.
        running: bool,
    },
    /// The pod's object was written to, after [`Effect::Ask`].
    Permitted {
        /// The pod's uid.
        uid: String,
        /// The epoch of the question.
        epoch: Epoch,
    },
    /// Nothing is left of a pod, or it may run twice after all.
    Forget {
        /// Its uid.
        uid: String,
    },
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// This pod has to stop, now.
    Stop(String),
    /// Write to the pod's object; if that succeeds, it is [`Event::Permitted`].
    Ask {
        /// The pod's uid.
        uid: String,
        /// The epoch that the permit is for.
        epoch: Epoch,
    },
}

/// What a node may run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    after: Duration,
    /// When the last renewal of this epoch was sent; none while nothing may run.
    renewed: Option<Instant>,
    epoch: Epoch,
    /// The pods that must not run twice, and the epochs of their permits.
    pods: BTreeMap<String, Option<Epoch>>,
}

impl Fence {
    /// Nothing may run yet. Pods stop when no renewal was sent for `after`.
    pub fn new(after: Duration) -> Fence {
        Fence { after, renewed: None, epoch: 0, pods: BTreeMap::new() }
    }

    /// Another time after which pods stop, from now on.
    pub fn set_after(&mut self, after: Duration) {
        self.after = after;
    }

    /// The epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// When everything has to stop, unless a renewal comes first. None if it has to be stopped already.
    pub fn deadline(&self) -> Option<Instant> {
        self.renewed.map(|renewed| renewed + self.after)
    }

    /// Whether nothing may run.
    pub fn is_over(&self, now: Instant) -> bool {
        self.deadline().is_none_or(|deadline| now >= deadline)
    }

    /// Whether a pod that must not run twice may run.
    pub fn may_run(&self, uid: &str, now: Instant) -> bool {
        !self.is_over(now) && self.pods.get(uid).is_some_and(|permit| *permit == Some(self.epoch))
    }

    /// The guarded pods that may not run now.
    pub fn stopped(&self, now: Instant) -> impl Iterator<Item = &str> {
        self.pods.keys().map(String::as_str).filter(move |uid| !self.may_run(uid, now))
    }

    /// Whether a pod is guarded.
    pub fn guards(&self, uid: &str) -> bool {
        self.pods.contains_key(uid)
    }

    /// Takes in what happened, and says what to do.
    pub fn step(&mut self, now: Instant, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        // An epoch ends when its time is over, even if nobody was awake to notice: first of all this.
        if self.renewed.is_some() && self.is_over(now) {
            self.renewed = None;
            self.epoch += 1;
            effects.extend(self.pods.keys().cloned().map(Effect::Stop));
        }
        match event {
            Event::Tick => {}
            Event::Renewed { sent } => {
                let newer = self.renewed.is_none_or(|renewed| sent > renewed);
                if newer && sent + self.after > now {
                    self.renewed = Some(sent);
                    effects.extend(self.pods.keys().filter_map(|uid| self.ask(uid)));
                }
            }
            Event::Guard { uid, running } => {
                let permit = (running && self.renewed.is_some()).then_some(self.epoch);
                self.pods.entry(uid.clone()).or_insert(permit);
                effects.extend(self.ask(&uid));
            }
            Event::Permitted { uid, epoch } => {
                // A permit that arrives when its epoch is over is none.
                if let Some(permit) = self.pods.get_mut(&uid)
                    && epoch == self.epoch
                    && self.renewed.is_some()
                {
                    *permit = Some(epoch);
                }
            }
            Event::Forget { uid } => drop(self.pods.remove(&uid)),
        }
        effects
    }

    fn ask(&self, uid: &str) -> Option<Effect> {
        let lacks = self.renewed.is_some() && self.pods.get(uid).is_some_and(|permit| *permit != Some(self.epoch));
        lacks.then(|| Effect::Ask { uid: uid.to_owned(), epoch: self.epoch })
    }
}

/// Which version each Lease has, and since when, by our own clock.
#[derive(Clone, Debug, Default)]
pub struct Heard(BTreeMap<String, (String, Instant)>);

impl Heard {
    /// A Lease was seen in this version. Returns whether it is as it was.
    pub fn see(&mut self, name: &str, version: &str, now: Instant) -> bool {
        let (known, since) = self.0.entry(name.to_owned()).or_insert_with(|| (version.to_owned(), now));
        let same = known == version;
        if !same {
            (*known, *since) = (version.to_owned(), now);
        }
        same
    }

    /// How long a Lease has been as it is.
    pub fn silent(&self, name: &str, now: Instant) -> Option<Duration> {
        self.0.get(name).map(|(_, since)| now.saturating_sub(*since))
    }

    /// A Lease is no more.
    pub fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }
}

/// How long a Lease must have been silent before the pods of its node have stopped: as long as was chosen, and not less
/// than the node needs by its own word. A fiftieth is added for clocks that drift by up to a hundredth each.
pub fn wait(chosen: Duration, promised: Duration) -> Duration {
    chosen.max(promised * 51 / 50)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AFTER: Duration = Duration::from_secs(10);

    fn at(seconds: u64) -> Instant {
        Duration::from_secs(seconds)
    }

    fn renewed(sent: u64) -> Event {
        Event::Renewed { sent: at(sent) }
    }

    fn guard(uid: &str) -> Event {
        Event::Guard { uid: uid.into(), running: false }
    }

    fn permitted(uid: &str, epoch: Epoch) -> Event {
        Event::Permitted { uid: uid.into(), epoch }
    }

    fn ask(uid: &str, epoch: Epoch) -> Effect {
        Effect::Ask { uid: uid.into(), epoch }
    }

    #[test]
    fn a_pod_runs_with_a_permit_until_the_time_is_over() {
        let mut fence = Fence::new(AFTER);
        assert_eq!(fence.step(at(0), guard("a")), [], "there is no renewal yet");
        assert!(!fence.may_run("a", at(0)));
        assert_eq!(fence.step(at(2), renewed(1)), [ask("a", 0)]);
        assert!(!fence.may_run("a", at(2)), "a renewal is not a permit");
        fence.step(at(3), permitted("a", 0));
        assert!(fence.may_run("a", at(3)) && fence.may_run("a", at(10)));
        assert!(!fence.may_run("a", at(11)), "counted from when the renewal was sent, without anybody looking");
        assert_eq!(fence.step(at(4), renewed(4)), [], "nothing to ask");
        assert!(fence.may_run("a", at(13)));
        assert_eq!(fence.step(at(14), Event::Tick), [Effect::Stop("a".into())]);
        assert_eq!(fence.step(at(15), Event::Tick), [], "once");
        assert_eq!(fence.step(at(30), renewed(30)), [ask("a", 1)], "in the next epoch everything is asked anew");
        fence.step(at(31), permitted("a", 0));
        assert!(!fence.may_run("a", at(31)), "an old permit");
        fence.step(at(31), permitted("a", 1));
        assert!(fence.may_run("a", at(31)));
        fence.step(at(32), Event::Forget { uid: "a".into() });
        assert!(!fence.may_run("a", at(32)));
    }

    #[test]
    fn whoever_slept_over_the_end_notices_first() {
        let mut fence = Fence::new(AFTER);
        fence.step(at(0), renewed(0));
        fence.step(at(0), guard("a"));
        fence.step(at(0), permitted("a", 0));
        // Frozen from here. The first thing that happens on waking is a renewal that succeeds.
        assert_eq!(fence.step(at(60), renewed(59)), [Effect::Stop("a".into()), ask("a", 1)]);
        assert!(!fence.may_run("a", at(60)));
        // Or a permit, or a renewal that was sent before.
        fence.step(at(60), permitted("a", 1));
        assert!(fence.may_run("a", at(60)));
        assert_eq!(fence.step(at(100), permitted("a", 1)), [Effect::Stop("a".into())]);
        assert_eq!(fence.step(at(101), renewed(69)), [], "too old to count");
        assert!(!fence.may_run("a", at(101)));
    }

    #[test]
    fn what_runs_when_it_is_guarded_goes_on_if_the_lease_is_held() {
        let mut fence = Fence::new(AFTER);
        let running = |uid: &str| Event::Guard { uid: uid.into(), running: true };
        fence.step(at(0), running("a"));
        assert!(!fence.may_run("a", at(0)));
        fence.step(at(0), renewed(0));
        assert_eq!(fence.step(at(1), running("b")), []);
        assert!(fence.may_run("b", at(1)));
        assert_eq!(fence.stopped(at(1)).collect::<Vec<_>>(), ["a"]);
        fence.step(at(1), running("a"));
        assert!(!fence.may_run("a", at(1)), "it was guarded before");
    }

    #[test]
    fn how_long_to_wait() {
        let check = |chosen, promised, expect: Duration| assert_eq!(wait(at(chosen), at(promised)), expect);
        check(18, 17, at(18));
        check(18, 20, Duration::from_millis(20_400));
        let mut heard = Heard::default();
        assert_eq!(heard.silent("n", at(0)), None);
        assert!(heard.see("n", "1", at(5)) && heard.see("n", "1", at(10)));
        assert_eq!(heard.silent("n", at(10)), Some(at(5)));
        assert!(!heard.see("n", "2", at(11)));
        assert_eq!(heard.silent("n", at(12)), Some(at(1)));
    }

    proptest! {
        /// Whatever happens in whichever order: what may run was permitted in this epoch, and the last renewal is young.
        #[test]
        fn nothing_runs_without_a_young_renewal(steps in prop::collection::vec((0u64..8, 0u8..5, 0u64..12, 0u64..3), 1..60)) {
            let mut fence = Fence::new(AFTER);
            let mut now = at(100);
            let mut sent: Vec<Instant> = Vec::new();
            for (pass, what, back, number) in steps {
                now += at(pass);
                let uid = number.to_string();
                let event = match what {
                    0 => Event::Tick,
                    1 => { sent.push(now - at(back)); Event::Renewed { sent: now - at(back) } }
                    2 => Event::Guard { uid, running: false },
                    3 => Event::Permitted { uid, epoch: fence.epoch() },
                    _ => Event::Forget { uid },
                };
                let before = fence.epoch();
                fence.step(now, event);
                let young = sent.iter().any(|sent| *sent + AFTER > now);
                prop_assert!(young || fence.is_over(now));
                prop_assert!(fence.epoch() >= before);
                for uid in ["0", "1", "2"] {
                    prop_assert!(!fence.may_run(uid, now) || young);
                    prop_assert!(!fence.may_run(uid, now + AFTER));
                }
            }
        }
    }
}
