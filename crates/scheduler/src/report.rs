//! What others see of a decision: the binding, the pod's condition, events.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::sync::Semaphore;

use crate::{decide::Diagnosis, pod::PodInfo};

/// Binds a pod to a node.
pub async fn bind(client: &Client, pod: &PodInfo, node: &str) -> Result<(), kube::Error> {
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid},
        "target": {"apiVersion": "v1", "kind": "Node", "name": node}});
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace);
    pods.create_subresource::<_, serde_json::Value>("binding", &pod.name, &PostParams::default(), &binding)
        .await
        .map(|_| ())
}

/// Tells the API what was decided. What it tells is of interest to people and not needed for scheduling, so it never
/// holds anything up: under pressure events are dropped.
pub struct Reporter {
    client: Client,
    name: String,
    slots: Arc<Semaphore>,
}

impl Reporter {
    const SLOTS: usize = 256;

    pub fn new(client: Client, name: String) -> Reporter {
        Reporter { client, name, slots: Arc::new(Semaphore::new(Self::SLOTS)) }
    }

    /// A pod was bound.
    pub fn scheduled(&self, pod: &PodInfo, node: &str) {
        let message = format!("Successfully assigned {} to {node}", pod.key());
        let (client, event) = (self.client.clone(), self.event(pod, "Normal", "Scheduled", &message));
        self.spawn(async move { send(&client, event).await });
    }

    /// A pod fits nowhere.
    pub fn unschedulable(&self, pod: &PodInfo, diagnosis: &Diagnosis) {
        let message = diagnosis.to_string();
        if pod.told.as_deref() == Some(&message) {
            return;
        }
        tracing::debug!(pod = %pod.key(), message, "a pod fits nowhere");
        let (client, event) = (self.client.clone(), self.event(pod, "Warning", "FailedScheduling", &message));
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let (name, now) = (pod.name.clone(), Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        let condition = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message,
            "lastProbeTime": null, "lastTransitionTime": now});
        let patch = json!({"metadata": {"uid": pod.uid}, "status": {"conditions": [condition]}});
        self.spawn(async move {
            if let Err(error) = pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(patch)).await {
                tracing::debug!(%error, "the condition of a pod was not written");
            }
            send(&client, event).await;
        });
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        match self.slots.clone().try_acquire_owned() {
            Ok(slot) => {
                tokio::spawn(async move {
                    let _slot = slot;
                    work.await;
                });
            }
            Err(_) => tracing::debug!("too much to report: an event is dropped"),
        }
    }

    fn event(&self, pod: &PodInfo, kind: &str, reason: &str, message: &str) -> Event {
        let now = Timestamp::now();
        let stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let event = json!({
            "metadata": {"name": format!("{}.{:x}", pod.name, now.as_nanosecond()), "namespace": pod.namespace},
            "involvedObject": {"kind": "Pod", "apiVersion": "v1", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid},
            "reason": reason, "message": message, "type": kind, "count": 1,
            "firstTimestamp": stamp, "lastTimestamp": stamp,
            "source": {"component": self.name}, "reportingComponent": self.name, "reportingInstance": self.name, "action": "Scheduling",
        });
        // Every field above is of the type that the schema says.
        serde_json::from_value(event).unwrap_or_default()
    }
}

async fn send(client: &Client, event: Event) {
    let namespace = event.metadata.namespace.clone().unwrap_or_default();
    let events: Api<Event> = Api::namespaced(client.clone(), &namespace);
    if let Err(error) = events.create(&PostParams::default(), &event).await {
        tracing::debug!(%error, "an event was not written");
    }
}
