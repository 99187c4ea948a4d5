//! Preemption: a pod that fits nowhere makes room at the cost of less important ones
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/pod-priority-preemption/>). Pure: a snapshot, a pod and
//! what was found out about it give a node and those who have to go.

use std::{cmp::Reverse, collections::HashMap, fmt, sync::Arc};

use jiff::Timestamp;

use crate::{
    decide::{Attempt, Diagnosis},
    pod::PodInfo,
    snapshot::{NodeInfo, Snapshot},
};

/// Room for a pod.
#[derive(Clone, Debug)]
pub struct Preemption {
    /// The node.
    pub node: String,
    /// Those who have to go, the most important first.
    pub victims: Vec<Arc<PodInfo>>,
    /// How many of them a budget would have protected.
    pub violations: usize,
    /// Less important pods for which room was being made there: they have to look again.
    pub demoted: Vec<Arc<PodInfo>>,
}

/// Why no room is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hopeless {
    /// The pod waits for room.
    Patient,
    /// Pods are ending already to make room for it.
    Ending,
    /// There is no node where it would help.
    Nowhere {
        /// How many nodes there are.
        nodes: usize,
        /// On how many of them nobody less important could go so that it would fit.
        tried: usize,
    },
}

impl fmt::Display for Hopeless {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Hopeless::Patient => f.write_str("not eligible due to preemptionPolicy=Never."),
            Hopeless::Ending => f.write_str("not eligible due to a terminating pod on the nominated node."),
            Hopeless::Nowhere { nodes, tried } => {
                let part = |count: usize, text: &str| (count > 0).then(|| format!("{count} {text}"));
                let parts = [
                    part(*tried, "No preemption victims found for incoming pod"),
                    part(nodes - tried, "Preemption is not helpful for scheduling"),
                ];
                let parts: Vec<String> = parts.into_iter().flatten().collect();
                write!(f, "0/{nodes} nodes are available: {}.", parts.join(", "))
            }
        }
    }
}

/// Of a large cluster not every node is tried: a tenth of them, and at least this many.
const CANDIDATES: usize = 100;

/// Finds room for a pod that [`decide`](crate::decide::decide) found none for. The search begins at the `offset`th of
/// the nodes that come into question, which is for chance to choose.
pub fn plan(snapshot: &Snapshot, pod: &PodInfo, diagnosis: &Diagnosis, offset: usize) -> Result<Preemption, Hopeless> {
    if pod.patient {
        return Err(Hopeless::Patient);
    }
    if let Some(node) = snapshot.nomination(&pod.uid).or(pod.nominated.as_deref()).and_then(|n| snapshot.node(n)) {
        // Unless the node is out of the question by now.
        let possible = diagnosis.crowded.contains(&node.slot);
        if possible && node.pods.values().any(|p| p.preempted && p.priority < pod.priority) {
            return Err(Hopeless::Ending);
        }
    }
    let crowded = &diagnosis.crowded;
    if snapshot.lowest_priority().is_none_or(|lowest| lowest >= pod.priority) {
        return Err(Hopeless::Nowhere { nodes: diagnosis.nodes, tried: crowded.len() });
    }
    let start = if crowded.is_empty() { 0 } else { offset % crowded.len() };
    let enough = CANDIDATES.max(diagnosis.nodes / 10);
    let attempt = Attempt::new(snapshot, pod);
    let (mut candidates, mut harmless, mut tried) = (Vec::new(), false, 0);
    for slot in crowded[start..].iter().chain(&crowded[..start]) {
        // One that breaks no budget has to be among them, if there is one.
        if candidates.len() >= enough && harmless {
            break;
        }
        tried += 1;
        if let Some(candidate) = victims(&attempt, snapshot, pod, snapshot.at(*slot)) {
            harmless |= candidate.1 == 0;
            candidates.push(candidate);
        }
    }
    let best = candidates.into_iter().min_by_key(|(_, violations, victims)| cost(*violations, victims));
    let Some((node, violations, victims)) = best else {
        return Err(Hopeless::Nowhere { nodes: diagnosis.nodes, tried });
    };
    let demoted = snapshot.nominated(&node).iter().filter(|p| p.priority < pod.priority).cloned().collect();
    Ok(Preemption { node, victims, violations, demoted })
}

/// What is compared between nodes, in upstream's order: budgets broken; the most important victim; the sum of
/// priorities; how many; and how long the most important ones have been running, those that began last going first.
fn cost(violations: usize, victims: &[Arc<PodInfo>]) -> (usize, i32, i64, usize, Reverse<Timestamp>) {
    let highest = victims.iter().map(|v| v.priority).max().unwrap_or(i32::MIN);
    // Counted from the lowest there is, so that a pod of negative priority is not better than none.
    let sum = victims.iter().map(|v| i64::from(v.priority) - i64::from(i32::MIN) + 1).sum();
    let earliest = victims.iter().filter(|v| v.priority == highest).map(|v| started(v)).min();
    (violations, highest, sum, victims.len(), Reverse(earliest.unwrap_or(Timestamp::MAX)))
}

/// A pod that has not begun yet began last.
fn started(pod: &PodInfo) -> Timestamp {
    pod.started.unwrap_or(Timestamp::MAX)
}

/// Who would have to go from a node: everyone less important, except those that can stay after all. Those protected by
/// a budget are asked to stay first, then the most important.
fn victims(
    attempt: &Attempt<'_>,
    snapshot: &Snapshot,
    pod: &PodInfo,
    node: &NodeInfo,
) -> Option<(String, usize, Vec<Arc<PodInfo>>)> {
    let mut lesser: Vec<Arc<PodInfo>> = node.pods.values().filter(|p| p.priority < pod.priority).cloned().collect();
    if lesser.is_empty() {
        return None;
    }
    // The name settles it where nothing else does, so that the same snapshot gives the same plan.
    lesser.sort_by_cached_key(|p| (Reverse(p.priority), started(p), p.key()));
    let (mut attempt, mut there) = (attempt.clone(), node.clone());
    lesser.iter().for_each(|p| attempt.remove(&mut there, &p.uid));
    attempt.fits(&there).ok()?;
    let (protected, free) = by_budget(snapshot, &lesser);
    let (mut victims, mut violations) = (Vec::new(), 0);
    for (other, is_protected) in protected.into_iter().map(|p| (p, true)).chain(free.into_iter().map(|p| (p, false))) {
        attempt.add(&mut there, other.clone());
        if attempt.fits(&there).is_err() {
            attempt.remove(&mut there, &other.uid);
            violations += usize::from(is_protected);
            victims.push(other);
        }
    }
    victims.sort_by_cached_key(|p| (Reverse(p.priority), started(p), p.key()));
    (!victims.is_empty()).then(|| (node.facts.name.clone(), violations, victims))
}

/// Tells apart those whose going would break a budget, if all of them went in this order.
fn by_budget(snapshot: &Snapshot, pods: &[Arc<PodInfo>]) -> (Vec<Arc<PodInfo>>, Vec<Arc<PodInfo>>) {
    let mut left: HashMap<&(String, String), i64> = HashMap::new();
    pods.iter().cloned().partition(|pod| {
        let mut broken = false;
        let from = (pod.namespace.clone(), String::new());
        let of_namespace = snapshot.budgets.range(from..).take_while(|((ns, _), _)| *ns == pod.namespace);
        for (key, budget) in of_namespace {
            let selector = budget.selector.as_ref().filter(|s| !s.is_empty());
            let covers = selector.is_some_and(|s| pod.is_picked(s)) && !pod.labels.is_empty();
            // One that was evicted a moment ago has been counted.
            if covers && !budget.disrupted.contains(&pod.name) {
                let left = left.entry(key).or_insert(budget.allowed);
                *left -= 1;
                broken |= *left < 0;
            }
        }
        broken
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Node, Pod};
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        decide::{Search, decide},
        placement::lay,
        snapshot::Budget,
    };

    /// A node of two CPUs.
    fn node(name: &str) -> Node {
        serde_json::from_value(
            json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "zone": "z"}},
            "status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "9"}}}),
        )
        .unwrap()
    }

    /// A pod with `more` laid over it.
    fn pod(name: &str, priority: i32, cpu: &str, more: Value) -> Arc<PodInfo> {
        let mut object = json!({
            "metadata": {"name": name, "namespace": "n", "uid": name, "labels": {"name": name}},
            "spec": {"priority": priority, "containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]},
        });
        lay(&mut object, more);
        Arc::new(PodInfo::new(&serde_json::from_value::<Pod>(object).unwrap()))
    }

    fn cluster(pods: &[(&str, Arc<PodInfo>)]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for name in ["a", "b", "c"] {
            snapshot.set_node(&node(name));
        }
        for (node, pod) in pods {
            snapshot.place(pod.clone(), node);
        }
        snapshot
    }

    fn run(snapshot: &Snapshot, pod: &PodInfo) -> Result<Preemption, Hopeless> {
        let diagnosis = decide(snapshot, pod, &mut Search::seeded(1)).expect_err("it fits");
        plan(snapshot, pod, &diagnosis, 0)
    }

    fn check(what: &str, snapshot: &Snapshot, pod: &PodInfo, expect: Result<(&str, &[&str]), &str>) {
        // Where the search begins makes no difference to what is best.
        for offset in 0..3 {
            let diagnosis = decide(snapshot, pod, &mut Search::seeded(offset as u64)).expect_err("it fits");
            let found = plan(snapshot, pod, &diagnosis, offset).map_err(|e| e.to_string());
            let names = found
                .as_ref()
                .map(|p| (p.node.as_str(), p.victims.iter().map(|v| v.name.as_str()).collect::<Vec<_>>()));
            let expect = expect.map(|(node, victims)| (node, victims.to_vec())).map_err(str::to_owned);
            assert_eq!(names.map_err(Clone::clone), expect, "{what}");
        }
    }

    fn begun(at: &str) -> Value {
        json!({"status": {"startTime": at}})
    }

    fn none() -> Value {
        json!({})
    }

    #[test]
    fn the_node_that_loses_least_is_chosen() {
        let vip = pod("vip", 100, "2", none());
        let full = |name: &str, priority: i32| pod(name, priority, "2", none());
        check(
            "the lowest of the highest",
            &cluster(&[("a", full("x", 5)), ("b", full("y", 3)), ("c", full("z", 4))]),
            &vip,
            Ok(("b", &["y"])),
        );
        let half = |name: &str, priority: i32| pod(name, priority, "1", none());
        check(
            "the smallest sum, though there are as many",
            &cluster(&[
                ("a", half("a1", 5)),
                ("a", half("a2", 4)),
                ("b", half("b1", 5)),
                ("b", half("b2", 1)),
                ("c", half("c1", 5)),
                ("c", half("c2", 3)),
            ]),
            &vip,
            Ok(("b", &["b1", "b2"])),
        );
        check(
            "one rather than two, though they are less important together",
            &cluster(&[("a", half("a1", 5)), ("a", half("a2", -100)), ("b", full("b1", 5)), ("c", full("c1", 6))]),
            &vip,
            Ok(("b", &["b1"])),
        );
        let since = |name: &str, at: &str| pod(name, 5, "2", begun(at));
        check(
            "the one that began last",
            &cluster(&[
                ("a", since("x", "2026-01-01T00:00:00Z")),
                ("b", since("y", "2026-01-03T00:00:00Z")),
                ("c", since("z", "2026-01-02T00:00:00Z")),
            ]),
            &vip,
            Ok(("b", &["y"])),
        );
    }

    #[test]
    fn only_who_has_to_go_goes() {
        let small = |name: &str, priority: i32| pod(name, priority, "500m", none());
        let others = || [("b", pod("b1", 100, "2", none())), ("c", pod("c1", 100, "2", none()))];
        let mut pods =
            vec![("a", small("p1", 1)), ("a", small("p2", 2)), ("a", small("p3", 3)), ("a", small("p4", 50))];
        pods.extend(others());
        check("two are enough", &cluster(&pods), &pod("vip", 60, "1", none()), Ok(("a", &["p2", "p1"])));
        check(
            "nobody who is as important",
            &cluster(&pods),
            &pod("vip", 1, "1", none()),
            Err("0/3 nodes are available: 3 No preemption victims found for incoming pod."),
        );
        check(
            "nor if it does not help",
            &cluster(&pods),
            &pod("vip", 60, "3", none()),
            Err("0/3 nodes are available: 3 Preemption is not helpful for scheduling."),
        );
        check(
            "nor for one that waits",
            &cluster(&pods),
            &pod("vip", 60, "1", json!({"spec": {"preemptionPolicy": "Never"}})),
            Err("not eligible due to preemptionPolicy=Never."),
        );
        let mut pods = vec![
            ("a", pod("old", 1, "1", begun("2026-01-01T00:00:00Z"))),
            ("a", pod("new", 1, "1", begun("2026-01-02T00:00:00Z"))),
        ];
        pods.extend(others());
        check("of equals the one that began last", &cluster(&pods), &pod("vip", 60, "1", none()), Ok(("a", &["new"])));
    }

    fn budget(app: &str, allowed: i32) -> Budget {
        Budget::new(
            &serde_json::from_value(json!({"metadata": {"name": app, "namespace": "n"},
                "spec": {"selector": {"matchLabels": {"app": app}}}, "status": {"disruptionsAllowed": allowed,
                "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1}}))
            .unwrap(),
        )
    }

    #[test]
    fn budgets_are_kept_where_that_is_possible() {
        let web = |name: &str, priority: i32, cpu: &str| {
            pod(name, priority, cpu, json!({"metadata": {"labels": {"app": "web"}}}))
        };
        let vip = pod("vip", 100, "2", none());
        let mut snapshot =
            cluster(&[("a", web("x", 1, "2")), ("b", pod("y", 50, "2", none())), ("c", pod("z", 60, "2", none()))]);
        check("without one", &snapshot, &vip, Ok(("a", &["x"])));
        snapshot.budgets.insert(("n".into(), "web".into()), budget("web", 0));
        check("more important ones go rather", &snapshot, &vip, Ok(("b", &["y"])));
        snapshot.budgets.insert(("n".into(), "web".into()), budget("web", 1));
        check("one may go", &snapshot, &vip, Ok(("a", &["x"])));
        // Asked to stay first: of two on a node the protected one stays, though it is less important.
        let mut snapshot = cluster(&[
            ("a", web("x", 1, "1")),
            ("a", pod("y", 2, "1", none())),
            ("b", pod("b1", 100, "2", none())),
            ("c", pod("c1", 100, "2", none())),
        ]);
        snapshot.budgets.insert(("n".into(), "web".into()), budget("web", 0));
        check("the protected one stays", &snapshot, &pod("vip", 100, "1", none()), Ok(("a", &["y"])));
        // It is not a wall.
        check("there is no other way", &snapshot, &vip, Ok(("a", &["y", "x"])));
        assert_eq!(run(&snapshot, &vip).unwrap().violations, 1);
    }

    #[test]
    fn room_that_was_made_is_kept() {
        let full = |name: &str, priority: i32| pod(name, priority, "2", none());
        let mut snapshot = cluster(&[("b", full("b1", 100)), ("c", full("c1", 100))]);
        let vip = full("vip", 50);
        snapshot.nominate(vip.clone(), "a");
        // The node is empty, and still it is not for one less important; nor is there anybody it could push out.
        let lesser = full("lesser", 10);
        assert_eq!(
            decide(&snapshot, &lesser, &mut Search::seeded(1)).unwrap_err().to_string(),
            "0/3 nodes are available: 3 Insufficient cpu."
        );
        assert!(run(&snapshot, &lesser).is_err());
        assert_eq!(decide(&snapshot, &vip, &mut Search::seeded(1)).as_deref(), Ok("a"));
        // One more important takes it.
        assert_eq!(decide(&snapshot, &full("king", 60), &mut Search::seeded(1)).as_deref(), Ok("a"));
        // It has its place: the claim is over.
        snapshot.place(vip, "a");
        assert!(snapshot.nominated("a").is_empty());
    }

    #[test]
    fn less_important_nominations_are_lost() {
        let full = |name: &str, priority: i32| pod(name, priority, "2", none());
        let mut snapshot = cluster(&[("a", full("x", 1)), ("b", full("b1", 100)), ("c", full("c1", 100))]);
        snapshot.nominate(full("lesser", 10), "a");
        let plan = run(&snapshot, &full("vip", 50)).unwrap();
        assert_eq!(plan.node, "a");
        assert_eq!(plan.demoted.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["lesser"]);
    }

    #[test]
    fn no_second_time_while_the_first_victims_end() {
        let ending = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": {"conditions": [
            {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]}});
        let mut snapshot = cluster(&[
            ("a", pod("x", 1, "2", ending)),
            ("b", pod("y", 2, "2", none())),
            ("c", pod("z", 3, "2", none())),
        ]);
        let vip = pod("vip", 50, "2", none());
        snapshot.nominate(vip.clone(), "a");
        check("they are ending", &snapshot, &vip, Err("not eligible due to a terminating pod on the nominated node."));
        // The node fails meanwhile: the claim is worth nothing.
        let mut cordoned = node("a");
        cordoned.spec = Some(k8s_openapi::api::core::v1::NodeSpec { unschedulable: Some(true), ..Default::default() });
        snapshot.set_node(&cordoned);
        check("elsewhere", &snapshot, &vip, Ok(("b", &["y"])));
    }

    #[test]
    fn company_can_be_sent_away() {
        let anti = json!({"spec": {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "web"}}}]}}}});
        let web =
            |name: &str, priority: i32| pod(name, priority, "100m", json!({"metadata": {"labels": {"app": "web"}}}));
        let snapshot = cluster(&[("a", web("x", 3)), ("b", web("y", 2)), ("b", web("y2", 1)), ("c", web("z", 100))]);
        check("of one node", &snapshot, &pod("vip", 50, "100m", anti), Ok(("b", &["y", "y2"])));
        let zone = json!({"spec": {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "web"}}}]}}}});
        // Others of the zone are on other nodes, which are not touched (upstream does not either).
        assert!(run(&snapshot, &pod("vip", 50, "100m", zone)).is_err());
    }
}
