//! Running a program on a machine, from the host.

use std::{
    fs::{self, File},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::Path,
    process::Stdio,
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::{Pid, chdir},
};
use tokio::signal::unix::{SignalKind, signal};

use super::{
    boot::Boot,
    cgroup::Groups,
    error::{Cause, Step},
    init::PATH,
    layout::MachinePlace,
    machine::Running,
};

/// Joins the machine, runs the program there, and gives the code to end with. The program ends with this process.
pub async fn run(place: &MachinePlace, command: &[String]) -> Step<i32> {
    let boot = Boot::read(place)?;
    let running = Running::read(place).ok_or_else(|| Cause::Other(format!("machine {} is not up", boot.machine)))?;
    let [program, args @ ..] = command else { return Err(Cause::Other("no program was named".into())) };
    // All files first: afterwards /proc is another one.
    let open = |kind: &str| {
        let path = format!("/proc/{}/ns/{kind}", running.pid);
        File::open(&path).map_err(Cause::io(path))
    };
    let namespaces = [
        (open("net")?, CloneFlags::CLONE_NEWNET),
        (open("uts")?, CloneFlags::CLONE_NEWUTS),
        (open("ipc")?, CloneFlags::CLONE_NEWIPC),
        (open("pid")?, CloneFlags::CLONE_NEWPID),
        (open("cgroup")?, CloneFlags::CLONE_NEWCGROUP),
        (open("mnt")?, CloneFlags::CLONE_NEWNS),
    ];
    Groups::new(&boot.group)?.join()?;
    // Root and working directory are shared with the other threads, and a shared one cannot change its mounts.
    unshare(CloneFlags::CLONE_FS).map_err(Cause::errno("leave the other threads' root"))?;
    for (file, kind) in namespaces {
        setns(file, kind).map_err(Cause::errno(format!("enter the machine ({kind:?})")))?;
    }
    chdir("/").map_err(Cause::errno("enter /"))?;
    let mut child = std::process::Command::new(program);
    child.args(args).env("PATH", PATH).env("HOME", "/root").env_remove("KUBECONFIG").stdin(Stdio::inherit());
    for proxy in ["http_proxy", "https_proxy", "no_proxy", "all_proxy"] {
        child.env_remove(proxy).env_remove(proxy.to_uppercase());
    }
    if find(program).is_none() {
        return Err(Cause::Other(format!("there is no program {program:?} on machine {}", boot.machine)));
    }
    end_with_parent(&mut child);
    // A terminal sends these to the whole foreground group; whether they end anything is the program's decision.
    let handler = |kind| signal(kind).map_err(Cause::io("handle signals"));
    let (mut interrupt, mut quit) = (handler(SignalKind::interrupt())?, handler(SignalKind::quit())?);
    let (mut terminate, mut hangup) = (handler(SignalKind::terminate())?, handler(SignalKind::hangup())?);
    let mut ended = handler(SignalKind::child())?;
    let mut child = child.spawn().map_err(Cause::io(format!("start {program}")))?;
    let pid = Pid::from_raw(child.id().cast_signed());
    // No thread can be started from here on: it would belong to the machine's processes.
    let status = loop {
        if let Some(status) = child.try_wait().map_err(Cause::io(format!("wait for {program}")))? {
            break status;
        }
        tokio::select! {
            _ = ended.recv() => {}
            _ = interrupt.recv() => {}
            _ = quit.recv() => {}
            _ = terminate.recv() => drop(kill(pid, Signal::SIGTERM)),
            _ = hangup.recv() => drop(kill(pid, Signal::SIGHUP)),
        }
    };
    // As shells say it.
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
}

fn find(program: &str) -> Option<()> {
    let there = |path: &Path| fs::metadata(path).is_ok_and(|m| m.is_file());
    if program.contains('/') {
        return there(Path::new(program)).then_some(());
    }
    PATH.split(':').any(|d| there(&Path::new(d).join(program))).then_some(())
}

/// Lets the kernel kill the program when this process is killed: whoever started us meant it.
#[allow(unsafe_code)]
fn end_with_parent(command: &mut std::process::Command) {
    // SAFETY: between fork and exec only functions that are safe in a signal handler may be called; prctl is a plain
    // system call and allocates nothing.
    unsafe {
        command.pre_exec(|| prctl::set_pdeathsig(Signal::SIGKILL).map_err(Into::into));
    }
}
