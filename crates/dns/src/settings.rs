//! Who is asked for names that are not the cluster's.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, bail};

use crate::name;

/// Where DNS is served.
pub const PORT: u16 = 53;
/// More servers are not asked, as resolvers have it (`MAXNS`), with some room.
const MOST_SERVERS: usize = 8;
/// More domains with servers of their own are not taken.
const MOST_STUBS: usize = 256;

/// Who is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The servers for everything; those of the machine if there are none.
    pub upstream: Vec<SocketAddr>,
    /// Domains in small letters, each with its own servers.
    pub stubs: BTreeMap<String, Vec<SocketAddr>>,
}

impl Settings {
    /// Reads `DOMAIN=ADDRESS[:PORT],...`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn add_stub(&mut self, text: &str) -> anyhow::Result<()> {
        let (domain, servers) =
            text.split_once('=').with_context(|| format!("{text:?}: write DOMAIN=ADDRESS[:PORT],..."))?;
        let servers = servers.split(',').map(server).collect::<anyhow::Result<Vec<_>>>()?;
        self.stub(domain, servers)
    }

    fn stub(&mut self, domain: &str, mut servers: Vec<SocketAddr>) -> anyhow::Result<()> {
        let domain = domain.trim().trim_matches('.').to_ascii_lowercase();
        if domain.is_empty() || hickory_proto::rr::Name::from_ascii(&domain).is_err() {
            bail!("{domain:?} is no domain");
        }
        if self.stubs.len() >= MOST_STUBS {
            bail!("more than {MOST_STUBS} domains with servers of their own are not taken");
        }
        servers.truncate(MOST_SERVERS);
        if servers.is_empty() {
            bail!("the domain {domain} has no servers");
        }
        self.stubs.insert(domain, servers);
        Ok(())
    }

    /// What a ConfigMap adds: `stubDomains`, an object of lists in JSON, and `upstreamNameservers`, a list.
    ///
    /// # Errors
    /// If it is something else. Then nothing of it is taken.
    pub fn with_config_map(&self, data: &BTreeMap<String, String>) -> anyhow::Result<Settings> {
        let mut settings = self.clone();
        let servers = |list: Vec<String>| list.iter().map(|s| server(s)).collect::<anyhow::Result<Vec<_>>>();
        if let Some(text) = data.get("stubDomains") {
            let all: BTreeMap<String, Vec<String>> = serde_json::from_str(text).context("stubDomains")?;
            for (domain, list) in all {
                let list = servers(list).with_context(|| format!("stubDomains: {domain}"))?;
                settings.stub(&domain, list).context("stubDomains")?;
            }
        }
        if let Some(text) = data.get("upstreamNameservers") {
            let list: Vec<String> = serde_json::from_str(text).context("upstreamNameservers")?;
            settings.upstream = servers(list).context("upstreamNameservers")?;
            settings.upstream.truncate(MOST_SERVERS);
        }
        Ok(settings)
    }

    /// Who is asked for a name in small letters: those of the longest domain that it is below.
    pub fn servers(&self, name: &str) -> &[SocketAddr] {
        let mut rest = name;
        while !self.stubs.is_empty() && !rest.is_empty() {
            if let Some(servers) = self.stubs.get(rest) {
                debug_assert!(name::below(name, rest).is_some());
                return servers;
            }
            rest = rest.split_once('.').map_or("", |(_, rest)| rest);
        }
        &self.upstream
    }
}

/// Reads `ADDRESS` or `ADDRESS:PORT`.
///
/// # Errors
/// If it is something else.
pub fn server(text: &str) -> anyhow::Result<SocketAddr> {
    let text = text.trim();
    if let Ok(ip) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, PORT));
    }
    text.parse().map_err(|_| anyhow::anyhow!("{text:?} is no address of a server: write ADDRESS or ADDRESS:PORT"))
}

/// The servers of a resolv.conf, without those that are `ours`: to ask them would be to ask ourselves.
pub fn resolv_conf(text: &str, ours: &[IpAddr]) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        // An address of the link names its link; that cannot be asked from everywhere.
        let ip = words.next().and_then(|word| word.parse::<IpAddr>().ok());
        if let Some(ip) = ip.filter(|ip| !ours.contains(ip) && !ip.is_unspecified()) {
            let server = SocketAddr::new(ip, PORT);
            if !servers.contains(&server) {
                servers.push(server);
            }
        }
    }
    servers.truncate(MOST_SERVERS);
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(servers: &[SocketAddr]) -> Vec<String> {
        servers.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn servers_of_a_machine() {
        let text = "# x\nsearch a b\nnameserver 10.96.0.10\nnameserver 192.0.2.1 # y\nnameserver 192.0.2.1\n\
                    nameserver fe80::1%eth0\nnameserver 2001:db8::1\nnameserver\nnameserver 0.0.0.0\n";
        let servers = resolv_conf(text, &["10.96.0.10".parse().unwrap()]);
        assert_eq!(texts(&servers), ["192.0.2.1:53", "[2001:db8::1]:53"]);
    }

    #[test]
    fn the_longest_domain_counts() {
        let mut settings = Settings { upstream: vec![server("192.0.2.1").unwrap()], ..Default::default() };
        settings.add_stub("Corp.Example=192.0.2.2,192.0.2.3:5353").unwrap();
        settings.add_stub("lab.corp.example.=[2001:db8::2]:54").unwrap();
        let check = |name: &str, expect: &[&str]| assert_eq!(texts(settings.servers(name)), expect, "{name}");
        check("corp.example", &["192.0.2.2:53", "192.0.2.3:5353"]);
        check("a.b.corp.example", &["192.0.2.2:53", "192.0.2.3:5353"]);
        check("x.lab.corp.example", &["[2001:db8::2]:54"]);
        check("mycorp.example", &["192.0.2.1:53"]);
        check("", &["192.0.2.1:53"]);
        for (bad, why) in [("x", "write DOMAIN="), ("=192.0.2.1", "no domain"), ("a=b", "no address of a server")] {
            let error = format!("{:#}", settings.clone().add_stub(bad).unwrap_err());
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn a_config_map() {
        let settings = Settings { upstream: vec![server("192.0.2.1").unwrap()], ..Default::default() };
        let data = |stubs: &str, upstream: &str| {
            BTreeMap::from([
                ("stubDomains".to_owned(), stubs.to_owned()),
                ("upstreamNameservers".into(), upstream.into()),
            ])
        };
        let with = settings.with_config_map(&data(r#"{"acme.example": ["192.0.2.5"]}"#, r#"["192.0.2.6"]"#)).unwrap();
        assert_eq!(texts(with.servers("a.acme.example")), ["192.0.2.5:53"]);
        assert_eq!(texts(with.servers("a.example")), ["192.0.2.6:53"]);
        assert_eq!(settings.with_config_map(&BTreeMap::new()).unwrap(), settings);
        for (stubs, upstream) in [("[", "[]"), ("{}", "{}"), (r#"{"a": []}"#, "[]"), (r#"{"a": ["b"]}"#, "[]")] {
            assert!(settings.with_config_map(&data(stubs, upstream)).is_err(), "{stubs} {upstream}");
        }
    }
}
