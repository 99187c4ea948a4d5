//! Prints what the gossip costs, how fast it is and how often it is wrong, by the number of members:
//! `cargo run -p seawall-sim --example gossip -- 100 1000 5000`. `ONLY=idle,loss,frozen,starved,death` chooses,
//! `SECONDS=30` sets how long each of the parts lasts.
#![allow(clippy::print_stdout)]

use std::{collections::BTreeSet, time::Duration};

use seawall_network::verdict::Verdict;
use seawall_sim::gossip::{Change, Fault, Setting, World};

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn share(times: &mut [Duration], share: f64) -> u128 {
    times.sort();
    times.get(((times.len().max(1) - 1) as f64 * share).round() as usize).map_or(0, Duration::as_millis)
}

/// Members that were called so by anybody.
fn called(changes: &[Change], verdict: Verdict) -> BTreeSet<usize> {
    changes.iter().filter(|c| c.verdict == Some(verdict)).map(|c| c.about).collect()
}

/// How long it is waited until all know each other again, in seconds.
const PATIENCE: u64 = 60;

/// A cluster that goes from one bad day to the next.
struct Run {
    members: usize,
    world: World,
    length: u64,
}

impl Run {
    fn new(members: usize, length: u64) -> Run {
        let mut world = World::new(1, Setting { members, ..Setting::default() });
        world.run(secs(3));
        Run { members, world, length }
    }

    fn say(&self, text: &str) {
        println!("{:>5} members: {text}", self.members);
    }

    /// Packets and bytes per member and second, and false verdicts, while so many packets are lost.
    fn loss(&mut self, percent: u32) {
        let failed = |world: &World| (0..self.members).map(|n| world.counters(n).failed).sum::<u64>();
        let (before, began) = (self.world.traffic, failed(&self.world));
        self.world.changes.clear();
        self.world.lose(percent);
        self.world.run(self.world.now() + secs(self.length));
        self.world.lose(0);
        let per = |a: u64, b: u64| (a - b) as f64 / self.members as f64 / self.length as f64;
        let (packets, bytes) = (per(self.world.traffic.0, before.0), per(self.world.traffic.1, before.1));
        self.say(&format!(
            "{percent} % loss, {} s: {packets:.1} packets and {:.2} kB per member and second; {} failed probes, {} called \
             suspect, {} called dead",
            self.length,
            bytes / 1e3,
            failed(&self.world) - began,
            called(&self.world.changes, Verdict::Suspect).len(),
            called(&self.world.changes, Verdict::Dead).len(),
        ));
    }

    /// A fifth of the members is frozen for 1 to 30 s, again and again; or starved, acting for instants between pauses of
    /// up to 3 s.
    fn fifth(&mut self, starved: bool) {
        let victims: Vec<usize> = (0..self.members / 5).map(|n| n * 5).collect();
        let (start, traffic) = (self.world.now(), self.world.traffic);
        let end = start + secs(self.length);
        self.world.changes.clear();
        self.world.lose(1);
        for victim in &victims {
            if starved {
                self.world.plan(start, Fault::Starve(*victim, secs(3), end));
                continue;
            }
            let mut at = start + Duration::from_millis(self.world.random(5000) as u64);
            while at < end {
                let pause = Duration::from_millis(1000 + self.world.random(29_000) as u64).min(end - at);
                self.world.plan(at, Fault::Freeze(*victim, pause));
                at += pause + Duration::from_millis(2000 + self.world.random(10_000) as u64);
            }
        }
        let (mut suspect, mut dead, mut most) = (BTreeSet::new(), BTreeSet::new(), 0.0f64);
        let before: Vec<u64> = (0..self.members).map(|n| self.world.sent(n)).collect();
        let mut bytes = 0.0;
        let mut whole = None;
        for second in 0..self.length + PATIENCE {
            if second > self.length && self.world.whole() {
                whole = Some(second - self.length);
                break;
            }
            if second == self.length {
                self.world.lose(0);
                let all = self.members as f64 * self.length as f64;
                bytes = (self.world.traffic.1 - traffic.1) as f64 / all;
                let sent = |n: usize| (self.world.sent(n) - before[n]) as f64 / self.length as f64;
                most = (0..self.members).map(sent).fold(0.0, f64::max);
            }
            // What many think of many is too much to be kept for long.
            self.world.run(start + secs(second + 1));
            suspect.extend(called(&self.world.changes, Verdict::Suspect));
            dead.extend(called(&self.world.changes, Verdict::Dead));
            self.world.changes.clear();
        }
        let of = |set: &BTreeSet<usize>, victims: bool| set.iter().filter(|n| (*n % 5 == 0) == victims).count();
        self.say(&format!(
            "a fifth {} for {} s, 1 % loss: of these {} {} called suspect, {} dead; of the others {} suspect, {} dead; all \
             back after {} s; {:.2} kB per member and second, {:.2} of the one that sent most",
            if starved { "starved (pauses up to 3 s)" } else { "frozen (1-30 s)" },
            self.length,
            victims.len(),
            of(&suspect, true),
            of(&dead, true),
            of(&suspect, false),
            of(&dead, false),
            whole.map_or(format!("more than {PATIENCE}"), |seconds| seconds.to_string()),
            bytes / 1e3,
            most / 1e3,
        ));
    }

    /// Cuts the power of one after the other; how long until the others know.
    fn deaths(&mut self, count: usize) {
        let (mut all, mut last, mut first) = (Vec::new(), Vec::new(), Vec::new());
        let mut gone = Vec::new();
        self.world.changes.clear();
        while gone.len() < count {
            let victim = self.world.random(self.members);
            if gone.contains(&victim) {
                continue;
            }
            let at = self.world.now() + Duration::from_millis(self.world.random(1000) as u64);
            self.world.run(at);
            self.world.plan(at, Fault::Off(victim));
            self.world.run(at + secs(2));
            let found = self.world.found_dead(victim, at);
            assert!(found.len() + gone.len() + 1 >= self.members, "{} of {} know it", found.len(), self.members);
            first.push(found[0]);
            last.push(found[found.len() - 1]);
            all.extend(found);
            gone.push(victim);
        }
        let wrong = called(&self.world.changes, Verdict::Dead).iter().filter(|n| !gone.contains(n)).count();
        self.say(&format!(
            "{count} lose power: dead to the first after {} ms, to a member after {} ms (median), {} ms (p99), to all \
             after {} ms (median), {} ms (worst); others called dead: {wrong}",
            share(&mut first, 0.5),
            share(&mut all, 0.5),
            share(&mut all, 0.99),
            share(&mut last, 0.5),
            share(&mut last, 1.0),
        ));
    }
}

fn main() {
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let only = std::env::var("ONLY").unwrap_or_default();
    let runs = |what: &str| only.is_empty() || only.split(',').any(|o| o == what);
    let length = std::env::var("SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    for members in sizes {
        let mut run = Run::new(members, length);
        if runs("idle") {
            run.loss(0);
        }
        if runs("loss") {
            run.loss(1);
            run.loss(5);
        }
        if runs("starved") {
            run.fifth(true);
        }
        if runs("frozen") {
            run.fifth(false);
        }
        if runs("death") {
            run.deaths((members / 4).clamp(1, 10).min(std::cmp::max(3, 10_000 / members)));
        }
    }
}
