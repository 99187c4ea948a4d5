//! `metrics.k8s.io`, where no node answers and where somebody else has registered for it; how it is with real agents is
//! tested from end to end.

use http::{Method, StatusCode};
use seawall_server::auth::UserInfo;
use serde_json::{Value, json};

use crate::harness::Api;

const NODES: &str = "/apis/metrics.k8s.io/v1beta1/nodes";
const PODS: &str = "/apis/metrics.k8s.io/v1beta1/namespaces/default/pods";

async fn groups(api: &Api) -> Vec<String> {
    let (_, list) = api.call(Method::GET, "/apis", "", Value::Null).await;
    list["groups"].as_array().unwrap().iter().map(|g| g["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn without_agents_there_are_no_metrics() {
    let api = Api::new().await;
    assert!(groups(&api).await.contains(&"metrics.k8s.io".to_owned()));
    let (status, resources) = api.call(Method::GET, "/apis/metrics.k8s.io/v1beta1", "", Value::Null).await;
    assert_eq!((status, &resources["resources"][1]["kind"]), (StatusCode::OK, &json!("PodMetrics")));
    let node = json!({"metadata": {"name": "n"}, "status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 1}}}});
    api.create("/api/v1/nodes", node).await;
    for (path, kind) in [(NODES, "NodeMetricsList"), (PODS, "PodMetricsList")] {
        let (status, list) = api.call(Method::GET, path, "", Value::Null).await;
        assert_eq!((status, &list["kind"], &list["items"]), (StatusCode::OK, &json!(kind), &json!([])), "{list}");
    }
    let not_found = |what: &str| (404, "NotFound".to_owned(), what.to_owned());
    let fails = async |method: Method, path: &str| api.fails(method, path, Value::Null).await;
    let expect = not_found("nodemetrics.metrics.k8s.io \"n\" not found");
    assert_eq!(fails(Method::GET, &format!("{NODES}/n")).await, expect);
    let expect = not_found("podmetrics.metrics.k8s.io \"default/p\" not found");
    assert_eq!(fails(Method::GET, &format!("{PODS}/p")).await, expect);
    assert_eq!(fails(Method::GET, "/apis/metrics.k8s.io/v1beta1/services").await.0, 404);
    assert_eq!(fails(Method::GET, "/apis/metrics.k8s.io/v1/nodes").await.0, 404);
    assert_eq!(fails(Method::GET, "/apis/metrics.k8s.io/v1beta1/namespaces/default/nodes").await.0, 404);
    assert_eq!(fails(Method::GET, &format!("{NODES}?watch=true")).await.0, 405);
    assert_eq!(fails(Method::DELETE, &format!("{NODES}/n")).await.0, 405);
    assert_eq!(fails(Method::GET, &format!("{NODES}?labelSelector=a%20b%20c")).await.0, 400);
    let somebody = api.with_user(Some(UserInfo::new("somebody", &[])));
    assert_eq!(somebody.fails(Method::GET, NODES, Value::Null).await.0, 403);
}

#[tokio::test]
async fn who_registers_for_them_serves_them() {
    let api = Api::new().await;
    let service = json!({"metadata": {"name": "v1beta1.metrics.k8s.io"}, "spec": {"group": "metrics.k8s.io",
        "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100, "insecureSkipTLSVerify": true,
        "service": {"namespace": "default", "name": "none"}}});
    api.create("/apis/apiregistration.k8s.io/v1/apiservices", service).await;
    assert_eq!(api.fails(Method::GET, NODES, Value::Null).await.0, 503);
    let named = groups(&api).await;
    assert_eq!(named.iter().filter(|name| *name == "metrics.k8s.io").count(), 1, "{named:?}");
}
