//! Fencing by seed.

use std::{cell::Cell, time::Duration};

use seawall_quorum::timing::Profile;
use seawall_sim::{
    fencing::{Setting, run},
    for_seeds,
};

#[test]
fn a_stateful_pod_never_runs_twice() {
    let totals = Cell::new((0, 0, 0));
    for_seeds(2000, |seed| {
        let (nodes, pods) = (2 + (seed % 4) as usize, 1 + (seed % 3) as usize);
        let outcome = run(seed, Setting { nodes, pods, ..Setting::default() })?;
        let (forced, stopped, refused) = totals.get();
        totals.set((forced + outcome.forced, stopped + outcome.stopped, refused + outcome.refused));
        Ok(())
    });
    let (forced, stopped, refused) = totals.get();
    eprintln!("{forced} pods taken away, {stopped} stopped by their nodes, {refused} deletions refused");
    // The days were bad indeed.
    assert!(std::env::var("SEAWALL_SEED").is_ok() || (forced > 5000 && stopped > 5000 && refused > 50));
}

#[test]
fn machines_far_apart() {
    let length = Duration::from_secs(600);
    for_seeds(300, |seed| run(seed, Setting { profile: Profile::Wan, length, ..Setting::default() }).map(|_| ()));
}

#[test]
fn when_all_is_well_nothing_is_touched() {
    for_seeds(100, |seed| {
        let outcome = run(seed, Setting { faults: false, ..Setting::default() })?;
        assert_eq!((outcome.forced, outcome.stopped), (0, 0), "seed {seed}");
        assert!(outcome.longest_gap < Duration::from_secs(5), "seed {seed}: {:?}", outcome.longest_gap);
        Ok(())
    });
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| run(seed, Setting::default()).unwrap();
    assert_eq!(run(7), run(7));
    assert_ne!(run(7).fingerprint, run(8).fingerprint);
}

/// Each of the three things that make it hold is needed.
#[test]
fn without_any_of_them_it_runs_twice() {
    for setting in [
        Setting { waits: false, ..Setting::default() },
        Setting { permits: false, ..Setting::default() },
        Setting { exact: false, ..Setting::default() },
    ] {
        let broken = (0..3000).find_map(|seed| run(seed, setting).err());
        let broken = broken.unwrap_or_else(|| panic!("some seed shows what it is for: {setting:?}"));
        assert!(broken.what.contains("runs twice"), "{setting:?}: {}", broken.what);
    }
}
