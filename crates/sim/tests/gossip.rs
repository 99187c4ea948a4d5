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
    deaths(&[(2, 8), (3, 12), (5, 20), (20, 6), (60, 1)]);
}

/// The same, often.
#[test]
#[ignore = "takes minutes without optimisation"]
fn a_death_is_known_to_all_within_a_second_at_length() {
    deaths(&[(2, 20), (3, 60), (5, 100), (20, 40), (100, 10)]);
}

fn deaths(table: &[(usize, u64)]) {
    for &(members, seeds) in table {
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
    losses(&[(2, 5, 3, 60), (3, 5, 3, 60), (5, 1, 3, 60), (5, 5, 3, 60), (30, 5, 1, 20)]);
}

/// The same, for longer.
#[test]
#[ignore = "takes minutes without optimisation"]
fn lost_packets_change_no_verdict_at_length() {
    losses(&[(2, 5, 10, 300), (3, 5, 10, 300), (5, 1, 10, 300), (5, 5, 10, 300), (30, 5, 3, 60), (100, 5, 1, 30)]);
}

fn losses(table: &[(usize, u32, u64, u64)]) {
    for &(members, loss, seeds, length) in table {
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
    for (members, loss, limit, seeds) in [(2, 0, 2, 5), (5, 0, 2, 5), (5, 20, 5, 5), (50, 5, 6, 1)] {
        for_seeds(seeds, |seed| {
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
    frozen(3, 60, [5, 10, 20]);
}

/// The same, with more seeds and for longer.
#[test]
#[ignore = "takes minutes without optimisation"]
fn frozen_members_harm_nobody_else_at_length() {
    frozen(12, 90, [5, 10, 30]);
}

fn frozen(seeds: u64, length: u64, sizes: [usize; 3]) {
    for_seeds(seeds, |seed| {
        let members = sizes[(seed % 3) as usize];
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
            while at < secs(length) {
                let length = ms(1000 + world.random(29_000) as u64);
                let later = ms(world.random(3000) as u64);
                world.plan(at + later, Fault::Freeze(*victim, length));
                at += length + ms(5000 + world.random(10_000) as u64);
            }
        }
        world.run(secs(length + 50));
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
    for_seeds(6, |seed| {
        let mut world = World::new(seed, Setting { members: 5, ..Setting::default() });
        world.plan(secs(5), Fault::Freeze(1, secs(10)));
        world.run(secs(20));
        let found = world.found_dead(1, secs(5));
        if found.len() != 4 || found[0] < secs(4) || found[3] > ms(5500) {
            return Err(broken(format!("{found:?}"), &world));
        }
        match world.whole() {
            true => Ok(()),
            false => Err(broken("it is not back".into(), &world)),
        }
    });
}

/// A fifth of the members is starved: between instants in which it may act it waits for up to three seconds, while its
/// kernel answers at once. Nobody is dead for that, and whoever is starved says nothing against anybody.
#[test]
fn starved_members_neither_accuse_nor_die() {
    starved(4, 40);
}

/// The same, with more seeds and for longer.
#[test]
#[ignore = "takes minutes without optimisation"]
fn starved_members_neither_accuse_nor_die_at_length() {
    starved(60, 120);
}

fn starved(seeds: u64, length: u64) {
    for_seeds(seeds, |seed| {
        let (members, loss) = ([5, 10, 20, 30][(seed % 4) as usize], [0, 1, 5][(seed % 3) as usize]);
        let mut world = World::new(seed, Setting { members, loss, ..Setting::default() });
        let victims: Vec<usize> = (0..members / 5).map(|n| n * 5 + (seed % 5) as usize).collect();
        for victim in &victims {
            world.plan(secs(3), Fault::Starve(*victim, ms(3000), secs(length)));
        }
        world.run(secs(length));
        // After that they are well, and may rightly accuse one whose last pause is not over.
        if let Some(victim) = victims.iter().find(|victim| world.counters(**victim).accusations > 0) {
            return Err(broken(format!("{victim} was starved and accused somebody"), &world));
        }
        world.run(secs(length + 20));
        let dead = world.changes.iter().find(|change| change.verdict == Some(Verdict::Dead));
        if let Some(wrong) = dead {
            return Err(broken(format!("starved were {victims:?}: {wrong:?}"), &world));
        }
        let wrong = |c: &&Change| c.verdict == Some(Verdict::Suspect) && !victims.contains(&c.about);
        if let Some(wrong) = world.changes.iter().find(wrong) {
            return Err(broken(format!("starved were {victims:?}: {wrong:?}"), &world));
        }
        let noticed = victims.iter().all(|victim| world.changes.iter().any(|change| change.about == *victim));
        match noticed && world.whole() {
            true => Ok(()),
            false => Err(broken(format!("nobody noticed anything ({noticed}), or not all are back"), &world)),
        }
    });
}

/// Many in trouble at once are no trouble for the others: what is said of them is bounded, and news of an objection that has
/// not reached one of many does not kill who objected.
#[test]
fn many_in_trouble_neither_flood_the_others_nor_die() {
    for (members, starve, limit) in [(100, true, 64), (150, false, 48)] {
        let mut world = World::new(1, Setting { members, loss: 1, ..Setting::default() });
        let victims: Vec<usize> = (0..members / 5).map(|n| n * 5).collect();
        world.run(secs(3));
        let before = world.traffic.1;
        for victim in &victims {
            let later = secs(3) + ms(world.random(3000) as u64);
            let length = ms(1000 + world.random(11_000) as u64);
            world.plan(
                later,
                match starve {
                    true => Fault::Starve(*victim, secs(3), secs(18)),
                    false => Fault::Freeze(*victim, length),
                },
            );
        }
        world.run(secs(18));
        let each = (world.traffic.1 - before) / members as u64 / 15;
        assert!(each < limit * 1000, "{each} bytes per member and second");
        world.lose(0);
        world.run(secs(28));
        let wrong = |c: &&Change| match c.verdict {
            Some(Verdict::Dead) => starve || !victims.contains(&c.about),
            Some(Verdict::Suspect) => !victims.contains(&c.about),
            _ => false,
        };
        assert_eq!(world.changes.iter().find(wrong), None);
        assert!(world.whole());
    }
}

/// Pauses during which the kernel goes on answering are nobody's death, unless they last.
#[test]
fn short_pauses_kill_nobody() {
    for_seeds(4, |seed| {
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
    cut_off(9, [3, 5, 12]);
}

/// The same among more, and with more seeds.
#[test]
#[ignore = "takes minutes without optimisation"]
fn who_is_cut_off_declares_nobody_dead_at_length() {
    cut_off(36, [3, 5, 40]);
}

fn cut_off(seeds: u64, sizes: [usize; 3]) {
    for_seeds(seeds, |seed| {
        let members = sizes[(seed % 3) as usize];
        let (inward, outward) = [(true, true), (true, false), (false, true)][(seed / 3 % 3) as usize];
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
    for_seeds(3, |seed| {
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
    for_seeds(12, |seed| {
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
    for_seeds(4, |seed| {
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
    for_seeds(4, |seed| {
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
        for_seeds(3, |seed| {
            let setting = Setting { members: 7, profile, latency, loss: 1, ..Setting::default() };
            nobody_accused(seed, setting.clone(), secs(120))?;
            let (_, last) = power_off(seed, setting)?;
            assert!(last < secs(limit), "{profile}: {last:?}");
            Ok(())
        });
    }
}
