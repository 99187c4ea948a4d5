//! Fencing on the node: what must not run twice stops when the node's Lease has not been renewed for a while
//! (`--fence-after`), so that others may start it elsewhere. [`seawall_quorum::fence`] decides; here it is carried out.
//!
//! The state is a small file on a filesystem that ends with the machine's uptime. The agent writes it with every
//! renewal. A *watchdog* reads it ten times a second and kills, by their cgroups, the guarded pods that may not run: all
//! of them when the time is over, and after that each one until it has its permit. The watchdog is a thread of the agent
//! with a timer of its own, and where there is a program for it ([`Config::program`]) a process beside the agent too,
//! which goes on when the agent is killed or hangs. Neither needs the API, containerd, or the agent's own tasks.
//!
//! Time is `CLOCK_BOOTTIME`: it goes on while the machine is suspended.
//!
//! What holds, and what does not:
//!
//! - An agent that is cut off, hangs, is killed, or whose runtime hangs: its guarded pods end within a fraction of a second
//!   after the time is over. They are frozen, killed and only then thawed, so that none of their code runs meanwhile, and what a runtime is just
//!   starting finds their cgroup frozen.
//! - A machine that was frozen as a whole and thaws: the agent starts nothing without a new permit, and the watchdog kills
//!   first of all. But the pods' processes wake up together with the watchdog, and may run for some milliseconds
//!   before it has had its turn. Software on the machine itself cannot do better.
//! - A machine whose kernel hangs, or on which processes do not even react to SIGKILL (they wait for a device): what runs
//!   there, runs. A hardware watchdog ([`Config::hardware`]) resets such a machine: it is only served as long as
//!   everything that had to stop has stopped.
//! - A virtual machine that its host stops and continues may not see that time has passed at all, not even by its hardware
//!   watchdog. Who does that has to fence at the host.
//! - Pods that were not a StatefulSet's and are adopted by one while the node is cut off are not guarded until the node
//!   hears of it.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use k8s_openapi::api::core::v1::Pod;
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;
use seawall_quorum::fence::{Effect, Epoch, Event, Fence, Instant};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{cgroup::Cgroups, pod};

/// How often the watchdog looks.
const LOOK: Duration = Duration::from_millis(100);
/// After so many looks without a file there is no agent any more that would write one.
const ABSENT: u32 = 100;
/// An annotation of the node's Lease: within so many milliseconds after this renewal the node has stopped what must not
/// run twice, unless it renews again.
pub const STOPS_WITHIN: &str = "seawall.dev/stops-within-ms";
/// The condition of a pod that is its permit.
pub const PERMIT: &str = "seawall.dev/Permitted";

/// How a node fences.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// `--fence-after`: how long after the last renewal pods that must not run twice stop. Zero: they do not.
    pub after: Duration,
    /// What the node promises: within so much time after a renewal they have stopped.
    pub promise: Duration,
    /// The watchdog as a process: a program and its arguments, to which the file and the pods' cgroup are added.
    pub program: Vec<String>,
    /// A hardware watchdog to serve, e.g. `/dev/watchdog`.
    pub hardware: Option<PathBuf>,
}

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Board {
    /// Which boot its times belong to.
    boot: String,
    fence: Fence,
}

/// The time since this machine began to run.
pub fn now() -> Instant {
    // This clock is there on every Linux since 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or(Duration::MAX)
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

impl Board {
    /// What the file says; none if there is none.
    fn read(path: &Path) -> io::Result<Option<Board>> {
        match fs::read(path) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let next = path.with_extension("next");
        fs::write(&next, serde_json::to_vec(self)?)?;
        fs::rename(next, path)
    }
}

/// Whether a pod must not run twice, as far as it says itself: a StatefulSet's. Of one with claims, the claims decide.
pub fn is_stateful(pod: &Pod) -> bool {
    let mut owners = pod.metadata.owner_references.iter().flatten();
    owners.any(|owner| owner.controller == Some(true) && owner.kind == "StatefulSet")
}

/// The claims that a pod refers to.
pub fn claims(pod: &Pod) -> Vec<String> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let of = volumes.filter_map(|volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(source), _) => Some(source.claim_name.clone()),
        (None, Some(_)) => Some(format!("{}-{}", pod::name(pod), volume.name)),
        (None, None) => None,
    });
    of.collect()
}

/// What the agent knows about fencing, and how it tells the watchdog.
pub struct Guard {
    config: Config,
    path: PathBuf,
    boot: String,
    cgroups: Cgroups,
    fence: Mutex<Fence>,
    changed: watch::Sender<u64>,
}

impl Guard {
    /// Picks up what is known from before a restart of the agent. Whatever has no permit will be stopped.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(config: Config, path: PathBuf, cgroups: &Cgroups) -> io::Result<Guard> {
        let boot = boot();
        // What cannot be understood says nothing; then everything has to stop, as on the first start.
        let old = Board::read(&path).unwrap_or_else(|error| {
            tracing::error!("{}: {error}: what must not run twice is stopped", path.display());
            None
        });
        let found = old.filter(|board| board.boot == boot).map(|board| board.fence);
        let is_new = found.is_none();
        let mut fence = found.unwrap_or_else(|| Fence::new(config.after));
        if !config.after.is_zero() {
            fence.set_after(config.after);
        }
        fence.step(now(), Event::Tick);
        // Of some pods nothing is left.
        let here: Vec<String> = cgroups.pods().into_iter().map(|(_, uid)| uid).collect();
        let gone: Vec<String> =
            fence.stopped(Instant::MAX).filter(|uid| !here.iter().any(|h| h == uid)).map(str::to_owned).collect();
        for uid in gone {
            fence.step(now(), Event::Forget { uid });
        }
        let guard = Guard {
            config,
            path,
            boot,
            cgroups: cgroups.clone(),
            fence: Mutex::new(fence),
            changed: watch::channel(0).0,
        };
        // With fencing switched off, an earlier promise is kept until the Lease no longer says so.
        if !guard.is_off() || !is_new {
            guard.write(&guard.fence.lock())?;
        }
        Ok(guard)
    }

    /// Whether nothing is ever stopped.
    pub fn is_off(&self) -> bool {
        self.config.after.is_zero()
    }

    /// What the Lease is to say, if anything.
    pub fn promise(&self) -> Option<String> {
        (!self.is_off()).then(|| self.config.promise.as_millis().to_string())
    }

    fn write(&self, fence: &Fence) -> io::Result<()> {
        Board { boot: self.boot.clone(), fence: fence.clone() }.write(&self.path)
    }

    /// Takes in what happened. What the watchdog cannot be told has not happened.
    fn step(&self, event: Event) {
        if self.is_off() {
            return;
        }
        let mut fence = self.fence.lock();
        let mut next = fence.clone();
        for effect in next.step(now(), event) {
            if let Effect::Stop(uid) = effect {
                tracing::warn!(
                    uid,
                    "the node's Lease was not renewed in time: a pod that must not run twice is stopped"
                );
            }
        }
        if next == *fence {
            return;
        }
        if let Err(error) = self.write(&next) {
            tracing::error!("{}: {error}: pods that must not run twice will be stopped", self.path.display());
            return;
        }
        *fence = next;
        drop(fence);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Time has passed.
    pub fn tick(&self) {
        self.step(Event::Tick);
    }

    /// The Lease was renewed by a request that was sent at `sent`.
    pub fn renewed(&self, sent: Instant) {
        if self.is_off() {
            // The Lease promises nothing any more.
            let _ = fs::remove_file(&self.path);
        }
        self.step(Event::Renewed { sent });
    }

    /// A pod must not run twice.
    pub fn guard(&self, uid: &str, running: bool) {
        if !self.fence.lock().guards(uid) {
            self.step(Event::Guard { uid: uid.to_owned(), running });
        }
    }

    /// A pod was written to in this epoch.
    pub fn permitted(&self, uid: &str, epoch: Epoch) {
        self.step(Event::Permitted { uid: uid.to_owned(), epoch });
        // The watchdog would do so in a moment; what is started now need not wait for it.
        if let (true, Err(error)) = (self.may_run(uid), self.cgroups.let_go(uid)) {
            tracing::warn!(uid, %error, "a pod that may run again could not be thawed; the watchdog tries again");
        }
    }

    /// Nothing is left of a pod, or it may run twice.
    pub fn forget(&self, uid: &str) {
        self.step(Event::Forget { uid: uid.to_owned() });
    }

    /// Whether a pod may run, guarded or not.
    pub fn may_run(&self, uid: &str) -> bool {
        let fence = self.fence.lock();
        self.is_off() || !fence.guards(uid) || fence.may_run(uid, now())
    }

    /// The epoch for which a pod needs a permit now, if it does.
    pub fn needs_permit(&self, uid: &str) -> Option<Epoch> {
        let fence = self.fence.lock();
        let now = now();
        let needs = !self.is_off() && fence.guards(uid) && !fence.is_over(now) && !fence.may_run(uid, now);
        needs.then(|| fence.epoch())
    }

    /// Tells of every change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Starts the watchdog: a thread, and the process if there is a program for it. The thread ends with what is returned;
    /// the process ends when the file has been gone for a while.
    ///
    /// # Errors
    /// If one of them cannot be started.
    pub fn watch(&self) -> io::Result<Watchdog> {
        let stop = Arc::new(AtomicBool::new(false));
        if self.is_off() && !self.path.exists() {
            return Ok(Watchdog { stop, thread: None });
        }
        let (path, groups, ends) = (self.path.clone(), self.cgroups.clone(), stop.clone());
        // The device can be held by one only: by the process, if there is one.
        let hardware = self.config.hardware.clone().filter(|_| self.config.program.is_empty());
        let mut device = hardware.map(|path| Device::open(&path)).transpose()?;
        let thread = thread::Builder::new().name("fence".into()).spawn(move || {
            let mut dog = Dog::new(path, groups);
            while !ends.load(Ordering::Relaxed) {
                let well = dog.look();
                if let (Some(device), true) = (&mut device, well) {
                    device.serve();
                }
                thread::park_timeout(LOOK);
            }
            if let Some(device) = device {
                device.close();
            }
        })?;
        if let (Some((program, arguments)), true) = (self.config.program.split_first(), self.path.exists()) {
            let mut command = std::process::Command::new(program);
            command.args(arguments).arg(&self.path).arg(self.cgroups.base());
            if let Some(device) = &self.config.hardware {
                command.arg("--hardware").arg(device);
            }
            // It outlives us, and nobody's signals to us are for it.
            std::os::unix::process::CommandExt::process_group(&mut command, 0);
            command.current_dir("/");
            let mut child = command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).spawn()?;
            // One that finds another at work ends at once; somebody has to take note.
            thread::Builder::new().name("fence-child".into()).spawn(move || child.wait())?;
        }
        Ok(Watchdog { stop, thread: Some(thread) })
    }
}

/// The watchdog's thread; it ends when this is dropped.
pub struct Watchdog {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// A file at one time: its number, size and when it was written, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark(u64, u64, i64, i64);

impl Mark {
    /// `None` if there is no such file.
    fn of(path: &Path) -> Option<Mark> {
        use std::os::unix::fs::MetadataExt as _;
        let file = fs::metadata(path).ok()?;
        Some(Mark(file.ino(), file.size(), file.mtime(), file.mtime_nsec()))
    }
}

/// Reads the file and kills what may not run.
struct Dog {
    path: PathBuf,
    cgroups: Cgroups,
    /// What the file said when it could last be read.
    board: Option<Board>,
    /// By what that file would be told from another.
    read: Option<Mark>,
    boot: String,
    /// The guarded pods that are known not to be held.
    free: BTreeSet<String>,
    complained: bool,
}

impl Dog {
    fn new(path: PathBuf, cgroups: Cgroups) -> Dog {
        Dog { path, cgroups, board: None, read: None, boot: boot(), free: BTreeSet::new(), complained: false }
    }

    /// One look. Whether nothing runs that may not.
    fn look(&mut self) -> bool {
        // Each write makes a file of its own, so one that has not changed need not be read ten times a second.
        let mark = Mark::of(&self.path);
        if mark.is_none() || mark != self.read {
            match Board::read(&self.path) {
                Ok(board) => (self.board, self.read) = (board, mark),
                // What was known goes on: its time ends by itself.
                Err(error) => {
                    self.read = None;
                    self.complain(|path| format!("{path}: {error}"));
                }
            }
        }
        let Some(board) = self.board.as_ref().filter(|board| board.boot == self.boot) else { return true };
        let over: BTreeSet<String> = board.fence.stopped(now()).map(str::to_owned).collect();
        let may: BTreeSet<String> = board.fence.pods().filter(|uid| !over.contains(*uid)).map(str::to_owned).collect();
        let mut well = true;
        for uid in over {
            match self.cgroups.hold_pod(&uid) {
                Ok(empty) => well &= empty,
                Err(error) => {
                    well = false;
                    self.complain(|_| format!("pod {uid} cannot be stopped: {error}"));
                }
            }
        }
        // A watchdog that begins does not know what one before it held.
        for uid in may.difference(&self.free.clone()) {
            if let Err(error) = self.cgroups.let_go(uid) {
                self.complain(|_| format!("pod {uid} cannot go on: {error}"));
            }
        }
        self.free = may;
        if well {
            self.complained = false;
        }
        well
    }

    fn complain(&mut self, text: impl FnOnce(std::path::Display<'_>) -> String) {
        if !std::mem::replace(&mut self.complained, true) {
            tracing::error!("{}", text(self.path.display()));
        }
    }
}

/// The watchdog as a process of its own: until the file has been gone for a while. Returns at once if another one is at
/// work.
///
/// # Errors
/// If the file cannot be locked, or the hardware watchdog not be opened.
pub fn run_watchdog(path: &Path, base: &str, hardware: Option<&Path>) -> io::Result<()> {
    let lock = File::create(path.with_extension("lock"))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Ok(()),
        Err(fs::TryLockError::Error(error)) => return Err(error),
    }
    let mut device = hardware.map(Device::open).transpose()?;
    let mut dog = Dog::new(path.to_owned(), Cgroups::detect(base));
    let mut missing = 0;
    while missing < ABSENT {
        missing = if path.exists() { 0 } else { missing + 1 };
        let well = dog.look();
        if let (Some(device), true) = (&mut device, well) {
            device.serve();
        }
        thread::park_timeout(LOOK);
    }
    if let Some(device) = device {
        device.close();
    }
    Ok(())
}

/// A hardware watchdog: it resets the machine when it is not served for its own time
/// (<https://docs.kernel.org/watchdog/watchdog-api.html>).
struct Device(File);

impl Device {
    fn open(path: &Path) -> io::Result<Device> {
        let file = OpenOptions::new().write(true).open(path)?;
        // Its time is the driver's; one that is longer than the controllers wait protects nothing.
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let name = if name == "watchdog" { "watchdog0" } else { name };
        let timeout = fs::read_to_string(format!("/sys/class/watchdog/{name}/timeout")).unwrap_or_default();
        tracing::info!(seconds = timeout.trim(), "{} resets this machine when it is not served", path.display());
        Ok(Device(file))
    }

    fn serve(&mut self) {
        if let Err(error) = self.0.write_all(b"\0") {
            tracing::error!("the hardware watchdog cannot be served: {error}");
        }
    }

    /// Leaves it without a reset, where the driver allows that.
    fn close(mut self) {
        let _ = self.0.write_all(b"V");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(after: u64) -> Config {
        Config { after: Duration::from_secs(after), promise: Duration::from_secs(17), ..Config::default() }
    }

    #[test]
    fn a_restarted_agent_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::detect("/kubepods-that-is-not-there");
        let open = |after| Guard::open(config(after), dir.path().join("fence.json"), &cgroups).unwrap();
        let guard = open(1000);
        guard.guard("a", false);
        assert!(!guard.may_run("a") && guard.may_run("another"));
        assert_eq!(guard.needs_permit("a"), None, "not before a renewal");
        guard.renewed(now());
        let epoch = guard.needs_permit("a").unwrap();
        guard.permitted("a", epoch);
        assert!(guard.may_run("a"));
        assert_eq!(guard.promise().as_deref(), Some("17000"));
        let board = Board::read(&dir.path().join("fence.json")).unwrap().unwrap();
        assert!(board.fence.may_run("a", now()), "the watchdog sees the same");
        // Of what has no cgroup nothing is left.
        assert!(!open(1000).fence.lock().guards("a"));
        // The time was over while no agent ran.
        let old = Board { boot: boot(), fence: Fence::new(Duration::from_secs(1)) };
        old.write(&dir.path().join("fence.json")).unwrap();
        assert_eq!(open(0).promise(), None);
        assert!(open(0).may_run("a"));
        open(0).renewed(now());
        assert!(!dir.path().join("fence.json").exists(), "the promise is over");
    }

    #[test]
    fn what_cannot_be_written_has_not_happened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/fence.json");
        fs::create_dir(dir.path().join("sub")).unwrap();
        let guard = Guard::open(config(1000), path.clone(), &Cgroups::detect("/not-there")).unwrap();
        guard.guard("a", false);
        fs::remove_dir_all(dir.path().join("sub")).unwrap();
        guard.renewed(now());
        assert_eq!(guard.needs_permit("a"), None, "the renewal does not count");
    }

    /// What is left of a test's cgroup.
    struct Group(Cgroups, String);

    impl Drop for Group {
        fn drop(&mut self) {
            let _ = self.0.hold_pod(&self.1);
            let _ = self.0.let_go(&self.1);
            let _ = self.0.remove_all();
        }
    }

    #[test]
    fn the_watchdog_kills_and_holds_and_lets_go() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("not root: cgroups cannot be made");
            return;
        }
        let cgroups = Cgroups::detect(&format!("/seawall-fence-test-{}", std::process::id()));
        let path = cgroups.pod_path(pod::qos::Qos::Guaranteed, "u");
        cgroups.create(&path, Default::default()).unwrap();
        let group = Group(cgroups.clone(), "u".into());
        let procs = cgroups.directories_of(&path).into_iter().map(|d| d.join("cgroup.procs")).collect::<Vec<_>>();
        let dir = tempfile::tempdir().unwrap();
        let (file, counter) = (dir.path().join("fence.json"), dir.path().join("counter"));
        // Counts ten times a second, and in a child of its own too.
        let count = || {
            let write = format!("while :; do echo x >> {}; sleep 0.02; done", counter.display());
            // It begins, and forks, when it is in its group.
            let mut child = std::process::Command::new("sh")
                .args(["-c", &format!("read begin; {{ {write}; }} & {write}")])
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap();
            procs.iter().for_each(|file| fs::write(file, child.id().to_string()).unwrap());
            // The watchdog may have killed it already.
            let _ = child.stdin.take().unwrap().write_all(b"now\n");
            child
        };
        let size = || fs::metadata(&counter).map_or(0, |m| m.len());
        let until = |what: &str, holds: &dyn Fn() -> bool| {
            let deadline = now() + Duration::from_secs(20);
            while !holds() {
                assert!(now() < deadline, "not in time: {what}");
                thread::park_timeout(Duration::from_millis(10));
            }
        };
        let write = |fence: &Fence| Board { boot: boot(), fence: fence.clone() }.write(&file).unwrap();
        let mut fence = Fence::new(Duration::from_secs(2));
        let renew = |fence: &mut Fence| {
            let t = now();
            fence.step(t, Event::Renewed { sent: t });
            fence.step(t, Event::Guard { uid: "u".into(), running: false });
            let epoch = fence.epoch();
            fence.step(t, Event::Permitted { uid: "u".into(), epoch });
        };
        renew(&mut fence);
        write(&fence);
        let (path, base) = (file.clone(), cgroups.base().to_owned());
        let dog = thread::spawn(move || run_watchdog(&path, &base, None));
        let mut first = count();
        until("it runs", &|| size() > 10);
        // Nobody renews: it ends by itself, without anybody writing to the file.
        let deadline = fence.deadline().unwrap();
        first.wait().unwrap();
        assert!(now() >= deadline, "not before its time");
        assert!(cgroups.hold_pod("u").unwrap(), "with all its children");
        // What is started now does not get anywhere.
        let (before, mut second) = (size(), count());
        second.wait().unwrap();
        assert_eq!(size(), before);
        renew(&mut fence);
        write(&fence);
        until("it is thawed", &|| {
            let state = Path::new("/sys/fs/cgroup/freezer")
                .join(cgroups.pod_path(pod::qos::Qos::Guaranteed, "u").trim_start_matches('/'));
            fs::read_to_string(state.join("freezer.state")).map_or(true, |s| s.trim() == "THAWED")
        });
        let before = size();
        let mut third = count();
        until("it runs again", &|| size() > before + 10);
        fs::remove_file(&file).unwrap();
        dog.join().unwrap().unwrap();
        drop(group);
        third.wait().unwrap();
    }

    #[test]
    fn what_is_guarded() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "ownerReferences": [{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "s", "uid": "u", "controller": true}]},
            "spec": {"containers": [], "volumes": [
                {"name": "a", "emptyDir": {}}, {"name": "b", "persistentVolumeClaim": {"claimName": "data"}},
                {"name": "c", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}}]},
        }))
        .unwrap();
        assert!(is_stateful(&pod) && !is_stateful(&Pod::default()));
        assert_eq!(claims(&pod), ["data", "p-c"]);
    }
}
