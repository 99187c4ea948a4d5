//! The status of a Job: what controllers, ours and those that `managedBy` names, may say of it (KEP-4368). What was wrong
//! before may stay as long as it is not touched.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{items, job_policy::intervals, meta};
use crate::{
    field::{Errors, Path, same},
    row::Validation,
};

/// A status before and after, and whether something in it is another now.
struct Change<'v> {
    spec: &'v Value,
    old: &'v Value,
    new: &'v Value,
}

fn holds(status: &Value, ty: &str) -> bool {
    items(status, "conditions").any(|c| c["type"] == ty && c["status"] == "True")
}

fn finished(status: &Value) -> bool {
    holds(status, "Complete") || holds(status, "Failed")
}

fn number(status: &Value, key: &str) -> i64 {
    status[key].as_i64().unwrap_or_default()
}

impl Change<'_> {
    fn is(&self, ty: &str) -> bool {
        holds(self.new, ty)
    }

    /// Whether one of these fields is another now.
    fn of(&self, keys: &[&str]) -> bool {
        keys.iter().any(|key| match (&self.old[*key], &self.new[*key]) {
            (old, new) if old.is_number() || new.is_number() => number(self.old, key) != number(self.new, key),
            (old, new) => !same(old, new),
        })
    }

    /// Whether one of these conditions has begun or ceased to hold.
    fn holds(&self, types: &[&str]) -> bool {
        types.iter().any(|ty| holds(self.old, ty) != holds(self.new, ty))
    }

    fn finishes(&self) -> bool {
        finished(self.old) != finished(self.new)
    }
}

pub(super) fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let nothing = Value::Null;
    let change =
        Change { spec: &v.new["spec"], old: v.old.map_or(&nothing, |old| &old["status"]), new: &v.new["status"] };
    let path = Path::Root.at("status");
    for key in ["active", "succeeded", "failed", "ready", "terminating"] {
        meta::non_negative(change.new, key, path, errors);
    }
    uncounted(&change, path.at("uncountedTerminatedPods"), errors);
    conditions(&change, path.at("conditions"), errors);
    times(&change, path, errors);
    pods(&change, path, errors);
    indexes(&change, path, errors);
}

fn uncounted(change: &Change<'_>, path: Path<'_>, errors: &mut Errors) {
    let of = &change.new["uncountedTerminatedPods"];
    let mut seen = HashSet::new();
    for key in ["succeeded", "failed"] {
        let list = path.at(key);
        for (index, uid) in items(of, key).enumerate() {
            match uid.as_str().unwrap_or_default() {
                "" => errors.invalid(list.index(index), "", "must not be empty"),
                uid if !seen.insert(uid) => errors.duplicate(list.index(index), uid),
                _ => {}
            }
        }
    }
    let any = ["succeeded", "failed"].iter().any(|key| items(of, key).next().is_some());
    if any && finished(change.new) && (change.finishes() || change.of(&["uncountedTerminatedPods"])) {
        errors.invalid(path, of.clone(), "uncountedTerminatedPods needs to be empty for finished job");
    }
}

/// Validates that conditions do not contradict each other, come in their order and stay.
fn conditions(change: &Change<'_>, path: Path<'_>, errors: &mut Errors) {
    let mut wrong = |why: &str| errors.invalid_unshown(path, why);
    for (one, other, always, why) in [
        ("Complete", "Failed", false, "cannot set Complete=True and Failed=true conditions"),
        ("Complete", "FailureTarget", false, "cannot set Complete=True and FailureTarget=true conditions"),
        ("SuccessCriteriaMet", "Failed", true, "cannot set SuccessCriteriaMet=True and Failed=true conditions"),
        (
            "SuccessCriteriaMet",
            "FailureTarget",
            true,
            "cannot set SuccessCriteriaMet=True and FailureTarget=true conditions",
        ),
    ] {
        if change.is(one) && change.is(other) && (always || change.holds(&[one, other])) {
            wrong(why);
        }
    }
    for (end, first, why) in [
        ("Failed", "FailureTarget", "cannot set Failed=True condition without the FailureTarget=true condition"),
        (
            "Complete",
            "SuccessCriteriaMet",
            "cannot set Complete=True condition without the SuccessCriteriaMet=true condition",
        ),
    ] {
        if change.is(end) && !change.is(first) && change.holds(&[end, first]) {
            wrong(why);
        }
    }
    if change.spec["successPolicy"].is_object() && change.is("Complete") && !change.is("SuccessCriteriaMet") {
        wrong("cannot set Complete=True for Job with SuccessPolicy unless SuccessCriteriaMet=True");
    }
    for ty in ["Failed", "Complete", "FailureTarget"] {
        if holds(change.old, ty) && !change.is(ty) {
            wrong(&format!("cannot disable the terminal {ty}=True condition"));
        }
    }
    match (holds(change.old, "SuccessCriteriaMet"), change.is("SuccessCriteriaMet")) {
        (true, false) => wrong("cannot disable the SuccessCriteriaMet=True condition"),
        (false, true) if holds(change.old, "Complete") => {
            wrong("cannot set SuccessCriteriaMet=True for Job already has Complete=true conditions");
        }
        _ => {}
    }
}

fn times(change: &Change<'_>, path: Path<'_>, errors: &mut Errors) {
    let (start, end) = (&change.new["startTime"], &change.new["completionTime"]);
    let at = path.at("completionTime");
    if change.holds(&["Complete"]) || change.of(&["completionTime"]) {
        match (end.is_string(), change.is("Complete")) {
            (true, false) => {
                let why = "cannot set completionTime when there is no Complete=True condition";
                errors.invalid(at, end.clone(), why);
            }
            (false, true) => errors.required(at, "completionTime is required for Complete jobs"),
            _ => {}
        }
    }
    let time = |of: &Value| of.as_str().and_then(|text| text.parse::<jiff::Timestamp>().ok());
    if let (Some(started), Some(ended)) = (time(start), time(end))
        && ended < started
        && change.of(&["startTime", "completionTime"])
    {
        errors.invalid(at, end.clone(), "completionTime cannot be set before startTime");
    }
    if end.is_string() && change.old["completionTime"].is_string() && change.of(&["completionTime"]) {
        errors.invalid(at, end.clone(), "completionTime cannot be mutated");
    }
    let at = path.at("startTime");
    if start.is_null() && finished(change.new) && (change.finishes() || change.of(&["startTime"])) {
        errors.required(at, "startTime is required for finished job");
    }
    if change.old["startTime"].is_string() && change.of(&["startTime"]) && change.spec["suspend"] != true {
        errors.required(at, "startTime cannot be removed for unsuspended job");
    }
}

fn pods(change: &Change<'_>, path: Path<'_>, errors: &mut Errors) {
    for key in ["active", "terminating"] {
        let count = number(change.new, key);
        if count > 0 && finished(change.new) && (change.finishes() || change.of(&[key])) {
            errors.invalid(path.at(key), count, format!("{key}>0 is invalid for finished job"));
        }
    }
    let ready = number(change.new, "ready");
    if ready > number(change.new, "active") && change.of(&["ready", "active"]) {
        errors.invalid(path.at("ready"), ready, "cannot set more ready pods than active");
    }
    // An indexed Job that has become smaller forgets what was beyond its end.
    let shrinks = change.spec["completionMode"] == "Indexed"
        && change.spec["completions"].as_i64() == change.spec["parallelism"].as_i64();
    for (key, may) in [("failed", false), ("succeeded", shrinks)] {
        let count = number(change.new, key);
        if count < number(change.old, key) && !may {
            errors.invalid(path.at(key), count, format!("cannot decrease the {key} counter"));
        }
    }
}

fn indexes(change: &Change<'_>, path: Path<'_>, errors: &mut Errors) {
    let text = |key: &str| change.new[key].as_str().unwrap_or_default();
    let (completed, failed) = (text("completedIndexes"), text("failedIndexes"));
    let (at_completed, at_failed) = (path.at("completedIndexes"), path.at("failedIndexes"));
    let completions = change.spec["completions"].as_i64();
    let of = |text: &str| completions.map_or(Ok(Vec::new()), |completions| intervals(text, completions));
    let (has_completed, has_failed) = (of(completed), of(failed));
    if change.of(&["completedIndexes"]) {
        if let Err(why) = &has_completed {
            errors.invalid(at_completed, completed, format!("error parsing completedIndexes: {why}"));
        }
        if !completed.is_empty() && change.spec["completionMode"] != "Indexed" {
            let why = "cannot set non-empty completedIndexes when non-indexed completion mode";
            errors.invalid(at_completed, completed, why);
        }
    }
    if change.of(&["failedIndexes"]) && change.new["failedIndexes"].is_string() {
        match (change.spec["backoffLimitPerIndex"].is_number(), &has_failed) {
            (true, Err(why)) => errors.invalid(at_failed, failed, format!("error parsing failedIndexes: {why}")),
            (true, Ok(_)) => {}
            (false, _) => {
                let why = "cannot set non-null failedIndexes when backoffLimitPerIndex is null";
                errors.invalid(at_failed, json!(failed), why);
            }
        }
    }
    if let (Ok(completed), Ok(with_failed)) = (has_completed, has_failed)
        && change.of(&["completedIndexes", "failedIndexes"])
        && let Some(index) = overlap(&completed, &with_failed)
    {
        let why = format!("failedIndexes and completedIndexes overlap at index: {index}");
        errors.invalid(at_failed, failed, why);
    }
}

/// The first index that is in both of two lists of intervals, which are in order.
fn overlap(a: &[(i64, i64)], b: &[(i64, i64)]) -> Option<i64> {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(one), Some(other)) = (a.peek(), b.peek()) {
        if one.0 <= other.1 && other.0 <= one.1 {
            return Some(one.0.max(other.0));
        }
        if one.0 <= other.0 {
            a.next()
        } else {
            b.next()
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{super::testing::check_status, *};

    const START: &str = "2026-01-01T00:00:00Z";
    const END: &str = "2026-01-01T00:01:00Z";

    fn with(types: &[&str], rest: Value) -> Value {
        let list: Vec<Value> = types.iter().map(|ty| json!({"type": ty, "status": "True"})).collect();
        let mut status = rest;
        status["conditions"] = list.into();
        status
    }

    fn done(rest: Value) -> Value {
        let mut status = json!({"startTime": START, "completionTime": END});
        for (key, value) in rest.as_object().unwrap() {
            status[key] = value.clone();
        }
        with(&["SuccessCriteriaMet", "Complete"], status)
    }

    fn check_of(spec: Value, old: Value, new: Value, expect: &[&str]) {
        let job = |status: Value| json!({"spec": spec, "status": status});
        check_status(&super::super::job::row(), job(old), job(new), expect);
    }

    fn check(old: Value, new: Value, expect: &[&str]) {
        check_of(json!({"completions": 3}), old, new, expect);
    }

    #[test]
    fn ends_of_jobs() {
        let failed = |types: &[&str]| with(types, json!({"startTime": START}));
        check(json!({"active": 1}), done(json!({"succeeded": 3})), &[]);
        check(json!({}), failed(&["FailureTarget", "Failed"]), &[]);
        check(
            json!({}),
            failed(&["Failed"]),
            &[
                "status.conditions: Invalid value: cannot set Failed=True condition without the FailureTarget=true condition",
            ],
        );
        check(
            json!({}),
            with(&["Complete"], json!({"startTime": START, "completionTime": END})),
            &[
                "status.conditions: Invalid value: cannot set Complete=True condition without the SuccessCriteriaMet=true condition",
            ],
        );
        check(
            json!({}),
            failed(&["SuccessCriteriaMet", "FailureTarget"]),
            &["status.conditions: Invalid value: cannot set SuccessCriteriaMet=True and FailureTarget=true conditions"],
        );
        check(
            json!({}),
            with(
                &["SuccessCriteriaMet", "Complete", "FailureTarget"],
                json!({"startTime": START, "completionTime": END}),
            ),
            &[
                "status.conditions: Invalid value: cannot set Complete=True and FailureTarget=true conditions",
                "status.conditions: Invalid value: cannot set SuccessCriteriaMet=True and FailureTarget=true conditions",
            ],
        );
        check(
            failed(&["FailureTarget", "Failed"]),
            failed(&[]),
            &[
                "status.conditions: Invalid value: cannot disable the terminal Failed=True condition",
                "status.conditions: Invalid value: cannot disable the terminal FailureTarget=True condition",
            ],
        );
        check(
            failed(&["SuccessCriteriaMet"]),
            failed(&[]),
            &["status.conditions: Invalid value: cannot disable the SuccessCriteriaMet=True condition"],
        );
        // Written before the condition was: it may stay without.
        let before = with(&["Complete"], json!({"startTime": START, "completionTime": END}));
        check(before.clone(), before.clone(), &[]);
        check(
            before,
            done(json!({})),
            &[
                "status.conditions: Invalid value: cannot set SuccessCriteriaMet=True for Job already has Complete=true conditions",
            ],
        );
    }

    #[test]
    fn times_of_jobs() {
        check(
            json!({}),
            json!({"completionTime": END}),
            &[
                "status.completionTime: Invalid value: \"2026-01-01T00:01:00Z\": cannot set completionTime when there is no Complete=True condition",
            ],
        );
        check(
            json!({}),
            with(&["SuccessCriteriaMet", "Complete"], json!({"startTime": START})),
            &["status.completionTime: Required value: completionTime is required for Complete jobs"],
        );
        check(
            json!({}),
            done(json!({"startTime": END, "completionTime": START})),
            &[
                "status.completionTime: Invalid value: \"2026-01-01T00:00:00Z\": completionTime cannot be set before startTime",
            ],
        );
        check(
            done(json!({})),
            done(json!({"completionTime": "2026-01-01T00:02:00Z"})),
            &["status.completionTime: Invalid value: \"2026-01-01T00:02:00Z\": completionTime cannot be mutated"],
        );
        check(
            json!({}),
            done(json!({"startTime": null})),
            &["status.startTime: Required value: startTime is required for finished job"],
        );
        let removed = ["status.startTime: Required value: startTime cannot be removed for unsuspended job"];
        check(json!({"startTime": START}), json!({}), &removed);
        check_of(json!({"suspend": true}), json!({"startTime": START}), json!({}), &[]);
        check(json!({}), json!({"startTime": START}), &[]);
    }

    #[test]
    fn pods_of_jobs() {
        for (old, new, expect) in [
            (
                json!({}),
                done(json!({"active": 1})),
                "status.active: Invalid value: 1: active>0 is invalid for finished job",
            ),
            (
                json!({}),
                done(json!({"terminating": 2})),
                "status.terminating: Invalid value: 2: terminating>0 is invalid for finished job",
            ),
            (
                json!({"active": 1}),
                json!({"active": 1, "ready": 2}),
                "status.ready: Invalid value: 2: cannot set more ready pods than active",
            ),
            (
                json!({"failed": 2}),
                json!({"failed": 1}),
                "status.failed: Invalid value: 1: cannot decrease the failed counter",
            ),
            (
                json!({"succeeded": 2}),
                json!({}),
                "status.succeeded: Invalid value: 0: cannot decrease the succeeded counter",
            ),
            (json!({}), json!({"failed": -1}), "status.failed: Invalid value: -1: must be greater than or equal to 0"),
            (
                json!({}),
                json!({"uncountedTerminatedPods": {"succeeded": ["a"], "failed": ["a"]}}),
                "status.uncountedTerminatedPods.failed[0]: Duplicate value: \"a\"",
            ),
            (
                json!({}),
                json!({"uncountedTerminatedPods": {"failed": [""]}}),
                "status.uncountedTerminatedPods.failed[0]: Invalid value: \"\": must not be empty",
            ),
            (
                json!({}),
                done(json!({"uncountedTerminatedPods": {"succeeded": ["a"]}})),
                "status.uncountedTerminatedPods: Invalid value: {\"succeeded\":[\"a\"]}: uncountedTerminatedPods needs to be empty for finished job",
            ),
        ] {
            let also = ["status.failed: Invalid value: -1: cannot decrease the failed counter"];
            let also = if new["failed"] == -1 { &also[..] } else { &[] };
            check(old, new, &[&[expect], also].concat());
        }
        // As it was before, wrong as it is.
        check(done(json!({"active": 1})), done(json!({"active": 1, "succeeded": 3})), &[]);
        let smaller = json!({"completionMode": "Indexed", "completions": 2, "parallelism": 2});
        check_of(smaller, json!({"succeeded": 3}), json!({"succeeded": 2}), &[]);
    }

    #[test]
    fn indexes_of_jobs() {
        let indexed = json!({"completionMode": "Indexed", "completions": 10, "backoffLimitPerIndex": 1});
        for (spec, status, expect) in [
            (indexed.clone(), json!({"completedIndexes": "1,3-5", "failedIndexes": "0,6"}), None),
            (
                indexed.clone(),
                json!({"completedIndexes": "3-5,1"}),
                Some(
                    "status.completedIndexes: Invalid value: \"3-5,1\": error parsing completedIndexes: non-increasing order, previous: 5, current: 1",
                ),
            ),
            (
                indexed.clone(),
                json!({"completedIndexes": "10"}),
                Some(
                    "status.completedIndexes: Invalid value: \"10\": error parsing completedIndexes: too large index: \"10\"",
                ),
            ),
            (
                indexed.clone(),
                json!({"failedIndexes": "x"}),
                Some(
                    "status.failedIndexes: Invalid value: \"x\": error parsing failedIndexes: cannot convert string to integer for index: \"x\"",
                ),
            ),
            (
                indexed,
                json!({"completedIndexes": "0,2-5", "failedIndexes": "1,4-6"}),
                Some(
                    "status.failedIndexes: Invalid value: \"1,4-6\": failedIndexes and completedIndexes overlap at index: 4",
                ),
            ),
            (
                json!({"completions": 3}),
                json!({"completedIndexes": "1"}),
                Some(
                    "status.completedIndexes: Invalid value: \"1\": cannot set non-empty completedIndexes when non-indexed completion mode",
                ),
            ),
            (
                json!({"completionMode": "Indexed", "completions": 3}),
                json!({"failedIndexes": ""}),
                Some(
                    "status.failedIndexes: Invalid value: \"\": cannot set non-null failedIndexes when backoffLimitPerIndex is null",
                ),
            ),
        ] {
            check_of(spec, json!({}), status, expect.as_slice());
        }
        // A Job that has become smaller keeps what it said.
        let of = |status: Value| json!({"completedIndexes": "0-5", "active": status});
        check_of(json!({"completionMode": "Indexed", "completions": 2}), of(json!(1)), of(json!(2)), &[]);
    }
}
