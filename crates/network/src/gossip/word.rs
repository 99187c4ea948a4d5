//! What members say of each other in their own name. SWIM's updates do not say whose they are; whoever wants several
//! witnesses needs to know.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::mpsc::{Receiver, Sender, channel},
};

use bytes::{Buf, BufMut};
use foca::{BroadcastHandler, Incarnation, Invalidates};

use super::id::{Id, Key};

/// What somebody says of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// Which of the words of `by`: a later one takes the place of an earlier one. They are counted from the birth of its
    /// first life on, so that a member that was restarted is heard again.
    pub count: u64,
}

/// The bytes of a word.
pub(super) const SIZE: usize = 1 + 16 + 2 + 8 + 8;
/// This many words are remembered. More are not told on twice only because nobody remembers them.
const MOST: usize = 1 << 14;

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
        Slot(self.said, self.about.key, self.by)
    }

    fn age(&self) -> (u64, Incarnation, u64) {
        (self.about.born, self.incarnation, self.count)
    }
}

/// Of all words in one slot only the newest is told on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot(Said, Key, Key);

impl Invalidates for Slot {
    fn invalidates(&self, other: &Slot) -> bool {
        self == other
    }
}

/// Takes the words out of packets, and tells on those that are new.
pub struct Ear {
    newest: HashMap<Slot, (u64, Incarnation, u64)>,
    heard: Sender<Word>,
}

impl Ear {
    /// An ear, and where what it heard comes out.
    pub fn new() -> (Ear, Receiver<Word>) {
        let (heard, words) = channel();
        (Ear { newest: HashMap::new(), heard }, words)
    }
}

impl BroadcastHandler<Id> for Ear {
    type Key = Slot;
    type Error = Infallible;

    fn receive_item(&mut self, data: &[u8], _: Option<&Id>) -> Result<Option<Slot>, Infallible> {
        let Some(word) = Word::read(data) else { return Ok(None) };
        if self.newest.len() >= MOST {
            self.newest.clear();
        }
        let slot = word.slot();
        if self.newest.get(&slot).is_some_and(|known| *known >= word.age()) {
            return Ok(None);
        }
        self.newest.insert(slot, word.age());
        // The other end lives as long as we do, and is emptied after every packet.
        let _ = self.heard.send(word);
        Ok(Some(slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_heard_once_and_a_newer_one_again() {
        let (mut ear, heard) = Ear::new();
        let about = Id { key: Key(7), born: 5 };
        let word = Word { said: Said::Silent, about, incarnation: 1, by: Key(3), count: 0 };
        let mut check = |word: Word, new: bool| {
            assert_eq!(Word::read(&word.write()), Some(word));
            assert_eq!(ear.receive_item(&word.write(), None).unwrap().is_some(), new, "{word:?}");
            assert_eq!(heard.try_recv().ok(), new.then_some(word));
        };
        check(word, true);
        check(word, false);
        check(Word { by: Key(4), ..word }, true);
        check(Word { said: Said::Absent, ..word }, true);
        check(Word { count: 1, ..word }, true);
        check(Word { incarnation: 0, count: 9, ..word }, false);
        check(Word { incarnation: 2, ..word }, true);
        check(Word { about: Id { born: 6, ..about }, incarnation: 0, ..word }, true);
        check(word, false);
        assert_eq!(ear.receive_item(b"something new", None), Ok(None));
    }
}
