//! Sets of NUMA nodes.

use std::fmt;

use crate::cpus::set::CpuSet;

/// NUMA nodes by number, as far as a mask has place for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mask(pub u64);

/// How many nodes a mask has place for: nodes are numbered from 0.
pub const PLACES: u32 = u64::BITS;

impl Mask {
    /// How many there are.
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether this one is among them.
    pub fn has(self, node: u32) -> bool {
        node < PLACES && self.0 & (1 << node) != 0
    }

    /// Those of both.
    pub fn and(self, other: Mask) -> Mask {
        Mask(self.0 & other.0)
    }

    /// Whether some are in both.
    pub fn meets(self, other: Mask) -> bool {
        !self.and(other).is_empty()
    }

    /// Their numbers.
    pub fn nodes(self) -> impl Iterator<Item = u32> {
        (0..PLACES).filter(move |node| self.has(*node))
    }

    /// All sets that have some of them, and no others.
    pub fn parts(self) -> impl Iterator<Item = Mask> {
        let mut part = 0_u64;
        std::iter::from_fn(move || {
            part = part.wrapping_sub(self.0) & self.0;
            (part != 0).then_some(Mask(part))
        })
    }
}

impl FromIterator<u32> for Mask {
    /// Nodes for which there is no place are left out.
    fn from_iter<T: IntoIterator<Item = u32>>(nodes: T) -> Mask {
        Mask(nodes.into_iter().filter(|node| *node < PLACES).fold(0, |mask, node| mask | (1 << node)))
    }
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.nodes().collect::<CpuSet>().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_nodes() {
        let mask: Mask = [0, 2, 63, 64, 700].into_iter().collect();
        assert_eq!((mask.to_string().as_str(), mask.count()), ("0,2,63", 3));
        assert!(mask.has(2) && !mask.has(1) && !mask.has(64));
        assert!(mask.meets(Mask(0b100)) && !mask.meets(Mask(0b1010)));
        assert!(!mask.is_empty() && Mask::default().is_empty());
        let parts: Vec<String> = Mask(0b1011).parts().map(|part| part.to_string()).collect();
        assert_eq!(parts, ["0", "1", "0-1", "3", "0,3", "1,3", "0-1,3"]);
        assert_eq!(Mask::default().parts().count(), 0);
        assert_eq!(Mask(1 << 63).parts().collect::<Vec<_>>(), [Mask(1 << 63)]);
    }
}
