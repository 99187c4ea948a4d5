//! ReplicaSet and ReplicationController: as many pods as asked for.

use std::{collections::HashMap, marker::PhantomData, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::ReplicaSet,
    core::v1::{Pod, ReplicationController},
};

use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue, follow_owned,
        objects::{
            controller_of, controller_reference, is_active, is_deleting, is_finished, name, selects,
            selects_everything, uid,
        },
    },
};

mod kind;
mod plan;
mod pods;
#[cfg(test)]
mod simulated;

use kind::Kind;
pub use plan::{Scale, plan, status};
pub use pods::Failure;
pub(crate) use pods::{create_each, delete_pod, plain, pod_from_template};

/// The controller of ReplicaSets.
pub(crate) type ReplicaSets = Replicas<ReplicaSet>;
/// The controller of ReplicationControllers.
pub(crate) type ReplicationControllers = Replicas<ReplicationController>;

/// The controller of either.
pub(crate) struct Replicas<K> {
    context: Arc<Context>,
    kind: PhantomData<fn() -> K>,
}

impl<K: Kind> Replicas<K> {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let caches = &context.caches;
        let wants = |owner: &K, pod: &Pod| selects(Some(&owner.as_set().spec.selector), pod.metadata.labels.as_ref());
        follow_owned(&caches.pods, K::cache(caches), K::KIND, wants, &queue);
        let q = queue.clone();
        K::cache(caches).on_change(move |old, new| {
            if let Some(owner) = new.or(old) {
                q.add(Key::of(&**owner));
            }
        });
        (Arc::new(Replicas::<K> { context, kind: PhantomData }), queue)
    }

    fn neighbours(&self, set: &ReplicaSet) -> HashMap<String, usize> {
        let caches = &self.context.caches;
        let siblings = match controller_of(set) {
            Some(owner) => caches.replica_sets.controlled_by(&owner.uid).iter().map(|s| uid(&**s).to_owned()).collect(),
            None => vec![uid(set).to_owned()],
        };
        let mut count = HashMap::new();
        for pod in siblings.iter().flat_map(|uid| caches.pods.controlled_by(uid)).filter(|pod| is_active(pod)) {
            if let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) {
                *count.entry(node).or_default() += 1;
            }
        }
        count
    }

    async fn scale(&self, owner: &K, set: &ReplicaSet, pods: &[Arc<Pod>], now: Timestamp) -> Result<(), Failure> {
        let spec = &set.spec;
        match plan(spec.replicas.unwrap_or(1), pods, &self.neighbours(set), now) {
            Scale::Create(count) => {
                let template = spec.template.clone().unwrap_or_default();
                let pod = pod_from_template(&template, format!("{}-", name(set)), controller_reference(owner));
                create_each(&self.context, owner, &vec![&pod; count]).await
            }
            Scale::Delete(names) => {
                let chosen = pods.iter().filter(|pod| names.iter().any(|n| n == name(&***pod)));
                let results = join_all(chosen.map(|pod| delete_pod(&self.context, owner, pod))).await;
                results.into_iter().collect()
            }
        }
    }
}

#[async_trait]
impl<K: Kind> Controller for Replicas<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    async fn ready(&self) {
        K::cache(&self.context.caches).synced().await;
        self.context.caches.pods.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let cache = K::cache(&self.context.caches);
        let Some(owner) = cache.get(key) else { return Ok(None) };
        let set = owner.as_set();
        if selects_everything(&set.spec.selector) {
            return Ok(None);
        }
        // What has ended is not worth adopting.
        let pods = self.context.claim_pods(&*owner, &set.spec.selector, is_active, |_, _, _| {}).await?;
        let terminating = pods.iter().filter(|pod| is_deleting(&***pod) && !is_finished(pod)).count();
        let active: Vec<_> = pods.into_iter().filter(|pod| is_active(pod)).collect();
        let scaled = match is_deleting(&*owner) {
            true => Ok(()),
            false => self.scale(&owner, &set, &active, self.context.now()).await,
        };
        // The status tells of what was seen before scaling, as upstream's does; the next pass follows at once.
        let (status, again) = status(&set, &active, terminating, scaled.as_ref().err(), self.context.now());
        if let Some(updated) = owner.with_status(status) {
            self.context.replace_status(cache, &updated).await?;
        }
        scaled?;
        Ok(again)
    }
}
