//! Pods of busybox on machines of a lab, from which and to which tests send.

use std::{net::SocketAddr, time::Duration};

use seawall_drill::lab::Machine;

use crate::{
    cluster::{Cluster, works},
    kubectl::Kubectl,
};

/// The image that [`Cluster::takes_pods`] makes.
pub const IMAGE: &str = "example.test/web:v1";
/// A command that serves two files by HTTP on port 8080, `big` of [`BIG`] bytes and `name`, and logs who asks.
pub const SERVE: &str =
    "mkdir /www; head -c 4194304 /dev/zero >/www/big; echo web >/www/name; exec httpd -f -v -p 8080 -h /www";
/// How large `big` is.
pub const BIG: usize = 4 << 20;
/// A command that does nothing.
pub const SLEEP: &str = "exec sleep 1000000";

const LONG: Duration = Duration::from_secs(120);

/// A pod on a node, with its name as a label, whose shell runs a command. It knows its addresses and its node's (`IPS`,
/// `HOSTS`).
pub fn pod(name: &str, node: &str, command: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  tolerations: [{{operator: Exists}}]
  containers:
  - name: c
    image: {IMAGE}
    command: [sh, -c, '{command}']
    env:
    - {{name: IPS, valueFrom: {{fieldRef: {{fieldPath: status.podIPs}}}}}}
    - {{name: HOSTS, valueFrom: {{fieldRef: {{fieldPath: status.hostIPs}}}}}}
"
    )
}

impl Cluster {
    /// Makes [`IMAGE`] on these machines, and waits for what pods need in the default namespace.
    ///
    /// # Panics
    /// If it cannot be made.
    pub async fn takes_pods(&self, server: &str, machines: &[&Machine]) -> Kubectl {
        let socket = "/run/seawall/containerd/containerd.sock";
        for machine in machines {
            works(machine, &format!("image build --busybox -t {IMAGE} --socket {socket} -- sleep 1000000")).await;
        }
        let k = self.kubectl(server);
        k.reaches("serviceaccount/default", "{.metadata.name}", "default").await;
        k
    }
}

/// How many bytes a pod gets from a URL.
///
/// # Panics
/// If the pod is gone.
pub async fn gets(k: &Kubectl, pod: &str, url: &str) -> usize {
    let script = format!("timeout 10 wget -q -O - {url} | wc -c");
    let output = k.args(&["exec", pod, "--", "sh", "-c", &script]).await.ok();
    output.trim().parse().unwrap_or_else(|e| panic!("{pod} of {url}: {output:?}: {e}"))
}

/// What a command on a machine prints, or what is wrong with it.
pub async fn says(machine: &Machine, command: &str) -> String {
    let words: Vec<&str> = command.split_whitespace().collect();
    machine.run(words[0], &words[1..], LONG).await.unwrap_or_else(|error| error.to_string())
}

/// A URL of an address of either family.
pub fn url(ip: &str, port: &str, path: &str) -> String {
    match ip.contains(':') {
        true => format!("http://[{ip}]:{port}/{path}"),
        false => format!("http://{ip}:{port}/{path}"),
    }
}

/// A port of an address.
///
/// # Panics
/// If they are none.
pub fn at(ip: &str, port: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port.parse().unwrap())
}
