//! What to do next for a DaemonSet: the rules of
//! <https://kubernetes.io/docs/concepts/workloads/controllers/daemonset/> and of its rolling update
//! (<https://kubernetes.io/docs/tasks/manage-daemon/update-daemon-set/>; surge: KEP-1591), without any I/O.
//!
//! First every node gets the pods that it should have. Only when nothing is to be done about that, pods of older revisions are
//! taken away, and the next pass makes their successors.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    apps::v1::{ControllerRevision, DaemonSet, DaemonSetSpec, DaemonSetStatus, RollingUpdateDaemonSet},
    core::v1::{Node, Pod},
};

use super::node::{Fit, HASH, fit, target};
use crate::{
    context::{delay, sooner},
    runtime::objects::{created, is_available, is_deleting, is_finished, is_ready, name, phase, scaled},
};

/// No more pods than this are created or deleted in one pass (upstream's `BurstReplicas`).
const BURST: usize = 250;
/// Revisions that are kept, if nobody says how many.
const KEPT: usize = 10;
/// A node where a pod failed gets the next one after this long, then twice as long, and so on.
const FIRST_WAIT: SignedDuration = SignedDuration::from_secs(1);
const LONGEST_WAIT: SignedDuration = SignedDuration::from_mins(15);

/// What a plan is made from.
pub struct Input<'a> {
    /// The set.
    pub set: &'a DaemonSet,
    /// All nodes.
    pub nodes: &'a [Arc<Node>],
    /// The pods that are the set's own.
    pub pods: &'a [Arc<Pod>],
    /// The revision of the set's template.
    pub current: &'a ControllerRevision,
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
    /// It should not be where it is.
    Surplus,
    /// It is of another revision.
    Outdated,
}

/// What to do, the status, and when to look again.
#[derive(Debug)]
pub struct Plan {
    /// The nodes for which a pod is made.
    pub create: Vec<String>,
    /// Pods to delete.
    pub delete: Vec<(Arc<Pod>, Why)>,
    /// The status.
    pub status: DaemonSetStatus,
    /// When something changes by time alone.
    pub again: Option<Duration>,
}

/// Where pods have failed lately: how long to wait, and since when. It is lost when the controller starts again, which costs a
/// pod or two that come too early.
#[derive(Debug, Default)]
pub struct Backoff(BTreeMap<String, (SignedDuration, Timestamp)>);

impl Backoff {
    /// Whether a failed pod may be replaced on a node now, which is noted then; or how long it has to wait.
    fn attempt(&mut self, node: &str, now: Timestamp) -> Result<(), SignedDuration> {
        let next = match self.0.get(node) {
            Some((wait, since)) if now.duration_since(*since) < *wait => {
                return Err(*wait - now.duration_since(*since));
            }
            // What went well for so long has not failed before.
            Some((_, since)) if now.duration_since(*since) > LONGEST_WAIT * 2 => FIRST_WAIT,
            Some((wait, _)) => (*wait * 2).min(LONGEST_WAIT),
            None => FIRST_WAIT,
        };
        self.0.insert(node.to_owned(), (next, now));
        Ok(())
    }

    /// Forgets what is too old to matter.
    fn tidy(&mut self, now: Timestamp) {
        self.0.retain(|_, (_, since)| now.duration_since(*since) <= LONGEST_WAIT * 2);
    }
}

/// The hash of a revision, as its pods carry it.
pub(super) fn hash_of(revision: &ControllerRevision) -> &str {
    revision.metadata.labels.as_ref().and_then(|labels| labels.get(HASH)).map(String::as_str).unwrap_or_default()
}

fn pod_hash(pod: &Pod) -> &str {
    pod.metadata.labels.as_ref().and_then(|labels| labels.get(HASH)).map(String::as_str).unwrap_or_default()
}

/// Decides.
pub fn plan(input: &Input<'_>, backoff: &mut Backoff) -> Plan {
    backoff.tidy(input.now);
    let mut work = Work {
        input,
        spec: &input.set.spec,
        hash: hash_of(input.current),
        fits: input.nodes.iter().map(|node| (name(&**node), fit(input.set, node))).collect(),
        by_node: BTreeMap::new(),
        plan: Plan { create: Vec::new(), delete: Vec::new(), status: DaemonSetStatus::default(), again: None },
    };
    work.place();
    if !is_deleting(input.set) {
        work.manage(backoff);
        if work.plan.create.is_empty() && work.plan.delete.is_empty() && work.rolls() {
            match work.limits() {
                (0, unavailable) => work.roll(unavailable),
                (surge, _) => work.surge(surge),
            }
        }
    }
    work.count();
    work.plan.create.truncate(BURST);
    work.plan.delete.truncate(BURST);
    work.plan
}

struct Work<'a> {
    input: &'a Input<'a>,
    spec: &'a DaemonSetSpec,
    hash: &'a str,
    fits: BTreeMap<&'a str, Fit>,
    /// Those bound first, then the oldest. What has ended and only waits for a finalizer is not there any more.
    by_node: BTreeMap<&'a str, Vec<&'a Arc<Pod>>>,
    plan: Plan,
}

/// The pods of one node that are not ending: the one of the current revision, and the one of another.
struct Pair<'a> {
    new: Option<&'a Arc<Pod>>,
    old: Option<&'a Arc<Pod>>,
}

impl<'a> Work<'a> {
    fn place(&mut self) {
        for pod in self.input.pods.iter().filter(|pod| !(is_finished(pod) && is_deleting(&***pod))) {
            if let Some(node) = target(pod) {
                self.by_node.entry(node).or_default().push(pod);
            }
        }
        let bound = |pod: &Pod| pod.spec.as_ref().is_some_and(|s| s.node_name.as_ref().is_some_and(|n| !n.is_empty()));
        for pods in self.by_node.values_mut() {
            pods.sort_by_key(|pod| (Reverse(bound(pod)), created(&***pod), name(&***pod).to_owned()));
        }
    }

    fn on(&self, node: &str) -> &[&'a Arc<Pod>] {
        self.by_node.get(node).map(Vec::as_slice).unwrap_or_default()
    }

    fn delete(&mut self, pod: &Arc<Pod>, why: Why) {
        self.plan.delete.push((pod.clone(), why));
    }

    /// Whether a pod is available; if it will be by time alone, that is when to look again.
    fn available(&mut self, pod: &Pod) -> bool {
        match is_available(pod, self.spec.min_ready_seconds.unwrap_or(0), self.input.now) {
            Ok(yes) => yes,
            Err(missing) => {
                self.plan.again = sooner(self.plan.again, Some(delay(missing)));
                false
            }
        }
    }

    fn rolling(&self) -> Option<&'a RollingUpdateDaemonSet> {
        self.spec.update_strategy.as_ref()?.rolling_update.as_ref()
    }

    fn rolls(&self) -> bool {
        self.spec.update_strategy.as_ref().and_then(|s| s.type_.as_deref()) != Some("OnDelete")
    }

    fn wanted(&self) -> i32 {
        self.fits.values().filter(|fit| **fit == Fit::Run).count() as i32
    }

    /// How many nodes may have two pods, and how many none. Both are rounded up; when both come to nothing, one node may have
    /// none, else nothing could ever move.
    fn limits(&self) -> (usize, usize) {
        let (rolling, total) = (self.rolling(), self.wanted());
        let surge = scaled(rolling.and_then(|r| r.max_surge.as_ref()), 0, total, true).max(0) as usize;
        let unavailable = scaled(rolling.and_then(|r| r.max_unavailable.as_ref()), 1, total, true).max(0) as usize;
        if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable) }
    }

    /// Sees to it that every node has the pods that it should have.
    fn manage(&mut self, backoff: &mut Backoff) {
        let fits: Vec<(&str, Fit)> = self.fits.iter().map(|(node, fit)| (*node, *fit)).collect();
        for (node, fit) in fits {
            let pods = self.on(node).to_vec();
            match fit {
                Fit::Run if pods.is_empty() => self.plan.create.push(node.to_owned()),
                Fit::Run | Fit::Stay => self.tend(node, &pods, backoff),
                Fit::Not => self.dismiss(&pods),
            }
        }
        // A pod that waits for a node that is gone would wait for ever. One that was bound is the garbage collector's.
        let lost: Vec<_> = self.by_node.iter().filter(|(node, _)| !self.fits.contains_key(*node)).collect();
        let lost: Vec<&Arc<Pod>> = lost.into_iter().flat_map(|(_, pods)| pods.iter().copied()).collect();
        let waiting = |pod: &Pod| pod.spec.as_ref().is_none_or(|s| s.node_name.as_deref().unwrap_or("").is_empty());
        self.dismiss(&lost.into_iter().filter(|pod| waiting(pod)).collect::<Vec<_>>());
    }

    fn dismiss(&mut self, pods: &[&Arc<Pod>]) {
        for pod in pods.iter().filter(|pod| !is_deleting(&****pod)) {
            self.delete(pod, Why::Surplus);
        }
    }

    /// Sees to a node that has pods and may have them.
    fn tend(&mut self, node: &str, pods: &[&'a Arc<Pod>], backoff: &mut Backoff) {
        let mut running = Vec::new();
        for pod in pods.iter().copied().filter(|pod| !is_deleting(&***pod)) {
            match phase(pod) {
                "Failed" => match backoff.attempt(node, self.input.now) {
                    Ok(()) => self.delete(pod, Why::Failed),
                    Err(left) => self.plan.again = sooner(self.plan.again, Some(delay(left))),
                },
                "Succeeded" => self.delete(pod, Why::Ended),
                _ => running.push(pod),
            }
        }
        if running.len() < 2 {
            return;
        }
        if self.limits().0 == 0 || !self.rolls() {
            running[1..].iter().for_each(|pod| self.delete(pod, Why::Surplus));
            return;
        }
        let (new, old): (Vec<_>, Vec<_>) = running.into_iter().partition(|pod| pod_hash(pod) == self.hash);
        new.iter().skip(1).chain(old.iter().skip(1)).for_each(|pod| self.delete(pod, Why::Surplus));
        if let (Some(new), Some(old)) = (new.first(), old.first())
            && (!is_ready(old) || self.available(new))
        {
            self.delete(old, Why::Outdated);
        }
    }

    /// The pods of each node; none where there are several of a kind, which the next pass has to put right first. What is left of
    /// a node that is gone holds nothing up.
    fn pairs(&self) -> Vec<(&'a str, Option<Pair<'a>>)> {
        let pair = |pods: &[&'a Arc<Pod>]| {
            let live = pods.iter().copied().filter(|pod| !is_deleting(&***pod));
            let (new, old): (Vec<_>, Vec<_>) = live.partition(|pod| pod_hash(pod) == self.hash);
            (new.len() < 2 && old.len() < 2).then(|| Pair { new: new.first().copied(), old: old.first().copied() })
        };
        let there = self.by_node.iter().filter(|(node, _)| self.fits.contains_key(*node));
        there.map(|(node, pods)| (*node, pair(pods))).collect()
    }

    /// Takes pods of older revisions away, while no more than `most` nodes are without one that is available.
    fn roll(&mut self, most: usize) {
        let (mut unavailable, mut broken, mut candidates) = (0, Vec::new(), Vec::new());
        for (_, pair) in self.pairs() {
            match pair {
                Some(Pair { new: Some(new), old: None }) => unavailable += usize::from(!self.available(new)),
                Some(Pair { new: None, old: Some(old) }) if self.available(old) => candidates.push(old),
                // Its end costs nothing. It counts all the same, so that what is broken does not make way for more.
                Some(Pair { new: None, old: Some(old) }) => {
                    unavailable += 1;
                    broken.push(old);
                }
                _ => unavailable += 1,
            }
        }
        let room = most.saturating_sub(unavailable);
        for old in broken.into_iter().chain(candidates.into_iter().take(room)) {
            self.delete(old, Why::Outdated);
        }
    }

    /// Makes pods of the current revision beside older ones, on no more than `most` nodes at a time, and takes the older ones
    /// away when the new ones are available (KEP-1591).
    fn surge(&mut self, most: usize) {
        let (mut surging, mut broken, mut candidates) = (0, Vec::new(), Vec::new());
        for (node, pair) in self.pairs() {
            match pair {
                None => surging += 1,
                Some(Pair { old: None, .. }) => {}
                Some(Pair { new: None, old: Some(old) }) if self.fits.get(node) == Some(&Fit::Run) => {
                    match self.available(old) {
                        true => candidates.push(node.to_owned()),
                        false => broken.push(node.to_owned()),
                    }
                }
                Some(Pair { new: None, .. }) => {}
                Some(Pair { new: Some(new), old: Some(old) }) => match self.available(new) {
                    true => self.delete(old, Why::Outdated),
                    false => surging += 1,
                },
            }
        }
        let room = most.saturating_sub(surging);
        self.plan.create.extend(broken.into_iter().chain(candidates.into_iter().take(room)));
    }

    /// The status, as things are.
    fn count(&mut self) {
        let set = self.input.set;
        let mut status = DaemonSetStatus {
            observed_generation: set.metadata.generation,
            collision_count: set.status.as_ref().and_then(|status| status.collision_count),
            conditions: set.status.as_ref().and_then(|status| status.conditions.clone()),
            desired_number_scheduled: self.wanted(),
            ..DaemonSetStatus::default()
        };
        let (mut available, mut updated) = (0, 0);
        let fits: Vec<(&str, Fit)> = self.fits.iter().map(|(node, fit)| (*node, *fit)).collect();
        for (node, fit) in fits {
            let Some(pod) = self.on(node).first().copied() else { continue };
            if fit != Fit::Run {
                status.number_misscheduled += 1;
                continue;
            }
            status.current_number_scheduled += 1;
            status.number_ready += i32::from(is_ready(pod));
            available += i32::from(self.available(pod));
            updated += i32::from(pod_hash(pod) == self.hash);
        }
        let some = |number: i32| Some(number).filter(|n| *n > 0);
        status.number_available = some(available);
        status.number_unavailable = some(status.desired_number_scheduled - available);
        status.updated_number_scheduled = some(updated);
        self.plan.status = status;
    }
}

/// The revisions that history need not keep: the oldest beyond the limit, but none that a pod is made from.
pub(super) fn surplus(
    set: &DaemonSet,
    revisions: &[Arc<ControllerRevision>],
    current: &ControllerRevision,
    pods: &[Arc<Pod>],
) -> Vec<Arc<ControllerRevision>> {
    let limit = set.spec.revision_history_limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(KEPT);
    let live: BTreeSet<&str> = pods.iter().map(|pod| pod_hash(pod)).collect();
    let old: Vec<_> = revisions.iter().filter(|r| name(&***r) != name(current)).collect();
    let surplus = old.len().saturating_sub(limit);
    old.into_iter().filter(|revision| !live.contains(hash_of(revision))).take(surplus).cloned().collect()
}
