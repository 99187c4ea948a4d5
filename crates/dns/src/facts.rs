//! What DNS has to know of Services and EndpointSlices, and no more of them.

use std::net::IpAddr;

/// Namespace and name.
pub type Key = (String, String);

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its addresses; none of a headless one.
    pub cluster_ips: Vec<IpAddr>,
    /// Whether its names lead to its endpoints.
    pub headless: bool,
    /// The name that it stands for, if it is of type `ExternalName`.
    pub external: Option<String>,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Whether endpoints count that are not ready.
    pub publish_not_ready: bool,
}

/// A port of a Service or of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Port {
    /// Its name; empty if it has none.
    pub name: String,
    /// Its protocol, in lower case.
    pub protocol: String,
    /// Its number.
    pub number: u16,
}

/// An EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Whose endpoints it has.
    pub service: String,
    /// The ports of its endpoints.
    pub ports: Vec<Port>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// An endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it is.
    pub addresses: Vec<IpAddr>,
    /// The name by which it is found below its Service.
    pub hostname: Option<String>,
    /// Whether it takes connections.
    pub ready: bool,
    /// The machine that it is on.
    pub node: Option<String>,
}

/// Objects of the API become facts.
#[cfg(feature = "cluster")]
mod objects {
    use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};

    use super::{Endpoint, Port, Service, Slice};

    /// The label that says whose endpoints a slice has.
    const OWNER: &str = "kubernetes.io/service-name";

    fn port(name: Option<&String>, protocol: Option<&String>, number: i32) -> Option<Port> {
        Some(Port {
            name: name.map(|n| n.to_ascii_lowercase()).unwrap_or_default(),
            protocol: protocol.map_or("tcp".to_owned(), |p| p.to_ascii_lowercase()),
            number: u16::try_from(number).ok()?,
        })
    }

    impl From<&core::Service> for Service {
        fn from(object: &core::Service) -> Service {
            let (namespace, name) = (object.metadata.namespace.clone(), object.metadata.name.clone());
            let mut service = Service {
                namespace: namespace.unwrap_or_default(),
                name: name.unwrap_or_default(),
                ..Service::default()
            };
            let Some(spec) = &object.spec else { return service };
            if spec.type_.as_deref() == Some("ExternalName") {
                service.external = spec.external_name.clone().filter(|name| !name.is_empty());
                return service;
            }
            let own = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
            service.headless = spec.cluster_ip.as_deref() == Some("None");
            for ip in own.filter_map(|ip| ip.parse().ok()) {
                if !service.cluster_ips.contains(&ip) {
                    service.cluster_ips.push(ip);
                }
            }
            let ports = spec.ports.iter().flatten();
            service.ports = ports.filter_map(|p| port(p.name.as_ref(), p.protocol.as_ref(), p.port)).collect();
            service.publish_not_ready = spec.publish_not_ready_addresses == Some(true);
            service
        }
    }

    impl From<&discovery::EndpointSlice> for Slice {
        fn from(object: &discovery::EndpointSlice) -> Slice {
            let (namespace, name) = (object.metadata.namespace.clone(), object.metadata.name.clone());
            let owner = object.metadata.labels.as_ref().and_then(|labels| labels.get(OWNER));
            let listed = object.endpoints.iter().flatten();
            let endpoints = listed.map(|e| Endpoint {
                addresses: e.addresses.iter().filter_map(|a| a.parse().ok()).collect(),
                hostname: e.hostname.as_ref().filter(|h| !h.is_empty()).map(|h| h.to_ascii_lowercase()),
                // What is not said is ready, as the API has it.
                ready: e.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true),
                node: e.node_name.clone(),
            });
            // Slices of names are not for DNS.
            let endpoints = if object.address_type == "FQDN" { Vec::new() } else { endpoints.collect() };
            let ports = object.ports.iter().flatten();
            Slice {
                namespace: namespace.unwrap_or_default(),
                name: name.unwrap_or_default(),
                service: owner.cloned().unwrap_or_default(),
                ports: ports.filter_map(|p| port(p.name.as_ref(), p.protocol.as_ref(), p.port?)).collect(),
                endpoints,
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use serde_json::json;

        use super::*;

        #[test]
        fn of_objects() {
            let object = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": {"clusterIP": "10.96.0.9",
                "clusterIPs": ["10.96.0.9", "fd00::9"], "ports": [{"name": "http", "port": 80}]}});
            let service = Service::from(&serde_json::from_value::<core::Service>(object).unwrap());
            let http = Port { name: "http".into(), protocol: "tcp".into(), number: 80 };
            assert_eq!(service.ports, [http]);
            assert_eq!(service.cluster_ips.len(), 2);
            assert!(!service.headless && service.external.is_none());
            let object = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": {"clusterIP": "None", "clusterIPs": ["None"],
                "publishNotReadyAddresses": true}});
            let service = Service::from(&serde_json::from_value::<core::Service>(object).unwrap());
            assert!(service.headless && service.publish_not_ready && service.cluster_ips.is_empty());
            let slice = json!({"metadata": {"name": "s-1", "namespace": "n", "labels": {OWNER: "s"}}, "addressType": "IPv4",
                "ports": [{"name": "db", "port": 5432, "protocol": "TCP"}],
                "endpoints": [{"addresses": ["10.244.0.2"], "hostname": "db-0", "nodeName": "a"},
                    {"addresses": ["10.244.0.3"], "conditions": {"ready": false}}]});
            let slice = Slice::from(&serde_json::from_value::<discovery::EndpointSlice>(slice).unwrap());
            assert_eq!(
                (slice.service.as_str(), slice.endpoints[0].ready, slice.endpoints[1].ready),
                ("s", true, false)
            );
            assert_eq!(slice.endpoints[0].hostname.as_deref(), Some("db-0"));
        }
    }
}
