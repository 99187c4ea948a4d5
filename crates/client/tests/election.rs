//! Candidates against a real API server: who leads, what a deposed leader can still do.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::{coordination::v1::Lease, core::v1::ConfigMap};
use kube::{Api, Client, api::PostParams};
use seawall_client::election::{Election, lead};
use seawall_quorum::timing::{Profile, Timing};
use seawall_server::{
    Config, Server,
    auth::{MASTERS, UserInfo},
    pki::{Authority, service_account_key},
};
use seawall_store::embedded::Embedded;
use tokio::{sync::mpsc, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(20);

async fn server(dir: &std::path::Path) -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store = Arc::new(Embedded::open(&dir.join("store"), Default::default()).unwrap());
    let authority = Authority::open(&dir.join("tls")).unwrap();
    let client = authority.client("kubelet-client", MASTERS).unwrap();
    let config = Config {
        service_cidr: "10.96.0.0/24".parse().unwrap(),
        node_ports: 30000..=30009,
        advertise: ("192.0.2.1".parse().unwrap(), 6443),
        service_account_key: service_account_key(&dir.join("tls")).unwrap(),
        issuer: "https://kubernetes.default.svc".into(),
        ca_pem: authority.pem.clone(),
        kubelet_client: (client.certificate, client.key),
        version: "v1.37.0".into(),
        name: "s1".into(),
        presence: Default::default(),
        paths: None,
        shared_store: false,
        tolerations: Default::default(),
        inflight: Default::default(),
        goaway_chance: 0.0,
        event_ttl: Duration::from_secs(3600),
        access: Default::default(),
    };
    let server = Server::start(config, store, CancellationToken::new()).await.unwrap();
    seawall_client::in_process(move |request| {
        let (server, user) = (server.clone(), UserInfo::new("admin", &[MASTERS]));
        async move { server.handle(request, Some(user)).await }
    })
}

/// A candidate, and what it reports: its client whenever it leads, `None` whenever it stops.
struct Candidate {
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
    leads: mpsc::UnboundedReceiver<Client>,
}

fn candidate(client: &Client, name: &str) -> Candidate {
    let stop = CancellationToken::new();
    let election =
        Election { lease: "test".into(), identity: name.into(), timing: Timing::of(Profile::Fast), gone: None };
    let (report, leads) = mpsc::unbounded_channel();
    let run = move |client: Client, stop: CancellationToken| {
        let report = report.clone();
        async move {
            report.send(client)?;
            stop.cancelled().await;
            Ok(())
        }
    };
    let task = tokio::spawn(lead(client.clone(), election, stop.clone(), run));
    Candidate { stop, task, leads }
}

impl Candidate {
    async fn leading(&mut self) -> Client {
        tokio::time::timeout(LONG, self.leads.recv()).await.expect("it leads in time").expect("it runs")
    }
}

async fn lease(client: &Client) -> Lease {
    Api::namespaced(client.clone(), "kube-system").get("test").await.unwrap()
}

fn map(name: &str) -> ConfigMap {
    serde_json::from_value(serde_json::json!({"metadata": {"name": name}})).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stops_hands_over_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let client = server(dir.path()).await;
    let mut first = candidate(&client, "first");
    first.leading().await;
    let mut second = candidate(&client, "second");
    // It leads as long as it lives, well beyond the Lease's duration.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(second.leads.try_recv().is_err(), "there are two leaders");
    let holder = lease(&client).await.spec.unwrap();
    assert_eq!(holder.holder_identity.as_deref(), Some("first"));
    let before = Instant::now();
    first.stop.cancel();
    first.task.await.unwrap().unwrap();
    second.leading().await;
    let took = before.elapsed();
    eprintln!("handed over in {took:?}");
    assert!(took < Duration::from_secs(5));
    let holder = lease(&client).await.spec.unwrap();
    assert_eq!((holder.holder_identity.as_deref(), holder.lease_transitions), (Some("second"), Some(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_slept_cannot_write_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let client = server(dir.path()).await;
    let mut first = candidate(&client, "first");
    let old = Api::<ConfigMap>::namespaced(first.leading().await, "default");
    old.create(&PostParams::default(), &map("while-leading")).await.unwrap();
    let mut second = candidate(&client, "second");
    // From now on the first one's Lease is not renewed, and what it has under way goes on: as if it had been frozen.
    first.task.abort();
    let before = Instant::now();
    let new = Api::<ConfigMap>::namespaced(second.leading().await, "default");
    eprintln!("took over in {:?}", before.elapsed());
    assert!(before.elapsed() > Duration::from_millis(500), "a leader that had only just renewed was deposed");
    // It thaws.
    let error = old.create(&PostParams::default(), &map("too-late")).await.unwrap_err().to_string();
    assert!(error.contains("its term is over"), "{error}");
    let change = kube::api::Patch::Merge(serde_json::json!({"data": {"a": "b"}}));
    let error = old.patch("while-leading", &Default::default(), &change).await.unwrap_err().to_string();
    assert!(error.contains("its term is over"), "{error}");
    let error = old.delete("while-leading", &Default::default()).await.unwrap_err().to_string();
    assert!(error.contains("its term is over"), "{error}");
    new.create(&PostParams::default(), &map("in-time")).await.unwrap();
    let names: Vec<String> =
        new.list(&Default::default()).await.unwrap().into_iter().filter_map(|m| m.metadata.name).collect();
    assert!(names.contains(&"while-leading".into()) && names.contains(&"in-time".into()), "{names:?}");
    assert!(!names.contains(&"too-late".into()), "{names:?}");
    // Anyone without a term writes as ever.
    Api::<ConfigMap>::namespaced(client, "default").create(&PostParams::default(), &map("anyone")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_fails_lets_another_candidate_lead() {
    let dir = tempfile::tempdir().unwrap();
    let client = server(dir.path()).await;
    let election =
        Election { lease: "test".into(), identity: "bad".into(), timing: Timing::of(Profile::Fast), gone: None };
    let bad = lead(client.clone(), election, CancellationToken::new(), |_, _| async { anyhow::bail!("on purpose") });
    let error = tokio::time::timeout(LONG, bad).await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "on purpose");
    let mut good = candidate(&client, "good");
    let before = Instant::now();
    good.leading().await;
    eprintln!("took over in {:?}", before.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_taken_away_ends_the_term() {
    let dir = tempfile::tempdir().unwrap();
    let client = server(dir.path()).await;
    let mut only = candidate(&client, "only");
    let old = Api::<ConfigMap>::namespaced(only.leading().await, "default");
    Api::<Lease>::namespaced(client.clone(), "kube-system").delete("test", &Default::default()).await.unwrap();
    // The next term is another one.
    let new = Api::<ConfigMap>::namespaced(only.leading().await, "default");
    assert!(old.create(&PostParams::default(), &map("a")).await.is_err());
    new.create(&PostParams::default(), &map("a")).await.unwrap();
}
