//! Names as they are looked up: small letters and dots.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use hickory_proto::rr::Name;

/// A name in small letters without the last dot, in place. Bytes that no name of the cluster has become `?`, so that a dot
/// within a label never looks like one between labels.
pub struct Text {
    bytes: [u8; 256],
    len: usize,
}

impl Text {
    /// Of a name.
    pub fn of(name: &Name) -> Text {
        let mut text = Text { bytes: [0; 256], len: 0 };
        for label in name {
            if text.len > 0 {
                text.push(b'.');
            }
            for byte in label {
                text.push(match byte.to_ascii_lowercase() {
                    byte @ (b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_') => byte,
                    _ => b'?',
                });
            }
        }
        text
    }

    /// A name has 255 bytes at most; whatever came after them would be lost, not written elsewhere.
    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.len) {
            *place = byte;
            self.len += 1;
        }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        // Only ASCII was put in.
        std::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}

/// What is left of a name below a domain; `None` if it is not below it.
pub fn below<'a>(name: &'a str, domain: &str) -> Option<&'a str> {
    let rest = name.strip_suffix(domain)?;
    match rest.strip_suffix('.') {
        Some(rest) => Some(rest),
        None => rest.is_empty().then_some(""),
    }
}

/// The address that a name of `in-addr.arpa` or `ip6.arpa` is of.
pub fn reversed(name: &str) -> Option<IpAddr> {
    if let Some(rest) = name.strip_suffix(".in-addr.arpa") {
        let mut parts = [0u8; 4];
        let mut labels = rest.rsplit('.');
        for part in &mut parts {
            *part = decimal(labels.next()?)?;
        }
        return labels.next().is_none().then(|| Ipv4Addr::from(parts).into());
    }
    let rest = name.strip_suffix(".ip6.arpa")?;
    let mut number = 0u128;
    let mut count = 0;
    for label in rest.rsplit('.') {
        let [digit] = label.as_bytes() else { return None };
        number = (number << 4) | u128::from(char::from(*digit).to_digit(16)?);
        count += 1;
        if count > 32 {
            return None;
        }
    }
    (count == 32).then(|| Ipv6Addr::from(number).into())
}

/// A number of a byte as it is written, without leading zeros.
fn decimal(text: &str) -> Option<u8> {
    if text.is_empty() || text.len() > 1 && text.starts_with('0') || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// The address that is written with dashes: `10-244-0-2`, `fd00--2`.
pub fn dashed(label: &str) -> Option<IpAddr> {
    let mut parts = label.split('-');
    if let (Some(a), Some(b), Some(c), Some(d), None) =
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        && let (Some(a), Some(b), Some(c), Some(d)) = (decimal(a), decimal(b), decimal(c), decimal(d))
    {
        return Some(Ipv4Addr::new(a, b, c, d).into());
    }
    label.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::V6)
}

/// How an address is written as a label.
pub fn label(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string().replace('.', "-"),
        // In full: a label neither begins nor ends with a dash.
        IpAddr::V6(ip) => {
            let mut out = String::with_capacity(39);
            for (i, part) in ip.segments().iter().enumerate() {
                let dash = if i > 0 { "-" } else { "" };
                let _ = write!(out, "{dash}{part:x}");
            }
            out
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_below_a_domain() {
        let check = |name: &str, expect: Option<&str>| assert_eq!(below(name, "cluster.local"), expect, "{name}");
        check("web.shop.svc.cluster.local", Some("web.shop.svc"));
        check("cluster.local", Some(""));
        check("mycluster.local", None);
        check("local", None);
        check("cluster.local.example", None);
    }

    #[test]
    fn a_dot_in_a_label_is_none_between_labels() {
        let name = Name::from_labels([&b"a.svc"[..], b"Cluster", b"LOCAL"]).unwrap();
        assert_eq!(Text::of(&name).as_str(), "a?svc.cluster.local");
        assert_eq!(Text::of(&Name::root()).as_str(), "");
        let long = Name::from_labels([&[b'x'; 61][..]; 4]).unwrap();
        assert_eq!(Text::of(&long).as_str().len(), 247);
    }

    #[test]
    fn addresses_in_names() {
        let check = |name: &str, expect: Option<&str>| {
            assert_eq!(reversed(name), expect.map(|e| e.parse().unwrap()), "{name}");
        };
        check("10.0.96.10.in-addr.arpa", Some("10.96.0.10"));
        check("0.96.10.in-addr.arpa", None);
        check("1.10.0.96.10.in-addr.arpa", None);
        check("010.0.96.10.in-addr.arpa", None);
        check("256.0.96.10.in-addr.arpa", None);
        let six = format!("9.{}d.f.ip6.arpa", "0.".repeat(29));
        check(&six, Some("fd00::9"));
        check(&six[2..], None);
        let check = |text: &str, expect: Option<&str>| {
            assert_eq!(dashed(text), expect.map(|e| e.parse().unwrap()), "{text}");
        };
        check("10-244-0-2", Some("10.244.0.2"));
        check("10-244-0", None);
        check("10-244-0-256", None);
        check("fd00--2", Some("fd00::2"));
        check("web", None);
        for ip in ["10.244.0.2", "fd00::2", "::"] {
            let ip: IpAddr = ip.parse().unwrap();
            assert_eq!(dashed(&label(ip)), Some(ip));
        }
    }
}
