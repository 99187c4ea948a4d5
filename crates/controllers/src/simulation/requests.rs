//! What a client of the API server in memory may ask: the verbs that controllers use.

use std::sync::Arc;

use http::{Method, Request, Response};
use kube::{Client, client::Body};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::world::{Id, Refusal, World, not_found, row, rows};

/// A client of this world.
pub(super) fn client(world: Arc<Mutex<World>>) -> Client {
    seawall_client::in_process(move |request: Request<Body>| {
        let world = world.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect_bytes().await.unwrap();
            let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
            let (status, answer) = match answer(&mut world.lock(), &head.method, head.uri.path(), body) {
                Ok(object) => (200, object),
                Err(refusal) => said(&refusal),
            };
            let bytes = serde_json::to_vec(&answer).unwrap();
            Response::builder().status(status).body(Body::from(bytes)).unwrap()
        }
    })
}

fn said((code, reason, message): &Refusal) -> (u16, Value) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": reason, "code": code});
    (*code, status)
}

fn answer(world: &mut World, method: &Method, path: &str, body: Value) -> Result<Value, Refusal> {
    let lost = || (503, "ServiceUnavailable", "the connection is gone".to_owned());
    match world.strike(*method != Method::GET) {
        None => carry_out(world, method, path, body),
        Some(carried_out) => {
            if carried_out {
                let _ = carry_out(world, method, path, body);
            }
            Err(lost())
        }
    }
}

fn carry_out(world: &mut World, method: &Method, path: &str, body: Value) -> Result<Value, Refusal> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match parts[..] {
        ["apis", "metrics.k8s.io", _, "namespaces", _, "pods"] => return Ok(world.metrics()),
        ["apis", group, version] => return Ok(resources(group, version)),
        _ => {}
    }
    let (group, rest) = match parts[..] {
        ["api", _, ref rest @ ..] => ("", rest),
        ["apis", group, _, ref rest @ ..] => (group, rest),
        _ => panic!("no path of the API: {path}"),
    };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
        rest => ("", rest),
    };
    let row = row(group, rest[0]).unwrap_or_else(|| panic!("{path} is not served"));
    let subresource = rest.get(2).copied().unwrap_or_default();
    let id: Id = (row.plural, namespace.to_owned(), rest.get(1).copied().unwrap_or_default().to_owned());
    match method.as_str() {
        "GET" if subresource == "scale" => world.find(&id).map(scale).ok_or_else(|| not_found(&id)),
        "PUT" if subresource == "scale" => world
            .update(row, &id, "", |mut object| {
                object["metadata"]["resourceVersion"] = body["metadata"]["resourceVersion"].clone();
                object["spec"]["replicas"] = body["spec"]["replicas"].clone();
                object
            })
            .map(|object| scale(&object)),
        "GET" => world.find(&id).cloned().ok_or_else(|| not_found(&id)),
        "POST" => world.create(row, namespace, body),
        "PUT" => world.update(row, &id, subresource, |_| body),
        "PATCH" => world.update(row, &id, subresource, |mut object| {
            merge(&mut object, body);
            object
        }),
        "DELETE" => world.delete(&id, &body),
        other => panic!("{other} {path} is not served"),
    }
}

/// An object as a Scale.
fn scale(object: &Value) -> Value {
    let labels = object["spec"]["selector"]["matchLabels"].as_object().cloned().unwrap_or_default();
    let selector: Vec<String> =
        labels.iter().map(|(key, value)| format!("{key}={}", value.as_str().unwrap())).collect();
    json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": object["metadata"],
        "spec": {"replicas": object["spec"]["replicas"]},
        "status": {"replicas": object["spec"]["replicas"], "selector": selector.join(",")}})
}

/// What discovery says of a group.
fn resources(group: &str, version: &str) -> Value {
    let of_group = rows().iter().filter(|row| row.group == group && row.version == version);
    let list: Vec<Value> = of_group
        .map(|row| json!({"name": row.plural, "singularName": row.singular, "namespaced": true, "kind": row.kind, "verbs": ["get"]}))
        .collect();
    json!({"apiVersion": "v1", "kind": "APIResourceList", "groupVersion": format!("{group}/{version}"), "resources": list})
}

/// A merge patch (RFC 7386).
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let target = target.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            target.remove(&key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}
