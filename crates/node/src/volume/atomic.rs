//! Files that change together: a directory with a timestamp holds the content, `..data` points to it and is switched by
//! one rename, and the names that a container sees are links through `..data`.
//!
//! The layout is upstream's, which programs rely on that watch `..data`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Component, Path, PathBuf},
};

use jiff::Timestamp;

/// A file of a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Its bytes.
    pub content: Vec<u8>,
    /// Its permission bits.
    pub mode: u32,
    /// Its owner, if not root.
    pub owner: Option<u32>,
}

/// Files by relative path.
pub type Payload = BTreeMap<String, File>;

const DATA: &str = "..data";

/// A path of a payload stays inside: relative, no `..`, not starting with `..`.
fn safe(path: &str) -> bool {
    let mut components = Path::new(path).components();
    !path.is_empty() && !path.starts_with("..") && components.all(|c| matches!(c, Component::Normal(_)))
}

/// Brings `directory` to `payload`. Returns whether anything changed; a reader sees the old or the new, never a mix.
pub fn write(directory: &Path, payload: &Payload, group: Option<u32>, now: Timestamp) -> io::Result<bool> {
    if let Some(bad) = payload.keys().find(|p| !safe(p)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("invalid path {bad:?} in a volume")));
    }
    let current = fs::read_link(directory.join(DATA)).ok().map(|target| directory.join(target));
    if current.as_ref().is_some_and(|current| same(current, payload)) {
        return Ok(false);
    }
    let name = format!("..{}.{:09}", now.strftime("%Y_%m_%d_%H_%M_%S"), now.subsec_nanosecond());
    let fresh = directory.join(&name);
    fs::create_dir(&fresh)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
    for (path, file) in payload {
        let at = fresh.join(path);
        if let Some(parent) = at.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&at, &file.content)?;
        let mode = if group.is_some() { file.mode | 0o440 } else { file.mode };
        if file.owner.is_some() || group.is_some() {
            std::os::unix::fs::chown(&at, file.owner, group)?;
        }
        fs::set_permissions(&at, fs::Permissions::from_mode(mode))?;
    }
    let temporary = directory.join("..data_tmp");
    let _ = fs::remove_file(&temporary);
    symlink(&name, &temporary)?;
    fs::rename(&temporary, directory.join(DATA))?;

    let visible: BTreeSet<PathBuf> =
        payload.keys().filter_map(|p| Path::new(p).components().next()).map(|c| PathBuf::from(c.as_os_str())).collect();
    for top in &visible {
        let link = directory.join(top);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(top), &link)?;
        }
    }
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let file_name = entry.file_name();
        let hidden = file_name.to_string_lossy().starts_with("..");
        if !hidden && !visible.contains(Path::new(&file_name)) {
            fs::remove_file(entry.path())?;
        } else if hidden && entry.file_type()?.is_dir() && *file_name != *name {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(true)
}

fn same(current: &Path, payload: &Payload) -> bool {
    fn walk(directory: &Path, prefix: &Path, found: &mut BTreeSet<String>) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let path = prefix.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                walk(&entry.path(), &path, found)?;
            } else {
                found.insert(path.to_string_lossy().into_owned());
            }
        }
        Ok(())
    }
    let mut found = BTreeSet::new();
    walk(current, Path::new(""), &mut found).is_ok()
        && found.iter().eq(payload.keys())
        && payload.iter().all(|(path, file)| fs::read(current.join(path)).is_ok_and(|content| content == file.content))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        let file = |c: &str| File { content: c.into(), mode: 0o644, owner: None };
        files.iter().map(|(p, c)| ((*p).to_owned(), file(c))).collect()
    }

    #[test]
    fn switches_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let d = directory.path();
        let t = |s: i64| Timestamp::from_second(s).unwrap();
        assert!(write(d, &payload(&[("a", "1"), ("x/y", "2")]), None, t(1)).unwrap());
        assert_eq!(fs::read_to_string(d.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(d.join("x/y")).unwrap(), "2");
        let target = fs::read_link(d.join(DATA)).unwrap();
        assert!(!write(d, &payload(&[("a", "1"), ("x/y", "2")]), None, t(2)).unwrap());
        assert_eq!(fs::read_link(d.join(DATA)).unwrap(), target);
        assert!(write(d, &payload(&[("a", "3")]), None, t(3)).unwrap());
        assert_eq!(fs::read_to_string(d.join("a")).unwrap(), "3");
        assert!(fs::symlink_metadata(d.join("x")).is_err());
        // The old content is gone: one directory, ..data and the link are left.
        assert_eq!(fs::read_dir(d).unwrap().count(), 3);
    }

    #[test]
    fn stays_inside() {
        let directory = tempfile::tempdir().unwrap();
        for bad in ["../x", "/etc/passwd", "a/../../b", "", "..data"] {
            assert!(write(directory.path(), &payload(&[(bad, "1")]), None, Timestamp::UNIX_EPOCH).is_err(), "{bad}");
        }
    }
}
