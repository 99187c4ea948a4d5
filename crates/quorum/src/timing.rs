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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// `--gossip-probe-interval`: how often a machine is probed by some other one.
    pub gossip_probe_interval: Duration,
    /// `--gossip-probe-timeout`: how long it has to answer before others are asked to probe it too.
    pub gossip_probe_timeout: Duration,
    /// `--gossip-suspicion-timeout`: how long a machine that several suspect has to object before it is held for dead.
    pub gossip_suspicion: Duration,
    /// `--gossip-interval`: how often news about machines is passed on.
    pub gossip_interval: Duration,
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
                gossip_probe_interval: ms(100),
                gossip_probe_timeout: ms(40),
                gossip_suspicion: ms(400),
                gossip_interval: ms(50),
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
                gossip_probe_interval: ms(1000),
                gossip_probe_timeout: ms(400),
                gossip_suspicion: ms(5000),
                gossip_interval: ms(200),
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
                gossip_probe_interval: ms(800),
                gossip_probe_timeout: ms(300),
                gossip_suspicion: ms(2400),
                gossip_interval: ms(150),
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
        longer(&gossip_probe, 2, &gossip_timeout, "those who are asked to probe too need as much time again");
        longer(&gossip_suspicion, 3, &gossip_probe, "a machine that lives must be probed again before it is given up");
        longer(&gossip_suspicion, 6, &gossip_interval, "its objection must have reached everybody by then");
        if broken.is_empty() { Ok(()) } else { Err(Violations(broken)) }
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
    fn an_unknown_profile_is_refused_with_the_known_ones() {
        let error = "quick".parse::<Profile>().unwrap_err();
        assert_eq!(error, "\"quick\" is no time profile: use fast, kubernetes or wan");
    }
}
