//! What is said of others: by us, when a probe of ours has failed, and by them.

use std::time::Duration;

use foca::{Incarnation, Member};

use super::{Core, What, millis};
use crate::gossip::{
    id::{Id, Key},
    judge::State,
    wire,
    word::{Said, Word},
};

impl Core {
    /// Our probe of a member has failed. SWIM suspects it from now on; whether we say so too depends on how we are.
    pub(super) fn accuse(&mut self, now: Duration, id: Id, incarnation: Incarnation) {
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
    pub(super) fn testify(&mut self, now: Duration, id: Id, incarnation: Incarnation) {
        if self.felt.get(&id.key).is_some_and(|at| now - *at < self.times.probe_interval * 2) {
            self.say(now, Said::Pulse, id, incarnation);
        }
        self.say(now, Said::Silent, id, incarnation);
        self.plan(now + self.times.suspicion, What::Feel(id.key));
    }

    /// A kernel has answered.
    pub(super) fn felt(&mut self, now: Duration, key: Key) {
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

    pub(super) fn say(&mut self, now: Duration, said: Said, about: Id, incarnation: Incarnation) {
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
    pub(super) fn listen(&mut self, now: Duration) {
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

    pub(super) fn take_accusation(&mut self, now: Duration, word: &Word) {
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

    pub(super) fn absent(&mut self, now: Duration, key: Key) {
        let until = now + self.times.absence();
        self.absent.insert(key, until);
        self.plan(until, What::Present(key));
        self.touched.insert(key);
    }

    pub(super) fn refused(&mut self, now: Duration, key: Key) {
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
}
