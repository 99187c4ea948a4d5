//! Claims and volumes that are in use are not taken away: a finalizer holds them until nobody uses them
//! (<https://kubernetes.io/docs/concepts/storage/persistent-volumes/#storage-object-in-use-protection>).

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::{
    Api, Resource,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue, is_not_found,
        objects::{is_deleting, name, namespace, uid},
    },
};

/// The finalizer of a claim.
pub const OF_CLAIM: &str = "kubernetes.io/pvc-protection";
/// The finalizer of a volume.
pub const OF_VOLUME: &str = "kubernetes.io/pv-protection";

/// What to do with a finalizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// It is as it should be.
    Keep,
    /// The object came from a time before it, or lost it.
    Add,
    /// The object may go.
    Remove,
}

/// Decides, given whether something that protects the object is at work.
pub fn plan<K: Resource>(object: &K, finalizer: &str, used: bool) -> Plan {
    let has = object.meta().finalizers.iter().flatten().any(|own| own == finalizer);
    match (is_deleting(object), has) {
        (true, true) if !used => Plan::Remove,
        // Nothing can be added to what is on its way out.
        (true, _) | (false, true) => Plan::Keep,
        (false, false) => Plan::Add,
    }
}

/// The claims that a pod uses.
fn claims_of(pod: &Pod) -> impl Iterator<Item = String> + '_ {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(claim), _) => Some(claim.claim_name.clone()),
        (None, Some(_)) => Some(format!("{}-{}", name(pod), volume.name)),
        (None, None) => None,
    })
}

/// Whether a pod uses a claim: from when it has a node, because only nodes look at volumes.
fn uses(pod: &Pod, claim: &str) -> bool {
    let placed = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).is_some_and(|node| !node.is_empty());
    placed && claims_of(pod).any(|own| own == claim)
}

/// Whether a volume belongs to somebody.
fn is_bound(volume: &PersistentVolume) -> bool {
    volume.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound")
}

/// The patch that sets finalizers to these, if nobody else has changed them meanwhile.
fn patch<K: Resource>(object: &K, finalizer: &str, plan: Plan) -> Value {
    let mut finalizers = object.meta().finalizers.clone().unwrap_or_default();
    finalizers.retain(|own| own != finalizer);
    if plan == Plan::Add {
        finalizers.push(finalizer.to_owned());
    }
    let version = object.meta().resource_version.as_deref();
    json!({"metadata": {"uid": uid(object), "resourceVersion": version, "finalizers": finalizers}})
}

pub(crate) struct Protection {
    context: Arc<Context>,
}

impl Protection {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let caches = &context.caches;
        let q = queue.clone();
        caches.claims.on_change(move |_, new| {
            if let Some(claim) = new {
                q.add(Key::of(&**claim));
            }
        });
        // A volume is told from a claim by its having no namespace.
        let q = queue.clone();
        caches.volumes.on_change(move |_, new| {
            if let Some(volume) = new {
                q.add(Key::of(&**volume));
            }
        });
        let q = queue.clone();
        caches.pods.on_change(move |old, new| {
            // Only that a pod is gone can free a claim.
            if let (Some(pod), None) = (old, new) {
                claims_of(pod).for_each(|claim| q.add(Key::new(namespace(&**pod), &claim)));
            }
        });
        (Arc::new(Protection { context }), queue)
    }

    async fn claim(&self, claim: &PersistentVolumeClaim) -> anyhow::Result<()> {
        let (context, own) = (&self.context, name(claim));
        let seen = context.caches.pods.in_namespace(namespace(claim)).iter().any(|pod| uses(pod, own));
        let plan = plan(claim, OF_CLAIM, seen);
        if plan == Plan::Keep {
            return Ok(());
        }
        if plan == Plan::Remove {
            // The cache may not have a pod yet that was placed just now.
            let pods = context.api::<Pod>(namespace(claim)).list(&ListParams::default()).await?;
            if pods.iter().any(|pod| uses(pod, own)) {
                return Ok(());
            }
        }
        settled(context.patch(&context.caches.claims, claim, patch(claim, OF_CLAIM, plan)).await)
    }

    async fn volume(&self, volume: &PersistentVolume) -> anyhow::Result<()> {
        let plan = plan(volume, OF_VOLUME, is_bound(volume));
        if plan == Plan::Keep {
            return Ok(());
        }
        let api: Api<PersistentVolume> = Api::all(self.context.client.clone());
        let patch = Patch::Merge(patch(volume, OF_VOLUME, plan));
        settled(api.patch(name(volume), &PatchParams::default(), &patch).await)
    }
}

/// What is gone, or has changed and therefore comes again, is no error.
fn settled<T>(written: kube::Result<T>) -> anyhow::Result<()> {
    match written {
        Err(error) if is_not_found(&error) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_conflict() => Ok(()),
        other => Ok(other.map(drop)?),
    }
}

#[async_trait]
impl Controller for Protection {
    fn name(&self) -> &'static str {
        "storageprotection"
    }

    async fn ready(&self) {
        let caches = &self.context.caches;
        tokio::join!(caches.claims.synced(), caches.volumes.synced(), caches.pods.synced());
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        if key.namespace.is_empty() {
            if let Some(volume) = caches.volumes.get(key) {
                self.volume(&volume).await?;
            }
        } else if let Some(claim) = caches.claims.get(key) {
            self.claim(&claim).await?;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_finalizer_holds_what_is_used() {
        let check = |deleting: bool, finalizers: &[&str], used: bool, expect: Plan| {
            let mut claim = json!({"metadata": {"name": "c", "finalizers": finalizers}});
            if deleting {
                claim["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
            }
            let claim: PersistentVolumeClaim = serde_json::from_value(claim).unwrap();
            assert_eq!(plan(&claim, OF_CLAIM, used), expect, "{deleting} {finalizers:?} {used}");
        };
        check(false, &[], false, Plan::Add);
        check(false, &[OF_CLAIM], true, Plan::Keep);
        check(false, &[OF_CLAIM], false, Plan::Keep);
        check(true, &[OF_CLAIM, "other"], true, Plan::Keep);
        check(true, &[OF_CLAIM, "other"], false, Plan::Remove);
        check(true, &["other"], false, Plan::Keep);
    }

    #[test]
    fn who_uses_what() {
        let check = |node: &str, volume: Value, expect: bool| {
            let pod =
                json!({"metadata": {"name": "p"}, "spec": {"nodeName": node, "containers": [], "volumes": [volume]}});
            let pod: Pod = serde_json::from_value(pod).unwrap();
            assert_eq!(uses(&pod, "p-data"), expect, "{pod:?}");
        };
        check("n", json!({"name": "v", "persistentVolumeClaim": {"claimName": "p-data"}}), true);
        check("n", json!({"name": "data", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}}), true);
        check("n", json!({"name": "v", "persistentVolumeClaim": {"claimName": "other"}}), false);
        check("n", json!({"name": "p-data", "emptyDir": {}}), false);
        check("", json!({"name": "v", "persistentVolumeClaim": {"claimName": "p-data"}}), false);
    }

    #[test]
    fn patches_keep_the_others() {
        let claim =
            json!({"metadata": {"name": "c", "uid": "u", "resourceVersion": "7", "finalizers": ["a", OF_CLAIM]}});
        let claim: PersistentVolumeClaim = serde_json::from_value(claim).unwrap();
        let patched = patch(&claim, OF_CLAIM, Plan::Remove);
        assert_eq!(patched, json!({"metadata": {"uid": "u", "resourceVersion": "7", "finalizers": ["a"]}}));
    }
}
