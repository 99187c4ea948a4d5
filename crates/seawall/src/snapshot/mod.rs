//! `seawall snapshot`: all objects of a cluster in a file, and back.

pub mod directory;
pub mod keeper;
mod restore;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use http::Request;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::{files::Files, kubeconfig, token::Place};
use directory::{Directory, Kept};
use keeper::{CONFIG_MAP, NAMESPACE, ON_DEMAND, PATH, Report};

/// Commands of `seawall snapshot`.
#[derive(Subcommand)]
pub enum Command {
    /// Have the server of this machine take a snapshot of all objects, and read it back.
    Save {
        /// What its name begins with.
        #[arg(long, default_value = ON_DEMAND)]
        name: String,
        #[command(flatten)]
        place: Place,
    },
    /// List the snapshots of all servers. If no server answers, those that are on this machine's disk.
    #[command(alias = "list")]
    Ls {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        local: Local,
    },
    /// Delete snapshots of this machine's server.
    Delete {
        /// Their names.
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        place: Place,
    },
    /// Delete the oldest snapshots of this machine's server.
    Prune {
        /// What their names begin with.
        #[arg(long, default_value = ON_DEMAND)]
        name: String,
        /// How many are left.
        #[arg(long, default_value_t = 5, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
        snapshot_retention: u32,
        #[command(flatten)]
        place: Place,
    },
    /// Read a snapshot back into a store that is taken away again, and compare the two. No server has to run.
    Verify {
        /// The file, or the name of one that this server has.
        file: PathBuf,
        /// Where there is room for the store [default: beside the file].
        #[arg(long, value_name = "DIRECTORY")]
        scratch_dir: Option<PathBuf>,
        #[command(flatten)]
        local: Local,
    },
    /// Begin anew with what is in a snapshot. All servers have to be stopped.
    Restore(Box<restore::Args>),
}

/// Where a server keeps its state, and its snapshots.
#[derive(clap::Args)]
pub struct Local {
    #[command(flatten)]
    place: Place,
    /// Where this server keeps its snapshots [default: snapshots in the data directory].
    #[arg(long, value_name = "DIRECTORY")]
    snapshot_dir: Option<PathBuf>,
}

impl Local {
    fn directory(&self) -> Directory {
        let default = || Files::new(&self.place.data_dir).snapshots();
        Directory::new(self.snapshot_dir.clone().unwrap_or_else(default))
    }
}

/// Runs a command.
///
/// # Errors
/// What went wrong, with the way out.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Save { name, place } => {
            let body = json!({"name": name});
            let mut answer = ask(&place.data_dir, Request::post(PATH), &body).await?;
            let kept: Kept = serde_json::from_value(answer["snapshot"].take())?;
            let report: Report = serde_json::from_value(answer["report"].take())?;
            println!(
                "{}: {} objects at revision {}, {} bytes, read back whole",
                Directory::new(report.directory).file(&kept.name).display(),
                kept.keys,
                kept.revision,
                kept.size
            );
        }
        Command::Ls { json, local } => ls(json, &local).await?,
        Command::Delete { names, place } => {
            for name in names {
                directory::check_name(&name)?;
                ask(&place.data_dir, Request::delete(format!("{PATH}/{name}")), &Value::Null).await?;
                println!("{name} is deleted");
            }
        }
        Command::Prune { name, snapshot_retention, place } => {
            let body = json!({"name": name, "retention": snapshot_retention});
            let answer = ask(&place.data_dir, Request::post(format!("{PATH}/prune")), &body).await?;
            for name in answer["deleted"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                println!("{name} is deleted");
            }
        }
        Command::Verify { file, scratch_dir, local } => verify(&file, scratch_dir, &local).await?,
        Command::Restore(args) => restore::run(*args).await?,
    }
    Ok(())
}

/// The file that is meant: by its path, or by its name among those of this server.
fn find(file: &Path, directory: &Directory) -> anyhow::Result<PathBuf> {
    let named = file.to_str().filter(|name| directory::check_name(name).is_ok()).map(|name| directory.file(name));
    match [Some(file.to_owned()), named].into_iter().flatten().find(|path| path.is_file()) {
        Some(found) => Ok(found),
        None => bail!(
            "there is no file {}, and no snapshot of that name in {}; seawall snapshot ls lists those there are",
            file.display(),
            directory.path().display()
        ),
    }
}

async fn verify(file: &Path, scratch: Option<PathBuf>, local: &Local) -> anyhow::Result<()> {
    let directory = local.directory();
    let file = find(file, &directory)?;
    let beside = || file.parent().map(Path::to_owned).unwrap_or_default();
    let scratch = scratch.unwrap_or_else(beside).join(format!(".verify-{}", std::process::id()));
    let read = file.clone();
    let info = tokio::task::spawn_blocking(move || directory::verify(&read, &scratch)).await??;
    println!(
        "{} is whole: {} objects ({} bytes) at revision {}, written at {} by {}, SHA-256 {}",
        file.display(),
        info.sum.keys,
        info.sum.bytes,
        info.header.revision,
        Timestamp::from_second(info.header.time).unwrap_or_default(),
        info.header.writer,
        info.sum.hex()
    );
    if let Some(name) = directory.name_of(&file) {
        directory.note_verified(&name, &info, Timestamp::now())?;
        // A server that runs says so at once; others do at their start.
        let _ = ask(&local.place.data_dir, Request::get(PATH), &Value::Null).await;
    }
    Ok(())
}

/// Asks the server of this machine.
async fn ask(data_dir: &Path, request: http::request::Builder, body: &Value) -> anyhow::Result<Value> {
    let admin = kubeconfig::admin(data_dir).await?;
    let body = if body.is_null() { Vec::new() } else { serde_json::to_vec(body)? };
    let request = request.header(http::header::CONTENT_TYPE, "application/json").body(body)?;
    admin.client.request(request).await.map_err(said)
}

/// What the server said, or that it said nothing.
fn said(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => anyhow::anyhow!("the server says: {}", status.message),
        error => anyhow::Error::new(error).context("the server of this machine does not answer; does it run?"),
    }
}

async fn ls(as_json: bool, local: &Local) -> anyhow::Result<()> {
    let reports = match kubeconfig::admin(&local.place.data_dir).await {
        Ok(admin) => all(&admin.client).await,
        Err(error) => Err(error),
    };
    let rows: Vec<(String, Kept)> = match reports {
        Ok(reports) => {
            let of = |(server, report): (String, Report)| {
                report.snapshots.into_iter().map(move |kept| (server.clone(), kept))
            };
            reports.into_iter().flat_map(of).collect()
        }
        Err(error) => {
            eprintln!("Of this machine's disk alone: {error:#}");
            local.directory().list()?.into_iter().map(|kept| ("-".to_owned(), kept)).collect()
        }
    };
    if as_json {
        let with = |(server, kept): &(String, Kept)| -> anyhow::Result<Value> {
            let mut value = serde_json::to_value(kept)?;
            value["server"] = json!(server);
            Ok(value)
        };
        println!("{}", serde_json::to_string_pretty(&rows.iter().map(with).collect::<anyhow::Result<Vec<_>>>()?)?);
        return Ok(());
    }
    print!("{}", table(&rows));
    Ok(())
}

/// What all servers say of themselves.
async fn all(client: &Client) -> anyhow::Result<Vec<(String, Report)>> {
    let maps = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE);
    let Some(map) = maps.get_opt(CONFIG_MAP).await.map_err(said)? else { return Ok(Vec::new()) };
    let of = |(server, text): (String, String)| {
        let report = serde_json::from_str(&text)
            .with_context(|| format!("the ConfigMap {NAMESPACE}/{CONFIG_MAP}: {server}: not what a server writes"))?;
        Ok((server, report))
    };
    map.data.unwrap_or_default().into_iter().map(of).collect()
}

fn table(rows: &[(String, Kept)]) -> String {
    let head = ["SERVER", "NAME", "TIME", "REVISION", "OBJECTS", "SIZE", "VERIFIED"].map(str::to_owned);
    let row = |(server, kept): &(String, Kept)| match &kept.fault {
        None => [
            server.clone(),
            kept.name.clone(),
            kept.time.to_string(),
            kept.revision.to_string(),
            kept.keys.to_string(),
            kept.size.to_string(),
            kept.verified.map_or_else(|| "never".to_owned(), |time| time.to_string()),
        ],
        Some(fault) => [server.as_str(), &kept.name, "-", "-", "-", "-", fault].map(str::to_owned),
    };
    let all: Vec<[String; 7]> = std::iter::once(head).chain(rows.iter().map(row)).collect();
    let width = |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..7).map(width).collect();
    let line = |row: &[String; 7]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("   ").trim_end().to_owned() + "\n"
    };
    all.iter().map(line).collect()
}
