//! The list of servers: what is believed of one that arrives, and the copy on disk.

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::{Deserialize, Serialize};

/// More servers than this are no list of servers.
const MOST: usize = 64;

/// The list as it is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The servers of the last good list.
    pub servers: Vec<SocketAddr>,
    /// Servers of earlier lists.
    #[serde(default)]
    pub former: Vec<SocketAddr>,
}

/// Why a list is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Absurd {
    /// There is nobody on it.
    #[error("it is empty")]
    Empty,
    /// None of its addresses can be a server's.
    #[error("none of its addresses can be a server's: {0:?}")]
    Unusable(Vec<SocketAddr>),
    /// There are too many on it.
    #[error("{0} servers are more than a cluster has")]
    TooMany(usize),
}

/// Looks at a list: the addresses that can be servers, sorted, and those that cannot. `own` is where we listen.
pub fn examine(list: &[SocketAddr], own: SocketAddr) -> Result<(Vec<SocketAddr>, Vec<SocketAddr>), Absurd> {
    let usable = |server: &SocketAddr| {
        let address = match server.ip() {
            IpAddr::V4(ip) => !ip.is_broadcast() && !ip.is_link_local(),
            IpAddr::V6(_) => true,
        };
        let nowhere = server.ip().is_unspecified() || server.ip().is_multicast();
        address && !nowhere && server.port() != 0 && *server != own
    };
    let (mut good, bad): (Vec<_>, Vec<_>) = list.iter().copied().partition(usable);
    good.sort();
    good.dedup();
    match good.len() {
        0 if list.is_empty() => Err(Absurd::Empty),
        0 => Err(Absurd::Unusable(bad)),
        n if n > MOST => Err(Absurd::TooMany(n)),
        _ => Ok((good, bad)),
    }
}

/// The servers that the slices of the `kubernetes` Service name: `port` is the one named `https`, or the only one.
pub fn of_slices<'a>(slices: impl Iterator<Item = &'a EndpointSlice>) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for slice in slices.filter(|s| s.address_type == "IPv4" || s.address_type == "IPv6") {
        let ports = slice.ports.as_deref().unwrap_or_default();
        let named = ports.iter().find(|p| p.name.as_deref() == Some("https"));
        let Some(port) = named.or(ports.first()).and_then(|p| p.port).and_then(|p| u16::try_from(p).ok()) else {
            continue;
        };
        for endpoint in slice.endpoints.iter().flatten() {
            if endpoint.conditions.as_ref().and_then(|c| c.ready) != Some(false) {
                let addresses = endpoint.addresses.iter().filter_map(|a| a.parse::<IpAddr>().ok());
                servers.extend(addresses.map(|ip| SocketAddr::new(ip, port)));
            }
        }
    }
    servers
}

/// Reads the copy; `None` if there is none.
///
/// # Errors
/// If it cannot be read or understood.
pub fn read(file: &Path) -> anyhow::Result<Option<Kept>> {
    match std::fs::read(file) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Replaces the copy: whoever reads it sees the old one or the new one, also after a power cut.
///
/// # Errors
/// If it cannot be written.
pub fn write(file: &Path, kept: &Kept) -> std::io::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let temporary = file.with_extension("new");
    let mut out = std::fs::File::create(&temporary)?;
    out.write_all(&serde_json::to_vec_pretty(kept)?)?;
    out.sync_all()?;
    std::fs::rename(&temporary, file)?;
    std::fs::File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_are_looked_at() {
        let own = "127.0.0.1:6444".parse().unwrap();
        let parse = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect::<Vec<SocketAddr>>();
        let check = |list: &[&str], good: &[&str]| {
            let (found, bad) = examine(&parse(list), own).unwrap();
            assert_eq!(found, parse(good));
            assert_eq!(bad.len(), list.iter().filter(|a| !good.contains(a)).count());
        };
        check(&["10.0.0.2:6443", "10.0.0.1:6443", "10.0.0.2:6443"], &["10.0.0.1:6443", "10.0.0.2:6443"]);
        check(&["10.0.0.1:6443", "0.0.0.0:6443", "10.0.0.2:0", "224.0.0.1:1", "169.254.1.1:6443"], &["10.0.0.1:6443"]);
        check(&["127.0.0.1:6443", "127.0.0.1:6444", "[fd00::1]:6443"], &["127.0.0.1:6443", "[fd00::1]:6443"]);
        assert_eq!(examine(&[], own), Err(Absurd::Empty));
        assert!(matches!(examine(&[own], own), Err(Absurd::Unusable(_))), "that would be a loop");
        let many: Vec<SocketAddr> = (0..100).map(|n| SocketAddr::from(([10, 0, 1, n], 6443))).collect();
        assert_eq!(examine(&many, own), Err(Absurd::TooMany(100)));
    }

    #[test]
    fn slices() {
        let slice = |value| serde_json::from_value::<EndpointSlice>(value).unwrap();
        let all = [
            slice(
                json!({"addressType": "IPv4", "ports": [{"name": "metrics", "port": 9}, {"name": "https", "port": 6443}],
                "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"], "conditions": {"ready": true}},
                    {"addresses": ["10.0.0.3"], "conditions": {"ready": false}}]}),
            ),
            slice(json!({"addressType": "IPv6", "ports": [{"port": 6443}], "endpoints": [{"addresses": ["fd00::1"]}]})),
            slice(
                json!({"addressType": "FQDN", "ports": [{"port": 6443}], "endpoints": [{"addresses": ["a.example"]}]}),
            ),
            slice(json!({"addressType": "IPv4", "ports": [], "endpoints": [{"addresses": ["10.0.0.9"]}]})),
        ];
        let found: Vec<String> = of_slices(all.iter()).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.0.0.1:6443", "10.0.0.2:6443", "[fd00::1]:6443"]);
    }

    #[test]
    fn the_copy() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("sub/servers.json");
        assert_eq!(read(&file).unwrap(), None);
        let kept = Kept { servers: vec!["10.0.0.1:6443".parse().unwrap()], former: vec![] };
        write(&file, &kept).unwrap();
        assert_eq!(read(&file).unwrap(), Some(kept));
        std::fs::write(&file, "{").unwrap();
        assert!(read(&file).is_err());
    }
}
