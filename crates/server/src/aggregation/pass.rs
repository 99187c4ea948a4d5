//! Passing a request on to another server, and its answer back.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rustls::{
    ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WantsClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::Remote;
use crate::{
    RequestBody, Server,
    audit::Trail,
    auth::{MASTERS, UserInfo},
    encode::Body,
    error::{ApiError, Result},
    kubelet::join,
    webhook::CONNECT,
};

/// Headers that are about one connection.
pub(crate) const OF_THE_CONNECTION: [HeaderName; 7] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];
/// What may stand in the name of a header as it is.
const IN_A_NAME: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
/// The most that a list of resources may have, in bytes.
const MOST: usize = 4 << 20;

type Answer = Response<hyper::body::Incoming>;

impl Server {
    /// Passes a request on, for `user`.
    pub(crate) async fn pass_on(
        self: &Arc<Self>,
        remote: &Remote,
        parts: &mut Parts,
        body: RequestBody,
        user: &UserInfo,
    ) -> Result<Response<Body>> {
        let client = parts.extensions.remove::<hyper::upgrade::OnUpgrade>();
        let upgrade = parts.headers.get(header::UPGRADE).cloned().filter(|_| client.is_some());
        let mut headers = std::mem::take(&mut parts.headers);
        about(&mut headers, user);
        if let Some(protocol) = upgrade {
            headers.insert(header::UPGRADE, protocol);
            headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        }
        let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
        let mut request = Request::new(body);
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = path.parse().map_err(|_| ApiError::bad_request(format!("{path:?} is no valid URL")))?;
        *request.headers_mut() = headers;
        let mut response = self
            .send_to_remote(remote, request)
            .await
            .map_err(|why| ApiError::unavailable(format!("error trying to reach service {}: {why}", remote.host())))?;
        if let (StatusCode::SWITCHING_PROTOCOLS, Some(client)) = (response.status(), client) {
            let trail = parts.extensions.get::<Arc<Trail>>().cloned();
            return Ok(join(client, &mut response, self.stop.clone(), trail));
        }
        for name in OF_THE_CONNECTION {
            response.headers_mut().remove(name);
        }
        Ok(response.map(|body| body.map_err(Into::into).boxed_unsync()))
    }

    async fn send_to_remote<B>(&self, remote: &Remote, mut request: Request<B>) -> Result<Answer, String>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (namespace, name, port) = &remote.service;
        let addresses = self.service_addresses(namespace, name, *port).await?;
        let tls = TlsConnector::from(self.aggregation.trust(remote)?);
        let host = remote.host();
        let server = ServerName::try_from(host.clone()).map_err(|e| format!("{host:?}: {e}"))?;
        let mut failure = format!("service {namespace}/{name} has no endpoint that is ready");
        for address in addresses {
            let attempt = async {
                let stream = TcpStream::connect(address).await.map_err(|e| format!("dial tcp {address}: {e}"))?;
                let _ = stream.set_nodelay(true);
                tls.connect(server.clone(), stream).await.map_err(|e| format!("tls: {e}"))
            };
            let stream = match tokio::time::timeout(CONNECT, attempt).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(why)) => {
                    failure = why;
                    continue;
                }
                Err(_) => {
                    failure = format!("dial tcp {address}: i/o timeout");
                    continue;
                }
            };
            let connection = hyper::client::conn::http1::handshake(TokioIo::new(stream));
            let (mut sender, connection) = connection.await.map_err(|e| e.to_string())?;
            tokio::spawn(async move {
                if let Err(error) = connection.with_upgrades().await {
                    tracing::debug!(%error, "a connection to another API server ended");
                }
            });
            request.headers_mut().insert(header::HOST, HeaderValue::try_from(&host).map_err(|e| e.to_string())?);
            return sender.send_request(request).await.map_err(|e| e.to_string());
        }
        Err(failure)
    }

    /// What a server says of one of its paths, asked by this server itself.
    pub(super) async fn ask_remote(&self, remote: &Remote, path: &str) -> Result<(StatusCode, Value), String> {
        let user = UserInfo::new("system:kube-aggregator", &[MASTERS]);
        let (parts, body) = self.ask_remote_as(remote, &user, path, None, MOST).await?;
        Ok((parts.status, serde_json::from_slice(&body).unwrap_or_default()))
    }

    /// What a server answers `user` for a path, in at most `most` bytes; `tag` is that of the answer that is known.
    pub(super) async fn ask_remote_as(
        &self,
        remote: &Remote,
        user: &UserInfo,
        path: &str,
        tag: Option<&str>,
        most: usize,
    ) -> Result<(http::response::Parts, Bytes), String> {
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.method_mut() = Method::GET;
        *request.uri_mut() = path.parse().map_err(|e| format!("{path}: {e}"))?;
        about(request.headers_mut(), user);
        request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        if let Some(tag) = tag.and_then(|tag| HeaderValue::from_str(tag).ok()) {
            request.headers_mut().insert(header::IF_NONE_MATCH, tag);
        }
        let (parts, body) = self.send_to_remote(remote, request).await?.into_parts();
        let body = Limited::new(body, most).collect().await.map_err(|e| e.to_string())?;
        Ok((parts, body.to_bytes()))
    }
}

/// Says for whom a request is, and takes away what the client says about that, and what is about its connection.
fn about(headers: &mut HeaderMap, user: &UserInfo) {
    let named: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("x-remote-")).cloned().collect();
    for name in named.iter().chain(&OF_THE_CONNECTION).chain(&[header::AUTHORIZATION, header::HOST]) {
        headers.remove(name);
    }
    headers.remove("keep-alive");
    let mut add = |name: &str, value: &str| {
        // A name that no header can carry is nobody's.
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_bytes(value.as_bytes())) {
            headers.append(name, value);
        }
    };
    add("x-remote-user", &user.username);
    if !user.uid.is_empty() {
        add("x-remote-uid", &user.uid);
    }
    for group in &user.groups {
        add("x-remote-group", group);
    }
    for (key, values) in &user.extra {
        let name = format!("x-remote-extra-{}", utf8_percent_encode(&key.to_lowercase(), IN_A_NAME));
        values.iter().for_each(|value| add(&name, value));
    }
}

impl super::Aggregation {
    fn trust(&self, remote: &Remote) -> Result<Arc<ClientConfig>, String> {
        let key = (remote.authorities.clone(), remote.insecure);
        if let Some(known) = self.tls.lock().get(&key) {
            return Ok(known.clone());
        }
        let identity = self.identity.load_full().ok_or("this server is still starting")?;
        let builder = if remote.insecure {
            believe_anybody()
        } else {
            let pem = STANDARD.decode(&remote.authorities).map_err(|e| format!("spec.caBundle: {e}"))?;
            let mut roots = RootCertStore::empty();
            for der in CertificateDer::pem_slice_iter(&pem) {
                roots
                    .add(der.map_err(|e| format!("spec.caBundle: {e}"))?)
                    .map_err(|e| format!("spec.caBundle: {e}"))?;
            }
            ClientConfig::builder().with_root_certificates(roots)
        };
        let config = builder.with_client_auth_cert(identity.chain.clone(), identity.key.clone_key());
        let config = Arc::new(config.map_err(|e| e.to_string())?);
        let mut known = self.tls.lock();
        // Bundles that nobody has any more are few, and are forgotten together.
        if known.len() >= 256 {
            known.clear();
        }
        known.insert(key, config.clone());
        Ok(config)
    }
}

/// A client of TLS that asks nobody to prove who they are.
pub(crate) fn believe_anybody() -> ConfigBuilder<ClientConfig, WantsClientCert> {
    let builder = ClientConfig::builder();
    let provider = builder.crypto_provider().clone();
    builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)))
}

/// Believes any certificate, as `insecureSkipTLSVerify` asks for.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_says_who_they_are_by_themselves() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("x-remote-user", "root"),
            ("x-remote-group", "system:masters"),
            ("x-remote-extra-a", "b"),
            ("authorization", "Bearer x"),
            ("connection", "close"),
            ("accept", "application/json"),
        ] {
            headers.append(HeaderName::try_from(name).unwrap(), HeaderValue::from_static(value));
        }
        let mut user = UserInfo::new("anna", &["team"]);
        user.extra.insert("Example.com/Scopes".into(), vec!["a".into(), "b".into()]);
        about(&mut headers, &user);
        let mut all: Vec<String> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        all.sort();
        assert_eq!(
            all,
            [
                "accept: application/json",
                "x-remote-extra-example.com%2fscopes: a",
                "x-remote-extra-example.com%2fscopes: b",
                "x-remote-group: system:authenticated",
                "x-remote-group: team",
                "x-remote-user: anna",
            ]
        );
    }
}
