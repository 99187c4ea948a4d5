//! The audit log as lists of events that are sent to somebody
//! (<https://kubernetes.io/docs/tasks/debug/debug-cluster/audit/#webhook-backend>).

use std::time::Duration;

use bytes::Bytes;
use tokio::{sync::oneshot, time::Instant};

use super::queue::{Item, Queue, Receiver};
use crate::outside::{Client, kubeconfig::Target};

/// How long one list may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often a list is sent that is not taken.
const ATTEMPTS: u32 = 5;

/// How events are sent.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many events a list has at most.
    pub batch_max_size: usize,
    /// How long an event waits for others at most.
    pub batch_max_wait: Duration,
    /// How long is waited before a list is sent again.
    pub initial_backoff: Duration,
}

/// Starts the task that sends what is in the queue. It ends with the queue.
///
/// # Errors
/// If the credentials cannot be used.
pub(super) fn open(target: &Target, options: Options) -> Result<Queue, String> {
    let (queue, receiver) = Queue::new("webhook");
    let sending = Sending { url: target.url.clone(), client: Client::new(&target.credentials)?, options };
    tokio::spawn(sending.run(receiver));
    Ok(queue)
}

struct Sending {
    url: String,
    client: Client,
    options: Options,
}

impl Sending {
    async fn run(self, mut receiver: Receiver) {
        while let Some(first) = receiver.recv().await {
            let (mut batch, mut waiting) = (Vec::new(), Vec::<oneshot::Sender<()>>::new());
            let until = Instant::now() + self.options.batch_max_wait;
            let mut next = Some(first);
            while let Some(item) = next {
                match item {
                    Item::Line(line) => batch.push(line),
                    // Whoever waits does not wait for others.
                    Item::Flush(done) => waiting.push(done),
                }
                next = match batch.len() < self.options.batch_max_size && waiting.is_empty() {
                    true => tokio::time::timeout_at(until, receiver.recv()).await.unwrap_or_default(),
                    false => None,
                };
            }
            if !batch.is_empty()
                && let Err(why) = self.send(&batch).await
            {
                tracing::error!(events = batch.len(), why, "audit events are lost: their webhook does not take them");
                receiver.lost(batch.len() as u64);
            }
            for done in waiting {
                let _ = done.send(());
            }
        }
    }

    async fn send(&self, batch: &[Bytes]) -> Result<(), String> {
        let mut body = br#"{"kind":"EventList","apiVersion":"audit.k8s.io/v1","metadata":{},"items":["#.to_vec();
        for (index, line) in batch.iter().enumerate() {
            if index > 0 {
                body.push(b',');
            }
            body.extend_from_slice(line);
        }
        body.extend_from_slice(b"]}");
        let (body, mut pause) = (Bytes::from(body), self.options.initial_backoff);
        let mut why = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(pause).await;
                pause = pause * 3 / 2;
            }
            match self.client.post(&self.url, body.clone(), TIMEOUT).await {
                Ok(_) => return Ok(()),
                Err(failed) => why = failed,
            }
        }
        Err(why)
    }
}
