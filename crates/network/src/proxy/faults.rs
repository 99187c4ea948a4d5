//! What of Services and EndpointSlices is not used since it makes no sense, in words for the log. Pure.

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};

use super::family::Family;

/// So many are named.
const NAMED: usize = 3;

fn list(bad: &[&str]) -> String {
    let named = bad.iter().take(NAMED).map(|text| format!("{text:?}")).collect::<Vec<_>>().join(", ");
    match bad.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

fn is_address(text: &&str) -> bool {
    Family::ALL.iter().any(|family| family.parse(text).is_some())
}

/// What is wrong with a Service.
pub fn of_service(service: &Service) -> Option<String> {
    let spec = service.spec.as_ref().filter(|s| s.type_.as_deref() != Some("ExternalName"))?;
    let own = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    let own = own.map(String::as_str).filter(|ip| !ip.is_empty() && *ip != "None");
    let balancers = service.status.as_ref().and_then(|s| s.load_balancer.as_ref()).and_then(|l| l.ingress.as_ref());
    let balancers = balancers.into_iter().flatten().filter_map(|i| i.ip.as_deref());
    let external = spec.external_ips.iter().flatten().map(String::as_str);
    let bad: Vec<&str> = own.chain(external).chain(balancers).filter(|ip| !is_address(ip)).collect();
    (!bad.is_empty()).then(|| format!("no addresses: {}", list(&bad)))
}

/// What is wrong with a slice.
pub fn of_slice(slice: &EndpointSlice) -> Option<String> {
    let Some(family) = Family::named(&slice.address_type) else {
        return Some(format!("endpoints of the type {:?} are not served", slice.address_type));
    };
    let first = slice.endpoints.iter().flatten().filter_map(|e| e.addresses.first()).map(String::as_str);
    let bad: Vec<&str> = first.filter(|ip| family.parse(ip).is_none()).collect();
    (!bad.is_empty()).then(|| format!("no addresses of {}: {}", family.name(), list(&bad)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn of_services() {
        let check = |spec: Value, status: Value, expect: Option<&str>| {
            let service = json!({"spec": spec, "status": status});
            assert_eq!(of_service(&serde_json::from_value(service).unwrap()).as_deref(), expect);
        };
        check(json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00::9"]}), json!({}), None);
        check(json!({"clusterIP": "None", "clusterIPs": ["None"]}), json!({}), None);
        check(json!({"clusterIP": ""}), json!({}), None);
        check(json!({"type": "ExternalName", "clusterIP": "x"}), json!({}), None);
        check(json!({"clusterIPs": ["10.96.0.9", "fd00:"]}), json!({}), Some("no addresses: \"fd00:\""));
        let ingress = json!({"loadBalancer": {"ingress": [{"ip": "d"}, {"hostname": "e"}]}});
        check(
            json!({"clusterIPs": ["a"], "externalIPs": ["b", "c", "fd00::1"]}),
            ingress,
            Some("no addresses: \"a\", \"b\", \"c\" and 1 more"),
        );
    }

    #[test]
    fn of_slices() {
        let check = |kind: &str, addresses: &[&str], expect: Option<&str>| {
            let endpoints: Vec<Value> = addresses.iter().map(|a| json!({"addresses": [a]})).collect();
            let slice = json!({"metadata": {"name": "s"}, "addressType": kind, "endpoints": endpoints});
            assert_eq!(of_slice(&serde_json::from_value(slice).unwrap()).as_deref(), expect);
        };
        check("IPv4", &["10.244.0.2"], None);
        check("IPv6", &["fd00::2"], None);
        check("IPv4", &["10.244.0.2", "fd00::2"], Some("no addresses of IPv4: \"fd00::2\""));
        check(
            "IPv6",
            &["10.244.0.2", "::ffff:10.244.0.2"],
            Some("no addresses of IPv6: \"10.244.0.2\", \"::ffff:10.244.0.2\""),
        );
        check("FQDN", &["example.org"], Some("endpoints of the type \"FQDN\" are not served"));
    }
}
