//! Routes between three nodes, in namespaces.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{Lan, enter, sh};
use seawall_network::routes::{Kernel, NodeRoutes, apply};

fn node(n: u8) -> NodeRoutes {
    NodeRoutes {
        name: format!("node-{n}"),
        addresses: vec![format!("10.9.0.{n}").parse().unwrap()],
        pods: vec![format!("10.244.{n}.0/24").parse().unwrap()],
    }
}

/// Does what the part of a node does, in the node's namespace.
fn sync(lan: &Lan, me: u8, nodes: &[NodeRoutes]) -> anyhow::Result<Vec<String>> {
    let (namespace, name, nodes) = (lan.namespace(me), format!("node-{me}"), nodes.to_vec());
    let thread = std::thread::spawn(move || {
        enter(&namespace);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { apply(&Kernel::connect()?, &name, &nodes).await })
    });
    Ok(thread.join().unwrap()?.into_iter().collect())
}

fn shown(lan: &Lan, n: u8, what: &str) -> String {
    let words = ["-n", &lan.namespace(n), "route", "show"];
    let output = std::process::Command::new("ip").args(words).args(what.split_whitespace()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn pods_reach_each_other() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
    let lan = Lan::new(3);
    // A pod on each node: an address on its loopback is enough to answer from.
    for n in 1..=3 {
        sh(&format!("ip -n {} addr add 10.244.{n}.5/32 dev lo", lan.namespace(n)));
    }
    let nodes = [node(1), node(2), node(3)];
    let reaches = |from: u8, to: u8| {
        let namespace = lan.namespace(from);
        std::thread::spawn(move || {
            let listener = |namespace: String| {
                std::thread::spawn(move || {
                    enter(&namespace);
                    std::net::TcpListener::bind(format!("10.244.{to}.5:0")).unwrap()
                })
                .join()
                .unwrap()
            };
            let server = listener(namespace.replace(&format!("-{from}"), &format!("-{to}")));
            enter(&namespace);
            let source: std::net::SocketAddr = format!("10.244.{from}.5:0").parse().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let socket = tokio::net::TcpSocket::new_v4().unwrap();
                socket.bind(source).unwrap();
                let limit = std::time::Duration::from_secs(1);
                let to = server.local_addr().unwrap();
                matches!(tokio::time::timeout(limit, socket.connect(to)).await, Ok(Ok(_)))
            })
        })
        .join()
        .unwrap()
    };
    assert!(!reaches(1, 2), "there is no route yet");
    for n in 1..=3 {
        assert!(sync(&lan, n, &nodes).unwrap().is_empty());
    }
    for (from, to) in [(1, 2), (2, 1), (1, 3), (3, 2)] {
        assert!(reaches(from, to), "{from} to {to}");
    }
    let ours = shown(&lan, 1, "proto 83");
    assert!(
        ours.contains("10.244.2.0/24 via 10.9.0.2 dev eth0") && ours.contains("10.244.3.0/24 via 10.9.0.3"),
        "{ours}"
    );

    // Once more changes nothing; what somebody takes away comes back; what is not ours stays.
    sh(&format!("ip -n {0} route add 10.250.0.0/16 via 10.9.0.3; ip -n {0} route del 10.244.2.0/24", lan.namespace(1)));
    assert!(!reaches(1, 2));
    sync(&lan, 1, &nodes).unwrap();
    assert!(reaches(1, 2));

    // A node leaves, another one changes its address.
    sh(&format!("ip -n {} addr add 10.9.0.22/24 dev eth0", lan.namespace(2)));
    let moved = NodeRoutes { addresses: vec!["10.9.0.22".parse().unwrap()], ..node(2) };
    sync(&lan, 1, &[node(1), moved]).unwrap();
    let all = shown(&lan, 1, "");
    assert!(all.contains("10.244.2.0/24 via 10.9.0.22 dev eth0 proto 83"), "{all}");
    assert!(!all.contains("10.244.3.0/24") && all.contains("10.250.0.0/16 via 10.9.0.3"), "{all}");
    assert!(reaches(1, 2));

    // Somebody else's route to the same pods is left alone, and that is said.
    sh(&format!("ip -n {} route add 10.244.3.0/24 via 10.9.0.2", lan.namespace(1)));
    let error = format!("{:#}", sync(&lan, 1, &nodes).unwrap_err());
    assert!(error.contains("add 10.244.3.0/24 via 10.9.0.3: somebody else's route"), "{error}");
    assert!(shown(&lan, 1, "").contains("10.244.3.0/24 via 10.9.0.2"));

    // All of ours go, and no others.
    sync(&lan, 1, &[]).unwrap();
    assert_eq!(shown(&lan, 1, "proto 83"), "");
    assert!(shown(&lan, 1, "").contains("10.250.0.0/16"));
}
