//! Where pods go: tables of clusters, pods and the answers that upstream's documentation gives.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{
    decide::{Attempt, Search, decide},
    pod::PodInfo,
    snapshot::Snapshot,
};

const HOST: &str = "kubernetes.io/hostname";
const ZONE: &str = "topology.kubernetes.io/zone";

fn node(name: &str, zone: &str, more: Value) -> Node {
    let mut node = json!({"metadata": {"name": name, "labels": {HOST: name, ZONE: zone}},
        "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "20"}}});
    lay(&mut node, more);
    serde_json::from_value(node).unwrap()
}

/// A pod of `app=web` with `more` laid over it.
fn pod(name: &str, more: Value) -> Arc<PodInfo> {
    let mut pod = json!({"metadata": {"name": name, "namespace": "n", "uid": name, "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c"}]}});
    lay(&mut pod, more);
    Arc::new(PodInfo::new(&serde_json::from_value::<Pod>(pod).unwrap()))
}

/// Lays fields over others.
pub(crate) fn lay(object: &mut Value, more: Value) {
    match (object, more) {
        (Value::Object(to), Value::Object(from)) => {
            from.into_iter().for_each(|(key, value)| lay(to.entry(key).or_insert(Value::Null), value));
        }
        (to, from) => *to = from,
    }
}

fn cluster(nodes: &[Node], pods: &[(&str, Arc<PodInfo>)]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for node in nodes {
        snapshot.set_node(node);
    }
    for (node, pod) in pods {
        snapshot.place(pod.clone(), node);
    }
    snapshot
}

#[track_caller]
fn check(snapshot: &Snapshot, pod: &PodInfo, expect: Result<&str, &str>) {
    let found = decide(snapshot, pod, &mut Search::seeded(1)).map_err(|d| d.to_string());
    assert_eq!(found.as_deref().map_err(String::as_str), expect, "{}", pod.name);
}

fn web() -> Value {
    json!({"matchLabels": {"app": "web"}})
}

/// A required or preferred term about the company of pods.
fn company(kind: &str, key: &str, more: Value) -> Value {
    let mut term = json!({"topologyKey": key, "labelSelector": web()});
    lay(&mut term, more);
    json!({"spec": {"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}}})
}

fn liking(kind: &str, key: &str) -> Value {
    json!({"spec": {"affinity": {kind: {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 100, "podAffinityTerm": {"topologyKey": key, "labelSelector": web()}}]}}}})
}

fn spread(key: &str, more: Value) -> Value {
    let mut constraint =
        json!({"maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": "DoNotSchedule", "labelSelector": web()});
    lay(&mut constraint, more);
    json!({"spec": {"topologySpreadConstraints": [constraint]}})
}

fn both(mut a: Value, b: Value) -> Value {
    lay(&mut a, b);
    a
}

fn none() -> Value {
    json!({})
}

/// As the node lifecycle controller marks a node that nobody hears of.
fn dead(name: &str, zone: &str) -> Node {
    let taint = |effect: &str| json!({"key": "node.kubernetes.io/unreachable", "effect": effect});
    node(name, zone, json!({"spec": {"taints": [taint("NoSchedule"), taint("NoExecute")]}}))
}

fn ending() -> Value {
    json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})
}

const DEAD: &str = "1 node(s) had untolerated taint {node.kubernetes.io/unreachable: }";

#[test]
fn a_replacement_does_not_wait_for_the_pod_of_a_dead_node() {
    let anti = company("podAntiAffinity", HOST, none());
    let gone = || ("a", pod("x", both(anti.clone(), ending())));
    let other = || ("b", pod("y", anti.clone()));
    let three = cluster(&[dead("a", "z1"), node("b", "z2", none()), node("c", "z3", none())], &[gone(), other()]);
    check(&three, &pod("p", anti.clone()), Ok("c"));
    let two = cluster(&[dead("a", "z1"), node("b", "z2", none())], &[gone(), other()]);
    let why = format!("0/2 nodes are available: 1 node(s) didn't match pod anti-affinity rules, {DEAD}.");
    check(&two, &pod("p", anti.clone()), Err(&why));
    // A pod that is ending is still there for those who cannot stand it: its zone is not free, as upstream has it.
    let anti = company("podAntiAffinity", ZONE, none());
    let gone = || ("a", pod("x", both(anti.clone(), ending())));
    let other = || ("b", pod("y", anti.clone()));
    let mut zones = cluster(
        &[dead("a", "z1"), node("a2", "z1", none()), node("b", "z2", none()), node("b2", "z2", none())],
        &[gone(), other()],
    );
    let why = format!("0/4 nodes are available: 3 node(s) didn't match pod anti-affinity rules, {DEAD}.");
    check(&zones, &pod("p", anti.clone()), Err(&why));
    zones.remove("x");
    check(&zones, &pod("p", anti), Ok("a2"));
}

#[test]
fn a_dead_node_counts_as_an_empty_place_unless_taints_are_honoured() {
    let on = |more: Value| {
        let rule = spread(HOST, more);
        let nodes =
            [dead("a", "z1"), node("b", "z1", none()), node("c", "z1", json!({"spec": {"unschedulable": true}}))];
        let pods = [("a", pod("x", ending())), ("b", pod("y", none()))];
        (cluster(&nodes, &pods), pod("p", rule))
    };
    let (snapshot, waiting) = on(none());
    let why = format!(
        "0/3 nodes are available: 1 node(s) didn't match pod topology spread constraints, {DEAD}, 1 node(s) were unschedulable."
    );
    check(&snapshot, &waiting, Err(&why));
    // The cordoned node is no taint of its own here; it is an empty place, and one more is too many.
    let nodes = [dead("a", "z1"), node("b", "z1", none())];
    let snapshot = cluster(&nodes, &[("a", pod("x", ending())), ("b", pod("y", none()))]);
    let why = format!("0/2 nodes are available: 1 node(s) didn't match pod topology spread constraints, {DEAD}.");
    check(&snapshot, &pod("p", spread(HOST, none())), Err(&why));
    check(&snapshot, &pod("p", spread(HOST, json!({"nodeTaintsPolicy": "Honor"}))), Ok("b"));
}

#[test]
fn spread_counts_what_it_says() {
    let two = [node("a", "z1", none()), node("b", "z2", none())];
    let uneven =
        |n: usize| format!("0/{n} nodes are available: {n} node(s) didn't match pod topology spread constraints.");
    let even = || [("a", pod("x", none())), ("b", pod("y", none()))];
    check(&cluster(&two[..1], &even()[..1]), &pod("p", spread(ZONE, none())), Ok("a"));
    // Too few zones: as if there were an empty one.
    let few = spread(ZONE, json!({"minDomains": 3}));
    check(&cluster(&two, &even()), &pod("p", few.clone()), Err(&uneven(2)));
    check(&cluster(&two, &even()[..1]), &pod("p", few), Ok("b"));
    // A zone where the pod may not be is not an empty one, unless it is said to be.
    let only = |more: Value| both(spread(ZONE, more), json!({"spec": {"nodeSelector": {HOST: "a"}}}));
    let one = || cluster(&two, &even()[..1]);
    check(&one(), &pod("p", only(none())), Ok("a"));
    let why = "0/2 nodes are available: 1 node(s) didn't match Pod's node affinity/selector, 1 node(s) didn't match pod topology spread constraints.";
    check(&one(), &pod("p", only(json!({"nodeAffinityPolicy": "Ignore"}))), Err(why));
    // Pods of another revision do not count.
    let revision = |hash: &str, more: Value| both(more, json!({"metadata": {"labels": {"pod-template-hash": hash}}}));
    let old = cluster(&two, &[("a", pod("x", revision("1", none()))), ("b", pod("y", revision("2", none())))]);
    let keyed = spread(ZONE, json!({"matchLabelKeys": ["pod-template-hash"]}));
    check(&old, &pod("p", revision("2", keyed)), Ok("a"));
    // Nor do those of other namespaces, and those that are ending.
    let elsewhere = json!({"metadata": {"namespace": "other"}});
    let unseen = [("a", pod("x", none())), ("b", pod("y", elsewhere)), ("b", pod("z", ending()))];
    check(&cluster(&two, &unseen), &pod("p", spread(ZONE, none())), Ok("b"));
    // A node without the label is no place.
    let nowhere: Node =
        serde_json::from_value(json!({"metadata": {"name": "c"}, "status": {"allocatable": {"pods": "9"}}})).unwrap();
    let why =
        "0/1 nodes are available: 1 node(s) didn't match pod topology spread constraints (missing required label).";
    check(&cluster(&[nowhere], &[]), &pod("p", spread(ZONE, none())), Err(why));
}

#[test]
fn company_is_looked_for_where_it_is_said() {
    let two = [node("a", "z1", none()), node("b", "z2", none())];
    let elsewhere = json!({"metadata": {"namespace": "other"}});
    let mut snapshot = cluster(&two, &[("a", pod("x", elsewhere))]);
    snapshot.namespaces.insert("other".into(), [("team".to_owned(), "red".to_owned())].into());
    snapshot.namespaces.insert("n".into(), [("team".to_owned(), "blue".to_owned())].into());
    let own = json!({"metadata": {"labels": {"app": "own"}}});
    let needs = |more: Value| pod("p", both(company("podAffinity", ZONE, more), own.clone()));
    let missing = Err("0/2 nodes are available: 2 node(s) didn't match pod affinity rules.");
    check(&snapshot, &needs(none()), missing);
    check(&snapshot, &needs(json!({"namespaces": ["other"]})), Ok("a"));
    check(&snapshot, &needs(json!({"namespaceSelector": {}})), Ok("a"));
    check(&snapshot, &needs(json!({"namespaceSelector": {"matchLabels": {"team": "red"}}})), Ok("a"));
    check(&snapshot, &needs(json!({"namespaceSelector": {"matchLabels": {"team": "blue"}}})), missing);
    let named = json!({"namespaces": ["other"], "namespaceSelector": {"matchLabels": {"team": "blue"}}});
    check(&snapshot, &needs(named), Ok("a"));
    // The keys narrow what is meant to the pod's own, or to others'.
    let tenant = |name: &str| json!({"metadata": {"labels": {"tenant": name}}});
    let shared = cluster(&two, &[("a", pod("x", tenant("red"))), ("b", pod("y", tenant("blue")))]);
    let with = |kind: &str, more: Value| pod("p", both(company(kind, ZONE, more), tenant("blue")));
    check(&shared, &with("podAffinity", json!({"matchLabelKeys": ["tenant"]})), Ok("b"));
    check(&shared, &with("podAntiAffinity", json!({"mismatchLabelKeys": ["tenant"]})), Ok("b"));
    // All terms have to be met by the same pods.
    let terms = |keys: [&str; 2]| {
        let term = |label: &str| json!({"topologyKey": ZONE, "labelSelector": {"matchLabels": {label: "yes"}}});
        pod(
            "p",
            json!({"spec": {"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            term(keys[0]), term(keys[1])]}}}}),
        )
    };
    let labels = |l: Value| json!({"metadata": {"labels": l}});
    let apart = [("a", pod("x", labels(json!({"s": "yes"})))), ("a", pod("y", labels(json!({"t": "yes"}))))];
    check(&cluster(&two, &apart), &terms(["s", "t"]), missing);
    let together = [("b", pod("x", labels(json!({"s": "yes", "t": "yes"}))))];
    check(&cluster(&two, &together), &terms(["s", "t"]), Ok("b"));
}

#[test]
fn wishes_are_weighed() {
    let two = || [node("a", "z1", none()), node("b", "z2", none())];
    // The node that would be taken otherwise is the emptier one.
    let load = || {
        pod(
            "load",
            json!({"metadata": {"labels": {"app": "load"}}, "spec": {"containers": [
        {"name": "c", "resources": {"requests": {"cpu": "1", "memory": "2Gi"}}}]}}),
        )
    };
    let on_a = || cluster(&two(), &[("a", load()), ("a", pod("x", none()))]);
    check(&on_a(), &pod("p", none()), Ok("b"));
    check(&on_a(), &pod("p", liking("podAffinity", ZONE)), Ok("a"));
    let on_b = || cluster(&two(), &[("a", load()), ("b", pod("x", none()))]);
    check(&on_b(), &pod("p", none()), Ok("b"));
    check(&on_b(), &pod("p", liking("podAntiAffinity", ZONE)), Ok("a"));
    check(&on_b(), &pod("p", spread(ZONE, json!({"whenUnsatisfiable": "ScheduleAnyway"}))), Ok("a"));
    // Those that are there have wishes too, and one who needs company likes more of it.
    let fond = cluster(&two(), &[("a", load()), ("a", pod("x", liking("podAffinity", ZONE)))]);
    check(&fond, &pod("p", none()), Ok("a"));
    let needy = cluster(&two(), &[("a", load()), ("a", pod("x", company("podAffinity", ZONE, none())))]);
    check(&needy, &pod("p", none()), Ok("a"));
}

#[test]
fn replicas_are_spread_without_asking() {
    let nodes = || [node("a", "z1", none()), node("b", "z1", none()), node("c", "z2", none())];
    let load = pod(
        "load",
        json!({"metadata": {"labels": {"app": "load"}}, "spec": {"containers": [
        {"name": "c", "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}}}]}}),
    );
    let owned = json!({"metadata": {"ownerReferences": [
        {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "w", "controller": true}]}});
    let mut snapshot = cluster(&nodes(), &[("c", load), ("a", pod("x", owned.clone()))]);
    // Unknown company: the emptiest node.
    check(&snapshot, &pod("p", owned.clone()), Ok("b"));
    let selector = serde_json::from_value(web()).unwrap();
    snapshot.set_selector("n", "ReplicaSet", "web", Some(&selector));
    check(&snapshot, &pod("p", owned.clone()), Ok("c"));
    snapshot.set_selector("n", "ReplicaSet", "web", None);
    check(&snapshot, &pod("p", owned.clone()), Ok("b"));
    snapshot.set_selector("n", "Service", "web", Some(&selector));
    check(&snapshot, &pod("p", owned), Ok("c"));
}

#[test]
fn a_large_cluster_is_searched_in_parts() {
    let search = Search::seeded(1);
    let mut set = Search::seeded(1);
    set.percentage = 10;
    for (nodes, adaptive, tenth) in
        [(50, 50, 50), (150, 100, 100), (1000, 420, 100), (5000, 500, 500), (10_000, 500, 1000)]
    {
        assert_eq!((search.enough(nodes), set.enough(nodes)), (adaptive, tenth), "{nodes}");
    }
    // Any stretch of the order has its share of each zone, and every node has its turn.
    let nodes: Vec<Node> =
        (0..300).map(|i| node(&format!("n{i}"), if i < 200 { "big" } else { "small" }, none())).collect();
    let mut snapshot = cluster(&nodes, &[]);
    let zones: Vec<&str> =
        snapshot.order()[..100].iter().map(|s| snapshot.at(*s).facts.labels[ZONE].as_str()).collect();
    assert_eq!(zones.iter().filter(|z| **z == "small").count(), 50);
    let (mut search, mut used) = (Search::seeded(1), std::collections::BTreeSet::new());
    for number in 0..300 {
        let pod = pod(&format!("p{number}"), none());
        let node = decide(&snapshot, &pod, &mut search).unwrap();
        snapshot.place(pod, &node);
        used.insert(node);
    }
    assert!(used.len() > 280, "{}", used.len());
}

/// One of a few kinds of pods that mind each other.
fn kind(number: usize) -> Value {
    match number % 5 {
        0 => none(),
        1 => company("podAntiAffinity", ZONE, none()),
        2 => company("podAffinity", HOST, none()),
        3 => spread(ZONE, none()),
        _ => both(spread(HOST, none()), json!({"metadata": {"labels": {"app": "other"}}})),
    }
}

proptest! {
    /// What is supposed to have happened is judged like what has happened.
    #[test]
    fn supposing_is_the_same_as_doing(
        there in proptest::collection::vec((0usize..6, 0usize..5), 1..20), gone in 0usize..20, came in (0usize..6, 0usize..5), asks in 0usize..5,
    ) {
        let nodes: Vec<Node> = (0..6).map(|i| node(&format!("n{i}"), &format!("z{}", i % 3), none())).collect();
        let mut snapshot = cluster(&nodes, &[]);
        for (index, (on, of)) in there.iter().enumerate() {
            snapshot.place(pod(&format!("p{index}"), kind(*of)), &format!("n{on}"));
        }
        let (asking, gone) = (pod("asking", kind(asks)), format!("p{}", gone % there.len()));
        let new = pod("new", kind(came.1));
        let supposed: Vec<_> = {
            let mut attempt = Attempt::new(&snapshot, &asking);
            let mut nodes: Vec<_> = snapshot.known().cloned().collect();
            let left = snapshot.pod(&gone).unwrap().1.slot;
            let left = nodes.iter().position(|n| n.slot == left).unwrap();
            attempt.remove(&mut nodes[left], &gone);
            let joined = nodes.iter().position(|n| n.facts.name == format!("n{}", came.0)).unwrap();
            attempt.add(&mut nodes[joined], new.clone());
            nodes.iter().map(|n| attempt.fits(n)).collect()
        };
        snapshot.remove(&gone);
        snapshot.place(new, &format!("n{}", came.0));
        let attempt = Attempt::new(&snapshot, &asking);
        let done: Vec<_> = snapshot.known().map(|n| attempt.fits(n)).collect();
        prop_assert_eq!(supposed, done);
    }
}
