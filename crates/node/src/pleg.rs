//! The pod lifecycle event generator: a relist of the runtime every second, sooner after actions of our own, and at once
//! on the runtime's events where it has them (containerd 1.7 and newer). It tells each pod's worker what changed.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::Arc,
    time::Duration,
};

use k8s_cri::v1 as cri;
use parking_lot::Mutex;
use tokio::{
    sync::{Mutex as AsyncMutex, watch},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;

use crate::{
    cri::{Cri, annotation, label},
    pod::observed::{ContainerObs, Observed, SandboxObs, timestamp},
};

/// What is known of all pods in the runtime.
pub struct Pleg {
    cri: Cri,
    /// Held from the listing to its delivery: what is delivered is never older than what was.
    order: AsyncMutex<Cache>,
    subscribers: Mutex<HashMap<String, watch::Sender<Arc<Observed>>>>,
    known: watch::Sender<HashMap<String, Arc<Observed>>>,
}

#[derive(Default)]
struct Cache {
    containers: HashMap<(String, i32), ContainerObs>,
    sandboxes: HashMap<(String, i32), Vec<String>>,
}

impl Pleg {
    /// For this runtime.
    pub fn new(cri: Cri) -> Self {
        Self {
            cri,
            order: AsyncMutex::default(),
            subscribers: Mutex::default(),
            known: watch::channel(HashMap::new()).0,
        }
    }

    /// A pod's state in the runtime, from now on.
    pub fn subscribe(&self, uid: &str) -> watch::Receiver<Arc<Observed>> {
        let now = self.known.borrow().get(uid).cloned().unwrap_or_default();
        let mut subscribers = self.subscribers.lock();
        subscribers.entry(uid.to_owned()).or_insert_with(|| watch::channel(now).0).subscribe()
    }

    /// No one listens for this pod any more.
    pub fn unsubscribe(&self, uid: &str) {
        self.subscribers.lock().remove(uid);
    }

    /// All pods in the runtime, by uid.
    pub fn pods(&self) -> HashMap<String, Arc<Observed>> {
        self.known.borrow().clone()
    }

    /// Lists one pod, or all, and tells those whom it concerns.
    pub async fn relist(&self, uid: Option<&str>) -> Result<(), tonic::Status> {
        let mut cache = self.order.lock().await;
        let (sandboxes, containers) = tokio::try_join!(self.cri.sandboxes(uid), self.cri.containers(uid))?;
        let mut pods: HashMap<String, Observed> = HashMap::new();
        let mut alive: HashSet<(String, i32)> = HashSet::new();
        for sandbox in sandboxes {
            let Some(pod_uid) = sandbox.labels.get(label::POD_UID).cloned() else { continue };
            let key = (sandbox.id.clone(), sandbox.state);
            let ips = match cache.sandboxes.get(&key) {
                Some(ips) => ips.clone(),
                None => {
                    let Some(status) = self.cri.sandbox_status(&sandbox.id, false).await?.and_then(|s| s.status) else {
                        continue;
                    };
                    let network = status.network.unwrap_or_default();
                    let more = network.additional_ips.into_iter().map(|ip| ip.ip);
                    let ips: Vec<String> =
                        std::iter::once(network.ip).chain(more).filter(|ip| !ip.is_empty()).collect();
                    cache.sandboxes.insert(key.clone(), ips.clone());
                    ips
                }
            };
            alive.insert(key);
            let pod = pods.entry(pod_uid).or_default();
            let label = |key: &str| sandbox.labels.get(key).cloned().unwrap_or_default();
            pod.owner = (label(label::POD_NAMESPACE), label(label::POD_NAME));
            pod.sandboxes.push(SandboxObs {
                ready: sandbox.state == cri::PodSandboxState::SandboxReady as i32,
                attempt: sandbox.metadata.as_ref().map_or(0, |m| m.attempt),
                created: timestamp(sandbox.created_at).unwrap_or(jiff::Timestamp::UNIX_EPOCH),
                id: sandbox.id,
                ips,
            });
        }
        for container in containers {
            let Some(pod_uid) = container.labels.get(label::POD_UID).cloned() else { continue };
            let key = (container.id.clone(), container.state);
            if !cache.containers.contains_key(&key) {
                let Some(status) = self.cri.container_status(&container.id).await? else { continue };
                let message = termination_message(&status).await;
                let observed = ContainerObs::from_cri(&status, &container.pod_sandbox_id, message);
                // The state may have moved on since the listing: remember it as what it is now.
                cache.containers.insert((container.id.clone(), status.state), observed.clone());
                cache.containers.insert(key.clone(), observed);
            }
            if let Some(observed) = cache.containers.get(&key) {
                let pod = pods.entry(pod_uid).or_default();
                pod.grace = pod.grace.or(observed.grace);
                pod.containers.push(observed.clone());
            }
            alive.insert(key);
        }
        for pod in pods.values_mut() {
            pod.sandboxes.sort_by_key(|s| std::cmp::Reverse((s.attempt, s.created)));
            pod.containers.sort_by_key(|c| std::cmp::Reverse((c.created, c.restart_count)));
        }
        if uid.is_none() {
            cache.containers.retain(|key, _| alive.contains(key));
            cache.sandboxes.retain(|key, _| alive.contains(key));
        }
        self.deliver(uid, pods);
        Ok(())
    }

    fn deliver(&self, only: Option<&str>, pods: HashMap<String, Observed>) {
        let subscribers = self.subscribers.lock();
        self.known.send_modify(|known| {
            match only {
                Some(uid) => drop(known.remove(uid)),
                None => known.retain(|uid, _| pods.contains_key(uid)),
            }
            for (uid, pod) in pods {
                match known.get(&uid) {
                    Some(old) if **old == pod => {}
                    _ => drop(known.insert(uid, Arc::new(pod))),
                }
            }
            for (uid, sender) in subscribers.iter().filter(|(uid, _)| only.is_none_or(|o| o == *uid)) {
                let now = known.get(uid).cloned().unwrap_or_default();
                sender.send_if_modified(|old| {
                    let changed = **old != *now;
                    *old = now;
                    changed
                });
            }
        });
    }

    /// Relists until shutdown.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut events = None;
        let mut try_events = true;
        loop {
            if try_events && events.is_none() {
                match self.cri.events().await {
                    Ok(stream) => events = Some(stream),
                    Err(status) if status.code() == tonic::Code::Unimplemented => try_events = false,
                    Err(_) => {}
                }
            }
            let event = async {
                match &mut events {
                    Some(stream) => stream.message().await,
                    None => std::future::pending().await,
                }
            };
            let result = tokio::select! {
                () = shutdown.cancelled() => return,
                _ = tick.tick() => self.relist(None).await,
                event = event => match event {
                    Ok(Some(event)) => {
                        let uid = event.pod_sandbox_status.and_then(|s| s.metadata).map(|m| m.uid).filter(|u| !u.is_empty());
                        self.relist(uid.as_deref()).await
                    }
                    Ok(None) => {
                        events = None;
                        Ok(())
                    }
                    Err(status) => {
                        try_events = status.code() != tonic::Code::Unimplemented;
                        events = None;
                        Ok(())
                    }
                },
            };
            if let Err(status) = result {
                tracing::warn!("cannot list the runtime's containers: {}", status.message());
            }
        }
    }
}

/// The largest termination message that is kept.
const MESSAGE_LIMIT: usize = 4096;

/// What a container left as its last words: its message file, or the end of its log if the policy says so.
/// <https://kubernetes.io/docs/tasks/debug/debug-application/determine-reason-pod-failure/>
async fn termination_message(status: &cri::ContainerStatus) -> String {
    if status.state != cri::ContainerState::ContainerExited as i32 {
        return String::new();
    }
    if let Some(file) = status.annotations.get(annotation::TERMINATION_MESSAGE)
        && let Ok(content) = tokio::fs::read(file).await
        && !content.is_empty()
    {
        return String::from_utf8_lossy(&content[..content.len().min(MESSAGE_LIMIT)]).into_owned();
    }
    let from_log = status.annotations.get(annotation::TERMINATION_POLICY).is_some_and(|p| p == "FallbackToLogsOnError");
    if !from_log || status.exit_code == 0 {
        return String::new();
    }
    crate::api::logs::tail(Path::new(&status.log_path), 80, 2048).await.unwrap_or_default()
}
