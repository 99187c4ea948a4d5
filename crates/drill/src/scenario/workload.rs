//! The workload of a drill: a web server on each agent, behind a Service.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::roles::workers;
use crate::{
    lab::Lab,
    traffic::{Client, NAMESPACE},
};

const IMAGE: &str = "seawall.local/drill:v1";
const PATIENCE: Duration = Duration::from_secs(90);

/// Puts the image on the machines; without a registry, and only where it is not yet.
pub async fn image(lab: &Lab) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    for machine in workers(lab) {
        let args = ["--address", "/run/seawall/containerd/containerd.sock", "--namespace", "k8s.io"];
        let listed = machine.run("ctr", &[&args[..], &["images", "ls", "-q"]].concat(), PATIENCE).await;
        // One that cannot say is asked again by the import, whose error says more.
        if !listed.is_ok_and(|l| l.lines().any(|image| image == IMAGE)) {
            missing.push(machine);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let archive = archive(lab).await?;
    for machine in &missing {
        machine.import(&archive).await?;
    }
    std::fs::remove_file(&archive).with_context(|| archive.display().to_string())
}

async fn archive(lab: &Lab) -> anyhow::Result<PathBuf> {
    let path = lab.directory().join("drill-image.tar");
    let serve = "trap 'exit 0' TERM; mkdir -p /www; hostname >/www/index.html; httpd -f -p 8080 -h /www & wait $!";
    let mut command = tokio::process::Command::new(lab.binary());
    command.args(["--log", "warn", "image", "build", "--busybox", "-t", IMAGE, "--output"]).arg(&path);
    command.args(["--", "sh", "-c", serve]).stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output = command.output().await.with_context(|| lab.binary().display().to_string())?;
    ensure!(output.status.success(), "seawall image build: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(path)
}

/// Makes it, waits until it is ready, and gives the Service's address.
pub async fn deploy(lab: &Lab, client: &mut Client) -> anyhow::Result<SocketAddr> {
    let replicas = workers(lab).len();
    let labels = json!({"app": "drill"});
    // One on each agent; those of the control plane are left to it.
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": labels},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels},
            "spec": {
                "terminationGracePeriodSeconds": 2,
                "affinity": {
                    "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
                        {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}}]},
                    "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "node-role.kubernetes.io/control-plane", "operator": "DoesNotExist"}]}]}},
                },
                "containers": [{"name": "web", "image": IMAGE, "imagePullPolicy": "Never",
                    "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}}],
            }}},
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    create(client, &format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments"), &deployment).await?;
    let service = create(client, &format!("/api/v1/namespaces/{NAMESPACE}/services"), &service).await?;
    let address = service["spec"]["clusterIP"].as_str().context("the Service has no address")?;
    let address = SocketAddr::new(address.parse().context("the Service's address")?, 80);
    let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/web");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let object: Value = serde_json::from_slice(&client.insist(&path).await?)?;
        let ready = object["status"]["readyReplicas"].as_u64().unwrap_or(0);
        if ready == replicas as u64 {
            return Ok(address);
        }
        ensure!(Instant::now() < deadline, "{ready} of {replicas} pods of the workload are ready after {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn create(client: &mut Client, path: &str, object: &Value) -> anyhow::Result<Value> {
    let (status, body) = client.send(Method::POST, path, Bytes::from(object.to_string())).await?;
    let text = String::from_utf8_lossy(&body);
    ensure!(status.is_success(), "POST {path}: {status}: {text}");
    Ok(serde_json::from_slice(&body)?)
}
