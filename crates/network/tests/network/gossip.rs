//! Members of the gossip on real sockets of the loopback: each has an address of 127.0.0.0/8 of its own.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use seawall_network::{
    gossip::{
        Config, Gossip, Publish,
        judge::Times,
        roster::{Entry, Roster},
        seal::{ClusterKey, Keyring},
    },
    verdict::Verdict,
};
use seawall_quorum::timing::{Profile, Timing};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

struct Member {
    name: String,
    gossip: Gossip,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

/// Generous: other tests run beside this one, and may keep the CPU from it.
fn times() -> Times {
    let fast = Times::of(&Timing::of(Profile::Fast));
    Times { suspicion: fast.suspicion * 3, ..fast }
}

fn ip(test: u8, n: usize) -> IpAddr {
    IpAddr::from([127, 83, test, n as u8 + 1])
}

/// A port that is free on all the addresses of a test.
fn port(test: u8, count: usize) -> u16 {
    let free = |port: &u16| (0..count).all(|n| UdpSocket::bind((ip(test, n), *port)).is_ok());
    (17_946..18_946).find(free).expect("a port")
}

fn config(test: u8, n: usize, port: u16, directory: &Path) -> Config {
    Config {
        name: format!("n{n}"),
        address: SocketAddr::new(ip(test, n), port),
        directory: directory.join(n.to_string()),
        times: times(),
        publish: Publish::Node,
    }
}

impl Member {
    fn start(config: Config) -> Member {
        let name = config.name.clone();
        let gossip = Gossip::open(config).unwrap();
        let mut member = Member { name, gossip, stop: CancellationToken::new(), task: None };
        member.run();
        member
    }

    fn run(&mut self) {
        self.stop = CancellationToken::new();
        let (gossip, stop) = (self.gossip.clone(), self.stop.clone());
        self.task = Some(tokio::spawn(async move { gossip.run_alone(stop).await.unwrap() }));
    }

    async fn end(&mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            task.await.unwrap();
        }
    }

    /// What it thinks of another.
    fn thinks(&self, of: &str) -> Option<Verdict> {
        self.gossip.verdicts().borrow().get(of).copied()
    }
}

fn cluster(test: u8, count: usize, directory: &Path) -> Vec<Member> {
    let port = port(test, count);
    let members: Vec<Member> = (0..count).map(|n| Member::start(config(test, n, port, directory))).collect();
    let key = ClusterKey::random().unwrap();
    let entry = |n: usize, m: &Member| Entry { ip: ip(test, n), key: STANDARD.encode(m.gossip.public()) };
    let roster: Roster = members.iter().enumerate().map(|(n, m)| (m.name.clone(), entry(n, m))).collect();
    for member in &members {
        member.gossip.set_members(roster.clone());
        member.gossip.set_keys(Keyring { keys: vec![key.clone()] });
    }
    members
}

async fn until(what: &str, limit: Duration, holds: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    start.elapsed()
}

fn all_alive(members: &[Member]) -> bool {
    members.iter().all(|a| members.iter().all(|b| a.name == b.name || a.thinks(&b.name) == Some(Verdict::Alive)))
}

const LIMIT: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn the_others_notice_that_one_has_fallen_silent() {
    let directory = tempfile::tempdir().unwrap();
    let mut members = cluster(1, 5, directory.path());
    until("all know each other", LIMIT, || all_alive(&members)).await;
    // Nobody reads from its socket any more, and the kernel does not refuse: as when the power is cut.
    let victim = members.remove(2);
    victim.gossip.fall_silent();
    let took = until("all know it", LIMIT, || members.iter().all(|m| m.thinks("n2") == Some(Verdict::Dead))).await;
    eprintln!("all know it after {took:?}");
    for member in &members {
        let opinions = member.gossip.opinions().borrow().clone();
        assert!(opinions["n2"].accusers >= 2, "{:?}", opinions["n2"]);
        for (name, opinion) in opinions.iter().filter(|(name, _)| *name != "n2") {
            assert_eq!(opinion.verdict, Verdict::Alive, "{} about {name}", member.name);
        }
        let metrics = member.gossip.metrics();
        let text = member.gossip.render();
        assert!(metrics.protocol.answered > 0 && metrics.protocol.deaths == 1, "{text}");
        assert_eq!(metrics.dropped.forged + metrics.dropped.unknown_key + metrics.dropped.malformed, 0, "{text}");
    }
    drop(victim);
    for member in &mut members {
        member.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_ends_or_is_killed_is_no_dead_machine() {
    let directory = tempfile::tempdir().unwrap();
    let mut members = cluster(2, 4, directory.path());
    until("all know each other", LIMIT, || all_alive(&members)).await;
    let unknown =
        |members: &[Member], name: &str| members.iter().filter(|m| m.name != name).all(|m| m.thinks(name).is_none());
    // It says goodbye.
    members[1].end().await;
    until("it is known that one has left", LIMIT, || unknown(&members, "n1")).await;
    members[1].run();
    until("all are together again", LIMIT, || all_alive(&members)).await;
    // It is killed: the port is closed without a word, and the kernel refuses what comes.
    let killed = members.remove(3);
    let key = killed.gossip.keys();
    killed.gossip.fall_silent();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let again = config(2, 3, members[0].gossip.address().port(), directory.path());
    drop(killed);
    until("it is known that a process is gone", LIMIT, || members.iter().all(|m| m.thinks("n3").is_none())).await;
    let until_then = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until_then {
        assert!(members.iter().all(|m| m.thinks("n3").is_none_or(|v| v == Verdict::Alive)), "its machine lives");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // It finds the others by what is on its disk, but for what a test has set by hand.
    let roster: Roster = members[0].gossip.members();
    let back = Member::start(again);
    back.gossip.set_members(roster);
    back.gossip.set_keys(key);
    members.push(back);
    until("all are together again", LIMIT, || all_alive(&members)).await;
    for member in &mut members {
        member.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_members_with_the_clusters_key_are_heard_and_the_key_can_change() {
    let directory = tempfile::tempdir().unwrap();
    let mut members = cluster(3, 3, directory.path());
    until("all know each other", LIMIT, || all_alive(&members)).await;
    let (old, new) = (members[0].gossip.keys().keys.remove(0), ClusterKey::random().unwrap());
    for keys in [vec![old.clone(), new.clone()], vec![new.clone(), old], vec![new]] {
        for member in &members {
            member.gossip.set_keys(Keyring { keys: keys.clone() });
        }
        let before: Vec<u64> = members.iter().map(|m| m.gossip.metrics().protocol.answered).collect();
        let on = || members.iter().zip(&before).all(|(m, before)| m.gossip.metrics().protocol.answered > before + 5);
        until("probes go on", LIMIT, on).await;
        assert!(all_alive(&members));
    }
    // Somebody else with a key of another cluster.
    members[2].gossip.set_keys(Keyring { keys: vec![ClusterKey::random().unwrap()] });
    let deaf = || members[..2].iter().all(|m| m.thinks("n2") == Some(Verdict::Dead));
    until("a member with another key is not heard", LIMIT, deaf).await;
    assert!(members[0].gossip.metrics().dropped.unknown_key > 0);
    for member in &mut members {
        member.end().await;
    }
}
