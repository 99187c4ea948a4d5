//! Snapshots of etcd, and into etcd.

use bytes::Bytes;
use futures::StreamExt as _;
use seawall_store::{
    Error, Expect, ListOptions, Revision, Store,
    embedded::Embedded,
    migrate::{MigrateError, migrate},
    snapshot::{About, load, peek, save},
};

use crate::cluster::EtcdCluster;

fn about() -> About {
    About { cluster: None, time: 1_700_000_000, writer: "v1".into() }
}

async fn put(store: &dyn Store, key: &str, value: impl Into<Bytes>) -> Revision {
    store.put(key, value.into(), Expect::Any, None).await.unwrap()
}

async fn pairs(store: &dyn Store) -> Vec<(String, Bytes)> {
    let entries = store.list("/registry/", ListOptions::default()).await.unwrap().entries;
    entries.into_iter().map(|e| (e.key.to_string(), e.value)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_one_etcd_to_another_without_a_revision_that_goes_back() {
    let (old, new) = (EtcdCluster::start(1, false).await, EtcdCluster::start(1, false).await);
    let from = old.connect(Some(0)).await;
    for index in 0..1500 {
        put(&from, &format!("/registry/pods/default/p{}", index % 1100), format!("{index}")).await;
    }
    put(&from, "/registry/large", vec![b'x'; 1 << 20]).await;
    put(&from, "/others/x", "x").await;
    // So that the first list of the store is not all there is to read.
    let (before, file) = (pairs(&from).await, old.dir().join("file"));
    let info = save(&from, &file, &about()).await.unwrap();
    assert_eq!((info.header.revision, info.sum.keys), (from.revision().await.unwrap(), 1101));
    assert_eq!(peek(&file).unwrap(), info);
    // What was written after it is not in it.
    let lost = put(&from, "/registry/later", "1").await;

    // Into an embedded store it comes with all revisions, into etcd with later ones.
    let floor = Revision(info.header.revision.0 + 1_000_000);
    let (embedded, _) = load(&file, &old.dir().join("loaded"), floor).unwrap();
    assert_eq!(pairs(&embedded).await, before);
    let to = new.connect(Some(0)).await;
    let report = migrate(&embedded, &to).await.unwrap();
    assert_eq!((report.source, report.keys), (floor, 1101));
    for etcd in [to, new.connect(Some(0)).await] {
        assert_eq!(pairs(&etcd).await, before);
        let newest = etcd.revision().await.unwrap();
        assert!(newest > floor && newest > lost);
        for requested in [Revision(1), info.header.revision, lost, floor] {
            let error = match etcd.watch("/registry/", requested).await {
                Err(error) => error,
                Ok(mut watch) => watch.next().await.unwrap().expect_err("a watch from before"),
            };
            assert!(matches!(error, Error::Compacted { oldest, .. } if oldest > floor), "{error}");
        }
        // A snapshot of it counts on.
        let again = new.dir().join(format!("again-{newest}"));
        assert!(save(&etcd, &again, &about()).await.unwrap().header.revision >= newest);
        let written = put(&etcd, "/registry/later", "2").await;
        assert!(written > newest);
        etcd.delete("/registry/later", Expect::At(written), None).await.unwrap();
    }

    // Back again, into an embedded store.
    let back = old.dir().join("back");
    let etcd = new.connect(Some(0)).await;
    let info = save(&etcd, &back, &about()).await.unwrap();
    let (embedded, _) = load(&back, &old.dir().join("loaded-back"), Revision(info.header.revision.0 + 10)).unwrap();
    assert_eq!(pairs(&embedded).await, before);
    drop(embedded);
    assert!(Embedded::open(&old.dir().join("loaded-back"), Default::default()).is_ok());

    // An etcd with something in it is left as it is.
    let (embedded, _) = load(&back, &old.dir().join("third"), Revision(1)).unwrap();
    let error = migrate(&embedded, &etcd).await.unwrap_err();
    assert!(matches!(error, MigrateError::NotEmpty { .. }), "{error}");
    assert_eq!(pairs(&etcd).await, before);
}
