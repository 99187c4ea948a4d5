//! Packets that only two members can read, and only the other of them can have written.
//!
//! In the clear: which key, whose packet, of which run of its process, and a nonce. Then, sealed with ChaCha20-Poly1305
//! (RFC 8439): the packet's number and age, and the message. What it is sealed with is derived by HKDF (RFC 5869) from
//! the cluster's key, which keeps strangers out, and from what only these two share (X25519, RFC 7748), which keeps
//! members from speaking for each other. A signature would say the same at many times the cost.
//!
//! Every run of every sender seals with keys of its own, so that random nonces never meet, however many packets a large
//! cluster sends.

use std::collections::{BTreeMap, HashMap};

use bytes::{Buf, BufMut};
use ring::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    error::Unspecified,
    hkdf::{HKDF_SHA256, Salt},
    rand::{SecureRandom as _, SystemRandom},
};
use sha2::{Digest as _, Sha256};
use x25519_dalek::{PublicKey, StaticSecret};

use super::{guard::Stamp, id::Key};

const VERSION: u8 = 2;
const KEY_ID: usize = 4;
const CLEAR: usize = 1 + KEY_ID + 8 + 8 + NONCE_LEN;
const INNER: usize = 4 + 8;
const TAG: usize = 16;
/// The bytes that sealing adds to a message.
pub const OVERHEAD: usize = CLEAR + INNER + TAG;

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
    /// It was changed, is not its sender's, or is for somebody else.
    #[error("changed on its way, somebody else's than it says, or for somebody else")]
    Forged,
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
pub struct Pair(StaticSecret);

impl Pair {
    /// The bytes of a new one.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn generate() -> Result<[u8; 32], Unspecified> {
        let mut bytes = [0; 32];
        SystemRandom::new().fill(&mut bytes)?;
        Ok(bytes)
    }

    /// The pair of these bytes; `None` unless there are 32.
    pub fn read(bytes: &[u8]) -> Option<Pair> {
        Some(Pair(<[u8; 32]>::try_from(bytes).ok()?.into()))
    }

    /// What others need to know to talk with its owner.
    pub fn public(&self) -> Public {
        PublicKey::from(&self.0).to_bytes()
    }

    /// What the two of them share; nothing if the other's key is one that makes this known to everyone.
    fn shared(&self, with: &Public) -> Option<[u8; 32]> {
        let secret = self.0.diffie_hellman(&PublicKey::from(*with));
        secret.was_contributory().then(|| secret.to_bytes())
    }
}

/// What was calculated for another member.
struct Peer {
    public: Public,
    shared: [u8; 32],
    /// For our packets to it.
    sealing: Option<LessSafeKey>,
    /// For its packets, of a run of its process, with a key of the cluster. Nothing that did not open one is kept.
    opening: Option<([u8; KEY_ID], u64, LessSafeKey)>,
}

/// Seals and opens packets of one run of a process.
pub struct Sealer {
    own: Key,
    session: u64,
    number: u32,
    pair: Pair,
    ring: Keyring,
    random: SystemRandom,
    peers: HashMap<Key, Peer>,
}

fn derive(key: &ClusterKey, shared: &[u8; 32], from: Key, session: u64, to: Key) -> Result<LessSafeKey, Unspecified> {
    let salt = Salt::new(HKDF_SHA256, b"seawall gossip 2");
    let info = [from.0.to_be_bytes(), session.to_be_bytes(), to.0.to_be_bytes()];
    let info = info.each_ref().map(|part| &part[..]);
    let prk = salt.extract(&[key.0, *shared].concat());
    let okm = prk.expand(&info, &CHACHA20_POLY1305)?;
    Ok(LessSafeKey::new(UnboundKey::from(okm)))
}

impl Sealer {
    /// A sealer without keys. `session` is greater than in any run before.
    pub fn new(own: Key, session: u64, pair: Pair) -> Sealer {
        let (ring, random) = (Keyring::default(), SystemRandom::new());
        Sealer { own, session, number: 0, pair, ring, random, peers: HashMap::new() }
    }

    /// Takes other keys.
    pub fn set_keys(&mut self, ring: Keyring) {
        if ring == self.ring {
            return;
        }
        for peer in self.peers.values_mut() {
            (peer.sealing, peer.opening) = (None, None);
        }
        self.ring = ring;
        self.ring.keys.truncate(MOST_KEYS);
    }

    /// Forgets what was calculated for those who are no members any more.
    pub fn retain(&mut self, members: &BTreeMap<Key, Public>) {
        self.peers.retain(|key, peer| members.get(key) == Some(&peer.public));
    }

    /// Seals a message for a member. `sent` is the age of our process in milliseconds.
    ///
    /// # Errors
    /// If there is no key, no such member, or no randomness.
    pub fn seal(
        &mut self,
        to: Key,
        sent: u64,
        message: &[u8],
        members: &BTreeMap<Key, Public>,
    ) -> Result<Vec<u8>, Unspecified> {
        let key = self.ring.keys.first().ok_or(Unspecified)?;
        let public = members.get(&to).ok_or(Unspecified)?;
        let peer = peer(&mut self.peers, &self.pair, to, public).ok_or(Unspecified)?;
        let sealing = match &mut peer.sealing {
            Some(sealing) => sealing,
            none => none.insert(derive(key, &peer.shared, self.own, self.session, to)?),
        };
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
        packet.put_slice(message);
        self.number = self.number.checked_add(1).ok_or(Unspecified)?;
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
        let peer = peer(&mut self.peers, &self.pair, from, public).ok_or(Refused::Forged)?;
        let kept = peer.opening.as_ref().is_some_and(|(kept, of, _)| (*kept, *of) == (id, session));
        let fresh = match kept {
            true => None,
            false => Some(derive(key, &peer.shared, from, session, self.own).map_err(|_| Refused::Forged)?),
        };
        let opening = fresh.as_ref().or(peer.opening.as_ref().map(|(_, _, key)| key)).ok_or(Refused::Forged)?;
        let (clear, sealed) = packet.split_at_mut(CLEAR);
        let opened = opening.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(&*clear), sealed);
        let mut inner: &[u8] = opened.map_err(|_| Refused::Forged)?;
        let (number, sent) = (inner.get_u32(), inner.get_u64());
        let message = inner.to_vec();
        if let Some(fresh) = fresh {
            peer.opening = Some((id, session, fresh));
        }
        Ok(Opened { from, stamp: Stamp { session, number, sent }, message })
    }
}

/// What was calculated for a member with this public key; it is, unless it was. Nothing for a key with which nobody can
/// keep a secret.
fn peer<'a>(peers: &'a mut HashMap<Key, Peer>, pair: &Pair, who: Key, public: &Public) -> Option<&'a mut Peer> {
    if peers.get(&who).is_none_or(|peer| peer.public != *public) {
        let shared = pair.shared(public)?;
        peers.insert(who, Peer { public: *public, shared, sealing: None, opening: None });
    }
    peers.get_mut(&who)
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
        let (mut d, kd, pd) = sealer("d", &[&one]);
        let all: BTreeMap<Key, Public> = [(ka, pa), (kb, pb), (kc, pc), (kd, pd)].into();
        let packet = a.seal(kb, 99, b"hello", &all).unwrap();
        assert_eq!(packet.len(), OVERHEAD + 5);
        let stamp = Stamp { session: 7, number: 0, sent: 99 };
        let opened = Opened { from: ka, stamp, message: b"hello".to_vec() };
        assert_eq!(b.open(packet.clone(), &all), Ok(opened));
        assert_eq!(c.open(packet.clone(), &all), Err(Refused::UnknownKey));
        assert_eq!(d.open(packet.clone(), &all), Err(Refused::Forged), "it is for somebody else");
        assert_eq!(b.open(packet.clone(), &[(kb, pb)].into()), Err(Refused::UnknownSender));
        // The right name with another's key, as when a member speaks for another.
        assert_eq!(b.open(packet.clone(), &[(ka, pd)].into()), Err(Refused::Forged));
        for at in 1..packet.len() {
            let mut changed = packet.clone();
            changed[at] ^= 1;
            assert!(b.open(changed, &all).is_err(), "byte {at}");
            assert!(b.open(packet[..at].to_vec(), &all).is_err(), "{at} bytes");
        }
        assert_eq!(b.open(b"GET / HTTP/1.1".to_vec(), &all), Err(Refused::Foreign));
        assert!(b.open(packet, &all).is_ok(), "what was refused has changed nothing");
        // One with the cluster's key who is no member, and says that it is.
        let (mut liar, ..) = sealer("a", &[&one]);
        let lie = liar.seal(kb, 1, b"c is dead", &all).unwrap();
        assert_eq!(b.open(lie, &all), Err(Refused::Forged));
        let newer = c.seal(kb, 5, b"", &all).unwrap();
        assert!(b.open(newer, &all).is_ok());
        b.set_keys(Keyring { keys: vec![two] });
        assert_eq!(b.open(a.seal(kb, 100, b"x", &all).unwrap(), &all), Err(Refused::UnknownKey));
        assert!(a.seal(Key::of("e"), 0, b"x", &all).is_err(), "nobody of that name");
    }

    #[test]
    fn a_member_with_another_key_pair_is_another_member() {
        let one = ClusterKey::random().unwrap();
        let (mut a, ka, pa) = sealer("a", &[&one]);
        let (mut b, kb, pb) = sealer("b", &[&one]);
        let mut members: BTreeMap<Key, Public> = [(ka, pa), (kb, pb)].into();
        for sealer in [&mut a, &mut b] {
            let (to, message) = (if sealer.own == ka { kb } else { ka }, b"before");
            sealer.seal(to, 0, message, &members).unwrap();
        }
        let (mut anew, _, pn) = sealer("b", &[&one]);
        members.insert(kb, pn);
        a.retain(&members);
        assert!(a.peers.is_empty());
        assert!(anew.open(a.seal(kb, 1, b"x", &members).unwrap(), &members).is_ok());
        assert!(a.open(anew.seal(ka, 1, b"x", &members).unwrap(), &members).is_ok());
        assert_eq!(b.open(a.seal(kb, 2, b"x", &members).unwrap(), &members), Err(Refused::Forged));
        assert_eq!(a.open(b.seal(ka, 3, b"x", &members).unwrap(), &members), Err(Refused::Forged));
    }

    #[test]
    fn a_public_key_that_keeps_no_secret_is_refused() {
        let one = ClusterKey::random().unwrap();
        let (mut a, ka, pa) = sealer("a", &[&one]);
        let (mut b, kb, _) = sealer("b", &[&one]);
        let weak: BTreeMap<Key, Public> = [(ka, pa), (kb, [0; 32])].into();
        assert!(a.seal(kb, 0, b"x", &weak).is_err());
        let packet = b.seal(ka, 0, b"x", &weak).unwrap();
        assert_eq!(a.open(packet, &weak), Err(Refused::Forged));
    }
}
