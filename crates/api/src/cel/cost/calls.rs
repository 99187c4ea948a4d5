//! What calls cost: operators, and the functions of the language itself.

use cel::common::ast::{CallExpr, IdedExpr, operators};

use super::{Estimate, PER_CHARACTER, PER_PATTERN, Range, Step};
use crate::cel::{functions, signatures::Signature, types::Type};

/// An argument, or what a function is called on.
pub(super) struct Arg<'e> {
    pub expr: &'e IdedExpr,
    pub cost: Range,
    pub size: Option<Range>,
}

impl Arg<'_> {
    pub(super) fn size(&self) -> Range {
        self.size.unwrap_or(Range::ANY)
    }
}

/// What one form of a function costs without its arguments, and how large its result is.
pub(super) struct Cost {
    pub cost: Range,
    pub size: Option<Range>,
}

impl Cost {
    pub(super) fn of(cost: Range) -> Cost {
        Cost { cost, size: None }
    }

    pub(super) fn sized(cost: Range, size: Range) -> Cost {
        Cost { cost, size: Some(size) }
    }
}

impl<'e> Estimate<'e> {
    pub(super) fn call(&mut self, expr: &'e IdedExpr, call: &'e CallExpr) -> Range {
        let Some(called) = self.facts.calls.get(&expr.id) else { return Range::ZERO };
        let bound = functions::binds(called.space.as_deref(), &call.func_name, call);
        if !bound.is_empty() {
            return self.binding(expr.id, call, &bound);
        }
        if let ("dyn", [arg]) = (&*called.name, &call.args[..]) {
            let cost = self.cost(arg) + Range::just(1);
            self.copy_sizes(expr.id, arg);
            return cost;
        }
        let args: Vec<Arg<'e>> = call.args.iter().map(|arg| self.arg(arg)).collect();
        let target = call.target.as_deref().filter(|_| called.space.is_none()).map(|target| self.arg(target));
        let forms: Vec<Option<&Signature>> = match &called.forms[..] {
            [] => vec![None],
            forms => forms.iter().map(|form| Some(*form)).collect(),
        };
        let (mut cost, mut size) = (None, None);
        for form in forms {
            let found = self.form(expr, &called.name, form, target.as_ref(), &args);
            cost = Some(cost.map_or(found.cost, |cost: Range| cost.or(found.cost)));
            size = match (size, found.size) {
                (Some(before), Some(next)) => Some(Range::or(before, next)),
                (before, next) => before.or(next),
            };
            let step = match form.and_then(|form| form.args.first()) {
                Some(Type::List(_)) if called.name == operators::INDEX => Some(Step::Item),
                Some(Type::Map(_)) if called.name == operators::INDEX => Some(Step::Value),
                _ => None,
            };
            if let (Some(step), [container, ..]) = (step, &args[..]) {
                size = self.entry(container.expr).map(|entry| entry.value);
                let place = self.below(self.place(container.expr), step);
                self.places.insert(expr.id, place);
            }
            size = size.or_else(|| self.size(expr));
        }
        self.set_size(expr.id, size);
        target.map_or(Range::ZERO, |target| target.cost) + cost.unwrap_or(Range::ZERO)
    }

    fn arg(&mut self, expr: &'e IdedExpr) -> Arg<'e> {
        let cost = self.cost(expr);
        Arg { expr, cost, size: self.size(expr) }
    }

    /// What a form of a function costs with its arguments.
    fn form(
        &mut self,
        expr: &'e IdedExpr,
        name: &str,
        form: Option<&Signature>,
        target: Option<&Arg<'e>>,
        args: &[Arg<'e>],
    ) -> Cost {
        match (name, args) {
            // The second one may not be looked at.
            (operators::LOGICAL_AND | operators::LOGICAL_OR, [a, b]) => {
                return Cost::of(Range { min: a.cost.min, max: (a.cost + b.cost).max });
            }
            (operators::CONDITIONAL, [condition, a, b]) => {
                let entry = self.entry(a.expr).zip(self.entry(b.expr)).map(|(a, b)| a.or(b));
                self.set_entry(expr.id, entry);
                return Cost::sized(condition.cost + a.cost.or(b.cost), a.size().or(b.size()));
            }
            _ => {}
        }
        let own = match self.library(name, form, target, args) {
            Some(own) => own,
            None => self.language(expr, name, form, target, args),
        };
        Cost { cost: own.cost + args.iter().map(|arg| arg.cost).sum(), size: own.size }
    }

    fn language(
        &mut self,
        expr: &'e IdedExpr,
        name: &str,
        form: Option<&Signature>,
        target: Option<&Arg<'e>>,
        args: &[Arg<'e>],
    ) -> Cost {
        let takes = form.map_or(&[][..], |form| &form.args[..]);
        match (name, target, args, takes) {
            ("format", Some(text), ..) => Cost::of(text.size().times(PER_CHARACTER)),
            ("bytes", None, [text], [Type::String]) => {
                let size = text.size();
                // A character is four bytes at most.
                let bytes = Range { min: size.min, max: size.max.saturating_mul(4) };
                Cost::sized(size.times(PER_CHARACTER), bytes)
            }
            ("string", None, [bytes], [Type::Bytes]) => {
                let size = bytes.size();
                Cost::sized(size.times(PER_CHARACTER), Range { min: size.min / 4, max: size.max })
            }
            ("strings.quote", None, [text], _) => {
                let size = text.size();
                let quoted = size + Range::up_to(size.max) + Range::just(2);
                Cost::sized(size.times(PER_CHARACTER), quoted)
            }
            ("startsWith" | "endsWith", Some(_), [with], _) => Cost::of(with.size().times(PER_CHARACTER)),
            (operators::IN, None, [_, list], [_, Type::List(_)]) => Cost::of(list.size()),
            // An empty text has to be looked at as well.
            ("matches", Some(text), [pattern], _) => {
                let text = (text.size() + Range::just(1)).times(PER_CHARACTER);
                Cost::of(text * pattern.size().times(PER_PATTERN))
            }
            ("contains", Some(text), [part], _) => {
                Cost::of(text.size().times(PER_CHARACTER) * part.size().times(PER_CHARACTER))
            }
            (operators::ADD, None, [a, b], [of @ (Type::String | Type::Bytes | Type::List(_)), _]) => {
                let entry = self.entry(a.expr).zip(self.entry(b.expr)).map(|(a, b)| a.or(b));
                self.set_entry(expr.id, entry);
                let size = a.size() + b.size();
                match of {
                    Type::List(_) => Cost::sized(Range::just(1), size),
                    _ => Cost::sized(size.times(PER_CHARACTER), size),
                }
            }
            (operators::EQUALS | operators::NOT_EQUALS, None, [a, b], _)
            | (
                operators::LESS | operators::LESS_EQUALS | operators::GREATER | operators::GREATER_EQUALS,
                None,
                [a, b],
                [Type::String | Type::Bytes, _],
            ) => {
                let max = a.size().max.min(b.size().max);
                Cost::of(Range { min: max.min(1), max }.times(PER_CHARACTER))
            }
            _ => Cost::of(Range::just(1)),
        }
    }
}
