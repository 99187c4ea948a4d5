//! Stacked etcd: a member on every server, started, kept alive and looked after by it.

mod cut;
pub mod members;
pub mod process;

use std::{net::IpAddr, path::PathBuf, time::Duration};

use anyhow::Context as _;
use seawall_quorum::timing::Timing;
use seawall_store::etcd::{Endpoint, Options, Tls};
use serde::{Deserialize, Serialize};

use crate::{
    files::{Files, StoreKind},
    pki::Authority,
};

/// The port on which members are clients' servers.
pub const CLIENT_PORT: u16 = 2379;
/// The port on which members talk to each other.
pub const PEER_PORT: u16 = 2380;
/// The port of health and metrics, on the loopback.
pub const METRICS_PORT: u16 = 2381;

/// What this machine's member has to know to start again, kept on its disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Local {
    /// The member's name.
    pub name: String,
    /// Its address.
    pub ip: IpAddr,
    /// `name=https://address:2380` of all members at the first start, separated by commas.
    pub initial_cluster: String,
    /// Whether it joined a cluster that was there.
    pub existing: bool,
    /// Distinguishes clusters that never should talk to each other.
    pub token: String,
    /// The other members' addresses for clients, as last seen.
    #[serde(default)]
    pub others: Vec<String>,
}

/// The address of a member for other members.
pub fn peer_url(ip: IpAddr) -> String {
    format!("https://{}", std::net::SocketAddr::new(ip, PEER_PORT))
}

/// The address in such a URL.
fn peer_address(url: &str) -> Option<std::net::SocketAddr> {
    url.strip_prefix("https://")?.parse().ok()
}

/// The address of a member for clients.
pub fn client_url(ip: IpAddr) -> String {
    format!("https://{}", std::net::SocketAddr::new(ip, CLIENT_PORT))
}

/// Options that name an etcd that others run.
#[derive(clap::Args)]
pub struct ExternalOptions {
    /// The objects are kept in this etcd, e.g. https://192.0.2.9:2379. May be repeated.
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    etcd_servers: Vec<String>,
    /// The certificate authority of that etcd.
    #[arg(long, value_name = "FILE", requires_all = ["etcd_certfile", "etcd_keyfile"])]
    etcd_cafile: Option<PathBuf>,
    /// The certificate to show it.
    #[arg(long, value_name = "FILE", requires = "etcd_cafile")]
    etcd_certfile: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "FILE", requires = "etcd_cafile")]
    etcd_keyfile: Option<PathBuf>,
}

impl ExternalOptions {
    /// Which it is, if they name one.
    pub fn get(&self) -> Option<StoreKind> {
        if self.etcd_servers.is_empty() {
            return None;
        }
        let files = match [&self.etcd_cafile, &self.etcd_certfile, &self.etcd_keyfile] {
            [Some(ca), Some(certificate), Some(key)] => Some([ca.clone(), certificate.clone(), key.clone()]),
            _ => None,
        };
        Some(StoreKind::External { servers: self.etcd_servers.clone(), files })
    }
}

/// How an etcd that others run is reached.
///
/// # Errors
/// If a file cannot be read.
pub fn external_options(servers: &[String], files: Option<&[PathBuf; 3]>, timing: &Timing) -> anyhow::Result<Options> {
    let tls = match files {
        Some([ca, certificate, key]) => {
            let read = |path: &PathBuf| std::fs::read_to_string(path).with_context(|| path.display().to_string());
            Some(Tls { ca_pem: read(ca)?, cert_pem: read(certificate)?, key_pem: read(key)? })
        }
        None => None,
    };
    Ok(Options {
        endpoints: servers.iter().map(|url| Endpoint { url: url.clone(), local: false }).collect(),
        tls,
        budget: timing.store_budget,
        attempt: timing.store_request,
        probe: timing.store_request / 2,
        // etcd closes connections that ask more often than it was told to expect.
        keepalive: Duration::from_secs(5),
        ..Default::default()
    })
}

impl Local {
    /// Where the store is reached: the local member first.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        let own = client_url(self.ip);
        let local = Endpoint { url: format!("https://127.0.0.1:{CLIENT_PORT}"), local: true };
        let others = self.others.iter().filter(|url| **url != own).cloned();
        std::iter::once(local).chain(others.map(|url| Endpoint { url, local: false })).collect()
    }
}

/// The certificates of this machine's member, made anew at every start.
pub struct Certificates {
    /// What clients on this machine show.
    pub client: Tls,
    /// The files that etcd reads: authority, certificate and key.
    pub files: [PathBuf; 3],
}

impl Certificates {
    /// Makes them with the authority of etcd, which is not the cluster's: who may speak with the API must not
    /// thereby speak with etcd.
    ///
    /// # Errors
    /// If files cannot be read or written.
    pub fn make(files: &Files, authority: &Authority, local: &Local) -> anyhow::Result<Certificates> {
        let names = ["localhost".to_owned(), local.name.clone()];
        let addresses = [local.ip, std::net::Ipv4Addr::LOCALHOST.into()];
        let member = authority.server(&local.name, "", &names, &addresses)?;
        let client = authority.client("seawall-server", "")?;
        let dir = files.etcd_tls();
        let paths = [dir.join("ca.crt"), dir.join("member.crt"), dir.join("member.key")];
        crate::pki::write(&paths[1], &member.certificate, 0o644)?;
        crate::pki::write(&paths[2], &member.key, 0o600)?;
        let client =
            Tls { ca_pem: authority.pem.clone(), cert_pem: client.certificate.clone(), key_pem: client.key.clone() };
        Ok(Certificates { client, files: paths })
    }
}
