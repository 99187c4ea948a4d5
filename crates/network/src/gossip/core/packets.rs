//! Packets that come and go, and what they say of probes that are under way.

use std::{cmp::Reverse, time::Duration};

use foca::{Header, Member, Message};

use super::{Core, Help, Ignored, Probe, Timer, What, millis};
use crate::gossip::{
    id::{Id, Key},
    judge::State,
    wire::{self, Packet},
};

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

    pub(super) fn heard(&mut self, now: Duration, from: Key, answer: bool) {
        if let Some(contact) = self.contacts.get_mut(&from) {
            contact.heard = millis(now).max(1);
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
        let message = Message::Ack(probe.number);
        let header = Header { src: probe.id, src_incarnation: 0, dst: *self.swim.identity(), message };
        let answer = Packet { header, updates: Vec::new(), tail: &[] }.write();
        self.swim(now, |swim, wishes| swim.handle_data(&answer, wishes));
    }
}
