//! Pods' cgroups: `/kubepods[/burstable|/besteffort]/pod<uid>`, in cgroup v1's hierarchies or in v2's.
//!
//! <https://kubernetes.io/docs/concepts/architecture/cgroups/>

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::pod::qos::{CPU_PERIOD, Limits, Qos};

/// The host's cgroups, v1 or v2.
#[derive(Clone, Debug)]
pub struct Cgroups {
    root: PathBuf,
    v2: bool,
    base: String,
}

const CLASSES: [Qos; 3] = [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort];

/// The v1 controllers in which the agent makes groups itself; runc makes the rest.
const V1: [&str; 4] = ["cpu", "memory", "pids", "freezer"];
/// How often killed processes are looked at until they have ended, every two milliseconds.
const ENDING: usize = 25;

impl Cgroups {
    /// Looks at this host. Hybrid hosts (v1 controllers beside an empty v2) count as v1, as they do for runc.
    /// All pods go below `base`, e.g. `/kubepods`.
    pub fn detect(base: &str) -> Self {
        let root = PathBuf::from("/sys/fs/cgroup");
        let v2 = root.join("cgroup.controllers").exists();
        Self { root, v2, base: format!("/{}", base.trim_matches('/')) }
    }

    /// As [`Cgroups::detect`], for what is below another directory.
    #[cfg(test)]
    pub(crate) fn at(root: &Path, v2: bool) -> Self {
        Self { root: root.to_owned(), v2, base: "/kubepods".into() }
    }

    /// A file of a group. v2 knows no controllers' hierarchies.
    pub fn file(&self, controller: &str, path: &str, file: &str) -> PathBuf {
        let hierarchy = if self.v2 { self.root.clone() } else { self.root.join(controller) };
        hierarchy.join(path.trim_start_matches('/')).join(file)
    }

    /// Whether this is cgroup v2.
    pub fn is_v2(&self) -> bool {
        self.v2
    }

    /// The pod's group, as CRI's `cgroup_parent` wants it.
    pub fn pod_path(&self, qos: Qos, uid: &str) -> String {
        format!("{}/pod{uid}", self.class_path(qos))
    }

    fn class_path(&self, qos: Qos) -> String {
        match qos {
            Qos::Guaranteed => self.base.clone(),
            Qos::Burstable => format!("{}/burstable", self.base),
            Qos::BestEffort => format!("{}/besteffort", self.base),
        }
    }

    fn directories(&self, path: &str) -> Vec<PathBuf> {
        let path = path.trim_start_matches('/');
        if self.v2 {
            return vec![self.root.join(path)];
        }
        let present = V1.iter().map(|c| self.root.join(c)).filter(|d| d.exists());
        present.map(|d| d.join(path)).collect()
    }

    #[cfg(test)]
    pub(crate) fn directories_of(&self, path: &str) -> Vec<PathBuf> {
        self.directories(path)
    }

    /// One directory that stands for all pods: whoever has locked it manages them.
    pub fn directory(&self) -> PathBuf {
        let first = self.directories(&self.base).into_iter().next();
        first.unwrap_or_else(|| self.root.join(self.base.trim_start_matches('/')))
    }

    /// Makes the groups above all pods. Best-effort pods together weigh as little as one.
    pub fn prepare_node(&self) -> io::Result<()> {
        for qos in CLASSES {
            for directory in self.directories(&self.class_path(qos)) {
                self.make(&directory)?;
            }
        }
        self.apply(&self.class_path(Qos::BestEffort), Limits { cpu_shares: 2, ..Default::default() })
    }

    fn make(&self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        if self.v2 {
            // A controller works in a group only if each group above hands it down.
            for above in directory.ancestors().skip(1).take_while(|a| a.starts_with(&self.root)) {
                for controller in ["cpu", "memory", "pids", "cpuset", "io"] {
                    let _ = fs::write(above.join("cgroup.subtree_control"), format!("+{controller}"));
                }
            }
        }
        Ok(())
    }

    /// Makes a pod's group with its limits.
    pub fn create(&self, path: &str, limits: Limits) -> io::Result<()> {
        for directory in self.directories(path) {
            self.make(&directory)?;
        }
        self.apply(path, limits)
    }

    /// Gives a group other limits.
    pub fn apply(&self, path: &str, limits: Limits) -> io::Result<()> {
        let write = |controller: &str, file: &str, value: String| {
            let base = if self.v2 { self.root.clone() } else { self.root.join(controller) };
            let directory = base.join(path.trim_start_matches('/'));
            if directory.exists() { fs::write(directory.join(file), value) } else { Ok(()) }
        };
        if self.v2 {
            write("", "cpu.weight", v2_weight(limits.cpu_shares).to_string())?;
            if limits.cpu_quota > 0 {
                write("", "cpu.max", format!("{} {CPU_PERIOD}", limits.cpu_quota))?;
            }
            if limits.memory > 0 {
                write("", "memory.max", limits.memory.to_string())?;
            }
        } else {
            write("cpu", "cpu.shares", limits.cpu_shares.to_string())?;
            if limits.cpu_quota > 0 {
                write("cpu", "cpu.cfs_period_us", CPU_PERIOD.to_string())?;
                write("cpu", "cpu.cfs_quota_us", limits.cpu_quota.to_string())?;
            }
            if limits.memory > 0 {
                write("memory", "memory.limit_in_bytes", limits.memory.to_string())?;
            }
        }
        Ok(())
    }

    /// Removes every pod's group.
    pub fn remove_all(&self) -> io::Result<()> {
        self.remove(&self.base)
    }

    /// Removes a group and those below it, in every hierarchy. Fails while a process is in one of them.
    pub fn remove(&self, path: &str) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        if self.v2 {
            return remove_tree(&self.root.join(path));
        }
        for controller in fs::read_dir(&self.root)? {
            remove_tree(&controller?.path().join(path))?;
        }
        Ok(())
    }

    /// The group that all pods are below.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Kills every process of a pod and sees to it that no other one runs there until [`Cgroups::let_go`]. Says whether none
    /// is left. None of them runs on meanwhile.
    pub fn hold_pod(&self, uid: &str) -> io::Result<bool> {
        let mut empty = true;
        for qos in CLASSES {
            let path = self.pod_path(qos, uid);
            let path = path.trim_start_matches('/');
            empty &= if self.v2 { hold_v2(&self.root.join(path))? } else { self.hold_v1(path)? };
        }
        Ok(empty)
    }

    /// A pod that was held may run.
    pub fn let_go(&self, uid: &str) -> io::Result<()> {
        for qos in CLASSES {
            let path = self.pod_path(qos, uid);
            let (file, free) = if self.v2 { ("cgroup.freeze", "0") } else { ("freezer.state", "THAWED") };
            let group = if self.v2 { self.root.clone() } else { self.root.join("freezer") };
            let file = group.join(path.trim_start_matches('/')).join(file);
            if file.exists() {
                fs::write(file, free)?;
            }
        }
        Ok(())
    }

    fn hold_v1(&self, path: &str) -> io::Result<bool> {
        // Where the freezer is not mounted, any other hierarchy knows the processes too.
        let mut found = ["freezer", "pids", "memory", "cpu"].iter().map(|c| self.root.join(c).join(path));
        let Some(directory) = found.find(|directory| directory.exists()) else { return Ok(true) };
        let state = directory.join("freezer.state");
        let freezes = state.exists();
        let set = |word: &str| if freezes { fs::write(&state, word) } else { Ok(()) };
        set("FROZEN")?;
        if processes(&directory)?.is_empty() {
            return Ok(true);
        }
        // What was forked before the freezer had all of them is found the second time.
        let killed = (0..2).try_for_each(|_| kill_all(&processes(&directory)?));
        // A process has to be thawed to end; it does so before it gets back to its own code.
        set("THAWED")?;
        killed?;
        for _ in 0..ENDING {
            if processes(&directory)?.is_empty() {
                set("FROZEN")?;
                return Ok(processes(&directory)?.is_empty());
            }
            std::thread::park_timeout(Duration::from_millis(2));
        }
        Ok(false)
    }

    /// The uids of pods that have a group here.
    pub fn pods(&self) -> Vec<(Qos, String)> {
        let base = if self.v2 { self.root.clone() } else { self.root.join("cpu") };
        let mut found = Vec::new();
        for qos in CLASSES {
            let path = self.class_path(qos);
            for entry in fs::read_dir(base.join(path.trim_start_matches('/'))).into_iter().flatten().flatten() {
                if let Some(uid) = entry.file_name().to_str().and_then(|n| n.strip_prefix("pod")) {
                    found.push((qos, uid.to_owned()));
                }
            }
        }
        found
    }
}

/// With cgroup v2 the kernel kills a group as a whole, frozen or not (since 5.14).
fn hold_v2(directory: &Path) -> io::Result<bool> {
    let populated = || -> io::Result<bool> {
        let text = fs::read_to_string(directory.join("cgroup.events"))?;
        Ok(text.lines().any(|line| line == "populated 1"))
    };
    if !directory.exists() {
        return Ok(true);
    }
    fs::write(directory.join("cgroup.freeze"), "1")?;
    if !populated()? {
        return Ok(true);
    }
    match fs::write(directory.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => kill_all(&processes(directory)?)?,
        other => other?,
    }
    Ok(!populated()?)
}

/// The processes of a group and of those below it.
fn processes(directory: &Path) -> io::Result<Vec<i32>> {
    let gone =
        |error: &io::Error| error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV);
    let text = match fs::read_to_string(directory.join("cgroup.procs")) {
        Err(error) if gone(&error) => return Ok(Vec::new()),
        other => other?,
    };
    let mut found: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    let entries = match fs::read_dir(directory) {
        Err(error) if gone(&error) => return Ok(found),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(processes(&entry.path())?);
        }
    }
    Ok(found)
}

fn kill_all(pids: &[i32]) -> io::Result<()> {
    use nix::{errno::Errno, sys::signal, unistd::Pid};
    // 0 is a process of which only somebody else's namespace knows.
    for pid in pids.iter().filter(|pid| **pid > 0) {
        match signal::kill(Pid::from_raw(*pid), signal::Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// v1's shares (2..262144) on v2's scale (1..10000), as runc converts them.
fn v2_weight(shares: i64) -> i64 {
    1 + ((shares.clamp(2, 262_144) - 2) * 9999) / 262_142
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_weights() {
        let cgroups = Cgroups::detect("kubepods");
        assert_eq!(cgroups.pod_path(Qos::Guaranteed, "u"), "/kubepods/podu");
        assert_eq!(cgroups.pod_path(Qos::BestEffort, "u"), "/kubepods/besteffort/podu");
        assert_eq!((v2_weight(2), v2_weight(1024), v2_weight(262_144)), (1, 39, 10000));
    }

    #[test]
    fn groups_of_version_2() {
        let directory = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::at(directory.path(), true);
        let read = |file: &str| fs::read_to_string(directory.path().join(file)).ok();
        assert_eq!(
            cgroups.file("cpuset", "/", "cpuset.cpus.effective"),
            directory.path().join("cpuset.cpus.effective")
        );
        assert_eq!(cgroups.file("cpu", "/kubepods/podu", "cpu.max"), directory.path().join("kubepods/podu/cpu.max"));

        cgroups.prepare_node().unwrap();
        assert_eq!(read("kubepods/besteffort/cpu.weight").as_deref(), Some("1"));
        // Each controller is asked for by itself; a file keeps the last one that it was told.
        assert_eq!(read("kubepods/cgroup.subtree_control").as_deref(), Some("+io"));
        let limits = Limits { cpu_shares: 2048, cpu_quota: 200_000, memory: 1 << 20 };
        cgroups.create("/kubepods/podlimited", limits).unwrap();
        assert_eq!(read("kubepods/podlimited/cpu.max").as_deref(), Some("200000 100000"));
        assert_eq!(read("kubepods/podlimited/memory.max").as_deref(), Some("1048576"));
        // One whose containers have CPUs of their own has no quota.
        cgroups.create("/kubepods/podown", Limits { cpu_quota: 0, ..limits }).unwrap();
        assert_eq!(
            (read("kubepods/podown/cpu.max"), read("kubepods/podown/cpu.weight").as_deref()),
            (None, Some("79"))
        );
        cgroups.create("/kubepods/burstable/podb", Limits::default()).unwrap();
        let mut pods = cgroups.pods();
        pods.sort_by(|one, other| one.1.cmp(&other.1));
        let expect = [(Qos::Burstable, "b"), (Qos::Guaranteed, "limited"), (Qos::Guaranteed, "own")];
        assert_eq!(pods, expect.map(|(qos, uid)| (qos, uid.to_owned())));
    }
}
