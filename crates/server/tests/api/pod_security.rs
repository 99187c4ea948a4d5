//! PodSecurity, through the whole pipeline.

use http::Method;
use serde_json::{Value, json};

use crate::{MERGE, harness::Api, pod};

async fn namespace(api: &Api, name: &str, labels: Value) {
    api.create("/api/v1/namespaces", json!({"metadata": {"name": name, "labels": labels}})).await;
    let accounts = format!("/api/v1/namespaces/{name}/serviceaccounts");
    api.create(&accounts, json!({"metadata": {"name": "default"}})).await;
}

async fn warnings(api: &Api, method: Method, path: &str, kind: &str, body: Value) -> Vec<String> {
    let response = api.raw(method, path, &[("content-type", kind)], body.to_string()).await;
    assert!(response.status().is_success(), "{}", response.status());
    response.headers().get_all("warning").iter().map(|w| w.to_str().unwrap().replace("\\\"", "\"")).collect()
}

#[tokio::test]
async fn levels_of_namespaces() {
    let api = Api::new().await;
    namespace(
        &api,
        "base",
        json!({"pod-security.kubernetes.io/enforce": "baseline", "pod-security.kubernetes.io/warn": "restricted",
        "pod-security.kubernetes.io/warn-version": "v1.30"}),
    )
    .await;
    let pods = "/api/v1/namespaces/base/pods";
    let mut strong = pod("a");
    strong["spec"]["hostNetwork"] = true.into();
    strong["spec"]["containers"][0]["securityContext"] = json!({"privileged": true});
    let (code, reason, message) = api.fails(Method::POST, pods, strong.clone()).await;
    assert_eq!((code, &*reason), (403, "Forbidden"));
    assert_eq!(
        message,
        "pods \"a\" is forbidden: violates PodSecurity \"baseline:latest\": host namespaces (hostNetwork=true), \
         privileged (container \"c\" must not set securityContext.privileged=true)"
    );
    let found = warnings(&api, Method::POST, pods, "application/json", pod("b")).await;
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].contains(
            "would violate PodSecurity \"restricted:v1.30\": allowPrivilegeEscalation != false (container \"c\""
        ),
        "{found:?}"
    );
    // A template is warned of, and its pods are refused.
    let deployment = json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": strong["spec"]}}});
    let path = "/apis/apps/v1/namespaces/base/deployments";
    let found = warnings(&api, Method::POST, path, "application/json", deployment).await;
    assert!(found[0].contains("host namespaces (hostNetwork=true)"), "{found:?}");
    // A debug container counts as well.
    let debug = json!({"spec": {"ephemeralContainers": [{"name": "d", "image": "i", "securityContext": {"privileged": true}}]}});
    let path = format!("{pods}/b/ephemeralcontainers");
    let (status, value) = api.call(Method::PATCH, &path, "application/strategic-merge-patch+json", debug).await;
    assert_eq!(status.as_u16(), 403, "{value}");
    // Elsewhere nothing is asked for.
    api.create(crate::PODS, strong).await;
}

#[tokio::test]
async fn labels_that_say_nothing_and_pods_that_are_there() {
    let api = Api::new().await;
    let bad = json!({"metadata": {"name": "bad", "labels": {"pod-security.kubernetes.io/enforce": "strict"}}});
    let (code, _, message) = api.fails(Method::POST, "/api/v1/namespaces", bad).await;
    assert_eq!(code, 422);
    assert!(
        message.ends_with("metadata.labels[pod-security.kubernetes.io/enforce]: Invalid value: \"strict\": must be one of privileged, baseline, restricted"),
        "{message}"
    );
    let mut strong = pod("a");
    strong["spec"]["hostPID"] = true.into();
    api.create(crate::PODS, strong).await;
    let labels = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "baseline"}}});
    let found = warnings(&api, Method::PATCH, "/api/v1/namespaces/default", MERGE, labels).await;
    assert!(
        found[0].contains(
            "existing pods in namespace \"default\" violate the new PodSecurity enforce level \"baseline:latest\""
        ),
        "{found:?}"
    );
    assert!(found[1].contains("a: host namespaces"), "{found:?}");
    // It is in force at once.
    assert_eq!(
        api.fails(
            Method::POST,
            crate::PODS,
            json!({"metadata": {"name": "b"}, "spec": {"hostIPC": true,
        "containers": [{"name": "c", "image": "i"}]}})
        )
        .await
        .0,
        403
    );
}
