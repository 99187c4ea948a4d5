//! StatefulSet: pods with names that last.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::api::{apps::v1::StatefulSet, core::v1::Pod};
use kube::api::DeleteParams;
use serde_json::json;

use crate::{
    context::Context,
    history,
    replica_set::plain,
    runtime::{
        Controller, Key, Queue, Recorder,
        events::Severity,
        follow_owned, namespace_is_terminating,
        objects::{controller_of, is_active, name, namespace, owners_patch, selects, selects_everything, uid},
    },
};

mod plan;
mod pod;

pub use plan::{Action, Input, Plan, Why, plan};

pub(crate) struct StatefulSets {
    context: Arc<Context>,
    recorder: Recorder,
}

impl StatefulSets {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let caches = &context.caches;
        let q = queue.clone();
        caches.stateful_sets.on_change(move |old, new| {
            if let Some(set) = new.or(old) {
                q.add(Key::of(&**set));
            }
        });
        follow_owned(
            &caches.pods,
            &caches.stateful_sets,
            "StatefulSet",
            |set, pod| selects(Some(&set.spec.selector), pod.metadata.labels.as_ref()),
            &queue,
        );
        // A claim that was in the way has gone.
        let (q, sets) = (queue.clone(), caches.stateful_sets.clone());
        caches.claims.on_change(move |old, new| {
            let Some(gone) = old.filter(|_| new.is_none()) else { return };
            for set in sets.in_namespace(namespace(&**gone)) {
                let mut templates = set.spec.volume_claim_templates.iter().flatten();
                if templates.any(|t| name(&**gone).starts_with(&format!("{}-{}-", name(t), name(&*set)))) {
                    q.add(Key::of(&*set));
                }
            }
        });
        let q = queue.clone();
        caches.revisions.on_change(move |old, new| {
            let Some(gone) = old.filter(|_| new.is_none()) else { return };
            if let Some(owner) = controller_of(&**gone).filter(|owner| owner.kind == "StatefulSet") {
                q.add(Key::new(namespace(&**gone), &owner.name));
            }
        });
        let recorder = context.recorder.as_source("statefulset-controller");
        (Arc::new(StatefulSets { context, recorder }), queue)
    }

    /// The pods that are the set's, after adopting and releasing. One whose name is not of the set's is not.
    async fn claim(&self, set: &StatefulSet) -> anyhow::Result<Vec<Arc<Pod>>> {
        let ours = |pod: &Pod| pod::ordinal(set, pod).is_some();
        let worth = |pod: &Pod| ours(pod) && is_active(pod);
        let mut pods = self.context.claim_pods(set, &set.spec.selector, worth, |_, _, _| {}).await?;
        pods.retain(|pod| ours(pod));
        Ok(pods)
    }

    fn tell(&self, set: &StatefulSet, what: &str, done: &kube::Result<()>) {
        let (reason, message, severity) = match done {
            Ok(()) => ("Successful", format!("{what} in StatefulSet {} successful", name(set)), Severity::Normal),
            Err(error) => {
                let message = format!("{what} in StatefulSet {} failed error: {}", name(set), plain(error));
                ("Failed", message, Severity::Warning)
            }
        };
        let verb = if what.starts_with("create") { "Create" } else { "Delete" };
        self.recorder.record(set, severity, &format!("{reason}{verb}"), message);
    }

    /// Does one thing. False if there is no point in doing more.
    async fn act(&self, set: &StatefulSet, action: &Action) -> anyhow::Result<bool> {
        let caches = &self.context.caches;
        let created = |what: String, done: kube::Result<()>| match done {
            Err(error) if namespace_is_terminating(&error) => Ok(false),
            done => {
                self.tell(set, &what, &done);
                done.map(|()| true)
            }
        };
        match action {
            Action::CreateClaim(claim) => {
                let done = self.context.create(&caches.claims, namespace(set), &**claim).await.map(drop);
                Ok(created(format!("create Claim {}", name(&**claim)), done)?)
            }
            Action::OwnClaim(claim, owners) => {
                self.context.patch(&caches.claims, &**claim, owners_patch(&**claim, owners.clone())).await?;
                Ok(true)
            }
            Action::Create(pod) => {
                let done = self.context.create(&caches.pods, namespace(set), &**pod).await.map(drop);
                Ok(created(format!("create Pod {}", name(&**pod)), done)?)
            }
            Action::Delete(pod, why) => {
                let set_name = format!("{}/{}", namespace(set), name(set));
                match why {
                    Why::Failed => {
                        let message = format!("StatefulSet {set_name} is recreating failed Pod {}", name(&**pod));
                        self.recorder.record(set, Severity::Warning, "RecreatingFailedPod", message);
                    }
                    Why::Ended => {
                        let message = format!("StatefulSet {set_name} is recreating terminated Pod {}", name(&**pod));
                        self.recorder.record(set, Severity::Normal, "RecreatingTerminatedPod", message);
                    }
                    Why::Surplus | Why::Outdated => {}
                }
                let done = self.context.delete(&caches.pods, &**pod, DeleteParams::default()).await;
                self.tell(set, &format!("delete Pod {}", name(&**pod)), &done);
                done?;
                Ok(true)
            }
            Action::Label(pod, labels) => {
                let patch = json!({"metadata": {"uid": uid(&**pod), "labels": labels}});
                self.context.patch(&caches.pods, &**pod, patch).await?;
                Ok(true)
            }
        }
    }
}

#[async_trait]
impl Controller for StatefulSets {
    fn name(&self) -> &'static str {
        "statefulset"
    }

    async fn ready(&self) {
        let caches = &self.context.caches;
        caches.stateful_sets.synced().await;
        caches.pods.synced().await;
        caches.revisions.synced().await;
        caches.claims.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        let Some(set) = caches.stateful_sets.get(key) else { return Ok(None) };
        if selects_everything(&set.spec.selector) {
            return Ok(None);
        }
        let pods = self.claim(&set).await?;
        let revisions = self.context.revisions(&*set).await?;
        let update = self.context.newest_revision(&caches.stateful_sets, &*set, &revisions).await?;
        let Some(update) = update else { return Ok(None) };
        let current = set.status.as_ref().and_then(|status| status.current_revision.as_deref()).unwrap_or_default();
        let current = revisions.iter().find(|r| name(&***r) == current).unwrap_or(&update);
        let claim = |claim: &str| caches.claims.get(&Key::new(namespace(&*set), claim));
        let plan =
            plan(&Input { set: &set, pods: &pods, current, update: &update, claim: &claim, now: self.context.now() });
        let mut result = Ok(());
        for action in &plan.actions {
            match self.act(&set, action).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        // The status tells of what was seen before; the next pass follows at once.
        if set.status.as_ref() != Some(&plan.status) {
            let mut updated = (*set).clone();
            updated.status = Some(plan.status.clone());
            self.context.replace_status(&caches.stateful_sets, &updated).await?;
        }
        result?;
        for old in history::surplus(&*set, &revisions, &plan::used(&pods, &plan.status)) {
            self.context.delete(&caches.revisions, &*old, DeleteParams::default()).await?;
        }
        Ok(plan.again)
    }
}

#[cfg(test)]
mod simulated;
#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
