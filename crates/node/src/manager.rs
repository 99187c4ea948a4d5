//! The pods of this node: one worker each, from the API's word and from what the runtime still holds.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::{
    api::core::v1::{Pod, PodSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
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
    worker::{Input, Worker},
};

struct Manager {
    agent: Arc<Agent>,
    shutdown: CancellationToken,
    inputs: HashMap<String, watch::Sender<Input>>,
    workers: JoinSet<String>,
}

/// Follows the API until shutdown.
pub async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={}", agent.config.node_name));
    let api: Api<Pod> = Api::all(agent.client.clone());
    let mut events = watcher(api, config).backoff(Backoff::default()).into_stream().boxed();
    let mut manager = Manager { agent, shutdown: shutdown.clone(), inputs: HashMap::new(), workers: JoinSet::new() };
    let mut listed: Option<HashSet<String>> = None;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            event = events.try_next() => match event {
                Ok(Some(watcher::Event::Init)) => listed = Some(HashSet::new()),
                Ok(Some(watcher::Event::InitApply(pod))) => {
                    if let Some(listed) = &mut listed {
                        listed.insert(pod::uid(&pod).to_owned());
                    }
                    manager.apply(pod);
                }
                Ok(Some(watcher::Event::InitDone)) => {
                    manager.reconcile(&listed.take().unwrap_or_default());
                    manager.agent.listed.send_replace(true);
                }
                Ok(Some(watcher::Event::Apply(pod))) => manager.apply(pod),
                Ok(Some(watcher::Event::Delete(pod))) => manager.gone(pod::uid(&pod)),
                Ok(None) => break,
                Err(error) => tracing::warn!("watch pods: {error}"),
            },
            Some(ended) = manager.workers.join_next() => match ended {
                Ok(uid) => {
                    manager.inputs.remove(&uid);
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
        let pod = Arc::new(pod);
        let uid = pod::uid(&pod).to_owned();
        match self.inputs.get(&uid) {
            Some(input) => input.send_modify(|i| i.pod = Arc::clone(&pod)),
            None => self.start(uid, Input { pod, gone: false }),
        }
    }

    fn gone(&mut self, uid: &str) {
        if let Some(input) = self.inputs.get(uid) {
            input.send_modify(|i| i.gone = true);
        }
    }

    /// After a listing: pods that we have and the API has not are gone. So are those that only the runtime, a
    /// directory or a cgroup still knows of; they get a worker too, which takes them away.
    fn reconcile(&mut self, listed: &HashSet<String>) {
        let missing: Vec<String> = self.inputs.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
        missing.iter().for_each(|uid| self.gone(uid));
        let mut orphans: HashMap<String, Arc<Observed>> = self.agent.pleg.pods();
        let directories = std::fs::read_dir(self.agent.config.data_dir.join("pods")).into_iter().flatten().flatten();
        let left = directories.filter_map(|d| d.file_name().into_string().ok());
        for uid in left.chain(self.agent.cgroups.pods().into_iter().map(|(_, uid)| uid)) {
            orphans.entry(uid).or_default();
        }
        for (uid, left) in orphans {
            if self.inputs.contains_key(&uid) {
                continue;
            }
            let (namespace, name) = left.owner.clone();
            tracing::info!(uid, namespace, name, "removing what is left of a pod that the API does not know");
            let pod = Pod {
                metadata: ObjectMeta {
                    uid: Some(uid.clone()),
                    namespace: Some(namespace),
                    name: Some(name),
                    ..Default::default()
                },
                spec: Some(PodSpec { termination_grace_period_seconds: left.grace, ..Default::default() }),
                status: None,
            };
            self.start(uid, Input { pod: Arc::new(pod), gone: true });
        }
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
