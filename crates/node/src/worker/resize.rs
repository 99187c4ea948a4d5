//! A worker whose pod's resources are changed ([`crate::pod::resize`]): it asks the node for them, and has cgroups follow.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::{Pod, ResourceRequirements};
use tokio::sync::watch;

use super::{Done, Worker};
use crate::{
    Agent,
    admission::{self, Kept, fit::Taken},
    events::Kind,
    operations,
    pod::{
        self,
        machine::{self, Op},
        qos::{self, Limits, Qos},
        resize,
    },
};

/// As upstream: what has CPUs for itself keeps what it has.
const WITH_STATIC_CPUS: &str = "Resize is infeasible for Guaranteed Pods alongside CPU Manager static policy";

/// What a worker knows about what its pod has been given.
pub(super) struct Resizing {
    /// What has been given; `None` before it was asked for.
    pub(super) kept: Option<Kept>,
    /// As it stands on the disk.
    written: Option<Kept>,
    /// Told when something becomes free.
    pub(super) freed: watch::Receiver<u64>,
    /// It has been given something else, and not everything has followed.
    under_way: bool,
    /// The last refusal that was told: why, and of which generation.
    told: Option<(&'static str, Option<i64>)>,
}

impl Resizing {
    pub(super) fn new(agent: &Agent, uid: &str) -> Resizing {
        let kept = Kept::read(&agent.config.data_dir, uid);
        Resizing { written: kept.clone(), kept, freed: agent.ledger.freed(), under_way: false, told: None }
    }
}

impl Worker {
    /// Takes up what stands on the disk.
    pub(super) fn resume(&mut self) {
        if let Some(kept) = &self.resizing.kept {
            self.facts.resize.actuated.clone_from(&kept.given.actuated);
            self.fit_to_given();
        }
    }

    /// The pod changed, or what it has been given.
    pub(super) fn fit_to_given(&mut self) {
        let given = self.resizing.kept.as_ref().filter(|_| !self.is_static).map(|kept| &kept.given.allocated);
        self.given = match (given, &self.pod.spec) {
            (Some(given), Some(spec)) if resize::desired(spec) != *given => Arc::new(resize::with(&self.pod, given)),
            _ => Arc::clone(&self.pod),
        };
    }

    /// Asks the node for what the pod should have, if it has been given something else.
    pub(super) fn be_resized(&mut self) {
        self.resizing.freed.mark_unchanged();
        let over = machine::is_ending(&self.pod, &self.facts)
            || machine::outcome(&self.pod, &self.observed, &self.facts).is_some();
        let (Some(kept), Some(spec)) = (&mut self.resizing.kept, &self.pod.spec) else { return };
        if over || self.is_static || self.facts.waits {
            return;
        }
        let (events, generation) = (&self.agent.events, self.pod.metadata.generation);
        let desired = resize::desired(spec);
        if kept.given.allocated == desired {
            (self.facts.resize.pending, self.resizing.told) = (None, None);
        } else {
            let taken = Taken::by(spec);
            let whole = self.agent.cpus.is_static() && qos::class(&self.pod) == Qos::Guaranteed;
            let result = match whole {
                true => Err(("Infeasible", WITH_STATIC_CPUS.to_owned())),
                false => self.agent.ledger.resize(&self.uid, &taken, &admission::node(&self.agent)),
            };
            match result {
                Ok(()) => {
                    (kept.given.allocated, kept.taken) = (desired, taken);
                    let facts = &mut self.facts.resize;
                    (facts.pending, facts.error, facts.generation) = (None, None, generation);
                    (self.resizing.told, self.resizing.under_way) = (None, true);
                    self.facts.retry.remove(&Op::Resize);
                    let message = resize::message("Pod resize started", &self.pod, None);
                    events.pod(&self.pod, Kind::Normal, "ResizeStarted", message);
                    self.fit_to_given();
                }
                Err((reason, message)) => {
                    let told = Some((reason, generation));
                    if std::mem::replace(&mut self.resizing.told, told) != told {
                        let text = resize::message(&format!("Pod resize {reason}"), &self.pod, Some(&message));
                        events.pod(&self.pod, Kind::Warning, format!("Resize{reason}"), text);
                    }
                    self.facts.resize.pending = Some((reason, message));
                }
            }
        }
        if self.resizing.under_way && !resize::is_under_way(&self.given, &self.observed, &self.facts.resize) {
            self.resizing.under_way = false;
            let message = resize::message("Pod resize completed", &self.given, None);
            self.agent.events.pod(&self.pod, Kind::Normal, "ResizeCompleted", message);
        }
    }

    pub(super) fn spawn_resize(&mut self, pod: Arc<Pod>) {
        let (steps, after) = resize::plan(&pod, &self.observed, &self.facts.resize);
        let (agent, limits) = (Arc::clone(&self.agent), qos::pod_limits(&pod));
        self.spawn(Some(Op::Resize), async move {
            let mut applied = None;
            let result = operations::resize(&agent, &pod, steps, &mut applied).await;
            match result {
                Ok(()) => Done::Resized(Ok(after), Some(limits)),
                Err(message) => Done::Resized(Err(message), applied),
            }
        });
    }

    pub(super) fn resized(&mut self, after: BTreeMap<String, ResourceRequirements>, limits: Option<Limits>) {
        let facts = &mut self.facts.resize;
        facts.actuated.extend(after);
        (facts.cgroup, facts.error) = (limits.or(facts.cgroup), None);
    }

    pub(super) fn not_resized(&mut self, message: String, limits: Option<Limits>) {
        // What has grown has room for containers that start meanwhile.
        self.facts.resize.cgroup = limits.or(self.facts.resize.cgroup);
        tracing::info!(pod = pod::name(&self.pod), message, "the pod's resources cannot be changed yet");
        if self.facts.resize.error.as_ref() != Some(&message) {
            let text = resize::message("Pod resize error", &self.given, Some(&message));
            self.agent.events.pod(&self.pod, Kind::Warning, "ResizeError", text);
        }
        self.facts.resize.error = Some(message);
    }

    /// Writes down what the pod has been given, and what containers were made with, if that has changed.
    pub(super) fn keep(&mut self) {
        let Some(kept) = &mut self.resizing.kept else { return };
        if self.facts.gone || self.facts.torn_down || self.facts.busy.contains(&Op::Teardown) {
            return;
        }
        kept.given.actuated.clone_from(&self.facts.resize.actuated);
        if self.resizing.written.as_ref() == Some(kept) {
            return;
        }
        match kept.write(&self.agent.config.data_dir, &self.uid) {
            Ok(()) => self.resizing.written = Some(kept.clone()),
            Err(error) => {
                tracing::warn!(pod = pod::name(&self.pod), "cannot write down what the pod was given: {error}")
            }
        }
    }
}
