//! Flags that say who may come in, beyond what is in the cluster, and what is written down of it: upstream's, with their
//! names (<https://kubernetes.io/docs/reference/command-line-tools-reference/kube-apiserver/>).

use std::{path::PathBuf, sync::Arc};

use anyhow::Context as _;
use seawall_server::{
    access::Access,
    audit::{Auditor, log, policy::Policy},
};

/// Options of access to the API.
#[derive(clap::Args)]
pub struct AccessOptions {
    #[command(flatten)]
    audit: AuditOptions,
}

/// What is written down of requests (<https://kubernetes.io/docs/tasks/debug/debug-cluster/audit/>).
#[derive(clap::Args)]
struct AuditOptions {
    /// Write down what is asked of the API, as this file says (upstream's Policy of audit.k8s.io/v1).
    #[arg(long, value_name = "FILE", requires = "audit_log_path")]
    audit_policy_file: Option<PathBuf>,
    /// The file into which it is written, one line of JSON for each event; - for the output of this process.
    #[arg(long, value_name = "FILE", requires = "audit_policy_file")]
    audit_log_path: Option<PathBuf>,
    /// How many megabytes it may have before it is put aside.
    #[arg(long, value_name = "MEGABYTES", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    audit_log_maxsize: u64,
    /// How many files that were put aside are kept; with 0, all.
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    audit_log_maxbackup: usize,
    /// How many days they are kept; with 0, for ever.
    #[arg(long, value_name = "DAYS", default_value_t = 366)]
    audit_log_maxage: u32,
}

impl AccessOptions {
    /// Reads the files.
    ///
    /// # Errors
    /// What is wrong with them; the message names the flag, the field and the value.
    pub fn resolve(&self) -> anyhow::Result<Access> {
        Ok(Access { audit: self.audit.resolve()?.map(Arc::new) })
    }
}

impl AuditOptions {
    fn resolve(&self) -> anyhow::Result<Option<Auditor>> {
        let (Some(file), Some(path)) = (&self.audit_policy_file, &self.audit_log_path) else { return Ok(None) };
        let about = || format!("--audit-policy-file {}", file.display());
        let text = std::fs::read_to_string(file).with_context(about)?;
        let policy = Policy::parse(&text).with_context(about)?;
        let options = log::Options {
            path: path.clone(),
            max_megabytes: self.audit_log_maxsize,
            max_backups: self.audit_log_maxbackup,
            max_days: self.audit_log_maxage,
        };
        let auditor = Auditor::open(policy, &options);
        auditor.map(Some).with_context(|| format!("--audit-log-path {}: it cannot be written to", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        access: AccessOptions,
    }

    /// What is said about these arguments; `DIR` stands for a directory with these files.
    fn complaint(files: &[(&str, &str)], arguments: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let arguments = arguments.replace("DIR", &dir.path().display().to_string());
        let words = std::iter::once("seawall").chain(arguments.split(' ').filter(|word| !word.is_empty()));
        match Command::try_parse_from(words) {
            Err(error) => error.to_string(),
            Ok(command) => command.access.resolve().err().map(|error| format!("{error:#}")).unwrap_or_default(),
        }
    }

    const POLICY: &str = "{apiVersion: audit.k8s.io/v1, kind: Policy, rules: [{level: Metadata}]}";

    #[test]
    fn mistakes_of_the_audit_log() {
        let check = |policy: &str, arguments: &str, expect: &[&str]| {
            let said = complaint(&[("policy", policy)], arguments);
            assert!(expect.iter().all(|part| said.contains(part)) && said.is_empty() == expect.is_empty(), "{said}");
        };
        let all = "--audit-policy-file DIR/policy --audit-log-path DIR/log";
        check(POLICY, "", &[]);
        check(POLICY, all, &[]);
        check(POLICY, "--audit-log-path -", &["--audit-policy-file <FILE>"]);
        check(POLICY, "--audit-policy-file DIR/policy", &["--audit-log-path <FILE>"]);
        check(POLICY, &format!("{all} --audit-log-maxsize 0"), &["'0' for '--audit-log-maxsize <MEGABYTES>'"]);
        check(
            POLICY,
            "--audit-policy-file DIR/none --audit-log-path -",
            &["--audit-policy-file /", "none: No such file"],
        );
        check(
            POLICY,
            "--audit-policy-file DIR/policy --audit-log-path DIR",
            &["--audit-log-path /", "cannot be written to"],
        );
        let wrong = "{apiVersion: audit.k8s.io/v1, kind: Policy, rules: [{level: Everything}]}";
        check(wrong, all, &["--audit-policy-file /", "rules[0].level: \"Everything\": no such level: write None"]);
    }
}
