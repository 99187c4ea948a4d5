//! What the runtime is told about a pod's sandbox: host name, DNS, ports, namespaces, cgroup. Pure, but for reading the
//! host's resolv.conf.

use std::{collections::HashMap, fs, path::Path};

use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::{Pod, PodSpec};

use crate::{
    NodeConfig,
    cgroup::Cgroups,
    cri::label,
    pod::{self, qos},
};

/// A pod's host name: its own, cut to what the kernel takes.
pub fn hostname(pod: &Pod, spec: &PodSpec, node_name: &str) -> String {
    if let Some(name) = spec.hostname_override.as_ref().filter(|n| !n.is_empty()) {
        return name.clone();
    }
    if spec.host_network == Some(true) {
        return node_name.to_owned();
    }
    let name = spec.hostname.as_deref().filter(|h| !h.is_empty()).unwrap_or(pod::name(pod));
    name.chars().take(63).collect::<String>().trim_end_matches(['-', '.']).to_owned()
}

/// The directory of a pod's logs.
pub fn log_directory(config: &NodeConfig, namespace: &str, name: &str, uid: &str) -> std::path::PathBuf {
    config.log_dir.join(format!("{namespace}_{name}_{uid}"))
}

/// The labels by which sandbox and containers are found again.
pub fn labels(pod: &Pod) -> HashMap<String, String> {
    let mut labels: HashMap<String, String> = pod.metadata.labels.clone().unwrap_or_default().into_iter().collect();
    labels.insert(label::POD_NAME.into(), pod::name(pod).into());
    labels.insert(label::POD_NAMESPACE.into(), pod::namespace(pod).into());
    labels.insert(label::POD_UID.into(), pod::uid(pod).into());
    labels
}

/// Which namespaces the pod's containers share, and with whom.
pub fn namespaces(spec: &PodSpec) -> cri::NamespaceOption {
    use cri::NamespaceMode as Mode;
    let host = |flag: Option<bool>, otherwise: Mode| if flag == Some(true) { Mode::Node } else { otherwise } as i32;
    let pid = if spec.share_process_namespace == Some(true) { Mode::Pod } else { Mode::Container };
    cri::NamespaceOption {
        network: host(spec.host_network, Mode::Pod),
        pid: host(spec.host_pid, pid),
        ipc: host(spec.host_ipc, Mode::Pod),
        ..Default::default()
    }
}

/// The sandbox's configuration; `attempt` distinguishes it from its predecessors.
pub fn config(pod: &Pod, spec: &PodSpec, node: &NodeConfig, attempt: u32) -> cri::PodSandboxConfig {
    let (namespace, name, uid) = (pod::namespace(pod), pod::name(pod), pod::uid(pod));
    let security = spec.security_context.as_ref();
    let limits = qos::pod_limits(pod);
    let privileged =
        pod::containers(spec).any(|c| c.spec.security_context.as_ref().and_then(|s| s.privileged) == Some(true));
    let int = |v: Option<i64>| v.map(|value| cri::Int64Value { value });
    let mut sysctls: HashMap<String, String> = security
        .and_then(|s| s.sysctls.as_ref())
        .into_iter()
        .flatten()
        .map(|s| (s.name.clone(), s.value.clone()))
        .collect();
    if spec.host_network == Some(true) {
        sysctls.retain(|name, _| !name.starts_with("net."));
    }
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.into(),
            uid: uid.into(),
            namespace: namespace.into(),
            attempt,
        }),
        hostname: if spec.host_network == Some(true) { String::new() } else { hostname(pod, spec, &node.node_name) },
        log_directory: log_directory(node, namespace, name, uid).display().to_string(),
        dns_config: Some(dns(spec, namespace, node, &host_resolv_conf())),
        port_mappings: if spec.host_network == Some(true) { Vec::new() } else { port_mappings(spec) },
        labels: labels(pod),
        annotations: pod.metadata.annotations.clone().unwrap_or_default().into_iter().collect(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: Cgroups::detect(&node.cgroup_root).pod_path(qos::class(pod), uid),
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(spec)),
                // The pause program needs no user, but files made for the sandbox (shm) follow it.
                run_as_user: int(security.and_then(|s| s.run_as_user)),
                run_as_group: int(security.and_then(|s| s.run_as_group))
                    .filter(|_| security.is_some_and(|s| s.run_as_user.is_some())),
                supplemental_groups: supplemental_groups(spec),
                privileged,
                seccomp: Some(cri::SecurityProfile {
                    profile_type: cri::security_profile::ProfileType::RuntimeDefault as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            sysctls,
            resources: Some(cri::LinuxContainerResources {
                cpu_shares: limits.cpu_shares,
                cpu_quota: limits.cpu_quota,
                cpu_period: qos::CPU_PERIOD,
                memory_limit_in_bytes: limits.memory,
                ..Default::default()
            }),
            ..Default::default()
        }),
        windows: None,
    }
}

/// fsGroup and supplementalGroups.
pub fn supplemental_groups(spec: &PodSpec) -> Vec<i64> {
    let security = spec.security_context.as_ref();
    let mut groups = security.and_then(|s| s.supplemental_groups.clone()).unwrap_or_default();
    groups.extend(security.and_then(|s| s.fs_group));
    groups
}

fn port_mappings(spec: &PodSpec) -> Vec<cri::PortMapping> {
    let ports = pod::containers(spec).flat_map(|c| c.spec.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let protocol = match port.protocol.as_deref() {
                Some("UDP") => cri::Protocol::Udp,
                Some("SCTP") => cri::Protocol::Sctp,
                _ => cri::Protocol::Tcp,
            };
            port.host_port.filter(|p| *p > 0).map(|host_port| cri::PortMapping {
                protocol: protocol as i32,
                container_port: port.container_port,
                host_port,
                host_ip: port.host_ip.clone().unwrap_or_default(),
            })
        })
        .collect()
}

/// systemd-resolved's stub only answers on the host's loopback, which a pod does not have.
fn host_resolv_conf() -> String {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let real = Path::new("/run/systemd/resolve/resolv.conf");
    if text.contains("nameserver 127.0.0.53") && real.exists() {
        fs::read_to_string(real).unwrap_or(text)
    } else {
        text
    }
}

fn parse_resolv_conf(text: &str) -> cri::DnsConfig {
    let mut dns = cri::DnsConfig::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
            // The last one counts.
            Some("search" | "domain") => dns.searches = words.map(str::to_owned).collect(),
            Some("options") => dns.options = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    dns
}

/// <https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/#pod-s-dns-policy>
fn dns(spec: &PodSpec, namespace: &str, node: &NodeConfig, resolv_conf: &str) -> cri::DnsConfig {
    let host = parse_resolv_conf(resolv_conf);
    let host_network = spec.host_network == Some(true);
    let cluster = !node.cluster_dns.is_empty();
    let mut dns = match spec.dns_policy.as_deref().unwrap_or("ClusterFirst") {
        "None" => cri::DnsConfig::default(),
        "ClusterFirst" if host_network => host,
        "ClusterFirst" | "ClusterFirstWithHostNet" if cluster => {
            let domain = node.cluster_domain.trim_end_matches('.');
            let mut searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
            for search in host.searches {
                if !searches.contains(&search) {
                    searches.push(search);
                }
            }
            cri::DnsConfig {
                servers: node.cluster_dns.iter().map(ToString::to_string).collect(),
                searches,
                options: vec!["ndots:5".into()],
            }
        }
        _ => host,
    };
    if let Some(more) = &spec.dns_config {
        for server in more.nameservers.iter().flatten().filter(|s| !s.is_empty()) {
            if !dns.servers.contains(server) {
                dns.servers.push(server.clone());
            }
        }
        for search in more.searches.iter().flatten() {
            if !dns.searches.contains(search) {
                dns.searches.push(search.clone());
            }
        }
        for option in more.options.iter().flatten() {
            let name = option.name.clone().unwrap_or_default();
            dns.options.retain(|o| o.split(':').next() != Some(name.as_str()));
            dns.options.push(match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name,
            });
        }
    }
    dns
}

/// The pod's /etc/hosts.
/// <https://kubernetes.io/docs/tasks/network/customize-hosts-file-for-pods/>
pub fn hosts_file(pod: &Pod, spec: &PodSpec, ips: &[String], node: &NodeConfig) -> String {
    let mut text = if spec.host_network == Some(true) {
        format!(
            "# Kubernetes-managed hosts file (host network).\n{}",
            fs::read_to_string("/etc/hosts").unwrap_or_default()
        )
    } else {
        let mut text = "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n".to_owned();
        let name = hostname(pod, spec, &node.node_name);
        for ip in ips {
            match spec.subdomain.as_deref().filter(|s| !s.is_empty()) {
                Some(sub) => {
                    let domain = format!("{sub}.{}.svc.{}", pod::namespace(pod), node.cluster_domain);
                    text.push_str(&format!("{ip}\t{name}.{domain}\t{name}\n"));
                }
                None => text.push_str(&format!("{ip}\t{name}\n")),
            }
        }
        text
    };
    let aliases = spec.host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            text.push_str(&format!("{}\t{}\n", alias.ip, alias.hostnames.as_deref().unwrap_or_default().join("\t")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "web-0", "namespace": "shop", "uid": "u"}, "spec": spec}))
            .unwrap()
    }

    #[test]
    fn dns_policies() {
        let mut node = NodeConfig::for_tests();
        node.cluster_dns = vec!["10.96.0.10".parse().unwrap()];
        let host = "nameserver 192.0.2.1\nsearch example.org\noptions edns0\n";
        let check = |spec: serde_json::Value, servers: &[&str], searches: &[&str], options: &[&str]| {
            let dns = dns(&pod(spec).spec.unwrap(), "shop", &node, host);
            assert_eq!((dns.servers, dns.searches, dns.options), (own(servers), own(searches), own(options)));
        };
        fn own(list: &[&str]) -> Vec<String> {
            list.iter().map(|s| (*s).to_owned()).collect()
        }
        let cluster = ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.org"];
        check(json!({"containers": []}), &["10.96.0.10"], &cluster, &["ndots:5"]);
        check(json!({"containers": [], "hostNetwork": true}), &["192.0.2.1"], &["example.org"], &["edns0"]);
        let both = json!({"containers": [], "hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"});
        check(both, &["10.96.0.10"], &cluster, &["ndots:5"]);
        let own = json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.1.1.1"], "searches": ["a"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}});
        check(own, &["1.1.1.1"], &["a"], &["ndots:2", "edns0"]);
    }

    #[test]
    fn hosts() {
        let node = NodeConfig::for_tests();
        let p = pod(
            json!({"containers": [], "subdomain": "web", "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]}),
        );
        let text = hosts_file(&p, p.spec.as_ref().unwrap(), &["10.0.0.2".into()], &node);
        assert!(text.contains("10.0.0.2\tweb-0.web.shop.svc.cluster.local\tweb-0\n"), "{text}");
        assert!(text.ends_with("# Entries added by HostAliases.\n1.2.3.4\ta\tb\n"), "{text}");
    }

    #[test]
    fn host_ports() {
        let p = pod(
            json!({"containers": [{"name": "a", "ports": [{"containerPort": 80, "hostPort": 8080}, {"containerPort": 81}]}]}),
        );
        let mappings = port_mappings(p.spec.as_ref().unwrap());
        assert_eq!(mappings.len(), 1);
        assert_eq!((mappings[0].container_port, mappings[0].host_port), (80, 8080));
    }
}
