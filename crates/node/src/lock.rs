//! One agent per machine: who manages pods here holds locks, so that another one fails instead of reaching into them.
//!
//! The locks are on the directories themselves (flock): the kernel gives them back when their holder dies, however it
//! dies, and nothing is left over.

use std::{
    fs::{File, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::{NodeConfig, cgroup::Cgroups};

/// How long a lock is waited for: an agent that is being replaced may still be on its way out.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why a lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody has it.
    #[error("{path} ({what}) is in use by {holder}; {way_out}")]
    Held {
        /// What the directory is.
        what: &'static str,
        /// The directory.
        path: PathBuf,
        /// The process that has it.
        holder: String,
        /// What can be done.
        way_out: String,
    },
    /// The directory cannot be opened or made.
    #[error("{path} ({what}): {source}")]
    Io {
        /// What the directory is.
        what: &'static str,
        /// The directory.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
}

/// A locked directory; unlocked when dropped.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "held for its lock")] File);

impl Lock {
    /// Locks a directory, which is made if need be. `what` and `way_out` are for whoever is refused.
    ///
    /// # Errors
    /// If another process has it for longer than a moment.
    pub async fn take(path: &Path, what: &'static str, way_out: &str) -> Result<Lock, LockError> {
        let failed = |source| LockError::Io { what, path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(failed)?;
        let file = File::open(path).map_err(failed)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock(file)),
                Err(TryLockError::Error(source)) => return Err(failed(source)),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
                Err(TryLockError::WouldBlock) => {
                    let pid = holder(&file);
                    let way_out = match pid {
                        Some(pid) => way_out.replace("PID", &pid.to_string()),
                        None => way_out.replace(" (kill PID)", ""),
                    };
                    let holder = pid.map_or_else(|| "a process out of sight".to_owned(), describe);
                    return Err(LockError::Held { what, path: path.to_owned(), holder, way_out });
                }
            }
        }
    }
}

/// The locks of an agent.
#[derive(Debug)]
pub struct Locks {
    _locks: Vec<Lock>,
}

impl Locks {
    /// Takes everything that a node agent with this configuration has for itself.
    ///
    /// # Errors
    /// If another agent runs on one of the directories, or manages this machine's pods.
    pub async fn to_run(config: &NodeConfig) -> Result<Locks, LockError> {
        let stop = "stop it (kill PID), or give this one directories of its own (--data-dir, --run-dir)";
        let pods = "a machine has one node agent: stop it (kill PID), or run this server with --disable agent,proxy";
        let mut locks = Vec::new();
        for (path, what) in directories(config) {
            locks.push(Lock::take(&path, what, if what == PODS { pods } else { stop }).await?);
        }
        Ok(Locks { _locks: locks })
    }

    /// Takes what is there of it, to remove it.
    ///
    /// # Errors
    /// If an agent runs.
    pub async fn to_remove(config: &NodeConfig) -> Result<Locks, LockError> {
        let mut locks = Vec::new();
        for (path, what) in directories(config).into_iter().filter(|(path, _)| path.exists()) {
            locks.push(Lock::take(&path, what, "stop it first (kill PID)").await?);
        }
        Ok(Locks { _locks: locks })
    }
}

const PODS: &str = "the cgroup of this machine's pods";

fn directories(config: &NodeConfig) -> [(PathBuf, &'static str); 3] {
    [
        (config.data_dir.clone(), "the data of a node agent"),
        (config.run_dir.clone(), "the sockets of a node agent"),
        (Cgroups::detect(&config.cgroup_root).directory(), PODS),
    ]
}

/// The process that has locked this file or directory, in words, if one has.
///
/// # Errors
/// If it is there but cannot be opened.
pub fn user(path: &Path) -> io::Result<Option<String>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => {
            Ok(Some(holder(&file).map_or_else(|| "a process out of sight".to_owned(), describe)))
        }
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The process that has a lock on this file, if it is one that can be seen from here.
fn holder(file: &File) -> Option<i32> {
    let metadata = file.metadata().ok()?;
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    find(&locks, metadata.dev(), metadata.ino())
}

/// Finds a lock's holder in `/proc/locks`: `1: FLOCK ADVISORY WRITE 4711 fd:00:1234 0 EOF`.
fn find(locks: &str, device: u64, inode: u64) -> Option<i32> {
    let at = format!("{:02x}:{:02x}:{inode}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    // Some filesystems tell another device here than stat does; inodes rarely coincide.
    let (inode, mut second) = (format!(":{inode}"), None);
    for line in locks.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", pid, place, ..] = words[..] else { continue };
        let Some(pid) = pid.parse().ok().filter(|pid| *pid > 0) else { continue };
        if place == at {
            return Some(pid);
        }
        if place.ends_with(&inode) {
            second = Some(pid);
        }
    }
    second
}

/// A process in words: its number, and what was called.
fn describe(pid: i32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    match line.trim() {
        "" => format!("process {pid}"),
        line => format!("process {pid} ({})", line.chars().take(80).collect::<String>()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders() {
        let locks = "1: FLOCK  ADVISORY  WRITE 71 fe:00:12 0 EOF\n2: POSIX  ADVISORY  WRITE 72 fe:01:7 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 73 00:2f:77 0 EOF\n3: -> FLOCK  ADVISORY  WRITE 74 00:2f:77 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 0 00:2f:78 0 EOF\n";
        let device = nix::sys::stat::makedev(0xfe, 0);
        assert_eq!(find(locks, device, 12), Some(71));
        assert_eq!(find(locks, device, 77), Some(73), "told with another device");
        assert_eq!(find(locks, device, 7), None, "another kind of lock, and no part of a longer number");
        assert_eq!(find(locks, device, 78), None, "a process of another namespace");
    }

    #[tokio::test(start_paused = true)]
    async fn the_holder_is_named_and_its_end_unlocks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let first = Lock::take(&path, "a test", "wait").await.unwrap();
        let refused = Lock::take(&path, "a test", "stop it (kill PID)").await.unwrap_err().to_string();
        let pid = std::process::id();
        assert!(refused.contains(&format!("in use by process {pid} (")), "{refused}");
        assert!(refused.ends_with(&format!("stop it (kill {pid})")), "{refused}");
        drop(first);
        Lock::take(&path, "a test", "wait").await.unwrap();
    }
}
