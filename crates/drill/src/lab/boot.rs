//! How a machine starts, from the inside: its namespaces, its mounts, its identity.
//!
//! Two stages of this same program. The *starter* joins the machine's cgroups and network, leaves the host's other
//! namespaces and starts the machine's first process there; that one puts the file system together and goes on as
//! [`super::init`]. What they have to say until then they say in lines on stdout: `pid N`, then `ready` or `error ...`.

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    unistd::{chdir, pivot_root, sethostname, setsid},
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    cgroup::{self, Groups},
    error::{Cause, Step},
    layout::MachinePlace,
    network, state,
};

/// Where a machine finds what the lab gives it.
pub const GIVEN: &str = "/run/seawall-lab";
/// Where machines see the directory that they share.
pub const SHARED: &str = "/run/seawall-lab/shared";

/// Everything that a boot has to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Boot {
    /// The machine's name.
    pub machine: String,
    /// The name of its cgroups and of its network namespace.
    pub group: String,
    /// The machine's directory.
    pub dir: PathBuf,
    /// The directory of all labs, which machines do not see.
    pub labs: PathBuf,
    /// The program that machines run.
    pub binary: PathBuf,
    /// Names and addresses of all machines.
    pub hosts: BTreeMap<String, Ipv4Addr>,
}

/// What is on a machine's disk in directories of their own. The rest of /etc and /var is layered over the host's.
/// containerd needs a real directory, since the kernel refuses an overlay on an overlay; the rest is faster so.
pub const DIRECTORIES: [&str; 7] =
    ["var/lib/seawall", "var/lib/containerd", "var/lib/etcd", "var/lib/kubelet", "var/lib/cni", "var/log", "var/tmp"];

/// File systems that are the kernel's own views, or that belong to the host's uptime.
const NOT_DISKS: [&str; 21] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "tmpfs",
    "ramfs",
    "cgroup",
    "cgroup2",
    "nsfs",
    "overlay",
    "mqueue",
    "bpf",
    "securityfs",
    "tracefs",
    "debugfs",
    "fusectl",
    "hugetlbfs",
    "pstore",
    "configfs",
    "autofs",
    "binfmt_misc",
];

impl Boot {
    /// Reads the file of a machine.
    pub fn read(place: &MachinePlace) -> Step<Boot> {
        let path = place.boot_file();
        let text = fs::read_to_string(&path).map_err(Cause::io(path.display().to_string()))?;
        serde_json::from_str(&text).map_err(|e| Cause::Other(format!("{}: {e}", path.display())))
    }

    fn place(&self) -> MachinePlace {
        MachinePlace { dir: self.dir.clone() }
    }
}

/// The starter: becomes the machine on the outside, starts its first process, and ends.
pub fn start(place: &MachinePlace) -> Step {
    let boot = Boot::read(place)?;
    state::keep_to_myself();
    // Neither a terminal's signals nor its end concern a machine.
    let _ = setsid();
    Groups::new(&boot.group)?.join()?;
    let namespace = network::namespace(&boot.group);
    let file = fs::File::open(&namespace).map_err(Cause::io(namespace.display().to_string()))?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(Cause::errno("enter the machine's network"))?;
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWPID;
    unshare(flags).map_err(Cause::errno("make namespaces"))?;
    let console = super::open_log(&place.console())?;
    let program = std::env::current_exe().map_err(Cause::io("find this program"))?;
    // Only the next process is in the new process namespace: it is the first one there.
    let mut command = Command::new(program);
    command.args(["lab", "init", "--machine"]).arg(&place.dir).stdin(Stdio::null()).stderr(console);
    let child = command.spawn().map_err(Cause::io("start the machine's first process"))?;
    println!("pid {}", child.id());
    Ok(())
}

/// Puts the machine's file system together and gives it its identity. What was the host's is out of reach afterwards,
/// and nothing of the host's mounts is held.
pub async fn furnish(place: &MachinePlace) -> Step<Boot> {
    let boot = Boot::read(place)?;
    let root = place.root();
    let cgroups = cgroup::hierarchies()?;
    fs::create_dir_all(&root).map_err(Cause::io(root.display().to_string()))?;
    // From here on nothing that is mounted shows on the host.
    bare("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    bind(Path::new("/"), &root)?;
    disks(&boot, &root)?;
    fs::create_dir_all(place.disk()).map_err(Cause::io(place.disk().display().to_string()))?;
    for directory in ["etc", "var"] {
        overlay(&boot, &root, directory).await?;
    }
    for directory in DIRECTORIES {
        let disk = place.disk().join(directory.replace('/', "-"));
        fs::create_dir_all(&disk).map_err(Cause::io(disk.display().to_string()))?;
        bind(&disk, &made(&root, directory)?)?;
    }
    mode(&root.join("var/tmp"), 0o1777)?;
    // /tmp is emptied by a boot, as on most machines.
    let tmp = place.disk().join("tmp");
    let _ = fs::remove_dir_all(&tmp);
    fs::create_dir_all(&tmp).map_err(Cause::io(tmp.display().to_string()))?;
    bind(&tmp, &made(&root, "tmp")?)?;
    mode(&root.join("tmp"), 0o1777)?;
    hide(&boot.labs, &root)?;
    fresh("tmpfs", &made(&root, "run")?, "mode=755")?;
    made(&root, "run/lock")?;
    given(&boot, &root)?;
    views(&root)?;
    groups(&cgroups, &root)?;
    enter(&root)?;
    identity(&boot)?;
    Ok(boot)
}

/// Further disks of the host, where they are on the host; everything else that is mounted there stays behind.
fn disks(boot: &Boot, root: &Path) -> Step {
    let text = fs::read_to_string("/proc/self/mountinfo").map_err(Cause::io("/proc/self/mountinfo"))?;
    for at in host_disks(&text, &boot.labs).iter().filter(|at| at.is_dir()) {
        // A disk that cannot be shown is missing on the machine and harms nothing there.
        if let Err(error) = bind(at, &under(root, at)) {
            tracing::warn!(%error, "a disk of the host is not visible here");
        }
    }
    Ok(())
}

fn host_disks(mountinfo: &str, labs: &Path) -> Vec<PathBuf> {
    let own = ["/proc", "/sys", "/dev", "/run", "/tmp", "/var", "/etc"].map(Path::new);
    let lines = mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let at = PathBuf::from(left.split(' ').nth(4)?.replace("\\040", " "));
        let kind = right.split(' ').next()?;
        let wanted = at != Path::new("/")
            && !NOT_DISKS.contains(&kind)
            && !own.iter().any(|o| at.starts_with(o))
            && !at.starts_with(labs);
        wanted.then_some(at)
    });
    lines.collect()
}

/// A directory of the host with the machine's own layer over it.
async fn overlay(boot: &Boot, root: &Path, directory: &str) -> Step {
    let disk = boot.place().disk();
    let (upper, work) = (disk.join(directory), disk.join(format!("{directory}.work")));
    for path in [&upper, &work] {
        fs::create_dir_all(path).map_err(Cause::io(path.display().to_string()))?;
    }
    let options = format!("lowerdir=/{directory},upperdir={},workdir={}", upper.display(), work.display());
    let target = root.join(directory);
    let attempt = || mount(Some("overlay"), &target, Some("overlay"), MsFlags::empty(), Some(options.as_str()));
    let mut result = attempt();
    // The kernel takes a dead machine's mounts away a little after its last process.
    let deadline = Instant::now() + Duration::from_secs(5);
    while result == Err(Errno::EBUSY) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
        result = attempt();
    }
    result.map_err(Cause::errno(format!("mount an overlay on /{directory} ({options})")))
}

/// What the lab gives to a machine: the program, and the directory over which they talk.
fn given(boot: &Boot, root: &Path) -> Step {
    let conf = boot.place().conf();
    fs::create_dir_all(&conf).map_err(Cause::io(conf.display().to_string()))?;
    bind(&conf, &made(root, &format!("{GIVEN}/conf"))?)?;
    let shared = boot.place().shared();
    fs::create_dir_all(&shared).map_err(Cause::io(shared.display().to_string()))?;
    bind(&shared, &made(root, SHARED.trim_start_matches('/'))?)?;
    let program = made(root, &format!("{GIVEN}/bin"))?.join("seawall");
    fs::write(&program, "").map_err(Cause::io(program.display().to_string()))?;
    bind(&boot.binary, &program)
}

/// The kernel's views.
fn views(root: &Path) -> Step {
    bind(Path::new("/dev"), &root.join("dev"))?;
    fresh("devpts", &made(root, "dev/pts")?, "mode=620,ptmxmode=666")?;
    fresh("tmpfs", &made(root, "dev/shm")?, "mode=1777")?;
    fresh("proc", &root.join("proc"), "")?;
    fresh("sysfs", &root.join("sys"), "")?;
    let bpf = root.join("sys/fs/bpf");
    if bpf.exists() {
        // Not every kernel has it, and nothing here needs it.
        let _ = fresh("bpf", &bpf, "");
    }
    // A boot of this machine is not one of the host.
    let id = root.join("run/seawall-lab/boot_id");
    fs::write(&id, format!("{}\n", uuid())).map_err(Cause::io(id.display().to_string()))?;
    bind(&id, &root.join("proc/sys/kernel/random/boot_id"))
}

/// The host's hierarchies again, seen from the machine's groups.
fn groups(cgroups: &[cgroup::Hierarchy], root: &Path) -> Step {
    let top = root.join("sys/fs/cgroup");
    if let [only] = cgroups
        && only.v2
    {
        fresh("cgroup2", &top, "")?;
        return leaf(&top);
    }
    fresh("tmpfs", &top, "mode=755")?;
    for hierarchy in cgroups {
        let Some(name) = hierarchy.mount.file_name() else { continue };
        let at = top.join(name);
        fs::create_dir_all(&at).map_err(Cause::io(at.display().to_string()))?;
        if hierarchy.v2 {
            fresh("cgroup2", &at, "")?;
            leaf(&at)?;
        } else {
            fresh("cgroup", &at, &hierarchy.options)?;
        }
    }
    // Hosts have short names for controllers that are mounted together: `cpu` for `cpu,cpuacct`.
    for entry in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        if let Ok(target) = fs::read_link(entry.path()) {
            let _ = symlink(target, top.join(entry.file_name()));
        }
    }
    Ok(())
}

/// v2 hands controllers down only from groups without processes.
fn leaf(top: &Path) -> Step {
    let leaf = top.join(cgroup::LEAF);
    fs::create_dir_all(&leaf).map_err(Cause::io(leaf.display().to_string()))?;
    fs::write(leaf.join("cgroup.procs"), "0").map_err(Cause::io(format!("join {}", leaf.display())))?;
    cgroup::hand_down(top);
    Ok(())
}

/// Makes `root` the root, and lets go of the old one with all that is mounted there.
fn enter(root: &Path) -> Step {
    chdir(root).map_err(Cause::errno("enter the machine's root"))?;
    // The old root goes on top of the new one, where it can be taken away without a directory for it (pivot_root(2)).
    pivot_root(".", ".").map_err(Cause::errno("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(Cause::errno("let go of the host's root"))?;
    chdir("/").map_err(Cause::errno("enter /"))?;
    // As on a machine with systemd: pods' mounts may propagate within the machine.
    bare("/", MsFlags::MS_REC | MsFlags::MS_SHARED)
}

fn identity(boot: &Boot) -> Step {
    sethostname(&boot.machine).map_err(Cause::errno("set the host name"))?;
    replace("/etc/hostname", &format!("{}\n", boot.machine))?;
    let mut hosts = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost\n");
    for (name, address) in &boot.hosts {
        hosts += &format!("{address} {name}\n");
    }
    replace("/etc/hosts", &hosts)?;
    replace("/etc/resolv.conf", "# This machine has no name server.\n")?;
    // The identity stays with the disk; the host's is not it.
    let kept = Path::new("/var/lib/seawall-lab-machine-id");
    if !kept.exists() {
        replace(&kept.display().to_string(), &format!("{}\n", uuid().replace('-', "")))?;
    }
    let id = fs::read_to_string(kept).map_err(Cause::io(kept.display().to_string()))?;
    replace("/etc/machine-id", &id)
}

/// Writes a file that may be a link into the host's /run.
fn replace(path: &str, text: &str) -> Step {
    if fs::symlink_metadata(path).is_ok() {
        fs::remove_file(path).map_err(Cause::io(format!("replace {path}")))?;
    }
    fs::write(path, text).map_err(Cause::io(path))
}

fn uuid() -> String {
    // The kernel makes them as well as any library: random(4).
    fs::read_to_string("/proc/sys/kernel/random/uuid").map(|t| t.trim().to_owned()).unwrap_or_default()
}

/// The labs' directory is the host's business.
fn hide(labs: &Path, root: &Path) -> Step {
    let at = under(root, labs);
    if at.exists() { fresh("tmpfs", &at, "mode=755,size=4k") } else { Ok(()) }
}

fn under(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn made(root: &Path, directory: &str) -> Step<PathBuf> {
    let path = under(root, Path::new(directory));
    fs::create_dir_all(&path).map_err(Cause::io(path.display().to_string()))?;
    Ok(path)
}

fn mode(path: &Path, mode: u32) -> Step {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Cause::io(path.display().to_string()))
}

fn bind(from: &Path, to: &Path) -> Step {
    let result = mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>);
    result.map_err(Cause::errno(format!("bind {} on {}", from.display(), to.display())))
}

fn bare(at: &str, flags: MsFlags) -> Step {
    mount(None::<&str>, at, None::<&str>, flags, None::<&str>).map_err(Cause::errno(format!("change the mount {at}")))
}

fn fresh(kind: &str, at: &Path, options: &str) -> Step {
    let flags =
        MsFlags::MS_NOSUID | if kind == "devpts" || kind == "tmpfs" { MsFlags::empty() } else { MsFlags::MS_NODEV };
    let result = mount(Some(kind), at, Some(kind), flags, Some(options));
    result.map_err(Cause::errno(format!("mount {kind} ({options}) on {}", at.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_mounts_of_the_host_are_disks() {
        let text = "\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 8:2 / /home rw - xfs /dev/sda2 rw
24 22 0:4 / /proc rw - proc proc rw
25 22 8:3 / /var rw - ext4 /dev/sda3 rw
26 22 0:30 / /mnt/fast\\040disk rw shared:1 - btrfs /dev/sdb rw
27 22 0:31 / /snap/core ro - tmpfs tmpfs rw
28 22 8:4 / /labs rw - ext4 /dev/sdc rw
29 22 8:1 /x /run/netns rw - ext4 /dev/sda1 rw
";
        assert_eq!(host_disks(text, Path::new("/labs")), [Path::new("/home"), Path::new("/mnt/fast disk")]);
    }
}
