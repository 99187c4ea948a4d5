//! A workload that tests look at while other things happen: two web servers behind a Service.

use std::{net::SocketAddr, time::Duration};

use crate::{Server, traffic, within};

/// The image that [`Server::serve_web`] makes.
pub const IMAGE: &str = "example.test/web:v1";

const WEB: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: example.test/web:v1
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
";

impl Server {
    /// Runs the Deployment `web` of two pods behind the Service `web`, and waits until it answers. Tells its address.
    ///
    /// # Panics
    /// If it does not come up.
    pub async fn serve_web(&self) -> SocketAddr {
        self.web_image(IMAGE, "here").await;
        self.kubectl.apply(WEB).await;
        self.web_answers().await
    }

    /// Waits until `web` is rolled out and answers at its Service, whose address is told.
    ///
    /// # Panics
    /// If it does not.
    pub async fn web_answers(&self) -> SocketAddr {
        self.kubectl.run("rollout status deployment/web --timeout=60s").await.ok();
        let address = format!("{}:80", self.kubectl.path("service/web", "{.spec.clusterIP}").await);
        let address = address.parse().unwrap_or_else(|e| panic!("the address of the Service, {address:?}: {e}"));
        within(Duration::from_secs(10), "the Service answers", async || traffic::get(address).await.ok()).await;
        address
    }
}
