//! Sizes and costs that are known from below and above.

use std::ops::{Add, Mul};

/// From the least to the most. Sums and products do not overflow: what would is the largest number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub min: u64,
    pub max: u64,
}

impl Range {
    pub const ZERO: Range = Range::just(0);
    /// Of which nothing is known.
    pub const ANY: Range = Range { min: 0, max: u64::MAX };

    pub const fn just(value: u64) -> Range {
        Range { min: value, max: value }
    }

    pub const fn up_to(max: u64) -> Range {
        Range { min: 0, max }
    }

    /// What encloses both.
    pub fn or(self, other: Range) -> Range {
        Range { min: self.min.min(other.min), max: self.max.max(other.max) }
    }

    /// This many times, rounded up.
    pub fn times(self, factor: f64) -> Range {
        let times = |value: u64| (value as f64 * factor).ceil() as u64;
        Range { min: times(self.min), max: times(self.max) }
    }
}

impl Add for Range {
    type Output = Range;
    fn add(self, other: Range) -> Range {
        Range { min: self.min.saturating_add(other.min), max: self.max.saturating_add(other.max) }
    }
}

impl Mul for Range {
    type Output = Range;
    fn mul(self, other: Range) -> Range {
        Range { min: self.min.saturating_mul(other.min), max: self.max.saturating_mul(other.max) }
    }
}

impl std::iter::Sum for Range {
    fn sum<I: Iterator<Item = Range>>(all: I) -> Range {
        all.fold(Range::ZERO, Add::add)
    }
}
