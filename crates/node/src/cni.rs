//! The pod network of one node: a routed veth per pod (`ptp`), addresses of the node's pod range (`host-local`) and
//! host ports (`portmap`).
//!
//! Not a bridge: with `bridge-nf-call-iptables` a reset that nftables sends for a translated flow never reaches a pod
//! behind one.

use std::{fs, io, path::Path, process::Command};

use ipnet::IpNet;
use serde_json::{Value, json};

/// The name of our network; also that of host-local's state directory.
const NETWORK: &str = "seawall";

/// The configuration list for these pod ranges, with host-local's state under `state`.
fn conf(ranges: &[IpNet], state: &Path) -> Value {
    let ranges: Vec<Value> = ranges.iter().map(|r| json!([{"subnet": r.to_string()}])).collect();
    let routes: Vec<Value> = ["0.0.0.0/0", "::/0"]
        .iter()
        .filter(|dst| {
            ranges.iter().any(|r| r[0]["subnet"].as_str().is_some_and(|s| s.contains(':') == dst.contains(':')))
        })
        .map(|dst| json!({"dst": dst}))
        .collect();
    json!({
        "cniVersion": "0.4.0",
        "name": NETWORK,
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": true,
                "ipam": {"type": "host-local", "dataDir": state, "ranges": ranges, "routes": routes},
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

/// Writes the configuration if it differs; containerd notices by itself. The file appears at once and whole.
pub fn write(directory: &Path, ranges: &[IpNet], state: &Path) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(&conf(ranges, state))?;
    let file = directory.join("10-seawall.conflist");
    if fs::read(&file).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::create_dir_all(directory)?;
    let temporary = directory.join(".10-seawall.tmp");
    fs::write(&temporary, &text)?;
    fs::rename(temporary, file)
}

/// Lets the kernel forward between pods and the world.
pub fn enable_forwarding() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    let v6 = Path::new("/proc/sys/net/ipv6/conf/all/forwarding");
    if v6.exists() { fs::write(v6, "1") } else { Ok(()) }
}

/// Removes the chains that portmap leaves in the NAT table, unless some pod's host port still uses them.
pub fn remove_chains() {
    for program in ["iptables", "ip6tables"] {
        let Ok(output) = Command::new(program).args(["-w", "5", "-t", "nat", "-S"]).output() else { continue };
        for arguments in removal(&String::from_utf8_lossy(&output.stdout)) {
            let done = Command::new(program).args(["-w", "5", "-t", "nat"]).args(&arguments).output();
            if !done.is_ok_and(|o| o.status.success()) {
                tracing::warn!(?arguments, "{program} did not remove what portmap left");
            }
        }
    }
}

/// The calls that remove portmap's base chains, given `iptables -S`: first the jumps, then content, then chains.
fn removal(rules: &str) -> Vec<Vec<String>> {
    const BASE: &str = "CNI-HOSTPORT-";
    if rules.lines().any(|l| l.starts_with("-N CNI-DN-")) {
        return Vec::new();
    }
    let chains: Vec<&str> =
        rules.lines().filter_map(|l| l.strip_prefix("-N ")).filter(|c| c.starts_with(BASE)).collect();
    let jumps = rules
        .lines()
        .filter_map(|l| l.strip_prefix("-A "))
        .filter(|l| !l.starts_with(BASE) && l.contains(&format!("-j {BASE}")));
    let mut calls: Vec<Vec<String>> = jumps
        .map(|rule| {
            // Only comments are quoted: every second piece.
            let pieces = rule.split('"').enumerate();
            let words = pieces.flat_map(|(i, p)| {
                if i % 2 == 1 { vec![p.to_owned()] } else { p.split_whitespace().map(str::to_owned).collect() }
            });
            std::iter::once("-D".to_owned()).chain(words).collect()
        })
        .collect();
    for flag in ["-F", "-X"] {
        calls.extend(chains.iter().map(|c| vec![flag.to_owned(), (*c).to_owned()]));
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_follow_the_families() {
        let one = conf(&["10.1.0.0/24".parse().unwrap()], Path::new("/s"));
        assert_eq!(one["plugins"][0]["ipam"]["routes"], json!([{"dst": "0.0.0.0/0"}]));
        let two = conf(&["10.1.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()], Path::new("/s"));
        assert_eq!(two["plugins"][0]["ipam"]["ranges"].as_array().unwrap().len(), 2);
        assert_eq!(two["plugins"][0]["ipam"]["routes"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn portmap_leftovers() {
        let rules = "-P OUTPUT ACCEPT\n-N CNI-HOSTPORT-MASQ\n-A POSTROUTING -m comment --comment \"CNI portfwd requiring masquerade\" -j CNI-HOSTPORT-MASQ\n-A CNI-HOSTPORT-MASQ -j MASQUERADE\n";
        let calls = removal(rules);
        assert_eq!(
            calls[0],
            [
                "-D",
                "POSTROUTING",
                "-m",
                "comment",
                "--comment",
                "CNI portfwd requiring masquerade",
                "-j",
                "CNI-HOSTPORT-MASQ"
            ]
        );
        assert_eq!(calls[1..], [["-F", "CNI-HOSTPORT-MASQ"], ["-X", "CNI-HOSTPORT-MASQ"]]);
        assert!(removal(&format!("{rules}-N CNI-DN-0123\n")).is_empty());
    }
}
