//! The pod network of one node: a routed veth per pod (`ptp`), addresses of the node's pod range (`host-local`) and
//! host ports (`portmap`).
//!
//! Not a bridge: with `bridge-nf-call-iptables` a reset that nftables sends for a translated flow never reaches a pod
//! behind one.

use std::{fs, io, path::Path};

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
}
