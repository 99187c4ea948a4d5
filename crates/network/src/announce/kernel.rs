//! Addresses on this machine's interfaces, by netlink.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::Context as _;
use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::{
    Handle,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, CacheInfo},
        link::LinkAttribute,
    },
};

use crate::routes::PROTOCOL;

/// An address of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    /// With its network.
    pub net: IpNet,
    /// The number of its interface.
    pub link: u32,
    /// Whether we have added it.
    pub ours: bool,
}

/// A connection to the kernel, in the network namespace of the thread that made it.
pub struct Kernel {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

const EEXIST: i32 = 17;
const EADDRNOTAVAIL: i32 = 99;

fn code(error: &rtnetlink::Error) -> i32 {
    match error {
        rtnetlink::Error::NetlinkError(message) => -message.raw_code(),
        _ => 0,
    }
}

impl Kernel {
    /// Connects.
    ///
    /// # Errors
    /// If there is no netlink.
    pub fn connect() -> anyhow::Result<Kernel> {
        let (connection, handle, _) = rtnetlink::new_connection().context("connect to the kernel (netlink)")?;
        Ok(Kernel { handle, connection: tokio::spawn(connection) })
    }

    /// The names of the interfaces by their numbers.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub async fn links(&self) -> anyhow::Result<BTreeMap<u32, String>> {
        let mut found = BTreeMap::new();
        let mut messages = std::pin::pin!(self.handle.link().get().execute());
        while let Some(message) = messages.try_next().await.context("list this machine's interfaces")? {
            for attribute in message.attributes {
                if let LinkAttribute::IfName(name) = attribute {
                    found.insert(message.header.index, name);
                }
            }
        }
        Ok(found)
    }

    /// This machine's addresses.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub async fn addresses(&self) -> anyhow::Result<Vec<Own>> {
        let mut found = Vec::new();
        let mut messages = std::pin::pin!(self.handle.address().get().execute());
        while let Some(message) = messages.try_next().await.context("list this machine's addresses")? {
            found.extend(own(&message));
        }
        Ok(found)
    }

    /// Adds an address to an interface. It is never chosen as the sender of what this machine says itself.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn add(&self, ip: IpAddr, link: u32) -> anyhow::Result<()> {
        let mut request = self.handle.address().add(link, ip, IpNet::from(ip).prefix_len());
        let attributes = &mut request.message_mut().attributes;
        // Deprecated from the start, and valid for ever.
        let mut life = CacheInfo::default();
        (life.ifa_preferred, life.ifa_valid) = (0, u32::MAX);
        attributes.push(AddressAttribute::CacheInfo(life));
        attributes.push(AddressAttribute::Protocol(AddressProtocol::from(PROTOCOL)));
        if ip.is_ipv6() {
            // Whoever had it is dead, or gives it up: nobody is asked first.
            attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        match request.execute().await {
            Err(error) if code(&error) == EEXIST => Ok(()),
            result => result.with_context(|| format!("add the address {ip}")),
        }
    }

    /// Takes an address away; that it is gone already is fine.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn remove(&self, ip: IpAddr, link: u32) -> anyhow::Result<()> {
        let message = self.handle.address().add(link, ip, IpNet::from(ip).prefix_len()).message_mut().clone();
        match self.handle.address().del(message).execute().await {
            Err(error) if code(&error) == EADDRNOTAVAIL => Ok(()),
            result => result.with_context(|| format!("remove the address {ip}")),
        }
    }
}

fn own(message: &AddressMessage) -> Option<Own> {
    // On a link with two ends `Address` is the other end, and `Local` ours.
    let (mut address, mut local, mut ours) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Protocol(protocol) => ours = u8::from(*protocol) == PROTOCOL,
            _ => {}
        }
    }
    let net = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
    Some(Own { net, link: message.header.index, ours })
}

/// The interface on whose network an address is; else the one with `fallback`, which is where other machines are.
pub fn place(ip: IpAddr, fallback: IpAddr, own: &[Own]) -> Option<u32> {
    let is_network = |own: &&Own| own.net.prefix_len() < own.net.max_prefix_len() && !own.ours;
    let on = own.iter().filter(is_network).filter(|own| own.net.contains(&ip) && !own.net.addr().is_loopback());
    let nearest = on.max_by_key(|own| own.net.prefix_len());
    nearest.or_else(|| own.iter().find(|own| own.net.addr() == fallback)).map(|own| own.link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_an_address_goes() {
        let own: Vec<Own> =
            [("127.0.0.1/8", 1), ("10.9.0.1/24", 2), ("192.0.2.10/24", 3), ("192.0.2.200/32", 4), ("fd00::1/64", 3)]
                .map(|(net, link)| Own { net: net.parse().unwrap(), link, ours: false })
                .to_vec();
        let check = |ip: &str, expect: Option<u32>| {
            assert_eq!(place(ip.parse().unwrap(), "192.0.2.10".parse().unwrap(), &own), expect, "{ip}");
        };
        check("10.9.0.50", Some(2));
        check("192.0.2.200", Some(3));
        check("fd00::9", Some(3));
        // It is on no network of ours: the routers know where it is, and ask on the machines' network.
        check("198.51.100.1", Some(3));
        check("127.0.0.9", Some(3));
        assert_eq!(place("198.51.100.1".parse().unwrap(), "10.1.1.1".parse().unwrap(), &own), None);
    }
}
