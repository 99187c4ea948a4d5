//! A process that writes is killed at a random instant, again and again. What it was told is durable must be there.

#![allow(clippy::unwrap_used)]

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    time::Duration,
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::StdRng};
use seawall_store::{
    Expect, ListOptions, Revision, Store,
    embedded::{Embedded, Options},
};

const ROUNDS: usize = 30;
const WRITERS: usize = 8;
const KEYS: u64 = 21;
const DIR: &str = "SEAWALL_STORE_CRASH_DIR";

fn options() -> Options {
    Options { segment_bytes: 64 << 10, snapshot_after: 32 << 10, ..Options::default() }
}

/// Not a test of its own: the process that is killed. Writer `w` makes its n-th write to `/w/(n mod KEYS)` with value n
/// (every fifth is a deletion) and reports each acknowledgement as `ACK w n revision`, each attempt as `TRY w n`.
#[test]
fn child() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async move {
        let store = Arc::new(Embedded::open(Path::new(&dir), options()).expect("opens after a crash"));
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..WRITERS {
            let store = store.clone();
            tasks.spawn(async move {
                let (counter, _) = store.get(&format!("/count/{writer}")).await.unwrap();
                let mut n: u64 =
                    counter.map_or(0, |e| std::str::from_utf8(&e.value).unwrap().parse().unwrap()) * 1000 + 1000;
                let start = Bytes::from((n / 1000).to_string());
                store.put(&format!("/count/{writer}"), start, Expect::Any, None).await.unwrap();
                loop {
                    n += 1;
                    let key = format!("/{writer}/{}", n % KEYS);
                    say(&format!("TRY {writer} {n}\n"));
                    let revision = if n.is_multiple_of(5) {
                        store.delete(&key, Expect::Any, None).await.unwrap()
                    } else {
                        let value = format!("{n}{}", " ".repeat((n as usize * 37) % 3000));
                        store.put(&key, Bytes::from(value), Expect::Any, None).await.unwrap()
                    };
                    say(&format!("ACK {writer} {n} {revision}\n"));
                }
            });
        }
        tasks.spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let newest = store.revision().await.unwrap();
                store.compact(Revision(newest.0.saturating_sub(100))).await.unwrap();
            }
        });
        tasks.join_all().await;
    });
}

fn say(line: &str) {
    // One write call for a line, so that a line is there or not.
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes()).unwrap();
    out.flush().unwrap();
}

/// What the parent knows of one writer's key.
#[derive(Default)]
struct Known {
    acknowledged: Option<(u64, u64)>,
    attempted: Option<u64>,
}

#[test]
fn nothing_acknowledged_is_lost() {
    let seed: u64 = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    println!("SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut known: HashMap<(u64, u64), Known> = HashMap::new();
    let mut newest = 0;
    let mut total = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let (started, start) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            for line in lines.lines() {
                let line = line.unwrap();
                if line.contains("ACK") {
                    let _ = started.send(());
                }
                all.push(line);
            }
            all
        });
        start.recv_timeout(Duration::from_secs(60)).expect("the child begins to write");
        // The instant is random; nothing is awaited here but time itself.
        let (_hold, never) = mpsc::channel::<()>();
        let _ = never.recv_timeout(Duration::from_micros(random.random_range(0..120_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        for line in reader.join().unwrap() {
            // The test harness prints its own words before the first line.
            let Some(start) = line.find("TRY ").or_else(|| line.find("ACK ")) else { continue };
            let words: Vec<&str> = line[start..].split(' ').collect();
            let number = |i: usize| words[i].parse::<u64>().unwrap();
            let entry = known.entry((number(1), number(2) % KEYS)).or_default();
            if words[0] == "TRY" {
                entry.attempted = Some(number(2));
            } else {
                entry.acknowledged = Some((number(2), number(3)));
                newest = newest.max(number(3));
                total += 1;
            }
        }
        runtime.block_on(async {
            let store = Embedded::open(dir.path(), options()).expect("opens after a crash");
            let list = store.list("/", ListOptions::default()).await.unwrap();
            assert!(list.revision.0 >= newest, "round {round}: revision went back from {newest} to {}", list.revision);
            newest = list.revision.0;
            let entries: HashMap<&str, _> = list.entries.iter().map(|e| (&*e.key, e)).collect();
            for ((writer, slot), known) in &mut known {
                let key = format!("/{writer}/{slot}");
                let found = entries.get(key.as_str());
                let value = found.map(|e| std::str::from_utf8(&e.value).unwrap().trim().parse::<u64>().unwrap());
                let after = |n: Option<u64>| n.filter(|n| !n.is_multiple_of(5));
                let (acknowledged, at) = known.acknowledged.unzip();
                let pending = known.attempted.filter(|n| Some(*n) != acknowledged);
                let kept = value == after(acknowledged) && at.zip(found).is_none_or(|(at, e)| e.revision.0 == at);
                // A write that was under way may have happened or not.
                let happened = pending.is_some() && value == after(pending);
                assert!(
                    kept || happened,
                    "round {round}: {key} is {value:?}, {acknowledged:?} acknowledged, {pending:?} pending"
                );
                // What it is now, it stays: an unacknowledged write must not come or go later.
                let now = match found {
                    Some(e) => Some((value.unwrap(), e.revision.0)),
                    // Deleted, or never there: the first write of a key that did not happen leaves nothing to expect.
                    None => (if happened && !kept { pending } else { acknowledged }).map(|n| (n, 0)),
                };
                *known = Known { acknowledged: now, attempted: None };
            }
        });
    }
    println!("{total} writes were acknowledged in {ROUNDS} rounds, newest revision {newest}");
    assert!(total > ROUNDS * WRITERS, "too little was written to mean anything");
}
