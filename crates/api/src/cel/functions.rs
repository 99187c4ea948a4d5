//! Which functions there are, and the operators and conversions among them.

use std::{cmp::Ordering, rc::Rc};

use cel::common::ast::{CallExpr, Expr, operators};
use jiff::{SignedDuration, Timestamp};

use super::{
    EvalError, Program, Session,
    eval::{Eval, index, no_overload},
    value::{Val, compare, duration_text},
};

/// Words in front of a function's name.
pub(super) const SPACES: [&str; 9] =
    ["optional", "cel", "sets", "math", "base64", "ip", "jsonpatch", "strings", "format"];

/// The names that a call gives to values, if its first arguments are names.
pub(super) fn binds<'e>(space: Option<&str>, name: &str, call: &'e CallExpr) -> Vec<&'e str> {
    let count = match (space, name, call.args.len()) {
        (Some("cel"), "bind", 3) | (None, "optMap" | "optFlatMap", 2) => 1,
        (None, "all" | "exists" | "existsOne" | "exists_one", 3) | (None, "transformList" | "transformMap", 3 | 4) => 2,
        _ => 0,
    };
    let names = call.args.iter().take(count).map(|arg| match &arg.expr {
        Expr::Ident(name) => name.as_str(),
        _ => "",
    });
    names.collect()
}

impl<'a> Session<'a> {
    /// Calls a function with its arguments; the first one is what it was called on, if it was.
    pub(super) fn function(&self, program: &'a Program, name: &str, member: bool, args: Vec<Val<'a>>) -> Eval<'a> {
        if let Some(value) = self.operator(name, &args) {
            return value;
        }
        match (name, &args[..]) {
            ("size", [Val::Str(text)]) => {
                self.spend_bytes(text.len())?;
                Ok(Val::Int(text.chars().count() as i64))
            }
            ("size", [Val::Bytes(bytes)]) => Ok(Val::Int(bytes.len() as i64)),
            ("size", [Val::List(list)]) => Ok(Val::Int(list.len() as i64)),
            ("size", [Val::Map(map)]) => Ok(Val::Int(map.len() as i64)),
            ("hasValue", [Val::Optional(value)]) => Ok(Val::Bool(value.is_some())),
            ("value", [Val::Optional(value)]) => {
                value.as_deref().cloned().ok_or_else(|| EvalError::new("optional.none() dereference"))
            }
            ("or", [Val::Optional(value), other @ Val::Optional(_)]) => {
                Ok(if value.is_some() { args[0].clone() } else { other.clone() })
            }
            ("orValue", [Val::Optional(value), other]) => Ok(value.as_deref().unwrap_or(other).clone()),
            ("dyn", [value]) => Ok(value.clone()),
            ("type", [value]) => Ok(Val::Type(value.ty())),
            ("int" | "uint" | "double" | "string" | "bool" | "bytes" | "duration" | "timestamp", [value]) => {
                self.convert(name, value)
            }
            (_, [Val::Str(text), rest @ ..]) => match self.string_function(program, name, text, rest)? {
                Some(value) => Ok(value),
                None => self.library(name, member, &args),
            },
            (_, [Val::List(list), rest @ ..]) => match self.list_function(name, list, rest)? {
                Some(value) => Ok(value),
                None => self.library(name, member, &args),
            },
            _ => self.library(name, member, &args),
        }
    }

    fn operator(&self, name: &str, args: &[Val<'a>]) -> Option<Eval<'a>> {
        Some(match (name, args) {
            (operators::EQUALS, [a, b]) => self.equal(a, b).map(Val::Bool),
            (operators::NOT_EQUALS, [a, b]) => self.equal(a, b).map(|equal| Val::Bool(!equal)),
            (operators::LOGICAL_NOT, [Val::Bool(value)]) => Ok(Val::Bool(!value)),
            (operators::INDEX, [container, key]) => index(container, key),
            (operators::OPT_INDEX | operators::OPT_SELECT, [container, key]) => {
                self.optional_index(name, container, key)
            }
            (operators::IN, [value, container]) => self.contained(value, container),
            (operators::NEGATE, [Val::Int(value)]) => value.checked_neg().map(Val::Int).ok_or_else(overflow),
            (operators::NEGATE, [Val::Double(value)]) => Ok(Val::Double(-value)),
            (operators::NEGATE, [Val::Duration(value)]) => value.checked_neg().map(Val::Duration).ok_or_else(overflow),
            (operators::LESS | operators::LESS_EQUALS | operators::GREATER | operators::GREATER_EQUALS, [a, b]) => {
                let holds = |order: Ordering| match name {
                    operators::LESS => order.is_lt(),
                    operators::LESS_EQUALS => order.is_le(),
                    operators::GREATER => order.is_gt(),
                    _ => order.is_ge(),
                };
                match (compare(a, b), a, b) {
                    // Quantities are compared by functions of their own.
                    (_, Val::Quantity(_), _) => Err(no_overload(name)),
                    (Some(order), _, _) => Ok(Val::Bool(holds(order))),
                    (None, Val::Double(_), _) | (None, _, Val::Double(_)) => Ok(Val::Bool(false)),
                    _ => Err(no_overload(name)),
                }
            }
            (
                operators::ADD | operators::SUBSTRACT | operators::MULTIPLY | operators::DIVIDE | operators::MODULO,
                [a, b],
            ) => self.arithmetic(name, a, b),
            (operator, _) if operator.starts_with(['_', '!', '-', '@']) => Err(no_overload(operator)),
            _ => return None,
        })
    }

    fn optional_index(&self, name: &str, container: &Val<'a>, key: &Val<'a>) -> Eval<'a> {
        let found = match container {
            Val::Optional(None) => return Ok(Val::Optional(None)),
            Val::Optional(Some(inner)) => return self.optional_index(name, inner, key),
            Val::Map(map) => match (name, key) {
                (operators::OPT_SELECT, Val::Str(field)) => map.field(field),
                _ => map.get(key),
            },
            Val::List(_) => index(container, key).ok(),
            _ => return Err(no_overload(name)),
        };
        Ok(Val::Optional(found.map(Rc::new)))
    }

    pub(super) fn contained(&self, value: &Val<'a>, container: &Val<'a>) -> Eval<'a> {
        match container {
            Val::List(list) => {
                for item in list.iter() {
                    if self.equal(value, &item)? {
                        return Ok(Val::Bool(true));
                    }
                }
                Ok(Val::Bool(false))
            }
            Val::Map(map) => Ok(Val::Bool(map.get(value).is_some())),
            _ => Err(no_overload("@in")),
        }
    }

    fn arithmetic(&self, name: &str, a: &Val<'a>, b: &Val<'a>) -> Eval<'a> {
        let zero = || EvalError::new(if name == operators::DIVIDE { "division by zero" } else { "modulus by zero" });
        match (name, a, b) {
            (operators::DIVIDE | operators::MODULO, Val::Int(_), Val::Int(0))
            | (operators::DIVIDE | operators::MODULO, Val::Uint(_), Val::Uint(0)) => Err(zero()),
            (_, Val::Int(a), Val::Int(b)) => match name {
                operators::ADD => a.checked_add(*b),
                operators::SUBSTRACT => a.checked_sub(*b),
                operators::MULTIPLY => a.checked_mul(*b),
                operators::DIVIDE => a.checked_div(*b),
                _ => a.checked_rem(*b),
            }
            .map(Val::Int)
            .ok_or_else(overflow),
            (_, Val::Uint(a), Val::Uint(b)) => match name {
                operators::ADD => a.checked_add(*b),
                operators::SUBSTRACT => a.checked_sub(*b),
                operators::MULTIPLY => a.checked_mul(*b),
                operators::DIVIDE => a.checked_div(*b),
                _ => a.checked_rem(*b),
            }
            .map(Val::Uint)
            .ok_or_else(overflow),
            (operators::ADD, Val::Double(a), Val::Double(b)) => Ok(Val::Double(a + b)),
            (operators::SUBSTRACT, Val::Double(a), Val::Double(b)) => Ok(Val::Double(a - b)),
            (operators::MULTIPLY, Val::Double(a), Val::Double(b)) => Ok(Val::Double(a * b)),
            (operators::DIVIDE, Val::Double(a), Val::Double(b)) => Ok(Val::Double(a / b)),
            (operators::ADD, Val::Str(a), Val::Str(b)) => {
                self.spend_bytes(a.len() + b.len())?;
                Ok(Val::text(format!("{}{}", &**a, &**b)))
            }
            (operators::ADD, Val::Bytes(a), Val::Bytes(b)) => {
                self.spend_bytes(a.len() + b.len())?;
                Ok(Val::Bytes([&**a, &**b].concat().into()))
            }
            (operators::ADD, Val::List(a), Val::List(b)) => {
                self.spend((a.len() + b.len()) as u64)?;
                Ok(Val::list(a.iter().chain(b.iter()).collect()))
            }
            (operators::ADD, Val::Duration(a), Val::Duration(b)) => {
                a.checked_add(*b).map(Val::Duration).ok_or_else(overflow)
            }
            (operators::SUBSTRACT, Val::Duration(a), Val::Duration(b)) => {
                a.checked_sub(*b).map(Val::Duration).ok_or_else(overflow)
            }
            (operators::ADD, Val::Time(time), Val::Duration(span))
            | (operators::ADD, Val::Duration(span), Val::Time(time)) => {
                time.checked_add(*span).map(Val::Time).map_err(|_| overflow())
            }
            (operators::SUBSTRACT, Val::Time(time), Val::Duration(span)) => {
                time.checked_sub(*span).map(Val::Time).map_err(|_| overflow())
            }
            (operators::SUBSTRACT, Val::Time(a), Val::Time(b)) => Ok(Val::Duration(a.duration_since(*b))),
            _ => Err(no_overload(name)),
        }
    }

    fn convert(&self, to: &str, value: &Val<'a>) -> Eval<'a> {
        let range = || EvalError::new(format!("{to} overflow"));
        let wrong = |text: &str| EvalError::new(format!("type conversion error from 'string' to '{to}': {text:?}"));
        if let Val::Str(text) = value {
            self.spend_bytes(text.len())?;
        }
        Ok(match (to, value) {
            ("int", Val::Int(_))
            | ("uint", Val::Uint(_))
            | ("double", Val::Double(_))
            | ("string", Val::Str(_))
            | ("bool", Val::Bool(_))
            | ("bytes", Val::Bytes(_))
            | ("duration", Val::Duration(_))
            | ("timestamp", Val::Time(_)) => value.clone(),
            ("int", Val::Uint(value)) => Val::Int(i64::try_from(*value).map_err(|_| range())?),
            ("int", Val::Double(value)) if value.abs() < 9.2e18 => Val::Int(*value as i64),
            ("int", Val::Double(_)) => return Err(range()),
            ("int", Val::Str(text)) => Val::Int(text.parse().map_err(|_| wrong(text))?),
            ("int", Val::Time(time)) => Val::Int(time.as_second()),
            ("uint", Val::Int(value)) => Val::Uint(u64::try_from(*value).map_err(|_| range())?),
            ("uint", Val::Double(value)) if *value >= 0.0 && *value < 1.8e19 => Val::Uint(*value as u64),
            ("uint", Val::Double(_)) => return Err(range()),
            ("uint", Val::Str(text)) => Val::Uint(text.parse().map_err(|_| wrong(text))?),
            ("double", Val::Int(value)) => Val::Double(*value as f64),
            ("double", Val::Uint(value)) => Val::Double(*value as f64),
            ("double", Val::Str(text)) => Val::Double(text.parse().map_err(|_| wrong(text))?),
            ("bool", Val::Str(text)) => match &**text {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => Val::Bool(true),
                "0" | "f" | "F" | "false" | "FALSE" | "False" => Val::Bool(false),
                _ => return Err(wrong(text)),
            },
            ("bytes", Val::Str(text)) => Val::Bytes(text.as_bytes().into()),
            ("string", Val::Bool(value)) => Val::text(value.to_string()),
            ("string", Val::Int(value)) => Val::text(value.to_string()),
            ("string", Val::Uint(value)) => Val::text(value.to_string()),
            ("string", Val::Double(value)) => Val::text(value.to_string()),
            ("string", Val::Bytes(bytes)) => {
                Val::text(std::str::from_utf8(bytes).map_err(|_| EvalError::new("invalid UTF-8 in bytes"))?)
            }
            ("string", Val::Duration(value)) => Val::text(duration_text(*value)),
            ("string", Val::Time(value)) => Val::text(value.to_string()),
            ("string", Val::Ip(value)) => Val::text(value.to_string()),
            ("string", Val::Cidr(value)) => Val::text(value.to_string()),
            ("string", Val::Url(value)) => Val::text(value.text.clone()),
            ("string", Val::Quantity(value)) => Val::text(value.to_string()),
            ("timestamp", Val::Int(value)) => Val::Time(Timestamp::from_second(*value).map_err(|_| range())?),
            ("timestamp", Val::Str(text)) => Val::Time(text.parse().map_err(|_| wrong(text))?),
            ("duration", Val::Int(value)) => Val::Duration(SignedDuration::from_secs(*value)),
            ("duration", Val::Str(text)) => Val::Duration(duration(text).ok_or_else(|| wrong(text))?),
            _ => return Err(no_overload(to)),
        })
    }
}

fn overflow() -> EvalError {
    EvalError::new("integer overflow")
}

/// A duration such as `1h30m`, as Go writes it.
pub(super) fn duration(text: &str) -> Option<SignedDuration> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(SignedDuration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut nanos: f64 = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let (unit, scale) =
            [("ns", 1.0), ("us", 1e3), ("µs", 1e3), ("ms", 1e6), ("s", 1e9), ("m", 6e10), ("h", 3.6e12)]
                .into_iter()
                .find(|(unit, _)| rest.starts_with(unit))?;
        rest = &rest[unit.len()..];
        nanos += number * scale;
    }
    if !nanos.is_finite() || nanos >= 9.2e18 {
        return None;
    }
    Some(SignedDuration::from_nanos(if negative { -(nanos as i64) } else { nanos as i64 }))
}
