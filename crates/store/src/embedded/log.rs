//! The disk format: log files with the changes, and a snapshot that stands for all changes before it.
//!
//! A log file is named by the revision before its first change and begins with a header; then frames follow. A frame
//! is one batch: magic, length, CRC-32 of length and payload, payload. A batch is synced before the next is written,
//! so only the very last frame can be torn by a crash; it was never acknowledged and is cut off. A bad frame with a
//! good one after it, or in a file that is not the last, is damage, and is reported with its place.
//!
//! A snapshot (`snapshot-<revision>`) has the same header and frames, the last of which is an end mark. It is written
//! under another name, synced and renamed, so it is never torn.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    OpenError,
    state::{Map, State},
};
use crate::{Entry, Event, Revision};

/// Contains bytes that never occur in UTF-8, so no key and no JSON value can hold something that looks like a frame.
const FRAME: [u8; 4] = [0xff, 0x5e, 0xa3, 0xfe];
const FRAME_HEADER: usize = 12;
const FILE_HEADER: usize = 16;
const LOG_MAGIC: [u8; 8] = *b"SWALOG01";
const SNAPSHOT_MAGIC: [u8; 8] = *b"SWASNP01";

const TAG_PUT: u8 = 1;
const TAG_DELETE: u8 = 2;
const TAG_COMPACT: u8 = 3;
const TAG_ENTRY: u8 = 4;
const TAG_END: u8 = 5;

/// One thing that the log says.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Record {
    Event(Event),
    Compact(u64),
}

/// A log file that is complete.
#[derive(Debug)]
pub(super) struct Sealed {
    pub(super) path: PathBuf,
    /// The revision of its last change.
    pub(super) last: u64,
    pub(super) bytes: u64,
}

/// Why a batch is not in the log.
#[derive(Debug, thiserror::Error)]
pub(super) enum AppendError {
    /// Nothing of it is there: the file has been cut back.
    #[error("cannot write the log: {0}")]
    Refused(io::Error),
    /// It may or may not be there.
    #[error("cannot sync the log, so what it holds is unknown: {0}")]
    Unknown(io::Error),
}

impl AppendError {
    pub(super) fn is_fatal(&self) -> bool {
        matches!(self, AppendError::Unknown(_))
    }
}

/// The log file that is being written.
pub(super) struct Log {
    dir: PathBuf,
    path: PathBuf,
    file: File,
    bytes: u64,
    /// The revision of the last change in it.
    last: u64,
    segment_bytes: u64,
    buffer: Vec<u8>,
}

impl Log {
    fn create(dir: &Path, revision: u64, segment_bytes: u64) -> io::Result<Log> {
        let path = dir.join(format!("log-{revision:020}"));
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
        file.write_all(&file_header(LOG_MAGIC, revision))?;
        file.sync_all()?;
        sync_dir(dir)?;
        Ok(Log {
            dir: dir.to_owned(),
            path,
            file,
            bytes: FILE_HEADER as u64,
            last: revision,
            segment_bytes,
            buffer: Vec::new(),
        })
    }

    /// Appends a batch whose first change has the revision after `before`, durably.
    pub(super) fn append(&mut self, before: u64, records: &[Record]) -> Result<(), AppendError> {
        let mut payload = std::mem::take(&mut self.buffer);
        payload.clear();
        payload.extend_from_slice(&[0; FRAME_HEADER]);
        payload.extend_from_slice(&before.to_le_bytes());
        let mut last = before;
        for record in records {
            match record {
                Record::Event(Event::Put(entry)) => {
                    payload.push(TAG_PUT);
                    put_bytes(&mut payload, entry.key.as_bytes());
                    put_bytes(&mut payload, &entry.value);
                    last += 1;
                }
                Record::Event(Event::Delete { key, .. }) => {
                    payload.push(TAG_DELETE);
                    put_bytes(&mut payload, key.as_bytes());
                    last += 1;
                }
                Record::Compact(at) => {
                    payload.push(TAG_COMPACT);
                    payload.extend_from_slice(&at.to_le_bytes());
                }
            }
        }
        seal_frame(&mut payload);
        let written = self.file.write_all(&payload);
        let length = payload.len() as u64;
        self.buffer = payload;
        if self.buffer.capacity() > 8 << 20 {
            self.buffer = Vec::new();
        }
        if let Err(error) = written {
            let cut = self.file.set_len(self.bytes).and_then(|()| self.file.seek(SeekFrom::Start(self.bytes)));
            return Err(match cut {
                Ok(_) => AppendError::Refused(error),
                Err(_) => AppendError::Unknown(error),
            });
        }
        // After a failed sync the kernel may have dropped the pages and would call the next sync a success.
        self.file.sync_data().map_err(AppendError::Unknown)?;
        self.bytes += length;
        self.last = last;
        Ok(())
    }

    /// Begins a new file if the current one is large enough, and returns the one that is now complete.
    pub(super) fn roll(&mut self) -> io::Result<Option<Sealed>> {
        if self.bytes < self.segment_bytes || self.path == self.dir.join(format!("log-{:020}", self.last)) {
            return Ok(None);
        }
        let next = Log::create(&self.dir, self.last, self.segment_bytes)?;
        let old = std::mem::replace(self, next);
        Ok(Some(Sealed { path: old.path, last: old.last, bytes: old.bytes }))
    }
}

/// Writes the entries as they were at `at`.
pub(super) fn write_snapshot(dir: &Path, at: u64, entries: impl Iterator<Item = io::Result<Entry>>) -> io::Result<()> {
    const CHUNK: usize = 1 << 20;
    let (partial, path) = (dir.join("snapshot.partial"), dir.join(format!("snapshot-{at:020}")));
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&partial)?;
    file.write_all(&file_header(SNAPSHOT_MAGIC, at))?;
    let mut frame = vec![0; FRAME_HEADER];
    let mut count: u64 = 0;
    for entry in entries {
        let entry = entry?;
        count += 1;
        frame.push(TAG_ENTRY);
        frame.extend_from_slice(&entry.revision.0.to_le_bytes());
        frame.extend_from_slice(&entry.created.0.to_le_bytes());
        put_bytes(&mut frame, entry.key.as_bytes());
        put_bytes(&mut frame, &entry.value);
        if frame.len() >= CHUNK {
            seal_frame(&mut frame);
            file.write_all(&frame)?;
            // In small portions, so that the log's own syncs do not wait behind one large one.
            file.sync_data()?;
            frame.truncate(FRAME_HEADER);
        }
    }
    frame.push(TAG_END);
    frame.extend_from_slice(&count.to_le_bytes());
    seal_frame(&mut frame);
    file.write_all(&frame)?;
    file.sync_all()?;
    fs::rename(&partial, &path)?;
    sync_dir(dir)?;
    for (old, name) in numbered(dir, "snapshot-")? {
        if old < at {
            fs::remove_file(name)?;
        }
    }
    Ok(())
}

/// Reads the directory into `state`, cuts off a torn end, and returns the log to go on with.
pub(super) fn recover(dir: &Path, segment_bytes: u64, state: &mut State) -> Result<(Log, Vec<Sealed>), OpenError> {
    let io = |what, path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Io { what, path, source }
    };
    if let Some((at, path)) = numbered(dir, "snapshot-").map_err(io("cannot read the directory", dir))?.pop() {
        let map = read_snapshot(&path, at)?;
        *state = State::from_snapshot(map, at, at, state.history_limit());
    }
    let mut files = numbered(dir, "log-").map_err(io("cannot read the directory", dir))?;
    // A file whose header was torn: its creation was never completed, so nothing can have been written to it.
    if let Some((_, path)) = files.last()
        && fs::metadata(path).map_err(io("cannot read", path))?.len() < FILE_HEADER as u64
    {
        fs::remove_file(path).map_err(io("cannot remove", path))?;
        files.pop();
    }
    let mut sealed = Vec::new();
    let mut current = None;
    let count = files.len();
    for (index, (first, path)) in files.into_iter().enumerate() {
        let corrupt = |offset, reason: &str| OpenError::Corrupt { file: path.clone(), offset, reason: reason.into() };
        let bytes = fs::read(&path).map_err(io("cannot read", &path))?;
        if bytes.len() < FILE_HEADER || bytes[..FILE_HEADER] != file_header(LOG_MAGIC, first) {
            return Err(corrupt(0, "this is not the header of a log file"));
        }
        if first > state.revision() {
            let reason =
                format!("it continues after revision {first}, but what is before ends at {}", state.revision());
            return Err(corrupt(0, &reason));
        }
        let mut offset = FILE_HEADER;
        let mut last = first;
        while offset < bytes.len() {
            let payload = match frame_at(&bytes, offset) {
                Ok(payload) => payload,
                Err(_) if index + 1 == count && !frame_after(&bytes, offset) => {
                    tracing::warn!(file = %path.display(), offset, dropped = bytes.len() - offset,
                        "the last batch is incomplete, as after a crash; it was never acknowledged and is dropped");
                    break;
                }
                Err(reason) => return Err(corrupt(offset as u64, reason)),
            };
            last = replay(payload, last, state).map_err(|reason| corrupt(offset as u64, &reason))?;
            offset += FRAME_HEADER + payload.len();
        }
        if index + 1 == count {
            let mut file = OpenOptions::new().write(true).open(&path).map_err(io("cannot open", &path))?;
            if offset < bytes.len() {
                file.set_len(offset as u64)
                    .and_then(|()| file.sync_all())
                    .map_err(io("cannot cut off the torn end of", &path))?;
            }
            file.seek(SeekFrom::End(0)).map_err(io("cannot seek in", &path))?;
            let dir = dir.to_owned();
            current = Some(Log { dir, path, file, bytes: offset as u64, last, segment_bytes, buffer: Vec::new() });
        } else {
            sealed.push(Sealed { path, last, bytes: bytes.len() as u64 });
        }
    }
    let log = match current {
        Some(log) if log.last == state.revision() => log,
        // No file yet, or only files that end before the snapshot.
        old => {
            if let Some(old) = old {
                sealed.push(Sealed { path: old.path, last: old.last, bytes: old.bytes });
            }
            Log::create(dir, state.revision(), segment_bytes).map_err(io("cannot create a log file in", dir))?
        }
    };
    Ok((log, sealed))
}

fn replay(payload: &[u8], expected: u64, state: &mut State) -> Result<u64, String> {
    let mut input = Input(payload);
    let before = input.number()?;
    if before != expected {
        return Err(format!("a batch begins after revision {before} where {expected} was expected"));
    }
    let mut revision = before;
    while !input.0.is_empty() {
        let event = match input.byte()? {
            TAG_PUT => {
                let (key, value) = (input.key()?, Bytes::copy_from_slice(input.bytes()?));
                let now = Revision(revision + 1);
                let created = state.get(&key).map_or(now, |entry| entry.created);
                Event::Put(Entry { key, value, revision: now, created })
            }
            TAG_DELETE => Event::Delete { key: input.key()?, revision: Revision(revision + 1) },
            TAG_COMPACT => {
                state.compact(input.number()?);
                continue;
            }
            tag => return Err(format!("unknown record {tag}")),
        };
        revision += 1;
        // What the snapshot already contains is skipped.
        if revision > state.revision() {
            state.replay(event);
        }
    }
    Ok(revision)
}

fn read_snapshot(path: &Path, at: u64) -> Result<Map, OpenError> {
    let corrupt = |offset: usize, reason: &str| OpenError::Corrupt {
        file: path.to_owned(),
        offset: offset as u64,
        reason: reason.into(),
    };
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(|source| OpenError::Io {
        what: "cannot read",
        path: path.to_owned(),
        source,
    })?;
    if bytes.len() < FILE_HEADER || bytes[..FILE_HEADER] != file_header(SNAPSHOT_MAGIC, at) {
        return Err(corrupt(0, "this is not the header of a snapshot"));
    }
    let mut map = Map::new();
    let mut offset = FILE_HEADER;
    loop {
        let payload = frame_at(&bytes, offset).map_err(|reason| corrupt(offset, reason))?;
        let mut input = Input(payload);
        while !input.0.is_empty() {
            let done = read_entry(&mut input, &mut map).map_err(|reason| corrupt(offset, &reason))?;
            if done {
                return Ok(map);
            }
        }
        offset += FRAME_HEADER + payload.len();
    }
}

/// Reads an entry of a snapshot, or its end mark, for which it returns true.
fn read_entry(input: &mut Input<'_>, map: &mut Map) -> Result<bool, String> {
    match input.byte()? {
        TAG_ENTRY => {
            let (revision, created) = (Revision(input.number()?), Revision(input.number()?));
            let (key, value) = (input.key()?, Bytes::copy_from_slice(input.bytes()?));
            map.insert(key.clone(), Entry { key, value, revision, created });
            Ok(false)
        }
        TAG_END => match input.number()? {
            count if count == map.len() as u64 => Ok(true),
            count => Err(format!("{count} entries were written and {} are there", map.len())),
        },
        tag => Err(format!("unknown record {tag}")),
    }
}

fn file_header(magic: [u8; 8], revision: u64) -> [u8; FILE_HEADER] {
    let mut header = [0; FILE_HEADER];
    header[..8].copy_from_slice(&magic);
    header[8..].copy_from_slice(&revision.to_le_bytes());
    header
}

/// Fills in the header of a frame for which room was left at the front.
fn seal_frame(frame: &mut [u8]) {
    let length = (frame.len() - FRAME_HEADER) as u32;
    frame[..4].copy_from_slice(&FRAME);
    frame[4..8].copy_from_slice(&length.to_le_bytes());
    let crc = checksum(length, &frame[FRAME_HEADER..]);
    frame[8..12].copy_from_slice(&crc.to_le_bytes());
}

fn checksum(length: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

fn frame_at(bytes: &[u8], offset: usize) -> Result<&[u8], &'static str> {
    let header = bytes.get(offset..offset + FRAME_HEADER).ok_or("the file ends within a frame's header")?;
    if header[..4] != FRAME {
        return Err("no frame begins here");
    }
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let start = offset + FRAME_HEADER;
    let payload = bytes.get(start..start + word(4) as usize).ok_or("the file ends within a frame")?;
    if checksum(word(4), payload) != word(8) {
        return Err("the checksum of the frame does not match");
    }
    Ok(payload)
}

/// Whether a good frame begins anywhere after `offset`.
fn frame_after(bytes: &[u8], offset: usize) -> bool {
    (offset + 1..bytes.len()).any(|at| bytes[at] == FRAME[0] && frame_at(bytes, at).is_ok())
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// What is left of a payload.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or("a record ends early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> Result<u64, String> {
        let mut number = [0; 8];
        number.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(number))
    }

    fn bytes(&mut self) -> Result<&'a [u8], String> {
        let mut length = [0; 4];
        length.copy_from_slice(self.take(4)?);
        self.take(u32::from_le_bytes(length) as usize)
    }

    fn key(&mut self) -> Result<Arc<str>, String> {
        std::str::from_utf8(self.bytes()?).map(Arc::from).map_err(|_| "a key is not UTF-8".to_owned())
    }
}

/// Files with this prefix and a number, ascending.
fn numbered(dir: &Path, prefix: &str) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for file in fs::read_dir(dir)? {
        let file = file?;
        let name = file.file_name();
        if let Some(number) = name.to_str().and_then(|name| name.strip_prefix(prefix)).and_then(|n| n.parse().ok()) {
            found.push((number, file.path()));
        }
    }
    found.sort();
    Ok(found)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
