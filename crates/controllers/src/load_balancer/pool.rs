//! The addresses that Services of type LoadBalancer are given.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::IpNet;

/// So many addresses are looked at for a free one; a range of IPv6 has more than anybody could.
const MOST: usize = 1 << 16;

/// Addresses from the first to the last, of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    first: IpAddr,
    last: IpAddr,
}

/// Why a range is none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// It is neither form.
    #[error("{0:?}: write a range as 192.0.2.0/28, as 192.0.2.10-192.0.2.20, or one address")]
    Form(String),
    /// Its ends are in the wrong order, or of two families.
    #[error("{0:?}: the first address must not come after the last, and both must be of one family")]
    Order(String),
}

impl FromStr for Range {
    type Err = Error;

    fn from_str(text: &str) -> Result<Range, Error> {
        let form = || Error::Form(text.to_owned());
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => {
                let address = |text: &str| text.trim().parse::<IpAddr>().map_err(|_| form());
                (address(first)?, address(last)?)
            }
            None => match (text.trim().parse::<IpNet>(), text.trim().parse::<IpAddr>()) {
                (Ok(net), _) => (net.network(), net.broadcast()),
                (_, Ok(ip)) => (ip, ip),
                _ => return Err(form()),
            },
        };
        match first.is_ipv4() == last.is_ipv4() && first <= last {
            true => Ok(Range { first, last }),
            false => Err(Error::Order(text.to_owned())),
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl Range {
    /// Whether an address is in it.
    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.first.is_ipv4() && self.first <= ip && ip <= self.last
    }

    /// Whether it has addresses of a network.
    pub fn overlaps(&self, net: &IpNet) -> bool {
        net.network().is_ipv4() == self.first.is_ipv4() && net.network() <= self.last && self.first <= net.broadcast()
    }

    /// Its addresses, in order.
    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let (first, last) = (self.first, self.last);
        std::iter::successors(Some(first), move |ip| {
            let next = match ip {
                IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from(u32::from(*ip).checked_add(1)?)),
                IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from(u128::from(*ip).checked_add(1)?)),
            };
            (next <= last).then_some(next)
        })
    }
}

/// All ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool(pub Vec<Range>);

impl Pool {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an address is one of them.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.0.iter().any(|range| range.contains(ip))
    }

    /// Whether there are addresses of IPv4, or of IPv6.
    pub fn has(&self, v4: bool) -> bool {
        self.0.iter().any(|range| range.first.is_ipv4() == v4)
    }

    /// The first one of a family that `is_free`.
    pub fn free(&self, v4: bool, is_free: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let ranges = self.0.iter().filter(|range| range.first.is_ipv4() == v4);
        ranges.flat_map(Range::addresses).take(MOST).find(|ip| is_free(*ip))
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&all.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let check = |text: &str, expect: &[&str]| {
            let range: Range = text.parse().unwrap();
            assert_eq!(range.addresses().take(4).map(|ip| ip.to_string()).collect::<Vec<_>>(), expect, "{text}");
            assert!(range.addresses().take(4).all(|ip| range.contains(ip)));
        };
        check("192.0.2.4/31", &["192.0.2.4", "192.0.2.5"]);
        check("192.0.2.5", &["192.0.2.5"]);
        check("192.0.2.254 - 192.0.3.1", &["192.0.2.254", "192.0.2.255", "192.0.3.0", "192.0.3.1"]);
        check("255.255.255.255", &["255.255.255.255"]);
        check("fd00::/126", &["fd00::", "fd00::1", "fd00::2", "fd00::3"]);
        for text in ["", "x", "192.0.2.1-", "192.0.2.0/33", "a-b"] {
            assert_eq!(text.parse::<Range>(), Err(Error::Form(text.into())));
        }
        for text in ["192.0.2.9-192.0.2.1", "192.0.2.1-fd00::1"] {
            assert_eq!(text.parse::<Range>(), Err(Error::Order(text.into())));
        }
        let range: Range = "192.0.2.10-192.0.2.20".parse().unwrap();
        for (net, expect) in
            [("192.0.2.0/24", true), ("192.0.2.16/32", true), ("192.0.2.32/27", false), ("::/0", false)]
        {
            assert_eq!(range.overlaps(&net.parse().unwrap()), expect, "{net}");
        }
    }
}
