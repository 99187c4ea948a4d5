//! The gossip without a socket and without a clock: packets, time and the list of members go in; packets and verdicts
//! come out.
//!
//! SWIM itself is `foca`'s: who is a member, lives and incarnations, direct and indirect probes, and how news spreads
//! (Das, Gupta, Motivala: "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol", 2002).
//! What is added here: a probe that does not fail because a packet was lost or because we were asleep; witnesses that
//! speak in their own name; a judgement in place of SWIM's timer; and the difference between a machine that is dead and
//! a process that is gone.

mod members;
mod packets;
mod records;
#[cfg(test)]
mod tests;
mod verdicts;
mod words;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    num::{NonZeroU8, NonZeroUsize},
    time::Duration,
};

use foca::{Foca, Incarnation, Member, NoCustomBroadcast, Notification, PeriodicParams, Runtime};
use rand10::{SeedableRng as _, rngs::SmallRng};

use self::records::Records;
use super::{
    id::{ByKey, Id, Key},
    judge::{Health, State, Times},
    metrics::Counters,
    wire::{self, Packet, Wire},
    word::Words,
};
use crate::verdict::Verdict;

/// SWIM's packets are no longer than this, so that with what `seal` adds they fit into one frame of any network.
pub const MOST_BYTES: usize = 1200;
/// How many others are asked to probe one that does not answer.
const HELPERS: usize = 3;
/// News is told on at least so often by each who hears it.
const LEAST: u8 = 5;
/// To how many members news is passed on at a time.
const FANOUT: usize = 3;
/// News does not wait for its turn, which is every [`Times::spread`], but no more often than this in a row: what is said in
/// a second is bounded however much happens.
const HASTE: u32 = 4;
/// So many who look for us are answered in a probe interval. Others are heard, and look again.
const ANSWERS: usize = 8;
/// Whether we hear two others than the one who is judged is told by so many.
const RECENT: usize = 3;
/// A member that leaves says so to this many.
const FAREWELLS: usize = 8;
/// How many members that we should know and do not hear of are looked for at a time.
const SEARCHES: usize = 2;
/// So many kernels are asked in a probe interval before their machines are buried; others live until it is their turn.
const ASKS: usize = 256;
/// They are looked for less and less often, down to every this many probe intervals.
const SEARCH_SELDOM: u32 = 50;

/// What happens to a member.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// Time passes.
    Tick,
    /// An authentic packet has arrived.
    Packet {
        /// Whose it is.
        from: Key,
        /// What `Effects::packets` of the other had.
        data: &'a [u8],
    },
    /// A machine has answered that nobody listens there.
    Refused(Key),
    /// A machine's kernel has answered what `Effects::pulses` asked for.
    Pulse(Key),
    /// These are the members that there are, as the API (or a disk) has them. Who is not on the list is not heard.
    Roster(&'a BTreeSet<Key>),
    /// This process ends.
    Leave(Leaving),
}

/// How a member leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// The process ends: its machine and the pods on it live on, and soon it may be back.
    Process,
    /// The machine ends.
    Machine,
}

/// What is thought of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thought {
    /// The verdict.
    pub verdict: Verdict,
    /// How many members have found out for themselves that it does not answer.
    pub accusers: usize,
}

/// What follows from an event.
#[derive(Debug, Default)]
pub struct Effects {
    /// To be sent: to whom, and what.
    pub packets: Vec<(Key, Vec<u8>)>,
    /// Whose kernels are to be asked whether they are there: by something that a kernel answers without any process.
    pub pulses: Vec<Key>,
    /// Of whom we think differently now. `None`: nothing is known.
    pub changed: Vec<(Key, Option<Thought>)>,
    /// When to come back with a [`Event::Tick`].
    pub due: Duration,
    /// Why the packet was not heard.
    pub ignored: Option<Ignored>,
}

/// Why a packet that is authentic was not heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ignored {
    /// It is none.
    Malformed,
    /// It names another sender than it has.
    Misattributed,
    /// It is about somebody whom we do not know.
    Unknown,
}

/// A member that should be there.
#[derive(Clone, Debug, Default)]
struct Contact {
    /// When it was last heard, in milliseconds; 0 for never.
    heard: u64,
    /// Whether SWIM holds it for a member that is not dead.
    active: bool,
    /// How often it was looked for since it was last there.
    searched: u8,
    /// When it is looked for next, if it is not there.
    search: u64,
    /// What was last said of it to the outside.
    shown: Option<Verdict>,
    accusers: u16,
    /// What SWIM has of it: SWIM itself would go through all its members to tell.
    member: Option<Member<Id>>,
}

/// A probe that is under way.
struct Probe {
    id: Id,
    number: u8,
    sent: Duration,
    answered: bool,
    /// We were asleep meanwhile: that it fails says nothing.
    void: bool,
    repeated: bool,
    ping: Vec<u8>,
    asked: Vec<(Key, Vec<u8>)>,
}

/// A probe that somebody has asked us to make.
struct Help {
    id: Id,
    ping: Vec<u8>,
    /// It came to nothing, which counts until then.
    failed: Option<Duration>,
}

enum What {
    Swim(foca::Timer<Id>),
    Repeat(u8),
    AskAgain(u8),
    RepeatHelp(Id),
    EndHelp(Id),
    Judge(Key),
    Present(Key),
    Feel(Key),
    Search,
}

struct Timer {
    at: Duration,
    order: u64,
    what: What,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// What SWIM wants done.
#[derive(Default)]
struct Wishes {
    packets: Vec<(Id, Vec<u8>)>,
    timers: Vec<(foca::Timer<Id>, Duration)>,
    moved: Vec<Moved>,
}

enum Moved {
    Up(Key),
    Down(Key),
    Revived,
}

impl Runtime<Id> for Wishes {
    fn notify(&mut self, notification: Notification<'_, Id>) {
        match notification {
            Notification::MemberUp(id) => self.moved.push(Moved::Up(id.key)),
            Notification::MemberDown(id) => self.moved.push(Moved::Down(id.key)),
            // Another life: what was said of the former one is over.
            Notification::Rename(_, id) => self.moved.push(Moved::Up(id.key)),
            Notification::Rejoin(_) => self.moved.push(Moved::Revived),
            Notification::Active | Notification::Idle | Notification::Defunct => {}
        }
    }

    fn send_to(&mut self, to: Id, data: &[u8]) {
        self.packets.push((to, data.to_vec()));
    }

    fn submit_after(&mut self, event: foca::Timer<Id>, after: Duration) {
        self.timers.push((event, after));
    }
}

/// A member of the gossip.
pub struct Core {
    times: Times,
    swim: Foca<Id, Wire, SmallRng, NoCustomBroadcast>,
    words: Words,
    config: foca::Config,
    random: SmallRng,
    incarnation: Incarnation,
    last: Option<Duration>,
    left: bool,
    timers: BinaryHeap<Reverse<Timer>>,
    /// Timers before the first one of those which have nothing to do when they are due, as things stand.
    idle: Vec<Timer>,
    /// When we said that we come back.
    promised: Duration,
    order: u64,
    contacts: ByKey<Contact>,
    /// Those who were heard last, each once, and when: the last one first.
    recent: Vec<(Key, u64)>,
    active: usize,
    /// Whom to look for, and when, in milliseconds.
    missing: BTreeSet<(u64, Key)>,
    records: Records,
    /// When each of them is judged next.
    judging: BTreeMap<Key, Duration>,
    /// When somebody's kernel last answered anybody.
    pulses: BTreeMap<Key, Duration>,
    /// When it last answered us.
    felt: BTreeMap<Key, Duration>,
    /// When anybody last told that it did.
    told: BTreeMap<Key, Duration>,
    /// How many kernels were asked since when before others are buried.
    asked: (usize, Duration),
    /// Until when a machine's word that nobody listens there holds.
    absent: BTreeMap<Key, Duration>,
    /// How many who look for us were answered since when.
    answers: (usize, Duration),
    /// From whom on we look for the next who has been under suspicion for long.
    reminded: Key,
    /// When news may be told in haste again, by how much was told of late.
    haste: Duration,
    /// The number of our last word.
    spoken: u64,
    /// Whose kernels are asked again and again while they are under suspicion.
    feeling: BTreeSet<Key>,
    probe: Option<Probe>,
    helps: BTreeMap<Key, Help>,
    health: Health,
    touched: BTreeSet<Key>,
    effects: Effects,
    counters: Counters,
}

fn millis(time: Duration) -> u64 {
    time.as_millis() as u64
}

/// How often news is told on by each who hears it: by the logarithm of their number, and more than enough, since packets
/// get lost.
fn transmissions(members: usize) -> NonZeroU8 {
    let count = (4.0 * ((members + 1) as f64).log10()).ceil();
    NonZeroU8::new((count as u8).clamp(LEAST, 20)).unwrap_or(NonZeroU8::MIN)
}

fn config(times: &Times) -> foca::Config {
    let params = |frequency, members| {
        Some(PeriodicParams { frequency, num_members: NonZeroUsize::new(members).unwrap_or(NonZeroUsize::MIN) })
    };
    foca::Config {
        probe_period: times.probe_interval,
        probe_rtt: times.probe_timeout,
        num_indirect_probes: NonZeroUsize::new(HELPERS).unwrap_or(NonZeroUsize::MIN),
        max_transmissions: transmissions(0),
        // Not SWIM's timer decides but `judge`.
        suspect_to_down_after: Duration::MAX,
        remove_down_after: None,
        max_packet_size: NonZeroUsize::new(MOST_BYTES).unwrap_or(NonZeroUsize::MIN),
        notify_down_members: true,
        // What got lost on the way comes with the list of somebody's members.
        periodic_announce: params(times.suspicion * 30, 1),
        // Those who are missing are looked for here.
        periodic_announce_to_down_members: None,
        periodic_gossip: params(times.spread, FANOUT),
    }
}

impl Core {
    /// A member that knows nobody. `born` is later than at any start before; the same `seed` and events give the same
    /// effects.
    pub fn new(key: Key, born: u64, times: Times, seed: u64) -> Core {
        let config = config(&times);
        let id = Id { key, born };
        Core {
            times,
            swim: Foca::new(id, config.clone(), SmallRng::seed_from_u64(seed), Wire),
            words: Words::default(),
            config,
            random: SmallRng::seed_from_u64(!seed),
            incarnation: 0,
            last: None,
            left: false,
            timers: BinaryHeap::new(),
            idle: Vec::new(),
            promised: Duration::MAX,
            order: 0,
            contacts: ByKey::default(),
            recent: Vec::new(),
            active: 0,
            missing: BTreeSet::new(),
            records: Records::default(),
            judging: BTreeMap::new(),
            pulses: BTreeMap::new(),
            felt: BTreeMap::new(),
            told: BTreeMap::new(),
            asked: (0, Duration::ZERO),
            answers: (0, Duration::ZERO),
            reminded: Key(0),
            haste: Duration::ZERO,
            absent: BTreeMap::new(),
            spoken: born,
            feeling: BTreeSet::new(),
            probe: None,
            helps: BTreeMap::new(),
            health: Health::default(),
            touched: BTreeSet::new(),
            effects: Effects::default(),
            counters: Counters::default(),
        }
    }

    /// Takes in what happened.
    pub fn step(&mut self, now: Duration, event: Event<'_>) -> Effects {
        if self.left {
            return Effects { due: now + self.times.alone(), ..Effects::default() };
        }
        self.timers.extend(self.idle.drain(..).map(Reverse));
        // That it was long is our own doing where nothing was due.
        let late = now.saturating_sub(self.promised) > self.times.gap() - self.times.spread;
        match self.last.replace(now) {
            None => self.plan(now, What::Search),
            Some(last) if late && now.saturating_sub(last) > self.times.gap() => self.woke(now, now - last),
            Some(_) => {}
        }
        match event {
            Event::Tick => self.fire(now),
            Event::Packet { from, data } => self.effects.ignored = self.receive(now, from, data).err(),
            Event::Refused(key) => self.refused(now, key),
            Event::Pulse(key) => self.felt(now, key),
            Event::Roster(roster) => self.take_roster(now, roster),
            Event::Leave(how) => self.leave(how),
        }
        self.settle(now);
        self.promised = self.wakes(now);
        Effects { due: self.promised, ..std::mem::take(&mut self.effects) }
    }

    /// When there is something to do. Timers that would find nothing wait for those that do: waking for each of them is most
    /// of what a member costs that has no news.
    fn wakes(&mut self, now: Duration) -> Duration {
        while let Some(Reverse(timer)) = self.timers.peek() {
            if !self.is_idle(&timer.what) {
                return timer.at;
            }
            self.idle.extend(self.timers.pop().map(|Reverse(timer)| timer));
        }
        now + self.times.spread
    }

    fn is_idle(&self, what: &What) -> bool {
        match what {
            What::Repeat(number) | What::AskAgain(number) => {
                self.probe.as_ref().is_none_or(|probe| probe.number != *number || probe.answered)
            }
            What::Swim(foca::Timer::SendIndirectProbe { .. }) => self.probe.as_ref().is_none_or(|probe| probe.answered),
            What::Swim(foca::Timer::PeriodicGossip(_)) => self.words.is_empty() && self.swim.updates_backlog() == 0,
            What::Search => self.missing.is_empty() && self.records.suspected() == 0,
            _ => false,
        }
    }

    /// Takes these lives for known and alive, as if it had been there for long: where a simulation begins in the middle.
    pub fn assume(&mut self, now: Duration, lives: impl Iterator<Item = Id>) {
        let own = self.swim.identity().key;
        let lives: Vec<Member<Id>> = lives.filter(|id| id.key != own).map(Member::alive).collect();
        self.apply(now, &lives, false);
    }

    /// What has been counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How many members are held for alive, and how many of those are under suspicion.
    pub fn members(&self) -> (usize, usize) {
        (self.active, self.records.suspected())
    }

    /// How many times as long as usual others are waited for.
    pub fn stretch(&self) -> u32 {
        self.health.stretch()
    }

    fn plan(&mut self, at: Duration, what: What) {
        self.order += 1;
        self.timers.push(Reverse(Timer { at, order: self.order, what }));
    }

    /// What SWIM has of a member.
    fn find(&self, key: Key) -> Option<&Member<Id>> {
        let found = self.contacts.get(&key).and_then(|contact| contact.member.as_ref());
        debug_assert_eq!(found, self.look_up(key).as_ref().filter(|_| self.contacts.contains_key(&key)));
        found
    }

    /// The same, by going through all of them.
    fn look_up(&self, key: Key) -> Option<Member<Id>> {
        self.swim.iter_membership_state().find(|member| member.id().key == key).cloned()
    }

    /// Takes down that SWIM was told this of a member.
    fn note(&mut self, update: &Member<Id>) {
        if let Some(contact) = self.contacts.get_mut(&update.id().key)
            && wire::is_news(contact.member.as_ref(), update)
        {
            contact.member = Some(update.clone());
        }
    }

    /// Tells SWIM what is so, and whether it is to tell it on.
    fn apply(&mut self, now: Duration, updates: &[Member<Id>], tell: bool) {
        self.swim(now, updates, |swim, wishes| swim.apply_many(updates.iter().cloned(), tell, wishes));
    }

    /// Tells some others at once what there is to tell, unless that was done several times just now: it is told soon in
    /// any case.
    fn hurry(&mut self, now: Duration) {
        if self.haste <= now + self.times.spread * HASTE {
            self.haste = self.haste.max(now) + self.times.spread;
            self.swim(now, &[], |swim, wishes| swim.gossip(wishes));
        }
    }

    /// Whether words may be added to a packet, and are likely to be heard.
    fn hears_words(&self, to: Key, data: &[u8]) -> bool {
        let suspected = self.records.get(to).is_some_and(|record| record.state == State::Suspected);
        !suspected && Packet::header(data).is_ok_and(|header| wire::tells(&header.message))
    }

    /// Lets SWIM do something, and takes its wishes down. These updates are part of it.
    fn swim(
        &mut self,
        now: Duration,
        updates: &[Member<Id>],
        run: impl FnOnce(&mut Foca<Id, Wire, SmallRng, NoCustomBroadcast>, &mut Wishes) -> Result<(), foca::Error>,
    ) {
        let mut wishes = Wishes::default();
        match run(&mut self.swim, &mut wishes) {
            Ok(()) => updates.iter().for_each(|update| self.note(update)),
            Err(_) => {
                self.counters.errors += 1;
                // How far it came is not known.
                for update in updates {
                    let key = update.id().key;
                    let found = self.look_up(key);
                    if let Some(contact) = self.contacts.get_mut(&key) {
                        contact.member = found;
                    }
                }
            }
        }
        for moved in wishes.moved {
            self.moved(now, moved);
        }
        for (to, mut data) in wishes.packets {
            self.sent(now, to, &data);
            if !self.words.is_empty() && self.hears_words(to.key, &data) {
                self.words.tell(now, self.times.alone(), MOST_BYTES - data.len().min(MOST_BYTES), &mut data);
            }
            self.effects.packets.push((to.key, data));
        }
        let stretch = self.health.stretch();
        for (timer, after) in wishes.timers {
            match timer {
                foca::Timer::ChangeSuspectToDown { member_id, incarnation, .. } => {
                    self.note(&Member::new(member_id, incarnation, foca::State::Suspect));
                    self.accuse(now, member_id, incarnation);
                }
                foca::Timer::ProbeRandomMember(_) | foca::Timer::SendIndirectProbe { .. } => {
                    self.plan(now + after * stretch, What::Swim(timer));
                }
                timer => self.plan(now.saturating_add(after), What::Swim(timer)),
            }
        }
    }

    /// We were not given time: what we missed is our own fault, and we listen for a while before we judge again.
    fn woke(&mut self, now: Duration, gap: Duration) {
        self.counters.gaps += 1;
        let until = now + gap.min(self.times.suspicion) + self.times.probe_interval;
        self.health.late(until);
        if let Some(probe) = &mut self.probe {
            probe.void = true;
        }
        self.helps.clear();
        self.records.judged_from(until);
        self.touched.extend(self.records.keys());
        for absent in self.absent.values_mut() {
            *absent = (*absent).max(until);
        }
        // Others may have suspected us meanwhile. Whoever objects before it has heard of it need not stay awake until it
        // has: one that is starved may not be given the time.
        if gap > self.times.probe_interval * 2 && self.active > 0 {
            let suspicion = Member::new(*self.swim.identity(), self.incarnation, foca::State::Suspect);
            self.apply(now, &[suspicion], false);
        }
    }

    fn fire(&mut self, now: Duration) {
        while let Some(Reverse(timer)) = self.timers.peek() {
            if timer.at > now {
                break;
            }
            let Some(Reverse(timer)) = self.timers.pop() else { break };
            self.due(now, timer.at, timer.what);
        }
    }

    fn due(&mut self, now: Duration, at: Duration, what: What) {
        match what {
            What::Swim(timer) => {
                // That the turn to pass on news comes late says nothing: it waits where there is none.
                let waited = matches!(timer, foca::Timer::PeriodicGossip(_));
                if let Some(probe) = &mut self.probe {
                    probe.void |= !waited && now - at > self.times.probe_timeout;
                }
                match timer {
                    foca::Timer::ProbeRandomMember(_) => self.end_probe(now),
                    foca::Timer::SendIndirectProbe { .. } => {
                        let unanswered = self.probe.iter().filter(|probe| !probe.answered);
                        self.effects.pulses.extend(unanswered.map(|probe| probe.id.key));
                    }
                    foca::Timer::PeriodicGossip(_) => {
                        // SWIM does so if it has news itself.
                        if !self.words.is_empty() && self.swim.updates_backlog() == 0 {
                            self.swim(now, &[], |swim, wishes| swim.gossip(wishes));
                        }
                        self.haste = self.haste.max(now) + self.times.spread;
                    }
                    _ => {}
                }
                self.swim(now, &[], |swim, wishes| swim.handle_timer(timer, wishes));
            }
            What::Repeat(number) => {
                if let Some(probe) = self.probe.as_mut().filter(|p| p.number == number && !p.answered) {
                    probe.repeated = true;
                    self.effects.packets.push((probe.id.key, probe.ping.clone()));
                }
            }
            What::AskAgain(number) => {
                if let Some(probe) = self.probe.as_ref().filter(|p| p.number == number && !p.answered) {
                    self.effects.packets.extend(probe.asked.iter().cloned());
                }
            }
            What::RepeatHelp(id) => {
                if let Some(help) = self.helps.get(&id.key).filter(|help| help.id == id) {
                    self.effects.packets.push((id.key, help.ping.clone()));
                    self.effects.pulses.push(id.key);
                }
            }
            What::EndHelp(id) => {
                let late = now - at > self.times.probe_timeout || self.health.quiet(now);
                let counts = now + self.times.probe_interval * 2;
                match self.helps.get_mut(&id.key).filter(|help| help.id == id) {
                    Some(_) if late => drop(self.helps.remove(&id.key)),
                    Some(help) => {
                        help.failed = Some(counts);
                        // The one who asked us may have found out before.
                        self.touched.insert(id.key);
                    }
                    None => {}
                }
            }
            What::Judge(key) => {
                if self.judging.get(&key) == Some(&at) {
                    self.judging.remove(&key);
                    self.touched.insert(key);
                }
            }
            What::Present(key) => {
                if self.absent.get(&key).is_some_and(|until| *until <= now) {
                    self.absent.remove(&key);
                    if let Some(record) = self.records.get_mut(key) {
                        record.from = now;
                    }
                    self.touched.insert(key);
                }
            }
            What::Feel(key) => {
                if self.records.get(key).is_some_and(|record| record.state == State::Suspected) {
                    self.effects.pulses.push(key);
                    self.plan(now + self.times.suspicion, What::Feel(key));
                } else {
                    self.feeling.remove(&key);
                }
            }
            What::Search => {
                self.search(now);
                self.plan(now + self.times.spread, What::Search);
            }
        }
    }

    /// The time of a probe is over.
    fn end_probe(&mut self, now: Duration) {
        let Some(probe) = &self.probe else { return };
        let key = probe.id.key;
        if probe.answered {
            self.health.answered();
        } else if probe.void || self.health.quiet(now) || self.absent.contains_key(&key) {
            self.counters.void += 1;
            self.vouch(now, key);
        } else {
            self.counters.failed += 1;
            self.health.failed(key);
        }
        self.probe = None;
    }
}
