//! The etcd process.
//!
//! It outlives a crash of the server and is adopted by the next one; a clean stop of the server ends it as well, after
//! its leadership has been handed on.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use seawall_quorum::timing::Timing;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{CLIENT_PORT, Certificates, Local, METRICS_PORT, client_url, peer_url};
use crate::files::Files;

/// How often a process that we did not start is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long etcd has to end when it is asked to.
const GOODBYE: Duration = Duration::from_secs(10);
/// A commit to disk that takes longer than this slows every write of the cluster down
/// (<https://etcd.io/docs/v3.4/faq/#what-does-the-etcd-warning-apply-entries-took-too-long-mean>).
const SLOW_SYNC: Duration = Duration::from_millis(10);

/// A gap in time that no load explains.
const STILL: Duration = Duration::from_secs(4);

/// How to start it.
pub struct Settings {
    files: Files,
    pid_file: PathBuf,
    arguments: Vec<String>,
}

impl Settings {
    /// The arguments for a member.
    pub fn new(files: &Files, run_dir: &Path, local: &Local, certificates: &Certificates, timing: &Timing) -> Settings {
        let [ca, certificate, key] = certificates.files.each_ref().map(|f| f.display().to_string());
        let (peer, client) = (peer_url(local.ip), client_url(local.ip));
        let state = if local.existing { "existing" } else { "new" };
        let mut arguments: Vec<String> = Vec::new();
        for (flag, value) in [
            ("name", local.name.clone()),
            ("data-dir", files.etcd_data().display().to_string()),
            ("listen-peer-urls", peer.clone()),
            ("initial-advertise-peer-urls", peer),
            ("listen-client-urls", format!("https://127.0.0.1:{CLIENT_PORT},{client}")),
            ("advertise-client-urls", client),
            ("listen-metrics-urls", format!("http://127.0.0.1:{METRICS_PORT}")),
            ("initial-cluster", local.initial_cluster.clone()),
            ("initial-cluster-state", state.to_owned()),
            ("initial-cluster-token", local.token.clone()),
            ("client-cert-auth", "true".to_owned()),
            ("trusted-ca-file", ca.clone()),
            ("cert-file", certificate.clone()),
            ("key-file", key.clone()),
            ("peer-client-cert-auth", "true".to_owned()),
            ("peer-trusted-ca-file", ca),
            ("peer-cert-file", certificate),
            ("peer-key-file", key),
            ("heartbeat-interval", timing.etcd_heartbeat.as_millis().to_string()),
            ("election-timeout", timing.etcd_election.as_millis().to_string()),
            // A member that was cut off must not depose a leader when it returns.
            ("pre-vote", "true".to_owned()),
            // Our store asks a silent member after a second whether it is still there.
            ("grpc-keepalive-min-time", "500ms".to_owned()),
            // The servers compact.
            ("auto-compaction-retention", "0".to_owned()),
            ("quota-backend-bytes", (8_u64 << 30).to_string()),
            ("snapshot-count", "10000".to_owned()),
            // The API takes bodies of 3 MiB; what is stored may be a little larger.
            ("max-request-bytes", (4_u64 << 20).to_string()),
            ("logger", "zap".to_owned()),
            ("log-level", "warn".to_owned()),
        ] {
            arguments.push(format!("--{flag}={value}"));
        }
        Settings { files: files.clone(), pid_file: run_dir.join("etcd.pid"), arguments }
    }
}

/// Whether there is an etcd to start.
///
/// # Errors
/// If there is none, with the way out.
pub fn check_program() -> anyhow::Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| dir.join("etcd").is_file()) {
        return Ok(());
    }
    bail!(
        "etcd was not found on PATH: install it (Debian: apt-get install etcd-server), or use an etcd elsewhere with \
         --etcd-servers"
    )
}

/// Keeps etcd running until `stop`.
///
/// # Errors
/// If there is no etcd, or if this member has been removed from its cluster: then it must not start again.
pub async fn run(settings: &Settings, stop: CancellationToken) -> anyhow::Result<()> {
    let mut pause = Duration::from_millis(100);
    loop {
        let mut process = match adopt(settings) {
            Some(process) => process,
            None => start(settings)?,
        };
        let started = Instant::now();
        tokio::select! {
            () = process.ended() => {}
            () = stood_still() => {
                tracing::warn!("this machine stood still: its etcd begins anew, which is faster than to take in what piled up");
                let _ = kill(process.pid(), Signal::SIGKILL);
                process.ended().await;
                continue;
            }
            () = stop.cancelled() => {
                process.stop().await;
                let _ = fs::remove_file(&settings.pid_file);
                return Ok(());
            }
        }
        if removed(&settings.files.etcd_log()) {
            bail!(
                "this machine's etcd member has been removed from its cluster. To join again, stop the server, empty \
                 --data-dir and start it with --join and a new token"
            );
        }
        tracing::error!(log = %settings.files.etcd_log().display(), "etcd ended and is started again");
        if started.elapsed() > Duration::from_secs(10) {
            pause = Duration::from_millis(100);
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return Ok(()),
        }
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

/// Done when this machine has stood still for longer than [`STILL`]: frozen, suspended, or starved.
///
/// For a member that stood still, the others have thousands of small messages in their buffers, and it syncs its disk for
/// each of them: that takes nearly as long as it was away, and until then it answers nobody in time. One that starts
/// anew is sent what it lacks in large pieces.
async fn stood_still() {
    loop {
        let before = Instant::now();
        tokio::time::sleep(STILL / 8).await;
        if before.elapsed() > STILL {
            return;
        }
    }
}

enum Process {
    Ours(Child),
    Adopted(Pid),
}

impl Process {
    fn pid(&self) -> Pid {
        match self {
            Process::Ours(child) => Pid::from_raw(child.id().cast_signed()),
            Process::Adopted(pid) => *pid,
        }
    }

    fn is_over(&mut self) -> bool {
        match self {
            Process::Ours(child) => !matches!(child.try_wait(), Ok(None)),
            Process::Adopted(pid) => kill(*pid, None).is_err(),
        }
    }

    async fn ended(&mut self) {
        while !self.is_over() {
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn stop(&mut self) {
        let _ = kill(self.pid(), Signal::SIGTERM);
        if tokio::time::timeout(GOODBYE, self.ended()).await.is_err() {
            tracing::warn!("etcd did not end within {GOODBYE:?} and is killed");
            let _ = kill(self.pid(), Signal::SIGKILL);
            self.ended().await;
        }
    }
}

fn start(settings: &Settings) -> anyhow::Result<Process> {
    let data = settings.files.etcd_data();
    fs::create_dir_all(&data).with_context(|| format!("--data-dir: {} cannot be made", data.display()))?;
    // etcd refuses a directory that others can read.
    fs::set_permissions(&data, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    let log = settings.files.etcd_log();
    // What the last one said is kept; what this one says decides whether it is started again.
    let _ = fs::rename(&log, log.with_extension("log.1"));
    let out = OpenOptions::new().create_new(true).append(true).open(&log).with_context(|| log.display().to_string())?;
    let mut command = Command::new("etcd");
    command.args(&settings.arguments).stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    // What stops the server from a terminal must not stop etcd before it has handed on its leadership.
    command.process_group(0);
    let child = command.spawn().context("etcd cannot be started")?;
    if let Some(dir) = settings.pid_file.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&settings.pid_file, child.id().to_string()).with_context(|| settings.pid_file.display().to_string())?;
    tracing::info!(pid = child.id(), "etcd was started");
    Ok(Process::Ours(child))
}

/// The etcd that an earlier server left running on this directory.
fn adopt(settings: &Settings) -> Option<Process> {
    let pid: i32 = fs::read_to_string(&settings.pid_file).ok()?.trim().parse().ok()?;
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    let data = format!("--data-dir={}", settings.files.etcd_data().display());
    if line.split('\0').any(|argument| argument == data) {
        tracing::info!(pid, "etcd runs already");
        return Some(Process::Adopted(Pid::from_raw(pid)));
    }
    None
}

/// Whether etcd says that it has no place any more.
fn removed(log: &Path) -> bool {
    let text = fs::read(log).unwrap_or_default();
    let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(8192)..]).into_owned();
    ["the member has been permanently removed", "this member has been permanently removed", "removed member"]
        .iter()
        .any(|words| tail.to_lowercase().contains(words))
}

/// Measures how long the disk takes to keep something for good, and warns if that is too long.
pub fn measure_disk(dir: &Path) -> anyhow::Result<Duration> {
    const ROUNDS: usize = 20;
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let path = dir.join("sync-probe");
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).open(&path)?;
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let before = Instant::now();
        file.write_all(&[0; 2048])?;
        file.sync_data()?;
        times.push(before.elapsed());
    }
    drop(file);
    fs::remove_file(&path)?;
    times.sort();
    let (median, worst) = (times[ROUNDS / 2], times[ROUNDS - 1]);
    if median > SLOW_SYNC {
        tracing::warn!(
            "the disk below {} is slow: a synced write of 2 KiB takes {median:?} (worst of {ROUNDS}: {worst:?}), and \
             every write of the cluster waits for one; etcd wants less than {SLOW_SYNC:?}",
            dir.display()
        );
    } else {
        tracing::info!(?median, ?worst, "a synced write of 2 KiB below {}", dir.display());
    }
    Ok(median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_gap_in_time_is_standing_still() {
        let mut watch = std::pin::pin!(stood_still());
        for _ in 0..1000 {
            let looked = tokio::time::timeout(Duration::from_millis(400), watch.as_mut()).await;
            assert!(looked.is_err(), "time went on as usual");
        }
        tokio::time::advance(Duration::from_secs(6)).await;
        tokio::time::timeout(Duration::from_millis(1), watch).await.expect("it stood still");
    }
}
