//! Connections: TLS, HTTP/1.1 and HTTP/2.

use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use http::Request;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use jiff::Timestamp;
use rustls::ServerConfig;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    REQUEST_TIMEOUT, Server, StartError,
    audit::Peer,
    auth::UserInfo,
    pki::Pair,
    tls::{self, ClientAuthorities, ServingCertificate, server_config},
};

/// How many connections are served at a time.
const CONNECTIONS: usize = 10_000;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long an HTTP/1.1 client may think before its next request: as long as upstream, since clients keep connections.
const IDLE: Duration = Duration::from_secs(90);
/// How long connections have to end when the server stops, if no request is being answered any more.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the last answers may take to be sent.
const FLUSH: Duration = Duration::from_secs(1);

/// A TLS configuration that stays as it is: our certificate, and clients known by those that the authority signed.
pub fn tls(pair: &Pair, ca_pem: &str) -> Result<ServerConfig, StartError> {
    let config = ServingCertificate::new(pair)
        .and_then(|certificate| server_config(certificate, ClientAuthorities::new(ca_pem)?, &["h2", "http/1.1"]));
    config.map_err(|e| StartError::Key(e.to_string()))
}

/// Serves until `stop`; then lets requests end and closes what is left.
pub fn serve(
    server: Arc<Server>,
    listener: TcpListener,
    tls: ServerConfig,
    stop: CancellationToken,
) -> BoxFuture<'static, ()> {
    Box::pin(accept(server, listener, tls, stop))
}

async fn accept(server: Arc<Server>, listener: TcpListener, tls: ServerConfig, stop: CancellationToken) {
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let connections = TaskTracker::new();
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
    http.http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(1000)
        // A peer that is gone is noticed.
        .keep_alive_interval(Some(Duration::from_secs(30)))
        .keep_alive_timeout(Duration::from_secs(15))
        // Large lists flow without waiting for the client at every 64 KiB, small watchers hold little.
        .initial_stream_window_size(256 << 10)
        .max_send_buf_size(256 << 10);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        let (stream, from) = match accepted {
            // Who comes by IPv4 to a socket of both families has an address of IPv4.
            Ok((stream, peer)) => (stream, Peer(peer.ip().to_canonical())),
            Err(error) => {
                // Too many open files: give up the processor until some are closed.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(limit = CONNECTIONS, "a connection was refused: too many are open");
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (acceptor, server, http) = (acceptor.clone(), server.clone(), http.clone());
        // Tells this client to come again, with its next request, on another connection.
        let leave = stop.child_token();
        connections.spawn(async move {
            let _slot = slot;
            let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a TLS handshake failed");
                    return;
                }
                Err(_) => return,
            };
            let peer = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            let user = peer.and_then(|der| UserInfo::from_certificate(der));
            // A certificate whose end cannot be read has none that could be kept.
            let life = peer.map_or(Duration::MAX, |der| tls::life(der, Timestamp::now()).unwrap_or_default());
            // A session can be resumed with a certificate that has ended since.
            if life.is_zero() {
                return;
            }
            let chance = server.config.goaway_chance;
            let go = leave.clone();
            let service = service_fn(move |mut request: Request<Incoming>| {
                let (server, user) = (server.clone(), user.clone());
                if chance > 0.0 && request.version() == http::Version::HTTP_2 && rand::random_bool(chance.min(1.0)) {
                    go.cancel();
                }
                request.extensions_mut().insert(from);
                async move { Ok::<_, Infallible>(server.handle(request, user).await) }
            });
            let connection = http.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
            let mut connection = pin!(connection);
            let served = async {
                tokio::select! {
                    result = connection.as_mut() => return result,
                    () = leave.cancelled() => connection.as_mut().graceful_shutdown(),
                }
                connection.await
            };
            // Who somebody is was proved by their certificate, so it ends with it; whoever has a new one comes again.
            match tokio::time::timeout(life, served).await {
                Ok(Err(error)) => tracing::debug!(error, "a connection ended"),
                Ok(Ok(())) => {}
                Err(_) => tracing::info!("a connection was closed: the certificate of its client has ended"),
            }
        });
    }
    drop(listener);
    // Watches end by themselves when the server stops; clients are told to go. Requests that are being answered are answered.
    connections.close();
    let mut ended = pin!(connections.wait());
    if tokio::time::timeout(DRAIN, ended.as_mut()).await.is_ok() {
        return;
    }
    server.requests.close();
    let answered = async {
        let _ = tokio::time::timeout(REQUEST_TIMEOUT, server.requests.wait()).await;
        tokio::time::sleep(FLUSH).await;
    };
    tokio::select! {
        () = ended => {}
        () = answered => tracing::info!(open = connections.len(), "connections were still open and are closed"),
    }
}
