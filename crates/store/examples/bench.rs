//! Operations per second and their latency by number of clients:
//! `cargo run --release -p seawall-store --example bench [DIR | http://ENDPOINT]` (a new embedded store, or an etcd that may be
//! filled).

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use seawall_store::{
    Expect, ListOptions, Store,
    embedded::Embedded,
    etcd::{Endpoint, Etcd, Options},
};
use tokio::time::Instant;

const SIZE: usize = 2048;
const TIME: Duration = Duration::from_secs(2);

type Failure = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let target = std::env::args().nth(1);
    if let Some(url) = target.clone().filter(|target| target.starts_with("http")) {
        let endpoints = vec![Endpoint { url, local: true }];
        let store = Arc::new(Etcd::connect(Options { endpoints, ..Default::default() }).await?);
        for writers in [1, 16, 64, 256] {
            creates(&store, writers).await?;
        }
        return reads(&*store).await;
    }
    let root = match target {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    for writers in [1, 16, 64, 256] {
        let dir = root.path().join(writers.to_string());
        let store = Arc::new(Embedded::open(&dir, Default::default())?);
        creates(&store, writers).await?;
        reads(&*store).await?;
        drop(store);
        let start = Instant::now();
        let store = Embedded::open(&dir, Default::default())?;
        println!("     opened again at {} in {:?}", store.revision().await?, start.elapsed());
    }
    Ok(())
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let percentile = |p: usize| times[(times.len() - 1) * p / 100];
    println!("     {what}: p50 {:?}, p99 {:?}", percentile(50), percentile(99));
}

async fn creates<S: Store>(store: &Arc<S>, writers: usize) -> Result<(), Failure> {
    let start = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..writers {
        let store = store.clone();
        tasks.spawn(async move {
            let mut times = Vec::new();
            while start.elapsed() < TIME {
                let key = format!("/registry/pods/default/{writers}-{writer}-{}", times.len());
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
    let rate = times.len() as f64 / start.elapsed().as_secs_f64();
    report(&format!("{writers:4} writers: {rate:7.0} creates/s of {SIZE} bytes"), times);
    Ok(())
}

async fn reads(store: &dyn Store) -> Result<(), Failure> {
    const TIMES: usize = 500;
    let (mut get, mut revision, mut event, mut list) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut watch = store.watch("/registry/", store.revision().await?).await?;
    for _ in 0..TIMES {
        let begin = Instant::now();
        let (entry, _) = store.get("/registry/pods/default/1-0-0").await?;
        get.push(begin.elapsed());
        let begin = Instant::now();
        store.revision().await?;
        revision.push(begin.elapsed());
        let expect = entry.map_or(Expect::Absent, |entry| Expect::At(entry.revision));
        let written = store.put("/registry/pods/default/1-0-0", Bytes::from(vec![b'x'; SIZE]), expect, None).await?;
        let begin = Instant::now();
        while watch.next().await.transpose()?.is_some_and(|step| step.revision < written) {}
        event.push(begin.elapsed());
    }
    let mut count = 0;
    for _ in 0..20 {
        let begin = Instant::now();
        count = store.list("/registry/", ListOptions::default()).await?.entries.len();
        list.push(begin.elapsed());
    }
    report("get", get);
    report("revision", revision);
    report("from a put's answer to its event", event);
    report(&format!("list of {count}"), list);
    let mut list = Vec::new();
    for _ in 0..100 {
        let begin = Instant::now();
        store.list("/registry/", ListOptions { limit: 100, ..Default::default() }).await?;
        list.push(begin.elapsed());
    }
    report("list of the first 100", list);
    Ok(())
}
