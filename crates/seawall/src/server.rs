//! `seawall server`: the API server, the scheduler, the controllers and the node agent in one process.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use kube::Client;
use seawall_server::{
    Config, Server,
    auth::{MASTERS, NODES, UserInfo},
    pki::{self, Authority},
    serve,
};
use seawall_store::{
    Store,
    embedded::{Embedded, Options},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{VERSION, kubeconfig, supervise::component};

/// Parts of a server that can be left out.
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
}

/// Options of `seawall server`.
#[derive(clap::Args)]
pub struct Args {
    /// Where everything is kept that must survive a restart.
    #[arg(long, default_value = "/var/lib/seawall")]
    data_dir: PathBuf,
    /// Where sockets and everything else is kept that ends with the machine's uptime.
    #[arg(long, default_value = "/run/seawall")]
    run_dir: PathBuf,
    /// The address to listen on.
    #[arg(long, default_value = "0.0.0.0")]
    bind_address: IpAddr,
    /// The port of the API.
    #[arg(long, default_value_t = 6443)]
    port: u16,
    /// The name of this machine's Node [default: the host name].
    #[arg(long)]
    node_name: Option<String>,
    /// The address under which other machines reach this one [default: that of the default route].
    #[arg(long)]
    node_ip: Option<IpAddr>,
    /// A label for the Node, as KEY=VALUE. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    node_label: Vec<String>,
    /// A further name or address for the API's certificate. May be repeated.
    #[arg(long, value_name = "NAME")]
    tls_san: Vec<String>,
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
    /// The port of the node agent.
    #[arg(long, default_value_t = 10250)]
    agent_port: u16,
    /// Use the container runtime at this socket instead of starting containerd.
    #[arg(long, value_name = "SOCKET")]
    container_runtime_endpoint: Option<PathBuf>,
    /// The directory of your own CNI configuration [default: one is written].
    #[arg(long, value_name = "DIRECTORY")]
    cni_conf_dir: Option<PathBuf>,
    /// Where the logs of pods go.
    #[arg(long, default_value = "/var/log/pods")]
    pod_log_dir: PathBuf,
    /// Parts to leave out. May be repeated.
    #[arg(long, value_enum, value_delimiter = ',')]
    disable: Vec<Component>,
}

/// Everything that is decided before anything is started.
struct Plan {
    args: Args,
    node_name: String,
    node_ip: IpAddr,
    node_ports: std::ops::RangeInclusive<u16>,
    node_labels: std::collections::BTreeMap<String, String>,
}

impl Plan {
    fn new(args: Args) -> anyhow::Result<Plan> {
        let node_name = match &args.node_name {
            Some(name) => name.clone(),
            None => {
                nix::unistd::gethostname().context("the host name cannot be read")?.to_string_lossy().to_lowercase()
            }
        };
        seawall_api::names::dns_subdomain(&node_name).map_err(|e| anyhow::anyhow!("--node-name {node_name:?}: {e}"))?;
        let node_ip = match args.node_ip {
            Some(ip) => ip,
            None => default_address().context("no address of this machine was found: give --node-ip")?,
        };
        let node_ports = parse_range(&args.service_node_port_range)?;
        let overlap = args.cluster_cidr.contains(&args.service_cidr.network())
            || args.service_cidr.contains(&args.cluster_cidr.network());
        if overlap {
            bail!(
                "--cluster-cidr {} and --service-cidr {} overlap: choose two ranges apart",
                args.cluster_cidr,
                args.service_cidr
            );
        }
        if args.cluster_cidr.contains(&node_ip) || args.service_cidr.contains(&node_ip) {
            bail!(
                "the address {node_ip} of this machine lies in --cluster-cidr {} or --service-cidr {}: choose others",
                args.cluster_cidr,
                args.service_cidr
            );
        }
        let mut node_labels = std::collections::BTreeMap::new();
        for label in &args.node_label {
            let (key, value) =
                label.split_once('=').with_context(|| format!("--node-label {label:?}: write KEY=VALUE"))?;
            seawall_api::names::qualified_name(key).map_err(|e| anyhow::anyhow!("--node-label {label:?}: {e}"))?;
            seawall_api::names::label_value(value).map_err(|e| anyhow::anyhow!("--node-label {label:?}: {e}"))?;
            node_labels.insert(key.to_owned(), value.to_owned());
        }
        Ok(Plan { node_name, node_ip, node_ports, node_labels, args })
    }

    fn runs(&self, part: Component) -> bool {
        !self.args.disable.contains(&part)
    }
}

fn parse_range(text: &str) -> anyhow::Result<std::ops::RangeInclusive<u16>> {
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

/// The certificates of a start.
struct Certificates {
    authority: Authority,
    serving: pki::Pair,
    kubelet_client: pki::Pair,
    agent: pki::Pair,
}

impl Certificates {
    fn make(plan: &Plan) -> anyhow::Result<Certificates> {
        let args = &plan.args;
        let dir = args.data_dir.join("tls");
        let authority = Authority::open(&dir)?;
        let domain = &args.cluster_domain;
        let mut names: Vec<String> = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
            .iter()
            .map(|n| (*n).to_owned())
            .chain([format!("kubernetes.default.svc.{domain}"), plan.node_name.clone()])
            .collect();
        let mut addresses = vec![plan.node_ip, Ipv4Addr::LOCALHOST.into()];
        addresses.extend(args.service_cidr.hosts().next());
        for san in &args.tls_san {
            match san.parse() {
                Ok(ip) => addresses.push(ip),
                Err(_) => names.push(san.clone()),
            }
        }
        let serving = authority.server("kube-apiserver", "", &names, &addresses)?;
        let kubelet_client = authority.client("kube-apiserver-kubelet-client", MASTERS)?;
        let user = format!("system:node:{}", plan.node_name);
        let agent = authority.server(
            &user,
            NODES,
            std::slice::from_ref(&plan.node_name),
            &[plan.node_ip, Ipv4Addr::LOCALHOST.into()],
        )?;
        Ok(Certificates { authority, serving, kubelet_client, agent })
    }
}

/// Runs a server until it is told to stop.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let plan = Plan::new(args)?;
    if !nix::unistd::geteuid().is_root() && (plan.runs(Component::Agent) || plan.runs(Component::Proxy)) {
        bail!("the node agent and the service proxy need root: run as root, or with --disable agent,proxy");
    }
    // As many connections and watches as the machine allows.
    raise_open_files();
    let stop = CancellationToken::new();
    let certificates = Certificates::make(&plan)?;
    let dir = plan.args.data_dir.join("store");
    std::fs::create_dir_all(&dir).with_context(|| format!("--data-dir: {} cannot be made", dir.display()))?;
    // Watchers resume from minutes ago; older history is of no use to a lone server and costs memory.
    let options = Options { history_bytes: 48 << 20, ..Default::default() };
    let store: Arc<dyn Store> = Arc::new(Embedded::open(&dir, options)?);
    let address = SocketAddr::new(plan.args.bind_address, plan.args.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} (--bind-address, --port): is another server running?"))?;
    let config = Config {
        service_cidr: plan.args.service_cidr,
        node_ports: plan.node_ports.clone(),
        advertise: (plan.node_ip, plan.args.port),
        service_account_key: pki::service_account_key(&plan.args.data_dir.join("tls"))?,
        issuer: format!("https://kubernetes.default.svc.{}", plan.args.cluster_domain),
        ca_pem: certificates.authority.pem.clone(),
        kubelet_client: (certificates.kubelet_client.certificate.clone(), certificates.kubelet_client.key.clone()),
        version: VERSION.to_owned(),
    };
    let tls = serve::tls(&certificates.serving, &certificates.authority.pem)?;
    let server = Server::start(config, store.clone(), stop.child_token()).await?;
    write_kubeconfig(&plan, &certificates.authority)?;
    let mut parts = vec![tokio::spawn(serve::serve(server.clone(), listener, tls, stop.clone()))];
    tracing::info!(%address, "the API is served");
    parts.push(tokio::spawn(compact(store, stop.clone())));
    parts.extend(components(&plan, &server, &certificates, &stop));
    wait_for_signal().await?;
    tracing::info!("stopping");
    stop.cancel();
    for part in parts {
        // Panics have been logged where they happened.
        let _ = part.await;
    }
    Ok(())
}

fn components(
    plan: &Plan,
    server: &Arc<Server>,
    certificates: &Certificates,
    stop: &CancellationToken,
) -> Vec<tokio::task::JoinHandle<()>> {
    let client = |name: &str, groups: &[&str]| -> Client {
        let (server, user) = (server.clone(), UserInfo::new(name, groups));
        seawall_client::in_process(move |request| {
            let (server, user) = (server.clone(), user.clone());
            async move { server.handle(request, Some(user)).await }
        })
    };
    let mut parts = Vec::new();
    if plan.runs(Component::Controllers) {
        let client = client("system:kube-controller-manager", &[]);
        let config = seawall_controllers::Config {
            cluster_cidr: plan.args.cluster_cidr,
            service_cidr: Some(plan.args.service_cidr),
            root_ca: certificates.authority.pem.clone(),
            ..Default::default()
        };
        parts.push(component("controllers", stop.clone(), move |stop| {
            seawall_controllers::run(client.clone(), config.clone(), stop)
        }));
    }
    if plan.runs(Component::Scheduler) {
        let client = client("system:kube-scheduler", &[]);
        let config = seawall_scheduler::SchedulerConfig::default();
        parts.push(component("scheduler", stop.clone(), move |stop| {
            seawall_scheduler::run(client.clone(), config.clone(), stop)
        }));
    }
    let node_user = format!("system:node:{}", plan.node_name);
    if plan.runs(Component::Agent) {
        let client = client(&node_user, &[NODES]);
        let config = agent_config(plan, certificates);
        parts.push(component("agent", stop.clone(), move |stop| {
            seawall_node::run(client.clone(), config.clone(), stop)
        }));
    }
    if plan.runs(Component::Proxy) {
        let client = client(&node_user, &[NODES]);
        let config = seawall_network::proxy::ProxyConfig {
            node_name: plan.node_name.clone(),
            node_ips: vec![plan.node_ip],
            cluster_cidr: plan.args.cluster_cidr,
            ..Default::default()
        };
        parts.push(component("proxy", stop.clone(), move |stop| {
            seawall_network::proxy::run(client.clone(), config.clone(), stop)
        }));
    }
    parts
}

fn agent_config(plan: &Plan, certificates: &Certificates) -> seawall_node::NodeConfig {
    let args = &plan.args;
    let mut config = seawall_node::NodeConfig::new(&plan.node_name, plan.node_ip);
    config.data_dir = args.data_dir.join("agent");
    config.run_dir = args.run_dir.clone();
    config.log_dir = args.pod_log_dir.clone();
    config.runtime = match &args.container_runtime_endpoint {
        Some(endpoint) => seawall_node::Runtime::External { endpoint: endpoint.clone() },
        None => seawall_node::Runtime::Supervised {},
    };
    config.cluster_dns = args.cluster_dns.clone();
    config.cluster_domain = args.cluster_domain.clone();
    config.cni_conf_dir = args.cni_conf_dir.clone();
    config.serving_cert_pem = certificates.agent.certificate.clone();
    config.serving_key_pem = certificates.agent.key.clone();
    config.client_ca_pem = certificates.authority.pem.clone();
    config.api_users = vec!["kube-apiserver-kubelet-client".into()];
    config.port = args.agent_port;
    config.node_labels = plan.node_labels.clone();
    // A machine that runs a server says so, as kubeadm's do.
    config.node_labels.insert("node-role.kubernetes.io/control-plane".into(), String::new());
    config
}

fn write_kubeconfig(plan: &Plan, authority: &Authority) -> anyhow::Result<()> {
    let admin = authority.client("kubernetes-admin", MASTERS)?;
    let host = match plan.args.bind_address {
        ip if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        ip => ip,
    };
    let url = format!("https://{}", SocketAddr::new(host, plan.args.port));
    let text = kubeconfig::text(&url, &authority.pem, &admin.certificate, &admin.key)?;
    pki::write(&kubeconfig::path(&plan.args.data_dir), &text, 0o600)?;
    Ok(())
}

/// Forgets old history now and then: every five minutes, all that is older than five minutes.
async fn compact(store: Arc<dyn Store>, stop: CancellationToken) {
    const EVERY: std::time::Duration = std::time::Duration::from_secs(300);
    let mut before = None;
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => return,
        }
        if let Some(revision) = before
            && let Err(error) = store.compact(revision).await
        {
            tracing::warn!(%error, "the store was not compacted");
        }
        before = store.revision().await.ok();
    }
}

fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, "the limit of open files could not be raised to {hard}");
    }
}

async fn wait_for_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    Ok(())
}
