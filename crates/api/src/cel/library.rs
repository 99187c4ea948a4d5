//! Quantities, versions, URLs, addresses, times and the authorizer
//! (<https://kubernetes.io/docs/reference/using-api/cel/#cel-options-language-features-and-libraries>).

use std::{net::IpAddr, rc::Rc};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp, tz::TimeZone};

use super::{
    EvalError, Question, Session,
    eval::{Eval, no_overload},
    named,
    value::{Url, Val, compare},
};
use crate::{quantity::Quantity, semver::Version};

/// An address as Kubernetes takes it in expressions: IPv4-mapped ones and zones are none.
fn address(text: &str) -> Option<IpAddr> {
    let ip: IpAddr = text.parse().ok()?;
    match ip {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => None,
        ip => Some(ip),
    }
}

fn network(text: &str) -> Option<IpNet> {
    let (ip, _) = text.split_once('/')?;
    address(ip)?;
    text.parse().ok()
}

/// An absolute URL, or an absolute path.
fn url(text: &str) -> Option<Url> {
    if text.chars().any(|c| c.is_control() || c == ' ') {
        return None;
    }
    let (before_fragment, _) = text.split_once('#').unwrap_or((text, ""));
    let (rest, query) = before_fragment.split_once('?').unwrap_or((before_fragment, ""));
    let mut url = Url {
        text: text.to_owned(),
        scheme: String::new(),
        host: String::new(),
        port: String::new(),
        path: String::new(),
        query: query.to_owned(),
    };
    if rest.starts_with('/') && !rest.starts_with("//") {
        url.path = rest.to_owned();
        return Some(url);
    }
    let (scheme, rest) = rest.split_once("://")?;
    let proper = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    if scheme.is_empty() || !scheme.starts_with(|c: char| c.is_ascii_alphabetic()) || !scheme.chars().all(proper) {
        return None;
    }
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (name, port) = match host.strip_prefix('[') {
        Some(inner) => {
            let (name, port) = inner.split_once(']')?;
            name.parse::<std::net::Ipv6Addr>().ok()?;
            (format!("[{name}]"), port.strip_prefix(':').unwrap_or(port))
        }
        None => match host.rsplit_once(':') {
            Some((name, port)) => (name.to_owned(), port),
            None => (host.to_owned(), ""),
        },
    };
    if !port.chars().all(|c| c.is_ascii_digit()) {
        return None;
    }
    (url.scheme, url.host, url.port, url.path) = (scheme.to_lowercase(), name, port.to_owned(), path.to_owned());
    Some(url)
}

impl<'a> Session<'a> {
    /// Calls a function of Kubernetes' own types.
    pub(super) fn library(&self, name: &str, member: bool, args: &[Val<'a>]) -> Eval<'a> {
        let no = || Err(no_overload(name));
        match (name, args) {
            ("isQuantity", [Val::Str(text)]) => Ok(Val::Bool(text.parse::<Quantity>().is_ok())),
            ("quantity", [Val::Str(text)]) => {
                text.parse().map(Val::Quantity).map_err(|e| EvalError::new(format!("quantity: {e}")))
            }
            ("includes", [list @ Val::List(_), value]) => self.contained(value, list),
            ("includes", [one, value]) => self.equal(one, value).map(Val::Bool),
            ("isURL", [Val::Str(text)]) => Ok(Val::Bool(url(text).is_some())),
            ("url", [Val::Str(text)]) => {
                let parsed = url(text).ok_or_else(|| EvalError::new(format!("URL parse error: {:?}", &**text)))?;
                Ok(Val::Url(Rc::new(parsed)))
            }
            ("isIP", [Val::Str(text)]) => Ok(Val::Bool(address(text).is_some())),
            ("ip", [Val::Str(text)]) => {
                let parsed = address(text);
                let error =
                    || EvalError::new(format!("IP Address {:?} parse error during conversion from string", &**text));
                parsed.map(Val::Ip).ok_or_else(error)
            }
            ("isCIDR", [Val::Str(text)]) => Ok(Val::Bool(network(text).is_some())),
            ("cidr", [Val::Str(text)]) => {
                let error = || {
                    EvalError::new(format!("network address parse error during conversion from string: {:?}", &**text))
                };
                network(text).map(Val::Cidr).ok_or_else(error)
            }
            ("semver" | "isSemver", [Val::Str(text), normalize @ ..]) => {
                self.spend_bytes(text.len())?;
                let read = match normalize {
                    [] | [Val::Bool(false)] => text.parse(),
                    [Val::Bool(true)] => Version::normalized(text),
                    _ => return no(),
                };
                match name {
                    "isSemver" => Ok(Val::Bool(read.is_ok())),
                    _ => read.map(|version| Val::Version(Rc::new(version))).map_err(|e| EvalError::new(e.to_string())),
                }
            }
            (_, [Val::Version(version), rest @ ..]) => version_function(name, version, rest),
            ("validate", [Val::Format(format), Val::Str(text)]) => {
                self.spend(named::cost(format, text.chars().count() as u64))?;
                let why = named::validate(format, text).err();
                Ok(Val::Optional(why.map(|why| Rc::new(Val::list(vec![Val::text(why)])))))
            }
            (_, [Val::Quantity(quantity), rest @ ..]) => quantity_function(name, *quantity, rest),
            (_, [Val::Url(url)]) => Ok(match name {
                "getScheme" => Val::text(url.scheme.as_str()),
                "getHost" if url.port.is_empty() => Val::text(url.host.as_str()),
                "getHost" => Val::text(format!("{}:{}", url.host, url.port)),
                "getHostname" => Val::text(url.host.trim_matches(['[', ']'])),
                "getPort" => Val::text(url.port.as_str()),
                "getEscapedPath" => Val::text(url.path.as_str()),
                "getQuery" => self.query(&url.query)?,
                _ => return no(),
            }),
            (_, [Val::Ip(ip)]) => Ok(match (name, ip) {
                ("family", ip) => Val::Int(if ip.is_ipv4() { 4 } else { 6 }),
                ("isUnspecified", ip) => Val::Bool(ip.is_unspecified()),
                ("isLoopback", ip) => Val::Bool(ip.is_loopback()),
                ("isLinkLocalMulticast", IpAddr::V4(ip)) => Val::Bool(ip.octets()[..3] == [224, 0, 0]),
                ("isLinkLocalMulticast", IpAddr::V6(ip)) => Val::Bool(ip.segments()[0] & 0xff0f == 0xff02),
                ("isLinkLocalUnicast", IpAddr::V4(ip)) => Val::Bool(ip.is_link_local()),
                ("isLinkLocalUnicast", IpAddr::V6(ip)) => Val::Bool(ip.segments()[0] & 0xffc0 == 0xfe80),
                ("isGlobalUnicast", IpAddr::V4(ip)) => Val::Bool(
                    !(ip.is_unspecified()
                        || ip.is_loopback()
                        || ip.is_multicast()
                        || ip.is_link_local()
                        || ip.is_broadcast()),
                ),
                ("isGlobalUnicast", IpAddr::V6(ip)) => Val::Bool(
                    !(ip.is_unspecified()
                        || ip.is_loopback()
                        || ip.is_multicast()
                        || ip.segments()[0] & 0xffc0 == 0xfe80),
                ),
                _ => return no(),
            }),
            (_, [Val::Cidr(cidr), rest @ ..]) => cidr_function(name, *cidr, rest),
            (_, [Val::Time(time), zone @ ..]) => time_function(name, *time, zone),
            (_, [Val::Duration(span)]) => span_function(name, *span),
            (_, [Val::Authorizer(question), rest @ ..]) if member => self.ask(name, question, rest),
            ("allowed", [Val::Decision(allowed, _)]) => Ok(Val::Bool(*allowed)),
            ("reason", [Val::Decision(_, reason)]) => Ok(Val::text(reason.clone())),
            ("errored", [Val::Decision(..)]) => Ok(Val::Bool(false)),
            ("error", [Val::Decision(..)]) => Ok(Val::text("")),
            _ => no(),
        }
    }

    fn query(&self, query: &str) -> Eval<'a> {
        let mut out: Vec<(String, Vec<Val<'a>>)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            self.spend(1 + out.len() as u64 / 10)?;
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match out.iter_mut().find(|(known, _)| known == key) {
                Some((_, values)) => values.push(Val::text(value)),
                None => out.push((key.to_owned(), vec![Val::text(value)])),
            }
        }
        Ok(Val::map(out.into_iter().map(|(k, v)| (Val::text(k), Val::list(v))).collect()))
    }

    /// Collects a question for the authorizer, and asks it.
    fn ask(&self, name: &str, question: &Question, rest: &[Val<'a>]) -> Eval<'a> {
        let text = |at: usize| match rest.get(at) {
            Some(Val::Str(text)) => Ok((**text).to_owned()),
            _ => Err(no_overload(name)),
        };
        let mut next = question.clone();
        match name {
            "path" => next.path = text(0)?,
            "group" => next.group = text(0)?,
            "resource" => next.resource = text(0)?,
            "subresource" => next.subresource = text(0)?,
            "namespace" => next.namespace = text(0)?,
            "name" => next.name = text(0)?,
            // One that cannot be read asks about everything, as if it were not there.
            "fieldSelector" => next.fields = text(0)?,
            "labelSelector" => next.labels = text(0)?,
            "serviceAccount" => next.service_account = Some((text(0)?, text(1)?)),
            "check" => {
                // Upstream's estimate of what asking costs.
                self.spend(350_000)?;
                next.verb = text(0)?;
                let Some(authorizer) = self.authorizer else { return Err(no_overload(name)) };
                let (allowed, reason) = authorizer.check(&next);
                return Ok(Val::Decision(allowed, reason.into()));
            }
            _ => return Err(no_overload(name)),
        }
        Ok(Val::Authorizer(Rc::new(next)))
    }

    /// Functions with a word in front.
    pub(super) fn namespaced(&self, space: &str, name: &str, args: Vec<Val<'a>>) -> Eval<'a> {
        match (space, name, &args[..]) {
            ("optional", "none", []) => Ok(Val::Optional(None)),
            ("optional", "of", [value]) => Ok(Val::some(value.clone())),
            ("optional", "ofNonZeroValue", [value]) => {
                Ok(if value.is_zero() { Val::Optional(None) } else { Val::some(value.clone()) })
            }
            ("format", "named", [Val::Str(name)]) => {
                Ok(Val::Optional(named::find(name).map(|format| Rc::new(Val::Format(format)))))
            }
            ("format", name, []) => named::find(name).map(Val::Format).ok_or_else(|| no_overload(name)),
            ("sets", _, args) => self.set_function(name, args),
            ("base64", "encode", [Val::Bytes(bytes)]) => {
                self.spend_bytes(bytes.len())?;
                Ok(Val::text(BASE64.encode(bytes)))
            }
            ("base64", "decode", [Val::Str(text)]) => {
                self.spend_bytes(text.len())?;
                let bytes = BASE64.decode(&**text).map_err(|e| EvalError::new(format!("illegal base64 data: {e}")))?;
                Ok(Val::Bytes(bytes.into()))
            }
            ("ip", "isCanonical", [Val::Str(text)]) => {
                let ip = address(text).ok_or_else(|| EvalError::new(format!("{:?} is no IP address", &**text)))?;
                Ok(Val::Bool(ip.to_string() == **text))
            }
            ("jsonpatch", "escapeKey", [Val::Str(text)]) => {
                self.spend_bytes(text.len() * 2)?;
                Ok(Val::text(text.replace('~', "~0").replace('/', "~1")))
            }
            ("strings", "quote", [Val::Str(text)]) => {
                self.spend_bytes(text.len() * 2)?;
                Ok(Val::text(format!("{:?}", &**text)))
            }
            ("math", "greatest" | "least", args) => {
                let items: Vec<Val<'a>> = match args {
                    [Val::List(list)] => list.iter().collect(),
                    args => args.to_vec(),
                };
                self.spend(items.len() as u64)?;
                let mut best: Option<Val<'a>> = None;
                for item in items {
                    let better = match &best {
                        None => true,
                        Some(best) => {
                            let order = compare(&item, best).ok_or_else(|| no_overload(name))?;
                            if name == "greatest" { order.is_gt() } else { order.is_lt() }
                        }
                    };
                    if better {
                        best = Some(item);
                    }
                }
                best.ok_or_else(|| no_overload(name))
            }
            ("math", _, [Val::Double(value)]) => Ok(Val::Double(match name {
                "abs" => value.abs(),
                "ceil" => value.ceil(),
                "floor" => value.floor(),
                "round" => value.round(),
                "trunc" => value.trunc(),
                "sign" if *value == 0.0 => 0.0,
                "sign" => value.signum(),
                _ => return Err(no_overload(name)),
            })),
            ("math", "abs", [Val::Int(value)]) => {
                value.checked_abs().map(Val::Int).ok_or_else(|| EvalError::new("integer overflow"))
            }
            ("math", "sign", [Val::Int(value)]) => Ok(Val::Int(value.signum())),
            _ => Err(no_overload(name)),
        }
    }
}

fn version_function<'a>(name: &str, version: &Version, rest: &[Val<'a>]) -> Eval<'a> {
    let number = |at: usize| i64::try_from(version.numbers()[at]).map(Val::Int).map_err(|_| no_overload(name));
    Ok(match (name, rest) {
        ("major", []) => number(0)?,
        ("minor", []) => number(1)?,
        ("patch", []) => number(2)?,
        ("isGreaterThan", [Val::Version(other)]) => Val::Bool(*version > **other),
        ("isLessThan", [Val::Version(other)]) => Val::Bool(*version < **other),
        ("compareTo", [Val::Version(other)]) => Val::Int(version.cmp(other) as i64),
        _ => return Err(no_overload(name)),
    })
}

fn quantity_function<'a>(name: &str, quantity: Quantity, rest: &[Val<'a>]) -> Eval<'a> {
    let whole = quantity == Quantity::new(quantity.value());
    let other = match rest {
        [Val::Quantity(other)] => Some(*other),
        [Val::Int(other)] => Some(Quantity::new(*other)),
        _ => None,
    };
    Ok(match (name, other) {
        ("isGreaterThan", Some(other)) => Val::Bool(quantity > other),
        ("isLessThan", Some(other)) => Val::Bool(quantity < other),
        ("compareTo", Some(other)) => Val::Int(quantity.cmp(&other) as i64),
        ("add", Some(other)) => Val::Quantity(quantity + other),
        ("sub", Some(other)) => Val::Quantity(quantity - other),
        ("sign", None) => Val::Int(quantity.cmp(&Quantity::new(0)) as i64),
        ("isInteger", None) => Val::Bool(whole),
        ("asInteger", None) if whole => Val::Int(quantity.value()),
        ("asInteger", None) => return Err(EvalError::new("cannot convert value to integer")),
        ("asApproximateFloat", None) => Val::Double(quantity.as_f64()),
        _ => return Err(no_overload(name)),
    })
}

fn cidr_function<'a>(name: &str, cidr: IpNet, rest: &[Val<'a>]) -> Eval<'a> {
    let ip = |value: &Val<'a>| match value {
        Val::Ip(ip) => Some(*ip),
        Val::Str(text) => address(text),
        _ => None,
    };
    let net = |value: &Val<'a>| match value {
        Val::Cidr(cidr) => Some(*cidr),
        Val::Str(text) => network(text),
        _ => None,
    };
    let wrong = || EvalError::new(format!("{name}: the argument cannot be read"));
    Ok(match (name, rest) {
        ("containsIP", [value]) => Val::Bool(cidr.contains(&ip(value).ok_or_else(wrong)?)),
        ("containsCIDR", [value]) => Val::Bool(cidr.contains(&net(value).ok_or_else(wrong)?)),
        ("ip", []) => Val::Ip(cidr.addr()),
        ("masked", []) => Val::Cidr(cidr.trunc()),
        ("prefixLength", []) => Val::Int(i64::from(cidr.prefix_len())),
        _ => return Err(no_overload(name)),
    })
}

fn time_function<'a>(name: &str, time: Timestamp, zone: &[Val<'a>]) -> Eval<'a> {
    let zone = match zone {
        [] => TimeZone::UTC,
        [Val::Str(zone)] => {
            TimeZone::get(zone).map_err(|e| EvalError::new(format!("unknown time zone {:?}: {e}", &**zone)))?
        }
        _ => return Err(no_overload(name)),
    };
    let time = time.to_zoned(zone);
    Ok(Val::Int(match name {
        "getFullYear" => time.year().into(),
        "getMonth" => i64::from(time.month()) - 1,
        "getDate" => time.day().into(),
        "getDayOfMonth" => i64::from(time.day()) - 1,
        "getDayOfWeek" => time.weekday().to_sunday_zero_offset().into(),
        "getDayOfYear" => i64::from(time.day_of_year()) - 1,
        "getHours" => time.hour().into(),
        "getMinutes" => time.minute().into(),
        "getSeconds" => time.second().into(),
        "getMilliseconds" => time.millisecond().into(),
        _ => return Err(no_overload(name)),
    }))
}

fn span_function<'a>(name: &str, span: SignedDuration) -> Eval<'a> {
    Ok(Val::Int(match name {
        "getHours" => span.as_secs() / 3600,
        "getMinutes" => span.as_secs() / 60,
        "getSeconds" => span.as_secs(),
        "getMilliseconds" => i64::from(span.subsec_millis()),
        _ => return Err(no_overload(name)),
    }))
}
