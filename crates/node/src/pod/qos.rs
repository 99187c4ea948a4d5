//! Quality of service: the class, the OOM score, and the cgroup figures that follow from requests and limits.
//!
//! <https://kubernetes.io/docs/concepts/workloads/pods/pod-qos/>

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::{
    Class, containers,
    quantity::{get_milli, get_units},
};

/// A pod's class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qos {
    /// Every container has limits equal to its requests, for cpu and memory.
    Guaranteed,
    /// Some request or limit is set.
    Burstable,
    /// Nothing is set.
    BestEffort,
}

/// Computes the class; the server writes it, this is for pods that it has not written.
pub fn class(pod: &Pod) -> Qos {
    match pod.status.as_ref().and_then(|s| s.qos_class.as_deref()) {
        Some("Guaranteed") => return Qos::Guaranteed,
        Some("Burstable") => return Qos::Burstable,
        Some("BestEffort") => return Qos::BestEffort,
        _ => {}
    }
    let Some(spec) = &pod.spec else { return Qos::BestEffort };
    let (mut any, mut guaranteed) = (false, true);
    for container in containers(spec) {
        let resources = container.spec.resources.as_ref();
        for resource in ["cpu", "memory"] {
            let request = resources.and_then(|r| get_milli(r.requests.as_ref(), resource)).filter(|v| *v > 0);
            let limit = resources.and_then(|r| get_milli(r.limits.as_ref(), resource)).filter(|v| *v > 0);
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request.unwrap_or(limit.unwrap_or(0)) == limit.unwrap_or(0);
        }
    }
    match (any, guaranteed) {
        (false, _) => Qos::BestEffort,
        (true, true) => Qos::Guaranteed,
        (true, false) => Qos::Burstable,
    }
}

/// The OOM score of a sandbox: it must be the last of the pod to die.
pub const SANDBOX_OOM_SCORE: i64 = -998;

/// A container's `oom_score_adj`, as upstream computes it: the larger its request is in relation to the node's memory,
/// the later it is killed.
pub fn oom_score_adj(qos: Qos, pod: &PodSpec, container: &Container, node_memory: i64) -> i64 {
    if pod.priority.unwrap_or(0) >= 2_000_001_000 {
        return -997; // system-node-critical
    }
    match qos {
        Qos::Guaranteed => -997,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let request =
                container.resources.as_ref().and_then(|r| get_units(r.requests.as_ref(), "memory")).unwrap_or(0);
            let score = 1000 - (1000 * i128::from(request) / i128::from(node_memory.max(1))) as i64;
            // A burstable pod never counts as guaranteed, nor as best effort.
            score.clamp(3, 999)
        }
    }
}

/// cgroup figures, as cgroup v1 words them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Relative weight, 1024 for a CPU.
    pub cpu_shares: i64,
    /// Microseconds per period, 0 for no limit.
    pub cpu_quota: i64,
    /// Bytes, 0 for no limit.
    pub memory: i64,
}

/// The period against which quotas are counted, in microseconds.
pub const CPU_PERIOD: i64 = 100_000;

fn shares(milli_cpu: i64) -> i64 {
    (milli_cpu * 1024 / 1000).clamp(2, 262_144)
}

fn quota(milli_cpu: i64) -> i64 {
    if milli_cpu == 0 { 0 } else { (milli_cpu * CPU_PERIOD / 1000).max(1000) }
}

/// A container's own limits.
pub fn container_limits(container: &Container) -> Limits {
    let resources = container.resources.as_ref();
    let request = resources.and_then(|r| get_milli(r.requests.as_ref(), "cpu"));
    let limit = resources.and_then(|r| get_milli(r.limits.as_ref(), "cpu"));
    Limits {
        cpu_shares: shares(request.or(limit).unwrap_or(0)),
        cpu_quota: quota(limit.unwrap_or(0)),
        memory: resources.and_then(|r| get_units(r.limits.as_ref(), "memory")).unwrap_or(0),
    }
}

/// The pod's cgroup's limits: containers and sidecars run together, init containers one by one. A limit holds for the
/// pod only when each of its containers has one.
pub fn pod_limits(pod: &Pod) -> Limits {
    let Some(spec) = &pod.spec else { return Limits { cpu_shares: 2, ..Default::default() } };
    let cpu_request = pod_request(spec, "cpu");
    let limit = |resource: &str| {
        let all = containers(spec)
            .all(|c| c.spec.resources.as_ref().and_then(|r| get_milli(r.limits.as_ref(), resource)).is_some());
        if all { aggregate(spec, |c| limit_of(c, resource)) + overhead(spec, resource) } else { 0 }
    };
    Limits { cpu_shares: shares(cpu_request), cpu_quota: quota(limit("cpu")), memory: limit("memory").div_euclid(1000) }
}

fn limit_of(container: &Container, resource: &str) -> i64 {
    container.resources.as_ref().and_then(|r| get_milli(r.limits.as_ref(), resource)).unwrap_or(0)
}

fn request_of(container: &Container, resource: &str) -> i64 {
    let resources = container.resources.as_ref();
    resources
        .and_then(|r| get_milli(r.requests.as_ref(), resource).or_else(|| get_milli(r.limits.as_ref(), resource)))
        .unwrap_or(0)
}

fn overhead(spec: &PodSpec, resource: &str) -> i64 {
    get_milli(spec.overhead.as_ref(), resource).unwrap_or(0)
}

/// What a pod requests of a resource, in thousandths, overhead included.
pub fn pod_request(spec: &PodSpec, resource: &str) -> i64 {
    aggregate(spec, |c| request_of(c, resource)) + overhead(spec, resource)
}

/// The highest sum over the pod's life: each init container runs beside the sidecars started before it (KEP-753).
pub fn aggregate(spec: &PodSpec, of: impl Fn(&Container) -> i64) -> i64 {
    let (mut sidecars, mut peak, mut main) = (0_i64, 0_i64, 0_i64);
    for container in containers(spec) {
        let amount = of(container.spec);
        match container.class {
            Class::Sidecar => {
                sidecars = sidecars.saturating_add(amount);
                peak = peak.max(sidecars);
            }
            Class::Init => peak = peak.max(sidecars.saturating_add(amount)),
            Class::Main | Class::Ephemeral => main = main.saturating_add(amount),
        }
    }
    peak.max(sidecars.saturating_add(main))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(json: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "p"}, "spec": json})).unwrap()
    }

    #[test]
    fn classes() {
        let c = |r: serde_json::Value| serde_json::json!({"containers": [{"name": "a", "resources": r}]});
        let check = |r, expect| assert_eq!(class(&pod(c(r))), expect);
        check(serde_json::json!({}), Qos::BestEffort);
        check(serde_json::json!({"requests": {"cpu": "1"}}), Qos::Burstable);
        check(serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}}), Qos::Guaranteed);
        check(
            serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m", "memory": "1024Mi"}}),
            Qos::Guaranteed,
        );
        check(
            serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}),
            Qos::Burstable,
        );
    }

    #[test]
    fn limits_and_scores() {
        let p = pod(serde_json::json!({
            "initContainers": [{"name": "i", "resources": {"limits": {"cpu": "4", "memory": "1Gi"}}},
                               {"name": "s", "restartPolicy": "Always", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}],
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "500m"}, "limits": {"cpu": "1", "memory": "1Gi"}}}]}));
        let limits = pod_limits(&p);
        assert_eq!(limits, Limits { cpu_shares: 4096, cpu_quota: 400_000, memory: 2 << 30 });
        let spec = p.spec.as_ref().unwrap();
        let own = container_limits(&spec.containers[0]);
        assert_eq!(own, Limits { cpu_shares: 512, cpu_quota: 100_000, memory: 1 << 30 });
        assert_eq!(container_limits(&Container::default()), Limits { cpu_shares: 2, cpu_quota: 0, memory: 0 });
        let mut half = spec.containers[0].clone();
        half.resources = serde_json::from_value(serde_json::json!({"requests": {"memory": "4Gi"}})).unwrap();
        assert_eq!(oom_score_adj(Qos::Burstable, spec, &half, 8 << 30), 500);
        assert_eq!(oom_score_adj(Qos::Burstable, spec, &Container::default(), 8 << 30), 999);
    }
}
