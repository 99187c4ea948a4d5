//! A machine of a test's own: namespaces for network, mounts, processes, host name and cgroups.
//!
//! What a test starts there neither meets a cluster that runs on the host nor outlives the test: when the first process
//! dies, the kernel takes processes, mounts, interfaces and rules along.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// The address of every machine.
pub const ADDRESS: &str = "192.0.2.10";

/// A running machine.
pub struct Machine {
    name: String,
    starter: Child,
    init: i32,
}

impl Machine {
    /// Boots a machine.
    ///
    /// # Panics
    /// Without root, or if the kernel lacks what is needed.
    pub fn boot() -> Machine {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        assert!(nix::unistd::geteuid().is_root(), "this test makes namespaces and runs containers: run it as root");
        let name = format!("seawall-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut starter = Command::new("bash")
            .args(["-c", include_str!("machine.sh"), "machine.sh", &name])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash starts");
        let mut line = String::new();
        let stdout = starter.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("the machine says that it is ready");
        let init = child_of(starter.id());
        let machine = Machine { name, starter, init: init.unwrap_or_default() };
        assert_eq!(line, "ready\n", "the machine did not boot; its words are above");
        assert!(machine.init > 0, "the machine's first process was not found");
        machine
    }

    /// A command that runs on the machine: in its namespaces and cgroups, with the host's files. The child that is
    /// spawned is `nsenter`; [`child_of`] tells the program's own process.
    pub fn command(&self, program: impl AsRef<Path>) -> tokio::process::Command {
        let mut command = tokio::process::Command::new("nsenter");
        command.args(["--target", &self.init.to_string()]);
        command.args(["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--", "sh", "-c"]);
        let join = "for f in /sys/fs/cgroup/*/cgroup.procs /sys/fs/cgroup/init/cgroup.procs; do
            [ -e $f ] && case $f in *kubepods*) ;; *) echo 0 >$f ;; esac; done 2>/dev/null; exec \"$0\" \"$@\"";
        command.arg(join).arg(program.as_ref());
        command
    }

    /// Moves the calling thread, and with it all that it starts from now on, into the machine's network.
    pub fn enter_network(&self) {
        let namespace = File::open(format!("/proc/{}/ns/net", self.init)).expect("the machine's network is there");
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("the network is entered");
    }

    fn groups(&self) -> Vec<PathBuf> {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
        let cgroups = mounts.lines().filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (at, kind) = (words.next()?, words.next()?);
            kind.starts_with("cgroup").then(|| Path::new(at).join(&self.name))
        });
        cgroups.collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.init > 0 {
            let _ = kill(Pid::from_raw(self.init), Signal::SIGKILL);
        }
        let _ = self.starter.kill();
        let _ = self.starter.wait();
        for group in self.groups() {
            // The last processes may still be on their way out.
            let gone = (0..200).any(|_| {
                Command::new("find")
                    .arg(&group)
                    .args(["-depth", "-type", "d", "-exec", "rmdir", "{}", "+"])
                    .stderr(Stdio::null())
                    .status()
                    .is_ok_and(|status| status.success() || !group.exists())
            });
            if !gone {
                eprintln!("{} is left over", group.display());
            }
        }
    }
}

/// The first child of a process.
pub fn child_of(pid: u32) -> Option<i32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}
