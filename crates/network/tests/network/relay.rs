//! The relay in a real kernel: clients in a pod, outside, and on the node itself.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, TcpListener},
    time::Duration,
};

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use seawall_network::{
    proxy::{self, ProxyConfig, Relays, plan::plan, rules::Ruleset, state},
    relay::{self, ForProxy, Relay},
    verdict::{Verdict, Verdicts},
};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    common::{enter, sh, until},
    net::{Net, echoes, inside},
};

const SERVICE: &str = "10.96.0.9:80";
const SERVICE6: &str = "[fd00:96::9]:80";
const NODE_PORT: &str = "192.168.77.1:30005";
const NODE_PORT6: &str = "[fd00::1]:30005";
const BOTH: &[&str] = &["10.244.1.2", "10.244.2.2", "fd00:1::2", "fd00:2::2"];

fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// The Service `s` with endpoints at these addresses, `10.244.N.x` and `fd00:N::x` being on the node `nN`, which is this
/// one if it is `n1`.
fn known(annotations: Value, spec: Value, endpoints: &[&str]) -> proxy::State {
    let mut known = proxy::State::default();
    let annotations = match annotations {
        Value::Null => json!({"seawall.dev/relay": "true"}),
        given => given,
    };
    let service: Service =
        object(json!({"metadata": {"name": "s", "namespace": "n", "annotations": annotations}, "spec": spec}));
    for (family, mark, part) in [("IPv4", '.', 2), ("IPv6", ':', 1)] {
        let node = |address: &str| format!("n{}", address.split(mark).nth(part).unwrap());
        let endpoints = endpoints.iter().filter(|address| address.contains(mark));
        let endpoints: Vec<_> = endpoints.map(|a| json!({"addresses": [a], "nodeName": node(a)})).collect();
        let slice: EndpointSlice = object(json!({
            "metadata": {"name": format!("s-{family}"), "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": family, "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
        }));
        known.slices.extend([state::slice(slice)]);
    }
    let pods = ["10.244.1.0/24", "fd00:1::/64"];
    let node: Node = object(json!({"metadata": {"name": "n1"}, "spec": {"podCIDRs": pods}}));
    known.services.extend([state::service(service)]);
    known.nodes.extend([state::machine(node)]);
    known
}

fn service() -> Value {
    json!({"type": "NodePort", "clusterIPs": ["10.96.0.9", "fd00:96::9"], "ports": [{"port": 80, "nodePort": 30005}]})
}

struct Running {
    relay: Relay,
    link: ForProxy,
    config: ProxyConfig,
    verdicts: watch::Sender<Verdicts>,
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
    applied: Option<Ruleset>,
}

impl Running {
    async fn start() -> Running {
        let (mut link, for_relay) = relay::link(false);
        let (verdicts, heard) = watch::channel(Verdicts::default());
        let relay = Relay::new(relay::Config::default(), for_relay, heard);
        let stop = CancellationToken::new();
        let (runs, until) = (relay.clone(), stop.clone());
        let task = tokio::spawn(async move { runs.run(until).await });
        let listens = link.listens.wait_for(Option::is_some).await.unwrap().unwrap();
        let config = ProxyConfig {
            node_name: "n1".into(),
            node_ips: vec!["192.168.77.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            cluster_cidrs: ["10.244.0.0/16", "fd00:1::/64", "fd00:2::/64"].map(|net| net.parse().unwrap()).to_vec(),
            relays: Some(Relays { listens, default: false }),
            ..Default::default()
        };
        Running { relay, link, config, verdicts, stop, task, applied: None }
    }

    /// What the proxy does when something changed.
    async fn apply(&mut self, known: &proxy::State, verdicts: &BTreeMap<String, Verdict>) {
        let view = proxy::endpoints::View::new(known, "n1", verdicts);
        self.link.tables.send_replace(self.config.relayed(&view).unwrap().into());
        let wanted = plan(known, &self.config, verdicts);
        proxy::nft(&self.config, &wanted.script(self.applied.as_ref())).await.unwrap();
        assert!(proxy::intact(&self.config, &wanted).await);
        self.applied = Some(wanted);
    }

    fn count(&self, name: &str) -> u64 {
        let text = self.relay.render();
        let line = text.lines().find(|l| l.starts_with(&format!("seawall_relay_{name} "))).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

fn on_node(net: &Net, work: impl Future<Output = ()>) {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
    enter(&net.namespace("node"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(work);
    runtime.shutdown_timeout(Duration::from_secs(1));
}

/// Tests block on connections, so what serves them needs threads of its own.
async fn blocking<T: Send + 'static>(net: &std::sync::Arc<Net>, work: impl FnOnce(&Net) -> T + Send + 'static) -> T {
    let net = net.clone();
    tokio::task::spawn_blocking(move || work(&net)).await.unwrap()
}

#[test]
fn connections_are_taken_and_find_an_endpoint_that_answers() {
    let net = Net::new();
    net.echo("pod1");
    net.echo("pod2");
    let net = std::sync::Arc::new(net);
    let both = ["pod1", "pod2"];
    on_node(&net, async {
        // Addresses of connections then have flow labels.
        assert!(net.command("node", &["sysctl", "-qw", "net.ipv6.flowlabel_reflect=1"]).status().unwrap().success());
        let mut relay = Running::start().await;
        assert!(relay.config.relays.unwrap().listens.six);
        let nobody = BTreeMap::new();
        relay.apply(&known(Value::Null, service(), BOTH), &nobody).await;
        // From outside, from a pod (also to itself), and from the node.
        for (host, to) in [
            ("client", [SERVICE, SERVICE6]),
            ("client", [NODE_PORT, NODE_PORT6]),
            ("pod1", [SERVICE, SERVICE6]),
            ("pod1", [NODE_PORT, NODE_PORT6]),
            ("node", [SERVICE, SERVICE6]),
            ("node", [NODE_PORT, NODE_PORT6]),
        ]
        .into_iter()
        .flat_map(|(host, both)| both.map(|to| (host, to)))
        {
            let before = relay.count("connections_total");
            assert_eq!(blocking(&net, move |net| net.answers(host, to)).await, both, "from {host} to {to}");
            assert!(relay.count("connections_total") >= before + 24, "from {host} to {to}: not by the relay");
            assert!(blocking(&net, move |net| echoes(&mut net.connect(host, to).unwrap().1)).await);
        }
        assert_eq!(relay.count("retried_total"), 0);

        // One that refuses, one that is not there at all: nobody notices.
        let bad = ["10.244.1.9", "10.244.2.2", "10.244.2.9", "fd00:1::9", "fd00:2::2", "fd00:2::9"];
        sh(&format!(
            "ip -n {0} addr add 10.244.2.9/32 dev eth0; ip -n {0} addr add fd00:2::9/128 dev eth0 nodad; \
            ip netns exec {0} nft add table inet filter; \
            ip netns exec {0} nft 'add chain inet filter i {{ type filter hook input priority 0; }}'; \
            ip netns exec {0} nft add rule inet filter i ip daddr 10.244.2.9 reject with tcp reset; \
            ip netns exec {0} nft add rule inet filter i ip6 daddr fd00:2::9 reject with tcp reset",
            net.namespace("pod2")
        ));
        relay.apply(&known(Value::Null, service(), &bad), &nobody).await;
        let four = [("client", SERVICE), ("client", NODE_PORT), ("pod1", SERVICE), ("node", SERVICE)];
        let six = [("client", SERVICE6), ("client", NODE_PORT6), ("pod1", SERVICE6), ("node", SERVICE6)];
        let all = || four.into_iter().chain(six);
        for (host, to) in all() {
            let began = Instant::now();
            assert_eq!(blocking(&net, move |net| net.answers(host, to)).await, ["pod2"], "from {host} to {to}");
            eprintln!("24 connections from {host} to {to}, two of three endpoints bad: {:?}", began.elapsed());
        }
        assert!(relay.count("retried_total") > 0);
        assert_eq!(relay.count("failed_total"), 0);

        // A machine falls silent under open connections: they are reset with the verdict, new ones do not even wait.
        relay.apply(&known(Value::Null, service(), BOTH), &nobody).await;
        for (host, to) in ["client", "pod1", "node"].into_iter().flat_map(|host| [(host, SERVICE), (host, SERVICE6)]) {
            let mut open = blocking(&net, move |net| net.connect_to(host, to, "pod2")).await;
            let mut other = blocking(&net, move |net| net.connect_to(host, to, "pod1")).await;
            net.silence("pod2", true);
            let began = Instant::now();
            assert_eq!(blocking(&net, move |net| net.answers(host, to)).await, ["pod1"]);
            eprintln!("24 connections from {host} to {to} before the verdict: {:?}", began.elapsed());
            let dead = BTreeMap::from([("n2".to_owned(), Verdict::Dead)]);
            let began = Instant::now();
            relay.verdicts.send_replace(dead.into());
            let error = blocking(&net, move |_| open.read(&mut [0; 8]).unwrap_err()).await;
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            eprintln!("an idle connection from {host} was reset {:?} after the verdict", began.elapsed());
            assert!(blocking(&net, move |_| echoes(&mut other)).await);
            net.silence("pod2", false);
            relay.verdicts.send_replace(Verdicts::default());
        }
        assert_eq!(relay.count("dead_total"), 6);

        // A process of the node serves.
        net.echo("node");
        relay.apply(&known(Value::Null, service(), &["192.168.77.1", "fd00::1"]), &nobody).await;
        for (host, to) in all() {
            assert_eq!(blocking(&net, move |net| net.answers(host, to)).await, ["node"], "from {host} to {to}");
        }
        relay.apply(&known(Value::Null, service(), BOTH), &nobody).await;

        // The relay goes: what comes from elsewhere is served by the rules; open connections are broken off.
        let mut open = blocking(&net, |net| net.connect("client", SERVICE).unwrap().1).await;
        let link = relay.link.clone();
        relay.stop().await;
        assert_eq!(*link.listens.borrow(), None);
        assert!(blocking(&net, move |_| open.read(&mut [0; 8]).is_err()).await);
        for (host, to) in all().filter(|(host, _)| *host != "node") {
            assert_eq!(blocking(&net, move |net| net.answers(host, to)).await, both, "from {host} to {to}");
        }
        relay::kernel::remove().await.unwrap();
        for family in ["-4", "-6"] {
            for words in [&["rule"][..], &["route", "show", "table", "all"]] {
                let said = std::process::Command::new("ip").arg(family).args(words).output().unwrap();
                let said = String::from_utf8_lossy(&said.stdout).into_owned();
                assert!(!said.contains("8383"), "{family} {words:?}: {said}");
            }
        }
        relay::kernel::remove().await.unwrap();
    });
}

#[test]
fn a_machine_without_ipv6_relays_the_rest() {
    let net = Net::new();
    net.echo("pod1");
    let net = std::sync::Arc::new(net);
    on_node(&net, async {
        let off = ["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.lo.disable_ipv6=1"];
        assert!(net.command("node", &off).status().unwrap().success());
        let mut relay = Running::start().await;
        assert!(!relay.config.relays.unwrap().listens.six);
        relay.apply(&known(Value::Null, service(), BOTH), &BTreeMap::new()).await;
        assert!(blocking(&net, |net| net.connect("client", SERVICE).is_ok()).await);
        assert_eq!(relay.count("connections_total"), 1);
        relay.stop().await;
        relay::kernel::remove().await.unwrap();
    });
}

#[test]
fn endpoints_see_the_client_as_they_do_without_the_relay() {
    let net = Net::new();
    let heard = [net.listen("pod1"), net.listen("pod2")];
    let net = std::sync::Arc::new(net);
    on_node(&net, async {
        let mut relay = Running::start().await;
        let nobody = BTreeMap::new();
        type Both = [&'static str; 2];
        let check = async |to_pod: usize, host: &'static str, to: Both, from: Both, header: Option<Both>| {
            for family in 0..2 {
                let (to, from) = (to[family], from[family]);
                blocking(&net, move |net| net.connect(host, to).unwrap().1.write_all(b"hi").unwrap()).await;
                let (seen, mut said) = heard[to_pod].recv_timeout(Duration::from_secs(10)).unwrap();
                assert_eq!(seen.to_string(), from, "from {host} to {to}");
                if let Some(client) = header {
                    let header: Vec<u8> = said.drain(..[28, 52][family]).collect();
                    assert_eq!(&header[..12], b"\r\n\r\n\0\r\nQUIT\n");
                    let ip: IpAddr = match family {
                        0 => <[u8; 4]>::try_from(&header[16..20]).unwrap().into(),
                        _ => <[u8; 16]>::try_from(&header[16..32]).unwrap().into(),
                    };
                    assert_eq!(ip.to_string(), client[family]);
                }
                assert_eq!(said, b"hi");
            }
        };
        let here = &["10.244.1.2", "fd00:1::2"][..];
        let there = &["10.244.2.2", "fd00:2::2"][..];
        let (service_at, node_port) = ([SERVICE, SERVICE6], [NODE_PORT, NODE_PORT6]);
        let (client, pod1) = (["192.168.77.2", "fd00::2"], ["10.244.1.2", "fd00:1::2"]);
        let (node_to_1, node_to_2) = (["10.244.1.1", "fd00:1::1"], ["10.244.2.1", "fd00:2::1"]);
        let mut spec = service();
        relay.apply(&known(Value::Null, spec.clone(), there), &nobody).await;
        check(1, "pod1", service_at, pod1, None).await;
        check(1, "client", node_port, node_to_2, None).await;
        check(1, "node", service_at, node_to_2, None).await;
        relay.apply(&known(Value::Null, spec.clone(), here), &nobody).await;
        check(0, "pod1", service_at, node_to_1, None).await;
        spec["externalTrafficPolicy"] = "Local".into();
        relay.apply(&known(Value::Null, spec.clone(), here), &nobody).await;
        check(0, "client", node_port, client, None).await;
        // The address in front, for those who asked for it.
        let asked = json!({"seawall.dev/relay": "true", "seawall.dev/relay-proxy-protocol": "v2"});
        relay.apply(&known(asked, service(), there), &nobody).await;
        check(1, "client", node_port, node_to_2, Some(client)).await;
        check(1, "pod1", service_at, pod1, Some(pod1)).await;
        relay.stop().await;
    });
}

#[test]
fn a_client_stays_with_its_endpoint_until_that_is_gone() {
    let net = Net::new();
    net.echo("pod1");
    net.echo("pod2");
    let net = std::sync::Arc::new(net);
    on_node(&net, async {
        let mut relay = Running::start().await;
        let spec =
            json!({"clusterIPs": ["10.96.0.9", "fd00:96::9"], "sessionAffinity": "ClientIP", "ports": [{"port": 80}]});
        let known = known(Value::Null, spec, BOTH);
        let nobody = BTreeMap::new();
        for to in [SERVICE, SERVICE6] {
            relay.apply(&known, &nobody).await;
            let seen = blocking(&net, move |net| net.answers("client", to)).await;
            assert_eq!(seen.len(), 1, "{seen:?}");
            let (node, other) = if seen == ["pod1"] { ("n1", None) } else { ("n2", Some("pod1")) };
            // This node does not doubt itself.
            let doubt = BTreeMap::from([(node.to_owned(), Verdict::Suspect)]);
            relay.apply(&known, &doubt).await;
            let expect = other.unwrap_or("pod1");
            until("it moved on", async || blocking(&net, move |net| net.answers("client", to)).await == [expect]).await;
        }
        relay.stop().await;
    });
}

/// The relay speaks to endpoints in the name of a pod, which knows nothing of it. Had the pod the same port, the relay's
/// socket would get the answers, for a minute after its end as well.
#[test]
fn the_relay_takes_no_port_that_a_pod_would_take() {
    let net = Net::new();
    net.echo("pod2");
    let net = std::sync::Arc::new(net);
    on_node(&net, async {
        let mut relay = Running::start().await;
        relay.apply(&known(Value::Null, service(), &["10.244.2.2", "fd00:2::2"]), &BTreeMap::new()).await;
        let range = net.command("pod1", &["sysctl", "-n", "net.ipv4.ip_local_port_range"]).output().unwrap().stdout;
        let range: Vec<u16> =
            String::from_utf8(range).unwrap().split_whitespace().map(|n| n.parse().unwrap()).collect();
        let both = [(SERVICE, "10.244.1.2", "10.244.2.2:8080"), (SERVICE6, "[fd00:1::2]", "[fd00:2::2]:8080")];
        for (service, pod, endpoint) in both {
            let held = blocking(&net, move |net| [(); 24].map(|()| net.connect("pod1", service).unwrap())).await;
            let words = ["ss", "-tnH", "dst", endpoint];
            let said = String::from_utf8(net.command("node", &words).output().unwrap().stdout).unwrap();
            let own = said.split_whitespace().filter_map(|word| word.strip_prefix(&format!("{pod}:")));
            let ports: Vec<u16> = own.map(|port| port.parse().unwrap()).collect();
            assert_eq!(ports.len(), held.len(), "{said}");
            assert!(!ports.iter().any(|port| (range[0]..=range[1]).contains(port)), "{range:?}: {ports:?}");
        }
        relay.stop().await;
    });
}

/// A client whose server ends connections may use its port again at once; the relay's end still waits for what may be on
/// its way.
#[test]
fn a_client_may_use_its_port_again() {
    let net = Net::new();
    let server = inside(&net.namespace("pod2"), || TcpListener::bind("[::]:8080").unwrap());
    std::thread::spawn(move || server.incoming().for_each(|stream| drop(stream.map(|mut s| s.write_all(b"bye")))));
    let net = std::sync::Arc::new(net);
    on_node(&net, async {
        let mut relay = Running::start().await;
        relay.apply(&known(Value::Null, service(), &["10.244.2.2", "fd00:2::2"]), &BTreeMap::new()).await;
        for (from, to) in [("10.244.1.2:5000", SERVICE), ("[fd00:1::2]:5000", SERVICE6)] {
            let [from, to] = [from, to].map(|address| address.parse::<std::net::SocketAddr>().unwrap());
            let turn = move || {
                let began = Instant::now();
                let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
                socket.set_reuse_address(true)?;
                socket.bind(&from.into())?;
                socket.connect_timeout(&to.into(), Duration::from_secs(10))?;
                let mut said = String::new();
                std::net::TcpStream::from(socket).read_to_string(&mut said)?;
                assert_eq!(said, "bye");
                std::io::Result::Ok(began.elapsed())
            };
            let turns =
                move |net: &Net| inside(&net.namespace("pod1"), move || (0..8).map(|_| turn().unwrap()).skip(1).min());
            let quickest = blocking(&net, turns).await.unwrap();
            assert!(quickest < Duration::from_millis(800), "the first packet is sent again: {quickest:?}");
        }
        relay.stop().await;
    });
}

/// Processor time of this process so far: clients, servers and relay together.
fn cpu() -> Duration {
    use nix::sys::resource::{UsageWho, getrusage};
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let of = |t: nix::sys::time::TimeVal| Duration::from_micros((t.tv_sec() * 1_000_000 + t.tv_usec()) as u64);
    of(usage.user_time()) + of(usage.system_time())
}

fn percentiles(mut all: Vec<Duration>) -> String {
    all.sort();
    let at = |share: usize| all[(all.len() - 1) * share / 100];
    format!("{:.0?} / {:.0?}", at(50), at(99))
}

/// `cargo nextest run -p seawall-network --run-ignored only what_it_costs --no-capture
/// --config profile.dev.package.seawall-network.opt-level=3`.
#[test]
#[ignore = "prints a table"]
fn what_it_costs() {
    const CONNECTIONS: usize = 4000;
    const TURNS: usize = 20_000;
    const BULK: usize = 4 << 30;
    let net = Net::new();
    net.echo("pod1");
    let sink = inside(&net.namespace("pod2"), || TcpListener::bind("0.0.0.0:8080").unwrap());
    std::thread::spawn(move || {
        for stream in sink.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let _ = stream.write_all(b"sink\n");
                let mut buffer = vec![0; 256 << 10];
                while stream.read(&mut buffer).is_ok_and(|n| n > 0) {}
                let _ = stream.write_all(b"done");
            });
        }
    });
    // One client makes more connections to one address than it has ports for in a minute. Ends that wait for what may still
    // be on its way would have it look for a free port for longer than everything else takes.
    for host in ["client", "node"] {
        assert!(net.command(host, &["sysctl", "-qw", "net.ipv4.tcp_max_tw_buckets=0"]).status().unwrap().success());
    }
    let net = std::sync::Arc::new(net);
    on_node(&net, async {
        let mut relay = Running::start().await;
        let nobody = BTreeMap::new();
        for relayed in ["false", "true"] {
            let how = if relayed == "true" { "relay   " } else { "nftables" };
            let annotations = json!({"seawall.dev/relay": relayed});
            relay.apply(&known(annotations.clone(), service(), &["10.244.1.2"]), &nobody).await;
            for threads in [1, 8] {
                let (began, used) = (Instant::now(), cpu());
                let all = blocking(&net, move |net| {
                    let namespace = net.namespace("client");
                    let each = move || {
                        inside(&namespace, move || {
                            let turn = |_| {
                                let began = Instant::now();
                                let mut stream = std::net::TcpStream::connect(SERVICE).unwrap();
                                stream.read_exact(&mut [0; 5]).unwrap();
                                began.elapsed()
                            };
                            (0..CONNECTIONS / threads).map(turn).collect::<Vec<_>>()
                        })
                    };
                    let running: Vec<_> = (0..threads).map(|_| std::thread::spawn(each.clone())).collect();
                    running.into_iter().flat_map(|r| r.join().unwrap()).collect::<Vec<_>>()
                })
                .await;
                println!(
                    "{how} {threads} clients: {:.0} connections/s, {:.0}/cpu s, first byte {} (median / 99 %)",
                    CONNECTIONS as f64 / began.elapsed().as_secs_f64(),
                    CONNECTIONS as f64 / (cpu() - used).as_secs_f64(),
                    percentiles(all)
                );
            }
            let used = cpu();
            let all = blocking(&net, |net| {
                let mut stream = net.connect("client", SERVICE).unwrap().1;
                let mut turn = || {
                    let began = Instant::now();
                    assert!(echoes(&mut stream));
                    began.elapsed()
                };
                (0..TURNS).map(|_| turn()).collect::<Vec<_>>()
            })
            .await;
            println!(
                "{how} question and answer on an open connection: {}, {:.1?} of cpu",
                percentiles(all),
                (cpu() - used) / TURNS as u32
            );
            relay.apply(&known(annotations, service(), &["10.244.2.2"]), &nobody).await;
            let (began, used) = (Instant::now(), cpu());
            blocking(&net, |net| {
                let mut stream = net.connect("client", SERVICE).unwrap().1;
                let chunk = vec![1; 256 << 10];
                (0..BULK / chunk.len()).for_each(|_| stream.write_all(&chunk).unwrap());
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                stream.read_exact(&mut [0; 4]).unwrap();
            })
            .await;
            let (took, used) = (began.elapsed().as_secs_f64(), (cpu() - used).as_secs_f64());
            println!(
                "{how} {} MiB one way: {:.0} MiB/s, {:.0} MiB per cpu s",
                BULK >> 20,
                (BULK >> 20) as f64 / took,
                (BULK >> 20) as f64 / used
            );
        }
        println!("{}", relay.relay.render());
        relay.stop().await;
    });
}
