//! Which devices there are, who has which, and which one is given out next. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use k8s_openapi::api::core::v1::{Container, PodSpec};
use serde::{Deserialize, Serialize};

use super::api::{ContainerAllocateResponse, Device, HEALTHY};
use crate::{
    pod::{Class, ContainerRef, containers, qos::aggregate, quantity::get_units},
    topology::{
        hints::{Hint, Supply, hints, impossible},
        mask::Mask,
    },
};

/// How long the devices of a plugin that has gone still count as there, but of no use: as upstream.
const REMEMBERED: Duration = Duration::from_secs(300);

/// Names of devices.
pub type Ids = BTreeSet<String>;

/// What a container has of one resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// Which devices.
    pub devices: Ids,
    /// What the container is made with for that.
    pub with: ContainerAllocateResponse,
    /// The plugin wants to be told before the container starts.
    #[serde(default)]
    pub pre_start: bool,
}

/// By the pod's uid, the container's name and the resource.
pub type Pods = BTreeMap<String, BTreeMap<String, BTreeMap<String, Given>>>;

/// The devices of one name.
#[derive(Debug, Default)]
struct Resource {
    all: Ids,
    healthy: Ids,
    /// Which NUMA nodes devices are near to, as far as the plugin says that.
    near: BTreeMap<String, Mask>,
    /// Which plugin says so; `None` when it has gone.
    plugin: Option<u64>,
    /// When it went.
    left: Option<Duration>,
}

/// How many there are, and how many of them can be used, by the resource's name.
pub type Amounts = BTreeMap<String, (usize, usize)>;

/// Which devices may be given next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The container has what it wants.
    Had,
    /// These.
    These(Ids),
    /// These, and some that are free.
    Some {
        /// They come from the pod's init containers, which have ended when this one starts, or are the only ones where the
        /// container's resources are to come from.
        sure: Ids,
        /// What is free.
        free: Ids,
        /// What is free as well, and nobody knows what it is near to.
        last: Ids,
        /// How many of those.
        more: usize,
    },
}

impl Choice {
    /// Settles it, by what the plugin prefers if it said anything. `None` if there is nothing to be given.
    pub fn settle(self, preferred: &[String]) -> Option<Ids> {
        match self {
            Choice::Had => None,
            Choice::These(ids) => Some(ids),
            Choice::Some { mut sure, free, last, more } => {
                let is_there = |id: &&String| free.contains(*id) || last.contains(*id);
                let wanted: Ids = preferred.iter().filter(is_there).cloned().collect();
                let others = free.difference(&wanted).chain(last.difference(&wanted));
                sure.extend(wanted.iter().chain(others).take(more).cloned());
                Some(sure)
            }
        }
    }
}

/// The devices of init containers that a later container of the same pod may have, by resource.
#[derive(Debug, Default)]
pub struct Reusable(BTreeMap<String, Ids>);

impl Reusable {
    /// A container's turn is over, and it has these. What ends before the others start leaves them; the others keep them.
    pub fn after(&mut self, class: Class, resource: &str, has: &Ids) {
        let ids = self.0.entry(resource.to_owned()).or_default();
        match class {
            Class::Init => ids.extend(has.iter().cloned()),
            _ => ids.retain(|id| !has.contains(id)),
        }
    }
}

/// How many of which resources with names like `example.com/gpu` a container wants. Only whole ones can be asked for.
pub fn wanted(container: &Container) -> impl Iterator<Item = (&str, usize)> {
    let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
    let names = limits.into_iter().flat_map(BTreeMap::keys).filter(|name| name.contains('/'));
    names.filter_map(move |name| {
        let count = get_units(limits, name).and_then(|count| usize::try_from(count).ok())?;
        (count > 0).then_some((name.as_str(), count))
    })
}

/// See the module.
#[derive(Debug, Default)]
pub struct State {
    resources: BTreeMap<String, Resource>,
    pods: Pods,
}

impl State {
    /// What is known after a start: the resources that there were, and who had what of them.
    pub fn new(resources: impl IntoIterator<Item = String>, pods: Pods) -> State {
        let resources = resources.into_iter().map(|name| (name, Resource::default()));
        State { resources: resources.collect(), pods }
    }

    /// The resources that plugins have had devices of.
    pub fn resources(&self) -> impl Iterator<Item = &String> {
        self.resources.keys()
    }

    /// Who has what.
    pub fn pods(&self) -> &Pods {
        &self.pods
    }

    /// Whether a plugin gives this out, or has.
    pub fn manages(&self, resource: &str) -> bool {
        self.resources.contains_key(resource)
    }

    /// A plugin is there. Until it tells which devices there are, what its predecessor said holds.
    pub fn registered(&mut self, resource: &str, plugin: u64) {
        let resource = self.resources.entry(resource.to_owned()).or_default();
        (resource.plugin, resource.left) = (Some(plugin), None);
    }

    /// A plugin says which devices there are. False if nothing follows from it.
    pub fn listed(&mut self, resource: &str, plugin: u64, devices: &[Device]) -> bool {
        let Some(resource) = self.resources.get_mut(resource).filter(|known| known.plugin == Some(plugin)) else {
            return false;
        };
        let all: Ids = devices.iter().map(|device| device.id.clone()).collect();
        let healthy = devices.iter().filter(|device| device.health == HEALTHY);
        let healthy: Ids = healthy.map(|device| device.id.clone()).collect();
        let near = devices.iter().filter_map(|device| {
            let nodes = &device.topology.as_ref()?.nodes;
            let mask = nodes.iter().filter_map(|node| u32::try_from(node.id).ok()).collect();
            (!nodes.is_empty()).then(|| (device.id.clone(), mask))
        });
        resource.near = near.collect();
        let changed = resource.all != all || resource.healthy != healthy;
        (resource.all, resource.healthy) = (all, healthy);
        changed
    }

    /// A plugin has gone: nobody knows how its devices are. False if another one has taken its place.
    pub fn left(&mut self, resource: &str, plugin: u64, now: Duration) -> bool {
        let Some(resource) = self.resources.get_mut(resource).filter(|known| known.plugin == Some(plugin)) else {
            return false;
        };
        resource.healthy.clear();
        (resource.plugin, resource.left) = (None, Some(now));
        true
    }

    /// How many devices there are.
    pub fn amounts(&self, now: Duration) -> Amounts {
        let amounts = self.resources.iter().map(|(name, resource)| {
            let forgotten = resource.left.is_some_and(|left| now.saturating_sub(left) >= REMEMBERED);
            let all = if forgotten { 0 } else { resource.all.len() };
            (name.clone(), (all, resource.healthy.len()))
        });
        amounts.collect()
    }

    /// What a container has of a resource.
    pub fn has(&self, pod: &str, container: &str, resource: &str) -> Option<&Given> {
        self.pods.get(pod)?.get(container)?.get(resource)
    }

    /// All that a container is made with. Where plugins contradict one another, the first resource by name counts.
    pub fn made_with(&self, pod: &str, container: &str) -> ContainerAllocateResponse {
        let mut all = ContainerAllocateResponse::default();
        for given in self.pods.get(pod).and_then(|pod| pod.get(container)).into_iter().flat_map(BTreeMap::values) {
            let with = given.with.clone();
            for (list, more) in [(&mut all.envs, with.envs), (&mut all.annotations, with.annotations)] {
                for (name, value) in more {
                    list.entry(name).or_insert(value);
                }
            }
            let taken = |path: &str| all.mounts.iter().any(|mount| mount.container_path == path);
            let mounts: Vec<_> = with.mounts.into_iter().filter(|mount| !taken(&mount.container_path)).collect();
            all.mounts.extend(mounts);
            let taken = |path: &str| all.devices.iter().any(|device| device.container_path == path);
            let devices: Vec<_> = with.devices.into_iter().filter(|device| !taken(&device.container_path)).collect();
            all.devices.extend(devices);
            let cdi: Vec<_> = with.cdi_devices.into_iter().filter(|device| !all.cdi_devices.contains(device)).collect();
            all.cdi_devices.extend(cdi);
        }
        all
    }

    /// The healthy devices of a resource that nobody has.
    fn free(&self, resource: &str) -> Ids {
        let of_pods = self.pods.values().flat_map(BTreeMap::values).filter_map(|given| given.get(resource));
        let taken: BTreeSet<&String> = of_pods.flat_map(|given| &given.devices).collect();
        let healthy = self.resources.get(resource).into_iter().flat_map(|known| &known.healthy);
        healthy.filter(|id| !taken.contains(id)).cloned().collect()
    }

    /// The devices of init containers that are over when this container of a pod starts.
    pub fn reusable(&self, uid: &str, spec: &PodSpec, container: &str) -> Reusable {
        let mut reusable = Reusable::default();
        for one in containers(spec).take_while(|one| one.spec.name != container) {
            let has = self.pods.get(uid).and_then(|of_pod| of_pod.get(&one.spec.name));
            for (resource, has) in has.into_iter().flatten() {
                reusable.after(one.class, resource, &has.devices);
            }
        }
        reusable
    }

    /// From which NUMA nodes a container of a pod could have so many of a resource; `None` if that does not matter.
    fn hints_of(&self, nodes: Mask, resource: &str, has: &Ids, reusable: &Ids, count: usize) -> Option<Vec<Hint>> {
        let known = self.resources.get(resource).filter(|known| !known.near.is_empty())?;
        let near = |ids: &Ids| ids.iter().filter_map(|id| known.near.get(id)).copied().collect::<Vec<Mask>>();
        let all = near(&known.all);
        if !has.is_empty() {
            let supply = Supply { all, reusable: Vec::new(), free: near(has) };
            return Some(if has.len() == count { hints(nodes, &supply, count) } else { impossible() });
        }
        let free = self.free(resource);
        if free.union(reusable).count() < count {
            return Some(impossible());
        }
        Some(hints(nodes, &Supply { all, reusable: near(reusable), free: near(&free) }, count))
    }

    /// From which of these NUMA nodes a container could have the devices that it wants, for each resource where that matters.
    pub fn hints(&self, nodes: Mask, uid: &str, spec: &PodSpec, one: ContainerRef<'_>) -> Vec<Vec<Hint>> {
        let (name, none) = (&one.spec.name, Ids::new());
        let reusable = self.reusable(uid, spec, name);
        let of = |(resource, count): (&str, usize)| {
            let has = self.has(uid, name, resource).map_or(&none, |given| &given.devices);
            self.hints_of(nodes, resource, has, reusable.0.get(resource).unwrap_or(&none), count)
        };
        wanted(one.spec).filter_map(of).collect()
    }

    /// The same for all that a pod has at a time.
    pub fn pod_hints(&self, nodes: Mask, uid: &str, spec: &PodSpec) -> Vec<Vec<Hint>> {
        let resources: BTreeSet<&str> =
            containers(spec).flat_map(|one| wanted(one.spec)).map(|(name, _)| name).collect();
        let of = |resource: &str| {
            let count = |container: &Container| {
                let count = wanted(container).find(|(name, _)| *name == resource).map_or(0, |(_, count)| count);
                i64::try_from(count).unwrap_or(i64::MAX)
            };
            let count = usize::try_from(aggregate(spec, count)).unwrap_or(usize::MAX);
            let of_pod = self.pods.get(uid).into_iter().flat_map(BTreeMap::values);
            let has: Ids = of_pod.filter_map(|of| of.get(resource)).flat_map(|given| given.devices.clone()).collect();
            self.hints_of(nodes, resource, &has, &Ids::new(), count)
        };
        resources.into_iter().filter_map(of).collect()
    }

    /// Which devices a container may get, or why it gets none: upstream's words. Those near to some NUMA nodes come first, if
    /// there is an affinity.
    pub fn choose(
        &self,
        pod: &str,
        container: &str,
        (resource, count): (&str, usize),
        reusable: &Reusable,
        affinity: Option<Mask>,
    ) -> Result<Choice, String> {
        let had = self.has(pod, container, resource).map_or(0, |given| given.devices.len());
        if had == count {
            return Ok(Choice::Had);
        }
        if had > 0 {
            return Err(format!(
                "pod {pod:?} container {container:?} changed request for resource {resource:?} from {had} to {count}"
            ));
        }
        let known = self.resources.get(resource).filter(|known| !known.healthy.is_empty());
        let Some(known) = known else {
            return Err(format!("no healthy devices present; cannot allocate unhealthy devices {resource}"));
        };
        let mut sure: Ids = reusable.0.get(resource).into_iter().flatten().take(count).cloned().collect();
        let more = count - sure.len();
        if more == 0 {
            return Ok(Choice::These(sure));
        }
        let free = self.free(resource);
        if free.len() < more {
            return Err(format!(
                "requested number of devices unavailable for {resource}. Requested: {more}, Available: {}",
                free.len()
            ));
        }
        let Some(nodes) = affinity.filter(|_| !known.near.is_empty()) else {
            return Ok(Choice::Some { sure, free, last: Ids::new(), more });
        };
        let (with, without): (Ids, Ids) = free.into_iter().partition(|id| known.near.contains_key(id));
        let (near, far): (Ids, Ids) = with.into_iter().partition(|id| known.near[id].meets(nodes));
        if near.len() > more {
            return Ok(Choice::Some { sure, free: near, last: Ids::new(), more });
        }
        let more = more - near.len();
        sure.extend(near);
        Ok(if more == 0 { Choice::These(sure) } else { Choice::Some { sure, free: far, last: without, more } })
    }

    /// A container has devices.
    pub fn give(&mut self, pod: &str, container: &str, resource: &str, given: Given) {
        let of_pod = self.pods.entry(pod.to_owned()).or_default();
        of_pod.entry(container.to_owned()).or_default().insert(resource.to_owned(), given);
    }

    /// A container has not got devices after all.
    pub fn take_back(&mut self, pod: &str, container: &str, resource: &str) {
        let Some(of_pod) = self.pods.get_mut(pod) else { return };
        if let Some(of_container) = of_pod.get_mut(container) {
            of_container.remove(resource);
        }
        of_pod.retain(|_, resources| !resources.is_empty());
        self.pods.retain(|_, containers| !containers.is_empty());
    }

    /// Only these pods still have any. Says whether some had.
    pub fn retain(&mut self, keeps: impl Fn(&str) -> bool) -> bool {
        let before = self.pods.len();
        self.pods.retain(|uid, _| keeps(uid));
        self.pods.len() != before
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
