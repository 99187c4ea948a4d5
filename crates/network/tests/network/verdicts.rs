//! What the service proxy does when machines die, in a real kernel and with a real API server.

use std::{
    collections::BTreeMap,
    io::Read as _,
    net::TcpStream,
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use seawall_network::{
    proxy::{self, ProxyConfig},
    verdict::{Verdict, Verdicts},
};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    api::Cluster,
    common::{enter, until},
    net::{Net, answer, echoes, inside},
};

const SERVICE: &str = "10.96.0.9:80";
const SERVICE6: &str = "[fd00:96::9]:80";
const STICKY: [&str; 2] = ["10.96.0.11:80", "[fd00:96::11]:80"];
const DATAGRAMS: [&str; 2] = ["10.96.0.10:53", "[fd00:96::10]:53"];
const NODE_PORT: &str = "192.168.77.1:30005";
const NODE_PORT6: &str = "[fd00::1]:30005";
const POD2: &str = "10.244.2.2:8080";
const POD2_6: &str = "[fd00:2::2]:8080";

fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// What the slices of a Service are called, and whose they are.
const SLICES: [(&str, &str, [&str; 2]); 2] =
    [("1", "IPv4", ["10.244.1.2", "10.244.2.2"]), ("6", "IPv6", ["fd00:1::2", "fd00:2::2"])];

/// One for each family.
fn slices(name: &str, protocol: &str, second: Value) -> [EndpointSlice; 2] {
    SLICES.map(|(suffix, family, pods)| {
        object(json!({
            "metadata": {"name": format!("{name}-{suffix}"), "namespace": "default",
                "labels": {"kubernetes.io/service-name": name}},
            "addressType": family, "ports": [{"name": "", "port": 8080, "protocol": protocol}],
            "endpoints": [{"addresses": [pods[0]], "nodeName": "n1", "conditions": {"ready": true}},
                {"addresses": [pods[1]], "nodeName": "n2", "conditions": second.clone()}],
        }))
    })
}

/// The second endpoint of `web` is now so.
async fn put(client: &Client, conditions: Value) {
    let api: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    for slice in slices("web", "TCP", conditions) {
        let patch = json!({"endpoints": slice.endpoints});
        api.patch(&slice.metadata.name.unwrap(), &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    }
}

/// The ranges of pods are small, since the test's node has addresses beside its pods'.
///
/// Nodes `here`, `n1`, `n2`; a Service on TCP, one that is sticky, one on UDP, all of both families; an endpoint of each on
/// `n1` and on `n2`.
async fn fill(cluster: &Cluster) {
    let client = &cluster.client();
    let nodes: Api<Node> = Api::all(client.clone());
    for (name, address, pods) in [
        ("here", "192.168.77.1", &["10.244.0.0/24"][..]),
        ("n1", "10.9.0.1", &["10.244.1.2/31", "fd00:1::2/127"]),
        ("n2", "10.9.0.2", &["10.244.2.2/31", "fd00:2::2/127"]),
    ] {
        let node = json!({"metadata": {"name": name}, "spec": {"podCIDR": pods[0], "podCIDRs": pods}});
        nodes.create(&PostParams::default(), &object(node)).await.unwrap();
        let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": address}]}});
        nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    }
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    for (name, spec, other, protocol) in [
        (
            "web",
            json!({"type": "NodePort", "clusterIP": "10.96.0.9", "ports": [{"port": 80, "nodePort": 30005}]}),
            "fd00:96::9",
            "TCP",
        ),
        (
            "sticky",
            json!({"clusterIP": "10.96.0.11", "sessionAffinity": "ClientIP", "ports": [{"port": 80}]}),
            "fd00:96::11",
            "TCP",
        ),
        ("dns", json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53, "protocol": "UDP"}]}), "fd00:96::10", "UDP"),
    ] {
        let service = json!({"metadata": {"name": name}, "spec": spec});
        services.create(&PostParams::default(), &object(service)).await.unwrap();
        cluster.add_address(name, other).await;
        let ready = json!({"ready": true});
        for slice in self::slices(name, protocol, ready) {
            slices.create(&PostParams::default(), &slice).await.unwrap();
        }
    }
}

/// Runs in the node's namespace, with a runtime whose threads and children are all there.
fn on_node(net: &Net, work: impl Future<Output = ()>) {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
    enter(&net.namespace("node"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(work);
    runtime.shutdown_timeout(Duration::from_secs(1));
}

struct Running {
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
    verdicts: watch::Sender<Verdicts>,
}

impl Running {
    fn start(client: Client, file: Option<PathBuf>) -> Running {
        let (verdicts, heard) = watch::channel(Verdicts::default());
        let config = ProxyConfig {
            node_name: "here".into(),
            node_ips: vec!["192.168.77.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            file,
            // Only verdicts act on what was kept, unless a test says otherwise.
            patience: Duration::from_secs(3600),
            relearn: Duration::from_secs(3600),
            ..Default::default()
        };
        let stop = CancellationToken::new();
        let task = tokio::spawn(proxy::run(client, config, heard, stop.clone()));
        Running { stop, task, verdicts }
    }

    fn say(&self, all: &[(&str, Verdict)]) {
        let all: BTreeMap<String, Verdict> = all.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
        self.verdicts.send_replace(all.into());
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

fn table() -> String {
    let output = std::process::Command::new("nft").args(["list", "table", "inet", "seawall"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn nft(words: &[&str]) {
    assert!(std::process::Command::new("nft").args(words).status().unwrap().success(), "{words:?}");
}

/// The sets of the clients that belong to an endpoint.
fn sets_of_clients() -> Vec<String> {
    let table = table();
    let names = table.lines().filter_map(|line| line.trim().strip_prefix("set ")?.strip_suffix(" {"));
    names.filter(|name| name.starts_with("aff_")).map(str::to_owned).collect()
}

/// Waits until the kernel's table has this, or has it no more.
async fn listed(text: &str, there: bool) {
    until(&format!("{text:?} is in the table: {there}"), async || table().contains(text) == there).await;
}

/// How long it takes until a connection breaks, on which the client sends something (or nothing).
fn breaks(mut stream: TcpStream, sends: bool) -> JoinHandle<(Duration, String)> {
    let began = Instant::now();
    tokio::task::spawn_blocking(move || {
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let mut buffer = [0; 64];
        loop {
            if sends && let Err(error) = std::io::Write::write_all(&mut stream, b"x") {
                return (began.elapsed(), error.to_string());
            }
            match stream.read(&mut buffer) {
                Ok(0) => return (began.elapsed(), "an end".into()),
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                    return (began.elapsed(), error.to_string());
                }
                _ => assert!(began.elapsed() < Duration::from_secs(20), "it does not break"),
            }
        }
    })
}

#[test]
fn a_dead_machine_is_left_at_once() {
    let net = Net::new();
    net.echo("pod1");
    net.echo("pod2");
    let both = ["pod1", "pod2"];
    on_node(&net, async {
        let cluster = Cluster::new("192.168.77.1").await;
        fill(&cluster).await;
        let proxy = Running::start(cluster.client(), None);
        listed("10.96.0.9 . tcp . 80", true).await;
        listed("10.96.0.10 . udp . 53", true).await;
        listed("fd00:96::10 . udp . 53", true).await;
        let to_all = || [SERVICE, SERVICE6, NODE_PORT, NODE_PORT6].into_iter();
        for to in to_all() {
            assert_eq!(net.answers("client", to), both, "{to}");
        }

        // In doubt: new connections go elsewhere, also those of a client that belongs there; what is open stays open.
        let mut open = [SERVICE, SERVICE6].map(|to| net.connect_to("client", to, "pod2"));
        until("the client belongs to pod2", async || {
            sets_of_clients().iter().for_each(|set| nft(&["flush", "set", "inet", "seawall", set]));
            STICKY.iter().all(|to| net.answers("client", to) == ["pod2"])
        })
        .await;
        let udp = DATAGRAMS.map(|to| net.udp("client", to));
        for (socket, family) in udp.iter().zip(["ipv4", "ipv6"]) {
            until("datagrams go to pod2", async || {
                let _ = std::process::Command::new("conntrack").args(["-D", "-f", family, "-p", "udp"]).output();
                answer(socket).as_deref() == Some("pod2")
            })
            .await;
        }
        proxy.say(&[("n1", Verdict::Alive), ("n2", Verdict::Suspect)]);
        until("pod2 is left", async || net.answers("client", SERVICE) == ["pod1"]).await;
        for (host, to) in [("client", SERVICE6), ("client", NODE_PORT), ("client", NODE_PORT6), ("node", SERVICE)]
            .into_iter()
            .chain([("node", SERVICE6), ("client", STICKY[0]), ("client", STICKY[1])])
        {
            assert_eq!(net.answers(host, to), ["pod1"], "from {host} to {to}");
        }
        assert!(open.iter_mut().all(echoes), "a connection to a suspected machine stays");
        assert!(udp.iter().all(|udp| answer(udp).as_deref() == Some("pod2")), "a flow of datagrams as well");
        // Everybody in doubt: both are used.
        proxy.say(&[("n1", Verdict::Suspect), ("n2", Verdict::Suspect)]);
        until("both are used", async || to_all().all(|to| net.answers("client", to) == both)).await;
        proxy.say(&[]);
        until("both are used", async || to_all().all(|to| net.answers("client", to) == both)).await;
        assert!(open.iter_mut().all(echoes));

        // Ending: the same, by the API's word.
        put(&cluster.client(), json!({"ready": false, "serving": true, "terminating": true})).await;
        until("pod2 is left", async || to_all().all(|to| net.answers("client", to) == ["pod1"])).await;
        assert!(open.iter_mut().all(echoes), "a connection to a pod that is ending stays");
        put(&cluster.client(), json!({"ready": true})).await;
        until("both are used", async || to_all().all(|to| net.answers("client", to) == both)).await;

        // Dead. Connections through the Service, the node's port, directly, from a pod and from this machine; with a
        // client that speaks and with one that only listens.
        let mut others = [SERVICE, SERVICE6].map(|to| net.connect_to("client", to, "pod1"));
        let mut broken = Vec::new();
        for (host, to) in [
            ("client", SERVICE),
            ("client", SERVICE6),
            ("client", NODE_PORT),
            ("client", NODE_PORT6),
            ("client", POD2),
            ("client", POD2_6),
            ("pod1", SERVICE6),
            ("node", SERVICE),
            ("node", SERVICE6),
            ("node", POD2),
            ("node", POD2_6),
        ] {
            for sends in [true, false] {
                broken.push((host, to, sends, net.connect_to(host, to, "pod2")));
            }
        }
        net.silence("pod2", true);
        let began = Instant::now();
        proxy.say(&[("n2", Verdict::Dead)]);
        let broken: Vec<_> =
            broken.into_iter().map(|(h, t, sends, stream)| (h, t, sends, breaks(stream, sends))).collect();
        let open = open.map(|open| breaks(open, false));
        until("only pod1 answers", async || net.connect("client", SERVICE).is_ok_and(|(name, _)| name == "pod1")).await;
        eprintln!("a connection to pod1 was made {:?} after the verdict", began.elapsed());
        for udp in &udp {
            until("datagrams go to pod1", async || answer(udp).as_deref() == Some("pod1")).await;
        }
        eprintln!("a datagram was answered by pod1 {:?} after the verdict", began.elapsed());
        assert!([POD2, POD2_6].iter().all(|to| net.connect("client", to).is_err()), "nobody waits for the dead");
        for (host, to, sends, broken) in broken {
            let (took, how) = broken.await.unwrap();
            eprintln!("from {host} to {to}, sending: {sends}: {how} after {took:?}");
            assert!(took < Duration::from_secs(if sends { 1 } else { 2 }), "{host} {to}");
        }
        for open in open {
            assert!(open.await.unwrap().0 < Duration::from_secs(2));
        }
        for (host, to) in to_all().map(|to| ("client", to)).chain([("node", SERVICE), ("node", SERVICE6)]) {
            assert_eq!(net.answers(host, to), ["pod1"], "from {host} to {to}");
        }
        assert!(others.iter_mut().all(echoes), "a connection to a machine that lives stays");

        // It lives after all.
        net.silence("pod2", false);
        let began = Instant::now();
        proxy.say(&[("n2", Verdict::Alive)]);
        until("both are used", async || to_all().all(|to| net.answers("client", to) == both)).await;
        eprintln!("pod2 was found in use {:?} after the verdict", began.elapsed());
        assert!(echoes(&mut net.connect_to("node", POD2, "pod2")));
        assert!(echoes(&mut net.connect_to("client", POD2_6, "pod2")));
        assert!(!table().contains("10.244.2.2/31"));
        proxy.stop().await;
    });
}

/// The kernel keeps a flow that it has reset itself. Whoever takes the client's port next must not be led there as well.
#[test]
fn a_port_whose_connection_was_reset_is_good_again() {
    let net = Net::new();
    net.echo("pod1");
    net.echo("pod2");
    on_node(&net, async {
        let cluster = Cluster::new("192.168.77.1").await;
        fill(&cluster).await;
        let proxy = Running::start(cluster.client(), None);
        listed("10.96.0.9 . tcp . 80", true).await;
        listed("fd00:96::9 . tcp . 80", true).await;
        let all = [("client", SERVICE), ("client", SERVICE6), ("node", SERVICE), ("node", SERVICE6)];
        let open = all.map(|(host, to)| (host, to, net.connect_to(host, to, "pod2")));
        net.silence("pod2", true);
        proxy.say(&[("n2", Verdict::Dead)]);
        for (host, to, stream) in open {
            let from = stream.local_addr().unwrap();
            breaks(stream, false).await.unwrap();
            let again = || {
                inside(&net.namespace(host), move || {
                    let to: std::net::SocketAddr = to.parse().unwrap();
                    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
                    socket.bind(&from.into())?;
                    socket.connect_timeout(&to.into(), Duration::from_secs(5))
                })
            };
            // By itself the kernel forgets it after ten seconds.
            let reached = until("it is reached", async || again().is_ok());
            let reached = tokio::time::timeout(Duration::from_secs(5), reached).await;
            assert!(reached.is_ok(), "{host} does not reach {to} from port {}", from.port());
        }
        proxy.stop().await;
    });
}

/// A machine is cut off from this one alone: nobody calls it dead, and what the API says in the end has to do.
#[test]
fn a_connection_that_nobody_answers_is_led_elsewhere() {
    let net = std::sync::Arc::new(Net::new());
    net.echo("pod1");
    net.echo("pod2");
    let here = net.clone();
    on_node(&net, async move {
        let cluster = Cluster::new("192.168.77.1").await;
        fill(&cluster).await;
        let proxy = Running::start(cluster.client(), None);
        listed("10.96.0.9 . tcp . 80", true).await;
        for to in [SERVICE, SERVICE6] {
            assert_eq!(here.answers("client", to), ["pod1", "pod2"]);
        }
        let mut stays = [SERVICE, SERVICE6].map(|to| here.connect_to("client", to, "pod1"));

        here.silence("pod2", true);
        let clients: Vec<_> = (0..48)
            .map(|number| {
                let net = here.clone();
                let (four, six) = ([SERVICE, NODE_PORT, SERVICE], [SERVICE6, NODE_PORT6, SERVICE6]);
                let host = ["client", "client", "node"][number % 3];
                let to = if number % 2 == 0 { four[number % 3] } else { six[number % 3] };
                let connect = move || net.connect_within(Duration::from_secs(30), host, to);
                tokio::task::spawn_blocking(connect)
            })
            .collect();
        let unanswered = |family: &str, pod: &str| {
            let words = ["-L", "-f", family, "-p", "tcp"];
            let output = std::process::Command::new("conntrack").args(words).output().unwrap();
            let flows = String::from_utf8_lossy(&output.stdout).into_owned();
            let waits = |flow: &&str| flow.contains("SYN_SENT") && flow.contains(&format!("src={pod} "));
            flows.lines().filter(waits).count()
        };
        let both = [("ipv4", "10.244.2.2"), ("ipv6", "fd00:2::2")];
        until("some wait for pod2", async || both.iter().all(|(family, pod)| unanswered(family, pod) > 3)).await;
        assert!(clients.iter().any(|client| !client.is_finished()));
        put(&cluster.client(), json!({"ready": false})).await;
        for client in clients {
            let (name, _) = client.await.unwrap().expect("the next try goes elsewhere");
            assert_eq!(name, "pod1");
        }
        // Else whoever is given the same port next would be led to pod2.
        until("nothing is left of them", async || both.iter().all(|(family, pod)| unanswered(family, pod) == 0)).await;
        assert!(stays.iter_mut().all(echoes));
        proxy.stop().await;
    });
}

#[test]
fn verdicts_act_without_the_api_and_after_a_restart_without_it() {
    let net = Net::new();
    net.echo("pod1");
    net.echo("pod2");
    let both = ["pod1", "pod2"];
    on_node(&net, async {
        let cluster = Cluster::new("192.168.77.1").await;
        fill(&cluster).await;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("proxy.json");
        let kept = async |text: &str, there: bool| {
            let read = |file: &Path| std::fs::read_to_string(file).unwrap_or_default();
            until(&format!("{text} is kept: {there}"), async || read(&file).contains(text) == there).await;
        };
        let (address, api) = cluster.serve("127.0.0.1:0").await;
        let proxy = Running::start(cluster.remote(address), Some(file.clone()));
        until("both are used", async || net.answers("client", SERVICE) == both).await;
        kept("10.244.2.2/31", true).await;
        api.cancel();
        until("the API is gone", async || tokio::net::TcpStream::connect(address).await.is_err()).await;
        proxy.say(&[("n2", Verdict::Dead)]);
        until("only pod1 answers", async || net.answers("client", SERVICE) == ["pod1"]).await;
        listed("10.244.2.2/31", true).await;
        kept("\"dead\":[\"n2\"]", true).await;
        proxy.stop().await;

        // A restart, the API still away and the gossip silent: nothing changes.
        let proxy = Running::start(cluster.remote(address), Some(file.clone()));
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(table().contains("10.244.2.2/31"));
        // Another one is in doubt: the first one does not come back into use by that, and nothing is reset on the word
        // of an earlier life.
        proxy.say(&[("n7", Verdict::Suspect)]);
        listed("10.244.2.2/31", false).await;
        assert_eq!(net.answers("client", SERVICE), ["pod1"]);
        // It is named.
        proxy.say(&[("n2", Verdict::Alive)]);
        until("both are used", async || net.answers("client", SERVICE) == both).await;
        proxy.say(&[("n1", Verdict::Dead)]);
        until("only pod2 answers", async || net.answers("client", SERVICE) == ["pod2"]).await;
        listed("10.244.1.2/31", true).await;
        // What is not kept any more cannot come back.
        kept("\"dead\":[\"n1\"]", true).await;
        proxy.stop().await;

        // With the API there, and the gossip silent: who was dead is avoided as long as it is not named.
        let proxy = Running::start(cluster.client(), Some(file.clone()));
        listed("10.244.1.2/31", false).await;
        assert_eq!(net.answers("client", SERVICE), ["pod2"]);
        proxy.say(&[("n1", Verdict::Alive), ("n2", Verdict::Alive)]);
        until("both are used", async || net.answers("client", SERVICE) == both).await;
        kept("\"dead\":[]", true).await;
        proxy.stop().await;
    });
}

/// `cargo nextest run -p seawall-network --run-ignored only how_long --no-capture`.
#[test]
#[ignore = "prints a table"]
fn how_long_a_verdict_takes() {
    let net = Net::new();
    on_node(&net, async {
        for (services, endpoints) in [(1, 2), (100, 10), (1000, 10), (5000, 10)] {
            let mut known = proxy::State::default();
            for node in 0..20 {
                let cidr = format!("10.245.{node}.0/24");
                let node: Node =
                    object(json!({"metadata": {"name": format!("n{node}")}, "spec": {"podCIDRs": [cidr]}}));
                known.nodes.extend([proxy::state::machine(node)]);
            }
            for s in 0..services {
                let (name, ip) = (format!("s{s}"), format!("10.96.{}.{}", s / 250, s % 250 + 1));
                let service = json!({"metadata": {"name": name, "namespace": "n"}, "spec": {"clusterIP": ip, "ports": [{"port": 80}]}});
                known.services.extend([proxy::state::service(object(service))]);
                let all: Vec<_> = (0..endpoints)
                    .map(|e| {
                        let node = (s + e) % 20;
                        let address = format!("10.245.{node}.{}", s % 250 + 1);
                        json!({"addresses": [address], "nodeName": format!("n{node}")})
                    })
                    .collect();
                let slice = json!({"metadata": {"name": name, "namespace": "n", "labels": {"kubernetes.io/service-name": name}},
                    "addressType": "IPv4", "ports": [{"name": "", "port": 8080}], "endpoints": all});
                known.slices.extend([proxy::state::slice(object(slice))]);
            }
            let config = ProxyConfig { node_name: "here".into(), ..Default::default() };
            let calm = proxy::plan::plan(&known, &config, &BTreeMap::new());
            proxy::nft(&config, &calm.script(None)).await.unwrap();
            for verdict in [Verdict::Suspect, Verdict::Dead] {
                let (mut plans, mut rules, mut sets) = (Vec::new(), Vec::new(), Vec::new());
                for _ in 0..5 {
                    let began = Instant::now();
                    let doubts = BTreeMap::from([("n1".to_owned(), verdict)]);
                    let doubt = proxy::plan::plan(&known, &config, &doubts);
                    let _ = doubt.script(Some(&calm));
                    plans.push(began.elapsed());
                    // What is dead goes first.
                    let began = Instant::now();
                    let dead = proxy::dead::Dead::of(&proxy::endpoints::View::new(&known, "here", &doubts), &[]);
                    if !dead.targets.is_empty() {
                        proxy::elements::add(&dead.targets.iter().collect::<Vec<_>>()).unwrap();
                    }
                    sets.push(began.elapsed());
                    let first = proxy::rules::Ruleset { sets: doubt.sets.clone(), ..calm.clone() };
                    let script = doubt.script(Some(&first));
                    let began = Instant::now();
                    proxy::nft(&config, &script).await.unwrap();
                    rules.push(began.elapsed());
                    proxy::nft(&config, &calm.script(Some(&doubt))).await.unwrap();
                }
                [&mut plans, &mut rules, &mut sets].into_iter().for_each(|all| all.sort());
                println!(
                    "{services} services of {endpoints}: {verdict:?}: planned in {:.1?}, out of reach in {:.1?}, rules in {:.1?}",
                    plans[2], sets[2], rules[2]
                );
            }
        }
    });
}
