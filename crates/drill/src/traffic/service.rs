//! Clients of a Service: new connections at a fixed rate, connections that stay, and datagrams.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail, ensure};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpStream, UdpSocket},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::Recorder;
use crate::{history::Class, serve::LAST};

/// How often a new connection is made.
const RATE: Duration = Duration::from_millis(25);
/// How long a user waits for a new connection and its first words.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long one with an open connection waits for an answer: as long as it takes to see that nothing mends it.
const PERSISTENT: Duration = Duration::from_secs(30);
/// How often a line or a datagram is sent.
const PACE: Duration = Duration::from_millis(50);
/// How long a datagram may be on its way and back.
const ROUND: Duration = Duration::from_millis(400);
/// New connections that wait at once.
const WAITING: usize = 400;
/// Open connections of one client, so that some lead to every endpoint.
const OPEN: usize = 6;

/// Makes new connections, whatever became of those before, until `stop`.
pub async fn connections(name: Arc<str>, recorder: Recorder, address: SocketAddr, stop: CancellationToken) {
    let mut tick = tokio::time::interval(RATE);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let slots = Arc::new(Semaphore::new(WAITING));
    let mut attempts = JoinSet::new();
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        while attempts.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
        let (name, recorder) = (name.clone(), recorder.clone());
        attempts.spawn(async move {
            let start = recorder.now();
            let error = match timeout(PATIENCE, greeting(address)).await {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(format!("{error:#}")),
                Err(_) => Some(format!("no answer in {} s", PATIENCE.as_secs())),
            };
            recorder.request(&name, Class::Connect, start, error);
            drop(slot);
        });
    }
    while attempts.join_next().await.is_some() {}
}

/// Connects and hears who answers.
async fn greeting(address: SocketAddr) -> anyhow::Result<(BufReader<TcpStream>, String)> {
    let stream = TcpStream::connect(address).await.context("connect")?;
    let _ = stream.set_nodelay(true);
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    ensure!(stream.read_line(&mut line).await.context("first words")? > 0, "closed without a word");
    Ok((stream, line.trim().to_owned()))
}

/// Keeps connections open and sends a line on each now and then, until `stop`.
pub async fn open(name: Arc<str>, recorder: Recorder, address: SocketAddr, stop: CancellationToken) {
    let mut clients = JoinSet::new();
    for _ in 0..OPEN {
        clients.spawn(one_open(name.clone(), recorder.clone(), address, stop.clone()));
    }
    while clients.join_next().await.is_some() {}
}

async fn one_open(name: Arc<str>, recorder: Recorder, address: SocketAddr, stop: CancellationToken) {
    while !stop.is_cancelled() {
        // That it cannot connect is for the other client to say.
        let Ok(Ok((mut stream, server))) = timeout(PATIENCE, greeting(address)).await else {
            tokio::time::sleep(PACE).await;
            continue;
        };
        let mut number = 0u64;
        while !stop.is_cancelled() {
            number += 1;
            let start = recorder.now();
            let (error, goes_on) = match timeout(PERSISTENT, say(&mut stream, number)).await {
                Ok(Ok(goes_on)) => (None, goes_on),
                Ok(Err(error)) => (Some(format!("{error:#}")), false),
                Err(_) => (Some(format!("no answer in {} s", PERSISTENT.as_secs())), false),
            };
            recorder.request(&name, Class::Open, start, error.map(|e| format!("{server}: {e}")));
            if !goes_on {
                break;
            }
            tokio::time::sleep(PACE).await;
        }
    }
}

/// A line, there and back. Whether there may be another one: a server that ends answers and takes leave, which is no failure.
async fn say(stream: &mut BufReader<TcpStream>, number: u64) -> anyhow::Result<bool> {
    stream.write_all(format!("{number}\n").as_bytes()).await.context("send")?;
    let mut line = String::new();
    ensure!(stream.read_line(&mut line).await.context("receive")? > 0, "closed");
    let (answer, last) = match line.trim_end().strip_suffix(LAST) {
        Some(answer) => (answer, true),
        None => (line.trim_end(), false),
    };
    ensure!(answer == number.to_string(), "{answer} came back for {number}");
    Ok(!last)
}

/// Sends datagrams from one socket, until `stop`.
pub async fn datagrams(name: Arc<str>, recorder: Recorder, address: SocketAddr, stop: CancellationToken) {
    let socket = match socket(address).await {
        Ok(socket) => socket,
        Err(error) => {
            let now = recorder.now();
            return recorder.request(&name, Class::Datagram, now, Some(format!("{error:#}")));
        }
    };
    let mut number = 0u64;
    while !stop.is_cancelled() {
        number += 1;
        let start = recorder.now();
        let error = ask(&socket, number).await.err().map(|e| format!("{e:#}"));
        recorder.request(&name, Class::Datagram, start, error);
        tokio::time::sleep(PACE).await;
    }
}

async fn socket(address: SocketAddr) -> anyhow::Result<UdpSocket> {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).await?;
    socket.connect(address).await?;
    Ok(socket)
}

async fn ask(socket: &UdpSocket, number: u64) -> anyhow::Result<()> {
    socket.send(number.to_string().as_bytes()).await.context("send")?;
    let deadline = Instant::now() + ROUND;
    let mut buffer = [0; 512];
    loop {
        match tokio::time::timeout_at(deadline, socket.recv(&mut buffer)).await {
            Err(_) => bail!("lost"),
            Ok(Err(error)) => bail!("receive: {error}"),
            // Late answers to earlier ones are no answer to this one.
            Ok(Ok(length)) => {
                let text = String::from_utf8_lossy(&buffer[..length]);
                if text.split(' ').next() == Some(number.to_string().as_str()) {
                    return Ok(());
                }
            }
        }
    }
}
