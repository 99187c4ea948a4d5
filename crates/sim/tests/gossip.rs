//! The gossip under a virtual clock.

use std::time::Duration;

use seawall_network::{gossip::core::Leaving, verdict::Verdict};
use seawall_quorum::timing::Profile;
use seawall_sim::{
    Broken, for_seeds,
    gossip::{Change, Fault, Setting, World},
};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn broken(what: String, world: &World) -> Broken {
    Broken { what, trace: world.changes.iter().map(|change| format!("{change:?}")).collect() }
}

fn middle(times: &mut [Duration], share: f64) -> Duration {
    times.sort();
    times[((times.len() - 1) as f64 * share).round() as usize]
}

/// Cuts the power of one member; when the first and the last of the others knew it.
fn power_off(seed: u64, setting: Setting) -> Result<(Duration, Duration), Broken> {
    let members = setting.members;
    let mut world = World::new(seed, setting);
    let victim = world.random(members);
    let at = secs(5) + ms(world.random(1000) as u64);
    world.run(at);
    world.plan(at, Fault::Off(victim));
    world.run(at + secs(10));
    let found = world.found_dead(victim, at);
    if found.len() != members - 1 {
        return Err(broken(format!("{} of {} know that {victim} is dead", found.len(), members - 1), &world));
    }
    let others = |change: &&Change| change.about != victim || change.at < at;
    if let Some(wrong) = world.changes.iter().find(others) {
        return Err(broken(format!("{wrong:?}"), &world));
    }
    Ok((found[0], found[members - 2]))
}

#[test]
fn a_death_is_known_to_all_within_a_second() {
    for (members, seeds) in [(2, 20), (3, 60), (5, 100), (20, 40), (100, 10)] {
        let all = std::cell::RefCell::new(Vec::new());
        for_seeds(seeds, |seed| {
            let (_, last) = power_off(seed, Setting { members, ..Setting::default() })?;
            all.borrow_mut().push(last);
            Ok(())
        });
        let mut all = all.into_inner();
        let (half, most, worst) = (middle(&mut all, 0.5), middle(&mut all, 0.9), middle(&mut all, 1.0));
        eprintln!("{members} members: all know after {half:?} (median), {most:?} (p90), {worst:?} (worst)");
        // Two of them have nobody to ask.
        let (typical, limit) = if members < 3 { (1800, 2500) } else { (800, 1600) };
        assert!(half < ms(typical) && worst < ms(limit), "{members} members: {half:?} {worst:?}");
    }
}
