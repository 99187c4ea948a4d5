//! Routes between three nodes, in namespaces.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    process::Command,
    time::Duration,
};

use seawall_network::routes::{Config, Kernel, NodeRoutes, Tunnel, apply};

use crate::common::{Lan, enter, sh};

fn node(n: u8) -> NodeRoutes {
    NodeRoutes {
        name: format!("node-{n}"),
        addresses: vec![format!("10.9.0.{n}").parse().unwrap()],
        pods: vec![format!("10.244.{n}.0/24").parse().unwrap()],
    }
}

/// Does what the part of a node does, in the node's namespace.
fn sync(lan: &Lan, me: u8, nodes: &[NodeRoutes], tunnel: Tunnel) -> anyhow::Result<Vec<String>> {
    let (namespace, nodes) = (lan.namespace(me), nodes.to_vec());
    let config = Config { node_name: format!("node-{me}"), tunnel, ..Config::default() };
    let thread = std::thread::spawn(move || {
        enter(&namespace);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { apply(&Kernel::connect()?, &config, &nodes).await })
    });
    Ok(thread.join().unwrap()?.into_iter().collect())
}

/// What a command says in a machine's namespace; its words of failure if it fails.
fn says(lan: &Lan, n: u8, command: &str) -> String {
    let output =
        Command::new("ip").args(["netns", "exec", &lan.namespace(n)]).args(command.split_whitespace()).output();
    let output = output.unwrap();
    String::from_utf8(if output.status.success() { output.stdout } else { output.stderr }).unwrap()
}

fn shown(lan: &Lan, n: u8, what: &str) -> String {
    says(lan, n, &format!("ip -4 route show {what}"))
}

/// Does something on a machine.
fn on<T: Send + 'static>(lan: &Lan, n: u8, work: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = lan.namespace(n);
    let thread = std::thread::spawn(move || {
        enter(&namespace);
        work()
    });
    thread.join().unwrap()
}

fn pod(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, n, 5)
}

/// A pod on each machine: an address on its loopback is enough to answer from.
fn pods(lan: &Lan, count: u8) {
    for n in 1..=count {
        sh(&format!("ip -n {} addr add {}/32 dev lo", lan.namespace(n), pod(n)));
    }
}

/// Whether a pod sends a body to another one's, which says how long it was.
fn reaches(lan: &Lan, from: u8, to: u8) -> bool {
    const BODY: usize = 1 << 20;
    let server = on(lan, to, move || TcpListener::bind((pod(to), 0)).unwrap());
    let address = server.local_addr().unwrap();
    let answers = std::thread::spawn(move || {
        let (mut stream, peer) = server.accept().unwrap();
        assert_eq!(peer.ip(), pod(from), "a pod is seen with its own address");
        let mut body = vec![0; BODY];
        stream.read_exact(&mut body).unwrap();
        stream.write_all(b"all").unwrap();
    });
    let reached = on(lan, from, move || {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((pod(from), 0)).into()).unwrap();
        let limit = Duration::from_secs(1);
        if socket.connect_timeout(&address.into(), limit).is_err() {
            return false;
        }
        let mut stream = std::net::TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut word = [0; 3];
        stream.write_all(&vec![7; BODY]).is_ok() && stream.read_exact(&mut word).is_ok()
    });
    if reached {
        answers.join().unwrap();
    }
    reached
}

#[test]
fn pods_reach_each_other() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
    let lan = Lan::new(3);
    pods(&lan, 3);
    let nodes = [node(1), node(2), node(3)];
    assert!(!reaches(&lan, 1, 2), "there is no route yet");
    for n in 1..=3 {
        assert!(sync(&lan, n, &nodes, Tunnel::Auto).unwrap().is_empty());
    }
    for (from, to) in [(1, 2), (2, 1), (1, 3), (3, 2)] {
        assert!(reaches(&lan, from, to), "{from} to {to}");
    }
    let ours = shown(&lan, 1, "proto 83");
    assert!(
        ours.contains("10.244.2.0/24 via 10.9.0.2 dev eth0") && ours.contains("10.244.3.0/24 via 10.9.0.3"),
        "{ours}"
    );

    // Once more changes nothing; what somebody takes away comes back; what is not ours stays.
    sh(&format!("ip -n {0} route add 10.250.0.0/16 via 10.9.0.3; ip -n {0} route del 10.244.2.0/24", lan.namespace(1)));
    assert!(!reaches(&lan, 1, 2));
    sync(&lan, 1, &nodes, Tunnel::Auto).unwrap();
    assert!(reaches(&lan, 1, 2));

    // A node leaves, another one changes its address.
    sh(&format!("ip -n {} addr add 10.9.0.22/24 dev eth0", lan.namespace(2)));
    let moved = NodeRoutes { addresses: vec!["10.9.0.22".parse().unwrap()], ..node(2) };
    sync(&lan, 1, &[node(1), moved], Tunnel::Auto).unwrap();
    let all = shown(&lan, 1, "");
    assert!(all.contains("10.244.2.0/24 via 10.9.0.22 dev eth0 proto 83"), "{all}");
    assert!(!all.contains("10.244.3.0/24") && all.contains("10.250.0.0/16 via 10.9.0.3"), "{all}");
    assert!(reaches(&lan, 1, 2));

    // Somebody else's route to the same pods is left alone, and that is said.
    sh(&format!("ip -n {} route add 10.244.3.0/24 via 10.9.0.2", lan.namespace(1)));
    let error = format!("{:#}", sync(&lan, 1, &nodes, Tunnel::Auto).unwrap_err());
    assert!(error.contains("add 10.244.3.0/24 via 10.9.0.3: somebody else's route"), "{error}");
    assert!(shown(&lan, 1, "").contains("10.244.3.0/24 via 10.9.0.2"));

    // All of ours go, and no others.
    sync(&lan, 1, &[], Tunnel::Auto).unwrap();
    assert_eq!(shown(&lan, 1, "proto 83"), "");
    assert!(shown(&lan, 1, "").contains("10.250.0.0/16"));
}

/// Machine 2 is on a network of its own, behind a router that lets nothing pass that has a pod's address.
fn apart(lan: &Lan) -> NodeRoutes {
    let (router, two) = (format!("{}-lan", lan.prefix), lan.namespace(2));
    sh(&format!(
        "ip -n {two} addr flush dev eth0; ip -n {two} addr add 10.9.1.2/24 dev eth0
         ip -n {two} route add default via 10.9.1.254
         ip -n {router} addr add 10.9.0.254/24 dev br0; ip -n {router} addr add 10.9.1.254/24 dev br0
         ip netns exec {router} sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward
           echo 0 > /proc/sys/net/ipv4/conf/br0/send_redirects; echo 0 > /proc/sys/net/ipv4/conf/all/send_redirects'
         ip netns exec {router} nft 'add table bridge t; add chain bridge t i {{ type filter hook input priority 0; }}
           add rule bridge t i ip saddr 10.244.0.0/16 drop; add rule bridge t i ip daddr 10.244.0.0/16 drop'"
    ));
    for n in [1, 3] {
        sh(&format!("ip -n {} route add default via 10.9.0.254", lan.namespace(n)));
    }
    NodeRoutes { addresses: vec!["10.9.1.2".parse().unwrap()], ..node(2) }
}

#[test]
fn nodes_of_another_network_are_reached_by_a_tunnel() {
    let lan = Lan::new(3);
    pods(&lan, 3);
    let far = apart(&lan);
    let nodes = [node(1), far.clone(), node(3)];
    let never = sync(&lan, 1, &nodes, Tunnel::Never).unwrap();
    assert_eq!(never, ["node-2: its address 10.9.1.2 is on no network of this machine, and --tunnel is never"]);
    assert!(!reaches(&lan, 1, 2), "there is no way");
    for n in 1..=3 {
        assert!(sync(&lan, n, &nodes, Tunnel::Auto).unwrap().is_empty());
    }
    for (from, to) in [(1, 2), (2, 1), (1, 3), (3, 2), (2, 3)] {
        assert!(reaches(&lan, from, to), "{from} to {to}");
    }
    // Each by its way; what this node says itself comes from its own range, so that the answer is for the tunnel.
    let ours = shown(&lan, 1, "proto 83");
    assert!(ours.contains("10.244.2.0/24 via 10.244.2.0 dev seawall.vxlan onlink"), "{ours}");
    assert!(ours.contains("10.244.3.0/24 via 10.9.0.3 dev eth0"), "{ours}");
    assert!(says(&lan, 1, "ip route get 10.244.2.5").contains("src 10.244.1.0"));
    let device = says(&lan, 1, "ip -d link show seawall.vxlan");
    assert!(
        device.contains("mtu 1450") && device.contains("local 10.9.0.1") && device.contains("nolearning"),
        "{device}"
    );

    // Nothing is made again that is as it should be, and what somebody took away comes back.
    let before = says(&lan, 1, "cat /sys/class/net/seawall.vxlan/ifindex");
    let neighbours =
        || says(&lan, 1, "ip neigh show dev seawall.vxlan") + &says(&lan, 1, "bridge fdb show dev seawall.vxlan");
    let known = neighbours();
    assert!(known.contains("10.244.2.0 lladdr") && known.contains("dst 10.9.1.2"), "{known}");
    let one = lan.namespace(1);
    sh(&format!(
        "ip -n {one} neigh flush dev seawall.vxlan nud permanent; ip -n {one} link set seawall.vxlan mtu 1300"
    ));
    sync(&lan, 1, &nodes, Tunnel::Auto).unwrap();
    assert_eq!(neighbours(), known);
    assert_eq!(says(&lan, 1, "cat /sys/class/net/seawall.vxlan/ifindex"), before);
    assert_eq!(says(&lan, 1, "cat /sys/class/net/seawall.vxlan/mtu"), "1450\n");
    assert!(reaches(&lan, 1, 2));

    // The node has another address: another end, and nothing of the old one is left.
    let two = lan.namespace(2);
    sh(&format!("ip -n {two} addr add 10.9.1.22/24 dev eth0"));
    let moved = NodeRoutes { addresses: vec!["10.9.1.22".parse().unwrap()], ..node(2) };
    for n in [1, 2] {
        sync(&lan, n, &[node(1), moved.clone(), node(3)], Tunnel::Auto).unwrap();
    }
    assert!(reaches(&lan, 1, 2) && reaches(&lan, 2, 1));
    assert!(!neighbours().contains("10.9.1.2 ") && neighbours().contains("dst 10.9.1.22"), "{}", neighbours());

    // It has left: so has the tunnel, with its rules.
    sync(&lan, 1, &[node(1), node(3)], Tunnel::Auto).unwrap();
    assert!(says(&lan, 1, "ip link show seawall.vxlan").contains("does not exist"));
    assert!(says(&lan, 1, "nft list tables").is_empty());
    assert!(!shown(&lan, 1, "proto 83").contains("10.244.2.0"));
    assert!(reaches(&lan, 1, 3));

    // A tunnel everywhere.
    for n in [1, 3] {
        sync(&lan, n, &[node(1), node(3)], Tunnel::Always).unwrap();
    }
    assert!(shown(&lan, 1, "proto 83").contains("10.244.3.0/24 via 10.244.3.0 dev seawall.vxlan"));
    assert!(reaches(&lan, 1, 3));
}

#[test]
fn only_nodes_send_something_into_the_tunnel() {
    let lan = Lan::new(3);
    pods(&lan, 3);
    let far = apart(&lan);
    sync(&lan, 1, &[node(1), far.clone()], Tunnel::Auto).unwrap();
    // Machine 3 knows all that a node knows, and is none.
    sync(&lan, 3, &[node(1), node(3)], Tunnel::Always).unwrap();
    let socket = on(&lan, 1, || UdpSocket::bind((pod(1), 0)).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let to = socket.local_addr().unwrap();
    let arrives = || {
        on(&lan, 3, move || UdpSocket::bind((pod(3), 0)).unwrap().send_to(b"x", to).unwrap());
        socket.recv(&mut [0; 8]).is_ok()
    };
    assert!(!arrives(), "a stranger's packet is dropped");
    // What somebody took away is put back.
    sh(&format!("ip netns exec {} nft delete table inet seawall_tunnel", lan.namespace(1)));
    assert!(arrives(), "without the rules it arrives");
    sync(&lan, 1, &[node(1), far.clone()], Tunnel::Auto).unwrap();
    assert!(!arrives());
    // As a node it may.
    sync(&lan, 1, &[node(1), far, node(3)], Tunnel::Auto).unwrap();
    assert!(arrives());
}
