//! The decision: a snapshot and a pod give a node, or the reasons why there is none. Pure.

use std::{borrow::Cow, collections::BTreeMap, fmt, sync::Arc};

use k8s_openapi::api::core::v1::Taint;
use rand::{Rng, SeedableRng, rngs::StdRng};
use seawall_api::node_selector::tolerates;

use crate::{
    affinity::{Company, Unsocial, node_matches, untolerated},
    pod::{PodInfo, Resources},
    score::score,
    snapshot::{NodeInfo, Snapshot},
    spread::{Counts, Uneven},
};

/// Why a pod fits on no node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diagnosis {
    /// How many nodes there are.
    pub nodes: usize,
    /// How many nodes each reason rules out.
    pub reasons: BTreeMap<String, usize>,
    /// A reason that has nothing to do with nodes.
    pub pod: Option<String>,
    /// The slots of nodes where it might fit if other pods went.
    pub crowded: Vec<usize>,
    /// What was thought about making room.
    pub preemption: Option<String>,
}

impl fmt::Display for Diagnosis {
    /// As upstream phrases it: `0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable.`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nodes == 0 {
            return f.write_str("no nodes available to schedule pods");
        }
        write!(f, "0/{} nodes are available: ", self.nodes)?;
        if let Some(reason) = &self.pod {
            return write!(f, "{reason}.");
        }
        let parts: Vec<String> = self.reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        write!(f, "{}.", parts.join(", "))?;
        match &self.preemption {
            Some(text) => write!(f, " preemption: {text}"),
            None => Ok(()),
        }
    }
}

/// How nodes are looked for. On a large cluster not all that would do are compared
/// (<https://kubernetes.io/docs/concepts/scheduling-eviction/scheduler-perf-tuning/>).
#[derive(Debug)]
pub struct Search {
    /// Decides among equals.
    pub random: StdRng,
    /// The part of the nodes that is enough to compare, in percent; 0 leaves it to their number.
    pub percentage: usize,
    /// Where the search goes on, so that all nodes have their turn.
    start: usize,
}

impl Search {
    /// The usual search.
    pub fn new(random: StdRng, percentage: usize) -> Search {
        Search { random, percentage, start: 0 }
    }

    /// A search that comes out the same every time.
    pub fn seeded(seed: u64) -> Search {
        Search::new(StdRng::seed_from_u64(seed), 0)
    }

    /// How many nodes that would do are enough, of so many.
    pub(crate) fn enough(&self, nodes: usize) -> usize {
        const LEAST: usize = 100;
        let percentage = match self.percentage {
            0 => 50usize.saturating_sub(nodes / 125).max(5),
            set => set.min(100),
        };
        if nodes < LEAST { nodes } else { (nodes * percentage / 100).max(LEAST) }
    }
}

/// Finds the node for a pod. Among equals chance decides.
pub fn decide(snapshot: &Snapshot, pod: &PodInfo, search: &mut Search) -> Result<String, Diagnosis> {
    let order = snapshot.order();
    let mut diagnosis = Diagnosis { nodes: order.len(), ..Default::default() };
    for claim in &pod.claims {
        match snapshot.claims.get(&(pod.namespace.clone(), claim.clone())) {
            None => diagnosis.pod = Some(format!("persistentvolumeclaim {claim:?} not found")),
            Some(false) => diagnosis.pod = Some("pod has unbound immediate PersistentVolumeClaims".into()),
            Some(true) => continue,
        }
        return Err(diagnosis);
    }
    let attempt = Attempt::new(snapshot, pod);
    // Room was made for it: it goes there if it can.
    let nominated = snapshot.nomination(&pod.uid).or(pod.nominated.as_deref()).and_then(|name| snapshot.node(name));
    if let Some(node) = nominated
        && attempt.fits(node).is_ok()
    {
        return Ok(node.facts.name.clone());
    }
    let enough = search.enough(order.len());
    let (mut feasible, mut reasons) = (Vec::new(), BTreeMap::<Reason, usize>::new());
    let start = if order.is_empty() { 0 } else { search.start % order.len() };
    let mut visited = 0;
    for slot in order[start..].iter().chain(&order[..start]) {
        if feasible.len() >= enough {
            break;
        }
        visited += 1;
        let node = snapshot.at(*slot);
        match attempt.fits(node) {
            Ok(()) => feasible.push(node),
            Err(refusal) => {
                if refusal.resolvable {
                    diagnosis.crowded.push(*slot);
                }
                for reason in refusal.reasons {
                    *reasons.entry(reason).or_default() += 1;
                }
            }
        }
    }
    search.start = start + visited;
    let best = match feasible.as_slice() {
        [] => {
            for (reason, count) in reasons {
                *diagnosis.reasons.entry(reason.to_string()).or_default() += count;
            }
            return Err(diagnosis);
        }
        [only] => only,
        _ => {
            let scores = score(snapshot, pod, &feasible);
            let best = scores.iter().max().copied().unwrap_or_default();
            let equals: Vec<&&NodeInfo> =
                feasible.iter().zip(&scores).filter(|(_, s)| **s == best).map(|(n, _)| n).collect();
            equals[search.random.random_range(0..equals.len())]
        }
    };
    Ok(best.facts.name.clone())
}

/// What rules a node out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// It is cordoned.
    Cordoned,
    /// It has a taint: key and value.
    Taint(String, String),
    /// Its labels are not those that the pod asks for.
    Labels,
    /// A port of the node is taken.
    Ports,
    /// It has as many pods as it takes.
    Pods,
    /// It has too little of a resource left.
    Resource(Cow<'static, str>),
    /// Too many of the pods that are to be spread.
    Uneven(bool),
    /// The company is not right.
    Company(Unsocial),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Taint(key, value) => return write!(f, "node(s) had untolerated taint {{{key}: {value}}}"),
            Reason::Resource(name) => return write!(f, "Insufficient {name}"),
            Reason::Cordoned => "node(s) were unschedulable",
            Reason::Labels => "node(s) didn't match Pod's node affinity/selector",
            Reason::Ports => "node(s) didn't have free ports for the requested pod ports",
            Reason::Pods => "Too many pods",
            Reason::Uneven(false) => "node(s) didn't match pod topology spread constraints",
            Reason::Uneven(true) => "node(s) didn't match pod topology spread constraints (missing required label)",
            Reason::Company(Unsocial::Affinity) => "node(s) didn't match pod affinity rules",
            Reason::Company(Unsocial::AntiAffinity) => "node(s) didn't match pod anti-affinity rules",
            Reason::Company(Unsocial::Existing) => "node(s) didn't satisfy existing pods anti-affinity rules",
        })
    }
}

/// The reasons against a node: those of the first filter that has any, as upstream's filters run one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What they are.
    pub reasons: Vec<Reason>,
    /// It could be otherwise if pods went away.
    pub resolvable: bool,
}

impl Refusal {
    fn for_good(reason: Reason) -> Result<(), Refusal> {
        Err(Refusal { reasons: vec![reason], resolvable: false })
    }

    fn for_now(reason: Reason) -> Result<(), Refusal> {
        Err(Refusal { reasons: vec![reason], resolvable: true })
    }
}

/// A pod, and what has been counted for it. It can be supposed that pods come and go.
#[derive(Clone)]
pub struct Attempt<'a> {
    snapshot: &'a Snapshot,
    pod: &'a PodInfo,
    company: Company,
    spread: Counts,
}

impl<'a> Attempt<'a> {
    /// Counts.
    pub fn new(snapshot: &'a Snapshot, pod: &'a PodInfo) -> Attempt<'a> {
        let (company, spread) = (Company::of(pod, snapshot), Counts::required(pod, snapshot));
        Attempt { snapshot, pod, company, spread }
    }

    /// Supposes that another pod is on a node.
    pub fn add(&mut self, node: &mut NodeInfo, other: Arc<PodInfo>) {
        self.company.adjust(self.pod, &other, node.slot, 1, self.snapshot);
        self.spread.adjust(self.pod, &other, node.slot, 1);
        node.add(other);
    }

    /// Supposes that another pod is not there any more.
    pub fn remove(&mut self, node: &mut NodeInfo, uid: &str) {
        if let Some(other) = node.remove(uid) {
            self.company.adjust(self.pod, &other, node.slot, -1, self.snapshot);
            self.spread.adjust(self.pod, &other, node.slot, -1);
        }
    }

    /// Whether the pod fits on a node, both with and without those that are at least as important and for which room
    /// is being made there: they may yet go elsewhere.
    pub fn fits(&self, node: &NodeInfo) -> Result<(), Refusal> {
        let matters = |other: &&Arc<PodInfo>| other.priority >= self.pod.priority && other.uid != self.pod.uid;
        let mut expected = self.snapshot.nominated(&node.facts.name).iter().filter(matters).peekable();
        if expected.peek().is_some() {
            let (mut with, mut there) = (self.clone(), node.clone());
            expected.for_each(|other| with.add(&mut there, other.clone()));
            with.filter(&there)?;
        }
        self.filter(node)
    }

    fn filter(&self, node: &NodeInfo) -> Result<(), Refusal> {
        let (facts, pod) = (&node.facts, self.pod);
        if facts.unschedulable && !puts_up_with_cordons(pod) {
            return Refusal::for_good(Reason::Cordoned);
        }
        if let Some(taint) = untolerated(pod, facts, &["NoSchedule", "NoExecute"]) {
            return Refusal::for_good(Reason::Taint(taint.key.clone(), taint.value.clone().unwrap_or_default()));
        }
        if !node_matches(pod, facts) {
            return Refusal::for_good(Reason::Labels);
        }
        if !pod.ports.is_empty() {
            let taken = || node.pods.values().flat_map(|p| &p.ports);
            if pod.ports.iter().any(|wanted| taken().any(|have| wanted.conflicts(have))) {
                return Refusal::for_now(Reason::Ports);
            }
        }
        fit(pod, node)?;
        match self.spread.check(node.slot) {
            Err(Uneven::Skew) => return Refusal::for_now(Reason::Uneven(false)),
            Err(Uneven::MissingLabel) => return Refusal::for_good(Reason::Uneven(true)),
            Ok(()) => {}
        }
        match self.company.check(node.slot) {
            Ok(()) => Ok(()),
            // Company that is missing does not come by taking pods away.
            Err(why @ Unsocial::Affinity) => Refusal::for_good(Reason::Company(why)),
            Err(why) => Refusal::for_now(Reason::Company(why)),
        }
    }
}

fn puts_up_with_cordons(pod: &PodInfo) -> bool {
    let key = "node.kubernetes.io/unschedulable";
    let taint = Taint { key: key.into(), effect: "NoSchedule".into(), ..Default::default() };
    pod.tolerations.iter().any(|t| tolerates(t, &taint))
}

fn fit(pod: &PodInfo, node: &NodeInfo) -> Result<(), Refusal> {
    let mut refusal = Refusal { reasons: Vec::new(), resolvable: true };
    let (all, used, wanted) = (&node.facts.allocatable, &node.requested, &pod.requests);
    if node.pods.len() as i64 + 1 > node.facts.pods {
        refusal.reasons.push(Reason::Pods);
    }
    let mut compare = |name: &dyn Fn() -> Cow<'static, str>, wanted: i64, used: i64, all: i64| {
        if wanted > 0 && wanted > all - used {
            refusal.reasons.push(Reason::Resource(name()));
            // More than the whole node has is not there however many pods go.
            refusal.resolvable &= wanted <= all;
        }
    };
    compare(&|| "cpu".into(), wanted.cpu, used.cpu, all.cpu);
    compare(&|| "memory".into(), wanted.memory, used.memory, all.memory);
    compare(&|| "ephemeral-storage".into(), wanted.storage, used.storage, all.storage);
    for (name, wanted) in &wanted.other {
        let get = |amounts: &Resources| amounts.other.get(name).copied().unwrap_or_default();
        compare(&|| name.clone().into(), *wanted, get(used), get(all));
    }
    if refusal.reasons.is_empty() { Ok(()) } else { Err(refusal) }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Node, Pod};
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, zone: &str, spec: Value) -> Node {
        serde_json::from_value(
            json!({"metadata": {"name": name, "labels": {"zone": zone, "kubernetes.io/hostname": name}}, "spec": spec,
            "status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "3"}}}),
        )
        .unwrap()
    }

    fn pod(name: &str, spec: Value) -> Arc<PodInfo> {
        let mut spec = spec;
        if spec["containers"].is_null() {
            spec["containers"] = json!([{"name": "c"}]);
        }
        let pod: Pod = serde_json::from_value(
            json!({"metadata": {"name": name, "namespace": "n", "uid": name, "labels": {"app": "web"}}, "spec": spec}),
        )
        .unwrap();
        Arc::new(PodInfo::new(&pod))
    }

    fn cluster(nodes: &[Node], pods: &[(&str, Arc<PodInfo>)]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        nodes.iter().for_each(|n| {
            snapshot.set_node(n);
        });
        pods.iter().for_each(|(node, pod)| {
            snapshot.place(pod.clone(), node);
        });
        snapshot
    }

    fn check(snapshot: &Snapshot, pod: &PodInfo, expect: Result<&str, &str>) {
        let found = decide(snapshot, pod, &mut Search::seeded(1)).map_err(|d| d.to_string());
        assert_eq!(found.as_ref().map(String::as_str).map_err(String::as_str), expect, "{}", pod.name);
    }

    fn two() -> [Node; 2] {
        [node("a", "z1", json!({})), node("b", "z2", json!({}))]
    }

    fn asks(cpu: &str) -> Value {
        json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]})
    }

    #[test]
    fn resources() {
        let snapshot = cluster(&two(), &[("a", pod("x", asks("1500m")))]);
        check(&snapshot, &pod("p", asks("1")), Ok("b"));
        check(&snapshot, &pod("p", asks("3")), Err("0/2 nodes are available: 2 Insufficient cpu."));
        let full = cluster(
            &[node("a", "z", json!({}))],
            &[("a", pod("1", json!({}))), ("a", pod("2", json!({}))), ("a", pod("3", json!({})))],
        );
        check(&full, &pod("p", json!({})), Err("0/1 nodes are available: 1 Too many pods."));
        check(&Snapshot::default(), &pod("p", json!({})), Err("no nodes available to schedule pods"));
    }

    #[test]
    fn init_containers_and_sidecars_count_at_their_peak() {
        let containers = json!([{"name": "c", "resources": {"requests": {"cpu": "500m"}}}]);
        let request = |inits: Value| pod("p", json!({"containers": containers, "initContainers": inits})).requests.cpu;
        let init = |cpu: &str| json!({"name": "i", "resources": {"requests": {"cpu": cpu}}});
        let sidecar =
            |cpu: &str| json!({"name": "s", "restartPolicy": "Always", "resources": {"requests": {"cpu": cpu}}});
        assert_eq!(request(json!([init("300m")])), 500);
        assert_eq!(request(json!([init("900m")])), 900);
        assert_eq!(request(json!([sidecar("200m")])), 700);
        assert_eq!(request(json!([sidecar("200m"), init("900m")])), 1100);
        assert_eq!(request(json!([init("900m"), sidecar("200m")])), 900);
    }

    #[test]
    fn taints_and_cordons() {
        let tainted = node("a", "z1", json!({"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}));
        let snapshot = cluster(&[tainted], &[]);
        check(&snapshot, &pod("p", json!({})), Err("0/1 nodes are available: 1 node(s) had untolerated taint {k: v}."));
        check(&snapshot, &pod("p", json!({"tolerations": [{"key": "k", "operator": "Exists"}]})), Ok("a"));
        check(
            &snapshot,
            &pod("p", json!({"tolerations": [{"key": "k", "value": "w"}]})),
            Err("0/1 nodes are available: 1 node(s) had untolerated taint {k: v}."),
        );
        let cordoned = cluster(&[node("a", "z1", json!({"unschedulable": true}))], &[]);
        check(&cordoned, &pod("p", json!({})), Err("0/1 nodes are available: 1 node(s) were unschedulable."));
    }

    #[test]
    fn node_affinity() {
        let snapshot = cluster(&two(), &[]);
        check(&snapshot, &pod("p", json!({"nodeSelector": {"zone": "z2"}})), Ok("b"));
        let terms = |operator: &str, values: Value| {
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": operator, "values": values}]}]}}}})
        };
        check(&snapshot, &pod("p", terms("NotIn", json!(["z2"]))), Ok("a"));
        check(
            &snapshot,
            &pod("p", terms("In", json!(["z9"]))),
            Err("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."),
        );
    }

    #[test]
    fn host_ports() {
        let with =
            |port: u16| json!({"containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": port}]}]});
        let snapshot = cluster(&two(), &[("a", pod("x", with(80)))]);
        check(&snapshot, &pod("p", with(80)), Ok("b"));
        let snapshot = cluster(&two()[..1], &[("a", pod("x", with(80)))]);
        check(
            &snapshot,
            &pod("p", with(80)),
            Err("0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports."),
        );
    }

    fn company(kind: &str, key: &str) -> Value {
        json!({"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": key, "labelSelector": {"matchLabels": {"app": "web"}}}]}}})
    }

    #[test]
    fn pod_affinity() {
        let anti = company("podAntiAffinity", "zone");
        let snapshot = cluster(&two(), &[("a", pod("x", json!({})))]);
        check(&snapshot, &pod("p", anti.clone()), Ok("b"));
        // The one that is there cannot stand company, though the new one does not mind.
        let snapshot = cluster(&two(), &[("a", pod("x", anti.clone()))]);
        check(&snapshot, &pod("p", json!({})), Ok("b"));
        let snapshot = cluster(&two(), &[("a", pod("x", anti.clone())), ("b", pod("y", anti.clone()))]);
        check(
            &snapshot,
            &pod("p", json!({})),
            Err("0/2 nodes are available: 2 node(s) didn't satisfy existing pods anti-affinity rules."),
        );
        let affine = company("podAffinity", "zone");
        let snapshot = cluster(&two(), &[("b", pod("x", json!({})))]);
        check(&snapshot, &pod("p", affine.clone()), Ok("b"));
        // The first of its group.
        assert!(decide(&cluster(&two(), &[]), &pod("p", affine), &mut Search::seeded(1)).is_ok());
    }

    #[test]
    fn spread() {
        let spread = json!({"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {"matchLabels": {"app": "web"}}}]});
        let snapshot = cluster(&two(), &[("a", pod("x", json!({})))]);
        check(&snapshot, &pod("p", spread.clone()), Ok("b"));
        let full = cluster(
            &[node("a", "z1", json!({})), node("b", "z2", json!({"unschedulable": true}))],
            &[("a", pod("x", json!({})))],
        );
        check(
            &full,
            &pod("p", spread),
            Err(
                "0/2 nodes are available: 1 node(s) didn't match pod topology spread constraints, 1 node(s) were unschedulable.",
            ),
        );
    }

    #[test]
    fn an_unbound_claim_holds_a_pod_back() {
        let mut snapshot = cluster(&two(), &[]);
        let claimed = pod("p", json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]}));
        check(&snapshot, &claimed, Err("0/2 nodes are available: persistentvolumeclaim \"c\" not found."));
        snapshot.claims.insert(("n".into(), "c".into()), false);
        check(&snapshot, &claimed, Err("0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims."));
        snapshot.claims.insert(("n".into(), "c".into()), true);
        assert!(decide(&snapshot, &claimed, &mut Search::seeded(1)).is_ok());
    }

    proptest::proptest! {
        /// However pods come, a node is never given more than it has.
        #[test]
        fn no_node_is_overcommitted(asked in proptest::collection::vec(1i64..2500, 1..40), seed in 0u64..1000) {
            let mut snapshot = cluster(&two(), &[]);
            let mut search = Search::seeded(seed);
            for (index, cpu) in asked.iter().enumerate() {
                let pod = pod(&format!("p{index}"), asks(&format!("{cpu}m")));
                if let Ok(node) = decide(&snapshot, &pod, &mut search) {
                    snapshot.place(pod, &node);
                }
            }
            for node in snapshot.known() {
                proptest::prop_assert!(node.requested.cpu <= node.facts.allocatable.cpu);
                proptest::prop_assert!(node.pods.len() as i64 <= node.facts.pods);
            }
        }
    }
}
