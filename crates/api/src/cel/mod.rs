//! The Common Expression Language, with what Kubernetes adds to it
//! (<https://kubernetes.io/docs/reference/using-api/cel/>).
//!
//! The `cel` crate reads an expression; what it says is worked out here, because every step of it has to be counted:
//! an expression comes from outside and runs inside a request. What can only fail is refused before, by its types
//! ([`Type`], `infer.rs`, and `signatures.txt` for what may be called with what).
//!
//! Limits. A text may have [`LONGEST`] bytes and nest [`DEEPEST`] levels. Evaluating costs one unit per node that is
//! visited, and a tenth of a unit per byte or item that a function looks at; an expression may spend [`PER_EXPRESSION`]
//! units, which is upstream's limit, and all expressions of one [`Session`] [`PER_SESSION`], as upstream's policies may.

mod check;
mod cost;
mod eval;
mod format;
mod functions;
mod infer;
mod library;
mod lists;
mod named;
mod names;
pub mod openapi;
mod signatures;
mod strings;
#[cfg(test)]
mod tests;
mod types;
mod value;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use cel::common::ast::IdedExpr;
use regex::Regex;
use serde_json::Value;

pub use cost::Sizes;
pub use names::{of_policy, of_policy_about, of_webhooks, with_variables};
pub use types::{Fields, Type};
use value::Val;

/// How many bytes an expression may have.
pub const LONGEST: usize = 32 * 1024;
/// How deep an expression may nest.
pub const DEEPEST: usize = 150;
/// What evaluating one expression may cost (upstream's `PerCallLimit`).
pub const PER_EXPRESSION: u64 = 1_000_000;
/// What all expressions of a session may cost (upstream's `RuntimeCELCostBudget`).
pub const PER_SESSION: u64 = 10_000_000;
/// What all conditions under which a webhook or policy is asked may cost (upstream's
/// `RuntimeCELCostBudgetMatchConditions`).
pub const PER_CONDITIONS: u64 = 2_500_000;
/// The stack on which expressions are read. A parser recurses as deep as its input does, and a stack that overflows
/// takes the whole process with it. Memory is only used as far as it is needed.
const STACK: usize = 128 << 20;

/// Why a text is no expression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("compilation failed: {0}")]
pub struct CompileError(pub String);

/// Why an expression has no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct EvalError {
    /// What went wrong.
    pub message: String,
    /// Whether it was stopped because it cost too much.
    pub exhausted: bool,
}

impl EvalError {
    pub(super) fn new(message: impl Into<String>) -> EvalError {
        EvalError { message: message.into(), exhausted: false }
    }
}

/// A question to the authorizer, collected by `authorizer.group('…').resource('…').check('…')`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Question {
    /// A path that is no resource; then everything else but the verb is empty.
    pub path: String,
    /// The API group.
    pub group: String,
    /// The plural of the resource.
    pub resource: String,
    /// The subresource.
    pub subresource: String,
    /// The namespace.
    pub namespace: String,
    /// The object's name.
    pub name: String,
    /// The field selector of a list, as it is written.
    pub fields: String,
    /// The label selector of a list, as it is written.
    pub labels: String,
    /// Whoever is asked about, if it is not the user of the request: namespace and name.
    pub service_account: Option<(String, String)>,
    /// The verb.
    pub verb: String,
}

/// Who answers what expressions ask the authorizer.
pub trait Authorizer {
    /// Whether it is allowed, and why.
    fn check(&self, question: &Question) -> (bool, String);
}

/// An expression that has been read.
#[derive(Clone)]
pub struct Program {
    text: Arc<str>,
    root: Arc<IdedExpr>,
    /// Patterns that stand in the text as they are, by the pattern.
    patterns: Arc<HashMap<String, Regex>>,
    ty: Type,
    used: Arc<BTreeSet<String>>,
}

/// What an expression may name, and of which type each is.
pub type Variable<'n> = (&'n str, Type);

/// Variables of which nothing is known before the expression is evaluated.
pub fn untyped<'n>(names: &[&'n str]) -> Vec<Variable<'n>> {
    names.iter().map(|name| (*name, Type::Dyn)).collect()
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Program({:?})", self.text)
    }
}

impl Program {
    /// Reads an expression that may use these variables.
    ///
    /// # Errors
    /// If it cannot be read, names a variable, field or function that there is not, or does with a value what its type does
    /// not allow.
    pub fn compile(text: &str, variables: &[Variable<'_>]) -> Result<Program, CompileError> {
        Program::read(text, variables, None).map(|(program, _)| program)
    }

    /// The same, with the most that evaluating it may cost, in units, if values of all variables are no larger than this.
    ///
    /// # Errors
    /// As [`Program::compile`].
    pub fn estimate(text: &str, variables: &[Variable<'_>], sizes: &Sizes) -> Result<(Program, u64), CompileError> {
        Program::read(text, variables, Some(sizes))
    }

    fn read(text: &str, variables: &[Variable<'_>], sizes: Option<&Sizes>) -> Result<(Program, u64), CompileError> {
        if text.len() > LONGEST {
            return Err(CompileError(format!("the expression is too long: it may not be more than {LONGEST} bytes")));
        }
        if text.trim().is_empty() {
            return Err(CompileError("ERROR: <input>:1:1: Syntax error: the expression is empty".to_owned()));
        }
        let (root, facts, cost) = std::thread::scope(|scope| {
            let work = || {
                let (root, source) = check::parse(text)?;
                let facts = infer::infer(&root, &source, variables, sizes.is_some())?;
                let cost = sizes.map_or(0, |sizes| cost::most(&root, &facts, sizes));
                Ok((root, facts, cost))
            };
            let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
            let joined = thread.map_err(|e| CompileError(format!("no thread to read it on: {e}")))?.join();
            joined.unwrap_or_else(|_| Err(CompileError("the expression cannot be read".to_owned())))
        })?;
        let program = Program {
            text: text.into(),
            root: Arc::new(root),
            patterns: Arc::new(facts.patterns),
            ty: facts.ty,
            used: Arc::new(facts.used),
        };
        Ok((program, cost))
    }

    /// The expression as it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The type of its value.
    pub fn ty(&self) -> &Type {
        &self.ty
    }

    /// Whether its value can only be of another type than this one.
    pub fn is_never(&self, ty: &Type) -> bool {
        !matches!(&self.ty, Type::Dyn) && self.ty != *ty
    }

    /// Whether it names this variable.
    pub fn uses(&self, variable: &str) -> bool {
        self.used.contains(variable)
    }

    /// Evaluates the expression once.
    ///
    /// # Errors
    /// If it fails, or costs more than it may.
    pub fn eval(&self, variables: &[(&str, &Value)]) -> Result<Value, EvalError> {
        Session::new(variables.to_vec()).eval(self)
    }
}

/// Evaluates expressions over the same variables.
pub struct Session<'a> {
    variables: Vec<(&'a str, Val<'a>)>,
    named: &'a [(String, Program)],
    memory: RefCell<HashMap<usize, Option<Result<Val<'a>, EvalError>>>>,
    authorizer: Option<&'a dyn Authorizer>,
    spent: Cell<u64>,
    total: Cell<u64>,
    budget: u64,
}

impl<'a> Session<'a> {
    /// With these variables.
    pub fn new(variables: Vec<(&'a str, &'a Value)>) -> Session<'a> {
        Session {
            variables: variables.into_iter().map(|(name, value)| (name, Val::from(value))).collect(),
            named: &[],
            memory: RefCell::default(),
            authorizer: None,
            spent: Cell::new(0),
            total: Cell::new(0),
            budget: PER_SESSION,
        }
    }

    /// With expressions that others find under `variables.`; each is evaluated when it is first asked for, and then
    /// remembered.
    #[must_use]
    pub fn with_named(self, named: &'a [(String, Program)]) -> Session<'a> {
        Session { named, ..self }
    }

    /// With one more variable, of this type: what JSON has no form for, such as times, becomes what the type says.
    #[must_use]
    pub fn with(mut self, name: &'a str, value: &'a Value, ty: &Type) -> Session<'a> {
        self.variables.push((name, Val::of(value, ty)));
        self
    }

    /// With a variable that is an optional value.
    #[must_use]
    pub fn with_optional(mut self, name: &'a str, value: Option<&'a Value>, ty: &Type) -> Session<'a> {
        let value = value.map(|value| std::rc::Rc::new(Val::of(value, ty)));
        self.variables.push((name, Val::Optional(value)));
        self
    }

    /// With somebody who answers what is asked of `authorizer`.
    #[must_use]
    pub fn with_authorizer(self, authorizer: &'a dyn Authorizer) -> Session<'a> {
        Session { authorizer: Some(authorizer), ..self }
    }

    /// All expressions may cost so much together, in units, instead of [`PER_SESSION`].
    #[must_use]
    pub fn with_budget(self, budget: u64) -> Session<'a> {
        Session { budget, ..self }
    }

    /// What everything so far has cost.
    pub fn cost(&self) -> u64 {
        self.total.get()
    }

    /// Evaluates one expression.
    ///
    /// # Errors
    /// If it fails, or costs more than it may.
    pub fn eval(&self, program: &'a Program) -> Result<Value, EvalError> {
        self.spent.set(0);
        let value = self.run(program)?;
        self.to_json(&value)
    }

    /// Evaluates an expression that is either true or not.
    ///
    /// # Errors
    /// If it fails, costs more than it may, or is something else.
    pub fn holds(&self, program: &'a Program) -> Result<bool, EvalError> {
        match self.eval(program)? {
            Value::Bool(holds) => Ok(holds),
            _ => Err(EvalError::new("cel expression must evaluate to a bool")),
        }
    }
}
