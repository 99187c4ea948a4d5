//! The machine answers, the process does not: a kernel says by ICMP that nobody listens on a port (RFC 1122, 3.2.2.1).
//! On the gossip's port that means that the process is gone; on [`NOBODYS`], where nobody ever listens, that the machine
//! has power, whatever its processes are doing.
//!
//! A socket that talks to many hears of that only through its error queue (ip(7), `IP_RECVERR`), where the address of the
//! packet that was refused stands beside the error.

use std::{
    io::IoSliceMut,
    net::{SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket},
    os::fd::AsRawFd,
};

use nix::{
    errno::Errno,
    sys::socket::{
        ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt,
        sockopt::{Ipv4RecvErr, Ipv6RecvErr},
    },
};

/// `SO_EE_ORIGIN_ICMP` and `SO_EE_ORIGIN_ICMP6`: another machine said so, and not our own routing table.
const ORIGINS: [u8; 2] = [2, 3];
/// A port on which nobody listens: what TCP calls tcpmux (RFC 1078) has never been there for UDP.
pub const NOBODYS: u16 = 1;
/// No more of them are read at a time.
const MOST: usize = 1024;

/// Lets a socket hear of refusals.
///
/// # Errors
/// If the system does not know the option.
pub fn listen(socket: &UdpSocket) -> Result<(), Errno> {
    match socket.local_addr().map(|address| address.is_ipv6()) {
        Ok(true) => setsockopt(socket, Ipv6RecvErr, &true),
        _ => setsockopt(socket, Ipv4RecvErr, &true),
    }
}

/// The addresses and ports that refused a packet since the last time.
pub fn take(socket: &impl AsRawFd) -> Vec<SocketAddr> {
    let mut refused = Vec::new();
    let (mut data, mut control) = ([0; 64], vec![0; 512]);
    for _ in 0..MOST {
        let mut into = [IoSliceMut::new(&mut data)];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let Ok(message) = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut into, Some(&mut control), flags) else {
            break;
        };
        let address = message.address.and_then(|address| {
            let v4 = address.as_sockaddr_in().map(|a| SocketAddr::V4(SocketAddrV4::new(a.ip(), a.port())));
            v4.or_else(|| {
                let v6 = address.as_sockaddr_in6()?;
                Some(SocketAddr::V6(SocketAddrV6::new(v6.ip(), v6.port(), 0, 0)))
            })
        });
        let Ok(messages) = message.cmsgs() else { continue };
        for message in messages {
            let (ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _)) = message
            else {
                continue;
            };
            if error.ee_errno == Errno::ECONNREFUSED as u32 && ORIGINS.contains(&error.ee_origin) {
                refused.extend(address);
            }
        }
    }
    refused.sort();
    refused.dedup();
    refused
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_port_where_nobody_listens_refuses() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        listen(&socket).unwrap();
        assert_eq!(take(&socket), Vec::<SocketAddr>::new());
        let nobody = UdpSocket::bind("127.0.0.2:0").unwrap();
        let somebody = UdpSocket::bind("127.0.0.3:0").unwrap();
        let (gone, there) = (nobody.local_addr().unwrap(), somebody.local_addr().unwrap());
        drop(nobody);
        socket.send_to(b"x", gone).unwrap();
        let _ = socket.send_to(b"x", there);
        let mut heard = Vec::new();
        for _ in 0..200 {
            heard.extend(take(&socket));
            if !heard.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(heard, [gone]);
    }
}
