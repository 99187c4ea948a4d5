//! Changing the resources of containers while they run (KEP-1287): what a pod should have, what the node has given it, and
//! what its containers have; and in which order cgroups follow.
//!
//! <https://kubernetes.io/docs/tasks/configure-pod-container/resize-container-resources/>

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    Class, containers, init_class,
    observed::{ContainerObs, Observed, State},
    qos::{self, Limits},
    quantity::get_milli,
};

/// Resources of containers by their names in the pod.
pub type Resources = BTreeMap<String, ResourceRequirements>;

/// What has to outlive the agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Given {
    /// What the node has given to containers, by name.
    pub allocated: Resources,
    /// What containers were made with, or changed to, by id.
    pub actuated: BTreeMap<String, ResourceRequirements>,
}

/// Why what a pod should have is not what it has been given: `Deferred` or `Infeasible`, and a message.
pub type Pending = (&'static str, String);

/// What the agent knows of the resources of a pod.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// By container id.
    pub actuated: BTreeMap<String, ResourceRequirements>,
    /// The pod's generation when it was given something else.
    pub generation: Option<i64>,
    /// What the pod's cgroup has.
    pub cgroup: Option<Limits>,
    /// The node does not give what the pod should have.
    pub pending: Option<Pending>,
    /// What went wrong when containers were to be given it.
    pub error: Option<String>,
}

/// What a pod should have. Containers that run before the others cannot be changed.
pub fn desired(spec: &PodSpec) -> Resources {
    let resizable = containers(spec).filter(|c| c.class != Class::Init);
    resizable.map(|c| (c.spec.name.clone(), c.spec.resources.clone().unwrap_or_default())).collect()
}

/// The pod with what it has been given.
pub fn with(pod: &Pod, allocated: &Resources) -> Pod {
    let mut pod = pod.clone();
    let Some(spec) = &mut pod.spec else { return pod };
    let sidecars = spec.init_containers.iter_mut().flatten().filter(|c| init_class(c) == Class::Sidecar);
    for container in sidecars.chain(&mut spec.containers) {
        if let Some(resources) = allocated.get(&container.name) {
            container.resources = Some(resources.clone());
        }
    }
    pod
}

/// What a container that runs needs to get what it has been given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It has it.
    Nothing,
    /// Other limits.
    Update,
    /// A new container: its `resizePolicy` says so.
    Restart,
}

/// What of a container's resources can be changed, in thousandths.
fn amounts(resources: Option<&ResourceRequirements>, name: &str) -> [Option<i64>; 2] {
    let Some(resources) = resources else { return [None, None] };
    [get_milli(resources.requests.as_ref(), name), get_milli(resources.limits.as_ref(), name)]
}

/// Compares what a container has been given (its spec) with what it was made with or changed to.
pub fn need(container: &Container, actuated: &ResourceRequirements) -> Need {
    let changed = |name: &&str| amounts(container.resources.as_ref(), name) != amounts(Some(actuated), name);
    let changed: Vec<&str> = ["cpu", "memory"].into_iter().filter(changed).collect();
    let restarts = |name: &str| {
        let mut policies = container.resize_policy.iter().flatten();
        policies.any(|p| p.resource_name == name && p.restart_policy == "RestartContainer")
    };
    match &changed[..] {
        [] => Need::Nothing,
        names if names.iter().any(|name| restarts(name)) => Need::Restart,
        _ => Need::Update,
    }
}

/// The containers that run and can be changed, with what each needs. `spec` says what they have been given.
pub fn needs<'a>(
    spec: &'a PodSpec,
    observed: &'a Observed,
    facts: &'a Facts,
) -> impl Iterator<Item = (&'a Container, &'a ContainerObs, Need)> {
    containers(spec).filter(|c| c.class != Class::Init).filter_map(|c| {
        let running = observed.active(&c.spec.name).filter(|o| o.state == State::Running)?;
        // One that was started a moment ago has what it has been given.
        let actuated = facts.actuated.get(&running.id)?;
        Some((c.spec, running, need(c.spec, actuated)))
    })
}

/// Whether a pod has yet to get what it has been given.
pub fn is_under_way(pod: &Pod, observed: &Observed, facts: &Facts) -> bool {
    let Some(spec) = &pod.spec else { return false };
    facts.cgroup.is_some_and(|limits| limits != qos::pod_limits(pod))
        || needs(spec, observed, facts).any(|(_, _, need)| need != Need::Nothing)
}

/// Something that is told new limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The pod's cgroup.
    Pod(Limits),
    /// The container with this id.
    Container(String, Limits),
}

/// Where 0 stands for no limit.
fn limit(a: i64, b: i64, choose: fn(i64, i64) -> i64, open: i64) -> i64 {
    match (a, b) {
        (0, other) | (other, 0) => {
            if open == 0 {
                0
            } else {
                other
            }
        }
        _ => choose(a, b),
    }
}

fn looser(a: Limits, b: Limits) -> Limits {
    Limits {
        cpu_shares: a.cpu_shares.max(b.cpu_shares),
        cpu_quota: limit(a.cpu_quota, b.cpu_quota, i64::max, 0),
        memory: limit(a.memory, b.memory, i64::max, 0),
    }
}

fn tighter(a: Limits, b: Limits) -> Limits {
    Limits {
        cpu_shares: a.cpu_shares.min(b.cpu_shares),
        cpu_quota: limit(a.cpu_quota, b.cpu_quota, i64::min, 1),
        memory: limit(a.memory, b.memory, i64::min, 1),
    }
}

/// Whether containers may be started before the pod's cgroup has been changed: not if it has less than they need.
pub fn has_room(pod: &Pod, facts: &Facts) -> bool {
    facts.cgroup.is_none_or(|has| looser(has, qos::pod_limits(pod)) == has)
}

/// How limits get from what they are to what they should be, so that at no time containers together may have more than
/// their pod: the pod grows first, then containers shrink, then the pod, then containers grow.
pub fn steps(pod: (Limits, Limits), containers: &[(String, Limits, Limits)]) -> Vec<Step> {
    let mut steps = Vec::new();
    let grown = looser(pod.0, pod.1);
    steps.extend((grown != pod.0).then_some(Step::Pod(grown)));
    for (id, before, after) in containers {
        let shrunk = tighter(*before, *after);
        steps.extend((shrunk != *before).then(|| Step::Container(id.clone(), shrunk)));
    }
    steps.extend((pod.1 != grown).then_some(Step::Pod(pod.1)));
    for (id, before, after) in containers {
        steps.extend((tighter(*before, *after) != *after).then(|| Step::Container(id.clone(), *after)));
    }
    steps
}

/// What is to be done for a pod (with what it has been given), and what each of these containers has then.
pub fn plan(pod: &Pod, observed: &Observed, facts: &Facts) -> (Vec<Step>, BTreeMap<String, ResourceRequirements>) {
    let Some(spec) = &pod.spec else { return Default::default() };
    let (mut limits, mut after) = (Vec::new(), BTreeMap::new());
    for (container, running, need) in needs(spec, observed, facts) {
        if need != Need::Update {
            continue;
        }
        let resources = facts.actuated.get(&running.id).cloned();
        let before = qos::container_limits(&Container { resources, ..Default::default() });
        limits.push((running.id.clone(), before, qos::container_limits(container)));
        after.insert(running.id.clone(), container.resources.clone().unwrap_or_default());
    }
    let target = qos::pod_limits(pod);
    (steps((facts.cgroup.unwrap_or(target), target), &limits), after)
}

/// What an event about a resize says: upstream's words, with the resources as JSON.
pub fn message(what: &str, pod: &Pod, error: Option<&str>) -> String {
    let Some(spec) = &pod.spec else { return what.to_owned() };
    let list = |class: &dyn Fn(Class) -> bool| -> Vec<_> {
        let all = containers(spec).filter(|c| class(c.class));
        all.map(|c| json!({"name": c.spec.name, "resources": c.spec.resources})).collect()
    };
    let mut said = json!({"generation": pod.metadata.generation.unwrap_or_default()});
    for (key, list) in
        [("initContainers", list(&|class| class != Class::Main)), ("containers", list(&|class| class == Class::Main))]
    {
        if !list.is_empty() {
            said[key] = list.into();
        }
    }
    if let Some(error) = error {
        said["error"] = error.into();
    }
    format!("{what}: {said}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(request: &str, limit: &str) -> ResourceRequirements {
        let list = |text: &str| -> BTreeMap<_, _> {
            text.split(',').filter_map(|one| one.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
        };
        serde_json::from_value(json!({"requests": list(request), "limits": list(limit)})).unwrap()
    }

    #[test]
    fn what_a_container_needs() {
        let check = |policy: &str, now: (&str, &str), was: (&str, &str), expect: Need| {
            let container = Container {
                resources: Some(resources(now.0, now.1)),
                resize_policy: serde_json::from_value(
                    json!([{"resourceName": policy, "restartPolicy": "RestartContainer"}]),
                )
                .unwrap(),
                ..Default::default()
            };
            assert_eq!(need(&container, &resources(was.0, was.1)), expect, "{now:?} {was:?}");
        };
        check("memory", ("cpu=1", ""), ("cpu=1000m", ""), Need::Nothing);
        check("memory", ("cpu=2", ""), ("cpu=1", ""), Need::Update);
        check("cpu", ("cpu=2", ""), ("cpu=1", ""), Need::Restart);
        check("memory", ("cpu=2", "memory=2Gi"), ("cpu=1", "memory=1Gi"), Need::Restart);
        check("memory", ("cpu=1,a/b=1", ""), ("cpu=1", ""), Need::Nothing);
    }

    #[test]
    fn order_of_limits() {
        let of = |cpu: i64, memory: i64| Limits { cpu_shares: 2, cpu_quota: cpu, memory };
        let check = |pod: (Limits, Limits), containers: &[(Limits, Limits)], expect: &[Step]| {
            let named: Vec<_> = containers.iter().zip(["a", "b"]).map(|((x, y), id)| (id.to_owned(), *x, *y)).collect();
            assert_eq!(steps(pod, &named), expect, "{pod:?} {containers:?}");
        };
        let (pod, container) = (Step::Pod, |id: &str, limits| Step::Container(id.to_owned(), limits));
        check((of(2, 2), of(2, 2)), &[(of(1, 1), of(1, 1))], &[]);
        check((of(1, 1), of(2, 1)), &[(of(1, 1), of(2, 1))], &[pod(of(2, 1)), container("a", of(2, 1))]);
        check((of(2, 1), of(1, 1)), &[(of(2, 1), of(1, 1))], &[container("a", of(1, 1)), pod(of(1, 1))]);
        // One grows by what the other gives away.
        check(
            (of(3, 3), of(3, 3)),
            &[(of(1, 1), of(2, 2)), (of(2, 2), of(1, 1))],
            &[container("b", of(1, 1)), container("a", of(2, 2))],
        );
        // More of one, less of the other.
        check(
            (of(1, 2), of(2, 1)),
            &[(of(1, 2), of(2, 1))],
            &[pod(of(2, 2)), container("a", of(1, 1)), pod(of(2, 1)), container("a", of(2, 1))],
        );
        // No limit is the most.
        check((of(0, 0), of(0, 1)), &[(of(0, 0), of(0, 1))], &[container("a", of(0, 1)), pod(of(0, 1))]);
    }

    #[test]
    fn what_is_given_stands_in_for_what_is_wanted() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "generation": 3}, "spec": {
            "initContainers": [{"name": "i", "resources": {"requests": {"cpu": "1"}}}],
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "1"}}}]}}))
        .unwrap();
        let spec = pod.spec.as_ref().unwrap();
        let mut given = desired(spec);
        assert_eq!(given.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(with(&pod, &given), pod);
        given.insert("a".into(), resources("cpu=2", ""));
        given.insert("i".into(), resources("cpu=2", ""));
        let found = with(&pod, &given).spec.unwrap();
        assert_eq!(found.containers[0].resources, Some(resources("cpu=2", "")));
        assert_eq!(found.init_containers, spec.init_containers);
        let said = message("Pod resize Infeasible", &pod, Some("too much"));
        let (what, body) = said.split_once(": ").unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(
            (what, &body["generation"], &body["error"]),
            ("Pod resize Infeasible", &json!(3), &json!("too much"))
        );
        assert_eq!(body["containers"][0], json!({"name": "a", "resources": {"requests": {"cpu": "1"}}}));
    }
}
