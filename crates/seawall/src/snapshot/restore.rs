//! `seawall snapshot restore`: a stopped server begins anew with what is in a snapshot. What it had is moved aside.

use std::{
    fs::{self, File},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use seawall_quorum::timing::Timing;
use seawall_store::{
    Expect, ListOptions, Revision, Store,
    embedded::{Embedded, OpenError, Options},
    etcd::{Etcd, MIGRATION_KEY, OFFSET_KEY},
    migrate::migrate,
    snapshot::{self, About, Info},
};

use super::directory::{Directory, Restored};
use crate::{
    VERSION,
    etcd::{self, CLIENT_PORT, Local, members, process},
    files::{Files, ServerState, StoreKind},
    migrate::into_first_member,
};

/// What is copied.
const PREFIX: &str = "/registry/";
/// How long another server's etcd has to take a connection, if it runs.
const CONNECT: Duration = Duration::from_secs(1);

/// Options of `seawall snapshot restore`.
#[derive(clap::Args)]
pub struct Args {
    /// The file of a snapshot, or the name of one that this server has.
    file: PathBuf,
    /// Where the server keeps its state.
    #[arg(long, default_value = "/var/lib/seawall")]
    data_dir: PathBuf,
    /// Where sockets and everything else is kept that ends with the machine's uptime.
    #[arg(long, default_value = "/run/seawall")]
    run_dir: PathBuf,
    /// Where this server keeps its snapshots [default: snapshots in the data directory].
    #[arg(long, value_name = "DIRECTORY")]
    snapshot_dir: Option<PathBuf>,
    /// Restore although there are objects. They are moved aside: where to is told.
    #[arg(long)]
    force: bool,
    /// How far above the newest revision in the snapshot the store goes on. It has to be more than was written since.
    #[arg(long, value_name = "NUMBER", default_value_t = 1_000_000_000)]
    bump_revision: u64,
    /// Restore into that etcd instead of where the server last kept its objects.
    #[command(flatten)]
    etcd: etcd::ExternalOptions,
}

/// What is restored, and how.
struct Plan<'a> {
    args: &'a Args,
    files: Files,
    directory: Directory,
    file: PathBuf,
    info: Info,
    now: Timestamp,
}

/// Restores.
///
/// # Errors
/// If the file is not whole, if something runs that uses the objects, or if there are some and nobody said `--force`. Then
/// everything is as it was.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let files = Files::new(&args.data_dir);
    let directory = Directory::new(args.snapshot_dir.clone().unwrap_or_else(|| files.snapshots()));
    let file = super::find(&args.file, &directory)?;
    let info = snapshot::peek(&file)?;
    let state = files.read_server()?;
    let timing = Timing::of(state.as_ref().map(|state| state.cluster.timing).unwrap_or_default());
    fs::create_dir_all(&args.data_dir).with_context(|| format!("--data-dir {}", args.data_dir.display()))?;
    let plan = Plan { args: &args, files, directory, file, info, now: Timestamp::now() };
    let store =
        args.etcd.get().or_else(|| state.as_ref().map(|state| state.store.clone())).unwrap_or(StoreKind::Embedded);
    let (floor, kept) = match (store, state) {
        (StoreKind::Stacked(local), Some(state)) => plan.to_own_etcd(&state, &local, &timing).await?,
        (StoreKind::External { servers, files }, _) => plan.to_external(&servers, files.as_ref(), &timing).await?,
        _ => plan.to_files().await?,
    };
    let Plan { info, .. } = &plan;
    println!(
        "{} objects ({} bytes) are in place as they were at {} (revision {}), and every resourceVersion from now on is \
         larger than {floor}.",
        info.sum.keys,
        info.sum.bytes,
        Timestamp::from_second(info.header.time).unwrap_or_default(),
        info.header.revision,
    );
    if let Some(kept) = kept {
        println!("What was there before is kept in {}.", kept.display());
    }
    println!(
        "Start the server as before. Secrets that were encrypted still are: it needs the same --encryption-provider-config."
    );
    Ok(())
}

impl Plan<'_> {
    /// Where the store goes on: above the snapshot, above what is there, and above where an earlier restoration has begun.
    fn floor(&self, newest: Revision) -> anyhow::Result<Revision> {
        let earlier = self.directory.restored()?.map_or(0, |restored| restored.floor);
        let base = self.info.header.revision.0.max(newest.0).max(earlier);
        let floor = base.checked_add(self.args.bump_revision).filter(|floor| i64::try_from(*floor).is_ok());
        floor
            .map(Revision)
            .with_context(|| format!("--bump-revision {}: no revision is so large", self.args.bump_revision))
    }

    /// Refuses, unless somebody insists.
    fn refuse_unless_forced(&self, what: &str, aside: &Path) -> anyhow::Result<()> {
        if self.args.force {
            return Ok(());
        }
        bail!("{what}; with --force they are moved to {}, and the snapshot takes their place", aside.display())
    }

    /// Takes note, so that `seawall check` knows that this snapshot is good for something, and the next restoration where this one
    /// went on.
    fn note(&self, floor: Revision) -> anyhow::Result<()> {
        let own = self.directory.name_of(&self.file);
        if let Some(name) = &own {
            self.directory.note_verified(name, &self.info, self.now)?;
        }
        let name = own.unwrap_or_else(|| self.file.display().to_string());
        let revision = self.info.header.revision.0;
        self.directory.note_restored(&Restored { name, revision, time: self.now, floor: floor.0 })
    }

    /// A store of its own, made of the snapshot.
    async fn load(&self, dir: &Path, floor: Revision) -> anyhow::Result<Embedded> {
        if dir.exists() {
            fs::remove_dir_all(dir).with_context(|| format!("{}: what an earlier attempt left", dir.display()))?;
        }
        let (file, dir) = (self.file.clone(), dir.to_owned());
        let (store, info) = tokio::task::spawn_blocking(move || snapshot::load(&file, &dir, floor)).await??;
        anyhow::ensure!(info == self.info, "{} changed while it was read", self.file.display());
        Ok(store)
    }

    fn aside(&self, what: &str) -> PathBuf {
        self.args.data_dir.join(format!("{what}.before-restore-{}", self.now.as_second()))
    }

    /// Into the files of a server that stands alone.
    async fn to_files(&self) -> anyhow::Result<(Revision, Option<PathBuf>)> {
        let (store, aside) = (self.files.store(), self.aside("store"));
        let mut old = None;
        let mut newest = Revision(0);
        let mut objects = false;
        if store.exists() {
            // It is locked by a server that runs.
            match Embedded::open(&store, Options::default()) {
                Ok(opened) => {
                    newest = opened.revision().await?;
                    objects = !opened.list(PREFIX, first()).await?.entries.is_empty();
                    old = Some(opened);
                }
                Err(error @ OpenError::Locked { .. }) => return Err(error.into()),
                Err(error) => {
                    println!("What is there cannot be read, so it is not known how far its revisions went: {error}");
                    objects = true;
                }
            }
        }
        if objects {
            self.refuse_unless_forced(&format!("--data-dir {}: it has objects", self.args.data_dir.display()), &aside)?;
        }
        let floor = self.floor(newest)?;
        let new = self.args.data_dir.join("store.restoring");
        drop(self.load(&new, floor).await?);
        self.note(floor)?;
        let kept = match store.exists() {
            true => {
                exchange(&new, &store)?;
                match objects {
                    true => fs::rename(&new, &aside).with_context(|| aside.display().to_string())?,
                    false => fs::remove_dir_all(&new).with_context(|| new.display().to_string())?,
                }
                objects.then_some(aside)
            }
            false => {
                fs::rename(&new, &store).with_context(|| store.display().to_string())?;
                None
            }
        };
        drop(old);
        File::open(&self.args.data_dir)?.sync_all()?;
        Ok((floor, kept))
    }

    /// Into a new etcd of one member, which others join again.
    async fn to_own_etcd(
        &self,
        state: &ServerState,
        local: &Local,
        timing: &Timing,
    ) -> anyhow::Result<(Revision, Option<PathBuf>)> {
        process::check_program()?;
        let own = SocketAddr::new(local.ip, CLIENT_PORT);
        let loopback = SocketAddr::from(([127, 0, 0, 1], CLIENT_PORT));
        if takes_connections(loopback).await || takes_connections(own).await {
            bail!("etcd runs on this machine: stop the server, which stops it too");
        }
        for url in &local.others {
            let address = url.strip_prefix("https://").and_then(|rest| rest.parse::<SocketAddr>().ok());
            if let Some(address) = address.filter(|address| *address != own)
                && takes_connections(address).await
            {
                bail!(
                    "the server at {} still runs, with the objects that are to be replaced: stop all servers first",
                    address.ip()
                );
            }
        }
        let (data, aside) = (self.files.etcd_data(), self.aside("etcd"));
        let there = data.exists();
        if there {
            self.refuse_unless_forced(&format!("{} has objects", data.display()), &aside)?;
        }
        let floor = self.floor(Revision(0))?;
        let scratch = self.args.data_dir.join("store.restoring");
        let from = self.load(&scratch, floor).await?;
        self.note(floor)?;
        if there {
            fs::rename(&data, &aside).with_context(|| aside.display().to_string())?;
        }
        let first = members::first(&local.name, local.ip);
        let copied = into_first_member(&self.files, &self.args.run_dir, &first, timing, &from).await;
        if let Err(error) = copied {
            // As it was.
            let _ = fs::remove_dir_all(&data);
            if there {
                fs::rename(&aside, &data).with_context(|| format!("what was there is in {}", aside.display()))?;
            }
            return Err(error);
        }
        self.files.write_server(&ServerState { cluster: state.cluster.clone(), store: StoreKind::Stacked(first) })?;
        drop(from);
        let _ = fs::remove_dir_all(&scratch);
        println!(
            "This server's etcd has one member. On every other server: empty its --data-dir, and let it join with seawall \
             server --join https://{}:6443 and a token of seawall token create --role server.",
            local.ip
        );
        Ok((floor, there.then_some(aside)))
    }

    /// Into an etcd that others run.
    async fn to_external(
        &self,
        servers: &[String],
        files: Option<&[PathBuf; 3]>,
        timing: &Timing,
    ) -> anyhow::Result<(Revision, Option<PathBuf>)> {
        let options = etcd::external_options(servers, files, timing)?;
        // One that was broken off is no obstacle.
        let options = seawall_store::etcd::Options { migrating: true, ..options };
        let mut to = Etcd::connect(options.clone()).await.context("--etcd-servers")?;
        let unfinished = to.get(MIGRATION_KEY).await?.0.is_some();
        let there = !to.list(PREFIX, first()).await?.entries.is_empty() || to.get(OFFSET_KEY).await?.0.is_some();
        let mut floor = self.floor(Revision(0))?;
        let mut kept = None;
        if there && !unfinished {
            let aside = self.directory.file(&format!("before-restore-{}", self.now.as_second()));
            self.refuse_unless_forced(&format!("--etcd-servers {}: it has objects", servers.join(",")), &aside)?;
            quiet(&to, timing).await?;
            self.directory.make()?;
            let about = About { cluster: None, time: self.now.as_second(), writer: VERSION.to_owned() };
            let before = snapshot::save(&to, &aside, &about).await?;
            floor = self.floor(before.header.revision)?;
            kept = Some(aside);
        }
        let scratch = self.args.data_dir.join("store.restoring");
        let from = self.load(&scratch, floor).await?;
        self.note(floor)?;
        if there && !unfinished {
            // From here on no server uses it until everything is in place, and who connected before finds out.
            to.put(MIGRATION_KEY, "a snapshot is restored".into(), Expect::Absent, None).await?;
        }
        if to.get(OFFSET_KEY).await?.0.is_some() {
            to.delete(OFFSET_KEY, Expect::Any, None).await?;
            to = Etcd::connect(options).await?;
        }
        migrate(&from, &to).await?;
        drop(from);
        let _ = fs::remove_dir_all(&scratch);
        Ok((floor, kept))
    }
}

fn first() -> ListOptions {
    ListOptions { limit: 1, ..ListOptions::default() }
}

/// Waits for longer than a server that lives would be silent.
async fn quiet(store: &dyn Store, timing: &Timing) -> anyhow::Result<()> {
    let before = store.revision().await?;
    tokio::time::sleep((timing.server_renew * 4).max(Duration::from_secs(3))).await;
    if store.revision().await? != before {
        bail!("something writes to this etcd: stop all servers first");
    }
    Ok(())
}

async fn takes_connections(address: SocketAddr) -> bool {
    let ip: IpAddr = address.ip();
    let connected = tokio::time::timeout(CONNECT, tokio::net::TcpStream::connect((ip, address.port()))).await;
    matches!(connected, Ok(Ok(_)))
}

/// Exchanges two directories at once, so that there is never a moment without either. Where the file system cannot, one after
/// the other.
fn exchange(new: &Path, old: &Path) -> anyhow::Result<()> {
    match renameat2(AT_FDCWD, new, AT_FDCWD, old, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOSYS) => {
            let between = old.with_added_extension("between");
            fs::rename(old, &between).and_then(|()| fs::rename(new, old)).and_then(|()| fs::rename(&between, new))
        }
        Err(error) => Err(error.into()),
    }
    .with_context(|| format!("{} and {} cannot be exchanged", new.display(), old.display()))
}
