use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSetStatus};
use serde_json::{Value, json};

use super::*;
use crate::runtime::objects::controller_reference;

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn set(spec: Value) -> DaemonSet {
    let mut full = json!({"selector": {"matchLabels": {"a": "1"}},
        "template": {"metadata": {"labels": {"a": "1"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}});
    for (key, value) in spec.as_object().unwrap() {
        full[key] = value.clone();
    }
    serde_json::from_value(
        json!({"metadata": {"name": "d", "namespace": "n", "uid": "d", "generation": 3}, "spec": full}),
    )
    .unwrap()
}

fn node(name: &str, taints: Value) -> Arc<Node> {
    let labels = json!({"zone": name});
    Arc::new(
        serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}, "spec": {"taints": taints}}))
            .unwrap(),
    )
}

fn revision(hash: &str) -> ControllerRevision {
    let meta = json!({"name": format!("d-{hash}"), "labels": {"controller-revision-hash": hash}});
    serde_json::from_value(json!({"metadata": meta, "data": {}, "revision": 1})).unwrap()
}

/// `NODE MARKS`: `n` or `o` for a new or old revision, then `r` ready, `w` not ready, `f` failed, `s` succeeded; `-` deleting,
/// `?` not bound yet. The name is both words.
fn pod(what: &str) -> Arc<Pod> {
    let (node, marks) = what.split_once(' ').unwrap();
    let has = |mark: char| marks.contains(mark);
    let phase = if has('f') {
        "Failed"
    } else if has('s') {
        "Succeeded"
    } else {
        "Running"
    };
    let mut pod = node::make(&set(json!({})), if has('n') { "new" } else { "old" }, node);
    pod.metadata.name = Some(what.into());
    pod.metadata.uid = Some(what.into());
    let mut value = serde_json::to_value(&pod).unwrap();
    value["metadata"]["creationTimestamp"] = "2025-12-31T00:00:00Z".into();
    if !has('?') {
        value["spec"]["nodeName"] = node.into();
    }
    if has('-') {
        value["metadata"]["deletionTimestamp"] = "2025-12-31T00:00:00Z".into();
    }
    let ready = if has('r') { "True" } else { "False" };
    value["status"] = json!({"phase": phase,
        "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": "2025-12-31T23:59:30Z"}]});
    Arc::new(serde_json::from_value(value).unwrap())
}

/// What is created, and what is deleted.
fn planned(spec: Value, nodes: &[&str], pods: &[&str], backoff: &mut Backoff, now: Timestamp) -> Plan {
    let nodes: Vec<_> = nodes.iter().map(|name| node(name, json!([]))).collect();
    let pods: Vec<_> = pods.iter().map(|what| pod(what)).collect();
    plan(&Input { set: &set(spec), nodes: &nodes, pods: &pods, current: &revision("new"), now }, backoff)
}

fn done(plan: &Plan) -> (Vec<&str>, Vec<&str>) {
    let deleted = plan.delete.iter().map(|(pod, _)| name(&**pod)).collect();
    (plan.create.iter().map(String::as_str).collect(), deleted)
}

fn check(spec: Value, nodes: &[&str], pods: &[&str], create: &[&str], delete: &[&str]) {
    let made = planned(spec.clone(), nodes, pods, &mut Backoff::default(), now());
    assert_eq!(done(&made), (create.to_vec(), delete.to_vec()), "{spec} on {nodes:?} with {pods:?}");
}

#[test]
fn a_pod_for_every_node() {
    let plain = || json!({});
    check(plain(), &["x", "y"], &[], &["x", "y"], &[]);
    check(plain(), &["x", "y"], &["x nr"], &["y"], &[]);
    check(plain(), &["x"], &["x n?"], &[], &[]);
    // One that goes is waited for, unless only a finalizer keeps it.
    check(plain(), &["x"], &["x nr-"], &[], &[]);
    check(plain(), &["x"], &["x nf-"], &["x"], &[]);
    check(plain(), &["x"], &["x ns"], &[], &["x ns"]);
    check(plain(), &["x"], &["x nf"], &[], &["x nf"]);
    // Of two, the one that is bound stays.
    check(plain(), &["x"], &["x n?", "x nr"], &[], &["x n?"]);
    // Of a node that is gone, only what waits is ours to delete.
    check(plain(), &["x"], &["x nr", "y n?", "z nr"], &[], &["y n?"]);
    let zone = |zone: &str| json!({"template": {"spec": {"containers": [], "nodeSelector": {"zone": zone}}}});
    check(zone("x"), &["x", "y"], &["y nr"], &["x"], &["y nr"]);
    check(zone("z"), &["x"], &["x nr"], &[], &["x nr"]);
}

#[test]
fn an_update_leaves_enough() {
    let limits = |unavailable: Value, surge: Value| {
        json!({"updateStrategy": {"type": "RollingUpdate",
            "rollingUpdate": {"maxUnavailable": unavailable, "maxSurge": surge}}})
    };
    let one = || limits(1.into(), 0.into());
    let four = ["a", "b", "c", "d"];
    check(one(), &four, &["a or", "b or", "c or", "d or"], &[], &["a or"]);
    check(one(), &four, &["a nr", "b or", "c or", "d or"], &[], &["b or"]);
    check(one(), &four, &["a nw", "b or", "c or", "d or"], &[], &[]);
    check(one(), &four, &["a or-", "b or", "c or", "d or"], &[], &[]);
    // What does not work costs nothing, but it counts.
    check(one(), &four, &["a ow", "b or", "c or", "d or"], &[], &["a ow"]);
    check(one(), &four, &["a ow", "b ow", "c or", "d or"], &[], &["a ow", "b ow"]);
    check(limits("50%".into(), 0.into()), &four, &["a or", "b or", "c or", "d or"], &[], &["a or", "b or"]);
    check(limits("30%".into(), 0.into()), &four, &["a or", "b or", "c or", "d or"], &[], &["a or", "b or"]);
    check(limits("30%".into(), 0.into()), &four, &["a nw", "b or", "c or", "d or"], &[], &["b or"]);
    // A node that is gone holds nothing up.
    check(one(), &["a"], &["a or", "b nw"], &[], &["a or"]);
    // Nodes come first: what is missing is made before anything goes.
    check(one(), &four, &["a or", "b or", "c or"], &["d"], &[]);
    let on_delete = || json!({"updateStrategy": {"type": "OnDelete"}});
    check(on_delete(), &four, &["a or", "b or", "c or", "d or"], &[], &[]);
    check(on_delete(), &four, &["a or", "b or", "c or"], &["d"], &[]);
}

#[test]
fn a_surge_has_both_for_a_while() {
    let surge = |surge: Value| json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": surge}}});
    let two = ["a", "b"];
    check(surge(1.into()), &two, &["a or", "b or"], &["a"], &[]);
    check(surge(1.into()), &two, &["a or", "a nw", "b or"], &[], &[]);
    check(surge(1.into()), &two, &["a or", "a nr", "b or"], &[], &["a or"]);
    check(surge(1.into()), &two, &["a nr", "b or"], &["b"], &[]);
    check(surge(2.into()), &two, &["a or", "b or"], &["a", "b"], &[]);
    check(surge("10%".into()), &two, &["a or", "b or"], &["a"], &[]);
    // An old pod that does not work is not waited for.
    check(surge(1.into()), &two, &["a ow", "a nw", "b or"], &[], &["a ow"]);
    check(surge(1.into()), &two, &["a ow", "b or"], &["a", "b"], &[]);
    // Two of one kind are one too many.
    check(surge(1.into()), &["a"], &["a nr", "a nr2"], &[], &["a nr2"]);
}

#[test]
fn failures_are_replaced_later_and_later() {
    let mut backoff = Backoff::default();
    let mut at = now();
    let mut waits = Vec::new();
    for _ in 0..14 {
        let made = planned(json!({}), &["x"], &["x nf"], &mut backoff, at);
        assert_eq!(done(&made).1, ["x nf"]);
        let made = planned(json!({}), &["x"], &["x nf"], &mut backoff, at);
        assert!(made.delete.is_empty(), "not again at once");
        let wait = made.again.unwrap();
        waits.push(wait.as_secs());
        at = at.checked_add(jiff::SignedDuration::try_from(wait).unwrap()).unwrap();
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900, 900]);
    let later = at.checked_add(jiff::SignedDuration::from_hours(1)).unwrap();
    planned(json!({}), &["x"], &["x nf"], &mut backoff, later);
    let made = planned(json!({}), &["x"], &["x nf"], &mut backoff, later);
    assert_eq!(made.again, Some(Duration::from_secs(1)), "an hour without a failure begins anew");
}

#[test]
fn what_the_status_says() {
    let nodes = ["a", "b", "c", "d"];
    let spec = json!({"minReadySeconds": 40, "template": {"spec": {"containers": [],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["d"]}]}]}}}}}});
    let made = planned(spec, &nodes, &["a nr", "b ow", "d nr"], &mut Backoff::default(), now());
    let expect = DaemonSetStatus {
        observed_generation: Some(3),
        desired_number_scheduled: 3,
        current_number_scheduled: 2,
        number_misscheduled: 1,
        number_ready: 1,
        number_available: None,
        number_unavailable: Some(3),
        updated_number_scheduled: Some(1),
        collision_count: None,
        conditions: None,
    };
    assert_eq!(made.status, expect);
    assert_eq!(made.again, Some(Duration::from_secs(10)), "ready for 30 of 40 seconds");
}

#[test]
fn taints_and_tolerations() {
    let taint = |key: &str, effect: &str| json!([{"key": key, "effect": effect}]);
    let check = |taints: Value, spec: Value, expect: Fit| {
        let mut template = json!({"containers": []});
        for (key, value) in spec.as_object().unwrap() {
            template[key] = value.clone();
        }
        let set = set(json!({"template": {"spec": template}}));
        assert_eq!(fit(&set, &node("x", taints.clone())), expect, "{taints} with {spec}");
    };
    check(json!([]), json!({}), Fit::Run);
    for (key, effect) in [("not-ready", "NoExecute"), ("unreachable", "NoExecute"), ("unschedulable", "NoSchedule")] {
        check(taint(&format!("node.kubernetes.io/{key}"), effect), json!({}), Fit::Run);
    }
    check(taint("node.kubernetes.io/not-ready", "NoSchedule"), json!({}), Fit::Stay);
    check(taint("mine", "NoSchedule"), json!({}), Fit::Stay);
    check(taint("mine", "NoExecute"), json!({}), Fit::Not);
    check(taint("mine", "PreferNoSchedule"), json!({}), Fit::Run);
    check(taint("mine", "NoExecute"), json!({"tolerations": [{"operator": "Exists"}]}), Fit::Run);
    check(taint("node.kubernetes.io/network-unavailable", "NoSchedule"), json!({}), Fit::Stay);
    check(taint("node.kubernetes.io/network-unavailable", "NoSchedule"), json!({"hostNetwork": true}), Fit::Run);
    check(json!([]), json!({"nodeName": "y"}), Fit::Not);

    let own = json!({"tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}]});
    let spec = set(json!({"template": {"spec": {"containers": [], "tolerations": own["tolerations"]}}})).spec;
    let all = node::tolerations(&spec.template.spec.unwrap());
    assert_eq!(all.len(), 6);
    assert!(all.iter().all(|t| t.toleration_seconds.is_none()), "a daemon's pod stays however long it takes");
}

#[test]
fn its_pods_can_go_nowhere_else() {
    let pod = node::make(&set(json!({})), "hash", "x");
    assert_eq!(pod.metadata.generate_name.as_deref(), Some("d-"));
    assert_eq!(pod.metadata.labels.as_ref().unwrap()["controller-revision-hash"], "hash");
    assert_eq!(pod.metadata.owner_references, Some(vec![controller_reference(&set(json!({})))]));
    assert_eq!(node::target(&pod), Some("x"));
}

#[test]
fn history_is_kept_within_its_limit() {
    let revisions: Vec<_> = ["1", "2", "3", "4", "5", "new"].map(revision).map(Arc::new).to_vec();
    let surplus = |limit: i64, pods: &[Arc<Pod>]| -> Vec<String> {
        let set = set(json!({"revisionHistoryLimit": limit}));
        let surplus = plan::surplus(&set, &revisions, &revision("new"), pods);
        surplus.iter().map(|r| name(&**r).to_owned()).collect()
    };
    assert_eq!(surplus(3, &[]), ["d-1", "d-2"]);
    assert_eq!(surplus(5, &[]), [""; 0]);
    let mut used = Pod::clone(&pod("x or"));
    used.metadata.labels.as_mut().unwrap().insert("controller-revision-hash".into(), "1".into());
    assert_eq!(surplus(3, &[Arc::new(used)]), ["d-2", "d-3"], "what runs is kept");
}
