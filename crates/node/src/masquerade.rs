//! What a pod sends to the world gets the node's address; what it sends to other pods, on whatever node, keeps the pod's
//! (<https://kubernetes.io/docs/concepts/services-networking/#the-kubernetes-network-model>). The plugin `ptp` could only
//! do the former for all other nodes alike, so it is told to leave it.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use ipnet::IpNet;

/// Our table.
const TABLE: &str = "inet seawall_masquerade";

/// The script for a node with these pods, in a cluster with those. Pods of other nodes lie in the cluster's ranges; where
/// a family has none there, only those of this node are known.
fn script(own: &[IpNet], cluster: &[IpNet]) -> String {
    let mut rules = String::new();
    for (six, ip, elsewhere) in [(false, "ip", "224.0.0.0/4"), (true, "ip6", "ff00::/8")] {
        let of = |net: &&IpNet| net.addr().is_ipv6() == six;
        let pods: Vec<IpNet> = own.iter().filter(of).map(IpNet::trunc).collect();
        if pods.is_empty() {
            continue;
        }
        let inside: Vec<IpNet> = pods.iter().copied().chain(cluster.iter().filter(of).map(IpNet::trunc)).collect();
        let list =
            |nets: &[IpNet]| IpNet::aggregate(&nets.to_vec()).iter().map(ToString::to_string).collect::<Vec<_>>();
        let (from, to) = (list(&pods).join(", "), [list(&inside), vec![elsewhere.to_owned()]].concat().join(", "));
        rules += &format!("        {ip} saddr {{ {from} }} {ip} daddr != {{ {to} }} masquerade fully-random\n");
    }
    format!(
        "add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n    chain postrouting {{\n        \
         type nat hook postrouting priority srcnat + 5; policy accept;\n{rules}    }}\n}}\n"
    )
}

/// Sees to it that the rules are there.
///
/// # Errors
/// With what `nft` said.
pub async fn ensure(own: &[IpNet], cluster: &[IpNet]) -> Result<(), String> {
    let script = script(own, cluster);
    tokio::task::spawn_blocking(move || nft(&script)).await.map_err(|e| e.to_string())?
}

/// Whether they are there.
pub async fn is_there() -> bool {
    let mut command = tokio::process::Command::new("nft");
    command.args(["list", "chain"]).args(TABLE.split(' ')).arg("postrouting").stderr(Stdio::null());
    command.output().await.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("masquerade"))
}

/// Takes them away.
pub fn remove() {
    if let Err(error) = nft(&format!("add table {TABLE}\ndelete table {TABLE}\n")) {
        tracing::warn!("the rules by which pods reach the world are left over: {error}");
    }
}

fn nft(script: &str) -> Result<(), String> {
    let mut command = Command::new("nft");
    let spawned = command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|e| format!("nft cannot be run: {e}: is nftables installed?"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).map_err(|e| format!("writing to nft: {e}"))?;
    }
    let output = child.wait_with_output().map_err(|e| format!("nft: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("nft: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_keeps_an_address() {
        let check = |own: &[&str], cluster: &[&str], expect: &[&str]| {
            let nets = |list: &[&str]| list.iter().map(|n| n.parse().unwrap()).collect::<Vec<IpNet>>();
            let script = script(&nets(own), &nets(cluster));
            let rules: Vec<&str> = script.lines().map(str::trim).filter(|l| l.ends_with("fully-random")).collect();
            assert_eq!(rules, expect);
        };
        check(
            &["10.244.1.0/24"],
            &["10.244.0.0/16"],
            &["ip saddr { 10.244.1.0/24 } ip daddr != { 10.244.0.0/16, 224.0.0.0/4 } masquerade fully-random"],
        );
        check(
            &["10.244.1.0/24", "fd00:1::/64"],
            &["10.244.0.0/16"],
            &[
                "ip saddr { 10.244.1.0/24 } ip daddr != { 10.244.0.0/16, 224.0.0.0/4 } masquerade fully-random",
                "ip6 saddr { fd00:1::/64 } ip6 daddr != { fd00:1::/64, ff00::/8 } masquerade fully-random",
            ],
        );
        check(&[], &["10.244.0.0/16"], &[]);
    }
}
