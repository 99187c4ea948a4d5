//! What the gossip counts, and how Prometheus reads it
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).

use std::{fmt::Write as _, time::Duration};

use super::guard::Refused;

/// The limits of the round trips' histogram, in milliseconds.
const ROUND_TRIPS: [f64; 12] = [0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0];

/// What a member counts of its own protocol.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counters {
    /// Probes begun.
    pub probes: u64,
    /// Probes that were answered, by whatever way.
    pub answered: u64,
    /// Probes that were not.
    pub failed: u64,
    /// Probes that say nothing, since we were not given time, or the machine answered that nobody listens.
    pub void: u64,
    /// Probes for which others were asked to probe too.
    pub indirect: u64,
    /// How often we have said of somebody that it does not answer.
    pub accusations: u64,
    /// Suspicions, whoever raised them.
    pub suspicions: u64,
    /// Suspicions that were refuted: they were false.
    pub refuted: u64,
    /// Deaths, whoever declared them.
    pub deaths: u64,
    /// How often we were suspected ourselves, and objected.
    pub accused: u64,
    /// How often we were given up for dead, and came back.
    pub revived: u64,
    /// How often we were not given time to act.
    pub gaps: u64,
    /// How often a machine answered that nobody listens there.
    pub refused: u64,
    /// What went wrong inside.
    pub errors: u64,
    /// Round trips by their duration: each counter has those up to its limit that are not in the one before.
    pub round_trips: [u64; ROUND_TRIPS.len() + 1],
    /// The sum of all round trips.
    pub round_trip_sum: Duration,
}

impl Counters {
    /// A probe was answered after this time.
    pub fn round_trip(&mut self, took: Duration) {
        let ms = took.as_secs_f64() * 1e3;
        let slot = ROUND_TRIPS.iter().position(|limit| ms <= *limit).unwrap_or(ROUND_TRIPS.len());
        self.round_trips[slot] += 1;
        self.round_trip_sum += took;
    }
}

/// Packets that were dropped, by the reason.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drops {
    /// No packets of ours, or of another cluster.
    pub foreign: u64,
    /// Sealed with a key that is not ours.
    pub unknown_key: u64,
    /// Changed on the way, or sealed by somebody else than they say.
    pub forged: u64,
    /// From a member that is not on our list.
    pub unknown_sender: u64,
    /// From another address than the member's.
    pub wrong_address: u64,
    /// Heard before.
    pub repeated: u64,
    /// From a former run of the sender.
    pub former: u64,
    /// Too long under way.
    pub stale: u64,
    /// Authentic, and not to be understood.
    pub malformed: u64,
    /// About somebody who is not on our list.
    pub about_unknown: u64,
    /// Not sent, since the system would not take them.
    pub unsent: u64,
}

impl Drops {
    /// Counts what the guard refused.
    pub fn refused(&mut self, why: Refused) {
        match why {
            Refused::Repeated => self.repeated += 1,
            Refused::Former => self.former += 1,
            Refused::Stale => self.stale += 1,
        }
    }
}

/// All that is counted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// The protocol.
    pub protocol: Counters,
    /// What was dropped.
    pub dropped: Drops,
    /// Packets received, and their bytes.
    pub received: (u64, u64),
    /// Packets sent, and their bytes.
    pub sent: (u64, u64),
    /// Members held for alive, and those of them under suspicion.
    pub members: (usize, usize),
    /// Members that are dead.
    pub dead: usize,
    /// How many times as long as usual others are waited for.
    pub stretch: u32,
}

impl Metrics {
    /// As Prometheus reads it.
    pub fn render(&self) -> String {
        let mut out = String::new();
        let mut family = |name: &str, kind: &str, help: &str, values: &[(&str, u64)]| {
            let _ = writeln!(out, "# HELP seawall_gossip_{name} {help}\n# TYPE seawall_gossip_{name} {kind}");
            for (labels, value) in values {
                let _ = writeln!(out, "seawall_gossip_{name}{labels} {value}");
            }
        };
        let Metrics { protocol: p, dropped: d, .. } = self;
        family(
            "probes_total",
            "counter",
            "Probes by what came of them.",
            &[("{result=\"answered\"}", p.answered), ("{result=\"failed\"}", p.failed), ("{result=\"void\"}", p.void)],
        );
        family("indirect_probes_total", "counter", "Probes for which others were asked too.", &[("", p.indirect)]);
        family(
            "accusations_total",
            "counter",
            "How often this member said that another is silent.",
            &[("", p.accusations)],
        );
        family("suspicions_total", "counter", "Suspicions, whoever raised them.", &[("", p.suspicions)]);
        family("false_suspicions_total", "counter", "Suspicions that were refuted.", &[("", p.refuted)]);
        family("deaths_total", "counter", "Members given up for dead.", &[("", p.deaths)]);
        family("accused_total", "counter", "How often this member was suspected and objected.", &[("", p.accused)]);
        family("revived_total", "counter", "How often this member was given up and came back.", &[("", p.revived)]);
        family("gaps_total", "counter", "How often this member was not given time to act.", &[("", p.gaps)]);
        family("refused_total", "counter", "Answers that nobody listens on a machine.", &[("", p.refused)]);
        family("errors_total", "counter", "What went wrong inside.", &[("", p.errors)]);
        let in_and_out = |received, sent| [("{direction=\"in\"}", received), ("{direction=\"out\"}", sent)];
        family("packets_total", "counter", "Packets.", &in_and_out(self.received.0, self.sent.0));
        family(
            "bytes_total",
            "counter",
            "Bytes in packets, without IP and UDP.",
            &in_and_out(self.received.1, self.sent.1),
        );
        family(
            "dropped_total",
            "counter",
            "Packets dropped, by the reason.",
            &[
                ("{reason=\"foreign\"}", d.foreign),
                ("{reason=\"unknown-key\"}", d.unknown_key),
                ("{reason=\"forged\"}", d.forged),
                ("{reason=\"unknown-sender\"}", d.unknown_sender),
                ("{reason=\"wrong-address\"}", d.wrong_address),
                ("{reason=\"repeated\"}", d.repeated),
                ("{reason=\"former\"}", d.former),
                ("{reason=\"stale\"}", d.stale),
                ("{reason=\"malformed\"}", d.malformed),
                ("{reason=\"about-unknown\"}", d.about_unknown),
                ("{reason=\"unsent\"}", d.unsent),
            ],
        );
        let (alive, suspected) = self.members;
        family(
            "members",
            "gauge",
            "Members by what is thought of them.",
            &[
                ("{verdict=\"alive\"}", alive.saturating_sub(suspected) as u64),
                ("{verdict=\"suspect\"}", suspected as u64),
                ("{verdict=\"dead\"}", self.dead as u64),
            ],
        );
        family(
            "stretch",
            "gauge",
            "How many times as long as usual others are waited for.",
            &[("", u64::from(self.stretch))],
        );
        let name = "seawall_gossip_round_trip_seconds";
        let _ = writeln!(out, "# HELP {name} From a probe to its answer.\n# TYPE {name} histogram");
        let mut sum = 0;
        for (slot, count) in p.round_trips.iter().enumerate() {
            sum += count;
            let limit = ROUND_TRIPS.get(slot).map_or("+Inf".to_owned(), |ms| (ms / 1e3).to_string());
            let _ = writeln!(out, "{name}_bucket{{le=\"{limit}\"}} {sum}");
        }
        let _ = writeln!(out, "{name}_sum {}\n{name}_count {sum}", p.round_trip_sum.as_secs_f64());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_can_read_it() {
        let mut metrics = Metrics { members: (7, 2), sent: (3, 400), ..Metrics::default() };
        for ms in [1, 1, 30, 5000] {
            metrics.protocol.round_trip(Duration::from_millis(ms));
        }
        let text = metrics.render();
        for line in [
            "seawall_gossip_bytes_total{direction=\"out\"} 400",
            "seawall_gossip_members{verdict=\"alive\"} 5",
            "seawall_gossip_round_trip_seconds_bucket{le=\"0.0005\"} 0",
            "seawall_gossip_round_trip_seconds_bucket{le=\"0.001\"} 2",
            "seawall_gossip_round_trip_seconds_bucket{le=\"0.05\"} 3",
            "seawall_gossip_round_trip_seconds_bucket{le=\"+Inf\"} 4",
            "seawall_gossip_round_trip_seconds_sum 5.032",
            "seawall_gossip_round_trip_seconds_count 4",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        let families = text.lines().filter(|l| l.starts_with("# TYPE")).count();
        assert_eq!(families, text.lines().filter(|l| l.starts_with("# HELP")).count());
    }
}
