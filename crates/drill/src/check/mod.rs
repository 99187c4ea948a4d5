//! What must hold, whatever happened: one invariant a file. Pure: a history in, a verdict out.

mod acknowledged;
mod leaders;
pub mod nodes;
mod one_writer;
mod reads;
mod watches;
mod workload;

use crate::history::History;

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The invariant.
    pub name: &'static str,
    /// What breaks it; nothing if it holds.
    pub violations: Vec<String>,
    /// How many things were looked at: an invariant that holds of nothing says nothing.
    pub looked_at: usize,
}

impl Verdict {
    /// Whether the invariant holds.
    pub fn holds(&self) -> bool {
        self.violations.is_empty()
    }
}

/// An invariant: its name, and what breaks it in a history, with how much was looked at.
type Invariant = (&'static str, fn(&History) -> (Vec<String>, usize));

/// All invariants.
const INVARIANTS: [Invariant; 5] = [
    ("no acknowledged write lost", acknowledged::check),
    ("watches ordered, complete, without a jump", watches::check),
    ("no stale read after a consistent one", reads::check),
    ("no two leaders in one term", leaders::check),
    ("workload untouched", workload::check),
];

/// What must hold of nodes and Services. Where packets are lost, or machines stand still whose kernels go on to take
/// connections (`lossy`), some connections fail, whoever serves them.
pub fn services(history: &History, victims: &[nodes::Victim], lossy: bool) -> Vec<Verdict> {
    let verdict = |name, (violations, looked_at): (Vec<String>, usize)| Verdict { name, violations, looked_at };
    let mut verdicts = vec![
        verdict("no false verdict", nodes::no_false_verdict(history, victims)),
        verdict("living connections left alone", nodes::living_connections_are_left_alone(history, victims)),
        verdict("no stateful pod ran twice", one_writer::check(history)),
    ];
    if !lossy {
        verdicts.push(verdict("no relayed connection failed", nodes::no_relayed_connection_failed(history, victims)));
    }
    verdicts
}

/// Of what was planned nobody notices: no request of a user of a Service fails.
pub fn nobody_noticed(history: &History) -> Verdict {
    let (violations, looked_at) = nodes::no_request_failed(history);
    Verdict { name: "no request failed", violations, looked_at }
}

/// Checks a history.
pub fn check(history: &History) -> Vec<Verdict> {
    let verdict = |(name, check): &Invariant| {
        let (violations, looked_at) = check(history);
        Verdict { name, violations, looked_at }
    };
    INVARIANTS.iter().map(verdict).collect()
}

#[cfg(test)]
pub(crate) mod sample {
    //! Histories in a few words.

    use std::time::Duration;

    use crate::history::*;

    pub fn ms(t: u64) -> At {
        Duration::from_millis(t)
    }

    pub fn write(key: &str, value: u64, at: (u64, u64), fate: Fate) -> Write {
        Write { key: key.into(), value, start: ms(at.0), end: ms(at.1), fate }
    }

    pub fn acknowledged(key: &str, value: u64, at: (u64, u64), revision: Revision) -> Write {
        write(key, value, at, Fate::Acknowledged(revision))
    }

    pub fn read(key: &str, value: u64, at: (u64, u64)) -> Read {
        let seen = (value > 0).then_some(Seen { value, revision: value * 10 });
        Read { client: "r".into(), key: key.into(), start: ms(at.0), end: ms(at.1), seen, consistent: true }
    }

    pub fn event(key: &str, value: u64, revision: Revision) -> WatchEvent {
        WatchEvent { at: ms(0), key: key.into(), value: Some(value), revision }
    }

    /// The violations, each of which must contain its part, and no other.
    pub fn expect(found: &[String], parts: &[&str]) {
        assert_eq!(found.len(), parts.len(), "{found:#?}");
        for (found, part) in found.iter().zip(parts) {
            assert!(found.contains(part), "{part:?} is not in {found:?}");
        }
    }
}
