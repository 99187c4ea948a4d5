//! Members that die, freeze, lose each other or answer too late. What was acknowledged stays, watches stay ordered and
//! complete, and the survivors go on in about a second.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use seawall_store::{
    Entry, Error, Event, Expect, Fence, ListOptions, Progress, Revision, Store, Watch,
    etcd::{Endpoint, Etcd, Options},
};
use tokio::{task::JoinHandle, time::Instant};

use crate::{cluster::EtcdCluster, proxy::Proxy};

/// Longer than anything here takes on a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(60);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

/// Follows a prefix, and checks while it does that nothing is out of order or repeated.
struct Follower {
    task: JoinHandle<Vec<Event>>,
    passed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Follower {
    async fn start(etcd: &Etcd, prefix: &str, after: Revision) -> Follower {
        let mut watch: Watch = etcd.watch(prefix, after).await.unwrap();
        let (passed, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (told, ended) = (passed.clone(), stop.clone());
        let task = tokio::spawn(async move {
            let (mut all, mut known) = (Vec::new(), after);
            while !ended.load(Ordering::Acquire) {
                let step = tokio::time::timeout(Duration::from_millis(100), watch.next()).await;
                let Ok(step) = step else { continue };
                let Progress { events, revision } = step.expect("the watch goes on").expect("without an error");
                assert!(revision >= known, "progress went back from {known} to {revision}");
                for event in &events {
                    assert!(event.revision() > known && event.revision() <= revision, "{known} {event:?} {revision}");
                    known = event.revision();
                }
                all.extend(events);
                known = revision;
                told.store(revision.0, Ordering::Release);
            }
            all
        });
        Follower { task, passed, stop }
    }

    /// Waits until the watch has passed what the store says is its newest revision, and returns what it has seen.
    async fn finish(self, etcd: &Etcd) -> Vec<Event> {
        self.passes(etcd).await;
        self.stop.store(true, Ordering::Release);
        self.task.await.unwrap()
    }

    /// How long it takes until the watch has passed what the store now says is its newest revision.
    async fn passes(&self, etcd: &Etcd) -> Duration {
        let newest = within(etcd.revision()).await.unwrap();
        let begun = Instant::now();
        within(async {
            while self.passed.load(Ordering::Acquire) < newest.0 && !self.task.is_finished() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        begun.elapsed()
    }
}

/// Writers that count their keys up under conditions, each its own, until they are told to stop.
struct Writers {
    tasks: Vec<JoinHandle<Written>>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
}

#[derive(Default)]
struct Written {
    /// What was acknowledged: revision, key, value (`None` for a deletion).
    acknowledged: Vec<(Revision, String, Option<Bytes>)>,
    /// Writes without an answer.
    unknown: usize,
    longest: Duration,
}

impl Writers {
    fn start(etcd: &Arc<Etcd>, count: usize) -> Writers {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let tasks = (0..count).map(|writer| {
            let (etcd, stop, done) = (etcd.clone(), stop.clone(), done.clone());
            tokio::spawn(async move { write(&etcd, writer, &stop, &done).await })
        });
        let tasks = tasks.collect();
        Writers { tasks, stop, done }
    }

    /// Waits until so many more writes have been acknowledged.
    async fn more(&self, count: u64) {
        let until = self.done.load(Ordering::Acquire) + count;
        within(async {
            while self.done.load(Ordering::Acquire) < until {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }

    async fn finish(self) -> Written {
        self.stop.store(true, Ordering::Release);
        let mut all = Written::default();
        for task in self.tasks {
            let written = task.await.unwrap();
            all.acknowledged.extend(written.acknowledged);
            all.unknown += written.unknown;
            all.longest = all.longest.max(written.longest);
        }
        all.acknowledged.sort_by_key(|(revision, ..)| *revision);
        all
    }
}

async fn write(etcd: &Etcd, writer: usize, stop: &AtomicBool, done: &AtomicU64) -> Written {
    let mut written = Written::default();
    // Nobody else writes to these keys, so every conflict would be with a write of our own.
    let mut known: HashMap<String, Option<Revision>> = HashMap::new();
    let mut n = 0;
    while !stop.load(Ordering::Acquire) {
        n += 1;
        let key = format!("/w/{writer}/{}", n % 5);
        let value = Bytes::from(format!("{writer}-{n}"));
        let begun = Instant::now();
        let (result, value) = match known.get(&key).copied().flatten() {
            Some(at) if n % 4 == 0 => (etcd.delete(&key, Expect::At(at), None).await, None),
            Some(at) => (etcd.put(&key, value.clone(), Expect::At(at), None).await, Some(value)),
            None => (etcd.put(&key, value.clone(), Expect::Absent, None).await, Some(value)),
        };
        written.longest = written.longest.max(begun.elapsed());
        match result {
            Ok(revision) => {
                known.insert(key.clone(), value.as_ref().map(|_| revision));
                written.acknowledged.push((revision, key, value));
                done.fetch_add(1, Ordering::AcqRel);
            }
            Err(error @ Error::Unavailable { .. }) => {
                eprintln!("writer {writer}, after {:?}: {error}", begun.elapsed());
                written.unknown += 1;
                // What is there now is what the next write goes on from.
                loop {
                    match etcd.get(&key).await {
                        Ok((entry, _)) => {
                            known.insert(key, entry.map(|e| e.revision));
                            break;
                        }
                        Err(Error::Unavailable { .. }) if !stop.load(Ordering::Acquire) => {}
                        Err(_) => return written,
                    }
                }
            }
            Err(error) => panic!("writer {writer}, write {n} to {key}: {error}"),
        }
    }
    written
}

/// Everything acknowledged is in the events, at its revision, and the events lead to what is there now.
async fn check(etcd: &Etcd, written: &Written, events: &[Event]) {
    let by_revision: HashMap<Revision, &Event> = events.iter().map(|e| (e.revision(), e)).collect();
    assert_eq!(by_revision.len(), events.len(), "two events share a revision");
    let mut missing_deletions = 0;
    for (revision, key, value) in &written.acknowledged {
        match (by_revision.get(revision), value) {
            (Some(Event::Put(entry)), Some(value)) => assert_eq!((&*entry.key, &entry.value), (key.as_str(), value)),
            (Some(Event::Delete { key: deleted, .. }), None) if **deleted == **key => {}
            // A deletion whose answer was lost is told of with a revision not before its own: that of any other change.
            (_, None) => missing_deletions += 1,
            (found, _) => panic!("{key} was acknowledged at {revision}, and the watch has {found:?} there"),
        }
    }
    let mut state: BTreeMap<&str, &Entry> = BTreeMap::new();
    let mut doubled = 0;
    for event in events {
        match event {
            Event::Put(entry) => {
                if let Some(old) = state.insert(&entry.key, entry) {
                    doubled += usize::from(old.value == entry.value);
                    assert_eq!(old.created, entry.created, "changed, not created anew");
                } else {
                    assert_eq!(entry.created, entry.revision, "created");
                }
            }
            Event::Delete { key, .. } => {
                assert!(state.remove(&**key).is_some(), "{key} was deleted and had not been there");
            }
        }
    }
    assert_eq!(doubled, 0, "a write was carried out twice");
    let now = within(etcd.list("/w/", ListOptions::default())).await.unwrap();
    assert_eq!(now.entries.iter().collect::<Vec<_>>(), state.into_values().collect::<Vec<_>>());
    // Each of them belongs to a write whose answer was lost, and those are few.
    assert!(missing_deletions <= 20, "{missing_deletions} deletions are not where they were said to be");
}

/// The member that leads, and one that does not.
async fn leader_and_follower(cluster: &EtcdCluster, etcd: &Etcd) -> (usize, usize) {
    let admin = etcd.admin();
    within(async {
        loop {
            for index in 0..3 {
                if let Ok(status) = admin.status(&cluster.url(index)).await
                    && status.leader == Some(status.member)
                {
                    return (index, (index + 1) % 3);
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_member_is_killed_under_load() {
    let mut cluster = EtcdCluster::start(3, true).await;
    let etcd = Arc::new(cluster.connect(Some(0)).await);
    let follower = Follower::start(&etcd, "/w/", etcd.revision().await.unwrap()).await;
    let writers = Writers::start(&etcd, 8);
    for index in [0, 1, 2, 0] {
        writers.more(300).await;
        cluster.kill(index);
        writers.more(300).await;
        cluster.run(index);
        // The next one dies only when this one is back: one at a time.
        let admin = etcd.admin();
        within(async {
            while !admin.status(&cluster.url(index)).await.is_ok_and(|s| s.leader.is_some()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
    writers.more(300).await;
    let written = writers.finish().await;
    let events = follower.finish(&etcd).await;
    check(&etcd, &written, &events).await;
    eprintln!(
        "{} writes, {} events, the longest took {:?}, {} without an answer",
        written.acknowledged.len(),
        events.len(),
        written.longest,
        written.unknown
    );
    assert_eq!(written.unknown, 0, "an election is shorter than the budget");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_local_member_freezes_and_thaws() {
    let cluster = EtcdCluster::start(3, false).await;
    let any = cluster.connect(None).await;
    let (_, local) = leader_and_follower(&cluster, &any).await;
    let etcd = Arc::new(cluster.connect(Some(local)).await);
    let follower = Follower::start(&etcd, "/w/", etcd.revision().await.unwrap()).await;
    let writers = Writers::start(&etcd, 4);
    writers.more(200).await;
    cluster.freeze(local);
    let begun = Instant::now();
    let put = async {
        within(etcd.put("/w/x", Bytes::new(), Expect::Any, None)).await.unwrap();
        begun.elapsed()
    };
    let get = async {
        within(etcd.get("/w/x")).await.unwrap();
        begun.elapsed()
    };
    let (put, get) = tokio::join!(put, get);
    let seen = follower.passes(&any).await;
    eprintln!("a put took {put:?}, a get {get:?}, the watch went on {seen:?} after that");
    assert!(put < Duration::from_millis(2500) && get < Duration::from_millis(2500), "put {put:?}, get {get:?}");
    assert!(begun.elapsed() < Duration::from_millis(4000), "the watch stayed with the frozen member: {seen:?}");
    writers.more(500).await;
    // What was under way to the frozen member must not come true when it thaws.
    cluster.thaw(local);
    writers.more(1000).await;
    let mut written = writers.finish().await;
    let events = follower.finish(&etcd).await;
    written.unknown = 0;
    // The one unconditional write may have been carried out twice, so it is not looked at.
    let events: Vec<Event> = events.into_iter().filter(|e| &**e.key() != "/w/x").collect();
    within(etcd.delete("/w/x", Expect::Any, None)).await.unwrap();
    check(&etcd, &written, &events).await;
    eprintln!("the longest write took {:?}", written.longest);
    assert!(written.longest < Duration::from_millis(2500), "{:?}", written.longest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_freezes() {
    // For a client next to another member, and for one next to the leader.
    for next_to_leader in [false, true] {
        let cluster = EtcdCluster::start(3, false).await;
        let any = cluster.connect(None).await;
        let (leader, follower) = leader_and_follower(&cluster, &any).await;
        let local = if next_to_leader { leader } else { follower };
        let etcd = Arc::new(cluster.connect(Some(local)).await);
        let follower = Follower::start(&etcd, "/w/", etcd.revision().await.unwrap()).await;
        let writers = Writers::start(&etcd, 4);
        writers.more(200).await;
        cluster.freeze(leader);
        writers.more(200).await;
        cluster.thaw(leader);
        writers.more(500).await;
        let written = writers.finish().await;
        let events = follower.finish(&etcd).await;
        check(&etcd, &written, &events).await;
        eprintln!("next to the leader: {next_to_leader}, the longest write took {:?}", written.longest);
        assert_eq!(written.unknown, 0, "an election is shorter than the budget");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_and_back() {
    let mut cluster = EtcdCluster::start(3, false).await;
    let etcd = Arc::new(cluster.connect(Some(0)).await);
    let start = etcd.revision().await.unwrap();
    let follower = Follower::start(&etcd, "/w/", start).await;
    let writers = Writers::start(&etcd, 2);
    writers.more(100).await;
    cluster.kill(1);
    cluster.kill(2);
    let mut texts = Vec::new();
    for _ in 0..2 {
        let begun = Instant::now();
        let put = within(etcd.put("/a", Bytes::new(), Expect::Any, None)).await.unwrap_err();
        let list = within(etcd.list("/", ListOptions::default())).await.unwrap_err();
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(8), "two operations of 3 s took {took:?}");
        for error in [put, list] {
            assert!(matches!(error, Error::Unavailable { .. }), "{error}");
            texts.push(error.to_string());
        }
    }
    let text = &texts[3];
    eprintln!("{text}");
    for index in 0..3 {
        assert!(text.contains(&cluster.url(index)), "{text}");
    }
    assert!(text.contains("refused") && text.contains("no leader") && text.contains("more than half"), "{text}");
    cluster.run(1);
    writers.more(100).await;
    let written = writers.finish().await;
    let events = follower.finish(&etcd).await;
    check(&etcd, &written, &events).await;
    let begun = Instant::now();
    within(etcd.put("/a", Bytes::new(), Expect::Any, None)).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3), "it recovers by itself");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_at_all() {
    let options = Options {
        endpoints: vec![Endpoint { url: "http://127.0.0.1:1".into(), local: true }],
        budget: Duration::from_millis(700),
        ..Default::default()
    };
    let begun = Instant::now();
    let Err(error) = Etcd::connect(options.clone()).await else { panic!("connected to nothing") };
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(
        error.to_string(),
        "the store is unavailable: etcd did not do it within 0.7 s: http://127.0.0.1:1: Connection refused (os error 111)"
    );
    let Err(error) = Etcd::connect(Options { endpoints: vec![], ..options }).await else { panic!("no endpoints") };
    assert!(error.to_string().contains("no endpoints"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_cut_off_from_the_others_is_left() {
    // Its peers are frozen for it, so it is a minority; for us it answers.
    let cluster = EtcdCluster::start(3, false).await;
    let any = cluster.connect(None).await;
    let (leader, local) = leader_and_follower(&cluster, &any).await;
    let third = 3 - leader - local;
    let alone = Etcd::connect(Options {
        endpoints: vec![Endpoint { url: cluster.url(local), local: true }],
        ..Default::default()
    })
    .await
    .unwrap();
    let follower = Follower::start(&alone, "/w/", alone.revision().await.unwrap()).await;
    within(alone.put("/w/a", Bytes::new(), Expect::Any, None)).await.unwrap();
    cluster.freeze(leader);
    cluster.freeze(third);
    let error = within(alone.put("/w/b", Bytes::new(), Expect::Absent, None)).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    cluster.thaw(leader);
    cluster.thaw(third);
    // Without doing anything about it: the watch goes on, and so do writes.
    let created = within(async {
        loop {
            match alone.put("/w/b", Bytes::from_static(b"mine"), Expect::Absent, None).await {
                Err(Error::Unavailable { .. }) => {}
                other => break other,
            }
        }
    })
    .await;
    // The first one may have happened, with another value; then it is said that it is there.
    assert!(matches!(created, Ok(_) | Err(Error::Conflict { actual: Some(_), .. })), "{created:?}");
    let events = follower.finish(&alone).await;
    let keys: Vec<_> = events.iter().map(|e| e.key().to_string()).collect();
    assert_eq!(keys, ["/w/a", "/w/b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_over_a_compaction_while_it_was_away() {
    let cluster = EtcdCluster::start(1, false).await;
    let direct = cluster.connect(None).await;
    let proxy = Proxy::start(&cluster.url(0)).await;
    let etcd = Etcd::connect(proxy.options()).await.unwrap();
    let first = direct.put("/a", Bytes::new(), Expect::Any, None).await.unwrap();
    let mut watch = etcd.watch("/", Revision(first.0 - 1)).await.unwrap();
    let step = within(watch.next()).await.unwrap().unwrap();
    assert_eq!((step.events.len(), step.revision), (1, first));
    proxy.cut();
    let deleted = direct.delete("/a", Expect::Any, None).await.unwrap();
    // Everything that the watch has missed is this deletion, and it is at the edge of what is compacted.
    direct.compact(deleted).await.unwrap();
    proxy.mend();
    let end = within(async {
        loop {
            match watch.next().await.expect("an end that says why") {
                Ok(step) => assert!(step.events.is_empty() && step.revision < deleted, "{step:?}"),
                Err(error) => break error,
            }
        }
    })
    .await;
    assert!(matches!(end, Error::Lagged { at } if at == first), "{end}");
    assert!(within(watch.next()).await.is_none(), "a watch ends after an error");
    let gone = within(etcd.watch("/", first).await.unwrap().next()).await.unwrap().unwrap_err();
    assert!(
        matches!(gone, Error::Compacted { requested, oldest } if requested == first && oldest == deleted),
        "{gone}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_writes_do_not_hold_a_consistent_read_up() {
    let cluster = EtcdCluster::start(1, false).await;
    let (ours, theirs) = (cluster.connect(Some(0)).await, cluster.connect(Some(0)).await);
    let follower = Follower::start(&ours, "/registry/", ours.revision().await.unwrap()).await;
    let mut times = Vec::new();
    for index in 0..20 {
        theirs.put(&format!("/theirs/{index}"), Bytes::new(), Expect::Any, None).await.unwrap();
        times.push(follower.passes(&ours).await);
    }
    times.sort();
    eprintln!("the watch passes a foreign write after {:?} (median), {:?} (worst)", times[10], times[19]);
    assert!(times[10] < Duration::from_millis(500), "{times:?}");
    let before = ours.revision().await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(ours.revision().await.unwrap(), before, "nothing is written when nobody asks");
    // Nobody gets to see by what means.
    let listing = ours.list("/registry/", ListOptions::default()).await.unwrap();
    assert!(listing.entries.is_empty(), "{listing:?}");
    assert!(follower.finish(&ours).await.is_empty());
    let (entry, _) = ours.get("/registry/seawall.dev/sentinel").await.unwrap();
    assert!(entry.is_none());
}

/// Each kind of write through a member whose answers get lost after it has carried the write out, and another one besides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_answer_is_lost_is_not_a_conflict_with_itself() {
    let cluster = EtcdCluster::start(3, false).await;
    let direct = cluster.connect(None).await;
    let proxy = Proxy::start(&cluster.url(0)).await;
    let mut options = proxy.options();
    options.endpoints.push(Endpoint { url: cluster.url(1), local: false });
    let value = |text: &'static str| Bytes::from_static(text.as_bytes());
    let lock = direct.put("/lock", Bytes::new(), Expect::Any, None).await.unwrap();
    let fence = Fence { key: "/lock".into(), created: lock };
    let start = direct.revision().await.unwrap();
    for round in 0..2 {
        let (created, changed, deleted) =
            (format!("/w/{round}/created"), format!("/w/{round}/changed"), format!("/w/{round}/deleted"));
        let at = direct.put(&changed, value("old"), Expect::Absent, None).await.unwrap();
        let del = direct.put(&deleted, value("old"), Expect::Absent, None).await.unwrap();
        let etcd = Etcd::connect(options.clone()).await.unwrap();
        // A round with nothing but silence, and one in which the connection breaks.
        match round {
            0 => proxy.swallow(),
            _ => proxy.break_on_answer(),
        }
        let results = within(async {
            tokio::join!(
                etcd.put(&created, value("new"), Expect::Absent, Some(&fence)),
                etcd.put(&changed, value("new"), Expect::At(at), None),
                etcd.delete(&deleted, Expect::At(del), Some(&fence)),
            )
        })
        .await;
        let (create, change, delete) = (results.0.unwrap(), results.1.unwrap(), results.2.unwrap());
        let entry = direct.get(&created).await.unwrap().0.unwrap();
        assert_eq!((entry.revision, entry.created), (create, create));
        assert_eq!(direct.get(&changed).await.unwrap().0.unwrap().revision, change);
        assert!(direct.get(&deleted).await.unwrap().0.is_none() && delete > del);
        // And a real conflict stays one.
        let conflict = within(etcd.put(&created, value("other"), Expect::Absent, None)).await.unwrap_err();
        assert!(matches!(conflict, Error::Conflict { actual: Some(actual), .. } if actual == create), "{conflict}");
        proxy.mend();
    }
    // Each happened once.
    let follower = Follower::start(&direct, "/w/", start).await;
    assert_eq!(follower.finish(&direct).await.len(), 2 * 5);
}

/// The wire goes dead: packets are sent and nothing comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_wire_costs_less_than_a_second_and_a_half() {
    let cluster = EtcdCluster::start(3, false).await;
    let direct = cluster.connect(None).await;
    let proxy = Proxy::start(&cluster.url(0)).await;
    let mut options = proxy.options();
    options.endpoints.push(Endpoint { url: cluster.url(1), local: false });
    let etcd = Etcd::connect(options).await.unwrap();
    let follower = Follower::start(&etcd, "/w/", etcd.revision().await.unwrap()).await;
    direct.put("/w/a", Bytes::new(), Expect::Any, None).await.unwrap();
    follower.passes(&direct).await;
    proxy.swallow();
    let begun = Instant::now();
    direct.put("/w/b", Bytes::new(), Expect::Any, None).await.unwrap();
    // Nobody asks anything: the watch finds out by itself.
    follower.passes(&direct).await;
    let watch = begun.elapsed();
    proxy.mend();
    eprintln!("the watch went on after {watch:?}");
    assert!(watch < Duration::from_millis(2500), "{watch:?}");
    let events = follower.finish(&direct).await;
    assert_eq!(events.len(), 2, "{events:?}");
}

/// A watch that is behind by many large values, which etcd delivers in pieces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_backlog_comes_in_pieces_and_whole() {
    const COUNT: u64 = 150;
    let cluster = EtcdCluster::start(1, false).await;
    let etcd = cluster.connect(Some(0)).await;
    let start = etcd.revision().await.unwrap();
    for index in 0..COUNT {
        let value = Bytes::from(vec![b'0' + (index % 10) as u8; 400_000]);
        etcd.put(&format!("/w/{}", index % 3), value, Expect::Any, None).await.unwrap();
    }
    let follower = Follower::start(&etcd, "/w/", start).await;
    let events = follower.finish(&etcd).await;
    let revisions: Vec<u64> = events.iter().map(|e| e.revision().0 - start.0).collect();
    assert_eq!(revisions, (1..=COUNT).collect::<Vec<_>>());
}

/// A request that is on its way to a frozen member is done there when nobody expects it any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_under_way_does_not_come_true_later() {
    let cluster = EtcdCluster::start(3, false).await;
    let direct = cluster.connect(None).await;
    let proxy = Proxy::start(&cluster.url(0)).await;
    let mut options = proxy.options();
    options.endpoints.push(Endpoint { url: cluster.url(1), local: false });
    let etcd = Etcd::connect(options).await.unwrap();
    within(etcd.put("/w/other", Bytes::new(), Expect::Any, None)).await.unwrap();
    // What we send is kept, as in the socket of a process that is stopped.
    proxy.hold();
    let created = within(etcd.put("/w/a", Bytes::from_static(b"a"), Expect::Absent, None)).await.unwrap();
    assert!(proxy.held() >= 1, "the request was sent to the member that holds it");
    assert_eq!(direct.get("/w/a").await.unwrap().0.unwrap().revision, created);
    within(etcd.delete("/w/a", Expect::At(created), None)).await.unwrap();
    proxy.release().await;
    // The member has seen it. What it did of it is in order before this.
    direct.put("/w/done", Bytes::new(), Expect::Any, None).await.unwrap();
    let (found, _) = direct.get("/w/a").await.unwrap();
    assert!(found.is_none(), "what was deleted is there again: {found:?}");
    let events = Follower::start(&direct, "/w/a", Revision(created.0 - 1)).await.finish(&direct).await;
    assert_eq!(events.len(), 2, "created and deleted once: {events:?}");
}

/// A fence that ends while its holder's requests hang.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_term_that_is_over_stays_over() {
    let cluster = EtcdCluster::start(3, false).await;
    let any = cluster.connect(None).await;
    let (_, local) = leader_and_follower(&cluster, &any).await;
    let old = cluster.connect(Some(local)).await;
    let won = old.put("/lock", Bytes::from_static(b"old"), Expect::Absent, None).await.unwrap();
    let fence = Fence { key: "/lock".into(), created: won };
    old.put("/w/a", Bytes::from_static(b"1"), Expect::Absent, Some(&fence)).await.unwrap();
    cluster.freeze(local);
    let late = tokio::spawn(async move {
        let fence = fence;
        (old.put("/w/b", Bytes::from_static(b"late"), Expect::Any, Some(&fence)).await, old, fence)
    });
    // Meanwhile another one leads.
    let new = cluster.connect(Some((local + 1) % 3)).await;
    within(new.delete("/lock", Expect::At(won), None)).await.unwrap();
    let won = within(new.put("/lock", Bytes::from_static(b"new"), Expect::Absent, None)).await.unwrap();
    let over = new.revision().await.unwrap();
    cluster.thaw(local);
    let (result, old, fence) = within(late).await.unwrap();
    match result {
        // Before the term was over.
        Ok(revision) => assert!(revision < won, "{revision} is after {won}"),
        Err(error) => assert!(matches!(error, Error::Fenced { .. }), "{error}"),
    }
    let error = within(old.put("/w/c", Bytes::new(), Expect::Any, Some(&fence))).await.unwrap_err();
    assert!(matches!(error, Error::Fenced { .. }), "{error}");
    let written = new.list("/w/", ListOptions::default()).await.unwrap();
    assert!(written.entries.iter().all(|e| e.revision < over), "written after the term: {written:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_are_replaced_while_everything_runs() {
    let cluster = EtcdCluster::start(3, true).await;
    let all = cluster.options(None).endpoints;
    let etcd = Arc::new(cluster.connect_with(Options { endpoints: all[..1].to_vec(), ..cluster.options(None) }).await);
    let follower = Follower::start(&etcd, "/w/", etcd.revision().await.unwrap()).await;
    let writers = Writers::start(&etcd, 4);
    for set in [&all[1..2], &all[..], &all[2..], &all[..2], &all[1..]] {
        writers.more(200).await;
        etcd.set_endpoints(set.to_vec()).unwrap();
    }
    etcd.set_tls(&cluster.certificate("renewed")).unwrap();
    writers.more(200).await;
    let error = etcd.set_endpoints(vec![Endpoint { url: "nonsense".into(), local: false }]).unwrap_err();
    assert!(error.to_string().contains("\"nonsense\""), "{error:?}");
    writers.more(100).await;
    let written = writers.finish().await;
    let events = follower.finish(&etcd).await;
    check(&etcd, &written, &events).await;
    assert_eq!(written.unknown, 0);
}
