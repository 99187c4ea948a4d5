//! Values, borrowed from JSON as far as they are not new.

use std::{cmp::Ordering, net::IpAddr, ops::Deref, rc::Rc};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp, civil::Date, tz::TimeZone};
use serde_json::{Map as JsonMap, Value};

use super::{EvalError, Question, Session, Type, functions::duration};
use crate::{quantity::Quantity, semver::Version};

/// A text.
#[derive(Clone, Debug)]
pub(super) enum Text<'a> {
    Borrowed(&'a str),
    Owned(Rc<str>),
}

impl Deref for Text<'_> {
    type Target = str;
    fn deref(&self) -> &str {
        match self {
            Text::Borrowed(text) => text,
            Text::Owned(text) => text,
        }
    }
}

/// A list.
#[derive(Clone, Debug)]
pub(super) enum List<'a> {
    Json(&'a [Value]),
    Owned(Rc<Vec<Val<'a>>>),
}

impl<'a> List<'a> {
    pub(super) fn len(&self) -> usize {
        match self {
            List::Json(list) => list.len(),
            List::Owned(list) => list.len(),
        }
    }

    pub(super) fn get(&self, index: usize) -> Option<Val<'a>> {
        match self {
            List::Json(list) => list.get(index).map(Val::from),
            List::Owned(list) => list.get(index).cloned(),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Val<'a>> + '_ {
        (0..self.len()).filter_map(|index| self.get(index))
    }
}

/// A map. Those of JSON have texts as keys; the others are small and looked through.
#[derive(Clone, Debug)]
pub(super) enum Map<'a> {
    Json(&'a JsonMap<String, Value>),
    Owned(Rc<Vec<(Val<'a>, Val<'a>)>>),
}

impl<'a> Map<'a> {
    pub(super) fn len(&self) -> usize {
        match self {
            Map::Json(map) => map.len(),
            Map::Owned(map) => map.len(),
        }
    }

    pub(super) fn entries(&self) -> Vec<(Val<'a>, Val<'a>)> {
        match self {
            Map::Json(map) => map.iter().map(|(k, v)| (Val::Str(Text::Borrowed(k)), Val::from(v))).collect(),
            Map::Owned(map) => map.to_vec(),
        }
    }

    pub(super) fn get(&self, key: &Val<'a>) -> Option<Val<'a>> {
        match (self, key) {
            (Map::Json(map), Val::Str(key)) => map.get(&**key).map(Val::from),
            (Map::Json(_), _) => None,
            (Map::Owned(map), key) => {
                map.iter().find(|(k, _)| scalar_eq(k, key).unwrap_or(false)).map(|(_, v)| v.clone())
            }
        }
    }

    /// A field by its name in an expression: names that are no identifiers are escaped in it.
    pub(super) fn field(&self, name: &str) -> Option<Val<'a>> {
        let get = |name: &str| match self {
            Map::Json(map) => map.get(name).map(Val::from),
            Map::Owned(map) => {
                map.iter().find(|(k, _)| matches!(k, Val::Str(k) if **k == *name)).map(|(_, v)| v.clone())
            }
        };
        get(name).or_else(|| name.contains("__").then(|| get(&unescape(name))).flatten())
    }
}

/// <https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#escaping>
pub(super) fn unescape(name: &str) -> String {
    const KEYWORDS: [&str; 20] = [
        "true",
        "false",
        "null",
        "in",
        "as",
        "break",
        "const",
        "continue",
        "else",
        "for",
        "function",
        "if",
        "import",
        "let",
        "loop",
        "package",
        "namespace",
        "return",
        "var",
        "void",
    ];
    let inner = name.strip_prefix("__").and_then(|rest| rest.strip_suffix("__"));
    if let Some(inner) = inner.filter(|inner| KEYWORDS.contains(inner)) {
        return inner.to_owned();
    }
    let mut out = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(at) = rest.find("__") {
        out.push_str(&rest[..at]);
        let tail = &rest[at..];
        let found = [("__underscores__", "__"), ("__dot__", "."), ("__dash__", "-"), ("__slash__", "/")]
            .into_iter()
            .find(|(mark, _)| tail.starts_with(mark));
        match found {
            Some((mark, is)) => {
                out.push_str(is);
                rest = &tail[mark.len()..];
            }
            None => {
                out.push_str("__");
                rest = &tail[2..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// A URL, as far as expressions can ask for its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Url {
    pub text: String,
    pub scheme: String,
    pub host: String,
    pub port: String,
    pub path: String,
    pub query: String,
}

/// A value of an expression.
#[derive(Clone, Debug)]
pub(super) enum Val<'a> {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Double(f64),
    Str(Text<'a>),
    Bytes(Rc<[u8]>),
    List(List<'a>),
    Map(Map<'a>),
    Duration(SignedDuration),
    Time(Timestamp),
    Type(&'static str),
    Optional(Option<Rc<Val<'a>>>),
    Quantity(Quantity),
    Version(Rc<Version>),
    Url(Rc<Url>),
    Ip(IpAddr),
    Cidr(IpNet),
    /// By its name.
    Format(&'static str),
    Authorizer(Rc<Question>),
    Decision(bool, Rc<str>),
}

impl<'a> From<&'a Value> for Val<'a> {
    fn from(value: &'a Value) -> Val<'a> {
        match value {
            Value::Null => Val::Null,
            Value::Bool(value) => Val::Bool(*value),
            Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(int), _) => Val::Int(int),
                (None, Some(uint)) => Val::Uint(uint),
                (None, None) => Val::Double(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(text) => Val::Str(Text::Borrowed(text)),
            Value::Array(list) => Val::List(List::Json(list)),
            Value::Object(map) => Val::Map(Map::Json(map)),
        }
    }
}

impl<'a> Val<'a> {
    /// A value of JSON as its type says that it is to be read. What cannot be read so stays as it is.
    pub(super) fn of(value: &'a Value, ty: &Type) -> Val<'a> {
        if !ty.converts() {
            return Val::from(value);
        }
        match (ty, value) {
            (Type::Double, Value::Number(number)) => Val::Double(number.as_f64().unwrap_or(f64::NAN)),
            (Type::Duration, Value::String(text)) => duration(text).map_or_else(|| Val::from(value), Val::Duration),
            (Type::Timestamp, Value::String(text)) => timestamp(text).map_or_else(|| Val::from(value), Val::Time),
            (Type::Bytes, Value::String(text)) => {
                BASE64.decode(text).map_or_else(|_| Val::from(value), |bytes| Val::Bytes(bytes.into()))
            }
            (Type::List(of), Value::Array(list)) => Val::list(list.iter().map(|item| Val::of(item, of)).collect()),
            (Type::Map(of), Value::Object(map)) => {
                let entry =
                    |(key, value): (&'a String, &'a Value)| (Val::Str(Text::Borrowed(key)), Val::of(value, &of.1));
                Val::map(map.iter().map(entry).collect())
            }
            (Type::Object(fields), Value::Object(map)) => {
                let entry = |(key, value): (&'a String, &'a Value)| {
                    let value = fields.get(key.as_str()).map_or_else(|| Val::from(value), |ty| Val::of(value, ty));
                    (Val::Str(Text::Borrowed(key)), value)
                };
                Val::map(map.iter().map(entry).collect())
            }
            _ => Val::from(value),
        }
    }

    pub(super) fn text(text: impl Into<Rc<str>>) -> Val<'a> {
        Val::Str(Text::Owned(text.into()))
    }

    pub(super) fn list(list: Vec<Val<'a>>) -> Val<'a> {
        Val::List(List::Owned(Rc::new(list)))
    }

    pub(super) fn map(map: Vec<(Val<'a>, Val<'a>)>) -> Val<'a> {
        Val::Map(Map::Owned(Rc::new(map)))
    }

    pub(super) fn some(value: Val<'a>) -> Val<'a> {
        Val::Optional(Some(Rc::new(value)))
    }

    /// The name of its type.
    pub(super) fn ty(&self) -> &'static str {
        match self {
            Val::Null => "null_type",
            Val::Bool(_) => "bool",
            Val::Int(_) => "int",
            Val::Uint(_) => "uint",
            Val::Double(_) => "double",
            Val::Str(_) => "string",
            Val::Bytes(_) => "bytes",
            Val::List(_) => "list",
            Val::Map(_) => "map",
            Val::Duration(_) => "google.protobuf.Duration",
            Val::Time(_) => "google.protobuf.Timestamp",
            Val::Type(_) => "type",
            Val::Optional(_) => "optional_type",
            Val::Quantity(_) => "kubernetes.Quantity",
            Val::Version(_) => "kubernetes.Semver",
            Val::Url(_) => "kubernetes.URL",
            Val::Ip(_) => "net.IP",
            Val::Cidr(_) => "net.CIDR",
            Val::Format(_) => "kubernetes.NamedFormat",
            Val::Authorizer(_) => "kubernetes.authorization.Authorizer",
            Val::Decision(..) => "kubernetes.authorization.Decision",
        }
    }

    /// Whether it is the empty value of its type.
    pub(super) fn is_zero(&self) -> bool {
        match self {
            Val::Null => true,
            Val::Bool(value) => !value,
            Val::Int(value) => *value == 0,
            Val::Uint(value) => *value == 0,
            Val::Double(value) => *value == 0.0,
            Val::Str(text) => text.is_empty(),
            Val::Bytes(bytes) => bytes.is_empty(),
            Val::List(list) => list.len() == 0,
            Val::Map(map) => map.len() == 0,
            Val::Optional(value) => value.is_none(),
            Val::Duration(value) => value.is_zero(),
            _ => false,
        }
    }
}

/// Whether two values that contain no others are equal; `None` if they contain some.
pub(super) fn scalar_eq(a: &Val<'_>, b: &Val<'_>) -> Option<bool> {
    Some(match (a, b) {
        (Val::List(_) | Val::Map(_), Val::List(_) | Val::Map(_)) => return None,
        (Val::Optional(Some(_)), Val::Optional(Some(_))) => return None,
        (Val::Optional(a), Val::Optional(b)) => a.is_none() && b.is_none(),
        (Val::Null, Val::Null) => true,
        (Val::Bool(a), Val::Bool(b)) => a == b,
        (Val::Bytes(a), Val::Bytes(b)) => a == b,
        (Val::Type(a), Val::Type(b)) => a == b,
        (Val::Url(a), Val::Url(b)) => a == b,
        (Val::Version(a), Val::Version(b)) => a == b,
        (Val::Ip(a), Val::Ip(b)) => a == b,
        (Val::Cidr(a), Val::Cidr(b)) => a == b,
        (Val::Format(a), Val::Format(b)) => a == b,
        (Val::Str(a), Val::Str(b)) => **a == **b,
        (a, b) => compare(a, b) == Some(Ordering::Equal),
    })
}

/// How two values are ordered, if they are.
pub(super) fn compare(a: &Val<'_>, b: &Val<'_>) -> Option<Ordering> {
    match (a, b) {
        (Val::Str(a), Val::Str(b)) => Some((**a).cmp(&**b)),
        (Val::Bytes(a), Val::Bytes(b)) => Some(a.cmp(b)),
        (Val::Bool(a), Val::Bool(b)) => Some(a.cmp(b)),
        (Val::Duration(a), Val::Duration(b)) => Some(a.cmp(b)),
        (Val::Time(a), Val::Time(b)) => Some(a.cmp(b)),
        (Val::Quantity(a), Val::Quantity(b)) => Some(a.cmp(b)),
        (Val::Int(a), Val::Int(b)) => Some(a.cmp(b)),
        (Val::Uint(a), Val::Uint(b)) => Some(a.cmp(b)),
        (Val::Int(a), Val::Uint(b)) => Some(i128::from(*a).cmp(&i128::from(*b))),
        (Val::Uint(a), Val::Int(b)) => Some(i128::from(*a).cmp(&i128::from(*b))),
        (Val::Double(a), Val::Double(b)) => a.partial_cmp(b),
        (Val::Double(a), Val::Int(b)) => a.partial_cmp(&(*b as f64)),
        (Val::Int(a), Val::Double(b)) => (*a as f64).partial_cmp(b),
        (Val::Double(a), Val::Uint(b)) => a.partial_cmp(&(*b as f64)),
        (Val::Uint(a), Val::Double(b)) => (*a as f64).partial_cmp(b),
        _ => None,
    }
}

/// A point in time, or the beginning of a day.
fn timestamp(text: &str) -> Option<Timestamp> {
    let of_day = || Some(text.parse::<Date>().ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp());
    text.parse().ok().or_else(of_day)
}

/// A duration as CEL writes it.
pub(super) fn duration_text(value: SignedDuration) -> String {
    let nanos = value.as_nanos();
    let (sign, nanos) = if nanos < 0 { ("-", -nanos) } else { ("", nanos) };
    let (whole, rest) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    match rest {
        0 => format!("{sign}{whole}s"),
        rest => format!("{sign}{whole}.{}s", format!("{rest:09}").trim_end_matches('0')),
    }
}

impl<'a> Session<'a> {
    /// The value as JSON.
    pub(super) fn to_json(&self, value: &Val<'a>) -> Result<Value, EvalError> {
        self.spend(1)?;
        Ok(match value {
            Val::Null => Value::Null,
            Val::Bool(value) => (*value).into(),
            Val::Int(value) => (*value).into(),
            Val::Uint(value) => (*value).into(),
            Val::Double(value) => {
                serde_json::Number::from_f64(*value).map_or_else(|| value.to_string().into(), Value::Number)
            }
            Val::Str(text) => {
                self.spend_bytes(text.len())?;
                (**text).into()
            }
            Val::Bytes(bytes) => BASE64.encode(bytes).into(),
            Val::List(List::Json(list)) => {
                self.spend_bytes(list.len())?;
                list.to_vec().into()
            }
            Val::List(list) => list.iter().map(|v| self.to_json(&v)).collect::<Result<Vec<_>, _>>()?.into(),
            Val::Map(Map::Json(map)) => (*map).clone().into(),
            Val::Map(map) => {
                let mut out = JsonMap::new();
                for (key, value) in map.entries() {
                    let key = match &key {
                        Val::Str(key) => (**key).to_owned(),
                        Val::Int(key) => key.to_string(),
                        Val::Uint(key) => key.to_string(),
                        Val::Bool(key) => key.to_string(),
                        other => return Err(EvalError::new(format!("a {} cannot be a key", other.ty()))),
                    };
                    out.insert(key, self.to_json(&value)?);
                }
                out.into()
            }
            Val::Duration(value) => duration_text(*value).into(),
            Val::Time(value) => value.to_string().into(),
            Val::Type(name) => (*name).into(),
            Val::Optional(None) => Value::Null,
            Val::Optional(Some(value)) => self.to_json(value)?,
            Val::Quantity(value) => value.to_string().into(),
            Val::Version(value) => value.to_string().into(),
            Val::Url(url) => url.text.clone().into(),
            Val::Ip(ip) => ip.to_string().into(),
            Val::Cidr(cidr) => cidr.to_string().into(),
            Val::Format(_) | Val::Authorizer(_) | Val::Decision(..) => {
                return Err(EvalError::new(format!("a {} is no value of JSON", value.ty())));
            }
        })
    }

    /// Whether two values are equal.
    pub(super) fn equal(&self, a: &Val<'a>, b: &Val<'a>) -> Result<bool, EvalError> {
        self.spend(1)?;
        if let (Val::Str(a), Val::Str(b)) = (a, b) {
            self.spend_bytes(a.len().min(b.len()))?;
        }
        if let Some(equal) = scalar_eq(a, b) {
            return Ok(equal);
        }
        match (a, b) {
            (Val::Optional(Some(a)), Val::Optional(Some(b))) => self.equal(a, b),
            (Val::List(a), Val::List(b)) => {
                if a.len() != b.len() {
                    return Ok(false);
                }
                for (a, b) in a.iter().zip(b.iter()) {
                    if !self.equal(&a, &b)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            (Val::Map(a), Val::Map(b)) => {
                if a.len() != b.len() {
                    return Ok(false);
                }
                for (key, value) in a.entries() {
                    self.spend_bytes(b.len())?;
                    match b.get(&key) {
                        Some(other) if self.equal(&value, &other)? => {}
                        _ => return Ok(false),
                    }
                }
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}
