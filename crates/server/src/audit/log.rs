//! The audit log as a file of lines
//! (<https://kubernetes.io/docs/tasks/debug/debug-cluster/audit/#log-backend>).
//!
//! Lines wait in a bounded queue for a thread that writes them, so that a slow disk is felt by nobody who asks something.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use super::queue::{Item, Queue, Receiver};

/// How many bytes are written at a time.
const PIECE: usize = 1 << 20;
/// What is in the names of files that are kept, between the name and the suffix.
const WHEN: &str = "%Y-%m-%dT%H-%M-%S.%3f";

/// Where the log goes, and when a file is full.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file, or `-` for what the process prints.
    pub path: PathBuf,
    /// How many megabytes a file may have.
    pub max_megabytes: u64,
    /// How many full files are kept; with 0, all.
    pub max_backups: usize,
    /// How many days a full file is kept; with 0, for ever.
    pub max_days: u32,
}

/// Opens the log and starts the thread that writes it. It ends with the queue.
///
/// # Errors
/// If the file cannot be written to.
pub(super) fn open(options: &Options) -> io::Result<Queue> {
    let (queue, receiver) = Queue::new("log");
    let writer: Box<dyn Target> = match options.path.as_os_str() == "-" {
        true => Box::new(Printed),
        false => Box::new(Rotated::open(options.clone())?),
    };
    std::thread::Builder::new().name("audit log".into()).spawn(move || write(receiver, writer))?;
    Ok(queue)
}

trait Target: Send {
    fn put(&mut self, lines: &[u8], now: Timestamp) -> io::Result<()>;
}

struct Printed;

impl Target for Printed {
    fn put(&mut self, lines: &[u8], _: Timestamp) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(lines)?;
        out.flush()
    }
}

fn write(mut receiver: Receiver, mut target: Box<dyn Target>) {
    let mut piece = Vec::new();
    let mut failing = false;
    while let Some(first) = receiver.blocking_recv() {
        let (mut waiting, mut lines) = (Vec::new(), 0);
        let mut next = Some(first);
        while let Some(item) = next {
            match item {
                Item::Line(line) => {
                    piece.extend_from_slice(&line);
                    piece.push(b'\n');
                    lines += 1;
                }
                Item::Flush(done) => waiting.push(done),
            }
            next = if piece.len() < PIECE { receiver.try_recv() } else { None };
        }
        let written = if piece.is_empty() { Ok(()) } else { target.put(&piece, Timestamp::now()) };
        piece.clear();
        match written {
            Ok(()) => failing = false,
            Err(error) => {
                receiver.lost(lines);
                // Once, and not for every line.
                if !failing {
                    tracing::error!(%error, "the audit log cannot be written: events are lost");
                }
                failing = true;
            }
        }
        for done in waiting {
            let _ = done.send(());
        }
    }
}

/// A file that is put aside when it is full.
struct Rotated {
    options: Options,
    file: File,
    size: u64,
}

impl Rotated {
    fn open(options: Options) -> io::Result<Rotated> {
        if let Some(directory) = options.path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            std::fs::create_dir_all(directory)?;
        }
        let file = append_to(&options.path)?;
        let size = file.metadata()?.len();
        Ok(Rotated { options, file, size })
    }

    fn limit(&self) -> u64 {
        self.options.max_megabytes.saturating_mul(1 << 20)
    }

    fn rotate(&mut self, now: Timestamp) -> io::Result<()> {
        let (directory, stem, suffix) = names(&self.options.path);
        let mut at = now;
        let aside = loop {
            let aside = directory.join(format!("{stem}{}{suffix}", at.strftime(WHEN)));
            if !aside.exists() {
                break aside;
            }
            at += SignedDuration::from_millis(1);
        };
        std::fs::rename(&self.options.path, aside)?;
        self.file = append_to(&self.options.path)?;
        self.size = 0;
        for old in forgotten(&self.options, &backups(&self.options.path)?, now) {
            std::fs::remove_file(old)?;
        }
        Ok(())
    }
}

impl Target for Rotated {
    fn put(&mut self, lines: &[u8], now: Timestamp) -> io::Result<()> {
        if self.size > 0 && self.size + lines.len() as u64 > self.limit() {
            self.rotate(now)?;
        }
        self.size += lines.len() as u64;
        self.file.write_all(lines)
    }
}

/// The log tells who did what, so it is for its owner alone.
fn append_to(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// The directory, and what the names of files that were put aside begin and end with.
fn names(path: &Path) -> (PathBuf, String, String) {
    let text = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    let suffix = match path.extension() {
        Some(_) => format!(".{}", text(path.extension())),
        None => String::new(),
    };
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    (directory.to_owned(), format!("{}-", text(path.file_stem())), suffix)
}

/// The files that were put aside, newest first.
fn backups(path: &Path) -> io::Result<Vec<(Timestamp, PathBuf)>> {
    let (directory, stem, suffix) = names(path);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let when = name.to_str().and_then(|name| name.strip_prefix(&*stem)?.strip_suffix(&*suffix));
        let when = when.and_then(|when| jiff::civil::DateTime::strptime(WHEN, when).ok());
        if let Some(at) = when.and_then(|when| when.to_zoned(jiff::tz::TimeZone::UTC).ok()) {
            found.push((at.timestamp(), entry.path()));
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

/// Those of the files, newest first, that are too many or too old.
fn forgotten<'a>(options: &Options, backups: &'a [(Timestamp, PathBuf)], now: Timestamp) -> Vec<&'a Path> {
    let old = SignedDuration::from_hours(24 * i64::from(options.max_days));
    let too_many = |index: usize| options.max_backups > 0 && index >= options.max_backups;
    let too_old = |at: Timestamp| options.max_days > 0 && now.duration_since(at) > old;
    let picked = backups.iter().enumerate().filter(|(index, (at, _))| too_many(*index) || too_old(*at));
    picked.map(|(_, (_, path))| &**path).collect()
}

/// A line of the log.
pub(super) fn line(event: &impl serde::Serialize) -> Option<Bytes> {
    match serde_json::to_vec(event) {
        Ok(line) => Some(line.into()),
        Err(error) => {
            tracing::error!(%error, "an audit event cannot be written down");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(path: PathBuf) -> Options {
        Options { path, max_megabytes: 1, max_backups: 2, max_days: 1 }
    }

    #[test]
    fn full_files_are_put_aside_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/audit.log");
        let mut log = Rotated::open(options(path.clone())).unwrap();
        let start: Timestamp = "2026-01-02T03:04:05.678Z".parse().unwrap();
        let half = vec![b'x'; 600 << 10];
        for index in 0..5 {
            log.put(&half, start + SignedDuration::from_secs(index)).unwrap();
        }
        let kept = backups(&path).unwrap();
        let names: Vec<_> = kept.iter().map(|(_, path)| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["audit-2026-01-02T03-04-09.678.log", "audit-2026-01-02T03-04-08.678.log"]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), half.len() as u64);
        // A file that is there already is gone on with.
        drop(log);
        let mut log = Rotated::open(options(path.clone())).unwrap();
        log.put(b"small\n", start).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), half.len() as u64 + 6);
        log.put(&half, start + SignedDuration::from_hours(25)).unwrap();
        assert_eq!(backups(&path).unwrap().len(), 1, "the others are too old");
    }

    #[test]
    fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["audit-policy.log", "audit-2026-01-02T03-04-05.678.txt", "other-2026-01-02T03-04-05.678.log"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(backups(&dir.path().join("audit.log")).unwrap(), []);
    }
}
