//! A stateful pod never runs twice: no life of it writes while another one does.

use std::collections::BTreeMap;

use crate::history::{History, Life};

pub(super) fn check(history: &History) -> (Vec<String>, usize) {
    let mut pods: BTreeMap<&str, Vec<&Life>> = BTreeMap::new();
    for life in &history.lives {
        pods.entry(&life.name).or_default().push(life);
    }
    let mut found = Vec::new();
    for (name, mut lives) in pods {
        lives.sort_by_key(|life| life.first);
        for two in lives.windows(2) {
            if two[1].first <= two[0].last {
                found.push(format!(
                    "{name}: {} wrote until {:.3} s, and {} from {:.3} s",
                    two[0].uid,
                    two[0].last.as_secs_f64(),
                    two[1].uid,
                    two[1].first.as_secs_f64()
                ));
            }
        }
    }
    (found, history.lives.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::sample::{expect, ms};

    #[test]
    fn lives_follow_one_another() {
        let life = |name: &str, uid: &str, first, last| Life {
            name: name.into(),
            uid: uid.into(),
            first: ms(first),
            last: ms(last),
        };
        let verify = |lives: Vec<Life>, parts: &[&str]| {
            expect(&check(&History { lives, ..History::default() }).0, parts);
        };
        verify(vec![life("w-0", "b", 500, 900), life("w-0", "a", 0, 400), life("w-1", "c", 300, 600)], &[]);
        verify(
            vec![life("w-0", "a", 0, 500), life("w-0", "b", 500, 900)],
            &["a wrote until 0.500 s, and b from 0.500"],
        );
    }
}
