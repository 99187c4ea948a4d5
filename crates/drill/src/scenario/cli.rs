//! `seawall drill`: the command line.

use std::{io::Write as _, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use tokio::time::Instant;

use super::{Scenario, Traffic, all, on_nodes, run as scenario};
use crate::{
    lab::{LABS, Lab},
    report::Report,
};

/// Options of `seawall drill`.
#[derive(clap::Args)]
pub struct Args {
    /// The scenario; `all` for all of them, `servers` or `nodes` for those, `list` to say what there is.
    scenario: String,
    /// The lab.
    #[arg(long, env = "SEAWALL_LAB", default_value = "seawall")]
    lab: String,
    /// Where labs are kept.
    #[arg(long, env = "SEAWALL_LAB_DIR", default_value = LABS)]
    dir: PathBuf,
    /// How to report.
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// How often.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    /// Missing a target fails the drill as well.
    #[arg(long)]
    strict: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs: one object a drill, one a line.
    Json,
}

fn find(name: &str) -> anyhow::Result<Vec<&'static Scenario>> {
    let of = |traffic: Traffic| all().filter(|s| s.traffic == traffic).collect();
    match name {
        "all" => return Ok(all().collect()),
        "servers" => return Ok(of(Traffic::Api)),
        "nodes" => return Ok(of(Traffic::Services)),
        _ => {}
    }
    let names: Vec<&str> = all().map(|s| s.name).collect();
    let unknown = || format!("there is no scenario {name:?}: use all, servers, nodes, or one of {}", names.join(", "));
    Ok(vec![all().find(|s| s.name == name).with_context(unknown)?])
}

/// Runs `seawall drill`.
pub fn run(args: Args) -> futures::future::LocalBoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(args))
}

async fn work(args: Args) -> anyhow::Result<()> {
    if args.scenario == "list" {
        let width = all().map(|s| s.name.len()).max().unwrap_or(0);
        for scenario in all() {
            print(&format!("{:width$}  {}\n", scenario.name, scenario.about));
        }
        return Ok(());
    }
    let scenarios = find(&args.scenario)?;
    let lab = Lab::open(&args.lab, &args.dir)?;
    let mut failed = Vec::new();
    for round in 1..=args.repeat {
        for scenario in &scenarios {
            let started = Instant::now();
            eprintln!("--- {}: {} ({round} of {})", scenario.name, scenario.about, args.repeat);
            let say = |what: &str| eprintln!("{:7.2} s  {what}", started.elapsed().as_secs_f64());
            let report = match carry_out(&lab, scenario, &say).await {
                Ok(report) => report,
                Err(error) => {
                    eprintln!("{}: {error:#}", scenario.name);
                    failed.push(scenario.name);
                    continue;
                }
            };
            match args.output {
                Output::Text => print(&(report.text() + "\n")),
                Output::Json => print(&(serde_json::to_string(&report)? + "\n")),
            }
            let missed = report.windows.iter().any(|(name, took)| report.targets.get(name).is_some_and(|t| took > t));
            if !report.pass || (args.strict && missed) {
                failed.push(scenario.name);
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    bail!("{} of {} drills failed: {}", failed.len(), scenarios.len() * args.repeat as usize, failed.join(", "))
}

async fn carry_out(lab: &Lab, scenario: &Scenario, say: scenario::Say<'_>) -> anyhow::Result<Report> {
    match scenario.traffic {
        Traffic::Api => scenario::run(lab, scenario, say).await,
        Traffic::Services => on_nodes::run(lab, scenario, say).await,
    }
}

/// Writes to stdout; a reader that has gone, as `head` does, is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenarios_by_name() {
        assert_eq!(find("all").unwrap().len(), find("servers").unwrap().len() + find("nodes").unwrap().len());
        assert_eq!(find("blackout").unwrap()[0].name, "blackout");
        let said = find("blakout").unwrap_err().to_string();
        assert!(
            said.starts_with(
                "there is no scenario \"blakout\": use all, servers, nodes, or one of power-off-etcd-leader,"
            ),
            "{said}"
        );
    }
}
