//! What the service proxy counts, and how Prometheus reads it.

use std::{
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// What a proxy counts. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    applied: AtomicU64,
    failed: AtomicU64,
    micros: AtomicU64,
    buried: AtomicU64,
    repaired: AtomicU64,
    dead: AtomicU64,
    services: AtomicU64,
    slices: AtomicU64,
}

impl Metrics {
    /// The kernel has taken rules, after so long.
    pub(super) fn applied(&self, took: Duration) {
        self.counts.applied.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.counts.micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// It has not.
    pub(super) fn failed(&self) {
        self.counts.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// So many endpoints were put out of reach ahead of all other rules.
    pub(super) fn buried(&self, targets: usize) {
        self.counts.buried.fetch_add(targets as u64, Ordering::Relaxed);
    }

    /// Somebody had changed the table.
    pub(super) fn repaired(&self) {
        self.counts.repaired.fetch_add(1, Ordering::Relaxed);
    }

    /// What is known: endpoints that are dead, Services, EndpointSlices.
    pub(super) fn known(&self, dead: usize, services: usize, slices: usize) {
        for (gauge, value) in
            [(&self.counts.dead, dead), (&self.counts.services, services), (&self.counts.slices, slices)]
        {
            gauge.store(value as u64, Ordering::Relaxed);
        }
    }

    /// The counters, for Prometheus.
    pub fn render(&self) -> String {
        let counts = &self.counts;
        let mut out = String::new();
        for (name, kind, help, value) in [
            ("rules_applied_total", "counter", "How often the kernel took rules.", &counts.applied),
            ("rules_failed_total", "counter", "How often it did not.", &counts.failed),
            ("rules_repaired_total", "counter", "How often somebody else had changed the rules.", &counts.repaired),
            (
                "endpoints_buried_total",
                "counter",
                "Endpoints of dead machines put out of reach at once.",
                &counts.buried,
            ),
            ("endpoints_dead", "gauge", "Endpoints of dead machines that are out of reach.", &counts.dead),
            ("services", "gauge", "Services that are known.", &counts.services),
            ("endpoint_slices", "gauge", "EndpointSlices that are known.", &counts.slices),
        ] {
            let value = value.load(Ordering::Relaxed);
            let _ = writeln!(
                out,
                "# HELP seawall_proxy_{name} {help}\n# TYPE seawall_proxy_{name} {kind}\nseawall_proxy_{name} {value}"
            );
        }
        let seconds = Duration::from_micros(counts.micros.load(Ordering::Relaxed)).as_secs_f64();
        let name = "seawall_proxy_rules_seconds_total";
        let _ = writeln!(
            out,
            "# HELP {name} The time that planning and applying rules took.\n# TYPE {name} counter\n{name} {seconds}"
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_count_together() {
        let metrics = Metrics::default();
        let other = metrics.clone();
        other.applied(Duration::from_millis(1500));
        other.applied(Duration::from_millis(500));
        other.known(1, 20, 30);
        let text = metrics.render();
        for line in [
            "seawall_proxy_rules_applied_total 2",
            "seawall_proxy_rules_seconds_total 2",
            "seawall_proxy_endpoints_dead 1",
            "seawall_proxy_services 20",
            "# TYPE seawall_proxy_endpoint_slices gauge",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
