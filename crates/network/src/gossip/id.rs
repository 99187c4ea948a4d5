//! Who a member is, in few bytes: every packet and every table entry names members.

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasherDefault, Hasher},
};

use sha2::{Digest as _, Sha256};

/// A member, by the name of its node. Names are long and gossip repeats them, so a hash stands for one; 64 bits of
/// SHA-256 do not collide by chance in any cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub u64);

impl Key {
    /// The key of a node's name.
    pub fn of(name: &str) -> Key {
        let hash = Sha256::digest(name.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hash[..8]);
        Key(u64::from_be_bytes(first))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0 >> 32)
    }
}

/// A table by member: every packet names dozens of them.
pub type ByKey<T> = HashMap<Key, T, BuildHasherDefault<KeyHasher>>;

/// A key is a hash already.
#[derive(Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

/// One life of a member, as SWIM knows it: death is final for a life, and a member that was given up begins another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    /// The member.
    pub key: Key,
    /// Which life: the later one wins. The wall clock's milliseconds at the start, and one more at each revival.
    pub born: u64,
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}/{}", self.key, self.born)
    }
}

impl foca::Identity for Id {
    type Addr = Key;

    fn renew(&self) -> Option<Id> {
        Some(Id { born: self.born.saturating_add(1), ..*self })
    }

    fn addr(&self) -> Key {
        self.key
    }

    fn win_addr_conflict(&self, adversary: &Id) -> bool {
        self.born > adversary.born
    }
}

/// The incarnation with which a member says of itself that its process ends and its machine does not.
pub const LEFT: foca::Incarnation = foca::Incarnation::MAX;
/// The incarnation with which a member says of itself that its machine ends.
pub const ENDED: foca::Incarnation = foca::Incarnation::MAX - 1;
