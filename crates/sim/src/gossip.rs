//! Members of the gossip on a virtual network: thousands of them, and every kind of bad day.
//!
//! The very code that runs on machines ([`Core`]) runs here; only the sealing of packets is left out.
//!
//! Measured with `cargo run -p seawall-sim --example gossip`, profile `fast`, packets 0-2 ms under way, one run each.
//! Bytes are with IP, UDP and sealing, per member and second; deaths are 10 power cuts (3 of 5,000 members), from the cut
//! until others know.
//!
//! | | 100 members | 1,000 members | 5,000 members |
//! |---|---|---|---|
//! | packets, bytes at 0 % loss | 20.1, 4.07 kB | 20.0, 3.98 kB | 20.0, 3.98 kB |
//! | at 5 % loss | 21.8, 4.41 kB | 21.5, 4.28 kB | 21.5, 4.27 kB |
//! | false verdicts at 0, 1, 5 % loss | none in 30 s each | none in 5 s each | none in 5 s each |
//! | dead to a member: median, p99 | 612, 904 ms | 690, 840 ms | 694, 782 ms |
//! | dead to all: median, worst | 665, 942 ms | 753, 871 ms | 750, 811 ms |
//!
//! A fifth of the members in trouble, at 1 % loss; nobody else was called suspect or dead. "Back" is how long after the
//! end of the trouble all held all for alive.
//!
//! | members | starved (pauses up to 3 s): called dead | bytes | frozen for 1-30 s: called dead | bytes | back |
//! |---|---|---|---|---|---|
//! | 20, for 30 s | 0 of 4 | 25.2 kB | 4 of 4 | 8.4 kB | 1, 1 s |
//! | 30, for 30 s | 0 of 6 | 27.4 kB | 6 of 6 | 9.8 kB | 1, 2 s |
//! | 50, for 30 s | 0 of 10 | 32.0 kB | 10 of 10 | 12.1 kB | 4, 2 s |
//! | 100, for 30 s | 0 of 20 | 43.4 kB | 20 of 20 | 15.6 kB | 4, 3 s |
//! | 200, for 30 s | **1 of 40** | 69.7 kB | 39 of 40 | 23.2 kB | 5, 2 s |
//! | 500, for 10 s | | | 96 of 100 | 54.0 kB | 2 s |
//! | 1,000, for 10 s | **8 of 200** | 131.7 kB | 175 of 200 | 81.5 kB | 6, 3 s |
//! | 5,000, for 10 s | | | 361 of 1,000 | 123.3 kB | 6 s |
//!
//! What is said of many at once is heard by all, so its cost grows with their number, up to what may be told of one's own
//! accord: 60 packets a second, 82 kB, apart from probes and answers. With 200 of 1,000 starved that is reached, objections are
//! late, and some of the starved are called dead. Of 5,000, a second takes two minutes of CPU time, and 10 GB: they were not
//! starved.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use seawall_network::{
    gossip::{
        core::{Core, Event, Leaving},
        guard::STALE,
        id::{Id, Key},
        judge::Times,
        metrics::Counters,
    },
    verdict::Verdict,
};
use seawall_quorum::timing::{Profile, Timing};

use crate::clock::Clock;

/// What IP, UDP and the sealing add to a packet.
pub const OVERHEAD: usize = 28 + seawall_network::gossip::seal::OVERHEAD;
/// A socket's buffer holds so many packets while its owner is frozen.
const BUFFER: usize = 256;

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Setting {
    /// How many members there are.
    pub members: usize,
    /// Their times.
    pub profile: Profile,
    /// How many of a hundred packets are lost.
    pub loss: u32,
    /// How long a packet is under way, in milliseconds: at least and at most.
    pub latency: (u64, u64),
    /// Whether kernels answer for processes that do not.
    pub pulses: bool,
    /// Whether all know each other from the start, or learn it from the list of members.
    pub settled: bool,
}

impl Default for Setting {
    fn default() -> Setting {
        Setting { members: 5, profile: Profile::Fast, loss: 0, latency: (0, 2), pulses: true, settled: true }
    }
}

/// What can happen to a member.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// Its power is cut.
    Off(usize),
    /// It is started (again).
    On(usize),
    /// It gets no CPU time for this long. Packets wait.
    Freeze(usize, Duration),
    /// From now until then it gets CPU time only for instants, and waits for up to this long between them.
    Starve(usize, Duration, Duration),
    /// Its process is killed; the machine answers that nobody listens.
    Kill(usize),
    /// Its process ends in an orderly way.
    Leave(usize, Leaving),
    /// From now on nothing that the first sends reaches the second.
    Cut(usize, usize),
    /// From now on it does.
    Mend(usize, usize),
}

enum Happens {
    Tick(usize, u64),
    Arrive { to: usize, from: usize, sent: Duration, data: Vec<u8> },
    Refuse { to: usize, by: usize },
    Pulse { to: usize, of: usize },
    Thaw(usize, u64),
    Fault(Fault),
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    On,
    Frozen,
    Off,
    Killed,
}

struct Node {
    core: Core,
    state: State,
    /// Which life; what belongs to a former one is dropped.
    life: u64,
    inbox: Vec<(usize, Duration, Vec<u8>)>,
    due: Duration,
    /// How many bytes it has sent.
    sent: u64,
}

/// Somebody came to think something of somebody.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// When.
    pub at: Duration,
    /// Who.
    pub by: usize,
    /// Of whom.
    pub about: usize,
    /// What.
    pub verdict: Option<Verdict>,
    /// By how many members' word.
    pub accusers: usize,
}

/// A cluster under way.
pub struct World {
    /// The time and what is to come.
    clock: Clock<Happens>,
    setting: Setting,
    nodes: Vec<Node>,
    keys: BTreeMap<Key, usize>,
    roster: BTreeSet<Key>,
    cuts: BTreeSet<(usize, usize)>,
    thoughts: BTreeMap<(usize, usize), Option<Verdict>>,
    /// What has changed, apart from those who are found to be there.
    pub changes: Vec<Change>,
    /// Packets and bytes that were sent, questions to kernels included.
    pub traffic: (u64, u64),
    seed: u64,
}

fn key(index: usize) -> Key {
    Key::of(&format!("node-{index}"))
}

impl World {
    /// A cluster whose members have just been started.
    pub fn new(seed: u64, setting: Setting) -> World {
        let times = Times::of(&Timing::of(setting.profile));
        let keys: BTreeMap<Key, usize> = (0..setting.members).map(|index| (key(index), index)).collect();
        let core = |index: usize| Core::new(key(index), 1000, times, seed << 20 | index as u64);
        let nodes = (0..setting.members).map(|index| Node {
            core: core(index),
            state: State::On,
            life: 0,
            inbox: Vec::new(),
            due: Duration::MAX,
            sent: 0,
        });
        let mut world = World {
            clock: Clock::new(seed),
            nodes: nodes.collect(),
            roster: keys.keys().copied().collect(),
            keys,
            cuts: BTreeSet::new(),
            thoughts: BTreeMap::new(),
            changes: Vec::new(),
            traffic: (0, 0),
            seed,
            setting,
        };
        for index in 0..world.nodes.len() {
            // They are not started in step.
            let at = world.clock.between(0, 50);
            world.clock.at(at, Happens::Tick(index, 0));
        }
        world
    }

    /// The time.
    pub fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Plans something.
    pub fn plan(&mut self, at: Duration, fault: Fault) {
        self.clock.at(at, Happens::Fault(fault));
    }

    /// A number by chance.
    pub fn random(&mut self, below: usize) -> usize {
        (self.clock.between(0, 1_000_000).as_micros() as usize) % below.max(1)
    }

    /// From now on so many of a hundred packets are lost.
    pub fn lose(&mut self, percent: u32) {
        self.setting.loss = percent;
    }

    /// What a member has counted.
    pub fn counters(&self, index: usize) -> &Counters {
        self.nodes[index].core.counters()
    }

    /// How many bytes a member has sent, questions to kernels included.
    pub fn sent(&self, index: usize) -> u64 {
        self.nodes[index].sent
    }

    /// Twenty-five million times that somebody lives would say nothing.
    fn large(&self) -> bool {
        self.setting.members > 500
    }

    /// What one thinks of another.
    pub fn thought(&self, by: usize, about: usize) -> Option<Verdict> {
        self.thoughts.get(&(by, about)).copied().flatten()
    }

    /// Whether all that are on hold all that are on for alive.
    pub fn whole(&self) -> bool {
        let on: Vec<usize> = (0..self.nodes.len()).filter(|n| self.nodes[*n].state == State::On).collect();
        let both = |(by, about): &(usize, usize)| [by, about].iter().all(|n| self.nodes[**n].state == State::On);
        let alive = self.thoughts.iter().filter(|(pair, _)| both(pair)).all(|(_, v)| *v == Some(Verdict::Alive));
        alive && (self.large() || on.iter().all(|a| on.iter().all(|b| a == b || self.thought(*a, *b).is_some())))
    }

    /// Lets time pass.
    pub fn run(&mut self, until: Duration) {
        while let Some(next) = self.clock.next(until) {
            match next {
                Happens::Tick(index, life) => {
                    let now = self.clock.now();
                    let node = &mut self.nodes[index];
                    if node.life != life || node.state != State::On {
                        continue;
                    }
                    if node.due == Duration::MAX {
                        self.start(index);
                    } else if now >= node.due {
                        self.step(index, Event::Tick);
                    }
                }
                Happens::Arrive { to, from, sent, data } => self.arrive(to, from, sent, data),
                Happens::Refuse { to, by } if self.nodes[to].state == State::On => {
                    self.step(to, Event::Refused(key(by)));
                }
                Happens::Pulse { to, of } if self.nodes[to].state == State::On => {
                    self.step(to, Event::Pulse(key(of)));
                }
                Happens::Refuse { .. } | Happens::Pulse { .. } => {}
                Happens::Thaw(index, life) => {
                    let node = &mut self.nodes[index];
                    if node.life == life && node.state == State::Frozen {
                        node.state = State::On;
                        for (from, sent, data) in std::mem::take(&mut self.nodes[index].inbox) {
                            self.deliver(index, from, sent, &data);
                        }
                        self.step(index, Event::Tick);
                    }
                }
                Happens::Fault(fault) => self.fault(fault),
            }
        }
    }

    fn start(&mut self, index: usize) {
        let roster = self.roster.clone();
        self.nodes[index].due = Duration::ZERO;
        self.step(index, Event::Roster(&roster));
        if self.setting.settled && self.nodes[index].life == 0 {
            let lives: Vec<Id> = roster.iter().map(|key| Id { key: *key, born: 1000 }).collect();
            let now = self.clock.now();
            self.nodes[index].core.assume(now, lives.into_iter());
            self.step(index, Event::Tick);
        }
    }

    fn fault(&mut self, fault: Fault) {
        let now = self.clock.now();
        match fault {
            Fault::Off(index) | Fault::Kill(index) => {
                let node = &mut self.nodes[index];
                node.state = if matches!(fault, Fault::Off(_)) { State::Off } else { State::Killed };
                node.life += 1;
                node.inbox.clear();
                self.thoughts.retain(|(by, _), _| *by != index);
            }
            Fault::On(index) => {
                let times = Times::of(&Timing::of(self.setting.profile));
                let born = 1_000_000 + now.as_millis() as u64;
                let node = &mut self.nodes[index];
                node.life += 1;
                node.core = Core::new(key(index), born, times, self.seed << 20 | index as u64 | node.life << 50);
                node.state = State::On;
                node.due = Duration::MAX;
                self.clock.after(Duration::ZERO, Happens::Tick(index, self.nodes[index].life));
            }
            Fault::Freeze(index, length) => {
                let node = &mut self.nodes[index];
                if node.state == State::On {
                    node.state = State::Frozen;
                    let life = node.life;
                    self.clock.after(length, Happens::Thaw(index, life));
                }
            }
            Fault::Starve(index, most, until) => {
                if now < until && self.nodes[index].state == State::On {
                    let most = most.as_millis() as u64;
                    let (wait, instant) = (self.clock.between(1, most), self.clock.between(0, 10));
                    self.fault(Fault::Freeze(index, wait));
                    let again = Fault::Starve(index, Duration::from_millis(most), until);
                    self.clock.after(wait + instant, Happens::Fault(again));
                }
            }
            Fault::Leave(index, how) => {
                self.step(index, Event::Leave(how));
                self.fault(match how {
                    Leaving::Process => Fault::Kill(index),
                    Leaving::Machine => Fault::Off(index),
                });
            }
            Fault::Cut(from, to) => drop(self.cuts.insert((from, to))),
            Fault::Mend(from, to) => drop(self.cuts.remove(&(from, to))),
        }
    }

    fn arrive(&mut self, to: usize, from: usize, sent: Duration, data: Vec<u8>) {
        match self.nodes[to].state {
            State::On => self.deliver(to, from, sent, &data),
            State::Frozen => {
                let inbox = &mut self.nodes[to].inbox;
                if inbox.len() < BUFFER {
                    inbox.push((from, sent, data));
                }
            }
            State::Off => {}
            State::Killed => {
                let after = self.clock.between(self.setting.latency.0, self.setting.latency.1);
                self.clock.after(after, Happens::Refuse { to: from, by: to });
            }
        }
    }

    fn deliver(&mut self, to: usize, from: usize, sent: Duration, data: &[u8]) {
        if self.clock.now() - sent < STALE {
            self.step(to, Event::Packet { from: key(from), data });
        }
    }

    fn step(&mut self, index: usize, event: Event<'_>) {
        let now = self.clock.now();
        if self.nodes[index].due == Duration::MAX {
            return;
        }
        let effects = self.nodes[index].core.step(now, event);
        for (to, data) in effects.packets {
            let Some(to) = self.keys.get(&to).copied() else { continue };
            self.count(index, data.len() + OVERHEAD);
            if self.cuts.contains(&(index, to)) || self.clock.percent(self.setting.loss) {
                continue;
            }
            let after = self.clock.between(self.setting.latency.0, self.setting.latency.1);
            self.clock.after(after, Happens::Arrive { to, from: index, sent: now, data });
        }
        for of in effects.pulses {
            let Some(of) = self.keys.get(&of).copied() else { continue };
            self.count(index, 28);
            let cut = self.cuts.contains(&(index, of)) || self.cuts.contains(&(of, index));
            let lost = self.clock.percent(self.setting.loss) || self.clock.percent(self.setting.loss);
            if self.setting.pulses && self.nodes[of].state != State::Off && !cut && !lost {
                let (least, most) = self.setting.latency;
                let after = self.clock.between(least * 2, most * 2);
                self.clock.after(after, Happens::Pulse { to: index, of });
            }
        }
        for (about, thought) in effects.changed {
            let Some(about) = self.keys.get(&about).copied() else { continue };
            let verdict = thought.map(|t| t.verdict);
            let accusers = thought.map_or(0, |t| t.accusers);
            if verdict == Some(Verdict::Alive) && self.large() {
                if self.thoughts.remove(&(index, about)).is_none() {
                    continue;
                }
            } else {
                let before = self.thoughts.insert((index, about), verdict);
                if before.is_none() && verdict == Some(Verdict::Alive) {
                    continue;
                }
            }
            self.changes.push(Change { at: now, by: index, about, verdict, accusers });
        }
        // A machine acts a little later than it wanted to.
        let due = effects.due.max(now) + self.clock.between(0, 1);
        let node = &mut self.nodes[index];
        if due < node.due || node.due <= now {
            node.due = due;
            let life = node.life;
            self.clock.at(due, Happens::Tick(index, life));
        }
    }

    fn count(&mut self, by: usize, bytes: usize) {
        self.traffic.0 += 1;
        self.traffic.1 += bytes as u64;
        self.nodes[by].sent += bytes as u64;
    }

    /// When each of the others came to hold a member for dead, counted from `since`; sorted. Those that never did are not
    /// in it.
    pub fn found_dead(&self, about: usize, since: Duration) -> Vec<Duration> {
        let mut first: BTreeMap<usize, Duration> = BTreeMap::new();
        for change in &self.changes {
            if change.about == about && change.at >= since && change.verdict == Some(Verdict::Dead) {
                first.entry(change.by).or_insert(change.at - since);
            }
        }
        let mut times: Vec<Duration> = first.into_values().collect();
        times.sort();
        times
    }
}
