use super::*;
use crate::zone::{
    Book,
    tests::{endpoint, external, port, service, shape, slice},
};

fn book() -> Book {
    let mut book = Book::new(shape());
    let (http, dns) = (port("http", "tcp", 80), port("dns", "udp", 53));
    book.set_service(service("default/kubernetes", &["10.96.0.1"], &[port("https", "tcp", 443)]));
    book.set_service(service("shop/web", &["10.96.0.7", "fd00:96::7"], &[http.clone(), dns, port("", "tcp", 81)]));
    // A StatefulSet's.
    book.set_service(service("shop/db", &[], &[port("sql", "tcp", 5432)]));
    let members = [
        endpoint("db-0", "10.244.1.2", true, "n1"),
        endpoint("db-1", "10.244.2.2", true, "n2"),
        endpoint("db-2", "10.244.3.2", false, "n3"),
    ];
    book.set_slice(slice("db-1", "shop/db", &[port("sql", "tcp", 5432)], &members));
    book.set_slice(slice("db-6", "shop/db", &[port("sql", "tcp", 5432)], &[endpoint("db-0", "fd00::2", true, "n1")]));
    // Pods without names of their own.
    book.set_service(service("shop/plain", &[], &[]));
    book.set_slice(slice(
        "plain-1",
        "shop/plain",
        std::slice::from_ref(&http),
        &[endpoint("", "10.244.1.9", true, "n1")],
    ));
    let mut early = service("shop/early", &[], &[]);
    early.publish_not_ready = true;
    book.set_service(early);
    book.set_slice(slice("early-1", "shop/early", &[http], &[endpoint("early-0", "10.244.1.8", false, "n1")]));
    book.set_service(service("shop/nobody", &[], &[]));
    book.set_service(external("shop/bank", "api.bank.example"));
    book.set_service(external("shop/alias", "web.shop.svc.cluster.local"));
    book.set_service(external("shop/round", "again.shop.svc.cluster.local"));
    book.set_service(external("shop/again", "round.shop.svc.cluster.local"));
    book.set_service(external("shop/lost", "nobody.shop.svc.cluster.local"));
    book
}

/// Records as `name type data`, without what all have.
fn shown(records: &[Record]) -> Vec<String> {
    records.iter().map(|r| format!("{} {} {}", r.name, r.record_type(), r.data)).collect()
}

/// What is said: records, `-` for none of this type, `NXDOMAIN`, `> NAME` for what others know of it, `elsewhere`.
fn say(book: &Book, name: &str, asked: RecordType, turn: usize) -> Vec<String> {
    let name = Name::from_ascii(name).unwrap();
    match book.zone().answer(&name, asked, turn) {
        Answer::Found { answers, .. } if answers.is_empty() => vec!["-".into()],
        Answer::Found { answers, .. } => shown(&answers),
        Answer::NoName => vec!["NXDOMAIN".into()],
        Answer::Alias { records, target } => {
            shown(&records).into_iter().chain([format!("> {target}")]).collect::<Vec<_>>()
        }
        Answer::Elsewhere => vec!["elsewhere".into()],
    }
}

#[test]
fn the_specification() {
    use RecordType::{A, AAAA, ANY, CNAME, MX, NS, PTR, SOA, SRV, TXT};
    let book = book();
    let check = |name: &str, asked: RecordType, expect: &[&str]| {
        assert_eq!(say(&book, name, asked, 0), expect, "{name} {asked}");
    };
    // 2.1: the version.
    check("dns-version.cluster.local.", TXT, &["dns-version.cluster.local. TXT 1.1.0"]);
    check("dns-version.cluster.local.", A, &["-"]);
    // 2.3: Services with an address.
    check("web.shop.svc.cluster.local.", A, &["web.shop.svc.cluster.local. A 10.96.0.7"]);
    check("web.shop.svc.cluster.local.", AAAA, &["web.shop.svc.cluster.local. AAAA fd00:96::7"]);
    check("WEB.shop.SVC.Cluster.Local.", A, &["WEB.shop.SVC.Cluster.Local. A 10.96.0.7"]);
    check("kubernetes.default.svc.cluster.local.", AAAA, &["-"]);
    check("web.shop.svc.cluster.local.", MX, &["-"]);
    check("web.shop.svc.cluster.local.", SRV, &["-"]);
    let both = ["web.shop.svc.cluster.local. A 10.96.0.7", "web.shop.svc.cluster.local. AAAA fd00:96::7"];
    check("web.shop.svc.cluster.local.", ANY, &both);
    let to = "0 100 80 web.shop.svc.cluster.local.";
    let srv = "_http._tcp.web.shop.svc.cluster.local.";
    check(srv, SRV, &[&format!("{srv} SRV {to}")]);
    check("_dns._udp.web.shop.svc.cluster.local.", A, &["-"]);
    check("_http._udp.web.shop.svc.cluster.local.", SRV, &["NXDOMAIN"]);
    check("_tcp.web.shop.svc.cluster.local.", SRV, &["-"]);
    check("_sctp.web.shop.svc.cluster.local.", SRV, &["NXDOMAIN"]);
    check("_http.tcp.web.shop.svc.cluster.local.", SRV, &["NXDOMAIN"]);
    check("_._tcp.web.shop.svc.cluster.local.", SRV, &["NXDOMAIN"]);
    check("7.0.96.10.in-addr.arpa.", PTR, &["7.0.96.10.in-addr.arpa. PTR web.shop.svc.cluster.local."]);
    check("7.0.96.10.in-addr.arpa.", A, &["-"]);
    check("99.0.96.10.in-addr.arpa.", PTR, &["NXDOMAIN"]);
    check("1.2.0.192.in-addr.arpa.", PTR, &["elsewhere"]);
    // 2.4: headless Services, of which only endpoints count that are ready.
    let a = |ip: &str| format!("db.shop.svc.cluster.local. A {ip}");
    check("db.shop.svc.cluster.local.", A, &[&a("10.244.1.2"), &a("10.244.2.2")]);
    check("db.shop.svc.cluster.local.", AAAA, &["db.shop.svc.cluster.local. AAAA fd00::2"]);
    check("db-0.db.shop.svc.cluster.local.", A, &["db-0.db.shop.svc.cluster.local. A 10.244.1.2"]);
    check("db-0.db.shop.svc.cluster.local.", AAAA, &["db-0.db.shop.svc.cluster.local. AAAA fd00::2"]);
    check("db-1.db.shop.svc.cluster.local.", AAAA, &["-"]);
    check("db-2.db.shop.svc.cluster.local.", A, &["NXDOMAIN"]);
    let srv = "_sql._tcp.db.shop.svc.cluster.local.";
    let to = |host: &str| format!("{srv} SRV 0 33 5432 {host}.db.shop.svc.cluster.local.");
    check(srv, SRV, &[&to("db-0"), &to("db-1")]);
    check("2.2.244.10.in-addr.arpa.", PTR, &["2.2.244.10.in-addr.arpa. PTR db-1.db.shop.svc.cluster.local."]);
    check("plain.shop.svc.cluster.local.", A, &["plain.shop.svc.cluster.local. A 10.244.1.9"]);
    let own = "10-244-1-9.plain.shop.svc.cluster.local.";
    check(own, A, &[&format!("{own} A 10.244.1.9")]);
    check("early.shop.svc.cluster.local.", A, &["early.shop.svc.cluster.local. A 10.244.1.8"]);
    check("nobody.shop.svc.cluster.local.", A, &["NXDOMAIN"]);
    // 2.5: names that stand for others, known here or elsewhere.
    let way = "bank.shop.svc.cluster.local. CNAME api.bank.example.";
    check("bank.shop.svc.cluster.local.", A, &[way, "> api.bank.example."]);
    check("bank.shop.svc.cluster.local.", CNAME, &[way]);
    check("_http._tcp.bank.shop.svc.cluster.local.", SRV, &["NXDOMAIN"]);
    let way = "alias.shop.svc.cluster.local. CNAME web.shop.svc.cluster.local.";
    check("alias.shop.svc.cluster.local.", A, &[way, "web.shop.svc.cluster.local. A 10.96.0.7"]);
    check("lost.shop.svc.cluster.local.", A, &["lost.shop.svc.cluster.local. CNAME nobody.shop.svc.cluster.local."]);
    assert_eq!(say(&book, "round.shop.svc.cluster.local.", A, 0).len(), 1 + MOST_ALIASES, "a circle ends");
    // Pods by their addresses.
    check("10-244-1-9.shop.pod.cluster.local.", A, &["10-244-1-9.shop.pod.cluster.local. A 10.244.1.9"]);
    check("10-244-1-9.shop.pod.cluster.local.", AAAA, &["-"]);
    check("web.shop.pod.cluster.local.", A, &["NXDOMAIN"]);
    check("a.10-244-1-9.shop.pod.cluster.local.", A, &["NXDOMAIN"]);
    // What is above names that are there is there, what is not is not, and the rest is for others.
    for name in ["cluster.local.", "svc.cluster.local.", "shop.svc.cluster.local.", "pod.cluster.local."] {
        check(name, A, &["-"]);
    }
    for name in ["x.cluster.local.", "none.svc.cluster.local.", "x.shop.svc.cluster.local."] {
        check(name, A, &["NXDOMAIN"]);
    }
    check("example.com.shop.svc.cluster.local.", A, &["NXDOMAIN"]);
    check("a.web.shop.svc.cluster.local.", A, &["NXDOMAIN"]);
    check("a.b.c.d.web.shop.svc.cluster.local.", A, &["NXDOMAIN"]);
    for name in ["example.com.", "local.", ".", "mycluster.local.", "svc."] {
        check(name, A, &["elsewhere"]);
    }
    check("cluster.local.", NS, &["cluster.local. NS ns.dns.cluster.local."]);
    check("ns.dns.cluster.local.", A, &["ns.dns.cluster.local. A 10.96.0.10"]);
    assert!(say(&book, "cluster.local.", SOA, 0)[0].contains("SOA ns.dns.cluster.local. hostmaster.cluster.local."));
}

#[test]
fn clients_that_take_the_first_answer_are_spread() {
    let book = book();
    let first = |turn| say(&book, "db.shop.svc.cluster.local.", RecordType::A, turn)[0].clone();
    assert_ne!(first(0), first(1));
    assert_eq!(first(0), first(2));
}

#[test]
fn targets_come_with_their_addresses() {
    let book = book();
    let check = |name: &str, expect: &[&str]| {
        let name = Name::from_ascii(name).unwrap();
        let Answer::Found { additionals, .. } = book.zone().answer(&name, RecordType::SRV, 0) else { panic!("{name}") };
        assert_eq!(shown(&additionals), expect);
    };
    let both = ["web.shop.svc.cluster.local. A 10.96.0.7", "web.shop.svc.cluster.local. AAAA fd00:96::7"];
    check("_http._tcp.web.shop.svc.cluster.local.", &both);
    let hosts = [
        "db-0.db.shop.svc.cluster.local. A 10.244.1.2",
        "db-1.db.shop.svc.cluster.local. A 10.244.2.2",
        "db-0.db.shop.svc.cluster.local. AAAA fd00::2",
    ];
    check("_sql._tcp.db.shop.svc.cluster.local.", &hosts);
}

#[test]
fn pods_of_machines_that_are_dead_are_left_out_while_there_are_others() {
    let mut book = book();
    let all = |book: &Book| say(book, "db.shop.svc.cluster.local.", RecordType::A, 0).len();
    assert_eq!(all(&book), 2);
    assert!(book.avoid(["n1".to_owned()].into()));
    assert!(!book.avoid(["n1".to_owned()].into()));
    let left = say(&book, "db.shop.svc.cluster.local.", RecordType::A, 0);
    assert_eq!(left, ["db.shop.svc.cluster.local. A 10.244.2.2"]);
    // By its own name it is asked for itself.
    assert_eq!(say(&book, "db-0.db.shop.svc.cluster.local.", RecordType::A, 0).len(), 1);
    book.avoid(["n1".to_owned(), "n2".to_owned()].into());
    assert_eq!(all(&book), 2, "likelier that we see badly");
}

/// Labels of names that are there, and some of none.
const LABELS: [&str; 18] = [
    "svc",
    "pod",
    "shop",
    "default",
    "web",
    "db",
    "db-0",
    "db-2",
    "plain",
    "bank",
    "nobody",
    "_tcp",
    "_http",
    "_sql",
    "_",
    "10-244-1-9",
    "dns",
    "ns",
];

proptest::proptest! {
    #[test]
    fn whether_a_name_is_there_does_not_depend_on_the_type(labels in proptest::collection::vec(0..LABELS.len(), 0..6)) {
        let book = book();
        let labels: Vec<&str> = labels.into_iter().map(|i| LABELS[i]).chain(["cluster", "local"]).collect();
        let name = |labels: &[&str]| Name::from_ascii(labels.join(".") + ".").unwrap();
        let there = |labels: &[&str], asked| book.zone().answer(&name(labels), asked, 0) != Answer::NoName;
        let whole = there(&labels, RecordType::A);
        for asked in [RecordType::AAAA, RecordType::SRV, RecordType::TXT, RecordType::PTR, RecordType::ANY] {
            assert_eq!(there(&labels, asked), whole, "{labels:?} {asked}");
            assert_ne!(book.zone().answer(&name(&labels), asked, 0), Answer::Elsewhere, "{labels:?}");
        }
        // What is above a name that is there is there (RFC 8020).
        if whole && labels.len() > 2 {
            assert!(there(&labels[1..], RecordType::A), "{labels:?}");
        }
    }
}
