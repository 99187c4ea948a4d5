//! What the rules look at, and how it is gathered.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use jiff::Timestamp;
use serde_json::{Value, json};
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

use crate::connection::{Connection, Target};

/// The label of KEP-1965 on the Leases of API servers.
const IDENTITY: &str = "apiserver.kubernetes.io/identity";
/// Where a server says in its Lease at which address it is reached.
const ADDRESS: &str = "seawall.dev/address";
/// Where it says with which times it runs.
const TIMES: &str = "seawall.dev/times";
/// What the names of their Leases begin with.
const LEASE: &str = "apiserver-";
/// Where servers say what they have of snapshots.
const SNAPSHOTS: &str = "seawall-snapshots";
/// What a server counts of the balancers that ask whether it is well.
const BALANCER: &str = "seawall_entry_balancer_last_seen_timestamp_seconds{";

/// The certificate that a server shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Where.
    pub address: String,
    /// For which names and addresses it is good, and when it ends; or why it could not be looked at.
    pub certificate: Result<Certificate, String>,
}

/// What matters of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Names and addresses.
    pub names: Vec<String>,
    /// Its end.
    pub ends: Timestamp,
}

/// A cluster as it was found. Lists are those of the API.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Nodes; none if only a namespace is looked at.
    pub nodes: Vec<Value>,
    /// Pods.
    pub pods: Vec<Value>,
    /// Deployments and StatefulSets, with their kinds filled in.
    pub workloads: Vec<Value>,
    /// Services.
    pub services: Vec<Value>,
    /// PodDisruptionBudgets.
    pub budgets: Vec<Value>,
    /// Claims of volumes.
    pub claims: Vec<Value>,
    /// Volumes.
    pub volumes: Vec<Value>,
    /// `host:port` of the API servers, as they say themselves.
    pub servers: Vec<String>,
    /// Their names.
    pub names: Vec<String>,
    /// What they say of their snapshots, by their names.
    pub snapshots: BTreeMap<String, Value>,
    /// The balancers that ask the server which answered us whether it is well, by the names that they give themselves.
    pub balancers: BTreeSet<String>,
    /// Their certificates.
    pub served: Vec<Served>,
    /// The times with which they run, by their addresses.
    pub times: Vec<(String, Value)>,
    /// Who leads: the name of a Lease, and its holder.
    pub leaders: Vec<(String, String)>,
    /// The host under which clients come in.
    pub entry: String,
    /// When this was.
    pub now: Timestamp,
    /// Whether the cluster as a whole is looked at.
    pub whole: bool,
}

async fn list(connection: &mut Connection, path: &str) -> anyhow::Result<Vec<Value>> {
    let bytes = connection.fetch(path, "application/json").await.with_context(|| format!("GET {path}"))?;
    let mut list: Value = serde_json::from_slice(&bytes).with_context(|| format!("GET {path}"))?;
    match list["items"].take() {
        Value::Array(items) => Ok(items),
        _ => Ok(Vec::new()),
    }
}

impl Facts {
    /// Asks the cluster.
    ///
    /// # Errors
    /// If it does not answer, or does not let us look.
    pub async fn gather(target: &Target, namespace: Option<&str>, entry: Option<&str>) -> anyhow::Result<Facts> {
        let mut connection = target.connect().await?;
        let c = &mut connection;
        let of = |group: &str, plural: &str| match namespace {
            Some(namespace) => format!("{group}/namespaces/{namespace}/{plural}"),
            None => format!("{group}/{plural}"),
        };
        let mut facts = Facts {
            pods: list(c, &of("/api/v1", "pods")).await?,
            services: list(c, &of("/api/v1", "services")).await?,
            claims: list(c, &of("/api/v1", "persistentvolumeclaims")).await?,
            budgets: list(c, &of("/apis/policy/v1", "poddisruptionbudgets")).await?,
            nodes: list(c, "/api/v1/nodes").await?,
            volumes: list(c, "/api/v1/persistentvolumes").await?,
            entry: entry.map_or_else(|| target.host().to_owned(), str::to_owned),
            now: Timestamp::now(),
            whole: namespace.is_none(),
            ..Facts::default()
        };
        for (plural, kind) in [("deployments", "Deployment"), ("statefulsets", "StatefulSet")] {
            for mut object in list(c, &of("/apis/apps/v1", plural)).await? {
                object["kind"] = kind.into();
                facts.workloads.push(object);
            }
        }
        if facts.whole {
            let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";
            let (servers, others): (Vec<Value>, Vec<Value>) =
                list(c, leases).await?.into_iter().partition(|lease| lease["metadata"]["labels"][IDENTITY].is_string());
            for lease in &servers {
                let notes = &lease["metadata"]["annotations"];
                let Some(address) = notes[ADDRESS].as_str() else { continue };
                facts.servers.push(address.to_owned());
                let name = lease["metadata"]["name"].as_str().unwrap_or_default();
                facts.names.push(name.strip_prefix(LEASE).unwrap_or(name).to_owned());
                if let Some(times) = notes[TIMES].as_str().and_then(|text| serde_json::from_str(text).ok()) {
                    facts.times.push((address.to_owned(), times));
                }
            }
            facts.servers.sort();
            if !facts.servers.is_empty() {
                facts.snapshots = snapshots(c).await?;
                let metrics = c.fetch("/metrics", "text/plain").await.context("GET /metrics")?;
                facts.balancers = balancers(&String::from_utf8_lossy(&metrics));
            }
            for lease in &others {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                facts.leaders.push((text(&lease["metadata"]["name"]), text(&lease["spec"]["holderIdentity"])));
            }
            // The way by which we came in is one of them, or somebody in front of them.
            let mut addresses = facts.servers.clone();
            if !addresses.contains(&target.address()) {
                addresses.push(target.address());
            }
            for address in &addresses {
                facts.served.push(Served { address: address.clone(), certificate: served(target, address).await });
            }
        }
        Ok(facts)
    }
}

/// What servers say of their snapshots. What cannot be read is a failure, too.
async fn snapshots(connection: &mut Connection) -> anyhow::Result<BTreeMap<String, Value>> {
    let path = format!("/api/v1/namespaces/kube-system/configmaps?fieldSelector=metadata.name%3D{SNAPSHOTS}");
    let maps = list(connection, &path).await?;
    let data = maps.iter().filter_map(|map| map["data"].as_object()).flatten();
    Ok(data.map(|(name, text)| (name.clone(), report(text.as_str().unwrap_or_default()))).collect())
}

fn report(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| {
        let message = format!("its entry in the ConfigMap kube-system/{SNAPSHOTS} cannot be read: {error}");
        json!({"error": {"message": message}})
    })
}

/// The names of balancers in what a server counts.
fn balancers(metrics: &str) -> BTreeSet<String> {
    let labels = metrics.lines().filter_map(|line| line.strip_prefix(BALANCER));
    let name = |labels: &str| Some(labels.split_once("balancer=\"")?.1.split_once('"')?.0.to_owned());
    labels.filter_map(name).collect()
}

async fn served(target: &Target, address: &str) -> Result<Certificate, String> {
    let (host, port) = address.rsplit_once(':').ok_or("its address has no port")?;
    let port = port.parse().map_err(|_| format!("{port:?} is no port"))?;
    let der = target.at(host.trim_matches(['[', ']']), port).certificate().await.map_err(|e| format!("{e:#}"))?;
    read(&der)
}

fn read(der: &[u8]) -> Result<Certificate, String> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der)
        .map_err(|error| format!("it cannot be read: {error}"))?;
    let names = match certificate.subject_alternative_name() {
        Ok(Some(names)) => names.value.general_names.iter().filter_map(name).collect(),
        _ => Vec::new(),
    };
    let ends = Timestamp::from_second(certificate.validity().not_after.timestamp()).map_err(|e| e.to_string())?;
    Ok(Certificate { names, ends })
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|b| std::net::IpAddr::from(b).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|b| std::net::IpAddr::from(b).to_string()),
            _ => None,
        },
        _ => None,
    }
}

/// `Kind namespace/name`.
pub fn title(object: &Value, kind: &str) -> String {
    let meta = &object["metadata"];
    let name = meta["name"].as_str().unwrap_or_default();
    match meta["namespace"].as_str() {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    }
}

/// Whether an object is in the namespace of another.
pub fn beside(a: &Value, b: &Value) -> bool {
    a["metadata"]["namespace"] == b["metadata"]["namespace"]
}

/// Whether a LabelSelector picks these labels (<https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/>).
pub fn selects(selector: &Value, labels: &Value) -> bool {
    let same = has_all(&selector["matchLabels"], labels);
    let fits = |requirement: &Value| {
        let value = requirement["key"].as_str().and_then(|key| labels[key].as_str());
        let among = || requirement["values"].as_array().into_iter().flatten().any(|v| v.as_str() == value);
        match requirement["operator"].as_str() {
            Some("In") => value.is_some() && among(),
            Some("NotIn") => value.is_none() || !among(),
            Some("Exists") => value.is_some(),
            _ => value.is_none(),
        }
    };
    same && selector["matchExpressions"].as_array().into_iter().flatten().all(fits)
}

/// Whether a map has all entries of another.
pub fn has_all(wanted: &Value, labels: &Value) -> bool {
    wanted.as_object().into_iter().flatten().all(|(key, value)| labels[key] == *value)
}

/// Whether a condition of an object is true.
pub fn is_true(object: &Value, condition: &str) -> bool {
    let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|c| c["type"] == condition && c["status"] == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_that_cannot_be_read_is_a_failure() {
        assert_eq!(report("{\"periodSeconds\": 4}")["periodSeconds"], 4);
        let said = report("{")["error"]["message"].to_string();
        assert!(said.contains("kube-system/seawall-snapshots cannot be read"), "{said}");
    }

    #[test]
    fn balancers_in_metrics() {
        let text = "# TYPE seawall_entry_balancer_last_seen_timestamp_seconds gauge\n\
            seawall_entry_balancer_last_seen_timestamp_seconds{balancer=\"b\",address=\"192.0.2.2\"} 17\n\
            seawall_entry_balancer_last_seen_timestamp_seconds{balancer=\"a\",address=\"192.0.2.1\"} 17\n\
            seawall_entry_balancer_last_seen_timestamp_seconds{balancer=\"a\",address=\"192.0.2.7\"} 17\n\
            other{balancer=\"c\"} 1\n";
        assert_eq!(balancers(text).into_iter().collect::<Vec<_>>(), ["a", "b"]);
        assert!(balancers("").is_empty());
    }

    #[test]
    fn selectors() {
        let check = |selector: Value, expect: bool| {
            assert_eq!(selects(&selector, &json!({"app": "web", "tier": "front"})), expect, "{selector}");
        };
        check(json!({}), true);
        check(json!({"matchLabels": {"app": "web"}}), true);
        check(json!({"matchLabels": {"app": "db"}}), false);
        let one = |operator: &str, key: &str, values: Value| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        check(one("In", "app", json!(["db", "web"])), true);
        check(one("In", "none", json!(["web"])), false);
        check(one("NotIn", "app", json!(["web"])), false);
        check(one("NotIn", "none", json!(["web"])), true);
        check(one("Exists", "tier", Value::Null), true);
        check(one("DoesNotExist", "tier", Value::Null), false);
    }
}
