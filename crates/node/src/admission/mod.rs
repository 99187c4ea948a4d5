//! What pods have been given of the node, and whether another one fits beside them, or one that wants more.
//!
//! A pod is asked for once: what it was given stands in a file of its own ([`Kept`]), so that a restart of the agent
//! asks nobody anew. It counts until its containers are over, or the API knows it no more.
//!
//! <https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/>, KEP-1287

pub mod fit;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use self::fit::{Node, Refusal, Taken, shown};
use crate::{
    Agent, node_status,
    pod::{
        self,
        resize::{Given, Pending},
    },
    volume,
};

/// What has been given to a pod, as it stands on the disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// To its containers.
    #[serde(flatten)]
    pub given: Given,
    /// Altogether.
    pub taken: Taken,
}

impl Kept {
    fn file(data: &Path, uid: &str) -> PathBuf {
        volume::pod_directory(data, uid).join("resources.json")
    }

    /// What a pod was given before the agent was started; `None` if it is new.
    pub fn read(data: &Path, uid: &str) -> Option<Kept> {
        let file = Kept::file(data, uid);
        let bytes = fs::read(&file).ok()?;
        let read = serde_json::from_slice(&bytes);
        read.inspect_err(|error| tracing::warn!("{} cannot be read: {error}", file.display())).ok()
    }

    /// Writes it down.
    pub fn write(&self, data: &Path, uid: &str) -> io::Result<()> {
        let file = Kept::file(data, uid);
        let unfinished = file.with_extension("new");
        fs::create_dir_all(volume::pod_directory(data, uid))?;
        fs::write(&unfinished, serde_json::to_vec(self)?)?;
        fs::rename(unfinished, file)
    }
}

/// The node as it is known now; before the API has said anything, as it will be registered.
pub fn node(agent: &Agent) -> Node {
    let known = agent.node.borrow().clone();
    let mut allocatable = agent.allocatable.milli.clone();
    allocatable.insert("pods".to_owned(), i64::from(agent.config.max_pods) * 1000);
    Node {
        name: agent.config.node_name.clone(),
        labels: match &known {
            Some(node) => node.metadata.labels.clone().unwrap_or_default(),
            None => node_status::labels(&agent.config),
        },
        taints: known.and_then(|node| node.spec.clone()?.taints).unwrap_or_default(),
        allocatable,
    }
}

/// Who has been given what, by uid.
pub struct Ledger {
    taken: Mutex<BTreeMap<String, Taken>>,
    /// Changes when something becomes free.
    freed: watch::Sender<u64>,
}

impl Ledger {
    /// With the pods that were given something before the agent was started.
    pub fn open(data: &Path) -> Ledger {
        let directories = fs::read_dir(data.join("pods")).into_iter().flatten().flatten();
        let uids = directories.filter_map(|directory| directory.file_name().into_string().ok());
        let taken = uids.filter_map(|uid| Kept::read(data, &uid).map(|kept| (uid, kept.taken)));
        Ledger { taken: Mutex::new(taken.collect()), freed: watch::channel(0).0 }
    }

    /// Told when something becomes free.
    pub fn freed(&self) -> watch::Receiver<u64> {
        self.freed.subscribe()
    }

    /// Counts a pod that is there already.
    pub fn keep(&self, uid: &str, taken: Taken) {
        self.taken.lock().insert(uid.to_owned(), taken);
    }

    /// Gives a new pod what it needs, or says everything that speaks against that.
    pub fn admit(&self, pod: &Pod, taken: &Taken, node: &Node) -> Result<(), Vec<Refusal>> {
        let mut all = self.taken.lock();
        let others: Vec<&Taken> = all.iter().filter(|(uid, _)| *uid != pod::uid(pod)).map(|(_, taken)| taken).collect();
        let refusals = fit::refusals(pod, taken, node, &others);
        if !refusals.is_empty() {
            return Err(refusals);
        }
        all.insert(pod::uid(pod).to_owned(), taken.clone());
        Ok(())
    }

    /// Gives a pod that is there what it needs now, or says why that has to wait or cannot be.
    pub fn resize(&self, uid: &str, taken: &Taken, node: &Node) -> Result<(), Pending> {
        let mut all = self.taken.lock();
        for name in ["memory", "cpu"] {
            let of = |list: &BTreeMap<String, i64>| list.get(name).copied().unwrap_or(0);
            let (requested, capacity) = (of(&taken.requests), of(&node.allocatable));
            if requested > capacity {
                let [requested, capacity] = [requested, capacity].map(|value| shown(name, value));
                let what = format!("{name}, requested: {requested}, capacity: {capacity}");
                return Err(("Infeasible", format!("Node didn't have enough capacity: {what}")));
            }
        }
        let others: Vec<&Taken> = all.iter().filter(|(other, _)| *other != uid).map(|(_, taken)| taken).collect();
        // A pod that was let in when there was less to be had is not kept from giving something back.
        let less = |taken: &Taken, had: Option<&Taken>| {
            let had = had.map(|had| &had.requests);
            taken.requests.iter().all(|(name, now)| had.and_then(|had| had.get(name)).is_some_and(|had| now <= had))
        };
        if !less(taken, all.get(uid))
            && let Some(refusal) = fit::short(taken, node, &others).first()
        {
            return Err(("Deferred", refusal.message()));
        }
        if all.insert(uid.to_owned(), taken.clone()).as_ref() != Some(taken) {
            self.freed.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    /// A pod needs nothing any more.
    pub fn release(&self, uid: &str) {
        if self.taken.lock().remove(uid).is_some() {
            self.freed.send_modify(|count| *count += 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(uid: &str, cpu: &str) -> (Pod, Taken) {
        let resources = json!({"requests": {"cpu": cpu}});
        let spec = json!({"containers": [{"name": "a", "resources": resources}]});
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": uid, "uid": uid}, "spec": spec})).unwrap();
        let taken = Taken::by(pod.spec.as_ref().unwrap());
        (pod, taken)
    }

    #[test]
    fn who_gets_what() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(directory.path());
        let allocatable = [("cpu".to_owned(), 2000), ("pods".to_owned(), 9000)].into();
        let node = Node { allocatable, ..Default::default() };
        let admit = |uid: &str, cpu: &str| {
            let (pod, taken) = pod(uid, cpu);
            ledger.admit(&pod, &taken, &node).map_err(|refusals| refusals[0].reason())
        };
        let resize = |uid: &str, cpu: &str| {
            ledger.resize(uid, &pod(uid, cpu).1, &node).map_err(|(reason, message)| format!("{reason}: {message}"))
        };
        assert_eq!(admit("a", "1"), Ok(()));
        assert_eq!(admit("b", "500m"), Ok(()));
        assert_eq!(admit("c", "1"), Err("OutOfcpu".to_owned()));
        assert_eq!(resize("a", "1500m"), Ok(()));
        let full = "Deferred: Node didn't have enough resource: cpu, requested: 600, used: 1500, capacity: 2000";
        assert_eq!(resize("b", "600m"), Err(full.to_owned()));
        let never = "Infeasible: Node didn't have enough capacity: cpu, requested: 3000, capacity: 2000";
        assert_eq!(resize("b", "3"), Err(never.to_owned()));
        let freed = ledger.freed();
        assert_eq!(resize("a", "1400m"), Ok(()));
        assert!(freed.has_changed().unwrap());
        assert_eq!(resize("b", "600m"), Ok(()));
        ledger.release("a");
        assert_eq!(admit("c", "1"), Ok(()));
        // More is used than there is: giving back is always right.
        ledger.keep("d", pod("d", "4").1);
        assert_eq!(resize("b", "500m"), Ok(()));
    }

    #[test]
    fn what_was_given_is_known_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let (first, taken) = pod("a", "2");
        assert_eq!(Kept::read(directory.path(), "a"), None);
        let mut kept = Kept { taken, ..Default::default() };
        kept.given.allocated = pod::resize::desired(first.spec.as_ref().unwrap());
        kept.write(directory.path(), "a").unwrap();
        assert_eq!(Kept::read(directory.path(), "a"), Some(kept));
        let node =
            Node { allocatable: [("cpu".to_owned(), 2000), ("pods".to_owned(), 9000)].into(), ..Default::default() };
        let (second, taken) = pod("b", "1");
        assert!(Ledger::open(directory.path()).admit(&second, &taken, &node).is_err());
        fs::write(Kept::file(directory.path(), "a"), "{").unwrap();
        assert_eq!(Kept::read(directory.path(), "a"), None);
    }
}
