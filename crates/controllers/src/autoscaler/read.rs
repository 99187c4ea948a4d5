//! Reading metrics and scales: `metrics.k8s.io`, `custom.metrics.k8s.io` and `external.metrics.k8s.io`, whoever serves them
//! (<https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#support-for-metrics-apis>).

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::autoscaling::v2::{CrossVersionObjectReference, MetricIdentifier, MetricSpec},
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind},
};
use seawall_api::quantity::Quantity;
use serde_json::Value;

use super::{
    metric::Reading,
    replicas::{Sample, Samples},
};

/// A server of metrics that does not answer must not keep an autoscaler from its other metrics.
const PATIENCE: Duration = Duration::from_secs(10);
/// Upstream's window for metrics that do not name theirs.
const WINDOW: SignedDuration = SignedDuration::from_mins(1);

/// The resource that a kind is served as.
pub(super) async fn resource(client: &Client, target: &CrossVersionObjectReference) -> Result<ApiResource, String> {
    let version = target.api_version.as_deref().unwrap_or("v1");
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let kind = GroupVersionKind::gvk(group, version, &target.kind);
    let found = tokio::time::timeout(PATIENCE, kube::discovery::pinned_kind(client, &kind)).await;
    let found = found.map_err(|_| "discovery does not answer".to_owned())?;
    found
        .map(|(resource, _)| resource)
        .map_err(|error| format!("no matches for kind {:?} in group {group:?}: {error}", target.kind))
}

/// The API of what an autoscaler scales.
pub(super) fn scaled(client: &Client, namespace: &str, resource: &ApiResource) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, resource)
}

/// Escapes a value of a query.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

async fn get(client: &Client, path: &str) -> Result<Value, String> {
    let request = http::Request::get(path).body(Vec::new()).map_err(|error| error.to_string())?;
    match tokio::time::timeout(PATIENCE, client.request::<Value>(request)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(crate::replica_set::plain(&error)),
        Err(_) => Err(format!("no answer within {PATIENCE:?}")),
    }
}

/// A selector as a query has it.
fn written(selector: Option<&LabelSelector>) -> String {
    let Some(selector) = selector else { return String::new() };
    let equal = selector.match_labels.iter().flatten().map(|(key, value)| format!("{key}={value}"));
    let more = selector.match_expressions.iter().flatten().map(|e| {
        let values = e.values.as_deref().unwrap_or_default().join(",");
        match e.operator.as_str() {
            "In" => format!("{} in ({values})", e.key),
            "NotIn" => format!("{} notin ({values})", e.key),
            "Exists" => e.key.clone(),
            _ => format!("!{}", e.key),
        }
    });
    equal.chain(more).collect::<Vec<_>>().join(",")
}

fn milli(value: &Value) -> Option<i64> {
    Some(value.as_str()?.parse::<Quantity>().ok()?.milli_value())
}

/// Reads a metric. `selector` is that of the pods.
pub(super) async fn read(
    client: &Client,
    namespace: &str,
    selector: &str,
    spec: &MetricSpec,
) -> Result<Reading, String> {
    let selector = escaped(selector);
    if let Some((resource, container)) = resource_of(spec) {
        let path = format!("/apis/metrics.k8s.io/v1beta1/namespaces/{namespace}/pods?labelSelector={selector}");
        let answer =
            get(client, &path).await.map_err(|why| unable("resource metrics", "resource metrics API", &why))?;
        let samples = of_resource(&answer, resource, container);
        return match samples.is_empty() {
            true => Err("unable to get metrics: no metrics returned from resource metrics API".into()),
            false => Ok(Reading::Pods(samples)),
        };
    }
    if let Some(source) = &spec.pods {
        let path = custom(namespace, "pods", "*", &source.metric, &format!("labelSelector={selector}&"));
        let answer = get(client, &path).await.map_err(|why| unable("pods metric", "custom metrics API", &why))?;
        return Ok(Reading::Pods(of_objects(&answer)));
    }
    if let Some(source) = &spec.object {
        let object = &source.described_object;
        let resource = resource(client, object).await?;
        let plural = match resource.group.as_str() {
            "" => resource.plural.clone(),
            group => format!("{}.{group}", resource.plural),
        };
        let path = custom(namespace, &plural, &escaped(&object.name), &source.metric, "");
        let answer = get(client, &path).await.map_err(|why| unable("object metric", "custom metrics API", &why))?;
        let value = milli(&answer["items"][0]["value"]).ok_or("no metrics returned from custom metrics API")?;
        return Ok(Reading::Value(value));
    }
    if let Some(source) = &spec.external {
        let (metric, of) = (escaped(&source.metric.name), escaped(&written(source.metric.selector.as_ref())));
        let path = format!("/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/{metric}?labelSelector={of}");
        let answer = get(client, &path).await.map_err(|why| unable("external metric", "external metrics API", &why))?;
        let values: Vec<i64> =
            answer["items"].as_array().into_iter().flatten().filter_map(|m| milli(&m["value"])).collect();
        return match values.is_empty() {
            true => Err("no metrics returned from external metrics API".into()),
            false => Ok(Reading::Value(values.iter().fold(0, |sum, value| sum.saturating_add(*value)))),
        };
    }
    Err(format!("unknown metric source type {:?}", spec.type_))
}

fn unable(what: &str, api: &str, why: &str) -> String {
    format!("unable to get {what}: unable to fetch metrics from {api}: {why}")
}

fn resource_of(spec: &MetricSpec) -> Option<(&str, Option<&str>)> {
    let whole = spec.resource.as_ref().map(|source| (source.name.as_str(), None));
    whole.or_else(|| {
        spec.container_resource.as_ref().map(|source| (source.name.as_str(), Some(source.container.as_str())))
    })
}

fn custom(namespace: &str, plural: &str, name: &str, metric: &MetricIdentifier, query: &str) -> String {
    let (named, selector) = (escaped(&metric.name), escaped(&written(metric.selector.as_ref())));
    let base = format!("/apis/custom.metrics.k8s.io/v1beta2/namespaces/{namespace}/{plural}/{name}/{named}");
    format!("{base}?{query}metricLabelSelector={selector}")
}

/// What each pod uses of a resource. A pod of which not every container was measured is left out.
fn of_resource(answer: &Value, resource: &str, container: Option<&str>) -> Samples {
    let read = |pod: &Value| {
        let containers = pod["containers"].as_array()?;
        let mut meant = containers.iter().filter(|c| container.is_none_or(|name| c["name"] == name)).peekable();
        meant.peek()?;
        let value = meant.map(|c| milli(&c["usage"][resource])).sum::<Option<i64>>()?;
        let at: Timestamp = pod["timestamp"].as_str()?.parse().ok()?;
        let window = pod["window"].as_str().and_then(|w| w.parse().ok()).unwrap_or(WINDOW);
        Some((pod["metadata"]["name"].as_str()?.to_owned(), Sample { value, at, window }))
    };
    answer["items"].as_array().into_iter().flatten().filter_map(read).collect()
}

fn of_objects(answer: &Value) -> Samples {
    let read = |item: &Value| {
        let at: Timestamp = item["timestamp"].as_str()?.parse().ok()?;
        let window = item["windowSeconds"].as_i64().map_or(WINDOW, SignedDuration::from_secs);
        let sample = Sample { value: milli(&item["value"])?, at, window };
        Some((item["describedObject"]["name"].as_str()?.to_owned(), sample))
    };
    answer["items"].as_array().into_iter().flatten().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_read() {
        let answer = json!({"items": [
            {"metadata": {"name": "a"}, "timestamp": "2026-01-01T00:00:00Z", "window": "15s", "containers": [
                {"name": "c", "usage": {"cpu": "250m", "memory": "1Mi"}}, {"name": "d", "usage": {"cpu": "1500000n"}}]},
            {"metadata": {"name": "b"}, "timestamp": "2026-01-01T00:00:00Z", "containers": [{"name": "d", "usage": {}}]},
        ]});
        let sample = |value: i64, window: i64| Sample {
            value,
            at: "2026-01-01T00:00:00Z".parse().unwrap(),
            window: SignedDuration::from_secs(window),
        };
        assert_eq!(of_resource(&answer, "cpu", None), Samples::from([("a".into(), sample(252, 15))]));
        assert_eq!(of_resource(&answer, "cpu", Some("c")), Samples::from([("a".into(), sample(250, 15))]));
        assert!(of_resource(&answer, "memory", None).is_empty(), "not of every container");
        let objects =
            json!({"items": [{"describedObject": {"name": "a"}, "timestamp": "2026-01-01T00:00:00Z", "value": "7"}]});
        assert_eq!(of_objects(&objects), Samples::from([("a".into(), sample(7000, 60))]));
        for hostile in [json!(null), json!({"items": 3}), json!({"items": [{"containers": [1]}, 2]})] {
            assert!(of_resource(&hostile, "cpu", None).is_empty() && of_objects(&hostile).is_empty());
        }
    }

    #[test]
    fn selectors_in_queries() {
        let selector = json!({"matchLabels": {"a": "b"}, "matchExpressions": [
            {"key": "c", "operator": "In", "values": ["d", "e"]}, {"key": "f", "operator": "DoesNotExist"}]});
        let selector: LabelSelector = serde_json::from_value(selector).unwrap();
        assert_eq!(written(Some(&selector)), "a=b,c in (d,e),!f");
        assert_eq!(escaped("a=b,c in (d)"), "a%3Db%2Cc%20in%20%28d%29");
    }
}
