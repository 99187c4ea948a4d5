//! A server under test: the real binary with its state in a temporary directory.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::{
    process::{Child, Command},
    time::Instant,
};

use crate::{
    http::Api,
    kubectl::{self, Kubectl, Output},
    machine::{Machine, child_of},
    within,
};

/// How a server is started.
#[derive(Default)]
pub struct Options {
    /// The machine that it runs on; without one it is only an API on the loopback.
    pub machine: Option<Arc<Machine>>,
    /// Further arguments.
    pub args: Vec<String>,
}

/// A server, its directories, and ways to talk to it. All ends with it.
pub struct Server {
    options: Options,
    process: Option<Process>,
    port: u16,
    directory: Option<TempDir>,
    /// kubectl as the administrator.
    pub kubectl: Kubectl,
}

struct Process {
    child: Child,
    /// The server itself, which on a machine is a child of the one that entered it.
    pid: i32,
}

/// How long a start took.
pub struct Started {
    /// Until `/readyz` said ok.
    pub ready: Duration,
}

impl Server {
    /// Starts a server on fresh directories and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    pub async fn start(options: Options) -> Server {
        let directory = tempfile::Builder::new().prefix("seawall-e2e-").tempdir().unwrap();
        Server::start_in(directory, options).await
    }

    /// Starts a server on directories that may have been used before, and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    pub async fn start_in(directory: TempDir, options: Options) -> Server {
        crate::failure::listen();
        let kubeconfig = directory.path().join("data/admin.kubeconfig");
        let kubectl = Kubectl { kubeconfig, home: directory.path().join("home") };
        std::fs::create_dir_all(&kubectl.home).unwrap();
        // A machine's network is its own, so the usual port is free there.
        let port = if options.machine.is_some() { 6443 } else { free_port() };
        let mut server = Server { options, process: None, port, directory: Some(directory), kubectl };
        server.launch().await;
        server
    }

    /// Kills the server and keeps its directories, as a power cut does; what only lives in memory is taken away.
    ///
    /// # Panics
    /// If it does not run.
    pub async fn cut_off(mut self) -> TempDir {
        self.crash().await;
        let directory = self.directory.take().expect("a server has a directory");
        let _ = std::fs::remove_dir_all(directory.path().join("run"));
        directory
    }

    /// Starts a server with a node on a machine, and waits until the node is Ready.
    ///
    /// # Panics
    /// If it does not become ready.
    pub async fn with_node(machine: &Arc<Machine>) -> Server {
        let server = Server::start(Options { machine: Some(machine.clone()), args: Vec::new() }).await;
        server.node_ready().await;
        server
    }

    /// Waits for a Ready node and for what pods need in the default namespace.
    ///
    /// # Panics
    /// If they do not appear.
    pub async fn node_ready(&self) {
        let ready = "{.items[0].status.conditions[?(@.type==\"Ready\")].status}";
        self.kubectl.reaches("nodes", ready, "True").await;
        self.kubectl.reaches("serviceaccount/default", "{.metadata.name}", "default").await;
    }

    /// Starts the process and waits for `/readyz`.
    ///
    /// # Panics
    /// If it ends, or is not ready within a minute.
    pub async fn launch(&mut self) -> Started {
        assert!(self.process.is_none(), "the server runs already");
        let at = |name: &str| self.directory().join(name);
        let mut command = match &self.options.machine {
            Some(machine) => machine.command(crate::seawall()),
            None => Command::new(crate::seawall()),
        };
        command.arg("server").arg("--data-dir").arg(at("data")).arg("--run-dir").arg(at("run"));
        command.arg("--pod-log-dir").arg(at("pods")).arg("--device-plugin-dir").arg(at("device-plugins"));
        command.args(["--port", &self.port.to_string()]);
        if self.options.machine.is_none() {
            command.args(["--bind-address", "127.0.0.1", "--disable", "agent,proxy"]);
        }
        // Its pods are of no use to these tests.
        command.args(["--disable", "dns"]);
        // Tests run where they are built, and what that leaves of the disk says nothing about the pods of a test.
        command.arg("--eviction-hard=memory.available<100Mi,nodefs.available<256Mi");
        command.arg("--image-gc-high-threshold=100");
        command.args(&self.options.args);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).kill_on_drop(true);
        command.env("SEAWALL_LOG", std::env::var("SEAWALL_LOG").unwrap_or_else(|_| "info".into()));
        let started = Instant::now();
        let mut child = command.spawn().expect("the server starts");
        let outer = child.id().expect("the server has a process");
        let on_machine = self.options.machine.is_some();
        let api = loop {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the server ended at once: {status}\n{}", self.log_tail());
            }
            assert!(started.elapsed() < Duration::from_secs(60), "the server is not ready\n{}", self.log_tail());
            if let Ok(api) = Api::new(&self.kubectl.kubeconfig)
                && let Ok(answer) = api.get("/readyz").await
                && answer.status == 200
            {
                break api;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let ready = started.elapsed();
        drop(api);
        let pid = if on_machine { child_of(outer).expect("the server's own process") } else { outer.cast_signed() };
        self.process = Some(Process { child, pid });
        Started { ready }
    }

    /// Where the API is.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// The server's process.
    pub fn pid(&self) -> i32 {
        self.process.as_ref().expect("the server runs").pid
    }

    /// The number of the server's process as its machine knows it.
    ///
    /// # Panics
    /// If the server does not run.
    pub fn pid_on_machine(&self) -> i32 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the server runs");
        let line = status.lines().find_map(|l| l.strip_prefix("NSpid:")).expect("its numbers are told");
        line.split_whitespace().last().and_then(|n| n.parse().ok()).expect("a number")
    }

    /// Kills the server as a crash would.
    ///
    /// # Panics
    /// If it does not run.
    pub async fn crash(&mut self) {
        self.signal(Signal::SIGKILL).await;
    }

    /// What it is told at its next start beside what every server is told.
    pub fn set_args(&mut self, args: Vec<String>) {
        self.options.args = args;
    }

    /// Asks the server to stop, and waits until it has.
    ///
    /// # Panics
    /// If it does not stop.
    pub async fn stop(&mut self) {
        self.signal(Signal::SIGTERM).await;
    }

    async fn signal(&mut self, signal: Signal) {
        let mut process = self.process.take().expect("the server runs");
        kill(Pid::from_raw(process.pid), signal).expect("the server is there");
        let ended = tokio::time::timeout(Duration::from_secs(30), process.child.wait()).await;
        assert!(ended.is_ok(), "the server does not end after {signal}\n{}", self.log_tail());
    }

    /// A client for plain requests, as the administrator.
    ///
    /// # Panics
    /// If the kubeconfig cannot be read.
    pub fn api(&self) -> Api {
        Api::new(&self.kubectl.kubeconfig).expect("the kubeconfig is complete")
    }

    /// Resident memory in MiB.
    ///
    /// # Panics
    /// If the server does not run.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the server runs");
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("its memory is told");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
    }

    /// A directory for the test's own files.
    ///
    /// # Panics
    /// If the server was cut off.
    pub fn directory(&self) -> &Path {
        self.directory.as_ref().expect("a server has a directory").path()
    }

    /// The socket of its containerd.
    pub fn containerd(&self) -> PathBuf {
        self.directory().join("run/containerd/containerd.sock")
    }

    /// Runs `seawall` on the machine.
    ///
    /// # Panics
    /// If it cannot be started.
    pub async fn seawall(&self, args: &[&str]) -> Output {
        self.on_machine(crate::seawall(), args).await
    }

    /// Runs a program on the machine.
    ///
    /// # Panics
    /// If there is none, or the program cannot be started.
    pub async fn on_machine(&self, program: impl AsRef<Path>, args: &[&str]) -> Output {
        let mut command = self.options.machine.as_ref().expect("a machine").command(&program);
        command.args(args);
        kubectl::run(command, &format!("{} {}", program.as_ref().display(), args.join(" ")), "").await
    }

    /// `seawall clean` on this server's directories.
    ///
    /// # Panics
    /// If it cannot be started.
    pub async fn clean(&self) -> Output {
        let at = |name: &str| self.directory().join(name).display().to_string();
        let (data, run, pods, plugins) = (at("data"), at("run"), at("pods"), at("device-plugins"));
        let clean = ["clean", "--data", "--data-dir", &data, "--run-dir", &run, "--pod-log-dir", &pods];
        self.seawall(&[&clean[..], &["--device-plugin-dir", &plugins]].concat()).await
    }

    /// Makes an image of busybox's web server that answers with `page` and stops as soon as it is told to.
    ///
    /// # Panics
    /// If it cannot be made.
    pub async fn web_image(&self, tag: &str, page: &str) {
        let www = self.directory().join(format!("www-{}", tag.replace(['/', ':'], "-")));
        std::fs::create_dir_all(&www).unwrap();
        std::fs::write(www.join("index.html"), format!("{page}\n")).unwrap();
        let (copy, socket) = (format!("{}:/www", www.display()), self.containerd().display().to_string());
        // The first process of a container ignores signals that it does not handle.
        let serve = "trap 'exit 0' TERM; echo serving; httpd -f -v -p 8080 -h /www & wait $!";
        let args =
            ["image", "build", "--busybox", "-t", tag, "--copy", &copy, "--socket", &socket, "--", "sh", "-c", serve];
        self.seawall(&args).await.ok();
    }

    fn log(&self) -> PathBuf {
        self.directory().join("server.log")
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(80)..].join("\n")
    }

    /// Whether the log has this.
    pub fn logged(&self, part: &str) -> bool {
        std::fs::read_to_string(self.log()).unwrap_or_default().contains(part)
    }

    /// Waits until the server's memory has stayed below this many MiB, once; what is freed is given back late.
    ///
    /// # Panics
    /// If it never is.
    pub async fn memory_below(&self, limit: u64, when: &str) {
        let mut seen = 0;
        let what = format!("less than {limit} MiB of memory {when}");
        within(Duration::from_secs(30), &what, async || {
            seen = self.memory();
            (seen < limit).then_some(())
        })
        .await;
        eprintln!("memory {when}: {seen} MiB");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() && self.directory.is_some() {
            self.kubectl.post_mortem();
            eprintln!("--- the end of the server's log\n{}\n---", self.log_tail());
            crate::failure::repeat();
        }
        if let Some(process) = &self.process {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
    }
}

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
