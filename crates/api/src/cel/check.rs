//! Reads an expression.

use cel::{
    common::ast::{EntryExpr, Expr, IdedExpr, SourceInfo},
    parser::Parser,
};
use regex::{Regex, RegexBuilder};

use super::{CompileError, DEEPEST};

/// How large a pattern may become, in bytes.
const PATTERN: usize = 1 << 20;

/// Reads an expression. It needs a stack that its length allows for.
pub(super) fn parse(text: &str) -> Result<(IdedExpr, SourceInfo), CompileError> {
    let parser = Parser::new().enable_optional_syntax(true).enable_ident_escape_syntax(true);
    let read = parser.parse_with_source_info(text).map_err(|errors| CompileError(errors.to_string()))?;
    match depth(&read.0) > DEEPEST {
        true => Err(CompileError(format!("the expression nests too deep: at most {DEEPEST} levels"))),
        false => Ok(read),
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

/// Objects that can be made: parts of the object that is admitted, and steps of a patch.
pub(super) fn is_struct(name: &str) -> bool {
    let name = name.trim_start_matches('.');
    name == "Object" || name == "JSONPatch" || name.starts_with("Object.")
}
