//! Questions that several controllers ask of objects, and claims on them. All pure.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::core::v1::{Pod, PodCondition, PodTemplateSpec},
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, LabelSelectorRequirement, OwnerReference},
        util::intstr::IntOrString,
    },
};
use kube::Resource;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Labels or annotations.
pub type Labels = BTreeMap<String, String>;

/// The object's uid, or nothing.
pub fn uid<K: Resource>(object: &K) -> &str {
    object.meta().uid.as_deref().unwrap_or_default()
}

/// The object's name, or nothing.
pub fn name<K: Resource>(object: &K) -> &str {
    object.meta().name.as_deref().unwrap_or_default()
}

/// The object's namespace, or nothing.
pub fn namespace<K: Resource>(object: &K) -> &str {
    object.meta().namespace.as_deref().unwrap_or_default()
}

/// Whether the object is on its way out.
pub fn is_deleting<K: Resource>(object: &K) -> bool {
    object.meta().deletion_timestamp.is_some()
}

/// When it was created; the epoch if that is not recorded.
pub fn created<K: Resource>(object: &K) -> Timestamp {
    object.meta().creation_timestamp.as_ref().map(|t| t.0).unwrap_or_default()
}

/// The value of an annotation.
pub fn annotation<'a, K: Resource>(object: &'a K, key: &str) -> Option<&'a str> {
    object.meta().annotations.as_ref()?.get(key).map(String::as_str)
}

/// The owner that controls the object.
pub fn controller_of<K: Resource>(object: &K) -> Option<&OwnerReference> {
    object.meta().owner_references.as_ref()?.iter().find(|owner| owner.controller == Some(true))
}

/// A reference that makes `owner` the controller.
pub fn controller_reference<K: Resource<DynamicType = ()>>(owner: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: name(owner).to_owned(),
        uid: uid(owner).to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// A condition of a pod.
pub fn pod_condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_)
}

/// The phase of a pod, or nothing.
pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Whether the pod has ended.
pub fn is_finished(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Whether the pod counts as a replica: neither ended nor being deleted.
pub fn is_active(pod: &Pod) -> bool {
    !is_finished(pod) && !is_deleting(pod)
}

/// Whether the pod is ready.
pub fn is_ready(pod: &Pod) -> bool {
    pod_condition(pod, "Ready").is_some_and(|condition| condition.status == "True")
}

/// Since when the pod is ready, if it is.
pub fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let ready = pod_condition(pod, "Ready").filter(|condition| condition.status == "True")?;
    Some(ready.last_transition_time.as_ref().map(|t| t.0).unwrap_or_default())
}

/// Whether the pod has been ready for `min_ready_seconds`; if it is ready but not for long enough, what is missing.
pub fn is_available(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Result<bool, SignedDuration> {
    match ready_since(pod) {
        None => Ok(false),
        Some(_) if min_ready_seconds == 0 => Ok(true),
        Some(since) => {
            let missing = SignedDuration::from_secs(min_ready_seconds.into()) - now.duration_since(since);
            if missing.is_positive() { Err(missing) } else { Ok(true) }
        }
    }
}

/// Whether labels are selected. An absent selector selects nothing, an empty one everything.
pub fn selects(selector: Option<&LabelSelector>, labels: Option<&Labels>) -> bool {
    let Some(selector) = selector else { return false };
    let get = |key: &str| labels.and_then(|labels| labels.get(key));
    let equal = selector.match_labels.iter().flatten().all(|(key, value)| get(key) == Some(value));
    equal && selector.match_expressions.iter().flatten().all(|e| requirement_holds(e, get(&e.key)))
}

fn requirement_holds(requirement: &LabelSelectorRequirement, value: Option<&String>) -> bool {
    let listed = |value| requirement.values.iter().flatten().any(|v| v == value);
    match requirement.operator.as_str() {
        "In" => value.is_some_and(listed),
        "NotIn" => !value.is_some_and(listed),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        _ => false,
    }
}

/// Whether a selector selects everything, which upstream's workload controllers refuse to act on.
pub fn selects_everything(selector: &LabelSelector) -> bool {
    selector.match_labels.as_ref().is_none_or(BTreeMap::is_empty)
        && selector.match_expressions.as_ref().is_none_or(Vec::is_empty)
}

/// A number, or a share of `total`, rounded up or down.
pub fn scaled(value: Option<&IntOrString>, default: i32, total: i32, up: bool) -> i32 {
    match value {
        None => default,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(text)) => {
            let percent: i64 = text.strip_suffix('%').and_then(|n| n.parse().ok()).unwrap_or(0);
            let product = percent * i64::from(total);
            let share = if up { (product + 99).div_euclid(100) } else { product.div_euclid(100) };
            share.clamp(0, i32::MAX.into()) as i32
        }
    }
}

/// A short name for what a template says, safe within a DNS label and without vowels, as upstream's are.
pub fn template_hash(template: &PodTemplateSpec, collisions: i32) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    // JSON of a typed object has its fields in one order and its maps sorted.
    let text = serde_json::to_vec(template).unwrap_or_default();
    let digest = Sha256::new().chain_update(&text).chain_update(collisions.to_le_bytes()).finalize();
    digest.iter().take(10).map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()])).collect()
}

/// What to do about one object that a controller might own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is ours and matches.
    Keep,
    /// It matches and nobody controls it.
    Adopt,
    /// It is ours but no longer matches.
    Release,
    /// It is none of our business.
    Ignore,
}

/// Decides a claim as upstream's `ControllerRefManager` does.
pub fn claim<K: Resource>(object: &K, owner_uid: &str, owner_is_deleting: bool, selector: &LabelSelector) -> Claim {
    let matches = selects(Some(selector), object.meta().labels.as_ref());
    match controller_of(object) {
        Some(owner) if owner.uid != owner_uid => Claim::Ignore,
        Some(_) if matches => Claim::Keep,
        Some(_) if owner_is_deleting || is_deleting(object) => Claim::Keep,
        Some(_) => Claim::Release,
        None if matches && !owner_is_deleting && !is_deleting(object) => Claim::Adopt,
        None => Claim::Ignore,
    }
}

/// The patch with which `owner` adopts `object`. The uid makes it fail if the name now means another object.
pub fn adopt_patch<K: Resource, O: Resource<DynamicType = ()>>(object: &K, owner: &O) -> Value {
    let mut owners = object.meta().owner_references.clone().unwrap_or_default();
    owners.push(controller_reference(owner));
    owners_patch(object, owners)
}

/// The patch with which the owner `owner_uid` lets go of `object`.
pub fn release_patch<K: Resource>(object: &K, owner_uid: &str) -> Value {
    let mut owners = object.meta().owner_references.clone().unwrap_or_default();
    owners.retain(|owner| owner.uid != owner_uid);
    owners_patch(object, owners)
}

/// Replaces the owners of `object`, if nobody else changed it meanwhile.
pub fn owners_patch<K: Resource>(object: &K, owners: Vec<OwnerReference>) -> Value {
    let meta = object.meta();
    json!({"metadata": {"uid": meta.uid, "resourceVersion": meta.resource_version, "ownerReferences": owners}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_rounded_as_asked() {
        let check = |text: &str, total, up, expected| {
            let value = IntOrString::String(text.into());
            assert_eq!(scaled(Some(&value), 0, total, up), expected, "{text} of {total}");
        };
        check("25%", 10, true, 3);
        check("25%", 10, false, 2);
        check("0%", 10, true, 0);
        check("100%", 7, false, 7);
        check("25%", 1, true, 1);
        check("25%", 1, false, 0);
        assert_eq!(scaled(Some(&IntOrString::Int(4)), 0, 10, true), 4);
        assert_eq!(scaled(None, 1, 10, true), 1);
    }

    #[test]
    fn selectors() {
        let check = |selector: Value, labels: &[(&str, &str)], expected| {
            let parsed: LabelSelector = serde_json::from_value(selector.clone()).unwrap();
            let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            assert_eq!(selects(Some(&parsed), Some(&labels)), expected, "{selector} on {labels:?}");
        };
        let expression = |operator, values: &[&str]| json!({"matchExpressions": [{"key": "a", "operator": operator, "values": values}]});
        check(json!({}), &[], true);
        check(json!({"matchLabels": {"a": "1"}}), &[("a", "1"), ("b", "2")], true);
        check(json!({"matchLabels": {"a": "1"}}), &[("a", "2")], false);
        check(expression("In", &["1", "2"]), &[("a", "2")], true);
        check(expression("In", &["1"]), &[], false);
        check(expression("NotIn", &["1"]), &[], true);
        check(expression("NotIn", &["1"]), &[("a", "1")], false);
        check(expression("Exists", &[]), &[("a", "")], true);
        check(expression("DoesNotExist", &[]), &[("a", "")], false);
        assert!(!selects(None, None));
    }

    #[test]
    fn claims() {
        let selector: LabelSelector = serde_json::from_value(json!({"matchLabels": {"a": "1"}})).unwrap();
        let check = |labels: Value, owner: Option<&str>, owner_is_deleting, expected| {
            let owners: Vec<Value> = owner
                .map(|uid| json!({"apiVersion": "v1", "kind": "X", "name": "x", "uid": uid, "controller": true}))
                .into_iter()
                .collect();
            let pod: Pod =
                serde_json::from_value(json!({"metadata": {"labels": labels, "ownerReferences": owners}})).unwrap();
            assert_eq!(claim(&pod, "me", owner_is_deleting, &selector), expected, "{labels} {owner:?}");
        };
        check(json!({"a": "1"}), Some("me"), false, Claim::Keep);
        check(json!({"a": "2"}), Some("me"), false, Claim::Release);
        check(json!({"a": "1"}), None, false, Claim::Adopt);
        check(json!({"a": "1"}), None, true, Claim::Ignore);
        check(json!({"a": "2"}), None, false, Claim::Ignore);
        check(json!({"a": "1"}), Some("other"), false, Claim::Ignore);
    }
}
