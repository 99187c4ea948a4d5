//! What to do next for a HorizontalPodAutoscaler, and what its status says
//! (<https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/>), without any I/O.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        autoscaling::{
            v1::Scale,
            v2::{
                HPAScalingRules, HorizontalPodAutoscaler, HorizontalPodAutoscalerCondition,
                HorizontalPodAutoscalerStatus, MetricStatus,
            },
        },
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use seawall_api::quantity::Quantity;

use super::{
    behavior::{self, Memory, Numbers},
    metric::{self, Reading},
    replicas::Tolerance,
};

/// What a plan is made from.
pub struct Input<'a> {
    /// The autoscaler.
    pub autoscaler: &'a HorizontalPodAutoscaler,
    /// What it scales.
    pub scale: &'a Scale,
    /// The pods of that.
    pub pods: &'a [Arc<Pod>],
    /// What was read for each metric of the autoscaler, in its order.
    pub readings: &'a [Result<Reading, String>],
    /// The time.
    pub now: Timestamp,
}

/// What to do.
#[derive(Debug, PartialEq)]
pub struct Plan {
    /// The number of replicas to set, and why; nothing if it stays.
    pub rescale: Option<(i32, String)>,
    /// The status if that succeeds.
    pub status: HorizontalPodAutoscalerStatus,
    /// Why no number could be worked out.
    pub failure: Option<String>,
}

/// Sets a condition.
pub(super) fn set(
    status: &mut HorizontalPodAutoscalerStatus,
    type_: &str,
    value: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let conditions = status.conditions.get_or_insert_default();
    let value = if value { "True" } else { "False" };
    let index = conditions.iter().position(|c| c.type_ == type_).unwrap_or_else(|| {
        conditions.push(HorizontalPodAutoscalerCondition { type_: type_.into(), ..Default::default() });
        conditions.len() - 1
    });
    let condition = &mut conditions[index];
    if condition.status != value {
        condition.last_transition_time = Some(Time(now));
    }
    condition.status = value.into();
    condition.reason = Some(reason.into());
    condition.message = Some(message.into());
}

/// A status that is written when nothing can be said about replicas.
pub(super) fn status_of(autoscaler: &HorizontalPodAutoscaler) -> HorizontalPodAutoscalerStatus {
    let mut status = autoscaler.status.clone().unwrap_or_default();
    status.observed_generation = autoscaler.metadata.generation;
    status
}

fn tolerance(autoscaler: &HorizontalPodAutoscaler) -> Tolerance {
    let behavior = autoscaler.spec.behavior.as_ref();
    let of = |rules: Option<&HPAScalingRules>| {
        rules.and_then(|rules| rules.tolerance.as_ref()?.0.parse::<Quantity>().ok()).map(|q| q.as_f64())
    };
    let default = Tolerance::default();
    Tolerance {
        down: of(behavior.and_then(|b| b.scale_down.as_ref())).unwrap_or(default.down),
        up: of(behavior.and_then(|b| b.scale_up.as_ref())).unwrap_or(default.up),
    }
}

/// What all metrics together ask for.
struct Proposal {
    replicas: i32,
    metric: String,
    statuses: Vec<MetricStatus>,
}

/// The largest number that any metric asks for. While one of them is not known, nothing is scaled down.
fn propose(input: &Input<'_>, current: i32) -> Result<Proposal, (Failure, Vec<MetricStatus>)> {
    let specs = input.autoscaler.spec.metrics.as_deref().unwrap_or_default();
    let tolerance = tolerance(input.autoscaler);
    let mut best: Option<(i32, String)> = None;
    let (mut statuses, mut first_failure, mut failures) = (Vec::new(), None, 0);
    for (spec, reading) in specs.iter().zip(input.readings) {
        let found = reading.clone().and_then(|reading| {
            metric::evaluate(spec, reading, input.scale, input.pods, current, tolerance, input.now)
        });
        match found {
            Ok(found) => {
                if best.as_ref().is_none_or(|(replicas, _)| found.replicas > *replicas) {
                    best = Some((found.replicas, found.name));
                }
                statuses.push(found.status);
            }
            Err(why) => {
                failures += 1;
                let reason = metric::failed(spec);
                first_failure.get_or_insert((reason, format!("failed to get {}: {why}", metric::describe(spec))));
            }
        }
    }
    match (best, first_failure) {
        (Some((replicas, metric)), None) => Ok(Proposal { replicas, metric, statuses }),
        (Some((replicas, metric)), Some(_)) if replicas >= current => Ok(Proposal { replicas, metric, statuses }),
        (_, Some((reason, first))) => {
            let all = format!("invalid metrics ({failures} invalid out of {}), first error is: {first}", specs.len());
            Err(((reason, first, all), statuses))
        }
        (None, None) => {
            Err((("FailedGetResourceMetric", "there are no metrics".into(), "there are no metrics".into()), statuses))
        }
    }
}

/// A reason, what failed first, and the whole.
type Failure = (&'static str, String, String);

/// Decides, and remembers what was asked for.
pub fn plan(input: &Input<'_>, memory: &mut Memory) -> Plan {
    let spec = &input.autoscaler.spec;
    let current = input.scale.spec.as_ref().and_then(|scale| scale.replicas).unwrap_or(0);
    let (min, max) = (spec.min_replicas.unwrap_or(1), spec.max_replicas);
    let mut status = status_of(input.autoscaler);
    status.current_replicas = Some(input.scale.status.as_ref().map_or(0, |status| status.replicas));
    set(
        &mut status,
        "AbleToScale",
        true,
        "SucceededGetScale",
        "the HPA controller was able to get the target's current scale",
        input.now,
    );
    memory.begin(current, input.now);
    let decided = if current == 0 && min != 0 {
        let message = "scaling is disabled since the replica count of the target is zero";
        set(&mut status, "ScalingActive", false, "ScalingDisabled", message, input.now);
        Ok((current, String::new()))
    } else if current > max {
        Ok((max, "Current number of replicas above Spec.MaxReplicas".to_owned()))
    } else if current < min {
        Ok((min, "Current number of replicas below Spec.MinReplicas".to_owned()))
    } else {
        follow(input, memory, &mut status, Numbers { current, desired: current, min, max })
    };
    let (desired, why) = match decided {
        Ok(decided) => decided,
        Err(failure) => return Plan { rescale: None, status, failure: Some(failure) },
    };
    status.desired_replicas = desired;
    let rescale = (desired != current).then_some((desired, why));
    if rescale.is_some() {
        let message = format!("the HPA controller was able to update the target scale to {desired}");
        set(&mut status, "AbleToScale", true, "SucceededRescale", &message, input.now);
        status.last_scale_time = Some(Time(input.now));
    }
    Plan { rescale, status, failure: None }
}

/// Works out from the metrics how many replicas there should be, and why if they are others.
fn follow(
    input: &Input<'_>,
    memory: &mut Memory,
    status: &mut HorizontalPodAutoscalerStatus,
    numbers: Numbers,
) -> Result<(i32, String), String> {
    let proposal = match propose(input, numbers.current) {
        Ok(proposal) => proposal,
        Err(((reason, first, all), statuses)) => {
            let message = format!("the HPA was unable to compute the replica count: {first}");
            set(status, "ScalingActive", false, reason, &message, input.now);
            status.current_metrics = Some(statuses).filter(|list| !list.is_empty());
            return Err(all);
        }
    };
    let message = format!("the HPA was able to successfully calculate a replica count from {}", proposal.metric);
    set(status, "ScalingActive", true, "ValidMetricFound", &message, input.now);
    status.current_metrics = Some(proposal.statuses);
    let numbers = Numbers { desired: proposal.replicas, ..numbers };
    let normal = behavior::normalize(input.autoscaler.spec.behavior.as_ref(), numbers, memory, input.now);
    set(status, "AbleToScale", true, normal.able.0, normal.able.1, input.now);
    let (limited, (reason, message)) = normal.limited;
    set(status, "ScalingLimited", limited, reason, message, input.now);
    let why = match normal.replicas > numbers.current {
        true => format!("{} above target", proposal.metric),
        false => "All metrics below target".to_owned(),
    };
    Ok((normal.replicas, why))
}
