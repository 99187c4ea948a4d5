//! Server-side apply, through the whole pipeline.

use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{MAPS, MERGE, PODS, harness::Api, map, pod};

const APPLY: &str = "application/apply-patch+yaml";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";

fn deployment(spec: Value) -> Value {
    let mut full = json!({"selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "web", "image": "web:1"}]}}});
    for (key, value) in spec.as_object().unwrap() {
        full[key] = value.clone();
    }
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": full})
}

async fn apply(api: &Api, path: &str, query: &str, config: Value) -> (StatusCode, Value) {
    api.call(Method::PATCH, &format!("{path}?{query}"), APPLY, config).await
}

/// Who owns something, and how: `manager/operation/subresource`.
fn managers(object: &Value) -> Vec<String> {
    let records = object["metadata"]["managedFields"].as_array().into_iter().flatten();
    let text = |record: &Value, key: &str| record[key].as_str().unwrap_or_default().to_owned();
    let name = |record: &Value| ["manager", "operation", "subresource"].map(|key| text(record, key)).join("/");
    records.map(|record| name(record).trim_end_matches('/').to_owned()).collect()
}

#[tokio::test]
async fn applying_creates_merges_and_conflicts() {
    let api = Api::new().await;
    let path = format!("{DEPLOYMENTS}/web");
    let (status, made) = apply(&api, &path, "fieldManager=ci", deployment(json!({"replicas": 2}))).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    assert_eq!(managers(&made), ["ci/Apply"]);
    assert_eq!(made["metadata"]["generation"], 1);
    // What was only defaulted is nobody's.
    let fields = &made["metadata"]["managedFields"][0]["fieldsV1"]["f:spec"];
    assert!(fields["f:replicas"].is_object() && fields["f:strategy"].is_null(), "{fields}");
    assert_eq!(made["spec"]["strategy"]["type"], "RollingUpdate");

    // The same again changes nothing.
    let (status, same) = apply(&api, &path, "fieldManager=ci", deployment(json!({"replicas": 2}))).await;
    assert_eq!((status, &same["metadata"]["resourceVersion"]), (StatusCode::OK, &made["metadata"]["resourceVersion"]));

    // Somebody scales; who applies learns of it, and may insist.
    let (_, scaled) = api
        .call(Method::PATCH, &format!("{path}/scale?fieldManager=hpa"), MERGE, json!({"spec": {"replicas": 5}}))
        .await;
    assert_eq!(scaled["spec"]["replicas"], 5, "{scaled}");
    let found = api.get(&path).await;
    assert_eq!(managers(&found), ["ci/Apply", "hpa/Update/scale"]);
    let (status, refused) = apply(&api, &path, "fieldManager=ci", deployment(json!({"replicas": 2}))).await;
    assert_eq!((status, refused["reason"].as_str()), (StatusCode::CONFLICT, Some("Conflict")));
    assert_eq!(
        refused["message"],
        "Apply failed with 1 conflict: conflict with \"hpa\" with subresource \"scale\" using apps/v1: .spec.replicas"
    );
    assert_eq!(refused["details"]["causes"][0]["reason"], "FieldManagerConflict");
    assert_eq!(refused["details"]["causes"][0]["field"], ".spec.replicas");
    let (_, forced) = apply(&api, &path, "fieldManager=ci&force=true", deployment(json!({"replicas": 2}))).await;
    assert_eq!(forced["spec"]["replicas"], 2);
    assert_eq!(managers(&forced), ["ci/Apply"]);

    // Who no longer says how many leaves it to the others: the default comes back.
    let (_, left) = apply(&api, &path, "fieldManager=ci", deployment(json!({}))).await;
    assert_eq!(left["spec"]["replicas"], 1, "{left}");
}

#[tokio::test]
async fn a_trial_leaves_nothing() {
    let api = Api::new().await;
    let path = format!("{DEPLOYMENTS}/web");
    let (status, tried) = apply(&api, &path, "fieldManager=ci&dryRun=All", deployment(json!({}))).await;
    assert_eq!(status, StatusCode::CREATED, "{tried}");
    assert_eq!(managers(&tried), ["ci/Apply"]);
    assert_eq!(api.fails(Method::GET, &path, Value::Null).await.0, 404);
}

#[tokio::test]
async fn every_writer_is_recorded() {
    let api = Api::new().await;
    let made = api.create(&format!("{PODS}?fieldManager=kubectl-create"), pod("a")).await;
    assert_eq!(managers(&made), ["kubectl-create/Update"]);
    let path = format!("{PODS}/a");
    let (_, labelled) = api
        .call(
            Method::PATCH,
            &format!("{path}?fieldManager=kubectl-label"),
            MERGE,
            json!({"metadata": {"labels": {"x": "1"}}}),
        )
        .await;
    assert_eq!(managers(&labelled), ["kubectl-create/Update", "kubectl-label/Update"]);
    let labels = &labelled["metadata"]["managedFields"][1]["fieldsV1"];
    assert_eq!(*labels, json!({"f:metadata": {"f:labels": {"f:x": {}}}}));
    // Without a name it is the program's, up to its version.
    let status = json!({"status": {"phase": "Running"}}).to_string();
    let headers = [("content-type", MERGE), ("user-agent", "my-agent/v1.2 (linux)")];
    let answer = api.raw(Method::PATCH, &format!("{path}/status"), &headers, status).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let found = api.get(&path).await;
    assert!(managers(&found).contains(&"my-agent/Update/status".to_owned()), "{:?}", managers(&found));
    // Who takes a field has it; who loses all goes.
    let (_, taken) = api
        .call(Method::PATCH, &format!("{path}?fieldManager=b"), MERGE, json!({"metadata": {"labels": {"x": "2"}}}))
        .await;
    assert!(!managers(&taken).contains(&"kubectl-label/Update".to_owned()), "{:?}", managers(&taken));
    // An update by somebody who knows nothing of records keeps them.
    let mut plain = taken.clone();
    plain["metadata"].as_object_mut().unwrap().remove("managedFields");
    let (_, kept) = api.call(Method::PUT, &path, "application/json", plain).await;
    assert_eq!(managers(&kept), managers(&taken));
    assert_eq!(kept["metadata"]["resourceVersion"], taken["metadata"]["resourceVersion"]);
}

#[tokio::test]
async fn records_can_be_cleared_and_not_be_forged() {
    let api = Api::new().await;
    let path = format!("{MAPS}/a");
    api.create(MAPS, map("a", json!({"k": "1"}))).await;
    let clear = json!({"metadata": {"managedFields": [{}]}});
    let (_, cleared) = api.call(Method::PATCH, &path, MERGE, clear).await;
    assert_eq!(cleared["metadata"]["managedFields"], Value::Null, "{cleared}");
    // From then on what is there belongs to somebody all the same.
    let mut config = map("a", json!({"k": "2"}));
    let (status, refused) = apply(&api, &path, "fieldManager=ci", config.clone()).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(refused["message"].as_str().unwrap().contains("before-first-apply"), "{refused}");
    let (_, forced) = apply(&api, &path, "fieldManager=ci&force=true", config.clone()).await;
    assert_eq!(managers(&forced), ["ci/Apply", "before-first-apply/Update"], "the map itself is theirs still");

    let forged = json!({"metadata": {"managedFields": [{"manager": "x", "operation": "Guess"}]}});
    let (status, refused) = api.call(Method::PATCH, &path, MERGE, forged).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let message = refused["message"].as_str().unwrap();
    assert!(message.contains("metadata.managedFields[0].operation: Invalid value: \"Guess\""), "{message}");
    config["metadata"]["managedFields"] = json!([]);
    assert_eq!(apply(&api, &path, "fieldManager=ci", config).await.1["message"], "metadata.managedFields must be nil");
}

#[tokio::test]
async fn what_is_wrong_with_a_configuration() {
    let api = Api::new().await;
    let path = format!("{DEPLOYMENTS}/web");
    let check = async |query: &str, config: Value, code: u16, expect: &str| {
        let (status, answer) = apply(&api, &path, query, config).await;
        assert_eq!(status.as_u16(), code, "{answer}");
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(message.contains(expect), "{message}");
    };
    let ci = "fieldManager=ci";
    check("", deployment(json!({})), 400, "fieldManager: Required value: is required for apply patch").await;
    check(&format!("fieldManager={}", "x".repeat(129)), deployment(json!({})), 400, "Too long").await;
    check("fieldManager=ci&force=maybe", deployment(json!({})), 400, "force: Invalid value: \"maybe\"").await;
    check(ci, deployment(json!({"replica": 1})), 400, ".spec.replica: field not declared in schema").await;
    check(ci, deployment(json!({"replicas": "many"})), 400, "cannot unmarshal string").await;
    check(ci, json!({"metadata": {"name": "web"}}), 400, "apiVersion: Required value").await;
    check(ci, json!([1]), 400, "apiVersion: Required value").await;
    let mut other = deployment(json!({}));
    other["metadata"]["name"] = "other".into();
    check(ci, other, 400, "does not match the name on the URL").await;
    let nameless = json!({"template": {"spec": {"containers": [{"image": "x"}]}}});
    check(ci, deployment(nameless), 400, "omits key field \"name\"").await;
    let mut late = deployment(json!({}));
    late["metadata"]["uid"] = "1".into();
    check(ci, late, 409, "uid mismatch").await;
    // What is applied is validated as anything else.
    let mut empty = deployment(json!({}));
    empty["spec"]["template"]["spec"]["containers"] = json!([]);
    check(ci, empty, 422, "spec.template.spec.containers: Required value").await;
    let (status, answer) = api.call(Method::PATCH, &format!("{path}?{ci}"), APPLY, "a: [".into()).await;
    assert_eq!(status.as_u16(), 400, "{answer}");
    assert_eq!(
        apply(&api, &format!("{path}/status"), ci, json!({"apiVersion": "apps/v1", "kind": "Deployment"})).await.0,
        404
    );
}

#[tokio::test]
async fn parts_have_managers_of_their_own() {
    let api = Api::new().await;
    let path = format!("{DEPLOYMENTS}/web");
    api.create(&format!("{DEPLOYMENTS}?fieldManager=make"), deployment(json!({"replicas": 1}))).await;
    let status = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": 7}, "status": {"replicas": 1, "conditions": [
            {"type": "Available", "status": "True", "lastUpdateTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
    let (code, found) = apply(&api, &format!("{path}/status"), "fieldManager=ctl", status).await;
    assert_eq!(code, StatusCode::OK, "{found}");
    assert_eq!((&found["spec"]["replicas"], &found["status"]["replicas"]), (&json!(1), &json!(1)));
    assert_eq!(managers(&found), ["ctl/Apply/status", "make/Update"]);
    let of_status = &found["metadata"]["managedFields"][0]["fieldsV1"];
    assert!(of_status["f:spec"].is_null() && of_status["f:status"]["f:conditions"].is_object(), "{of_status}");
    let scale =
        json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": {"name": "web"}, "spec": {"replicas": 4}});
    let (code, refused) = apply(&api, &format!("{path}/scale"), "fieldManager=hpa", scale.clone()).await;
    assert_eq!(code, StatusCode::CONFLICT, "{refused}");
    let (code, scaled) = apply(&api, &format!("{path}/scale"), "fieldManager=hpa&force=true", scale).await;
    assert_eq!((code, &scaled["spec"]["replicas"]), (StatusCode::OK, &json!(4)), "{scaled}");
    assert!(managers(&api.get(&path).await).contains(&"hpa/Apply/scale".to_owned()));
}

#[tokio::test]
async fn from_applying_on_the_client() {
    let api = Api::new().await;
    let path = format!("{MAPS}/a");
    let mut first = map("a", json!({"k": "1", "old": "1"}));
    first["metadata"]["annotations"] = json!({"kubectl.kubernetes.io/last-applied-configuration": map("a", json!({"k": "1", "old": "1"})).to_string()});
    api.create(&format!("{MAPS}?fieldManager=kubectl-client-side-apply"), first).await;
    let (status, refused) = apply(&api, &path, "fieldManager=ci", map("a", json!({"k": "2"}))).await;
    assert_eq!(status, StatusCode::CONFLICT, "{refused}");
    let (status, applied) = apply(&api, &path, "fieldManager=kubectl", map("a", json!({"k": "2"}))).await;
    assert_eq!(status, StatusCode::OK, "{applied}");
    let last = applied["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(last).unwrap()["data"], json!({"k": "2"}));
}

#[tokio::test]
async fn yaml_with_comments() {
    let api = Api::new().await;
    let body =
        "# what it is\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  k: |\n    several\n    lines\n";
    let path = format!("{MAPS}/a?fieldManager=x");
    let answer = api.raw(Method::PATCH, &path, &[("content-type", APPLY)], body).await;
    assert_eq!(answer.status(), StatusCode::CREATED);
    assert_eq!(api.get(&format!("{MAPS}/a")).await["data"]["k"], "several\nlines\n");
}
