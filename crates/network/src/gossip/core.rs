//! The gossip without a socket and without a clock: packets, time and the list of members go in; packets and verdicts
//! come out.
//!
//! SWIM itself is `foca`'s: who is a member, lives and incarnations, direct and indirect probes, and how news spreads
//! (Das, Gupta, Motivala: "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol", 2002).
//! What is added here: a probe that does not fail because a packet was lost or because we were asleep; witnesses that
//! speak in their own name; a judgement in place of SWIM's timer; and the difference between a machine that is dead and
//! a process that is gone.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    num::{NonZeroU8, NonZeroUsize},
    sync::mpsc::Receiver,
    time::Duration,
};

use foca::{Foca, Header, Incarnation, Member, Message, Notification, PeriodicParams, Runtime};
use rand10::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use super::{
    id::{ENDED, Id, Key, LEFT},
    judge::{Health, Record, State, Times, View, judge},
    metrics::Counters,
    wire::{self, Packet, Wire},
    word::{Ear, Said, Word},
};
use crate::verdict::Verdict;

/// SWIM's packets are no longer than this, so that with what `seal` adds they fit into one frame of any network.
pub const MOST_BYTES: usize = 1200;
/// How many others are asked to probe one that does not answer.
const HELPERS: usize = 3;
/// To how many members news is passed on at a time.
const FANOUT: usize = 3;
/// A member that leaves says so to this many.
const FAREWELLS: usize = 8;
/// How many members that we should know and do not hear of are looked for at a time.
const SEARCHES: usize = 2;
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
#[derive(Clone, Copy, Debug, Default)]
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
    swim: Foca<Id, Wire, SmallRng, Ear>,
    words: Receiver<Word>,
    config: foca::Config,
    random: SmallRng,
    incarnation: Incarnation,
    last: Option<Duration>,
    left: bool,
    timers: BinaryHeap<Reverse<Timer>>,
    order: u64,
    contacts: BTreeMap<Key, Contact>,
    active: usize,
    /// Whom to look for, and when, in milliseconds.
    missing: BTreeSet<(u64, Key)>,
    records: BTreeMap<Key, Record>,
    /// When each of them is judged next.
    judging: BTreeMap<Key, Duration>,
    /// When somebody's kernel last answered anybody.
    pulses: BTreeMap<Key, Duration>,
    /// When it last answered us.
    felt: BTreeMap<Key, Duration>,
    /// Until when a machine's word that nobody listens there holds.
    absent: BTreeMap<Key, Duration>,
    said_absent: BTreeMap<Key, Duration>,
    /// How often we have said something of somebody: each time is told on anew.
    said: BTreeMap<Key, u16>,
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
    NonZeroU8::new((count as u8).clamp(5, 20)).unwrap_or(NonZeroU8::MIN)
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
        let (ear, words) = Ear::new();
        let config = config(&times);
        let id = Id { key, born };
        Core {
            times,
            swim: Foca::with_custom_broadcast(id, config.clone(), SmallRng::seed_from_u64(seed), Wire, ear),
            words,
            config,
            random: SmallRng::seed_from_u64(!seed),
            incarnation: 0,
            last: None,
            left: false,
            timers: BinaryHeap::new(),
            order: 0,
            contacts: BTreeMap::new(),
            active: 0,
            missing: BTreeSet::new(),
            records: BTreeMap::new(),
            judging: BTreeMap::new(),
            pulses: BTreeMap::new(),
            felt: BTreeMap::new(),
            absent: BTreeMap::new(),
            said_absent: BTreeMap::new(),
            said: BTreeMap::new(),
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
        match self.last.replace(now) {
            None => self.plan(now, What::Search),
            Some(last) if now.saturating_sub(last) > self.times.gap() => self.woke(now, now - last),
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
        let mut effects = std::mem::take(&mut self.effects);
        effects.due = self.timers.peek().map_or(now + self.times.spread, |Reverse(timer)| timer.at);
        effects
    }

    /// Takes these lives for known and alive, as if it had been there for long: where a simulation begins in the middle.
    pub fn assume(&mut self, now: Duration, lives: impl Iterator<Item = Id>) {
        let own = self.swim.identity().key;
        let lives = lives.filter(|id| id.key != own).map(Member::alive);
        self.swim(now, |swim, wishes| swim.apply_many(lives, false, wishes));
    }

    /// What has been counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How many members are held for alive, and how many of those are under suspicion.
    pub fn members(&self) -> (usize, usize) {
        (self.active, self.suspected())
    }

    /// How many times as long as usual others are waited for.
    pub fn stretch(&self) -> u32 {
        self.health.stretch()
    }

    fn suspected(&self) -> usize {
        self.records.values().filter(|record| record.state == State::Suspected).count()
    }

    fn plan(&mut self, at: Duration, what: What) {
        self.order += 1;
        self.timers.push(Reverse(Timer { at, order: self.order, what }));
    }

    fn find(&self, key: Key) -> Option<Member<Id>> {
        self.swim.iter_membership_state().find(|member| member.id().key == key).cloned()
    }

    /// Lets SWIM do something, and takes its wishes down.
    fn swim(
        &mut self,
        now: Duration,
        run: impl FnOnce(&mut Foca<Id, Wire, SmallRng, Ear>, &mut Wishes) -> Result<(), foca::Error>,
    ) {
        let mut wishes = Wishes::default();
        if run(&mut self.swim, &mut wishes).is_err() {
            self.counters.errors += 1;
        }
        for moved in wishes.moved {
            self.moved(now, moved);
        }
        for (to, data) in wishes.packets {
            self.sent(now, to, &data);
            self.effects.packets.push((to.key, data));
        }
        let stretch = self.health.stretch();
        for (timer, after) in wishes.timers {
            match timer {
                foca::Timer::ChangeSuspectToDown { member_id, incarnation, .. } => {
                    self.accuse(now, member_id, incarnation);
                }
                foca::Timer::ProbeRandomMember(_) | foca::Timer::SendIndirectProbe { .. } => {
                    self.plan(now + after * stretch, What::Swim(timer));
                }
                timer => self.plan(now.saturating_add(after), What::Swim(timer)),
            }
        }
    }

    fn moved(&mut self, now: Duration, moved: Moved) {
        let (key, active) = match moved {
            Moved::Up(key) => (key, true),
            Moved::Down(key) => (key, false),
            Moved::Revived => {
                // Whoever was given up for dead has been away: it listens before it speaks.
                self.incarnation = 0;
                self.probe = None;
                self.counters.revived += 1;
                self.health.late(now + self.times.suspicion);
                return;
            }
        };
        self.touched.insert(key);
        let was = self.active;
        let Some(contact) = self.contacts.get_mut(&key) else { return };
        if contact.active != active {
            contact.active = active;
            self.active = if active { self.active + 1 } else { self.active - 1 };
        }
        match active {
            true => contact.searched = 0,
            false => {
                self.missing.remove(&(contact.search, key));
                contact.search = millis(now + self.times.probe_interval);
                self.missing.insert((contact.search, key));
            }
        }
        let before = transmissions(was);
        let after = transmissions(self.active);
        if before != after {
            self.config.max_transmissions = after;
            let _ = self.swim.set_config(self.config.clone());
        }
    }

    /// Takes note of what SWIM sends.
    fn sent(&mut self, now: Duration, to: Id, data: &[u8]) {
        let Ok(header) = Packet::header(data) else { return };
        self.incarnation = header.src_incarnation;
        let stretch = self.health.stretch();
        let rest = (self.times.probe_interval - self.times.probe_timeout) * stretch;
        match header.message {
            Message::Ping(number) => {
                self.counters.probes += 1;
                self.probe = Some(Probe {
                    id: to,
                    number,
                    sent: now,
                    answered: false,
                    void: false,
                    repeated: false,
                    ping: data.to_vec(),
                    asked: Vec::new(),
                });
                for third in 1..3 {
                    self.plan(now + self.times.probe_timeout * stretch * third / 3, What::Repeat(number));
                }
            }
            Message::PingReq { probe_number, .. } => {
                if let Some(probe) = &mut self.probe {
                    if probe.asked.is_empty() {
                        self.counters.indirect += 1;
                        self.order += 1;
                        let what = What::AskAgain(probe_number);
                        self.timers.push(Reverse(Timer { at: now + rest / 3, order: self.order, what }));
                    }
                    probe.asked.push((to.key, data.to_vec()));
                }
            }
            Message::IndirectPing { .. } => {
                self.helps.insert(to.key, Help { id: to, ping: data.to_vec(), failed: None });
                self.plan(now + rest / 3, What::RepeatHelp(to));
                self.plan(now + rest * 2 / 3, What::EndHelp(to));
            }
            _ => {}
        }
    }

    fn receive(&mut self, now: Duration, from: Key, data: &[u8]) -> Result<(), Ignored> {
        let mut packet = Packet::read(data).map_err(|_| Ignored::Malformed)?;
        let Header { src, ref message, .. } = packet.header;
        let own = self.swim.identity().key;
        if src.key != from {
            return Err(Ignored::Misattributed);
        }
        let known = |key: Key| key == own || self.contacts.contains_key(&key);
        if !known(from) || wire::about(message).is_some_and(|id| !known(id.key)) {
            return Err(Ignored::Unknown);
        }
        // We cannot talk to those whom we do not know, and must not call them dead for it.
        let strangers = packet.updates.iter().filter(|update| !known(update.id().key)).count();
        let message = message.clone();
        let answer = matches!(message, Message::Ack(_) | Message::IndirectAck { .. } | Message::Feed);
        let before = self.incarnation;
        let accused = packet.updates.iter().any(|u| u.id().key == own && u.state() == foca::State::Suspect);
        self.heard(now, from, answer);
        self.touched.extend(packet.updates.iter().filter_map(|update| {
            let noted = self.records.contains_key(&update.id().key);
            (noted || update.state() != foca::State::Alive).then_some(update.id().key)
        }));
        if self.records.contains_key(&from) {
            self.touched.insert(from);
        }
        if strangers > 0 {
            packet.updates.retain(|update| update.id().key == own || self.contacts.contains_key(&update.id().key));
            let data = packet.write();
            self.swim(now, |swim, wishes| swim.handle_data(&data, wishes));
        } else {
            self.swim(now, |swim, wishes| swim.handle_data(data, wishes));
        }
        match message {
            Message::Ack(number) => self.acknowledged(now, src.key, number),
            Message::ForwardedAck { origin, probe_number } => self.acknowledged(now, origin.key, probe_number),
            Message::Announce => self.tell_of_the_dead(src),
            _ => {}
        }
        // An answer to whatever we asked shows that it lives and hears us. What it says unasked shows only the former.
        if answer {
            self.vouch(now, from);
        }
        self.listen(now);
        if accused && self.incarnation != before {
            self.counters.accused += 1;
            self.health.accused();
            // The one who said so hears first that it is not so.
            let id = *self.swim.identity();
            self.effects.packets.push((from, wire::gossip(id, self.incarnation, src, Vec::new())));
        }
        if self.records.contains_key(&from) {
            self.refresh(now, from);
        }
        if let Some(record) = self.records.get(&from).filter(|r| r.state == State::Suspected && r.id == src) {
            // It has not heard of it, or it would have objected: the news was told as often as it is told.
            let suspicion = vec![Member::new(src, record.incarnation, foca::State::Suspect)];
            let own = *self.swim.identity();
            self.effects.packets.push((from, wire::gossip(own, self.incarnation, src, suspicion)));
        }
        Ok(())
    }

    fn heard(&mut self, now: Duration, from: Key, answer: bool) {
        if let Some(contact) = self.contacts.get_mut(&from) {
            contact.heard = millis(now).max(1);
        }
        if answer {
            self.helps.remove(&from);
        }
        self.said_absent.remove(&from);
        if self.absent.remove(&from).is_some() {
            self.touched.insert(from);
        }
    }

    fn acknowledged(&mut self, now: Duration, who: Key, number: u8) {
        if let Some(probe) = self.probe.as_mut().filter(|p| p.id.key == who && p.number == number && !p.answered) {
            probe.answered = true;
            self.counters.answered += 1;
            // Whose answer it is cannot be told when there was more than one question (Karn's algorithm).
            if !probe.repeated {
                self.counters.round_trip(now - probe.sent);
            }
        }
    }

    /// A probe of this member has succeeded, whatever SWIM has seen: it has no way to be told, so it is answered.
    fn vouch(&mut self, now: Duration, who: Key) {
        let Some(probe) = self.probe.as_mut().filter(|probe| probe.id.key == who && !probe.answered) else { return };
        probe.answered = true;
        self.counters.answered += 1;
        let message = Message::Ack(probe.number);
        let header = Header { src: probe.id, src_incarnation: 0, dst: *self.swim.identity(), message };
        let answer = Packet { header, updates: Vec::new(), tail: &[] }.write();
        self.swim(now, |swim, wishes| swim.handle_data(&answer, wishes));
    }

    /// Our probe of a member has failed. SWIM suspects it from now on; whether we say so too depends on how we are.
    fn accuse(&mut self, now: Duration, id: Id, incarnation: Incarnation) {
        self.touched.insert(id.key);
        if self.health.doubts() || self.health.quiet(now) {
            return;
        }
        self.testify(now, id, incarnation);
        // It hears of it at once, and can object.
        let own = *self.swim.identity();
        let suspicion = vec![Member::new(id, incarnation, foca::State::Suspect)];
        self.effects.packets.push((id.key, wire::gossip(own, self.incarnation, id, suspicion)));
        self.swim(now, |swim, wishes| swim.gossip(wishes));
    }

    /// Says in our own name that somebody does not answer, and whether its kernel does.
    fn testify(&mut self, now: Duration, id: Id, incarnation: Incarnation) {
        if self.felt.get(&id.key).is_some_and(|at| now - *at < self.times.probe_interval * 2) {
            self.say(now, Said::Pulse, id, incarnation);
        }
        self.say(now, Said::Silent, id, incarnation);
        self.plan(now + self.times.suspicion, What::Feel(id.key));
    }

    /// A kernel has answered.
    fn felt(&mut self, now: Duration, key: Key) {
        self.felt.insert(key, now);
        let before = self.pulses.insert(key, now);
        self.touched.insert(key);
        let Some(record) = self.records.get(&key).filter(|record| record.state == State::Suspected) else { return };
        let (id, incarnation) = (record.id, record.incarnation);
        // The others need not hear it from everybody.
        if before.is_none_or(|at| now - at > self.times.suspicion / 2) {
            self.say(now, Said::Pulse, id, incarnation);
            self.swim(now, |swim, wishes| swim.gossip(wishes));
        }
    }

    fn say(&mut self, now: Duration, said: Said, about: Id, incarnation: Incarnation) {
        let count = self.said.entry(about.key).or_default();
        *count = count.wrapping_add(1);
        let count = *count;
        let word = Word { said, about, incarnation, by: self.swim.identity().key, count };
        if self.swim.add_broadcast(&word.write()).is_err() {
            self.counters.errors += 1;
        }
        self.listen(now);
    }

    /// Takes in the words that have come.
    fn listen(&mut self, now: Duration) {
        while let Ok(word) = self.words.try_recv() {
            let key = word.about.key;
            if key != self.swim.identity().key && !self.contacts.contains_key(&key) {
                continue;
            }
            match word.said {
                Said::Absent => {
                    let heard = self.contacts.get(&key).map_or(0, |contact| contact.heard);
                    // Who has just heard it itself knows better.
                    if millis(now).saturating_sub(heard) > millis(self.times.probe_interval) || heard == 0 {
                        self.absent(now, key);
                    }
                }
                Said::Pulse => {
                    self.pulses.insert(key, now);
                    self.touched.insert(key);
                }
                Said::Silent => self.take_accusation(now, &word),
            }
        }
    }

    fn take_accusation(&mut self, now: Duration, word: &Word) {
        let key = word.about.key;
        let own = *self.swim.identity();
        if key == own.key && word.about != own {
            return;
        }
        if let Some(member) = self.find(key) {
            let newer = *member.id() != word.about || member.incarnation() > word.incarnation;
            if newer {
                return;
            }
        }
        // The word may be here before SWIM's own news; about ourselves, it makes us object.
        let suspicion = Member::new(word.about, word.incarnation, foca::State::Suspect);
        self.swim(now, |swim, wishes| swim.apply_many(std::iter::once(suspicion), true, wishes));
        self.refresh(now, key);
        if let Some(record) = self.records.get_mut(&key).filter(|r| r.id == word.about) {
            record.accusers.insert(word.by);
            self.touched.insert(key);
        }
    }

    fn absent(&mut self, now: Duration, key: Key) {
        let until = now + self.times.absence();
        self.absent.insert(key, until);
        self.plan(until, What::Present(key));
        self.touched.insert(key);
    }

    fn refused(&mut self, now: Duration, key: Key) {
        if !self.contacts.contains_key(&key) {
            return;
        }
        self.counters.refused += 1;
        self.vouch(now, key);
        self.helps.remove(&key);
        if self.said_absent.get(&key).is_some_and(|at| now - *at < self.times.absence() / 4) {
            return;
        }
        let Some(member) = self.find(key) else { return };
        self.said_absent.insert(key, now);
        self.absent(now, key);
        self.say(now, Said::Absent, *member.id(), member.incarnation());
        self.swim(now, |swim, wishes| swim.gossip(wishes));
    }

    fn take_roster(&mut self, now: Duration, roster: &BTreeSet<Key>) {
        let own = self.swim.identity().key;
        let gone: Vec<Key> = self.contacts.keys().filter(|key| !roster.contains(key)).copied().collect();
        for key in gone {
            self.forget(now, key);
        }
        for key in roster.iter().filter(|key| **key != own) {
            if !self.contacts.contains_key(key) {
                self.contacts.insert(*key, Contact { search: millis(now), ..Contact::default() });
                self.missing.insert((millis(now), *key));
            }
        }
    }

    fn forget(&mut self, now: Duration, key: Key) {
        if let Some(member) = self.find(key) {
            let id = *member.id();
            let down = Member::new(id, LEFT, foca::State::Down);
            self.swim(now, |swim, wishes| {
                swim.apply_many(std::iter::once(down), false, &mut *wishes)?;
                swim.handle_timer(foca::Timer::RemoveDown(id), wishes)
            });
        }
        self.touched.remove(&key);
        self.records.remove(&key);
        self.judging.remove(&key);
        self.absent.remove(&key);
        self.said_absent.remove(&key);
        self.said.remove(&key);
        self.pulses.remove(&key);
        self.felt.remove(&key);
        self.helps.remove(&key);
        if let Some(contact) = self.contacts.remove(&key) {
            self.missing.remove(&(contact.search, key));
            if contact.active {
                self.active -= 1;
            }
            if contact.shown.is_some() {
                self.effects.changed.push((key, None));
            }
        }
    }

    fn leave(&mut self, how: Leaving) {
        let id = *self.swim.identity();
        let incarnation = match how {
            Leaving::Process => LEFT,
            Leaving::Machine => ENDED,
        };
        let mut others: Vec<Id> = self.swim.iter_members().map(|member| *member.id()).collect();
        for _ in FAREWELLS..others.len() {
            others.swap_remove(self.random.random_range(0..others.len()));
        }
        for other in others {
            let gone = vec![Member::new(id, incarnation, foca::State::Down)];
            let farewell = wire::gossip(id, self.incarnation, other, gone);
            // There is no later to say it again.
            self.effects.packets.extend([(other.key, farewell.clone()), (other.key, farewell)]);
        }
        self.left = true;
    }

    /// Whoever comes learns from SWIM who lives; who is dead, and by whose word, it learns from this.
    fn tell_of_the_dead(&mut self, to: Id) {
        let dead = self.records.values().filter(|record| record.state == State::Dead && record.id.key != to.key);
        let (mut updates, mut tail) = (Vec::new(), Vec::new());
        for record in dead.take(15) {
            updates.push(Member::new(record.id, record.incarnation, foca::State::Down));
            for by in record.accusers.iter().take(2) {
                let (about, incarnation) = (record.id, record.incarnation);
                let word = Word { said: Said::Silent, about, incarnation, by: *by, count: 0 }.write();
                tail.extend_from_slice(&(word.len() as u16).to_be_bytes());
                tail.extend(word);
            }
        }
        if !updates.is_empty() {
            let (src, src_incarnation) = (*self.swim.identity(), self.incarnation);
            let header = Header { src, src_incarnation, dst: to, message: Message::Gossip };
            let packet = Packet { header, updates, tail: &tail }.write();
            self.effects.packets.push((to.key, packet));
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
        for record in self.records.values_mut() {
            record.from = until;
        }
        self.touched.extend(self.records.keys());
        for absent in self.absent.values_mut() {
            *absent = (*absent).max(until);
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
                if let Some(probe) = &mut self.probe {
                    probe.void |= now - at > self.times.probe_timeout;
                }
                match timer {
                    foca::Timer::ProbeRandomMember(_) => self.end_probe(now),
                    foca::Timer::SendIndirectProbe { .. } => {
                        let unanswered = self.probe.iter().filter(|probe| !probe.answered);
                        self.effects.pulses.extend(unanswered.map(|probe| probe.id.key));
                    }
                    _ => {}
                }
                self.swim(now, |swim, wishes| swim.handle_timer(timer, wishes));
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
                    if let Some(record) = self.records.get_mut(&key) {
                        record.from = now;
                    }
                    self.touched.insert(key);
                }
            }
            What::Feel(key) => {
                if self.records.get(&key).is_some_and(|record| record.state == State::Suspected) {
                    self.effects.pulses.push(key);
                    self.plan(now + self.times.suspicion, What::Feel(key));
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

    /// Looks for members that should be there.
    fn search(&mut self, now: Duration) {
        for _ in 0..SEARCHES {
            let Some((_, key)) = self.missing.first().filter(|(at, _)| *at <= millis(now)).copied() else { return };
            self.missing.pop_first();
            let Some(contact) = self.contacts.get_mut(&key).filter(|contact| !contact.active) else { continue };
            contact.searched = contact.searched.saturating_add(1);
            let seldom = 1u32.checked_shl(u32::from(contact.searched)).unwrap_or(u32::MAX).min(SEARCH_SELDOM);
            // Not all who miss somebody look for it at the same time.
            let pause = (self.times.probe_interval * seldom).mul_f64(0.75 + 0.5 * self.random.random::<f64>());
            contact.search = millis(now + pause);
            self.missing.insert((contact.search, key));
            // Which life of it does not matter for this.
            self.swim(now, |swim, wishes| swim.announce(Id { key, born: 0 }, wishes));
        }
    }

    /// Brings our records up to what SWIM has, judges them, and says what has changed.
    fn settle(&mut self, now: Duration) {
        // Judging one may change what is known of another.
        for _ in 0..8 {
            if self.touched.is_empty() {
                break;
            }
            for key in std::mem::take(&mut self.touched) {
                self.refresh(now, key);
                let verdict = self.verdict(now, key);
                self.show(key, verdict);
            }
        }
    }

    fn refresh(&mut self, now: Duration, key: Key) {
        let Some(member) = self.find(key) else {
            self.records.remove(&key);
            return;
        };
        let (id, incarnation) = (*member.id(), member.incarnation());
        let state = match member.state() {
            foca::State::Alive => {
                if let Some(record) = self.records.remove(&key)
                    && record.id == id
                    && record.state == State::Suspected
                {
                    self.counters.refuted += 1;
                }
                return;
            }
            foca::State::Suspect => State::Suspected,
            foca::State::Down if incarnation == LEFT => State::Left,
            foca::State::Down => State::Dead,
        };
        let same = |r: &&mut Record| r.id == id && (r.incarnation == incarnation || state != State::Suspected);
        match self.records.get_mut(&key).filter(same) {
            Some(record) => {
                if record.state != state {
                    record.state = state;
                    if state == State::Dead {
                        self.counters.deaths += 1;
                    }
                }
            }
            None => {
                match state {
                    State::Suspected => self.counters.suspicions += 1,
                    State::Dead => self.counters.deaths += 1,
                    State::Left => {}
                }
                let record = Record {
                    id,
                    incarnation,
                    since: now,
                    from: now,
                    held: now,
                    pulse: None,
                    accusers: BTreeSet::new(),
                    state,
                };
                self.records.insert(key, record);
            }
        }
        // Somebody asked us to probe it, and it did not answer us either.
        if state == State::Suspected
            && let Some(help) = self.helps.get(&key)
            && help.id == id
            && help.failed.is_some_and(|until| now < until)
            && !self.health.doubts()
        {
            self.helps.remove(&key);
            self.testify(now, id, incarnation);
        }
        if let Some(record) = self.records.get_mut(&key) {
            let pulse = self.pulses.get(&key).copied();
            record.pulse = pulse.filter(|at| *at + self.times.probe_interval * 2 >= record.since);
        }
    }

    fn verdict(&mut self, now: Duration, key: Key) -> Option<Verdict> {
        if self.absent.contains_key(&key) {
            return None;
        }
        let contact = self.contacts.get(&key)?;
        let Some(record) = self.records.get(&key) else { return contact.active.then_some(Verdict::Alive) };
        match record.state {
            State::Left => None,
            State::Dead => Some(Verdict::Dead),
            State::Suspected => {
                let late = millis(now.saturating_sub(self.times.late() * self.health.stretch())).max(1);
                let heard = self.contacts.iter().filter(|(k, c)| **k != key && c.heard >= late).take(2).count();
                let view =
                    View { members: self.active + 1, suspected: self.suspected(), heard, doubt: self.health.doubts() };
                let judged = judge(now, record, view, &self.times);
                if judged.verdict == Verdict::Dead {
                    let down = Member::new(record.id, record.incarnation, foca::State::Down);
                    self.swim(now, |swim, wishes| {
                        swim.apply_many(std::iter::once(down), true, &mut *wishes)?;
                        swim.gossip(wishes)
                    });
                } else {
                    if judged.held
                        && let Some(record) = self.records.get_mut(&key)
                    {
                        record.held = now;
                    }
                    self.judge_at(now, judged.again, key);
                }
                Some(judged.verdict)
            }
        }
    }

    /// One that is judged before that time anyway is judged again then.
    fn judge_at(&mut self, now: Duration, at: Duration, key: Key) {
        if !self.judging.get(&key).is_some_and(|next| *next > now && *next <= at) {
            self.judging.insert(key, at);
            self.plan(at, What::Judge(key));
        }
    }

    fn show(&mut self, key: Key, verdict: Option<Verdict>) {
        let accusers = match verdict {
            Some(Verdict::Suspect | Verdict::Dead) => self.records.get(&key).map_or(0, |r| r.accusers.len()),
            _ => 0,
        };
        let Some(contact) = self.contacts.get_mut(&key) else { return };
        let count = u16::try_from(accusers).unwrap_or(u16::MAX);
        if contact.shown != verdict || contact.accusers != count {
            contact.shown = verdict;
            contact.accusers = count;
            let thought = verdict.map(|verdict| Thought { verdict, accusers });
            self.effects.changed.push((key, thought));
        }
    }
}
