//! Static pods: those that stand in files of this node. They run whether or not there is an API; there they show as mirror
//! pods ([`mirror`]), which change nothing about them.
//!
//! <https://kubernetes.io/docs/tasks/configure-pod-container/static-pod/>

pub mod manifest;
pub mod mirror;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::pod;

/// Where a pod comes from: `file`, or `api`.
pub const SOURCE: &str = "kubernetes.io/config.source";
/// Which version of its file it is.
pub const HASH: &str = "kubernetes.io/config.hash";
/// When the file was read.
pub const SEEN: &str = "kubernetes.io/config.seen";
/// On a mirror: of which version it is.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// How often the directory is looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// The largest file that is read, in bytes: as large as an object of the API.
const LARGEST: u64 = 3 << 20;

/// Whether a pod stands in a file of this node. Of a pod from the API the agent takes the annotation away.
pub fn is_static(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().and_then(|a| a.get(SOURCE)).is_some_and(|source| source == "file")
}

/// The version of a static pod's file.
pub fn hash(pod: &Pod) -> &str {
    pod.metadata.annotations.as_ref().and_then(|a| a.get(HASH)).map_or("", String::as_str)
}

/// Of which version of a static pod a mirror is; empty if it is none.
pub fn mirror_hash(pod: &Pod) -> &str {
    pod.metadata.annotations.as_ref().and_then(|a| a.get(MIRROR)).map_or("", String::as_str)
}

/// `namespace/name`, by which a static pod and its mirror are the same.
pub fn full_name(pod: &Pod) -> String {
    format!("{}/{}", pod::namespace(pod), pod::name(pod))
}

/// Static pods by [`full_name`].
pub type Pods = BTreeMap<String, Arc<Pod>>;

/// What is known of a file.
struct File {
    /// By which a change is noticed.
    version: (i64, i64, u64, u64),
    pod: Option<Arc<Pod>>,
}

/// A directory of manifests.
pub struct Directory {
    path: PathBuf,
    node: String,
    files: HashMap<PathBuf, File>,
}

impl Directory {
    /// Nothing has been read yet.
    pub fn new(path: &Path, node: &str) -> Directory {
        Directory { path: path.to_owned(), node: node.to_owned(), files: HashMap::new() }
    }

    /// Reads what has changed. A file that cannot be read as a pod stays what it was: it may be half written. Of two files
    /// with one pod's name the first counts.
    pub fn read(&mut self, now: Timestamp) -> std::io::Result<Pods> {
        let mut there = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
            let Ok(meta) = fs::metadata(&path) else { continue };
            if meta.is_file() && !hidden {
                there.push((path, (meta.mtime(), meta.mtime_nsec(), meta.ino(), meta.len())));
            }
        }
        self.files.retain(|path, _| there.iter().any(|(p, _)| p == path));
        there.sort();
        let mut pods = Pods::new();
        for (path, version) in there {
            let known = self.files.get(&path);
            if known.is_none_or(|file| file.version != version) {
                let before = known.and_then(|file| file.pod.clone());
                let pod = match self.parse(&path, version.3, now) {
                    Ok(pod) => Some(Arc::new(pod)),
                    Err(why) => {
                        tracing::error!("{}: {why}; it is left as it was", path.display());
                        before
                    }
                };
                self.files.insert(path.clone(), File { version, pod });
            }
            let Some(pod) = self.files.get(&path).and_then(|file| file.pod.clone()) else { continue };
            pods.entry(full_name(&pod)).or_insert(pod);
        }
        Ok(pods)
    }

    fn parse(&self, path: &Path, size: u64, now: Timestamp) -> Result<Pod, String> {
        if size > LARGEST {
            return Err(format!("has {size} bytes, more than the {LARGEST} that a pod may have"));
        }
        let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
        manifest::parse(&text, &path.display().to_string(), &self.node, now).map_err(|error| error.to_string())
    }
}

/// Follows a directory until shutdown.
pub async fn run(mut directory: Directory, said: watch::Sender<Pods>, shutdown: CancellationToken) {
    let mut failed = false;
    loop {
        match directory.read(Timestamp::now()) {
            Ok(pods) => {
                failed = false;
                said.send_if_modified(|old| {
                    let changed = *old != pods;
                    *old = pods;
                    changed
                });
            }
            // Nothing is stopped because its file cannot be read.
            Err(error) if !std::mem::replace(&mut failed, true) => {
                tracing::error!("the manifests of static pods in {}: {error}", directory.path.display());
            }
            Err(_) => {}
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(name: &str, image: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{containers: [{{name: c, image: {image}}}]}}}}"
        )
    }

    #[test]
    fn a_directory_is_followed() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let mut directory = Directory::new(root.path(), "n");
        let mut read = || {
            let pods = directory.read(Timestamp::UNIX_EPOCH).unwrap();
            let image = |pod: &Arc<Pod>| pod.spec.as_ref().unwrap().containers[0].image.clone().unwrap();
            pods.iter().map(|(name, pod)| format!("{name} {}", image(pod))).collect::<Vec<_>>()
        };
        assert!(read().is_empty());
        fs::write(at("b.yaml"), manifest("web", "one")).unwrap();
        fs::write(at(".a.yaml.swp"), manifest("hidden", "x")).unwrap();
        fs::create_dir(at("directory")).unwrap();
        assert_eq!(read(), ["default/web-n one"]);
        // Half of it says nothing about the pod.
        fs::write(at("b.yaml"), "{apiVersion: v1, kind: ").unwrap();
        assert_eq!(read(), ["default/web-n one"]);
        fs::write(at("b.yaml"), manifest("web", "two-and-longer")).unwrap();
        assert_eq!(read(), ["default/web-n two-and-longer"]);
        // The same pod a second time.
        fs::write(at("a.yaml"), manifest("web", "three")).unwrap();
        fs::write(at("c.yaml"), manifest("other", "four")).unwrap();
        assert_eq!(read(), ["default/other-n four", "default/web-n three"]);
        fs::remove_file(at("a.yaml")).unwrap();
        fs::remove_file(at("b.yaml")).unwrap();
        assert_eq!(read(), ["default/other-n four"]);
        fs::write(at("c.yaml"), vec![b' '; LARGEST as usize + 1]).unwrap();
        assert_eq!(read(), ["default/other-n four"]);
    }
}
