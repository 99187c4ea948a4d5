//! LimitRanges and ResourceQuotas, through the whole pipeline.

use futures::future::join_all;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{MAPS, MERGE, PODS, harness::Api, map, pod};

const QUOTAS: &str = "/api/v1/namespaces/default/resourcequotas";
const RANGES: &str = "/api/v1/namespaces/default/limitranges";

async fn quota(api: &Api, name: &str, spec: Value) {
    api.create(QUOTAS, json!({"metadata": {"name": name}, "spec": spec})).await;
}

async fn used(api: &Api, name: &str) -> Value {
    api.get(&format!("{QUOTAS}/{name}")).await["status"]["used"].clone()
}

#[tokio::test]
async fn many_at_once_never_take_more_than_there_is() {
    let api = Api::new().await;
    quota(&api, "q", json!({"hard": {"configmaps": "7", "count/secrets": "3"}})).await;
    let make = |n: usize| {
        let api = &api;
        async move {
            let body = map(&format!("m{n}"), json!({}));
            api.call(Method::POST, MAPS, "application/json", body).await.0
        }
    };
    let all = join_all((0..32).map(make)).await;
    assert_eq!(all.iter().filter(|status| **status == StatusCode::CREATED).count(), 7, "{all:?}");
    assert!(all.iter().all(|s| matches!(*s, StatusCode::CREATED | StatusCode::FORBIDDEN)), "{all:?}");
    assert_eq!(used(&api, "q").await, json!({"configmaps": "7", "count/secrets": "0"}));
    let (code, reason, message) = api.fails(Method::POST, MAPS, map("x", json!({}))).await;
    assert_eq!((code, &*reason), (403, "Forbidden"));
    assert_eq!(
        message,
        "configmaps \"x\" is forbidden: exceeded quota: q, requested: configmaps=1, used: configmaps=7, limited: configmaps=7"
    );
    // A dry run is told the same, and takes nothing.
    assert_eq!(api.fails(Method::POST, &format!("{MAPS}?dryRun=All"), map("x", json!({}))).await.0, 403);
    // What goes is free again at once; a name that is taken takes nothing.
    let there = api.get(MAPS).await["items"][0]["metadata"]["name"].as_str().unwrap().to_owned();
    api.call(Method::DELETE, &format!("{MAPS}/{there}"), "", Value::Null).await;
    assert_eq!(used(&api, "q").await["configmaps"], "6");
    api.create(&format!("{MAPS}?dryRun=All"), map("x", json!({}))).await;
    assert_eq!(used(&api, "q").await["configmaps"], "6");
    let other = api.get(MAPS).await["items"][0]["metadata"]["name"].as_str().unwrap().to_owned();
    assert_eq!(api.fails(Method::POST, MAPS, map(&other, json!({}))).await.1, "AlreadyExists");
    assert_eq!(used(&api, "q").await["configmaps"], "6");
    // Deleting and creating at the same time keeps count.
    let turn = |n: usize| {
        let api = &api;
        async move {
            let name = format!("t{n}");
            if api.call(Method::POST, MAPS, "application/json", map(&name, json!({}))).await.0.is_success() {
                api.call(Method::DELETE, &format!("{MAPS}/{name}"), "", Value::Null).await;
            }
        }
    };
    join_all((0..32).map(turn)).await;
    assert_eq!(used(&api, "q").await["configmaps"], "6");
    assert_eq!(api.get(MAPS).await["items"].as_array().unwrap().len(), 6);
}

#[tokio::test]
async fn what_pods_take() {
    let api = Api::new().await;
    api.create(PODS, pod("before")).await;
    quota(&api, "q", json!({"hard": {"pods": "3", "requests.cpu": "1", "limits.memory": "1Gi"}})).await;
    let sized = |name: &str, cpu: &str| {
        let mut pod = pod(name);
        pod["spec"]["containers"][0]["resources"] =
            json!({"requests": {"cpu": cpu}, "limits": {"memory": "256Mi", "cpu": "2"}});
        pod
    };
    let message = api.fails(Method::POST, PODS, pod("a")).await.2;
    assert_eq!(
        message,
        "pods \"a\" is forbidden: failed quota: q: must specify limits.memory for: c; requests.cpu for: c"
    );
    api.create(PODS, sized("a", "600m")).await;
    // What was there before counts.
    assert_eq!(used(&api, "q").await, json!({"pods": "2", "requests.cpu": "600m", "limits.memory": "256Mi"}));
    let message = api.fails(Method::POST, PODS, sized("b", "500m")).await.2;
    assert!(
        message.ends_with(
            "exceeded quota: q, requested: requests.cpu=500m, used: requests.cpu=600m, limited: requests.cpu=1"
        ),
        "{message}"
    );
    // A pod that is over takes nothing any more.
    let over = json!({"status": {"phase": "Succeeded"}});
    api.call(Method::PATCH, &format!("{PODS}/a/status"), MERGE, over).await;
    assert_eq!(used(&api, "q").await, json!({"pods": "1", "requests.cpu": "0", "limits.memory": "0"}));
    api.create(PODS, sized("b", "500m")).await;
    // Of pods in a scope only.
    quota(&api, "best", json!({"hard": {"pods": "1"}, "scopes": ["BestEffort"]})).await;
    api.create(PODS, sized("c", "100m")).await;
    assert_eq!(used(&api, "best").await, Value::Null);
}

#[tokio::test]
async fn limit_ranges() {
    let api = Api::new().await;
    let range = json!({"metadata": {"name": "r"}, "spec": {"limits": [
        {"type": "Container", "max": {"memory": "1Gi"}, "default": {"memory": "512Mi"}, "defaultRequest": {"cpu": "100m"}},
        {"type": "PersistentVolumeClaim", "max": {"storage": "5Gi"}},
    ]}});
    let made = api.create(RANGES, range).await;
    assert_eq!(made["spec"]["limits"][0]["defaultRequest"], json!({"cpu": "100m", "memory": "512Mi"}));
    let pod_made = api.create(PODS, pod("a")).await;
    assert_eq!(
        pod_made["spec"]["containers"][0]["resources"],
        json!({"limits": {"memory": "512Mi"}, "requests": {"cpu": "100m", "memory": "512Mi"}})
    );
    assert_eq!(
        pod_made["metadata"]["annotations"]["kubernetes.io/limit-ranger"],
        "LimitRanger plugin set: cpu, memory request for container c; memory limit for container c"
    );
    let mut large = pod("b");
    large["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "2Gi"}});
    assert_eq!(
        api.fails(Method::POST, PODS, large).await.2,
        "pods \"b\" is forbidden: maximum memory usage per Container is 1Gi, but limit is 2Gi"
    );
    let claim = json!({"metadata": {"name": "c"}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "9Gi"}}}});
    assert_eq!(
        api.fails(Method::POST, "/api/v1/namespaces/default/persistentvolumeclaims", claim).await.2,
        "persistentvolumeclaims \"c\" is forbidden: maximum storage usage per PersistentVolumeClaim is 5Gi, but request is 9Gi"
    );
    let wrong = json!({"metadata": {"name": "w"}, "spec": {"limits": [{"type": "Container", "min": {"cpu": "2"}, "max": {"cpu": "1"}}]}});
    assert!(api.fails(Method::POST, RANGES, wrong).await.2.contains("min value 2 is greater than max value 1"));
}

#[tokio::test]
async fn default_classes() {
    let api = Api::new().await;
    let mark = "storageclass.kubernetes.io/is-default-class";
    let class = json!({"metadata": {"name": "gold", "annotations": {mark: "true"}}, "provisioner": "example.com/p"});
    api.create("/apis/storage.k8s.io/v1/storageclasses", class).await;
    let claim = json!({"metadata": {"name": "c"}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}});
    let made = api.create("/api/v1/namespaces/default/persistentvolumeclaims", claim).await;
    assert_eq!(made["spec"]["storageClassName"], "gold");
    let class = json!({"metadata": {"name": "heavy"}, "handler": "h", "overhead": {"podFixed": {"memory": "64Mi"}},
        "scheduling": {"nodeSelector": {"heavy": "yes"}}});
    api.create("/apis/node.k8s.io/v1/runtimeclasses", class).await;
    let mut with = pod("a");
    with["spec"]["runtimeClassName"] = "heavy".into();
    let made = api.create(PODS, with).await;
    assert_eq!(made["spec"]["overhead"], json!({"memory": "64Mi"}));
    assert_eq!(made["spec"]["nodeSelector"], json!({"heavy": "yes"}));
    let mut without = pod("b");
    without["spec"]["runtimeClassName"] = "none".into();
    assert_eq!(
        api.fails(Method::POST, PODS, without).await.2,
        "pods \"b\" is forbidden: pod rejected: RuntimeClass \"none\" not found"
    );
}
