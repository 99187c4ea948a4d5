//! Endpoints: the older form of what EndpointSlices say, which some clients still read
//! (<https://kubernetes.io/docs/concepts/services-networking/service/#endpoints>).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::{
    api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::api::{DeleteParams, PostParams};

use crate::{
    context::Context,
    endpoint_slice::{on_pod_change, plan as slices, selects},
    runtime::{
        Controller, Key, Queue, namespace_is_terminating,
        objects::{is_deleting, name},
    },
};

/// More addresses than this are cut off, and the object says so.
const MOST: usize = 1000;
const OVER: &str = "endpoints.kubernetes.io/over-capacity";

/// The subsets for a Service, and whether addresses were left out.
pub fn plan(service: &Service, pods: &[Arc<Pod>]) -> (Vec<EndpointSubset>, bool) {
    let mut subsets: BTreeMap<String, EndpointSubset> = BTreeMap::new();
    let (mut count, mut over) = (0, false);
    let first =
        service.spec.as_ref().and_then(|spec| spec.ip_families.as_ref()?.first()).map_or("IPv4", String::as_str);
    // Endpoints have one family: the Service's first.
    for slice in slices(service, pods, &[], |_| None).create.into_iter().filter(|slice| slice.address_type == first) {
        let ports: Vec<EndpointPort> = slice
            .ports
            .iter()
            .flatten()
            .filter_map(|p| {
                Some(EndpointPort {
                    port: p.port?,
                    name: p.name.clone().filter(|n| !n.is_empty()),
                    protocol: p.protocol.clone(),
                    app_protocol: p.app_protocol.clone(),
                })
            })
            .collect();
        let subset = subsets.entry(format!("{ports:?}")).or_default();
        for endpoint in slice.endpoints.into_iter().flatten() {
            let conditions = endpoint.conditions.unwrap_or_default();
            // Who is ending is in neither list.
            if conditions.terminating == Some(true) && conditions.ready != Some(true) {
                continue;
            }
            if count == MOST {
                over = true;
                break;
            }
            count += 1;
            let address = EndpointAddress {
                ip: endpoint.addresses.into_iter().next().unwrap_or_default(),
                hostname: endpoint.hostname,
                node_name: endpoint.node_name,
                target_ref: endpoint.target_ref,
            };
            let list = match conditions.ready {
                Some(true) => &mut subset.addresses,
                _ => &mut subset.not_ready_addresses,
            };
            list.get_or_insert_default().push(address);
        }
        subset.ports = (!ports.is_empty()).then_some(ports);
    }
    let some = |s: &EndpointSubset| s.addresses.is_some() || s.not_ready_addresses.is_some();
    (subsets.into_values().filter(some).collect(), over)
}

pub(crate) struct EndpointsController {
    context: Arc<Context>,
}

impl EndpointsController {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.services.on_change(move |old, new| {
            if let Some(service) = new.or(old) {
                q.add(Key::of(&**service));
            }
        });
        let q = queue.clone();
        on_pod_change(&context, move |key| q.add(key));
        (Arc::new(EndpointsController { context }), queue)
    }
}

#[async_trait]
impl Controller for EndpointsController {
    fn name(&self) -> &'static str {
        "endpoints"
    }

    async fn ready(&self) {
        let caches = &self.context.caches;
        caches.services.synced().await;
        caches.pods.synced().await;
        caches.endpoints.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        let current = caches.endpoints.get(key);
        let Some(service) = caches.services.get(key) else {
            // Endpoints have no owner: they go with their Service here.
            if let Some(current) = current {
                self.context.delete(&caches.endpoints, &*current, DeleteParams::default()).await?;
            }
            return Ok(None);
        };
        if is_deleting(&*service)
            || service.spec.as_ref().and_then(|s| s.selector.as_ref()).is_none_or(|s| s.is_empty())
        {
            return Ok(None);
        }
        let mut pods = caches.pods.in_namespace(&key.namespace);
        pods.retain(|pod| selects(&service, pod));
        let (subsets, over) = plan(&service, &pods);
        let subsets = (!subsets.is_empty()).then_some(subsets);
        let annotations = over.then(|| BTreeMap::from([(OVER.to_owned(), "truncated".to_owned())]));
        match current {
            None => {
                let metadata = ObjectMeta {
                    name: Some(name(&*service).to_owned()),
                    labels: service.metadata.labels.clone(),
                    annotations,
                    ..Default::default()
                };
                match self.context.create(&caches.endpoints, &key.namespace, &Endpoints { metadata, subsets }).await {
                    Err(error) if namespace_is_terminating(&error) => {}
                    other => drop(other?),
                }
            }
            Some(current) if current.subsets != subsets || current.metadata.labels != service.metadata.labels => {
                let mut next = (*current).clone();
                next.subsets = subsets;
                next.metadata.labels = service.metadata.labels.clone();
                next.metadata.annotations = annotations;
                let api = self.context.api::<Endpoints>(&key.namespace);
                caches.endpoints.note(api.replace(&key.name, &PostParams::default(), &next).await?);
            }
            Some(_) => {}
        }
        Ok(None)
    }
}
