//! What a pod gets for itself comes from NUMA nodes that are near to each other: upstream's topology manager (KEP-693).
//!
//! Whoever gives something out says from which nodes it could come ([`hints`]); that is put together, and the policy says
//! whether it will do ([`merge`]). Then it is given out from there. All of this happens when a pod is let in, one pod after
//! the other: what is free for one is not for the next. What a pod has, it keeps.
//!
//! <https://kubernetes.io/docs/tasks/administer-cluster/topology-manager/>

pub mod hints;
pub mod mask;
pub mod merge;
pub mod nodes;
pub mod settings;

use std::path::Path;

use k8s_openapi::api::core::v1::Pod;

use self::{
    hints::Hint,
    mask::Mask,
    merge::{Unaligned, decide},
    nodes::Nodes,
    settings::{Policy, Scope, Settings},
};
use crate::{cpus::Cpus, devices::Devices, pod::containers};

/// Where the kernel says what the machine is made of.
pub const SYSTEM: &str = "/sys/devices/system";

/// Why nothing can be near to anything on this machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its nodes are not known.
    #[error("cannot discover NUMA topology")]
    Unknown(#[from] nodes::Error),
    /// It has too many.
    #[error(
        "--topology-manager-policy {policy} is unsupported on machines with more than {most} NUMA Nodes, and this one has \
         {count}: give the policy none, or up to {limit} nodes --topology-manager-policy-options \
         max-allowable-numa-nodes={count}"
    )]
    TooMany {
        /// What is wanted.
        policy: Policy,
        /// How many nodes there are.
        count: u32,
        /// How many there may be.
        most: u32,
        /// How many there may be if that is said.
        limit: u32,
    },
}

/// Why a pod does not get what it is to have for itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It does not come from where the policy wants it to.
    #[error(transparent)]
    Unaligned(#[from] Unaligned),
    /// Whoever gives it out does not.
    #[error("Allocate failed due to {0}, which is unexpected")]
    NotGiven(String),
}

impl Refusal {
    /// The reason in the pod's status, as upstream's.
    pub fn reason(&self) -> &'static str {
        match self {
            Refusal::Unaligned(_) => "TopologyAffinityError",
            Refusal::NotGiven(_) => "UnexpectedAdmissionError",
        }
    }
}

/// Sees to it that what pods get is near to each other.
pub struct Manager {
    settings: Settings,
    nodes: Nodes,
}

impl Manager {
    /// For the machine that is described below `system`, which is [`SYSTEM`].
    ///
    /// # Errors
    /// If the policy cannot be kept there.
    pub fn open(settings: Settings, system: &Path) -> Result<Manager, Error> {
        let nodes = match settings.policy {
            Policy::None => Nodes::default(),
            _ => Nodes::detect(system, settings.options.prefer_closest)?,
        };
        settings.check(&nodes)?;
        Ok(Manager { settings, nodes })
    }

    /// Whether a pod has to wait for its turn until it has what it is to have for itself.
    pub fn concerns(&self, cpus: &Cpus, devices: &Devices, pod: &Pod) -> bool {
        let has_devices = pod.spec.as_ref().is_some_and(|spec| devices.concerns(spec));
        has_devices || self.settings.policy != Policy::None && cpus.concerns(pod)
    }

    /// Gives the containers of a pod the CPUs and devices that they are to have for themselves, and do not have yet.
    ///
    /// # Errors
    /// Why not. What it has got until then has to be taken back.
    pub async fn give(&self, cpus: &Cpus, devices: &Devices, pod: &Pod) -> Result<(), Refusal> {
        let Some(spec) = &pod.spec else { return Ok(()) };
        let turn = devices.turn().await;
        let decide = |hints: [Vec<Vec<Hint>>; 2]| decide(&self.settings, &self.nodes, &hints.concat());
        let scope = Some(self.settings.scope).filter(|_| self.settings.policy != Policy::None);
        let of_pod: Option<Mask> = match scope {
            Some(Scope::Pod) => decide([cpus.pod_hints(pod), devices.pod_hints(self.nodes.all, pod)])?,
            _ => None,
        };
        for one in containers(spec) {
            let affinity = match scope {
                Some(Scope::Container) => decide([cpus.hints(pod, one), devices.hints(self.nodes.all, pod, one)])?,
                _ => of_pod,
            };
            cpus.give_one(pod, one, affinity).map_err(Refusal::NotGiven)?;
            devices.give_one(&turn, pod, one, affinity).await.map_err(Refusal::NotGiven)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::{settings::Options, *};
    use crate::{NodeConfig, cpus, cpus::topology::Topology};

    /// A machine of two nodes, with CPUs 0 to 3 and 4 to 7; CPU 0 is reserved.
    struct Machine {
        directory: TempDir,
        cpus: Cpus,
        devices: Devices,
    }

    impl Machine {
        fn new() -> Machine {
            let directory = tempfile::tempdir().unwrap();
            let system = directory.path().join("system");
            let write = |file: &str, text: &str| {
                let path = system.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            };
            write("cpu/online", "0-7\n");
            write("node/online", "0-1\n");
            write("node/node0/cpulist", "0-3\n");
            write("node/node1/cpulist", "4-7\n");
            let mut config = NodeConfig::for_tests();
            config.data_dir = directory.path().to_owned();
            config.cpu_policy = cpus::Policy::Static;
            config.reserved = "cpu=1".parse().unwrap();
            let cpus = Cpus::of(&config, Topology::detect(&system, None).unwrap()).unwrap();
            let devices = Devices::open(directory.path(), &directory.path().join("plugins")).unwrap().0;
            Machine { directory, cpus, devices }
        }

        fn manager(&self, policy: Policy, scope: Scope) -> Manager {
            let settings = Settings { policy, scope, options: Options::default() };
            Manager::open(settings, &self.directory.path().join("system")).unwrap()
        }

        /// Gives a pod CPUs for its containers, and says which; or what is said of it.
        async fn give(&self, manager: &Manager, uid: &str, counts: &[u32]) -> Result<String, String> {
            let container = |(number, count): (usize, &u32)| -> Value {
                let amounts = json!({"cpu": count, "memory": "1Mi"});
                json!({"name": number.to_string(), "resources": {"limits": amounts, "requests": amounts}})
            };
            let containers: Vec<Value> = counts.iter().enumerate().map(container).collect();
            let pod = json!({"metadata": {"name": uid, "uid": uid}, "spec": {"containers": containers}});
            let pod: Pod = serde_json::from_value(pod).unwrap();
            if let Err(why) = manager.give(&self.cpus, &self.devices, &pod).await {
                self.cpus.release(uid);
                return Err(format!("{}: {why}", why.reason()));
            }
            let of = |number: usize| self.cpus.of_container(uid, &number.to_string()).unwrap().to_string();
            Ok((0..counts.len()).map(of).collect::<Vec<_>>().join(" "))
        }
    }

    const UNALIGNED: &str = "TopologyAffinityError: Resources cannot be allocated with Topology locality";

    #[tokio::test]
    async fn one_node_for_each_container() {
        let machine = Machine::new();
        let manager = machine.manager(Policy::SingleNumaNode, Scope::Container);
        let refused = || Err(UNALIGNED.to_owned());
        assert_eq!(machine.give(&manager, "a", &[4]).await, Ok("4-7".to_owned()));
        assert_eq!(machine.give(&manager, "b", &[4]).await, refused(), "there are three, since one is reserved");
        machine.cpus.release("a");
        // Without a policy these would come from where least is left.
        assert_eq!(machine.give(&manager, "c", &[1, 3, 1]).await, Ok("1 4-6 2".to_owned()));
        assert_eq!(machine.give(&manager, "d", &[2]).await, refused(), "there is one on each");
        // Who has something keeps it, and the same is said of it again.
        assert_eq!(machine.give(&manager, "c", &[1, 3, 1]).await, Ok("1 4-6 2".to_owned()));
        let none = machine.manager(Policy::None, Scope::Container);
        assert_eq!(machine.give(&none, "d", &[2]).await, Ok("3,7".to_owned()));
        let short = "UnexpectedAdmissionError: Allocate failed due to not enough cpus available to satisfy request: \
                     requested=1, available=0, which is unexpected";
        assert_eq!(machine.give(&none, "e", &[1]).await, Err(short.to_owned()));
        let best_effort = machine.manager(Policy::BestEffort, Scope::Pod);
        assert_eq!(machine.give(&best_effort, "e", &[1]).await, Err(short.to_owned()));
        assert_eq!(machine.give(&manager, "e", &[1]).await, refused());
    }

    #[tokio::test]
    async fn one_node_for_each_pod() {
        let machine = Machine::new();
        let manager = |policy: Policy| machine.manager(policy, Scope::Pod);
        let single = manager(Policy::SingleNumaNode);
        assert_eq!(machine.give(&single, "a", &[3, 2]).await, Err(UNALIGNED.to_owned()), "it needs two");
        assert_eq!(machine.give(&single, "a", &[1, 3]).await, Ok("4 5-7".to_owned()));
        machine.cpus.release("a");
        // Two nodes are as few as it can have.
        let restricted = manager(Policy::Restricted);
        assert_eq!(machine.give(&restricted, "b", &[3, 2]).await, Ok("1-3 4-5".to_owned()));
        assert_eq!(machine.give(&restricted, "c", &[1, 1]).await, Ok("6 7".to_owned()));
        machine.cpus.release("b");
        machine.cpus.release("c");
        assert_eq!(machine.give(&restricted, "one", &[1]).await, Ok("1".to_owned()));
        assert_eq!(machine.give(&restricted, "d", &[2]).await, Ok("2-3".to_owned()));
        assert_eq!(machine.give(&restricted, "e", &[3]).await, Ok("4-6".to_owned()));
        machine.cpus.release("d");
        // One would do, but others have too much of each.
        assert_eq!(machine.give(&restricted, "f", &[1, 2]).await, Err(UNALIGNED.to_owned()));
        assert_eq!(machine.give(&manager(Policy::BestEffort), "f", &[1, 2]).await, Ok("7 2-3".to_owned()));
    }

    #[test]
    fn whom_it_concerns() {
        let machine = Machine::new();
        let limits = json!({"cpu": "1", "memory": "1Mi"});
        let pod = |limits: Value| -> Pod {
            let container = json!({"name": "c", "resources": {"limits": limits}});
            serde_json::from_value(json!({"metadata": {"uid": "p"}, "spec": {"containers": [container]}})).unwrap()
        };
        let concerns = |policy: Policy, limits: Value| {
            machine.manager(policy, Scope::Container).concerns(&machine.cpus, &machine.devices, &pod(limits))
        };
        assert!(concerns(Policy::BestEffort, limits.clone()) && !concerns(Policy::None, limits));
        assert!(!concerns(Policy::BestEffort, json!({"memory": "1Mi"})));
    }
}
