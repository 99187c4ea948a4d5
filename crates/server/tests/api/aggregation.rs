//! API aggregation: another API server, over TLS, that believes what the requests' certificate proves.

use std::{convert::Infallible, sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::{RootCertStore, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use seawall_server::{auth::UserInfo, pki::Authority};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::harness::Api;

const SERVICES: &str = "/apis/apiregistration.k8s.io/v1/apiservices";
const THINGS: &str = "/apis/things.example/v1/things";

/// Waits until `holds` gives a value.
async fn within<T>(what: &str, mut holds: impl AsyncFnMut() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(value) = holds().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// What an extension server is told: whom it has to believe, and whose word.
async fn told(api: &Api) -> Value {
    let path = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";
    within("extension servers are told whom to believe", async || {
        let (status, map) = api.call(Method::GET, path, "", Value::Null).await;
        (status == StatusCode::OK).then(|| map["data"].clone())
    })
    .await
}

/// What it says of its API.
#[derive(Default)]
struct Described {
    two: Value,
    /// Nothing, if it does not know of version 3.
    three: Option<Value>,
    /// How often it was asked for the version 2 that was known.
    in_vain: usize,
}

/// Another API server, which answers who it was told that asks.
struct Things {
    authority: Authority,
    described: Arc<Mutex<Described>>,
    port: u16,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Things {
    async fn new(told: &Value, port: u16) -> Things {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path()).unwrap();
        let pair = authority.server("things", "", &["things.default.svc".into()], &[]).unwrap();
        let mut roots = RootCertStore::empty();
        let pem = told["requestheader-client-ca-file"].as_str().unwrap();
        for der in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            roots.add(der.unwrap()).unwrap();
        }
        let chain = CertificateDer::pem_slice_iter(pair.certificate.as_bytes()).map(|der| der.unwrap()).collect();
        let tls = rustls::ServerConfig::builder()
            .with_client_cert_verifier(WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap())
            .with_single_cert(chain, PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap())
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = CancellationToken::new();
        let names: Vec<String> = serde_json::from_str(told["requestheader-allowed-names"].as_str().unwrap()).unwrap();
        let described = Arc::new(Mutex::new(Described::default()));
        let says = described.clone();
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, names, says) = (acceptor.clone(), names.clone(), says.clone());
                tokio::spawn(async move {
                    // Whoever has no certificate of that authority gets no further.
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
                    let user = UserInfo::from_certificate(&certificate).unwrap();
                    assert!(names.contains(&user.username), "{user:?}");
                    let served = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service_fn(|request| answer(request, says.clone())))
                        .with_upgrades();
                    let _ = served.await;
                });
            }
        }));
        Things { authority, described, port, stop, _dir: dir }
    }

    /// Its APIService, and the Service before it.
    async fn register(&self, api: &Api, more: Value) {
        let service = json!({"metadata": {"name": "things"}, "spec": {"type": "ExternalName",
            "externalName": "localhost", "ports": [{"port": self.port}]}});
        api.create("/api/v1/namespaces/default/services", service).await;
        let mut object = json!({"metadata": {"name": "v1.things.example"}, "spec": {"group": "things.example",
            "version": "v1", "groupPriorityMinimum": 100, "versionPriority": 100,
            "service": {"namespace": "default", "name": "things", "port": self.port}}});
        for (key, value) in more.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        api.create(SERVICES, object).await;
    }
}

async fn answer(
    mut request: Request<Incoming>,
    says: Arc<Mutex<Described>>,
) -> Result<Response<UnsyncBoxBody<Bytes, Infallible>>, Infallible> {
    let full = |value: Value| Full::new(Bytes::from(value.to_string())).boxed_unsync();
    let path = request.uri().path().to_owned();
    if path.starts_with("/openapi/") {
        return Ok(describe(&request, &mut says.lock()).map(full));
    }
    if request.headers().contains_key("upgrade") {
        let upgraded = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let stream = TokioIo::new(upgraded.await.unwrap());
            let (mut read, mut write) = tokio::io::split(stream);
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
        let response = Response::builder().status(101).header("upgrade", "echo").header("connection", "Upgrade");
        return Ok(response.body(full(Value::Null)).unwrap());
    }
    let headers: Vec<(String, String)> = request
        .headers()
        .iter()
        .filter(|(name, _)| name.as_str().starts_with("x-remote-") || *name == "authorization")
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
        .collect();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let method = request.method().to_string();
    let body = match query.contains("watch=1") {
        true => {
            let lines = [json!({"type": "ADDED"}), json!({"type": "MODIFIED"})];
            let lines = lines.map(|line| Ok(Frame::data(Bytes::from(format!("{line}\n")))));
            StreamBody::new(futures::stream::iter(lines)).boxed_unsync()
        }
        false if path == "/apis/things.example/v1" => full(json!({"kind": "APIResourceList", "apiVersion": "v1",
            "groupVersion": "things.example/v1", "resources": [{"name": "things", "singularName": "thing",
                "namespaced": false, "kind": "Thing", "verbs": ["get", "list", "create"], "shortNames": ["th"]}]})),
        false => {
            let sent = request.into_body().collect().await.unwrap().to_bytes();
            full(json!({"path": path, "query": query, "method": method, "headers": headers, "length": sent.len()}))
        }
    };
    let mut response = Response::new(body);
    if path.ends_with("/teapot") {
        *response.status_mut() = StatusCode::IM_A_TEAPOT;
    }
    response.headers_mut().insert("content-type", "application/json".parse().unwrap());
    Ok(response)
}

fn describe(request: &Request<Incoming>, says: &mut Described) -> Response<Value> {
    let tag = format!("\"{}\"", says.two.to_string().len());
    let known = request.headers().get("if-none-match").is_some_and(|known| known == tag.as_str());
    let (status, body) = match (request.uri().path(), &says.three) {
        // This server itself asks, with no rights of its own.
        ("/openapi/v2", _) if request.headers()["x-remote-user"] != "system:aggregator" => (403, Value::Null),
        ("/openapi/v2", _) if says.two.is_null() => (404, Value::Null),
        ("/openapi/v2", _) if known => {
            says.in_vain += 1;
            (304, Value::Null)
        }
        ("/openapi/v2", _) => (200, says.two.clone()),
        ("/openapi/v3", Some(_)) => (
            200,
            json!({"paths": {
            "apis/things.example/v1": {"serverRelativeURL": "/openapi/v3/apis/things.example/v1?hash=7"},
            "apis/apps/v1": {"serverRelativeURL": "/openapi/v3/apis/apps/v1?hash=mine"}}}),
        ),
        ("/openapi/v3/apis/things.example/v1", Some(three)) => (200, three.clone()),
        _ => (404, Value::Null),
    };
    Response::builder().status(status).header("etag", tag).body(body).unwrap()
}

async fn condition(api: &Api, status: &str, reason: &str) -> Value {
    within(&format!("the APIService is {status} {reason}"), async || {
        let service = api.get(&format!("{SERVICES}/v1.things.example")).await;
        let condition = service["status"]["conditions"][0].clone();
        (condition["status"] == status && condition["reason"] == reason).then_some(condition)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_is_asked_for_its_group() {
    let api = Api::new().await;
    let things = Things::new(&told(&api).await, 0).await;
    things.register(&api, json!({"caBundle": BASE64.encode(&things.authority.pem)})).await;
    condition(&api, "True", "Passed").await;

    // It is told who asks; what a client says of itself does not come through, nor its token.
    let headers = [("x-remote-user", "root"), ("x-remote-group", "system:masters"), ("accept", "application/json")];
    let response = api.raw(Method::POST, &format!("{THINGS}?dryRun=All"), &headers, "x".repeat(100_000)).await;
    assert_eq!(response.status(), StatusCode::OK);
    let said: Value = serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
    assert_eq!(
        said,
        json!({"path": THINGS, "query": "dryRun=All", "method": "POST", "length": 100_000, "headers": [
            ["x-remote-user", "admin"], ["x-remote-group", "system:masters"], ["x-remote-group", "system:authenticated"]]})
    );
    // Its own codes are passed on, and so is what it streams.
    let (status, _) = api.call(Method::GET, &format!("{THINGS}/teapot"), "", Value::Null).await;
    assert_eq!(status, StatusCode::IM_A_TEAPOT);
    let mut watch = api.watch(&format!("{THINGS}?watch=1")).await;
    assert_eq!(watch.next().await["type"], "ADDED");
    assert_eq!(watch.next().await["type"], "MODIFIED");
    assert_eq!(watch.end().await, None);
    // Who may not is not let through.
    let nobody = api.with_user(Some(UserInfo::new("anna", &[])));
    let (code, _, message) = nobody.fails(Method::GET, THINGS, Value::Null).await;
    assert!(code == 403 && message.contains("things.things.example is forbidden: User \"anna\""), "{message}");

    // Clients find it.
    let groups = api.get("/apis").await;
    let names: Vec<&str> = groups["groups"].as_array().unwrap().iter().filter_map(|g| g["name"].as_str()).collect();
    assert_eq!(names.last(), Some(&"things.example"));
    assert_eq!(api.get("/apis/things.example").await["preferredVersion"]["groupVersion"], "things.example/v1");
    assert_eq!(api.get("/apis/things.example/v1").await["resources"][0]["name"], "things");
    let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let aggregated = async || {
        let response = api.raw(Method::GET, "/apis", &[("accept", accept)], "").await;
        let list: Value = serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
        list["items"].as_array().unwrap().last().unwrap()["versions"][0].clone()
    };
    let version = aggregated().await;
    assert_eq!((&version["freshness"], &version["resources"][0]["shortNames"][0]), (&json!("Current"), &json!("th")));

    // It goes, which is said in words, and comes back.
    let port = things.port;
    things.stop.cancel();
    let (code, reason, message) = within("it is gone", async || {
        let (status, said) = api.call(Method::GET, THINGS, "", Value::Null).await;
        let text = |key: &str| said[key].as_str().unwrap_or_default().to_owned();
        (status != StatusCode::OK).then(|| (status.as_u16(), text("reason"), text("message")))
    })
    .await;
    assert_eq!((code, &*reason), (503, "ServiceUnavailable"));
    assert!(message.contains("error trying to reach service things.default.svc: dial tcp"), "{message}");
    // So that it is asked now, and not only in half a minute.
    let patch = json!({"spec": {"versionPriority": 101}});
    let path = format!("{SERVICES}/v1.things.example");
    api.call(Method::PATCH, &path, "application/merge-patch+json", patch).await;
    let condition_now = condition(&api, "False", "FailedDiscoveryCheck").await;
    assert!(condition_now["message"].as_str().unwrap().contains("/apis/things.example/v1"), "{condition_now}");
    assert_eq!(aggregated().await["freshness"], "Stale");
    let again = Things::new(&told(&api).await, port).await;
    let patch = json!({"spec": {"caBundle": BASE64.encode(&again.authority.pem)}});
    api.call(Method::PATCH, &path, "application/merge-patch+json", patch).await;
    condition(&api, "True", "Passed").await;
    api.get(THINGS).await;
    // It is taken away, and with it what was served.
    api.call(Method::DELETE, &path, "", Value::Null).await;
    assert_eq!(api.fails(Method::GET, THINGS, Value::Null).await.0, 404);
    assert_eq!(api.fails(Method::GET, "/apis/things.example/v1", Value::Null).await.0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_nobody_vouches_for_is_not_believed() {
    let api = Api::new().await;
    let things = Things::new(&told(&api).await, 0).await;
    let other = tempfile::tempdir().unwrap();
    let other = Authority::open(other.path()).unwrap();
    things.register(&api, json!({"caBundle": BASE64.encode(&other.pem)})).await;
    let said = condition(&api, "False", "FailedDiscoveryCheck").await;
    assert!(said["message"].as_str().unwrap().contains("tls: "), "{said}");
    assert_eq!(api.fails(Method::GET, THINGS, Value::Null).await.0, 503);
    let path = format!("{SERVICES}/v1.things.example");
    let patch = json!({"spec": {"caBundle": null, "insecureSkipTLSVerify": true}});
    api.call(Method::PATCH, &path, "application/merge-patch+json", patch).await;
    condition(&api, "True", "Passed").await;
    // A Service that is not there.
    api.call(Method::DELETE, "/api/v1/namespaces/default/services/things", "", Value::Null).await;
    let patch = json!({"spec": {"versionPriority": 101}});
    api.call(Method::PATCH, &path, "application/merge-patch+json", patch).await;
    condition(&api, "False", "ServiceNotFound").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_openapi_is_part_of_ours() {
    let api = Api::new().await;
    let things = Things::new(&told(&api).await, 0).await;
    let meta = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
    let thing = |description: &str| {
        json!({"type": "object", "description": description,
        "properties": {"metadata": {"$ref": format!("#/definitions/{meta}")}},
        "x-kubernetes-group-version-kind": [{"group": "things.example", "version": "v1", "kind": "Thing"}]})
    };
    let document = |description: &str| {
        let refers =
            |name: &str| json!({"get": {"responses": {"200": {"schema": {"$ref": format!("#/definitions/{name}")}}}}});
        json!({"swagger": "2.0", "info": {"title": "things", "version": "1"},
            "paths": {"/apis/things.example/v1/things": refers("example.Thing"), "/apis/apps/v1/mine": refers("example.Mine"),
                "/apis/things.example/v2/things": refers("example.Mine"), "/healthz": {}},
            "definitions": {"example.Thing": thing(description), "example.Mine": {"type": "string"},
                meta: {"type": "object", "description": "another one"}}})
    };
    things.described.lock().two = document("first");
    things.register(&api, json!({"caBundle": BASE64.encode(&things.authority.pem)})).await;
    let path = format!("{SERVICES}/v1.things.example");
    // So that it is asked now, and not only in a minute.
    let ask_again = async |priority: usize| {
        let patch = json!({"spec": {"versionPriority": priority}});
        assert_eq!(api.call(Method::PATCH, &path, "application/merge-patch+json", patch).await.0, StatusCode::OK);
    };
    let says = async |description: &str| {
        within(description, async || {
            let document = api.get("/openapi/v2").await;
            (document["definitions"]["example.Thing"]["description"] == description).then_some(document)
        })
        .await
    };
    let joined = says("first").await;
    assert!(joined["paths"]["/apis/things.example/v1/things"].is_object());
    // Only what it is registered for is believed, and what that needs.
    for path in ["/apis/apps/v1/mine", "/apis/things.example/v2/things", "/healthz"] {
        assert_eq!(joined["paths"][path], Value::Null, "{path}");
    }
    assert_eq!(joined["definitions"]["example.Mine"], Value::Null);
    // What means something else here is called otherwise, and ours stays what it was.
    let refers = &joined["definitions"]["example.Thing"]["properties"]["metadata"]["$ref"];
    assert_eq!(*refers, format!("#/definitions/{meta}_v2"));
    assert_eq!(joined["definitions"][format!("{meta}_v2")]["description"], "another one");
    assert!(joined["definitions"][meta]["properties"]["labels"].is_object());

    // It has no version 3, which is made of version 2.
    let url = async || api.get("/openapi/v3").await["paths"]["apis/things.example/v1"]["serverRelativeURL"].clone();
    let made = url().await.as_str().unwrap().to_owned();
    let third = api.get(&made).await;
    let schema = &third["components"]["schemas"]["example.Thing"];
    assert_eq!(schema["properties"]["metadata"]["$ref"], format!("#/components/schemas/{meta}"));
    assert_eq!(third["openapi"], "3.0.0");

    // Who has it already is not sent it again.
    let response = api.raw(Method::GET, "/openapi/v2", &[], "").await;
    let tag = response.headers()["etag"].to_str().unwrap().to_owned();
    drop(response);
    let same = api.raw(Method::GET, "/openapi/v2", &[("if-none-match", &*tag)], "").await;
    assert_eq!(same.status(), StatusCode::NOT_MODIFIED);
    assert!(same.into_body().collect().await.unwrap().to_bytes().is_empty());
    // Nor is it asked to say it again.
    ask_again(102).await;
    within("it is asked for what has changed", async || (things.described.lock().in_vain > 0).then_some(())).await;
    // What it says anew is told, and version 3 is its own as soon as it has one.
    {
        let mut described = things.described.lock();
        described.two = document("the second one");
        described.three = Some(json!({"openapi": "3.0.0", "its": "own"}));
    }
    ask_again(103).await;
    says("the second one").await;
    let changed = api.raw(Method::GET, "/openapi/v2", &[("if-none-match", &*tag)], "").await;
    assert_eq!(changed.status(), StatusCode::OK);
    within("version 3 is its own", async || (url().await == "/openapi/v3/apis/things.example/v1?hash=7").then_some(()))
        .await;
    assert_eq!(api.get("/openapi/v3/apis/things.example/v1?hash=7").await["its"], "own");
    assert_ne!(
        api.get("/openapi/v3").await["paths"]["apis/apps/v1"]["serverRelativeURL"],
        "/openapi/v3/apis/apps/v1?hash=mine"
    );

    // What it said stays while it is away, and goes with its registration.
    things.stop.cancel();
    ask_again(104).await;
    condition(&api, "False", "FailedDiscoveryCheck").await;
    says("the second one").await;
    api.call(Method::DELETE, &path, "", Value::Null).await;
    within("it is forgotten", async || {
        api.get("/openapi/v2").await["definitions"]["example.Thing"].is_null().then_some(())
    })
    .await;
    assert_eq!(url().await, Value::Null);
}

#[tokio::test]
async fn what_is_served_here_is_registered() {
    let api = Api::new().await;
    for name in ["v1.", "v1.apps", "v2.autoscaling", "v1.apiextensions.k8s.io"] {
        let service = within(name, async || {
            let (status, service) = api.call(Method::GET, &format!("{SERVICES}/{name}"), "", Value::Null).await;
            (status == StatusCode::OK && service["status"]["conditions"].is_array()).then_some(service)
        })
        .await;
        assert_eq!(service["status"]["conditions"][0]["reason"], "Local", "{service}");
        assert_eq!(service["metadata"]["labels"]["kube-aggregator.kubernetes.io/automanaged"], "onstart");
    }
    let definition = json!({"metadata": {"name": "bars.foo.example"}, "spec": {"group": "foo.example", "scope": "Cluster",
        "names": {"plural": "bars", "kind": "Bar"}, "versions": [{"name": "v1", "served": true, "storage": true,
            "schema": {"openAPIV3Schema": {"type": "object"}}}]}});
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    api.create(definitions, definition).await;
    let is_there = async || {
        let path = format!("{SERVICES}/v1.foo.example");
        api.call(Method::GET, &path, "", Value::Null).await.0 == StatusCode::OK
    };
    within("the custom group is registered", async || is_there().await.then_some(())).await;
    api.call(Method::DELETE, &format!("{definitions}/bars.foo.example"), "", Value::Null).await;
    within("and taken away", async || (!is_there().await).then_some(())).await;
}

#[tokio::test]
async fn wrong_registrations_are_refused() {
    let api = Api::new().await;
    let service = |name: &str, more: Value| {
        let mut object = json!({"metadata": {"name": name}, "spec": {"group": "a.example", "version": "v1",
            "groupPriorityMinimum": 100, "versionPriority": 100, "service": {"namespace": "n", "name": "s"}}});
        for (key, value) in more.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        object
    };
    for (object, told) in [
        (service("v2.a.example", json!({})), "metadata.name: Invalid value: \"v2.a.example\": must be `spec.version"),
        (service("v1.a.example", json!({"versionPriority": 0})), "spec.versionPriority: Invalid value: 0"),
        (
            service("v1.a.example", json!({"caBundle": "YQ==", "insecureSkipTLSVerify": true})),
            "may not be true if caBundle",
        ),
        (service("v1.a.example", json!({"service": {"name": "s"}})), "spec.service.namespace: Required value"),
        (
            service("v1.a.example", json!({"service": null, "caBundle": "YQ=="})),
            "local APIServices may not have a caBundle",
        ),
    ] {
        let (code, _, message) = api.fails(Method::POST, SERVICES, object).await;
        assert!(code == 422 && message.contains(told), "{message}");
    }
}
