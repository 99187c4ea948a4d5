//! What to do next for a StatefulSet: the rules of
//! <https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/>, without any I/O.
//!
//! With `OrderedReady` one thing is done at a time, and the next one when its effect is seen: pods come in order of their
//! numbers and go in reverse. With `Parallel` everything is done that can be; updates are rolled out one by one all the
//! same.
//!
//! A number is given to a new pod only when the object of the old one is gone. That alone keeps two of them apart, so
//! nobody may remove the object before the pod has ended ([`crate::fencing`]).

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        apps::v1::{ControllerRevision, StatefulSet, StatefulSetStatus},
        core::v1::{PersistentVolumeClaim, Pod},
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};

use super::pod::{self, in_range, is_healthy, is_running_and_ready, ordinal, revision_of, start, wanted};
use crate::{
    context::{delay, sooner},
    history,
    runtime::objects::{Labels, is_available, is_deleting, name, phase, scaled},
};

/// What a plan is made from.
pub struct Input<'a> {
    /// The set.
    pub set: &'a StatefulSet,
    /// Its pods.
    pub pods: &'a [Arc<Pod>],
    /// The revision that was rolled out last.
    pub current: &'a ControllerRevision,
    /// The revision of the set's template.
    pub update: &'a ControllerRevision,
    /// A claim of the set's namespace.
    pub claim: &'a dyn Fn(&str) -> Option<Arc<PersistentVolumeClaim>>,
    /// The time.
    pub now: Timestamp,
}

/// Why a pod is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It has failed, and is made anew.
    Failed,
    /// It has ended by itself, and is made anew.
    Ended,
    /// There are too many.
    Surplus,
    /// It is of another revision.
    Outdated,
}

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Creates a claim.
    CreateClaim(Box<PersistentVolumeClaim>),
    /// Changes who owns a claim.
    OwnClaim(Arc<PersistentVolumeClaim>, Vec<OwnerReference>),
    /// Creates a pod.
    Create(Box<Pod>),
    /// Deletes a pod.
    Delete(Arc<Pod>, Why),
    /// Sets labels of a pod.
    Label(Arc<Pod>, Labels),
}

/// What to do, the status, and when to look again.
#[derive(Debug)]
pub struct Plan {
    /// In this order. What fails ends the pass.
    pub actions: Vec<Action>,
    /// The status.
    pub status: StatefulSetStatus,
    /// When a pod will have been ready for long enough.
    pub again: Option<Duration>,
}

/// Decides.
pub fn plan(input: &Input<'_>) -> Plan {
    let mut work = Work {
        input,
        ordered: input.set.spec.pod_management_policy.as_deref() != Some("Parallel"),
        plan: Plan { actions: Vec::new(), status: StatefulSetStatus::default(), again: None },
    };
    work.count();
    if !is_deleting(input.set) {
        work.decide();
    }
    work.complete();
    work.plan
}

struct Work<'a> {
    input: &'a Input<'a>,
    ordered: bool,
    plan: Plan,
}

impl Work<'_> {
    /// The status, as things are.
    fn count(&mut self) {
        let Input { set, pods, current, update, .. } = *self.input;
        let old = set.status.clone().unwrap_or_default();
        let count = |holds: &dyn Fn(&Pod) -> bool| pods.iter().filter(|pod| holds(pod)).count() as i32;
        let of = |revision: &str| count(&|pod| !is_deleting(pod) && revision_of(pod) == revision);
        self.plan.status = StatefulSetStatus {
            observed_generation: set.metadata.generation,
            replicas: pods.len() as i32,
            ready_replicas: Some(count(&is_running_and_ready)).filter(|n| *n > 0),
            available_replicas: Some(count(&|pod| self.is_available(pod).is_ok_and(|yes| yes))),
            current_replicas: Some(of(name(current))).filter(|n| *n > 0),
            updated_replicas: Some(of(name(update))).filter(|n| *n > 0),
            current_revision: Some(name(current).to_owned()),
            update_revision: Some(name(update).to_owned()),
            collision_count: Some(old.collision_count.unwrap_or(0)),
            conditions: old.conditions,
        };
    }

    /// When everything is of the new revision, it is the current one.
    fn complete(&mut self) {
        let (set, status) = (self.input.set, &mut self.plan.status);
        let all = |n: Option<i32>| i64::from(n.unwrap_or(0)) == wanted(set);
        if self.plan.actions.is_empty()
            && rolls(set)
            && all(Some(status.replicas))
            && all(status.updated_replicas)
            && all(status.ready_replicas)
        {
            status.current_replicas = status.updated_replicas;
            status.current_revision.clone_from(&status.update_revision);
        }
    }

    fn is_available(&self, pod: &Pod) -> Result<bool, jiff::SignedDuration> {
        match phase(pod) == "Running" {
            true => is_available(pod, self.input.set.spec.min_ready_seconds.unwrap_or(0), self.input.now),
            false => Ok(false),
        }
    }

    /// Whether a pod is available; if it will be by time alone, that is when to look again.
    fn available(&mut self, pod: &Pod) -> bool {
        match self.is_available(pod) {
            Ok(yes) => yes,
            Err(missing) => {
                self.plan.again = sooner(self.plan.again, Some(delay(missing)));
                false
            }
        }
    }

    fn decide(&mut self) {
        let (set, first) = (self.input.set, start(self.input.set));
        let mut numbered: Vec<(i64, &Arc<Pod>)> =
            self.input.pods.iter().filter_map(|pod| Some((ordinal(set, pod)?, pod))).collect();
        numbered.sort_by_key(|(number, _)| *number);
        let replicas: Vec<(i64, Option<&Arc<Pod>>)> = (first..first + wanted(set))
            .map(|number| (number, numbered.iter().find(|(n, _)| *n == number).map(|(_, pod)| *pod)))
            .collect();
        let condemned: Vec<(i64, &Arc<Pod>)> =
            numbered.iter().rev().filter(|(number, _)| !in_range(set, *number)).copied().collect();
        // The lowest number that is not well may be taken away though those before it wait.
        let unwell = numbered.iter().find(|(_, pod)| !is_healthy(pod)).map(|(number, _)| *number);
        for (number, pod) in &replicas {
            if self.replica(*number, *pod) {
                return;
            }
        }
        for (number, pod) in &condemned {
            self.own_claims(*number, Some(pod));
        }
        for (number, pod) in condemned {
            if self.condemned(number, pod, unwell) {
                return;
            }
        }
        self.update(&replicas);
    }

    /// Sees to one number. True if everything else has to wait.
    fn replica(&mut self, number: i64, pod: Option<&Arc<Pod>>) -> bool {
        let Some(pod) = pod else {
            return self.create(number) && self.ordered;
        };
        match phase(pod) {
            // A new one is made when this one's object is gone.
            "Failed" | "Succeeded" => {
                if !is_deleting(&**pod) {
                    let why = if phase(pod) == "Failed" { Why::Failed } else { Why::Ended };
                    self.plan.actions.push(Action::Delete(pod.clone(), why));
                }
                return self.ordered;
            }
            "Pending" => self.create_claims(number),
            _ => {}
        }
        if self.ordered && (!is_healthy(pod) || !self.available(pod)) {
            return true;
        }
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        let wrong: Labels = pod::identity(name(&**pod), number)
            .into_iter()
            .filter(|(key, value)| labels.get(key) != Some(value))
            .collect();
        if !wrong.is_empty() && !is_deleting(&**pod) {
            self.plan.actions.push(Action::Label(pod.clone(), wrong));
        }
        self.own_claims(number, Some(pod));
        false
    }

    fn create(&mut self, number: i64) -> bool {
        let Input { set, current, update, claim, .. } = *self.input;
        for wanted in pod::claims(set, number) {
            // What goes with the pod before must be gone first.
            if claim(name(&wanted)).is_some_and(|claim| pod::is_stale(set, &claim, number, None)) {
                return true;
            }
        }
        let revision = if self.keeps_current(number) { current } else { update };
        // A revision that says nothing we understand is not one that we can make pods of.
        let template = history::template(revision).unwrap_or_else(|| set.spec.template.clone());
        self.create_claims(number);
        self.own_claims(number, None);
        self.plan.actions.push(Action::Create(Box::new(pod::make(set, &template, name(revision), number))));
        true
    }

    /// Whether a new pod with this number is of the revision before: it is below the partition.
    fn keeps_current(&self, number: i64) -> bool {
        let set = self.input.set;
        rolls(set) && number < start(set) + partition(set)
    }

    fn create_claims(&mut self, number: i64) {
        for claim in pod::claims(self.input.set, number) {
            if (self.input.claim)(name(&claim)).is_none() {
                let mut claim = claim;
                if let Some(owners) = pod::retained(self.input.set, &claim, number, None) {
                    claim.metadata.owner_references = Some(owners);
                }
                self.plan.actions.push(Action::CreateClaim(Box::new(claim)));
            }
        }
    }

    fn own_claims(&mut self, number: i64, pod: Option<&Arc<Pod>>) {
        for claim in pod::claims(self.input.set, number) {
            let Some(claim) = (self.input.claim)(name(&claim)) else { continue };
            if let Some(owners) = pod::retained(self.input.set, &claim, number, pod) {
                self.plan.actions.push(Action::OwnClaim(claim, owners));
            }
        }
    }

    /// Takes one number away. True if everything else has to wait.
    fn condemned(&mut self, number: i64, pod: &Arc<Pod>, unwell: Option<i64>) -> bool {
        if is_deleting(&**pod) {
            return self.ordered;
        }
        let waits = unwell != Some(number) && (!is_running_and_ready(pod) || !self.available(pod));
        if self.ordered && waits {
            return true;
        }
        self.plan.actions.push(Action::Delete(pod.clone(), Why::Surplus));
        self.ordered
    }

    /// Brings the pods to the set's template: from the highest number down, and not beyond the partition.
    fn update(&mut self, replicas: &[(i64, Option<&Arc<Pod>>)]) {
        let set = self.input.set;
        if !rolls(set) {
            return;
        }
        let update = name(self.input.update);
        let most = max_unavailable(set);
        let mut unavailable = 0;
        if most > 1 {
            for (_, pod) in replicas {
                let well = pod.is_some_and(|pod| is_healthy(pod) && self.available(pod));
                unavailable += i64::from(!well);
            }
        }
        for (_, pod) in replicas.iter().rev().take_while(|(number, _)| *number >= start(set) + partition(set)) {
            let Some(pod) = pod else {
                // It has been made a moment ago.
                if most > 1 {
                    continue;
                }
                return;
            };
            let well = is_healthy(pod) && self.available(pod);
            if revision_of(pod) != update && !is_deleting(&***pod) {
                // One that is not available anyway costs nothing.
                if most > 1 && well && unavailable >= most {
                    return;
                }
                self.plan.actions.push(Action::Delete((*pod).clone(), Why::Outdated));
                if most == 1 {
                    return;
                }
                unavailable += i64::from(well);
            } else if most == 1 && !well {
                return;
            }
        }
    }
}

fn rolls(set: &StatefulSet) -> bool {
    set.spec.update_strategy.as_ref().and_then(|s| s.type_.as_deref()) != Some("OnDelete")
}

fn partition(set: &StatefulSet) -> i64 {
    let rolling = set.spec.update_strategy.as_ref().and_then(|s| s.rolling_update.as_ref());
    rolling.and_then(|r| r.partition).unwrap_or(0).max(0).into()
}

/// How many may be unavailable at the same time during an update (KEP-961).
fn max_unavailable(set: &StatefulSet) -> i64 {
    let rolling = set.spec.update_strategy.as_ref().and_then(|s| s.rolling_update.as_ref());
    let total = i32::try_from(wanted(set)).unwrap_or(i32::MAX);
    scaled(rolling.and_then(|r| r.max_unavailable.as_ref()), 1, total, false).max(1).into()
}

/// The names of the revisions that something is made from.
pub(super) fn used(pods: &[Arc<Pod>], status: &StatefulSetStatus) -> BTreeSet<String> {
    let named = pods.iter().map(|pod| revision_of(pod).to_owned());
    named.chain(status.current_revision.clone()).chain(status.update_revision.clone()).collect()
}
