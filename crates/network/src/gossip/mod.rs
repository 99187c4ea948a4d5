//! Who lives: the machines find out by themselves, with or without a control plane.
//!
//! Every agent and every server is a member. [`core`] decides and has neither socket nor clock, so that the simulation
//! (`crates/sim`) runs thousands of it; [`shell`] gives it packets and time; [`seal`] and [`guard`] see to it that packets
//! are the members' own; [`cluster`] learns from the API who they are, and [`roster`] keeps that for when there is none.

pub mod cluster;
pub mod core;
pub mod guard;
pub mod id;
pub mod judge;
pub mod metrics;
pub mod refused;
pub mod roster;
pub mod seal;
pub mod shell;
pub mod wire;
pub mod word;

use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    path::PathBuf,
    sync::Arc,
};

use anyhow::Context as _;
use kube::Client;
use parking_lot::Mutex;
use socket2::{Domain, Socket, Type};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

pub use self::core::Leaving;
use self::{
    judge::Times,
    metrics::Metrics,
    roster::{Disk, Roster},
    seal::{Keyring, Public},
};
use crate::verdict::{self, Verdict, Verdicts};

/// The port of the gossip, as of others that gossip.
pub const PORT: u16 = 7946;
/// The kernel keeps so many bytes for us while we are busy: some thousand packets.
const RECEIVE_BUFFER: usize = 2 << 20;

/// How it is run.
#[derive(Clone, Debug)]
pub struct Config {
    /// The name of this machine's node.
    pub name: String,
    /// Where it listens: the address of the node, under which others know it. All members use the same port.
    pub address: SocketAddr,
    /// Where it keeps what it needs to start without the API.
    pub directory: PathBuf,
    /// The times.
    pub times: Times,
    /// Where it says who it is.
    pub publish: Publish,
}

/// Where a member says with which key it signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publish {
    /// In an annotation of its own Node.
    Node,
    /// In the Secret of the gossip: a server that is no node.
    Secret,
}

/// What is thought of a machine, and on how many members' word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opinion {
    /// The verdict.
    pub verdict: Verdict,
    /// How many members have found out for themselves that it does not answer.
    pub accusers: usize,
    /// Since when the verdict holds here.
    pub since: Instant,
}

/// By the name of the node, as [`Verdicts`].
pub type Opinions = Arc<BTreeMap<String, Opinion>>;

/// What the loop, the API's part and the users of a [`Gossip`] have in common.
pub struct Shared {
    config: Config,
    /// Kept when the loop ends, so that one that starts again has the same.
    socket: Mutex<Option<UdpSocket>>,
    public: Public,
    roster: watch::Sender<Arc<Roster>>,
    keys: watch::Sender<Keyring>,
    verdicts: watch::Sender<Verdicts>,
    opinions: watch::Sender<Opinions>,
    metrics: Mutex<Metrics>,
    leaving: Mutex<Leaving>,
    silent: CancellationToken,
}

/// A member of the gossip.
#[derive(Clone)]
pub struct Gossip {
    shared: Arc<Shared>,
}

impl Gossip {
    /// Reads what is on the disk. The port is taken when it runs.
    ///
    /// # Errors
    /// If the files cannot be read or written.
    pub fn open(config: Config) -> anyhow::Result<Gossip> {
        let disk = Disk::new(&config.directory);
        let shared = Shared {
            public: disk.pair()?.public(),
            roster: watch::channel(Arc::new(disk.members())).0,
            keys: watch::channel(disk.keys()).0,
            verdicts: watch::channel(Verdicts::default()).0,
            opinions: watch::channel(Opinions::default()).0,
            metrics: Mutex::default(),
            leaving: Mutex::new(Leaving::Process),
            silent: CancellationToken::new(),
            socket: Mutex::new(None),
            config,
        };
        Ok(Gossip { shared: Arc::new(shared) })
    }

    /// Runs until `stop`; then it says goodbye. What it knows of the cluster it learns through `client`.
    ///
    /// # Errors
    /// What kept it from running.
    pub async fn run(&self, client: Client, stop: CancellationToken) -> anyhow::Result<()> {
        // Each ends with the other; the loop needs a moment more to say goodbye.
        let ended = stop.child_token();
        let looped = async {
            let result = self.run_alone(ended.clone()).await;
            ended.cancel();
            result
        };
        let followed = async {
            let result = cluster::follow(self.shared.clone(), client, ended.clone()).await;
            ended.cancel();
            result
        };
        let (looped, followed) = tokio::join!(looped, followed);
        looped.and(followed)
    }

    /// The same, knowing only what [`Gossip::set_members`] and [`Gossip::set_keys`] say, or the disk.
    ///
    /// # Errors
    /// What kept it from running.
    pub async fn run_alone(&self, stop: CancellationToken) -> anyhow::Result<()> {
        shell::run(self.shared.clone(), stop).await
    }

    /// Sets the members by hand.
    pub fn set_members(&self, roster: Roster) {
        self.shared.roster.send_replace(Arc::new(roster));
    }

    /// Sets the keys by hand.
    pub fn set_keys(&self, ring: Keyring) {
        self.shared.keys.send_replace(ring);
    }

    /// The members, as they are known.
    pub fn members(&self) -> Roster {
        Roster::clone(&self.shared.roster.borrow())
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.shared.config.address
    }

    /// Says and hears nothing more, without a word, and keeps the port: what the others see of a machine that has lost
    /// its power. For tests and drills.
    pub fn fall_silent(&self) {
        self.shared.silent.cancel();
    }

    /// The keys in use.
    pub fn keys(&self) -> Keyring {
        self.shared.keys.borrow().clone()
    }

    /// What others check this member's signatures with.
    pub fn public(&self) -> Public {
        self.shared.public
    }

    /// Follows the verdicts. This machine is not among them.
    pub fn verdicts(&self) -> verdict::Receiver {
        self.shared.verdicts.subscribe()
    }

    /// Follows the opinions.
    pub fn opinions(&self) -> watch::Receiver<Opinions> {
        self.shared.opinions.subscribe()
    }

    /// What has been counted.
    pub fn metrics(&self) -> Metrics {
        self.shared.metrics.lock().clone()
    }

    /// What has been counted, as Prometheus reads it.
    pub fn render(&self) -> String {
        self.metrics().render()
    }

    /// When it stops, it will say that the machine ends, and not only its process: the others hold it for dead at once.
    pub fn machine_ends(&self) {
        *self.shared.leaving.lock() = Leaving::Machine;
    }
}

impl Shared {
    /// The socket. The address need not be this machine's yet.
    fn socket(&self) -> anyhow::Result<UdpSocket> {
        let mut held = self.socket.lock();
        let address = self.config.address;
        let socket = match held.take() {
            Some(socket) => socket,
            None => bind(address).with_context(|| {
                format!(
                    "the gossip cannot listen on udp {address} (--node-ip, --gossip-port): does another process run it?"
                )
            })?,
        };
        let other = socket.try_clone().context("the gossip's socket")?;
        *held = Some(socket);
        Ok(other)
    }
}

fn bind(address: SocketAddr) -> anyhow::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    match address.is_ipv6() {
        true => socket.set_freebind_v6(true)?,
        false => socket.set_freebind_v4(true)?,
    }
    socket.set_nonblocking(true)?;
    // As much of it as the system allows.
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.bind(&address.into())?;
    let socket = UdpSocket::from(socket);
    if let Err(error) = refused::listen(&socket) {
        tracing::warn!(%error, "a process that is gone will not be told from a machine that is");
    }
    Ok(socket)
}
