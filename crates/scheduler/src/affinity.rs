//! Where a pod may be by the labels of nodes, by taints, and by the company of other pods.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, Taint, Toleration};

use crate::{
    pod::{PodInfo, PodTerm},
    snapshot::{NodeFacts, Snapshot},
};

/// Whether a toleration covers a taint
/// (<https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/>).
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    if !effect.is_empty() && effect != taint.effect {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or("Equal") {
        "Exists" => key.is_empty() || key == taint.key,
        _ => {
            key == taint.key
                && toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
    }
}

/// The first taint with one of `effects` that the pod does not tolerate.
pub fn untolerated<'a>(pod: &PodInfo, node: &'a NodeFacts, effects: &[&str]) -> Option<&'a Taint> {
    node.taints
        .iter()
        .find(|t| effects.contains(&t.effect.as_str()) && !pod.tolerations.iter().any(|tol| tolerates(tol, t)))
}

/// Whether a node matches a pod's selector and required affinity.
pub fn node_matches(pod: &PodInfo, node: &NodeFacts) -> bool {
    let selected = pod.node_selector.iter().all(|(key, value)| node.labels.get(key) == Some(value));
    // Terms are alternatives; no terms match nothing.
    selected && pod.node_terms.as_ref().is_none_or(|terms| terms.iter().any(|term| term_matches(term, node)))
}

/// Whether a node matches all conditions of a term. An empty term matches nothing.
pub fn term_matches(term: &NodeSelectorTerm, node: &NodeFacts) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let label = |r: &NodeSelectorRequirement| requirement(r, node.labels.get(&r.key).map(String::as_str));
    let field = |r: &NodeSelectorRequirement| requirement(r, (r.key == "metadata.name").then_some(&node.name));
    expressions.iter().all(label) && fields.iter().all(field)
}

fn requirement(r: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = r.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|v| values.iter().any(|w| w == v));
    let numbers = || Some((value?.parse::<i64>().ok()?, values.first()?.parse::<i64>().ok()?));
    match r.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => numbers().is_some_and(|(a, b)| a > b),
        "Lt" => numbers().is_some_and(|(a, b)| a < b),
        _ => false,
    }
}

impl PodTerm {
    /// Whether a pod is of the company that is meant.
    pub fn picks(&self, other: &PodInfo, namespaces: &HashMap<String, BTreeMap<String, String>>) -> bool {
        let named = self.namespaces.contains(&other.namespace);
        let selected = || {
            let labels = namespaces.get(&other.namespace);
            self.namespace_selector.as_ref().is_some_and(|s| {
                s.is_empty() || labels.is_some_and(|l| s.matches(|key| l.get(key).map(String::as_str)))
            })
        };
        (named || selected()) && self.selector.matches(|key| other.labels.get(key).map(String::as_str))
    }
}

/// How many pods of each kind of company there are at each place (label and value).
type Places<'a> = HashMap<(&'a str, &'a str), i64>;

/// The company of all pods, counted once for a decision.
#[derive(Default)]
pub struct Company<'a> {
    /// For each required term of the pod, the places where it is met.
    wanted: Vec<Places<'a>>,
    /// For each term that the pod cannot stand, the places where it would be.
    avoided: Vec<Places<'a>>,
    /// Places where a pod is that cannot stand this one.
    hostile: Places<'a>,
    /// What the preferences of the pod, and of those that are there, add up to at each place.
    pub liking: Places<'a>,
}

/// Why the company at a node is not right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsocial {
    /// What the pod needs is not there.
    Affinity,
    /// What the pod cannot stand is there.
    AntiAffinity,
    /// Somebody there cannot stand the pod.
    Existing,
}

impl<'a> Company<'a> {
    /// Counts.
    pub fn of(pod: &PodInfo, snapshot: &'a Snapshot) -> Company<'a> {
        let mut company = Company {
            wanted: vec![Places::new(); pod.affinity.len()],
            avoided: vec![Places::new(); pod.anti_affinity.len()],
            ..Default::default()
        };
        for node in snapshot.known() {
            let place = |term: &PodTerm| -> Option<(&'a str, &'a str)> {
                let (key, value) = node.facts.labels.get_key_value(&term.topology_key)?;
                Some((key.as_str(), value.as_str()))
            };
            for other in node.pods.values() {
                // All of the terms have to pick a pod for it to count.
                let all = !pod.affinity.is_empty() && pod.affinity.iter().all(|t| t.picks(other, &snapshot.namespaces));
                if all {
                    for (term, places) in pod.affinity.iter().zip(&mut company.wanted) {
                        if let Some(place) = place(term) {
                            *places.entry(place).or_default() += 1;
                        }
                    }
                }
                for (term, places) in pod.anti_affinity.iter().zip(&mut company.avoided) {
                    if let Some(place) = place(term).filter(|_| term.picks(other, &snapshot.namespaces)) {
                        *places.entry(place).or_default() += 1;
                    }
                }
                for term in &other.anti_affinity {
                    if let Some(place) = place(term).filter(|_| term.picks(pod, &snapshot.namespaces)) {
                        *company.hostile.entry(place).or_default() += 1;
                    }
                }
                for (weight, term) in &pod.preferred {
                    if let Some(place) = place(term).filter(|_| term.picks(other, &snapshot.namespaces)) {
                        *company.liking.entry(place).or_default() += weight;
                    }
                }
                for (weight, term) in &other.preferred {
                    if let Some(place) = place(term).filter(|_| term.picks(pod, &snapshot.namespaces)) {
                        *company.liking.entry(place).or_default() += weight;
                    }
                }
            }
        }
        company
    }

    /// Whether the pod can be at a node.
    pub fn check(&self, pod: &PodInfo, node: &NodeFacts, snapshot: &Snapshot) -> Result<(), Unsocial> {
        let at = |places: &Places<'_>, key: &str| {
            node.labels.get(key).and_then(|value| places.get(&(key, value.as_str()))).copied().unwrap_or_default()
        };
        if self.hostile.iter().any(|((key, value), _)| node.labels.get(*key).is_some_and(|v| v == value)) {
            return Err(Unsocial::Existing);
        }
        for (term, places) in pod.anti_affinity.iter().zip(&self.avoided) {
            if at(places, &term.topology_key) > 0 {
                return Err(Unsocial::AntiAffinity);
            }
        }
        if pod.affinity.is_empty() {
            return Ok(());
        }
        if pod.affinity.iter().any(|t| !node.labels.contains_key(&t.topology_key)) {
            return Err(Unsocial::Affinity);
        }
        let met = pod.affinity.iter().zip(&self.wanted).all(|(term, places)| at(places, &term.topology_key) > 0);
        // The first of a group that wants its own company may start it.
        let first =
            self.wanted.iter().all(Places::is_empty) && pod.affinity.iter().all(|t| t.picks(pod, &snapshot.namespaces));
        if met || first { Ok(()) } else { Err(Unsocial::Affinity) }
    }
}
