//! The API's semantics, through the whole pipeline, on the embedded store; `model.rs` on both.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::{sync::Arc, time::Duration};

use http::{Method, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};

mod aggregation;
mod apply;
mod conversion;
mod crd;
#[allow(dead_code, reason = "the store's tests need more of it")]
#[path = "../../../store/tests/etcd/cluster.rs"]
mod etcd;
mod families;
mod flow;
mod harness;
mod metrics;
mod model;
mod pod_security;
mod policies;
mod protobuf;
mod quota;
mod rbac;
#[path = "../common/site.rs"]
mod site;
mod webhooks;

use harness::Api;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const PODS: &str = "/api/v1/namespaces/default/pods";
const MERGE: &str = "application/merge-patch+json";

fn map(name: &str, data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
}

fn pod(name: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}})
}

#[tokio::test]
async fn names_versions_and_conflicts() {
    let api = Api::new().await;
    let made = api.create(MAPS, map("a", json!({"k": "1"}))).await;
    assert!(made["metadata"]["uid"].is_string() && made["metadata"]["resourceVersion"].is_string());
    assert_eq!(
        api.fails(Method::POST, MAPS, map("a", json!({}))).await,
        (409, "AlreadyExists".into(), "configmaps \"a\" already exists".into())
    );
    let path = format!("{MAPS}/a");
    // Nothing changes: nothing is written.
    let (_, same) = api.call(Method::PUT, &path, "application/json", made.clone()).await;
    assert_eq!(same["metadata"]["resourceVersion"], made["metadata"]["resourceVersion"]);
    let mut changed = made.clone();
    changed["data"]["k"] = "2".into();
    let (status, next) = api.call(Method::PUT, &path, "application/json", changed.clone()).await;
    assert_eq!(status, StatusCode::OK);
    assert_ne!(next["metadata"]["resourceVersion"], made["metadata"]["resourceVersion"]);
    let (code, reason, message) = api.fails(Method::PUT, &path, changed.clone()).await;
    assert_eq!((code, reason.as_str()), (409, "Conflict"));
    assert!(
        message.contains("the object has been modified; please apply your changes to the latest version"),
        "{message}"
    );
    changed["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    changed["metadata"]["uid"] = "another".into();
    assert_eq!(api.fails(Method::PUT, &path, changed).await.0, 409);
    assert_eq!(api.fails(Method::GET, &format!("{MAPS}/none"), Value::Null).await.2, "configmaps \"none\" not found");
    let generated = api.create(MAPS, json!({"metadata": {"generateName": "g-"}})).await;
    assert_eq!(generated["metadata"]["name"].as_str().unwrap().len(), 7);
    assert_eq!(
        api.fails(Method::POST, "/api/v1/namespaces/none/configmaps", map("a", json!({}))).await.2,
        "namespaces \"none\" not found"
    );
}

#[tokio::test]
async fn every_kind_of_patch() {
    let api = Api::new().await;
    api.create(MAPS, map("a", json!({"k": "1", "gone": "x"}))).await;
    let path = format!("{MAPS}/a");
    let (_, patched) = api.call(Method::PATCH, &path, MERGE, json!({"data": {"k": "2", "gone": null}})).await;
    assert_eq!(patched["data"], json!({"k": "2"}));
    let (_, patched) = api
        .call(
            Method::PATCH,
            &path,
            "application/json-patch+json",
            json!([{"op": "add", "path": "/data/n", "value": "3"}]),
        )
        .await;
    assert_eq!(patched["data"], json!({"k": "2", "n": "3"}));
    let (status, failed) = api
        .call(
            Method::PATCH,
            &path,
            "application/json-patch+json",
            json!([{"op": "test", "path": "/data/n", "value": "9"}]),
        )
        .await;
    assert_eq!((status, failed["reason"].as_str()), (StatusCode::UNPROCESSABLE_ENTITY, Some("Invalid")));
    let (status, _) = api.call(Method::PATCH, &path, "text/plain", json!({})).await;
    assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    api.create(PODS, pod("p")).await;
    let image = json!({"spec": {"containers": [{"name": "c", "image": "j"}]}});
    let (_, patched) =
        api.call(Method::PATCH, &format!("{PODS}/p"), "application/strategic-merge-patch+json", image).await;
    assert_eq!(patched["spec"]["containers"][0]["image"], "j");
    assert_eq!(patched["spec"]["containers"][0]["imagePullPolicy"], "Always");
    let (status, failed) =
        api.call(Method::PATCH, &format!("{PODS}/p"), MERGE, json!({"spec": {"restartPolicy": "Never"}})).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(failed["message"].as_str().unwrap().contains("pod updates may not change fields other than"), "{failed}");
}

/// Neither in memory nor in depth: what is nested too deeply cannot be read again, and may end the process on the way.
#[tokio::test]
async fn no_request_blows_an_object_up() {
    let api = Api::new().await;
    let path = format!("{MAPS}/a");
    api.create(MAPS, map("a", json!({"k": "v".repeat(1000)}))).await;
    let json_patch = async |path: &str, steps: Vec<Value>| {
        let (status, answer) = api.call(Method::PATCH, path, "application/json-patch+json", steps.into()).await;
        (status.as_u16(), answer["message"].as_str().unwrap_or_default().to_owned())
    };
    // Each doubles it.
    let copies = (0..60).map(|n| json!({"op": "copy", "from": "", "path": format!("/x{n}")}));
    let (code, message) = json_patch(&path, copies.collect()).await;
    assert_eq!(code, 422);
    assert!(message.contains("what is copied exceeds the limit"), "{message}");
    let deeper = |count: usize, at: &str| -> Vec<Value> {
        (1..=count)
            .map(|depth| json!({"op": "add", "path": format!("{at}{}", "/a".repeat(depth)), "value": {}}))
            .collect()
    };
    let (code, message) = json_patch(&path, deeper(1000, "")).await;
    assert_eq!(code, 422);
    assert!(message.contains("would be nested deeper than 100 levels"), "{message}");

    // Aliases of YAML: a list of lists.
    let (one, all) = ("x, ".repeat(2000), "*one, ".repeat(2000));
    let body = format!("metadata: {{name: y}}\ndata: {{one: &one [{one}], all: [{all}]}}\n");
    let response = api.raw(Method::POST, MAPS, &[("content-type", "application/yaml")], body).await;
    let answer = String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap();
    assert!(answer.contains("the document refers to too much of itself"), "{answer}");

    // Built-in types have places for anything, too.
    let revisions = "/apis/apps/v1/namespaces/default/controllerrevisions";
    let revision = |depth: usize| {
        let data = (1..depth).fold(json!({}), |data, _| json!({"a": data}));
        json!({"metadata": {"name": format!("r{depth}")}, "revision": 1, "data": data})
    };
    let (code, _, message) = api.fails(Method::POST, revisions, revision(100)).await;
    assert_eq!((code, &*message), (400, "the object is nested deeper than 100 levels"));
    let made = api.create(revisions, revision(99)).await;
    assert_eq!(api.get(&format!("{revisions}/r99")).await["data"], made["data"]);
}

#[tokio::test]
async fn errors_name_all_fields() {
    let api = Api::new().await;
    let bad = json!({"metadata": {"name": "Bad_Name"}, "spec": {"restartPolicy": "Sometimes", "containers": [{"name": "c"}]}});
    let (status, value) = api.call(Method::POST, PODS, "application/json", bad).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let fields: Vec<&str> =
        value["details"]["causes"].as_array().unwrap().iter().map(|c| c["field"].as_str().unwrap()).collect();
    assert_eq!(fields, ["metadata.name", "spec.restartPolicy", "spec.containers[0].image"]);
    let typed = json!({"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": 5}]}});
    let (code, reason, message) = api.fails(Method::POST, PODS, typed).await;
    assert_eq!((code, reason.as_str()), (400, "BadRequest"));
    assert!(
        message.contains("cannot unmarshal number into Go struct field Container.spec.containers.image of type string"),
        "{message}"
    );
    let unknown = json!({"metadata": {"name": "a"}, "colour": "red"});
    let strict = api.fails(Method::POST, &format!("{MAPS}?fieldValidation=Strict"), unknown.clone()).await;
    assert!(strict.2.contains("strict decoding error: unknown field \"colour\""), "{}", strict.2);
    let response = api.raw(Method::POST, MAPS, &[("content-type", "application/json")], unknown.to_string()).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    assert_eq!(response.headers()["warning"], "299 - \"unknown field \\\"colour\\\"\"");
    let response = api.raw(Method::POST, MAPS, &[], vec![b'x'; seawall_server::MAX_BODY + 1]).await;
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let response = api.raw(Method::POST, MAPS, &[("content-type", "application/json")], "{\"kind\":").await;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    assert_eq!(api.fails(Method::GET, "/apis/none/v1/things", Value::Null).await.0, 404);
    assert_eq!(api.fails(Method::GET, &format!("{MAPS}?limit=many"), Value::Null).await.0, 400);
    assert_eq!(
        api.fails(Method::GET, &format!("{PODS}?fieldSelector=spec.colour%3Dred"), Value::Null).await.2,
        "field label not supported: spec.colour"
    );
}

#[tokio::test]
async fn pages_are_of_one_snapshot() {
    let api = Api::new().await;
    for name in ["a", "b", "c", "d", "e"] {
        api.create(MAPS, map(name, json!({}))).await;
    }
    let names = |list: &Value| -> Vec<String> {
        list["items"].as_array().unwrap().iter().map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let first = api.get(&format!("{MAPS}?limit=2")).await;
    assert_eq!((names(&first), &first["metadata"]["remainingItemCount"]), (vec!["a".into(), "b".into()], &json!(3)));
    // What happens in between is not seen by the following pages.
    let (_, _) = api.call(Method::DELETE, &format!("{MAPS}/c"), "", Value::Null).await;
    api.create(MAPS, map("bb", json!({}))).await;
    let token = first["metadata"]["continue"].as_str().unwrap();
    let second = api.get(&format!("{MAPS}?limit=2&continue={token}")).await;
    assert_eq!(names(&second), ["c", "d"]);
    assert_eq!(second["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    let version = first["metadata"]["resourceVersion"].as_str().unwrap();
    let exact = api.get(&format!("{MAPS}?resourceVersion={version}&resourceVersionMatch=Exact")).await;
    assert_eq!(names(&exact), ["a", "b", "c", "d", "e"]);
    let now = api.get(MAPS).await;
    assert_eq!(names(&now), ["a", "b", "bb", "d", "e"]);
    assert_eq!(api.fails(Method::GET, &format!("{MAPS}?continue=nonsense"), Value::Null).await.0, 400);
    // The history goes.
    api.store.compact(api.store.revision().await.unwrap()).await.unwrap();
    let old = version.parse::<u64>().unwrap() - 1;
    let gone =
        api.fails(Method::GET, &format!("{MAPS}?resourceVersion={old}&resourceVersionMatch=Exact"), Value::Null).await;
    assert_eq!((gone.0, gone.1.as_str()), (410, "Expired"));
    assert_eq!(api.fails(Method::GET, &format!("{MAPS}?resourceVersion=99999999"), Value::Null).await.0, 504);
}

#[tokio::test]
async fn a_watch_sees_everything_in_order_and_can_be_resumed() {
    let api = Api::new().await;
    let start = api.create(MAPS, map("a", json!({}))).await["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let mut all = api.watch(&format!("{MAPS}?watch=true&resourceVersion={start}")).await;
    for name in ["b", "c"] {
        api.create(MAPS, map(name, json!({}))).await;
    }
    api.call(Method::PATCH, &format!("{MAPS}/b"), MERGE, json!({"data": {"k": "v"}})).await;
    api.call(Method::DELETE, &format!("{MAPS}/c"), "", Value::Null).await;
    let event = |kind: &str, name: &str| (kind.to_owned(), name.to_owned());
    assert_eq!(all.pair().await, event("ADDED", "b"));
    let second = all.next().await;
    assert_eq!(second["object"]["metadata"]["name"], "c");
    assert_eq!(second["object"]["kind"], "ConfigMap");
    // Resumed where it was.
    let version = second["object"]["metadata"]["resourceVersion"].as_str().unwrap();
    let mut resumed = api.watch(&format!("{MAPS}?watch=true&resourceVersion={version}")).await;
    for watch in [&mut all, &mut resumed] {
        assert_eq!(watch.pair().await, event("MODIFIED", "b"));
        let deleted = watch.next().await;
        assert_eq!(deleted["type"], "DELETED");
        // The version of a deletion is that of the deletion.
        assert!(
            deleted["object"]["metadata"]["resourceVersion"].as_str().unwrap().parse::<u64>().unwrap()
                > version.parse::<u64>().unwrap()
        );
    }
    // From the start, with the end of what exists marked.
    let path =
        format!("{MAPS}?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true");
    let mut initial = api.watch(&path).await;
    assert_eq!([initial.pair().await, initial.pair().await], [event("ADDED", "a"), event("ADDED", "b")]);
    let mark = initial.next().await;
    assert_eq!(
        (&mark["type"], &mark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"]),
        (&json!("BOOKMARK"), &json!("true"))
    );
}

#[tokio::test]
async fn a_selector_turns_changes_into_comings_and_goings() {
    let api = Api::new().await;
    api.create(PODS, pod("a")).await;
    let mut watch = api.watch(&format!("{PODS}?watch=true&labelSelector=app%3Dweb")).await;
    let mut bound = api.watch(&format!("{PODS}?watch=true&fieldSelector=spec.nodeName%3Dn1")).await;
    assert_eq!(watch.pair().await.0, "ADDED");
    api.call(Method::PATCH, &format!("{PODS}/a"), MERGE, json!({"metadata": {"labels": {"app": "other"}}})).await;
    let gone = watch.next().await;
    assert_eq!(gone["type"], "DELETED");
    api.call(Method::PATCH, &format!("{PODS}/a"), MERGE, json!({"metadata": {"labels": {"app": "web"}}})).await;
    assert_eq!(watch.pair().await.0, "ADDED");
    api.create(&format!("{PODS}/a/binding"), json!({"target": {"name": "n1"}})).await;
    assert_eq!(bound.pair().await, ("ADDED".into(), "a".into()));
    assert_eq!(api.fails(Method::POST, &format!("{PODS}/a/binding"), json!({"target": {"name": "n2"}})).await.0, 409);
    let one = api.get(&format!("{PODS}?fieldSelector=spec.nodeName%3Dn1")).await;
    assert_eq!(one["items"].as_array().unwrap().len(), 1);
    assert!(one["items"][0]["kind"].is_null(), "items of a list have no kind");
}

#[tokio::test]
async fn a_watcher_that_does_not_read_is_cut_off_and_costs_little() {
    let api = Api::new().await;
    api.create(MAPS, map("a", json!({}))).await;
    let mut slow = api.watch(&format!("{MAPS}?watch=true")).await;
    assert_eq!(slow.pair().await.0, "ADDED");
    // More than the log of changes holds.
    let value = "x".repeat(64 << 10);
    for number in 0..700 {
        let data = json!({"data": {"k": format!("{number}{value}")}});
        api.call(Method::PATCH, &format!("{MAPS}/a"), MERGE, data).await;
    }
    loop {
        let event = slow.next().await;
        if event["type"] == "ERROR" {
            assert_eq!((&event["object"]["code"], &event["object"]["reason"]), (&json!(410), &json!("Expired")));
            return;
        }
    }
}

#[tokio::test]
async fn deletion_waits_for_finalizers_and_grace() {
    let api = Api::new().await;
    let mut held = map("held", json!({}));
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    api.create(MAPS, held).await;
    let path = format!("{MAPS}/held");
    let (_, going) = api.call(Method::DELETE, &path, "", Value::Null).await;
    assert!(going["metadata"]["deletionTimestamp"].is_string());
    let more = json!({"metadata": {"finalizers": ["example.com/hold", "example.com/more"]}});
    let (status, _) = api.call(Method::PATCH, &path, MERGE, more).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "no finalizer is added to what is going");
    api.call(Method::PATCH, &path, MERGE, json!({"metadata": {"finalizers": null}})).await;
    assert_eq!(api.fails(Method::GET, &path, Value::Null).await.0, 404);
    // A pod that runs has its grace period, which can only become shorter.
    api.create(PODS, pod("p")).await;
    api.create(&format!("{PODS}/p/binding"), json!({"target": {"name": "n1"}})).await;
    let (_, going) =
        api.call(Method::DELETE, &format!("{PODS}/p"), "application/json", json!({"gracePeriodSeconds": 20})).await;
    assert_eq!(going["metadata"]["deletionGracePeriodSeconds"], 20);
    let (_, longer) =
        api.call(Method::DELETE, &format!("{PODS}/p"), "application/json", json!({"gracePeriodSeconds": 60})).await;
    assert_eq!(longer["metadata"]["deletionGracePeriodSeconds"], 20);
    let wrong = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": "another"}});
    assert_eq!(api.fails(Method::DELETE, &format!("{PODS}/p"), wrong).await.0, 409);
    api.call(Method::DELETE, &format!("{PODS}/p"), "application/json", json!({"gracePeriodSeconds": 0})).await;
    assert_eq!(api.fails(Method::GET, &format!("{PODS}/p"), Value::Null).await.0, 404);
    // One that was never scheduled goes at once.
    api.create(PODS, pod("q")).await;
    api.call(Method::DELETE, &format!("{PODS}/q"), "", Value::Null).await;
    assert_eq!(api.fails(Method::GET, &format!("{PODS}/q"), Value::Null).await.0, 404);
    let foreground = json!({"propagationPolicy": "Foreground"});
    api.create(MAPS, map("owner", json!({}))).await;
    let (_, going) = api.call(Method::DELETE, &format!("{MAPS}/owner"), "application/json", foreground).await;
    assert_eq!(going["metadata"]["finalizers"], json!(["foregroundDeletion"]));
    assert_eq!(api.fails(Method::DELETE, "/api/v1/namespaces/default", Value::Null).await.0, 403);
}

#[tokio::test]
async fn claims_and_volumes_are_protected_from_their_creation_on() {
    let api = Api::new().await;
    let resources = json!({"requests": {"storage": "1Gi"}});
    let claim = json!({"metadata": {"name": "c", "finalizers": ["example.org/mine"]},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": resources}});
    let made = api.create("/api/v1/namespaces/default/persistentvolumeclaims", claim).await;
    assert_eq!(made["metadata"]["finalizers"], json!(["example.org/mine", "kubernetes.io/pvc-protection"]));
    let volume = json!({"metadata": {"name": "v"}, "spec": {"capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteOnce"], "hostPath": {"path": "/tmp/v"}}});
    let made = api.create("/api/v1/persistentvolumes", volume).await;
    assert_eq!(made["metadata"]["finalizers"], json!(["kubernetes.io/pv-protection"]));
    api.call(Method::DELETE, "/api/v1/persistentvolumes/v", "", Value::Null).await;
    assert!(api.get("/api/v1/persistentvolumes/v").await["metadata"]["deletionTimestamp"].is_string());
}

#[tokio::test]
async fn events_are_forgotten_after_their_time() {
    let api = Api::configured(|config| config.event_ttl = Duration::from_secs(2)).await;
    let events = "/api/v1/namespaces/default/events";
    let event = |name: &str, seen: jiff::Timestamp| {
        json!({"metadata": {"name": name}, "involvedObject": {"kind": "Pod", "namespace": "default", "name": "p"},
            "lastTimestamp": seen.to_string()})
    };
    let now = jiff::Timestamp::now();
    api.create(events, event("old", now)).await;
    api.create(events, event("again", now + jiff::SignedDuration::from_hours(1))).await;
    let gone = tokio::time::timeout(Duration::from_secs(30), async {
        while api.call(Method::GET, &format!("{events}/old"), "", Value::Null).await.0 != StatusCode::NOT_FOUND {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    gone.await.expect("an event outlives --event-ttl");
    api.get(&format!("{events}/again")).await;
}

#[tokio::test]
async fn dry_run_changes_nothing() {
    let api = Api::new().await;
    api.create(&format!("{MAPS}?dryRun=All"), map("a", json!({}))).await;
    assert_eq!(api.fails(Method::GET, &format!("{MAPS}/a"), Value::Null).await.0, 404);
    api.create(MAPS, map("a", json!({"k": "1"}))).await;
    let (_, tried) = api.call(Method::PATCH, &format!("{MAPS}/a?dryRun=All"), MERGE, json!({"data": {"k": "2"}})).await;
    assert_eq!(tried["data"]["k"], "2");
    api.call(Method::DELETE, &format!("{MAPS}/a?dryRun=All"), "", Value::Null).await;
    assert_eq!(api.get(&format!("{MAPS}/a")).await["data"]["k"], "1");
    let service = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}});
    api.create("/api/v1/namespaces/default/services?dryRun=All", service).await;
    let addresses = api.get("/apis/networking.k8s.io/v1/ipaddresses").await;
    assert_eq!(addresses["items"].as_array().unwrap().len(), 1, "only that of the API itself");
}

#[tokio::test]
async fn another_name_has_rules_of_its_own() {
    let api = Api::new().await;
    let event = json!({"metadata": {"name": "Any_Name"}, "involvedObject": {"namespace": "default"}, "reason": "R"});
    api.create("/api/v1/namespaces/default/events", event).await;
    let newer = json!({"metadata": {"name": "e"}, "regarding": {"namespace": "default"}, "type": "Normal"});
    let (code, _, message) = api.fails(Method::POST, "/apis/events.k8s.io/v1/namespaces/default/events", newer).await;
    assert_eq!(code, 422);
    assert!(message.contains("eventTime: Required value"), "{message}");
}

#[tokio::test]
async fn what_is_said_of_devices_goes_with_them() {
    let api = Api::new().await;
    let claims = "/apis/resource.k8s.io/v1/namespaces/default/resourceclaims";
    let asks = json!({"requests": [{"name": "gpu", "exactly": {"deviceClassName": "c"}}]});
    api.create(claims, json!({"metadata": {"name": "c"}, "spec": {"devices": asks}})).await;
    let device = json!({"driver": "a.b", "pool": "p", "device": "d"});
    let mut result = device.clone();
    result["request"] = "gpu".into();
    let status = json!({"status": {"allocation": {"devices": {"results": [result]}}, "devices": [device]}});
    let (code, given) = api.call(Method::PATCH, &format!("{claims}/c/status"), MERGE, status).await;
    assert_eq!((code.as_u16(), &given["status"]["devices"][0]["device"]), (200, &json!("d")), "{given}");
    // Administrators' access is for namespaces that have a label for it.
    let asks = json!({"requests": [{"name": "gpu", "exactly": {"deviceClassName": "c", "adminAccess": true}}]});
    let admin = json!({"metadata": {"name": "a"}, "spec": {"devices": asks}});
    let (code, _, message) = api.fails(Method::POST, claims, admin.clone()).await;
    let why = "spec.devices.requests[0].adminAccess: Forbidden: admin access to devices requires the `resource.kubernetes.io/admin-access: true` label on the containing namespace";
    assert_eq!((code, message.contains(why)), (422, true), "{message}");
    let label = json!({"metadata": {"labels": {"resource.kubernetes.io/admin-access": "true"}}});
    api.call(Method::PATCH, "/api/v1/namespaces/default", MERGE, label).await;
    api.create(claims, admin).await;

    let back = json!({"status": {"allocation": null}});
    let (code, freed) = api.call(Method::PATCH, &format!("{claims}/c/status"), MERGE, back).await;
    assert_eq!(code.as_u16(), 200, "{freed}");
    assert!(freed["status"]["devices"].as_array().is_none_or(Vec::is_empty), "{freed}");
}

#[tokio::test]
async fn addresses_and_ports_are_given_once_and_come_back() {
    let api = Arc::new(Api::new().await);
    let services = "/api/v1/namespaces/default/services";
    let make =
        |name: String| json!({"metadata": {"name": name}, "spec": {"type": "NodePort", "ports": [{"port": 80}]}});
    // As many at once as there are ports.
    let all = futures::future::join_all((0..10).map(|n| api.create(services, make(format!("s{n}"))))).await;
    let unique = |pointer: &str| {
        all.iter().map(|s| s.pointer(pointer).unwrap().to_string()).collect::<std::collections::HashSet<_>>().len()
    };
    assert_eq!((unique("/spec/clusterIP"), unique("/spec/ports/0/nodePort")), (10, 10));
    assert_eq!(api.fails(Method::POST, services, make("more".into())).await.0, 503, "no port is left");
    let taken =
        json!({"metadata": {"name": "t"}, "spec": {"clusterIP": all[0]["spec"]["clusterIP"], "ports": [{"port": 80}]}});
    let (code, _, message) = api.fails(Method::POST, services, taken.clone()).await;
    assert_eq!(code, 422);
    assert!(message.contains("provided IP is already allocated"), "{message}");
    api.call(Method::DELETE, &format!("{services}/s0"), "", Value::Null).await;
    api.create(services, taken).await;
    // A balancer that asks nodes for endpoints gets a port for that, as long as it does.
    let local = json!({"metadata": {"name": "l"}, "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local",
        "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]}});
    let asks = api.create(services, local).await;
    assert_eq!(asks["spec"]["healthCheckNodePort"], all[0]["spec"]["ports"][0]["nodePort"], "the one that is left");
    let (_, kept) =
        api.call(Method::PATCH, &format!("{services}/l"), MERGE, json!({"spec": {"selector": {"a": "b"}}})).await;
    assert_eq!(kept["spec"]["healthCheckNodePort"], asks["spec"]["healthCheckNodePort"]);
    let all_nodes = json!({"spec": {"externalTrafficPolicy": "Cluster"}});
    let (_, turned) = api.call(Method::PATCH, &format!("{services}/l"), MERGE, all_nodes).await;
    assert!(turned["spec"]["healthCheckNodePort"].is_null(), "{turned}");
    api.create(services, make("again".into())).await;
    // A client that leaves the address out keeps it.
    let (_, kept) = api.call(Method::PUT, &format!("{services}/s1"), "application/json", make("s1".into())).await;
    assert_eq!(
        (&kept["spec"]["clusterIP"], &kept["spec"]["ports"][0]["nodePort"]),
        (&all[1]["spec"]["clusterIP"], &all[1]["spec"]["ports"][0]["nodePort"])
    );
    let outside = json!({"metadata": {"name": "o"}, "spec": {"clusterIP": "192.0.2.9", "ports": [{"port": 80}]}});
    assert!(api.fails(Method::POST, services, outside).await.2.contains("is not in the valid range"));
    // An address of a family without a range is nobody's to take, nor to give back.
    let both =
        json!({"metadata": {"name": "b"}, "spec": {"clusterIPs": ["10.96.0.200", "fd00::1"], "ports": [{"port": 80}]}});
    assert!(api.fails(Method::POST, services, both).await.2.contains("IPv6 is not configured on this cluster"));
}

#[tokio::test]
async fn tokens_end_with_what_they_are_bound_to() {
    let api = Api::new().await;
    api.create(PODS, pod("p")).await;
    let accounts = "/api/v1/namespaces/default/serviceaccounts/default/token";
    let request = json!({"spec": {"audiences": [], "expirationSeconds": 3600, "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "p"}}});
    let token = api.create(accounts, request).await["status"]["token"].as_str().unwrap().to_owned();
    let short = json!({"spec": {"audiences": [], "expirationSeconds": 60}});
    assert_eq!(api.fails(Method::POST, accounts, short).await.0, 422);
    let bearer = format!("Bearer {token}");
    let outside = api.with_user(None);
    let ask = async |path: &str| outside.raw(Method::GET, path, &[("authorization", &bearer)], "").await.status();
    assert_eq!(ask("/api/v1").await, StatusCode::OK);
    assert_eq!(ask("/api/v1/secrets").await, StatusCode::FORBIDDEN);
    let review = json!({"spec": {"token": token}});
    let reviewed = api.create("/apis/authentication.k8s.io/v1/tokenreviews", review).await;
    assert_eq!(reviewed["status"]["user"]["username"], "system:serviceaccount:default:default");
    api.call(Method::DELETE, &format!("{PODS}/p"), "", Value::Null).await;
    // The server follows the store's watch; it takes a moment.
    let gone = async {
        while ask("/api/v1").await != StatusCode::UNAUTHORIZED {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("the token ends with its pod");
    // Nobody, somebody else, and nonsense.
    let other = api.raw(Method::GET, "/api/v1/pods", &[("impersonate-user", "someone")], "").await;
    assert_eq!(other.status(), StatusCode::FORBIDDEN);
    assert_eq!(outside.raw(Method::GET, "/api/v1/pods", &[], "").await.status(), StatusCode::FORBIDDEN);
    assert_eq!(outside.raw(Method::GET, "/readyz", &[], "").await.status(), StatusCode::OK);
    assert_eq!(
        outside.raw(Method::GET, "/readyz", &[("authorization", "Bearer x.y.z")], "").await.status(),
        StatusCode::UNAUTHORIZED
    );
}

#[tokio::test]
async fn evictions_respect_budgets() {
    let api = Api::new().await;
    api.create(PODS, pod("p")).await;
    let running = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    api.call(Method::PATCH, &format!("{PODS}/p/status"), MERGE, running).await;
    let budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    api.create(
        budgets,
        json!({"metadata": {"name": "b"}, "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "web"}}}}),
    )
    .await;
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p"}});
    let (code, reason, message) = api.fails(Method::POST, &format!("{PODS}/p/eviction"), eviction.clone()).await;
    assert_eq!((code, reason.as_str()), (429, "TooManyRequests"));
    assert!(message.contains("would violate the pod's disruption budget"));
    let allowed = json!({"status": {"disruptionsAllowed": 1, "observedGeneration": 1}});
    api.call(Method::PATCH, &format!("{budgets}/b/status"), MERGE, allowed).await;
    api.create(&format!("{PODS}/p/eviction"), eviction).await;
    assert_eq!(api.fails(Method::GET, &format!("{PODS}/p"), Value::Null).await.0, 404);
    assert_eq!(api.get(&format!("{budgets}/b")).await["status"]["disruptionsAllowed"], 0);
}

#[tokio::test]
async fn status_and_scale_are_parts_of_their_own() {
    let api = Api::new().await;
    let deployments = "/apis/apps/v1/namespaces/default/deployments";
    let template = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let made = api.create(deployments, json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": template}, "status": {"replicas": 9}})).await;
    assert_eq!(
        (&made["spec"]["replicas"], &made["status"], &made["metadata"]["generation"]),
        (&json!(1), &Value::Null, &json!(1))
    );
    let path = format!("{deployments}/d");
    let both = json!({"spec": {"replicas": 5}, "status": {"replicas": 2}});
    let (_, status) = api.call(Method::PATCH, &format!("{path}/status"), MERGE, both.clone()).await;
    assert_eq!(
        (&status["spec"]["replicas"], &status["status"]["replicas"], &status["metadata"]["generation"]),
        (&json!(1), &json!(2), &json!(1))
    );
    let (_, spec) =
        api.call(Method::PATCH, &path, MERGE, json!({"spec": {"replicas": 5}, "status": {"replicas": 7}})).await;
    assert_eq!(
        (&spec["spec"]["replicas"], &spec["status"]["replicas"], &spec["metadata"]["generation"]),
        (&json!(5), &json!(2), &json!(2))
    );
    let scale = api.get(&format!("{path}/scale")).await;
    assert_eq!(
        (&scale["kind"], &scale["spec"]["replicas"], &scale["status"]["selector"]),
        (&json!("Scale"), &json!(5), &json!("a=b"))
    );
    let (_, scaled) = api.call(Method::PATCH, &format!("{path}/scale"), MERGE, json!({"spec": {"replicas": 3}})).await;
    assert_eq!(scaled["spec"]["replicas"], 3);
    let (status, _) = api.call(Method::PATCH, &format!("{path}/scale"), MERGE, json!({"spec": {"replicas": -1}})).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let (status, failed) =
        api.call(Method::PATCH, &path, MERGE, json!({"spec": {"selector": {"matchLabels": {"a": "c"}}}})).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{failed}");
}

#[tokio::test]
async fn tables_and_metadata_alone() {
    let api = Api::new().await;
    api.create(PODS, pod("p")).await;
    let ask = async |accept: &str, path: &str| -> Value {
        let response = api.raw(Method::GET, path, &[("accept", accept)], "").await;
        serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
    };
    let table = ask("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", PODS).await;
    let columns: Vec<&str> =
        table["columnDefinitions"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(columns[..5], ["Name", "Ready", "Status", "Restarts", "Age"]);
    assert_eq!(
        table["rows"][0]["cells"].as_array().unwrap()[..4],
        [json!("p"), json!("0/1"), json!("Pending"), json!("0")]
    );
    let meta = ask("application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io", PODS).await;
    assert_eq!((&meta["kind"], &meta["items"][0]["spec"]), (&json!("PartialObjectMetadataList"), &Value::Null));
    let response = api.raw(Method::GET, PODS, &[("accept", "application/cbor")], "").await;
    assert_eq!(response.status(), StatusCode::NOT_ACCEPTABLE);
    let yaml = api.raw(Method::GET, &format!("{PODS}/p"), &[("accept", "application/yaml")], "").await;
    assert_eq!(yaml.headers()["content-type"], "application/yaml");
    // One event, two groups.
    let event = json!({"metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "p", "namespace": "default"}, "message": "hello", "reason": "R", "type": "Normal"});
    api.create("/api/v1/namespaces/default/events", event).await;
    let other = api.get("/apis/events.k8s.io/v1/namespaces/default/events/e").await;
    assert_eq!(
        (&other["note"], &other["regarding"]["name"], &other["apiVersion"]),
        (&json!("hello"), &json!("p"), &json!("events.k8s.io/v1"))
    );
}

/// Rows of a list are cut from stored bytes, the row of a single object is made from the object: they say the same.
#[tokio::test]
async fn a_list_and_a_single_object_have_the_same_row() {
    let api = Api::new().await;
    let table = async |path: &str| -> Value {
        let accept = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")];
        let response = api.raw(Method::GET, path, &accept, "").await;
        serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
    };
    let mut full = pod("full");
    full["metadata"]["annotations"] = json!({"odd": "a } \" { \\ b", "env": "x"});
    full["metadata"]["labels"]["volumes"] = "name-of-a-field".into();
    full["spec"] = json!({"nodeName": "n", "readinessGates": [{"conditionType": "a/b"}], "initContainers": [{"name": "i", "image": "i"}],
        "containers": [{"name": "c", "image": "i", "env": [{"name": "A", "value": "b"}], "resources": {"limits": {"cpu": "1"}}}]});
    api.create(PODS, full).await;
    let mut running = api.get(&format!("{PODS}/full")).await;
    running["status"] = json!({"phase": "Running", "podIP": "10.0.0.7", "conditions": [{"type": "Ready", "status": "True"}, {"type": "a/b", "status": "True"}],
        "initContainerStatuses": [{"name": "i", "restartCount": 0, "ready": true, "image": "i", "imageID": "i", "state": {"terminated": {"exitCode": 0}}}],
        "containerStatuses": [{"name": "c", "restartCount": 2, "ready": true, "image": "i", "imageID": "i", "state": {"running": {}},
            "lastState": {"terminated": {"exitCode": 1, "finishedAt": "2020-01-01T00:00:00Z"}}}]});
    let (status, said) = api.call(Method::PUT, &format!("{PODS}/full/status"), "application/json", running).await;
    assert_eq!(status, StatusCode::OK, "{said}");
    for name in ["a", "b"] {
        api.create(PODS, pod(name)).await;
        api.create(MAPS, map(name, json!({"k": "v"}))).await;
    }
    for (path, names) in [(PODS, &["a", "b", "full"][..]), (MAPS, &["a", "b"])] {
        for include in ["", "includeObject=Metadata", "includeObject=None"] {
            let list = table(&format!("{path}?{include}")).await;
            assert_eq!(list["rows"].as_array().unwrap().len(), names.len(), "{list:#}");
            for (row, name) in list["rows"].as_array().unwrap().iter().zip(names) {
                let single = table(&format!("{path}/{name}?{include}")).await;
                assert_eq!(*row, single["rows"][0], "{path} {name} {include}");
                assert_eq!(list["columnDefinitions"], single["columnDefinitions"]);
            }
        }
    }
    // A watch makes rows of what was there, and of every change.
    let accept = "application/json;as=Table;v=v1;g=meta.k8s.io";
    for include in ["Metadata", "Object", "None"] {
        let mut watch = api.watch_as(&format!("{PODS}?watch=true&includeObject={include}"), accept).await;
        for name in ["a", "b", "full"] {
            let (event, single) = (watch.next().await, table(&format!("{PODS}/{name}?includeObject={include}")).await);
            assert_eq!(
                (&event["type"], &event["object"]["rows"]),
                (&json!("ADDED"), &single["rows"]),
                "{name} {include}"
            );
        }
        let mut changed = api.get(&format!("{PODS}/full")).await;
        changed["status"]["containerStatuses"][0]["restartCount"] = (include.len() + 10).into();
        let (status, said) = api.call(Method::PUT, &format!("{PODS}/full/status"), "application/json", changed).await;
        assert_eq!(status, StatusCode::OK, "{said}");
        let (event, single) = (watch.next().await, table(&format!("{PODS}/full?includeObject={include}")).await);
        assert_eq!((&event["type"], &event["object"]["rows"]), (&json!("MODIFIED"), &single["rows"]), "{include}");
        let restarts = event["object"]["rows"][0]["cells"][3].as_str().unwrap();
        assert!(restarts.starts_with(&format!("{} (", include.len() + 10)), "{restarts}");
    }
    let cells = table(PODS).await["rows"][2]["cells"].clone();
    assert_eq!((&cells[1], &cells[2], &cells[8]), (&json!("1/1"), &json!("Running"), &json!("1/1")), "{cells}");
    let none = table(&format!("{MAPS}?labelSelector=none%3Dthere")).await;
    assert_eq!((&none["kind"], &none["rows"]), (&json!("Table"), &json!([])));
}

#[tokio::test]
async fn every_resource_can_be_listed_and_described() {
    let api = Api::new().await;
    let groups = api.get("/apis").await;
    let mut versions: Vec<String> = vec!["/api/v1".into()];
    for group in groups["groups"].as_array().unwrap() {
        versions.extend(
            group["versions"]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| format!("/apis/{}", v["groupVersion"].as_str().unwrap())),
        );
    }
    let mut kinds = 0;
    for version in versions {
        let schema = api.get(&format!("/openapi/v3{version}")).await;
        for resource in api.get(&version).await["resources"].as_array().unwrap() {
            let name = resource["name"].as_str().unwrap();
            if name.contains('/') {
                continue;
            }
            kinds += 1;
            let described = schema["components"]["schemas"].as_object().unwrap().values();
            let of_kind = |s: &Value| {
                s["x-kubernetes-group-version-kind"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|k| k["kind"] == resource["kind"])
            };
            assert!(described.into_iter().any(of_kind), "{version} {name} is not described");
            if resource["verbs"].as_array().unwrap().iter().any(|v| v == "list") {
                let list = api.get(&format!("{version}/{name}")).await;
                assert_eq!(list["kind"], format!("{}List", resource["kind"].as_str().unwrap()));
                let table = api
                    .raw(
                        Method::GET,
                        &format!("{version}/{name}"),
                        &[("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")],
                        "",
                    )
                    .await;
                assert_eq!(table.status(), StatusCode::OK);
            }
        }
    }
    assert!(kinds > 60, "{kinds}");
}
