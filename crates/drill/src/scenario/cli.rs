//! `seawall drill`: the command line.

use std::{io::Write as _, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use tokio::time::Instant;

use super::{Scenario, Step, Traffic, all, dns, on_nodes, redis, run as scenario};
use crate::{
    lab::{LABS, Lab},
    report::Report,
};

/// Options of `seawall drill`.
#[derive(clap::Args)]
pub struct Args {
    /// The scenario, or a group of them: `servers`, `nodes`, `dns` or `state`, `all` for the first two; `list` says what there is.
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
    /// Does the same on another lab afterwards, and puts the figures side by side.
    #[arg(long, value_name = "LAB")]
    against: Option<String>,
    /// Lets clients work for so many seconds after a fault, where the scenario says how long.
    #[arg(long, value_name = "SECONDS")]
    stay: Option<f64>,
    /// Draws new connections, answered and failed, into this file (SVG). For scenarios of nodes.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs: one object a drill, one a line.
    Json,
}

fn find(name: &str) -> anyhow::Result<Vec<&'static Scenario<'static>>> {
    let of = |traffic: Traffic| all().filter(|s| s.traffic == traffic).collect();
    match name {
        // What keeps state needs more nodes than others, and a redis on the host; DNS has to be there.
        "all" => return Ok(all().filter(|s| matches!(s.traffic, Traffic::Api | Traffic::Services)).collect()),
        "servers" => return Ok(of(Traffic::Api)),
        "nodes" => return Ok(of(Traffic::Services)),
        "state" => return Ok(of(Traffic::Redis)),
        "dns" => return Ok(of(Traffic::Dns)),
        _ => {}
    }
    let names: Vec<&str> = all().map(|s| s.name).collect();
    let unknown = || {
        format!("there is no scenario {name:?}: use all, servers, nodes, dns, state, or one of {}", names.join(", "))
    };
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
    let labs: Vec<Lab> = std::iter::once(&args.lab)
        .chain(&args.against)
        .map(|name| Lab::open(name, &args.dir))
        .collect::<Result<_, _>>()?;
    let mut failed = Vec::new();
    for round in 1..=args.repeat {
        for scenario in &scenarios {
            let mut reports: Vec<(&str, Report)> = Vec::new();
            for lab in &labs {
                match one(&args, lab, scenario, round).await? {
                    Some((report, well)) => {
                        reports.push((lab.name(), report));
                        failed.extend((!well).then_some(scenario.name));
                    }
                    None => failed.push(scenario.name),
                }
            }
            if let [(first, a), (second, b)] = &reports[..]
                && args.output == Output::Text
            {
                print(&side_by_side((first, a), (second, b)));
            }
            if let Some(path) = &args.plot {
                draw(path, scenario, &reports)?;
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    let count = scenarios.len() * args.repeat as usize * labs.len();
    bail!("{} of {count} drills failed: {}", failed.len(), failed.join(", "))
}

/// One drill: its report and whether all is as it should be, or nothing if it could not be carried out.
async fn one(args: &Args, lab: &Lab, scenario: &Scenario<'_>, round: u32) -> anyhow::Result<Option<(Report, bool)>> {
    let started = Instant::now();
    eprintln!("--- {}: {} ({round} of {})", scenario.name, scenario.about, args.repeat);
    let say = |what: &str| eprintln!("{:7.2} s  {what}", started.elapsed().as_secs_f64());
    let steps = stays(scenario.steps, args.stay);
    let scenario = Scenario { steps: &steps, ..*scenario };
    let done = match scenario.traffic {
        Traffic::Api => scenario::run(lab, &scenario, &say).await,
        Traffic::Services => on_nodes::run(lab, &scenario, &say).await,
        Traffic::Dns => dns::run(lab, &scenario, &say).await,
        Traffic::Redis => redis::run(lab, &scenario, &say).await,
    };
    let report = match done {
        Ok(report) => report,
        Err(error) => {
            eprintln!("{}: {error:#}", scenario.name);
            return Ok(None);
        }
    };
    match args.output {
        Output::Text => print(&(report.text() + "\n")),
        Output::Json => print(&(serde_json::to_string(&report)? + "\n")),
    }
    let missed = report.windows.iter().any(|(name, took)| report.targets.get(name).is_some_and(|t| took > t));
    let well = report.pass && !(args.strict && missed);
    Ok(Some((report, well)))
}

/// The steps, with the longest stay as long as was asked for.
fn stays(steps: &[Step], wanted: Option<f64>) -> Vec<Step> {
    let length = |step: &Step| match step {
        Step::Stay(seconds) | Step::StarveAtTimes(_, seconds) => Some(*seconds),
        _ => None,
    };
    let longest = steps.iter().filter_map(length).fold(0.0, f64::max);
    let other = |step: &Step| match (step, wanted) {
        (Step::Stay(n), Some(wanted)) if *n >= longest => Step::Stay(wanted),
        (Step::StarveAtTimes(programs, n), Some(wanted)) if *n >= longest => Step::StarveAtTimes(*programs, wanted),
        (step, _) => *step,
    };
    steps.iter().map(other).collect()
}

/// The figures of two labs.
fn side_by_side((first, a): (&str, &Report), (second, b): (&str, &Report)) -> String {
    let names: std::collections::BTreeSet<&String> = a.windows.keys().chain(b.windows.keys()).collect();
    let width = names.iter().map(|n| n.len()).max().unwrap_or(0);
    let figure = |report: &Report, name: &String| match report.windows.get(name) {
        Some(seconds) => format!("{seconds:.3} s"),
        None => "not seen".to_owned(),
    };
    let mut text = format!("  {:width$}  {first:>14}  {second:>14}\n", a.scenario);
    for name in names {
        text += &format!("  {name:width$}  {:>14}  {:>14}\n", figure(a, name), figure(b, name));
    }
    for (kind, of) in &a.by_kind {
        let failed =
            |r: Option<&crate::report::Requests>| r.map_or(String::new(), |r| format!("{} of {}", r.failed, r.total));
        let name = format!("{kind}s that failed");
        text += &format!("  {name:width$}  {:>14}  {:>14}\n", failed(Some(of)), failed(b.by_kind.get(kind)));
    }
    text
}

fn draw(path: &std::path::Path, scenario: &Scenario<'_>, reports: &[(&str, Report)]) -> anyhow::Result<()> {
    let one = |(lab, report): &(&str, Report)| {
        let name = |series: &crate::plot::Series| match reports.len() {
            1 => series.title.clone(),
            _ => format!("{lab}: {}", series.title),
        };
        report.series.iter().map(|s| crate::plot::Series { title: name(s), ..s.clone() }).collect::<Vec<_>>()
    };
    let series: Vec<_> = reports.iter().flat_map(one).collect();
    let picture = crate::plot::svg(scenario.about, &series, 0.1, crate::report::BEFORE.as_secs_f64());
    std::fs::write(path, picture).with_context(|| format!("--plot {}", path.display()))
}

/// Writes to stdout; a reader that has gone, as `head` does, is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_longest_stay_is_another() {
        let steps = [Step::Stay(3.0), Step::Well, Step::Stay(32.0)];
        assert_eq!(stays(&steps, None), steps);
        assert_eq!(stays(&steps, Some(400.0)), [Step::Stay(3.0), Step::Well, Step::Stay(400.0)]);
        assert_eq!(stays(&[Step::StarveAtTimes(4, 120.0)], Some(400.0)), [Step::StarveAtTimes(4, 400.0)]);
    }

    #[test]
    fn scenarios_by_name() {
        let groups = ["servers", "nodes"].map(|group| find(group).unwrap().len());
        assert_eq!(find("all").unwrap().len(), groups.iter().sum::<usize>());
        assert_eq!(find("blackout").unwrap()[0].name, "blackout");
        assert_eq!(find("state").unwrap()[0].name, "redis-master-power-off");
        let said = find("blakout").unwrap_err().to_string();
        assert!(
            said.starts_with(
                "there is no scenario \"blakout\": use all, servers, nodes, dns, state, or one of power-off-etcd-leader,"
            ),
            "{said}"
        );
    }
}
