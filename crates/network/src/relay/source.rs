//! From which address and port an endpoint is spoken to.
//!
//! In the name of a client it is the client's address, and a port of which the client knows nothing: it has the same address
//! in another network namespace, and may speak to the same endpoint itself. Had both the same port, the kernel would
//! take the answers to one for the other's: what it finds a socket for, one that has ended a minute ago included, it does not
//! forward. So the relay uses other ports than those that systems choose by themselves.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    ops::Range,
};

use socket2::{SockRef, Socket};
use tokio::net::{TcpSocket, TcpStream};

use super::random;
use crate::proxy::family::Family;

/// Below those that Linux hands out (`net.ipv4.ip_local_port_range`, 32768-60999), and above those that need a privilege in
/// some namespace or other.
const PORTS: Range<u16> = 10_240..32_768;
/// So many neighbours of a port are tried.
const TRIES: u16 = 128;

/// A socket of an address's family.
///
/// # Errors
/// If no file is left, most likely.
pub fn socket(to: SocketAddr) -> io::Result<TcpSocket> {
    match Family::of(to.ip()) {
        Family::V4 => TcpSocket::new_v4(),
        Family::V6 => TcpSocket::new_v6(),
    }
}

/// Lets a socket have an address that is not ours.
///
/// # Errors
/// Without `CAP_NET_ADMIN`.
pub fn transparent(socket: &Socket, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => socket.set_ip_transparent_v4(true),
        Family::V6 => socket.set_ip_transparent_v6(true),
    }
}

/// Connects from a client's address. Ports are chosen as in RFC 6056, 3.3.1: at random, then one after the other until one
/// is free for this endpoint.
///
/// # Errors
/// If the endpoint does not answer or refuses, or so many ports are in use.
pub async fn connect(client: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let first = random(PORTS.len()) as u16;
    let mut tried = 0;
    loop {
        let socket = socket(to)?;
        transparent(&SockRef::from(&socket), Family::of(client))?;
        // One port serves for each endpoint.
        socket.set_reuseaddr(true)?;
        let port = PORTS.start + (first + tried) % PORTS.len() as u16;
        let connecting = async {
            socket.bind(SocketAddr::new(client, port))?;
            socket.connect(to).await
        };
        match connecting.await {
            Err(error) if taken(&error) && tried < TRIES => tried += 1,
            result => return result,
        }
    }
}

/// Whether the port is in use for this endpoint.
fn taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_serves_one_connection_to_each_endpoint() {
        let listeners = [std::net::TcpListener::bind("127.0.0.1:0"), std::net::TcpListener::bind("127.0.0.1:0")];
        let [one, two] = listeners.map(Result::unwrap);
        let (one_at, two_at) = (one.local_addr().unwrap(), two.local_addr().unwrap());
        let mut ports = Vec::new();
        let mut held = Vec::new();
        for _ in 0..200 {
            let stream = connect("127.0.0.1".parse().unwrap(), one_at).await.unwrap();
            ports.push(stream.local_addr().unwrap().port());
            held.push((stream, one.accept().unwrap()));
        }
        assert!(ports.iter().all(|port| PORTS.contains(port)), "{ports:?}");
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 200);
        // One of these is no obstacle to another endpoint, and is one to the same.
        let again = |to: SocketAddr| {
            let socket = socket(to).unwrap();
            socket.set_reuseaddr(true).unwrap();
            socket.bind(SocketAddr::new("127.0.0.1".parse().unwrap(), ports[0])).unwrap();
            socket.connect(to)
        };
        assert!(taken(&again(one_at).await.unwrap_err()));
        again(two_at).await.unwrap();
    }
}
