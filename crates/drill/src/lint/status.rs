//! `seawall status`: what there is of a cluster, who leads, how it is, and what `seawall check` finds, on one page.

use std::{collections::BTreeMap, path::PathBuf};

use serde_json::{Value, json};

use super::{
    Finding,
    facts::{Facts, is_true},
    findings,
};
use crate::{connection::Target, lab::cli::columns};

/// The label of a machine that runs a server.
const SERVER: &str = "node-role.kubernetes.io/control-plane";
/// The Leases of what acts in one place at a time, and how that is called.
const LEADERS: [(&str, &str); 2] = [("kube-controller-manager", "controllers"), ("kube-scheduler", "scheduler")];

/// Options of `seawall status`.
#[derive(clap::Args)]
pub struct Args {
    /// The kubeconfig of the cluster.
    #[arg(long, env = "KUBECONFIG", default_value = "/var/lib/seawall/admin.kubeconfig")]
    kubeconfig: PathBuf,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// Runs it.
///
/// # Errors
/// If the cluster cannot be asked.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let target = Target::from_kubeconfig(&args.kubeconfig)?;
    let facts = Facts::gather(&target, None, None).await?;
    let status = Status::of(&facts);
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&status.json())?),
        false => print!("{}", status.text()),
    }
    Ok(())
}

/// A cluster at a glance.
#[derive(Debug, PartialEq)]
pub struct Status {
    /// Address, whether it answers (or why not), what it leads.
    servers: Vec<[String; 3]>,
    /// Name, state, what it is, version, pods that are ready of those there.
    nodes: Vec<[String; 5]>,
    findings: Vec<Finding>,
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

impl Status {
    /// Looks at what was gathered.
    pub fn of(facts: &Facts) -> Status {
        Status { servers: servers(facts), nodes: nodes(facts), findings: findings(facts, &[]) }
    }

    /// As tables.
    pub fn text(&self) -> String {
        let mut out = String::new();
        if !self.servers.is_empty() {
            out += &table(["SERVER", "ANSWERS", "LEADS"], &self.servers);
        }
        out += &table(["NODE", "STATUS", "ROLE", "VERSION", "READY PODS"], &self.nodes);
        if self.findings.is_empty() {
            return out + "Nothing was found: the loss of any one machine should not be felt.\n";
        }
        let rows: Vec<[String; 3]> = self
            .findings
            .iter()
            .map(|finding| [finding.severity.name().to_owned(), finding.object.clone(), finding.why.clone()])
            .collect();
        out + &table(["SEVERITY", "OBJECT", "WHY"], &rows) + "seawall check says what to do about it.\n"
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let servers = self.servers.iter().map(|[address, answers, leads]| {
            json!({"address": address, "answers": answers == "yes", "leads": leads.split(", ").filter(|l| *l != "-").collect::<Vec<_>>()})
        });
        let nodes = self.nodes.iter().map(|[name, status, role, version, pods]| {
            json!({"name": name, "status": status, "role": role, "version": version, "readyPods": pods})
        });
        json!({"servers": servers.collect::<Vec<_>>(), "nodes": nodes.collect::<Vec<_>>(), "findings": self.findings})
    }
}

fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let all: Vec<[String; N]> = std::iter::once(head.map(str::to_owned)).chain(rows.iter().cloned()).collect();
    columns(&all) + "\n"
}

fn servers(facts: &Facts) -> Vec<[String; 3]> {
    // The host of a server's address is an address of its Node, and the holder of a Lease is that Node's name.
    let names: BTreeMap<&str, &str> = facts
        .nodes
        .iter()
        .flat_map(|node| {
            let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
            addresses.map(|address| (text(&address["address"]), text(&node["metadata"]["name"])))
        })
        .collect();
    let row = |address: &String| {
        let answers = match facts.served.iter().find(|served| served.address == *address) {
            Some(served) => served.certificate.as_ref().map_or_else(|why| format!("no: {why}"), |_| "yes".to_owned()),
            None => "not asked".to_owned(),
        };
        let host = address.rsplit_once(':').map_or("", |(host, _)| host).trim_matches(['[', ']']);
        let name = names.get(host).copied().unwrap_or(host);
        let leads = |lease: &str| {
            match facts.leaders.iter().find(|(known, _)| known == lease) {
                // A holder is a machine, with something that tells its processes apart.
                Some((_, holder)) => holder == name || holder.rsplit_once('_').is_some_and(|(node, _)| node == name),
                // One that stands alone asks nobody.
                None => facts.servers.len() == 1,
            }
        };
        let what: Vec<&str> = LEADERS.iter().filter(|(lease, _)| leads(lease)).map(|(_, what)| *what).collect();
        [address.clone(), answers, if what.is_empty() { "-".to_owned() } else { what.join(", ") }]
    };
    facts.servers.iter().map(row).collect()
}

fn nodes(facts: &Facts) -> Vec<[String; 5]> {
    let row = |node: &Value| {
        let name = text(&node["metadata"]["name"]);
        let mut status = if is_true(node, "Ready") { "Ready".to_owned() } else { "NotReady".to_owned() };
        if node["spec"]["unschedulable"] == true {
            status += ", cordoned";
        }
        for pressure in ["MemoryPressure", "DiskPressure", "PIDPressure"] {
            if is_true(node, pressure) {
                status += &format!(", {pressure}");
            }
        }
        let role = if node["metadata"]["labels"].get(SERVER).is_some() { "server" } else { "agent" };
        let here = |pod: &&Value| {
            pod["spec"]["nodeName"] == name && !matches!(text(&pod["status"]["phase"]), "Succeeded" | "Failed")
        };
        let (mut ready, mut all) = (0, 0);
        for pod in facts.pods.iter().filter(here) {
            all += 1;
            ready += usize::from(is_true(pod, "Ready"));
        }
        let version = text(&node["status"]["nodeInfo"]["kubeletVersion"]);
        [name.to_owned(), status, role.to_owned(), version.to_owned(), format!("{ready}/{all}")]
    };
    facts.nodes.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lint::facts::{Certificate, Served};

    #[test]
    fn a_cluster_at_a_glance() {
        let certificate = Certificate { names: vec!["entry".into()], ends: "2100-01-01T00:00:00Z".parse().unwrap() };
        let served = |address: &str, certificate| Served { address: address.into(), certificate };
        let node = |name: &str, ip: &str, ready: &str| {
            json!({"metadata": {"name": name, "labels": {}}, "status": {"nodeInfo": {"kubeletVersion": "v1"},
                "addresses": [{"type": "InternalIP", "address": ip}], "conditions": [{"type": "Ready", "status": ready}]}})
        };
        let mut first = node("s1", "10.0.0.1", "True");
        first["metadata"]["labels"][SERVER] = "".into();
        first["spec"]["unschedulable"] = true.into();
        let pod = |ready: &str, phase: &str| {
            json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {"nodeName": "s1"},
                "status": {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]}})
        };
        let facts = Facts {
            whole: true,
            entry: "entry".into(),
            servers: vec!["10.0.0.1:6443".into(), "10.0.0.2:6443".into()],
            served: vec![
                served("10.0.0.1:6443", Ok(certificate)),
                served("10.0.0.2:6443", Err("connection refused".into())),
            ],
            leaders: vec![("kube-scheduler".into(), "s1".into()), ("kube-controller-manager".into(), "s1_1f".into())],
            nodes: vec![first, node("w1", "10.0.0.9", "False")],
            pods: vec![pod("True", "Running"), pod("False", "Pending"), pod("False", "Succeeded")],
            ..Facts::default()
        };
        let status = Status::of(&facts);
        let shown = status.text();
        let expect = "SERVER          ANSWERS                  LEADS\n\
                      10.0.0.1:6443   yes                      controllers, scheduler\n\
                      10.0.0.2:6443   no: connection refused   -\n\n\
                      NODE   STATUS            ROLE     VERSION   READY PODS\n\
                      s1     Ready, cordoned   server   v1        1/2\n\
                      w1     NotReady          agent    v1        0/0\n\n\
                      SEVERITY   OBJECT";
        assert!(shown.starts_with(expect), "{shown}");
        assert!(shown.contains("error      Node w1") && shown.ends_with("what to do about it.\n"), "{shown}");
        let json = status.json();
        assert_eq!(
            (&json["servers"][0]["leads"], &json["servers"][1]["answers"]),
            (&json!(["controllers", "scheduler"]), &json!(false))
        );
        assert_eq!(json["nodes"][0]["readyPods"], "1/2");
    }
}
