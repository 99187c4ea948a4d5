//! What a machine keeps on its disk: all that it needs to start again by itself.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{authorities::Authorities, etcd::Local, options::Cluster, pki};

/// The files below `--data-dir`.
#[derive(Clone, Debug)]
pub struct Files {
    root: PathBuf,
}

/// Where a server's objects are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// In files of its own.
    Embedded,
    /// In an etcd of which it runs a member.
    Stacked(Local),
    /// In an etcd that others run.
    External {
        /// Its members.
        servers: Vec<String>,
        /// The authority's, our certificate's and our key's file.
        files: Option<[PathBuf; 3]>,
    },
}

/// What a server knows about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerState {
    /// The cluster.
    pub cluster: Cluster,
    /// The store.
    pub store: StoreKind,
}

/// What an agent knows about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentState {
    /// The cluster.
    pub cluster: Cluster,
    /// The cluster's certificate authorities, in PEM.
    pub ca: String,
    /// The revision of what was last learned about them.
    #[serde(default)]
    pub ca_revision: u64,
    /// The hashes of all authorities that were ever trusted here, as tokens have them.
    #[serde(default)]
    pub known: Vec<String>,
    /// The servers, as last seen.
    pub servers: Vec<std::net::SocketAddr>,
}

impl Files {
    /// The files of a machine.
    pub fn new(data_dir: &Path) -> Files {
        Files { root: data_dir.to_owned() }
    }

    /// Certificates and keys of the cluster.
    pub fn tls(&self) -> PathBuf {
        self.root.join("tls")
    }

    /// Certificates and keys of etcd.
    pub fn etcd_tls(&self) -> PathBuf {
        self.root.join("tls/etcd")
    }

    /// The data of this machine's etcd.
    pub fn etcd_data(&self) -> PathBuf {
        self.root.join("etcd")
    }

    /// What etcd says.
    pub fn etcd_log(&self) -> PathBuf {
        self.root.join("etcd.log")
    }

    /// The embedded store.
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// Snapshots of all objects.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// The agent's part.
    pub fn agent(&self) -> PathBuf {
        self.root.join("agent")
    }

    /// What the gossip keeps.
    pub fn gossip(&self) -> PathBuf {
        self.root.join("gossip")
    }

    /// The servers that the balancer knows.
    pub fn balancer_list(&self) -> PathBuf {
        self.root.join("servers.json")
    }

    /// The agent's certificate towards the API, and its key.
    pub fn agent_client(&self) -> PathBuf {
        self.root.join("agent/pki/client.pem")
    }

    /// The agent's certificate towards its callers, and its key.
    pub fn agent_serving(&self) -> PathBuf {
        self.root.join("agent/pki/serving.pem")
    }

    fn server_state(&self) -> PathBuf {
        self.root.join("server.json")
    }

    fn agent_state(&self) -> PathBuf {
        self.root.join("agent.json")
    }

    /// What the server wrote down when it was last sure.
    ///
    /// # Errors
    /// If the file cannot be read or has been changed into something else.
    pub fn read_server(&self) -> anyhow::Result<Option<ServerState>> {
        read(&self.server_state())
    }

    /// Writes it down.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_server(&self, state: &ServerState) -> anyhow::Result<()> {
        write(&self.server_state(), state)
    }

    /// The cluster of a server that stands alone, as it was at its last start.
    ///
    /// # Errors
    /// If the file cannot be read or has been changed into something else.
    pub fn read_cluster(&self) -> anyhow::Result<Option<Cluster>> {
        read(&self.root.join("cluster.json"))
    }

    /// Writes it down.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_cluster(&self, cluster: &Cluster) -> anyhow::Result<()> {
        write(&self.root.join("cluster.json"), cluster)
    }

    /// The cluster's authorities, as a server last saw them.
    ///
    /// # Errors
    /// If the file cannot be read or has been changed into something else.
    pub fn read_authorities(&self) -> anyhow::Result<Option<Authorities>> {
        read(&self.tls().join("authorities.json"))
    }

    /// Writes them down.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_authorities(&self, authorities: &Authorities) -> anyhow::Result<()> {
        write(&self.tls().join("authorities.json"), authorities)
    }

    /// What the agent wrote down when it joined, and has learned since.
    ///
    /// # Errors
    /// If the file cannot be read or has been changed into something else.
    pub fn read_agent(&self) -> anyhow::Result<Option<AgentState>> {
        read(&self.agent_state())
    }

    /// Writes it down.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_agent(&self, state: &AgentState) -> anyhow::Result<()> {
        write(&self.agent_state(), state)
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let state = serde_json::from_str(&text).with_context(|| {
                format!("{} is damaged: restore it, or join again with an empty --data-dir", path.display())
            })?;
            Ok(Some(state))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

fn write<T: Serialize>(path: &Path, state: &T) -> anyhow::Result<()> {
    pki::write(path, &serde_json::to_string_pretty(state)?, 0o600)?;
    Ok(())
}
