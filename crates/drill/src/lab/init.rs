//! A machine's first process: it reaps what is left to it, and keeps the machine's service running as systemd would
//! with `Restart=always` and `RestartSec=100ms`.
//!
//! The lab tells it what to run in a file ([`Service`]); SIGHUP makes it read the file again, SIGTERM shuts down.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::Path,
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::Instant,
};

use super::{
    boot::{self, GIVEN},
    error::{Cause, Step},
    layout::MachinePlace,
};

/// The pause before a service that ended is started again.
const RESTART: Duration = Duration::from_millis(100);
/// How long a service has to stop when it is asked to, before it is killed (systemd's default).
const STOP: Duration = Duration::from_secs(90);
/// How long everything else has at a shutdown.
const LAST: Duration = Duration::from_secs(2);

/// The path on every machine.
pub const PATH: &str = "/run/seawall-lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a machine runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Arguments of `seawall`; none at all means that nothing is run.
    pub args: Vec<String>,
    /// Further environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Whether it runs, and is started again when it ends.
    pub run: bool,
}

/// What became of it, as the machine tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// Whether the service runs.
    pub running: bool,
    /// How often it ended without having been asked to, since the boot.
    pub ended: u32,
    /// How it ended the last time.
    pub last_end: String,
}

/// Names of the files in a machine's [`MachinePlace::conf`].
pub const SERVICE_FILE: &str = "service.json";
/// What [`Told`] is in.
pub const TOLD_FILE: &str = "told.json";

/// A service's state, and what to do next. Pure.
#[derive(Debug, Default)]
struct Keeper {
    wanted: Service,
    pid: Option<i32>,
    start_at: Option<Instant>,
    kill_at: Option<Instant>,
    told: Told,
}

/// What the keeper wants done.
#[derive(Debug, PartialEq, Eq)]
enum Act {
    Start,
    Send(i32, Signal),
}

impl Keeper {
    /// The file has been read again.
    fn want(&mut self, now: Instant, service: Service) -> Vec<Act> {
        let runs = service.run && !service.args.is_empty();
        self.wanted = service;
        match self.pid {
            Some(pid) if !runs => {
                self.kill_at = Some(now + STOP);
                vec![Act::Send(pid, Signal::SIGTERM)]
            }
            Some(_) => vec![],
            None if runs => {
                self.start_at = None;
                vec![Act::Start]
            }
            None => {
                self.start_at = None;
                vec![]
            }
        }
    }

    fn started(&mut self, pid: i32) {
        (self.pid, self.start_at, self.kill_at, self.told.running) = (Some(pid), None, None, true);
    }

    fn failed(&mut self, now: Instant, why: String) {
        self.ended_as(now, why);
    }

    fn ended(&mut self, now: Instant, pid: i32, how: &str) {
        if self.pid == Some(pid) {
            self.ended_as(now, how.into());
        }
    }

    fn ended_as(&mut self, now: Instant, how: String) {
        (self.pid, self.kill_at, self.told.running) = (None, None, false);
        self.told.last_end = how;
        if self.wanted.run {
            self.told.ended += 1;
            self.start_at = Some(now + RESTART);
        }
    }

    fn tick(&mut self, now: Instant) -> Vec<Act> {
        if self.start_at.is_some_and(|at| at <= now) {
            self.start_at = None;
            return vec![Act::Start];
        }
        if let Some(pid) = self.pid
            && self.kill_at.is_some_and(|at| at <= now)
        {
            self.kill_at = None;
            return vec![Act::Send(pid, Signal::SIGKILL)];
        }
        vec![]
    }

    fn next(&self) -> Option<Instant> {
        self.start_at.into_iter().chain(self.kill_at).min()
    }
}

/// Boots the machine and runs it until it is told to shut down.
pub async fn run(place: &MachinePlace) -> Step {
    let log = super::open_log(&place.service_log())?;
    let booted = boot::furnish(place).await;
    if let Err(error) = &booted {
        println!("error {}", error.to_string().replace('\n', " "));
    }
    let boot = booted?;
    // Before anyone is told that the machine is up: a signal must find its handler.
    let handler = |kind| signal(kind).map_err(Cause::io("handle signals"));
    let (mut child, mut hangup) = (handler(SignalKind::child())?, handler(SignalKind::hangup())?);
    let mut terminate = handler(SignalKind::terminate())?;
    println!("ready");
    // The lab reads no further; nobody must wait for the end of this.
    let null = fs::File::options().write(true).open("/dev/null").map_err(Cause::io("/dev/null"))?;
    nix::unistd::dup2_stdout(null).map_err(Cause::errno("let go of stdout"))?;
    tracing::info!(machine = boot.machine, "up");

    let mut keeper = Keeper::default();
    let mut acts = keeper.want(Instant::now(), read());
    loop {
        carry_out(&mut keeper, acts, &log);
        acts = Vec::new();
        tell(&keeper.told);
        let next = keeper.next();
        tokio::select! {
            _ = child.recv() => {
                for (pid, how) in reap() {
                    keeper.ended(Instant::now(), pid, &how);
                }
            }
            _ = hangup.recv() => acts = keeper.want(Instant::now(), read()),
            _ = terminate.recv() => break,
            () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                acts = keeper.tick(Instant::now());
            }
        }
    }
    tracing::info!("shutting down");
    // As any init does: whoever is told to end can see that the machine goes down.
    if let Err(error) = fs::write("/run/utmp", run_level('6')) {
        tracing::warn!(%error, "the run level is not noted");
    }
    let stopped = Service { run: false, ..keeper.wanted.clone() };
    acts = keeper.want(Instant::now(), stopped);
    carry_out(&mut keeper, acts, &log);
    while let Some(next) = keeper.next() {
        tokio::select! {
            _ = child.recv() => for (pid, how) in reap() { keeper.ended(Instant::now(), pid, &how) },
            () = tokio::time::sleep_until(next) => {
                acts = keeper.tick(Instant::now());
                carry_out(&mut keeper, acts, &log);
            }
        }
    }
    // Everything else, as any init does; the kernel kills what does not listen when this process ends.
    let _ = kill(Pid::from_raw(-1), Signal::SIGTERM);
    let deadline = Instant::now() + LAST;
    while !alone() {
        tokio::select! {
            _ = child.recv() => drop(reap()),
            () = tokio::time::sleep_until(deadline) => break,
        }
    }
    nix::unistd::sync();
    Ok(())
}

/// A record of utmp(5) that notes a run level, on a machine with 64 bits: its type, and in the lower byte of its pid the
/// level. 6 is a reboot.
fn run_level(level: char) -> Vec<u8> {
    const RUN_LVL: i16 = 1;
    let mut record = vec![0; 384];
    record[..2].copy_from_slice(&RUN_LVL.to_ne_bytes());
    record[4..8].copy_from_slice(&u32::from(level).to_ne_bytes());
    record
}

fn read() -> Service {
    let path = Path::new(GIVEN).join("conf").join(SERVICE_FILE);
    let Ok(text) = fs::read_to_string(&path) else { return Service::default() };
    serde_json::from_str(&text).unwrap_or_else(|error| {
        tracing::error!(%error, "{} is not understood: nothing is run", path.display());
        Service::default()
    })
}

fn tell(told: &Told) {
    let path = Path::new(GIVEN).join("conf").join(TOLD_FILE);
    let written = serde_json::to_string(told).map_err(Into::into).and_then(|text| super::replace_file(&path, &text));
    if let Err(error) = written {
        tracing::warn!(%error, "the lab cannot be told how the service is");
    }
}

fn carry_out(keeper: &mut Keeper, acts: Vec<Act>, log: &fs::File) {
    for act in acts {
        match act {
            Act::Send(pid, signal) => {
                let _ = kill(Pid::from_raw(pid), signal);
            }
            Act::Start => match start(&keeper.wanted, log) {
                Ok(pid) => {
                    tracing::info!(pid, args = keeper.wanted.args.join(" "), "service started");
                    keeper.started(pid);
                }
                Err(error) => {
                    tracing::error!(%error, "the service does not start");
                    keeper.failed(Instant::now(), error.to_string());
                }
            },
        }
    }
}

fn start(service: &Service, log: &fs::File) -> std::io::Result<i32> {
    let mut command = Command::new(Path::new(GIVEN).join("bin/seawall"));
    command.args(&service.args).env_clear().env("PATH", PATH).env("HOME", "/root").envs(&service.env);
    command.current_dir("/").process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
    // Reaped by pid with all others, so the handle is of no use.
    Ok(command.spawn()?.id().cast_signed())
}

fn reap() -> Vec<(i32, String)> {
    let mut ended = Vec::new();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => {
                ended.push((pid.as_raw(), ExitStatus::from_raw(code << 8).to_string()))
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) => ended.push((pid.as_raw(), signal.to_string())),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return ended,
            Err(Errno::EINTR) | Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "waitpid");
                return ended;
            }
        }
    }
}

/// Whether nobody else is left on the machine.
fn alone() -> bool {
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    numbers.filter(|e| e.file_name().to_str().is_some_and(|n| n.parse::<u32>().is_ok())).count() <= 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(run: bool) -> Service {
        Service { args: vec!["server".into()], env: BTreeMap::new(), run }
    }

    #[test]
    fn a_service_that_ends_is_started_again_a_little_later() {
        let (mut keeper, now) = (Keeper::default(), Instant::now());
        assert_eq!(keeper.want(now, Service::default()), [], "a bare machine runs nothing");
        assert_eq!(keeper.want(now, service(true)), [Act::Start]);
        keeper.started(7);
        keeper.ended(now, 8, "somebody else's end");
        assert_eq!(keeper.next(), None);
        keeper.ended(now, 7, "SIGKILL");
        assert_eq!((keeper.next(), keeper.told.running), (Some(now + RESTART), false));
        assert_eq!(keeper.tick(now + RESTART / 2), []);
        assert_eq!(keeper.tick(now + RESTART), [Act::Start]);
        keeper.failed(now, "no memory".into());
        assert_eq!(keeper.tick(now + RESTART), [Act::Start], "and when it does not even start");
        keeper.started(9);
        assert_eq!(keeper.told, Told { running: true, ended: 2, last_end: "no memory".into() });
    }

    #[test]
    fn a_service_that_is_stopped_stays_so() {
        let (mut keeper, now) = (Keeper::default(), Instant::now());
        keeper.want(now, service(true));
        keeper.started(7);
        assert_eq!(keeper.want(now, service(true)), [], "nothing changed");
        assert_eq!(keeper.want(now, service(false)), [Act::Send(7, Signal::SIGTERM)]);
        assert_eq!(keeper.tick(now + STOP), [Act::Send(7, Signal::SIGKILL)], "it has not listened");
        keeper.ended(now, 7, "SIGKILL");
        assert_eq!((keeper.next(), keeper.told.ended), (None, 0));
        assert_eq!(keeper.want(now, service(true)), [Act::Start]);
    }

    #[test]
    fn a_service_that_is_stopped_while_it_waits_is_not_started() {
        let (mut keeper, now) = (Keeper::default(), Instant::now());
        keeper.want(now, service(true));
        keeper.started(7);
        keeper.ended(now, 7, "exit status: 1");
        assert_eq!(keeper.want(now, service(false)), []);
        assert_eq!(keeper.tick(now + STOP), []);
    }
}
