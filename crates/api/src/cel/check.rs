//! Reads an expression, and finds in it what can be found without evaluating it.

use std::collections::HashMap;

use cel::{
    common::ast::{CallExpr, EntryExpr, Expr, IdedExpr, LiteralValue, operators},
    parser::Parser,
};
use regex::{Regex, RegexBuilder};

use super::{CompileError, DEEPEST, functions};

/// How large a pattern may become, in bytes.
const PATTERN: usize = 1 << 20;

/// Reads an expression. It needs a stack that its length allows for.
pub(super) fn parse(text: &str) -> Result<IdedExpr, CompileError> {
    let parser = Parser::new().enable_optional_syntax(true).enable_ident_escape_syntax(true);
    let root = parser.parse(text).map_err(|errors| CompileError(errors.to_string()))?;
    match depth(&root) > DEEPEST {
        true => Err(CompileError(format!("the expression nests too deep: at most {DEEPEST} levels"))),
        false => Ok(root),
    }
}

/// A pattern of `matches` and its kind.
pub(super) fn pattern(text: &str) -> Result<Regex, String> {
    RegexBuilder::new(text).size_limit(PATTERN).dfa_size_limit(PATTERN).build().map_err(|e| e.to_string())
}

/// What an expression consists of.
fn parts(expr: &Expr) -> Vec<&IdedExpr> {
    match expr {
        Expr::Unspecified | Expr::Ident(_) | Expr::Literal(_) => Vec::new(),
        Expr::Call(call) => call.target.iter().map(|t| &**t).chain(&call.args).collect(),
        Expr::Comprehension(c) => vec![&c.iter_range, &c.accu_init, &c.loop_cond, &c.loop_step, &c.result],
        Expr::List(list) => list.elements.iter().collect(),
        Expr::Select(select) => vec![&select.operand],
        Expr::Map(map) => map.entries.iter().flat_map(|e| entry_parts(&e.expr)).collect(),
        Expr::Struct(value) => value.entries.iter().flat_map(|e| entry_parts(&e.expr)).collect(),
    }
}

fn entry_parts(entry: &EntryExpr) -> Vec<&IdedExpr> {
    match entry {
        EntryExpr::StructField(field) => vec![&field.value],
        EntryExpr::MapEntry(entry) => vec![&entry.key, &entry.value],
    }
}

/// How deep an expression nests, found without recursion.
fn depth(root: &IdedExpr) -> usize {
    let (mut deepest, mut stack) = (0, vec![(root, 1)]);
    while let Some((expr, level)) = stack.pop() {
        deepest = deepest.max(level);
        stack.extend(parts(&expr.expr).into_iter().map(|part| (part, level + 1)));
    }
    deepest
}

/// The names of types that stand for themselves.
pub(super) const TYPES: [&str; 10] =
    ["int", "uint", "double", "bool", "string", "bytes", "list", "map", "null_type", "type"];

/// Makes sure that every name stands for something, and compiles the patterns that stand in the text.
pub(super) fn check(root: &IdedExpr, variables: &[&str]) -> Result<HashMap<String, Regex>, CompileError> {
    let mut patterns = HashMap::new();
    let mut names: Vec<String> = variables.iter().map(|name| (*name).to_owned()).collect();
    visit(root, &mut names, &mut patterns)?;
    Ok(patterns)
}

fn undeclared(name: &str) -> CompileError {
    CompileError(format!("ERROR: <input>: undeclared reference to '{name}' (in container '')"))
}

fn visit(expr: &IdedExpr, names: &mut Vec<String>, patterns: &mut HashMap<String, Regex>) -> Result<(), CompileError> {
    match &expr.expr {
        Expr::Unspecified => Err(CompileError("the expression is incomplete".to_owned())),
        Expr::Ident(name) => match names.iter().any(|known| known == name) || TYPES.contains(&name.as_str()) {
            true => Ok(()),
            false => Err(undeclared(name)),
        },
        Expr::Comprehension(c) => {
            visit(&c.iter_range, names, patterns)?;
            visit(&c.accu_init, names, patterns)?;
            let before = names.len();
            names.push(c.iter_var.clone());
            names.extend(c.iter_var2.clone());
            names.push(c.accu_var.clone());
            for part in [&c.loop_cond, &c.loop_step, &c.result] {
                visit(part, names, patterns)?;
            }
            names.truncate(before);
            Ok(())
        }
        Expr::Call(call) => visit_call(call, names, patterns),
        Expr::Struct(value) if !is_struct(&value.type_name) => Err(undeclared(&value.type_name)),
        other => parts(other).into_iter().try_for_each(|part| visit(part, names, patterns)),
    }
}

/// Objects that can be made: parts of the object that is admitted, and steps of a patch.
pub(super) fn is_struct(name: &str) -> bool {
    let name = name.trim_start_matches('.');
    name == "Object" || name == "JSONPatch" || name.starts_with("Object.")
}

fn visit_call(
    call: &CallExpr,
    names: &mut Vec<String>,
    patterns: &mut HashMap<String, Regex>,
) -> Result<(), CompileError> {
    let name = call.func_name.as_str();
    let target = call.target.as_deref();
    let space = target.and_then(|t| match &t.expr {
        Expr::Ident(space) if !names.contains(space) => Some(space.as_str()),
        _ => None,
    });
    if let Some(space) = space {
        let full = format!("{space}.{name}");
        if !functions::NAMESPACED.contains(&full.as_str()) {
            return Err(undeclared(if functions::SPACES.contains(&space) { &full } else { space }));
        }
    } else {
        if !functions::is_known(name, target.is_some()) {
            return Err(undeclared(name));
        }
        if let Some(target) = target {
            visit(target, names, patterns)?;
        }
    }
    if matches!(name, "matches" | "find" | "findAll") {
        let place = if target.is_some() { 0 } else { 1 };
        if let Some(Expr::Literal(LiteralValue::String(text))) = call.args.get(place).map(|a| &a.expr) {
            let text = text.inner();
            let compiled = pattern(text).map_err(|e| CompileError(format!("invalid matches argument: {e}")))?;
            patterns.insert(text.to_owned(), compiled);
        }
    }
    let bound = functions::binds(space, name, call);
    let before = names.len();
    for (index, arg) in call.args.iter().enumerate() {
        if index < bound.len() {
            match &arg.expr {
                Expr::Ident(variable) => names.push(variable.clone()),
                _ => return Err(CompileError(format!("{name}: the first argument must be a simple name"))),
            }
            continue;
        }
        // `cel.bind(x, value, …)`: the value does not see x; it does no harm here if it is thought to.
        visit(arg, names, patterns)?;
    }
    names.truncate(before);
    Ok(())
}

/// The type that an expression has whatever its variables are.
pub(super) fn shape(root: &IdedExpr) -> Option<&'static str> {
    match &root.expr {
        Expr::Literal(literal) => Some(match literal {
            LiteralValue::Boolean(_) => "bool",
            LiteralValue::Bytes(_) => "bytes",
            LiteralValue::Double(_) => "double",
            LiteralValue::Int(_) => "int",
            LiteralValue::Null => "null_type",
            LiteralValue::String(_) => "string",
            LiteralValue::UInt(_) => "uint",
        }),
        Expr::List(_) => Some("list"),
        Expr::Map(_) => Some("map"),
        Expr::Struct(_) => Some("object"),
        Expr::Select(select) if select.test => Some("bool"),
        Expr::Call(call) => match call.func_name.as_str() {
            operators::LOGICAL_AND
            | operators::LOGICAL_OR
            | operators::LOGICAL_NOT
            | operators::EQUALS
            | operators::NOT_EQUALS
            | operators::LESS
            | operators::LESS_EQUALS
            | operators::GREATER
            | operators::GREATER_EQUALS
            | operators::IN
            | "matches"
            | "startsWith"
            | "endsWith"
            | "hasValue" => Some("bool"),
            "size" => Some("int"),
            "string" | "lowerAscii" | "upperAscii" | "join" | "format" => Some("string"),
            operators::ADD | operators::CONDITIONAL => call.args.last().and_then(shape),
            _ => None,
        },
        _ => None,
    }
}
