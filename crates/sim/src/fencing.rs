//! Fencing: stateful pods, nodes that are cut off, and controllers that make them anew elsewhere.
//!
//! Nodes freeze and thaw, lose the API one way or the other, lose their agents; answers are late or lost; the API goes away;
//! requests are carried out long after they were given up; clocks run up to a hundredth too fast or too slow; pods start and
//! stop slowly. Whoever leads the controllers is replaced now and then, and one that was asleep acts on what it knew.
//!
//! What must hold: **one instance**: never do two processes of one stateful pod run at the same time.
//! What should come about: a pod whose node is gone runs elsewhere after a while.

use std::{collections::BTreeMap, time::Duration};

use seawall_quorum::{
    fence::{Effect, Epoch, Event, Fence, Heard, wait},
    timing::{Profile, Timing},
};

use crate::{Broken, clock::Clock};

/// What a run is like.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The times.
    pub profile: Profile,
    /// How many nodes there are.
    pub nodes: usize,
    /// How many stateful pods there are.
    pub pods: usize,
    /// How long it lasts.
    pub length: Duration,
    /// Whether the controllers wait until a node must have stopped its pods. Without, the run has to fail.
    pub waits: bool,
    /// Whether a pod that was stopped needs a permit to run again. Without, the run has to fail.
    pub permits: bool,
    /// Whether a pod is deleted only as it was before the Lease was looked at. Without, the run has to fail.
    pub exact: bool,
    /// Whether anything goes wrong.
    pub faults: bool,
    /// Whether what happens is written down in words.
    pub trace: bool,
}

impl Default for Setting {
    fn default() -> Setting {
        Setting {
            profile: Profile::Fast,
            nodes: 3,
            pods: 2,
            length: Duration::from_secs(300),
            waits: true,
            permits: true,
            exact: true,
            faults: true,
            trace: false,
        }
    }
}

/// What a run was like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// How many pods were taken from a node without its word.
    pub forced: u64,
    /// How many pods a node stopped by itself.
    pub stopped: u64,
    /// How many deletions came to nothing because the pod had been written to.
    pub refused: u64,
    /// The longest time without any instance of a pod.
    pub longest_gap: Duration,
    /// Everything that happened, condensed: equal for equal seeds.
    pub fingerprint: u64,
}

type Uid = u64;

/// A pod's object.
#[derive(Clone, Copy, Debug)]
struct Object {
    uid: Uid,
    node: usize,
    version: u64,
}

enum Request {
    /// Of a node: its Lease, renewed by a request sent at this time of its own clock.
    Renew(Duration),
    /// Of a node: a write to a pod's object.
    Permit(Uid, Epoch),
    /// Of a node: which pods are its own. What it is told may be old when it arrives.
    List,
}

enum Answer {
    Renewed(Duration),
    Permitted(Uid, Epoch),
    Refused(Uid),
    Pods(Vec<Uid>),
}

enum Happening {
    /// A node's agent renews its Lease.
    Beat(usize, u32),
    /// A node's agent asks what it should run.
    Sync(usize, u32),
    /// A request of a node arrives at the store.
    Arrive(usize, u32, Request),
    /// Its answer arrives at the node.
    Answer(usize, u32, Answer),
    /// The watchdog of a node looks.
    Look(usize),
    /// A process of this pod begins to run on a node, if it still may.
    Started(usize, u32, Uid),
    /// The controllers look.
    Control(u32),
    /// They have read a pod, and now read the Lease of its node.
    ReadLease(u32, usize, Object),
    /// They delete the pod as they have read it.
    Delete(u32, usize, Object),
    Freeze(usize),
    Thaw(usize),
    CutOff(usize),
    Join(usize),
    KillAgent(usize),
    StartAgent(usize),
    PowerOff(usize),
    PowerOn(usize),
    ApiDown,
    ApiUp,
    AnotherLeads,
    Trouble,
}

struct Node {
    /// How fast its clock runs.
    rate: f64,
    fence: Fence,
    /// Which life of the agent this is.
    life: u32,
    agent: bool,
    on: bool,
    frozen: bool,
    cut: bool,
    /// What runs, whoever may know of it.
    running: BTreeMap<Uid, usize>,
    starting: Vec<Uid>,
    /// What the watchdog holds: nothing begins to run there.
    held: Vec<Uid>,
    /// What happened to it while it was frozen.
    waiting: Vec<Happening>,
    lease: u64,
}

struct Controller {
    life: u32,
    rate: f64,
    heard: Heard,
}

struct World {
    clock: Clock<Happening>,
    setting: Setting,
    timing: Timing,
    nodes: Vec<Node>,
    controller: Controller,
    pods: Vec<Object>,
    /// Since when no instance of a pod runs.
    idle: Vec<Option<Duration>>,
    revision: u64,
    /// Which pod each uid is an instance of.
    owners: Vec<usize>,
    down: bool,
    calm: bool,
    outcome: Outcome,
    trace: Vec<String>,
}

/// Runs one cluster by seed.
///
/// # Errors
/// The invariant that did not hold, and what led to it.
pub fn run(seed: u64, setting: Setting) -> Result<Outcome, Broken> {
    run_once(seed, setting).map_err(|broken| match setting.trace {
        true => broken,
        // Once more, in words: the same seed gives the same run.
        false => run_once(seed, Setting { trace: true, ..setting }).err().unwrap_or(broken),
    })
}

/// The last part of a run, in which everything is well: by its end every pod has to run.
const CALM: Duration = Duration::from_secs(60);

fn run_once(seed: u64, setting: Setting) -> Result<Outcome, Broken> {
    let timing = Timing::of(setting.profile);
    let mut clock = Clock::new(seed);
    let mut drift = || 0.99 + clock.between(0, 20).as_secs_f64();
    let nodes = (0..setting.nodes).map(|_| drift()).collect::<Vec<_>>();
    let controller = Controller { life: 0, rate: drift(), heard: Heard::default() };
    let mut world = World {
        clock,
        setting,
        timing,
        nodes: Vec::new(),
        controller,
        pods: Vec::new(),
        idle: vec![Some(Duration::ZERO); setting.pods],
        revision: 1,
        owners: Vec::new(),
        down: false,
        calm: false,
        outcome: Outcome { fingerprint: 0xcbf2_9ce4_8422_2325, ..Outcome::default() },
        trace: Vec::new(),
    };
    for (index, rate) in nodes.into_iter().enumerate() {
        world.nodes.push(Node {
            rate,
            fence: Fence::new(timing.fence_after),
            life: 0,
            agent: true,
            on: true,
            frozen: false,
            cut: false,
            running: BTreeMap::new(),
            starting: Vec::new(),
            held: Vec::new(),
            waiting: Vec::new(),
            lease: 0,
        });
        let first = world.clock.between(0, 100);
        world.clock.after(first, Happening::Beat(index, 0));
        world.clock.after(first * 2, Happening::Sync(index, 0));
        world.clock.after(first, Happening::Look(index));
    }
    for pod in 0..setting.pods {
        let object = world.bind(pod);
        world.pods.push(object);
    }
    world.clock.after(Duration::from_millis(10), Happening::Control(0));
    if setting.faults {
        world.clock.after(Duration::from_secs(5), Happening::Trouble);
    }
    while let Some(happening) = world.clock.next(setting.length) {
        if !world.calm && world.clock.now() + CALM > setting.length {
            world.calm_down();
        }
        world.happen(happening);
        world.check()?;
    }
    if let Some(pod) = world.idle.iter().position(Option::is_some) {
        return Err(world.broken(format!("pod {pod} does not run, though all has been well for {CALM:?}")));
    }
    Ok(world.outcome)
}

impl World {
    fn note(&mut self, number: u64, words: impl FnOnce() -> String) {
        let now = self.clock.now();
        let print = &mut self.outcome.fingerprint;
        *print = (*print ^ number ^ now.as_micros() as u64).wrapping_mul(0x0100_0000_01b3);
        if self.setting.trace {
            self.trace.push(format!("{:>9.3} s  {}", now.as_secs_f64(), words()));
        }
    }

    fn broken(&mut self, what: String) -> Broken {
        self.note(1, || format!("BROKEN: {what}"));
        Broken { what, trace: std::mem::take(&mut self.trace) }
    }

    /// A new object for a pod, on a node that the API believes in: any that is on.
    fn bind(&mut self, pod: usize) -> Object {
        let on: Vec<usize> = (0..self.nodes.len()).filter(|n| self.nodes[*n].on && !self.nodes[*n].cut).collect();
        let any = self.clock.between(0, 1000).as_micros() as usize;
        let node = if on.is_empty() { any % self.nodes.len() } else { on[any % on.len()] };
        self.owners.push(pod);
        self.revision += 1;
        let object = Object { uid: self.owners.len() as Uid, node, version: self.revision };
        self.note(2, || format!("pod {pod} is made: uid {} on n{node}", object.uid));
        object
    }

    /// What a node's clock shows.
    fn local(&self, node: usize) -> Duration {
        self.clock.now().mul_f64(self.nodes[node].rate)
    }

    fn pod_of(&self, uid: Uid) -> Option<usize> {
        self.pods.iter().position(|object| object.uid == uid)
    }

    /// How long a message takes: mostly little, now and then seconds.
    fn delay(&mut self) -> Duration {
        match self.setting.faults && !self.calm && self.clock.percent(3) {
            true => self.clock.between(500, 30_000),
            false => self.clock.between(1, 20),
        }
    }

    /// Whether a message gets lost.
    fn loses(&mut self) -> bool {
        self.setting.faults && !self.calm && self.clock.percent(2)
    }

    /// One instance at most, and how long there was none.
    fn check(&mut self) -> Result<(), Broken> {
        for pod in 0..self.pods.len() {
            let on: Vec<String> = self
                .nodes
                .iter()
                .enumerate()
                // What is frozen does nothing. When it thaws the watchdog comes first here; on a real machine some
                // milliseconds may pass, which is why there are hardware watchdogs.
                .filter(|(_, node)| !node.frozen)
                .flat_map(|(n, node)| node.running.iter().map(move |(uid, of)| (n, *uid, *of)))
                .filter(|(_, _, of)| *of == pod)
                .map(|(n, uid, _)| format!("uid {uid} on n{n}"))
                .collect();
            if on.len() > 1 {
                return Err(self.broken(format!("pod {pod} runs twice: {}", on.join(", "))));
            }
            let now = self.clock.now();
            match (self.idle[pod], on.is_empty()) {
                (None, true) => self.idle[pod] = Some(now),
                (Some(since), false) => {
                    self.outcome.longest_gap = self.outcome.longest_gap.max(now - since);
                    self.idle[pod] = None;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Beat(n, life) | Happening::Sync(n, life)
                if self.nodes[n].life != life || !self.nodes[n].agent => {}
            Happening::Beat(n, life) if self.nodes[n].frozen => self.nodes[n].waiting.push(Happening::Beat(n, life)),
            Happening::Sync(n, life) if self.nodes[n].frozen => self.nodes[n].waiting.push(Happening::Sync(n, life)),
            Happening::Look(n) if self.nodes[n].frozen => self.nodes[n].waiting.push(Happening::Look(n)),
            Happening::Beat(n, life) => {
                let sent = self.local(n);
                self.send(n, life, Request::Renew(sent));
                let next = self.timing.node_lease_renew().mul_f64(1.0 / self.nodes[n].rate);
                self.clock.after(next, Happening::Beat(n, life));
            }
            Happening::Sync(n, life) => {
                self.send(n, life, Request::List);
                let next = self.clock.between(500, 1500);
                self.clock.after(next, Happening::Sync(n, life));
            }
            Happening::Arrive(n, life, request) => self.arrive(n, life, request),
            Happening::Answer(n, life, answer) => self.answer(n, life, answer),
            Happening::Look(n) => {
                if self.nodes[n].on {
                    self.look(n);
                    self.clock.after(Duration::from_millis(100), Happening::Look(n));
                }
            }
            Happening::Started(n, life, uid) => self.started(n, life, uid),
            Happening::Control(life) if life == self.controller.life => {
                self.control();
                self.clock.after(self.timing.node_monitor, Happening::Control(life));
            }
            Happening::ReadLease(life, pod, object) => self.read_lease(life, pod, object),
            Happening::Delete(life, pod, object) => self.delete(life, pod, object),
            Happening::Control(_) => {}
            other => self.fault(other),
        }
    }

    /// A node sends a request: it may be lost, or take long.
    fn send(&mut self, n: usize, life: u32, request: Request) {
        if self.nodes[n].cut || self.loses() {
            return;
        }
        let delay = self.delay();
        self.clock.after(delay, Happening::Arrive(n, life, request));
    }

    fn arrive(&mut self, n: usize, life: u32, request: Request) {
        if self.down {
            return;
        }
        // What was sent before the cable was cut still arrives: it may have been on its way, or queued at some server.
        let answer = match request {
            Request::Renew(sent) => {
                self.revision += 1;
                self.nodes[n].lease = self.revision;
                Answer::Renewed(sent)
            }
            Request::Permit(uid, epoch) => match self.pod_of(uid) {
                Some(pod) => {
                    self.revision += 1;
                    self.pods[pod].version = self.revision;
                    self.note(3, || format!("n{n} writes to uid {uid} for epoch {epoch}"));
                    Answer::Permitted(uid, epoch)
                }
                None => Answer::Refused(uid),
            },
            Request::List => {
                Answer::Pods(self.pods.iter().filter(|object| object.node == n).map(|object| object.uid).collect())
            }
        };
        if !self.nodes[n].cut && !self.loses() {
            let delay = self.delay();
            self.clock.after(delay, Happening::Answer(n, life, answer));
        }
    }

    fn answer(&mut self, n: usize, life: u32, answer: Answer) {
        let node = &mut self.nodes[n];
        if node.life != life || !node.agent || node.cut {
            return;
        }
        if node.frozen {
            node.waiting.push(Happening::Answer(n, life, answer));
            return;
        }
        let now = self.local(n);
        match answer {
            Answer::Renewed(sent) => {
                if now.saturating_sub(sent) <= self.timing.node_lease_request {
                    self.step(n, Event::Renewed { sent });
                }
            }
            Answer::Permitted(uid, epoch) => {
                self.step(n, Event::Permitted { uid: uid.to_string(), epoch });
                self.start_allowed(n);
            }
            Answer::Refused(uid) => self.ends(n, uid),
            Answer::Pods(list) => {
                let gone: Vec<Uid> = self.nodes[n].running.keys().filter(|uid| !list.contains(uid)).copied().collect();
                for uid in gone {
                    self.ends(n, uid);
                }
                for uid in list {
                    self.step(n, Event::Guard { uid: uid.to_string(), running: false });
                }
                self.start_allowed(n);
            }
        }
    }

    /// The API does not know the pod any more.
    fn ends(&mut self, n: usize, uid: Uid) {
        self.nodes[n].running.remove(&uid);
        self.nodes[n].starting.retain(|u| *u != uid);
        self.step(n, Event::Forget { uid: uid.to_string() });
    }

    fn step(&mut self, n: usize, event: Event) {
        let now = self.local(n);
        for effect in self.nodes[n].fence.step(now, event) {
            match effect {
                Effect::Stop(uid) => self.note(4, || format!("n{n} has to stop uid {uid}")),
                Effect::Ask { uid, epoch } => {
                    let (life, uid) = (self.nodes[n].life, uid.parse().unwrap_or_default());
                    match self.setting.permits {
                        true => self.send(n, life, Request::Permit(uid, epoch)),
                        false => drop(self.nodes[n].fence.step(now, Event::Permitted { uid: uid.to_string(), epoch })),
                    }
                }
            }
        }
    }

    /// The agent starts what it may run and does not.
    fn start_allowed(&mut self, n: usize) {
        let now = self.local(n);
        let mine: Vec<Uid> =
            (1..=self.owners.len() as Uid).filter(|uid| self.nodes[n].fence.may_run(&uid.to_string(), now)).collect();
        for uid in mine {
            let node = &mut self.nodes[n];
            if !node.running.contains_key(&uid) && !node.starting.contains(&uid) {
                node.starting.push(uid);
                let (life, takes) = (node.life, self.clock.between(50, 1500));
                self.clock.after(takes, Happening::Started(n, life, uid));
            }
        }
    }

    /// The runtime starts a process at last, whether or not it still may: nobody can call it back.
    fn started(&mut self, n: usize, life: u32, uid: Uid) {
        let node = &mut self.nodes[n];
        if node.frozen {
            node.waiting.push(Happening::Started(n, life, uid));
            return;
        }
        let wanted = node.starting.contains(&uid);
        node.starting.retain(|u| *u != uid);
        if self.nodes[n].on && wanted && !self.nodes[n].held.contains(&uid) {
            // Also when its object is gone: that is what must not be.
            let pod = self.owners[uid as usize - 1];
            self.nodes[n].running.insert(uid, pod);
            self.note(5, || format!("pod {pod} runs: uid {uid} on n{n}"));
        }
    }

    /// The watchdog: what may not run is killed.
    fn look(&mut self, n: usize) {
        let now = self.local(n);
        let over: Vec<Uid> = self.nodes[n].fence.stopped(now).filter_map(|uid| uid.parse().ok()).collect();
        self.nodes[n].held.clone_from(&over);
        for uid in over {
            if self.nodes[n].running.remove(&uid).is_some() {
                self.outcome.stopped += 1;
                self.note(6, || format!("n{n} stops uid {uid}"));
            }
        }
        self.step(n, Event::Tick);
    }

    /// The controllers look at all pods. One whose node is silent for long enough is read, then its node's Lease.
    fn control(&mut self) {
        if self.down {
            return;
        }
        let now = self.clock.now().mul_f64(self.controller.rate);
        for pod in 0..self.pods.len() {
            let object = self.pods[pod];
            let name = object.node.to_string();
            let version = self.nodes[object.node].lease.to_string();
            self.controller.heard.see(&name, &version, now);
            let silent = self.controller.heard.silent(&name, now).unwrap_or_default();
            if silent >= self.patience() {
                let (life, takes) = (self.controller.life, self.delay());
                self.clock.after(takes, Happening::ReadLease(life, pod, object));
            }
        }
    }

    fn patience(&self) -> Duration {
        match self.setting.waits {
            true => wait(self.timing.fence_wait, self.timing.fence_promise()),
            // As soon as it would be evicted.
            false => self.timing.node_grace,
        }
    }

    fn read_lease(&mut self, life: u32, pod: usize, object: Object) {
        if self.down || life != self.controller.life {
            return;
        }
        let now = self.clock.now().mul_f64(self.controller.rate);
        let (name, version) = (object.node.to_string(), self.nodes[object.node].lease.to_string());
        if self.controller.heard.see(&name, &version, now) {
            // Whoever is asleep here deletes later, and nobody else knows.
            let takes = match self.setting.faults && self.clock.percent(20) {
                true => self.clock.between(1000, 60_000),
                false => self.delay(),
            };
            self.clock.after(takes, Happening::Delete(life, pod, object));
        }
    }

    fn delete(&mut self, life: u32, pod: usize, object: Object) {
        // A deposed controller's write is refused by its term.
        if self.down || life != self.controller.life || self.pods[pod].uid != object.uid {
            return;
        }
        if self.setting.exact && self.pods[pod].version != object.version {
            self.outcome.refused += 1;
            self.note(7, || format!("pod {pod} is not deleted: it was written to"));
            return;
        }
        self.outcome.forced += 1;
        self.note(8, || format!("pod {pod} is deleted: uid {} of n{}", object.uid, object.node));
        self.pods[pod] = self.bind(pod);
    }

    fn fault(&mut self, happening: Happening) {
        match happening {
            Happening::Freeze(n) if self.nodes[n].on => {
                self.nodes[n].frozen = true;
                self.note(9, || format!("n{n} freezes"));
            }
            Happening::Thaw(n) if self.nodes[n].frozen => {
                self.nodes[n].frozen = false;
                self.note(10, || format!("n{n} thaws"));
                // The watchdog is first; what follows comes in any order.
                self.look(n);
                for happening in std::mem::take(&mut self.nodes[n].waiting) {
                    let soon = self.clock.between(0, 50);
                    self.clock.after(soon, happening);
                }
            }
            Happening::CutOff(n) => {
                self.nodes[n].cut = true;
                self.note(11, || format!("n{n} is cut off"));
            }
            Happening::Join(n) => {
                self.nodes[n].cut = false;
                self.note(12, || format!("n{n} is back"));
            }
            Happening::KillAgent(n) => {
                self.nodes[n].agent = false;
                self.note(13, || format!("the agent of n{n} is killed"));
            }
            Happening::StartAgent(n) if self.nodes[n].on => {
                let node = &mut self.nodes[n];
                (node.agent, node.life) = (true, node.life + 1);
                // What it knows is in the file; what the runtime was told goes on.
                let life = node.life;
                self.note(14, || format!("the agent of n{n} starts"));
                self.step(n, Event::Tick);
                self.clock.after(Duration::from_millis(50), Happening::Beat(n, life));
                self.clock.after(Duration::from_millis(100), Happening::Sync(n, life));
            }
            Happening::PowerOff(n) => {
                let node = &mut self.nodes[n];
                (node.on, node.agent, node.frozen) = (false, false, false);
                node.running.clear();
                node.starting.clear();
                node.held.clear();
                node.waiting.clear();
                node.fence = Fence::new(self.timing.fence_after);
                self.note(15, || format!("n{n} goes off"));
            }
            Happening::PowerOn(n) if !self.nodes[n].on => {
                self.nodes[n].on = true;
                self.note(16, || format!("n{n} goes on"));
                self.clock.after(Duration::from_millis(10), Happening::Look(n));
                self.fault(Happening::StartAgent(n));
            }
            Happening::ApiDown => self.down = true,
            Happening::ApiUp => self.down = false,
            Happening::AnotherLeads => {
                let rate = 0.99 + self.clock.between(0, 20).as_secs_f64();
                let life = self.controller.life + 1;
                self.controller = Controller { life, rate, heard: Heard::default() };
                self.note(17, || "another one leads the controllers".into());
                self.clock.after(Duration::from_millis(10), Happening::Control(life));
            }
            Happening::Trouble if !self.calm => self.trouble(),
            _ => {}
        }
    }

    fn trouble(&mut self) {
        let n = self.clock.between(0, 1000).as_micros() as usize % self.nodes.len();
        // Of every length: a blink, about as long as a fence, much longer.
        let lengths = [(100, 3000), (8000, 22_000), (20_000, 60_000)];
        let (low, high) = lengths[self.clock.between(0, 1000).as_micros() as usize % lengths.len()];
        let length = self.clock.between(low, high);
        let (begin, end) = match self.clock.between(0, 1000).as_micros() % 6 {
            0 => (Happening::Freeze(n), Happening::Thaw(n)),
            1 => (Happening::CutOff(n), Happening::Join(n)),
            2 => (Happening::KillAgent(n), Happening::StartAgent(n)),
            3 => (Happening::PowerOff(n), Happening::PowerOn(n)),
            4 => (Happening::ApiDown, Happening::ApiUp),
            _ => (Happening::AnotherLeads, Happening::AnotherLeads),
        };
        self.fault(begin);
        self.clock.after(length, end);
        let next = self.clock.between(1000, 15_000);
        self.clock.after(next, Happening::Trouble);
    }

    /// Everything is well from here on.
    fn calm_down(&mut self) {
        self.calm = true;
        self.fault(Happening::ApiUp);
        for n in 0..self.nodes.len() {
            self.fault(Happening::Thaw(n));
            self.fault(Happening::Join(n));
            self.fault(Happening::PowerOn(n));
            if !self.nodes[n].agent {
                self.fault(Happening::StartAgent(n));
            }
        }
    }
}
