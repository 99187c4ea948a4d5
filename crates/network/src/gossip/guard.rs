//! Nothing is heard twice, and nothing that was said long ago.
//!
//! Every sender numbers its packets and says how old its process is at each. Numbers are remembered in a window as IPsec
//! does (RFC 4303, appendix A2). The clocks of two machines are not compared: the fastest packet of a sender shows how
//! far they are apart, and what took seconds longer than that was kept back by somebody, or by our own sleep.

use std::{collections::BTreeMap, time::Duration};

use super::id::Key;

/// What a packet says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Which run of the sender's process: its start in milliseconds of its wall clock.
    pub session: u64,
    /// Which of its packets.
    pub number: u32,
    /// How long after its start, in milliseconds.
    pub sent: u64,
}

/// Why a packet is not heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It was heard before.
    #[error("a packet came twice")]
    Repeated,
    /// A later run of its sender has been heard.
    #[error("a packet of an earlier run of its sender")]
    Former,
    /// It was on its way for too long.
    #[error("a packet was on its way for seconds")]
    Stale,
}

/// What took this much longer than the sender's fastest packet is not heard.
pub const STALE: Duration = Duration::from_secs(2);
/// Clocks drift apart: by no more than this share of the time.
const DRIFT: f64 = 0.001;

/// What is remembered of a sender.
#[derive(Clone, Copy, Debug)]
struct Heard {
    session: u64,
    highest: u32,
    /// Bit n: `highest - n` was heard.
    window: u128,
    /// Our clock minus the sender's, in milliseconds, with the fastest packet.
    offset: f64,
    at: Duration,
}

/// What is remembered of all senders.
#[derive(Debug, Default)]
pub struct Guard {
    heard: BTreeMap<Key, Heard>,
    /// Sessions known from an earlier run of ours.
    former: BTreeMap<Key, u64>,
}

impl Guard {
    /// A guard that knows which sessions of others were heard before it was there.
    pub fn new(former: BTreeMap<Key, u64>) -> Guard {
        Guard { heard: BTreeMap::new(), former }
    }

    /// Looks at an authentic packet, and remembers it.
    ///
    /// # Errors
    /// Why it must not be heard.
    pub fn check(&mut self, now: Duration, from: Key, stamp: Stamp) -> Result<(), Refused> {
        let offset = now.as_secs_f64() * 1e3 - stamp.sent as f64;
        if self.former.get(&from).is_some_and(|former| stamp.session < *former) {
            return Err(Refused::Former);
        }
        let heard = match self.heard.get_mut(&from) {
            Some(heard) if heard.session == stamp.session => heard,
            Some(heard) if heard.session > stamp.session => return Err(Refused::Former),
            _ => {
                let heard = Heard { session: stamp.session, highest: stamp.number, window: 1, offset, at: now };
                self.heard.insert(from, heard);
                return Ok(());
            }
        };
        let drifted = heard.offset + now.saturating_sub(heard.at).as_secs_f64() * 1e3 * DRIFT;
        if offset - drifted > STALE.as_secs_f64() * 1e3 {
            return Err(Refused::Stale);
        }
        match stamp.number.checked_sub(heard.highest) {
            Some(0) => return Err(Refused::Repeated),
            Some(ahead) => {
                heard.window = if ahead < 128 { heard.window << ahead | 1 } else { 1 };
                heard.highest = stamp.number;
            }
            None => {
                let behind = heard.highest - stamp.number;
                // What is further behind than we remember may have been heard.
                if behind >= 128 || heard.window & 1 << behind != 0 {
                    return Err(Refused::Repeated);
                }
                heard.window |= 1 << behind;
            }
        }
        heard.offset = offset.min(drifted);
        heard.at = now;
        Ok(())
    }

    /// Another key pair is another sender: nothing of the former one holds.
    pub fn forget(&mut self, who: Key) {
        self.heard.remove(&who);
        self.former.remove(&who);
    }

    /// The newest session of everyone, to be kept for our next run.
    pub fn sessions(&self) -> BTreeMap<Key, u64> {
        let mut all = self.former.clone();
        all.extend(self.heard.iter().map(|(key, heard)| (*key, heard.session)));
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: Key = Key(1);

    #[test]
    fn packets_are_heard_once() {
        let mut guard = Guard::new([(A, 50)].into());
        let mut check = |ms: u64, session: u64, number: u32, sent: u64, expect: Result<(), Refused>| {
            let stamp = Stamp { session, number, sent };
            assert_eq!(guard.check(Duration::from_millis(ms), A, stamp), expect, "{ms} {stamp:?}");
        };
        check(1000, 49, 0, 0, Err(Refused::Former));
        check(1000, 100, 5, 0, Ok(()));
        check(1001, 100, 5, 0, Err(Refused::Repeated));
        check(1002, 100, 7, 1, Ok(()));
        check(1003, 100, 6, 1, Ok(()));
        check(1003, 100, 6, 1, Err(Refused::Repeated));
        check(1004, 100, 400, 2, Ok(()));
        check(1005, 100, 9, 2, Err(Refused::Repeated));
        check(1005, 100, 273, 2, Ok(()));
        // Sent at 3, and 2.1 s under way.
        check(3104, 100, 401, 3, Err(Refused::Stale));
        check(3104, 100, 402, 2100, Ok(()));
        check(3105, 99, 1, 2100, Err(Refused::Former));
        check(3106, 101, 0, 0, Ok(()));
        check(3107, 100, 403, 2102, Err(Refused::Former));
    }

    #[test]
    fn clocks_that_drift_stay_understood() {
        let mut guard = Guard::default();
        for minute in 0..10_000u64 {
            // The sender's clock loses 500 ppm: half a minute and more in all.
            let sent = (minute as f64 * 60_000.0 * 0.9995) as u64;
            let stamp = Stamp { session: 1, number: minute as u32, sent };
            assert_eq!(guard.check(Duration::from_secs(minute * 60), A, stamp), Ok(()), "after {minute} minutes");
        }
    }

    proptest! {
        #[test]
        fn no_number_is_heard_twice(numbers in prop::collection::vec(0..300u32, 1..300)) {
            let mut guard = Guard::default();
            let mut heard = std::collections::BTreeSet::new();
            for number in numbers {
                let stamp = Stamp { session: 1, number, sent: 0 };
                if guard.check(Duration::ZERO, A, stamp).is_ok() {
                    prop_assert!(heard.insert(number));
                }
            }
        }
    }
}
