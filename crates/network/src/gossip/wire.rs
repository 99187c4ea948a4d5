//! How SWIM's messages look in bytes. Fixed sizes, big endian: every packet is small and reading one cannot fail in many
//! ways.

use bytes::{Buf, BufMut};
use foca::{Codec, Header, Incarnation, Member, Message, State};

use super::id::{Id, Key};

/// What a packet of the gossip cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It ends too early.
    #[error("the packet ends in the middle")]
    Short,
    /// A kind that is not known.
    #[error("{0} is no kind of message")]
    Kind(u8),
    /// A state that is not known.
    #[error("{0} is no state of a member")]
    State(u8),
    /// No room is left in the packet being written.
    #[error("the packet is full")]
    Full,
}

/// The bytes of an [`Id`].
const ID: usize = 16;
/// The bytes of a member's state.
pub(super) const MEMBER: usize = ID + 3;
/// The bytes of a header without what belongs to its kind.
const HEADER: usize = ID + 2 + ID + 1;
/// The bytes of a message that says something about nobody.
pub(super) const EMPTY: usize = HEADER + 2;

/// Writes and reads SWIM's messages.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wire;

fn put_id(id: Id, buf: &mut impl BufMut) {
    buf.put_u64(id.key.0);
    buf.put_u64(id.born);
}

fn get_id(buf: &mut impl Buf) -> Id {
    Id { key: Key(buf.get_u64()), born: buf.get_u64() }
}

/// The kind of a message, the other member it names, and the number of its probe.
fn parts(message: &Message<Id>) -> (u8, Option<Id>, Option<u8>) {
    match *message {
        Message::Ping(n) => (0, None, Some(n)),
        Message::Ack(n) => (1, None, Some(n)),
        Message::PingReq { target, probe_number } => (2, Some(target), Some(probe_number)),
        Message::IndirectPing { origin, probe_number } => (3, Some(origin), Some(probe_number)),
        Message::IndirectAck { target, probe_number } => (4, Some(target), Some(probe_number)),
        Message::ForwardedAck { origin, probe_number } => (5, Some(origin), Some(probe_number)),
        Message::Announce => (6, None, None),
        Message::Feed => (7, None, None),
        Message::Gossip => (8, None, None),
        Message::Broadcast => (9, None, None),
        Message::TurnUndead => (10, None, None),
    }
}

/// The member that a message is about, if it is about another than its sender.
pub fn about(message: &Message<Id>) -> Option<Id> {
    parts(message).1
}

/// Whether words are to follow it: where there is room, and not where it goes to one that does not answer others.
pub fn tells(message: &Message<Id>) -> bool {
    !matches!(message, Message::Announce | Message::TurnUndead | Message::Feed | Message::IndirectPing { .. })
}

/// Whether SWIM learns something from an update of a member of whom it has this: a later life wins, death is final for a
/// life, and an incarnation is refuted only by a higher one (section 4.2 of the paper).
pub fn is_news(known: Option<&Member<Id>>, update: &Member<Id>) -> bool {
    let Some(known) = known else { return true };
    if known.id().born != update.id().born {
        return update.id().born > known.id().born;
    }
    match (known.state(), update.state()) {
        (State::Down, _) => false,
        (_, State::Down) => true,
        (State::Alive, State::Suspect) => update.incarnation() >= known.incarnation(),
        _ => update.incarnation() > known.incarnation(),
    }
}

impl Codec<Id> for Wire {
    type Error = Malformed;

    fn encode_header(&mut self, header: &Header<Id>, mut buf: impl BufMut) -> Result<(), Malformed> {
        let (kind, other, number) = parts(&header.message);
        let size = HEADER + other.map_or(0, |_| ID) + number.map_or(0, |_| 1);
        if buf.remaining_mut() < size {
            return Err(Malformed::Full);
        }
        put_id(header.src, &mut buf);
        buf.put_u16(header.src_incarnation);
        put_id(header.dst, &mut buf);
        buf.put_u8(kind);
        if let Some(other) = other {
            put_id(other, &mut buf);
        }
        if let Some(number) = number {
            buf.put_u8(number);
        }
        Ok(())
    }

    fn decode_header(&mut self, mut buf: impl Buf) -> Result<Header<Id>, Malformed> {
        if buf.remaining() < HEADER {
            return Err(Malformed::Short);
        }
        let (src, src_incarnation, dst, kind) = (get_id(&mut buf), buf.get_u16(), get_id(&mut buf), buf.get_u8());
        let rest = match kind {
            0 | 1 => 1,
            2..=5 => ID + 1,
            6..=10 => 0,
            _ => return Err(Malformed::Kind(kind)),
        };
        if buf.remaining() < rest {
            return Err(Malformed::Short);
        }
        let message = match kind {
            0 => Message::Ping(buf.get_u8()),
            1 => Message::Ack(buf.get_u8()),
            2 => Message::PingReq { target: get_id(&mut buf), probe_number: buf.get_u8() },
            3 => Message::IndirectPing { origin: get_id(&mut buf), probe_number: buf.get_u8() },
            4 => Message::IndirectAck { target: get_id(&mut buf), probe_number: buf.get_u8() },
            5 => Message::ForwardedAck { origin: get_id(&mut buf), probe_number: buf.get_u8() },
            6 => Message::Announce,
            7 => Message::Feed,
            8 => Message::Gossip,
            9 => Message::Broadcast,
            _ => Message::TurnUndead,
        };
        Ok(Header { src, src_incarnation, dst, message })
    }

    fn encode_member(&mut self, member: &Member<Id>, mut buf: impl BufMut) -> Result<(), Malformed> {
        if buf.remaining_mut() < MEMBER {
            return Err(Malformed::Full);
        }
        put_id(*member.id(), &mut buf);
        buf.put_u16(member.incarnation());
        buf.put_u8(match member.state() {
            State::Alive => 0,
            State::Suspect => 1,
            State::Down => 2,
        });
        Ok(())
    }

    fn decode_member(&mut self, mut buf: impl Buf) -> Result<Member<Id>, Malformed> {
        if buf.remaining() < MEMBER {
            return Err(Malformed::Short);
        }
        let (id, incarnation) = (get_id(&mut buf), buf.get_u16());
        let state = match buf.get_u8() {
            0 => State::Alive,
            1 => State::Suspect,
            2 => State::Down,
            other => return Err(Malformed::State(other)),
        };
        Ok(Member::new(id, incarnation, state))
    }
}

/// A packet, taken apart.
#[derive(Debug, PartialEq)]
pub struct Packet<'a> {
    /// From whom to whom, and why.
    pub header: Header<Id>,
    /// What it says about members.
    pub updates: Vec<Member<Id>>,
    /// What follows: what members say about each other (see `word`).
    pub tail: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Takes a packet apart.
    ///
    /// # Errors
    /// If it is none.
    pub fn read(mut data: &'a [u8]) -> Result<Packet<'a>, Malformed> {
        let header = Wire.decode_header(&mut data)?;
        let mut updates = Vec::new();
        if data.len() >= 2 && !matches!(header.message, Message::Broadcast) {
            let count = data.get_u16();
            if data.len() < usize::from(count) * MEMBER {
                return Err(Malformed::Short);
            }
            for _ in 0..count {
                updates.push(Wire.decode_member(&mut data)?);
            }
        }
        Ok(Packet { header, updates, tail: data })
    }

    /// Only the header of a packet.
    ///
    /// # Errors
    /// If it is none.
    pub fn header(mut data: &[u8]) -> Result<Header<Id>, Malformed> {
        Wire.decode_header(&mut data)
    }

    /// Puts it together again.
    pub fn write(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + ID + 3 + self.updates.len() * MEMBER + self.tail.len());
        // A vector has room for everything.
        let _ = Wire.encode_header(&self.header, &mut out);
        let bare = matches!(self.header.message, Message::Announce | Message::TurnUndead | Message::Broadcast);
        if !bare {
            out.put_u16(u16::try_from(self.updates.len()).unwrap_or(u16::MAX));
            for member in self.updates.iter().take(usize::from(u16::MAX)) {
                let _ = Wire.encode_member(member, &mut out);
            }
        }
        out.extend_from_slice(self.tail);
        out
    }
}

/// A message that says something about members, made by hand: SWIM's own are made when SWIM thinks it is time.
pub fn gossip(src: Id, src_incarnation: Incarnation, dst: Id, updates: Vec<Member<Id>>) -> Vec<u8> {
    let header = Header { src, src_incarnation, dst, message: Message::Gossip };
    Packet { header, updates, tail: &[] }.write()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id() -> impl Strategy<Value = Id> {
        (any::<u64>(), any::<u64>()).prop_map(|(key, born)| Id { key: Key(key), born })
    }

    fn message() -> impl Strategy<Value = Message<Id>> {
        (0..11u8, id(), any::<u8>()).prop_map(|(kind, other, n)| match kind {
            0 => Message::Ping(n),
            1 => Message::Ack(n),
            2 => Message::PingReq { target: other, probe_number: n },
            3 => Message::IndirectPing { origin: other, probe_number: n },
            4 => Message::IndirectAck { target: other, probe_number: n },
            5 => Message::ForwardedAck { origin: other, probe_number: n },
            6 => Message::Announce,
            7 => Message::Feed,
            8 => Message::Gossip,
            9 => Message::Broadcast,
            _ => Message::TurnUndead,
        })
    }

    fn member() -> impl Strategy<Value = Member<Id>> {
        (id(), any::<u16>(), 0..3).prop_map(|(id, incarnation, state)| {
            Member::new(id, incarnation, [State::Alive, State::Suspect, State::Down][state as usize])
        })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(
            src in id(), incarnation in any::<u16>(), dst in id(), message in message(),
            updates in prop::collection::vec(member(), 0..5),
        ) {
            let bare = matches!(message, Message::Announce | Message::TurnUndead | Message::Broadcast);
            let header = Header { src, src_incarnation: incarnation, dst, message };
            let packet = Packet { header, updates: if bare { Vec::new() } else { updates }, tail: &[] };
            let bytes = packet.write();
            prop_assert_eq!(Packet::read(&bytes), Ok(packet));
        }

        #[test]
        fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Packet::read(&bytes);
        }
    }

    #[test]
    fn a_cut_packet_is_refused() {
        let id = |n| Id { key: Key(n), born: 1 };
        let bytes = gossip(id(1), 3, id(2), vec![Member::new(id(4), 7, State::Suspect)]);
        for length in HEADER + 2..bytes.len() {
            assert_eq!(Packet::read(&bytes[..length]), Err(Malformed::Short), "{length}");
        }
        let mut other = bytes.clone();
        other[HEADER - 1] = 99;
        assert_eq!(Packet::read(&other), Err(Malformed::Kind(99)));
        other = bytes;
        *other.last_mut().unwrap() = 9;
        assert_eq!(Packet::read(&other), Err(Malformed::State(9)));
    }
}
