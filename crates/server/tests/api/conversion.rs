//! Versions that somebody else converts, and servers that share a store.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use base64::Engine as _;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use seawall_server::pki::Authority;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::{
    crd::{DEFINITIONS, define},
    harness::Api,
};

const ONE: &str = "/apis/example.com/v1/namespaces/default/hosts";
const TWO: &str = "/apis/example.com/v2/namespaces/default/hosts";

/// A webhook that splits `spec.address` of v1 into `spec.host` and `spec.port` of v2, and puts them together again.
struct Converter {
    url: String,
    bundle: String,
    calls: Arc<AtomicUsize>,
}

async fn converter() -> Converter {
    let authority = Authority::generate("converter").unwrap();
    let pair = authority.server("converter", "", &["localhost".into()], &["127.0.0.1".parse().unwrap()]).unwrap();
    let chain = CertificateDer::pem_slice_iter(pair.certificate.as_bytes()).collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
    let tls = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/convert", listener.local_addr().unwrap().port());
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, counted) = (acceptor.clone(), counted.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let service = service_fn(move |request: Request<Incoming>| {
                    counted.fetch_add(1, Ordering::SeqCst);
                    async move {
                        let body = request.into_body().collect().await?.to_bytes();
                        let answer = convert(&serde_json::from_slice(&body).unwrap());
                        Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from(answer.to_string()))))
                    }
                });
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    let bundle = base64::engine::general_purpose::STANDARD.encode(&authority.pem);
    Converter { url, bundle, calls }
}

fn convert(review: &Value) -> Value {
    let request = &review["request"];
    let to = request["desiredAPIVersion"].as_str().unwrap();
    let mut failed = None;
    let objects: Vec<Value> = request["objects"]
        .as_array()
        .unwrap()
        .iter()
        .map(|object| {
            let mut object = object.clone();
            object["apiVersion"] = to.into();
            object["metadata"]["labels"]["converted"] = "yes".into();
            // This is not taken over.
            object["metadata"]["finalizers"] = json!(["example.com/evil"]);
            match to {
                "example.com/v2" => match object["spec"]["address"].as_str().and_then(|a| a.split_once(':')) {
                    Some((host, port)) => object["spec"] = json!({"host": host, "port": port}),
                    None => failed = Some("an address has a port"),
                },
                _ => {
                    let (host, port) = (object["spec"]["host"].clone(), object["spec"]["port"].clone());
                    object["spec"] =
                        json!({"address": format!("{}:{}", host.as_str().unwrap(), port.as_str().unwrap())});
                }
            }
            object
        })
        .collect();
    let result = match failed {
        Some(why) => json!({"status": "Failed", "message": why}),
        None => json!({"status": "Success"}),
    };
    json!({"apiVersion": review["apiVersion"], "kind": "ConversionReview",
        "response": {"uid": request["uid"], "result": result, "convertedObjects": objects}})
}

fn definition(converter: &Converter) -> Value {
    let version = |name: &str, storage: bool, fields: Value| {
        json!({"name": name, "served": true, "storage": storage, "schema": {"openAPIV3Schema": {"type": "object",
            "properties": {"spec": {"type": "object", "properties": fields}}}}})
    };
    json!({"metadata": {"name": "hosts.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced",
        "names": {"plural": "hosts", "kind": "Host"},
        "conversion": {"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v1"],
            "clientConfig": {"url": converter.url, "caBundle": converter.bundle}}},
        "versions": [version("v1", true, json!({"address": {"type": "string"}})),
            version("v2", false, json!({"host": {"type": "string"}, "port": {"type": "string", "pattern": "^\\d+$"}}))]}})
}

#[tokio::test]
async fn a_webhook_converts() {
    let api = Api::new().await;
    let converter = converter().await;
    define(&api, definition(&converter)).await;
    let two = api.create(TWO, json!({"metadata": {"name": "a"}, "spec": {"host": "h", "port": "80"}})).await;
    assert_eq!((&two["apiVersion"], &two["spec"]), (&json!("example.com/v2"), &json!({"host": "h", "port": "80"})));
    let one = api.get(&format!("{ONE}/a")).await;
    assert_eq!((&one["apiVersion"], &one["spec"]), (&json!("example.com/v1"), &json!({"address": "h:80"})));
    // Labels may change on the way, nothing else of the metadata.
    assert_eq!(one["metadata"]["labels"], json!({"converted": "yes"}));
    assert_eq!((one["metadata"].get("finalizers"), &one["metadata"]["uid"]), (None, &two["metadata"]["uid"]));
    // Nobody is asked about what is stored as it is wanted.
    let before = converter.calls.load(Ordering::SeqCst);
    api.get(ONE).await;
    assert_eq!(converter.calls.load(Ordering::SeqCst), before);
    // A list and a watch, a patch and a check in the other version.
    for name in ["b", "c"] {
        api.create(ONE, json!({"metadata": {"name": name}, "spec": {"address": "x:1"}})).await;
    }
    let list = api.get(TWO).await;
    assert_eq!(list["items"].as_array().unwrap().len(), 3);
    assert_eq!(list["items"][2]["spec"], json!({"host": "x", "port": "1"}));
    assert_eq!(converter.calls.load(Ordering::SeqCst), before + 1);
    let version = list["metadata"]["resourceVersion"].as_str().unwrap();
    let mut watch = api.watch(&format!("{TWO}?watch=true&resourceVersion={version}")).await;
    let merge = "application/merge-patch+json";
    let (code, patched) = api.call(Method::PATCH, &format!("{TWO}/a"), merge, json!({"spec": {"port": "81"}})).await;
    assert_eq!((code, &patched["spec"]), (StatusCode::OK, &json!({"host": "h", "port": "81"})), "{patched}");
    assert_eq!(watch.next().await["object"]["spec"], json!({"host": "h", "port": "81"}));
    assert_eq!(api.get(&format!("{ONE}/a")).await["spec"], json!({"address": "h:81"}));
    let (code, refused) = api.call(Method::PATCH, &format!("{TWO}/a"), merge, json!({"spec": {"port": "x"}})).await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY, "{refused}");
    // What cannot be converted cannot be read in that version, and everything else can.
    api.create(ONE, json!({"metadata": {"name": "d"}, "spec": {"address": "nothing"}})).await;
    let (code, _, why) = api.fails(Method::GET, &format!("{TWO}/d"), Value::Null).await;
    assert_eq!(code, 500);
    assert!(why.contains("conversion webhook for example.com/v2, Kind=Host failed: an address has a port"), "{why}");
    api.get(&format!("{ONE}/d")).await;
    // Somebody else than the webhook answers under its name.
    let path = format!("{DEFINITIONS}/hosts.example.com");
    let other = Authority::generate("other").unwrap();
    let bundle = base64::engine::general_purpose::STANDARD.encode(&other.pem);
    let change = json!({"spec": {"conversion": {"webhook": {"clientConfig": {"caBundle": bundle}}}}});
    let (code, _) = api.call(Method::PATCH, &path, merge, change).await;
    assert_eq!(code, StatusCode::OK);
    let (code, _, why) = api.fails(Method::GET, &format!("{TWO}/a"), Value::Null).await;
    assert!(code == 500 && why.contains("certificate"), "{why}");
    // The definition can be deleted all the same: nothing has to be converted for that.
    api.call(Method::DELETE, &path, "", Value::Null).await;
    crate::crd::reaches(&api, &path, |d| d["reason"] == "NotFound").await;
}

#[tokio::test]
async fn every_server_knows_at_once() {
    let api = Api::new().await;
    let other = api.another().await;
    let converter = converter().await;
    define(&api, definition(&converter)).await;
    // The other one may not have heard of it; it asks before it says no.
    let made = other.create(ONE, json!({"metadata": {"name": "a"}, "spec": {"address": "x:1"}})).await;
    assert_eq!(api.get(&format!("{ONE}/a")).await["metadata"]["uid"], made["metadata"]["uid"]);
    // One that starts later reads definitions before their objects.
    let third = api.another().await;
    assert_eq!(third.get(ONE).await["items"].as_array().unwrap().len(), 1);
    let path = format!("{DEFINITIONS}/hosts.example.com");
    other.call(Method::DELETE, &path, "", Value::Null).await;
    for api in [&api, &other, &third] {
        crate::crd::reaches(api, &path, |d| d["reason"] == "NotFound").await;
        assert_eq!(api.fails(Method::GET, ONE, Value::Null).await.0, 404);
    }
    let left = api.store.list("/registry/example.com/", Default::default()).await.unwrap();
    assert!(left.entries.is_empty());
}
