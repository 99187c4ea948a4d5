//! When a node is short of something
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/#eviction-thresholds>).

use std::{fs, path::Path, str::FromStr};

use seawall_api::quantity::Quantity;

/// How little of something may be left.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Least {
    /// So much: bytes, or a count.
    Amount(u64),
    /// This part of all.
    Part(f64),
}

impl Least {
    fn is_passed(self, left: u64, all: u64) -> bool {
        #[allow(clippy::cast_precision_loss, reason = "a part of a hundred need not be exact to the byte")]
        match self {
            Least::Amount(least) => left < least,
            Least::Part(part) => (left as f64) < all as f64 * part,
        }
    }
}

/// Upstream's `--eviction-hard`. What it does not name has no threshold.
#[derive(Clone, Debug, PartialEq)]
pub struct Thresholds {
    memory: Option<Least>,
    disk: Option<Least>,
    inodes: Option<Least>,
    pids: Option<Least>,
}

/// Upstream's defaults, and a tenth of the process numbers.
pub const DEFAULT: &str = "memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,pid.available<10%";

impl Default for Thresholds {
    fn default() -> Thresholds {
        Thresholds {
            memory: Some(Least::Amount(100 << 20)),
            disk: Some(Least::Part(0.1)),
            inodes: Some(Least::Part(0.05)),
            pids: Some(Least::Part(0.1)),
        }
    }
}

/// A text that is no list of thresholds.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no threshold: write SIGNAL<AMOUNT or SIGNAL<PERCENT%, with one of memory.available, nodefs.available, nodefs.inodesFree, imagefs.available, imagefs.inodesFree, pid.available"
)]
pub struct Malformed(String);

impl FromStr for Thresholds {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Thresholds, Malformed> {
        let mut all = Thresholds { memory: None, disk: None, inodes: None, pids: None };
        for one in text.split(',').map(str::trim).filter(|one| !one.is_empty()) {
            let malformed = || Malformed(one.to_owned());
            let (signal, amount) = one.split_once('<').ok_or_else(malformed)?;
            let least = match amount.trim().strip_suffix('%') {
                Some(percent) => {
                    let percent: f64 = percent.parse().map_err(|_| malformed())?;
                    if !(0.0..=100.0).contains(&percent) {
                        return Err(malformed());
                    }
                    Least::Part(percent / 100.0)
                }
                None => {
                    let amount = amount.trim().parse::<Quantity>().map_err(|_| malformed())?;
                    Least::Amount(amount.value().try_into().map_err(|_| malformed())?)
                }
            };
            let place = match signal.trim() {
                "memory.available" => &mut all.memory,
                "nodefs.available" => &mut all.disk,
                "nodefs.inodesFree" => &mut all.inodes,
                "pid.available" => &mut all.pids,
                // Images are kept where everything is.
                "imagefs.available" | "containerfs.available" => {
                    all.disk.get_or_insert(least);
                    continue;
                }
                "imagefs.inodesFree" | "containerfs.inodesFree" => {
                    all.inodes.get_or_insert(least);
                    continue;
                }
                _ => return Err(malformed()),
            };
            *place = Some(least);
        }
        Ok(all)
    }
}

/// The pressure on the node at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Memory is short.
    pub memory: bool,
    /// The disk, or its inodes, are short.
    pub disk: bool,
    /// Process numbers are short.
    pub pids: bool,
}

impl Pressure {
    /// Measures; `data` is on the disk that is meant.
    pub fn measure(data: &Path, thresholds: &Thresholds) -> Pressure {
        let is_short = |least: Option<Least>, left: u64, all: u64| least.is_some_and(|l| l.is_passed(left, all));
        let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let of_memory = |key| meminfo(&text, key).and_then(|bytes| u64::try_from(bytes).ok());
        let memory = of_memory("MemAvailable").zip(of_memory("MemTotal"));
        let disk = nix::sys::statvfs::statvfs(data).is_ok_and(|s| {
            let size = s.fragment_size();
            is_short(thresholds.disk, s.blocks_available() * size, s.blocks() * size)
                || (s.files() > 0 && is_short(thresholds.inodes, s.files_available(), s.files()))
        });
        let number = |path: &str| fs::read_to_string(path).ok().and_then(|t| t.trim().parse::<u64>().ok());
        let used = fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|t| t.split_whitespace().nth(3)?.split_once('/')?.1.parse::<u64>().ok());
        let pids = number("/proc/sys/kernel/pid_max").zip(used);
        Pressure {
            memory: memory.is_some_and(|(left, all)| is_short(thresholds.memory, left, all)),
            disk,
            pids: pids.is_some_and(|(all, used)| is_short(thresholds.pids, all.saturating_sub(used), all)),
        }
    }
}

/// A line of `/proc/meminfo`, in bytes.
pub fn meminfo(text: &str, key: &str) -> Option<i64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok().map(|k| k * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_read() {
        assert_eq!(DEFAULT.parse::<Thresholds>().unwrap(), Thresholds::default());
        let some: Thresholds = "nodefs.available<1Gi, imagefs.available<15%".parse().unwrap();
        assert_eq!(some, Thresholds { memory: None, disk: Some(Least::Amount(1 << 30)), inodes: None, pids: None });
        for wrong in ["nodefs.available", "nodefs.available<", "nodefs.available<200%", "disk<5%", "pid.available<-1"] {
            let said = wrong.parse::<Thresholds>().unwrap_err().to_string();
            assert!(said.starts_with(&format!("{wrong:?} is no threshold: write SIGNAL<AMOUNT")), "{said}");
        }
    }

    #[test]
    fn what_is_short() {
        let nothing = "".parse().unwrap();
        assert_eq!(Pressure::measure(Path::new("/"), &nothing), Pressure::default());
        let everything = "memory.available<100%,nodefs.available<100%,pid.available<100%".parse().unwrap();
        let all = Pressure::measure(Path::new("/"), &everything);
        assert_eq!(all, Pressure { memory: true, disk: true, pids: true });
        assert!(Least::Amount(10).is_passed(9, 100) && !Least::Amount(10).is_passed(10, 100));
        assert!(Least::Part(0.1).is_passed(9, 100) && !Least::Part(0.1).is_passed(10, 100));
    }
}
