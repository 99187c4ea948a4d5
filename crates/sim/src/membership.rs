//! Changes of etcd's membership: machines crash, come back, lose their disks, and are joined, removed and replaced all the
//! while, by rules ([`seawall_quorum::membership`]) that know only what they saw a moment ago.
//!
//! What must hold:
//!
//! - **no step loses the quorum**: after a change that the rules allowed, what they saw working is a majority;
//! - **no acknowledged write is lost**: the best log of any working majority has it, unless that many disks were lost;
//! - **one at a time**: there is never more than one learner;
//! - **it heals**: when machines and disks are left alone, every machine votes in the end.
//!
//! The log is a number: how many entries a member has. A change of members is an entry too.

use std::time::Duration;

use seawall_quorum::membership::{self, Member, Progress, Verdict, judge, quorum};

use crate::{Broken, clock::Clock};

/// How long a learner may stand still.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a run is like.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// How many machines there are.
    pub machines: usize,
    /// For how long things go wrong; then all machines are booted and left alone.
    pub bad: Duration,
    /// Whether the rules are asked. Without them the run has to fail.
    pub ruled: bool,
}

/// What a run was like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Members that got a vote.
    pub promoted: u64,
    /// Members that were removed.
    pub removed: u64,
    /// Changes that were refused.
    pub refused: u64,
    /// Writes that were acknowledged.
    pub written: u64,
}

enum Happening {
    Crash(usize),
    Boot(usize),
    /// A machine is lost with its disk; another of its name takes its place.
    Wipe(usize),
    /// A machine without a member asks to join.
    Join(usize),
    /// What was allowed is carried out, a moment after it was looked at.
    Change(Change, Vec<Member>),
    /// An operator removes a member, sensibly or not.
    Remove(usize),
    /// Learners are judged.
    Judge,
    /// A client writes, and members catch up.
    Write,
    Trouble,
    /// From here on nothing goes wrong.
    Calm,
}

#[derive(Clone)]
enum Change {
    Remove(u64),
    Add(usize),
    Promote(u64),
}

#[derive(Clone, Debug)]
struct Voter {
    id: u64,
    machine: usize,
    learner: bool,
    log: u64,
    joined: Duration,
    moved: Duration,
}

struct World {
    clock: Clock<Happening>,
    setting: Setting,
    up: Vec<bool>,
    /// Which member's data are on each machine's disk.
    disk: Vec<Option<u64>>,
    members: Vec<Voter>,
    next: u64,
    acknowledged: u64,
    /// More disks were lost at once than the members could bear: nothing can be promised any more.
    lost: bool,
    calm: bool,
    outcome: Outcome,
    trace: Vec<String>,
}

/// Runs one life of a cluster by seed.
///
/// # Errors
/// The invariant that did not hold, and what led to it.
pub fn run(seed: u64, setting: Setting) -> Result<Outcome, Broken> {
    let first = Voter { id: 1, machine: 0, learner: false, log: 1, joined: Duration::ZERO, moved: Duration::ZERO };
    let mut world = World {
        clock: Clock::new(seed),
        setting,
        up: vec![true; setting.machines],
        disk: std::iter::once(Some(1)).chain(vec![None; setting.machines - 1]).collect(),
        members: vec![first],
        next: 2,
        acknowledged: 1,
        lost: false,
        calm: false,
        outcome: Outcome::default(),
        trace: Vec::new(),
    };
    for machine in 1..setting.machines {
        let wait = world.clock.between(0, 5000);
        world.clock.after(wait, Happening::Join(machine));
    }
    for what in [Happening::Judge, Happening::Write, Happening::Trouble] {
        world.clock.after(Duration::from_secs(1), what);
    }
    world.clock.at(setting.bad, Happening::Calm);
    let end = setting.bad + Duration::from_secs(900);
    while let Some(happening) = world.clock.next(end) {
        world.happen(happening)?;
        world.check()?;
        if world.lost {
            return Ok(world.outcome);
        }
    }
    let voting = world.members.iter().filter(|m| !m.learner).count();
    if voting != setting.machines {
        let what = format!("{voting} of {} machines vote after all was well for long", setting.machines);
        return Err(world.broken(what));
    }
    Ok(world.outcome)
}

fn name(machine: usize) -> String {
    format!("m{machine}")
}

impl World {
    fn note(&mut self, words: String) {
        self.trace.push(format!("{:>9.3} s  {words}", self.clock.now().as_secs_f64()));
    }

    fn broken(&mut self, what: String) -> Broken {
        Broken { what, trace: std::mem::take(&mut self.trace) }
    }

    fn works(&self, member: &Voter) -> bool {
        self.up[member.machine] && self.disk[member.machine] == Some(member.id)
    }

    fn voters(&self) -> impl Iterator<Item = &Voter> {
        self.members.iter().filter(|m| !m.learner)
    }

    fn has_quorum(&self) -> bool {
        self.voters().filter(|m| self.works(m)).count() >= quorum(self.voters().count())
    }

    /// What somebody who asks all members is told.
    fn look(&self) -> Vec<Member> {
        let led = self.has_quorum();
        let of = |m: &Voter| Member {
            id: m.id,
            // A member that has not started yet has told nobody its name.
            name: if m.log == 0 { String::new() } else { name(m.machine) },
            learner: m.learner,
            healthy: led && self.works(m),
        };
        self.members.iter().map(of).collect()
    }

    /// An entry of the log, if a majority can take it. Who leads has the best log of those that work.
    fn append(&mut self) -> bool {
        if !self.has_quorum() {
            return false;
        }
        let log = self.voters().filter(|m| self.works(m)).map(|m| m.log).max().unwrap_or_default() + 1;
        let need = quorum(self.voters().count());
        let mut order: Vec<usize> = (0..self.members.len()).collect();
        let turn = self.clock.between(0, 1000).as_micros() as usize % order.len();
        order.rotate_left(turn);
        let mut have = 0;
        for index in order {
            if self.members[index].learner || !self.works(&self.members[index]) || have >= need {
                continue;
            }
            self.members[index].log = log;
            have += 1;
        }
        self.acknowledged = log;
        true
    }

    fn happen(&mut self, happening: Happening) -> Result<(), Broken> {
        match happening {
            Happening::Crash(machine) => {
                self.up[machine] = false;
                self.note(format!("m{machine} crashes"));
                let off = self.clock.between(500, 60_000);
                self.clock.after(off, Happening::Boot(machine));
            }
            Happening::Wipe(machine) => {
                self.up[machine] = false;
                self.disk[machine] = None;
                self.note(format!("m{machine} is lost with its disk"));
                let left = self.voters().filter(|m| self.disk[m.machine] == Some(m.id)).count();
                self.lost |= left < quorum(self.voters().count());
                let off = self.clock.between(500, 60_000);
                self.clock.after(off, Happening::Boot(machine));
            }
            Happening::Boot(machine) => {
                if !self.up[machine] {
                    self.up[machine] = true;
                    self.note(format!("m{machine} boots"));
                }
                let id = self.disk[machine];
                if id.is_none() {
                    self.clock.after(Duration::from_millis(300), Happening::Join(machine));
                }
            }
            Happening::Join(machine) => self.join(machine),
            Happening::Remove(machine) => self.remove(machine),
            Happening::Change(change, seen) => self.change(change, &seen)?,
            Happening::Judge => {
                self.judge();
                self.clock.after(Duration::from_secs(2), Happening::Judge);
            }
            Happening::Write => {
                if self.append() {
                    self.outcome.written += 1;
                }
                self.catch_up();
                let pause = self.clock.between(20, 400);
                self.clock.after(pause, Happening::Write);
            }
            Happening::Trouble if !self.calm => {
                let machine = self.clock.between(0, 1_000_000).as_micros() as usize % self.setting.machines;
                match self.clock.between(0, 9).as_millis() {
                    0..=5 if self.up[machine] => self.clock.after(Duration::ZERO, Happening::Crash(machine)),
                    6 if self.up[machine] => self.clock.after(Duration::ZERO, Happening::Wipe(machine)),
                    7.. => self.clock.after(Duration::ZERO, Happening::Remove(machine)),
                    _ => {}
                }
                let pause = self.clock.between(500, 40_000);
                self.clock.after(pause, Happening::Trouble);
            }
            Happening::Trouble => {}
            Happening::Calm => {
                self.calm = true;
                self.note("from here on nothing goes wrong".into());
                for machine in 0..self.setting.machines {
                    self.clock.after(Duration::ZERO, Happening::Boot(machine));
                }
            }
        }
        Ok(())
    }

    fn plan(&mut self, change: Change, seen: &[Member]) {
        let delay = self.clock.between(5, 800);
        self.clock.after(delay, Happening::Change(change, seen.to_vec()));
    }

    fn join(&mut self, machine: usize) {
        if !self.up[machine] || self.disk[machine].is_some() {
            return;
        }
        let seen = self.look();
        // Its own earlier attempt, known by its address: it was added and never started.
        let same = self.members.iter().any(|m| m.machine == machine && m.log == 0);
        let stale: Vec<u64> = match membership::may_join(&seen, &name(machine), same) {
            Ok(stale) => stale.iter().map(|m| m.id).collect(),
            Err(refusal) => {
                self.outcome.refused += 1;
                self.note(format!("m{machine} may not join: {refusal}"));
                if self.setting.ruled {
                    let again = self.clock.between(500, 5000);
                    return self.clock.after(again, Happening::Join(machine));
                }
                Vec::new()
            }
        };
        if let Some(id) = stale.first() {
            // One change at a time: the rest is looked at again.
            self.plan(Change::Remove(*id), &seen);
            let again = self.clock.between(900, 3000);
            return self.clock.after(again, Happening::Join(machine));
        }
        self.plan(Change::Add(machine), &seen);
        let again = self.clock.between(2000, 6000);
        self.clock.after(again, Happening::Join(machine));
    }

    fn remove(&mut self, machine: usize) {
        let seen = self.look();
        match membership::may_remove(&seen, &name(machine)) {
            Ok(member) => {
                let id = member.id;
                self.plan(Change::Remove(id), &seen);
            }
            Err(refusal) => {
                self.outcome.refused += 1;
                self.note(format!("removing m{machine} is refused: {refusal}"));
                let id = self.members.iter().find(|m| m.machine == machine).map(|m| m.id);
                if let Some(id) = id.filter(|_| !self.setting.ruled) {
                    self.plan(Change::Remove(id), &seen);
                }
            }
        }
    }

    fn judge(&mut self) {
        let now = self.clock.now();
        let leader = self.members.iter().map(|m| m.log).max().unwrap_or_default();
        let learners: Vec<Voter> = self.members.iter().filter(|m| m.learner).cloned().collect();
        for learner in learners {
            let (age, still) = (now - learner.joined, now - learner.moved);
            let seen = self.look();
            match judge(Progress { applied: learner.log, leader, age, still }, PATIENCE) {
                // Etcd itself promotes only a member that is there.
                Verdict::Promote if self.works(&learner) => self.plan(Change::Promote(learner.id), &seen),
                Verdict::Remove => self.plan(Change::Remove(learner.id), &seen),
                Verdict::Promote | Verdict::Wait => {}
            }
        }
    }

    fn change(&mut self, change: Change, seen: &[Member]) -> Result<(), Broken> {
        // Etcd refuses a second change of what is not there (any more), and any without a majority.
        let known = |id: &u64| self.members.iter().any(|m| m.id == *id);
        let possible = match &change {
            Change::Remove(id) | Change::Promote(id) => known(id),
            Change::Add(machine) => {
                !self.members.iter().any(|m| m.machine == *machine || m.learner) && self.up[*machine]
            }
        };
        // What was seen has not changed since: then the rules answer for what comes of it.
        let still = seen == self.look();
        if !possible || !self.append() {
            return Ok(());
        }
        let now = self.clock.now();
        match change {
            Change::Remove(id) => {
                self.members.retain(|m| m.id != id);
                self.outcome.removed += 1;
                self.note(format!("member {id} is removed"));
                // Whoever runs it learns that it is no member any more, and begins anew.
                for machine in 0..self.setting.machines {
                    if self.disk[machine] == Some(id) {
                        self.disk[machine] = None;
                        let wait = self.clock.between(1000, 5000);
                        self.clock.after(wait, Happening::Join(machine));
                    }
                }
            }
            Change::Add(machine) => {
                let id = self.next;
                self.next += 1;
                self.disk[machine] = Some(id);
                self.members.push(Voter { id, machine, learner: true, log: 0, joined: now, moved: now });
                self.note(format!("m{machine} is added as {id}"));
            }
            Change::Promote(id) => {
                if let Some(member) = self.members.iter_mut().find(|m| m.id == id && m.learner) {
                    member.learner = false;
                    self.outcome.promoted += 1;
                    self.note(format!("member {id} votes"));
                }
            }
        }
        if still && !self.has_quorum() && !self.lost {
            return Err(self.broken("a step that was allowed lost the quorum".into()));
        }
        Ok(())
    }

    fn catch_up(&mut self) {
        if !self.has_quorum() {
            return;
        }
        let now = self.clock.now();
        let leader = self.voters().filter(|m| self.works(m)).map(|m| m.log).max().unwrap_or_default();
        for index in 0..self.members.len() {
            if !self.works(&self.members[index]) || self.clock.percent(40) {
                continue;
            }
            let member = &mut self.members[index];
            let step = ((leader - member.log.min(leader)) / 3).max(1);
            let log = leader.min(member.log + step);
            if log > member.log {
                (member.log, member.moved) = (log, now);
            }
        }
    }

    fn check(&mut self) -> Result<(), Broken> {
        let learners = self.members.iter().filter(|m| m.learner).count();
        if learners > 1 {
            return Err(self.broken(format!("{learners} members learn at once")));
        }
        if self.lost {
            return Ok(());
        }
        // Any majority may elect: the worst of them is made of those that have least. One without its disk never votes again.
        let need = quorum(self.voters().count());
        let mut logs: Vec<u64> = self.voters().filter(|m| self.disk[m.machine] == Some(m.id)).map(|m| m.log).collect();
        logs.sort_unstable();
        let Some(best) = logs.get(need - 1).copied() else { return Ok(()) };
        if best < self.acknowledged {
            let what = format!("entry {} was acknowledged, and a majority has only {best}", self.acknowledged);
            return Err(self.broken(what));
        }
        Ok(())
    }
}
