//! The workload of drills on nodes: a web of two pods behind two Services, one served by the kernel's tables and one by the
//! relay, and a stateful pod that writes to a storage which all nodes see.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::image;
use crate::{
    history::{At, Life},
    lab::{Lab, Machine, SHARED},
    serve,
    traffic::{Client, NAMESPACE},
};

const IMAGE: &str = "seawall.local/drill-echo:v1";
const PATIENCE: Duration = Duration::from_secs(90);
/// The log of the stateful pod.
const LOG: &str = "drill-writer.log";
/// The Services: name, whether it is relayed, its ports on every node.
const SERVICES: [(&str, bool, u16, u16); 2] = [("nftables", false, 32_180, 32_181), ("relay", true, 32_182, 32_183)];

/// A Service and where it is reached.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its name: how it is served.
    pub name: &'static str,
    /// Its address in the cluster, for connections.
    pub connections: SocketAddr,
    /// And for datagrams.
    pub datagrams: SocketAddr,
    /// Its port on every node.
    pub node_port: u16,
}

/// Puts the image on machines.
pub async fn image(lab: &Lab, machines: &[Machine]) -> anyhow::Result<()> {
    let program = format!("{}:/seawall", lab.binary().display());
    image::put(lab, machines, IMAGE, &["--program", &program, "--", "/seawall", "--log", "warn", "drill-workload"])
        .await
}

/// Makes the workload, waits until it is ready, and says where it is reached. The web prefers
/// `near` and `worker`, the stateful pod `worker`.
pub async fn deploy(lab: &Lab, client: &mut Client, near: &str, worker: &str) -> anyhow::Result<Vec<Service>> {
    let log = lab.shared().join(LOG);
    if let Err(error) = std::fs::remove_file(&log)
        && error.kind() != ErrorKind::NotFound
    {
        // What an earlier drill wrote would be taken for this one's.
        return Err(error).with_context(|| log.display().to_string());
    }
    let labels = json!({"app": "echo"});
    let on = |nodes: &[&str]| {
        json!({"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": {"matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "In", "values": nodes}]}}]})
    };
    let container = json!({
        "name": "echo", "image": IMAGE, "imagePullPolicy": "Never",
        "command": ["/seawall", "--log", "warn", "drill-workload"],
        "env": [{"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}],
        "readinessProbe": {"tcpSocket": {"port": serve::CONNECTIONS}, "periodSeconds": 1},
    });
    let echo = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "echo", "labels": labels},
        "spec": {"replicas": 2, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels},
            "spec": {
                "terminationGracePeriodSeconds": 5,
                // Where an agent is lost, there is only a server left for its replacement.
                "tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}],
                "affinity": {
                    "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
                        {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}}]},
                    "nodeAffinity": on(&[near, worker]),
                },
                "containers": [container],
            }}},
    });
    let mut writing = container.clone();
    writing["args"] = json!(["--output", format!("/shared/{LOG}")]);
    writing["volumeMounts"] = json!([{"name": "shared", "mountPath": "/shared"}]);
    let writer = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "writer", "labels": {"app": "writer"}},
        "spec": {"replicas": 1, "serviceName": "writer", "selector": {"matchLabels": {"app": "writer"}}, "template": {
            "metadata": {"labels": {"app": "writer"}},
            "spec": {
                "terminationGracePeriodSeconds": 5,
                "affinity": {"nodeAffinity": on(&[worker])},
                "containers": [writing],
                "volumes": [{"name": "shared", "hostPath": {"path": SHARED}}],
            }}},
    });
    let budget = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "echo"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": labels}}});
    client.create(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments"), &echo).await?;
    client.create(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/statefulsets"), &writer).await?;
    client.create(&format!("/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets"), &budget).await?;
    let mut services = Vec::new();
    for (name, relayed, tcp, udp) in SERVICES {
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "annotations": {"seawall.dev/relay": relayed.to_string()}},
            "spec": {"type": "NodePort", "selector": labels, "ports": [
                {"name": "tcp", "port": 80, "targetPort": serve::CONNECTIONS, "nodePort": tcp},
                {"name": "udp", "protocol": "UDP", "port": 81, "targetPort": serve::DATAGRAMS, "nodePort": udp}]},
        });
        let made = client.create(&format!("/api/v1/namespaces/{NAMESPACE}/services"), &service).await?;
        let ip: Ipv4Addr = made["spec"]["clusterIP"].as_str().unwrap_or_default().parse().context("clusterIP")?;
        services.push(Service {
            name,
            connections: SocketAddr::from((ip, 80)),
            datagrams: SocketAddr::from((ip, 81)),
            node_port: tcp,
        });
    }
    ready(client).await?;
    Ok(services)
}

/// Waits until both pods of the web and the stateful one are ready.
pub async fn ready(client: &mut Client) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    for (kind, name, wanted) in [("deployments", "echo", 2), ("statefulsets", "writer", 1)] {
        loop {
            let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/{kind}/{name}");
            let object: Value = serde_json::from_slice(&client.insist(&path).await?)?;
            let ready = object["status"]["readyReplicas"].as_u64().unwrap_or(0);
            if ready >= wanted {
                break;
            }
            ensure!(Instant::now() < deadline, "{ready} of {wanted} pods of {name} are ready after {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}

/// Empties a node as `kubectl drain` does, waits until everything runs elsewhere, and opens it again.
pub async fn drain(client: &mut Client, node: &str) -> anyhow::Result<()> {
    cordon(client, node, true).await?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods?fieldSelector=spec.nodeName%3D{node}");
        let list: Value = serde_json::from_slice(&client.insist(&path).await?)?;
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        if pods.is_empty() {
            break;
        }
        for pod in pods.iter().filter(|p| p["metadata"]["deletionTimestamp"].is_null()) {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}});
            let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}/eviction");
            // One that may not go yet is asked again, and so is one whose answer was lost.
            let _ = client.send(Method::POST, &path, Bytes::from(eviction.to_string())).await;
        }
        ensure!(Instant::now() < deadline, "{node} is not empty after {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    ready(client).await?;
    cordon(client, node, false).await
}

async fn cordon(client: &mut Client, node: &str, closed: bool) -> anyhow::Result<()> {
    let path = format!("/api/v1/nodes/{node}");
    for _ in 0..50 {
        let mut object: Value = serde_json::from_slice(&client.insist(&path).await?)?;
        object["spec"]["unschedulable"] = closed.into();
        let answer = client.send(Method::PUT, &path, Bytes::from(object.to_string())).await;
        if answer.is_ok_and(|(status, _)| status.is_success()) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("{node} could not be {}", if closed { "cordoned" } else { "uncordoned" })
}

/// What the processes of a pod may do when their machine thaws, before the watchdog has had its turn: software on the
/// machine itself cannot do better than to be quick (`crates/node/src/fence.rs`).
pub const WAKING: Duration = Duration::from_millis(100);

/// What the stateful pod wrote: each life, on the recording's clock, of which `now` is the present; and how long a life
/// that should have ended went on after a thaw of its machine, if no longer than [`WAKING`].
pub fn lives(lab: &Lab, now: At, thaws: &[At]) -> anyhow::Result<(Vec<Life>, Duration)> {
    let path = lab.shared().join(LOG);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let epoch = i128::try_from(serve::uptime()?)? - i128::try_from(now.as_millis())?;
    Ok(parse(&text, epoch, thaws))
}

fn parse(text: &str, epoch: i128, thaws: &[At]) -> (Vec<Life>, Duration) {
    let mut lives: BTreeMap<(&str, &str), (At, At)> = BTreeMap::new();
    // When a life first wrote after a thaw, and last, shortly after that.
    type Span = (At, At);
    let mut awake: BTreeMap<((&str, &str), At), Span> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let (Some(name), Some(uid), Some(at)) = (words.next(), words.next(), words.next()) else { continue };
        let Ok(at) = at.parse::<i128>() else { continue };
        let at = Duration::from_millis(u64::try_from(at - epoch).unwrap_or(0));
        if let Some(thaw) = thaws.iter().rfind(|thaw| **thaw <= at)
            && lives.get(&(name, uid)).is_some_and(|(first, _)| first < thaw)
        {
            let woke = awake.entry(((name, uid), *thaw)).or_insert((at, at));
            if at - woke.0 <= WAKING {
                woke.1 = at;
                continue;
            }
        }
        let life = lives.entry((name, uid)).or_insert((at, at));
        *life = (life.0.min(at), life.1.max(at));
    }
    let life = |((name, uid), (first, last)): ((&str, &str), (At, At))| Life {
        name: name.into(),
        uid: uid.into(),
        first,
        last,
    };
    // Of those that ended with it; others may write as long as they like.
    let ended = awake.iter().filter(|((of, thaw), _)| lives.get(of).is_some_and(|(_, last)| last < thaw));
    let woke = ended.map(|(_, (first, last))| *last - *first).max().unwrap_or_default();
    (lives.into_iter().map(life).collect(), woke)
}

/// The name of a client, for reports.
pub fn name(place: &str, service: &str) -> Arc<str> {
    format!("{place}, {service}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_from_a_log() {
        let (lives, _) = parse("w-0 a 1000\nw-0 a 1050\nw-0 b 3000\nw-0 a 1100\ntorn li", 900, &[]);
        let times: Vec<_> = lives.iter().map(|l| (&*l.uid, l.first.as_millis(), l.last.as_millis())).collect();
        assert_eq!(times, [("a", 100, 200), ("b", 2100, 2100)]);
    }

    #[test]
    fn a_life_that_wakes_up() {
        let last = |text: &str| {
            let (lives, woke) = parse(text, 0, &[Duration::from_millis(5000)]);
            (lives[0].last.as_millis(), woke.as_millis())
        };
        // Frozen at 1000, awake at 5010, and killed at once; or not killed.
        assert_eq!(last("w-0 a 900\nw-0 a 1000\nw-0 a 5010\nw-0 a 5012"), (1000, 2));
        assert_eq!(last("w-0 a 1000\nw-0 a 5010\nw-0 a 5060\nw-0 a 5120"), (5120, 0));
    }
}
