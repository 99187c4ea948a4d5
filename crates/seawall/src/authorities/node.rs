//! The node's side: it asks the servers whom to trust, keeps the answer on its disk, and says what it does.

use std::{collections::BTreeSet, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use seawall_client::tls::{Credentials, Tls};
use seawall_server::tls::ClientAuthorities;
use serde_json::json;
use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{REPORT, Report, issuer_of, short_hashes};
use crate::{
    csr,
    files::{AgentState, Files},
    join::{self, ClusterAnswer},
    paths,
    supervise::component,
};

/// How often the servers are asked.
const ASK: Duration = Duration::from_secs(3);
/// How often the report is written although nothing has changed: the Node may be another one.
const SAY: Duration = Duration::from_secs(60);
/// After this long without an answer the log says what it may mean.
const SILENCE: Duration = Duration::from_secs(30);

/// What a node knows of the authorities, and who has to be told.
pub struct Follower {
    /// The node's name.
    pub name: String,
    /// Its files.
    pub files: Files,
    /// What is on its disk.
    pub state: Mutex<AgentState>,
    /// The authorities, for all parts that trust somebody.
    pub ca: watch::Sender<String>,
    /// With which the node calls the API.
    pub tls: Tls,
    /// The authorities of those who call the node's own API.
    pub callers: Arc<ClientAuthorities>,
}

/// Whether an answer says something new, and what is then to be kept.
fn taken_in(state: &AgentState, answer: &ClusterAnswer) -> Option<AgentState> {
    let mut after = state.clone();
    // An older answer is one of a server that is behind.
    if answer.ca_revision > state.ca_revision && !answer.ca.is_empty() {
        after.ca = answer.ca.clone();
        after.ca_revision = answer.ca_revision;
        for hash in all_hashes(&answer.ca) {
            if !after.known.contains(&hash) {
                after.known.push(hash);
            }
        }
    }
    let sorted = |list: &[SocketAddr]| list.iter().copied().collect::<BTreeSet<_>>();
    if !answer.servers.is_empty() && sorted(&answer.servers) != sorted(&state.servers) {
        after.servers = answer.servers.clone();
    }
    (after != *state).then_some(after)
}

/// The hashes of a bundle, as tokens have them.
pub fn all_hashes(bundle: &str) -> Vec<String> {
    let list = seawall_server::tls::split_bundle(bundle).unwrap_or_default();
    list.iter().filter_map(|pem| join::hash(pem).ok()).collect()
}

impl Follower {
    /// Follows the authorities until `stop`.
    pub fn start(self: &Arc<Self>, client: &Client, stop: &CancellationToken) -> JoinHandle<()> {
        let (this, client) = (self.clone(), client.clone());
        component("authorities", stop.clone(), move |stop| {
            let (this, client) = (this.clone(), client.clone());
            async move { stop.run_until_cancelled(this.follow(&client)).await.unwrap_or(Ok(())) }
        })
    }

    async fn follow(&self, client: &Client) -> anyhow::Result<()> {
        let mut said: Option<(Report, Instant)> = None;
        let mut answered = Instant::now();
        loop {
            match join::ask::<ClusterAnswer>(client, paths::CONFIG, None::<&()>).await {
                Ok(answer) => {
                    answered = Instant::now();
                    self.take_in(&answer).await?;
                    let report = self.report().await?;
                    let due = said.as_ref().is_none_or(|(was, at)| *was != report || at.elapsed() > SAY);
                    if due && self.say(client, &report).await {
                        said = Some((report, Instant::now()));
                    }
                }
                Err(error) if answered.elapsed() > SILENCE => {
                    answered = Instant::now();
                    tracing::warn!(
                        "no server has answered for {SILENCE:?} ({error}). If servers are there, the cluster's certificate \
                         authority may have been replaced while this machine was away; then it has to join again: start \
                         it with --join https://SERVER:6443 and a new --token, as printed by `seawall token create`"
                    );
                }
                Err(error) => tracing::debug!(%error, "the servers were not asked for the authorities"),
            }
            tokio::time::sleep(ASK.mul_f64(0.8 + 0.4 * rand::random::<f64>())).await;
        }
    }

    async fn take_in(&self, answer: &ClusterAnswer) -> anyhow::Result<()> {
        let mut state = self.state.lock().await;
        let Some(after) = taken_in(&state, answer) else { return Ok(()) };
        let changed = after.ca != state.ca;
        if changed {
            // Refused here, it is not written down.
            self.callers.replace(&after.ca)?;
        }
        self.files.write_agent(&after)?;
        if changed {
            let trusted = short_hashes(&after.ca)?;
            tracing::info!(?trusted, "the cluster's certificate authorities changed");
            self.ca.send_replace(after.ca.clone());
            self.reconnect()?;
        }
        *state = after;
        Ok(())
    }

    /// Connections to the API are from now on made with the certificate on the disk, to servers of the authorities that
    /// are trusted now.
    ///
    /// # Errors
    /// If they cannot be used; then the ones before stay.
    pub fn reconnect(&self) -> anyhow::Result<()> {
        let pair = csr::read(&self.files.agent_client())?.context("the agent's certificate is gone: join again")?;
        let credentials = Credentials {
            ca_pem: self.ca.borrow().clone(),
            certificate: Some((pair.certificate, pair.key)),
            token: None,
        };
        self.tls.replace(&credentials).map_err(Into::into)
    }

    /// What this node does: by its certificates as they are on its disk, which are those that it shows.
    async fn report(&self) -> anyhow::Result<Report> {
        let bundle = self.state.lock().await.ca.clone();
        let mut shows = BTreeSet::new();
        for path in [self.files.agent_client(), self.files.agent_serving()] {
            shows.insert(issuer(&path, &bundle)?);
        }
        Ok(Report { trusts: short_hashes(&bundle)?, shows })
    }

    async fn say(&self, client: &Client, report: &Report) -> bool {
        let patch = json!({"metadata": {"annotations": {REPORT: report.to_string()}}});
        let nodes = Api::<Node>::all(client.clone());
        let written = nodes.patch_metadata(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await;
        if let Err(error) = &written {
            tracing::debug!(%error, "the node could not say whom it trusts");
        }
        written.is_ok()
    }
}

fn issuer(path: &Path, bundle: &str) -> anyhow::Result<String> {
    let Some(pair) = csr::read(path)? else { return Ok("none".into()) };
    Ok(match issuer_of(&pair.certificate, bundle)? {
        Some(authority) => join::hash(&authority)?[..16].to_owned(),
        None => "another".into(),
    })
}

#[cfg(test)]
mod tests {
    use seawall_server::pki::Authority;

    use super::*;

    #[test]
    fn what_is_new() {
        let (old, new) = (Authority::generate("a").unwrap().pem, Authority::generate("b").unwrap().pem);
        let cluster = json!({"clusterCidr": "10.244.0.0/16", "serviceCidr": "10.96.0.0/16", "nodePorts": [30000, 32767],
            "domain": "cluster.local"});
        let state = AgentState {
            cluster: serde_json::from_value(cluster).unwrap(),
            ca: old.clone(),
            ca_revision: 5,
            known: all_hashes(&old),
            servers: vec!["10.0.0.1:6443".parse().unwrap()],
        };
        let answer = |ca: &str, ca_revision, server: &str| ClusterAnswer {
            cluster: state.cluster.clone(),
            servers: vec![server.parse().unwrap()],
            ca: ca.into(),
            ca_revision,
        };
        assert!(taken_in(&state, &answer(&old, 5, "10.0.0.1:6443")).is_none());
        assert!(taken_in(&state, &answer(&new, 4, "10.0.0.1:6443")).is_none(), "a server that is behind");
        assert!(taken_in(&state, &answer("", 0, "10.0.0.1:6443")).is_none(), "a server of an older version");
        let after = taken_in(&state, &answer(&new, 6, "10.0.0.1:6443")).unwrap();
        assert_eq!((&after.ca, after.ca_revision), (&new, 6));
        assert_eq!(after.known, [all_hashes(&old), all_hashes(&new)].concat());
        let after = taken_in(&state, &answer(&new, 4, "10.0.0.2:6443")).unwrap();
        assert_eq!((&after.ca, after.servers[0].to_string()), (&old, "10.0.0.2:6443".into()));
    }
}
