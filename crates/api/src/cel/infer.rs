//! What an expression says before it is evaluated: that every name stands for something, and of which type it is. The
//! errors are those of upstream's type checker, with the place where they are.

use std::collections::{BTreeSet, HashMap};

use cel::common::ast::{
    CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedEntryExpr, IdedExpr, ListExpr, LiteralValue, SelectExpr,
    SourceInfo, operators,
};
use regex::Regex;

use super::{
    CompileError, check,
    functions::{self, SPACES},
    signatures::{self, Signature, VARIABLES},
    types::{Known, Type},
};

type Inferred = Result<Type, CompileError>;

/// What is known of an expression as a whole.
pub(super) struct Facts {
    pub ty: Type,
    /// The variables that it names.
    pub used: BTreeSet<String>,
    /// Patterns that stand in the text as they are.
    pub patterns: HashMap<String, Regex>,
    /// The types of its parts and what its calls are, by their ids, if that was asked for.
    pub types: HashMap<u64, Type>,
    pub calls: HashMap<u64, Called>,
}

/// What a call is.
pub(super) struct Called {
    /// With the word in front, if there is one.
    pub name: String,
    /// The word in front that is no value.
    pub space: Option<String>,
    /// The forms of the function that fit its arguments; none for what is no function of the table.
    pub forms: Vec<&'static Signature>,
}

/// Finds out what an expression is, whose variables are of these types; and what its parts are, if `every` is set.
///
/// # Errors
/// If a name stands for nothing, or something cannot be done with values of its type.
pub(super) fn infer(
    root: &IdedExpr,
    source: &SourceInfo,
    variables: &[(&str, Type)],
    every: bool,
) -> Result<Facts, CompileError> {
    let mut inference = Inference {
        source,
        names: variables.iter().map(|(name, ty)| ((*name).to_owned(), ty.clone())).collect(),
        globals: variables.len(),
        known: Known::default(),
        used: BTreeSet::new(),
        patterns: HashMap::new(),
        every,
        types: HashMap::new(),
        calls: HashMap::new(),
        mixed: 0,
    };
    let ty = inference.of(root);
    if inference.known.is_exhausted() {
        return Err(CompileError("the types of the expression are too complex".to_owned()));
    }
    let ty = ty?;
    let Inference { known, used, patterns, types, calls, .. } = inference;
    let types = types.into_iter().map(|(id, ty)| (id, known.whole(&ty))).collect();
    Ok(Facts { ty: known.whole(&ty), used, patterns, types, calls })
}

struct Inference<'e> {
    source: &'e SourceInfo,
    /// What names stand for, the innermost last.
    names: Vec<(String, Type)>,
    /// How many of them are variables, and not names that the expression itself introduces.
    globals: usize,
    known: Known,
    used: BTreeSet<String>,
    patterns: HashMap<String, Regex>,
    /// Whether types and calls are kept.
    every: bool,
    types: HashMap<u64, Type>,
    calls: HashMap<u64, Called>,
    /// How many calls surround this place that take lists of values of several types.
    mixed: usize,
}

impl Inference<'_> {
    fn error(&self, id: u64, message: impl std::fmt::Display) -> CompileError {
        let text = &self.source.source;
        let at = self.source.offset_for(id).map_or(0, |(start, _)| start as usize);
        let before = text.get(..at).unwrap_or_default();
        let start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let (line, column) = (before.matches('\n').count() + 1, before[start..].chars().count());
        let shown = text[start..].lines().next().unwrap_or_default();
        let dots = ".".repeat(column);
        CompileError(format!("ERROR: <input>:{line}:{}: {message}\n | {shown}\n | {dots}^", column + 1))
    }

    fn undeclared(&self, id: u64, name: &str) -> CompileError {
        self.error(id, format!("undeclared reference to '{name}' (in container '')"))
    }

    fn of(&mut self, expr: &IdedExpr) -> Inferred {
        let ty = self.part(expr)?;
        if self.every {
            self.types.insert(expr.id, ty.clone());
        }
        Ok(ty)
    }

    fn part(&mut self, expr: &IdedExpr) -> Inferred {
        match &expr.expr {
            Expr::Unspecified => Err(self.error(expr.id, "the expression is incomplete")),
            Expr::Literal(literal) => Ok(match literal {
                LiteralValue::Boolean(_) => Type::Bool,
                LiteralValue::Bytes(_) => Type::Bytes,
                LiteralValue::Double(_) => Type::Double,
                LiteralValue::Int(_) => Type::Int,
                LiteralValue::Null => Type::Null,
                LiteralValue::String(_) => Type::String,
                LiteralValue::UInt(_) => Type::Uint,
            }),
            Expr::Ident(name) => self.name(expr.id, name),
            Expr::Select(select) => self.select(expr.id, select),
            Expr::List(list) => self.list(list),
            Expr::Map(map) => self.map(&map.entries),
            Expr::Struct(value) if check::is_struct(&value.type_name) => {
                for entry in &value.entries {
                    if let EntryExpr::StructField(field) = &entry.expr {
                        self.of(&field.value)?;
                    }
                }
                Ok(Type::Dyn)
            }
            Expr::Struct(value) => Err(self.undeclared(expr.id, &value.type_name)),
            Expr::Comprehension(comprehension) => self.comprehension(comprehension),
            Expr::Call(call) => self.call(expr.id, call),
        }
    }

    fn name(&mut self, id: u64, name: &str) -> Inferred {
        match self.names.iter().rposition(|(known, _)| known == name) {
            Some(place) => {
                if place < self.globals {
                    self.used.insert(name.to_owned());
                }
                Ok(self.names[place].1.clone())
            }
            None if check::TYPES.contains(&name) => Ok(Type::Type),
            None => Err(self.undeclared(id, name)),
        }
    }

    fn select(&mut self, id: u64, select: &SelectExpr) -> Inferred {
        let operand = self.of(&select.operand)?;
        let found = self.field(id, &operand, &select.field)?;
        Ok(if select.test { Type::Bool } else { found })
    }

    fn field(&mut self, id: u64, operand: &Type, field: &str) -> Inferred {
        match self.known.top(operand) {
            Type::Dyn | Type::Variable(_) => Ok(Type::Dyn),
            Type::Map(of) => Ok(of.1.clone()),
            authorizer @ Type::Named("Authorizer") if field == "requestResource" => Ok(authorizer),
            Type::Object(fields) => {
                Type::field(&fields, field).cloned().ok_or_else(|| self.error(id, format!("undefined field '{field}'")))
            }
            Type::Optional(inner) => Ok(match self.field(id, &inner, field)? {
                found @ Type::Optional(_) => found,
                found => Type::optional(found),
            }),
            other => {
                let other = self.known.whole(&other);
                Err(self.error(id, format!("type '{other}' does not support field selection")))
            }
        }
    }

    /// The type of what stands beside each other in a list or map, where it may be mixed only within calls that take that.
    fn joined(&mut self, so_far: Option<Type>, next: Type, id: u64) -> Inferred {
        let Some(before) = so_far else { return Ok(next) };
        if self.known.fits(&next, &before) {
            // The more general of the two.
            return Ok(if matches!(self.known.top(&next), Type::Dyn) { next } else { before });
        }
        match self.mixed {
            0 => {
                let (wanted, found) = (self.known.whole(&before), self.known.whole(&next));
                Err(self.error(id, format!("expected type '{wanted}' but found '{found}'")))
            }
            _ => Ok(Type::Dyn),
        }
    }

    fn unwrapped(&mut self, ty: Type, optional: bool) -> Type {
        match self.known.top(&ty) {
            Type::Optional(inner) if optional => (*inner).clone(),
            ty => ty,
        }
    }

    fn list(&mut self, list: &ListExpr) -> Inferred {
        let mut item = None;
        for (index, element) in list.elements.iter().enumerate() {
            let ty = self.of(element)?;
            let ty = self.unwrapped(ty, list.optional_indices.contains(&index));
            item = Some(self.joined(item, ty, element.id)?);
        }
        let item = item.unwrap_or_else(|| self.known.fresh());
        Ok(Type::list(item))
    }

    fn map(&mut self, entries: &[IdedEntryExpr]) -> Inferred {
        let (mut key, mut value) = (None, None);
        for entry in entries {
            let EntryExpr::MapEntry(entry) = &entry.expr else { continue };
            let ty = self.of(&entry.key)?;
            key = Some(self.joined(key, ty, entry.key.id)?);
            let ty = self.of(&entry.value)?;
            let ty = self.unwrapped(ty, entry.optional);
            value = Some(self.joined(value, ty, entry.value.id)?);
        }
        let key = key.unwrap_or_else(|| self.known.fresh());
        let value = value.unwrap_or_else(|| self.known.fresh());
        Ok(Type::map(key, value))
    }

    /// What a loop goes through: keys and values of a map, places and items of a list.
    fn range(&mut self, expr: &IdedExpr) -> Result<(Type, Type, bool), CompileError> {
        let range = self.of(expr)?;
        match self.known.top(&range) {
            Type::List(item) => Ok((Type::Int, (*item).clone(), true)),
            Type::Map(of) => Ok((of.0.clone(), of.1.clone(), false)),
            Type::Dyn | Type::Variable(_) => Ok((Type::Dyn, Type::Dyn, true)),
            other => {
                let other = self.known.whole(&other);
                let why = "cannot be range of a comprehension (must be list, map, or dynamic)";
                Err(self.error(expr.id, format!("expression of type '{other}' {why}")))
            }
        }
    }

    /// Evaluates with names that stand for something only there.
    fn within<T>(
        &mut self,
        names: impl IntoIterator<Item = (String, Type)>,
        work: impl FnOnce(&mut Self) -> Result<T, CompileError>,
    ) -> Result<T, CompileError> {
        let before = self.names.len();
        self.names.extend(names);
        let done = work(self);
        self.names.truncate(before);
        done
    }

    fn wants(&mut self, expr: &IdedExpr, wanted: &Type) -> Result<(), CompileError> {
        let is = self.of(expr)?;
        self.wants_type(expr.id, &is, wanted)
    }

    fn wants_type(&mut self, id: u64, is: &Type, wanted: &Type) -> Result<(), CompileError> {
        if self.known.fits(is, wanted) {
            return Ok(());
        }
        let (wanted, is) = (self.known.whole(wanted), self.known.whole(is));
        Err(self.error(id, format!("expected type '{wanted}' but found '{is}'")))
    }

    fn comprehension(&mut self, c: &ComprehensionExpr) -> Inferred {
        let (first, second, is_list) = self.range(&c.iter_range)?;
        let collected = self.of(&c.accu_init)?;
        let accumulator = (c.accu_var.clone(), collected.clone());
        let mut names = vec![accumulator.clone()];
        match &c.iter_var2 {
            Some(name) => names.extend([(c.iter_var.clone(), first), (name.clone(), second)]),
            None => names.push((c.iter_var.clone(), if is_list { second } else { first })),
        }
        self.within(names, |this| {
            this.wants(&c.loop_cond, &Type::Bool)?;
            this.wants(&c.loop_step, &collected)
        })?;
        self.within([accumulator], |this| this.of(&c.result))
    }

    fn call(&mut self, id: u64, call: &CallExpr) -> Inferred {
        let name = call.func_name.as_str();
        let space = call.target.as_deref().and_then(|target| match &target.expr {
            Expr::Ident(space) if SPACES.contains(&space.as_str()) && self.names.iter().all(|(n, _)| n != space) => {
                Some(space.as_str())
            }
            _ => None,
        });
        let full = space.map_or_else(|| name.to_owned(), |space| format!("{space}.{name}"));
        if self.every {
            let called = Called { name: full.clone(), space: space.map(str::to_owned), forms: Vec::new() };
            self.calls.insert(id, called);
        }
        let bound = functions::binds(space, name, call);
        if !bound.is_empty() {
            return self.binding(id, call, &bound);
        }
        let for_devices = name == "includes" && !self.names[..self.globals].iter().any(|(name, _)| name == "device");
        if signatures::of(&full).is_empty() && name != operators::OPT_SELECT || for_devices {
            return Err(self.undeclared(id, &full));
        }
        let mut args = Vec::with_capacity(call.args.len() + 1);
        let target = call.target.as_deref().filter(|_| space.is_none());
        let mixed = usize::from(name == "format");
        self.mixed += mixed;
        for arg in target.into_iter().chain(&call.args) {
            args.push((self.of(arg)?, arg));
        }
        self.mixed -= mixed;
        if matches!(name, "matches" | "find" | "findAll") {
            self.pattern(&args)?;
        }
        match (&*full, &args[..]) {
            (operators::OPT_SELECT, [(operand, _), (_, field)]) => {
                let Expr::Literal(LiteralValue::String(field)) = &field.expr else { return Ok(Type::Dyn) };
                let found = self.field(id, operand, field.inner())?;
                Ok(if matches!(found, Type::Optional(_)) { found } else { Type::optional(found) })
            }
            ("math.greatest" | "math.least", [_, _, ..]) => {
                let mut all = args.iter().map(|(ty, _)| self.known.top(ty));
                let first = all.next().unwrap_or(Type::Dyn);
                Ok(if all.all(|ty| ty == first) { first } else { Type::Dyn })
            }
            ("math.greatest" | "math.least", [(ty @ (Type::Int | Type::Uint | Type::Double), _)]) => Ok(ty.clone()),
            _ => self.resolve(id, &full, target.is_some(), &args.into_iter().map(|(ty, _)| ty).collect::<Vec<_>>()),
        }
    }

    /// A pattern that stands in the text is compiled once, and refused if it is none.
    fn pattern(&mut self, args: &[(Type, &IdedExpr)]) -> Result<(), CompileError> {
        if let Some((_, arg)) = args.get(1)
            && let Expr::Literal(LiteralValue::String(text)) = &arg.expr
        {
            let text = text.inner();
            let compiled =
                check::pattern(text).map_err(|why| self.error(arg.id, format!("invalid matches argument: {why}")))?;
            self.patterns.insert(text.to_owned(), compiled);
        }
        Ok(())
    }

    /// What a function gives for arguments of these types. Where several of its forms fit, it could be anything.
    fn resolve(&mut self, id: u64, name: &str, member: bool, args: &[Type]) -> Inferred {
        let mut result: Option<Type> = None;
        for signature in signatures::of(name) {
            if signature.member != member || signature.args.len() != args.len() {
                continue;
            }
            let mark = self.known.mark();
            let variables: [Type; VARIABLES] = std::array::from_fn(|_| self.known.fresh());
            let fits = args.iter().zip(&signature.args).all(|(is, wanted)| {
                let wanted = with(wanted, &variables);
                self.known.fits(is, &wanted)
            });
            if !fits {
                self.known.back_to(mark);
                continue;
            }
            if let Some(called) = self.calls.get_mut(&id) {
                called.forms.push(signature);
            }
            let found = with(&signature.result, &variables);
            result = Some(match result {
                Some(before) if self.known.whole(&before) != self.known.whole(&found) => Type::Dyn,
                _ => found,
            });
        }
        result.ok_or_else(|| {
            let shown: Vec<String> = args.iter().map(|ty| self.known.whole(ty).to_string()).collect();
            let applied = match (member, &shown[..]) {
                (true, [receiver, rest @ ..]) => format!("{receiver}.({})", rest.join(", ")),
                (_, all) => format!("({})", all.join(", ")),
            };
            self.error(id, format!("found no matching overload for '{name}' applied to '{applied}'"))
        })
    }

    /// What gives names to values: `cel.bind`, `optMap`, and loops over keys and values.
    fn binding(&mut self, id: u64, call: &CallExpr, bound: &[&str]) -> Inferred {
        let name = call.func_name.as_str();
        if let Some(place) = bound.iter().position(|name| name.is_empty()) {
            let why = "the argument must be a simple name";
            return Err(self.error(call.args.get(place).map_or(id, |arg| arg.id), format!("{name}: {why}")));
        }
        let named = |types: Vec<Type>| -> Vec<(String, Type)> {
            bound.iter().zip(types).map(|(name, ty)| ((*name).to_owned(), ty)).collect()
        };
        let (Some(target), Some(last)) = (&call.target, call.args.last()) else {
            return Err(self.undeclared(id, name));
        };
        match name {
            "bind" => {
                let value = self.of(&call.args[1])?;
                self.within(named(vec![value]), |this| this.of(last))
            }
            "optMap" | "optFlatMap" => {
                let inner = self.known.fresh();
                self.wants(target, &Type::optional(inner.clone()))?;
                let ty = self.within(named(vec![inner]), |this| this.of(last))?;
                if name == "optMap" {
                    return Ok(Type::optional(ty));
                }
                let inner = self.known.fresh();
                self.wants_type(last.id, &ty, &Type::optional(inner.clone()))?;
                Ok(Type::optional(inner))
            }
            _ => {
                let (first, second, _) = self.range(target)?;
                self.within(named(vec![first.clone(), second]), |this| {
                    if call.args.len() == 4 {
                        this.wants(&call.args[2], &Type::Bool)?;
                    }
                    match name {
                        "transformList" => this.of(last).map(Type::list),
                        "transformMap" => this.of(last).map(|value| Type::map(first, value)),
                        _ => this.wants(last, &Type::Bool).map(|()| Type::Bool),
                    }
                })
            }
        }
    }
}

/// A type of a signature, with these for its variables.
fn with(ty: &Type, variables: &[Type; VARIABLES]) -> Type {
    match ty {
        Type::Variable(place) => variables[*place].clone(),
        Type::List(of) => Type::list(with(of, variables)),
        Type::Optional(of) => Type::optional(with(of, variables)),
        Type::Map(of) => Type::map(with(&of.0, variables), with(&of.1, variables)),
        ty => ty.clone(),
    }
}
