//! Watch histories are ordered, complete and without a jump.
//!
//! Each watcher, however often it was cut off, sees revisions grow, sees every acknowledged write at its revision and
//! once, sees what every other watcher sees of the same revisions, never sees what was refused or never written, and
//! never has to begin again. In the end it has seen everything.

use std::{collections::BTreeMap, sync::Arc};

use crate::history::{Fate, History, Revision, Watch, WatchEvent};

type What = (Arc<str>, Option<u64>);

pub(super) fn check(history: &History) -> (Vec<String>, usize) {
    let fates: BTreeMap<(Arc<str>, u64), &Fate> =
        history.writes.iter().map(|w| ((w.key.clone(), w.value), &w.fate)).collect();
    let mut must: BTreeMap<Revision, (What, String)> = BTreeMap::new();
    for write in &history.writes {
        if let Fate::Acknowledged(revision) = write.fate {
            let what = (write.key.clone(), Some(write.value));
            must.insert(revision, (what, "was acknowledged".into()));
        }
    }
    let mut broken = Vec::new();
    // What one watcher saw the others must see; the first one who saw a revision is its witness.
    for watch in &history.watches {
        for event in &watch.events {
            let what = (event.key.clone(), event.value);
            match must.get(&event.revision) {
                Some((same, _)) if *same == what => {}
                Some(((key, value), how)) => broken.push(format!(
                    "{}: revision {} is {}, but {} {how} there",
                    watch.client,
                    event.revision,
                    shown(&event.key, event.value),
                    shown(key, *value)
                )),
                None => {
                    must.insert(event.revision, (what, format!("was seen by {}", watch.client)));
                }
            }
        }
    }
    for watch in &history.watches {
        one(watch, &fates, &must, history.last_revision, &mut broken);
    }
    (broken, history.watches.iter().map(|w| w.events.len()).sum())
}

fn one(
    watch: &Watch,
    fates: &BTreeMap<(Arc<str>, u64), &Fate>,
    must: &BTreeMap<Revision, (What, String)>,
    last: Revision,
    broken: &mut Vec<String>,
) {
    let client = &watch.client;
    for (at, why) in &watch.began_again {
        broken.push(format!("{client}: had to begin again {:.1} s after the start: {why}", at.as_secs_f64()));
    }
    let mut before = watch.from;
    for WatchEvent { key, value, revision, .. } in &watch.events {
        let what = shown(key, *value);
        if *revision <= before {
            broken.push(format!("{client}: {what} of revision {revision} came after revision {before}"));
        }
        before = before.max(*revision);
        match value.map(|v| fates.get(&(key.clone(), v))) {
            None => broken.push(format!("{client}: {what} at revision {revision}, though nobody deletes")),
            Some(None) => broken.push(format!("{client}: {what} at revision {revision}, which nobody wrote")),
            Some(Some(Fate::Refused(why))) => broken.push(format!("{client}: {what}, which was refused: {why}")),
            Some(Some(Fate::Acknowledged(at))) if at != revision => {
                broken.push(format!("{client}: {what} at revision {revision}, acknowledged at {at}"));
            }
            Some(Some(_)) => {}
        }
    }
    let until = watch.until.max(before);
    if until < last {
        broken.push(format!("{client}: was told of everything up to revision {until}, the last being {last}"));
    }
    let seen: std::collections::BTreeSet<Revision> = watch.events.iter().map(|e| e.revision).collect();
    if until > watch.from {
        for (revision, ((key, value), how)) in must.range(watch.from + 1..=until) {
            if !seen.contains(revision) {
                broken
                    .push(format!("{client}: jumped over {} of revision {revision}, which {how}", shown(key, *value)));
            }
        }
    }
}

fn shown(key: &str, value: Option<u64>) -> String {
    value.map_or_else(|| format!("{key} deleted"), |value| format!("{key}={value}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::sample::{acknowledged, event, expect, ms, write},
        history::Write,
    };

    fn writes() -> Vec<Write> {
        vec![
            acknowledged("a", 1, (0, 1), 10),
            acknowledged("b", 1, (1, 2), 11),
            acknowledged("a", 2, (2, 3), 12),
            write("a", 3, (3, 9), Fate::Unknown("timeout".into())),
            write("b", 2, (3, 4), Fate::Refused("conflict".into())),
        ]
    }

    fn watch(client: &str, events: &[WatchEvent]) -> Watch {
        let until = events.iter().map(|e| e.revision).max().unwrap_or(9);
        Watch { client: client.into(), from: 9, events: events.to_vec(), until, began_again: vec![] }
    }

    fn verify(watches: Vec<Watch>, last_revision: Revision, parts: &[&str]) {
        expect(&check(&History { writes: writes(), watches, last_revision, ..History::default() }).0, parts);
    }

    fn all() -> Vec<WatchEvent> {
        vec![event("a", 1, 10), event("b", 1, 11), event("a", 2, 12)]
    }

    #[test]
    fn complete_histories_are_fine() {
        verify(vec![watch("w", &all())], 12, &[]);
        // One whose fate is unknown may have happened; then everyone sees it.
        let more = [all(), vec![event("a", 3, 13)]].concat();
        verify(vec![watch("w", &more), watch("v", &more)], 13, &[]);
        // One that begins later sees what came later.
        let late = Watch { from: 11, ..watch("w", &all()[2..]) };
        verify(vec![late], 12, &[]);
        // Progress without events counts.
        let told = Watch { until: 20, ..watch("w", &all()) };
        verify(vec![told], 20, &[]);
    }

    #[test]
    fn a_jump_is_seen() {
        let events = [event("a", 1, 10), event("a", 2, 12)];
        verify(vec![watch("w", &events)], 12, &["w: jumped over b=1 of revision 11, which was acknowledged"]);
        let nothing = Watch { until: 12, ..watch("w", &[]) };
        verify(vec![nothing], 12, &["jumped over a=1", "jumped over b=1", "jumped over a=2"]);
        let more = [all(), vec![event("a", 3, 13)]].concat();
        let less = Watch { until: 13, ..watch("v", &all()) };
        verify(vec![watch("w", &more), less], 13, &["v: jumped over a=3 of revision 13, which was seen by w"]);
        verify(vec![watch("w", &all()[..2])], 12, &["w: was told of everything up to revision 11, the last being 12"]);
        let again = Watch { began_again: vec![(ms(1500), "410 Expired".into())], ..watch("w", &all()) };
        verify(vec![again], 12, &["w: had to begin again 1.5 s after the start: 410 Expired"]);
    }

    #[test]
    fn disorder_is_seen() {
        let swapped = [event("a", 1, 10), event("a", 2, 12), event("b", 1, 11)];
        verify(vec![watch("w", &swapped)], 12, &["w: b=1 of revision 11 came after revision 12"]);
        let twice = [all(), vec![event("a", 2, 12)]].concat();
        verify(vec![watch("w", &twice)], 12, &["w: a=2 of revision 12 came after revision 12"]);
        let old = Watch { from: 10, ..watch("w", &all()) };
        verify(vec![old], 12, &["w: a=1 of revision 10 came after revision 10"]);
    }

    #[test]
    fn inventions_are_seen() {
        let with = |extra: WatchEvent| vec![watch("w", &[all(), vec![extra]].concat())];
        verify(with(event("c", 1, 13)), 12, &["w: c=1 at revision 13, which nobody wrote"]);
        verify(with(event("b", 2, 13)), 12, &["w: b=2, which was refused: conflict"]);
        let deleted = WatchEvent { value: None, ..event("b", 1, 13) };
        verify(with(deleted), 12, &["w: b deleted at revision 13, though nobody deletes"]);
        let moved = [event("a", 1, 10), event("b", 1, 11), event("a", 2, 14)];
        let parts = ["w: a=2 at revision 14, acknowledged at 12", "w: jumped over a=2 of revision 12"];
        verify(vec![watch("w", &moved)], 12, &parts);
        let other = [event("a", 1, 10), event("a", 3, 11), event("a", 2, 12)];
        verify(vec![watch("w", &other)], 12, &["revision 11 is a=3, but b=1 was acknowledged there"]);
    }
}
