//! logind holds a shutdown back for us, by D-Bus: a *delay inhibitor lock* while the machine is up, let go of when the pods
//! have left (<https://systemd.io/INHIBITOR_LOCKS/>). Upstream's kubelet does the same.

use std::{io, path::Path, sync::Arc, time::Duration};

use futures::{StreamExt as _, future::BoxFuture};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use zbus::{Connection, Proxy, wire::OwnedFd};

use super::{Config, Handle};

const LOGIND: (&str, &str, &str) =
    ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager");
const SYSTEMD: (&str, &str, &str) =
    ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager");
/// What the file in logind's configuration is called. Of two files the later name wins; this one is ours.
const FILE: &str = "99-seawall.conf";
/// How long logind may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How long it may take to read its configuration again.
const RELOAD: Duration = Duration::from_secs(5);
/// Between two attempts, when it was there once.
const AGAIN: Duration = Duration::from_secs(2);
/// And when it never was.
const LATER: Duration = Duration::from_secs(60);

/// What is wrong with logind.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be spoken to.
    #[error("D-Bus: {0}")]
    Bus(#[from] zbus::Error),
    /// It says nothing.
    #[error("logind does not answer")]
    Silent,
    /// Its configuration cannot be added to.
    #[error("{path}: {error}")]
    File {
        /// The file.
        path: String,
        /// Why not.
        error: io::Error,
    },
    /// It lets nobody delay a shutdown for long enough, and its configuration does not help.
    #[error(
        "logind delays a shutdown by {allowed:?} at most and {wanted:?} are needed, although {path} says so: is \
         InhibitDelayMaxSec set in a file with a later name?"
    )]
    Short {
        /// What it allows.
        allowed: Duration,
        /// What is needed.
        wanted: Duration,
        /// Our file.
        path: String,
    },
    /// It went away.
    #[error("logind went away")]
    Gone,
}

async fn connect(config: &Config) -> zbus::Result<Connection> {
    match &config.bus {
        Some(address) => zbus::connection::Builder::address(address.as_str()).build().await,
        None => Connection::system().await,
    }
}

async fn proxy(
    connection: &Connection,
    (name, path, interface): (&'static str, &'static str, &'static str),
) -> zbus::Result<Proxy<'static>> {
    zbus::proxy::Builder::new(connection)
        .destination(name)
        .path(path)
        .interface(interface)
        // What is asked for is asked anew each time.
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await
}

async fn in_time<T>(work: impl Future<Output = zbus::Result<T>>) -> Result<T, Error> {
    Ok(timeout(ANSWER, work).await.map_err(|_| Error::Silent)??)
}

/// Whether logind says that the machine goes down. Nothing if there is nobody to say so.
pub async fn is_going_down(config: &Config) -> Option<bool> {
    let asked = in_time(async {
        let connection = connect(config).await?;
        proxy(&connection, LOGIND).await?.get_property("PreparingForShutdown").await
    });
    asked.await.ok()
}

/// Holds shutdowns back until `stop`, and begins when there is one.
pub fn run(handle: Arc<Handle>, stop: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(async move {
        let kept = async {
            if !handle.is_off() {
                keep(&handle).await;
            }
        };
        stop.run_until_cancelled(Box::pin(kept)).await;
        stop.cancelled().await;
        Ok(())
    })
}

async fn keep(handle: &Handle) {
    let (mut known, mut said) = (false, false);
    loop {
        if let Err(error) = watch(handle, &mut known).await {
            // Most machines without logind never have one.
            match known || !std::mem::replace(&mut said, true) {
                true => tracing::info!("shutdowns of this machine are not held back for its pods: {error}"),
                false => tracing::debug!("still no logind: {error}"),
            }
        }
        sleep(if known { AGAIN } else { LATER }).await;
    }
}

/// One life of a connection with logind.
async fn watch(handle: &Handle, known: &mut bool) -> Result<(), Error> {
    let config = handle.config();
    let connection = in_time(connect(config)).await?;
    let logind = in_time(proxy(&connection, LOGIND)).await?;
    let mut signals = in_time(logind.receive_signal("PrepareForShutdown")).await?;
    let mut owners = in_time(logind.receive_owner_changed()).await?;
    if let Err(error) = allow(&connection, &logind, config).await {
        // The lock is of use all the same, for as long as it is respected.
        match error {
            Error::Short { .. } | Error::File { .. } => tracing::warn!("{error}"),
            error => return Err(error),
        }
    }
    let mut lock = Some(inhibit(&logind).await?);
    *known = true;
    tracing::debug!("shutdowns of this machine are held back until its pods have left");
    // It may have begun before we listened.
    if in_time(logind.get_property("PreparingForShutdown")).await? {
        leave(handle, &mut lock).await;
    }
    loop {
        tokio::select! {
            signal = signals.next() => {
                let Some(signal) = signal else { return Err(Error::Gone) };
                if signal.body().deserialize::<bool>()? {
                    leave(handle, &mut lock).await;
                } else {
                    tracing::info!("the shutdown of this machine was called off");
                    handle.cancel();
                    lock = Some(inhibit(&logind).await?);
                }
            }
            // A logind that was started again knows of no lock.
            owner = owners.next() => match owner {
                Some(Some(_)) => lock = Some(inhibit(&logind).await?),
                Some(None) => {}
                None => return Err(Error::Gone),
            },
        }
    }
}

/// Leads the pods out, then lets the machine go.
async fn leave(handle: &Handle, lock: &mut Option<OwnedFd>) {
    if lock.is_none() {
        return;
    }
    tracing::info!("logind says that this machine goes down");
    handle.begin();
    if !handle.over().await {
        tracing::warn!("not all pods have left in time; the machine goes down nevertheless");
    }
    drop(lock.take());
}

async fn inhibit(logind: &Proxy<'_>) -> Result<OwnedFd, Error> {
    let what = ("shutdown", "seawall", "Pods leave before the machine goes down", "delay");
    in_time(logind.call("Inhibit", &what)).await
}

async fn allowed(logind: &Proxy<'_>) -> Result<Duration, Error> {
    let microseconds: u64 = in_time(logind.get_property("InhibitDelayMaxUSec")).await?;
    Ok(Duration::from_micros(microseconds))
}

/// Sees to it that a shutdown may be delayed for as long as we need.
async fn allow(connection: &Connection, logind: &Proxy<'_>, config: &Config) -> Result<(), Error> {
    let wanted = config.total();
    if allowed(logind).await? >= wanted {
        return Ok(());
    }
    let path = config.logind_conf_dir.join(FILE);
    let file = |error| Error::File { path: path.display().to_string(), error };
    write(&config.logind_conf_dir, &path, wanted).map_err(file)?;
    // As `systemctl reload systemd-logind` would: it reads its configuration on SIGHUP.
    let systemd = in_time(proxy(connection, SYSTEMD)).await?;
    let reload = ("systemd-logind.service", "all", nix::sys::signal::Signal::SIGHUP as i32);
    in_time(systemd.call::<_, _, ()>("KillUnit", &reload)).await?;
    let again = async {
        while allowed(logind).await? < wanted {
            sleep(Duration::from_millis(50)).await;
        }
        Ok::<(), Error>(())
    };
    if let Ok(done) = timeout(RELOAD, again).await {
        tracing::info!("logind delays a shutdown by up to {wanted:?}, as {} says now", path.display());
        return done;
    }
    Err(Error::Short { allowed: allowed(logind).await?, wanted, path: path.display().to_string() })
}

fn write(directory: &Path, path: &Path, wanted: Duration) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    // It counts in whole seconds.
    let seconds = wanted.as_secs() + u64::from(wanted.subsec_nanos() > 0);
    std::fs::write(
        path,
        format!("# Made by seawall: pods leave before the machine goes down.\n[Login]\nInhibitDelayMaxSec={seconds}\n"),
    )
}

#[cfg(test)]
#[path = "logind_tests.rs"]
mod tests;
