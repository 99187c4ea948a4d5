//! What is said of others: by us, when a probe of ours has failed, and by them.

use std::time::Duration;

use foca::{Incarnation, Member};

use super::{ASKS, Core, LEAST, SEARCH_SELDOM, What, millis};
use crate::gossip::{
    id::{Id, Key},
    judge::{ACCUSERS, Record, State},
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
        self.hurry(now);
    }

    /// Says in our own name that somebody does not answer, and whether its kernel does.
    pub(super) fn testify(&mut self, now: Duration, id: Id, incarnation: Incarnation) {
        let own = self.swim.identity().key;
        let same = |record: &&Record| record.id == id && record.incarnation == incarnation;
        // Everybody hears every word: of many who would say the same, some are enough, and not every time.
        if let Some(record) = self.records.get(id.key).filter(same) {
            let early = record.testified.is_some_and(|at| now.saturating_sub(at) < self.times.alone());
            if early || record.accusers.len() >= ACCUSERS && !record.accusers.contains(&own) {
                return;
            }
        }
        self.counters.accusations += 1;
        if self.felt.get(&id.key).is_some_and(|at| now - *at < self.times.probe_interval * 2) {
            self.tell_pulse(now, id, incarnation);
        }
        self.say(now, Said::Silent, id, incarnation);
        if let Some(record) = self.records.get_mut(id.key).filter(|record| record.id == id) {
            record.testified = Some(now);
        }
        // Told of it several times, we still ask its kernel once at a time.
        if self.feeling.insert(id.key) {
            self.plan(now + self.times.suspicion, What::Feel(id.key));
        }
    }

    /// A kernel has answered.
    pub(super) fn felt(&mut self, now: Duration, key: Key) {
        self.felt.insert(key, now);
        self.pulses.insert(key, now);
        self.touched.insert(key);
        let Some(record) = self.records.get_mut(key).filter(|record| record.state == State::Suspected) else { return };
        record.asked.0 = 0;
        let (id, incarnation) = (record.id, record.incarnation);
        if self.tell_pulse(now, id, incarnation) {
            self.hurry(now);
        }
    }

    /// Tells that a kernel answers, unless somebody has just done so: the others need not hear it from everybody.
    fn tell_pulse(&mut self, now: Duration, id: Id, incarnation: Incarnation) -> bool {
        let known = self.told.get(&id.key).is_some_and(|at| now - *at < self.times.retell());
        if !known {
            self.told.insert(id.key, now);
            self.say(now, Said::Pulse, id, incarnation);
        }
        !known
    }

    /// Asks the kernel of one that is under suspicion, before we come to bury it: the word of others may not reach us in
    /// time when much is said of many.
    pub(super) fn ask(&mut self, now: Duration, key: Key) {
        let interval = self.times.probe_interval;
        if now - self.asked.1 >= interval {
            self.asked = (0, now);
        }
        let Some(record) = self.records.get_mut(key) else { return };
        // Its accusers ask it again and again, and tell. Only whoever hears nothing of that asks as well: all would be
        // more than a kernel answers.
        let told = record.pulse.is_some_and(|at| now.saturating_sub(at) < self.times.unheard());
        let early = record.asked.1 != Duration::ZERO && now - record.asked.1 < interval * 3 / 4;
        if told || early || self.asked.0 >= ASKS {
            return;
        }
        self.asked.0 += 1;
        record.asked = (record.asked.0 + 1, now);
        self.effects.pulses.push(key);
    }

    pub(super) fn say(&mut self, now: Duration, said: Said, about: Id, incarnation: Incarnation) {
        // What anybody may say in the place of another is counted together.
        let last = if said == Said::Silent { 0 } else { self.words.last(said, about.key) };
        self.spoken = self.spoken.max(last) + 1;
        let word = Word { said, about, incarnation, by: self.swim.identity().key, count: self.spoken };
        self.take(now, &word);
    }

    /// Hears a word. What is known to be over is not told on either.
    pub(super) fn listen(&mut self, now: Duration, word: &Word) {
        let (key, own) = (word.about.key, *self.swim.identity());
        if key == own.key {
            // We object to it, unless we have.
            if word.said == Said::Silent && word.about == own && word.incarnation >= self.incarnation {
                let suspicion = Member::new(own, word.incarnation, foca::State::Suspect);
                self.apply(now, &[suspicion], true);
            }
            return;
        }
        if self.words.knows(word) || !self.contacts.contains_key(&key) {
            return;
        }
        let over = self.find(key).is_some_and(|member| {
            let refuted = member.incarnation() > word.incarnation;
            match word.said {
                // It has begun another life since.
                _ if member.id().born != word.about.born => member.id().born > word.about.born,
                Said::Silent => refuted,
                Said::Pulse => refuted || member.state() == foca::State::Down,
                Said::Absent => false,
            }
        });
        if !over {
            self.take(now, word);
        }
    }

    /// Takes a word in, if it is news, and tells it on.
    fn take(&mut self, now: Duration, word: &Word) {
        let most = self.config.max_transmissions.get();
        // Who does not hear that a kernel answers asks it.
        let times = if word.said == Said::Pulse { most / 2 } else { most };
        if !self.words.hear(now, word, times.max(LEAST)) {
            return;
        }
        let key = word.about.key;
        match word.said {
            Said::Absent if self.has_left(key) => {}
            Said::Absent => {
                let heard = self.contacts.get(&key).map_or(0, |contact| contact.heard);
                // Who has just heard it itself knows better.
                if millis(now).saturating_sub(heard) > millis(self.times.probe_interval) || heard == 0 {
                    self.absent(now, key);
                }
            }
            Said::Pulse => {
                self.pulses.insert(key, now);
                self.told.insert(key, now);
                self.touched.insert(key);
                if let Some(record) = self.records.get_mut(key) {
                    record.asked.0 = 0;
                }
            }
            Said::Silent => self.take_accusation(now, word),
        }
    }

    fn take_accusation(&mut self, now: Duration, word: &Word) {
        let key = word.about.key;
        // The word may be here before SWIM's own news.
        let suspicion = Member::new(word.about, word.incarnation, foca::State::Suspect);
        if wire::is_news(self.find(key), &suspicion) {
            self.apply(now, &[suspicion], true);
        }
        self.refresh(now, key);
        if let Some(record) = self.records.get_mut(key).filter(|r| r.id == word.about) {
            record.accusers.insert(word.by);
            self.touched.insert(key);
        }
    }

    pub(super) fn absent(&mut self, now: Duration, key: Key) {
        let until = now + self.absence(key);
        self.absent.insert(key, until);
        self.plan(until, What::Present(key));
        self.touched.insert(key);
    }

    /// How long a machine's word that nobody listens there holds: until it is asked again for sure.
    fn absence(&self, key: Key) -> Duration {
        match self.contacts.get(&key).is_some_and(|contact| contact.active) {
            true => self.times.absence(),
            // Whom SWIM holds for dead is not probed, only looked for.
            false => self.times.absence().max(self.times.probe_interval * SEARCH_SELDOM * 3),
        }
    }

    /// Whether its process has said that it ends.
    fn has_left(&self, key: Key) -> bool {
        self.records.get(key).is_some_and(|record| record.state == State::Left)
    }

    pub(super) fn refused(&mut self, now: Duration, key: Key) {
        if !self.contacts.contains_key(&key) {
            return;
        }
        self.counters.refused += 1;
        self.vouch(now, key);
        self.helps.remove(&key);
        // It has said so itself, or somebody has just found out as well: that holds for a while.
        let holds = self.absent.get(&key).is_some_and(|until| *until > now + self.absence(key) / 2);
        if holds || self.has_left(key) {
            return;
        }
        let Some((id, incarnation)) = self.find(key).map(|member| (*member.id(), member.incarnation())) else { return };
        self.absent(now, key);
        self.say(now, Said::Absent, id, incarnation);
        self.hurry(now);
    }
}
