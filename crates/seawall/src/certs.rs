//! The certificates of a server, made at every start and again before they end.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use clap::Subcommand;
use jiff::{Timestamp, Unit};
use k8s_openapi::{api::core::v1::ConfigMap, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, api::PostParams};
use rustls::ServerConfig;
use seawall_client::tls::{Credentials, Tls};
use seawall_server::{
    Server,
    auth::{MASTERS, NODES},
    pki::{self, Authority, Pair},
    tls::{self, ClientAuthorities, ServingCertificate},
};
use serde_json::Value;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    authorities::{self, Authorities, REPORT, rotate},
    files::Files,
    kubeconfig, node,
    options::{Cluster, Machine},
    supervise::component,
    token::Place,
};

/// The ConfigMap in `kube-system` where the cluster's entry addresses stand: `data.names`, separated by spaces.
pub const ENTRY: &str = "seawall-entry";
/// How often the entry addresses and the ends of certificates are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// The certificates of a server. Cheap to clone.
#[derive(Clone)]
pub struct ServerCertificates(Arc<Shared>);

struct Shared {
    authorities: watch::Sender<Arc<Authorities>>,
    /// Those who are trusted, for the parts that need no more.
    bundle: watch::Sender<String>,
    /// With which the controllers sign.
    signer: Arc<seawall_controllers::certificates::Authority>,
    /// With which the server calls node agents.
    kubelet_client: Mutex<Pair>,
    /// With which this machine's node calls the API.
    node_client: Tls,
    /// What this machine's node shows.
    agent: Arc<ServingCertificate>,
    agent_tls: Arc<ServerConfig>,
    serving: Arc<ServingCertificate>,
    clients: Arc<ClientAuthorities>,
    names: Names,
    node: String,
    ips: Vec<IpAddr>,
    /// Where this server is reached on its own machine.
    url: String,
    data_dir: PathBuf,
    files: Files,
}

/// All that an authority issues to a server.
struct Issued {
    serving: Pair,
    agent: Pair,
    kubelet_client: Pair,
    node_client: Pair,
}

struct Names {
    names: Vec<String>,
    addresses: Vec<IpAddr>,
}

impl Names {
    /// The names and addresses of the serving certificate, with further ones.
    fn with<'a>(&self, further: impl Iterator<Item = &'a str>) -> (Vec<String>, Vec<IpAddr>) {
        let (mut names, mut addresses) = (self.names.clone(), self.addresses.clone());
        for text in further {
            match text.parse() {
                Ok(ip) if !addresses.contains(&ip) => addresses.push(ip),
                Ok(_) => {}
                Err(_) if !names.iter().any(|n| n == text) => names.push(text.to_owned()),
                Err(_) => {}
            }
        }
        (names, addresses)
    }
}

fn issue(
    authority: &Authority,
    (names, addresses): &(Vec<String>, Vec<IpAddr>),
    node: &str,
    ips: &[IpAddr],
) -> anyhow::Result<Issued> {
    let user = format!("system:node:{node}");
    let of_node: Vec<IpAddr> = ips.iter().copied().chain([Ipv4Addr::LOCALHOST.into()]).collect();
    Ok(Issued {
        serving: authority.server("kube-apiserver", "", names, addresses)?,
        agent: authority.server(&user, NODES, &[node.to_owned()], &of_node)?,
        kubelet_client: authority.client("kube-apiserver-kubelet-client", MASTERS)?,
        node_client: authority.client(&user, NODES)?,
    })
}

impl Issued {
    fn keep_copies(&self, files: &Files) -> anyhow::Result<()> {
        keep_copy(files, "apiserver", &self.serving)?;
        keep_copy(files, "agent", &self.agent)?;
        keep_copy(files, "kubelet-client", &self.kubelet_client)
    }

    fn node_credentials(&self, bundle: &str) -> Credentials {
        let pair = &self.node_client;
        let certificate = Some((pair.certificate.clone(), pair.key.clone()));
        Credentials { ca_pem: bundle.to_owned(), certificate, token: None }
    }
}

impl ServerCertificates {
    /// Makes them. `url` is where this server is reached on its own machine.
    ///
    /// # Errors
    /// If the authority cannot be read, or a name cannot stand in a certificate.
    pub fn make(
        files: &Files,
        machine: &Machine,
        cluster: &Cluster,
        tls_san: &[String],
        url: String,
    ) -> anyhow::Result<ServerCertificates> {
        let authorities = match files.read_authorities()? {
            Some(authorities) => authorities,
            None => Authorities::one(&Authority::open(&files.tls())?),
        };
        let domain = &cluster.domain;
        let names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
            .iter()
            .map(|n| (*n).to_owned())
            .chain([format!("kubernetes.default.svc.{domain}"), machine.name.clone()])
            .collect();
        let mut addresses = [&machine.ips[..], &[Ipv4Addr::LOCALHOST.into()]].concat();
        addresses.extend(cluster.service_cidr.first().hosts().next());
        let names = Names { names, addresses };
        let (all, addresses) = names.with(tls_san.iter().map(String::as_str));
        let names = Names { names: all, addresses };
        let issued = issue(&authorities.authority()?, &names.with([].into_iter()), &machine.name, &machine.ips)?;
        issued.keep_copies(files)?;
        let (bundle, signer) = (authorities.bundle(), authorities.signer());
        let clients = ClientAuthorities::new(&bundle)?;
        let agent = ServingCertificate::new(&issued.agent)?;
        // Upgrades need HTTP/1.1.
        let agent_tls = tls::server_config(agent.clone(), clients.clone(), &["http/1.1"])?;
        Ok(ServerCertificates(Arc::new(Shared {
            signer: seawall_controllers::certificates::Authority::new(&signer.certificate, &signer.key)?,
            node_client: Tls::new(&issued.node_credentials(&bundle))?,
            serving: ServingCertificate::new(&issued.serving)?,
            kubelet_client: Mutex::new(issued.kubelet_client),
            agent,
            agent_tls: Arc::new(agent_tls),
            clients,
            authorities: watch::channel(Arc::new(authorities)).0,
            bundle: watch::channel(bundle).0,
            names,
            node: machine.name.clone(),
            ips: machine.ips.clone(),
            url,
            data_dir: machine.options.data_dir.clone(),
            files: files.clone(),
        })))
    }

    /// The cluster's authorities as they are now.
    pub fn authorities(&self) -> Authorities {
        Authorities::clone(&self.0.authorities.borrow())
    }

    /// Those who are trusted, now and later.
    pub fn bundle(&self) -> watch::Receiver<String> {
        self.0.bundle.subscribe()
    }

    /// With which the server calls node agents.
    pub fn kubelet_client(&self) -> Pair {
        self.0.kubelet_client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// With which this machine's node calls the API, now and later.
    pub fn node_client(&self) -> Tls {
        self.0.node_client.clone()
    }

    /// What handshakes are made with, now and after every exchange.
    ///
    /// # Errors
    /// If the library refuses.
    pub fn tls(&self) -> anyhow::Result<ServerConfig> {
        Ok(tls::server_config(self.0.serving.clone(), self.0.clients.clone(), &["h2", "http/1.1"])?)
    }

    /// What the node on this machine shows.
    pub fn node_identity(&self) -> node::Identity {
        node::Identity { tls: self.0.agent_tls.clone() }
    }

    /// What the controllers need of them.
    pub fn controllers(&self) -> seawall_controllers::Config {
        seawall_controllers::Config {
            root_ca: self.bundle(),
            authority: Some(self.0.signer.clone()),
            ..Default::default()
        }
    }

    /// Writes the administrator's kubeconfig.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_kubeconfig(&self) -> anyhow::Result<()> {
        let authorities = self.authorities();
        let admin = authorities.authority()?.client("kubernetes-admin", MASTERS)?;
        let server = [("seawall".to_owned(), self.0.url.clone())];
        let text = kubeconfig::text(&server, &authorities.bundle(), &admin.certificate, &admin.key)?;
        pki::write(&kubeconfig::path(&self.0.data_dir), &text, 0o600)?;
        Ok(())
    }

    /// Takes in what changed while this server was away, and reports what it trusts.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn catch_up(&self, server: &Server) -> anyhow::Result<()> {
        self.follow(server)?;
        server.note(REPORT, self.authorities().report()?.to_string());
        Ok(())
    }

    /// Goes by the authorities in the Secret, if they are newer than ours.
    fn follow(&self, server: &Server) -> anyhow::Result<()> {
        let Some(secret) = server.peek("", "secrets", authorities::NAMESPACE, authorities::SECRET) else {
            return Ok(());
        };
        let (known, revision) = (self.0.authorities.borrow().revision, secret["metadata"]["resourceVersion"].as_str());
        if revision.and_then(|text| text.parse().ok()).is_some_and(|revision: u64| revision <= known) {
            return Ok(());
        }
        let found = Authorities::of_secret(&secret)
            .with_context(|| format!("the Secret {}/{}", authorities::NAMESPACE, authorities::SECRET))?;
        self.take_in(server, found)
    }

    fn take_in(&self, server: &Server, found: Authorities) -> anyhow::Result<()> {
        let this = &self.0;
        let (bundle, signer) = (found.bundle(), found.signer().clone());
        // What cannot be read is refused here, before anything has changed.
        let (authority, report) = (found.authority()?, found.report()?);
        this.clients.replace(&bundle)?;
        // On the disk first: a server that starts again must not know less than what it has said.
        this.files.write_authorities(&found)?;
        if found.is_settled() {
            pki::write(&this.files.tls().join("ca.key"), &signer.key, 0o600)?;
            pki::write(&this.files.tls().join("ca.crt"), &signer.certificate, 0o644)?;
        }
        tracing::info!(trusts = ?report.trusts, signs = ?report.shows, "the cluster's certificate authorities changed");
        this.authorities.send_replace(Arc::new(found));
        if *this.bundle.borrow() == bundle {
            // Only a step of the takeover's bookkeeping.
            return Ok(());
        }
        this.bundle.send_replace(bundle);
        this.signer.replace(&signer.certificate, &signer.key)?;
        self.reissue(server, &authority, &entry_names(server))?;
        self.write_kubeconfig()?;
        server.note(REPORT, report.to_string());
        Ok(())
    }

    /// Issues everything again that this server shows, and exchanges it under living connections.
    fn reissue(&self, server: &Server, authority: &Authority, entry: &[String]) -> anyhow::Result<()> {
        let this = &self.0;
        let names = this.names.with(entry.iter().map(String::as_str));
        let issued = issue(authority, &names, &this.node, &this.ips)?;
        let bundle = this.bundle.borrow().clone();
        this.serving.replace(&issued.serving)?;
        this.agent.replace(&issued.agent)?;
        this.node_client.replace(&issued.node_credentials(&bundle))?;
        let pair = issued.kubelet_client.clone();
        server.call_agents_with(&bundle, &(pair.certificate.clone(), pair.key.clone()))?;
        *this.kubelet_client.lock().unwrap_or_else(PoisonError::into_inner) = pair;
        issued.keep_copies(&this.files)
    }

    /// Issues certificates again when an entry address is added, when an authority takes over, and before they end.
    pub fn keep(&self, server: &Arc<Server>, stop: &CancellationToken) -> JoinHandle<()> {
        let (this, server) = (self.clone(), server.clone());
        component("certificates", stop.clone(), move |stop| {
            let (this, server) = (this.clone(), server.clone());
            async move {
                let mut has: Vec<String> = Vec::new();
                loop {
                    this.follow(&server)?;
                    let wanted = entry_names(&server);
                    let asked = renewal(&this.0.files);
                    let forced = asked.exists();
                    let serving = &this.0.serving;
                    if wanted != has || forced || is_due(serving.not_before(), serving.not_after(), Timestamp::now()) {
                        this.reissue(&server, &this.authorities().authority()?, &wanted)?;
                        tracing::info!(entry = ?wanted, "the certificates of this server were issued again");
                        has = wanted;
                        if forced {
                            std::fs::remove_file(&asked)?;
                        }
                    }
                    tokio::select! {
                        () = tokio::time::sleep(LOOK) => {}
                        () = stop.cancelled() => return Ok(()),
                    }
                }
            }
        })
    }
}

/// Whether two thirds of a certificate's life are over.
pub fn is_due(not_before: Timestamp, not_after: Timestamp, now: Timestamp) -> bool {
    let (start, end) = (not_before.as_second(), not_after.as_second());
    now.as_second() >= start + (end - start) / 3 * 2
}

fn entry_names(server: &Server) -> Vec<String> {
    let map = server.peek("", "configmaps", "kube-system", ENTRY).unwrap_or(Value::Null);
    let text = map["data"]["names"].as_str().unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// A copy for people to look at (`seawall certs list`); the server itself makes its certificates anew.
fn keep_copy(files: &Files, name: &str, pair: &Pair) -> anyhow::Result<()> {
    pki::write(&files.tls().join(format!("{name}.crt")), &pair.certificate, 0o644)?;
    Ok(())
}

/// Commands of `seawall certs`.
#[derive(Subcommand)]
pub enum Command {
    /// List the certificates on this machine and when they end.
    List {
        #[command(flatten)]
        place: Place,
    },
    /// Issue this machine's certificates again now, without a restart.
    Renew {
        #[command(flatten)]
        place: Place,
    },
    /// Replace the cluster's certificate authority while everything runs.
    #[command(long_about = rotate::HELP)]
    RotateCa(rotate::Args),
    /// Add names or addresses of an entry in front of the servers to all their certificates, without a restart.
    AddName {
        /// Names or addresses.
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        place: Place,
    },
}

/// Runs a command.
///
/// # Errors
/// What went wrong.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::List { place } => list(&place),
        Command::Renew { place } => {
            let files = Files::new(&place.data_dir);
            let asked = renewal(&files);
            pki::write(&asked, "", 0o600)?;
            let gone = async {
                while asked.exists() {
                    tokio::time::sleep(LOOK / 10).await;
                }
            };
            if tokio::time::timeout(LOOK * 10, gone).await.is_err() {
                let _ = std::fs::remove_file(&asked);
                anyhow::bail!(
                    "--data-dir {}: no server has taken note: it renews its certificates when it starts",
                    place.data_dir.display()
                );
            }
            list(&place)
        }
        Command::RotateCa(args) => rotate::run(&args).await,
        Command::AddName { names, place } => add_names(&names, &place).await,
    }
}

/// A file that asks the server to issue its certificates again.
fn renewal(files: &Files) -> PathBuf {
    files.tls().join("renew")
}

async fn add_names(names: &[String], place: &Place) -> anyhow::Result<()> {
    for name in names {
        if name.parse::<IpAddr>().is_err() {
            seawall_api::names::dns_subdomain(name).map_err(|e| anyhow::anyhow!("{name:?}: {e}"))?;
        }
    }
    let admin = kubeconfig::admin(&place.data_dir).await?;
    let maps = Api::<ConfigMap>::namespaced(admin.client, "kube-system");
    loop {
        let mut map = maps.get_opt(ENTRY).await?.unwrap_or_else(|| ConfigMap {
            metadata: ObjectMeta { name: Some(ENTRY.into()), ..ObjectMeta::default() },
            ..ConfigMap::default()
        });
        let text = map.data.get_or_insert_default().entry("names".into()).or_default();
        let mut all: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        all.extend(names.iter().filter(|n| !text.split_whitespace().any(|known| known == *n)).cloned());
        *text = all.join(" ");
        let written = match map.metadata.resource_version {
            Some(_) => maps.replace(ENTRY, &PostParams::default(), &map).await,
            None => maps.create(&PostParams::default(), &map).await,
        };
        match written {
            Ok(_) => {
                println!("the servers' certificates are issued again with: {}", all.join(" "));
                return Ok(());
            }
            // Someone else added one at the same time.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn list(place: &Place) -> anyhow::Result<()> {
    let mut found = Vec::new();
    collect(&place.data_dir, 0, &mut found)?;
    if found.is_empty() {
        anyhow::bail!("--data-dir {}: there are no certificates there", place.data_dir.display());
    }
    found.sort();
    println!("{:<44} {:<22} {:<12} RENEWED", "CERTIFICATE", "ENDS", "IN");
    let now = Timestamp::now();
    for path in found {
        let text = std::fs::read_to_string(&path)?;
        let Ok(end) = tls::not_after(&text) else { continue };
        let days = now.until((Unit::Hour, end)).map_or(0, |span| span.get_hours() / 24);
        let name = path.strip_prefix(&place.data_dir).unwrap_or(&path).display().to_string();
        let renewed = if name.ends_with("ca.crt") { "by seawall certs rotate-ca" } else { "by itself" };
        println!(
            "{name:<44} {:<22} {:<12} {renewed}",
            end.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            format!("{days} days")
        );
    }
    Ok(())
}

fn collect(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        let kind = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if path.is_dir() && depth < 3 {
            collect(&path, depth + 1, found)?;
        } else if matches!(kind, "crt" | "pem") {
            found.push(path);
        }
    }
    Ok(())
}
