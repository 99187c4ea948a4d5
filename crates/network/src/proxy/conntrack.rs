//! The kernel's table of flows, over netlink: read and forgotten in one go, without a process for each.
//!
//! The numbers are those of `linux/netfilter/nfnetlink_conntrack.h`.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
};

use super::{
    family::Family,
    netlink::{ACK, DUMP, FAMILY, Link, NESTED, attribute, attributes, message, put},
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
    Unanswered,
    /// Answered, and not yet open.
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

/// Who sends to whom, and the protocol. Only protocols that have ports.
fn way(tuple: &[u8]) -> Option<(u8, Way)> {
    let (addresses, protocol) = (attribute(tuple, 1)?, attribute(tuple, 2)?);
    let [mut from, mut to] = [None, None];
    for (kind, value) in attributes(addresses) {
        let ip = || match value.len() {
            4 => Some(IpAddr::from(<[u8; 4]>::try_from(value).ok()?)),
            _ => Some(IpAddr::from(<[u8; 16]>::try_from(value).ok()?)),
        };
        match kind {
            1 | 3 => from = ip(),
            2 | 4 => to = ip(),
            _ => {}
        }
    }
    let [mut number, mut source, mut destination] = [None; 3];
    for (kind, value) in attributes(protocol) {
        let port = || Some(u16::from_be_bytes(value.try_into().ok()?));
        match kind {
            1 => number = value.first().copied().map(u16::from),
            2 => source = port(),
            3 => destination = port(),
            _ => {}
        }
    }
    let number = u8::try_from(number?).ok()?;
    Some((number, Way { from: SocketAddr::new(from?, source?), to: SocketAddr::new(to?, destination?) }))
}

/// A flow, as a message's attributes have it. Those in zones are somebody else's. There may be half a million, so each is
/// gone through once.
fn flow(bytes: &[u8]) -> Option<Flow> {
    let (mut original, mut reply, mut state) = (None, None, None);
    for (kind, value) in attributes(bytes) {
        match kind {
            TUPLE_ORIGINAL => original = way(value),
            TUPLE_REPLY => reply = way(value),
            PROTOCOL_INFO => {
                state = attribute(value, 1).and_then(|tcp| attribute(tcp, 1)).and_then(|s| s.first()).copied();
            }
            ZONE => return None,
            _ => {}
        }
    }
    let ((protocol, original), (_, reply)) = (original?, reply?);
    let state = state.map(|state| match state {
        0 | 1 => TcpState::Unanswered,
        2 | 9 => TcpState::Opening,
        3..=6 => TcpState::Open,
        _ => TcpState::Over,
    });
    Some(Flow { protocol, original, reply, state })
}

/// The tuple of a way, as an attribute.
fn put_way(out: &mut Vec<u8>, kind: u16, protocol: u8, way: &Way) {
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

const fn number(family: Family) -> u8 {
    family.pick([2, 10])
}

/// A connection to the kernel, in the network namespace of the thread that made it. It blocks.
pub struct Conntrack {
    link: Link,
}

impl Conntrack {
    /// Connects.
    ///
    /// # Errors
    /// If the kernel does not talk about flows.
    pub fn connect() -> io::Result<Conntrack> {
        Ok(Conntrack { link: Link::connect()? })
    }

    /// Those of these families that `wanted` picks.
    ///
    /// # Errors
    /// If the kernel refuses or does not understand.
    pub fn flows(&mut self, families: &BTreeSet<Family>, wanted: impl Fn(&Flow) -> bool) -> io::Result<Vec<Flow>> {
        let mut found = Vec::new();
        for family in families {
            self.link.say(&message(GET, DUMP, [number(*family), 0, 0, 0], |_| {}))?;
            self.link.hear(|body| found.extend(body.get(FAMILY..).and_then(flow).filter(&wanted)))?;
        }
        Ok(found)
    }

    /// Forgets a flow. Says whether there was one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget(&mut self, flow: &Flow) -> io::Result<bool> {
        let family = number(Family::of(flow.original.from.ip()));
        let way = |out: &mut Vec<u8>| put_way(out, TUPLE_ORIGINAL, flow.protocol, &flow.original);
        self.link.say(&message(DELETE, ACK, [family, 0, 0, 0], way))?;
        match self.link.hear(|_| {}) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            result => result.map(|()| true),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proxy::netlink::{Said, messages};

    fn way_of(from: &str, to: &str) -> Way {
        Way { from: from.parse().unwrap(), to: to.parse().unwrap() }
    }

    fn encoded(flow: &Flow, state: u8) -> Vec<u8> {
        message(SUBSYSTEM, 0, [2, 0, 0, 0], |out| {
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
            let two = [bytes.clone(), bytes].concat();
            let said: Vec<_> = messages(&two).collect();
            assert_eq!(said.len(), 2);
            for said in said {
                assert!(matches!(said, Said::Other(body) if flow(&body[FAMILY..]).as_ref() == Some(&expect)));
            }
        };
        let four = || (way_of("10.244.1.2:5000", "10.96.0.9:80"), way_of("10.244.2.2:8080", "10.244.1.2:5000"));
        check(four().0, four().1, 1, TcpState::Unanswered);
        check(four().0, four().1, 2, TcpState::Opening);
        check(four().0, four().1, 3, TcpState::Open);
        check(four().0, four().1, 7, TcpState::Over);
        check(way_of("[fd00::1]:5000", "[fd00::2]:80"), way_of("[fd00::2]:80", "[fd00::1]:5000"), 3, TcpState::Open);
    }

    proptest! {
        #[test]
        fn nonsense_is_no_flow_and_no_panic(bytes: Vec<u8>, cut in 0usize..200) {
            let _ = flow(&bytes);
            let whole = encoded(&Flow { protocol: 6, original: way_of("1.2.3.4:5", "1.2.3.4:6"),
                reply: way_of("1.2.3.4:6", "1.2.3.4:5"), state: None }, 3);
            let _ = flow(whole.get(20..cut.clamp(20, whole.len())).unwrap());
        }
    }
}
