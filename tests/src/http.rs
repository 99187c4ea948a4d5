//! Plain HTTP requests to a server, for what kubectl would not send.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use base64::Engine as _;
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

/// A way to a server, with a user's certificate.
#[derive(Clone)]
pub struct Api {
    address: String,
    host: String,
    tls: Arc<ClientConfig>,
}

/// What a server answered.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection that carries one request after the other.
pub struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    host: String,
}

/// A connection that carries many requests at once.
pub type Shared = http2::SendRequest<Full<Bytes>>;

impl Api {
    /// Reads a kubeconfig with embedded certificates.
    ///
    /// # Errors
    /// If it is not there or not complete.
    pub fn new(kubeconfig: &Path) -> anyhow::Result<Api> {
        let config: Value = serde_yaml_ng::from_str(&std::fs::read_to_string(kubeconfig)?)?;
        let decode = |value: &Value| -> anyhow::Result<Vec<u8>> {
            let text = value.as_str().context("the kubeconfig lacks a certificate")?;
            Ok(base64::engine::general_purpose::STANDARD.decode(text)?)
        };
        let (cluster, user) = (&config["clusters"][0]["cluster"], &config["users"][0]["user"]);
        let server = cluster["server"].as_str().context("the kubeconfig lacks a server")?;
        let address = server.trim_start_matches("https://").to_owned();
        let host = address.rsplit_once(':').context("the server has no port")?.0.to_owned();
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&decode(&cluster["certificate-authority-data"])?) {
            roots.add(certificate?)?;
        }
        let chain =
            CertificateDer::pem_slice_iter(&decode(&user["client-certificate-data"])?).collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(&decode(&user["client-key-data"])?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let tls = Arc::new(tls.with_root_certificates(roots).with_client_auth_cert(chain, key)?);
        Ok(Api { address, host, tls })
    }

    /// The same user at another server of the cluster.
    pub fn at(&self, address: &str) -> Api {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned();
        Api { address: address.to_owned(), host, tls: self.tls.clone() }
    }

    /// A connection after its TLS handshake.
    ///
    /// # Errors
    /// If the server is not there.
    pub async fn stream(&self, http2: bool) -> anyhow::Result<TlsStream<TcpStream>> {
        let mut tls = (*self.tls).clone();
        tls.alpn_protocols = vec![if http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        let tcp = TcpStream::connect(&self.address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(self.host.clone())?;
        Ok(TlsConnector::from(Arc::new(tls)).connect(name, tcp).await?)
    }

    /// A connection for requests of HTTP/1.1.
    ///
    /// # Errors
    /// If the server is not there.
    pub async fn connect(&self) -> anyhow::Result<Connection> {
        let (sender, connection) = http1::handshake(TokioIo::new(self.stream(false).await?)).await?;
        tokio::spawn(connection);
        Ok(Connection { sender, host: self.address.clone() })
    }

    /// A connection of HTTP/2, on which many requests run at once.
    ///
    /// # Errors
    /// If the server is not there.
    pub async fn connect2(&self) -> anyhow::Result<Shared> {
        let stream = TokioIo::new(self.stream(true).await?);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await?;
        tokio::spawn(connection);
        Ok(sender)
    }

    /// A request that fits [`Api::connect2`].
    ///
    /// # Errors
    /// If the path is not one.
    pub fn request2(&self, path: &str) -> anyhow::Result<Request<Full<Bytes>>> {
        Ok(Request::get(format!("https://{}{path}", self.address)).body(Full::default())?)
    }

    /// GET on a new connection.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.connect().await?.send(Method::GET, path, "", Bytes::new()).await
    }

    /// A request with a JSON body on a new connection.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn send(&self, method: Method, path: &str, body: &Value) -> anyhow::Result<Answer> {
        self.connect().await?.send(method, path, "application/json", serde_json::to_vec(body)?.into()).await
    }
}

impl Connection {
    /// Sends a request and gives the answer's head; the body is still to come.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn open(
        &mut self,
        method: Method,
        path: &str,
        kind: &str,
        body: Bytes,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request = Request::builder().method(method).uri(path).header("host", &self.host);
        if !kind.is_empty() {
            request = request.header("content-type", kind);
        }
        self.sender.ready().await?;
        let answer = self.sender.send_request(request.body(Full::new(body))?);
        tokio::time::timeout(Duration::from_secs(60), answer)
            .await
            .map_err(|_| anyhow!("{path}: no answer in a minute"))?
            .map_err(Into::into)
    }

    /// Sends a request and reads the answer.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn send(&mut self, method: Method, path: &str, kind: &str, body: Bytes) -> anyhow::Result<Answer> {
        let answer = self.open(method, path, kind, body).await?;
        let status = answer.status().as_u16();
        Ok(Answer { status, body: answer.into_body().collect().await?.to_bytes() })
    }
}
