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
    world.run(at + secs(20));
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

/// Runs a cluster in which everybody lives; nobody may be called suspect or dead.
fn nobody_accused(seed: u64, setting: Setting, length: Duration) -> Result<u64, Broken> {
    let members = setting.members;
    let mut world = World::new(seed, setting);
    world.run(length);
    match world.changes.first() {
        None => Ok((0..members).map(|n| world.counters(n).suspicions).sum()),
        Some(wrong) => Err(broken(format!("{wrong:?}"), &world)),
    }
}

#[test]
fn lost_packets_change_no_verdict() {
    for (members, loss, seeds, length) in
        [(2, 5, 10, 300), (3, 5, 10, 300), (5, 1, 10, 300), (5, 5, 10, 300), (30, 5, 3, 60), (100, 5, 1, 30)]
    {
        let suspicions = std::cell::Cell::new(0);
        for_seeds(seeds, |seed| {
            let setting = Setting { members, loss, ..Setting::default() };
            suspicions.set(suspicions.get() + nobody_accused(seed, setting, secs(length))?);
            Ok(())
        });
        eprintln!("{members} members, {loss} %: {} suspicions, all of them refuted", suspicions.get());
    }
}

#[test]
fn members_find_each_other() {
    for (members, loss, limit) in [(2, 0, 2), (5, 0, 2), (5, 20, 5), (50, 5, 6)] {
        for_seeds(5, |seed| {
            let setting = Setting { members, loss, settled: false, ..Setting::default() };
            let mut world = World::new(seed, setting);
            world.run(secs(limit));
            match world.whole() {
                true => Ok(()),
                false => Err(broken(format!("{members} members do not know each other after {limit} s"), &world)),
            }
        });
    }
}

/// A fifth of the members gets no CPU time for a while, again and again. They may be called dead; nobody else may, and
/// in the end all live.
#[test]
fn frozen_members_harm_nobody_else() {
    for_seeds(12, |seed| {
        let members = [5, 10, 30][(seed % 3) as usize];
        let mut world = World::new(seed, Setting { members, ..Setting::default() });
        let mut victims = Vec::new();
        while victims.len() < members / 5 {
            let victim = world.random(members);
            if !victims.contains(&victim) {
                victims.push(victim);
            }
        }
        for victim in &victims {
            let mut at = secs(5);
            while at < secs(90) {
                let length = ms(1000 + world.random(29_000) as u64);
                let later = ms(world.random(3000) as u64);
                world.plan(at + later, Fault::Freeze(*victim, length));
                at += length + ms(5000 + world.random(10_000) as u64);
            }
        }
        world.run(secs(140));
        let accused = |change: &&Change| {
            matches!(change.verdict, Some(Verdict::Suspect | Verdict::Dead)) && !victims.contains(&change.about)
        };
        if let Some(wrong) = world.changes.iter().find(accused) {
            return Err(broken(format!("frozen were {victims:?}: {wrong:?}"), &world));
        }
        if !world.changes.iter().any(|change| change.verdict == Some(Verdict::Dead)) {
            return Err(broken("nobody noticed anything".into(), &world));
        }
        if !world.whole() {
            return Err(broken("not all are back".into(), &world));
        }
        Ok(())
    });
}

/// A machine that hangs is dead as well, a little later: its kernel answers, its process does not.
#[test]
fn a_hung_machine_is_noticed() {
    for_seeds(20, |seed| {
        let mut world = World::new(seed, Setting { members: 5, ..Setting::default() });
        world.plan(secs(5), Fault::Freeze(1, secs(10)));
        world.run(secs(20));
        let found = world.found_dead(1, secs(5));
        if found.len() != 4 || found[0] < secs(2) || found[3] > ms(3500) {
            return Err(broken(format!("{found:?}"), &world));
        }
        match world.whole() {
            true => Ok(()),
            false => Err(broken("it is not back".into(), &world)),
        }
    });
}

/// Pauses during which the kernel goes on answering are nobody's death, unless they last.
#[test]
fn short_pauses_kill_nobody() {
    for_seeds(20, |seed| {
        let members = 10;
        let mut world = World::new(seed, Setting { members, loss: 1, ..Setting::default() });
        for _ in 0..100 {
            let (victim, at) = (world.random(members), ms(2000 + world.random(60_000) as u64));
            let length = ms(50 + world.random(1450) as u64);
            world.plan(at, Fault::Freeze(victim, length));
        }
        world.run(secs(70));
        match world.changes.iter().find(|change| change.verdict == Some(Verdict::Dead)) {
            Some(wrong) => Err(broken(format!("{wrong:?}"), &world)),
            None => Ok(()),
        }
    });
}

/// One that is cut off from all others is dead to them and declares nobody dead, whichever way the cable is broken; when
/// it is mended, nobody suffers from what it came to believe.
#[test]
fn who_is_cut_off_declares_nobody_dead() {
    for_seeds(36, |seed| {
        let members = [3, 5, 12, 40][(seed % 4) as usize];
        let (inward, outward) = [(true, true), (true, false), (false, true)][(seed / 4 % 3) as usize];
        let mut world = World::new(seed, Setting { members, ..Setting::default() });
        let victim = world.random(members);
        for other in (0..members).filter(|n| *n != victim) {
            for (cut, from, to) in [(inward, other, victim), (outward, victim, other)] {
                if cut {
                    world.plan(secs(5), Fault::Cut(from, to));
                    world.plan(secs(25), Fault::Mend(from, to));
                }
            }
        }
        world.run(secs(45));
        let wrong = |change: &&Change| {
            change.verdict == Some(Verdict::Dead) && change.about != victim && (members > 3 || change.by != victim)
        };
        if let Some(wrong) = world.changes.iter().find(wrong) {
            return Err(broken(format!("{victim} was cut off ({inward} {outward}): {wrong:?}"), &world));
        }
        let found = world.found_dead(victim, secs(5));
        if found.len() < members - 1 {
            return Err(broken(
                format!("only {} know that {victim} is cut off ({inward} {outward})", found.len()),
                &world,
            ));
        }
        if !world.whole() {
            return Err(broken(format!("{victim} is not back"), &world));
        }
        Ok(())
    });
}

/// Half and half: neither side may bury the other.
#[test]
fn a_cluster_cut_in_two_becomes_whole_again() {
    for_seeds(12, |seed| {
        let members = [4, 5, 20][(seed % 3) as usize];
        let mut world = World::new(seed, Setting { members, ..Setting::default() });
        let side = |n: usize| n < members / 2;
        for from in 0..members {
            for to in (0..members).filter(|to| side(*to) != side(from)) {
                world.plan(secs(5), Fault::Cut(from, to));
                world.plan(secs(25), Fault::Mend(from, to));
            }
        }
        world.run(secs(45));
        if !world.whole() {
            return Err(broken("the halves have not come together".into(), &world));
        }
        // The smaller part knows that it may be the one that is cut off.
        let wrong = |c: &&Change| members % 2 == 1 && side(c.by) && c.verdict == Some(Verdict::Dead);
        match world.changes.iter().find(wrong) {
            Some(wrong) => Err(broken(format!("{wrong:?}"), &world)),
            None => Ok(()),
        }
    });
}

/// A process that ends or is killed is no dead machine: nothing is known of the machine until it is back.
#[test]
fn a_process_that_is_gone_is_no_dead_machine() {
    for_seeds(30, |seed| {
        let members = [2, 5, 20][(seed % 3) as usize];
        let killed = seed % 2 == 0;
        let mut world = World::new(seed, Setting { members, ..Setting::default() });
        let victim = world.random(members);
        world.plan(secs(5), if killed { Fault::Kill(victim) } else { Fault::Leave(victim, Leaving::Process) });
        world.run(secs(8));
        let unknown = (0..members).filter(|n| *n != victim && world.thought(*n, victim).is_none()).count();
        if unknown != members - 1 {
            return Err(broken(format!("{unknown} of {members} know that {victim} is away"), &world));
        }
        world.plan(secs(10), Fault::On(victim));
        world.run(secs(15));
        if let Some(wrong) = world.changes.iter().find(|c| matches!(c.verdict, Some(Verdict::Dead | Verdict::Suspect)))
        {
            return Err(broken(format!("{wrong:?}"), &world));
        }
        match world.whole() {
            true => Ok(()),
            false => Err(broken(format!("{victim} is not back"), &world)),
        }
    });
}

/// A machine whose process was killed, and which then loses its power, is dead all the same; one that says that it ends is
/// dead at once.
#[test]
fn the_end_of_a_machine_is_noticed_all_the_same() {
    for_seeds(10, |seed| {
        let mut world = World::new(seed, Setting { members: 6, ..Setting::default() });
        world.plan(secs(5), Fault::Kill(1));
        world.plan(secs(8), Fault::Off(1));
        world.plan(secs(20), Fault::Leave(2, Leaving::Machine));
        world.run(secs(22));
        let (first, second) = (world.found_dead(1, secs(8)), world.found_dead(2, secs(20)));
        if first.len() < 4 || first[3] > secs(6) || second.len() < 4 || second[3] > ms(300) {
            return Err(broken(format!("{first:?} {second:?}"), &world));
        }
        Ok(())
    });
}

#[test]
fn whoever_is_restarted_learns_who_is_dead() {
    for_seeds(10, |seed| {
        let mut world = World::new(seed, Setting { members: 8, ..Setting::default() });
        world.plan(secs(5), Fault::Off(1));
        world.plan(secs(10), Fault::Leave(2, Leaving::Process));
        world.plan(secs(11), Fault::On(2));
        world.run(secs(13));
        let learned = world.changes.iter().find(|c| c.at > secs(11) && c.by == 2 && c.about == 1);
        match learned {
            Some(change) if change.verdict == Some(Verdict::Dead) && change.accusers >= 2 => Ok(()),
            other => Err(broken(format!("{other:?}"), &world)),
        }
    });
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let mut world = World::new(seed, Setting { members: 12, loss: 5, ..Setting::default() });
        world.plan(secs(3), Fault::Off(3));
        world.plan(secs(4), Fault::Freeze(5, secs(3)));
        world.run(secs(10));
        (world.changes.clone(), world.traffic)
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn other_profiles() {
    for (profile, latency, limit) in [(Profile::Kubernetes, (0, 2), 12), (Profile::Wan, (20, 80), 8)] {
        for_seeds(8, |seed| {
            let setting = Setting { members: 7, profile, latency, loss: 1, ..Setting::default() };
            nobody_accused(seed, setting.clone(), secs(120))?;
            let (_, last) = power_off(seed, setting)?;
            assert!(last < secs(limit), "{profile}: {last:?}");
            Ok(())
        });
    }
}
