//! EndpointSlice: the addresses of the pods behind a Service
//! (<https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/>).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures::future::try_join_all;
use k8s_openapi::{
    api::{
        core::v1::{Node, ObjectReference, Pod, Service, ServicePort},
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use kube::api::{DeleteParams, PostParams};

use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue, namespace_is_terminating,
        objects::{controller_reference, is_deleting, is_finished, is_ready, name, namespace, uid},
    },
};

/// Says whose slice it is.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const OURS: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// The most endpoints of a slice (upstream's `--max-endpoints-per-slice`).
const MOST: usize = 100;

/// The ports of a slice, as a key.
type Ports = Vec<(String, String, Option<i32>, Option<String>)>;

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

/// Decides. `pods` are those that the Service selects; `slices` those that are ours; `zone` is the zone of a node.
pub fn plan(
    service: &Service,
    pods: &[Arc<Pod>],
    slices: &[Arc<EndpointSlice>],
    zone: impl Fn(&str) -> Option<String>,
) -> Plan {
    let mut plan = Plan::default();
    let mut wanted: BTreeMap<Ports, BTreeMap<String, Endpoint>> = BTreeMap::new();
    let spec = service.spec.clone().unwrap_or_default();
    if spec.selector.as_ref().is_some_and(|s| !s.is_empty()) && spec.type_.as_deref() != Some("ExternalName") {
        for pod in pods {
            if let Some(endpoint) = endpoint(service, pod, &zone) {
                let ports = ports(spec.ports.as_deref().unwrap_or_default(), pod);
                wanted.entry(ports).or_default().insert(uid(&**pod).to_owned(), endpoint);
            }
        }
        // A Service without pods still has a slice, so that its ports can be seen.
        if wanted.is_empty() {
            wanted.insert(Vec::new(), BTreeMap::new());
        }
    }
    let labels = labels(service);
    let mut left: Vec<&Arc<EndpointSlice>> = slices.iter().collect();
    for (ports, mut endpoints) in wanted {
        let typed: Vec<EndpointPort> = ports
            .iter()
            .map(|(name, protocol, port, app)| EndpointPort {
                name: Some(name.clone()),
                protocol: Some(protocol.clone()),
                port: *port,
                app_protocol: app.clone(),
            })
            .collect();
        let same = |slice: &EndpointSlice| slice.ports.as_deref().unwrap_or_default() == typed;
        let mut kept: Vec<EndpointSlice> = Vec::new();
        left.retain(|slice| {
            if !same(slice) {
                return true;
            }
            let mut next = EndpointSlice::clone(slice);
            // What stays, stays where it is; what changed is changed in place.
            let id = |e: &Endpoint| e.target_ref.as_ref().and_then(|r| r.uid.clone()).unwrap_or_default();
            let stay = next.endpoints.iter().flatten().filter_map(|e| endpoints.remove(&id(e)));
            next.endpoints = Some(stay.collect());
            next.metadata.labels = Some(labels.clone());
            kept.push(next);
            false
        });
        let mut rest = endpoints.into_values();
        for slice in &mut kept {
            let list = slice.endpoints.get_or_insert_default();
            let room = MOST.saturating_sub(list.len());
            list.extend(rest.by_ref().take(room));
        }
        loop {
            let list: Vec<Endpoint> = rest.by_ref().take(MOST).collect();
            if list.is_empty() && !kept.is_empty() {
                break;
            }
            let more = list.len() == MOST;
            kept.push(fresh(service, &labels, list, &typed));
            if !more {
                break;
            }
        }
        // One empty slice is enough, and none where another has endpoints.
        let any = kept.iter().any(|s| s.endpoints.iter().flatten().next().is_some());
        let mut first = true;
        for slice in kept {
            let empty = slice.endpoints.iter().flatten().next().is_none();
            let keep = !empty || (!any && std::mem::take(&mut first));
            let name = slice.metadata.name.clone();
            match (name, keep) {
                (None, _) => plan.create.push(slice),
                (Some(name), false) => plan.delete.push(name),
                (Some(name), true) => {
                    let old = slices.iter().find(|s| s.metadata.name.as_deref() == Some(&name));
                    if old.is_none_or(|old| {
                        old.endpoints != slice.endpoints || old.metadata.labels != slice.metadata.labels
                    }) {
                        plan.update.push(slice);
                    }
                }
            }
        }
    }
    plan.delete.extend(left.iter().map(|s| name(&***s).to_owned()));
    plan
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.into(), name(service).to_owned());
    labels.insert(MANAGED_BY.into(), OURS.into());
    if service.spec.as_ref().is_some_and(|s| s.cluster_ip.as_deref() == Some("None")) {
        labels.insert(HEADLESS.into(), String::new());
    }
    labels
}

fn fresh(
    service: &Service,
    labels: &BTreeMap<String, String>,
    endpoints: Vec<Endpoint>,
    ports: &[EndpointPort],
) -> EndpointSlice {
    let prefix: String = name(service).chars().take(57).collect();
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{prefix}-")),
            namespace: Some(namespace(service).to_owned()),
            labels: Some(labels.clone()),
            owner_references: Some(vec![controller_reference(service)]),
            ..Default::default()
        },
        address_type: "IPv4".into(),
        endpoints: Some(endpoints),
        ports: Some(ports.to_vec()),
    }
}

fn ipv4(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).chain(status.pod_ip.clone());
    all.into_iter().find(|ip| ip.parse::<std::net::Ipv4Addr>().is_ok())
}

fn endpoint(service: &Service, pod: &Pod, zone: &impl Fn(&str) -> Option<String>) -> Option<Endpoint> {
    if is_finished(pod) {
        return None;
    }
    let address = ipv4(pod)?;
    let spec = service.spec.as_ref()?;
    let ready = is_ready(pod);
    let terminating = is_deleting(pod);
    let published = spec.publish_not_ready_addresses == Some(true);
    let pod_spec = pod.spec.as_ref()?;
    let node = pod_spec.node_name.clone();
    // Names of pods of a headless service (StatefulSets).
    let hostname = pod_spec.hostname.clone().filter(|_| pod_spec.subdomain.as_deref() == Some(name(service)));
    Some(Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(published || (ready && !terminating)),
            serving: Some(ready),
            terminating: Some(terminating),
        }),
        hostname,
        zone: node.as_deref().and_then(zone),
        node_name: node,
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            name: Some(name(pod).to_owned()),
            namespace: Some(namespace(pod).to_owned()),
            uid: Some(uid(pod).to_owned()),
            ..Default::default()
        }),
        ..Default::default()
    })
}

/// The ports of a Service at a pod; a named port may have another number at each pod.
fn ports(ports: &[ServicePort], pod: &Pod) -> Ports {
    let number = |port: &ServicePort| match &port.target_port {
        Some(IntOrString::Int(n)) if *n > 0 => Some(*n),
        Some(IntOrString::String(wanted)) => {
            let containers =
                pod.spec.iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
            let mut named = containers.flat_map(|c| c.ports.iter().flatten());
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            named
                .find(|p| p.name.as_deref() == Some(wanted) && p.protocol.as_deref().unwrap_or("TCP") == protocol)
                .map(|p| p.container_port)
        }
        _ => Some(port.port),
    };
    let mut out: Ports = ports
        .iter()
        .filter_map(|p| {
            Some((
                p.name.clone().unwrap_or_default(),
                p.protocol.clone().unwrap_or("TCP".into()),
                Some(number(p)?),
                p.app_protocol.clone(),
            ))
        })
        .collect();
    out.sort();
    out
}

pub(crate) struct EndpointSlices {
    context: Arc<Context>,
}

/// Calls `add` for every Service that selects a pod, before or after a change.
pub(crate) fn on_pod_change(context: &Context, add: impl Fn(Key) + Send + Sync + 'static) {
    let services = context.caches.services.clone();
    context.caches.pods.on_change(move |old, new| {
        // What matters here: labels, address, readiness, deletion, phase, node.
        let relevant = |pod: &Arc<Pod>| {
            (pod.metadata.labels.clone(), ipv4(pod), is_ready(pod), is_deleting(&**pod), is_finished(pod))
        };
        if let (Some(old), Some(new)) = (old, new)
            && relevant(old) == relevant(new)
        {
            return;
        }
        let mut keys = BTreeSet::new();
        for pod in old.into_iter().chain(new) {
            for service in services.in_namespace(namespace(&**pod)) {
                if selects(&service, pod) {
                    keys.insert(Key::of(&*service));
                }
            }
        }
        keys.into_iter().for_each(&add);
    });
}

/// Whether a Service selects a pod. One without a selector selects none: its endpoints are somebody else's.
pub(crate) fn selects(service: &Service, pod: &Pod) -> bool {
    let selector = service.spec.as_ref().and_then(|s| s.selector.as_ref());
    let labels = pod.metadata.labels.as_ref();
    selector.is_some_and(|s| !s.is_empty() && s.iter().all(|(k, v)| labels.is_some_and(|l| l.get(k) == Some(v))))
}

impl EndpointSlices {
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
        let q = queue.clone();
        context.caches.endpoint_slices.on_change(move |old, new| {
            // Somebody else changed or deleted one of ours.
            let slice = new.or(old);
            let labels = slice.and_then(|s| s.metadata.labels.as_ref());
            if let (Some(slice), Some(labels)) = (slice, labels)
                && labels.get(MANAGED_BY).is_some_and(|m| m == OURS)
                && let Some(service) = labels.get(SERVICE_NAME)
            {
                q.add(Key::new(namespace(&**slice), service));
            }
        });
        (Arc::new(EndpointSlices { context }), queue)
    }
}

#[async_trait]
impl Controller for EndpointSlices {
    fn name(&self) -> &'static str {
        "endpointslice"
    }

    async fn ready(&self) {
        let caches = &self.context.caches;
        caches.services.synced().await;
        caches.pods.synced().await;
        caches.endpoint_slices.synced().await;
        caches.nodes.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        // The slices of a Service that is gone are collected as garbage.
        let Some(service) = caches.services.get(key) else { return Ok(None) };
        let mut slices = caches.endpoint_slices.controlled_by(uid(&*service));
        slices.retain(|s| s.metadata.labels.as_ref().and_then(|l| l.get(MANAGED_BY)).is_some_and(|m| m == OURS));
        let has_selector = service.spec.as_ref().is_some_and(|s| s.selector.as_ref().is_some_and(|s| !s.is_empty()));
        if is_deleting(&*service) || (!has_selector && slices.is_empty()) {
            return Ok(None);
        }
        let mut pods = caches.pods.in_namespace(&key.namespace);
        pods.retain(|pod| selects(&service, pod));
        let zone = |node: &str| {
            let node: Arc<Node> = caches.nodes.get(&Key::new("", node))?;
            node.metadata.labels.as_ref()?.get("topology.kubernetes.io/zone").cloned()
        };
        let plan = plan(&service, &pods, &slices, zone);
        let api = self.context.api::<EndpointSlice>(&key.namespace);
        // New addresses are there before old ones go.
        for slice in &plan.create {
            match self.context.create(&caches.endpoint_slices, &key.namespace, slice).await {
                Err(error) if namespace_is_terminating(&error) => return Ok(None),
                other => other?,
            };
        }
        let params = PostParams::default();
        let updates = plan.update.iter().map(|slice| api.replace(name(slice), &params, slice));
        for updated in try_join_all(updates).await? {
            caches.endpoint_slices.note(updated);
        }
        for gone in slices.iter().filter(|s| plan.delete.iter().any(|n| n == name(&***s))) {
            self.context.delete(&caches.endpoint_slices, &**gone, DeleteParams::default()).await?;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(spec: Value) -> Service {
        serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "n", "uid": "u"}, "spec": spec})).unwrap()
    }

    fn pod(number: usize, change: impl FnOnce(&mut Value)) -> Arc<Pod> {
        let mut pod = json!({"metadata": {"name": format!("p{number}"), "namespace": "n", "uid": format!("uid{number}"), "labels": {"a": "1"}},
            "spec": {"nodeName": "node", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIP": format!("10.244.{}.{}", number / 250, number % 250 + 2), "conditions": [{"type": "Ready", "status": "True"}]}});
        change(&mut pod);
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn web() -> Service {
        service(json!({"selector": {"a": "1"}, "ports": [{"port": 80, "targetPort": "http"}]}))
    }

    fn named(mut plan: Plan) -> Vec<Arc<EndpointSlice>> {
        for (index, slice) in plan.create.iter_mut().enumerate() {
            slice.metadata.name = Some(format!("s-{index}"));
        }
        plan.create.into_iter().map(Arc::new).collect()
    }

    fn count(slices: &[EndpointSlice]) -> Vec<usize> {
        slices.iter().map(|s| s.endpoints.iter().flatten().count()).collect()
    }

    #[test]
    fn conditions_follow_the_pod() {
        let check = |change: fn(&mut Value), expect: Option<(bool, bool, bool)>| {
            let plan = plan(&web(), &[pod(1, change)], &[], |_| Some("z".into()));
            let found = plan.create[0].endpoints.iter().flatten().next().map(|e| {
                assert_eq!((e.zone.as_deref(), e.node_name.as_deref()), (Some("z"), Some("node")));
                let c = e.conditions.clone().unwrap();
                (c.ready.unwrap(), c.serving.unwrap(), c.terminating.unwrap())
            });
            assert_eq!(found, expect);
        };
        check(|_| {}, Some((true, true, false)));
        check(|p| p["status"]["conditions"][0]["status"] = "False".into(), Some((false, false, false)));
        check(|p| p["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into(), Some((false, true, true)));
        check(|p| p["status"]["podIP"] = Value::Null, None);
        check(|p| p["status"]["phase"] = "Succeeded".into(), None);
        let early = service(json!({"selector": {"a": "1"}, "publishNotReadyAddresses": true, "ports": [{"port": 80}]}));
        let plan = plan(&early, &[pod(1, |p| p["status"]["conditions"][0]["status"] = "False".into())], &[], |_| None);
        let conditions = plan.create[0].endpoints.iter().flatten().next().unwrap().conditions.clone().unwrap();
        // Published all the same, and it says what it is.
        assert_eq!((conditions.ready, conditions.serving), (Some(true), Some(false)));
        assert_eq!(plan.create[0].ports.as_ref().unwrap()[0].port, Some(80));
    }

    #[test]
    fn a_change_touches_one_slice() {
        let pods: Vec<_> = (0..250).map(|n| pod(n, |_| {})).collect();
        let first = plan(&web(), &pods, &[], |_| None);
        assert_eq!(count(&first.create), [100, 100, 50]);
        assert_eq!(first.create[0].ports.as_ref().unwrap()[0].port, Some(8080));
        let slices = named(first);
        let same = plan(&web(), &pods, &slices, |_| None);
        assert!(same.create.is_empty() && same.update.is_empty() && same.delete.is_empty());
        let mut changed = pods.clone();
        changed[7] = pod(7, |p| p["status"]["conditions"][0]["status"] = "False".into());
        let next = plan(&web(), &changed, &slices, |_| None);
        assert_eq!((next.create.len(), next.update.len(), next.delete.len()), (0, 1, 0));
        let mut more = pods.clone();
        more.push(pod(251, |_| {}));
        let next = plan(&web(), &more, &slices, |_| None);
        assert_eq!((next.create.len(), count(&next.update)), (0, vec![51]));
        let next = plan(&web(), &pods[..1], &slices, |_| None);
        assert_eq!((next.create.len(), next.update.len() + next.delete.len()), (0, 3));
    }

    #[test]
    fn pods_with_other_port_numbers_have_slices_of_their_own() {
        let other = pod(2, |p| p["spec"]["containers"][0]["ports"][0]["containerPort"] = 9090.into());
        let plan = plan(&web(), &[pod(1, |_| {}), other], &[], |_| None);
        let mut ports: Vec<_> = plan.create.iter().map(|s| s.ports.as_ref().unwrap()[0].port.unwrap()).collect();
        ports.sort_unstable();
        assert_eq!(ports, [8080, 9090]);
    }

    #[test]
    fn a_service_that_loses_its_selector_loses_its_slices() {
        let slices = named(plan(&web(), &[pod(1, |_| {})], &[], |_| None));
        let plan = plan(&service(json!({"ports": [{"port": 80}]})), &[], &slices, |_| None);
        assert_eq!(plan.delete, ["s-0"]);
    }
}
