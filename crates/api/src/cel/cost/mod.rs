//! What an expression may cost at most, estimated when it is written: from the limits in the schema of the values that it
//! looks at, and from the largest request where there are none. Factors and sums are those of cel-go
//! (<https://github.com/google/cel-go/blob/master/checker/cost.go>) with Kubernetes' costs of its own functions, for what
//! may be written into a definition must not depend on who looks at it.

mod calls;
mod library;
mod loops;
mod range;
mod sizes;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use cel::common::ast::{EntryExpr, Expr, IdedExpr, LiteralValue, SelectExpr};

use super::{infer::Facts, types::Type};
use range::Range;
pub use sizes::Sizes;
use sizes::Step;

/// Reading a variable or a field.
const ACCESS: Range = Range::just(1);
/// Making a list, a map and an object.
const LIST: Range = Range::just(10);
const MAP: Range = Range::just(30);
const OBJECT: Range = Range::just(40);
/// For each character that is looked at.
const PER_CHARACTER: f64 = 0.1;
/// For each character of a pattern.
const PER_PATTERN: f64 = 0.25;

/// The most that evaluating an expression may cost, whose variables have these sizes, in units.
pub(super) fn most(root: &IdedExpr, facts: &Facts, sizes: &Sizes) -> u64 {
    let (places, known, entries) = (HashMap::new(), HashMap::new(), HashMap::new());
    Estimate { facts, sizes, places, known, entries, locals: Vec::new() }.cost(root).max
}

/// Where in the variables a value stands.
#[derive(Clone, Copy)]
enum Place<'s> {
    /// It is the result of something.
    Nowhere,
    /// Where the schema says nothing.
    Unknown,
    At(&'s Sizes),
}

/// The sizes of what a list or map contains. Those of a list have no keys to speak of.
#[derive(Clone, Copy)]
struct Entry {
    is_list: bool,
    key: Range,
    value: Range,
}

impl Entry {
    fn or(self, other: Entry) -> Entry {
        Entry { is_list: self.is_list, key: self.key.or(other.key), value: self.value.or(other.value) }
    }
}

/// What a name within the expression stands for.
struct Local<'e> {
    name: &'e str,
    place: Place<'e>,
    size: Option<Range>,
    entry: Option<Entry>,
}

struct Estimate<'e> {
    facts: &'e Facts,
    /// Those of every variable: `self` and `oldSelf` are of the same schema.
    sizes: &'e Sizes,
    /// What was found out of parts of the expression, by their ids.
    places: HashMap<u64, Place<'e>>,
    known: HashMap<u64, Range>,
    entries: HashMap<u64, Entry>,
    /// The innermost last.
    locals: Vec<Local<'e>>,
}

impl<'e> Estimate<'e> {
    fn cost(&mut self, expr: &'e IdedExpr) -> Range {
        match &expr.expr {
            Expr::Unspecified | Expr::Literal(_) => Range::ZERO,
            Expr::Ident(name) => {
                let place = self.local(name).map_or(Place::At(self.sizes), |local| local.place);
                self.places.insert(expr.id, place);
                ACCESS
            }
            Expr::Select(select) => self.select(expr.id, select),
            Expr::Call(call) => self.call(expr, call),
            Expr::List(list) => {
                let (mut sum, mut item) = (LIST, None);
                for element in &list.elements {
                    sum = sum + self.cost(element);
                    let size = self.size_or_any(element);
                    item = Some(item.map_or(size, |item: Range| item.or(size)));
                }
                let (key, value) = (Range::just(1), item.unwrap_or(Range::ZERO));
                self.entries.insert(expr.id, Entry { is_list: true, key, value });
                sum
            }
            Expr::Map(map) => {
                let (mut sum, mut found) = (MAP, None);
                for entry in &map.entries {
                    let EntryExpr::MapEntry(entry) = &entry.expr else { continue };
                    sum = sum + self.cost(&entry.key) + self.cost(&entry.value);
                    let (key, value) = (self.size_or_any(&entry.key), self.size_or_any(&entry.value));
                    let next = Entry { is_list: false, key, value };
                    found = Some(found.map_or(next, |found: Entry| found.or(next)));
                }
                let empty = Entry { is_list: false, key: Range::ZERO, value: Range::ZERO };
                self.entries.insert(expr.id, found.unwrap_or(empty));
                sum
            }
            Expr::Struct(value) => {
                let fields = value.entries.iter().filter_map(|entry| match &entry.expr {
                    EntryExpr::StructField(field) => Some(&field.value),
                    EntryExpr::MapEntry(_) => None,
                });
                fields.fold(OBJECT, |sum, field| sum + self.cost(field))
            }
            Expr::Comprehension(c) => self.comprehension(expr.id, c),
        }
    }

    fn select(&mut self, id: u64, select: &'e SelectExpr) -> Range {
        let operand = self.cost(&select.operand);
        // Asking whether a field is there costs nothing.
        if select.test {
            return operand;
        }
        let place = self.place(&select.operand);
        self.places.insert(id, self.below(place, Step::Field(&select.field)));
        match self.ty(&select.operand) {
            Type::Map(_) | Type::Object(_) => operand + ACCESS,
            _ => operand,
        }
    }

    fn ty(&self, expr: &IdedExpr) -> &'e Type {
        self.facts.types.get(&expr.id).unwrap_or(&Type::Dyn)
    }

    fn local(&self, name: &str) -> Option<&Local<'e>> {
        self.locals.iter().rev().find(|local| local.name == name)
    }

    fn place(&self, expr: &IdedExpr) -> Place<'e> {
        if let Expr::Ident(name) = &expr.expr
            && let Some(local) = self.local(name)
        {
            return local.place;
        }
        self.places.get(&expr.id).copied().unwrap_or(Place::Nowhere)
    }

    /// A step from a place. What is in the result of something counts as being where the variable is, as it does upstream
    /// for custom resources.
    fn below(&self, place: Place<'e>, step: Step<'_>) -> Place<'e> {
        match place {
            Place::Nowhere if self.sizes.stand_for_results() => Place::At(self.sizes),
            Place::Nowhere | Place::Unknown => Place::Unknown,
            Place::At(sizes) => sizes.step(step).map_or(Place::Unknown, Place::At),
        }
    }

    /// The size of a value, as far as anything is known of it.
    fn size(&mut self, expr: &IdedExpr) -> Option<Range> {
        if let Some(known) = self.known.get(&expr.id) {
            return Some(*known);
        }
        match &expr.expr {
            Expr::Literal(LiteralValue::String(text)) => {
                return Some(Range::just(text.inner().chars().count() as u64));
            }
            Expr::Literal(LiteralValue::Bytes(bytes)) => return Some(Range::just(bytes.inner().len() as u64)),
            Expr::Literal(_) => return Some(Range::just(1)),
            Expr::List(list) => return Some(Range::just(list.elements.len() as u64)),
            Expr::Map(map) => return Some(Range::just(map.entries.len() as u64)),
            _ => {}
        }
        if let Place::At(sizes) = self.place(expr) {
            let size = Range::up_to(sizes.most);
            self.known.insert(expr.id, size);
            return Some(size);
        }
        if has_one_size(self.ty(expr)) {
            return Some(Range::just(1));
        }
        match &expr.expr {
            Expr::Ident(name) => self.local(name)?.size,
            _ => None,
        }
    }

    fn size_or_any(&mut self, expr: &IdedExpr) -> Range {
        self.size(expr).unwrap_or(Range::ANY)
    }

    /// The sizes of what is in a list or map that the expression itself makes.
    fn entry(&self, expr: &IdedExpr) -> Option<Entry> {
        if let Some(known) = self.entries.get(&expr.id) {
            return Some(*known);
        }
        match &expr.expr {
            Expr::Ident(name) => self.local(name)?.entry,
            _ => None,
        }
    }
}

fn has_one_size(ty: &Type) -> bool {
    match ty {
        Type::Bool | Type::Int | Type::Uint | Type::Double | Type::Duration | Type::Timestamp => true,
        Type::Optional(of) => has_one_size(of),
        _ => false,
    }
}
