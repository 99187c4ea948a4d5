//! etcd keeps the contract: alone and plain, and three of it with mutual TLS.

use std::sync::Mutex;

use seawall_store::contract;

use crate::cluster::EtcdCluster;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_plain_member() {
    // Each case has an etcd of its own; they end with the test.
    let clusters = Mutex::new(Vec::new());
    contract::run_all(|| async {
        let cluster = EtcdCluster::start(1, false).await;
        let etcd = cluster.connect(Some(0)).await;
        clusters.lock().unwrap().push(cluster);
        etcd
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_with_tls() {
    let cluster = EtcdCluster::start(3, true).await;
    contract::run_all(|| async {
        cluster.wipe().await;
        cluster.connect(Some(1)).await
    })
    .await;
}
