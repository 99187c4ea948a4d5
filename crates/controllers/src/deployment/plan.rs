//! What to do next for a deployment: the rules of
//! <https://kubernetes.io/docs/concepts/workloads/controllers/deployment/>, without any I/O.
//!
//! A pass changes replica sets in one direction at most, then waits to see the effect: new replicas are added before
//! old ones are taken away, and each pass looks at what is really available.

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::{Deployment, DeploymentStatus, ReplicaSet},
    core::v1::Pod,
};

use super::{conditions, revision};
use crate::runtime::objects::{Labels, annotation, created, is_deleting, is_finished, name, scaled, uid};

/// What a plan is made from.
pub struct Input<'a> {
    /// The deployment.
    pub deployment: &'a Deployment,
    /// The replica sets that are its own.
    pub sets: &'a [Arc<ReplicaSet>],
    /// All pods of a replica set, also those that are ending.
    pub pods: &'a dyn Fn(&ReplicaSet) -> Vec<Arc<Pod>>,
    /// The time.
    pub now: Timestamp,
}

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Sets annotations of the deployment.
    Annotate(Labels),
    /// Creates the replica set of a new template.
    Create(Box<ReplicaSet>),
    /// Changes a replica set.
    Update {
        /// As it was.
        set: Arc<ReplicaSet>,
        /// How many replicas it should have.
        replicas: i32,
        /// All its annotations.
        annotations: Labels,
        /// Its new `minReadySeconds`, if that changes.
        min_ready_seconds: Option<i32>,
    },
    /// Deletes a replica set that history need not keep.
    Delete(Arc<ReplicaSet>),
}

/// What to do, the status to write afterwards, and when to look again.
#[derive(Debug)]
pub struct Plan {
    /// In this order.
    pub actions: Vec<Action>,
    /// The status.
    pub status: DeploymentStatus,
    /// When the deadline of progress has to be checked.
    pub again: Option<Duration>,
}

pub(super) fn is_recreate(deployment: &Deployment) -> bool {
    strategy(deployment).and_then(|s| s.type_.as_deref()) == Some("Recreate")
}

fn strategy(deployment: &Deployment) -> Option<&k8s_openapi::api::apps::v1::DeploymentStrategy> {
    deployment.spec.strategy.as_ref()
}

pub(super) fn wanted(deployment: &Deployment) -> i32 {
    deployment.spec.replicas.unwrap_or(1)
}

/// Surge is rounded up and unavailability down; when both come to nothing, one replica may be unavailable, else
/// nothing could ever move.
fn fenceposts(deployment: &Deployment) -> (i32, i32) {
    let rolling = strategy(deployment).and_then(|s| s.rolling_update.as_ref());
    let total = wanted(deployment);
    let surge = scaled(rolling.and_then(|r| r.max_surge.as_ref()), 0, total, true);
    let unavailable = scaled(rolling.and_then(|r| r.max_unavailable.as_ref()), 0, total, false);
    if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable) }
}

pub(super) fn max_unavailable(deployment: &Deployment) -> i32 {
    if is_recreate(deployment) || wanted(deployment) == 0 {
        0
    } else {
        fenceposts(deployment).1.min(wanted(deployment))
    }
}

fn max_surge(deployment: &Deployment) -> i32 {
    if is_recreate(deployment) { 0 } else { fenceposts(deployment).0 }
}

fn replicas(set: &ReplicaSet) -> i32 {
    set.spec.replicas.unwrap_or(1)
}

fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

/// Decides.
pub fn plan(input: &Input<'_>) -> Plan {
    let mut work = Work::new(input);
    let deployment = input.deployment;
    if is_deleting(deployment) {
        return work.finish_counting();
    }
    conditions::note_pause(deployment, &mut work.status, input.now);
    let paused = deployment.spec.paused.unwrap_or(false);
    if paused || work.is_scaling() {
        work.sync_newest(false);
        work.scale_proportionally();
        if paused {
            work.clean_up();
        }
        return work.finish_counting();
    }
    if is_recreate(deployment) {
        work.recreate()
    } else {
        work.roll()
    }
    work.finish_rollout()
}

struct Work<'a> {
    input: &'a Input<'a>,
    deployment: Deployment,
    status: DeploymentStatus,
    newest: Option<Arc<ReplicaSet>>,
    /// By creation.
    old: Vec<Arc<ReplicaSet>>,
    actions: Vec<Action>,
    /// Changes of replica sets by name; one patch each in the end.
    updates: BTreeMap<String, Action>,
    /// Sets as they were, by name: what a patch is made against.
    before: BTreeMap<String, Arc<ReplicaSet>>,
}

impl<'a> Work<'a> {
    fn new(input: &'a Input<'a>) -> Work<'a> {
        let newest = revision::newest(input.deployment, input.sets);
        let is_newest = |set: &&Arc<ReplicaSet>| newest.as_ref().is_some_and(|n| uid(&**n) == uid(&***set));
        let mut old: Vec<_> = input.sets.iter().filter(|set| !is_newest(set)).cloned().collect();
        old.sort_by(|a, b| created(&**a).cmp(&created(&**b)).then_with(|| name(&**a).cmp(name(&**b))));
        Work {
            input,
            deployment: input.deployment.clone(),
            status: input.deployment.status.clone().unwrap_or_default(),
            newest,
            old,
            actions: Vec::new(),
            updates: BTreeMap::new(),
            before: input.sets.iter().map(|set| (name(&**set).to_owned(), set.clone())).collect(),
        }
    }

    fn all(&self) -> Vec<Arc<ReplicaSet>> {
        self.old.iter().chain(&self.newest).cloned().collect()
    }

    fn active(&self) -> Vec<Arc<ReplicaSet>> {
        self.all().into_iter().filter(|set| replicas(set) > 0).collect()
    }

    fn total(&self) -> i32 {
        self.all().iter().map(|set| replicas(set)).sum()
    }

    /// Whether the number of replicas was changed since the sets were last scaled. Then they are scaled in proportion
    /// first, so that a rollout that is under way keeps its balance.
    fn is_scaling(&self) -> bool {
        let differs =
            |set: &Arc<ReplicaSet>| revision::scaled_for(set).0.is_some_and(|d| d != wanted(&self.deployment));
        self.active().iter().any(differs)
    }

    fn change(&mut self, set: &Arc<ReplicaSet>, to: i32, annotations: Labels, min_ready_seconds: Option<i32>) {
        let mut changed = (**set).clone();
        let spec = &mut changed.spec;
        spec.replicas = Some(to);
        if min_ready_seconds.is_some() {
            spec.min_ready_seconds = min_ready_seconds;
        }
        changed.metadata.annotations = Some(annotations.clone());
        let key = name(&**set).to_owned();
        let earlier = match self.updates.get(&key) {
            Some(Action::Update { min_ready_seconds, .. }) => *min_ready_seconds,
            _ => None,
        };
        let before = self.before.get(&key).unwrap_or(set).clone();
        let min_ready_seconds = min_ready_seconds.or(earlier);
        self.updates.insert(key, Action::Update { set: before, replicas: to, annotations, min_ready_seconds });
        let changed = Arc::new(changed);
        for known in self.old.iter_mut().chain(&mut self.newest) {
            if uid(&**known) == uid(&**set) {
                *known = changed.clone();
            }
        }
    }

    /// Scales a set and notes for what. Returns whether its number changed.
    fn scale(&mut self, set: &Arc<ReplicaSet>, to: i32) -> bool {
        let before = set.metadata.annotations.clone().unwrap_or_default();
        let mut annotations = before.clone();
        let desired = wanted(&self.deployment);
        revision::note_scale(&mut annotations, desired, desired + max_surge(&self.deployment));
        if replicas(set) != to || annotations != before {
            self.change(set, to, annotations, None);
        }
        replicas(set) != to
    }

    /// Brings revision and annotations of the newest set up to date, creating it if it is missing and wanted.
    fn sync_newest(&mut self, create: bool) {
        let last = self.old.iter().map(|set| revision::of(set)).max().unwrap_or(0);
        let next = last + 1;
        let now = self.input.now;
        if let Some(set) = self.newest.clone() {
            let annotations = revision::annotations(&self.deployment, Some(&set), next);
            let min_ready = self.deployment.spec.min_ready_seconds;
            let has = set.spec.min_ready_seconds;
            let min_ready = (min_ready.unwrap_or(0) != has.unwrap_or(0)).then(|| min_ready.unwrap_or(0));
            if Some(&annotations) != set.metadata.annotations.as_ref() || min_ready.is_some() {
                self.change(&set, replicas(&set), annotations, min_ready);
            }
            let revision = self.newest.as_deref().map_or(next, revision::of);
            self.note_revision(revision);
            if !conditions::has_progressing(&self.status) {
                let message = format!("Found new replica set {:?}", name(&*set));
                conditions::note_set(&self.deployment, &mut self.status, "FoundNewReplicaSet", &message, now);
            }
        } else if create {
            let max = wanted(&self.deployment) + max_surge(&self.deployment);
            let room = if is_recreate(&self.deployment) { wanted(&self.deployment) } else { max - self.total() };
            let replicas = room.min(wanted(&self.deployment)).max(0);
            let set = revision::new_set(&self.deployment, replicas, max, next);
            let message = format!("Created new replica set {:?}", name(&set));
            conditions::note_set(&self.deployment, &mut self.status, "NewReplicaSetCreated", &message, now);
            self.actions.push(Action::Create(Box::new(set.clone())));
            self.note_revision(next);
            self.newest = Some(Arc::new(set));
        }
    }

    fn note_revision(&mut self, revision: i64) {
        let text = revision.to_string();
        if annotation(&self.deployment, revision::REVISION) != Some(&text) {
            self.actions.push(Action::Annotate(Labels::from([(revision::REVISION.into(), text)])));
        }
    }

    fn roll(&mut self) {
        let existed = self.newest.is_some();
        self.sync_newest(true);
        // A set that has only just been made has its number already.
        if !existed || self.scale_newest_up_or_down() || self.scale_old_down() {
            return;
        }
        self.clean_up_if_complete();
    }

    fn scale_newest_up_or_down(&mut self) -> bool {
        let Some(set) = self.newest.clone() else { return false };
        let (has, wants) = (replicas(&set), wanted(&self.deployment));
        let to = if has > wants {
            wants
        } else {
            let room = wants + max_surge(&self.deployment) - self.total();
            has + room.min(wants - has).max(0)
        };
        self.scale(&set, to)
    }

    fn scale_old_down(&mut self) -> bool {
        if self.old.iter().all(|set| replicas(set) == 0) {
            return false;
        }
        let minimum = wanted(&self.deployment) - max_unavailable(&self.deployment);
        let unavailable_new = self.newest.as_ref().map_or(0, |set| replicas(set) - available(set));
        // Even if every new replica that is not available yet never will be, the minimum must stand.
        let budget = self.total() - minimum - unavailable_new;
        if budget <= 0 {
            return false;
        }
        let mut changed = false;
        // First what does not work anyway: it costs no availability.
        let mut left = budget;
        for set in self.old.clone() {
            let broken = (replicas(&set) - available(&set)).min(left);
            if broken > 0 {
                left -= broken;
                changed |= self.scale(&set, replicas(&set) - broken);
            }
        }
        let mut spare = self.all().iter().map(|set| available(set)).sum::<i32>() - minimum;
        for set in self.old.clone() {
            let take = replicas(&set).min(spare);
            if take > 0 {
                spare -= take;
                changed |= self.scale(&set, replicas(&set) - take);
            }
        }
        changed
    }

    fn recreate(&mut self) {
        self.sync_newest(false);
        let mut scaled = false;
        for set in self.old.clone() {
            if replicas(&set) > 0 {
                scaled |= self.scale(&set, 0);
            }
        }
        if scaled || self.old_pods_run() {
            return;
        }
        if self.newest.is_none() {
            self.sync_newest(true);
        } else if let Some(set) = self.newest.clone() {
            self.scale(&set, wanted(&self.deployment));
        }
        self.clean_up_if_complete();
    }

    /// Whether any pod of an older template has not ended yet.
    fn old_pods_run(&self) -> bool {
        self.old.iter().any(|set| (self.input.pods)(set).iter().any(|pod| !is_finished(pod)))
    }

    /// Distributes a change of the deployment's size over its sets in proportion to theirs.
    fn scale_proportionally(&mut self) {
        let wants = wanted(&self.deployment);
        let active = self.active();
        let single = match active.as_slice() {
            [] => self.newest.clone().or_else(|| self.old.last().cloned()),
            [one] => Some(one.clone()),
            _ => None,
        };
        if let Some(set) = single {
            // Even if its number is right already, what it was scaled for is not; else this would seem to be scaling for
            // ever.
            self.scale(&set, wants);
            return;
        }
        if active.is_empty() {
            return;
        }
        let saturated = self.newest.as_ref().is_some_and(|set| {
            revision::scaled_for(set).0 == Some(wants) && replicas(set) == wants && available(set) == wants
        });
        if saturated {
            for set in self.old.clone() {
                if replicas(&set) > 0 {
                    self.scale(&set, 0);
                }
            }
            return;
        }
        if is_recreate(&self.deployment) {
            return;
        }
        let allowed = if wants > 0 { wants + max_surge(&self.deployment) } else { 0 };
        let to_add = allowed - active.iter().map(|set| replicas(set)).sum::<i32>();
        let mut sets = active;
        if to_add < 0 {
            sets.sort_by_key(|set| (Reverse(replicas(set)), created(&**set)));
        } else {
            sets.sort_by_key(|set| (Reverse(replicas(set)), Reverse(created(&**set))));
        }
        let mut added = 0;
        let mut sizes = Vec::new();
        for set in &sets {
            let share = if to_add == 0 { 0 } else { self.share(set, to_add, added) };
            added += share;
            sizes.push(replicas(set) + share);
        }
        // What rounding left over goes to the largest.
        if let Some(first) = sizes.first_mut() {
            *first = (*first + to_add - added).max(0);
        }
        for (set, size) in sets.iter().zip(sizes) {
            self.scale(set, size);
        }
    }

    fn share(&self, set: &ReplicaSet, to_add: i32, added: i32) -> i32 {
        if replicas(set) == 0 || to_add == added {
            return 0;
        }
        let wants = wanted(&self.deployment);
        let share = if wants == 0 {
            -replicas(set)
        } else {
            let total = self.deployment.status.as_ref().and_then(|status| status.replicas).unwrap_or(0);
            let before = revision::scaled_for(set).1.filter(|max| *max > 0).unwrap_or(total).max(1);
            let size = f64::from(replicas(set)) * f64::from(wants + max_surge(&self.deployment)) / f64::from(before);
            size.round() as i32 - replicas(set)
        };
        let left = to_add - added;
        if to_add > 0 { share.min(left) } else { share.max(left) }
    }

    fn clean_up_if_complete(&mut self) {
        let counted = conditions::count(&self.deployment, &self.all(), self.newest.as_deref(), self.input.now);
        if conditions::is_complete(&self.deployment, &counted) {
            self.clean_up();
        }
    }

    /// Deletes old sets that `revisionHistoryLimit` does not keep, oldest revision first.
    fn clean_up(&mut self) {
        let Some(limit) = self.deployment.spec.revision_history_limit else { return };
        let mut candidates: Vec<_> = self.old.iter().filter(|set| !is_deleting(&***set)).cloned().collect();
        candidates.sort_by_key(|set| revision::of(set));
        let surplus = candidates.len().saturating_sub(limit.max(0) as usize);
        for set in candidates.into_iter().take(surplus) {
            let status = set.status.clone().unwrap_or_default();
            let settled = status.observed_generation >= set.metadata.generation;
            if status.replicas == 0 && replicas(&set) == 0 && settled {
                self.actions.push(Action::Delete(set));
            }
        }
    }

    fn finish_counting(mut self) -> Plan {
        self.deployment.status = Some(self.status.clone());
        let status = conditions::count(&self.deployment, &self.all(), self.newest.as_deref(), self.input.now);
        self.finish(status, None)
    }

    fn finish_rollout(mut self) -> Plan {
        self.deployment.status = Some(self.status.clone());
        let (status, again) =
            conditions::rollout(&self.deployment, &self.all(), self.newest.as_deref(), self.input.now);
        self.finish(status, again)
    }

    fn finish(self, status: DeploymentStatus, again: Option<Duration>) -> Plan {
        let mut actions = self.actions;
        actions.extend(self.updates.into_values());
        Plan { actions, status, again }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
