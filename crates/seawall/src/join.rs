//! How machines join: what the newcomer does.
//!
//! A token is three parts, `<id>.<secret>.<hash>`: the first two are a bootstrap token
//! (<https://kubernetes.io/docs/reference/access-authn-authz/bootstrap-tokens/>), the third is the SHA-256 of the
//! cluster's certificate authority. The newcomer asks the server for the authority, believes it only if the hash is
//! right, and shows the secret only after that. While one authority takes over from another, tokens for the old one go on
//! working until it is dropped: the server's certificate leads to both. All that is trusted later the newcomer learns over
//! that connection.

use std::{fmt, net::SocketAddr, str::FromStr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use http::Request;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use kube::Client;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
use seawall_client::tls::{self, Credentials, Tls};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::{net::TcpStream, time::Instant};

use crate::{
    files::{Files, ServerState, StoreKind},
    options::{Cluster, Machine},
    paths, pki,
};

/// How long one request to a server may take.
const REQUEST: Duration = Duration::from_secs(10);
/// How long a machine tries to join.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long it waits between two attempts.
const PAUSE: Duration = Duration::from_millis(400);
/// How often it says what it waits for.
const SAY: Duration = Duration::from_secs(5);
/// The largest answer.
const ANSWER: usize = 1 << 20;

/// What lets a machine join.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// `<id>.<secret>`.
    pub bearer: String,
    /// The SHA-256 of the authority's certificate, in hexadecimal.
    pub hash: String,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.bearer, self.hash)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The secret stays out of logs.
        write!(f, "Token({}.…)", self.bearer.split('.').next().unwrap_or_default())
    }
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Token, String> {
        let text = text.trim();
        let parts: Vec<&str> = text.split('.').collect();
        let of = |part: &str, n: usize| {
            part.len() == n && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        match parts.as_slice() {
            [id, secret, hash] if of(id, 6) && of(secret, 16) && of(hash, 64) => {
                Ok(Token { bearer: format!("{id}.{secret}"), hash: (*hash).to_owned() })
            }
            _ => Err("this is no token of `seawall token create`: it has three parts with dots between, \
                      of 6, 16 and 64 small letters and digits"
                .to_owned()),
        }
    }
}

/// The SHA-256 of an authority, which is the first certificate of `pem`.
///
/// # Errors
/// If there is none.
pub fn hash(pem: &str) -> anyhow::Result<String> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).context("the certificate authority cannot be read")?;
    Ok(Sha256::digest(&der).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The host and the port in `https://host:port`.
fn host_of(url: &str) -> anyhow::Result<(String, u16)> {
    let way_out = || format!("--join {url:?}: write https://ADDRESS:6443, the address of a server of the cluster");
    let uri: http::Uri = url.parse().with_context(way_out)?;
    let (Some("https"), Some(host)) = (uri.scheme_str(), uri.host()) else { bail!(way_out()) };
    Ok((host.trim_matches(['[', ']']).to_owned(), uri.port_u16().unwrap_or(6443)))
}

/// The address in `https://address:port`.
///
/// # Errors
/// If it is something else, or a name that has no address.
pub async fn address_of(url: &str) -> anyhow::Result<SocketAddr> {
    let (host, port) = host_of(url)?;
    let none = || format!("--join {url:?}: {host} has no address");
    tokio::net::lookup_host((host.as_str(), port)).await.with_context(none)?.next().with_context(none)
}

/// Why an attempt to join came to nothing.
pub struct Failure {
    /// What to say.
    pub error: anyhow::Error,
    /// Whether another attempt may succeed.
    temporary: bool,
}

impl Failure {
    /// Another attempt would end in the same way.
    pub fn for_good(error: impl Into<anyhow::Error>) -> Failure {
        Failure { error: error.into(), temporary: false }
    }

    /// Another attempt may succeed.
    pub fn for_now(error: impl Into<anyhow::Error>) -> Failure {
        Failure { error: error.into(), temporary: true }
    }

    /// A server did not give what was asked for with a token that `command` makes.
    pub fn answered(url: &str, error: kube::Error, command: &str) -> Failure {
        match error {
            kube::Error::Api(status) => {
                let way_out = match status.code {
                    401 | 403 => {
                        format!(" (a token of `{command}` is needed, and it must not be older than its --ttl)")
                    }
                    _ => String::new(),
                };
                let error = anyhow::anyhow!("{url} said: {}{way_out}", status.message);
                Failure { error, temporary: status.code >= 500 }
            }
            error => Failure::for_now(anyhow::anyhow!("{url}: {error}")),
        }
    }
}

/// Tries to join until it succeeds, cannot succeed, or has taken too long.
///
/// # Errors
/// The last failure.
pub async fn insist<T>(mut attempt: impl AsyncFnMut() -> Result<T, Failure>) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    let mut said: Option<Instant> = None;
    loop {
        let error = match attempt().await {
            Ok(done) => return Ok(done),
            Err(Failure { error, temporary }) if !temporary || Instant::now() > deadline => {
                return Err(error.context("this machine did not join"));
            }
            Err(Failure { error, .. }) => error,
        };
        if said.is_none_or(|at| at.elapsed() > SAY) {
            said = Some(Instant::now());
            tracing::info!("waits to join: {error:#}");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What every machine of the cluster may know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClusterAnswer {
    /// The cluster.
    pub cluster: Cluster,
    /// Where its servers are.
    pub servers: Vec<SocketAddr>,
    /// Its certificate authorities, in PEM, the one that signs first.
    #[serde(default)]
    pub ca: String,
    /// Of two answers the one with the greater revision has the newer authorities.
    #[serde(default)]
    pub ca_revision: u64,
}

/// What a machine says that wants to be a server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerAsk {
    /// Its name.
    pub name: String,
    /// Its address.
    pub ip: std::net::IpAddr,
}

/// What it is given.
#[derive(Clone, Serialize, Deserialize)]
pub struct ServerAnswer {
    /// The cluster.
    pub cluster: Cluster,
    /// The files of `tls/` by name: authorities and keys.
    pub tls: std::collections::BTreeMap<String, String>,
    /// How to start its etcd member; none if the store is elsewhere.
    pub etcd: Option<crate::etcd::Local>,
    /// The external store.
    pub external: Option<(Vec<String>, Option<[String; 3]>)>,
}

/// A connection to a server whose authority has been checked.
pub struct Introduced {
    /// The authority that the token is for, in PEM.
    pub ca: String,
    /// A client that shows the token.
    pub client: Client,
}

/// Asks the server for the authority and checks its hash.
///
/// # Errors
/// If the server cannot be reached, or is not of the cluster that the token is for.
pub async fn connect(url: &str, token: &Token) -> Result<Introduced, Failure> {
    host_of(url).map_err(Failure::for_good)?;
    let address = address_of(url).await.map_err(Failure::for_now)?;
    let ca = tokio::time::timeout(REQUEST, fetch_authority(address))
        .await
        .map_err(|_| Failure::for_now(anyhow::anyhow!("{url} did not answer within {REQUEST:?}")))?
        .with_context(|| format!("{url} cannot be asked for its certificate authority"))
        .map_err(Failure::for_now)?;
    let ca = pinned(&ca, token)
        .with_context(|| format!("{url} is not a server of the cluster that the token is for"))
        .map_err(Failure::for_good)?;
    let credentials = Credentials { ca_pem: ca.clone(), certificate: None, token: Some(token.bearer.clone()) };
    let tls = Tls::new(&credentials).map_err(Failure::for_good)?;
    Ok(Introduced { ca, client: tls::connect(address, &tls) })
}

/// Makes this machine a server of the cluster: what its store is, and the keys that all servers share, on its disk.
///
/// # Errors
/// What kept it from joining.
pub async fn server(url: &str, token: &str, machine: &Machine, files: &Files) -> anyhow::Result<ServerState> {
    let token: Token = token.parse().map_err(|e| anyhow::anyhow!("--token: {e}"))?;
    let wish = ServerAsk { name: machine.name.clone(), ip: machine.ip };
    let answer: ServerAnswer = insist(async || {
        let to = connect(url, &token).await?;
        ask(&to.client, paths::JOIN, Some(&wish))
            .await
            .map_err(|error| Failure::answered(url, error, "seawall token create --role server"))
    })
    .await?;
    for (name, text) in &answer.tls {
        if !paths::is_shared(name) {
            bail!("{url} gave a file {name:?} that servers do not share: is it of another version?");
        }
        let secret = !name.ends_with(".crt") && !name.ends_with(".pub");
        pki::write(&files.tls().join(name), text, if secret { 0o600 } else { 0o644 })?;
    }
    let store = match (answer.etcd, answer.external) {
        (Some(local), _) => StoreKind::Stacked(local),
        (None, Some((servers, texts))) => {
            let mut written = None;
            if let Some([ca, certificate, key]) = texts {
                let dir = files.etcd_tls();
                let paths = [dir.join("external-ca.crt"), dir.join("external.crt"), dir.join("external.key")];
                for (path, text) in paths.iter().zip([ca, certificate, key]) {
                    pki::write(path, &text, 0o600)?;
                }
                written = Some(paths);
            }
            StoreKind::External { servers, files: written }
        }
        (None, None) => bail!("{url} did not say where the cluster's objects are: is it of another version?"),
    };
    tracing::info!(url, "joined the cluster");
    Ok(ServerState { cluster: answer.cluster, store })
}

/// The authority that a token is for, out of those that a server shows while one takes over from another. It alone is
/// believed: anybody could have put others beside it.
fn pinned(bundle: &str, token: &Token) -> anyhow::Result<String> {
    let mut found = Vec::new();
    for pem in seawall_server::tls::split_bundle(bundle)? {
        let hash = hash(&pem)?;
        if hash == token.hash {
            return Ok(pem);
        }
        found.push(hash);
    }
    bail!(
        "its certificate authority has the hash {}, and the token says {}. Nothing was sent to it. Make a token on that \
         cluster; tokens from before its authority was replaced (seawall certs rotate-ca) are of no use any more",
        found.join(" or "),
        token.hash
    )
}

/// Asks below `/seawall/v1/`.
///
/// # Errors
/// What the server said.
pub async fn ask<T: serde::de::DeserializeOwned>(
    client: &Client,
    path: &str,
    body: Option<&impl Serialize>,
) -> kube::Result<T> {
    let request = match body {
        Some(body) => Request::post(path)
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(serde_json::to_vec(body).map_err(kube::Error::SerdeError)?),
        None => Request::get(path).body(Vec::new()),
    };
    client.request(request.map_err(kube::Error::HttpError)?).await
}

/// The server's certificate authority, which nothing vouches for yet.
async fn fetch_authority(address: SocketAddr) -> anyhow::Result<String> {
    #[derive(Deserialize)]
    struct Answer {
        ca: String,
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Unverified(provider)))
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(tls::SERVER_NAME)?;
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = Request::get(seawall_server::paths::CA)
        .header(http::header::HOST, tls::SERVER_NAME)
        .body(Empty::<bytes::Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER).collect().await.map_err(|e| anyhow::anyhow!("{e}"))?.to_bytes();
    driver.abort();
    if !status.is_success() {
        bail!("it said {status}: {}", String::from_utf8_lossy(&body));
    }
    Ok(serde_json::from_slice::<Answer>(&body)?.ca)
}

/// Accepts any certificate: only for the one public answer whose hash is checked afterwards.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens() {
        let hash = "a1".repeat(32);
        let text = format!("abcdef.0123456789abcdef.{hash}");
        let token: Token = text.parse().unwrap();
        assert_eq!(token.to_string(), text);
        assert_eq!(format!("{token:?}"), "Token(abcdef.…)");
        for bad in ["", "abcdef.0123456789abcdef", "abcdef.0123456789abcdef.12", "ABCDEF.0123456789abcdef.00"] {
            let error = bad.parse::<Token>().unwrap_err();
            assert!(error.contains("seawall token create"), "{bad}: {error}");
        }
    }

    #[test]
    fn only_the_tokens_own_authority_is_believed() {
        let pem = || pki::Authority::generate("x").unwrap().pem;
        let (old, new, other) = (pem(), pem(), pem());
        let token = |pem: &str| Token { bearer: "abcdef.0123456789abcdef".into(), hash: hash(pem).unwrap() };
        let bundle = format!("{old}{new}");
        for one in [&old, &new] {
            let found = pinned(&bundle, &token(one)).unwrap();
            assert_eq!((hash(&found).unwrap(), found.matches("BEGIN").count()), (hash(one).unwrap(), 1));
        }
        let error = pinned(&bundle, &token(&other)).unwrap_err().to_string();
        assert!(error.contains("Nothing was sent to it") && error.contains(&hash(&new).unwrap()), "{error}");
    }

    #[tokio::test]
    async fn what_to_join() {
        assert_eq!(address_of("https://192.0.2.1:7443").await.unwrap().to_string(), "192.0.2.1:7443");
        assert_eq!(address_of("https://[2001:db8::1]").await.unwrap().to_string(), "[2001:db8::1]:6443");
        let token: Token = format!("abcdef.0123456789abcdef.{}", "0".repeat(64)).parse().unwrap();
        for bad in ["192.0.2.1", "http://192.0.2.1:6443", "https://"] {
            // At once: what is no address now is none later.
            let failure = connect(bad, &token).await.err().unwrap();
            let error = format!("{:#}", failure.error);
            assert!(!failure.temporary && error.contains("write https://ADDRESS:6443"), "{bad}: {error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_pass_is_tried_again_for_a_while() {
        let mut attempts = 0;
        let joined = insist(async || {
            attempts += 1;
            if attempts < 5 { Err(Failure::for_now(anyhow::anyhow!("busy"))) } else { Ok(attempts) }
        });
        assert_eq!(joined.await.unwrap(), 5);
        let error = insist(async || Err::<(), _>(Failure::for_good(anyhow::anyhow!("never")))).await.unwrap_err();
        assert_eq!(format!("{error:#}"), "this machine did not join: never");
        let begun = Instant::now();
        let error = insist(async || Err::<(), _>(Failure::for_now(anyhow::anyhow!("busy")))).await.unwrap_err();
        assert_eq!(format!("{error:#}"), "this machine did not join: busy");
        assert!(begun.elapsed() >= PATIENCE && begun.elapsed() < PATIENCE * 2);
    }
}
