//! What others see of a decision: the binding, the pod's condition, events.

use std::sync::Arc;

use anyhow::Context as _;
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::{decide::Diagnosis, pod::PodInfo, preempt::Preemption};

/// Binds a pod to a node.
pub async fn bind(client: &Client, pod: &PodInfo, node: &str) -> Result<(), kube::Error> {
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid},
        "target": {"apiVersion": "v1", "kind": "Node", "name": node}});
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace);
    pods.create_subresource::<_, Value>("binding", &pod.name, &PostParams::default(), &binding).await.map(|_| ())
}

/// Tells the API what was decided. What it tells is of interest to people and not needed for scheduling, so it never
/// holds anything up: under pressure events are dropped.
#[derive(Clone)]
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

    /// A pod fits nowhere; and if that is `withdrawn`, it has no claim to room on a node any more.
    pub fn unschedulable(&self, pod: &PodInfo, diagnosis: &Diagnosis, withdrawn: bool) {
        let message = diagnosis.to_string();
        if pod.told.as_deref() == Some(&message) && !withdrawn {
            return;
        }
        tracing::debug!(pod = %pod.key(), message, "a pod fits nowhere");
        let mut status = unscheduled(&message);
        if withdrawn {
            status["nominatedNodeName"] = Value::Null;
        }
        let (reporter, event) = (self.clone(), self.event(pod, "Warning", "FailedScheduling", &message));
        let pod = named(pod);
        self.spawn(async move {
            if let Err(error) = reporter.patch(&pod, status).await {
                tracing::debug!(%error, "the condition of a pod was not written");
            }
            send(&reporter.client, event).await;
        });
    }

    /// Makes room for a pod: says so in its status, then asks those to go who are in its way. Their condition says why
    /// (<https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions>, KEP-3329), and
    /// they have their usual time to end.
    pub async fn preempt(&self, pod: &PodInfo, diagnosis: &Diagnosis, plan: &Preemption) -> anyhow::Result<()> {
        const AT_A_TIME: usize = 16;
        let message = diagnosis.to_string();
        let mut status = unscheduled(&message);
        status["nominatedNodeName"] = plan.node.as_str().into();
        // The claim comes first, so that another scheduler that takes over knows what the room is for.
        self.patch(pod, status).await.with_context(|| format!("{} was not nominated", pod.key()))?;
        let (client, event) = (self.client.clone(), self.event(pod, "Warning", "FailedScheduling", &message));
        self.spawn(async move { send(&client, event).await });
        for lesser in &plan.demoted {
            self.patch(lesser, json!({"nominatedNodeName": null}))
                .await
                .with_context(|| format!("the nomination of {} was not taken back", lesser.key()))?;
        }
        let mut ending = Vec::with_capacity(plan.victims.len());
        for victim in &plan.victims {
            if !victim.deleting {
                ending.push(self.end(victim, pod, &plan.node));
            }
        }
        futures::stream::iter(ending).buffer_unordered(AT_A_TIME).try_collect::<()>().await
    }

    async fn end(&self, victim: &PodInfo, pod: &PodInfo, node: &str) -> anyhow::Result<()> {
        let condition = json!({"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler",
            "message": format!("{}: preempting to accommodate a higher priority pod", self.name),
            "lastTransitionTime": stamp()});
        self.patch(victim, json!({"conditions": [condition]}))
            .await
            .with_context(|| format!("the condition of {} was not written", victim.key()))?;
        let preconditions = Some(Preconditions { uid: Some(victim.uid.clone()), resource_version: None });
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &victim.namespace);
        let deleted = pods.delete(&victim.name, &DeleteParams { preconditions, ..Default::default() }).await;
        match deleted {
            Ok(_) => {}
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("{} was not deleted", victim.key())),
        }
        tracing::info!(victim = %victim.key(), pod = %pod.key(), node, "a pod makes room for another");
        let message = format!("Preempted by pod {} on node {node}", pod.uid);
        let (client, event) = (self.client.clone(), self.event(victim, "Normal", "Preempted", &message));
        self.spawn(async move { send(&client, event).await });
        Ok(())
    }

    /// Changes a pod's status. One that is gone, or is another by now, needs no change.
    async fn patch(&self, pod: &PodInfo, status: Value) -> Result<(), kube::Error> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let patch = json!({"metadata": {"uid": pod.uid}, "status": status});
        match pods.patch_status(&pod.name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Ok(_) => Ok(()),
            Err(error) if is_gone(&error) => Ok(()),
            Err(error) => Err(error),
        }
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
        let (now, stamp) = (Timestamp::now(), stamp());
        let action = if reason == "Preempted" { "Preempting" } else { "Scheduling" };
        let event = json!({
            "metadata": {"name": format!("{}.{:x}", pod.name, now.as_nanosecond()), "namespace": pod.namespace},
            "involvedObject": {"kind": "Pod", "apiVersion": "v1", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid},
            "reason": reason, "message": message, "type": kind, "count": 1,
            "firstTimestamp": stamp, "lastTimestamp": stamp,
            "source": {"component": self.name}, "reportingComponent": self.name, "reportingInstance": self.name, "action": action,
        });
        // Every field above is of the type that the schema says.
        serde_json::from_value(event).unwrap_or_default()
    }
}

/// The status of a pod that fits nowhere.
fn unscheduled(message: &str) -> Value {
    json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message,
        "lastProbeTime": null, "lastTransitionTime": stamp()}]})
}

fn stamp() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What names a pod in the API.
fn named(pod: &PodInfo) -> PodInfo {
    PodInfo { uid: pod.uid.clone(), namespace: pod.namespace.clone(), name: pod.name.clone(), ..Default::default() }
}

fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404 || status.code == 409)
}

async fn send(client: &Client, event: Event) {
    let namespace = event.metadata.namespace.clone().unwrap_or_default();
    let events: Api<Event> = Api::namespaced(client.clone(), &namespace);
    if let Err(error) = events.create(&PostParams::default(), &event).await {
        tracing::debug!(%error, "an event was not written");
    }
}
