//! How many replicas a metric asks for: the algorithm of
//! <https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/#algorithm-details>. All amounts are
//! thousandths.

use std::{collections::BTreeMap, sync::Arc};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use seawall_api::quantity::Quantity;

use crate::runtime::objects::{is_deleting, name, phase, pod_condition};

/// For so long after its start a pod may still be warming up (upstream's `--horizontal-pod-autoscaler-cpu-initialization-period`).
const WARM_UP: SignedDuration = SignedDuration::from_mins(5);
/// A pod that is not ready and last changed so soon after its start has never been ready
/// (`--horizontal-pod-autoscaler-initial-readiness-delay`).
const FIRST_READY: SignedDuration = SignedDuration::from_secs(30);

/// What a pod uses, when that was measured, and over how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Thousandths.
    pub value: i64,
    /// The end of the time over which it was measured.
    pub at: Timestamp,
    /// The length of that time.
    pub window: SignedDuration,
}

/// What each pod uses, by name.
pub type Samples = BTreeMap<String, Sample>;

/// How far from the target is near enough, down and up (KEP-4951).
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Below the target.
    pub down: f64,
    /// Above the target.
    pub up: f64,
}

impl Default for Tolerance {
    /// Upstream's `--horizontal-pod-autoscaler-tolerance`.
    fn default() -> Self {
        Tolerance { down: 0.1, up: 0.1 }
    }
}

impl Tolerance {
    fn covers(self, ratio: f64) -> bool {
        (1.0 - self.down..=1.0 + self.up).contains(&ratio)
    }
}

/// What a metric asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// So many replicas.
    pub replicas: i32,
    /// Per cent of what the pods asked for.
    pub utilization: Option<i32>,
    /// What a pod uses on average, or what the metric is.
    pub average: i64,
}

/// The pods that are scaled, sorted by what is known of them.
struct Groups<'a> {
    ready: usize,
    /// Pods whose measure is not representative yet.
    unready: Vec<&'a str>,
    /// Pods without a measure.
    missing: Vec<&'a str>,
}

fn group<'a>(pods: &'a [Arc<Pod>], samples: &mut Samples, is_cpu: bool, now: Timestamp) -> Groups<'a> {
    let mut groups = Groups { ready: 0, unready: Vec::new(), missing: Vec::new() };
    for pod in pods {
        let name = name(&**pod);
        if is_deleting(&**pod) || phase(pod) == "Failed" {
            samples.remove(name);
        } else if phase(pod) == "Pending" {
            samples.remove(name);
            groups.unready.push(name);
        } else {
            match samples.get(name) {
                None => groups.missing.push(name),
                // Only the CPU that a pod takes at its start says nothing about later.
                Some(sample) if is_cpu && warms_up(pod, sample, now) => {
                    samples.remove(name);
                    groups.unready.push(name);
                }
                Some(_) => groups.ready += 1,
            }
        }
    }
    groups
}

fn warms_up(pod: &Pod, sample: &Sample, now: Timestamp) -> bool {
    let started = pod.status.as_ref().and_then(|status| status.start_time.as_ref()).map(|t| t.0);
    let (Some(ready), Some(started)) = (pod_condition(pod, "Ready"), started) else { return true };
    let changed = ready.last_transition_time.as_ref().map_or(started, |t| t.0);
    let unready = ready.status == "False";
    match now.duration_since(started) < WARM_UP {
        // A measure counts if all of it is from after the pod became ready.
        true => unready || sample.at.duration_since(changed) < sample.window,
        false => unready && changed.duration_since(started) < FIRST_READY,
    }
}

fn up(value: f64) -> i32 {
    // What is larger than any number of pods is cut off by the most that may be.
    value.ceil().clamp(0.0, f64::from(i32::MAX)) as i32
}

/// What the pods have asked for, of a resource; of one container of each if that is named.
pub fn requests(pods: &[Arc<Pod>], resource: &str, container: Option<&str>) -> Result<BTreeMap<String, i64>, String> {
    let mut all = BTreeMap::new();
    for pod in pods {
        let spec = pod.spec.clone().unwrap_or_default();
        // Containers beside the others from the beginning count with them.
        let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
        let containers = spec.containers.iter().chain(sidecars);
        let mut total = 0i64;
        for container in containers.filter(|c| container.is_none_or(|name| name == c.name)) {
            let requests = container.resources.as_ref().and_then(|r| r.requests.as_ref());
            let amount = requests.and_then(|r| r.get(resource)).and_then(|q| q.0.parse::<Quantity>().ok());
            let Some(amount) = amount else {
                let name = name(&**pod);
                return Err(format!("missing request for {resource} in container {} of Pod {name}", container.name));
            };
            total = total.saturating_add(amount.milli_value());
        }
        all.insert(name(&**pod).to_owned(), total);
    }
    Ok(all)
}

/// What the use of a resource is compared with.
#[derive(Clone, Debug)]
pub enum Target {
    /// Per cent of what was asked for.
    Utilization {
        /// So many.
        percent: i32,
        /// What each pod has asked for.
        requests: BTreeMap<String, i64>,
    },
    /// So much for each pod.
    Average(i64),
}

impl Target {
    /// The use in relation to the target, and what it is.
    fn ratio(&self, samples: &Samples) -> Result<(f64, Option<i32>, i64), String> {
        let none = || "no metrics returned matched known pods".to_owned();
        match self {
            Target::Utilization { percent, requests } => {
                let known: Vec<(i64, i64)> =
                    samples.iter().filter_map(|(pod, sample)| Some((sample.value, *requests.get(pod)?))).collect();
                let (used, asked) =
                    known.iter().fold((0i64, 0i64), |(a, b), (x, y)| (a.saturating_add(*x), b.saturating_add(*y)));
                if asked == 0 || *percent <= 0 {
                    return Err(none());
                }
                let utilization = i32::try_from(used.saturating_mul(100) / asked).unwrap_or(i32::MAX);
                Ok((f64::from(utilization) / f64::from(*percent), Some(utilization), used / known.len() as i64))
            }
            Target::Average(target) => {
                if samples.is_empty() || *target <= 0 {
                    return Err(none());
                }
                let used = samples.values().fold(0i64, |sum, sample| sum.saturating_add(sample.value));
                let average = used / samples.len() as i64;
                Ok((average as f64 / *target as f64, None, average))
            }
        }
    }

    /// What a pod of which nothing is known is taken to use, when it would be a reason to scale down.
    fn full(&self, pod: &str) -> i64 {
        match self {
            Target::Utilization { percent, requests } => {
                let share = i64::from(*percent).max(100);
                requests.get(pod).map_or(0, |request| request.saturating_mul(share) / 100)
            }
            Target::Average(target) => *target,
        }
    }
}

/// How many replicas a metric of each pod asks for. Pods of which nothing is known are taken to be such that less is done.
pub fn by_pods(
    current: i32,
    pods: &[Arc<Pod>],
    mut samples: Samples,
    target: &Target,
    is_cpu: bool,
    tolerance: Tolerance,
    now: Timestamp,
) -> Result<Wanted, String> {
    if pods.is_empty() {
        return Err("no pods returned by selector while calculating replica count".into());
    }
    samples.retain(|pod, _| pods.iter().any(|p| name(&**p) == pod));
    let groups = group(pods, &mut samples, is_cpu, now);
    if samples.is_empty() {
        return Err("did not receive metrics for targeted pods (pods might be unready)".into());
    }
    let (ratio, utilization, average) = target.ratio(&samples)?;
    let wanted = |replicas: i32| Ok(Wanted { replicas, utilization, average });
    let slow = !groups.unready.is_empty() && ratio > 1.0;
    if !slow && groups.missing.is_empty() {
        return wanted(if tolerance.covers(ratio) { current } else { up(ratio * groups.ready as f64) });
    }
    let mut assume = |pods: &[&str], value: &dyn Fn(&str) -> i64| {
        for pod in pods {
            let sample = Sample { value: value(pod), at: now, window: SignedDuration::ZERO };
            samples.insert((*pod).to_owned(), sample);
        }
    };
    if ratio < 1.0 {
        assume(&groups.missing, &|pod| target.full(pod));
    } else if ratio > 1.0 {
        assume(&groups.missing, &|_| 0);
    }
    if slow {
        assume(&groups.unready, &|_| 0);
    }
    let (again, ..) = target.ratio(&samples)?;
    if tolerance.covers(again) || (ratio < 1.0 && again > 1.0) || (ratio > 1.0 && again < 1.0) {
        return wanted(current);
    }
    let replicas = up(again * samples.len() as f64);
    let other_way = (again < 1.0 && replicas > current) || (again > 1.0 && replicas < current);
    wanted(if other_way { current } else { replicas })
}

/// How many replicas a metric asks for that is one number for all pods, of which so many are ready.
pub fn by_value(current: i32, ready: usize, value: i64, target: i64, tolerance: Tolerance) -> Wanted {
    let ratio = value as f64 / target.max(1) as f64;
    let replicas = match current {
        0 => up(ratio),
        _ if tolerance.covers(ratio) => current,
        _ => up(ratio * ready as f64),
    };
    Wanted { replicas, utilization: None, average: value }
}

/// How many replicas it takes so that each has so much of one number.
pub fn by_share(current: i32, value: i64, target: i64, tolerance: Tolerance) -> Wanted {
    let target = target.max(1);
    let ratio = value as f64 / (target as f64 * f64::from(current));
    let replicas = if current > 0 && tolerance.covers(ratio) { current } else { up(value as f64 / target as f64) };
    Wanted { replicas, utilization: None, average: up(value as f64 / f64::from(current.max(1))).into() }
}
