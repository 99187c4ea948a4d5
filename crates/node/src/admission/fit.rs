//! Whether a pod fits on a node, in the words of upstream's kubelet. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodSpec, Taint};
use seawall_api::node_selector::{pod_matches, tolerates};
use serde::{Deserialize, Serialize};

use crate::{
    eviction::rank::is_critical,
    pod::{containers, qos},
    static_pods,
};

/// Resources in thousandths, by name; `pods` is one of them.
pub type Milli = BTreeMap<String, i64>;

/// What is to be known of the node.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// What pods may have of it.
    pub allocatable: Milli,
}

/// A port of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    protocol: String,
    ip: String,
    port: i32,
}

impl Port {
    fn conflicts(&self, other: &Port) -> bool {
        let any = |ip: &str| ip.is_empty() || ip == "0.0.0.0";
        self.protocol == other.protocol
            && self.port == other.port
            && (any(&self.ip) || any(&other.ip) || self.ip == other.ip)
    }
}

/// What a pod takes of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// What it requests.
    pub requests: Milli,
    /// Its ports.
    pub ports: Vec<Port>,
}

impl Taken {
    /// What a pod with this spec takes.
    pub fn by(spec: &PodSpec) -> Taken {
        let mut requests = Milli::from([("pods".to_owned(), 1000)]);
        for container in containers(spec) {
            let resources = container.spec.resources.as_ref();
            let lists = resources.into_iter().flat_map(|r| [&r.requests, &r.limits]).flatten();
            for name in lists.flat_map(BTreeMap::keys) {
                if !requests.contains_key(name) {
                    requests.insert(name.clone(), qos::pod_request(spec, name));
                }
            }
        }
        let ports = containers(spec).flat_map(|c| c.spec.ports.iter().flatten());
        let ports = ports.filter_map(|p| {
            Some(Port {
                protocol: p.protocol.clone().unwrap_or_else(|| "TCP".into()),
                ip: p.host_ip.clone().unwrap_or_default(),
                port: p.host_port.filter(|port| *port > 0)?,
            })
        });
        Taken { requests, ports: ports.collect() }
    }
}

/// Why a pod does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The node has not enough left of a resource; in thousandths.
    Resource {
        /// Its name.
        name: String,
        /// What the pod needs.
        requested: i64,
        /// What others have.
        used: i64,
        /// What there is.
        capacity: i64,
    },
    /// The node is not one that the pod may be on: the scheduler's name for the rule, and its words.
    Rule(&'static str, &'static str),
}

/// Labels, which may have changed a moment ago.
pub const AFFINITY: Refusal = Refusal::Rule("NodeAffinity", "node(s) didn't match Pod's node affinity/selector");

impl Refusal {
    /// The pod's `reason`.
    pub fn reason(&self) -> String {
        match self {
            Refusal::Resource { name, .. } => format!("OutOf{name}"),
            Refusal::Rule(rule, _) => (*rule).to_owned(),
        }
    }

    /// For a human.
    pub fn message(&self) -> String {
        match self {
            Refusal::Resource { name, requested, used, capacity } => {
                let [requested, used, capacity] = [requested, used, capacity].map(|value| shown(name, *value));
                format!(
                    "Node didn't have enough resource: {name}, requested: {requested}, used: {used}, capacity: {capacity}"
                )
            }
            Refusal::Rule(rule, why) => format!("Predicate {rule} failed: {why}"),
        }
    }
}

/// A number as upstream puts it into messages: thousandths of CPUs, whole numbers of everything else.
pub fn shown(name: &str, milli: i64) -> i64 {
    if name == "cpu" { milli } else { milli.div_euclid(1000) + i64::from(milli.rem_euclid(1000) != 0) }
}

/// Whether the node would not have to know of a resource: somebody else in the cluster may give it.
pub(crate) fn is_extended(name: &str) -> bool {
    name.contains('/') && !name.starts_with("kubernetes.io/")
}

/// Which resources a node has not enough of.
pub fn short(wanted: &Taken, node: &Node, others: &[&Taken]) -> Vec<Refusal> {
    let mut names: Vec<&String> = wanted.requests.keys().collect();
    let order =
        |name: &str| ["pods", "cpu", "memory", "ephemeral-storage"].iter().position(|n| *n == name).unwrap_or(4);
    names.sort_by_key(|name| (order(name), name.as_str()));
    let mut short = Vec::new();
    for name in names {
        let requested = wanted.requests[name];
        let capacity = node.allocatable.get(name).copied();
        if requested == 0 || capacity.is_none() && is_extended(name) {
            continue;
        }
        let used: i64 = others.iter().filter_map(|taken| taken.requests.get(name)).sum();
        let capacity = capacity.unwrap_or(0);
        if requested > capacity - used {
            short.push(Refusal::Resource { name: name.clone(), requested, used, capacity });
        }
    }
    short
}

/// Everything that speaks against a pod, what counts most first. A critical pod is not refused for want of resources.
pub fn refusals(pod: &Pod, wanted: &Taken, node: &Node, others: &[&Taken]) -> Vec<Refusal> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let mut found = if is_critical(pod) { Vec::new() } else { short(wanted, node, others) };
    if !pod_matches(spec, &node.name, &node.labels) {
        found.push(AFFINITY);
    }
    if wanted.ports.iter().any(|port| others.iter().any(|taken| taken.ports.iter().any(|other| port.conflicts(other))))
    {
        found.push(Refusal::Rule("NodePorts", "node(s) didn't have free ports for the requested pod ports"));
    }
    let untolerated = |taint: &Taint| {
        taint.effect == "NoExecute" && !spec.tolerations.iter().flatten().any(|toleration| tolerates(toleration, taint))
    };
    if !static_pods::is_static(pod) && node.taints.iter().any(untolerated) {
        found.push(Refusal::Rule("TaintToleration", "node(s) had untolerated taint(s)"));
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    fn wants(requests: serde_json::Value) -> Pod {
        pod(json!({"containers": [{"name": "a", "resources": {"requests": requests}}]}))
    }

    fn taken(pod: &Pod) -> Taken {
        Taken::by(pod.spec.as_ref().unwrap())
    }

    fn node() -> Node {
        let taint = |effect: &str| Taint { key: "k".into(), effect: effect.into(), ..Default::default() };
        Node {
            name: "n".into(),
            labels: [("zone".to_owned(), "a".to_owned())].into(),
            taints: vec![taint("NoSchedule")],
            allocatable: [("cpu", 2000), ("memory", 1000 << 30), ("pods", 3000), ("a/b", 1000)]
                .map(|(name, value)| (name.to_owned(), value))
                .into(),
        }
    }

    #[test]
    fn what_does_not_fit() {
        let other = taken(&pod(json!({"containers": [{"name": "a", "ports": [{"containerPort": 1, "hostPort": 80}],
            "resources": {"requests": {"cpu": "1500m", "a/b": "1"}}}]})));
        let check = |pod: Pod, node: &Node, expect: &[(&str, &str)]| {
            let found = refusals(&pod, &taken(&pod), node, &[&other]);
            let found: Vec<_> = found.iter().map(|refusal| (refusal.reason(), refusal.message())).collect();
            let expect: Vec<_> = expect.iter().map(|(r, m)| ((*r).to_owned(), (*m).to_owned())).collect();
            assert_eq!(found, expect);
        };
        check(wants(json!({"cpu": "500m", "memory": "1Gi"})), &node(), &[]);
        let resource = "Node didn't have enough resource:";
        check(
            wants(json!({"cpu": "501m"})),
            &node(),
            &[("OutOfcpu", &format!("{resource} cpu, requested: 501, used: 1500, capacity: 2000"))],
        );
        check(
            wants(json!({"memory": "1025Mi"})),
            &node(),
            &[("OutOfmemory", &format!("{resource} memory, requested: 1074790400, used: 0, capacity: 1073741824"))],
        );
        check(
            wants(json!({"a/b": "1"})),
            &node(),
            &[("OutOfa/b", &format!("{resource} a/b, requested: 1, used: 1, capacity: 1"))],
        );
        // What this node knows nothing of may be given by somebody else; what only a node can give may not.
        check(wants(json!({"x/y": "1"})), &node(), &[]);
        check(
            wants(json!({"hugepages-2Mi": "2Mi"})),
            &node(),
            &[("OutOfhugepages-2Mi", &format!("{resource} hugepages-2Mi, requested: 2097152, used: 0, capacity: 0"))],
        );
        let mut full = node();
        full.allocatable.insert("pods".into(), 1000);
        check(
            wants(json!({})),
            &full,
            &[("OutOfpods", &format!("{resource} pods, requested: 1, used: 1, capacity: 1"))],
        );
        let critical =
            json!({"priority": 2_000_000_000, "containers": [{"name": "a", "resources": {"requests": {"cpu": "9"}}}]});
        check(pod(critical), &node(), &[]);
        let ports = json!({"containers": [{"name": "a", "ports": [{"containerPort": 1, "hostPort": 80, "hostIP": "127.0.0.1"}]}]});
        let why = "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
        check(pod(ports), &node(), &[("NodePorts", why)]);
        let elsewhere = json!({"containers": [], "nodeSelector": {"zone": "b"}});
        let why = "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector";
        check(pod(elsewhere), &node(), &[("NodeAffinity", why)]);
    }

    #[test]
    fn taints() {
        let mut tainted = node();
        tainted.taints.push(Taint { key: "k".into(), effect: "NoExecute".into(), ..Default::default() });
        let check = |pod: &Pod, expect: usize| assert_eq!(refusals(pod, &taken(pod), &tainted, &[]).len(), expect);
        let mut plain = pod(json!({"containers": []}));
        let found = refusals(&plain, &taken(&plain), &tainted, &[]);
        assert_eq!(found[0].message(), "Predicate TaintToleration failed: node(s) had untolerated taint(s)");
        check(&pod(json!({"containers": [], "tolerations": [{"operator": "Exists"}]})), 0);
        plain.metadata.annotations = Some([(static_pods::SOURCE.to_owned(), "file".to_owned())].into());
        check(&plain, 0);
    }
}
