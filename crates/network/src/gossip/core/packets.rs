//! Packets that come and go, and what they say of probes that are under way.

use std::{cmp::Reverse, time::Duration};

use foca::{Header, Member, Message};

use super::{ANSWERS, Core, Help, Ignored, Probe, RECENT, Timer, What, millis};
use crate::gossip::{
    id::{Id, Key},
    judge::State,
    wire::{self, Packet},
    word,
};

fn lives(member: &Member<Id>) -> bool {
    member.state() != foca::State::Down
}

impl Core {
    /// Takes note of what SWIM sends.
    pub(super) fn sent(&mut self, now: Duration, to: Id, data: &[u8]) {
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

    pub(super) fn receive(&mut self, now: Duration, from: Key, data: &[u8]) -> Result<(), Ignored> {
        let Packet { header, mut updates, tail } = Packet::read(data).map_err(|_| Ignored::Malformed)?;
        let (src, message) = (header.src, header.message.clone());
        let own = *self.swim.identity();
        if src.key != from {
            return Err(Ignored::Misattributed);
        }
        let known = |key: Key| key == own.key || self.contacts.contains_key(&key);
        if !known(from) || wire::about(&message).is_some_and(|id| !known(id.key)) {
            return Err(Ignored::Unknown);
        }
        let answer = matches!(message, Message::Ack(_) | Message::IndirectAck { .. } | Message::Feed);
        let before = self.incarnation;
        let accused = updates.iter().any(|u| u.id().key == own.key && u.state() == foca::State::Suspect);
        self.heard(now, from, answer);
        // SWIM does not listen to the dead, nor to what is said to a former life of ours.
        let ours = header.dst == own || message == Message::Announce && header.dst.key == own.key;
        let former = |member: &Member<Id>| member.id().born > src.born || *member.id() == src && !lives(member);
        let listens = ours && !self.find(from).is_some_and(former);
        updates.retain(|update| listens && self.concerns(update));
        self.touched.extend(updates.iter().filter_map(|update| {
            let key = update.id().key;
            (self.records.contains(key) || update.state() != foca::State::Alive).then_some(key)
        }));
        if self.records.contains(from) {
            self.touched.insert(from);
        }
        let sender = Member::new(src, header.src_incarnation, foca::State::Alive);
        let announced = listens && message == Message::Announce;
        if announced && !self.may_answer(now) {
            self.apply(now, &[sender], true);
        } else {
            let packet = Packet { header, updates, tail: &[] };
            let data = packet.write();
            let mut updates = packet.updates;
            updates.insert(0, sender);
            self.swim(now, if ours { &updates } else { &[] }, |swim, wishes| swim.handle_data(&data, wishes));
            if announced {
                self.tell_of_the_dead(src);
            }
        }
        match message {
            Message::Ack(number) => self.acknowledged(now, src.key, number),
            Message::ForwardedAck { origin, probe_number } => self.acknowledged(now, origin.key, probe_number),
            _ => {}
        }
        // An answer to whatever we asked shows that it lives and hears us. What it says unasked shows only the former.
        if answer {
            self.vouch(now, from);
        }
        if listens && message != Message::Announce {
            for word in word::read_all(tail) {
                self.listen(now, &word);
            }
        }
        if accused {
            if self.incarnation != before {
                self.counters.accused += 1;
                self.health.accused();
            }
            // The one who said so hears first that it is not so.
            let id = *self.swim.identity();
            self.effects.packets.push((from, wire::gossip(id, self.incarnation, src, Vec::new())));
        }
        if self.records.contains(from) {
            self.refresh(now, from);
        }
        if let Some(record) = self.records.get(from).filter(|r| r.state == State::Suspected && r.id == src) {
            // It has not heard of it, or it would have objected: the news was told as often as it is told.
            let suspicion = vec![Member::new(src, record.incarnation, foca::State::Suspect)];
            let own = *self.swim.identity();
            self.effects.packets.push((from, wire::gossip(own, self.incarnation, src, suspicion)));
        }
        Ok(())
    }

    /// Whether SWIM learns something from this. We cannot talk to those whom we do not know, and must not call them dead
    /// for it. What is said of ourselves it answers at length, though we may have objected long ago.
    fn concerns(&self, update: &Member<Id>) -> bool {
        let (own, id) = (*self.swim.identity(), *update.id());
        if id.key != own.key {
            return self.contacts.get(&id.key).is_some_and(|contact| wire::is_news(contact.member.as_ref(), update));
        }
        match update.state() {
            _ if id != own => id.born > own.born,
            foca::State::Alive => false,
            foca::State::Suspect => update.incarnation() >= self.incarnation,
            foca::State::Down => true,
        }
    }

    /// Whether one more who looks for us is answered: whoever was away for long is looked for by all.
    fn may_answer(&mut self, now: Duration) -> bool {
        if now.saturating_sub(self.answers.1) >= self.times.probe_interval {
            self.answers = (0, now);
        }
        self.answers.0 += 1;
        self.answers.0 <= ANSWERS
    }

    pub(super) fn heard(&mut self, now: Duration, from: Key, answer: bool) {
        if let Some(contact) = self.contacts.get_mut(&from) {
            contact.heard = millis(now).max(1);
            self.recent.retain(|(key, _)| *key != from);
            self.recent.insert(0, (from, contact.heard));
            self.recent.truncate(RECENT);
        }
        if answer {
            self.helps.remove(&from);
        }
        if self.absent.remove(&from).is_some() {
            self.touched.insert(from);
        }
    }

    pub(super) fn acknowledged(&mut self, now: Duration, who: Key, number: u8) {
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
    pub(super) fn vouch(&mut self, now: Duration, who: Key) {
        let Some(probe) = self.probe.as_mut().filter(|probe| probe.id.key == who && !probe.answered) else { return };
        probe.answered = true;
        self.counters.answered += 1;
        let (message, probe_id) = (Message::Ack(probe.number), probe.id);
        let header = Header { src: probe_id, src_incarnation: 0, dst: *self.swim.identity(), message };
        let answer = Packet { header, updates: Vec::new(), tail: &[] }.write();
        let sender = Member::new(probe_id, 0, foca::State::Alive);
        self.swim(now, &[sender], |swim, wishes| swim.handle_data(&answer, wishes));
    }
}
