//! Elections by seed.

use std::{cell::Cell, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng};
use seawall_quorum::timing::{Profile, Timing};
use seawall_sim::{
    election::{Setting, run},
    for_seeds,
};

#[test]
fn one_writer_and_no_gap_on_bad_days() {
    let totals = Cell::new((0, 0, 0));
    for_seeds(3000, |seed| {
        let outcome = run(seed, Setting { candidates: 2 + (seed % 4) as usize, ..Setting::default() })?;
        let (terms, written, refused) = totals.get();
        totals.set((terms + outcome.terms, written + outcome.written, refused + outcome.refused));
        Ok(())
    });
    let (terms, written, refused) = totals.get();
    eprintln!("{terms} terms, {written} writes accepted, {refused} refused");
    // The days were bad indeed.
    assert!(std::env::var("SEAWALL_SEED").is_ok() || (terms > 10_000 && refused > 100));
}

#[test]
fn other_profiles() {
    for profile in [Profile::Kubernetes, Profile::Wan] {
        let length = Duration::from_secs(300);
        let timing = Timing::of(profile);
        for_seeds(200, |seed| run(seed, Setting { timing, length, ..Setting::default() }).map(|_| ()));
    }
}

/// Whatever times the sums let through, elections keep what they promise.
#[test]
fn any_times_that_fit_together() {
    let (fit, refused) = (Cell::new(0), Cell::new(0));
    for_seeds(3000, |seed| {
        let mut random = StdRng::seed_from_u64(seed);
        let mut time = |low: u64, high: u64| Duration::from_millis(random.random_range(low..high));
        let timing = Timing {
            lease_duration: time(300, 20_000),
            renew_deadline: time(100, 15_000),
            retry_period: time(50, 5000),
            grace: time(50, 5000),
            ..Timing::of(Profile::Fast)
        };
        let fits = timing.check().is_ok();
        let count = if fits { &fit } else { &refused };
        count.set(count.get() + 1);
        match fits {
            true => run(seed, Setting { timing, length: Duration::from_secs(120), ..Setting::default() }).map(|_| ()),
            false => Ok(()),
        }
    });
    eprintln!("{} sets of times fit together, {} are refused", fit.get(), refused.get());
    assert!(std::env::var("SEAWALL_SEED").is_ok() || (fit.get() > 100 && refused.get() > 100));
}

#[test]
fn without_faults_the_first_leader_stays() {
    for_seeds(100, |seed| {
        let outcome = run(seed, Setting { faults: false, ..Setting::default() })?;
        assert_eq!(outcome.terms, 1, "seed {seed}");
        assert!(outcome.longest_gap < Duration::from_secs(1), "seed {seed}: {:?}", outcome.longest_gap);
        Ok(())
    });
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| run(seed, Setting::default()).unwrap();
    assert_eq!(run(7), run(7));
    assert_ne!(run(7).fingerprint, run(8).fingerprint);
}

#[test]
fn without_the_fence_a_deposed_leader_gets_through() {
    let broken = (0..500).find_map(|seed| run(seed, Setting { fenced: false, ..Setting::default() }).err());
    let broken = broken.expect("some seed shows what the fence is for");
    assert!(broken.what.contains("was accepted after one of term"), "{}", broken.what);
}

#[test]
fn where_everything_is_slow_leaders_stay() {
    for slow in [200, 300, 400] {
        for_seeds(100, |seed| {
            let outcome = run(seed, Setting { slow, faults: false, ..Setting::default() })?;
            // The first ones may go before they know how slow it is.
            assert!(outcome.terms <= 6, "seed {seed}, {slow} ms: {} terms in a minute", outcome.terms);
            Ok(())
        });
    }
}
