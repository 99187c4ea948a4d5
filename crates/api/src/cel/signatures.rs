//! What may be called with what: the table `signatures.txt`, read once.

use std::{collections::HashMap, sync::LazyLock};

use super::types::Type;

/// One form of a function.
#[derive(Debug)]
pub(super) struct Signature {
    /// Whether it is called as `receiver.name(…)`; the receiver is its first argument.
    pub member: bool,
    pub args: Vec<Type>,
    pub result: Type,
}

/// How many variables a signature may have.
pub(super) const VARIABLES: usize = 2;

/// The forms of each function, those with a word in front under their whole name.
static TABLE: LazyLock<HashMap<&'static str, Vec<Signature>>> = LazyLock::new(|| {
    let lines = include_str!("signatures.txt").lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut table: HashMap<&'static str, Vec<Signature>> = HashMap::new();
    for line in lines {
        let Some((names, forms)) = line.split_once(": ") else { continue };
        for name in names.split(' ') {
            table.entry(name).or_default().extend(forms.split(" | ").filter_map(signature));
        }
    }
    table
});

/// The forms of a function; none if there is no such function.
pub(super) fn of(name: &str) -> &'static [Signature] {
    TABLE.get(name).map_or(&[], Vec::as_slice)
}

/// Reads `receiver.(a, b) result` or `(a, b) result`.
fn signature(text: &'static str) -> Option<Signature> {
    let (before, rest) = text.split_once('(')?;
    let (inner, result) = rest.rsplit_once(") ")?;
    let receiver = before.strip_suffix('.');
    let args = receiver.into_iter().chain(split(inner)).map(ty).collect::<Option<_>>()?;
    Some(Signature { member: receiver.is_some(), args, result: ty(result)? })
}

/// Splits at commas that are not within `<>`.
fn split(text: &'static str) -> Vec<&'static str> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '<' => depth += 1,
            '>' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts.retain(|part| !part.is_empty());
    parts
}

fn ty(text: &'static str) -> Option<Type> {
    if let Some((of, inner)) = text.strip_suffix('>').and_then(|text| text.split_once('<')) {
        return match (of, &split(inner)[..]) {
            ("list", [item]) => Some(Type::list(ty(item)?)),
            ("optional", [item]) => Some(Type::optional(ty(item)?)),
            ("map", [key, value]) => Some(Type::map(ty(key)?, ty(value)?)),
            _ => None,
        };
    }
    Some(match text {
        "A" => Type::Variable(0),
        "B" => Type::Variable(1),
        "dyn" => Type::Dyn,
        "bool" => Type::Bool,
        "int" => Type::Int,
        "uint" => Type::Uint,
        "double" => Type::Double,
        "string" => Type::String,
        "bytes" => Type::Bytes,
        "duration" => Type::Duration,
        "timestamp" => Type::Timestamp,
        "type" => Type::Type,
        "Quantity" | "URL" | "IP" | "CIDR" | "Semver" | "Format" | "Authorizer" | "Decision" => Type::Named(text),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cel::functions::SPACES;

    #[test]
    fn the_table_is_read_whole() {
        for line in include_str!("signatures.txt").lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (names, forms) = line.split_once(": ").unwrap();
            assert!(forms.split(" | ").all(|form| signature(form).is_some()), "{line}");
            for name in names.split(' ') {
                assert!(!of(name).is_empty(), "{name}");
                let space = name.split_once('.').map(|(space, _)| space);
                assert!(space.is_none_or(|space| SPACES.contains(&space)), "{name}");
            }
        }
        let size = of("size");
        assert_eq!((size.len(), size[4].member, size[4].args.len()), (8, true, 1));
        assert_eq!(of("getQuery")[0].result.to_string(), "map(string, list(string))");
        assert!(of("nonsense").is_empty());
    }
}
