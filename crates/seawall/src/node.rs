//! What makes a machine a node: the agent, the service proxy, the balancer, the routes.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use kube::Client;
use rustls::ServerConfig;
use seawall_network::{
    announce, policy, proxy,
    relay::{self, Relay},
    routes, verdict,
};
use seawall_node::{Counted, Gate, fence, shutdown::Handle};
use seawall_quorum::timing::Timing;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    VERSION, dns,
    files::Files,
    leave,
    options::{Cluster, Component, Machine},
    supervise::component,
};

/// How a node shows who it is to those who call its agent.
#[derive(Clone)]
pub struct Identity {
    /// What handshakes with the agent are made with.
    pub tls: Arc<ServerConfig>,
}

/// Starts the parts that talk to the API as this node.
#[allow(clippy::too_many_arguments, reason = "everything that a node is told comes together here")]
pub fn components(
    machine: &Arc<Machine>,
    cluster: &Cluster,
    timing: &Timing,
    client: &Client,
    identity: &Identity,
    verdicts: &verdict::Receiver,
    leaving: &Arc<Handle>,
    stop: &CancellationToken,
) -> Vec<JoinHandle<()>> {
    let mut parts = Vec::new();
    if machine.runs(Component::Agent) {
        let mut config = agent_config(machine, cluster, timing, identity);
        config.shutdown = leaving.clone();
        if machine.runs(Component::Policy) {
            let handle = policy::Handle::new(client.clone());
            config.gate = Some(gate(&handle));
            let (client, config) =
                (client.clone(), policy::Config { node_name: machine.name.clone(), ..Default::default() });
            parts.push(component("policy", stop.clone(), move |stop| {
                policy::run(client.clone(), config.clone(), handle.clone(), stop)
            }));
        }
        let client = client.clone();
        parts.push(component("agent", stop.clone(), move |stop| {
            seawall_node::run(client.clone(), config.clone(), stop)
        }));
    }
    parts.extend(leave::hold_back(machine, leaving, stop));
    if machine.runs(Component::Proxy) {
        let link = machine.runs(Component::Relay).then(|| relay::link(machine.options.relay_default));
        let (for_proxy, for_relay) = link.unzip();
        let config = proxy::ProxyConfig {
            relay: for_proxy,
            relearn: timing.verdict_memory,
            node_name: machine.name.clone(),
            node_ips: machine.ips.clone(),
            cluster_cidrs: cluster.cluster_cidr.iter().collect(),
            file: Some(Files::new(&machine.options.data_dir).agent().join("proxy.json")),
            ..Default::default()
        };
        let counted = config.metrics.clone();
        machine.metrics.add("proxy", move || counted.render());
        let (client, told) = (client.clone(), verdicts.clone());
        parts.push(component("proxy", stop.clone(), move |stop| {
            proxy::run(client.clone(), config.clone(), told.clone(), stop)
        }));
        if let Some(link) = for_relay {
            let config = relay::Config {
                port: machine.options.relay_port,
                attempt_delay: timing.relay_attempt,
                connect_timeout: timing.relay_connect,
                idle_timeout: timing.relay_idle,
                ..Default::default()
            };
            let relay = Relay::new(config, link, verdicts.clone());
            let counted = relay.clone();
            machine.metrics.add("relay", move || counted.render());
            parts.push(component("relay", stop.clone(), move |stop| {
                let relay = relay.clone();
                async move { relay.run(stop).await }
            }));
        }
    }
    if machine.runs(Component::LoadBalancer) && machine.runs(Component::Proxy) && machine.runs(Component::Agent) {
        let config = announce::Config {
            node_name: machine.name.clone(),
            node_ip: machine.ip,
            file: Some(Files::new(&machine.options.data_dir).agent().join("announce.json")),
            ..Default::default()
        };
        let (client, told) = (client.clone(), verdicts.clone());
        parts.push(component("load balancer", stop.clone(), move |stop| {
            announce::run(client.clone(), config.clone(), told.clone(), stop)
        }));
    }
    parts.extend(dns::on_node(machine, cluster, client, verdicts, stop));
    if machine.runs(Component::Routes) && machine.runs(Component::Agent) {
        let config = routes::Config {
            node_name: machine.name.clone(),
            tunnel: machine.options.tunnel.into(),
            tunnel_port: machine.options.tunnel_port,
            ..Default::default()
        };
        let client = client.clone();
        parts.push(component("routes", stop.clone(), move |stop| routes::run(client.clone(), config.clone(), stop)));
    }
    parts
}

/// The agent starts no container before the rules for its pod are in force.
fn gate(handle: &policy::Handle) -> Gate {
    let (admits, leaves) = (handle.clone(), handle.clone());
    Gate {
        admit: Arc::new(move |pod, ips| {
            let handle = admits.clone();
            Box::pin(async move { handle.admit(&pod, &ips).await })
        }),
        left: Arc::new(move |uid| leaves.left(uid)),
    }
}

fn agent_config(
    machine: &Machine,
    cluster: &Cluster,
    timing: &Timing,
    identity: &Identity,
) -> seawall_node::NodeConfig {
    let options = &machine.options;
    let mut config = seawall_node::NodeConfig::new(&machine.name, machine.ip);
    config.data_dir = Files::new(&options.data_dir).agent();
    config.run_dir = options.run_dir.clone();
    config.log_dir = options.pod_log_dir.clone();
    let manifests = options.pod_manifest_path.clone();
    config.manifests = Some(manifests.unwrap_or_else(|| options.data_dir.join("manifests")));
    config.device_plugins = options.device_plugin_dir.clone();
    config.runtime = match &options.container_runtime_endpoint {
        Some(endpoint) => seawall_node::Runtime::External { endpoint: endpoint.clone() },
        None => seawall_node::Runtime::Supervised {},
    };
    config.cluster_dns = cluster.dns.clone();
    config.own_image = Some(seawall_node::own::name(VERSION));
    config.cluster_domain = cluster.domain.clone();
    config.node_ips = machine.ips.clone();
    config.cluster_cidrs = cluster.cluster_cidr.iter().collect();
    config.cni_conf_dir = options.cni_conf_dir.clone();
    config.pod_mtu = options.pod_mtu;
    config.rules_number = Some(|| seawall_network::nft::generation(&["nft".to_owned()]));
    config.tls = Some(identity.tls.clone());
    let sources = machine.metrics.clone();
    config.metrics = Some(Counted(Arc::new(move || sources.render())));
    config.api_users = vec!["kube-apiserver-kubelet-client".into()];
    config.port = options.agent_port;
    config.node_labels = machine.labels.clone();
    config.taints = machine.taints.clone();
    config.eviction = options.pressure.eviction();
    config.images = options.pressure.images();
    config.reserved = options.pressure.reserved();
    config.cpu_policy = options.pressure.cpu_manager_policy;
    config.topology = options.pressure.topology();
    config.max_pods = options.pressure.max_pods;
    config.lease = timing.node_lease;
    config.lease_request = timing.node_lease_request;
    config.fence = fence::Config {
        after: timing.fence_after,
        promise: timing.fence_promise(),
        program: watchdog(),
        hardware: options.hardware_watchdog.clone(),
    };
    config
}

/// The command that runs the watchdog of pods that must not run twice. Without it the agent watches alone.
fn watchdog() -> Vec<String> {
    let program = std::env::current_exe().ok().and_then(|path| path.into_os_string().into_string().ok());
    // A binary that was replaced meanwhile is found no more.
    let program = program.filter(|path| std::path::Path::new(path).exists());
    program.map(|program| vec![program, "fence-watchdog".into()]).unwrap_or_default()
}

/// Where this machine's balancer listens.
pub fn balancer_address(machine: &Machine) -> SocketAddr {
    SocketAddr::new(IpAddr::from([127, 0, 0, 1]), machine.options.balancer_port)
}
