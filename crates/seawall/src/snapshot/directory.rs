//! The snapshots of one server, as they are on its disk. Beside each file there may be another that says when it was
//! last read back, and in the directory one that says what was last restored.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use seawall_store::{
    Revision,
    snapshot::{self, Info},
};
use serde::{Deserialize, Serialize};

use crate::pki;

/// What the names of snapshots' files end with.
const SUFFIX: &str = ".snap";
/// What is appended for the file that says when it was verified.
const VERIFIED: &str = "verified";
/// The store into which a snapshot is read back.
const SCRATCH: &str = ".scratch";
/// What was last restored.
const RESTORED: &str = "restored.json";
/// What names of snapshots may have at most, so that names of files are not too long.
const LONGEST: usize = 200;

/// A snapshot that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// The newest revision in it.
    pub revision: u64,
    /// When it was written.
    pub time: Timestamp,
    /// How many objects are in it.
    pub keys: u64,
    /// How many bytes the file has.
    pub size: u64,
    /// The digest of the file.
    pub sha256: String,
    /// When it was last read back whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Timestamp>,
    /// What is wrong with it; then nothing else is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Restored {
    /// The name of the snapshot, or of its file.
    pub name: String,
    /// The newest revision in it.
    pub revision: u64,
    /// When that was.
    pub time: Timestamp,
    /// The revision above which the store went on.
    pub floor: u64,
}

#[derive(Serialize, Deserialize)]
struct Verified {
    sha256: String,
    time: Timestamp,
}

/// A directory of snapshots.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// The directory at this place, which need not be there yet.
    pub fn new(path: PathBuf) -> Directory {
        Directory { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, for its owner alone.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn make(&self) -> anyhow::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .with_context(|| format!("--snapshot-dir {}: it cannot be made", self.path.display()))
    }

    /// Takes away what was begun and never ended.
    pub fn sweep(&self) {
        let files = self.files().unwrap_or_else(|error| {
            tracing::warn!("{error:#}");
            Vec::new()
        });
        for path in files {
            let partial = path.extension().is_some_and(|extension| extension == "partial");
            let gone = match path.file_name().is_some_and(|name| name == SCRATCH) {
                true => fs::remove_dir_all(&path),
                false if partial => fs::remove_file(&path),
                false => continue,
            };
            if let Err(error) = gone {
                tracing::warn!(path = %path.display(), %error, "what is left of a snapshot that was broken off stays behind");
            }
        }
    }

    /// The file of a snapshot.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{SUFFIX}"))
    }

    /// Where a snapshot can be read back into.
    pub fn scratch(&self) -> PathBuf {
        self.path.join(SCRATCH)
    }

    /// The snapshots, the newest first.
    ///
    /// # Errors
    /// If the directory is there and cannot be read.
    pub fn list(&self) -> anyhow::Result<Vec<Kept>> {
        let mut found: Vec<Kept> = self
            .files()?
            .iter()
            .filter_map(|path| {
                let name = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?;
                Some(self.kept(name, snapshot::peek(path)))
            })
            .collect();
        found.sort_by(|a, b| (b.time, &b.name).cmp(&(a.time, &a.name)));
        Ok(found)
    }

    /// One snapshot.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn one(&self, name: &str) -> anyhow::Result<Kept> {
        check_name(name)?;
        let file = self.file(name);
        if !file.exists() {
            bail!(
                "there is no snapshot {name:?} in {}; seawall snapshot ls lists those there are",
                self.path.display()
            );
        }
        Ok(self.kept(name, snapshot::peek(&file)))
    }

    fn kept(&self, name: &str, info: Result<Info, snapshot::SnapshotError>) -> Kept {
        let name = name.to_owned();
        match info {
            Ok(info) => {
                let sha256 = info.sum.hex();
                let verified = verified(&self.file(&name).with_added_extension(VERIFIED));
                Kept {
                    revision: info.header.revision.0,
                    time: Timestamp::from_second(info.header.time).unwrap_or_default(),
                    keys: info.sum.keys,
                    size: info.size,
                    verified: verified.filter(|verified| verified.sha256 == sha256).map(|verified| verified.time),
                    sha256,
                    fault: None,
                    name,
                }
            }
            Err(error) => Kept {
                name,
                revision: 0,
                time: Timestamp::default(),
                keys: 0,
                size: 0,
                sha256: String::new(),
                verified: None,
                fault: Some(error.to_string()),
            },
        }
    }

    /// Takes note that a snapshot was read back whole.
    ///
    /// # Errors
    /// If that cannot be written down.
    pub fn note_verified(&self, name: &str, info: &Info, time: Timestamp) -> anyhow::Result<()> {
        let text = serde_json::to_string(&Verified { sha256: info.sum.hex(), time })?;
        Ok(pki::write(&self.file(name).with_added_extension(VERIFIED), &text, 0o600)?)
    }

    /// What was last restored on this machine.
    ///
    /// # Errors
    /// If that stands there and cannot be read: then nobody knows above which revision the store went on.
    pub fn restored(&self) -> anyhow::Result<Option<Restored>> {
        let path = self.path.join(RESTORED);
        let read = || {
            let text = match fs::read_to_string(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                text => text?,
            };
            anyhow::Ok(Some(serde_json::from_str(&text)?))
        };
        read().with_context(|| {
            format!(
                "{}: it says above which revision the last restoration went on, and cannot be read; to restore all the same, \
                 move it away and give a --bump-revision that is surely larger than all that came since",
                path.display()
            )
        })
    }

    /// Takes note of what is restored.
    ///
    /// # Errors
    /// If that cannot be written down.
    pub fn note_restored(&self, restored: &Restored) -> anyhow::Result<()> {
        self.make()?;
        Ok(pki::write(&self.path.join(RESTORED), &serde_json::to_string_pretty(restored)?, 0o600)?)
    }

    /// The name of a file, if it is one of these.
    pub fn name_of(&self, file: &Path) -> Option<String> {
        let (own, parent) = (self.path.canonicalize().ok()?, file.canonicalize().ok()?);
        let name = parent.file_name()?.to_str()?.strip_suffix(SUFFIX)?.to_owned();
        (parent.parent() == Some(&own)).then_some(name)
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// If there is none of that name, or it cannot be deleted.
    pub fn delete(&self, name: &str) -> anyhow::Result<Kept> {
        let kept = self.one(name)?;
        let file = self.file(name);
        fs::remove_file(&file).with_context(|| file.display().to_string())?;
        // Without its snapshot it says nothing.
        let _ = fs::remove_file(file.with_added_extension(VERIFIED));
        Ok(kept)
    }

    /// Deletes the oldest that a server has written under a prefix, so that `keep` are left; 0 keeps all. Tells which.
    ///
    /// # Errors
    /// If one cannot be deleted.
    pub fn prune(&self, prefix: &str, server: &str, keep: u32) -> anyhow::Result<Vec<String>> {
        if keep == 0 {
            return Ok(Vec::new());
        }
        let of = format!("{prefix}-{server}-");
        let ours = |kept: &Kept| {
            let number = kept.name.strip_prefix(&of).unwrap_or_default();
            kept.fault.is_none()
                && !number.is_empty()
                && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')
        };
        let mut deleted = Vec::new();
        for kept in self.list()?.into_iter().filter(ours).skip(keep as usize) {
            self.delete(&kept.name)?;
            deleted.push(kept.name);
        }
        Ok(deleted)
    }

    fn files(&self) -> anyhow::Result<Vec<PathBuf>> {
        let read = || match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>(),
        };
        read().with_context(|| format!("--snapshot-dir {}: it cannot be read", self.path.display()))
    }
}

/// When a snapshot was read back. A file that does not say it is as good as none: the snapshot is read back once more.
fn verified(path: &Path) -> Option<Verified> {
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}

/// Refuses names that are no names of files.
///
/// # Errors
/// For anything but letters, digits, `-`, `_` and `.`.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > LONGEST || name.starts_with('.') || !name.bytes().all(good) {
        bail!("the name {name:?}: use up to {LONGEST} letters, digits, -, _ and ., not beginning with a dot");
    }
    Ok(())
}

/// Reads a snapshot back into a store that is taken away again, which proves that it is whole. It blocks.
///
/// # Errors
/// If it is not, or there is no room.
pub fn verify(file: &Path, scratch: &Path) -> Result<Info, snapshot::SnapshotError> {
    let loaded = snapshot::load(file, scratch, Revision(0)).map(|(store, info)| {
        drop(store);
        info
    });
    // If it was never made, there is nothing to remove.
    let _ = fs::remove_dir_all(scratch);
    loaded
}

#[cfg(test)]
mod tests {
    use seawall_store::{
        Expect, Store as _,
        embedded::{Embedded, Options},
        snapshot::{About, save},
    };

    use super::*;

    #[tokio::test]
    async fn what_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Embedded::open(&dir.path().join("store"), Options::default()).unwrap();
        store.put("/registry/a", "1".into(), Expect::Any, None).await.unwrap();
        let kept = Directory::new(dir.path().join("snapshots"));
        assert!(kept.list().unwrap().is_empty() && kept.restored().unwrap().is_none());
        kept.make().unwrap();
        let write = async |name: &str, time: i64| {
            let about = About { cluster: None, time, writer: "v1".into() };
            save(&store, &kept.file(name), &about).await.unwrap()
        };
        for (name, time) in [
            ("auto-s1-1", 1),
            ("auto-s1-3", 3),
            ("auto-s1-2", 2),
            ("auto-s2-1", 1),
            ("auto-s1-x", 1),
            ("other-s1-1", 1),
        ] {
            write(name, time).await;
        }
        let names = || kept.list().unwrap().into_iter().map(|kept| kept.name).collect::<Vec<_>>();
        assert_eq!(names()[..2], ["auto-s1-3", "auto-s1-2"], "the newest first");
        assert!(kept.prune("auto", "s1", 0).unwrap().is_empty());
        assert_eq!(kept.prune("auto", "s1", 1).unwrap(), ["auto-s1-2", "auto-s1-1"]);
        assert_eq!(names(), ["auto-s1-3", "other-s1-1", "auto-s2-1", "auto-s1-x"]);

        // Verified is what was read back, and not another file of that name.
        let info = verify(&kept.file("auto-s1-3"), &kept.scratch()).unwrap();
        assert!(!kept.scratch().exists());
        let now = Timestamp::from_second(50).unwrap();
        kept.note_verified("auto-s1-3", &info, now).unwrap();
        assert_eq!(kept.one("auto-s1-3").unwrap().verified, Some(now));
        assert_eq!(kept.name_of(&kept.file("auto-s1-3")).as_deref(), Some("auto-s1-3"));
        assert_eq!(kept.name_of(&dir.path().join("auto-s1-3.snap")), None);
        fs::rename(kept.file("other-s1-1"), kept.file("auto-s1-3")).unwrap();
        assert_eq!(kept.one("auto-s1-3").unwrap().verified, None);
        kept.delete("auto-s1-3").unwrap();
        assert!(!kept.file("auto-s1-3").with_added_extension(VERIFIED).exists());

        // A file that is none is shown as one, and never pruned.
        fs::write(kept.file("auto-s2-9"), "text").unwrap();
        let strange = kept.one("auto-s2-9").unwrap();
        assert!(strange.fault.as_deref().is_some_and(|fault| fault.contains("not a snapshot")), "{strange:?}");
        assert!(kept.prune("auto", "s2", 1).unwrap().is_empty());

        // What was broken off is taken away, and nothing else.
        fs::write(kept.path().join("x.snap.partial"), "").unwrap();
        fs::create_dir(kept.scratch()).unwrap();
        let before = names();
        kept.sweep();
        assert!(!kept.scratch().exists() && !kept.path().join("x.snap.partial").exists());
        assert_eq!(names(), before);

        let restored = Restored { name: "a".into(), revision: 4, time: now, floor: 1004 };
        kept.note_restored(&restored).unwrap();
        assert_eq!(kept.restored().unwrap(), Some(restored));
        fs::write(kept.path().join(RESTORED), "{").unwrap();
        let error = kept.restored().unwrap_err().to_string();
        assert!(error.contains("restored.json") && error.contains("--bump-revision"), "{error}");
        let error = kept.delete("nothing").unwrap_err().to_string();
        assert!(error.contains("there is no snapshot \"nothing\""), "{error}");
    }

    #[test]
    fn a_place_that_is_no_directory_is_not_empty() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Directory::new(file.path().to_owned()).list().unwrap_err();
        assert!(format!("{error:#}").contains("--snapshot-dir"), "{error:#}");
    }

    #[test]
    fn names_are_names_of_files() {
        let good = |name: &str| check_name(name).is_ok();
        assert!(good("on-demand-s1.example-17") && good("a_b"));
        for bad in ["", ".", "..", ".x", "a/b", "../x", "a b", "ä", &"x".repeat(201)] {
            let error = check_name(bad).unwrap_err().to_string();
            assert!(error.contains("use up to 200 letters"), "{error}");
        }
    }
}
