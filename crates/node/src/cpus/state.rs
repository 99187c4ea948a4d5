//! Which containers have which CPUs for themselves. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};

use super::{set::CpuSet, topology::Topology};
use crate::{
    pod::{
        self, Class, ContainerRef, containers,
        qos::{self, Qos},
        quantity::get_milli,
    },
    topology::{
        hints::{Hint, Supply, hints, impossible},
        mask::Mask,
    },
};

/// By the pod's uid and the container's name.
pub type Pods = BTreeMap<String, BTreeMap<String, CpuSet>>;

/// See the module.
#[derive(Debug, Default)]
pub struct State {
    topology: Topology,
    /// Nobody gets these for itself: the system and pods without CPUs of their own run here, whatever happens.
    reserved: CpuSet,
    pods: Pods,
}

/// How many CPUs a container gets for itself: it wants whole ones, and its pod is Guaranteed.
fn exclusive(qos: Qos, container: &Container) -> usize {
    let resources = container.resources.as_ref();
    let request = resources.and_then(|r| get_milli(r.requests.as_ref(), "cpu").or(get_milli(r.limits.as_ref(), "cpu")));
    match request {
        Some(milli) if qos == Qos::Guaranteed && milli > 0 && milli % 1000 == 0 => {
            usize::try_from(milli / 1000).unwrap_or(usize::MAX)
        }
        _ => 0,
    }
}

impl State {
    /// With what was given before.
    pub fn new(topology: Topology, reserved: CpuSet, pods: Pods) -> State {
        State { topology, reserved, pods }
    }

    /// Who has what.
    pub fn pods(&self) -> &Pods {
        &self.pods
    }

    /// What those share that have none of their own.
    pub fn shared(&self) -> CpuSet {
        self.topology.all().without(&self.given())
    }

    fn given(&self) -> CpuSet {
        self.pods.values().flat_map(BTreeMap::values).flat_map(|set| &set.0).copied().collect()
    }

    /// Where a container may run.
    pub fn of(&self, uid: &str, container: &str) -> CpuSet {
        let own = self.pods.get(uid).and_then(|containers| containers.get(container));
        own.cloned().unwrap_or_else(|| self.shared())
    }

    /// Whether a pod is to have some for itself.
    pub fn concerns(&self, pod: &Pod) -> bool {
        let qos = qos::class(pod);
        pod.spec.as_ref().is_some_and(|spec| containers(spec).any(|one| exclusive(qos, one.spec) > 0))
    }

    /// What nobody has who has some for itself, and may be given out.
    fn free(&self) -> CpuSet {
        self.shared().without(&self.reserved)
    }

    /// What init containers of a pod have, which are over when this one starts.
    fn reusable(&self, pod: &Pod, container: &str) -> CpuSet {
        let mut reusable = CpuSet::default();
        let Some((spec, of_pod)) = pod.spec.as_ref().zip(self.pods.get(pod::uid(pod))) else { return reusable };
        for one in containers(spec).take_while(|one| one.spec.name != container) {
            let Some(has) = of_pod.get(&one.spec.name) else { continue };
            reusable = match one.class {
                Class::Init => reusable.with(has),
                _ => reusable.without(has),
            };
        }
        reusable
    }

    /// Gives a container of a pod the CPUs that it is to have for itself, if it has none: those of init containers again, and
    /// those of some NUMA nodes first, if there is an affinity. Says whether anything has changed.
    ///
    /// # Errors
    /// If there are not enough, in upstream's words.
    pub fn give(&mut self, pod: &Pod, one: ContainerRef<'_>, affinity: Option<Mask>) -> Result<bool, String> {
        let (uid, name, count) = (pod::uid(pod), &one.spec.name, exclusive(qos::class(pod), one.spec));
        let has = self.pods.get(uid).is_some_and(|of_pod| of_pod.contains_key(name));
        if count == 0 || has {
            return Ok(false);
        }
        let (free, reusable) = (self.free(), self.reusable(pod, name));
        let available = free.with(&reusable);
        if available.len() < count {
            let available = available.len();
            return Err(format!(
                "not enough cpus available to satisfy request: requested={count}, available={available}"
            ));
        }
        let near = self.topology.on(affinity.unwrap_or(self.topology.nodes()), &available);
        let mut given = CpuSet::default();
        for part in [near.and(&reusable), near.and(&free), reusable.without(&near), free.without(&near)] {
            let more = self.topology.take(&part, part.len().min(count - given.len())).unwrap_or_default();
            given = given.with(&more);
        }
        self.pods.entry(uid.to_owned()).or_default().insert(name.clone(), given);
        Ok(true)
    }

    /// The same for all containers of a pod, without an affinity.
    ///
    /// # Errors
    /// If there are not enough; then it has got none.
    pub fn give_all(&mut self, pod: &Pod) -> Result<bool, String> {
        let had = self.pods.get(pod::uid(pod)).cloned();
        let mut changed = false;
        for one in pod.spec.iter().flat_map(containers) {
            match self.give(pod, one, None) {
                Ok(has_got) => changed |= has_got,
                Err(why) => {
                    self.pods.remove(pod::uid(pod));
                    self.pods.extend(had.map(|had| (pod::uid(pod).to_owned(), had)));
                    return Err(why);
                }
            }
        }
        Ok(changed)
    }

    fn hints_of(&self, reusable: &CpuSet, free: &CpuSet, count: usize) -> Vec<Hint> {
        let [all, reusable, free] = [&self.topology.all(), reusable, free].map(|cpus| self.topology.near(cpus));
        hints(self.topology.nodes(), &Supply { all, reusable, free }, count)
    }

    /// From which NUMA nodes a container of a pod could have its CPUs; `None` if it gets none for itself.
    pub fn hints(&self, pod: &Pod, one: ContainerRef<'_>) -> Option<Vec<Hint>> {
        let (name, count) = (&one.spec.name, exclusive(qos::class(pod), one.spec));
        if count == 0 {
            return None;
        }
        Some(match self.pods.get(pod::uid(pod)).and_then(|of_pod| of_pod.get(name)) {
            Some(has) if has.len() != count => impossible(),
            Some(has) => self.hints_of(&CpuSet::default(), has, count),
            None => self.hints_of(&self.reusable(pod, name), &self.free(), count),
        })
    }

    /// The same for all that a pod has at a time.
    pub fn pod_hints(&self, pod: &Pod) -> Option<Vec<Hint>> {
        let qos = qos::class(pod);
        let count = |container: &Container| i64::try_from(exclusive(qos, container)).unwrap_or(i64::MAX);
        let wanted = usize::try_from(qos::aggregate(pod.spec.as_ref()?, count)).ok().filter(|wanted| *wanted > 0)?;
        let of_pod = self.pods.get(pod::uid(pod));
        let has = |name: &str| of_pod.and_then(|of_pod| of_pod.get(name));
        let differs = pod
            .spec
            .iter()
            .flat_map(containers)
            .any(|one| has(&one.spec.name).is_some_and(|has| has.len() != exclusive(qos, one.spec)));
        let assigned: CpuSet = of_pod.into_iter().flatten().flat_map(|(_, has)| has.0.iter().copied()).collect();
        Some(match differs {
            true => impossible(),
            false if assigned.len() == wanted => self.hints_of(&CpuSet::default(), &assigned, wanted),
            false => self.hints_of(&assigned, &self.free(), wanted),
        })
    }

    /// Only these pods still have any. Says whether some had.
    pub fn retain(&mut self, keeps: impl Fn(&str) -> bool) -> bool {
        let before = self.pods.len();
        self.pods.retain(|uid, _| keeps(uid));
        self.pods.len() != before
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cpus::topology::Place;

    fn state(cpus: u32, reserved: &str) -> State {
        let topology = Topology((0..cpus).map(|cpu| (cpu, Place { node: 0, socket: 0, core: cpu })).collect());
        State::new(topology, reserved.parse().unwrap(), Pods::default())
    }

    fn pod(uid: &str, spec: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": uid, "uid": uid}, "spec": spec})).unwrap()
    }

    fn container(name: &str, cpu: &str) -> Value {
        let amounts = json!({"cpu": cpu, "memory": "1Mi"});
        json!({"name": name, "resources": {"limits": amounts, "requests": amounts}})
    }

    /// Gives one container CPUs; what it gets, and what is left for the others.
    fn give(state: &mut State, uid: &str, cpu: &str) -> Result<(String, String), String> {
        state.give_all(&pod(uid, json!({"containers": [container("c", cpu)]})))?;
        Ok((state.of(uid, "c").to_string(), state.shared().to_string()))
    }

    #[test]
    fn who_gets_which() {
        let mut state = state(4, "0");
        let got = |own: &str, shared: &str| Ok((own.to_owned(), shared.to_owned()));
        assert_eq!(give(&mut state, "part", "1500m"), got("0-3", "0-3"));
        assert_eq!(give(&mut state, "one", "1"), got("1", "0,2-3"));
        assert_eq!(state.of("part", "c").to_string(), "0,2-3");
        assert_eq!(give(&mut state, "one", "1"), got("1", "0,2-3"), "it has what it wants");
        let short = "not enough cpus available to satisfy request: requested=3, available=2".to_owned();
        assert_eq!(give(&mut state, "three", "3"), Err(short));
        assert_eq!(give(&mut state, "two", "2000m"), got("2-3", "0"));
        assert!(state.retain(|uid| uid != "one") && !state.retain(|uid| uid != "one"));
        assert_eq!(give(&mut state, "next", "1"), got("1", "0"));
        // Whole CPUs alone are not enough: the pod has to be Guaranteed.
        let burstable = json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]});
        assert!(state.retain(|_| false));
        assert_eq!(state.give_all(&pod("burstable", burstable)), Ok(false));
        assert_eq!(state.shared().to_string(), "0-3");
    }

    #[test]
    fn containers_of_a_pod() {
        let check = |init: Value, main: Value, expect: Result<&[(&str, &str)], &str>| {
            let mut state = state(5, "0");
            let given = state.give_all(&pod("p", json!({"initContainers": init, "containers": main})));
            let expect = expect.map_err(str::to_owned);
            let Ok(expect) = expect else {
                assert_eq!(given, Err(expect.unwrap_err()));
                return assert!(state.pods().is_empty(), "nothing is given in part");
            };
            for (name, cpus) in expect {
                assert_eq!(state.of("p", name).to_string(), *cpus, "{name}");
            }
        };
        let sidecar = |cpu: &str| {
            let mut sidecar = container("s", cpu);
            sidecar["restartPolicy"] = json!("Always");
            sidecar
        };
        check(json!([]), json!([container("a", "2"), container("b", "500m")]), Ok(&[("a", "1-2"), ("b", "0,3-4")]));
        check(
            json!([container("i", "4")]),
            json!([container("a", "1"), container("b", "2")]),
            Ok(&[("i", "1-4"), ("a", "1"), ("b", "2-3")]),
        );
        check(
            json!([container("i", "1"), sidecar("2")]),
            json!([container("a", "2")]),
            Ok(&[("i", "1"), ("s", "1-2"), ("a", "3-4")]),
        );
        let short = "not enough cpus available to satisfy request: requested=2, available=1";
        check(json!([container("i", "1")]), json!([container("a", "3"), container("b", "2")]), Err(short));
    }
}
