//! Rules about what runs in the cluster: replicas, where they are, what may be taken away of them at a time.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{
    Finding, Severity,
    facts::{Facts, beside, has_all, is_true, selects, title},
};

pub(super) const REPLICAS: &str = "replicas";
pub(super) const SPREAD: &str = "spread";
pub(super) const BUDGET: &str = "budget";
pub(super) const BLOCKED: &str = "blocked-drain";
pub(super) const PROBE: &str = "probe";
pub(super) const LOCAL: &str = "local-volume";
pub(super) const TOLERATION: &str = "toleration";

const ZONE: &str = "topology.kubernetes.io/zone";
const HOST: &str = "kubernetes.io/hostname";
/// What `DefaultTolerationSeconds` gives to pods in Kubernetes.
const LONG: i64 = 300;

/// How many replicas a workload wants.
pub fn replicas_of(workload: &Value) -> i64 {
    workload["spec"]["replicas"].as_i64().unwrap_or(1)
}

fn kind(workload: &Value) -> &str {
    workload["kind"].as_str().unwrap_or_default()
}

/// `-n NAMESPACE`, and the workload as kubectl takes it.
fn handle(workload: &Value) -> (String, String) {
    let meta = &workload["metadata"];
    let name = meta["name"].as_str().unwrap_or_default();
    let namespace = format!("-n {}", meta["namespace"].as_str().unwrap_or_default());
    (namespace, format!("{}/{name}", kind(workload).to_lowercase()))
}

fn pods_of<'a>(facts: &'a Facts, workload: &'a Value) -> impl Iterator<Item = &'a Value> {
    let mine =
        |pod: &&Value| beside(pod, workload) && selects(&workload["spec"]["selector"], &pod["metadata"]["labels"]);
    facts.pods.iter().filter(mine)
}

/// Whether clients reach it by a Service.
fn is_served(facts: &Facts, workload: &Value) -> bool {
    let labels = &workload["spec"]["template"]["metadata"]["labels"];
    let leads = |service: &Value| {
        let selector = &service["spec"]["selector"];
        selector.as_object().is_some_and(|s| !s.is_empty()) && beside(service, workload) && has_all(selector, labels)
    };
    facts.services.iter().any(leads)
}

fn finding(workload: &Value, severity: Severity, rule: &'static str, why: impl Into<String>, mend: String) -> Finding {
    Finding { severity, rule, object: title(workload, kind(workload)), why: why.into(), mend }
}

/// One replica where a machine's death then means an outage.
pub fn replicas(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    // What DNS needs has a rule of its own.
    let is_dns = |w: &Value| w["spec"]["template"]["metadata"]["labels"]["k8s-app"] == "kube-dns";
    for workload in facts.workloads.iter().filter(|w| replicas_of(w) == 1 && !is_dns(w)) {
        let (namespace, name) = handle(workload);
        let (severity, why) = match is_served(facts, workload) {
            true => (
                Severity::Warning,
                "It has one replica and clients: they wait until a dead machine's pod is made anew.",
            ),
            false => (Severity::Info, "It has one replica: its work rests until a dead machine's pod is made anew."),
        };
        let mend = format!("kubectl {namespace} scale {name} --replicas=2, if it can run twice");
        found.push(finding(workload, severity, REPLICAS, why, mend));
    }
    found
}

/// Replicas that share a machine, or a zone, though there are others.
pub fn spread(facts: &Facts) -> Vec<Finding> {
    let usable = |node: &&Value| is_true(node, "Ready") && node["spec"]["unschedulable"] != true;
    let zone_of = |node: &Value| node["metadata"]["labels"][ZONE].as_str().map(str::to_owned);
    let nodes: Vec<&Value> = facts.nodes.iter().filter(usable).collect();
    let zones: BTreeSet<String> = nodes.iter().filter_map(|node| zone_of(node)).collect();
    let mut found = Vec::new();
    for workload in facts.workloads.iter().filter(|w| replicas_of(w) > 1) {
        let ready: Vec<&str> = pods_of(facts, workload)
            .filter(|pod| is_true(pod, "Ready"))
            .filter_map(|pod| pod["spec"]["nodeName"].as_str())
            .collect();
        let machines: BTreeSet<&str> = ready.iter().copied().collect();
        let named = |name: &str| nodes.iter().find(|node| node["metadata"]["name"] == name);
        let in_zones: BTreeSet<String> = machines.iter().filter_map(|name| zone_of(named(name)?)).collect();
        let (what, key) = match () {
            () if ready.len() > 1 && machines.len() == 1 && nodes.len() > 1 => ("machine", HOST),
            () if ready.len() > 1 && in_zones.len() == 1 && zones.len() > 1 => ("zone", ZONE),
            () => continue,
        };
        let constraint = json!({"spec": {"template": {"spec": {"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": workload["spec"]["selector"]}]}}}});
        let (namespace, name) = handle(workload);
        let why = format!("All of its {} replicas that are ready are in one {what}.", ready.len());
        found.push(finding(
            workload,
            Severity::Warning,
            SPREAD,
            why,
            format!("kubectl {namespace} patch {name} -p '{constraint}'"),
        ));
    }
    found
}

/// Several replicas, and nothing that keeps a drain from taking them all at once.
pub fn budget(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    for workload in facts.workloads.iter().filter(|w| replicas_of(w) > 1) {
        let labels = &workload["spec"]["template"]["metadata"]["labels"];
        let covers = |budget: &Value| beside(budget, workload) && selects(&budget["spec"]["selector"], labels);
        if facts.budgets.iter().any(covers) {
            continue;
        }
        let selector: Vec<String> = workload["spec"]["selector"]["matchLabels"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
            .collect();
        let (namespace, _) = handle(workload);
        let name = workload["metadata"]["name"].as_str().unwrap_or_default();
        found.push(finding(
            workload,
            Severity::Warning,
            BUDGET,
            "No PodDisruptionBudget covers it: two drains at a time can take all of its replicas.",
            format!(
                "kubectl {namespace} create poddisruptionbudget {name} --selector={} --max-unavailable=1",
                selector.join(",")
            ),
        ));
    }
    found
}

/// Budgets that never let anything go, so that no machine can be drained.
pub fn blocked(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    for budget in &facts.budgets {
        let status = &budget["status"];
        let (Some(expected), Some(desired)) = (status["expectedPods"].as_i64(), status["desiredHealthy"].as_i64())
        else {
            continue;
        };
        if expected < 1 || desired < expected {
            continue;
        }
        let meta = &budget["metadata"];
        let (namespace, name) =
            (meta["namespace"].as_str().unwrap_or_default(), meta["name"].as_str().unwrap_or_default());
        found.push(Finding {
            severity: Severity::Warning,
            rule: BLOCKED,
            object: title(budget, "PodDisruptionBudget"),
            why: format!(
                "It wants {desired} of {expected} pods at all times: no machine with one of them can be drained."
            ),
            mend: format!(
                "kubectl -n {namespace} patch pdb {name} --type=merge -p \
                 '{{\"spec\":{{\"minAvailable\":null,\"maxUnavailable\":1}}}}', with a replica to spare"
            ),
        });
    }
    found
}

/// Containers that clients are sent to before they say that they are ready.
pub fn probe(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    for workload in facts.workloads.iter().filter(|w| replicas_of(w) > 0 && is_served(facts, w)) {
        let containers = workload["spec"]["template"]["spec"]["containers"].as_array().into_iter().flatten();
        let blind: Vec<&str> = containers
            .filter(|c| c["ports"].as_array().is_some_and(|ports| !ports.is_empty()) && c["readinessProbe"].is_null())
            .filter_map(|c| c["name"].as_str())
            .collect();
        if blind.is_empty() {
            continue;
        }
        let (namespace, name) = handle(workload);
        found.push(finding(
            workload,
            Severity::Warning,
            PROBE,
            format!("{} of it has no readiness probe: clients are sent there before it can answer.", blind.join(", ")),
            format!("kubectl {namespace} edit {name}: give {} a readinessProbe", blind.join(", ")),
        ));
    }
    found
}

/// Data that is on one machine's disk.
pub fn local(facts: &Facts) -> Vec<Finding> {
    let is_local = |claim: &str, namespace: &Value| {
        let claim =
            facts.claims.iter().find(|c| c["metadata"]["name"] == claim && c["metadata"]["namespace"] == *namespace);
        let volume = claim.and_then(|claim| claim["spec"]["volumeName"].as_str());
        let volume = volume.and_then(|name| facts.volumes.iter().find(|v| v["metadata"]["name"] == name));
        volume.is_some_and(|v| v["spec"]["local"].is_object() || v["spec"]["hostPath"].is_object())
    };
    let mut found = Vec::new();
    for workload in &facts.workloads {
        let mut named: BTreeSet<String> = BTreeSet::new();
        for pod in pods_of(facts, workload).chain([&workload["spec"]["template"]]) {
            for volume in pod["spec"]["volumes"].as_array().into_iter().flatten() {
                let name = volume["name"].as_str().unwrap_or_default().to_owned();
                let claim = volume["persistentVolumeClaim"]["claimName"].as_str();
                if volume["hostPath"].is_object()
                    || claim.is_some_and(|claim| is_local(claim, &workload["metadata"]["namespace"]))
                {
                    named.insert(name);
                }
            }
        }
        if named.is_empty() {
            continue;
        }
        let named = named.into_iter().collect::<Vec<_>>().join(", ");
        found.push(finding(
            workload,
            Severity::Warning,
            LOCAL,
            format!("Its volume {named} is on one machine's disk, and gone for as long as that machine is."),
            "replicate in the application, or use volumes of a storage that all machines reach".into(),
        ));
    }
    found
}

/// Pods that stay for long on machines that are gone.
pub fn toleration(facts: &Facts) -> Vec<Finding> {
    let gone = |t: &Value| {
        let key = t["key"].as_str().unwrap_or_default();
        let effect = t["effect"].as_str().unwrap_or_default();
        ["", "node.kubernetes.io/unreachable"].contains(&key) && ["", "NoExecute"].contains(&effect)
    };
    let mut found = Vec::new();
    for workload in facts.workloads.iter().filter(|w| replicas_of(w) > 0) {
        let all = pods_of(facts, workload).flat_map(|pod| pod["spec"]["tolerations"].as_array().into_iter().flatten());
        let all: Vec<&Value> = all.filter(|toleration| gone(toleration)).collect();
        let for_ever = all.iter().any(|t| t["tolerationSeconds"].is_null());
        let longest = all.iter().filter_map(|t| t["tolerationSeconds"].as_i64()).max().unwrap_or_default();
        let why = match (for_ever, longest) {
            (true, _) => "Its pods tolerate an unreachable machine for ever: nobody replaces them.".to_owned(),
            (false, LONG..) => {
                format!("Its pods stay for {longest} s on a machine that is gone before they are replaced.")
            }
            _ => continue,
        };
        let (namespace, name) = handle(workload);
        found.push(finding(
            workload,
            Severity::Warning,
            TOLERATION,
            why,
            format!(
                "kubectl {namespace} edit {name}: tolerate node.kubernetes.io/unreachable and not-ready for some seconds; or \
                 for all new pods, seawall server --default-unreachable-toleration-seconds"
            ),
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(replicas: i64) -> Value {
        json!({"kind": "Deployment", "metadata": {"name": "web", "namespace": "a"}, "spec": {"replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "ports": [{"containerPort": 80}]}]}}}})
    }

    fn pod(node: &str, spec: Value) -> Value {
        let mut pod = json!({"metadata": {"namespace": "a", "labels": {"app": "web"}}, "spec": spec,
            "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        pod["spec"]["nodeName"] = node.into();
        pod
    }

    fn node(name: &str, zone: &str) -> Value {
        json!({"metadata": {"name": name, "labels": {ZONE: zone}}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    }

    fn service() -> Value {
        json!({"metadata": {"name": "web", "namespace": "a"}, "spec": {"selector": {"app": "web"}}})
    }

    #[test]
    fn too_few_replicas() {
        let check = |replicas_: i64, services: Vec<Value>, expect: Option<Severity>| {
            let facts = Facts { workloads: vec![deployment(replicas_)], services, ..Facts::default() };
            let found = replicas(&facts);
            assert_eq!(found.first().map(|f| f.severity), expect, "{found:?}");
        };
        check(1, vec![service()], Some(Severity::Warning));
        check(1, vec![], Some(Severity::Info));
        check(2, vec![service()], None);
        check(0, vec![service()], None);
        let mut elsewhere = service();
        elsewhere["metadata"]["namespace"] = "b".into();
        check(1, vec![elsewhere], Some(Severity::Info));
    }

    #[test]
    fn replicas_in_one_place() {
        let check = |nodes: &[(&str, &str)], places: &[&str], expect: Option<&str>| {
            let facts = Facts {
                nodes: nodes.iter().map(|(name, zone)| node(name, zone)).collect(),
                pods: places.iter().map(|name| pod(name, json!({}))).collect(),
                workloads: vec![deployment(2)],
                ..Facts::default()
            };
            let found = spread(&facts);
            assert_eq!(found.first().map(|f| f.why.as_str()), expect, "{found:?}");
        };
        let two = [("n1", "z1"), ("n2", "z2")];
        check(&two, &["n1", "n1"], Some("All of its 2 replicas that are ready are in one machine."));
        check(&two, &["n1", "n2"], None);
        check(&two[..1], &["n1", "n1"], None);
        check(&two, &["n1"], None);
        let three = [("n1", "z1"), ("n2", "z1"), ("n3", "z2")];
        check(&three, &["n1", "n2"], Some("All of its 2 replicas that are ready are in one zone."));
        check(&three, &["n1", "n3"], None);
    }

    #[test]
    fn budgets() {
        let budget_ = |spec: Value, expected: i64, desired: i64| {
            let mut budget = json!({"metadata": {"name": "b", "namespace": "a"}, "spec": spec,
                "status": {"expectedPods": expected, "desiredHealthy": desired}});
            budget["spec"]["selector"] = json!({"matchLabels": {"app": "web"}});
            budget
        };
        let facts = |replicas: i64, budgets: Vec<Value>| Facts {
            workloads: vec![deployment(replicas)],
            budgets,
            ..Facts::default()
        };
        let none = budget(&facts(2, vec![]));
        assert_eq!(none[0].mend, "kubectl -n a create poddisruptionbudget web --selector=app=web --max-unavailable=1");
        assert_eq!(budget(&facts(2, vec![budget_(json!({"maxUnavailable": 1}), 2, 1)])), []);
        assert_eq!(budget(&facts(1, vec![])), []);
        assert_eq!(blocked(&facts(2, vec![budget_(json!({"maxUnavailable": 1}), 2, 1)])), []);
        let all = blocked(&facts(2, vec![budget_(json!({"minAvailable": 2}), 2, 2)]));
        assert_eq!(all[0].object, "PodDisruptionBudget a/b");
        assert_eq!(blocked(&facts(2, vec![budget_(json!({"minAvailable": 1}), 0, 1)])), []);
    }

    #[test]
    fn probes() {
        let check = |workload: Value, services: Vec<Value>, expect: usize| {
            let facts = Facts { workloads: vec![workload], services, ..Facts::default() };
            assert_eq!(probe(&facts).len(), expect);
        };
        check(deployment(1), vec![service()], 1);
        check(deployment(1), vec![], 0);
        let mut probed = deployment(1);
        probed["spec"]["template"]["spec"]["containers"][0]["readinessProbe"] = json!({});
        check(probed, vec![service()], 0);
    }

    #[test]
    fn data_on_one_disk() {
        let check = |volume: Value, source: Value, expect: usize| {
            let facts = Facts {
                workloads: vec![deployment(1)],
                pods: vec![pod("n", json!({"volumes": [volume]}))],
                claims: vec![json!({"metadata": {"name": "c", "namespace": "a"}, "spec": {"volumeName": "v"}})],
                volumes: vec![json!({"metadata": {"name": "v"}, "spec": source})],
                ..Facts::default()
            };
            assert_eq!(local(&facts).len(), expect, "{facts:?}");
        };
        let claim = json!({"name": "data", "persistentVolumeClaim": {"claimName": "c"}});
        check(json!({"name": "data", "hostPath": {"path": "/x"}}), json!({}), 1);
        check(claim.clone(), json!({"local": {"path": "/x"}}), 1);
        check(claim, json!({"csi": {"driver": "d"}}), 0);
        check(json!({"name": "data", "emptyDir": {}}), json!({}), 0);
    }

    #[test]
    fn tolerations_that_wait() {
        let check = |tolerations: Value, expect: Option<&str>| {
            let pods = vec![pod("n", json!({"tolerations": tolerations}))];
            let found = toleration(&Facts { workloads: vec![deployment(1)], pods, ..Facts::default() });
            assert_eq!(
                found.first().map(|f| f.why.contains(expect.unwrap_or("never"))),
                expect.map(|_| true),
                "{found:?}"
            );
        };
        let of = |seconds: i64| json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}]);
        check(of(300), Some("300 s"));
        check(of(5), None);
        check(json!([{"operator": "Exists"}]), Some("for ever"));
        check(json!([{"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"}]), None);
        check(json!([]), None);
    }
}
