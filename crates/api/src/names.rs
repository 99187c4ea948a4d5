//! What names, labels and other identifiers may look like
//! (<https://kubernetes.io/docs/concepts/overview/working-with-objects/names/>).

const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must \
    start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or \
    '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
    alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
    validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const WILDCARD: &str = "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which \
    must consist of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character (e.g. \
    '*.example.com', regex used for validation is \
    '\\*\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end \
    with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
    '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or \
    '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex \
    used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const PORT_NAME: &str = "must contain only alphanumeric characters (a-z, 0-9), and hyphens, with at least one letter, \
    and neither start nor end with a hyphen";

fn lower(c: u8) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}

fn framed(text: &str, edge: fn(u8) -> bool, inner: fn(u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    match (bytes.first(), bytes.last()) {
        (Some(first), Some(last)) => edge(*first) && edge(*last) && bytes.iter().all(|c| inner(*c)),
        _ => false,
    }
}

/// A lowercase RFC 1123 label, at most 63 characters. The error is upstream's text.
pub fn dns_label(name: &str) -> Result<(), String> {
    if name.len() > 63 {
        return Err("must be no more than 63 bytes".into());
    }
    if !framed(name, lower, |c| lower(c) || c == b'-') {
        return Err(LABEL.into());
    }
    Ok(())
}

/// A lowercase RFC 1123 subdomain, at most 253 characters.
pub fn dns_subdomain(name: &str) -> Result<(), String> {
    if name.len() > 253 {
        return Err("must be no more than 253 bytes".into());
    }
    if !name.split('.').all(|part| framed(part, lower, |c| lower(c) || c == b'-')) {
        return Err(SUBDOMAIN.into());
    }
    Ok(())
}

/// The same with large letters, as drivers are named.
pub fn dns_subdomain_caseless(name: &str) -> Result<(), String> {
    if name.len() > 253 {
        return Err("must be no more than 253 bytes".into());
    }
    dns_subdomain(&name.to_ascii_lowercase()).map_err(|_| {
        "an RFC 1123 subdomain must consist of alphanumeric characters, '-' or '.', and must start and end with an \
            alphanumeric character (e.g. 'Example.com', regex used for validation is \
            '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
            .into()
    })
}

/// A name as in C.
pub fn c_identifier(name: &str) -> Result<(), String> {
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    let good = name.bytes().all(word) && name.bytes().next().is_some_and(|c| !c.is_ascii_digit());
    good.then_some(()).ok_or_else(|| {
        "a valid C identifier must start with alphabetic character or '_', followed by a string of alphanumeric \
            characters or '_' (e.g. 'my_name',  or 'MY_NAME',  or 'MyName', regex used for validation is \
            '[A-Za-z_][A-Za-z0-9_]*')"
            .into()
    })
}

/// The reason of a condition.
pub fn condition_reason(reason: &str) -> Result<(), String> {
    let inner = |c: u8| c.is_ascii_alphanumeric() || b"_,:".contains(&c);
    let bytes = reason.as_bytes();
    let good = bytes.iter().all(|c| inner(*c))
        && bytes.first().is_some_and(u8::is_ascii_alphabetic)
        && bytes.last().is_some_and(|c| c.is_ascii_alphanumeric() || *c == b'_');
    good.then_some(()).ok_or_else(|| {
        "a condition reason must start with alphabetic character, optionally followed by a string of alphanumeric \
            characters or '_,:', and must end with an alphanumeric character or '_' (e.g. 'my_name',  or 'MY_NAME',  \
            or 'MyName',  or 'ReasonA,ReasonB',  or 'ReasonA:ReasonB', regex used for validation is \
            '[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?')"
            .into()
    })
}

/// A domain that is searched: parts may have and begin with underscores, as SRV records do.
pub fn dns_subdomain_underscore(name: &str) -> Result<(), String> {
    let part = |part: &str| framed(part.strip_prefix('_').unwrap_or(part), lower, |c| lower(c) || b"-_".contains(&c));
    if name.len() > 253 {
        return Err("must be no more than 253 bytes".into());
    }
    name.split('.').all(part).then_some(()).ok_or_else(|| {
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-', '_' or '.', and must \
            start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
            '_?[a-z0-9]([-_a-z0-9]*[a-z0-9])?(\\._?[a-z0-9]([-_a-z0-9]*[a-z0-9])?)*')"
            .into()
    })
}

/// The name of an HTTP header.
pub fn http_header(name: &str) -> Result<(), String> {
    let good = !name.is_empty() && name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-');
    good.then_some(()).ok_or_else(|| {
        "a valid HTTP header must consist of alphanumeric characters or '-' (e.g. 'X-Header-Name', regex used for \
            validation is '[-A-Za-z0-9]+')"
            .into()
    })
}

/// An RFC 1035 label: a name of a Service in older versions.
pub fn dns_1035_label(name: &str) -> Result<(), String> {
    if name.len() > 63 {
        return Err("must be no more than 63 bytes".into());
    }
    if !framed(name, lower, |c| lower(c) || c == b'-') || !name.as_bytes().first().is_some_and(u8::is_ascii_lowercase) {
        return Err(LABEL_1035.into());
    }
    Ok(())
}

/// A name that is a segment of a URL's path: RBAC's names.
pub fn path_segment(name: &str) -> Result<(), String> {
    if name == "." || name == ".." {
        return Err(format!("may not be '{name}'"));
    }
    match name.chars().find(|c| *c == '/' || *c == '%') {
        Some(c) => Err(format!("may not contain '{c}'")),
        None => Ok(()),
    }
}

/// A subdomain whose first label is a star: a host of an Ingress.
pub fn wildcard_subdomain(name: &str) -> Result<(), String> {
    if name.len() > 253 {
        return Err("must be no more than 253 bytes".into());
    }
    match name.strip_prefix("*.").map(dns_subdomain) {
        Some(Ok(())) => Ok(()),
        _ => Err(WILDCARD.into()),
    }
}

/// A path below a domain, such as `example.com/controller`.
pub fn domain_prefixed_path(text: &str) -> Result<(), String> {
    match text.split_once('/') {
        Some((host, path)) if !host.is_empty() && !path.is_empty() => {
            dns_subdomain(host)?;
            let known = path.bytes().all(|c| c.is_ascii_alphanumeric() || b"/-._~%!$&'()*+,;=:".contains(&c));
            known
                .then_some(())
                .ok_or_else(|| "Invalid path (regex used for validation is '[A-Za-z0-9/\\-._~%!$&'()*+,;=:]+')".into())
        }
        _ => Err("must be a domain-prefixed path (such as \"acme.io/foo\")".into()),
    }
}

/// A domain of at least two labels, perhaps with a dot at the end.
pub fn fully_qualified(name: &str) -> Result<(), String> {
    let name = name.strip_suffix('.').unwrap_or(name);
    dns_subdomain(name)?;
    if !name.contains('.') {
        return Err("should be a domain with at least two segments separated by dots".into());
    }
    name.split('.').try_for_each(dns_label)
}

/// The key of a label or annotation: an optional prefix, a slash, a name.
pub fn qualified_name(key: &str) -> Result<(), String> {
    let name = match key.split_once('/') {
        Some((prefix, name)) => {
            if prefix.is_empty() {
                return Err("prefix part must be non-empty".into());
            }
            dns_subdomain(prefix).map_err(|e| format!("prefix part {e}"))?;
            name
        }
        None => key,
    };
    if name.is_empty() {
        return Err("name part must be non-empty".into());
    }
    if name.len() > 63 {
        return Err("name part must be no more than 63 bytes".into());
    }
    if name.contains('/') {
        return Err("a qualified name must consist of alphanumeric characters, '-', '_' or '.', with an optional DNS \
            subdomain prefix and '/' (e.g. 'example.com/MyName')"
            .into());
    }
    word(name).then_some(()).ok_or_else(|| QUALIFIED.into())
}

fn word(text: &str) -> bool {
    framed(text, |c| c.is_ascii_alphanumeric(), |c| c.is_ascii_alphanumeric() || b"-_.".contains(&c))
}

/// The value of a label.
pub fn label_value(value: &str) -> Result<(), String> {
    if value.len() > 63 {
        return Err("must be no more than 63 bytes".into());
    }
    (value.is_empty() || word(value)).then_some(()).ok_or_else(|| LABEL_VALUE.into())
}

/// The name of a container's or service's port (RFC 6335).
pub fn port_name(name: &str) -> Result<(), String> {
    if name.len() > 15 {
        return Err("must be no more than 15 characters".into());
    }
    if !name.bytes().all(|c| lower(c) || c == b'-') || !name.bytes().any(|c| c.is_ascii_lowercase()) {
        return Err(PORT_NAME.into());
    }
    if name.contains("--") {
        return Err("must not contain consecutive hyphens".into());
    }
    if name.starts_with('-') || name.ends_with('-') {
        return Err(PORT_NAME.into());
    }
    Ok(())
}

/// A key of a ConfigMap or Secret.
pub fn config_key(key: &str) -> Result<(), String> {
    if key.len() > 253 {
        return Err("must be no more than 253 bytes".into());
    }
    let known = !key.is_empty() && key.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c));
    if !known {
        return Err(
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or \
            'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"
                .into(),
        );
    }
    if key == "." || key == ".." || key.starts_with("..") {
        return Err(format!("must not start with '..': {key}"));
    }
    Ok(())
}

/// The name of an environment variable: any printable ASCII but `=` since Kubernetes 1.30.
pub fn env_name(name: &str) -> Result<(), String> {
    let good = !name.is_empty() && name.bytes().all(|c| (0x20..0x7f).contains(&c) && c != b'=');
    good.then_some(()).ok_or_else(|| {
        "a valid environment variable name must consist only of printable ASCII characters other than '='".into()
    })
}
