//! Device plugins: programs on the machine that have devices for pods, such as accelerators.
//!
//! A plugin makes itself known at a socket of the agent's ([`registration`]), which connects back ([`plugin`]) and follows
//! which devices it has. The Node shows how many; [`state`] says which of them a container gets, when its pod is let in.
//! What it got stands in a file, so that an agent that is started again takes nothing away from anybody, and gives nothing
//! twice.
//!
//! <https://kubernetes.io/docs/concepts/extend-kubernetes/compute-storage-net/device-plugins/>

pub mod api;
pub mod plugin;
pub mod registration;
pub mod state;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use self::{
    api::{ContainerAllocateResponse, RegisterRequest},
    plugin::Plugin,
    state::{Amounts, Choice, Given, Ids, Pods, State, wanted},
};
use crate::{
    fence,
    pod::{self, ContainerRef, containers},
    topology::{hints::Hint, mask::Mask},
};

/// Where plugins look for the agent.
pub const DIRECTORY: &str = "/var/lib/kubelet/device-plugins";

/// How many plugins may make themselves known before the first of them is listened to.
const WAITING: usize = 16;

/// What stands on the disk.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Kept {
    /// Of which a plugin has been there.
    resources: Vec<String>,
    pods: Pods,
}

/// The turn of a pod to be given something: pods have it one after the other, since what is free for one is not for the next.
pub struct Turn<'a>(#[expect(dead_code, reason = "it is held")] tokio::sync::MutexGuard<'a, ()>);

/// Plugins that have made themselves known.
pub type Arrivals = mpsc::Receiver<Plugin>;

/// The devices of this machine, and who has them.
pub struct Devices {
    directory: PathBuf,
    file: PathBuf,
    state: Mutex<State>,
    plugins: Mutex<BTreeMap<String, Plugin>>,
    count: AtomicU64,
    giving: tokio::sync::Mutex<()>,
    changed: watch::Sender<u64>,
    registered: mpsc::Sender<Plugin>,
    /// No agent has run on this directory before.
    is_new: bool,
}

impl Devices {
    /// With what an earlier agent has given out. `data` is the agent's own directory, `directory` that of the plugins; who
    /// comes is for [`run`].
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn open(data: &Path, directory: &Path) -> io::Result<(Devices, Arrivals)> {
        let file = data.join("devices.json");
        let read = match fs::read(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            read => Some(read?),
        };
        let is_new = read.is_none();
        let kept = read.map(|bytes| serde_json::from_slice(&bytes)).transpose().unwrap_or_else(|error| {
            tracing::error!("{}: {error}: which pods have which devices is not known any more", file.display());
            None
        });
        let kept: Kept = kept.unwrap_or_default();
        let (registered, arrivals) = mpsc::channel(WAITING);
        let devices = Devices {
            directory: directory.to_owned(),
            file,
            state: Mutex::new(State::new(kept.resources, kept.pods)),
            plugins: Mutex::default(),
            count: AtomicU64::new(0),
            giving: tokio::sync::Mutex::default(),
            changed: watch::channel(0).0,
            registered,
            is_new,
        };
        devices.write(&devices.state.lock())?;
        Ok((devices, arrivals))
    }

    fn write(&self, state: &State) -> io::Result<()> {
        let kept = Kept { resources: state.resources().cloned().collect(), pods: state.pods().clone() };
        let unfinished = self.file.with_extension("new");
        fs::write(&unfinished, serde_json::to_vec(&kept)?)?;
        fs::rename(unfinished, &self.file)
    }

    /// Whether nothing is known of what an earlier agent said in the Node.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Told when there are more or fewer devices.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// How many devices there are.
    pub fn amounts(&self) -> Amounts {
        self.state.lock().amounts(fence::now())
    }

    /// Whether a pod wants some of what plugins have.
    pub fn concerns(&self, spec: &PodSpec) -> bool {
        let state = self.state.lock();
        containers(spec).any(|container| wanted(container.spec).any(|(resource, _)| state.manages(resource)))
    }

    /// A plugin makes itself known.
    async fn register(&self, request: &RegisterRequest) -> Result<(), Status> {
        let socket = registration::check(request, &self.directory)?;
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let plugin = Plugin::connect(number, &request.resource_name, &socket).await?;
        let gone = |_| Status::unavailable("the agent ends");
        self.registered.send(plugin).await.map_err(gone)
    }

    /// Follows a plugin until it ends or another one takes its place.
    async fn follow(&self, plugin: Plugin) {
        let resource = plugin.resource.clone();
        let before = self.plugins.lock().insert(resource.clone(), plugin.clone());
        if let Some(before) = before {
            before.replaced.cancel();
        }
        {
            let mut state = self.state.lock();
            state.registered(&resource, plugin.number);
            if let Err(error) = self.write(&state) {
                tracing::error!("write {}: {error}", self.file.display());
            }
        }
        tracing::info!(resource, "a device plugin is there");
        let watched = async {
            let mut stream = plugin.watch().await?;
            while let Some(list) = stream.message().await? {
                if self.state.lock().listed(&resource, plugin.number, &list.devices) {
                    self.changed.send_modify(|count| *count += 1);
                }
            }
            Err::<(), _>(Status::unavailable("it has ended the list of its devices"))
        };
        let Some(Err(why)) = plugin.replaced.run_until_cancelled(watched).await else { return };
        if self.state.lock().left(&resource, plugin.number, fence::now()) {
            self.plugins.lock().retain(|_, known| known.number != plugin.number);
            tracing::warn!(resource, "a device plugin has gone, and nobody gets its devices: {}", why.message());
            self.changed.send_modify(|count| *count += 1);
        }
    }

    /// Waits for a pod's turn to be given something.
    pub async fn turn(&self) -> Turn<'_> {
        Turn(self.giving.lock().await)
    }

    /// From which of these NUMA nodes a container of a pod could have its devices, for each resource where that matters.
    pub fn hints(&self, nodes: Mask, pod: &Pod, one: ContainerRef<'_>) -> Vec<Vec<Hint>> {
        let state = self.state.lock();
        pod.spec.as_ref().map(|spec| state.hints(nodes, pod::uid(pod), spec, one)).unwrap_or_default()
    }

    /// The same for all that a pod has at a time.
    pub fn pod_hints(&self, nodes: Mask, pod: &Pod) -> Vec<Vec<Hint>> {
        let state = self.state.lock();
        pod.spec.as_ref().map(|spec| state.pod_hints(nodes, pod::uid(pod), spec)).unwrap_or_default()
    }

    /// Gives a container of a pod what it wants and does not have; those near to some NUMA nodes first, if there is an
    /// affinity.
    ///
    /// # Errors
    /// Why not, in upstream's words; then it has got nothing.
    pub async fn give_one(
        &self,
        _: &Turn<'_>,
        pod: &Pod,
        one: ContainerRef<'_>,
        affinity: Option<Mask>,
    ) -> Result<(), String> {
        let Some(spec) = &pod.spec else { return Ok(()) };
        let (uid, name) = (pod::uid(pod), &one.spec.name);
        let reusable = self.state.lock().reusable(uid, spec, name);
        let mut given = Vec::new();
        let giving = async {
            for (resource, count) in wanted(one.spec) {
                if !self.state.lock().manages(resource) {
                    continue;
                }
                let choice = self.state.lock().choose(uid, name, (resource, count), &reusable, affinity)?;
                if choice != Choice::Had {
                    let gives = self.ask(resource, choice, count).await?;
                    self.state.lock().give(uid, name, resource, gives);
                    given.push(resource);
                }
            }
            Ok(())
        };
        let result: Result<(), String> = giving.await;
        let mut state = self.state.lock();
        let result = result.and_then(|()| match given.is_empty() {
            true => Ok(()),
            false => self.write(&state).map_err(|error| format!("write {}: {error}", self.file.display())),
        });
        if result.is_err() {
            given.into_iter().for_each(|resource| state.take_back(uid, name, resource));
        }
        result
    }

    /// Has a plugin give out devices.
    async fn ask(&self, resource: &str, choice: Choice, count: usize) -> Result<Given, String> {
        let plugin = self.plugins.lock().get(resource).cloned();
        let plugin =
            plugin.ok_or_else(|| format!("endpoint not found in cache for a registered resource: {resource}"))?;
        let preferred = match &choice {
            Choice::Some { sure, free, last, more }
                if plugin.options.get_preferred_allocation_available && free.len() + last.len() > *more =>
            {
                let free: Ids = free.union(last).cloned().collect();
                plugin.preferred(sure, &free, count).await?
            }
            _ => Vec::new(),
        };
        let devices = choice.settle(&preferred).unwrap_or_default();
        let with = plugin.allocate(&devices).await?;
        Ok(Given { devices, with, pre_start: plugin.options.pre_start_required })
    }

    /// A container is about to start: tells the plugins that want to know, and says what it is to be made with.
    ///
    /// # Errors
    /// Why it has not got what it wants.
    pub async fn before_start(&self, pod: &Pod, container: &Container) -> Result<ContainerAllocateResponse, String> {
        let uid = pod::uid(pod);
        // Who was let in before there was a plugin has nothing yet.
        if pod.spec.as_ref().is_some_and(|spec| self.concerns(spec)) {
            let turn = self.turn().await;
            for one in pod.spec.iter().flat_map(containers) {
                self.give_one(&turn, pod, one, None).await?;
            }
        }
        for (resource, _) in wanted(container) {
            let Some(has) = self.state.lock().has(uid, &container.name, resource).cloned() else { continue };
            let plugin = self.plugins.lock().get(resource).cloned();
            match plugin {
                Some(plugin) if plugin.options.pre_start_required => plugin.pre_start(&has.devices).await?,
                None if has.pre_start => {
                    return Err(format!("the device plugin of {resource} wants to be told first, and is not there"));
                }
                // Containers go on while a plugin is replaced by a newer one.
                _ => {}
            }
        }
        Ok(self.state.lock().made_with(uid, &container.name))
    }

    /// A pod needs nothing any more.
    pub fn release(&self, uid: &str) {
        self.retain(|other| other != uid);
    }

    /// Only these pods are there.
    pub fn retain(&self, keeps: impl Fn(&str) -> bool) {
        let mut state = self.state.lock();
        if state.retain(keeps)
            && let Err(error) = self.write(&state)
        {
            tracing::error!("write {}: {error}", self.file.display());
        }
    }
}

/// Listens to plugins until it is told to stop.
///
/// # Errors
/// If it cannot listen any more.
pub async fn run(
    devices: Arc<Devices>,
    mut arrivals: Arrivals,
    listener: UnixListener,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut followed = JoinSet::new();
    let mut serving = std::pin::pin!(registration::serve(Arc::clone(&devices), listener, stop.clone()));
    loop {
        tokio::select! {
            ended = &mut serving => return ended,
            // Who comes now is told that this is the wrong moment.
            () = stop.cancelled(), if !stop.is_cancelled() => arrivals.close(),
            Some(plugin) = arrivals.recv(), if !stop.is_cancelled() => {
                let devices = Arc::clone(&devices);
                followed.spawn(async move { devices.follow(plugin).await });
            }
            Some(_) = followed.join_next() => {}
        }
    }
}
