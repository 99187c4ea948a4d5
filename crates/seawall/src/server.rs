//! `seawall server`: the API server, the scheduler, the controllers and the node agent in one process, and etcd beside it.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use seawall_client::{
    election::{Election, lead},
    tls,
};
use seawall_controllers::load_balancer::pool::{Pool, Range};
use seawall_network::{balancer, gossip::Gossip};
use seawall_node::shutdown::Handle;
use seawall_quorum::timing::Timing;
use seawall_server::{
    Config, Server, StartError, Tolerations,
    auth::{NODES, UserInfo},
    pki, presence, serve,
};
use seawall_store::{
    Store,
    embedded::{Embedded, Options},
    etcd::Etcd,
};
use tokio::{net::TcpListener, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    VERSION,
    access::AccessOptions,
    certs::ServerCertificates,
    dns, encryption,
    etcd::{self, members, process},
    files::{Files, ServerState, StoreKind},
    gossip, join, leave, node,
    options::{
        Cluster, ClusterOptions, Component, EvictionOptions, InflightOptions, Machine, MachineOptions, TimingOptions,
    },
    paths::Joining,
    snapshot::keeper::{Keeper, SnapshotOptions},
    supervise::component,
};

/// How long to wait before the store is asked again whether it is there.
const RETRY: Duration = Duration::from_millis(200);
/// How often a server that waits says so.
const SAY: Duration = Duration::from_secs(5);
/// How often a labelled Node is looked at: it may have been deleted and registered anew.
const LABELLED: Duration = Duration::from_secs(10);

/// Options of `seawall server`.
#[derive(clap::Args)]
pub struct Args {
    /// Begin a cluster that other servers can join: the store is etcd, run by the servers.
    #[arg(long, conflicts_with_all = ["join", "etcd_servers"])]
    cluster_init: bool,
    /// Join the cluster of the server at this address, e.g. https://192.0.2.1:6443. Only at the first start.
    #[arg(long, value_name = "URL", requires = "token", conflicts_with = "etcd_servers")]
    join: Option<String>,
    /// What `seawall token create --role server` printed.
    #[arg(long, env = "SEAWALL_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Encrypt objects in the store as this file says (upstream's EncryptionConfiguration). With several servers, the same
    /// file on all of them.
    #[arg(long, value_name = "FILE")]
    encryption_provider_config: Option<PathBuf>,
    /// The etcd that others run.
    #[command(flatten)]
    etcd: etcd::ExternalOptions,
    /// The address to listen on; 0.0.0.0 are all of the machine's, also those of IPv6.
    #[arg(long, default_value = "0.0.0.0")]
    bind_address: IpAddr,
    /// The port of the API.
    #[arg(long, default_value_t = 6443)]
    port: u16,
    /// A further name or address for the API's certificate. May be repeated.
    #[arg(long, value_name = "NAME")]
    tls_san: Vec<String>,
    /// Addresses of the local network for Services of type LoadBalancer, e.g. 192.0.2.16/28 or 192.0.2.10-192.0.2.20, that
    /// nobody else uses; one of the machines answers for each. May be repeated; the same on all servers. Without it such
    /// Services wait for somebody else to give them an address.
    #[arg(long, value_name = "RANGE", value_delimiter = ',')]
    load_balancer_pool: Vec<Range>,
    #[command(flatten)]
    machine: MachineOptions,
    #[command(flatten)]
    cluster: ClusterOptions,
    #[command(flatten)]
    timing: TimingOptions,
    #[command(flatten)]
    eviction: EvictionOptions,
    #[command(flatten)]
    inflight: InflightOptions,
    #[command(flatten)]
    access: AccessOptions,
    #[command(flatten)]
    snapshots: SnapshotOptions,
}

/// Listens on an address. All addresses of IPv4 are also those of IPv6, if the machine has some, as upstream.
async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    if address.ip() == Ipv4Addr::UNSPECIFIED {
        match TcpListener::bind((Ipv6Addr::UNSPECIFIED, address.port())).await {
            // Without IPv6.
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {}
            result => return result,
        }
    }
    TcpListener::bind(address).await
}

impl Args {
    /// Where this server is reached on its own machine.
    fn url(&self) -> String {
        let host = match self.bind_address {
            ip if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            ip => ip,
        };
        format!("https://{}", SocketAddr::new(host, self.port))
    }

    /// The addresses of load balancers.
    fn pool(&self, state: &ServerState) -> anyhow::Result<Pool> {
        let (pods, services) = (state.cluster.cluster_cidr, state.cluster.service_cidr);
        for range in &self.load_balancer_pool {
            for (nets, flag) in [(pods, "--cluster-cidr"), (services, "--service-cidr")] {
                if let Some(net) = nets.iter().find(|net| range.overlaps(net)) {
                    bail!(
                        "--load-balancer-pool {range} overlaps with {flag} {net}: choose addresses of the machines' network"
                    );
                }
            }
        }
        Ok(Pool(self.load_balancer_pool.clone()))
    }
}

/// Decides what this machine's server is: what its disk says, else what it was told.
async fn decide(args: &Args, machine: &Machine, files: &Files) -> anyhow::Result<ServerState> {
    if let Some(mut state) = files.read_server()? {
        if args.join.is_some() || args.cluster_init {
            tracing::info!(
                "this machine is a server already: --cluster-init, --join and --token are for its first start"
            );
        }
        // Where an external etcd is may change; that it is external does not.
        if let (StoreKind::External { .. }, Some(external)) = (&state.store, args.etcd.get()) {
            state.store = external;
            files.write_server(&state)?;
        }
        if let StoreKind::Stacked(local) = &state.store
            && local.ip != machine.ip
        {
            bail!(
                "this machine's etcd member is known to the others as {}, and its address is now {}: give it its old \
                 address with --node-ip, or remove it (seawall member remove {}) and join again with an empty --data-dir",
                local.ip,
                machine.ip,
                local.name
            );
        }
        return Ok(state);
    }
    let profile = args.timing.timing.unwrap_or_default();
    let state = match (&args.join, &args.token) {
        (Some(url), Some(token)) => join::server(url, token, machine, files).await?,
        _ => {
            let store = match args.etcd.get() {
                Some(external) => external,
                None if args.cluster_init && files.store().exists() => bail!(
                    "--cluster-init: {} has the objects of a server that stood alone: take them along with `seawall \
                     migrate --to etcd`, or choose another --data-dir",
                    files.store().display()
                ),
                None if args.cluster_init => StoreKind::Stacked(members::first(&machine.name, machine.ip)),
                None => StoreKind::Embedded,
            };
            ServerState { cluster: args.cluster.resolve(profile, machine.runs(Component::Dns))?, store }
        }
    };
    machine.fits(&state.cluster)?;
    match state.store {
        // A server that stands alone takes its options anew at every start; they are noted for a migration.
        StoreKind::Embedded => files.write_cluster(&state.cluster)?,
        _ => files.write_server(&state)?,
    }
    Ok(state)
}

/// The store, and what belongs to it.
struct Opened {
    store: Arc<dyn Store>,
    etcd: Option<Arc<Etcd>>,
    members: Option<Arc<members::Members>>,
    parts: Vec<JoinHandle<()>>,
}

async fn open_store(
    args: &Args,
    state: &ServerState,
    files: &Files,
    timing: &Timing,
    stop: &CancellationToken,
) -> anyhow::Result<Opened> {
    match &state.store {
        StoreKind::Embedded => {
            let dir = files.store();
            std::fs::create_dir_all(&dir).with_context(|| format!("--data-dir: {} cannot be made", dir.display()))?;
            // Watchers of this life are served by the cache's log; this is for those who come back after a restart.
            let options = Options { history_bytes: 8 << 20, ..Default::default() };
            let store: Arc<dyn Store> = Arc::new(Embedded::open(&dir, options)?);
            let compacting = tokio::spawn(compact(store.clone(), stop.clone()));
            Ok(Opened { store, etcd: None, members: None, parts: vec![compacting] })
        }
        StoreKind::Stacked(local) => {
            process::check_program()?;
            process::measure_disk(&args.machine.data_dir)?;
            let certificates = members::certificates(files, local)?;
            let settings = Arc::new(process::Settings::new(files, &args.machine.run_dir, local, &certificates, timing));
            let part = component("etcd", stop.clone(), move |stop| {
                let settings = settings.clone();
                async move { process::run(&settings, stop).await }
            });
            let options = members::options(local, certificates.client, timing);
            let etcd = Arc::new(connect(options).await?);
            let members = Arc::new(members::Members::new(etcd.admin(), files, &local.name));
            Ok(Opened { store: etcd.clone(), etcd: Some(etcd), members: Some(members), parts: vec![part] })
        }
        StoreKind::External { servers, files } => {
            let options = etcd::external_options(servers, files.as_ref(), timing)?;
            let etcd = Arc::new(connect(options).await?);
            let compacting = tokio::spawn(compact(etcd.clone(), stop.clone()));
            Ok(Opened { store: etcd.clone(), etcd: Some(etcd), members: None, parts: vec![compacting] })
        }
    }
}

/// Waits for etcd: after a power cut it may take its time until enough members are back.
async fn connect(options: seawall_store::etcd::Options) -> anyhow::Result<Etcd> {
    let mut said = Instant::now();
    loop {
        match Etcd::connect(options.clone()).await {
            Ok(etcd) => return Ok(etcd),
            Err(error) => {
                if said.elapsed() > SAY {
                    said = Instant::now();
                    tracing::warn!(%error, "waits for etcd");
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Runs a server until it is told to stop.
///
/// # Errors
/// What kept it from starting.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let machine = Arc::new(Machine::new(args.machine.clone())?);
    machine.may_run_pods()?;
    let rules = args.encryption_provider_config.as_deref().map(encryption::read).transpose()?;
    // As many connections and watches as the machine allows.
    raise_open_files();
    let mut signal = tokio::spawn(wait_for_signal());
    let files = Files::new(&args.machine.data_dir);
    let state = tokio::select! {
        state = decide(&args, &machine, &files) => state?,
        _ = &mut signal => return Ok(()),
    };
    machine.fits(&state.cluster)?;
    let access = args.access.resolve(&issuer(&state.cluster))?;
    let timing = args.timing.resolve(state.cluster.timing)?;
    args.pool(&state)?;
    let snapshots = args.snapshots.resolve(files.snapshots())?;
    let leaving = leave::handle(&machine, &timing)?;
    // Leaders end first, then the API, then etcd.
    let (leading, stop, last) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
    let certificates = ServerCertificates::make(&files, &machine, &state.cluster, &args.tls_san, args.url())?;
    let mut node_parts = Vec::new();
    let gossip = gossip::member(&machine, &timing)?;
    let clustered = state.store != StoreKind::Embedded;
    if clustered {
        // The node does not wait for this machine's server: any server will do.
        let (member, port) = (gossip.as_ref(), args.port);
        node_parts =
            clustered_node(&machine, &files, &state, &certificates, &timing, port, member, &leaving, &leading).await?;
    }
    let opened = tokio::select! {
        opened = open_store(&args, &state, &files, &timing, &last) => opened?,
        _ = &mut signal => {
            for token in [&leading, &stop, &last] { token.cancel() }
            return Ok(());
        }
    };
    if let Some(members) = &opened.members {
        tokio::select! {
            voter = members.become_voter() => voter?,
            _ = &mut signal => {
                for token in [&leading, &stop, &last] { token.cancel() }
                return Ok(());
            }
        }
    }
    let address = SocketAddr::new(args.bind_address, args.port);
    let listener = listen(address)
        .await
        .with_context(|| format!("cannot listen on {address} (--bind-address, --port): is another server running?"))?;
    let this: Arc<OnceLock<Weak<Server>>> = Arc::default();
    // As it is stored: what is encrypted stays so.
    let snapshots = Keeper::new(opened.store.clone(), snapshots, &machine.name, cluster_id(&this), Timestamp::now);
    let snapshots = Arc::new(snapshots);
    let counted = snapshots.clone();
    machine.metrics.add("snapshots", move || counted.render());
    let (store, sealed) = encryption::wrap(&opened.store, rules);
    let config = Config {
        access: access.clone(),
        ..server_config(&args, &machine, &state, &timing, &certificates, &opened, &files, &this, &snapshots)?
    };
    let server = tokio::select! {
        server = start(config, &store, &stop) => server?,
        _ = &mut signal => {
            for token in [&leading, &stop, &last] { token.cancel() }
            return Ok(());
        }
    };
    let _ = this.set(Arc::downgrade(&server));
    let sources = machine.metrics.clone();
    server.show_metrics(move || sources.render());
    // What changed while this server was away counts before the first request.
    certificates.catch_up(&server)?;
    server.note(presence::TIMES, serde_json::to_string(&timing)?);
    certificates.write_kubeconfig()?;
    let serving = tokio::spawn(serve::serve(server.clone(), listener, certificates.tls()?, stop.clone()));
    tracing::info!(%address, "the API is served");
    if !clustered {
        let identity = certificates.node_identity();
        let user = format!("system:node:{}", machine.name);
        let client = in_process(&server, &user, &[NODES]);
        node_parts = node::components(
            &machine,
            &state.cluster,
            &timing,
            &client,
            &identity,
            &gossip::verdicts(gossip.as_ref()),
            &leaving,
            &leading,
        );
    }
    let mut leaders = leaders(&args, &machine, &state, &timing, &server, &certificates, gossip.as_ref(), &leading)?;
    if let Some(sealed) = sealed {
        let leading = leading.clone();
        leaders.push(tokio::spawn(async move {
            leading.run_until_cancelled(encryption::reseal(sealed)).await;
        }));
    }
    if let Some(member) = &gossip {
        let client = in_process(&server, "system:seawall", &[]);
        leaders.push(gossip::keep_key(member, &client, &leading));
        if !clustered || !machine.runs(Component::Agent) {
            node_parts.push(gossip::start(member, &client, &leading));
        }
    }
    if let (Some(members), Some(etcd)) = (&opened.members, &opened.etcd) {
        let (members, etcd) = (members.clone(), etcd.clone());
        leaders.push(component("members", leading.clone(), move |stop| members.clone().look_after(etcd.clone(), stop)));
    }
    leaders.push(certificates.keep(&server, &leading));
    let client = in_process(&server, "system:seawall", &[]);
    leaders.push(component("snapshots", leading.clone(), move |stop| snapshots.clone().run(client.clone(), stop)));
    if machine.runs(Component::Dns) && dns::ours(&state.cluster) {
        let (client, cluster) = (in_process(&server, "system:seawall", &[]), state.cluster.clone());
        leaders.push(component("dns objects", leading.clone(), move |stop| {
            dns::objects::keep(client.clone(), cluster.clone(), seawall_node::own::name(VERSION), stop)
        }));
    }
    let (options, own) = (args.access.clone(), issuer(&state.cluster));
    leaders.push(component("authentication config", leading.clone(), move |stop| {
        options.clone().keep(own.clone(), access.clone(), stop)
    }));
    if machine.runs(Component::Agent) {
        let client = in_process(&server, "system:seawall", &[]);
        let name = machine.name.clone();
        leaders.push(component("node role", leading.clone(), move |stop| {
            let (client, name) = (client.clone(), name.clone());
            async move { stop.run_until_cancelled(label_node(client, &name)).await.unwrap_or(Ok(())) }
        }));
    }
    signal.await??;
    // While everything still works.
    leave::leave(&machine, &leaving, gossip.as_ref()).await;
    tracing::info!("stopping");
    // Those who lead let go, so that others need not wait until they are missed.
    leading.cancel();
    for part in leaders {
        let _ = part.await;
    }
    stop.cancel();
    let _ = serving.await;
    server.flush_audit().await;
    if let Some(members) = &opened.members {
        let _ = tokio::time::timeout(Duration::from_secs(3), members.step_down()).await;
    }
    last.cancel();
    for part in opened.parts.into_iter().chain(node_parts) {
        // Panics have been logged where they happened.
        let _ = part.await;
    }
    Ok(())
}

/// Starts the API; where others keep the store with us, it may have to wait for them.
async fn start(config: Config, store: &Arc<dyn Store>, stop: &CancellationToken) -> anyhow::Result<Arc<Server>> {
    let mut said = Instant::now();
    loop {
        // What a failed start left behind ends before the next one.
        let token = stop.child_token();
        match Server::start(config.clone(), store.clone(), token.clone()).await {
            Ok(server) => return Ok(server),
            Err(StartError::Store { what, message }) if config.shared_store => {
                token.cancel();
                if said.elapsed() > SAY {
                    said = Instant::now();
                    tracing::warn!("waits for the store: {what}: {message}");
                }
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "everything that the API is told comes together here")]
fn server_config(
    args: &Args,
    machine: &Machine,
    state: &ServerState,
    timing: &Timing,
    certificates: &ServerCertificates,
    opened: &Opened,
    files: &Files,
    this: &Arc<OnceLock<Weak<Server>>>,
    snapshots: &Arc<Keeper>,
) -> anyhow::Result<Config> {
    let cluster = &state.cluster;
    let (now, server) = (certificates.clone(), this.clone());
    let joining = Joining {
        files: files.clone(),
        cluster: cluster.clone(),
        authorities: Arc::new(move || now.authorities()),
        servers: Arc::new(move || {
            server.get().and_then(Weak::upgrade).map(|server| server.servers()).unwrap_or_default()
        }),
        store: state.store.clone(),
        members: opened.members.clone(),
        snapshots: snapshots.clone(),
    };
    let kubelet_client = certificates.kubelet_client();
    Ok(Config {
        service_cidr: cluster.service_cidr,
        node_ports: cluster.node_ports.0..=cluster.node_ports.1,
        advertise: (machine.ip, args.port),
        service_account_key: pki::service_account_key(&files.tls())?,
        issuer: issuer(cluster),
        ca_pem: certificates.authorities().bundle(),
        kubelet_client: (kubelet_client.certificate, kubelet_client.key),
        version: VERSION.to_owned(),
        name: machine.name.clone(),
        presence: presence::Times { renew: timing.server_renew, expiry: timing.server_expiry },
        paths: Some(Arc::new(joining)),
        shared_store: state.store != StoreKind::Embedded,
        tolerations: Tolerations {
            not_ready: timing.not_ready_toleration.as_secs(),
            unreachable: timing.unreachable_toleration.as_secs(),
        },
        inflight: args.inflight.get(),
        goaway_chance: args.inflight.goaway_chance()?,
        event_ttl: args.inflight.event_ttl()?,
        access: Default::default(),
    })
}

/// The cluster's name for itself: the uid of its namespace `kube-system`, as others take it.
fn cluster_id(this: &Arc<OnceLock<Weak<Server>>>) -> impl Fn() -> Option<String> + Send + Sync + 'static {
    let this = this.clone();
    move || {
        let namespace = this.get()?.upgrade()?.peek("", "namespaces", "", "kube-system")?;
        Some(namespace["metadata"]["uid"].as_str()?.to_owned())
    }
}

/// Who makes the tokens of service accounts.
fn issuer(cluster: &Cluster) -> String {
    format!("https://kubernetes.default.svc.{}", cluster.domain)
}

/// Says of this machine's Node that a server runs there, as kubeadm does of its own. The node may not say so itself.
async fn label_node(client: Client, name: &str) -> anyhow::Result<()> {
    const ROLE: &str = "node-role.kubernetes.io/control-plane";
    let nodes = Api::<Node>::all(client);
    loop {
        let pause = match nodes.get_metadata_opt(name).await? {
            Some(node) if node.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(ROLE)) => LABELLED,
            Some(_) => {
                let patch = serde_json::json!({"metadata": {"labels": {ROLE: ""}}});
                nodes.patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
                LABELLED
            }
            None => RETRY,
        };
        tokio::time::sleep(pause).await;
    }
}

/// A client whose requests this process answers itself.
fn in_process(server: &Arc<Server>, name: &str, groups: &[&str]) -> Client {
    let (server, user) = (server.clone(), UserInfo::new(name, groups));
    seawall_client::in_process(move |request| {
        let (server, user) = (server.clone(), user.clone());
        async move { server.handle(request, Some(user)).await }
    })
}

/// The scheduler and the controllers. With other servers beside this one, they act where they lead.
#[allow(clippy::too_many_arguments, reason = "everything that leaders are told comes together here")]
fn leaders(
    args: &Args,
    machine: &Machine,
    state: &ServerState,
    timing: &Timing,
    server: &Arc<Server>,
    certificates: &ServerCertificates,
    gossip: Option<&Gossip>,
    stop: &CancellationToken,
) -> anyhow::Result<Vec<JoinHandle<()>>> {
    let mut parts = Vec::new();
    let gone = gossip.map(gossip::gone);
    // Two lives of one server are two candidates.
    let identity = format!("{}_{:08x}", machine.name, rand::random::<u32>());
    let alone = state.store == StoreKind::Embedded;
    if machine.runs(Component::Controllers) {
        let client = in_process(server, "system:kube-controller-manager", &[]);
        let config = seawall_controllers::Config {
            cluster_cidr: state.cluster.cluster_cidr,
            node_masks: state.cluster.node_masks,
            service_cidr: Some(state.cluster.service_cidr),
            node_lifecycle: args.eviction.settings(timing),
            evidence: gossip.map(|gossip| gossip::evidence(gossip, stop)),
            load_balancer_pool: args.pool(state)?,
            legacy_token_period: args.inflight.legacy_token_period()?,
            ..certificates.controllers()
        };
        let election = Election {
            lease: "kube-controller-manager".into(),
            identity: identity.clone(),
            timing: *timing,
            gone: gone.clone(),
        };
        parts.push(component("controllers", stop.clone(), move |stop| {
            let (client, config, election) = (client.clone(), config.clone(), election.clone());
            async move {
                match alone {
                    true => seawall_controllers::run(client, config, stop).await,
                    false => {
                        let run = move |client, stop| seawall_controllers::run(client, config.clone(), stop);
                        lead(client, election, stop, run).await
                    }
                }
            }
        }));
    }
    if machine.runs(Component::Scheduler) {
        let client = in_process(server, "system:kube-scheduler", &[]);
        let config = seawall_scheduler::SchedulerConfig::default();
        let election = Election { lease: "kube-scheduler".into(), identity, timing: *timing, gone };
        parts.push(component("scheduler", stop.clone(), move |stop| {
            let (client, config, election) = (client.clone(), config.clone(), election.clone());
            async move {
                match alone {
                    true => seawall_scheduler::run(client, config, stop).await,
                    false => {
                        let run = move |client, stop| seawall_scheduler::run(client, config.clone(), stop);
                        lead(client, election, stop, run).await
                    }
                }
            }
        }));
    }
    Ok(parts)
}

/// The node of a machine whose server is one of several: it reaches the API through the balancer, so that it does not
/// depend on the server beside it.
#[allow(clippy::too_many_arguments, reason = "everything that a node is told comes together here")]
async fn clustered_node(
    machine: &Arc<Machine>,
    files: &Files,
    state: &ServerState,
    certificates: &ServerCertificates,
    timing: &Timing,
    port: u16,
    gossip: Option<&Gossip>,
    leaving: &Arc<Handle>,
    stop: &CancellationToken,
) -> anyhow::Result<Vec<JoinHandle<()>>> {
    let client = tls::connect(node::balancer_address(machine), &certificates.node_client());
    let mut initial: Vec<SocketAddr> = vec![SocketAddr::new(machine.ip, port)];
    if let StoreKind::Stacked(local) = &state.store {
        // Where members of etcd are, servers are.
        let hosts = local.others.iter().filter_map(|url| url.parse::<http::Uri>().ok()?.host()?.parse().ok());
        initial.extend(hosts.map(|ip: IpAddr| SocketAddr::new(ip, port)));
    }
    let mut parts = Vec::new();
    if let Some(member) = gossip
        && machine.runs(Component::Agent)
    {
        parts.push(gossip::start(member, &client, stop));
    }
    if machine.runs(Component::Balancer) {
        let config = balancer::Config {
            listen: node::balancer_address(machine),
            initial,
            local: Some(SocketAddr::new(machine.ip, port)),
            file: files.balancer_list(),
            ca_pem: certificates.bundle(),
            probe_interval: timing.probe_interval,
            probe_timeout: timing.probe_timeout,
            ..balancer::Config::default()
        };
        let follower = client.clone();
        parts.push(component("balancer", stop.clone(), move |stop| {
            balancer::run(config.clone(), follower.clone(), stop)
        }));
    }
    let identity = certificates.node_identity();
    parts.extend(node::components(
        machine,
        &state.cluster,
        timing,
        &client,
        &identity,
        &gossip::verdicts(gossip),
        leaving,
        stop,
    ));
    Ok(parts)
}

/// Forgets old history now and then: every five minutes, all that is older than five minutes.
async fn compact(store: Arc<dyn Store>, stop: CancellationToken) {
    const EVERY: Duration = Duration::from_secs(300);
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

pub(crate) fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, "the limit of open files could not be raised to {hard}");
    }
}

pub(crate) async fn wait_for_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    Ok(())
}
