//! The flags of all times, and of how fast nodes are emptied.

use std::time::Duration;

use seawall_quorum::timing::{Profile, Timing};

/// The times of a cluster, by a profile and by what differs from it.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct TimingOptions {
    /// The time profile: fast, kubernetes or wan [default: fast].
    #[arg(long, value_name = "PROFILE")]
    pub timing: Option<Profile>,
    /// How long a leader that is not heard of is still believed in, e.g. 1s.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    leader_elect_lease_duration: Option<Duration>,
    /// How long a leader that cannot renew goes on.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    leader_elect_renew_deadline: Option<Duration>,
    /// How often a leader renews.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    leader_elect_retry_period: Option<Duration>,
    /// How long the store must have answered before the silence of a leader counts.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    leader_elect_grace: Option<Duration>,
    /// How often etcd's leader is heard.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    etcd_heartbeat_interval: Option<Duration>,
    /// How long etcd's members wait for their leader.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    etcd_election_timeout: Option<Duration>,
    /// How long one member of the store has to answer.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    store_request_timeout: Option<Duration>,
    /// How long a request tries, on all members of the store together.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    store_budget: Option<Duration>,
    /// How often a server says that it lives.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    server_renew_interval: Option<Duration>,
    /// How long a silent server stays an endpoint of the kubernetes Service.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    server_expiry: Option<Duration>,
    /// How often a node's balancer asks each server.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    balancer_probe_interval: Option<Duration>,
    /// How long a server has to answer that.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    balancer_probe_timeout: Option<Duration>,
    /// How long a node's Lease says that it holds; it is renewed four times in that time.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    node_lease_duration: Option<Duration>,
    /// How long a renewal of it may take.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    node_lease_request_timeout: Option<Duration>,
    /// How often the controllers look at all nodes.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    node_monitor_period: Option<Duration>,
    /// How long a node may be silent before it is held to be unreachable.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    node_monitor_grace_period: Option<Duration>,
    /// The same for a node that has never said how it is.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    node_startup_grace_period: Option<Duration>,
    /// How many seconds a pod stays on a node that is not ready, if it does not say.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    default_not_ready_toleration_seconds: Option<Duration>,
    /// How many seconds a pod stays on a node that is not heard of, if it does not say.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    default_unreachable_toleration_seconds: Option<Duration>,
    /// After so long without a renewed Lease a node stops the pods that must not run twice [0s: never].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    fence_after: Option<Duration>,
    /// How long that takes at most.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    fence_stop: Option<Duration>,
    /// How long a node must have been silent before such pods are made anew elsewhere [0s: they are not].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    fence_wait: Option<Duration>,
    /// How often a machine is probed by some other one.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    gossip_probe_interval: Option<Duration>,
    /// How long a machine has to answer before others are asked to probe it too.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    gossip_probe_timeout: Option<Duration>,
    /// How long a machine that several suspect has to object before it is held for dead.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    gossip_suspicion_timeout: Option<Duration>,
    /// How long a machine whose kernel answers has, although its process does not: it may be starved.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    gossip_hung_timeout: Option<Duration>,
    /// How often news about machines is passed on.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    gossip_interval: Option<Duration>,
    /// How long a machine that was dead when the service proxy ended is avoided after the next start, if the gossip does
    /// not speak of it.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    verdict_memory: Option<Duration>,
    /// How long an endpoint has to answer before the relay tries the next one as well.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    relay_attempt_delay: Option<Duration>,
    /// How long the relay tries, on all endpoints together.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    relay_connect_timeout: Option<Duration>,
    /// How long a relayed connection may be silent.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    relay_idle_timeout: Option<Duration>,
    /// How long pods have to end when their machine goes down, all together [0s: they are left alone].
    #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with = "shutdown_grace_period_by_pod_priority")]
    shutdown_grace_period: Option<Duration>,
    /// The last part of it, for critical pods: those with a priority from 2000000000 on.
    #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with = "shutdown_grace_period_by_pod_priority")]
    shutdown_grace_period_critical_pods: Option<Duration>,
    /// How long a node that goes down waits until no Service leads to its pods, and when they have ended until the API
    /// knows.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    shutdown_settle_timeout: Option<Duration>,
    /// How long after that until all proxies have heard of it.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    shutdown_proxy_delay: Option<Duration>,
}

/// Reads a time such as `250ms`, `1.5s` or `1m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no time: write a number and ms, s, m or h, e.g. 250ms");
    let unit = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(bad)?;
    let (number, unit) = text.split_at(unit);
    let number: f64 = number.parse().map_err(|_| bad())?;
    let seconds = match unit {
        "ms" => number / 1e3,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(bad()),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| bad())
}

/// Reads a number of seconds as upstream's flags have it, or a time.
pub fn seconds(text: &str) -> Result<Duration, String> {
    text.parse().map(Duration::from_secs).or_else(|_| duration(text))
}

/// How fast nodes are emptied that are not heard of, and when that stops. The flags are upstream's.
#[derive(clap::Args, Clone, Debug)]
pub struct EvictionOptions {
    /// How many nodes of a zone may be emptied per second.
    #[arg(long, value_name = "RATE", default_value_t = 0.1, value_parser = rate)]
    node_eviction_rate: f64,
    /// How many, when much of a large zone is gone.
    #[arg(long, value_name = "RATE", default_value_t = 0.01, value_parser = rate)]
    secondary_node_eviction_rate: f64,
    /// The share of a zone's nodes that has to be gone for that.
    #[arg(long, value_name = "SHARE", default_value_t = 0.55, value_parser = rate)]
    unhealthy_zone_threshold: f64,
    /// A zone with more nodes than this is large; a smaller one is not emptied at all then.
    #[arg(long, value_name = "NODES", default_value_t = 50)]
    large_cluster_size_threshold: usize,
}

fn rate(text: &str) -> Result<f64, String> {
    let bad = || format!("{text:?} is no rate: write a number that is not negative, e.g. 0.1");
    text.parse().ok().filter(|n: &f64| n.is_finite() && *n >= 0.0).ok_or_else(bad)
}

impl EvictionOptions {
    /// What the controllers are told.
    pub fn settings(&self, timing: &Timing) -> seawall_controllers::node_lifecycle::Settings {
        seawall_controllers::node_lifecycle::Settings {
            rate: self.node_eviction_rate,
            secondary_rate: self.secondary_node_eviction_rate,
            unhealthy_share: self.unhealthy_zone_threshold,
            large_zone: self.large_cluster_size_threshold,
            ..seawall_controllers::node_lifecycle::Settings::of(timing)
        }
    }
}

impl TimingOptions {
    /// The times, all of which fit together.
    ///
    /// # Errors
    /// The sums that do not hold, with the flags that are in them.
    pub fn resolve(&self, default: Profile) -> anyhow::Result<Timing> {
        let mut timing = Timing::of(self.timing.unwrap_or(default));
        for (given, place) in [
            (self.leader_elect_lease_duration, &mut timing.lease_duration),
            (self.leader_elect_renew_deadline, &mut timing.renew_deadline),
            (self.leader_elect_retry_period, &mut timing.retry_period),
            (self.leader_elect_grace, &mut timing.grace),
            (self.etcd_heartbeat_interval, &mut timing.etcd_heartbeat),
            (self.etcd_election_timeout, &mut timing.etcd_election),
            (self.store_request_timeout, &mut timing.store_request),
            (self.store_budget, &mut timing.store_budget),
            (self.server_renew_interval, &mut timing.server_renew),
            (self.server_expiry, &mut timing.server_expiry),
            (self.balancer_probe_interval, &mut timing.probe_interval),
            (self.balancer_probe_timeout, &mut timing.probe_timeout),
            (self.node_lease_duration, &mut timing.node_lease),
            (self.node_lease_request_timeout, &mut timing.node_lease_request),
            (self.node_monitor_period, &mut timing.node_monitor),
            (self.node_monitor_grace_period, &mut timing.node_grace),
            (self.node_startup_grace_period, &mut timing.node_startup_grace),
            (self.default_not_ready_toleration_seconds, &mut timing.not_ready_toleration),
            (self.default_unreachable_toleration_seconds, &mut timing.unreachable_toleration),
            (self.fence_after, &mut timing.fence_after),
            (self.fence_stop, &mut timing.fence_stop),
            (self.fence_wait, &mut timing.fence_wait),
            (self.gossip_probe_interval, &mut timing.gossip_probe_interval),
            (self.gossip_probe_timeout, &mut timing.gossip_probe_timeout),
            (self.gossip_suspicion_timeout, &mut timing.gossip_suspicion),
            (self.gossip_hung_timeout, &mut timing.gossip_hung),
            (self.gossip_interval, &mut timing.gossip_interval),
            (self.verdict_memory, &mut timing.verdict_memory),
            (self.relay_attempt_delay, &mut timing.relay_attempt),
            (self.relay_connect_timeout, &mut timing.relay_connect),
            (self.relay_idle_timeout, &mut timing.relay_idle),
            (self.shutdown_grace_period, &mut timing.shutdown_grace),
            (
                // Who wants none at all need not say so twice.
                self.shutdown_grace_period_critical_pods.or(self.shutdown_grace_period.filter(|whole| whole.is_zero())),
                &mut timing.shutdown_grace_critical,
            ),
            (self.shutdown_settle_timeout, &mut timing.shutdown_settle),
            (self.shutdown_proxy_delay, &mut timing.shutdown_proxies),
        ] {
            if let Some(given) = given {
                *place = given;
            }
        }
        timing.check()?;
        Ok(timing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "5", "s", "5 days", "-1s", "1e400s"] {
            let error = duration(bad).unwrap_err();
            assert!(error.contains("write a number and ms, s, m or h"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_sum_that_does_not_hold_is_refused() {
        let options =
            TimingOptions { leader_elect_lease_duration: Some(Duration::from_millis(800)), ..Default::default() };
        let error = options.resolve(Profile::Fast).unwrap_err().to_string();
        assert!(error.contains("--leader-elect-lease-duration is 800ms and must be at least 1s"), "{error}");
        assert!(options.resolve(Profile::Kubernetes).is_err());
        assert_eq!(TimingOptions::default().resolve(Profile::Wan).unwrap(), Timing::of(Profile::Wan));
    }

    #[test]
    fn pods_are_left_alone_when_all_have_no_time() {
        let options = TimingOptions { shutdown_grace_period: Some(Duration::ZERO), ..Default::default() };
        let timing = options.resolve(Profile::Fast).unwrap();
        assert!(timing.shutdown_grace.is_zero() && timing.shutdown_grace_critical.is_zero());
        let options = TimingOptions { shutdown_grace_period: Some(Duration::from_secs(5)), ..Default::default() };
        let error = options.resolve(Profile::Fast).unwrap_err().to_string();
        assert!(error.contains("--shutdown-grace-period is 5s and must be at least 10s"), "{error}");
    }
}
