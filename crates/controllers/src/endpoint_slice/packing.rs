//! Endpoints into slices, such that a change touches as few slices as can be.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::future::try_join_all;
use k8s_openapi::{
    api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::api::{DeleteParams, PostParams};

use crate::{
    context::Context,
    runtime::{
        namespace_is_terminating,
        objects::{Labels, name},
    },
};

/// The most endpoints of a slice (upstream's `--max-endpoints-per-slice`).
const MOST: usize = 100;

/// The ports of a slice, as a key.
pub(super) type Ports = Vec<(String, String, Option<i32>, Option<String>)>;
/// The endpoints that there should be, by their ports and by who they are.
pub(super) type Wanted = BTreeMap<Ports, BTreeMap<String, Endpoint>>;

/// What to do about the slices of a Service.
#[derive(Debug, Default)]
pub struct Plan {
    /// To be created.
    pub create: Vec<EndpointSlice>,
    /// To be replaced.
    pub update: Vec<EndpointSlice>,
    /// To be deleted, by name.
    pub delete: Vec<String>,
}

/// The family of an address.
pub(super) fn family_of(address: &str) -> Option<&'static str> {
    match address.parse::<std::net::IpAddr>().ok()? {
        std::net::IpAddr::V4(_) => Some("IPv4"),
        std::net::IpAddr::V6(_) => Some("IPv6"),
    }
}

/// Who an endpoint is: its pod, or its address if it has none.
pub(super) fn identity(endpoint: &Endpoint) -> String {
    let pod = endpoint.target_ref.as_ref().and_then(|r| r.uid.clone());
    pod.or_else(|| endpoint.addresses.first().cloned()).unwrap_or_default()
}

/// Packs one family after the other.
pub(super) struct Packer<'a> {
    /// Slices that nothing has been found for yet.
    left: Vec<&'a Arc<EndpointSlice>>,
    all: &'a [Arc<EndpointSlice>],
    labels: &'a Labels,
    annotations: Option<&'a Labels>,
    owner: &'a OwnerReference,
    namespace: &'a str,
    prefix: String,
    plan: Plan,
}

impl<'a> Packer<'a> {
    pub(super) fn new(
        slices: &'a [Arc<EndpointSlice>],
        labels: &'a Labels,
        owner: &'a OwnerReference,
        namespace: &'a str,
        prefix: String,
    ) -> Packer<'a> {
        let left = slices.iter().collect();
        Packer { left, all: slices, labels, annotations: None, owner, namespace, prefix, plan: Plan::default() }
    }

    /// The slices have these annotations as well.
    pub(super) fn annotated(mut self, annotations: &'a Labels) -> Packer<'a> {
        self.annotations = Some(annotations).filter(|annotations| !annotations.is_empty());
        self
    }

    /// Packs the endpoints of a family.
    pub(super) fn pack(&mut self, family: &str, wanted: Wanted) {
        for (ports, endpoints) in wanted {
            let ports: Vec<EndpointPort> = ports.into_iter().map(typed).collect();
            let kept = self.place(family, &ports, endpoints);
            self.settle(kept);
        }
    }

    /// All that no endpoint was left for goes.
    pub(super) fn finish(mut self) -> Plan {
        self.plan.delete.extend(self.left.iter().map(|s| name(&***s).to_owned()));
        self.plan
    }

    /// The slices for some ports: those that are there, changed in place, and new ones.
    fn place(
        &mut self,
        family: &str,
        ports: &[EndpointPort],
        mut wanted: BTreeMap<String, Endpoint>,
    ) -> Vec<EndpointSlice> {
        let same =
            |slice: &EndpointSlice| slice.address_type == family && slice.ports.as_deref().unwrap_or_default() == ports;
        let mut kept: Vec<EndpointSlice> = Vec::new();
        let (labels, annotations) = (self.labels, self.annotations);
        self.left.retain(|slice| {
            if !same(slice) {
                return true;
            }
            let mut next = EndpointSlice::clone(slice);
            // What stays, stays where it is; what changed is changed in place.
            let stay = next.endpoints.iter().flatten().filter_map(|e| wanted.remove(&identity(e)));
            next.endpoints = Some(stay.collect());
            next.metadata.labels = Some(labels.clone());
            next.metadata.annotations = annotations.cloned();
            kept.push(next);
            false
        });
        let mut rest = wanted.into_values();
        for slice in &mut kept {
            let list = slice.endpoints.get_or_insert_default();
            let room = MOST.saturating_sub(list.len());
            list.extend(rest.by_ref().take(room));
        }
        loop {
            let list: Vec<Endpoint> = rest.by_ref().take(MOST).collect();
            if list.is_empty() && !kept.is_empty() {
                return kept;
            }
            let more = list.len() == MOST;
            kept.push(self.fresh(family, list, ports));
            if !more {
                return kept;
            }
        }
    }

    /// One empty slice is enough, and none where another has endpoints.
    fn settle(&mut self, slices: Vec<EndpointSlice>) {
        let any = slices.iter().any(|s| s.endpoints.iter().flatten().next().is_some());
        let mut first = true;
        for slice in slices {
            let empty = slice.endpoints.iter().flatten().next().is_none();
            let keep = !empty || (!any && std::mem::take(&mut first));
            match (slice.metadata.name.clone(), keep) {
                (None, _) => self.plan.create.push(slice),
                (Some(name), false) => self.plan.delete.push(name),
                (Some(name), true) => {
                    let old = self.all.iter().find(|s| s.metadata.name.as_deref() == Some(&name));
                    let changed = |old: &Arc<EndpointSlice>| {
                        old.endpoints != slice.endpoints
                            || old.metadata.labels != slice.metadata.labels
                            || (self.annotations.is_some() && old.metadata.annotations != slice.metadata.annotations)
                    };
                    if old.is_none_or(changed) {
                        self.plan.update.push(slice);
                    }
                }
            }
        }
    }

    fn fresh(&self, family: &str, endpoints: Vec<Endpoint>, ports: &[EndpointPort]) -> EndpointSlice {
        EndpointSlice {
            metadata: ObjectMeta {
                generate_name: Some(self.prefix.clone()),
                namespace: Some(self.namespace.to_owned()),
                labels: Some(self.labels.clone()),
                annotations: self.annotations.cloned(),
                owner_references: Some(vec![self.owner.clone()]),
                ..Default::default()
            },
            address_type: family.to_owned(),
            endpoints: Some(endpoints),
            ports: Some(ports.to_vec()),
        }
    }
}

fn typed((name, protocol, port, app_protocol): (String, String, Option<i32>, Option<String>)) -> EndpointPort {
    EndpointPort { name: Some(name), protocol: Some(protocol), port, app_protocol }
}

/// Carries a plan out. New addresses are there before old ones go.
pub(super) async fn apply(
    context: &Context,
    namespace: &str,
    slices: &[Arc<EndpointSlice>],
    plan: &Plan,
) -> anyhow::Result<()> {
    let cache = &context.caches.endpoint_slices;
    for slice in &plan.create {
        match context.create(cache, namespace, slice).await {
            Err(error) if namespace_is_terminating(&error) => return Ok(()),
            other => other?,
        };
    }
    let (api, params) = (context.api::<EndpointSlice>(namespace), PostParams::default());
    let updates = plan.update.iter().map(|slice| api.replace(name(slice), &params, slice));
    for updated in try_join_all(updates).await? {
        cache.note(updated);
    }
    let gone: BTreeSet<&String> = plan.delete.iter().collect();
    for slice in slices.iter().filter(|s| s.metadata.name.as_ref().is_some_and(|name| gone.contains(name))) {
        context.delete(cache, &**slice, DeleteParams::default()).await?;
    }
    Ok(())
}
