//! A node that is cut off stops what must not run twice, and nothing else; when it is back, it goes on with what still exists.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::{sync::atomic::Ordering, time::Duration};

use common::{Cluster, until};
use kube::api::DeleteParams;
use seawall_node::fence::{Config, PERMIT};
use serde_json::{Value, json};

const AFTER: Duration = Duration::from_secs(5);

fn counter(directory: &std::path::Path, name: &str) -> Value {
    let script = format!("while :; do echo x >> /shared/{name}; sleep 0.1; done");
    json!({"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "command": ["sh", "-c", script],
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}],
        "volumes": [{"name": "shared", "hostPath": {"path": directory}}]})
}

fn restarts(pod: &Value) -> i64 {
    pod["status"]["containerStatuses"][0]["restartCount"].as_i64().unwrap_or(-1)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_cut_off_stops_stateful_pods() {
    let mut cluster = Cluster::start_with(|config| {
        config.lease = Duration::from_secs(4);
        config.lease_request = Duration::from_secs(1);
        config.fence = Config { after: AFTER, promise: Duration::from_secs(10), ..Config::default() };
    })
    .await;
    let shared = tempfile::tempdir().unwrap();
    let size = |name: &str| std::fs::metadata(shared.path().join(name)).map_or(0, |m| m.len());
    let owner = json!([{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "s", "uid": "s", "controller": true}]);
    cluster.create_owned("stateful", counter(shared.path(), "stateful"), owner.clone()).await;
    cluster.create_owned("doomed", counter(shared.path(), "doomed"), owner).await;
    cluster.create("plain", counter(shared.path(), "plain")).await;
    for name in ["stateful", "doomed", "plain"] {
        cluster.ready(name).await;
    }
    let pod = cluster.json("stateful").await;
    let permit = |pod: &Value| {
        let all = pod["status"]["conditions"].as_array().unwrap();
        all.iter().find(|c| c["type"] == PERMIT).map(|c| c["message"].clone())
    };
    let first = permit(&pod).expect("it has a permit");
    assert_eq!(permit(&cluster.json("plain").await), None);

    // A restart of the agent is nobody's business.
    cluster.stop_agent().await;
    cluster.start_agent();
    tokio::time::sleep(AFTER * 2).await;
    assert_eq!(restarts(&cluster.json("stateful").await), 0, "renewals go on");

    cluster.cut.store(true, Ordering::SeqCst);
    let cut = tokio::time::Instant::now();
    until("the stateful pods stand still", async || {
        let before = (size("stateful"), size("doomed"));
        tokio::time::sleep(Duration::from_millis(700)).await;
        before == (size("stateful"), size("doomed"))
    })
    .await;
    let took = cut.elapsed();
    println!("stopped {took:?} after the cut");
    assert!(took < AFTER + Duration::from_secs(4), "{took:?}");
    let (before, still) = (size("plain"), size("stateful"));
    until("the other pod goes on", async || size("plain") > before + 10).await;
    assert_eq!(size("stateful"), still, "nothing of it is started while the node is cut off");

    // Meanwhile somebody takes one away for good.
    cluster.pods().delete("doomed", &DeleteParams::default().grace_period(0)).await.unwrap();
    let gone = size("doomed");
    cluster.cut.store(false, Ordering::SeqCst);
    until("the stateful pod runs again", async || size("stateful") > still + 10).await;
    let pod =
        cluster.wait("stateful", "Ready again", |p| common::condition(p, "Ready") == "True" && restarts(p) > 0).await;
    assert_ne!(permit(&pod), Some(first), "with another permit");
    assert_eq!(size("doomed"), gone, "what does not exist any more never ran again");
    cluster.end().await;
}
