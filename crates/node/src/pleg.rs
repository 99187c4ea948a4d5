//! The pod lifecycle event generator: it looks at a pod when the runtime says that something has happened to it and after
//! actions of our own, and at all of them every ten seconds; every second if the runtime has no events. It tells each pod's
//! worker what changed.

mod source;

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
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use self::source::{Due, Heard, Source};
pub use self::source::{Envelope, SubscribeRequest};
use crate::{
    cri::{Cri, annotation, label},
    pod::observed::{ContainerObs, Observed, SandboxObs, timestamp},
};

/// How long after a listing of everything the next one is, and the same if the runtime says what happens: it may lose
/// something.
const PERIOD: Duration = Duration::from_secs(1);
const PERIOD_WITH_EVENTS: Duration = Duration::from_secs(10);

/// What is known of all pods in the runtime.
pub struct Pleg {
    cri: Cri,
    /// Whether the node's first address, and so the pods', is one of IPv6.
    ipv6_first: bool,
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
    pub fn new(cri: Cri, ipv6_first: bool) -> Self {
        Self {
            cri,
            ipv6_first,
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
                    let mut ips: Vec<String> =
                        std::iter::once(network.ip).chain(more).filter(|ip| !ip.is_empty()).collect();
                    // The runtime puts IPv4 first, the API the family of the node.
                    ips.sort_by_key(|ip| ip.contains(':') != self.ipv6_first);
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
        let (mut source, mut due) = (Source::new(self.cri.clone()), Due::default());
        source.open();
        let (mut listed, mut failed) = (Instant::now(), false);
        loop {
            let all = listed + if source.is_open() && !failed { PERIOD_WITH_EVENTS } else { PERIOD };
            let next = due.next().map_or(all, |one| one.min(all));
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                heard = source.next() => match heard {
                    Some(Heard::Pod(uid)) => due.heard(Some(uid), Instant::now(), 1),
                    // Its uid is not known if it is new: then anybody may be meant.
                    Some(Heard::Container(id)) => due.heard(self.owner(&id), Instant::now(), usize::MAX),
                    Some(Heard::Nothing) => {}
                    // It is opened again with the next listing, which is due by now or within a second.
                    None => {}
                },
                () = tokio::time::sleep_until(next) => {
                    let now = Instant::now();
                    let of = due.take(now).unwrap_or(None);
                    if of.is_none() {
                        listed = now;
                        source.open();
                    }
                    let result = self.relist(of.as_deref()).await;
                    failed = result.is_err();
                    if let Err(status) = result {
                        tracing::warn!("cannot list the runtime's containers: {}", status.message());
                    }
                }
            }
        }
    }

    /// The uid of the pod to which a container or sandbox belongs.
    fn owner(&self, id: &str) -> Option<String> {
        let known = self.known.borrow();
        let is_of = |pod: &Observed| {
            pod.sandboxes.iter().any(|sandbox| sandbox.id == id) || pod.containers.iter().any(|one| one.id == id)
        };
        known.iter().find(|(_, pod)| is_of(pod)).map(|(uid, _)| uid.clone())
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
