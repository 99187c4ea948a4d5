//! Which server a new connection goes to, and which connections have no future. Pure: time, answers and lists come in,
//! an order and a few effects come out.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

/// A point of monotonic time: how long since some instant that the caller chose.
pub type Instant = Duration;

/// How many servers that are no longer listed are remembered: an endpoint that left may have been the only one that
/// lives by the time that this machine starts again.
pub const FORMER: usize = 8;
/// One that is not listed and has been dead for this long is forgotten.
const FORGET: Duration = Duration::from_secs(24 * 3600);
/// After this long, a dead server is asked less often.
const LONG_DEAD: Duration = Duration::from_secs(10);

/// What does not change.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This node: among servers that are equally good, each node has an order of its own, so that they share the load.
    pub node: String,
    /// The server on this machine, if there is one.
    pub local: Option<SocketAddr>,
    /// How many questions in a row a server may leave unanswered before it counts as dead.
    pub misses: u32,
    /// How long a server that was dead or unready has to be ready before it is preferred to others again.
    pub settle: Duration,
    /// How often a server is asked.
    pub interval: Duration,
}

/// What is known of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    /// It was not asked yet.
    Unknown,
    /// It serves.
    Ready,
    /// It lives, and says that it does not serve (now, or any more).
    Unready,
    /// It does not answer.
    Dead,
}

/// What came of asking a server, or of connecting to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is ready.
    Ready,
    /// It answered something else.
    Unready,
    /// Nobody listens there: refused, reset, unreachable.
    Refused,
    /// Nothing came back in time.
    Silent,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// These are the servers, from now on.
    Listed(Vec<SocketAddr>),
    /// A server was asked, or connected to, at a time, with this result.
    Answered {
        /// Which one.
        server: SocketAddr,
        /// When it was asked; answers may overtake each other.
        asked: Instant,
        /// The result.
        answer: Answer,
    },
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Close every connection to this server: nothing will come from it.
    Close(SocketAddr),
    /// Its health changed; for the log.
    Turned {
        /// Which one.
        server: SocketAddr,
        /// What it was.
        from: Health,
        /// What it is.
        to: Health,
    },
}

#[derive(Clone, Debug)]
struct Server {
    listed: bool,
    health: Health,
    /// Since when.
    since: Instant,
    /// When the question was asked that was answered last.
    answered: Option<Instant>,
    /// Questions since then without an answer.
    misses: u32,
    /// It was ready before it was anything else: there is nothing to settle.
    fresh: bool,
    /// Its connections have been closed since it turned.
    closed: bool,
    /// Counts down with every list that it is not on.
    left: u64,
}

/// The servers and what is known of them.
#[derive(Clone, Debug)]
pub struct Choice {
    settings: Settings,
    servers: BTreeMap<SocketAddr, Server>,
    lists: u64,
}

impl Choice {
    /// No server yet.
    pub fn new(settings: Settings) -> Choice {
        Choice { settings, servers: BTreeMap::new(), lists: 0 }
    }

    /// Takes an event.
    pub fn step(&mut self, now: Instant, event: Event) -> Vec<Effect> {
        match event {
            Event::Listed(list) => {
                self.listed(now, &list);
                Vec::new()
            }
            Event::Answered { server, asked, answer } => self.answered(now, server, asked, answer),
        }
    }

    fn listed(&mut self, now: Instant, list: &[SocketAddr]) {
        // Nothing is learned from an empty list.
        if list.is_empty() {
            return;
        }
        self.lists += 1;
        for server in list {
            let known = self.servers.entry(*server).or_insert(Server {
                listed: true,
                health: Health::Unknown,
                since: now,
                answered: None,
                misses: 0,
                fresh: true,
                closed: false,
                left: 0,
            });
            known.listed = true;
        }
        for (address, server) in &mut self.servers {
            if server.listed && !list.contains(address) {
                (server.listed, server.left) = (false, self.lists);
            }
        }
        self.servers.retain(|_, s| s.listed || s.health != Health::Dead || now.saturating_sub(s.since) < FORGET);
        let mut former: Vec<(u64, SocketAddr)> =
            self.servers.iter().filter(|(_, s)| !s.listed).map(|(a, s)| (s.left, *a)).collect();
        former.sort();
        for (_, oldest) in former.iter().rev().skip(FORMER) {
            self.servers.remove(oldest);
        }
    }

    fn answered(&mut self, now: Instant, address: SocketAddr, asked: Instant, answer: Answer) -> Vec<Effect> {
        let misses = self.settings.misses;
        let Some(server) = self.servers.get_mut(&address) else { return Vec::new() };
        // A later question has been answered: what became of this one says nothing new.
        if server.answered.is_some_and(|last| last > asked) {
            return Vec::new();
        }
        let to = match answer {
            Answer::Ready | Answer::Unready => {
                (server.answered, server.misses) = (Some(asked), 0);
                if answer == Answer::Ready { Health::Ready } else { Health::Unready }
            }
            Answer::Refused => {
                server.misses = misses;
                Health::Dead
            }
            Answer::Silent => {
                server.misses = (server.misses + 1).min(misses);
                if server.misses < misses { server.health } else { Health::Dead }
            }
        };
        let from = server.health;
        if from == to {
            return match to {
                Health::Dead => self.give_up(now, address, answer).into_iter().collect(),
                _ => self.shed(now, address),
            };
        }
        server.fresh = to == Health::Ready && from == Health::Unknown;
        (server.health, server.since, server.closed) = (to, now, false);
        let mut effects = vec![Effect::Turned { server: address, from, to }];
        if to == Health::Dead {
            effects.extend(self.give_up(now, address, answer));
        }
        if to == Health::Ready {
            // While none was ready, connections went wherever they were taken: also to a server that stands still, whose
            // kernel takes them and which never answers.
            let dead = self.servers.iter().filter(|(_, s)| s.health == Health::Dead);
            effects.extend(dead.map(|(address, _)| Effect::Close(*address)));
        }
        effects
    }

    /// The connections to a server that is silent are of no use where another may serve. The only one is perhaps just busy,
    /// and everybody who lost it would ask for everything anew: it is given some time.
    fn give_up(&mut self, now: Instant, address: SocketAddr, answer: Answer) -> Option<Effect> {
        let others = self.servers.iter().any(|(other, s)| *other != address && s.health != Health::Dead);
        let server = self.servers.get_mut(&address).filter(|server| !server.closed)?;
        let long = now.saturating_sub(server.since) >= self.settings.settle * 2;
        server.closed = others || long || answer == Answer::Refused;
        server.closed.then_some(Effect::Close(address))
    }

    /// A server that has not served for long, though it lives, has lost its store, and others have not: who is connected
    /// to it would be refused again and again without ever coming to another one. A server that shuts down has ended
    /// its connections by then.
    fn shed(&mut self, now: Instant, address: SocketAddr) -> Vec<Effect> {
        let settle = self.settings.settle;
        let others = self.servers.iter().any(|(other, s)| {
            *other != address && s.health == Health::Ready && s.listed && now.saturating_sub(s.since) >= settle
        });
        match self.servers.get_mut(&address) {
            Some(server)
                if others
                    && !server.closed
                    && server.health == Health::Unready
                    && now.saturating_sub(server.since) >= settle * 2 =>
            {
                server.closed = true;
                vec![Effect::Close(address)]
            }
            _ => Vec::new(),
        }
    }

    /// The servers in the order in which a new connection tries them. All are there: when none is ready, one that takes
    /// connections is better than nothing.
    pub fn order(&self, now: Instant) -> Vec<SocketAddr> {
        let mut order: Vec<_> = self
            .servers
            .iter()
            .map(|(address, server)| {
                let local = self.settings.local == Some(*address);
                (self.rank(now, server), !local, std::cmp::Reverse(weight(&self.settings.node, *address)), *address)
            })
            .collect();
        order.sort();
        order.into_iter().map(|(.., address)| address).collect()
    }

    fn rank(&self, now: Instant, server: &Server) -> u8 {
        let settled = server.fresh || now.saturating_sub(server.since) >= self.settings.settle;
        match (server.health, server.listed) {
            (Health::Ready, true) if server.misses == 0 && settled => 0,
            (Health::Ready, true) if server.misses == 0 => 1,
            // It did not answer just now; that may be all, or the beginning of the end.
            (Health::Ready, true) => 2,
            (Health::Ready, false) => 3,
            (Health::Unknown, true) => 4,
            (Health::Unready, true) => 5,
            (Health::Unknown | Health::Unready, false) => 6,
            (Health::Dead, true) => 7,
            (Health::Dead, false) => 8,
        }
    }

    /// How long to wait between two questions to a server; `None` if it is not known (any more).
    pub fn interval(&self, now: Instant, address: SocketAddr) -> Option<Duration> {
        let server = self.servers.get(&address)?;
        let long_dead = server.health == Health::Dead && now.saturating_sub(server.since) > LONG_DEAD;
        Some(match (long_dead, server.listed) {
            (false, _) => self.settings.interval,
            (true, true) => self.settings.interval * 3,
            (true, false) => self.settings.interval * 30,
        })
    }

    /// Everybody that is to be asked, with their health and whether they are listed.
    pub fn servers(&self) -> impl Iterator<Item = (SocketAddr, Health, bool)> {
        self.servers.iter().map(|(address, server)| (*address, server.health, server.listed))
    }

    /// Whether any server is ready.
    pub fn any_ready(&self) -> bool {
        self.servers.values().any(|s| s.health == Health::Ready)
    }
}

/// How much a node likes a server (rendezvous hashing): the loss of a server moves only what was on it.
fn weight(node: &str, server: SocketAddr) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in node.bytes().chain([0]).chain(server.to_string().bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    // FNV's last bytes barely reach the high bits; this spreads them (splitmix64's finish).
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}
