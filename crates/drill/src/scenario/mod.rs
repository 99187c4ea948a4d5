//! `seawall drill`: machines are switched off, and what users would have felt is measured.
//!
//! A scenario is data: a list of steps. [`run`] carries them out on a lab's machines while clients are at work.

mod cli;
mod dns;
mod image;
mod nodes;
mod on_nodes;
mod redis;
mod roles;
mod run;
mod services;
mod workload;

pub use self::cli::{Args, run};
use crate::lab::{Program, Way};

/// Whom a step concerns. The roles are looked up when the step begins; afterwards the same machines are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The server whose member leads etcd.
    EtcdLeader,
    /// The server whose controllers act.
    ControllersLeader,
    /// A server that leads nothing.
    Follower,
    /// Two servers of three, the ones that lead among them.
    Two,
    /// All servers.
    AllServers,
    /// Whoever the last fault concerned.
    Same,
    /// The node that runs half of the web and the stateful pod, and no client.
    Worker,
    /// All nodes that run nothing but pods.
    Workers,
}

/// A step of a scenario.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// Cuts the power; the disk stays.
    PowerOff(Who),
    /// Cuts the power; the disk is lost.
    Destroy(Who),
    /// Boots.
    PowerOn(Who),
    /// Kills one program.
    Kill(Who, Program),
    /// Stops everything on the machine.
    Freeze(Who),
    /// Lets it go on.
    Thaw(Who),
    /// Cuts the machine off from everyone.
    Partition(Who, Way),
    /// Cuts the machine off from the servers alone.
    CutFromServers(Who),
    /// Loses so many packets in a hundred, of everyone.
    Loss(f64),
    /// Keeps every CPU of the host busy with so many other programs for each, for so many seconds.
    Starve(usize, f64),
    /// Does so for 10 s of every 30, for so many seconds altogether.
    StarveAtTimes(usize, f64),
    /// Empties each machine in turn as `kubectl drain` does.
    Drain(Who),
    /// Mends all cables.
    Heal,
    /// Shuts each machine down in order and boots it, one after the other, each when all is well again.
    RollingRestart(Who),
    /// Does the same with machines that run pods: the next one follows when the pods of the last one are back.
    RollingReboot(Who),
    /// Lets clients work for so many seconds.
    Stay(f64),
    /// Waits until every machine that has power serves and every node of them is Ready.
    Well,
    /// From here on there is no quorum: what needs none goes on, what needs one is refused in words.
    WithoutQuorum,
}

/// A scenario.
#[derive(Clone, Copy, Debug)]
pub struct Scenario<'a> {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// What is done.
    pub steps: &'a [Step],
    /// What should be felt at most, in seconds: windows by the beginning of their name.
    pub targets: &'static [(&'static str, f64)],
    /// Who is at work meanwhile.
    pub traffic: Traffic,
}

/// Who is at work while a fault is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Clients of the API, and of a Service that no fault touches.
    Api,
    /// Clients of Services whose pods a fault touches.
    Services,
    /// Clients of cluster DNS on nodes that stay.
    Dns,
    /// A client of a redis whose master a fault touches; that machine is the one that is meant from the start.
    Redis,
}

use Step::*;

/// How long clients work after a fault before it is undone.
const A_WHILE: Step = Stay(6.0);

/// What a follower's death may cost: of the design's table, for the fast profile.
const NOT_ETCDS_LEADER: &[(&str, f64)] =
    &[("read, a", 0.5), ("write, a", 0.5), ("controllers", 1.5), ("scheduler", 1.5), ("workload", 0.5)];
/// And the death of etcd's leader: etcd has to elect another.
const ETCDS_LEADER: &[(&str, f64)] =
    &[("read, a", 2.0), ("write, a", 2.0), ("controllers", 2.5), ("scheduler", 2.5), ("workload", 0.5)];
/// Where it is not a matter of time, the workload is still not to notice.
const WORKLOAD: &[(&str, f64)] = &[("workload", 0.5)];

/// Scenarios of servers.
const OF_SERVERS: &[Scenario<'static>] = &[
    Scenario {
        name: "power-off-etcd-leader",
        about: "the server whose member leads etcd loses its power",
        steps: &[PowerOff(Who::EtcdLeader), A_WHILE, PowerOn(Who::Same), Well],
        targets: ETCDS_LEADER,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "power-off-controllers-leader",
        about: "the server whose controllers act loses its power",
        steps: &[PowerOff(Who::ControllersLeader), A_WHILE, PowerOn(Who::Same), Well],
        targets: ETCDS_LEADER,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "power-off-follower",
        about: "a server that leads nothing loses its power",
        steps: &[PowerOff(Who::Follower), A_WHILE, PowerOn(Who::Same), Well],
        targets: NOT_ETCDS_LEADER,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "kill-server",
        about: "the server process whose controllers act is killed",
        steps: &[Kill(Who::ControllersLeader, Program::Seawall), A_WHILE, Well],
        targets: NOT_ETCDS_LEADER,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "kill-etcd",
        about: "the member that leads etcd is killed",
        steps: &[Kill(Who::EtcdLeader, Program::Etcd), A_WHILE, Well],
        targets: ETCDS_LEADER,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "freeze-leader",
        about: "the server whose controllers act stands still for 30 s, and then believes that it is still then",
        steps: &[Freeze(Who::ControllersLeader), Stay(30.0), Thaw(Who::Same), Stay(3.0), Well],
        targets: ETCDS_LEADER,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "partition-server",
        about: "the server whose controllers act is cut off from everyone",
        steps: &[Partition(Who::ControllersLeader, Way::Both), Stay(8.0), Heal, Stay(2.0), Well],
        targets: ETCDS_LEADER,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "partition-server-in",
        about: "nothing reaches the server whose controllers act; what it sends arrives",
        steps: &[Partition(Who::ControllersLeader, Way::In), Stay(8.0), Heal, Stay(2.0), Well],
        targets: ETCDS_LEADER,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "partition-server-out",
        about: "nothing that the server whose controllers act sends arrives; it hears everything",
        steps: &[Partition(Who::ControllersLeader, Way::Out), Stay(8.0), Heal, Stay(2.0), Well],
        targets: ETCDS_LEADER,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "quorum-loss",
        about: "two of three servers lose their power: reads that need no quorum go on, writes are refused, all comes back",
        steps: &[PowerOff(Who::Two), WithoutQuorum, Stay(12.0), PowerOn(Who::Same), Well],
        targets: WORKLOAD,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "blackout",
        about: "all servers lose their power and come back: nothing is lost",
        steps: &[PowerOff(Who::AllServers), Stay(3.0), PowerOn(Who::Same), Well],
        targets: WORKLOAD,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "replace-server",
        about: "a server is lost with its disk, and a new machine takes its place",
        steps: &[Destroy(Who::EtcdLeader), A_WHILE, PowerOn(Who::Same), Well],
        targets: ETCDS_LEADER,
        traffic: Traffic::Api,
    },
    Scenario {
        name: "rolling-restart",
        about: "all servers are restarted in order, one after the other",
        steps: &[RollingRestart(Who::AllServers), Well],
        targets: NOT_ETCDS_LEADER,
        traffic: Traffic::Api,
    },
];

/// Scenarios of what keeps state by itself.
const OF_STATE: &[Scenario<'static>] = &[Scenario {
    name: "redis-master-power-off",
    about: "the machine of a redis' master loses its power while a client writes by the sentinels' word",
    steps: &[PowerOff(Who::Same), Stay(15.0), PowerOn(Who::Same), Well],
    targets: &[(redis::STOPPED, 5.0)],
    traffic: Traffic::Redis,
}];

/// Scenarios of cluster DNS.
const OF_DNS: &[Scenario<'static>] = &[
    Scenario {
        name: "dns-power-off",
        about: "a node and then a server lose their power, each with a replica of DNS, maybe",
        steps: &[
            PowerOff(Who::Worker),
            A_WHILE,
            PowerOn(Who::Same),
            Well,
            PowerOff(Who::EtcdLeader),
            A_WHILE,
            PowerOn(Who::Same),
            Well,
        ],
        targets: &[(dns::STOPPED, 0.5)],
        traffic: Traffic::Dns,
    },
    Scenario {
        name: "dns-blackout",
        about: "names are looked up while all servers are without power",
        steps: &[PowerOff(Who::AllServers), A_WHILE, PowerOn(Who::Same), Well],
        targets: &[(dns::STOPPED, 0.5)],
        traffic: Traffic::Dns,
    },
];

impl Scenario<'_> {
    /// Whether somebody has meant everything that happens: then nobody who uses a Service is to notice.
    pub fn is_planned(&self) -> bool {
        let planned = |step: &Step| matches!(step, Drain(_) | RollingReboot(_) | Stay(_) | Well);
        self.traffic == Traffic::Services && self.steps.iter().all(planned)
    }
}

/// All scenarios.
pub fn all() -> impl Iterator<Item = &'static Scenario<'static>> {
    OF_SERVERS.iter().chain(nodes::OF_NODES).chain(OF_STATE).chain(OF_DNS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_undone_and_all_is_well_in_the_end() {
        for scenario in all() {
            let has = |wanted: fn(&Step) -> bool| scenario.steps.iter().any(wanted);
            assert_eq!(scenario.steps.last(), Some(&Well), "{}", scenario.name);
            for (fault, cure) in [
                (has(|s| matches!(s, PowerOff(_) | Destroy(_))), has(|s| matches!(s, PowerOn(_)))),
                (has(|s| matches!(s, Freeze(_))), has(|s| matches!(s, Thaw(_)))),
                (has(|s| matches!(s, Partition(..) | CutFromServers(_) | Loss(_))), has(|s| matches!(s, Heal))),
            ] {
                assert_eq!(fault, cure, "{}", scenario.name);
            }
        }
        let mut names: Vec<&str> = all().map(|s| s.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all().count());
    }
}
