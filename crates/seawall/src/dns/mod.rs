//! Cluster DNS as this process runs it: on a node, as a replica (`seawall dns`), and the objects that the replicas are.

pub mod objects;

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use ipnet::IpNet;
use kube::Client;
use seawall_dns::{
    metrics::Metrics,
    run::{Config, InCluster, Known},
    settings::{Settings, server},
    zone::Shape,
};
use seawall_network::{
    proxy,
    verdict::{self, Verdict},
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    files::Files,
    options::{Cluster, Component, Machine},
    server::wait_for_signal,
    supervise::component,
};

/// How long a node's DNS answers those who still come after it was told to stop.
const LINGER: Duration = Duration::from_millis(250);

/// Options of `seawall dns`.
#[derive(clap::Args)]
pub struct Args {
    /// Where to listen, by UDP and TCP. May be repeated.
    #[arg(long, default_value = "[::]:53", value_name = "ADDRESS:PORT")]
    listen: Vec<SocketAddr>,
    /// Where /healthz, /readyz and /metrics are.
    #[arg(long, default_value = "[::]:8081", value_name = "ADDRESS:PORT")]
    http: SocketAddr,
    /// The domain of the cluster.
    #[arg(long, default_value = "cluster.local")]
    cluster_domain: String,
    /// The address of the cluster's DNS, for its own name. May be repeated.
    #[arg(long, value_name = "ADDRESS")]
    cluster_dns: Vec<IpAddr>,
    /// Addresses of pods or Services: nobody else is asked for names of them. May be repeated.
    #[arg(long, value_name = "RANGE")]
    range: Vec<IpNet>,
    /// Ask this server for other names [default: those of /etc/resolv.conf]. May be repeated.
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = server)]
    upstream: Vec<SocketAddr>,
    /// Ask these servers for the names of a domain. May be repeated.
    #[arg(long, value_name = "DOMAIN=ADDRESS[:PORT],...")]
    stub_domain: Vec<String>,
    /// How long to go on after being told to stop, in seconds: those who do not know yet are answered.
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    linger: u64,
    /// The kubeconfig of a server [default: that of the pod's service account].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

/// Runs DNS until it is told to stop.
///
/// # Errors
/// What kept it from starting.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let client = match &args.kubeconfig {
        Some(path) => {
            crate::kubeconfig::client(path).await.with_context(|| format!("--kubeconfig {}", path.display()))?
        }
        None => InCluster::detect()
            .and_then(|pod| pod.client(&stop))
            .context("the API of this pod's cluster; elsewhere, give --kubeconfig")?,
    };
    let mut stubs = Settings::default();
    for text in &args.stub_domain {
        stubs.add_stub(text).with_context(|| format!("--stub-domain {text:?}"))?;
    }
    let shape = Shape::new(&args.cluster_domain, args.cluster_dns, args.range).context("--cluster-domain")?;
    let config = Config {
        listen: args.listen.into_iter().map(usable).collect(),
        http: Some(usable(args.http)),
        upstream: args.upstream,
        stubs,
        linger: Duration::from_secs(args.linger.min(3600)),
        ..Config::new(Arc::new(shape))
    };
    let signal = tokio::spawn(wait_for_signal());
    let running = tokio::spawn(seawall_dns::run::run(client, config, stop.clone()));
    tokio::pin!(running);
    tokio::select! {
        ended = &mut running => return ended?,
        _ = signal => tracing::info!("stopping"),
    }
    stop.cancel();
    running.await?
}

/// Every address, where there is no IPv6: that of IPv4.
fn usable(on: SocketAddr) -> SocketAddr {
    match on.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && !std::path::Path::new("/proc/net/if_inet6").exists() {
        true => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), on.port()),
        false => on,
    }
}

/// Whether DNS is ours to run: an address beyond those of Services is somebody else's.
pub fn ours(cluster: &Cluster) -> bool {
    cluster.dns.iter().any(|ip| cluster.service_cidr.contains(*ip))
}

/// Where the cluster's own addresses are.
fn ranges(cluster: &Cluster) -> impl Iterator<Item = IpNet> {
    cluster.service_cidr.iter().chain(cluster.cluster_cidr.iter())
}

/// What the cluster's DNS has to know about it.
fn shape(cluster: &Cluster) -> anyhow::Result<Shape> {
    let own = cluster.dns.iter().copied().filter(|ip| cluster.service_cidr.contains(*ip));
    Shape::new(&cluster.domain, own.collect(), ranges(cluster).collect())
}

/// Starts the node's own DNS, at the address that pods use.
pub fn on_node(
    machine: &Machine,
    cluster: &Cluster,
    client: &Client,
    verdicts: &verdict::Receiver,
    stop: &CancellationToken,
) -> Option<JoinHandle<()>> {
    let runs = machine.runs(Component::Dns) && machine.runs(Component::Agent) && machine.runs(Component::Proxy);
    if !runs || !ours(cluster) {
        return None;
    }
    let shape = match shape(cluster) {
        Ok(shape) => Arc::new(shape),
        Err(error) => {
            tracing::error!("this node has no DNS of its own: {error:#}");
            return None;
        }
    };
    let metrics = Metrics::default();
    let counted = metrics.clone();
    machine.metrics.add("dns", move || counted.render());
    let file = Files::new(&machine.options.data_dir).agent().join("proxy.json");
    let (client, verdicts) = (client.clone(), verdicts.clone());
    Some(component("dns", stop.clone(), move |stop| {
        let file = file.clone();
        let config = Config {
            here: true,
            linger: LINGER,
            avoided: avoided(verdicts.clone(), stop.clone()),
            known: Arc::new(move || known(&file)),
            metrics: metrics.clone(),
            ..Config::new(shape.clone())
        };
        seawall_dns::run::run(client.clone(), config, stop)
    }))
}

/// The service proxy keeps what both need to know.
fn known(file: &std::path::Path) -> Option<Known> {
    let kept = proxy::state::read(file).ok().flatten()?;
    Some(Known {
        services: kept.state.services.values().map(|s| (&**s).into()).collect(),
        slices: kept.state.slices.values().map(|s| (&**s).into()).collect(),
    })
}

/// The machines that do not answer, as they change.
fn avoided(mut verdicts: verdict::Receiver, stop: CancellationToken) -> watch::Receiver<Arc<HashSet<String>>> {
    let bad = |all: &verdict::Verdicts| -> HashSet<String> {
        all.iter().filter(|(_, v)| **v != Verdict::Alive).map(|(name, _)| name.clone()).collect()
    };
    let (tell, told) = watch::channel(Arc::new(bad(&verdicts.borrow_and_update())));
    tokio::spawn(async move {
        while let Some(Ok(())) = stop.run_until_cancelled(verdicts.changed()).await {
            let now = bad(&verdicts.borrow_and_update());
            tell.send_if_modified(|before| {
                let changed = **before != now;
                *before = Arc::new(now.clone());
                changed
            });
        }
        // Whoever follows goes on with what was said last.
        tell.closed().await;
    });
    told
}
