//! Two machines and a client on one network: who answers for an address, and how it moves.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{Node, Service};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use seawall_network::{
    announce::{self, CONDITION},
    verdict::{Verdict, Verdicts},
};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    api::Cluster,
    common::{Lan, enter, sh, until},
};

const CLIENT: u8 = 3;
const IPS: [&str; 3] = ["10.9.0.100", "10.9.0.101", "fd09::100"];

fn output(namespace: &str, words: &str) -> String {
    let words: Vec<&str> = words.split_whitespace().collect();
    let output = std::process::Command::new("ip").args(["netns", "exec", namespace]).args(words).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn has(lan: &Lan, machine: u8, ip: &str) -> bool {
    output(&lan.namespace(machine), "ip -o addr show dev eth0").contains(&format!(" {ip}/"))
}

/// Which of the two machines have each address.
fn owners(lan: &Lan) -> Vec<Vec<u8>> {
    IPS.iter().map(|ip| [1, 2].into_iter().filter(|machine| has(lan, *machine, ip)).collect()).collect()
}

/// The part of a machine that answers, in the machine's network.
fn machine(
    lan: &Lan,
    n: u8,
    client: Client,
    verdicts: watch::Receiver<Verdicts>,
    file: std::path::PathBuf,
) -> (CancellationToken, std::thread::JoinHandle<()>) {
    let (namespace, stop) = (lan.namespace(n), CancellationToken::new());
    let config = announce::Config {
        node_name: format!("m{n}"),
        node_ip: IpAddr::from([10, 9, 0, n]),
        file: Some(file),
        resync: Duration::from_millis(500),
        ..Default::default()
    };
    let ends = stop.clone();
    let thread = std::thread::spawn(move || {
        enter(&namespace);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(announce::run(client, config, verdicts, ends)).unwrap();
    });
    (stop, thread)
}

/// A client of an API that is away.
fn nobody() -> Client {
    Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_moves_with_the_verdict() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
    let lan = Lan::new(3);
    for n in 1..=3 {
        let namespace = lan.namespace(n);
        sh(&format!("ip -n {namespace} addr add fd09::{n}/64 dev eth0 nodad"));
    }
    let cluster = Cluster::new("10.9.0.1").await;
    let client = cluster.client();
    let nodes: Api<Node> = Api::all(client.clone());
    let force = PatchParams::default();
    for name in ["m1", "m2"] {
        let node = json!({"metadata": {"name": name}});
        nodes.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();
        let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        nodes.patch_status(name, &force, &Patch::Merge(&ready)).await.unwrap();
    }
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let service = json!({"metadata": {"name": "s"}, "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}});
    services.create(&PostParams::default(), &serde_json::from_value(service).unwrap()).await.unwrap();
    let (tell, verdicts) = watch::channel(Verdicts::default());
    let files = tempfile::tempdir().unwrap();
    let file = |n: u8| files.path().join(format!("{n}.json"));
    let mut machines: BTreeMap<u8, _> =
        [1, 2].map(|n| (n, machine(&lan, n, client.clone(), verdicts.clone(), file(n)))).into();

    // Addresses that nobody gave from here are left to whoever did.
    let ingress: Vec<_> = IPS.iter().map(|ip| json!({"ip": ip})).collect();
    let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
    services.patch_status("s", &force, &Patch::Merge(&status)).await.unwrap();
    until("both have kept what they know", async || file(1).exists() && file(2).exists()).await;
    assert_eq!(owners(&lan), [[0u8; 0]; 3]);
    let condition = json!({"type": CONDITION, "status": "True", "reason": "Pool", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let status = json!({"status": {"conditions": [condition]}});
    services.patch_status("s", &force, &Patch::Merge(&status)).await.unwrap();
    until("each address is on one machine", async || owners(&lan).iter().all(|of| of.len() == 1)).await;
    let before = owners(&lan);

    // Nothing else than what is said may tell the client that they have moved.
    let lookup = |ip: &str| output(&lan.namespace(CLIENT), &format!("ip neigh show {ip}"));
    let mac = |n: u8| output(&lan.namespace(n), "cat /sys/class/net/eth0/address").trim().to_owned();
    // No program of the machine is reached by them.
    let reached = |ip: &'static str, port: u16, namespace: String| {
        std::thread::spawn(move || {
            enter(&namespace);
            std::net::TcpStream::connect_timeout(&(ip.parse::<IpAddr>().unwrap(), port).into(), Duration::from_secs(2))
        })
        .join()
        .unwrap()
    };
    for n in [1, 2] {
        let namespace = lan.namespace(n);
        let listener = std::thread::spawn(move || {
            enter(&namespace);
            std::net::TcpListener::bind("[::]:4444").unwrap()
        });
        std::mem::forget(listener.join().unwrap());
    }
    assert!(reached("10.9.0.1", 4444, lan.namespace(CLIENT)).is_ok());
    for ip in IPS {
        let error = reached(ip, 4444, lan.namespace(CLIENT)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{ip}: {error}");
    }

    // One is dead. Its network is still there in this test, so that nobody else tells the client.
    let (dead, alive) = (before[0][0], 3 - before[0][0]);
    let (stop, thread) = machines.remove(&dead).unwrap();
    stop.cancel();
    thread.join().unwrap();
    let began = tokio::time::Instant::now();
    tell.send_replace(Arc::new([(format!("m{dead}"), Verdict::Dead)].into()));
    until("the other one has them all", async || IPS.iter().all(|ip| has(&lan, alive, ip))).await;
    until("the client knows", async || IPS.iter().all(|ip| lookup(ip).contains(&mac(alive)))).await;
    eprintln!("the addresses moved, and the client knew, after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());

    // The same without an API, by one that starts just then.
    let (stop, thread) = machines.remove(&alive).unwrap();
    stop.cancel();
    thread.join().unwrap();
    tell.send_replace(Arc::new([(format!("m{alive}"), Verdict::Dead)].into()));
    let away = nobody();
    let (stop, thread) = machine(&lan, dead, away, verdicts.clone(), file(dead));
    until("the first one has them all", async || IPS.iter().all(|ip| has(&lan, dead, ip))).await;
    until("the client knows", async || IPS.iter().all(|ip| lookup(ip).contains(&mac(dead)))).await;
    // Both live: those of the other one go.
    tell.send_replace(Verdicts::default());
    until("it has only its own", async || {
        let held = |ip: &&&str| has(&lan, dead, ip);
        IPS.iter().filter(held).count() == before.iter().filter(|of| of[0] == dead).count()
    })
    .await;
    stop.cancel();
    thread.join().unwrap();
    let namespace = lan.namespace(dead);
    let cleaned = std::thread::spawn(move || {
        enter(&namespace);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(announce::remove()).unwrap();
    });
    cleaned.join().unwrap();
    assert!(IPS.iter().all(|ip| !has(&lan, dead, ip)));
}
