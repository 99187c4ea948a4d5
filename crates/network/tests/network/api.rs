//! A real API server, in this process.

use std::{net::SocketAddr, sync::Arc};

use kube::Client;
use seawall_client::tls;
use seawall_server::{
    Config, Server,
    auth::{MASTERS, UserInfo},
    pki::{Authority, service_account_key},
    serve,
};
use seawall_store::{Expect, Store, embedded::Embedded};
use tokio_util::sync::CancellationToken;

/// One cluster: several servers on one store.
pub struct Cluster {
    pub authority: Authority,
    pub server: Arc<Server>,
    store: Arc<dyn Store>,
    pub directory: tempfile::TempDir,
}

impl Cluster {
    pub async fn new(advertise: &str) -> Cluster {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::open(&directory.path().join("tls")).unwrap();
        let kubelet = authority.client("kubelet-client", MASTERS).unwrap();
        let config = Config {
            service_cidr: "10.96.0.0/24".parse().unwrap(),
            node_ports: 30000..=30009,
            advertise: (advertise.parse().unwrap(), 6443),
            service_account_key: service_account_key(&directory.path().join("tls")).unwrap(),
            issuer: "https://kubernetes.default.svc".into(),
            ca_pem: authority.pem.clone(),
            kubelet_client: (kubelet.certificate, kubelet.key),
            version: "v1.37.0".into(),
            name: "s1".into(),
            presence: Default::default(),
            paths: None,
            shared_store: false,
            tolerations: Default::default(),
            inflight: Default::default(),
            goaway_chance: 0.0,
            event_ttl: std::time::Duration::from_secs(3600),
            access: Default::default(),
        };
        let store: Arc<dyn Store> =
            Arc::new(Embedded::open(&directory.path().join("store"), Default::default()).unwrap());
        let server = Server::start(config, store.clone(), CancellationToken::new()).await.unwrap();
        Cluster { authority, server, store, directory }
    }

    /// Gives a Service an address of the other family as well, as a server with ranges of both would.
    pub async fn add_address(&self, service: &str, address: &str) {
        let mut value = loop {
            // The cache follows the write.
            match self.server.peek("", "services", "default", service) {
                Some(value) => break value,
                None => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            }
        };
        value["metadata"].as_object_mut().unwrap().remove("resourceVersion");
        let first = value["spec"]["clusterIP"].clone();
        value["spec"]["clusterIPs"] = serde_json::json!([first, address]);
        value["spec"]["ipFamilies"] = serde_json::json!(["IPv4", "IPv6"]);
        value["spec"]["ipFamilyPolicy"] = "RequireDualStack".into();
        let key = format!("/registry/services/specs/default/{service}");
        self.store.put(&key, value.to_string().into(), Expect::Any, None).await.unwrap();
    }

    /// A client that needs no socket.
    pub fn client(&self) -> Client {
        let server = self.server.clone();
        seawall_client::in_process(move |request| {
            let (server, user) = (server.clone(), UserInfo::new("admin", &[MASTERS]));
            async move { server.handle(request, Some(user)).await }
        })
    }

    /// Serves the API at one more address, until the token is cancelled.
    pub async fn serve(&self, address: &str) -> (SocketAddr, CancellationToken) {
        let stop = CancellationToken::new();
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = self.authority.server("kube-apiserver", "", &["kubernetes".into()], &[address.ip()]).unwrap();
        let tls = serve::tls(&serving, &self.authority.pem).unwrap();
        tokio::spawn(serve::serve(self.server.clone(), listener, tls, stop.clone()));
        (address, stop)
    }

    /// A client as agents have them, at an address.
    pub fn remote(&self, address: SocketAddr) -> Client {
        let pair = self.authority.client("admin", MASTERS).unwrap();
        let credentials = tls::Credentials {
            ca_pem: self.authority.pem.clone(),
            certificate: Some((pair.certificate, pair.key)),
            token: None,
        };
        tls::connect(address, &tls::Tls::new(&credentials).unwrap())
    }
}
