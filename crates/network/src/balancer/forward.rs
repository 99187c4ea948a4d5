//! Carrying connections.

use std::{
    cell::RefCell,
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Counters, Shared, choice::Answer};

/// Takes connections until `stop`; those that are open then are closed.
pub async fn accept(shared: Arc<Shared>, listener: Arc<TcpListener>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let client = match accepted {
            Ok((client, _)) => client,
            // Out of files, most likely: do not spin.
            Err(error) => {
                tracing::warn!("the balancer cannot accept: {error}");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        Counters::add(&shared.counters.accepted);
        if connections.len() >= shared.config.max_connections {
            Counters::add(&shared.counters.full);
            reset(client);
            continue;
        }
        connections.spawn(carry(Arc::clone(&shared), client));
    }
    connections.shutdown().await;
}

/// A client that is told with a reset connects anew at once; one that is told nothing waits.
fn reset(stream: TcpStream) {
    let _ = stream.set_zero_linger();
}

/// One more open connection; one less when dropped.
struct Open<'a> {
    shared: &'a Shared,
    server: SocketAddr,
}

impl<'a> Open<'a> {
    fn new(shared: &'a Shared, server: SocketAddr) -> Open<'a> {
        let mut carried = shared.carried.lock();
        let entry = carried.entry(server).or_default();
        entry.open += 1;
        entry.connections += 1;
        shared.counters.open.fetch_add(1, Ordering::Relaxed);
        Open { shared, server }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.shared.counters.open.fetch_sub(1, Ordering::Relaxed);
        let mut carried = self.shared.carried.lock();
        if let Some(entry) = carried.get_mut(&self.server) {
            entry.open = entry.open.saturating_sub(1);
        }
    }
}

async fn carry(shared: Arc<Shared>, mut client: TcpStream) {
    let Some((server, mut upstream, alive)) = reach(&shared).await else {
        Counters::add(&shared.counters.nowhere);
        return reset(client);
    };
    let _open = Open::new(&shared, server);
    tune(&client, shared.config.user_timeout);
    tune(&upstream, shared.config.user_timeout);
    let clean = tokio::select! {
        result = both(&mut client, &mut upstream) => result.is_ok(),
        () = alive.cancelled() => {
            Counters::add(&shared.counters.closed_dead);
            false
        }
    };
    // What was cut off is not to look like an end.
    if !clean {
        reset(client);
        reset(upstream);
    }
}

/// Connects to the best server that takes the connection, with the token that is cancelled when it dies.
async fn reach(shared: &Shared) -> Option<(SocketAddr, TcpStream, CancellationToken)> {
    let (order, panic) = {
        let choice = shared.choice.lock();
        (choice.order(shared.now()), !choice.any_ready())
    };
    let started = shared.now();
    for server in order {
        // Who waits for longer had better be told.
        if shared.now() - started > shared.config.connect_timeout * 4 {
            break;
        }
        let alive = shared.carried.lock().entry(server).or_default().alive.clone();
        let asked = shared.now();
        let connected = tokio::select! {
            connected = timeout(shared.config.connect_timeout, TcpStream::connect(server)) => connected,
            // It died while we were at it.
            () = alive.cancelled() => continue,
        };
        match connected {
            Ok(Ok(stream)) => {
                if panic {
                    Counters::add(&shared.counters.panics);
                }
                return Some((server, stream, alive));
            }
            Ok(Err(error)) => {
                tracing::debug!(%server, "a connection was not made: {error}");
                // Not for want of our own files or ports.
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset | io::ErrorKind::HostUnreachable
                ) {
                    shared.answered(server, asked, Answer::Refused);
                }
            }
            Err(_) => shared.answered(server, asked, Answer::Silent),
        }
        Counters::add(&shared.counters.failed_connects);
    }
    None
}

/// Small writes go out at once. A peer that vanished is noticed in the end; servers are found out by questions long
/// before. The limit is not short, since it also counts while a peer is there and does not read.
fn tune(stream: &TcpStream, silence: Duration) {
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(silence / 4).with_interval(silence / 8).with_retries(4);
    let _ = socket.set_tcp_keepalive(&keepalive);
    let _ = socket.set_tcp_user_timeout(Some(silence));
}

/// Carries bytes both ways until both sides have ended.
async fn both(client: &mut TcpStream, server: &mut TcpStream) -> io::Result<()> {
    let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
    tokio::try_join!(pump(from_client, to_server), pump(from_server, to_client))?;
    Ok(())
}

thread_local! {
    /// One buffer for all connections of a thread: between two reads nothing is kept, so an idle connection costs none.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; 64 << 10].into_boxed_slice());
}

/// Reads and writes as much as goes without waiting. What could not be written is returned.
fn shovel(from: &ReadHalf<'_>, to: &WriteHalf<'_>) -> io::Result<Option<Vec<u8>>> {
    BUFFER.with_borrow_mut(|buffer| {
        let length = from.try_read(buffer)?;
        let mut rest = &buffer[..length];
        if rest.is_empty() {
            return Ok(None);
        }
        while !rest.is_empty() {
            match to.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(io::Error::new(io::ErrorKind::BrokenPipe, error)),
            }
        }
        Ok(Some(rest.to_vec()))
    })
}

async fn pump(from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
    loop {
        from.readable().await?;
        match shovel(&from, &to) {
            Ok(None) => break,
            Ok(Some(rest)) if rest.is_empty() => tokio::task::coop::consume_budget().await,
            Ok(Some(rest)) => to.write_all(&rest).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    // The other direction may go on.
    to.shutdown().await
}
