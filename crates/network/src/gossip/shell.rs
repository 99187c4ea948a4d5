//! The loop that gives the [`Core`] packets and time, and sends what it wants sent. It has a thread of its own: whatever
//! else the process is busy with, the gossip answers.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::{io::Interest, net::UdpSocket, sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Opinion, Shared,
    core::{Core, Effects, Event, Ignored, Thought},
    guard::Guard,
    id::Key,
    metrics::{Drops, Metrics},
    refused,
    roster::{Disk, Index, Roster},
    seal::{self, Keyring, Sealer},
};
use crate::verdict::Verdict;

/// So many packets are read before time is looked at again.
const BATCH: usize = 256;
/// No packet of ours is longer.
const LONGEST: usize = 2048;
/// How often it is kept which runs of others were heard.
const KEEP: Duration = Duration::from_secs(60);
/// The thread is given precedence, as far as the system allows: it needs little and is needed at once.
const NICE: i32 = -10;

/// What the loop works with.
pub struct Shell {
    shared: Arc<Shared>,
    socket: UdpSocket,
    disk: Disk,
    core: Core,
    sealer: Sealer,
    guard: Guard,
    index: Index,
    origin: Instant,
    session: u64,
    due: Duration,
    opinions: BTreeMap<String, Opinion>,
    changed: bool,
    metrics: Metrics,
}

/// Runs the loop on a thread of its own until `stop`, and says goodbye.
///
/// # Errors
/// If it cannot be started, or panics.
pub async fn run(shared: Arc<Shared>, stop: CancellationToken) -> anyhow::Result<()> {
    let (done, ended) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("gossip".into())
        .spawn(move || {
            let result = serve(shared, stop);
            let _ = done.send(result);
        })
        .context("no thread for the gossip")?;
    ended.await.context("the thread of the gossip has panicked")?
}

fn serve(shared: Arc<Shared>, stop: CancellationToken) -> anyhow::Result<()> {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "the gossip runs without precedence");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let mut shell = Shell::new(shared)?;
        shell.run(stop).await;
        shell.disk.keep_sessions(shell.session, &shell.guard.sessions())
    });
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

impl Shell {
    fn new(shared: Arc<Shared>) -> anyhow::Result<Shell> {
        let config = &shared.config;
        let socket = UdpSocket::from_std(shared.socket()?).context("the gossip's socket")?;
        let disk = Disk::new(&config.directory);
        let (session, former) = disk.begin(jiff::Timestamp::now())?;
        let key = Key::of(&config.name);
        let seed = ring_seed()?;
        Ok(Shell {
            socket,
            core: Core::new(key, session, config.times, seed),
            sealer: Sealer::new(key, session, disk.pair()?),
            guard: Guard::new(former),
            disk,
            index: Index::default(),
            origin: Instant::now(),
            session,
            due: Duration::ZERO,
            opinions: BTreeMap::new(),
            changed: true,
            metrics: Metrics::default(),
            shared,
        })
    }

    async fn run(&mut self, stop: CancellationToken) {
        let mut roster = self.shared.roster.subscribe();
        let mut keys = self.shared.keys.subscribe();
        self.take_keys(&mut keys);
        self.take_roster(&mut roster);
        let mut keep = Instant::now() + KEEP;
        loop {
            self.receive();
            for address in self.refusals() {
                let Some(key) = self.index.at.get(&plain(address.ip())).copied() else { continue };
                self.step(match address.port() {
                    refused::NOBODYS => Event::Pulse(key),
                    _ => Event::Refused(key),
                });
            }
            self.step(Event::Tick);
            self.publish();
            if Instant::now() >= keep {
                keep = Instant::now() + KEEP;
                let (disk, session, sessions) = (self.disk.clone(), self.session, self.guard.sessions());
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = disk.keep_sessions(session, &sessions) {
                        tracing::warn!("what the gossip has heard is not kept: {error:#}");
                    }
                });
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.shared.silent.cancelled() => return,
                changed = keys.changed() => match changed {
                    Ok(()) => self.take_keys(&mut keys),
                    Err(_) => break,
                },
                changed = roster.changed() => match changed {
                    Ok(()) => self.take_roster(&mut roster),
                    Err(_) => break,
                },
                _ = self.socket.ready(Interest::READABLE | Interest::ERROR) => {}
                () = tokio::time::sleep_until(self.origin + self.due) => {}
            }
        }
        let how = *self.shared.leaving.lock();
        self.step(Event::Leave(how));
        self.opinions.clear();
        self.changed = true;
        self.publish();
    }

    fn take_keys(&mut self, keys: &mut watch::Receiver<Keyring>) {
        self.sealer.set_keys(keys.borrow_and_update().clone());
    }

    fn take_roster(&mut self, roster: &mut watch::Receiver<Arc<Roster>>) {
        let index = Index::of(&roster.borrow_and_update().clone(), &self.shared.config.name);
        for (key, public) in &self.index.publics {
            if index.publics.get(key).is_some_and(|other| other != public) {
                self.guard.forget(*key);
            }
        }
        self.sealer.retain(&index.publics);
        let former = std::mem::replace(&mut self.index, index);
        let keys = self.index.keys.clone();
        self.step(Event::Roster(&keys));
        for (key, name) in &former.names {
            if !self.index.names.contains_key(key) {
                self.changed |= self.opinions.remove(name).is_some();
            }
        }
    }

    /// Reads what has come.
    fn receive(&mut self) {
        let mut buffer = [0; LONGEST];
        for _ in 0..BATCH {
            match self.socket.try_recv_from(&mut buffer) {
                Ok((length, from)) => {
                    self.metrics.received.0 += 1;
                    self.metrics.received.1 += length as u64;
                    if let Err(why) = self.open(&buffer[..length], from) {
                        *why(&mut self.metrics.dropped) += 1;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // What a packet of ours met with; the error queue says whose it was.
                Err(_) => {}
            }
        }
    }

    /// Which packets of ours were refused.
    fn refusals(&self) -> Vec<SocketAddr> {
        let take = || match refused::take(&self.socket) {
            none if none.is_empty() => Err(ErrorKind::WouldBlock.into()),
            some => Ok(some),
        };
        // The kernel is asked only after it has said that there is something.
        self.socket.try_io(Interest::ERROR, take).unwrap_or_default()
    }

    fn open(&mut self, packet: &[u8], source: SocketAddr) -> Result<(), Count> {
        // Cheap, and first: strangers cannot make us calculate.
        if !self.index.at.contains_key(&plain(source.ip())) {
            return Err(|d| &mut d.unknown_sender);
        }
        let opened = self.sealer.open(packet.to_vec(), &self.index.publics).map_err(|why| -> Count {
            match why {
                seal::Refused::Foreign => |d| &mut d.foreign,
                seal::Refused::UnknownKey => |d| &mut d.unknown_key,
                seal::Refused::UnknownSender => |d| &mut d.unknown_sender,
                seal::Refused::Forged => |d| &mut d.forged,
            }
        })?;
        if self.index.addresses.get(&opened.from) != Some(&plain(source.ip())) {
            return Err(|d| &mut d.wrong_address);
        }
        let now = self.origin.elapsed();
        if let Err(why) = self.guard.check(now, opened.from, opened.stamp) {
            self.metrics.dropped.refused(why);
            return Ok(());
        }
        match self.step(Event::Packet { from: opened.from, data: &opened.message }) {
            None => Ok(()),
            Some(Ignored::Malformed | Ignored::Misattributed) => Err(|d| &mut d.malformed),
            Some(Ignored::Unknown) => Err(|d| &mut d.about_unknown),
        }
    }

    fn step(&mut self, event: Event<'_>) -> Option<Ignored> {
        let effects = self.core.step(self.origin.elapsed(), event);
        let Effects { packets, pulses, changed, due, ignored } = effects;
        self.due = due;
        for (to, message) in packets {
            self.send(to, &message);
        }
        for of in pulses {
            if let Some(ip) = self.index.addresses.get(&of).copied() {
                self.put(&[], SocketAddr::new(ip, refused::NOBODYS));
            }
        }
        for (key, thought) in changed {
            self.think(key, thought);
        }
        ignored
    }

    fn send(&mut self, to: Key, message: &[u8]) {
        let Some(ip) = self.index.addresses.get(&to).copied() else { return };
        let sent = self.origin.elapsed().as_millis() as u64;
        // Without a key nothing can be said, until the API gives us one.
        let Ok(packet) = self.sealer.seal(to, sent, message, &self.index.publics) else { return };
        self.put(&packet, SocketAddr::new(ip, self.shared.config.address.port()));
    }

    fn put(&mut self, packet: &[u8], address: SocketAddr) {
        // The first error may be that of an earlier packet; then this one was not sent.
        for _ in 0..2 {
            if self.socket.try_send_to(packet, address).is_ok() {
                self.metrics.sent.0 += 1;
                self.metrics.sent.1 += packet.len() as u64;
                return;
            }
        }
        self.metrics.dropped.unsent += 1;
    }

    fn think(&mut self, key: Key, thought: Option<Thought>) {
        let Some(name) = self.index.names.get(&key) else { return };
        self.changed = true;
        let before = self.opinions.get(name).copied();
        let Some(Thought { verdict, accusers }) = thought else {
            self.opinions.remove(name);
            if let Some(before) = before {
                tracing::info!(node = name, was = ?before.verdict, "nothing is known of a machine");
            }
            return;
        };
        let since = before.filter(|b| b.verdict == verdict).map_or_else(Instant::now, |b| b.since);
        if before.is_none_or(|before| before.verdict != verdict) {
            match (verdict, before) {
                (Verdict::Dead, _) => tracing::warn!(node = name, accusers, "a machine is dead"),
                (Verdict::Suspect, _) => tracing::info!(node = name, accusers, "a machine does not answer"),
                (Verdict::Alive, Some(_)) => tracing::info!(node = name, "a machine answers again"),
                (Verdict::Alive, None) => tracing::debug!(node = name, "a machine answers"),
            }
        }
        self.opinions.insert(name.clone(), Opinion { verdict, accusers, since });
    }

    fn publish(&mut self) {
        let (members, dead) = (self.core.members(), self.opinions.values().filter(|o| o.verdict == Verdict::Dead));
        self.metrics.dead = dead.count();
        self.metrics.members = members;
        self.metrics.stretch = self.core.stretch();
        self.metrics.protocol.clone_from(self.core.counters());
        self.shared.metrics.lock().clone_from(&self.metrics);
        if !std::mem::take(&mut self.changed) {
            return;
        }
        let verdicts: BTreeMap<String, Verdict> = self.opinions.iter().map(|(n, o)| (n.clone(), o.verdict)).collect();
        self.shared.opinions.send_replace(Arc::new(self.opinions.clone()));
        self.shared.verdicts.send_if_modified(|known| {
            let differs = **known != verdicts;
            if differs {
                *known = Arc::new(verdicts);
            }
            differs
        });
    }
}

/// Which counter a dropped packet belongs to.
type Count = fn(&mut Drops) -> &mut u64;

/// An address of IPv4 that came in a socket of IPv6.
fn plain(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    }
}

fn ring_seed() -> anyhow::Result<u64> {
    use ring::rand::SecureRandom as _;
    let mut bytes = [0; 8];
    let filled = ring::rand::SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| anyhow::anyhow!("the system has no randomness"))?;
    Ok(u64::from_be_bytes(bytes))
}
