//! Which nodes a DaemonSet's pods belong on, and what its pods are like
//! (<https://kubernetes.io/docs/concepts/workloads/controllers/daemonset/#how-daemon-pods-are-scheduled>).

use std::collections::BTreeMap;

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{
        Affinity, Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Taint, Toleration,
    },
};
use seawall_api::node_selector::{NODE_NAME, pod_matches, tolerates};

use crate::{
    node_lifecycle::taints::{NO_EXECUTE, NO_SCHEDULE, taints},
    replica_set::pod_from_template,
    runtime::objects::{annotation, controller_reference, name},
};

/// The hash of the revision that a pod is made from.
pub(super) const HASH: &str = "controller-revision-hash";
/// How often the template has been changed, as older clients count it.
const GENERATION_LABEL: &str = "pod-template-generation";
const GENERATION: &str = "deprecated.daemonset.template.generation";

/// What every pod of a DaemonSet tolerates
/// (<https://kubernetes.io/docs/concepts/workloads/controllers/daemonset/#taints-and-tolerations>).
const TOLERATED: [(&str, &str); 6] = [
    ("node.kubernetes.io/not-ready", NO_EXECUTE),
    ("node.kubernetes.io/unreachable", NO_EXECUTE),
    ("node.kubernetes.io/disk-pressure", NO_SCHEDULE),
    ("node.kubernetes.io/memory-pressure", NO_SCHEDULE),
    ("node.kubernetes.io/pid-pressure", NO_SCHEDULE),
    ("node.kubernetes.io/unschedulable", NO_SCHEDULE),
];
/// What those tolerate as well that use the node's network.
const WITHOUT_NETWORK: (&str, &str) = ("node.kubernetes.io/network-unavailable", NO_SCHEDULE);

/// What a node is to a DaemonSet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// A pod should run there.
    Run,
    /// None is made there, but one that runs may stay: a taint has come that only keeps new pods away.
    Stay,
    /// None should be there.
    Not,
}

/// What a pod of the set tolerates.
pub(super) fn tolerations(spec: &PodSpec) -> Vec<Toleration> {
    let mut all = spec.tolerations.clone().unwrap_or_default();
    let host = spec.host_network == Some(true);
    for (key, effect) in TOLERATED.into_iter().chain(host.then_some(WITHOUT_NETWORK)) {
        let own = Toleration {
            key: Some(key.into()),
            operator: Some("Exists".into()),
            effect: Some(effect.into()),
            ..Toleration::default()
        };
        // One that says the same for a while only is made to hold for ever.
        let same = |t: &Toleration| {
            t.key == own.key
                && t.effect == own.effect
                && t.operator == own.operator
                && t.value.as_deref().unwrap_or_default().is_empty()
        };
        match all.iter_mut().find(|t| same(t)) {
            Some(there) => *there = own,
            None => all.push(own),
        }
    }
    all
}

/// Whether a pod of the set belongs on a node.
pub fn fit(set: &DaemonSet, node: &Node) -> Fit {
    let spec = set.spec.template.spec.clone().unwrap_or_default();
    let elsewhere = spec.node_name.as_deref().is_some_and(|wanted| !wanted.is_empty() && wanted != name(node));
    let none = BTreeMap::new();
    if elsewhere || !pod_matches(&spec, name(node), node.metadata.labels.as_ref().unwrap_or(&none)) {
        return Fit::Not;
    }
    let tolerations = tolerations(&spec);
    let untolerated = |effect: &str| {
        let open = |taint: &&Taint| taint.effect == effect && !tolerations.iter().any(|t| tolerates(t, taint));
        taints(node).iter().find(open).is_some()
    };
    match (untolerated(NO_EXECUTE), untolerated(NO_SCHEDULE)) {
        (true, _) => Fit::Not,
        (false, true) => Fit::Stay,
        (false, false) => Fit::Run,
    }
}

/// The node that a pod was made for: where it is, or where alone it may go.
pub(super) fn target(pod: &Pod) -> Option<&str> {
    let spec = pod.spec.as_ref()?;
    if let Some(node) = spec.node_name.as_deref().filter(|node| !node.is_empty()) {
        return Some(node);
    }
    let affinity = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let required = affinity.required_during_scheduling_ignored_during_execution.as_ref()?;
    let fields = required.node_selector_terms.iter().flat_map(|term| term.match_fields.iter().flatten());
    let mut named = fields.filter(|field| field.key == NODE_NAME && field.operator == "In");
    named.find_map(|field| field.values.as_ref().filter(|v| v.len() == 1)?.first()).map(String::as_str)
}

/// A pod for a node. The scheduler puts it there, since its affinity leaves no choice.
pub(super) fn make(set: &DaemonSet, hash: &str, node: &str) -> Pod {
    let mut pod = pod_from_template(&set.spec.template, format!("{}-", name(set)), controller_reference(set));
    let labels = pod.metadata.labels.get_or_insert_default();
    if let Some(generation) = annotation(set, GENERATION) {
        labels.insert(GENERATION_LABEL.into(), generation.into());
    }
    labels.insert(HASH.into(), hash.into());
    let spec = pod.spec.get_or_insert_default();
    spec.tolerations = Some(tolerations(spec));
    let here =
        NodeSelectorRequirement { key: NODE_NAME.into(), operator: "In".into(), values: Some(vec![node.to_owned()]) };
    let term = NodeSelectorTerm { match_fields: Some(vec![here]), ..NodeSelectorTerm::default() };
    let affinity: &mut Affinity = spec.affinity.get_or_insert_default();
    // What the template requires of nodes was looked at when this one was chosen.
    affinity.node_affinity.get_or_insert_default().required_during_scheduling_ignored_during_execution =
        Some(NodeSelector { node_selector_terms: vec![term] });
    pod
}
