//! Options that commands share, and what follows from them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Taint;
use seawall_api::ranges::{NodeMasks, Ranges};
use seawall_quorum::timing::Profile;
use serde::{Deserialize, Serialize};

use crate::metrics::Sources;

mod file;
mod inflight;
mod pressure;
mod timing;

pub use file::with_config_file;
pub use inflight::InflightOptions;
pub use pressure::PressureOptions;
pub use timing::{EvictionOptions, TimingOptions, duration};

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
    /// The rules of NetworkPolicies.
    Policy,
    /// Answering for the addresses of Services of type LoadBalancer.
    LoadBalancer,
    /// The gossip, by which machines find out which of them live.
    Gossip,
    /// The cluster's DNS: on a node its own, on a server also the replicas.
    Dns,
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
    /// The address under which other machines reach this one, or one of each family, as ADDRESS,ADDRESS: the first is what
    /// servers and the gossip are reached by [default: that of the default route].
    #[arg(long, value_delimiter = ',', value_name = "ADDRESS")]
    pub node_ip: Vec<IpAddr>,
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
    /// The directory of static pods: each file in it is the manifest of a pod that runs on this machine, with or without the
    /// API [default: manifests in the data directory].
    #[arg(long, value_name = "DIRECTORY")]
    pub pod_manifest_path: Option<PathBuf>,
    /// The directory of device plugins: where they look for the agent's socket (kubelet.sock) and put their own.
    #[arg(long, default_value = seawall_node::devices::DIRECTORY, value_name = "DIRECTORY")]
    pub device_plugin_dir: PathBuf,
    /// When pods are looked after, and how much of the machine is theirs.
    #[command(flatten)]
    pub pressure: PressureOptions,
    /// The port of this machine's balancer, on 127.0.0.1.
    #[arg(long, default_value_t = 6444)]
    pub balancer_port: u16,
    /// The port of the gossip (UDP), the same on all machines.
    #[arg(long, default_value_t = seawall_network::gossip::PORT)]
    pub gossip_port: u16,
    /// When pods of other nodes are reached by a tunnel from node to node (VXLAN): with auto where a node is on no network
    /// of this machine, with never not at all, with always also on one network, for networks that let nothing pass that has
    /// pods' addresses.
    #[arg(long, value_enum, default_value_t)]
    pub tunnel: Tunnel,
    /// The port of the tunnel (UDP), the same on all machines.
    #[arg(long, default_value_t = seawall_network::routes::PORT)]
    pub tunnel_port: u16,
    /// The size of the largest packet of pods, in bytes [default: that of the interface with --node-ip].
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1280..=65535))]
    pub pod_mtu: Option<u32>,
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

/// When there is a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Tunnel {
    /// Where it is needed.
    #[default]
    Auto,
    /// Nowhere.
    Never,
    /// Everywhere.
    Always,
}

impl From<Tunnel> for seawall_network::routes::Tunnel {
    fn from(tunnel: Tunnel) -> Self {
        match tunnel {
            Tunnel::Auto => Self::Auto,
            Tunnel::Never => Self::Never,
            Tunnel::Always => Self::Always,
        }
    }
}

impl MachineOptions {
    /// The defaults, with these directories.
    pub fn of(data_dir: &Path, run_dir: &Path) -> MachineOptions {
        MachineOptions {
            data_dir: data_dir.to_owned(),
            run_dir: run_dir.to_owned(),
            node_name: None,
            node_ip: Vec::new(),
            node_label: Vec::new(),
            node_taint: Vec::new(),
            agent_port: 10250,
            container_runtime_endpoint: None,
            cni_conf_dir: None,
            hardware_watchdog: None,
            pod_log_dir: "/var/log/pods".into(),
            pod_manifest_path: None,
            device_plugin_dir: seawall_node::devices::DIRECTORY.into(),
            pressure: PressureOptions::default(),
            balancer_port: 6444,
            gossip_port: seawall_network::gossip::PORT,
            tunnel: Tunnel::Auto,
            tunnel_port: seawall_network::routes::PORT,
            pod_mtu: None,
            relay_port: 6445,
            relay_default: false,
            shutdown_grace_period_by_pod_priority: None,
            shutdown_on_sigterm: OnSigterm::Auto,
            disable: Vec::new(),
        }
    }
}

/// What all machines of a cluster have in common. It is decided by the first server and handed to those that join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    /// The addresses of pods.
    pub cluster_cidr: Ranges,
    /// The size of each node's part of them.
    #[serde(default)]
    pub node_masks: NodeMasks,
    /// The addresses of Services.
    pub service_cidr: Ranges,
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
    /// The addresses of pods: a range, or one of each family, as RANGE,RANGE. The first is that of the addresses that come
    /// first.
    #[arg(long, default_value = "10.244.0.0/16", value_name = "RANGE")]
    cluster_cidr: Ranges,
    /// How long the prefix of each node's part of --cluster-cidr is, where that is one range [default: 24 for IPv4, 64 for IPv6,
    /// or 8 bits more than the range if that is longer than a /56].
    #[arg(long, value_name = "BITS")]
    node_cidr_mask_size: Option<u8>,
    /// The same for the range of IPv4.
    #[arg(long, value_name = "BITS")]
    node_cidr_mask_size_ipv4: Option<u8>,
    /// The same for the range of IPv6, at most 16 bits more than the range.
    #[arg(long, value_name = "BITS")]
    node_cidr_mask_size_ipv6: Option<u8>,
    /// The addresses of Services: a range, or one of each family, as RANGE,RANGE. A Service has one of the first unless it
    /// says otherwise.
    #[arg(long, default_value = "10.96.0.0/16", value_name = "RANGE")]
    service_cidr: Ranges,
    /// The ports of Services on nodes.
    #[arg(long, default_value = "30000-32767", value_name = "FIRST-LAST")]
    service_node_port_range: String,
    /// The domain of the cluster.
    #[arg(long, default_value = "cluster.local")]
    cluster_domain: String,
    /// The address of the cluster's DNS, which pods ask. May be repeated [default: the tenth of --service-cidr; with
    /// --disable dns none, and pods ask whom the node asks]. One that is not of --service-cidr is somebody else's DNS: none
    /// is run then.
    #[arg(long, value_name = "ADDRESS")]
    cluster_dns: Vec<IpAddr>,
}

impl ClusterOptions {
    /// Reads and checks them.
    ///
    /// # Errors
    /// Those that are malformed or contradict one another.
    pub fn resolve(&self, timing: Profile, with_dns: bool) -> anyhow::Result<Cluster> {
        let ports = parse_range(&self.service_node_port_range)?;
        let (pods, services) = (self.cluster_cidr, self.service_cidr);
        for (pods, services) in pods.iter().flat_map(|p| services.iter().map(move |s| (p, s))) {
            if pods.contains(&services.network()) || services.contains(&pods.network()) {
                bail!("--cluster-cidr {pods} and --service-cidr {services} overlap: choose two ranges apart");
            }
        }
        if let Some(family) = services.families().into_iter().find(|family| !pods.families().contains(family)) {
            bail!(
                "--service-cidr {services} has {family}, and --cluster-cidr {pods} has not: no pod could be behind it"
            );
        }
        let [any, ipv4, ipv6] =
            [self.node_cidr_mask_size, self.node_cidr_mask_size_ipv4, self.node_cidr_mask_size_ipv6];
        let node_masks = NodeMasks::of_flags(pods, any, ipv4, ipv6).map_err(anyhow::Error::msg)?;
        let mut dns = self.cluster_dns.clone();
        if dns.is_empty() && with_dns {
            dns.extend(tenth(&services.first()));
        }
        Ok(Cluster {
            cluster_cidr: pods,
            node_masks,
            service_cidr: services,
            node_ports: (*ports.start(), *ports.end()),
            domain: self.cluster_domain.clone(),
            dns,
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
    /// The address under which other machines reach it.
    pub ip: IpAddr,
    /// All its addresses: the same, and one of the other family if it has one.
    pub ips: Vec<IpAddr>,
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
        let ips = match options.node_ip[..] {
            [] => vec![default_address().context("no address of this machine was found: give --node-ip")?],
            [one] => vec![one],
            [one, other] if one.is_ipv4() != other.is_ipv4() => vec![one, other],
            _ => bail!("--node-ip {}: give one address, or one of IPv4 and one of IPv6", listed(&options.node_ip)),
        };
        let mut labels = BTreeMap::new();
        for label in &options.node_label {
            let (key, value) =
                label.split_once('=').with_context(|| format!("--node-label {label:?}: write KEY=VALUE"))?;
            seawall_api::names::qualified_name(key).map_err(|e| anyhow::anyhow!("--node-label {label:?}: {e}"))?;
            seawall_api::names::label_value(value).map_err(|e| anyhow::anyhow!("--node-label {label:?}: {e}"))?;
            labels.insert(key.to_owned(), value.to_owned());
        }
        options.pressure.check()?;
        let taints = options.node_taint.iter().map(|text| taint(text)).collect::<anyhow::Result<_>>()?;
        Ok(Machine { options, name, ip: ips[0], ips, labels, taints, metrics: Sources::default() })
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
        let (pods, services) = (cluster.cluster_cidr, cluster.service_cidr);
        if let Some(ip) = self.ips.iter().find(|ip| pods.contains(**ip) || services.contains(**ip)) {
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

fn listed(ips: &[IpAddr]) -> String {
    ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
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

/// The address of a range where clusters have their DNS; `None` if the range is too small.
fn tenth(range: &ipnet::IpNet) -> Option<IpAddr> {
    let ip: IpAddr = match range.network() {
        IpAddr::V4(ip) => Ipv4Addr::from(u32::from(ip).checked_add(10)?).into(),
        IpAddr::V6(ip) => std::net::Ipv6Addr::from(u128::from(ip).checked_add(10)?).into(),
    };
    (range.contains(&ip) && ip != range.broadcast()).then_some(ip)
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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn the_address_of_dns() {
        let check = |range: &str, expect: Option<&str>| {
            assert_eq!(tenth(&range.parse().unwrap()), expect.map(|e| e.parse().unwrap()), "{range}");
        };
        check("10.96.0.0/16", Some("10.96.0.10"));
        check("10.96.1.0/28", Some("10.96.1.10"));
        check("10.96.1.0/29", None);
        check("fd00:96::/112", Some("fd00:96::a"));
    }
}
