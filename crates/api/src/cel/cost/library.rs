//! What the functions cost that Kubernetes adds to the language, and those of lists and sets
//! (<https://github.com/kubernetes/apiserver/blob/master/pkg/cel/library/cost.go>,
//! <https://github.com/google/cel-go/tree/master/ext>).

use cel::common::ast::{Expr, IdedExpr, LiteralValue, operators};

use super::{Estimate, LIST, PER_CHARACTER, PER_PATTERN, Place, Range, Step, calls::Arg, calls::Cost};
use crate::cel::{signatures::Signature, types::Type};

/// Asking the authorizer: an expression can do so twice.
const CHECK: u64 = 350_000;
/// How many values an attribute of a device has at most, all of which may be looked at.
const ATTRIBUTE_VALUES: u64 = 48;
/// The longest pattern of a format, in characters.
const FORMAT_PATTERN: f64 = 128.0;
/// The longest name of a format, in characters.
const FORMAT: u64 = 64;
/// Of an address, in bytes.
const ADDRESS: Range = Range { min: 4, max: 16 };

impl<'e> Estimate<'e> {
    /// Without its arguments; `None` if it is no function of these.
    pub(super) fn library(
        &mut self,
        name: &str,
        form: Option<&Signature>,
        target: Option<&Arg<'e>>,
        args: &[Arg<'e>],
    ) -> Option<Cost> {
        let takes = form.map_or(&[][..], |form| &form.args[..]);
        let one = || Cost::of(Range::just(1));
        let read = |text: &Arg<'_>, factor: f64| Cost::of(text.size().times(factor * PER_CHARACTER));
        Some(match (name, target, args) {
            ("check", ..) => Cost::of(Range::just(CHECK)),
            ("serviceAccount" | "path" | "group" | "resource" | "subresource" | "namespace" | "name", ..)
            | ("allowed" | "reason" | "error" | "errored", ..) => one(),
            ("includes", Some(_), [_]) => Cost::of(Range::just(ATTRIBUTE_VALUES)),
            ("fieldSelector" | "labelSelector", _, [text]) => {
                let requirements = text.size().times(0.5).times(50.0);
                Cost::of(LIST + text.size().times(PER_CHARACTER) + requirements)
            }
            ("isSorted" | "sum" | "max" | "min" | "indexOf" | "lastIndexOf", Some(target), _) => {
                Cost::of(match self.element(target.expr) {
                    Some((Type::String | Type::Bytes, size)) => {
                        target.size() * (Range::just(1) + size.times(PER_CHARACTER))
                    }
                    Some(_) => target.size(),
                    None => target.size().times(PER_CHARACTER),
                })
            }
            ("url" | "jsonpatch.escapeKey", _, [text]) => Cost::sized(text.size().times(PER_CHARACTER), text.size()),
            ("lowerAscii" | "upperAscii" | "substring" | "trim", Some(text), _) => {
                Cost::sized(text.size().times(PER_CHARACTER), text.size())
            }
            ("replace", Some(text), [from, to, ..]) => {
                let size = replaced(text.size(), from.size(), to.size());
                Cost::sized(text.size().times(2.0 * PER_CHARACTER), size)
            }
            ("split", Some(text), _) => {
                let limit = args.get(1).and_then(|limit| literal(limit.expr)).map(|limit| limit as u64);
                let parts = Range::up_to(limit.unwrap_or(text.size().max));
                Cost::sized(text.size().times(2.0 * PER_CHARACTER), parts)
            }
            ("join", Some(list), _) => {
                let count = list.size();
                let texts = self.element(list.expr).map_or(Range::ZERO, |(_, size)| count * size);
                let between = Range { min: count.min.saturating_sub(1), max: count.max.saturating_sub(1) };
                let separators = args.first().map_or(Range::ZERO, |text| text.size() * between);
                let size = texts + separators;
                Cost::sized(size.times(PER_CHARACTER), size)
            }
            ("find" | "findAll", Some(text), [pattern, ..]) => {
                let read = (text.size() + Range::just(1)).times(PER_CHARACTER);
                Cost::sized(read * pattern.size().times(PER_PATTERN), Range::up_to(text.size().max))
            }
            ("ip", Some(_), _) => one(),
            ("cidr" | "isIP" | "isCIDR" | "ip" | "quantity" | "isQuantity" | "semver" | "isSemver", _, [text, ..]) => {
                read(text, 1.0)
            }
            ("ip.isCanonical", _, [text]) => read(text, 2.0),
            ("containsIP" | "containsCIDR", _, [other]) => {
                let mut cost = (ADDRESS + ADDRESS).times(PER_CHARACTER);
                if name == "containsCIDR" {
                    cost = cost + ADDRESS.times(PER_CHARACTER) + Range::just(1);
                }
                if let [_, Type::String] = takes {
                    cost = cost + other.size().times(PER_CHARACTER);
                }
                Cost::of(cost)
            }
            ("validate", _, [text]) => Cost::of(text.size().times(PER_CHARACTER).times(FORMAT_PATTERN * PER_PATTERN)),
            ("masked" | "prefixLength" | "family" | "isUnspecified" | "isLoopback" | "isLinkLocalMulticast", ..)
            | ("isLinkLocalUnicast" | "isGlobalUnicast" | "format.named", ..)
            | ("sign" | "asInteger" | "isInteger" | "asApproximateFloat" | "isGreaterThan" | "isLessThan", ..)
            | ("compareTo" | "add" | "sub" | "major" | "minor" | "patch", ..)
            | ("getScheme" | "getHostname" | "getHost" | "getPort" | "getEscapedPath" | "getQuery", ..) => one(),
            (operators::EQUALS, _, [a, b]) => match (self.ty(a.expr), self.ty(b.expr)) {
                (Type::Named(a), Type::Named(b)) if a != b => return None,
                (Type::Named("URL"), Type::Named(_)) => {
                    let max = b.size.map_or(1, |size| size.max);
                    Cost::of(Range { min: 1, max }.times(PER_CHARACTER))
                }
                (Type::Named("Format"), Type::Named(_)) => Cost::of(Range { min: 1, max: FORMAT }.times(PER_CHARACTER)),
                (Type::Named(_), Type::Named(_)) => one(),
                _ => return None,
            },
            ("sets.contains" | "sets.intersects", _, [a, b]) => Cost::of(a.size() * b.size() + Range::just(1)),
            ("sets.equivalent", _, [a, b]) => Cost::of((a.size() * b.size()).times(2.0) + Range::just(1)),
            ("slice", Some(list), [from, to]) => {
                let at = |place: &Arg<'_>, or: u64| literal(place.expr).map_or(or, |at| at.max(0) as u64);
                made(1.0, Range::just(at(to, list.size().max).wrapping_sub(at(from, 0))))
            }
            ("reverse", Some(list), []) if matches!(takes, [Type::List(_)]) => made(1.0, list.size()),
            ("flatten", Some(list), []) => made(1.0, list.size()),
            ("flatten", Some(list), [depth]) => {
                made(literal(depth.expr).map_or(u64::MAX, |depth| depth.max(0) as u64) as f64, list.size())
            }
            ("distinct", Some(list), []) => made(2.0, list.size() * list.size()),
            ("sort", Some(list), []) => {
                let texts = matches!(self.element(list.expr), Some((Type::String | Type::Bytes, _)));
                made(if texts { 2.0 + PER_CHARACTER } else { 2.0 }, list.size() * list.size())
            }
            _ => return None,
        })
    }

    /// The type and the size of what is in a list; `None` if it is none, as far as is known.
    fn element(&self, list: &'e IdedExpr) -> Option<(&'e Type, Range)> {
        let of = match self.ty(list) {
            Type::List(of) | Type::Optional(of) => of,
            Type::Map(of) => &of.0,
            _ => return None,
        };
        let size = match self.place(list) {
            Place::At(sizes) => sizes.step(Step::Item).map_or(Range::ANY, |item| Range::up_to(item.most)),
            Place::Nowhere | Place::Unknown => Range::ANY,
        };
        Some((of, size))
    }
}

/// A call that makes a list of this size.
fn made(factor: f64, size: Range) -> Cost {
    Cost::sized(size.times(factor) + Range::just(1) + LIST, size)
}

fn literal(expr: &IdedExpr) -> Option<i64> {
    match &expr.expr {
        Expr::Literal(LiteralValue::Int(value)) => Some(*value.inner()),
        _ => None,
    }
}

/// How long a text becomes in which something is replaced.
fn replaced(text: Range, from: Range, to: Range) -> Range {
    // How often, and what stays.
    let (max, kept) = match (from.min, to.max <= from.min) {
        // Nothing is replaced by something around every character.
        (0, _) => (text.max.saturating_add(1), text.max),
        (_, true) => (0, text.max),
        (shortest, _) => ((text.max as f64 / shortest as f64).ceil() as u64, 0),
    };
    let (min, kept_min) = match (from.max, from.max <= to.min) {
        (0, _) => (text.min.saturating_add(1), text.min),
        (_, true) => (0, text.min),
        (longest, _) => ((text.min as f64 / longest as f64).ceil() as u64, 0),
    };
    Range { min, max } * to + Range { min: kept_min, max: kept }
}
