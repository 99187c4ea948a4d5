//! The node agent: the pod state machine, and containerd, CNI, volumes, probes, exec and logs at its edge.
//!
//! [`run`] does the work of a Kubernetes node (<https://kubernetes.io/docs/concepts/architecture/#kubelet>). What to do
//! is decided in [`pod`], purely; one [`worker`] per pod carries it out.

pub mod admission;
pub mod api;
pub mod cgroup;
pub mod cni;
pub mod container;
pub mod containerd;
pub mod cpus;
pub mod cri;
pub mod devices;
pub mod downward;
pub mod env;
pub mod events;
pub mod eviction;
pub mod fence;
pub mod handler;
pub mod hooks;
pub mod huge_pages;
pub mod image;
pub mod lock;
mod log_rotation;
mod manager;
mod masquerade;
mod node_loop;
pub mod node_status;
pub mod objects;
mod operations;
pub mod own;
pub mod pause;
pub mod pleg;
pub mod pod;
pub mod pressure;
pub mod probe;
pub mod reserved;
pub mod sandbox;
pub mod security;
pub mod services;
pub mod shutdown;
pub mod static_pods;
pub mod stats;
pub mod topology;
pub mod traces;
pub mod volume;
pub mod worker;

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use futures::{FutureExt as _, future::BoxFuture};
use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use kube::Client;
use parking_lot::RwLock;
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::Ledger, cgroup::Cgroups, cpus::Cpus, cri::Cri, devices::Devices, downward::Allocatable,
    events::Recorder, node_status::Machine, objects::Watches, pleg::Pleg, services::Services, worker::View,
};

/// Which container runtime the agent drives.
#[derive(Clone, Debug)]
pub enum Runtime {
    /// A containerd of our own: started, configured and kept alive by the agent.
    Supervised {},
    /// One that is there already, at this Unix socket.
    External {
        /// The path of the CRI socket.
        endpoint: PathBuf,
    },
}

/// How a node is run.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The Node object's name.
    pub node_name: String,
    /// The address that others reach this node at.
    pub node_ip: IpAddr,
    /// All addresses of this node: the same, and one of the other family if it has one.
    pub node_ips: Vec<IpAddr>,
    /// What survives a boot, e.g. `/var/lib/seawall/agent`.
    pub data_dir: PathBuf,
    /// What must not survive a boot, e.g. `/run/seawall`.
    pub run_dir: PathBuf,
    /// Pods' logs, `/var/log/pods` where log collectors look for them.
    pub log_dir: PathBuf,
    /// Where manifests of static pods are looked for; `None` for nowhere.
    pub manifests: Option<PathBuf>,
    /// Where device plugins look for the agent, and have their sockets ([`devices`]).
    pub device_plugins: PathBuf,
    /// The container runtime.
    pub runtime: Runtime,
    /// The cluster's DNS servers, for `dnsPolicy: ClusterFirst`; none means that pods use the node's.
    pub cluster_dns: Vec<IpAddr>,
    /// The name of the image that is made of this program where a pod wants it ([`own`]).
    pub own_image: Option<String>,
    /// The cluster's domain, e.g. `cluster.local`.
    pub cluster_domain: String,
    /// The cgroup that all pods go below, `/kubepods`.
    pub cgroup_root: String,
    /// A CNI configuration directory that the user provides; ours is written if there is none.
    pub cni_conf_dir: Option<PathBuf>,
    /// The size of the largest packet of pods, in bytes; that of the node's interface if none is given.
    pub pod_mtu: Option<u32>,
    /// The TLS of the agent's own API, if its certificates may be exchanged. Without it, those that follow are used.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// The certificate of the agent's own API.
    pub serving_cert_pem: String,
    /// Its key.
    pub serving_key_pem: String,
    /// Who signs the certificates of those that may use it.
    pub client_ca_pem: String,
    /// The common names that may use it; members of `system:masters` always may.
    pub api_users: Vec<String>,
    /// The port of the agent's own API, 10250.
    pub port: u16,
    /// How many pods the node takes.
    pub max_pods: u32,
    /// Labels beside the well-known ones.
    pub node_labels: BTreeMap<String, String>,
    /// Taints that a new node is registered with.
    pub taints: Vec<Taint>,
    /// How long the node's Lease says that it holds. It is renewed four times in that time.
    pub lease: Duration,
    /// How long a renewal may take.
    pub lease_request: Duration,
    /// When the node is short of something, and pods have to go.
    pub eviction: eviction::state::Settings,
    /// When images are deleted.
    pub images: eviction::images::Settings,
    /// What pods may not have of the machine.
    pub reserved: reserved::Reserved,
    /// Who gets CPUs for itself.
    pub cpu_policy: cpus::Policy,
    /// What of that, and of devices, is to be near to each other.
    pub topology: topology::settings::Settings,
    /// What is stopped when the Lease is not renewed.
    pub fence: fence::Config,
    /// What `/metrics` of the agent's own API shows.
    pub metrics: Option<Counted>,
    /// Whether the machine goes down, and what becomes of pods then.
    pub shutdown: Arc<shutdown::Handle>,
    /// Who opens the network to pods: without it, it is open.
    pub gate: Option<Gate>,
    /// The addresses of all pods of the cluster: what goes elsewhere from a pod gets the node's address.
    pub cluster_cidrs: Vec<ipnet::IpNet>,
    /// Asks for the number of the firewall's rules, which every change makes another one: while it is the same, what was there
    /// still is. Without, it is looked at each time.
    pub rules_number: Option<fn() -> Option<u32>>,
}

/// Waits until the network may be opened to a pod with these addresses.
pub type Admit = dyn Fn(Arc<Pod>, Vec<IpAddr>) -> BoxFuture<'static, Result<(), String>> + Send + Sync;

/// What is to happen before a pod's first packet, and after its last. Pods on the node's network have no gate.
#[derive(Clone)]
pub struct Gate {
    /// Returns when the rules for a pod with these addresses are in force, or says why not; to be tried again then.
    pub admit: Arc<Admit>,
    /// The pod with this uid is gone.
    pub left: Arc<dyn Fn(&str) + Send + Sync>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gate")
    }
}

/// Says what was counted on this machine, as Prometheus reads it.
#[derive(Clone)]
pub struct Counted(pub Arc<dyn Fn() -> String + Send + Sync>);

impl std::fmt::Debug for Counted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counted")
    }
}

impl NodeConfig {
    /// The defaults of a node with this name and address; certificates are left empty.
    pub fn new(node_name: impl Into<String>, node_ip: IpAddr) -> Self {
        Self {
            node_name: node_name.into(),
            node_ip,
            node_ips: vec![node_ip],
            data_dir: "/var/lib/seawall/agent".into(),
            run_dir: "/run/seawall".into(),
            log_dir: "/var/log/pods".into(),
            manifests: None,
            device_plugins: devices::DIRECTORY.into(),
            runtime: Runtime::Supervised {},
            cluster_dns: Vec::new(),
            own_image: None,
            cluster_domain: "cluster.local".into(),
            cgroup_root: "/kubepods".into(),
            cni_conf_dir: None,
            pod_mtu: None,
            tls: None,
            serving_cert_pem: String::new(),
            serving_key_pem: String::new(),
            client_ca_pem: String::new(),
            api_users: Vec::new(),
            port: 10250,
            max_pods: 110,
            node_labels: BTreeMap::new(),
            taints: Vec::new(),
            lease: Duration::from_secs(40),
            lease_request: Duration::from_secs(10),
            eviction: Default::default(),
            images: Default::default(),
            reserved: Default::default(),
            cpu_policy: Default::default(),
            topology: Default::default(),
            fence: fence::Config::default(),
            metrics: None,
            shutdown: shutdown::Handle::new(shutdown::Config::default()),
            gate: None,
            cluster_cidrs: Vec::new(),
            rules_number: None,
        }
    }

    #[cfg(test)]
    fn for_tests() -> Self {
        Self::new("node-1", [192, 168, 0, 1].into())
    }

    /// Where a supervised containerd keeps things.
    pub fn containerd(&self) -> containerd::Paths {
        containerd::Paths {
            root: self.data_dir.join("containerd"),
            run: self.run_dir.join("containerd"),
            cni_conf: self.cni_conf_dir.clone().unwrap_or_else(|| self.run_dir.join("cni/net.d")),
        }
    }

    /// The CRI socket.
    pub fn cri_socket(&self) -> PathBuf {
        match &self.runtime {
            Runtime::Supervised {} => self.containerd().socket(),
            Runtime::External { endpoint } => endpoint.clone(),
        }
    }
}

/// How many images are pulled at a time.
const PULLS: usize = 4;

/// What the parts of the agent share.
pub struct Agent {
    /// How it is run.
    pub config: NodeConfig,
    /// The API.
    pub client: Client,
    /// The runtime.
    pub cri: Cri,
    /// What the runtime says about pods.
    pub pleg: Arc<Pleg>,
    /// Where events go.
    pub events: Recorder,
    /// For variables.
    pub services: Services,
    /// For changes of config maps and secrets.
    pub watches: Watches,
    /// The host's cgroups.
    pub cgroups: Cgroups,
    /// What may run only while the node's Lease is renewed.
    pub fence: fence::Guard,
    /// Which pods have to go.
    pub evictions: eviction::Orders,
    /// What pods use.
    pub stats: stats::Sampler,
    /// What pods may use.
    pub allocatable: Allocatable,
    /// The node's memory in bytes.
    pub memory: i64,
    /// The sizes of huge pages that the kernel has, in bytes.
    pub huge_pages: Vec<u64>,
    /// Bounds concurrent image pulls.
    pub pulls: Semaphore,
    /// Network and services are there: pods may start.
    pub ready: watch::Sender<bool>,
    /// What the API says of our Node; `None` before it has said anything, and when there is none.
    pub node: watch::Sender<Option<Arc<Node>>>,
    /// What pods have been given of the node.
    pub ledger: Ledger,
    /// Who has CPUs for itself.
    pub cpus: Cpus,
    /// What of what pods get for themselves is near to each other.
    pub topology: topology::Manager,
    /// What device plugins have, and who has it.
    pub devices: Arc<Devices>,
    /// The API has said which pods are here.
    pub listed: watch::Sender<bool>,
    /// The pods that have a worker, by uid.
    pub pods: RwLock<HashMap<String, View>>,
}

impl Agent {
    /// Takes back what a pod had for itself alone. To be called when none of its containers runs any more.
    fn release_for_good(&self, uid: &str) {
        self.devices.release(uid);
        self.cpus.release(uid);
    }
}

/// Runs the agent until `shutdown`, or until a part of it fails for good. Pods are left running, unless the machine goes
/// down ([`NodeConfig::shutdown`]).
pub fn run(client: Client, config: NodeConfig, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(client, config, shutdown))
}

async fn work(client: Client, config: NodeConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    // Before anything is touched: who manages the pods of this machine already goes on undisturbed.
    let _locks = lock::Locks::to_run(&config).await?;
    let listeners = api::bind(&config)?;
    traces::note(&config).with_context(|| format!("write to {}", config.data_dir.display()))?;
    for directory in [&config.data_dir, &config.run_dir, &config.log_dir].into_iter().chain(&config.manifests) {
        std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    }
    let cpus = Cpus::open(&config)?;
    let topology = topology::Manager::open(config.topology, Path::new(topology::SYSTEM))?;
    let (devices, plugins) = Devices::open(&config.data_dir, &config.device_plugins)
        .with_context(|| format!("what pods have of devices, in {}", config.data_dir.display()))?;
    let device_listener = devices::registration::listen(&config.device_plugins)?;
    cni::enable_forwarding().context("enable IP forwarding")?;
    let cgroups = Cgroups::detect(&config.cgroup_root);
    cgroups.prepare_node().context("make the cgroups of pods under /sys/fs/cgroup (root is needed)")?;
    reserved::enforce(&config, &cgroups).context("limit the cgroup of all pods")?;
    // Before anything else runs here: what may not run any more is stopped.
    let file = config.run_dir.join("fence.json");
    let fence = fence::Guard::open(config.fence.clone(), file, &cgroups)
        .with_context(|| format!("write to {}", config.run_dir.display()))?;
    let _watchdog = fence.watch().context("start the watchdog of pods that must not run twice")?;
    let supervised = match &config.runtime {
        Runtime::Supervised {} => Some(containerd::ensure_running(&config.containerd()).await?),
        Runtime::External { .. } => None,
    };
    let cri = Cri::connect(&config.cri_socket())?;
    let version =
        cri.version().await.with_context(|| format!("no CRI runtime at {}", config.cri_socket().display()))?;
    let machine = Machine::detect(&config.data_dir, &version);
    let (events, writer) = Recorder::new(client.clone(), config.node_name.clone());
    let agent = Arc::new(Agent {
        pleg: Arc::new(Pleg::new(cri.clone(), config.node_ip.is_ipv6())),
        watches: Watches::new(client.clone(), shutdown.clone()),
        services: Services::default(),
        stats: stats::Sampler::default(),
        evictions: eviction::Orders::default(),
        allocatable: machine.allocatable(&config),
        memory: machine.memory,
        huge_pages: machine.huge_pages.keys().copied().collect(),
        pulls: Semaphore::new(PULLS),
        ready: watch::channel(false).0,
        node: watch::channel(None).0,
        ledger: Ledger::open(&config.data_dir),
        cpus,
        topology,
        devices: Arc::new(devices),
        listed: watch::channel(false).0,
        pods: RwLock::default(),
        config,
        client: client.clone(),
        cri,
        events,
        cgroups,
        fence,
    });
    agent.pleg.relist(None).await.map_err(|s| anyhow::anyhow!("list the runtime's containers: {}", s.message()))?;

    // Whatever ends first ends the agent: its supervisor starts it again, and everything is picked up.
    let stop = shutdown.child_token();
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let _guard = stop.clone().drop_guard();
    if let Some(running) = supervised {
        let (paths, stop) = (agent.config.containerd(), stop.clone());
        tasks.spawn(part(containerd::supervise(paths, running, stop)));
    }
    tasks.spawn(part(events::run(writer, stop.clone())));
    let (a, s) = (Arc::clone(&agent), stop.clone());
    tasks.spawn(part(async move { a.pleg.run(s).await }));
    let (a, s, c) = (Arc::clone(&agent), stop.clone(), client.clone());
    tasks.spawn(part(async move { a.services.run(c, s).await }));
    tasks.spawn(part(node_loop::run(Arc::clone(&agent), machine, stop.clone())));
    tasks.spawn(part(node_loop::renew_lease(Arc::clone(&agent), stop.clone())));
    let (said, files) = watch::channel(static_pods::Pods::new());
    match &agent.config.manifests {
        Some(path) => {
            let mut directory = static_pods::Directory::new(path, &agent.config.node_name);
            // Before anybody asks which of the pods here are wanted. What is wrong with the directory is said below.
            drop(said.send_replace(directory.read(jiff::Timestamp::now()).unwrap_or_default()));
            tasks.spawn(part(static_pods::run(directory, said, stop.clone())));
        }
        // Nothing comes of it, but it stays open.
        None => drop(tasks.spawn(part(stop.clone().cancelled_owned().map(|()| drop(said))))),
    }
    tasks.spawn(part(manager::run(Arc::clone(&agent), files, stop.clone())));
    tasks.spawn(part(shutdown::run(Arc::clone(&agent), stop.clone())));
    tasks.spawn(part(log_rotation::run(Arc::clone(&agent), stop.clone())));
    tasks.spawn(part(eviction::run(Arc::clone(&agent), stop.clone())));
    tasks.spawn(part(stats::run(Arc::clone(&agent), stop.clone())));
    tasks.spawn(part(cpus::run(Arc::clone(&agent), stop.clone())));
    tasks.spawn(devices::run(Arc::clone(&agent.devices), plugins, device_listener, stop.clone()));
    tasks.spawn(api::run(Arc::clone(&agent), listeners, stop.clone()));

    let first = tasks.join_next().await;
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    match first {
        _ if shutdown.is_cancelled() => Ok(()),
        Some(Ok(Err(error))) => Err(error),
        Some(Err(panic)) => Err(anyhow::anyhow!("a part of the node agent failed: {panic}")),
        _ => Err(anyhow::anyhow!("a part of the node agent ended")),
    }
}

async fn part(work: impl Future<Output = ()> + Send) -> anyhow::Result<()> {
    work.await;
    Ok(())
}

/// Takes everything of the agent away from this machine: pods, containerd, mounts, cgroups, files. The API is not told.
///
/// # Errors
/// If an agent runs, or something cannot be removed.
pub fn remove_all(config: &NodeConfig) -> BoxFuture<'_, anyhow::Result<()>> {
    Box::pin(remove(config))
}

async fn remove(config: &NodeConfig) -> anyhow::Result<()> {
    let traces = traces::Traces::read(config);
    let _locks = lock::Locks::to_remove(config).await?;
    // Containers live on without their containerd; only one that runs can take them away.
    if matches!(config.runtime, Runtime::Supervised {}) && config.containerd().root.exists() {
        containerd::ensure_running(&config.containerd()).await.context("start containerd to remove the pods")?;
    }
    if let Ok(cri) = Cri::connect(&config.cri_socket())
        && cri.version().await.is_ok()
    {
        for sandbox in cri.sandboxes(None).await.map_err(|s| anyhow::anyhow!("{}", s.message()))? {
            let result = async {
                cri.stop_sandbox(&sandbox.id).await?;
                cri.remove_sandbox(&sandbox.id).await
            };
            result.await.map_err(|s| anyhow::anyhow!("remove sandbox {}: {}", sandbox.id, s.message()))?;
        }
    }
    if matches!(config.runtime, Runtime::Supervised {}) {
        containerd::stop(&config.containerd()).await?;
    }
    devices::registration::remove(&config.device_plugins);
    cni::remove_chains();
    masquerade::remove();
    Cgroups::detect(&config.cgroup_root).remove_all().context("remove the pods' cgroups")?;
    let (data, run, logs) = (config.data_dir.clone(), config.run_dir.clone(), config.log_dir.clone());
    tokio::task::spawn_blocking(move || {
        [data, run, logs]
            .iter()
            .try_for_each(|d| volume::mount::remove_tree(d).with_context(|| format!("remove {}", d.display())))?;
        traces.remove();
        Ok(())
    })
    .await?
}
