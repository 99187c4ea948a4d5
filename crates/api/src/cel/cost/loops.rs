//! What loops cost, and what else gives names to values.

use cel::common::ast::{CallExpr, ComprehensionExpr, Expr, IdedExpr};

use super::{ACCESS, Entry, Estimate, LIST, Local, MAP, Place, Range, Step};
use crate::cel::types::Type;

/// How a macro calls what it collects.
const RESULT: &str = "@result";

impl<'e> Estimate<'e> {
    pub(super) fn comprehension(&mut self, id: u64, c: &'e ComprehensionExpr) -> Range {
        let sum = self.cost(&c.iter_range) + self.cost(&c.accu_init);
        let init = self.size(&c.accu_init);
        let collected =
            Local { name: &c.accu_var, place: self.place(&c.accu_init), size: init, entry: self.entry(&c.accu_init) };
        self.locals.push(collected);
        let outer = self.locals.len();
        match &c.iter_var2 {
            Some(second) => self.iterate(&[&c.iter_var, second], &c.iter_range),
            None => self.iterate(&[&c.iter_var], &c.iter_range),
        }
        let each = self.cost(&c.loop_cond) + self.cost(&c.loop_step);
        self.locals.truncate(outer);
        let sum = sum + self.cost(&c.result);
        self.locals.truncate(outer - 1);
        let count = self.size_or_any(&c.iter_range);
        match &c.accu_init.expr {
            Expr::Literal(_) => self.set_size(id, init),
            Expr::List(_) | Expr::Map(_) => {
                let entry = self.entry(&c.loop_step);
                self.set_size(id, Some(count));
                self.set_entry(id, entry);
            }
            _ => {}
        }
        sum + count * each
    }

    /// The names that go through a list or map: its items or keys for one, places or keys and values for two.
    fn iterate(&mut self, names: &[&'e str], range: &'e IdedExpr) {
        let (entry, place) = (self.entry(range), self.place(range));
        let is_list = match entry {
            Some(entry) => entry.is_list,
            None => matches!(self.ty(range), Type::List(_)),
        };
        let first = match (is_list, names.len()) {
            (true, 1) => (Step::Item, entry.map(|entry| entry.value)),
            (true, _) => (Step::Index, entry.map(|entry| entry.key)),
            (false, _) => (Step::Key, entry.map(|entry| entry.key)),
        };
        let second = (if is_list { Step::Item } else { Step::Value }, entry.map(|entry| entry.value));
        for (name, (step, size)) in names.iter().zip([first, second]) {
            let place = self.below(place, step);
            self.locals.push(Local { name, place, size, entry: None });
        }
    }

    pub(super) fn set_size(&mut self, id: u64, size: Option<Range>) {
        if let Some(size) = size {
            self.known.insert(id, size);
        }
    }

    pub(super) fn set_entry(&mut self, id: u64, entry: Option<Entry>) {
        if let Some(entry) = entry {
            self.entries.insert(id, entry);
        }
    }

    pub(super) fn copy_sizes(&mut self, to: u64, from: &'e IdedExpr) {
        let (size, entry) = (self.size(from), self.entry(from));
        self.set_size(to, size);
        self.set_entry(to, entry);
    }

    /// Calls that name values. They cost what the loops cost that they stand for
    /// (<https://github.com/google/cel-go/tree/master/ext>).
    pub(super) fn binding(&mut self, id: u64, call: &'e CallExpr, bound: &[&'e str]) -> Range {
        let (Some(target), Some(last)) = (call.target.as_deref(), call.args.last()) else { return Range::ZERO };
        match &*call.func_name {
            "bind" => {
                let value = &call.args[1];
                let init = LIST + self.cost(value);
                let (place, size, entry) = (self.place(value), self.size(value), self.entry(value));
                self.locals.push(Local { name: bound[0], place, size, entry });
                let sum = init + self.cost(last);
                self.copy_sizes(id, last);
                self.locals.pop();
                sum
            }
            name @ ("optMap" | "optFlatMap") => {
                // Whether there is a value; the value, in a loop over nothing; what is made of it.
                let asked = self.cost(target) + ACCESS;
                self.locals.push(Local { name: bound[0], place: Place::Nowhere, size: None, entry: None });
                let there = LIST + asked + self.cost(last);
                self.locals.pop();
                let made = if name == "optMap" { there + ACCESS } else { there };
                asked + made.or(ACCESS)
            }
            name => self.two_names(id, name, target, &call.args, bound),
        }
    }

    fn two_names(
        &mut self,
        id: u64,
        name: &str,
        target: &'e IdedExpr,
        args: &'e [IdedExpr],
        bound: &[&'e str],
    ) -> Range {
        let range = self.cost(target);
        let (init, empty) = match name {
            "transformList" => (LIST, true),
            "transformMap" => (MAP, true),
            _ => (Range::ZERO, false),
        };
        let nothing = Entry { is_list: true, key: Range::just(1), value: Range::ZERO };
        let size = Range::just(if empty { 0 } else { 1 });
        let entry = (name == "transformList").then_some(nothing);
        self.locals.push(Local { name: RESULT, place: Place::Nowhere, size: Some(size), entry });
        let outer = self.locals.len();
        self.iterate(bound, target);
        let inner: Vec<Range> = args.iter().skip(2).map(|arg| self.cost(arg)).collect();
        let item = args.last().map_or(Range::ANY, |last| self.size_or_any(last));
        self.locals.truncate(outer - 1);
        let last = inner.last().copied().unwrap_or(Range::ZERO);
        let filtered = |step: Range| match &inner[..] {
            [filter, _] => *filter + step.or(ACCESS),
            _ => step,
        };
        let (each, result) = match name {
            // The condition, and the result so far with what is asked of each.
            "all" => (Range::just(2) + Range { min: 1, max: last.max.saturating_add(1) }, ACCESS),
            "exists" => (Range::just(3) + Range { min: 1, max: last.max.saturating_add(1) }, ACCESS),
            "transformList" => (filtered(Range::just(2) + LIST + last), ACCESS),
            "transformMap" => (filtered(Range::just(3) + last), ACCESS),
            // What counts them, and whether there was one.
            _ => (last + Range { min: 1, max: 2 }, Range::just(2)),
        };
        let count = self.size_or_any(target);
        self.set_size(id, Some(if empty { count } else { size }));
        if name == "transformList" {
            self.set_entry(id, Some(nothing.or(Entry { value: item, ..nothing })));
        }
        range + init + result + count * each
    }
}
