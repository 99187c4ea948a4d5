//! The balancer and the routes of a node with a real API server.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::TryStreamExt;
use k8s_openapi::api::{
    core::v1::{ConfigMap, Node},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use seawall_client::watch::Backoff;
use seawall_network::{
    balancer::{self, Balancer, choice::Health},
    routes,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    api::Cluster,
    common::{Lan, enter, sh, until},
};

fn slice(name: &str, addresses: &[&str]) -> EndpointSlice {
    let endpoints: Vec<_> =
        addresses.iter().map(|a| json!({"addresses": [a], "conditions": {"ready": true}})).collect();
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": "IPv4", "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}], "endpoints": endpoints,
    }))
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_balancer_follows_the_cluster() {
    let cluster = Cluster::new("192.0.2.1").await;
    let (first, stop_first) = cluster.serve("127.0.0.2:0").await;
    let (second, stop_second) = cluster.serve("127.0.0.3:0").await;
    let file = cluster.directory.path().join("servers.json");
    let config = balancer::Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        initial: vec![first, second],
        ca_pem: tokio::sync::watch::channel(cluster.authority.pem.clone()).1,
        file: file.clone(),
        ..Default::default()
    };
    let balancer = Balancer::bind(config).await.unwrap();
    let stop = CancellationToken::new();
    let client = cluster.remote(balancer.address());
    let (running, following) = (balancer.clone(), balancer.clone());
    let tasks = [
        tokio::spawn({
            let stop = stop.clone();
            async move { running.run(stop).await }
        }),
        tokio::spawn({
            let (client, stop) = (client.clone(), stop.clone());
            async move { following.follow(client, stop).await }
        }),
    ];
    let listed = || {
        let mut all: Vec<String> =
            balancer.metrics().servers.iter().filter(|s| s.listed).map(|s| s.address.to_string()).collect();
        all.sort();
        all
    };
    // The API's own word replaces what was given; those that were given are ready, and remembered.
    until("the cluster's own list", async || listed() == ["192.0.2.1:6443"]).await;
    let api: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    api.create(&PostParams::default(), &slice("more", &["192.0.2.2", "192.0.2.3"])).await.unwrap();
    until("a longer list", async || listed() == ["192.0.2.1:6443", "192.0.2.2:6443", "192.0.2.3:6443"]).await;
    api.delete("more", &DeleteParams::default()).await.unwrap();
    until("a shorter list", async || listed() == ["192.0.2.1:6443"]).await;
    until("the list is on disk", async || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        text.contains("192.0.2.1:6443") && text.contains(&first.to_string())
    })
    .await;

    // A watch of a client behind the balancer goes on when the server that it is on is gone: it misses nothing, and
    // is there again at once.
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let seen = Arc::new(AtomicUsize::new(0));
    let breaks = Arc::new(AtomicUsize::new(0));
    let watching = tokio::spawn({
        let (maps, seen, breaks) = (maps.clone(), seen.clone(), breaks.clone());
        async move {
            let config = watcher::Config::default().labels("test=yes");
            let mut events = Box::pin(watcher(maps, config).backoff(Backoff::default()));
            loop {
                match events.try_next().await {
                    Ok(Some(watcher::Event::Apply(_) | watcher::Event::InitApply(_))) => {
                        seen.fetch_add(1, Ordering::SeqCst);
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => return,
                    Err(_) => drop(breaks.fetch_add(1, Ordering::SeqCst)),
                }
            }
        }
    });
    let create = async |n: usize| {
        let map: ConfigMap =
            serde_json::from_value(json!({"metadata": {"name": format!("m{n}"), "labels": {"test": "yes"}}})).unwrap();
        let began = tokio::time::Instant::now();
        let mut tries = 0;
        loop {
            tries += 1;
            match maps.create(&PostParams::default(), &map).await {
                Ok(_) => break,
                // A write whose answer was lost may have been done.
                Err(kube::Error::Api(status)) if status.code == 409 => break,
                Err(error) => assert!(began.elapsed() < Duration::from_secs(10), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        (began.elapsed(), tries)
    };
    create(0).await;
    until("the watch saw it", async || seen.load(Ordering::SeqCst) >= 1).await;
    let used = balancer.metrics().servers.into_iter().find(|s| s.open > 0).unwrap();
    assert!(used.address == first || used.address == second, "{used:?}");
    let (victim_stop, other) = if used.address == first { (stop_first, second) } else { (stop_second, first) };
    victim_stop.cancel();
    let (took, tries) = create(1).await;
    eprintln!("a write right after a server stopped took {took:?} and {tries} tries");
    until("the watch goes on", async || seen.load(Ordering::SeqCst) >= 2).await;
    until("the other server is used", async || {
        balancer.metrics().servers.iter().any(|s| s.address == other && s.open > 0 && s.health == Health::Ready)
    })
    .await;
    watching.abort();
    stop.cancel();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
}

#[test]
fn routes_follow_the_nodes() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
    let lan = Lan::new(1);
    enter(&lan.namespace(1));
    let shown = || {
        let output = std::process::Command::new("ip").args(["route", "show", "proto", "83"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let cluster = Cluster::new("10.9.0.1").await;
        let client = cluster.client();
        let nodes: Api<Node> = Api::all(client.clone());
        let put = async |name: &str, address: &str, pods: &str| {
            let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
                "spec": {"podCIDR": pods, "podCIDRs": [pods]}});
            let force = PatchParams::default();
            if nodes.get_opt(name).await.unwrap().is_none() {
                nodes.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();
            }
            let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": address}]}});
            nodes.patch_status(name, &force, &Patch::Merge(&status)).await.unwrap();
        };
        put("me", "10.9.0.1", "10.244.1.0/24").await;
        put("a", "10.9.0.2", "10.244.2.0/24").await;
        // Something of ours from an earlier life.
        sh("ip route add 10.244.9.0/24 via 10.9.0.9 proto 83");
        let stop = CancellationToken::new();
        let config =
            routes::Config { node_name: "me".into(), resync: Duration::from_millis(300), ..Default::default() };
        let running = tokio::spawn(routes::run(client.clone(), config, stop.clone()));
        until("the first routes", async || {
            let shown = shown();
            shown.contains("10.244.2.0/24 via 10.9.0.2") && !shown.contains("10.244.9.0/24")
        })
        .await;
        put("b", "10.9.0.3", "10.244.3.0/24").await;
        until("a new node", async || shown().contains("10.244.3.0/24 via 10.9.0.3")).await;
        put("b", "10.9.0.33", "10.244.3.0/24").await;
        until("a new address", async || shown().contains("10.244.3.0/24 via 10.9.0.33")).await;
        nodes.delete("b", &DeleteParams::default()).await.unwrap();
        until("a node left", async || !shown().contains("10.244.3.0/24")).await;
        // A link that was down has lost its routes.
        sh("ip link set eth0 down; ip link set eth0 up");
        until("they are back", async || shown().contains("10.244.2.0/24 via 10.9.0.2")).await;
        stop.cancel();
        running.await.unwrap().unwrap();
        assert!(shown().contains("10.244.2.0/24"), "a restart is not felt");
        routes::remove().await.unwrap();
        assert_eq!(shown(), "");
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
}
