//! The sockets: datagrams and connections.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, BytesMut};
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::oneshot,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    limits::{Held, Limit},
    message::{MOST_QUERY, Transport},
    resolver::{Outcome, Resolver},
};

/// Questions of one client that wait for others, and of all.
const PENDING: (usize, usize) = (256, 4096);
/// Connections of one client, and of all.
const CONNECTIONS: (usize, usize) = (64, 1024);
/// Questions of one connection that wait for others: it is not read on meanwhile.
const PIPELINED: usize = 32;
/// How long a connection may stay without a question.
const IDLE: Duration = Duration::from_secs(10);
/// How long a client has to take an answer.
const TAKE: Duration = Duration::from_secs(5);
/// What the kernel keeps for us while we are not given time, in bytes.
const BUFFER: usize = 1 << 20;
/// So many datagrams are answered before others have their turn.
const IN_A_ROW: usize = 64;

/// How sockets are made.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// Sockets that rules of the kernel can tell from others', on an address that need not be there yet (IP_TRANSPARENT).
    pub transparent: bool,
}

/// Sockets on an address.
pub struct Sockets {
    udp: Vec<std::net::UdpSocket>,
    tcp: TcpListener,
    limits: Limits,
}

#[derive(Clone)]
struct Limits {
    pending: Limit,
    connections: Limit,
}

impl Sockets {
    /// Listens.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn bind(on: SocketAddr, how: How) -> io::Result<Sockets> {
        let tcp = socket(on, Type::STREAM, how)?;
        tcp.listen(1024)?;
        let tcp = TcpListener::from_std(tcp.into())?;
        // The port may have been left to the kernel.
        let on = SocketAddr::new(on.ip(), tcp.local_addr()?.port());
        // Each is read by a thread of its own; the kernel spreads clients over them.
        let count = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
        let udp = (0..count).map(|_| socket(on, Type::DGRAM, how).map(std::net::UdpSocket::from));
        let udp = udp.collect::<io::Result<Vec<_>>>()?;
        let limits =
            Limits { pending: Limit::new(PENDING.0, PENDING.1), connections: Limit::new(CONNECTIONS.0, CONNECTIONS.1) };
        Ok(Sockets { udp, tcp, limits })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Answers until `stop`.
    pub async fn serve(self, resolver: Arc<Resolver>, stop: CancellationToken) {
        // Threads are told when nobody waits for them any more.
        let stop = stop.child_token();
        let _guard = stop.clone().drop_guard();
        let mut parts = JoinSet::new();
        for socket in self.udp {
            let datagrams = datagrams(socket, resolver.clone(), self.limits.clone(), stop.clone());
            parts.spawn(thread(datagrams));
        }
        parts.spawn(async move {
            connections(self.tcp, resolver, self.limits, stop).await;
            Ok(())
        });
        // A part that fails takes the others along: whoever watches over us starts all of them again.
        while let Some(ended) = parts.join_next().await {
            let failed = match ended {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            tracing::error!(error = failed, "a part of DNS failed");
            return;
        }
    }
}

/// Runs something on a thread that does nothing else: an answer does not wait for other work of the process, nor for one of
/// its threads to be woken for it.
async fn thread(work: impl Future<Output = io::Result<()>> + Send + 'static) -> io::Result<()> {
    let (done, ended) = oneshot::channel();
    std::thread::Builder::new().name("dns".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        // Nobody may wait for it any more.
        let _ = done.send(runtime.and_then(|runtime| runtime.block_on(work)));
    })?;
    ended.await.unwrap_or_else(|_| Err(io::Error::other("it panicked")))
}

fn socket(on: SocketAddr, kind: Type, how: How) -> io::Result<Socket> {
    let protocol = if kind == Type::DGRAM { Protocol::UDP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(on), kind, Some(protocol))?;
    socket.set_reuse_address(true)?;
    if kind == Type::DGRAM {
        socket.set_reuse_port(true)?;
        socket.set_recv_buffer_size(BUFFER)?;
    }
    match on.ip() {
        IpAddr::V4(_) if how.transparent => socket.set_ip_transparent_v4(true)?,
        IpAddr::V6(_) if how.transparent => socket.set_ip_transparent_v6(true)?,
        _ => {}
    }
    socket.set_nonblocking(true)?;
    socket.bind(&on.into())?;
    Ok(socket)
}

async fn datagrams(
    socket: std::net::UdpSocket,
    resolver: Arc<Resolver>,
    limits: Limits,
    stop: CancellationToken,
) -> io::Result<()> {
    let socket = Arc::new(UdpSocket::from_std(socket)?);
    let mut buffer = vec![0; MOST_QUERY + 1];
    let mut pending = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            ready = socket.readable() => ready?,
        }
        for _ in 0..IN_A_ROW {
            let (len, client) = match socket.try_recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // What others say of an earlier answer.
                Err(_) => continue,
            };
            // Nobody is there.
            if client.port() == 0 {
                continue;
            }
            match resolver.take(&buffer[..len], Transport::Udp) {
                Outcome::Nothing => {}
                Outcome::Now(answer) => send(&socket, &resolver, &answer, client).await,
                Outcome::Later(asked, answer) => match limits.pending.take(client.ip()) {
                    Some(held) => drop(pending.spawn(later(socket.clone(), resolver.clone(), answer, client, held))),
                    None => send(&socket, &resolver, &resolver.too_many(&asked), client).await,
                },
            }
        }
        while pending.try_join_next().is_some() {}
        tokio::task::consume_budget().await;
    }
}

async fn later(
    socket: Arc<UdpSocket>,
    resolver: Arc<Resolver>,
    answer: BoxFuture<'static, Vec<u8>>,
    client: SocketAddr,
    held: Held,
) {
    let answer = answer.await;
    send(&socket, &resolver, &answer, client).await;
    drop(held);
}

async fn send(socket: &UdpSocket, resolver: &Resolver, answer: &[u8], client: SocketAddr) {
    // What cannot be sent is asked for again.
    if let Err(error) = socket.send_to(answer, client).await {
        resolver.metrics.dropped();
        tracing::debug!(%client, %error, "an answer was not sent");
    }
}

async fn connections(listener: TcpListener, resolver: Arc<Resolver>, limits: Limits, stop: CancellationToken) {
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
            Some(_) = open.join_next(), if !open.is_empty() => continue,
        };
        match accepted {
            Ok((stream, client)) => match limits.connections.take(client.ip()) {
                Some(held) => {
                    let (resolver, pending) = (resolver.clone(), limits.pending.clone());
                    open.spawn(async move {
                        if let Err(error) = connection(stream, client, &resolver, &pending).await {
                            tracing::debug!(%client, %error, "a connection ended");
                        }
                        drop(held);
                    });
                }
                None => resolver.metrics.refused(),
            },
            Err(error) => {
                // No more files, say: others end meanwhile.
                tracing::debug!(%error, "a connection was not taken");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Answers the questions of a connection as they become ready, which need not be in their order (RFC 7766).
async fn connection(mut stream: TcpStream, client: SocketAddr, resolver: &Resolver, limit: &Limit) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = BytesMut::with_capacity(1024);
    let mut later: FuturesUnordered<BoxFuture<'static, (Vec<u8>, Held)>> = FuturesUnordered::new();
    let mut last = Instant::now();
    loop {
        while later.len() < PIPELINED
            && let Some(question) = next(&mut buffer)?
        {
            last = Instant::now();
            match resolver.take(&question, Transport::Tcp) {
                Outcome::Nothing => return Ok(()),
                Outcome::Now(answer) => write(&mut stream, &answer).await?,
                Outcome::Later(asked, answer) => match limit.take(client.ip()) {
                    Some(held) => later.push(Box::pin(async move { (answer.await, held) })),
                    None => write(&mut stream, &resolver.too_many(&asked)).await?,
                },
            }
        }
        tokio::select! {
            Some((answer, held)) = later.next(), if !later.is_empty() => {
                write(&mut stream, &answer).await?;
                drop(held);
                last = Instant::now();
            }
            read = stream.read_buf(&mut buffer), if later.len() < PIPELINED => if read? == 0 {
                // It may have said all that it wants to say, and still listen.
                while let Some((answer, _held)) = later.next().await {
                    write(&mut stream, &answer).await?;
                }
                return Ok(());
            },
            () = tokio::time::sleep_until(last + IDLE), if later.is_empty() => return Ok(()),
        }
    }
}

/// The next question that is there as a whole.
fn next(buffer: &mut BytesMut) -> io::Result<Option<BytesMut>> {
    let Some(head) = buffer.first_chunk::<2>() else { return Ok(None) };
    let len = usize::from(u16::from_be_bytes(*head));
    if len > MOST_QUERY {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a question of {len} bytes")));
    }
    if buffer.len() < 2 + len {
        return Ok(None);
    }
    buffer.advance(2);
    Ok(Some(buffer.split_to(len)))
}

async fn write(stream: &mut TcpStream, answer: &[u8]) -> io::Result<()> {
    let len = u16::try_from(answer.len()).map_err(io::Error::other)?;
    let mut out = Vec::with_capacity(2 + answer.len());
    out.extend(len.to_be_bytes());
    out.extend(answer);
    timeout(TAKE, stream.write_all(&out)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
