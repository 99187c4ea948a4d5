//! Clients of the workload: a new connection for each request, as fast as the other clients.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::{PACE, Recorder};
use crate::history::Class;

/// How long a user waits.
const PATIENCE: Duration = Duration::from_secs(3);

/// Asks until `stop`.
pub async fn run(name: Arc<str>, recorder: Recorder, address: SocketAddr, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let start = recorder.now();
        let answer = tokio::time::timeout(PATIENCE, ask(address)).await;
        let error = match answer {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(_) => Some(format!("no answer in {} s", PATIENCE.as_secs())),
        };
        recorder.request(&name, Class::Workload, start, error);
        tokio::time::sleep(PACE).await;
    }
}

/// One request, over a connection of its own.
pub async fn ask(address: SocketAddr) -> anyhow::Result<()> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = Request::get("/").header("host", address.to_string()).body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    response.into_body().collect().await?;
    drop(sender);
    driver.abort();
    anyhow::ensure!(status.is_success(), "{status}");
    Ok(())
}
