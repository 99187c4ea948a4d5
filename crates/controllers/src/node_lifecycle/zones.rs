//! How fast nodes may be emptied: when much of a zone is gone, the trouble may well be on this side
//! (<https://kubernetes.io/docs/concepts/architecture/nodes/#rate-limits-on-eviction>).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;
use tokio::time::Instant;

use super::Settings;
use crate::runtime::objects::Labels;

/// How much of a zone is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disruption {
    /// Little.
    None,
    /// Much.
    Partial,
    /// All of it.
    Full,
}

/// The zone of a node: its region and zone. Nodes without these labels are a zone together.
pub fn zone_of(node: &Node) -> String {
    let empty = Labels::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let get =
        |names: [&str; 2]| names.iter().find_map(|name| labels.get(*name)).map(String::as_str).unwrap_or_default();
    let region = get(["topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region"]);
    let zone = get(["topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"]);
    format!("{region}/{zone}")
}

/// Whether a node's silence says nothing about its zone (KEP-1143).
pub fn is_excluded(node: &Node) -> bool {
    let label = "node.kubernetes.io/exclude-disruption";
    node.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(label))
}

/// So many nodes of a zone must be gone before that says anything about the zone.
const FEW: usize = 2;

/// How much of a zone with so many nodes is gone.
pub fn disruption(ready: usize, not_ready: usize, settings: &Settings) -> Disruption {
    if ready == 0 && not_ready > 0 {
        Disruption::Full
    } else if not_ready > FEW && not_ready as f64 / (ready + not_ready) as f64 >= settings.unhealthy_share {
        Disruption::Partial
    } else {
        Disruption::None
    }
}

/// One token at a time, and a new one after `1 / rate` seconds.
#[derive(Clone, Copy, Debug)]
struct Limiter {
    rate: f64,
    tokens: f64,
    at: Instant,
}

impl Limiter {
    fn set_rate(&mut self, rate: f64, now: Instant) {
        self.fill(now);
        self.rate = rate;
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * self.rate).min(1.0);
        self.at = now;
    }

    fn take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let may = self.rate > 0.0 && self.tokens >= 1.0;
        if may {
            self.tokens -= 1.0;
        }
        may
    }
}

/// All zones.
#[derive(Debug, Default)]
pub struct Zones {
    zones: BTreeMap<String, Limiter>,
    all_gone: bool,
}

impl Zones {
    /// Takes in how many nodes of each zone are ready, and how many are not.
    pub fn update(&mut self, counts: &BTreeMap<String, (usize, usize)>, settings: &Settings, now: Instant) {
        self.zones.retain(|zone, _| counts.contains_key(zone));
        let mut states = counts.values().filter(|(ready, not)| ready + not > 0);
        let gone = |(ready, not): &(usize, usize)| disruption(*ready, *not, settings) == Disruption::Full;
        self.all_gone = states.clone().next().is_some() && states.all(gone);
        for (zone, (ready, not_ready)) in counts {
            let rate = match disruption(*ready, *not_ready, settings) {
                // A zone that is gone while others are there is really gone.
                Disruption::None | Disruption::Full => settings.rate,
                Disruption::Partial if ready + not_ready > settings.large_zone => settings.secondary_rate,
                Disruption::Partial => 0.0,
            };
            let new = Limiter { rate, tokens: 1.0, at: now };
            self.zones.entry(zone.clone()).or_insert(new).set_rate(rate, now);
        }
    }

    /// Whether nothing is left anywhere. Then it is more likely that it is us who are cut off.
    pub fn all_gone(&self) -> bool {
        self.all_gone
    }

    /// Whether another node of this zone may be emptied now.
    pub fn take(&mut self, zone: &str, now: Instant) -> bool {
        !self.all_gone() && self.zones.get_mut(zone).is_some_and(|limiter| limiter.take(now))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use seawall_quorum::timing::{Profile, Timing};

    use super::*;

    fn settings() -> Settings {
        Settings::of(&Timing::of(Profile::Kubernetes))
    }

    #[test]
    fn how_much_is_gone() {
        let check = |ready, not_ready, expect| assert_eq!(disruption(ready, not_ready, &settings()), expect);
        check(0, 0, Disruption::None);
        check(3, 0, Disruption::None);
        check(0, 1, Disruption::Full);
        check(1, 2, Disruption::None);
        check(1, 3, Disruption::Partial);
        check(3, 3, Disruption::None);
        check(45, 55, Disruption::Partial);
        check(46, 54, Disruption::None);
    }

    #[tokio::test(start_paused = true)]
    async fn rates() {
        let start = Instant::now();
        let check = |counts: &[(&str, usize, usize)], expect: usize, why: &str| {
            let counts = counts.iter().map(|(zone, ready, not)| ((*zone).to_owned(), (*ready, *not))).collect();
            let mut zones = Zones::default();
            let mut taken = 0;
            // A hundred seconds, a look each.
            for second in 0..100 {
                let now = start + Duration::from_secs(second);
                zones.update(&counts, &settings(), now);
                taken += usize::from(zones.take("a", now));
            }
            assert_eq!(taken, expect, "{why}");
        };
        check(&[("a", 9, 1)], 10, "one node in ten seconds, the first at once");
        check(&[("a", 1, 9)], 0, "most of a small zone is gone");
        check(&[("a", 20, 40)], 1, "most of a large one: one in a hundred seconds");
        check(&[("a", 0, 9), ("b", 9, 0)], 10, "a zone is gone, others are there");
        check(&[("a", 0, 9), ("b", 0, 1)], 0, "everything is gone");
        check(&[("b", 1, 1)], 0, "no such zone");
    }
}
