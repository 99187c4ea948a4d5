//! The members of etcd: who joins, who leaves, and what one of them has to do for all.

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use futures::future::join_all;
use seawall_quorum::membership::{self, Member, Progress, Verdict, judge};
use seawall_store::{
    Revision, Store,
    etcd::{
        Endpoint, Etcd, Options,
        admin::{self, Admin, AlarmKind, MemberId},
    },
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Certificates, Local, PEER_PORT, client_url, cut, peer_address, peer_url};
use crate::{
    files::{Files, ServerState, StoreKind},
    pki::Authority,
};

/// How long a member has to say how it is.
const STATUS: Duration = Duration::from_millis(800);
/// How often the list of members is read.
const REFRESH: Duration = Duration::from_secs(2);
/// How often history is forgotten, and how much of it is kept.
const COMPACT: Duration = Duration::from_secs(300);
/// A learner that does not move for this long is removed.
const STALLED: Duration = Duration::from_secs(120);
/// How long a new member may take until it votes.
const PROMOTION: Duration = Duration::from_secs(600);
/// A member's file is rewritten when more than this many bytes, and more than half of it, are free.
const FRAGMENTED: u64 = 64 << 20;

/// The members, seen from this machine.
pub struct Members {
    admin: Admin,
    files: Files,
    name: String,
}

impl Members {
    /// Of this store.
    pub fn new(admin: Admin, files: &Files, name: &str) -> Members {
        Members { admin, files: files.clone(), name: name.to_owned() }
    }

    /// The members, and how each of them is.
    ///
    /// # Errors
    /// If none answers.
    pub async fn list(&self) -> anyhow::Result<Vec<(admin::Member, Option<admin::Status>)>> {
        let members = self.admin.members().await?;
        let each = members.into_iter().map(|member| async move {
            let status = match member.client_urls.first() {
                Some(url) => tokio::time::timeout(STATUS, self.admin.status(url)).await.ok().and_then(Result::ok),
                None => None,
            };
            (member, status)
        });
        Ok(join_all(each).await)
    }

    async fn judged(&self) -> anyhow::Result<Vec<Member>> {
        let of = |(member, status): (admin::Member, Option<admin::Status>)| Member {
            id: member.id.0,
            name: member.name,
            learner: member.learner,
            healthy: status.is_some_and(|s| s.leader.is_some() && s.errors.is_empty()),
        };
        Ok(self.list().await?.into_iter().map(of).collect())
    }

    /// Makes room for a new member, and says how it is to be started.
    ///
    /// # Errors
    /// If that would endanger the others, or has to wait.
    pub async fn admit(&self, name: &str, ip: IpAddr) -> anyhow::Result<Local> {
        let peer = peer_url(ip);
        let known = self.admin.members().await?;
        let same = known.iter().any(|m| m.name.is_empty() && m.peer_urls.contains(&peer));
        let judged = self.judged().await?;
        for stale in membership::may_join(&judged, name, same)? {
            tracing::info!(name, id = format!("{:x}", stale.id), "an earlier member of this name is removed");
            self.admin.remove(MemberId(stale.id)).await?;
        }
        let members = self.admin.add_learner(vec![peer.clone()]).await?.1;
        let one = |member: &admin::Member| {
            let name = if member.peer_urls.contains(&peer) { name } else { &member.name };
            member.peer_urls.iter().map(|url| format!("{name}={url}")).collect::<Vec<_>>()
        };
        let initial_cluster = members.iter().flat_map(one).collect::<Vec<_>>().join(",");
        let others = members.iter().flat_map(|m| m.client_urls.clone()).collect();
        let state = self.files.read_server()?;
        let Some(ServerState { store: StoreKind::Stacked(own), .. }) = state else { bail!("etcd is not run here") };
        Ok(Local { name: name.to_owned(), ip, initial_cluster, existing: true, token: own.token, others })
    }

    /// Waits until this machine's member votes, and asks for it again and again.
    ///
    /// # Errors
    /// If it takes too long, or the member was removed.
    pub async fn become_voter(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PROMOTION;
        let mut said = Instant::now();
        loop {
            let wait = match self.admin.members().await {
                Ok(members) => {
                    let own = members.iter().find(|m| m.name == self.name);
                    match own {
                        Some(own) if !own.learner => return Ok(()),
                        Some(own) => match self.admin.promote(own.id).await {
                            Ok(_) => continue,
                            Err(error) => error.to_string(),
                        },
                        None => "it has not started yet".to_owned(),
                    }
                }
                Err(error) => error.to_string(),
            };
            if Instant::now() > deadline {
                bail!("this machine's etcd member does not get a vote after {PROMOTION:?}: {wait}");
            }
            if said.elapsed() > Duration::from_secs(5) {
                said = Instant::now();
                tracing::info!(reason = wait, "waits until its etcd member has what the others have");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Before this machine's member stops: hands on the leadership, if it has it. Who else is there is written down: who only
    /// just joined may not be yet, and a snapshot is not restored while another member runs.
    pub async fn step_down(&self) {
        let Ok(members) = self.list().await else { return };
        if let Err(error) = self.remember(&members) {
            tracing::warn!("etcd's members were not written down: {error:#}");
        }
        let own = members.iter().find(|(m, _)| m.name == self.name);
        let Some((own, Some(status))) = own else { return };
        if status.leader != Some(own.id) {
            return;
        }
        let next = members.iter().find(|(m, s)| m.id != own.id && !m.learner && s.is_some());
        let Some((next, _)) = next else { return };
        match self.admin.move_leader(next.id).await {
            Ok(()) => tracing::info!(to = next.name, "etcd's leadership was handed on"),
            Err(error) => tracing::warn!(%error, "etcd's leadership was not handed on"),
        }
    }

    /// Keeps the list of members, here and on disk; and where this machine's member leads, does what one has to do for
    /// all: forget history, rewrite fragmented files, remove learners that stalled, look after alarms.
    pub async fn look_after(self: Arc<Self>, store: Arc<Etcd>, stop: CancellationToken) -> anyhow::Result<()> {
        let mut compaction = Compaction::default();
        let mut learners: std::collections::BTreeMap<MemberId, (u64, Instant)> = Default::default();
        let mut advised = None;
        loop {
            let mut pause = REFRESH;
            match self.list().await {
                Ok(members) => {
                    self.follow(&store, &members)?;
                    if self.cut_off_silent(&members).await {
                        pause = REFRESH / 4;
                    }
                    let own = members.iter().find(|(m, _)| m.name == self.name);
                    let leads = own.is_some_and(|(m, s)| s.as_ref().is_some_and(|s| s.leader == Some(m.id)));
                    if leads {
                        let voters = members.iter().filter(|(m, _)| !m.learner).count();
                        if advised != Some(voters) {
                            advised = Some(voters);
                            if let Some(advice) = membership::advice(voters) {
                                tracing::warn!("etcd has {advice}");
                            }
                        }
                        self.judge_learners(&members, &mut learners).await;
                        self.look_at_files(&members).await;
                        compaction.step(&*store).await;
                    } else {
                        compaction = Compaction::default();
                        learners.clear();
                        advised = None;
                    }
                }
                Err(error) => tracing::debug!(%error, "etcd's members cannot be listed"),
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return Ok(()),
            }
        }
    }

    /// Ends what is open to machines that are gone, so that etcd does not wait for them ([`cut`]). Whether somebody is silent.
    async fn cut_off_silent(&self, members: &[(admin::Member, Option<admin::Status>)]) -> bool {
        let silent = members.iter().filter(|(m, status)| m.name != self.name && status.is_none());
        let addresses: Vec<IpAddr> =
            silent.flat_map(|(m, _)| &m.peer_urls).filter_map(|url| Some(peer_address(url)?.ip())).collect();
        for ip in &addresses {
            match cut::cut(*ip, PEER_PORT).await {
                Ok(0) => {}
                Ok(count) => tracing::info!(%ip, count, "connections to a member that is gone are ended"),
                Err(error) => tracing::debug!("connections to {ip} are not ended: {error:#}"),
            }
        }
        !addresses.is_empty()
    }

    /// The store and the next start use the members that there are now.
    fn follow(&self, store: &Etcd, members: &[(admin::Member, Option<admin::Status>)]) -> anyhow::Result<()> {
        match self.remember(members)? {
            Some(local) => Ok(store.set_endpoints(local.endpoints())?),
            None => Ok(()),
        }
    }

    /// The next start uses the members that there are now. Gives what changed.
    fn remember(&self, members: &[(admin::Member, Option<admin::Status>)]) -> anyhow::Result<Option<Local>> {
        let mut others: Vec<String> =
            members.iter().filter(|(m, _)| m.name != self.name).flat_map(|(m, _)| m.client_urls.clone()).collect();
        others.sort();
        let Some(mut state) = self.files.read_server()? else { return Ok(None) };
        let StoreKind::Stacked(local) = &mut state.store else { return Ok(None) };
        // An answer without any other would leave us alone after the next start.
        if local.others == others || (others.is_empty() && members.len() != 1) {
            return Ok(None);
        }
        tracing::info!(?others, "etcd's other members");
        local.others = others;
        let local = local.clone();
        self.files.write_server(&state)?;
        Ok(Some(local))
    }

    async fn judge_learners(
        &self,
        members: &[(admin::Member, Option<admin::Status>)],
        seen: &mut std::collections::BTreeMap<MemberId, (u64, Instant)>,
    ) {
        seen.retain(|id, _| members.iter().any(|(m, _)| m.id == *id && m.learner));
        let leader = members.iter().filter_map(|(_, s)| s.as_ref()).map(|s| s.raft_index).max().unwrap_or(0);
        for (member, status) in members.iter().filter(|(m, _)| m.learner) {
            let applied = status.as_ref().map_or(0, |s| s.applied_index);
            let entry = seen.entry(member.id).or_insert((applied, Instant::now()));
            if entry.0 != applied {
                *entry = (applied, Instant::now());
            }
            let still = entry.1.elapsed();
            if judge(Progress { applied, leader, age: still, still }, STALLED) == Verdict::Remove {
                tracing::warn!(name = member.name, ?still, "a joining etcd member has stalled and is removed");
                if let Err(error) = self.admin.remove(member.id).await {
                    tracing::warn!(%error, "it was not removed");
                }
            }
        }
    }

    /// At most one file is rewritten at a time: its member answers nothing meanwhile.
    async fn look_at_files(&self, members: &[(admin::Member, Option<admin::Status>)]) {
        for (member, status) in members {
            let (Some(status), Some(url)) = (status, member.client_urls.first()) else { continue };
            let free = status.db_size.saturating_sub(status.db_in_use);
            if free > FRAGMENTED && free > status.db_size / 2 {
                tracing::info!(name = member.name, size = status.db_size, free, "etcd's file is rewritten");
                if let Err(error) = self.admin.defragment(url).await {
                    tracing::warn!(%error, name = member.name, "it was not rewritten");
                }
                return;
            }
        }
        let Ok(alarms) = self.admin.alarms().await else { return };
        for alarm in alarms {
            let room = members.iter().all(|(_, s)| s.as_ref().is_none_or(|s| s.db_size < (8 << 30) / 10 * 9));
            tracing::error!(?alarm, "etcd has an alarm and refuses writes");
            if alarm.kind == AlarmKind::NoSpace && room {
                match self.admin.disarm(alarm).await {
                    Ok(()) => tracing::info!("there is room again: the alarm is over"),
                    Err(error) => tracing::warn!(%error, "the alarm stays"),
                }
            }
        }
    }
}

/// History is kept for one to two rounds.
#[derive(Default)]
struct Compaction {
    last: Option<(Instant, Revision)>,
}

impl Compaction {
    async fn step(&mut self, store: &dyn Store) {
        match self.last {
            Some((at, _)) if at.elapsed() < COMPACT => {}
            Some((_, revision)) => {
                if let Err(error) = store.compact(revision).await {
                    tracing::warn!(%error, "the store was not compacted");
                }
                self.last = store.revision().await.ok().map(|r| (Instant::now(), r));
            }
            None => self.last = store.revision().await.ok().map(|r| (Instant::now(), r)),
        }
    }
}

/// Commands of `seawall member`.
#[derive(Subcommand)]
pub enum Command {
    /// List etcd's members, and how each of them is.
    List {
        #[command(flatten)]
        place: crate::token::Place,
    },
    /// Remove a member whose machine is lost. Refused if the others could not go on.
    Remove {
        /// Its name, or its number in hexadecimal.
        member: String,
        #[command(flatten)]
        place: crate::token::Place,
    },
    /// Remove a lost member and print the command with which a new machine takes its place.
    Replace {
        /// Its name.
        member: String,
        #[command(flatten)]
        place: crate::token::Place,
    },
}

/// Runs a command, with the keys on this server's disk: neither its process nor a majority has to be there.
///
/// # Errors
/// What went wrong, with the way out.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::List { place } => {
            let members = open(&place.data_dir).await?;
            println!(
                "{:<16} {:<24} {:<10} {:<8} {:<10} {:<10} ADDRESS",
                "MEMBER", "NAME", "STATE", "LEADER", "VERSION", "SIZE"
            );
            for (member, status) in members.list().await? {
                let state = match (&status, member.learner) {
                    (None, _) => "gone",
                    (Some(status), _) if status.leader.is_none() => "no quorum",
                    (Some(_), true) => "learner",
                    (Some(_), false) => "voter",
                };
                let leads = status.as_ref().is_some_and(|s| s.leader == Some(member.id));
                let (version, size) = match &status {
                    Some(s) => (s.version.clone(), format!("{} KiB", s.db_size / 1024)),
                    None => ("-".to_owned(), "-".to_owned()),
                };
                println!(
                    "{:<16x} {:<24} {state:<10} {:<8} {version:<10} {size:<10} {}",
                    member.id.0,
                    member.name,
                    if leads { "yes" } else { "" },
                    member.peer_urls.join(",")
                );
            }
        }
        Command::Remove { member, place } => {
            remove(&open(&place.data_dir).await?, &member).await?;
        }
        Command::Replace { member, place } => {
            let members = open(&place.data_dir).await?;
            remove(&members, &member).await?;
            println!("On the new machine, with a token of `seawall token create --role server`:");
            let server = members.files.read_server()?.and_then(|s| match s.store {
                StoreKind::Stacked(local) => Some(local.ip),
                _ => None,
            });
            let ip = server.map_or_else(|| "ADDRESS".to_owned(), |ip| ip.to_string());
            println!("  seawall server --join https://{ip}:6443 --node-name {member} --token TOKEN");
        }
    }
    Ok(())
}

async fn remove(members: &Members, name: &str) -> anyhow::Result<()> {
    let judged = members.judged().await?;
    let member = membership::may_remove(&judged, name)?;
    members.admin.remove(MemberId(member.id)).await?;
    println!("{name} is no member any more");
    Ok(())
}

async fn open(data_dir: &Path) -> anyhow::Result<Members> {
    let files = Files::new(data_dir);
    let state = files.read_server()?;
    let Some(ServerState { store: StoreKind::Stacked(local), cluster }) = state else {
        bail!("--data-dir {}: no server with an etcd member of its own has been started there", data_dir.display());
    };
    let authority = Authority::open_existing(&files.etcd_tls()).context("the authority of etcd")?;
    let client = authority.client("seawall-member", "")?;
    let tls =
        seawall_store::etcd::Tls { ca_pem: authority.pem.clone(), cert_pem: client.certificate, key_pem: client.key };
    let options = options(&local, tls, &seawall_quorum::timing::Timing::of(cluster.timing));
    Ok(Members::new(Admin::open(&options)?, &files, &local.name))
}

/// How the store of this machine's member is reached.
pub fn options(local: &Local, tls: seawall_store::etcd::Tls, timing: &seawall_quorum::timing::Timing) -> Options {
    let endpoints: Vec<Endpoint> = local.endpoints();
    Options {
        endpoints,
        tls: Some(tls),
        budget: timing.store_budget,
        attempt: timing.store_request,
        probe: timing.store_request / 2,
        ..Options::default()
    }
}

/// The certificates and the files of a first member.
///
/// # Errors
/// If they cannot be made.
pub fn certificates(files: &Files, local: &Local) -> anyhow::Result<Certificates> {
    let authority = Authority::open(&files.etcd_tls())?;
    Certificates::make(files, &authority, local)
}

/// The first member of a cluster.
pub fn first(name: &str, ip: IpAddr) -> Local {
    Local {
        name: name.to_owned(),
        ip,
        initial_cluster: format!("{name}={}", peer_url(ip)),
        existing: false,
        token: format!("seawall-{:016x}", rand::random::<u64>()),
        others: vec![client_url(ip)],
    }
}
