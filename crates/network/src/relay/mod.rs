//! The relay: connections to a Service are taken on the node, and an endpoint that does not answer is not waited for.
//!
//! With the rules alone the kernel picks an endpoint for a connection; if that one does not answer, the connection fails.
//! The relay takes the connection itself and tries one endpoint after the other. What pods and the world send is handed to
//! it by TPROXY: the rule that does so only matches while the relay listens, so if this process is gone the other rules
//! serve, without anybody having to change anything. What this machine's own processes send is redirected, which has no
//! such way out: their connections are refused for as long as the process is gone.
//!
//! The proxy ([`crate::proxy`]) decides what is relayed ([`table`]) and sets up the rules once the relay listens.

pub mod attempt;
pub mod carry;
pub mod choice;
pub mod header;
pub mod kernel;
mod source;
pub mod table;

use std::{
    collections::HashMap,
    fmt::Write as _,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use parking_lot::Mutex;
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    proxy::family::Family,
    verdict::{self, Verdict},
};
use carry::{End, Means, finished, fragile};
use choice::Affinities;
use table::{Backend, Table};

/// How the relay works.
#[derive(Clone, Debug)]
pub struct Config {
    /// The port on 127.0.0.1 and ::1 that connections are handed to.
    pub port: u16,
    /// How long an endpoint has before the next one is tried as well.
    pub attempt_delay: Duration,
    /// How long a connection is tried to be made, on all endpoints together.
    pub connect_timeout: Duration,
    /// How long a connection may be silent.
    pub idle_timeout: Duration,
    /// How many connections there may be; more are reset.
    pub max_connections: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            port: 6445,
            attempt_delay: Duration::from_millis(150),
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(24 * 3600),
            max_connections: most_connections(),
        }
    }
}

/// As many as there are files for: two for each, two more for some, and a reserve for everything else.
fn most_connections() -> usize {
    use nix::sys::resource::{Resource, getrlimit};
    let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft).min(1 << 20);
    (files as usize / 4).max(64)
}

/// A client that is gone without a word is found out after about this.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// An endpoint that did not answer in time is tried last for so long, or until it answers.
const DOUBT: Duration = Duration::from_secs(2);
/// So many clients with an endpoint of their own are remembered.
const AFFINITIES: usize = 100_000;
/// Connections that wait to be taken.
const BACKLOG: i32 = 4096;

/// What the proxy holds of the relay.
#[derive(Clone, Debug)]
pub struct ForProxy {
    /// What is to be relayed.
    pub tables: watch::Sender<Arc<Table>>,
    /// Where the relay listens, while it does.
    pub listens: watch::Receiver<Option<Listens>>,
    /// Whether Services are relayed that do not say.
    pub default: bool,
}

/// What the relay holds of the proxy.
#[derive(Clone, Debug)]
pub struct ForRelay {
    /// What is to be relayed.
    pub tables: watch::Receiver<Arc<Table>>,
    /// Where it listens.
    pub listens: watch::Sender<Option<Listens>>,
}

/// Where a relay listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listens {
    /// The port.
    pub port: u16,
    /// Whether on ::1 as well: not every machine has IPv6.
    pub six: bool,
}

impl Listens {
    /// The families of the connections that it takes.
    pub fn families(self) -> impl Iterator<Item = Family> {
        Family::ALL.into_iter().filter(move |family| *family == Family::V4 || self.six)
    }

    /// The address in a family.
    pub const fn on(self, family: Family) -> SocketAddr {
        SocketAddr::new(family.pick([IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]), self.port)
    }
}

/// The two ends. `default` is for Services that do not say.
pub fn link(default: bool) -> (ForProxy, ForRelay) {
    let (tables, table) = watch::channel(Arc::default());
    let (told, listens) = watch::channel(None);
    (ForProxy { tables, listens, default }, ForRelay { tables: table, listens: told })
}

/// Counted since the start.
#[derive(Default)]
pub struct Counters {
    accepted: AtomicU64,
    open: AtomicU64,
    retried: AtomicU64,
    attempts_failed: AtomicU64,
    failed: AtomicU64,
    full: AtomicU64,
    unknown: AtomicU64,
    broken: AtomicU64,
    idle: AtomicU64,
    dead: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// The relay. Clones are the same one.
#[derive(Clone)]
pub struct Relay {
    shared: Arc<Shared>,
}

struct Shared {
    config: Config,
    link: ForRelay,
    verdicts: verdict::Receiver,
    means: Means,
    counters: Counters,
    affinities: Mutex<Affinities>,
    /// Endpoints that did not answer in time, and until when that counts.
    doubts: Mutex<HashMap<SocketAddr, Instant>>,
    /// By machine: cancelled when it is dead.
    machines: Mutex<HashMap<String, CancellationToken>>,
}

impl Relay {
    /// One that does not run yet.
    pub fn new(config: Config, link: ForRelay, verdicts: verdict::Receiver) -> Relay {
        let shared = Shared {
            config,
            link,
            verdicts,
            means: Means::default(),
            counters: Counters::default(),
            affinities: Mutex::new(Affinities::new(AFFINITIES)),
            doubts: Mutex::default(),
            machines: Mutex::default(),
        };
        Relay { shared: Arc::new(shared) }
    }

    /// Runs it until `stop`; connections that are open then are reset.
    ///
    /// # Errors
    /// If the port is taken, or the kernel cannot hand connections over.
    pub async fn run(&self, stop: CancellationToken) -> anyhow::Result<()> {
        kernel::prepare(Family::V4).await?;
        let mut listens = Listens { port: self.shared.config.port, six: false };
        let listener = listen(listens.on(Family::V4)).with_context(|| {
            let port = listens.port;
            format!("the relay cannot listen on 127.0.0.1:{port}: choose another port with --relay-port")
        })?;
        listens.port = listener.local_addr()?.port();
        let six = self.six(listens).await;
        listens.six = six.is_some();
        self.shared.link.listens.send_replace(Some(listens));
        let _guard = Told(&self.shared.link.listens);
        let mut verdicts = self.shared.verdicts.clone();
        verdicts.mark_changed();
        let mut deaf = false;
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = connections.join_next() => {}
                changed = verdicts.changed(), if !deaf => {
                    deaf = changed.is_err();
                    self.shared.judge(&verdicts.borrow_and_update().clone());
                }
                accepted = accept(&listener, six.as_ref()) => match accepted {
                    Ok((client, from)) => {
                        Counters::add(&self.shared.counters.accepted);
                        // Dropped from here on it is reset; a client that is told so connects anew at once.
                        fragile(&client);
                        if connections.len() >= self.shared.config.max_connections {
                            Counters::add(&self.shared.counters.full);
                        } else {
                            let shared = self.shared.clone();
                            connections.spawn(async move { shared.serve(client, from, listens).await });
                        }
                    }
                    // Out of files, most likely: do not spin.
                    Err(error) => {
                        tracing::warn!("the relay cannot accept: {error}");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            }
        }
        connections.shutdown().await;
        Ok(())
    }

    /// Listens for IPv6, if this machine has it. What it does not take is served by the rules.
    async fn six(&self, listens: Listens) -> Option<TcpListener> {
        let listening = async {
            kernel::prepare(Family::V6).await?;
            let to = listens.on(Family::V6);
            listen(to).with_context(|| format!("listen on {to}"))
        };
        match listening.await {
            Ok(listener) => Some(listener),
            Err(error) => {
                tracing::warn!("the relay takes no connections of IPv6: {error:#}");
                None
            }
        }
    }

    /// The counters, for Prometheus.
    pub fn render(&self) -> String {
        let (counters, carried) = (&self.shared.counters, &self.shared.means.carried);
        let mut out = String::new();
        for (name, kind, help, value) in [
            ("connections_total", "counter", "Connections that were taken.", &counters.accepted),
            ("connections_open", "gauge", "Connections that are carried.", &counters.open),
            ("retried_total", "counter", "Connections for which more than one endpoint was tried.", &counters.retried),
            (
                "attempts_failed_total",
                "counter",
                "Endpoints that refused or could not be reached.",
                &counters.attempts_failed,
            ),
            ("failed_total", "counter", "Connections for which no endpoint was reached.", &counters.failed),
            ("rejected_total", "counter", "Connections that were reset since there were too many.", &counters.full),
            ("unknown_total", "counter", "Connections to an address that is not relayed.", &counters.unknown),
            ("broken_total", "counter", "Connections that a side broke off.", &counters.broken),
            ("idle_total", "counter", "Connections that were silent for too long.", &counters.idle),
            ("dead_total", "counter", "Connections that were reset since a machine died.", &counters.dead),
            ("bytes_up_total", "counter", "Bytes from clients.", &carried.up),
            ("bytes_down_total", "counter", "Bytes to clients.", &carried.down),
            ("bytes_spliced_total", "counter", "Bytes that did not pass through this process.", &carried.spliced),
        ] {
            let value = value.load(Ordering::Relaxed);
            let _ = writeln!(
                out,
                "# HELP seawall_relay_{name} {help}\n# TYPE seawall_relay_{name} {kind}\nseawall_relay_{name} {value}"
            );
        }
        out
    }
}

/// Nobody listens any more when this is dropped.
struct Told<'a>(&'a watch::Sender<Option<Listens>>);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

fn listen(on: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(on), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    // It takes connections to addresses that are not ours.
    source::transparent(&socket, Family::of(on.ip()))?;
    socket.set_nonblocking(true)?;
    socket.bind(&on.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// The next connection, of either family.
async fn accept(four: &TcpListener, six: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match six {
        None => four.accept().await,
        Some(six) => tokio::select! {
            accepted = four.accept() => accepted,
            accepted = six.accept() => accepted,
        },
    }
}

/// One more open connection; one less when dropped.
struct Open<'a>(&'a AtomicU64);

impl<'a> Open<'a> {
    fn new(counter: &'a AtomicU64) -> Open<'a> {
        Counters::add(counter);
        Open(counter)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// Acts on what is thought of the machines: what is carried to a dead one ends.
    fn judge(&self, verdicts: &verdict::Verdicts) {
        // Our own guesses count for nothing beside that.
        self.doubts.lock().clear();
        let mut machines = self.machines.lock();
        machines.retain(|name, alive| {
            let dead = verdicts.get(name) == Some(&Verdict::Dead);
            if dead {
                alive.cancel();
            }
            // Who lives again begins anew.
            !alive.is_cancelled()
        });
    }

    fn alive(&self, backend: &Backend) -> CancellationToken {
        match &backend.node {
            Some(node) if !backend.local => self.machines.lock().entry(node.clone()).or_default().clone(),
            _ => CancellationToken::new(),
        }
    }

    async fn serve(&self, client: TcpStream, from: SocketAddr, listens: Listens) {
        let Some(to) = destination(&client, listens) else {
            return Counters::add(&self.counters.unknown);
        };
        let table = self.link.tables.borrow().clone();
        let Some((door, route)) = table.find(to).cloned() else {
            return Counters::add(&self.counters.unknown);
        };
        let scope = choice::scope(door, from.ip(), &table);
        let sticky = route
            .affinity
            .and_then(|lasts| self.affinities.lock().get(Instant::now(), &route.service, from.ip(), lasts));
        let mut order = choice::order(&route, scope, sticky, random);
        self.sort_out(&mut order);
        let reached = attempt::reach(order.len(), self.config.attempt_delay, self.config.connect_timeout, |number| {
            let backend = &order[number];
            let source = choice::in_clients_name(door, from.ip(), backend, &table).then_some(from.ip());
            self.connect(backend, source)
        })
        .await;
        if reached.tried > 1 {
            Counters::add(&self.counters.retried);
        }
        let Some((number, (mut backend, alive))) = reached.found else {
            Counters::add(&self.counters.failed);
            tracing::debug!(service = route.service, tried = reached.tried, error = ?reached.error, "no endpoint was reached");
            return;
        };
        fragile(&backend);
        if route.affinity.is_some() {
            let chosen = order[number].address;
            self.affinities.lock().put(Instant::now(), &route.service, from.ip(), chosen);
        }
        let _open = Open::new(&self.counters.open);
        tune(&client);
        tune(&backend);
        let carry = async {
            if route.proxy_protocol {
                backend.write_all(&header::header(from, to)).await?;
            }
            carry::both(&client, &backend, &self.means.pipes, &self.means.carried, self.config.idle_timeout).await
        };
        let counter = tokio::select! {
            end = carry => match end {
                Ok(End::Clean) => {
                    finished(&client);
                    return finished(&backend);
                }
                Ok(End::Idle) => &self.counters.idle,
                Err(_) => &self.counters.broken,
            },
            () = alive.cancelled() => &self.counters.dead,
        };
        Counters::add(counter);
    }

    /// The rules' view of the machines may be some milliseconds behind: the dead are left out, and whoever did not answer
    /// just now comes last.
    fn sort_out(&self, order: &mut Vec<Backend>) {
        let verdicts = self.verdicts.borrow().clone();
        order.retain(|b| b.local || b.node.as_ref().is_none_or(|node| verdicts.get(node) != Some(&Verdict::Dead)));
        let mut doubts = self.doubts.lock();
        if !doubts.is_empty() {
            let now = Instant::now();
            doubts.retain(|_, until| *until > now);
            order.sort_by_key(|b| doubts.contains_key(&b.address));
        }
    }

    async fn connect(&self, backend: &Backend, source: Option<IpAddr>) -> io::Result<(TcpStream, CancellationToken)> {
        let alive = self.alive(backend);
        let connecting = async {
            match source {
                Some(source) => source::connect(source, backend.address).await,
                None => source::socket(backend.address)?.connect(backend.address).await,
            }
        };
        let doubt = || {
            self.doubts.lock().insert(backend.address, Instant::now() + DOUBT);
        };
        let result = {
            let mut connecting = std::pin::pin!(async {
                tokio::select! {
                    result = connecting => result,
                    // It died while we were at it.
                    () = alive.cancelled() => Err(io::ErrorKind::HostUnreachable.into()),
                }
            });
            match timeout(self.config.attempt_delay, &mut connecting).await {
                Ok(result) => result,
                Err(_) => {
                    doubt();
                    connecting.await
                }
            }
        };
        match result {
            Ok(stream) => {
                self.doubts.lock().remove(&backend.address);
                Ok((stream, alive))
            }
            Err(error) => {
                Counters::add(&self.counters.attempts_failed);
                doubt();
                Err(error)
            }
        }
    }
}

/// Where the client wanted to go.
fn destination(client: &TcpStream, listens: Listens) -> Option<SocketAddr> {
    // What else stands in an address of IPv6 (its flow label) is nobody's name.
    let plain = |address: SocketAddr| SocketAddr::new(address.ip(), address.port());
    let local = plain(client.local_addr().ok()?);
    // Handed over by TPROXY it is the socket's own address.
    if !(local.ip().is_loopback() && local.port() == listens.port) {
        return Some(local);
    }
    // Redirected, or somebody came here on purpose.
    let socket = SockRef::from(client);
    let to = match Family::of(local.ip()) {
        Family::V4 => socket.original_dst_v4(),
        Family::V6 => socket.original_dst_v6(),
    };
    let to = plain(to.ok()?.as_socket()?);
    (to != local).then_some(to)
}

fn tune(stream: &TcpStream) {
    // Small messages go out at once: the two ends have their own ideas of what to collect.
    let _ = stream.set_nodelay(true);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 4).with_retries(4);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

/// A number below `below`.
fn random(below: usize) -> usize {
    use std::{
        cell::Cell,
        hash::{BuildHasher as _, RandomState},
    };
    thread_local! {
        static STATE: Cell<u64> = Cell::new(RandomState::new().hash_one(0) | 1);
    }
    // Marsaglia's xorshift: quick, and good enough to share out connections.
    let next = STATE.with(|state| {
        let mut x = state.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        state.set(x);
        x
    });
    (next % below.max(1) as u64) as usize
}
