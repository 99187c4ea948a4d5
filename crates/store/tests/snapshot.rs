//! Snapshots of the embedded engine: what is written comes back, as it was at one instant, and everything goes on above it.

#![allow(clippy::unwrap_used)]

use std::{os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use seawall_store::{
    Entry, Error, Expect, Fence, ListOptions, Listing, Result, Revision, Store, Watch,
    embedded::{Embedded, Options},
    snapshot::{About, Fault, SnapshotError, load, peek, save},
};

fn about() -> About {
    About { cluster: Some("u-i-d".into()), time: 1_700_000_000, writer: "v1.2.3".into() }
}

fn open(dir: &Path) -> Embedded {
    Embedded::open(dir, Options::default()).unwrap()
}

async fn put(store: &dyn Store, key: &str, value: impl Into<Bytes>) -> Revision {
    store.put(key, value.into(), Expect::Any, None).await.unwrap()
}

async fn all(store: &dyn Store) -> Vec<Entry> {
    store.list("/registry/", ListOptions::default()).await.unwrap().entries
}

/// More than a page, with a history.
async fn fill(store: &dyn Store) {
    for index in 0..2000 {
        put(store, &format!("/registry/pods/default/p{}", index % 1200), format!("{index}")).await;
    }
    for index in 0..100 {
        store.delete(&format!("/registry/pods/default/p{index}"), Expect::Any, None).await.unwrap();
    }
    put(store, "/registry/secrets/default/large", vec![b'x'; 1 << 20]).await;
    put(store, "/registry/empty", "").await;
    put(store, "/elsewhere", "not the registry's").await;
}

#[tokio::test]
async fn it_comes_back_as_it_was_and_goes_on_above() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let store = open(&at("old"));
    fill(&store).await;
    let (before, revision) = (all(&store).await, store.revision().await.unwrap());
    let info = save(&store, &at("file"), &about()).await.unwrap();
    assert_eq!((info.header.revision, info.sum.keys), (revision, before.len() as u64));
    assert_eq!((info.header.cluster.as_deref(), &*info.header.writer), (Some("u-i-d"), "v1.2.3"));
    assert_eq!(peek(&at("file")).unwrap(), info);
    let meta = std::fs::metadata(at("file")).unwrap();
    assert_eq!((meta.permissions().mode() & 0o777, meta.len()), (0o600, info.size));
    assert!(!at("file.partial").exists());
    // The same content at the same revision is the same file.
    assert_eq!(save(&store, &at("again"), &about()).await.unwrap().sum, info.sum);
    let error = save(&store, &at("file"), &about()).await.unwrap_err();
    assert!(matches!(error, SnapshotError::Io { .. }), "what is there is not written over: {error}");

    let floor = Revision(revision.0 + 1_000_000_000);
    let (loaded, found) = load(&at("file"), &at("new"), floor).unwrap();
    assert_eq!(found, info);
    // Twice: as it was made, and as it is found at the next start.
    drop(loaded);
    let loaded = open(&at("new"));
    assert_eq!(all(&loaded).await, before, "with the revisions of every key");
    assert_eq!(loaded.revision().await.unwrap(), floor);
    for requested in [Revision(1), revision, Revision(revision.0 + 5), Revision(floor.0 - 1)] {
        let error = match loaded.watch("/registry/", requested).await {
            Err(error) => error,
            Ok(mut watch) => watch.next().await.unwrap().expect_err("a watch from before"),
        };
        assert!(matches!(error, Error::Compacted { oldest, .. } if oldest == floor), "{error}");
        let options = ListOptions { at: Some(requested), ..Default::default() };
        let error = loaded.list("/registry/", options).await.unwrap_err();
        assert!(matches!(error, Error::Compacted { .. }), "{error}");
    }
    // Who knows a key as it was may change it, and nobody else.
    let entry = loaded.get("/registry/empty").await.unwrap().0.unwrap();
    let wrong = Expect::At(Revision(entry.revision.0 + 1));
    assert!(loaded.put(&entry.key, Bytes::new(), wrong, None).await.is_err());
    let next = loaded.put(&entry.key, Bytes::new(), Expect::At(entry.revision), None).await.unwrap();
    assert_eq!(next, Revision(floor.0 + 1));
    assert_eq!(loaded.get(&entry.key).await.unwrap().0.unwrap().created, entry.created);
    // A snapshot of it is one like any other.
    save(&loaded, &at("third"), &about()).await.unwrap();
    assert_eq!(peek(&at("third")).unwrap().header.revision, next);
    // Never below the snapshot's own.
    let (low, _) = load(&at("file"), &at("low"), Revision(1)).unwrap();
    assert_eq!(low.revision().await.unwrap(), revision);
}

#[tokio::test]
async fn what_is_not_whole_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let store = open(&at("old"));
    fill(&store).await;
    save(&store, &at("file"), &about()).await.unwrap();
    let whole = std::fs::read(at("file")).unwrap();
    let check = |bytes: &[u8], expect: &str| {
        std::fs::write(at("broken"), bytes).unwrap();
        let Err(error) = load(&at("broken"), &at("new"), Revision(1)) else { panic!("{expect}") };
        let text = error.to_string();
        assert!(text.contains(expect) && text.contains(&at("broken").display().to_string()), "{text}");
        assert!(!at("new").exists(), "{expect}");
    };
    check(&whole[..whole.len() - 1], "before its trailer");
    check(&whole[..whole.len() / 2], "before its trailer");
    check(&whole[..100], "before its trailer");
    check(b"", "not a snapshot");
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    check(&changed, "it is damaged");
    // `peek` reads the ends alone.
    std::fs::write(at("broken"), &whole[..whole.len() - 1]).unwrap();
    assert!(matches!(peek(&at("broken")).unwrap_err(), SnapshotError::File { fault: Fault::Short { .. }, .. }));
    std::fs::write(at("broken"), "text").unwrap();
    assert!(matches!(peek(&at("broken")).unwrap_err(), SnapshotError::File { fault: Fault::Foreign, .. }));
    // A directory that is there is nobody's to take away.
    std::fs::create_dir(at("there")).unwrap();
    assert!(load(&at("file"), &at("there"), Revision(1)).is_err());
    assert!(at("there").exists());
    // Nor is a file written where there is no directory.
    assert!(save(&store, &at("nowhere/file"), &about()).await.is_err());
}

/// A store to which something is written while it is listed, and whose history may end meanwhile.
struct Busy {
    inner: Embedded,
    compactions: std::sync::atomic::AtomicUsize,
}

#[async_trait]
impl Store for Busy {
    async fn get(&self, key: &str) -> Result<(Option<Entry>, Revision)> {
        self.inner.get(key).await
    }

    async fn list(&self, prefix: &str, options: ListOptions) -> Result<Listing> {
        let page = options.at.is_some();
        if page {
            put(&self.inner, "/registry/pods/default/p1199", "later").await;
            put(&self.inner, "/registry/zzz", "later").await;
            self.inner.delete("/registry/pods/default/p1198", Expect::Any, None).await.unwrap();
            let left = &self.compactions;
            if left
                .fetch_update(std::sync::atomic::Ordering::SeqCst, std::sync::atomic::Ordering::SeqCst, |n| {
                    n.checked_sub(1)
                })
                .is_ok()
            {
                self.inner.compact(self.inner.revision().await?).await?;
            }
        }
        self.inner.list(prefix, options).await
    }

    async fn put(&self, key: &str, value: Bytes, expect: Expect, fence: Option<&Fence>) -> Result<Revision> {
        self.inner.put(key, value, expect, fence).await
    }

    async fn delete(&self, key: &str, expect: Expect, fence: Option<&Fence>) -> Result<Revision> {
        self.inner.delete(key, expect, fence).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch> {
        self.inner.watch(prefix, after).await
    }

    async fn revision(&self) -> Result<Revision> {
        self.inner.revision().await
    }

    async fn compact(&self, at: Revision) -> Result<()> {
        self.inner.compact(at).await
    }
}

#[tokio::test]
async fn it_is_of_one_instant_while_others_write() {
    for (compactions, works) in [(0, true), (2, true), (3, false)] {
        let dir = tempfile::tempdir().unwrap();
        let inner = open(&dir.path().join("old"));
        fill(&inner).await;
        let store = Arc::new(Busy { inner, compactions: compactions.into() });
        let before = all(&*store).await;
        let saved = save(&*store, &dir.path().join("file"), &about()).await;
        assert_eq!(saved.is_ok(), works, "{compactions}: {saved:?}");
        assert!(!dir.path().join("file.partial").exists());
        if let (Ok(info), 0) = (&saved, compactions) {
            let (loaded, _) = load(&dir.path().join("file"), &dir.path().join("new"), info.header.revision).unwrap();
            assert_eq!(all(&loaded).await, before);
        }
    }
}
