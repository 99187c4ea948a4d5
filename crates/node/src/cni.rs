//! The pod network of one node: a routed veth per pod (`ptp`), addresses of the node's pod range (`host-local`) and
//! host ports (`portmap`).
//!
//! Not a bridge: with `bridge-nf-call-iptables` a reset that nftables sends for a translated flow never reaches a pod
//! behind one.

use std::{fs, io, net::IpAddr, path::Path, process::Command};

use ipnet::IpNet;
use serde_json::{Value, json};

/// The name of our network; also that of host-local's state directory.
const NETWORK: &str = "seawall";

/// The bit of a packet's mark by which `portmap` knows what it has to masquerade. Unless told otherwise it takes 13, which
/// is the relay's: what has that is delivered to this machine, so a host port was not reached from its own node, nor by
/// the pod behind it. 14 is the service proxy's.
const MASQUERADE_BIT: u8 = 12;

/// The configuration list for these pod ranges, with host-local's state under `state`.
fn conf(ranges: &[IpNet], mtu: Option<u32>, state: &Path) -> Value {
    let ranges: Vec<Value> = ranges.iter().map(|r| json!([{"subnet": r.to_string()}])).collect();
    let routes: Vec<Value> = ["0.0.0.0/0", "::/0"]
        .iter()
        .filter(|dst| {
            ranges.iter().any(|r| r[0]["subnet"].as_str().is_some_and(|s| s.contains(':') == dst.contains(':')))
        })
        .map(|dst| json!({"dst": dst}))
        .collect();
    let mut ptp = json!({
        "type": "ptp",
        // It would also hide the address of a pod from pods of other nodes: see `masquerade`.
        "ipMasq": false,
        "ipam": {"type": "host-local", "dataDir": state, "ranges": ranges, "routes": routes},
    });
    if let Some(mtu) = mtu {
        ptp["mtu"] = json!(mtu);
    }
    json!({
        "cniVersion": "0.4.0",
        "name": NETWORK,
        "plugins": [
            ptp,
            {"type": "portmap", "markMasqBit": MASQUERADE_BIT, "capabilities": {"portMappings": true}},
        ],
    })
}

/// Writes the configuration if it differs; containerd notices by itself. The file appears at once and whole.
pub fn write(directory: &Path, ranges: &[IpNet], mtu: Option<u32>, state: &Path) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(&conf(ranges, mtu, state))?;
    let file = directory.join("10-seawall.conflist");
    if fs::read(&file).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::create_dir_all(directory)?;
    let temporary = directory.join(".10-seawall.tmp");
    fs::write(&temporary, &text)?;
    fs::rename(temporary, file)
}

/// The size of the largest packet on the interface with this address, in bytes; none if that is the loopback, through which
/// nothing leaves. Where a way is narrower, as a tunnel is, the node says so to its pods (path MTU discovery, RFC 1191 and
/// RFC 8201).
pub fn uplink_mtu(node_ip: IpAddr) -> Option<u32> {
    let with_ip = |address: &nix::ifaddrs::InterfaceAddress| {
        let address = address.address.as_ref()?;
        let four = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        four.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    };
    let link = nix::ifaddrs::getifaddrs().ok()?.find(|a| with_ip(a) == Some(node_ip))?;
    if link.flags.contains(nix::net::if_::InterfaceFlags::IFF_LOOPBACK) {
        return None;
    }
    fs::read_to_string(format!("/sys/class/net/{}/mtu", link.interface_name)).ok()?.trim().parse().ok()
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
        let one = conf(&["10.1.0.0/24".parse().unwrap()], Some(1400), Path::new("/s"));
        assert_eq!(one["plugins"][0]["ipam"]["routes"], json!([{"dst": "0.0.0.0/0"}]));
        assert_eq!(one["plugins"][0]["mtu"], 1400);
        let two = conf(&["10.1.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()], None, Path::new("/s"));
        assert_eq!(two["plugins"][0]["ipam"]["ranges"].as_array().unwrap().len(), 2);
        assert_eq!(two["plugins"][0]["ipam"]["routes"].as_array().unwrap().len(), 2);
        assert_eq!(two["plugins"][0].get("mtu"), None);
    }

    #[test]
    fn what_the_loopback_could_carry_is_no_measure() {
        assert_eq!(uplink_mtu([127, 0, 0, 1].into()), None);
        assert_eq!(uplink_mtu([192, 0, 2, 1].into()), None);
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
