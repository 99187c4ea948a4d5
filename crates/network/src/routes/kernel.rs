//! The kernel's side: netlink.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::Context as _;
use futures::TryStreamExt;
use ipnet::IpNet;
use parking_lot::Mutex;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVxlan, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags},
        link::{InfoData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol},
    },
};

use super::{Entry, Mac, PROTOCOL, Route, Via};

/// A connection to the kernel, in the network namespace of the thread that made it.
pub struct Kernel {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
    /// The rules that nft was last given.
    pub(super) rules: Mutex<String>,
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// The largest packet, in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// What it is as a tunnel; none if it is none.
    pub tunnel: Option<Vxlan>,
}

/// What makes a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// The number in its datagrams.
    pub vni: u32,
    /// The port to which they are sent.
    pub port: u16,
    /// The address from which they are sent.
    pub local: IpAddr,
    /// The hardware address within.
    pub mac: Mac,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Kernel {
    /// Connects.
    ///
    /// # Errors
    /// If there is no netlink.
    pub fn connect() -> anyhow::Result<Kernel> {
        let (connection, handle, _) = rtnetlink::new_connection().context("connect to the kernel (netlink)")?;
        Ok(Kernel { handle, connection: tokio::spawn(connection), rules: Mutex::default() })
    }

    /// This machine's addresses, with the networks that they are on.
    pub async fn addresses(&self) -> anyhow::Result<Vec<IpNet>> {
        Ok(self.placed().await?.into_iter().map(|(net, _)| net).collect())
    }

    /// The same, with the numbers of their interfaces.
    pub(super) async fn placed(&self) -> anyhow::Result<Vec<(IpNet, u32)>> {
        let mut found = Vec::new();
        let mut messages = std::pin::pin!(self.handle.address().get().execute());
        while let Some(message) = messages.try_next().await.context("list this machine's addresses")? {
            // On a link with two ends `Address` is the other end, and `Local` ours.
            let (mut address, mut local) = (None, None);
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::Address(ip) => address = Some(*ip),
                    AddressAttribute::Local(ip) => local = Some(*ip),
                    _ => {}
                }
            }
            if let Some(ip) = local.or(address) {
                found.extend(IpNet::new(ip, message.header.prefix_len).ok().map(|net| (net, message.header.index)));
            }
        }
        Ok(found)
    }

    /// Adds an address without a network.
    pub(super) async fn add_address(&self, ip: IpAddr, index: u32) -> anyhow::Result<()> {
        let mut request = self.handle.address().add(index, ip, IpNet::from(ip).prefix_len());
        if ip.is_ipv6() {
            // Nobody else can have it, and it is needed at once.
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        there(request.execute().await).map_err(explain)
    }

    /// Takes an address away.
    pub(super) async fn remove_address(&self, ip: IpAddr, index: u32) -> anyhow::Result<()> {
        let message = self.handle.address().add(index, ip, IpNet::from(ip).prefix_len()).message_mut().clone();
        gone(self.handle.address().del(message).execute().await).map_err(explain)
    }

    /// The interface with this name.
    pub async fn link(&self, name: &str) -> anyhow::Result<Option<Link>> {
        let mut messages = std::pin::pin!(self.handle.link().get().match_name(name).execute());
        match messages.try_next().await {
            Ok(message) => Ok(message.as_ref().map(link)),
            Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -errno::ENODEV => Ok(None),
            Err(error) => Err(error).with_context(|| format!("look for the interface {name}")),
        }
    }

    /// The interface with this number.
    pub(super) async fn link_at(&self, index: u32) -> anyhow::Result<Option<Link>> {
        let mut messages = std::pin::pin!(self.handle.link().get().match_index(index).execute());
        Ok(messages.try_next().await.with_context(|| format!("look for interface {index}"))?.as_ref().map(link))
    }

    /// Makes a tunnel's device, which is up.
    pub(super) async fn add_tunnel(&self, name: &str, vxlan: Vxlan, mtu: u32) -> anyhow::Result<()> {
        let message = LinkVxlan::new(name, vxlan.vni).port(vxlan.port).learning(false);
        let message = match vxlan.local {
            IpAddr::V4(ip) => message.local(ip),
            IpAddr::V6(ip) => message.local6(ip),
        };
        let message = message.address(vxlan.mac.0.to_vec()).mtu(mtu).up().build();
        self.handle.link().add(message).execute().await.map_err(explain)
    }

    /// Sets the size of the largest packet, and puts the interface up.
    pub(super) async fn set_mtu(&self, index: u32, mtu: u32) -> anyhow::Result<()> {
        let message = LinkMessageBuilder::<LinkUnspec>::default().index(index).mtu(mtu).up().build();
        self.handle.link().set(message).execute().await.map_err(explain)
    }

    /// Takes an interface away, with all that leads there.
    pub(super) async fn remove_link(&self, index: u32) -> anyhow::Result<()> {
        gone(self.handle.link().del(index).execute().await).map_err(explain)
    }

    /// What a tunnel's device knows of other nodes.
    pub(super) async fn entries(&self, index: u32) -> anyhow::Result<BTreeSet<Entry>> {
        let mut found = BTreeSet::new();
        for family in [AddressFamily::Bridge, AddressFamily::Inet, AddressFamily::Inet6] {
            let mut messages = std::pin::pin!(self.handle.neighbours().get().set_address_family(family).execute());
            while let Some(message) = messages.try_next().await.context("list neighbours")? {
                if message.header.ifindex == index {
                    found.extend(entry(&message));
                }
            }
        }
        Ok(found)
    }

    /// Adds an entry to a tunnel's device.
    pub(super) async fn add_entry(&self, index: u32, entry: Entry) -> anyhow::Result<()> {
        let neighbours = self.handle.neighbours();
        let request = match entry {
            Entry::Neighbour(ip, mac) => neighbours.add(index, ip).link_layer_address(&mac.0).replace(),
            Entry::Forward(mac, to) => {
                neighbours.add_bridge(index, &mac.0).destination(to).flags(NeighbourFlags::Own).replace()
            }
        };
        request.execute().await.map_err(explain)
    }

    /// Removes one.
    pub(super) async fn remove_entry(&self, index: u32, entry: Entry) -> anyhow::Result<()> {
        let neighbours = self.handle.neighbours();
        let message = match entry {
            Entry::Neighbour(ip, mac) => neighbours.add(index, ip).link_layer_address(&mac.0).message_mut().clone(),
            Entry::Forward(mac, to) => {
                let request = neighbours.add_bridge(index, &mac.0).destination(to).flags(NeighbourFlags::Own);
                { request }.message_mut().clone()
            }
        };
        gone(neighbours.del(message).execute().await).map_err(explain)
    }

    /// The routes with our protocol. `tunnel` is the number of the tunnel's device.
    pub async fn routes(&self, tunnel: Option<u32>) -> anyhow::Result<Vec<Route>> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut question = RouteMessage::default();
            question.header.address_family = family;
            let mut messages = std::pin::pin!(self.handle.route().get(question).execute());
            loop {
                let message = match messages.try_next().await {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    // A kernel without IPv6 has no such routes.
                    Err(_) if family == AddressFamily::Inet6 => break,
                    Err(error) => return Err(error).context("list routes"),
                };
                let ours = message.header.protocol == RouteProtocol::from(PROTOCOL)
                    && message.header.table == RouteHeader::RT_TABLE_MAIN;
                if ours {
                    found.extend(route(&message, tunnel));
                }
            }
        }
        Ok(found)
    }

    /// Adds a route, or changes where the one to the same pods leads.
    pub async fn add(&self, route: Route, tunnel: Option<u32>, replace: bool) -> anyhow::Result<()> {
        let request = self.handle.route().add(message(route, tunnel)?);
        let request = if replace { request.replace() } else { request };
        request.execute().await.map_err(explain)
    }

    /// Removes a route of ours; one that is gone already is fine.
    pub async fn remove(&self, route: Route, tunnel: Option<u32>) -> anyhow::Result<()> {
        gone(self.handle.route().del(message(route, tunnel)?).execute().await).map_err(explain)
    }
}

/// The numbers of errors that we know what to make of.
mod errno {
    pub const EPERM: i32 = 1;
    pub const ENOENT: i32 = 2;
    pub const ESRCH: i32 = 3;
    pub const EEXIST: i32 = 17;
    pub const ENODEV: i32 = 19;
    pub const EOPNOTSUPP: i32 = 95;
    pub const EADDRNOTAVAIL: i32 = 99;
}

fn code(error: &rtnetlink::Error) -> i32 {
    match error {
        rtnetlink::Error::NetlinkError(message) => -message.raw_code(),
        _ => 0,
    }
}

/// That something is there already is fine.
fn there(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    result.or_else(|error| if code(&error) == errno::EEXIST { Ok(()) } else { Err(error) })
}

/// That something is gone already is fine.
fn gone(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    const GONE: [i32; 4] = [errno::ENOENT, errno::ESRCH, errno::ENODEV, errno::EADDRNOTAVAIL];
    result.or_else(|error| if GONE.contains(&code(&error)) { Ok(()) } else { Err(error) })
}

fn explain(error: rtnetlink::Error) -> anyhow::Error {
    let hint = match code(&error) {
        errno::EEXIST => "somebody else's route leads there already; remove it, or leave this out (--disable routes)",
        errno::EPERM => "root is needed (CAP_NET_ADMIN)",
        errno::EOPNOTSUPP => "this kernel cannot do it: is the module vxlan there? Without it, --tunnel never",
        _ => return error.into(),
    };
    anyhow::Error::from(error).context(hint)
}

fn link(message: &LinkMessage) -> Link {
    let (mut mtu, mut mac, mut info) = (0, None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::LinkInfo(infos) => {
                info = infos.iter().find_map(|i| match i {
                    LinkInfo::Data(InfoData::Vxlan(vxlan)) => Some(vxlan),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let tunnel = info.and_then(|infos| vxlan(infos, Mac(mac?)));
    Link { index: message.header.index, mtu, up: message.header.flags.contains(LinkFlags::Up), tunnel }
}

fn vxlan(infos: &[InfoVxlan], mac: Mac) -> Option<Vxlan> {
    let (mut vni, mut port, mut local) = (None, None, None);
    for info in infos {
        match info {
            InfoVxlan::Id(id) => vni = Some(*id),
            InfoVxlan::Port(number) => port = Some(*number),
            InfoVxlan::Local(ip) => local = Some(IpAddr::V4(*ip)),
            InfoVxlan::Local6(ip) => local = Some(IpAddr::V6(*ip)),
            _ => {}
        }
    }
    Some(Vxlan { vni: vni?, port: port?, local: local?, mac })
}

fn entry(message: &NeighbourMessage) -> Option<Entry> {
    let (mut to, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => to = Some(IpAddr::V4(*ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => to = Some(IpAddr::V6(*ip)),
            // Of a device's own table, where the family is that of the bridge.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                let four = <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from);
                to = four.or_else(|| <[u8; 16]>::try_from(bytes.as_slice()).ok().map(IpAddr::from));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac),
            _ => {}
        }
    }
    match message.header.family {
        AddressFamily::Bridge => Some(Entry::Forward(mac?, to?)),
        // The kernel's own are for groups.
        _ => Some(Entry::Neighbour(to.filter(|ip| !ip.is_multicast())?, mac?)),
    }
}

fn message(route: Route, tunnel: Option<u32>) -> anyhow::Result<RouteMessage> {
    let builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(route.pods.network(), route.pods.prefix_len())?
        .protocol(RouteProtocol::from(PROTOCOL));
    let builder = match route.via {
        Via::Gateway(ip) => builder.gateway(ip)?,
        Via::Tunnel => {
            let device = tunnel.context("the tunnel's device is gone")?;
            builder.gateway(route.pods.network())?.output_interface(device).onlink()
        }
    };
    Ok(builder.build())
}

fn route(message: &RouteMessage, tunnel: Option<u32>) -> Option<Route> {
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    };
    let (mut pods, mut via, mut device) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => pods = address(to),
            RouteAttribute::Gateway(by) => via = address(by),
            RouteAttribute::Oif(index) => device = Some(*index),
            _ => {}
        }
    }
    let pods = IpNet::new(pods?, message.header.destination_prefix_length).ok()?;
    let via = if tunnel.is_some() && device == tunnel { Via::Tunnel } else { Via::Gateway(via?) };
    Some(Route { pods, via })
}
