//! How fast something is used: the last two times that it was looked at.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use super::read::Usage;

/// One look.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// By the clock on the wall, for users.
    pub at: Timestamp,
    /// By the clock that never jumps, for rates.
    pub steady: Instant,
    /// What was seen.
    pub usage: Usage,
}

/// The last two looks at one group.
#[derive(Clone, Copy, Debug)]
pub struct Series {
    last: Sample,
    before: Option<Sample>,
}

/// What the series of a group comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// When it was looked at last.
    pub at: Timestamp,
    /// What was seen then.
    pub usage: Usage,
    /// Billionths of a CPU, on average since the look before. `None` after the first look.
    pub nano_cores: Option<u64>,
}

impl Series {
    /// After the first look.
    pub fn new(first: Sample) -> Series {
        Series { last: first, before: None }
    }

    /// Another look. A count that went backwards belongs to another group of the same name.
    pub fn add(&mut self, sample: Sample) {
        let same = sample.usage.cpu >= self.last.usage.cpu && sample.steady > self.last.steady;
        self.before = same.then_some(self.last);
        self.last = sample;
    }

    /// When it was looked at last.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.last.steady)
    }

    /// What is known.
    pub fn measured(&self) -> Measured {
        let nano_cores = self.before.and_then(|before| {
            let used = u128::from(self.last.usage.cpu.saturating_sub(before.usage.cpu));
            let passed = self.last.steady.saturating_duration_since(before.steady).as_nanos();
            u64::try_from((used * 1_000_000_000).checked_div(passed)?).ok()
        });
        Measured { at: self.last.at, usage: self.last.usage, nano_cores }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn rates() {
        let start = Instant::now();
        let sample = |seconds: u64, cpu: u64| Sample {
            at: Timestamp::from_second(1000).unwrap(),
            steady: start + Duration::from_secs(seconds),
            usage: Usage { cpu, ..Default::default() },
        };
        let check = |looks: &[(u64, u64)], expect: Option<u64>| {
            let mut series = Series::new(sample(looks[0].0, looks[0].1));
            looks[1..].iter().for_each(|(seconds, cpu)| series.add(sample(*seconds, *cpu)));
            assert_eq!(series.measured().nano_cores, expect, "{looks:?}");
        };
        check(&[(0, 5)], None);
        check(&[(0, 0), (10, 2_500_000_000)], Some(250_000_000));
        check(&[(0, 0), (10, 2_500_000_000), (20, 2_500_000_000)], Some(0));
        check(&[(0, 0), (10, 2_500_000_000), (20, 4)], None);
        check(&[(0, 0), (0, 5)], None);
        assert_eq!(Series::new(sample(0, 1)).age(start + Duration::from_secs(3)), Duration::from_secs(3));
    }
}
