//! Lines that wait to be written or sent: so many, and so many bytes, and no more.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

/// How many events may wait: upstream's default for its batches.
const EVENTS: usize = 10_000;
/// How many bytes may wait.
const BYTES: usize = 64 << 20;

/// What is in a queue.
pub(super) enum Item {
    /// An event.
    Line(Bytes),
    /// Somebody waits until everything before this has been dealt with.
    Flush(oneshot::Sender<()>),
}

/// The end of a queue that takes events in.
pub(super) struct Queue {
    /// What it leads to.
    pub plugin: &'static str,
    sender: mpsc::Sender<Item>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    bytes: AtomicUsize,
    lost: AtomicU64,
}

/// The end of a queue that gives events out.
pub(super) struct Receiver {
    receiver: mpsc::Receiver<Item>,
    state: Arc<State>,
}

impl Queue {
    pub fn new(plugin: &'static str) -> (Queue, Receiver) {
        let (sender, receiver) = mpsc::channel(EVENTS);
        let state = Arc::<State>::default();
        (Queue { plugin, sender, state: state.clone() }, Receiver { receiver, state })
    }

    /// Takes an event in, or counts it as lost if there is no room.
    pub fn put(&self, line: Bytes) {
        let length = line.len();
        let room = self.state.bytes.fetch_add(length, Ordering::Relaxed) + length <= BYTES;
        if !room || self.sender.try_send(Item::Line(line)).is_err() {
            self.state.bytes.fetch_sub(length, Ordering::Relaxed);
            // Once, when it begins; the metric says how many.
            if self.state.lost.fetch_add(1, Ordering::Relaxed) == 0 {
                tracing::error!(plugin = self.plugin, "audit events are lost: the queue is full");
            }
        }
    }

    /// How many events were lost.
    pub fn lost(&self) -> u64 {
        self.state.lost.load(Ordering::Relaxed)
    }

    /// Waits until everything that is in the queue has been dealt with.
    pub async fn flush(&self) {
        let (done, waits) = oneshot::channel();
        if self.sender.send(Item::Flush(done)).await.is_ok() {
            let _ = waits.await;
        }
    }
}

impl Receiver {
    fn taken(&self, item: Item) -> Item {
        if let Item::Line(line) = &item {
            self.state.bytes.fetch_sub(line.len(), Ordering::Relaxed);
        }
        item
    }

    /// The next one, or nothing when the queue has ended.
    pub fn blocking_recv(&mut self) -> Option<Item> {
        let item = self.receiver.blocking_recv()?;
        Some(self.taken(item))
    }

    /// The next one.
    pub async fn recv(&mut self) -> Option<Item> {
        let item = self.receiver.recv().await?;
        Some(self.taken(item))
    }

    /// The next one, if it is there.
    pub fn try_recv(&mut self) -> Option<Item> {
        let item = self.receiver.try_recv().ok()?;
        Some(self.taken(item))
    }

    /// Events that came out of the queue and went nowhere.
    pub fn lost(&self, count: u64) {
        self.state.lost.fetch_add(count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_does_not_fit_is_counted() {
        let (queue, mut receiver) = Queue::new("log");
        for _ in 0..EVENTS + 3 {
            queue.put(Bytes::from_static(b"x"));
        }
        assert_eq!(queue.lost(), 3);
        for _ in 0..EVENTS {
            assert!(matches!(receiver.try_recv(), Some(Item::Line(_))));
        }
        assert!(receiver.try_recv().is_none());
        let large = Bytes::from(vec![b'x'; BYTES / 2]);
        for _ in 0..3 {
            queue.put(large.clone());
        }
        assert_eq!(queue.lost(), 4, "two of three large ones fit");
        receiver.recv().await;
        queue.put(large);
        assert_eq!(queue.lost(), 4, "there is room again");
        drop(receiver);
        queue.flush().await;
    }
}
