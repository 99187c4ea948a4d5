//! Elections: several candidates, one store, and everything that can go wrong between them.
//!
//! Candidates freeze and thaw, crash and come back as others, see the store late; the store goes away and comes back,
//! answers slowly, and loses answers of writes that it did carry out. Leaders write all the time, also while they
//! should not. What must hold:
//!
//! - **one writer**: the terms of accepted writes never go back;
//! - **no gap**: when the store has worked for long enough and a candidate is well, somebody leads;
//! - **no false alarm**: a leader that is well, on a store that works, is not deposed;
//! - **a leader that slept notices**: it knows that its time is over before anything else happens.

use std::time::Duration;

use seawall_quorum::{
    election::{Effect, Elector, Event, Record, Term},
    timing::{Profile, Timing},
};

use crate::{Broken, clock::Clock};

/// After so much silence neighbours call a machine dead.
const NOTICED: Duration = Duration::from_millis(700);

/// What a run is like.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The times.
    pub timing: Timing,
    /// How many candidates there are.
    pub candidates: usize,
    /// How long it lasts.
    pub length: Duration,
    /// Whether the store compares terms. Without, the run has to fail: that is what the fence is for.
    pub fenced: bool,
    /// How long the store takes for an answer at most, in milliseconds.
    pub slow: u64,
    /// Whether anything goes wrong.
    pub faults: bool,
    /// Whether what happens is written down in words.
    pub trace: bool,
}

impl Default for Setting {
    fn default() -> Setting {
        Setting {
            timing: Timing::of(Profile::Fast),
            candidates: 3,
            length: Duration::from_secs(60),
            fenced: true,
            slow: 20,
            faults: true,
            trace: false,
        }
    }
}

/// The Lease as the store has it.
#[derive(Clone, Debug)]
struct Lease {
    record: Record,
    created: u64,
}

enum Happening {
    Tick(usize, u32),
    /// An effect arrives at the store.
    Arrive(usize, u32, u64, Effect),
    /// Its answer arrives at the candidate.
    Answer(usize, u32, u64, Event),
    /// It has waited long enough for that answer.
    Patience(usize, u32, u64),
    /// A leader writes something else than its Lease.
    Write(usize, u32, Term),
    Freeze(usize),
    Thaw(usize),
    Crash(usize),
    Boot(usize),
    StoreDown,
    StoreUp,
    Trouble,
}

struct Candidate {
    elector: Elector,
    /// Which life this is: what an earlier one is still answered goes nowhere.
    life: u32,
    up: bool,
    frozen: bool,
    /// What happened to it while it was frozen.
    waiting: Vec<Event>,
    /// The request that is under way.
    request: Option<u64>,
    well_since: Duration,
    /// Since when it is frozen or down, if it is.
    silent_since: Duration,
    /// When an answer to it was last lost or late.
    disturbed: Duration,
}

struct World {
    clock: Clock<Happening>,
    setting: Setting,
    timing: Timing,
    candidates: Vec<Candidate>,
    lease: Option<Lease>,
    revision: u64,
    down: bool,
    up_since: Duration,
    requests: u64,
    last_term: u64,
    led_since: Option<Duration>,
    gap_since: Duration,
    trace: Vec<String>,
    fingerprint: u64,
}

/// What a run was like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// How many terms there were.
    pub terms: u64,
    /// How many writes of leaders were accepted.
    pub written: u64,
    /// How many were refused, their term being over.
    pub refused: u64,
    /// The longest time without a leader while the store worked and a candidate was well.
    pub longest_gap: Duration,
    /// Everything that happened, condensed: equal for equal seeds.
    pub fingerprint: u64,
}

/// Runs one election by seed.
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

fn run_once(seed: u64, setting: Setting) -> Result<Outcome, Broken> {
    let timing = setting.timing;
    let mut world = World {
        clock: Clock::new(seed),
        setting,
        timing,
        candidates: Vec::new(),
        lease: None,
        revision: 10,
        down: false,
        up_since: Duration::ZERO,
        requests: 0,
        last_term: 0,
        led_since: None,
        gap_since: Duration::ZERO,
        trace: Vec::new(),
        fingerprint: 0xcbf2_9ce4_8422_2325,
    };
    for index in 0..setting.candidates {
        world.candidates.push(Candidate {
            elector: Elector::new(format!("c{index}-0"), timing),
            life: 0,
            up: true,
            frozen: false,
            waiting: Vec::new(),
            request: None,
            well_since: Duration::ZERO,
            silent_since: Duration::ZERO,
            disturbed: Duration::ZERO,
        });
        let first = world.clock.between(0, 50);
        world.clock.after(first, Happening::Tick(index, 0));
    }
    if setting.faults {
        world.clock.after(Duration::from_secs(3), Happening::Trouble);
    }
    let mut outcome = Outcome::default();
    while let Some(happening) = world.clock.next(setting.length) {
        world.happen(happening, &mut outcome)?;
        world.check_gap(&mut outcome)?;
    }
    outcome.fingerprint = world.fingerprint;
    Ok(outcome)
}

impl World {
    /// Something that happened. Its words are made only where somebody will read them; its number always counts.
    fn note(&mut self, number: u64, words: impl FnOnce() -> String) {
        let now = self.clock.now();
        self.fingerprint = (self.fingerprint ^ number ^ now.as_micros() as u64).wrapping_mul(0x0100_0000_01b3);
        if self.setting.trace {
            self.trace.push(format!("{:>9.3} s  {}", now.as_secs_f64(), words()));
        }
    }

    fn broken(&mut self, what: String) -> Broken {
        self.note(1, || format!("BROKEN: {what}"));
        Broken { what, trace: std::mem::take(&mut self.trace) }
    }

    fn happen(&mut self, happening: Happening, outcome: &mut Outcome) -> Result<(), Broken> {
        match happening {
            Happening::Tick(index, life) if self.candidates[index].life == life && self.candidates[index].up => {
                let poll = self.candidates[index].elector.poll();
                let jitter = self.clock.between(0, 5);
                self.clock.after(poll + jitter, Happening::Tick(index, life));
                if self.candidates[index].frozen {
                    return Ok(());
                }
                // The cache of its server, which follows the store while that works.
                let event = match &self.lease {
                    _ if self.down || self.candidates[index].request.is_some() => Event::Tick,
                    Some(lease) => Event::Seen(Some(lease.record.clone())),
                    None => Event::Seen(None),
                };
                let holder = match &event {
                    Event::Seen(Some(record)) => Some(record.holder.clone()),
                    _ => None,
                };
                self.step(index, event)?;
                if let Some(holder) = holder.filter(|holder| self.is_called_dead(holder))
                    && self.candidates[index].request.is_none()
                {
                    self.step(index, Event::Gone(holder))?;
                }
            }
            Happening::Arrive(index, life, request, effect) => self.arrive(index, life, request, effect),
            Happening::Answer(index, life, request, event) => {
                let candidate = &mut self.candidates[index];
                if candidate.life == life && candidate.up && candidate.request == Some(request) {
                    candidate.request = None;
                    if candidate.frozen {
                        candidate.waiting.push(event);
                    } else {
                        self.step(index, event)?;
                    }
                }
            }
            Happening::Patience(index, life, request) => {
                let candidate = &mut self.candidates[index];
                if candidate.life == life && candidate.up && candidate.request == Some(request) {
                    candidate.request = None;
                    if candidate.frozen {
                        candidate.waiting.push(Event::Failed);
                    } else {
                        self.step(index, Event::Failed)?;
                    }
                }
            }
            Happening::Write(index, life, term) => self.write(index, life, term, outcome)?,
            Happening::Freeze(index) => {
                self.candidates[index].frozen = true;
                self.candidates[index].silent_since = self.clock.now();
                self.note(11 + 100 * index as u64, || format!("c{index} freezes"));
            }
            Happening::Thaw(index) if self.candidates[index].frozen => {
                self.candidates[index].frozen = false;
                self.candidates[index].well_since = self.clock.now();
                self.note(12 + 100 * index as u64, || format!("c{index} thaws"));
                for event in std::mem::take(&mut self.candidates[index].waiting) {
                    self.step(index, event)?;
                }
            }
            Happening::Crash(index) => {
                self.candidates[index].up = false;
                self.candidates[index].frozen = false;
                self.candidates[index].silent_since = self.clock.now();
                self.note(13 + 100 * index as u64, || format!("c{index} crashes"));
                let pause = self.clock.between(100, 8000);
                self.clock.after(pause, Happening::Boot(index));
            }
            Happening::Boot(index) => {
                let candidate = &mut self.candidates[index];
                candidate.life += 1;
                let life = candidate.life;
                candidate.elector = Elector::new(format!("c{index}-{life}"), self.timing);
                candidate.up = true;
                candidate.request = None;
                candidate.waiting.clear();
                candidate.well_since = self.clock.now();
                self.note(14 + 100 * index as u64, || format!("c{index} is back"));
                self.clock.after(Duration::from_millis(1), Happening::Tick(index, life));
            }
            Happening::StoreDown => {
                self.down = true;
                self.note(2, || "the store goes away".into());
            }
            Happening::StoreUp => {
                self.down = false;
                self.up_since = self.clock.now();
                self.note(3, || "the store is back".into());
            }
            Happening::Trouble => {
                self.trouble();
                let pause = self.clock.between(200, 6000);
                self.clock.after(pause, Happening::Trouble);
            }
            Happening::Tick(..) | Happening::Thaw(_) => {}
        }
        Ok(())
    }

    /// What neighbours say of the machine of a candidate: some time after it fell silent, and now and then by mistake.
    fn is_called_dead(&mut self, identity: &str) -> bool {
        let mistaken = self.setting.faults && self.clock.percent(1);
        let now = self.clock.now();
        let silent = self.candidates.iter().enumerate().any(|(index, c)| {
            format!("c{index}-{}", c.life) == identity
                && (!c.up || c.frozen)
                && now.saturating_sub(c.silent_since) > NOTICED
        });
        mistaken || silent
    }

    fn trouble(&mut self) {
        let index = self.clock.between(0, 1_000_000).as_micros() as usize % self.candidates.len();
        if self.clock.percent(35) && !self.down {
            // An election of etcd, or a majority that is gone for a while.
            let long = if self.clock.percent(70) { (100, 1200) } else { (1000, 8000) };
            self.clock.after(Duration::ZERO, Happening::StoreDown);
            let time = self.clock.between(long.0, long.1);
            self.clock.after(time, Happening::StoreUp);
        } else if self.clock.percent(50) && self.candidates[index].up {
            self.clock.after(Duration::ZERO, Happening::Crash(index));
        } else if self.candidates[index].up && !self.candidates[index].frozen {
            self.clock.after(Duration::ZERO, Happening::Freeze(index));
            let time = self.clock.between(50, 5000);
            self.clock.after(time, Happening::Thaw(index));
        }
    }

    fn step(&mut self, index: usize, event: Event) -> Result<(), Broken> {
        let now = self.clock.now();
        let before = self.candidates[index].elector.term();
        let text = if self.setting.trace { format!("{event:?}") } else { String::new() };
        for effect in self.candidates[index].elector.step(now, event) {
            self.note(4 + 100 * index as u64, || format!("c{index}: {text} -> {effect:?}"));
            match effect {
                Effect::Lead(term) => {
                    self.led_since = Some(now);
                    let life = self.candidates[index].life;
                    self.clock.after(Duration::from_millis(1), Happening::Write(index, life, term));
                }
                Effect::Follow => {
                    // The store has worked, and so has the leader: who deposed it?
                    let candidate = &self.candidates[index];
                    let calm = now.saturating_sub(self.up_since.max(candidate.well_since).max(candidate.disturbed));
                    let long = self.timing.lease_duration * 3;
                    if !self.down && calm > long && before.is_some() {
                        return Err(self.broken(format!("c{index} was deposed though it and the store were well")));
                    }
                }
                effect => {
                    self.requests += 1;
                    let (request, life) = (self.requests, self.candidates[index].life);
                    self.candidates[index].request = Some(request);
                    let way = self.clock.between(0, 15);
                    let patience = self.candidates[index].elector.patience(&effect);
                    self.clock.after(way, Happening::Arrive(index, life, request, effect));
                    self.clock.after(patience, Happening::Patience(index, life, request));
                }
            }
        }
        Ok(())
    }

    /// The store carries out what reaches it, also for one that has crashed since.
    fn arrive(&mut self, index: usize, life: u32, request: u64, effect: Effect) {
        if self.down {
            return;
        }
        let at = |lease: &Option<Lease>, version| lease.as_ref().is_some_and(|l| l.record.version == version);
        let name = format!("c{index}-{life}");
        let event = match effect {
            Effect::Read => Event::Read(self.lease.as_ref().map(|l| l.record.clone())),
            Effect::Create { transitions, duration } => match self.lease {
                Some(_) => Event::Refused,
                None => {
                    self.revision += 1;
                    let version = self.revision;
                    let record = Record { holder: name, version, transitions, duration };
                    self.lease = Some(Lease { record, created: version });
                    Event::Created { version }
                }
            },
            Effect::Renew { version, .. } | Effect::Release { version } => match &mut self.lease {
                Some(lease) if lease.record.version == version => {
                    self.revision += 1;
                    lease.record.version = self.revision;
                    match effect {
                        Effect::Renew { duration, .. } => lease.record.duration = duration,
                        _ => lease.record.holder.clear(),
                    }
                    Event::Renewed { version: self.revision }
                }
                _ => Event::Refused,
            },
            Effect::Delete { version } if at(&self.lease, version) => {
                self.revision += 1;
                self.lease = None;
                Event::Deleted
            }
            Effect::Delete { .. } => Event::Refused,
            Effect::Lead(_) | Effect::Follow => return,
        };
        // Some answers are lost, and some arrive late.
        let (lost, late) = (self.setting.faults && self.clock.percent(1), self.setting.faults && self.clock.percent(3));
        if lost || late {
            self.candidates[index].disturbed = self.clock.now();
        }
        if lost {
            return;
        }
        let slow = self.setting.slow;
        let way = if late { self.clock.between(100, 600) } else { self.clock.between(slow / 2, slow) };
        self.clock.after(way, Happening::Answer(index, life, request, event));
    }

    /// A leader writes as long as its process has not ended: also after it should have noticed that it was deposed.
    fn write(&mut self, index: usize, life: u32, term: Term, outcome: &mut Outcome) -> Result<(), Broken> {
        let candidate = &self.candidates[index];
        if candidate.life != life || !candidate.up {
            return Ok(());
        }
        if candidate.elector.term() != Some(term) {
            return Ok(());
        }
        let next = self.clock.between(5, 60);
        self.clock.after(next, Happening::Write(index, life, term));
        // What a frozen one had sent before is still on its way; what a thawed one sends first is what matters.
        if self.down || candidate.frozen && !self.clock.percent(30) {
            return Ok(());
        }
        let holds = self.lease.as_ref().is_some_and(|l| l.created == term.0);
        if self.setting.fenced && !holds {
            outcome.refused += 1;
            return Ok(());
        }
        outcome.written += 1;
        if term.0 < self.last_term {
            return Err(
                self.broken(format!("a write of term {term} was accepted after one of term {}", self.last_term))
            );
        }
        if term.0 > self.last_term {
            outcome.terms += 1;
            self.last_term = term.0;
        }
        Ok(())
    }

    /// Nobody leads, though somebody could.
    fn check_gap(&mut self, outcome: &mut Outcome) -> Result<(), Broken> {
        let now = self.clock.now();
        let leads = |c: &Candidate| c.up && !c.frozen && c.elector.term().is_some();
        let current = self.lease.as_ref().map(|l| l.created);
        let led = self.candidates.iter().any(|c| leads(c) && c.elector.term().map(|t| t.0) == current);
        let well = self.candidates.iter().filter(|c| c.up && !c.frozen).map(|c| c.well_since).min();
        let Some(well) = well else {
            self.gap_since = now;
            return Ok(());
        };
        if led || self.down {
            self.gap_since = now;
            return Ok(());
        }
        let since = self.gap_since.max(self.up_since).max(well);
        let gap = now.saturating_sub(since);
        outcome.longest_gap = outcome.longest_gap.max(gap);
        // Lost answers and late ones may each cost the patience of one request, several times in a row.
        let bound = self.timing.takeover(Duration::from_millis(40)) + self.timing.renew_deadline * 6;
        if gap > bound {
            return Err(self.broken(format!("nobody has led for {gap:?}")));
        }
        Ok(())
    }
}
