//! A wire to a member that can be tampered with.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use seawall_store::etcd::{Endpoint, Options};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Everything passes.
    Pass,
    /// Connections are closed, new ones too.
    Cut,
    /// What the client sends arrives; the answers do not.
    Swallow,
    /// What the client sends arrives; the first answer breaks the connection.
    Break,
    /// What the client sends is kept; what it sends long after that is lost, so that it cannot take anything back.
    Hold,
    /// What was kept is sent.
    Release,
}

/// Forwards connections to one member.
pub struct Proxy {
    address: SocketAddr,
    mode: Arc<watch::Sender<Mode>>,
    holding: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl Proxy {
    pub async fn start(url: &str) -> Proxy {
        let to: SocketAddr = url.strip_prefix("http://").expect("plain").parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mode = Arc::new(watch::Sender::new(Mode::Pass));
        let holding = Arc::new(AtomicUsize::new(0));
        let (modes, count) = (mode.clone(), holding.clone());
        let task = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                if *modes.borrow() != Mode::Cut {
                    tokio::spawn(forward(client, to, modes.subscribe(), count.clone()));
                }
            }
        });
        Proxy { address, mode, holding, _task: AbortOnDropHandle::new(task) }
    }

    /// How to connect through this, as to the local member.
    pub fn options(&self) -> Options {
        Options {
            endpoints: vec![Endpoint { url: format!("http://{}", self.address), local: true }],
            ..Default::default()
        }
    }

    pub fn cut(&self) {
        self.mode.send_replace(Mode::Cut);
    }

    pub fn mend(&self) {
        self.mode.send_replace(Mode::Pass);
    }

    pub fn swallow(&self) {
        self.mode.send_replace(Mode::Swallow);
    }

    pub fn break_on_answer(&self) {
        self.mode.send_replace(Mode::Break);
    }

    pub fn hold(&self) {
        self.mode.send_replace(Mode::Hold);
    }

    /// How many connections have something kept that the client has sent.
    pub fn held(&self) -> usize {
        self.holding.load(Ordering::Acquire)
    }

    /// Sends what was kept, and waits until all of it has been sent and answered.
    pub async fn release(&self) {
        self.mode.send_replace(Mode::Release);
        while self.held() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn forward(client: TcpStream, to: SocketAddr, mut mode: watch::Receiver<Mode>, holding: Arc<AtomicUsize>) {
    let Ok(server) = TcpStream::connect(to).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let (mut kept, mut buffer, mut answer) = (Vec::new(), vec![0; 64 << 10], vec![0; 64 << 10]);
    let mut client_open = true;
    let mut kept_since = Instant::now();
    loop {
        let now = *mode.borrow_and_update();
        tokio::select! {
            _ = mode.changed() => {}
            read = from_client.read(&mut buffer), if client_open => match read {
                Ok(count) if count > 0 => {
                    if now == Mode::Hold || (now == Mode::Release && !kept.is_empty()) {
                        if kept.is_empty() {
                            holding.fetch_add(1, Ordering::AcqRel);
                            kept_since = Instant::now();
                        }
                        if kept_since.elapsed() < Duration::from_millis(200) {
                            kept.extend_from_slice(&buffer[..count]);
                        }
                    } else if to_server.write_all(&buffer[..count]).await.is_err() {
                        break;
                    }
                }
                // A client that has gone away does not take back what it has sent.
                _ if kept.is_empty() => break,
                _ => client_open = false,
            },
            read = from_server.read(&mut answer) => match read {
                Ok(count) if count > 0 => match now {
                    Mode::Swallow => {}
                    Mode::Break => break,
                    _ => {
                        // If the client is gone, its answers are nobody's.
                        let _ = to_client.write_all(&answer[..count]).await;
                    }
                },
                _ => break,
            },
        }
        let now = *mode.borrow();
        if now == Mode::Cut {
            break;
        }
        if now == Mode::Release && !kept.is_empty() {
            let sent = to_server.write_all(&kept).await.is_ok();
            kept.clear();
            // The member answers what it carries out, and then is quiet.
            let mut answered = 0;
            let quiet = Duration::from_millis(500);
            while let Ok(Ok(count)) = tokio::time::timeout(quiet, from_server.read(&mut answer)).await
                && count > 0
            {
                answered += count;
            }
            eprintln!("what was held back was sent: {sent}, and answered with {answered} bytes");
            holding.fetch_sub(1, Ordering::AcqRel);
            if !client_open {
                break;
            }
        }
    }
    if !kept.is_empty() {
        holding.fetch_sub(1, Ordering::AcqRel);
    }
}
