//! The two families of addresses, and in what words nftables speaks of each.
//!
//! A Service of both is two things with one name: each family has its own address, its own slices, its own rules.

use std::net::IpAddr;

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// That of an address.
    pub const fn of(ip: IpAddr) -> Family {
        if ip.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// That of slices with this `addressType`.
    pub fn named(name: &str) -> Option<Family> {
        Family::ALL.into_iter().find(|family| family.name() == name)
    }

    /// What stands in `addressType` and `ipFamilies`.
    pub const fn name(self) -> &'static str {
        self.pick(["IPv4", "IPv6"])
    }

    /// One of two things.
    pub const fn pick<T: Copy>(self, [four, six]: [T; 2]) -> T {
        match self {
            Family::V4 => four,
            Family::V6 => six,
        }
    }

    /// An address of this family. One of IPv4 in the clothes of IPv6 is of neither: no packet carries it.
    pub fn parse(self, text: &str) -> Option<IpAddr> {
        match (self, text.parse().ok()?) {
            (Family::V6, IpAddr::V6(ip)) if ip.to_ipv4_mapped().is_some() => None,
            (_, ip) => Some(ip).filter(|ip| Family::of(*ip) == self),
        }
    }

    /// How nftables calls a packet's header.
    pub const fn ip(self) -> &'static str {
        self.pick(["ip", "ip6"])
    }

    /// How it calls the type of an address.
    pub const fn address_type(self) -> &'static str {
        self.pick(["ipv4_addr", "ipv6_addr"])
    }

    /// Matches packets to the addresses of this machine that have the ports of Services: not those that mean something
    /// else on every machine, or on every link.
    pub const fn own(self) -> &'static str {
        self.pick([
            "ip daddr != 127.0.0.0/8 fib daddr type local",
            "ip6 daddr != { ::1, fe80::/10 } fib daddr type local",
        ])
    }

    /// What the names of maps and sets end with.
    pub const fn suffix(self) -> &'static str {
        self.pick(["4", "6"])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_an_address_is() {
        let check = |text: &str, expect: Option<Family>| {
            let found: Vec<Family> = Family::ALL.into_iter().filter(|f| f.parse(text).is_some()).collect();
            assert_eq!(found, expect.into_iter().collect::<Vec<_>>(), "{text}");
        };
        check("10.96.0.9", Some(Family::V4));
        check("fd00:96::9", Some(Family::V6));
        check("::ffff:10.96.0.9", None);
        for nothing in ["", "None", "10.96.0", "fd00::1%eth0", "[fd00::1]", "fd00::/64"] {
            check(nothing, None);
        }
        assert_eq!([Family::named("IPv6"), Family::named("FQDN")], [Some(Family::V6), None]);
    }
}
