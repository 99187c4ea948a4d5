//! What whoever gives something out says of the NUMA nodes that it could come from. Pure.

use std::collections::BTreeMap;

use super::mask::Mask;

/// A way to have what is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// From these nodes; `None` for from wherever it may be.
    pub affinity: Option<Mask>,
    /// From no more nodes than would be needed if nobody had anything.
    pub preferred: bool,
}

/// What is there of one resource, each piece with the nodes that it is near to. Pieces that are near to none are left out.
#[derive(Clone, Debug, Default)]
pub struct Supply {
    /// Everything, whoever has it.
    pub all: Vec<Mask>,
    /// What the pod has already, and the container gets first.
    pub reusable: Vec<Mask>,
    /// What nobody has.
    pub free: Vec<Mask>,
}

/// It cannot be had, wherever it comes from.
pub fn impossible() -> Vec<Hint> {
    vec![Hint { affinity: None, preferred: false }]
}

/// The ways to have so many of a resource from these nodes: what is reusable has to be among it.
pub fn hints(nodes: Mask, supply: &Supply, wanted: usize) -> Vec<Hint> {
    let group = |pieces: &[Mask]| {
        let mut groups: BTreeMap<Mask, usize> = BTreeMap::new();
        for near in pieces {
            *groups.entry(*near).or_default() += 1;
        }
        groups
    };
    let (all, reusable, free) = (group(&supply.all), group(&supply.reusable), group(&supply.free));
    let within = |groups: &BTreeMap<Mask, usize>, mask: Mask| -> usize {
        groups.iter().filter(|(near, _)| near.meets(mask)).map(|(_, count)| count).sum()
    };
    let mut least = nodes.count();
    let mut masks = Vec::new();
    for mask in nodes.parts() {
        if within(&all, mask) >= wanted {
            least = least.min(mask.count());
        }
        let has_reusable = reusable.keys().all(|near| near.meets(mask));
        if has_reusable && within(&reusable, mask) + within(&free, mask) >= wanted {
            masks.push(mask);
        }
    }
    if masks.is_empty() {
        return impossible();
    }
    masks.into_iter().map(|mask| Hint { affinity: Some(mask), preferred: mask.count() == least }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nodes by number, e.g. `0 0 1+2`: two pieces near to node 0, and one near to 1 and 2.
    fn pieces(text: &str) -> Vec<Mask> {
        let piece = |word: &str| word.split('+').map(|node| node.parse::<u32>().unwrap()).collect();
        text.split_whitespace().map(piece).collect()
    }

    #[test]
    fn from_where_it_can_be_had() {
        let check = |nodes: u64, (all, reusable, free): (&str, &str, &str), wanted: usize, expect: &str| {
            let supply = Supply { all: pieces(all), reusable: pieces(reusable), free: pieces(free) };
            let found = hints(Mask(nodes), &supply, wanted);
            let shown = |hint: &Hint| {
                let mask = hint.affinity.map_or("none".to_owned(), |mask| mask.to_string());
                if hint.preferred { format!("{mask}!") } else { mask }
            };
            assert_eq!(found.iter().map(shown).collect::<Vec<_>>().join(" "), expect, "{wanted} of {free}");
        };
        // Two nodes of two.
        let two = "0 0 1 1";
        check(0b11, (two, "", two), 1, "0! 1! 0-1");
        check(0b11, (two, "", two), 2, "0! 1! 0-1");
        check(0b11, (two, "", two), 3, "0-1!");
        check(0b11, (two, "", two), 5, "none");
        // One node would do if others had less of it.
        check(0b11, (two, "", "0 1 1"), 2, "1! 0-1");
        check(0b11, (two, "", "0 1"), 2, "0-1");
        check(0b11, (two, "", "0"), 2, "none");
        // What the pod has already decides.
        check(0b11, (two, "0", "0 1 1"), 2, "0! 0-1");
        check(0b11, (two, "0 1", "0 1"), 1, "0-1");
        // A piece may be near to several nodes, or to one that the machine has not.
        check(0b11, ("0+1 0", "", "0+1 0"), 2, "0! 0-1");
        check(0b11, ("0+1 0", "", "0+1"), 1, "0! 1! 0-1");
        check(0b1, ("0 1", "", "0 1"), 1, "0!");
        check(0b1, ("0 1", "", "0 1"), 2, "none");
        check(0b1, ("0 1", "", "1"), 1, "none");
        // Four nodes, numbered with a gap.
        check(0b10111, ("0 1 2 4", "", "1 4"), 2, "1,4! 0-1,4 1-2,4 0-2,4");
        check(0b10111, ("0 1 2 4", "", "0 1 4"), 3, "0-1,4! 0-2,4");
    }
}
