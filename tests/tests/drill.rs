//! Drills on a lab: a server dies while clients are at work, and what must hold is found to hold.

use std::{path::Path, process::Stdio};

use seawall_tests::seawall;
use serde_json::Value;

fn run(labs: &Path, args: &[&str]) -> (bool, String, String) {
    let mut command = std::process::Command::new(seawall());
    command.args(["--log", "error"]).args(args).env("SEAWALL_LAB_DIR", labs).env("SEAWALL_LAB", "drilled");
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

struct Down<'a>(&'a Path);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        let (success, _, stderr) = run(self.0, &["lab", "down"]);
        assert!(success || std::thread::panicking(), "{stderr}");
    }
}

#[test]
fn a_node_dies_and_its_services_answer() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes machines: run it as root");
    let dir = tempfile::Builder::new().prefix("seawall-drill-test-").tempdir_in("/var/lib").unwrap();
    let labs = dir.path().join("labs");
    let _down = Down(&labs);
    let (success, _, stderr) = run(&labs, &["lab", "up", "--servers", "1", "--agents", "2"]);
    assert!(success, "{stderr}");
    let picture = dir.path().join("plot.svg");
    let plot = picture.to_str().unwrap();
    let (success, stdout, stderr) = run(&labs, &["drill", "node-power-off", "--output", "json", "--plot", plot]);
    assert!(success, "{stdout}\n{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let invariants = report["invariants"].as_object().unwrap();
    assert!(invariants.len() >= 6 && invariants.values().all(|holds| *holds == true), "{invariants:?}");
    for window in ["not ready, a2", "web replaced", "stateful replaced", "open connections hang, host a1, relay"] {
        assert!(report["windows"][window].as_f64().is_some_and(|s| s < 60.0), "{window}: {}", report["windows"]);
    }
    assert!(std::fs::read_to_string(&picture).unwrap().contains("pod on a1, relay"));
}

#[test]
fn a_redis_goes_on_without_its_masters_machine() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes machines: run it as root");
    let dir = tempfile::Builder::new().prefix("seawall-drill-test-").tempdir_in("/var/lib").unwrap();
    let labs = dir.path().join("labs");
    let _down = Down(&labs);
    let (success, _, stderr) = run(&labs, &["lab", "up", "--servers", "1", "--agents", "3"]);
    assert!(success, "{stderr}");
    let (success, stdout, stderr) = run(&labs, &["drill", "redis-master-power-off", "--output", "json"]);
    assert!(success, "{stdout}\n{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let invariants = report["invariants"].as_object().unwrap();
    assert!(invariants.len() >= 4 && invariants.values().all(|holds| *holds == true), "{invariants:?}");
    // It was written, and for a while it could not be.
    let writes = &report["by_kind"]["write"];
    assert!(writes["total"].as_u64() > writes["failed"].as_u64() && writes["failed"].as_u64() > Some(0), "{writes}");
    assert!(report["windows"]["writes stop"].as_f64().is_some_and(|s| (0.5..30.0).contains(&s)), "{report}");
}

#[test]
fn every_node_is_rebooted_and_the_server_dies_and_nobody_notices() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes machines: run it as root");
    let dir = tempfile::Builder::new().prefix("seawall-drill-test-").tempdir_in("/var/lib").unwrap();
    let labs = dir.path().join("labs");
    let _down = Down(&labs);
    let (success, _, stderr) = run(&labs, &["lab", "up", "--servers", "1", "--agents", "2"]);
    assert!(success, "{stderr}");
    let (success, stdout, stderr) = run(&labs, &["drill", "reboot-all", "--output", "json"]);
    assert!(success, "{stdout}\n{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let invariants = report["invariants"].as_object().unwrap();
    assert_eq!(invariants["no request failed"], true, "{invariants:?}");
    assert!(invariants.values().all(|holds| *holds == true), "{invariants:?}");
    assert!(report["requests"]["total"].as_u64() > Some(1000), "{}", report["requests"]);

    // Names are found all the while.
    let (success, stdout, stderr) = run(&labs, &["drill", "dns-blackout", "--output", "json"]);
    assert!(success, "{stdout}\n{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["invariants"]["no question was lost"], true, "{report}");
    assert!(report["requests"]["total"].as_u64() > Some(200), "{}", report["requests"]);
}

#[test]
fn servers_die_and_what_must_hold_holds() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes machines: run it as root");
    let dir = tempfile::Builder::new().prefix("seawall-drill-test-").tempdir_in("/var/lib").unwrap();
    let labs = dir.path().join("labs");
    let (success, _, stderr) = run(&labs, &["drill", "blackout"]);
    assert!(!success && stderr.contains("there is no lab \"drilled\""), "{stderr}");
    let _down = Down(&labs);
    let (success, _, stderr) = run(&labs, &["lab", "up", "--servers", "3", "--agents", "1"]);
    assert!(success, "{stderr}");
    let (success, _, stderr) = run(&labs, &["drill", "blakout"]);
    assert!(
        !success
            && stderr.contains("there is no scenario \"blakout\": use all, servers, nodes, dns, state, or one of "),
        "{stderr}"
    );
    let (success, _, stderr) = run(&labs, &["drill", "dns-blackout"]);
    assert!(!success && stderr.contains("lab drilled has 1 agents: this drill needs two"), "{stderr}");
    let kubeconfig = labs.join("drilled/kubeconfig");
    let (success, stdout, stderr) = run(&labs, &["status", "--json", "--kubeconfig", kubeconfig.to_str().unwrap()]);
    let status: Value = serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"));
    let servers = status["servers"].as_array().unwrap();
    assert!(success && servers.len() == 3 && servers.iter().all(|server| server["answers"] == true), "{status:#}");
    let leads = |what: &str| servers.iter().filter(|s| s["leads"].as_array().unwrap().contains(&what.into())).count();
    assert_eq!(
        (leads("controllers"), leads("scheduler"), status["nodes"].as_array().unwrap().len()),
        (1, 1, 4),
        "{status:#}"
    );
    for scenario in ["power-off-etcd-leader", "kill-server"] {
        let (success, stdout, stderr) = run(&labs, &["drill", scenario, "--output", "json"]);
        assert!(success, "{stdout}\n{stderr}");
        let report: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!((&report["scenario"], &report["pass"]), (&scenario.into(), &true.into()));
        let invariants = report["invariants"].as_object().unwrap();
        assert!(invariants.len() >= 7 && invariants.values().all(|holds| *holds == true), "{invariants:?}");
        for window in
            ["read, a1 by its balancer", "write, outside", "watch, a1 by its balancer", "controllers", "scheduler"]
        {
            assert!(report["windows"][window].as_f64().is_some_and(|s| s < 30.0), "{window}: {}", report["windows"]);
        }
        assert_eq!(report["by_kind"]["workload"]["failed"], 0);
        assert!(report["requests"]["total"].as_u64() > Some(200), "{}", report["requests"]);
    }
    // Each drill has tidied up: nothing of it is left but the namespace that is on its way out.
    let (success, stdout, stderr) = run(&labs, &["lab", "status", "--output", "json"]);
    assert!(success, "{stderr}");
    let status: Value = serde_json::from_str(&stdout).unwrap();
    let powers: Vec<&Value> = status["machines"].as_array().unwrap().iter().map(|m| &m["power"]).collect();
    assert_eq!(powers, ["on"; 4]);
    assert_eq!(status["cuts"].as_array().unwrap().len(), 0);
}
