//! A scenario on a lab's machines.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use tokio::time::Instant;

use super::{Scenario, Step, Who, roles, services, workload};
use crate::{
    check::{self, Verdict, nodes::Victim},
    connection::Target,
    history::{Class, History},
    lab::{Lab, Machine, Power, Way},
    report::{Report, Times},
    traffic::{self, Client, IMPATIENT, PATIENT, Plan, Recorder, Site, Traffic, Way as ByWay},
};

/// How long clients work before the first fault.
const BEFORE: Duration = Duration::from_secs(2);
/// And after all is well again.
const AFTER: Duration = Duration::from_secs(2);
/// How long a client may take, when all is well again, until it is served: its patience with a request that was lost.
const SERVED: Duration = Duration::from_secs(15);
/// How long it may take until all is well.
const WELL: Duration = Duration::from_secs(120);
/// How long the loss of a quorum may take to be noticed by who has to say so.
const NOTICE: Duration = Duration::from_secs(5);
/// The ports of the API: of a server, and of a node's balancer.
const SERVER: u16 = 6443;
const BALANCER: u16 = 6444;

/// Who is told how it goes.
pub type Say<'a> = &'a (dyn Fn(&str) + Sync);

/// Carries a scenario out and reports.
pub async fn run(lab: &Lab, scenario: &Scenario<'_>, say: Say<'_>) -> anyhow::Result<Report> {
    well(lab).await.context("before the drill")?;
    let target = Target::from_kubeconfig(&lab.kubeconfig())?;
    let servers: Vec<(String, Target)> =
        lab.servers().iter().map(|s| (s.name().to_owned(), target.at(&s.address().to_string(), SERVER))).collect();
    let targets: Vec<Target> = servers.iter().map(|(_, target)| target.clone()).collect();
    let outside = ByWay {
        name: "outside".into(),
        site: Arc::new(Site::new(None)?),
        targets: targets.clone(),
        patience: IMPATIENT,
    };
    // Preparations have time.
    let patient = ByWay { patience: PATIENT, ..outside.clone() };
    let (mut ways, mut sites) = (Vec::new(), Vec::new());
    for agent in roles::workers(lab) {
        let site = Arc::new(Site::new(Some(agent.network()))?);
        let name: Arc<str> = format!("{} by its balancer", agent.name()).into();
        ways.push(ByWay {
            name,
            site: site.clone(),
            targets: vec![target.at("127.0.0.1", BALANCER)],
            patience: PATIENT,
        });
        sites.push((Arc::from(agent.name()), site));
    }
    anyhow::ensure!(!ways.is_empty(), "lab {} has no agent: drills need one at least", lab.name());
    ways.push(outside);
    say("preparing the workload");
    workload::image(lab).await?;
    lab.settle_disk().await?;
    traffic::prepare(&patient).await?;
    let address = workload::deploy(lab, &mut Client::new(targets.clone(), PATIENT)).await?;
    let recorder = Recorder::default();
    let traffic = Traffic::start(recorder.clone(), &Plan { ways, servers, workload: (sites, address) }).await?;
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
    let stopped = traffic.stop(&patient).await;
    stage.undo().await;
    done?;
    stopped?;
    traffic::clear(&patient).await?;
    let fault = stage.marks.first().map_or(end, |(at, _)| *at);
    let times = Times { fault, end, marks: stage.marks };
    let history = std::mem::take(&mut *recorder.history());
    let mut verdicts = check::check(&history);
    verdicts.push(recovered(&history, undone));
    if let Some((from, to)) = stage.quorum {
        verdicts.extend(without_quorum(&history, from + NOTICE, to));
    }
    verdicts.push(looked(&verdicts));
    let windows = scenario.targets;
    let mut report = Report::new(scenario.name, &history, &times, &verdicts, &[]);
    for (begin, limit) in windows {
        let named: Vec<String> = report.windows.keys().filter(|name| name.starts_with(begin)).cloned().collect();
        report.targets.extend(named.into_iter().map(|name| (name, *limit)));
    }
    Ok(report)
}

/// Where the steps of a scenario are carried out.
pub(super) struct Stage<'a> {
    lab: &'a Lab,
    targets: Vec<Target>,
    recorder: Recorder,
    same: Vec<Machine>,
    pub(super) marks: Vec<(Duration, String)>,
    /// To whom something was done.
    pub(super) victims: Vec<Victim>,
    quorum: Option<(Duration, Duration)>,
    say: Say<'a>,
}

impl<'a> Stage<'a> {
    pub(super) fn new(lab: &'a Lab, targets: Vec<Target>, recorder: Recorder, say: Say<'a>) -> Stage<'a> {
        Stage { lab, targets, recorder, same: vec![], marks: vec![], victims: vec![], quorum: None, say }
    }

    pub(super) async fn steps(&mut self, steps: &[Step]) -> anyhow::Result<()> {
        for step in steps {
            self.step(*step).await.with_context(|| format!("{step:?}"))?;
        }
        Ok(())
    }

    /// Whom [`Who::Same`] means from now on.
    pub(super) fn choose(&mut self, machine: Machine) {
        self.same = vec![machine];
    }

    async fn find(&mut self, who: Who) -> anyhow::Result<Vec<Machine>> {
        let machines = roles::find(who, self.lab, &self.targets, &self.same).await?;
        self.same = machines.clone();
        Ok(machines)
    }

    fn harm(&mut self, machines: &[Machine]) {
        let from = self.recorder.now();
        let victim = |m: &Machine| Victim { node: m.name().to_owned(), from, gone: None, until: None };
        self.victims.extend(machines.iter().map(victim));
    }

    /// Whoever was harmed is out of reach now.
    fn gone(&mut self) {
        let now = self.recorder.now();
        for victim in self.victims.iter_mut().filter(|v| v.until.is_none() && v.gone.is_none()) {
            victim.gone = Some(now);
        }
    }

    fn mark(&mut self, what: String) {
        (self.say)(&what);
        self.marks.push((self.recorder.now(), what));
    }

    async fn step(&mut self, step: Step) -> anyhow::Result<()> {
        let lab = self.lab;
        match step {
            Step::PowerOff(who) | Step::Destroy(who) => {
                lab.settle_disk().await?;
                let (machines, wipe) = (self.find(who).await?, matches!(step, Step::Destroy(_)));
                self.harm(&machines);
                self.mark(format!("power off {}{}", names(&machines), if wipe { ", its disk is lost" } else { "" }));
                lab.each(machines.clone(), |m| async move { m.pull_cable().await }).await?;
                self.gone();
                lab.each(machines, move |m| async move { m.power_off(wipe).await }).await?;
            }
            Step::PowerOn(who) => {
                let machines = self.find(who).await?;
                if let Some((_, to)) = &mut self.quorum {
                    *to = self.recorder.now();
                }
                self.mark(format!("power on {}", names(&machines)));
                let same = lab.clone();
                lab.each(machines, move |m| {
                    let lab = same.clone();
                    async move { lab.power_on(&m).await }
                })
                .await?;
            }
            Step::Kill(who, program) => {
                for machine in self.find(who).await? {
                    self.mark(format!("kill {} on {}", program.word(), machine.name()));
                    machine.kill(program).await?;
                }
            }
            Step::Freeze(who) => {
                let machines = self.find(who).await?;
                self.harm(&machines);
                self.mark(format!("freeze {}", names(&machines)));
                lab.each(machines, |m| async move { m.freeze().await }).await?;
            }
            Step::Thaw(who) => {
                let machines = self.find(who).await?;
                self.mark(format!("thaw {}", names(&machines)));
                lab.each(machines, |m| async move { m.thaw().await }).await?;
            }
            Step::Partition(who, way) => {
                let machines = self.find(who).await?;
                self.harm(&machines);
                self.mark(format!("cut {} off from everyone ({way:?})", names(&machines)));
                let names: Vec<String> = machines.iter().map(|m| m.name().to_owned()).collect();
                lab.partition(&names, &[], way).await?;
                self.gone();
            }
            Step::CutFromServers(who) => {
                let machines = self.find(who).await?;
                self.harm(&machines);
                self.mark(format!("cut {} off from the servers", names(&machines)));
                let names = |machines: Vec<Machine>| machines.iter().map(|m| m.name().to_owned()).collect::<Vec<_>>();
                lab.partition(&names(machines), &names(lab.servers()), Way::Both).await?;
            }
            Step::Loss(percent) => {
                self.mark(format!("lose {percent} % of all packets"));
                lab.loss(percent).await?;
            }
            Step::Starve(programs, seconds) => {
                self.mark(format!("{programs} busy programs for each CPU of the host"));
                starve(programs, Duration::from_secs_f64(seconds)).await?;
            }
            Step::StarveAtTimes(programs, seconds) => {
                let end = Instant::now() + Duration::from_secs_f64(seconds);
                while Instant::now() < end {
                    self.mark(format!("{programs} busy programs for each CPU of the host"));
                    starve(programs, STARVED.min(end.saturating_duration_since(Instant::now()))).await?;
                    self.mark("they end".into());
                    tokio::time::sleep(FED.min(end.saturating_duration_since(Instant::now()))).await;
                }
            }
            Step::Drain(who) => {
                for machine in self.find(who).await? {
                    self.mark(format!("drain {}", machine.name()));
                    services::drain(&mut Client::new(self.targets.clone(), PATIENT), machine.name()).await?;
                }
            }
            Step::Heal => {
                self.mark("mend the cables".into());
                lab.loss(0.0).await?;
                lab.heal(&[]).await?;
            }
            Step::RollingRestart(who) => {
                for machine in self.find(who).await? {
                    lab.settle_disk().await?;
                    self.harm(std::slice::from_ref(&machine));
                    self.mark(format!("reboot {}", machine.name()));
                    machine.reboot().await?;
                    self.well().await?;
                }
            }
            Step::RollingReboot(who) => {
                for machine in self.find(who).await? {
                    lab.settle_disk().await?;
                    self.harm(std::slice::from_ref(&machine));
                    self.mark(format!("reboot {}", machine.name()));
                    machine.reboot().await?;
                    self.mark(format!("{} has booted", machine.name()));
                    self.well().await?;
                    services::ready(&mut Client::new(self.targets.clone(), PATIENT)).await?;
                    self.mark("all pods are ready".into());
                }
            }
            Step::Stay(seconds) => tokio::time::sleep(Duration::from_secs_f64(seconds)).await,
            Step::Well => self.well().await?,
            Step::WithoutQuorum => self.quorum = Some((self.recorder.now(), self.recorder.now())),
        }
        Ok(())
    }

    async fn well(&mut self) -> anyhow::Result<()> {
        well(self.lab).await?;
        self.mark("all is well".into());
        let now = self.recorder.now();
        for victim in self.victims.iter_mut().filter(|v| v.until.is_none()) {
            victim.until = Some(now);
        }
        Ok(())
    }

    /// Brings back what a scenario that broke off has left broken.
    pub(super) async fn undo(&self) {
        let _ = self.lab.loss(0.0).await;
        let _ = self.lab.heal(&[]).await;
        for machine in self.lab.machines() {
            // The errors are of no use: the next drill says what is not well.
            match machine.power() {
                Ok(Power::Frozen) => drop(machine.thaw().await),
                Ok(Power::Off | Power::Broken) => {
                    drop(self.lab.power_on(&machine).await);
                }
                _ => {}
            }
        }
    }
}

/// Waits until everything is well: servers serve, nodes are Ready, etcd's members vote.
pub(super) async fn well(lab: &Lab) -> anyhow::Result<()> {
    lab.well(WELL).await?;
    let deadline = Instant::now() + WELL;
    while !roles::members_are_well(lab).await? {
        anyhow::ensure!(Instant::now() < deadline, "a member of etcd is not well after {} s", WELL.as_secs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// How long the host is busy at a time, and then is not.
const STARVED: Duration = Duration::from_secs(10);
const FED: Duration = Duration::from_secs(20);

/// Keeps the host busy.
async fn starve(programs: usize, time: Duration) -> anyhow::Result<()> {
    let cpus = std::thread::available_parallelism()?.get();
    let end = Arc::new(AtomicBool::new(false));
    for _ in 0..cpus * programs {
        let end = Arc::clone(&end);
        std::thread::Builder::new().name("starve".into()).spawn(move || {
            while !end.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        })?;
    }
    tokio::time::sleep(time).await;
    end.store(true, Ordering::Relaxed);
    Ok(())
}

fn names(machines: &[Machine]) -> String {
    machines.iter().map(Machine::name).collect::<Vec<_>>().join(", ")
}

/// Waits until every client is served again, or for as long as that may take: what came of it is a verdict.
pub(super) async fn all_served(recorder: &Recorder, from: Duration, limit: Duration) {
    let deadline = Instant::now() + limit;
    while !recovered(&recorder.history(), from).holds() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// After the last step every client is served again.
pub(super) fn recovered(history: &History, from: Duration) -> Verdict {
    let mut clients: std::collections::BTreeMap<(&str, &str), bool> = Default::default();
    for request in &history.requests {
        let served = clients.entry((request.class.word(), &request.client)).or_default();
        *served |= request.error.is_none() && request.end >= from;
    }
    let not = clients.iter().filter(|(_, served)| !**served);
    Verdict {
        name: "all is served again in the end",
        violations: not.map(|((class, client), _)| format!("{class}, {client}")).collect(),
        looked_at: clients.len(),
    }
}

/// While there is no quorum: what needs none is answered, and what needs one is refused in words, not by silence.
fn without_quorum(history: &History, from: Duration, to: Duration) -> [Verdict; 2] {
    // By when they ended: one that takes as long as the servers try is still under way at every other time.
    let within =
        |class: Class| history.requests.iter().filter(move |r| r.class == class && r.end >= from && r.end <= to);
    let by_balancer = |client: &str| client.contains("balancer");
    let failed = within(Class::Cached)
        .filter(|r| by_balancer(&r.client))
        .filter_map(|r| Some(format!("{}, {:.3} s: {}", r.client, r.start.as_secs_f64(), r.error.as_ref()?)));
    let unclear = within(Class::Write).filter(|r| by_balancer(&r.client)).filter_map(|r| match &r.error {
        None => Some(format!("{}, {:.3} s: a write was acknowledged", r.client, r.start.as_secs_f64())),
        Some(error) if error.starts_with("503") => None,
        Some(error) => Some(format!("{}, {:.3} s: {error}", r.client, r.start.as_secs_f64())),
    });
    [
        Verdict {
            name: "reads that need no quorum go on",
            violations: failed.collect(),
            looked_at: within(Class::Cached).filter(|r| by_balancer(&r.client)).count(),
        },
        Verdict {
            name: "writes are refused clearly",
            violations: unclear.collect(),
            looked_at: within(Class::Write).filter(|r| by_balancer(&r.client)).count(),
        },
    ]
}

/// A check that looked at nothing has proved nothing.
pub(super) fn looked(verdicts: &[Verdict]) -> Verdict {
    let nothing = verdicts.iter().filter(|v| v.looked_at == 0);
    Verdict {
        name: "every check had something to look at",
        violations: nothing.map(|v| v.name.to_owned()).collect(),
        looked_at: verdicts.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::sample::{expect, ms},
        history::Request,
    };

    fn request(class: Class, at: u64, error: Option<&str>) -> Request {
        let client = "a1 by its balancer".into();
        Request { client, class, start: ms(at), end: ms(at + 10), error: error.map(str::to_owned) }
    }

    #[test]
    fn what_happens_without_a_quorum() {
        let requests = vec![
            request(Class::Cached, 100, Some("before it counts")),
            request(Class::Cached, 2000, None),
            request(Class::Cached, 2100, Some("reset")),
            request(Class::Write, 2000, Some("503 Service Unavailable: no quorum")),
            request(Class::Write, 2100, Some("no answer: too late")),
            request(Class::Write, 2200, None),
            request(Class::Write, 9000, None),
        ];
        let history = History { requests, ..History::default() };
        let [reads, writes] = without_quorum(&history, ms(1000), ms(5000));
        expect(&reads.violations, &["reset"]);
        expect(&writes.violations, &["too late", "a write was acknowledged"]);
        assert_eq!((reads.looked_at, writes.looked_at), (2, 3));
    }

    #[test]
    fn all_is_served_in_the_end() {
        let requests = vec![
            request(Class::Read, 100, None),
            request(Class::Write, 4500, None),
            request(Class::Read, 4600, Some("x")),
        ];
        let history = History { requests, ..History::default() };
        expect(&recovered(&history, ms(4000)).violations, &["read, a1 by its balancer"]);
        expect(&looked(&[recovered(&History::default(), ms(4000))]).violations, &["all is served again"]);
    }
}
