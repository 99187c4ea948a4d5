//! Nodes are confined to what is theirs.

use std::time::Duration;

use serde_json::{Value, json};

use super::harness::{Answer, Api, message, node};

const NS: &str = "/api/v1/namespaces/default";

/// Nodes `a` and `b`, and a pod on `a` that refers to one thing of each sort; everything is there twice.
async fn cluster() -> Api {
    let api = Api::new().await;
    for name in ["mine", "other"] {
        api.create(&format!("{NS}/secrets"), json!({"metadata": {"name": name}})).await;
        api.create(&format!("{NS}/configmaps"), json!({"metadata": {"name": name}})).await;
        api.create(&format!("{NS}/serviceaccounts"), json!({"metadata": {"name": name}})).await;
        let spec = json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}, "volumeName": name});
        api.create(&format!("{NS}/persistentvolumeclaims"), json!({"metadata": {"name": name}, "spec": spec})).await;
        let spec = json!({"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "hostPath": {"path": "/x"},
            "claimRef": {"namespace": "default", "name": name}});
        api.create("/api/v1/persistentvolumes", json!({"metadata": {"name": name}, "spec": spec})).await;
    }
    for name in ["a", "b"] {
        let made = api.call(&node(name), "POST", "/api/v1/nodes", json!({"metadata": {"name": name}})).await;
        assert_eq!(made.0, 201, "{}", made.1);
    }
    let spec = json!({"nodeName": "a", "serviceAccountName": "mine", "automountServiceAccountToken": false,
        "containers": [{"name": "c", "image": "i", "envFrom": [{"configMapRef": {"name": "mine"}}]}],
        "volumes": [{"name": "s", "secret": {"secretName": "mine"}}, {"name": "v", "persistentVolumeClaim": {"claimName": "mine"}}]});
    api.create(&format!("{NS}/pods"), json!({"metadata": {"name": "on-a"}, "spec": spec})).await;
    let spec = json!({"nodeName": "b", "serviceAccountName": "other", "containers": [{"name": "c", "image": "i"}]});
    api.create(&format!("{NS}/pods"), json!({"metadata": {"name": "on-b"}, "spec": spec})).await;
    // The authorizer reads the cache, which hears of a write a moment later.
    until(async || api.call(&node("b"), "GET", &format!("{NS}/pods/on-b"), Value::Null).await.0 == 200).await;
    api
}

async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "the cache does not hear of it");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn refused(answer: &Answer, expect: &str) {
    assert_eq!(answer.0, 403, "{}", answer.1);
    assert!(message(answer).ends_with(expect), "{} does not end with {expect}", message(answer));
}

#[tokio::test]
async fn a_node_reads_what_its_pods_refer_to() {
    let api = cluster().await;
    let check = async |name: &str, method: &str, path: &str, expect: u16| {
        let (code, value) = api.call(&node(name), method, path, Value::Null).await;
        assert_eq!(code, expect, "{name} {method} {path}: {value}");
    };
    for kind in ["secrets", "configmaps"] {
        check("a", "GET", &format!("{NS}/{kind}/mine"), 200).await;
        check("a", "GET", &format!("{NS}/{kind}?fieldSelector=metadata.name%3Dmine"), 200).await;
        check("a", "GET", &format!("{NS}/{kind}?watch=1&fieldSelector=metadata.name%3Dmine"), 200).await;
        check("a", "GET", &format!("{NS}/{kind}/other"), 403).await;
        check("a", "GET", &format!("{NS}/{kind}"), 403).await;
        check("a", "GET", &format!("/api/v1/{kind}"), 403).await;
        check("a", "GET", &format!("{NS}/{kind}?watch=1"), 403).await;
        check("a", "GET", &format!("{NS}/{kind}?fieldSelector=metadata.name%3Dother"), 403).await;
        check("a", "GET", &format!("{NS}/{kind}?fieldSelector=metadata.name!%3Dother"), 403).await;
        check("a", "DELETE", &format!("{NS}/{kind}/mine"), 403).await;
        check("b", "GET", &format!("{NS}/{kind}/mine"), 403).await;
        check("c", "GET", &format!("{NS}/{kind}/mine"), 403).await;
    }
    // The key of the gossip is every node's to read, and nothing else of its kind.
    let system = "/api/v1/namespaces/kube-system/secrets";
    for (path, name) in
        [(system, "seawall-gossip"), (system, "seawall-gossip-2"), (&format!("{NS}/secrets"), "seawall-gossip")]
    {
        api.create(path, json!({"metadata": {"name": name}})).await;
    }
    check("b", "GET", &format!("{system}/seawall-gossip"), 200).await;
    check("b", "GET", &format!("{system}?watch=1&fieldSelector=metadata.name%3Dseawall-gossip"), 200).await;
    check("b", "GET", system, 403).await;
    check("b", "GET", &format!("{system}/seawall-gossip-2"), 403).await;
    check("b", "GET", &format!("{NS}/secrets/seawall-gossip"), 403).await;
    check("b", "PUT", &format!("{system}/seawall-gossip"), 403).await;
    check("b", "DELETE", &format!("{system}/seawall-gossip"), 403).await;
    check("a", "GET", &format!("{NS}/persistentvolumeclaims/mine"), 200).await;
    check("a", "GET", &format!("{NS}/persistentvolumeclaims/other"), 403).await;
    check("a", "GET", "/api/v1/persistentvolumes/mine", 200).await;
    check("a", "GET", "/api/v1/persistentvolumes/other", 403).await;
    check("b", "GET", "/api/v1/persistentvolumes/mine", 403).await;
    // Volumes that nobody has bound: the claim names them.
    let spec = json!({"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "hostPath": {"path": "/x"}});
    for (volume, claim) in [("free", "by-name"), ("free-2", "by-nobody")] {
        let volume_spec = json!({"metadata": {"name": volume}, "spec": spec});
        api.create("/api/v1/persistentvolumes", volume_spec).await;
        let spec = json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}, "volumeName": volume});
        api.create(&format!("{NS}/persistentvolumeclaims"), json!({"metadata": {"name": claim}, "spec": spec})).await;
    }
    let spec = json!({"nodeName": "a", "containers": [{"name": "c", "image": "i"}],
        "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "by-name"}}]});
    api.create(&format!("{NS}/pods"), json!({"metadata": {"name": "claims"}, "spec": spec})).await;
    until(async || api.call(&node("a"), "GET", &format!("{NS}/pods/claims"), Value::Null).await.0 == 200).await;
    check("a", "GET", "/api/v1/persistentvolumes/free", 200).await;
    check("b", "GET", "/api/v1/persistentvolumes/free", 403).await;
    check("a", "GET", "/api/v1/persistentvolumes/free-2", 403).await;
    check("a", "GET", &format!("{NS}/pods/on-a"), 200).await;
    check("a", "GET", &format!("{NS}/pods/on-b"), 403).await;
    // Those of others as well: policies mean pods by their labels, wherever they are.
    check("a", "GET", "/api/v1/pods", 200).await;
    check("a", "GET", "/api/v1/pods?fieldSelector=spec.nodeName%3Da", 200).await;
    check("a", "GET", "/api/v1/pods?watch=1&fieldSelector=spec.nodeName%3Da", 200).await;
    check("a", "GET", "/api/v1/pods?watch=1", 200).await;
    check("a", "GET", "/apis/networking.k8s.io/v1/networkpolicies", 200).await;
    check("a", "GET", "/api/v1/namespaces/default", 200).await;
    check("a", "DELETE", "/api/v1/namespaces/default", 403).await;
    for path in
        ["/api/v1/nodes", "/api/v1/namespaces", "/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices", "/api"]
    {
        check("a", "GET", path, 200).await;
    }
    for path in ["/apis/apps/v1/deployments", "/api/v1/events", "/metrics"] {
        check("a", "GET", path, 403).await;
    }
    check("a", "GET", &format!("{NS}/pods/on-a/log"), 403).await;
    check("a", "POST", &format!("{NS}/pods/on-a/exec?command=id"), 403).await;
    let answer = api.call(&node("b"), "GET", &format!("{NS}/secrets/mine"), Value::Null).await;
    assert_eq!(
        message(&answer),
        "secrets \"mine\" is forbidden: User \"system:node:b\" cannot get resource \"secrets\" in API group \"\" in the \
         namespace \"default\": no relationship found between node 'b' and this object"
    );
    // The right ends with the pod.
    api.admin("DELETE", &format!("{NS}/pods/on-a?gracePeriodSeconds=0"), Value::Null).await;
    until(async || api.call(&node("a"), "GET", &format!("{NS}/secrets/mine"), Value::Null).await.0 == 403).await;
}

#[tokio::test]
async fn a_node_writes_what_is_its_own() {
    let api = cluster().await;
    let (a, b) = (node("a"), node("b"));
    // Its Node.
    let patch = |user, path: &'static str, body: Value| api.patch(user, path, body);
    assert_eq!(patch(&a, "/api/v1/nodes/a", json!({"metadata": {"labels": {"disk": "ssd"}}})).await.0, 200);
    let status = json!({"status": {"addresses": [{"type": "Hostname", "address": "a"}]}});
    assert_eq!(patch(&a, "/api/v1/nodes/a/status", status.clone()).await.0, 200);
    refused(&patch(&a, "/api/v1/nodes/b", json!({})).await, "node \"a\" is not allowed to modify node \"b\"");
    refused(&patch(&a, "/api/v1/nodes/b/status", status).await, "node \"a\" is not allowed to modify node \"b\"");
    let made = api.call(&a, "POST", "/api/v1/nodes", json!({"metadata": {"name": "c"}})).await;
    refused(&made, "node \"a\" is not allowed to modify node \"c\"");
    let role = json!({"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}});
    refused(
        &patch(&a, "/api/v1/nodes/a", role.clone()).await,
        "is not allowed to modify labels: node-role.kubernetes.io/control-plane",
    );
    refused(
        &patch(&a, "/api/v1/nodes/a/status", role).await,
        "is not allowed to modify labels: node-role.kubernetes.io/control-plane",
    );
    let taints = json!({"spec": {"taints": [{"key": "x", "effect": "NoSchedule"}]}});
    refused(&patch(&a, "/api/v1/nodes/a", taints).await, "node \"a\" is not allowed to modify taints");
    assert_eq!(api.call(&a, "DELETE", "/api/v1/nodes/a", Value::Null).await.0, 403);

    // Its Lease.
    const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    let lease = |name: &str| json!({"metadata": {"name": name}, "spec": {"holderIdentity": name}});
    assert_eq!(api.call(&a, "POST", LEASES, lease("a")).await.0, 201);
    let own = "can only access node lease with the same name as the requesting node";
    refused(&api.call(&a, "POST", LEASES, lease("b")).await, own);
    assert_eq!(api.patch(&a, &format!("{LEASES}/a"), json!({"spec": {"leaseDurationSeconds": 40}})).await.0, 200);
    refused(&api.patch(&b, &format!("{LEASES}/a"), json!({})).await, own);
    let elsewhere = LEASES.replace("kube-node-lease", "default");
    refused(
        &api.call(&a, "POST", &elsewhere, lease("a")).await,
        "can only access leases in the \"kube-node-lease\" system namespace",
    );

    // The status of its pods.
    let running = json!({"status": {"phase": "Running"}});
    assert_eq!(api.patch(&a, &format!("{NS}/pods/on-a/status"), running.clone()).await.0, 200);
    let expect = "node \"a\" can only update pod status for pods with spec.nodeName set to itself";
    refused(&api.patch(&a, &format!("{NS}/pods/on-b/status"), running).await, expect);
    let labels = json!({"metadata": {"labels": {"app": "web"}}});
    let expect = "node \"a\" cannot update labels through pod status";
    refused(&api.patch(&a, &format!("{NS}/pods/on-a/status"), labels.clone()).await, expect);
    assert_eq!(api.patch(&a, &format!("{NS}/pods/on-a"), labels).await.0, 403);

    // Pods that mirror its own.
    let plain =
        json!({"metadata": {"name": "m"}, "spec": {"nodeName": "a", "containers": [{"name": "c", "image": "i"}]}});
    let expect = "pod does not have \"kubernetes.io/config.mirror\" annotation, node \"a\" can only create mirror pods";
    refused(&api.call(&a, "POST", &format!("{NS}/pods"), plain.clone()).await, expect);
    let (_, object) = api.call(&a, "GET", "/api/v1/nodes/a", Value::Null).await;
    let mut mirror = plain;
    mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "hash"});
    mirror["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "Node", "name": "a",
        "uid": object["metadata"]["uid"], "controller": true}]);
    let made = api.call(&a, "POST", &format!("{NS}/pods"), mirror.clone()).await;
    assert_eq!(made.0, 201, "{}", made.1);
    mirror["metadata"]["name"] = "m2".into();
    mirror["metadata"]["ownerReferences"][0]["uid"] = "another".into();
    let made = api.call(&a, "POST", &format!("{NS}/pods"), mirror).await;
    assert_eq!(made.0, 403, "{}", made.1);

    // Tokens for its pods.
    let (_, pod) = api.call(&a, "GET", &format!("{NS}/pods/on-a"), Value::Null).await;
    let request = |uid: &Value, name: &str| json!({"spec": {"audiences": [], "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}}});
    let token = async |user, account: &str, body: Value| {
        api.call(user, "POST", &format!("{NS}/serviceaccounts/{account}/token"), body).await
    };
    let good = request(&pod["metadata"]["uid"], "on-a");
    assert_eq!(token(&a, "mine", good.clone()).await.0, 201);
    refused(&token(&a, "mine", json!({"spec": {"audiences": []}})).await, "node requested token not bound to a pod");
    refused(
        &token(&a, "mine", request(&Value::Null, "on-a")).await,
        "node requested token with a pod binding without a uid",
    );
    refused(&token(&a, "other", good.clone()).await, "no relationship found between node 'a' and this object");
    refused(&token(&b, "mine", good).await, "no relationship found between node 'b' and this object");
    // An account that pods on both nodes use; the pod is on the other one.
    let spec = json!({"nodeName": "b", "serviceAccountName": "mine", "containers": [{"name": "c", "image": "i"}]});
    let shared = api.create(&format!("{NS}/pods"), json!({"metadata": {"name": "on-b-2"}, "spec": spec})).await;
    let body = request(&shared["metadata"]["uid"], "on-b-2");
    refused(&token(&a, "mine", body).await, "node requested token bound to a pod scheduled on a different node");

    // Evictions and deletions of its pods.
    let evict = async |user, name: &str| api.call(user, "POST", &format!("{NS}/pods/{name}/eviction"), json!({})).await;
    refused(&evict(&a, "on-b").await, "node a can only evict pods with spec.nodeName set to itself");
    assert_eq!(evict(&b, "on-b").await.0, 201);
    let expect = "node \"b\" can only delete pods with spec.nodeName set to itself";
    refused(&api.call(&b, "DELETE", &format!("{NS}/pods/on-a"), Value::Null).await, expect);
    assert_eq!(api.call(&a, "DELETE", &format!("{NS}/pods/on-a"), Value::Null).await.0, 200);
    assert_eq!(api.call(&a, "DELETE", &format!("{NS}/pods"), Value::Null).await.0, 403);

    // Events about anything.
    let event =
        json!({"metadata": {"name": "e"}, "involvedObject": {"namespace": "default"}, "reason": "R", "source": {}});
    assert_eq!(api.call(&a, "POST", &format!("{NS}/events"), event).await.0, 201);
}

#[tokio::test]
async fn a_review_says_what_a_node_may() {
    let api = cluster().await;
    let ask = async |attributes: Value| {
        let spec = json!({"user": "system:node:a", "groups": ["system:nodes"], "resourceAttributes": attributes});
        let review = api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", json!({"spec": spec})).await;
        review["status"].clone()
    };
    let selector = json!({"rawSelector": "spec.nodeName=a"});
    let pods = json!({"verb": "list", "resource": "pods", "fieldSelector": selector});
    assert_eq!(ask(pods).await, json!({"allowed": true}));
    let no = json!({"allowed": false, "reason": "No Object name found"});
    assert_eq!(ask(json!({"verb": "list", "resource": "secrets", "namespace": "default"})).await, no);
}
