//! From what each resource could come from to where all of them come from, and whether that will do. Pure.
//!
//! Upstream looks at all combinations of one hint for each resource: their masks are intersected, and the best intersection
//! wins. Here the intersections that there are, are worked out resource by resource, which gives the same.

use std::collections::BTreeSet;

use super::{
    hints::Hint,
    mask::Mask,
    nodes::Nodes,
    settings::{Policy, Settings},
};

/// Why a pod is not taken: its resources do not come from where the policy wants them to. In upstream's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Resources cannot be allocated with Topology locality")]
pub struct Unaligned;

/// Where resources should come from, by the hints for each of them; `None` for from wherever it may be.
///
/// # Errors
/// If the policy refuses what there is.
pub fn decide(settings: &Settings, nodes: &Nodes, hints: &[Vec<Hint>]) -> Result<Option<Mask>, Unaligned> {
    let closest = settings.options.prefer_closest;
    match settings.policy {
        Policy::None => Ok(None),
        Policy::BestEffort => Ok(merge(nodes, closest, hints).affinity),
        Policy::Restricted => {
            let best = merge(nodes, closest, hints);
            if best.preferred { Ok(best.affinity) } else { Err(Unaligned) }
        }
        Policy::SingleNumaNode => {
            let single = |hint: &&Hint| hint.preferred && hint.affinity.is_none_or(|mask| mask.count() == 1);
            let single: Vec<Vec<Hint>> =
                hints.iter().map(|hints| hints.iter().filter(single).copied().collect()).collect();
            let best = merge(nodes, false, &single);
            match best.preferred {
                true => Ok(best.affinity.filter(|mask| *mask != nodes.all)),
                false => Err(Unaligned),
            }
        }
    }
}

/// The best combination. It is preferred if all of it is, and of the same nodes.
fn merge(nodes: &Nodes, closest: bool, hints: &[Vec<Hint>]) -> Hint {
    // Of two with as many nodes the one whose nodes are close to each other, or else have the lower numbers.
    let narrow = |mask: &Mask| (mask.count(), if closest { nodes.spread(*mask) } else { 0 }, *mask);
    let preferred = aligned(nodes.all, hints).into_iter().min_by_key(narrow);
    if let Some(mask) = preferred {
        return Hint { affinity: Some(mask), preferred: true };
    }
    // As many nodes as the resource needs that needs the most; or fewer, the more the better; or else more.
    let wanted = hints.iter().filter_map(|hints| hints.iter().filter_map(|hint| hint.affinity).map(Mask::count).min());
    let wanted = wanted.max().unwrap_or(0);
    let rank = |mask: &Mask| {
        let count = mask.count();
        let (far, off) = if count > wanted { (true, count - wanted) } else { (false, wanted - count) };
        ((far, off), narrow(mask))
    };
    let best = intersections(nodes.all, hints).into_iter().min_by_key(rank);
    Hint { affinity: Some(best.unwrap_or(nodes.all)), preferred: false }
}

/// The masks from which every resource would like to come.
fn aligned(all: Mask, hints: &[Vec<Hint>]) -> Vec<Mask> {
    let preferred = |hints: &Vec<Hint>| -> BTreeSet<Option<Mask>> {
        hints.iter().filter(|hint| hint.preferred).map(|hint| hint.affinity).collect()
    };
    let lists: Vec<BTreeSet<Option<Mask>>> = hints.iter().map(preferred).collect();
    let agree = |mask: &Mask| lists.iter().all(|list| list.contains(&Some(*mask)) || list.contains(&None));
    let named: BTreeSet<Mask> = lists.iter().flatten().copied().flatten().collect();
    let mut masks: Vec<Mask> = named.into_iter().filter(agree).map(|mask| mask.and(all)).collect();
    masks.retain(|mask| !mask.is_empty());
    if lists.iter().all(|list| list.contains(&None)) {
        masks.push(all);
    }
    masks
}

/// What the masks of one hint for each resource can have in common.
fn intersections(all: Mask, hints: &[Vec<Hint>]) -> Vec<Mask> {
    // Sets of nodes by their places in `all`, so that they number a list.
    let nodes: Vec<u32> = all.nodes().collect();
    let size = 1_usize << nodes.len();
    let index =
        |mask: Mask| -> usize { (0..nodes.len()).filter(|place| mask.has(nodes[*place])).map(|p| 1 << p).sum() };
    // How many of a list include each set, and back: two masks have at least a set in common if both include it.
    let pass = |list: &mut Vec<i64>, sign: i64| {
        for place in 0..nodes.len() {
            for at in (0..size).filter(|at| at & (1 << place) == 0) {
                list[at] += sign * list[at | (1 << place)];
            }
        }
    };
    let mut common = vec![0_i64; size];
    common[size - 1] = 1;
    for hints in hints {
        let mut masks = vec![0_i64; size];
        for hint in hints {
            masks[index(hint.affinity.unwrap_or(all))] = 1;
        }
        pass(&mut common, 1);
        pass(&mut masks, 1);
        common.iter_mut().zip(masks).for_each(|(one, other)| *one *= other);
        pass(&mut common, -1);
        common.iter_mut().for_each(|count| *count = i64::from(*count != 0));
    }
    let mask = |at: usize| -> Mask {
        nodes.iter().enumerate().filter(|(place, _)| at & (1 << place) != 0).map(|(_, node)| *node).collect()
    };
    (1..size).filter(|at| common[*at] != 0).map(mask).collect()
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
