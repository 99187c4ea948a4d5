//! How little of something may be left, and how much is
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/#eviction-signals>).

use std::{collections::BTreeMap, fs, path::Path, str::FromStr, time::Duration};

use seawall_api::quantity::Quantity;

/// What may become short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signal {
    /// Memory: it comes first, because without it nothing else can be done.
    Memory,
    /// The disk.
    Disk,
    /// Files that the disk may still have.
    Inodes,
    /// Numbers of processes.
    Pids,
}

impl Signal {
    /// As upstream writes it.
    pub fn name(self) -> &'static str {
        match self {
            Signal::Memory => "memory.available",
            Signal::Disk => "nodefs.available",
            Signal::Inodes => "nodefs.inodesFree",
            Signal::Pids => "pid.available",
        }
    }

    /// The resource that is short then, as upstream's messages name it.
    pub fn resource(self) -> &'static str {
        match self {
            Signal::Memory => "memory",
            Signal::Disk => "ephemeral-storage",
            Signal::Inodes => "inodes",
            Signal::Pids => "pids",
        }
    }

    /// An amount of it, as a quantity.
    pub fn quantity(self, amount: u64) -> Quantity {
        let amount = i64::try_from(amount).unwrap_or(i64::MAX);
        match self {
            Signal::Memory | Signal::Disk => Quantity::bytes(amount),
            Signal::Inodes | Signal::Pids => Quantity::new(amount),
        }
    }

    /// Reads a name. True if it is that of images, which are kept where everything is.
    fn parse(name: &str) -> Option<(Signal, bool)> {
        Some(match name.trim() {
            "memory.available" => (Signal::Memory, false),
            "nodefs.available" => (Signal::Disk, false),
            "nodefs.inodesFree" => (Signal::Inodes, false),
            "pid.available" => (Signal::Pids, false),
            "imagefs.available" | "containerfs.available" => (Signal::Disk, true),
            "imagefs.inodesFree" | "containerfs.inodesFree" => (Signal::Inodes, true),
            _ => return None,
        })
    }
}

/// How little of something may be left, or how much more is to be had.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Least {
    /// So much: bytes, or a count.
    Amount(u64),
    /// This part of all.
    Part(f64),
}

impl Least {
    /// How much that is, of so much in all.
    pub fn of(self, all: u64) -> u64 {
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a part of a hundred need not be exact to the byte"
        )]
        match self {
            Least::Amount(amount) => amount,
            Least::Part(part) => (all as f64 * part).ceil() as u64,
        }
    }

    fn parse(text: &str) -> Option<Least> {
        match text.trim().strip_suffix('%') {
            Some(percent) => {
                let percent: f64 = percent.parse().ok()?;
                (0.0..=100.0).contains(&percent).then_some(Least::Part(percent / 100.0))
            }
            None => Some(Least::Amount(text.trim().parse::<Quantity>().ok()?.value().try_into().ok()?)),
        }
    }
}

/// How little may be left of each, as `--eviction-hard` and `--eviction-soft` say it. What they do not name has no
/// threshold.
#[derive(Clone, Debug, PartialEq)]
pub struct Thresholds(pub BTreeMap<Signal, Least>);

/// Upstream's defaults, and a tenth of the process numbers.
pub const DEFAULT: &str = "memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,pid.available<10%";

impl Default for Thresholds {
    fn default() -> Thresholds {
        Thresholds(BTreeMap::from([
            (Signal::Memory, Least::Amount(100 << 20)),
            (Signal::Disk, Least::Part(0.1)),
            (Signal::Inodes, Least::Part(0.05)),
            (Signal::Pids, Least::Part(0.1)),
        ]))
    }
}

/// A text that is no list of what is written by signal.
#[derive(Debug, thiserror::Error)]
#[error(
    "{text:?} is no {what}: write {form}, with one of memory.available, nodefs.available, nodefs.inodesFree, imagefs.available, imagefs.inodesFree, pid.available"
)]
pub struct Malformed {
    text: String,
    what: &'static str,
    form: &'static str,
}

/// Reads a list by signals. What is said of images holds where nothing is said of the disk itself.
fn list<T: Copy>(
    text: &str,
    separator: char,
    (what, form): (&'static str, &'static str),
    read: impl Fn(&str) -> Option<T>,
) -> Result<BTreeMap<Signal, T>, Malformed> {
    let mut all = BTreeMap::new();
    let mut of_images = BTreeMap::new();
    for one in text.split(',').map(str::trim).filter(|one| !one.is_empty()) {
        let malformed = || Malformed { text: one.to_owned(), what, form };
        let (signal, value) = one.split_once(separator).ok_or_else(malformed)?;
        let (signal, images) = Signal::parse(signal).ok_or_else(malformed)?;
        let value = read(value).ok_or_else(malformed)?;
        if images { &mut of_images } else { &mut all }.insert(signal, value);
    }
    for (signal, value) in of_images {
        all.entry(signal).or_insert(value);
    }
    Ok(all)
}

impl FromStr for Thresholds {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Thresholds, Malformed> {
        list(text, '<', ("threshold", "SIGNAL<AMOUNT or SIGNAL<PERCENT%"), Least::parse).map(Thresholds)
    }
}

/// How much more than its threshold is to be had of each before it is enough again (`--eviction-minimum-reclaim`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reclaim(pub BTreeMap<Signal, Least>);

impl FromStr for Reclaim {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Reclaim, Malformed> {
        list(text, '=', ("amount to reclaim", "SIGNAL=AMOUNT or SIGNAL=PERCENT%"), Least::parse).map(Reclaim)
    }
}

/// For how long a soft threshold has to be passed (`--eviction-soft-grace-period`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Grace(pub BTreeMap<Signal, Duration>);

impl FromStr for Grace {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Grace, Malformed> {
        let time = |text: &str| Duration::try_from(text.trim().parse::<jiff::SignedDuration>().ok()?).ok();
        list(text, '=', ("grace period", "SIGNAL=TIME, e.g. memory.available=1m30s"), time).map(Grace)
    }
}

/// How much of something is left, and how much there is in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// What is left.
    pub available: u64,
    /// All of it.
    pub capacity: u64,
}

/// The levels that could be read.
pub type Levels = BTreeMap<Signal, Level>;

/// Reads them; `data` is on the disk that is meant.
pub fn levels(data: &Path) -> Levels {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of_memory = |key| meminfo(&text, key).and_then(|bytes| u64::try_from(bytes).ok());
    let memory = of_memory("MemAvailable").zip(of_memory("MemTotal"));
    let disk = nix::sys::statvfs::statvfs(data).ok();
    let pids = processes().map(|(all, used)| (all.saturating_sub(used), all));
    let found = [
        (Signal::Memory, memory),
        (
            Signal::Disk,
            disk.map(|s| {
                (s.blocks_available().saturating_mul(s.fragment_size()), s.blocks().saturating_mul(s.fragment_size()))
            }),
        ),
        // Some file systems have as many as are wanted.
        (Signal::Inodes, disk.filter(|s| s.files() > 0).map(|s| (s.files_available(), s.files()))),
        (Signal::Pids, pids),
    ];
    let level = |(available, capacity)| Level { available, capacity };
    found.into_iter().filter_map(|(signal, found)| Some((signal, level(found?)))).collect()
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

/// How many processes and threads there may be, and how many there are.
pub fn processes() -> Option<(u64, u64)> {
    let most = fs::read_to_string("/proc/sys/kernel/pid_max").ok()?.trim().parse().ok()?;
    let load = fs::read_to_string("/proc/loadavg").ok()?;
    Some((most, load.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()?))
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
    fn what_is_written_by_signal() {
        assert_eq!(DEFAULT.parse::<Thresholds>().unwrap(), Thresholds::default());
        let some: Thresholds = "imagefs.available<15%, nodefs.available<1Gi,imagefs.inodesFree<1k".parse().unwrap();
        let expect = [(Signal::Disk, Least::Amount(1 << 30)), (Signal::Inodes, Least::Amount(1000))];
        assert_eq!(some.0, BTreeMap::from(expect));
        for wrong in ["nodefs.available", "nodefs.available<", "nodefs.available<200%", "disk<5%", "pid.available<-1"] {
            let said = wrong.parse::<Thresholds>().unwrap_err().to_string();
            assert!(said.starts_with(&format!("{wrong:?} is no threshold: write SIGNAL<AMOUNT")), "{said}");
        }
        let grace: Grace = "memory.available=1m30s,nodefs.available=10s".parse().unwrap();
        let expect = [(Signal::Memory, Duration::from_secs(90)), (Signal::Disk, Duration::from_secs(10))];
        assert_eq!(grace.0, BTreeMap::from(expect));
        for wrong in ["memory.available<1m", "memory.available=soon", "memory.available=-1s"] {
            let said = wrong.parse::<Grace>().unwrap_err().to_string();
            assert!(said.starts_with(&format!("{wrong:?} is no grace period: write SIGNAL=TIME")), "{said}");
        }
        let reclaim: Reclaim = "memory.available=100Mi,nodefs.available=5%".parse().unwrap();
        assert_eq!(reclaim.0[&Signal::Disk], Least::Part(0.05));
        let said = "memory=1".parse::<Reclaim>().unwrap_err().to_string();
        assert!(said.starts_with("\"memory=1\" is no amount to reclaim"), "{said}");
    }

    #[test]
    fn levels_and_amounts() {
        let levels = levels(Path::new("/"));
        for signal in [Signal::Memory, Signal::Disk, Signal::Pids] {
            let level = levels[&signal];
            assert!(level.available > 0 && level.available <= level.capacity, "{signal:?}: {level:?}");
        }
        assert_eq!((Least::Amount(10).of(100), Least::Part(0.1).of(95)), (10, 10));
        assert_eq!(Signal::Memory.quantity(100 << 20).to_string(), "100Mi");
        assert_eq!(Signal::Inodes.quantity(32_000).to_string(), "32k");
    }
}
