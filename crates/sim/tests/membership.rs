//! Etcd's members by seed.

use std::{cell::Cell, time::Duration};

use seawall_sim::{
    for_seeds,
    membership::{Outcome, Setting, run},
};

const DAY: Setting = Setting { machines: 3, bad: Duration::from_secs(1800), ruled: true };

#[test]
fn no_step_loses_the_quorum_and_all_heals() {
    let total = Cell::new(Outcome::default());
    for_seeds(1000, |seed| {
        let outcome = run(seed, Setting { machines: [1, 2, 3, 4, 5, 7][seed as usize % 6], ..DAY })?;
        let sum = total.get();
        total.set(Outcome {
            promoted: sum.promoted + outcome.promoted,
            removed: sum.removed + outcome.removed,
            refused: sum.refused + outcome.refused,
            written: sum.written + outcome.written,
        });
        Ok(())
    });
    let sum = total.get();
    eprintln!("{sum:?}");
    assert!(std::env::var("SEAWALL_SEED").is_ok() || (sum.promoted > 3000 && sum.removed > 1000 && sum.refused > 1000));
}

#[test]
fn without_the_rules_a_quorum_is_lost() {
    let broken = (0..300).find_map(|seed| run(seed, Setting { ruled: false, ..DAY }).err());
    let broken = broken.expect("some seed shows what the rules are for");
    assert!(broken.what.contains("lost the quorum"), "{}", broken.what);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    assert_eq!(run(11, DAY).unwrap(), run(11, DAY).unwrap());
    assert_ne!(run(11, DAY).unwrap(), run(12, DAY).unwrap());
}
