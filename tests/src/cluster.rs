//! A cluster on machines of the lab, in a directory of its own; taken away with everything when the test ends.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use seawall_drill::lab::{Cluster as Settings, Lab, Machine, Options};
use tempfile::TempDir;

use crate::{
    failure,
    kubectl::{Kubectl, has},
    seawall,
};

/// How long a command on a machine may take.
const LONG: Duration = Duration::from_secs(120);

/// A cluster under test.
pub struct Cluster {
    /// Its machines.
    pub lab: Lab,
    dir: TempDir,
}

/// What machines are joined by.
#[derive(Clone, Copy, Debug)]
pub struct Lan {
    /// How many networks, with a router between them.
    pub networks: u8,
    /// Whether machines have addresses of IPv6 as well.
    pub dual_stack: bool,
}

impl Default for Lan {
    fn default() -> Lan {
        Lan { networks: 1, dual_stack: false }
    }
}

impl Cluster {
    /// Boots the machines, and brings up a cluster on them if there are settings for one.
    ///
    /// # Panics
    /// Without root, or if it does not come up.
    pub async fn up(name: &str, servers: u8, agents: u8, cluster: Option<Settings>) -> Cluster {
        Cluster::up_on(Lan::default(), name, servers, agents, cluster).await
    }

    /// The same on other networks than one of IPv4.
    ///
    /// # Panics
    /// Without root, or if it does not come up.
    pub async fn up_on(lan: Lan, name: &str, servers: u8, agents: u8, cluster: Option<Settings>) -> Cluster {
        assert!(nix::unistd::geteuid().is_root(), "this test makes machines: run it as root");
        failure::listen();
        let dir = tempfile::Builder::new().prefix("seawall-cluster-test-").tempdir_in("/var/lib").unwrap();
        let options = Options {
            name: name.into(),
            dir: dir.path().join("labs"),
            servers,
            agents,
            subnet: None,
            networks: lan.networks,
            dual_stack: lan.dual_stack,
            cpus: None,
            binary: seawall(),
            cluster,
        };
        let lab = Lab::up(options, Arc::new(|line: &str| eprintln!("{line}"))).await.unwrap();
        Cluster { lab, dir }
    }

    /// The settings of a cluster as users get it, but for the cluster's DNS: its pods are of no use to most tests.
    pub fn fast() -> Option<Settings> {
        let without = vec!["--disable=dns".to_owned()];
        Some(Settings { server_args: without.clone(), agent_args: without, ..Cluster::with_dns()? })
    }

    /// The settings of a cluster as users get it.
    pub fn with_dns() -> Option<Settings> {
        Some(Settings { timing: "fast".into(), log: "info".into(), ..Settings::default() })
    }

    /// A machine.
    ///
    /// # Panics
    /// If there is none of this name.
    pub fn machine(&self, name: &str) -> Machine {
        self.lab.machine(name).unwrap()
    }

    /// The administrator's kubeconfig as a server has it now.
    ///
    /// # Panics
    /// If it has none.
    pub fn kubeconfig(&self, server: &str) -> String {
        fs::read_to_string(self.machine(server).on_disk("/var/lib/seawall/admin.kubeconfig")).unwrap()
    }

    /// kubectl from the host, at this server, with the kubeconfig that it has now.
    pub fn kubectl(&self, server: &str) -> Kubectl {
        self.kubectl_with(server, &self.kubeconfig(server), &format!("{server}.kubeconfig"))
    }

    /// kubectl from the host, at this server, with this kubeconfig, which is kept in `file`.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn kubectl_with(&self, server: &str, kubeconfig: &str, file: &str) -> Kubectl {
        let home = self.dir.path().join("home");
        fs::create_dir_all(&home).unwrap();
        let path = self.dir.path().join(file);
        fs::write(&path, kubeconfig.replace("127.0.0.1", &self.machine(server).address().to_string())).unwrap();
        Kubectl { kubeconfig: path, home }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let servers = self.lab.machines().into_iter().map(|m| m.name().to_owned());
            let served = |name: &String| self.machine(name).on_disk("/var/lib/seawall/admin.kubeconfig").exists();
            if let Some(server) = servers.into_iter().find(served) {
                self.kubectl(&server).post_mortem();
            }
            for machine in self.lab.machines() {
                last_lines(machine.name(), &machine.log(), 25);
                last_lines(&format!("etcd of {}", machine.name()), &machine.on_disk("/var/lib/seawall/etcd.log"), 12);
            }
            failure::repeat();
        }
        let down = Command::new(seawall())
            .args(["lab", "down", "--name", self.lab.name(), "--dir"])
            .arg(self.dir.path().join("labs"))
            .stderr(Stdio::null())
            .status();
        assert!(down.is_ok_and(|s| s.success()) || std::thread::panicking(), "the lab is not taken away");
    }
}

fn last_lines(of: &str, path: &Path, count: usize) {
    let Ok(text) = fs::read_to_string(path) else { return };
    let lines: Vec<&str> = text.lines().collect();
    eprintln!("--- {of}\n{}", lines[lines.len().saturating_sub(count)..].join("\n"));
}

/// Runs `seawall` on a machine; gives what it printed, and whether it succeeded.
///
/// # Panics
/// If it does not end.
pub async fn on(machine: &Machine, words: &str) -> (bool, String) {
    let mut command = machine.command("seawall");
    command.args(words.split_whitespace()).stdin(Stdio::null());
    let output = tokio::time::timeout(LONG, command.output()).await.expect("it ends").unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    eprintln!("{}: seawall {words}\n{}", machine.name(), failure::shortened(&text, 1500));
    (output.status.success(), text)
}

/// Runs `seawall` on a machine, where it has to succeed; gives what it printed.
///
/// # Panics
/// If it fails.
pub async fn works(machine: &Machine, words: &str) -> String {
    let (success, text) = on(machine, words).await;
    assert!(success, "{words}: {text}");
    text
}

/// Runs `seawall` on a machine, where it has to fail and to say all of this.
///
/// # Panics
/// If it succeeds, or says something else.
pub async fn fails(machine: &Machine, words: &str, parts: &[&str]) {
    let (success, text) = on(machine, words).await;
    assert!(!success, "{words} succeeded: {text}");
    has(&text, parts);
}
