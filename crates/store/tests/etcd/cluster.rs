//! One or three processes of etcd.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use seawall_store::{
    Error, Expect, ListOptions, Store,
    etcd::{Endpoint, Etcd, Options, Tls},
};
use tempfile::TempDir;

/// Longer than a cluster takes to start on a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(60);

static CLUSTERS: AtomicU8 = AtomicU8::new(0);

/// The members of one etcd. They end when this is dropped.
pub struct EtcdCluster {
    members: Vec<Member>,
    tls: Option<Tls>,
    authority: Option<(String, KeyPair)>,
    state: &'static str,
    dir: TempDir,
}

struct Member {
    name: String,
    address: Ipv4Addr,
    child: Option<Child>,
}

impl EtcdCluster {
    /// Starts `count` members and waits until they serve.
    pub async fn start(count: u8, tls: bool) -> EtcdCluster {
        // RUST_LOG shows what the store does. Another test of this process may have begun it.
        let log = tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env());
        let _ = log.with_test_writer().try_init();
        let mut cluster = EtcdCluster::prepare(count, tls);
        for index in 0..cluster.members.len() {
            cluster.run(index);
        }
        cluster.connect(None).await;
        cluster
    }

    fn prepare(count: u8, tls: bool) -> EtcdCluster {
        let dir = tempfile::tempdir().unwrap();
        // Addresses of this process alone, so that ports never collide: tests run side by side.
        let [.., high, low] = (std::process::id() % (100 << 8)).to_be_bytes();
        let first = CLUSTERS.fetch_add(1, Ordering::Relaxed) % 25 * 10;
        let member = |index| Member {
            name: format!("m{index}"),
            address: Ipv4Addr::new(127, 100 + high, low, first + index + 1),
            child: None,
        };
        let mut cluster =
            EtcdCluster { members: (0..count).map(member).collect(), tls: None, authority: None, state: "new", dir };
        if tls {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, "test authority");
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let key = KeyPair::generate().unwrap();
            let ca_pem = params.self_signed(&key).unwrap().pem();
            fs::write(cluster.dir.path().join("ca.crt"), &ca_pem).unwrap();
            cluster.authority = Some((ca_pem, key));
            cluster.tls = Some(cluster.certificate("client"));
            for index in 0..cluster.members.len() {
                cluster.write_certificate(index);
            }
        }
        cluster
    }

    /// A certificate of the cluster's authority for this name or address.
    pub fn certificate(&self, name: &str) -> Tls {
        let (ca_pem, ca_key) = self.authority.as_ref().expect("a cluster with TLS");
        // A member checks that its peer's connection comes from an address in its certificate, and on loopback all of them
        // come from this one.
        let mut params = CertificateParams::new(vec![name.to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_ca_cert_pem(ca_pem, ca_key).unwrap();
        let cert_pem = params.signed_by(&key, &issuer).unwrap().pem();
        Tls { ca_pem: ca_pem.clone(), cert_pem, key_pem: key.serialize_pem() }
    }

    fn write_certificate(&self, index: usize) {
        let member = &self.members[index];
        let tls = self.certificate(&member.address.to_string());
        fs::write(self.dir.path().join(format!("{}.crt", member.name)), tls.cert_pem).unwrap();
        fs::write(self.dir.path().join(format!("{}.key", member.name)), tls.key_pem).unwrap();
    }

    fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// Where a member takes requests.
    pub fn url(&self, index: usize) -> String {
        format!("{}://{}:2379", self.scheme(), self.members[index].address)
    }

    /// Where a member listens to the others.
    pub fn peer_url(&self, index: usize) -> String {
        format!("{}://{}:2380", self.scheme(), self.members[index].address)
    }

    /// Makes room for one more member, which joins when it is [`run`](Self::run).
    pub fn add(&mut self) -> usize {
        let index = self.members.len();
        let [a, b, c, d] = self.members[index - 1].address.octets();
        self.members.push(Member { name: format!("m{index}"), address: Ipv4Addr::new(a, b, c, d + 1), child: None });
        if self.tls.is_some() {
            self.write_certificate(index);
        }
        self.state = "existing";
        index
    }

    /// Starts a member's process, with what is on its disk.
    pub fn run(&mut self, index: usize) {
        let all: Vec<String> =
            (0..self.members.len()).map(|i| format!("{}={}", self.members[i].name, self.peer_url(i))).collect();
        let (url, peer_url) = (self.url(index), self.peer_url(index));
        let at = |file: &str| self.dir.path().join(file).display().to_string();
        let name = self.members[index].name.clone();
        let mut command = Command::new("etcd");
        command
            .args(["--name", &name, "--data-dir", &at(&name), "--initial-cluster-state", self.state])
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &all.join(","), "--initial-cluster-token", &at("")])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .args(["--logger", "zap", "--log-level", "warn"]);
        if self.tls.is_some() {
            let (ca, crt, key) = (at("ca.crt"), at(&format!("{name}.crt")), at(&format!("{name}.key")));
            command
                .args(["--client-cert-auth", "--trusted-ca-file", &ca, "--cert-file", &crt, "--key-file", &key])
                .args(["--peer-client-cert-auth", "--peer-trusted-ca-file", &ca])
                .args(["--peer-cert-file", &crt, "--peer-key-file", &key]);
        }
        let log = File::options().create(true).append(true).open(at(&format!("{name}.log"))).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().expect("etcd is installed (Debian: apt-get install etcd-server)");
        assert!(self.members[index].child.replace(child).is_none(), "{name} runs already");
    }

    fn signal(&self, index: usize, signal: Signal) {
        let child = self.members[index].child.as_ref().expect("it runs");
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    }

    /// kill -9.
    pub fn kill(&mut self, index: usize) {
        let mut child = self.members[index].child.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// The process stands still: its sockets stay open.
    pub fn freeze(&self, index: usize) {
        self.signal(index, Signal::SIGSTOP);
    }

    /// It goes on.
    pub fn thaw(&self, index: usize) {
        self.signal(index, Signal::SIGCONT);
    }

    /// How to connect, with the member `local` (if any) preferred.
    pub fn options(&self, local: Option<usize>) -> Options {
        let endpoint = |index| Endpoint { url: self.url(index), local: Some(index) == local };
        Options {
            endpoints: (0..self.members.len()).map(endpoint).collect(),
            tls: self.tls.clone(),
            ..Default::default()
        }
    }

    /// Connects when the cluster serves.
    pub async fn connect(&self, local: Option<usize>) -> Etcd {
        self.connect_with(self.options(local)).await
    }

    /// Connects when the cluster serves.
    pub async fn connect_with(&self, options: Options) -> Etcd {
        let connected = async {
            loop {
                match Etcd::connect(options.clone()).await {
                    Ok(etcd) => return etcd,
                    Err(error) => tracing::debug!(%error, "not yet"),
                }
            }
        };
        match tokio::time::timeout(PATIENCE, connected).await {
            Ok(etcd) => etcd,
            Err(_) => panic!("etcd does not serve; its logs: {}", self.logs()),
        }
    }

    /// Removes everything that a test has written.
    pub async fn wipe(&self) {
        let etcd = self.connect(None).await;
        for entry in etcd.list("", ListOptions::default()).await.unwrap().entries {
            match etcd.delete(&entry.key, Expect::Any, None).await {
                Ok(_) | Err(Error::Conflict { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// A directory for the test's own files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn logs(&self) -> String {
        let log = |m: &Member| fs::read_to_string(self.dir.path().join(format!("{}.log", m.name))).unwrap_or_default();
        self.members.iter().map(log).collect()
    }
}

impl Drop for EtcdCluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            if let Some(child) = &mut member.child {
                // Also one that stands still ends by this.
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}
