//! `seawall lab`: several machines out of one Linux host.
//!
//! A machine has namespaces for its network, processes, mounts, host name, IPC and cgroups, a disk that is a directory,
//! and a cable to a bridge. It can lose its power, hang, be cut off, and come back. What runs is read from the kernel
//! and not from files, and everything outside of the lab's directory has a name that says whose it is, so a lab can be
//! taken away whatever happened to the command that made it.

mod boot;
mod cgroup;
pub(crate) mod cli;
mod cluster;
mod enter;
mod error;
mod init;
mod layout;
mod machine;
mod network;
mod probe;
mod state;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    future::Future,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::Ipv4Net;
use serde::Serialize;
use tokio::{task::JoinSet, time::Instant};

pub use self::{
    boot::SHARED,
    cli::{Args, run},
    error::{Cause, Error, Result, Step},
    init::{Service, Told},
    layout::{HOST, Role, Spec, Subnet},
    machine::{Machine, Power, Program},
    network::{Cut, Way},
    state::Cluster,
};
use self::{
    error::Of as _,
    layout::Place,
    machine::{Inner, clear_groups, remove_tree},
    state::{Hold, State, lock, replace_file},
};

/// Where labs are kept unless told otherwise.
pub const LABS: &str = "/var/lib/seawall-lab";

/// How often it is tried to have the disk at rest, while something writes.
const SETTLE_ROUNDS: usize = 10;
/// What was written out in this time is little.
const SETTLED: Duration = Duration::from_millis(100);

/// A lab to make.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name.
    pub name: String,
    /// Where labs are kept.
    pub dir: PathBuf,
    /// How many servers.
    pub servers: u8,
    /// How many agents.
    pub agents: u8,
    /// The LAN; a free one is chosen if none is given.
    pub subnet: Option<Ipv4Net>,
    /// Over how many networks the machines are spread, which a router joins.
    pub networks: u8,
    /// Whether machines have addresses of IPv6 as well.
    pub dual_stack: bool,
    /// CPUs for each machine; all of the host's if none are given.
    pub cpus: Option<f64>,
    /// The program that the machines run.
    pub binary: PathBuf,
    /// The cluster on them, or nothing at all.
    pub cluster: Option<Cluster>,
}

/// Who is told how it goes.
pub type Say = Arc<dyn Fn(&str) + Send + Sync>;

/// A lab.
#[derive(Clone, Debug)]
pub struct Lab {
    inner: Arc<Inner>,
}

/// What a lab is doing.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Where its LAN is.
    pub subnet: Ipv4Net,
    /// Further networks, which a router joins to it.
    pub further: Vec<Ipv4Net>,
    /// The host's address there.
    pub host: Ipv4Addr,
    /// Whether `up` came to its end.
    pub finished: bool,
    /// Frames that get lost, in percent.
    pub loss: f64,
    /// What is cut: from, to.
    pub cuts: Vec<Cut>,
    /// Its machines.
    pub machines: Vec<MachineStatus>,
}

/// What a machine is doing.
#[derive(Clone, Debug, Serialize)]
pub struct MachineStatus {
    /// The machine.
    #[serde(flatten)]
    pub spec: Spec,
    /// Whether it runs.
    pub power: Power,
    /// How many processes it has, pods' included.
    pub processes: usize,
    /// What its first process says of the service.
    pub service: Told,
    /// Its programs: number of the process, and resident memory in MiB.
    pub programs: BTreeMap<&'static str, ProgramStatus>,
}

/// A program on a machine.
#[derive(Clone, Debug, Serialize)]
pub struct ProgramStatus {
    /// Its process.
    pub pid: i32,
    /// Resident memory in MiB.
    pub memory: f64,
    /// Seconds of CPU since it started.
    pub cpu: f64,
}

impl Lab {
    /// The lab with this name.
    pub fn open(name: &str, dir: &Path) -> Result<Lab> {
        probe::root()?;
        let place = Place::new(name, dir)?;
        match State::read(&place)? {
            Some(state) => Ok(Lab { inner: Arc::new(Inner { place, state }) }),
            None if remains(&place)? => Err(Error::Unfinished { lab: name.into() }),
            None => Err(Error::NoLab { lab: name.into(), dir: dir.into(), known: Lab::names(dir) }),
        }
    }

    /// The names of all labs in a directory.
    pub fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter(|e| e.path().join("lab.json").exists())
            .filter_map(|e| e.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// Makes a lab and brings it up. One that was not finished is taken away first; one whose host was restarted is
    /// booted from its disks.
    pub async fn up(options: Options, say: Say) -> Result<Lab> {
        probe::root()?;
        let place = Place::new(&options.name, &options.dir)?;
        probe::check(&options).await?;
        let made = probe::make_directory(&place.dir());
        made.map_err(Cause::io(place.dir().display().to_string())).of_lab(&place.lab, "make its directory")?;
        let held = lock(&place.lock_file(), Hold::Alone, &place.lab).await?;
        match State::read(&place)? {
            Some(state) if state.finished && network::lan_exists(&place) => {
                return Err(Error::Exists { lab: place.lab });
            }
            Some(state) if state.finished => {
                drop(held);
                return Lab::revive(place, state, say).await;
            }
            _ => {}
        }
        if clear_outside(&place).await? {
            say("cleared what an interrupted command left");
        }
        for entry in fs::read_dir(place.dir()).into_iter().flatten().flatten().filter(|e| e.path() != place.lock_file())
        {
            remove_tree_or_file(&entry.path()).await.of_lab(&place.lab, "clear its directory")?;
        }
        let lab = {
            // Subnets are chosen one at a time on a host, wherever the labs are kept.
            let _choosing = lock(Path::new("/run"), Hold::Alone, &place.lab).await?;
            let mut used = network::used().await.of_lab(&place.lab, "look at the host's routes")?;
            let subnet = match options.subnet {
                Some(subnet) => Subnet::given(subnet, &used)?,
                None => Subnet::choose(&used)?,
            };
            let mut subnets = vec![subnet];
            for _ in 1..options.networks {
                used.extend(subnets.last().map(|s| s.net()));
                subnets.push(Subnet::choose(&used)?);
            }
            let state = State {
                subnet,
                further: subnets[1..].to_vec(),
                dual_stack: options.dual_stack,
                machines: layout::machines(&subnets, options.servers, options.agents, options.dual_stack)?,
                binary: options.binary,
                cpus: options.cpus,
                cluster: options.cluster,
                finished: false,
            };
            // Before anything is made, so that whatever happens there is something to take away by name.
            state.write(&place)?;
            let lab = Lab { inner: Arc::new(Inner { place, state }) };
            let made = network::create_lan(&lab.inner.place, &lab.inner.state).await;
            made.of_lab(lab.name(), "make the LAN")?;
            lab
        };
        say(&format!("LAN {} is there, the host is {}", lab.inner.state.subnet.net(), lab.inner.state.subnet.host()));
        lab.each(lab.machines(), |machine| async move { machine.boot().await }).await?;
        say(&format!("{} machines have booted", lab.machines().len()));
        if lab.inner.state.cluster.is_some() {
            cluster::bring_up(&lab, &say).await?;
        }
        lab.finish()
    }

    fn finish(self) -> Result<Lab> {
        let state = State { finished: true, ..self.inner.state.clone() };
        state.write(&self.inner.place)?;
        Ok(Lab { inner: Arc::new(Inner { place: self.inner.place.clone(), state }) })
    }

    /// The host was restarted: disks are there, nothing else is.
    async fn revive(place: Place, state: State, say: Say) -> Result<Lab> {
        clear_outside(&place).await?;
        let lab = Lab { inner: Arc::new(Inner { place, state }) };
        {
            let _choosing = lock(Path::new("/run"), Hold::Alone, lab.name()).await?;
            let used = network::used().await.of_lab(lab.name(), "look at the host's routes")?;
            for subnet in lab.inner.state.subnets() {
                Subnet::given(subnet.net(), &used)?;
            }
            network::create_lan(&lab.inner.place, &lab.inner.state).await.of_lab(lab.name(), "make the LAN")?;
        }
        lab.each(lab.machines(), |machine| async move { machine.power_on().await }).await?;
        say(&format!("{} machines have booted from their disks", lab.machines().len()));
        if lab.inner.state.cluster.is_some() {
            cluster::wait(&lab, &say).await?;
        }
        Ok(lab)
    }

    /// Takes a lab away: processes, network, mounts, cgroups, disks. It goes by what is there, so it clears up after
    /// any crash. False if there was nothing.
    pub async fn down(name: &str, dir: &Path) -> Result<bool> {
        probe::root()?;
        let place = Place::new(name, dir)?;
        let exists = place.dir().exists();
        let held = if exists { Some(lock(&place.lock_file(), Hold::Alone, &place.lab).await?) } else { None };
        let outside = clear_outside(&place).await?;
        if exists {
            let step = "remove its directory";
            for mount in mounts_below(&place.dir()) {
                // None are made there on the host; whoever made one has lost it.
                let _ = nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH);
            }
            remove_tree(&place.dir().join("machines")).await.of_lab(name, step)?;
            remove_tree(&place.dir()).await.of_lab(name, step)?;
            // The directory of all labs was made by the first of them.
            let _ = fs::remove_dir(&place.labs);
        }
        drop(held);
        Ok(exists || outside)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.place.lab
    }

    /// Its directory.
    pub fn directory(&self) -> PathBuf {
        self.inner.place.dir()
    }

    /// The program that its machines run.
    pub fn binary(&self) -> &Path {
        &self.inner.state.binary
    }

    /// Waits until every server that has power serves, and the node of every machine that has power is Ready.
    pub async fn well(&self, limit: Duration) -> Result<()> {
        cluster::well(self, limit).await
    }

    /// The host's address on the LAN, and the LAN.
    pub fn subnet(&self) -> Subnet {
        self.inner.state.subnet
    }

    /// The file with the administrator's kubeconfig, for use on the host.
    pub fn kubeconfig(&self) -> PathBuf {
        self.inner.place.kubeconfig()
    }

    /// The directory that all machines see as [`SHARED`].
    pub fn shared(&self) -> PathBuf {
        self.directory().join("shared")
    }

    /// All machines: servers, then agents.
    pub fn machines(&self) -> Vec<Machine> {
        let machine = |spec: &Spec| Machine { lab: self.inner.clone(), spec: spec.clone() };
        self.inner.state.machines.iter().map(machine).collect()
    }

    /// The machines that run a server.
    pub fn servers(&self) -> Vec<Machine> {
        self.machines().into_iter().filter(|m| m.role() == Role::Server).collect()
    }

    /// A machine by its name.
    pub fn machine(&self, name: &str) -> Result<Machine> {
        self.machines().into_iter().find(|m| m.name() == name).ok_or_else(|| Error::NoMachine {
            lab: self.name().into(),
            machine: name.into(),
            known: self.inner.state.machines.iter().map(|m| m.name.clone()).collect(),
        })
    }

    /// Does something to several machines at once; the first error counts, after all have ended.
    pub async fn each<F, Fut>(&self, machines: Vec<Machine>, act: F) -> Result<()>
    where
        F: Fn(Machine) -> Fut,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        let mut tasks: JoinSet<Result<()>> = machines.into_iter().map(act).collect();
        let mut result = Ok(());
        while let Some(done) = tasks.join_next().await {
            let done =
                done.unwrap_or_else(|e| Err(Cause::Other(e.to_string())).of_lab(self.name(), "work on its machines"));
            result = result.and(done);
        }
        result
    }

    /// Has everything written out that waits in memory for the disk.
    ///
    /// All machines share the host's disk, and when one of them goes, its overlays do, for each of which the kernel writes out
    /// all that waits (`sync_filesystem`, as at any umount). What an image just brought takes a second then, in which no member
    /// of etcd can write on any machine. On machines with disks of their own nobody would feel that, so it is done before.
    pub async fn settle_disk(&self) -> Result<()> {
        let directory = self.inner.place.dir();
        let settle = move || -> Step {
            let shown = directory.display().to_string();
            let opened = fs::File::open(&directory).map_err(Cause::io(shown.clone()))?;
            for _ in 0..SETTLE_ROUNDS {
                let before = Instant::now();
                nix::unistd::syncfs(&opened).map_err(Cause::errno(format!("syncfs {shown}")))?;
                if before.elapsed() < SETTLED {
                    break;
                }
            }
            Ok(())
        };
        let done = tokio::task::spawn_blocking(settle).await.unwrap_or_else(|e| Err(Cause::Other(e.to_string())));
        done.of_lab(self.name(), "settle the disk")
    }

    /// Boots a machine. One whose disk was wiped joins the cluster as a new one.
    pub async fn power_on(&self, machine: &Machine) -> Result<()> {
        cluster::prepare(self, machine).await?;
        machine.power_on().await
    }

    /// Names of ports on the LAN's bridge: machines, and the host.
    fn ports(&self, names: &[String]) -> Result<BTreeSet<String>> {
        let port =
            |name: &String| if name == HOST { Ok(name.clone()) } else { self.machine(name).map(|m| m.spec.name) };
        names.iter().map(port).collect()
    }

    /// Cuts `these` machines off from `those`, or from everyone else, the host included. More cuts add up.
    pub async fn partition(&self, these: &[String], those: &[String], way: Way) -> Result<()> {
        let these = self.ports(these)?;
        let those = match those {
            [] => {
                let all = self.machines().into_iter().map(|m| m.spec.name).chain([HOST.to_owned()]);
                all.filter(|name| !these.contains(name)).collect()
            }
            some => self.ports(some)?,
        };
        self.change_cuts("partition", |cuts| cuts.extend(network::cuts_between(&these, &those, way))).await
    }

    /// Mends the cables of some machines, or everything: all cuts, and loss.
    pub async fn heal(&self, machines: &[String]) -> Result<()> {
        if machines.is_empty() {
            self.change_cuts("heal", BTreeSet::clear).await?;
            return self.loss(0.0).await;
        }
        let names = self.ports(machines)?;
        self.change_cuts("heal", |cuts| cuts.retain(|(a, b)| !names.contains(a) && !names.contains(b))).await
    }

    async fn change_cuts(&self, step: &str, change: impl FnOnce(&mut BTreeSet<Cut>)) -> Result<()> {
        let _alone = lock(&self.inner.place.lock_file(), Hold::Alone, self.name()).await?;
        let mut cuts = network::cuts(&self.inner.place).await.of_lab(self.name(), step)?;
        change(&mut cuts);
        network::set_cuts(&self.inner.place, &self.inner.state, &cuts).await.of_lab(self.name(), step)
    }

    /// Lets this share of all frames between machines get lost.
    pub async fn loss(&self, percent: f64) -> Result<()> {
        if !(0.0..=100.0).contains(&percent) {
            return Err(Error::Invalid {
                what: format!("loss {percent}"),
                why: "give a percentage from 0 to 100".into(),
            });
        }
        network::set_loss(&self.inner.place, percent).await.of_lab(self.name(), "lose frames")
    }

    /// What all of it is doing.
    pub async fn status(&self) -> Result<Status> {
        let place = &self.inner.place;
        let (cuts, loss) = if network::lan_exists(place) {
            let cuts = network::cuts(place).await.of_lab(self.name(), "list what is cut")?;
            (cuts.into_iter().collect(), network::loss(place).await.of_lab(self.name(), "list what is lost")?)
        } else {
            (Vec::new(), 0.0)
        };
        let machines = self.machines().iter().map(Machine::status).collect::<Result<_>>()?;
        Ok(Status {
            name: self.name().into(),
            subnet: self.inner.state.subnet.net(),
            further: self.inner.state.further.iter().map(|s| s.net()).collect(),
            host: self.inner.state.subnet.host(),
            finished: self.inner.state.finished,
            loss,
            cuts,
            machines,
        })
    }
}

impl Machine {
    /// What it is doing.
    pub fn status(&self) -> Result<MachineStatus> {
        let mut programs = BTreeMap::new();
        for program in Program::ALL {
            // One that ends meanwhile does not run.
            if let Some(pid) = self.pid_of(program)?
                && let Ok(usage) = crate::process::usage(&[pid])
            {
                programs.insert(program.word(), ProgramStatus { pid, memory: usage.rss, cpu: usage.cpu });
            }
        }
        let power = self.power()?;
        let service = if matches!(power, Power::On | Power::Frozen) { self.told() } else { Told::default() };
        Ok(MachineStatus { spec: self.spec.clone(), power, processes: self.processes()?.len(), service, programs })
    }
}

/// Whether anything is there that has the lab's name.
fn remains(place: &Place) -> Result<bool> {
    let groups = cgroup::Groups::names(&place.prefix()).of_lab(&place.lab, "look for its cgroups")?;
    let links = network::host_links().of_lab(&place.lab, "look for its link")?;
    let namespaces = network::namespaces(&place.prefix());
    Ok(!groups.is_empty() || !namespaces.is_empty() || links.contains(&place.host_link()) || place.dir().exists())
}

/// Takes away everything of a lab that is not in its directory. False if there was nothing.
async fn clear_outside(place: &Place) -> Result<bool> {
    let groups = cgroup::Groups::names(&place.prefix()).of_lab(&place.lab, "look for its cgroups")?;
    let namespaces = network::namespaces(&place.prefix());
    let linked = network::host_links().of_lab(&place.lab, "look for its link")?.contains(&place.host_link());
    // The LAN first: what is killed after it has nobody to talk to.
    network::delete_lan(place).await.of_lab(&place.lab, "take the LAN away")?;
    let mut tasks: JoinSet<Step> = groups
        .iter()
        .map(|name| {
            let name = name.clone();
            async move { clear_groups(&name).await }
        })
        .collect();
    while let Some(done) = tasks.join_next().await {
        let done = done.unwrap_or_else(|e| Err(Cause::Other(e.to_string())));
        done.of_lab(&place.lab, "end its processes")?;
    }
    for name in &namespaces {
        network::delete_namespace(name).await.of_lab(&place.lab, format!("delete the namespace {name}"))?;
    }
    Ok(!groups.is_empty() || !namespaces.is_empty() || linked)
}

async fn remove_tree_or_file(path: &Path) -> Step {
    if path.is_dir() {
        remove_tree(path).await
    } else {
        fs::remove_file(path).map_err(Cause::io(path.display().to_string()))
    }
}

fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = text.lines().filter_map(|l| Some(PathBuf::from(l.split(' ').nth(4)?)));
    let mut below: Vec<PathBuf> = points.filter(|p| p.starts_with(directory)).collect();
    below.reverse();
    below
}

/// Opens a log for appending; one that has grown large makes room.
fn open_log(path: &Path) -> Step<fs::File> {
    const LARGE: u64 = 64 << 20;
    if fs::metadata(path).is_ok_and(|m| m.len() > LARGE) {
        let _ = fs::rename(path, path.with_extension("log.1"));
    }
    fs::File::options().create(true).append(true).open(path).map_err(Cause::io(path.display().to_string()))
}
