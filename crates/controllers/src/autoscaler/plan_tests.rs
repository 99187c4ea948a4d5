use std::{collections::BTreeMap, sync::Arc};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    autoscaling::{
        v1::Scale,
        v2::{HorizontalPodAutoscaler, HorizontalPodAutoscalerStatus},
    },
    core::v1::Pod,
};
use seawall_api::selector::LabelSelector;
use serde_json::{Value, json};

use super::{
    Input, Plan,
    behavior::Memory,
    metric::Reading,
    plan,
    replicas::{Sample, Samples, Target, Tolerance, by_pods, by_share, by_value, requests},
    rivals,
};
use crate::runtime::Key;

fn now() -> Timestamp {
    "2026-01-01T01:00:00Z".parse().unwrap()
}

/// A pod that has run for an hour and asks for a whole CPU; `!` is not ready, `*` has only just started, `?` is pending, `-` is
/// being deleted.
fn pod(name: &str) -> Arc<Pod> {
    let young = name.contains('*');
    let started = if young { "2026-01-01T00:59:30Z" } else { "2026-01-01T00:00:00Z" };
    let changed = if young { "2026-01-01T00:59:50Z" } else { "2026-01-01T00:30:00Z" };
    let mut meta = json!({"name": name});
    if name.contains('-') {
        meta["deletionTimestamp"] = "2026-01-01T00:59:00Z".into();
    }
    let requests = json!({"requests": {"cpu": "1", "memory": "1Gi"}});
    let ready = if name.contains('!') { "False" } else { "True" };
    let phase = if name.contains('?') { "Pending" } else { "Running" };
    Arc::new(
        serde_json::from_value(json!({"metadata": meta,
            "spec": {"containers": [{"name": "c", "resources": requests}]},
            "status": {"phase": phase, "startTime": started,
                "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": changed}]}}))
        .unwrap(),
    )
}

fn samples(values: &[(&str, i64)]) -> Samples {
    let sample = |value: i64| Sample { value, at: now(), window: SignedDuration::from_secs(30) };
    values.iter().map(|(name, value)| ((*name).to_owned(), sample(*value))).collect()
}

#[test]
fn how_many_a_resource_asks_for() {
    // At 50 % of what is asked for, which is a CPU each.
    let check = |current: i32, names: &[&str], used: &[(&str, i64)], expect: Result<i32, &str>| {
        let pods: Vec<_> = names.iter().map(|name| pod(name)).collect();
        let target = Target::Utilization { percent: 50, requests: requests(&pods, "cpu", None).unwrap() };
        let wanted = by_pods(current, &pods, samples(used), &target, true, Tolerance::default(), now());
        assert_eq!(wanted.map(|w| w.replicas), expect.map_err(str::to_owned), "{current}: {names:?} use {used:?}");
    };
    check(2, &["a", "b"], &[("a", 500), ("b", 500)], Ok(2));
    check(2, &["a", "b"], &[("a", 900), ("b", 900)], Ok(4));
    check(2, &["a", "b"], &[("a", 540), ("b", 550)], Ok(2));
    check(4, &["a", "b", "c", "d"], &[("a", 200), ("b", 200), ("c", 200), ("d", 200)], Ok(2));
    // Nothing is known of one: it is taken to use all when it is about less, and nothing when it is about more.
    check(3, &["a", "b", "c"], &[("a", 200), ("b", 200)], Ok(3));
    check(3, &["a", "b", "c"], &[("a", 100), ("b", 100)], Ok(3));
    check(3, &["a", "b", "c"], &[("a", 900), ("b", 900)], Ok(4));
    // Who warms up is taken to use nothing, and only when it is about more.
    check(3, &["a", "b", "c*"], &[("a", 900), ("b", 900), ("c*", 2000)], Ok(4));
    check(3, &["a", "b", "c*"], &[("a", 250), ("b", 250), ("c*", 2000)], Ok(1));
    check(3, &["a", "b", "c?"], &[("a", 900), ("b", 900)], Ok(4));
    // Who goes does not count.
    check(2, &["a", "b", "c-"], &[("a", 500), ("b", 500), ("c-", 2000)], Ok(2));
    // What is not ready after it was counts with what it uses.
    check(2, &["a", "b!"], &[("a", 1000), ("b!", 1000)], Ok(4));
    check(1, &[], &[], Err("no pods returned by selector while calculating replica count"));
    check(1, &["a"], &[("z", 5)], Err("did not receive metrics for targeted pods (pods might be unready)"));
    check(1, &["a?"], &[("a?", 5)], Err("did not receive metrics for targeted pods (pods might be unready)"));
    assert_eq!(requests(&[pod("a")], "gpu", None).unwrap_err(), "missing request for gpu in container c of Pod a");
    assert_eq!(requests(&[pod("a")], "cpu", Some("other")).unwrap(), BTreeMap::from([("a".into(), 0)]));
}

#[test]
fn how_many_a_number_asks_for() {
    let tolerance = Tolerance::default();
    assert_eq!(by_value(3, 3, 3000, 1000, tolerance).replicas, 9);
    assert_eq!(by_value(3, 3, 1050, 1000, tolerance).replicas, 3);
    assert_eq!(by_value(3, 2, 500, 1000, tolerance).replicas, 1);
    assert_eq!(by_value(0, 0, 2500, 1000, tolerance).replicas, 3);
    assert_eq!(by_share(3, 10_000, 2000, tolerance).replicas, 5);
    assert_eq!(by_share(5, 10_500, 2000, tolerance).replicas, 5);
    assert_eq!(by_share(0, 10_000, 2000, tolerance).replicas, 5);
    let narrow = Tolerance { down: 0.0, up: 0.0 };
    assert_eq!(by_value(100, 100, 1050, 1000, narrow).replicas, 105);
}

#[test]
fn two_for_the_same_pods() {
    let labeled = |label: &str| {
        let mut pod = Pod::clone(&pod("p"));
        pod.metadata.labels = Some(BTreeMap::from([("app".into(), label.into())]));
        Arc::new(pod)
    };
    let key = |namespace: &str, name: &str| Key::new(namespace, name);
    let selectors = [("n", "a", "app=a"), ("n", "all", "app"), ("n", "b", "app=b"), ("m", "a", "app=a")];
    let selectors = selectors.map(|(ns, name, text)| (key(ns, name), LabelSelector::parse(text).unwrap()));
    let selectors = BTreeMap::from(selectors);
    let check = |name: &str, label: &str, expect: &[Key]| {
        let found: Vec<_> = rivals(&selectors, &key("n", name), &[labeled(label)]).into_iter().cloned().collect();
        assert_eq!(found, expect, "{name}");
    };
    check("a", "a", &[key("n", "all")]);
    check("all", "a", &[key("n", "a")]);
    check("b", "c", &[key("n", "all")]);
    assert!(
        rivals(&selectors, &key("m", "a"), &[labeled("a")]).is_empty(),
        "other namespaces are none of its business"
    );
}

struct Bench {
    autoscaler: HorizontalPodAutoscaler,
    memory: Memory,
}

impl Bench {
    fn new(spec: Value) -> Bench {
        let mut full = json!({"scaleTargetRef": {"kind": "Deployment", "name": "d"}, "minReplicas": 1, "maxReplicas": 5,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu",
                "target": {"type": "Utilization", "averageUtilization": 50}}}]});
        for (key, value) in spec.as_object().unwrap() {
            full[key] = value.clone();
        }
        let autoscaler = json!({"metadata": {"name": "h", "generation": 2}, "spec": full});
        Bench { autoscaler: serde_json::from_value(autoscaler).unwrap(), memory: Memory::default() }
    }

    fn plan(&mut self, replicas: i32, readings: &[Result<Reading, String>]) -> Plan {
        let names: Vec<String> = (0..replicas).map(|n| format!("p{n}")).collect();
        let pods: Vec<_> = names.iter().map(|name| pod(name)).collect();
        let scale = json!({"metadata": {}, "spec": {"replicas": replicas}, "status": {"replicas": replicas, "selector": "a=b"}});
        let scale: Scale = serde_json::from_value(scale).unwrap();
        let input = Input { autoscaler: &self.autoscaler, scale: &scale, pods: &pods, readings, now: now() };
        plan(&input, &mut self.memory)
    }
}

fn using(value: i64, pods: i32) -> Result<Reading, String> {
    let names: Vec<String> = (0..pods).map(|n| format!("p{n}")).collect();
    Ok(Reading::Pods(samples(&names.iter().map(|name| (name.as_str(), value)).collect::<Vec<_>>())))
}

fn conditions(status: &HorizontalPodAutoscalerStatus) -> Vec<(&str, &str, &str)> {
    let of = status.conditions.iter().flatten();
    of.map(|c| (c.type_.as_str(), c.status.as_str(), c.reason.as_deref().unwrap_or_default())).collect()
}

#[test]
fn what_is_done_and_said() {
    let made = Bench::new(json!({})).plan(2, &[using(900, 2)]);
    assert_eq!(made.rescale, Some((4, "cpu resource utilization (percentage of request) above target".into())));
    assert_eq!((made.status.current_replicas, made.status.desired_replicas), (Some(2), 4));
    assert_eq!(made.status.observed_generation, Some(2));
    assert_eq!(made.status.last_scale_time.as_ref().unwrap().0, now());
    let current = &made.status.current_metrics.as_ref().unwrap()[0].resource.as_ref().unwrap().current;
    assert_eq!((current.average_utilization, current.average_value.as_ref().unwrap().0.as_str()), (Some(90), "900m"));
    let expect = [
        ("AbleToScale", "True", "SucceededRescale"),
        ("ScalingActive", "True", "ValidMetricFound"),
        ("ScalingLimited", "False", "DesiredWithinRange"),
    ];
    assert_eq!(conditions(&made.status), expect);

    let made = Bench::new(json!({})).plan(4, &[using(2000, 4)]);
    assert_eq!(made.rescale.as_ref().map(|(replicas, _)| *replicas), Some(5));
    assert_eq!(conditions(&made.status)[2], ("ScalingLimited", "True", "TooManyReplicas"));

    let made = Bench::new(json!({})).plan(3, &[using(100, 3)]);
    assert_eq!(made.rescale, None, "so many were wanted a moment ago");
    assert_eq!(conditions(&made.status)[0], ("AbleToScale", "True", "ScaleDownStabilized"));

    let made = Bench::new(json!({})).plan(0, &[using(100, 0)]);
    assert_eq!(made.rescale, None);
    assert_eq!(conditions(&made.status)[1], ("ScalingActive", "False", "ScalingDisabled"));
    let made = Bench::new(json!({})).plan(7, &[using(900, 7)]);
    assert_eq!(made.rescale, Some((5, "Current number of replicas above Spec.MaxReplicas".into())));
    let made = Bench::new(json!({"minReplicas": 3})).plan(1, &[using(900, 1)]);
    assert_eq!(made.rescale, Some((3, "Current number of replicas below Spec.MinReplicas".into())));
}

#[test]
fn the_metric_that_asks_for_most_decides() {
    let metrics = json!({"metrics": [
        {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}},
        {"type": "External", "external": {"metric": {"name": "queue"}, "target": {"type": "AverageValue", "averageValue": "10"}}},
    ]});
    let made = Bench::new(metrics.clone()).plan(2, &[using(600, 2), Ok(Reading::Value(45_000))]);
    assert_eq!(made.rescale, Some((5, "external metric queue above target".into())));
    // One of them is not known: more is possible, less is not.
    let unknown = || Err("nobody serves it".to_owned());
    let made = Bench::new(metrics.clone()).plan(2, &[using(900, 2), unknown()]);
    assert_eq!(made.rescale.map(|(replicas, _)| replicas), Some(4));
    let made = Bench::new(metrics.clone()).plan(4, &[using(50, 4), unknown()]);
    assert_eq!((made.rescale, made.failure.is_some()), (None, true));
    assert_eq!(conditions(&made.status)[1], ("ScalingActive", "False", "FailedGetExternalMetric"));
    let made = Bench::new(metrics).plan(4, &[unknown(), unknown()]);
    let failure = made.failure.unwrap();
    assert!(failure.starts_with("invalid metrics (2 invalid out of 2), first error is: "), "{failure}");
    assert_eq!(conditions(&made.status)[1], ("ScalingActive", "False", "FailedGetResourceMetric"));
}
