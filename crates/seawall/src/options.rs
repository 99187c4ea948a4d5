//! Options that commands share, and what follows from them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Taint;
use seawall_quorum::timing::{Profile, Timing};
use serde::{Deserialize, Serialize};

use crate::metrics::Sources;

/// Parts that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Component {
    /// The scheduler.
    Scheduler,
    /// The controllers.
    Controllers,
    /// The node agent.
    Agent,
    /// The service proxy.
    Proxy,
    /// The relay.
    Relay,
    /// The balancer in front of the servers.
    Balancer,
    /// The routes to other nodes' pods.
    Routes,
    /// The gossip, by which machines find out which of them live.
    Gossip,
}

/// Options of a machine.
#[derive(clap::Args, Clone)]
pub struct MachineOptions {
    /// Where everything is kept that must survive a restart.
    #[arg(long, default_value = "/var/lib/seawall")]
    pub data_dir: PathBuf,
    /// Where sockets and everything else is kept that ends with the machine's uptime.
    #[arg(long, default_value = "/run/seawall")]
    pub run_dir: PathBuf,
    /// The name of this machine's Node [default: the host name].
    #[arg(long)]
    pub node_name: Option<String>,
    /// The address under which other machines reach this one [default: that of the default route].
    #[arg(long)]
    pub node_ip: Option<IpAddr>,
    /// A label for the Node, as KEY=VALUE. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub node_label: Vec<String>,
    /// A taint that the Node is registered with, as KEY=VALUE:EFFECT or KEY:EFFECT. May be repeated.
    #[arg(long, value_name = "KEY=VALUE:EFFECT")]
    pub node_taint: Vec<String>,
    /// The port of the node agent.
    #[arg(long, default_value_t = 10250)]
    pub agent_port: u16,
    /// Use the container runtime at this socket instead of starting containerd.
    #[arg(long, value_name = "SOCKET")]
    pub container_runtime_endpoint: Option<PathBuf>,
    /// The directory of your own CNI configuration [default: one is written].
    #[arg(long, value_name = "DIRECTORY")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Let this hardware watchdog reset the machine when pods that must not run twice cannot be stopped in time, e.g.
    /// /dev/watchdog.
    #[arg(long, value_name = "DEVICE")]
    pub hardware_watchdog: Option<PathBuf>,
    /// Where the logs of pods go.
    #[arg(long, default_value = "/var/log/pods")]
    pub pod_log_dir: PathBuf,
    /// The port of this machine's balancer, on 127.0.0.1.
    #[arg(long, default_value_t = 6444)]
    pub balancer_port: u16,
    /// The port of the gossip (UDP), the same on all machines.
    #[arg(long, default_value_t = seawall_network::gossip::PORT)]
    pub gossip_port: u16,
    /// The port of this machine's relay, on 127.0.0.1.
    #[arg(long, default_value_t = 6445)]
    pub relay_port: u16,
    /// Relay connections to all Services that do not say `seawall.dev/relay: "false"`, not only to those that say "true".
    #[arg(long)]
    pub relay_default: bool,
    /// How long pods have to end when this machine goes down, by their priority, lowest first: PRIORITY=TIME, ..., e.g.
    /// 0=20s,2000000000=10s. Instead of --shutdown-grace-period.
    #[arg(long, value_name = "PRIORITY=TIME,...")]
    pub shutdown_grace_period_by_pod_priority: Option<String>,
    /// Whether SIGTERM and SIGINT mean that pods are to leave before this process ends. With auto they do if the machine
    /// goes down (as logind, systemd or the run level says), and a process that is only started again leaves its pods
    /// running. With always they leave each time; with never only when logind says so. A second signal ends the process
    /// at once.
    #[arg(long, value_enum, default_value_t)]
    pub shutdown_on_sigterm: OnSigterm,
    /// Parts to leave out. May be repeated.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub disable: Vec<Component>,
}

/// What a signal to end means for pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnSigterm {
    /// They leave if the machine goes down.
    #[default]
    Auto,
    /// They leave.
    Always,
    /// They stay.
    Never,
}

impl MachineOptions {
    /// The defaults, with these directories.
    pub fn of(data_dir: &Path, run_dir: &Path) -> MachineOptions {
        MachineOptions {
            data_dir: data_dir.to_owned(),
            run_dir: run_dir.to_owned(),
            node_name: None,
            node_ip: None,
            node_label: Vec::new(),
            node_taint: Vec::new(),
            agent_port: 10250,
            container_runtime_endpoint: None,
            cni_conf_dir: None,
            hardware_watchdog: None,
            pod_log_dir: "/var/log/pods".into(),
            balancer_port: 6444,
            gossip_port: seawall_network::gossip::PORT,
            relay_port: 6445,
            relay_default: false,
            shutdown_grace_period_by_pod_priority: None,
            shutdown_on_sigterm: OnSigterm::Auto,
            disable: Vec::new(),
        }
    }
}

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

/// What all machines of a cluster have in common. It is decided by the first server and handed to those that join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    /// The addresses of pods.
    pub cluster_cidr: ipnet::IpNet,
    /// The addresses of Services.
    pub service_cidr: ipnet::IpNet,
    /// The ports of Services on nodes: first and last.
    pub node_ports: (u16, u16),
    /// The domain of the cluster.
    pub domain: String,
    /// The addresses of the cluster's DNS.
    #[serde(default)]
    pub dns: Vec<IpAddr>,
    /// The time profile.
    #[serde(default)]
    pub timing: Profile,
}

/// Options of the server that begins a cluster.
#[derive(clap::Args)]
pub struct ClusterOptions {
    /// The addresses of pods.
    #[arg(long, default_value = "10.244.0.0/16")]
    cluster_cidr: ipnet::IpNet,
    /// The addresses of Services.
    #[arg(long, default_value = "10.96.0.0/16")]
    service_cidr: ipnet::IpNet,
    /// The ports of Services on nodes.
    #[arg(long, default_value = "30000-32767", value_name = "FIRST-LAST")]
    service_node_port_range: String,
    /// The domain of the cluster.
    #[arg(long, default_value = "cluster.local")]
    cluster_domain: String,
    /// The address of the cluster's DNS. May be repeated [default: pods use the node's].
    #[arg(long, value_name = "ADDRESS")]
    cluster_dns: Vec<IpAddr>,
}

impl ClusterOptions {
    /// Reads and checks them.
    ///
    /// # Errors
    /// Those that are malformed or contradict one another.
    pub fn resolve(&self, timing: Profile) -> anyhow::Result<Cluster> {
        let ports = parse_range(&self.service_node_port_range)?;
        let (pods, services) = (self.cluster_cidr, self.service_cidr);
        if pods.contains(&services.network()) || services.contains(&pods.network()) {
            bail!("--cluster-cidr {pods} and --service-cidr {services} overlap: choose two ranges apart");
        }
        Ok(Cluster {
            cluster_cidr: pods,
            service_cidr: services,
            node_ports: (*ports.start(), *ports.end()),
            domain: self.cluster_domain.clone(),
            dns: self.cluster_dns.clone(),
            timing,
        })
    }
}

/// What is decided about this machine before anything is started.
pub struct Machine {
    /// The options.
    pub options: MachineOptions,
    /// The Node's name.
    pub name: String,
    /// The address.
    pub ip: IpAddr,
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// The taints that the Node is registered with.
    pub taints: Vec<Taint>,
    /// What its parts count.
    pub metrics: Sources,
}

impl Machine {
    /// Reads and checks the options.
    ///
    /// # Errors
    /// Those that are malformed.
    pub fn new(options: MachineOptions) -> anyhow::Result<Machine> {
        let name = match &options.node_name {
            Some(name) => name.clone(),
            None => {
                nix::unistd::gethostname().context("the host name cannot be read")?.to_string_lossy().to_lowercase()
            }
        };
        seawall_api::names::dns_subdomain(&name).map_err(|e| anyhow::anyhow!("--node-name {name:?}: {e}"))?;
        let ip = match options.node_ip {
            Some(ip) => ip,
            None => default_address().context("no address of this machine was found: give --node-ip")?,
        };
        let mut labels = BTreeMap::new();
        for label in &options.node_label {
            let (key, value) =
                label.split_once('=').with_context(|| format!("--node-label {label:?}: write KEY=VALUE"))?;
            seawall_api::names::qualified_name(key).map_err(|e| anyhow::anyhow!("--node-label {label:?}: {e}"))?;
            seawall_api::names::label_value(value).map_err(|e| anyhow::anyhow!("--node-label {label:?}: {e}"))?;
            labels.insert(key.to_owned(), value.to_owned());
        }
        let taints = options.node_taint.iter().map(|text| taint(text)).collect::<anyhow::Result<_>>()?;
        Ok(Machine { options, name, ip, labels, taints, metrics: Sources::default() })
    }

    /// Whether a part is run.
    pub fn runs(&self, part: Component) -> bool {
        !self.options.disable.contains(&part)
    }

    /// Whether this machine can be in that cluster.
    ///
    /// # Errors
    /// If its address lies in one of the cluster's ranges.
    pub fn fits(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let (ip, pods, services) = (self.ip, cluster.cluster_cidr, cluster.service_cidr);
        if pods.contains(&ip) || services.contains(&ip) {
            bail!(
                "the address {ip} of this machine lies in --cluster-cidr {pods} or --service-cidr {services}: \
                 choose others"
            );
        }
        Ok(())
    }

    /// Whether we may do what a node agent does.
    ///
    /// # Errors
    /// If we are not root.
    pub fn may_run_pods(&self) -> anyhow::Result<()> {
        if !nix::unistd::geteuid().is_root() && (self.runs(Component::Agent) || self.runs(Component::Proxy)) {
            bail!("the node agent and the service proxy need root: run as root, or with --disable agent,proxy");
        }
        Ok(())
    }
}

/// Reads a taint as kubectl writes it (<https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/>).
fn taint(text: &str) -> anyhow::Result<Taint> {
    let way_out = || format!("--node-taint {text:?}: write KEY=VALUE:EFFECT or KEY:EFFECT");
    let (rest, effect) = text.rsplit_once(':').with_context(way_out)?;
    if !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) {
        bail!("--node-taint {text:?}: the effect {effect:?} is none of NoSchedule, PreferNoSchedule and NoExecute");
    }
    let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
    seawall_api::names::qualified_name(key).map_err(|e| anyhow::anyhow!("--node-taint {text:?}: {e}"))?;
    seawall_api::names::label_value(value).map_err(|e| anyhow::anyhow!("--node-taint {text:?}: {e}"))?;
    let value = (!value.is_empty()).then(|| value.to_owned());
    Ok(Taint { key: key.to_owned(), value, effect: effect.to_owned(), time_added: None })
}

fn parse_range(text: &str) -> anyhow::Result<RangeInclusive<u16>> {
    let range = text.split_once('-').and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
    match range {
        Some((first, last)) if first > 0 && first < last => Ok(first..=last),
        _ => bail!("--service-node-port-range {text:?}: write FIRST-LAST, e.g. 30000-32767"),
    }
}

/// The address that the default route leaves by, else the first that is not the loopback's.
fn default_address() -> Option<IpAddr> {
    // Connecting a datagram socket sends nothing; it asks the routing table. The address is of a documentation range.
    let routed = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        socket.local_addr()
    });
    if let Ok(address) = routed
        && !address.ip().is_loopback()
        && !address.ip().is_unspecified()
    {
        return Some(address.ip());
    }
    let addresses = nix::ifaddrs::getifaddrs().ok()?;
    let mut found = addresses.filter_map(|a| a.address?.as_sockaddr_in().map(|a| IpAddr::V4(a.ip())));
    found.find(|ip| !ip.is_loopback())
}

/// The arguments of a configuration file (`--config FILE`): YAML with the same words as the flags. What is given on the
/// command line comes later and wins.
///
/// # Errors
/// A file that cannot be read, or has something else than words and values.
pub fn with_config_file(arguments: Vec<String>) -> anyhow::Result<Vec<String>> {
    let mut out = Vec::new();
    let mut rest = Vec::new();
    let mut arguments = arguments.into_iter().peekable();
    // The program and the command come before what the file says.
    out.extend(arguments.next());
    if let Some(command) = arguments.next_if(|a| !a.starts_with('-')) {
        out.push(command);
    }
    while let Some(argument) = arguments.next() {
        let file = match argument.strip_prefix("--config=") {
            Some(file) => file.to_owned(),
            None if argument == "--config" => arguments.next().context("--config: a file is missing")?,
            None => {
                rest.push(argument);
                continue;
            }
        };
        let text = std::fs::read_to_string(&file).with_context(|| format!("--config {file}"))?;
        let entries: BTreeMap<String, serde_json::Value> = serde_yaml_ng::from_str(&text)
            .with_context(|| format!("--config {file}: write one `flag: value` a line"))?;
        for (key, value) in entries {
            out.extend(flag(&key, &value).with_context(|| format!("--config {file}: {key}"))?);
        }
    }
    out.extend(rest);
    Ok(out)
}

fn flag(key: &str, value: &serde_json::Value) -> anyhow::Result<Vec<String>> {
    use serde_json::Value;
    Ok(match value {
        Value::Bool(true) => vec![format!("--{key}")],
        Value::Bool(false) | Value::Null => Vec::new(),
        Value::Number(n) => vec![format!("--{key}={n}")],
        Value::String(text) => vec![format!("--{key}={text}")],
        Value::Array(items) => {
            let mut all = Vec::new();
            for item in items {
                all.extend(flag(key, item)?);
            }
            all
        }
        Value::Object(entries) if entries.values().all(Value::is_string) => {
            // As labels are written in YAML.
            let pair = |(k, v): (&String, &Value)| format!("--{key}={k}={}", v.as_str().unwrap_or_default());
            entries.iter().map(pair).collect()
        }
        Value::Object(_) => bail!("a value, a list of values or a map of texts is expected"),
    })
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
    fn taints() {
        let check = |text: &str, key: &str, value: Option<&str>, effect: &str| {
            let taint = taint(text).unwrap();
            assert_eq!((taint.key.as_str(), taint.value.as_deref(), taint.effect.as_str()), (key, value, effect));
        };
        check("a.example/b=c:NoExecute", "a.example/b", Some("c"), "NoExecute");
        check(
            "node-role.kubernetes.io/control-plane:NoSchedule",
            "node-role.kubernetes.io/control-plane",
            None,
            "NoSchedule",
        );
        check("a=:NoSchedule", "a", None, "NoSchedule");
        for (bad, why) in [("a", "write KEY=VALUE:EFFECT"), ("a:Never", "none of NoSchedule"), ("-:NoSchedule", "must")]
        {
            let error = format!("{:#}", taint(bad).unwrap_err());
            assert!(error.contains(why), "{bad}: {error}");
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

    #[test]
    fn the_file_says_what_the_flags_say() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(
            &file,
            "cluster-init: true\nport: 7443\ntls-san: [a.example, b.example]\nnode-label: {tier: web}\ndisable: null\n",
        )
        .unwrap();
        let arguments = |list: &[&str]| list.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
        let config = file.display().to_string();
        let all = with_config_file(arguments(&["seawall", "server", "--config", &config, "--port=8443"])).unwrap();
        let expect = [
            "seawall",
            "server",
            "--cluster-init",
            "--node-label=tier=web",
            "--port=7443",
            "--tls-san=a.example",
            "--tls-san=b.example",
            "--port=8443",
        ];
        assert_eq!(all, expect);
        std::fs::write(&file, "cluster-init: {a: [1]}\n").unwrap();
        let error = with_config_file(arguments(&["seawall", "server", "--config", &config])).unwrap_err();
        assert!(format!("{error:#}").contains("cluster-init: a value, a list of values"), "{error:#}");
        let error = with_config_file(arguments(&["seawall", "server", "--config", "/nowhere"])).unwrap_err();
        assert!(format!("{error:#}").contains("--config /nowhere: No such file"), "{error:#}");
    }
}
