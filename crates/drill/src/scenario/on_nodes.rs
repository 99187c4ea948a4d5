//! A scenario of nodes on a lab's machines.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{
    Scenario, Step, Who, roles,
    run::{Say, Stage, all_served, looked, recovered, well},
    services::{self, Service, name},
};
use crate::{
    check,
    connection::Target,
    history::{At, Class, History},
    lab::{Lab, Machine},
    report::{Report, Times},
    traffic::{self, Client, IMPATIENT, PATIENT, Recorder, Site, Way, observer, service},
};

const BEFORE: Duration = Duration::from_secs(3);
const AFTER: Duration = Duration::from_secs(3);
/// How long a client may take, when all is well again, until it is served.
const SERVED: Duration = Duration::from_secs(35);
const SERVER: u16 = 6443;

/// Carries a scenario out and reports.
pub async fn run(lab: &Lab, scenario: &Scenario<'_>, say: Say<'_>) -> anyhow::Result<Report> {
    well(lab).await.context("before the drill")?;
    let workers = roles::workers(lab);
    let [near, .., worker] = &workers[..] else {
        anyhow::bail!("lab {} has {} agents: drills on nodes need two at least", lab.name(), workers.len());
    };
    let target = Target::from_kubeconfig(&lab.kubeconfig())?;
    let targets: Vec<Target> = lab.servers().iter().map(|s| target.at(&s.address().to_string(), SERVER)).collect();
    let host = Arc::new(Site::new(None)?);
    let outside = Way { name: "outside".into(), site: host.clone(), targets: targets.clone(), patience: IMPATIENT };
    let patient = Way { patience: PATIENT, ..outside.clone() };
    say("preparing the workload");
    services::image(lab, &lab.machines()).await?;
    lab.settle_disk().await?;
    traffic::prepare(&patient).await?;
    let mut client = Client::new(targets.clone(), PATIENT);
    let services = services::deploy(lab, &mut client, near.name(), worker.name()).await?;

    let recorder = Recorder::default();
    let (busy, watching) = (CancellationToken::new(), CancellationToken::new());
    let observers = [
        host.spawn(observer::nodes(outside.clone(), recorder.clone(), watching.clone())),
        host.spawn(observer::pods(outside, recorder.clone(), watching.clone())),
    ];
    let mut places = Places { clients: Vec::new(), sites: vec![host.clone()], recorder: recorder.clone(), busy };
    // Where all nodes are emptied, a client in a pod would be sent away itself; where they are rebooted, so would all on them.
    let drains = scenario.steps.iter().any(|s| matches!(s, Step::Drain(_)));
    let reboots = scenario.steps.iter().any(|s| matches!(s, Step::RollingReboot(_)));
    if !reboots {
        places.host(&format!("host {}", near.name()), Some(near.network()), &services, true)?;
    }
    if !drains && !reboots {
        places.inside(near, &services)?;
    }
    if !scenario.steps.iter().any(|s| matches!(s, Step::PowerOff(Who::AllServers)))
        && let Some(server) = lab.servers().first()
    {
        places.host(&format!("host {}", server.name()), Some(server.network()), &services, reboots)?;
    }
    let stays = lab.servers().into_iter().next().filter(|_| reboots);
    let entrance = stays.as_ref().unwrap_or(near);
    for service in &services {
        let address = std::net::SocketAddr::from((entrance.address(), service.node_port));
        places.connect(&host, name("outside", &format!("{}, node port", service.name)), address);
    }
    tokio::time::sleep(BEFORE).await;
    let mut stage = Stage::new(lab, targets, recorder.clone(), say);
    let done = stage.steps(scenario.steps).await;
    let undone = recorder.now();
    if done.is_ok() {
        tokio::time::sleep(AFTER).await;
        all_served(&recorder, undone, SERVED).await;
    }
    let end = recorder.now();
    // Whatever happened, clients end and the next drill finds a lab that is well.
    let stopped = places.stop().await;
    stage.undo().await;
    done?;
    stopped?;
    watching.cancel();
    for observer in observers {
        observer.await.context("an observer panicked")?;
    }
    let thaws: Vec<At> = stage.marks.iter().filter(|(_, what)| what.starts_with("thaw")).map(|(at, _)| *at).collect();
    let (lives, woke) = services::lives(lab, recorder.now(), &thaws)?;
    traffic::clear(&patient).await?;

    let mut history = std::mem::take(&mut *recorder.history());
    history.lives = lives;
    let mut report = report(scenario, worker, &history, stage, undone, end);
    if !thaws.is_empty() {
        report.window("the stateful pod wrote on after the thaw", woke, Some(services::WAKING.as_secs_f64()));
    }
    Ok(report)
}

fn report(
    scenario: &Scenario<'_>,
    worker: &Machine,
    history: &History,
    stage: Stage<'_>,
    undone: At,
    end: At,
) -> Report {
    let fault = stage.marks.first().map_or(end, |(at, _)| *at);
    let of_worker = stage.victims.iter().find(|v| v.node == worker.name()).map(|v| v.from);
    let mut verdicts = check::services(
        history,
        &stage.victims,
        scenario.steps.iter().any(|s| matches!(s, Step::Loss(_) | Step::Freeze(_))),
    );
    if scenario.is_planned() {
        verdicts.push(check::nobody_noticed(history));
    }
    verdicts.push(recovered(history, undone));
    verdicts.push(looked(&verdicts));
    let times = Times { fault, end, marks: stage.marks };
    let mut report = Report::new(scenario.name, history, &times, &verdicts, &[]);
    let Some(from) = of_worker else { return report };
    // What the return of a node costs is seen in the timeline; this is what its loss costs.
    let until = times.marks.iter().map(|(at, _)| *at).find(|at| *at > from + Duration::from_millis(500)).unwrap_or(end);
    report.windows.clear();
    for (name, took) in windows(history, worker.name(), from, until) {
        let target = scenario.targets.iter().find(|(begin, _)| name.starts_with(begin)).map(|(_, limit)| *limit);
        report.window(&name, took, target);
    }
    report
}

/// What was felt of a node's fault, from when to when it was looked at.
fn windows(history: &History, worker: &str, from: At, until: At) -> Vec<(String, Duration)> {
    let mut windows = Vec::new();
    let not_ready = history.nodes.iter().find(|n| &*n.node == worker && !n.ready && n.at >= from);
    windows.extend(not_ready.map(|seen| (format!("not ready, {worker}"), seen.at - from)));
    let mut clients: Vec<(Class, &str)> = history.requests.iter().map(|r| (r.class, &*r.client)).collect();
    clients.sort_unstable();
    clients.dedup();
    for (class, client) in clients {
        let of = || {
            let of = history.requests.iter().filter(|r| r.class == class && &*r.client == client);
            of.filter(|r| r.end >= from && r.start < until)
        };
        let last =
            || of().filter(|r| r.error.is_some()).map(|r| r.start.saturating_sub(from)).max().unwrap_or_default();
        let longest = || of().map(|r| r.end - r.start.max(from)).max().unwrap_or_default();
        match class {
            Class::Connect => {
                windows.push((format!("new connections fail, {client}"), last()));
                windows.push((format!("slowest new connection, {client}"), longest()));
            }
            Class::Open => windows.push((format!("open connections hang, {client}"), longest())),
            Class::Datagram => windows.push((format!("datagrams lost, {client}"), last())),
            _ => {}
        }
    }
    for (app, wanted, what) in [("echo", 2, "web replaced"), ("writer", 1, "stateful replaced")] {
        windows.extend(replaced(history, app, wanted, worker, from).map(|took| (what.to_owned(), took)));
    }
    windows
}

/// When so many pods were ready on other nodes.
fn replaced(history: &History, app: &str, wanted: usize, worker: &str, from: At) -> Option<Duration> {
    let mut ready: std::collections::BTreeMap<&str, bool> = Default::default();
    for pod in history.pods.iter().filter(|p| &*p.app == app) {
        ready.insert(&pod.uid, pod.ready && &*pod.node != worker);
        if pod.at >= from && ready.values().filter(|r| **r).count() >= wanted {
            return Some(pod.at - from);
        }
    }
    None
}

/// Where clients are, and what they do there.
struct Places {
    clients: Vec<JoinHandle<()>>,
    sites: Vec<Arc<Site>>,
    recorder: Recorder,
    busy: CancellationToken,
}

impl Places {
    /// In a pod on a node.
    fn inside(&mut self, near: &Machine, services: &[Service]) -> anyhow::Result<()> {
        let pod = near.processes()?.into_iter().find(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with(b"/seawall\0") && String::from_utf8_lossy(&line).contains("drill-workload")
        });
        let pid = pod.with_context(|| format!("no pod of the workload runs on {}", near.name()))?;
        let network = PathBuf::from(format!("/proc/{pid}/ns/net"));
        self.host(&format!("pod on {}", near.name()), Some(network), services, true)
    }

    fn host(&mut self, place: &str, network: Option<PathBuf>, services: &[Service], all: bool) -> anyhow::Result<()> {
        let site = Arc::new(Site::new(network)?);
        for service in services {
            let who = name(place, service.name);
            self.connect(&site, who.clone(), service.connections);
            if all {
                let (recorder, busy) = (self.recorder.clone(), self.busy.clone());
                self.clients.push(site.spawn(service::open(
                    who.clone(),
                    recorder.clone(),
                    service.connections,
                    busy.clone(),
                )));
                self.clients.push(site.spawn(service::datagrams(who, recorder, service.datagrams, busy)));
            }
        }
        self.sites.push(site);
        Ok(())
    }

    fn connect(&mut self, site: &Arc<Site>, who: Arc<str>, address: std::net::SocketAddr) {
        let task = service::connections(who, self.recorder.clone(), address, self.busy.clone());
        self.clients.push(site.spawn(task));
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.busy.cancel();
        for client in self.clients {
            client.await.context("a client panicked")?;
        }
        tokio::task::spawn_blocking(move || drop(self.sites)).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::sample::ms,
        history::{NodeSeen, PodSeen, Request},
    };

    #[test]
    fn what_was_felt() {
        let request = |class, start, end, error: Option<&str>| Request {
            client: "a1".into(),
            class,
            start: ms(start),
            end: ms(end),
            error: error.map(str::to_owned),
        };
        let pod = |at, uid: &str, node: &str, ready| PodSeen {
            at: ms(at),
            app: "echo".into(),
            name: uid.into(),
            uid: uid.into(),
            node: node.into(),
            ready,
            gone: false,
        };
        let history = History {
            requests: vec![
                request(Class::Connect, 900, 950, Some("before")),
                request(Class::Connect, 1100, 4100, Some("no answer")),
                request(Class::Connect, 1300, 1500, None),
                request(Class::Connect, 9100, 9200, Some("when it came back")),
                request(Class::Open, 900, 2500, Some("reset")),
                request(Class::Datagram, 1200, 1600, Some("lost")),
            ],
            nodes: vec![
                NodeSeen { at: ms(500), node: "a2".into(), ready: true, accused: false },
                NodeSeen { at: ms(1900), node: "a2".into(), ready: false, accused: true },
            ],
            pods: vec![
                pod(100, "e-1", "a1", true),
                pod(100, "e-2", "a2", true),
                pod(6000, "e-3", "s1", false),
                pod(7000, "e-3", "s1", true),
            ],
            ..History::default()
        };
        let found = windows(&history, "a2", ms(1000), ms(9000));
        let found: Vec<String> = found.iter().map(|(name, took)| format!("{name}: {}", took.as_millis())).collect();
        assert_eq!(
            found,
            [
                "not ready, a2: 900",
                "new connections fail, a1: 100",
                "slowest new connection, a1: 3000",
                "open connections hang, a1: 1500",
                "datagrams lost, a1: 200",
                "web replaced: 6000",
            ]
        );
    }
}
