//! A client that keeps asking, and counts what it gets.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::Instant,
};

/// The most that one client asks: even a test that hangs ends its traffic.
const MOST: usize = 20_000;
/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What a client saw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// How often each page came.
    pub pages: BTreeMap<String, usize>,
    /// What went wrong, each time.
    pub failures: Vec<String>,
    /// The longest that one request took.
    pub slowest: Duration,
}

impl Seen {
    fn note(&mut self, answer: anyhow::Result<String>, took: Duration) {
        self.slowest = self.slowest.max(took);
        match answer {
            Ok(page) => *self.pages.entry(page).or_default() += 1,
            Err(error) => self.failures.push(error.to_string()),
        }
    }

    /// How many requests were answered.
    pub fn answered(&self) -> usize {
        self.pages.values().sum()
    }
}

/// A client that opens a connection, asks, reads the answer, and starts again.
pub struct Traffic {
    task: JoinHandle<()>,
    seen: Arc<Mutex<Seen>>,
}

impl Traffic {
    /// Starts asking `http://address/`, every ten milliseconds.
    pub fn start(address: &str) -> Traffic {
        let address: SocketAddr = address.parse().unwrap_or_else(|e| panic!("{address:?}: {e}"));
        let seen = Arc::new(Mutex::new(Seen::default()));
        let record = seen.clone();
        let task = tokio::spawn(async move {
            for _ in 0..MOST {
                let began = Instant::now();
                let answer = tokio::time::timeout(TIMEOUT, get(address)).await;
                let answer = answer.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer in {TIMEOUT:?}")));
                record.lock().unwrap().note(answer, began.elapsed());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        Traffic { task, seen }
    }

    /// What has been seen so far.
    pub fn so_far(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    /// Stops asking.
    pub fn stop(self) -> Seen {
        self.so_far()
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One page by HTTP/1.0, on a connection of its own.
///
/// # Errors
/// If it does not come, or not with status 200.
pub async fn get(address: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: web\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, page) = answer.split_once("\r\n\r\n").ok_or_else(|| anyhow::anyhow!("cut off: {answer:?}"))?;
    let status = head.lines().next().unwrap_or_default();
    anyhow::ensure!(status.contains(" 200 "), "{status}");
    Ok(page.trim().to_owned())
}
