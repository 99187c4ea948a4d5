//! The claims of generic ephemeral volumes: each belongs to its pod, and goes with it
//! (<https://kubernetes.io/docs/concepts/storage/ephemeral-volumes/#generic-ephemeral-volumes>).

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::{
    api::core::v1::{PersistentVolumeClaim, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::{
    context::Context,
    replica_set::plain,
    runtime::{
        Controller, Key, Queue,
        events::Severity,
        namespace_is_terminating,
        objects::{controller_of, controller_reference, is_active, name, namespace, uid},
    },
};

/// The claims that a pod needs; none if it is over or about to be.
pub fn plan(pod: &Pod) -> Vec<PersistentVolumeClaim> {
    if !is_active(pod) {
        return Vec::new();
    }
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let claim = |volume: &k8s_openapi::api::core::v1::Volume| {
        let template = volume.ephemeral.as_ref()?.volume_claim_template.clone()?;
        let meta = template.metadata.unwrap_or_default();
        Some(PersistentVolumeClaim {
            metadata: ObjectMeta {
                name: Some(format!("{}-{}", name(pod), volume.name)),
                namespace: Some(namespace(pod).to_owned()),
                labels: meta.labels,
                annotations: meta.annotations,
                owner_references: Some(vec![controller_reference(pod)]),
                ..ObjectMeta::default()
            },
            spec: Some(template.spec),
            status: None,
        })
    };
    volumes.filter_map(claim).collect()
}

pub(crate) struct EphemeralVolumes {
    context: Arc<Context>,
}

impl EphemeralVolumes {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.pods.on_change(move |old, new| {
            // A pod's volumes never change.
            if let (None, Some(pod)) = (old, new)
                && !plan(pod).is_empty()
            {
                q.add(Key::of(&**pod));
            }
        });
        let q = queue.clone();
        context.caches.claims.on_change(move |old, new| {
            let Some(gone) = old.filter(|_| new.is_none()) else { return };
            if let Some(owner) = controller_of(&**gone).filter(|owner| owner.kind == "Pod") {
                q.add(Key::new(namespace(&**gone), &owner.name));
            }
        });
        (Arc::new(EphemeralVolumes { context }), queue)
    }
}

#[async_trait]
impl Controller for EphemeralVolumes {
    fn name(&self) -> &'static str {
        "ephemeralvolume"
    }

    async fn ready(&self) {
        self.context.caches.pods.synced().await;
        self.context.caches.claims.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        let Some(pod) = caches.pods.get(key) else { return Ok(None) };
        let recorder = self.context.recorder.as_source("ephemeral_volume");
        for claim in plan(&pod) {
            if let Some(there) = caches.claims.get(&Key::of(&claim)) {
                // The pod must not use what is somebody else's; its node waits as long as this stands in the way.
                let ours = controller_of(&*there).is_some_and(|owner| owner.uid == uid(&*pod));
                anyhow::ensure!(ours, "PVC {} was not created for the pod", Key::of(&claim));
                continue;
            }
            match self.context.create(&caches.claims, &key.namespace, &claim).await {
                Err(error) if namespace_is_terminating(&error) => return Ok(None),
                Err(error) => {
                    let message =
                        format!("ephemeral volume controller: create PVC {}: {}", name(&claim), plain(&error));
                    recorder.record(&*pod, Severity::Warning, "FailedBinding", message);
                    return Err(error.into());
                }
                Ok(_) => {}
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::simulation::{Simulation, by_seed};

    fn pod() -> serde_json::Value {
        let template = json!({"metadata": {"labels": {"a": "1"}}, "spec": {"accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}}}});
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "n"}, "spec": {
            "containers": [{"name": "c", "image": "i"}],
            "volumes": [{"name": "scratch", "ephemeral": {"volumeClaimTemplate": template}}, {"name": "e", "emptyDir": {}}]}})
    }

    #[test]
    fn a_claim_belongs_to_its_pod() {
        let mut typed: Pod = serde_json::from_value(pod()).unwrap();
        typed.metadata.uid = Some("u".into());
        let claims = plan(&typed);
        assert_eq!(claims.len(), 1);
        assert_eq!((name(&claims[0]), controller_of(&claims[0]).unwrap().uid.as_str()), ("p-scratch", "u"));
        assert_eq!(claims[0].metadata.labels.as_ref().unwrap()["a"], "1");
        typed.status = Some(serde_json::from_value(json!({"phase": "Succeeded"})).unwrap());
        assert!(plan(&typed).is_empty());
    }

    #[test]
    fn it_is_there_in_the_end_and_goes_with_the_pod() {
        by_seed(30, async |seed| {
            let mut simulation = Simulation::new(seed, EphemeralVolumes::start);
            simulation.create(pod());
            let claim = |world: &mut crate::simulation::World, _: &mut rand::rngs::StdRng| {
                world.remove(&("persistentvolumeclaims", "n".into(), "p-scratch".into()));
            };
            simulation.random(40, claim, |_| {}).await;
            simulation.settle(|_, _| {}, |world| world.get("persistentvolumeclaims", "p-scratch").is_some()).await;
            simulation.world.lock().remove(&("pods", "n".into(), "p".into()));
            simulation.settle(|_, _| {}, |world| world.get("persistentvolumeclaims", "p-scratch").is_none()).await;
        });
    }
}
