//! What the kernel has to do so that connections to addresses that are not this machine's end here: packets with
//! [`MARK`] are delivered locally. The rules of nftables set the mark.

use std::net::Ipv4Addr;

use anyhow::Context as _;
use futures::TryStreamExt;
use rtnetlink::{
    Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        route::{RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute},
    },
};
use tokio::task::JoinHandle;

use crate::routes::PROTOCOL;

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

/// Adds the rule and the route.
///
/// # Errors
/// If the kernel refuses.
pub async fn prepare() -> anyhow::Result<()> {
    let kernel = connect()?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(LOOPBACK)
        .protocol(RouteProtocol::from(PROTOCOL))
        .table_id(TABLE)
        .build();
    there(kernel.handle.route().add(route).execute().await).context("add the relay's route")?;
    let mut rule = kernel.handle.rule().add().v4().table_id(TABLE).priority(PRIORITY).fw_mark(MARK);
    rule.message_mut().attributes.push(RuleAttribute::FwMask(MARK));
    there(rule.action(RuleAction::ToTable).execute().await).context("add the relay's routing rule")
}

/// Takes them away.
///
/// # Errors
/// If the kernel refuses.
pub async fn remove() -> anyhow::Result<()> {
    let kernel = connect()?;
    let mut rules = std::pin::pin!(kernel.handle.rule().get(IpVersion::V4).execute());
    while let Some(rule) = rules.try_next().await.context("list routing rules")? {
        if rule.attributes.contains(&RuleAttribute::Table(TABLE)) {
            kernel.handle.rule().del(rule).execute().await.context("remove the relay's routing rule")?;
        }
    }
    let question = RouteMessageBuilder::<Ipv4Addr>::new().table_id(TABLE).build();
    let mut routes = std::pin::pin!(kernel.handle.route().get(question).execute());
    while let Some(route) = routes.try_next().await.context("list the relay's routes")? {
        use rtnetlink::packet_route::route::RouteAttribute;
        if route.attributes.contains(&RouteAttribute::Table(TABLE)) {
            kernel.handle.route().del(route).execute().await.context("remove the relay's route")?;
        }
    }
    Ok(())
}
