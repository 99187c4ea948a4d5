//! The Node object: registration, status, and the lease that says "alive".
//!
//! <https://kubernetes.io/docs/reference/node/node-status/>

use std::{collections::BTreeMap, fs, path::Path};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::{
            ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec,
            NodeStatus, NodeSystemInfo,
        },
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time},
    },
};
use serde_json::json;

use crate::{
    NodeConfig,
    downward::Allocatable,
    fence::STOPS_WITHIN,
    image::architecture,
    pressure::{Pressure, meminfo},
};

/// What this machine is, as far as it does not change while we run.
#[derive(Clone, Debug)]
pub struct Machine {
    /// CPUs that we may use.
    pub cpus: i64,
    /// Bytes of memory.
    pub memory: i64,
    /// Bytes of disk under the data directory.
    pub disk: i64,
    info: NodeSystemInfo,
}

impl Machine {
    /// Looks at this machine.
    pub fn detect(data: &Path, runtime: &str) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let memory = meminfo(&read("/proc/meminfo"), "MemTotal").unwrap_or(0);
        let disk = nix::sys::statvfs::statvfs(data).map(|s| s.blocks() as i64 * s.fragment_size() as i64).unwrap_or(0);
        let machine_id = read("/etc/machine-id");
        let uuid = read("/sys/class/dmi/id/product_uuid");
        let os_image = os_release(&read("/etc/os-release"));
        let info = NodeSystemInfo {
            architecture: architecture().into(),
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            container_runtime_version: runtime.into(),
            kernel_version: read("/proc/sys/kernel/osrelease"),
            kube_proxy_version: String::new(),
            kubelet_version: format!("v1.37.0+seawall-{}", env!("CARGO_PKG_VERSION")),
            operating_system: "linux".into(),
            os_image,
            system_uuid: if uuid.is_empty() { machine_id.clone() } else { uuid },
            machine_id,
            ..Default::default()
        };
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as i64);
        Self { cpus, memory, disk, info }
    }

    /// What pods may use: all of it, for the agent does not know what else runs here.
    pub fn allocatable(&self) -> Allocatable {
        let milli = [("cpu", self.cpus), ("memory", self.memory), ("ephemeral-storage", self.disk)];
        Allocatable { milli: milli.into_iter().map(|(k, v)| (k.to_owned(), v.saturating_mul(1000))).collect() }
    }
}

fn os_release(text: &str) -> String {
    let name = text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="));
    name.map_or_else(|| "Linux".into(), |n| n.trim_matches('"').to_owned())
}

/// Why the node is not ready, `None` if it is.
pub type NotReady = Option<String>;

/// The labels that upstream's kubelet sets, and the configured ones.
fn labels(config: &NodeConfig) -> BTreeMap<String, String> {
    let mut labels = config.node_labels.clone();
    for (key, value) in [
        ("kubernetes.io/hostname", config.node_name.as_str()),
        ("kubernetes.io/arch", architecture()),
        ("kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", architecture()),
        ("beta.kubernetes.io/os", "linux"),
    ] {
        labels.insert(key.to_owned(), value.to_owned());
    }
    labels
}

/// The Node as it is registered.
pub fn registration(
    config: &NodeConfig,
    machine: &Machine,
    pressure: Pressure,
    not_ready: &NotReady,
    now: Timestamp,
) -> Node {
    let mut node = Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels(config)),
            ..Default::default()
        },
        spec: Some(NodeSpec { taints: Some(config.taints.clone()).filter(|t| !t.is_empty()), ..Default::default() }),
        status: None,
    };
    node.status = Some(status(&node, config, machine, pressure, not_ready, &[], now));
    node
}

/// A patch that brings an existing node's labels to ours, `None` if they are.
pub fn label_patch(node: &Node, config: &NodeConfig) -> Option<serde_json::Value> {
    let has = node.metadata.labels.clone().unwrap_or_default();
    let missing: BTreeMap<_, _> = labels(config).into_iter().filter(|(k, v)| has.get(k) != Some(v)).collect();
    (!missing.is_empty()).then(|| json!({"metadata": {"labels": missing}}))
}

/// The node's status.
pub fn status(
    node: &Node,
    config: &NodeConfig,
    machine: &Machine,
    pressure: Pressure,
    not_ready: &NotReady,
    images: &[(Vec<String>, u64)],
    now: Timestamp,
) -> NodeStatus {
    let old = node.status.clone().unwrap_or_default();
    let condition = |kind: &str, holds: bool, reason: &str, message: &str| {
        let value = if holds { "True" } else { "False" };
        let before = old.conditions.iter().flatten().find(|c| c.type_ == kind && c.status == value);
        NodeCondition {
            type_: kind.to_owned(),
            status: value.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_heartbeat_time: Some(Time(now)),
            last_transition_time: before.and_then(|c| c.last_transition_time.clone()).or(Some(Time(now))),
        }
    };
    let (memory_reason, memory_message) = match pressure.memory {
        true => ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
        false => ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
    };
    let (disk_reason, disk_message) = match pressure.disk {
        true => ("KubeletHasDiskPressure", "kubelet has disk pressure"),
        false => ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
    };
    let (pid_reason, pid_message) = match pressure.pids {
        true => ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
        false => ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
    };
    let ours = vec![
        condition("MemoryPressure", pressure.memory, memory_reason, memory_message),
        condition("DiskPressure", pressure.disk, disk_reason, disk_message),
        condition("PIDPressure", pressure.pids, pid_reason, pid_message),
        match not_ready {
            None => condition("Ready", true, "KubeletReady", "kubelet is posting ready status"),
            Some(why) => condition("Ready", false, "KubeletNotReady", why),
        },
    ];
    let others = old.conditions.iter().flatten().filter(|c| !ours.iter().any(|o| o.type_ == c.type_)).cloned();
    let conditions: Vec<_> = others.chain(ours.clone()).collect();
    let quantity = |value: i64| Quantity(value.to_string());
    let capacity: BTreeMap<_, _> = [
        ("cpu".to_owned(), quantity(machine.cpus)),
        ("memory".to_owned(), Quantity(format!("{}Ki", machine.memory / 1024))),
        ("ephemeral-storage".to_owned(), Quantity(format!("{}Ki", machine.disk / 1024))),
        ("pods".to_owned(), quantity(i64::from(config.max_pods))),
    ]
    .into();
    let address = |kind: &str, value: String| NodeAddress { type_: kind.to_owned(), address: value };
    NodeStatus {
        addresses: Some(vec![
            address("InternalIP", config.node_ip.to_string()),
            address("Hostname", config.node_name.clone()),
        ]),
        allocatable: Some(capacity.clone()),
        capacity: Some(capacity),
        conditions: Some(conditions),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(config.port) }),
        }),
        node_info: Some(machine.info.clone()),
        images: Some(
            images
                .iter()
                .map(|(names, size)| ContainerImage {
                    names: Some(names.clone()),
                    size_bytes: i64::try_from(*size).ok(),
                })
                .collect(),
        )
        .filter(|i: &Vec<_>| !i.is_empty()),
        ..old
    }
}

/// Whether two statuses differ in more than heartbeats.
pub fn differs(a: &NodeStatus, b: &NodeStatus) -> bool {
    let plain = |s: &NodeStatus| {
        let mut s = s.clone();
        s.conditions.iter_mut().flatten().for_each(|c| c.last_heartbeat_time = None);
        s
    };
    plain(a) != plain(b)
}

/// How long the lease holds without renewal, in seconds, as it says itself.
pub fn lease_seconds(config: &NodeConfig) -> i32 {
    i32::try_from(config.lease.as_secs()).unwrap_or(i32::MAX).max(1)
}

/// The node's lease, as created. `promise` is what it says about fencing.
pub fn lease(config: &NodeConfig, node_uid: &str, promise: Option<String>, now: Timestamp) -> Lease {
    let owner = OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: config.node_name.clone(),
        uid: node_uid.to_owned(),
        ..Default::default()
    };
    Lease {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            namespace: Some("kube-node-lease".into()),
            owner_references: Some(vec![owner]),
            annotations: promise.map(|promise| [(STOPS_WITHIN.to_owned(), promise)].into()),
            ..Default::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(config.node_name.clone()),
            lease_duration_seconds: Some(lease_seconds(config)),
            renew_time: Some(MicroTime(now)),
            ..Default::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsers() {
        assert_eq!(meminfo("MemTotal:       24681616 kB\nMemFree: 1 kB", "MemTotal"), Some(24_681_616 * 1024));
        assert_eq!(
            os_release("NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n"),
            "Debian GNU/Linux 12 (bookworm)"
        );
    }

    #[test]
    fn transitions_keep_their_time() {
        let config = NodeConfig::for_tests();
        let machine = Machine { cpus: 2, memory: 4 << 30, disk: 1 << 40, info: NodeSystemInfo::default() };
        let t = |s: i64| Timestamp::from_second(s).unwrap();
        let node = registration(&config, &machine, Pressure::default(), &Some("no network".into()), t(1));
        let first = node.status.clone().unwrap();
        let same = status(&node, &config, &machine, Pressure::default(), &Some("no network".into()), &[], t(2));
        assert!(!differs(&first, &same));
        let ready = status(&node, &config, &machine, Pressure::default(), &None, &[], t(3));
        assert!(differs(&first, &ready));
        let at = |s: &NodeStatus, k: &str| {
            let found = s.conditions.iter().flatten().find(|c| c.type_ == k).unwrap();
            found.last_transition_time.clone().unwrap().0
        };
        assert_eq!((at(&ready, "Ready"), at(&ready, "DiskPressure")), (t(3), t(1)));
        assert!(label_patch(&node, &config).is_none());
    }
}
