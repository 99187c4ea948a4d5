//! A metric of an autoscaler: what it is called, what was read for it, and what it asks for.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        autoscaling::{
            v1::Scale,
            v2::{
                ContainerResourceMetricStatus, ExternalMetricStatus, MetricSpec, MetricStatus, MetricTarget,
                MetricValueStatus, ObjectMetricStatus, PodsMetricStatus, ResourceMetricStatus,
            },
        },
        core::v1::Pod,
    },
    apimachinery::pkg::api::resource::Quantity as Text,
};
use seawall_api::quantity::Quantity;

use super::replicas::{Samples, Target, Tolerance, Wanted, by_pods, by_share, by_value, requests};
use crate::runtime::objects::is_ready;

/// What was read for a metric.
#[derive(Clone, Debug)]
pub enum Reading {
    /// Something of each pod.
    Pods(Samples),
    /// One number, in thousandths.
    Value(i64),
}

/// What a metric asks for, and what the status says of it.
pub(super) struct Found {
    pub replicas: i32,
    pub name: String,
    pub status: MetricStatus,
}

/// The reason to give when a metric could not be read.
pub(super) fn failed(spec: &MetricSpec) -> &'static str {
    match spec.type_.as_str() {
        "ContainerResource" => "FailedGetContainerResourceMetric",
        "Pods" => "FailedGetPodsMetric",
        "Object" => "FailedGetObjectMetric",
        "External" => "FailedGetExternalMetric",
        _ => "FailedGetResourceMetric",
    }
}

/// What a metric is, in words.
pub(super) fn describe(spec: &MetricSpec) -> String {
    match () {
        () if spec.resource.is_some() => {
            format!("{} resource metric value", spec.resource.as_ref().map_or("", |source| &source.name))
        }
        () if spec.container_resource.is_some() => {
            format!("{} container metric value", spec.container_resource.as_ref().map_or("", |source| &source.name))
        }
        () => format!("{} metric value", spec.type_.to_lowercase()),
    }
}

fn amount(text: Option<&Text>) -> Option<i64> {
    Some(text?.0.parse::<Quantity>().ok()?.milli_value())
}

fn millis(value: i64) -> Option<Text> {
    Some(Text(Quantity::millis(value).to_string()))
}

/// What is used of a resource, by the target that is set for it.
fn resource_target(
    target: &MetricTarget,
    pods: &[Arc<Pod>],
    resource: &str,
    container: Option<&str>,
) -> Result<Target, String> {
    match (target.average_utilization, amount(target.average_value.as_ref())) {
        (_, Some(value)) => Ok(Target::Average(value)),
        (Some(percent), None) => Ok(Target::Utilization { percent, requests: requests(pods, resource, container)? }),
        (None, None) => {
            Err("invalid resource metric source: neither a utilization target nor a value target was set".into())
        }
    }
}

/// What a metric asks for.
pub(super) fn evaluate(
    spec: &MetricSpec,
    reading: Reading,
    scale: &Scale,
    pods: &[Arc<Pod>],
    current: i32,
    tolerance: Tolerance,
    now: Timestamp,
) -> Result<Found, String> {
    let by_pods = |reading: Reading, target: &Target, is_cpu: bool| match reading {
        Reading::Pods(samples) => by_pods(current, pods, samples, target, is_cpu, tolerance, now),
        Reading::Value(_) => Err("one number is no metric of pods".to_owned()),
    };
    let value = |wanted: &Wanted| MetricValueStatus {
        average_utilization: wanted.utilization,
        average_value: millis(wanted.average),
        value: None,
    };
    let mut status = MetricStatus { type_: spec.type_.clone(), ..MetricStatus::default() };
    let (wanted, name) = if let Some(source) = &spec.resource {
        let target = resource_target(&source.target, pods, &source.name, None)?;
        let wanted = by_pods(reading, &target, source.name == "cpu")?;
        status.resource = Some(ResourceMetricStatus { name: source.name.clone(), current: value(&wanted) });
        (wanted, resource_name(&source.name, "", &target))
    } else if let Some(source) = &spec.container_resource {
        let target = resource_target(&source.target, pods, &source.name, Some(&source.container))?;
        let wanted = by_pods(reading, &target, source.name == "cpu")?;
        status.container_resource = Some(ContainerResourceMetricStatus {
            container: source.container.clone(),
            name: source.name.clone(),
            current: value(&wanted),
        });
        (wanted, resource_name(&source.name, "container ", &target))
    } else if let Some(source) = &spec.pods {
        let target =
            amount(source.target.average_value.as_ref()).ok_or("the target of a metric of pods is an average")?;
        let wanted = by_pods(reading, &Target::Average(target), false)?;
        status.pods = Some(PodsMetricStatus { metric: source.metric.clone(), current: value(&wanted) });
        (wanted, format!("pods metric {}", source.metric.name))
    } else if let Some(source) = &spec.object {
        let (wanted, value) = by_number(&source.target, reading, scale, pods, current, tolerance)?;
        status.object = Some(ObjectMetricStatus {
            metric: source.metric.clone(),
            described_object: source.described_object.clone(),
            current: value,
        });
        (wanted, format!("{} metric {}", source.described_object.kind, source.metric.name))
    } else if let Some(source) = &spec.external {
        let (wanted, value) = by_number(&source.target, reading, scale, pods, current, tolerance)?;
        status.external = Some(ExternalMetricStatus { metric: source.metric.clone(), current: value });
        (wanted, format!("external metric {}", source.metric.name))
    } else {
        return Err(format!("unknown metric source type {:?}", spec.type_));
    };
    Ok(Found { replicas: wanted.replicas, name, status })
}

fn resource_name(resource: &str, of: &str, target: &Target) -> String {
    match target {
        Target::Utilization { .. } => format!("{resource} {of}resource utilization (percentage of request)"),
        Target::Average(_) => format!("{resource} {of}resource"),
    }
}

/// What one number asks for that is not of pods.
fn by_number(
    target: &MetricTarget,
    reading: Reading,
    scale: &Scale,
    pods: &[Arc<Pod>],
    current: i32,
    tolerance: Tolerance,
) -> Result<(Wanted, MetricValueStatus), String> {
    let Reading::Value(value) = reading else { return Err("a metric of pods is not one number".into()) };
    let mut status = MetricValueStatus::default();
    let wanted = match (amount(target.average_value.as_ref()), amount(target.value.as_ref())) {
        (Some(average), _) => {
            let running = scale.status.as_ref().map_or(0, |status| status.replicas);
            let wanted = by_share(running, value, average, tolerance);
            status.average_value = millis(wanted.average);
            wanted
        }
        (None, Some(target)) => {
            status.value = millis(value);
            by_value(current, pods.iter().filter(|pod| is_ready(pod)).count(), value, target, tolerance)
        }
        (None, None) => return Err("neither a value target nor an average value target was set".into()),
    };
    Ok((wanted, status))
}
