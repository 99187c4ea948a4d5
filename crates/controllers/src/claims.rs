//! Which pods are an owner's: it takes in those that it selects and nobody controls, and lets go of those that it no longer
//! selects (<https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/#non-template-pod-acquisitions>).

use std::sync::Arc;

use k8s_openapi::{NamespaceResourceScope, api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::LabelSelector};
use kube::Resource;
use serde_json::Value;

use crate::{
    context::Context,
    runtime::{
        Object, is_not_found,
        objects::{Claim, adopt_patch, claim, is_deleting, name, namespace, release_patch, uid},
    },
};

impl Context {
    /// Asks the API server itself whether the owner is still there: one that is being deleted must adopt nothing.
    pub(crate) async fn confirm<O>(&self, owner: &O) -> anyhow::Result<()>
    where
        O: Object + Resource<Scope = NamespaceResourceScope>,
    {
        let fresh = self.api::<O>(namespace(owner)).get(name(owner)).await?;
        let kind = O::kind(&());
        anyhow::ensure!(uid(&fresh) == uid(owner) && !is_deleting(&fresh), "the {kind} is being deleted");
        Ok(())
    }

    /// The pods that are the owner's, after adopting and releasing. Of those without a controller only what is `worth` it is
    /// adopted; `change` may add to the patch by which a pod is taken in or let go of.
    pub(crate) async fn claim_pods<O>(
        &self,
        owner: &O,
        selector: &LabelSelector,
        worth: impl Fn(&Pod) -> bool,
        change: impl Fn(Claim, &Pod, &mut Value),
    ) -> anyhow::Result<Vec<Arc<Pod>>>
    where
        O: Object + Resource<Scope = NamespaceResourceScope>,
    {
        let cache = &self.caches.pods;
        let mut candidates = cache.controlled_by(uid(owner));
        candidates.extend(cache.orphans(namespace(owner)));
        let mut pods = Vec::new();
        let mut confirmed = false;
        for pod in candidates {
            let found = claim(&*pod, uid(owner), is_deleting(owner), selector);
            let mut patch = match found {
                Claim::Ignore => continue,
                Claim::Keep => {
                    pods.push(pod);
                    continue;
                }
                Claim::Release => release_patch(&*pod, uid(owner)),
                Claim::Adopt if !worth(&pod) => continue,
                Claim::Adopt => {
                    if !confirmed {
                        self.confirm(owner).await?;
                        confirmed = true;
                    }
                    adopt_patch(&*pod, owner)
                }
            };
            change(found, &pod, &mut patch);
            match self.patch(cache, &*pod, patch).await {
                Ok(patched) if claim(&patched, uid(owner), is_deleting(owner), selector) == Claim::Keep => {
                    pods.push(Arc::new(patched));
                }
                Ok(_) => {}
                // It has gone meanwhile, and nobody needs it.
                Err(error) if is_not_found(&error) => cache.note_gone(&pod),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(pods)
    }
}
