//! How long a server may take to answer before that means something. Pure.
//!
//! On a quiet network an answer takes a millisecond, and a fifth of a second without one is silence. Where machines are
//! starved answers take longer, all of them: what is late by the clock is then still in time by what is usual. The limit
//! follows what is seen, as TCP's does (<https://www.rfc-editor.org/rfc/rfc6298>), between a lower and an upper bound.

use std::time::Duration;

/// The limit never grows beyond this many times the configured one: who answers more slowly is of no use to anybody.
const STRETCH: u32 = 4;

/// What is usual with one server.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    least: Duration,
    /// The smoothed time of an answer, and how far single ones are from it.
    usual: Option<(Duration, Duration)>,
}

impl Pace {
    /// Nothing is known; `least` is the limit of a server that answers quickly.
    pub fn new(least: Duration) -> Pace {
        Pace { least, usual: None }
    }

    /// An answer came, after so long.
    pub fn answered(&mut self, took: Duration) {
        let took = took.min(self.longest());
        self.usual = Some(match self.usual {
            None => (took, took / 2),
            Some((mean, spread)) => ((mean * 7 + took) / 8, (spread * 3 + mean.abs_diff(took)) / 4),
        });
    }

    /// How long the next answer may take.
    pub fn limit(&self) -> Duration {
        let usual = self.usual.map_or(self.least, |(mean, spread)| mean + spread * 4);
        usual.clamp(self.least, self.longest())
    }

    /// How long an answer may take at most.
    pub fn longest(&self) -> Duration {
        self.least * STRETCH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// The limit after answers that took so many milliseconds.
    fn after(answers: impl IntoIterator<Item = u64>) -> Duration {
        let mut pace = Pace::new(ms(200));
        for answer in answers {
            pace.answered(ms(answer));
        }
        pace.limit()
    }

    #[test]
    fn the_limit_follows_what_is_usual() {
        assert_eq!(after([]), ms(200));
        assert_eq!(after([1, 2, 1, 3, 1]), ms(200), "quick answers shorten nothing");
        assert!(after([1, 1, 1, 150, 180, 120, 190, 60, 170]) > ms(300), "a starved machine");
        assert_eq!(after([5000; 20]), ms(800), "but not for ever");
        // One slow answer does not blind: a few quick ones, and it is forgotten.
        assert_eq!(after([1; 20].into_iter().chain([190]).chain([1; 20])), ms(200));
    }
}
