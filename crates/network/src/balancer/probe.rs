//! Asking servers whether they are ready: `/readyz` over TLS, on one HTTP/2 connection per server that is kept.
//!
//! Questions do not wait for each other: the next one is asked in time even when the last one has not been answered, so
//! that a machine without power is found out within a few intervals. When the connection ends, the server is asked at
//! once.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::{
    net::TcpStream,
    sync::{Mutex, Notify},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::{
    Config, Counters, Shared,
    choice::{Answer, Health},
    pace::Pace,
};

/// How many questions to one server may be open.
const OPEN: usize = 8;
/// When our own clock strikes later than this, the machine was busy, and silence is no evidence yet.
const LATE: Duration = Duration::from_millis(30);

/// What is needed to ask.
pub struct Prober {
    tls: ArcSwap<ClientConfig>,
    name: ServerName<'static>,
}

impl Prober {
    pub fn new(config: &Config) -> anyhow::Result<Prober> {
        let name = ServerName::try_from(config.server_name.clone())
            .with_context(|| format!("the servers' name {:?}", config.server_name))?;
        Ok(Prober { tls: ArcSwap::from(trust(&config.ca_pem.borrow())?), name })
    }

    pub fn set_authorities(&self, ca_pem: &str) -> anyhow::Result<()> {
        self.tls.store(trust(ca_pem)?);
        Ok(())
    }
}

fn trust(ca_pem: &str) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
        roots.add(certificate.context("the cluster's authorities")?).context("the cluster's authorities")?;
    }
    anyhow::ensure!(!roots.is_empty(), "the cluster's authorities: there is no certificate in the PEM");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(tls))
}

/// Asks everybody who is known, until `stop`.
pub async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let mut known = shared.known.subscribe();
    let mut asking: std::collections::HashMap<SocketAddr, CancellationToken> = Default::default();
    let mut tasks = JoinSet::new();
    loop {
        let all = {
            let known = known.borrow_and_update();
            [&known.servers[..], &known.former].concat()
        };
        asking.retain(|server, stop| {
            let wanted = all.contains(server);
            if !wanted {
                stop.cancel();
            }
            wanted
        });
        for server in all {
            asking.entry(server).or_insert_with(|| {
                let stop = stop.child_token();
                let work = ask_on(Arc::clone(&shared), server);
                tasks.spawn(stop.clone().run_until_cancelled_owned(work));
                stop
            });
        }
        tokio::select! {
            changed = known.changed() => if changed.is_err() { break },
            () = stop.cancelled() => break,
            Some(ended) = tasks.join_next() => if let Err(panic) = ended {
                tracing::error!("asking a server failed: {panic}");
                break;
            },
        }
    }
    tasks.shutdown().await;
}

/// The connection to a server, once there is one.
struct Session {
    sender: Mutex<Option<SendRequest<Empty<Bytes>>>>,
    /// The connection has ended.
    ended: Arc<Notify>,
    pace: parking_lot::Mutex<Pace>,
}

/// Asks one server again and again.
async fn ask_on(shared: Arc<Shared>, server: SocketAddr) {
    let session = Arc::new(Session {
        sender: Mutex::default(),
        ended: Arc::default(),
        pace: parking_lot::Mutex::new(Pace::new(shared.config.probe_timeout)),
    });
    let mut questions = JoinSet::new();
    let mut due = Instant::now();
    let mut soonest = due;
    loop {
        tokio::select! {
            () = sleep_until(due) => {}
            () = session.ended.notified() => {
                // At once, but not in a circle if it hangs up on everybody.
                due = due.min(soonest.max(Instant::now()));
                continue;
            }
            Some(_) = questions.join_next() => continue,
        }
        let Some(interval) = shared.choice.lock().interval(shared.now(), server) else { return };
        // Not all nodes at the same moment.
        due = Instant::now() + interval.mul_f64(0.9 + 0.2 * jitter());
        soonest = Instant::now() + interval / 4;
        if questions.len() < OPEN {
            questions.spawn(ask(Arc::clone(&shared), Arc::clone(&session), server));
        }
    }
}

fn jitter() -> f64 {
    use std::hash::{BuildHasher, RandomState};
    (RandomState::new().hash_one(0) % 1024) as f64 / 1024.0
}

async fn ask(shared: Arc<Shared>, session: Arc<Session>, server: SocketAddr) {
    Counters::add(&shared.counters.probes);
    let dead = || shared.choice.lock().servers().any(|(s, h, _)| s == server && h == Health::Dead);
    let (asked, started) = (shared.now(), Instant::now());
    // Nothing is lost by being patient with a dead one: a whole handshake is needed to come back.
    let limit = if dead() { session.pace.lock().longest() } else { session.pace.lock().limit() };
    let silent = {
        // It may hold the session, and is dropped here.
        let mut question = std::pin::pin!(question(&shared, &session, server));
        let mut answer = timeout(limit, &mut question).await;
        if answer.is_err() && started.elapsed() > limit + LATE {
            // We did not get to look at what may have come long ago.
            answer = timeout(limit / 2, &mut question).await;
        }
        let silent = answer.is_err();
        if silent {
            shared.answered(server, asked, Answer::Silent);
            if !dead() {
                // An answer that is too late for this question still says what is usual.
                let rest = session.pace.lock().longest().saturating_sub(started.elapsed());
                answer = timeout(rest, &mut question).await;
            }
        }
        if let Ok(Ok(_)) = answer {
            session.pace.lock().answered(started.elapsed());
        }
        if let Ok(answer) = answer {
            shared.answered(server, asked, meaning(server, answer));
        }
        silent
    };
    if silent && dead() {
        // Its connection leads nowhere; the next question makes another.
        *session.sender.lock().await = None;
    }
}

fn meaning(server: SocketAddr, answer: Result<StatusCode, Failure>) -> Answer {
    match answer {
        Ok(StatusCode::OK) => Answer::Ready,
        Ok(status) => {
            tracing::debug!(%server, %status, "a server is not ready");
            Answer::Unready
        }
        Err(Failure::Stranger(error)) => {
            tracing::warn!(%server, "who answers there is no server of this cluster: {error}");
            Answer::Unready
        }
        Err(Failure::Gone(error)) => {
            tracing::debug!(%server, "a server does not answer: {error}");
            Answer::Refused
        }
    }
}

/// Why there was no answer.
enum Failure {
    /// Nobody listens there.
    Gone(io::Error),
    /// Somebody else does.
    Stranger(io::Error),
}

async fn question(shared: &Shared, session: &Session, server: SocketAddr) -> Result<StatusCode, Failure> {
    let mut tried = None;
    for _ in 0..2 {
        let sender = {
            let mut sender = session.sender.lock().await;
            match &*sender {
                Some(open) if !open.is_closed() => open.clone(),
                _ => sender.insert(connect(shared, session, server).await?).clone(),
            }
        };
        match send(shared, sender).await {
            Ok(status) => return Ok(status),
            // That a connection ends says little of the server: it may have been old. That a new one ends too does.
            Err(error) => tried = Some(error),
        }
    }
    Err(Failure::Gone(io::Error::other(tried.unwrap_or_else(|| anyhow::anyhow!("not asked")))))
}

async fn send(shared: &Shared, mut sender: SendRequest<Empty<Bytes>>) -> anyhow::Result<StatusCode> {
    let uri = format!("https://{}/readyz", shared.config.server_name);
    let request = Request::get(uri).header("user-agent", "seawall-balancer").body(Empty::new())?;
    sender.ready().await?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    // Read to its end: a stream that is given up counts against us at the server.
    let _ = Limited::new(response.into_body(), 64 << 10).collect().await;
    Ok(status)
}

async fn connect(shared: &Shared, session: &Session, server: SocketAddr) -> Result<SendRequest<Empty<Bytes>>, Failure> {
    let stream = TcpStream::connect(server).await.map_err(Failure::Gone)?;
    let _ = stream.set_nodelay(true);
    let prober = &shared.prober;
    let stream =
        TlsConnector::from(prober.tls.load_full()).connect(prober.name.clone(), stream).await.map_err(|error| {
            match error.kind() {
                io::ErrorKind::InvalidData => Failure::Stranger(error),
                _ => Failure::Gone(error),
            }
        })?;
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        return Err(Failure::Stranger(io::Error::other("it does not speak HTTP/2")));
    }
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(|error| Failure::Gone(io::Error::other(error)))?;
    let ended = Arc::clone(&session.ended);
    // Ends with its last sender, or with the server.
    tokio::spawn(async move {
        let _ = connection.await;
        ended.notify_one();
    });
    Ok(sender)
}
