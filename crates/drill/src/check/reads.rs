//! No stale read after a consistent one.
//!
//! A read that asks for the newest state sees every write that was acknowledged before it was sent, and nothing older
//! than what any such read had seen that was answered before it was sent, by whatever server, for whatever client. No
//! read at all sees what was not written yet.

use std::{collections::BTreeMap, sync::Arc};

use crate::history::{At, Fate, History};

/// The largest value of a key that was known at a time, and how.
#[derive(Default)]
struct Known(BTreeMap<At, (u64, String)>);

impl Known {
    fn add(&mut self, mut facts: Vec<(At, u64, String)>) {
        facts.sort_by_key(|(at, ..)| *at);
        let mut most = 0;
        for (at, value, how) in facts {
            if value > most {
                most = value;
                self.0.insert(at, (value, how));
            }
        }
    }

    fn at(&self, time: At) -> Option<&(u64, String)> {
        // What ended at the very instant at which the read began may have ended after it.
        self.0.range(..time).next_back().map(|(_, known)| known)
    }
}

pub(super) fn check(history: &History) -> (Vec<String>, usize) {
    let mut facts: BTreeMap<Arc<str>, Vec<(At, u64, String)>> = BTreeMap::new();
    let mut begun: BTreeMap<Arc<str>, Vec<(At, u64, String)>> = BTreeMap::new();
    for write in &history.writes {
        begun.entry(write.key.clone()).or_default().push((write.start, write.value, String::new()));
        if let Fate::Acknowledged(revision) = write.fate {
            let how = format!("was acknowledged at revision {revision}");
            facts.entry(write.key.clone()).or_default().push((write.end, write.value, how));
        }
    }
    for read in history.reads.iter().filter(|r| r.consistent) {
        if let Some(seen) = read.seen {
            let how = format!("had been read by {}", read.client);
            facts.entry(read.key.clone()).or_default().push((read.end, seen.value, how));
        }
    }
    let known = |facts: BTreeMap<Arc<str>, Vec<(At, u64, String)>>| -> BTreeMap<Arc<str>, Known> {
        let all = facts.into_iter().map(|(key, facts)| {
            let mut known = Known::default();
            known.add(facts);
            (key, known)
        });
        all.collect()
    };
    let (known, begun) = (known(facts), known(begun));
    let mut broken = Vec::new();
    for read in &history.reads {
        let value = read.seen.map_or(0, |s| s.value);
        let when = format!("{:.3} s after the start", read.start.as_secs_f64());
        if read.consistent
            && let Some((least, how)) = known.get(&read.key).and_then(|k| k.at(read.start))
            && value < *least
        {
            broken.push(format!("{} read {}={value} {when}: {least} {how} before that", read.client, read.key));
        }
        let most = begun.get(&read.key).and_then(|b| b.at(read.end)).map_or(0, |(most, _)| *most);
        if value > most {
            broken.push(format!("{} read {}={value} {when}, when {most} was the last sent", read.client, read.key));
        }
    }
    (broken, history.reads.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::sample::{acknowledged, expect, read, write},
        history::{Read, Write},
    };

    fn verify(reads: &[Read], parts: &[&str]) {
        let writes: Vec<Write> = vec![
            acknowledged("k", 1, (0, 10), 10),
            acknowledged("k", 2, (20, 30), 20),
            write("k", 3, (40, 50), Fate::Unknown("timeout".into())),
        ];
        expect(&check(&History { writes, reads: reads.to_vec(), ..History::default() }).0, parts);
    }

    #[test]
    fn reads_see_what_was_acknowledged_before_they_were_sent() {
        verify(&[read("k", 2, (31, 32))], &[]);
        verify(&[read("k", 1, (31, 32))], &["r read k=1 0.031 s after the start: 2 was acknowledged at revision 20"]);
        verify(&[read("k", 0, (31, 32))], &["r read k=0"]);
        // While a write is under way both are right.
        verify(&[read("k", 1, (25, 35)), read("k", 2, (25, 26))], &[]);
        verify(&[read("k", 1, (30, 35))], &[]);
        // What nobody knows the fate of may have happened, now or later.
        verify(&[read("k", 3, (60, 61)), read("other", 0, (60, 61))], &[]);
        verify(&[read("k", 2, (60, 61))], &[]);
    }

    #[test]
    fn reads_never_go_back() {
        verify(
            &[read("k", 2, (22, 24)), read("k", 1, (25, 26))],
            &["r read k=1 0.025 s after the start: 2 had been read by r"],
        );
        verify(&[read("k", 3, (60, 61)), read("k", 2, (62, 63))], &["3 had been read by r"]);
        verify(&[read("k", 2, (22, 26)), read("k", 1, (25, 27))], &[]);
        // Who asks for any state gets any; but it does not count as knowledge either.
        let any = |value, at| Read { consistent: false, ..read("k", value, at) };
        verify(&[read("k", 2, (31, 32)), any(1, (33, 34))], &[]);
        verify(&[any(3, (60, 61)), read("k", 2, (62, 63))], &[]);
    }

    #[test]
    fn reads_see_nothing_that_is_still_to_come() {
        verify(&[read("k", 2, (12, 19))], &["r read k=2 0.012 s after the start, when 1 was the last sent"]);
        verify(&[Read { consistent: false, ..read("k", 9, (60, 61)) }], &["when 3 was the last sent"]);
    }
}
