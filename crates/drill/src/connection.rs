//! Connections to an API server, as plain as a load generator needs them.

use std::{path::Path, sync::Arc};

use anyhow::{Context as _, bail};
use base64::Engine as _;
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1::SendRequest, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Where a server is and who we are.
#[derive(Clone)]
pub struct Target {
    host: String,
    port: u16,
    tls: TlsConnector,
    identity: Arc<Identity>,
}

/// Who we are and whom we believe, in PEM.
pub struct Identity {
    /// Who signs the servers' certificates.
    pub authority: String,
    /// Our certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

impl Target {
    /// Reads the current context of a kubeconfig with certificates in it.
    pub fn from_kubeconfig(path: &Path) -> anyhow::Result<Target> {
        let text = std::fs::read_to_string(path).with_context(|| format!("--kubeconfig {}", path.display()))?;
        let config: Value =
            serde_yaml_ng::from_str(&text).with_context(|| format!("--kubeconfig {}", path.display()))?;
        let named = |list: &str, name: &Value| {
            config[list].as_array().into_iter().flatten().find(|e| e["name"] == *name).cloned()
        };
        let context = named("contexts", &config["current-context"]).context("the kubeconfig has no current context")?;
        let cluster =
            named("clusters", &context["context"]["cluster"]).context("the kubeconfig lacks the context's cluster")?;
        let user = named("users", &context["context"]["user"]).context("the kubeconfig lacks the context's user")?;
        let pem = |value: &Value, what: &str| -> anyhow::Result<String> {
            let text = value.as_str().with_context(|| format!("the kubeconfig has no {what}"))?;
            let bytes = base64::engine::general_purpose::STANDARD.decode(text);
            String::from_utf8(bytes.with_context(|| format!("{what} is not base64"))?)
                .with_context(|| format!("{what} is not PEM"))
        };
        let identity = Identity {
            authority: pem(&cluster["cluster"]["certificate-authority-data"], "certificate-authority-data")?,
            certificate: pem(&user["user"]["client-certificate-data"], "client-certificate-data")?,
            key: pem(&user["user"]["client-key-data"], "client-key-data")?,
        };
        let mut roots = RootCertStore::empty();
        for der in CertificateDer::pem_slice_iter(identity.authority.as_bytes()) {
            roots.add(der?)?;
        }
        let chain = CertificateDer::pem_slice_iter(identity.certificate.as_bytes()).collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes())?;
        let tls = ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(chain, key)?;
        let server = cluster["cluster"]["server"].as_str().unwrap_or_default();
        let (host, port) = server
            .trim_start_matches("https://")
            .trim_end_matches('/')
            .rsplit_once(':')
            .with_context(|| format!("server {server:?} names no port"))?;
        Ok(Target {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: port.parse()?,
            tls: TlsConnector::from(Arc::new(tls)),
            identity: Arc::new(identity),
        })
    }

    /// The name or address of the server.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The certificate that the server shows, in DER. It has been verified.
    ///
    /// # Errors
    /// If the server is not reached, or is not believed.
    pub async fn certificate(&self) -> anyhow::Result<Vec<u8>> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.with_context(|| self.address())?;
        let stream = self.tls.connect(ServerName::try_from(self.host.clone())?, stream).await?;
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        Ok(shown.context("the server shows no certificate")?.to_vec())
    }

    /// Host and port.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// Who we are.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The same cluster and user by another of its servers.
    pub fn at(&self, host: &str, port: u16) -> Target {
        Target { host: host.to_owned(), port, tls: self.tls.clone(), identity: self.identity.clone() }
    }

    async fn stream(&self) -> anyhow::Result<TokioIo<TlsStream<TcpStream>>> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.with_context(|| self.address())?;
        stream.set_nodelay(true)?;
        Ok(TokioIo::new(self.tls.connect(ServerName::try_from(self.host.clone())?, stream).await?))
    }

    /// Connects for many requests at a time (HTTP/2), as client-go and what is like it do.
    pub async fn connect_shared(&self) -> anyhow::Result<Shared> {
        // It is told by what is sent first.
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.initial_connection_window_size(1 << 20);
        let (sender, connection) = http.handshake(self.stream().await?).await?;
        tokio::spawn(async move {
            // Requests on it report what went wrong.
            let _ = connection.await;
        });
        Ok(Shared { sender, address: self.address() })
    }

    /// Connects.
    pub async fn connect(&self) -> anyhow::Result<Connection> {
        let (sender, connection) = hyper::client::conn::http1::handshake(self.stream().await?).await?;
        tokio::spawn(async move {
            // Requests on it report what went wrong.
            let _ = connection.await;
        });
        Ok(Connection { sender, host: format!("{}:{}", self.host, self.port) })
    }
}

/// One connection, many requests at a time.
#[derive(Clone)]
pub struct Shared {
    sender: http2::SendRequest<Full<Bytes>>,
    address: String,
}

impl Shared {
    /// Asks for something and returns the answer with its body still to come.
    pub async fn start(&mut self, path: &str) -> anyhow::Result<http::Response<Incoming>> {
        let request = Request::builder().uri(format!("https://{}{path}", self.address)).body(Full::default())?;
        self.sender.ready().await?;
        Ok(self.sender.send_request(request).await?)
    }
}

/// One connection, one request at a time.
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    host: String,
}

impl Connection {
    /// Whether the other side is known to have closed it.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends a request and returns the answer with its body still to come.
    pub async fn start(&mut self, method: Method, path: &str, body: Bytes) -> anyhow::Result<http::Response<Incoming>> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.host)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        self.sender.ready().await?;
        Ok(self.sender.send_request(request).await?)
    }

    /// Reads something in the form that is asked for.
    pub async fn fetch(&mut self, path: &str, accept: &str) -> anyhow::Result<Bytes> {
        let request = Request::builder().uri(path).header(header::HOST, &self.host).header(header::ACCEPT, accept);
        self.answer(path, request.body(Full::default())?).await
    }

    /// Patches something.
    pub async fn patch(&mut self, path: &str, kind: &str, body: impl Into<Bytes>) -> anyhow::Result<Bytes> {
        let request = Request::builder().method(Method::PATCH).uri(path).header(header::HOST, &self.host);
        self.answer(path, request.header(header::CONTENT_TYPE, kind).body(Full::new(body.into()))?).await
    }

    /// The answer to a request that has to succeed.
    async fn answer(&mut self, path: &str, request: Request<Full<Bytes>>) -> anyhow::Result<Bytes> {
        let method = request.method().clone();
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        if !status.is_success() {
            bail!("{method} {path}: {status}: {}", String::from_utf8_lossy(&body[..body.len().min(300)]));
        }
        Ok(body)
    }

    /// Sends a request and reads the whole answer.
    pub async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: impl Into<Bytes>,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let response = self.start(method, path, body.into()).await?;
        let status = response.status();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }

    /// [`Connection::send`], and anything but success is an error.
    pub async fn expect(&mut self, method: Method, path: &str, body: impl Into<Bytes>) -> anyhow::Result<Bytes> {
        let request = Request::builder().method(method).uri(path).header(header::HOST, &self.host);
        let request = request.header(header::CONTENT_TYPE, "application/json").body(Full::new(body.into()))?;
        self.answer(path, request).await
    }
}
