//! A pod as the scheduler sees it: parsed once.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        Container, NodeSelectorTerm, Pod, PodAffinityTerm, PodSpec, PodStatus, ResourceRequirements, Toleration,
    },
    apimachinery::pkg::{api::resource::Quantity as Text, apis::meta::v1::LabelSelector as Typed},
};
use kube::ResourceExt;
use seawall_api::{quantity::Quantity, selector::LabelSelector};

/// Amounts of resources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Thousandths of a CPU.
    pub cpu: i64,
    /// Bytes of memory.
    pub memory: i64,
    /// Bytes of local disk.
    pub storage: i64,
    /// Everything else by name.
    pub other: BTreeMap<String, i64>,
}

impl Resources {
    /// Reads a map of quantities. What cannot be read counts as nothing; the API server has validated it.
    pub fn new(map: &BTreeMap<String, Text>) -> Resources {
        let mut out = Resources::default();
        for (name, text) in map {
            let Ok(quantity) = text.0.parse::<Quantity>() else { continue };
            match name.as_str() {
                "cpu" => out.cpu = quantity.milli_value(),
                "memory" => out.memory = quantity.value(),
                "ephemeral-storage" => out.storage = quantity.value(),
                "pods" => {}
                other => {
                    out.other.insert(other.to_owned(), quantity.value());
                }
            }
        }
        out
    }

    /// Adds.
    pub fn add(&mut self, more: &Resources) {
        self.cpu += more.cpu;
        self.memory += more.memory;
        self.storage += more.storage;
        for (name, amount) in &more.other {
            *self.other.entry(name.clone()).or_default() += amount;
        }
    }

    /// Takes away.
    pub fn sub(&mut self, less: &Resources) {
        self.cpu -= less.cpu;
        self.memory -= less.memory;
        self.storage -= less.storage;
        for (name, amount) in &less.other {
            *self.other.entry(name.clone()).or_default() -= amount;
        }
    }

    /// The larger of each.
    pub fn max(&mut self, other: &Resources) {
        self.cpu = self.cpu.max(other.cpu);
        self.memory = self.memory.max(other.memory);
        self.storage = self.storage.max(other.storage);
        for (name, amount) in &other.other {
            let mine = self.other.entry(name.clone()).or_default();
            *mine = (*mine).max(*amount);
        }
    }
}

/// Company that a pod wants or avoids.
#[derive(Clone, Debug)]
pub struct PodTerm {
    /// Which pods.
    pub selector: LabelSelector,
    /// In these namespaces.
    pub namespaces: Vec<String>,
    /// And in those with these labels.
    pub namespace_selector: Option<LabelSelector>,
    /// The label whose value makes two nodes the same place.
    pub topology_key: String,
}

/// How pods are to be spread.
#[derive(Clone, Debug)]
pub struct Spread {
    /// The largest difference between two places.
    pub max_skew: i64,
    /// The label whose value is a place.
    pub topology_key: String,
    /// Which pods are counted.
    pub selector: LabelSelector,
    /// Whether a node that breaks it is out of the question.
    pub required: bool,
    /// Places there have to be for the rule to count them all.
    pub min_domains: i64,
    /// Nodes outside the pod's affinity are left out of the count.
    pub honor_affinity: bool,
    /// Nodes whose taints the pod does not tolerate are left out of the count.
    pub honor_taints: bool,
}

/// A port of the node that a pod takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// `TCP`, `UDP`, `SCTP`.
    pub protocol: String,
    /// The address, `0.0.0.0` for all.
    pub ip: String,
    /// The number.
    pub port: i32,
}

impl HostPort {
    /// Whether both cannot be had on one node.
    pub fn conflicts(&self, other: &HostPort) -> bool {
        let any = |ip: &str| ip.is_empty() || ip == "0.0.0.0";
        self.protocol == other.protocol
            && self.port == other.port
            && (any(&self.ip) || any(&other.ip) || self.ip == other.ip)
    }
}

/// A pod.
#[derive(Clone, Debug, Default)]
pub struct PodInfo {
    /// Its identity.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The node it is bound to.
    pub node: Option<String>,
    /// Who is to schedule it.
    pub scheduler: String,
    /// Larger comes first.
    pub priority: i32,
    /// It is over: it takes no resources any more.
    pub ended: bool,
    /// It is being deleted.
    pub deleting: bool,
    /// Something still holds it back (`schedulingGates`).
    pub gated: bool,
    /// What it asks for.
    pub requests: Resources,
    /// What it asks for, with what a pod that says nothing is taken to need.
    pub assumed: Resources,
    /// Ports of the node it takes.
    pub ports: Vec<HostPort>,
    /// Labels its node must have.
    pub node_selector: BTreeMap<String, String>,
    /// Terms of which its node must match one.
    pub node_terms: Option<Vec<NodeSelectorTerm>>,
    /// Terms it would like its node to match, with weights.
    pub node_preferred: Vec<(i64, NodeSelectorTerm)>,
    /// Taints it puts up with.
    pub tolerations: Vec<Toleration>,
    /// Company it needs.
    pub affinity: Vec<PodTerm>,
    /// Company it cannot have.
    pub anti_affinity: Vec<PodTerm>,
    /// Company it likes (positive weight) or dislikes (negative).
    pub preferred: Vec<(i64, PodTerm)>,
    /// How it is to be spread.
    pub spread: Vec<Spread>,
    /// Its claims.
    pub claims: Vec<String>,
    /// Its images.
    pub images: Vec<String>,
    /// The message of its condition `PodScheduled`, if that is false.
    pub told: Option<String>,
    /// It waits for room even if others are less important (`preemptionPolicy: Never`).
    pub patient: bool,
    /// The node where room was made for it.
    pub nominated: Option<String>,
    /// When its node began with it; `None` if it has not.
    pub started: Option<Timestamp>,
    /// It is being deleted to make room for another.
    pub preempted: bool,
    /// Kind and name of its controller.
    pub owner: Option<(String, String)>,
    /// The same for all pods that are alike for other pods: namespace, labels, and what company they ask for.
    pub class: Arc<str>,
}

/// What a container that says nothing is taken to need, when nodes are compared: upstream's 100m and 200 MB.
const ASSUMED_CPU: i64 = 100;
const ASSUMED_MEMORY: i64 = 200 * 1024 * 1024;

impl PodInfo {
    /// Reads a pod.
    pub fn new(pod: &Pod) -> PodInfo {
        let Some(spec) = &pod.spec else { return PodInfo { uid: pod.uid().unwrap_or_default(), ..Default::default() } };
        let status = pod.status.as_ref();
        let phase = status.and_then(|s| s.phase.as_deref()).unwrap_or_default();
        let namespace = pod.namespace().unwrap_or_default();
        let affinity = spec.affinity.as_ref();
        let of_pods = affinity.and_then(|a| a.pod_affinity.as_ref());
        let of_anti = affinity.and_then(|a| a.pod_anti_affinity.as_ref());
        let of_nodes = affinity.and_then(|a| a.node_affinity.as_ref());
        let own = pod.labels();
        let deleting = pod.metadata.deletion_timestamp.is_some();
        let conditions = || status.iter().flat_map(|s| s.conditions.iter().flatten());
        let term = |t: &PodAffinityTerm| pod_term(t, &namespace, own);
        let mut preferred: Vec<(i64, PodTerm)> = Vec::new();
        for weighted in
            of_pods.iter().flat_map(|a| a.preferred_during_scheduling_ignored_during_execution.iter().flatten())
        {
            preferred.push((weighted.weight.into(), term(&weighted.pod_affinity_term)));
        }
        for weighted in
            of_anti.iter().flat_map(|a| a.preferred_during_scheduling_ignored_during_execution.iter().flatten())
        {
            preferred.push((-i64::from(weighted.weight), term(&weighted.pod_affinity_term)));
        }
        let all = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let ports = all().flat_map(|c| c.ports.iter().flatten()).filter_map(|p| {
            let port = p.host_port.filter(|n| *n > 0)?;
            Some(HostPort {
                protocol: p.protocol.clone().unwrap_or("TCP".into()),
                ip: p.host_ip.clone().unwrap_or_default(),
                port,
            })
        });
        let unscheduled = conditions().find(|c| c.type_ == "PodScheduled" && c.status == "False");
        let mut info = PodInfo {
            uid: pod.uid().unwrap_or_default(),
            name: pod.name_any(),
            labels: own.clone(),
            node: spec.node_name.clone().filter(|n| !n.is_empty()),
            scheduler: spec.scheduler_name.clone().unwrap_or_default(),
            priority: spec.priority.unwrap_or_default(),
            ended: phase == "Succeeded" || phase == "Failed",
            deleting,
            gated: spec.scheduling_gates.as_ref().is_some_and(|g| !g.is_empty()),
            requests: requests(spec, status, |r| r),
            assumed: requests(spec, status, |mut r| {
                // What is asked for as nothing is nothing; what is not said at all is guessed.
                r.cpu = if r.cpu == 0 { ASSUMED_CPU } else { r.cpu };
                r.memory = if r.memory == 0 { ASSUMED_MEMORY } else { r.memory };
                r
            }),
            ports: ports.collect(),
            node_selector: spec.node_selector.clone().unwrap_or_default(),
            node_terms: of_nodes
                .and_then(|n| n.required_during_scheduling_ignored_during_execution.as_ref())
                .map(|s| s.node_selector_terms.clone()),
            node_preferred: of_nodes
                .iter()
                .flat_map(|n| n.preferred_during_scheduling_ignored_during_execution.iter().flatten())
                .map(|p| (p.weight.into(), p.preference.clone()))
                .collect(),
            tolerations: spec.tolerations.clone().unwrap_or_default(),
            affinity: of_pods
                .iter()
                .flat_map(|a| a.required_during_scheduling_ignored_during_execution.iter().flatten())
                .map(term)
                .collect(),
            anti_affinity: of_anti
                .iter()
                .flat_map(|a| a.required_during_scheduling_ignored_during_execution.iter().flatten())
                .map(term)
                .collect(),
            preferred,
            spread: spec
                .topology_spread_constraints
                .iter()
                .flatten()
                .map(|c| {
                    let mut selector = selector(c.label_selector.as_ref());
                    for key in c.match_label_keys.iter().flatten() {
                        if let Some(value) = own.get(key) {
                            selector.0.push(seawall_api::selector::Requirement::In(key.clone(), vec![value.clone()]));
                        }
                    }
                    Spread {
                        max_skew: c.max_skew.into(),
                        topology_key: c.topology_key.clone(),
                        selector,
                        required: c.when_unsatisfiable == "DoNotSchedule",
                        min_domains: c.min_domains.unwrap_or(1).into(),
                        honor_affinity: c.node_affinity_policy.as_deref() != Some("Ignore"),
                        honor_taints: c.node_taints_policy.as_deref() == Some("Honor"),
                    }
                })
                .collect(),
            claims: spec
                .volumes
                .iter()
                .flatten()
                .filter_map(|v| v.persistent_volume_claim.as_ref().map(|c| c.claim_name.clone()))
                .collect(),
            images: all().filter_map(|c| c.image.clone()).collect(),
            told: unscheduled.map(|c| c.message.clone().unwrap_or_default()),
            patient: spec.preemption_policy.as_deref() == Some("Never"),
            nominated: status.and_then(|s| s.nominated_node_name.clone()).filter(|n| !n.is_empty()),
            started: status.and_then(|s| s.start_time.as_ref()).map(|t| t.0),
            preempted: deleting
                && conditions().any(|c| {
                    c.type_ == "DisruptionTarget"
                        && c.status == "True"
                        && c.reason.as_deref() == Some("PreemptionByScheduler")
                }),
            owner: pod
                .owner_references()
                .iter()
                .find(|o| o.controller == Some(true))
                .map(|o| (o.kind.clone(), o.name.clone())),
            class: Arc::default(),
            namespace,
        };
        info.class = info.class_key().into();
        info
    }

    /// Everything that decides what a pod is to others, as text.
    fn class_key(&self) -> String {
        let mut key = self.namespace.clone();
        for (name, value) in &self.labels {
            key.extend(["\n", name, "=", value]);
        }
        if self.is_sociable() {
            // Writing to a string cannot fail.
            let _ = write!(key, "\n{:?}{:?}{:?}", self.affinity, self.anti_affinity, self.preferred);
        }
        key
    }

    /// Whether it has a say in which pods are near it.
    pub fn is_sociable(&self) -> bool {
        !(self.affinity.is_empty() && self.anti_affinity.is_empty() && self.preferred.is_empty())
    }

    /// Whether a selector picks it by its labels.
    pub fn is_picked(&self, selector: &LabelSelector) -> bool {
        selector.matches(|key| self.labels.get(key).map(String::as_str))
    }

    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

pub(crate) fn selector(typed: Option<&Typed>) -> LabelSelector {
    // No selector selects nothing; serialization of a plain struct cannot fail.
    let nothing = || LabelSelector(vec![seawall_api::selector::Requirement::In(String::new(), vec![])]);
    typed.and_then(|t| serde_json::to_value(t).ok()).and_then(|v| LabelSelector::from_value(&v)).unwrap_or_else(nothing)
}

fn pod_term(term: &PodAffinityTerm, namespace: &str, own: &BTreeMap<String, String>) -> PodTerm {
    use seawall_api::selector::Requirement;
    let mut chosen = selector(term.label_selector.as_ref());
    let keys = |keys: &Option<Vec<String>>| keys.clone().unwrap_or_default();
    for key in keys(&term.match_label_keys) {
        if let Some(value) = own.get(&key) {
            chosen.0.push(Requirement::In(key, vec![value.clone()]));
        }
    }
    for key in keys(&term.mismatch_label_keys) {
        if let Some(value) = own.get(&key) {
            chosen.0.push(Requirement::NotIn(key, vec![value.clone()]));
        }
    }
    let mut namespaces = term.namespaces.clone().unwrap_or_default();
    if namespaces.is_empty() && term.namespace_selector.is_none() {
        namespaces.push(namespace.to_owned());
    }
    PodTerm {
        selector: chosen,
        namespaces,
        namespace_selector: term.namespace_selector.as_ref().map(|s| selector(Some(s))),
        topology_key: term.topology_key.clone(),
    }
}

/// What a pod needs at its peak: all containers and sidecars together, or an init container with the sidecars that
/// were started before it (KEP-753), and the overhead. While containers are being resized, each counts with the most of
/// what it should have, has been given, and has; what the node cannot give does not count (KEP-1287).
fn requests(spec: &PodSpec, status: Option<&PodStatus>, adjust: impl Fn(Resources) -> Resources) -> Resources {
    let read = |list: Option<&BTreeMap<String, Text>>| list.map(Resources::new).unwrap_or_default();
    let of = |r: Option<&ResourceRequirements>| read(r.and_then(|r| r.requests.as_ref()));
    let mut conditions = status.iter().flat_map(|s| s.conditions.iter().flatten());
    let infeasible = conditions.any(|c| c.type_ == "PodResizePending" && c.reason.as_deref() == Some("Infeasible"));
    let of_container = |c: &Container| {
        let statuses =
            status.iter().flat_map(|s| s.container_statuses.iter().chain(&s.init_container_statuses).flatten());
        let mut most = Resources::default();
        for status in statuses.filter(|s| s.name == c.name) {
            most.max(&of(status.resources.as_ref()));
            most.max(&read(status.allocated_resources.as_ref()));
        }
        if !infeasible || most == Resources::default() {
            most.max(&of(c.resources.as_ref()));
        }
        adjust(most)
    };
    let mut running = Resources::default();
    for container in &spec.containers {
        running.add(&of_container(container));
    }
    let (mut sidecars, mut peak) = (Resources::default(), Resources::default());
    for container in spec.init_containers.iter().flatten() {
        let mut now = sidecars.clone();
        now.add(&of_container(container));
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars = now.clone();
        }
        peak.max(&now);
    }
    running.add(&sidecars);
    running.max(&peak);
    if let Some(overhead) = &spec.overhead {
        running.add(&Resources::new(overhead));
    }
    running
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_that_is_being_resized_counts_with_the_most() {
        let cpu = |reason: &str, status: serde_json::Value| {
            let pod = json!({"metadata": {"name": "p"},
                "spec": {"containers": [{"name": "a", "resources": {"requests": {"cpu": "4"}}}]},
                "status": {"conditions": [{"type": "PodResizePending", "status": "True", "reason": reason}],
                           "containerStatuses": [status]}});
            let pod: Pod = serde_json::from_value(pod).unwrap();
            PodInfo::new(&pod).requests.cpu
        };
        let status = |allocated: &str, actual: &str| {
            json!({"name": "a", "image": "i", "imageID": "", "ready": true, "restartCount": 0,
                "allocatedResources": {"cpu": allocated}, "resources": {"requests": {"cpu": actual}}})
        };
        for (reason, status, expect) in [
            ("Deferred", status("1", "1"), 4000),
            ("", status("5", "1"), 5000),
            ("", status("4", "6"), 6000),
            ("Infeasible", status("1", "2"), 2000),
        ] {
            assert_eq!(cpu(reason, status.clone()), expect, "{reason} {status}");
        }
    }
}
