//! Who is a member: those on the list, those who are missing, and how one leaves.

use std::{collections::BTreeSet, time::Duration};

use foca::{Header, Member, Message};
use rand10::RngExt as _;

use super::{Contact, Core, FAREWELLS, Leaving, MOST_BYTES, Moved, SEARCH_SELDOM, SEARCHES, millis, transmissions};
use crate::gossip::{
    id::{ENDED, Id, Key, LEFT},
    judge::Record,
    wire::{self, Packet},
    word::{self, Said, Word},
};

/// Of so many dead one packet tells, with two accusers of each.
const DEAD: usize = (MOST_BYTES - wire::EMPTY) / (wire::MEMBER + 2 * word::ROOM);

impl Core {
    pub(super) fn moved(&mut self, now: Duration, moved: Moved) {
        let (key, active) = match moved {
            Moved::Up(key) => (key, true),
            Moved::Down(key) => (key, false),
            Moved::Revived => {
                // Whoever was given up for dead has been away: it listens before it speaks.
                self.incarnation = 0;
                self.probe = None;
                self.counters.revived += 1;
                self.health.late(now + self.times.suspicion);
                self.search_anew(now);
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
            true => {
                contact.searched = 0;
                // Whoever is really missing does not wait behind those who are not.
                self.missing.remove(&(contact.search, key));
                // What was found out about a former life says nothing about this one.
                self.absent.remove(&key);
                self.pulses.remove(&key);
                self.felt.remove(&key);
                self.told.remove(&key);
                self.helps.remove(&key);
                if let Some(probe) = self.probe.as_mut().filter(|probe| probe.id.key == key) {
                    probe.void = true;
                }
            }
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

    pub(super) fn take_roster(&mut self, now: Duration, roster: &BTreeSet<Key>) {
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

    pub(super) fn forget(&mut self, now: Duration, key: Key) {
        if let Some(member) = self.find(key) {
            let id = *member.id();
            let down = Member::new(id, LEFT, foca::State::Down);
            self.apply(now, &[down], false);
            self.swim(now, &[], |swim, wishes| swim.handle_timer(foca::Timer::RemoveDown(id), wishes));
        }
        self.touched.remove(&key);
        self.records.remove(key);
        self.words.forget(key);
        self.judging.remove(&key);
        self.absent.remove(&key);
        self.pulses.remove(&key);
        self.felt.remove(&key);
        self.told.remove(&key);
        self.helps.remove(&key);
        self.recent.retain(|(heard, _)| *heard != key);
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

    /// Everybody that is missing is looked for again soon: we have been away, and they may have come back meanwhile.
    pub(super) fn search_anew(&mut self, now: Duration) {
        self.missing.clear();
        for (key, contact) in self.contacts.iter_mut().filter(|(_, contact)| !contact.active) {
            (contact.searched, contact.search) = (0, millis(now));
            self.missing.insert((contact.search, *key));
        }
    }

    /// One that has been under suspicion for long may have objected, and we are among the few whom the news has not
    /// reached. It hears from us what we think, and answers.
    fn remind(&mut self, now: Duration) {
        let before = now.saturating_sub(self.times.hung / 2);
        let pause = self.times.hung / 4;
        for _ in 0..SEARCHES {
            let due = |record: &Record| record.since < before && now.saturating_sub(record.reminded.1) > pause;
            let Some(record) = self.records.suspected_from(self.reminded, due) else { return };
            record.reminded = (record.reminded.0 + 1, now);
            let (id, incarnation) = (record.id, record.incarnation);
            self.reminded = Key(id.key.0.wrapping_add(1));
            let suspicion = vec![Member::new(id, incarnation, foca::State::Suspect)];
            let own = *self.swim.identity();
            self.effects.packets.push((id.key, wire::gossip(own, self.incarnation, id, suspicion)));
        }
    }

    /// Looks for members that should be there.
    pub(super) fn search(&mut self, now: Duration) {
        self.remind(now);
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
            self.swim(now, &[], |swim, wishes| swim.announce(Id { key, born: 0 }, wishes));
        }
    }

    pub(super) fn leave(&mut self, how: Leaving) {
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
    pub(super) fn tell_of_the_dead(&mut self, to: Id) {
        // Others tell it of others.
        let start = Key(self.random.random());
        let (mut updates, mut tail) = (Vec::new(), Vec::new());
        for record in self.records.dead(start, to.key, DEAD) {
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
}
