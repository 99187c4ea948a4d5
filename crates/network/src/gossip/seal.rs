//! Packets that only the cluster can read, and only their sender can have written.
//!
//! In the clear: which key, whose packet, of which run of its process, and a nonce. Then, sealed with ChaCha20-Poly1305
//! (RFC 8439): the packet's number and age, for whom it is, the message, and the sender's signature (Ed25519, RFC 8032)
//! over all of it. The cluster's key keeps strangers out; the signature keeps members from speaking for each other.
//!
//! Every run of every sender seals with a key of its own, derived by HKDF (RFC 5869), so that random nonces never meet,
//! however many packets a large cluster sends.

use std::collections::{BTreeMap, HashMap};

use bytes::{Buf, BufMut};
use ring::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    error::Unspecified,
    hkdf::{HKDF_SHA256, Salt},
    rand::{SecureRandom as _, SystemRandom},
    signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey},
};
use sha2::{Digest as _, Sha256};

use super::{guard::Stamp, id::Key};

const VERSION: u8 = 1;
const KEY_ID: usize = 4;
const CLEAR: usize = 1 + KEY_ID + 8 + 8 + NONCE_LEN;
const INNER: usize = 4 + 8 + 8;
const SIGNATURE: usize = 64;
const TAG: usize = 16;
/// The bytes that sealing adds to a message.
pub const OVERHEAD: usize = CLEAR + INNER + SIGNATURE + TAG;
/// What is signed begins with this, so that a signature is good for nothing else.
const CONTEXT: &[u8] = b"seawall gossip 1\0";

/// A key of the cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey([u8; 32]);

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ClusterKey({})", self.name())
    }
}

impl ClusterKey {
    /// A key of these bytes; `None` unless there are 32.
    pub fn new(bytes: &[u8]) -> Option<ClusterKey> {
        bytes.try_into().ok().map(ClusterKey)
    }

    /// A new key.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn random() -> Result<ClusterKey, Unspecified> {
        let mut bytes = [0; 32];
        SystemRandom::new().fill(&mut bytes)?;
        Ok(ClusterKey(bytes))
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn id(&self) -> [u8; KEY_ID] {
        let hash = Sha256::new().chain_update(b"seawall gossip key\0").chain_update(self.0).finalize();
        [hash[0], hash[1], hash[2], hash[3]]
    }

    /// What a key is called where it may be seen.
    pub fn name(&self) -> String {
        self.id().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The keys that are accepted. Packets are sealed with the first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keyring {
    /// The keys.
    pub keys: Vec<ClusterKey>,
}

/// More keys than this are not accepted.
pub const MOST_KEYS: usize = 3;

/// Why a packet was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is too short, or of another version.
    #[error("no packet of the gossip")]
    Foreign,
    /// It is sealed with a key that we do not have.
    #[error("sealed with a key that is not the cluster's")]
    UnknownKey,
    /// Its sender is not on our list.
    #[error("from somebody who is not on the list")]
    UnknownSender,
    /// It was changed, or is not its sender's.
    #[error("changed on its way, or somebody else's than it says")]
    Forged,
    /// It is for somebody else.
    #[error("for somebody else")]
    WrongReceiver,
}

/// A packet that was opened.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened {
    /// Whose it is.
    pub from: Key,
    /// Which of its packets.
    pub stamp: Stamp,
    /// The message.
    pub message: Vec<u8>,
}

/// A public key of a member.
pub type Public = [u8; 32];

/// A member's own key pair.
pub struct Pair(Ed25519KeyPair);

impl Pair {
    /// A new one, as PKCS #8.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn generate() -> Result<Vec<u8>, Unspecified> {
        Ok(Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())?.as_ref().to_vec())
    }

    /// Reads one.
    ///
    /// # Errors
    /// If it is none.
    pub fn read(pkcs8: &[u8]) -> Result<Pair, ring::error::KeyRejected> {
        Ed25519KeyPair::from_pkcs8(pkcs8).map(Pair)
    }

    /// What others check its signatures with.
    pub fn public(&self) -> Public {
        let mut public = [0; 32];
        public.copy_from_slice(self.0.public_key().as_ref());
        public
    }
}

/// Seals and opens packets of one run of a process.
pub struct Sealer {
    own: Key,
    session: u64,
    number: u32,
    pair: Pair,
    ring: Keyring,
    random: SystemRandom,
    /// Keys that were derived for senders whose packets have been opened. Nobody else's are kept.
    derived: HashMap<Key, ([u8; KEY_ID], u64, LessSafeKey)>,
    sealing: Option<LessSafeKey>,
}

fn derive(key: &ClusterKey, sender: Key, session: u64) -> Result<LessSafeKey, Unspecified> {
    let salt = Salt::new(HKDF_SHA256, b"seawall gossip");
    let (sender, session) = (sender.0.to_be_bytes(), session.to_be_bytes());
    let info = [&sender[..], &session[..]];
    let prk = salt.extract(&key.0);
    let okm = prk.expand(&info, &CHACHA20_POLY1305)?;
    Ok(LessSafeKey::new(UnboundKey::from(okm)))
}

impl Sealer {
    /// A sealer without keys. `session` is greater than in any run before.
    pub fn new(own: Key, session: u64, pair: Pair) -> Sealer {
        let (ring, random) = (Keyring::default(), SystemRandom::new());
        Sealer { own, session, number: 0, pair, ring, random, derived: HashMap::new(), sealing: None }
    }

    /// Takes other keys.
    pub fn set_keys(&mut self, ring: Keyring) {
        if ring == self.ring {
            return;
        }
        self.derived.clear();
        self.sealing = ring.keys.first().and_then(|key| derive(key, self.own, self.session).ok());
        self.ring = ring;
        self.ring.keys.truncate(MOST_KEYS);
    }

    /// Seals a message. `sent` is the age of our process in milliseconds.
    ///
    /// # Errors
    /// If there is no key, or no randomness.
    pub fn seal(&mut self, to: Key, sent: u64, message: &[u8]) -> Result<Vec<u8>, Unspecified> {
        let (key, sealing) = self.ring.keys.first().zip(self.sealing.as_ref()).ok_or(Unspecified)?;
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce)?;
        let mut packet = Vec::with_capacity(message.len() + OVERHEAD);
        packet.put_u8(VERSION);
        packet.put_slice(&key.id());
        packet.put_u64(self.own.0);
        packet.put_u64(self.session);
        packet.put_slice(&nonce);
        packet.put_u32(self.number);
        packet.put_u64(sent);
        packet.put_u64(to.0);
        packet.put_slice(message);
        self.number = self.number.checked_add(1).ok_or(Unspecified)?;
        let signature = self.pair.0.sign(&[CONTEXT, &packet[..]].concat());
        packet.put_slice(signature.as_ref());
        let (clear, sealed) = packet.split_at_mut(CLEAR);
        let tag = sealing.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(clear), sealed)?;
        packet.put_slice(tag.as_ref());
        Ok(packet)
    }

    /// Opens a packet.
    ///
    /// # Errors
    /// Why it is not one to be heard.
    pub fn open(&mut self, mut packet: Vec<u8>, members: &BTreeMap<Key, Public>) -> Result<Opened, Refused> {
        if packet.len() < OVERHEAD || packet[0] != VERSION {
            return Err(Refused::Foreign);
        }
        let mut clear = &packet[1..CLEAR];
        let mut id = [0; KEY_ID];
        clear.copy_to_slice(&mut id);
        let (from, session) = (Key(clear.get_u64()), clear.get_u64());
        let mut nonce = [0; NONCE_LEN];
        clear.copy_to_slice(&mut nonce);
        let key = self.ring.keys.iter().find(|key| key.id() == id).ok_or(Refused::UnknownKey)?;
        let public = members.get(&from).ok_or(Refused::UnknownSender)?;
        let kept = self.derived.get(&from).is_some_and(|(kept, of, _)| (*kept, *of) == (id, session));
        let fresh = match kept {
            true => None,
            false => Some(derive(key, from, session).map_err(|_| Refused::Forged)?),
        };
        let opening = fresh.as_ref().or(self.derived.get(&from).map(|(_, _, key)| key)).ok_or(Refused::Forged)?;
        let (clear, sealed) = packet.split_at_mut(CLEAR);
        let length = opening
            .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(&*clear), sealed)
            .map_err(|_| Refused::Forged)?
            .len();
        let (signed, signature) = packet[..CLEAR + length].split_at(CLEAR + length - SIGNATURE);
        UnparsedPublicKey::new(&ED25519, public)
            .verify(&[CONTEXT, signed].concat(), signature)
            .map_err(|_| Refused::Forged)?;
        let mut inner = &signed[CLEAR..];
        let (number, sent, to) = (inner.get_u32(), inner.get_u64(), Key(inner.get_u64()));
        let message = inner.to_vec();
        if let Some(fresh) = fresh {
            self.derived.insert(from, (id, session, fresh));
        }
        if to != self.own {
            return Err(Refused::WrongReceiver);
        }
        Ok(Opened { from, stamp: Stamp { session, number, sent }, message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealer(name: &str, keys: &[&ClusterKey]) -> (Sealer, Key, Public) {
        let pair = Pair::read(&Pair::generate().unwrap()).unwrap();
        let (key, public) = (Key::of(name), pair.public());
        let mut sealer = Sealer::new(key, 7, pair);
        sealer.set_keys(Keyring { keys: keys.iter().map(|key| (*key).clone()).collect() });
        (sealer, key, public)
    }

    #[test]
    fn only_what_its_sender_sealed_is_opened() {
        let (one, two) = (ClusterKey::random().unwrap(), ClusterKey::random().unwrap());
        let (mut a, ka, pa) = sealer("a", &[&one]);
        let (mut b, kb, pb) = sealer("b", &[&two, &one]);
        let (mut c, kc, pc) = sealer("c", &[&two]);
        let members: BTreeMap<Key, Public> = [(ka, pa), (kb, pb)].into();
        let packet = a.seal(kb, 99, b"hello").unwrap();
        assert_eq!(packet.len(), OVERHEAD + 5);
        let stamp = Stamp { session: 7, number: 0, sent: 99 };
        let opened = Opened { from: ka, stamp, message: b"hello".to_vec() };
        assert_eq!(b.open(packet.clone(), &members), Ok(opened));
        assert_eq!(c.open(packet.clone(), &members), Err(Refused::UnknownKey));
        assert_eq!(b.open(packet.clone(), &[(kb, pb)].into()), Err(Refused::UnknownSender));
        // The right name with another's key, as when a member speaks for another.
        assert_eq!(b.open(packet.clone(), &[(ka, pb)].into()), Err(Refused::Forged));
        for at in 1..packet.len() {
            let mut changed = packet.clone();
            changed[at] ^= 1;
            assert!(b.open(changed, &members).is_err(), "byte {at}");
            assert!(b.open(packet[..at].to_vec(), &members).is_err(), "{at} bytes");
        }
        assert_eq!(b.open(b"GET / HTTP/1.1".to_vec(), &members), Err(Refused::Foreign));
        let elsewhere = a.seal(kc, 99, b"hello").unwrap();
        assert_eq!(b.open(elsewhere, &members), Err(Refused::WrongReceiver));
        // One with the cluster's key who is no member, and says that it is.
        let (mut liar, ..) = sealer("a", &[&one]);
        let lie = liar.seal(kb, 1, b"a is dead").unwrap();
        assert_eq!(b.open(lie, &members), Err(Refused::Forged));
        let members: BTreeMap<Key, Public> = [(kc, pc)].into();
        let newer = c.seal(kb, 5, b"").unwrap();
        assert!(b.open(newer, &members).is_ok());
        b.set_keys(Keyring { keys: vec![two] });
        assert_eq!(b.open(a.seal(kb, 100, b"x").unwrap(), &[(ka, pa)].into()), Err(Refused::UnknownKey));
    }
}
