//! Custom resources, from the definition to its end.

use std::time::Duration;

use http::{Method, StatusCode};
use seawall_api::cel::{Program, openapi};
use serde_json::{Value, json};

use crate::harness::Api;

pub(crate) const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const TABS: &str = "/apis/stable.example.com/v1/namespaces/default/crontabs";
const MERGE: &str = "application/merge-patch+json";
const APPLY: &str = "application/apply-patch+yaml";

fn schema() -> Value {
    json!({"type": "object", "properties": {
        "spec": {"type": "object", "required": ["cronSpec"], "properties": {
            "cronSpec": {"type": "string", "pattern": "^(\\d+|\\*)(/\\d+)?(\\s+(\\d+|\\*)(/\\d+)?){4}$"},
            "image": {"type": "string", "default": "busybox"},
            "replicas": {"type": "integer", "minimum": 1, "maximum": 10},
            "mode": {"type": "string", "enum": ["fast", "slow"]},
            "port": {"x-kubernetes-int-or-string": true},
            "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "steps": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                "items": {"type": "object", "required": ["name"], "properties": {
                    "name": {"type": "string"}, "run": {"type": "string"}}}},
            "note": {"type": "string", "nullable": true},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}}}},
        "status": {"type": "object", "properties": {
            "replicas": {"type": "integer"}, "selector": {"type": "string"}}}}})
}

fn definition() -> Value {
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "crontabs.stable.example.com"},
        "spec": {"group": "stable.example.com", "scope": "Namespaced",
            "names": {"plural": "crontabs", "kind": "CronTab", "shortNames": ["ct"], "categories": ["all"]},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema()},
                "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.replicas",
                    "statusReplicasPath": ".status.replicas", "labelSelectorPath": ".status.selector"}},
                "selectableFields": [{"jsonPath": ".spec.mode"}],
                "additionalPrinterColumns": [{"name": "Spec", "type": "string", "jsonPath": ".spec.cronSpec"},
                    {"name": "Replicas", "type": "integer", "jsonPath": ".spec.replicas", "priority": 1},
                    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}]}]}})
}

fn tab(name: &str) -> Value {
    json!({"apiVersion": "stable.example.com/v1", "kind": "CronTab", "metadata": {"name": name},
        "spec": {"cronSpec": "* * * * */5", "replicas": 2}})
}

pub(crate) async fn reaches(api: &Api, path: &str, good: impl Fn(&Value) -> bool) -> Value {
    for _ in 0..100 {
        let (_, found) = api.call(Method::GET, path, "", Value::Null).await;
        if good(&found) {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{path}: {}", api.call(Method::GET, path, "", Value::Null).await.1)
}

fn has(definition: &Value, ty: &str, status: &str) -> bool {
    definition["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|c| c["type"] == ty && c["status"] == status)
}

pub(crate) async fn define(api: &Api, definition: Value) -> Value {
    let name = definition["metadata"]["name"].as_str().unwrap().to_owned();
    api.create(DEFINITIONS, definition).await;
    reaches(api, &format!("{DEFINITIONS}/{name}"), |d| has(d, "Established", "True")).await
}

#[tokio::test]
async fn from_definition_to_end() {
    let api = Api::new().await;
    assert_eq!(api.fails(Method::GET, TABS, Value::Null).await.0, 404);
    let made = define(&api, definition()).await;
    assert_eq!(made["spec"]["names"]["singular"], "crontab");
    assert_eq!(made["status"]["acceptedNames"], made["spec"]["names"]);
    assert_eq!(made["status"]["storedVersions"], json!(["v1"]));
    // No wait: who sees the condition can use the resource.
    let created = api.create(TABS, tab("a")).await;
    assert_eq!(created["spec"]["image"], "busybox");
    assert_eq!(created["metadata"]["generation"], 1);
    let list = api.get(TABS).await;
    assert_eq!(list["kind"], "CronTabList");
    assert_eq!(
        (&list["items"][0]["kind"], &list["items"][0]["apiVersion"]),
        (&json!("CronTab"), &json!("stable.example.com/v1"))
    );

    // A watch sees what happens, in the version that was asked for, and ends with the definition.
    let version = list["metadata"]["resourceVersion"].as_str().unwrap();
    let mut watch = api.watch(&format!("{TABS}?watch=true&resourceVersion={version}")).await;
    api.create(TABS, tab("b")).await;
    let event = watch.next().await;
    assert_eq!((&event["type"], &event["object"]["kind"]), (&json!("ADDED"), &json!("CronTab")));

    // One object is held by a finalizer of somebody else.
    let finalizers = json!({"metadata": {"finalizers": ["example.com/hold"]}});
    api.call(Method::PATCH, &format!("{TABS}/a"), MERGE, finalizers).await;
    let path = format!("{DEFINITIONS}/crontabs.stable.example.com");
    let (status, going) = api.call(Method::DELETE, &path, "", Value::Null).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(going["metadata"]["finalizers"], json!(["customresourcecleanup.apiextensions.k8s.io"]));
    reaches(&api, &path, |d| {
        d["status"]["conditions"].as_array().unwrap().iter().any(|c| c["reason"] == "InstanceDeletionInProgress")
    })
    .await;
    assert_eq!(api.fails(Method::POST, TABS, tab("c")).await.0, 405);
    let held = reaches(&api, TABS, |list| list["items"].as_array().is_some_and(|items| items.len() == 1)).await;
    assert!(held["items"][0]["metadata"]["deletionTimestamp"].is_string());
    api.call(Method::PATCH, &format!("{TABS}/a"), MERGE, json!({"metadata": {"finalizers": null}})).await;
    reaches(&api, &path, |d| d["reason"] == "NotFound").await;
    assert_eq!(api.fails(Method::GET, TABS, Value::Null).await.0, 404);
    assert!(!api.get("/apis").await["groups"].to_string().contains("stable.example.com"));
    let mut rest = Vec::new();
    while let Some(event) = watch.end().await {
        rest.push(event["type"].as_str().unwrap().to_owned());
    }
    assert!(rest.contains(&"DELETED".to_owned()) && !rest.contains(&"ERROR".to_owned()), "{rest:?}");

    // Back again, and empty.
    define(&api, definition()).await;
    assert_eq!(api.get(TABS).await["items"], json!([]));
    api.create(TABS, tab("a")).await;
}

#[tokio::test]
async fn objects_are_checked_against_the_schema() {
    let api = Api::new().await;
    define(&api, definition()).await;
    let check = async |spec: Value, expect: &[&str]| {
        let mut bad = tab("bad");
        bad["spec"] = spec;
        let (status, answer) = api.call(Method::POST, TABS, "application/json", bad).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{answer}");
        let found: Vec<String> = answer["details"]["causes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| format!("{}: {}", c["field"].as_str().unwrap(), c["message"].as_str().unwrap()))
            .collect();
        assert_eq!(found, expect);
    };
    check(json!({}), &["spec.cronSpec: Required value"]).await;
    check(
        json!({"cronSpec": "* * * *", "replicas": 0, "mode": "warp"}),
        &[
            "spec.cronSpec: Invalid value: \"* * * *\": spec.cronSpec in body should match '^(\\d+|\\*)(/\\d+)?(\\s+(\\d+|\\*)(/\\d+)?){4}$'",
            "spec.mode: Unsupported value: \"warp\": supported values: \"fast\", \"slow\"",
            "spec.replicas: Invalid value: 0: spec.replicas in body should be greater than or equal to 1",
        ],
    )
    .await;
    check(
        json!({"cronSpec": "* * * * *", "replicas": "two", "port": 1.5, "labels": {"a": 1}}),
        &[
            "spec.labels.a: Invalid value: \"integer\": spec.labels.a in body must be of type string: \"integer\"",
            "spec.port: Invalid value: \"number\": spec.port in body must be of type integer,string: \"number\"",
            "spec.replicas: Invalid value: \"string\": spec.replicas in body must be of type integer: \"string\"",
        ],
    )
    .await;
    check(
        json!({"cronSpec": "* * * * *", "tags": ["a", "a"], "steps": [{"name": "x"}, {"name": "x"}]}),
        &["spec.steps[1]: Duplicate value: {\"name\":\"x\"}", "spec.tags[1]: Duplicate value: \"a\""],
    )
    .await;
    // What is not known is pruned, with a warning, or refused.
    let mut odd = tab("odd");
    odd["spec"]["colour"] = "red".into();
    odd["spec"]["free"] = json!({"any": {"thing": [1]}});
    odd["spec"]["mode"] = Value::Null;
    let strict = api.fails(Method::POST, &format!("{TABS}?fieldValidation=Strict"), odd.clone()).await;
    assert!(strict.2.contains("strict decoding error: unknown field \"spec.colour\""), "{}", strict.2);
    let response = api.raw(Method::POST, TABS, &[("content-type", "application/json")], odd.to_string()).await;
    assert_eq!(response.headers()["warning"], "299 - \"unknown field \\\"spec.colour\\\"\"");
    let stored = api.get(&format!("{TABS}/odd")).await;
    assert_eq!(
        stored["spec"],
        json!({"cronSpec": "* * * * */5", "image": "busybox", "replicas": 2, "free": {"any": {"thing": [1]}}})
    );
    // The schema becomes stricter: what is as it was is tolerated, what changes is not.
    let path = format!("{DEFINITIONS}/crontabs.stable.example.com");
    let stricter = json!([{"op": "add", "path": "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/replicas/minimum", "value": 5}]);
    let (status, answer) = api.call(Method::PATCH, &path, "application/json-patch+json", stricter).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let odd = format!("{TABS}/odd");
    let (status, answer) = api.call(Method::PATCH, &odd, MERGE, json!({"spec": {"mode": "slow"}})).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (status, answer) = api.call(Method::PATCH, &odd, MERGE, json!({"spec": {"replicas": 3}})).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{answer}");
    // A default that is new is seen in objects that were there before.
    let default = json!([{"op": "add", "path": "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/mood", "value": {"type": "string", "default": "good"}}]);
    api.call(Method::PATCH, &path, "application/json-patch+json", default).await;
    assert_eq!(api.get(&odd).await["spec"]["mood"], "good");
    // Patches do not build what nobody could read again.
    let mut deep = json!(1);
    for _ in 0..60 {
        deep = json!({"d": deep});
    }
    let patch = |path: &str| json!([{"op": "add", "path": path, "value": deep.clone()}]);
    let json_patch = "application/json-patch+json";
    let (code, _) = api.call(Method::PATCH, &odd, json_patch, patch("/spec/free/deep")).await;
    assert_eq!(code, StatusCode::OK);
    let (code, answer) =
        api.call(Method::PATCH, &odd, json_patch, patch(&format!("/spec/free/deep{}/more", "/d".repeat(59)))).await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY, "{answer}");
    api.get(&odd).await;
}

#[tokio::test]
async fn patches_status_and_scale() {
    let api = Api::new().await;
    define(&api, definition()).await;
    let path = format!("{TABS}/a");
    let mut first = tab("a");
    first["status"] = json!({"replicas": 7});
    let created = api.create(TABS, first).await;
    assert_eq!(created.get("status"), None);
    let (_, patched) = api
        .call(Method::PATCH, &path, MERGE, json!({"metadata": {"labels": {"a": "b"}}, "status": {"replicas": 9}}))
        .await;
    assert_eq!((&patched["metadata"]["generation"], patched.get("status")), (&json!(1), None));
    let (_, patched) = api.call(Method::PATCH, &path, MERGE, json!({"spec": {"replicas": 3}})).await;
    assert_eq!(patched["metadata"]["generation"], 2);
    let status = json!({"status": {"replicas": 2, "selector": "app=a"}, "spec": {"replicas": 9}});
    let (_, patched) = api.call(Method::PATCH, &format!("{path}/status"), MERGE, status).await;
    assert_eq!(
        (&patched["metadata"]["generation"], &patched["spec"]["replicas"], &patched["status"]["replicas"]),
        (&json!(2), &json!(3), &json!(2))
    );
    let scale = api.get(&format!("{path}/scale")).await;
    assert_eq!(
        (&scale["spec"]["replicas"], &scale["status"]),
        (&json!(3), &json!({"replicas": 2, "selector": "app=a"}))
    );
    let (code, scaled) =
        api.call(Method::PATCH, &format!("{path}/scale"), MERGE, json!({"spec": {"replicas": 5}})).await;
    assert_eq!((code, &scaled["spec"]["replicas"]), (StatusCode::OK, &json!(5)), "{scaled}");
    assert_eq!(api.get(&path).await["spec"]["replicas"], 5);
    let (code, refused) =
        api.call(Method::PATCH, &format!("{path}/scale"), MERGE, json!({"spec": {"replicas": 50}})).await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY, "{refused}");
    let (code, _) = api.call(Method::PATCH, &path, "application/strategic-merge-patch+json", json!({})).await;
    assert_eq!(code, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let (code, patched) = api
        .call(
            Method::PATCH,
            &path,
            "application/json-patch+json",
            json!([{"op": "replace", "path": "/spec/mode", "value": "slow"}]),
        )
        .await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY, "{patched}");
    let (code, _) = api
        .call(
            Method::PATCH,
            &path,
            "application/json-patch+json",
            json!([{"op": "add", "path": "/spec/mode", "value": "slow"}]),
        )
        .await;
    assert_eq!(code, StatusCode::OK);
    // Selectors of fields and labels.
    api.create(TABS, tab("b")).await;
    let names = |list: Value| -> Vec<String> {
        list["items"].as_array().unwrap().iter().map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(api.get(&format!("{TABS}?fieldSelector=spec.mode%3Dslow")).await), ["a"]);
    assert_eq!(names(api.get(&format!("{TABS}?labelSelector=a%3Db")).await), ["a"]);
    assert_eq!(
        api.fails(Method::GET, &format!("{TABS}?fieldSelector=spec.image%3Dx"), Value::Null).await.2,
        "field label not supported: spec.image"
    );
    // A table has the columns of the definition.
    let accept = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")];
    let response = api.raw(Method::GET, TABS, &accept, "").await;
    let bytes = http_body_util::BodyExt::collect(response.into_body()).await.unwrap().to_bytes();
    let table: Value = serde_json::from_slice(&bytes).unwrap();
    let headings: Vec<&str> =
        table["columnDefinitions"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(headings, ["Name", "Spec", "Replicas", "Age"]);
    assert_eq!(table["columnDefinitions"][2]["priority"], 1);
    assert_eq!(table["rows"][0]["cells"].as_array().unwrap()[..3], [json!("a"), json!("* * * * */5"), json!(5)]);
    let (code, gone) = api.call(Method::DELETE, TABS, "", Value::Null).await;
    assert_eq!((code, names(gone).len()), (StatusCode::OK, 2));
    assert_eq!(api.get(TABS).await["items"], json!([]));
}

#[tokio::test]
async fn applied_on_the_server() {
    let api = Api::new().await;
    define(&api, definition()).await;
    let path = format!("{TABS}/a");
    let apply = async |manager: &str, spec: Value| {
        let mut config = tab("a");
        config["spec"] = spec;
        api.call(Method::PATCH, &format!("{path}?fieldManager={manager}"), APPLY, config).await
    };
    let (code, _) =
        apply("one", json!({"cronSpec": "* * * * *", "steps": [{"name": "x", "run": "1"}], "free": {"a": 1}})).await;
    assert_eq!(code, StatusCode::CREATED);
    // Items are told apart by their key, parts that nobody described by theirs.
    let (code, merged) =
        apply("two", json!({"cronSpec": "* * * * *", "steps": [{"name": "y", "run": "2"}], "free": {"b": 2}})).await;
    assert_eq!(code, StatusCode::OK, "{merged}");
    assert_eq!(merged["spec"]["steps"], json!([{"name": "x", "run": "1"}, {"name": "y", "run": "2"}]));
    assert_eq!(merged["spec"]["free"], json!({"a": 1, "b": 2}));
    let (code, refused) = apply("two", json!({"cronSpec": "1 * * * *", "steps": [{"name": "y", "run": "2"}]})).await;
    assert_eq!(code, StatusCode::CONFLICT);
    assert!(refused["message"].as_str().unwrap().contains("conflict with \"one\": .spec.cronSpec"), "{refused}");
    let (_, less) = apply("two", json!({"cronSpec": "* * * * *"})).await;
    assert_eq!(
        (&less["spec"]["steps"], &less["spec"]["free"]),
        (&json!([{"name": "x", "run": "1"}]), &json!({"a": 1}))
    );
    // Null is a value where the schema says so, and nothing elsewhere.
    let (_, nothing) = apply("two", json!({"cronSpec": "* * * * *", "note": null, "mode": null})).await;
    assert_eq!((nothing["spec"].get("note"), nothing["spec"].get("mode")), (Some(&Value::Null), None));
    let (_, kept) = apply("three", json!({"cronSpec": "* * * * *"})).await;
    assert_eq!(kept["spec"].get("note"), Some(&Value::Null));
    let (_, gone) = apply("two", json!({"cronSpec": "* * * * *"})).await;
    assert_eq!(gone["spec"].get("note"), None);
    let (code, unknown) = apply("two", json!({"cronSpec": "* * * * *", "colour": "red"})).await;
    assert_eq!(code, StatusCode::BAD_REQUEST);
    assert!(unknown["message"].as_str().unwrap().contains(".spec.colour: field not declared in schema"), "{unknown}");
    assert_eq!(less["metadata"]["managedFields"][0]["apiVersion"], "stable.example.com/v1");
    let (code, scaled) = api
        .call(
            Method::PATCH,
            &format!("{path}/scale?fieldManager=three"),
            APPLY,
            json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "spec": {"replicas": 4}}),
        )
        .await;
    assert_eq!((code, &scaled["spec"]["replicas"]), (StatusCode::OK, &json!(4)), "{scaled}");
}

#[tokio::test]
async fn several_versions() {
    let api = Api::new().await;
    let mut two = definition();
    let mut old = two["spec"]["versions"][0].clone();
    old["name"] = "v1beta1".into();
    old["storage"] = false.into();
    old["deprecated"] = true.into();
    two["spec"]["versions"].as_array_mut().unwrap().push(old);
    define(&api, two.clone()).await;
    let beta = TABS.replace("/v1/", "/v1beta1/");
    let mut body = tab("a");
    body["apiVersion"] = "stable.example.com/v1beta1".into();
    let response = api.raw(Method::POST, &beta, &[("content-type", "application/json")], body.to_string()).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    assert_eq!(
        response.headers()["warning"],
        "299 - \"stable.example.com/v1beta1 CronTab is deprecated; use stable.example.com/v1 CronTab\""
    );
    // Stored in one, shown in each.
    let key = "/registry/stable.example.com/crontabs/default/a";
    let stored = |entry: Option<seawall_store::Entry>| {
        serde_json::from_slice::<Value>(&entry.unwrap().value).unwrap()["apiVersion"].as_str().unwrap().to_owned()
    };
    assert_eq!(stored(api.store.get(key).await.unwrap().0), "stable.example.com/v1");
    assert_eq!(api.get(&format!("{beta}/a")).await["apiVersion"], "stable.example.com/v1beta1");
    assert_eq!(api.get(&beta).await["items"][0]["apiVersion"], "stable.example.com/v1beta1");
    let version = api.get(TABS).await["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let mut watch = api.watch(&format!("{beta}?watch=true&resourceVersion={version}")).await;
    api.create(TABS, tab("b")).await;
    assert_eq!(watch.next().await["object"]["apiVersion"], "stable.example.com/v1beta1");
    // The other one becomes the stored one: the next write of an object stores it so, others stay.
    let path = format!("{DEFINITIONS}/crontabs.stable.example.com");
    let swap = json!([{"op": "replace", "path": "/spec/versions/0/storage", "value": false}, {"op": "replace", "path": "/spec/versions/1/storage", "value": true}]);
    let (_, swapped) = api.call(Method::PATCH, &path, "application/json-patch+json", swap).await;
    assert_eq!(swapped["status"]["storedVersions"], json!(["v1", "v1beta1"]));
    let same = api.get(&format!("{TABS}/a")).await;
    let (code, _) = api.call(Method::PUT, &format!("{TABS}/a"), "application/json", same).await;
    assert_eq!(code, StatusCode::OK);
    assert_eq!(stored(api.store.get(key).await.unwrap().0), "stable.example.com/v1beta1");
    assert_eq!(api.get(&format!("{TABS}/a")).await["apiVersion"], "stable.example.com/v1");
    assert_eq!(api.get(&format!("{TABS}/b")).await["apiVersion"], "stable.example.com/v1");
    // A version in which objects are stored stays.
    let drop = json!([{"op": "remove", "path": "/spec/versions/0"}]);
    let (code, refused) = api.call(Method::PATCH, &path, "application/json-patch+json", drop).await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(
        refused["message"].as_str().unwrap().contains("status.storedVersions[0]: Invalid value: \"v1\""),
        "{refused}"
    );
    let groups = api.get("/apis/stable.example.com").await;
    assert_eq!(groups["preferredVersion"]["version"], "v1");
    assert_eq!(groups["versions"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn names_of_others_are_not_given_again() {
    let api = Api::new().await;
    define(&api, definition()).await;
    let mut other = definition();
    other["metadata"]["name"] = "tabs.stable.example.com".into();
    other["spec"]["names"] = json!({"plural": "tabs", "kind": "CronTab"});
    api.create(DEFINITIONS, other).await;
    let path = format!("{DEFINITIONS}/tabs.stable.example.com");
    let refused = reaches(&api, &path, |d| has(d, "NamesAccepted", "False")).await;
    assert!(has(&refused, "Established", "False"));
    assert_eq!(refused["status"]["acceptedNames"]["plural"], "tabs");
    assert_eq!(api.fails(Method::GET, "/apis/stable.example.com/v1/tabs", Value::Null).await.0, 404);
    // Another one waits for the short name alone, which its owner gives up.
    let mut third = definition();
    third["metadata"]["name"] = "cars.stable.example.com".into();
    third["spec"]["names"] = json!({"plural": "cars", "kind": "Car", "shortNames": ["ct"]});
    api.create(DEFINITIONS, third).await;
    let car = format!("{DEFINITIONS}/cars.stable.example.com");
    reaches(&api, &car, |d| d["status"]["conditions"][0]["reason"] == "ShortNamesConflict").await;
    let first = format!("{DEFINITIONS}/crontabs.stable.example.com");
    api.call(Method::PATCH, &first, MERGE, json!({"spec": {"names": {"shortNames": ["cron"]}}})).await;
    reaches(&api, &car, |d| d["status"]["acceptedNames"]["shortNames"] == json!(["ct"])).await;
    // The other names become free.
    api.call(Method::DELETE, &format!("{DEFINITIONS}/crontabs.stable.example.com"), "", Value::Null).await;
    reaches(&api, &path, |d| has(d, "Established", "True")).await;
    api.get("/apis/stable.example.com/v1/tabs").await;
}

#[tokio::test]
async fn definitions_are_checked() {
    let api = Api::new().await;
    let check = async |change: &dyn Fn(&mut Value), expect: &str| {
        let mut bad = definition();
        change(&mut bad);
        let (code, answer) = api.call(Method::POST, DEFINITIONS, "application/json", bad).await;
        assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY, "{answer}");
        let message = answer["message"].as_str().unwrap();
        assert!(message.contains(expect), "{message}");
    };
    check(
        &|d| d["metadata"]["name"] = "x.example.com".into(),
        "metadata.name: Invalid value: \"x.example.com\": must be spec.names.plural+\".\"+spec.group",
    )
    .await;
    check(
        &|d| d["spec"]["versions"][0]["storage"] = false.into(),
        "must have exactly one version marked as storage version",
    )
    .await;
    check(&|d| { d["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["x"] = json!({}); },
        "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[x].type: Required value: must not be empty for specified object fields").await;
    check(&|d| { d["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["image"]["default"] = json!(5); },
        "properties[image].default: Invalid value: \"integer\"").await;
    check(&|d| d["spec"]["scope"] = "World".into(), "spec.scope: Unsupported value: \"World\"").await;
    check(
        &|d| {
            d["spec"]["group"] = "x.k8s.io".into();
            d["metadata"]["name"] = "crontabs.x.k8s.io".into();
        },
        "metadata.annotations[api-approved.kubernetes.io]: Required value",
    )
    .await;
    define(&api, definition()).await;
    let path = format!("{DEFINITIONS}/crontabs.stable.example.com");
    let (code, answer) = api.call(Method::PATCH, &path, MERGE, json!({"spec": {"scope": "Cluster"}})).await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(
        answer["message"].as_str().unwrap().contains("spec.scope: Invalid value: \"Cluster\": field is immutable"),
        "{answer}"
    );
}

#[tokio::test]
async fn discovery_and_openapi_follow_at_once() {
    let api = Api::new().await;
    let url =
        |root: &Value| root["paths"]["apis/stable.example.com/v1"]["serverRelativeURL"].as_str().map(str::to_owned);
    assert_eq!(url(&api.get("/openapi/v3").await), None);
    define(&api, definition()).await;
    let list = api.get("/apis/stable.example.com/v1").await;
    let names: Vec<&str> = list["resources"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["crontabs", "crontabs/status", "crontabs/scale"]);
    assert_eq!(
        (&list["resources"][0]["shortNames"], &list["resources"][0]["categories"]),
        (&json!(["ct"]), &json!(["all"]))
    );
    let first = url(&api.get("/openapi/v3").await).unwrap();
    let document = api.get(first.split('?').next().unwrap()).await;
    let schema = &document["components"]["schemas"]["com.example.stable.v1.CronTab"];
    assert_eq!(
        schema["x-kubernetes-group-version-kind"],
        json!([{"group": "stable.example.com", "version": "v1", "kind": "CronTab"}])
    );
    assert_eq!(schema["properties"]["spec"]["properties"]["replicas"]["maximum"], 10);
    assert!(document["components"]["schemas"]["io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"].is_object());
    // Enough to check expressions of policies by it.
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let ty = openapi::of_kind(schemas, "stable.example.com", "v1", "CronTab").unwrap();
    let fits = |expression: &str| Program::compile(expression, &[("object", ty.clone())]).is_ok();
    assert!(fits("object.spec.replicas < 5 && object.metadata.labels['a'] == object.kind"));
    assert!(!fits("object.spec.replicsa < 5") && !fits("object.spec.replicas == 'a'"));
    let two = api.get("/openapi/v2").await;
    assert_eq!(
        two["definitions"]["com.example.stable.v1.CronTab"]["properties"]["spec"]["properties"]["port"].get("type"),
        None
    );
    // Another schema, another address.
    let path = format!("{DEFINITIONS}/crontabs.stable.example.com");
    let change = json!([{"op": "add", "path": "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/more", "value": {"type": "string"}}]);
    api.call(Method::PATCH, &path, "application/json-patch+json", change).await;
    let second = url(&api.get("/openapi/v3").await).unwrap();
    assert_ne!(first, second);
    let document = api.get(second.split('?').next().unwrap()).await;
    assert!(
        document["components"]["schemas"]["com.example.stable.v1.CronTab"]["properties"]["spec"]["properties"]["more"]
            .is_object()
    );
}
