//! A server on the embedded store, and ways to ask it as somebody.

use std::sync::Arc;

use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use seawall_server::{
    Config, Server,
    access::Access,
    auth::{MASTERS, NODES, UserInfo},
    pki::{Authority, service_account_key},
};
use seawall_store::{Store, embedded::Embedded};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

pub const ISSUER: &str = "https://kubernetes.default.svc";

pub struct Api {
    pub server: Arc<Server>,
    pub authority: Authority,
    /// Stops the server.
    pub stop: CancellationToken,
    _stop: tokio_util::sync::DropGuard,
    _dir: tempfile::TempDir,
}

/// An answer: code, and body.
pub type Answer = (u16, Value);

pub fn node(name: &str) -> UserInfo {
    UserInfo::new(format!("system:node:{name}"), &[NODES])
}

/// The message of a refusal.
pub fn message(answer: &Answer) -> &str {
    answer.1["message"].as_str().unwrap_or_default()
}

impl Api {
    pub async fn new() -> Api {
        Api::configured(|_| {}).await
    }

    /// With what was said of access at start.
    pub async fn with(access: Access) -> Api {
        Api::configured(|config| config.access = access).await
    }

    /// A server that is told something else than usual.
    pub async fn configured(change: impl FnOnce(&mut Config)) -> Api {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(Embedded::open(&dir.path().join("store"), Default::default()).unwrap());
        let authority = Authority::open(&dir.path().join("tls")).unwrap();
        let client = authority.client("kubelet-client", MASTERS).unwrap();
        let mut config = Config {
            service_cidr: "10.96.0.0/24".parse().unwrap(),
            node_ports: 30000..=30009,
            advertise: ("192.0.2.1".parse().unwrap(), 6443),
            service_account_key: service_account_key(&dir.path().join("tls")).unwrap(),
            issuer: ISSUER.into(),
            ca_pem: authority.pem.clone(),
            kubelet_client: (client.certificate, client.key),
            version: "v1.37.0".into(),
            name: "test".into(),
            presence: Default::default(),
            paths: None,
            shared_store: false,
            tolerations: Default::default(),
            inflight: Default::default(),
            goaway_chance: 0.0,
            event_ttl: std::time::Duration::from_secs(3600),
            access: Default::default(),
        };
        change(&mut config);
        let stop = CancellationToken::new();
        let server = Server::start(config, store, stop.clone()).await.unwrap();
        let api = Api { server, authority, stop: stop.clone(), _stop: stop.drop_guard(), _dir: dir };
        api.create("/api/v1/namespaces/default/serviceaccounts", json!({"metadata": {"name": "default"}})).await;
        api
    }

    /// A request as it is, without a user.
    pub async fn raw(&self, request: http::request::Builder, body: Value) -> http::Response<seawall_server::Body> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.server.handle(request.body(Full::new(bytes::Bytes::from(body))).unwrap(), None).await
    }

    async fn send(&self, method: Method, path: &str, kind: &str, body: Value, who: Who<'_>) -> Answer {
        let mut request = Request::builder().method(method).uri(path).header("content-type", kind);
        let user = match who {
            Who::User(user) => Some(user.clone()),
            Who::Bearer(token) => {
                request = request.header("authorization", format!("Bearer {token}"));
                None
            }
        };
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let response = self.server.handle(request.body(Full::new(bytes::Bytes::from(body))).unwrap(), user).await;
        let status = response.status();
        // The first frame of a watch is enough to know that it was let through.
        if path.contains("watch=") && status == StatusCode::OK {
            return (200, Value::Null);
        }
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status.as_u16(), serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    pub async fn call(&self, user: &UserInfo, method: &str, path: &str, body: Value) -> Answer {
        self.send(method.parse().unwrap(), path, "application/json", body, Who::User(user)).await
    }

    pub async fn patch(&self, user: &UserInfo, path: &str, body: Value) -> Answer {
        self.send(Method::PATCH, path, "application/merge-patch+json", body, Who::User(user)).await
    }

    pub async fn bearer(&self, token: &str, method: &str, path: &str, body: Value) -> Answer {
        self.send(method.parse().unwrap(), path, "application/json", body, Who::Bearer(token)).await
    }

    /// As an administrator.
    pub async fn admin(&self, method: &str, path: &str, body: Value) -> Answer {
        self.call(&UserInfo::new("admin", &[MASTERS]), method, path, body).await
    }

    pub async fn create(&self, path: &str, body: Value) -> Value {
        let (code, value) = self.admin("POST", path, body).await;
        assert_eq!(code, 201, "{path}: {value}");
        value
    }
}

enum Who<'a> {
    User(&'a UserInfo),
    Bearer(&'a str),
}
