//! Which machine answers for which address. Pure.
//!
//! Every machine works this out by itself, from what the API said last and what the gossip says now. Those that know the
//! same come to the same answer: each address ranks the machines by a hash, and the first that lives has it. When one dies
//! its addresses move, and no others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::ResourceExt as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{CONDITION, EXCLUDED};
use crate::verdict::Verdict;

/// Namespace and name.
pub type Key = (String, String);

/// A Service that has addresses of the pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balanced {
    /// Its addresses.
    pub ips: BTreeSet<IpAddr>,
    /// Whether only machines with an endpoint may answer (`externalTrafficPolicy: Local`).
    pub local: bool,
}

/// What counts of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Whether its agent says that it is well.
    pub ready: bool,
    /// Whether it is not to answer for anything
    /// (<https://kubernetes.io/docs/reference/labels-annotations-taints/#node-kubernetes-io-exclude-from-external-load-balancers>).
    pub excluded: bool,
}

/// What is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The Services.
    pub services: BTreeMap<Key, Balanced>,
    /// Of a slice, by its name: whose it is, and the machines with endpoints that serve.
    pub slices: BTreeMap<Key, (String, BTreeSet<String>)>,
    /// The machines, by an empty namespace and name.
    pub machines: BTreeMap<Key, Candidate>,
}

/// A Service as it counts.
pub fn service(object: Service) -> (Key, Balanced) {
    let key = (object.namespace().unwrap_or_default(), object.name_any());
    let status = object.status.unwrap_or_default();
    let given = status.conditions.iter().flatten().any(|c| c.type_ == CONDITION && c.status == "True");
    let ingress = status.load_balancer.and_then(|l| l.ingress).unwrap_or_default();
    let spec = object.spec.unwrap_or_default();
    let counts = given && spec.type_.as_deref() == Some("LoadBalancer");
    let ips = ingress.into_iter().filter(|_| counts).filter_map(|i| i.ip?.parse().ok()).collect();
    (key, Balanced { ips, local: spec.external_traffic_policy.as_deref() == Some("Local") })
}

/// A slice as it counts.
pub fn slice(object: EndpointSlice) -> (Key, (String, BTreeSet<String>)) {
    let key = (object.namespace().unwrap_or_default(), object.name_any());
    let of = object.labels().get("kubernetes.io/service-name").cloned().unwrap_or_default();
    let serves = |e: &k8s_openapi::api::discovery::v1::Endpoint| {
        let conditions = e.conditions.clone().unwrap_or_default();
        conditions.ready.unwrap_or(true)
    };
    let endpoints = object.endpoints.unwrap_or_default();
    let nodes = endpoints.into_iter().filter(serves).filter_map(|e| e.node_name).collect();
    (key, (of, nodes))
}

/// A machine as it counts.
pub fn machine(object: Node) -> (Key, Candidate) {
    let conditions = object.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True");
    let excluded = object.labels().contains_key(EXCLUDED);
    ((String::new(), object.name_any()), Candidate { ready, excluded })
}

/// The rank of a machine for an address: of two the higher one answers.
fn rank(ip: IpAddr, machine: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(ip.to_string());
    hash.update([0]);
    hash.update(machine);
    hash.finalize().into()
}

/// Who answers for each address; one for which nobody can is left out.
pub fn owners<'a>(state: &'a State, verdicts: &BTreeMap<String, Verdict>) -> BTreeMap<IpAddr, &'a str> {
    // One that is not ready answers only if nobody else can: where all seem to be unwell, it is likelier that they cannot
    // say so.
    let lives = |name: &str| verdicts.get(name) != Some(&Verdict::Dead);
    let all = || state.machines.iter().map(|((_, name), m)| (name.as_str(), m));
    let candidates = || all().filter(|(name, m)| !m.excluded && lives(name));
    let mut owners = BTreeMap::new();
    for (key, service) in &state.services {
        let here: BTreeSet<&str> = match service.local {
            false => BTreeSet::new(),
            true => {
                let slices = state.slices.range((key.0.clone(), String::new())..);
                let slices = slices.take_while(|((ns, _), _)| *ns == key.0);
                slices
                    .filter(|(_, (of, _))| *of == key.1)
                    .flat_map(|(_, (_, on))| on.iter().map(String::as_str))
                    .collect()
            }
        };
        let may = |name: &str| !service.local || here.contains(name);
        for ip in &service.ips {
            let best = |ready: bool| {
                let some = candidates().filter(|(name, m)| m.ready == ready && may(name));
                some.map(|(name, _)| name).max_by_key(|name| rank(*ip, name))
            };
            if let Some(owner) = best(true).or_else(|| best(false)) {
                owners.insert(*ip, owner);
            }
        }
    }
    owners
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn state(policy: &str, endpoints: &[&str]) -> State {
        let mut state = State::default();
        for name in ["a", "b", "c"] {
            let status = json!({"conditions": [{"type": "Ready", "status": "True"}]});
            let node = json!({"metadata": {"name": name}, "status": status});
            state.machines.extend([machine(serde_json::from_value(node).unwrap())]);
        }
        state.services.extend([service(balanced(policy, CONDITION))]);
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(
                |e| json!({"addresses": ["10.1.0.2"], "nodeName": &e[..1], "conditions": {"ready": !e.ends_with('-')}}),
            )
            .collect();
        let object = json!({
            "metadata": {"namespace": "n", "name": "s-1", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4", "endpoints": endpoints,
        });
        state.slices.extend([slice(serde_json::from_value(object).unwrap())]);
        state
    }

    fn balanced(policy: &str, condition: &str) -> Service {
        let condition = json!({"type": condition, "status": "True", "reason": "r", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let ingress: Vec<Value> = (1..=30).map(|n| json!({"ip": format!("192.0.2.{n}")})).collect();
        serde_json::from_value(json!({
            "metadata": {"namespace": "n", "name": "s"},
            "spec": {"type": "LoadBalancer", "externalTrafficPolicy": policy},
            "status": {"loadBalancer": {"ingress": ingress}, "conditions": [condition]},
        }))
        .unwrap()
    }

    fn of(words: &[(&str, Verdict)]) -> BTreeMap<String, Verdict> {
        words.iter().map(|(name, verdict)| ((*name).to_owned(), *verdict)).collect()
    }

    fn answering(owners: &BTreeMap<IpAddr, &str>) -> BTreeSet<String> {
        owners.values().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn only_what_was_on_the_dead_one_moves() {
        let state = state("Cluster", &[]);
        let before = owners(&state, &BTreeMap::new());
        assert_eq!(before.len(), 30);
        assert_eq!(answering(&before).len(), 3, "they share the work");
        assert_eq!(before, owners(&state, &of(&[("a", Verdict::Suspect)])), "a doubt moves nothing");
        let after = owners(&state, &of(&[("a", Verdict::Dead)]));
        for (ip, owner) in &before {
            assert!(if *owner == "a" { after[ip] != "a" } else { after[ip] == *owner }, "{ip}");
        }
        assert!(owners(&state, &of(&[("a", Verdict::Dead), ("b", Verdict::Dead), ("c", Verdict::Dead)])).is_empty());
    }

    #[test]
    fn who_may_answer() {
        let check = |policy: &str, endpoints: &[&str], change: &dyn Fn(&mut State), expect: &[&str]| {
            let mut state = state(policy, endpoints);
            change(&mut state);
            let expect: BTreeSet<String> = expect.iter().map(|e| (*e).to_owned()).collect();
            assert_eq!(answering(&owners(&state, &BTreeMap::new())), expect, "{policy} {endpoints:?}");
        };
        let nothing: &dyn Fn(&mut State) = &|_| {};
        check("Cluster", &["b"], nothing, &["a", "b", "c"]);
        check("Local", &["b", "c-"], nothing, &["b"]);
        check("Local", &["b", "c"], nothing, &["b", "c"]);
        check("Local", &[], nothing, &[]);
        let set = |state: &mut State, name: &str, ready: bool, excluded: bool| {
            state.machines.insert((String::new(), name.into()), Candidate { ready, excluded });
        };
        check("Cluster", &[], &|s| set(s, "a", false, false), &["b", "c"]);
        check("Cluster", &[], &|s| set(s, "a", true, true), &["b", "c"]);
        check("Local", &["a"], &|s| set(s, "a", false, false), &["a"]);
        check("Cluster", &[], &|s| ["a", "b", "c"].iter().for_each(|n| set(s, n, false, false)), &["a", "b", "c"]);
    }

    /// Another balancer's addresses are not ours to answer for.
    #[test]
    fn only_addresses_that_were_given_here() {
        assert_eq!(service(balanced("Cluster", "other.example/given")).1.ips.len(), 0);
        assert_eq!(service(balanced("Cluster", CONDITION)).1.ips.len(), 30);
        let mut changed = balanced("Cluster", CONDITION);
        changed.spec.as_mut().unwrap().type_ = Some("NodePort".into());
        assert_eq!(service(changed).1.ips.len(), 0);
    }
}
