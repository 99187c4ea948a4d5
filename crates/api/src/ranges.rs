//! Ranges of addresses that a cluster has: one, or one of each family
//! (<https://kubernetes.io/docs/concepts/services-networking/dual-stack/>).

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// One range, or two of different families. Written with a comma between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ranges {
    first: IpNet,
    second: Option<IpNet>,
}

impl Ranges {
    /// The range of the family that comes first: what has one address has it from there.
    pub fn first(self) -> IpNet {
        self.first
    }

    /// All of them.
    pub fn iter(self) -> impl Iterator<Item = IpNet> {
        [Some(self.first), self.second].into_iter().flatten()
    }

    /// The range of a family.
    pub fn of(self, ipv6: bool) -> Option<IpNet> {
        self.iter().find(|net| net.network().is_ipv6() == ipv6)
    }

    /// Whether an address lies in one of them.
    pub fn contains(self, ip: IpAddr) -> bool {
        self.iter().any(|net| net.contains(&ip))
    }

    /// The families, as they are called in objects.
    pub fn families(self) -> Vec<&'static str> {
        self.iter().map(|net| if net.network().is_ipv4() { "IPv4" } else { "IPv6" }).collect()
    }
}

impl From<IpNet> for Ranges {
    fn from(net: IpNet) -> Ranges {
        Ranges { first: net.trunc(), second: None }
    }
}

impl FromStr for Ranges {
    type Err = String;

    fn from_str(text: &str) -> Result<Ranges, String> {
        let range = |part: &str| {
            let net: Result<IpNet, _> = part.trim().parse();
            net.map(|net| net.trunc())
                .map_err(|_| format!("{part:?} is no range of addresses: write e.g. 10.244.0.0/16"))
        };
        let parts: Vec<IpNet> = text.split(',').map(range).collect::<Result<_, _>>()?;
        match parts[..] {
            [first] => Ok(Ranges { first, second: None }),
            [first, second] if first.network().is_ipv4() != second.network().is_ipv4() => {
                Ok(Ranges { first, second: Some(second) })
            }
            _ => Err(format!("{text:?}: give one range, or one of IPv4 and one of IPv6")),
        }
    }
}

impl TryFrom<String> for Ranges {
    type Error = String;

    fn try_from(text: String) -> Result<Ranges, String> {
        text.parse()
    }
}

impl From<Ranges> for String {
    fn from(ranges: Ranges) -> String {
        ranges.to_string()
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        self.second.map_or(Ok(()), |second| write!(f, ",{second}"))
    }
}

/// How long the prefixes of nodes' parts of the pods' ranges are, as far as somebody has said it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeMasks {
    ipv4: Option<u8>,
    ipv6: Option<u8>,
}

/// How many bits longer than the range of IPv6 a node's part of it may be at most. As upstream.
const LONGER: u8 = 16;

impl NodeMasks {
    /// Reads what upstream's flags say, for a cluster whose pods have these ranges: `--node-cidr-mask-size`, for one family,
    /// and the flags with `-ipv4` and `-ipv6` at their end.
    ///
    /// # Errors
    /// If they contradict one another or the ranges.
    pub fn of_flags(ranges: Ranges, any: Option<u8>, ipv4: Option<u8>, ipv6: Option<u8>) -> Result<NodeMasks, String> {
        let flag = "--node-cidr-mask-size";
        if any.is_some() && ranges.second.is_some() {
            return Err(format!(
                "usage of {flag} is not allowed with dual-stack clusters: give {flag}-ipv4 and {flag}-ipv6"
            ));
        }
        if any.is_some() && (ipv4.is_some() || ipv6.is_some()) {
            return Err(format!("usage of {flag}-ipv4 and {flag}-ipv6 is not allowed if {flag} is set: give either"));
        }
        let mut masks = NodeMasks { ipv4, ipv6 };
        if let Some(mask) = any {
            let of_first = if ranges.first.network().is_ipv4() { &mut masks.ipv4 } else { &mut masks.ipv6 };
            *of_first = Some(mask);
        }
        for (is_ipv6, mask) in [(false, masks.ipv4), (true, masks.ipv6)] {
            let Some(mask) = mask else { continue };
            let (end, family, bits) = if is_ipv6 { ("-ipv6", "IPv6", 128) } else { ("-ipv4", "IPv4", 32) };
            let flag = if any.is_some() { flag.to_owned() } else { format!("{flag}{end}") };
            let Some(range) = ranges.of(is_ipv6) else {
                return Err(format!("usage of {flag} is not allowed without {family}: --cluster-cidr is {ranges}"));
            };
            let whole = range.prefix_len();
            let most = if is_ipv6 { whole.saturating_add(LONGER).min(bits - 2) } else { bits - 2 }.max(whole);
            if mask < whole || mask > most {
                return Err(format!(
                    "{flag} {mask}: each node gets a part of --cluster-cidr {range} of this size: give one from {whole} to \
                     {most}"
                ));
            }
        }
        Ok(masks)
    }

    /// How long the prefix of a node's part of a range is: if nobody has said it, upstream's default where that leaves room for
    /// nodes, else a 256th of the range.
    pub fn of(self, range: IpNet) -> u8 {
        let whole = range.prefix_len();
        let said = if range.network().is_ipv4() { self.ipv4 } else { self.ipv6 };
        said.unwrap_or(match range {
            IpNet::V4(_) => 24,
            IpNet::V6(_) if whole <= 56 => 64,
            IpNet::V6(_) => whole.saturating_add(8).min(120),
        })
        .max(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_nodes() {
        let check = |ranges: &str, flags: [u8; 3], expect: Result<&[u8], &str>| {
            let ranges: Ranges = ranges.parse().unwrap();
            let [any, ipv4, ipv6] = flags.map(|mask| (mask > 0).then_some(mask));
            match (NodeMasks::of_flags(ranges, any, ipv4, ipv6), expect) {
                (Ok(masks), Ok(expect)) => {
                    assert_eq!(ranges.iter().map(|range| masks.of(range)).collect::<Vec<_>>(), expect, "{flags:?}");
                }
                (Err(error), Err(part)) => assert!(error.contains(part), "{error}"),
                (said, _) => panic!("{ranges} {flags:?}: {said:?}"),
            }
        };
        let (four, six, both) = ("10.244.0.0/16", "fd00::/48", "10.244.0.0/16,fd00::/48");
        check(four, [0, 0, 0], Ok(&[24]));
        check(six, [0, 0, 0], Ok(&[64]));
        check(both, [0, 0, 0], Ok(&[24, 64]));
        check("10.244.0.0/26", [0, 0, 0], Ok(&[26]));
        check("fd00::/108", [0, 0, 0], Ok(&[116]));
        check("fd00::/124", [0, 0, 0], Ok(&[124]));
        check(four, [26, 0, 0], Ok(&[26]));
        check(four, [0, 25, 0], Ok(&[25]));
        check("10.0.0.0/8", [30, 0, 0], Ok(&[30]));
        check(four, [16, 0, 0], Ok(&[16]));
        check(six, [56, 0, 0], Ok(&[56]));
        check(six, [0, 0, 64], Ok(&[64]));
        check(both, [0, 20, 60], Ok(&[20, 60]));
        check(both, [0, 0, 60], Ok(&[24, 60]));
        check(both, [24, 0, 0], Err("usage of --node-cidr-mask-size is not allowed with dual-stack clusters"));
        check(four, [24, 24, 0], Err("is not allowed if --node-cidr-mask-size is set"));
        check(four, [0, 0, 64], Err("usage of --node-cidr-mask-size-ipv6 is not allowed without IPv6"));
        check(six, [0, 24, 0], Err("usage of --node-cidr-mask-size-ipv4 is not allowed without IPv4"));
        check(four, [15, 0, 0], Err("--node-cidr-mask-size 15: each node gets a part of --cluster-cidr 10.244.0.0/16"));
        check(four, [31, 0, 0], Err("give one from 16 to 30"));
        check(
            both,
            [0, 0, 65],
            Err("--node-cidr-mask-size-ipv6 65: each node gets a part of --cluster-cidr fd00::/48"),
        );
        check("fd00::/120", [127, 0, 0], Err("give one from 120 to 126"));
    }

    #[test]
    fn one_or_one_of_each_family() {
        let check = |text: &str, expect: Result<&str, &str>| match (text.parse::<Ranges>(), expect) {
            (Ok(ranges), Ok(shown)) => assert_eq!(ranges.to_string(), shown),
            (Err(error), Err(part)) => assert!(error.contains(part), "{error}"),
            (said, _) => panic!("{text}: {said:?}"),
        };
        check("10.244.0.0/16", Ok("10.244.0.0/16"));
        check("10.244.3.0/16", Ok("10.244.0.0/16"));
        check("fd00::/48, 10.244.0.0/16", Ok("fd00::/48,10.244.0.0/16"));
        check("10.0.0.0/16,10.1.0.0/16", Err("one of IPv4 and one of IPv6"));
        check("10.0.0.0/16,fd00::/48,fd01::/48", Err("one of IPv4 and one of IPv6"));
        check("10.0.0.0", Err("is no range of addresses"));
        check("", Err("is no range of addresses"));
    }

    #[test]
    fn by_family() {
        let both: Ranges = "fd00::/48,10.244.0.0/16".parse().unwrap();
        assert_eq!(both.families(), ["IPv6", "IPv4"]);
        assert_eq!(both.of(false), Some("10.244.0.0/16".parse().unwrap()));
        assert!(both.contains("fd00::9".parse().unwrap()) && !both.contains("10.245.0.1".parse().unwrap()));
        assert_eq!(Ranges::from(both.first()).of(false), None);
        // As it is kept in files, one range is what it always was.
        let one: Ranges = serde_json::from_str("\"10.244.0.0/16\"").unwrap();
        assert_eq!(serde_json::to_string(&one).unwrap(), "\"10.244.0.0/16\"");
    }
}
