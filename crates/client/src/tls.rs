//! Clients over TLS.
//!
//! Credentials can be replaced while the client is in use: the next connection uses them.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use arc_swap::ArcSwap;
use http::{HeaderValue, Request, Uri, header};
use hyper_util::{
    client::legacy::{
        self,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use kube::{Client, client::Body};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// The name that every server's certificate has, whatever address it is reached at.
pub const SERVER_NAME: &str = "kubernetes";

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(2);
/// A server that is silent for this long, though asked, is left.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// How a client proves who it is, and how it knows the server.
#[derive(Clone, Default)]
pub struct Credentials {
    /// Who signs the servers' certificates, in PEM.
    pub ca_pem: String,
    /// The client's certificate and key, in PEM.
    pub certificate: Option<(String, String)>,
    /// A bearer token.
    pub token: Option<String>,
}

/// Why credentials are of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// PEM that cannot be read.
    #[error("{what} cannot be read: {source}")]
    Pem {
        /// Which one.
        what: &'static str,
        /// What is wrong.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// A certificate or key that cannot be used.
    #[error("{what} cannot be used: {source}")]
    Tls {
        /// Which one.
        what: &'static str,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
    /// A token with characters that do not belong there.
    #[error("the token has characters that no token has")]
    Token,
}

struct State {
    config: Arc<ClientConfig>,
    authorization: Option<HeaderValue>,
}

/// Credentials in use.
#[derive(Clone)]
pub struct Tls(Arc<ArcSwap<State>>);

impl Tls {
    /// Reads credentials.
    ///
    /// # Errors
    /// If they are malformed.
    pub fn new(credentials: &Credentials) -> Result<Tls, Error> {
        Ok(Tls(Arc::new(ArcSwap::from_pointee(state(credentials)?))))
    }

    /// Uses other credentials from the next connection on.
    ///
    /// # Errors
    /// If they are malformed; then the old ones stay.
    pub fn replace(&self, credentials: &Credentials) -> Result<(), Error> {
        self.0.store(Arc::new(state(credentials)?));
        Ok(())
    }
}

fn state(credentials: &Credentials) -> Result<State, Error> {
    let tls = |what| move |source| Error::Tls { what, source };
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(credentials.ca_pem.as_bytes()) {
        let what = "the certificate authority";
        roots.add(der.map_err(|source| Error::Pem { what, source })?).map_err(tls(what))?;
    }
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let mut config = match &credentials.certificate {
        Some((certificate, key)) => {
            let chain = CertificateDer::pem_slice_iter(certificate.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|source| Error::Pem { what: "the certificate", source })?;
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
                .map_err(|source| Error::Pem { what: "the key", source })?;
            builder.with_client_auth_cert(chain, key).map_err(tls("the certificate"))?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let authorization = match &credentials.token {
        Some(token) => Some(HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| Error::Token)?),
        None => None,
    };
    Ok(State { config: Arc::new(config), authorization })
}

/// A client of the API server at `address`.
pub fn connect(address: SocketAddr, tls: &Tls) -> Client {
    let connecting = tls.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let config = connecting.0.load().config.clone();
        Box::pin(open(address, config))
    });
    let client: legacy::Client<_, Body> = legacy::Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_only(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .http2_keep_alive_timeout(KEEP_ALIVE)
        .http2_keep_alive_while_idle(true)
        .http2_initial_stream_window_size(1 << 20)
        .build(connector);
    let tls = tls.clone();
    let service = tower::service_fn(move |mut request: Request<Body>| {
        let (client, state) = (client.clone(), tls.0.load_full());
        async move {
            let path = request.uri().path_and_query().map_or("/", |p| p.as_str());
            let uri = format!("https://{SERVER_NAME}{path}").parse::<Uri>()?;
            *request.uri_mut() = uri;
            if let Some(value) = &state.authorization {
                request.headers_mut().insert(header::AUTHORIZATION, value.clone());
            }
            client.request(request).await.map_err(Box::<dyn std::error::Error + Send + Sync>::from)
        }
    });
    Client::new(service, "default")
}

async fn open(address: SocketAddr, config: Arc<ClientConfig>) -> io::Result<TokioIo<Stream>> {
    let connect = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
        TlsConnector::from(config).connect(name, stream).await
    };
    let stream = tokio::time::timeout(CONNECT, connect).await.map_err(|_| {
        io::Error::new(io::ErrorKind::TimedOut, format!("no connection to {address} within {CONNECT:?}"))
    })??;
    Ok(TokioIo::new(Stream(stream)))
}

/// A connection that tells the pool that it speaks HTTP/2.
struct Stream(TlsStream<TcpStream>);

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new().negotiated_h2()
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
