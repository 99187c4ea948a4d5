//! The decision: a snapshot and a pod give a node, or the reasons why there is none. Pure.

use std::{collections::BTreeMap, fmt};

use rand::Rng;

use crate::{
    affinity::{Company, Unsocial, node_matches, untolerated},
    pod::PodInfo,
    score::score,
    snapshot::{NodeInfo, Snapshot},
    spread::{Counts, Uneven},
};

/// Why a pod fits on no node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// How many nodes there are.
    pub nodes: usize,
    /// How many nodes each reason rules out.
    pub reasons: BTreeMap<String, usize>,
    /// A reason that has nothing to do with nodes.
    pub pod: Option<String>,
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
        write!(f, "{}.", parts.join(", "))
    }
}

/// Finds the node for a pod. Among equals chance decides.
pub fn decide(snapshot: &Snapshot, pod: &PodInfo, random: &mut impl Rng) -> Result<String, Diagnosis> {
    let mut diagnosis = Diagnosis { nodes: snapshot.known().count(), reasons: BTreeMap::new(), pod: None };
    for claim in &pod.claims {
        match snapshot.claims.get(&(pod.namespace.clone(), claim.clone())) {
            None => diagnosis.pod = Some(format!("persistentvolumeclaim {claim:?} not found")),
            Some(false) => diagnosis.pod = Some("pod has unbound immediate PersistentVolumeClaims".into()),
            Some(true) => continue,
        }
        return Err(diagnosis);
    }
    let company = Company::of(pod, snapshot);
    let spread = Counts::of(pod, snapshot, true);
    let mut feasible = Vec::new();
    for node in snapshot.known() {
        let reasons = filter(snapshot, pod, node, &company, &spread);
        if reasons.is_empty() {
            feasible.push(node);
        }
        for reason in reasons {
            *diagnosis.reasons.entry(reason).or_default() += 1;
        }
    }
    if feasible.is_empty() {
        return Err(diagnosis);
    }
    let scores = score(snapshot, pod, &company, &feasible);
    let best = scores.iter().max().copied().unwrap_or_default();
    let equals: Vec<&&NodeInfo> = feasible.iter().zip(&scores).filter(|(_, s)| **s == best).map(|(n, _)| n).collect();
    Ok(equals[random.random_range(0..equals.len())].facts.name.clone())
}

/// The reasons against a node: those of the first filter that has any, as upstream's filters run one after another.
fn filter(
    snapshot: &Snapshot,
    pod: &PodInfo,
    node: &NodeInfo,
    company: &Company<'_>,
    spread: &Counts<'_>,
) -> Vec<String> {
    let facts = &node.facts;
    let cordon_tolerated = || {
        let taint = k8s_openapi::api::core::v1::Taint {
            key: "node.kubernetes.io/unschedulable".into(),
            effect: "NoSchedule".into(),
            ..Default::default()
        };
        pod.tolerations.iter().any(|t| crate::affinity::tolerates(t, &taint))
    };
    if facts.unschedulable && !cordon_tolerated() {
        return vec!["node(s) were unschedulable".into()];
    }
    if let Some(taint) = untolerated(pod, facts, &["NoSchedule", "NoExecute"]) {
        let value = taint.value.as_deref().unwrap_or_default();
        return vec![format!("node(s) had untolerated taint {{{}: {value}}}", taint.key)];
    }
    if !node_matches(pod, facts) {
        return vec!["node(s) didn't match Pod's node affinity/selector".into()];
    }
    let taken = || node.pods.values().flat_map(|p| &p.ports);
    if pod.ports.iter().any(|wanted| taken().any(|have| wanted.conflicts(have))) {
        return vec!["node(s) didn't have free ports for the requested pod ports".into()];
    }
    let short = fit(pod, node);
    if !short.is_empty() {
        return short;
    }
    match spread.check(pod, facts) {
        Err(Uneven::Skew) => return vec!["node(s) didn't match pod topology spread constraints".into()],
        Err(Uneven::MissingLabel) => {
            return vec!["node(s) didn't match pod topology spread constraints (missing required label)".into()];
        }
        Ok(()) => {}
    }
    let reason = match company.check(pod, facts, snapshot) {
        Ok(()) => return Vec::new(),
        Err(Unsocial::Affinity) => "node(s) didn't match pod affinity rules",
        Err(Unsocial::AntiAffinity) => "node(s) didn't match pod anti-affinity rules",
        Err(Unsocial::Existing) => "node(s) didn't satisfy existing pods anti-affinity rules",
    };
    vec![reason.into()]
}

fn fit(pod: &PodInfo, node: &NodeInfo) -> Vec<String> {
    let mut reasons = Vec::new();
    let (all, used, wanted) = (&node.facts.allocatable, &node.requested, &pod.requests);
    if node.pods.len() as i64 + 1 > node.facts.pods {
        reasons.push("Too many pods".to_owned());
    }
    for (name, wanted, used, all) in [
        ("cpu", wanted.cpu, used.cpu, all.cpu),
        ("memory", wanted.memory, used.memory, all.memory),
        ("ephemeral-storage", wanted.storage, used.storage, all.storage),
    ] {
        if wanted > 0 && wanted > all - used {
            reasons.push(format!("Insufficient {name}"));
        }
    }
    for (name, wanted) in wanted.other.iter().filter(|(_, n)| **n > 0) {
        let get = |map: &BTreeMap<String, i64>| map.get(name).copied().unwrap_or_default();
        if *wanted > get(&all.other) - get(&used.other) {
            reasons.push(format!("Insufficient {name}"));
        }
    }
    reasons
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::{Node, Pod};
    use rand::{SeedableRng, rngs::StdRng};
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
        let found = decide(snapshot, pod, &mut StdRng::seed_from_u64(1)).map_err(|d| d.to_string());
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
        assert!(decide(&cluster(&two(), &[]), &pod("p", affine), &mut StdRng::seed_from_u64(1)).is_ok());
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
        assert!(decide(&snapshot, &claimed, &mut StdRng::seed_from_u64(1)).is_ok());
    }

    proptest::proptest! {
        /// However pods come, a node is never given more than it has.
        #[test]
        fn no_node_is_overcommitted(asked in proptest::collection::vec(1i64..2500, 1..40), seed in 0u64..1000) {
            let mut snapshot = cluster(&two(), &[]);
            let mut random = StdRng::seed_from_u64(seed);
            for (index, cpu) in asked.iter().enumerate() {
                let pod = pod(&format!("p{index}"), asks(&format!("{cpu}m")));
                if let Ok(node) = decide(&snapshot, &pod, &mut random) {
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
