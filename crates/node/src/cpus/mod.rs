//! CPUs for containers that want them for themselves: the static policy of upstream's CPU manager (KEP-3570). Containers
//! of Guaranteed pods that request whole CPUs get some that no other container runs on; all others share the rest, and are
//! moved when that changes.
//!
//! <https://kubernetes.io/docs/tasks/administer-cluster/cpu-management-policies/>

pub mod set;
pub mod state;
pub mod topology;

use std::{
    collections::HashMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::{
    set::CpuSet,
    state::{Pods, State},
    topology::Topology,
};
use crate::{
    Agent, NodeConfig,
    cgroup::Cgroups,
    pod::{ContainerRef, observed},
    topology::{SYSTEM, hints::Hint, mask::Mask},
};

/// How often containers are looked at: one may have been made while the CPUs that it shares changed. As upstream.
const LOOK: Duration = Duration::from_secs(10);

/// Who gets CPUs for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Nobody.
    #[default]
    None,
    /// Containers of Guaranteed pods that request whole ones.
    Static,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Policy::None => "none",
            Policy::Static => "static",
        })
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Policy, String> {
        match text {
            "none" => Ok(Policy::None),
            "static" => Ok(Policy::Static),
            _ => Err("it is none or static".to_owned()),
        }
    }
}

/// What stands on the disk.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kept {
    policy_name: Policy,
    /// All CPUs of the machine.
    #[serde(default)]
    cpus: CpuSet,
    #[serde(default)]
    entries: Pods,
}

/// The CPUs of this machine, and who has which.
pub struct Cpus {
    policy: Policy,
    file: PathBuf,
    state: Mutex<State>,
    all: CpuSet,
    changed: watch::Sender<u64>,
}

/// The CPUs that cgroups can have here. What this process is pinned to does not matter: that is often what is reserved.
fn allowed(cgroups: &Cgroups) -> Option<CpuSet> {
    let file = if cgroups.is_v2() { "cpuset.cpus.effective" } else { "cpuset.cpus" };
    let text = fs::read_to_string(cgroups.file("cpuset", "/", file)).ok()?;
    text.parse().ok().filter(|cpus: &CpuSet| !cpus.is_empty())
}

impl Cpus {
    /// With what an earlier agent has given out.
    ///
    /// # Errors
    /// If the policy needs what it has not got, or what was given out is of another policy or machine.
    pub fn open(config: &NodeConfig) -> anyhow::Result<Cpus> {
        let topology = match config.cpu_policy {
            Policy::None => Topology::default(),
            Policy::Static => {
                let allowed = allowed(&Cgroups::detect(&config.cgroup_root));
                Topology::detect(Path::new(SYSTEM), allowed.as_ref()).context("which CPUs there are")?
            }
        };
        Cpus::of(config, topology)
    }

    /// The same, where the machine is known.
    pub(crate) fn of(config: &NodeConfig, topology: Topology) -> anyhow::Result<Cpus> {
        let (policy, file) = (config.cpu_policy, config.data_dir.join("cpus.json"));
        let all = topology.all();
        let mut reserved = CpuSet::default();
        if policy == Policy::Static {
            check(policy, config.reserved.cpu())?;
            let count = usize::try_from(config.reserved.cpu().div_euclid(1000)).unwrap_or(usize::MAX);
            let count = count.saturating_add(usize::from(config.reserved.cpu() % 1000 > 0));
            reserved = topology.take(&all, count).with_context(|| {
                format!("--cpu-manager-policy static: {count} CPUs are reserved, and this machine has only {all}")
            })?;
        }
        let way_out = format!("drain this node and delete {} before the agent is started again", file.display());
        let kept = match fs::read(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Kept { policy_name: policy, cpus: all.clone(), entries: Pods::default() }
            }
            read => serde_json::from_slice(&read.with_context(|| file.display().to_string())?)
                .with_context(|| format!("{} cannot be read: {way_out}", file.display()))?,
        };
        if kept.policy_name != policy {
            bail!(
                "could not restore state from checkpoint: configured policy \"{policy}\" differs from state checkpoint \
                 policy \"{}\": {way_out}",
                kept.policy_name
            );
        }
        if policy == Policy::Static && kept.cpus != all {
            bail!(
                "current set of available CPUs \"{all}\" doesn't match with CPUs in state \"{}\": {way_out}",
                kept.cpus
            );
        }
        let state = State::new(topology, reserved.clone(), kept.entries);
        if !reserved.without(&state.shared()).is_empty() {
            bail!(
                "not all reserved cpus: \"{reserved}\" are present in defaultCpuSet: \"{}\": {way_out}",
                state.shared()
            );
        }
        let cpus = Cpus { policy, file, state: Mutex::new(state), all, changed: watch::channel(0).0 };
        cpus.write(&cpus.state.lock()).with_context(|| format!("write {}", cpus.file.display()))?;
        Ok(cpus)
    }

    fn write(&self, state: &State) -> io::Result<()> {
        let kept = Kept { policy_name: self.policy, cpus: self.all.clone(), entries: state.pods().clone() };
        let unfinished = self.file.with_extension("new");
        fs::write(&unfinished, serde_json::to_vec(&kept)?)?;
        fs::rename(unfinished, &self.file)
    }

    /// Whether anybody gets CPUs for itself.
    pub fn is_static(&self) -> bool {
        self.policy == Policy::Static
    }

    /// Where a container may run; `None` for everywhere.
    pub fn of_container(&self, uid: &str, container: &str) -> Option<CpuSet> {
        self.is_static().then(|| self.state.lock().of(uid, container))
    }

    /// Whether a container, or any of a pod if none is named, has CPUs for itself. A quota would only slow it down then:
    /// time on them is nobody else's (upstream's `DisableCPUQuotaWithExclusiveCPUs`).
    pub fn has_own(&self, uid: &str, container: Option<&str>) -> bool {
        let state = self.state.lock();
        let of_pod = state.pods().get(uid);
        of_pod.is_some_and(|of_pod| container.map_or(!of_pod.is_empty(), |name| of_pod.contains_key(name)))
    }

    /// Whether a pod is to have some for itself.
    pub fn concerns(&self, pod: &Pod) -> bool {
        self.is_static() && self.state.lock().concerns(pod)
    }

    /// From which NUMA nodes a container of a pod could have its CPUs: a list, if it is to have some for itself.
    pub fn hints(&self, pod: &Pod, one: ContainerRef<'_>) -> Vec<Vec<Hint>> {
        if self.is_static() { self.state.lock().hints(pod, one).into_iter().collect() } else { Vec::new() }
    }

    /// The same for all that a pod has at a time.
    pub fn pod_hints(&self, pod: &Pod) -> Vec<Vec<Hint>> {
        if self.is_static() { self.state.lock().pod_hints(pod).into_iter().collect() } else { Vec::new() }
    }

    /// Gives the containers of a pod the CPUs that they are to have for themselves, if they have none.
    ///
    /// # Errors
    /// Why not, in upstream's words; then it has got none.
    pub fn give(&self, pod: &Pod) -> Result<(), String> {
        self.give_by(pod, |state| state.give_all(pod))
    }

    /// The same for one container; from some NUMA nodes first, if there is an affinity.
    ///
    /// # Errors
    /// Why not, in upstream's words.
    pub fn give_one(&self, pod: &Pod, one: ContainerRef<'_>, affinity: Option<Mask>) -> Result<(), String> {
        self.give_by(pod, |state| state.give(pod, one, affinity))
    }

    fn give_by(&self, pod: &Pod, give: impl FnOnce(&mut State) -> Result<bool, String>) -> Result<(), String> {
        if !self.is_static() {
            return Ok(());
        }
        let mut state = self.state.lock();
        if give(&mut state)? {
            if let Err(error) = self.write(&state) {
                state.retain(|uid| uid != crate::pod::uid(pod));
                return Err(format!("write {}: {error}", self.file.display()));
            }
            self.changed.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    /// A pod needs nothing any more.
    pub fn release(&self, uid: &str) {
        self.retain(|other| other != uid);
    }

    /// Only these pods are there.
    pub fn retain(&self, keeps: impl Fn(&str) -> bool) {
        let mut state = self.state.lock();
        if !state.retain(keeps) {
            return;
        }
        if let Err(error) = self.write(&state) {
            tracing::error!("write {}: {error}", self.file.display());
        }
        self.changed.send_modify(|count| *count += 1);
    }
}

/// Whether a policy can be had where so much CPU, in thousandths, is kept for the system: what has no CPUs of its own has
/// to run somewhere.
///
/// # Errors
/// If not.
pub fn check(policy: Policy, reserved: i64) -> anyhow::Result<()> {
    if policy == Policy::Static && reserved <= 0 {
        bail!(
            "--cpu-manager-policy static requires systemreserved.cpu + kubereserved.cpu to be greater than zero: give \
             --system-reserved or --kube-reserved, e.g. --system-reserved cpu=1"
        );
    }
    Ok(())
}

/// Moves containers to where they may run, whenever that changes, until it is told to stop.
pub async fn run(agent: Arc<Agent>, stop: CancellationToken) {
    if !agent.cpus.is_static() {
        return stop.cancelled().await;
    }
    let mut changed = agent.cpus.changed.subscribe();
    let mut applied: HashMap<String, CpuSet> = HashMap::new();
    let looped = async {
        loop {
            changed.mark_unchanged();
            let mut seen = HashMap::new();
            for (uid, pod) in agent.pleg.pods() {
                for container in pod.containers.iter().filter(|c| c.state == observed::State::Running) {
                    let Some(cpus) = agent.cpus.of_container(&uid, &container.name) else { continue };
                    let has = applied.remove(&container.id);
                    if has.as_ref() == Some(&cpus) {
                        seen.insert(container.id.clone(), cpus);
                        continue;
                    }
                    let resources =
                        cri::LinuxContainerResources { cpuset_cpus: cpus.to_string(), ..Default::default() };
                    match agent.cri.update_container(&container.id, resources).await {
                        Ok(()) => drop(seen.insert(container.id.clone(), cpus)),
                        // It may have ended meanwhile; if not, it is tried again.
                        Err(status) => tracing::info!(
                            container = container.name,
                            id = container.id,
                            "cannot move it to the CPUs {cpus}: {}",
                            status.message()
                        ),
                    }
                }
            }
            applied = seen;
            tokio::select! {
                Ok(()) = changed.changed() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    };
    stop.run_until_cancelled(looped).await;
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{topology::Place, *};

    fn machine(cpus: u32) -> Topology {
        Topology((0..cpus).map(|cpu| (cpu, Place { node: 0, socket: 0, core: cpu })).collect())
    }

    #[test]
    fn which_cpus_cgroups_can_have() {
        let directory = tempfile::tempdir().unwrap();
        let found = |v2: bool| allowed(&Cgroups::at(directory.path(), v2)).map(|cpus| cpus.to_string());
        assert_eq!((found(false), found(true)), (None, None));
        let (v1, v2) = (directory.path().join("cpuset/cpuset.cpus"), directory.path().join("cpuset.cpus.effective"));
        fs::create_dir(v1.parent().unwrap()).unwrap();
        fs::write(&v1, "1,3\n").unwrap();
        assert_eq!((found(false), found(true)), (Some("1,3".to_owned()), None));
        fs::write(&v2, "0-3\n").unwrap();
        assert_eq!((found(false), found(true)), (Some("1,3".to_owned()), Some("0-3".to_owned())));
        // Without the controller, and with what is not understood, nothing is known.
        for unknown in ["\n", "all\n"] {
            fs::write(&v2, unknown).unwrap();
            assert_eq!(found(true), None);
        }
    }

    #[test]
    fn what_is_kept_and_what_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = NodeConfig::for_tests();
        config.data_dir = directory.path().to_owned();
        let open =
            |config: &NodeConfig, cpus: u32| Cpus::of(config, machine(cpus)).map_err(|error| format!("{error:#}"));
        let refused = |config: &NodeConfig, cpus: u32, words: &str| {
            let said = open(config, cpus).err().unwrap();
            assert!(said.contains(words), "{said}");
        };
        let none = open(&config, 4).unwrap();
        let limits = json!({"cpu": "1", "memory": "1Mi"});
        let spec = json!({"containers": [{"name": "c", "resources": {"limits": limits, "requests": limits}}]});
        let pod: Pod = serde_json::from_value(json!({"metadata": {"uid": "p"}, "spec": spec})).unwrap();
        none.give(&pod).unwrap();
        assert_eq!(none.of_container("p", "c"), None);

        config.cpu_policy = Policy::Static;
        refused(&config, 4, "requires systemreserved.cpu + kubereserved.cpu to be greater than zero");
        config.reserved = "cpu=1100m".parse().unwrap();
        let differs =
            "configured policy \"static\" differs from state checkpoint policy \"none\": drain this node and delete";
        refused(&config, 4, differs);
        fs::remove_file(directory.path().join("cpus.json")).unwrap();
        refused(&config, 1, "2 CPUs are reserved, and this machine has only 0");
        let cpus = open(&config, 4).unwrap();
        let changed = cpus.changed.subscribe();
        cpus.give(&pod).unwrap();
        assert!(changed.has_changed().unwrap());
        drop(cpus);

        let again = open(&config, 4).unwrap();
        let of = |cpus: &Cpus, uid: &str| cpus.of_container(uid, "c").unwrap().to_string();
        assert_eq!((of(&again, "p"), of(&again, "q")), ("2".to_owned(), "0-1,3".to_owned()));
        assert!(again.has_own("p", None) && again.has_own("p", Some("c")));
        assert!(!again.has_own("p", Some("d")) && !again.has_own("q", None));
        refused(&config, 5, "current set of available CPUs \"0-4\" doesn't match with CPUs in state \"0-3\"");
        config.reserved = "cpu=3".parse().unwrap();
        refused(&config, 4, "not all reserved cpus: \"0-2\" are present in defaultCpuSet: \"0-1,3\"");
        again.release("p");
        assert_eq!(of(&open(&config, 4).unwrap(), "q"), "0-3");
    }
}
