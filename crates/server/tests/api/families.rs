//! Services of a cluster with addresses of both families.

use http::Method;
use serde_json::{Value, json};

use super::harness::Api;

const SERVICES: &str = "/api/v1/namespaces/default/services";
const ADDRESSES: &str = "/apis/networking.k8s.io/v1/ipaddresses";

async fn dual(ranges: &str) -> Api {
    Api::configured(|config| config.service_cidr = ranges.parse().unwrap()).await
}

fn service(name: &str, mut spec: Value) -> Value {
    spec["ports"] = json!([{"port": 80}]);
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
}

fn ips(service: &Value) -> Vec<String> {
    let list = service["spec"]["clusterIPs"].as_array().into_iter().flatten();
    list.map(|ip| ip.as_str().unwrap().to_owned()).collect()
}

async fn taken(api: &Api) -> Vec<String> {
    let list = api.call(Method::GET, ADDRESSES, "", Value::Null).await.1;
    let items = list["items"].as_array().unwrap().iter();
    items.map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_service_has_an_address_of_each_family_that_it_asks_for() {
    let api = dual("10.96.0.0/24,fd00:96::/112").await;
    // The cluster's own.
    let kubernetes = api.call(Method::GET, &format!("{SERVICES}/kubernetes"), "", Value::Null).await.1;
    assert_eq!(ips(&kubernetes), ["10.96.0.1"]);
    assert_eq!(kubernetes["spec"]["ipFamilyPolicy"], "SingleStack");
    let range = api.call(Method::GET, "/apis/networking.k8s.io/v1/servicecidrs/kubernetes", "", Value::Null).await.1;
    assert_eq!(range["spec"]["cidrs"], json!(["10.96.0.0/24", "fd00:96::/112"]));

    let single = api.create(SERVICES, service("single", json!({}))).await;
    assert_eq!((ips(&single).len(), &single["spec"]["ipFamilies"]), (1, &json!(["IPv4"])));
    let six = api.create(SERVICES, service("six", json!({"ipFamilies": ["IPv6"]}))).await;
    assert!(ips(&six).len() == 1 && ips(&six)[0].starts_with("fd00:96::"), "{six}");
    let both = api.create(SERVICES, service("both", json!({"ipFamilyPolicy": "PreferDualStack"}))).await;
    let [four, second] = &ips(&both)[..] else { panic!("{both}") };
    assert!(four.starts_with("10.96.0.") && second.starts_with("fd00:96::"), "{both}");
    assert_eq!(both["spec"]["clusterIP"], **four);
    assert_eq!(both["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
    let turned = json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6", "IPv4"]});
    let turned = api.create(SERVICES, service("turned", turned)).await;
    assert!(ips(&turned)[0].starts_with("fd00:96::") && ips(&turned)[1].starts_with("10.96.0."), "{turned}");
    let headless = json!({"clusterIP": "None", "selector": {"a": "b"}, "ipFamilyPolicy": "PreferDualStack"});
    let headless = api.create(SERVICES, service("headless", headless)).await;
    assert_eq!((ips(&headless), &headless["spec"]["ipFamilies"]), (vec!["None".into()], &json!(["IPv4", "IPv6"])));

    // Second addresses are somebody's as the first ones are.
    assert!(taken(&api).await.contains(second));
    let wish =
        |name: &str, ips: &[&str]| service(name, json!({"ipFamilyPolicy": "PreferDualStack", "clusterIPs": ips}));
    let (code, _, why) = api.fails(Method::POST, SERVICES, wish("thief", &["10.96.0.7", second])).await;
    assert!(code == 422 && why.contains(&format!("failed to allocate IP {second}: provided IP is already")), "{why}");
    assert!(!taken(&api).await.contains(&"10.96.0.7".to_owned()), "what was taken before the error is given back");
    let (_, _, why) = api.fails(Method::POST, SERVICES, wish("far", &["10.96.0.7", "fd00:97::1"])).await;
    assert!(why.contains("The range of valid IPs is fd00:96::/112"), "{why}");
    api.create(SERVICES, wish("chosen", &["fd00:96::7", "10.96.0.7"])).await;
}

#[tokio::test]
async fn a_second_address_comes_and_goes() {
    let api = dual("fd00:96::/112,10.96.0.0/24").await;
    let made = api.create(SERVICES, service("web", json!({}))).await;
    let first = ips(&made)[0].clone();
    assert!(first.starts_with("fd00:96::"), "the first range is the default: {made}");
    let path = format!("{SERVICES}/web");
    let patch =
        async |spec: Value| api.call(Method::PATCH, &path, "application/merge-patch+json", json!({"spec": spec})).await;
    let (_, two) = patch(json!({"ipFamilyPolicy": "RequireDualStack"})).await;
    let second = ips(&two)[1].clone();
    assert!(ips(&two)[0] == first && second.starts_with("10.96.0."), "{two}");
    // A client that leaves out what it does not know of keeps both.
    let (_, kept) = api.call(Method::PUT, &path, "application/json", service("web", json!({}))).await;
    assert_eq!(ips(&kept), [&*first, &*second]);
    let (code, why) = patch(json!({"clusterIPs": [first]})).await;
    assert_eq!(code, 422, "{why}");
    let (code, why) = patch(json!({"clusterIPs": [first, "10.96.0.9"]})).await;
    assert!(code == 422 && why["message"].as_str().unwrap().contains("may not change once set"), "{why}");
    let (_, one) = patch(json!({"ipFamilyPolicy": "SingleStack"})).await;
    assert_eq!((ips(&one), &one["spec"]["ipFamilies"]), (vec![first.clone()], &json!(["IPv6"])));
    assert!(!taken(&api).await.contains(&second) && taken(&api).await.contains(&first));
    patch(json!({"ipFamilyPolicy": "PreferDualStack"})).await;
    assert_eq!(taken(&api).await.len(), 3, "and the API's own");
    api.call(Method::DELETE, &path, "", Value::Null).await;
    assert_eq!(taken(&api).await.len(), 1, "both are given back");
}
