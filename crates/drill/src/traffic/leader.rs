//! Candidates of an election, one at each server, who write as leaders do: with their term, which the store refuses once
//! it is over. And what a watch sees of all Leases.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::ConfigMap};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use seawall_client::{
    election::{Election, lead},
    tls::{Credentials, Tls, connect},
};
use seawall_quorum::timing::{Profile, Timing};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{
    NAMESPACE, Recorder, Way, revision,
    watcher::{End, Told, follow},
};
use crate::{connection::Target, history::LeaseSeen};

/// The Lease of the candidates.
const LEASE: &str = "seawall-drill";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";
/// The Leases by which somebody leads; others say that somebody lives.
const ELECTIONS: [&str; 3] = ["kube-controller-manager", "kube-scheduler", LEASE];
/// How often a leader writes.
const EVERY: Duration = Duration::from_millis(50);
/// How long a candidate may take to let go.
const LET_GO: Duration = Duration::from_secs(5);

/// A candidate at one server.
pub struct Candidate {
    task: JoinHandle<()>,
}

impl Candidate {
    /// Takes part until `stop`.
    pub fn start(name: &str, target: &Target, stop: &CancellationToken) -> anyhow::Result<Candidate> {
        let identity = target.identity();
        let tls = Tls::new(&Credentials {
            ca_pem: identity.authority.clone(),
            certificate: Some((identity.certificate.clone(), identity.key.clone())),
            token: None,
        })?;
        let address: SocketAddr = target.address().parse().context("a server's address")?;
        let client = connect(address, &tls);
        let name: Arc<str> = name.into();
        let stop = stop.clone();
        let task = tokio::spawn(async move {
            while !stop.is_cancelled() {
                let election = Election {
                    lease: LEASE.into(),
                    identity: name.to_string(),
                    timing: Timing::of(Profile::Fast),
                    gone: None,
                };
                let name = name.clone();
                let run = move |client, stop| act(name.clone(), client, stop);
                // One that failed stands again, as a component that is supervised does.
                if let Err(error) = lead(client.clone(), election, stop.clone(), run).await {
                    tracing::debug!(%error, "a candidate of the drill stands again");
                    tokio::time::sleep(EVERY).await;
                }
            }
        });
        Ok(Candidate { task })
    }

    /// Waits until it has let go.
    pub async fn ended(mut self) {
        if tokio::time::timeout(LET_GO, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

/// What a leader does: it writes who it is and in which term, again and again. The Lease's uid names the term.
async fn act(name: Arc<str>, client: Client, stop: CancellationToken) -> anyhow::Result<()> {
    let lease: Lease = Api::namespaced(client.clone(), "kube-system").get(LEASE).await?;
    let holder = lease.spec.and_then(|s| s.holder_identity).unwrap_or_default();
    anyhow::ensure!(*holder == *name, "{holder} leads, and not {name}");
    let uid = lease.metadata.uid.context("a Lease without a uid")?;
    let maps: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    for number in 0_u64.. {
        if stop.is_cancelled() {
            break;
        }
        let map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(format!("led-{uid}-{number}")),
                labels: Some([("drill".to_owned(), "led".to_owned())].into()),
                ..ObjectMeta::default()
            },
            data: Some([("leader".to_owned(), name.to_string()), ("uid".to_owned(), uid.clone())].into()),
            ..ConfigMap::default()
        };
        // What is refused is the point; what failed may have landed, and is found in the end.
        if let Err(error) = maps.create(&PostParams::default(), &map).await {
            tracing::debug!(%error, "a write as leader");
        }
        tokio::time::sleep(EVERY).await;
    }
    Ok(())
}

/// Writes down every state of every component's Lease, until `stop`.
pub async fn watch_leases(way: Way, recorder: Recorder, stop: CancellationToken) {
    let mut client = way.client();
    let mut from = None;
    let note = |recorder: &Recorder, object: &Value| {
        let text = |value: &Value| -> Arc<str> { value.as_str().unwrap_or_default().into() };
        let Some(revision) = revision(object) else { return };
        if !object["metadata"]["name"].as_str().is_some_and(|name| ELECTIONS.contains(&name)) {
            return;
        }
        let seen = LeaseSeen {
            at: recorder.now(),
            lease: text(&object["metadata"]["name"]),
            holder: text(&object["spec"]["holderIdentity"]),
            uid: text(&object["metadata"]["uid"]),
            revision,
        };
        recorder.history().leases.push(seen);
    };
    while !stop.is_cancelled() {
        let Some(at) = from else {
            let listed = tokio::select! {
                listed = client.insist(LEASES) => listed,
                () = stop.cancelled() => return,
            };
            let list: Option<Value> = listed.ok().and_then(|body| serde_json::from_slice(&body).ok());
            for item in list.iter().flat_map(|l| l["items"].as_array()).flatten() {
                note(&recorder, item);
            }
            from = list.as_ref().and_then(revision);
            continue;
        };
        let mut last = at;
        let told = |what: Told<'_>, revision: u64| {
            last = last.max(revision);
            if let Told::Change("ADDED" | "MODIFIED", object) = what {
                note(&recorder, object);
            }
        };
        let end = tokio::select! {
            end = follow(&mut client, LEASES, at, way.patience, told) => end,
            () = stop.cancelled() => return,
        };
        from = if matches!(end, End::Gone(_)) { None } else { Some(last) };
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
