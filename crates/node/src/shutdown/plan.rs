//! Which pods end when, as the machine goes down: groups by priority, each with a time of its own. Pure.
//!
//! <https://kubernetes.io/docs/concepts/cluster-administration/node-shutdown/#graceful-node-shutdown> (KEP-2000), and with
//! times for each priority KEP-2712.

use std::time::Duration;

/// The lowest priority of pods that are critical to a cluster (`system-cluster-critical`).
pub const CRITICAL: i32 = 2_000_000_000;

/// The times of a shutdown: from this priority on, so much time. Lower priorities first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Graces(Vec<(i32, Duration)>);

/// Times that cannot be meant so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Critical pods have the last part of the whole.
    #[error(
        "--shutdown-grace-period-critical-pods is {critical:?} and --shutdown-grace-period only {total:?}: critical pods have \
         the last part of the whole time, so give a longer --shutdown-grace-period or a shorter one to them"
    )]
    MoreThanAll {
        /// The whole time.
        total: Duration,
        /// That of critical pods.
        critical: Duration,
    },
    /// As upstream: less than a second is no time for a pod.
    #[error("{flag} is {value:?}: give at least 1s, or 0s for none at all")]
    TooShort {
        /// The flag.
        flag: &'static str,
        /// What it says.
        value: Duration,
    },
    /// An entry of the list.
    #[error(
        "--shutdown-grace-period-by-pod-priority {text:?}: {entry:?} {why}; write PRIORITY=TIME, ..., e.g. 0=20s,2000000000=10s"
    )]
    Entry {
        /// The whole list.
        text: String,
        /// The entry.
        entry: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

const TOTAL: &str = "--shutdown-grace-period";
const FOR_CRITICAL: &str = "--shutdown-grace-period-critical-pods";

impl Graces {
    /// So much for all, the last part of it for critical pods. Nothing at all means that pods are left alone.
    ///
    /// # Errors
    /// If the part is longer than the whole, or a time is shorter than a second.
    pub fn new(total: Duration, critical: Duration) -> Result<Graces, Error> {
        for (flag, value) in [(TOTAL, total), (FOR_CRITICAL, critical)] {
            if !value.is_zero() && value < Duration::from_secs(1) {
                return Err(Error::TooShort { flag, value });
            }
        }
        let Some(others) = total.checked_sub(critical) else { return Err(Error::MoreThanAll { total, critical }) };
        if total.is_zero() {
            return Ok(Graces::default());
        }
        Ok(Graces(vec![(0, others), (CRITICAL, critical)]))
    }

    /// `PRIORITY=TIME,...`; `time` reads a time.
    ///
    /// # Errors
    /// The entry that is malformed or there twice.
    pub fn by_priority(text: &str, time: impl Fn(&str) -> Option<Duration>) -> Result<Graces, Error> {
        let mut graces: Vec<(i32, Duration)> = Vec::new();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let wrong = |why| Error::Entry { text: text.to_owned(), entry: entry.to_owned(), why };
            let (priority, span) = entry.split_once('=').ok_or_else(|| wrong("has no ="))?;
            let priority: i32 = priority.trim().parse().map_err(|_| wrong("begins with no priority"))?;
            let span = time(span.trim()).ok_or_else(|| wrong("ends with no time"))?;
            if graces.iter().any(|(known, _)| *known == priority) {
                return Err(wrong("is there twice"));
            }
            graces.push((priority, span));
        }
        graces.sort_unstable_by_key(|(priority, _)| *priority);
        if graces.iter().all(|(_, span)| span.is_zero()) {
            return Ok(Graces::default());
        }
        Ok(Graces(graces))
    }

    /// Whether pods are left alone.
    pub fn is_off(&self) -> bool {
        self.0.is_empty()
    }

    /// How long it takes at most until all pods have ended.
    pub fn total(&self) -> Duration {
        self.0.iter().map(|(_, span)| *span).sum()
    }

    /// Which of the times a priority has: the one from which on it is, or the lowest if it is below all.
    fn index(&self, priority: i32) -> usize {
        self.0.iter().rposition(|(from, _)| *from <= priority).unwrap_or(0)
    }
}

/// What has to be known of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its uid.
    pub uid: String,
    /// `spec.priority`.
    pub priority: i32,
    /// `spec.terminationGracePeriodSeconds`.
    pub grace: Option<Duration>,
}

/// Pods that end together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// When it is over, those that come next begin, whatever is left.
    pub time: Duration,
    /// Uids, with the time that each has.
    pub pods: Vec<(String, Duration)>,
}

/// The groups, in the order in which they end. Those without pods are left out: nobody has to wait for them.
pub fn plan(graces: &Graces, pods: &[Candidate]) -> Vec<Group> {
    let mut groups: Vec<Group> = graces.0.iter().map(|(_, time)| Group { time: *time, pods: Vec::new() }).collect();
    for pod in pods {
        if let Some(group) = groups.get_mut(graces.index(pod.priority)) {
            let grace = pod.grace.map_or(group.time, |own| own.min(group.time));
            group.pods.push((pod.uid.clone(), grace));
        }
    }
    groups.retain(|group| !group.pods.is_empty());
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn pod(uid: &str, priority: i32, grace: Option<u64>) -> Candidate {
        Candidate { uid: uid.into(), priority, grace: grace.map(s) }
    }

    fn time(text: &str) -> Option<Duration> {
        text.strip_suffix('s')?.parse().ok().map(s)
    }

    #[test]
    fn groups() {
        let check = |graces: &Graces, pods: &[Candidate], expect: &[(u64, &[(&str, u64)])]| {
            let expect: Vec<Group> = expect
                .iter()
                .map(|(time, pods)| Group {
                    time: s(*time),
                    pods: pods.iter().map(|(uid, grace)| ((*uid).to_owned(), s(*grace))).collect(),
                })
                .collect();
            assert_eq!(plan(graces, pods), expect);
        };
        let usual = Graces::new(s(30), s(10)).unwrap();
        assert_eq!(usual.total(), s(30));
        let pods = [
            pod("dns", CRITICAL, Some(30)),
            pod("web", 0, Some(5)),
            pod("db", 1_000_000, Some(600)),
            pod("batch", -100, None),
            pod("cni", CRITICAL + 1000, Some(2)),
        ];
        check(&usual, &pods, &[(20, &[("web", 5), ("db", 20), ("batch", 20)]), (10, &[("dns", 10), ("cni", 2)])]);
        check(&usual, &pods[..1], &[(10, &[("dns", 10)])]);
        check(&usual, &[], &[]);
        check(&Graces::default(), &pods, &[]);
        // Everything for critical pods: the others are killed.
        check(&Graces::new(s(10), s(10)).unwrap(), &pods[..2], &[(0, &[("web", 0)]), (10, &[("dns", 10)])]);
        // Upstream's example: a priority between two belongs to the lower one.
        let by = Graces::by_priority("100000=10s, 10000=180s,1000=120s,0=60s", time).unwrap();
        check(
            &by,
            &[
                pod("a", 100_000, None),
                pod("b", 99_999, None),
                pod("c", 10_000, None),
                pod("d", 1, None),
                pod("e", -5, None),
            ],
            &[(60, &[("d", 60), ("e", 60)]), (180, &[("b", 180), ("c", 180)]), (10, &[("a", 10)])],
        );
        assert_eq!(by.total(), s(370));
    }

    #[test]
    fn what_cannot_be_meant() {
        let text = Graces::new(s(5), s(10)).unwrap_err().to_string();
        assert!(
            text.starts_with("--shutdown-grace-period-critical-pods is 10s and --shutdown-grace-period only 5s"),
            "{text}"
        );
        let text = Graces::new(s(5), Duration::from_millis(200)).unwrap_err().to_string();
        assert_eq!(text, "--shutdown-grace-period-critical-pods is 200ms: give at least 1s, or 0s for none at all");
        assert!(Graces::new(s(0), s(0)).unwrap().is_off() && !Graces::new(s(5), s(0)).unwrap().is_off());
        for (bad, why) in [
            ("5s", "\"5s\" has no ="),
            ("x=5s", "begins with no priority"),
            ("99999999999=5s", "begins with no priority"),
            ("0=5", "ends with no time"),
            ("0=5s,0=6s", "\"0=6s\" is there twice"),
        ] {
            let text = Graces::by_priority(bad, time).unwrap_err().to_string();
            assert!(text.contains(why) && text.contains("write PRIORITY=TIME"), "{text}");
        }
        assert!(Graces::by_priority("", time).unwrap().is_off() && Graces::by_priority("0=0s", time).unwrap().is_off());
    }

    proptest! {
        /// Every pod ends once, none has more time than its group, and none ends before one of a lower priority's time.
        #[test]
        fn everybody_has_a_turn(
            graces in prop::collection::btree_map(-5..5, 1..9u64, 1..5),
            pods in prop::collection::vec((-8..8, prop::option::of(0..20u64)), 0..20),
        ) {
            let graces = Graces(graces.into_iter().map(|(priority, time)| (priority, s(time))).collect());
            let pods: Vec<Candidate> =
                pods.into_iter().enumerate().map(|(n, (priority, grace))| pod(&n.to_string(), priority, grace)).collect();
            let groups = plan(&graces, &pods);
            let order: Vec<&Candidate> = groups
                .iter()
                .flat_map(|g| g.pods.iter().filter_map(|(uid, _)| pods.iter().find(|p| p.uid == *uid)))
                .collect();
            prop_assert_eq!(order.len(), pods.len());
            for group in &groups {
                prop_assert!(group.pods.iter().all(|(_, grace)| *grace <= group.time));
            }
            let mut highest = i32::MIN;
            for group in &groups {
                let of = |(uid, _): &(String, Duration)| pods.iter().find(|p| p.uid == *uid).map(|p| p.priority);
                let all: Vec<i32> = group.pods.iter().filter_map(of).collect();
                prop_assert!(all.iter().all(|p| *p >= highest));
                highest = all.into_iter().max().unwrap_or(highest);
            }
        }
    }
}
