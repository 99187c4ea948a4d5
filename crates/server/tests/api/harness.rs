//! A server on an embedded store, called in process.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use seawall_server::{
    Body, Config, Server,
    auth::{MASTERS, UserInfo},
    pki::{Authority, service_account_key},
};
use seawall_store::{Store, embedded::Embedded};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

pub(crate) struct Api {
    pub(crate) server: Arc<Server>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) user: Option<UserInfo>,
    config: Config,
    _dir: Arc<tempfile::TempDir>,
}

impl Api {
    pub(crate) async fn new() -> Api {
        Api::configured(|_| {}).await
    }

    /// A server that is told something else than usual.
    pub(crate) async fn configured(change: impl FnOnce(&mut Config)) -> Api {
        let dir = tempfile::tempdir().unwrap();
        let store = Embedded::open(&dir.path().join("store"), Default::default()).unwrap();
        Api::start(dir, Arc::new(store), change).await
    }

    /// A server on a store of somebody else's.
    pub(crate) async fn on(store: Arc<dyn Store>, change: impl FnOnce(&mut Config)) -> Api {
        Api::start(tempfile::tempdir().unwrap(), store, change).await
    }

    async fn start(dir: tempfile::TempDir, store: Arc<dyn Store>, change: impl FnOnce(&mut Config)) -> Api {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = Arc::new(dir);
        let authority = Authority::open(&dir.path().join("tls")).unwrap();
        let client = authority.client("kubelet-client", MASTERS).unwrap();
        let mut config = Config {
            service_cidr: "10.96.0.0/24".parse().unwrap(),
            node_ports: 30000..=30009,
            advertise: ("192.0.2.1".parse().unwrap(), 6443),
            service_account_key: service_account_key(&dir.path().join("tls")).unwrap(),
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
        change(&mut config);
        let server = Server::start(config.clone(), store.clone(), CancellationToken::new()).await.unwrap();
        let api = Api { server, config, store, user: Some(UserInfo::new("admin", &[MASTERS])), _dir: dir };
        api.create("/api/v1/namespaces/default/serviceaccounts", json!({"metadata": {"name": "default"}})).await;
        api
    }

    /// The same server, asked by somebody else.
    pub(crate) fn with_user(&self, user: Option<UserInfo>) -> Api {
        let (server, config) = (self.server.clone(), self.config.clone());
        Api { server, config, store: self.store.clone(), user, _dir: self._dir.clone() }
    }

    /// Another server on the same store.
    pub(crate) async fn another(&self) -> Api {
        let config = Config { shared_store: true, name: "s2".into(), ..self.config.clone() };
        let server = Server::start(config.clone(), self.store.clone(), CancellationToken::new()).await.unwrap();
        Api { server, config, store: self.store.clone(), user: self.user.clone(), _dir: self._dir.clone() }
    }

    pub(crate) async fn raw(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> http::Response<Body> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.server.handle(request.body(Full::new(body.into())).unwrap(), self.user.clone()).await
    }

    pub(crate) async fn call(&self, method: Method, path: &str, kind: &str, body: Value) -> (StatusCode, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let response = self.raw(method, path, &[("content-type", kind)], body).await;
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into_owned().into()))
    }

    pub(crate) async fn create(&self, path: &str, body: Value) -> Value {
        let (status, value) = self.call(Method::POST, path, "application/json", body).await;
        assert_eq!(status, StatusCode::CREATED, "{value}");
        value
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let (status, value) = self.call(Method::GET, path, "", Value::Null).await;
        assert_eq!(status, StatusCode::OK, "{path}: {value}");
        value
    }

    /// A request that fails. Returns code, reason and message.
    pub(crate) async fn fails(&self, method: Method, path: &str, body: Value) -> (u16, String, String) {
        let (status, value) = self.call(method, path, "application/json", body).await;
        assert!(!status.is_success(), "{value}");
        assert_eq!(value["kind"], "Status", "{value}");
        assert_eq!(value["code"], status.as_u16());
        (
            status.as_u16(),
            value["reason"].as_str().unwrap_or_default().to_owned(),
            value["message"].as_str().unwrap().to_owned(),
        )
    }

    /// The message of a request that fails with this code, whether or not the error has a reason.
    pub(crate) async fn fails_with(&self, method: Method, path: &str, body: Value, code: u16) -> String {
        let (status, value) = self.call(method, path, "application/json", body).await;
        assert_eq!(status.as_u16(), code, "{value}");
        value["message"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn watch(&self, path: &str) -> Watch {
        self.watch_as(path, "application/json").await
    }

    pub(crate) async fn watch_as(&self, path: &str, accept: &str) -> Watch {
        let response = self.raw(Method::GET, path, &[("accept", accept)], "").await;
        assert_eq!(response.status(), StatusCode::OK);
        Watch { body: response.into_body(), rest: Vec::new() }
    }
}

pub(crate) struct Watch {
    body: Body,
    rest: Vec<u8>,
}

impl Watch {
    pub(crate) async fn next(&mut self) -> Value {
        let wait = async {
            loop {
                if let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = self.rest.drain(..=end).collect();
                    return serde_json::from_slice(&line).unwrap();
                }
                let frame = self.body.frame().await.expect("the watch goes on").unwrap();
                self.rest.extend_from_slice(&frame.into_data().unwrap());
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.expect("an event")
    }

    /// The next event, or nothing at the end of the watch.
    pub(crate) async fn end(&mut self) -> Option<Value> {
        let wait = async {
            loop {
                if let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = self.rest.drain(..=end).collect();
                    return Some(serde_json::from_slice(&line).unwrap());
                }
                let frame = self.body.frame().await?.unwrap();
                self.rest.extend_from_slice(&frame.into_data().unwrap());
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.expect("an event or the end")
    }

    /// Type and name of the next event.
    pub(crate) async fn pair(&mut self) -> (String, String) {
        let event = self.next().await;
        (
            event["type"].as_str().unwrap().to_owned(),
            event["object"]["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
        )
    }
}
