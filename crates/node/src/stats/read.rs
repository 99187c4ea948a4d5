//! What the kernel has counted: of a cgroup, of the machine, of a network, of a file system.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use serde::Serialize;

use crate::{cgroup::Cgroups, pressure::meminfo};

/// What the processes of a cgroup have used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time since the group was made, in nanoseconds.
    pub cpu: u64,
    /// Bytes of memory, with the files that are cached for it.
    pub memory: u64,
    /// Bytes of memory, without the cached files that have not been used lately: what cannot be taken back at once.
    pub working_set: u64,
    /// Bytes of memory that belong to no file.
    pub rss: u64,
    /// How many bytes it may have, `None` for as many as there are.
    pub limit: Option<u64>,
    /// Page faults.
    pub faults: u64,
    /// Page faults for which a disk was read.
    pub major_faults: u64,
}

/// Where a version of cgroups keeps the same numbers.
struct Names {
    cpu: (&'static str, &'static str),
    memory: &'static str,
    inactive: &'static str,
    rss: &'static str,
    faults: &'static str,
    major: &'static str,
}

const V1: Names = Names {
    cpu: ("cpuacct", "cpuacct.usage"),
    memory: "memory.usage_in_bytes",
    inactive: "total_inactive_file",
    rss: "total_rss",
    faults: "total_pgfault",
    major: "total_pgmajfault",
};
const V2: Names = Names {
    cpu: ("", "cpu.stat"),
    memory: "memory.current",
    inactive: "inactive_file",
    rss: "anon",
    faults: "pgfault",
    major: "pgmajfault",
};

/// A number of a file of `name number` lines.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// What a limit's file says; one that no machine has is none.
fn limit(text: &str) -> Option<u64> {
    number(text).filter(|bytes| *bytes < 1 << 60)
}

/// Reads what a group has used; `None` if it is not there (any more).
pub fn usage(cgroups: &Cgroups, path: &str) -> Option<Usage> {
    let names = if cgroups.is_v2() { &V2 } else { &V1 };
    let read = |controller: &str, file: &str| fs::read_to_string(cgroups.file(controller, path, file)).ok();
    let cpu = read(names.cpu.0, names.cpu.1)?;
    let cpu = if cgroups.is_v2() { keyed(&cpu, "usage_usec")?.saturating_mul(1000) } else { number(&cpu)? };
    let memory = number(&read("memory", names.memory)?)?;
    let stat = read("memory", "memory.stat")?;
    let of = |key: &str| keyed(&stat, key).unwrap_or_default();
    let limit = match cgroups.is_v2() {
        true => read("memory", "memory.max").as_deref().and_then(limit),
        false => keyed(&stat, "hierarchical_memory_limit").filter(|bytes| *bytes < 1 << 60),
    };
    Some(Usage {
        cpu,
        memory,
        working_set: memory.saturating_sub(of(names.inactive)),
        rss: of(names.rss),
        limit,
        faults: of(names.faults),
        major_faults: of(names.major),
    })
}

/// How often a group had to wait for its CPU quota.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Throttled {
    /// Periods that have passed.
    pub periods: u64,
    /// Those in which it had to wait.
    pub throttled: u64,
    /// For how long, in nanoseconds.
    pub nanos: u64,
}

/// Reads it; `None` if the group is not there.
pub fn throttled(cgroups: &Cgroups, path: &str) -> Option<Throttled> {
    let text = fs::read_to_string(cgroups.file("cpu", path, "cpu.stat")).ok()?;
    let of = |key: &str| keyed(&text, key);
    let nanos = of("throttled_time").or_else(|| of("throttled_usec").map(|micros| micros.saturating_mul(1000)));
    Some(Throttled {
        periods: of("nr_periods").unwrap_or_default(),
        throttled: of("nr_throttled").unwrap_or_default(),
        nanos: nanos.unwrap_or_default(),
    })
}

/// How many processes and threads a group has.
pub fn processes(cgroups: &Cgroups, path: &str) -> Option<u64> {
    number(&fs::read_to_string(cgroups.file("pids", path, "pids.current")).ok()?)
}

/// Some process of a group, if it has one.
pub fn a_process(cgroups: &Cgroups, path: &str) -> Option<u32> {
    let text = fs::read_to_string(cgroups.file("memory", path, "cgroup.procs")).ok()?;
    text.lines().find_map(|line| line.parse().ok()).filter(|pid| *pid > 0)
}

/// What the whole machine has used. Memory that is available ([`crate::pressure`]) is no part of its working set.
pub fn machine() -> Option<Usage> {
    let memory = fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |key: &str| meminfo(&memory, key).and_then(|bytes| u64::try_from(bytes).ok());
    let (all, free) = (bytes("MemTotal")?, bytes("MemFree")?);
    let faults = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    Some(Usage {
        cpu: cpu_of_machine(&fs::read_to_string("/proc/stat").ok()?)?,
        memory: all.saturating_sub(free),
        working_set: all.saturating_sub(bytes("MemAvailable")?),
        rss: bytes("AnonPages").unwrap_or_default(),
        limit: Some(all),
        faults: keyed(&faults, "pgfault").unwrap_or_default(),
        major_faults: keyed(&faults, "pgmajfault").unwrap_or_default(),
    })
}

/// The nanoseconds in `/proc/stat` that were not idle, nor spent waiting, nor other guests'.
fn cpu_of_machine(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq, in hundredths of a second on every Linux.
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|index| ticks.get(*index)).sum();
    (ticks.len() >= 7).then(|| busy.saturating_mul(10_000_000))
}

/// When the machine was switched on, in seconds of Unix time.
pub fn booted() -> Option<i64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    i64::try_from(keyed(&text, "btime")?).ok()
}

/// What went through one interface of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Bytes that came.
    pub rx_bytes: u64,
    /// What came broken.
    pub rx_errors: u64,
    /// Bytes that went.
    pub tx_bytes: u64,
    /// What could not be sent.
    pub tx_errors: u64,
}

/// The interfaces that a process sees.
pub fn interfaces(pid: &str) -> Vec<Interface> {
    parse_interfaces(&fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default())
}

fn parse_interfaces(text: &str) -> Vec<Interface> {
    let one = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let n: Vec<u64> = numbers.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        Some(Interface {
            name: name.trim().to_owned(),
            rx_bytes: *n.first()?,
            rx_errors: *n.get(2)?,
            tx_bytes: *n.get(8)?,
            tx_errors: *n.get(10)?,
        })
    };
    // The loopback is nobody's traffic.
    text.lines().filter_map(one).filter(|interface| interface.name != "lo").collect()
}

/// How full a file system is, or how much of one is used by something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Disk {
    /// Bytes that may still be written.
    pub available_bytes: u64,
    /// Bytes in all.
    pub capacity_bytes: u64,
    /// Bytes that are used.
    pub used_bytes: u64,
    /// Files that may still be made.
    pub inodes_free: u64,
    /// Files in all.
    pub inodes: u64,
    /// Files that are there.
    pub inodes_used: u64,
}

impl Disk {
    /// The file system that a path is on.
    pub fn of(path: &Path) -> Option<Disk> {
        let stat = nix::sys::statvfs::statvfs(path).ok()?;
        let size = stat.fragment_size();
        Some(Disk {
            available_bytes: stat.blocks_available().saturating_mul(size),
            capacity_bytes: stat.blocks().saturating_mul(size),
            used_bytes: stat.blocks().saturating_sub(stat.blocks_free()).saturating_mul(size),
            inodes_free: stat.files_available(),
            inodes: stat.files(),
            inodes_used: stat.files().saturating_sub(stat.files_free()),
        })
    }

    /// The same file system, of which so much is used.
    pub fn with(self, taken: Taken) -> Disk {
        Disk { used_bytes: taken.bytes, inodes_used: taken.inodes, ..self }
    }
}

/// What something takes of a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Bytes of blocks.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

impl std::ops::Add for Taken {
    type Output = Taken;

    fn add(self, other: Taken) -> Taken {
        Taken { bytes: self.bytes.saturating_add(other.bytes), inodes: self.inodes.saturating_add(other.inodes) }
    }
}

/// How many files are looked at for one directory: a pod with more than these is known to have these.
const MOST_FILES: u64 = 1_000_000;

/// What a directory takes, other file systems left out. Several names of one file count as often.
pub fn taken(directory: &Path) -> Taken {
    let Ok(top) = fs::symlink_metadata(directory) else { return Taken::default() };
    let mut sum = Taken { bytes: top.blocks().saturating_mul(512), inodes: 1 };
    let mut todo = vec![directory.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.dev() != top.dev() {
                continue;
            }
            sum = sum + Taken { bytes: meta.blocks().saturating_mul(512), inodes: 1 };
            if sum.inodes >= MOST_FILES {
                return sum;
            }
            if meta.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(files: &[(&str, &str)], v2: bool) -> (tempfile::TempDir, Cgroups) {
        let root = tempfile::tempdir().unwrap();
        for (file, content) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let cgroups = Cgroups::at(root.path(), v2);
        (root, cgroups)
    }

    #[test]
    fn both_versions_of_cgroups() {
        let (_root, v1) = group(
            &[
                ("cpuacct/p/c/cpuacct.usage", "1234\n"),
                ("memory/p/c/memory.usage_in_bytes", "1000\n"),
                (
                    "memory/p/c/memory.stat",
                    "cache 5\nhierarchical_memory_limit 4096\ntotal_rss 600\ntotal_inactive_file 300\ntotal_pgfault 7\ntotal_pgmajfault 2\n",
                ),
                ("cpu/p/c/cpu.stat", "nr_periods 9\nnr_throttled 4\nthrottled_time 77\n"),
                ("pids/p/c/pids.current", "3\n"),
                ("memory/p/c/cgroup.procs", "17\n18\n"),
            ],
            false,
        );
        let expect = Usage {
            cpu: 1234,
            memory: 1000,
            working_set: 700,
            rss: 600,
            limit: Some(4096),
            faults: 7,
            major_faults: 2,
        };
        assert_eq!(usage(&v1, "/p/c"), Some(expect));
        assert_eq!(throttled(&v1, "/p/c"), Some(Throttled { periods: 9, throttled: 4, nanos: 77 }));
        assert_eq!((processes(&v1, "/p/c"), a_process(&v1, "/p/c")), (Some(3), Some(17)));
        assert_eq!(usage(&v1, "/p/other"), None);

        let (_root, v2) = group(
            &[
                ("p/c/cpu.stat", "usage_usec 5\nuser_usec 4\nnr_periods 1\nnr_throttled 1\nthrottled_usec 2\n"),
                ("p/c/memory.current", "100\n"),
                ("p/c/memory.max", "max\n"),
                ("p/c/memory.stat", "anon 40\nfile 50\ninactive_file 200\npgfault 1\npgmajfault 0\n"),
            ],
            true,
        );
        // More cached files than memory can be read between two moments; then nothing else is in use.
        let expect = Usage { cpu: 5000, memory: 100, working_set: 0, rss: 40, limit: None, faults: 1, major_faults: 0 };
        assert_eq!(usage(&v2, "p/c"), Some(expect));
        assert_eq!(throttled(&v2, "p/c"), Some(Throttled { periods: 1, throttled: 1, nanos: 2000 }));
        assert_eq!((processes(&v2, "p/c"), a_process(&v2, "p/c")), (None, None));
        assert_eq!((limit("9223372036854771712"), limit("max"), limit("4096\n")), (None, None, Some(4096)));
    }

    #[test]
    fn the_machine() {
        assert_eq!(cpu_of_machine("cpu  1 2 3 400 500 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1\n"), Some(190_000_000));
        assert_eq!(cpu_of_machine("intr 5\n"), None);
        let now = machine().unwrap();
        assert!(now.cpu > 0 && now.working_set > 0 && now.working_set < now.limit.unwrap(), "{now:?}");
        assert!(booted().is_some());
    }

    #[test]
    fn networks() {
        let text = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    lo: 1 1 1 0 0 0 0 0 1 1 1 0 0 0 0 0\n  eth0: 10 2 3 0 0 0 0 0 20 4 5 0 0 0 0 0\n";
        let eth0 = Interface { name: "eth0".into(), rx_bytes: 10, rx_errors: 3, tx_bytes: 20, tx_errors: 5 };
        assert_eq!(parse_interfaces(text), [eth0]);
        assert_eq!(parse_interfaces("nothing: here\n"), []);
    }

    #[test]
    fn directories() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("a")).unwrap();
        fs::write(root.path().join("a/file"), vec![1; 100_000]).unwrap();
        std::os::unix::fs::symlink("/", root.path().join("everything")).unwrap();
        let taken = taken(root.path());
        assert_eq!(taken.inodes, 4);
        assert!((100_000..1_000_000).contains(&taken.bytes), "{taken:?}");
        assert_eq!(super::taken(&root.path().join("none")), Taken::default());
        let disk = Disk::of(root.path()).unwrap();
        assert!(disk.capacity_bytes >= disk.used_bytes && disk.with(taken).used_bytes == taken.bytes);
    }
}
