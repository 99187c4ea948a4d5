//! From the embedded engine to etcd.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use seawall_store::{
    Error, Event, Expect, ListOptions, Revision, Store,
    embedded::Embedded,
    etcd::Options,
    migrate::{MigrateError, migrate},
};

use crate::cluster::EtcdCluster;

async fn put(store: &dyn Store, key: &str, value: impl Into<Bytes>) -> Revision {
    store.put(key, value.into(), Expect::Any, None).await.unwrap()
}

/// A store with a history: some keys written often, some deleted.
async fn source(cluster: &EtcdCluster) -> Embedded {
    let store = Embedded::open(&cluster.dir().join("embedded"), Default::default()).unwrap();
    for index in 0..3000 {
        put(&store, &format!("/registry/pods/default/p{}", index % 700), format!("{index}")).await;
    }
    for index in 0..100 {
        store.delete(&format!("/registry/pods/default/p{index}"), Expect::Any, None).await.unwrap();
    }
    put(&store, "/registry/secrets/default/large", vec![b'x'; 1 << 20]).await;
    put(&store, "/registry/empty", "").await;
    store
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revisions_go_on_where_they_were() {
    let cluster = EtcdCluster::start(1, false).await;
    let from = source(&cluster).await;
    let to = cluster.connect(Some(0)).await;
    let (before, old) =
        (from.list("/registry/", ListOptions::default()).await.unwrap(), from.revision().await.unwrap());
    let report = migrate(&from, &to).await.unwrap();
    assert_eq!((report.keys, report.source), (602, old));
    assert_eq!(report.bytes, before.entries.iter().map(|e| e.value.len() as u64).sum::<u64>());

    // The one that migrated, and one that comes later.
    for etcd in [to, cluster.connect(Some(0)).await] {
        let newest = etcd.revision().await.unwrap();
        assert!(newest >= report.newest && newest > old);
        let after = etcd.list("/registry/", ListOptions::default()).await.unwrap();
        let pairs = |entries: &[seawall_store::Entry]| {
            entries.iter().map(|e| (e.key.clone(), e.value.clone())).collect::<Vec<_>>()
        };
        assert_eq!(pairs(&after.entries), pairs(&before.entries));
        assert!(after.revision > old);
        let mut revisions: Vec<_> = after.entries.iter().map(|e| e.revision).collect();
        assert!(after.entries.iter().all(|e| e.revision > old && e.created > old));
        revisions.sort();
        revisions.dedup();
        assert_eq!(revisions.len(), 602, "each has a revision of its own");

        // What a client knew from before is over, in every use of it.
        for requested in [Revision(1), Revision(old.0 / 2), Revision(old.0 - 1), old] {
            let error = match etcd.watch("/registry/", requested).await {
                Err(error) => error,
                Ok(mut watch) => watch.next().await.unwrap().expect_err("a watch from before the migration"),
            };
            assert!(matches!(error, Error::Compacted { oldest, .. } if oldest > old && oldest <= newest), "{error}");
            let options = ListOptions { at: Some(requested), ..Default::default() };
            let error = etcd.list("/registry/", options).await.unwrap_err();
            assert!(matches!(error, Error::Compacted { oldest, .. } if oldest > old && oldest <= newest), "{error}");
            let error = etcd.put("/registry/empty", Bytes::new(), Expect::At(requested), None).await.unwrap_err();
            assert!(matches!(error, Error::Conflict { actual: Some(actual), .. } if actual > old), "{error}");
            let error = etcd.put("/registry/none", Bytes::new(), Expect::At(requested), None).await.unwrap_err();
            assert!(matches!(error, Error::Conflict { actual: None, .. }), "{error}");
            let fence = seawall_store::Fence { key: "/registry/empty".into(), created: requested };
            let error = etcd.put("/registry/x", Bytes::new(), Expect::Any, Some(&fence)).await.unwrap_err();
            assert!(matches!(error, Error::Fenced { .. }), "{error}");
            let fence = seawall_store::Fence { key: "/registry/no-lock".into(), created: requested };
            let error = etcd.put("/registry/x", Bytes::new(), Expect::Any, Some(&fence)).await.unwrap_err();
            assert!(matches!(error, Error::Fenced { .. }), "{error}");
            etcd.compact(requested).await.unwrap();
        }
        let later = Revision(newest.0 + 5);
        let error = etcd.list("/", ListOptions { at: Some(later), ..Default::default() }).await.unwrap_err();
        assert!(matches!(error, Error::Future { newest: n, .. } if n == newest), "{error}");

        // And everything goes on.
        let mut watch = etcd.watch("/registry/", newest).await.unwrap();
        let entry = etcd.get("/registry/empty").await.unwrap().0.unwrap();
        let written = etcd.put("/registry/empty", Bytes::new(), Expect::At(entry.revision), None).await.unwrap();
        assert!(written > newest);
        let event = loop {
            if let Some(event) = watch.next().await.unwrap().unwrap().events.pop() {
                break event;
            }
        };
        let Event::Put(seen) = event else { panic!("{event:?}") };
        assert_eq!((seen.revision, seen.created), (written, entry.created));
        let then = etcd.list("/registry/", ListOptions { at: Some(newest), ..Default::default() }).await.unwrap();
        assert_eq!((then.entries.len(), then.revision), (602, newest));
        let fence = seawall_store::Fence { key: "/registry/empty".into(), created: entry.created };
        etcd.put("/registry/fenced", Bytes::new(), Expect::Absent, Some(&fence)).await.unwrap();
        etcd.delete("/registry/fenced", Expect::Any, Some(&fence)).await.unwrap();
        etcd.compact(written).await.unwrap();
        let error = etcd.list("/", ListOptions { at: Some(newest), ..Default::default() }).await.unwrap_err();
        assert!(matches!(error, Error::Compacted { oldest, .. } if oldest == written), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_is_not_empty_is_refused() {
    let cluster = EtcdCluster::start(1, false).await;
    let from = Embedded::open(&cluster.dir().join("embedded"), Default::default()).unwrap();
    put(&from, "/registry/a", "1").await;
    let to = cluster.connect(None).await;
    // What others keep beside is no obstacle.
    put(&to, "/others/x", "x").await;
    put(&to, "/registry/b", "theirs").await;
    let error = migrate(&from, &to).await.unwrap_err();
    assert!(matches!(&error, MigrateError::NotEmpty { key, .. } if &**key == "/registry/b"), "{error}");
    assert!(error.to_string().contains("etcdctl del --prefix /registry/"), "{error}");
    assert_eq!(&to.get("/registry/b").await.unwrap().0.unwrap().value[..], b"theirs");
    to.delete("/registry/b", Expect::Any, None).await.unwrap();
    migrate(&from, &to).await.unwrap();
    let error = migrate(&from, &to).await.unwrap_err();
    assert!(matches!(&error, MigrateError::NotEmpty { .. }), "a second time: {error}");
    assert_eq!(&to.get("/others/x").await.unwrap().0.unwrap().value[..], b"x");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_migration_keeps_servers_away_and_is_repeated() {
    let cluster = EtcdCluster::start(1, false).await;
    let from = source(&cluster).await;
    // More than etcd takes.
    put(&from, "/registry/too-large", vec![b'x'; 3 << 20]).await;
    let to = Arc::new(cluster.connect(None).await);
    let error = migrate(&from, &to).await.unwrap_err();
    let MigrateError::Write { key, bytes, source } = &error else { panic!("{error}") };
    assert_eq!((&**key, *bytes), ("/registry/too-large", 3 << 20));
    assert!(source.to_string().contains("--max-request-bytes"), "{source}");

    // No server may use it as it is.
    let Err(error) = seawall_store::etcd::Etcd::connect(cluster.options(None)).await else {
        panic!("half a migration is used")
    };
    assert!(error.to_string().contains("seawall migrate"), "{error}");

    // One that sits where the last one stopped, and thinks it may go on.
    from.delete("/registry/too-large", Expect::Any, None).await.unwrap();
    from.delete("/registry/pods/default/p500", Expect::Any, None).await.unwrap();
    let again = cluster.connect_with(Options { migrating: true, ..cluster.options(None) }).await;
    let report = migrate(&from, &again).await.unwrap();
    assert_eq!(report.keys, 601, "nothing of the first try is left");
    let server = cluster.connect(None).await;
    assert!(server.revision().await.unwrap() > from.revision().await.unwrap());
    // The one that was connected before counts wrongly, and says so.
    let error = to.revision().await.unwrap_err();
    assert!(error.to_string().contains("restart"), "{error}");
}
