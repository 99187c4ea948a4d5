//! The header of the PROXY protocol, version 2 (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>). Pure.

use std::net::SocketAddr;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, a connection on somebody's behalf.
const VERSION_PROXY: u8 = 0x21;

/// Says that `client` connected to `service`, over TCP.
pub fn header(client: SocketAddr, service: SocketAddr) -> Vec<u8> {
    let mut out = SIGNATURE.to_vec();
    out.push(VERSION_PROXY);
    match (client, service) {
        (SocketAddr::V4(client), SocketAddr::V4(service)) => {
            out.extend_from_slice(&[0x11, 0, 12]);
            out.extend_from_slice(&client.ip().octets());
            out.extend_from_slice(&service.ip().octets());
        }
        (client, service) => {
            out.extend_from_slice(&[0x21, 0, 36]);
            for address in [client, service] {
                let ip = match address {
                    SocketAddr::V4(a) => a.ip().to_ipv6_mapped(),
                    SocketAddr::V6(a) => *a.ip(),
                };
                out.extend_from_slice(&ip.octets());
            }
        }
    }
    out.extend_from_slice(&client.port().to_be_bytes());
    out.extend_from_slice(&service.port().to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers() {
        let four = header("192.0.2.1:258".parse().unwrap(), "10.96.0.9:80".parse().unwrap());
        assert_eq!(four[..12], [0x0d, 0x0a, 0x0d, 0x0a, 0, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a]);
        assert_eq!(four[12..], [0x21, 0x11, 0, 12, 192, 0, 2, 1, 10, 96, 0, 9, 1, 2, 0, 80]);
        let six = header("[fd00::1]:258".parse().unwrap(), "[fd00::2]:80".parse().unwrap());
        assert_eq!((six.len(), &six[12..16]), (52, &[0x21, 0x21, 0, 36][..]));
        assert_eq!((six[16], six[31], six[47], &six[48..]), (0xfd, 1, 2, &[1, 2, 0, 80][..]));
    }
}
