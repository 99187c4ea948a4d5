//! A client, a node and two pods in network namespaces of their own.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use seawall_network::proxy::ProxyConfig;

use crate::common::sh;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Namespaces `<prefix>-node`, `-client`, `-pod1`, `-pod2`: the node routes between the others.
pub struct Net {
    pub prefix: String,
    servers: Vec<Child>,
    pages: tempfile::TempDir,
}

impl Net {
    pub fn new() -> Net {
        let prefix = format!("swnft{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let net = Net { prefix, servers: Vec::new(), pages: tempfile::tempdir().unwrap() };
        for (host, _) in Self::HOSTS.iter().chain(&[("node", "")]) {
            // Nobody else has these addresses: they can be used at once.
            sh(&format!(
                "ip netns add {0}-{host}; ip -n {0}-{host} link set lo up
                 ip netns exec {0}-{host} sysctl -qw net.ipv6.conf.default.accept_dad=0",
                net.prefix
            ));
        }
        for (index, (host, address)) in Self::HOSTS.iter().enumerate() {
            let gateway = address.rsplit_once('.').unwrap().0.to_owned() + ".1";
            let p = &net.prefix;
            sh(&format!(
                "ip -n {p}-node link add v{index} type veth peer name eth0 netns {p}-{host}
                 ip -n {p}-node addr add {gateway}/24 dev v{index}; ip -n {p}-node link set v{index} up
                 ip -n {p}-{host} addr add {address}/24 dev eth0; ip -n {p}-{host} link set eth0 up
                 ip -n {p}-{host} route add default via {gateway}
                 ip -n {p}-node addr add fd00:{index}::1/64 dev v{index} nodad
                 ip -n {p}-{host} addr add fd00:{index}::2/64 dev eth0 nodad
                 ip -n {p}-{host} route add default via fd00:{index}::1
                 ip netns exec {p}-node sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"
            ));
        }
        // Addresses of Services are routed somewhere on any node that has a default route.
        sh(&format!(
            "ip -n {0}-node route add default via 192.168.77.2; ip -n {0}-node route add default via fd00:0::2",
            net.prefix
        ));
        net
    }

    pub const HOSTS: [(&'static str, &'static str); 3] =
        [("client", "192.168.77.2"), ("pod1", "10.244.1.2"), ("pod2", "10.244.2.2")];

    pub fn config(&self) -> ProxyConfig {
        let nft = ["nsenter".to_owned(), format!("--net=/run/netns/{}-node", self.prefix), "nft".to_owned()];
        ProxyConfig {
            node_name: "here".into(),
            cluster_cidrs: ["10.244.0.0/16", "fd00:1::/64", "fd00:2::/64"].map(|net| net.parse().unwrap()).to_vec(),
            nft: nft.to_vec(),
            ..Default::default()
        }
    }

    pub fn command(&self, host: &str, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}-{host}", self.prefix)).args(words);
        command
    }

    /// Serves its own name on port 8080.
    pub fn serve(&mut self, host: &str) {
        let root = self.pages.path().join(host);
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("index.html"), host).unwrap();
        let words = ["busybox", "httpd", "-f", "-p", "8080", "-h", root.to_str().unwrap()];
        let child =
            self.command(host, &words).stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("busybox runs");
        self.servers.push(child);
        let deadline = Instant::now_for_test() + Duration::from_secs(10);
        let address = Self::HOSTS.iter().find(|(h, _)| *h == host).unwrap().1;
        while self.ask("node", address, 8080).is_err() {
            assert!(Instant::now_for_test() < deadline, "{host} does not serve");
        }
    }

    pub fn ask(&self, host: &str, address: &str, port: u16) -> Result<String, String> {
        let url = format!("http://{address}:{port}/");
        let output = self.command(host, &["curl", "-sS", "-m", "2", &url]).output().expect("curl runs");
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    pub fn seen(&self, host: &str, address: &str, port: u16) -> Vec<String> {
        let mut all: Vec<String> =
            (0..24).map(|_| self.ask(host, address, port).unwrap_or_else(|e| format!("error {e}"))).collect();
        all.sort();
        all.dedup();
        all
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        for host in ["client", "pod1", "pod2", "node"] {
            let _ = Command::new("ip").args(["netns", "del", &format!("{}-{host}", self.prefix)]).status();
        }
    }
}

/// Tests read the clock to bound a wait.
pub trait Clock {
    fn now_for_test() -> Instant;
}

impl Clock for Instant {
    #[allow(clippy::disallowed_methods)]
    fn now_for_test() -> Instant {
        Instant::now()
    }
}

/// Does something in a namespace; sockets made there stay there.
pub fn inside<T: Send + 'static>(namespace: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = namespace.to_owned();
    let thread = std::thread::spawn(move || {
        let file = std::fs::File::open(format!("/run/netns/{namespace}")).unwrap();
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        work()
    });
    thread.join().unwrap()
}

impl Net {
    pub fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// Says its name on every connection to port 8080 and then repeats what it hears; answers datagrams with its name.
    pub fn echo(&self, host: &'static str) {
        let (tcp, udp) = inside(&self.namespace(host), || {
            (TcpListener::bind("[::]:8080").unwrap(), UdpSocket::bind("[::]:8080").unwrap())
        });
        std::thread::spawn(move || {
            for stream in tcp.incoming() {
                let Ok(mut stream) = stream else { return };
                std::thread::spawn(move || {
                    let _ = writeln!(stream, "{host}");
                    let mut buffer = [0; 4096];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..length]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(host.as_bytes(), from);
            }
        });
    }

    /// Listens in a host and tells who came, and what they said first.
    pub fn listen(&self, host: &str) -> mpsc::Receiver<(IpAddr, Vec<u8>)> {
        let listener = inside(&self.namespace(host), || TcpListener::bind("[::]:8080").unwrap());
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let from = stream.peer_addr().unwrap().ip().to_canonical();
                let _ = stream.write_all(b"\n");
                let mut said = Vec::new();
                let _ = stream.read_to_end(&mut said);
                if tell.send((from, said)).is_err() {
                    return;
                }
            }
        });
        told
    }

    /// Whatever goes to a host or comes from it vanishes, as when its power is cut; or comes through again.
    pub fn silence(&self, host: &str, silent: bool) {
        let namespace = self.namespace(host);
        match silent {
            true => sh(&format!(
                "ip netns exec {namespace} nft 'table inet silence {{
                    chain i {{ type filter hook prerouting priority -350; policy drop; }}
                    chain o {{ type filter hook postrouting priority 350; policy drop; }}
                }}'"
            )),
            false => sh(&format!("ip netns exec {namespace} nft delete table inet silence")),
        }
    }

    /// A connection from a host, with the name of who answers.
    pub fn connect(&self, host: &str, to: &str) -> std::io::Result<(String, TcpStream)> {
        self.connect_within(Duration::from_secs(2), host, to)
    }

    /// The same, by a client that waits for so long.
    pub fn connect_within(&self, limit: Duration, host: &str, to: &str) -> std::io::Result<(String, TcpStream)> {
        let to: SocketAddr = to.parse().unwrap();
        inside(&self.namespace(host), move || {
            let mut stream = TcpStream::connect_timeout(&to, limit)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.set_nodelay(true)?;
            let mut name = Vec::new();
            let mut byte = [0];
            while stream.read(&mut byte)? == 1 && byte != *b"\n" {
                name.push(byte[0]);
            }
            Ok((String::from_utf8_lossy(&name).into_owned(), stream))
        })
    }

    /// One that this host answers.
    pub fn connect_to(&self, host: &str, to: &str, wanted: &str) -> TcpStream {
        for _ in 0..200 {
            let (name, stream) = self.connect(host, to).unwrap_or_else(|e| panic!("from {host} to {to}: {e}"));
            if name == wanted {
                return stream;
            }
        }
        panic!("{wanted} never answers at {to}");
    }

    /// Who answers on new connections.
    pub fn answers(&self, host: &str, to: &str) -> Vec<String> {
        let mut all: Vec<String> =
            (0..24).map(|_| self.connect(host, to).map_or_else(|e| format!("error {e}"), |(name, _)| name)).collect();
        all.sort();
        all.dedup();
        all
    }

    pub fn udp(&self, host: &str, to: &str) -> UdpSocket {
        let to: SocketAddr = to.parse().unwrap();
        inside(&self.namespace(host), move || {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            socket.connect(to).unwrap();
            socket
        })
    }
}

/// Whether the other end still repeats what it hears.
pub fn echoes(stream: &mut TcpStream) -> bool {
    let mut answer = [0; 4];
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut answer).is_ok() && answer == *b"ping"
}

/// Who answers a datagram.
pub fn answer(socket: &UdpSocket) -> Option<String> {
    let mut buffer = [0; 64];
    socket.send(b"?").ok()?;
    let length = socket.recv(&mut buffer).ok()?;
    Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
}
