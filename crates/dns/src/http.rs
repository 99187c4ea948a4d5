//! `/healthz`, `/readyz` and `/metrics`: as little HTTP as those who ask need.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// So many are answered at a time.
const MOST: usize = 32;
/// The longest request that is read.
const MOST_REQUEST: usize = 8192;
/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Answers until `stop`.
///
/// # Errors
/// If it cannot listen.
pub async fn serve(
    on: SocketAddr,
    ready: watch::Receiver<bool>,
    metrics: Metrics,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(on).await.with_context(|| format!("cannot listen on {on} (--http)"))?;
    let permits = Arc::new(Semaphore::new(MOST));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        let (Ok((stream, _)), Ok(permit)) = (accepted, permits.clone().try_acquire_owned()) else {
            // Too many, or no file for it: it is asked again.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let (ready, metrics) = (*ready.borrow(), metrics.clone());
        tokio::spawn(async move {
            // Who goes away in the middle has no use for an answer.
            let _ = timeout(LIMIT, answer(stream, ready, &metrics)).await;
            drop(permit);
        });
    }
}

async fn answer(mut stream: TcpStream, ready: bool, metrics: &Metrics) -> std::io::Result<()> {
    let mut request = Vec::with_capacity(512);
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < MOST_REQUEST {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = say(&request, ready, metrics);
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

fn say(request: &[u8], ready: bool, metrics: &Metrics) -> (&'static str, String) {
    let line = request.split(|b| *b == b'\r').next().unwrap_or_default();
    let mut words = line.split(|b| *b == b' ');
    match (words.next(), words.next()) {
        (Some(b"GET"), Some(b"/healthz" | b"/livez")) => ("200 OK", "ok\n".to_owned()),
        (Some(b"GET"), Some(b"/readyz")) if ready => ("200 OK", "ok\n".to_owned()),
        (Some(b"GET"), Some(b"/readyz")) => ("503 Service Unavailable", "the Services are not known yet\n".to_owned()),
        (Some(b"GET"), Some(b"/metrics")) => ("200 OK", metrics.render()),
        _ => ("404 Not Found", "/healthz, /readyz, /metrics\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said() {
        let check = |request: &str, ready: bool, status: &str, part: &str| {
            let (said, body) = say(request.as_bytes(), ready, &Metrics::default());
            assert!(said.starts_with(status) && body.contains(part), "{request}: {said} {body}");
        };
        check("GET /healthz HTTP/1.1\r\n\r\n", false, "200", "ok");
        check("GET /readyz HTTP/1.1\r\n\r\n", false, "503", "not known yet");
        check("GET /readyz HTTP/1.1\r\n\r\n", true, "200", "ok");
        check("GET /metrics HTTP/1.1\r\n\r\n", true, "200", "seawall_dns_services 0");
        check("POST /readyz HTTP/1.1\r\n\r\n", true, "404", "");
        check("", true, "404", "");
    }
}
