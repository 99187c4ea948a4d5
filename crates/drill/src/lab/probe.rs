//! Whether this host can run a lab. Kernel features are tried, not looked up: names of modules and versions say little.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::{
    Options, cgroup,
    error::{Cause, Error, Result, Step},
    network,
};

/// What a machine's disk needs to begin with, in MiB: bare, and with a cluster's images and data.
const ROOM: (u64, u64) = (16, 512);

/// Programs, and the Debian package that has them.
const ALWAYS: [(&str, &str); 2] = [("ip", "iproute2"), ("nft", "nftables")];
const CLUSTER: [(&str, &str); 4] =
    [("containerd", "containerd"), ("runc", "runc"), ("etcd", "etcd-server"), ("conntrack", "conntrack")];
const PLUGINS: [&str; 4] = ["ptp", "host-local", "loopback", "portmap"];
const PLUGIN_DIRECTORIES: [&str; 3] = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"];

/// Refuses everyone but root.
pub fn root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::Unmet(vec!["root is needed: it makes namespaces, mounts and cgroups; run it with sudo".into()]))
}

/// Looks at everything that `up` will need, and names all that is missing at once.
pub async fn check(options: &Options) -> Result<()> {
    let mut unmet = programs(options.cluster.is_some());
    if let Some(missing) = binary(&options.binary) {
        unmet.push(missing);
    }
    for kind in ["net", "mnt", "pid", "uts", "ipc", "cgroup"] {
        if !Path::new("/proc/self/ns").join(kind).exists() {
            unmet.push(format!("the kernel has no {kind} namespaces"));
        }
    }
    match cgroup::hierarchies() {
        Ok(all) if all.iter().any(|h| h.v2 || h.options.split(',').any(|o| o == "freezer")) => {}
        Ok(all) if all.is_empty() => {
            unmet.push("no cgroup hierarchy is mounted (mount cgroup2 on /sys/fs/cgroup)".into())
        }
        Ok(_) => unmet.push("the freezer of cgroups is missing: neither v1's freezer nor v2 is mounted".into()),
        Err(cause) => unmet.push(format!("cgroups: {cause}")),
    }
    // Without its programs the network cannot be tried.
    if ALWAYS.iter().all(|(program, _)| find(program).is_some()) {
        unmet.extend(network::probe().await.into_iter().map(|refused| format!("the kernel refuses {refused}")));
    }
    unmet.extend(disk(options).await);
    if unmet.is_empty() {
        return Ok(());
    }
    // What was made for the attempts goes, unless others use it.
    let _ = fs::remove_dir(&options.dir);
    Err(Error::Unmet(unmet))
}

fn programs(cluster: bool) -> Vec<String> {
    let wanted = ALWAYS.iter().chain(CLUSTER.iter().filter(|_| cluster));
    let mut unmet: Vec<String> = wanted
        .filter(|(program, _)| find(program).is_none())
        .map(|(program, package)| format!("{program} is not on PATH: apt-get install {package}"))
        .collect();
    if cluster {
        let there = |plugin: &&str| PLUGIN_DIRECTORIES.iter().any(|d| Path::new(d).join(plugin).exists());
        let missing: Vec<&str> = PLUGINS.into_iter().filter(|p| !there(p)).collect();
        if !missing.is_empty() {
            unmet.push(format!(
                "the CNI plugins {} are in none of {}: apt-get install containernetworking-plugins",
                missing.join(", "),
                PLUGIN_DIRECTORIES.join(", ")
            ));
        }
    }
    unmet
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|d| d.join(program)).find(|p| p.is_file())
}

fn binary(path: &Path) -> Option<String> {
    (!path.is_file())
        .then(|| format!("{} is not there: machines run this very program; build it again", path.display()))
}

async fn disk(options: &Options) -> Vec<String> {
    if let Err(error) = make_directory(&options.dir) {
        return vec![format!("--dir {}: {error}", options.dir.display())];
    }
    let mut unmet = Vec::new();
    let each = if options.cluster.is_some() { ROOM.1 } else { ROOM.0 };
    let needed = each * u64::from(options.servers.saturating_add(options.agents));
    match nix::sys::statvfs::statvfs(&options.dir) {
        Ok(disk) => {
            let free = disk.blocks_available() * disk.fragment_size() / (1 << 20);
            if free < needed {
                unmet.push(format!(
                    "--dir {}: {free} MiB are free, and {} machines need {needed}: make room, or give another directory",
                    options.dir.display(),
                    options.servers.saturating_add(options.agents)
                ));
            }
        }
        Err(error) => unmet.push(format!("--dir {}: {error}", options.dir.display())),
    }
    if let Err(cause) = overlay(&options.dir).await {
        unmet.push(format!(
            "--dir {} cannot hold the machines' layers over /etc: {cause}; give a directory on a disk (ext4, xfs, btrfs)",
            options.dir.display()
        ));
    }
    unmet
}

/// Makes a directory and all above it. The one of all labs may be removed with another lab just then.
pub fn make_directory(path: &Path) -> std::io::Result<()> {
    for _ in 0..10 {
        match fs::create_dir_all(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            result => return result,
        }
    }
    fs::create_dir_all(path)
}

/// Mounts an overlay in a mount namespace that vanishes with the attempt.
async fn overlay(dir: &Path) -> Step {
    // Labs that come up side by side may share the directory, also within one process.
    static ATTEMPTS: AtomicU32 = AtomicU32::new(0);
    let attempt = ATTEMPTS.fetch_add(1, Ordering::Relaxed);
    let top = dir.join(format!(".probe-{}-{attempt}", std::process::id()));
    let made = top.clone();
    let attempt = network::aside(move || {
        for part in ["upper", "work", "root"] {
            make_directory(&made.join(part)).map_err(Cause::io(made.display().to_string()))?;
        }
        unshare(CloneFlags::CLONE_NEWNS).map_err(Cause::errno("make a mount namespace"))?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(Cause::errno("make mounts private"))?;
        let shown = made.display();
        let options = format!("lowerdir=/etc,upperdir={shown}/upper,workdir={shown}/work");
        let root = made.join("root");
        mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .map_err(Cause::errno("mount an overlay"))?;
        fs::write(root.join("probe"), "").map_err(Cause::io("write to an overlay"))
    })
    .await;
    let removed = fs::remove_dir_all(&top).map_err(Cause::io(top.display().to_string()));
    attempt.and(removed)
}
