//! Works out what an expression says, and counts what that costs.

use std::rc::Rc;

use cel::common::ast::{
    CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedEntryExpr, IdedExpr, LiteralValue, SelectExpr, operators,
};

use super::{
    EvalError, PER_EXPRESSION, Program, Question, Session, check, functions,
    value::{List, Map, Text, Val, compare},
};

/// How deep evaluation may go, over all named expressions that use each other.
const DEPTH: u64 = 200;

pub(super) type Eval<'a> = Result<Val<'a>, EvalError>;

/// Names that an expression itself has introduced.
pub(super) struct Scope<'s, 'a> {
    name: &'s str,
    value: Val<'a>,
    outer: Option<&'s Scope<'s, 'a>>,
}

type Outer<'s, 'a> = Option<&'s Scope<'s, 'a>>;

fn local<'a>(mut scope: Outer<'_, 'a>, name: &str) -> Option<Val<'a>> {
    while let Some(here) = scope {
        if here.name == name {
            return Some(here.value.clone());
        }
        scope = here.outer;
    }
    None
}

pub(super) fn no_overload(name: &str) -> EvalError {
    EvalError::new(format!("no such overload: {name}"))
}

impl<'a> Session<'a> {
    /// Pays for something.
    pub(super) fn spend(&self, units: u64) -> Result<(), EvalError> {
        let (spent, total) = (self.spent.get().saturating_add(units), self.total.get().saturating_add(units));
        self.spent.set(spent);
        self.total.set(total);
        match spent > PER_EXPRESSION || total > self.budget {
            true => Err(EvalError {
                message: "operation cancelled: actual cost limit exceeded".to_owned(),
                exhausted: true,
            }),
            false => Ok(()),
        }
    }

    /// Pays for looking at this many bytes or items.
    pub(super) fn spend_bytes(&self, bytes: usize) -> Result<(), EvalError> {
        self.spend(bytes as u64 / 10)
    }

    pub(super) fn run(&self, program: &'a Program) -> Eval<'a> {
        self.value(program, &program.root, None, 0)
    }

    fn variable(&self, name: &str) -> Eval<'a> {
        if let Some((_, value)) = self.variables.iter().find(|(known, _)| *known == name) {
            return Ok(value.clone());
        }
        if name == "authorizer" && self.authorizer.is_some() {
            return Ok(Val::Authorizer(Rc::new(Question::default())));
        }
        check::TYPES
            .iter()
            .find(|ty| **ty == name)
            .map(|ty| Val::Type(ty))
            .ok_or_else(|| EvalError::new(format!("no such attribute(s): {name}")))
    }

    /// A named expression; one that uses itself is found out by its place being taken while it is evaluated.
    fn named(&self, name: &str, depth: u64) -> Eval<'a> {
        let Some(index) = self.named.iter().position(|(known, _)| known == name) else {
            return Err(EvalError::new(format!("no such key: {name}")));
        };
        let known = self.memory.borrow().get(&index).cloned();
        match known {
            Some(Some(value)) => return value,
            Some(None) => return Err(EvalError::new(format!("variable {name:?} uses itself"))),
            None => {}
        }
        self.memory.borrow_mut().insert(index, None);
        let program = &self.named[index].1;
        let value = self.value(program, &program.root, None, depth + 1);
        self.memory.borrow_mut().insert(index, Some(value.clone()));
        value
    }

    pub(super) fn value(&self, program: &'a Program, expr: &'a IdedExpr, scope: Outer<'_, 'a>, depth: u64) -> Eval<'a> {
        self.spend(1)?;
        if depth > DEPTH {
            return Err(EvalError::new("the expression nests too deep"));
        }
        let depth = depth + 1;
        match &expr.expr {
            Expr::Literal(literal) => Ok(from_literal(literal)),
            Expr::Ident(name) => match local(scope, name) {
                Some(value) => Ok(value),
                None => self.variable(name),
            },
            Expr::Select(select) => self.select(program, select, scope, depth),
            Expr::Call(call) => self.call(program, call, scope, depth),
            Expr::Comprehension(c) => self.comprehension(program, c, scope, depth),
            Expr::List(list) => {
                let mut out = Vec::with_capacity(list.elements.len());
                for (index, element) in list.elements.iter().enumerate() {
                    let value = self.value(program, element, scope, depth)?;
                    match (list.optional_indices.contains(&index), value) {
                        (true, Val::Optional(Some(value))) => out.push((*value).clone()),
                        (true, Val::Optional(None)) => {}
                        (_, value) => out.push(value),
                    }
                }
                Ok(Val::list(out))
            }
            Expr::Map(map) => self.entries(program, &map.entries, scope, depth),
            Expr::Struct(value) => self.entries(program, &value.entries, scope, depth),
            Expr::Unspecified => Err(EvalError::new("the expression is incomplete")),
        }
    }

    fn entries(
        &self,
        program: &'a Program,
        entries: &'a [IdedEntryExpr],
        scope: Outer<'_, 'a>,
        depth: u64,
    ) -> Eval<'a> {
        let mut out: Vec<(Val<'a>, Val<'a>)> = Vec::with_capacity(entries.len());
        for entry in entries {
            let (key, value, optional) = match &entry.expr {
                EntryExpr::StructField(field) => (Val::Str(Text::Borrowed(&field.field)), &field.value, field.optional),
                EntryExpr::MapEntry(entry) => {
                    (self.value(program, &entry.key, scope, depth)?, &entry.value, entry.optional)
                }
            };
            if !matches!(key, Val::Str(_) | Val::Int(_) | Val::Uint(_) | Val::Bool(_)) {
                return Err(EvalError::new(format!("unsupported key type: {}", key.ty())));
            }
            self.spend(out.len() as u64 / 10)?;
            if out.iter().any(|(k, _)| compare(k, &key).is_some_and(std::cmp::Ordering::is_eq)) {
                return Err(EvalError::new("Failed with repeated key"));
            }
            match (optional, self.value(program, value, scope, depth)?) {
                (true, Val::Optional(Some(value))) => out.push((key, (*value).clone())),
                (true, Val::Optional(None)) => {}
                (_, value) => out.push((key, value)),
            }
        }
        Ok(Val::map(out))
    }

    fn select(&self, program: &'a Program, select: &'a SelectExpr, scope: Outer<'_, 'a>, depth: u64) -> Eval<'a> {
        if let Expr::Ident(name) = &select.operand.expr
            && name == "variables"
            && local(scope, name).is_none()
            && !self.variables.iter().any(|(known, _)| known == name)
        {
            let there = self.named.iter().any(|(known, _)| *known == select.field);
            return if select.test { Ok(Val::Bool(there)) } else { self.named(&select.field, depth) };
        }
        let operand = self.value(program, &select.operand, scope, depth)?;
        let field = select.field.as_str();
        match (operand, select.test) {
            (Val::Authorizer(_), false) if field == "requestResource" => self.about_request(),
            (Val::Map(map), true) => Ok(Val::Bool(map.field(field).is_some())),
            (Val::Map(map), false) => map.field(field).ok_or_else(|| EvalError::new(format!("no such key: {field}"))),
            (Val::Optional(None), true) => Ok(Val::Bool(false)),
            (Val::Optional(None), false) => Ok(Val::Optional(None)),
            (Val::Optional(Some(inner)), test) => match (&*inner, test) {
                (Val::Map(map), true) => Ok(Val::Bool(map.field(field).is_some())),
                (Val::Map(map), false) => Ok(Val::Optional(map.field(field).map(Rc::new))),
                (other, _) => Err(EvalError::new(format!("type '{}' does not support field selection", other.ty()))),
            },
            (other, _) => Err(EvalError::new(format!("type '{}' does not support field selection", other.ty()))),
        }
    }

    /// `authorizer.requestResource`: the question about what the request is about.
    fn about_request(&self) -> Eval<'a> {
        let none = || EvalError::new("no such key: requestResource");
        let Val::Map(request) = self.variable("request")? else { return Err(none()) };
        let Some(Val::Map(resource)) = request.field("resource") else { return Err(none()) };
        let text = |map: &Map<'a>, name: &str| match map.field(name) {
            Some(Val::Str(text)) => (*text).to_owned(),
            _ => String::new(),
        };
        Ok(Val::Authorizer(Rc::new(Question {
            group: text(&resource, "group"),
            resource: text(&resource, "resource"),
            subresource: text(&request, "subResource"),
            namespace: text(&request, "namespace"),
            name: text(&request, "name"),
            ..Question::default()
        })))
    }

    fn call(&self, program: &'a Program, call: &'a CallExpr, scope: Outer<'_, 'a>, depth: u64) -> Eval<'a> {
        let arg = |index: usize| match call.args.get(index) {
            Some(expr) => self.value(program, expr, scope, depth),
            None => Err(no_overload(&call.func_name)),
        };
        match call.func_name.as_str() {
            operators::LOGICAL_AND => self.both(arg(0), || arg(1), false),
            operators::LOGICAL_OR => self.both(arg(0), || arg(1), true),
            operators::CONDITIONAL => match arg(0)? {
                Val::Bool(true) => arg(1),
                Val::Bool(false) => arg(2),
                _ => Err(no_overload("_?_:_")),
            },
            operators::NOT_STRICTLY_FALSE => match arg(0) {
                Ok(Val::Bool(value)) => Ok(Val::Bool(value)),
                Err(error) if error.exhausted => Err(error),
                _ => Ok(Val::Bool(true)),
            },
            _ => self.strict_call(program, call, scope, depth),
        }
    }

    /// Calls what needs all its arguments, or binds names.
    fn strict_call(&self, program: &'a Program, call: &'a CallExpr, scope: Outer<'_, 'a>, depth: u64) -> Eval<'a> {
        let name = call.func_name.as_str();
        let space = call.target.as_deref().and_then(|target| match &target.expr {
            Expr::Ident(space) if functions::SPACES.contains(&space.as_str()) && local(scope, space).is_none() => {
                Some(space.as_str())
            }
            _ => None,
        });
        let bound = functions::binds(space, name, call);
        if !bound.is_empty() {
            return self.binding(program, call, bound, scope, depth);
        }
        let mut args = Vec::with_capacity(call.args.len() + 1);
        if let (None, Some(target)) = (space, &call.target) {
            args.push(self.value(program, target, scope, depth)?);
        }
        for arg in &call.args {
            args.push(self.value(program, arg, scope, depth)?);
        }
        match space {
            Some(space) => self.namespaced(space, name, args),
            None => self.function(program, name, call.target.is_some(), args),
        }
    }

    /// What gives names to values: `cel.bind`, `optMap`, and loops over keys and values.
    fn binding(
        &self,
        program: &'a Program,
        call: &'a CallExpr,
        names: Vec<&'a str>,
        scope: Outer<'_, 'a>,
        depth: u64,
    ) -> Eval<'a> {
        let name = call.func_name.as_str();
        let body = |index: usize| call.args.get(index).ok_or_else(|| no_overload(name));
        if name == "bind" {
            let value = self.value(program, body(1)?, scope, depth)?;
            let inner = Scope { name: names[0], value, outer: scope };
            return self.value(program, body(2)?, Some(&inner), depth);
        }
        let Some(target) = &call.target else { return Err(no_overload(name)) };
        let target = self.value(program, target, scope, depth)?;
        if matches!(name, "optMap" | "optFlatMap") {
            let Val::Optional(value) = target else { return Err(no_overload(name)) };
            let Some(value) = value else { return Ok(Val::Optional(None)) };
            let inner = Scope { name: names[0], value: (*value).clone(), outer: scope };
            let value = self.value(program, body(1)?, Some(&inner), depth)?;
            return Ok(if name == "optMap" { Val::some(value) } else { value });
        }
        let pairs: Vec<(Val<'a>, Val<'a>)> = match &target {
            Val::List(list) => list.iter().enumerate().map(|(i, v)| (Val::Int(i as i64), v)).collect(),
            Val::Map(map) => map.entries(),
            _ => return Err(no_overload(name)),
        };
        self.spend(pairs.len() as u64)?;
        let each = |pair: &(Val<'a>, Val<'a>), body: &'a IdedExpr| {
            let first = Scope { name: names[0], value: pair.0.clone(), outer: scope };
            let second = Scope { name: names[1], value: pair.1.clone(), outer: Some(&first) };
            self.value(program, body, Some(&second), depth)
        };
        let (condition, result) = match call.args.len() {
            4 => (Some(body(2)?), body(3)?),
            _ => (None, body(2)?),
        };
        let (mut list, mut map, mut count, mut failure) = (Vec::new(), Vec::new(), 0, None);
        for pair in &pairs {
            if let Some(condition) = condition {
                match each(pair, condition)? {
                    Val::Bool(true) => {}
                    Val::Bool(false) => continue,
                    _ => return Err(no_overload(name)),
                }
            }
            match (name, each(pair, result)) {
                ("transformList", value) => list.push(value?),
                ("transformMap", value) => map.push((pair.0.clone(), value?)),
                ("all", Ok(Val::Bool(false))) => return Ok(Val::Bool(false)),
                ("exists", Ok(Val::Bool(true))) => return Ok(Val::Bool(true)),
                (_, Ok(Val::Bool(holds))) => count += usize::from(holds),
                (_, Err(error)) if error.exhausted => return Err(error),
                ("all" | "exists", Err(error)) => failure = Some(error),
                (_, Err(error)) => return Err(error),
                _ => return Err(no_overload(name)),
            }
        }
        match (name, failure) {
            (_, Some(error)) => Err(error),
            ("transformList", _) => Ok(Val::list(list)),
            ("transformMap", _) => Ok(Val::map(map)),
            ("all", _) => Ok(Val::Bool(true)),
            ("exists", _) => Ok(Val::Bool(false)),
            _ => Ok(Val::Bool(count == 1)),
        }
    }

    /// `&&` (`decisive` is false) and `||`: an error of one side does not matter if the other one decides.
    fn both(&self, left: Eval<'a>, right: impl FnOnce() -> Eval<'a>, decisive: bool) -> Eval<'a> {
        let name = if decisive { "_||_" } else { "_&&_" };
        match left {
            Ok(Val::Bool(left)) if left == decisive => Ok(Val::Bool(decisive)),
            Err(error) if error.exhausted => Err(error),
            left => match (left, right()?) {
                (_, Val::Bool(right)) if right == decisive => Ok(Val::Bool(decisive)),
                (Err(error), _) => Err(error),
                (Ok(Val::Bool(_)), Val::Bool(right)) => Ok(Val::Bool(right)),
                _ => Err(no_overload(name)),
            },
        }
    }

    fn comprehension(
        &self,
        program: &'a Program,
        c: &'a ComprehensionExpr,
        scope: Outer<'_, 'a>,
        depth: u64,
    ) -> Eval<'a> {
        let range = self.value(program, &c.iter_range, scope, depth)?;
        let items: Vec<Val<'a>> = match &range {
            Val::List(list) => list.iter().collect(),
            Val::Map(map) => map.entries().into_iter().map(|(key, _)| key).collect(),
            other => {
                return Err(EvalError::new(format!("got '{}', expected iterable type", other.ty())));
            }
        };
        self.spend(items.len() as u64)?;
        if let Some((condition, element)) = appends(c) {
            return self.collect(program, c, items, condition, element, scope, depth);
        }
        let mut accumulated = self.value(program, &c.accu_init, scope, depth)?;
        let mut failed = None;
        for item in items {
            let accumulator = Scope { name: &c.accu_var, value: accumulated.clone(), outer: scope };
            let inner = Scope { name: &c.iter_var, value: item, outer: Some(&accumulator) };
            if failed.is_none()
                && let Val::Bool(false) = self.value(program, &c.loop_cond, Some(&inner), depth)?
            {
                break;
            }
            // An error in one round of `all` or `exists` does not matter if another one decides.
            match self.value(program, &c.loop_step, Some(&inner), depth) {
                Ok(value) => {
                    if failed.is_some() && decides(c, &value) {
                        failed = None;
                        accumulated = value;
                        break;
                    }
                    if failed.is_none() {
                        accumulated = value;
                    }
                }
                Err(error) if error.exhausted || !absorbs(c) => return Err(error),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        let accumulator = Scope { name: &c.accu_var, value: accumulated, outer: scope };
        self.value(program, &c.result, Some(&accumulator), depth)
    }

    /// `map` and `filter`, without copying what has been collected in every round.
    #[allow(clippy::too_many_arguments, reason = "the parts of a loop")]
    fn collect(
        &self,
        program: &'a Program,
        c: &'a ComprehensionExpr,
        items: Vec<Val<'a>>,
        condition: Option<&'a IdedExpr>,
        element: &'a IdedExpr,
        scope: Outer<'_, 'a>,
        depth: u64,
    ) -> Eval<'a> {
        let mut out = Vec::new();
        for item in items {
            let inner = Scope { name: &c.iter_var, value: item, outer: scope };
            if let Some(condition) = condition {
                match self.value(program, condition, Some(&inner), depth)? {
                    Val::Bool(true) => {}
                    Val::Bool(false) => continue,
                    _ => return Err(no_overload("_?_:_")),
                }
            }
            out.push(self.value(program, element, Some(&inner), depth)?);
        }
        Ok(Val::list(out))
    }
}

/// Whether the loop is one of `&&` or `||`.
fn absorbs(c: &ComprehensionExpr) -> bool {
    matches!(&c.loop_step.expr, Expr::Call(step)
        if matches!(step.func_name.as_str(), operators::LOGICAL_AND | operators::LOGICAL_OR))
}

fn decides(c: &ComprehensionExpr, value: &Val<'_>) -> bool {
    match (&c.loop_step.expr, value) {
        (Expr::Call(step), Val::Bool(value)) => *value == (step.func_name == operators::LOGICAL_OR),
        _ => false,
    }
}

/// If every round appends one item to the accumulator: on which condition, and which.
fn appends(c: &ComprehensionExpr) -> Option<(Option<&IdedExpr>, &IdedExpr)> {
    let is_accumulator = |expr: &IdedExpr| matches!(&expr.expr, Expr::Ident(name) if *name == c.accu_var);
    if !is_accumulator(&c.result) || !matches!(&c.accu_init.expr, Expr::List(list) if list.elements.is_empty()) {
        return None;
    }
    if let Some(element) = appended_item(&c.loop_step, &c.accu_var) {
        return Some((None, element));
    }
    let Expr::Call(step) = &c.loop_step.expr else { return None };
    let [condition, then, otherwise] = &step.args[..] else { return None };
    let element = appended_item(then, &c.accu_var)?;
    (step.func_name == operators::CONDITIONAL && is_accumulator(otherwise)).then_some((Some(condition), element))
}

/// The item, if an expression is `accumulator + [item]`.
fn appended_item<'e>(expr: &'e IdedExpr, accumulator: &str) -> Option<&'e IdedExpr> {
    let Expr::Call(call) = &expr.expr else { return None };
    let [left, right] = &call.args[..] else { return None };
    let (Expr::Ident(name), Expr::List(list)) = (&left.expr, &right.expr) else { return None };
    let [element] = &list.elements[..] else { return None };
    (call.func_name == operators::ADD && name == accumulator && list.optional_indices.is_empty()).then_some(element)
}

fn from_literal(literal: &LiteralValue) -> Val<'_> {
    match literal {
        LiteralValue::Boolean(value) => Val::Bool(*value.inner()),
        LiteralValue::Bytes(value) => Val::Bytes(value.inner().into()),
        LiteralValue::Double(value) => Val::Double(*value.inner()),
        LiteralValue::Int(value) => Val::Int(*value.inner()),
        LiteralValue::Null => Val::Null,
        LiteralValue::String(value) => Val::Str(Text::Borrowed(value.inner())),
        LiteralValue::UInt(value) => Val::Uint(*value.inner()),
    }
}

/// What `a[b]` is.
pub(super) fn index<'a>(container: &Val<'a>, key: &Val<'a>) -> Eval<'a> {
    match (container, key) {
        (Val::List(list), key) => at(list, key),
        (Val::Map(map), key) => entry(map, key).ok_or_else(|| match key {
            Val::Str(key) => EvalError::new(format!("no such key: {}", &**key)),
            Val::Int(key) => EvalError::new(format!("no such key: {key}")),
            _ => EvalError::new("no such key"),
        }),
        (Val::Optional(None), _) => Ok(Val::Optional(None)),
        (Val::Optional(Some(inner)), key) => Ok(Val::Optional(index(inner, key).ok().map(Rc::new))),
        _ => Err(no_overload("_[_]")),
    }
}

fn entry<'a>(map: &Map<'a>, key: &Val<'a>) -> Option<Val<'a>> {
    map.get(key)
}

fn at<'a>(list: &List<'a>, key: &Val<'a>) -> Eval<'a> {
    let place = match key {
        Val::Int(place) => usize::try_from(*place).ok(),
        Val::Uint(place) => usize::try_from(*place).ok(),
        Val::Double(place) if place.fract() == 0.0 && *place >= 0.0 && *place < 1e15 => Some(*place as usize),
        Val::Double(_) => None,
        _ => return Err(no_overload("_[_]")),
    };
    place.and_then(|place| list.get(place)).ok_or_else(|| match key {
        Val::Int(place) => EvalError::new(format!("index out of bounds: {place}")),
        _ => EvalError::new("index out of bounds"),
    })
}
