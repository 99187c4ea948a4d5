//! Snapshots: everything under `/registry/` at one revision, in one file that can be carried elsewhere.
//!
//! A snapshot is read through the [`Store`] trait, so it is the same whichever backend wrote it, and either can take it in.
//! Values are copied as they are stored: what is encrypted there is encrypted in the file, and needs the same keys
//! later. The file ([`format`]) is written under another name, synced and renamed, so it is whole or not there.
//!
//! To take one in ([`load`]) is to make an embedded store of it. Every key keeps its revisions, and the store goes on at
//! a revision that is given: well above any that was ever seen, so that nobody takes what is older for newer. History
//! before it counts as compacted, as after etcd's `snapshot restore --bump-revision --mark-compacted`. From there
//! [`migrate`](crate::migrate) leads into an etcd.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, BufWriter, Read as _, Seek as _, SeekFrom},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use crate::{
    Entry, Error, ListOptions, Listing, Revision, Store,
    embedded::{Embedded, OpenError, Options},
};

pub mod format;

pub use format::{Fault, Header, Sum};
use format::{Reader, TRAILER, Writer};

/// What is copied.
const PREFIX: &str = "/registry/";
/// How many keys the first page has; their sizes are not known yet.
const FIRST_PAGE: usize = 500;
/// How many keys a page has at most.
const LARGEST_PAGE: usize = 10_000;
/// A page is to have about so many bytes.
const PAGE_BYTES: usize = 8 << 20;
/// How often it is begun anew when the history that is being read was compacted away meanwhile.
const ATTEMPTS: usize = 3;

/// What a snapshot is to say of itself.
#[derive(Clone, Debug)]
pub struct About {
    /// The cluster: the uid of its namespace `kube-system`.
    pub cluster: Option<String>,
    /// When it is written, in seconds since 1970.
    pub time: i64,
    /// The version of this program.
    pub writer: String,
}

/// A snapshot on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// What it is of.
    pub header: Header,
    /// What it adds up to.
    pub sum: Sum,
    /// How many bytes the file has.
    pub size: u64,
}

/// Why a snapshot was not written, read or taken in.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file is none, or not as it was written.
    #[error("{}: {fault}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        fault: Fault,
    },
    /// The system refused.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// The store could not be read.
    #[error("the store cannot be read")]
    Store(#[from] Error),
    /// What it was taken into could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What was taken in is something else than what is in the file.
    #[error("{}: {expected:?} were in it, and {found:?} came out; nothing of it is to be used", path.display())]
    Differs {
        /// The file.
        path: PathBuf,
        /// What the file adds up to.
        expected: Sum,
        /// What was taken in adds up to.
        found: Sum,
    },
    /// The thread that wrote it ended.
    #[error("the writing was broken off")]
    Broken,
}

type Result<T, E = SnapshotError> = std::result::Result<T, E>;

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Io { what, path, source }
}

fn fault(path: &Path) -> impl Fn(Fault) -> SnapshotError {
    let path = path.to_owned();
    move |fault| match fault {
        Fault::Io(source) => SnapshotError::Io { what: "cannot read or write", path: path.clone(), source },
        fault => SnapshotError::File { path: path.clone(), fault },
    }
}

/// Writes all that the store has at its newest revision to a file that does not exist yet; only the owner may read it. One
/// page of entries is in memory at a time.
///
/// # Errors
/// If the store or the disk fails, or there is such a file; then nothing is left behind.
pub async fn save(store: &dyn Store, path: &Path, about: &About) -> Result<Info> {
    if path.exists() {
        return Err(failed("cannot make", path)(io::ErrorKind::AlreadyExists.into()));
    }
    let partial = path.with_added_extension("partial");
    let mut attempt = 1;
    let saved = loop {
        match save_to(store, &partial, about).await {
            Err(SnapshotError::Store(error @ Error::Compacted { .. })) if attempt < ATTEMPTS => {
                tracing::info!(%error, "the snapshot is begun anew: history was compacted while it was written");
                attempt += 1;
            }
            other => break other,
        }
    };
    let saved = saved.and_then(|saved| {
        fs::rename(&partial, path).map_err(failed("cannot make", path))?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|dir| dir.sync_all()).map_err(failed("cannot sync", directory))?;
        Ok(saved)
    });
    if saved.is_err() {
        // If it was never made, there is nothing to remove.
        let _ = fs::remove_file(&partial);
    }
    saved
}

async fn save_to(store: &dyn Store, partial: &Path, about: &About) -> Result<Info> {
    let first = store.list(PREFIX, ListOptions { limit: FIRST_PAGE, ..ListOptions::default() }).await?;
    let at = first.revision;
    let About { cluster, time, writer } = about.clone();
    let header = Header { cluster, revision: at, time, writer };
    let mut options = OpenOptions::new();
    let file = options.create(true).truncate(true).write(true).mode(0o600).open(partial);
    let file = BufWriter::with_capacity(1 << 20, file.map_err(failed("cannot make", partial))?);
    let mut writer = Writer::new(file, &header).map_err(fault(partial))?;
    let mut page = first;
    loop {
        let Listing { entries, more, .. } = page;
        let last = entries.last().map(|entry| entry.key.clone());
        let limit = next_page(&entries);
        // The disk is waited for by a thread that may wait.
        let written = tokio::task::spawn_blocking(move || {
            entries.iter().try_for_each(|entry| writer.entry(entry)).map(|()| writer)
        });
        writer = written.await.map_err(|_| SnapshotError::Broken)?.map_err(fault(partial))?;
        if !more || last.is_none() {
            break;
        }
        page = store.list(PREFIX, ListOptions { at: Some(at), limit, after: last }).await?;
    }
    let finished = tokio::task::spawn_blocking(move || {
        let (file, sum) = writer.finish()?;
        let file = file.into_inner().map_err(|error| Fault::Io(error.into_error()))?;
        file.sync_all()?;
        Ok((file.metadata()?.len(), sum))
    });
    let (size, sum) = finished.await.map_err(|_| SnapshotError::Broken)?.map_err(fault(partial))?;
    Ok(Info { header, sum, size })
}

/// How many keys the page after this one is to have.
fn next_page(entries: &[Entry]) -> usize {
    let bytes: usize = entries.iter().map(|entry| entry.key.len() + entry.value.len()).sum();
    let average = bytes / entries.len().max(1);
    (PAGE_BYTES / average.max(1)).clamp(1, LARGEST_PAGE)
}

/// What a file says of itself, by its beginning and its end alone.
///
/// # Errors
/// If it is no snapshot, or has no end. That what is between is whole only [`load`] tells.
pub fn peek(path: &Path) -> Result<Info> {
    let mut file = File::open(path).map_err(failed("cannot open", path))?;
    let size = file.metadata().map_err(failed("cannot read", path))?.len();
    let header = Reader::new(BufReader::new(&file)).map_err(fault(path))?.header().clone();
    let mut trailer = [0; TRAILER];
    let end = size.checked_sub(TRAILER as u64).ok_or(Fault::Short { at: size }).map_err(fault(path))?;
    let read = file.seek(SeekFrom::Start(end)).and_then(|_| file.read_exact(&mut trailer));
    read.map_err(failed("cannot read", path))?;
    let sum = Sum::of_trailer(&trailer).ok_or(Fault::Short { at: size }).map_err(fault(path))?;
    Ok(Info { header, sum, size })
}

/// Makes an embedded store of a snapshot in a directory that does not exist yet, and compares what is then in it with
/// the file. The store goes on after `at`, or after the snapshot's own revision if that is larger. It blocks.
///
/// # Errors
/// If the file is not whole, or what came out is something else; then the directory is taken away again.
pub fn load(file: &Path, dir: &Path, at: Revision) -> Result<(Embedded, Info)> {
    let loaded = load_into(file, dir, at);
    if let Err(error) = &loaded
        && !matches!(error, SnapshotError::Open(OpenError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists)
    {
        // If it was never made, there is nothing to remove.
        let _ = fs::remove_dir_all(dir);
    }
    loaded
}

fn load_into(file: &Path, dir: &Path, at: Revision) -> Result<(Embedded, Info)> {
    let input = File::open(file).map_err(failed("cannot open", file))?;
    let size = input.metadata().map_err(failed("cannot read", file))?.len();
    let mut reader = Reader::new(BufReader::with_capacity(1 << 20, input)).map_err(fault(file))?;
    let header = reader.header().clone();
    let mut broken = None;
    let entries = std::iter::from_fn(|| match reader.entry() {
        Ok(entry) => entry.map(Ok),
        Err(error) => {
            broken = Some(error);
            Some(Err(io::Error::other("the snapshot cannot be read")))
        }
    });
    let created = Embedded::create(dir, at.max(header.revision), entries);
    if let Some(error) = broken {
        return Err(fault(file)(error));
    }
    created?;
    let expected = reader.sum().ok_or(SnapshotError::Broken)?;
    let store = Embedded::open(dir, Options::default())?;
    let mut writer = Writer::new(io::sink(), &header).map_err(fault(file))?;
    store.entries().values().try_for_each(|entry| writer.entry(entry)).map_err(fault(file))?;
    let (_, found) = writer.finish().map_err(fault(file))?;
    if found != expected {
        return Err(SnapshotError::Differs { path: file.to_owned(), expected, found });
    }
    Ok((store, Info { header, sum: expected, size }))
}
