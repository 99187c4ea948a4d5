//! What follows what while the machine goes down. Pure: what was seen and the time go in, the phase comes out.

use std::time::Duration;

use tokio::time::Instant;

use super::plan::Group;

/// Times beside those of the groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// How long what was told to the API may take to have its effect.
    pub settle: Duration,
    /// How long proxies may take to hear of it.
    pub proxies: Duration,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// All pods are unready; Services still lead to some of them.
    Exposed {
        /// No longer than this.
        until: Instant,
    },
    /// No EndpointSlice names them as ready any more; proxies are hearing of it.
    Unheard {
        /// Until then.
        until: Instant,
    },
    /// The pods of this group end.
    Ending {
        /// Its number.
        group: usize,
        /// No longer than this.
        until: Instant,
    },
    /// All have ended; the API does not know of every end yet.
    Telling {
        /// No longer than this.
        until: Instant,
    },
    /// The machine may go down.
    Over,
}

/// What was seen.
pub trait Seen {
    /// Whether a Service may still lead to a pod of this node. Nothing if that is not known yet.
    fn exposed(&self) -> Option<bool>;
    /// Whether something of the pod runs or is mounted.
    fn runs(&self, uid: &str) -> bool;
    /// Whether the API does not yet know that the pod has ended.
    fn untold(&self, uid: &str) -> bool;
}

/// The whole of it.
#[derive(Clone, Debug)]
pub struct Sequence {
    groups: Vec<Group>,
    times: Times,
    phase: Phase,
}

impl Sequence {
    /// It begins. `served` says whether a pod was ready until now.
    pub fn new(groups: Vec<Group>, times: Times, served: bool, now: Instant) -> Sequence {
        let mut sequence = Sequence { groups, times, phase: Phase::Over };
        sequence.phase = match served {
            true => Phase::Exposed { until: now + times.settle },
            false => sequence.group(0, now),
        };
        sequence
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The groups.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The groups whose turn it is or was.
    pub fn begun(&self) -> &[Group] {
        let count = match self.phase {
            Phase::Exposed { .. } | Phase::Unheard { .. } => 0,
            Phase::Ending { group, .. } => group + 1,
            Phase::Telling { .. } | Phase::Over => self.groups.len(),
        };
        self.groups.get(..count).unwrap_or_default()
    }

    fn group(&self, number: usize, now: Instant) -> Phase {
        match self.groups.get(number) {
            Some(group) => Phase::Ending { group: number, until: now + group.time },
            None if self.groups.is_empty() => Phase::Over,
            None => Phase::Telling { until: now + self.times.settle },
        }
    }

    /// Goes on as far as it can. When to ask again if nothing is seen before.
    pub fn step(&mut self, now: Instant, seen: &impl Seen) -> Option<Instant> {
        loop {
            let (done, until, next) = match self.phase {
                Phase::Exposed { until } => {
                    (seen.exposed() == Some(false), until, Phase::Unheard { until: now + self.times.proxies })
                }
                Phase::Unheard { until } => (false, until, self.group(0, now)),
                Phase::Ending { group, until } => {
                    let pods = self.groups.get(group).map(|g| g.pods.as_slice()).unwrap_or_default();
                    (!pods.iter().any(|(uid, _)| seen.runs(uid)), until, self.group(group + 1, now))
                }
                Phase::Telling { until } => {
                    let mut pods = self.groups.iter().flat_map(|g| &g.pods);
                    (!pods.any(|(uid, _)| seen.untold(uid)), until, Phase::Over)
                }
                Phase::Over => return None,
            };
            if !done && until > now {
                return Some(until);
            }
            self.phase = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[derive(Default)]
    struct World {
        exposed: Option<bool>,
        runs: BTreeSet<&'static str>,
        untold: BTreeSet<&'static str>,
    }

    impl Seen for World {
        fn exposed(&self) -> Option<bool> {
            self.exposed
        }
        fn runs(&self, uid: &str) -> bool {
            self.runs.contains(uid)
        }
        fn untold(&self, uid: &str) -> bool {
            self.untold.contains(uid)
        }
    }

    fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn groups() -> Vec<Group> {
        [(20, "web"), (10, "dns")].map(|(time, pod)| Group { time: s(time), pods: vec![(pod.into(), s(5))] }).into()
    }

    const TIMES: Times = Times { settle: Duration::from_secs(5), proxies: Duration::from_secs(1) };

    #[tokio::test(start_paused = true)]
    async fn each_waits_for_the_one_before() {
        let start = Instant::now();
        let mut world = World { runs: ["web", "dns"].into(), untold: ["web", "dns"].into(), exposed: None };
        let mut it = Sequence::new(groups(), TIMES, true, start);
        assert_eq!(it.step(start, &world), Some(start + s(5)), "nothing is known of the endpoints");
        world.exposed = Some(true);
        it.step(start + s(1), &world);
        assert!(it.begun().is_empty());
        world.exposed = Some(false);
        assert_eq!(it.step(start + s(2), &world), Some(start + s(3)), "proxies have a moment");
        assert!(it.begun().is_empty());
        assert_eq!(it.step(start + s(3), &world), Some(start + s(23)));
        assert_eq!(it.begun().len(), 1);
        world.runs.remove("web");
        assert_eq!(it.step(start + s(4), &world), Some(start + s(14)), "what is left of its time is not waited for");
        assert_eq!(it.begun().len(), 2);
        world.runs.clear();
        it.step(start + s(5), &world);
        assert_eq!(it.phase(), Phase::Telling { until: start + s(10) });
        world.untold.clear();
        assert_eq!(it.step(start + s(6), &world), None);
        assert_eq!(it.phase(), Phase::Over);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_waited_for_longer_than_it_may_take() {
        let start = Instant::now();
        let world = World { runs: ["web", "dns"].into(), untold: ["web", "dns"].into(), exposed: Some(true) };
        let mut it = Sequence::new(groups(), TIMES, true, start);
        let mut ends = Vec::new();
        let mut now = start;
        while let Some(next) = it.step(now, &world) {
            ends.push((next - start).as_secs());
            now = next;
        }
        assert_eq!(ends, [5, 6, 26, 36, 41]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_served_nobody_waits_for_nobody() {
        let start = Instant::now();
        let mut it = Sequence::new(groups(), TIMES, false, start);
        assert_eq!(it.step(start, &World { runs: ["web"].into(), ..World::default() }), Some(start + s(20)));
        let mut it = Sequence::new(vec![], TIMES, false, start);
        assert_eq!((it.step(start, &World::default()), it.phase()), (None, Phase::Over));
    }
}
