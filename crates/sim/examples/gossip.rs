//! Prints what the gossip costs and how fast it is, by the number of members:
//! `cargo run -p seawall-sim --example gossip -- 5 100 1000 5000`.
#![allow(clippy::print_stdout)]

use std::time::Duration;

use seawall_network::verdict::Verdict;
use seawall_sim::gossip::{Change, Fault, Setting, World};

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn share(times: &mut [Duration], share: f64) -> u128 {
    times.sort();
    times.get(((times.len().max(1) - 1) as f64 * share).round() as usize).map_or(0, Duration::as_millis)
}

/// Members that were called so although nothing had happened to them.
fn wrong(changes: &[Change], verdict: Verdict, disturbed: &[usize]) -> usize {
    let wrong = changes.iter().filter(|c| c.verdict == Some(verdict) && !disturbed.contains(&c.about));
    let about: std::collections::BTreeSet<usize> = wrong.map(|c| c.about).collect();
    about.len()
}

/// Packets and bytes per member and second while nothing happens.
fn idle(members: usize) -> (f64, f64) {
    let mut world = World::new(1, Setting { members, ..Setting::default() });
    world.run(secs(3));
    let before = world.traffic;
    world.run(secs(8));
    let per = |a: u64, b: u64| (a - b) as f64 / members as f64 / 5.0;
    (per(world.traffic.0, before.0), per(world.traffic.1, before.1))
}

/// Cuts the power of one after the other; how long until the first, half, 99 % and all of the others know.
fn deaths(members: usize, count: usize) -> [u128; 6] {
    let (mut all, mut last, mut first) = (Vec::new(), Vec::new(), Vec::new());
    let mut world = World::new(2, Setting { members, ..Setting::default() });
    let mut at = secs(3);
    let mut gone = Vec::new();
    while gone.len() < count {
        let victim = world.random(members);
        if gone.contains(&victim) {
            continue;
        }
        at += Duration::from_millis(world.random(1000) as u64);
        world.run(at);
        world.plan(at, Fault::Off(victim));
        at += secs(3);
        world.run(at);
        let found = world.found_dead(victim, at - secs(3));
        assert!(found.len() + gone.len() + 1 >= members, "{} of {members} know it", found.len());
        first.push(found[0]);
        last.push(found[found.len() - 1]);
        all.extend(found);
        gone.push(victim);
    }
    [
        share(&mut first, 0.5),
        share(&mut all, 0.5),
        share(&mut all, 0.99),
        share(&mut last, 0.5),
        share(&mut last, 0.9),
        share(&mut last, 1.0),
    ]
}

/// Suspicions per second in the whole cluster, and who was called suspect or dead, while packets are lost.
fn loss(members: usize, loss: u32, length: u64) -> (f64, usize, usize) {
    let mut world = World::new(3, Setting { members, loss, ..Setting::default() });
    world.run(secs(length));
    let suspicions = (0..members).map(|n| world.counters(n).failed).sum::<u64>() as f64 / length as f64;
    (suspicions, wrong(&world.changes, Verdict::Suspect, &[]), wrong(&world.changes, Verdict::Dead, &[]))
}

/// A fifth of the members is frozen for 1 to 30 s, again and again: how many of the others are called suspect or dead.
fn frozen(members: usize, length: u64) -> (usize, usize, usize, bool) {
    let mut world = World::new(4, Setting { members, loss: 1, ..Setting::default() });
    let victims: Vec<usize> = (0..members / 5).map(|n| n * 5).collect();
    for victim in &victims {
        let mut at = secs(3) + Duration::from_millis(world.random(10_000) as u64);
        while at < secs(length - 20) {
            let pause = Duration::from_millis(1000 + world.random(29_000) as u64).min(secs(length - 20) - at);
            world.plan(at, Fault::Freeze(*victim, pause));
            at += pause + Duration::from_millis(2000 + world.random(10_000) as u64);
        }
    }
    world.run(secs(length));
    let dead: std::collections::BTreeSet<usize> =
        world.changes.iter().filter(|c| c.verdict == Some(Verdict::Dead)).map(|c| c.about).collect();
    let (suspect, wrongly) =
        (wrong(&world.changes, Verdict::Suspect, &victims), wrong(&world.changes, Verdict::Dead, &victims));
    (dead.len(), suspect, wrongly, world.whole())
}

fn main() {
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let only = std::env::var("ONLY").unwrap_or_default();
    let runs = |what: &str| only.is_empty() || only.split(',').any(|o| o == what);
    for members in sizes {
        if runs("idle") {
            let (packets, bytes) = idle(members);
            println!("{members:>5} members: {packets:.1} packets and {:.2} kB per member and second", bytes / 1e3);
        }
        if runs("death") {
            let [first, half, most, median, p90, worst] = deaths(members, (members / 4).clamp(1, 10));
            println!(
                "{members:>5} members: power off: first {first} ms, members' median {half} ms, p99 {most} ms; \
                 all know: median {median} ms, p90 {p90} ms, worst {worst} ms"
            );
        }
        if runs("loss") {
            let length = if members > 1000 { 10 } else { 60 };
            for percent in [1, 5] {
                let (suspicions, suspect, dead) = loss(members, percent, length);
                println!(
                    "{members:>5} members: {percent} % loss, {length} s: {suspicions:.3} failed probes/s in all, \
                     {suspect} called suspect, {dead} called dead"
                );
            }
        }
        if runs("frozen") {
            let (dead, suspect, wrong, whole) = frozen(members, 60);
            println!(
                "{members:>5} members: a fifth frozen for 1-30 s: {dead} of {} called dead; of the others {suspect} \
                 suspect, {wrong} dead; all back: {whole}",
                members / 5
            );
        }
    }
}
