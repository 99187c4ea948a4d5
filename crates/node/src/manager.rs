//! The pods of this node: one worker each, from the API's word, from files, and from what the runtime still holds.

mod statics;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    runtime::{WatchStreamExt, watcher},
};
use parking_lot::RwLock;
use seawall_client::watch::Backoff;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    Agent,
    pod::{self, observed::Observed},
    static_pods::{self, Pods},
    worker::{Input, Worker},
};

use self::statics::Statics;

struct Manager {
    agent: Arc<Agent>,
    shutdown: CancellationToken,
    inputs: HashMap<String, watch::Sender<Input>>,
    workers: JoinSet<String>,
    statics: Statics,
}

/// Follows the API and the files of static pods until shutdown.
pub async fn run(agent: Arc<Agent>, mut files: watch::Receiver<Pods>, shutdown: CancellationToken) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={}", agent.config.node_name));
    let api: Api<Pod> = Api::all(agent.client.clone());
    let mut events = watcher(api, config).backoff(Backoff::default()).into_stream().boxed();
    let mut manager = Manager {
        agent,
        shutdown: shutdown.clone(),
        inputs: HashMap::new(),
        workers: JoinSet::new(),
        statics: Statics::default(),
    };
    // They are known before the API lists pods: what neither knows is taken away.
    manager.take_files(files.borrow_and_update().clone());
    let mut listed: Option<HashSet<String>> = None;
    loop {
        manager.see_to_statics();
        tokio::select! {
            () = shutdown.cancelled() => break,
            Ok(()) = files.changed() => {
                let now = files.borrow_and_update().clone();
                manager.take_files(now);
            }
            () = manager.statics.next() => {}
            event = events.try_next() => match event {
                Ok(Some(watcher::Event::Init)) => listed = Some(HashSet::new()),
                Ok(Some(watcher::Event::InitApply(pod))) => {
                    if let Some(listed) = &mut listed {
                        listed.insert(pod::uid(&pod).to_owned());
                    }
                    manager.apply(pod);
                }
                Ok(Some(watcher::Event::InitDone)) => {
                    let listed = listed.take().unwrap_or_default();
                    manager.keep_mirrors(&listed);
                    manager.reconcile(&listed);
                    manager.agent.listed.send_replace(true);
                }
                Ok(Some(watcher::Event::Apply(pod))) => manager.apply(pod),
                Ok(Some(watcher::Event::Delete(pod))) => {
                    manager.lose_mirror(pod::uid(&pod));
                    manager.gone(pod::uid(&pod));
                }
                Ok(None) => break,
                Err(error) => tracing::warn!("watch pods: {error}"),
            },
            Some(ended) = manager.workers.join_next() => match ended {
                Ok(uid) => {
                    manager.inputs.remove(&uid);
                    manager.ended(&uid);
                    manager.agent.pods.write().remove(&uid);
                }
                // The pod's containers live on; a restart of the agent picks them up, and nothing less does.
                Err(error) => {
                    tracing::error!("a pod's worker panicked: {error}");
                    break;
                }
            },
        }
    }
    while manager.workers.join_next().await.is_some() {}
}

impl Manager {
    fn apply(&mut self, pod: Pod) {
        let mut pod = pod::lean(pod);
        // Where a pod comes from is what we say, and not what it says of itself.
        if static_pods::is_static(&pod) && static_pods::mirror_hash(&pod).is_empty() {
            pod.metadata.annotations.get_or_insert_default().insert(static_pods::SOURCE.into(), "api".into());
        }
        let pod = Arc::new(pod);
        if self.take_mirror(&pod) {
            return;
        }
        let uid = pod::uid(&pod).to_owned();
        if matches!(pod.status.as_ref().and_then(|s| s.phase.as_deref()), Some("Failed" | "Succeeded")) {
            self.agent.ledger.release(&uid);
        }
        match self.inputs.get(&uid) {
            Some(input) => input.send_modify(|i| i.pod = Arc::clone(&pod)),
            None => self.start(uid, Input { pod, gone: false, mirror: None, is_static: false }),
        }
    }

    fn gone(&mut self, uid: &str) {
        self.agent.ledger.release(uid);
        if let Some(input) = self.inputs.get(uid) {
            input.send_modify(|i| i.gone = true);
        }
    }

    /// After a listing: pods that we have and the API has not are gone. So are those that only the runtime, a
    /// directory or a cgroup still knows of; they get a worker too, which takes them away.
    fn reconcile(&mut self, listed: &HashSet<String>) {
        let missing = self.inputs.keys().filter(|uid| !listed.contains(*uid) && !self.statics.has(uid));
        let missing: Vec<String> = missing.cloned().collect();
        missing.iter().for_each(|uid| self.gone(uid));
        let mut orphans: HashMap<String, Arc<Observed>> = self.agent.pleg.pods();
        let directories = std::fs::read_dir(self.agent.config.data_dir.join("pods")).into_iter().flatten().flatten();
        let left = directories.filter_map(|d| d.file_name().into_string().ok());
        for uid in left.chain(self.agent.cgroups.pods().into_iter().map(|(_, uid)| uid)) {
            orphans.entry(uid).or_default();
        }
        for (uid, left) in orphans {
            if self.inputs.contains_key(&uid) || self.statics.has(&uid) {
                continue;
            }
            let (namespace, name) = &left.owner;
            tracing::info!(uid, namespace, name, "removing what is left of a pod that the API does not know");
            self.agent.ledger.release(&uid);
            let pod = Arc::new(statics::remains(&uid, &left));
            self.start(uid, Input { pod, gone: true, mirror: None, is_static: false });
        }
        // Whose pod ended while there was no agent.
        let is_here = |uid: &str| self.inputs.contains_key(uid) || self.statics.has(uid);
        self.agent.devices.retain(is_here);
        self.agent.cpus.retain(is_here);
    }

    fn start(&mut self, uid: String, input: Input) {
        let view = Arc::new(RwLock::new((Arc::clone(&input.pod), input.pod.status.clone().unwrap_or_default())));
        if !input.gone {
            self.agent.pods.write().insert(uid.clone(), Arc::clone(&view));
        }
        let (sender, receiver) = watch::channel(input);
        self.inputs.insert(uid.clone(), sender);
        let worker = Worker::new(Arc::clone(&self.agent), receiver, view);
        let shutdown = self.shutdown.clone();
        self.workers.spawn(async move {
            Box::pin(worker.run(shutdown)).await;
            uid
        });
    }
}
