//! The embedded engine keeps the contract, agrees with a simple model, survives restarts, and reports damage.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures::StreamExt;
use proptest::prelude::*;
use seawall_store::{
    Error, Event, Expect, ListOptions, Revision, Store, contract,
    embedded::{Embedded, OpenError, Options},
};

fn open(dir: &Path) -> Embedded {
    Embedded::open(dir, Options::default()).expect("the store opens")
}

/// Small files and eager snapshots, so that little data goes through all of it.
fn small() -> Options {
    Options { segment_bytes: 2000, snapshot_after: 1, ..Options::default() }
}

fn log_files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()).collect();
    files.retain(|f| f.file_name().unwrap().to_str().unwrap().starts_with("log-"));
    files.sort();
    files
}

async fn state(store: &Embedded) -> (Vec<(String, Bytes, u64, u64)>, u64) {
    let list = store.list("", ListOptions::default()).await.unwrap();
    let entries =
        list.entries.iter().map(|e| (e.key.to_string(), e.value.clone(), e.revision.0, e.created.0)).collect();
    (entries, list.revision.0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract() {
    let root = tempfile::tempdir().unwrap();
    let count = std::sync::atomic::AtomicUsize::new(0);
    contract::run_all(|| {
        let dir = root.path().join(count.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_string());
        async move { open(&dir) }
    })
    .await;
}

#[tokio::test]
async fn a_second_open_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    let second = Embedded::open(dir.path(), Options::default()).err().expect("refused");
    assert!(matches!(&second, OpenError::Locked { .. }));
    assert!(second.to_string().contains("another server"), "{second}");
    drop(first);
    drop(open(dir.path()));
}

#[tokio::test]
async fn history_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut revisions = Vec::new();
    {
        let store = Embedded::open(dir.path(), small()).unwrap();
        for index in 0..200 {
            let value = Bytes::from(vec![b'v'; 100]);
            revisions.push(store.put(&format!("/{}", index % 20), value, Expect::Any, None).await.unwrap());
        }
        store.compact(revisions[149]).await.unwrap();
        assert!(log_files(dir.path()).len() < 10, "files before the compaction are removed");
    }
    let store = Embedded::open(dir.path(), small()).unwrap();
    assert_eq!(store.revision().await.unwrap(), revisions[199]);
    assert!(matches!(store.watch("/", revisions[148]).await.err(), Some(Error::Compacted { .. })));
    let mut watch = store.watch("/", revisions[149]).await.unwrap();
    let step = watch.next().await.unwrap().unwrap();
    assert_eq!(step.events.iter().map(Event::revision).collect::<Vec<_>>(), revisions[150..]);
    let at = ListOptions { at: Some(revisions[150]), ..ListOptions::default() };
    let list = store.list("/", at).await.unwrap();
    assert_eq!(list.entries.len(), 20);
    assert_eq!(list.entries.iter().map(|e| e.revision).max(), Some(revisions[150]));
}

#[tokio::test]
async fn memory_for_history_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path(), Options { history_bytes: 100_000, ..Options::default() }).unwrap();
    let start = store.revision().await.unwrap();
    let mut slow = store.watch("/", start).await.unwrap();
    let value = Bytes::from(vec![b'x'; 1000]);
    for _ in 0..500 {
        store.put("/a", value.clone(), Expect::Any, None).await.unwrap();
    }
    assert!(matches!(slow.next().await, Some(Err(Error::Lagged { .. }))));
    assert!(slow.next().await.is_none());
    let newest = store.revision().await.unwrap();
    assert!(matches!(store.watch("/", start).await.err(), Some(Error::Compacted { .. })));
    let recent = store.watch("/", Revision(newest.0 - 50)).await.unwrap().next().await.unwrap().unwrap();
    assert_eq!(recent.events.len(), 50);
}

/// What has been deleted is history, and counts as such; what is there is not.
#[tokio::test]
async fn what_is_gone_does_not_stay_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path(), Options { history_bytes: 100_000, ..Options::default() }).unwrap();
    let start = store.revision().await.unwrap();
    let value = Bytes::from(vec![b'x'; 10_000]);
    for index in 0..50 {
        store.put(&format!("/{index}"), value.clone(), Expect::Any, None).await.unwrap();
    }
    let full = store.revision().await.unwrap();
    let at = |at| ListOptions { at: Some(at), ..ListOptions::default() };
    assert!(store.list("/", at(start)).await.unwrap().entries.is_empty(), "nothing was replaced");
    for index in 0..50 {
        store.delete(&format!("/{index}"), Expect::Any, None).await.unwrap();
    }
    let Err(Error::Compacted { oldest, .. }) = store.list("/", at(full)).await else { panic!("all of it is there") };
    let left = store.list("/", at(oldest)).await.unwrap().entries.len();
    assert!((1..=10).contains(&left), "{left} of 10,000 bytes each");
}

/// Whatever was cut off from the end of the log, what remains is a prefix of the history.
#[tokio::test]
async fn a_torn_end_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let mut states = Vec::new();
    {
        let store = open(dir.path());
        states.push(state(&store).await);
        for index in 0..4 {
            store.put(&format!("/{index}"), Bytes::from("value"), Expect::Any, None).await.unwrap();
            states.push(state(&store).await);
        }
    }
    let file = log_files(dir.path()).pop().unwrap();
    let whole = fs::read(&file).unwrap();
    let mut newest = 0;
    for cut in 0..=whole.len() {
        // What follows the cut may also be zeros, as some file systems leave them.
        for tail in [0, 7, 400] {
            let mut bytes = whole[..cut].to_vec();
            bytes.resize(cut + tail, 0);
            if cut < 16 && tail > 0 {
                continue;
            }
            fs::write(&file, &bytes).unwrap();
            let store = open(dir.path());
            let now = state(&store).await;
            let position = states.iter().position(|s| *s == now).expect("the state is one that was");
            assert!(position >= newest, "cutting less never loses more");
            newest = position;
            // And the store goes on from there.
            let revision = store.put("/new", Bytes::from("x"), Expect::Any, None).await.unwrap();
            assert_eq!(revision.0, now.1 + 1);
            drop(store);
            assert_eq!(state(&open(dir.path())).await.1, now.1 + 1);
        }
    }
    assert_eq!(newest, 4);
}

/// A changed byte anywhere but in the last frame is reported with file and offset, never accepted.
#[tokio::test]
async fn damage_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = Embedded::open(dir.path(), small()).unwrap();
        let mut middle = Revision(0);
        for index in 0..60 {
            let revision =
                store.put(&format!("/{index}"), Bytes::from(vec![b'v'; 100]), Expect::Any, None).await.unwrap();
            if index == 30 {
                middle = revision;
            }
        }
        store.compact(middle).await.unwrap();
    }
    let mut files = log_files(dir.path());
    assert!(files.len() >= 2);
    let last_frame = 12 + 8 + 1 + 4 + "/59".len() + 4 + 100;
    let snapshots = fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().path());
    files.extend(snapshots.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("snapshot-")));
    assert!(files.iter().any(|f| f.to_str().unwrap().contains("snapshot-")));
    let last_log = log_files(dir.path()).pop().unwrap();
    for file in files {
        let whole = fs::read(&file).unwrap();
        let end = if file == last_log { whole.len() - last_frame } else { whole.len() };
        for position in (0..end).step_by(11) {
            let mut bytes = whole.clone();
            bytes[position] ^= 0x40;
            fs::write(&file, &bytes).unwrap();
            match Embedded::open(dir.path(), small()) {
                Err(OpenError::Corrupt { file: named, offset, .. }) => {
                    assert_eq!(named, file);
                    assert!(offset <= position as u64);
                }
                Err(other) => panic!("{} byte {position}: {other}", file.display()),
                Ok(_) => panic!("{} byte {position}: damage went unnoticed", file.display()),
            }
        }
        fs::write(&file, &whole).unwrap();
    }
    let store = Embedded::open(dir.path(), small()).unwrap();
    assert_eq!(store.list("", ListOptions::default()).await.unwrap().entries.len(), 60);
    drop(store);
    let first = log_files(dir.path()).remove(0);
    let hidden = dir.path().join("elsewhere");
    fs::rename(&first, &hidden).unwrap();
    let missing = Embedded::open(dir.path(), small()).err().expect("a missing file is noticed");
    assert!(matches!(missing, OpenError::Corrupt { .. }), "{missing}");
}

#[tokio::test]
async fn opens_twenty_thousand_objects_quickly() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = std::sync::Arc::new(open(dir.path()));
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..64 {
            let store = store.clone();
            tasks.spawn(async move {
                for index in (writer..20_000).step_by(64) {
                    let value = Bytes::from(vec![b'x'; 2000]);
                    store.put(&format!("/pods/default/pod-{index}"), value, Expect::Absent, None).await.unwrap();
                }
            });
        }
        tasks.join_all().await;
    }
    let start = tokio::time::Instant::now();
    let store = open(dir.path());
    let took = start.elapsed();
    assert_eq!(store.list("/pods/", ListOptions::default()).await.unwrap().entries.len(), 20_000);
    println!("20,000 objects of 2 kB opened in {took:?}");
    assert!(took < std::time::Duration::from_secs(2), "took {took:?}");
}

#[derive(Clone, Debug)]
enum Op {
    Put(u8, u8, Guess),
    Delete(u8, Guess),
    Compact(u8),
    Reopen,
}

#[derive(Clone, Copy, Debug)]
enum Guess {
    Any,
    Absent,
    Right,
    Wrong,
}

fn op() -> impl Strategy<Value = Op> {
    let guess = || prop_oneof![Just(Guess::Any), Just(Guess::Absent), Just(Guess::Right), Just(Guess::Wrong)];
    prop_oneof![
        10 => (0..6u8, any::<u8>(), guess()).prop_map(|(k, v, g)| Op::Put(k, v, g)),
        4 => (0..6u8, guess()).prop_map(|(k, g)| Op::Delete(k, g)),
        1 => any::<u8>().prop_map(Op::Compact),
        1 => Just(Op::Reopen),
    ]
}

/// Value, revision and creation by key.
type Entries = BTreeMap<String, (Vec<u8>, u64, u64)>;

/// The model: every state there ever was, by revision.
struct Model {
    states: Vec<Entries>,
    oldest: u64,
}

impl Model {
    fn newest(&self) -> u64 {
        self.states.len() as u64 - 1
    }

    fn now(&self) -> &Entries {
        self.states.last().unwrap()
    }

    fn expect(&self, key: &str, guess: Guess) -> (Expect, bool) {
        let current = self.now().get(key).map(|(_, revision, _)| *revision);
        match guess {
            Guess::Any => (Expect::Any, true),
            Guess::Absent => (Expect::Absent, current.is_none()),
            Guess::Right => (Expect::At(Revision(current.unwrap_or(0))), current.is_some()),
            Guess::Wrong => (Expect::At(Revision(current.unwrap_or(5) + 1)), false),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_a_model(ops in proptest::collection::vec(op(), 1..80)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let options = Options { segment_bytes: 200, snapshot_after: 1, ..Options::default() };
            let mut store = Embedded::open(dir.path(), options.clone()).unwrap();
            let mut model = Model { states: vec![BTreeMap::new(), BTreeMap::new()], oldest: 0 };
            for op in ops {
                match op {
                    Op::Put(key, value, guess) => {
                        let key = format!("/{key}");
                        let (expect, right) = model.expect(&key, guess);
                        let result = store.put(&key, Bytes::from(vec![value; 3]), expect, None).await;
                        prop_assert_eq!(result.is_ok(), right);
                        if right {
                            let mut state = model.now().clone();
                            let revision = model.newest() + 1;
                            let created = state.get(&key).map_or(revision, |(_, _, created)| *created);
                            state.insert(key, (vec![value; 3], revision, created));
                            model.states.push(state);
                            prop_assert_eq!(result.unwrap().0, revision);
                        }
                    }
                    Op::Delete(key, guess) => {
                        let key = format!("/{key}");
                        let (expect, right) = model.expect(&key, guess);
                        let present = model.now().contains_key(&key);
                        let result = store.delete(&key, expect, None).await;
                        prop_assert_eq!(result.is_ok(), right && (present || matches!(guess, Guess::Any)));
                        if right && present {
                            let mut state = model.now().clone();
                            state.remove(&key);
                            model.states.push(state);
                        }
                    }
                    Op::Compact(part) => {
                        let at = model.newest() * u64::from(part) / 255;
                        store.compact(Revision(at)).await.unwrap();
                        model.oldest = model.oldest.max(at);
                    }
                    Op::Reopen => {
                        drop(store);
                        store = Embedded::open(dir.path(), options.clone()).unwrap();
                    }
                }
            }
            for revision in 0..=model.newest() {
                let at = ListOptions { at: Some(Revision(revision)), ..ListOptions::default() };
                match store.list("", at).await {
                    Ok(list) => {
                        prop_assert!(revision >= model.oldest);
                        let found: Entries = list.entries.iter()
                            .map(|e| (e.key.to_string(), (e.value.to_vec(), e.revision.0, e.created.0))).collect();
                        prop_assert_eq!(&found, &model.states[revision as usize]);
                        // Applying what a watch from here reports leads to the present.
                        let mut now = found;
                        let mut watch = store.watch("", Revision(revision)).await.unwrap();
                        let step = watch.next().await.unwrap().unwrap();
                        for event in step.events {
                            match event {
                                Event::Put(e) => { now.insert(e.key.to_string(), (e.value.to_vec(), e.revision.0, e.created.0)); }
                                Event::Delete { key, .. } => { now.remove(&*key); }
                            }
                        }
                        prop_assert_eq!(&now, model.now());
                    }
                    Err(Error::Compacted { .. }) => prop_assert!(revision < model.oldest),
                    Err(other) => panic!("{other}"),
                }
            }
            Ok(())
        })?;
    }
}
