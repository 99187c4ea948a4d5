use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use seawall_api::certificate_request::{CLIENT, KUBELET_CLIENT, KUBELET_SERVING};
use serde_json::{Value, json};

use super::plan::*;

const NOW: &str = "2026-03-01T12:00:00Z";
const TOKEN: (&str, &str) = ("system:bootstrap:abcdef", "system:bootstrappers");
const NODE_A: (&str, &str) = ("system:node:a", "system:nodes");

fn request(name: &str, organization: &str, names: &[&str]) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = Default::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, organization);
    params.subject_alt_names = names
        .iter()
        .map(|n| n.parse().map_or_else(|_| SanType::DnsName((*n).try_into().unwrap()), SanType::IpAddress))
        .collect();
    STANDARD.encode(params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap())
}

/// A request of `user` to `signer`.
fn csr(user: (&str, &str), signer: &str, request: &str, status: Value) -> Value {
    let purpose = if signer == KUBELET_SERVING { "server auth" } else { "client auth" };
    json!({"metadata": {"name": "r", "creationTimestamp": "2026-03-01T11:00:00Z"}, "status": status, "spec": {
        "request": request, "signerName": signer, "usages": ["digital signature", purpose],
        "username": user.0, "groups": [user.1, "system:authenticated"]}})
}

fn run(csr: &Value, nodes: &[Value], servers: &[&str]) -> Plan {
    let nodes: Vec<_> = nodes.iter().map(|n| std::sync::Arc::new(serde_json::from_value(n.clone()).unwrap())).collect();
    let servers: Vec<_> = servers.iter().map(|s| s.parse().unwrap()).collect();
    let ranges = ["10.244.0.0/16".parse().unwrap(), "10.96.0.0/16".parse().unwrap()];
    let facts = Facts { nodes: &nodes, servers: &servers, ranges: &ranges, now: NOW.parse().unwrap() };
    plan(&serde_json::from_value(csr.clone()).unwrap(), None, &facts)
}

fn node(name: &str, addresses: &[(&str, &str)]) -> Value {
    let list: Vec<Value> = addresses.iter().map(|(ty, address)| json!({"type": ty, "address": address})).collect();
    json!({"metadata": {"name": name}, "status": {"addresses": list}})
}

#[test]
fn who_gets_a_client_certificate() {
    let check = |user: (&str, &str), name: &str, organization: &str, expect: Step| {
        let csr = csr(user, KUBELET_CLIENT, &request(name, organization, &[]), json!({}));
        assert_eq!(run(&csr, &[], &[]).step, expect, "{user:?} {name} {organization}");
    };
    let approved = Step::Approve("Auto approving kubelet client certificate.");
    check(TOKEN, "system:node:a", "system:nodes", approved.clone());
    check(("admin", "system:masters"), "system:node:a", "system:nodes", approved);
    let own = Step::Approve("Auto approving self kubelet client certificate.");
    check(NODE_A, "system:node:a", "system:nodes", own);
    check(NODE_A, "system:node:b", "system:nodes", Step::Nothing);
    // The name alone is not enough.
    check(("system:node:a", "dev"), "system:node:a", "system:nodes", Step::Nothing);
    check(("jane", "dev"), "system:node:a", "system:nodes", Step::Nothing);
    check(TOKEN, "system:node:a", "system:masters", Step::Nothing);
    check(TOKEN, "admin", "system:nodes", Step::Nothing);
    let Step::Leave(why) =
        run(&csr(TOKEN, KUBELET_CLIENT, &request("system:node:", "system:nodes", &[]), json!({})), &[], &[]).step
    else {
        panic!("a node without a name")
    };
    assert!(why.starts_with("\"\" cannot be the name of a node: "), "{why}");
    let person = csr(("jane", "dev"), CLIENT, &request("jane", "dev", &[]), json!({}));
    assert_eq!(run(&person, &[], &[]).step, Step::Nothing, "an administrator decides");
}

#[test]
fn whose_names_a_serving_certificate_may_have() {
    let own = [("Hostname", "a"), ("InternalIP", "192.168.0.1"), ("InternalDNS", "a.lan"), ("ExternalIP", "fd00::1")];
    let greedy = [
        ("Hostname", "kubernetes"),
        ("InternalDNS", "web.default.svc"),
        ("InternalDNS", "localhost"),
        ("InternalDNS", "*.lan"),
        ("InternalDNS", "b"),
        ("InternalDNS", "b.lan"),
        ("InternalIP", "10.96.0.1"),
        ("InternalIP", "10.244.0.9"),
        ("InternalIP", "127.0.0.1"),
        ("InternalIP", "192.168.0.2"),
        ("InternalIP", "192.168.0.9"),
    ];
    let other = node("b", &[("InternalIP", "192.168.0.2"), ("InternalDNS", "b.lan")]);
    let check = |user: (&str, &str), addresses: &[(&str, &str)], names: &[&str], expect: Result<(), &str>| {
        let request = request("system:node:a", "system:nodes", names);
        let csr = csr(user, KUBELET_SERVING, &request, json!({}));
        let nodes = [node("a", addresses), other.clone()];
        let found = run(&csr, &nodes, &["192.168.0.9"]).step;
        match expect {
            Ok(()) => assert!(matches!(found, Step::Approve(_)), "{names:?}: {found:?}"),
            Err(why) => assert_eq!(found, Step::Leave(why.into()), "{names:?}"),
        }
    };
    check(NODE_A, &own, &["a", "192.168.0.1"], Ok(()));
    check(NODE_A, &own, &["a", "a.lan", "192.168.0.1", "fd00::1"], Ok(()));
    check(NODE_A, &own, &["a", "192.168.0.3"], Err("192.168.0.3 is not in status.addresses of Node \"a\""));
    check(NODE_A, &own, &["c"], Err("\"c\" is not in status.addresses of Node \"a\""));
    check(NODE_A, &greedy, &["kubernetes"], Err("\"kubernetes\" is a name of the cluster's own"));
    check(NODE_A, &greedy, &["localhost"], Err("\"localhost\" is a name of the cluster's own"));
    check(NODE_A, &greedy, &["web.default.svc"], Err("\"web.default.svc\" is a name of the cluster's own"));
    check(NODE_A, &greedy, &["*.lan"], Err("\"*.lan\" is not the name of a host"));
    check(NODE_A, &greedy, &["b"], Err("\"b\" belongs to Node \"b\""));
    check(NODE_A, &greedy, &["b.lan"], Err("\"b.lan\" belongs to Node \"b\""));
    check(NODE_A, &greedy, &["10.96.0.1"], Err("10.96.0.1 lies in 10.96.0.0/16, which is for pods or Services"));
    check(NODE_A, &greedy, &["10.244.0.9"], Err("10.244.0.9 lies in 10.244.0.0/16, which is for pods or Services"));
    check(NODE_A, &greedy, &["127.0.0.1"], Err("127.0.0.1 is not the address of a machine"));
    check(NODE_A, &greedy, &["192.168.0.2"], Err("192.168.0.2 belongs to Node \"b\""));
    check(
        NODE_A,
        &greedy,
        &["192.168.0.9"],
        Err(
            "192.168.0.9 is the address of an API server, and Node \"a\" has no label node-role.kubernetes.io/control-plane",
        ),
    );
    // Nobody gets one for somebody else, or before the node is there.
    let request = request("system:node:a", "system:nodes", &["a"]);
    let of = |user| csr(user, KUBELET_SERVING, &request, json!({}));
    assert_eq!(run(&of(TOKEN), &[node("a", &own)], &[]).step, Step::Nothing);
    assert_eq!(run(&of(("system:node:b", "system:nodes")), &[node("a", &own)], &[]).step, Step::Nothing);
    assert_eq!(run(&of(NODE_A), &[], &[]).step, Step::Nothing, "its Node will come");
    assert_eq!(run(&of(NODE_A), &[node("a", &[])], &[]).step, Step::Nothing, "its addresses will come");
    let mut server = node("a", &[("InternalIP", "192.168.0.9")]);
    server["metadata"]["labels"] = json!({"node-role.kubernetes.io/control-plane": ""});
    let request = super::plan_tests::request("system:node:a", "system:nodes", &["192.168.0.9"]);
    let found = run(&csr(NODE_A, KUBELET_SERVING, &request, json!({})), &[server], &["192.168.0.9"]).step;
    assert!(matches!(found, Step::Approve(_)), "{found:?}");
}

fn conditions(list: &[(&str, &str)]) -> Value {
    let list: Vec<Value> =
        list.iter().map(|(ty, at)| json!({"type": ty, "status": "True", "lastUpdateTime": at})).collect();
    json!({"conditions": list})
}

#[test]
fn what_was_approved_is_signed_or_fails() {
    let check = |signer: &str, request: &str, list: &[&str], expect: Step| {
        let list: Vec<_> = list.iter().map(|ty| (*ty, NOW)).collect();
        let csr = csr(("jane", "dev"), signer, request, conditions(&list));
        assert_eq!(run(&csr, &[], &[]).step, expect, "{signer} {list:?}");
    };
    let jane = request("jane", "dev", &[]);
    check(CLIENT, &jane, &["Approved"], Step::Sign);
    check(CLIENT, &jane, &["Denied"], Step::Nothing);
    check(CLIENT, &jane, &["Approved", "Failed"], Step::Nothing);
    check("example.com/own", &jane, &["Approved"], Step::Nothing);
    check(KUBELET_CLIENT, &jane, &["Approved"], Step::Fail("subject organization is not system:nodes".into()));
    check(CLIENT, "", &["Approved"], Step::Fail("PEM block type must be CERTIFICATE REQUEST".into()));
    let mut issued = conditions(&[("Approved", NOW)]);
    issued["certificate"] = "QQ==".into();
    assert_eq!(run(&csr(("jane", "dev"), CLIENT, &jane, issued), &[], &[]).step, Step::Nothing);
}

#[test]
fn how_long_requests_are_kept() {
    use std::time::Duration;
    let jane = request("jane", "dev", &[]);
    let check =
        |created: &str, list: &[(&str, &str)], issued: bool, until: Option<&str>, expect: Result<u64, &'static str>| {
            let mut status = conditions(list);
            if issued {
                status["certificate"] = "QQ==".into();
            }
            let mut csr = csr(("jane", "dev"), CLIENT, &jane, status);
            csr["metadata"]["creationTimestamp"] = created.into();
            let facts = Facts { nodes: &[], servers: &[], ranges: &[], now: NOW.parse().unwrap() };
            let found = plan(&serde_json::from_value(csr).unwrap(), until.map(|t| t.parse().unwrap()), &facts);
            match expect {
                Ok(seconds) => assert_eq!(found.again, Some(Duration::from_secs(seconds)), "{created} {list:?}"),
                Err(why) => assert_eq!(found.step, Step::Delete(why), "{created} {list:?}"),
            }
        };
    let (today, yesterday, hour) = ("2026-03-01T11:00:00Z", "2026-02-28T12:00:00Z", "2026-03-01T11:00:00Z");
    check(today, &[], false, None, Ok(23 * 3600));
    check(yesterday, &[], false, None, Err("nobody has approved it for a day"));
    check(yesterday, &[("Approved", "2026-03-01T11:30:00Z")], true, Some("2027-01-01T00:00:00Z"), Ok(1800));
    check(yesterday, &[("Approved", hour)], true, Some("2027-01-01T00:00:00Z"), Err("it was answered an hour ago"));
    check(today, &[("Approved", NOW)], true, Some(NOW), Err("its certificate has expired"));
    check(today, &[("Denied", hour)], false, None, Err("it was denied an hour ago"));
    check(today, &[("Denied", "2026-03-01T11:59:00Z")], false, None, Ok(3540));
    check(today, &[("Approved", NOW), ("Failed", hour)], false, None, Err("it failed an hour ago"));
    check(today, &[("Approved", yesterday)], false, None, Err("it was approved a day ago and nobody signed it"));
    check(today, &[("Approved", hour)], false, None, Ok(23 * 3600));
}
