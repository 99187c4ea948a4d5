//! Makes idle clients of the dead speak.
//!
//! A reset is given to whoever sends something to a dead machine. A client that only waits sends nothing, for hours. So
//! it is sent an empty segment in the other end's name that does not fit into its window. TCP has to answer such a
//! segment with an acknowledgement (RFC 9293, 3.10.7.4; it is what keepalive relies on), and that acknowledgement runs
//! into the rule that resets. So it works for pods, processes of this machine, and clients outside behind a node's port,
//! without going into anybody's network namespace. The segment itself carries nothing and changes nothing, also if the
//! verdict was wrong.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::conntrack::Way;

/// The mark of these packets: the kernel does not look for the flow that they pretend to belong to.
pub const MARK: u32 = 0x5357_0001;

const TCP: u8 = 6;
const TCP_LENGTH: usize = 20;
const ACK: u8 = 0x10;

/// An empty segment, with its IP header: in the name of `way.from`, to `way.to`. `sequence` is anything.
pub fn segment(way: Way, sequence: u32, acknowledged: u32) -> Vec<u8> {
    let mut tcp = Vec::with_capacity(TCP_LENGTH);
    tcp.extend_from_slice(&way.from.port().to_be_bytes());
    tcp.extend_from_slice(&way.to.port().to_be_bytes());
    tcp.extend_from_slice(&sequence.to_be_bytes());
    tcp.extend_from_slice(&acknowledged.to_be_bytes());
    // Five words of header, an acknowledgement, no window, the checksum, nothing urgent.
    tcp.extend_from_slice(&[5 << 4, ACK, 0, 0, 0, 0, 0, 0]);
    let mut packet = match (way.from.ip(), way.to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut ip = vec![0x45, 0, 0, (20 + TCP_LENGTH) as u8, 0, 0, 0x40, 0, 64, TCP, 0, 0];
            ip.extend_from_slice(&from.octets());
            ip.extend_from_slice(&to.octets());
            let sum = checksum(&[&ip]);
            ip[10..12].copy_from_slice(&sum);
            let pseudo = [&from.octets()[..], &to.octets(), &[0, TCP, 0, TCP_LENGTH as u8]].concat();
            let sum = checksum(&[&pseudo, &tcp]);
            tcp[16..18].copy_from_slice(&sum);
            ip
        }
        (from, to) => {
            let of = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            let mut ip = vec![0x60, 0, 0, 0, 0, TCP_LENGTH as u8, TCP, 64];
            ip.extend_from_slice(&of(from));
            ip.extend_from_slice(&of(to));
            let pseudo = [&ip[8..], &[0, 0, 0, TCP_LENGTH as u8, 0, 0, 0, TCP]].concat();
            let sum = checksum(&[&pseudo, &tcp]);
            tcp[16..18].copy_from_slice(&sum);
            ip
        }
    };
    packet.extend_from_slice(&tcp);
    packet
}

/// The internet's checksum (RFC 1071) of an even number of bytes.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|p| p.chunks(2));
    let mut sum: u32 = words.map(|w| u32::from(w[0]) << 8 | u32::from(w.get(1).copied().unwrap_or(0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Sends such segments, from the network namespace of the thread that made it.
pub struct Rouser {
    four: Socket,
    six: Option<Socket>,
}

impl Rouser {
    /// Opens its sockets.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW` and `CAP_NET_ADMIN`.
    pub fn new() -> io::Result<Rouser> {
        let open = |domain: Domain| -> io::Result<Socket> {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc_raw())))?;
            match domain {
                Domain::IPV4 => socket.set_header_included_v4(true)?,
                _ => socket.set_header_included_v6(true)?,
            }
            socket.set_mark(MARK)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        // A kernel without IPv6 has no such flows.
        Ok(Rouser { four: open(Domain::IPV4)?, six: open(Domain::IPV6).ok() })
    }

    /// Speaks to `way.to` in the name of `way.from`.
    ///
    /// # Errors
    /// If the packet does not go out.
    pub fn rouse(&self, way: Way, sequence: u32) -> io::Result<()> {
        let packet = segment(way, sequence, sequence.rotate_left(7));
        // The port of such a socket means nothing, and IPv6 insists on none.
        let to = SocketAddr::new(way.to.ip(), 0).into();
        let socket = if way.to.is_ipv4() { Some(&self.four) } else { self.six.as_ref() };
        let socket = socket.ok_or(io::ErrorKind::Unsupported)?;
        socket.send_to(&packet, &to).map(drop)
    }
}

/// `IPPROTO_RAW`: what is sent brings its own header, and nothing is ever received.
const fn libc_raw() -> i32 {
    255
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u16 {
        u16::from_be_bytes(checksum(&[bytes]))
    }

    #[test]
    fn segments_are_well_formed() {
        let way = |from: &str, to: &str| Way { from: from.parse().unwrap(), to: to.parse().unwrap() };
        let packet = segment(way("10.96.0.9:80", "10.244.1.2:5000"), 0x0102_0304, 7);
        assert_eq!(packet.len(), 40);
        // With the checksum in its place the sum of all is zero.
        assert_eq!(sum(&packet[..20]), 0);
        let pseudo = [&packet[12..20], &[0, 6, 0, 20], &packet[20..]].concat();
        assert_eq!(sum(&pseudo), 0);
        assert_eq!((&packet[12..16], &packet[16..20]), (&[10, 96, 0, 9][..], &[10, 244, 1, 2][..]));
        assert_eq!((&packet[20..28], packet[33]), (&[0, 80, 0x13, 0x88, 1, 2, 3, 4][..], ACK));

        let packet = segment(way("[fd00::1]:80", "[fd00::2]:5000"), 1, 2);
        assert_eq!((packet.len(), packet[0] >> 4, packet[6]), (60, 6, 6));
        let pseudo = [&packet[8..40], &[0, 0, 0, 20, 0, 0, 0, 6], &packet[40..]].concat();
        assert_eq!(sum(&pseudo), 0);
    }
}
