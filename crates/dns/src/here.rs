//! The cluster DNS's address on a node: what the kernel has to know so that packets to it end at the node's own DNS while
//! that lives, and go the usual way of the Service's when it does not.
//!
//! The address is the loopback's, and packets to it and from it are not tracked, before the service proxy's rules see them:
//! then no translation takes place. For what pods send, the rule asks the kernel whether somebody listens there, for every
//! packet: when this process is killed, the very next one takes the way of the Service to a replica, whatever is left
//! behind. What processes of the node itself send cannot be asked about, and is refused until the process is back. A clean
//! stop leaves nothing behind.

use std::{net::IpAddr, process::Stdio};

use anyhow::{Context as _, bail};
use futures::TryStreamExt;
use rtnetlink::{Handle, packet_route::address::AddressAttribute};
use tokio::{io::AsyncWriteExt, process::Command, task::JoinHandle};

/// Our table.
const TABLE: &str = "inet seawall_dns";
/// The loopback's number, in every network namespace.
const LOOPBACK: u32 = 1;
const EEXIST: i32 = 17;
const EADDRNOTAVAIL: i32 = 99;

/// The rules for these addresses. They replace what is there.
fn rules(addresses: &[IpAddr]) -> String {
    let of = |four: bool| -> Vec<String> {
        addresses.iter().filter(|ip| ip.is_ipv4() == four).map(ToString::to_string).collect()
    };
    let mut sets = String::new();
    let (mut comes, mut goes) = (String::new(), String::new());
    for (ip, kind, number, list) in [("ip", "ipv4_addr", 4, of(true)), ("ip6", "ipv6_addr", 6, of(false))] {
        if list.is_empty() {
            continue;
        }
        sets.push_str(&format!("set here{number} {{ type {kind}; elements = {{ {} }} }}\n", list.join(", ")));
        let to = format!("{ip} daddr @here{number} meta l4proto {{ tcp, udp }} th dport 53");
        comes.push_str(&format!("{to} socket transparent 1 notrack\n"));
        goes.push_str(&format!("{to} notrack\n"));
        goes.push_str(&format!("{ip} saddr @here{number} meta l4proto {{ tcp, udp }} th sport 53 notrack\n"));
    }
    format!(
        "add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n{sets}\
         chain comes {{ type filter hook prerouting priority raw; policy accept;\n{comes}}}\n\
         chain goes {{ type filter hook output priority raw; policy accept;\n{goes}}}\n}}\n"
    )
}

/// Gives packets to these addresses to this machine. Somebody should listen there already.
///
/// # Errors
/// If the kernel refuses.
pub async fn take(addresses: &[IpAddr]) -> anyhow::Result<()> {
    let kernel = Kernel::connect()?;
    for ip in addresses {
        let prefix = if ip.is_ipv4() { 32 } else { 128 };
        match kernel.handle.address().add(LOOPBACK, *ip, prefix).execute().await {
            Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -EEXIST => {}
            result => result.with_context(|| format!("give this machine the address {ip} of the cluster's DNS"))?,
        }
    }
    nft(&rules(addresses)).await
}

/// Lets packets to these addresses go the usual way again.
///
/// # Errors
/// If the kernel refuses.
pub async fn release(addresses: &[IpAddr]) -> anyhow::Result<()> {
    // The address last: without it, and with the rules, packets would be neither here nor there.
    let rules = nft(&format!("add table {TABLE}\ndelete table {TABLE}\n")).await;
    let kernel = Kernel::connect()?;
    let mut found = std::pin::pin!(kernel.handle.address().get().set_link_index_filter(LOOPBACK).execute());
    let mut ours = Vec::new();
    while let Some(message) = found.try_next().await.context("list the loopback's addresses")? {
        let has = |ip: &IpAddr| {
            let of = |a: &AddressAttribute| matches!(a, AddressAttribute::Address(a) | AddressAttribute::Local(a) if a == ip);
            message.attributes.iter().any(of)
        };
        if addresses.iter().any(has) {
            ours.push(message);
        }
    }
    for message in ours {
        match kernel.handle.address().del(message).execute().await {
            Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -EADDRNOTAVAIL => {}
            result => result.context("take the address of the cluster's DNS away")?,
        }
    }
    rules
}

/// Takes away what a process left behind that did not end by itself.
///
/// # Errors
/// If the kernel refuses.
pub async fn remove() -> anyhow::Result<()> {
    let output = Command::new("nft").args(["-j", "list", "table"]).args(TABLE.split(' ')).output().await;
    let output = output.context("nft cannot be run: is nftables installed?")?;
    match output.status.success() {
        true => release(&listed(&output.stdout)).await,
        false => Ok(()),
    }
}

/// The addresses that our sets have, from what `nft -j list table` says.
fn listed(json: &[u8]) -> Vec<IpAddr> {
    let listing: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
    let objects = listing["nftables"].as_array().into_iter().flatten();
    let elements = objects.flat_map(|object| object["set"]["elem"].as_array().into_iter().flatten());
    elements.filter_map(|element| element.as_str()?.parse().ok()).collect()
}

struct Kernel {
    handle: Handle,
    task: JoinHandle<()>,
}

impl Kernel {
    fn connect() -> anyhow::Result<Kernel> {
        let (connection, handle, _) = rtnetlink::new_connection().context("connect to the kernel (netlink)")?;
        Ok(Kernel { handle, task: tokio::spawn(connection) })
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn nft(script: &str) -> anyhow::Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("nft cannot be run: is nftables installed?")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).await.context("writing to nft")?;
    }
    let output = child.wait_with_output().await?;
    if !output.status.success() {
        bail!("nft: {}", String::from_utf8_lossy(&output.stderr).lines().take(6).collect::<Vec<_>>().join("; "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_each_family() {
        let text = rules(&["10.96.0.10".parse().unwrap(), "fd00::a".parse().unwrap()]);
        for part in [
            "set here4 { type ipv4_addr; elements = { 10.96.0.10 } }",
            "set here6 { type ipv6_addr; elements = { fd00::a } }",
            "ip daddr @here4 meta l4proto { tcp, udp } th dport 53 socket transparent 1 notrack",
            "ip6 saddr @here6 meta l4proto { tcp, udp } th sport 53 notrack",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        assert!(!rules(&["10.96.0.10".parse().unwrap()]).contains("here6"));
    }

    #[test]
    fn what_was_left_behind() {
        let json =
            br#"{"nftables": [{"metainfo": {}}, {"set": {"name": "here4", "elem": ["10.96.0.10"]}}, {"chain": {}}]}"#;
        assert_eq!(listed(json), ["10.96.0.10".parse::<IpAddr>().unwrap()]);
        assert!(listed(b"{").is_empty());
    }
}
