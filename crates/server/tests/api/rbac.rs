//! Roles and bindings, through the whole pipeline.

use http::{Method, StatusCode};
use seawall_server::auth::UserInfo;
use serde_json::{Value, json};

use crate::{MAPS, MERGE, PODS, harness::Api, map, pod};

const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";

fn role(name: &str, rules: Value) -> Value {
    json!({"metadata": {"name": name}, "rules": rules})
}

fn binding(name: &str, kind: &str, role: &str, subject: Value) -> Value {
    json!({"metadata": {"name": name}, "subjects": [subject],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role}})
}

fn user(name: &str) -> Value {
    json!({"kind": "User", "name": name, "apiGroup": "rbac.authorization.k8s.io"})
}

fn rule(resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": [""], "resources": resources, "verbs": verbs})
}

#[tokio::test]
async fn a_binding_gives_and_takes_at_once() {
    let api = Api::new().await;
    let jane = api.with_user(Some(UserInfo::new("jane", &["devs"])));
    let (code, reason, message) = jane.fails(Method::GET, PODS, Value::Null).await;
    assert_eq!((code, &*reason), (403, "Forbidden"));
    assert_eq!(
        message,
        "pods is forbidden: User \"jane\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
    );
    let roles = format!("{RBAC}/namespaces/default/roles");
    let bindings = format!("{RBAC}/namespaces/default/rolebindings");
    // A binding may come before its role, and says so until then.
    api.create(&bindings, binding("jane", "Role", "reader", user("jane"))).await;
    let why = jane.fails(Method::GET, PODS, Value::Null).await.2;
    assert!(why.ends_with("RBAC: role.rbac.authorization.k8s.io \"reader\" not found"), "{why}");
    api.create(&roles, role("reader", json!([rule(&["pods"], &["get", "list"])]))).await;
    jane.get(PODS).await;
    assert_eq!(jane.fails(Method::POST, PODS, pod("a")).await.0, 403);
    assert_eq!(jane.fails(Method::GET, "/api/v1/pods", Value::Null).await.0, 403, "only in that namespace");
    assert_eq!(jane.fails(Method::GET, MAPS, Value::Null).await.0, 403);
    let wider = json!({"rules": [rule(&["pods", "configmaps"], &["get", "list", "create"])]});
    api.call(Method::PATCH, &format!("{roles}/reader"), MERGE, wider).await;
    jane.create(MAPS, map("a", json!({}))).await;
    api.call(Method::DELETE, &format!("{bindings}/jane"), "", Value::Null).await;
    assert_eq!(jane.fails(Method::GET, PODS, Value::Null).await.0, 403);
    // By group, in the whole cluster.
    api.create(&format!("{RBAC}/clusterroles"), role("pods", json!([rule(&["pods"], &["*"])]))).await;
    let group = json!({"kind": "Group", "name": "devs", "apiGroup": "rbac.authorization.k8s.io"});
    api.create(&format!("{RBAC}/clusterrolebindings"), binding("devs", "ClusterRole", "pods", group)).await;
    jane.get("/api/v1/pods").await;
}

#[tokio::test]
async fn what_every_cluster_has() {
    let api = Api::new().await;
    let roles = api.get(&format!("{RBAC}/clusterroles")).await;
    let names: Vec<&str> =
        roles["items"].as_array().unwrap().iter().filter_map(|r| r["metadata"]["name"].as_str()).collect();
    for name in ["cluster-admin", "admin", "edit", "view", "system:discovery", "system:node", "system:auth-delegator"] {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    let someone = api.with_user(Some(UserInfo::new("someone", &[])));
    for path in ["/api", "/apis", "/openapi/v3", "/version"] {
        someone.get(path).await;
    }
    let nobody = api.with_user(Some(UserInfo::anonymous()));
    nobody.get("/version").await;
    assert_eq!(nobody.fails(Method::GET, "/apis", Value::Null).await.0, 403);
    assert_eq!(someone.fails(Method::GET, "/metrics", Value::Null).await.0, 403);
    // Admin of a cluster without being in the group.
    let admins = binding("boss", "ClusterRole", "cluster-admin", user("boss"));
    api.create(&format!("{RBAC}/clusterrolebindings"), admins).await;
    let boss = api.with_user(Some(UserInfo::new("boss", &[])));
    boss.create(PODS, pod("a")).await;
    let response = boss.raw(Method::GET, "/metrics", &[], "").await;
    assert_eq!(response.status(), StatusCode::OK);
}

#[tokio::test]
async fn nobody_rises_by_themselves() {
    let api = Api::new().await;
    let rules = json!([rule(&["pods"], &["get"]),
        {"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles", "rolebindings", "clusterroles"], "verbs": ["create", "update", "patch", "get"]}]);
    api.create(&format!("{RBAC}/clusterroles"), role("keeper", rules)).await;
    api.create(&format!("{RBAC}/clusterroles"), role("secrets", json!([rule(&["secrets"], &["get"])]))).await;
    api.create(&format!("{RBAC}/clusterrolebindings"), binding("keeper", "ClusterRole", "keeper", user("jane"))).await;
    let jane = api.with_user(Some(UserInfo::new("jane", &[])));
    let (roles, bindings) =
        (format!("{RBAC}/namespaces/default/roles"), format!("{RBAC}/namespaces/default/rolebindings"));
    jane.create(&roles, role("own", json!([rule(&["pods"], &["get"])]))).await;
    let (code, _, message) =
        jane.fails(Method::POST, &roles, role("more", json!([rule(&["pods", "secrets"], &["get"])]))).await;
    assert_eq!(code, 403);
    assert!(message.contains("user \"jane\" (groups=[\"system:authenticated\"]) is attempting to grant RBAC permissions not currently held:"), "{message}");
    assert!(message.contains("{APIGroups:[\"\"], Resources:[\"secrets\"], Verbs:[\"get\"]}"), "{message}");
    // Neither by changing one, nor by binding one, nor by collecting others'.
    let more = json!({"rules": [rule(&["secrets"], &["get"])]});
    assert_eq!(jane.call(Method::PATCH, &format!("{roles}/own"), MERGE, more).await.0, StatusCode::FORBIDDEN);
    jane.create(&bindings, binding("fine", "ClusterRole", "keeper", user("joe"))).await;
    assert_eq!(
        jane.fails(Method::POST, &bindings, binding("not", "ClusterRole", "secrets", user("jane"))).await.0,
        403
    );
    let (code, _, message) = jane.fails(Method::POST, &bindings, binding("not", "Role", "none", user("jane"))).await;
    assert_eq!((code, &*message), (404, "roles.rbac.authorization.k8s.io \"none\" not found"));
    let mut all = role("all", Value::Null);
    all["aggregationRule"] = json!({"clusterRoleSelectors": [{"matchLabels": {"a": "b"}}]});
    assert_eq!(jane.fails(Method::POST, &format!("{RBAC}/clusterroles"), all).await.0, 403);
    // What does not touch the rules is no gift.
    let label = json!({"metadata": {"labels": {"a": "b"}}});
    assert_eq!(jane.call(Method::PATCH, &format!("{RBAC}/clusterroles/secrets"), MERGE, label).await.0, StatusCode::OK);
    // Unless one may: `escalate` and `bind` are verbs of their own.
    let verbs = json!([{"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles"], "verbs": ["escalate"]},
        {"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["clusterroles"], "verbs": ["bind"], "resourceNames": ["secrets"]}]);
    api.create(&format!("{RBAC}/clusterroles"), role("riser", verbs)).await;
    api.create(&format!("{RBAC}/clusterrolebindings"), binding("riser", "ClusterRole", "riser", user("jane"))).await;
    jane.create(&roles, role("more", json!([rule(&["secrets"], &["get"])]))).await;
    jane.create(&bindings, binding("now", "ClusterRole", "secrets", user("jane"))).await;
    let (code, reason, _) = jane.fails(Method::GET, "/api/v1/namespaces/default/secrets/x", Value::Null).await;
    assert_eq!((code, &*reason), (404, "NotFound"), "jane may look");
}

#[tokio::test]
async fn questions_about_permissions() {
    let api = Api::new().await;
    let rules = json!([rule(&["pods"], &["get"]), {"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]);
    api.create(&format!("{RBAC}/clusterroles"), role("reader", rules)).await;
    api.create(&format!("{RBAC}/clusterrolebindings"), binding("reader", "ClusterRole", "reader", user("jane"))).await;
    let ask = json!({"spec": {"user": "jane", "resourceAttributes": {"verb": "get", "resource": "pods"}}});
    let answer = api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", ask).await;
    assert_eq!(
        answer["status"],
        json!({"allowed": true, "reason": "RBAC: allowed by ClusterRoleBinding \"reader\" of ClusterRole \"reader\" to User \"jane\""})
    );
    let jane = api.with_user(Some(UserInfo::new("jane", &[])));
    let ask = json!({"spec": {"resourceAttributes": {"verb": "delete", "resource": "pods"}}});
    let answer = jane.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", ask).await;
    assert_eq!(answer["status"]["allowed"], false);
    let ask = json!({"spec": {"namespace": "default"}});
    let answer = jane.create("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", ask).await;
    let listed = answer["status"]["resourceRules"].as_array().unwrap();
    assert!(listed.iter().any(|rule| rule["resources"] == json!(["pods"])), "{answer}");
    assert!(answer["status"]["nonResourceRules"].to_string().contains("/metrics"), "{answer}");
    assert_eq!(answer["status"]["incomplete"], false);
}

#[tokio::test]
async fn acting_as_somebody_else() {
    let api = Api::new().await;
    let path = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let as_jane = [("impersonate-user", "jane"), ("impersonate-group", "devs"), ("content-type", "application/json")];
    let answer = api.raw(Method::POST, path, &as_jane, "{}").await;
    let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
    let answer: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(answer["status"]["userInfo"]["username"], "jane", "{answer}");
    assert_eq!(answer["status"]["userInfo"]["groups"], json!(["devs", "system:authenticated"]));
    // An administrator who is somebody else has only their rights.
    let answer = api.raw(Method::GET, PODS, &[("impersonate-user", "jane")], "").await;
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    let someone = api.with_user(Some(UserInfo::new("someone", &[])));
    let answer = someone.raw(Method::GET, "/version", &[("impersonate-user", "jane")], "").await;
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    let answer = api.raw(Method::GET, PODS, &[("impersonate-group", "devs")], "").await;
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn others_can_check_tokens() {
    let api = Api::new().await;
    let path = "/api/v1/namespaces/default/serviceaccounts/default/token";
    let made = api.create(path, json!({"spec": {"audiences": ["vault"]}})).await;
    let token = made["status"]["token"].as_str().unwrap();
    // As a stranger does: the document, the key by its id, the signature.
    let account = api.with_user(Some(UserInfo::new("system:serviceaccount:a:b", &["system:serviceaccounts"])));
    let document = account.get("/.well-known/openid-configuration").await;
    assert!(document["jwks_uri"].as_str().unwrap().ends_with("/openid/v1/jwks"), "{document}");
    let keys: jsonwebtoken::jwk::JwkSet = serde_json::from_value(account.get("/openid/v1/jwks").await).unwrap();
    let key = keys.find(&jsonwebtoken::decode_header(token).unwrap().kid.unwrap()).unwrap();
    let mut validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::ES256);
    validation.set_issuer(&[document["issuer"].as_str().unwrap()]);
    validation.set_audience(&["vault"]);
    let decoded = jsonwebtoken::decode::<Value>(token, &jsonwebtoken::DecodingKey::from_jwk(key).unwrap(), &validation);
    assert_eq!(decoded.unwrap().claims["sub"], "system:serviceaccount:default:default");
    let someone = api.with_user(Some(UserInfo::new("someone", &[])));
    assert_eq!(someone.fails(Method::GET, "/openid/v1/jwks", Value::Null).await.0, 403);
}
