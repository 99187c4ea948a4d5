//! Deployment: rolls replica sets forward and back.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use kube::api::{DeleteParams, PropagationPolicy};
use serde_json::json;

use crate::{
    context::Context,
    replica_set::plain,
    runtime::{
        Controller, Key, Queue, Recorder,
        events::Severity,
        follow_owned, namespace_is_terminating,
        objects::{
            Claim, adopt_patch, claim, controller_of, is_deleting, name, namespace, release_patch, selects,
            selects_everything, uid,
        },
    },
};

mod conditions;
mod plan;
mod revision;

pub use plan::{Action, Input, Plan, plan};

pub(crate) struct Deployments {
    context: Arc<Context>,
    recorder: Recorder,
}

impl Deployments {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let caches = &context.caches;
        let q = queue.clone();
        caches.deployments.on_change(move |old, new| {
            if let Some(deployment) = new.or(old) {
                q.add(Key::of(&**deployment));
            }
        });
        follow_owned(
            &caches.replica_sets,
            &caches.deployments,
            "Deployment",
            |deployment, set| selects(Some(&deployment.spec.selector), set.metadata.labels.as_ref()),
            &queue,
        );
        // Recreate waits for the last old pod to be gone, which no replica set's status tells.
        let (q, deployments, sets) = (queue.clone(), caches.deployments.clone(), caches.replica_sets.clone());
        caches.pods.on_change(move |old, new| {
            let Some(pod) = old.filter(|_| new.is_none()) else { return };
            let set = controller_of(&**pod).filter(|owner| owner.kind == "ReplicaSet");
            let set = set.and_then(|owner| sets.get(&Key::new(namespace(&**pod), &owner.name)));
            let key = set.as_deref().and_then(controller_of).map(|owner| Key::new(namespace(&**pod), &owner.name));
            if let Some(key) = key
                && deployments.get(&key).is_some_and(|d| plan::is_recreate(&d))
            {
                q.add(key);
            }
        });
        let recorder = context.recorder.as_source("deployment-controller");
        (Arc::new(Deployments { context, recorder }), queue)
    }

    async fn claim(&self, deployment: &Deployment) -> anyhow::Result<Vec<Arc<ReplicaSet>>> {
        let spec = &deployment.spec;
        let cache = &self.context.caches.replica_sets;
        let mut candidates = cache.controlled_by(uid(deployment));
        candidates.extend(cache.orphans(namespace(deployment)));
        let mut sets = Vec::new();
        for set in candidates {
            match claim(&*set, uid(deployment), is_deleting(deployment), &spec.selector) {
                Claim::Keep => sets.push(set),
                Claim::Ignore => {}
                Claim::Release => {
                    self.context.patch(cache, &*set, release_patch(&*set, uid(deployment))).await?;
                }
                Claim::Adopt => {
                    self.context.confirm(deployment).await?;
                    sets.push(Arc::new(self.context.patch(cache, &*set, adopt_patch(&*set, deployment)).await?));
                }
            }
        }
        Ok(sets)
    }

    /// Does what was planned. An error leaves the rest for the next pass, which plans anew.
    async fn apply(&self, deployment: &Deployment, plan: Plan) -> anyhow::Result<()> {
        let caches = &self.context.caches;
        let mut status = plan.status;
        for action in plan.actions {
            match action {
                Action::Annotate(annotations) => {
                    let patch = json!({"metadata": {"annotations": annotations}});
                    self.context.patch(&caches.deployments, deployment, patch).await?;
                }
                Action::Create(set) => {
                    if !self.create(deployment, &set, &mut status).await? {
                        break;
                    }
                }
                Action::Update { set, replicas, annotations, min_ready_seconds } => {
                    let mut spec = json!({"replicas": replicas});
                    if let Some(seconds) = min_ready_seconds {
                        spec["minReadySeconds"] = seconds.into();
                    }
                    let patch = json!({
                        "metadata": {"resourceVersion": set.metadata.resource_version, "annotations": annotations},
                        "spec": spec,
                    });
                    self.context.patch(&caches.replica_sets, &*set, patch).await?;
                    let before = set.spec.replicas.unwrap_or(1);
                    if before != replicas {
                        self.tell_scaled(deployment, name(&*set), before, replicas);
                    }
                }
                Action::Delete(set) => {
                    // What the set owned goes with it; it has no pods any more.
                    let params = DeleteParams {
                        propagation_policy: Some(PropagationPolicy::Background),
                        ..DeleteParams::default()
                    };
                    self.context.delete(&caches.replica_sets, &*set, params).await?;
                }
            }
        }
        if deployment.status.as_ref() != Some(&status) {
            let current = caches.deployments.get(&Key::of(deployment));
            let mut updated = current.map_or_else(|| deployment.clone(), |d| (*d).clone());
            updated.status = Some(status);
            self.context.replace_status(&caches.deployments, &updated).await?;
        }
        Ok(())
    }

    /// Creates the new replica set. False if its name was taken by another template's, so that another has to be
    /// found, or if the namespace is going away.
    async fn create(
        &self,
        deployment: &Deployment,
        set: &ReplicaSet,
        status: &mut k8s_openapi::api::apps::v1::DeploymentStatus,
    ) -> anyhow::Result<bool> {
        let caches = &self.context.caches;
        match self.context.create(&caches.replica_sets, namespace(deployment), set).await {
            Ok(created) => {
                let replicas = set.spec.replicas.unwrap_or(0);
                if replicas > 0 {
                    self.tell_scaled(deployment, name(&created), 0, replicas);
                }
                Ok(true)
            }
            Err(kube::Error::Api(answer)) if answer.is_already_exists() => {
                let existing = self.context.api::<ReplicaSet>(namespace(deployment)).get(name(set)).await?;
                let ours = controller_of(&existing).is_some_and(|owner| owner.uid == uid(deployment));
                if ours && revision::same_template(deployment, &existing) {
                    caches.replica_sets.note(existing);
                    return Ok(true);
                }
                status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
                Ok(false)
            }
            Err(error) if namespace_is_terminating(&error) => Ok(false),
            Err(error) => {
                let message = format!("Failed to create new replica set {:?}: {}", name(set), plain(&error));
                self.recorder.record(deployment, Severity::Warning, "ReplicaSetCreateError", &message);
                if conditions::has_deadline(deployment) {
                    conditions::set(
                        status,
                        "Progressing",
                        "False",
                        "ReplicaSetCreateError",
                        &message,
                        self.context.now(),
                    );
                    let mut updated = deployment.clone();
                    updated.status = Some(status.clone());
                    self.context.replace_status(&caches.deployments, &updated).await?;
                }
                Err(error.into())
            }
        }
    }

    fn tell_scaled(&self, deployment: &Deployment, set: &str, from: i32, to: i32) {
        let direction = if to > from { "up" } else { "down" };
        let message = format!("Scaled {direction} replica set {set} from {from} to {to}");
        self.recorder.record(deployment, Severity::Normal, "ScalingReplicaSet", message);
    }
}

#[async_trait]
impl Controller for Deployments {
    fn name(&self) -> &'static str {
        "deployment"
    }

    async fn ready(&self) {
        let caches = &self.context.caches;
        caches.deployments.synced().await;
        caches.replica_sets.synced().await;
        caches.pods.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        let Some(deployment) = caches.deployments.get(key) else { return Ok(None) };
        let spec = &deployment.spec;
        if selects_everything(&spec.selector) {
            let message = "This deployment is selecting all pods. A non-empty selector is required.";
            self.recorder.record(&*deployment, Severity::Warning, "SelectingAll", message);
            return Ok(None);
        }
        let sets = self.claim(&deployment).await?;
        let plan = {
            let pods = |set: &ReplicaSet| caches.pods.controlled_by(uid(set));
            plan(&Input { deployment: &deployment, sets: &sets, pods: &pods, now: self.context.now() })
        };
        let again = plan.again;
        self.apply(&deployment, plan).await?;
        Ok(again)
    }
}
