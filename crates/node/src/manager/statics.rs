//! The part of the manager that sees to static pods and their mirrors ([`crate::static_pods`]).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{
    api::core::v1::{Pod, PodSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use tokio::{task::JoinSet, time::Instant};

use super::Manager;
use crate::{
    pod::{self, observed::Observed},
    static_pods::{
        self, Pods, full_name,
        mirror::{self, Mirror, Step},
    },
    worker::Input,
};

/// How soon a write about a mirror that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// What the manager knows of static pods.
#[derive(Default)]
pub(super) struct Statics {
    /// As the files say, by full name.
    files: Pods,
    /// The full names of those that have a worker, by uid. There is one of a name at a time.
    names: HashMap<String, String>,
    /// By full name.
    mirrors: BTreeMap<String, Arc<Pod>>,
    /// The API has said which mirrors there are.
    listed: bool,
    writes: JoinSet<(String, kube::Result<()>)>,
    busy: BTreeSet<String>,
    /// Not to be written about before.
    later: BTreeMap<String, Instant>,
}

/// A pod of which only its name and uid are known.
pub(super) fn remains(uid: &str, left: &Observed) -> Pod {
    let (namespace, name) = left.owner.clone();
    Pod {
        metadata: ObjectMeta {
            uid: Some(uid.to_owned()),
            namespace: Some(namespace),
            name: Some(name),
            ..Default::default()
        },
        spec: Some(PodSpec { termination_grace_period_seconds: left.grace, ..Default::default() }),
        status: None,
    }
}

impl Statics {
    /// Whether this uid is a static pod's, running or about to.
    pub(super) fn has(&self, uid: &str) -> bool {
        self.names.contains_key(uid) || self.files.values().any(|pod| pod::uid(pod) == uid)
    }

    /// Waits for what is under way, or for the time to try again.
    pub(super) async fn next(&mut self) {
        let later = self.later.values().min().copied();
        let wake = async {
            match later {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(done) = self.writes.join_next() => {
                match done {
                    Ok((name, result)) => {
                        self.busy.remove(&name);
                        if let Err(error) = result {
                            tracing::debug!(name, "cannot write the mirror of a static pod: {error}");
                        }
                        // What was written shows in a moment; if it does not, it is tried again.
                        self.later.insert(name, Instant::now() + RETRY);
                    }
                    Err(error) => {
                        tracing::error!("writing a mirror panicked: {error}");
                        self.busy.clear();
                    }
                }
            }
            () = wake => self.later.retain(|_, at| *at > Instant::now()),
        }
    }
}

impl Manager {
    /// The files have changed.
    pub(super) fn take_files(&mut self, files: Pods) {
        self.statics.files = files;
        let ended: Vec<String> = self
            .statics
            .names
            .iter()
            .filter(|(uid, name)| !self.is_current(uid, name))
            .map(|(uid, _)| uid.clone())
            .collect();
        ended.iter().for_each(|uid| self.gone(uid));
    }

    fn is_current(&self, uid: &str, name: &str) -> bool {
        self.statics.files.get(name).is_some_and(|pod| pod::uid(pod) == uid)
    }

    /// Takes in what the API says of a mirror. False if it is none.
    pub(super) fn take_mirror(&mut self, pod: &Arc<Pod>) -> bool {
        let Some(mirror) = Mirror::of(pod) else { return false };
        let name = full_name(pod);
        self.statics.later.remove(&name);
        if let Some(input) = self.inputs.get(&mirror.hash)
            && self.statics.names.get(&mirror.hash) == Some(&name)
        {
            input.send_modify(|input| input.mirror = Some(Arc::clone(pod)));
        }
        self.statics.mirrors.insert(name, Arc::clone(pod));
        true
    }

    /// A mirror is no more.
    pub(super) fn lose_mirror(&mut self, uid: &str) {
        let lost = self.statics.mirrors.iter().find(|(_, pod)| pod::uid(pod) == uid);
        let Some(name) = lost.map(|(name, _)| name.clone()) else { return };
        self.statics.later.remove(&name);
        if let Some(pod) = self.statics.mirrors.remove(&name)
            && let Some(input) = self.inputs.get(static_pods::mirror_hash(&pod))
        {
            input.send_modify(|input| input.mirror = None);
        }
    }

    /// After a listing: mirrors that are not in it are no more.
    pub(super) fn keep_mirrors(&mut self, listed: &HashSet<String>) {
        let lost = self.statics.mirrors.values().map(|pod| pod::uid(pod).to_owned());
        let lost: Vec<String> = lost.filter(|uid| !listed.contains(uid)).collect();
        lost.iter().for_each(|uid| self.lose_mirror(uid));
        self.statics.listed = true;
    }

    /// A worker has ended.
    pub(super) fn ended(&mut self, uid: &str) {
        self.statics.names.remove(uid);
    }

    /// Starts the static pods that have no worker, and brings mirrors up to date.
    pub(super) fn see_to_statics(&mut self) {
        let living: BTreeSet<String> = self.statics.names.values().cloned().collect();
        let waiting: Vec<(String, Arc<Pod>)> = self
            .statics
            .files
            .iter()
            .filter(|(name, _)| !living.contains(*name))
            .map(|(name, pod)| (name.clone(), Arc::clone(pod)))
            .collect();
        for (name, pod) in waiting {
            let uid = pod::uid(&pod).to_owned();
            // What an earlier life of ours left of an earlier version ends first.
            let owner = (pod::namespace(&pod).to_owned(), pod::name(&pod).to_owned());
            let left = self.agent.pleg.pods();
            let earlier =
                left.iter().find(|(u, seen)| **u != uid && seen.owner == owner && !self.inputs.contains_key(*u));
            if let Some((earlier, seen)) = earlier {
                self.statics.names.insert(earlier.clone(), name);
                let pod = Arc::new(remains(earlier, seen));
                self.start(earlier.clone(), Input { pod, gone: true, mirror: None, is_static: true });
                continue;
            }
            let mirror = self.statics.mirrors.get(&name).filter(|m| static_pods::mirror_hash(m) == uid).cloned();
            self.statics.names.insert(uid.clone(), name);
            self.start(uid, Input { pod, gone: false, mirror, is_static: true });
        }
        if self.statics.listed {
            self.write_mirrors();
        }
    }

    fn write_mirrors(&mut self) {
        let statics = &mut self.statics;
        let files = statics.files.iter().map(|(name, pod)| (name.clone(), pod::uid(pod).to_owned())).collect();
        let mirrors = statics.mirrors.iter().filter_map(|(name, pod)| Some((name.clone(), Mirror::of(pod)?))).collect();
        let living = statics.names.values().cloned().collect();
        for (name, step) in mirror::steps(&files, &mirrors, &living) {
            if statics.busy.contains(&name) || statics.later.contains_key(&name) {
                continue;
            }
            statics.busy.insert(name.clone());
            let (client, node) = (self.agent.client.clone(), self.agent.config.node_name.clone());
            let (pod, mirror) = (statics.files.get(&name).cloned(), statics.mirrors.get(&name).cloned());
            statics.writes.spawn(async move {
                let result = match (step, pod, mirror) {
                    (Step::Create, Some(pod), _) => mirror::create(client, &pod, &node).await,
                    (Step::Delete(uid), _, Some(old)) => {
                        mirror::delete(client, pod::namespace(&old), pod::name(&old), uid).await
                    }
                    _ => Ok(()),
                };
                (name, result)
            });
        }
    }
}
