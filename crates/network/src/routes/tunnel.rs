//! This node's end of the tunnel: a device (VXLAN, RFC 7348) that neither learns nor asks. Who is where is told to it.
//!
//! Two rules of nftables belong to it. Datagrams from others than nodes are dropped before they are unpacked. And where
//! the largest packet is smaller than the pods think, which have the size of their node's network, connections agree on
//! what fits (RFC 4459); for everything else the kernel says that it was too large.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::Context as _;

use super::{
    Config, End, Entry, Mac,
    kernel::{Kernel, Vxlan},
};
use crate::nft;

/// The tunnel's device.
pub const DEVICE: &str = "seawall.vxlan";
/// The UDP port of the tunnel. It is the kernel's own default, which firewalls' rules for other cluster networks have.
pub const PORT: u16 = 8472;

/// The number in the datagrams.
const VNI: u32 = 83;
const TABLE: &str = "inet seawall_tunnel";
/// The loopback's number, in every network namespace.
const LOOPBACK: u32 = 1;

/// By how much a packet grows on its way: its own Ethernet header, and those of VXLAN, UDP and IP.
const fn overhead(local: IpAddr) -> u32 {
    let ip = if local.is_ipv4() { 20 } else { 40 };
    14 + 8 + 8 + ip
}

/// Who may send, and how large.
fn rules(port: u16, nodes: &BTreeSet<IpAddr>) -> String {
    let mut from = String::new();
    for (family, six) in [("ip", false), ("ip6", true)] {
        let list: Vec<String> = nodes.iter().filter(|ip| ip.is_ipv6() == six).map(ToString::to_string).collect();
        if !list.is_empty() {
            from += &format!("        udp dport {port} {family} saddr {{ {} }} accept\n", list.join(", "));
        }
    }
    format!(
        "add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n    chain input {{\n        \
         type filter hook input priority filter - 5; policy accept;\n{from}        udp dport {port} drop\n    }}\n    \
         chain forward {{\n        type filter hook forward priority mangle; policy accept;\n        \
         oifname \"{DEVICE}\" tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu\n    }}\n}}\n"
    )
}

/// Makes the device what it should be.
///
/// # Errors
/// If the kernel refuses.
pub async fn ensure(kernel: &Kernel, config: &Config, end: &End) -> anyhow::Result<()> {
    guard(kernel, config, end).await?;
    let uplink = kernel.placed().await?.into_iter().find(|(net, _)| net.addr() == end.local).map(|(_, index)| index);
    let uplink = uplink.with_context(|| format!("no interface has the address {}", end.local))?;
    // An address may be the loopback's where routers are told of it; nothing leaves there.
    let link = kernel.link_at(uplink).await?.filter(|link| link.index != LOOPBACK);
    let mtu = link.map_or(1500, |link| link.mtu).saturating_sub(overhead(end.local));
    let vxlan = Vxlan { vni: VNI, port: config.tunnel_port, local: end.local, mac: Mac::of(end.local) };
    let mut device = kernel.link(DEVICE).await?;
    if let Some(old) = device.take_if(|d| d.tunnel != Some(vxlan)) {
        kernel.remove_link(old.index).await.with_context(|| format!("remove the old {DEVICE}"))?;
    }
    let device = match device {
        Some(device) => device,
        None => {
            kernel.add_tunnel(DEVICE, vxlan, mtu).await.with_context(|| format!("make {DEVICE}"))?;
            tracing::info!(from = %end.local, mtu, "nodes of other networks are reached by {DEVICE}");
            kernel.link(DEVICE).await?.with_context(|| format!("{DEVICE} is gone as soon as it was made"))?
        }
    };
    if device.mtu != mtu || !device.up {
        kernel.set_mtu(device.index, mtu).await.with_context(|| format!("set the MTU {mtu} of {DEVICE}"))?;
    }
    addresses(kernel, device.index, &end.addresses).await?;
    entries(kernel, device.index, &end.entries).await
}

async fn addresses(kernel: &Kernel, device: u32, wanted: &BTreeSet<IpAddr>) -> anyhow::Result<()> {
    let all = kernel.placed().await?.into_iter().filter(|(net, index)| *index == device && !is_link_local(net.addr()));
    let present: BTreeSet<IpAddr> = all.map(|(net, _)| net.addr()).collect();
    for ip in present.difference(wanted) {
        kernel.remove_address(*ip, device).await.with_context(|| format!("remove {ip} from {DEVICE}"))?;
    }
    for ip in wanted.difference(&present) {
        kernel.add_address(*ip, device).await.with_context(|| format!("add {ip} to {DEVICE}"))?;
    }
    Ok(())
}

/// The kernel gives each interface one of IPv6.
fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

async fn entries(kernel: &Kernel, device: u32, wanted: &BTreeSet<Entry>) -> anyhow::Result<()> {
    let present = kernel.entries(device).await?;
    for entry in present.difference(wanted) {
        kernel.remove_entry(device, *entry).await.with_context(|| format!("remove {entry:?} from {DEVICE}"))?;
    }
    for entry in wanted.difference(&present) {
        kernel.add_entry(device, *entry).await.with_context(|| format!("add {entry:?} to {DEVICE}"))?;
    }
    Ok(())
}

async fn guard(kernel: &Kernel, config: &Config, end: &End) -> anyhow::Result<()> {
    let script = rules(config.tunnel_port, &end.nodes);
    if *kernel.rules.lock() == script && nft::is_there(&config.nft, TABLE).await {
        return Ok(());
    }
    nft::apply(&config.nft, &script).await.context("the tunnel's rules")?;
    *kernel.rules.lock() = script;
    Ok(())
}

/// Takes the device and its rules away, if they are there.
///
/// # Errors
/// If the kernel refuses.
pub async fn remove(kernel: &Kernel, config: &Config) -> anyhow::Result<()> {
    let Some(device) = kernel.link(DEVICE).await? else { return Ok(()) };
    // The rules first: what is found gone the next time is the device.
    nft::apply(&config.nft, &format!("add table {TABLE}\ndelete table {TABLE}\n"))
        .await
        .context("the tunnel's rules")?;
    kernel.rules.lock().clear();
    kernel.remove_link(device.index).await.with_context(|| format!("remove {DEVICE}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits() {
        assert_eq!(1500 - overhead("10.9.0.1".parse().unwrap()), 1450);
        assert_eq!(1500 - overhead("fd00::1".parse().unwrap()), 1430);
    }

    #[test]
    fn only_nodes_may_send() {
        let nodes = ["10.9.0.2", "192.0.2.1"].map(|ip| ip.parse().unwrap());
        let script = rules(PORT, &nodes.into());
        let said: Vec<&str> = script.lines().map(str::trim).filter(|l| l.starts_with("udp")).collect();
        assert_eq!(said, ["udp dport 8472 ip saddr { 10.9.0.2, 192.0.2.1 } accept", "udp dport 8472 drop"]);
    }
}
