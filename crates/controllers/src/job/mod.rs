//! Job: runs pods until enough of them have succeeded (<https://kubernetes.io/docs/concepts/workloads/controllers/job/>).

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::future::join_all;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod},
};
use kube::api::{DeleteParams, PropagationPolicy};
use serde_json::{Value, json};

use crate::{
    context::Context,
    replica_set::{create_each, delete_pod, pod_from_template},
    runtime::{
        Controller, Key, Queue,
        events::Severity,
        is_not_found,
        objects::{Claim, controller_of, controller_reference, name, namespace, selects, uid},
    },
};

mod end;
pub mod indexes;
pub mod plan;
#[cfg(test)]
mod plan_tests;
pub mod policy;
#[cfg(test)]
mod simulated;

use plan::{FAILURES, FINALIZER, IGNORED, INDEX, Plan, condition, is_tracked, plan};

/// Says whose pod it is, even when the reference to the Job has been taken away.
const JOB_NAME: &str = "batch.kubernetes.io/job-name";
/// What `managedBy` says if the Job is ours.
const US: &str = "kubernetes.io/job-controller";

/// A pod for the Job; for one of its indexes if it has them. `failures` are those of its index so far, if they are counted.
pub fn new_pod(job: &Job, index: Option<i32>, failures: Option<(i32, i32)>) -> Pod {
    let prefix = match index {
        Some(index) => format!("{}-{index}-", name(job)),
        None => format!("{}-", name(job)),
    };
    let template = job.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default();
    let mut pod = pod_from_template(&template, prefix, controller_reference(job));
    let finalizers = pod.metadata.finalizers.get_or_insert_default();
    if !finalizers.iter().any(|f| f == FINALIZER) {
        finalizers.push(FINALIZER.into());
    }
    if let (Some(index), Some(spec)) = (index, pod.spec.as_mut()) {
        let annotations = pod.metadata.annotations.get_or_insert_default();
        annotations.insert(INDEX.into(), index.to_string());
        if let Some((counted, ignored)) = failures {
            annotations.insert(FAILURES.into(), counted.to_string());
            if ignored > 0 {
                annotations.insert(IGNORED.into(), ignored.to_string());
            }
        }
        pod.metadata.labels.get_or_insert_default().insert(INDEX.into(), index.to_string());
        spec.hostname.get_or_insert_with(|| format!("{}-{index}", name(job)));
        let field = ObjectFieldSelector { field_path: format!("metadata.labels['{INDEX}']"), api_version: None };
        let from = EnvVarSource { field_ref: Some(field), ..Default::default() };
        for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
            let env = container.env.get_or_insert_default();
            if !env.iter().any(|e| e.name == "JOB_COMPLETION_INDEX") {
                let value_from = Some(from.clone());
                env.push(EnvVar { name: "JOB_COMPLETION_INDEX".into(), value: None, value_from });
            }
        }
    }
    pod
}

pub(crate) struct Jobs {
    context: Arc<Context>,
}

impl Jobs {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let (q, jobs) = (queue.clone(), context.caches.jobs.clone());
        context.caches.pods.on_change(move |old, new| {
            for pod in old.into_iter().chain(new) {
                match controller_of(&**pod) {
                    Some(owner) if owner.kind == "Job" => q.add(Key::new(namespace(&**pod), &owner.name)),
                    Some(_) => {}
                    None => {
                        let job = pod.metadata.labels.as_ref().and_then(|labels| labels.get(JOB_NAME));
                        if let Some(job) = job.filter(|_| is_tracked(pod)) {
                            q.add(Key::new(namespace(&**pod), job));
                        }
                        for job in jobs.in_namespace(namespace(&**pod)) {
                            let selector = job.spec.as_ref().and_then(|spec| spec.selector.as_ref());
                            if selects(selector, pod.metadata.labels.as_ref()) {
                                q.add(Key::of(&*job));
                            }
                        }
                    }
                }
            }
        });
        let q = queue.clone();
        context.caches.jobs.on_change(move |old, new| {
            if let Some(job) = new.or(old) {
                q.add(Key::of(&**job));
            }
        });
        (Arc::new(Jobs { context }), queue)
    }

    async fn release(&self, pod: &Arc<Pod>) -> kube::Result<()> {
        if !is_tracked(pod) {
            return Ok(());
        }
        let meta = &pod.metadata;
        let kept = without_finalizer(pod);
        let patch =
            json!({"metadata": {"uid": meta.uid, "resourceVersion": meta.resource_version, "finalizers": kept}});
        match self.context.patch(&self.context.caches.pods, &**pod, patch).await {
            Err(error) if is_not_found(&error) => self.context.caches.pods.note_gone(pod),
            other => drop(other?),
        }
        Ok(())
    }

    /// Pods whose Job is gone are not counted by anybody: nothing must hold them.
    async fn release_strays(&self, key: &Key, job: Option<&Job>) -> anyhow::Result<()> {
        let stray = |pod: &Arc<Pod>| match controller_of(&**pod) {
            Some(owner) => owner.kind == "Job" && owner.name == key.name && job.map(uid) != Some(&owner.uid),
            None => pod.metadata.labels.as_ref().and_then(|labels| labels.get(JOB_NAME)) == Some(&key.name),
        };
        let pods = self.context.caches.pods.in_namespace(&key.namespace);
        let strays: Vec<_> = pods.into_iter().filter(|pod| is_tracked(pod) && stray(pod)).collect();
        if strays.is_empty() {
            return Ok(());
        }
        // The cache may be behind; the API server is not.
        let live = self.context.api::<Job>(&key.namespace).get_opt(&key.name).await?;
        let live = live.as_ref().map(uid);
        for pod in strays.iter().filter(|pod| controller_of(&***pod).is_none_or(|owner| Some(&*owner.uid) != live)) {
            self.release(pod).await?;
        }
        Ok(())
    }

    fn tell(&self, job: &Job, next: &Job) {
        let (old, new) = (job.status.clone().unwrap_or_default(), next.status.clone().unwrap_or_default());
        let recorder = self.context.recorder.as_source("job-controller");
        let began = |type_| condition(&new, type_).filter(|_| condition(&old, type_).is_none());
        if began("Complete").is_some() {
            recorder.record(job, Severity::Normal, "Completed", "Job completed");
        }
        if let Some(failure) = began("Failed") {
            let reason = failure.reason.clone().unwrap_or_default();
            recorder.record(job, Severity::Warning, &reason, failure.message.clone().unwrap_or_default());
        }
        if began("Suspended").is_some() {
            recorder.record(job, Severity::Normal, "Suspended", "Job suspended");
        }
        if condition(&old, "Suspended").is_some() && condition(&new, "Suspended").is_none() {
            recorder.record(job, Severity::Normal, "Resumed", "Job resumed");
        }
    }

    /// The Job's pods, after adopting and releasing: what is taken in is counted, and what is let go of is not.
    async fn claim(&self, job: &Job) -> anyhow::Result<Vec<Arc<Pod>>> {
        let cache = &self.context.caches.pods;
        let status = job.status.clone().unwrap_or_default();
        let is_over = condition(&status, "Complete").or_else(|| condition(&status, "Failed")).is_some();
        let selector = job.spec.as_ref().and_then(|spec| spec.selector.as_ref()).filter(|_| !is_over);
        // The selector is made when the Job is; one without selects nothing.
        let Some(selector) = selector else { return Ok(cache.controlled_by(uid(job))) };
        let change = |claim: Claim, pod: &Pod, patch: &mut Value| {
            let mut finalizers = without_finalizer(pod).unwrap_or_default();
            if claim == Claim::Adopt {
                finalizers.push(FINALIZER.into());
            }
            patch["metadata"]["finalizers"] = json!(Some(finalizers).filter(|list| !list.is_empty()));
        };
        self.context.claim_pods(job, selector, |_| true, change).await
    }

    /// Does what was planned, after the status has been written: what is released without having been written down would be
    /// lost.
    async fn apply(&self, job: &Job, pods: &[Arc<Pod>], plan: &Plan) -> anyhow::Result<()> {
        let chosen = |uids: &[String]| -> Vec<Arc<Pod>> {
            pods.iter().filter(|pod| uids.iter().any(|id| id == uid(&***pod))).cloned().collect()
        };
        let (release, discard, delete) = (chosen(&plan.release), chosen(&plan.discard), chosen(&plan.delete));
        let released: Vec<_> = release.iter().chain(&discard).map(|pod| self.release(pod)).collect();
        join_all(released).await.into_iter().collect::<kube::Result<()>>()?;
        let deleted: Vec<_> = discard.iter().chain(&delete).map(|pod| delete_pod(&self.context, job, pod)).collect();
        join_all(deleted).await.into_iter().collect::<Result<(), _>>()?;
        let pod = |index: &Option<i32>| new_pod(job, *index, index.and_then(|i| plan.failures.get(&i).copied()));
        let create: Vec<Pod> = plan.create.iter().map(pod).collect();
        create_each(&self.context, job, &create).await?;
        if plan.expired {
            self.expire(job).await?;
        }
        Ok(())
    }

    /// Deletes a Job that has outlived its time, if it still has when the API server itself is asked.
    async fn expire(&self, job: &Job) -> anyhow::Result<()> {
        let live = self.context.api::<Job>(namespace(job)).get_opt(name(job)).await?;
        let over = |live: &Job| uid(live) == uid(job) && end::expired(live, self.context.now()).is_ok_and(|yes| yes);
        if live.is_some_and(|live| over(&live)) {
            let policy = Some(PropagationPolicy::Foreground);
            let params = DeleteParams { propagation_policy: policy, ..DeleteParams::default() };
            self.context.delete(&self.context.caches.jobs, job, params).await?;
        }
        Ok(())
    }
}

/// The finalizers of a pod but for ours; none if there are no others.
fn without_finalizer(pod: &Pod) -> Option<Vec<String>> {
    let kept = pod.metadata.finalizers.iter().flatten().filter(|f| *f != FINALIZER).cloned();
    Some(kept.collect::<Vec<_>>()).filter(|list| !list.is_empty())
}

#[async_trait]
impl Controller for Jobs {
    fn name(&self) -> &'static str {
        "job"
    }

    async fn ready(&self) {
        self.context.caches.jobs.synced().await;
        self.context.caches.pods.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let cache = &self.context.caches.jobs;
        let job = cache.get(key);
        self.release_strays(key, job.as_deref()).await?;
        let Some(job) = job else { return Ok(None) };
        if job.spec.as_ref().and_then(|spec| spec.managed_by.as_deref()).is_some_and(|by| by != US) {
            return Ok(None);
        }
        let pods = self.claim(&job).await?;
        let plan = plan(&job, &pods, self.context.now());
        if job.status.as_ref() != Some(&plan.status) {
            let next = Job { status: Some(plan.status.clone()), ..Job::clone(&job) };
            self.context.replace_status(cache, &next).await?;
            self.tell(&job, &next);
        }
        self.apply(&job, &pods, &plan).await?;
        Ok(plan.again)
    }
}
