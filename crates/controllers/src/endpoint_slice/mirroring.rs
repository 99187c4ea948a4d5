//! EndpointSlices of Endpoints that somebody else writes, for a Service without a selector
//! (<https://kubernetes.io/docs/concepts/services-networking/service/#endpointslice-mirroring>): the service proxy reads slices
//! alone.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::api::{
    core::v1::{EndpointAddress, EndpointSubset, Endpoints, Service},
    discovery::v1::{Endpoint, EndpointConditions, EndpointSlice},
};

use super::{
    MANAGED_BY, SERVICE_NAME,
    packing::{self, Packer, Plan, Wanted, family_of, identity},
};
use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue,
        objects::{Labels, annotation, controller_reference, is_deleting, name, namespace, uid},
    },
};

const OURS: &str = "endpointslicemirroring-controller.k8s.io";
/// Who writes slices himself says so.
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Endpoints that were used as a lock are no endpoints.
const LOCK: &str = "control-plane.alpha.kubernetes.io/leader";
/// Annotations that speak of the Endpoints and not of what is in them.
const NOT_COPIED: [&str; 3] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    "endpoints.kubernetes.io/last-change-trigger-time",
    "endpoints.kubernetes.io/over-capacity",
];
/// No more addresses of a subset are mirrored (upstream's `--mirroring-max-endpoints-per-subset`).
const MOST: usize = 1000;

/// Decides. `slices` are those that mirror these Endpoints.
pub fn plan(endpoints: &Endpoints, slices: &[Arc<EndpointSlice>]) -> Plan {
    let mut labels = endpoints.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.into(), name(endpoints).to_owned());
    labels.insert(MANAGED_BY.into(), OURS.into());
    let mut annotations: Labels = endpoints.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|key, _| !NOT_COPIED.contains(&key.as_str()));
    let owner = controller_reference(endpoints);
    let prefix: String = name(endpoints).chars().take(57).collect();
    let packer = Packer::new(slices, &labels, &owner, namespace(endpoints), format!("{prefix}-"));
    let mut packer = packer.annotated(&annotations);
    for family in ["IPv4", "IPv6"] {
        let mut wanted: Wanted = BTreeMap::new();
        for subset in endpoints.subsets.iter().flatten() {
            let ports = subset.ports.iter().flatten().map(|port| {
                let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
                (port.name.clone().unwrap_or_default(), protocol, Some(port.port), port.app_protocol.clone())
            });
            let of = wanted.entry(ports.collect()).or_default();
            for endpoint in addresses(subset).filter(|e| family_of(&e.addresses[0]) == Some(family)) {
                of.insert(identity(&endpoint), endpoint);
            }
        }
        wanted.retain(|_, endpoints| !endpoints.is_empty());
        packer.pack(family, wanted);
    }
    packer.finish()
}

/// The endpoints of a subset, the ready ones first.
fn addresses(subset: &EndpointSubset) -> impl Iterator<Item = Endpoint> {
    let ready = subset.addresses.iter().flatten().map(|address| endpoint(address, true));
    ready.chain(subset.not_ready_addresses.iter().flatten().map(|address| endpoint(address, false))).take(MOST)
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
        hostname: address.hostname.clone().filter(|name| !name.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

/// Whether Endpoints are to be mirrored for a Service.
fn is_mirrored(endpoints: &Endpoints, service: Option<&Service>) -> bool {
    let skip =
        endpoints.metadata.labels.as_ref().and_then(|labels| labels.get(SKIP)).is_some_and(|skip| skip == "true");
    let selects = |service: &Service| {
        service.spec.as_ref().and_then(|spec| spec.selector.as_ref()).is_some_and(|selector| !selector.is_empty())
    };
    !skip
        && !is_deleting(endpoints)
        && annotation(endpoints, LOCK).is_none()
        && service.is_some_and(|service| !is_deleting(service) && !selects(service))
}

pub(crate) struct Mirroring {
    context: Arc<Context>,
}

impl Mirroring {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.endpoints.on_change(move |old, new| {
            if let Some(endpoints) = new.or(old) {
                q.add(Key::of(&**endpoints));
            }
        });
        let q = queue.clone();
        context.caches.services.on_change(move |old, new| {
            if let Some(service) = new.or(old) {
                q.add(Key::of(&**service));
            }
        });
        let q = queue.clone();
        context.caches.endpoint_slices.on_change(move |old, new| {
            let Some(slice) = new.or(old).filter(|slice| is_ours(slice)) else { return };
            if let Some(service) = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME)) {
                q.add(Key::new(namespace(&**slice), service));
            }
        });
        (Arc::new(Mirroring { context }), queue)
    }
}

fn is_ours(slice: &EndpointSlice) -> bool {
    slice.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY)).is_some_and(|by| by == OURS)
}

#[async_trait]
impl Controller for Mirroring {
    fn name(&self) -> &'static str {
        "endpointslicemirroring"
    }

    async fn ready(&self) {
        let caches = &self.context.caches;
        caches.endpoints.synced().await;
        caches.services.synced().await;
        caches.endpoint_slices.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        // The slices of Endpoints that are gone are collected as garbage.
        let Some(endpoints) = caches.endpoints.get(key) else { return Ok(None) };
        let mut slices = caches.endpoint_slices.controlled_by(uid(&*endpoints));
        slices.retain(|slice| is_ours(slice));
        let plan = match is_mirrored(&endpoints, caches.services.get(key).as_deref()) {
            true => plan(&endpoints, &slices),
            false => Plan { delete: slices.iter().map(|s| name(&**s).to_owned()).collect(), ..Plan::default() },
        };
        packing::apply(&self.context, &key.namespace, &slices, &plan).await?;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn endpoints(subsets: Value) -> Endpoints {
        let meta = json!({"name": "s", "namespace": "n", "uid": "u", "labels": {"a": "1"},
            "annotations": {"mine": "kept", "kubectl.kubernetes.io/last-applied-configuration": "{}"}});
        serde_json::from_value(json!({"metadata": meta, "subsets": subsets})).unwrap()
    }

    fn named(mut plan: Plan) -> Vec<Arc<EndpointSlice>> {
        for (index, slice) in plan.create.iter_mut().enumerate() {
            slice.metadata.name = Some(format!("s-{index}"));
        }
        plan.create.into_iter().map(Arc::new).collect()
    }

    #[test]
    fn each_family_and_set_of_ports_has_a_slice() {
        let both = endpoints(json!([
            {"addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "notReadyAddresses": [{"ip": "10.0.0.2"}], "ports": [{"port": 80}]},
            {"addresses": [{"ip": "10.0.0.1"}], "ports": [{"name": "b", "port": 81}]},
        ]));
        let made = plan(&both, &[]);
        let mut found: Vec<String> = Vec::new();
        for slice in &made.create {
            let labels = slice.metadata.labels.as_ref().unwrap();
            assert_eq!(
                (labels["a"].as_str(), labels[MANAGED_BY].as_str(), labels[SERVICE_NAME].as_str()),
                ("1", OURS, "s")
            );
            assert_eq!(slice.metadata.annotations, Some(Labels::from([("mine".into(), "kept".into())])));
            for e in slice.endpoints.iter().flatten() {
                let ready = e.conditions.as_ref().unwrap().ready.unwrap();
                found.push(format!("{} {} {ready}", e.addresses[0], slice.ports.as_ref().unwrap()[0].port.unwrap()));
            }
        }
        found.sort();
        assert_eq!(found, ["10.0.0.1 80 true", "10.0.0.1 81 true", "10.0.0.2 80 false", "fd00::1 80 true"]);
        let slices = named(made);
        let same = plan(&both, &slices);
        assert!(same.create.is_empty() && same.update.is_empty() && same.delete.is_empty());
        let less = plan(&endpoints(json!([{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 80}]}])), &slices);
        assert_eq!((less.create.len(), less.update.len(), less.delete.len()), (0, 1, 2));
    }

    #[test]
    fn what_is_not_mirrored() {
        let plain: Service = serde_json::from_value(json!({"metadata": {}, "spec": {}})).unwrap();
        let selecting: Service =
            serde_json::from_value(json!({"metadata": {}, "spec": {"selector": {"a": "b"}}})).unwrap();
        let some = endpoints(json!([]));
        assert!(is_mirrored(&some, Some(&plain)));
        assert!(!is_mirrored(&some, Some(&selecting)) && !is_mirrored(&some, None));
        let mut skipped = some.clone();
        skipped.metadata.labels.as_mut().unwrap().insert(SKIP.into(), "true".into());
        assert!(!is_mirrored(&skipped, Some(&plain)));
        let mut lock = some;
        lock.metadata.annotations.as_mut().unwrap().insert(LOCK.into(), "{}".into());
        assert!(!is_mirrored(&lock, Some(&plain)));
    }
}
