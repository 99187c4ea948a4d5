//! The file format: a header, entries in order of key, and a trailer that tells whether all of it is there.
//!
//! | part | bytes |
//! |---|---|
//! | magic | `SEAWSNAP` |
//! | version of the format | 4 |
//! | header | length (4), JSON |
//! | entry, any number of times | 1, last write (8), creation (8), length (4), key, length (4), value |
//! | trailer | 2, number of entries (8), bytes of values (8), SHA-256 (32) of everything before the sum |
//!
//! Numbers are little-endian. Nothing follows the trailer.

use std::{
    fmt,
    io::{self, Read, Write},
    sync::Arc,
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{Entry, Revision};

/// The version of the format that is written. Others are refused.
pub const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"SEAWSNAP";
const TAG_ENTRY: u8 = 1;
const TAG_END: u8 = 2;
/// How many bytes the trailer has.
pub(super) const TRAILER: usize = 1 + 8 + 8 + 32;
/// Lengths above these are damage: a header or a key is never that long, nor can any backend hold such a value.
const LONGEST_HEADER: u32 = 64 << 10;
const LONGEST_KEY: u32 = 64 << 10;
const LONGEST_VALUE: u32 = 256 << 20;

/// What a snapshot is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Header {
    /// The cluster: the uid of its namespace `kube-system`, if the writer knew it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// The revision at which everything was read.
    pub revision: Revision,
    /// When it was written, in seconds since 1970.
    pub time: i64,
    /// The version of the program that wrote it.
    pub writer: String,
}

/// What a snapshot adds up to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Sum {
    /// How many entries there are.
    pub keys: u64,
    /// How many bytes their values have.
    pub bytes: u64,
    /// The SHA-256 of everything before it in the file.
    pub sha256: [u8; 32],
}

impl Sum {
    /// The digest as people write it.
    pub fn hex(&self) -> String {
        self.sha256.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(super) fn of_trailer(bytes: &[u8; TRAILER]) -> Option<Sum> {
        let (tag, rest) = bytes.split_first()?;
        let (keys, rest) = rest.split_first_chunk()?;
        let (bytes, rest) = rest.split_first_chunk()?;
        let sha256 = rest.try_into().ok()?;
        (*tag == TAG_END).then(|| Sum { keys: u64::from_le_bytes(*keys), bytes: u64::from_le_bytes(*bytes), sha256 })
    }
}

impl fmt::Debug for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys, {} bytes, {}", self.keys, self.bytes, self.hex())
    }
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// It is something else.
    #[error("this is not a snapshot of Seawall")]
    Foreign,
    /// It was written by another version.
    #[error("its format is {found}, and this program reads {VERSION}: use the version of seawall that wrote it")]
    Version {
        /// The version of its format.
        found: u32,
    },
    /// It ends early.
    #[error("it ends at byte {at}, before its trailer: it was not written or copied to the end; use another one")]
    Short {
        /// Its length.
        at: u64,
    },
    /// It has been changed since it was written.
    #[error("it is damaged at or before byte {at} ({reason}); use another one")]
    Damaged {
        /// Where that was noticed.
        at: u64,
        /// How.
        reason: String,
    },
    /// An entry that does not fit into a snapshot, at writing.
    #[error("the value of {key} has {bytes} bytes, and a snapshot takes {LONGEST_VALUE} at most")]
    TooLarge {
        /// Which.
        key: Arc<str>,
        /// How large it is.
        bytes: usize,
    },
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Writes a snapshot.
pub struct Writer<W> {
    out: W,
    digest: Sha256,
    keys: u64,
    bytes: u64,
}

impl<W: Write> Writer<W> {
    /// Begins with the header.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(out: W, header: &Header) -> Result<Writer<W>, Fault> {
        let json = serde_json::to_vec(header).map_err(io::Error::other)?;
        let mut writer = Writer { out, digest: Sha256::new(), keys: 0, bytes: 0 };
        writer.write(&MAGIC)?;
        writer.write(&VERSION.to_le_bytes())?;
        writer.counted(&json)?;
        Ok(writer)
    }

    /// Adds an entry. They come in order of key.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn entry(&mut self, entry: &Entry) -> Result<(), Fault> {
        if entry.value.len() > LONGEST_VALUE as usize {
            return Err(Fault::TooLarge { key: entry.key.clone(), bytes: entry.value.len() });
        }
        self.write(&[TAG_ENTRY])?;
        self.write(&entry.revision.0.to_le_bytes())?;
        self.write(&entry.created.0.to_le_bytes())?;
        self.counted(entry.key.as_bytes())?;
        self.counted(&entry.value)?;
        self.keys += 1;
        self.bytes += entry.value.len() as u64;
        Ok(())
    }

    /// Ends with the trailer.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self) -> Result<(W, Sum), Fault> {
        self.write(&[TAG_END])?;
        self.write(&self.keys.to_le_bytes())?;
        self.write(&self.bytes.to_le_bytes())?;
        let sum = Sum { keys: self.keys, bytes: self.bytes, sha256: self.digest.finalize().into() };
        self.out.write_all(&sum.sha256)?;
        self.out.flush()?;
        Ok((self.out, sum))
    }

    fn counted(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let length = u32::try_from(bytes.len()).map_err(|_| io::Error::other("longer than 4 GiB"))?;
        self.write(&length.to_le_bytes())?;
        self.write(bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.digest.update(bytes);
        Ok(self.out.write_all(bytes)?)
    }
}

/// Reads a snapshot, entry by entry. Whether it is whole is known at its end.
pub struct Reader<R> {
    input: R,
    header: Header,
    digest: Sha256,
    at: u64,
    keys: u64,
    bytes: u64,
    last: Option<Arc<str>>,
    sum: Option<Sum>,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// If there is none, or it is of another version.
    pub fn new(input: R) -> Result<Reader<R>, Fault> {
        let header = Header { cluster: None, revision: Revision(0), time: 0, writer: String::new() };
        let digest = Sha256::new();
        let mut reader = Reader { input, header, digest, at: 0, keys: 0, bytes: 0, last: None, sum: None };
        match reader.array::<8>() {
            Ok(MAGIC) => {}
            Ok(_) | Err(Fault::Short { .. }) => return Err(Fault::Foreign),
            Err(error) => return Err(error),
        }
        match u32::from_le_bytes(reader.array()?) {
            VERSION => {}
            found => return Err(Fault::Version { found }),
        }
        let json = reader.counted(LONGEST_HEADER, "header")?;
        reader.header = serde_json::from_slice(&json).map_err(|error| reader.damaged(&format!("header: {error}")))?;
        Ok(reader)
    }

    /// What it is of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What it adds up to, once all of it has been read.
    pub fn sum(&self) -> Option<Sum> {
        self.sum
    }

    /// The next entry; nothing at the end, if everything was as it had been written.
    ///
    /// # Errors
    /// If it was not.
    pub fn entry(&mut self) -> Result<Option<Entry>, Fault> {
        if self.sum.is_some() {
            return Ok(None);
        }
        match self.array()? {
            [TAG_ENTRY] => {}
            [TAG_END] => return self.end().map(|()| None),
            [tag] => return Err(self.damaged(&format!("no entry is of kind {tag}"))),
        }
        let revision = Revision(u64::from_le_bytes(self.array()?));
        let created = Revision(u64::from_le_bytes(self.array()?));
        let key = self.counted(LONGEST_KEY, "key")?;
        let key: Arc<str> = std::str::from_utf8(&key).map(Arc::from).map_err(|_| self.damaged("a key is not UTF-8"))?;
        if created > revision || revision > self.header.revision {
            return Err(self.damaged(&format!("{key} is from the future")));
        }
        if self.last.as_ref().is_some_and(|last| *last >= key) {
            return Err(self.damaged(&format!("{key} is not in order")));
        }
        let value = Bytes::from(self.counted(LONGEST_VALUE, "value")?);
        self.keys += 1;
        self.bytes += value.len() as u64;
        self.last = Some(key.clone());
        Ok(Some(Entry { key, value, revision, created }))
    }

    fn end(&mut self) -> Result<(), Fault> {
        let (keys, bytes) = (u64::from_le_bytes(self.array()?), u64::from_le_bytes(self.array()?));
        let sha256: [u8; 32] = self.digest.clone().finalize().into();
        if self.array()? != sha256 {
            return Err(self.damaged("its SHA-256 is another one than was written"));
        }
        if (keys, bytes) != (self.keys, self.bytes) {
            return Err(self.damaged("it has another number of entries than was written"));
        }
        match self.input.read(&mut [0])? {
            0 => {}
            _ => return Err(self.damaged("something follows its end")),
        }
        self.sum = Some(Sum { keys, bytes, sha256 });
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn counted(&mut self, longest: u32, what: &str) -> Result<Vec<u8>, Fault> {
        let length = u32::from_le_bytes(self.array()?);
        if length > longest {
            return Err(self.damaged(&format!("a {what} of {length} bytes")));
        }
        // Room is made for what comes, not for what a damaged length says.
        let mut bytes = Vec::new();
        let read = (&mut self.input).take(length.into()).read_to_end(&mut bytes)?;
        self.at += read as u64;
        if read < length as usize {
            return Err(Fault::Short { at: self.at });
        }
        self.digest.update(&bytes);
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Fault> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.input.read(&mut bytes[filled..]) {
                Ok(0) => return Err(Fault::Short { at: self.at + filled as u64 }),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.at += bytes.len() as u64;
        self.digest.update(&*bytes);
        Ok(())
    }

    fn damaged(&self, reason: &str) -> Fault {
        Fault::Damaged { at: self.at, reason: reason.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header { cluster: Some("u-i-d".into()), revision: Revision(40), time: 1_700_000_000, writer: "v1".into() }
    }

    fn entry(key: &str, value: &[u8], revision: u64) -> Entry {
        let value = Bytes::copy_from_slice(value);
        Entry { key: key.into(), value, revision: Revision(revision), created: Revision(revision / 2) }
    }

    fn write(entries: &[Entry]) -> (Vec<u8>, Sum) {
        let mut writer = Writer::new(Vec::new(), &header()).unwrap();
        entries.iter().for_each(|entry| writer.entry(entry).unwrap());
        writer.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<(Vec<Entry>, Sum), Fault> {
        let mut reader = Reader::new(bytes)?;
        let mut entries = Vec::new();
        while let Some(entry) = reader.entry()? {
            entries.push(entry);
        }
        assert_eq!(reader.header(), &header());
        Ok((entries, reader.sum().unwrap()))
    }

    fn sample() -> Vec<Entry> {
        vec![entry("/registry/a", b"one", 7), entry("/registry/b", b"", 40), entry("/registry/c", &[0xff; 300], 2)]
    }

    #[test]
    fn what_was_written_is_read() {
        for entries in [Vec::new(), sample()] {
            let (bytes, sum) = write(&entries);
            assert_eq!(read(&bytes).unwrap(), (entries.clone(), sum));
            assert_eq!((sum.keys, sum.hex().len()), (entries.len() as u64, 64));
            let trailer = bytes.last_chunk().unwrap();
            assert_eq!(Sum::of_trailer(trailer), Some(sum));
        }
    }

    #[test]
    fn a_file_that_ends_early_is_refused_wherever_it_ends() {
        let (bytes, _) = write(&sample());
        for end in 0..bytes.len() {
            match read(&bytes[..end]).unwrap_err() {
                Fault::Foreign => assert!(end < 8, "{end}"),
                Fault::Short { at } => assert_eq!(at, end as u64),
                other => panic!("{end}: {other}"),
            }
        }
        let longer = [&bytes[..], b"x"].concat();
        assert!(read(&longer).unwrap_err().to_string().contains("something follows its end"));
    }

    #[test]
    fn a_changed_bit_is_noticed_wherever_it_is() {
        let (bytes, _) = write(&sample());
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut bytes = bytes.clone();
                bytes[at] ^= 1 << bit;
                // Not by reading it with the header of the test, which a change may concern.
                let whole = || {
                    let mut reader = Reader::new(&bytes[..])?;
                    while reader.entry()?.is_some() {}
                    Ok::<_, Fault>(())
                };
                assert!(whole().is_err(), "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let check = |bytes: &[u8], expect: &str| {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        };
        check(b"", "not a snapshot");
        check(b"kubectl get pods", "not a snapshot");
        let mut newer = write(&[]).0;
        newer[8] = 9;
        check(&newer, "its format is 9, and this program reads 1");
        let twice = |a: &str, b: &str| write(&[entry(a, b"x", 3), entry(b, b"x", 3)]).0;
        check(&twice("/b", "/a"), "/a is not in order");
        check(&twice("/a", "/a"), "/a is not in order");
        check(&write(&[entry("/a", b"x", 41)]).0, "/a is from the future");
        let mut long = write(&[]).0;
        long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        check(&long, "a header of 4294967295 bytes");
    }

    proptest! {
        #[test]
        fn random_bytes_are_never_a_snapshot(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(read(&bytes).is_err());
            let with_magic = [&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat();
            prop_assert!(read(&with_magic).is_err());
        }
    }
}
