//! What the kernel has to do so that connections to addresses that are not this machine's end here: packets with
//! [`MARK`] are delivered locally. The rules of nftables set the mark.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use anyhow::{Context as _, ensure};
use futures::TryStreamExt;
use rtnetlink::{
    Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{RouteAttribute, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute},
    },
};
use tokio::task::JoinHandle;

use crate::{proxy::family::Family, routes::PROTOCOL};

/// The bit of the packet's mark.
pub const MARK: u32 = 0x2000;
/// The table of routes, and the rule's priority: before the main table.
const TABLE: u32 = 8383;
const PRIORITY: u32 = 8383;
/// The loopback's number, in every network namespace.
const LOOPBACK: u32 = 1;

struct Connection {
    handle: Handle,
    task: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn connect() -> anyhow::Result<Connection> {
    let (connection, handle, _) = rtnetlink::new_connection().context("connect to the kernel (netlink)")?;
    Ok(Connection { handle, task: tokio::spawn(connection) })
}

const EEXIST: i32 = 17;

/// Already there is fine.
fn there(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -EEXIST => Ok(()),
        result => result,
    }
}

/// Whether this machine has a family at all.
fn has(family: Family) -> bool {
    family == Family::V4 || Path::new("/proc/sys/net/ipv6").exists()
}

const fn number(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// Adds the rule and the route of a family.
///
/// # Errors
/// If the machine does not have it, or the kernel refuses.
pub async fn prepare(family: Family) -> anyhow::Result<()> {
    ensure!(has(family), "this machine has no {}", family.name());
    let kernel = connect()?;
    let anywhere = family.pick([IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)]);
    let route = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(anywhere, 0)?
        .table_id(TABLE)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(LOOPBACK)
        .protocol(RouteProtocol::from(PROTOCOL))
        .build();
    there(kernel.handle.route().add(route).execute().await).context("add the relay's route")?;
    let mut rule = kernel.handle.rule().add().table_id(TABLE).priority(PRIORITY).fw_mark(MARK);
    rule.message_mut().header.family = number(family);
    rule.message_mut().attributes.push(RuleAttribute::FwMask(MARK));
    there(rule.action(RuleAction::ToTable).execute().await).context("add the relay's routing rule")
}

/// Takes them away, of both families.
///
/// # Errors
/// If the kernel refuses.
pub async fn remove() -> anyhow::Result<()> {
    let kernel = connect()?;
    for family in Family::ALL.into_iter().filter(|family| has(*family)) {
        let version = match family {
            Family::V4 => IpVersion::V4,
            Family::V6 => IpVersion::V6,
        };
        let mut rules = std::pin::pin!(kernel.handle.rule().get(version).execute());
        while let Some(rule) = rules.try_next().await.context("list routing rules")? {
            if rule.attributes.contains(&RuleAttribute::Table(TABLE)) {
                kernel.handle.rule().del(rule).execute().await.context("remove the relay's routing rule")?;
            }
        }
        // With a destination the kernel would say what it does with that.
        let mut question = RouteMessageBuilder::<IpAddr>::new().build();
        question.header.address_family = number(family);
        let mut routes = std::pin::pin!(kernel.handle.route().get(question).execute());
        while let Some(route) = routes.try_next().await.context("list the relay's routes")? {
            if route.attributes.contains(&RouteAttribute::Table(TABLE)) {
                kernel.handle.route().del(route).execute().await.context("remove the relay's route")?;
            }
        }
    }
    Ok(())
}
