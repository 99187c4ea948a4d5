//! Bootstrap tokens.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::{SignedDuration, Timestamp};
use seawall_server::auth::{
    MASTERS, UserInfo,
    bootstrap_token::{GROUP_AGENTS, GROUP_SERVERS, Token},
};
use serde_json::{Value, json};

use super::harness::{Api, ISSUER, message, node};

const SECRETS: &str = "/api/v1/namespaces/kube-system/secrets";
const REVIEWS: &str = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
const CSRS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";

fn soon() -> Option<Timestamp> {
    Timestamp::now().checked_add(SignedDuration::from_hours(1)).ok()
}

/// Whom the API takes the bearer of a token for, or the code of the refusal.
async fn who(api: &Api, token: &str) -> Result<Value, u16> {
    match api.bearer(token, "POST", REVIEWS, json!({})).await {
        (201, review) => Ok(review["status"]["userInfo"].clone()),
        (code, _) => Err(code),
    }
}

#[tokio::test]
async fn a_token_is_a_user_while_its_secret_says_so() {
    let api = Api::new().await;
    let token = Token::generate();
    assert_eq!(who(&api, &token.to_string()).await, Err(401), "there is no Secret yet");
    api.create(SECRETS, token.manifest(&[GROUP_AGENTS], soon(), "a test")).await;
    let user = who(&api, &token.to_string()).await.unwrap();
    assert_eq!(user["username"], format!("system:bootstrap:{}", token.id()));
    assert_eq!(user["groups"], json!(["system:bootstrappers", GROUP_AGENTS, "system:authenticated"]));

    let wrong = format!("{}.{}", token.id(), "0123456789abcdef");
    assert_eq!(who(&api, &wrong).await, Err(401), "another secret part");
    let (_, refusal) = api.bearer(&wrong, "POST", REVIEWS, json!({})).await;
    assert_eq!(refusal["message"], "Unauthorized", "what is wrong is not told");

    let past = Timestamp::now().checked_sub(SignedDuration::from_secs(1)).ok();
    let expired = Token::generate();
    api.create(SECRETS, expired.manifest(&[], past, "")).await;
    assert_eq!(who(&api, &expired.to_string()).await, Err(401));

    let unused = Token::generate();
    let mut secret = unused.manifest(&[], soon(), "");
    secret["stringData"]["usage-bootstrap-authentication"] = "false".into();
    api.create(SECRETS, secret).await;
    assert_eq!(who(&api, &unused.to_string()).await, Err(401));

    let greedy = Token::generate();
    api.create(SECRETS, greedy.manifest(&["system:masters"], soon(), "")).await;
    assert_eq!(who(&api, &greedy.to_string()).await, Err(401));

    let elsewhere = Token::generate();
    let mut secret = elsewhere.manifest(&[], soon(), "");
    secret["metadata"]["namespace"] = "default".into();
    api.create("/api/v1/namespaces/default/secrets", secret).await;
    assert_eq!(who(&api, &elsewhere.to_string()).await, Err(401));

    let (code, _) = api.admin("DELETE", &format!("{SECRETS}/{}", token.name()), Value::Null).await;
    assert_eq!(code, 200);
    // The cache hears of the deletion a moment later.
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    while who(&api, &token.to_string()).await.is_ok() {
        assert!(tokio::time::Instant::now() < deadline, "a deleted token still works");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn what_its_bearer_may_do() {
    let api = Api::new().await;
    let (agent, server) = (Token::generate(), Token::generate());
    api.create(SECRETS, agent.manifest(&[GROUP_AGENTS], soon(), "")).await;
    api.create(SECRETS, server.manifest(&[GROUP_SERVERS], soon(), "")).await;
    let check = async |token: &Token, method: &str, path: &str, allowed: bool| {
        let (code, value) = api.bearer(&token.to_string(), method, path, Value::Null).await;
        assert_eq!(code != 403, allowed, "{method} {path}: {code} {value}");
    };
    for token in [&agent, &server] {
        check(token, "GET", CSRS, true).await;
        check(token, "GET", &format!("{CSRS}?watch=1"), true).await;
        check(token, "POST", CSRS, true).await;
        check(token, "GET", &format!("{CSRS}/x"), true).await;
        check(token, "PUT", &format!("{CSRS}/x/approval"), false).await;
        check(token, "PUT", &format!("{CSRS}/x/status"), false).await;
        check(token, "DELETE", &format!("{CSRS}/x"), false).await;
        check(token, "GET", SECRETS, false).await;
        check(token, "GET", "/api/v1/nodes", false).await;
        check(token, "POST", "/api/v1/nodes", false).await;
        check(token, "GET", "/seawall/v1/config", true).await;
        check(token, "GET", "/seawall/v1/other", false).await;
    }
    check(&server, "POST", "/seawall/v1/join", true).await;
    check(&agent, "POST", "/seawall/v1/join", false).await;
    let (code, _) = api.call(&node("a"), "GET", "/seawall/v1/config", Value::Null).await;
    assert_ne!(code, 403);
    let (code, _) = api.call(&node("a"), "POST", "/seawall/v1/join", Value::Null).await;
    assert_eq!(code, 403);
    let refused = api.bearer(&agent.to_string(), "GET", "/api/v1/nodes", Value::Null).await;
    assert_eq!(
        message(&refused),
        format!(
            "nodes is forbidden: User \"system:bootstrap:{}\" cannot list resource \"nodes\" in API group \"\" at the cluster scope",
            agent.id()
        )
    );
}

#[tokio::test]
async fn a_review_of_a_token_says_no_more_than_yes_or_no() {
    let api = Api::new().await;
    let token = Token::generate();
    api.create(SECRETS, token.manifest(&[GROUP_AGENTS], soon(), "")).await;
    let review = async |token: &str, audiences: Value| {
        let body = json!({"spec": {"token": token, "audiences": audiences}});
        api.create("/apis/authentication.k8s.io/v1/tokenreviews", body).await["status"].clone()
    };
    let yes = review(&token.to_string(), json!([])).await;
    assert_eq!((&yes["authenticated"], &yes["audiences"]), (&json!(true), &json!([ISSUER])));
    let no = json!({"authenticated": false, "user": {}, "error": "the bootstrap token is not valid"});
    assert_eq!(review(&token.to_string(), json!(["https://elsewhere"])).await, no);
    assert_eq!(review(&format!("{}.0123456789abcdef", token.id()), json!([])).await, no);
    assert_eq!(review(&Token::generate().to_string(), json!([])).await, no);
}

/// <https://kubernetes.io/docs/concepts/configuration/secret/#serviceaccount-token-secrets>
#[tokio::test]
async fn a_token_in_a_secret_lasts_as_long_as_secret_and_account() {
    const OURS: &str = "/api/v1/namespaces/default/secrets";
    const ACCOUNTS: &str = "/api/v1/namespaces/default/serviceaccounts";
    let api = Api::new().await;
    let secret = |name: &str, account: &str| {
        json!({"metadata": {"name": name, "annotations": {"kubernetes.io/service-account.name": account}},
            "type": "kubernetes.io/service-account-token"})
    };
    // The account may come after the Secret.
    let made = api.create(OURS, secret("robot", "robot")).await;
    assert!(made["data"]["token"].is_null(), "who may only create Secrets is not told a token: {made}");
    let account = api.create(ACCOUNTS, json!({"metadata": {"name": "robot"}})).await;
    let full =
        eventually(&api, &format!("{OURS}/robot"), |code, secret| code == 200 && !secret["data"]["token"].is_null())
            .await;
    assert_eq!(full["metadata"]["annotations"]["kubernetes.io/service-account.uid"], account["metadata"]["uid"]);
    assert_eq!(decoded(&full["data"]["namespace"]), "default");
    assert!(decoded(&full["data"]["ca.crt"]).starts_with("-----BEGIN CERTIFICATE-----"));
    let token = decoded(&full["data"]["token"]);
    let user = who(&api, &token).await.unwrap();
    assert_eq!(user["username"], "system:serviceaccount:default:robot");
    assert_eq!(user["uid"], account["metadata"]["uid"]);

    // Another token in its place: the first is worth nothing any more.
    let admin = UserInfo::new("admin", &[MASTERS]);
    let (code, _) = api.patch(&admin, &format!("{OURS}/robot"), json!({"data": {"token": "b3RoZXI="}})).await;
    assert_eq!(code, 200);
    refused(&api, &token).await;
    // Without any, there is a new one.
    let (code, _) = api.patch(&admin, &format!("{OURS}/robot"), json!({"data": {"token": null}})).await;
    assert_eq!(code, 200);
    let full = eventually(&api, &format!("{OURS}/robot"), |_, secret| secret["data"]["token"].is_string()).await;
    let token = decoded(&full["data"]["token"]);
    assert!(who(&api, &token).await.is_ok());

    // With the account go the token and its Secret.
    let (code, _) = api.admin("DELETE", &format!("{ACCOUNTS}/robot"), Value::Null).await;
    assert_eq!(code, 200);
    refused(&api, &token).await;
    eventually(&api, &format!("{OURS}/robot"), |code, _| code == 404).await;
    // Nobody has written this one.
    let forged = format!("{}x", token);
    assert_eq!(who(&api, &forged).await, Err(401));
}

/// <https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#legacy-serviceaccount-token-cleaner>
#[tokio::test]
async fn when_a_token_in_a_secret_was_used_and_that_it_is_marked() {
    const OURS: &str = "/api/v1/namespaces/default/secrets";
    let api = Api::new().await;
    let today = || Timestamp::now().to_string()[..10].to_owned();
    let tracking = "/api/v1/namespaces/kube-system/configmaps/kube-apiserver-legacy-service-account-token-tracking";
    let since = eventually(&api, tracking, |code, _| code == 200).await;
    assert_eq!(since["data"], json!({"since": today()}));

    api.create("/api/v1/namespaces/default/serviceaccounts", json!({"metadata": {"name": "robot"}})).await;
    let secret = json!({"metadata": {"name": "robot", "annotations": {"kubernetes.io/service-account.name": "robot"}},
        "type": "kubernetes.io/service-account-token"});
    api.create(OURS, secret).await;
    let path = format!("{OURS}/robot");
    let full = eventually(&api, &path, |_, secret| secret["data"]["token"].is_string()).await;
    assert!(full["metadata"]["labels"].is_null(), "{full}");
    let token = decoded(&full["data"]["token"]);
    assert!(who(&api, &token).await.is_ok());
    let used = |secret: &Value| secret["metadata"]["labels"]["kubernetes.io/legacy-token-last-used"].clone();
    eventually(&api, &path, |_, secret| used(secret) == today()).await;

    // The day after it is written again.
    let admin = UserInfo::new("admin", &[MASTERS]);
    let label = |name: &str, value: Value| json!({"metadata": {"labels": {format!("kubernetes.io/{name}"): value}}});
    let set = async |name: &str, value: Value| {
        let (code, answer) = api.patch(&admin, &path, label(name, value)).await;
        assert_eq!(code, 200, "{answer}");
    };
    set("legacy-token-last-used", "2026-01-01".into()).await;
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    while used(&api.admin("GET", &path, Value::Null).await.1) != today() {
        assert!(who(&api, &token).await.is_ok());
        assert!(tokio::time::Instant::now() < deadline, "the use is not written down");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }

    // One that is marked is refused, and says how it comes to be of use again.
    set("legacy-token-invalid-since", "2026-02-03".into()).await;
    refused(&api, &token).await;
    let review = json!({"spec": {"token": token}});
    let review = api.create("/apis/authentication.k8s.io/v1/tokenreviews", review).await;
    let why = review["status"]["error"].as_str().unwrap();
    assert!(why.contains("default/robot is invalid since 2026-02-03"), "{why}");
    assert!(why.contains("remove the label kubernetes.io/legacy-token-invalid-since"), "{why}");
    set("legacy-token-invalid-since", Value::Null).await;
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    while who(&api, &token).await.is_err() {
        let secret = api.admin("GET", &path, Value::Null).await;
        assert!(tokio::time::Instant::now() < deadline, "the token stays refused: {secret:?}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

fn decoded(value: &Value) -> String {
    let bytes = STANDARD.decode(value.as_str().unwrap()).unwrap();
    String::from_utf8(bytes).unwrap()
}

async fn eventually(api: &Api, path: &str, done: impl Fn(u16, &Value) -> bool) -> Value {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let (code, value) = api.admin("GET", path, Value::Null).await;
        if done(code, &value) {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "{path} stays {value}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

async fn refused(api: &Api, token: &str) {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    while who(api, token).await.is_ok() {
        assert!(tokio::time::Instant::now() < deadline, "the token still works");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
