//! The machine goes down: pods are unready at once, end when nobody is led to them any more, and in order.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::{path::Path, time::Duration};

use common::{Cluster, condition, until};
use k8s_openapi::api::{core::v1::Node, discovery::v1::EndpointSlice, scheduling::v1::PriorityClass};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use seawall_node::{
    cri::Cri,
    shutdown::{Config, Handle, MESSAGE, NODE_MESSAGE, REFUSED_MESSAGE, plan::Graces, sequence::Times},
};
use serde_json::{Value, json};
use tokio::time::Instant;

/// A pod that writes down how it ends.
fn pod(directory: &Path, name: &str, priority: &str, grace: u64, on_term: &str) -> Value {
    let script = format!("trap 'echo {name} >> /shared/log; {on_term}' TERM; while :; do sleep 0.1; done");
    let mut pod = json!({"terminationGracePeriodSeconds": grace,
        "containers": [{"name": "c", "command": ["sh", "-c", script],
            "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", format!("echo before {name} >> /shared/log")]}}},
            "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}],
        "volumes": [{"name": "shared", "hostPath": {"path": directory}}]});
    if !priority.is_empty() {
        pod["priorityClassName"] = priority.into();
    }
    pod
}

fn handle() -> std::sync::Arc<Handle> {
    let time = |text: &str| text.strip_suffix('s')?.parse().ok().map(Duration::from_secs);
    let graces = Graces::by_priority("0=4s,1000=20s", time).unwrap();
    let times = Times { settle: Duration::from_secs(30), proxies: Duration::from_millis(300) };
    Handle::new(Config { graces, times, ..Config::default() })
}

async fn node(cluster: &Cluster) -> Value {
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    serde_json::to_value(nodes.get(&cluster.config.node_name).await.unwrap()).unwrap()
}

fn container(pod: &Value) -> String {
    pod["status"]["containerStatuses"][0]["containerID"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_leave_in_order() {
    let first = handle();
    let mut cluster = Cluster::start_with(|config| config.shutdown = first.clone()).await;
    let shared = tempfile::tempdir().unwrap();
    let log = || std::fs::read_to_string(shared.path().join("log")).unwrap_or_default();
    let classes: Api<PriorityClass> = Api::all(cluster.client.clone());
    let class = json!({"metadata": {"name": "important"}, "value": 1000});
    classes.create(&PostParams::default(), &serde_json::from_value(class).unwrap()).await.unwrap();
    cluster.create("web", pod(shared.path(), "web", "", 10, "sleep 0.5; echo gone >> /shared/log; exit 0")).await;
    cluster.create("deaf", pod(shared.path(), "deaf", "", 600, ":")).await;
    cluster.create("store", pod(shared.path(), "store", "important", 10, "exit 0")).await;
    cluster.create("evicted", pod(shared.path(), "evicted", "important", 10, "exit 0")).await;
    let all = ["web", "deaf", "store", "evicted"];
    for name in all {
        cluster.ready(name).await;
    }

    // An agent that is started again leaves all as it is.
    let before = container(&cluster.json("web").await);
    cluster.stop_agent().await;
    cluster.start_agent();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let web = cluster.ready("web").await;
    assert_eq!((container(&web), log().as_str()), (before.clone(), ""));

    // What the controller would write.
    let slices: Api<EndpointSlice> = Api::namespaced(cluster.client.clone(), "default");
    let slice = |ready: bool| {
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "web"},
            "addressType": "IPv4", "ports": [],
            "endpoints": [{"addresses": [web["status"]["podIP"]], "nodeName": cluster.config.node_name,
                "conditions": {"ready": ready, "serving": ready, "terminating": false},
                "targetRef": {"kind": "Pod", "name": "web", "namespace": "default", "uid": web["metadata"]["uid"]}}]})
    };
    slices.create(&PostParams::default(), &serde_json::from_value(slice(true)).unwrap()).await.unwrap();

    // Called off before anything has ended.
    first.begin();
    for name in all {
        let pod = cluster.wait(name, "unready", |p| condition(p, "Ready") == "False").await;
        assert_eq!((condition(&pod, "ContainersReady"), &pod["status"]["phase"]), ("False", &json!("Running")));
    }
    until("the node says so", async || condition(&node(&cluster).await, "Ready") == "False").await;
    let said = node(&cluster).await;
    let ready = said["status"]["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap().clone();
    assert_eq!((&ready["reason"], &ready["message"]), (&json!("KubeletNotReady"), &json!(NODE_MESSAGE)));
    first.cancel();
    for name in all {
        cluster.ready(name).await;
    }
    until("the node is ready", async || condition(&node(&cluster).await, "Ready") == "True").await;
    assert_eq!((container(&cluster.json("web").await), log().as_str()), (before, ""));

    // And now in earnest.
    first.begin();
    cluster.wait("web", "unready", |p| condition(p, "Ready") == "False").await;
    cluster.create("late", pod(shared.path(), "late", "important", 10, "exit 0")).await;
    let late = cluster.wait("late", "refused", |p| p["status"]["phase"] == "Failed").await;
    assert_eq!(
        (&late["status"]["reason"], &late["status"]["message"]),
        (&json!("NodeShutdown"), &json!(REFUSED_MESSAGE))
    );
    // Whoever is evicted from a node that is not ready does not go before its turn.
    cluster.pods().delete("evicted", &DeleteParams::default()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(log(), "", "a Service leads to a pod of this node still");
    std::fs::write(shared.path().join("log"), "slices\n").unwrap();
    let began = Instant::now();
    slices.patch("web", &PatchParams::default(), &Patch::Merge(&slice(false))).await.unwrap();
    assert!(first.over().await, "all is over in time");
    let took = began.elapsed();
    println!("{took:?}:\n{}", log());
    assert!(took >= Duration::from_secs(4), "one of them did not end by itself");
    assert!(took < Duration::from_secs(20), "and what is left of the others' time is not waited for");
    let lines: Vec<String> = log().lines().map(str::to_owned).collect();
    let at = |line: &str| lines.iter().position(|l| l == line).unwrap_or_else(|| panic!("no {line:?} in {lines:?}"));
    assert_eq!(at("slices"), 0);
    assert!(at("before web") < at("web") && at("web") < at("gone"));
    for name in ["store", "evicted"] {
        assert!(at(&format!("before {name}")) > at("gone").max(at("deaf")), "{lines:?}");
        assert!(at(name) > at(&format!("before {name}")));
    }
    for name in ["web", "deaf", "store"] {
        let pod = cluster.json(name).await;
        let status = &pod["status"];
        assert_eq!(
            (&status["phase"], &status["reason"], &status["message"]),
            (&json!("Failed"), &json!("Terminated"), &json!(MESSAGE)),
            "{name}"
        );
        let why = status["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "DisruptionTarget").unwrap();
        assert_eq!(
            (&why["status"], &why["reason"], &why["message"]),
            (&json!("True"), &json!("TerminationByKubelet"), &json!(MESSAGE))
        );
        assert!(!status["containerStatuses"][0]["state"]["terminated"].is_null(), "{status}");
    }
    let deaf = cluster.json("deaf").await;
    assert_eq!(deaf["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 137);
    assert!(cluster.pods().get_opt("evicted").await.unwrap().is_none());
    let cri = Cri::connect(&cluster.config.cri_socket()).unwrap();
    let alive = cri.sandboxes(None).await.unwrap().into_iter().filter(|s| s.state == 0).count();
    assert_eq!(alive, 0, "nothing runs");

    // The machine has booted.
    cluster.stop_agent().await;
    cluster.config.shutdown = handle();
    cluster.start_agent();
    until("the node is ready", async || condition(&node(&cluster).await, "Ready") == "True").await;
    cluster.create("new", pod(shared.path(), "new", "", 1, "exit 0")).await;
    cluster.ready("new").await;
    assert_eq!(cluster.json("web").await["status"]["phase"], "Failed", "what has ended has ended");
    cluster.end().await;
}
