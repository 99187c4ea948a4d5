//! Never two leaders whose writes landed in one term, and no write of a term after one of a later term.
//!
//! The same for Leases: one that was created anew has another identity (a term is the revision of its creation), and all
//! states of one Lease have one holder, until it is let go of.

use std::{collections::BTreeMap, sync::Arc};

use crate::history::History;

pub(super) fn check(history: &History) -> (Vec<String>, usize) {
    let mut broken = Vec::new();
    let mut led: Vec<_> = history.led.iter().collect();
    led.sort_by_key(|l| l.revision);
    let mut leaders: BTreeMap<u64, Arc<str>> = BTreeMap::new();
    let mut last = 0;
    for write in led {
        let leader = leaders.entry(write.term).or_insert_with(|| write.leader.clone());
        if *leader != write.leader {
            broken.push(format!(
                "term {}: {} wrote at revision {}, and {leader} before",
                write.term, write.leader, write.revision
            ));
        }
        if write.term < last {
            broken.push(format!(
                "{} wrote in term {} at revision {}, after a write of term {last}",
                write.leader, write.term, write.revision
            ));
        }
        last = last.max(write.term);
    }
    let mut holders: BTreeMap<(Arc<str>, Arc<str>), Arc<str>> = BTreeMap::new();
    for seen in history.leases.iter().filter(|l| !l.holder.is_empty()) {
        let holder = holders.entry((seen.lease.clone(), seen.uid.clone())).or_insert_with(|| seen.holder.clone());
        if *holder != seen.holder {
            broken.push(format!(
                "Lease {}: {} holds it at revision {}, in the term of {holder}",
                seen.lease, seen.holder, seen.revision
            ));
        }
    }
    (broken, history.led.len() + history.leases.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::sample::{expect, ms},
        history::{LeaseSeen, Led},
    };

    fn verify(led: &[(&str, u64, u64)], parts: &[&str]) {
        let led = led.iter().map(|(leader, term, revision)| Led {
            leader: (*leader).into(),
            term: *term,
            revision: *revision,
        });
        expect(&check(&History { led: led.collect(), ..History::default() }).0, parts);
    }

    #[test]
    fn writes() {
        verify(&[("a", 1, 10), ("a", 1, 11), ("b", 5, 12), ("a", 9, 13)], &[]);
        // The order in which they were recorded does not matter.
        verify(&[("b", 5, 12), ("a", 1, 10)], &[]);
        verify(&[("a", 1, 10), ("b", 1, 11)], &["term 1: b wrote at revision 11, and a before"]);
        verify(
            &[("a", 1, 10), ("b", 5, 11), ("a", 1, 12)],
            &["a wrote in term 1 at revision 12, after a write of term 5"],
        );
    }

    #[test]
    fn leases() {
        let check_leases = |seen: &[(&str, &str, &str)], parts: &[&str]| {
            let leases = seen.iter().enumerate().map(|(i, (lease, uid, holder))| LeaseSeen {
                at: ms(i as u64),
                lease: (*lease).into(),
                holder: (*holder).into(),
                uid: (*uid).into(),
                revision: i as u64,
            });
            expect(&check(&History { leases: leases.collect(), ..History::default() }).0, parts);
        };
        check_leases(&[("l", "1", "a"), ("l", "1", ""), ("l", "2", "b"), ("m", "3", "c"), ("l", "2", "b")], &[]);
        check_leases(&[("l", "1", "a"), ("l", "1", "b")], &["Lease l: b holds it at revision 1, in the term of a"]);
    }
}
