//! What a Job says about its pods' failures (KEP-3329,
//! <https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy>) and about when it is successful (KEP-3998,
//! <https://kubernetes.io/docs/concepts/workloads/controllers/job/#success-policy>).

use std::collections::BTreeSet;

use k8s_openapi::api::{
    batch::v1::{
        PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern,
        PodFailurePolicyRule, SuccessPolicy,
    },
    core::v1::{ContainerStatus, Pod},
};

use super::indexes::parse_indexes;
use crate::runtime::objects::{name, namespace};

/// What the failure of a pod means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It counts against the limit.
    Count,
    /// It does not count.
    Ignore,
    /// The pod's index has failed.
    FailIndex,
    /// The Job has failed, for this reason.
    FailJob(String),
}

/// What the failure of a pod means: what the first rule says that fits. Without one it counts.
pub fn judge(policy: Option<&PodFailurePolicy>, pod: &Pod) -> Verdict {
    let rules = policy.into_iter().flat_map(|policy| policy.rules.iter().enumerate());
    rules
        .filter_map(|(number, rule)| fits(rule, pod).map(|why| verdict(rule, number, &why)))
        .next()
        .unwrap_or(Verdict::Count)
}

fn verdict(rule: &PodFailurePolicyRule, number: usize, why: &str) -> Verdict {
    match rule.action.as_str() {
        "Ignore" => Verdict::Ignore,
        "FailIndex" => Verdict::FailIndex,
        "FailJob" => Verdict::FailJob(format!("{why} matching FailJob rule at index {number}")),
        _ => Verdict::Count,
    }
}

/// What of the pod fits a rule, in words.
fn fits(rule: &PodFailurePolicyRule, pod: &Pod) -> Option<String> {
    let of = format!("{}/{}", namespace(pod), name(pod));
    if let Some(codes) = &rule.on_exit_codes {
        let (container, code) = exited(codes, pod)?;
        return Some(format!("Container {container} for pod {of} failed with exit code {code}"));
    }
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let meant = |pattern: &PodFailurePolicyOnPodConditionsPattern| {
        let wanted = pattern.status.as_deref().unwrap_or("True");
        conditions.iter().find(|c| c.type_ == pattern.type_ && c.status == wanted)
    };
    let condition = rule.on_pod_conditions.iter().flatten().find_map(meant)?;
    Some(format!("Pod {of} has condition {}", condition.type_))
}

/// A container that has failed with one of the codes: its name and the code.
fn exited<'a>(codes: &PodFailurePolicyOnExitCodesRequirement, pod: &'a Pod) -> Option<(&'a str, i32)> {
    let status = pod.status.as_ref()?;
    let containers = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
    let failed = |container: &'a ContainerStatus| {
        let code = container.state.as_ref()?.terminated.as_ref()?.exit_code;
        (code != 0).then_some((container.name.as_str(), code))
    };
    let meant = |(container, code): &(&str, i32)| {
        let named = codes.container_name.as_deref().is_none_or(|name| name == *container);
        named && codes.values.contains(code) == (codes.operator == "In")
    };
    containers.filter_map(failed).find(meant)
}

/// Whether the indexes that have succeeded are enough, and by which rule.
pub fn is_met(policy: Option<&SuccessPolicy>, completions: i32, succeeded: &BTreeSet<i32>) -> Option<String> {
    let rules = policy.into_iter().flat_map(|policy| policy.rules.iter().enumerate());
    for (number, rule) in rules {
        let wanted = rule.succeeded_count.and_then(|count| usize::try_from(count).ok());
        let enough = match &rule.succeeded_indexes {
            Some(text) => {
                let meant = parse_indexes(text, completions);
                let found = meant.intersection(succeeded).count();
                !meant.is_empty() && found >= wanted.unwrap_or(meant.len())
            }
            None => wanted.is_some_and(|wanted| succeeded.len() >= wanted),
        };
        if enough {
            return Some(format!("Matched rules at index {number}"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(codes: &[(&str, i32)], condition: &str) -> Pod {
        let ended = |(name, code): &(&str, i32)| {
            json!({"name": name, "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": code}}})
        };
        let statuses: Vec<Value> = codes.iter().map(ended).collect();
        serde_json::from_value(json!({"metadata": {"namespace": "n", "name": "p"}, "status": {
            "phase": "Failed", "containerStatuses": statuses, "conditions": [{"type": condition, "status": "True"}]}}))
        .unwrap()
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let policy = json!({"rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [42, 43]}},
            {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [7]}},
            {"action": "Count", "onExitCodes": {"operator": "In", "values": [8]}},
            {"action": "Ignore", "onExitCodes": {"operator": "NotIn", "values": [1]}},
        ]});
        let policy: PodFailurePolicy = serde_json::from_value(policy).unwrap();
        let check = |codes: &[(&str, i32)], condition: &str, expect: Verdict| {
            assert_eq!(judge(Some(&policy), &pod(codes, condition)), expect, "{codes:?} {condition}");
        };
        let failed = |code: i32| {
            Verdict::FailJob(format!(
                "Container main for pod n/p failed with exit code {code} matching FailJob rule at index 1"
            ))
        };
        check(&[("main", 42)], "", failed(42));
        check(&[("side", 0), ("main", 43)], "", failed(43));
        check(&[("side", 42)], "", Verdict::Ignore);
        check(&[("main", 42)], "DisruptionTarget", Verdict::Ignore);
        check(&[("main", 7)], "", Verdict::FailIndex);
        check(&[("main", 8)], "", Verdict::Count);
        check(&[("main", 1)], "", Verdict::Count);
        check(&[("main", 99)], "", Verdict::Ignore);
        check(&[("main", 0)], "", Verdict::Count);
        assert_eq!(judge(None, &pod(&[("main", 42)], "")), Verdict::Count);
        let policy: PodFailurePolicy = serde_json::from_value(
            json!({"rules": [{"action": "FailJob", "onPodConditions": [{"type": "ConfigIssue"}]}]}),
        )
        .unwrap();
        let why = "Pod n/p has condition ConfigIssue matching FailJob rule at index 0";
        assert_eq!(judge(Some(&policy), &pod(&[], "ConfigIssue")), Verdict::FailJob(why.into()));
    }

    #[test]
    fn what_is_enough() {
        let check = |rules: Value, succeeded: &str, expect: Option<usize>| {
            let policy: SuccessPolicy = serde_json::from_value(json!({"rules": rules})).unwrap();
            let found = is_met(Some(&policy), 10, &parse_indexes(succeeded, 10));
            assert_eq!(found, expect.map(|n| format!("Matched rules at index {n}")), "{rules} with {succeeded}");
        };
        check(json!([{"succeededIndexes": "0,2-3"}]), "0,2", None);
        check(json!([{"succeededIndexes": "0,2-3"}]), "0,2,3,5", Some(0));
        check(json!([{"succeededIndexes": "0,2-3", "succeededCount": 2}]), "0,5", None);
        check(json!([{"succeededIndexes": "0,2-3", "succeededCount": 2}]), "0,3", Some(0));
        check(json!([{"succeededIndexes": "9"}, {"succeededCount": 3}]), "1-3", Some(1));
        check(json!([{"succeededCount": 3}]), "1,2", None);
        assert_eq!(is_met(None, 10, &parse_indexes("0-9", 10)), None);
    }
}
