//! The kernel's table of flows, over netlink: read and forgotten in one go, without a process for each.
//!
//! The numbers are those of `linux/netfilter/nfnetlink_conntrack.h`.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use super::netlink::{ACK, DUMP, FAMILY, Link, NESTED, attribute, message, put};

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

const fn family(ipv4: bool) -> u8 {
    if ipv4 { 2 } else { 10 }
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

    /// Those of both families that `wanted` picks.
    ///
    /// # Errors
    /// If the kernel refuses or does not understand.
    pub fn flows(&mut self, wanted: impl Fn(&Flow) -> bool) -> io::Result<Vec<Flow>> {
        let mut found = Vec::new();
        for family in [family(true), family(false)] {
            self.link.say(&message(GET, DUMP, [family, 0, 0, 0], |_| {}))?;
            self.link.hear(|body| found.extend(body.get(FAMILY..).and_then(flow).filter(&wanted)))?;
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
