//! What was on this machine before the agent came, so that what it leaves behind can go with it, and nothing else.
//!
//! The programs that the agent drives make tables of nftables (iptables) and directories (containerd's shims, CNI
//! plugins) that they never take away.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use serde::{Deserialize, Serialize};

use crate::NodeConfig;

/// The tables that iptables makes for CNI plugins.
const TABLES: [&str; 2] = ["ip nat", "ip6 nat"];

/// What the agent's programs make outside of its own directories, and what we make above those; the deepest first.
fn directories(config: &NodeConfig) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = ["/var/lib/cni/results", "/var/lib/cni/cache", "/var/lib/cni/networks", "/var/lib/cni"]
        .iter()
        .chain(&["/run/containerd/runc/k8s.io", "/run/containerd/runc", "/run/containerd/s", "/run/containerd"])
        .chain(&["/run/netns", "/var/log/pods"])
        .map(PathBuf::from)
        .collect();
    all.push(config.device_plugins.clone());
    for ours in [&config.data_dir, &config.run_dir, &config.log_dir, &config.device_plugins] {
        all.extend(ours.ancestors().skip(1).filter(|p| p.components().count() > 1).map(Path::to_owned));
    }
    all.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    all.dedup();
    all
}

/// What there was.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Before {
    /// Which boot `tables` were seen in: the next one begins without any.
    boot: String,
    /// The tables of nftables.
    tables: Vec<String>,
    /// The directories of ours that were not there.
    absent: Vec<PathBuf>,
}

fn file(config: &NodeConfig) -> PathBuf {
    config.data_dir.join("before.json")
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn tables() -> Vec<String> {
    let output = Command::new("nft").args(["list", "tables"]).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().filter_map(|l| l.strip_prefix("table ")).map(|t| t.trim().to_owned()).collect()
}

/// Writes down what is there, once, before anything is made. `directories` too: what is missing now is ours later.
pub fn note(config: &NodeConfig) -> io::Result<()> {
    let path = file(config);
    let old: Option<Before> = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let boot = boot();
    if old.as_ref().is_some_and(|old| old.boot == boot) {
        return Ok(());
    }
    let absent = match old {
        Some(old) => old.absent,
        None => directories(config).into_iter().filter(|d| !d.exists()).collect(),
    };
    fs::create_dir_all(&config.data_dir)?;
    fs::write(path, serde_json::to_vec(&Before { boot, tables: tables(), absent })?)
}

/// What is to be taken away when everything else is gone. To be read before the agent's directories go.
#[derive(Debug, Default)]
pub struct Traces(Option<Before>);

impl Traces {
    /// Reads what [`note`] has written; without that, nothing counts as ours.
    pub fn read(config: &NodeConfig) -> Traces {
        Traces(fs::read(file(config)).ok().and_then(|text| serde_json::from_slice(&text).ok()))
    }

    /// Removes the tables that were not there before and hold no rule, and the directories that are empty.
    pub fn remove(self) {
        let Some(before) = self.0 else { return };
        if before.boot == boot() {
            for table in TABLES.iter().filter(|t| !before.tables.iter().any(|b| b == *t)) {
                remove_table(table);
            }
        }
        for directory in before.absent {
            // Fails while there is something in it, which then is not ours.
            let _ = fs::remove_dir(directory);
        }
    }
}

fn remove_table(table: &str) {
    let words: Vec<&str> = table.split(' ').collect();
    let Ok(output) = Command::new("nft").args(["list", "table"]).args(&words).output() else { return };
    let listing = String::from_utf8_lossy(&output.stdout);
    if output.status.success() && has_no_rules(&listing) {
        let done = Command::new("nft").args(["delete", "table"]).args(&words).output();
        if !done.is_ok_and(|o| o.status.success()) {
            tracing::warn!(table, "the empty table of nftables was not removed");
        }
    }
}

/// Whether a table, as `nft list table` shows it, consists of base chains that accept everything, or of nothing.
fn has_no_rules(listing: &str) -> bool {
    listing.lines().map(str::trim).all(|line| {
        let base = line.starts_with("type ") && line.ends_with("policy accept;");
        line.is_empty() || line == "}" || line.ends_with('{') || line.starts_with('#') || base
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tables_without_rules_go() {
        let check = |listing: &str, expect| assert_eq!(has_no_rules(listing), expect, "{listing}");
        check("table ip nat {\n}\n", true);
        let base = "table ip nat {\n\tchain POSTROUTING {\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n\t}\n}\n";
        check(base, true);
        check(&base.replace("policy accept;", "policy drop;"), false);
        check("table ip nat {\n\tchain X {\n\t\tip daddr 10.0.0.1 accept\n\t}\n}\n", false);
        check("table ip nat {\n\tchain X {\n\t\tcounter packets 0 bytes 0 masquerade\n\t}\n}\n", false);
    }

    #[test]
    fn what_was_there_stays() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mut config = NodeConfig::for_tests();
        (config.data_dir, config.run_dir) = (at("mine/agent"), at("theirs/run"));
        config.log_dir = at("used/logs");
        fs::create_dir_all(at("theirs")).unwrap();
        note(&config).unwrap();
        for made in [&config.data_dir, &config.run_dir, &config.log_dir] {
            fs::create_dir_all(made).unwrap();
        }
        // A second start changes nothing.
        note(&config).unwrap();
        let traces = Traces::read(&config);
        for gone in [&config.data_dir, &config.run_dir, &config.log_dir] {
            fs::remove_dir_all(gone).unwrap();
        }
        fs::write(at("used/file"), "a user's").unwrap();
        traces.remove();
        assert!(!at("mine").exists(), "we made it");
        assert!(at("theirs").exists(), "it was there before");
        assert!(at("used/file").exists(), "it is not empty");
    }
}
