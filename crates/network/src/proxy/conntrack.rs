//! The kernel's table of flows, over netlink: read and forgotten in one go, without a process for each.
//!
//! The numbers are those of `linux/netfilter/nfnetlink_conntrack.h`.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
    sockopt,
};

/// One direction of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// The sender.
    pub from: SocketAddr,
    /// The receiver.
    pub to: SocketAddr,
}

/// A flow that the kernel remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// 6 for TCP, 17 for UDP.
    pub protocol: u8,
    /// As whoever began it sees it.
    pub original: Way,
    /// What the answers look like before addresses are put back: `reply.from` is who really answers.
    pub reply: Way,
    /// The state of TCP.
    pub state: Option<TcpState>,
}

/// How far a flow of TCP is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpState {
    /// Nobody has answered yet.
    Opening,
    /// Open at least one way.
    Open,
    /// Over.
    Over,
}

const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const PROTOCOL_INFO: u16 = 4;
const ZONE: u16 = 18;

const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Of a message: length, type, flags, number, sender.
const HEADER: usize = 16;
/// Family, version, resource.
const FAMILY: usize = 4;

/// What of an attribute's type is its number; the rest are flags.
const TYPE: u16 = 0x3fff;

fn word16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?))
}

fn word32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// The attributes in some bytes: numbers and values. What is cut off is left out.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(word16(bytes)?);
        let kind = word16(bytes.get(2..)?)? & TYPE;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Who sends to whom, and the protocol. Only protocols that have ports.
fn way(tuple: &[u8]) -> Option<(u8, Way)> {
    let (addresses, protocol) = (attribute(tuple, 1)?, attribute(tuple, 2)?);
    let ip = |v4: u16, v6: u16| -> Option<IpAddr> {
        match (attribute(addresses, v4), attribute(addresses, v6)) {
            (Some(four), _) => Some(IpAddr::from(<[u8; 4]>::try_from(four).ok()?)),
            (_, Some(six)) => Some(IpAddr::from(<[u8; 16]>::try_from(six).ok()?)),
            _ => None,
        }
    };
    let port = |kind: u16| Some(u16::from_be_bytes(attribute(protocol, kind)?.try_into().ok()?));
    let number = *attribute(protocol, 1)?.first()?;
    Some((number, Way { from: SocketAddr::new(ip(1, 3)?, port(2)?), to: SocketAddr::new(ip(2, 4)?, port(3)?) }))
}

/// A flow, as a message's attributes have it. Those in zones are somebody else's.
fn flow(bytes: &[u8]) -> Option<Flow> {
    if attribute(bytes, ZONE).is_some() {
        return None;
    }
    let (protocol, original) = way(attribute(bytes, TUPLE_ORIGINAL)?)?;
    let (_, reply) = way(attribute(bytes, TUPLE_REPLY)?)?;
    let state = attribute(bytes, PROTOCOL_INFO).and_then(|info| attribute(info, 1)).and_then(|tcp| attribute(tcp, 1));
    let state = state.and_then(|s| s.first()).map(|state| match state {
        0..=2 | 9 => TcpState::Opening,
        3..=6 => TcpState::Open,
        _ => TcpState::Over,
    });
    Some(Flow { protocol, original, reply, state })
}

fn put(out: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    fill(out);
    let length = (out.len() - start) as u16;
    out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    out[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The tuple of a way, as an attribute.
fn put_way(out: &mut Vec<u8>, kind: u16, protocol: u8, way: &Way) {
    const NESTED: u16 = 0x8000;
    let bytes = |out: &mut Vec<u8>, ip: IpAddr| match ip {
        IpAddr::V4(ip) => out.extend_from_slice(&ip.octets()),
        IpAddr::V6(ip) => out.extend_from_slice(&ip.octets()),
    };
    let [source, destination] = if way.from.is_ipv4() { [1, 2] } else { [3, 4] };
    put(out, kind | NESTED, |out| {
        put(out, 1 | NESTED, |out| {
            put(out, source, |out| bytes(out, way.from.ip()));
            put(out, destination, |out| bytes(out, way.to.ip()));
        });
        put(out, 2 | NESTED, |out| {
            put(out, 1, |out| out.push(protocol));
            put(out, 2, |out| out.extend_from_slice(&way.from.port().to_be_bytes()));
            put(out, 3, |out| out.extend_from_slice(&way.to.port().to_be_bytes()));
        });
    });
}

fn message(kind: u16, flags: u16, family: u8, fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = vec![0; HEADER];
    out.extend_from_slice(&[family, 0, 0, 0]);
    fill(&mut out);
    let length = out.len() as u32;
    out[0..4].copy_from_slice(&length.to_ne_bytes());
    out[4..6].copy_from_slice(&kind.to_ne_bytes());
    out[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
    out
}

/// What one message says.
enum Said {
    Flow(Option<Flow>),
    Done,
    Error(i32),
}

/// The messages in what was received.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Said> {
    std::iter::from_fn(move || {
        let length = word32(bytes)? as usize;
        let kind = word16(bytes.get(4..)?)?;
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(match kind {
            DONE => Said::Done,
            ERROR => Said::Error(word32(body).unwrap_or_default() as i32),
            _ => Said::Flow(body.get(FAMILY..).and_then(flow)),
        })
    })
}

const fn family(ipv4: bool) -> u8 {
    if ipv4 { 2 } else { 10 }
}

/// A connection to the kernel, in the network namespace of the thread that made it. It blocks.
pub struct Conntrack {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Conntrack {
    /// Connects.
    ///
    /// # Errors
    /// If the kernel does not talk about flows.
    pub fn connect() -> io::Result<Conntrack> {
        let netfilter = SockProtocol::NetlinkNetFilter;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, netfilter)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // A table of half a million flows is read in fewer rounds; who may not have that room reads in more.
        let _ = setsockopt(&socket, sockopt::RcvBuf, &(1 << 20));
        Ok(Conntrack { socket, buffer: vec![0; 64 << 10] })
    }

    /// Those of both families that `wanted` picks.
    ///
    /// # Errors
    /// If the kernel refuses or does not understand.
    pub fn flows(&mut self, wanted: impl Fn(&Flow) -> bool) -> io::Result<Vec<Flow>> {
        let mut found = Vec::new();
        for family in [family(true), family(false)] {
            self.say(&message(GET, DUMP, family, |_| {}))?;
            self.hear(|flow| found.extend(flow.filter(&wanted)))?;
        }
        Ok(found)
    }

    /// Forgets a flow. Says whether there was one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget(&mut self, flow: &Flow) -> io::Result<bool> {
        let family = family(flow.original.from.is_ipv4());
        let way = |out: &mut Vec<u8>| put_way(out, TUPLE_ORIGINAL, flow.protocol, &flow.original);
        self.say(&message(DELETE, ACK, family, way))?;
        match self.hear(drop) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            result => result.map(|()| true),
        }
    }

    fn say(&self, message: &[u8]) -> io::Result<()> {
        send(self.socket.as_raw_fd(), message, MsgFlags::empty())?;
        Ok(())
    }

    fn hear(&mut self, mut take: impl FnMut(Option<Flow>)) -> io::Result<()> {
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            for said in messages(&self.buffer[..length]) {
                match said {
                    Said::Flow(flow) => take(flow),
                    Said::Done | Said::Error(0) => return Ok(()),
                    Said::Error(code) => return Err(io::Error::from_raw_os_error(-code)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn way_of(from: &str, to: &str) -> Way {
        Way { from: from.parse().unwrap(), to: to.parse().unwrap() }
    }

    fn encoded(flow: &Flow, state: u8) -> Vec<u8> {
        message(SUBSYSTEM, 0, 2, |out| {
            put_way(out, TUPLE_ORIGINAL, flow.protocol, &flow.original);
            put_way(out, TUPLE_REPLY, flow.protocol, &flow.reply);
            put(out, PROTOCOL_INFO, |out| put(out, 1, |out| put(out, 1, |out| out.push(state))));
        })
    }

    #[test]
    fn flows_are_read() {
        let check = |original: Way, reply: Way, number: u8, state: TcpState| {
            let expect = Flow { protocol: 6, original, reply, state: Some(state) };
            let bytes = encoded(&expect, number);
            // Two messages in one go.
            let said: Vec<_> = messages(&[bytes.clone(), bytes].concat()).collect();
            assert_eq!(said.len(), 2);
            for said in said {
                assert!(matches!(said, Said::Flow(Some(found)) if found == expect));
            }
        };
        let four = || (way_of("10.244.1.2:5000", "10.96.0.9:80"), way_of("10.244.2.2:8080", "10.244.1.2:5000"));
        check(four().0, four().1, 1, TcpState::Opening);
        check(four().0, four().1, 3, TcpState::Open);
        check(four().0, four().1, 7, TcpState::Over);
        check(way_of("[fd00::1]:5000", "[fd00::2]:80"), way_of("[fd00::2]:80", "[fd00::1]:5000"), 3, TcpState::Open);
    }

    #[test]
    fn ends_and_errors_are_read() {
        assert!(matches!(messages(&message(DONE, 0, 0, |_| {})).next(), Some(Said::Done)));
        let mut refused = message(ERROR, 0, 0, |_| {});
        refused[HEADER..HEADER + 4].copy_from_slice(&(-2i32).to_ne_bytes());
        assert!(matches!(messages(&refused).next(), Some(Said::Error(-2))));
    }

    proptest! {
        #[test]
        fn nonsense_is_no_flow_and_no_panic(bytes: Vec<u8>, cut in 0usize..200) {
            let _ = messages(&bytes).count();
            let _ = flow(&bytes);
            let whole = encoded(&Flow { protocol: 6, original: way_of("1.2.3.4:5", "1.2.3.4:6"),
                reply: way_of("1.2.3.4:6", "1.2.3.4:5"), state: None }, 3);
            let _ = messages(&whole[..cut.min(whole.len())]).count();
        }
    }
}
