//! Carrying bytes between two connections.
//!
//! Small messages go through one buffer per thread: two system calls. When a read fills it there is more to come, and the
//! rest is spliced through a pipe, so that the bytes never enter this process, until the sender pauses. So a connection
//! that is idle, or only talks, holds neither a buffer nor a pipe. Nothing is read that could not be written on: the
//! receiver's window is the sender's.

use std::{
    cell::RefCell,
    io,
    net::Shutdown,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use parking_lot::Mutex;
use socket2::SockRef;
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{Instant, sleep_until},
};

/// What one read takes at most.
const BUFFER: usize = 64 << 10;
/// What a pipe holds.
const PIPE: usize = 512 << 10;
/// So many unused pipes are kept.
const SPARE: usize = 32;

/// A pipe with nothing in it.
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
}

impl Pipe {
    fn new() -> io::Result<Pipe> {
        let (out, into) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // A smaller one does as well.
        let _ = fcntl(&into, FcntlArg::F_SETPIPE_SZ(PIPE as i32));
        Ok(Pipe { out, into })
    }
}

/// Pipes that are not in use.
#[derive(Default)]
pub struct Pipes(Mutex<Vec<Pipe>>);

impl Pipes {
    fn take(&self) -> io::Result<Pipe> {
        let spare = self.0.lock().pop();
        spare.map_or_else(Pipe::new, Ok)
    }

    fn give(&self, pipe: Pipe) {
        let mut spare = self.0.lock();
        if spare.len() < SPARE {
            spare.push(pipe);
        }
    }
}

/// What was carried, for all connections.
#[derive(Default)]
pub struct Carried {
    /// From clients.
    pub up: AtomicU64,
    /// To clients.
    pub down: AtomicU64,
    /// Of both, by splicing.
    pub spliced: AtomicU64,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Both sides had said all.
    Clean,
    /// Nothing was said for too long.
    Idle,
}

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// One direction.
struct Pump<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    pipes: &'a Pipes,
    count: &'a AtomicU64,
    spliced: &'a AtomicU64,
    activity: &'a Activity,
}

/// When something was carried last, in milliseconds since the start.
struct Activity {
    start: Instant,
    last: AtomicU64,
}

impl Activity {
    fn now(&self) {
        self.last.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Returns when nothing happened for `idle`.
    async fn ceased(&self, idle: Duration) {
        loop {
            let due = self.start + Duration::from_millis(self.last.load(Ordering::Relaxed)) + idle;
            if due <= Instant::now() {
                return;
            }
            sleep_until(due).await;
        }
    }
}

/// Carries bytes both ways until both sides have ended, or nothing was said for `idle`.
///
/// # Errors
/// If a side breaks off.
pub async fn both(
    client: &TcpStream,
    backend: &TcpStream,
    pipes: &Pipes,
    carried: &Carried,
    idle: Duration,
) -> io::Result<End> {
    let activity = Activity { start: Instant::now(), last: AtomicU64::new(0) };
    let pump = |from, to, count| Pump { from, to, pipes, count, spliced: &carried.spliced, activity: &activity };
    let (up, down) = (pump(client, backend, &carried.up), pump(backend, client, &carried.down));
    tokio::select! {
        result = async { tokio::try_join!(up.run(), down.run()) } => result.map(|_| End::Clean),
        () = activity.ceased(idle) => Ok(End::Idle),
    }
}

impl Pump<'_> {
    async fn run(&self) -> io::Result<()> {
        loop {
            self.from.readable().await?;
            match self.shovel() {
                Ok(None) => break,
                Ok(Some((read, rest))) => {
                    self.carried(read, false);
                    self.write(rest).await?;
                    if read == BUFFER && !self.splice().await? {
                        break;
                    }
                    tokio::task::coop::consume_budget().await;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        // The other direction may go on.
        match SockRef::from(self.to).shutdown(Shutdown::Write) {
            // It has ended as a whole.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            result => result,
        }
    }

    fn carried(&self, bytes: usize, spliced: bool) {
        self.count.fetch_add(bytes as u64, Ordering::Relaxed);
        if spliced {
            self.spliced.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        self.activity.now();
    }

    /// Reads and writes as much as goes without waiting: how much was read, and what of it could not be written.
    fn shovel(&self) -> io::Result<Option<(usize, Vec<u8>)>> {
        SHARED.with_borrow_mut(|buffer| {
            let read = self.from.try_read(buffer)?;
            let mut rest = &buffer[..read];
            if rest.is_empty() {
                return Ok(None);
            }
            while !rest.is_empty() {
                match self.to.try_write(rest) {
                    Ok(written) => rest = &rest[written..],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            Ok(Some((read, rest.to_vec())))
        })
    }

    async fn write(&self, bytes: Vec<u8>) -> io::Result<()> {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            self.to.writable().await?;
            match self.to.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            self.activity.now();
        }
        Ok(())
    }

    /// Splices until the sender pauses. False if it has ended.
    async fn splice(&self) -> io::Result<bool> {
        // Without a pipe (no file is left, most likely) it is copied.
        let Ok(pipe) = self.pipes.take() else { return Ok(true) };
        let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
        loop {
            let read =
                self.from.try_io(Interest::READABLE, || Ok(splice(self.from, None, &pipe.into, None, PIPE, flags)?));
            let mut left = match read {
                Ok(read @ 1..) => read,
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                // The pipe is empty here. The sender has ended, or pauses.
                ended => {
                    self.pipes.give(pipe);
                    return Ok(ended.is_err());
                }
            };
            self.carried(left, true);
            while left > 0 {
                self.to.writable().await?;
                let written = self.to.try_io(Interest::WRITABLE, || {
                    Ok(splice(&pipe.out, None, self.to, None, left, flags | SpliceFFlags::SPLICE_F_MORE)?)
                });
                match written {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(written) => left -= written,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
                self.activity.now();
            }
            tokio::task::coop::consume_budget().await;
        }
    }
}

/// From now on the connection is reset when it is dropped, whatever the reason, the end of this process included: what was
/// cut off is not to look like an end.
pub fn fragile(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

/// It has ended as it should: what is still on its way arrives.
pub fn finished(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(None);
}

/// Pipes and counters, for all connections of a relay.
#[derive(Clone, Default)]
pub struct Means {
    /// Pipes.
    pub pipes: Arc<Pipes>,
    /// Counters.
    pub carried: Arc<Carried>,
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        task::JoinHandle,
        time::timeout,
    };

    use super::*;

    /// A client, a backend, and what carries between them.
    struct Setup {
        client: TcpStream,
        backend: TcpStream,
        means: Means,
        relay: JoinHandle<io::Result<End>>,
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap());
        let (one, two) = tokio::join!(one, listener.accept());
        (one.unwrap(), two.unwrap().0)
    }

    async fn setup(idle: Duration) -> Setup {
        let ((client, near), (far, backend)) = (pair().await, pair().await);
        let means = Means::default();
        let with = means.clone();
        fragile(&near);
        fragile(&far);
        let relay = tokio::spawn(async move {
            let result = both(&near, &far, &with.pipes, &with.carried, idle).await;
            if matches!(result, Ok(End::Clean)) {
                finished(&near);
                finished(&far);
            }
            result
        });
        Setup { client, backend, means, relay }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test(flavor = "multi_thread")]
    async fn much_and_little_arrive_as_they_were_sent() {
        let Setup { mut client, mut backend, means, relay } = setup(LONG).await;
        let sent: Vec<u8> = (0..20_000_003u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let expect = sent.clone();
        let server = tokio::spawn(async move {
            let mut small = [0; 5];
            backend.read_exact(&mut small).await.unwrap();
            backend.write_all(b"yes").await.unwrap();
            let mut got = Vec::new();
            backend.read_to_end(&mut got).await.unwrap();
            // Half closed: the answer still gets through.
            backend.write_all(&got).await.unwrap();
            got
        });
        client.write_all(b"hello").await.unwrap();
        let mut small = [0; 3];
        client.read_exact(&mut small).await.unwrap();
        assert_eq!(&small, b"yes");
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).await.unwrap();
        assert!(server.await.unwrap() == expect && back == expect);
        assert_eq!(relay.await.unwrap().unwrap(), End::Clean);
        assert_eq!(means.carried.up.load(Ordering::Relaxed), expect.len() as u64 + 5);
        assert_eq!(means.carried.down.load(Ordering::Relaxed), expect.len() as u64 + 3);
        assert!(means.carried.spliced.load(Ordering::Relaxed) > expect.len() as u64, "most of it is spliced");
        assert!(!means.pipes.0.lock().is_empty(), "pipes are used again");
    }

    #[tokio::test]
    async fn a_receiver_that_does_not_read_stops_the_sender() {
        let Setup { client, backend, .. } = setup(LONG).await;
        let chunk = vec![0; 1 << 20];
        let mut sent = 0;
        while let Ok(ready) = timeout(Duration::from_millis(500), client.writable()).await {
            ready.unwrap();
            sent += client.try_write(&chunk).unwrap_or_default();
            assert!(sent < 256 << 20, "it takes whatever comes");
        }
        drop(backend);
    }

    #[tokio::test]
    async fn a_break_is_a_break_on_the_other_side() {
        let Setup { mut client, backend, relay, .. } = setup(LONG).await;
        fragile(&backend);
        drop(backend);
        let mut buffer = [0; 8];
        assert_eq!(client.read(&mut buffer).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(relay.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn silence_ends_it() {
        let Setup { mut client, mut backend, relay, .. } = setup(Duration::from_millis(400)).await;
        let mut buffer = [0; 1];
        // Talking keeps it, whichever way.
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            backend.write_all(b"x").await.unwrap();
            client.read_exact(&mut buffer).await.unwrap();
        }
        assert!(client.read(&mut buffer).await.is_err());
        assert_eq!(relay.await.unwrap().unwrap(), End::Idle);
    }
}
