//! StatefulSet: pods with names that last.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::{ControllerRevision, StatefulSet},
    core::v1::Pod,
};
use kube::api::DeleteParams;
use serde_json::json;

use crate::{
    context::Context,
    replica_set::plain,
    runtime::{
        Controller, Key, Queue, Recorder,
        events::Severity,
        follow_owned, namespace_is_terminating,
        objects::{
            Claim, adopt_patch, claim, controller_of, is_active, is_deleting, name, namespace, owners_patch,
            release_patch, selects, selects_everything, uid,
        },
    },
};

mod plan;
mod pod;
mod revision;

pub use plan::{Action, Input, Plan, Why, plan};
pub use revision::{Newest, newest};

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
            |set: &StatefulSet| Some(&set.spec.selector),
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

    /// Asks the API server itself whether the set is still there: one that is being deleted must adopt nothing.
    async fn confirm(&self, set: &StatefulSet) -> anyhow::Result<()> {
        let fresh = self.context.api::<StatefulSet>(namespace(set)).get(name(set)).await?;
        anyhow::ensure!(uid(&fresh) == uid(set) && !is_deleting(&fresh), "the stateful set is being deleted");
        Ok(())
    }

    /// The pods that are the set's, after adopting and releasing. One whose name is not of the set's is not.
    async fn claim(&self, set: &StatefulSet) -> anyhow::Result<Vec<Arc<Pod>>> {
        let cache = &self.context.caches.pods;
        let mut candidates = cache.controlled_by(uid(set));
        candidates.extend(cache.orphans(namespace(set)));
        let mut pods = Vec::new();
        for pod in candidates.into_iter().filter(|pod| pod::ordinal(set, pod).is_some()) {
            match claim(&*pod, uid(set), is_deleting(set), &set.spec.selector) {
                Claim::Keep => pods.push(pod),
                Claim::Ignore => {}
                Claim::Release => {
                    self.context.patch(cache, &*pod, release_patch(&*pod, uid(set))).await?;
                }
                Claim::Adopt if !is_active(&pod) => {}
                Claim::Adopt => {
                    self.confirm(set).await?;
                    pods.push(Arc::new(self.context.patch(cache, &*pod, adopt_patch(&*pod, set)).await?));
                }
            }
        }
        Ok(pods)
    }

    /// The set's history, in order.
    async fn revisions(&self, set: &StatefulSet) -> anyhow::Result<Vec<Arc<ControllerRevision>>> {
        let cache = &self.context.caches.revisions;
        let mut revisions = cache.controlled_by(uid(set));
        for orphan in cache.orphans(namespace(set)) {
            let matches = selects(Some(&set.spec.selector), orphan.metadata.labels.as_ref());
            if matches && !is_deleting(set) && !is_deleting(&*orphan) {
                self.confirm(set).await?;
                revisions.push(Arc::new(self.context.patch(cache, &*orphan, adopt_patch(&*orphan, set)).await?));
            }
        }
        revision::sort(&mut revisions);
        Ok(revisions)
    }

    /// The revision of the set's template: found, brought up again, or made. None if its name was taken by another
    /// template's, so that another has to be found, or if the namespace is going away.
    async fn newest(
        &self,
        set: &StatefulSet,
        revisions: &[Arc<ControllerRevision>],
    ) -> anyhow::Result<Option<Arc<ControllerRevision>>> {
        let cache = &self.context.caches.revisions;
        match newest(set, revisions) {
            Newest::Known(revision) => Ok(Some(revision)),
            Newest::Again(revision, number) => {
                Ok(Some(Arc::new(self.context.patch(cache, &*revision, json!({"revision": number})).await?)))
            }
            Newest::Make(revision) => match self.context.create(cache, namespace(set), &*revision).await {
                Ok(made) => Ok(Some(Arc::new(made))),
                Err(kube::Error::Api(answer)) if answer.is_already_exists() => {
                    let there = self.context.api::<ControllerRevision>(namespace(set)).get(name(&*revision)).await?;
                    let ours = controller_of(&there).is_some_and(|owner| owner.uid == uid(set));
                    if ours && there.data.0 == revision.data.0 {
                        cache.note(there.clone());
                        return Ok(Some(Arc::new(there)));
                    }
                    let mut updated = set.clone();
                    let status = updated.status.get_or_insert_default();
                    status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
                    self.context.replace_status(&self.context.caches.stateful_sets, &updated).await?;
                    Ok(None)
                }
                Err(error) if namespace_is_terminating(&error) => Ok(None),
                Err(error) => Err(error.into()),
            },
        }
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
        let revisions = self.revisions(&set).await?;
        let Some(update) = self.newest(&set, &revisions).await? else { return Ok(None) };
        let current = set.status.as_ref().and_then(|status| status.current_revision.as_deref()).unwrap_or_default();
        let current = revisions.iter().find(|r| name(&***r) == current).unwrap_or(&update);
        let claim = |claim: &str| caches.claims.get(&Key::new(namespace(&*set), claim));
        let plan =
            plan(&Input { set: &set, pods: &pods, current, update: &update, claim: &claim, now: Timestamp::now() });
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
        for old in revision::surplus(&set, &revisions, &plan::used(&pods, &plan.status)) {
            self.context.delete(&caches.revisions, &*old, DeleteParams::default()).await?;
        }
        Ok(plan.again)
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
