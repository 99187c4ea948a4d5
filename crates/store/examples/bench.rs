//! Writes per second and their latency by number of writers: `cargo run --release -p seawall-store --example bench [DIR]`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use seawall_store::{
    Expect, Store,
    embedded::{Embedded, Options},
};
use tokio::time::Instant;

const SIZE: usize = 2048;
const TIME: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = match std::env::args_os().nth(1) {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    for writers in [1usize, 16, 64, 256] {
        let dir = root.path().join(writers.to_string());
        let store = Arc::new(Embedded::open(&dir, Options::default())?);
        let start = Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..writers {
            let store = store.clone();
            tasks.spawn(async move {
                let mut times = Vec::new();
                while start.elapsed() < TIME {
                    let key = format!("/registry/pods/default/{writer}-{}", times.len());
                    let begin = Instant::now();
                    store.put(&key, Bytes::from(vec![b'x'; SIZE]), Expect::Absent, None).await?;
                    times.push(begin.elapsed());
                }
                Ok::<_, seawall_store::Error>(times)
            });
        }
        let mut times = Vec::new();
        while let Some(result) = tasks.join_next().await {
            times.extend(result??);
        }
        times.sort();
        let percentile = |p: usize| times[(times.len() - 1) * p / 100];
        println!(
            "{writers:4} writers: {:7.0} creates/s of {SIZE} bytes, p50 {:?}, p99 {:?}",
            times.len() as f64 / start.elapsed().as_secs_f64(),
            percentile(50),
            percentile(99)
        );
        drop(store);
        let start = Instant::now();
        let store = Embedded::open(&dir, Options::default())?;
        println!("     opened again at {} in {:?}", store.revision().await?, start.elapsed());
    }
    Ok(())
}
