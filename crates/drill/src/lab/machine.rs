//! A machine of a lab, seen from the host: its power, its cable, its processes.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::Instant,
};

use super::{
    boot::Boot,
    cgroup::Groups,
    error::{Cause, Error, Of as _, Result, Step},
    init::{SERVICE_FILE, Service, TOLD_FILE, Told},
    layout::{MachinePlace, Place, Role, Spec},
    network,
    state::{Guard, Hold, State, hand_on, lock, replace_file},
};

/// How long a boot may take before it has failed.
const BOOT: Duration = Duration::from_secs(30);
/// How long the kernel may take for anything.
const KERNEL: Duration = Duration::from_secs(20);
/// How long an orderly shutdown may take: the service's time to stop, and a little.
const SHUTDOWN: Duration = Duration::from_secs(100);

/// What a lab and its machines share.
#[derive(Debug)]
pub struct Inner {
    /// Its name and directory.
    pub place: Place,
    /// What it was made as.
    pub state: State,
}

/// A machine.
#[derive(Clone, Debug)]
pub struct Machine {
    pub(super) lab: Arc<Inner>,
    pub(super) spec: Spec,
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Power {
    /// It runs.
    On,
    /// It stands still, with its network.
    Frozen,
    /// It has no power.
    Off,
    /// Its first process is gone, or never came to be; `power-on` clears up and boots it.
    Broken,
}

impl Power {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Power::On => "on",
            Power::Frozen => "frozen",
            Power::Off => "off",
            Power::Broken => "broken",
        }
    }
}

/// A program that a machine runs outside of pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Program {
    /// The server or the agent.
    Seawall,
    /// The member of etcd.
    Etcd,
    /// The container runtime.
    Containerd,
}

impl Program {
    /// All of them.
    pub const ALL: [Program; 3] = [Program::Seawall, Program::Etcd, Program::Containerd];

    /// Its name.
    pub fn word(self) -> &'static str {
        match self {
            Program::Seawall => "seawall",
            Program::Etcd => "etcd",
            Program::Containerd => "containerd",
        }
    }
}

impl std::str::FromStr for Program {
    type Err = Error;

    fn from_str(name: &str) -> Result<Program> {
        Program::ALL.into_iter().find(|p| p.word() == name).ok_or_else(|| Error::Invalid {
            what: format!("process {name:?}"),
            why: "a machine's processes are seawall, etcd and containerd".into(),
        })
    }
}

/// A boot that runs: its first process, as the host numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The process.
    pub pid: i32,
    /// When it started, in ticks since the host's boot: tells it from a later process of the same number.
    pub started: u64,
}

impl Running {
    fn of(pid: i32) -> Option<Running> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command may hold spaces; it ends at the last parenthesis. State is field 3, threads 20, start time 22.
        let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
        // The first thread may have ended while others, and with them all open files, have not.
        let ended = matches!(fields.first(), Some(&("Z" | "X"))) && !fields.get(17)?.parse().is_ok_and(|n: u32| n > 1);
        (!ended).then_some(Running { pid, started: fields.get(19)?.parse().ok()? })
    }

    /// The running boot of a machine.
    pub fn read(place: &MachinePlace) -> Option<Running> {
        let text = fs::read_to_string(place.running_file()).ok()?;
        let running: Running = serde_json::from_str(&text).ok()?;
        running.alive().then_some(running)
    }

    fn alive(self) -> bool {
        Running::of(self.pid) == Some(self)
    }
}

impl Machine {
    /// Its name: host name and node name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// What it is for.
    pub fn role(&self) -> Role {
        self.spec.role
    }

    /// Its address on the LAN; the same after every boot.
    pub fn address(&self) -> Ipv4Addr {
        self.spec.address
    }

    /// Its addresses of all families, as `--node-ip` takes them.
    pub fn addresses(&self) -> String {
        let six = self.spec.address6.map(|ip| format!(",{ip}")).unwrap_or_default();
        format!("{}{six}", self.spec.address)
    }

    /// What survives a power cut, seen from the host.
    pub fn disk(&self) -> PathBuf {
        self.place().disk()
    }

    /// A file or directory on the machine's disk that is one of `/var/lib/seawall`, `/var/lib/containerd`,
    /// `/var/lib/etcd`, `/var/lib/kubelet`, `/var/lib/cni`, `/var/log`, or below.
    pub fn on_disk(&self, path: &str) -> PathBuf {
        let path = path.trim_start_matches('/');
        for top in super::boot::DIRECTORIES {
            if let Some(rest) = path.strip_prefix(top)
                && (rest.is_empty() || rest.starts_with('/'))
            {
                return self.disk().join(top.replace('/', "-")).join(rest.trim_start_matches('/'));
            }
        }
        // The rest is layers over the host's files.
        self.disk().join(path)
    }

    /// The log of its service.
    pub fn log(&self) -> PathBuf {
        self.place().service_log()
    }

    /// The log of its first process.
    pub fn console(&self) -> PathBuf {
        self.place().console()
    }

    /// Its network namespace, as long as it has power.
    pub fn network(&self) -> PathBuf {
        network::namespace(&self.group())
    }

    pub(super) fn place(&self) -> MachinePlace {
        self.lab.place.machine(&self.spec.name)
    }

    fn group(&self) -> String {
        self.lab.place.of_machine(&self.spec.name)
    }

    fn groups(&self) -> Result<Groups> {
        Groups::new(&self.group()).of(self.name(), "find its cgroups")
    }

    async fn lock(&self) -> Result<(Guard, Guard)> {
        let lab = lock(&self.lab.place.lock_file(), Hold::Shared, &self.lab.place.lab).await?;
        Ok((lab, lock(&self.place().lock_file(), Hold::Alone, &self.lab.place.lab).await?))
    }

    /// What it is doing, as the kernel knows it.
    pub fn power(&self) -> Result<Power> {
        let groups = self.groups()?;
        if Running::read(&self.place()).is_some() {
            return Ok(if groups.frozen() { Power::Frozen } else { Power::On });
        }
        let nothing = !groups.exist() && !network::namespace(&self.group()).exists();
        Ok(if nothing { Power::Off } else { Power::Broken })
    }

    fn must_be(&self, wanted: &[Power], hint: &str) -> Result<Power> {
        let power = self.power()?;
        if wanted.contains(&power) {
            return Ok(power);
        }
        Err(Error::State { machine: self.spec.name.clone(), state: power.word(), hint: hint.into() })
    }

    /// Boots it from its disk, with a new network at the same address.
    pub async fn power_on(&self) -> Result<()> {
        let _lock = self.lock().await?;
        self.must_be(&[Power::Off, Power::Broken], "it has power already")?;
        self.boot().await
    }

    /// [`Machine::power_on`] for who holds the locks.
    pub(super) async fn boot(&self) -> Result<()> {
        let name = self.name();
        self.clear().await?;
        let place = self.place();
        let made = fs::create_dir_all(place.conf());
        made.map_err(Cause::io(place.conf().display().to_string())).of(name, "make its directory")?;
        let boot = Boot {
            machine: name.into(),
            group: self.group(),
            dir: place.dir.clone(),
            labs: self.lab.place.labs.clone(),
            binary: self.lab.state.binary.clone(),
            hosts: self.lab.state.machines.iter().map(|m| (m.name.clone(), m.address)).collect(),
        };
        let text = serde_json::to_string_pretty(&boot).map_err(std::io::Error::from);
        let written = text.and_then(|text| replace_file(&place.boot_file(), &text));
        written.map_err(Cause::io(place.boot_file().display().to_string())).of(name, "say how to boot")?;
        let _ = fs::remove_file(place.conf().join(TOLD_FILE));
        self.groups()?.create(self.lab.state.cpus).of(name, "make its cgroups")?;
        network::plug(&self.lab.place, &self.lab.state, &self.spec).await.of(name, "make its network")?;
        let started = tokio::time::timeout(BOOT, self.start()).await;
        let started =
            started.unwrap_or_else(|_| Err(Cause::Late { what: "its first process is up".into(), limit: BOOT }));
        if let Err(cause) = started {
            // Nothing half is left; the console says more.
            let _ = self.clear().await;
            return Err(cause).of(name, format!("boot (see {})", place.console().display()));
        }
        Ok(())
    }

    async fn start(&self) -> Step {
        let place = self.place();
        let mut command = Command::new(&self.lab.state.binary);
        command.args(["lab", "start", "--machine"]).arg(&place.dir);
        command.env_clear().env("PATH", super::init::PATH).env("SEAWALL_LOG", "info");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        command.stderr(super::open_log(&place.console())?);
        let what = self.lab.state.binary.display().to_string();
        hand_on(command.as_std_mut());
        let mut child = command.spawn().map_err(Cause::io(what.clone()))?;
        let Some(stdout) = child.stdout.take() else { return Err(Cause::Other("no words from the starter".into())) };
        let mut lines = BufReader::new(stdout).lines();
        // In any order: the machine may be up before its starter gets to say what it started.
        let (mut running, mut ready) = (None, false);
        while let Some(line) = lines.next_line().await.map_err(Cause::io(what.clone()))? {
            match line.split_once(' ').unwrap_or((&line, "")) {
                ("pid", pid) => running = pid.parse().ok().and_then(Running::of),
                ("error", said) => return Err(Cause::Other(said.into())),
                ("ready", _) => ready = true,
                _ => {}
            }
            if let Some(running) = running
                && ready
            {
                let ended = child.wait().await.map_err(Cause::io(what))?;
                if !ended.success() {
                    return Err(Cause::Other(format!("its starter failed: {ended}")));
                }
                let text = serde_json::to_string(&running).map_err(std::io::Error::from);
                return text.and_then(|t| replace_file(&place.running_file(), &t)).map_err(Cause::io("running.json"));
            }
        }
        Err(Cause::Other("it ended before it was up".into()))
    }

    /// Takes away everything of the machine that is not its disk, in whatever state it is.
    pub(super) async fn clear(&self) -> Result<()> {
        let name = self.name();
        clear_groups(&self.group()).await.of(name, "end its processes")?;
        network::unplug(&self.lab.place, name).await.of(name, "take its network away")?;
        let _ = fs::remove_file(self.place().running_file());
        Ok(())
    }

    /// Takes its cable out, as the first thing of [`Machine::power_off`] that anybody feels: who wants to know when the
    /// machine was gone for the others does it by itself.
    pub async fn pull_cable(&self) -> Result<()> {
        let _lock = self.lock().await?;
        network::pull_cable(&self.lab.place, self.name()).await.of(self.name(), "pull its cable")
    }

    /// Cuts its power: the cable first, so that no connection says goodbye, then every process at once. The disk stays,
    /// unless it is wiped.
    pub async fn power_off(&self, wipe: bool) -> Result<()> {
        let _lock = self.lock().await?;
        network::pull_cable(&self.lab.place, self.name()).await.of(self.name(), "pull its cable")?;
        self.clear().await?;
        if wipe {
            let disk = self.disk();
            remove_tree(&disk).await.of(self.name(), "wipe its disk")?;
        }
        Ok(())
    }

    /// Shuts it down in order and boots it again.
    pub async fn reboot(&self) -> Result<()> {
        let _lock = self.lock().await?;
        self.must_be(&[Power::On], "only a machine that runs can be rebooted: power it on, or thaw it")?;
        self.signal(Signal::SIGTERM)?;
        let (place, what) = (self.place(), "it has shut down");
        until(SHUTDOWN, what, || Running::read(&place).is_none().then_some(())).await.of(self.name(), "shut down")?;
        self.boot().await
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let running = Running::read(&self.place()).ok_or_else(|| Error::State {
            machine: self.spec.name.clone(),
            state: Power::Off.word(),
            hint: format!("power it on: seawall lab power-on {} --name {}", self.spec.name, self.lab.place.lab),
        })?;
        let sent = kill(Pid::from_raw(running.pid), signal);
        sent.map_err(Cause::errno(format!("send {signal}"))).of(self.name(), "signal its first process")
    }

    /// Stops everything on it, as a machine hangs whose network card still answers.
    pub async fn freeze(&self) -> Result<()> {
        self.set_frozen(true).await
    }

    /// Lets it go on.
    pub async fn thaw(&self) -> Result<()> {
        self.set_frozen(false).await
    }

    async fn set_frozen(&self, frozen: bool) -> Result<()> {
        let _lock = self.lock().await?;
        let step = if frozen { "freeze" } else { "thaw" };
        self.must_be(&[Power::On, Power::Frozen], &format!("there is nothing to {step}"))?;
        let groups = self.groups()?;
        groups.set_frozen(frozen).of(self.name(), step)?;
        until(KERNEL, step, || (groups.frozen() == frozen).then_some(())).await.of(self.name(), step)
    }

    /// A command that runs a program on the machine, with its files, network and processes. It ends when the returned
    /// one is killed.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(&self.lab.state.binary);
        command.args(["--log", "error", "lab", "enter", "--machine"]).arg(self.place().dir).arg("--").arg(program);
        command
    }

    /// Runs a program to its end and gives what it wrote; its failure is an error with its last words.
    pub async fn run(&self, program: &str, args: &[&str], limit: Duration) -> Result<String> {
        let mut command = self.command(program);
        command.args(args).stdin(Stdio::null()).kill_on_drop(true);
        let (shown, step) = (format!("{program} {}", args.join(" ")), format!("run {program}"));
        let output = tokio::time::timeout(limit, command.output()).await;
        let late = |_| Cause::Late { what: format!("`{shown}` ends"), limit };
        let output = output.map_err(late).and_then(|o| o.map_err(Cause::io(shown.clone()))).of(self.name(), &step)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Cause::Program { program: shown, said }).of(self.name(), step)
    }

    /// Every process of the machine, pods' included, as the host numbers them.
    pub fn processes(&self) -> Result<Vec<i32>> {
        Ok(self.groups()?.processes().into_iter().collect())
    }

    /// The process of a program outside of pods.
    pub fn pid_of(&self, program: Program) -> Result<Option<i32>> {
        Ok(self.processes()?.into_iter().find(|pid| is(*pid, program)))
    }

    /// Kills one program, and only that; gives its process's number. Whoever keeps it running starts it again.
    pub async fn kill(&self, program: Program) -> Result<i32> {
        let pid = self.pid_of(program)?.and_then(Running::of);
        let Some(running) = pid else {
            let state = self.power()?.word();
            let hint = format!("{} does not run there", program.word());
            return Err(Error::State { machine: self.spec.name.clone(), state, hint });
        };
        let step = format!("kill {}", program.word());
        let sent = kill(Pid::from_raw(running.pid), Signal::SIGKILL);
        sent.map_err(Cause::errno(format!("kill {}", running.pid))).of(self.name(), &step)?;
        until(KERNEL, &step, || (!running.alive()).then_some(())).await.of(self.name(), &step)?;
        Ok(running.pid)
    }

    /// What it is told to run.
    pub fn service(&self) -> Service {
        let text = fs::read_to_string(self.place().conf().join(SERVICE_FILE)).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// Tells it what to run, now and at every boot.
    pub fn set_service(&self, service: &Service) -> Result<()> {
        let path = self.place().conf().join(SERVICE_FILE);
        let made = fs::create_dir_all(self.place().conf());
        let text = made.and_then(|()| serde_json::to_string_pretty(service).map_err(Into::into));
        let written = text.and_then(|text| replace_file(&path, &text));
        written.map_err(Cause::io(path.display().to_string())).of(self.name(), "say what to run")?;
        if Running::read(&self.place()).is_some() { self.signal(Signal::SIGHUP) } else { Ok(()) }
    }

    /// Starts or stops its service in order, and waits until it is so.
    pub async fn set_running(&self, run: bool) -> Result<()> {
        self.set_service(&Service { run, ..self.service() })?;
        let step = if run { "start its service" } else { "stop its service" };
        until(SHUTDOWN, step, || (self.told().running == run).then_some(())).await.of(self.name(), step)
    }

    /// What its first process says of the service.
    pub fn told(&self) -> Told {
        let text = fs::read_to_string(self.place().conf().join(TOLD_FILE)).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }
}

/// Whether a process is this program, and not in a pod.
fn is(pid: i32, program: Program) -> bool {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    if read("comm").trim_end() != program.word() || read("cgroup").contains("/kubepods") {
        return false;
    }
    // The lab's own processes on the machine are the same program.
    let arguments = read("cmdline");
    program != Program::Seawall || arguments.split('\0').any(|a| a == "server" || a == "agent")
}

/// Kills all that is in the groups with this name, and removes them.
pub async fn clear_groups(name: &str) -> Step {
    let groups = Groups::new(name)?;
    until(KERNEL, "every process of it has ended and its cgroups are gone", || {
        // Again each time: a process that was about to start when it was killed may just have joined.
        if groups.exist() {
            groups.kill();
        }
        groups.remove().then_some(())
    })
    .await
}

/// Removes a directory with everything in it.
pub async fn remove_tree(path: &Path) -> Step {
    let owned = path.to_owned();
    let removed = tokio::task::spawn_blocking(move || match fs::remove_dir_all(&owned) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    });
    let removed = removed.await.map_err(|e| Cause::Other(e.to_string()))?;
    removed.map_err(Cause::io(format!("remove {}", path.display())))
}

/// Waits until `holds` gives a value.
pub async fn until<T>(limit: Duration, what: &str, mut holds: impl FnMut() -> Option<T>) -> Step<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = holds() {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            return Err(Cause::Late { what: what.into(), limit });
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
