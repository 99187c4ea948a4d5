//! DNS as a component: on a node at the cluster's own address, or as a replica in a pod.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use futures::future::BoxFuture;
use kube::Client;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    facts::{Service, Slice},
    forward::Forwarder,
    here,
    metrics::Metrics,
    resolver::Resolver,
    serve::{How, Sockets},
    settings::{self, PORT, Settings},
    watch::Kept,
    zone::{Book, Shape},
};

/// How long the API has to answer after a start before what was known before is served.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the machine's own servers are looked up.
const LOOK: Duration = Duration::from_secs(5);
/// Where a machine says whom it asks.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where systemd-resolved says whom it asks itself; its own address does not answer elsewhere, and may ask us.
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// What DNS knew in an earlier life.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The Services.
    pub services: Vec<Service>,
    /// The slices.
    pub slices: Vec<Slice>,
}

/// How DNS is run.
#[derive(Clone)]
pub struct Config {
    /// What the cluster has in common.
    pub shape: Arc<Shape>,
    /// Where to listen, as a replica.
    pub listen: Vec<SocketAddr>,
    /// Listen on the cluster's addresses, which this machine is to take.
    pub here: bool,
    /// Where `/readyz` and `/metrics` are served.
    pub http: Option<SocketAddr>,
    /// Who is asked for other names, instead of the machine's own servers.
    pub upstream: Vec<SocketAddr>,
    /// Domains with servers of their own.
    pub stubs: Settings,
    /// How long it goes on after it was told to stop, so that those who still come are answered.
    pub linger: Duration,
    /// Machines whose pods are to be avoided.
    pub avoided: watch::Receiver<Arc<HashSet<String>>>,
    /// What was known before, if the API is away.
    pub known: Arc<dyn Fn() -> Option<Known> + Send + Sync>,
    /// What is counted.
    pub metrics: Metrics,
}

impl Config {
    /// One that listens nowhere yet.
    pub fn new(shape: Arc<Shape>) -> Config {
        Config {
            shape,
            listen: Vec::new(),
            here: false,
            http: None,
            upstream: Vec::new(),
            stubs: Settings::default(),
            linger: Duration::ZERO,
            avoided: watch::channel(Arc::default()).1,
            known: Arc::new(|| None),
            metrics: Metrics::default(),
        }
    }
}

/// Runs DNS until `stop`.
///
/// # Errors
/// If it cannot listen, or a part of it fails.
pub fn run(client: Client, config: Config, stop: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(client, config, stop))
}

async fn work(client: Client, config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    let mut book = Book::new(config.shape.clone());
    let known = (config.known)();
    let remembers = known.is_some();
    if let Some(known) = known {
        book.replace_services(known.services);
        book.replace_slices(known.slices);
    }
    let zone = Arc::new(ArcSwap::from_pointee(book.zone().clone()));
    let (ready, mut is_ready) = watch::channel(false);
    let (tell, told) = watch::channel(own_servers(&config));
    let forwarder = Forwarder::new(told.borrow().clone(), config.metrics.clone());
    let kept = Kept {
        zone: zone.clone(),
        ready: ready.clone(),
        forwarder: forwarder.clone(),
        settings: told,
        avoided: config.avoided.clone(),
        metrics: config.metrics.clone(),
    };
    // What is told to stop goes on for a while; what fails stops everything.
    let all = CancellationToken::new();
    let _guard = all.clone().drop_guard();
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    tasks.spawn(crate::watch::run(client, book, kept, all.clone()));
    tasks.spawn(follow(config.clone(), tell, all.clone()));
    if let Some(on) = config.http {
        tasks.spawn(crate::http::serve(on, ready.subscribe(), config.metrics.clone(), all.clone()));
    }
    // An address that answers that nothing is there is worse than one that does not answer.
    tokio::select! {
        () = stop.cancelled() => return Ok(()),
        _ = is_ready.wait_for(|ready| *ready) => {}
        () = tokio::time::sleep(PATIENCE), if remembers => {
            tracing::info!("the API does not answer: names are those of before");
            ready.send_replace(true);
        }
        Some(ended) = tasks.join_next() => return ended.context("a part of DNS failed")?,
    }
    let resolver = Resolver::new(zone, forwarder, config.metrics.clone());
    let mut on = config.listen.clone();
    if config.here {
        on.extend(config.shape.dns.iter().map(|ip| SocketAddr::new(*ip, PORT)));
    }
    for on in on {
        let how = How { transparent: config.here };
        let sockets = Sockets::bind(on, how).with_context(|| format!("DNS cannot listen on {on}"))?;
        let (resolver, all) = (resolver.clone(), all.clone());
        tasks.spawn(async move {
            sockets.serve(resolver, all).await;
            Ok(())
        });
        tracing::info!(%on, "DNS is served");
    }
    if config.here {
        here::take(&config.shape.dns).await?;
    }
    let ended = tokio::select! {
        () = stop.cancelled() => Ok(()),
        Some(ended) = tasks.join_next() => ended.context("a part of DNS failed").and_then(|ended| ended),
    };
    // Whoever asks from now on asks others; who has asked is answered.
    ready.send_replace(false);
    if config.here {
        here::release(&config.shape.dns).await?;
    }
    if ended.is_ok() {
        tokio::time::sleep(config.linger).await;
    }
    ended
}

/// Follows the servers that the machine asks.
async fn follow(config: Config, tell: watch::Sender<Settings>, stop: CancellationToken) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(LOOK) => {}
        }
        let config = config.clone();
        let now = tokio::task::spawn_blocking(move || own_servers(&config)).await?;
        tell.send_if_modified(|settings| {
            let changed = *settings != now;
            *settings = now;
            changed
        });
    }
}

fn own_servers(config: &Config) -> Settings {
    let mut settings = config.stubs.clone();
    settings.upstream = config.upstream.clone();
    if settings.upstream.is_empty() {
        settings.upstream = machine_servers(Path::new(RESOLV_CONF), Path::new(RESOLVED), &config.shape.dns);
    }
    settings
}

/// The servers of a machine.
fn machine_servers(file: &Path, resolved: &Path, ours: &[IpAddr]) -> Vec<SocketAddr> {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let servers = settings::resolv_conf(&read(file), ours);
    let stub: IpAddr = [127, 0, 0, 53].into();
    match servers.iter().all(|server| server.ip() == stub) && resolved.exists() {
        true => settings::resolv_conf(&read(resolved), ours),
        false => servers,
    }
}

/// What a pod has to know to reach the API.
#[derive(Clone, Debug)]
pub struct InCluster {
    /// Where the API is.
    pub server: SocketAddr,
    /// The directory with the token and the authority.
    pub directory: PathBuf,
}

impl InCluster {
    /// As this process's environment says.
    ///
    /// # Errors
    /// If it is in no pod.
    pub fn detect() -> anyhow::Result<InCluster> {
        let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set: this is no pod"));
        let host: IpAddr = variable("KUBERNETES_SERVICE_HOST")?.parse().context("KUBERNETES_SERVICE_HOST")?;
        let port: u16 = variable("KUBERNETES_SERVICE_PORT")?.parse().context("KUBERNETES_SERVICE_PORT")?;
        let directory = PathBuf::from("/var/run/secrets/kubernetes.io/serviceaccount");
        Ok(InCluster { server: SocketAddr::new(host, port), directory })
    }

    fn credentials(&self) -> anyhow::Result<seawall_client::tls::Credentials> {
        let read = |name: &str| {
            let path = self.directory.join(name);
            std::fs::read_to_string(&path).with_context(|| path.display().to_string())
        };
        let token = read("token")?.trim().to_owned();
        Ok(seawall_client::tls::Credentials { ca_pem: read("ca.crt")?, certificate: None, token: Some(token) })
    }

    /// A client, whose token is exchanged when its file is.
    ///
    /// # Errors
    /// If the files are not there, or malformed.
    pub fn client(&self, stop: &CancellationToken) -> anyhow::Result<Client> {
        let mut shown = self.credentials()?;
        let tls = seawall_client::tls::Tls::new(&shown)?;
        let client = seawall_client::tls::connect(self.server, &tls);
        let (this, stop) = (self.clone(), stop.clone());
        tokio::spawn(async move {
            while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
                let Ok(now) = this.credentials() else { continue };
                if (&now.token, &now.ca_pem) != (&shown.token, &shown.ca_pem) {
                    match tls.replace(&now) {
                        Ok(()) => shown = now,
                        Err(error) => tracing::warn!(%error, "the new token or authority is not used"),
                    }
                }
            }
        });
        Ok(client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_a_machine_asks() {
        let dir = tempfile::tempdir().unwrap();
        let (file, resolved) = (dir.path().join("resolv.conf"), dir.path().join("resolved"));
        let ours = ["10.96.0.10".parse().unwrap()];
        let check = |text: &str, expect: &[&str]| {
            std::fs::write(&file, text).unwrap();
            let servers = machine_servers(&file, &resolved, &ours);
            assert_eq!(servers.iter().map(|s| s.ip().to_string()).collect::<Vec<_>>(), expect, "{text}");
        };
        check("nameserver 127.0.0.53\n", &["127.0.0.53"]);
        std::fs::write(&resolved, "nameserver 192.0.2.9\n").unwrap();
        check("nameserver 127.0.0.53\n", &["192.0.2.9"]);
        check("nameserver 192.0.2.1\nnameserver 10.96.0.10\n", &["192.0.2.1"]);
    }
}
