//! Time profiles, and every sum of times that must hold.
//!
//! The times of a cluster depend on one another: a lease that is renewed more slowly than it ends is no lease. All
//! such relations are written down here, once, in [`Timing::check`]; a configuration that breaks one is refused with
//! both numbers and the flags that set them.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// A set of times that fit together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Machines on one network: a death is noticed in about a second.
    #[default]
    Fast,
    /// Upstream's defaults.
    Kubernetes,
    /// Machines far apart, tens of milliseconds away from each other.
    Wan,
}

impl FromStr for Profile {
    type Err = String;

    fn from_str(text: &str) -> Result<Profile, String> {
        match text {
            "fast" => Ok(Profile::Fast),
            "kubernetes" => Ok(Profile::Kubernetes),
            "wan" => Ok(Profile::Wan),
            _ => Err(format!("{text:?} is no time profile: use fast, kubernetes or wan")),
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Profile::Fast => "fast",
            Profile::Kubernetes => "kubernetes",
            Profile::Wan => "wan",
        })
    }
}

/// The times of a cluster. Each has the flag of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Timing {
    /// `--leader-elect-lease-duration`: how long a leader that is not heard of is still believed in.
    pub lease_duration: Duration,
    /// `--leader-elect-renew-deadline`: how long a leader that cannot renew goes on.
    pub renew_deadline: Duration,
    /// `--leader-elect-retry-period`: how often a leader renews.
    pub retry_period: Duration,
    /// `--leader-elect-grace`: how long the store must have answered before the silence of a leader counts.
    pub grace: Duration,
    /// `--etcd-heartbeat-interval`: how often etcd's leader is heard.
    pub etcd_heartbeat: Duration,
    /// `--etcd-election-timeout`: how long etcd's members wait for their leader.
    pub etcd_election: Duration,
    /// `--store-request-timeout`: how long one member of the store has to answer.
    pub store_request: Duration,
    /// `--store-budget`: how long a request tries, on all members together.
    pub store_budget: Duration,
    /// `--server-renew-interval`: how often a server says that it lives.
    pub server_renew: Duration,
    /// `--server-expiry`: how long a silent server stays an endpoint of the `kubernetes` Service.
    pub server_expiry: Duration,
    /// `--balancer-probe-interval`: how often a node's balancer asks each server.
    pub probe_interval: Duration,
    /// `--balancer-probe-timeout`: how long a server has to answer that.
    pub probe_timeout: Duration,
    /// `--node-lease-duration`: how long a node's Lease says that it holds. It is renewed four times in that time.
    pub node_lease: Duration,
    /// `--node-lease-request-timeout`: how long a renewal may take; one that took longer does not count.
    pub node_lease_request: Duration,
    /// `--node-monitor-period`: how often the controllers look at all nodes.
    pub node_monitor: Duration,
    /// `--node-monitor-grace-period`: how long a node may be silent before it is held to be unreachable.
    pub node_grace: Duration,
    /// `--node-startup-grace-period`: the same for a node that has never said how it is.
    pub node_startup_grace: Duration,
    /// `--default-not-ready-toleration-seconds`: how long a pod stays on a node that is not ready, if it says nothing.
    pub not_ready_toleration: Duration,
    /// `--default-unreachable-toleration-seconds`: how long a pod stays on a node that is not heard of.
    pub unreachable_toleration: Duration,
    /// `--fence-after`: after so long without a renewed Lease a node stops the pods that must not run twice. Zero: never.
    pub fence_after: Duration,
    /// `--fence-stop`: how long that takes at most.
    pub fence_stop: Duration,
    /// `--fence-wait`: how long a node's Lease must have been silent before such pods are made anew elsewhere. Zero:
    /// they are not, as in Kubernetes.
    pub fence_wait: Duration,
    /// `--gossip-probe-interval`: how often a machine is probed by some other one.
    pub gossip_probe_interval: Duration,
    /// `--gossip-probe-timeout`: how long it has to answer before others are asked to probe it too.
    pub gossip_probe_timeout: Duration,
    /// `--gossip-suspicion-timeout`: how long a machine that several suspect has to object before it is held for dead.
    pub gossip_suspicion: Duration,
    /// `--gossip-hung-timeout`: how long a machine whose kernel answers has, although its process does not: it may be
    /// starved.
    pub gossip_hung: Duration,
    /// `--gossip-interval`: how often news about machines is passed on.
    pub gossip_interval: Duration,
    /// `--verdict-memory`: how long a machine that was dead when the service proxy ended is avoided after the next start,
    /// if the gossip does not speak of it.
    pub verdict_memory: Duration,
    /// `--relay-attempt-delay`: how long an endpoint has to answer before the relay tries the next one as well.
    pub relay_attempt: Duration,
    /// `--relay-connect-timeout`: how long the relay tries, on all endpoints together.
    pub relay_connect: Duration,
    /// `--relay-idle-timeout`: how long a relayed connection may be silent.
    pub relay_idle: Duration,
    /// `--shutdown-grace-period`: how long pods have to end when their machine goes down. Zero: they are left alone.
    pub shutdown_grace: Duration,
    /// `--shutdown-grace-period-critical-pods`: the last part of it, for critical pods.
    pub shutdown_grace_critical: Duration,
    /// `--shutdown-settle-timeout`: how long a node that goes down waits until no Service leads to its pods, and when they
    /// have ended until the API knows.
    pub shutdown_settle: Duration,
    /// `--shutdown-proxy-delay`: and how long after that until all proxies have heard of it.
    pub shutdown_proxies: Duration,
}

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

impl Timing {
    /// The times of a profile.
    pub const fn of(profile: Profile) -> Timing {
        match profile {
            Profile::Fast => Timing {
                lease_duration: ms(1000),
                renew_deadline: ms(750),
                retry_period: ms(250),
                grace: ms(250),
                etcd_heartbeat: ms(50),
                etcd_election: ms(500),
                store_request: ms(800),
                store_budget: ms(4000),
                server_renew: ms(400),
                server_expiry: ms(1400),
                probe_interval: ms(100),
                probe_timeout: ms(200),
                node_lease: ms(8000),
                node_lease_request: ms(2000),
                node_monitor: ms(250),
                node_grace: ms(8000),
                node_startup_grace: ms(15_000),
                not_ready_toleration: ms(5000),
                unreachable_toleration: ms(5000),
                fence_after: ms(10_000),
                fence_stop: ms(5000),
                fence_wait: ms(18_000),
                gossip_probe_interval: ms(100),
                gossip_probe_timeout: ms(40),
                gossip_suspicion: ms(400),
                gossip_hung: ms(4000),
                gossip_interval: ms(50),
                verdict_memory: ms(5000),
                relay_attempt: ms(150),
                relay_connect: ms(5000),
                relay_idle: ms(86_400_000),
                shutdown_grace: ms(30_000),
                shutdown_grace_critical: ms(10_000),
                shutdown_settle: ms(5000),
                shutdown_proxies: ms(1000),
            },
            Profile::Kubernetes => Timing {
                lease_duration: ms(15_000),
                renew_deadline: ms(10_000),
                retry_period: ms(2000),
                grace: ms(2000),
                etcd_heartbeat: ms(100),
                etcd_election: ms(1000),
                store_request: ms(2000),
                store_budget: ms(10_000),
                server_renew: ms(5000),
                server_expiry: ms(15_000),
                probe_interval: ms(1000),
                probe_timeout: ms(1000),
                node_lease: ms(40_000),
                node_lease_request: ms(10_000),
                node_monitor: ms(5000),
                node_grace: ms(50_000),
                node_startup_grace: ms(60_000),
                not_ready_toleration: ms(300_000),
                unreachable_toleration: ms(300_000),
                fence_after: ms(0),
                fence_stop: ms(0),
                fence_wait: ms(0),
                gossip_probe_interval: ms(1000),
                gossip_probe_timeout: ms(400),
                gossip_suspicion: ms(5000),
                gossip_hung: ms(25_000),
                gossip_interval: ms(200),
                verdict_memory: ms(60_000),
                relay_attempt: ms(150),
                relay_connect: ms(10_000),
                relay_idle: ms(432_000_000),
                shutdown_grace: ms(0),
                shutdown_grace_critical: ms(0),
                shutdown_settle: ms(5000),
                shutdown_proxies: ms(1000),
            },
            Profile::Wan => Timing {
                lease_duration: ms(4000),
                renew_deadline: ms(3000),
                retry_period: ms(750),
                grace: ms(1000),
                etcd_heartbeat: ms(200),
                etcd_election: ms(2000),
                store_request: ms(2000),
                store_budget: ms(10_000),
                server_renew: ms(1500),
                server_expiry: ms(6000),
                probe_interval: ms(500),
                probe_timeout: ms(750),
                node_lease: ms(16_000),
                node_lease_request: ms(4000),
                node_monitor: ms(1000),
                node_grace: ms(20_000),
                node_startup_grace: ms(30_000),
                not_ready_toleration: ms(30_000),
                unreachable_toleration: ms(30_000),
                fence_after: ms(20_000),
                fence_stop: ms(5000),
                fence_wait: ms(32_000),
                gossip_probe_interval: ms(800),
                gossip_probe_timeout: ms(300),
                gossip_suspicion: ms(2400),
                gossip_hung: ms(12_000),
                gossip_interval: ms(150),
                verdict_memory: ms(20_000),
                relay_attempt: ms(500),
                relay_connect: ms(10_000),
                relay_idle: ms(86_400_000),
                shutdown_grace: ms(30_000),
                shutdown_grace_critical: ms(10_000),
                shutdown_settle: ms(10_000),
                shutdown_proxies: ms(3000),
            },
        }
    }

    /// Every relation that must hold.
    ///
    /// # Errors
    /// All that do not.
    pub fn check(&self) -> Result<(), Violations> {
        let mut broken = Vec::new();
        let mut longer = |long: &Flag, factor: u32, short: &Flag, why: &'static str| {
            if long.value < short.value * factor {
                broken.push(Violation { long: long.clone(), factor, short: short.clone(), why });
            }
        };
        let lease = Flag::new("--leader-elect-lease-duration", self.lease_duration);
        let deadline = Flag::new("--leader-elect-renew-deadline", self.renew_deadline);
        let retry = Flag::new("--leader-elect-retry-period", self.retry_period);
        let grace = Flag::new("--leader-elect-grace", self.grace);
        let heartbeat = Flag::new("--etcd-heartbeat-interval", self.etcd_heartbeat);
        let election = Flag::new("--etcd-election-timeout", self.etcd_election);
        let request = Flag::new("--store-request-timeout", self.store_request);
        let budget = Flag::new("--store-budget", self.store_budget);
        let renew = Flag::new("--server-renew-interval", self.server_renew);
        let expiry = Flag::new("--server-expiry", self.server_expiry);
        let interval = Flag::new("--balancer-probe-interval", self.probe_interval);
        let timeout = Flag::new("--balancer-probe-timeout", self.probe_timeout);
        let gossip_probe = Flag::new("--gossip-probe-interval", self.gossip_probe_interval);
        let gossip_timeout = Flag::new("--gossip-probe-timeout", self.gossip_probe_timeout);
        let gossip_suspicion = Flag::new("--gossip-suspicion-timeout", self.gossip_suspicion);
        let gossip_interval = Flag::new("--gossip-interval", self.gossip_interval);
        let shortest = Flag::new("the shortest time", ms(10));
        for time in [&retry, &grace, &heartbeat, &renew, &interval, &timeout, &gossip_timeout, &gossip_interval] {
            longer(time, 1, &shortest, "shorter times are noise");
        }
        let both = Flag { name: format!("{} + {}", deadline.name, retry.name), value: deadline.value + retry.value };
        longer(&lease, 1, &both, "a leader must have given up before another takes over");
        longer(&deadline, 2, &retry, "one lost renewal must not end a term");
        longer(&grace, 1, &retry, "a leader that lives must have had a chance to renew before it is deposed");
        longer(&lease, 1, &grace, "the grace is part of the lease's duration");
        longer(&election, 5, &heartbeat, "etcd refuses to start otherwise, and elections would follow one another");
        longer(&request, 1, &election, "a write that waits for an election would be given up too early");
        longer(&budget, 2, &request, "a second member must get its chance");
        longer(&budget, 3, &election, "two elections in a row must not fail a write");
        longer(&expiry, 3, &renew, "two lost renewals must not take a server off");
        longer(&timeout, 1, &interval, "a probe has at least until the next one");
        let attempt = Flag::new("--relay-attempt-delay", self.relay_attempt);
        let connect = Flag::new("--relay-connect-timeout", self.relay_connect);
        let idle = Flag::new("--relay-idle-timeout", self.relay_idle);
        longer(&attempt, 1, &shortest, "shorter times are noise");
        longer(&connect, 3, &attempt, "a third endpoint must get its chance");
        longer(&idle, 1, &Flag::new("a minute", ms(60_000)), "clients that pause would lose their connections");
        let lease = Flag::new("--node-lease-duration", self.node_lease);
        let renewal = Flag { name: format!("a quarter of {}", lease.name), value: self.node_lease_renew() };
        let patience = Flag::new("--node-lease-request-timeout", self.node_lease_request);
        let monitor = Flag::new("--node-monitor-period", self.node_monitor);
        let silence = Flag::new("--node-monitor-grace-period", self.node_grace);
        let startup = Flag::new("--node-startup-grace-period", self.node_startup_grace);
        longer(&lease, 1, &Flag::new("a second", ms(1000)), "Leases count in whole seconds");
        longer(&patience, 1, &shortest, "shorter times are noise");
        longer(&monitor, 1, &shortest, "shorter times are noise");
        longer(&silence, 3, &renewal, "two lost renewals must not make a node unreachable");
        longer(&silence, 2, &monitor, "a node must be looked at while it is silent");
        longer(&startup, 1, &silence, "a node that begins has at least as long as one that runs");
        let after = Flag::new("--fence-after", self.fence_after);
        let wait = Flag::new("--fence-wait", self.fence_wait);
        if !after.value.is_zero() {
            let missed = Flag {
                name: format!("three renewals ({}) + {}", renewal.name, patience.name),
                value: renewal.value * 3 + patience.value,
            };
            longer(&after, 1, &missed, "two lost renewals must not stop pods");
        }
        if !wait.value.is_zero() {
            longer(
                &after,
                1,
                &shortest,
                "nodes that never stop such pods must not be waited for: set it, or --fence-wait to 0s",
            );
            let stopped = Flag {
                name: format!("--fence-after + --fence-stop + {}, and a fiftieth for clocks that drift", patience.name),
                value: self.fence_promise() * 51 / 50,
            };
            longer(&wait, 1, &stopped, "a pod must have stopped before it is started elsewhere");
        }
        let down = Flag::new("--shutdown-grace-period", self.shutdown_grace);
        let critical = Flag::new("--shutdown-grace-period-critical-pods", self.shutdown_grace_critical);
        longer(&down, 1, &critical, "critical pods have the last part of it: give more to all, or less to them");
        for time in [&down, &critical] {
            if !time.value.is_zero() {
                longer(
                    time,
                    1,
                    &Flag::new("a second", ms(1000)),
                    "less is no time for a pod: give that, or 0s for none",
                );
            }
        }
        let proxies = Flag::new("--shutdown-proxy-delay", self.shutdown_proxies);
        let settle = Flag::new("--shutdown-settle-timeout", self.shutdown_settle);
        longer(&settle, 1, &proxies, "what the API is waited for must not be less than what follows from it");
        longer(&gossip_probe, 2, &gossip_timeout, "those who are asked to probe too need as much time again");
        longer(&gossip_suspicion, 3, &gossip_probe, "a machine that lives must be probed again before it is given up");
        let hung = Flag::new("--gossip-hung-timeout", self.gossip_hung);
        longer(&hung, 3, &gossip_suspicion, "a starved machine has longer than one whose power may be off");
        longer(&gossip_suspicion, 6, &gossip_interval, "its objection must have reached everybody by then");
        if broken.is_empty() { Ok(()) } else { Err(Violations(broken)) }
    }

    /// How often a node renews its Lease: a quarter of the time that it holds for, as upstream.
    pub fn node_lease_renew(&self) -> Duration {
        self.node_lease / 4
    }

    /// How long after the last renewal that the store has a node has stopped, by its own clock, what must not run twice.
    ///
    /// The request's time is in it because a renewal counts for the node from when it was sent, and for the store from
    /// when it arrived. The other way round, a request that has been given up may still arrive; that only makes others
    /// wait longer.
    pub fn fence_promise(&self) -> Duration {
        self.fence_after + self.fence_stop + self.node_lease_request
    }

    /// How long after the last sign of a dead leader another one leads, at most, if the store answers in `store`.
    pub fn takeover(&self, store: Duration) -> Duration {
        // Seen late by a poll, confirmed by two reads, then a deletion and a creation.
        self.lease_duration + self.retry_period / POLLS_PER_RETRY + store * 4
    }
}

/// How often a follower looks at the lease, per period in which a leader renews it.
pub const POLLS_PER_RETRY: u32 = 5;

/// A time and the flag that sets it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Flag {
    name: String,
    value: Duration,
}

impl Flag {
    fn new(name: &str, value: Duration) -> Flag {
        Flag { name: name.to_owned(), value }
    }
}

/// A relation that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    long: Flag,
    factor: u32,
    short: Flag,
    why: &'static str,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { long, factor, short, why } = self;
        write!(f, "{} is {:?} and must be at least ", long.name, long.value)?;
        if *factor != 1 {
            write!(f, "{factor} times ")?;
        }
        write!(f, "{:?} ({}): {why}", short.value, short.name)
    }
}

/// Relations that do not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violations(pub Vec<Violation>);

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        write!(f, "these times do not fit together: {}", texts.join("; "))
    }
}

impl std::error::Error for Violations {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_fit_together() {
        for profile in [Profile::Fast, Profile::Kubernetes, Profile::Wan] {
            assert_eq!(Timing::of(profile).check(), Ok(()), "{profile}");
            assert_eq!(profile.to_string().parse(), Ok(profile));
        }
    }

    #[test]
    fn fast_takes_over_in_time() {
        assert!(Timing::of(Profile::Fast).takeover(ms(20)) < ms(1500));
    }

    #[test]
    fn a_broken_sum_names_both_flags_and_numbers() {
        let mut timing = Timing::of(Profile::Fast);
        timing.renew_deadline = ms(900);
        let text = timing.check().unwrap_err().to_string();
        assert_eq!(
            text,
            "these times do not fit together: --leader-elect-lease-duration is 1s and must be at least 1.15s \
             (--leader-elect-renew-deadline + --leader-elect-retry-period): \
             a leader must have given up before another takes over"
        );
        timing = Timing { etcd_election: ms(200), ..Timing::of(Profile::Fast) };
        let text = timing.check().unwrap_err().to_string();
        assert!(text.contains("--etcd-election-timeout is 200ms and must be at least 5 times 50ms"), "{text}");
    }

    #[test]
    fn nobody_starts_a_pod_before_another_has_stopped_it() {
        let check = |timing: Timing, part: &str| {
            let text = timing.check().unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        };
        let fast = Timing::of(Profile::Fast);
        check(
            Timing { fence_wait: ms(17_300), ..fast },
            "--fence-wait is 17.3s and must be at least 17.34s (--fence-after +",
        );
        check(
            Timing { fence_after: ms(7900), ..fast },
            "--fence-after is 7.9s and must be at least 8s (three renewals",
        );
        check(Timing { fence_after: ms(0), ..fast }, "nodes that never stop such pods must not be waited for");
        check(
            Timing { node_grace: ms(5900), ..fast },
            "--node-monitor-grace-period is 5.9s and must be at least 3 times 2s",
        );
        assert_eq!(Timing { fence_wait: ms(0), ..fast }.check(), Ok(()), "nodes may stop what nobody starts elsewhere");
        let upstream = Timing::of(Profile::Kubernetes);
        assert_eq!((upstream.node_lease_renew(), upstream.node_grace), (ms(10_000), ms(50_000)));
        assert!(upstream.fence_after.is_zero() && upstream.fence_wait.is_zero());
    }

    #[test]
    fn critical_pods_have_a_part_of_the_whole() {
        let fast = Timing::of(Profile::Fast);
        let text = Timing { shutdown_grace: ms(5000), ..fast }.check().unwrap_err().to_string();
        assert!(
            text.contains(
                "--shutdown-grace-period is 5s and must be at least 10s (--shutdown-grace-period-critical-pods): \
                 critical pods have the last part of it: give more to all, or less to them"
            ),
            "{text}"
        );
        let text = Timing { shutdown_grace_critical: ms(300), ..fast }.check().unwrap_err().to_string();
        assert!(text.contains("--shutdown-grace-period-critical-pods is 300ms and must be at least 1s"), "{text}");
        assert_eq!(Timing { shutdown_grace_critical: ms(0), ..fast }.check(), Ok(()));
        let upstream = Timing::of(Profile::Kubernetes);
        assert!(upstream.shutdown_grace.is_zero() && upstream.shutdown_grace_critical.is_zero());
    }

    #[test]
    fn an_unknown_profile_is_refused_with_the_known_ones() {
        let error = "quick".parse::<Profile>().unwrap_err();
        assert_eq!(error, "\"quick\" is no time profile: use fast, kubernetes or wan");
    }
}
