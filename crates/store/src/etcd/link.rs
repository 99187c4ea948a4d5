//! One connection to one member: TCP, perhaps TLS, HTTP/2, gRPC.

use std::{
    fmt, io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use http::{Uri, uri::PathAndQuery};
use hyper_util::rt::TokioIo;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, RootCertStore, crypto::ring},
};
use tokio_util::{either::Either, sync::CancellationToken};
use tonic::{
    Request, Status,
    client::Grpc,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::proto::{Rpc, SNAPSHOT, SnapshotRequest, SnapshotResponse, WATCH, WatchRequest, WatchResponse};

/// What a client of etcd shows, and whom it believes.
#[derive(Clone, PartialEq, Eq)]
pub struct Tls {
    /// The certificates of the authorities that sign members' certificates.
    pub ca_pem: String,
    /// Our certificate, with the intermediate ones after it.
    pub cert_pem: String,
    /// Its key.
    pub key_pem: String,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls { .. }")
    }
}

/// Why [`Tls`] or an address cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A PEM text does not hold what it should.
    #[error("{what} cannot be used: {reason}")]
    Pem {
        /// Which one.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// An address is not one.
    #[error("{url:?} is not an endpoint of etcd: {reason}; expected is e.g. https://10.0.0.1:2379")]
    Url {
        /// As it was given.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl Tls {
    pub(super) fn config(&self) -> Result<Arc<ClientConfig>, ConfigError> {
        fn pem<E: fmt::Display>(what: &'static str) -> impl Fn(E) -> ConfigError {
            move |error| ConfigError::Pem { what, reason: error.to_string() }
        }
        let mut roots = RootCertStore::empty();
        for ca in CertificateDer::pem_slice_iter(self.ca_pem.as_bytes()) {
            let what = "the certificate of etcd's authority";
            roots.add(ca.map_err(pem(what))?).map_err(pem(what))?;
        }
        if roots.is_empty() {
            let reason = "there is no certificate in it".to_owned();
            return Err(ConfigError::Pem { what: "the certificate of etcd's authority", reason });
        }
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(self.cert_pem.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(pem("the certificate for etcd"))?;
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(pem("the key for etcd"))?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(pem("TLS"))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(pem("the certificate for etcd with its key"))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

/// Where a member listens, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    origin: Uri,
    host: String,
    port: u16,
    pub(super) secure: bool,
}

impl Address {
    pub(super) fn parse(url: &str) -> Result<Address, ConfigError> {
        let wrong = |reason| ConfigError::Url { url: url.to_owned(), reason };
        let origin: Uri = url.parse().map_err(|_| wrong("it is not a URL"))?;
        let secure = match origin.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(wrong("it does not begin with http:// or https://")),
        };
        if !matches!(origin.path(), "" | "/") || origin.query().is_some() {
            return Err(wrong("it has a path"));
        }
        let host = origin.host().ok_or_else(|| wrong("it has no host"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = origin.port_u16().unwrap_or(2379);
        Ok(Address { origin, host, port, secure })
    }
}

/// The times of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// For TCP and TLS together.
    pub connect: Duration,
    /// How long a connection may be silent before it is pinged, and then until it is given up.
    pub keepalive: Duration,
}

/// A connection, or the prospect of one: it is made when it is first used, and made again when it breaks.
#[derive(Clone)]
pub(super) struct Link {
    channel: Channel,
    /// Done when the member has been left: nothing that comes is of interest any more.
    pub(super) cut: CancellationToken,
    /// Why it was left.
    why: Arc<OnceLock<String>>,
}

impl Link {
    pub(super) fn new(address: &Address, tls: Option<Arc<ClientConfig>>, patience: Patience) -> Link {
        let to = address.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let (to, tls) = (to.clone(), tls.clone());
            async move {
                tokio::time::timeout(patience.connect, connect(to, tls))
                    .await
                    .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no connection in time")))
            }
        });
        let channel = Endpoint::from(address.origin.clone())
            .http2_keep_alive_interval(patience.keepalive)
            .keep_alive_timeout(patience.keepalive)
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(16 << 20)
            .connect_with_connector_lazy(connector);
        Link { channel, cut: CancellationToken::new(), why: Arc::default() }
    }

    /// Breaks off whatever uses this connection.
    pub(super) fn sever(&self, why: &str) {
        // The first reason stays.
        let _ = self.why.set(why.to_owned());
        self.cut.cancel();
    }

    /// The failure of a call that was broken off.
    pub(super) fn severed(&self) -> Failure {
        Failure { kind: Kind::Broken, said: self.why.get().cloned().unwrap_or_else(|| "it was left".into()) }
    }

    /// One call with one answer. The member is told the limit, too; keeping it is the caller's business.
    pub(super) async fn call<R: Rpc>(&self, request: R, limit: Duration) -> Result<R::Answer, Status> {
        let mut grpc = self.grpc().await?;
        let mut request = Request::new(request);
        request.set_timeout(limit);
        if R::NEEDS_LEADER {
            needs_leader(&mut request);
        }
        let path = PathAndQuery::from_static(R::PATH);
        Ok(grpc.unary(request, path, ProstCodec::default()).await?.into_inner())
    }

    /// A stream of watches.
    pub(super) async fn watch(
        &self,
        requests: tokio::sync::mpsc::Receiver<WatchRequest>,
    ) -> Result<tonic::Streaming<WatchResponse>, Status> {
        let mut grpc = self.grpc().await?;
        let mut request = Request::new(tokio_stream::wrappers::ReceiverStream::new(requests));
        needs_leader(&mut request);
        let path = PathAndQuery::from_static(WATCH);
        Ok(grpc.streaming(request, path, ProstCodec::default()).await?.into_inner())
    }

    /// The member's database, in pieces.
    pub(super) async fn snapshot(&self) -> Result<tonic::Streaming<SnapshotResponse>, Status> {
        let mut grpc = self.grpc().await?;
        let path = PathAndQuery::from_static(SNAPSHOT);
        Ok(grpc.server_streaming(Request::new(SnapshotRequest {}), path, ProstCodec::default()).await?.into_inner())
    }

    async fn grpc(&self) -> Result<Grpc<Channel>, Status> {
        // What a member may send us is limited by what we ask for.
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(usize::MAX);
        grpc.ready().await.map_err(|error| Status::from_error(error.into()))?;
        Ok(grpc)
    }
}

/// Without this, a member that has lost its leader lets a request wait, and a watch believe that nothing happens.
fn needs_leader<T>(request: &mut Request<T>) {
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
}

type Stream = TokioIo<Either<TcpStream, tokio_rustls::client::TlsStream<TcpStream>>>;

async fn connect(to: Address, tls: Option<Arc<ClientConfig>>) -> io::Result<Stream> {
    let tcp = TcpStream::connect((to.host.as_str(), to.port)).await?;
    tcp.set_nodelay(true)?;
    if !to.secure {
        return Ok(TokioIo::new(Either::Left(tcp)));
    }
    let tls = tls.ok_or_else(|| io::Error::other("it is https, and no certificates were given"))?;
    let name = ServerName::try_from(to.host).map_err(io::Error::other)?;
    let stream = TlsConnector::from(tls).connect(name, tcp).await?;
    Ok(TokioIo::new(Either::Right(stream)))
}

/// What a failed call says about the member and about the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    /// In words for people.
    pub(super) said: String,
}

/// What can be done about a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// No connection: the request was not sent.
    Unreachable,
    /// The connection broke, or the member stopped: the request may have been carried out.
    Broken,
    /// No answer in time: the request may have been carried out, and may still be.
    Silent,
    /// The member cannot serve now, and did nothing: no leader, learner, too busy.
    Unfit,
    /// The member could not finish, and may have done it: the leader changed, its own time ran out.
    Unsure,
    /// The member follows another leader since, and what it sent to the old one is most likely lost. It is well.
    Overtaken,
    /// Another member would say the same.
    Final,
}

impl Kind {
    /// Whether a write that failed like this may have happened.
    pub(super) fn is_ambiguous(self) -> bool {
        matches!(self, Kind::Broken | Kind::Silent | Kind::Unsure | Kind::Overtaken)
    }
}

impl Failure {
    pub(super) fn of(status: &Status) -> Failure {
        Failure { kind: kind(status), said: said(status) }
    }

    pub(super) fn silent(limit: Duration) -> Failure {
        Failure { kind: Kind::Silent, said: format!("no answer within {} ms", limit.as_millis()) }
    }
}

/// etcd's errors are known by their texts (`api/v3rpc/rpctypes/error.go`); the codes are shared by too many.
fn kind(status: &Status) -> Kind {
    use tonic::Code;
    let message = status.message();
    let is = |texts: &[&str]| texts.iter().any(|text| message.contains(text));
    if cause::<tonic::ConnectError>(status).is_some() {
        Kind::Unreachable
    } else if is(&["no leader", "not capable", "not supported for learner", "too many requests"])
        || is(&["raft proposal dropped", "corrupt"])
    {
        Kind::Unfit
    } else if is(&["leader changed", "request timed out", "server stopped", "unhealthy cluster", "timed out waiting"]) {
        Kind::Unsure
    } else if message.starts_with("etcdserver: ") && status.code() != Code::Unavailable {
        Kind::Final
    } else {
        match status.code() {
            Code::DeadlineExceeded | Code::Cancelled => Kind::Silent,
            Code::OutOfRange
            | Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::NotFound
            | Code::AlreadyExists
            | Code::ResourceExhausted
            | Code::Unimplemented => Kind::Final,
            _ => Kind::Broken,
        }
    }
}

fn cause<E: std::error::Error + 'static>(status: &Status) -> Option<&E> {
    let mut next = std::error::Error::source(status);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// The innermost cause tells the most: "Connection refused", "certificate has expired".
fn said(status: &Status) -> String {
    let mut next = std::error::Error::source(status);
    let mut innermost = None;
    while let Some(error) = next {
        innermost = Some(error.to_string());
        next = error.source();
    }
    match innermost {
        Some(inner) if !inner.is_empty() && inner != status.message() => inner,
        _ if status.message().is_empty() => status.code().description().to_owned(),
        _ => status.message().trim_start_matches("etcdserver: ").to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn errors_of_etcd() {
        for (code, message, expected) in [
            (Code::Unavailable, "etcdserver: no leader", Kind::Unfit),
            (Code::Unknown, "raft proposal dropped", Kind::Unfit),
            (Code::Unavailable, "etcdserver: rpc not supported for learner", Kind::Unfit),
            (Code::ResourceExhausted, "etcdserver: too many requests", Kind::Unfit),
            (Code::Unavailable, "etcdserver: leader changed", Kind::Unsure),
            (Code::Unavailable, "etcdserver: request timed out, possibly due to connection lost", Kind::Unsure),
            (Code::Unavailable, "etcdserver: server stopped", Kind::Unsure),
            (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted", Kind::Final),
            (Code::OutOfRange, "etcdserver: mvcc: required revision is a future revision", Kind::Final),
            (Code::InvalidArgument, "etcdserver: request is too large", Kind::Final),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded", Kind::Final),
            (Code::PermissionDenied, "etcdserver: permission denied", Kind::Final),
            (
                Code::FailedPrecondition,
                "etcdserver: re-configuration failed due to not enough started members",
                Kind::Final,
            ),
            (Code::DeadlineExceeded, "context deadline exceeded", Kind::Silent),
            (Code::Unavailable, "transport is closing", Kind::Broken),
            (Code::Unknown, "transport error", Kind::Broken),
            (Code::Internal, "h2 protocol error", Kind::Broken),
        ] {
            assert_eq!(kind(&Status::new(code, message)), expected, "{message}");
        }
    }

    #[test]
    fn addresses() {
        for (url, expected) in [
            ("http://127.0.0.1:2379", Some(("127.0.0.1", 2379, false))),
            ("https://[fd00::1]:23790/", Some(("fd00::1", 23790, true))),
            ("https://etcd-1.example", Some(("etcd-1.example", 2379, true))),
            ("10.0.0.1:2379", None),
            ("ftp://10.0.0.1", None),
            ("http://10.0.0.1:2379/v3", None),
            ("", None),
        ] {
            let found = Address::parse(url).ok();
            assert_eq!(found.as_ref().map(|a| (a.host.as_str(), a.port, a.secure)), expected, "{url}");
        }
    }

    #[test]
    fn useless_certificates_are_named() {
        let nothing = Tls { ca_pem: String::new(), cert_pem: String::new(), key_pem: String::new() };
        let error = nothing.config().unwrap_err().to_string();
        assert_eq!(error, "the certificate of etcd's authority cannot be used: there is no certificate in it");
        assert_eq!(format!("{nothing:?}"), "Tls { .. }", "keys are not for logs");
    }
}
