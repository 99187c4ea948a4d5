//! The probes of a worker's containers.

use std::{collections::HashSet, time::Duration};

use jiff::Timestamp;

use super::Worker;
use crate::{
    container,
    events::Kind,
    pod::{self, Class, machine, observed::State},
    probe,
};

impl Worker {
    pub(super) fn take_report(&mut self, report: probe::Report) {
        match report {
            probe::Report::Failure { name, kind, message } => {
                let text = format!("{} probe failed: {message}", kind.title());
                self.agent.events.container(&self.pod, &name, Kind::Warning, "Unhealthy", text);
            }
            probe::Report::Verdict { container, kind, healthy } => {
                let health = self.facts.health.entry(container).or_default();
                match kind {
                    probe::Kind::Startup => health.startup = Some(healthy),
                    probe::Kind::Readiness => health.ready = Some(healthy),
                    probe::Kind::Liveness => health.live = Some(healthy),
                }
            }
        }
    }

    /// Starts the probers that should run and stops the others.
    pub(super) fn sync_probers(&mut self, now: Timestamp) {
        let Some(spec) = self.pod.spec.clone() else { return };
        let stopping = self.facts.stop_began.is_some();
        let mut wanted = HashSet::new();
        for c in self.observed.containers.iter().filter(|c| c.state == State::Running) {
            let Some((class, container)) = pod::find_container(&spec, &c.name) else { continue };
            let Some(health) = self.facts.health.get(&c.id).copied() else { continue };
            if !matches!(class, Class::Main | Class::Sidecar) || self.facts.killing.contains_key(&c.id) {
                continue;
            }
            let up = machine::started(&container, c, &self.facts);
            let adopted = !self.started_here.contains(&c.id);
            for (kind, probe, active, verdict) in [
                (probe::Kind::Startup, &container.startup_probe, health.startup.is_none() && !stopping, None),
                (probe::Kind::Readiness, &container.readiness_probe, up, health.ready),
                (probe::Kind::Liveness, &container.liveness_probe, up && !stopping, adopted.then_some(true)),
            ] {
                let Some(probe) = probe.clone().filter(|_| active) else { continue };
                let key = (c.id.clone(), kind);
                if !self.probing.contains_key(&key) {
                    let target = container::target(&self.agent, &container, &c.id, &self.observed, &spec);
                    let age = c
                        .started
                        .map_or(Duration::ZERO, |s| Duration::try_from(now.duration_since(s)).unwrap_or_default());
                    let run = probe::run(c.name.clone(), kind, probe, target, age, verdict, self.reports.0.clone());
                    self.probing.insert(key.clone(), self.probers.spawn(run));
                }
                wanted.insert(key);
            }
        }
        self.probing.retain(|key, handle| {
            let keep = wanted.contains(key);
            if !keep {
                handle.abort();
            }
            keep
        });
        while self.probers.try_join_next().is_some() {}
    }
}
