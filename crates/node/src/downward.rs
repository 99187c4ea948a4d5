//! The downward API: what a pod may learn about itself.
//!
//! <https://kubernetes.io/docs/concepts/workloads/pods/downward-api/>

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};

use crate::pod::quantity::{get_milli, milli};

/// What the node can give, in thousandths: stands in for a limit that is not set.
#[derive(Clone, Debug, Default)]
pub struct Allocatable {
    /// By resource name.
    pub milli: BTreeMap<String, i64>,
}

/// The value of a field path, or why there is none.
pub fn field(pod: &Pod, path: &str) -> Result<String, String> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    let text = |value: Option<&String>| value.cloned().unwrap_or_default();
    if let Some((map, key)) = subscript(path) {
        let map = match map {
            "metadata.labels" => meta.labels.as_ref(),
            "metadata.annotations" => meta.annotations.as_ref(),
            other => return Err(format!("field {other:?} does not support subscripts")),
        };
        return Ok(text(map.and_then(|m| m.get(key))));
    }
    Ok(match path {
        "metadata.name" => text(meta.name.as_ref()),
        "metadata.namespace" => text(meta.namespace.as_ref()),
        "metadata.uid" => text(meta.uid.as_ref()),
        "metadata.labels" => map_text(meta.labels.as_ref()),
        "metadata.annotations" => map_text(meta.annotations.as_ref()),
        "spec.nodeName" => text(spec.and_then(|s| s.node_name.as_ref())),
        "spec.serviceAccountName" => text(spec.and_then(|s| s.service_account_name.as_ref())),
        "status.hostIP" => text(status.and_then(|s| s.host_ip.as_ref())),
        "status.podIP" => text(status.and_then(|s| s.pod_ip.as_ref())),
        "status.hostIPs" => {
            let ips = status.and_then(|s| s.host_ips.as_ref()).into_iter().flatten().map(|ip| ip.ip.as_str());
            ips.collect::<Vec<_>>().join(",")
        }
        "status.podIPs" => {
            let ips = status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten().map(|ip| ip.ip.as_str());
            ips.collect::<Vec<_>>().join(",")
        }
        other => return Err(format!("unsupported fieldPath: {other}")),
    })
}

/// `metadata.labels['x']` as `(metadata.labels, x)`.
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, rest) = path.split_once('[')?;
    Some((map, rest.strip_suffix(']')?.trim_matches(['\'', '"'])))
}

/// A map as a downward API file shows it: `key="value"`, a line each, in order.
fn map_text(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> = map.into_iter().flatten().map(|(k, v)| format!("{k}={v:?}")).collect();
    lines.join("\n")
}

/// A container's request or limit in units of the divisor, rounded up. A limit that is not set is the node's.
pub fn resource(container: &Container, selector: &ResourceFieldSelector, node: &Allocatable) -> Result<String, String> {
    let Some((list, name)) = selector.resource.split_once('.') else {
        return Err(format!("unsupported container resource: {}", selector.resource));
    };
    let resources = container.resources.as_ref();
    let value = match list {
        "limits" => resources
            .and_then(|r| get_milli(r.limits.as_ref(), name))
            .filter(|v| *v > 0)
            .or_else(|| node.milli.get(name).copied())
            .unwrap_or(0),
        "requests" => resources.and_then(|r| get_milli(r.requests.as_ref(), name)).unwrap_or(0),
        _ => return Err(format!("unsupported container resource: {}", selector.resource)),
    };
    let divisor = selector.divisor.as_ref().and_then(|d| milli(&d.0)).filter(|d| *d > 0).unwrap_or(1000);
    let value = i128::from(value);
    Ok(((value + divisor - 1) / divisor).to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "labels": {"b": "2", "a": "x\"y"}},
            "status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}}))
        .unwrap();
        for (path, expect) in [
            ("metadata.name", "p"),
            ("metadata.labels", "a=\"x\\\"y\"\nb=\"2\""),
            ("metadata.labels['b']", "2"),
            ("metadata.annotations['none']", ""),
            ("status.podIPs", "10.0.0.1,fd00::1"),
        ] {
            assert_eq!(field(&pod, path).unwrap(), expect, "{path}");
        }
        assert!(field(&pod, "spec.x").is_err());
    }

    #[test]
    fn resources() {
        let container: Container = serde_json::from_value(
            json!({"name": "c", "resources": {"limits": {"cpu": "1500m"}, "requests": {"memory": "1Gi"}}}),
        )
        .unwrap();
        let node = Allocatable { milli: BTreeMap::from([("memory".to_owned(), 8000)]) };
        for (path, divisor, expect) in [
            ("limits.cpu", None, "2"),
            ("limits.cpu", Some("1m"), "1500"),
            ("requests.memory", Some("1Mi"), "1024"),
            ("limits.memory", None, "8"),
            ("requests.cpu", None, "0"),
        ] {
            let selector = serde_json::from_value(json!({"resource": path, "divisor": divisor})).unwrap();
            assert_eq!(resource(&container, &selector, &node).unwrap(), expect, "{path} {divisor:?}");
        }
    }
}
