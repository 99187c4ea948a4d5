//! What every [`Store`] must keep, as code. Each backend's tests call [`run_all`] with a way to make an empty store.
//!
//! A case that does not hold panics with the case's name in the backtrace; that is how a test reports.

use std::{future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use tokio::task::JoinSet;

use crate::{Entry, Error, Event, Expect, Fence, ListOptions, Progress, Revision, Store, Watch};

/// Longer than any step of any backend takes on a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs all cases, each on a store of its own.
pub async fn run_all<S: Store, F: Future<Output = S>>(make: impl Fn() -> F) {
    macro_rules! cases {
        ($($case:ident),* $(,)?) => {$(
            tracing::info!(case = stringify!($case));
            Box::pin($case(Arc::new(make().await))).await;
        )*};
    }
    cases!(
        an_empty_store_has_a_revision_above_zero,
        put_and_get,
        compare_and_put,
        compare_and_delete,
        revision_zero_is_no_write,
        lists_are_ordered_and_bounded_by_their_prefix,
        lists_in_pages,
        lists_of_many_bytes_are_of_one_instant,
        lists_at_a_revision,
        watch_from_any_retained_revision,
        watch_reports_progress,
        watch_reaches_what_was_told,
        watch_keeps_to_its_prefix,
        compaction,
        the_future,
        fences,
        many_writers_count_without_loss,
        concurrent_creates_have_one_winner,
        watchers_see_one_order,
        a_slow_watcher_delays_nobody,
        large_and_empty_values,
    );
}

async fn put<S: Store>(store: &S, key: &str, value: &str) -> Revision {
    within(store.put(key, Bytes::copy_from_slice(value.as_bytes()), Expect::Any, None)).await.expect("a put succeeds")
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("the store answers in time")
}

async fn keys<S: Store>(store: &S, prefix: &str, options: ListOptions) -> Vec<String> {
    let listing = within(store.list(prefix, options)).await.expect("a list succeeds");
    listing.entries.iter().map(|entry| entry.key.to_string()).collect()
}

fn at(revision: Revision) -> ListOptions {
    ListOptions { at: Some(revision), ..ListOptions::default() }
}

async fn next(watch: &mut Watch) -> Progress {
    within(watch.next()).await.expect("the watch goes on").expect("a step of the watch succeeds")
}

/// Reads until `count` events have come, checking that they and the progress never go back.
async fn events(watch: &mut Watch, count: usize) -> Vec<Event> {
    let mut all: Vec<Event> = Vec::new();
    let mut known = Revision(0);
    while all.len() < count {
        let step = next(watch).await;
        assert!(step.revision >= known, "progress went back from {known} to {}", step.revision);
        for event in step.events {
            assert!(event.revision() > known, "event {} after progress {known}", event.revision());
            assert!(event.revision() <= step.revision, "event {} beyond progress {}", event.revision(), step.revision);
            assert!(all.last().is_none_or(|last| last.revision() < event.revision()), "events out of order");
            all.push(event);
        }
        known = step.revision;
    }
    assert_eq!(all.len(), count, "more events than writes");
    all
}

async fn an_empty_store_has_a_revision_above_zero<S: Store>(store: Arc<S>) {
    // Kubernetes gives resourceVersion "0" a meaning of its own.
    assert!(within(store.revision()).await.expect("revision") > Revision(0));
    let listing = within(store.list("", ListOptions::default())).await.expect("list");
    assert!(listing.entries.is_empty() && !listing.more && listing.revision > Revision(0));
}

async fn put_and_get<S: Store>(store: Arc<S>) {
    let start = within(store.revision()).await.expect("revision");
    let first = put(&*store, "/a", "one").await;
    assert!(first > start);
    let second = put(&*store, "/a", "two").await;
    assert!(second > first);
    let (entry, revision) = within(store.get("/a")).await.expect("get");
    let entry = entry.expect("the key is there");
    let expected = Entry { key: "/a".into(), value: Bytes::from_static(b"two"), revision: second, created: first };
    assert_eq!(entry, expected);
    assert!(revision >= second);
    let (none, _) = within(store.get("/b")).await.expect("get");
    assert!(none.is_none());

    within(store.delete("/a", Expect::Any, None)).await.expect("delete");
    let again = put(&*store, "/a", "three").await;
    let (entry, _) = within(store.get("/a")).await.expect("get");
    assert_eq!(entry.map(|e| (e.created, e.revision)), Some((again, again)), "a key created anew is new");
}

async fn compare_and_put<S: Store>(store: Arc<S>) {
    let try_put = |value: &'static str, expect| {
        let store = store.clone();
        async move { within(store.put("/a", Bytes::from_static(value.as_bytes()), expect, None)).await }
    };
    let missing = try_put("x", Expect::At(Revision(1))).await;
    assert!(matches!(missing, Err(Error::Conflict { actual: None, .. })), "{missing:?}");
    let first = try_put("one", Expect::Absent).await.expect("create");
    let exists = try_put("x", Expect::Absent).await;
    assert!(matches!(exists, Err(Error::Conflict { actual: Some(r), .. }) if r == first), "{exists:?}");
    let second = try_put("two", Expect::At(first)).await.expect("update");
    let stale = try_put("x", Expect::At(first)).await;
    assert!(matches!(stale, Err(Error::Conflict { actual: Some(r), .. }) if r == second), "{stale:?}");
    let revision = within(store.revision()).await.expect("revision");
    assert_eq!(revision, second, "what was refused took no revision");
}

async fn compare_and_delete<S: Store>(store: Arc<S>) {
    let first = put(&*store, "/a", "one").await;
    let second = put(&*store, "/a", "two").await;
    let stale = within(store.delete("/a", Expect::At(first), None)).await;
    assert!(matches!(stale, Err(Error::Conflict { actual: Some(r), .. }) if r == second), "{stale:?}");
    let gone = within(store.delete("/a", Expect::At(second), None)).await.expect("delete");
    assert!(gone > second);
    let again = within(store.delete("/a", Expect::At(second), None)).await;
    assert!(matches!(again, Err(Error::Conflict { actual: None, .. })), "{again:?}");
    let unchanged = within(store.delete("/a", Expect::Any, None)).await.expect("deleting nothing");
    assert_eq!(unchanged, gone, "deleting what is not there takes no revision");
}

async fn revision_zero_is_no_write<S: Store>(store: Arc<S>) {
    // To etcd's transactions, 0 means that a key does not exist.
    let zero = Expect::At(Revision(0));
    let put_at_zero = within(store.put("/a", Bytes::new(), zero, None)).await;
    assert!(matches!(put_at_zero, Err(Error::Conflict { actual: None, .. })), "{put_at_zero:?}");
    let fence = Fence { key: "/lock".into(), created: Revision(0) };
    let fenced = within(store.put("/a", Bytes::new(), Expect::Any, Some(&fence))).await;
    assert!(matches!(fenced, Err(Error::Fenced { .. })), "{fenced:?}");
    let absent = within(store.delete("/a", Expect::Absent, None)).await;
    assert!(matches!(absent, Err(Error::Conflict { actual: None, .. })), "nothing can be deleted: {absent:?}");
    let first = put(&*store, "/a", "").await;
    for expect in [zero, Expect::Absent] {
        let refused = within(store.delete("/a", expect, None)).await;
        assert!(matches!(refused, Err(Error::Conflict { actual: Some(r), .. }) if r == first), "{refused:?}");
    }
    // If neither holds, the end of the term is what the writer has to know.
    let both = within(store.put("/a", Bytes::new(), Expect::Absent, Some(&fence))).await;
    assert!(matches!(both, Err(Error::Fenced { .. })), "{both:?}");
}

async fn lists_are_ordered_and_bounded_by_their_prefix<S: Store>(store: Arc<S>) {
    // '.' sorts before '/', '0' after it; the last one has the largest character that a name may end with.
    for key in ["/p/b", "/p/a", "/p.x/a", "/p", "/p/", "/p0", "/o/z", "/q/a", "/p/a/b", "/p/\u{10ffff}"] {
        put(&*store, key, "").await;
    }
    assert_eq!(keys(&*store, "/p/", ListOptions::default()).await, ["/p/", "/p/a", "/p/a/b", "/p/b", "/p/\u{10ffff}"]);
    assert_eq!(keys(&*store, "/p/a", ListOptions::default()).await, ["/p/a", "/p/a/b"]);
    assert_eq!(keys(&*store, "/none/", ListOptions::default()).await, Vec::<String>::new());
    assert_eq!(keys(&*store, "", ListOptions::default()).await.len(), 10);
}

async fn lists_in_pages<S: Store>(store: Arc<S>) {
    for index in 0..7 {
        put(&*store, &format!("/p/{index}"), "").await;
    }
    put(&*store, "/q", "").await;
    let mut seen = Vec::new();
    let mut options = ListOptions { limit: 3, ..ListOptions::default() };
    loop {
        let page = within(store.list("/p/", options.clone())).await.expect("page");
        assert!(page.entries.len() <= 3);
        seen.extend(page.entries.iter().map(|e| e.key.to_string()));
        // The pages are of one instant, whatever is written in between.
        options.at = Some(page.revision);
        options.after = page.entries.last().map(|e| e.key.clone());
        put(&*store, &format!("/p/{}-late", seen.len()), "").await;
        if !page.more {
            break;
        }
    }
    assert_eq!(seen, (0..7).map(|i| format!("/p/{i}")).collect::<Vec<_>>());
    let exact = within(store.list("/q", ListOptions { limit: 1, ..ListOptions::default() })).await.expect("page");
    assert!(exact.entries.len() == 1 && !exact.more, "a full page that is the last one says so");
    let before = ListOptions { after: Some("/a".into()), ..ListOptions::default() };
    assert_eq!(keys(&*store, "/q", before).await, ["/q"], "starting before the prefix starts at the prefix");
    let beyond = ListOptions { after: Some("/z".into()), ..ListOptions::default() };
    assert_eq!(keys(&*store, "/q", beyond).await, Vec::<String>::new());
}

async fn lists_of_many_bytes_are_of_one_instant<S: Store>(store: Arc<S>) {
    // More than fits into one answer of a backend behind a network.
    const KEYS: usize = 1300;
    let value = Bytes::from(vec![b'x'; 16 << 10]);
    let mut tasks = JoinSet::new();
    for writer in 0..10 {
        let (store, value) = (store.clone(), value.clone());
        tasks.spawn(async move {
            for index in (writer..KEYS).step_by(10) {
                within(store.put(&format!("/p/{index:05}"), value.clone(), Expect::Absent, None)).await.expect("put");
            }
        });
    }
    join(tasks).await;
    // Meanwhile each change deletes the first key and makes a last one, in this order, so there are never more.
    let stop = tokio_util::sync::CancellationToken::new();
    let changes = {
        let (store, stop) = (store.clone(), stop.clone());
        tokio::spawn(async move {
            for index in 0.. {
                if stop.is_cancelled() {
                    break;
                }
                within(store.delete(&format!("/p/{index:05}"), Expect::Any, None)).await.expect("delete");
                put(&*store, &format!("/p/{:05}", KEYS + index), "").await;
            }
        })
    };
    for limit in [0, 700, 0, 1250] {
        let options = ListOptions { limit, ..ListOptions::default() };
        let listing = within(store.list("/p/", options)).await.expect("list");
        let numbers: Vec<usize> = listing.entries.iter().map(|e| e.key[3..].parse().expect("a number")).collect();
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "keys of different instants: {numbers:?}");
        assert!(listing.entries.iter().all(|e| e.revision <= listing.revision), "newer than the list");
        match limit {
            0 => assert!((KEYS - 1..=KEYS).contains(&numbers.len()) && !listing.more, "{} keys", numbers.len()),
            limit => assert!(numbers.len() == limit && listing.more, "{} keys of {limit}", numbers.len()),
        }
    }
    stop.cancel();
    changes.await.expect("the writer ends");
}

async fn lists_at_a_revision<S: Store>(store: Arc<S>) {
    let one = put(&*store, "/a", "1").await;
    let two = put(&*store, "/b", "1").await;
    let three = put(&*store, "/a", "2").await;
    let four = within(store.delete("/b", Expect::Any, None)).await.expect("delete");
    // Enough changes that the store cannot answer from what it has at hand.
    for index in 0..3000 {
        put(&*store, &format!("/x/{}", index % 10), "").await;
    }
    for (revision, expected) in [
        (one, vec![("/a", "1")]),
        (two, vec![("/a", "1"), ("/b", "1")]),
        (three, vec![("/a", "2"), ("/b", "1")]),
        (four, vec![("/a", "2")]),
    ] {
        let listing = within(store.list("/", at(revision))).await.expect("list");
        assert_eq!(listing.revision, revision);
        let found: Vec<_> =
            listing.entries.iter().map(|e| (&*e.key, std::str::from_utf8(&e.value).expect("text"))).collect();
        assert_eq!(found, expected, "at {revision}");
    }
    assert_eq!(keys(&*store, "/x/", ListOptions::default()).await.len(), 10);
}

async fn watch_from_any_retained_revision<S: Store>(store: Arc<S>) {
    let start = within(store.revision()).await.expect("revision");
    let mut revisions = vec![start];
    for index in 0..20 {
        revisions.push(put(&*store, "/a", &index.to_string()).await);
    }
    revisions.push(within(store.delete("/a", Expect::Any, None)).await.expect("delete"));
    for (index, after) in revisions.iter().enumerate() {
        let mut watch = within(store.watch("/", *after)).await.expect("watch");
        let rest = events(&mut watch, revisions.len() - 1 - index).await;
        assert_eq!(rest.iter().map(Event::revision).collect::<Vec<_>>(), revisions[index + 1..]);
    }
    let mut watch = within(store.watch("/", start)).await.expect("watch");
    let all = events(&mut watch, 21).await;
    match (&all[0], &all[19], &all[20]) {
        (Event::Put(first), Event::Put(last), Event::Delete { key, .. }) => {
            assert!(first.created == first.revision && first.value == "0");
            assert!(last.created == first.revision && last.value == "19");
            assert_eq!(&**key, "/a");
        }
        other => panic!("unexpected events {other:?}"),
    }
    // The same watch goes on with what is new.
    let new = put(&*store, "/b", "").await;
    assert_eq!(events(&mut watch, 1).await[0].revision(), new);
}

async fn watch_reports_progress<S: Store>(store: Arc<S>) {
    let now = put(&*store, "/elsewhere", "").await;
    let mut watch = within(store.watch("/a/", now)).await.expect("watch");
    let first = next(&mut watch).await;
    assert!(first.events.is_empty() && first.revision >= now, "{first:?}");
    let mut watch = within(store.watch("/a/", Revision(now.0 - 1))).await.expect("watch");
    let first = next(&mut watch).await;
    assert!(first.events.is_empty() && first.revision >= now, "{first:?}");
}

async fn watch_reaches_what_was_told<S: Store>(store: Arc<S>) {
    // A consistent read from a cache: ask for the revision, wait until the watch has passed it.
    let start = within(store.revision()).await.expect("revision");
    let mut watch = within(store.watch("/a/", start)).await.expect("watch");
    for index in 0..5 {
        put(&*store, &format!("/elsewhere/{index}"), "").await;
        let told = within(store.revision()).await.expect("revision");
        loop {
            let step = next(&mut watch).await;
            assert!(step.events.is_empty(), "{step:?}");
            if step.revision >= told {
                break;
            }
        }
    }
    assert_eq!(keys(&*store, "/a/", ListOptions::default()).await, Vec::<String>::new());
}

async fn watch_keeps_to_its_prefix<S: Store>(store: Arc<S>) {
    let start = within(store.revision()).await.expect("revision");
    let mut watch = within(store.watch("/p/", start)).await.expect("watch");
    for key in ["/p", "/p/a", "/p0", "/p.x", "/p/b", "/q/a"] {
        put(&*store, key, "").await;
    }
    within(store.delete("/p0", Expect::Any, None)).await.expect("delete");
    within(store.delete("/p/a", Expect::Any, None)).await.expect("delete");
    let seen = events(&mut watch, 3).await;
    assert_eq!(seen.iter().map(|e| &**e.key()).collect::<Vec<_>>(), ["/p/a", "/p/b", "/p/a"]);
}

async fn compaction<S: Store>(store: Arc<S>) {
    let mut revisions = Vec::new();
    for index in 0..10 {
        revisions.push(put(&*store, &format!("/{}", index % 3), &index.to_string()).await);
    }
    let (before, oldest, newest) = (revisions[3], revisions[4], revisions[9]);
    within(store.compact(oldest)).await.expect("compact");
    within(store.compact(oldest)).await.expect("compacting twice changes nothing");
    within(store.compact(before)).await.expect("nor does compacting less");

    let gone = within(store.list("/", at(before))).await;
    assert!(matches!(&gone, Err(Error::Compacted { requested, .. }) if *requested == before), "{gone:?}");
    let gone = match within(store.watch("/", before)).await {
        Err(error) => error,
        // A backend may say so with the first step.
        Ok(mut watch) => within(watch.next()).await.expect("a step").expect_err("the history is gone"),
    };
    assert!(matches!(&gone, Error::Compacted { .. }), "{gone:?}");

    let kept = within(store.list("/", at(oldest))).await.expect("the oldest kept revision can be listed");
    assert_eq!(kept.entries.iter().map(|e| e.value.clone()).collect::<Vec<_>>(), ["3", "4", "2"]);
    let mut watch = within(store.watch("/", oldest)).await.expect("and watched from");
    assert_eq!(events(&mut watch, 5).await.len(), 5);
    let now = within(store.list("/", ListOptions::default())).await.expect("list");
    // A backend may have writes of its own, which are not shown.
    assert!(now.entries.len() == 3 && now.revision >= newest, "current values stay: {now:?}");

    within(store.compact(newest)).await.expect("compact everything");
    let mut watch = within(store.watch("/", newest)).await.expect("watch from now");
    let new = put(&*store, "/a", "").await;
    assert_eq!(events(&mut watch, 1).await[0].revision(), new);
}

async fn the_future<S: Store>(store: Arc<S>) {
    let newest = put(&*store, "/a", "").await;
    let later = Revision(newest.0 + 5);
    let list = within(store.list("/", at(later))).await;
    assert!(matches!(&list, Err(Error::Future { requested, .. }) if *requested == later), "{list:?}");
    let watch = within(store.watch("/", later)).await.map(|_| ());
    assert!(matches!(&watch, Err(Error::Future { requested, .. }) if *requested == later), "{watch:?}");
    let compact = within(store.compact(later)).await;
    assert!(matches!(&compact, Err(Error::Future { requested, .. }) if *requested == later), "{compact:?}");
}

async fn fences<S: Store>(store: Arc<S>) {
    let won = put(&*store, "/leader", "me").await;
    let fence = Fence { key: "/leader".into(), created: won };
    let write = |key: &'static str, fence: Fence| {
        let store = store.clone();
        async move { within(store.put(key, Bytes::new(), Expect::Any, Some(&fence))).await }
    };
    write("/a", fence.clone()).await.expect("the leader writes");
    // Renewing the lock is not losing it.
    put(&*store, "/leader", "still me").await;
    write("/a", fence.clone()).await.expect("the leader still writes");

    within(store.delete("/leader", Expect::Any, None)).await.expect("delete");
    let revision = within(store.revision()).await.expect("revision");
    let fenced = write("/b", fence.clone()).await;
    assert!(matches!(&fenced, Err(Error::Fenced { key }) if &**key == "/leader"), "{fenced:?}");
    let other = put(&*store, "/leader", "someone else").await;
    assert!(matches!(write("/b", fence.clone()).await, Err(Error::Fenced { .. })));
    let fenced = within(store.delete("/a", Expect::Any, Some(&fence))).await;
    assert!(matches!(fenced, Err(Error::Fenced { .. })), "{fenced:?}");
    assert_eq!(keys(&*store, "/", ListOptions::default()).await, ["/a", "/leader"]);
    assert_eq!(within(store.revision()).await.expect("revision"), other, "what was fenced took no revision");
    assert!(other > revision);
    write("/b", Fence { key: "/leader".into(), created: other }).await.expect("the new leader writes");
}

async fn many_writers_count_without_loss<S: Store>(store: Arc<S>) {
    const WRITERS: usize = 16;
    const EACH: usize = 25;
    put(&*store, "/counter", "0").await;
    let mut tasks = JoinSet::new();
    for _ in 0..WRITERS {
        let store = store.clone();
        tasks.spawn(async move {
            let mut done = 0;
            while done < EACH {
                let (entry, _) = within(store.get("/counter")).await.expect("get");
                let entry = entry.expect("the counter is there");
                let count: usize = std::str::from_utf8(&entry.value).expect("text").parse().expect("a number");
                let next = Bytes::from((count + 1).to_string());
                match within(store.put("/counter", next, Expect::At(entry.revision), None)).await {
                    Ok(revision) => {
                        assert!(revision > entry.revision);
                        // Read your writes: what was acknowledged is seen by every later read.
                        let (seen, _) = within(store.get("/counter")).await.expect("get");
                        assert!(
                            seen.is_some_and(|seen| seen.revision >= revision),
                            "a read older than an acknowledged write"
                        );
                        done += 1;
                    }
                    Err(Error::Conflict { actual, .. }) => {
                        assert!(actual.is_some_and(|actual| actual > entry.revision), "refused without a reason");
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        });
    }
    join(tasks).await;
    let (entry, _) = within(store.get("/counter")).await.expect("get");
    assert_eq!(entry.expect("there").value, (WRITERS * EACH).to_string());
}

async fn concurrent_creates_have_one_winner<S: Store>(store: Arc<S>) {
    let mut tasks = JoinSet::new();
    for writer in 0..16 {
        let store = store.clone();
        tasks.spawn(async move {
            let mut won = 0;
            for key in 0..20 {
                let value = Bytes::from(writer.to_string());
                match within(store.put(&format!("/{key}"), value, Expect::Absent, None)).await {
                    Ok(_) => won += 1,
                    Err(Error::Conflict { actual: Some(_), .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            won
        });
    }
    assert_eq!(join(tasks).await.into_iter().sum::<i32>(), 20);
}

async fn watchers_see_one_order<S: Store>(store: Arc<S>) {
    const WRITERS: usize = 8;
    const EACH: usize = 50;
    let start = within(store.revision()).await.expect("revision");
    let mut readers = JoinSet::new();
    for _ in 0..4 {
        let mut watch = within(store.watch("/", start)).await.expect("watch");
        readers.spawn(async move { events(&mut watch, WRITERS * EACH).await });
    }
    let mut tasks = JoinSet::new();
    for writer in 0..WRITERS {
        let store = store.clone();
        tasks.spawn(async move {
            let mut acknowledged = Vec::new();
            for index in 0..EACH {
                acknowledged.push(put(&*store, &format!("/{writer}/{}", index % 7), "").await);
            }
            acknowledged
        });
    }
    let mut written: Vec<Revision> = join(tasks).await.concat();
    written.sort();
    assert!(written.windows(2).all(|pair| pair[0] < pair[1]), "two writes share a revision");
    for seen in join(readers).await {
        assert_eq!(seen.iter().map(Event::revision).collect::<Vec<_>>(), written);
    }
}

async fn a_slow_watcher_delays_nobody<S: Store>(store: Arc<S>) {
    let start = within(store.revision()).await.expect("revision");
    let mut slow = within(store.watch("/", start)).await.expect("watch");
    let mut revisions = Vec::new();
    for index in 0..5000 {
        revisions.push(put(&*store, &format!("/{}", index % 100), "x").await);
    }
    let newest = revisions[revisions.len() - 1];
    within(store.compact(newest)).await.expect("compact");
    // Either everything comes, in order, or a clear end: never a gap.
    let mut seen = 0;
    loop {
        match within(slow.next()).await.expect("a step or an error") {
            Ok(step) => {
                for event in step.events {
                    assert_eq!(event.revision(), revisions[seen]);
                    seen += 1;
                }
                if step.revision >= newest {
                    assert_eq!(seen, revisions.len());
                    break;
                }
            }
            Err(Error::Lagged { at }) => {
                assert!(at <= newest);
                assert!(within(slow.next()).await.is_none(), "a watch ends after an error");
                break;
            }
            Err(other) => panic!("{other}"),
        }
    }
}

async fn large_and_empty_values<S: Store>(store: Arc<S>) {
    // etcd refuses requests above 1.5 MiB by default, and the API server's limit lies below that.
    let large = Bytes::from(vec![b'x'; 1 << 20]);
    for (key, value) in [("/large", large), ("/empty", Bytes::new()), ("/binary", Bytes::from_static(&[0, 255, 10]))] {
        within(store.put(key, value.clone(), Expect::Absent, None)).await.expect("put");
        let (entry, _) = within(store.get(key)).await.expect("get");
        assert_eq!(entry.map(|e| e.value), Some(value));
    }
}

async fn join<T: 'static>(mut tasks: JoinSet<T>) -> Vec<T> {
    let mut results = Vec::new();
    while let Some(result) = tasks.join_next().await {
        match result {
            Ok(value) => results.push(value),
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => panic!("a task of the test ended early: {error}"),
            },
        }
    }
    results
}
