//! Which of several nodes is the best. Each score goes from 0 to 100; weights are upstream's defaults.

use seawall_api::node_selector::{term_matches, tolerates};

use crate::{
    affinity::Liking,
    pod::PodInfo,
    snapshot::{NodeInfo, Snapshot},
    spread::Counts,
};

const TAINTS: i64 = 3;
const NODE_AFFINITY: i64 = 2;
const SPREAD: i64 = 2;
const POD_AFFINITY: i64 = 2;
const FREE: i64 = 1;
const BALANCE: i64 = 1;
const IMAGES: i64 = 1;

/// The scores of `nodes`, in their order.
pub fn score(snapshot: &Snapshot, pod: &PodInfo, nodes: &[&NodeInfo]) -> Vec<i64> {
    let raw = |f: &dyn Fn(&NodeInfo) -> i64| -> Vec<i64> { nodes.iter().map(|n| f(n)).collect() };
    let mut out = raw(&|n| FREE * free(pod, n) + BALANCE * balance(pod, n) + IMAGES * images(pod, n, snapshot));
    let mut add = |weight: i64, scores: Vec<i64>| out.iter_mut().zip(scores).for_each(|(sum, s)| *sum += weight * s);
    add(
        TAINTS,
        reversed(raw(&|n| {
            let soft = n.facts.taints.iter().filter(|t| t.effect == "PreferNoSchedule");
            soft.filter(|t| !pod.tolerations.iter().any(|tol| tolerates(tol, t))).count() as i64
        })),
    );
    if !pod.node_preferred.is_empty() {
        let sum = |n: &NodeInfo| {
            pod.node_preferred
                .iter()
                .filter(|(_, t)| term_matches(t, &n.facts.name, &n.facts.labels))
                .map(|(weight, _)| weight)
                .sum()
        };
        add(NODE_AFFINITY, scaled(raw(&sum)));
    }
    let liking = Liking::of(pod, snapshot);
    if !liking.is_empty() {
        add(POD_AFFINITY, stretched(raw(&|n| liking.at(n.slot))));
    }
    if let Some(scores) = Counts::wished(pod, snapshot).scores(nodes) {
        add(SPREAD, scores);
    }
    out
}

/// To 0..100, the least becoming 0 and the largest 100.
fn stretched(values: Vec<i64>) -> Vec<i64> {
    let min = values.iter().copied().min().unwrap_or_default();
    scaled(values.into_iter().map(|v| v - min).collect())
}

/// To 0..100, the largest becoming 100.
fn scaled(values: Vec<i64>) -> Vec<i64> {
    let max = values.iter().copied().max().unwrap_or_default();
    if max == 0 {
        return vec![0; values.len()];
    }
    values.into_iter().map(|v| v * 100 / max).collect()
}

/// To 0..100, zero becoming 100.
fn reversed(values: Vec<i64>) -> Vec<i64> {
    let max = values.iter().copied().max().unwrap_or_default();
    if max == 0 {
        return vec![100; values.len()];
    }
    values.into_iter().map(|v| (max - v) * 100 / max).collect()
}

/// The part of each resource that is taken, with this pod, as a fraction.
fn fractions(pod: &PodInfo, node: &NodeInfo) -> [f64; 2] {
    let part =
        |used: i64, more: i64, all: i64| if all <= 0 { 1.0 } else { ((used + more) as f64 / all as f64).min(1.0) };
    let all = &node.facts.allocatable;
    [part(node.assumed.cpu, pod.assumed.cpu, all.cpu), part(node.assumed.memory, pod.assumed.memory, all.memory)]
}

/// The emptier the better.
fn free(pod: &PodInfo, node: &NodeInfo) -> i64 {
    let [cpu, memory] = fractions(pod, node);
    ((2.0 - cpu - memory) * 50.0) as i64
}

/// The more evenly CPU and memory are used the better.
fn balance(pod: &PodInfo, node: &NodeInfo) -> i64 {
    let [cpu, memory] = fractions(pod, node);
    ((1.0 - (cpu - memory).abs() / 2.0) * 100.0) as i64
}

/// The more of the images is there the better, and the more nodes have them, so that not all pods go where an image
/// came first.
fn images(pod: &PodInfo, node: &NodeInfo, snapshot: &Snapshot) -> i64 {
    const LEAST: i64 = 23 << 20;
    const MOST: i64 = 1000 << 20;
    if node.facts.images.is_empty() || pod.images.is_empty() {
        return 0;
    }
    let total = snapshot.order().len().max(1) as i64;
    let size = |image: &String| {
        let size = node.facts.images.get(image).copied().unwrap_or_default();
        (size as f64 * snapshot.nodes_with_image(image) as f64 / total as f64) as i64
    };
    let sum: i64 = pod.images.iter().map(size).sum();
    let most = MOST * pod.images.len() as i64;
    (sum.clamp(LEAST, most) - LEAST) * 100 / (most - LEAST)
}
