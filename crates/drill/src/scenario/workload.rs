//! The workload of a drill: a web server on each agent, behind a Service.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{image, roles::workers};
use crate::{
    lab::Lab,
    traffic::{Client, NAMESPACE},
};

const IMAGE: &str = "seawall.local/drill:v1";
const PATIENCE: Duration = Duration::from_secs(90);

/// Puts the image on the machines.
pub async fn image(lab: &Lab) -> anyhow::Result<()> {
    let serve = "trap 'exit 0' TERM; mkdir -p /www; hostname >/www/index.html; httpd -f -p 8080 -h /www & wait $!";
    image::put(lab, &workers(lab), IMAGE, &["--busybox", "--", "sh", "-c", serve]).await
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
    client.create(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments"), &deployment).await?;
    let service = client.create(&format!("/api/v1/namespaces/{NAMESPACE}/services"), &service).await?;
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
