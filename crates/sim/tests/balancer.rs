//! A node's balancer by seed.

use std::cell::Cell;

use seawall_quorum::timing::Profile;
use seawall_sim::{
    balancer::{Setting, run},
    for_seeds,
};

#[test]
fn the_dead_are_left_and_the_living_are_not() {
    let total = Cell::new((0, 0, 0));
    for_seeds(300, |seed| {
        let outcome = run(seed, Setting { servers: [2, 3, 3, 5][seed as usize % 4], ..Setting::default() })?;
        let (connections, astray, closed) = total.get();
        total.set((connections + outcome.connections, astray + outcome.astray, closed + outcome.closed));
        Ok(())
    });
    let (connections, astray, closed) = total.get();
    // Those that found nobody who serves are among the astray.
    eprintln!("{connections} connections, {astray} astray, closed {closed} times");
    assert!(std::env::var("SEAWALL_SEED").is_ok() || (closed > 1000 && astray * 10 < connections));
}

#[test]
fn other_profiles() {
    for profile in [Profile::Kubernetes, Profile::Wan] {
        for_seeds(100, |seed| run(seed, Setting { profile, ..Setting::default() }).map(|_| ()));
    }
}

#[test]
fn lost_questions_close_nothing_without_being_seen() {
    for_seeds(100, |seed| run(seed, Setting { loss: 5, ..Setting::default() }).map(|_| ()));
}

#[test]
fn one_that_hears_only_good_news_is_found_out() {
    let deaf = Setting { told: false, ..Setting::default() };
    let broken = (0..50).find_map(|seed| run(seed, deaf).err()).expect("some seed shows what the questions are for");
    assert!(broken.what.contains("still tried first") || broken.what.contains("is left"), "{}", broken.what);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| run(seed, Setting::default()).unwrap();
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}
