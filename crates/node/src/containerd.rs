//! Our own containerd: configuration, start, adoption, supervision.
//!
//! It runs in its own session with its own directories, so that it outlives the agent: a new agent finds it by its
//! socket and adopts it. Pods outlive both.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::{cri::Cri, pause};

/// Where a supervised containerd keeps things.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Images, snapshots, metadata; survives a boot.
    pub root: PathBuf,
    /// Running state, socket, pid file; must not survive a boot.
    pub run: PathBuf,
    /// The CNI configuration directory.
    pub cni_conf: PathBuf,
}

impl Paths {
    /// The gRPC socket.
    pub fn socket(&self) -> PathBuf {
        self.run.join("containerd.sock")
    }
    fn pid_file(&self) -> PathBuf {
        self.run.join("containerd.pid")
    }
    fn config(&self) -> PathBuf {
        self.run.join("config.toml")
    }
    fn log(&self) -> PathBuf {
        self.root.with_extension("log")
    }
}

/// What this host can do, as far as containerd's configuration depends on it.
#[derive(Clone, Debug)]
pub struct Host {
    /// Without CAP_SYS_RESOURCE an `oom_score_adj` cannot be lowered, and runc fails when asked to.
    pub may_lower_oom_score: bool,
    /// Whether AppArmor is enabled in the kernel.
    pub apparmor: bool,
    /// Where the CNI plugins are.
    pub cni_bin: PathBuf,
}

impl Host {
    /// Looks at this host.
    pub fn detect() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let apparmor = fs::read_to_string("/sys/module/apparmor/parameters/enabled").unwrap_or_default();
        let cni_bin = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"]
            .into_iter()
            .map(PathBuf::from)
            .find(|d| d.join("host-local").exists())
            .unwrap_or_else(|| PathBuf::from("/opt/cni/bin"));
        Self { may_lower_oom_score: has_capability(&status, 24), apparmor: apparmor.trim() == "Y", cni_bin }
    }
}

/// Whether a capability (by number) is effective, from `/proc/<pid>/status`.
fn has_capability(status: &str, number: u32) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (1 << number) != 0)
}

/// containerd's configuration (version 2, which containerd 2 migrates by itself).
fn render(paths: &Paths, host: &Host) -> String {
    let quote = |p: &Path| format!("{:?}", p.display().to_string());
    format!(
        r#"version = 2
root = {root}
state = {state}
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]

[grpc]
  address = {socket}

[ttrpc]
  address = {ttrpc}

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = {no_apparmor}
  restrict_oom_score_adj = {restrict}
  disable_hugetlb_controller = false
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true
  enable_cdi = true

  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = {cni_bin}
    conf_dir = {cni_conf}

  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"

      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false

  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
"#,
        root = quote(&paths.root),
        state = quote(&paths.run.join("state")),
        socket = quote(&paths.socket()),
        ttrpc = quote(&paths.run.join("containerd.sock.ttrpc")),
        pause = pause::IMAGE,
        no_apparmor = !host.apparmor,
        restrict = !host.may_lower_oom_score,
        cni_bin = quote(&host.cni_bin),
        cni_conf = quote(&paths.cni_conf),
    )
}

/// A containerd that answers, and the process if it is our child.
pub struct Running {
    child: Option<std::process::Child>,
    pid: Option<u32>,
}

/// Adopts the containerd that answers on the socket, or starts one, and returns once CRI answers and the sandbox image
/// is there.
pub async fn ensure_running(paths: &Paths) -> anyhow::Result<Running> {
    for directory in [&paths.root, &paths.run, &paths.cni_conf] {
        fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    }
    if Cri::probe(&paths.socket(), Duration::from_secs(2)).await.is_ok() {
        let pid = fs::read_to_string(paths.pid_file()).ok().and_then(|p| p.trim().parse().ok());
        tracing::info!(?pid, "adopted the running containerd");
        ensure_pause(paths).await?;
        return Ok(Running { child: None, pid });
    }
    let child = start(paths)?;
    let pid = child.id();
    let mut running = Running { child: Some(child), pid: Some(pid) };
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match Cri::probe(&paths.socket(), Duration::from_secs(2)).await {
            Ok(()) => break,
            Err(error) if Instant::now() > deadline => {
                running.kill();
                return Err(error.context(format!("containerd does not answer; see {}", paths.log().display())));
            }
            Err(_) if !running.alive() => bail!("containerd exited at once; see {}", paths.log().display()),
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
    ensure_pause(paths).await?;
    Ok(running)
}

async fn ensure_pause(paths: &Paths) -> anyhow::Result<()> {
    let cri = Cri::connect(&paths.socket())?;
    if cri.image(pause::IMAGE).await?.is_none() {
        crate::image::import(&paths.socket(), pause::archive()?).await.context("import the sandbox image")?;
    }
    Ok(())
}

fn start(paths: &Paths) -> anyhow::Result<std::process::Child> {
    // A containerd that hangs without answering must not share its directories with a second one.
    if let Some(pid) = fs::read_to_string(paths.pid_file()).ok().and_then(|p| p.trim().parse::<u32>().ok())
        && is_containerd(pid, &paths.config())
    {
        tracing::warn!(pid, "a containerd of ours runs but does not answer: killing it");
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL);
    }
    fs::write(paths.config(), render(paths, &Host::detect())).context("write containerd's configuration")?;
    let log = paths.log();
    if fs::metadata(&log).is_ok_and(|m| m.len() > 10 << 20) {
        fs::rename(&log, log.with_extension("log.1")).context("rotate containerd's log")?;
    }
    let log = fs::OpenOptions::new().create(true).append(true).open(&log).context("open containerd's log")?;
    let mut command = std::process::Command::new("containerd");
    command.arg("--config").arg(paths.config()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // Own session: neither our death nor a terminal's hang-up reaches it.
    #[allow(unsafe_code)]
    // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into));
    }
    let child = command.spawn().context("start containerd (is it installed? apt-get install containerd)")?;
    fs::write(paths.pid_file(), child.id().to_string()).context("write containerd's pid file")?;
    tracing::info!(pid = child.id(), "started containerd");
    Ok(child)
}

fn is_containerd(pid: u32, config: &Path) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line);
    line.contains("containerd") && line.contains(&*config.to_string_lossy())
}

impl Running {
    /// Whether the process still lives, as far as can be told without asking it.
    fn alive(&mut self) -> bool {
        match (&mut self.child, self.pid) {
            (Some(child), _) => matches!(child.try_wait(), Ok(None)),
            (None, Some(pid)) => nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), None).is_ok(),
            (None, None) => true,
        }
    }

    fn kill(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Keeps containerd alive until `shutdown`; it is left running then.
pub async fn supervise(paths: Paths, mut running: Running, shutdown: CancellationToken) {
    let mut delay = Duration::from_millis(100);
    let mut last_start = Instant::now();
    while !shutdown.is_cancelled() {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = sleep(Duration::from_millis(500)) => {}
        }
        if running.alive() {
            if last_start.elapsed() > Duration::from_secs(60) {
                delay = Duration::from_millis(100);
            }
            continue;
        }
        tracing::warn!("containerd died; starting it again (pods live on)");
        match ensure_running(&paths).await {
            Ok(new) => running = new,
            Err(error) => tracing::error!("containerd does not start: {error:#}"),
        }
        last_start = Instant::now();
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = sleep(delay) => {}
        }
        delay = (delay * 2).min(Duration::from_secs(10));
    }
}

/// Stops a containerd of ours by its pid file. Used when everything is taken away.
pub async fn stop(paths: &Paths) -> anyhow::Result<()> {
    let Some(pid) = fs::read_to_string(paths.pid_file()).ok().and_then(|p| p.trim().parse::<u32>().ok()) else {
        return Ok(());
    };
    if !is_containerd(pid, &paths.config()) {
        return Ok(());
    }
    let target = nix::unistd::Pid::from_raw(pid as i32);
    let _ = nix::sys::signal::kill(target, nix::sys::signal::Signal::SIGTERM);
    let deadline = Instant::now() + Duration::from_secs(10);
    while is_containerd(pid, &paths.config()) {
        // Our own child would stay a zombie, whose command line is empty, so the loop ends for it as well.
        if Instant::now() > deadline {
            let _ = nix::sys::signal::kill(target, nix::sys::signal::Signal::SIGKILL);
            break;
        }
        sleep(Duration::from_millis(50)).await;
    }
    let _ = fs::remove_file(paths.pid_file());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_bits() {
        assert!(has_capability("Name:\tx\nCapEff:\t000001ffffffffff\n", 24));
        assert!(!has_capability("CapEff:\t000001fffeffffff\n", 24));
        assert!(!has_capability("", 24));
    }
}
