//! The audit log: what a policy wants is in it, and nothing else.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, StatusCode};
use http_body_util::BodyExt;
use seawall_server::{
    access::Access,
    audit::{Auditor, log::Options, policy::Policy, webhook},
    auth::{MASTERS, UserInfo},
    outside::{Credentials, kubeconfig::Target},
};
use serde_json::{Value, json};

use super::{
    harness::{Api, message, node},
    site::Site,
};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const SECRETS: &str = "/api/v1/namespaces/default/secrets";

struct Log {
    api: Api,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Log {
    /// A server with these rules. What it does by itself is not written down.
    async fn new(rules: &str) -> Log {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let policy = format!(
            "{{apiVersion: audit.k8s.io/v1, kind: Policy, rules: [
                {{level: None, users: ['system:apiserver']}}, {{level: None, resources: [{{group: '', resources: [serviceaccounts]}}]}}, {rules}]}}"
        );
        let options = Options { path: path.clone(), max_megabytes: 100, max_backups: 0, max_days: 0 };
        let auditor = Auditor::new(Policy::parse(&policy).unwrap()).with_log(&options).unwrap();
        let api = Api::with(Access { audit: Some(Arc::new(auditor)), ..Default::default() }).await;
        Log { api, path, _dir: dir }
    }

    async fn text(&self) -> String {
        self.api.server.flush_audit().await;
        std::fs::read_to_string(&self.path).unwrap()
    }

    /// The events since the last call.
    async fn events(&self) -> Vec<Value> {
        let events = self.text().await.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        std::fs::File::options().write(true).truncate(true).open(&self.path).unwrap();
        events
    }
}

/// Level, stage, verb and code of events.
fn short(events: &[Value]) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let one = |e: &Value| {
        format!("{} {} {} {}", text(&e["level"]), text(&e["stage"]), text(&e["verb"]), e["responseStatus"]["code"])
    };
    events.iter().map(one).collect()
}

#[tokio::test]
async fn who_asked_for_what_and_what_came_of_it() {
    let log = Log::new("{level: Metadata}").await;
    let api = &log.api;
    let object = json!({"metadata": {"name": "a"}, "data": {"k": "v"}});
    let request = Request::post(format!("{MAPS}?fieldManager=me"))
        .header("content-type", "application/json")
        .header("user-agent", "test/1")
        .header("x-forwarded-for", "192.0.2.7, nonsense");
    let user = UserInfo::new("admin", &[MASTERS]);
    let body = http_body_util::Full::new(bytes::Bytes::from(object.to_string()));
    let response = api.server.handle(request.body(body).unwrap(), Some(user)).await;
    assert_eq!(response.status(), 201);
    let id = response.headers()["audit-id"].to_str().unwrap().to_owned();
    assert_eq!(id.len(), 36);
    let events = log.events().await;
    assert_eq!(short(&events), ["Metadata RequestReceived create null"], "the answer has not been read yet");
    drop(response);
    let mut events = log.events().await;
    let mut event = events.remove(0);
    for key in ["requestReceivedTimestamp", "stageTimestamp"] {
        let at = event[key].take();
        assert!(at.as_str().unwrap().parse::<jiff::Timestamp>().is_ok() && at.as_str().unwrap().len() == 27, "{at}");
    }
    let expect = json!({"kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": "Metadata", "auditID": id,
        "stage": "ResponseComplete", "requestURI": format!("{MAPS}?fieldManager=me"), "verb": "create",
        "user": {"username": "admin", "groups": [MASTERS, "system:authenticated"]},
        "sourceIPs": ["192.0.2.7", "127.0.0.1"], "userAgent": "test/1",
        "objectRef": {"resource": "configmaps", "namespace": "default", "name": "a", "apiVersion": "v1"},
        "responseStatus": {"metadata": {}, "code": 201},
        "requestReceivedTimestamp": null, "stageTimestamp": null,
        "annotations": {"authorization.k8s.io/decision": "allow", "authorization.k8s.io/reason": ""}});
    assert_eq!(event, expect);

    // Whoever names a request finds it under this name.
    let response = api.raw(Request::get("/version").header("audit-id", "mine"), Value::Null).await;
    assert_eq!(response.headers()["audit-id"], "mine");
    drop(response);
    let events = log.events().await;
    assert_eq!((&events[1]["auditID"], &events[1]["requestURI"]), (&json!("mine"), &json!("/version")));
    assert_eq!(events[1]["verb"], "get");
    assert_eq!(events[1]["objectRef"], Value::Null);

    // What is refused, and what is not there.
    let refused = api.call(&node("n"), "GET", SECRETS, Value::Null).await;
    assert_eq!(refused.0, 403);
    let events = log.events().await;
    let status = &events[1]["responseStatus"];
    assert_eq!((&status["reason"], &status["status"]), (&json!("Forbidden"), &json!("Failure")));
    assert_eq!(status["message"], message(&refused));
    assert_eq!(events[1]["annotations"]["authorization.k8s.io/decision"], "forbid");
    assert_eq!(events[1]["annotations"]["authorization.k8s.io/reason"], "No Object name found");
    api.admin("GET", &format!("{MAPS}/none"), Value::Null).await;
    let events = log.events().await;
    assert_eq!(events[1]["responseStatus"]["details"], json!({"name": "none", "group": "", "kind": "configmaps"}));
    api.admin("DELETE", &format!("{MAPS}/a"), Value::Null).await;
    let events = log.events().await;
    assert_eq!(events[1]["responseStatus"]["status"], "Success", "what a deletion answers is a Status");
    assert_eq!(events[1]["responseStatus"]["details"]["name"], "a");

    // Who cannot say who they are is written down once.
    let (code, refusal) = api.bearer("wrong", "GET", MAPS, Value::Null).await;
    assert_eq!((code, &refusal["message"]), (401, &json!("Unauthorized")));
    let events = log.events().await;
    assert_eq!(short(&events), ["Metadata ResponseStarted list 401"]);
    assert_eq!(events[0]["responseStatus"]["message"], "Authentication failed, attempted: bearer");
    assert_eq!(events[0]["user"], json!({"username": "", "groups": []}));

    // A namespace is in itself.
    api.admin("GET", "/api/v1/namespaces/default", Value::Null).await;
    assert_eq!(log.events().await[1]["objectRef"]["namespace"], "default");
    let (_, metrics) = api.admin("GET", "/metrics", Value::Null).await;
    assert_eq!(metrics, Value::Null, "not JSON");
}

#[tokio::test]
async fn acting_for_somebody_is_seen() {
    let log = Log::new("{level: Metadata, omitStages: [RequestReceived]}").await;
    let request = Request::get("/version").header("impersonate-user", "jane").header("impersonate-group", "devs");
    let user = UserInfo::new("admin", &[MASTERS]);
    let body = http_body_util::Empty::<bytes::Bytes>::new();
    let response = log.api.server.handle(request.body(body).unwrap(), Some(user)).await;
    assert_eq!(response.status(), 200);
    drop(response);
    let events = log.events().await;
    assert_eq!(events[0]["user"]["username"], "admin");
    assert_eq!(events[0]["impersonatedUser"], json!({"username": "jane", "groups": ["devs", "system:authenticated"]}));
}

#[tokio::test]
async fn bodies_are_written_down_where_the_policy_says_so() {
    let log = Log::new(
        "{level: Metadata, omitStages: [RequestReceived], resources: [{group: '', resources: [secrets]}]},
         {level: None, verbs: [get]},
         {level: RequestResponse, omitStages: [RequestReceived], omitManagedFields: true, verbs: [list, update]},
         {level: Request, omitStages: [RequestReceived], omitManagedFields: true}",
    )
    .await;
    let api = &log.api;
    api.create(SECRETS, json!({"metadata": {"name": "s"}, "stringData": {"password": "sesame"}})).await;
    let (_, secret) = api.admin("GET", &format!("{SECRETS}/s"), Value::Null).await;
    assert_eq!(secret["data"]["password"], "c2VzYW1l");
    let text = log.text().await;
    assert!(!text.contains("sesame") && !text.contains("c2VzYW1l"), "{text}");
    let events = log.events().await;
    assert_eq!(short(&events), ["Metadata ResponseComplete create 201", "Metadata ResponseComplete get 200"]);
    assert_eq!(events[0]["objectRef"]["name"], "s");

    let mut made = api.create(MAPS, json!({"metadata": {"name": "a"}, "data": {"k": "v"}})).await;
    assert!(made["metadata"]["managedFields"].is_array());
    made["data"]["k"] = "w".into();
    let path = format!("{MAPS}/a");
    api.admin("PUT", &path, made).await;
    let patch = json!({"data": {"k": "x"}});
    api.patch(&UserInfo::new("admin", &[MASTERS]), &path, patch.clone()).await;
    api.admin("GET", &path, Value::Null).await;
    api.admin("GET", MAPS, Value::Null).await;
    api.admin("DELETE", &path, json!({"gracePeriodSeconds": 0})).await;
    let events = log.events().await;
    let expect = [
        "Request ResponseComplete create 201",
        "RequestResponse ResponseComplete update 200",
        "Request ResponseComplete patch 200",
        "RequestResponse ResponseComplete list 200",
        "Request ResponseComplete delete 200",
    ];
    assert_eq!(short(&events), expect);
    assert_eq!(events[0]["requestObject"]["data"]["k"], "v");
    assert_eq!(events[0]["responseObject"], Value::Null);
    assert_eq!(events[1]["requestObject"]["data"]["k"], "w");
    assert_eq!(events[1]["responseObject"]["data"]["k"], "w");
    assert!(events[1]["responseObject"]["metadata"]["uid"].is_string());
    assert_eq!(events[1]["objectRef"]["uid"], events[1]["responseObject"]["metadata"]["uid"]);
    assert!(events[1]["objectRef"]["resourceVersion"].is_string());
    assert_eq!(events[2]["requestObject"], patch);
    assert_eq!(events[3]["responseObject"]["items"][0]["data"]["k"], "x");
    assert_eq!(events[4]["requestObject"], json!({"gracePeriodSeconds": 0}));
    for event in &events {
        assert!(!event.to_string().contains("managedFields"), "{event}");
    }

    // Who would rather have protobuf is answered in what can be written down.
    let request = Request::get(MAPS).header("accept", "application/vnd.kubernetes.protobuf,application/json");
    let user = UserInfo::new("admin", &[MASTERS]);
    let body = http_body_util::Empty::<bytes::Bytes>::new();
    api.create(MAPS, json!({"metadata": {"name": "b"}, "data": {"k": "y"}})).await;
    log.events().await;
    let response = api.server.handle(request.body(body).unwrap(), Some(user)).await;
    assert_eq!(response.headers()["content-type"], "application/json");
    response.into_body().collect().await.unwrap();
    let events = log.events().await;
    assert_eq!(events[0]["responseObject"]["items"][0]["data"]["k"], "y", "{}", events[0]);
}

#[tokio::test]
async fn a_watch_is_written_down_at_its_begin_and_at_its_end() {
    let log = Log::new("{level: RequestResponse}").await;
    let request = Request::get(format!("{MAPS}?watch=true&timeoutSeconds=1"));
    let user = UserInfo::new("admin", &[MASTERS]);
    let body = http_body_util::Empty::<bytes::Bytes>::new();
    let response = log.api.server.handle(request.body(body).unwrap(), Some(user)).await;
    let begin = ["RequestResponse RequestReceived watch null", "RequestResponse ResponseStarted watch 200"];
    assert_eq!(short(&log.events().await), begin);
    response.into_body().collect().await.unwrap();
    let events = log.events().await;
    assert_eq!(short(&events), ["RequestResponse ResponseComplete watch 200"]);
    assert_eq!(events[0]["responseObject"], Value::Null);
}

#[tokio::test]
async fn admission_has_its_say() {
    let log = Log::new("{level: Metadata, omitStages: [RequestReceived]}").await;
    let api = &log.api;
    let labels =
        json!({"pod-security.kubernetes.io/enforce": "baseline", "pod-security.kubernetes.io/audit": "restricted"});
    api.create("/api/v1/namespaces", json!({"metadata": {"name": "n", "labels": labels}})).await;
    api.create("/api/v1/namespaces/n/serviceaccounts", json!({"metadata": {"name": "default"}})).await;
    let group = "/apis/admissionregistration.k8s.io/v1";
    let policy = json!({"metadata": {"name": "p"}, "spec": {
        "matchConstraints": {"resourceRules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}]},
        "validations": [{"expression": "false", "message": "never"}],
        "auditAnnotations": [{"key": "name", "valueExpression": "'it is ' + object.metadata.name"}]}});
    api.create(&format!("{group}/validatingadmissionpolicies"), policy).await;
    let binding = json!({"metadata": {"name": "b"}, "spec": {"policyName": "p", "validationActions": ["Audit"]}});
    api.create(&format!("{group}/validatingadmissionpolicybindings"), binding).await;
    log.events().await;
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    api.create("/api/v1/namespaces/n/pods", pod).await;
    let events = log.events().await;
    let notes = &events[0]["annotations"];
    assert_eq!(notes["pod-security.kubernetes.io/enforce-policy"], "baseline:latest");
    let violations = notes["pod-security.kubernetes.io/audit-violations"].as_str().unwrap();
    assert!(
        violations.starts_with("would violate PodSecurity \"restricted:latest\": allowPrivilegeEscalation"),
        "{violations}"
    );
    assert_eq!(notes["p/name"], "it is p");
    let failure: Value =
        serde_json::from_str(notes["validation.policy.admission.k8s.io/validation_failure"].as_str().unwrap()).unwrap();
    let expect = json!([{"message": "never", "policy": "p", "binding": "b", "validationActions": ["Audit"]}]);
    assert_eq!(failure, expect);
}

#[tokio::test]
async fn events_are_sent_to_a_webhook_in_lists() {
    let lists: Arc<Mutex<Vec<Value>>> = Arc::default();
    let (seen, fails) = (lists.clone(), Arc::new(AtomicUsize::new(1)));
    let site = Site::new(&["localhost"], move |asked| {
        // The first list is not taken, and comes again.
        let failed = fails.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
        if !failed {
            seen.lock().unwrap().push(asked.body);
        }
        let status = if failed { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
        Box::pin(async move { (status, Value::Null) })
    })
    .await;
    let credentials = Credentials { authorities: Some(site.ca.clone()), ..Default::default() };
    let target = Target { url: format!("https://localhost:{}/audit", site.port), credentials };
    let options = webhook::Options {
        batch_max_size: 2,
        batch_max_wait: Duration::from_secs(3600),
        initial_backoff: Duration::from_millis(10),
    };
    let policy = "{apiVersion: audit.k8s.io/v1, kind: Policy, omitStages: [RequestReceived], rules: [{level: Metadata, nonResourceURLs: [/version]}]}";
    let auditor = Auditor::new(Policy::parse(policy).unwrap()).with_webhook(&target, options).unwrap();
    let api = Api::with(Access { audit: Some(Arc::new(auditor)), ..Default::default() }).await;
    for _ in 0..3 {
        api.admin("GET", "/version", Value::Null).await;
    }
    api.server.flush_audit().await;
    let lists = lists.lock().unwrap();
    let sizes: Vec<usize> = lists.iter().map(|list| list["items"].as_array().unwrap().len()).collect();
    assert_eq!(sizes, [2, 1], "{lists:?}");
    assert_eq!((&lists[0]["kind"], &lists[0]["apiVersion"]), (&json!("EventList"), &json!("audit.k8s.io/v1")));
    assert_eq!(lists[0]["items"][1]["requestURI"], "/version");
}

#[tokio::test]
async fn requests_that_do_not_come_to_an_answer() {
    use futures::StreamExt;
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    type Piece = Result<Frame<bytes::Bytes>, std::io::Error>;
    let log = Log::new("{level: Metadata, omitStages: [RequestReceived]}").await;
    let user = || Some(UserInfo::new("admin", &[MASTERS]));
    let request = || Request::post(MAPS).header("content-type", "application/json");
    // The client goes away while it still sends.
    let never = StreamBody::new(futures::stream::pending::<Piece>());
    let handled = log.api.server.handle(request().body(never).unwrap(), user());
    assert!(tokio::time::timeout(Duration::from_millis(50), handled).await.is_err());
    let events = log.events().await;
    assert_eq!(short(&events), ["Metadata ResponseComplete create 504"]);
    assert_eq!(events[0]["responseStatus"]["message"], "the client went away before it was answered");
    // Something of ours breaks.
    let server = log.api.server.clone();
    let broken = StreamBody::new(futures::stream::iter([()]).map(|()| -> Piece { panic!("a mistake of ours") }));
    let handled = tokio::spawn(async move { server.handle(request().body(broken).unwrap(), user()).await.status() });
    assert!(handled.await.unwrap_err().is_panic());
    let events = log.events().await;
    assert_eq!(short(&events), ["Metadata Panic create 500"]);
    assert_eq!(events[0]["responseStatus"]["reason"], "InternalError");
}
