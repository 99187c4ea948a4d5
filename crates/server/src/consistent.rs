//! One read of the store's revision for all who wait for one.
//!
//! A GET or LIST without a resourceVersion has to see whatever was acknowledged before it was asked. With the store on
//! the network that is a round trip through a majority; under load many requests want one at the same time. A read that
//! *begins* after they came serves them all.

use std::sync::Arc;

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use seawall_store::{Error, Revision, Store};

type Read = Shared<BoxFuture<'static, Result<Revision, String>>>;

/// The shared reads of a store.
pub struct Reads {
    store: Arc<dyn Store>,
    /// The read that has not begun yet: who comes now may join it.
    next: Arc<Mutex<Option<Read>>>,
    /// One read is under way at a time.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Reads {
    /// Of this store.
    pub fn new(store: Arc<dyn Store>) -> Reads {
        Reads { store, next: Arc::default(), turn: Arc::default() }
    }

    /// A revision that is not older than anything acknowledged before the call.
    pub async fn revision(&self) -> Result<Revision, Error> {
        let read = self.next.lock().get_or_insert_with(|| self.read()).clone();
        read.await.map_err(|reason| Error::Unavailable { reason, source: None })
    }

    fn read(&self) -> Read {
        let (store, next, turn) = (self.store.clone(), self.next.clone(), self.turn.clone());
        let read = async move {
            let _turn = turn.lock().await;
            // Who comes from here on needs a later one.
            *next.lock() = None;
            store.revision().await.map_err(|error| match error {
                Error::Unavailable { reason, .. } => reason,
                error => error.to_string(),
            })
        };
        read.boxed().shared()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::Duration,
    };

    use async_trait::async_trait;
    use bytes::Bytes;
    use seawall_store::{Entry, Expect, Fence, ListOptions, Listing, Watch};

    use super::*;

    /// A store whose revision is when it was asked for, and which is slow.
    #[derive(Default)]
    struct Slow {
        newest: AtomicU64,
        reads: AtomicU64,
    }

    #[async_trait]
    impl Store for Slow {
        async fn get(&self, _: &str) -> seawall_store::Result<(Option<Entry>, Revision)> {
            unreachable!("not asked for")
        }

        async fn list(&self, _: &str, _: ListOptions) -> seawall_store::Result<Listing> {
            unreachable!("not asked for")
        }

        async fn put(&self, _: &str, _: Bytes, _: Expect, _: Option<&Fence>) -> seawall_store::Result<Revision> {
            unreachable!("not asked for")
        }

        async fn delete(&self, _: &str, _: Expect, _: Option<&Fence>) -> seawall_store::Result<Revision> {
            unreachable!("not asked for")
        }

        async fn watch(&self, _: &str, _: Revision) -> seawall_store::Result<Watch> {
            unreachable!("not asked for")
        }

        async fn revision(&self) -> seawall_store::Result<Revision> {
            self.reads.fetch_add(1, Ordering::SeqCst);
            let read = self.newest.load(Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(10)).await;
            Ok(Revision(read))
        }

        async fn compact(&self, _: Revision) -> seawall_store::Result<()> {
            unreachable!("not asked for")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_read_serves_many_and_is_never_older_than_the_call() {
        let slow = Arc::new(Slow::default());
        let reads = Arc::new(Reads::new(slow.clone()));
        let mut tasks = tokio::task::JoinSet::new();
        for i in 0..200u64 {
            let (slow, reads) = (slow.clone(), reads.clone());
            tasks.spawn(async move {
                tokio::time::sleep(Duration::from_millis(i / 4)).await;
                let acknowledged = slow.newest.fetch_add(1, Ordering::SeqCst) + 1;
                let read = reads.revision().await.unwrap();
                assert!(read.0 >= acknowledged, "{read} is older than {acknowledged}");
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        assert!(slow.reads.load(Ordering::SeqCst) < 10, "{:?}", slow.reads);
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_does_not_take_the_others_along() {
        let reads = Arc::new(Reads::new(Arc::new(Slow::default())));
        let first = tokio::spawn({
            let reads = reads.clone();
            async move { reads.revision().await }
        });
        tokio::time::sleep(Duration::from_millis(5)).await;
        let second = tokio::spawn({
            let reads = reads.clone();
            async move { reads.revision().await }
        });
        first.abort();
        second.await.unwrap().unwrap();
        reads.revision().await.unwrap();
    }
}
