//! No acknowledged write is lost.
//!
//! In the end a key holds the last value that was acknowledged, at the revision that the acknowledgement named; or a
//! later one whose fate nobody knew. It never holds a value that was refused or that nobody wrote. Acknowledged
//! revisions of a key grow with its values.

use std::{collections::BTreeMap, sync::Arc};

use crate::history::{Fate, History, Write};

pub(super) fn check(history: &History) -> (Vec<String>, usize) {
    let mut keys: BTreeMap<Arc<str>, Vec<&Write>> = BTreeMap::new();
    for write in &history.writes {
        keys.entry(write.key.clone()).or_default().push(write);
    }
    let mut broken = Vec::new();
    for (key, mut writes) in keys {
        writes.sort_by_key(|w| w.value);
        // What was acknowledged after the last look at the store is not expected there.
        let acknowledged: Vec<(u64, u64)> = writes
            .iter()
            .filter_map(|w| match w.fate {
                Fate::Acknowledged(revision) => Some((w.value, revision)),
                _ => None,
            })
            .collect();
        for pair in acknowledged.windows(2) {
            if let [(before, at), (after, then)] = pair
                && then <= at
            {
                broken.push(format!("{key}: {after} was acknowledged at revision {then}, after {before} at {at}"));
            }
        }
        let last = acknowledged.last().copied();
        match (history.last.get(&key), last) {
            (None, Some((value, revision))) => {
                broken.push(format!("{key} is gone: {value} was acknowledged at revision {revision}"));
            }
            (Some(seen), Some((value, revision))) if seen.value < value => {
                broken.push(format!(
                    "{key} holds {} of revision {}: {value} was acknowledged at revision {revision}",
                    seen.value, seen.revision
                ));
            }
            (Some(seen), Some((value, revision))) if seen.value == value && seen.revision != revision => {
                broken.push(format!(
                    "{key} holds {value} at revision {}: it was acknowledged at revision {revision}",
                    seen.revision
                ));
            }
            (Some(seen), _) => match writes.iter().find(|w| w.value == seen.value).map(|w| &w.fate) {
                None => broken.push(format!("{key} holds {}, which nobody wrote", seen.value)),
                Some(Fate::Refused(why)) => {
                    broken.push(format!("{key} holds {}, which was refused: {why}", seen.value));
                }
                Some(_) => {}
            },
            (None, None) => {}
        }
    }
    let looked_at = history.writes.iter().filter(|w| matches!(w.fate, Fate::Acknowledged(_))).count();
    (broken, looked_at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::sample::{acknowledged, expect, write},
        history::Seen,
    };

    fn verify(writes: &[Write], last: &[(&str, u64, u64)], parts: &[&str]) {
        let last =
            last.iter().map(|(key, value, revision)| ((*key).into(), Seen { value: *value, revision: *revision }));
        let history = History { writes: writes.to_vec(), last: last.collect(), ..History::default() };
        expect(&check(&history).0, parts);
    }

    fn unknown(value: u64) -> Write {
        write("k", value, (20, 30), Fate::Unknown("timeout".into()))
    }

    #[test]
    fn what_may_be_and_what_may_not() {
        let (one, two) = (acknowledged("k", 1, (0, 5), 10), acknowledged("k", 2, (6, 9), 20));
        let acked = [one.clone(), two.clone()];
        verify(&acked, &[("k", 2, 20)], &[]);
        verify(&acked, &[], &["k is gone: 2 was acknowledged at revision 20"]);
        verify(&acked, &[("k", 1, 10)], &["k holds 1 of revision 10: 2 was acknowledged at revision 20"]);
        verify(&acked, &[("k", 2, 25)], &["it was acknowledged at revision 20"]);
        verify(&acked, &[("k", 9, 30)], &["k holds 9, which nobody wrote"]);
        // Nobody knows what became of the third: both are fine.
        let three = [one.clone(), two.clone(), unknown(3)];
        verify(&three, &[("k", 2, 20)], &[]);
        verify(&three, &[("k", 3, 40)], &[]);
        verify(&[unknown(1)], &[], &[]);
        verify(&[unknown(1)], &[("k", 1, 5)], &[]);
        let refused = [one, two, write("k", 3, (20, 30), Fate::Refused("conflict".into()))];
        verify(&refused, &[("k", 3, 40)], &["k holds 3, which was refused: conflict"]);
        verify(&refused, &[("k", 2, 20)], &[]);
    }

    #[test]
    fn revisions_grow() {
        let writes = [acknowledged("k", 1, (0, 5), 20), acknowledged("k", 2, (6, 9), 20)];
        verify(&writes, &[("k", 2, 20)], &["2 was acknowledged at revision 20, after 1 at 20"]);
    }
}
