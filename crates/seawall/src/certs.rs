//! The certificates of a server, made at every start and again before they end.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use clap::Subcommand;
use jiff::{Timestamp, Unit};
use k8s_openapi::{api::core::v1::ConfigMap, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, api::PostParams};
use rustls::ServerConfig;
use seawall_server::{
    Server,
    auth::{MASTERS, NODES},
    pki::{self, Authority, Pair},
    tls::{self, ClientAuthorities, ServingCertificate},
};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    files::Files,
    node,
    options::{Cluster, Machine},
    supervise::component,
    token::Place,
};

/// The ConfigMap in `kube-system` where the cluster's entry addresses stand: `data.names`, separated by spaces.
pub const ENTRY: &str = "seawall-entry";
/// How often the entry addresses and the ends of certificates are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// The certificates of a server.
#[derive(Clone)]
pub struct ServerCertificates {
    /// The cluster's authority.
    pub authority: Arc<Authority>,
    /// With which the server calls node agents.
    pub kubelet_client: Pair,
    agent: Arc<ServerConfig>,
    serving: Arc<ServingCertificate>,
    authorities: Arc<ClientAuthorities>,
    names: Arc<Names>,
    files: Files,
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

impl ServerCertificates {
    /// Makes them.
    ///
    /// # Errors
    /// If the authority cannot be read, or a name cannot stand in a certificate.
    pub fn make(
        files: &Files,
        machine: &Machine,
        cluster: &Cluster,
        tls_san: &[String],
    ) -> anyhow::Result<ServerCertificates> {
        let authority = Authority::open(&files.tls())?;
        let domain = &cluster.domain;
        let names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
            .iter()
            .map(|n| (*n).to_owned())
            .chain([format!("kubernetes.default.svc.{domain}"), machine.name.clone()])
            .collect();
        let mut addresses = vec![machine.ip, Ipv4Addr::LOCALHOST.into()];
        addresses.extend(cluster.service_cidr.hosts().next());
        let names = Names { names, addresses };
        let (all, addresses) = names.with(tls_san.iter().map(String::as_str));
        let names = Names { names: all, addresses };
        let serving = authority.server("kube-apiserver", "", &names.names, &names.addresses)?;
        let kubelet_client = authority.client("kube-apiserver-kubelet-client", MASTERS)?;
        let user = format!("system:node:{}", machine.name);
        let agent = authority.server(
            &user,
            NODES,
            std::slice::from_ref(&machine.name),
            &[machine.ip, Ipv4Addr::LOCALHOST.into()],
        )?;
        keep_copy(files, "apiserver", &serving)?;
        keep_copy(files, "agent", &agent)?;
        keep_copy(files, "kubelet-client", &kubelet_client)?;
        let authorities = ClientAuthorities::new(&authority.pem)?;
        // Upgrades need HTTP/1.1.
        let agent = tls::server_config(ServingCertificate::new(&agent)?, authorities.clone(), &["http/1.1"])?;
        Ok(ServerCertificates {
            serving: ServingCertificate::new(&serving)?,
            authorities,
            authority: Arc::new(authority),
            kubelet_client,
            agent: Arc::new(agent),
            names: Arc::new(names),
            files: files.clone(),
        })
    }

    /// What handshakes are made with, now and after every exchange.
    ///
    /// # Errors
    /// If the library refuses.
    pub fn tls(&self) -> anyhow::Result<ServerConfig> {
        Ok(tls::server_config(self.serving.clone(), self.authorities.clone(), &["h2", "http/1.1"])?)
    }

    /// What the node on this machine shows.
    pub fn node_identity(&self) -> node::Identity {
        node::Identity { tls: self.agent.clone() }
    }

    /// What the controllers need of them.
    ///
    /// # Errors
    /// If the authority cannot sign.
    pub fn controllers(&self) -> anyhow::Result<seawall_controllers::Config> {
        let authority =
            seawall_controllers::certificates::Authority::new(&self.authority.pem, &self.authority.key_pem())?;
        Ok(seawall_controllers::Config {
            root_ca: self.authority.pem.clone(),
            authority: Some(authority),
            ..Default::default()
        })
    }

    /// Issues the serving certificate again when an entry address is added, and before it ends.
    pub fn keep(&self, server: &Arc<Server>, stop: &CancellationToken) -> JoinHandle<()> {
        let (this, server) = (self.clone(), server.clone());
        component("certificates", stop.clone(), move |stop| {
            let (this, server) = (this.clone(), server.clone());
            async move {
                let mut has: Vec<String> = Vec::new();
                loop {
                    let wanted = entry_names(&server);
                    let asked = renewal(&this.files);
                    let forced = asked.exists();
                    if wanted != has
                        || forced
                        || is_due(this.serving.not_before(), this.serving.not_after(), Timestamp::now())
                    {
                        let (names, addresses) = this.names.with(wanted.iter().map(String::as_str));
                        let pair = this.authority.server("kube-apiserver", "", &names, &addresses)?;
                        this.serving.replace(&pair)?;
                        keep_copy(&this.files, "apiserver", &pair)?;
                        tracing::info!(entry = ?wanted, "the API's certificate was issued again");
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
        Command::AddName { names, place } => add_names(&names, &place).await,
    }
}

/// A file that asks the server to issue its certificates again.
fn renewal(files: &Files) -> std::path::PathBuf {
    files.tls().join("renew")
}

async fn add_names(names: &[String], place: &Place) -> anyhow::Result<()> {
    for name in names {
        if name.parse::<IpAddr>().is_err() {
            seawall_api::names::dns_subdomain(name).map_err(|e| anyhow::anyhow!("{name:?}: {e}"))?;
        }
    }
    let admin = crate::kubeconfig::admin(&place.data_dir).await?;
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

fn collect(dir: &Path, depth: usize, found: &mut Vec<std::path::PathBuf>) -> anyhow::Result<()> {
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
