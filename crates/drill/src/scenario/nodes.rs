//! Scenarios of nodes: what those feel who use the Services on them.

use super::{Scenario, Step, Step::*, Traffic, Who};
use crate::lab::Way;

/// How long it may take until everything that ran on a dead node runs elsewhere.
const REPLACED: Step = Stay(32.0);

/// What the death of a node may cost, in the fast profile.
const DEATH: &[(&str, f64)] = &[
    ("not ready", 1.5),
    ("new connections fail", 1.0),
    ("open connections hang", 2.0),
    ("datagrams lost", 1.5),
    ("web replaced", 10.0),
    ("stateful replaced", 30.0),
];
/// And while there is no control plane: nothing is replaced, and nobody calls the node anything.
const WITHOUT_SERVERS: &[(&str, f64)] =
    &[("new connections fail", 1.0), ("open connections hang", 2.0), ("datagrams lost", 1.5)];
const NONE: &[(&str, f64)] = &[];

const fn of(
    name: &'static str,
    about: &'static str,
    steps: &'static [Step],
    targets: &'static [(&'static str, f64)],
) -> Scenario<'static> {
    Scenario { name, about, steps, targets, traffic: Traffic::Services }
}

/// All of them.
pub const OF_NODES: &[Scenario<'static>] = &[
    of(
        "node-power-off",
        "a node with half of a web and a stateful pod loses its power",
        &[PowerOff(Who::Worker), REPLACED, PowerOn(Who::Worker), Well],
        DEATH,
    ),
    of(
        "node-power-off-control-plane-down",
        "all servers lose their power, and then a node does",
        &[
            PowerOff(Who::AllServers),
            Stay(3.0),
            PowerOff(Who::Worker),
            Stay(8.0),
            PowerOn(Who::AllServers),
            PowerOn(Who::Worker),
            Well,
        ],
        WITHOUT_SERVERS,
    ),
    of(
        "node-freeze-10",
        "a node stands still for 10 s and goes on",
        &[Freeze(Who::Worker), Stay(10.0), Thaw(Who::Worker), Well],
        WITHOUT_SERVERS,
    ),
    of(
        "node-freeze-60",
        "a node stands still for a minute, and then believes that it is still then",
        &[Freeze(Who::Worker), Stay(60.0), Thaw(Who::Worker), Well],
        DEATH,
    ),
    of(
        "node-partition-from-servers",
        "a node reaches its neighbours and no server",
        &[CutFromServers(Who::Worker), Stay(40.0), Heal, Well],
        &[("stateful replaced", 40.0)],
    ),
    of(
        "node-partition",
        "a node is cut off from everyone, and its pods run on",
        &[Partition(Who::Worker, Way::Both), REPLACED, Heal, Well],
        DEATH,
    ),
    of(
        "node-partition-in",
        "nothing reaches a node; what it sends arrives",
        &[Partition(Who::Worker, Way::In), REPLACED, Heal, Well],
        NONE,
    ),
    of(
        "node-flap",
        "a node loses its power and comes back, three times",
        &[
            PowerOff(Who::Worker),
            Stay(3.0),
            PowerOn(Who::Worker),
            Well,
            PowerOff(Who::Worker),
            Stay(3.0),
            PowerOn(Who::Worker),
            Well,
            PowerOff(Who::Worker),
            Stay(3.0),
            PowerOn(Who::Worker),
            Well,
        ],
        NONE,
    ),
    of("drain-all", "every node is emptied in turn, as for an upgrade", &[Drain(Who::Workers), Well], NONE),
    of(
        "reboot-all",
        "every node is rebooted in turn, its pods having left it",
        &[RollingReboot(Who::Workers), Well],
        NONE,
    ),
    of("loss-5-percent", "one packet in twenty is lost, for a minute", &[Loss(5.0), Stay(60.0), Heal, Well], NONE),
    of(
        "loss-and-starved",
        "one packet in twenty is lost, and now and then four busy programs run for each CPU, for two minutes",
        &[Loss(5.0), StarveAtTimes(4, 120.0), Heal, Well],
        NONE,
    ),
    of("cpu-starved", "eight busy programs for each CPU, for half a minute", &[Starve(8, 30.0), Well], NONE),
];
