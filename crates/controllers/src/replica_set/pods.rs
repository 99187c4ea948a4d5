//! Making and deleting pods for whoever owns them.

use std::borrow::Borrow;

use futures::future::join_all;
use k8s_openapi::{
    api::core::v1::{Pod, PodTemplateSpec},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::api::DeleteParams;

use crate::{
    context::Context,
    runtime::{
        events::Severity,
        namespace_is_terminating,
        objects::{name, namespace},
    },
};

/// A failure to create or delete pods, as the status tells it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Failure {
    /// `FailedCreate` or `FailedDelete`.
    pub reason: &'static str,
    /// What the API server said.
    pub message: String,
}

/// A pod made from a template for an owner.
pub(crate) fn pod_from_template(template: &PodTemplateSpec, generate_name: String, owner: OwnerReference) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(generate_name),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![owner]),
            ..Default::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// Creates pods: one, then two, then four and so on, so that a mistake in the template is met once and not a hundred times
/// (upstream's `slowStartBatch`).
pub(crate) async fn create_each<O, P>(context: &Context, owner: &O, pods: &[P]) -> Result<(), Failure>
where
    O: kube::Resource<DynamicType = ()>,
    P: Borrow<Pod>,
{
    let (mut left, mut batch) = (pods, 1);
    while !left.is_empty() {
        let (now, later) = left.split_at(batch.min(left.len()));
        for result in join_all(now.iter().map(|pod| create_pod(context, owner, pod.borrow()))).await {
            if !result? {
                return Ok(());
            }
        }
        (left, batch) = (later, batch * 2);
    }
    Ok(())
}

/// Creates one pod and tells of it. False when there is no point in creating more.
pub(crate) async fn create_pod<O>(context: &Context, owner: &O, pod: &Pod) -> Result<bool, Failure>
where
    O: kube::Resource<DynamicType = ()>,
{
    let recorder = context.recorder.as_source(source_of::<O>());
    match context.create(&context.caches.pods, namespace(owner), pod).await {
        Ok(pod) => {
            recorder.record(owner, Severity::Normal, "SuccessfulCreate", format!("Created pod: {}", name(&pod)));
            Ok(true)
        }
        Err(error) if namespace_is_terminating(&error) => Ok(false),
        Err(error) => {
            let message = plain(&error);
            recorder.record(owner, Severity::Warning, "FailedCreate", format!("Error creating: {message}"));
            Err(Failure { reason: "FailedCreate", message })
        }
    }
}

/// Deletes one pod and tells of it.
pub(crate) async fn delete_pod<O>(context: &Context, owner: &O, pod: &Pod) -> Result<(), Failure>
where
    O: kube::Resource<DynamicType = ()>,
{
    let recorder = context.recorder.as_source(source_of::<O>());
    match context.delete(&context.caches.pods, pod, DeleteParams::default()).await {
        Ok(()) => {
            recorder.record(owner, Severity::Normal, "SuccessfulDelete", format!("Deleted pod: {}", name(pod)));
            Ok(())
        }
        Err(error) => {
            let message = plain(&error);
            recorder.record(owner, Severity::Warning, "FailedDelete", format!("Error deleting: {message}"));
            Err(Failure { reason: "FailedDelete", message })
        }
    }
}

/// The name under which upstream's controller of a kind records events.
fn source_of<O: kube::Resource<DynamicType = ()>>() -> &'static str {
    match O::kind(&()).as_ref() {
        "ReplicaSet" => "replicaset-controller",
        "ReplicationController" => "replication-controller",
        "Job" => "job-controller",
        "StatefulSet" => "statefulset-controller",
        "DaemonSet" => "daemonset-controller",
        _ => "seawall",
    }
}

/// What the API server said, without the wrapping.
pub(crate) fn plain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}
