//! Servers with real TLS, to be balanced, killed and silenced.

use std::{
    convert::Infallible,
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, combinators::BoxBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use seawall_network::balancer::{Balancer, Config};
use tokio::{net::TcpStream, time::Instant};
use tokio_util::sync::CancellationToken;

pub struct Authority {
    pub pem: String,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    pub fn new() -> Authority {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { pem, issuer: rcgen::Issuer::new(params, key) }
    }

    fn acceptor(&self) -> tokio_rustls::TlsAcceptor {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["kubernetes".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
            .unwrap();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        tokio_rustls::TlsAcceptor::from(Arc::new(tls))
    }
}

/// A server that answers with its name, and with an endless body at `/watch`.
pub struct Server {
    pub name: String,
    pub address: SocketAddr,
    pub ready: Arc<AtomicBool>,
    life: CancellationToken,
}

impl Server {
    pub async fn start(authority: &Authority, name: &str, address: &str) -> Server {
        let listener = std::net::TcpListener::bind(address).unwrap_or_else(|e| panic!("{address}: {e}"));
        let server = Server::new(name, listener.local_addr().unwrap());
        tokio::spawn(server.serve(authority, listener));
        server
    }

    /// In a network namespace of its own: on a thread that has entered it.
    pub fn start_in(authority: &Authority, name: &str, namespace: &str, address: &str) -> Server {
        let server = Server::new(name, address.parse().unwrap());
        let (acceptor, life, ready) = (authority.acceptor(), server.life.clone(), server.ready.clone());
        let (name, address, namespace) = (server.name.clone(), server.address, namespace.to_owned());
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            enter(&namespace);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _inside = runtime.enter();
            let listener = std::net::TcpListener::bind(address).unwrap();
            tell.send(()).unwrap();
            runtime.block_on(serve(acceptor, listener, name, ready, life));
        });
        told.recv().expect("the server listens");
        server
    }

    fn new(name: &str, address: SocketAddr) -> Server {
        let ready = Arc::new(AtomicBool::new(true));
        Server { name: name.to_owned(), address, ready, life: CancellationToken::new() }
    }

    fn serve(&self, authority: &Authority, listener: std::net::TcpListener) -> impl Future<Output = ()> + use<> {
        serve(authority.acceptor(), listener, self.name.clone(), self.ready.clone(), self.life.clone())
    }

    pub fn ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::SeqCst);
    }

    /// Its sockets are closed, as when its process is killed.
    pub async fn kill(&self) {
        self.life.cancel();
        until("nobody listens any more", async || TcpStream::connect(self.address).await.is_err()).await;
    }

    /// Starts again where it was.
    pub async fn again(&mut self, authority: &Authority) {
        self.life = CancellationToken::new();
        let listener = std::net::TcpListener::bind(self.address).unwrap();
        tokio::spawn(self.serve(authority, listener));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.life.cancel();
    }
}

async fn serve(
    acceptor: tokio_rustls::TlsAcceptor,
    listener: std::net::TcpListener,
    name: String,
    ready: Arc<AtomicBool>,
    life: CancellationToken,
) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (stream, _) = tokio::select! {
            () = life.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted.unwrap(),
        };
        let (acceptor, name, ready) = (acceptor.clone(), name.clone(), ready.clone());
        connections.spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let answer = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let (name, ready) = (name.clone(), ready.load(Ordering::SeqCst));
                async move { Ok::<_, Infallible>(respond(request.uri().path(), name, ready)) }
            });
            let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            let _ = builder.serve_connection(TokioIo::new(stream), answer).await;
        });
    }
    drop(listener);
    connections.shutdown().await;
}

fn respond(path: &str, name: String, ready: bool) -> http::Response<BoxBody<Bytes, Infallible>> {
    let text = |status: u16, text: String| {
        http::Response::builder().status(status).body(Full::new(Bytes::from(text)).boxed()).unwrap()
    };
    match path {
        "/readyz" if ready => text(200, "ok".into()),
        "/readyz" => text(500, "shutting down".into()),
        "/watch" => {
            let first = futures::stream::iter([Ok::<_, Infallible>(hyper::body::Frame::data(Bytes::from(name)))]);
            let body = futures::StreamExt::chain(first, futures::stream::pending());
            http::Response::new(http_body_util::StreamBody::new(body).boxed())
        }
        path if path.starts_with("/bytes/") => text(200, "x".repeat(path["/bytes/".len()..].parse().unwrap())),
        _ => text(200, name),
    }
}

/// Moves the calling thread into a network namespace.
pub fn enter(namespace: &str) {
    let file = std::fs::File::open(format!("/run/netns/{namespace}")).unwrap_or_else(|e| panic!("{namespace}: {e}"));
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
}

pub fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().expect("sh runs");
    assert!(
        output.status.success(),
        "{script}: {} (root, iproute2 and nftables are needed)",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A bridge in a namespace, and machines on it: `10.9.0.1`, `10.9.0.2`, ... in namespaces `<prefix>-1`, `<prefix>-2`.
pub struct Lan {
    pub prefix: String,
    machines: u8,
}

impl Lan {
    pub fn new(machines: u8) -> Lan {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("swlan{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let lan = Lan { prefix, machines };
        let p = &lan.prefix;
        sh(&format!("ip netns add {p}-lan; ip -n {p}-lan link add br0 type bridge; ip -n {p}-lan link set br0 up"));
        for n in 1..=machines {
            sh(&format!(
                "ip netns add {p}-{n}; ip -n {p}-{n} link set lo up
                 ip -n {p}-lan link add v{n} type veth peer name eth0 netns {p}-{n}
                 ip -n {p}-lan link set v{n} master br0 up
                 ip -n {p}-{n} addr add 10.9.0.{n}/24 dev eth0; ip -n {p}-{n} link set eth0 up"
            ));
        }
        lan
    }

    pub fn namespace(&self, machine: u8) -> String {
        format!("{}-{machine}", self.prefix)
    }

    /// Pulls or plugs a machine's cable: nothing is said to anybody.
    pub fn cable(&self, machine: u8, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        sh(&format!("ip -n {}-lan link set v{machine} {state}", self.prefix));
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        let names = (1..=self.machines).map(|n| n.to_string()).chain(["lan".to_owned()]);
        for name in names {
            let _ = Command::new("ip").args(["netns", "del", &format!("{}-{name}", self.prefix)]).status();
        }
    }
}

/// A balancer that runs.
pub struct Running {
    pub balancer: Balancer,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Running {
    pub async fn start(authority: &Authority, servers: &[&Server], change: impl FnOnce(&mut Config)) -> Running {
        let mut config = Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            initial: servers.iter().map(|s| s.address).collect(),
            ca_pem: tokio::sync::watch::channel(authority.pem.clone()).1,
            ..Default::default()
        };
        change(&mut config);
        let balancer = Balancer::bind(config).await.unwrap();
        let stop = CancellationToken::new();
        let (runs, until) = (balancer.clone(), stop.clone());
        let task = tokio::spawn(async move { runs.run(until).await });
        Running { balancer, stop, task }
    }

    pub async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }

    /// How the balancer sees a server.
    pub fn health(&self, server: &Server) -> seawall_network::balancer::choice::Health {
        let metrics = self.balancer.metrics();
        metrics.servers.iter().find(|s| s.address == server.address).unwrap().health
    }

    /// Waits until it sees them so.
    pub async fn sees(&self, servers: &[&Server], health: seawall_network::balancer::choice::Health) {
        until(&format!("servers are {health:?}"), async || servers.iter().all(|s| self.health(s) == health)).await;
    }
}

fn connector(authority: &Authority) -> tokio_rustls::TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tokio_rustls::TlsConnector::from(Arc::new(tls))
}

/// A client's connection, TLS from end to end.
pub struct Client {
    sender: hyper::client::conn::http1::SendRequest<Empty<Bytes>>,
}

impl Client {
    pub async fn connect(authority: &Authority, address: SocketAddr) -> anyhow::Result<Client> {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("kubernetes").unwrap();
        let stream = connector(authority).connect(name, stream).await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Client { sender })
    }

    /// Asks for a path.
    pub async fn get(&mut self, path: &str) -> anyhow::Result<String> {
        let request = http::Request::get(path).header("host", "kubernetes").body(Empty::new())?;
        let body = self.sender.send_request(request).await?.into_body().collect().await?;
        Ok(String::from_utf8(body.to_bytes().to_vec())?)
    }

    /// Starts an endless answer: the server's name, and what ends it some time.
    pub async fn watch(mut self) -> anyhow::Result<(String, impl Future<Output = bool>)> {
        let request = http::Request::get("/watch").header("host", "kubernetes").body(Empty::new())?;
        let mut body = self.sender.send_request(request).await?.into_body();
        let first = body.frame().await.ok_or_else(|| anyhow::anyhow!("no answer"))??;
        let name = String::from_utf8(first.into_data().unwrap_or_default().to_vec())?;
        // True if it was broken off, not ended.
        let end = async move {
            let _sender = self.sender;
            matches!(body.frame().await, Some(Err(_)))
        };
        Ok((name, end))
    }
}

/// Who answers on a new connection.
pub async fn ask(authority: &Authority, address: SocketAddr) -> anyhow::Result<String> {
    Client::connect(authority, address).await?.get("/").await
}

pub async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
