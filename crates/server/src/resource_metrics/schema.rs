//! The OpenAPI document of `metrics.k8s.io/v1beta1`, by which `kubectl explain` speaks.
//!
//! <https://github.com/kubernetes/metrics/blob/master/pkg/apis/metrics/v1beta1/types.go>

use serde_json::{Value, json};

const PACKAGE: &str = "io.k8s.metrics.pkg.apis.metrics.v1beta1";

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// What is measured of a kind. Everything else of it stands in every kind.
fn measured(kind: &str, about: &str, fields: Value) -> Value {
    let mut properties = json!({
        "apiVersion": {"type": "string", "description": "The version of this form of the object."},
        "kind": {"type": "string", "description": "The kind of the object."},
        "metadata": reference("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"),
        "timestamp": {"type": "string", "format": "date-time", "description": "The end of the time that was measured."},
        "window": {"type": "string", "description": "How long it was measured, e.g. 10s."},
    });
    if let (Some(all), Value::Object(fields)) = (properties.as_object_mut(), fields) {
        all.extend(fields);
    }
    json!({"type": "object", "description": about, "properties": properties, "required": ["timestamp", "window"],
        "x-kubernetes-group-version-kind": [{"group": "metrics.k8s.io", "version": "v1beta1", "kind": kind}]})
}

fn list(kind: &str) -> Value {
    json!({"type": "object", "description": format!("A list of {kind}."), "required": ["items"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": reference("io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta"),
            "items": {"type": "array", "items": reference(&format!("{PACKAGE}.{kind}"))}},
        "x-kubernetes-group-version-kind":
            [{"group": "metrics.k8s.io", "version": "v1beta1", "kind": format!("{kind}List")}]})
}

/// The document. `metadata` are the schemas of an object's metadata and a list's, as every group has them.
pub fn document(metadata: impl IntoIterator<Item = (String, Value)>) -> Value {
    let usage = |of: &str| {
        json!({"type": "object", "description": format!("What {of} uses, by resource: CPU in cores, memory in bytes."),
            "additionalProperties": {"type": "string"}})
    };
    let node = json!({"usage": usage("the node")});
    let pod = json!({"containers": {"type": "array", "description": "What each container uses.",
        "items": reference(&format!("{PACKAGE}.ContainerMetrics"))}});
    let container = json!({"type": "object", "description": "What a container uses.", "required": ["name", "usage"],
        "properties": {"name": {"type": "string", "description": "The container."}, "usage": usage("the container")}});
    let mut schemas: serde_json::Map<String, Value> = metadata.into_iter().collect();
    for (name, schema) in [
        ("NodeMetrics", measured("NodeMetrics", "What a node uses.", node)),
        ("NodeMetricsList", list("NodeMetrics")),
        ("PodMetrics", measured("PodMetrics", "What the containers of a pod use.", pod)),
        ("PodMetricsList", list("PodMetrics")),
        ("ContainerMetrics", container),
    ] {
        schemas.insert(format!("{PACKAGE}.{name}"), schema);
    }
    let get = |kind: &str, action: &str, about: &str| {
        let content = json!({"application/json": {"schema": reference(&format!("{PACKAGE}.{kind}"))}});
        json!({"get": {"description": about, "responses": {"200": {"description": "OK", "content": content}},
            "x-kubernetes-action": action, "x-kubernetes-group-version-kind":
                {"group": "metrics.k8s.io", "version": "v1beta1", "kind": kind.trim_end_matches("List")}}})
    };
    let at = "/apis/metrics.k8s.io/v1beta1";
    let paths = json!({
        (format!("{at}/nodes")): get("NodeMetricsList", "list", "what all nodes use"),
        (format!("{at}/nodes/{{name}}")): get("NodeMetrics", "get", "what a node uses"),
        (format!("{at}/pods")): get("PodMetricsList", "list", "what all pods use"),
        (format!("{at}/namespaces/{{namespace}}/pods")): get("PodMetricsList", "list", "what a namespace's pods use"),
        (format!("{at}/namespaces/{{namespace}}/pods/{{name}}")): get("PodMetrics", "get", "what a pod uses"),
    });
    json!({"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "unversioned"}, "paths": paths,
        "components": {"schemas": schemas}})
}
