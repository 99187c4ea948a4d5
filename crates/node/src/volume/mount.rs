//! Mounts: tmpfs for what must not reach a disk, and bind mounts of subPaths that cannot be turned elsewhere by a link.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, mkdirat},
};

/// The mount points at or below a directory, deepest first.
pub fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = parse_mount_points(&fs::read_to_string("/proc/self/mountinfo")?)
        .into_iter()
        .filter(|point| point.starts_with(directory))
        .collect();
    found.sort_by_key(|p| std::cmp::Reverse(p.components().count()));
    Ok(found)
}

fn parse_mount_points(mountinfo: &str) -> Vec<PathBuf> {
    let unescape =
        |text: &str| text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
    mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| PathBuf::from(unescape(point))).collect()
}

/// Whether something is mounted exactly here.
pub fn is_mount_point(directory: &Path) -> io::Result<bool> {
    Ok(mounts_below(directory)?.iter().any(|point| point == directory))
}

/// Mounts a tmpfs here, once; a size of `None` leaves the kernel's default.
pub fn tmpfs(directory: &Path, size: Option<u64>) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    if is_mount_point(directory)? {
        return Ok(());
    }
    let options = size.map(|s| format!("size={s}")).unwrap_or_default();
    mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))?;
    Ok(())
}

/// Mounts huge pages of this size in bytes, unless something is mounted there.
pub fn huge_pages(directory: &Path, page: u64, size: Option<u64>) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    if is_mount_point(directory)? {
        return Ok(());
    }
    let size = size.map(|s| format!(",size={s}")).unwrap_or_default();
    let options = format!("pagesize={page}{size}");
    mount(Some("nodev"), directory, Some("hugetlbfs"), MsFlags::empty(), Some(options.as_str()))?;
    Ok(())
}

/// Unmounts everything at or below a directory, then removes it.
pub fn remove_tree(directory: &Path) -> io::Result<()> {
    for point in mounts_below(directory)? {
        match umount2(&point, MntFlags::empty()) {
            Ok(()) | Err(Errno::EINVAL) => {}
            // A process of a dying container may still hold it; it goes with its last user.
            Err(Errno::EBUSY) => umount2(&point, MntFlags::MNT_DETACH)?,
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Binds `volume/sub` to `target` and makes sure that it is inside the volume: a link that a container has left in the
/// volume must not lead out of it, not even when it is swapped in while we look. A missing path is made.
pub fn bind_sub_path(volume: &Path, sub: &str, target: &Path) -> io::Result<()> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
    if Path::new(sub).components().any(|c| !matches!(c, Component::Normal(_) | Component::CurDir)) {
        return Err(invalid(format!("subPath {sub:?} must be relative and must not contain '..'")));
    }
    let root = volume.canonicalize()?;
    let wanted = root.join(sub);
    // Resolve what exists, then walk that, link-free, one component at a time.
    let mut existing = wanted.clone();
    let mut missing: Vec<std::ffi::OsString> = Vec::new();
    while fs::symlink_metadata(&existing).is_err() {
        let (Some(name), Some(parent)) = (existing.file_name(), existing.parent()) else { break };
        missing.push(name.to_owned());
        existing = parent.to_path_buf();
    }
    let resolved = existing.canonicalize()?;
    let Ok(inside) = resolved.strip_prefix(&root) else {
        return Err(invalid(format!("subPath {sub:?} leads out of its volume")));
    };
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut at: OwnedFd = open(&root, flags | OFlag::O_DIRECTORY, Mode::empty())?;
    for component in inside.components() {
        at = openat(&at, component.as_os_str(), flags, Mode::empty())?;
    }
    for name in missing.iter().rev() {
        match mkdirat(&at, name.as_os_str(), Mode::from_bits_truncate(0o750)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        at = openat(&at, name.as_os_str(), flags, Mode::empty())?;
    }
    let source = PathBuf::from(format!("/proc/self/fd/{}", at.as_raw_fd()));
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    if fs::metadata(&source)?.is_dir() {
        fs::create_dir_all(target)?;
    } else if !target.exists() {
        fs::write(target, b"")?;
    }
    while is_mount_point(target)? {
        umount2(target, MntFlags::MNT_DETACH)?;
    }
    mount(Some(&source), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo() {
        let text = "36 35 98:0 /mnt1 /mnt\\040two rw,noatime master:1 - ext3 /dev/root rw\n";
        assert_eq!(parse_mount_points(text), [PathBuf::from("/mnt two")]);
    }

    #[test]
    fn sub_paths_stay_inside() {
        let directory = tempfile::tempdir().unwrap();
        let (volume, target) = (directory.path().join("v"), directory.path().join("t"));
        fs::create_dir_all(volume.join("a")).unwrap();
        std::os::unix::fs::symlink("/etc", volume.join("out")).unwrap();
        for bad in ["../x", "out", "out/passwd", "/etc"] {
            assert!(bind_sub_path(&volume, bad, &target).is_err(), "{bad}");
        }
        bind_sub_path(&volume, "a/new/dir", &target).unwrap();
        fs::write(target.join("f"), b"1").unwrap();
        assert!(volume.join("a/new/dir/f").exists());
        remove_tree(&target).unwrap();
        assert!(volume.join("a/new/dir").exists());
    }
}
