//! `seawall check`: looks at a running cluster and says where one machine could still take something down, why, and what to
//! do about it. It works on any Kubernetes cluster that a kubeconfig leads to; rules about servers only speak where it
//! can see them.
//!
//! Rules are pure ([`workload`], [`cluster`], [`snapshots`]) and work on [`facts::Facts`], which are gathered before.

pub mod cluster;
pub mod facts;
pub mod services;
pub mod snapshots;
pub mod status;
pub mod workload;

use std::path::PathBuf;

use serde::Serialize;

use crate::connection::Target;
use facts::Facts;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing; may be meant so.
    Info,
    /// The loss of one machine is felt.
    Warning,
    /// The loss of one machine stops something that others depend on, or something stops by itself soon.
    Error,
}

impl Severity {
    fn name(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The name of the rule, by which it can be left out.
    pub rule: &'static str,
    /// What it is about, e.g. `Deployment default/web`.
    pub object: String,
    /// Why it is one.
    pub why: String,
    /// The command that mends it, or what to do.
    pub mend: String,
}

/// A rule: its name, and what it finds.
type Rule = (&'static str, fn(&Facts) -> Vec<Finding>);

/// All rules, in the order of the report.
pub const RULES: &[Rule] = &[
    (cluster::SERVERS, cluster::servers),
    (cluster::TIMES, cluster::times),
    (cluster::ENTRY, cluster::entry),
    (cluster::BALANCERS, cluster::balancers),
    (cluster::CERTIFICATES, cluster::certificates),
    (cluster::NODES, cluster::nodes),
    (cluster::DNS, cluster::dns),
    (snapshots::SNAPSHOTS, snapshots::snapshots),
    (snapshots::VERIFIED, snapshots::verified),
    (snapshots::SPREAD, snapshots::spread),
    (workload::REPLICAS, workload::replicas),
    (workload::SPREAD, workload::spread),
    (workload::BUDGET, workload::budget),
    (workload::BLOCKED, workload::blocked),
    (workload::PROBE, workload::probe),
    (workload::LOCAL, workload::local),
    (workload::TOLERATION, workload::toleration),
    (services::BALANCER, services::balancer),
];

/// What all rules find, but for those left out; the worst first.
pub fn findings(facts: &Facts, skip: &[String]) -> Vec<Finding> {
    let rules = RULES.iter().filter(|(name, _)| !skip.iter().any(|skipped| skipped == name));
    let mut found: Vec<Finding> = rules.flat_map(|(_, rule)| rule(facts)).collect();
    found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    found
}

/// Options of `seawall check`.
#[derive(clap::Args)]
pub struct Args {
    /// The kubeconfig of the cluster.
    #[arg(long, env = "KUBECONFIG", default_value = "/var/lib/seawall/admin.kubeconfig")]
    kubeconfig: PathBuf,
    /// Look at this namespace alone, and not at what belongs to the cluster.
    #[arg(long, short)]
    namespace: Option<String>,
    /// The name under which clients reach the API from outside, if it is not the kubeconfig's.
    #[arg(long, value_name = "HOST")]
    entry: Option<String>,
    /// Rules to leave out. May be repeated.
    #[arg(long, value_delimiter = ',', value_name = "RULE")]
    skip: Vec<String>,
    /// End with exit code 3 if something is at least as bad as this.
    #[arg(long, value_enum, default_value_t = Severity::Warning, value_name = "SEVERITY")]
    fail_on: Severity,
    /// Print JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// Runs it. `false` if something was found that is as bad as `--fail-on` says.
///
/// # Errors
/// If the cluster cannot be asked, or a rule to leave out does not exist.
pub async fn run(args: Args) -> anyhow::Result<bool> {
    if let Some(unknown) = args.skip.iter().find(|name| !RULES.iter().any(|(rule, _)| rule == name)) {
        let known: Vec<&str> = RULES.iter().map(|(name, _)| *name).collect();
        anyhow::bail!("--skip {unknown}: there is no such rule; there are {}", known.join(", "));
    }
    let target = Target::from_kubeconfig(&args.kubeconfig)?;
    let facts = Facts::gather(&target, args.namespace.as_deref(), args.entry.as_deref()).await?;
    let found = findings(&facts, &args.skip);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        print!("{}", text(&found));
    }
    Ok(found.iter().all(|finding| finding.severity < args.fail_on))
}

/// The findings for people.
pub fn text(found: &[Finding]) -> String {
    let mut out = String::new();
    for finding in found {
        out += &format!("{:<8}{} ({})\n", finding.severity.name(), finding.object, finding.rule);
        out += &format!("        {}\n        -> {}\n", finding.why, finding.mend);
    }
    let count = |severity| found.iter().filter(|finding| finding.severity == severity).count();
    out += &match found.is_empty() {
        true => "Nothing was found: the loss of any one machine should not be felt.\n".to_owned(),
        false => format!(
            "{} errors, {} warnings, {} to know\n",
            count(Severity::Error),
            count(Severity::Warning),
            count(Severity::Info)
        ),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report() {
        let finding = |severity, rule| Finding {
            severity,
            rule,
            object: "Deployment a/b".into(),
            why: "It has one replica.".into(),
            mend: "kubectl scale".into(),
        };
        let found = [finding(Severity::Error, "x"), finding(Severity::Info, "y")];
        assert_eq!(
            text(&found),
            "error   Deployment a/b (x)\n        It has one replica.\n        -> kubectl scale\n\
             info    Deployment a/b (y)\n        It has one replica.\n        -> kubectl scale\n\
             1 errors, 0 warnings, 1 to know\n"
        );
        assert!(text(&[]).starts_with("Nothing was found"));
    }
}
