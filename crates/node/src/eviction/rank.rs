//! Which pod goes first, and what is said about it. Pure
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/#pod-selection-for-kubelet-eviction>).

use k8s_openapi::api::core::v1::Pod;

use super::state::Passed;
use crate::{
    pod::{
        self,
        qos::pod_request,
        quantity::{get_units, units},
    },
    pressure::Signal,
    static_pods,
    stats::PodDisks,
};

/// From this priority on pods are part of the system.
const CRITICAL: i32 = 2_000_000_000;

/// Whether a pod is never evicted.
pub fn is_critical(pod: &Pod) -> bool {
    let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
    static_pods::is_static(pod) || priority >= CRITICAL
}

/// What is known of a pod that may have to go.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its uid.
    pub uid: String,
    /// Its priority.
    pub priority: i32,
    /// What it uses of what is short; `None` if nobody knows.
    pub used: Option<u64>,
    /// What it asked for of it, 0 for nothing.
    pub requested: u64,
}

/// What a pod asked for of what is short.
pub fn requested(pod: &Pod, signal: Signal) -> u64 {
    let resource = match signal {
        Signal::Memory | Signal::Disk => signal.resource(),
        // Nobody can ask for these.
        Signal::Inodes | Signal::Pids => return 0,
    };
    let milli = pod.spec.as_ref().map_or(0, |spec| pod_request(spec, resource));
    u64::try_from(milli / 1000).unwrap_or_default()
}

/// Puts first who goes first: who uses more than it asked for, then who has less priority, then who uses most beyond what it
/// asked for. Process numbers cannot be asked for, so there priority comes first.
pub fn rank(signal: Signal, candidates: &mut [Candidate]) {
    candidates.sort_by_key(|c| {
        // One of which nothing is known is suspected of everything.
        let exceeds = c.used.is_none_or(|used| used > c.requested);
        let beyond = c.used.map_or(i128::MAX, |used| i128::from(used) - i128::from(c.requested));
        let within = signal != Signal::Pids && !exceeds;
        (within, c.priority, std::cmp::Reverse(beyond), c.uid.clone())
    });
}

/// What a container uses of what is short.
pub struct Used<'a> {
    /// Its name.
    pub name: &'a str,
    /// So much.
    pub used: u64,
}

/// What the pod's status says, in upstream's words.
pub fn message(pod: &Pod, passed: &Passed, containers: &[Used<'_>]) -> String {
    let (signal, resource) = (passed.signal, passed.signal.resource());
    let mut text = format!(
        "The node was low on resource: {resource}. Threshold quantity: {}, available: {}. ",
        signal.quantity(passed.least),
        signal.quantity(passed.level.available),
    );
    for container in containers {
        let spec = pod.spec.as_ref().and_then(|spec| pod::find_container(spec, container.name));
        let requests = spec.and_then(|(_, c)| c.resources).and_then(|r| r.requests);
        let requested = match signal {
            Signal::Memory | Signal::Disk => get_units(requests.as_ref(), resource).unwrap_or(0),
            Signal::Inodes | Signal::Pids => 0,
        };
        let requested = u64::try_from(requested).unwrap_or_default();
        if container.used > requested {
            text.push_str(&format!(
                "Container {} was using {}, request is {}, has larger consumption of {resource}. ",
                container.name,
                signal.quantity(container.used),
                signal.quantity(requested),
            ));
        }
    }
    text
}

/// Why a pod has more on the disk than it may, if it has
/// (<https://kubernetes.io/docs/concepts/storage/ephemeral-storage/#resource-ephemeral-storage-consumption>).
pub fn over_local_limit(pod: &Pod, disks: &PodDisks) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    for volume in spec.volumes.iter().flatten() {
        let limit = volume.empty_dir.as_ref().and_then(|source| source.size_limit.as_ref());
        let Some(limit) = limit.filter(|limit| units(&limit.0).is_some_and(|bytes| bytes > 0)) else { continue };
        let used = disks.volumes.get(&volume.name).map_or(0, |taken| taken.bytes);
        if i128::from(used) > units(&limit.0).unwrap_or(i128::MAX) {
            return Some(format!("Usage of EmptyDir volume {:?} exceeds the limit {:?}. ", volume.name, limit.0));
        }
    }
    let limit_of = |c: &k8s_openapi::api::core::v1::Container| {
        let limits = c.resources.as_ref().and_then(|r| r.limits.as_ref());
        limits.and_then(|limits| limits.get("ephemeral-storage")).cloned()
    };
    let mut whole: Option<i128> = Some(0);
    for container in pod::containers(spec) {
        let limit = limit_of(container.spec);
        let bytes = limit.as_ref().and_then(|limit| units(&limit.0));
        let own = [&disks.layers, &disks.logs].into_iter().filter_map(|all| all.get(&container.spec.name));
        let used: u64 = own.map(|taken| taken.bytes).sum();
        if let (Some(limit), Some(bytes)) = (&limit, bytes)
            && i128::from(used) > bytes
        {
            return Some(format!(
                "Container {} exceeded its local ephemeral storage limit {:?}. ",
                container.spec.name, limit.0
            ));
        }
        if container.class == pod::Class::Main {
            whole = whole.zip(bytes).map(|(sum, bytes)| sum + bytes);
        }
    }
    let whole = whole.filter(|limit| *limit > 0 && i128::from(disks.sum().bytes) > *limit)?;
    let limit = Signal::Disk.quantity(u64::try_from(whole).unwrap_or(u64::MAX));
    Some(format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use serde_json::json;

    use super::*;
    use crate::{pressure::Level, stats::read::Taken};

    #[test]
    fn who_goes_first() {
        let check = |signal, pods: &[(&str, i32, Option<u64>, u64)], expect: &[&str]| {
            let one = |(uid, priority, used, requested): &(&str, i32, Option<u64>, u64)| Candidate {
                uid: (*uid).to_owned(),
                priority: *priority,
                used: *used,
                requested: *requested,
            };
            let mut candidates: Vec<Candidate> = pods.iter().map(one).collect();
            rank(signal, &mut candidates);
            assert_eq!(candidates.iter().map(|c| c.uid.as_str()).collect::<Vec<_>>(), expect);
        };
        for signal in [Signal::Memory, Signal::Disk, Signal::Inodes] {
            check(
                signal,
                &[
                    ("modest-and-low", -5, Some(10), 20),
                    ("greedy", 0, Some(50), 20),
                    ("greedier", 0, Some(60), 20),
                    ("important-and-greedy", 100, Some(500), 20),
                    ("modest", 0, Some(19), 20),
                    ("unknown", 0, None, 20),
                ],
                &["unknown", "greedier", "greedy", "important-and-greedy", "modest-and-low", "modest"],
            );
        }
        check(
            Signal::Pids,
            &[("important", 100, Some(500), 0), ("many", 0, Some(50), 0), ("few", 0, Some(5), 0)],
            &["many", "few", "important"],
        );
    }

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    #[test]
    fn what_is_said() {
        let pod = pod(json!({"containers": [{"name": "a", "resources": {"requests": {"memory": "10Mi"}}},
            {"name": "b", "resources": {"requests": {"memory": "1Gi"}}}, {"name": "c"}]}));
        let level = Level { available: 50 << 20, capacity: 1 << 34 };
        let passed = |signal| Passed { signal, hard: true, least: 100 << 20, level };
        let used = |name, used| Used { name, used };
        let containers = [used("a", 20 << 20), used("b", 20 << 20), used("c", 4096)];
        assert_eq!(
            message(&pod, &passed(Signal::Memory), &containers),
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. Container a was using 20Mi, \
             request is 10Mi, has larger consumption of memory. Container c was using 4Ki, request is 0, has larger \
             consumption of memory. "
        );
        assert_eq!(requested(&pod, Signal::Memory), (1 << 30) + (10 << 20));
        assert_eq!(requested(&pod, Signal::Pids), 0);
        let passed = Passed { least: 3000, level: Level { available: 120, capacity: 30_000 }, ..passed(Signal::Pids) };
        assert_eq!(
            message(&pod, &passed, &[]),
            "The node was low on resource: pids. Threshold quantity: 3k, available: 120. "
        );
    }

    #[test]
    fn who_is_spared() {
        assert!(!is_critical(&pod(json!({"containers": [], "priority": 1_999_999_999}))));
        assert!(is_critical(&pod(json!({"containers": [], "priority": 2_000_000_000}))));
        let mut own = pod(json!({"containers": []}));
        own.metadata.annotations = Some([(static_pods::SOURCE.to_owned(), "file".to_owned())].into());
        assert!(is_critical(&own));
    }

    #[test]
    fn limits_on_the_disk() {
        let limited = json!({"containers": [
            {"name": "a", "resources": {"limits": {"ephemeral-storage": "1Mi"}}},
            {"name": "b", "resources": {"limits": {"ephemeral-storage": "1Mi"}}}],
            "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "2Mi"}}, {"name": "w", "emptyDir": {}}]});
        let mib = |n: u64| Taken { bytes: n << 20, inodes: 1 };
        let check = |layers: &[(&str, u64)], volumes: &[(&str, u64)], expect: Option<&str>| {
            let all = |list: &[(&str, u64)]| list.iter().map(|(name, n)| ((*name).to_owned(), mib(*n))).collect();
            let disks = PodDisks { layers: all(layers), logs: HashMap::new(), volumes: all(volumes) };
            assert_eq!(over_local_limit(&pod(limited.clone()), &disks).as_deref(), expect);
        };
        check(&[("a", 1)], &[("v", 1)], None);
        check(&[("a", 2)], &[], Some("Container a exceeded its local ephemeral storage limit \"1Mi\". "));
        check(&[], &[("v", 3)], Some("Usage of EmptyDir volume \"v\" exceeds the limit \"2Mi\". "));
        let whole = "Pod ephemeral local storage usage exceeds the total limit of containers 2Mi. ";
        check(&[], &[("w", 3)], Some(whole));
        let half = pod(json!({"containers": [{"name": "a", "resources": {"limits": {"ephemeral-storage": "1Mi"}}},
            {"name": "b"}]}));
        let disks = PodDisks { volumes: [("w".to_owned(), mib(9))].into(), ..Default::default() };
        assert_eq!(over_local_limit(&half, &disks), None, "one container has no limit");
    }
}
