//! Paths of ours: how machines join, what a server answers about its snapshots.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use async_trait::async_trait;
use http::{Method, StatusCode};
use seawall_server::paths::{self, Ask, Paths, Refusal};
use serde_json::{Value, json};

use crate::{
    authorities::Authorities,
    etcd::members::Members,
    files::{Files, StoreKind},
    join::{ClusterAnswer, ServerAnswer, ServerAsk},
    options::Cluster,
    snapshot::keeper::{self, Keeper},
};

/// What every machine may know.
pub const CONFIG: &str = "/seawall/v1/config";
/// What a machine that becomes a server is given.
pub const JOIN: &str = "/seawall/v1/join";

/// The files of `tls/` that all servers have in common, beside the cluster's authorities.
const SHARED: [&str; 4] = ["service-account.key", "service-account.pub", "etcd/ca.crt", "etcd/ca.key"];

/// Those that say who signs.
const AUTHORITY: [&str; 3] = ["ca.crt", "ca.key", "authorities.json"];

/// Whether this is a file of `tls/` that a server gives another.
pub fn is_shared(name: &str) -> bool {
    SHARED.contains(&name) || AUTHORITY.contains(&name)
}

/// Answers those who join, and administrators.
pub struct Joining {
    /// Our files.
    pub files: Files,
    /// The cluster.
    pub cluster: Cluster,
    /// The cluster's authorities as they are now.
    pub authorities: Arc<dyn Fn() -> Authorities + Send + Sync>,
    /// Where the servers are.
    pub servers: Arc<dyn Fn() -> Vec<SocketAddr> + Send + Sync>,
    /// The store.
    pub store: StoreKind,
    /// The members of a stacked etcd.
    pub members: Option<Arc<Members>>,
    /// The snapshots of this server.
    pub snapshots: Arc<Keeper>,
}

#[async_trait]
impl Paths for Joining {
    async fn answer(&self, ask: Ask) -> Result<Value, Refusal> {
        match (&ask.method, ask.path.as_str()) {
            (&Method::GET, paths::CA) => Ok(json!({"ca": (self.authorities)().bundle()})),
            (&Method::GET, CONFIG) => {
                let authorities = (self.authorities)();
                let answer = ClusterAnswer {
                    cluster: self.cluster.clone(),
                    servers: (self.servers)(),
                    ca: authorities.bundle(),
                    ca_revision: authorities.revision,
                };
                serde_json::to_value(answer).map_err(|e| internal(&e))
            }
            (&Method::POST, JOIN) => {
                let bad = |e: serde_json::Error| {
                    Refusal(StatusCode::BAD_REQUEST, "BadRequest", format!("the request cannot be read: {e}"))
                };
                let asked: ServerAsk = serde_json::from_slice(&ask.body).map_err(bad)?;
                let answer = self.join(&asked).await?;
                tracing::info!(name = asked.name, ip = %asked.ip, user = ask.user.username, "a server joins");
                serde_json::to_value(answer).map_err(|e| internal(&e))
            }
            (_, path) if path == keeper::PATH || path.starts_with(&format!("{}/", keeper::PATH)) => {
                self.snapshots.answer(&ask).await
            }
            _ => Err(Refusal(StatusCode::NOT_FOUND, "NotFound", format!("there is nothing at {}", ask.path))),
        }
    }
}

impl Joining {
    async fn join(&self, asked: &ServerAsk) -> Result<ServerAnswer, Refusal> {
        let authorities = (self.authorities)();
        let text = serde_json::to_string_pretty(&authorities).map_err(|e| internal(&e))?;
        let current = authorities.current;
        let values = [current.certificate, current.key, text];
        let mut tls: BTreeMap<String, String> = AUTHORITY.iter().map(|n| (*n).to_owned()).zip(values).collect();
        for name in SHARED {
            let path = self.files.tls().join(name);
            match std::fs::read_to_string(&path) {
                Ok(text) => {
                    tls.insert(name.to_owned(), text);
                }
                // A server on an external etcd has no authority for it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && name.starts_with("etcd/") => {}
                Err(error) => return Err(internal(&error)),
            }
        }
        let mut answer = ServerAnswer { cluster: self.cluster.clone(), tls, etcd: None, external: None };
        match (&self.store, &self.members) {
            (StoreKind::Embedded, _) => {
                return Err(conflict(
                    "this server keeps its objects in its own files, and no other can share them: run `seawall migrate \
                     --to etcd` on it first"
                        .to_owned(),
                ));
            }
            (StoreKind::External { servers, files }, _) => {
                let text = |path: &std::path::PathBuf| std::fs::read_to_string(path).map_err(|e| internal(&e));
                let files = match files {
                    Some([ca, certificate, key]) => Some([text(ca)?, text(certificate)?, text(key)?]),
                    None => None,
                };
                answer.external = Some((servers.clone(), files));
            }
            (StoreKind::Stacked(_), Some(members)) => {
                answer.etcd = Some(members.admit(&asked.name, asked.ip).await.map_err(|error| {
                    Refusal(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", format!("{error:#}"))
                })?);
            }
            (StoreKind::Stacked(_), None) => return Err(internal(&"etcd is not there")),
        }
        Ok(answer)
    }
}

fn conflict(message: String) -> Refusal {
    Refusal(StatusCode::CONFLICT, "Conflict", message)
}

fn internal(error: &dyn std::fmt::Display) -> Refusal {
    tracing::error!(%error, "a machine that joins could not be answered");
    Refusal(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "this server failed: its log says more".to_owned())
}
