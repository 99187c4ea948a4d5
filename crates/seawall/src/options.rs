//! Options that commands share, and what follows from them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Taint;
use seawall_quorum::timing::Profile;
use serde::{Deserialize, Serialize};

use crate::metrics::Sources;

mod timing;

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
    /// When the Node says that it is short of memory, disk or process numbers, so that no pods are placed on it:
    /// SIGNAL<AMOUNT or SIGNAL<PERCENT%, separated by commas. A signal that is not named has no threshold.
    #[arg(long, default_value = seawall_node::pressure::DEFAULT, value_name = "SIGNAL<AMOUNT,...", overrides_with = "eviction_hard")]
    pub eviction_hard: seawall_node::pressure::Thresholds,
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
            eviction_hard: Default::default(),
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

/// How many requests a server carries out at a time, by upstream's names
/// (<https://kubernetes.io/docs/concepts/cluster-administration/flow-control/>).
#[derive(clap::Args)]
pub struct InflightOptions {
    /// How many requests that change nothing are carried out at a time. With those that change something, the seats that are
    /// shared out by priority. 0 for as many as come.
    #[arg(long, default_value_t = 400, value_name = "COUNT")]
    max_requests_inflight: u32,
    /// How many requests that change something are carried out at a time.
    #[arg(long, default_value_t = 200, value_name = "COUNT")]
    max_mutating_requests_inflight: u32,
    /// Whether requests wait for their turn by priority and fairness; without, what is too much is refused.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "true|false")]
    enable_priority_and_fairness: bool,
    /// With which probability, at most 0.02, a request tells its HTTP/2 client to come again on another connection, which
    /// spreads clients over several servers behind one entry.
    #[arg(long, default_value_t = 0.0, value_name = "PROBABILITY")]
    goaway_chance: f64,
}

impl InflightOptions {
    /// Reads and checks it.
    ///
    /// # Errors
    /// If it is no such probability.
    pub fn goaway_chance(&self) -> anyhow::Result<f64> {
        let chance = self.goaway_chance;
        if !(0.0..=0.02).contains(&chance) {
            bail!("--goaway-chance {chance}: must be between 0 and 0.02, or clients would do nothing but connect");
        }
        Ok(chance)
    }

    /// What the API server is told.
    pub fn get(&self) -> seawall_server::Inflight {
        let most = self.max_requests_inflight.saturating_add(self.max_mutating_requests_inflight).min(1_000_000);
        seawall_server::Inflight { most, fair: self.enable_priority_and_fairness }
    }
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
