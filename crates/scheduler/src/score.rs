//! Which of several nodes is the best. Each score goes from 0 to 100; weights are upstream's defaults.

use crate::{
    affinity::{Company, term_matches, tolerates},
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
pub fn score(snapshot: &Snapshot, pod: &PodInfo, company: &Company<'_>, nodes: &[&NodeInfo]) -> Vec<i64> {
    let soft = default_spread(pod, snapshot);
    let raw = |f: &dyn Fn(&NodeInfo) -> i64| -> Vec<i64> { nodes.iter().map(|n| f(n)).collect() };
    let taints = reversed(raw(&|n| {
        let soft = n.facts.taints.iter().filter(|t| t.effect == "PreferNoSchedule");
        soft.filter(|t| !pod.tolerations.iter().any(|tol| tolerates(tol, t))).count() as i64
    }));
    let wanted =
        scaled(raw(&|n| pod.node_preferred.iter().filter(|(_, t)| term_matches(t, &n.facts)).map(|(w, _)| w).sum()));
    let liked = scaled(raw(&|n| {
        let here = |((key, value), liking): (&(&str, &str), &i64)| {
            n.facts.labels.get(*key).filter(|v| v == value).map_or(0, |_| *liking)
        };
        company.liking.iter().map(here).sum()
    }));
    let crowd = match &soft {
        Some(counts) => reversed(raw(&|n| counts.crowd(&n.facts))),
        None => vec![0; nodes.len()],
    };
    let mut out = Vec::with_capacity(nodes.len());
    for (index, node) in nodes.iter().enumerate() {
        out.push(
            TAINTS * taints[index]
                + NODE_AFFINITY * wanted[index]
                + POD_AFFINITY * liked[index]
                + SPREAD * crowd[index]
                + FREE * free(pod, node)
                + BALANCE * balance(pod, node)
                + IMAGES * images(pod, node, snapshot),
        );
    }
    out
}

fn default_spread<'a>(pod: &'a PodInfo, snapshot: &'a Snapshot) -> Option<Counts<'a>> {
    let counts = Counts::of(pod, snapshot, false);
    (!counts.is_empty()).then_some(counts)
}

/// To 0..100, the largest becoming 100.
fn scaled(values: Vec<i64>) -> Vec<i64> {
    let (min, max) =
        (values.iter().copied().min().unwrap_or_default().min(0), values.iter().copied().max().unwrap_or_default());
    if max == min {
        return vec![0; values.len()];
    }
    values.into_iter().map(|v| (v - min) * 100 / (max - min)).collect()
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

/// The more of the images is there the better; less so if all nodes have them.
fn images(pod: &PodInfo, node: &NodeInfo, snapshot: &Snapshot) -> i64 {
    const LEAST: i64 = 23 << 20;
    const MOST: i64 = 1000 << 20;
    let total = snapshot.known().count().max(1) as i64;
    let size = |image: &String| -> i64 {
        let Some(size) = node.facts.images.get(image) else { return 0 };
        let have = snapshot.known().filter(|n| n.facts.images.contains_key(image)).count() as i64;
        size * have / total
    };
    let sum: i64 = pod.images.iter().map(size).sum();
    (sum.clamp(LEAST, MOST) - LEAST) * 100 / (MOST - LEAST)
}
