//! A server on the loopback, asked by real sockets, with others to ask that are made up here.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, SOA},
    },
};
use seawall_dns::{
    facts::{Endpoint, Service, Slice},
    forward::Forwarder,
    metrics::Metrics,
    resolver::Resolver,
    serve::{How, Sockets},
    settings::Settings,
    zone::{Book, Shape},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(10);

/// A server under test. It ends with the test.
struct Dns {
    address: SocketAddr,
    forwarder: Forwarder,
    metrics: Metrics,
    stop: CancellationToken,
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn zone() -> Book {
    let shape = Shape::new("cluster.local", vec!["10.96.0.10".parse().unwrap()], Vec::new()).unwrap();
    let mut book = Book::new(Arc::new(shape));
    let service = |name: &str| Service { namespace: "shop".into(), name: name.into(), ..Service::default() };
    book.set_service(Service { cluster_ips: vec!["10.96.0.7".parse().unwrap()], ..service("web") });
    book.set_service(Service { external: Some("good.example".into()), ..service("bank") });
    book.set_service(Service { headless: true, ..service("many") });
    let endpoint = |i: u8| Endpoint { addresses: vec![[10, 244, 0, i].into()], ready: true, ..Endpoint::default() };
    let endpoints = (0..200).map(endpoint).collect();
    book.set_slice(Slice {
        namespace: "shop".into(),
        name: "many-1".into(),
        service: "many".into(),
        endpoints,
        ..Slice::default()
    });
    book
}

impl Dns {
    fn start(upstream: &[SocketAddr]) -> Dns {
        let metrics = Metrics::default();
        let settings = Settings { upstream: upstream.to_vec(), ..Settings::default() };
        let forwarder = Forwarder::new(settings, metrics.clone());
        let zone = Arc::new(ArcSwap::from_pointee(zone().zone().clone()));
        let resolver = Resolver::new(zone, forwarder.clone(), metrics.clone());
        let sockets = Sockets::bind((Ipv4Addr::LOCALHOST, 0).into(), How::default()).unwrap();
        let (address, stop) = (sockets.address().unwrap(), CancellationToken::new());
        tokio::spawn(sockets.serve(resolver, stop.clone()));
        Dns { address, forwarder, metrics, stop }
    }

    async fn udp(&self, message: &Message) -> Message {
        Message::from_vec(&self.raw(&message.to_vec().unwrap()).await).unwrap()
    }

    async fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        socket.connect(self.address).await.unwrap();
        socket.send(bytes).await.unwrap();
        let mut buffer = vec![0; 65536];
        let len = timeout(LONG, socket.recv(&mut buffer)).await.expect("an answer").unwrap();
        buffer.truncate(len);
        buffer
    }

    async fn ask(&self, name: &str) -> Message {
        self.udp(&question(7, name, RecordType::A)).await
    }

    fn counted(&self, line: &str) -> u64 {
        let text = self.metrics.render();
        let line = text.lines().find_map(|l| l.strip_prefix(line)).unwrap_or_else(|| panic!("{line} in {text}"));
        line.trim().parse().unwrap()
    }
}

fn question(id: u16, name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn addresses(message: &Message) -> Vec<String> {
    message.answers.iter().map(|r| r.data.to_string()).collect()
}

async fn send(stream: &mut TcpStream, message: &Message) {
    let bytes = message.to_vec().unwrap();
    stream.write_u16(bytes.len() as u16).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
}

async fn receive(stream: &mut TcpStream) -> Message {
    let len = timeout(LONG, stream.read_u16()).await.expect("an answer").unwrap();
    let mut bytes = vec![0; len.into()];
    stream.read_exact(&mut bytes).await.unwrap();
    Message::from_vec(&bytes).unwrap()
}

/// How a server that others run behaves, by the first label of a name.
struct Other {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl Other {
    /// `good` has an address, `none` is not there, `large` comes by TCP only, `forged` is answered wrongly first, `fails`
    /// fails, `silent` is not answered; `refuse` makes all fail.
    async fn start(refuse: bool) -> Other {
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = udp.local_addr().unwrap();
        let tcp = TcpListener::bind(address).await.unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            loop {
                let (len, client) = udp.recv_from(&mut buffer).await.unwrap();
                count.fetch_add(1, SeqCst);
                let question = Message::from_vec(&buffer[..len]).unwrap();
                let name = question.queries[0].name.to_string();
                if name.starts_with("forged") {
                    let mut forged = answer(&question, false, true);
                    forged.metadata.id ^= 1;
                    forged.answers.clear();
                    udp.send_to(&forged.to_vec().unwrap(), client).await.unwrap();
                    udp.send_to(b"\0\0nonsense", client).await.unwrap();
                }
                if !name.starts_with("silent") {
                    let answer = answer(&question, refuse, true);
                    udp.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
                }
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let question = receive(&mut stream).await;
                send(&mut stream, &answer(&question, false, false)).await;
            }
        });
        Other { address, asked }
    }

    fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }
}

fn answer(question: &Message, refuse: bool, datagram: bool) -> Message {
    let mut out = Message::new(question.metadata.id, MessageType::Response, OpCode::Query);
    let name = question.queries[0].name.clone();
    out.add_query(question.queries[0].clone());
    let authority = SOA::new(name.clone(), name.clone(), 1, 1, 1, 1, 20);
    let address = |i: u8| Record::from_rdata(name.clone(), 60, RData::A(A::new(192, 0, 2, i)));
    match name.to_string().split('.').next().unwrap() {
        _ if refuse => out.metadata.response_code = ResponseCode::Refused,
        "fails" => out.metadata.response_code = ResponseCode::ServFail,
        "none" => {
            out.metadata.response_code = ResponseCode::NXDomain;
            out.add_authority(Record::from_rdata(name.clone(), 60, RData::SOA(authority)));
        }
        "large" if datagram => out.metadata.truncation = true,
        "large" => drop(out.add_answers((0..100).map(address))),
        _ => drop(out.add_answer(address(1))),
    }
    out
}

#[tokio::test]
async fn names_of_the_cluster() {
    let dns = Dns::start(&[]);
    let answer = dns.ask("web.shop.svc.cluster.local.").await;
    assert_eq!(addresses(&answer), ["10.96.0.7"]);
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available && answer.edns.is_none());
    let answer = dns.ask("nothing.shop.svc.cluster.local.").await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(answer.authorities[0].record_type(), RecordType::SOA);
    let answer = dns.udp(&question(9, "web.shop.svc.cluster.local.", RecordType::AAAA)).await;
    assert_eq!((answer.metadata.response_code, answer.authorities.len()), (ResponseCode::NoError, 1));
    assert_eq!(dns.counted("seawall_dns_answers_total{code=\"NXDOMAIN\"}"), 1);
    assert_eq!(dns.counted("seawall_dns_sources_total{from=\"cluster\"}"), 3);
}

#[tokio::test]
async fn large_answers_come_by_tcp() {
    let dns = Dns::start(&[]);
    let mut asked = question(7, "many.shop.svc.cluster.local.", RecordType::A);
    let plain = dns.udp(&asked).await;
    assert!(plain.metadata.truncation && plain.to_vec().unwrap().len() <= 512, "{}", plain.answers.len());
    asked.set_edns(Edns::new().set_max_payload(4096).clone());
    let more = dns.udp(&asked).await;
    assert!(more.metadata.truncation && more.answers.len() > plain.answers.len() && more.edns.is_some());
    let mut stream = TcpStream::connect(dns.address).await.unwrap();
    send(&mut stream, &asked).await;
    let whole = receive(&mut stream).await;
    assert_eq!((whole.answers.len(), whole.metadata.truncation), (200, false));
}

#[tokio::test]
async fn questions_of_a_connection_do_not_wait_for_each_other() {
    let other = Other::start(false).await;
    let dns = Dns::start(&[other.address]);
    let mut stream = TcpStream::connect(dns.address).await.unwrap();
    send(&mut stream, &question(1, "silent.example.", RecordType::A)).await;
    for id in 2..20 {
        send(&mut stream, &question(id, "web.shop.svc.cluster.local.", RecordType::A)).await;
    }
    for id in 2..20 {
        assert_eq!(receive(&mut stream).await.metadata.id, id);
    }
    // Who has said all is still answered.
    stream.shutdown().await.unwrap();
    let last = receive(&mut stream).await;
    assert_eq!((last.metadata.id, last.metadata.response_code), (1, ResponseCode::ServFail));
    assert!(stream.read_u8().await.is_err(), "then it is closed");
}

#[tokio::test]
async fn a_connection_that_says_nothing_useful_is_closed() {
    let dns = Dns::start(&[]);
    for bytes in [&b"\xff\xff"[..], b"\x00\x03abc", b"\x10\x01"] {
        let mut stream = TcpStream::connect(dns.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        assert!(timeout(LONG, stream.read_u8()).await.expect("it is closed").is_err(), "{bytes:?}");
    }
    // Malformed datagrams are answered with what is wrong, or not at all, and then all goes on.
    let mut bad = question(7, "a.example.", RecordType::A).to_vec().unwrap();
    bad.truncate(15);
    let answer = Message::from_vec(&dns.raw(&bad).await).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);
    let mut notify = question(7, "a.example.", RecordType::A);
    notify.metadata.op_code = OpCode::Notify;
    assert_eq!(dns.udp(&notify).await.metadata.response_code, ResponseCode::NotImp);
    assert_eq!(addresses(&dns.ask("web.shop.svc.cluster.local.").await), ["10.96.0.7"]);
}

#[tokio::test]
async fn others_are_asked_once() {
    let other = Other::start(false).await;
    let dns = Dns::start(&[other.address]);
    let answer = dns.ask("Good.Example.").await;
    assert_eq!(addresses(&answer), ["192.0.2.1"]);
    assert_eq!(answer.queries[0].name.to_string(), "Good.Example.", "as it was asked");
    assert!(!answer.metadata.authoritative && answer.answers[0].ttl > 50);
    assert_eq!(dns.ask("none.example.").await.metadata.response_code, ResponseCode::NXDomain);
    for _ in 0..5 {
        assert_eq!(addresses(&dns.ask("good.example.").await), ["192.0.2.1"]);
        assert_eq!(dns.ask("none.example.").await.metadata.response_code, ResponseCode::NXDomain);
    }
    assert_eq!(other.asked(), 2, "what is known is not asked for");
    assert_eq!(addresses(&dns.ask("bank.shop.svc.cluster.local.").await), ["good.example.", "192.0.2.1"]);
    assert_eq!(other.asked(), 2);
    // Many who want the same at a time are one question.
    let asked = question(7, "same.example.", RecordType::A);
    let all = futures::future::join_all((0..50).map(|_| dns.udp(&asked))).await;
    assert!(all.iter().all(|answer| addresses(answer) == ["192.0.2.1"]));
    assert!(other.asked() <= 4, "{}", other.asked());
    // Other servers may say something else.
    dns.forwarder.set(Settings::default());
    assert_eq!(dns.ask("good.example.").await.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn what_is_cut_off_is_asked_for_by_tcp() {
    let other = Other::start(false).await;
    let dns = Dns::start(&[other.address]);
    let mut asked = question(7, "large.example.", RecordType::A);
    assert!(dns.udp(&asked).await.metadata.truncation);
    let mut stream = TcpStream::connect(dns.address).await.unwrap();
    asked.metadata.id = 8;
    send(&mut stream, &asked).await;
    assert_eq!(receive(&mut stream).await.answers.len(), 100);
    assert_eq!(other.asked(), 1);
}

#[tokio::test]
async fn a_forged_answer_is_not_believed() {
    let other = Other::start(false).await;
    let dns = Dns::start(&[other.address]);
    assert_eq!(addresses(&dns.ask("forged.example.").await), ["192.0.2.1"]);
}

#[tokio::test]
async fn a_server_that_is_gone_silent_or_of_no_use_is_left() {
    let (refuses, good) = (Other::start(true).await, Other::start(false).await);
    // Nobody listens there.
    let gone = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let dns = Dns::start(&[gone, refuses.address, silent.local_addr().unwrap(), good.address]);
    let began = tokio::time::Instant::now();
    assert_eq!(addresses(&dns.ask("good.example.").await), ["192.0.2.1"]);
    assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
    assert_eq!(dns.ask("fails.example.").await.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn names_of_a_domain_are_asked_of_its_servers() {
    let (all, own) = (Other::start(false).await, Other::start(false).await);
    let dns = Dns::start(&[all.address]);
    let mut settings = Settings { upstream: vec![all.address], ..Settings::default() };
    settings.add_stub(&format!("corp.example={}", own.address)).unwrap();
    dns.forwarder.set(settings);
    dns.ask("a.corp.example.").await;
    assert_eq!((all.asked(), own.asked()), (0, 1));
    dns.ask("a.example.").await;
    assert_eq!((all.asked(), own.asked()), (1, 1));
}

#[tokio::test]
async fn a_client_that_asks_too_much_does_not_hold_others_up() {
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let dns = Dns::start(&[silent.local_addr().unwrap()]);
    let greedy = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    greedy.connect(dns.address).await.unwrap();
    // More than may be under way of one client: some are told so at once.
    let mut buffer = [0; 512];
    let mut told = 0;
    for id in 0..600u16 {
        let asked = question(id, &format!("silent{id}.example."), RecordType::A).to_vec().unwrap();
        greedy.send(&asked).await.unwrap();
        if id >= 256 {
            let len = timeout(LONG, greedy.recv(&mut buffer)).await.expect("it is told").unwrap();
            let answer = Message::from_vec(&buffer[..len]).unwrap();
            assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
            told += 1;
        }
    }
    assert_eq!(told, 344);
    assert_eq!(dns.counted("seawall_dns_refused_total"), 344);
    // Another one, and names of the cluster, are answered meanwhile.
    let another = UdpSocket::bind((IpAddr::from([127, 0, 0, 2]), 0)).await.unwrap();
    another.connect(dns.address).await.unwrap();
    another.send(&question(1, "web.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap()).await.unwrap();
    let len = timeout(LONG, another.recv(&mut buffer)).await.expect("an answer").unwrap();
    assert_eq!(addresses(&Message::from_vec(&buffer[..len]).unwrap()), ["10.96.0.7"]);
    assert_eq!(addresses(&dns.ask("web.shop.svc.cluster.local.").await), ["10.96.0.7"]);
}
