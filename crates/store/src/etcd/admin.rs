//! The administration of etcd: members, alarms, maintenance.
//!
//! Questions and changes that concern the whole cluster go to whichever member serves; what concerns one member names
//! it by its URL. A change whose answer was lost is repeated, and found to be done already if it was.

use std::{
    fmt, fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sha2::{Digest, Sha256};
use tokio_util::sync::DropGuard;

use super::{
    Options,
    link::{Failure, Link, Patience},
    pool::{Pool, Trouble},
    proto::{
        self, AlarmRequest, DefragmentRequest, HashKvRequest, MemberAddRequest, MemberListRequest,
        MemberPromoteRequest, MemberRemoveRequest, MemberUpdateRequest, MoveLeaderRequest, Rpc, StatusRequest,
    },
};

/// How long a question to one named member may take.
const ANSWER: Duration = Duration::from_secs(2);
/// How long a change of the cluster may take with all its tries.
const CHANGE: Duration = Duration::from_secs(10);
/// How long a defragmentation may take: it rewrites the whole database, and the member serves nothing meanwhile.
const DEFRAGMENT: Duration = Duration::from_secs(600);
/// How long a snapshot may stall.
const STALL: Duration = Duration::from_secs(30);

/// The number of a member. It is written in hexadecimal, as `etcdctl` does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct MemberId(pub u64);

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl fmt::Debug for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// A member, as the cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its number.
    pub id: MemberId,
    /// Its name; empty until it has been started for the first time.
    pub name: String,
    /// Where the others reach it.
    pub peer_urls: Vec<String>,
    /// Where clients reach it; empty until it has been started for the first time.
    pub client_urls: Vec<String>,
    /// It receives everything and has no vote yet.
    pub learner: bool,
}

impl From<proto::Member> for Member {
    fn from(member: proto::Member) -> Member {
        let proto::Member { id, name, peer_urls, client_urls, is_learner } = member;
        Member { id: MemberId(id), name, peer_urls, client_urls, learner: is_learner }
    }
}

/// How a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Who answered.
    pub member: MemberId,
    /// Of which cluster.
    pub cluster: u64,
    /// The version of its program.
    pub version: String,
    /// Bytes of its database on disk.
    pub db_size: u64,
    /// Bytes of that which are used; the rest is given back by a defragmentation.
    pub db_in_use: u64,
    /// Bytes that its database may have; only from 3.6 on.
    pub db_quota: Option<u64>,
    /// The leader it follows, if it has one.
    pub leader: Option<MemberId>,
    /// The last entry in its log.
    pub raft_index: u64,
    /// The last entry that it has applied.
    pub applied_index: u64,
    /// The term.
    pub term: u64,
    /// The newest revision that it has (etcd's, without our offset).
    pub revision: i64,
    /// It has no vote yet.
    pub learner: bool,
    /// What it complains about: alarms, "no leader".
    pub errors: Vec<String>,
}

/// What an alarm is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlarmKind {
    /// The database is as large as it may be; writes are refused until there is room and the alarm is taken back.
    NoSpace,
    /// A member has other data than the rest.
    Corrupt,
    /// One that this version does not know.
    Other(i32),
}

/// An alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alarm {
    /// Who raised it.
    pub member: MemberId,
    /// What about.
    pub kind: AlarmKind,
}

/// What a member's keys add up to: equal on all members at the same revision and compaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hash {
    /// The sum.
    pub hash: u32,
    /// The revision up to which (etcd's).
    pub revision: i64,
    /// The oldest revision that it covers.
    pub compacted: i64,
}

/// Why an administrative request failed.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// There is no such member.
    #[error("there is no member {0} (any more)")]
    NoSuchMember(MemberId),
    /// The address belongs to a member already.
    #[error("another member has one of these peer URLs already: {}; remove it first, or use its place", urls.join(", "))]
    PeerUrlTaken {
        /// What was asked for.
        urls: Vec<String>,
    },
    /// One learner at a time (etcd 3.4 and 3.5 have no more).
    #[error("there are as many learners as etcd allows; promote or remove the one that is there first")]
    TooManyLearners,
    /// The learner has not caught up.
    #[error("member {0} has not caught up with the leader yet, or is not running; it is promoted when it has")]
    NotInSync(MemberId),
    /// It has a vote already.
    #[error("member {0} is not a learner")]
    NotALearner(MemberId),
    /// The change would leave too few members that run.
    #[error(
        "etcd refuses because too few members would be running for a majority ({0}); start or remove those that are down first"
    )]
    WouldLoseQuorum(String),
    /// No member leads now.
    #[error("no member leads; more than half of the members have to be up and to reach each other")]
    NoLeader,
    /// etcd refuses for another reason.
    #[error("etcd refuses: {0}")]
    Refused(String),
    /// The member that was named does not answer.
    #[error("{url} does not answer: {said}")]
    Unreachable {
        /// Which one.
        url: String,
        /// What happened.
        said: String,
    },
    /// No member answers, or the configuration is wrong.
    #[error(transparent)]
    Store(#[from] crate::Error),
    /// A snapshot could not be written.
    #[error("the snapshot cannot be written to {}", path.display())]
    Io {
        /// Where to.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// A snapshot came damaged.
    #[error("the snapshot from {url} is damaged ({reason}); nothing was kept, try again")]
    Damaged {
        /// From whom.
        url: String,
        /// What is wrong.
        reason: &'static str,
    },
}

/// A result of an administrative request.
pub type Result<T, E = AdminError> = std::result::Result<T, E>;

/// The administration of one etcd.
#[derive(Clone)]
pub struct Admin {
    pool: Arc<Pool>,
    /// Set if the connections are not a store's.
    _own: Option<Arc<DropGuard>>,
}

impl Admin {
    pub(super) fn new(pool: Arc<Pool>) -> Admin {
        Admin { pool, _own: None }
    }

    /// The administration by connections of its own. Nothing is asked yet, so it works without a majority, too.
    ///
    /// # Errors
    /// If the options cannot be used.
    pub fn open(options: &Options) -> Result<Admin> {
        let pool = super::open_pool(options).map_err(crate::Error::from)?;
        let own = Arc::new(pool.stop.clone().drop_guard());
        Ok(Admin { pool, _own: Some(own) })
    }

    /// All members. From 3.5 on the list is the majority's, before it is the list of the member that was asked, which may lag.
    pub async fn members(&self) -> Result<Vec<Member>> {
        let (answer, _) = self.change(MemberListRequest { linearizable: true }).await?;
        Ok(answer.map_err(AdminError::Refused)?.members.into_iter().map(Member::from).collect())
    }

    /// All members as this one knows them; it answers without a majority, too.
    pub async fn members_known_to(&self, url: &str) -> Result<Vec<Member>> {
        let answer = self.one(url, MemberListRequest { linearizable: false }, ANSWER).await?;
        Ok(answer.members.into_iter().map(Member::from).collect())
    }

    /// Adds a member that has no vote yet, and returns it with all members. It then has to be started with
    /// `--initial-cluster-state existing` and all members in `--initial-cluster`.
    pub async fn add_learner(&self, peer_urls: Vec<String>) -> Result<(Member, Vec<Member>)> {
        let request = MemberAddRequest { peer_urls: peer_urls.clone(), is_learner: true };
        let (answer, unsure) = self.change(request).await?;
        match answer {
            Ok(answer) => {
                let added = answer.member.ok_or_else(|| AdminError::Refused("it did not name the member".into()))?;
                Ok((added.into(), answer.members.into_iter().map(Member::from).collect()))
            }
            Err(said) if said.contains("already exist") => {
                // The try whose answer was lost may have done it.
                let members = self.members().await?;
                let ours = |m: &&Member| unsure && m.learner && m.name.is_empty() && m.peer_urls == peer_urls;
                match members.iter().find(ours).cloned() {
                    Some(added) => Ok((added, members)),
                    None => Err(AdminError::PeerUrlTaken { urls: peer_urls }),
                }
            }
            Err(said) if said.contains("too many learner") => Err(AdminError::TooManyLearners),
            Err(said) => Err(reconfiguration(said)),
        }
    }

    /// Gives a learner its vote.
    pub async fn promote(&self, id: MemberId) -> Result<()> {
        let (answer, unsure) = self.change(MemberPromoteRequest { id: id.0 }).await?;
        match answer {
            Ok(_) => Ok(()),
            Err(said) if said.contains("in sync with leader") => Err(AdminError::NotInSync(id)),
            Err(said) if said.contains("can only promote a learner") && unsure => Ok(()),
            Err(said) if said.contains("can only promote a learner") => Err(AdminError::NotALearner(id)),
            Err(said) if said.contains("member not found") => Err(AdminError::NoSuchMember(id)),
            Err(said) => Err(reconfiguration(said)),
        }
    }

    /// Removes a member for good. Its process ends by itself; its disk must not be used for this cluster again.
    pub async fn remove(&self, id: MemberId) -> Result<()> {
        let (answer, unsure) = self.change(MemberRemoveRequest { id: id.0 }).await?;
        match answer {
            Ok(_) => Ok(()),
            Err(said) if said.contains("member not found") && unsure => Ok(()),
            Err(said) if said.contains("member not found") => Err(AdminError::NoSuchMember(id)),
            Err(said) => Err(reconfiguration(said)),
        }
    }

    /// Tells the others where a member is reached from now on.
    pub async fn update(&self, id: MemberId, peer_urls: Vec<String>) -> Result<()> {
        let (answer, _) = self.change(MemberUpdateRequest { id: id.0, peer_urls: peer_urls.clone() }).await?;
        match answer {
            Ok(_) => Ok(()),
            Err(said) if said.contains("member not found") => Err(AdminError::NoSuchMember(id)),
            Err(said) if said.contains("already exist") => Err(AdminError::PeerUrlTaken { urls: peer_urls }),
            Err(said) => Err(reconfiguration(said)),
        }
    }

    /// How one member is. It answers without a majority, and as a learner, too.
    pub async fn status(&self, url: &str) -> Result<Status> {
        let status = self.one(url, StatusRequest {}, ANSWER).await?;
        let header = status.header.unwrap_or_default();
        let bytes = |size: i64| u64::try_from(size).unwrap_or(0);
        Ok(Status {
            member: MemberId(header.member_id),
            cluster: header.cluster_id,
            version: status.version,
            db_size: bytes(status.db_size),
            db_in_use: bytes(status.db_size_in_use),
            db_quota: (status.db_size_quota > 0).then(|| bytes(status.db_size_quota)),
            leader: (status.leader != 0).then_some(MemberId(status.leader)),
            raft_index: status.raft_index,
            applied_index: status.raft_applied_index,
            term: status.raft_term,
            revision: header.revision,
            learner: status.is_learner,
            errors: status.errors,
        })
    }

    /// The alarms that are raised.
    pub async fn alarms(&self) -> Result<Vec<Alarm>> {
        let (answer, _) = self.change(AlarmRequest { action: 0, member_id: 0, alarm: 0 }).await?;
        let alarms = answer.map_err(AdminError::Refused)?.alarms;
        Ok(alarms.into_iter().map(|a| Alarm { member: MemberId(a.member_id), kind: kind(a.alarm) }).collect())
    }

    /// Takes an alarm back. If its cause is still there, etcd raises it again.
    pub async fn disarm(&self, alarm: Alarm) -> Result<()> {
        let number = match alarm.kind {
            AlarmKind::NoSpace => 1,
            AlarmKind::Corrupt => 2,
            AlarmKind::Other(number) => number,
        };
        let request = AlarmRequest { action: 2, member_id: alarm.member.0, alarm: number };
        self.change(request).await?.0.map(|_| ()).map_err(AdminError::Refused)
    }

    /// Makes a member's database as small as it can be. The member serves nothing until that is done, so: one at a time.
    pub async fn defragment(&self, url: &str) -> Result<()> {
        self.one(url, DefragmentRequest {}, DEFRAGMENT).await.map(|_| ())
    }

    /// What a member's keys add up to, up to a revision of etcd's (0: the newest that it has). It reads all of them.
    pub async fn hash(&self, url: &str, revision: i64) -> Result<Hash> {
        let answer = self.one(url, HashKvRequest { revision }, DEFRAGMENT).await?;
        let newest = answer.header.map_or(0, |header| header.revision);
        let revision = if revision == 0 { newest } else { revision };
        Ok(Hash { hash: answer.hash, revision, compacted: answer.compact_revision })
    }

    /// Makes this member lead.
    pub async fn move_leader(&self, to: MemberId) -> Result<()> {
        let mut last = None;
        for member in self.members().await? {
            let Some(url) = member.client_urls.first() else { continue };
            match self.status(url).await {
                Ok(status) if status.leader == Some(to) => return Ok(()),
                Ok(status) if status.leader == Some(status.member) => {
                    return match self.one(url, MoveLeaderRequest { target_id: to.0 }, CHANGE).await {
                        Ok(_) => Ok(()),
                        Err(AdminError::Refused(said)) if said.contains("bad leader transferee") => {
                            Err(AdminError::NoSuchMember(to))
                        }
                        Err(error) => Err(error),
                    };
                }
                Ok(_) => {}
                Err(error) => last = Some(error),
            }
        }
        // If one does not answer, it may be the leader.
        Err(last.unwrap_or(AdminError::NoLeader))
    }

    /// Writes a member's whole database to a file, from which a cluster can be restored (`etcdctl snapshot restore`). The
    /// file is there when it is complete, or not at all. Returns its size.
    pub async fn snapshot(&self, url: &str, path: &Path) -> Result<u64> {
        let link = self.link(url)?;
        let partial = path.with_added_extension("partial");
        let result = self.snapshot_to(&link, url, &partial).await.and_then(|bytes| {
            let done = fs::rename(&partial, path).and_then(|()| sync_parent(path));
            done.map_err(|source| AdminError::Io { path: path.to_owned(), source })?;
            Ok(bytes)
        });
        if result.is_err() {
            // If it was never made, there is nothing to remove.
            let _ = fs::remove_file(&partial);
        }
        result
    }

    async fn snapshot_to(&self, link: &Link, url: &str, path: &Path) -> Result<u64> {
        let io = |source| AdminError::Io { path: path.to_owned(), source };
        let unreachable = |said: String| AdminError::Unreachable { url: url.to_owned(), said };
        let mut options = fs::OpenOptions::new();
        let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(path).map_err(io)?;
        let opened = tokio::time::timeout(STALL, link.snapshot()).await;
        let mut stream = match opened {
            Ok(stream) => stream.map_err(|status| unreachable(Failure::of(&status).said))?,
            Err(_) => return Err(unreachable(Failure::silent(STALL).said)),
        };
        let mut sum = TrailingSum::default();
        loop {
            let piece = match tokio::time::timeout(STALL, stream.message()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => break,
                Ok(Err(status)) => return Err(unreachable(Failure::of(&status).said)),
                Err(_) => return Err(unreachable(Failure::silent(STALL).said)),
            };
            sum.take(&piece.blob);
            // A piece has 32 kB; the file system's cache takes it at once.
            file.write_all(&piece.blob).map_err(io)?;
        }
        let bytes = sum.bytes;
        sum.check().map_err(|reason| AdminError::Damaged { url: url.to_owned(), reason })?;
        let synced = tokio::task::spawn_blocking(move || file.sync_all()).await;
        synced.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(io)?;
        Ok(bytes)
    }

    /// A change of the cluster by any member, or etcd's refusal; and whether a try may have succeeded before.
    async fn change<R: Rpc>(&self, request: R) -> Result<(Result<R::Answer, String>, bool)> {
        let mut turn = self.pool.turn_within(CHANGE);
        let mut unsure = false;
        loop {
            match self.pool.attempt(&mut turn, request.clone()).await {
                Ok(answer) => return Ok((Ok(answer), unsure)),
                Err(Trouble::Refused(said)) => return Ok((Err(said), unsure)),
                Err(Trouble::Again { ambiguous }) => unsure |= ambiguous,
                Err(Trouble::Over(error)) => return Err(error.into()),
            }
        }
    }

    fn link(&self, url: &str) -> Result<Link> {
        // Long work is silent; a member closes connections that ping it more often than it likes.
        let patience = Patience { keepalive: Duration::from_secs(10), ..self.pool.limits.patience };
        Ok(self.pool.link_to(url, patience).map_err(crate::Error::from)?)
    }

    /// A request to one member.
    async fn one<R: Rpc>(&self, url: &str, request: R, limit: Duration) -> Result<R::Answer> {
        let link = self.link(url)?;
        let failure = match tokio::time::timeout(limit, link.call(request, limit)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(status)) => Failure::of(&status),
            Err(_) => Failure::silent(limit),
        };
        Err(match failure.kind {
            super::link::Kind::Final => AdminError::Refused(failure.said),
            _ => AdminError::Unreachable { url: url.to_owned(), said: failure.said },
        })
    }
}

fn kind(number: i32) -> AlarmKind {
    match number {
        1 => AlarmKind::NoSpace,
        2 => AlarmKind::Corrupt,
        other => AlarmKind::Other(other),
    }
}

/// Refusals that any change of the members can meet.
fn reconfiguration(said: String) -> AdminError {
    match said {
        said if said.contains("not enough started members") => AdminError::WouldLoseQuorum(said),
        said => AdminError::Refused(said),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => fs::File::open(parent)?.sync_all(),
        None => fs::File::open(".")?.sync_all(),
    }
}

/// A snapshot ends with the SHA-256 of what is before.
#[derive(Default)]
struct TrailingSum {
    hasher: Sha256,
    tail: Vec<u8>,
    bytes: u64,
}

impl TrailingSum {
    const LENGTH: usize = 32;

    fn take(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        self.tail.extend_from_slice(piece);
        if let Some(complete) = self.tail.len().checked_sub(Self::LENGTH) {
            self.hasher.update(&self.tail[..complete]);
            self.tail.drain(..complete);
        }
    }

    fn check(self) -> Result<(), &'static str> {
        if self.bytes <= Self::LENGTH as u64 {
            return Err("it is too short");
        }
        if self.hasher.finalize()[..] != self.tail[..] {
            return Err("its checksum does not match");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_carries_its_sum() {
        let data = vec![7u8; 1000];
        let whole = [data.as_slice(), &Sha256::digest(&data)[..]].concat();
        for size in [1, 31, 32, 33, 500, 2000] {
            let check = |bytes: &[u8]| {
                let mut sum = TrailingSum::default();
                bytes.chunks(size).for_each(|piece| sum.take(piece));
                sum.check()
            };
            assert_eq!(check(&whole), Ok(()), "in pieces of {size}");
            assert!(check(&whole[..whole.len() - 1]).is_err());
            assert!(check(&whole[1..]).is_err());
            assert!(check(&whole[..20]).is_err());
        }
    }
}
