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
use serde_json::{Value, json};

use crate::{
    NodeConfig,
    admission::fit::is_extended,
    devices::state::Amounts,
    downward::Allocatable,
    fence::STOPS_WITHIN,
    huge_pages,
    image::architecture,
    pressure::{Pressure, meminfo},
    reserved,
};

/// What this machine is, as far as it does not change while we run.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// CPUs that we may use.
    pub cpus: i64,
    /// Bytes of memory.
    pub memory: i64,
    /// Bytes of disk under the data directory.
    pub disk: i64,
    /// Bytes in huge pages, by the size of a page; they are part of the memory.
    pub huge_pages: BTreeMap<u64, u64>,
    info: NodeSystemInfo,
}

impl Machine {
    /// Looks at this machine.
    pub fn detect(data: &Path, runtime: &str) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let memory = memory();
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
        let huge_pages = huge_pages::detect(Path::new(huge_pages::SYSTEM));
        Self { cpus: cpus(), memory, disk, huge_pages, info }
    }

    /// What pods may use: what there is, without what is kept for others.
    pub fn allocatable(&self, config: &NodeConfig) -> Allocatable {
        let all = [("cpu", self.cpus), ("memory", self.memory), ("ephemeral-storage", self.disk)];
        let all = all.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(self.in_huge_pages());
        let capacity = all.map(|(name, value)| (name, value.saturating_mul(1000))).collect();
        let mut milli = reserved::allocatable(&capacity, &config.reserved, &config.eviction.hard);
        // What is set aside in huge pages can be used as nothing else.
        let huge = self.in_huge_pages().fold(0i64, |sum, (_, bytes)| sum.saturating_add(bytes));
        if let Some(memory) = milli.get_mut("memory") {
            *memory = memory.saturating_sub(huge.saturating_mul(1000)).max(0);
        }
        Allocatable { milli }
    }

    /// Bytes in huge pages, by the name of the resource.
    fn in_huge_pages(&self) -> impl Iterator<Item = (String, i64)> {
        let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.huge_pages.iter().map(move |(size, all)| (huge_pages::resource(*size), bytes(*all)))
    }
}

/// How many CPUs there are for us.
pub fn cpus() -> i64 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as i64)
}

/// Bytes of memory.
pub fn memory() -> i64 {
    meminfo(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal").unwrap_or(0)
}

fn os_release(text: &str) -> String {
    let name = text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="));
    name.map_or_else(|| "Linux".into(), |n| n.trim_matches('"').to_owned())
}

/// Why the node is not ready, `None` if it is.
pub type NotReady = Option<String>;

/// What the status tells and may change at any time.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// What the node is short of.
    pub pressure: Pressure,
    /// Why it is not ready.
    pub not_ready: NotReady,
    /// What device plugins have.
    pub devices: Amounts,
    /// Nobody knows any more which of the resources that somebody has written into the Node came from plugins: there are
    /// none of them, until somebody says so again. As upstream, where a kubelet has lost what it had written down.
    pub forgets: bool,
}

/// The labels that upstream's kubelet sets, and the configured ones.
pub fn labels(config: &NodeConfig) -> BTreeMap<String, String> {
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
pub fn registration(config: &NodeConfig, machine: &Machine, seen: &Seen, now: Timestamp) -> Node {
    let mut node = Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels(config)),
            ..Default::default()
        },
        spec: Some(NodeSpec { taints: Some(config.taints.clone()).filter(|t| !t.is_empty()), ..Default::default() }),
        status: None,
    };
    node.status = Some(status(&node, config, machine, seen, &[], now));
    node
}

/// A patch that brings an existing node's labels to ours, `None` if they are.
pub fn label_patch(node: &Node, config: &NodeConfig) -> Option<Value> {
    let has = node.metadata.labels.clone().unwrap_or_default();
    let missing: BTreeMap<_, _> = labels(config).into_iter().filter(|(k, v)| has.get(k) != Some(v)).collect();
    (!missing.is_empty()).then(|| json!({"metadata": {"labels": missing}}))
}

/// The patch (strategic) that writes a status. Its addresses replace those that are there: by their type, which is the key of
/// that list, two of one type could not be told apart (<https://github.com/kubernetes/kubernetes/issues/79391>).
pub fn patch(status: &NodeStatus) -> Value {
    let mut patch = json!({"status": status});
    if let Some(addresses) = patch["status"]["addresses"].as_array_mut() {
        addresses.insert(0, json!({"$patch": "replace"}));
    }
    patch
}

/// The node's status.
pub fn status(
    node: &Node,
    config: &NodeConfig,
    machine: &Machine,
    seen: &Seen,
    images: &[(Vec<String>, u64)],
    now: Timestamp,
) -> NodeStatus {
    let old = node.status.clone().unwrap_or_default();
    let pressure = seen.pressure;
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
        match &seen.not_ready {
            None => condition("Ready", true, "KubeletReady", "kubelet is posting ready status"),
            Some(why) => condition("Ready", false, "KubeletNotReady", why),
        },
    ];
    let others = old.conditions.iter().flatten().filter(|c| !ours.iter().any(|o| o.type_ == c.type_)).cloned();
    let conditions: Vec<_> = others.chain(ours.clone()).collect();
    let quantity = |value: i64| Quantity(value.to_string());
    let binary = |bytes: i64| match bytes {
        0 => quantity(0),
        bytes if bytes % (1 << 20) == 0 => Quantity(format!("{}Mi", bytes >> 20)),
        bytes => Quantity(format!("{}Ki", bytes >> 10)),
    };
    let mut capacity: BTreeMap<_, _> = [
        ("cpu".to_owned(), quantity(machine.cpus)),
        ("memory".to_owned(), Quantity(format!("{}Ki", machine.memory / 1024))),
        ("ephemeral-storage".to_owned(), Quantity(format!("{}Ki", machine.disk / 1024))),
        ("pods".to_owned(), quantity(i64::from(config.max_pods))),
    ]
    .into();
    capacity.extend(machine.in_huge_pages().map(|(name, bytes)| (name, binary(bytes))));
    let mut allocatable = capacity.clone();
    for (name, milli) in machine.allocatable(config).milli {
        let value = match name.as_str() {
            "cpu" => Quantity(seawall_api::quantity::Quantity::millis(milli).to_string()),
            name if name.starts_with("hugepages-") => binary(milli / 1000),
            _ => Quantity(format!("{}Ki", milli / 1000 / 1024)),
        };
        allocatable.insert(name, value);
    }
    // Resources that others have written into the Node
    // (https://kubernetes.io/docs/tasks/administer-cluster/extended-resource-node/).
    let others = old.capacity.iter().flatten().filter(|(name, _)| is_extended(name));
    for (name, amount) in others {
        let amount = if seen.forgets { quantity(0) } else { amount.clone() };
        capacity.insert(name.clone(), amount.clone());
        allocatable.insert(name.clone(), amount);
    }
    let count = |count: usize| Quantity(count.to_string());
    for (name, (all, healthy)) in &seen.devices {
        capacity.insert(name.clone(), count(*all));
        allocatable.insert(name.clone(), count(*healthy));
    }
    let address = |kind: &str, value: String| NodeAddress { type_: kind.to_owned(), address: value };
    NodeStatus {
        addresses: Some(
            config
                .node_ips
                .iter()
                .map(|ip| address("InternalIP", ip.to_string()))
                .chain([address("Hostname", config.node_name.clone())])
                .collect(),
        ),
        allocatable: Some(allocatable),
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
        let machine = Machine { cpus: 2, memory: 4 << 30, disk: 1 << 40, ..Machine::default() };
        let t = |s: i64| Timestamp::from_second(s).unwrap();
        let dark = Seen { not_ready: Some("no network".into()), ..Default::default() };
        let node = registration(&config, &machine, &dark, t(1));
        let first = node.status.clone().unwrap();
        let same = status(&node, &config, &machine, &dark, &[], t(2));
        assert!(!differs(&first, &same));
        let ready = status(&node, &config, &machine, &Seen::default(), &[], t(3));
        assert!(differs(&first, &ready));
        let at = |s: &NodeStatus, k: &str| {
            let found = s.conditions.iter().flatten().find(|c| c.type_ == k).unwrap();
            found.last_transition_time.clone().unwrap().0
        };
        assert_eq!((at(&ready, "Ready"), at(&ready, "DiskPressure")), (t(3), t(1)));
        assert!(label_patch(&node, &config).is_none());
    }

    #[test]
    fn huge_pages_are_not_for_other_use() {
        let config = NodeConfig::for_tests();
        let huge_pages = BTreeMap::from([(2 << 20, 1 << 30), (1 << 30, 0)]);
        let machine = Machine { cpus: 2, memory: 4 << 30, huge_pages, ..Machine::default() };
        let node = registration(&config, &machine, &Seen::default(), Timestamp::UNIX_EPOCH);
        let status = node.status.unwrap();
        let (capacity, allocatable) = (status.capacity.unwrap(), status.allocatable.unwrap());
        // Of the memory, 100 MiB are kept for the node by default.
        for (name, all, left) in
            [("memory", "4194304Ki", "3043328Ki"), ("hugepages-2Mi", "1024Mi", "1024Mi"), ("hugepages-1Gi", "0", "0")]
        {
            assert_eq!((&*capacity[name].0, &*allocatable[name].0), (all, left), "{name}");
        }
    }

    #[test]
    fn devices_and_what_others_count() {
        let config = NodeConfig::for_tests();
        let machine = Machine { cpus: 2, memory: 4 << 30, ..Machine::default() };
        let t = Timestamp::UNIX_EPOCH;
        let mut node = registration(&config, &machine, &Seen::default(), t);
        // Upstream's documentation has people write the capacity alone.
        let capacity = node.status.get_or_insert_default().capacity.get_or_insert_default();
        capacity.insert("example.com/dongle".into(), Quantity("4".into()));
        capacity.insert("example.com/gpu".into(), Quantity("8".into()));
        let amounts = |seen: &Seen| {
            let status = status(&node, &config, &machine, seen, &[], t);
            let (capacity, allocatable) = (status.capacity.unwrap(), status.allocatable.unwrap());
            ["dongle", "gpu"].map(|name| {
                let name = format!("example.com/{name}");
                (capacity[&name].0.clone(), allocatable[&name].0.clone())
            })
        };
        let pair = |capacity: &str, allocatable: &str| (capacity.to_owned(), allocatable.to_owned());
        let mut seen = Seen { devices: [("example.com/gpu".to_owned(), (3, 2))].into(), ..Default::default() };
        assert_eq!(amounts(&seen), [pair("4", "4"), pair("3", "2")]);
        seen.forgets = true;
        assert_eq!(amounts(&seen), [pair("0", "0"), pair("3", "2")]);
    }

    #[test]
    fn two_addresses_of_one_type_stay_two() {
        let config = NodeConfig {
            node_ips: ["10.9.0.1", "fd00::1"].map(|ip| ip.parse().unwrap()).to_vec(),
            ..NodeConfig::for_tests()
        };
        let machine = Machine { cpus: 2, memory: 4 << 30, disk: 1 << 40, ..Machine::default() };
        let t = Timestamp::UNIX_EPOCH;
        let node = registration(&config, &machine, &Seen::default(), t);
        let patch = patch(&status(&node, &config, &machine, &Seen::default(), &[], t));
        let expect = json!([
            {"$patch": "replace"},
            {"type": "InternalIP", "address": "10.9.0.1"},
            {"type": "InternalIP", "address": "fd00::1"},
            {"type": "Hostname", "address": "node-1"},
        ]);
        assert_eq!(patch["status"]["addresses"], expect);
    }
}
