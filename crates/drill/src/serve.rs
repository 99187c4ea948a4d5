//! What runs in the pods of drills on nodes: it says who it is to everybody who connects, gives back every line and every
//! datagram, and writes down that it runs. When it is told to end it serves on for a moment, since new connections come
//! until every proxy has heard of it, and takes leave of who is connected: with the next answer it says that this was the
//! last one ([`LAST`]), as HTTP does with `Connection: close`.

use std::{io::Write as _, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use nix::time::{ClockId, clock_gettime};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream, UdpSocket},
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

/// The port for connections.
pub const CONNECTIONS: u16 = 8080;
/// The port for datagrams.
pub const DATAGRAMS: u16 = 8081;
/// How often it writes down that it runs.
const EVERY: Duration = Duration::from_millis(50);
/// What follows the last answer on a connection.
pub const LAST: &str = " close";
/// How long it goes on after it was told to end.
const GOODBYE: Duration = Duration::from_secs(2);

/// Options of the program in the pods.
#[derive(clap::Args)]
pub struct Args {
    /// Where it writes that it runs, a line each time: its name, its identity, and the host's uptime in milliseconds.
    #[arg(long)]
    output: Option<PathBuf>,
    /// Which of all lives of this pod this is.
    #[arg(long, env = "POD_UID", default_value = "")]
    uid: String,
}

/// Serves until it is told to end.
///
/// # Errors
/// If it cannot listen, or the log cannot be written.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let name: Arc<str> = std::env::var("HOSTNAME").unwrap_or_else(|_| "nameless".into()).into();
    let all = |port| SocketAddr::from(([0, 0, 0, 0], port));
    let listener = TcpListener::bind(all(CONNECTIONS)).await.context("listen")?;
    let socket = UdpSocket::bind(all(DATAGRAMS)).await.context("listen for datagrams")?;
    let mut end = signal(SignalKind::terminate())?;
    let datagrams = tokio::spawn(echo_datagrams(socket, name.clone()));
    let mut log = match &args.output {
        Some(path) => {
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
            Some(file.with_context(|| path.display().to_string())?)
        }
        None => None,
    };
    let mut tick = tokio::time::interval(EVERY);
    // New connections come until everybody knows that they should not.
    let mut over: Option<tokio::time::Instant> = None;
    let ending = CancellationToken::new();
    loop {
        let until = over.unwrap_or_else(|| tokio::time::Instant::now() + Duration::from_secs(3600));
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    tokio::spawn(echo(stream, name.clone(), ending.clone()));
                }
            }
            _ = tick.tick() => if let Some(log) = &mut log {
                // One write call, so that lines of two writers never mix.
                log.write_all(format!("{name} {} {}\n", args.uid, uptime()?).as_bytes()).context("write the log")?;
            },
            _ = end.recv() => {
                over.get_or_insert(tokio::time::Instant::now() + GOODBYE);
                ending.cancel();
            }
            () = tokio::time::sleep_until(until) => break,
        }
    }
    datagrams.abort();
    Ok(())
}

/// The time since the host booted, in milliseconds: the same clock for all machines of a lab.
///
/// # Errors
/// If the kernel does not say.
pub fn uptime() -> anyhow::Result<u128> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?).as_millis())
}

async fn echo(stream: TcpStream, name: Arc<str>, ending: CancellationToken) -> std::io::Result<()> {
    let _ = stream.set_nodelay(true);
    let (read, mut write) = stream.into_split();
    write.write_all(format!("{name}\n").as_bytes()).await?;
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        if ending.is_cancelled() {
            write.write_all(format!("{line}{LAST}\n").as_bytes()).await?;
            return write.shutdown().await;
        }
        write.write_all(format!("{line}\n").as_bytes()).await?;
    }
    Ok(())
}

async fn echo_datagrams(socket: UdpSocket, name: Arc<str>) {
    let mut buffer = [0; 512];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let text = String::from_utf8_lossy(&buffer[..length]);
            let _ = socket.send_to(format!("{text} {name}").as_bytes(), from).await;
        }
    }
}
