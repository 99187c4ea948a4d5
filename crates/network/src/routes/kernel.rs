//! The kernel's side: netlink.

use std::net::IpAddr;

use anyhow::Context as _;
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::AddressAttribute,
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol},
    },
};

use super::{PROTOCOL, Route};

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

impl Kernel {
    /// Connects.
    ///
    /// # Errors
    /// If there is no netlink.
    pub fn connect() -> anyhow::Result<Kernel> {
        let (connection, handle, _) = rtnetlink::new_connection().context("connect to the kernel (netlink)")?;
        Ok(Kernel { handle, connection: tokio::spawn(connection) })
    }

    /// This machine's addresses, with the networks that they are on.
    pub async fn addresses(&self) -> anyhow::Result<Vec<IpNet>> {
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
                found.extend(IpNet::new(ip, message.header.prefix_len).ok());
            }
        }
        Ok(found)
    }

    /// The routes with our protocol.
    pub async fn routes(&self) -> anyhow::Result<Vec<Route>> {
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
                    found.extend(route(&message));
                }
            }
        }
        Ok(found)
    }

    /// Adds a route, or changes where the one to the same pods leads.
    pub async fn add(&self, route: Route, replace: bool) -> anyhow::Result<()> {
        let request = self.handle.route().add(message(route)?);
        let request = if replace { request.replace() } else { request };
        request.execute().await.map_err(explain)
    }

    /// Removes a route of ours; one that is gone already is fine.
    pub async fn remove(&self, route: Route) -> anyhow::Result<()> {
        match self.handle.route().del(message(route)?).execute().await {
            Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -errno::ESRCH => Ok(()),
            result => result.map_err(explain),
        }
    }
}

/// The numbers of errors that we know what to make of.
mod errno {
    pub const EPERM: i32 = 1;
    pub const ESRCH: i32 = 3;
    pub const EEXIST: i32 = 17;
}

fn explain(error: rtnetlink::Error) -> anyhow::Error {
    let code = match &error {
        rtnetlink::Error::NetlinkError(message) => -message.raw_code(),
        _ => 0,
    };
    let hint = match code {
        errno::EEXIST => "somebody else's route leads there already; remove it, or leave this out (--disable routes)",
        errno::EPERM => "root is needed (CAP_NET_ADMIN)",
        _ => return error.into(),
    };
    anyhow::Error::from(error).context(hint)
}

fn message(route: Route) -> anyhow::Result<RouteMessage> {
    Ok(RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(route.pods.network(), route.pods.prefix_len())?
        .gateway(route.via)?
        .protocol(RouteProtocol::from(PROTOCOL))
        .build())
}

fn route(message: &RouteMessage) -> Option<Route> {
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    };
    let (mut pods, mut via) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => pods = address(to),
            RouteAttribute::Gateway(by) => via = address(by),
            _ => {}
        }
    }
    let pods = IpNet::new(pods?, message.header.destination_prefix_length).ok()?;
    Some(Route { pods, via: via? })
}
