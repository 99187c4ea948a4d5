//! A resource of another API server, explained by kubectl.

use base64::{Engine, engine::general_purpose::STANDARD};
use http::StatusCode;
use seawall_tests::{Options, Server, kubectl::has, until};
use serde_json::{Value, json};

use crate::site::{Asked, Site};

fn said(path: &str) -> (StatusCode, Value) {
    let refers = |name: &str| json!({"$ref": format!("#/definitions/example.{name}")});
    let kind = json!([{"group": "things.example", "version": "v1", "kind": "Thing"}]);
    let get = json!({"x-kubernetes-action": "get", "x-kubernetes-group-version-kind": kind[0],
        "responses": {"200": {"description": "OK", "schema": refers("Thing")}}});
    let body = match path {
        "/apis/things.example/v1" => json!({"kind": "APIResourceList", "apiVersion": "v1",
            "groupVersion": "things.example/v1", "resources": [{"name": "things", "singularName": "thing",
                "namespaced": true, "kind": "Thing", "verbs": ["get", "list"]}]}),
        "/openapi/v2" => json!({"swagger": "2.0", "info": {"title": "things", "version": "1"},
            "paths": {"/apis/things.example/v1/namespaces/{namespace}/things/{name}": {"get": get}},
            "definitions": {
                "example.Thing": {"type": "object", "description": "Thing is what this server is about.",
                    "properties": {"spec": refers("ThingSpec")}, "x-kubernetes-group-version-kind": kind},
                "example.ThingSpec": {"type": "object", "description": "What is wanted of a thing.",
                    "properties": {"size": {"type": "integer", "description": "How large it is."}}}}}),
        // It is an old one, which knows version 2 alone.
        _ => return (StatusCode::NOT_FOUND, Value::Null),
    };
    (StatusCode::OK, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_explains_what_another_server_has() {
    let site = Site::new(&["things.default.svc"], |asked: Asked| Box::pin(async move { said(&asked.path) })).await;
    let server = Server::start(Options { machine: None, args: vec!["--disable=scheduler".into()] }).await;
    let k = &server.kubectl;
    k.reaches("namespace/default", "{.metadata.name}", "default").await;
    has(k.run("explain things").await.fails(), &["the server doesn't have a resource type \"things\""]);
    let (port, authority) = (site.port, STANDARD.encode(&site.ca));
    k.apply(&format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: things}}
spec: {{type: ExternalName, externalName: localhost, ports: [{{port: {port}}}]}}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {{name: v1.things.example}}
spec:
  {{group: things.example, version: v1, groupPriorityMinimum: 100, versionPriority: 100, caBundle: {authority},
    service: {{namespace: default, name: things, port: {port}}}}}
"
    ))
    .await;
    k.run("wait --for=condition=Available apiservice/v1.things.example --timeout=60s").await.ok();
    let explained = until("kubectl explains things", async || {
        let output = k.run("explain things").await;
        output.status.success().then_some(output.stdout)
    })
    .await;
    has(explained, &["GROUP:      things.example", "KIND:       Thing", "Thing is what this server is about.", "spec"]);
    let field = k.run("explain thing.spec.size").await.ok();
    has(field, &["FIELD: size <integer>", "How large it is."]);
    // What is ours is explained as before. Both are by version 2 as well, which comes in protobuf.
    has(k.run("explain pods.spec.nodeName").await.ok(), &["FIELD: nodeName <string>"]);
    let old = "--output=plaintext-openapiv2";
    has(k.run(&format!("explain things.spec.size {old}")).await.ok(), &["<integer>", "How large it is."]);
    has(k.run(&format!("explain pods.spec.containers.image {old}")).await.ok(), &["<string>"]);
    k.run("delete apiservice v1.things.example").await.ok();
    until("nothing is known of them any more", async || {
        let output = k.run("explain things --api-version=things.example/v1").await;
        (!output.status.success()).then_some(())
    })
    .await;
}
