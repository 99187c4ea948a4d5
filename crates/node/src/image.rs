//! Images without a registry: docker-archives made from directories, programs with their libraries, and Debian
//! packages, imported into containerd.
//!
//! A docker-archive is a tar of layers (tars themselves), a configuration and `manifest.json`; see
//! <https://github.com/moby/docker-image-spec>. Layers are files without a name while they are made: a program may be larger than
//! all that an agent otherwise has in memory.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufWriter, Read, Seek, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, bail, ensure};
use serde_json::json;
use sha2::{Digest, Sha256};

/// What a container of the image runs by default.
#[derive(Clone, Debug, Default)]
pub struct ImageConfig {
    /// The program and its fixed arguments.
    pub entrypoint: Vec<String>,
    /// Arguments after the entrypoint, replaced by a container's `args`.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// The user, by name or number.
    pub user: String,
    /// The directory to start in.
    pub working_dir: String,
    /// The signal that asks a container to stop; SIGTERM when empty.
    pub stop_signal: String,
}

/// One filesystem layer under construction.
pub struct Layer<W: Write = BufWriter<File>> {
    tar: tar::Builder<W>,
    seen: BTreeSet<PathBuf>,
}

impl Layer {
    /// An empty layer.
    ///
    /// # Errors
    /// If no temporary file can be made.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self::to(BufWriter::new(tempfile::tempfile().context("make a temporary file")?)))
    }
}

impl<W: Write> Layer<W> {
    fn to(out: W) -> Self {
        let mut tar = tar::Builder::new(out);
        tar.follow_symlinks(false);
        Self { tar, seen: BTreeSet::new() }
    }

    fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        header
    }

    fn parents(&mut self, path: &Path) -> anyhow::Result<()> {
        let mut missing: Vec<PathBuf> = path.ancestors().skip(1).map(Path::to_path_buf).collect();
        missing.retain(|p| !p.as_os_str().is_empty() && !self.seen.contains(p));
        for directory in missing.into_iter().rev() {
            self.directory(&directory, 0o755)?;
        }
        Ok(())
    }

    /// Adds a directory, once.
    pub fn directory(&mut self, path: impl AsRef<Path>, mode: u32) -> anyhow::Result<()> {
        let path = relative(path.as_ref());
        if path.as_os_str().is_empty() || !self.seen.insert(path.clone()) {
            return Ok(());
        }
        self.parents(&path)?;
        self.tar.append_data(&mut Self::header(tar::EntryType::Directory, mode, 0), &path, std::io::empty())?;
        Ok(())
    }

    /// Adds a file with this content. The first one of a path wins.
    pub fn file(&mut self, path: impl AsRef<Path>, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        self.stream(path, mode, content.len() as u64, content)
    }

    /// Adds a file with what is read, which is as long as `size` says, in bytes. The first one of a path wins.
    pub(crate) fn stream(
        &mut self,
        path: impl AsRef<Path>,
        mode: u32,
        size: u64,
        content: impl Read,
    ) -> anyhow::Result<()> {
        let path = relative(path.as_ref());
        self.parents(&path)?;
        if self.seen.insert(path.clone()) {
            self.tar.append_data(&mut Self::header(tar::EntryType::Regular, mode, size), &path, content)?;
        }
        Ok(())
    }

    /// Adds a file of this host at `at`.
    fn copy(&mut self, source: &Path, at: &Path, mode: u32) -> anyhow::Result<()> {
        let file = File::open(source).with_context(|| format!("read {}", source.display()))?;
        let size = file.metadata()?.len();
        // One that grows meanwhile is as it was.
        self.stream(at, mode, size, file.take(size)).with_context(|| format!("read {}", source.display()))
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: impl AsRef<Path>, target: impl AsRef<Path>) -> anyhow::Result<()> {
        let path = relative(path.as_ref());
        self.parents(&path)?;
        if self.seen.insert(path.clone()) {
            self.tar.append_link(&mut Self::header(tar::EntryType::Symlink, 0o777, 0), &path, target)?;
        }
        Ok(())
    }

    /// Adds a file, or everything under a directory, at `at` in the image.
    pub fn tree(&mut self, source: &Path, at: &Path) -> anyhow::Result<()> {
        let meta = fs::metadata(source).with_context(|| format!("read {}", source.display()))?;
        if meta.is_file() {
            return self.copy(source, at, meta.mode() & 0o7777);
        }
        let mut entries: Vec<_> =
            fs::read_dir(source).with_context(|| format!("read {}", source.display()))?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (from, to) = (entry.path(), at.join(entry.file_name()));
            let meta = fs::symlink_metadata(&from)?;
            let mode = meta.mode() & 0o7777;
            if meta.is_dir() {
                self.directory(&to, mode)?;
                self.tree(&from, &to)?;
            } else if meta.is_symlink() {
                self.symlink(&to, fs::read_link(&from)?)?;
            } else if meta.is_file() {
                self.copy(&from, &to, mode)?;
            }
        }
        Ok(())
    }

    /// Adds a program of this host at `at`, and the shared libraries that `ldd` names for it at their own paths.
    pub fn program(&mut self, source: &Path, at: &Path) -> anyhow::Result<()> {
        let meta = fs::metadata(source).with_context(|| format!("read {}", source.display()))?;
        self.copy(source, at, meta.permissions().mode() & 0o7777 | 0o555)?;
        self.libraries(source)
    }

    /// Adds the shared libraries that `ldd` names for a program of this host.
    pub(crate) fn libraries(&mut self, program: &Path) -> anyhow::Result<()> {
        let output = std::process::Command::new("ldd").arg(program).output().context("run ldd")?;
        for library in ldd_paths(&String::from_utf8_lossy(&output.stdout)) {
            self.copy(&library, &library, 0o755)?;
        }
        Ok(())
    }

    /// Adds the host's static busybox with its applets in /bin, and the directories that programs expect.
    pub fn busybox(&mut self) -> anyhow::Result<()> {
        let program = ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(Path::new).find(|p| p.exists());
        let Some(program) = program else { bail!("busybox is not installed: apt-get install busybox-static") };
        self.program(program, Path::new("bin/busybox"))?;
        let applets = std::process::Command::new(program).arg("--list").output().context("run busybox --list")?;
        for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|a| *a != "busybox") {
            self.symlink(Path::new("bin").join(applet), "busybox")?;
        }
        for (path, mode) in [("tmp", 0o1777), ("root", 0o700), ("var/www", 0o755), ("etc", 0o755)] {
            self.directory(path, mode)?;
        }
        self.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
        self.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")
    }

    /// Adds the content of a Debian package file, and the libraries of the programs in it.
    pub fn debian_package(&mut self, package: &Path) -> anyhow::Result<()> {
        let directory = tempfile::tempdir()?;
        let status = std::process::Command::new("dpkg-deb").arg("-x").arg(package).arg(directory.path()).status();
        ensure!(status.context("run dpkg-deb")?.success(), "dpkg-deb cannot unpack {}", package.display());
        self.tree(directory.path(), Path::new(""))?;
        for bin in ["usr/bin", "usr/sbin", "bin", "sbin", "usr/lib/nginx/modules"] {
            let Ok(entries) = fs::read_dir(directory.path().join(bin)) else { continue };
            for entry in entries {
                let path = entry?.path();
                if path.is_file() && !path.is_symlink() {
                    self.libraries(&path)?;
                }
            }
        }
        Ok(())
    }
}

fn relative(path: &Path) -> PathBuf {
    path.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect()
}

/// The absolute paths in what `ldd` prints; a static program has none.
fn ldd_paths(output: &str) -> Vec<PathBuf> {
    output
        .lines()
        .filter_map(|line| {
            let target = line.split_once("=>").map_or(line, |(_, right)| right).trim();
            let path = target.split(" (").next()?.trim();
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

/// A docker-archive under construction.
pub struct Archive {
    name: String,
    /// Each with its digest in hex.
    layers: Vec<(File, String)>,
    config: ImageConfig,
}

impl Archive {
    /// An image of this name (with a tag).
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), layers: Vec::new(), config: ImageConfig::default() }
    }

    /// Adds a layer on top.
    pub fn layer(mut self, layer: Layer) -> anyhow::Result<Self> {
        let mut file = layer.tar.into_inner()?.into_inner().context("write the layer")?;
        let mut digest = Sha256::new();
        file.rewind()?;
        std::io::copy(&mut file, &mut digest)?;
        self.layers.push((file, hex(&digest.finalize())));
        Ok(self)
    }

    /// Sets what a container runs.
    pub fn config(mut self, config: ImageConfig) -> Self {
        self.config = config;
        self
    }

    /// Writes the archive. The same input gives the same bytes, and so the same image id.
    ///
    /// # Errors
    /// If a layer cannot be read, or `out` not written.
    pub fn write(self, out: impl Write) -> anyhow::Result<()> {
        let digests: Vec<&str> = self.layers.iter().map(|(_, digest)| &**digest).collect();
        let c = &self.config;
        let mut run = json!({ "Entrypoint": c.entrypoint, "Cmd": c.cmd, "Env": c.env });
        for (key, value) in [("User", &c.user), ("WorkingDir", &c.working_dir), ("StopSignal", &c.stop_signal)] {
            if !value.is_empty() {
                run[key] = json!(value);
            }
        }
        let config = serde_json::to_vec(&json!({
            "architecture": architecture(), "os": "linux", "created": "1970-01-01T00:00:00Z", "config": run,
            "rootfs": { "type": "layers", "diff_ids": digests.iter().map(|d| format!("sha256:{d}")).collect::<Vec<_>>() },
            "history": digests.iter().map(|_| json!({"created": "1970-01-01T00:00:00Z"})).collect::<Vec<_>>(),
        }))?;
        let config_name = format!("{}.json", hex(&Sha256::digest(&config)));
        let layer_names: Vec<String> = digests.iter().map(|d| format!("{d}/layer.tar")).collect();
        let manifest =
            serde_json::to_vec(&json!([{ "Config": config_name, "RepoTags": [self.name], "Layers": layer_names }]))?;
        let mut out = Layer::to(out);
        for (name, (layer, _)) in layer_names.iter().zip(&self.layers) {
            let (mut layer, size) = (layer, layer.metadata()?.len());
            layer.rewind()?;
            out.stream(name, 0o644, size, layer)?;
        }
        out.file(&config_name, 0o644, &config)?;
        out.file("manifest.json", 0o644, &manifest)?;
        Ok(out.tar.into_inner()?.flush()?)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The architecture as image configurations and node labels name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// The path on which an image finds its programs.
pub const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An image of busybox with its applets in /bin, from the host's static busybox.
pub fn busybox(name: &str) -> anyhow::Result<Archive> {
    let mut layer = Layer::new()?;
    layer.busybox()?;
    let config = ImageConfig { cmd: vec!["sh".into()], env: vec![PATH.into()], ..Default::default() };
    Ok(Archive::new(name).layer(layer)?.config(config))
}

/// Imports an image into the containerd that listens on `socket`, for Kubernetes' namespace.
pub async fn import(socket: &Path, archive: Archive) -> anyhow::Result<()> {
    let written = tokio::task::spawn_blocking(move || {
        let file = tempfile::NamedTempFile::new().context("make a temporary file")?;
        archive.write(BufWriter::new(file.as_file())).context("write the image archive")?;
        anyhow::Ok(file)
    });
    import_file(socket, written.await??.path()).await
}

/// As [`import`], from a file.
pub async fn import_file(socket: &Path, archive: &Path) -> anyhow::Result<()> {
    let output = tokio::process::Command::new("ctr")
        .arg("--address")
        .arg(socket)
        .args(["--namespace", "k8s.io", "images", "import"])
        .arg(archive)
        .stdin(Stdio::null())
        .output()
        .await
        .context("run ctr (part of containerd)")?;
    ensure!(
        output.status.success(),
        "ctr cannot import {}: {}",
        archive.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_output() {
        let out = "\tlinux-vdso.so.1 (0x7ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let paths = [PathBuf::from("/lib/x86_64-linux-gnu/libc.so.6"), PathBuf::from("/lib64/ld-linux-x86-64.so.2")];
        assert_eq!(ldd_paths(out), paths);
        assert!(ldd_paths("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn an_archive_names_its_layers_and_is_reproducible() {
        let build = || {
            let mut layer = Layer::new().unwrap();
            layer.file("/a/b/c", 0o600, b"hello").unwrap();
            let mut bytes = Vec::new();
            Archive::new("x/y:1").layer(layer).unwrap().write(&mut bytes).unwrap();
            bytes
        };
        let bytes = build();
        assert_eq!(bytes, build());
        let mut manifest = None;
        let mut names = Vec::new();
        for entry in tar::Archive::new(&bytes[..]).entries().unwrap() {
            let entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            if name == "manifest.json" {
                manifest = Some(serde_json::from_reader::<_, serde_json::Value>(entry).unwrap());
            }
            names.push(name);
        }
        let manifest = manifest.unwrap();
        assert_eq!(manifest[0]["RepoTags"][0], "x/y:1");
        assert!(names.iter().any(|n| manifest[0]["Layers"][0] == n.as_str()));
    }
}
