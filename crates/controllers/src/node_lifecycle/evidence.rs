//! What the machines say of one another, as far as it concerns the controllers. Who gossips gives it to them; nothing
//! here knows how it came about.

use std::{collections::BTreeMap, sync::Arc};

/// What is thought of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It answers.
    Alive,
    /// It did not answer, and may still say that it lives.
    Suspect,
    /// It did not say so in time.
    Dead,
}

/// What is said of one node, and by how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The verdict.
    pub verdict: Verdict,
    /// How many other members have come to it.
    pub accusers: usize,
    /// How many members there are, this one included.
    pub members: usize,
}

/// By the name of the node. Of one that is not in it nothing is said.
pub type AllEvidence = Arc<BTreeMap<String, Evidence>>;

/// So many accusers are enough in a large cluster: one that is cut off, or starved, does not convince anybody.
const ENOUGH: usize = 3;

impl Evidence {
    /// Whether the node is dead by the word of enough others.
    pub fn is_conclusive(&self) -> bool {
        let needed = self.members.saturating_sub(1).clamp(1, ENOUGH);
        self.verdict == Verdict::Dead && self.accusers >= needed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_many_have_to_agree() {
        let check = |verdict, accusers, members, expect| {
            let evidence = Evidence { verdict, accusers, members };
            assert_eq!(evidence.is_conclusive(), expect, "{evidence:?}");
        };
        check(Verdict::Dead, 0, 1, false);
        check(Verdict::Dead, 0, 2, false);
        check(Verdict::Dead, 1, 2, true);
        check(Verdict::Dead, 1, 3, false);
        check(Verdict::Dead, 2, 3, true);
        check(Verdict::Dead, 2, 100, false);
        check(Verdict::Dead, 3, 100, true);
        check(Verdict::Suspect, 50, 100, false);
        check(Verdict::Alive, 50, 100, false);
    }
}
