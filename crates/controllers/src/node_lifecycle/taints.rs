//! The taints that follow from how a node is
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/#taint-based-evictions>).

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Node, NodeCondition, Taint},
    apimachinery::pkg::apis::meta::v1::Time,
};

/// The node says that it is not ready, or has not said anything yet.
pub const NOT_READY: &str = "node.kubernetes.io/not-ready";
/// The node is not heard of.
pub const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
/// Somebody says that the node is off, and stays off (KEP-2268).
pub const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
/// Nothing new comes to a node with such a taint.
pub const NO_SCHEDULE: &str = "NoSchedule";
/// What does not tolerate such a taint has to leave.
pub const NO_EXECUTE: &str = "NoExecute";

/// Taints that keep new pods away: the condition, its status, the taint.
const BY_CONDITION: [(&str, &str, &str); 6] = [
    ("Ready", "False", NOT_READY),
    ("Ready", "Unknown", UNREACHABLE),
    ("MemoryPressure", "True", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "True", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "True", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "True", "node.kubernetes.io/network-unavailable"),
];
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

/// A condition of a node.
pub fn condition<'a>(node: &'a Node, type_: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == type_)
}

/// Whether a node has a taint.
pub fn is_tainted(node: &Node, key: &str, effect: &str) -> bool {
    taints(node).iter().any(|t| t.key == key && t.effect == effect)
}

/// The taints of a node.
pub fn taints(node: &Node) -> &[Taint] {
    node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default()
}

/// Whether, and why, pods have to leave a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// They may stay.
    Not,
    /// It is not ready.
    NotReady,
    /// It cannot be reached.
    Unreachable,
    /// As it is: the node is not well, and its turn has not come.
    Later,
}

/// All taints that the node should have, if that is not what it has. Those of others stay as they are.
pub fn wanted(node: &Node, leave: Leave, now: Timestamp) -> Option<Vec<Taint>> {
    let old = taints(node);
    let mut keys: Vec<(&str, &str)> = BY_CONDITION
        .iter()
        .filter(|(type_, status, _)| condition(node, type_).is_some_and(|c| c.status == *status))
        .map(|(_, _, key)| (*key, NO_SCHEDULE))
        .collect();
    if condition(node, "Ready").is_none() {
        keys.push((NOT_READY, NO_SCHEDULE));
    }
    if node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true)) {
        keys.push((UNSCHEDULABLE, NO_SCHEDULE));
    }
    match leave {
        Leave::Not => {}
        Leave::NotReady => keys.push((NOT_READY, NO_EXECUTE)),
        Leave::Unreachable => keys.push((UNREACHABLE, NO_EXECUTE)),
        Leave::Later => {
            let have = old.iter().filter(|t| t.effect == NO_EXECUTE && is_ours(t));
            keys.extend(have.map(|t| (t.key.as_str(), NO_EXECUTE)));
        }
    }
    let has = |t: &Taint| keys.contains(&(t.key.as_str(), t.effect.as_str()));
    let mut new: Vec<Taint> = old.iter().filter(|t| !is_ours(t) || has(t)).cloned().collect();
    for (key, effect) in keys {
        if !new.iter().any(|t| t.key == key && t.effect == effect) {
            new.push(Taint { key: key.into(), effect: effect.into(), value: None, time_added: Some(Time(now)) });
        }
    }
    (new != old).then_some(new)
}

fn is_ours(taint: &Taint) -> bool {
    match taint.effect.as_str() {
        NO_SCHEDULE => taint.key == UNSCHEDULABLE || BY_CONDITION.iter().any(|(_, _, key)| *key == taint.key),
        NO_EXECUTE => taint.key == NOT_READY || taint.key == UNREACHABLE,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn conditions_and_taints() {
        let check = |conditions: &[(&str, &str)], old: &[&str], leave: Leave, expect: Option<&[&str]>| {
            let conditions: Vec<Value> = conditions.iter().map(|(t, s)| json!({"type": t, "status": s})).collect();
            let taint = |text: &&str| {
                let (key, effect) = text.split_once(':').unwrap();
                let key = if key == "gpu" { key.to_owned() } else { format!("node.kubernetes.io/{key}") };
                json!({"key": key, "effect": effect})
            };
            let old: Vec<Value> = old.iter().map(taint).collect();
            let node: Node = serde_json::from_value(json!({
                "metadata": {"name": "n"}, "spec": {"taints": old}, "status": {"conditions": conditions},
            }))
            .unwrap();
            let found = wanted(&node, leave, Timestamp::UNIX_EPOCH);
            let text = |t: &Taint| format!("{}:{}", t.key.trim_start_matches("node.kubernetes.io/"), t.effect);
            let found: Option<Vec<String>> = found.map(|list| list.iter().map(text).collect());
            let expect: Option<Vec<String>> = expect.map(|list| list.iter().map(|t| (*t).to_owned()).collect());
            assert_eq!(found, expect);
        };
        check(&[], &["gpu:NoSchedule"], Leave::Not, Some(&["gpu:NoSchedule", "not-ready:NoSchedule"]));
        check(&[("Ready", "False")], &["gpu:NoSchedule", "not-ready:NoSchedule"], Leave::Not, None);
        check(&[("Ready", "True")], &["gpu:NoSchedule", "not-ready:NoSchedule"], Leave::Not, Some(&["gpu:NoSchedule"]));
        check(&[("Ready", "True")], &["gpu:NoExecute"], Leave::Not, None);
        let unreachable: &[&str] = &["unreachable:NoSchedule", "unreachable:NoExecute"];
        check(&[("Ready", "Unknown")], &["not-ready:NoSchedule"], Leave::Unreachable, Some(unreachable));
        check(&[("Ready", "Unknown")], unreachable, Leave::Later, None);
        check(&[("Ready", "Unknown")], &["unreachable:NoSchedule"], Leave::Later, None);
        check(
            &[("Ready", "False")],
            unreachable,
            Leave::NotReady,
            Some(&["not-ready:NoSchedule", "not-ready:NoExecute"]),
        );
        check(&[("Ready", "True")], unreachable, Leave::Not, Some(&[]));
        check(
            &[("Ready", "True"), ("MemoryPressure", "True"), ("DiskPressure", "False")],
            &["disk-pressure:NoSchedule"],
            Leave::Not,
            Some(&["memory-pressure:NoSchedule"]),
        );
        // What somebody else says by the same key and another effect is theirs.
        check(&[("Ready", "True")], &["not-ready:PreferNoSchedule"], Leave::Not, None);
    }
}
