//! Answers in protobuf, as client-go asks for them.

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use seawall_api::{
    proto::{self, MAGIC},
    resources,
    schema::Schemas,
};
use serde_json::{Value, json};

use crate::harness::Api;

/// What client-go sends.
const ACCEPT: [(&str, &str); 1] = [("accept", "application/vnd.kubernetes.protobuf,application/json")];
const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn schemas() -> Schemas {
    let rows = resources::all();
    let of = |row: &seawall_api::Row| {
        let others = row.aliases.iter().map(|alias| alias.conversion.schema);
        std::iter::once(row.schema).chain(others).collect::<Vec<_>>()
    };
    Schemas::new(rows.iter().flat_map(of))
}

fn decode(body: &[u8], ty: &str) -> Value {
    let schemas = schemas();
    proto::decode(&schemas, schemas.by_name(ty).unwrap(), body).unwrap()
}

/// The fields of a message that have a length; nothing of Seawall's own reads them here.
fn fields(mut bytes: &[u8]) -> Vec<(u64, &[u8])> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return value;
            }
        }
    }
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        match tag & 7 {
            0 => drop(varint(&mut bytes)),
            2 => {
                let length = varint(&mut bytes) as usize;
                all.push((tag >> 3, &bytes[..length]));
                bytes = &bytes[length..];
            }
            other => panic!("wire type {other}"),
        }
    }
    all
}

/// The content of a field.
fn field(bytes: &[u8], number: u64) -> &[u8] {
    fields(bytes).into_iter().find(|(n, _)| *n == number).map(|(_, content)| content).expect("the field is there")
}

/// Kind and message of an envelope.
fn open(body: &[u8]) -> (String, &[u8]) {
    let body = body.strip_prefix(MAGIC).expect("the magic bytes");
    let kind = String::from_utf8(field(field(body, 1), 2).to_vec()).unwrap();
    (kind, field(body, 2))
}

async fn ask(api: &Api, path: &str) -> (Option<String>, Bytes) {
    let response = api.raw(Method::GET, path, &ACCEPT, "").await;
    assert_eq!(response.status(), StatusCode::OK, "{path}");
    let kind = response.headers().get("content-type").map(|v| v.to_str().unwrap().to_owned());
    (kind, response.into_body().collect().await.unwrap().to_bytes())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_and_lists() {
    let api = Api::new().await;
    for name in ["a", "b"] {
        api.create(MAPS, json!({"metadata": {"name": name, "labels": {"l": name}}, "data": {"k": name}})).await;
    }
    let path = format!("{MAPS}/a");
    // Twice: made, and kept.
    for _ in 0..2 {
        let (kind, body) = ask(&api, &path).await;
        assert_eq!(kind.unwrap(), "application/vnd.kubernetes.protobuf");
        assert_eq!(decode(&body, "io.k8s.api.core.v1.ConfigMap"), api.get(&path).await);
    }
    let (_, body) = ask(&api, &format!("{MAPS}?limit=1")).await;
    let (kind, list) = open(&body);
    assert_eq!(kind, "ConfigMapList");
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    // The same moment: the server writes things of its own meanwhile.
    let version = text(field(field(list, 1), 2));
    let expect = api.get(&format!("{MAPS}?limit=1&resourceVersion={version}&resourceVersionMatch=Exact")).await;
    assert_eq!(version, expect["metadata"]["resourceVersion"]);
    assert_eq!(text(field(field(list, 1), 3)), expect["metadata"]["continue"]);
    let items: Vec<_> = fields(list).into_iter().filter(|(n, _)| *n == 2).map(|(_, item)| item).collect();
    assert_eq!(items.len(), 1);
    let item = decode(&proto::encode::envelope("v1", "ConfigMap", items[0]), "io.k8s.api.core.v1.ConfigMap");
    assert_eq!(item["metadata"], expect["items"][0]["metadata"]);
    assert_eq!(item["data"], expect["items"][0]["data"]);

    // What is answered to a write, and in another version of the same object.
    let body = json!({"metadata": {"name": "c"}, "data": {"k": "c"}}).to_string();
    let response = api.raw(Method::POST, MAPS, &[ACCEPT[0], ("content-type", "application/json")], body).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(decode(&body, "io.k8s.api.core.v1.ConfigMap"), api.get(&format!("{MAPS}/c")).await);
    let events = "/apis/events.k8s.io/v1/namespaces/default/events";
    let event = json!({"metadata": {"name": "e"}, "regarding": {"kind": "Pod", "namespace": "default", "name": "p"},
        "reason": "R", "action": "a", "type": "Normal", "note": "n", "eventTime": "2026-01-02T03:04:05.000006Z",
        "reportingController": "c", "reportingInstance": "i"});
    api.create(events, event).await;
    let (_, body) = ask(&api, &format!("{events}/e")).await;
    assert_eq!(decode(&body, "io.k8s.api.events.v1.Event"), api.get(&format!("{events}/e")).await);
}

/// A list that is sent in several pieces is as long as its head says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_list() {
    let api = Api::new().await;
    for number in 0..12 {
        let data = json!({"k": "x".repeat(40_000)});
        api.create(MAPS, json!({"metadata": {"name": format!("m{number:02}")}, "data": data})).await;
    }
    let (_, body) = ask(&api, MAPS).await;
    assert!(body.len() > 480_000);
    let (_, list) = open(&body);
    let names = fields(list).into_iter().filter(|(n, _)| *n == 2).map(|(_, item)| field(field(item, 1), 1).to_vec());
    let expect = (0..12).map(|number| format!("m{number:02}").into_bytes());
    assert!(names.eq(expect));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch() {
    let api = Api::new().await;
    api.create(MAPS, json!({"metadata": {"name": "a"}, "data": {"k": "1"}})).await;
    let path =
        format!("{MAPS}?watch=true&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan");
    let response = api.raw(Method::GET, &path, &ACCEPT, "").await;
    assert_eq!(response.headers()["content-type"], "application/vnd.kubernetes.protobuf;stream=watch");
    let mut body = response.into_body();
    let mut rest = Vec::new();
    let mut next = async || loop {
        if rest.len() >= 4 {
            let length = u32::from_be_bytes(rest[..4].try_into().unwrap()) as usize;
            if rest.len() >= 4 + length {
                let frame: Vec<u8> = rest.drain(..4 + length).skip(4).collect();
                let object = decode(field(field(&frame, 2), 1), "io.k8s.api.core.v1.ConfigMap");
                return (String::from_utf8(field(&frame, 1).to_vec()).unwrap(), object);
            }
        }
        let wait = tokio::time::timeout(std::time::Duration::from_secs(10), body.frame());
        rest.extend_from_slice(
            &wait.await.expect("an event").expect("the watch goes on").unwrap().into_data().unwrap(),
        );
    };
    let (ty, object) = next().await;
    assert_eq!((&*ty, &object), ("ADDED", &api.get(&format!("{MAPS}/a")).await));
    let (ty, bookmark) = next().await;
    assert_eq!(ty, "BOOKMARK");
    assert_eq!(bookmark["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    let (_, changed) = api
        .call(Method::PATCH, &format!("{MAPS}/a"), "application/merge-patch+json", json!({"data": {"k": "2"}}))
        .await;
    assert_eq!(next().await, ("MODIFIED".to_owned(), changed.clone()));
    api.call(Method::DELETE, &format!("{MAPS}/a"), "", Value::Null).await;
    let (ty, deleted) = next().await;
    assert_eq!((&*ty, &deleted["data"]), ("DELETED", &changed["data"]));
    let version = |object: &Value| object["metadata"]["resourceVersion"].as_str().unwrap().parse::<u64>().unwrap();
    assert!(version(&deleted) > version(&changed), "a deletion tells its own version");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_alone_and_what_is_not_spoken() {
    let api = Api::new().await;
    api.create(MAPS, json!({"metadata": {"name": "a"}, "data": {"k": "1"}})).await;
    let accept = "application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
    let response = api.raw(Method::GET, MAPS, &[("accept", accept)], "").await;
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let (kind, list) = open(&body);
    assert_eq!(kind, "PartialObjectMetadataList");
    let item = fields(list).into_iter().rfind(|(n, _)| *n == 2).unwrap().1;
    assert_eq!(field(field(item, 1), 1), b"a");
    assert_eq!(fields(item).len(), 1, "nothing but the metadata");
    // Tables, and everything that is no object, are JSON.
    let accept =
        "application/vnd.kubernetes.protobuf;as=Table;g=meta.k8s.io;v=v1,application/json;as=Table;g=meta.k8s.io;v=v1";
    let response = api.raw(Method::GET, MAPS, &[("accept", accept)], "").await;
    assert_eq!(response.headers()["content-type"], "application/json");
    let response = api.raw(Method::GET, &format!("{MAPS}/nobody"), &ACCEPT, "").await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["content-type"]),
        (404, &"application/json".parse().unwrap())
    );
}
