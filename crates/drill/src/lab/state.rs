//! What is remembered of a lab, and who may change it.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, BorrowedFd, RawFd},
        unix::{fs::MetadataExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    error::{Cause, Error, Of as _, Result, Step},
    layout::{Place, Spec, Subnet},
};

/// How long a command waits for another one on the same lab.
const PATIENCE: Duration = Duration::from_secs(60);

/// A lab, as it was asked for. What runs is never read from here but from the kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Where the LAN is.
    pub subnet: Subnet,
    /// Further networks, which a router joins to it.
    #[serde(default)]
    pub further: Vec<Subnet>,
    /// Whether machines have addresses of IPv6 as well.
    #[serde(default)]
    pub dual_stack: bool,
    /// All machines.
    pub machines: Vec<Spec>,
    /// The program that they run.
    pub binary: PathBuf,
    /// CPUs for each of them.
    #[serde(default)]
    pub cpus: Option<f64>,
    /// The cluster on them; none on bare machines.
    #[serde(default)]
    pub cluster: Option<Cluster>,
    /// Whether `up` came to its end.
    pub finished: bool,
}

/// How the machines' services are started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// `--timing`.
    pub timing: String,
    /// Further arguments of every server.
    #[serde(default)]
    pub server_args: Vec<String>,
    /// Further arguments of every agent.
    #[serde(default)]
    pub agent_args: Vec<String>,
    /// What services log: `SEAWALL_LOG`.
    pub log: String,
}

impl State {
    /// All networks.
    pub fn subnets(&self) -> Vec<Subnet> {
        std::iter::once(self.subnet).chain(self.further.iter().copied()).collect()
    }

    /// Reads a lab's state; none if there is no lab.
    pub fn read(place: &Place) -> Result<Option<State>> {
        let path = place.state_file();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(Cause::io(path.display().to_string())(error)).of_lab(&place.lab, "read its state");
            }
        };
        let broken = |e: serde_json::Error| {
            Cause::Other(format!(
                "{}: {e}; `seawall lab down --name {}` takes it away all the same",
                path.display(),
                place.lab
            ))
        };
        serde_json::from_str(&text).map(Some).map_err(broken).of_lab(&place.lab, "read its state")
    }

    /// Writes it, whole or not at all.
    pub fn write(&self, place: &Place) -> Result<()> {
        let written = serde_json::to_string_pretty(self).map_err(std::io::Error::from);
        let written = written.and_then(|text| replace_file(&place.state_file(), &text));
        written.map_err(Cause::io(place.state_file().display().to_string())).of_lab(&place.lab, "write its state")
    }
}

/// Writes a file whole or not at all.
pub fn replace_file(path: &Path, text: &str) -> std::io::Result<()> {
    let next = path.with_extension("next");
    let mut file = File::create(&next)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&next, path)
}

/// The right to work on something, until it is dropped or the process ends: this one, and those of its children that
/// [`hand_on`] gave it to.
#[derive(Debug)]
pub struct Guard {
    lock: Flock<File>,
}

/// The locks that this process holds.
static HELD: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

impl Guard {
    fn new(lock: Flock<File>) -> Guard {
        HELD.lock().unwrap_or_else(PoisonError::into_inner).insert(lock.as_raw_fd());
        Guard { lock }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        HELD.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.lock.as_raw_fd());
    }
}

/// Lets a short-lived helper hold the locks that we hold. When we are killed, what it still makes is made under the lock,
/// so whoever clears up after us waits for it.
#[allow(unsafe_code)]
pub fn hand_on(command: &mut Command) {
    let held: Vec<RawFd> = HELD.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
    // SAFETY: between fork and exec only functions that are safe in a signal handler may be called; fcntl is a plain
    // system call, and the list was made before. A descriptor that was closed meanwhile is an error without effect.
    unsafe {
        command.pre_exec(move || {
            for fd in &held {
                let _ = fcntl(BorrowedFd::borrow_raw(*fd), FcntlArg::F_SETFD(FdFlag::empty()));
            }
            Ok(())
        });
    }
}

/// Lets nobody whom this process starts inherit what [`hand_on`] gave it.
pub fn keep_to_myself() {
    for entry in fs::read_dir("/proc/self/fd").into_iter().flatten().flatten() {
        let number = entry.file_name().to_str().and_then(|n| n.parse::<RawFd>().ok()).filter(|n| *n > 2);
        if let Some(number) = number {
            close_on_exec(number);
        }
    }
}

#[allow(unsafe_code)]
fn close_on_exec(fd: RawFd) {
    // SAFETY: the descriptor is only borrowed for one system call, which fails without effect if it is closed.
    let _ = fcntl(unsafe { BorrowedFd::borrow_raw(fd) }, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
}

/// How something is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Others may hold it in this way at the same time.
    Shared,
    /// Nobody else may.
    Alone,
}

/// Locks a file, and waits for whoever has it.
pub async fn lock(path: &Path, hold: Hold, lab: &str) -> Result<Guard> {
    let started = Instant::now();
    loop {
        match attempt(path, hold).of_lab(lab, "lock it")? {
            Some(guard) => return Ok(guard),
            None if started.elapsed() > PATIENCE => {
                let mut holder = String::new();
                let _ = File::open(path).and_then(|mut f| f.read_to_string(&mut holder));
                let holder = if holder.is_empty() { "(unknown)".into() } else { holder };
                return Err(Error::Busy { lab: lab.into(), holder, waited: started.elapsed() });
            }
            None => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

fn attempt(path: &Path, hold: Hold) -> Step<Option<Guard>> {
    let shown = || path.display().to_string();
    let file = if path.is_dir() {
        File::open(path).map_err(Cause::io(shown()))?
    } else {
        File::options().create(true).append(true).read(true).open(path).map_err(Cause::io(shown()))?
    };
    let how = if hold == Hold::Alone { FlockArg::LockExclusiveNonblock } else { FlockArg::LockSharedNonblock };
    let lock = match Flock::lock(file, how) {
        Ok(lock) => lock,
        Err((_, nix::errno::Errno::EWOULDBLOCK | nix::errno::Errno::EINTR)) => return Ok(None),
        Err((_, errno)) => return Err(Cause::errno(shown())(errno)),
    };
    // Whoever held it may have removed the file; a lock on what nobody else can find is none.
    let ours = lock.metadata().map_err(Cause::io(shown()))?;
    if fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino())) {
        if hold == Hold::Alone && ours.is_file() {
            // For the one who waits too long; a lock without a name still locks.
            let _ = lock.set_len(0).and_then(|()| (&*lock).write_all(std::process::id().to_string().as_bytes()));
        }
        return Ok(Some(Guard::new(lock)));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_at_a_time_and_the_one_who_waits_learns_for_whom() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let shared = lock(&path, Hold::Shared, "x").await.unwrap();
        drop(lock(&path, Hold::Shared, "x").await.unwrap());
        assert!(attempt(&path, Hold::Alone).unwrap().is_none());
        drop(shared);
        let alone = lock(&path, Hold::Alone, "x").await.unwrap();
        let said = lock(&path, Hold::Shared, "x").await.unwrap_err().to_string();
        assert!(said.starts_with(&format!("lab x is in use by process {}, for 60 s", std::process::id())), "{said}");
        // A lock on a file that was removed is not one.
        fs::remove_file(&path).unwrap();
        drop(lock(&path, Hold::Alone, "x").await.unwrap());
        drop(alone);
    }
}
