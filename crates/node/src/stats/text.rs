//! `/metrics/resource` and `/metrics/cadvisor`, as Prometheus reads them.
//!
//! The first has upstream's names and meaning
//! (<https://kubernetes.io/docs/reference/instrumentation/metrics/#list-of-stable-kubernetes-metrics>); the second has those
//! of cAdvisor's metrics that dashboards are made of.

use std::fmt::Write as _;

use jiff::Timestamp;

use super::{ContainerNow, Now, PodNow, series::Measured};
use crate::pod;

/// A metric: its name, what it tells, and how it is read off.
type Metric<T, N> = (&'static str, &'static str, fn(&T) -> N);

/// Metrics under construction.
#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: f64, at: Option<Timestamp>) {
        self.0.push_str(name);
        if !labels.is_empty() {
            let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escaped(v))).collect();
            let _ = write!(self.0, "{{{}}}", labels.join(","));
        }
        let _ = write!(self.0, " {value}");
        if let Some(at) = at {
            let _ = write!(self.0, " {}", at.as_millisecond());
        }
        self.0.push('\n');
    }
}

#[allow(clippy::cast_precision_loss, reason = "Prometheus has no other numbers")]
fn float(value: u64) -> f64 {
    value as f64
}

fn seconds(nanos: u64) -> f64 {
    float(nanos) / 1e9
}

/// What `/metrics/resource` says.
pub fn resource(now: &Now) -> String {
    let mut text = Text::default();
    let all = || now.pods.iter().flat_map(|pod| pod.containers.iter().map(move |container| (pod, container)));
    let of_containers = |text: &mut Text, name: &str, kind: &str, help: &str, value: fn(&Measured) -> f64| {
        text.head(name, kind, help);
        for (pod, container) in all() {
            let Some(measured) = &container.measured else { continue };
            let labels = [
                ("container", &*container.name),
                ("namespace", pod::namespace(&pod.pod)),
                ("pod", pod::name(&pod.pod)),
            ];
            text.value(name, &labels, value(measured), Some(measured.at));
        }
    };
    let of_pods = |text: &mut Text, name: &str, kind: &str, help: &str, value: fn(&Measured) -> f64| {
        text.head(name, kind, help);
        for pod in &now.pods {
            let Some(measured) = &pod.measured else { continue };
            let labels = [("namespace", pod::namespace(&pod.pod)), ("pod", pod::name(&pod.pod))];
            text.value(name, &labels, value(measured), Some(measured.at));
        }
    };
    let of_node = |text: &mut Text, name: &str, kind: &str, help: &str, value: fn(&Measured) -> f64| {
        text.head(name, kind, help);
        if let Some(measured) = &now.machine {
            text.value(name, &[], value(measured), Some(measured.at));
        }
    };
    let cpu = |measured: &Measured| seconds(measured.usage.cpu);
    let memory = |measured: &Measured| float(measured.usage.working_set);
    of_containers(
        &mut text,
        "container_cpu_usage_seconds_total",
        "counter",
        "[STABLE] Cumulative cpu time consumed by the container in core-seconds",
        cpu,
    );
    of_containers(
        &mut text,
        "container_memory_working_set_bytes",
        "gauge",
        "[STABLE] Current working set of the container in bytes",
        memory,
    );
    let name = "container_start_time_seconds";
    text.head(name, "gauge", "[STABLE] Start time of the container since unix epoch in seconds");
    for (pod, container) in all() {
        let Some(started) = container.started else { continue };
        let labels =
            [("container", &*container.name), ("namespace", pod::namespace(&pod.pod)), ("pod", pod::name(&pod.pod))];
        text.value(name, &labels, started.as_duration().as_secs_f64(), None);
    }
    of_node(
        &mut text,
        "node_cpu_usage_seconds_total",
        "counter",
        "[STABLE] Cumulative cpu time consumed by the node in core-seconds",
        cpu,
    );
    of_node(
        &mut text,
        "node_memory_working_set_bytes",
        "gauge",
        "[STABLE] Current working set of the node in bytes",
        memory,
    );
    of_pods(
        &mut text,
        "pod_cpu_usage_seconds_total",
        "counter",
        "[STABLE] Cumulative cpu time consumed by the pod in core-seconds",
        cpu,
    );
    of_pods(
        &mut text,
        "pod_memory_working_set_bytes",
        "gauge",
        "[STABLE] Current working set of the pod in bytes",
        memory,
    );
    let failed = now.machine.is_none() || now.pods.iter().any(|pod| pod.measured.is_none());
    let name = "resource_scrape_error";
    text.head(name, "gauge", "[STABLE] 1 if there was an error while getting container metrics, 0 otherwise");
    text.value(name, &[], f64::from(u8::from(failed)), None);
    text.0
}

/// A group of which cAdvisor's metrics tell: a pod's, or a container's.
struct Group<'a> {
    pod: &'a PodNow,
    container: Option<&'a ContainerNow>,
}

impl Group<'_> {
    fn labels(&self) -> [(&str, &str); 6] {
        let of = |value: fn(&ContainerNow) -> &str| self.container.map_or("", value);
        [
            ("container", of(|c| &c.name)),
            ("id", self.container.map_or(&*self.pod.group, |c| &c.group)),
            ("image", of(|c| &c.image)),
            ("name", of(|c| &c.id)),
            ("namespace", pod::namespace(&self.pod.pod)),
            ("pod", pod::name(&self.pod.pod)),
        ]
    }

    fn measured(&self) -> Option<&Measured> {
        self.container.map_or(&self.pod.measured, |c| &c.measured).as_ref()
    }
}

type Column = (&'static str, &'static str, &'static str, fn(&Measured) -> Option<f64>);

/// What every group has.
const COLUMNS: [Column; 7] = [
    ("container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed in seconds.", |m| {
        Some(seconds(m.usage.cpu))
    }),
    ("container_memory_usage_bytes", "gauge", "Current memory usage in bytes, including all memory.", |m| {
        Some(float(m.usage.memory))
    }),
    ("container_memory_working_set_bytes", "gauge", "Current working set in bytes.", |m| {
        Some(float(m.usage.working_set))
    }),
    ("container_memory_rss", "gauge", "Size of RSS in bytes.", |m| Some(float(m.usage.rss))),
    ("container_spec_memory_limit_bytes", "gauge", "Memory limit for the container.", |m| m.usage.limit.map(float)),
    ("container_memory_faults_total", "counter", "Page faults.", |m| Some(float(m.usage.faults))),
    ("container_memory_major_faults_total", "counter", "Page faults for which a disk was read.", |m| {
        Some(float(m.usage.major_faults))
    }),
];

/// What `/metrics/cadvisor` says.
pub fn cadvisor(now: &Now) -> String {
    let mut text = Text::default();
    let groups: Vec<Group<'_>> = now
        .pods
        .iter()
        .flat_map(|pod| {
            let containers = pod.containers.iter().map(move |c| Group { pod, container: Some(c) });
            std::iter::once(Group { pod, container: None }).chain(containers)
        })
        .collect();
    for (name, kind, help, value) in COLUMNS {
        text.head(name, kind, help);
        for group in &groups {
            let Some(measured) = group.measured() else { continue };
            let Some(number) = value(measured) else { continue };
            let labels = group.labels();
            match name {
                "container_cpu_usage_seconds_total" => {
                    let with_total: Vec<_> = labels.into_iter().chain([("cpu", "total")]).collect();
                    text.value(name, &with_total, number, Some(measured.at));
                }
                _ => text.value(name, &labels, number, Some(measured.at)),
            }
        }
    }
    let throttled: [Metric<super::Throttled, f64>; 3] = [
        ("container_cpu_cfs_periods_total", "Number of elapsed enforcement period intervals.", |t| float(t.periods)),
        ("container_cpu_cfs_throttled_periods_total", "Number of throttled period intervals.", |t| float(t.throttled)),
        ("container_cpu_cfs_throttled_seconds_total", "Total time duration the container has been throttled.", |t| {
            seconds(t.nanos)
        }),
    ];
    for (name, help, value) in throttled {
        text.head(name, "counter", help);
        for group in &groups {
            let Some(found) = group.container.and_then(|c| c.throttled.as_ref()) else { continue };
            text.value(name, &group.labels(), value(found), Some(now.at));
        }
    }
    let name = "container_start_time_seconds";
    text.head(name, "gauge", "Start time of the container since unix epoch in seconds.");
    for group in &groups {
        let Some(started) = group.container.and_then(|c| c.started) else { continue };
        text.value(name, &group.labels(), started.as_duration().as_secs_f64(), None);
    }
    let traffic: [Metric<super::Interface, u64>; 4] = [
        ("container_network_receive_bytes_total", "Cumulative count of bytes received", |i| i.rx_bytes),
        ("container_network_receive_errors_total", "Cumulative count of errors encountered while receiving", |i| {
            i.rx_errors
        }),
        ("container_network_transmit_bytes_total", "Cumulative count of bytes transmitted", |i| i.tx_bytes),
        ("container_network_transmit_errors_total", "Cumulative count of errors while transmitting", |i| i.tx_errors),
    ];
    for (name, help, value) in traffic {
        text.head(name, "counter", help);
        for pod in &now.pods {
            for interface in pod.network.iter().flatten() {
                let labels = [
                    ("id", &*pod.group),
                    ("interface", &*interface.name),
                    ("namespace", pod::namespace(&pod.pod)),
                    ("pod", pod::name(&pod.pod)),
                ];
                text.value(name, &labels, float(value(interface)), Some(now.at));
            }
        }
    }
    let name = "container_fs_usage_bytes";
    text.head(name, "gauge", "Number of bytes that are consumed by the container on this filesystem.");
    for group in &groups {
        let Some(container) = group.container else { continue };
        let layers = now.disks.get(pod::uid(&group.pod.pod)).map(|disks| &disks.layers);
        let Some(taken) = layers.and_then(|layers| layers.get(&container.name)) else { continue };
        text.value(name, &group.labels(), float(taken.bytes), Some(now.at));
    }
    if let Some(memory) = now.machine.and_then(|machine| machine.usage.limit) {
        text.head("machine_memory_bytes", "gauge", "Amount of memory installed on the machine.");
        text.value("machine_memory_bytes", &[], float(memory), None);
    }
    text.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::summary::tests::example;

    #[test]
    fn what_prometheus_reads() {
        let resource = resource(&example());
        for line in [
            "# TYPE container_cpu_usage_seconds_total counter",
            "container_cpu_usage_seconds_total{container=\"a\",namespace=\"shop\",pod=\"web\"} 1.5 1800000000000",
            "container_memory_working_set_bytes{container=\"a\",namespace=\"shop\",pod=\"web\"} 2048 1800000000000",
            "container_start_time_seconds{container=\"b\",namespace=\"shop\",pod=\"web\"} 1800000000",
            "node_cpu_usage_seconds_total 9 1800000000000",
            "pod_memory_working_set_bytes{namespace=\"shop\",pod=\"web\"} 2048 1800000000000",
            "resource_scrape_error 0",
        ] {
            assert!(resource.lines().any(|l| l == line), "{line} is not in\n{resource}");
        }
        let cadvisor = cadvisor(&example());
        let a =
            "container=\"a\",id=\"/kubepods/podu/id-a\",image=\"image:1\",name=\"id-a\",namespace=\"shop\",pod=\"web\"";
        for line in [
            format!("container_cpu_usage_seconds_total{{{a},cpu=\"total\"}} 1.5 1800000000000"),
            format!("container_cpu_cfs_throttled_seconds_total{{{a}}} 0.5 1800000000000"),
            format!("container_fs_usage_bytes{{{a}}} 100 1800000000000"),
            "container_memory_rss{container=\"\",id=\"/kubepods/podu\",image=\"\",name=\"\",namespace=\"shop\",pod=\"web\"} 1024 1800000000000".into(),
            "container_network_transmit_bytes_total{id=\"/kubepods/podu\",interface=\"eth0\",namespace=\"shop\",pod=\"web\"} 8 1800000000000".into(),
            "machine_memory_bytes 8192".into(),
        ] {
            assert!(cadvisor.lines().any(|l| l == line), "{line} is not in\n{cadvisor}");
        }
    }

    #[test]
    fn labels_are_escaped() {
        let mut text = Text::default();
        text.value("m", &[("a", "x\"y\\z\n")], 1.0, None);
        assert_eq!(text.0, "m{a=\"x\\\"y\\\\z\\n\"} 1\n");
    }
}
