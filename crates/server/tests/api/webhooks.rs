//! Admission webhooks: a real HTTPS server, called by the whole pipeline.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    MAPS, MERGE, PODS,
    harness::Api,
    map, pod,
    site::{Answer, Asked, Site},
};

const GROUP: &str = "/apis/admissionregistration.k8s.io/v1";

/// What a webhook answers to a path: the `response` without its uid.
type Say = dyn Fn(&str, &Value) -> Value + Send + Sync;

pub(crate) struct Hook {
    pub(crate) port: u16,
    pub(crate) ca: String,
    /// Path and request of every call.
    calls: Arc<Mutex<Vec<(String, Value)>>>,
    connections: Arc<AtomicUsize>,
}

impl Hook {
    pub(crate) async fn new(names: &[&str], say: impl Fn(&str, &Value) -> Value + Send + Sync + 'static) -> Hook {
        let calls: Arc<Mutex<Vec<(String, Value)>>> = Arc::default();
        let (seen, say) = (calls.clone(), Arc::<Say>::from(Box::new(say) as Box<Say>));
        let site = Site::new(names, move |asked| Box::pin(answer(asked, seen.clone(), say.clone()))).await;
        Hook { port: site.port, ca: BASE64.encode(&site.ca), calls, connections: site.connections }
    }

    fn calls(&self) -> Vec<(String, Value)> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn paths(&self) -> Vec<String> {
        self.calls().into_iter().map(|(path, _)| path).collect()
    }

    /// A webhook of this server.
    pub(crate) fn webhook(&self, name: &str, path: &str, more: Value) -> Value {
        let mut webhook = json!({"name": name, "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "clientConfig": {"url": format!("https://localhost:{}{path}", self.port), "caBundle": self.ca},
            "rules": [{"operations": ["CREATE", "UPDATE"], "apiGroups": [""], "apiVersions": ["v1"],
                "resources": ["configmaps"]}]});
        for (key, value) in more.as_object().into_iter().flatten() {
            webhook[key] = value.clone();
        }
        webhook
    }
}

async fn answer(asked: Asked, calls: Arc<Mutex<Vec<(String, Value)>>>, say: Arc<Say>) -> Answer {
    let (path, review) = (asked.path, asked.body);
    calls.lock().unwrap().push((path.clone(), review["request"].clone()));
    if path == "/slow" {
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    let mut response = say(&path, &review["request"]);
    if response["raw"].is_null() {
        response["uid"] = review["request"]["uid"].clone();
        response = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response});
    }
    (StatusCode::OK, response)
}

fn patch(steps: Value) -> Value {
    json!({"allowed": true, "patchType": "JSONPatch", "patch": BASE64.encode(steps.to_string())})
}

async fn configure(api: &Api, mutating: bool, name: &str, webhooks: Vec<Value>) {
    let kind = if mutating { "mutating" } else { "validating" };
    let path = format!("{GROUP}/{kind}webhookconfigurations");
    api.create(&path, json!({"metadata": {"name": name}, "webhooks": webhooks})).await;
}

async fn remove(api: &Api, kind: &str, name: &str) {
    let path = format!("{GROUP}/{kind}webhookconfigurations/{name}");
    assert_eq!(api.call(Method::DELETE, &path, "", Value::Null).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_validating_webhook_sees_everything_and_refuses() {
    let api = Api::new().await;
    let hook = Hook::new(&["localhost"], |_, request| {
        let name = request["name"].as_str().unwrap_or_default();
        match name {
            "bad" => json!({"allowed": false, "status": {"message": "it is bad", "code": 403, "reason": "Forbidden"}}),
            "mute" => json!({"allowed": false}),
            _ => json!({"allowed": true, "warnings": ["mind the gap"]}),
        }
    })
    .await;
    let all =
        json!({"rules": [{"operations": ["*"], "apiGroups": [""], "apiVersions": ["*"], "resources": ["configmaps"]}]});
    configure(&api, false, "v", vec![hook.webhook("v.example.com", "/v", all)]).await;
    let (code, reason, message) = api.fails(Method::POST, MAPS, map("bad", json!({}))).await;
    assert_eq!((code, &*reason), (403, "Forbidden"));
    assert_eq!(message, "admission webhook \"v.example.com\" denied the request: it is bad");
    let message = api.fails_with(Method::POST, MAPS, map("mute", json!({})), 400).await;
    assert_eq!(message, "admission webhook \"v.example.com\" denied the request without explanation");
    hook.calls();
    let body = map("good", json!({"a": "b"})).to_string();
    let path = format!("{MAPS}?fieldManager=me");
    let response = api.raw(Method::POST, &path, &[("content-type", "application/json")], body).await;
    assert_eq!(response.headers()["warning"], "299 - \"mind the gap\"");
    let (path, request) = hook.calls().remove(0);
    assert_eq!(path, "/v");
    assert!(request["uid"].as_str().unwrap().len() == 36);
    assert_eq!(request["kind"], json!({"group": "", "version": "v1", "kind": "ConfigMap"}));
    assert_eq!(request["requestKind"], request["kind"]);
    assert_eq!(request["resource"], json!({"group": "", "version": "v1", "resource": "configmaps"}));
    assert_eq!((&request["name"], &request["namespace"]), (&json!("good"), &json!("default")));
    assert_eq!((&request["operation"], &request["dryRun"]), (&json!("CREATE"), &json!(false)));
    assert_eq!(request["userInfo"]["username"], "admin");
    assert_eq!(request["object"]["data"], json!({"a": "b"}));
    assert_eq!(request["object"]["kind"], "ConfigMap");
    assert_eq!(request["oldObject"], Value::Null);
    assert_eq!(
        request["options"],
        json!({"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1", "fieldManager": "me"})
    );
    let good = format!("{MAPS}/good");
    api.call(Method::PATCH, &good, MERGE, json!({"data": {"a": "c"}})).await;
    let (_, request) = hook.calls().remove(0);
    assert_eq!(request["operation"], "UPDATE");
    assert_eq!((&request["object"]["data"]["a"], &request["oldObject"]["data"]["a"]), (&json!("c"), &json!("b")));
    assert_eq!(request["options"]["kind"], "PatchOptions");
    api.call(Method::DELETE, &good, "", Value::Null).await;
    let (_, request) = hook.calls().remove(0);
    assert_eq!((&request["operation"], &request["object"]), (&json!("DELETE"), &Value::Null));
    assert_eq!(request["oldObject"]["data"]["a"], "c");
    // One connection served all of this.
    assert_eq!(hook.connections.load(Ordering::SeqCst), 1);
    remove(&api, "validating", "v").await;
    api.create(MAPS, map("bad", json!({}))).await;
}

#[tokio::test]
async fn mutating_webhooks_in_their_order_and_again() {
    let api = Api::new().await;
    let hook = Hook::new(&["localhost"], |path, request| {
        let there = |key: &str| request["object"]["data"][key].is_string();
        match path {
            "/first" if there("second") && !there("again") => {
                patch(json!([{"op": "add", "path": "/data/again", "value": "1"}]))
            }
            "/first" if !there("first") => patch(json!([{"op": "add", "path": "/data/first", "value": "1"}])),
            "/second" if !there("second") => patch(json!([{"op": "add", "path": "/data/second", "value": "1"}])),
            "/identity" => patch(json!([
                {"op": "replace", "path": "/metadata/name", "value": "other"},
                {"op": "replace", "path": "/metadata/uid", "value": "other"},
            ])),
            "/wrong" => patch(json!([{"op": "add", "path": "/data", "value": 5}])),
            "/broken" => patch(json!([{"op": "remove", "path": "/nothing"}])),
            _ => json!({"allowed": true}),
        }
    })
    .await;
    let again = json!({"reinvocationPolicy": "IfNeeded"});
    configure(&api, true, "a", vec![hook.webhook("first.example.com", "/first", again)]).await;
    configure(&api, true, "b", vec![hook.webhook("second.example.com", "/second", json!({}))]).await;
    let made = api.create(MAPS, map("a", json!({"x": "y"}))).await;
    assert_eq!(made["data"], json!({"x": "y", "first": "1", "second": "1", "again": "1"}));
    // The one that does not ask for it is not asked again.
    assert_eq!(hook.paths(), ["/first", "/second", "/first"]);
    configure(&api, true, "c", vec![hook.webhook("identity.example.com", "/identity", json!({}))]).await;
    let made = api.create(MAPS, map("b", json!({}))).await;
    assert_eq!(made["metadata"]["name"], "b");
    assert_ne!(made["metadata"]["uid"], "other");
    remove(&api, "mutating", "c").await;
    for (path, why) in
        [("/wrong", "sent a patch that cannot be applied: "), ("/broken", "sent a patch that cannot be applied: ")]
    {
        configure(&api, true, "d", vec![hook.webhook("d.example.com", path, json!({}))]).await;
        let message = api.fails_with(Method::POST, MAPS, map("c", json!({"x": "y"})), 500).await;
        assert!(message.contains(why), "{message}");
        remove(&api, "mutating", "d").await;
    }
}

#[tokio::test]
async fn what_fails_fails_closed() {
    let api = Api::new().await;
    let hook = Hook::new(&["localhost"], |path, _| match path {
        "/raw" => json!({"raw": true}),
        "/uid" => json!({"raw": true, "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "response": {"uid": "another", "allowed": true}}),
        _ => json!({"allowed": true}),
    })
    .await;
    let other = Hook::new(&["elsewhere"], |_, _| json!({"allowed": true})).await;
    let at =
        |port: u16, ca: &str| json!({"clientConfig": {"url": format!("https://localhost:{port}/x"), "caBundle": ca}});
    let cases = [
        (
            hook.webhook("w.example.com", "/slow", json!({"timeoutSeconds": 1})),
            "/slow?timeout=1s\": context deadline exceeded",
        ),
        (
            hook.webhook("w.example.com", "/raw", json!({})),
            "received invalid webhook response: webhook response was absent",
        ),
        (hook.webhook("w.example.com", "/uid", json!({})), "received invalid webhook response: expected response.uid="),
        // A certificate for another name, another authority, and nobody.
        (other.webhook("w.example.com", "/x", json!({})), "failed to verify certificate"),
        (hook.webhook("w.example.com", "/x", at(hook.port, &other.ca)), "failed to verify certificate"),
        (hook.webhook("w.example.com", "/x", at(1, &hook.ca)), "dial tcp "),
        (
            hook.webhook("w.example.com", "/x", json!({"clientConfig": {"service": {"namespace": "n", "name": "s"}}})),
            "service \"s\" not found",
        ),
    ];
    for (webhook, why) in cases {
        configure(&api, false, "w", vec![webhook.clone()]).await;
        let message = api.fails_with(Method::POST, MAPS, map("a", json!({})), 500).await;
        assert!(
            message.starts_with("Internal error occurred: failed calling webhook \"w.example.com\": "),
            "{message}"
        );
        assert!(message.contains(why), "{message}");
        remove(&api, "validating", "w").await;
        // Whoever says so gets it open.
        let mut open = webhook;
        open["failurePolicy"] = "Ignore".into();
        configure(&api, false, "w", vec![open]).await;
        api.create(&format!("{MAPS}?dryRun=All"), map("a", json!({}))).await;
        remove(&api, "validating", "w").await;
    }
}

#[tokio::test]
async fn who_is_asked() {
    let api = Api::new().await;
    let hook = Hook::new(&["localhost", "hooks.default.svc"], |path, _| match path {
        "/no" => json!({"allowed": false, "status": {"message": "no"}}),
        _ => json!({"allowed": true}),
    })
    .await;
    let no = |name: &str, more: Value| hook.webhook(&format!("{name}.example.com"), "/no", more);
    let webhooks = vec![
        no("label", json!({"objectSelector": {"matchLabels": {"ask": "yes"}}})),
        no("namespace", json!({"namespaceSelector": {"matchLabels": {"ask": "yes"}}})),
        no(
            "condition",
            json!({"matchConditions": [
            {"name": "mine", "expression": "request.userInfo.username == 'admin' && object.metadata.name == 'asked'"}]}),
        ),
        no(
            "broken",
            json!({"matchConditions": [
            {"name": "named", "expression": "object.metadata.name.startsWith('broken')"},
            {"name": "broken", "expression": "object.nothing == 1"}]}),
        ),
        no(
            "may",
            json!({"matchConditions": [{"name": "may", "expression":
            "object.metadata.name == 'may' && authorizer.group('').resource('secrets').namespace('x').check('get').allowed()"}]}),
        ),
        no(
            "exec",
            json!({"rules": [{"operations": ["CONNECT"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods/exec"]}]}),
        ),
        no(
            "scale",
            json!({"rules": [{"operations": ["UPDATE"], "apiGroups": ["apps"], "apiVersions": ["v1"], "resources": ["*/scale"]}]}),
        ),
        no(
            "evict",
            json!({"rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods/eviction"]}]}),
        ),
    ];
    configure(&api, false, "w", webhooks).await;
    api.create(MAPS, map("plain", json!({}))).await;
    let labelled = json!({"metadata": {"name": "a", "labels": {"ask": "yes"}}});
    let by = |name: &str| format!("admission webhook \"{name}.example.com\" denied the request: no");
    assert_eq!(api.fails(Method::POST, MAPS, labelled).await.2, by("label"));
    api.create("/api/v1/namespaces", json!({"metadata": {"name": "other", "labels": {"ask": "yes"}}})).await;
    let other = "/api/v1/namespaces/other/configmaps";
    assert_eq!(api.fails(Method::POST, other, map("a", json!({}))).await.2, by("namespace"));
    assert_eq!(api.fails(Method::POST, MAPS, map("asked", json!({}))).await.2, by("condition"));
    assert_eq!(api.fails(Method::POST, MAPS, map("may", json!({}))).await.2, by("may"));
    let message = api.fails_with(Method::POST, MAPS, map("broken", json!({})), 403).await;
    assert_eq!(
        message,
        "configmaps \"broken\" is forbidden: failed to evaluate match condition \"broken\": no such key: nothing"
    );
    api.create(PODS, pod("p")).await;
    let exec = format!("{PODS}/p/exec?command=sh&stdin=true&container=c");
    hook.calls();
    assert_eq!(api.fails(Method::POST, &exec, Value::Null).await.2, by("exec"));
    let (_, request) = hook.calls().remove(0);
    assert_eq!(
        request["object"],
        json!({"apiVersion": "v1", "kind": "PodExecOptions", "command": ["sh"], "stdin": true, "container": "c"})
    );
    assert_eq!(request["subResource"], "exec");
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p"}});
    assert_eq!(api.fails(Method::POST, &format!("{PODS}/p/eviction"), eviction).await.2, by("evict"));
    let deployments = "/apis/apps/v1/namespaces/default/deployments";
    let template = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let deployment =
        json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": template}});
    api.create(deployments, deployment).await;
    let scale = format!("{deployments}/d/scale");
    hook.calls();
    let (status, value) = api.call(Method::PATCH, &scale, MERGE, json!({"spec": {"replicas": 3}})).await;
    assert_eq!((status, &value["message"]), (StatusCode::BAD_REQUEST, &json!(by("scale"))));
    let (_, request) = hook.calls().remove(0);
    assert_eq!(request["kind"], json!({"group": "autoscaling", "version": "v1", "kind": "Scale"}));
    assert_eq!(request["resource"]["resource"], "deployments");
    assert_eq!(
        (&request["object"]["spec"]["replicas"], &request["oldObject"]["spec"]["replicas"]),
        (&json!(3), &json!(1))
    );
    // A webhook for everything does not get into the way of its own removal.
    let everything =
        json!({"rules": [{"operations": ["*"], "apiGroups": ["*"], "apiVersions": ["*"], "resources": ["*/*"]}]});
    configure(&api, false, "x", vec![no("all", everything)]).await;
    assert_eq!(api.fails(Method::POST, MAPS, map("z", json!({}))).await.2, by("all"));
    remove(&api, "validating", "x").await;
    api.create(MAPS, map("z", json!({}))).await;
}

#[tokio::test]
async fn a_webhook_behind_a_service() {
    let api = Api::new().await;
    let hook = Hook::new(&["hooks.default.svc"], |_, _| json!({"allowed": false, "status": {"message": "no"}})).await;
    let service = json!({"metadata": {"name": "hooks"}, "spec": {"type": "ExternalName", "externalName": "localhost"}});
    api.create("/api/v1/namespaces/default/services", service).await;
    let client = json!({"caBundle": hook.ca, "service": {"namespace": "default", "name": "hooks", "port": hook.port, "path": "/p"}});
    let more = json!({"clientConfig": client});
    configure(&api, false, "s", vec![hook.webhook("s.example.com", "", more)]).await;
    let message = api.fails(Method::POST, MAPS, map("a", json!({}))).await.2;
    assert_eq!(message, "admission webhook \"s.example.com\" denied the request: no");
    assert_eq!(hook.paths(), ["/p"]);
}

#[tokio::test]
async fn dry_runs_and_side_effects() {
    let api = Api::new().await;
    let hook = Hook::new(&["localhost"], |_, request| match request["dryRun"] == true {
        true => json!({"allowed": false, "status": {"message": "dry"}}),
        false => json!({"allowed": true}),
    })
    .await;
    configure(&api, false, "w", vec![hook.webhook("w.example.com", "/x", json!({}))]).await;
    let dry = format!("{MAPS}?dryRun=All");
    assert!(api.fails(Method::POST, &dry, map("a", json!({}))).await.2.ends_with("denied the request: dry"));
    api.create(MAPS, map("a", json!({}))).await;
}
