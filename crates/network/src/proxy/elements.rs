//! Elements of sets, straight to the kernel.
//!
//! `nft` reads all that the kernel holds before it changes anything, which takes long where there is much. That a machine is
//! dead must not wait for that.

use std::{io, net::IpAddr};

use ipnet::IpNet;

use super::{
    dead::Target,
    netlink::{ACK, Link, NESTED, message, put},
    rules::TABLE,
};

/// `linux/netfilter/nf_tables.h`.
const NEW_ELEMENTS: u16 = 10 << 8 | 12;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const CREATE: u16 = 0x400;
/// To whom a batch goes: nftables.
const BATCH: [u8; 4] = [0, 0, 0, 10];
const INET: u8 = 1;
const INTERVAL_END: u32 = 1;

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The first address after a range, if there is one.
fn after(net: &IpNet) -> Option<Vec<u8>> {
    let mut last = octets(net.broadcast());
    for byte in last.iter_mut().rev() {
        let (next, carry) = byte.overflowing_add(1);
        *byte = next;
        if !carry {
            return Some(last);
        }
    }
    None
}

/// The keys of an element: an interval is where it begins and where it has ended.
fn keys(target: &Target) -> Vec<(Vec<u8>, bool)> {
    match target {
        Target::Pods(net) => {
            let end = after(net).map(|end| (end, true));
            std::iter::once((octets(net.network()), false)).chain(end).collect()
        }
        Target::Port(address) => {
            let mut key = octets(address.ip());
            key.extend_from_slice(&address.port().to_be_bytes());
            // Each part of a key fills whole words.
            key.extend_from_slice(&[0; 2]);
            vec![(key, false)]
        }
    }
}

/// The batch that adds these targets to their sets. Pure.
pub fn batch(targets: &[&Target]) -> Vec<u8> {
    let text = |out: &mut Vec<u8>, kind: u16, text: &str| {
        put(out, kind, |out| {
            out.extend_from_slice(text.as_bytes());
            out.push(0);
        });
    };
    let mut out = message(BATCH_BEGIN, 0, BATCH, |_| {});
    let table = TABLE.rsplit(' ').next().unwrap_or(TABLE);
    for (number, target) in targets.iter().enumerate() {
        // The answers come when all is done, or nothing: those that went wrong, and this one. (What ends a batch is
        // answered by newer kernels only.)
        let flags = if number + 1 == targets.len() { CREATE | ACK } else { CREATE };
        out.extend(message(NEW_ELEMENTS, flags, [INET, 0, 0, 0], |out| {
            text(out, 1, table);
            text(out, 2, target.set());
            put(out, 3 | NESTED, |out| {
                for (key, end) in keys(target) {
                    put(out, 1 | NESTED, |out| {
                        put(out, 1 | NESTED, |out| put(out, 1, |out| out.extend_from_slice(&key)));
                        if end {
                            put(out, 3, |out| out.extend_from_slice(&INTERVAL_END.to_be_bytes()));
                        }
                    });
                }
            });
        }));
    }
    out.extend(message(BATCH_END, 0, BATCH, |_| {}));
    out
}

/// Adds them, all or none. It blocks for one exchange with the kernel.
///
/// # Errors
/// If the kernel refuses.
pub fn add(targets: &[&Target]) -> io::Result<()> {
    let mut link = Link::connect()?;
    link.say(&batch(targets))?;
    link.hear(|_| {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_after_their_last_address() {
        let check = |net: &str, first: &[u8], end: Option<&[u8]>| {
            let keys = keys(&Target::Pods(net.parse().unwrap()));
            assert_eq!(keys[0], (first.to_vec(), false));
            assert_eq!(keys.get(1).map(|(key, end)| (&key[..], *end)), end.map(|end| (end, true)));
        };
        check("10.244.2.0/24", &[10, 244, 2, 0], Some(&[10, 244, 3, 0]));
        check("10.244.255.0/24", &[10, 244, 255, 0], Some(&[10, 245, 0, 0]));
        check("10.244.2.7/32", &[10, 244, 2, 7], Some(&[10, 244, 2, 8]));
        check("255.255.255.255/32", &[255; 4], None);
        assert_eq!(keys(&Target::Port("10.9.0.2:258".parse().unwrap())), [(vec![10, 9, 0, 2, 1, 2, 0, 0], false)]);
    }

    #[test]
    fn a_batch_begins_and_ends() {
        let one = Target::Pods("10.244.2.0/24".parse().unwrap());
        let bytes = batch(&[&one]);
        let mut kinds = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            kinds.push(u16::from_ne_bytes([rest[4], rest[5]]));
            rest = &rest[u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize..];
        }
        assert_eq!(kinds, [BATCH_BEGIN, NEW_ELEMENTS, BATCH_END]);
    }
}
