use super::*;
use crate::facts::{Endpoint, Port};

pub(crate) fn shape() -> Arc<Shape> {
    let ranges = ["10.96.0.0/16".parse().unwrap(), "10.244.0.0/16".parse().unwrap()];
    Arc::new(Shape::new("cluster.local", vec!["10.96.0.10".parse().unwrap()], ranges.into()).unwrap())
}

fn ips(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|ip| ip.parse().unwrap()).collect()
}

pub(crate) fn port(name: &str, protocol: &str, number: u16) -> Port {
    Port { name: name.into(), protocol: protocol.into(), number }
}

/// `namespace/name` with these addresses; without any, headless.
pub(crate) fn service(key: &str, addresses: &[&str], ports: &[Port]) -> Service {
    let (namespace, name) = key.split_once('/').unwrap();
    let (namespace, name) = (namespace.to_owned(), name.to_owned());
    let headless = addresses.is_empty();
    Service { namespace, name, cluster_ips: ips(addresses), headless, ports: ports.into(), ..Service::default() }
}

pub(crate) fn external(key: &str, to: &str) -> Service {
    Service { external: Some(to.into()), headless: false, ..service(key, &[], &[]) }
}

/// Host name (or none), address, readiness and node of an endpoint.
pub(crate) fn endpoint(hostname: &str, address: &str, ready: bool, node: &str) -> Endpoint {
    let hostname = Some(hostname.to_owned()).filter(|h| !h.is_empty());
    Endpoint { addresses: ips(&[address]), hostname, ready, node: Some(node.into()) }
}

pub(crate) fn slice(name: &str, service: &str, ports: &[Port], endpoints: &[Endpoint]) -> Slice {
    let (namespace, service) = service.split_once('/').unwrap();
    Slice {
        namespace: namespace.into(),
        name: name.into(),
        service: service.into(),
        ports: ports.into(),
        endpoints: endpoints.into(),
    }
}

fn hosts(book: &Book, key: &str) -> Vec<String> {
    match &book.zone().entry(key).unwrap().leads {
        Leads::Hosts(hosts) => hosts.iter().map(|h| format!("{} {}", h.label, h.ip)).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn services_come_and_go_with_all_that_leads_to_them() {
    let mut book = Book::new(shape());
    assert!(book.set_service(service("shop/web", &["10.96.0.7"], &[])));
    assert!(!book.set_service(service("shop/web", &["10.96.0.7"], &[])), "nothing new");
    assert!(book.set_service(service("shop/api", &["10.96.0.8"], &[])));
    let before = book.zone().clone();
    assert!(book.zone().has_namespace("shop"));
    assert!(book.set_service(service("shop/web", &["10.96.0.9"], &[])));
    let of = |book: &Book, ip: &str| book.zone().names_of(ip.parse().unwrap()).count();
    assert_eq!((of(&book, "10.96.0.7"), of(&book, "10.96.0.9")), (0, 1));
    assert!(book.remove_service(&("shop".into(), "web".into())));
    assert!(!book.remove_service(&("shop".into(), "web".into())));
    assert!(book.zone().has_namespace("shop") && of(&book, "10.96.0.9") == 0);
    assert!(book.replace_services(vec![service("other/x", &["10.96.0.5"], &[])]));
    assert!(!book.zone().has_namespace("shop") && book.zone().has_namespace("other"));
    assert_eq!(book.zone().len(), 1);
    // Who looks at the old one sees what it was.
    assert!(before.entry("web.shop").is_some() && before.entry("api.shop").is_some());
}

#[test]
fn slices_may_come_first_move_and_go() {
    let mut book = Book::new(shape());
    let two = |first: &str, second: &str| [endpoint("a", first, true, "n1"), endpoint("b", second, true, "n2")];
    assert!(!book.set_slice(slice("db-1", "shop/db", &[], &two("10.244.0.1", "10.244.0.2"))));
    assert!(book.set_service(service("shop/db", &[], &[])));
    assert_eq!(hosts(&book, "db.shop"), ["a 10.244.0.1", "b 10.244.0.2"]);
    // One that stands in two slices for a moment is one.
    assert!(!book.set_slice(slice("db-2", "shop/db", &[], &two("10.244.0.1", "10.244.0.2"))));
    assert_eq!(hosts(&book, "db.shop").len(), 2);
    // A slice that is given to another Service leaves the first.
    book.remove_slice(&slice("db-2", "shop/db", &[], &[]));
    book.set_service(service("shop/other", &[], &[]));
    assert!(book.set_slice(slice("db-1", "shop/other", &[], &two("10.244.0.1", "10.244.0.2"))));
    assert!(hosts(&book, "db.shop").is_empty());
    assert_eq!(hosts(&book, "other.shop").len(), 2);
    assert!(book.replace_slices(vec![slice("db-1", "shop/db", &[], &two("10.244.0.1", "10.244.0.3"))]));
    assert_eq!(hosts(&book, "db.shop"), ["a 10.244.0.1", "b 10.244.0.3"]);
    assert!(hosts(&book, "other.shop").is_empty());
    assert_eq!(book.zone().names_of("10.244.0.2".parse().unwrap()).count(), 0);
    assert!(book.remove_slice(&slice("db-1", "shop/db", &[], &[])));
    assert!(!book.remove_slice(&slice("db-1", "shop/db", &[], &[])));
    assert_eq!(book.zone().names_of("10.244.0.3".parse().unwrap()).count(), 0);
}

#[test]
fn a_domain() {
    assert!(Shape::new("", vec![], vec![]).is_err());
    assert!(Shape::new("a..b", vec![], vec![]).is_err());
    assert_eq!(Shape::new("Prod.Example.", vec![], vec![]).unwrap().domain, "prod.example");
}
