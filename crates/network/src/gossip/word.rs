//! What members say of each other in their own name. SWIM's updates do not say whose they are; whoever wants several
//! witnesses needs to know.
//!
//! What can be said of one member at a time is bounded, whoever says it: its first [`ACCUSERS`] accusers, and one word of
//! its kernel, which all who have it tell each other in rounds. Who says what others have said already says no news.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::{Buf, BufMut};
use foca::Incarnation;

use super::{
    id::{ByKey, Id, Key},
    judge::ACCUSERS,
};

/// What somebody says of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Said {
    /// "It does not answer me."
    Silent,
    /// "Its machine answers that nobody is there": the process has ended and the machine lives.
    Absent,
    /// "Its kernel answers": it may be starved or hang, its power is on.
    Pulse,
}

/// A word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// What is said.
    pub said: Said,
    /// Of whom.
    pub about: Id,
    /// Of which of its incarnations: it refutes by a higher one.
    pub incarnation: Incarnation,
    /// By whom.
    pub by: Key,
    /// Which of the words: a later one takes the place of an earlier one. They are counted from the birth of the first
    /// life of `by` on, so that a member that was restarted is heard again; what anybody may say in the place of another
    /// is counted on from the highest that was heard, so that several who say it at the same time say the same.
    pub count: u64,
}

/// The bytes of a word.
pub(super) const SIZE: usize = 1 + 16 + 2 + 8 + 8;
/// What a word takes in a packet: its length stands before it.
pub(super) const ROOM: usize = SIZE + 2;

impl Word {
    /// Its bytes.
    pub fn write(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SIZE);
        out.put_u8(match self.said {
            Said::Silent => 0,
            Said::Absent => 1,
            Said::Pulse => 2,
        });
        out.put_u64(self.about.key.0);
        out.put_u64(self.about.born);
        out.put_u16(self.incarnation);
        out.put_u64(self.by.0);
        out.put_u64(self.count);
        out
    }

    /// Reads one; `None` for what is none, such as one of a later version.
    pub fn read(mut data: &[u8]) -> Option<Word> {
        if data.len() != SIZE {
            return None;
        }
        let said = match data.get_u8() {
            0 => Said::Silent,
            1 => Said::Absent,
            2 => Said::Pulse,
            _ => return None,
        };
        let about = Id { key: Key(data.get_u64()), born: data.get_u64() };
        let (incarnation, by) = (data.get_u16(), Key(data.get_u64()));
        Some(Word { said, about, incarnation, by, count: data.get_u64() })
    }

    fn slot(&self) -> Slot {
        // It matters who has found out that it is silent; that its kernel answers anybody may say.
        let by = if self.said == Said::Silent { self.by } else { Key(0) };
        Slot(self.about.key, self.said, by)
    }

    fn age(&self) -> Age {
        (self.about.born, self.incarnation, self.count)
    }
}

type Age = (u64, Incarnation, u64);

/// Of all words in one slot only the newest is told on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Slot(Key, Said, Key);

/// What was heard of a member.
#[derive(Default)]
struct Heard {
    /// Of which life and incarnation its accusers speak.
    accused: (u64, Incarnation),
    /// Who they are, and the last word of each.
    accusers: Vec<(Key, u64)>,
    absent: Age,
    pulse: Age,
}

/// A word that is being told on.
struct Told {
    word: Word,
    left: u8,
    order: u64,
    since: Duration,
}

/// The words that were heard: which of them are news, and which are still to be told on.
#[derive(Default)]
pub struct Words {
    heard: ByKey<Heard>,
    told: BTreeMap<Slot, Told>,
    /// Whose turn it is: the last first. That is the one that was told least often, and of these the newest.
    turns: BTreeSet<(u8, u64, Slot)>,
    order: u64,
}

impl Words {
    /// Takes a word in: whether it is news. If so it is told on this many times.
    pub fn hear(&mut self, now: Duration, word: &Word, times: u8) -> bool {
        if !self.is_news(word) {
            return false;
        }
        let slot = word.slot();
        self.drop_word(slot);
        self.order += 1;
        self.turns.insert((times, self.order, slot));
        self.told.insert(slot, Told { word: *word, left: times, order: self.order, since: now });
        true
    }

    /// Whether it is known that it is none: most words were heard before.
    pub fn knows(&self, word: &Word) -> bool {
        let Some(heard) = self.heard.get(&word.about.key) else { return false };
        match word.said {
            Said::Absent => word.age() <= heard.absent,
            Said::Pulse => word.age() <= heard.pulse,
            Said::Silent => {
                let known = |(by, count): &(Key, u64)| *by == word.by && *count >= word.count;
                (word.about.born, word.incarnation) == heard.accused && heard.accusers.iter().any(known)
            }
        }
    }

    fn is_news(&mut self, word: &Word) -> bool {
        let heard = self.heard.entry(word.about.key).or_default();
        let newer = |known: &mut Age| {
            let newer = word.age() > *known;
            *known = word.age().max(*known);
            newer
        };
        match word.said {
            Said::Absent => newer(&mut heard.absent),
            Said::Pulse => newer(&mut heard.pulse),
            Said::Silent => {
                let accused = (word.about.born, word.incarnation);
                if accused > heard.accused {
                    heard.accused = accused;
                    heard.accusers.clear();
                }
                let known = heard.accusers.iter().position(|(by, _)| *by == word.by);
                match known.and_then(|at| heard.accusers.get_mut(at)) {
                    _ if accused < heard.accused => false,
                    Some((_, count)) => {
                        let newer = word.count > *count;
                        *count = word.count.max(*count);
                        newer
                    }
                    None => {
                        let counts = heard.accusers.len() < ACCUSERS;
                        if counts {
                            heard.accusers.push((word.by, word.count));
                        }
                        counts
                    }
                }
            }
        }
    }

    /// The number of the last word of this kind about somebody.
    pub fn last(&self, said: Said, about: Key) -> u64 {
        self.heard.get(&about).map_or(0, |heard| match said {
            Said::Absent => heard.absent.2,
            Said::Pulse => heard.pulse.2,
            Said::Silent => heard.accusers.iter().map(|(_, count)| *count).max().unwrap_or(0),
        })
    }

    /// Whether there is something to tell.
    pub fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    /// Adds to a packet what is to be told, as far as there is room. What could not be told for as long as `fresh` is not
    /// told any more: much else is, and who hears it late takes it for new.
    pub fn tell(&mut self, now: Duration, fresh: Duration, mut room: usize, packet: &mut Vec<u8>) {
        let mut again = Vec::new();
        while room >= ROOM {
            let Some((left, order, slot)) = self.turns.pop_last() else { break };
            let Some(told) = self.told.get_mut(&slot) else { continue };
            if now.saturating_sub(told.since) > fresh {
                self.told.remove(&slot);
                continue;
            }
            packet.put_u16(SIZE as u16);
            packet.put_slice(&told.word.write());
            room -= ROOM;
            told.left = left.saturating_sub(1);
            match told.left {
                0 => drop(self.told.remove(&slot)),
                left => again.push((left, order, slot)),
            }
        }
        self.turns.extend(again);
        // Those that waited longest come last.
        while let Some((_, _, slot)) = self.turns.first().copied()
            && self.told.get(&slot).is_none_or(|told| now.saturating_sub(told.since) > fresh)
        {
            self.turns.pop_first();
            self.told.remove(&slot);
        }
    }

    /// Whatever is said of somebody's silence and its kernel is no longer of interest.
    pub fn settled(&mut self, about: Key) {
        self.drop_words(about, |slot| slot.1 != Said::Absent);
    }

    /// Its kernel's word is no longer of interest.
    pub fn buried(&mut self, about: Key) {
        self.drop_words(about, |slot| slot.1 == Said::Pulse);
    }

    /// This one is no member any more.
    pub fn forget(&mut self, about: Key) {
        self.heard.remove(&about);
        self.drop_words(about, |_| true);
    }

    fn drop_words(&mut self, about: Key, which: impl Fn(&Slot) -> bool) {
        let all = Slot(about, Said::Silent, Key(0))..=Slot(about, Said::Pulse, Key(u64::MAX));
        let slots: Vec<Slot> = self.told.range(all).map(|(slot, _)| *slot).filter(which).collect();
        for slot in slots {
            self.drop_word(slot);
        }
    }

    fn drop_word(&mut self, slot: Slot) {
        if let Some(told) = self.told.remove(&slot) {
            self.turns.remove(&(told.left, told.order, slot));
        }
    }
}

/// The words in what follows SWIM's part of a packet. It ends where it is not to be understood.
pub fn read_all(mut data: &[u8]) -> Vec<Word> {
    let mut words = Vec::new();
    while data.len() > 2 {
        let length = usize::from(data.get_u16());
        let Some((word, rest)) = data.split_at_checked(length) else { break };
        words.extend(Word::read(word));
        data = rest;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABOUT: Id = Id { key: Key(7), born: 5 };
    const FRESH: Duration = Duration::from_secs(1);

    fn word(said: Said, by: u64, count: u64) -> Word {
        Word { said, about: ABOUT, incarnation: 1, by: Key(by), count }
    }

    fn tell(words: &mut Words, ms: u64, room: usize) -> Vec<Word> {
        let mut packet = Vec::new();
        words.tell(Duration::from_millis(ms), FRESH, room, &mut packet);
        assert!(packet.len() <= room);
        read_all(&packet)
    }

    #[test]
    fn a_word_is_heard_once_and_a_newer_one_again() {
        let mut words = Words::default();
        let said = word(Said::Silent, 3, 0);
        let mut check = |word: Word, new: bool| {
            assert_eq!(Word::read(&word.write()), Some(word));
            assert_eq!(words.hear(Duration::ZERO, &word, 5), new, "{word:?}");
        };
        check(said, true);
        check(said, false);
        check(Word { by: Key(4), ..said }, true);
        check(Word { said: Said::Absent, ..said }, true);
        check(Word { count: 1, ..said }, true);
        check(Word { incarnation: 0, count: 9, ..said }, false);
        check(Word { incarnation: 2, ..said }, true);
        check(Word { about: Id { born: 6, ..ABOUT }, incarnation: 0, ..said }, true);
        check(said, false);
    }

    #[test]
    fn what_is_said_of_one_is_bounded_whoever_says_it() {
        let mut words = Words::default();
        let mut news = |word: Word| usize::from(words.hear(Duration::ZERO, &word, 5));
        // A hundred find out that it does not answer, and ask its kernel.
        assert_eq!((10..110).map(|by| news(word(Said::Silent, by, by))).sum::<usize>(), ACCUSERS);
        assert_eq!((10..110).map(|by| news(word(Said::Pulse, by, 1))).sum::<usize>(), 1);
        assert_eq!((10..110).map(|by| news(word(Said::Pulse, by, 2))).sum::<usize>(), 1);
        assert_eq!((10..110).map(|by| news(word(Said::Absent, by, 1))).sum::<usize>(), 1);
        assert_eq!(words.last(Said::Pulse, ABOUT.key), 2);
        assert_eq!(tell(&mut words, 0, 1000).len(), ACCUSERS + 2);
    }

    #[test]
    fn the_newest_is_told_first_and_what_was_not_told_in_time_no_more() {
        let mut words = Words::default();
        for key in 0..100 {
            let about = Id { key: Key(key), born: 1 };
            assert!(words.hear(Duration::ZERO, &Word { about, ..word(Said::Pulse, 3, 1) }, 2));
        }
        let said = |words: &[Word]| words.iter().map(|word| word.about.key.0).collect::<Vec<u64>>();
        assert_eq!(said(&tell(&mut words, 0, 3 * ROOM + 1)), [99, 98, 97]);
        assert_eq!(said(&tell(&mut words, 0, 2 * ROOM)), [96, 95]);
        words.hear(Duration::from_millis(500), &word(Said::Pulse, 3, 9), 2);
        assert_eq!(said(&tell(&mut words, 900, 2 * ROOM)), [7, 94]);
        assert_eq!(said(&tell(&mut words, 1100, 1000)), [7]);
        assert!(words.is_empty() && words.turns.is_empty());
    }

    #[test]
    fn what_is_settled_is_not_told() {
        let mut words = Words::default();
        for said in [Said::Silent, Said::Absent, Said::Pulse] {
            assert!(words.hear(Duration::ZERO, &word(said, 3, 1), 5));
        }
        words.buried(ABOUT.key);
        assert_eq!(tell(&mut words, 0, 1000).len(), 2);
        words.settled(ABOUT.key);
        assert_eq!(tell(&mut words, 0, 1000), [word(Said::Absent, 3, 1)]);
        // It is still known.
        assert!(!words.hear(Duration::ZERO, &word(Said::Pulse, 4, 1), 5));
        words.forget(ABOUT.key);
        assert!(words.is_empty());
        assert!(words.hear(Duration::ZERO, &word(Said::Pulse, 4, 1), 5));
    }

    #[test]
    fn what_is_not_to_be_understood_ends_it() {
        let known = word(Said::Silent, 3, 1);
        let mut packet = vec![0, 3, 9, 9, 9, 0, SIZE as u8];
        packet.extend(known.write());
        packet.extend([0, 200, 1]);
        assert_eq!(read_all(&packet), [known]);
        assert_eq!(read_all(&[0, 0, 0, 0, 7]), []);
    }
}
