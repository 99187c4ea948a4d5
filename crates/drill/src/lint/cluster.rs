//! Rules about the cluster itself: servers, the way to them, certificates, nodes, DNS.

use std::collections::BTreeSet;

use jiff::SignedDuration;
use serde_json::Value;

use super::{
    Finding, Severity,
    facts::{Facts, has_all, is_true, title},
    workload::replicas_of,
};

pub(super) const SERVERS: &str = "servers";
pub(super) const ENTRY: &str = "entry";
pub(super) const BALANCERS: &str = "entry-balancers";
pub(super) const CERTIFICATES: &str = "certificates";
pub(super) const NODES: &str = "nodes";
pub(super) const DNS: &str = "dns";
pub(super) const TIMES: &str = "times";

/// A certificate that ends sooner than this is about to.
const SOON: SignedDuration = SignedDuration::from_hours(24 * 30);
/// One that ends sooner than this will have before anybody reads a weekly report.
const VERY_SOON: SignedDuration = SignedDuration::from_hours(24 * 7);
/// How the Service and the pods of the cluster's DNS are labelled, whoever makes them.
const DNS_LABEL: (&str, &str) = ("k8s-app", "kube-dns");

/// How many servers there are, each with a member of etcd: a majority has to be left when one dies.
pub fn servers(facts: &Facts) -> Vec<Finding> {
    let (severity, why) = match facts.servers.len() {
        // Not ours, or not visible.
        0 => return Vec::new(),
        1 => (Severity::Warning, "There is one server: without its machine nothing can be changed or started anew."),
        2 => (
            Severity::Error,
            "Two servers have a majority only together: the loss of either stops the cluster, so two are worse than one.",
        ),
        n if n % 2 == 0 => (
            Severity::Info,
            "With an even number of servers no more may fail than with one less, and there is one more that can.",
        ),
        _ => return Vec::new(),
    };
    let mend =
        "seawall token create --server, then seawall server --join on another machine; three is the usual number";
    vec![Finding { severity, rule: SERVERS, object: "Cluster".into(), why: why.into(), mend: mend.into() }]
}

/// Whether clients from outside come in by one server alone.
pub fn entry(facts: &Facts) -> Vec<Finding> {
    let host =
        |address: &str| address.rsplit_once(':').map_or("", |(host, _)| host).trim_matches(['[', ']']).to_owned();
    let one = facts.servers.len() > 1 && facts.servers.iter().any(|address| host(address) == facts.entry);
    if !facts.whole || !one {
        return Vec::new();
    }
    vec![Finding {
        severity: Severity::Warning,
        rule: ENTRY,
        object: format!("Entry {}", facts.entry),
        why: "This is the address of one server: when its machine dies, whoever uses this kubeconfig is locked out, though the \
              API lives."
            .into(),
        mend: "use an address that moves or balances, or a machine's own balancer: seawall kubeconfig --server \
               https://NAME:6443 (the name has to be in the certificates: seawall certs add-name NAME)"
            .into(),
    }]
}

/// Whether there is one balancer alone in front of the servers. Those that say nothing of themselves are not seen: then nothing
/// is said.
pub fn balancers(facts: &Facts) -> Vec<Finding> {
    let Some(only) = facts.balancers.first().filter(|_| facts.whole && facts.balancers.len() == 1) else {
        return Vec::new();
    };
    vec![Finding {
        severity: Severity::Warning,
        rule: BALANCERS,
        object: format!("Entry {}", facts.entry),
        why: format!(
            "The balancer {only} is the only one that asks the servers whether they are well: when its machine dies, \
             nobody reaches the API by this entry, though all servers live."
        ),
        mend: "add a second balancer (seawall entry haproxy, with another --name), and let keepalived move the entry's address \
               between the two"
            .into(),
    }]
}

/// Certificates that end soon, or do not name the entry.
pub fn certificates(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut add = |severity, address: &str, why: String, mend: String| {
        found.push(Finding { severity, rule: CERTIFICATES, object: format!("Server {address}"), why, mend });
    };
    for served in &facts.served {
        let certificate = match &served.certificate {
            Ok(certificate) => certificate,
            Err(why) => {
                let why = format!("Its certificate could not be looked at: {why}");
                add(
                    Severity::Warning,
                    &served.address,
                    why,
                    "see whether the server runs and is reached from here".into(),
                );
                continue;
            }
        };
        let left = certificate.ends.duration_since(facts.now);
        if left < SOON {
            let severity = if left < VERY_SOON { Severity::Error } else { Severity::Warning };
            let why = format!("Its certificate ends on {}.", certificate.ends);
            add(severity, &served.address, why, "restart the server: it makes a new one at its start".into());
        }
        if !certificate.names.contains(&facts.entry) {
            let why = format!("Its certificate does not name the entry {}, so clients refuse it.", facts.entry);
            add(Severity::Error, &served.address, why, format!("seawall certs add-name {}", facts.entry));
        }
    }
    found
}

/// Nodes that are not there for anybody.
pub fn nodes(facts: &Facts) -> Vec<Finding> {
    if !facts.whole {
        return Vec::new();
    }
    let mut found = Vec::new();
    for node in &facts.nodes {
        let name = node["metadata"]["name"].as_str().unwrap_or_default();
        if !is_true(node, "Ready") {
            found.push(Finding {
                severity: Severity::Error,
                rule: NODES,
                object: title(node, "Node"),
                why: "It is not ready: what has replicas on it has fewer than it should.".into(),
                mend: format!("kubectl describe node {name}; if it is gone for good, kubectl delete node {name}"),
            });
        } else if node["spec"]["unschedulable"] == true {
            found.push(Finding {
                severity: Severity::Info,
                rule: NODES,
                object: title(node, "Node"),
                why: "It is cordoned: nothing that dies elsewhere can be started here.".into(),
                mend: format!("kubectl uncordon {name}"),
            });
        }
    }
    if facts.nodes.len() == 1 {
        found.push(Finding {
            severity: Severity::Warning,
            rule: NODES,
            object: "Cluster".into(),
            why: "There is one node: without its machine nothing runs.".into(),
            mend: "seawall token create, then seawall agent --join on another machine".into(),
        });
    }
    found
}

/// Two or more replicas of the cluster's DNS, on two or more machines: it is forgotten until it fails.
pub fn dns(facts: &Facts) -> Vec<Finding> {
    if !facts.whole {
        return Vec::new();
    }
    let wanted = serde_json::json!({DNS_LABEL.0: DNS_LABEL.1});
    let of_dns = |object: &&Value| has_all(&wanted, &object["spec"]["template"]["metadata"]["labels"]);
    let mut found = Vec::new();
    for deployment in facts.workloads.iter().filter(of_dns) {
        let name = deployment["metadata"]["name"].as_str().unwrap_or_default();
        let replicas = replicas_of(deployment);
        let ready = |pod: &&Value| has_all(&wanted, &pod["metadata"]["labels"]) && is_true(pod, "Ready");
        let machines: BTreeSet<&str> =
            facts.pods.iter().filter(ready).filter_map(|pod| pod["spec"]["nodeName"].as_str()).collect();
        let why = match (replicas, machines.len()) {
            (replicas, _) if replicas < 2 => "It has one replica, and nearly everything looks names up.",
            (_, 0) => "None of its replicas is ready.",
            (_, 1) if facts.nodes.len() > 1 => "All of its replicas that are ready are on one machine.",
            _ => continue,
        };
        found.push(Finding {
            severity: Severity::Error,
            rule: DNS,
            object: title(deployment, "Deployment"),
            why: why.into(),
            mend: format!(
                "kubectl -n kube-system scale deployment/{name} --replicas=2, with required anti-affinity on \
                 kubernetes.io/hostname"
            ),
        });
    }
    found
}

/// Servers that run with different times: what one relies on the others do not keep.
pub fn times(facts: &Facts) -> Vec<Finding> {
    let Some(((first, wanted), others)) = facts.times.split_first() else { return Vec::new() };
    let seconds =
        |time: &Value| time["secs"].as_f64().unwrap_or_default() + time["nanos"].as_f64().unwrap_or_default() / 1e9;
    let mut found = Vec::new();
    for (address, times) in others {
        // A server of another version may not know of one.
        let both = wanted.as_object().into_iter().flatten().filter_map(|(name, a)| Some((name, a, times.get(name)?)));
        let differ: Vec<String> = both
            .filter(|(_, a, b)| a != b)
            .map(|(name, a, b)| {
                format!("{} is {} s here and {} s at {first}", name.replace('_', "-"), seconds(b), seconds(a))
            })
            .collect();
        if !differ.is_empty() {
            found.push(Finding {
                severity: Severity::Error,
                rule: TIMES,
                object: format!("Server {address}"),
                why: format!("It runs with other times than the server at {first}: {}.", differ.join(", ")),
                mend: "start all servers and agents with the same --timing and the same flags for single times".into(),
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::lint::facts::{Certificate, Served};

    fn whole() -> Facts {
        Facts {
            whole: true,
            entry: "api.example".into(),
            now: "2026-01-01T00:00:00Z".parse().unwrap(),
            ..Facts::default()
        }
    }

    fn node(name: &str, ready: &str) -> Value {
        json!({"metadata": {"name": name}, "status": {"conditions": [{"type": "Ready", "status": ready}]}})
    }

    #[test]
    fn majorities() {
        let check = |count: usize, expect: Option<Severity>| {
            let facts = Facts { servers: (0..count).map(|n| format!("10.0.0.{n}:6443")).collect(), ..whole() };
            assert_eq!(servers(&facts).first().map(|f| f.severity), expect, "{count}");
        };
        check(0, None);
        check(1, Some(Severity::Warning));
        check(2, Some(Severity::Error));
        check(3, None);
        check(4, Some(Severity::Info));
        check(5, None);
    }

    #[test]
    fn ways_in() {
        let check = |entry_: &str, servers: &[&str], expect: usize| {
            let servers = servers.iter().map(|s| (*s).to_owned()).collect();
            assert_eq!(entry(&Facts { entry: entry_.into(), servers, ..whole() }).len(), expect, "{entry_}");
        };
        check("10.0.0.1", &["10.0.0.1:6443", "10.0.0.2:6443"], 1);
        check("fd00::1", &["[fd00::1]:6443", "[fd00::2]:6443"], 1);
        check("127.0.0.1", &["10.0.0.1:6443", "10.0.0.2:6443"], 0);
        check("10.0.0.1", &["10.0.0.1:6443"], 0);
    }

    #[test]
    fn certificates_end_and_name() {
        let check = |names: &[&str], ends: &str, expect: &[Severity]| {
            let names = names.iter().map(|n| (*n).to_owned()).collect();
            let certificate = Ok(Certificate { names, ends: ends.parse().unwrap() });
            let facts = Facts { served: vec![Served { address: "a:1".into(), certificate }], ..whole() };
            let found: Vec<Severity> = certificates(&facts).iter().map(|f| f.severity).collect();
            assert_eq!(found, expect, "{ends}");
        };
        check(&["api.example", "x"], "2027-01-01T00:00:00Z", &[]);
        check(&["api.example"], "2026-01-20T00:00:00Z", &[Severity::Warning]);
        check(&["api.example"], "2026-01-03T00:00:00Z", &[Severity::Error]);
        check(&["x"], "2027-01-01T00:00:00Z", &[Severity::Error]);
        let unseen = Served { address: "a:1".into(), certificate: Err("connection refused".into()) };
        let found = certificates(&Facts { served: vec![unseen], ..whole() });
        assert!(found[0].why.ends_with("connection refused"), "{found:?}");
    }

    #[test]
    fn one_balancer_is_too_few() {
        let check = |names: &[&str], expect: usize| {
            let facts = Facts { balancers: names.iter().map(|name| (*name).to_owned()).collect(), ..whole() };
            let found = balancers(&facts);
            assert_eq!(found.len(), expect, "{names:?}");
            assert!(found.iter().all(|finding| finding.why.contains("The balancer lb1 is the only one")), "{found:?}");
            assert!(balancers(&Facts { whole: false, ..facts }).is_empty());
        };
        check(&[], 0);
        check(&["lb1"], 1);
        check(&["lb1", "lb2"], 0);
    }

    #[test]
    fn nodes_that_are_away() {
        let mut cordoned = node("c", "True");
        cordoned["spec"]["unschedulable"] = true.into();
        let facts = Facts { nodes: vec![node("a", "True"), node("b", "Unknown"), cordoned], ..whole() };
        let found: Vec<(Severity, String)> = nodes(&facts).into_iter().map(|f| (f.severity, f.object)).collect();
        assert_eq!(found, [(Severity::Error, "Node b".into()), (Severity::Info, "Node c".into())]);
        assert_eq!(nodes(&Facts { nodes: vec![node("a", "True")], ..whole() }).len(), 1);
        assert_eq!(nodes(&Facts { nodes: vec![node("a", "False")], whole: false, ..whole() }), []);
    }

    #[test]
    fn times_are_the_same_everywhere() {
        let time = |seconds: u64| json!({"secs": seconds, "nanos": 0});
        let check = |others: &[Value], expect: &[&str]| {
            let first = json!({"fence_wait": time(17), "lease_duration": time(1)});
            let mut all = vec![("a:1".to_owned(), first)];
            all.extend(others.iter().map(|times| ("b:1".to_owned(), times.clone())));
            let found: Vec<String> = times(&Facts { times: all, ..whole() }).into_iter().map(|f| f.why).collect();
            assert_eq!(found, expect);
        };
        check(&[], &[]);
        check(&[json!({"fence_wait": time(17), "lease_duration": time(1), "new": time(5)})], &[]);
        let why = "It runs with other times than the server at a:1: fence-wait is 30 s here and 17 s at a:1.";
        check(&[json!({"fence_wait": time(30), "lease_duration": time(1)})], &[why]);
        assert_eq!(times(&whole()), []);
    }

    #[test]
    fn dns_is_spread() {
        let labels = json!({"k8s-app": "kube-dns"});
        let deployment = |replicas: i64| {
            json!({"kind": "Deployment", "metadata": {"name": "dns", "namespace": "kube-system"},
            "spec": {"replicas": replicas, "template": {"metadata": {"labels": labels}}}})
        };
        let pod = |node: &str, ready: &str| {
            json!({"metadata": {"labels": labels}, "spec": {"nodeName": node},
            "status": {"conditions": [{"type": "Ready", "status": ready}]}})
        };
        let check = |replicas: i64, pods: Vec<Value>, expect: usize| {
            let nodes = vec![node("a", "True"), node("b", "True")];
            let facts = Facts { nodes, workloads: vec![deployment(replicas)], pods, ..whole() };
            assert_eq!(dns(&facts).len(), expect, "{facts:?}");
        };
        check(2, vec![pod("a", "True"), pod("b", "True")], 0);
        check(1, vec![pod("a", "True")], 1);
        check(2, vec![pod("a", "True"), pod("a", "True")], 1);
        check(2, vec![pod("a", "True"), pod("b", "False")], 1);
        check(2, vec![], 1);
    }
}
