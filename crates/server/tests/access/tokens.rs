//! Bootstrap tokens.

use jiff::{SignedDuration, Timestamp};
use seawall_server::auth::bootstrap_token::{GROUP_AGENTS, GROUP_SERVERS, Token};
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
