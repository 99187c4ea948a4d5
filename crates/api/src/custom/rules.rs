//! The rules of `x-kubernetes-validations`, in CEL
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#validation-rules>).

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use super::{
    schema::{Node, Rule},
    validate::Rules,
};
use crate::{
    cel::{CompileError, PER_SESSION, Program, Session, Sizes, Type, Variable},
    field::{Errors, Path},
};

/// What the expressions of a rule say.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The rule.
    pub rule: Result<Program, CompileError>,
    /// What to say when it does not hold.
    pub message: Option<Result<Program, CompileError>>,
    /// Whether the rule is about a change: it names what was there before.
    pub transition: bool,
    /// The type by which values are read; none in particular if JSON's own forms are right for all of them.
    subject: Type,
}

impl Compiled {
    /// Reads a rule about values of this type.
    pub fn new(rule: &Value, subject: &Type) -> Compiled {
        Compiled::read(rule, subject, |text, variables| Program::compile(text, variables).map(|program| (program, 0))).0
    }

    /// Reads a rule about values of this type and these sizes; with the most that it may cost once, and its message, in units.
    pub fn estimate(rule: &Value, subject: &Type, sizes: &Sizes) -> (Compiled, u64, u64) {
        Compiled::read(rule, subject, |text, variables| Program::estimate(text, variables, sizes))
    }

    fn read(
        rule: &Value,
        subject: &Type,
        compile: impl Fn(&str, &[Variable<'_>]) -> Result<(Program, u64), CompileError>,
    ) -> (Compiled, u64, u64) {
        let text = |key: &str| rule[key].as_str().unwrap_or_default();
        let old = match rule["optionalOldSelf"].as_bool() {
            Some(true) => Type::optional(subject.clone()),
            _ => subject.clone(),
        };
        let variables = [("self", subject.clone()), ("oldSelf", old)];
        let message = Some(text("messageExpression")).filter(|text| !text.is_empty());
        let (rule, rule_cost) = apart(compile(text("rule"), &variables));
        let message = message.map(|text| apart(compile(text, &variables)));
        let message_cost = message.as_ref().map_or(0, |(_, cost)| *cost);
        let compiled = Compiled {
            transition: rule.as_ref().is_ok_and(|program| program.uses("oldSelf")),
            rule,
            message: message.map(|(program, _)| program),
            subject: if subject.converts() { subject.clone() } else { Type::Dyn },
        };
        (compiled, rule_cost, message_cost)
    }
}

/// A program and what it costs; what is none costs nothing.
fn apart(read: Result<(Program, u64), CompileError>) -> (Result<Program, CompileError>, u64) {
    match read {
        Ok((program, cost)) => (Ok(program), cost),
        Err(error) => (Err(error), 0),
    }
}

/// Evaluates the rules of one object, which may cost only so much together.
#[derive(Default)]
pub struct Expressions {
    spent: AtomicU64,
}

impl Rules for Expressions {
    fn check(
        &self,
        rules: &[Rule],
        node: &Node,
        path: Path<'_>,
        new: &Value,
        old: Option<&Value>,
        errors: &mut Errors,
    ) {
        for rule in rules {
            self.one(rule, node, path, new, old, errors);
        }
    }
}

impl Expressions {
    fn one(&self, rule: &Rule, node: &Node, path: Path<'_>, new: &Value, old: Option<&Value>, errors: &mut Errors) {
        let blamed = rule.field_path.trim_start_matches('.');
        let path = match (blamed, path) {
            // How upstream's errors call the object as a whole.
            ("", Path::Root) => Path::Root.at("<nil>"),
            ("", path) => path,
            (blamed, _) => path.at(blamed),
        };
        let shown = node.kind.name();
        let program = match &rule.compiled.rule {
            Ok(program) => program,
            // The definition was stored before this was looked at. Nothing is let in that a rule might forbid.
            Err(error) => return errors.invalid(path, shown, format!("rule compile error: {error}")),
        };
        let transition = rule.compiled.transition;
        // A rule about a change is not asked where there was none; one about a value that stays says nothing new of it.
        match old {
            None if transition && rule.optional_old_self != Some(true) => return,
            Some(old) if !transition && old == new => return,
            _ => {}
        }
        let subject = &rule.compiled.subject;
        let session = Session::new(Vec::new()).with("self", new, subject);
        let session = match (rule.optional_old_self, old) {
            (Some(true), old) => session.with_optional("oldSelf", old, subject),
            (_, Some(old)) => session.with("oldSelf", old, subject),
            (_, None) => session,
        };
        let holds = session.holds(program);
        let spent = self.spent.fetch_add(session.cost(), Ordering::Relaxed) + session.cost();
        if spent > PER_SESSION {
            return errors.invalid(
                path,
                shown,
                "validation failed due to running out of cost budget, no further validation rules will be run",
            );
        }
        match holds {
            Ok(true) => {}
            Ok(false) => say(rule, path, shown, &message(rule, &session), errors),
            Err(error) => errors.invalid(path, shown, format!("rule evaluation error: {error}")),
        }
    }
}

/// What is said when a rule does not hold.
fn message<'a>(rule: &'a Rule, session: &Session<'a>) -> String {
    if let Some(Ok(program)) = &rule.compiled.message
        && let Ok(Value::String(text)) = session.eval(program)
        // As upstream: a message of no use gives way to the fixed one.
        && !text.trim().is_empty()
        && !text.contains('\n')
    {
        return text.trim().to_owned();
    }
    match rule.message.trim() {
        "" => format!("failed rule: {}", rule.rule.trim()),
        text => text.to_owned(),
    }
}

fn say(rule: &Rule, path: Path<'_>, shown: &str, message: &str, errors: &mut Errors) {
    match &*rule.reason {
        "FieldValueForbidden" => errors.forbidden(path, message),
        "FieldValueRequired" => errors.required(path, message),
        "FieldValueDuplicate" => errors.duplicate(path, json!(shown)),
        _ => errors.invalid(path, shown, message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::custom::validate::validate;

    /// An object with a field of each kind and one rule at the top.
    #[track_caller]
    fn check(rule: Value, old: Value, new: Value, expect: &[&str]) {
        let root = Node::parse(&json!({"type": "object", "x-kubernetes-validations": [rule], "properties": {
            "min": {"type": "integer"}, "max": {"type": "integer"}, "name": {"type": "string"},
            "x-y": {"type": "string"},
            "list": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}},
                "x-kubernetes-validations": [{"rule": "self.n < 10", "message": "too many"}]}}}}));
        let mut errors = Errors::default();
        validate(&root, &new, Some(&old).filter(|old| !old.is_null()), &Expressions::default(), &mut errors);
        let found: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
        assert_eq!(found, expect);
    }

    #[test]
    fn rules_hold_or_say_why_not() {
        let rule = || json!({"rule": "self.min <= self.max"});
        let none = || Value::Null;
        check(rule(), none(), json!({"min": 1, "max": 2}), &[]);
        let failed = "<nil>: Invalid value: \"object\": failed rule: self.min <= self.max";
        check(rule(), none(), json!({"min": 3, "max": 2}), &[failed]);
        check(
            rule(),
            none(),
            json!({"min": 3}),
            &["<nil>: Invalid value: \"object\": rule evaluation error: no such key: max"],
        );
        let of = |key: &str, value: &str| {
            let mut rule = rule();
            rule[key] = value.into();
            rule
        };
        let bad = || json!({"min": 3, "max": 2});
        check(of("message", "upside down"), none(), bad(), &["<nil>: Invalid value: \"object\": upside down"]);
        let said = "string(self.min) + ' is more than ' + string(self.max)";
        check(of("messageExpression", said), none(), bad(), &["<nil>: Invalid value: \"object\": 3 is more than 2"]);
        let blamed = "max: Invalid value: \"object\": failed rule: self.min <= self.max";
        check(of("fieldPath", ".max"), none(), bad(), &[blamed]);
        let forbidden = "<nil>: Forbidden: failed rule: self.min <= self.max";
        check(of("reason", "FieldValueForbidden"), none(), bad(), &[forbidden]);
        check(json!({"rule": "self.x__dash__y == 'z'"}), none(), json!({"x-y": "z"}), &[]);
        let list = json!({"min": 1, "max": 1, "list": [{"n": 1}, {"n": 11}]});
        check(rule(), none(), list, &["list[1]: Invalid value: \"object\": too many"]);
    }

    #[test]
    fn rules_about_changes() {
        let rule = || json!({"rule": "self.min >= oldSelf.min"});
        check(rule(), Value::Null, json!({"min": 1}), &[]);
        check(rule(), json!({"min": 1}), json!({"min": 2}), &[]);
        let failed = "<nil>: Invalid value: \"object\": failed rule: self.min >= oldSelf.min";
        check(rule(), json!({"min": 2}), json!({"min": 1}), &[failed]);
        let optional = || json!({"rule": "oldSelf.hasValue() || self.min == 0", "optionalOldSelf": true});
        check(optional(), Value::Null, json!({"min": 0}), &[]);
        check(optional(), json!({"min": 0}), json!({"min": 5}), &[]);
        let failed = "<nil>: Invalid value: \"object\": failed rule: oldSelf.hasValue() || self.min == 0";
        check(optional(), Value::Null, json!({"min": 5}), &[failed]);
        // What was invalid before a rule came may stay as it is (KEP-4008).
        let same = || json!({"min": 3, "max": 2, "name": "x"});
        check(json!({"rule": "self.min <= self.max"}), same(), same(), &[]);
    }

    /// A time is a time and a number a number, whatever form JSON has for them.
    #[test]
    fn values_are_read_by_their_types() {
        let check = |rule: &str, expect: usize| {
            let root =
                Node::parse(&json!({"type": "object", "x-kubernetes-validations": [{"rule": rule}], "properties": {
                "since": {"type": "string", "format": "date-time"}, "day": {"type": "string", "format": "date"},
                "ttl": {"type": "string", "format": "duration"}, "data": {"type": "string", "format": "byte"},
                "ratio": {"type": "number"}, "parts": {"type": "array", "items": {"type": "number"}},
                "times": {"type": "object", "additionalProperties": {"type": "string", "format": "duration"}}}}));
            let new = json!({"since": "2030-01-02T03:04:05Z", "day": "2030-01-02", "ttl": "90s", "data": "YWJj", "ratio": 1,
                "parts": [1, 2.5], "times": {"a": "1h"}});
            let mut errors = Errors::default();
            validate(&root, &new, None, &Expressions::default(), &mut errors);
            assert_eq!(errors.0.len(), expect, "{rule}: {:?}", errors.0);
        };
        check("self.since > timestamp('2030-01-01T00:00:00Z') && self.since.getFullYear() == 2030", 0);
        check("self.day < self.since && self.day == timestamp('2030-01-02T00:00:00Z')", 0);
        check("self.ttl > duration('1m') && self.times['a'] == duration('60m')", 0);
        check("self.data == b'abc' && self.data.size() == 3", 0);
        check("self.ratio + 0.5 == 1.5 && self.parts.sum() == 3.5", 0);
        check("self.ttl > duration('2m')", 1);
        // What cannot be is no rule.
        check("self.ttl > '1m'", 1);
    }

    #[test]
    fn rules_end() {
        let slow = "[1,2,3,4,5,6,7,8,9,10].all(a, [1,2,3,4,5,6,7,8,9,10].all(b, [1,2,3,4,5,6,7,8,9,10].all(c, \
            [1,2,3,4,5,6,7,8,9,10].all(d, [1,2,3,4,5,6,7,8,9,10].all(e, [1,2,3,4,5,6,7,8,9,10].all(f, a + b + c + d + e + f > 0))))))";
        let root = Node::parse(&json!({"type": "object", "x-kubernetes-validations": [{"rule": slow}]}));
        let mut errors = Errors::default();
        validate(&root, &json!({}), None, &Expressions::default(), &mut errors);
        assert_eq!(errors.0.len(), 1);
        assert!(errors.0[0].to_string().contains("rule evaluation error"), "{}", errors.0[0]);
    }
}
