//! Webhooks that say who somebody is and what they may: real ones, over HTTPS.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{HeaderMap, StatusCode};
use seawall_server::{
    access::Access,
    auth::{
        UserInfo,
        remote::{AccessWebhook, Memory, TokenWebhook, Turn},
    },
    outside::{Credentials, kubeconfig::Target},
};
use serde_json::{Value, json};

use super::{
    harness::{Api, ISSUER, message},
    site::Site,
};

const REVIEWS: &str = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
const MAPS: &str = "/api/v1/namespaces/default/configmaps";

struct Hook {
    site: Site,
    asked: Arc<Mutex<Vec<(HeaderMap, Value)>>>,
}

impl Hook {
    /// Answers a review with this status.
    async fn new(status: impl Fn(&Value) -> Value + Send + Sync + 'static) -> Hook {
        let asked: Arc<Mutex<Vec<(HeaderMap, Value)>>> = Arc::default();
        let seen = asked.clone();
        let site = Site::new(&["localhost"], move |asked| {
            let mut answer = asked.body.clone();
            answer["status"] = status(&asked.body["spec"]);
            seen.lock().unwrap().push((asked.headers, asked.body));
            Box::pin(async move { (StatusCode::OK, answer) })
        })
        .await;
        Hook { site, asked }
    }

    fn target(&self) -> Target {
        let credentials = Credentials {
            authorities: Some(self.site.ca.clone()),
            token: Some("sesame".to_owned()),
            ..Default::default()
        };
        Target { url: format!("https://localhost:{}/review", self.site.port), credentials }
    }

    /// What it was asked since the last call.
    fn asked(&self) -> Vec<Value> {
        std::mem::take(&mut *self.asked.lock().unwrap()).into_iter().map(|(_, review)| review).collect()
    }
}

/// Nobody listens there.
async fn silent() -> Target {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/", listener.local_addr().unwrap().port());
    Target { url, credentials: Credentials::default() }
}

async fn who(api: &Api, token: &str) -> Result<Value, u16> {
    match api.bearer(token, "POST", REVIEWS, json!({})).await {
        (201, review) => Ok(review["status"]["userInfo"].clone()),
        (code, _) => Err(code),
    }
}

async fn with_tokens(target: &Target, ttl: Duration) -> Api {
    let webhook = TokenWebhook::new(target, ttl).unwrap();
    Api::with(Access { tokens: Some(Arc::new(webhook)), ..Default::default() }).await
}

#[tokio::test]
async fn a_webhook_knows_whose_tokens_are() {
    let hook = Hook::new(|spec| match spec["token"].as_str() {
        Some("good") => json!({"authenticated": true, "user": {"username": "jane", "uid": "7", "groups": ["devs"],
            "extra": {"acme.io/team": ["t"]}}}),
        Some("elsewhere") => json!({"authenticated": true, "user": {"username": "jane"}, "audiences": ["elsewhere"]}),
        _ => json!({"authenticated": false, "error": "never seen"}),
    })
    .await;
    let api = with_tokens(&hook.target(), Duration::from_secs(60)).await;
    let jane = json!({"username": "jane", "uid": "7", "groups": ["devs", "system:authenticated"],
        "extra": {"acme.io/team": ["t"]}});
    assert_eq!(who(&api, "good").await, Ok(jane.clone()));
    let (headers, review) = hook.asked.lock().unwrap().remove(0);
    assert_eq!(headers["authorization"], "Bearer sesame");
    assert_eq!((&review["apiVersion"], &review["kind"]), (&json!("authentication.k8s.io/v1"), &json!("TokenReview")));
    assert_eq!(review["spec"], json!({"token": "good", "audiences": [ISSUER]}));

    // Both answers are remembered.
    assert_eq!(who(&api, "good").await, Ok(jane.clone()));
    assert_eq!(who(&api, "bad").await, Err(401));
    assert_eq!(who(&api, "bad").await, Err(401));
    assert_eq!(who(&api, "elsewhere").await, Err(401), "it is for another audience");
    assert_eq!(hook.asked().len(), 2);
    let review = async |token: &str, audiences: Value| {
        let body = json!({"spec": {"token": token, "audiences": audiences}});
        api.create("/apis/authentication.k8s.io/v1/tokenreviews", body).await["status"].clone()
    };
    assert_eq!(review("good", json!([])).await, json!({"authenticated": true, "user": jane, "audiences": [ISSUER]}));
    assert_eq!(review("elsewhere", json!(["x", "elsewhere"])).await["audiences"], json!(["elsewhere"]));
    assert!(review("bad", json!([])).await["error"].as_str().unwrap().ends_with("never seen"));

    // What the cluster itself knows is nobody else's business.
    hook.asked();
    let path = "/api/v1/namespaces/default/serviceaccounts/default/token";
    let own = api.create(path, json!({"spec": {}})).await["status"]["token"].as_str().unwrap().to_owned();
    assert_eq!(who(&api, &own).await.unwrap()["username"], "system:serviceaccount:default:default");
    assert_eq!(hook.asked().len(), 0);
}

#[tokio::test]
async fn without_memory_it_is_asked_each_time() {
    let hook = Hook::new(|_| json!({"authenticated": true, "user": {"username": "jane"}})).await;
    let api = with_tokens(&hook.target(), Duration::ZERO).await;
    for _ in 0..3 {
        assert!(who(&api, "good").await.is_ok());
    }
    assert_eq!(hook.asked().len(), 3);
}

#[tokio::test]
async fn a_webhook_that_cannot_be_asked_lets_nobody_in() {
    assert_eq!(who(&with_tokens(&silent().await, Duration::from_secs(60)).await, "good").await, Err(401));
    // Nor does one whose certificate is not known, though it would say yes.
    let hook = Hook::new(|_| json!({"authenticated": true, "user": {"username": "jane"}})).await;
    let other = Hook::new(|_| Value::Null).await;
    let target = Target { credentials: other.target().credentials, ..hook.target() };
    assert_eq!(who(&with_tokens(&target, Duration::from_secs(60)).await, "good").await, Err(401));
    assert_eq!(hook.asked().len(), 0);
}

async fn with_access(target: &Target, turn: Turn) -> Api {
    let memory = Memory { allowed: Duration::from_secs(60), refused: Duration::from_secs(60) };
    let webhook = AccessWebhook::new(target, turn, memory).unwrap();
    let api = Api::with(Access { authorizer: Some(Arc::new(webhook)), ..Default::default() }).await;
    let group = "/apis/rbac.authorization.k8s.io/v1/namespaces/default";
    let rules = json!([{"verbs": ["list"], "apiGroups": [""], "resources": ["configmaps"]}]);
    api.create(&format!("{group}/roles"), json!({"metadata": {"name": "maps"}, "rules": rules})).await;
    let subject = |name: &str| json!({"kind": "User", "name": name, "apiGroup": "rbac.authorization.k8s.io"});
    let reference = json!({"kind": "Role", "name": "maps", "apiGroup": "rbac.authorization.k8s.io"});
    let subjects = [subject("by-role"), subject("banned")];
    let binding = json!({"metadata": {"name": "maps"}, "subjects": subjects, "roleRef": reference});
    api.create(&format!("{group}/rolebindings"), binding).await;
    api
}

fn judge(spec: &Value) -> Value {
    match spec["user"].as_str() {
        Some("by-webhook") => json!({"allowed": true, "reason": "a friend"}),
        Some("banned") => json!({"allowed": false, "denied": true, "reason": "banned"}),
        _ => json!({"allowed": false, "reason": "never seen"}),
    }
}

#[tokio::test]
async fn a_webhook_decides_what_roles_do_not_allow() {
    let hook = Hook::new(judge).await;
    let api = with_access(&hook.target(), Turn::Last).await;
    let list = async |name: &str| api.call(&UserInfo::new(name, &["devs"]), "GET", MAPS, Value::Null).await;
    assert_eq!(hook.asked().len(), 0, "administrators need nobody's leave");
    assert_eq!(list("by-role").await.0, 200);
    assert_eq!(hook.asked().len(), 0);
    assert_eq!(list("by-webhook").await.0, 200);
    let review = hook.asked().remove(0);
    assert_eq!(review["kind"], "SubjectAccessReview");
    let expect = json!({"user": "by-webhook", "groups": ["devs", "system:authenticated"], "extra": {},
        "resourceAttributes": {"namespace": "default", "verb": "list", "resource": "configmaps"}});
    assert_eq!(review["spec"], expect);
    assert_eq!(list("by-webhook").await.0, 200);
    assert_eq!(hook.asked().len(), 0, "it is remembered");
    let refused = list("nobody").await;
    assert!(refused.0 == 403 && message(&refused).ends_with(": never seen"), "{refused:?}");
    list("nobody").await;
    assert_eq!(hook.asked().len(), 1, "a refusal is remembered as well");
    assert_eq!(list("banned").await.0, 200, "what a role allows is not asked about");

    // Others may ask what somebody may.
    let body = json!({"spec": {"user": "by-webhook", "resourceAttributes": {"verb": "get", "resource": "pods"}}});
    let review = api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", body).await;
    assert_eq!(review["status"], json!({"allowed": true, "reason": "a friend"}));
    // And what is no resource.
    let user = UserInfo::new("by-webhook", &[]);
    hook.asked();
    assert_eq!(api.call(&user, "GET", "/metrics", Value::Null).await.0, 200);
    assert_eq!(hook.asked()[0]["spec"]["nonResourceAttributes"], json!({"path": "/metrics", "verb": "get"}));
}

#[tokio::test]
async fn a_webhook_that_is_asked_first_can_deny() {
    let hook = Hook::new(judge).await;
    let api = with_access(&hook.target(), Turn::First).await;
    let list = async |name: &str| api.call(&UserInfo::new(name, &[]), "GET", MAPS, Value::Null).await;
    assert_eq!((list("by-webhook").await.0, list("by-role").await.0), (200, 200));
    let refused = list("banned").await;
    assert!(refused.0 == 403 && message(&refused).ends_with(": banned"), "{refused:?}");
    assert_eq!(list("nobody").await.0, 403);
    hook.asked();
    api.admin("GET", MAPS, Value::Null).await;
    assert_eq!(hook.asked().len(), 0, "nobody locks administrators out");
}

#[tokio::test]
async fn a_webhook_that_cannot_be_asked_allows_nothing() {
    let api = with_access(&silent().await, Turn::Last).await;
    let list = async |name: &str| api.call(&UserInfo::new(name, &[]), "GET", MAPS, Value::Null).await.0;
    assert_eq!((list("by-webhook").await, list("by-role").await), (403, 200));
}
