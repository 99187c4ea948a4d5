//! Addresses for Services of type LoadBalancer, where machines have no cloud that would give them
//! (<https://kubernetes.io/docs/concepts/services-networking/service/#loadbalancer>). They come from `--load-balancer-pool`;
//! without one nothing is done here, and Services wait for whoever else gives addresses. Which machine answers for an
//! address is the machines' business (`seawall_network::announce`).
//!
//! What was given here has the condition [`CONDITION`]; nobody else's addresses are touched.

pub mod pool;

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Node, Service};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue,
        events::Severity,
        objects::{self, created, is_deleting},
    },
};
use pool::Pool;

/// A Service of this `loadBalancerClass`, or of none, is ours.
pub const CLASS: &str = "seawall.dev/load-balancer";
/// The condition of a Service that has its address from here.
pub const CONDITION: &str = "seawall.dev/AddressGiven";

/// What to do for a Service.
#[derive(Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing.
    Leave,
    /// Its addresses are these.
    Give(Vec<IpAddr>),
    /// Those that it has from here are not its any more.
    Take,
    /// It cannot have what it asks for; what it has from here goes.
    Refuse(String),
}

/// Whether we are to give it addresses.
fn is_ours(service: &Service) -> bool {
    let Some(spec) = &service.spec else { return false };
    let class = spec.load_balancer_class.as_deref();
    spec.type_.as_deref() == Some("LoadBalancer") && class.is_none_or(|c| c == CLASS) && !is_deleting(service)
}

/// Whether it has addresses from here.
fn has_ours(service: &Service) -> bool {
    let conditions = service.status.iter().flat_map(|s| s.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == CONDITION && c.status == "True")
}

/// The addresses that its status names.
fn addresses(service: &Service) -> Vec<IpAddr> {
    let status = service.status.as_ref().and_then(|s| s.load_balancer.as_ref());
    let ingress = status.into_iter().flat_map(|l| l.ingress.iter().flatten());
    ingress.filter_map(|i| i.ip.as_deref()?.parse().ok()).collect()
}

/// Who has which address: of two, the older one.
fn taken<'a>(services: impl Iterator<Item = &'a Service>, nodes: &[Arc<Node>]) -> BTreeMap<IpAddr, Option<Key>> {
    let mut all: Vec<&Service> = services.collect();
    all.sort_by_key(|service| (created(*service), Key::of(*service)));
    let mut taken: BTreeMap<IpAddr, Option<Key>> = BTreeMap::new();
    // A machine's own is never given to anybody.
    for node in nodes {
        let named = node.status.iter().flat_map(|s| s.addresses.iter().flatten());
        taken.extend(named.filter_map(|a| Some((a.address.parse().ok()?, None))));
    }
    for service in all {
        for ip in addresses(service) {
            taken.entry(ip).or_insert_with(|| Some(Key::of(service)));
        }
    }
    taken
}

/// Decides.
pub fn plan(service: &Service, taken: &BTreeMap<IpAddr, Option<Key>>, pool: &Pool) -> Plan {
    let given = has_ours(service);
    if !is_ours(service) || pool.is_empty() {
        return if given { Plan::Take } else { Plan::Leave };
    }
    let current = addresses(service);
    // Somebody else has given it some: theirs to change.
    if !given && !current.is_empty() {
        return Plan::Leave;
    }
    let spec = service.spec.clone().unwrap_or_default();
    let me = Key::of(service);
    let mine = |ip: IpAddr| taken.get(&ip).is_none_or(|by| by.as_ref() == Some(&me));
    let families = spec.ip_families.filter(|f| !f.is_empty()).unwrap_or_else(|| vec!["IPv4".into()]);
    let asked = match spec.load_balancer_ip.as_deref().filter(|text| !text.is_empty()) {
        None => None,
        Some(text) => match text.parse::<IpAddr>() {
            Ok(ip) if !pool.contains(ip) => {
                return Plan::Refuse(format!("spec.loadBalancerIP {ip} is not in --load-balancer-pool ({pool})"));
            }
            Ok(ip) if !families.iter().any(|f| (f == "IPv4") == ip.is_ipv4()) => {
                return Plan::Refuse(format!("spec.loadBalancerIP {ip} is of none of spec.ipFamilies"));
            }
            Ok(ip) if !mine(ip) => {
                let by = match taken.get(&ip) {
                    Some(Some(by)) => format!("the Service {by} has it"),
                    _ => "it is a node's".into(),
                };
                return Plan::Refuse(format!("spec.loadBalancerIP {ip} is in use: {by}"));
            }
            Ok(ip) => Some(ip),
            Err(_) => return Plan::Refuse(format!("spec.loadBalancerIP {text:?} is not an address")),
        },
    };
    let required = families.len() == 1 || spec.ip_family_policy.as_deref() == Some("RequireDualStack");
    let mut wanted = Vec::new();
    for family in &families {
        let v4 = family == "IPv4";
        let of_family = |ip: &IpAddr| ip.is_ipv4() == v4;
        // What it has it keeps.
        let kept = current.iter().copied().find(|ip| of_family(ip) && pool.contains(*ip) && mine(*ip));
        match asked.filter(of_family).or(kept).or_else(|| pool.free(v4, mine)) {
            Some(ip) => wanted.push(ip),
            None if required => {
                let why = if pool.has(v4) { "has no free address" } else { "has no addresses" };
                return Plan::Refuse(format!("--load-balancer-pool ({pool}) {why} of {family}"));
            }
            None => {}
        }
    }
    match wanted.is_empty() {
        true => Plan::Refuse(format!("--load-balancer-pool ({pool}) has no free address of {}", families.join(" or "))),
        false if wanted == current => Plan::Leave,
        false => Plan::Give(wanted),
    }
}

pub(crate) struct LoadBalancers {
    context: Arc<Context>,
    /// Addresses are given out one at a time, so that no two Services get the same.
    giving: tokio::sync::Mutex<()>,
    /// What was said last about those that were refused: once is enough.
    refused: Mutex<BTreeMap<Key, String>>,
}

impl LoadBalancers {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let (q, services) = (queue.clone(), context.caches.services.clone());
        context.caches.services.on_change(move |old, new| {
            for service in old.into_iter().chain(new) {
                if is_ours(service) || has_ours(service) {
                    q.add(Key::of(&**service));
                }
            }
            // Somebody may wait for what has become free.
            let left = |old: &Arc<Service>| new.is_none_or(|new| addresses(old) != addresses(new));
            if old.is_some_and(|old| !addresses(old).is_empty() && left(old)) {
                for service in services.all().iter().filter(|s| is_ours(s) && addresses(s).is_empty()) {
                    q.add(Key::of(&**service));
                }
            }
        });
        (Arc::new(LoadBalancers { context, giving: Default::default(), refused: Default::default() }), queue)
    }

    async fn write(&self, service: &Service, ips: &[IpAddr], condition: Option<&str>) -> anyhow::Result<()> {
        let mut conditions: Vec<Value> = Vec::new();
        for condition in service.status.iter().flat_map(|s| s.conditions.iter().flatten()) {
            if condition.type_ != CONDITION {
                conditions.push(serde_json::to_value(condition)?);
            }
        }
        if let Some(message) = condition {
            conditions.push(json!({
                "type": CONDITION, "status": "True", "reason": "Pool", "message": message,
                "lastTransitionTime": self.context.now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            }));
        }
        let ingress: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip.to_string(), "ipMode": "VIP"})).collect();
        // What is empty is left out, as whoever asks for the first one expects.
        let list = |list: Vec<Value>| if list.is_empty() { Value::Null } else { list.into() };
        let patch = json!({
            "metadata": {"uid": service.metadata.uid, "resourceVersion": service.metadata.resource_version},
            "status": {"loadBalancer": {"ingress": list(ingress)}, "conditions": list(conditions)},
        });
        let api: Api<Service> = self.context.api(objects::namespace(service));
        let patched = api.patch_status(objects::name(service), &PatchParams::default(), &Patch::Merge(patch)).await?;
        self.context.caches.services.note(patched);
        Ok(())
    }
}

#[async_trait]
impl Controller for LoadBalancers {
    fn name(&self) -> &'static str {
        "loadbalancer"
    }

    async fn ready(&self) {
        self.context.caches.services.synced().await;
        self.context.caches.nodes.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let (cache, pool) = (&self.context.caches.services, &self.context.config.load_balancer_pool);
        let _one = self.giving.lock().await;
        let Some(service) = cache.get(key) else {
            self.refused.lock().remove(key);
            return Ok(None);
        };
        let all = cache.all();
        let taken = taken(all.iter().map(|s| &**s), &self.context.caches.nodes.all());
        let recorder = &self.context.recorder;
        match plan(&service, &taken, pool) {
            Plan::Leave => {}
            Plan::Take => self.write(&service, &[], None).await?,
            Plan::Give(ips) => {
                self.refused.lock().remove(key);
                let names: Vec<String> = ips.iter().map(ToString::to_string).collect();
                let message = format!("The address {} is of --load-balancer-pool", names.join(" and "));
                self.write(&service, &ips, Some(&message)).await?;
                recorder.record(&*service, Severity::Normal, "AddressGiven", message);
            }
            Plan::Refuse(why) => {
                if has_ours(&service) {
                    self.write(&service, &[], None).await?;
                }
                let said = self.refused.lock().insert(key.clone(), why.clone());
                if said.as_ref() != Some(&why) {
                    recorder.record(&*service, Severity::Warning, "NoAddress", why);
                }
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, spec: Value, ips: &[&str], ours: bool) -> Service {
        let mut spec = spec;
        spec["type"] = spec.get("type").cloned().unwrap_or_else(|| "LoadBalancer".into());
        let ingress: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        let conditions = match ours {
            true => {
                json!([{"type": CONDITION, "status": "True", "reason": "r", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}])
            }
            false => json!([]),
        };
        serde_json::from_value(json!({
            "metadata": {"namespace": "n", "name": name, "uid": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": spec, "status": {"loadBalancer": {"ingress": ingress}, "conditions": conditions},
        }))
        .unwrap()
    }

    fn pool(text: &str) -> Pool {
        Pool(text.split_whitespace().map(|range| range.parse().unwrap()).collect())
    }

    fn node(ip: &str) -> Arc<Node> {
        let status = json!({"addresses": [{"type": "InternalIP", "address": ip}]});
        Arc::new(serde_json::from_value(json!({"metadata": {"name": "n"}, "status": status})).unwrap())
    }

    #[track_caller]
    fn check(service: &Service, others: &[Service], ranges: &str, expect: Result<&[&str], &str>) {
        let all = others.iter().chain([service]);
        let taken = taken(all, &[node("192.0.2.1")]);
        let found = match plan(service, &taken, &pool(ranges)) {
            Plan::Leave => Ok(vec!["as it is".to_owned()]),
            Plan::Take => Ok(Vec::new()),
            Plan::Give(ips) => Ok(ips.iter().map(ToString::to_string).collect()),
            Plan::Refuse(why) => Err(why),
        };
        match (found, expect) {
            (Ok(found), Ok(expect)) => assert_eq!(found, expect),
            (Err(found), Err(expect)) => assert!(found.contains(expect), "{found}"),
            (found, expect) => panic!("{found:?} is not {expect:?}"),
        }
    }

    const SAME: Result<&[&str], &str> = Ok(&["as it is"]);

    #[test]
    fn who_gets_which_address() {
        let both = || json!({"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "PreferDualStack"});
        let new = service("s", json!({}), &[], false);
        let other = |ip: &str| service("a", json!({}), &[ip], true);
        check(&new, &[], "192.0.2.8/30", Ok(&["192.0.2.8"]));
        // Neither a node's nor another Service's, whoever gave it.
        check(&new, &[other("192.0.2.2")], "192.0.2.1-192.0.2.3", Ok(&["192.0.2.3"]));
        check(&new, &[service("a", json!({}), &["192.0.2.2"], false)], "192.0.2.1-192.0.2.2", Err("no free address"));
        // What it has it keeps, while it is of the pool.
        check(&service("s", json!({}), &["192.0.2.9"], true), &[], "192.0.2.8/30", SAME);
        check(&service("s", json!({}), &["192.0.2.9"], true), &[], "192.0.2.16/30", Ok(&["192.0.2.16"]));
        // Of two with the same the older one keeps it.
        check(
            &service("s", json!({}), &["192.0.2.9"], true),
            &[other("192.0.2.9")],
            "192.0.2.8/30",
            Ok(&["192.0.2.8"]),
        );
        check(&other("192.0.2.9"), &[service("s", json!({}), &["192.0.2.9"], true)], "192.0.2.8/30", SAME);
        // Families.
        check(&service("s", both(), &[], false), &[], "192.0.2.8 fd00::8", Ok(&["192.0.2.8", "fd00::8"]));
        check(&service("s", both(), &[], false), &[], "192.0.2.8", Ok(&["192.0.2.8"]));
        let mut six = both();
        six["ipFamilyPolicy"] = "RequireDualStack".into();
        check(&service("s", six, &[], false), &[], "192.0.2.8", Err("has no addresses of IPv6"));
        check(&service("s", json!({"ipFamilies": ["IPv6"]}), &[], false), &[], "192.0.2.8", Err("of IPv6"));
    }

    #[test]
    fn what_it_asks_for() {
        let asks = |ip: &str, has: &[&str]| service("s", json!({"loadBalancerIP": ip}), has, !has.is_empty());
        check(&asks("192.0.2.10", &[]), &[], "192.0.2.8/30", Ok(&["192.0.2.10"]));
        check(&asks("192.0.2.10", &["192.0.2.8"]), &[], "192.0.2.8/30", Ok(&["192.0.2.10"]));
        check(&asks("192.0.2.10", &["192.0.2.10"]), &[], "192.0.2.8/30", SAME);
        check(&asks("198.51.100.1", &[]), &[], "192.0.2.8/30", Err("198.51.100.1 is not in --load-balancer-pool"));
        check(&asks("nonsense", &[]), &[], "192.0.2.8/30", Err("is not an address"));
        check(&asks("fd00::8", &[]), &[], "192.0.2.8 fd00::8", Err("none of spec.ipFamilies"));
        check(&asks("192.0.2.1", &[]), &[], "192.0.2.1", Err("it is a node's"));
        let other = service("a", json!({}), &["192.0.2.10"], true);
        check(&asks("192.0.2.10", &[]), &[other], "192.0.2.8/30", Err("the Service n/a has it"));
    }

    #[test]
    fn whose_it_is() {
        // Nobody said which addresses there are: somebody else may give them.
        check(&service("s", json!({}), &[], false), &[], "", SAME);
        check(&service("s", json!({"loadBalancerClass": "other.example/x"}), &[], false), &[], "192.0.2.8", SAME);
        check(&service("s", json!({"loadBalancerClass": CLASS}), &[], false), &[], "192.0.2.8", Ok(&["192.0.2.8"]));
        check(&service("s", json!({"type": "NodePort"}), &[], false), &[], "192.0.2.8", SAME);
        // Somebody else's address is left alone.
        check(&service("s", json!({}), &["198.51.100.1"], false), &[], "192.0.2.8", SAME);
        // Ours goes with the type, the class and the pool.
        check(&service("s", json!({"type": "NodePort"}), &["192.0.2.8"], true), &[], "192.0.2.8", Ok(&[]));
        check(&service("s", json!({}), &["192.0.2.8"], true), &[], "", Ok(&[]));
    }
}
