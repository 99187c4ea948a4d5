//! Addresses and ranges in fields, strict as they are since Kubernetes 1.36
//! (<https://github.com/kubernetes/enhancements/issues/4858>).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::field::{Errors, Path};

/// Reads what older versions took: IPv4 with leading zeros.
pub(super) fn sloppy(text: &str) -> Option<IpAddr> {
    let plain = |part: &str| match part.trim_start_matches('0') {
        "" if !part.is_empty() => "0".to_owned(),
        rest => rest.to_owned(),
    };
    text.parse().ok().or_else(|| {
        let parts: Vec<String> = text.split('.').map(plain).collect();
        parts.join(".").parse::<Ipv4Addr>().ok().map(IpAddr::V4)
    })
}

/// An address.
pub(super) fn address(text: &str) -> Result<(), String> {
    match (text.parse(), sloppy(text)) {
        (Ok(IpAddr::V6(ip)), _) if ip.to_ipv4_mapped().is_some() => {
            Err("must not be an IPv4-mapped IPv6 address".into())
        }
        (Ok(_), _) => Ok(()),
        (Err(_), Some(_)) => Err("must not have leading 0s".into()),
        (Err(_), None) => Err("must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".into()),
    }
}

/// An address as it is written in names and in newer fields: in one way only.
pub(super) fn canonical(text: &str) -> Result<(), String> {
    address(text)?;
    match text.parse::<IpAddr>() {
        Ok(ip) if ip.to_string() != text => Err(format!("must be in canonical form ({:?})", ip.to_string())),
        _ => Ok(()),
    }
}

/// Reads a range as older versions did.
pub(super) fn sloppy_range(text: &str) -> Option<IpNet> {
    let (ip, length) = text.split_once('/')?;
    let digits = !length.is_empty() && length.bytes().all(|c| c.is_ascii_digit());
    IpNet::new(sloppy(ip)?, length.parse().ok().filter(|_| digits)?).ok()
}

/// A range.
pub(super) fn range(text: &str) -> Result<(), String> {
    let Some(net) = sloppy_range(text) else {
        return Err("must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)".into());
    };
    address(text.split('/').next().unwrap_or_default())?;
    if text.split('/').nth(1).is_some_and(|length| length.len() > 1 && length.starts_with('0')) {
        return Err("must not have leading 0s".into());
    }
    if net.addr() != net.network() {
        return Err("must not have bits set beyond the prefix length".into());
    }
    Ok(())
}

/// A range as newer fields want it: in one way only.
pub(super) fn canonical_range(text: &str) -> Result<(), String> {
    range(text)?;
    match sloppy_range(text) {
        Some(net) if net.to_string() != text => Err(format!("must be in canonical form ({:?})", net.to_string())),
        _ => Ok(()),
    }
}

/// An address with the length of its network's prefix, in one way only.
pub(super) fn interface_address(text: &str) -> Result<(), String> {
    let Some(net) = sloppy_range(text) else {
        return Err("must be a valid address in CIDR form, (e.g. 10.9.8.7/24 or 2001:db8::1/64)".into());
    };
    let canonical = match (net.addr(), net.prefix_len()) {
        (IpAddr::V6(ip), length) => match ip.to_ipv4_mapped() {
            Some(mapped) => format!("{mapped}/{}", length.saturating_sub(96)),
            None => net.to_string(),
        },
        _ => net.to_string(),
    };
    (canonical == text).then_some(()).ok_or_else(|| format!("must be in canonical form ({canonical:?})"))
}

/// Refuses addresses behind which no endpoint can be: those of nobody, of every machine itself and of one link.
pub(super) fn not_special(text: &str, path: Path<'_>, errors: &mut Errors) {
    let Some(ip) = sloppy(text) else {
        errors.invalid(path, text, "must be a valid IP address");
        return;
    };
    if ip.is_unspecified() {
        errors.invalid(path, text, format!("may not be unspecified ({text})"));
    }
    if ip.is_loopback() {
        errors.invalid(path, text, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    }
    let (local, multicast) = match ip {
        IpAddr::V4(ip) => (ip.is_link_local(), ip.octets()[..3] == [224, 0, 0]),
        IpAddr::V6(ip) => (ip.is_unicast_link_local(), is_link_local_multicast(ip)),
    };
    if local {
        errors.invalid(path, text, "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    }
    if multicast {
        errors.invalid(path, text, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    }
}

fn is_link_local_multicast(ip: Ipv6Addr) -> bool {
    ip.segments()[0] & 0xff0f == 0xff02
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let say = |result: Result<(), String>| result.err().unwrap_or_default();
        for (text, expect) in [
            ("10.0.0.1", ""),
            ("2001:DB8::1", "must be in canonical form (\"2001:db8::1\")"),
            ("010.0.0.1", "must not have leading 0s"),
            ("::ffff:1.2.3.4", "must not be an IPv4-mapped IPv6 address"),
            ("10.0.0", "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"),
            ("", "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"),
        ] {
            assert_eq!(say(canonical(text)), expect, "{text}");
        }
        for (text, expect) in [
            ("10.0.0.0/8", ""),
            ("2001:0db8::/32", "must be in canonical form (\"2001:db8::/32\")"),
            ("10.0.0.1/8", "must not have bits set beyond the prefix length"),
            ("10.0.0.0/08", "must not have leading 0s"),
            ("10.0.0.0", "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"),
            ("10.0.0.0/33", "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"),
        ] {
            assert_eq!(say(canonical_range(text)), expect, "{text}");
        }
    }

    #[test]
    fn special() {
        for (text, expect) in [
            ("10.0.0.1", ""),
            ("0.0.0.0", "may not be unspecified (0.0.0.0)"),
            ("::1", "may not be in the loopback range (127.0.0.0/8, ::1/128)"),
            ("169.254.1.1", "may not be in the link-local range (169.254.0.0/16, fe80::/10)"),
            ("224.0.0.5", "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"),
        ] {
            let mut errors = Errors::default();
            not_special(text, Path::Root.at("ip"), &mut errors);
            let found = errors.to_string();
            assert_eq!(found.split_once(&format!("{text:?}: ")).map_or("", |(_, why)| why), expect, "{text}");
        }
    }
}
