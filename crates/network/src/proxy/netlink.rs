//! As much of netlink as is needed to talk to netfilter: messages, attributes, a connection.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
        sockopt,
    },
    time::{TimeVal, TimeValLike as _},
};

/// The sender wants to be told how it went.
pub const ACK: u16 = 4;
/// All of them.
pub const DUMP: u16 = 0x300;
/// An attribute that holds attributes.
pub const NESTED: u16 = 0x8000;
/// What stands before netfilter's attributes: family, version, resource.
pub const FAMILY: usize = 4;

const REQUEST: u16 = 1;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Of a message: length, type, flags, number, sender.
const HEADER: usize = 16;
/// What of an attribute's type is its number; the rest are flags.
const TYPE: u16 = 0x3fff;

fn word16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?))
}

fn word32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// The attributes in some bytes: numbers and values. What is cut off is left out.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(word16(bytes)?);
        let kind = word16(bytes.get(2..)?)? & TYPE;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute with a number.
pub fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Adds an attribute.
pub fn put(out: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    fill(out);
    let length = (out.len() - start) as u16;
    out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    out[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A message about netfilter.
pub fn message(kind: u16, flags: u16, family: [u8; FAMILY], fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = vec![0; HEADER];
    out.extend_from_slice(&family);
    fill(&mut out);
    let length = out.len() as u32;
    out[0..4].copy_from_slice(&length.to_ne_bytes());
    out[4..6].copy_from_slice(&kind.to_ne_bytes());
    out[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
    out
}

/// What one message says.
pub enum Said<'a> {
    /// The end of a list.
    Done,
    /// How it went: zero, or a negative number.
    Went(i32),
    /// Anything else.
    Other(&'a [u8]),
}

/// The messages in what was received.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Said<'_>> {
    std::iter::from_fn(move || {
        let length = word32(bytes)? as usize;
        let kind = word16(bytes.get(4..)?)?;
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(match kind {
            DONE => Said::Done,
            ERROR => Said::Went(word32(body).unwrap_or_default() as i32),
            _ => Said::Other(body),
        })
    })
}

/// A connection to netfilter, in the network namespace of the thread that made it. It blocks.
pub struct Link {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Link {
    /// Connects.
    ///
    /// # Errors
    /// If the kernel has no netfilter.
    pub fn connect() -> io::Result<Link> {
        let netfilter = SockProtocol::NetlinkNetFilter;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, netfilter)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // A table of half a million flows is read in fewer rounds; who may not have that room reads in more.
        let _ = setsockopt(&socket, sockopt::RcvBuf, &(1 << 20));
        // Nobody waits for a kernel that answers nothing.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
        Ok(Link { socket, buffer: vec![0; 64 << 10] })
    }

    /// Sends.
    ///
    /// # Errors
    /// If that fails.
    pub fn say(&self, message: &[u8]) -> io::Result<()> {
        send(self.socket.as_raw_fd(), message, MsgFlags::empty())?;
        Ok(())
    }

    /// Hears until the kernel says that it is done, or how it went.
    ///
    /// # Errors
    /// If it went badly.
    pub fn hear(&mut self, mut take: impl FnMut(&[u8])) -> io::Result<()> {
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            for said in messages(&self.buffer[..length]) {
                match said {
                    Said::Other(body) => take(body),
                    Said::Done | Said::Went(0) => return Ok(()),
                    Said::Went(code) => return Err(io::Error::from_raw_os_error(-code)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ends_and_errors_are_read() {
        assert!(matches!(messages(&message(DONE, 0, [0; 4], |_| {})).next(), Some(Said::Done)));
        let mut refused = message(ERROR, 0, [0; 4], |_| {});
        refused[HEADER..HEADER + 4].copy_from_slice(&(-2i32).to_ne_bytes());
        assert!(matches!(messages(&refused).next(), Some(Said::Went(-2))));
    }

    proptest! {
        #[test]
        fn nonsense_is_no_panic(bytes: Vec<u8>) {
            let _ = messages(&bytes).count();
            let _ = attributes(&bytes).count();
        }
    }
}
