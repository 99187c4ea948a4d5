//! EndpointSlice: the addresses of the pods behind a Service, of each family that it has
//! (<https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/>).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use k8s_openapi::{
    api::{
        core::v1::{Node, ObjectReference, Pod, Service, ServicePort},
        discovery::v1::{Endpoint, EndpointConditions, EndpointSlice},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue,
        objects::{controller_reference, is_deleting, is_finished, is_ready, name, namespace, uid},
    },
};

pub mod mirroring;
mod packing;
#[cfg(test)]
mod simulated;

pub use packing::Plan;
use packing::{Packer, Ports, Wanted, family_of, identity};

/// Says whose slice it is.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub(crate) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const OURS: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Decides. `pods` are those that the Service selects; `slices` those that are ours; `zone` is the zone of a node.
pub fn plan(
    service: &Service,
    pods: &[Arc<Pod>],
    slices: &[Arc<EndpointSlice>],
    zone: impl Fn(&str) -> Option<String>,
) -> Plan {
    let spec = service.spec.clone().unwrap_or_default();
    let selects =
        spec.selector.as_ref().is_some_and(|s| !s.is_empty()) && spec.type_.as_deref() != Some("ExternalName");
    let labels = labels(service);
    let prefix: String = name(service).chars().take(57).collect();
    let owner = controller_reference(service);
    let mut packer = Packer::new(slices, &labels, &owner, namespace(service), format!("{prefix}-"));
    for family in families(service).into_iter().filter(|_| selects) {
        let mut wanted: Wanted = BTreeMap::new();
        for pod in pods {
            if let Some(endpoint) = endpoint(service, pod, family, &zone) {
                let ports = ports(spec.ports.as_deref().unwrap_or_default(), pod);
                wanted.entry(ports).or_default().insert(identity(&endpoint), endpoint);
            }
        }
        // A Service without pods still has a slice, so that its ports can be seen.
        if wanted.is_empty() {
            wanted.insert(Vec::new(), BTreeMap::new());
        }
        packer.pack(family, wanted);
    }
    packer.finish()
}

/// The families of a Service's addresses; one that does not say has IPv4.
fn families(service: &Service) -> Vec<&str> {
    let named = service.spec.iter().flat_map(|spec| spec.ip_families.iter().flatten());
    let families: Vec<&str> = named.map(String::as_str).filter(|family| ["IPv4", "IPv6"].contains(family)).collect();
    if families.is_empty() { vec!["IPv4"] } else { families }
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

/// The addresses of a pod.
fn addresses(pod: &Pod) -> Vec<String> {
    let status = pod.status.as_ref();
    let all = status.iter().flat_map(|s| s.pod_ips.iter().flatten()).map(|ip| ip.ip.clone());
    all.chain(status.and_then(|s| s.pod_ip.clone())).collect()
}

fn endpoint(service: &Service, pod: &Pod, family: &str, zone: &impl Fn(&str) -> Option<String>) -> Option<Endpoint> {
    if is_finished(pod) {
        return None;
    }
    let address = addresses(pod).into_iter().find(|address| family_of(address) == Some(family))?;
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
            (pod.metadata.labels.clone(), addresses(pod), is_ready(pod), is_deleting(&**pod), is_finished(pod))
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
        packing::apply(&self.context, &key.namespace, &slices, &plan).await?;
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
    fn every_family_has_slices_of_its_own() {
        let both = |p: &mut Value| p["status"]["podIPs"] = json!([{"ip": "10.244.0.9"}, {"ip": "fd00::9"}]);
        let check = |families: Value, expect: &[(&str, &str)]| {
            let spec = json!({"selector": {"a": "1"}, "ipFamilies": families, "ports": [{"port": 80}]});
            let made = plan(&service(spec), &[pod(1, both)], &[], |_| None);
            let found: Vec<_> = made
                .create
                .iter()
                .flat_map(|s| s.endpoints.iter().flatten().map(|e| (&*s.address_type, &*e.addresses[0])))
                .collect();
            assert_eq!(found, expect);
            made
        };
        check(json!(["IPv4"]), &[("IPv4", "10.244.0.9")]);
        check(json!(["IPv6"]), &[("IPv6", "fd00::9")]);
        let made = check(json!(["IPv6", "IPv4"]), &[("IPv6", "fd00::9"), ("IPv4", "10.244.0.9")]);
        // A Service that gives up a family gives up its slices.
        let slices = named(made);
        let one = service(json!({"selector": {"a": "1"}, "ipFamilies": ["IPv4"], "ports": [{"port": 80}]}));
        let next = plan(&one, &[pod(1, both)], &slices, |_| None);
        assert_eq!((next.create.len(), next.update.len(), next.delete), (0, 0, vec!["s-0".to_owned()]));
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
