//! The members that there are: from the API, and on the disk for when there is none.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    id::Key,
    seal::{ClusterKey, Keyring, Pair, Public},
};

/// A member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The address of its machine.
    pub ip: IpAddr,
    /// Its public key, in base64.
    pub key: String,
}

impl Entry {
    /// Its public key, if it is one.
    pub fn public(&self) -> Option<Public> {
        STANDARD.decode(&self.key).ok()?.try_into().ok()
    }
}

/// All members by the names of their nodes.
pub type Roster = BTreeMap<String, Entry>;

/// A roster, looked up in every way that packets need.
#[derive(Clone, Debug, Default)]
pub struct Index {
    /// All members.
    pub keys: BTreeSet<Key>,
    /// Their names.
    pub names: BTreeMap<Key, String>,
    /// Their addresses.
    pub addresses: BTreeMap<Key, IpAddr>,
    /// Who is at an address.
    pub at: BTreeMap<IpAddr, Key>,
    /// Their public keys.
    pub publics: BTreeMap<Key, Public>,
}

impl Index {
    /// Looks a roster up. `own` is not in it: nobody talks to itself.
    pub fn of(roster: &Roster, own: &str) -> Index {
        let mut index = Index::default();
        for (name, entry) in roster.iter().filter(|(name, _)| *name != own) {
            let (key, Some(public)) = (Key::of(name), entry.public()) else { continue };
            index.keys.insert(key);
            index.names.insert(key, name.clone());
            index.addresses.insert(key, entry.ip);
            index.at.insert(entry.ip, key);
            index.publics.insert(key, public);
        }
        index
    }
}

/// What is kept on the disk.
#[derive(Clone, Debug)]
pub struct Disk {
    directory: PathBuf,
}

/// What an earlier run knew of the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Members {
    members: Roster,
}

/// Which runs of processes have been heard: nothing that is older is believed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Sessions {
    own: u64,
    others: BTreeMap<u64, u64>,
}

#[derive(Serialize, Deserialize)]
struct Keys {
    keys: Vec<String>,
}

impl Disk {
    /// Below this directory.
    pub fn new(directory: &Path) -> Disk {
        Disk { directory: directory.to_owned() }
    }

    /// This machine's key pair; one is made if there is none.
    ///
    /// # Errors
    /// If the file cannot be read or written, or is no key pair.
    pub fn pair(&self) -> anyhow::Result<Pair> {
        let path = self.directory.join("exchange.key");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let bytes = Pair::generate().map_err(|_| anyhow::anyhow!("the system has no randomness"))?;
                write(&path, &bytes)?;
                bytes.to_vec()
            }
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        let damaged = || format!("{} is damaged: delete it, and a new one is made", path.display());
        Pair::read(&bytes).with_context(damaged)
    }

    /// A number for this run of the process, greater than that of any run before, and what was heard of others.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn begin(&self, now: jiff::Timestamp) -> anyhow::Result<(u64, BTreeMap<Key, u64>)> {
        let mut sessions: Sessions = self.read("sessions.json").unwrap_or_default();
        sessions.own = u64::try_from(now.as_millisecond()).unwrap_or(0).max(sessions.own + 1);
        self.write_json("sessions.json", &sessions)?;
        Ok((sessions.own, sessions.others.into_iter().map(|(key, session)| (Key(key), session)).collect()))
    }

    /// Keeps what was heard of others.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn keep_sessions(&self, own: u64, others: &BTreeMap<Key, u64>) -> anyhow::Result<()> {
        let others = others.iter().map(|(key, session)| (key.0, *session)).collect();
        self.write_json("sessions.json", &Sessions { own, others })
    }

    /// The members, as they were last known.
    pub fn members(&self) -> Roster {
        self.read::<Members>("members.json").unwrap_or_default().members
    }

    /// Keeps them.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn keep_members(&self, members: &Roster) -> anyhow::Result<()> {
        self.write_json("members.json", &Members { members: members.clone() })
    }

    /// The cluster's keys, as they were last known.
    pub fn keys(&self) -> Keyring {
        let kept: Option<Keys> = self.read("keys.json");
        let read = |text: &String| ClusterKey::new(&STANDARD.decode(text).ok()?);
        Keyring { keys: kept.iter().flat_map(|kept| kept.keys.iter().filter_map(read)).collect() }
    }

    /// Keeps them.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn keep_keys(&self, ring: &Keyring) -> anyhow::Result<()> {
        let keys = ring.keys.iter().map(|key| STANDARD.encode(key.bytes())).collect();
        self.write_json("keys.json", &Keys { keys })
    }

    /// What is damaged is as good as lost: the API has it all.
    fn read<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let path = self.directory.join(name);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != std::io::ErrorKind::NotFound {
                    tracing::warn!(%error, "{} cannot be read", path.display());
                }
                return None;
            }
        };
        let read = serde_json::from_slice(&text);
        read.inspect_err(|error| tracing::warn!(%error, "{} is damaged and will be written anew", path.display())).ok()
    }

    fn write_json<T: Serialize>(&self, name: &str, value: &T) -> anyhow::Result<()> {
        write(&self.directory.join(name), &serde_json::to_vec_pretty(value)?)
    }
}

/// Replaces a file that nobody else may read: the old one or the new one is there, also after a power cut.
fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let temporary = path.with_extension("new");
    let attempt = || -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        let mut options = std::fs::OpenOptions::new();
        let mut out = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        out.write_all(bytes)?;
        out.sync_all()?;
        std::fs::rename(&temporary, path)?;
        std::fs::File::open(directory)?.sync_all()
    };
    attempt().with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_is_needed_without_an_api_is_on_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::new(&directory.path().join("gossip"));
        assert_eq!((disk.members(), disk.keys()), (Roster::new(), Keyring::default()));
        let public = disk.pair().unwrap().public();
        assert_eq!(disk.pair().unwrap().public(), public, "it stays the same");
        let entry = |ip: &str| Entry { ip: ip.parse().unwrap(), key: STANDARD.encode(public) };
        let roster: Roster = [("a".to_owned(), entry("10.0.0.1")), ("b".to_owned(), entry("fd00::2"))].into();
        disk.keep_members(&roster).unwrap();
        assert_eq!(disk.members(), roster);
        let ring = Keyring { keys: vec![ClusterKey::random().unwrap(), ClusterKey::random().unwrap()] };
        disk.keep_keys(&ring).unwrap();
        assert_eq!(disk.keys(), ring);
        for file in std::fs::read_dir(directory.path().join("gossip")).unwrap() {
            assert_eq!(file.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
        let index = Index::of(&roster, "a");
        assert_eq!(index.names, [(Key::of("b"), "b".to_owned())].into());
        assert_eq!(index.at, [("fd00::2".parse().unwrap(), Key::of("b"))].into());
    }

    #[test]
    fn sessions_only_grow() {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::new(directory.path());
        let at = |ms| jiff::Timestamp::from_millisecond(ms).unwrap();
        assert_eq!(disk.begin(at(5000)).unwrap(), (5000, BTreeMap::new()));
        disk.keep_sessions(5000, &[(Key(7), 70)].into()).unwrap();
        // The clock was set back.
        assert_eq!(disk.begin(at(10)).unwrap(), (5001, [(Key(7), 70)].into()));
        assert_eq!(disk.begin(at(9000)).unwrap().0, 9000);
        std::fs::write(directory.path().join("sessions.json"), "{").unwrap();
        assert_eq!(disk.begin(at(9500)).unwrap(), (9500, BTreeMap::new()));
    }
}
