//! A machine's cgroups: one group in every hierarchy of the host, v1 or v2.
//!
//! They hold everything that runs on the machine, so they are what a power cut kills and a freeze stops.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::error::{Cause, Step};

/// A mounted hierarchy of cgroups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Whether it is v2's.
    pub v2: bool,
    /// v1: the options that name it in a mount, e.g. `cpu,cpuacct` or `name=systemd`.
    pub options: String,
}

/// The leaf in which a machine's own processes are in v2, where a group that hands controllers down has none itself.
pub const LEAF: &str = "init";

/// All hierarchies of this host.
pub fn hierarchies() -> Step<Vec<Hierarchy>> {
    let path = "/proc/self/mountinfo";
    Ok(parse(&fs::read_to_string(path).map_err(Cause::io(path))?))
}

/// Reads `mountinfo` (`proc_pid_mountinfo(5)`).
fn parse(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (Some(mount), Some(kind)) = (left.split(' ').nth(4), right.split(' ').next()) else { continue };
        let v2 = match kind {
            "cgroup" => false,
            "cgroup2" => true,
            _ => continue,
        };
        let all = right.split(' ').nth(2).unwrap_or_default().split(',');
        let names =
            |o: &&str| !matches!(*o, "rw" | "ro" | "xattr" | "clone_children") && !o.starts_with("release_agent=");
        let options = if v2 { String::new() } else { all.filter(names).collect::<Vec<_>>().join(",") };
        // A hierarchy that is mounted twice is still one.
        if !found.iter().any(|h| h.v2 == v2 && h.options == options) {
            found.push(Hierarchy { mount: mount.into(), v2, options });
        }
    }
    found
}

impl Hierarchy {
    fn has(&self, controller: &str) -> bool {
        !self.v2 && self.options.split(',').any(|o| o == controller)
    }

    /// Makes a group that takes processes.
    fn create(&self, group: &Path) -> io::Result<()> {
        fs::create_dir_all(group)?;
        if self.has("cpuset") {
            // A new group of v1's cpuset is empty, and takes no process before it has these.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                fs::write(group.join(file), fs::read(self.mount.join(file))?)?;
            }
        }
        if self.v2 {
            hand_down(&self.mount);
        }
        Ok(())
    }
}

/// Lets the groups below `group` have its controllers. Those that the kernel refuses are not needed by anyone here.
pub fn hand_down(group: &Path) {
    let controllers = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// The groups of one machine, in every hierarchy.
#[derive(Clone, Debug)]
pub struct Groups {
    name: String,
    hierarchies: Vec<Hierarchy>,
}

impl Groups {
    /// The groups with this name, whether they exist or not.
    pub fn new(name: &str) -> Step<Groups> {
        let hierarchies = hierarchies()?;
        if hierarchies.is_empty() {
            return Err(Cause::Other("no cgroup hierarchy is mounted on this host".into()));
        }
        Ok(Groups { name: name.into(), hierarchies })
    }

    /// The names of all groups that begin with `prefix`.
    pub fn names(prefix: &str) -> Step<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for hierarchy in hierarchies()? {
            for entry in fs::read_dir(&hierarchy.mount).map_err(Cause::io(hierarchy.mount.display().to_string()))? {
                let Ok(entry) = entry else { continue };
                names.extend(entry.file_name().to_str().filter(|n| n.starts_with(prefix)).map(str::to_owned));
            }
        }
        Ok(names)
    }

    fn directories(&self) -> impl Iterator<Item = (&Hierarchy, PathBuf)> {
        self.hierarchies.iter().map(|h| (h, h.mount.join(&self.name)))
    }

    /// Makes the groups; with `cpus`, all in them together get so many CPUs.
    pub fn create(&self, cpus: Option<f64>) -> Step {
        const PERIOD: f64 = 100_000.0;
        for (hierarchy, group) in self.directories() {
            let shown = group.display().to_string();
            hierarchy.create(&group).map_err(Cause::io(format!("make {shown}")))?;
            let Some(cpus) = cpus else { continue };
            let quota = (cpus * PERIOD) as u64;
            if hierarchy.has("cpu") {
                fs::write(group.join("cpu.cfs_quota_us"), quota.to_string())
                    .map_err(Cause::io(format!("limit {shown}")))?;
            } else if group.join("cpu.max").exists() {
                fs::write(group.join("cpu.max"), format!("{quota} {PERIOD}"))
                    .map_err(Cause::io(format!("limit {shown}")))?;
            }
        }
        Ok(())
    }

    /// Moves the calling process into the groups. They must exist: a machine that was taken away meanwhile is not
    /// brought back half.
    pub fn join(&self) -> Step {
        for (hierarchy, group) in self.directories() {
            let leaf = group.join(LEAF);
            let group = if hierarchy.v2 && leaf.exists() { leaf } else { group };
            fs::write(group.join("cgroup.procs"), "0").map_err(Cause::io(format!("join {}", group.display())))?;
        }
        Ok(())
    }

    /// Whether any group is there.
    pub fn exist(&self) -> bool {
        self.directories().any(|(_, group)| group.exists())
    }

    /// Everything that runs in the groups and below.
    pub fn processes(&self) -> BTreeSet<i32> {
        let mut pids = BTreeSet::new();
        for (_, group) in self.directories() {
            walk(&group, &mut |directory| {
                let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
                // A process that this process namespace does not know is shown as 0.
                pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|pid| *pid > 0));
            });
        }
        pids
    }

    /// SIGKILL for everything, at one blow where the kernel can do that (v2's `cgroup.kill`, Linux 5.14).
    pub fn kill(&self) {
        for (_, group) in self.directories().filter(|(h, _)| h.v2) {
            let _ = fs::write(group.join("cgroup.kill"), "1");
        }
        // Whatever is left: v1 alone, an older kernel, or a process that entered between the two.
        for pid in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        // A task that v1 has frozen dies when it is thawed.
        for (_, group) in self.directories().filter(|(h, _)| h.has("freezer")) {
            let _ = fs::write(group.join("freezer.state"), "THAWED");
        }
    }

    /// Removes the groups; false while something holds one.
    pub fn remove(&self) -> bool {
        let mut gone = true;
        for (_, group) in self.directories() {
            walk(&group, &mut |directory| {
                let _ = fs::remove_dir(directory);
            });
            gone &= !group.exists();
        }
        gone
    }

    fn freezer(&self) -> Step<(bool, PathBuf)> {
        let v2 = self.directories().find(|(h, group)| h.v2 && group.join("cgroup.freeze").exists());
        let found = v2.or_else(|| self.directories().find(|(h, _)| h.has("freezer")));
        let none = || Cause::Other("this kernel has no freezer of cgroups".into());
        found.map(|(h, group)| (h.v2, group)).ok_or_else(none)
    }

    /// Asks the kernel to stop or continue everything in the groups; [`Groups::frozen`] says when it has.
    pub fn set_frozen(&self, frozen: bool) -> Step {
        let (v2, group) = self.freezer()?;
        let (file, value) = match (v2, frozen) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        fs::write(group.join(file), value).map_err(Cause::io(group.join(file).display().to_string()))
    }

    /// Whether all of it stands still.
    pub fn frozen(&self) -> bool {
        let Ok((v2, group)) = self.freezer() else { return false };
        let (file, word) = if v2 { ("cgroup.events", "frozen 1") } else { ("freezer.state", "FROZEN") };
        fs::read_to_string(group.join(file)).is_ok_and(|text| text.lines().any(|line| line == word))
    }
}

/// Visits a directory and all below it, the deepest first.
fn walk(directory: &Path, visit: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), visit);
        }
    }
    visit(directory);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_a_host() {
        let hybrid = "\
24 1 0:22 / /proc rw - proc proc rw
30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
31 25 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/lib/agent,name=systemd
32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
33 25 0:26 / /elsewhere rw - cgroup cgroup rw,cpu,cpuacct
";
        let found = parse(hybrid);
        let text: Vec<String> = found.iter().map(|h| format!("{} {} {}", h.mount.display(), h.v2, h.options)).collect();
        assert_eq!(
            text,
            [
                "/sys/fs/cgroup/cpu,cpuacct false cpu,cpuacct",
                "/sys/fs/cgroup/systemd false name=systemd",
                "/sys/fs/cgroup/unified true "
            ]
        );
        assert!(found[0].has("cpu") && !found[0].has("freezer") && !found[2].has("cpu"));
        assert_eq!(parse("29 24 0:25 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")[0].mount, Path::new("/sys/fs/cgroup"));
    }
}
