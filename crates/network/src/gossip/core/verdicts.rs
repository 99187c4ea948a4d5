//! Suspicions, and what becomes of them.

use std::{collections::BTreeSet, time::Duration};

use foca::Member;

use super::{Core, Thought, What, millis};
use crate::{
    gossip::{
        id::{Key, LEFT},
        judge::{ASKED, REMINDED, Record, State, View, judge},
    },
    verdict::Verdict,
};

impl Core {
    /// Brings our records up to what SWIM has, judges them, and says what has changed.
    pub(super) fn settle(&mut self, now: Duration) {
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

    pub(super) fn refresh(&mut self, now: Duration, key: Key) {
        let Some(member) = self.find(key) else {
            self.records.remove(key);
            return;
        };
        let (id, incarnation) = (*member.id(), member.incarnation());
        let state = match member.state() {
            foca::State::Alive => {
                if let Some(record) = self.records.remove(key) {
                    self.words.settled(key);
                    if record.id == id && record.state == State::Suspected {
                        self.counters.refuted += 1;
                    }
                }
                return;
            }
            foca::State::Suspect => State::Suspected,
            foca::State::Down if incarnation == LEFT => State::Left,
            foca::State::Down => State::Dead,
        };
        if state != State::Suspected {
            self.words.buried(key);
        }
        let same = |r: &&Record| r.id == id && (r.incarnation == incarnation || state != State::Suspected);
        match self.records.get(key).filter(same) {
            Some(_) => {
                if self.records.set_state(key, state) && state == State::Dead {
                    self.counters.deaths += 1;
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
                    testified: None,
                    asked: (0, Duration::ZERO),
                    reminded: (0, Duration::ZERO),
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
        if let Some(record) = self.records.get_mut(key) {
            let pulse = self.pulses.get(&key).copied();
            record.pulse = pulse.filter(|at| *at + self.times.probe_interval * 2 >= record.since);
        }
    }

    pub(super) fn verdict(&mut self, now: Duration, key: Key) -> Option<Verdict> {
        if self.absent.contains_key(&key) {
            return None;
        }
        let contact = self.contacts.get(&key)?;
        let Some(record) = self.records.get(key) else { return contact.active.then_some(Verdict::Alive) };
        match record.state {
            State::Left => None,
            State::Dead => Some(Verdict::Dead),
            State::Suspected => {
                let late = millis(now.saturating_sub(self.times.late() * self.health.stretch())).max(1);
                let heard = self.recent.iter().filter(|(other, at)| *other != key && *at >= late).take(2).count();
                let view = View {
                    members: self.active + 1,
                    suspected: self.records.suspected(),
                    heard,
                    doubt: self.health.doubts(),
                };
                let mut judged = judge(now, record, view, &self.times);
                let ((asked, at), id, incarnation) = (record.asked, record.id, record.incarnation);
                // Its kernel may answer us although nobody has told us so, and so may its process.
                let unasked = asked < ASKED || now < at + self.times.probe_timeout / 2;
                let hung = record.pulse.is_some() && now >= record.since.max(record.from) + self.times.hung;
                let unheard = if hung { record.reminded.0 < REMINDED } else { unasked };
                if judged.verdict == Verdict::Dead && unheard {
                    judged.verdict = Verdict::Suspect;
                    judged.again = now + if hung { self.times.probe_interval } else { self.times.probe_timeout / 2 };
                }
                if judged.verdict == Verdict::Suspect {
                    self.ask(now, key);
                }
                if judged.verdict == Verdict::Dead {
                    let down = Member::new(id, incarnation, foca::State::Down);
                    self.apply(now, &[down], true);
                    self.hurry(now);
                } else {
                    if judged.held
                        && let Some(record) = self.records.get_mut(key)
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
    pub(super) fn judge_at(&mut self, now: Duration, at: Duration, key: Key) {
        if !self.judging.get(&key).is_some_and(|next| *next > now && *next <= at) {
            self.judging.insert(key, at);
            self.plan(at, What::Judge(key));
        }
    }

    pub(super) fn show(&mut self, key: Key, verdict: Option<Verdict>) {
        let accusers = match verdict {
            Some(Verdict::Suspect | Verdict::Dead) => self.records.get(key).map_or(0, |r| r.accusers.len()),
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
