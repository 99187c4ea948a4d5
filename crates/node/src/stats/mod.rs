//! What the node, its pods and their containers use: measured from cgroups every ten seconds, and told as upstream's
//! kubelet tells it (`/stats/summary`, `/metrics/resource`, `/metrics/cadvisor`).
//!
//! <https://kubernetes.io/docs/reference/instrumentation/node-metrics/>

pub mod read;
pub mod series;
pub mod summary;
pub mod text;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use parking_lot::RwLock;
use tokio::{
    sync::Mutex as AsyncMutex,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use self::{
    read::{Disk, Interface, Taken, Throttled, Usage},
    series::{Measured, Sample, Series},
};
use crate::{
    Agent,
    pod::{self, observed::State, qos},
};

/// How often groups are looked at.
pub const PERIOD: Duration = Duration::from_secs(10);
/// How long what was counted on disks is good enough: it means going through all files.
const DISKS_FOR: Duration = Duration::from_secs(60);

/// What is measured.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Machine,
    /// By uid.
    Pod(String),
    /// By id.
    Container(String),
}

/// What pods have on the node's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodDisks {
    /// By container: what it has written beside its image.
    pub layers: HashMap<String, Taken>,
    /// By container.
    pub logs: HashMap<String, Taken>,
    /// By volume, those that are kept on the node's disk.
    pub volumes: HashMap<String, Taken>,
}

impl PodDisks {
    /// All of it: what counts as the pod's ephemeral storage.
    pub fn sum(&self) -> Taken {
        let all = self.layers.values().chain(self.logs.values()).chain(self.volumes.values());
        all.fold(Taken::default(), |sum, taken| sum + *taken)
    }
}

/// By the pods' uids.
pub type Disks = HashMap<String, PodDisks>;

/// Keeps what was measured.
#[derive(Default)]
pub struct Sampler {
    series: RwLock<HashMap<Key, Series>>,
    disks: AsyncMutex<Option<(Instant, Arc<Disks>)>>,
}

/// A running container, as it is told.
#[derive(Clone, Debug)]
pub struct ContainerNow {
    /// Its name in the pod.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Its image.
    pub image: String,
    /// When it started.
    pub started: Option<Timestamp>,
    /// Its group.
    pub measured: Option<Measured>,
    /// Its group's path.
    pub group: String,
    /// How often it had to wait.
    pub throttled: Option<Throttled>,
}

/// A pod, as it is told.
#[derive(Clone, Debug)]
pub struct PodNow {
    /// The pod.
    pub pod: Arc<Pod>,
    /// When the agent began with it.
    pub started: Option<Timestamp>,
    /// Its group.
    pub measured: Option<Measured>,
    /// Its group's path.
    pub group: String,
    /// What went through its network; nothing of a pod on the node's network.
    pub network: Option<Vec<Interface>>,
    /// Processes and threads.
    pub processes: Option<u64>,
    /// Those that run.
    pub containers: Vec<ContainerNow>,
}

/// Everything that is known at one moment.
#[derive(Clone, Debug)]
pub struct Now {
    /// The node's name.
    pub node: String,
    /// When.
    pub at: Timestamp,
    /// The whole machine.
    pub machine: Option<Measured>,
    /// Its network.
    pub network: Vec<Interface>,
    /// Its disk.
    pub disk: Option<Disk>,
    /// What images take of it.
    pub images: Option<Taken>,
    /// The highest number of a process, and how many there are.
    pub processes: Option<(u64, u64)>,
    /// By namespace and name.
    pub pods: Vec<PodNow>,
    /// What pods have on the disk.
    pub disks: Arc<Disks>,
}

impl Sampler {
    fn look(&self, key: Key, usage: Option<Usage>, at: Timestamp, steady: Instant) {
        let Some(usage) = usage else { return };
        let sample = Sample { at, steady, usage };
        let mut series = self.series.write();
        match series.get_mut(&key) {
            Some(known) => known.add(sample),
            None => drop(series.insert(key, Series::new(sample))),
        }
    }

    fn measured(&self, key: &Key) -> Option<Measured> {
        self.series.read().get(key).map(Series::measured)
    }

    /// What a pod's group used when it was looked at last.
    pub fn of_pod(&self, uid: &str) -> Option<Measured> {
        self.measured(&Key::Pod(uid.to_owned()))
    }

    /// What the machine used when it was looked at last.
    pub fn of_machine(&self) -> Option<Measured> {
        self.measured(&Key::Machine)
    }
}

/// The pods that are here, with their groups, by namespace and name.
fn pods(agent: &Agent) -> Vec<(String, Arc<Pod>, String, Option<Timestamp>)> {
    let mut found: Vec<_> = agent
        .pods
        .read()
        .iter()
        .map(|(uid, view)| {
            let view = view.read();
            let group = agent.cgroups.pod_path(qos::class(&view.0), uid);
            (uid.clone(), Arc::clone(&view.0), group, view.1.start_time.as_ref().map(|t| t.0))
        })
        .collect();
    found.sort_by(|a, b| (pod::namespace(&a.1), pod::name(&a.1)).cmp(&(pod::namespace(&b.1), pod::name(&b.1))));
    found
}

/// Looks at all groups until shutdown.
pub async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        let agent = Arc::clone(&agent);
        // Some hundred small files: not long, but they are files.
        let looked = tokio::task::spawn_blocking(move || look(&agent)).await;
        if let Err(error) = looked {
            tracing::error!("looking at what pods use panicked: {error}");
        }
    }
}

fn look(agent: &Agent) {
    let (at, steady) = (Timestamp::now(), Instant::now());
    agent.stats.look(Key::Machine, read::machine(), at, steady);
    let observed = agent.pleg.pods();
    for (uid, _, group, _) in pods(agent) {
        let Some(seen) = observed.get(&uid) else { continue };
        agent.stats.look(Key::Pod(uid), read::usage(&agent.cgroups, &group), at, steady);
        for c in seen.containers.iter().filter(|c| c.state == State::Running) {
            let usage = read::usage(&agent.cgroups, &format!("{group}/{}", c.id));
            agent.stats.look(Key::Container(c.id.clone()), usage, at, steady);
        }
    }
    agent.stats.series.write().retain(|_, series| series.age(steady) < PERIOD);
}

/// What is known now, with numbers of disks and networks only if `whole`.
pub async fn now(agent: &Arc<Agent>, whole: bool) -> Now {
    let (disks, images) = match whole {
        true => (disks(agent).await, images(agent).await),
        false => Default::default(),
    };
    let (taken, with) = (Arc::clone(agent), disks);
    let gathered = tokio::task::spawn_blocking(move || gather(&taken, whole, images, with)).await;
    gathered.unwrap_or_else(|error| {
        tracing::error!("gathering what pods use panicked: {error}");
        gather(agent, false, None, Arc::default())
    })
}

fn gather(agent: &Agent, whole: bool, images: Option<Taken>, disks: Arc<Disks>) -> Now {
    let observed = agent.pleg.pods();
    let mut found = Vec::new();
    for (uid, pod, group, started) in pods(agent) {
        let Some(seen) = observed.get(&uid) else { continue };
        let running = seen.containers.iter().filter(|c| c.state == State::Running);
        let container = |c: &pod::observed::ContainerObs| {
            let path = format!("{group}/{}", c.id);
            ContainerNow {
                name: c.name.clone(),
                id: c.id.clone(),
                image: c.image.clone(),
                started: c.started,
                measured: agent.stats.measured(&Key::Container(c.id.clone())),
                throttled: if whole { read::throttled(&agent.cgroups, &path) } else { None },
                group: path,
            }
        };
        let mut containers: Vec<ContainerNow> = running.map(container).collect();
        containers.sort_by(|a, b| a.name.cmp(&b.name));
        let on_node = pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true));
        let network = || {
            let sandbox = seen.sandbox().filter(|sandbox| sandbox.ready && whole && !on_node)?;
            let pid = read::a_process(&agent.cgroups, &format!("{group}/{}", sandbox.id))?;
            Some(read::interfaces(&pid.to_string()))
        };
        found.push(PodNow {
            started,
            measured: agent.stats.of_pod(&uid),
            network: network(),
            processes: if whole { read::processes(&agent.cgroups, &group) } else { None },
            containers,
            group,
            pod,
        });
    }
    Now {
        node: agent.config.node_name.clone(),
        at: Timestamp::now(),
        machine: agent.stats.of_machine(),
        network: if whole { read::interfaces("self") } else { Vec::new() },
        disk: if whole { Disk::of(&agent.config.data_dir) } else { None },
        images,
        processes: whole.then(crate::pressure::processes).flatten(),
        pods: found,
        disks,
    }
}

async fn images(agent: &Agent) -> Option<Taken> {
    let all = agent.cri.image_fs().await.ok()?;
    let number = |value: &Option<k8s_cri::v1::UInt64Value>| value.as_ref().map_or(0, |v| v.value);
    Some(all.iter().fold(Taken::default(), |sum, fs| {
        sum + Taken { bytes: number(&fs.used_bytes), inodes: number(&fs.inodes_used) }
    }))
}

/// What pods have on the node's disk, a minute old at most.
pub async fn disks(agent: &Arc<Agent>) -> Arc<Disks> {
    let mut known = agent.stats.disks.lock().await;
    if let Some((at, disks)) = &*known
        && at.elapsed() < DISKS_FOR
    {
        return Arc::clone(disks);
    }
    let disks = Arc::new(count_disks(agent).await);
    *known = Some((Instant::now(), Arc::clone(&disks)));
    disks
}

/// Counts what pods have on the node's disk.
pub async fn count_disks(agent: &Arc<Agent>) -> Disks {
    let layers = agent.cri.container_stats().await.unwrap_or_else(|status| {
        tracing::debug!("the runtime does not say what containers have written: {}", status.message());
        Vec::new()
    });
    let mut of_containers: HashMap<String, Taken> = HashMap::new();
    for stats in layers {
        let Some(layer) = stats.writable_layer else { continue };
        let taken =
            Taken { bytes: layer.used_bytes.map_or(0, |v| v.value), inodes: layer.inodes_used.map_or(0, |v| v.value) };
        of_containers.insert(stats.attributes.map(|a| a.id).unwrap_or_default(), taken);
    }
    let agent = Arc::clone(agent);
    let counted = tokio::task::spawn_blocking(move || {
        let observed = agent.pleg.pods();
        let mut all = Disks::new();
        for (uid, pod, _, _) in pods(&agent) {
            let mut disks = PodDisks::default();
            for c in observed.get(&uid).map(|seen| &seen.containers[..]).unwrap_or_default() {
                let sum = disks.layers.entry(c.name.clone()).or_default();
                *sum = *sum + of_containers.get(&c.id).copied().unwrap_or_default();
                if !disks.logs.contains_key(&c.name)
                    && let Some(directory) = Path::new(&c.log_path).parent()
                    && directory.is_dir()
                {
                    disks.logs.insert(c.name.clone(), read::taken(directory));
                }
            }
            disks.volumes = volumes(&agent, &pod, &uid);
            all.insert(uid, disks);
        }
        all
    })
    .await;
    counted.unwrap_or_else(|error| {
        tracing::error!("counting what pods have on the disk panicked: {error}");
        Disks::new()
    })
}

/// The volumes of a pod that are kept on the node's own disk, as far as they are the pod's own.
fn volumes(agent: &Agent, pod: &Pod, uid: &str) -> HashMap<String, Taken> {
    let base: PathBuf = crate::volume::pod_directory(&agent.config.data_dir, uid).join("volumes");
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let own = volumes.filter_map(|volume| {
        let kind = if let Some(source) = &volume.empty_dir {
            // Those in memory are counted as memory.
            source.medium.as_deref().is_none_or(|medium| medium.is_empty()).then_some("empty-dir")
        } else {
            volume.config_map.as_ref().map(|_| "configmap")
        };
        let path = base.join(format!("kubernetes.io~{}", kind?)).join(&volume.name);
        path.is_dir().then(|| (volume.name.clone(), read::taken(&path)))
    });
    own.collect()
}
