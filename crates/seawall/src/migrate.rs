//! `seawall migrate`: a server that stood alone becomes one that others can join.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use seawall_quorum::timing::Timing;
use seawall_store::{
    embedded::{Embedded, Options},
    etcd::Etcd,
    migrate::{Report, migrate},
};
use tokio_util::sync::CancellationToken;

use crate::{
    etcd::{Local, members, process},
    files::{Files, ServerState, StoreKind},
    options::{Machine, MachineOptions},
};

/// Where the objects go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
    /// An etcd of which this server runs the first member.
    Etcd,
}

/// Options of `seawall migrate`.
#[derive(clap::Args)]
pub struct Args {
    /// Where the objects go.
    #[arg(long, value_enum)]
    to: Target,
    /// Where the server keeps its state.
    #[arg(long, default_value = "/var/lib/seawall")]
    data_dir: PathBuf,
    /// Where sockets and everything else is kept that ends with the machine's uptime.
    #[arg(long, default_value = "/run/seawall")]
    run_dir: PathBuf,
    /// The name of this machine's Node [default: the host name].
    #[arg(long)]
    node_name: Option<String>,
    /// The address under which other machines reach this one [default: that of the default route].
    #[arg(long)]
    node_ip: Option<std::net::IpAddr>,
}

/// Copies the objects of a stopped server into an etcd of its own.
///
/// # Errors
/// If the server runs, if there is nothing to copy, or if the copy is not complete. Nothing is lost then: the server can
/// be started as before, or this repeated.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let Target::Etcd = args.to;
    let files = Files::new(&args.data_dir);
    if let Some(state) = files.read_server()? {
        let what = match state.store {
            StoreKind::Stacked(_) => "is one of a cluster with etcd already",
            _ => "keeps its objects in an etcd already",
        };
        bail!("--data-dir {}: this server {what}", args.data_dir.display());
    }
    if !files.store().exists() {
        bail!("--data-dir {}: no server has kept objects there", args.data_dir.display());
    }
    let cluster = files.read_cluster()?.with_context(|| {
        format!("--data-dir {}: start the server once more with this version, then stop it", args.data_dir.display())
    })?;
    let machine = Machine::new(MachineOptions {
        node_name: args.node_name.clone(),
        node_ip: args.node_ip.into_iter().collect(),
        ..MachineOptions::of(&args.data_dir, &args.run_dir)
    })?;
    process::check_program()?;
    // It is locked by a server that runs.
    let from = Embedded::open(&files.store(), Options::default())?;
    let local = members::first(&machine.name, machine.ip);
    // What an attempt that was broken off left behind is of no use.
    if files.etcd_data().exists() {
        std::fs::remove_dir_all(files.etcd_data()).context("an earlier attempt cannot be taken away")?;
    }
    let timing = Timing::of(cluster.timing);
    let report = into_first_member(&files, &args.run_dir, &local, &timing, &from).await?;
    files.write_server(&ServerState { cluster, store: StoreKind::Stacked(local) })?;
    drop(from);
    let kept = args.data_dir.join("store.migrated");
    std::fs::rename(files.store(), &kept)
        .with_context(|| format!("the old files cannot be moved to {}", kept.display()))?;
    println!(
        "{} objects ({} bytes) are in etcd, and every resourceVersion from now on is larger than {} ({:.1} s). Start the \
         server as before; others join with seawall server --join. The old files are kept in {}.",
        report.keys,
        report.bytes,
        report.source,
        report.took.as_secs_f64(),
        kept.display()
    );
    Ok(())
}

/// Starts the first member of an etcd, copies everything into it, and stops it again.
///
/// # Errors
/// If it does not start, or is not complete afterwards.
pub async fn into_first_member(
    files: &Files,
    run_dir: &Path,
    local: &Local,
    timing: &Timing,
    from: &Embedded,
) -> anyhow::Result<Report> {
    let certificates = members::certificates(files, local)?;
    let settings = process::Settings::new(files, run_dir, local, &certificates, timing);
    let stop = CancellationToken::new();
    let (running, ending) = (stop.clone(), stop.clone());
    let etcd = tokio::spawn(async move { process::run(&settings, running).await });
    let copied = async {
        let mut options = members::options(local, certificates.client, timing);
        options.migrating = true;
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
        let to = loop {
            match Etcd::connect(options.clone()).await {
                Ok(to) => break to,
                Err(error) if tokio::time::Instant::now() > deadline => {
                    return Err(error)
                        .context(format!("etcd does not answer; {} says why", files.etcd_log().display()));
                }
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
            }
        };
        anyhow::Ok(migrate(from, &to).await?)
    };
    let copied = copied.await;
    ending.cancel();
    etcd.await??;
    copied
}
