//! What tells a network where an address is now: a gratuitous ARP (RFC 5227, section 3) and an unsolicited neighbour
//! advertisement (RFC 4861, section 7.2.6).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd as _,
};

use nix::{
    ifaddrs::getifaddrs,
    sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket},
};

/// A hardware address.
pub type Mac = [u8; 6];

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// All nodes of a link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ICMPV6: u8 = 58;

/// The frame that says that `ip` is at `mac` now.
pub fn frame(ip: IpAddr, mac: Mac) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => arp(ip, mac),
        IpAddr::V6(ip) => advertisement(ip, mac),
    }
}

/// A request that nobody has to answer, for our own address: whoever knows the address learns the new place.
fn arp(ip: Ipv4Addr, mac: Mac) -> Vec<u8> {
    let mut out = Vec::with_capacity(60);
    out.extend([0xff; 6]);
    out.extend(mac);
    out.extend(ETHERTYPE_ARP);
    // Ethernet, IPv4, lengths of their addresses, request.
    out.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    out.extend(mac);
    out.extend(ip.octets());
    out.extend([0; 6]);
    out.extend(ip.octets());
    // The least that Ethernet carries.
    out.resize(60, 0);
    out
}

fn advertisement(ip: Ipv6Addr, mac: Mac) -> Vec<u8> {
    // Type, code, checksum, flags: override what is known.
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(ip.octets());
    // An option: the address of the link that it is on, in units of eight bytes.
    message.extend([2, 1]);
    message.extend(mac);
    let sum = checksum(ip, ALL_NODES, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut out = vec![0x33, 0x33, 0, 0, 0, 1];
    out.extend(mac);
    out.extend(ETHERTYPE_IPV6);
    out.extend([0x60, 0, 0, 0]);
    out.extend((message.len() as u16).to_be_bytes());
    // No router may have passed it on.
    out.extend([ICMPV6, 255]);
    out.extend(ip.octets());
    out.extend(ALL_NODES.octets());
    out.extend(message);
    out
}

/// RFC 4443, section 2.3.
fn checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let mut bytes = Vec::with_capacity(message.len() + 40);
    bytes.extend(from.octets());
    bytes.extend(to.octets());
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, ICMPV6]);
    bytes.extend(message);
    let words = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w.get(1).copied().unwrap_or_default()));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Sends these from an interface, each once.
///
/// # Errors
/// If there is no such interface, it has no hardware address, or the kernel refuses.
pub fn send(interface: &str, ips: &[IpAddr]) -> io::Result<()> {
    let link = link(interface)?;
    let mac = link.addr().ok_or_else(|| io::Error::other(format!("{interface} has no hardware address")))?;
    // It hears nothing, since no protocol is named.
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    for ip in ips {
        sendto(socket.as_raw_fd(), &frame(*ip, mac), &link, MsgFlags::MSG_DONTWAIT)?;
    }
    Ok(())
}

fn link(interface: &str) -> io::Result<LinkAddr> {
    let mut all = getifaddrs()?.filter(|a| a.interface_name == interface);
    let found = all.find_map(|a| a.address.as_ref().and_then(|a| a.as_link_addr().copied()));
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no interface {interface}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 9];

    #[test]
    fn arp_as_it_is_on_the_wire() {
        let frame = frame("192.0.2.7".parse().unwrap(), MAC);
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..14], [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9, 8, 6]);
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(frame[22..32], [2, 0, 0, 0, 0, 9, 192, 0, 2, 7]);
        assert_eq!(frame[32..42], [0, 0, 0, 0, 0, 0, 192, 0, 2, 7]);
    }

    #[test]
    fn the_sum_of_an_advertisement_comes_out() {
        let frame = frame("fd00::7".parse().unwrap(), MAC);
        let (header, message) = frame[14..].split_at(40);
        assert_eq!((header[6], header[7], usize::from(header[5])), (ICMPV6, 255, message.len()));
        assert_eq!((message[0], message[4]), (136, 0x20));
        // With its sum in place, the sum of it all is nothing.
        assert_eq!(checksum("fd00::7".parse().unwrap(), ALL_NODES, message), 0);
    }
}
