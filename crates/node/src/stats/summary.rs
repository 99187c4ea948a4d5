//! `/stats/summary`: upstream's `stats.k8s.io/v1alpha1` Summary, in JSON
//! (<https://github.com/kubernetes/kubernetes/blob/master/staging/src/k8s.io/kubelet/pkg/apis/stats/v1alpha1/types.go>).

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{
    Now, PodDisks, PodNow,
    read::{Disk, Interface, Taken},
    series::Measured,
};
use crate::pod;

fn time(at: Timestamp) -> Value {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into()
}

fn cpu(measured: &Measured) -> Value {
    let mut out = json!({"time": time(measured.at), "usageCoreNanoSeconds": measured.usage.cpu});
    if let Some(nano_cores) = measured.nano_cores {
        out["usageNanoCores"] = nano_cores.into();
    }
    out
}

fn memory(measured: &Measured) -> Value {
    let usage = &measured.usage;
    let mut out = json!({"time": time(measured.at), "usageBytes": usage.memory, "workingSetBytes": usage.working_set,
        "rssBytes": usage.rss, "pageFaults": usage.faults, "majorPageFaults": usage.major_faults});
    if let Some(limit) = usage.limit {
        out["availableBytes"] = limit.saturating_sub(usage.working_set).into();
    }
    out
}

fn disk(at: Timestamp, disk: Disk) -> Value {
    let mut out = json!(disk);
    out["time"] = time(at);
    out
}

fn network(at: Timestamp, all: &[Interface]) -> Value {
    let one = |interface: &Interface| {
        json!({"name": interface.name, "rxBytes": interface.rx_bytes, "rxErrors": interface.rx_errors,
            "txBytes": interface.tx_bytes, "txErrors": interface.tx_errors})
    };
    // The first of a pod is the one that leads out; a machine's too, mostly.
    let first = all.iter().find(|interface| interface.name == "eth0").or(all.first());
    let mut out = first.map_or_else(|| json!({}), one);
    out["time"] = time(at);
    out["interfaces"] = all.iter().map(one).collect();
    out
}

/// The summary; only CPU and memory, if that is all that was asked for.
pub fn summary(now: &Now, only_cpu_and_memory: bool) -> Value {
    let mut node = json!({"nodeName": now.node});
    if let Some(measured) = &now.machine {
        node["cpu"] = cpu(measured);
        node["memory"] = memory(measured);
    }
    if let Some(start) = super::read::booted().and_then(|seconds| Timestamp::from_second(seconds).ok()) {
        node["startTime"] = time(start);
    }
    if !only_cpu_and_memory {
        node["network"] = network(now.at, &now.network);
        if let Some(whole) = now.disk {
            node["fs"] = disk(now.at, whole);
            if let Some(images) = now.images {
                let images = disk(now.at, whole.with(images));
                node["runtime"] = json!({"imageFs": images, "containerFs": images});
            }
        }
        if let Some((most, current)) = now.processes {
            node["rlimit"] = json!({"time": time(now.at), "maxpid": most, "curproc": current});
        }
    }
    let pods: Vec<Value> = now.pods.iter().map(|pod| of_pod(now, pod, only_cpu_and_memory)).collect();
    json!({"node": node, "pods": pods})
}

fn of_pod(now: &Now, of: &PodNow, only_cpu_and_memory: bool) -> Value {
    let uid = pod::uid(&of.pod);
    let nothing = PodDisks::default();
    let disks = now.disks.get(uid).unwrap_or(&nothing);
    let on_disk = |taken: &Taken| now.disk.map(|whole| disk(now.at, whole.with(*taken)));
    let containers: Vec<Value> = of
        .containers
        .iter()
        .map(|c| {
            let mut out = json!({"name": c.name});
            if let Some(started) = c.started {
                out["startTime"] = time(started);
            }
            if let Some(measured) = &c.measured {
                out["cpu"] = cpu(measured);
                out["memory"] = memory(measured);
            }
            if !only_cpu_and_memory {
                for (key, all) in [("rootfs", &disks.layers), ("logs", &disks.logs)] {
                    if let Some(value) = all.get(&c.name).and_then(on_disk) {
                        out[key] = value;
                    }
                }
            }
            out
        })
        .collect();
    let reference = json!({"name": pod::name(&of.pod), "namespace": pod::namespace(&of.pod), "uid": uid});
    let mut out = json!({"podRef": reference, "containers": containers});
    if let Some(started) = of.started {
        out["startTime"] = time(started);
    }
    if let Some(measured) = &of.measured {
        out["cpu"] = cpu(measured);
        out["memory"] = memory(measured);
    }
    if only_cpu_and_memory {
        return out;
    }
    if let Some(all) = &of.network {
        out["network"] = network(now.at, all);
    }
    if let Some(count) = of.processes {
        out["process_stats"] = json!({"process_count": count});
    }
    let mut volumes: Vec<(&String, &Taken)> = disks.volumes.iter().collect();
    volumes.sort_by_key(|(name, _)| *name);
    let volumes: Vec<Value> = volumes
        .into_iter()
        .filter_map(|(name, taken)| {
            let mut value: Map<String, Value> = on_disk(taken)?.as_object()?.clone();
            value.insert("name".into(), name.as_str().into());
            Some(Value::Object(value))
        })
        .collect();
    if !volumes.is_empty() {
        out["volume"] = volumes.into();
    }
    if let Some(value) = on_disk(&disks.sum()) {
        out["ephemeral-storage"] = value;
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use std::{collections::HashMap, sync::Arc};

    use super::*;
    use crate::stats::{
        ContainerNow,
        read::{Throttled, Usage},
    };

    pub fn example() -> Now {
        let at = Timestamp::from_second(1_800_000_000).unwrap();
        let measured = |cpu: u64, nano_cores: Option<u64>| Measured {
            at,
            usage: Usage {
                cpu,
                memory: 4096,
                working_set: 2048,
                rss: 1024,
                limit: Some(8192),
                faults: 3,
                major_faults: 1,
            },
            nano_cores,
        };
        let metadata = json!({"name": "web", "namespace": "shop", "uid": "u"});
        let pod = serde_json::from_value(json!({"metadata": metadata, "spec": {"containers": []}})).unwrap();
        let container = |name: &str, measured| ContainerNow {
            name: name.into(),
            id: format!("id-{name}"),
            image: "image:1".into(),
            started: Some(at),
            measured,
            group: format!("/kubepods/podu/id-{name}"),
            throttled: Some(Throttled { periods: 10, throttled: 2, nanos: 500_000_000 }),
        };
        let taken = Taken { bytes: 100, inodes: 2 };
        let disks = PodDisks {
            layers: HashMap::from([("a".into(), taken)]),
            logs: HashMap::from([("a".into(), taken)]),
            volumes: HashMap::from([("scratch".into(), taken)]),
        };
        Now {
            node: "node-1".into(),
            at,
            machine: Some(measured(9_000_000_000, Some(7))),
            network: vec![Interface { name: "eth0".into(), rx_bytes: 1, ..Default::default() }],
            disk: Some(Disk { capacity_bytes: 1000, available_bytes: 600, used_bytes: 400, ..Default::default() }),
            images: Some(Taken { bytes: 300, inodes: 5 }),
            processes: Some((32_768, 100)),
            pods: vec![PodNow {
                pod: Arc::new(pod),
                started: Some(at),
                measured: Some(measured(2_000_000_000, Some(5))),
                group: "/kubepods/podu".into(),
                network: Some(vec![Interface { name: "eth0".into(), tx_bytes: 8, ..Default::default() }]),
                processes: Some(4),
                // The second one was made a moment ago.
                containers: vec![container("a", Some(measured(1_500_000_000, Some(4)))), container("b", None)],
            }],
            disks: Arc::new([("u".to_owned(), disks)].into()),
        }
    }

    #[test]
    fn all_of_it_and_the_short_form() {
        let whole = summary(&example(), false);
        let (node, pod) = (&whole["node"], &whole["pods"][0]);
        for (place, expect) in [
            (&node["cpu"]["usageNanoCores"], json!(7)),
            (&node["memory"]["availableBytes"], json!(6144)),
            (&node["fs"]["usedBytes"], json!(400)),
            (&node["runtime"]["imageFs"]["usedBytes"], json!(300)),
            (&node["rlimit"]["maxpid"], json!(32768)),
            (&pod["podRef"], json!({"name": "web", "namespace": "shop", "uid": "u"})),
            (&pod["cpu"]["usageCoreNanoSeconds"], json!(2_000_000_000_u64)),
            (&pod["network"]["txBytes"], json!(8)),
            (&pod["process_stats"]["process_count"], json!(4)),
            (&pod["volume"][0]["name"], json!("scratch")),
            (&pod["volume"][0]["usedBytes"], json!(100)),
            (&pod["ephemeral-storage"]["usedBytes"], json!(300)),
            (&pod["ephemeral-storage"]["capacityBytes"], json!(1000)),
            (&pod["containers"][0]["memory"]["workingSetBytes"], json!(2048)),
            (&pod["containers"][0]["rootfs"]["inodesUsed"], json!(2)),
            (&pod["containers"][0]["cpu"]["time"], json!("2027-01-15T08:00:00Z")),
            (&pod["containers"][1]["cpu"], Value::Null),
        ] {
            assert_eq!(*place, expect, "{whole:#}");
        }
        let short = summary(&example(), true);
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&short["pods"][0]["containers"][0]), ["cpu", "memory", "name", "startTime"]);
        assert_eq!(keys(&short["pods"][0]), ["containers", "cpu", "memory", "podRef", "startTime"]);
        assert_eq!(keys(&short["node"]), ["cpu", "memory", "nodeName", "startTime"]);
    }
}
