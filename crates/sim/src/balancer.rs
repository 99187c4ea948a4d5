//! A node's balancer among servers that die, freeze, shut down and come back, on a network that loses and delays.
//!
//! What must hold:
//!
//! - **the dead are left**: when a server has been dead for longer than it takes to notice, no new connection tries it first
//!   while another one serves, and none that was open to it is left;
//! - **the living are not**: a server whose answers came in time keeps its connections;
//! - **there is always somebody**: every server that is listed is in the order.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use seawall_network::balancer::choice::{Answer, Choice, Effect, Event, Settings};
use seawall_quorum::timing::{Profile, Timing};

use crate::{Broken, clock::Clock};

/// What a run is like.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The times.
    pub profile: Profile,
    /// How many servers there are.
    pub servers: u8,
    /// How long it lasts.
    pub length: Duration,
    /// How many questions in a hundred are lost.
    pub loss: u32,
    /// Questions in a row that may be lost.
    pub misses: u32,
    /// Whether the balancer is told what became of its questions. If not, the run has to fail.
    pub told: bool,
}

impl Default for Setting {
    fn default() -> Setting {
        Setting { profile: Profile::Fast, servers: 3, length: Duration::from_secs(120), loss: 0, misses: 2, told: true }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Serves,
    /// Answers, and says no.
    Unready,
    /// Its kernel refuses.
    Refuses,
    /// Nothing comes back.
    Silent,
}

enum Happening {
    Ask(u8),
    /// What came of a question.
    Answer(u8, Duration, Answer),
    Change(u8),
    Connect,
}

struct Server {
    state: State,
    since: Duration,
    /// When a question to it last went unanswered.
    missed: Option<Duration>,
}

struct World {
    clock: Clock<Happening>,
    setting: Setting,
    timing: Timing,
    choice: Choice,
    servers: Vec<Server>,
    /// Open connections, and since when.
    open: BTreeMap<u8, Duration>,
    outcome: Outcome,
    trace: Vec<String>,
}

/// What a run was like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// New connections.
    pub connections: u64,
    /// Those that tried a server first that did not serve.
    pub astray: u64,
    /// How often a server's connections were closed.
    pub closed: u64,
}

fn at(server: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, server + 1], 6443))
}

fn of(address: SocketAddr) -> u8 {
    match address.ip() {
        std::net::IpAddr::V4(ip) => ip.octets()[3] - 1,
        std::net::IpAddr::V6(_) => unreachable!("all addresses here are of version 4"),
    }
}

/// Runs one balancer by seed.
///
/// # Errors
/// The invariant that did not hold, and what led to it.
pub fn run(seed: u64, setting: Setting) -> Result<Outcome, Broken> {
    let timing = Timing::of(setting.profile);
    let settings = Settings {
        node: format!("node-{seed}"),
        local: seed.is_multiple_of(2).then(|| at(0)),
        misses: setting.misses,
        settle: Duration::from_secs(1),
        interval: timing.probe_interval,
    };
    let mut world = World {
        clock: Clock::new(seed),
        setting,
        timing,
        choice: Choice::new(settings),
        servers: (0..setting.servers)
            .map(|_| Server { state: State::Serves, since: Duration::ZERO, missed: None })
            .collect(),
        open: BTreeMap::new(),
        outcome: Outcome::default(),
        trace: Vec::new(),
    };
    world.choice.step(Duration::ZERO, Event::Listed((0..setting.servers).map(at).collect()));
    for server in 0..setting.servers {
        world.clock.after(Duration::from_millis(u64::from(server)), Happening::Ask(server));
        let first = world.clock.between(2000, 20_000);
        world.clock.after(first, Happening::Change(server));
    }
    world.clock.after(Duration::from_millis(50), Happening::Connect);
    while let Some(happening) = world.clock.next(setting.length) {
        world.happen(happening)?;
    }
    Ok(world.outcome)
}

impl World {
    fn note(&mut self, words: String) {
        self.trace.push(format!("{:>9.3} s  {words}", self.clock.now().as_secs_f64()));
    }

    fn broken(&mut self, what: String) -> Broken {
        Broken { what, trace: std::mem::take(&mut self.trace) }
    }

    /// How long a death may go unnoticed: until the next question, and until that many are lost. One that has been dead
    /// for long is asked less often, so a return takes longer to see; that is no death.
    fn notice(&self) -> Duration {
        self.timing.probe_interval.mul_f64(1.1) * (self.setting.misses + 1) + self.timing.probe_timeout
    }

    fn happen(&mut self, happening: Happening) -> Result<(), Broken> {
        let now = self.clock.now();
        match happening {
            Happening::Ask(server) => {
                self.ask(server);
                let interval = self.choice.interval(now, at(server)).unwrap_or(self.timing.probe_interval);
                let jitter = self.clock.between(900, 1100).as_secs_f64();
                self.clock.after(interval.mul_f64(jitter), Happening::Ask(server));
            }
            Happening::Answer(server, asked, answer) => {
                if !self.setting.told && answer != Answer::Ready {
                    return Ok(());
                }
                if answer == Answer::Silent {
                    self.servers[usize::from(server)].missed = Some(now);
                }
                for effect in self.choice.step(now, Event::Answered { server: at(server), asked, answer }) {
                    self.note(format!("{effect:?}"));
                    if let Effect::Close(address) = effect {
                        self.closed(of(address))?;
                    }
                }
            }
            Happening::Change(server) => self.change(server),
            Happening::Connect => {
                self.connect()?;
                let pause = self.clock.between(10, 200);
                self.clock.after(pause, Happening::Connect);
            }
        }
        Ok(())
    }

    fn ask(&mut self, server: u8) {
        let asked = self.clock.now();
        let lost = self.clock.percent(self.setting.loss);
        let (after, answer) = match self.servers[usize::from(server)].state {
            _ if lost => (self.timing.probe_timeout, Answer::Silent),
            State::Silent => (self.timing.probe_timeout, Answer::Silent),
            State::Serves => (self.clock.between(0, 30), Answer::Ready),
            State::Unready => (self.clock.between(0, 30), Answer::Unready),
            State::Refuses => (self.clock.between(0, 3), Answer::Refused),
        };
        self.clock.after(after, Happening::Answer(server, asked, answer));
    }

    fn change(&mut self, server: u8) {
        let now = self.clock.now();
        let state = match (self.servers[usize::from(server)].state, self.clock.between(0, 2).as_millis()) {
            (State::Serves, 0) => State::Unready,
            (State::Serves, 1) => State::Refuses,
            (State::Serves, _) => State::Silent,
            _ => State::Serves,
        };
        self.note(format!("server {server}: {state:?}"));
        let known = &mut self.servers[usize::from(server)];
        (known.state, known.since) = (state, now);
        let pause = if state == State::Serves { (3000, 40_000) } else { (20, 20_000) };
        let pause = self.clock.between(pause.0, pause.1);
        self.clock.after(pause, Happening::Change(server));
    }

    fn closed(&mut self, server: u8) -> Result<(), Broken> {
        let now = self.clock.now();
        let known = &self.servers[usize::from(server)];
        self.outcome.closed += 1;
        let had = self.open.remove(&server).is_some();
        let recent = self.notice();
        let missed = known.missed.is_some_and(|at| now - at <= recent);
        if had && known.state == State::Serves && now - known.since > recent && !missed {
            return Err(self.broken(format!("server {server} serves and answers, and its connections were closed")));
        }
        Ok(())
    }

    fn connect(&mut self) -> Result<(), Broken> {
        let now = self.clock.now();
        let order = self.choice.order(now);
        if order.len() != usize::from(self.setting.servers) {
            return Err(self.broken(format!("not every server is in the order: {order:?}")));
        }
        self.outcome.connections += 1;
        let first = of(order[0]);
        let settled = |server: &Server| now - server.since > Duration::from_secs(2) + self.notice() * 4;
        let other = self.servers.iter().any(|s| s.state == State::Serves && settled(s));
        let known = &self.servers[usize::from(first)];
        if known.state != State::Serves {
            self.outcome.astray += 1;
            if other && now - known.since > self.notice() {
                let what =
                    format!("{:?} for {:?}, and server {first} is still tried first", known.state, now - known.since);
                return Err(self.broken(what));
            }
        }
        let stuck = self.open.iter().find(|(server, since)| {
            let known = &self.servers[usize::from(**server)];
            let gone = matches!(known.state, State::Silent | State::Refuses);
            // Connections that were made for want of a better one are closed when there is one.
            gone && other && now - known.since.max(**since) > self.notice() + Duration::from_secs(3)
        });
        if let Some((server, _)) = stuck {
            let what = format!("a connection to server {server} is left, which has been gone for long");
            return Err(self.broken(what));
        }
        if matches!(self.servers[usize::from(first)].state, State::Serves | State::Silent | State::Unready) {
            self.open.entry(first).or_insert(now);
        }
        Ok(())
    }
}
